/* SPDX-License-Identifier: Apache-2.0
 *
 * Thresholds of squeezed mode (Squeezed Attention, arXiv 2411.09688, section 3.3), calibrated on
 * recorded queries of the corpus itself so that the mean share of its tokens that is kept, over all
 * squeezed layers and KV heads, is the one asked for; attention/README.md ("Mode squeezed") has the
 * rule. Recorded are the queries of the last tokens of a causal corpus (kept when it was encoded),
 * and of the last tokens of segments of an independent one, drawn with a fixed seed and encoded
 * again as they were.
 *
 * One table for each corpus revision and attention scale, of shares 2^(-i/2): kept as a note on the
 * corpus, the last one used also in memory. Scores are counted in logarithmic bins, so memory does
 * not grow with the corpus.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/rng.h"
#include "services/engine/query.h"

#define DRAW_SEED 0x5eedu
#define SINGLE 20u /* of the recorded queries, looked at one by one */
#define GROUPS 3u  /* of shares by that of their roots: 1, 1/sqrt 2, 1/2 */
#define OCTAVES 60 /* smaller scores than 2^-60 count as 0 */
#define OCTAVE_BINS 256
#define BINS (OCTAVES * OCTAVE_BINS + 1u)

/* --- Recording ------------------------------------------------------------------------------ */

/* Runs one segment as it was encoded and records its last token's queries. */
static loci_status record_segment(loci_recorder *recorder, uint32_t segment, loci_error *err) {
    const loci_engine *engine = recorder->query->engine;
    loci_tokens tokens = {0};
    loci_status status;
    if (engine->geometry.has_sink)
        LOCI_TRY_GOTO(loci_tokens_push(&tokens, loci_model_specials(engine->model)->begin, 0), out);
    LOCI_TRY_GOTO(loci_segment_tokens(recorder->query, segment, &tokens, err), out);
    loci_sequence_reset(recorder->query->slot->sequence);
    status = loci_recorder_pass(recorder, tokens.ids, (uint32_t)tokens.count, 1, err);
out:
    loci_tokens_fini(&tokens);
    return status;
}

static loci_status record_sample(loci_recorder *recorder, loci_error *err) {
    const loci_snapshot *snapshot = recorder->query->snapshot;
    uint32_t segments = loci_snapshot_segments(snapshot);
    uint64_t state = DRAW_SEED;
    for (uint32_t i = 0; i < 4 * LOCI_RECORDED && recorder->taken < LOCI_RECORDED; i++) {
        uint32_t segment = (uint32_t)(loci_rng_next(&state) % segments);
        if (loci_snapshot_segment_live(snapshot, segment))
            LOCI_TRY(record_segment(recorder, segment, err));
    }
    return LOCI_OK;
}

/* The last tokens of a causal corpus, read again behind it: where their queries were not kept. */
static loci_status record_end(loci_recorder *recorder, loci_error *err) {
    loci_query *query = recorder->query;
    loci_tokens part = {0};
    loci_status status = LOCI_OK;
    uint32_t ids[LOCI_RECORDED], count = 0;
    const loci_mode mode = query->params.mode;
    const loci_corpus_settings settings = query->settings;
    for (uint32_t s = loci_snapshot_segments(query->snapshot); s > 0 && count < LOCI_RECORDED;
         s--) {
        if (!loci_snapshot_segment_live(query->snapshot, s - 1)) continue;
        part.count = 0;
        LOCI_TRY_GOTO(loci_segment_tokens(query, s - 1, &part, err), out);
        for (size_t i = part.count; i > 0 && count < LOCI_RECORDED; i--)
            ids[LOCI_RECORDED - ++count] = part.ids[i - 1];
    }
    loci_sequence_reset(query->slot->sequence);
    loci_sequence_jump(query->slot->sequence, query->start);
    query->params.mode = LOCI_MODE_DENSE;
    loci_corpus_settings_default(&query->settings);
    recorder->attends = true;
    if (count > 0)
        status = loci_recorder_pass(recorder, ids + LOCI_RECORDED - count, count, count, err);
    query->params.mode = mode;
    query->settings = settings;
out:
    loci_tokens_fini(&part);
    return status;
}

