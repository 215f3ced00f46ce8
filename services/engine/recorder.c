/* SPDX-License-Identifier: Apache-2.0
 *
 * Query vectors of chosen tokens in every retrieval layer, by which mode squeezed finds its
 * thresholds (squeezed.c). Those of the last LOCI_RECORDED tokens of a causal corpus are kept as a
 * note when they are encoded: u64 position after the last of them, u32 rows, layers, floats of a
 * row, then bf16 [layers][rows][q_heads][head_dim]. A note of another position is one of another
 * text.
 */
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/log.h"
#include "services/engine/query.h"

static uint32_t width_of(const loci_recorder *self) {
    const loci_model_config *config = loci_model_config_of(self->query->engine->model);
    return config->q_heads * config->head_dim;
}

static uint32_t layers_of(const loci_recorder *self) {
    return self->query->engine->geometry.retrieval_layers;
}

/* The note is three times in memory when it is written (built, with its head, in the batch) and
 * twice when it is read; where that grows by doubling, the double is counted. */
uint64_t loci_recorder_bytes(const loci_model_config *config, bool note) {
    uint64_t layer = (uint64_t)LOCI_RECORDED * config->q_heads * config->head_dim;
    uint64_t rows = layer * config->retrieval_count;
    uint64_t queries = rows * sizeof(float);
    return note ? queries + layer * sizeof(float) + 2 * 3 * rows * sizeof(uint16_t) : queries;
}

loci_status loci_recorder_open(loci_query *query, loci_recorder *out, loci_error *err) {
    loci_backend *backend = query->engine->backend;
    *out = (loci_recorder){.query = query};
    out->q = calloc(layers_of(out), sizeof *out->q);
    if (!out->q) return loci_fail(err, LOCI_E_NOMEM, "no memory to record queries");
    size_t bytes = (size_t)LOCI_RECORDED * width_of(out) * sizeof(float);
    for (uint32_t i = 0; i < layers_of(out); i++)
        LOCI_TRY(backend->ops->alloc(backend, bytes, &out->q[i], err));
    return LOCI_OK;
}

void loci_recorder_close(loci_recorder *self) {
    if (!self->q) return;
    loci_backend *backend = self->query->engine->backend;
    for (uint32_t i = 0; i < layers_of(self); i++) backend->ops->free(backend, self->q[i]);
    free(self->q);
    self->q = NULL;
}

/* Called in every retrieval layer of every chunk of a pass. */
static loci_status record_hook(void *ctx, const loci_attend_call *call, loci_error *err) {
    loci_recorder *self = ctx;
    const loci_backend_ops *ops = self->query->engine->backend->ops;
    size_t row = (size_t)call->q_heads * call->head_dim * sizeof(float);
    for (uint32_t i = 0; i < call->rows; i++) {
        uint32_t at = call->row_position + i;
        if (at < self->first) continue;
        loci_ref from = call->q;
        from.offset += (size_t)i * call->q_stride * sizeof(float);
        loci_ref to = {self->q[call->retrieval_index], (self->taken + at - self->first) * row};
        ops->copy(call->stream, to, from, row);
    }
    return self->attends ? loci_corpus_attend(self->query, call, err) : LOCI_OK;
}

static loci_status recorded_hook(void *ctx, loci_status status, loci_error *err) {
    loci_recorder *self = ctx;
    return self->attends ? loci_corpus_attended(self->query, status, err) : status;
}

loci_status loci_recorder_pass(loci_recorder *self, const uint32_t *ids, uint32_t count,
                               uint32_t keep, loci_error *err) {
    loci_sequence *sequence = self->query->slot->sequence;
    LOCI_ASSERT(keep <= count && self->taken + keep <= LOCI_RECORDED);
    self->first = count - keep;
    loci_sequence_set_attend(sequence, record_hook, recorded_hook, self);
    loci_status status = loci_sequence_append(sequence, ids, count, 0, (int)layers_of(self) - 1,
                                              self->query->cancel, err);
    loci_sequence_set_attend(sequence, NULL, NULL, NULL);
    if (status == LOCI_OK) self->taken += keep;
    return status;
}

/* --- The note ------------------------------------------------------------------------------- */

