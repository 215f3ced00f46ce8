/* SPDX-License-Identifier: Apache-2.0
 *
 * int8 rows on the device: whatever reads K and V gives what it gives with bf16 rows of the same
 * values, to the last bit. Shapes and inputs are drawn anew in every run (LOCI_TEST_SEED repeats
 * one).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "tests/attention/lookup_scene.h"

static uint64_t seed;
static uint64_t rows_cached; /* read in frames of the cache of rows */

/* Outputs, sums of exponentials, masses of segments, of each row where that is asked for. */
typedef struct outcome {
    float *values;
    size_t count;
    loci_lookup_stats stats;
} outcome;

static outcome look_up(scene *s, const setting *c, loci_select_params params, const float *total) {
    size_t heads = (size_t)s->rows * s->f.q_heads, values = heads * s->f.dim;
    outcome o = {.count = values + heads + (params.each ? s->rows : 1) * s->f.segments};
    loci_error err = {0};
    o.values = calloc(o.count, sizeof *o.values);
    assert_non_null(o.values);
    fixture_run run = {.rows = s->rows,
                       .q = s->q,
                       .steady = s->steady,
                       .params = params,
                       .out = o.values,
                       .lse = o.values + values,
                       .total = total,
                       .row_begin = c->row_begin,
                       .mass = o.values + values + heads};
    if (fixture_look_up(&s->f, &run, &err) != LOCI_OK) fail_msg("%s", err.text);
    o.stats = run.stats;
    return o;
}

static void compare_look_ups(scene *bf16, scene *int8, const setting *c, loci_select_params params,
                             const float *total) {
    outcome a = look_up(bf16, c, params, total), b = look_up(int8, c, params, total);
    for (size_t i = 0; i < a.count; i++)
        if (memcmp(&a.values[i], &b.values[i], sizeof a.values[i]) != 0)
            fail_msg("seed %llu, mode %d, precision %d, %u rows, %u x %u heads of %u, %u tokens: "
                     "value %zu of %zu is %.7g, of bf16 rows %.7g",
                     (unsigned long long)seed, (int)params.mode, (int)params.precision, c->rows,
                     c->kv_heads, c->group, c->dim, c->tokens, i, a.count, (double)b.values[i],
                     (double)a.values[i]);
    assert_int_equal(a.stats.selected_tokens, b.stats.selected_tokens);
    uint64_t bytes = 2 * c->dim + 16, tokens = a.stats.kv_bytes / (4 * c->dim);
    assert_int_equal(b.stats.kv_bytes, tokens * bytes);
    assert_int_equal(b.stats.dense_kv_bytes, a.stats.dense_kv_bytes / (4 * c->dim) * bytes);
    free(a.values);
    free(b.values);
}

/* below: K and V stand in memory of the host, where the cache of rows takes some up. */
static void compare_corpora(setting c, const loci_select_params *params, size_t count, bool killed,
                            bool below) {
    c.kv_rounded = true;
    scene bf16 = open_scene(c);
    c.kv_int8 = true;
    scene int8 = open_scene(c);
    loci_cuda_pairs *pairs = ((loci_cuda *)int8.f.backend->ctx)->pairs;
    loci_cuda_pairs_stats stats;
    size_t heads = (size_t)int8.rows * int8.f.q_heads;
    float *total = calloc(heads, sizeof *total);
    assert_non_null(total);
    for (size_t i = 0; i < heads; i++) total[i] = (float)int8.ref_lse[i];
    if (killed) {
        kill_some(&bf16, 2);
        kill_some(&int8, 2);
    }
    for (size_t p = 0; p < count; p++) {
        compare_look_ups(&bf16, &int8, &c, params[p], total);
        if (below && p == 0) {
            loci_cuda_pairs_lower(pairs);
            loci_cuda_pairs_stats_of(pairs, &stats);
            assert_true(stats.host_bytes > 0);
        }
    }
    loci_cuda_pairs_stats_of(pairs, &stats);
    rows_cached += stats.row_hits;
    free(total);
    close_scene(&bf16);
    close_scene(&int8);
}

/* One row, several, everything; by the kernels for 64 and 128 channels and by those for others. */
static void test_int8_rows_give_what_bf16_rows_give(void **state) {
    (void)state;
    static const uint32_t rows[] = {1, 3, 1, 20, 8, 75};
    uint64_t rng = seed * 2 + 1;
    for (uint32_t round = 0; round < 24; round++) {
        setting c = random_setting(&rng);
        if (round % 3) c.dim = round % 2 ? 64 : 128;
        c.rows = rows[round % 6];
        c.tokens += 300;
        c.row_begin = c.rows > 1 ? (uint32_t)(fixture_random(&rng) % c.rows) : 0;
        loci_select_params params[] = {
            {.mode = LOCI_MODE_DENSE},
            narrow(0.95f, 0),
            narrow(0.97f, 0),
            {.mode = LOCI_MODE_SQUEEZED, .squeezed_threshold = {2e-4f, 2e-4f}},
            {.mode = LOCI_MODE_DENSE, .precision = LOCI_BF16},
            {.mode = LOCI_MODE_DENSE},
            {.mode = LOCI_MODE_DENSE, .each = true}, /* of no more rows than that is for */
        };
        size_t count = sizeof params / sizeof *params - (c.rows > LOCI_GEMM_FEW_ROWS);
        compare_corpora(c, params, count, round % 4 == 3, round % 5 > 2);
    }
    assert_true(rows_cached > 0);
}

int main(void) {
    seed = fresh_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_int8_rows_give_what_bf16_rows_give),
    };
    return cmocka_run_group_tests_name("cuda: int8 rows", tests, NULL, NULL);
}
