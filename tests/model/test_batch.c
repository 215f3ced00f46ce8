/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences that share passes: the same bits as alone, whatever the company; errors and cancels
 * that stay with their sequence, or with the group that is reached together; steps that do not wait
 * for prompts.
 *
 * Where the order matters a sequence holds its batch from within its callback until the others wait
 * in the queue, which is then as the test wants it.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../attention/deferred.h"
#include "base/clock.h"
#include "base/rng.h"
#include "model/batch.h"

#ifndef LOCI_TEST_BACKEND
#define LOCI_TEST_BACKEND "cpu"
#define LOCI_TEST_CPU
#endif

#define TINY "tests/data/model/tiny-3heads"
#define TOKENS 512u
#define MEMBERS 8u
#define PATIENT_MS 20000u

static loci_backend *backend;
static loci_model *model;
static uint32_t vocab;

static void ok(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), err->text);
}

static void open_model(const char *isa, loci_dtype precision) {
    loci_backend_options options = {2, isa};
    loci_error err;
    ok(loci_backend_open(LOCI_TEST_BACKEND, &options, &backend, &err), &err);
    ok(loci_model_open(TINY, backend, precision, &model, &err), &err);
    vocab = loci_model_config_of(model)->vocab;
}

static void close_model(void) {
    loci_model_close(model);
    loci_backend_close(backend);
}

/* --- A sequence with a thread of its own --------------------------------------------------- */

typedef struct worker {
    loci_sequence *sequence;
    loci_batch *batch;
    uint64_t seed;
    pthread_t thread;
    /* Of the callback: */
    _Atomic uint32_t calls;
    uint32_t fail_in_call;         /* from 1; 0 = never */
    uint32_t stream_fails_in_call; /* the same, of what it has enqueued */
    bool refuse;                   /* at the pass's end */
    uint32_t attended;             /* passes that ended */
    loci_status passed;            /* what became of the last one */
    loci_cancel *cancels, *cancel; /* set in call 1; of this worker's appends */
    uint32_t hold_until_waiting;   /* in call 1, so many chunks in queues */
    _Atomic bool *hold_until;      /* in call 1 */
    uint32_t hold_ms;              /* in every call */
    uint32_t kind[2];              /* by retrieval layer: the same ones are reached together */
    /* One append: */
    uint32_t count, logits_rows, first_token;
    loci_status status;
    loci_error err;
    _Atomic bool done;
    loci_buf out; /* logits of all appends, and their statuses */
} worker;

static bool wait_for(const worker *w, uint32_t waiting, const _Atomic bool *flag) {
    for (uint32_t ms = 0; ms < PATIENT_MS; ms++) {
        loci_batch_usage usage = {0};
        if (waiting > 0) loci_batch_usage_of(w->batch, &usage);
        if (flag ? atomic_load(flag) : usage.waiting >= waiting) return true;
        loci_sleep_ms(1);
    }
    return false;
}

/* Adds to the sequence's own attention what depends on its queries and its seed alone. */
static loci_status reach(void *ctx, const loci_attend_call *call, loci_error *err) {
    worker *w = ctx;
    uint32_t number = atomic_fetch_add(&w->calls, 1) + 1;
    const loci_backend_ops *ops = backend->ops;
    size_t width = (size_t)call->q_heads * call->head_dim;
    float *q = malloc(call->rows * width * sizeof *q),
          *out = malloc(call->rows * width * sizeof *out);
    if (!q || !out) return LOCI_E_NOMEM;
    for (uint32_t r = 0; r < call->rows; r++) {
        loci_ref from = call->q, at = call->out;
        from.offset += r * call->q_stride * sizeof *q;
        at.offset += r * call->out_stride * sizeof *out;
        ops->download(call->stream, q + r * width, from, width * sizeof *q);
        ops->download(call->stream, out + r * width, at, width * sizeof *out);
    }
    loci_status status = ops->sync(call->stream, err);
    for (size_t i = 0; i < call->rows * width; i++)
        out[i] += 0.1f * q[i] + 0.001f * (float)(w->seed % 97);
    for (uint32_t r = 0; r < call->rows; r++) {
        loci_ref at = call->out;
        at.offset += r * call->out_stride * sizeof *out;
        ops->upload(call->stream, at, out + r * width, width * sizeof *out);
    }
    free(q);
    free(out);
    if (number == 1 && w->cancels) loci_cancel_request(w->cancels);
    if (number == 1 && w->hold_until_waiting && !wait_for(w, w->hold_until_waiting, NULL))
        return loci_fail(err, LOCI_E_TIMEOUT, "nobody came");
    if (number == 1 && w->hold_until && !wait_for(w, 0, w->hold_until))
        return loci_fail(err, LOCI_E_TIMEOUT, "the others were held up");
    if (w->hold_ms) loci_sleep_ms(w->hold_ms);
    if (number == w->stream_fails_in_call)
        ops->convert(call->stream, call->out, call->out_stride, LOCI_I8, call->out,
                     call->out_stride, call->rows, (uint32_t)width);
    if (number == w->fail_in_call)
        return loci_fail(err, LOCI_E_CORRUPT, "extent of seed %u is damaged", (unsigned)w->seed);
    return status;
}