static loci_status record(loci_recorder *recorder, loci_error *err) {
    if (!recorder->query->causal)
        LOCI_TRY(record_sample(recorder, err));
    else if (!loci_recorder_restore(recorder, recorder->query->start))
        LOCI_TRY(record_end(recorder, err));
    if (recorder->taken > 0) return LOCI_OK;
    return loci_fail(err, LOCI_E_PRECONDITION, "the corpus has no segment to calibrate with");
}

/* --- Thresholds ----------------------------------------------------------------------------- */

/* Tokens by the binary logarithm of their score. */
typedef struct histogram {
    uint64_t bin[BINS], all;
} histogram;

static void count_tokens(histogram *h, float score, uint32_t tokens) {
    float place = score > 0 ? (log2f(score) + OCTAVES) * OCTAVE_BINS + 1 : 0;
    size_t bin = place < 1 ? 0 : place < (float)BINS ? (size_t)place : BINS - 1u;
    h->bin[bin] += tokens;
    h->all += tokens;
}

/* The score above which about `share` of the tokens lie. */
static float threshold(const histogram *h, double share) {
    double wanted = share * (double)h->all, above = 0;
    size_t bin = BINS;
    while (bin > 0 && above + (double)h->bin[bin - 1] / 2 <= wanted) above += (double)h->bin[--bin];
    return bin == 0 ? 0 : exp2f((float)(bin - 1) / OCTAVE_BINS - OCTAVES);
}

static double share_of(unsigned i) {
    return exp2(-0.5 * i);
}

/* Half of the tokens stay under the roots that are kept (section 3.4), or twice the share. */
static unsigned group_of(unsigned i) {
    return i < 3 ? 0 : i == 3 ? 1 : 2;
}

typedef struct calibration {
    loci_query *query;
    const loci_recorder *recorder;
    loci_buffer *steady;
    histogram *roots, *leaves; /* leaves: one for each group */
    float root_threshold[GROUPS];
    float *scores, *root_scores;
    uint32_t *tokens;
    size_t capacity;
} calibration;

static bool reserve(calibration *c, size_t count) {
    if (count <= c->capacity) return true;
    free(c->scores);
    free(c->root_scores);
    free(c->tokens);
    c->scores = malloc(count * sizeof *c->scores);
    c->root_scores = malloc(count * sizeof *c->root_scores);
    c->tokens = malloc(count * sizeof *c->tokens);
    c->capacity = c->scores && c->root_scores && c->tokens ? count : 0;
    return c->capacity > 0;
}

/* Counts the nodes of a level in one layer for `rows` queries together. */
static loci_status look(calibration *c, uint32_t layer, uint32_t first, uint32_t rows,
                        unsigned level, loci_error *err) {
    loci_query *query = c->query;
    const loci_model_config *config = loci_model_config_of(query->engine->model);
    const loci_backend_ops *ops = query->engine->backend->ops;
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    loci_lookup *lookup = query->slot->lookup;
    uint32_t width = config->q_heads * config->head_dim;
    size_t count = 0;
    loci_select_params params = query->params;
    params.mode = LOCI_MODE_SQUEEZED;
    params.squeezed_threshold[0] = params.squeezed_threshold[1] = 0;
    LOCI_TRY(loci_cancel_check(query->cancel));
    ops->lookup_begin(stream, lookup, query->view, layer,
                      loci_ref_at(c->recorder->q[layer], (size_t)first * width * sizeof(float)),
                      width, rows, config->q_heads,
                      loci_query_corpus_scale(query) / sqrtf((float)config->head_dim),
                      loci_ref_at(c->steady, 0), &params);
    ops->score_nodes(stream, lookup);
    ops->lookup_squeezed(stream, lookup, level, NULL, NULL, NULL, 0, &count);
    LOCI_TRY(loci_query_settle(query, stream, err));
    if (!reserve(c, count + 1))
        return loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate squeezed mode");
    ops->lookup_squeezed(stream, lookup, level, c->scores, c->tokens, c->root_scores, c->capacity,
                         &count);
    LOCI_TRY(loci_query_settle(query, stream, err));
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(c->scores[i]))
            return loci_fail(err, LOCI_E_INTERNAL, "a score of squeezed mode is not finite");
        if (level == 0) count_tokens(c->roots, c->scores[i], c->tokens[i]);
        for (uint32_t g = 0; level == 1 && g < GROUPS; g++) {
            bool kept = c->root_scores[i] > c->root_threshold[g];
            count_tokens(&c->leaves[g], kept ? c->scores[i] : 0, c->tokens[i]);
        }
    }
    return LOCI_OK;
}

