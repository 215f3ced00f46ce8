/* SPDX-License-Identifier: Apache-2.0
 *
 * Look-ups against the plain reference: dense, squeezed and hierarchical selection,
 * attention, the tail, deletion.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/lookup.h"
#include "attention/index_layout.h"
#include "tests/attention/lookup_scene.h"

static void mark_selected(const scene *s, const fixture_run *r, uint8_t *marks) {
    uint32_t tokens = reference_tokens(&s->f);
    memset(marks, 0, (size_t)s->f.kv_heads * s->rows * tokens);
    for (size_t i = 0; i < r->selected_count; i++) {
        const loci_selected *x = &r->selected[i];
        if (i) {
            const loci_selected *y = x - 1;
            assert_true(memcmp(x, y, sizeof *x) != 0);
            assert_true(y->extent <= x->extent);
        }
        marks[((size_t)x->kv_head * s->rows + x->row) * tokens +
              reference_index(&s->f, x->extent, x->slot)] = 1;
    }
}

static void check_output(const scene *s, double tolerance, const char *what) {
    for (size_t i = 0; i < (size_t)s->rows * s->f.q_heads; i++) {
        if (isinf(s->ref_lse[i])) {
            assert_true(s->lse[i] == -INFINITY);
        } else if (fabs((double)s->lse[i] - s->ref_lse[i]) >
                   tolerance * fmax(1, fabs(s->ref_lse[i]))) {
            fail_msg("%s: lse %zu is %.7f, not %.7f", what, i, (double)s->lse[i], s->ref_lse[i]);
        }
        for (uint32_t d = 0; d < s->f.dim; d++) {
            size_t at = i * s->f.dim + d;
            if (fabs((double)s->out[at] - s->ref_out[at]) > tolerance)
                fail_msg("%s: value %zu is %.7f, not %.7f", what, at, (double)s->out[at],
                         s->ref_out[at]);
        }
    }
}

/* Selection and attention of one run against the reference. Returns tokens selected. */
static size_t check_run(scene *s, loci_select_params params, const char *what) {
    uint32_t tokens = reference_tokens(&s->f);
    size_t all = (size_t)s->f.kv_heads * s->rows * tokens, differ = 0;
    uint8_t *marks = malloc(all + 1);
    fixture_run r = run(s, params, true);
    reference_select(&s->f, 0, s->rows, s->q, s->steady, &params, s->chosen);
    mark_selected(s, &r, marks);
    for (size_t i = 0; i < all; i++) differ += marks[i] != s->chosen[i];
    if (differ) fail_msg("%s: %zu of %zu selections differ", what, differ, r.selected_count);
    assert_int_equal(r.stats.selected_tokens, r.selected_count);
    reference_attend(&s->f, 0, s->rows, s->q, marks, s->ref_out, s->ref_lse);
    check_output(s, 1e-4, what);
    free(marks);
    free(r.selected);
    return r.selected_count;
}

/* --- dense --------------------------------------------------------------------------- */

static void test_dense_and_top_p_one_equal_plain_attention(void **state) {
    (void)state;
    static const uint32_t dims[] = {16, 32, 64, 128}, groups[] = {1, 3, 4, 7};
    for (uint32_t n = 0; n < 16; n++) {
        uint32_t i = n / 2;
        setting c = usual;
        c.kv_int8 = n % 2;
        c.dim = dims[i % 4];
        c.group = groups[(i + i / 4) % 4];
        c.kv_heads = 1 + i % 3;
        c.rows = 1 + i * 2;
        c.tokens = i == 7 ? 1 : 1300;
        c.sharpness = 0.4f;
        c.extent_tokens = 500;
        scene s = open_scene(c);
        reference_attend(&s.f, 0, s.rows, s.q, NULL, s.ref_out, s.ref_lse);
        loci_select_params params = {.mode = LOCI_MODE_DENSE};
        fixture_run r = run(&s, params, false);
        check_output(&s, 1e-5, c.kv_int8 ? "dense, int8" : "dense");
        assert_int_equal(r.stats.selected_tokens, (uint64_t)c.tokens * c.kv_heads * c.rows);
        params = narrow(1.0f, 0);
        memset(s.out, 0, (size_t)s.rows * s.f.q_heads * s.f.dim * sizeof *s.out);
        (void)run(&s, params, false);
        check_output(&s, 1e-5, "top_p 1");
        close_scene(&s);
    }
}

