/* SPDX-License-Identifier: Apache-2.0
 *
 * See batch_scene.h.
 */
#include "batch_scene.h"

loci_backend *backend;
loci_model *model;
uint32_t vocab;

void ok(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), err->text);
}

void open_model(const char *isa, loci_dtype precision) {
    loci_backend_options options = {2, isa};
    loci_error err;
    ok(loci_backend_open(LOCI_TEST_BACKEND, &options, &backend, &err), &err);
    ok(loci_model_open(TINY, backend, precision, &model, &err), &err);
    vocab = loci_model_config_of(model)->vocab;
}

void close_model(void) {
    loci_model_close(model);
    loci_backend_close(backend);
}

bool wait_for(const worker *w, uint32_t waiting, const _Atomic bool *flag) {
    for (uint32_t ms = 0; ms < PATIENT_MS; ms++) {
        loci_batch_usage usage = {0};
        if (waiting > 0) loci_batch_usage_of(w->batch, &usage);
        if (flag ? atomic_load(flag) : usage.waiting >= waiting) return true;
        loci_sleep_ms(1);
    }
    return false;
}

/* Adds to the sequence's own attention what depends on its queries and its seed alone. */
loci_status reach(void *ctx, const loci_attend_call *call, loci_error *err) {
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

loci_status pass_ended(void *ctx, loci_status status, loci_error *err) {
    worker *w = ctx;
    w->attended++;
    w->passed = status;
    return w->refuse ? loci_fail(err, LOCI_E_IO, "a page could not be read") : status;
}

uint32_t choose_kind(void *const *ctx, const loci_attend_call *calls, uint32_t count) {
    uint32_t chosen = 0;
    for (uint32_t i = 0; i < count; i++) {
        const worker *first = ctx[0], *w = ctx[i];
        uint32_t layer = calls[i].retrieval_index % 2;
        chosen |= (uint32_t)(w->kind[layer] == first->kind[layer]) << i;
    }
    return chosen;
}

_Atomic uint32_t calls_together, reached_together;
loci_stream *_Atomic stream_together;

/* As if each were reached alone, but on one stream. */
static loci_status reach_together(void *const *ctx, const loci_attend_call *calls, uint32_t count,
                                  loci_error *err) {
    loci_status status = LOCI_OK;
    atomic_fetch_add(&calls_together, 1);
    atomic_fetch_add(&reached_together, count);
    atomic_store(&stream_together, calls[0].stream);
    for (uint32_t i = 0; i < count && status == LOCI_OK; i++) {
        assert_ptr_equal(calls[i].stream, calls[0].stream);
        assert_ptr_not_equal(calls[i].stream, loci_sequence_stream(((worker *)ctx[i])->sequence));
        assert_int_equal(calls[i].group, calls[0].group);
        status = reach(ctx[i], &calls[i], err);
    }
    return status;
}

static const loci_attend_together together_by_kind = {choose_kind, reach_together};

/* In the first retrieval layer with those of the same kind, in the second of the same later one. */
void go_together(worker *w, uint32_t kind, uint32_t later) {
    w->kind[0] = kind;
    w->kind[1] = later;
    loci_sequence_set_together(w->sequence, &together_by_kind);
}

void worker_open(worker *w, loci_batch *batch, uint64_t seed) {
    loci_error err;
    *w = (worker){.batch = batch, .seed = seed, .out = LOCI_BUF_INIT};
    ok(batch ? loci_batch_add(batch, &w->sequence, &err)
             : loci_sequence_open(model, TOKENS, &w->sequence, &err),
       &err);
    loci_sequence_set_attend(w->sequence, reach, pass_ended, w);
}

void worker_close(worker *w) {
    loci_sequence_close(w->sequence);
    loci_buf_fini(&w->out);
}

static uint32_t token_at(const worker *w, uint32_t i) {
    return (uint32_t)((w->seed * 31 + i * 2654435761u) % vocab);
}

/* Appends the next tokens, and keeps their logits. */
void append(worker *w, uint32_t count, uint32_t logits_rows) {
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

void *append_once(void *arg) {
    worker *w = arg;
    append(w, w->count, w->logits_rows);
    atomic_store(&w->done, true);
    return NULL;
}

void start(worker *w, void *(*run)(void *)) {
    assert_int_equal(pthread_create(&w->thread, NULL, run, w), 0);
}

void join(worker *w) {
    pthread_join(w->thread, NULL);
}

void same_out(const worker *a, const worker *b) {
    assert_int_equal(a->out.len, b->out.len);
    assert_memory_equal(a->out.data, b->out.data, a->out.len);
}

void scene_open(scene *s) {
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

void scene_run(scene *s) {
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

void scene_cancel(scene *s, uint32_t who, loci_cancel *cancel) {
    loci_cancel_init(cancel, 0);
    s->w[who].cancel = cancel;
    s->w[who % MEMBERS + 1].cancels = cancel;
    scene_run(s);
    for (uint32_t i = 0; i <= MEMBERS; i++)
        assert_int_equal(s->w[i].status, i == who ? LOCI_E_CANCELLED : LOCI_OK);
    assert_int_equal(atomic_load(&s->w[who].calls), 1);
}

void scene_check(scene *s) {
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