/* next: queries one by one, as the next tokens of an answer come; else together, as a question's.
 */
static loci_status calibrate(calibration *c, bool next, float out[LOCI_SQUEEZED_SHARES][2],
                             loci_error *err) {
    uint32_t taken = c->recorder->taken, step = taken < SINGLE ? 1 : taken / SINGLE;
    memset(c->roots, 0, sizeof *c->roots);
    memset(c->leaves, 0, GROUPS * sizeof *c->leaves);
    for (unsigned level = 0; level < 2; level++) {
        for (uint32_t layer = c->query->settings.dense_layers;
             layer < c->query->engine->geometry.retrieval_layers; layer++) {
            if (!next) LOCI_TRY(look(c, layer, 0, taken, level, err));
            for (uint32_t row = 0; next && row < taken; row += step)
                LOCI_TRY(look(c, layer, row, 1, level, err));
        }
        for (uint32_t g = 1; level == 0 && g < GROUPS; g++)
            c->root_threshold[g] = threshold(c->roots, share_of(g));
    }
    for (unsigned i = 0; i < LOCI_SQUEEZED_SHARES; i++) {
        out[i][0] = c->root_threshold[group_of(i)];
        out[i][1] = threshold(&c->leaves[group_of(i)], share_of(i));
    }
    return LOCI_OK;
}

static loci_status compute(loci_query *query, loci_squeezed_table *out, loci_error *err) {
    loci_backend *backend = query->engine->backend;
    const loci_corpus_view *view = query->view;
    loci_recorder recorder;
    calibration c = {.query = query, .recorder = &recorder};
    const loci_model_config *config = loci_model_config_of(query->engine->model);
    size_t steady = (size_t)LOCI_RECORDED * config->q_heads;
    uint64_t bytes = loci_recorder_bytes(config, query->causal) + (GROUPS + 1) * sizeof(histogram) +
                     2 * view->tokens * view->kv_heads;
    loci_status status;
    LOCI_TRY(loci_query_reserve(query, bytes, "calibrating mode squeezed", err));
    LOCI_TRY_GOTO(loci_recorder_open(query, &recorder, err), out);
    LOCI_TRY_GOTO(record(&recorder, err), out);
    LOCI_TRY_GOTO(backend->ops->alloc(backend, steady * sizeof(float), &c.steady, err), out);
    c.roots = malloc(sizeof *c.roots);
    c.leaves = malloc(GROUPS * sizeof *c.leaves);
    if (!c.roots || !c.leaves) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate squeezed mode");
        goto out;
    }
    for (int next = 0; next < 2; next++)
        LOCI_TRY_GOTO(calibrate(&c, next != 0, out->threshold[next], err), out);
    status = LOCI_OK;
out:
    backend->ops->free(backend, c.steady);
    free(c.roots);
    free(c.leaves);
    free(c.scores);
    free(c.root_scores);
    free(c.tokens);
    loci_recorder_close(&recorder);
    loci_query_give_back(query, bytes);
    return status;
}

/* --- The table ------------------------------------------------------------------------------ */

