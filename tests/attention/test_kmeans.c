/* SPDX-License-Identifier: Apache-2.0
 *
 * K-means: the same groups at any thread count and instruction set, caps, degenerate inputs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/kmeans.h"
#include "base/pool.h"
#include "tests/attention/corpus_fixture.h"

#define DIM 32u

typedef struct points {
    float *x, *length;
    uint8_t *code;
    uint32_t *ids;
    uint32_t n;
    loci_points view;
} points;

static points make_points(uint32_t n, uint32_t topics, uint64_t seed) {
    points p = {.n = n};
    uint64_t rng = seed * 2 + 1;
    p.x = malloc(n * DIM * sizeof *p.x);
    p.length = malloc(n * sizeof *p.length);
    p.code = malloc(n * DIM);
    p.ids = malloc(n * sizeof *p.ids);
    float *topic = malloc(topics * DIM * sizeof *topic);
    assert_true(p.x && p.length && p.code && p.ids && topic);
    for (uint32_t i = 0; i < topics * DIM; i++) topic[i] = fixture_normal(&rng);
    for (uint32_t t = 0; t < n; t++) {
        p.ids[t] = t;
        uint32_t c = (uint32_t)(fixture_random(&rng) % topics);
        for (uint32_t i = 0; i < DIM; i++)
            p.x[t * DIM + i] = topic[c * DIM + i] + 0.3f * fixture_normal(&rng);
    }
    free(topic);
    loci_points_quantise(p.x, n, DIM, p.code, p.length);
    p.view = (loci_points){p.x, p.code, p.length, DIM, &loci_corpus_kernels_portable};
    return p;
}

static void free_points(points *p) {
    free(p->x);
    free(p->length);
    free(p->code);
    free(p->ids);
}

static void test_kmeans_same_groups_at_any_thread_count_and_isa(void **state) {
    (void)state;
    points p = make_points(3000, 40, 3);
    uint32_t *expected = malloc(p.n * sizeof *expected), *group = malloc(p.n * sizeof *group);
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, 50, 8, false, NULL, expected, &err), LOCI_OK);
    loci_cpu_isa best;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int isa = LOCI_ISA_PORTABLE; isa <= (int)best; isa++) {
        p.view.kernels = loci_corpus_kernels_of((loci_cpu_isa)isa);
        for (unsigned threads = 1; threads <= 3; threads++) {
            loci_pool *pool = NULL;
            assert_int_equal(loci_pool_create(threads, &pool, &err), LOCI_OK);
            memset(group, 0xff, p.n * sizeof *group);
            assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, 50, 8, false, pool, group, &err),
                             LOCI_OK);
            assert_memory_equal(group, expected, p.n * sizeof *group);
            loci_pool_destroy(pool);
        }
    }
    free(expected);
    free(group);
    free_points(&p);
}

/* Points of well separated topics end with their own kind, and no group stays empty. */
static void test_kmeans_finds_topics(void **state) {
    (void)state;
    enum { TOPICS = 16, N = 1600 };
    points p = make_points(N, TOPICS, 9);
    uint32_t group[N], size[TOPICS * 2] = {0};
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, TOPICS * 2, 10, false, NULL, group, &err),
                     LOCI_OK);
    double inside = 0.0, total = 0.0;
    float mean[TOPICS * 2][DIM] = {{0}};
    for (uint32_t t = 0; t < N; t++) {
        assert_true(group[t] < TOPICS * 2);
        size[group[t]]++;
        for (uint32_t i = 0; i < DIM; i++) mean[group[t]][i] += p.x[t * DIM + i];
    }
    for (uint32_t c = 0; c < TOPICS * 2; c++) assert_true(size[c] > 0);
    for (uint32_t t = 0; t < N; t++) {
        for (uint32_t i = 0; i < DIM; i++) {
            double off = (double)p.x[t * DIM + i] - (double)mean[group[t]][i] / size[group[t]];
            inside += off * off;
            total += (double)p.x[t * DIM + i] * (double)p.x[t * DIM + i];
        }
    }
    /* Noise alone is 0.09 of 1.09. */
    if (inside / total > 0.12) fail_msg("variance inside groups: %.3f", inside / total);
    free_points(&p);
}

/* Continuing from given groups never mixes points up between ids. */
static void test_kmeans_resumes(void **state) {
    (void)state;
    points p = make_points(800, 20, 4);
    uint32_t first[800], again[800];
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, 800, 40, 30, false, NULL, first, &err), LOCI_OK);
    memcpy(again, first, sizeof first);
    assert_int_equal(loci_kmeans(&p.view, p.ids, 800, 40, 1, true, NULL, again, &err), LOCI_OK);
    uint32_t moved = 0;
    for (uint32_t i = 0; i < 800; i++) moved += first[i] != again[i];
    assert_true(moved < 40); /* converged groups stay */
    free_points(&p);
}

static void check_cut(points *p, uint32_t cap) {
    uint32_t *ends = malloc(p->n * sizeof *ends), count = 0;
    uint8_t *seen = calloc(p->n, 1);
    loci_error err;
    assert_int_equal(loci_kmeans_cut(&p->view, p->ids, p->n, cap, ends, &count, &err), LOCI_OK);
    assert_int_equal(ends[count - 1], p->n);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t length = ends[i] - (i ? ends[i - 1] : 0);
        assert_in_range(length, 1, cap);
    }
    for (uint32_t i = 0; i < p->n; i++) {
        assert_true(p->ids[i] < p->n);
        assert_false(seen[p->ids[i]]++);
    }
    free(ends);
    free(seen);
}

static void test_cut_respects_cap_and_keeps_all(void **state) {
    (void)state;
    for (uint32_t n = 1; n < 700; n = n * 3 + 1) {
        points p = make_points(n, 3, n);
        check_cut(&p, 32);
        check_cut(&p, 1);
        free_points(&p);
    }
}

static void test_degenerate_points(void **state) {
    (void)state;
    static const float values[] = {0.0f, 1.0f, -3e14f, 1e-30f};
    for (size_t k = 0; k < sizeof values / sizeof *values; k++) {
        points p = make_points(500, 1, 1);
        uint32_t group[500];
        loci_error err;
        for (uint32_t i = 0; i < p.n * DIM; i++) p.x[i] = values[k];
        loci_points_quantise(p.x, p.n, DIM, p.code, p.length);
        assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, 31, 5, false, NULL, group, &err),
                         LOCI_OK);
        for (uint32_t i = 0; i < p.n; i++) assert_true(group[i] < 31);
        check_cut(&p, 32);
        free_points(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kmeans_same_groups_at_any_thread_count_and_isa),
        cmocka_unit_test(test_kmeans_finds_topics),
        cmocka_unit_test(test_kmeans_resumes),
        cmocka_unit_test(test_cut_respects_cap_and_keeps_all),
        cmocka_unit_test(test_degenerate_points),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
