/* SPDX-License-Identifier: Apache-2.0
 *
 * Look-ups whose K and V stand on the device, in part below, and below but for a few cached rows:
 * the same bits everywhere, over shapes drawn anew in every run (LOCI_TEST_SEED repeats one), by
 * several streams at the same time; figures of the cache of rows, and the upkeep of its frames.
 * What stands where is test_tiers.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "attention/cuda/rows.h"
#include "tests/attention/lookup_scene.h"

#define ROOM ((uint64_t)1 << 40)

static uint64_t seed;

static void must(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s (seed %llu)", err->text, (unsigned long long)seed);
}

static loci_cuda_pairs *pairs_of(const scene *s) {
    return ((loci_cuda *)s->f.backend->ctx)->pairs;
}

static loci_cuda_pairs_stats stats_of(const scene *s) {
    loci_cuda_pairs_stats stats;
    loci_cuda_pairs_stats_of(pairs_of(s), &stats);
    return stats;
}

/* Everything a look-up gives: output, log-sum-exp, masses of segments, in one piece. */
typedef struct answer {
    float *values;
    size_t outs, heads, count;
    uint64_t read; /* tokens, once for all rows */
} answer;

static answer new_answer(const scene *s) {
    answer a = {.heads = (size_t)s->rows * s->f.q_heads};
    a.outs = a.heads * s->f.dim;
    a.count = a.outs + a.heads + s->f.segments;
    a.values = calloc(a.count, sizeof *a.values);
    assert_non_null(a.values);
    return a;
}

/* On a stream of its own, if it is given one. */
static loci_status ask(const scene *s, loci_stream *stream, uint32_t layer,
                       const loci_select_params *params, answer *to, loci_error *err) {
    const loci_backend_ops *ops = s->f.backend->ops;
    size_t each = sizeof(float), width = s->f.q_heads * s->f.dim;
    loci_buffer *memory = NULL;
    loci_lookup *lookup = NULL;
    loci_lookup_stats stats;
    loci_status status;
    memset(to->values, 0xff, to->count * each);
    memset(to->values + to->outs + to->heads, 0, s->f.segments * each);
    LOCI_TRY(ops->lookup_create(s->f.backend, &lookup, err));
    LOCI_TRY_GOTO(ops->alloc(s->f.backend, (to->outs + to->heads + to->count) * each, &memory, err),
                  out);
    loci_ref result = loci_ref_at(memory, 0), lse = loci_ref_at(memory, to->outs * each);
    loci_ref mass = loci_ref_at(memory, (to->outs + to->heads) * each);
    loci_ref q = loci_ref_at(memory, to->count * each);
    loci_ref steady = loci_ref_at(memory, (to->count + to->outs) * each);
    ops->upload(stream, result, to->values, to->count * each);
    ops->upload(stream, q, s->q, to->outs * each);
    ops->upload(stream, steady, s->steady, to->heads * each);
    ops->lookup_begin(stream, lookup, &s->f.view, layer, q, (uint32_t)width, s->rows, s->f.q_heads,
                      1.0f / sqrtf((float)s->f.dim), steady, params);
    ops->score_nodes(stream, lookup);
    ops->score_codes(stream, lookup);
    ops->select(stream, lookup);
    ops->attend_sparse(stream, lookup, result, (uint32_t)width, lse);
    ops->attribute(stream, lookup, lse, 0, mass);
    ops->lookup_stats(stream, lookup, &stats);
    ops->download(stream, to->values, result, to->count * each);
    status = ops->sync(stream, err);
    to->read = stats.kv_bytes / (4 * s->f.dim);
out:
    ops->lookup_free(s->f.backend, lookup);
    ops->free(s->f.backend, memory);
    return status;
}

static void ask_now(const scene *s, uint32_t layer, const loci_select_params *params, answer *to) {
    loci_error err = {0};
    must(ask(s, s->f.stream, layer, params, to, &err), &err);
}