static loci_status pass_ended(void *ctx, loci_status status, loci_error *err) {
    worker *w = ctx;
    w->attended++;
    w->passed = status;
    return w->refuse ? loci_fail(err, LOCI_E_IO, "a page could not be read") : status;
}

static uint32_t choose_kind(void *const *ctx, const loci_attend_call *calls, uint32_t count) {
    uint32_t chosen = 0;
    for (uint32_t i = 0; i < count; i++) {
        const worker *first = ctx[0], *w = ctx[i];
        uint32_t layer = calls[i].retrieval_index % 2;
        chosen |= (uint32_t)(w->kind[layer] == first->kind[layer]) << i;
    }
    return chosen;
}

static _Atomic uint32_t calls_together, reached_together;

/* As if each were reached alone, but on one stream. */
static loci_status reach_together(void *const *ctx, const loci_attend_call *calls, uint32_t count,
                                  loci_error *err) {
    loci_status status = LOCI_OK;
    atomic_fetch_add(&calls_together, 1);
    atomic_fetch_add(&reached_together, count);
    for (uint32_t i = 0; i < count && status == LOCI_OK; i++) {
        assert_ptr_equal(calls[i].stream, calls[0].stream);
        assert_ptr_not_equal(calls[i].stream,
                             loci_sequence_stream(((worker *)ctx[i])->sequence));
        assert_int_equal(calls[i].group, calls[0].group);
        status = reach(ctx[i], &calls[i], err);
    }
    return status;
}

static const loci_attend_together together_by_kind = {choose_kind, reach_together};

/* In the first retrieval layer with those of the same kind, in the second of the same later one. */
static void go_together(worker *w, uint32_t kind, uint32_t later) {
    w->kind[0] = kind;
    w->kind[1] = later;
    loci_sequence_set_together(w->sequence, &together_by_kind);
}

static void worker_open(worker *w, loci_batch *batch, uint64_t seed) {
    loci_error err;
    *w = (worker){.batch = batch, .seed = seed, .out = LOCI_BUF_INIT};
    ok(batch ? loci_batch_add(batch, &w->sequence, &err)
             : loci_sequence_open(model, TOKENS, &w->sequence, &err),
       &err);
    loci_sequence_set_attend(w->sequence, reach, pass_ended, w);
}

static void worker_close(worker *w) {
    loci_sequence_close(w->sequence);
    loci_buf_fini(&w->out);
}

static uint32_t token_at(const worker *w, uint32_t i) {
    return (uint32_t)((w->seed * 31 + i * 2654435761u) % vocab);
}

/* Appends the next tokens, and keeps their logits. */
static void append(worker *w, uint32_t count, uint32_t logits_rows) {
    uint32_t tokens[TOKENS], from = loci_sequence_length(w->sequence);
    for (uint32_t i = 0; i < count; i++) tokens[i] = token_at(w, from + i);
    w->err = (loci_error){0};
    w->status =
        loci_sequence_append(w->sequence, tokens, count, logits_rows, -1, w->cancel, &w->err);
    loci_buf_u32(&w->out, (uint32_t)w->status);
    if (w->status != LOCI_OK || logits_rows == 0) return;
    const float *logits = loci_sequence_logits(w->sequence);
    loci_buf_append(&w->out, logits, (size_t)logits_rows * vocab * sizeof *logits);
    uint32_t id = 0, banned[] = {3}, recent[] = {5, 9};
    float logprob = 0;
    loci_sample_params params = {0.8f, 0.95f, 1.1f, w->seed, from};
    ok(loci_sequence_sample(w->sequence, &params, banned, 1, recent, 2, &id, &logprob, &w->err),
       &w->err);
    loci_buf_u32(&w->out, id);
}

