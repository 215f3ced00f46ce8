/* SPDX-License-Identifier: Apache-2.0
 *
 * What independent encoding costs a corpus, and the temperature and scale under which it costs
 * least: passages of the corpus are read before the text that follows them, once as one sequence
 * (causal), once encoded apart and looked at as a question looks at an independent corpus in mode
 * dense. Compared are the losses of that text's next tokens.
 *
 * Bounded: at most SAMPLES texts, none begun after SECONDS_MOST; CONTEXT passages are in memory at
 * a time, reserved in the budget. Deterministic but for that bound.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "services/engine/query.h"

#define SAMPLES 16u
#define CONTEXT 4u /* passages before a text */
#define TEXT_LEAST 16u
#define TEXT_MOST 64u
#define LOGIT_ROWS 8u /* logits in memory at a time */
#define SECONDS_MOST 60.0
#define SEED 0xca11bu

/* Published settings lie in this range (APE, arXiv 2502.05431, section 6). */
static const float temperatures[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.5f};
static const float scales[] = {1.0f, 0.9f, 0.8f};

typedef struct comparison {
    loci_query *query; /* admission, snapshot */
    loci_query look;   /* what looks at the passages encoded apart */
    loci_slot slot;    /* its own sequence */
    loci_calibration *out;
    uint64_t reserved;
    /* One sample. */
    uint32_t text[TEXT_MOST], text_count;
    uint32_t likeliest[TEXT_MOST]; /* by the causal reading */
    loci_tokens context;           /* passages, each behind the begin token */
    uint32_t begin[CONTEXT + 1], passages;
    /* Their keys and values without the begin token's. */
    loci_corpus_view view;
    uint32_t flat_begin[CONTEXT + 1];
    uint16_t *rows, *flat; /* [pairs][K, V][SEGMENT][dim]; [layers][K, V][tokens][heads][dim] */
    uint16_t **pair;       /* into rows: all K, then all V */
    loci_buffer **flat_buffers;
    double loss[LOCI_CALIBRATION_ROWS][SAMPLES];
} comparison;

static uint32_t kv_floats(const loci_engine *engine) {
    return engine->geometry.kv_heads * engine->geometry.head_dim;
}

/* --- Sampling ------------------------------------------------------------------------------- */

static loci_status add_passage(comparison *c, uint32_t segment, loci_error *err) {
    uint32_t first = loci_model_specials(c->query->engine->model)->begin;
    loci_status status = loci_tokens_push(&c->context, first, 0);
    if (status != LOCI_OK) return loci_fail(err, status, "no memory for a passage");
    LOCI_TRY(loci_segment_tokens(c->query, segment, &c->context, err));
    c->begin[++c->passages] = (uint32_t)c->context.count;
    return LOCI_OK;
}

/* The passages before `segment`: those of its document, or else any. */
static loci_status choose_context(comparison *c, uint32_t segment, loci_error *err) {
    const loci_snapshot *snapshot = c->query->snapshot;
    loci_segment_info own, other;
    uint32_t found[CONTEXT], count = 0;
    LOCI_TRY(loci_snapshot_segment(snapshot, segment, &own, err));
    for (int any = 0; any < 2 && count == 0; any++) {
        for (uint32_t s = segment; s > 0 && count < CONTEXT; s--) {
            if (!loci_snapshot_segment_live(snapshot, s - 1)) continue;
            LOCI_TRY(loci_snapshot_segment(snapshot, s - 1, &other, err));
            if (!any && strcmp(own.document, other.document) != 0) break;
            found[count++] = s - 1;
        }
    }
    c->context.count = c->passages = 0;
    while (count > 0) LOCI_TRY(add_passage(c, found[--count], err));
    return LOCI_OK;
}

