/* SPDX-License-Identifier: Apache-2.0
 *
 * Thresholds of squeezed mode (Squeezed Attention, arXiv 2411.09688, section 3.3): for each level
 * the quantile, over all retrieval layers, KV heads and tokens, of the scores that recorded
 * queries give: of a causal corpus the queries of its last 100 tokens, once more behind it all. An
 * independent corpus has no last queries, so the last tokens of up to 100 segments drawn with a
 * fixed seed stand in. Roots are cut at 0.5, leaves at the sparsity asked for. The thresholds of
 * the revision and sparsity last asked for are kept.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "services/engine/query.h"

#define RECORDED 100u
#define ROOT_QUANTILE 0.5
#define DRAW_SEED 0x5eedu

typedef struct recorder {
    loci_query *query;
    loci_buffer **q;      /* one for each retrieval layer: f32 [RECORDED][q_heads][head_dim] */
    uint32_t taken, rows; /* rows: the last ones of the pass that is under way */
} recorder;

/* Copies the last rows' query vectors; called in every retrieval layer. */
static loci_status record_hook(void *ctx, const loci_attend_call *call, loci_error *err) {
    recorder *self = ctx;
    const loci_backend *backend = self->query->engine->backend;
    size_t row = (size_t)call->q_heads * call->head_dim * sizeof(float);
    for (uint32_t i = 0; i < self->rows; i++) {
        loci_ref from = call->q, to = {self->q[call->retrieval_index], (self->taken + i) * row};
        from.offset += (size_t)(call->rows - self->rows + i) * call->q_stride * sizeof(float);
        backend->ops->copy(call->stream, to, from, row);
    }
    LOCI_TRY(backend->ops->sync(call->stream, err));
    bool causal = loci_snapshot_info(self->query->snapshot)->geometry.causal;
    return causal ? loci_corpus_attend(self->query, call, err) : LOCI_OK;
}

/* Appends the tokens of a segment. */
static loci_status read_segment(const loci_query *query, uint32_t segment, loci_tokens *out,
                                loci_error *err) {
    loci_segment_info info;
    loci_buf bytes = LOCI_BUF_INIT, text = LOCI_BUF_INIT;
    loci_status status;
    LOCI_TRY_GOTO(loci_snapshot_segment(query->snapshot, segment, &info, err), out);
    LOCI_TRY_GOTO(loci_snapshot_read(query->snapshot, segment, info.start, info.end, &bytes, err),
                  out);
    loci_passage_text(loci_slice_of(bytes.data, bytes.len), &text);
    LOCI_TRY_GOTO(loci_buf_status(&text), out);
    status = loci_tokenizer_encode(loci_model_tokenizer(query->engine->model),
                                   loci_slice_of(text.data, text.len), false, out, err);
out:
    loci_buf_fini(&bytes);
    loci_buf_fini(&text);
    return status;
}

static loci_status record_tokens(recorder *self, const uint32_t *ids, uint32_t count,
                                 loci_error *err) {
    const loci_query *query = self->query;
    LOCI_TRY(loci_sequence_append(query->slot->sequence, ids, count, 0,
                                  (int)query->engine->geometry.retrieval_layers - 1, query->cancel,
                                  err));
    self->taken += self->rows;
    return LOCI_OK;
}

/* Runs one segment as it was encoded and records its last token's queries. */
static loci_status record_segment(recorder *self, uint32_t segment, loci_error *err) {
    const loci_engine *engine = self->query->engine;
    loci_tokens tokens = {0};
    loci_status status;
    if (engine->geometry.has_sink)
        LOCI_TRY_GOTO(loci_tokens_push(&tokens, loci_model_specials(engine->model)->begin, 0), out);
    LOCI_TRY_GOTO(read_segment(self->query, segment, &tokens, err), out);
    loci_sequence_reset(self->query->slot->sequence);
    self->rows = 1;
    status = record_tokens(self, tokens.ids, (uint32_t)tokens.count, err);
out:
    loci_tokens_fini(&tokens);
    return status;
}

