/* SPDX-License-Identifier: Apache-2.0
 *
 * K and V as int8: rows keep what they are, pairs are the same however they came about, the kernels
 * of every instruction set agree with plain sums, and attention is near that over bf16. Inputs are
 * new ones in each run; a failure tells their seed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"
#include "attention/cpu/kernels.h"
#include "attention/index_layout.h"
#include "base/clock.h"
#include "tests/attention/corpus_fixture.h"

static uint64_t fresh_seed(void) {
    uint64_t seed = loci_now_ns() | 1;
    print_message("seed %llu\n", (unsigned long long)seed);
    return seed;
}

/* Of any size, at times with one channel that towers over the others, at times zero. */
static void random_row(uint64_t *rng, uint16_t *row, uint32_t dim) {
    float size = ldexpf(1.0f, (int)(fixture_random(rng) % 60) - 40);
    uint64_t kind = fixture_random(rng) % 8;
    for (uint32_t i = 0; i < dim; i++)
        row[i] = loci_f32_to_bf16(kind == 0 ? 0.0f : size * fixture_normal(rng));
    if (kind == 1) row[fixture_random(rng) % dim] = loci_f32_to_bf16(-90.0f * size);
}

static void test_rows_are_near_and_stay_as_they_are(void **state) {
    (void)state;
    uint64_t rng = fresh_seed();
    for (int round = 0; round < 3000; round++) {
        uint16_t row[256], back[256], again[256];
        int8_t quantised[256], twice[256];
        uint32_t dim = 16 + 16 * (uint32_t)(fixture_random(&rng) % 16);
        random_row(&rng, row, dim);
        uint16_t most = loci_kv_quantise(quantised, row, dim);
        loci_kv_restore(back, quantised, most, dim);
        float top = loci_bf16_to_f32(most);
        for (uint32_t i = 0; i < dim; i++) {
            float x = loci_bf16_to_f32(row[i]), y = loci_bf16_to_f32(back[i]);
            assert_true(fabsf(x) <= top);
            /* half a step, and half a unit of what bf16 keeps of it */
            assert_true(fabsf(x - y) <= top * (0.5001f / 127.0f) + fabsf(y) / 256.0f);
        }
        assert_int_equal(loci_kv_quantise(twice, back, dim), most);
        assert_memory_equal(twice, quantised, dim);
        loci_kv_restore(again, twice, most, dim);
        assert_memory_equal(again, back, dim * sizeof *back);
    }
    uint16_t tiny[16];
    int8_t zero[16] = {0}, quantised[16];
    for (uint32_t i = 0; i < 16; i++) tiny[i] = loci_f32_to_bf16(1e-33f);
    assert_int_equal(loci_kv_quantise(quantised, tiny, 16), 0);
    assert_memory_equal(quantised, zero, 16);
}

/* Ties go to the even neighbour: 127 / 254 of the top is 63.5 steps. */
static void test_rounding_is_to_nearest_even(void **state) {
    (void)state;
    static const float x[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 62.5f, 63.5f};
    static const int8_t expected[] = {127, 0, 2, 2, 0, -2, -2, 62, 64};
    uint16_t row[16] = {0};
    int8_t quantised[16];
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) row[i] = loci_f32_to_bf16(x[i]);
    assert_int_equal(loci_kv_quantise(quantised, row, 16), row[0]);
    assert_memory_equal(quantised, expected, sizeof expected);
}

/* Built of what was read back, and of the original: the same bytes. So a merge loses nothing, and
 * makes what registering at once would have. */
