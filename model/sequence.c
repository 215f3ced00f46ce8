/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences: tokens appended to a KV cache of their own, logits and sampling.
 *
 * Keys and values are kept as f32, side by side for each token.
 * Appended tokens run in chunks of at most LOCI_CHUNK_ROWS rows; the stream is synced once, after
 * each chunk, so host arguments live in the sequence and are reused by the next one. length moves
 * only when a chunk has succeeded: a failed or cancelled append leaves the sequence as after its
 * last whole chunk.
 */
#include <stdlib.h>
#include <string.h>

#include "model/sequence.h"

loci_status loci_sequence_make(loci_model *model, uint32_t tokens_max, loci_buffer *cache,
                               uint32_t cache_rows, uint32_t cache_row, loci_sequence **out,
                               loci_error *err) {
    *out = NULL;
    const loci_model_config *c = &model->config;
    loci_backend *backend = model->backend;
    if (tokens_max == 0 || tokens_max > c->positions_max)
        return loci_fail(err, LOCI_E_INVAL, "a sequence of %u tokens: the model has 1 to %u",
                         tokens_max, c->positions_max);
    loci_sequence *s = calloc(1, sizeof *s);
    if (!s) return loci_fail(err, LOCI_E_NOMEM, "no memory for a sequence");
    uint32_t rows = tokens_max < LOCI_CHUNK_ROWS ? tokens_max : LOCI_CHUNK_ROWS;
    s->model = model;
    s->tokens_max = tokens_max;
    s->layers_valid = c->layers;
    s->attention_scale = 1;
    s->cache = cache;
    s->cache_rows = cache_rows;
    s->cache_row = cache_row;
    s->owns_cache = cache == NULL;
    size_t cache_bytes = (size_t)c->layers * cache_rows * loci_cache_width(c) * sizeof(float);
    loci_status status;
    LOCI_TRY_GOTO(backend->ops->stream_open(backend, &s->stream, err), fail);
    LOCI_TRY_GOTO(loci_decoder_scratch_open(model, rows, &s->scratch, err), fail);
    if (!cache) LOCI_TRY_GOTO(backend->ops->alloc(backend, cache_bytes, &s->cache, err), fail);
    LOCI_TRY_GOTO(
        backend->ops->alloc(backend, (size_t)rows * c->q_heads * sizeof(float), &s->lse, err),
        fail);
    LOCI_TRY_GOTO(backend->ops->alloc(backend, 128, &s->sampled, err), fail);
    s->attention = calloc(c->layers, sizeof *s->attention);
    if (!s->attention) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for a sequence");
        goto fail;
    }
    *out = s;
    return LOCI_OK;
fail:
    loci_sequence_close(s);
    return status;
}

loci_status loci_sequence_open(loci_model *model, uint32_t tokens_max, loci_sequence **out,
                               loci_error *err) {
    return loci_sequence_make(model, tokens_max, NULL, tokens_max, 0, out, err);
}

void loci_sequence_close(loci_sequence *s) {
    if (!s) return;
    loci_backend *backend = s->model->backend;
    loci_batch_leave(s);
    if (s->stream) backend->ops->stream_close(backend, s->stream);
    loci_decoder_scratch_close(&s->scratch);
    if (s->owns_cache) backend->ops->free(backend, s->cache);
    backend->ops->free(backend, s->lse);
    backend->ops->free(backend, s->logits);
    backend->ops->free(backend, s->sampled);
    free(s->attention);
    free(s->host_logits);
    free(s);
}

void loci_sequence_set_attend(loci_sequence *s, loci_attend_fn attend, loci_attended_fn attended,
                              void *ctx) {
    s->attend = attend;
    s->attended = attended;
    s->attend_ctx = ctx;
    s->together = NULL;
}

void loci_sequence_set_together(loci_sequence *s, const loci_attend_together *together) {
    s->together = together;
}

void loci_sequence_scale_attention(loci_sequence *s, float factor) {
    s->attention_scale = factor;
}

void loci_sequence_reset(loci_sequence *s) {
    s->length = 0;
    s->skipped = 0;
    s->attention_scale = 1;
    s->layers_valid = s->model->config.layers;
    s->logits_rows = 0;
}