static void same(const scene *s, const answer *a, const answer *b, const char *what, int turn) {
    for (size_t i = 0; i < a->count; i++)
        if (memcmp(&a->values[i], &b->values[i], sizeof(float)) != 0)
            fail_msg("seed %llu, %s, turn %d: value %zu of %zu is %.9g, on the device %.9g (%u "
                     "tokens of %u, %u rows, %u heads of %u)",
                     (unsigned long long)seed, what, turn, i, a->count, (double)a->values[i],
                     (double)b->values[i], s->f.tokens, s->f.dim, s->rows, s->f.q_heads,
                     s->f.kv_heads);
}

static void forget_all(scene *s) {
    loci_error err;
    must(fixture_rewrap(&s->f, &err), &err);
}

/* Budgets for one look-up's pairs, whose index takes so much. */
static const struct {
    const char *name;
    unsigned kv_parts; /* room for so many quarters of K and V */
    bool lower;        /* all go down before they are asked for again */
} tiers[] = {{"half", 2, false}, {"below", 4, true}, {"nearly nothing", 0, false}};

/* Asks three times with each budget. */
static void check_tiers(scene *s, const loci_select_params *params, const char *mode) {
    answer on_device = new_answer(s), here = new_answer(s);
    char what[80];
    loci_cuda_pairs_limit(pairs_of(s), ROOM, ROOM);
    forget_all(s);
    ask_now(s, 0, params, &on_device);
    loci_cuda_pairs_stats stats = stats_of(s);
    assert_int_equal(stats.host_bytes, 0);
    uint64_t index = stats.bytes - stats.kv_bytes, kv = stats.kv_bytes;
    for (size_t i = 0; i < sizeof tiers / sizeof *tiers; i++) {
        (void)snprintf(what, sizeof what, "%s, %s", mode, tiers[i].name);
        if (!tiers[i].lower) forget_all(s);
        loci_cuda_pairs_limit(pairs_of(s), index + kv * tiers[i].kv_parts / 4 + kv / 8, ROOM);
        if (tiers[i].lower) loci_cuda_pairs_lower(pairs_of(s));
        for (int turn = 0; turn < 3; turn++) {
            ask_now(s, 0, params, &here);
            same(s, &here, &on_device, what, turn);
        }
        stats = stats_of(s);
        assert_true(stats.bytes <= stats.budget);
        assert_true(stats.host_bytes > 0);
        if (tiers[i].lower) assert_int_equal(stats.host_bytes, kv);
    }
    free(on_device.values);
    free(here.values);
}

static void test_the_same_bits_wherever_rows_lie(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 1;
    for (int round = 0; round < 12; round++) {
        setting c = random_setting(&rng);
        c.kv_int8 = round % 4 == 3;
        if (round % 2) c.rows = 1; /* from the list, where a group is no larger than a tile */
        c.tokens += 600;
        scene s = open_scene(c);
        if (round % 3 == 2) kill_some(&s, 2);
        loci_select_params dense = {.mode = LOCI_MODE_DENSE}, params = narrow(0.9f, 0);
        loci_select_params squeezed = {.mode = LOCI_MODE_SQUEEZED,
                                       .squeezed_threshold = {2e-4f, 2e-4f}};
        check_tiers(&s, &params, "hierarchical");
        params.estimate_tail = true;
        check_tiers(&s, &params, "with a tail");
        check_tiers(&s, &squeezed, "squeezed");
        check_tiers(&s, &dense, "dense");
        close_scene(&s);
    }
}

/* What one row selects, or several together, is missed once and then there, each token counted
 * once: as many as a step may keep, of the second budget all. */
