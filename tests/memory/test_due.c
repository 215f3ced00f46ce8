/* SPDX-License-Identifier: Apache-2.0
 *
 * Which extents are to be merged (memory/due.c), over manifests without documents.
 */
#include "support.h"

#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "memory/internal.h"

#define SEALED 512u
#define MERGED 4096u
#define EXTENTS_MAX 300u

/* A manifest without documents. */
typedef struct model {
    loci_manifest manifest;
    loci_manifest_extent extents[EXTENTS_MAX];
    uint64_t seed;
} model;

static uint32_t below(model *m, uint32_t n) {
    return (uint32_t)(loci_rng_next(&m->seed) % n);
}

static void push(model *m, uint32_t tokens, uint32_t segments, uint32_t dead) {
    assert_true(m->manifest.extent_count < EXTENTS_MAX);
    m->manifest.extents = m->extents;
    m->extents[m->manifest.extent_count++] =
        (loci_manifest_extent){.tokens = tokens, .segments = segments, .dead_tokens = dead};
}

/* What the merger makes of the plan. */
static void carry_out(model *m, const loci_rebuild_plan *plan) {
    loci_manifest_extent sum = {0};
    for (uint32_t i = plan->first; i < plan->last; i++) {
        sum.tokens += loci_extent_live_tokens(&m->extents[i]);
        sum.segments += m->extents[i].segments - m->extents[i].dead_segments;
    }
    uint32_t after = m->manifest.extent_count - plan->last;
    m->extents[plan->first] = sum;
    memmove(&m->extents[plan->first + 1], &m->extents[plan->last], after * sizeof sum);
    m->manifest.extent_count = plan->first + 1 + after;
}

static uint32_t merge_all(model *m, bool calm) {
    loci_rebuild_plan plan;
    uint32_t merges = 0, dead = 0;
    uint32_t most = m->manifest.extent_count;
    for (uint32_t i = 0; i < most; i++) dead += m->extents[i].dead_tokens > 0;
    while (loci_merge_due(&m->manifest, SEALED, MERGED, calm, NULL, &plan)) {
        assert_true(plan.merge && !plan.tail && !plan.rewrite);
        assert_true(plan.first < plan.last && plan.last <= m->manifest.extent_count);
        uint64_t live = 0;
        for (uint32_t i = plan.first; i < plan.last; i++) {
            assert_false(m->extents[i].partial && m->extents[i].tokens <= SEALED);
            assert_in_range(m->extents[i].tokens, 1, MERGED); /* there is memory for so much */
            live += loci_extent_live_tokens(&m->extents[i]);
        }
        assert_in_range(live, 1, MERGED);
        carry_out(m, &plan);
        assert_in_range(m->extents[plan.first].segments, 0, LOCI_EXTENT_SEGMENTS_MAX);
        assert_true(++merges <= most + dead);
    }
    return merges;
}

/* n sealed extents, with what came in between: the ones of n in binary, none above the largest. */
static void test_ends_in_the_binary_number(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        model direct = {.seed = seed}, torn = {.seed = seed + 1000};
        uint32_t n = 1 + below(&direct, 60);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t tokens = SEALED - below(&direct, 32);
            push(&direct, tokens, 16, 0);
            push(&torn, tokens, 16, 0);
            if (below(&torn, 3) == 0) merge_all(&torn, below(&torn, 2) == 0);
            loci_rebuild_plan plan;
            if (below(&torn, 3) == 0 &&
                loci_merge_due(&torn.manifest, SEALED, MERGED, true, NULL, &plan))
                carry_out(&torn, &plan);
        }
        /* Each token of a bulk load is written once more at most. */
        uint32_t ones = (uint32_t)__builtin_popcount(n % 8), chunks = n / 8 + ones;
        assert_true(merge_all(&direct, true) <= chunks);
        merge_all(&torn, true);
        assert_int_equal(direct.manifest.extent_count, chunks);
        assert_int_equal(torn.manifest.extent_count, chunks);
        for (uint32_t i = 0; i < chunks; i++)
            assert_int_equal(torn.extents[i].tokens, direct.extents[i].tokens);
    }
}

