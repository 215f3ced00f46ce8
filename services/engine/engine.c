/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening and closing a node's engine; the encoder that the registration pipeline uses; requests.
 */
#include "services/engine/engine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/half.h"
#include "base/log.h"
#include "base/pool.h"
#include "services/engine/query.h"

#define SEGMENT_TOKENS 255u
#define HEAD_DIM_UNIT 16u /* memory/FORMAT.md, section 5 */
/* The longest prompt with one passage, and its answer. */
#define SEQUENCE_TOKENS (2 * LOCI_QUESTION_TOKENS_MAX + SEGMENT_TOKENS + LOCI_ANSWER_TOKENS_MAX + 8)
#define DENSE_LAYERS 2u
#define DEFAULT_SHARE 0.1 /* of mode squeezed */
/* A stock model reads several passages in one prompt, as far as it has positions. */
#define STOCK_PASSAGES 4u
#define STOCK_PASSAGE_TOKENS (SEGMENT_TOKENS + 16)

static loci_status encoder_split(void *ctx, loci_slice text, uint64_t from, uint32_t segments_max,
                                 const loci_split **out, loci_error *err) {
    loci_engine *engine = ctx;
    return loci_splitter_split(engine->splitter, text, from, segments_max, out, err);
}

static loci_status encoder_encode(void *ctx, const uint32_t *tokens, const uint32_t *begin,
                                  uint32_t segments, uint16_t *const *k, uint16_t *const *v,
                                  const loci_cancel *cancel, loci_error *err) {
    loci_engine *engine = ctx;
    loci_encode_out out = {k, v};
    return loci_model_encode(engine->model, tokens, begin, segments, &out, cancel, err);
}

/* K and V of the shared prefix token: it sees only itself, so they are the same in every segment.
 */
static loci_status compute_sink(loci_engine *engine, loci_error *err) {
    const loci_geometry *geometry = &engine->geometry;
    uint32_t pairs = geometry->retrieval_layers * geometry->kv_heads, dim = geometry->head_dim;
    uint16_t *rows = calloc((size_t)pairs * 2 * dim, sizeof *rows);
    uint16_t **k = calloc((size_t)pairs * 2, sizeof *k), **v = k ? k + pairs : NULL;
    engine->sink_k = calloc((size_t)pairs * dim, sizeof(float));
    engine->sink_v = calloc((size_t)pairs * dim, sizeof(float));
    loci_status status = LOCI_OK;
    if (!rows || !k || !engine->sink_k || !engine->sink_v)
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for the shared prefix");
    if (status == LOCI_OK) {
        for (uint32_t p = 0; p < pairs; p++) {
            k[p] = rows + (size_t)p * dim;
            v[p] = rows + (size_t)(pairs + p) * dim;
        }
        uint32_t token = loci_model_specials(engine->model)->begin;
        const uint32_t begin[2] = {0, 1};
        status = encoder_encode(engine, &token, begin, 1, k, v, NULL, err);
    }
    for (size_t i = 0; status == LOCI_OK && i < (size_t)pairs * dim; i++) {
        engine->sink_k[i] = loci_bf16_to_f32(rows[i]);
        engine->sink_v[i] = loci_bf16_to_f32(rows[(size_t)pairs * dim + i]);
    }
    free(rows);
    free(k);
    return status;
}

/* The built-in model was trained to rank in its first retrieval layer; of others a middle one is
 * taken, where attention goes by meaning more than in the first and the last ones. */
static loci_geometry shape_of(const loci_model *model) {
    const loci_model_config *config = loci_model_config_of(model);
    uint32_t middle = config->retrieval_count / 2;
    return (loci_geometry){.retrieval_layers = config->retrieval_count,
                           .kv_heads = config->kv_heads,
                           .head_dim = config->head_dim,
                           .ranking_layer = loci_model_is_built_in(model) ? 0 : middle,
                           .segment_tokens = SEGMENT_TOKENS,
                           .has_sink = true};
}