/* *good false: the segment is dead, too short or has nothing before it. */
static loci_status choose_sample(comparison *c, uint32_t segment, bool *good, loci_error *err) {
    *good = false;
    if (!loci_snapshot_segment_live(c->query->snapshot, segment)) return LOCI_OK;
    loci_tokens tokens = {0};
    loci_status status = loci_segment_tokens(c->query, segment, &tokens, err);
    c->text_count = tokens.count < TEXT_MOST ? (uint32_t)tokens.count : TEXT_MOST;
    memcpy(c->text, tokens.ids, c->text_count * sizeof *c->text);
    loci_tokens_fini(&tokens);
    if (status != LOCI_OK || c->text_count < TEXT_LEAST) return status;
    LOCI_TRY(choose_context(c, segment, err));
    *good = c->passages > 0;
    return LOCI_OK;
}

/* --- Reading -------------------------------------------------------------------------------- */

static uint32_t likeliest(const float *logits, uint32_t vocab) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static double loss_of(const float *logits, uint32_t vocab, uint32_t token) {
    double most = (double)logits[likeliest(logits, vocab)], sum = 0;
    for (uint32_t i = 0; i < vocab; i++) sum += exp((double)logits[i] - most);
    return most + log(sum) - (double)logits[token];
}

/* Appends the text; the sum of the losses of all its tokens but the first, and how many of them
 * are the causal reading's likeliest (said NULL), or that. */
static loci_status read_text(comparison *c, double *loss, uint32_t *said, uint64_t *agreed,
                             loci_error *err) {
    loci_sequence *sequence = c->slot.sequence;
    uint32_t vocab = loci_model_config_of(c->query->engine->model)->vocab;
    *loss = 0;
    for (uint32_t at = 0; at < c->text_count; at += LOGIT_ROWS) {
        uint32_t rows = c->text_count - at < LOGIT_ROWS ? c->text_count - at : LOGIT_ROWS;
        LOCI_TRY(
            loci_sequence_append(sequence, c->text + at, rows, rows, -1, c->query->cancel, err));
        const float *logits = loci_sequence_logits(sequence);
        if (!logits) return loci_fail(err, LOCI_E_INTERNAL, "no logits to calibrate with");
        for (uint32_t i = 0; i < rows && at + i + 1 < c->text_count; i++, logits += vocab) {
            uint32_t next = likeliest(logits, vocab);
            *loss += loss_of(logits, vocab, c->text[at + i + 1]);
            if (said) said[at + i] = next;
            if (agreed) *agreed += next == c->likeliest[at + i];
        }
    }
    return LOCI_OK;
}

/* As one sequence, with the passages or without. */
static loci_status read_causal(comparison *c, bool passages, double *loss, loci_error *err) {
    loci_sequence *sequence = c->slot.sequence;
    const uint32_t *ids = c->context.ids;
    loci_sequence_reset(sequence);
    loci_sequence_set_attend(sequence, NULL, NULL, NULL);
    LOCI_TRY(loci_sequence_append(sequence, ids, 1, 0, -1, c->query->cancel, err));
    for (uint32_t p = 0; p < c->passages && passages; p++)
        LOCI_TRY(loci_sequence_append(sequence, ids + c->begin[p] + 1,
                                      c->begin[p + 1] - c->begin[p] - 1, 0, -1, c->query->cancel,
                                      err));
    return read_text(c, loss, passages ? c->likeliest : NULL, NULL, err);
}

/* Moves the rows of a passage, [pair][tokens][dim], to their places among those of all. */
static void spread(comparison *c, uint32_t first, uint32_t tokens) {
    const loci_geometry *g = &c->query->engine->geometry;
    size_t width = kv_floats(c->query->engine), layer = (size_t)c->view.flat_tokens * width;
    uint32_t pairs = g->retrieval_layers * g->kv_heads;
    for (uint32_t i = 0; i < 2 * pairs; i++) {
        uint32_t pair = i % pairs, value = i / pairs;
        uint16_t *to = c->flat + (2 * (size_t)(pair / g->kv_heads) + value) * layer +
                       pair % g->kv_heads * (size_t)g->head_dim;
        for (uint32_t t = 0; t < tokens; t++) /* the begin token's row is left out */
            memcpy(to + (first + t) * width, c->pair[i] + (size_t)(t + 1) * g->head_dim,
                   g->head_dim * sizeof *to);
    }
}