static void *append_once(void *arg) {
    worker *w = arg;
    append(w, w->count, w->logits_rows);
    atomic_store(&w->done, true);
    return NULL;
}

static void start(worker *w, void *(*run)(void *)) {
    assert_int_equal(pthread_create(&w->thread, NULL, run, w), 0);
}

static void join(worker *w) {
    pthread_join(w->thread, NULL);
}

static void same_out(const worker *a, const worker *b) {
    assert_int_equal(a->out.len, b->out.len);
    assert_memory_equal(a->out.data, b->out.data, a->out.len);
}

/* --- The same bits ---------------------------------------------------------------------------- */

/* Prefills of all lengths and runs of decoding, as the seed has it. */
static void *talk(void *arg) {
    worker *w = arg;
    uint64_t random = w->seed;
    static const uint32_t lengths[] = {1, 2, 7, 8, 9, 20, 31, 32, 33, 64, 100, 255, 256, 257, 300};
    while (loci_sequence_room(w->sequence) > 0) {
        uint32_t room = loci_sequence_room(w->sequence);
        uint32_t count = lengths[loci_rng_next(&random) % 15], rows = 1;
        if (count > room) count = room;
        uint32_t kind = (uint32_t)(loci_rng_next(&random) % 4);
        if (kind == 0) rows = 0;
        if (kind == 1) rows = count < 12 ? count : 12;
        append(w, count, rows);
        uint32_t steps = (uint32_t)(loci_rng_next(&random) % 24);
        loci_sequence_decoding(w->sequence, true);
        for (; steps > 0 && loci_sequence_room(w->sequence) > 0; steps--) append(w, 1, 1);
        loci_sequence_decoding(w->sequence, false);
    }
    return NULL;
}

static void check_company(uint64_t seed, bool grouped) {
    worker alone, together[MEMBERS];
    loci_batch *batch;
    loci_batch_usage usage;
    loci_error err;
    ok(loci_batch_open(model, MEMBERS + 1, TOKENS, &batch, &err), &err);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        worker_open(&together[i], batch, seed + i);
        if (grouped && i % 4 != 3) go_together(&together[i], i % 2, i % 3);
    }
    atomic_store(&calls_together, 0);
    /* One of them without a corpus, so that callbacks and none are mixed. */
    loci_sequence_set_attend(together[MEMBERS - 1].sequence, NULL, NULL, NULL);
    for (uint32_t i = 0; i < MEMBERS; i++) start(&together[i], talk);
    for (uint32_t i = 0; i < MEMBERS; i++) join(&together[i]);
    loci_batch_usage_of(batch, &usage);
    assert_true(usage.passes > 0 && usage.chunks > usage.passes);
    assert_int_equal(usage.waiting, 0);
    assert_true(grouped == (atomic_load(&calls_together) > 0));
    for (uint32_t i = 0; i < MEMBERS; i++) {
        worker_open(&alone, NULL, seed + i);
        if (i == MEMBERS - 1) loci_sequence_set_attend(alone.sequence, NULL, NULL, NULL);
        talk(&alone);
        same_out(&alone, &together[i]);
        worker_close(&alone);
        worker_close(&together[i]);
    }
    loci_batch_close(batch);
}

static void test_company_changes_no_bit(void **state) {
    (void)state;
#ifdef LOCI_TEST_CPU
    static const char *const isas[] = {NULL, "portable"};
#else
    static const char *const isas[] = {NULL};
#endif
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        for (int precision = LOCI_F32; precision <= LOCI_BF16; precision++) {
            open_model(isas[i], (loci_dtype)precision);
            for (uint64_t seed = 1000; seed < 5000; seed += 1000)
                check_company(seed, seed % 2000 == 0);
            close_model();
        }
}

#ifdef LOCI_TEST_CPU
/* The queries take the place of the output, whenever that runs. */
static loci_status reach_later(void *ctx, const loci_attend_call *call, loci_error *err) {
    worker *w = ctx;
    size_t width = (size_t)call->q_heads * call->head_dim;
    uint32_t number = atomic_fetch_add(&w->calls, 1) + 1;
    if (number == 1 && w->hold_until_waiting && !wait_for(w, w->hold_until_waiting, NULL))
        return loci_fail(err, LOCI_E_TIMEOUT, "nobody came");
    for (uint32_t r = 0; r < call->rows; r++) {
        loci_ref from = call->q, to = call->out;
        from.offset += r * call->q_stride * sizeof(float);
        to.offset += r * call->out_stride * sizeof(float);
        backend->ops->copy(call->stream, to, from, width * sizeof(float));
    }
    return LOCI_OK;
}