static void set_geometry(loci_engine *engine) {
    loci_geometry *geometry = &engine->geometry;
    *geometry = shape_of(engine->model);
    snprintf(geometry->fingerprint, sizeof geometry->fingerprint, "%s",
             loci_model_fingerprint(engine->model));
}

/* A segment's positions are 0 to SEGMENT_TOKENS; where keys of the retrieval layers carry theirs,
 * what looks at the corpus stands behind it. */
static uint32_t question_start(const loci_model_config *config) {
    for (uint32_t i = 0; i < config->retrieval_count; i++)
        if (config->layer[config->retrieval_layer[i]].rope) return SEGMENT_TOKENS + 1;
    return 0;
}

static loci_status choose_precision(const char *name, loci_backend *backend, loci_dtype *out,
                                    loci_error *err) {
    if (!name || strcmp(name, "auto") == 0) {
        bool fast = strstr(backend->ops->describe(backend), "bf16") != NULL;
        *out = fast ? LOCI_BF16 : LOCI_F32;
        return LOCI_OK;
    }
    if (strcmp(name, "f32") == 0 || strcmp(name, "bf16") == 0) {
        *out = name[0] == 'f' ? LOCI_F32 : LOCI_BF16;
        return LOCI_OK;
    }
    return loci_fail(err, LOCI_E_INVAL, "precision %s is not known; auto, f32 or bf16 is", name);
}

/* What no memory and no weights would change comes first. *tokens: of the sequence that questions
 * run on; *room: of them, for what looks at a corpus. */
static loci_status check_model(const loci_model *model, uint32_t *tokens, uint32_t *room,
                               loci_error *err) {
    const loci_model_config *config = loci_model_config_of(model);
    bool stock = !loci_model_is_built_in(model);
    uint32_t around = 0;
    if (config->head_dim % HEAD_DIM_UNIT != 0)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_HEAD_DIM",
                                "the attention heads of this %s have %u channels (head_dim); the "
                                "index of a corpus needs a multiple of %u",
                                config->architecture, config->head_dim, HEAD_DIM_UNIT);
    if (stock) LOCI_TRY(loci_stock_prompt_tokens(model, &around, err));
    uint32_t least = SEQUENCE_TOKENS + around;
    if (config->positions_max < least)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_POSITIONS",
                                "this %s has %u positions (max_position_embeddings); questions, "
                                "passages and answers need %u",
                                config->architecture, config->positions_max, least);
    uint32_t most = stock ? least + (STOCK_PASSAGES - 1) * STOCK_PASSAGE_TOKENS : least;
    *tokens = most < config->positions_max ? most : config->positions_max;
    *room = around + LOCI_QUESTION_TOKENS_MAX + LOCI_ANSWER_TOKENS_MAX + 8;
    return LOCI_OK;
}

loci_status loci_engine_check_model(const char *dir, loci_error *err) {
    loci_model *model;
    LOCI_TRY(loci_model_prepare(dir, &model, err));
    uint32_t tokens, room;
    loci_status status = check_model(model, &tokens, &room, err);
    loci_model_close(model);
    return status;
}

/* --- Memory ----------------------------------------------------------------------------- */

static loci_status tokenizer_bytes(const char *model, uint64_t *out, loci_error *err) {
    loci_buf path = LOCI_BUF_INIT;
    struct stat tokenizer = {0};
    loci_buf_printf(&path, "%s/tokenizer.json", model);
    loci_status status = loci_buf_status(&path);
    if (status == LOCI_OK) (void)stat(loci_buf_text(&path), &tokenizer); /* has just been read */
    if (status != LOCI_OK) loci_fail(err, status, "no memory for a path");
    loci_buf_fini(&path);
    *out = (uint64_t)tokenizer.st_size;
    return status;
}