static void check_figures(scene *s, uint64_t times) {
    answer a = new_answer(s);
    loci_select_params params = narrow(0.9f, 0);
    forget_all(s);
    (void)loci_cuda_pairs_shrink(pairs_of(s), 1); /* and what is cached so far */
    assert_int_equal(stats_of(s).frames, 0);
    loci_cuda_pairs_limit(pairs_of(s), ROOM, ROOM);
    ask_now(s, 0, &params, &a);
    loci_cuda_pairs_limit(pairs_of(s), times * stats_of(s).bytes, ROOM);
    loci_cuda_pairs_lower(pairs_of(s));
    loci_cuda_pairs_stats before = stats_of(s);
    ask_now(s, 0, &params, &a);
    loci_cuda_pairs_stats first = stats_of(s);
    assert_true(a.read > 0 && first.frames > 0);
    assert_int_equal(first.row_hits, before.row_hits);
    assert_int_equal(first.row_misses - before.row_misses, a.read);
    uint64_t ring = 1;
    while (ring < 65536 && ring * 8 <= first.frames) ring *= 2;
    uint64_t kept = ring < a.read ? ring : a.read;
    if (times > 1) assert_int_equal(kept, a.read);
    ask_now(s, 0, &params, &a);
    loci_cuda_pairs_stats second = stats_of(s);
    assert_int_equal(second.row_hits - first.row_hits, kept);
    assert_int_equal(second.row_misses - first.row_misses, a.read - kept);
    free(a.values);
}

static void test_figures_of_rows(void **state) {
    (void)state;
    for (uint32_t rows = 1; rows <= 3; rows += 2) {
        setting c = usual;
        c.rows = rows;
        c.tokens = 6000;
        c.extent_tokens = 2500;
        c.group = 7;
        c.seed = seed % 100000;
        scene s = open_scene(c);
        check_figures(&s, 1);
        check_figures(&s, 64);
        close_scene(&s);
    }
}

/* --- several streams ------------------------------------------------------------------- */

#define WORKERS 4

typedef struct worker {
    scene s; /* with queries of its own */
    loci_stream *stream;
    loci_select_params params;
    answer expected[2], got;
    int turns, wrong;
    loci_status status;
    loci_error err;
} worker;

static void *ask_often(void *arg) {
    worker *w = arg;
    for (int i = 0; i < w->turns && w->status == LOCI_OK; i++) {
        uint32_t layer = (uint32_t)i % 2;
        w->status = ask(&w->s, w->stream, layer, &w->params, &w->got, &w->err);
        w->wrong += w->status == LOCI_OK && memcmp(w->got.values, w->expected[layer].values,
                                                   w->got.count * sizeof(float)) != 0;
    }
    return NULL;
}

/* Threads with streams and queries of their own over two layers, with few frames, which they take
 * from each other, and not enough room for both layers' K and V: each gets what it gets alone. */
static void test_streams_share_the_cache(void **state) {
    (void)state;
    setting c = usual;
    c.rows = 4;
    c.tokens = 3000;
    c.extent_tokens = 1200;
    c.seed = seed % 100000;
    scene s = open_scene(c);
    worker workers[WORKERS] = {0};
    pthread_t threads[WORKERS];
    size_t width = s.f.q_heads * s.f.dim;
    for (uint32_t i = 0; i < WORKERS; i++) {
        worker *w = &workers[i];
        *w = (worker){.s = s, .turns = 24, .params = narrow(0.9f, 0)};
        if (i == 3) w->params = (loci_select_params){.mode = LOCI_MODE_DENSE};
        w->s.rows = i < 2 ? 1 : i + 1;
        w->s.q = s.q + (i == 1 ? width : 0);
        w->s.steady = s.steady + (i == 1 ? s.f.q_heads : 0);
        w->got = new_answer(&w->s);
        must(s.f.backend->ops->stream_open(s.f.backend, &w->stream, &w->err), &w->err);
        for (uint32_t layer = 0; layer < 2; layer++) {
            w->expected[layer] = new_answer(&w->s);
            must(ask(&w->s, w->stream, layer, &w->params, &w->expected[layer], &w->err), &w->err);
        }
    }
    loci_cuda_pairs_stats stats = stats_of(&s);
    loci_cuda_pairs_limit(pairs_of(&s), stats.bytes - stats.kv_bytes * 7 / 8, ROOM);
    loci_cuda_pairs_lower(pairs_of(&s));
    for (int i = 0; i < WORKERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, ask_often, &workers[i]), 0);
    for (int i = 0; i < WORKERS; i++) assert_int_equal(pthread_join(threads[i], NULL), 0);
    stats = stats_of(&s);
    for (int i = 0; i < WORKERS; i++) {
        worker *w = &workers[i];
        must(w->status, &w->err);
        if (w->wrong)
            fail_msg("seed %llu: worker %d, %d wrong", (unsigned long long)seed, i, w->wrong);
        s.f.backend->ops->stream_close(s.f.backend, w->stream);
        free(w->got.values);
        free(w->expected[0].values);
        free(w->expected[1].values);
    }
    assert_true(stats.row_hits > 0);
    close_scene(&s);
}