static loci_status reach_later_together(void *const *ctx, const loci_attend_call *calls,
                                        uint32_t count, loci_error *err) {
    atomic_fetch_add(&calls_together, 1);
    for (uint32_t i = 0; i < count; i++) LOCI_TRY(reach_later(ctx[i], &calls[i], err));
    return LOCI_OK;
}

static const loci_attend_together later_by_kind = {choose_kind, reach_later_together};

static void *decode_later(void *arg) {
    worker *w = arg;
    loci_sequence_decoding(w->sequence, true);
    for (int i = 0; i < 24; i++) append(w, 1, 1);
    loci_sequence_decoding(w->sequence, false);
    return NULL;
}

static void open_later(worker *w, loci_batch *batch, uint64_t seed) {
    worker_open(w, batch, seed);
    loci_sequence_set_attend(w->sequence, reach_later, pass_ended, w);
    append(w, 20 + (uint32_t)seed % 7, 1);
    atomic_store(&w->calls, 0);
}

/* Where operations run later, streams of a pass wait for one another. */
static void check_order(bool grouped) {
    worker alone[4], together[4];
    loci_batch *batch;
    loci_batch_usage usage;
    loci_error err;
    open_model(NULL, LOCI_F32);
    for (uint32_t i = 0; i < 4; i++) {
        open_later(&alone[i], NULL, 700 + i);
        decode_later(&alone[i]);
        loci_sequence_close(alone[i].sequence);
    }
    loci_model_close(model);
    loci_backend *now = backend;
    ok(deferred_open(now, &backend, &err), &err);
    ok(loci_model_open(TINY, backend, LOCI_F32, &model, &err), &err);
    ok(loci_batch_open(model, 4, TOKENS, &batch, &err), &err);
    for (uint32_t i = 0; i < 4; i++) open_later(&together[i], batch, 700 + i);
    for (uint32_t i = 1; i < 4 && grouped; i++) {
        together[i].kind[0] = i % 2;
        loci_sequence_set_together(together[i].sequence, &later_by_kind);
    }
    atomic_store(&calls_together, 0);
    together[0].hold_until_waiting = 3; /* who share the next pass */
    for (uint32_t i = 0; i < 4; i++) {
        start(&together[i], decode_later);
        while (i == 0 && atomic_load(&together[0].calls) == 0) loci_sleep_ms(1);
    }
    for (uint32_t i = 0; i < 4; i++) join(&together[i]);
    loci_batch_usage_of(batch, &usage);
    assert_true(usage.chunks > usage.passes);
    assert_true(grouped == (atomic_load(&calls_together) > 0));
    for (uint32_t i = 0; i < 4; i++) {
        same_out(&alone[i], &together[i]);
        loci_buf_fini(&alone[i].out);
        worker_close(&together[i]);
    }
    loci_batch_close(batch);
    loci_model_close(model);
    deferred_close(backend);
    loci_backend_close(now);
}

static void test_streams_of_a_pass_are_in_order(void **state) {
    (void)state;
    check_order(false);
    check_order(true);
}
#endif

/* --- A queue as the test wants it ------------------------------------------------------------ */

/* The first holds the batch with one row; the others queue up behind it in order and make the next
 * pass, led by the second. */
typedef struct scene {
    loci_batch *batch;
    worker w[MEMBERS + 1];
} scene;

static void scene_open(scene *s) {
    loci_error err;
    open_model(NULL, LOCI_F32);
    ok(loci_batch_open(model, MEMBERS + 1, TOKENS, &s->batch, &err), &err);
    for (uint32_t i = 0; i <= MEMBERS; i++) {
        worker_open(&s->w[i], s->batch, 500 + i);
        append(&s->w[i], 40 + i, 1);
        s->w[i].count = s->w[i].logits_rows = 1;
        atomic_store(&s->w[i].calls, 0);
    }
}

static void scene_run(scene *s) {
    s->w[0].hold_until_waiting = MEMBERS;
    for (uint32_t i = 0; i <= MEMBERS; i++) {
        start(&s->w[i], append_once);
        if (i == 0)
            while (atomic_load(&s->w[0].calls) == 0) loci_sleep_ms(1);
        else if (i < MEMBERS)
            assert_true(wait_for(&s->w[i], i, NULL));
    }
    for (uint32_t i = 0; i <= MEMBERS; i++) join(&s->w[i]);
}