/* Shares the budget out before the weights are there. */
static loci_status plan_memory(loci_engine *engine, const loci_engine_options *options,
                               loci_dtype precision, loci_error *err) {
    loci_geometry shape = shape_of(engine->model);
    loci_plan_request request = {.config = loci_model_config_of(engine->model),
                                 .geometry = &shape,
                                 .precision = precision,
                                 .on_device = engine->backend->ops->on_device,
                                 .threads = loci_pool_threads(loci_backend_pool(engine->backend)),
                                 .pairs_overlap = loci_pairs_ahead(engine->backend, 1) > 0,
                                 .calls_bytes = options->calls_bytes,
                                 .sequence_tokens = engine->sequence_tokens,
                                 .queries = options->queries_max,
                                 .limit = options->memory_bytes ? options->memory_bytes
                                                                : loci_plan_default_limit()};
    LOCI_TRY(tokenizer_bytes(options->model, &request.tokenizer_bytes, err));
    LOCI_TRY(loci_model_can_map(options->model, engine->backend, precision, &request.can_map, err));
    if (engine->also) {
        request.also_config = loci_model_config_of(engine->also->model);
        request.also_sequence_tokens = engine->also->sequence_tokens;
        LOCI_TRY(tokenizer_bytes(options->also_model, &request.also_tokenizer_bytes, err));
        LOCI_TRY(loci_model_can_map(options->also_model, engine->backend, precision,
                                    &request.also_can_map, err));
    }
    LOCI_TRY(loci_plan_make(&request, &engine->plan, err));
    LOCI_TRY(loci_budget_create(request.limit, &engine->budget, err));
    return loci_plan_take(&engine->plan, engine->budget, err);
}

static loci_status lookup_memory(void *ctx, int64_t bytes, loci_error *err) {
    loci_engine *engine = ctx;
    if (bytes >= 0)
        return loci_budget_take(engine->budget, LOCI_MEMORY_LOOKUPS, (uint64_t)bytes, "a look-up",
                                err);
    loci_budget_give(engine->budget, LOCI_MEMORY_LOOKUPS, (uint64_t)-bytes);
    return LOCI_OK;
}

/* Frees the look-ups of idle slots; a question makes a new one. */
static void idle_lookups_let_go(void *ctx) {
    loci_engine *engine = ctx;
    if (engine->also) idle_lookups_let_go(engine->also);
    for (unsigned i = 0; i < engine->slot_count; i++) {
        loci_lookup *idle = NULL;
        pthread_mutex_lock(&engine->lock);
        loci_slot *slot = &engine->slots[i];
        if (!slot->busy) {
            idle = slot->lookup;
            slot->lookup = NULL;
        }
        pthread_mutex_unlock(&engine->lock);
        if (idle) engine->backend->ops->lookup_free(engine->backend, idle);
    }
}

static void watch_memory(loci_engine *engine) {
    loci_backend *backend = engine->backend;
    if (backend->ops->lookup_account) backend->ops->lookup_account(backend, lookup_memory, engine);
    loci_budget_on_shortage(engine->budget, idle_lookups_let_go, engine);
}

static loci_status open_slots(loci_engine *engine, unsigned count, loci_error *err) {
    engine->slots = calloc(count, sizeof *engine->slots);
    if (!engine->slots) return loci_fail(err, LOCI_E_NOMEM, "no memory for %u questions", count);
    engine->slot_count = count;
    uint32_t tokens = engine->sequence_tokens;
    if (count > 1) LOCI_TRY(loci_batch_open(engine->model, count, tokens, &engine->batch, err));
    for (unsigned i = 0; i < count; i++) {
        loci_sequence **sequence = &engine->slots[i].sequence;
        LOCI_TRY(engine->batch ? loci_batch_add(engine->batch, sequence, err)
                               : loci_sequence_open(engine->model, tokens, sequence, err));
    }
    return LOCI_OK;
}

void loci_slot_close(loci_engine *engine, loci_slot *slot) {
    loci_backend *backend = engine->backend;
    loci_sequence_close(slot->sequence);
    if (slot->lookup) backend->ops->lookup_free(backend, slot->lookup);
    backend->ops->free(backend, slot->part);
    backend->ops->free(backend, slot->row);
    backend->ops->free(backend, slot->mass);
}