/* Less than the layer's indexes: refused with a sentence, with whatever room below. */
static void test_indexes_that_do_not_fit(void **state) {
    (void)state;
    scene s = open_scene(usual);
    answer a = new_answer(&s), before = new_answer(&s);
    loci_select_params params = narrow(0.9f, 0);
    loci_error err = {0};
    ask_now(&s, 0, &params, &before);
    loci_cuda_pairs_stats stats = stats_of(&s);
    loci_cuda_pairs_limit(pairs_of(&s), (stats.bytes - stats.kv_bytes) / 4 * 3, ROOM);
    assert_int_equal(ask(&s, s.f.stream, 1, &params, &a, &err), LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "does not fit the GPU"));
    loci_cuda_pairs_limit(pairs_of(&s), stats.bytes, ROOM);
    ask_now(&s, 0, &params, &a);
    same(&s, &a, &before, "after a refusal", 0);
    free(a.values);
    free(before.values);
    close_scene(&s);
}

/* --- the sweep ------------------------------------------------------------------------- */

typedef struct frames {
    uint8_t *use;
    uint32_t **owner, *ring;
    loci_cuda_row_state state;
} frames;

static frames read_frames(const loci_cuda_row_cache *c) {
    frames f = {malloc(c->count), calloc(c->count, sizeof *f.owner), calloc(c->ring_count, 4), {0}};
    assert_true(f.use && f.owner && f.ring);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    (void)cudaMemcpy(f.use, c->use, c->count, cudaMemcpyDeviceToHost);
    (void)cudaMemcpy(f.owner, c->owner, c->count * sizeof *f.owner, cudaMemcpyDeviceToHost);
    (void)cudaMemcpy(f.ring, c->ring, c->ring_count * 4, cudaMemcpyDeviceToHost);
    (void)cudaMemcpy(&f.state, c->state, sizeof f.state, cudaMemcpyDeviceToHost);
    return f;
}

static void free_frames(frames *f) {
    free(f->use);
    free(f->owner);
    free(f->ring);
}

/* Between two states: idle frames in the order of the hand come into the ring and lose their
 * owners, used ones it passed are idle, nothing else has changed. */
static void check_sweep(const loci_cuda_row_cache *c, const frames *a, const frames *b,
                        const uint32_t *table) {
    uint32_t head = a->state.head, tail = a->state.tail, evicted = 0;
    if ((int32_t)(tail - head) < 0) head = tail;
    assert_int_equal(b->state.head, head);
    uint32_t moved = (b->state.hand + c->count - a->state.hand) % c->count;
    if (moved == 0 && tail - head < c->ring_count) moved = c->count; /* all of them */
    for (uint32_t i = 0; i < c->count; i++) {
        uint32_t f = (a->state.hand + i) % c->count;
        bool passed = i < moved;
        if (passed && a->use[f] == LOCI_CUDA_FRAME_IDLE && tail - head < c->ring_count) {
            assert_int_equal(b->ring[tail++ % c->ring_count], f);
            assert_int_equal(b->use[f], LOCI_CUDA_FRAME_FREE);
            assert_null(b->owner[f]);
            evicted += a->owner[f] != NULL;
            if (a->owner[f]) assert_int_equal(table[f], 0);
            continue;
        }
        bool cleared =
            passed && a->use[f] == LOCI_CUDA_FRAME_USED && b->use[f] == LOCI_CUDA_FRAME_IDLE;
        if (!cleared) assert_int_equal(b->use[f], a->use[f]);
        assert_ptr_equal(b->owner[f], a->owner[f]);
        if (a->owner[f]) assert_int_equal(table[f], f + 1);
    }
    assert_int_equal(b->state.tail, tail);
    assert_int_equal(b->state.evicted, a->state.evicted + evicted);
    bool full = tail - head == c->ring_count;
    assert_true(full || moved == c->count || moved >= 8 * 16384);
}

