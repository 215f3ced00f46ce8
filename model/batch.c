/* SPDX-License-Identifier: Apache-2.0
 *
 * Who shares a pass with whom; see batch.h.
 *
 * A queue of chunks, first come first served, and at most one pass that runs. The thread of the
 * first chunk in the queue leads the next pass; it takes those behind it as far as rows allow. All
 * is under one lock, which nobody holds while a pass or a callback runs; each thread sleeps on the
 * condition of its own sequence.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "model/sequence.h"

#define PATIENCE 8u /* decoding members are waited for at most such a part of the last pass */

struct loci_batch {
    loci_model *model;
    loci_stream *stream;
    loci_stream *group_stream[LOCI_ATTEND_GROUPS]; /* opened when first used */
    loci_buffer *cache, *logits;
    uint32_t members, added, tokens_max, logits_rows;
    pthread_mutex_t lock;
    bool running; /* a pass */
    loci_sequence *first, *last;
    uint64_t number; /* of the last pass, from 1 */
    uint32_t away;   /* decoding members of the last pass that are not back yet */
    uint64_t patience_ends_ns;
    loci_batch_usage usage;
};

loci_status loci_batch_open(loci_model *model, uint32_t members, uint32_t tokens_max,
                            loci_batch **out, loci_error *err) {
    *out = NULL;
    const loci_model_config *c = &model->config;
    const loci_backend_ops *ops = model->backend->ops;
    loci_batch *batch = calloc(1, sizeof *batch);
    if (!batch) return loci_fail(err, LOCI_E_NOMEM, "no memory for a batch");
    batch->model = model;
    batch->members = members;
    batch->tokens_max = tokens_max;
    batch->logits_rows = members < LOCI_GEMM_FEW_ROWS ? members : LOCI_GEMM_FEW_ROWS;
    pthread_mutex_init(&batch->lock, NULL);
    size_t rows = (size_t)members * tokens_max;
    size_t cache_bytes = c->layers * rows * loci_cache_width(c) * sizeof(float);
    size_t logits_bytes = (size_t)batch->logits_rows * c->vocab * sizeof(float);
    loci_status status = LOCI_OK;
    if (rows > INT32_MAX)
        status = loci_fail(err, LOCI_E_INVAL, "%u sequences of %u tokens are too many", members,
                           tokens_max);
    if (status == LOCI_OK) status = ops->stream_open(model->backend, &batch->stream, err);
    if (status == LOCI_OK) status = ops->alloc(model->backend, cache_bytes, &batch->cache, err);
    if (status == LOCI_OK) status = ops->alloc(model->backend, logits_bytes, &batch->logits, err);
    if (status != LOCI_OK) {
        loci_batch_close(batch);
        return status;
    }
    *out = batch;
    return LOCI_OK;
}

void loci_batch_close(loci_batch *batch) {
    if (!batch) return;
    loci_backend *backend = batch->model->backend;
    backend->ops->stream_close(backend, batch->stream);
    for (uint32_t g = 0; g < LOCI_ATTEND_GROUPS; g++)
        if (batch->group_stream[g]) backend->ops->stream_close(backend, batch->group_stream[g]);
    backend->ops->free(backend, batch->cache);
    backend->ops->free(backend, batch->logits);
    pthread_mutex_destroy(&batch->lock);
    free(batch);
}

loci_status loci_batch_add(loci_batch *batch, loci_sequence **out, loci_error *err) {
    LOCI_ASSERT(batch->added < batch->members);
    uint32_t rows = batch->members * batch->tokens_max, row = batch->added * batch->tokens_max;
    LOCI_TRY(
        loci_sequence_make(batch->model, batch->tokens_max, batch->cache, rows, row, out, err));
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&(*out)->turn, &monotonic);
    pthread_condattr_destroy(&monotonic);
    (*out)->batch = batch;
    batch->added++;
    return LOCI_OK;
}

void loci_batch_usage_of(loci_batch *batch, loci_batch_usage *out) {
    pthread_mutex_lock(&batch->lock);
    *out = batch->usage;
    pthread_mutex_unlock(&batch->lock);
}

loci_stream *loci_batch_stream(const loci_batch *batch) {
    return batch->stream;
}

loci_stream *loci_batch_group_stream(loci_batch *batch, uint32_t group) {
    loci_backend *backend = batch->model->backend;
    loci_stream **stream = &batch->group_stream[group];
    if (!*stream && backend->ops->stream_open(backend, stream, NULL) != LOCI_OK) *stream = NULL;
    return *stream;
}

loci_ref loci_batch_logits(const loci_batch *batch, uint32_t *rows) {
    *rows = batch->logits_rows;
    return loci_ref_at(batch->logits, 0);
}

/* --- Decoding members: who is waited for ------------------------------------------------------ */

static void wake_first(loci_batch *batch) {
    if (batch->first && !batch->running) pthread_cond_signal(&batch->first->turn);
}

static void come_back(loci_sequence *sequence) {
    loci_batch *batch = sequence->batch;
    if (sequence->away && sequence->away == batch->number && --batch->away == 0) wake_first(batch);
    sequence->away = 0;
}

void loci_sequence_decoding(loci_sequence *sequence, bool decoding) {
    loci_batch *batch = sequence->batch;
    if (!batch) return;
    pthread_mutex_lock(&batch->lock);
    sequence->decoding = decoding;
    if (!decoding) come_back(sequence);
    pthread_mutex_unlock(&batch->lock);
}

void loci_batch_leave(loci_sequence *sequence) {
    if (!sequence->batch) return;
    loci_sequence_decoding(sequence, false);
    pthread_cond_destroy(&sequence->turn);
    sequence->batch = NULL;
}