static void close_slots(loci_engine *engine) {
    for (unsigned i = 0; i < engine->slot_count; i++) {
        loci_slot_close(engine, &engine->slots[i]);
    }
    loci_batch_close(engine->batch);
    for (uint32_t i = 0; i < LOCI_ATTEND_GROUPS; i++)
        loci_company_close(engine, &engine->company[i]);
    free(engine->slots);
}

static loci_status open_store(loci_engine *engine, const char *data, loci_error *err) {
    if (mkdir(data, 0700) != 0 && errno != EEXIST)
        return loci_fail(err, LOCI_E_IO, "cannot make data directory %s: %s", data,
                         strerror(errno));
    loci_store_options options;
    loci_store_options_default(&options);
    options.memory_bytes = engine->plan.database;
    options.document_bytes_max = engine->plan.document_bytes_max;
    options.extent_kv_bytes = engine->plan.extent_kv_bytes;
    options.merge_tokens = engine->plan.merge_tokens;
    options.seal_beside = engine->plan.seal_beside;
    options.budget = engine->budget;
    options.fingerprint = engine->geometry.fingerprint;
    LOCI_TRY(loci_store_open(data, &options, engine->backend, &engine->store, err));
    loci_encoder encoder = {engine, engine->geometry, encoder_split, encoder_encode,
                            loci_encode_after};
    return loci_ingest_start(engine->store, &encoder, loci_backend_pool(engine->backend),
                             &engine->ingest, err);
}

static loci_engine *engine_alloc(const loci_engine_options *options) {
    loci_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->slot_free, NULL);
    engine->waiting_max = options->queries_waiting_max ? options->queries_waiting_max : 64;
    engine->lexical_percent = options->lexical_percent ? options->lexical_percent : 100;
    return engine;
}

/* All of a model that can be told without weights. */
static loci_status prepare_model(loci_engine *engine, const char *dir, loci_error *err) {
    LOCI_TRY(loci_model_prepare(dir, &engine->model, err));
    LOCI_TRY(check_model(engine->model, &engine->sequence_tokens, &engine->question_room, err));
    engine->stock = !loci_model_is_built_in(engine->model);
    engine->question_start = question_start(loci_model_config_of(engine->model));
    return LOCI_OK;
}

static loci_status load_model(loci_engine *engine, const char *dir, loci_dtype precision,
                              bool mapped, unsigned slots, loci_error *err) {
    if (mapped)
        loci_log_info("the weights of %s stay in their files, since packed ones do not fit the "
                      "memory budget: slower, most so where they do not fit the page cache",
                      dir);
    LOCI_TRY(loci_model_load(engine->model, dir, engine->backend, precision, mapped, err));
    set_geometry(engine);
    return open_slots(engine, slots, err);
}

/* The model that only answers, as far as memory has not been shared out. */
static loci_status prepare_also(loci_engine *engine, const loci_engine_options *options,
                                loci_error *err) {
    if (!options->also_model) return LOCI_OK;
    engine->also = engine_alloc(options);
    if (!engine->also) return loci_fail(err, LOCI_E_NOMEM, "no memory for the engine");
    engine->also->backend = engine->backend;
    return prepare_model(engine->also, options->also_model, err);
}

static loci_status load_also(loci_engine *engine, const loci_engine_options *options,
                             loci_dtype precision, loci_error *err) {
    loci_engine *also = engine->also;
    if (!also) return LOCI_OK;
    also->budget = engine->budget;
    bool mapped = engine->plan.also_mapped;
    LOCI_TRY(load_model(also, options->also_model, precision, mapped, 1, err));
    if (strcmp(also->geometry.fingerprint, engine->geometry.fingerprint) != 0) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                            "--also-model %.200s is the same model as --model",
                            options->also_model);
}