/* The last tokens of a causal corpus, read again behind it. */
static loci_status record_end(recorder *self, loci_error *err) {
    loci_query *query = self->query;
    loci_tokens part = {0};
    loci_status status = LOCI_OK;
    uint32_t segments = loci_snapshot_segments(query->snapshot);
    uint32_t ids[RECORDED], count = 0;
    loci_mode mode = query->params.mode;
    for (uint32_t s = segments; s > 0 && count < RECORDED; s--) {
        if (!loci_snapshot_segment_live(query->snapshot, s - 1)) continue;
        part.count = 0;
        LOCI_TRY_GOTO(read_segment(query, s - 1, &part, err), out);
        for (size_t i = part.count; i > 0 && count < RECORDED; i--)
            ids[RECORDED - ++count] = part.ids[i - 1];
    }
    loci_sequence_reset(query->slot->sequence);
    loci_sequence_jump(query->slot->sequence, query->start);
    loci_sequence_scale_attention(query->slot->sequence, loci_query_attention_scale(query));
    query->params.mode = LOCI_MODE_DENSE;
    self->rows = count;
    if (count > 0) status = record_tokens(self, ids + RECORDED - count, count, err);
    query->params.mode = mode;
out:
    loci_tokens_fini(&part);
    return status;
}

static loci_status record_all(recorder *self, loci_error *err) {
    loci_query *query = self->query;
    uint32_t segments = loci_snapshot_segments(query->snapshot);
    uint64_t state = DRAW_SEED;
    loci_sequence_set_attend(query->slot->sequence, record_hook, self);
    loci_status status = LOCI_OK;
    bool causal = loci_snapshot_info(query->snapshot)->geometry.causal;
    if (causal) status = record_end(self, err);
    for (uint32_t tries = 0; !causal && tries < 4 * RECORDED && self->taken < RECORDED; tries++) {
        uint32_t segment = (uint32_t)(loci_rng_next(&state) % segments);
        if (!loci_snapshot_segment_live(query->snapshot, segment)) continue;
        status = record_segment(self, segment, err);
        if (status != LOCI_OK) break;
    }
    loci_sequence_set_attend(query->slot->sequence, NULL, NULL);
    if (status == LOCI_OK && self->taken == 0)
        status = loci_fail(err, LOCI_E_PRECONDITION, "the corpus has no segment to calibrate with");
    return status;
}

typedef struct node_score {
    float score;
    uint32_t tokens;
} node_score;

static int by_value(const void *a, const void *b) {
    const node_score *x = a, *y = b;
    return x->score < y->score ? -1 : x->score > y->score;
}

/* The score below which `share` of the tokens lie. */
static float quantile(node_score *nodes, size_t count, double share) {
    uint64_t all = 0, seen = 0;
    qsort(nodes, count, sizeof *nodes, by_value);
    for (size_t i = 0; i < count; i++) all += nodes[i].tokens;
    for (size_t i = 0; i < count; i++) {
        seen += nodes[i].tokens;
        if ((double)seen >= share * (double)all) return nodes[i].score;
    }
    return count ? nodes[count - 1].score : 0;
}

typedef struct level_scores {
    node_score *nodes;
    size_t count;
} level_scores;

/* Appends one layer's scores of one level. */
static loci_status collect(loci_query *query, loci_lookup *lookup, loci_stream *stream,
                           unsigned level, level_scores *out, loci_error *err) {
    const loci_backend_ops *ops = query->engine->backend->ops;
    size_t count = 0, got = 0;
    ops->lookup_squeezed(stream, lookup, level, NULL, NULL, 0, &count);
    LOCI_TRY(ops->sync(stream, err));
    float *scores = malloc((count + 1) * sizeof *scores);
    uint32_t *tokens = malloc((count + 1) * sizeof *tokens);
    node_score *nodes = realloc(out->nodes, (out->count + count + 1) * sizeof *nodes);
    if (nodes) out->nodes = nodes;
    loci_status status = LOCI_OK;
    if (!scores || !tokens || !nodes)
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate squeezed mode");
    if (status == LOCI_OK) {
        ops->lookup_squeezed(stream, lookup, level, scores, tokens, count, &got);
        status = ops->sync(stream, err);
    }
    for (size_t i = 0; status == LOCI_OK && i < count && i < got; i++) {
        if (!isfinite(scores[i]))
            status = loci_fail(err, LOCI_E_INTERNAL, "a score of squeezed mode is not finite");
        nodes[out->count++] = (node_score){scores[i], tokens[i]};
    }
    free(scores);
    free(tokens);
    return status;
}

