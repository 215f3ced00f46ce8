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

#include "base/log.h"
#include "base/pool.h"
#include "services/engine/query.h"

#define SEGMENT_TOKENS 255u
#define MEMORY_MIN (256ull << 20)

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

static float widen(uint16_t bits) {
    union {
        uint32_t u;
        float f;
    } value = {(uint32_t)bits << 16};
    return value.f;
}

/* K and V of the shared prefix token: it sees only itself, so they are the same in every segment.
 */
static loci_status compute_sink(loci_engine *engine, loci_error *err) {
    const loci_geometry *geometry = &engine->geometry;
    if (!geometry->has_sink) return LOCI_OK;
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
        uint32_t token = loci_model_specials(engine->model)->doc;
        const uint32_t begin[2] = {0, 1};
        status = encoder_encode(engine, &token, begin, 1, k, v, NULL, err);
    }
    for (size_t i = 0; status == LOCI_OK && i < (size_t)pairs * dim; i++) {
        engine->sink_k[i] = widen(rows[i]);
        engine->sink_v[i] = widen(rows[(size_t)pairs * dim + i]);
    }
    free(rows);
    free(k);
    return status;
}

static void set_geometry(loci_engine *engine) {
    const loci_model_config *config = loci_model_config_of(engine->model);
    loci_geometry *geometry = &engine->geometry;
    snprintf(geometry->fingerprint, sizeof geometry->fingerprint, "%s",
             loci_model_fingerprint(engine->model));
    geometry->retrieval_layers = config->retrieval_count;
    geometry->kv_heads = config->kv_heads;
    geometry->head_dim = config->head_dim;
    geometry->ranking_layer = 0;
    geometry->segment_tokens = SEGMENT_TOKENS;
    geometry->has_sink = loci_model_specials(engine->model)->doc != UINT32_MAX;
}

/* The limit of the memory cgroup that the process lives in (v2, then v1), as containers see it. */
static uint64_t cgroup_limit(void) {
    static const char *const paths[] = {"/sys/fs/cgroup/memory.max",
                                        "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    for (size_t i = 0; i < 2; i++) {
        unsigned long long bytes;
        FILE *file = fopen(paths[i], "r");
        if (!file) continue;
        int found = fscanf(file, "%llu", &bytes);
        fclose(file);
        if (found == 1) return bytes;
    }
    return UINT64_MAX;
}

static uint64_t half_of_ram(void) {
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t ram = pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 8ull << 30;
    uint64_t limit = cgroup_limit();
    return (limit < ram ? limit : ram) / 2;
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

static loci_status open_slots(loci_engine *engine, unsigned count, loci_error *err) {
    loci_backend *backend = engine->backend;
    uint32_t tokens_max =
        2 * LOCI_QUESTION_TOKENS_MAX + SEGMENT_TOKENS + LOCI_ANSWER_TOKENS_MAX + 8;
    engine->slots = calloc(count, sizeof *engine->slots);
    if (!engine->slots) return loci_fail(err, LOCI_E_NOMEM, "no memory for %u questions", count);
    engine->slot_count = count;
    for (unsigned i = 0; i < count; i++) {
        loci_slot *slot = &engine->slots[i];
        LOCI_TRY(loci_sequence_open(engine->model, tokens_max, &slot->sequence, err));
        slot->lookups = calloc(engine->geometry.retrieval_layers, sizeof(loci_lookup *));
        if (!slot->lookups) return loci_fail(err, LOCI_E_NOMEM, "no memory for look-ups");
        for (uint32_t r = 0; r < engine->geometry.retrieval_layers; r++)
            LOCI_TRY(backend->ops->lookup_create(backend, &slot->lookups[r], err));
    }
    return LOCI_OK;
}

static void close_slots(loci_engine *engine) {
    loci_backend *backend = engine->backend;
    for (unsigned i = 0; i < engine->slot_count; i++) {
        loci_slot *slot = &engine->slots[i];
        loci_sequence_close(slot->sequence);
        for (uint32_t r = 0; slot->lookups && r < engine->geometry.retrieval_layers; r++)
            if (slot->lookups[r]) backend->ops->lookup_free(backend, slot->lookups[r]);
        free(slot->lookups);
        backend->ops->free(backend, slot->part);
        backend->ops->free(backend, slot->mass);
    }
    free(engine->slots);
}

static loci_status open_store(loci_engine *engine, const char *data, loci_error *err) {
    if (mkdir(data, 0700) != 0 && errno != EEXIST)
        return loci_fail(err, LOCI_E_IO, "cannot make data directory %s: %s", data,
                         strerror(errno));
    loci_store_options options;
    loci_store_options_default(&options);
    uint64_t share = engine->memory_budget_bytes / 16;
    if (share < options.memory_bytes) options.memory_bytes = share;
    LOCI_TRY(loci_store_open(data, &options, engine->backend, &engine->store, err));
    loci_encoder encoder = {engine, engine->geometry, encoder_split, encoder_encode};
    return loci_ingest_start(engine->store, &encoder, loci_backend_pool(engine->backend),
                             &engine->ingest, err);
}

loci_status loci_engine_open(const loci_engine_options *options, loci_engine **out,
                             loci_error *err) {
    uint64_t memory = options->memory_bytes ? options->memory_bytes : half_of_ram();
    if (memory < MEMORY_MIN)
        return loci_fail(err, LOCI_E_INVAL, "memory budget %llu is below the least, %llu bytes",
                         (unsigned long long)memory, (unsigned long long)MEMORY_MIN);
    loci_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return loci_fail(err, LOCI_E_NOMEM, "no memory for the engine");
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->slot_free, NULL);
    engine->memory_budget_bytes = memory;
    engine->waiting_max = options->queries_waiting_max ? options->queries_waiting_max : 64;
    loci_backend_options backend_options = {options->threads, NULL};
    const char *name = options->backend ? options->backend : "cpu";
    loci_dtype precision = LOCI_F32;
    loci_status status;
    LOCI_TRY_GOTO(loci_backend_open(name, &backend_options, &engine->backend, err), out);
    LOCI_TRY_GOTO(choose_precision(options->precision, engine->backend, &precision, err), out);
    LOCI_TRY_GOTO(loci_model_open(options->model, engine->backend, precision, &engine->model, err),
                  out);
    set_geometry(engine);
    LOCI_TRY_GOTO(loci_splitter_open(loci_model_tokenizer(engine->model), SEGMENT_TOKENS,
                                     loci_model_specials(engine->model)->doc, &engine->splitter,
                                     err),
                  out);
    LOCI_TRY_GOTO(compute_sink(engine, err), out);
    LOCI_TRY_GOTO(open_slots(engine, options->queries_max ? options->queries_max : 2, err), out);
    status = open_store(engine, options->data, err);
out:
    if (status != LOCI_OK) {
        loci_engine_close(engine);
        return status;
    }
    *out = engine;
    return LOCI_OK;
}

