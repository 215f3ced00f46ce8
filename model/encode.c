/* SPDX-License-Identifier: Apache-2.0
 *
 * Encoding context segments: keys and values of the retrieval layers.
 *
 * Segments are packed into batches of about BATCH_ROWS tokens; spans keep them from seeing one
 * another. A segment's bytes do not depend on its batch: every operation is row-wise or inside
 * a span, and a batch never has fewer rows than from which on products are independent of
 * their number, being filled up with a segment of padding. The pass ends at the
 * last retrieval layer's projection, whose attention nobody needs.
 *
 * Where operations run later, there are two batches: while one runs, the keys and values of the
 * one before come to the host.
 */
#include <stdlib.h>

#include "model/decoder.h"

/* Bounds the memory of a call (about 20 KiB a row in the built-in model), and is enough for the
 * products to run at full speed. */
#define BATCH_ROWS 1024u
#define LANES 2u /* batches at a time, at most */

typedef struct encoder {
    loci_model *model;
    loci_stream *stream;
    loci_decoder_scratch scratch;
    loci_decoder_pass pass;
    loci_buffer *halves; /* bf16 [pairs][2][rows][head_dim]: K and V on their way out */
    loci_attend_span *spans;
    uint32_t span_count;
    loci_attend_dense *attention; /* one for each layer: the stream reads them until sync */
    uint32_t *ids;
    int32_t *positions;
    const loci_encode_out *out;
    size_t out_row;      /* of the call's tokens: where the batch begins */
    uint32_t batch_rows; /* without padding */
    bool runs;           /* a batch was begun and not waited for */
} encoder;

static void put_kv(encoder *e, uint32_t retrieval) {
    const loci_model_config *c = &e->model->config;
    const loci_backend_ops *ops = e->model->backend->ops;
    size_t bytes = (size_t)e->batch_rows * c->head_dim * sizeof(uint16_t);
    size_t slot = (size_t)e->scratch.rows * c->head_dim * sizeof(uint16_t);
    for (uint32_t i = 0; i < 2 * c->kv_heads; i++) {
        bool value = i >= c->kv_heads;
        uint32_t pair = retrieval * c->kv_heads + i % c->kv_heads;
        loci_ref half = loci_ref_at(e->halves, ((size_t)pair * 2 + value) * slot);
        ops->convert(e->stream, half, c->head_dim, LOCI_BF16,
                     loci_decoder_heads(&e->pass, c->q_heads + i), loci_decoder_qkv_width(c),
                     e->batch_rows, c->head_dim);
        uint16_t *to = (value ? e->out->v : e->out->k)[pair] + e->out_row * c->head_dim;
        ops->download(e->stream, to, half, bytes);
    }
}

static loci_status attend(void *ctx, uint32_t layer, bool *stop, loci_error *err) {
    (void)err;
    encoder *e = ctx;
    const loci_model_config *c = &e->model->config;
    if (c->layer[layer].retrieval) {
        uint32_t retrieval = loci_retrieval_index(c, layer);
        put_kv(e, retrieval);
        *stop = retrieval + 1 == c->retrieval_count;
        if (*stop) return LOCI_OK;
    }
    loci_attend_dense *args = &e->attention[layer];
    *args = loci_decoder_attention(&e->pass, layer);
    args->k = loci_decoder_heads(&e->pass, c->q_heads);
    args->v = loci_decoder_heads(&e->pass, c->q_heads + c->kv_heads);
    args->kv_stride = loci_decoder_qkv_width(c);
    args->kv_dtype = LOCI_F32;
    args->spans = e->spans;
    args->span_count = e->span_count;
    e->model->backend->ops->attend_dense(e->stream, args);
    return LOCI_OK;
}

static void add_span(encoder *e, const uint32_t *tokens, uint32_t count) {
    uint32_t begin = e->pass.rows;
    for (uint32_t i = 0; i < count; i++) {
        e->ids[begin + i] = tokens ? tokens[i] : 0;
        e->positions[begin + i] = (int32_t)i;
    }
    e->spans[e->span_count++] = (loci_attend_span){begin, count, begin, count};
    e->pass.rows += count;
}

/* Begins to encode segments [first, first + count), which fit the scratch. */
static loci_status begin_batch(encoder *e, const uint32_t *tokens, const uint32_t *begin,
                               uint32_t first, uint32_t count, loci_error *err) {
    const loci_backend_ops *ops = e->model->backend->ops;
    e->pass.rows = 0;
    e->span_count = 0;
    for (uint32_t i = first; i < first + count; i++)
        if (begin[i + 1] > begin[i]) add_span(e, tokens + begin[i], begin[i + 1] - begin[i]);
    e->out_row = begin[first] - begin[0];
    e->batch_rows = e->pass.rows;
    if (e->batch_rows == 0) return LOCI_OK;
    if (e->pass.rows < LOCI_GEMM_STEADY_ROWS)
        add_span(e, NULL, LOCI_GEMM_STEADY_ROWS - e->pass.rows);
    ops->upload(e->stream, e->scratch.ids, e->ids, e->pass.rows * sizeof *e->ids);
    ops->upload(e->stream, e->scratch.positions, e->positions, e->pass.rows * sizeof(int32_t));
    e->runs = true;
    return loci_decoder_run(&e->pass, err);
}