static void test_pairs_are_the_same_however_they_came_about(void **state) {
    (void)state;
    fixture_shape shape = {1, 1, 48, 1, 900, 37, 12, 0.7f, fresh_seed()};
    fixture f;
    loci_error err = {0};
    loci_pair_build_options options = {.position_codes = true, .kv_int8 = true};
    fixture_generate(&f, &shape);
    if (fixture_build(&f, NULL, 2, 2000, 0, &options, &err) != LOCI_OK) fail_msg("%s", err.text);
    size_t values = 900 * 48;
    uint16_t *k = malloc(2 * values * sizeof *k), *v = k + values;
    assert_non_null(k);
    const loci_extent_view *view = &f.views[0];
    assert_int_equal(loci_pair_read_positions(f.memory[0], f.memory_bytes[0], view->segment_begin,
                                              view->segments, NULL, k, v, &err),
                     LOCI_OK);
    assert_true(memcmp(k, f.k[0], values * sizeof *k) != 0);
    uint32_t slots[900];
    for (uint32_t t = 0; t < 900; t++) slots[t] = t / 37 << 16 | t % 37;
    static const char *const isas[] = {"portable", "avx2", "avx512", NULL};
    for (size_t i = 0; i < 4; i++) {
        loci_cpu_isa isa;
        if (loci_cpu_isa_detect(isas[i], &isa, &err) != LOCI_OK) continue;
        loci_buf blob = LOCI_BUF_INIT;
        uint64_t hash;
        options.isa = isas[i];
        assert_int_equal(loci_pair_build(k, v, slots, 900, 48, &options, NULL, &blob, &hash, &err),
                         LOCI_OK);
        assert_int_equal(blob.len, f.memory_bytes[0]);
        assert_memory_equal(blob.data, f.memory[0], blob.len);
        assert_true(hash == view->pair_hash[0]);
        loci_buf_fini(&blob);
    }
    free(k);
    fixture_close(&f);
}

#define NEAR 2e-5 /* what logits may be off by; values are at most 4 */

/* --- kernels --------------------------------------------------------------------------- */

typedef struct problem {
    uint32_t rows, dim, keys;
    size_t stride;
    uint8_t *kv;
    float *q;      /* [rows][dim] */
    double *out;   /* [rows][dim], expected, normalised */
    double *logit; /* [rows][keys] */
} problem;

static problem make_problem(uint64_t *rng) {
    problem p = {.rows = 1 + (uint32_t)(fixture_random(rng) % 40),
                 .dim = 16 + 16 * (uint32_t)(fixture_random(rng) % 16),
                 .keys = 1 + (uint32_t)(fixture_random(rng) % 300)};
    p.stride = loci_kv_stride(p.dim, LOCI_I8);
    p.kv = malloc(p.keys * p.stride);
    p.q = malloc(p.rows * p.dim * sizeof *p.q);
    p.out = calloc(p.rows * p.dim, sizeof *p.out);
    p.logit = malloc(p.rows * p.keys * sizeof *p.logit);
    assert_true(p.kv && p.q && p.out && p.logit);
    for (size_t i = 0; i < p.rows * p.dim; i++) p.q[i] = fixture_normal(rng) / sqrtf((float)p.dim);
    for (uint32_t t = 0; t < p.keys; t++) {
        int8_t *row = (int8_t *)(p.kv + t * p.stride);
        uint16_t *most = (void *)(row + 2 * p.dim);
        for (uint32_t i = 0; i < 2 * p.dim; i++)
            row[i] = (int8_t)((int)(fixture_random(rng) % 255) - 127);
        for (int i = 0; i < 2; i++) most[i] = loci_f32_to_bf16(4.0f * fixture_uniform(rng));
    }
    return p;
}