loci_status loci_engine_open(const loci_engine_options *options, loci_engine **out,
                             loci_error *err) {
    loci_engine *engine = engine_alloc(options);
    if (!engine) return loci_fail(err, LOCI_E_NOMEM, "no memory for the engine");
    loci_backend_options backend_options = {options->threads, NULL};
    const char *name = options->backend ? options->backend : "cpu";
    loci_dtype precision = LOCI_F32;
    loci_status status;
    LOCI_TRY_GOTO(loci_backend_open(name, &backend_options, &engine->backend, err), out);
    LOCI_TRY_GOTO(choose_precision(options->precision, engine->backend, &precision, err), out);
    LOCI_TRY_GOTO(prepare_model(engine, options->model, err), out);
    LOCI_TRY_GOTO(prepare_also(engine, options, err), out);
    LOCI_TRY_GOTO(plan_memory(engine, options, precision, err), out);
    watch_memory(engine);
    LOCI_TRY_GOTO(
        load_model(engine, options->model, precision, engine->plan.mapped, engine->plan.slots, err),
        out);
    LOCI_TRY_GOTO(load_also(engine, options, precision, err), out);
    LOCI_TRY_GOTO(loci_splitter_open(loci_model_tokenizer(engine->model), SEGMENT_TOKENS,
                                     loci_model_specials(engine->model)->begin, &engine->splitter,
                                     err),
                  out);
    LOCI_TRY_GOTO(compute_sink(engine, err), out);
    status = open_store(engine, options->data, err);
    if (engine->also) engine->also->store = engine->store;
out:
    if (status != LOCI_OK) {
        loci_engine_close(engine);
        return status;
    }
    *out = engine;
    return LOCI_OK;
}

static void engine_free(loci_engine *engine) {
    free(engine->sink_k);
    free(engine->sink_v);
    pthread_cond_destroy(&engine->slot_free);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

void loci_engine_close(loci_engine *engine) {
    if (!engine) return;
    loci_engine *also = engine->also;
    if (engine->ingest) loci_ingest_stop(engine->ingest);
    close_slots(engine);
    if (also) close_slots(also);
    if (engine->store) loci_store_close(engine->store);
    loci_splitter_close(engine->splitter);
    loci_model_close(engine->model);
    if (also) loci_model_close(also->model);
    loci_backend_close(engine->backend);
    loci_budget_destroy(engine->budget);
    if (also) engine_free(also);
    engine_free(engine);
}

loci_store *loci_engine_store(loci_engine *engine) {
    return engine->store;
}

loci_ingest *loci_engine_ingest(loci_engine *engine) {
    return engine->ingest;
}

loci_model *loci_engine_model(loci_engine *engine) {
    return engine->model;
}

const char *loci_engine_also_fingerprint(loci_engine *engine) {
    return engine->also ? engine->also->geometry.fingerprint : NULL;
}

const char *loci_engine_backend_name(loci_engine *engine) {
    return engine->backend->ops->describe(engine->backend);
}

static uint64_t anonymous_bytes(void) {
    FILE *file = fopen("/proc/self/status", "r");
    if (!file) return 0;
    char line[128];
    unsigned long long kib = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "RssAnon: %llu kB", &kib) == 1) break;
    }
    fclose(file);
    return kib * 1024;
}

static void count_questions(loci_engine *engine, loci_engine_status *out) {
    pthread_mutex_lock(&engine->lock);
    out->queries_waiting += engine->waiting;
    for (unsigned i = 0; i < engine->slot_count; i++)
        out->queries_running += engine->slots[i].busy ? 1 : 0;
    pthread_mutex_unlock(&engine->lock);
}

/* As published methods do (Quest, arXiv 2406.10774, section 3: its first two layers). */
static uint32_t default_dense_layers(const loci_engine *engine) {
    const loci_model_config *config = loci_model_config_of(engine->model);
    if (!engine->stock || config->retrieval_count < config->layers) return 0;
    uint32_t most = config->layers / 4;
    return most < DENSE_LAYERS ? most : DENSE_LAYERS;
}

void loci_engine_status_of(loci_engine *engine, loci_engine_status *out) {
    *out = (loci_engine_status){.memory_used_bytes = anonymous_bytes()};
    loci_budget_usage_of(engine->budget, &out->memory);
    if (engine->backend->ops->tiers) engine->backend->ops->tiers(engine->backend, &out->tiers);
    count_questions(engine, out);
    if (engine->also) count_questions(engine->also, out);
}