/* --- choosing ------------------------------------------------------------------------ */

#ifdef LOCI_TEST_CPU

typedef struct choice {
    float value;
    uint32_t index;
} choice;

static int compare_choices(const void *a, const void *b) {
    const choice *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* The radix selection against sorting, on values of every size with ties, gaps and oddities. */
static void test_choose_equals_sorting(void **state) {
    (void)state;
    enum { N = 700 };
    uint64_t rng = 4242;
    for (int round = 0; round < 400; round++) {
        float value[N];
        uint8_t taken[N], expected[N] = {0};
        choice order[N];
        size_t usable = 0, n = 1 + fixture_random(&rng) % N;
        double all = 0.0;
        for (size_t i = 0; i < n; i++) {
            /* Powers of two sum exactly in any order; neighbours in the last bits, too. */
            int kind = (int)(fixture_random(&rng) % 8);
            float x = ldexpf(1.0f, -(int)(fixture_random(&rng) % 12));
            if (round % 2) x = 1.0f + ldexpf((float)(fixture_random(&rng) % 1024), -22);
            value[i] = kind == 0 ? -1.0f : kind == 1 ? NAN : kind == 2 && round % 3 == 0 ? 0.0f : x;
            if (!(value[i] >= 0.0f)) continue;
            order[usable++] = (choice){value[i], (uint32_t)i};
            all += (double)value[i];
        }
        double target = all * (double)fixture_uniform(&rng), mass = 0.0;
        uint64_t most = fixture_random(&rng) % 900, count = 0;
        qsort(order, usable, sizeof *order, compare_choices);
        for (size_t i = 0; i < usable && mass < target && count < most; i++, count++) {
            expected[order[i].index] = 1;
            mass += (double)order[i].value;
        }
        const loci_corpus_kernels *kernels = loci_corpus_kernels_of(LOCI_ISA_PORTABLE);
        lookup_choose(kernels, value, n, target, most, taken);
        if (memcmp(taken, expected, n) != 0) fail_msg("round %d differs", round);
    }
}

static void test_kth_equals_sorting(void **state) {
    (void)state;
    enum { N = 700 };
    uint64_t rng = 777;
    loci_cpu_isa best;
    loci_error err;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int round = 0; round < 400; round++) {
        float value[N];
        choice order[N];
        size_t n = 1 + fixture_random(&rng) % N;
        for (size_t i = 0; i < n; i++) {
            float x = ldexpf(2.0f * fixture_uniform(&rng) - 1.0f, (int)(fixture_random(&rng) % 40));
            if (round % 2) x = (float)(fixture_random(&rng) % 9) - 4.0f; /* many ties */
            value[i] = fixture_random(&rng) % 16 == 0 ? -INFINITY : x;
            order[i] = (choice){value[i], (uint32_t)i};
        }
        loci_cpu_isa isa = (loci_cpu_isa)(round % 3);
        const loci_corpus_kernels *kernels = loci_corpus_kernels_of(isa < best ? isa : best);
        qsort(order, n, sizeof *order, compare_choices);
        size_t k = 1 + fixture_random(&rng) % n;
        assert_true(lookup_kth(kernels, value, n, k) == order[k - 1].value);
        assert_true(lookup_kth(kernels, value, n, n + 1) == -INFINITY);
    }
}

