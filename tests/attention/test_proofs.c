/* SPDX-License-Identifier: Apache-2.0
 *
 * Proofs that sparse is sparse and exact where it says so: reading everything equals a plain
 * oracle, unread keys and values have no influence, dead segments are as if never there, and every
 * selection is the shortest one that its rule allows.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "attention/index_layout.h"
#include "base/half.h"
#include "tests/attention/corpus_fixture.h"

#define ROWS 5u

typedef struct world {
    fixture f;
    float *q, *steady, *out, *lse;
} world;

static const fixture_shape shapes[] = {
    {1, 2, 64, 6, 3000, 100, 24, 0.6f, 11},
    {2, 1, 32, 4, 900, 37, 8, 1.0f, 12},
    {1, 1, 128, 7, 1500, 255, 12, 0.3f, 13},
    {1, 3, 16, 3, 40, 11, 3, 0.5f, 14},
};

static void make_world(world *w, const fixture_shape *shape, uint32_t extent_tokens,
                       const char *isa) {
    loci_error err = {0};
    loci_pair_build_options options = {.iterations = 4};
    memset(w, 0, sizeof *w);
    fixture_generate(&w->f, shape);
    if (fixture_build(&w->f, isa, 2, extent_tokens, 0, &options, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    size_t vectors = (size_t)ROWS * shape->q_heads;
    uint64_t state = shape->seed * 77 + 1;
    w->q = malloc(vectors * shape->dim * sizeof(float));
    w->out = malloc(vectors * shape->dim * sizeof(float));
    w->steady = malloc(vectors * sizeof(float));
    w->lse = malloc(vectors * sizeof(float));
    assert_true(w->q && w->out && w->steady && w->lse);
    for (size_t i = 0; i < vectors; i++) {
        /* near some key, so that attention is neither flat nor a single token */
        const uint16_t *key = w->f.k[0] + fixture_random(&state) % shape->tokens * shape->dim;
        for (uint32_t d = 0; d < shape->dim; d++)
            w->q[i * shape->dim + d] =
                0.25f * loci_bf16_to_f32(key[d]) + 0.1f * fixture_normal(&state);
        w->steady[i] = fixture_uniform(&state) * 2.0f - 1.0f;
    }
}

static void free_world(world *w) {
    fixture_close(&w->f);
    free(w->q);
    free(w->out);
    free(w->steady);
    free(w->lse);
}

static fixture_run run_world(world *w, const loci_select_params *params, uint32_t layer) {
    loci_error err = {0};
    fixture_run run = {.layer = layer,
                       .rows = ROWS,
                       .q = w->q,
                       .steady = w->steady,
                       .params = *params,
                       .out = w->out,
                       .lse = w->lse,
                       .want_selected = true};
    if (fixture_look_up(&w->f, &run, &err) != LOCI_OK) fail_msg("%s", err.text);
    return run;
}

/* Plain softmax attention of one vector over the live tokens, in double. */
static double oracle(const world *w, uint32_t layer, uint32_t row, uint32_t head,
                     const uint8_t *dead, double *out) {
    const fixture *f = &w->f;
    uint32_t kv = head / (f->q_heads / f->kv_heads), dim = f->dim;
    const uint16_t *k = f->k[layer * f->kv_heads + kv], *v = f->v[layer * f->kv_heads + kv];
    const float *q = w->q + ((size_t)row * f->q_heads + head) * dim;
    double *logit = malloc(f->tokens * sizeof *logit), most = -INFINITY, sum = 0;
    assert_non_null(logit);
    for (uint32_t s = 0; s < f->segments; s++) {
        for (uint32_t t = f->segment_begin[s]; t < f->segment_begin[s + 1]; t++) {
            double dot = 0;
            for (uint32_t d = 0; d < dim; d++)
                dot += (double)q[d] * (double)loci_bf16_to_f32(k[t * dim + d]);
            logit[t] = dead && dead[s] ? -INFINITY : dot / sqrt((double)dim);
            most = logit[t] > most ? logit[t] : most;
        }
    }
    memset(out, 0, dim * sizeof *out);
    for (uint32_t t = 0; t < f->tokens; t++) {
        double weight = exp(logit[t] - most);
        sum += weight;
        for (uint32_t d = 0; d < dim; d++)
            out[d] += weight * (double)loci_bf16_to_f32(v[t * dim + d]);
    }
    for (uint32_t d = 0; d < dim; d++) out[d] /= sum;
    free(logit);
    return most + log(sum);
}

