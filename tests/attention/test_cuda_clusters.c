/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs built with the cuda backend's clusters beside those of the CPU, byte for byte: odd sizes,
 * keys that coincide, extremes, all head dimensions and both types, drawn anew in every run
 * (LOCI_TEST_SEED repeats one); and what happens where the device has no memory left.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention/cluster.h"
#include "tests/attention/corpus_fixture.h"

static uint64_t seed;
static loci_backend *gpu;

typedef enum key_kind { TOPICS, EQUAL, COPIES, EXTREME, TINY, COARSE, KINDS } key_kind;

typedef struct pair {
    uint16_t *k, *v;
    uint32_t *slots;
    uint32_t n, dim;
    key_kind kind;
} pair;

static void must(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s (seed %llu)", err->text, (unsigned long long)seed);
}

static float key_of(key_kind kind, float topic, uint32_t token, uint64_t *rng) {
    switch (kind) {
    case EQUAL: return 0.25f;
    case COPIES: return topic;
    case EXTREME: return (topic + fixture_normal(rng)) * (token % 3 ? 1e-20f : 1e14f);
    case TINY: return (topic + fixture_normal(rng)) * (token % 5 ? 1.0f : 1e-39f);
    case COARSE: return (float)(fixture_random(rng) % 3) - 1.0f; /* many equal products */
    default: return topic + 0.4f * fixture_normal(rng);
    }
}

static pair make_pair(uint32_t n, uint32_t dim, key_kind kind) {
    pair p = {.n = n, .dim = dim, .kind = kind};
    uint64_t rng = (seed ^ n * 2654435761u ^ dim << 8 ^ (uint64_t)kind << 40) | 1;
    uint32_t topics = 1 + n / 100;
    p.k = malloc((size_t)n * dim * sizeof *p.k);
    p.v = malloc((size_t)n * dim * sizeof *p.v);
    p.slots = malloc(n * sizeof *p.slots);
    float *topic = malloc((size_t)topics * dim * sizeof *topic);
    assert_true(p.k && p.v && p.slots && topic);
    for (size_t i = 0; i < (size_t)topics * dim; i++) topic[i] = fixture_normal(&rng);
    for (uint32_t t = 0; t < n; t++) {
        const float *of = topic + fixture_random(&rng) % topics * dim;
        p.slots[t] = t / 100 << 16 | t % 100;
        for (uint32_t i = 0; i < dim; i++) {
            p.k[(size_t)t * dim + i] = loci_f32_to_bf16(key_of(kind, of[i], t, &rng));
            p.v[(size_t)t * dim + i] = (uint16_t)(fixture_random(&rng) & 0xbfffu);
        }
    }
    free(topic);
    return p;
}

static void free_pair(pair *p) {
    free(p->k);
    free(p->v);
    free(p->slots);
}

static void build(const pair *p, const loci_pair_build_options *options, loci_buf *out,
                  uint64_t *hash) {
    loci_error err = {0};
    must(loci_pair_build(p->k, p->v, p->slots, p->n, p->dim, options, loci_backend_pool(gpu), out,
                         hash, &err),
         &err);
}

static void check_pair(uint32_t n, uint32_t dim, key_kind kind, bool int8) {
    pair p = make_pair(n, dim, kind);
    loci_pair_build_options options = {.kv_int8 = int8};
    loci_buf expected = LOCI_BUF_INIT, blob = LOCI_BUF_INIT;
    uint64_t expected_hash, hash;
    build(&p, &options, &expected, &expected_hash);
    options.backend = gpu;
    build(&p, &options, &blob, &hash);
    if (blob.len != expected.len || memcmp(blob.data, expected.data, blob.len) != 0 ||
        hash != expected_hash)
        fail_msg("%u tokens of %u, kind %d, int8 %d: other bytes (seed %llu)", n, dim, (int)kind,
                 int8, (unsigned long long)seed);
    loci_buf_fini(&expected);
    loci_buf_fini(&blob);
    free_pair(&p);
}

static void test_small_pairs(void **state) {
    (void)state;
    static const uint32_t sizes[] = {1, 2, 15, 16, 17, 33, 65, 255, 256, 257, 385, 1000, 5003};
    static const uint32_t dims[] = {16, 64, 96, 128, 256};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (int kind = 0; kind < KINDS; kind++)
                check_pair(sizes[s], dims[d], (key_kind)kind, (s + d) % 2);
}

/* From 1,024 roots on, they are compared in bundles. */
static uint32_t bundled_size(void) {
    uint64_t rng = seed | 1;
    uint32_t least = LOCI_BUNDLE_FROM * LOCI_ROOT_TOKENS;
    return least + (uint32_t)(fixture_random(&rng) % 30000);
}

static void test_bundled_pair(void **state) {
    (void)state;
    check_pair(bundled_size(), 64, TOPICS, true);
}

static void test_large_pairs(void **state) {
    (void)state;
    check_pair(33000, 128, TOPICS, false);
    check_pair(40000, 64, EQUAL, false);
    check_pair(40000, 64, COARSE, true);
    check_pair(bundled_size(), 128, TOPICS, false);
    check_pair(bundled_size(), 96, COPIES, false);
    check_pair(bundled_size(), 64, COARSE, false);
}

/* More than streams keep when they are closed (LOCI_CUDA_IDLE_SCRATCH). */
#define SCARCE_TOKENS 400000u