/* Keys of few values and of many, fewer of them than are sampled and more. */
static void test_kth_key_equals_sorting(void **state) {
    (void)state;
    enum { N = 20000 };
    static uint16_t key[N], sample[N];
    static choice order[N];
    uint64_t rng = 778;
    loci_cpu_isa best;
    loci_error err;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int round = 0; round < 120; round++) {
        size_t n = fixture_random(&rng) % (round % 2 ? N : 2000) / 32 * 32, above = 0;
        uint32_t range = round % 3 == 0 ? 5 : round % 3 == 1 ? 700 : 65536;
        bool rising = round % 5 == 0; /* a sample that misleads */
        for (size_t i = 0; i < n; i++) {
            uint32_t x = (uint32_t)(fixture_random(&rng) % range);
            if (rising && i / 32 % 16 == 0) x = 0;
            key[i] = (uint16_t)(fixture_random(&rng) % 4 == 0 ? 0 : x);
            order[i] = (choice){(float)key[i], (uint32_t)i};
            above += key[i] > 1;
        }
        qsort(order, n, sizeof *order, compare_choices);
        loci_cpu_isa isa = (loci_cpu_isa)(round % 3);
        const loci_corpus_kernels *kernels = loci_corpus_kernels_of(isa < best ? isa : best);
        size_t k = 1 + fixture_random(&rng) % (n + 1);
        uint16_t expected = k <= above ? (uint16_t)order[k - 1].value : 1;
        assert_int_equal(lookup_kth_key(kernels, key, n, k, sample), expected);
    }
}

#endif

/* --- hierarchical -------------------------------------------------------------------- */

static void test_selection_equals_reference(void **state) {
    (void)state;
    static const float top_p[] = {0.5f, 0.9f, 0.99f};
    static const uint32_t budgets[] = {0, 20, 200};
    scene s = open_scene(usual);
    size_t most = 0, least = SIZE_MAX;
    for (int i = 0; i < 9; i++) {
        char what[64];
        (void)snprintf(what, sizeof what, "top_p %.2f, budget %u", (double)top_p[i / 3],
                       budgets[i % 3]);
        size_t count = check_run(&s, narrow(top_p[i / 3], budgets[i % 3]), what);
        most = count > most ? count : most;
        least = count < least ? count : least;
    }
    assert_true(most > 2 * least); /* the settings matter */
    close_scene(&s);
}

/* Asked to keep everything, a look-up still leaves out what cannot matter, and only that. */
static void test_what_is_out_of_reach_takes_no_part(void **state) {
    (void)state;
    setting c = usual;
    c.sharpness = 6.0f;
    scene s = open_scene(c);
    loci_select_params params = narrow(0.99f, 0);
    params.roots_min = params.candidates_min = 1u << 30;
    uint64_t all = (uint64_t)reference_tokens(&s.f) * s.f.kv_heads * s.rows;
    (void)check_run(&s, params, "sharp queries");
    uint64_t candidates = run(&s, params, false).stats.candidate_tokens;
    assert_in_range(candidates, 1, all / 2);
    /* Nearly flat: every token may matter. */
    for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads * s.f.dim; i++) s.q[i] *= 1e-3f;
    for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads; i++) s.steady[i] = 2.0f;
    (void)check_run(&s, params, "flat queries");
    assert_int_equal(run(&s, params, false).stats.candidate_tokens, all);
    /* The steady zone outweighs the corpus: nothing there may matter. */
    for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads; i++) s.steady[i] = 40.0f;
    fixture_run r = run(&s, params, true);
    assert_int_equal(r.stats.candidate_tokens, 0);
    assert_int_equal(r.selected_count, 0);
    free(r.selected);
    close_scene(&s);
}