/* Those that ended well are as if they had been alone; and so is everybody's next step. */
static void scene_check(scene *s) {
    for (uint32_t i = 0; i <= MEMBERS; i++) {
        worker alone, *w = &s->w[i];
        uint32_t length = loci_sequence_length(w->sequence);
        assert_int_equal(length, 40 + i + (w->status == LOCI_OK));
        assert_int_equal(w->attended, 2); /* also of passes that failed */
        w->cancel = NULL;
        w->refuse = false;
        w->fail_in_call = w->stream_fails_in_call = 0;
        bool good = w->status == LOCI_OK;
        append(w, 1, 1);
        worker_open(&alone, NULL, w->seed);
        append(&alone, 40 + i, 1);
        append(&alone, 1, 1);
        if (good) {
            append(&alone, 1, 1);
            same_out(&alone, w);
        } else { /* the status of what failed stands before the last logits */
            size_t last = ((size_t)vocab + 2) * sizeof(float);
            assert_memory_equal(alone.out.data + alone.out.len - last,
                                w->out.data + w->out.len - last, last);
        }
        worker_close(&alone);
        worker_close(w);
    }
    loci_batch_close(s->batch);
    close_model();
}

static void test_who_waits_shares_the_next_pass(void **state) {
    (void)state;
    scene s;
    loci_batch_usage before, after;
    scene_open(&s);
    loci_batch_usage_of(s.batch, &before);
    scene_run(&s);
    loci_batch_usage_of(s.batch, &after);
    assert_int_equal(after.passes - before.passes, 2);
    assert_int_equal(after.chunks - before.chunks, MEMBERS + 1);
    scene_check(&s);
}

/* In the first and in the second retrieval layer; the leader of the pass, and others. */
static void test_a_failure_is_one_questions_own(void **state) {
    (void)state;
    for (uint32_t call = 1; call <= 2; call++)
        for (uint32_t who = 1; who <= MEMBERS; who += 3) {
            scene s;
            char text[64];
            scene_open(&s);
            s.w[who].fail_in_call = call;
            scene_run(&s);
            snprintf(text, sizeof text, "extent of seed %u is damaged", (unsigned)s.w[who].seed);
            for (uint32_t i = 0; i <= MEMBERS; i++)
                assert_int_equal(s.w[i].status, i == who ? LOCI_E_CORRUPT : LOCI_OK);
            assert_string_equal(s.w[who].err.text, text);
            assert_int_equal(atomic_load(&s.w[who].calls), call);
            scene_check(&s);
        }
}

/* Of what a member has enqueued, and what it finds at the pass's end. */
static void test_a_late_failure_is_one_questions_own(void **state) {
    (void)state;
    for (uint32_t call = 0; call <= 2; call++)
        for (uint32_t who = 1; who <= MEMBERS; who += 3) {
            scene s;
            scene_open(&s);
            s.w[who].stream_fails_in_call = call;
            s.w[who].refuse = call == 0;
            scene_run(&s);
            loci_status failure = call == 0 ? LOCI_E_IO : LOCI_E_UNSUPPORTED;
            for (uint32_t i = 0; i <= MEMBERS; i++)
                assert_int_equal(s.w[i].status, i == who ? failure : LOCI_OK);
            assert_int_equal(s.w[who].passed, call == 0 ? LOCI_OK : LOCI_E_UNSUPPORTED);
            assert_int_equal(atomic_load(&s.w[who].calls), 2);
            scene_check(&s);
        }
}

/* --- Groups ------------------------------------------------------------------------------------
 */

/* All but the first of the scene are in its second pass: 1, 4, 7 are of one kind, 2, 5, 8 of
 * another, and 3 and 6 in the second layer only. */
static uint32_t kind_of(uint32_t i, uint32_t layer) {
    return i % 3 > 0 ? i % 3 : layer == 1 ? 3 : 10 + i;
}

static void group_scene(scene *s) {
    scene_open(s);
    for (uint32_t i = 1; i <= MEMBERS; i++) go_together(&s->w[i], kind_of(i, 0), kind_of(i, 1));
    atomic_store(&calls_together, 0);
    atomic_store(&reached_together, 0);
}