void loci_sequence_jump(loci_sequence *s, uint32_t position) {
    LOCI_ASSERT(position >= s->skipped + s->length);
    s->skipped = position - s->length;
}

uint32_t loci_sequence_length(const loci_sequence *s) {
    return s->length;
}

uint32_t loci_sequence_room(const loci_sequence *s) {
    return s->tokens_max - s->length;
}

loci_stream *loci_sequence_stream(loci_sequence *s) {
    return s->stream;
}

/* Room for the logits of `rows` rows; grows seldom, since callers ask for the same few. */
static loci_status reserve_logits(loci_sequence *s, uint32_t rows, loci_error *err) {
    if (rows <= s->logits_capacity) return LOCI_OK;
    loci_backend *backend = s->model->backend;
    size_t bytes = (size_t)rows * s->model->config.vocab * sizeof(float);
    loci_buffer *logits = NULL;
    float *host = malloc(bytes);
    if (!host) return loci_fail(err, LOCI_E_NOMEM, "no memory for logits of %u rows", rows);
    loci_status status = backend->ops->alloc(backend, bytes, &logits, err);
    if (status != LOCI_OK) {
        free(host);
        return status;
    }
    backend->ops->free(backend, s->logits);
    free(s->host_logits);
    s->logits = logits;
    s->host_logits = host;
    s->logits_capacity = rows;
    return LOCI_OK;
}

/* Runs one chunk; steps of decoding in the company of others where there is a batch. */
static loci_status run_chunk(loci_sequence *s, const loci_step *chunk, loci_error *err) {
    loci_step *step = &s->step;
    *step = *chunk;
    if (s->batch && chunk->stop_after < 0 && chunk->rows <= LOCI_GEMM_FEW_ROWS)
        loci_batch_run(s);
    else
        loci_pass_run(&(loci_pass){.member = {s}, .count = 1});
    /* What failed on the stream must not be found again later, whatever else did. */
    bool well = step->status == LOCI_OK;
    loci_status synced = s->model->backend->ops->sync(s->stream, well ? &step->error : NULL);
    if (well) step->status = synced;
    if (s->attended) step->status = s->attended(s->attend_ctx, step->status, &step->error);
    if (step->status == LOCI_OK) s->length += step->rows;
    if (err && step->status != LOCI_OK) *err = step->error;
    return step->status;
}

static loci_status check_append(const loci_sequence *s, const uint32_t *tokens, uint32_t count,
                                uint32_t logits_rows, int stop, uint32_t layers, loci_error *err) {
    const loci_model_config *c = &s->model->config;
    if (count == 0 || logits_rows > count)
        return loci_fail(err, LOCI_E_INVAL, "append of %u tokens with logits of %u", count,
                         logits_rows);
    if (stop >= 0 && (logits_rows > 0 || (uint32_t)stop >= c->retrieval_count))
        return loci_fail(err, LOCI_E_INVAL,
                         "a pass cannot stop after retrieval layer %d of %u with logits of %u rows",
                         stop, c->retrieval_count, logits_rows);
    if (count > loci_sequence_room(s))
        return loci_fail(err, LOCI_E_LIMIT, "a sequence of %u tokens has no room for %u after %u",
                         s->tokens_max, count, s->length);
    if (layers > s->layers_valid)
        return loci_fail(err, LOCI_E_PRECONDITION,
                         "the sequence has keys in %u layers only, for a pass was stopped there: "
                         "reset it first",
                         s->layers_valid);
    return loci_decoder_check_tokens(s->model, tokens, count, err);
}