static uint64_t trained_tokens(const loci_engine *engine) {
    return loci_model_config_of(engine->model)->positions_max - engine->question_room -
           1; /* the shared prefix */
}

loci_status loci_engine_create_corpus(loci_engine *engine, const char *name,
                                      const loci_corpus_options *options, loci_corpus_info *out,
                                      loci_error *err) {
    loci_geometry geometry = engine->geometry;
    loci_corpus_settings own;
    loci_corpus_settings_default(&own);
    own.dense_layers = default_dense_layers(engine);
    if (options->settings) loci_corpus_settings_apply(options->settings, &own);
    geometry.kv_int8 = options->kv_int8;
    geometry.causal = options->encoding == LOCI_ENCODING_CAUSAL;
    if (options->encoding == LOCI_ENCODING_DEFAULT)
        geometry.causal =
            engine->question_start > 0 && loci_causal_check(engine->model, NULL) == LOCI_OK;
    if (geometry.causal) LOCI_TRY(loci_causal_check(engine->model, err));
    if (geometry.causal && !options->beyond_trained_length)
        geometry.tokens_max = trained_tokens(engine);
    if (options->beyond_trained_length && !geometry.causal)
        return loci_fail_reason(err, LOCI_E_INVAL, "ENCODING",
                                "an independent corpus may be of any length: beyond_trained_length "
                                "is for causal ones");
    return loci_corpus_create(engine->store, name, &geometry, &own, engine->sink_k, engine->sink_v,
                              out, err);
}

loci_status loci_engine_reindex(loci_engine *engine, const char *name, bool force,
                                const loci_reindex_watch *watch, bool *begun, loci_error *err) {
    loci_corpus_info info;
    loci_geometry geometry = engine->geometry;
    const char *fingerprint = geometry.fingerprint;
    bool outdated = false;
    LOCI_TRY(loci_corpus_get(engine->store, name, &info, err));
    LOCI_TRY(loci_corpus_outdated(engine->store, name, fingerprint, &outdated, err));
    bool joins = info.reindexing && strcmp(info.reindex_fingerprint, fingerprint) == 0;
    *begun = outdated || force || joins;
    if (!*begun && info.reindexing)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "REINDEXING",
                                "corpus %s is of this locid's model and is being reindexed for "
                                "model %s: \"loci corpus reindex %s --cancel\" gives that up",
                                name, info.reindex_fingerprint, name);
    if (!*begun) return LOCI_OK;
    geometry.causal = info.geometry.causal;
    geometry.kv_int8 = info.geometry.kv_int8;
    if (geometry.causal) LOCI_TRY(loci_causal_check(engine->model, err));
    if (geometry.causal && info.geometry.tokens_max > 0)
        geometry.tokens_max = trained_tokens(engine);
    loci_corpus_settings settings;
    loci_corpus_settings_default(&settings);
    settings.dense_layers = default_dense_layers(engine);
    LOCI_TRY(loci_corpus_reindex(engine->store, name, &geometry, &settings, engine->sink_k,
                                 engine->sink_v, watch, err));
    loci_ingest_wake(engine->ingest);
    return LOCI_OK;
}

/* --- Requests ----------------------------------------------------------------------------- */

static loci_status check_request(const loci_answer_request *request, loci_error *err) {
    if (!(request->top_p >= 0 && request->top_p <= 1))
        return loci_fail(err, LOCI_E_INVAL, "top_p is %g; it must lie in (0, 1]", request->top_p);
    if (!(request->temperature >= 0 && request->temperature <= 10))
        return loci_fail(err, LOCI_E_INVAL, "temperature is %g; it must lie in [0, 10]",
                         request->temperature);
    if (!(request->sparsity >= 0 && request->sparsity < 1))
        return loci_fail(err, LOCI_E_INVAL, "sparsity is %g; it must lie in [0, 1)",
                         request->sparsity);
    if (request->max_tokens > LOCI_ANSWER_TOKENS_MAX)
        return loci_fail(err, LOCI_E_INVAL, "max_tokens is %u; at most %u are allowed",
                         request->max_tokens, LOCI_ANSWER_TOKENS_MAX);
    if (request->evidence_count > LOCI_EVIDENCE_MAX)
        return loci_fail(err, LOCI_E_INVAL, "evidence_count is %u; at most %u are allowed",
                         request->evidence_count, LOCI_EVIDENCE_MAX);
    if (request->mode < -1 || request->mode > LOCI_MODE_HIERARCHICAL)
        return loci_fail(err, LOCI_E_INVAL, "mode %d is not known", request->mode);
    return LOCI_OK;
}