/* Waits for its batch, if there is one; a failure that stands already is the one that counts. */
static loci_status end_batch(encoder *e, loci_status status, loci_error *err) {
    bool runs = e->runs;
    e->runs = false;
    return runs ? loci_decoder_finish(&e->pass, status, err) : status;
}

static loci_status encoder_open(encoder *e, loci_model *model, uint32_t rows, uint32_t spans,
                                loci_error *err) {
    const loci_model_config *c = &model->config;
    loci_backend *backend = model->backend;
    e->model = model;
    if (rows < LOCI_GEMM_STEADY_ROWS) rows = LOCI_GEMM_STEADY_ROWS;
    e->ids = calloc(rows, sizeof *e->ids);
    e->positions = calloc(rows, sizeof *e->positions);
    e->spans = calloc((size_t)spans + 1, sizeof *e->spans);
    e->attention = calloc(c->layers, sizeof *e->attention);
    if (!e->ids || !e->positions || !e->spans || !e->attention)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to encode %u tokens at once", rows);
    size_t pairs = (size_t)c->retrieval_count * c->kv_heads;
    LOCI_TRY(backend->ops->stream_open(backend, &e->stream, err));
    LOCI_TRY(backend->ops->alloc(backend, pairs * 2 * rows * c->head_dim * sizeof(uint16_t),
                                 &e->halves, err));
    LOCI_TRY(loci_decoder_scratch_open(model, rows, &e->scratch, err));
    e->pass = (loci_decoder_pass){
        .model = model, .stream = e->stream, .scratch = &e->scratch, .attend = attend, .ctx = e};
    return LOCI_OK;
}

static void encoder_close(encoder *e) {
    if (!e->model) return;
    loci_backend *backend = e->model->backend;
    if (e->stream) backend->ops->stream_close(backend, e->stream);
    loci_decoder_scratch_close(&e->scratch);
    backend->ops->free(backend, e->halves);
    free(e->ids);
    free(e->positions);
    free(e->spans);
    free(e->attention);
}

static loci_status check_segments(const loci_model *model, const uint32_t *tokens,
                                  const uint32_t *begin, uint32_t segments, uint32_t *longest,
                                  loci_error *err) {
    *longest = 0;
    for (uint32_t i = 0; i < segments; i++) {
        if (begin[i + 1] < begin[i])
            return loci_fail(err, LOCI_E_INVAL, "segment %u ends before it begins", i);
        uint32_t length = begin[i + 1] - begin[i];
        if (length > model->config.positions_max)
            return loci_fail(err, LOCI_E_LIMIT,
                             "segment %u has %u tokens, but the model has %u positions", i, length,
                             model->config.positions_max);
        if (length > *longest) *longest = length;
    }
    if (model->config.retrieval_count == 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "the model has no retrieval layer to encode for");
    return segments ? loci_decoder_check_tokens(model, tokens + begin[0],
                                                begin[segments] - begin[0], err)
                    : LOCI_OK;
}

loci_status loci_model_encode(loci_model *model, const uint32_t *tokens, const uint32_t *begin,
                              uint32_t segments, const loci_encode_out *out,
                              const loci_cancel *cancel, loci_error *err) {
    uint32_t longest;
    LOCI_TRY(check_segments(model, tokens, begin, segments, &longest, err));
    if (segments == 0 || begin[segments] == begin[0]) return LOCI_OK;
    uint32_t total = begin[segments] - begin[0];
    uint32_t capacity = longest > BATCH_ROWS ? longest : BATCH_ROWS;
    if (total < capacity) capacity = total;
    uint32_t spans = segments < capacity ? segments : capacity;
    uint32_t lanes = model->backend->ops->mark && total > capacity ? LANES : 1, lane = 0;
    encoder e[LANES] = {0};
    loci_status status = LOCI_OK;
    for (uint32_t i = 0; i < lanes && status == LOCI_OK; i++) {
        status = encoder_open(&e[i], model, capacity, spans, err);
        e[i].out = out;
        e[i].pass.cancel = cancel;
        if (status == LOCI_OK || i == 0) continue;
        encoder_close(&e[i]); /* one batch at a time, where there is room for no more */
        status = LOCI_OK;
        lanes = i;
    }
    for (uint32_t first = 0; first < segments && status == LOCI_OK;) {
        uint32_t count = 1;
        while (first + count < segments && begin[first + count + 1] - begin[first] <= capacity)
            count++;
        status = end_batch(&e[lane], LOCI_OK, err);
        if (status == LOCI_OK) status = begin_batch(&e[lane], tokens, begin, first, count, err);
        first += count;
        lane = (lane + 1) % lanes;
    }
    for (uint32_t i = 0; i < lanes; i++, lane = (lane + 1) % lanes) {
        status = end_batch(&e[lane], status, err);
    }
    for (uint32_t i = 0; i < lanes; i++) encoder_close(&e[i]);
    return status;
}