/* Frames in any state: what a step took from the ring is used and has an owner, the entry of a
 * table with the frame's number, so that one table is enough. */
static void test_sweeps(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 3;
    static const uint32_t sizes[] = {16, 48, 4096, 40000, 300000};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        loci_cuda_rows rows;
        loci_error err;
        void *memory = NULL, *table = NULL;
        uint32_t count = sizes[n], *entries = calloc(count, sizeof *entries);
        size_t bytes = (size_t)count * (64 + 10) + 1024;
        assert_non_null(entries);
        must(loci_cuda_try(cudaMalloc(&memory, bytes), "malloc", &err), &err);
        must(loci_cuda_try(cudaMalloc(&table, count * 4), "malloc", &err), &err);
        (void)cudaMemset(table, 0, count * 4);
        must(loci_cuda_rows_init(&rows, NULL, &err), &err);
        must(loci_cuda_rows_use(&rows, memory, bytes, 16, &err), &err);
        loci_cuda_row_cache c = rows.cache;
        assert_int_equal(c.count, count);
        for (int round = 0; round < 12; round++) {
            frames a = read_frames(&c);
            (void)cudaMemcpy(entries, table, count * 4, cudaMemcpyDeviceToHost);
            uint32_t there = a.state.tail - a.state.head;
            uint32_t taken = (uint32_t)(fixture_random(&rng) % (there + 2));
            for (uint32_t i = 0; i < taken && i < there; i++) {
                uint32_t f = a.ring[(a.state.head + i) % c.ring_count];
                a.use[f] = LOCI_CUDA_FRAME_USED;
                a.owner[f] = (uint32_t *)table + f;
                entries[f] = f + 1;
            }
            a.state.head += taken;
            for (uint32_t f = 0; f < count; f++)
                if (a.use[f] == LOCI_CUDA_FRAME_IDLE && a.owner[f] && fixture_random(&rng) % 3)
                    a.use[f] = LOCI_CUDA_FRAME_USED;
            (void)cudaMemcpy(c.use, a.use, count, cudaMemcpyHostToDevice);
            (void)cudaMemcpy(c.owner, a.owner, count * sizeof *a.owner, cudaMemcpyHostToDevice);
            (void)cudaMemcpy(c.state, &a.state, sizeof a.state, cudaMemcpyHostToDevice);
            (void)cudaMemcpy(table, entries, count * 4, cudaMemcpyHostToDevice);
            assert_int_equal(loci_cuda_k_rows_sweep(NULL, &c), cudaSuccess);
            frames b = read_frames(&c);
            (void)cudaMemcpy(entries, table, count * 4, cudaMemcpyDeviceToHost);
            check_sweep(&c, &a, &b, entries);
            free_frames(&a);
            free_frames(&b);
        }
        loci_cuda_rows_forget(&rows, table, count / 2);
        frames f = read_frames(&c);
        for (uint32_t i = 0; i < count; i++)
            assert_true(!f.owner[i] || f.owner[i] >= (uint32_t *)table + count / 2);
        free_frames(&f);
        loci_cuda_rows_fini(&rows);
        (void)cudaFree(table);
        free(entries);
    }
}

int main(void) {
    seed = fresh_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_same_bits_wherever_rows_lie),
        cmocka_unit_test(test_figures_of_rows),
        cmocka_unit_test(test_streams_share_the_cache),
        cmocka_unit_test(test_indexes_that_do_not_fit),
        cmocka_unit_test(test_sweeps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
