/* SPDX-License-Identifier: Apache-2.0
 *
 * The layer loop of the decoder; see decoder.h.
 */
#include "model/decoder.h"

#include <math.h>
#include <string.h>

loci_status loci_decoder_scratch_open(const loci_model *model, uint32_t rows,
                                      loci_decoder_scratch *out, loci_error *err) {
    const loci_model_config *c = &model->config;
    size_t row_bytes = (size_t)rows * sizeof(float), size = 0;
    size_t ids = loci_decoder_reserve(&size, row_bytes);
    size_t positions = loci_decoder_reserve(&size, row_bytes);
    size_t places = loci_decoder_reserve(&size, row_bytes);
    size_t zeros = loci_decoder_reserve(&size, c->qkv_bias ? row_bytes : 0);
    size_t hidden = loci_decoder_reserve(&size, row_bytes * c->hidden);
    size_t normed = loci_decoder_reserve(&size, row_bytes * c->hidden);
    size_t qkv = loci_decoder_reserve(&size, row_bytes * loci_decoder_qkv_width(c));
    size_t attended = loci_decoder_reserve(&size, row_bytes * c->q_heads * c->head_dim);
    size_t heads =
        loci_decoder_reserve(&size, c->head_norm ? row_bytes * c->q_heads * c->head_dim : 0);
    size_t gate_up = loci_decoder_reserve(&size, row_bytes * 2 * c->intermediate);
    size_t activated = loci_decoder_reserve(&size, row_bytes * c->intermediate);
    *out = (loci_decoder_scratch){.backend = model->backend, .rows = rows};
    LOCI_TRY(model->backend->ops->alloc(model->backend, size, &out->buffer, err));
    out->ids = loci_ref_at(out->buffer, ids);
    out->positions = loci_ref_at(out->buffer, positions);
    out->places = loci_ref_at(out->buffer, places);
    out->zeros = loci_ref_at(out->buffer, zeros);
    out->heads = loci_ref_at(out->buffer, heads);
    out->hidden = loci_ref_at(out->buffer, hidden);
    out->normed = loci_ref_at(out->buffer, normed);
    out->qkv = loci_ref_at(out->buffer, qkv);
    out->attended = loci_ref_at(out->buffer, attended);
    out->gate_up = loci_ref_at(out->buffer, gate_up);
    out->activated = loci_ref_at(out->buffer, activated);
    return LOCI_OK;
}

void loci_decoder_scratch_close(loci_decoder_scratch *scratch) {
    if (scratch->buffer) scratch->backend->ops->free(scratch->backend, scratch->buffer);
    memset(scratch, 0, sizeof *scratch);
}

loci_status loci_decoder_check_tokens(const loci_model *model, const uint32_t *tokens, size_t count,
                                      loci_error *err) {
    for (size_t i = 0; i < count; i++)
        if (tokens[i] >= model->config.vocab)
            return loci_fail(err, LOCI_E_INVAL,
                             "token %zu has id %u, but the model's vocabulary has %u", i, tokens[i],
                             model->config.vocab);
    return LOCI_OK;
}

loci_ref loci_decoder_heads(const loci_decoder_pass *pass, uint32_t head) {
    loci_ref ref = pass->scratch->qkv;
    ref.offset += (size_t)head * pass->model->config.head_dim * sizeof(float);
    return ref;
}

loci_attend_dense loci_decoder_attention(const loci_decoder_pass *pass, uint32_t layer) {
    const loci_model_config *c = &pass->model->config;
    return (loci_attend_dense){
        .q = pass->scratch->qkv,
        .out = pass->scratch->attended,
        .q_stride = loci_decoder_qkv_width(c),
        .out_stride = c->q_heads * c->head_dim,
        .q_heads = c->q_heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .precision = pass->model->precision,
        .scale = 1.0f / sqrtf((float)c->head_dim),
        .causal = true,
        .window = c->layer[layer].window,
    };
}

static void norm(const loci_decoder_pass *pass, loci_ref x, loci_ref gain, uint32_t rows) {
    const loci_model_config *c = &pass->model->config;
    pass->model->backend->ops->rms_norm(pass->stream, pass->scratch->normed, x, gain, rows,
                                        c->hidden, c->rms_eps);
}

