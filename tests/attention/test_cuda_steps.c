/* SPDX-License-Identifier: Apache-2.0
 *
 * Steps of a look-up that are launched as they were recorded (attention/cuda/steps.c): the same
 * bits and figures as enqueued one by one, with other queries each time, while buffers change,
 * memory grows, pairs move, and other threads wait for the device. Shapes are drawn anew in every
 * run (LOCI_TEST_SEED repeats one).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "tests/attention/lookup_scene.h"

#define ROOM ((uint64_t)4 << 30)
#define PLACES 3u /* of queries and results */

static uint64_t seed;

static void must(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s (seed %llu)", err->text, (unsigned long long)seed);
}

static loci_cuda *cuda_of(const scene *s) {
    return s->f.backend->ctx;
}

/* A slot, as the engine has it: [PLACES] of q, steady, out, lse, masses. */
typedef struct walker {
    scene *s;
    loci_stream *stream;
    loci_lookup *lookup;
    loci_buffer *memory;
    size_t outs, heads, count;
    float *values; /* out, lse, masses */
    loci_lookup_stats stats;
    loci_select_params params;
} walker;

static walker open_walker(scene *s, const loci_select_params *params) {
    const loci_backend_ops *ops = s->f.backend->ops;
    walker w = {.s = s, .heads = s->f.q_heads, .params = *params};
    loci_error err;
    w.outs = w.heads * s->f.dim;
    w.count = w.outs + w.heads + s->f.segments;
    w.values = calloc(w.count, sizeof *w.values);
    assert_non_null(w.values);
    must(ops->stream_open(s->f.backend, &w.stream, &err), &err);
    must(ops->lookup_create(s->f.backend, &w.lookup, &err), &err);
    must(ops->alloc(s->f.backend, PLACES * (w.outs + w.heads + w.count) * sizeof(float), &w.memory,
                    &err),
         &err);
    return w;
}

static void close_walker(walker *w) {
    const loci_backend_ops *ops = w->s->f.backend->ops;
    ops->lookup_free(w->s->f.backend, w->lookup);
    ops->stream_close(w->s->f.backend, w->stream);
    ops->free(w->s->f.backend, w->memory);
    free(w->values);
}

static loci_ref at(const walker *w, uint32_t place, size_t floats) {
    size_t each = w->outs + w->heads + w->count;
    return loci_ref_at(w->memory, (place * each + floats) * sizeof(float));
}

/* Several rows: the same one, in another layer, of which only what they allocate and pin matters.
 */
static void enqueue(walker *w, uint32_t place, uint32_t rows) {
    const scene *s = w->s;
    const loci_backend_ops *ops = s->f.backend->ops;
    uint32_t width = s->f.q_heads * s->f.dim;
    loci_ref q = at(w, place, 0), steady = at(w, place, w->outs);
    loci_ref out = at(w, place, w->outs + w->heads), lse = at(w, place, 2 * w->outs + w->heads);
    loci_ref mass = at(w, place, 2 * (w->outs + w->heads));
    if (rows > 1) steady = (loci_ref){0};
    ops->lookup_begin(w->stream, w->lookup, &s->f.view, rows > 1, q, rows > 1 ? 0 : width, rows,
                      s->f.q_heads, 1.0f / sqrtf((float)s->f.dim), steady, &w->params);
    ops->score_nodes(w->stream, w->lookup);
    ops->score_codes(w->stream, w->lookup);
    if (rows > 1) return;
    ops->select(w->stream, w->lookup);
    ops->attend_sparse(w->stream, w->lookup, out, width, lse);
    ops->attribute(w->stream, w->lookup, lse, 0, mass);
    ops->lookup_stats(w->stream, w->lookup, &w->stats);
}

/* One row of the scene's queries; recorded where that is wanted. */
static void walk(walker *w, uint32_t place, uint32_t row, bool recorded) {
    const scene *s = w->s;
    const loci_backend_ops *ops = s->f.backend->ops;
    loci_error err = {0};
    memset(w->values, 0, w->count * sizeof(float));
    ops->upload(w->stream, at(w, place, 0), s->q + row * w->outs, w->outs * sizeof(float));
    ops->upload(w->stream, at(w, place, w->outs), s->steady + row * w->heads,
                w->heads * sizeof(float));
    ops->upload(w->stream, at(w, place, w->outs + w->heads), w->values, w->count * sizeof(float));
    bool done =
        recorded && ops->step_begin(w->stream, w->lookup, &s->f.view, 0, &place, sizeof place);
    do {
        if (!done) enqueue(w, place, 1);
        done = false;
    } while (recorded && !ops->step_end(w->stream, w->lookup, &w->stats));
    ops->download(w->stream, w->values, at(w, place, w->outs + w->heads), w->count * sizeof(float));
    must(ops->sync(w->stream, &err), &err);
}

