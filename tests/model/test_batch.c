/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences that share passes: the same bits as alone, whatever the company; errors and cancels
 * that stay with their sequence; steps that do not wait for prompts.
 *
 * Where the order matters a sequence holds its batch from within its callback until the others wait
 * in the queue, which is then as the test wants it.
 */
#include "../attention/deferred.h"
#include "batch_scene.h"

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

/* A neighbour in the pass asks for it, in the first retrieval layer. */
static void test_a_cancel_is_one_questions_own(void **state) {
    (void)state;
    for (uint32_t who = 1; who <= MEMBERS; who += 3) {
        scene s;
        loci_cancel cancel;
        scene_open(&s);
        scene_cancel(&s, who, &cancel);
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