/* The passages, each by itself, as the flat segments of a corpus. */
static loci_status encode_apart(comparison *c, loci_error *err) {
    loci_engine *engine = c->query->engine;
    const loci_backend_ops *ops = engine->backend->ops;
    uint32_t layers = engine->geometry.retrieval_layers, pairs = layers * c->view.kv_heads;
    loci_encode_out out = {c->pair, c->pair + pairs};
    c->view.flat_tokens = c->begin[c->passages] - c->passages;
    for (uint32_t p = 0; p < c->passages; p++) {
        LOCI_TRY(loci_model_encode(engine->model, c->context.ids, c->begin + p, 1, &out,
                                   c->query->cancel, err));
        c->flat_begin[p + 1] = c->flat_begin[p] + c->begin[p + 1] - c->begin[p] - 1;
        spread(c, c->flat_begin[p], c->flat_begin[p + 1] - c->flat_begin[p]);
    }
    size_t rows = (size_t)c->view.flat_tokens * kv_floats(engine);
    for (uint32_t i = 0; i < 2 * layers; i++) {
        uint32_t at = i / 2 + i % 2 * layers; /* all K, then all V */
        ops->free(engine->backend, c->flat_buffers[at]);
        c->flat_buffers[at] = NULL;
        LOCI_TRY(ops->wrap(engine->backend, c->flat + i * rows, rows * sizeof *c->flat,
                           &c->flat_buffers[at], err));
    }
    c->slot.serial++; /* another view */
    c->view.flat_segments = c->passages;
    c->view.live_segments = c->passages;
    c->view.tokens = c->view.flat_tokens;
    return LOCI_OK;
}

static loci_status read_apart(comparison *c, loci_calibration_row *row, double *loss,
                              loci_error *err) {
    loci_sequence *sequence = c->slot.sequence;
    uint64_t agreed = 0;
    c->look.settings.attn_temperature = row->temperature;
    c->look.settings.attn_scale = row->scale;
    loci_sequence_reset(sequence);
    loci_sequence_jump(sequence, c->query->engine->question_start);
    loci_sequence_set_attend(sequence, loci_corpus_attend, loci_corpus_attended, &c->look);
    loci_sequence_scale_attention(sequence, loci_query_attention_scale(&c->look));
    LOCI_TRY(read_text(c, loss, NULL, &agreed, err));
    row->agreement += (double)agreed;
    return LOCI_OK;
}

static loci_status compare_sample(comparison *c, loci_error *err) {
    loci_calibration *out = c->out;
    double loss;
    LOCI_TRY(read_causal(c, true, &loss, err));
    out->causal_loss += loss;
    LOCI_TRY(read_causal(c, false, &loss, err));
    out->alone_loss += loss;
    LOCI_TRY(encode_apart(c, err));
    for (uint32_t i = 0; i < out->row_count; i++) {
        LOCI_TRY(read_apart(c, &out->rows[i], &loss, err));
        out->rows[i].loss += loss;
        c->loss[i][out->samples] = loss / (c->text_count - 1);
    }
    out->tokens += c->text_count - 1;
    out->context_tokens += c->view.flat_tokens;
    out->samples++;
    return LOCI_OK;
}

static loci_status compare_samples(comparison *c, loci_error *err) {
    uint32_t segments = loci_snapshot_segments(c->query->snapshot), tried[4 * SAMPLES], tries = 0;
    uint64_t state = SEED, begun = loci_now_ns();
    loci_calibration *out = c->out;
    while (tries < 4 * SAMPLES && out->samples < SAMPLES && segments > 1) {
        uint32_t segment = 1 + (uint32_t)(loci_rng_next(&state) % (segments - 1)), before = 0;
        while (before < tries && tried[before] != segment) before++;
        tried[tries++] = segment;
        if (before + 1 < tries) continue;
        bool good;
        LOCI_TRY(choose_sample(c, segment, &good, err));
        if (good) LOCI_TRY(compare_sample(c, err));
        out->seconds = (double)(loci_now_ns() - begun) / 1e9;
        if (out->seconds > SECONDS_MOST) break;
    }
    if (out->samples > 0) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_PRECONDITION, "TOO_SHORT",
                            "corpus %s has no two searchable passages to calibrate with",
                            loci_snapshot_info(c->query->snapshot)->name);
}