loci_status loci_sequence_append(loci_sequence *s, const uint32_t *tokens, uint32_t count,
                                 uint32_t logits_rows, int stop_after_retrieval,
                                 const loci_cancel *cancel, loci_error *err) {
    const loci_model_config *c = &s->model->config;
    uint32_t layers = c->layers;
    if (stop_after_retrieval >= 0 && (uint32_t)stop_after_retrieval < c->retrieval_count)
        layers = c->retrieval_layer[stop_after_retrieval] + 1;
    s->logits_rows = 0;
    s->logits_on_host = false;
    LOCI_TRY(check_append(s, tokens, count, logits_rows, stop_after_retrieval, layers, err));
    LOCI_TRY(reserve_logits(s, logits_rows, err));
    uint32_t quiet = count - logits_rows; /* rows without logits */
    for (uint32_t done = 0; done < count;) {
        uint32_t rows = count - done < s->scratch.rows ? count - done : s->scratch.rows;
        uint32_t end = done + rows, before = done > quiet ? done - quiet : 0;
        uint32_t wanted = end > quiet ? end - quiet - before : 0;
        loci_step chunk = {.tokens = tokens + done,
                           .rows = rows,
                           .logits_rows = wanted,
                           .logits_at = before,
                           .stop_after = stop_after_retrieval,
                           .cancel = cancel};
        LOCI_TRY(run_chunk(s, &chunk, err));
        s->layers_valid = layers;
        done = end;
    }
    s->logits_rows = logits_rows;
    return LOCI_OK;
}

loci_status loci_sequence_read_kv(loci_sequence *s, const loci_encode_out *out, loci_error *err) {
    const loci_model_config *c = &s->model->config;
    loci_backend *backend = s->model->backend;
    uint32_t width = c->kv_heads * c->head_dim;
    size_t bytes = (size_t)s->length * c->head_dim * sizeof(uint16_t);
    loci_buffer *halves = NULL;
    LOCI_TRY(backend->ops->alloc(backend, 2 * c->kv_heads * bytes, &halves, err));
    loci_status status = LOCI_OK;
    for (uint32_t r = 0; r < c->retrieval_count && status == LOCI_OK; r++) {
        for (uint32_t i = 0; i < 2 * c->kv_heads; i++) {
            bool value = i >= c->kv_heads;
            uint32_t head = i % c->kv_heads;
            loci_ref half = loci_ref_at(halves, i * bytes);
            loci_ref from = loci_cache_at(s, c->retrieval_layer[r], s->cache_row);
            from.offset += ((size_t)value * width + (size_t)head * c->head_dim) * sizeof(float);
            backend->ops->convert(s->stream, half, c->head_dim, LOCI_BF16, from, 2 * width,
                                  s->length, c->head_dim);
            uint16_t *to = (value ? out->v : out->k)[r * c->kv_heads + head];
            backend->ops->download(s->stream, to, half, bytes);
        }
        status = backend->ops->sync(s->stream, err);
    }
    backend->ops->free(backend, halves);
    return status;
}

const float *loci_sequence_logits(loci_sequence *s) {
    if (s->logits_rows == 0) return NULL;
    if (!s->logits_on_host) {
        const loci_backend_ops *ops = s->model->backend->ops;
        size_t bytes = (size_t)s->logits_rows * s->model->config.vocab * sizeof(float);
        ops->download(s->stream, s->host_logits, loci_ref_at(s->logits, 0), bytes);
        if (ops->sync(s->stream, NULL) != LOCI_OK) return NULL;
        s->logits_on_host = true;
    }
    return s->host_logits;
}

loci_status loci_sequence_sample(loci_sequence *s, const loci_sample_params *params,
                                 const uint32_t *banned, uint32_t banned_count,
                                 const uint32_t *recent, uint32_t recent_count, uint32_t *id,
                                 float *logprob, loci_error *err) {
    if (s->logits_rows == 0)
        return loci_fail(err, LOCI_E_PRECONDITION,
                         "nothing to sample from: the last append had no logits");
    const loci_backend_ops *ops = s->model->backend->ops;
    uint32_t vocab = s->model->config.vocab;
    size_t last = (size_t)(s->logits_rows - 1) * vocab * sizeof(float);
    loci_ref id_ref = loci_ref_at(s->sampled, 0), logprob_ref = loci_ref_at(s->sampled, 64);
    const loci_move told[] = {{{0}, id_ref, id, sizeof *id},
                              {{0}, logprob_ref, logprob, sizeof *logprob}};
    if (params->repetition_penalty == 1) recent_count = 0; /* they need not go to a device */
    ops->sample(s->stream, id_ref, logprob_ref, loci_ref_at(s->logits, last), 1, vocab, params,
                banned, banned_count, recent, recent_count);
    ops->move(s->stream, told, 2);
    return ops->sync(s->stream, err);
}