/* All of the device's memory is taken: the CPU clusters, and the bytes are the same. */
static void test_no_memory_on_the_device(void **state) {
    (void)state;
    void *taken[64];
    size_t count = 0, step = (size_t)64 << 30;
    while (count < 64 && step >= (size_t)1 << 20) {
        if (cudaMalloc(&taken[count], step) == cudaSuccess)
            count++;
        else
            step /= 2;
        (void)cudaGetLastError();
    }
    loci_keys keys = {calloc(SCARCE_TOKENS * 128, sizeof(float)), SCARCE_TOKENS, 128, 6, NULL};
    uint32_t *lists = calloc(3 * SCARCE_TOKENS, sizeof *lists);
    assert_true(keys.x && lists);
    loci_clusters out = {lists, lists + SCARCE_TOKENS, lists + 2 * SCARCE_TOKENS, 0, 0};
    loci_error err = {0};
    assert_int_equal(gpu->ops->cluster_keys(gpu, &keys, &out, &err), LOCI_E_NOMEM);
    check_pair(SCARCE_TOKENS, 128, TOPICS, false);
    while (count > 0) (void)cudaFree(taken[--count]);
    assert_int_equal(gpu->ops->cluster_keys(gpu, &keys, &out, &err), LOCI_OK);
    free((void *)(uintptr_t)keys.x);
    free(lists);
}

static void test_is_stopped(void **state) {
    (void)state;
    pair p = make_pair(40000, 64, TOPICS);
    loci_cancel cancel;
    loci_cancel_init(&cancel, loci_now_ns() + 20000000);
    loci_pair_build_options options = {.cancel = &cancel, .backend = gpu};
    loci_status status = LOCI_OK;
    loci_error err = {0};
    for (int i = 0; status == LOCI_OK && i < 1000; i++) {
        loci_buf blob = LOCI_BUF_INIT;
        uint64_t hash;
        status = loci_pair_build(p.k, p.v, p.slots, p.n, p.dim, &options, loci_backend_pool(gpu),
                                 &blob, &hash, &err);
        loci_buf_fini(&blob);
    }
    assert_int_equal(status, LOCI_E_TIMEOUT);
    check_pair(1000, 64, TOPICS, false); /* nothing is left behind */
    free_pair(&p);
}

typedef struct overlapped {
    pair pairs[5];
    loci_buf blobs[5];
    uint64_t hashes[5];
    uint32_t put, fail_at; /* fail_at: the pair that cannot be read */
} overlapped;

static loci_status read_pair(void *ctx, uint32_t index, loci_pair_rows *rows,
                             loci_pair_build_options *options, loci_error *err) {
    overlapped *o = ctx;
    const pair *p = &o->pairs[index];
    if (index == o->fail_at) return loci_fail(err, LOCI_E_IO, "pair %u is gone", index);
    *rows = (loci_pair_rows){p->k, p->v, p->slots, p->n, p->dim};
    options->backend = gpu;
    return LOCI_OK;
}

static loci_status put_pair(void *ctx, uint32_t index, loci_slice blob, uint64_t hash,
                            loci_error *err) {
    overlapped *o = ctx;
    (void)err;
    assert_int_equal(index, o->put++);
    loci_buf_append(&o->blobs[index], blob.data, blob.len);
    o->hashes[index] = hash;
    return loci_buf_status(&o->blobs[index]);
}

static void test_overlapped_pairs(void **state) {
    (void)state;
    overlapped o = {.fail_at = UINT32_MAX};
    loci_error err = {0};
    assert_int_equal(loci_pairs_ahead(gpu, 3000), LOCI_PAIRS_AHEAD_MOST);
    for (uint32_t i = 0; i < 5; i++) o.pairs[i] = make_pair(3000 + 700 * i, 64, TOPICS);
    loci_pair_work work = {&o, read_pair, put_pair};
    must(loci_pairs_build(&work, 5, LOCI_PAIRS_AHEAD_MOST, loci_backend_pool(gpu), &err), &err);
    assert_int_equal(o.put, 5);
    for (uint32_t i = 0; i < 5; i++) {
        loci_pair_build_options options = {0};
        loci_buf expected = LOCI_BUF_INIT;
        uint64_t hash;
        build(&o.pairs[i], &options, &expected, &hash);
        assert_true(hash == o.hashes[i]);
        assert_int_equal(o.blobs[i].len, expected.len);
        assert_memory_equal(o.blobs[i].data, expected.data, expected.len);
        loci_buf_fini(&expected);
        loci_buf_fini(&o.blobs[i]);
    }
    o.put = 0;
    o.fail_at = 3;
    assert_int_equal(
        loci_pairs_build(&work, 5, LOCI_PAIRS_AHEAD_MOST, loci_backend_pool(gpu), &err), LOCI_E_IO);
    assert_string_equal(err.text, "pair 3 is gone");
    assert_int_equal(o.put, 3);
    for (uint32_t i = 0; i < 5; i++) {
        loci_buf_fini(&o.blobs[i]);
        free_pair(&o.pairs[i]);
    }
}

static int open_gpu(void **state) {
    (void)state;
    loci_error err = {0};
    must(loci_backend_open("cuda", NULL, &gpu, &err), &err);
    return 0;
}

static int close_gpu(void **state) {
    (void)state;
    loci_backend_close(gpu);
    return 0;
}

int main(void) {
    const char *given = getenv("LOCI_TEST_SEED");
    seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    seed = seed * 0x9e3779b97f4a7c15u + 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_pairs), cmocka_unit_test(test_bundled_pair),
        cmocka_unit_test(test_large_pairs), cmocka_unit_test(test_no_memory_on_the_device),
        cmocka_unit_test(test_is_stopped),  cmocka_unit_test(test_overlapped_pairs),
    };
    return cmocka_run_group_tests(tests, open_gpu, close_gpu);
}
