/* SPDX-License-Identifier: Apache-2.0
 *
 * How the memory budget is shared out: the least that is named works, a byte less does not, more
 * memory never makes a share smaller, and something is always left for look-ups.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "services/engine/plan.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

static const loci_model_config built_in = {.vocab = 8192,
                                           .hidden = 384,
                                           .intermediate = 1024,
                                           .layers = 12,
                                           .q_heads = 6,
                                           .kv_heads = 2,
                                           .head_dim = 64,
                                           .tied_embeddings = true,
                                           .retrieval_count = 3};
/* Llama 3 of 8 billion parameters. */
static const loci_model_config large = {.vocab = 128256,
                                        .hidden = 4096,
                                        .intermediate = 14336,
                                        .layers = 32,
                                        .q_heads = 32,
                                        .kv_heads = 8,
                                        .head_dim = 128,
                                        .retrieval_count = 32};
static loci_error err;
static loci_geometry shape;

static loci_plan_request request_of(const loci_model_config *config, uint64_t limit) {
    shape = (loci_geometry){.retrieval_layers = config->retrieval_count,
                            .kv_heads = config->kv_heads,
                            .head_dim = config->head_dim,
                            .segment_tokens = 255};
    return (loci_plan_request){.config = config,
                               .geometry = &shape,
                               .precision = LOCI_BF16,
                               .tokenizer_bytes = 300000,
                               .threads = 2,
                               .calls_bytes = 40 * MIB,
                               .sequence_tokens = 1300,
                               .limit = limit};
}

/* The smallest limit in bytes that the text of a refusal names. */
static uint64_t least_of(loci_plan_request request) {
    loci_plan plan;
    request.limit = MIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_E_INVAL);
    assert_string_equal(err.reason, "MEMORY_TOO_SMALL");
    const char *at = strstr(err.text, "smallest that works here is ");
    assert_non_null(at);
    return strtoull(at + strlen("smallest that works here is "), NULL, 10) * MIB;
}

static uint64_t sum(const loci_plan *plan) {
    return plan->process + plan->model + plan->database + plan->registration +
           plan->slots * plan->slot;
}

static void check_plans(const loci_model_config *config, uint64_t most, bool overlap) {
    loci_plan_request request = request_of(config, 0);
    request.pairs_overlap = overlap;
    loci_plan plan, before = {0};
    uint64_t least = least_of(request);
    request.limit = least - MIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_E_INVAL);
    for (request.limit = least; request.limit < most; request.limit += request.limit / 7) {
        if (loci_plan_make(&request, &plan, &err)) fail_msg("%s", err.text);
        assert_true(sum(&plan) + 32 * MIB <= request.limit);
        assert_true(plan.database >= before.database && plan.slots >= before.slots);
        assert_true(plan.registration >= before.registration);
        assert_true(plan.document_bytes_max >= before.document_bytes_max);
        assert_true(plan.document_bytes_max <= 64 * MIB && plan.slots <= 2);
        assert_true(plan.extent_kv_bytes >= before.extent_kv_bytes);
        loci_budget *budget = NULL;
        assert_int_equal(loci_budget_create(request.limit, &budget, &err), LOCI_OK);
        assert_int_equal(loci_plan_take(&plan, budget, &err), LOCI_OK);
        loci_budget_usage usage;
        loci_budget_usage_of(budget, &usage);
        assert_true(usage.used == sum(&plan));
        loci_budget_destroy(budget);
        before = plan;
    }
    assert_true(before.slots == 2 && before.document_bytes_max == 64 * MIB);
}

static void test_plans_of_the_built_in_model(void **state) {
    (void)state;
    check_plans(&built_in, 64 * GIB, false);
    check_plans(&built_in, 64 * GIB, true);
    loci_plan_request request = request_of(&built_in, 4 * GIB);
    loci_plan plan;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    /* 22 million weights of two bytes. */
    assert_true(plan.model > 40 * MIB && plan.model < 50 * MIB);
    request.precision = LOCI_F32;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(plan.model > 80 * MIB && plan.model < 100 * MIB);
}

static void test_plans_of_a_large_model(void **state) {
    (void)state;
    check_plans(&large, 256 * GIB, false);
    check_plans(&large, 256 * GIB, true);
    loci_plan_request request = request_of(&large, 64 * GIB);
    loci_plan plan;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(plan.model > 14 * GIB && plan.model < 16 * GIB);
    /* 131,072 bytes a token: extents of 2,048 tokens, but of 32,768 where there is memory. */
    assert_true(plan.extent_kv_bytes < 4 * GIB);
    request.limit = 256 * GIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_int_equal(plan.extent_kv_bytes, 4 * GIB);
    assert_false(plan.seal_beside);
    /* One more of these where a device clusters, if there is room for it. */
    uint64_t single = plan.registration;
    request.pairs_overlap = true;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(plan.seal_beside && plan.registration >= single + 4 * GIB);
    request.limit = 64 * GIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_false(plan.seal_beside);
    request = request_of(&large, 0);
    request.limit = least_of(request);
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_int_equal(plan.extent_kv_bytes, 256 * MIB);
}