/* qkv = projection of normed, with its bias where there is one: put in every row beforehand. */
static void project(const loci_decoder_pass *pass, const loci_decoder_layer *layer) {
    const loci_backend_ops *ops = pass->model->backend->ops;
    const loci_decoder_scratch *s = pass->scratch;
    if (layer->qkv_bias) ops->embed(pass->stream, s->qkv, layer->qkv_bias, s->zeros, pass->rows);
    ops->gemm(pass->stream, s->qkv, s->normed, pass->rows, layer->qkv, layer->qkv_bias != NULL);
}

/* Norms `count` heads of each row of qkv from `first` on, each alone. attended is free until
 * attention fills it. */
static void norm_heads(const loci_decoder_pass *pass, uint32_t first, uint32_t count,
                       loci_ref gain) {
    const loci_model_config *c = &pass->model->config;
    const loci_backend_ops *ops = pass->model->backend->ops;
    const loci_decoder_scratch *s = pass->scratch;
    loci_ref heads = loci_decoder_heads(pass, first);
    uint32_t width = count * c->head_dim, stride = loci_decoder_qkv_width(c);
    ops->convert(pass->stream, s->heads, width, LOCI_F32, heads, stride, pass->rows, width);
    ops->rms_norm(pass->stream, s->attended, s->heads, gain, pass->rows * count, c->head_dim,
                  c->rms_eps);
    ops->convert(pass->stream, heads, stride, LOCI_F32, s->attended, width, pass->rows, width);
}

loci_status loci_decoder_run(const loci_decoder_pass *pass, loci_error *err) {
    const loci_model *model = pass->model;
    const loci_model_config *c = &model->config;
    const loci_backend_ops *ops = model->backend->ops;
    const loci_decoder_scratch *s = pass->scratch;
    loci_stream *stream = pass->stream;
    uint32_t rows = pass->rows;
    LOCI_ASSERT(rows <= s->rows);
    ops->embed(stream, s->hidden, model->embedding, s->ids, rows);
    for (uint32_t i = 0; i < c->layers; i++) {
        const loci_decoder_layer *layer = &model->layer[i];
        loci_status cancelled = loci_cancel_check(pass->cancel);
        if (cancelled != LOCI_OK)
            return loci_fail(err, cancelled,
                             "the forward pass was stopped before layer %u of %u: %s", i, c->layers,
                             loci_status_text(cancelled));
        norm(pass, s->hidden, layer->attention_gain, rows);
        project(pass, layer);
        if (c->head_norm) {
            norm_heads(pass, 0, c->q_heads, layer->q_gain);
            norm_heads(pass, c->q_heads, c->kv_heads, layer->k_gain);
        }
        if (c->layer[i].rope)
            ops->rope(stream, s->qkv, loci_decoder_qkv_width(c), s->positions, model->inv_freq,
                      rows, c->q_heads + c->kv_heads, c->head_dim);
        bool stop = false;
        LOCI_TRY(pass->attend(pass->ctx, i, &stop, err));
        if (stop) break;
        ops->gemm(stream, s->hidden, s->attended, rows, layer->o, true);
        norm(pass, s->hidden, layer->mlp_gain, rows);
        ops->gemm(stream, s->gate_up, s->normed, rows, layer->gate_up, false);
        ops->swiglu(stream, s->activated, s->gate_up, rows, c->intermediate);
        ops->gemm(stream, s->hidden, s->activated, rows, layer->down, true);
    }
    return LOCI_OK;
}

loci_status loci_decoder_finish(const loci_decoder_pass *pass, loci_status status,
                                loci_error *err) {
    const loci_model *model = pass->model;
    loci_status synced = model->backend->ops->sync(pass->stream, status == LOCI_OK ? err : NULL);
    if (status != LOCI_OK) return status;
    if (synced != LOCI_OK || !model->file) return synced;
    return loci_safetensors_check(model->file, err);
}

void loci_decoder_logits(const loci_decoder_pass *pass, uint32_t begin, uint32_t count,
                         loci_ref logits) {
    const loci_model *model = pass->model;
    loci_ref hidden = pass->scratch->hidden;
    hidden.offset += (size_t)begin * model->config.hidden * sizeof(float);
    norm(pass, hidden, model->final_gain, count);
    model->backend->ops->gemm(pass->stream, logits, pass->scratch->normed, count,
                              model->head ? model->head : model->embedding, false);
}