static void same(const walker *a, const walker *b, const char *what, int turn) {
    for (size_t i = 0; i < a->count; i++)
        if (memcmp(&a->values[i], &b->values[i], sizeof(float)) != 0)
            fail_msg("seed %llu, %s, turn %d: value %zu of %zu is %.9g, one by one %.9g",
                     (unsigned long long)seed, what, turn, i, a->count, (double)a->values[i],
                     (double)b->values[i]);
    loci_lookup_stats x = a->stats, y = b->stats;
    assert_true(x.elapsed_ns < 1000000000u && y.elapsed_ns < 1000000000u);
    x.elapsed_ns = y.elapsed_ns = 0;
    if (memcmp(&x, &y, sizeof x) != 0)
        fail_msg("seed %llu, %s, turn %d: other figures", (unsigned long long)seed, what, turn);
}

static scene draw_scene(uint64_t *rng, int round) {
    setting c = random_setting(rng);
    c.tokens += 600;
    c.rows = 8;
    c.kv_int8 = round % 4 == 3;
    scene s = open_scene(c);
    if (round % 3 == 2) kill_some(&s, 2);
    return s;
}

static void test_as_one_by_one(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 1;
    for (int round = 0; round < 12; round++) {
        scene s = draw_scene(&rng, round);
        loci_select_params modes[] = {
            narrow(0.9f, 0),
            narrow(0.9f, 30),
            narrow(0.9f, 0),
            {.mode = LOCI_MODE_DENSE},
            {.mode = LOCI_MODE_SQUEEZED, .squeezed_threshold = {2e-4f, 2e-4f}}};
        static const char *const names[] = {"hierarchical", "budget", "tail", "dense", "squeezed"};
        modes[2].estimate_tail = true;
        for (size_t m = 0; m < sizeof modes / sizeof *modes; m++) {
            walker plain = open_walker(&s, &modes[m]), recorded = open_walker(&s, &modes[m]);
            uint64_t before = atomic_load(&cuda_of(&s)->steps_replayed);
            for (int turn = 0; turn < 7; turn++) {
                walk(&plain, 0, (uint32_t)turn, false);
                walk(&recorded, 0, (uint32_t)turn, true);
                same(&recorded, &plain, names[m], turn);
            }
            uint64_t replayed = atomic_load(&cuda_of(&s)->steps_replayed) - before;
            if (replayed != 5)
                fail_msg("seed %llu, %s: %u of 7 steps were replayed", (unsigned long long)seed,
                         names[m], (unsigned)replayed);
            close_walker(&plain);
            close_walker(&recorded);
        }
        close_scene(&s);
    }
}

/* Between steps: places in turn, more than are kept; look-ups of many rows; larger scratch; pairs
 * that go down, up and away. */
static void disturb(walker *w, walker *plain, int turn, uint64_t kv, uint64_t index) {
    const scene *s = w->s;
    const loci_backend_ops *ops = s->f.backend->ops;
    loci_cuda_pairs *pairs = cuda_of(s)->pairs;
    loci_error err = {0};
    if (turn % 8 == 3) enqueue(w, 0, 700);
    if (turn % 8 == 4) (void)loci_cuda_scratch(w->stream, ((size_t)turn + 1) << 20);
    if (turn % 8 == 5 || turn % 8 == 7) { /* then nobody has pinned the first layer */
        enqueue(w, 0, 2);
        enqueue(plain, 0, 2);
        must(ops->sync(plain->stream, &err), &err);
        must(ops->sync(w->stream, &err), &err);
    }
    if (turn % 8 == 5) {
        loci_cuda_pairs_limit(pairs, 3 * index + kv / 8, ROOM);
        loci_cuda_pairs_lower(pairs);
    }
    if (turn % 8 == 7) {
        loci_cuda_pairs_limit(pairs, ROOM, ROOM);
        while (loci_cuda_pairs_shrink(pairs, ROOM)) continue;
    }
    must(ops->sync(w->stream, &err), &err);
}