/* Roots that hold too little beside the steady zone are not read. */
static void test_roots_out_of_reach_are_not_read(void **state) {
    (void)state;
    uint64_t read[2] = {0};
    for (int i = 0; i < 12; i++) {
        setting c = usual;
        c.rows = c.group = 1; /* of several, one or another wants each root */
        c.seed = 300 + (uint64_t)i / 2;
        scene s = open_scene(c);
        loci_select_params params = narrow(0.99f, 0);
        params.roots_min = 1u << 30;
        reference_attend(&s.f, 0, s.rows, s.q, NULL, s.ref_out, s.ref_lse);
        for (size_t x = 0; x < (size_t)s.f.q_heads; x++)
            s.steady[x] = i % 2 ? (float)s.ref_lse[x] + 4.0f * (float)(i / 2) : -INFINITY;
        assert_true(check_run(&s, params, "roots out of reach") > 0 || i % 2);
        read[i % 2] += run(&s, params, false).stats.leaf_bytes;
        close_scene(&s);
    }
    assert_in_range(read[1], 1, read[0] * 3 / 4);
}

static void test_selection_at_odd_shapes(void **state) {
    (void)state;
    static const uint32_t dims[] = {16, 64, 128, 32}, groups[] = {7, 4, 1, 3, 16};
    for (uint32_t i = 0; i < 10; i++) {
        char what[64];
        setting c = usual;
        c.seed = 100 + i;
        c.dim = dims[i % 4];
        c.group = groups[i % 5];
        c.kv_heads = 1 + i % 2;
        c.rows = 1 + i;
        c.tokens = 300 + 211 * i;
        c.extent_tokens = 200 + 173 * i;
        scene s = open_scene(c);
        (void)snprintf(what, sizeof what, "seed %llu", (unsigned long long)c.seed);
        (void)check_run(&s, narrow(0.95f, i % 2 ? 0 : 100), what);
        close_scene(&s);
    }
}

/* What a single row selects is attended as one list for each KV head, over several chunks here. */
static void test_a_single_row(void **state) {
    (void)state;
    static const uint32_t dims[] = {64, 16, 128, 32}, groups[] = {2, 1, 3, 16, 5};
    size_t most = 0;
    for (uint32_t i = 0; i < 10; i++) {
        char what[64];
        setting c = usual;
        c.seed = 200 + i;
        c.dim = dims[i % 4];
        c.group = groups[i % 5];
        c.kv_int8 = i % 3 == 2;
        c.rows = 1;
        scene s = open_scene(c);
        (void)snprintf(what, sizeof what, "one row, seed %llu", (unsigned long long)c.seed);
        if (i % 4 == 3) kill_some(&s, 3);
        loci_select_params params = narrow(i % 2 ? 0.999f : 1.0f, i % 2 ? 0 : 700);
        size_t count = check_run(&s, params, what);
        most = count > most ? count : most;
        params.candidates_max = 150; /* leaves of these are of 16 */
        params.candidates_min = 60;
        (void)check_run(&s, params, "at most 150 candidates a head");
        fixture_run r = run(&s, params, false);
        assert_in_range(r.stats.candidate_tokens, 1, (uint64_t)c.kv_heads * c.group * 150 + 20);
        close_scene(&s);
    }
    assert_true(most >= 2 * 700);
}

static void test_deleted_segments_take_no_part(void **state) {
    (void)state;
    scene s = open_scene(usual);
    kill_some(&s, 3);
    (void)check_run(&s, narrow(0.9f, 0), "two thirds dead");
    uint32_t tokens = reference_tokens(&s.f);
    fixture_run r = run(&s, narrow(0.999f, 0), true);
    for (size_t i = 0; i < r.selected_count; i++) {
        uint32_t position = fixture_position(&s.f, 0, r.selected[i].extent, r.selected[i].kv_head,
                                             r.selected[i].slot);
        assert_false(s.dead[position / SEGMENT_TOKENS]);
    }
    free(r.selected);
    loci_select_params dense = {.mode = LOCI_MODE_DENSE};
    (void)run(&s, dense, false);
    reference_attend(&s.f, 0, s.rows, s.q, NULL, s.ref_out, s.ref_lse);
    check_output(&s, 1e-5, "dense with deletions");
    memset(s.dead, 1, s.f.segments);
    loci_error err;
    assert_int_equal(fixture_kill(&s.f, s.dead, &err), LOCI_OK);
    r = run(&s, narrow(0.9f, 0), true);
    assert_int_equal(r.selected_count, 0);
    for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads; i++) assert_true(s.lse[i] == -INFINITY);
    assert_true(tokens > 0);
    free(r.selected);
    close_scene(&s);
}