/* Of the corpus's tokens, in mode squeezed. */
static double share_kept(const loci_query *query, const loci_answer_request *request) {
    double tokens = (double)query->view->tokens;
    if (request->sparsity > 0) return 1 - request->sparsity;
    if (request->budget == 0) return DEFAULT_SHARE;
    return request->budget < tokens ? request->budget / tokens : 1;
}

static loci_status set_params(loci_query *query, const loci_answer_request *request,
                              loci_error *err) {
    loci_select_params *params = &query->params;
    if (request->mode >= 0) params->mode = (loci_mode)request->mode;
    if (request->top_p > 0) {
        params->top_p = (float)request->top_p;
        if (request->top_p >= 1 && !request->budget) params->budget = 0;
    }
    if (request->budget) params->budget = request->budget;
    if (params->mode != LOCI_MODE_SQUEEZED) return LOCI_OK;
    LOCI_TRY(loci_query_squeezed(query, share_kept(query, request), err));
    loci_query_reach(query, false);
    return LOCI_OK;
}

loci_status loci_engine_answer(loci_engine *engine, const loci_answer_request *request,
                               const loci_cancel *cancel, loci_event_fn on_event, void *ctx,
                               loci_error *err) {
    LOCI_TRY(check_request(request, err));
    bool read_twice = request->read_twice != 0;
    loci_query query;
    loci_status status;
    LOCI_TRY_GOTO(loci_query_init(&query, engine, request->corpus, request->question,
                                  request->min_revision, cancel, err),
                  out);
    LOCI_TRY_GOTO(set_params(&query, request, err), out);
    loci_event event = {.kind = LOCI_EVENT_STARTED,
                        .revision = loci_snapshot_info(query.snapshot)->revision,
                        .mode = query.params.mode,
                        .model = query.engine->geometry.fingerprint,
                        .read_twice = read_twice};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    if (read_twice)
        status = loci_answer_read_twice(&query, request, on_event, ctx, err);
    else
        status = loci_answer_direct(&query, request, on_event, ctx, err);
out:
    loci_query_fini(&query);
    return status;
}

loci_status loci_engine_retrieve(loci_engine *engine, const char *corpus, const char *question,
                                 uint32_t k, uint64_t min_revision, const loci_cancel *cancel,
                                 loci_hits_fn on_hits, void *ctx, loci_error *err) {
    if (k == 0) k = 5;
    if (k > LOCI_RETRIEVE_MAX)
        return loci_fail(err, LOCI_E_INVAL, "k is %u; at most %u are allowed", k,
                         LOCI_RETRIEVE_MAX);
    loci_query query;
    loci_ranked ranked[LOCI_RETRIEVE_MAX];
    loci_passage passages[LOCI_RETRIEVE_MAX];
    loci_buf bytes = LOCI_BUF_INIT;
    uint32_t count = 0;
    loci_status status;
    LOCI_TRY_GOTO(loci_query_init(&query, engine, corpus, question, min_revision, cancel, err),
                  out);
    LOCI_TRY_GOTO(loci_query_rank(&query, k, ranked, &count, err), out);
    for (uint32_t i = 0; i < count; i++)
        LOCI_TRY_GOTO(loci_passage_load(&query, &ranked[i], &bytes, &passages[i], err), out);
    loci_passages_bind(passages, count, &bytes);
    query.usage.total_ms = loci_query_elapsed_ms(&query);
    status = on_hits(ctx, passages, count, &query.usage,
                     loci_snapshot_info(query.snapshot)->revision, err);
out:
    loci_query_fini(&query);
    loci_buf_fini(&bytes);
    return status;
}