void loci_engine_close(loci_engine *engine) {
    if (!engine) return;
    if (engine->ingest) loci_ingest_stop(engine->ingest);
    close_slots(engine);
    if (engine->store) loci_store_close(engine->store);
    loci_splitter_close(engine->splitter);
    loci_model_close(engine->model);
    loci_backend_close(engine->backend);
    free(engine->sink_k);
    free(engine->sink_v);
    pthread_cond_destroy(&engine->slot_free);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
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

void loci_engine_status_of(loci_engine *engine, loci_engine_status *out) {
    *out = (loci_engine_status){.memory_budget_bytes = engine->memory_budget_bytes,
                                .memory_used_bytes = anonymous_bytes()};
    pthread_mutex_lock(&engine->lock);
    out->queries_waiting = engine->waiting;
    for (unsigned i = 0; i < engine->slot_count; i++)
        out->queries_running += engine->slots[i].busy ? 1 : 0;
    pthread_mutex_unlock(&engine->lock);
}

loci_status loci_engine_create_corpus(loci_engine *engine, const char *name, loci_corpus_info *out,
                                      loci_error *err) {
    return loci_corpus_create(engine->store, name, &engine->geometry, engine->sink_k,
                              engine->sink_v, out, err);
}

/* --- Requests ----------------------------------------------------------------------------- */

static loci_status check_request(const loci_engine *engine, const loci_answer_request *request,
                                 loci_error *err) {
    const loci_special_tokens *special = loci_model_specials(engine->model);
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
    if (request->read_twice == 1 &&
        (special->evidence == UINT32_MAX || special->none == UINT32_MAX))
        return loci_fail(err, LOCI_E_UNSUPPORTED, "this model cannot read passages twice");
    return LOCI_OK;
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
    if (request->no_budget) params->budget = 0;
    if (params->mode == LOCI_MODE_SQUEEZED)
        return loci_query_squeezed_threshold(query, request->sparsity > 0 ? request->sparsity : 0.9,
                                             err);
    return LOCI_OK;
}

loci_status loci_engine_answer(loci_engine *engine, const loci_answer_request *request,
                               const loci_cancel *cancel, loci_event_fn on_event, void *ctx,
                               loci_error *err) {
    const loci_special_tokens *special = loci_model_specials(engine->model);
    LOCI_TRY(check_request(engine, request, err));
    bool can_read = special->evidence != UINT32_MAX && special->none != UINT32_MAX;
    bool read_twice = request->read_twice < 0 ? can_read : request->read_twice == 1;
    loci_query query;
    loci_status status;
    LOCI_TRY_GOTO(loci_query_init(&query, engine, request->corpus, request->question,
                                  request->min_revision, cancel, err),
                  out);
    LOCI_TRY_GOTO(set_params(&query, request, err), out);
    loci_event event = {.kind = LOCI_EVENT_STARTED,
                        .revision = loci_snapshot_info(query.snapshot)->revision,
                        .mode = query.params.mode,
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