static void expect_oracle(const world *w, uint32_t layer, const uint8_t *dead) {
    const fixture *f = &w->f;
    double expected[256];
    for (uint32_t i = 0; i < ROWS * f->q_heads; i++) {
        double lse = oracle(w, layer, i / f->q_heads, i % f->q_heads, dead, expected);
        assert_true(fabs((double)w->lse[i] - lse) < 1e-4);
        double difference = 0, norm = 0;
        for (uint32_t d = 0; d < f->dim; d++) {
            double delta = (double)w->out[(size_t)i * f->dim + d] - expected[d];
            difference += delta * delta;
            norm += expected[d] * expected[d];
        }
        assert_true(sqrt(difference) <= 1e-5 * (1 + sqrt(norm)));
    }
}

static const char *const isas[] = {"portable", "avx2", "avx512", NULL};

static loci_select_params everything(loci_mode mode) {
    loci_select_params params;
    loci_select_defaults(&params);
    params.mode = mode;
    params.top_p = 1;
    params.budget = 0;
    return params;
}

static void test_reading_everything_equals_the_oracle(void **state) {
    (void)state;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        for (size_t i = 0; i < 4; i++) {
            world w;
            make_world(&w, &shapes[s], 1024, isas[i]);
            for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode += 2) {
                loci_select_params params = everything((loci_mode)mode);
                for (uint32_t layer = 0; layer < w.f.layers; layer++) {
                    free(run_world(&w, &params, layer).selected);
                    expect_oracle(&w, layer, NULL);
                }
            }
            free_world(&w);
        }
    }
}

static void test_dead_segments_were_never_there(void **state) {
    (void)state;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        world w;
        loci_error err = {0};
        make_world(&w, &shapes[s], 512, NULL);
        uint8_t *dead = calloc(w.f.segments, 1);
        assert_non_null(dead);
        for (uint32_t i = 0; i < w.f.segments; i++) dead[i] = i % 3 == 1;
        assert_int_equal(fixture_kill(&w.f, dead, &err), LOCI_OK);
        for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode += 2) {
            loci_select_params params = everything((loci_mode)mode);
            fixture_run run = run_world(&w, &params, 0);
            expect_oracle(&w, 0, dead);
            for (size_t i = 0; i < run.selected_count; i++) {
                uint32_t at = fixture_position(&w.f, 0, run.selected[i].extent,
                                               run.selected[i].kv_head, run.selected[i].slot);
                uint32_t segment = 0;
                while (w.f.segment_begin[segment + 1] <= at) segment++;
                assert_int_equal(dead[segment], 0);
            }
            free(run.selected);
        }
        free(dead);
        free_world(&w);
    }
}

/* Fills K and V of every token that no row selected with NaN. */
static size_t poison(world *w, uint32_t layer, const fixture_run *run) {
    fixture *f = &w->f;
    size_t poisoned = 0;
    for (uint32_t e = 0; e < f->extents; e++) {
        for (uint32_t h = 0; h < f->kv_heads; h++) {
            const uint8_t *blob = fixture_blob(f, layer, e, h);
            uint32_t tokens = loci_pair_header_of(blob)->tokens;
            uint8_t *chosen = calloc(tokens, 1);
            assert_non_null(chosen);
            for (size_t i = 0; i < run->selected_count; i++)
                if (run->selected[i].extent == e && run->selected[i].kv_head == h)
                    chosen[run->selected[i].slot] = 1;
            for (uint32_t t = 0; t < tokens; t++) {
                if (chosen[t]) continue;
                uint16_t *kv = (uint16_t *)(uintptr_t)loci_slot_kv(blob, t);
                for (uint32_t d = 0; d < 2 * f->dim; d++) kv[d] = 0x7fc0;
                poisoned++;
            }
            free(chosen);
        }
    }
    return poisoned;
}