static void test_no_extents(void **state) {
    (void)state;
    setting c = usual;
    c.tokens = 82;
    c.flat_segments = 2;
    scene s = open_scene(c);
    for (int mode = 0; mode < 3; mode++) {
        loci_select_params params = narrow(0.9f, 0);
        params.mode = (loci_mode)mode;
        fixture_run r = run(&s, params, true);
        assert_int_equal(r.selected_count, 0);
        assert_true(s.lse[0] == -INFINITY && s.out[0] == 0.0f);
        free(r.selected);
    }
    close_scene(&s);
}

#ifdef LOCI_TEST_CPU

/* Every instruction set and thread count: the same tokens, the same values to rounding. */
static void test_instruction_sets_and_threads_agree(void **state) {
    (void)state;
    static const char *const isas[] = {"portable", "avx2", "avx512", NULL};
    static const uint32_t groups[] = {3, 7};
    for (int g = 0; g < 4; g++) {
        setting c = usual;
        c.group = groups[g % 2];
        c.rows = g < 2 ? usual.rows : 1;
        c.kv_int8 = g % 2;
        c.isa = "portable";
        c.threads = 1;
        scene expected = open_scene(c);
        loci_select_params params = narrow(0.97f, 150);
        if (g >= 2) params.candidates_max = 170;
        fixture_run e = run(&expected, params, true);
        for (int i = 0; i < 8; i++) {
            loci_cpu_isa isa;
            loci_error err;
            if (loci_cpu_isa_detect(isas[i % 4], &isa, &err) != LOCI_OK) continue;
            c.isa = isas[i % 4];
            c.threads = i < 4 ? 1 : 3;
            scene s = open_scene(c);
            fixture_run r = run(&s, params, true);
            assert_int_equal(r.selected_count, e.selected_count);
            assert_memory_equal(r.selected, e.selected, r.selected_count * sizeof *r.selected);
            size_t values = (size_t)s.rows * s.f.q_heads * s.f.dim;
            for (size_t v = 0; v < values; v++)
                if (fabsf(s.out[v] - expected.out[v]) > 1e-4f)
                    fail_msg("%s, %u threads: value %zu differs", c.isa ? c.isa : "best", c.threads,
                             v);
            free(r.selected);
            close_scene(&s);
        }
        free(e.selected);
        close_scene(&expected);
    }
}

#endif

/* NaN in every K and V that was not selected changes nothing: it is not read. */
static void unselected_keys_are_never_read(bool int8, uint32_t rows) {
    setting c = usual;
    c.kv_int8 = int8;
    c.rows = rows;
    scene s = open_scene(c);
    uint32_t tokens = reference_tokens(&s.f);
    size_t values = (size_t)s.rows * s.f.q_heads * s.f.dim;
    fixture_run r = run(&s, narrow(0.9f, 50), true);
    float *before = malloc(values * sizeof *before);
    uint8_t *marks = malloc((size_t)s.f.kv_heads * s.rows * tokens);
    memcpy(before, s.out, values * sizeof *before);
    mark_selected(&s, &r, marks);
    size_t poisoned = 0;
    for (uint32_t e = 0; e < s.f.extents; e++) {
        for (uint32_t h = 0; h < s.f.kv_heads; h++) {
            for (uint32_t t = 0; t < s.f.views[e].tokens; t++) {
                bool read = false;
                for (uint32_t row = 0; row < s.rows; row++)
                    read = read ||
                           marks[((size_t)h * s.rows + row) * tokens + reference_index(&s.f, e, t)];
                const uint8_t *blob = fixture_blob(&s.f, 0, e, h);
                uint16_t *kv = (uint16_t *)(uintptr_t)loci_slot_kv(blob, t);
                for (size_t d = 0; d < loci_pair_kv_stride(blob) / sizeof *kv && !read; d++)
                    kv[d] = 0x7fc0; /* NaN, of int8 the scales */
                poisoned += !read;
            }
        }
    }
    assert_true(poisoned > tokens);
    free(r.selected);
    r = run(&s, narrow(0.9f, 50), false);
    assert_memory_equal(before, s.out, values * sizeof *before);
    free(before);
    free(marks);
    close_scene(&s);
}