/* Extents of any size with dead tokens, many short segments and a partial one come to an end. */
static void test_ends_whatever_there_is(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 500; seed++) {
        model m = {.seed = seed};
        uint32_t n = below(&m, 40);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t tokens = 1 + below(&m, below(&m, 4) == 0 ? 2 * MERGED : SEALED);
            uint32_t segments = 1 + below(&m, below(&m, 4) == 0 ? 40000 : 40);
            uint32_t dead = below(&m, 3) == 0 ? below(&m, tokens + 1) : 0;
            push(&m, tokens, segments, dead);
        }
        if (n > 0) m.extents[n - 1].partial = below(&m, 2) == 0;
        merge_all(&m, false);
        merge_all(&m, true);
        /* What is left and more than a quarter dead is too large, or small: the other thread's. */
        for (uint32_t i = 0; i < m.manifest.extent_count; i++) {
            const loci_manifest_extent *one = &m.extents[i];
            if (4ull * one->dead_tokens < one->tokens || one->dead_tokens == one->tokens) continue;
            assert_true(one->tokens <= SEALED || one->tokens > MERGED || one->partial);
        }
    }
}

static void test_waits_for_what_may_still_come(void **state) {
    (void)state;
    loci_rebuild_plan plan;
    model m = {.seed = 1};
    for (uint32_t i = 0; i < 7; i++) push(&m, SEALED, 16, 0);
    assert_false(loci_merge_due(&m.manifest, SEALED, MERGED, false, NULL, &plan));
    assert_true(loci_merge_due(&m.manifest, SEALED, MERGED, true, NULL, &plan));
    assert_int_equal(plan.last - plan.first, 4);
    push(&m, SEALED, 16, 0);
    assert_true(loci_merge_due(&m.manifest, SEALED, MERGED, false, NULL, &plan));
    assert_int_equal(plan.last - plan.first, 8);
    /* No larger than allowed; none where none is. */
    assert_true(loci_merge_due(&m.manifest, SEALED, 3 * SEALED, true, NULL, &plan));
    assert_int_equal(plan.last - plan.first, 2);
    assert_false(loci_merge_due(&m.manifest, SEALED, 2 * SEALED - 1, true, NULL, &plan));
    assert_false(loci_merge_due(&m.manifest, SEALED, 0, true, NULL, &plan));
    m.extents[7].partial = true;
    assert_false(loci_merge_due(&m.manifest, SEALED, MERGED, false, NULL, &plan));
}

/* While documents come no extent is made larger than a million tokens; afterwards the end is the
 * same as if all had come at once. */
static void test_a_long_registration_is_merged_on_the_way(void **state) {
    (void)state;
    enum { SEAL = LOCI_EXTENT_SEAL_TOKENS, EACH = (1 << 20) / SEAL, MOST = 4 << 20 };
    loci_rebuild_plan plan;
    model m = {.seed = 1};
    for (uint32_t i = 1; i <= 4 * EACH + EACH / 2; i++) {
        push(&m, SEAL, 16, 0);
        while (loci_merge_due(&m.manifest, SEAL, MOST, false, NULL, &plan)) carry_out(&m, &plan);
        assert_int_equal(m.manifest.extent_count, i / EACH + i % EACH);
    }
    while (loci_merge_due(&m.manifest, SEAL, MOST, true, NULL, &plan)) carry_out(&m, &plan);
    assert_int_equal(m.manifest.extent_count, 2);
    assert_int_equal(m.extents[0].tokens, MOST);
}

/* Extents that could not be read stay; what stands before and behind them is merged as ever. */
static void test_others_are_merged_around_what_stands_apart(void **state) {
    (void)state;
    loci_rebuild_plan plan;
    model m = {.seed = 1};
    uint8_t ids[2][LOCI_EXTENT_ID_BYTES] = {{1}, {2}};
    loci_id_list apart = {ids, 2};
    for (uint32_t i = 0; i < 14; i++) push(&m, SEALED, 16, 0);
    m.extents[5].id[0] = 1;
    m.extents[13].id[0] = 2;
    while (loci_merge_due(&m.manifest, SEALED, MERGED, true, &apart, &plan)) carry_out(&m, &plan);
    static const uint32_t expected[] = {4, 1, 1, 4, 2, 1, 1}; /* 5, one, 7, one */
    assert_int_equal(m.manifest.extent_count, 7);
    for (uint32_t i = 0; i < 7; i++) assert_int_equal(m.extents[i].tokens, expected[i] * SEALED);
    assert_int_equal(m.extents[2].id[0], 1);
    assert_int_equal(m.extents[6].id[0], 2);
    assert_true(loci_merge_due(&m.manifest, SEALED, MERGED, true, NULL, &plan));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ends_in_the_binary_number),
        cmocka_unit_test(test_ends_whatever_there_is),
        cmocka_unit_test(test_waits_for_what_may_still_come),
        cmocka_unit_test(test_a_long_registration_is_merged_on_the_way),
        cmocka_unit_test(test_others_are_merged_around_what_stands_apart),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
