/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs built one after another and overlapped, by a backend that clusters, has no memory to, or
 * fails: the same bytes or the failure, and nothing left behind.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cluster.h"
#include "base/pool.h"
#include "tests/attention/corpus_fixture.h"

enum { PAIRS = 6, TOKENS = 700, DIM = 32 };

typedef struct scene {
    uint16_t *k[PAIRS], *v[PAIRS];
    uint32_t slots[TOKENS];
    loci_buf blobs[PAIRS];
    uint64_t hashes[PAIRS];
    loci_backend *backend;
    uint32_t reads, puts, fail_read, fail_put; /* the numbers of pairs that fail */
} scene;

static scene *scene_open(void) {
    scene *s = calloc(1, sizeof *s);
    uint64_t rng = 77;
    assert_non_null(s);
    s->fail_read = s->fail_put = UINT32_MAX;
    for (uint32_t t = 0; t < TOKENS; t++) s->slots[t] = t / 50 << 16 | t % 50;
    for (uint32_t p = 0; p < PAIRS; p++) {
        s->k[p] = malloc(TOKENS * DIM * sizeof(uint16_t));
        s->v[p] = malloc(TOKENS * DIM * sizeof(uint16_t));
        assert_true(s->k[p] && s->v[p]);
        for (uint32_t i = 0; i < TOKENS * DIM; i++) {
            s->k[p][i] = loci_f32_to_bf16(fixture_normal(&rng));
            s->v[p][i] = loci_f32_to_bf16(fixture_normal(&rng));
        }
    }
    return s;
}

static void scene_close(scene *s) {
    for (uint32_t p = 0; p < PAIRS; p++) {
        free(s->k[p]);
        free(s->v[p]);
        loci_buf_fini(&s->blobs[p]);
    }
    free(s);
}

static loci_status read_pair(void *ctx, uint32_t pair, loci_pair_rows *rows,
                             loci_pair_build_options *options, loci_error *err) {
    scene *s = ctx;
    assert_int_equal(pair, s->reads++);
    if (pair == s->fail_read) return loci_fail(err, LOCI_E_IO, "pair %u is gone", pair);
    *rows = (loci_pair_rows){s->k[pair], s->v[pair], s->slots, TOKENS, DIM};
    options->backend = s->backend;
    return LOCI_OK;
}

static loci_status put_pair(void *ctx, uint32_t pair, loci_slice blob, uint64_t hash,
                            loci_error *err) {
    scene *s = ctx;
    assert_int_equal(pair, s->puts++);
    if (pair == s->fail_put) return loci_fail(err, LOCI_E_IO, "pair %u has no place", pair);
    loci_buf_clear(&s->blobs[pair]);
    loci_buf_append(&s->blobs[pair], blob.data, blob.len);
    s->hashes[pair] = hash;
    return loci_buf_status(&s->blobs[pair]);
}

static loci_status run(scene *s, uint32_t ahead, loci_error *err) {
    loci_pair_work work = {s, read_pair, put_pair};
    loci_pool *pool = NULL;
    assert_int_equal(loci_pool_create(3, &pool, err), LOCI_OK);
    s->reads = s->puts = 0;
    loci_status status = loci_pairs_build(&work, PAIRS, ahead, pool, err);
    loci_pool_destroy(pool);
    return status;
}

static void check_blobs(const scene *s) {
    for (uint32_t p = 0; p < PAIRS; p++) {
        loci_pair_build_options options = {0};
        loci_buf expected = LOCI_BUF_INIT;
        loci_error err;
        uint64_t hash;
        assert_int_equal(loci_pair_build(s->k[p], s->v[p], s->slots, TOKENS, DIM, &options, NULL,
                                         &expected, &hash, &err),
                         LOCI_OK);
        assert_true(hash == s->hashes[p]);
        assert_int_equal(s->blobs[p].len, expected.len);
        assert_memory_equal(s->blobs[p].data, expected.data, expected.len);
        loci_buf_fini(&expected);
    }
}