/* *rows: bf16 [layers][*count][width] in `note`. False: it is of another text. */
static bool read_note(const loci_recorder *self, const loci_buf *note, uint64_t end,
                      const uint8_t **rows, uint32_t *count) {
    loci_reader reader = loci_reader_of(loci_slice_of(note->data, note->len));
    uint64_t position = loci_read_u64(&reader);
    *count = loci_read_u32(&reader);
    uint32_t layers = loci_read_u32(&reader), width = loci_read_u32(&reader);
    if (reader.failed || position != end || *count == 0 || *count > LOCI_RECORDED ||
        layers != layers_of(self) || width != width_of(self))
        return false;
    *rows = reader.data + reader.at;
    return reader.len - reader.at == (size_t)layers * *count * width * sizeof(uint16_t);
}

static loci_status append_layer(loci_recorder *self, uint32_t layer, float *rows, loci_buf *out,
                                loci_error *err) {
    const loci_backend_ops *ops = self->query->engine->backend->ops;
    loci_stream *stream = loci_sequence_stream(self->query->slot->sequence);
    size_t count = (size_t)self->taken * width_of(self);
    ops->download(stream, rows, loci_ref_at(self->q[layer], 0), count * sizeof *rows);
    LOCI_TRY(ops->sync(stream, err));
    for (size_t i = 0; i < count; i++) {
        uint16_t half = loci_f32_to_bf16(rows[i]);
        loci_buf_append(out, &half, sizeof half);
    }
    return LOCI_OK;
}

void loci_recorder_keep(loci_recorder *self, uint64_t start, uint64_t end) {
    loci_store *store = self->query->engine->store;
    const loci_corpus_info *info = loci_snapshot_info(self->query->snapshot);
    loci_error err = {0};
    loci_buf before = LOCI_BUF_INIT, out = LOCI_BUF_INIT;
    const uint8_t *rows = NULL;
    uint32_t width = width_of(self), had = 0;
    size_t row = width * sizeof(uint16_t);
    loci_status status = LOCI_OK;
    float *floats = malloc((size_t)LOCI_RECORDED * width * sizeof *floats);
    if (self->taken == LOCI_RECORDED ||
        loci_corpus_note_get(store, info, LOCI_NOTE_QUERIES, &before, NULL) != LOCI_OK ||
        !read_note(self, &before, start, &rows, &had))
        had = 0;
    uint32_t room = LOCI_RECORDED - self->taken, older = had < room ? had : room;
    loci_buf_u64(&out, end);
    loci_buf_u32(&out, older + self->taken);
    loci_buf_u32(&out, layers_of(self));
    loci_buf_u32(&out, width);
    for (uint32_t i = 0; i < layers_of(self) && floats && status == LOCI_OK; i++) {
        if (older > 0)
            loci_buf_append(&out, rows + ((size_t)(i + 1) * had - older) * row, older * row);
        status = append_layer(self, i, floats, &out, &err);
    }
    loci_buf_fini(&before);
    if (status == LOCI_OK && (!floats || out.failed))
        status = loci_fail(&err, LOCI_E_NOMEM, "no memory");
    if (status == LOCI_OK)
        status = loci_corpus_note_put(store, info, LOCI_NOTE_QUERIES,
                                      loci_slice_of(out.data, out.len), &err);
    if (status != LOCI_OK)
        loci_log_warn("the last queries of corpus %s are not kept: %s", info->name, err.text);
    free(floats);
    loci_buf_fini(&out);
}

bool loci_recorder_restore(loci_recorder *self, uint64_t end) {
    const loci_backend_ops *ops = self->query->engine->backend->ops;
    loci_stream *stream = loci_sequence_stream(self->query->slot->sequence);
    const loci_corpus_info *info = loci_snapshot_info(self->query->snapshot);
    loci_buf note = LOCI_BUF_INIT;
    const uint8_t *rows = NULL;
    uint32_t count = 0;
    bool known = loci_corpus_note_get(self->query->engine->store, info, LOCI_NOTE_QUERIES, &note,
                                      NULL) == LOCI_OK &&
                 read_note(self, &note, end, &rows, &count);
    size_t floats = (size_t)count * width_of(self);
    float *layer = known ? malloc(floats * sizeof *layer) : NULL;
    for (uint32_t i = 0; layer && i < layers_of(self); i++) {
        for (size_t j = 0; j < floats; j++, rows += sizeof(uint16_t)) {
            uint16_t half;
            memcpy(&half, rows, sizeof half);
            layer[j] = loci_bf16_to_f32(half);
        }
        ops->upload(stream, loci_ref_at(self->q[i], 0), layer, floats * sizeof *layer);
    }
    if (layer) self->taken = count;
    free(layer);
    loci_buf_fini(&note);
    return layer != NULL;
}