static loci_status calibrate(recorder *self, double sparsity, float thresholds[2],
                             loci_error *err) {
    loci_query *query = self->query;
    loci_engine *engine = query->engine;
    const loci_backend_ops *ops = engine->backend->ops;
    const loci_model_config *config = loci_model_config_of(engine->model);
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    loci_select_params params = query->params;
    params.squeezed_threshold[0] = params.squeezed_threshold[1] = 0;
    level_scores levels[2] = {{0}};
    loci_buffer *steady = NULL;
    loci_status status;
    size_t vectors = (size_t)RECORDED * config->q_heads;
    LOCI_TRY_GOTO(ops->alloc(engine->backend, vectors * sizeof(float), &steady, err), out);
    for (uint32_t layer = 0; layer < engine->geometry.retrieval_layers; layer++) {
        loci_lookup *lookup = query->slot->lookup;
        ops->lookup_begin(stream, lookup, query->view, layer, loci_ref_at(self->q[layer], 0),
                          config->q_heads * config->head_dim, self->taken, config->q_heads,
                          loci_query_attention_scale(query) / sqrtf((float)config->head_dim),
                          loci_ref_at(steady, 0), &params);
        ops->score_nodes(stream, lookup);
        for (unsigned level = 0; level < 2; level++)
            LOCI_TRY_GOTO(collect(query, lookup, stream, level, &levels[level], err), out);
    }
    status = LOCI_OK;
    thresholds[0] = quantile(levels[0].nodes, levels[0].count, ROOT_QUANTILE);
    thresholds[1] = quantile(levels[1].nodes, levels[1].count, sparsity);
out:
    ops->free(engine->backend, steady);
    free(levels[0].nodes);
    free(levels[1].nodes);
    return status;
}

static loci_status compute(loci_query *query, double sparsity, float thresholds[2],
                           loci_error *err) {
    loci_engine *engine = query->engine;
    loci_backend *backend = engine->backend;
    const loci_model_config *config = loci_model_config_of(engine->model);
    uint32_t layers = engine->geometry.retrieval_layers;
    recorder self = {query, calloc(layers, sizeof(loci_buffer *)), 0, 1};
    loci_status status = LOCI_OK;
    if (!self.q) return loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate squeezed mode");
    size_t bytes = (size_t)RECORDED * config->q_heads * config->head_dim * sizeof(float);
    for (uint32_t r = 0; r < layers && status == LOCI_OK; r++)
        status = backend->ops->alloc(backend, bytes, &self.q[r], err);
    if (status == LOCI_OK) status = record_all(&self, err);
    if (status == LOCI_OK) status = calibrate(&self, sparsity, thresholds, err);
    for (uint32_t r = 0; r < layers; r++) backend->ops->free(backend, self.q[r]);
    free(self.q);
    return status;
}

loci_status loci_query_squeezed_threshold(loci_query *query, double sparsity, loci_error *err) {
    loci_engine *engine = query->engine;
    const loci_corpus_info *info = loci_snapshot_info(query->snapshot);
    float *thresholds = query->params.squeezed_threshold;
    if (query->view->extent_count == 0) return LOCI_OK; /* all flat: nothing to cut */
    pthread_mutex_lock(&engine->lock);
    bool known = engine->squeezed_uid == info->uid && engine->squeezed_revision == info->revision &&
                 engine->squeezed_sparsity == sparsity;
    if (known) memcpy(thresholds, engine->squeezed_threshold, sizeof engine->squeezed_threshold);
    pthread_mutex_unlock(&engine->lock);
    if (known) return LOCI_OK;
    LOCI_TRY(compute(query, sparsity, thresholds, err));
    pthread_mutex_lock(&engine->lock);
    engine->squeezed_uid = info->uid;
    engine->squeezed_revision = info->revision;
    engine->squeezed_sparsity = sparsity;
    memcpy(engine->squeezed_threshold, thresholds, sizeof engine->squeezed_threshold);
    pthread_mutex_unlock(&engine->lock);
    return LOCI_OK;
}