/* Softmax attention in double over what the int8 values stand for. */
static void solve(problem *p) {
    for (uint32_t r = 0; r < p->rows; r++) {
        const float *q = p->q + (size_t)r * p->dim;
        double top = -INFINITY, sum = 0.0, *out = p->out + (size_t)r * p->dim;
        double *logit = p->logit + (size_t)r * p->keys;
        for (int pass = 0; pass < 2; pass++) {
            for (uint32_t t = 0; t < p->keys; t++) {
                const int8_t *row = (const int8_t *)(p->kv + t * p->stride);
                float k_scale, v_scale;
                loci_kv_scales(row, p->dim, &k_scale, &v_scale);
                if (pass == 0) {
                    logit[t] = 0.0;
                    for (uint32_t i = 0; i < p->dim; i++)
                        logit[t] += (double)q[i] * row[i] * (double)k_scale;
                    top = fmax(top, logit[t]);
                    continue;
                }
                double weight = exp(logit[t] - top);
                sum += weight;
                for (uint32_t i = 0; i < p->dim; i++)
                    out[i] += weight * row[p->dim + i] * (double)v_scale;
            }
        }
        for (uint32_t i = 0; i < p->dim; i++) out[i] /= sum;
    }
}

static void check_kernel(const problem *p, const loci_cpu_kernels *kernels, const char *what) {
    enum { ROWS = 40, KEYS = LOCI_DENSE_KEYS };
    uint32_t first[ROWS] = {0}, last[ROWS];
    float max[ROWS], sum[ROWS] = {0};
    float *out = calloc(p->rows * p->dim, sizeof *out);
    uint32_t tiles = (p->keys + KEYS - 1) / KEYS;
    float *keep = malloc(p->rows * (p->keys + tiles) * sizeof *keep);
    float *keep_max = keep + p->rows * p->keys;
    float *scratch = aligned_alloc(64, (2 * KEYS * p->dim + ROWS * KEYS) * sizeof *scratch);
    assert_true(out && keep && scratch);
    for (uint32_t r = 0; r < p->rows; r++) {
        last[r] = p->keys;
        max[r] = -INFINITY;
    }
    loci_dense_job job = {
        .q = p->q,
        .rows = p->rows,
        .head_dim = p->dim,
        .k = p->kv,
        .v = p->kv + p->dim,
        .kv_stride = p->stride,
        .kv_dtype = LOCI_I8,
        .key_end = p->keys,
        .first = first,
        .last = last,
        .k_tile = scratch,
        .v_tile = scratch + KEYS * p->dim,
        .logits = scratch + 2 * KEYS * p->dim,
        .keep = keep,
        .keep_max = keep_max,
        .out = out,
        .max = max,
        .sum = sum,
    };
    kernels->dense(&job);
    for (uint32_t r = 0; r < p->rows; r++) {
        for (uint32_t t = 0; t < p->keys; t++) {
            double expected = p->logit[(size_t)r * p->keys + t],
                   kept = (double)keep[r * p->keys + t];
            double logit = log(kept) + (double)keep_max[r * tiles + t / KEYS];
            if (kept > 0 ? fabs(logit - expected) > NEAR : expected > (double)max[r] - 80)
                fail_msg("%s, %u rows of %u: logit %u is %.6f, not %.6f", what, p->rows, p->dim, t,
                         logit, expected);
        }
        for (uint32_t i = 0; i < p->dim; i++) {
            size_t at = (size_t)r * p->dim + i;
            if (fabs((double)(out[at] / sum[r]) - p->out[at]) > 8 * NEAR)
                fail_msg("%s, %u rows of %u: value %u of row %u is %.6f, not %.6f", what, p->rows,
                         p->dim, i, r, (double)(out[at] / sum[r]), p->out[at]);
        }
    }
    free(out);
    free(keep);
    free(scratch);
}

static void test_dense_kernels_equal_a_softmax_in_double(void **state) {
    (void)state;
    static const char *const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
    uint64_t rng = fresh_seed();
    loci_cpu_isa best;
    loci_error err;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int round = 0; round < 60; round++) {
        problem p = make_problem(&rng);
        solve(&p);
        for (int isa = 0; isa <= (int)best; isa++)
            check_kernel(&p, loci_cpu_kernels_of((loci_cpu_isa)isa), names[isa]);
        free(p.kv);
        free(p.q);
        free(p.out);
        free(p.logit);
    }
}