static void test_groups_are_reached_by_one_call(void **state) {
    (void)state;
    scene s;
    group_scene(&s);
    scene_run(&s);
    for (uint32_t i = 0; i <= MEMBERS; i++) ok(s.w[i].status, &s.w[i].err);
    assert_int_equal(atomic_load(&calls_together), 2 + 3);
    assert_int_equal(atomic_load(&reached_together), 6 + 8);
    scene_check(&s);
}

/* What fails in a layer, at once or later, fails for those that were together there. */
static void test_a_failure_is_its_groups_own(void **state) {
    (void)state;
    for (uint32_t later = 0; later < 2; later++)
        for (uint32_t call = 1; call <= 2; call++)
            for (uint32_t who = 1; who <= MEMBERS; who += 1) {
                scene s;
                group_scene(&s);
                *(later ? &s.w[who].stream_fails_in_call : &s.w[who].fail_in_call) = call;
                scene_run(&s);
                loci_status failure = later ? LOCI_E_UNSUPPORTED : LOCI_E_CORRUPT;
                for (uint32_t i = 0; i <= MEMBERS; i++) {
                    bool with = i > 0 && kind_of(i, call - 1) == kind_of(who, call - 1);
                    assert_int_equal(s.w[i].status, with ? failure : LOCI_OK);
                    if (!with) continue;
                    assert_int_equal(s.w[i].passed, failure);
                    assert_string_equal(s.w[i].err.text, s.w[who].err.text);
                }
                scene_check(&s);
            }
}

/* A member is cancelled between the layers: its group goes on without it. */
static void test_a_cancel_leaves_its_group(void **state) {
    (void)state;
    for (uint32_t who = 1; who <= MEMBERS; who++) {
        scene s;
        loci_cancel cancel;
        loci_cancel_init(&cancel, 0);
        group_scene(&s);
        s.w[who].cancel = &cancel;
        s.w[who % MEMBERS + 1].cancels = &cancel;
        scene_run(&s);
        for (uint32_t i = 0; i <= MEMBERS; i++)
            assert_int_equal(s.w[i].status, i == who ? LOCI_E_CANCELLED : LOCI_OK);
        assert_int_equal(atomic_load(&s.w[who].calls), 1);
        bool pair = who % 3 == 0; /* the other one is alone then */
        assert_int_equal(atomic_load(&calls_together), pair ? 2 + 2 : 2 + 3);
        assert_int_equal(atomic_load(&reached_together), pair ? 6 + 6 : 6 + 7);
        scene_check(&s);
    }
}

/* Sets change from layer to layer, more than there are groups: the last ones go alone. */
static void test_too_many_groups(void **state) {
    (void)state;
    scene s;
    scene_open(&s);
    for (uint32_t i = 1; i <= MEMBERS; i++) go_together(&s.w[i], i / 2, (i + 1) / 2);
    atomic_store(&calls_together, 0);
    scene_run(&s);
    for (uint32_t i = 0; i <= MEMBERS; i++) ok(s.w[i].status, &s.w[i].err);
    assert_int_equal(atomic_load(&calls_together), LOCI_ATTEND_GROUPS);
    scene_check(&s);
}

/* A neighbour in the pass asks for it, in the first retrieval layer. */
static void test_a_cancel_is_one_questions_own(void **state) {
    (void)state;
    for (uint32_t who = 1; who <= MEMBERS; who += 3) {
        scene s;
        loci_cancel cancel;
        loci_cancel_init(&cancel, 0);
        scene_open(&s);
        s.w[who].cancel = &cancel;
        s.w[who % MEMBERS + 1].cancels = &cancel;
        scene_run(&s);
        for (uint32_t i = 0; i <= MEMBERS; i++)
            assert_int_equal(s.w[i].status, i == who ? LOCI_E_CANCELLED : LOCI_OK);
        assert_int_equal(atomic_load(&s.w[who].calls), 1); /* not in the second layer any more */
        assert_non_null(strstr(s.w[who].err.text, "was stopped"));
        scene_check(&s);
    }
}

static void test_a_pass_that_nobody_wants_stops(void **state) {
    (void)state;
    scene s;
    loci_cancel cancel;
    loci_cancel_init(&cancel, 0);
    scene_open(&s);
    for (uint32_t i = 1; i <= MEMBERS; i++) s.w[i].cancel = &cancel;
    s.w[5].cancels = &cancel;
    scene_run(&s);
    for (uint32_t i = 1; i <= MEMBERS; i++) {
        assert_int_equal(s.w[i].status, LOCI_E_CANCELLED);
        assert_int_equal(atomic_load(&s.w[i].calls), 1);
    }
    scene_check(&s);
}