/* The note: u64 revision, u32 dense layers, f32 scale, f32 thresholds. */
static void write_table(const loci_query *query, const loci_squeezed_table *table) {
    loci_buf out = LOCI_BUF_INIT;
    loci_error err = {0};
    loci_buf_u64(&out, table->revision);
    loci_buf_u32(&out, table->dense_layers);
    loci_buf_append(&out, &table->scale, sizeof table->scale);
    loci_buf_append(&out, table->threshold, sizeof table->threshold);
    if (out.failed ||
        loci_corpus_note_put(query->engine->store, loci_snapshot_info(query->snapshot),
                             LOCI_NOTE_THRESHOLDS, loci_slice_of(out.data, out.len), &err))
        loci_log_warn("thresholds of squeezed mode are not kept: %s",
                      out.failed ? "no memory" : err.text);
    loci_buf_fini(&out);
}

/* False unless there is one of the table's revision, dense layers and scale. */
static bool read_table(const loci_query *query, loci_squeezed_table *table) {
    loci_buf note = LOCI_BUF_INIT;
    loci_squeezed_table found;
    size_t head = sizeof(uint64_t) + sizeof(uint32_t) + sizeof(float);
    bool good = loci_corpus_note_get(query->engine->store, loci_snapshot_info(query->snapshot),
                                     LOCI_NOTE_THRESHOLDS, &note, NULL) == LOCI_OK &&
                note.len == head + sizeof found.threshold;
    if (good) {
        memcpy(&found.revision, note.data, sizeof found.revision);
        memcpy(&found.dense_layers, note.data + 8, sizeof found.dense_layers);
        memcpy(&found.scale, note.data + 12, sizeof found.scale);
        memcpy(found.threshold, note.data + head, sizeof found.threshold);
        const float *value = &found.threshold[0][0][0];
        for (size_t i = 0; i < sizeof found.threshold / sizeof *value; i++)
            good = good && value[i] >= 0 && value[i] <= 1;
        good = good && found.revision == table->revision &&
               found.dense_layers == table->dense_layers && found.scale == table->scale;
    }
    if (good) memcpy(table->threshold, found.threshold, sizeof found.threshold);
    loci_buf_fini(&note);
    return good;
}

void loci_squeezed_choose(const loci_squeezed_table *table, double share, float out[2][2]) {
    unsigned i = 0;
    while (i + 2 < LOCI_SQUEEZED_SHARES && share < share_of(i + 1)) i++;
    /* Between two shares too, scores fall about as the share grows. */
    double least = share_of(i + 1), far = (1 / share - 1 / least) / (1 / share_of(i) - 1 / least);
    for (int next = 0; next < 2; next++) {
        const float(*at)[2] = &table->threshold[next][i];
        for (int level = 0; level < 2; level++) {
            double high = (double)at[1][level], low = (double)at[0][level];
            /* Below the least share: scores of so few tokens grow about as it falls. */
            double value =
                far >= 0 ? far * low + (1 - far) * high : high * (level ? least / share : 1);
            out[next][level] = (float)value;
        }
    }
}

loci_status loci_query_squeezed(loci_query *query, double share, loci_error *err) {
    loci_engine *engine = query->engine;
    const loci_corpus_info *info = loci_snapshot_info(query->snapshot);
    if (query->view->extent_count == 0) return LOCI_OK; /* all flat: nothing to cut */
    loci_squeezed_table table = {.uid = info->uid,
                                 .revision = info->revision,
                                 .dense_layers = query->settings.dense_layers,
                                 .scale = loci_query_corpus_scale(query)};
    pthread_mutex_lock(&engine->lock);
    const loci_squeezed_table *last = &engine->squeezed;
    bool known = last->uid == table.uid && last->revision == table.revision &&
                 last->dense_layers == table.dense_layers && last->scale == table.scale;
    if (known) table = *last;
    pthread_mutex_unlock(&engine->lock);
    if (!known && !read_table(query, &table)) {
        const loci_usage usage = query->usage; /* what the table costs is not the answer's */
        const uint64_t step_bytes = query->step_bytes;
        loci_status status = compute(query, &table, err);
        query->usage = usage;
        query->step_bytes = step_bytes;
        LOCI_TRY(status);
        write_table(query, &table);
    }
    pthread_mutex_lock(&engine->lock);
    engine->squeezed = table;
    pthread_mutex_unlock(&engine->lock);
    loci_squeezed_choose(&table, share, query->squeezed);
    return LOCI_OK;
}