/* What is in the memory of a device takes none of the budget, and nothing is mapped for it. */
static void test_a_model_on_a_device_is_not_counted(void **state) {
    (void)state;
    loci_plan_request request = request_of(&large, 0), host = request_of(&large, 64 * GIB);
    loci_plan plan, beside;
    request.on_device = request.can_map = true;
    request.limit = least_of(request);
    assert_true(request.limit < GIB + GIB / 8);
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(!plan.mapped && plan.model >= 64 * MIB && plan.model < 80 * MIB);
    assert_int_equal(loci_plan_make(&host, &beside, &err), LOCI_OK);
    assert_true(plan.slot < beside.slot / 8);
    /* Weights go there one after another, those of a second model too. */
    request.also_config = &built_in;
    request.also_tokenizer_bytes = 300000;
    request.also_sequence_tokens = 1300;
    request.limit = 2 * GIB;
    assert_int_equal(loci_plan_make(&request, &beside, &err), LOCI_OK);
    assert_int_equal(beside.model, plan.model + 4 * 300000);
    /* Not enough for its packed weights on the CPU (below). */
    request = request_of(&large, 12 * GIB);
    request.on_device = true;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(!plan.mapped && plan.slots == 2 && plan.merge_tokens > 0);
}

/* Weights that can be are mapped where packed ones do not fit, and only there. */
static void test_weights_are_mapped_when_they_do_not_fit(void **state) {
    (void)state;
    loci_plan_request request = request_of(&large, 12 * GIB);
    loci_plan plan;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_E_INVAL);
    request.can_map = true;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(plan.mapped && !plan.also_mapped && plan.model < 256 * MIB);
    assert_true(sum(&plan) < 12 * GIB);
    request.limit = least_of(request);
    assert_true(request.limit < 4 * GIB);
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    request.limit = 64 * GIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(!plan.mapped && plan.model > 14 * GIB);
    /* A small model that cannot be mapped beside a large one that can. */
    request.limit = 12 * GIB;
    request.also_config = &built_in;
    request.also_sequence_tokens = 1300;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_true(plan.mapped && !plan.also_mapped && plan.model > 40 * MIB);
}

/* A bias of queries, keys and values is packed as a weight of one row, filled up to 64, in f32. */
static void test_biases_are_counted(void **state) {
    (void)state;
    loci_model_config biased = built_in;
    biased.qkv_bias = true;
    loci_plan without, with;
    loci_plan_request request = request_of(&built_in, 4 * GIB);
    assert_int_equal(loci_plan_make(&request, &without, &err), LOCI_OK);
    request = request_of(&biased, 4 * GIB);
    assert_int_equal(loci_plan_make(&request, &with, &err), LOCI_OK);
    assert_int_equal(with.model - without.model, 12 * 64 * (6 + 2 * 2) * 64 * 4);
}

static void test_questions_that_are_asked_for_are_counted(void **state) {
    (void)state;
    loci_plan_request request = request_of(&built_in, 0);
    loci_plan plan;
    uint64_t one = least_of(request);
    request.queries = 9;
    uint64_t nine = least_of(request);
    request.limit = nine;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_int_equal(plan.slots, 9);
    assert_true(nine - one > 8 * plan.slot - MIB && nine - one < 8 * plan.slot + MIB);
    request.limit = 64 * GIB;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_int_equal(plan.slots, 9);
}

static void test_a_model_that_also_answers_is_counted(void **state) {
    (void)state;
    loci_plan_request request = request_of(&built_in, 0);
    loci_plan plan;
    uint64_t alone = least_of(request);
    request.also_config = &built_in;
    request.also_tokenizer_bytes = 300000;
    request.also_sequence_tokens = 1300;
    uint64_t both = least_of(request);
    request.limit = both;
    assert_int_equal(loci_plan_make(&request, &plan, &err), LOCI_OK);
    assert_int_equal(plan.also_slot, plan.slot);
    uint64_t more = plan.model / 2 + plan.also_slot;
    assert_true(both - alone > more - 2 * MIB && both - alone < more + 2 * MIB);
    loci_budget *budget = NULL;
    loci_budget_usage usage;
    assert_int_equal(loci_budget_create(request.limit, &budget, &err), LOCI_OK);
    assert_int_equal(loci_plan_take(&plan, budget, &err), LOCI_OK);
    loci_budget_usage_of(budget, &usage);
    assert_true(usage.used == sum(&plan) + plan.also_slot);
    loci_budget_destroy(budget);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_model_that_also_answers_is_counted),
        cmocka_unit_test(test_plans_of_the_built_in_model),
        cmocka_unit_test(test_plans_of_a_large_model),
        cmocka_unit_test(test_a_model_on_a_device_is_not_counted),
        cmocka_unit_test(test_weights_are_mapped_when_they_do_not_fit),
        cmocka_unit_test(test_biases_are_counted),
        cmocka_unit_test(test_questions_that_are_asked_for_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
