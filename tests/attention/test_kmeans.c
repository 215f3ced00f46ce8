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
    p.view = (loci_points){p.x, p.code, p.length, DIM, &loci_corpus_kernels_portable, NULL};
    return p;
}

static void free_points(points *p) {
    free(p->x);
    free(p->length);
    free(p->code);
    free(p->ids);
}

static void check_same_groups(uint32_t n, uint32_t k) {
    points p = make_points(n, 40, 3);
    uint32_t *expected = malloc(p.n * sizeof *expected), *group = malloc(p.n * sizeof *group);
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, k, 8, 0, NULL, expected, &err), LOCI_OK);
    loci_cpu_isa best;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    for (int isa = LOCI_ISA_PORTABLE; isa <= (int)best; isa++) {
        p.view.kernels = loci_corpus_kernels_of((loci_cpu_isa)isa);
        for (unsigned threads = 1; threads <= 3; threads++) {
            loci_pool *pool = NULL;
            assert_int_equal(loci_pool_create(threads, &pool, &err), LOCI_OK);
            memset(group, 0xff, p.n * sizeof *group);
            assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, k, 8, 0, pool, group, &err), LOCI_OK);
            assert_memory_equal(group, expected, p.n * sizeof *group);
            loci_pool_destroy(pool);
        }
    }
    free(expected);
    free(group);
    free_points(&p);
}

static void test_kmeans_same_groups_at_any_thread_count_and_isa(void **state) {
    (void)state;
    check_same_groups(3000, 50);
    check_same_groups(3000, 1100); /* in bundles */
}

/* The share of the points' squares that lies around the means of their groups, none of which is
 * empty. */
static double inside_share(const points *p, const uint32_t *group, uint32_t k) {
    float(*mean)[DIM] = calloc(k, sizeof *mean);
    uint32_t *size = calloc(k, sizeof *size);
    double inside = 0.0, total = 0.0;
    assert_true(mean && size);
    for (uint32_t t = 0; t < p->n; t++) {
        assert_true(group[t] < k);
        size[group[t]]++;
        for (uint32_t i = 0; i < DIM; i++) mean[group[t]][i] += p->x[t * DIM + i];
    }
    for (uint32_t c = 0; c < k; c++) assert_true(size[c] > 0);
    for (uint32_t t = 0; t < p->n; t++) {
        for (uint32_t i = 0; i < DIM; i++) {
            double off = (double)p->x[t * DIM + i] - (double)mean[group[t]][i] / size[group[t]];
            inside += off * off;
            total += (double)p->x[t * DIM + i] * (double)p->x[t * DIM + i];
        }
    }
    free(mean);
    free(size);
    return inside / total;
}

/* Points of well separated topics end with their own kind, and no group stays empty. */
static void test_kmeans_finds_topics(void **state) {
    (void)state;
    enum { TOPICS = 16, N = 1600 };
    points p = make_points(N, TOPICS, 9);
    uint32_t group[N];
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, TOPICS * 2, 10, 0, NULL, group, &err), LOCI_OK);
    /* Noise alone is 0.09 of 1.09. */
    double inside = inside_share(&p, group, TOPICS * 2);
    if (inside > 0.12) fail_msg("variance inside groups: %.3f", inside);
    free_points(&p);
}

/* Groups trained on a sample are nearly as tight as those trained on all points. */
static void test_kmeans_trains_on_a_sample(void **state) {
    (void)state;
    enum { N = 6000, TOPICS = 20 };
    points p = make_points(N, TOPICS, 4);
    static uint32_t whole[N], sampled[N];
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, TOPICS * 2, 10, 0, NULL, whole, &err), LOCI_OK);
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, TOPICS * 2, 10, 800, NULL, sampled, &err),
                     LOCI_OK);
    assert_true(memcmp(whole, sampled, sizeof whole) != 0);
    double all = inside_share(&p, whole, TOPICS * 2), few = inside_share(&p, sampled, TOPICS * 2);
    if (few > 1.1 * all) fail_msg("variance inside groups: %.3f, of a sample %.3f", all, few);
    free_points(&p);
}

/* Many groups are looked at by bundles: that costs little of what all of them together give. */
static void test_kmeans_of_many_groups_is_as_tight(void **state) {
    (void)state;
    enum { N = 12000, TOPICS = 700, FEW = 1023, MANY = 1024 };
    points p = make_points(N, TOPICS, 6);
    static uint32_t few[N], many[N];
    loci_error err;
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, FEW, 8, 0, NULL, few, &err), LOCI_OK);
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, MANY, 8, 0, NULL, many, &err), LOCI_OK);
    double all = inside_share(&p, few, FEW), bundled = inside_share(&p, many, MANY);
    if (bundled > 1.05 * all)
        fail_msg("variance inside groups: %.4f, by bundles %.4f", all, bundled);
    free_points(&p);
}

/* Groups that coincide leave bundles empty. */
static void test_kmeans_of_many_groups_of_few_points(void **state) {
    (void)state;
    enum { N = 3000, K = 1200, KINDS = 5 };
    points p = make_points(N, 7, 8);
    static uint32_t group[N];
    loci_error err;
    for (uint32_t t = KINDS; t < N; t++)
        memcpy(p.x + (size_t)t * DIM, p.x + (size_t)(t % KINDS) * DIM, DIM * sizeof *p.x);
    loci_points_quantise(p.x, N, DIM, p.code, p.length);
    assert_int_equal(loci_kmeans(&p.view, p.ids, N, K, 8, 0, NULL, group, &err), LOCI_OK);
    for (uint32_t t = 0; t < N; t++) assert_true(group[t] < K);
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
        assert_int_equal(loci_kmeans(&p.view, p.ids, p.n, 31, 5, 0, NULL, group, &err), LOCI_OK);
        for (uint32_t i = 0; i < p.n; i++) assert_true(group[i] < 31);
        check_cut(&p, 32);
        free_points(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kmeans_same_groups_at_any_thread_count_and_isa),
        cmocka_unit_test(test_kmeans_finds_topics),
        cmocka_unit_test(test_kmeans_trains_on_a_sample),
        cmocka_unit_test(test_kmeans_of_many_groups_is_as_tight),
        cmocka_unit_test(test_kmeans_of_many_groups_of_few_points),
        cmocka_unit_test(test_cut_respects_cap_and_keeps_all),
        cmocka_unit_test(test_degenerate_points),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