/* What sparse attention takes: the same bits everywhere. */
static void test_widened_rows_are_the_same_everywhere(void **state) {
    (void)state;
    uint64_t rng = fresh_seed();
    loci_cpu_isa best;
    loci_error err;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int round = 0; round < 50; round++) {
        int8_t row[256];
        float out[256], scale = 3.0f * fixture_uniform(&rng);
        size_t n = 1 + fixture_random(&rng) % 256;
        for (size_t i = 0; i < n; i++) row[i] = (int8_t)((int)(fixture_random(&rng) % 255) - 127);
        for (int isa = 0; isa <= (int)best; isa++) {
            loci_corpus_kernels_of((loci_cpu_isa)isa)->widen_i8(out, row, n, scale);
            for (size_t i = 0; i < n; i++) assert_true(out[i] == (float)row[i] * scale);
        }
    }
}

/* --- attention ------------------------------------------------------------------------- */

/* Relative L2 error of dense attention over int8 pairs against bf16 ones, mean over heads. */
static void test_attention_is_near_that_over_bf16(void **state) {
    (void)state;
    enum { ROWS = 4, HEADS = 6, DIM = 64 };
    fixture_shape shape = {1, 2, DIM, HEADS, 3000, 100, 24, 0.6f, fresh_seed()};
    float out[2][ROWS * HEADS * DIM], lse[2][ROWS * HEADS];
    float steady[ROWS * HEADS], q[ROWS * HEADS * DIM];
    for (size_t i = 0; i < ROWS * HEADS; i++) steady[i] = -INFINITY;
    for (int int8 = 0; int8 < 2; int8++) {
        fixture f;
        loci_error err = {0};
        loci_pair_build_options options = {.iterations = 4, .kv_int8 = int8};
        uint64_t rng = shape.seed * 77 + 1;
        fixture_generate(&f, &shape);
        if (fixture_build(&f, NULL, 2, 1024, 0, &options, &err) != LOCI_OK)
            fail_msg("%s", err.text);
        for (size_t i = 0; i < ROWS * HEADS; i++) {
            const uint16_t *key = f.k[0] + fixture_random(&rng) % 3000 * DIM;
            for (uint32_t d = 0; d < DIM; d++)
                q[i * DIM + d] = 0.25f * loci_bf16_to_f32(key[d]) + 0.1f * fixture_normal(&rng);
        }
        fixture_run run = {.rows = ROWS,
                           .q = q,
                           .steady = steady,
                           .params = {.mode = LOCI_MODE_DENSE},
                           .out = out[int8],
                           .lse = lse[int8]};
        if (fixture_look_up(&f, &run, &err) != LOCI_OK) fail_msg("%s", err.text);
        assert_int_equal(run.stats.kv_bytes,
                         3000ull * 2 * loci_kv_stride(DIM, int8 ? LOCI_I8 : LOCI_BF16));
        assert_int_equal(run.stats.dense_kv_bytes, run.stats.kv_bytes);
        fixture_close(&f);
    }
    double error = 0.0;
    for (size_t i = 0; i < ROWS * HEADS; i++) {
        double off = 0.0, norm = 0.0;
        for (size_t d = i * DIM; d < (i + 1) * DIM; d++) {
            double delta = (double)out[1][d] - (double)out[0][d];
            off += delta * delta;
            norm += (double)out[0][d] * (double)out[0][d];
        }
        error += sqrt(off / norm) / (ROWS * HEADS);
    }
    print_message("relative error %.5f\n", error);
    assert_true(error > 1e-5 && error < 0.02);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_near_and_stay_as_they_are),
        cmocka_unit_test(test_rounding_is_to_nearest_even),
        cmocka_unit_test(test_pairs_are_the_same_however_they_came_about),
        cmocka_unit_test(test_dense_kernels_equal_a_softmax_in_double),
        cmocka_unit_test(test_widened_rows_are_the_same_everywhere),
        cmocka_unit_test(test_attention_is_near_that_over_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