/* Cancelled in the queue: the pass that comes goes on without them. */
static void test_a_cancel_in_the_queue(void **state) {
    (void)state;
    scene s;
    loci_cancel cancel;
    loci_batch_usage before, after;
    loci_cancel_init(&cancel, 0);
    scene_open(&s);
    for (uint32_t i = 3; i <= MEMBERS; i++) s.w[i].cancel = &cancel;
    s.w[1].cancel = &cancel;
    s.w[0].cancels = NULL;
    loci_batch_usage_of(s.batch, &before);
    loci_cancel_request(&cancel);
    scene_run(&s);
    loci_batch_usage_of(s.batch, &after);
    for (uint32_t i = 0; i <= MEMBERS; i++) {
        bool lives = i == 0 || i == 2;
        assert_int_equal(s.w[i].status, lives ? LOCI_OK : LOCI_E_CANCELLED);
        assert_int_equal(atomic_load(&s.w[i].calls), lives ? 2 : 0);
    }
    assert_int_equal(after.chunks - before.chunks, 3); /* who leads takes part */
    scene_check(&s);
}

/* Behind a pass that has no room left: told when that pass begins, not when its turn comes. */
static void test_a_cancel_behind_a_full_pass(void **state) {
    (void)state;
    loci_batch *batch;
    loci_error err;
    loci_cancel cancel;
    worker w[4]; /* who runs, a short prompt, a step, a cancelled step */
    open_model(NULL, LOCI_F32);
    ok(loci_batch_open(model, 4, TOKENS, &batch, &err), &err);
    loci_cancel_init(&cancel, 0);
    loci_cancel_request(&cancel);
    for (uint32_t i = 0; i < 4; i++) {
        worker_open(&w[i], batch, i);
        w[i].count = i == 1 ? LOCI_GEMM_FEW_ROWS : 1;
        w[i].logits_rows = 1;
    }
    w[0].hold_until_waiting = 3;
    w[1].hold_until = &w[3].done; /* within its pass */
    w[3].cancel = &cancel;
    for (uint32_t i = 0; i < 4; i++) {
        start(&w[i], append_once);
        if (i == 0)
            while (atomic_load(&w[0].calls) == 0) loci_sleep_ms(1);
        else if (i < 3)
            assert_true(wait_for(&w[0], i, NULL)); /* in this order */
    }
    for (uint32_t i = 0; i < 4; i++) join(&w[i]);
    for (uint32_t i = 0; i < 3; i++) ok(w[i].status, &w[i].err);
    assert_int_equal(w[3].status, LOCI_E_CANCELLED);
    assert_int_equal(atomic_load(&w[3].calls), 0);
    for (uint32_t i = 0; i < 4; i++) worker_close(&w[i]);
    loci_batch_close(batch);
    close_model();
}

/* --- Prompts, chunks ---------------------------------------------------------------------------
 */

/* A prefill stands still in its first chunk until a step of decoding and a short question, which
 * came later, are through. */
static void test_a_long_prefill_holds_up_nobody(void **state) {
    (void)state;
    loci_batch *batch;
    loci_error err;
    worker longest, step, question;
    open_model(NULL, LOCI_F32);
    ok(loci_batch_open(model, MEMBERS + 1, TOKENS, &batch, &err), &err);
    worker_open(&longest, batch, 1);
    worker_open(&step, batch, 2);
    worker_open(&question, batch, 3);
    append(&step, 20, 1);
    longest.count = 400;
    longest.hold_until = &question.done;
    step.count = step.logits_rows = question.logits_rows = 1;
    question.count = 12;
    start(&longest, append_once);
    while (atomic_load(&longest.calls) == 0) loci_sleep_ms(1);
    start(&step, append_once);
    join(&step);
    start(&question, append_once);
    join(&question);
    join(&longest);
    ok(longest.status, &longest.err);
    ok(step.status, &step.err);
    ok(question.status, &question.err);
    worker_close(&longest);
    worker_close(&step);
    worker_close(&question);
    loci_batch_close(batch);
    close_model();
}

/* A cancel in the first of two chunks ends the append there, in a batch and without one; the
 * sequence goes on from its last whole chunk. */