static void test_whatever_happens_between(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 3;
    for (int round = 0; round < 4; round++) {
        scene s = draw_scene(&rng, round);
        loci_select_params params = narrow(0.9f, 0);
        walker plain = open_walker(&s, &params), recorded = open_walker(&s, &params);
        loci_cuda_pairs_stats stats;
        walk(&plain, 0, 0, false);
        loci_cuda_pairs_stats_of(cuda_of(&s)->pairs, &stats);
        uint64_t kv = stats.kv_bytes, index = stats.bytes - kv;
        uint64_t before = atomic_load(&cuda_of(&s)->steps_replayed);
        for (int turn = 0; turn < 48; turn++) {
            uint32_t place = turn < 24 ? (uint32_t)turn / 4 % 2 : (uint32_t)turn / 5 % PLACES;
            walk(&plain, 0, (uint32_t)turn % 8, false);
            walk(&recorded, place, (uint32_t)turn % 8, true);
            same(&recorded, &plain, "disturbed", turn);
            disturb(&recorded, &plain, turn, kv, index);
        }
        assert_true(atomic_load(&cuda_of(&s)->steps_replayed) > before + 8);
        close_walker(&plain);
        close_walker(&recorded);
        close_scene(&s);
    }
}

/* --- Threads --------------------------------------------------------------------------------- */

typedef struct crowd {
    scene *s;
    const walker *expected; /* [8] by row */
    uint32_t number;
    bool differs;
} crowd;

static _Atomic bool over;

/* Records anew all the time: a look-up of its own for a few steps. */
static void *record_often(void *arg) {
    crowd *c = arg;
    loci_select_params params = narrow(0.9f, 0);
    for (uint32_t i = 0; i < 40; i++) {
        walker w = open_walker(c->s, &params);
        for (uint32_t turn = 0; turn < 4; turn++) {
            uint32_t row = (c->number + i + turn) % 8;
            walk(&w, 0, row, true);
            const walker *e = &c->expected[row];
            c->differs |= memcmp(w.values, e->values, w.count * sizeof(float)) != 0;
        }
        close_walker(&w);
    }
    return NULL;
}

/* Throws pairs out, which waits for the device, and allocates. */
static void *disturb_all(void *arg) {
    crowd *c = arg;
    loci_backend *backend = c->s->f.backend;
    loci_error err;
    while (!atomic_load(&over)) {
        loci_buffer *buffer = NULL;
        (void)loci_cuda_pairs_shrink(cuda_of(c->s)->pairs, 1);
        must(backend->ops->alloc(backend, 1 << 20, &buffer, &err), &err);
        backend->ops->free(backend, buffer);
        (void)loci_cuda_drain(cuda_of(c->s));
    }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 5;
    scene s = draw_scene(&rng, 0);
    loci_select_params params = narrow(0.9f, 0);
    walker expected[8];
    crowd crowds[5];
    pthread_t threads[5];
    for (uint32_t row = 0; row < 8; row++) {
        expected[row] = open_walker(&s, &params);
        walk(&expected[row], 0, row, false);
        s.f.backend->ops->lookup_free(s.f.backend, expected[row].lookup); /* which has pins */
        expected[row].lookup = NULL;
    }
    /* With room below rows would be cached, and such steps are not recorded. */
    loci_cuda_pairs_limit(cuda_of(&s)->pairs, ROOM, 0);
    uint64_t before = atomic_load(&cuda_of(&s)->steps_recorded);
    atomic_store(&over, false);
    for (uint32_t i = 0; i < 5; i++) {
        crowds[i] = (crowd){&s, expected, i, false};
        assert_int_equal(
            pthread_create(&threads[i], NULL, i == 4 ? disturb_all : record_often, &crowds[i]), 0);
    }
    for (uint32_t i = 0; i < 5; i++) {
        if (i == 4) atomic_store(&over, true);
        pthread_join(threads[i], NULL);
        assert_false(crowds[i].differs);
    }
    assert_true(atomic_load(&cuda_of(&s)->steps_recorded) > before);
    for (uint32_t row = 0; row < 8; row++) close_walker(&expected[row]);
    close_scene(&s);
}

int main(void) {
    seed = fresh_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_one_by_one),
        cmocka_unit_test(test_whatever_happens_between),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