static void test_unread_keys_and_values_have_no_influence(void **state) {
    (void)state;
    for (size_t s = 0; s < 3; s++) {
        world w;
        make_world(&w, &shapes[s], 1024, NULL);
        loci_select_params params;
        loci_select_defaults(&params);
        params.top_p = 0.9f;
        params.budget = 48;
        size_t values = (size_t)ROWS * w.f.q_heads * w.f.dim;
        fixture_run first = run_world(&w, &params, 0);
        assert_true(first.selected_count > 0);
        float *before = malloc(values * sizeof(float));
        assert_non_null(before);
        memcpy(before, w.out, values * sizeof(float));
        assert_true(poison(&w, 0, &first) > w.f.tokens / 2);
        fixture_run second = run_world(&w, &params, 0);
        assert_int_equal(first.selected_count, second.selected_count);
        assert_memory_equal(first.selected, second.selected,
                            first.selected_count * sizeof *first.selected);
        assert_memory_equal(before, w.out, values * sizeof(float));
        free(before);
        free(first.selected);
        free(second.selected);
        free_world(&w);
    }
}

/* More of the mass asked for, more tokens; never above the budget; bytes as counted. */
static void test_selection_obeys_top_p_and_budget(void **state) {
    (void)state;
    world w;
    make_world(&w, &shapes[0], 1024, NULL);
    static const float shares[] = {0.5f, 0.9f, 0.99f};
    static const uint32_t budgets[] = {8, 64, 512};
    for (size_t b = 0; b < 3; b++) {
        size_t last = 0;
        for (size_t p = 0; p < 3; p++) {
            loci_select_params params;
            loci_select_defaults(&params);
            params.top_p = shares[p];
            params.budget = budgets[b];
            fixture_run run = run_world(&w, &params, 0);
            size_t counts[ROWS][8] = {{0}};
            for (size_t i = 0; i < run.selected_count; i++)
                counts[run.selected[i].row][run.selected[i].kv_head]++;
            for (uint32_t r = 0; r < ROWS; r++)
                for (uint32_t h = 0; h < w.f.kv_heads; h++) assert_true(counts[r][h] <= budgets[b]);
            assert_true(run.selected_count >= last);
            assert_int_equal(run.stats.selected_tokens, run.selected_count);
            assert_true(run.stats.kv_bytes >= 4ull * w.f.dim);
            assert_true(run.stats.kv_bytes < run.stats.dense_kv_bytes);
            last = run.selected_count;
            free(run.selected);
        }
    }
    free_world(&w);
}

/* The mass that selected tokens really have reaches top_p of what the look-up had in reach. */
static void test_selected_mass_is_what_was_asked_for(void **state) {
    (void)state;
    world w;
    make_world(&w, &shapes[0], 1024, NULL);
    for (uint32_t i = 0; i < ROWS * w.f.q_heads; i++) w.steady[i] = -30.0f;
    loci_select_params params;
    loci_select_defaults(&params);
    params.top_p = 0.95f;
    params.budget = 0;
    params.roots_min = params.candidates_min = 1u << 30;
    params.estimate_tail = false; /* lse is of the selected tokens alone */
    free(run_world(&w, &params, 0).selected);
    double unused[256], sum = 0;
    for (uint32_t i = 0; i < ROWS * w.f.q_heads; i++) {
        double all = oracle(&w, 0, i / w.f.q_heads, i % w.f.q_heads, NULL, unused);
        sum += exp((double)w.lse[i] - all);
    }
    double mean = sum / (ROWS * w.f.q_heads);
    assert_true(mean > 0.93 && mean < 0.99);
    free_world(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reading_everything_equals_the_oracle),
        cmocka_unit_test(test_dead_segments_were_never_there),
        cmocka_unit_test(test_unread_keys_and_values_have_no_influence),
        cmocka_unit_test(test_selection_obeys_top_p_and_budget),
        cmocka_unit_test(test_selected_mass_is_what_was_asked_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