static void test_a_cancel_takes_effect_within_a_chunk(void **state) {
    (void)state;
    open_model(NULL, LOCI_F32);
    for (int batched = 0; batched < 2; batched++)
        for (int late = 0; late < 2; late++) {
            loci_batch *batch = NULL;
            loci_error err;
            loci_cancel cancel;
            worker w;
            loci_cancel_init(&cancel, 0);
            if (batched) ok(loci_batch_open(model, MEMBERS + 1, TOKENS, &batch, &err), &err);
            worker_open(&w, batch, 4);
            if (late) append(&w, 256, 0); /* so that it comes in the second chunk */
            atomic_store(&w.calls, 0);
            w.cancel = w.cancels = &cancel;
            append(&w, 512 - 256 * (uint32_t)late, 0);
            assert_int_equal(w.status, LOCI_E_CANCELLED);
            assert_int_equal(atomic_load(&w.calls), 1);
            assert_int_equal(loci_sequence_length(w.sequence), late ? 256 : 0);
            w.cancel = w.cancels = NULL;
            append(&w, 10, 1);
            ok(w.status, &w.err);
            worker_close(&w);
            loci_batch_close(batch);
        }
    close_model();
}

/* --- Decoding -----------------------------------------------------------------------------------
 */

typedef struct pair {
    worker w;
    uint32_t steps, late_ms;
} pair;

static void *decode(void *arg) {
    pair *p = arg;
    loci_sequence_decoding(p->w.sequence, true);
    for (uint32_t i = 0; i < p->steps; i++) {
        append(&p->w, 1, 1);
        if (i + 1 < p->steps && p->late_ms) loci_sleep_ms(p->late_ms);
    }
    loci_sequence_decoding(p->w.sequence, false);
    return NULL;
}

/* Passes of about a second each: who is 10 ms late is waited for; who comes back after five seconds
 * is not, for longer than an eighth of one. */
static void test_decoding_stays_together(void **state) {
    (void)state;
    for (int lost = 0; lost < 2; lost++) {
        loci_batch *batch;
        loci_batch_usage usage;
        loci_error err;
        pair p[2] = {{.steps = 3}, {.steps = lost ? 2 : 3, .late_ms = lost ? 5000 : 10}};
        open_model(NULL, LOCI_F32);
        ok(loci_batch_open(model, MEMBERS + 1, TOKENS, &batch, &err), &err);
        for (int i = 0; i < 2; i++) {
            worker_open(&p[i].w, batch, (uint64_t)i);
            p[i].w.hold_ms = 500; /* in two layers */
        }
        p[0].w.hold_until_waiting = 1; /* the other meets it in the second pass */
        start(&p[0].w, decode);
        while (atomic_load(&p[0].w.calls) == 0) loci_sleep_ms(1);
        start(&p[1].w, decode);
        uint64_t begun = loci_now_ns();
        join(&p[0].w);
        double seconds = (double)(loci_now_ns() - begun) / 1e9;
        join(&p[1].w);
        loci_batch_usage_of(batch, &usage);
        if (!lost) assert_int_equal(usage.chunks, 6);
        /* The first alone; then both, both, and the other alone. */
        if (!lost) assert_true(usage.passes <= 4);
        if (lost) assert_true(seconds < 5.5);
        for (int i = 0; i < 2; i++) worker_close(&p[i].w);
        loci_batch_close(batch);
        close_model();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_company_changes_no_bit),
#ifdef LOCI_TEST_CPU
        cmocka_unit_test(test_streams_of_a_pass_are_in_order),
#endif
        cmocka_unit_test(test_who_waits_shares_the_next_pass),
        cmocka_unit_test(test_a_failure_is_one_questions_own),
        cmocka_unit_test(test_a_late_failure_is_one_questions_own),
        cmocka_unit_test(test_groups_are_reached_by_one_call),
        cmocka_unit_test(test_a_failure_is_its_groups_own),
        cmocka_unit_test(test_a_cancel_leaves_its_group),
        cmocka_unit_test(test_too_many_groups),
        cmocka_unit_test(test_a_cancel_is_one_questions_own),
        cmocka_unit_test(test_a_pass_that_nobody_wants_stops),
        cmocka_unit_test(test_a_cancel_in_the_queue),
        cmocka_unit_test(test_a_cancel_behind_a_full_pass),
        cmocka_unit_test(test_a_long_prefill_holds_up_nobody),
        cmocka_unit_test(test_a_cancel_takes_effect_within_a_chunk),
        cmocka_unit_test(test_decoding_stays_together),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