static void test_unselected_keys_are_never_read(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) unselected_keys_are_never_read(i % 2, i < 2 ? usual.rows : 1);
}

/* Diffuse heads: many tokens matter a little each, and few are read. */
static void test_tail_lowers_the_error_of_diffuse_heads(void **state) {
    (void)state;
    setting c = usual;
    c.spread = 1.5f;
    c.sharpness = 0.25f;
    c.rows = 8;
    scene s = open_scene(c);
    reference_attend(&s.f, 0, s.rows, s.q, NULL, s.ref_out, s.ref_lse);
    double error[2] = {0.0, 0.0}, lse_error[2] = {0.0, 0.0};
    for (int tail = 0; tail < 2; tail++) {
        loci_select_params params = narrow(0.9f, 150);
        params.estimate_tail = tail == 1;
        fixture_run r = run(&s, params, false);
        assert_true((r.stats.tail_bytes > 0) == (tail == 1));
        for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads; i++) {
            lse_error[tail] += fabs((double)s.lse[i] - s.ref_lse[i]);
            for (uint32_t d = 0; d < s.f.dim; d++) {
                double off = (double)s.out[i * s.f.dim + d] - s.ref_out[i * s.f.dim + d];
                error[tail] += off * off;
            }
        }
    }
    if (error[1] > 0.5 * error[0] || lse_error[1] > 0.3 * lse_error[0])
        fail_msg("squared error %.4f without tail, %.4f with; of lse %.3f, %.3f", error[0],
                 error[1], lse_error[0], lse_error[1]);
    close_scene(&s);
}

/* --- squeezed ------------------------------------------------------------------------ */

static void test_squeezed_equals_the_formula(void **state) {
    (void)state;
    static const float thresholds[][2] = {
        {0.0f, 0.0f}, {1e-5f, 3e-5f}, {1e-4f, 1e-3f}, {3e-4f, 1e-4f}, {1.0f, 0.0f}};
    size_t last = SIZE_MAX;
    for (int deleted = 0; deleted < 2; deleted++) {
        scene s = open_scene(usual);
        if (deleted) kill_some(&s, 2);
        for (int i = 0; i < 5; i++) {
            char what[64];
            loci_select_params params = {
                .mode = LOCI_MODE_SQUEEZED,
                .squeezed_threshold = {thresholds[i][0], thresholds[i][1]}};
            (void)snprintf(what, sizeof what, "squeezed %d, deleted %d", i, deleted);
            last = check_run(&s, params, what);
        }
        assert_int_equal(last, 0);
        close_scene(&s);
    }
}

static void test_squeezed_refuses_thresholds_that_are_not_finite(void **state) {
    (void)state;
    scene s = open_scene(usual);
    loci_error err;
    fixture_run r = {.rows = s.rows,
                     .q = s.q,
                     .steady = s.steady,
                     .out = s.out,
                     .lse = s.lse,
                     .params = {.mode = LOCI_MODE_SQUEEZED, .squeezed_threshold = {NAN, 0.1f}}};
    assert_int_equal(fixture_look_up(&s.f, &r, &err), LOCI_E_INVAL);
    close_scene(&s);
}

