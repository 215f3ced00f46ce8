/* SPDX-License-Identifier: Apache-2.0
 *
 * Merging of extents: which are to be merged, what becomes of documents on the way, and that nobody
 * waits for it.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/rng.h"
#include "memory/internal.h"

#define SEALED 512u
#define MERGED 4096u
#define EXTENTS_MAX 300u

/* --- The rule ------------------------------------------------------------------------------- */

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
    while (loci_merge_due(&m->manifest, SEALED, MERGED, calm, &plan)) {
        assert_true(plan.merge && !plan.tail && !plan.rewrite);
        assert_true(plan.first < plan.last && plan.last <= m->manifest.extent_count);
        uint64_t live = 0;
        for (uint32_t i = plan.first; i < plan.last; i++) {
            assert_false(m->extents[i].partial);
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
            if (below(&torn, 3) == 0 && loci_merge_due(&torn.manifest, SEALED, MERGED, true, &plan))
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
    assert_false(loci_merge_due(&m.manifest, SEALED, MERGED, false, &plan));
    assert_true(loci_merge_due(&m.manifest, SEALED, MERGED, true, &plan));
    assert_int_equal(plan.last - plan.first, 4);
    push(&m, SEALED, 16, 0);
    assert_true(loci_merge_due(&m.manifest, SEALED, MERGED, false, &plan));
    assert_int_equal(plan.last - plan.first, 8);
    /* No larger than allowed; none where none is. */
    assert_true(loci_merge_due(&m.manifest, SEALED, 3 * SEALED, true, &plan));
    assert_int_equal(plan.last - plan.first, 2);
    assert_false(loci_merge_due(&m.manifest, SEALED, 2 * SEALED - 1, true, &plan));
    assert_false(loci_merge_due(&m.manifest, SEALED, 0, true, &plan));
    m.extents[7].partial = true;
    assert_false(loci_merge_due(&m.manifest, SEALED, MERGED, false, &plan));
}

/* --- Corpora -------------------------------------------------------------------------------- */

static int merge_setup(void **state) {
    fixture_setup(state);
    fixture *f = *state;
    f->options.extent_tokens = SEALED;
    f->options.merge_tokens = MERGED;
    return 0;
}

static void test_extents_become_one(void **state) {
    fixture *f = *state;
    loci_error err;
    char hashes[2][33];
    f->options.merge_calm_ms = 1u << 30; /* not yet */
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    for (uint64_t i = 0; i < 30; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, "a", id, i, 70 + i * 3);
    }
    wait_settled(f, "a");
    assert_true(info_of(f, "a").extents >= 6);
    assert_false(info_of(f, "a").merged);
    check_snapshot(f, "a");
    uint64_t tokens = info_of(f, "a").tokens, documents = info_of(f, "a").documents;
    fixture_close(f);
    f->options.merge_calm_ms = 20;
    fixture_open(f);
    fixture_start(f);
    wait_merged(f, "a");
    check_snapshot(f, "a");
    assert_int_equal(info_of(f, "a").tokens, tokens);
    assert_int_equal(info_of(f, "a").documents, documents);
    assert_in_range(info_of(f, "a").extents, 1, 4);
    wait_extents(f, "a", info_of(f, "a").extents);
    assert_ok(loci_corpus_manifest_hash(f->store, "a", hashes[0], &err));
    fixture_close(f);
    fixture_open(f);
    check_snapshot(f, "a");
    assert_ok(loci_corpus_manifest_hash(f->store, "a", hashes[1], &err));
    assert_string_equal(hashes[0], hashes[1]);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, merge_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ends_in_the_binary_number),
        cmocka_unit_test(test_ends_whatever_there_is),
        cmocka_unit_test(test_waits_for_what_may_still_come),
        TEST(test_extents_become_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