static void test_overlapped_or_not(void **state) {
    (void)state;
    scene *s = scene_open();
    loci_error err;
    for (uint32_t ahead = 0; ahead <= LOCI_PAIRS_AHEAD_MOST; ahead++) {
        assert_int_equal(run(s, ahead, &err), LOCI_OK);
        assert_int_equal(s->puts, PAIRS);
        check_blobs(s);
    }
    scene_close(s);
}

/* The first failure ends it, and what was begun meanwhile goes (the sanitizers would tell). */
static void test_failures_end_it(void **state) {
    (void)state;
    for (uint32_t at = 0; at < PAIRS; at++) {
        for (uint32_t ahead = 0; ahead <= LOCI_PAIRS_AHEAD_MOST; ahead++) {
            scene *s = scene_open();
            loci_error err;
            s->fail_read = at;
            assert_int_equal(run(s, ahead, &err), LOCI_E_IO);
            assert_non_null(strstr(err.text, "is gone"));
            assert_int_equal(s->puts, at);
            s->fail_read = UINT32_MAX;
            s->fail_put = at;
            assert_int_equal(run(s, ahead, &err), LOCI_E_IO);
            assert_non_null(strstr(err.text, "has no place"));
            assert_int_equal(s->puts, at + 1);
            s->fail_put = UINT32_MAX;
            s->k[at][5 * DIM + 3] = 0x7f80; /* infinite */
            assert_int_equal(run(s, ahead, &err), LOCI_E_INVAL);
            assert_non_null(strstr(err.text, "key of token 5, channel 3"));
            assert_int_equal(s->puts, at);
            scene_close(s);
        }
    }
}

static atomic_uint asked;
static loci_status answer;

/* As a device would: clusters, or fails having written something. */
static loci_status cluster_keys(loci_backend *self, const loci_keys *keys, loci_clusters *out,
                                loci_error *err) {
    (void)self;
    asked++;
    if (answer == LOCI_OK) return loci_cluster_keys(keys, "portable", NULL, out, err);
    memset(out->ids, 0xff, keys->tokens * sizeof *out->ids);
    out->leaves = out->roots = 12345;
    return loci_fail(err, answer, "the device is out");
}

/* Where the backend has no memory the CPU clusters; any other failure is the build's. */
static void test_backend_that_clusters(void **state) {
    (void)state;
    loci_backend_ops ops = loci_backend_cpu;
    ops.cluster_keys = cluster_keys;
    loci_backend backend = {&ops, NULL};
    assert_int_equal(loci_pairs_ahead(&backend, 40000), 2);
    assert_int_equal(loci_pairs_ahead(&backend, 32768), LOCI_PAIRS_AHEAD_MOST);
    assert_int_equal(loci_pairs_ahead(NULL, 1), 0);
    assert_int_equal(loci_pairs_ahead(&(loci_backend){&loci_backend_cpu, NULL}, 1), 0);
    static const loci_status answers[] = {LOCI_OK, LOCI_E_NOMEM, LOCI_E_INTERNAL, LOCI_E_CANCELLED};
    for (uint32_t i = 0; i < 4 * LOCI_PAIRS_AHEAD_MOST; i++) {
        uint32_t ahead = 1 + i / 4;
        scene *s = scene_open();
        loci_error err;
        answer = answers[i % 4];
        bool good = answer == LOCI_OK || answer == LOCI_E_NOMEM;
        s->backend = &backend;
        asked = 0;
        assert_int_equal(run(s, ahead, &err), good ? LOCI_OK : answer);
        assert_true(asked <= (good ? PAIRS : 1 + ahead) && asked >= (good ? PAIRS : 1));
        assert_int_equal(s->puts, good ? PAIRS : 0);
        if (good)
            check_blobs(s);
        else
            assert_string_equal(err.text, "the device is out");
        scene_close(s);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_overlapped_or_not),
        cmocka_unit_test(test_failures_end_it),
        cmocka_unit_test(test_backend_that_clusters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