/* --- the golden file of selection_reference.py ------------------------------------------- */

static void put(FILE *file, const void *data, size_t bytes) {
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
}

/* The corpus that the golden file is made from: small, with dead segments. */
static int write_corpus(const char *path) {
    setting c = usual;
    c.tokens = 700;
    c.dim = 16;
    c.extent_tokens = 400;
    c.rows = 3;
    scene s = open_scene(c);
    loci_error err;
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    s.dead[2] = s.dead[9] = 1;
    assert_int_equal(fixture_kill(&s.f, s.dead, &err), LOCI_OK);
    const uint32_t head[5] = {c.dim, c.kv_heads, s.f.q_heads, c.rows, s.f.extents};
    put(file, "LOCISEL1", 8);
    put(file, head, sizeof head);
    for (uint32_t e = 0; e < s.f.extents; e++) {
        const loci_extent_view *view = &s.f.views[e];
        put(file, &view->tokens, 4);
        put(file, &view->segments, 4);
        for (uint32_t h = 0; h < c.kv_heads; h++) {
            const uint8_t *blob = fixture_blob(&s.f, 0, e, h);
            put(file, &loci_pair_header_of(blob)->blob_bytes, 8);
            put(file, &view->pair_hash[h], 8);
            put(file, view->live[h], (view->tokens + 63) / 64 * 8);
            put(file, blob, loci_pair_header_of(blob)->blob_bytes);
        }
    }
    for (size_t i = 0; i < (size_t)c.rows * s.f.q_heads; i += 2) s.steady[i] += 4.0f;
    put(file, s.q, (size_t)c.rows * s.f.q_heads * c.dim * sizeof *s.q);
    put(file, s.steady, (size_t)c.rows * s.f.q_heads * sizeof *s.steady);
    assert_int_equal(fclose(file), 0);
    close_scene(&s);
    return 0;
}

typedef struct golden_case {
    uint32_t mode;
    float top_p, roots, candidates, threshold[2];
    uint32_t budget, roots_min, candidates_min, count;
} golden_case;

static void get(FILE *file, void *to, size_t bytes) {
    if (fread(to, 1, bytes, file) != bytes) fail_msg("the golden file ends early");
}

static void read_extent(FILE *file, fixture *f, uint32_t e) {
    loci_extent_view *view = &f->views[e];
    uint64_t *at = calloc(f->kv_heads, sizeof *at), *hash = calloc(f->kv_heads, sizeof *hash);
    const uint64_t **live = calloc(f->kv_heads, sizeof *live);
    loci_error err;
    get(file, &view->tokens, 4);
    get(file, &view->segments, 4);
    f->memory[e] = aligned_alloc(128, 1 << 20);
    for (uint32_t h = 0; h < f->kv_heads; h++) {
        uint64_t bytes;
        uint64_t *bits = calloc(view->tokens / 64 + 2, sizeof *bits);
        get(file, &bytes, 8);
        get(file, &hash[h], 8);
        get(file, bits, (view->tokens + 63) / 64 * 8);
        at[h] = f->memory_bytes[e];
        assert_true(bytes < (1 << 19));
        get(file, f->memory[e] + at[h], bytes);
        f->memory_bytes[e] += bytes;
        live[h] = bits;
    }
    view->pair_at = at;
    view->pair_hash = hash;
    view->live = live;
    assert_int_equal(
        f->backend->ops->wrap(f->backend, f->memory[e], f->memory_bytes[e], &view->buffer, &err),
        LOCI_OK);
}