/* --- A pass ----------------------------------------------------------------------------------- */

static void end_step(loci_sequence *sequence) {
    sequence->step.state = LOCI_STEP_DONE;
    pthread_cond_signal(&sequence->turn);
}

static void add_member(loci_pass *pass, loci_sequence *sequence) {
    LOCI_ASSERT(pass->count < LOCI_PASS_MEMBERS);
    sequence->step.state = LOCI_STEP_RUNNING;
    pass->member[pass->count++] = sequence;
    pass->rows += sequence->step.rows;
}

/* The first of the queue and those behind it, in order. Who was cancelled while waiting need not
 * wait on, wherever it stands. */
static void gather(loci_batch *batch, loci_pass *pass) {
    uint32_t room = batch->first->scratch.rows;
    uint32_t most = room < LOCI_GEMM_FEW_ROWS ? room : LOCI_GEMM_FEW_ROWS;
    bool full = false;
    batch->last = NULL;
    for (loci_sequence **at = &batch->first; *at;) {
        loci_sequence *next = *at;
        loci_status cancelled = LOCI_OK; /* of the leader's own the pass takes care */
        if (pass->count > 0) {
            cancelled = loci_cancel_check(next->step.cancel);
            full = full || (cancelled == LOCI_OK && next->step.rows > most - pass->rows);
        }
        if (cancelled == LOCI_OK && full) {
            batch->last = next;
            at = &next->next;
            continue;
        }
        *at = next->next;
        next->next = NULL;
        batch->usage.waiting--;
        if (cancelled == LOCI_OK) {
            add_member(pass, next);
            continue;
        }
        next->step.status =
            loci_fail(&next->step.error, cancelled, "%s before the forward pass began",
                      loci_status_text(cancelled));
        end_step(next);
    }
}

/* Runs the pass that this thread's sequence leads, the first of the queue. The lock is held. */
static void lead(loci_batch *batch) {
    loci_pass pass = {.batch = batch};
    gather(batch, &pass);
    batch->running = true;
    batch->number++;
    batch->away = 0;
    pthread_mutex_unlock(&batch->lock);
    uint64_t begun = loci_now_ns();
    loci_pass_run(&pass);
    uint64_t ended = loci_now_ns();
    pthread_mutex_lock(&batch->lock);
    batch->running = false;
    batch->patience_ends_ns = ended + (ended - begun) / PATIENCE;
    batch->usage.passes++;
    batch->usage.chunks += pass.count;
    for (uint32_t i = 0; i < pass.count; i++) {
        loci_sequence *member = pass.member[i];
        if (member->decoding && member->step.status == LOCI_OK) {
            member->away = batch->number;
            batch->away++;
        }
        end_step(member);
    }
    wake_first(batch);
}

/* What a thread does for the pass of another. */
static void reach(loci_batch *batch, loci_sequence *sequence) {
    loci_pass *pass = sequence->pass;
    pthread_mutex_unlock(&batch->lock);
    loci_pass_reach(pass, sequence);
    pthread_mutex_lock(&batch->lock);
    sequence->step.state = LOCI_STEP_RUNNING;
    if (--pass->attending == 0) pthread_cond_signal(&pass->member[0]->turn);
}

void loci_batch_reach(loci_pass *pass) {
    loci_batch *batch = pass->batch;
    loci_sequence *leader = pass->member[0];
    pthread_mutex_lock(&batch->lock);
    for (uint32_t i = 1; i < pass->count; i++) {
        loci_sequence *member = pass->member[i];
        if (!member->step.with) continue;
        member->pass = pass;
        member->step.state = LOCI_STEP_ATTENDING;
        pass->attending++;
        pthread_cond_signal(&member->turn);
    }
    pthread_mutex_unlock(&batch->lock);
    if (leader->step.with) loci_pass_reach(pass, leader);
    pthread_mutex_lock(&batch->lock);
    while (pass->attending > 0) pthread_cond_wait(&leader->turn, &batch->lock);
    pthread_mutex_unlock(&batch->lock);
}

/* Sleeps until something may have changed for this sequence. */
static void sleep_in(loci_batch *batch, loci_sequence *sequence) {
    bool patient = batch->first == sequence && !batch->running;
    uint64_t until = batch->patience_ends_ns;
    struct timespec moment = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    if (patient)
        pthread_cond_timedwait(&sequence->turn, &batch->lock, &moment);
    else
        pthread_cond_wait(&sequence->turn, &batch->lock);
}

/* Who is away is waited for, unless a pass can be filled without it. */
static bool may_lead(const loci_batch *batch, const loci_sequence *sequence) {
    return batch->first == sequence && !batch->running &&
           (batch->away == 0 || batch->usage.waiting >= LOCI_GEMM_FEW_ROWS ||
            loci_now_ns() >= batch->patience_ends_ns);
}

void loci_batch_run(loci_sequence *sequence) {
    loci_batch *batch = sequence->batch;
    pthread_mutex_lock(&batch->lock);
    come_back(sequence);
    sequence->step.state = LOCI_STEP_WAITING;
    *(batch->first ? &batch->last->next : &batch->first) = sequence;
    batch->last = sequence;
    if (++batch->usage.waiting >= LOCI_GEMM_FEW_ROWS) wake_first(batch);
    while (sequence->step.state != LOCI_STEP_DONE) {
        if (sequence->step.state == LOCI_STEP_ATTENDING)
            reach(batch, sequence);
        else if (may_lead(batch, sequence))
            lead(batch);
        else
            sleep_in(batch, sequence);
    }
    pthread_mutex_unlock(&batch->lock);
}