/* --- The result ----------------------------------------------------------------------------- */

/* Sums become means; the best row is that of the least loss, the first of equal ones. */
static void conclude(comparison *c) {
    loci_calibration *out = c->out;
    double tokens = (double)out->tokens;
    out->causal_loss /= tokens;
    out->alone_loss /= tokens;
    out->context_tokens /= out->samples;
    for (uint32_t i = 0; i < out->row_count; i++) {
        loci_calibration_row *row = &out->rows[i];
        double mean = 0, square = 0;
        for (uint32_t s = 0; s < out->samples; s++) mean += c->loss[i][s] - c->loss[0][s];
        mean /= out->samples;
        for (uint32_t s = 0; s < out->samples; s++) {
            double off = c->loss[i][s] - c->loss[0][s] - mean;
            square += off * off;
        }
        row->loss /= tokens;
        row->agreement /= tokens;
        row->error =
            out->samples > 1 ? sqrt(square / (out->samples - 1.0) / (double)out->samples) : 0;
        if (row->loss < out->rows[out->best].loss) out->best = i;
    }
}

static void make_rows(const loci_corpus_settings *now, loci_calibration *out) {
    bool there = false;
    for (size_t s = 0; s < sizeof scales / sizeof *scales; s++) {
        for (size_t t = 0; t < sizeof temperatures / sizeof *temperatures; t++) {
            bool present = now->attn_temperature == temperatures[t] && now->attn_scale == scales[s];
            there = there || present;
            out->rows[out->row_count++] =
                (loci_calibration_row){temperatures[t], scales[s], 0, 0, 0, present};
        }
    }
    if (!there)
        out->rows[out->row_count++] =
            (loci_calibration_row){now->attn_temperature, now->attn_scale, 0, 0, 0, true};
}

static loci_status open_comparison(comparison *c, loci_error *err) {
    loci_engine *engine = c->query->engine;
    const loci_geometry *g = &engine->geometry;
    const loci_model_config *config = loci_model_config_of(engine->model);
    uint32_t pairs = g->retrieval_layers * g->kv_heads, tokens = CONTEXT * g->segment_tokens;
    size_t passage = (size_t)(g->segment_tokens + 1) * g->head_dim, width = kv_floats(engine);
    size_t flat = 2 * (size_t)g->retrieval_layers * tokens * width * sizeof *c->flat;
    size_t rows = 2 * pairs * passage * sizeof *c->rows;
    uint32_t longest = 1 + tokens + TEXT_MOST;
    bool on_device = engine->backend->ops->on_device;
    uint64_t bytes = loci_plan_slot_bytes(config, on_device, longest) +
                     loci_plan_encode_bytes(config, on_device, g->segment_tokens + 1) + flat +
                     rows + 2ull * LOGIT_ROWS * config->vocab * sizeof(float);
    LOCI_TRY(loci_query_reserve(c->query, bytes, "comparing encodings of a corpus", err));
    c->reserved = bytes;
    c->flat = malloc(flat);
    c->rows = malloc(rows);
    c->pair = calloc(2 * (size_t)pairs, sizeof *c->pair);
    c->flat_buffers = calloc(2 * (size_t)g->retrieval_layers, sizeof(loci_buffer *));
    if (!c->flat || !c->rows || !c->pair || !c->flat_buffers)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate with");
    for (uint32_t i = 0; i < 2 * pairs; i++) c->pair[i] = c->rows + i * passage;
    c->view = (loci_corpus_view){.retrieval_layers = g->retrieval_layers,
                                 .kv_heads = g->kv_heads,
                                 .head_dim = g->head_dim,
                                 .flat_k = c->flat_buffers,
                                 .flat_v = c->flat_buffers + g->retrieval_layers,
                                 .flat_segment_begin = c->flat_begin,
                                 .sink_k = c->query->view->sink_k,
                                 .sink_v = c->query->view->sink_v,
                                 .has_sink = c->query->view->has_sink};
    c->look = (loci_query){.engine = engine,
                           .slot = &c->slot,
                           .snapshot = c->query->snapshot,
                           .view = &c->view,
                           .cancel = c->query->cancel};
    loci_select_defaults(&c->look.params);
    c->look.params.mode = LOCI_MODE_DENSE;
    LOCI_TRY(engine->backend->ops->lookup_create(engine->backend, &c->slot.lookup, err));
    return loci_sequence_open(engine->model, longest, &c->slot.sequence, err);
}