static void test_selection_equals_numpy(void **state) {
    (void)state;
    FILE *file = fopen("tests/data/attention/selection.bin", "rb");
    char magic[8];
    uint32_t head[5], cases = 0;
    loci_error err;
    assert_non_null(file);
    get(file, magic, 8);
    get(file, head, sizeof head);
    scene s = {.rows = head[3]};
    fixture *f = &s.f;
    *f = (fixture){
        .layers = 1, .dim = head[0], .kv_heads = head[1], .q_heads = head[2], .extents = head[4]};
    assert_int_equal(loci_backend_open(LOCI_TEST_BACKEND, NULL, &f->backend, &err), LOCI_OK);
    assert_int_equal(f->backend->ops->stream_open(f->backend, &f->stream, &err), LOCI_OK);
    f->memory = calloc(f->extents, sizeof *f->memory);
    f->memory_bytes = calloc(f->extents, sizeof *f->memory_bytes);
    f->views = calloc(f->extents, sizeof *f->views);
    for (uint32_t e = 0; e < f->extents; e++) read_extent(file, f, e);
    f->view = (loci_corpus_view){.retrieval_layers = 1,
                                 .kv_heads = f->kv_heads,
                                 .head_dim = f->dim,
                                 .extent_count = f->extents,
                                 .extents = f->views};
    size_t heads = (size_t)s.rows * f->q_heads;
    s.q = calloc(heads * f->dim, sizeof *s.q);
    s.out = calloc(heads * f->dim, sizeof *s.out);
    s.steady = calloc(heads, sizeof *s.steady);
    s.lse = calloc(heads, sizeof *s.lse);
    get(file, s.q, heads * f->dim * sizeof *s.q);
    get(file, s.steady, heads * sizeof *s.steady);
    get(file, &cases, 4);
    for (uint32_t i = 0; i < cases; i++) {
        golden_case c;
        get(file, &c, sizeof c);
        loci_selected *expected = calloc(c.count + 1, sizeof *expected);
        get(file, expected, c.count * sizeof *expected);
        fixture_run r =
            run(&s,
                (loci_select_params){.mode = (loci_mode)c.mode,
                                     .top_p = c.top_p,
                                     .budget = c.budget,
                                     .roots = c.roots,
                                     .roots_min = c.roots_min,
                                     .candidates = c.candidates,
                                     .candidates_min = c.candidates_min,
                                     .squeezed_threshold = {c.threshold[0], c.threshold[1]}},
                true);
        if (r.selected_count != c.count ||
            memcmp(r.selected, expected, c.count * sizeof *expected) != 0)
            fail_msg("case %u: %zu tokens, NumPy has %u", i, r.selected_count, c.count);
        free(expected);
        free(r.selected);
    }
    assert_true(cases >= 10);
    (void)fclose(file);
    close_scene(&s);
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--write-corpus") == 0) return write_corpus(argv[2]);

    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense_and_top_p_one_equal_plain_attention),
#ifdef LOCI_TEST_CPU
        cmocka_unit_test(test_choose_equals_sorting),
        cmocka_unit_test(test_kth_equals_sorting),
        cmocka_unit_test(test_kth_key_equals_sorting),
        cmocka_unit_test(test_instruction_sets_and_threads_agree),
#endif
        cmocka_unit_test(test_selection_equals_reference),
        cmocka_unit_test(test_selection_equals_numpy),
        cmocka_unit_test(test_what_is_out_of_reach_takes_no_part),
        cmocka_unit_test(test_roots_out_of_reach_are_not_read),
        cmocka_unit_test(test_selection_at_odd_shapes),
        cmocka_unit_test(test_a_single_row),
        cmocka_unit_test(test_deleted_segments_take_no_part),
        cmocka_unit_test(test_no_extents),
        cmocka_unit_test(test_unselected_keys_are_never_read),
        cmocka_unit_test(test_tail_lowers_the_error_of_diffuse_heads),
        cmocka_unit_test(test_squeezed_equals_the_formula),
        cmocka_unit_test(test_squeezed_refuses_thresholds_that_are_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