static void close_comparison(comparison *c) {
    loci_backend *backend = c->query->engine->backend;
    loci_slot_close(c->query->engine, &c->slot);
    for (uint32_t i = 0; c->flat_buffers && i < 2 * c->view.retrieval_layers; i++)
        backend->ops->free(backend, c->flat_buffers[i]);
    loci_tokens_fini(&c->context);
    free(c->flat_buffers);
    free(c->pair);
    free(c->rows);
    free(c->flat);
    loci_query_give_back(c->query, c->reserved);
    free(c);
}

/* Fills what is compared; the query goes on being the caller's. */
static loci_status compare(loci_query *query, loci_calibration *out, loci_error *err) {
    comparison *c = calloc(1, sizeof *c);
    if (!c) return loci_fail(err, LOCI_E_NOMEM, "no memory to calibrate with");
    c->query = query;
    c->out = out;
    loci_status status;
    LOCI_TRY_GOTO(open_comparison(c, err), out);
    make_rows(&query->settings, out);
    LOCI_TRY_GOTO(compare_samples(c, err), out);
    conclude(c);
out:
    close_comparison(c);
    return status;
}

/* The best row's settings become those of the corpus that was looked at, and the query's. */
static loci_status apply_best(loci_query *query, loci_calibration *out, loci_error *err) {
    const loci_corpus_info *looked_at = loci_snapshot_info(query->snapshot);
    const loci_calibration_row *best = &out->rows[out->best];
    const loci_settings_change change = {-1, (double)best->temperature, (double)best->scale};
    loci_corpus_info now;
    LOCI_TRY(
        loci_corpus_set(query->engine->store, looked_at->name, looked_at->uid, &change, &now, err));
    query->settings = now.settings;
    out->applied = true;
    return LOCI_OK;
}

loci_status loci_engine_calibrate(loci_engine *engine, const char *corpus, bool apply,
                                  const loci_cancel *cancel, loci_calibration *out,
                                  loci_error *err) {
    loci_query query;
    loci_status status;
    *out = (loci_calibration){0};
    /* A question like others, which waits for its turn. */
    LOCI_TRY_GOTO(loci_query_init(&query, engine, corpus, "?", 0, cancel, err), out);
    out->comparable = query.engine->stock; /* of the corpus's own model */
    out->causal = query.causal;
    out->revision = loci_snapshot_info(query.snapshot)->revision;
    if (out->comparable && apply && query.causal) {
        status = loci_fail_reason(err, LOCI_E_PRECONDITION, "ENCODING",
                                  "corpus %s is causal: it is encoded as its model reads, there is "
                                  "no better temperature or scale to apply",
                                  corpus);
        goto out;
    }
    if (out->comparable) LOCI_TRY_GOTO(compare(&query, out, err), out);
    if (out->comparable && apply) LOCI_TRY_GOTO(apply_best(&query, out, err), out);
    if (query.view->extent_count > 0) {
        LOCI_TRY_GOTO(loci_query_squeezed(&query, 1, err), out);
        out->thresholds = true;
    }
    status = LOCI_OK;
out:
    loci_query_fini(&query);
    return status;
}
