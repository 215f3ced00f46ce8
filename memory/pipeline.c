/* SPDX-License-Identifier: Apache-2.0
 *
 * Splitting, encoding and gathering of one corpus's documents; see pipeline.h.
 *
 * Three cursors: the manifest's (committed), `cursor` (after the last segment in the builder) and
 * `ahead` (after the last segment in the batch). Each segment of a batch carries the cursor that
 * holds after it, so that a commit may fall between any two.
 *
 * A full extent is taken out of the builder and made, on a thread of its own where the store's
 * options have room for it, while the next one is encoded into another builder. No more than one:
 * who would begin another, or commit anything that comes after it, waits for it.
 */
#include "memory/pipeline.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/pool.h"
#include "memory/snapshot.h"

/* Encoding works best on thousands of tokens at once; KV of a batch is bounded as well. */
#define BATCH_TOKENS 4096u
#define BATCH_SHARE 4u                          /* of the KV of a sealed extent */
#define COPIED_TOGETHER_BYTES ((size_t)1 << 20) /* that is worth waking threads */
/* Of a causal corpus: with one segment more it is still one sequence of any model that serves. */
#define CAUSAL_BATCH_TOKENS 1024u
#define LENGTH_SEGMENTS 64u /* looked at together when a document is measured */

typedef struct batch_segment {
    loci_built_segment built;
    loci_cursor after;
} batch_segment;

typedef struct encode_batch {
    uint32_t *tokens;
    size_t token_count, token_capacity;
    uint32_t *begin; /* count + 1 */
    batch_segment *segments;
    size_t count, capacity;
    bool encoded;
} encode_batch;

/* A full extent being made. */
typedef struct seal_job {
    const struct loci_pipeline *pipeline;
    loci_builder *builder;            /* its segments; empty when there is none */
    loci_cursor cursor;               /* after the last of these */
    loci_indexed_document *documents; /* complete with it; ascending */
    size_t document_count, document_capacity;
    pthread_t thread;
    bool running; /* on that thread, which was not joined yet */
    atomic_bool ended;
    bool failed; /* its segments are not committed */
    loci_status status;
    loci_error err;
} seal_job;

struct loci_pipeline {
    loci_corpus *corpus;
    const loci_encoder *encoder;
    struct loci_pool *pool;
    const loci_cancel *cancel;
    bool causal;
    uint32_t prefix_tokens; /* 1 when the encoder puts the shared prefix before every segment */
    uint32_t sink_tokens;   /* of those, the ones that are encoded with it: none if causal */
    uint32_t batch_tokens;

    loci_cursor cursor, ahead;
    loci_builder *builder;
    loci_indexed_document *documents; /* complete, not committed; ascending */
    size_t document_count, document_capacity;
    seal_job seal;

    bool open; /* `document` and `text` are those of ahead.sequence */
    loci_document document;
    loci_buf text;
    encode_batch batch;
    uint16_t **k, **v; /* [pairs]: encoded rows of the batch */
    size_t row_capacity;
    loci_pipeline_counts counts;
};

/* --- Open and close --------------------------------------------------------------------- */

static loci_status check_model(const loci_corpus *corpus, const loci_encoder *encoder,
                               loci_error *err) {
    const loci_geometry *a = &corpus->geometry, *b = &encoder->geometry;
    loci_corpus_info info = {.geometry = *a};
    memcpy(info.name, corpus->name, sizeof info.name);
    if (corpus->stage == LOCI_CORPUS_INDEXING && strcmp(a->fingerprint, b->fingerprint) != 0)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "MODEL_MISMATCH",
                                "corpus %s is being reindexed for model %s, and this locid runs "
                                "model %s: it goes on with that model, or \"loci corpus reindex %s "
                                "--cancel\" gives it up",
                                corpus->name, a->fingerprint, b->fingerprint, corpus->name);
    LOCI_TRY(loci_corpus_check_model(&info, b->fingerprint, err));
    if (a->retrieval_layers == b->retrieval_layers && a->kv_heads == b->kv_heads &&
        a->head_dim == b->head_dim && a->ranking_layer == b->ranking_layer &&
        a->segment_tokens == b->segment_tokens && a->has_sink == b->has_sink &&
        (!a->causal || encoder->encode_after))
        return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_PRECONDITION, "MODEL_MISMATCH",
                            "corpus %s was made with another geometry of its model", corpus->name);
}

uint32_t loci_pipeline_batch_tokens(const loci_geometry *geometry,
                                    const loci_store_options *options) {
    uint64_t most = options->extent_kv_bytes / BATCH_SHARE / loci_geometry_kv_bytes(geometry);
    return most < BATCH_TOKENS ? (uint32_t)most : BATCH_TOKENS;
}

loci_status loci_pipeline_open(loci_corpus *corpus, const loci_encoder *encoder,
                               struct loci_pool *pool, const loci_cancel *cancel,
                               loci_pipeline **out, loci_error *err) {
    LOCI_TRY(check_model(corpus, encoder, err));
    loci_pipeline *pipeline = calloc(1, sizeof *pipeline);
    if (!pipeline) return loci_fail(err, LOCI_E_NOMEM, "no memory for the pipeline");
    atomic_fetch_add(&corpus->refs, 1);
    pipeline->corpus = corpus;
    pipeline->encoder = encoder;
    pipeline->pool = pool;
    pipeline->cancel = cancel;
    pipeline->causal = corpus->geometry.causal;
    pipeline->prefix_tokens = corpus->geometry.has_sink ? 1 : 0;
    pipeline->sink_tokens = pipeline->causal ? 0 : pipeline->prefix_tokens;
    pipeline->batch_tokens = loci_pipeline_batch_tokens(&corpus->geometry, &corpus->store->options);
    if (pipeline->causal && pipeline->batch_tokens > CAUSAL_BATCH_TOKENS)
        pipeline->batch_tokens = CAUSAL_BATCH_TOKENS;
    uint32_t pairs = corpus->geometry.retrieval_layers * corpus->geometry.kv_heads;
    pipeline->k = calloc(pairs, sizeof *pipeline->k);
    pipeline->v = calloc(pairs, sizeof *pipeline->v);
    pipeline->seal.pipeline = pipeline;
    loci_status status = LOCI_E_NOMEM;
    if (pipeline->k && pipeline->v)
        status = loci_builder_create(&corpus->geometry, &pipeline->builder, err);
    else
        loci_fail(err, status, "no memory for the pipeline");
    if (status == LOCI_OK)
        status = loci_builder_create(&corpus->geometry, &pipeline->seal.builder, err);
    if (status != LOCI_OK) {
        loci_pipeline_close(pipeline);
        return status;
    }
    pthread_mutex_lock(&corpus->lock);
    pipeline->cursor = pipeline->ahead = corpus->manifest->cursor;
    pthread_mutex_unlock(&corpus->lock);
    *out = pipeline;
    return LOCI_OK;
}

void loci_pipeline_close(loci_pipeline *pipeline) {
    if (!pipeline) return;
    const loci_geometry *geometry = &pipeline->corpus->geometry;
    if (pipeline->seal.running) pthread_join(pipeline->seal.thread, NULL);
    for (uint32_t p = 0; p < geometry->retrieval_layers * geometry->kv_heads; p++) {
        if (pipeline->k) free(pipeline->k[p]);
        if (pipeline->v) free(pipeline->v[p]);
    }
    free(pipeline->k);
    free(pipeline->v);
    free(pipeline->batch.tokens);
    free(pipeline->batch.begin);
    free(pipeline->batch.segments);
    free(pipeline->documents);
    free(pipeline->seal.documents);
    loci_buf_fini(&pipeline->text);
    loci_builder_destroy(pipeline->builder);
    loci_builder_destroy(pipeline->seal.builder);
    loci_corpus_release(pipeline->corpus);
    free(pipeline);
}

loci_pipeline_counts loci_pipeline_count(const loci_pipeline *pipeline) {
    return pipeline->counts;
}

size_t loci_pipeline_documents(const loci_pipeline *pipeline) {
    return pipeline->document_count;
}

bool loci_pipeline_dirty(const loci_pipeline *pipeline) {
    return pipeline->builder->segment_count > 0 || pipeline->document_count > 0;
}

bool loci_pipeline_sealing(const loci_pipeline *pipeline) {
    return pipeline->seal.running;
}

/* --- Splitting -------------------------------------------------------------------------- */

static loci_status no_memory(const loci_pipeline *pipeline, loci_error *err) {
    return loci_fail(err, LOCI_E_NOMEM, "no memory to index corpus %s", pipeline->corpus->name);
}

static void skip_document(loci_pipeline *pipeline) {
    pipeline->ahead = (loci_cursor){.sequence = pipeline->ahead.sequence + 1};
    pipeline->open = false;
}

/* Documents are refused by size when they come; one may be here since the memory was larger. Those
 * after it wait with it: segments are in the order of documents, and the cursor never goes back. */
static loci_status check_size(const loci_pipeline *pipeline, loci_error *err) {
    const loci_document *document = &pipeline->document;
    uint64_t most = pipeline->corpus->store->options.document_bytes_max;
    if (document->bytes <= most) return LOCI_OK;
    return loci_fail_reason(
        err, LOCI_E_LIMIT, "MEMORY_BUDGET",
        "document \"%.100s\" of corpus %s has %llu bytes, and the memory budget allows %llu: it "
        "and those after it wait until it is deleted or replaced, or locid has a larger --memory",
        document->id, pipeline->corpus->name, (unsigned long long)document->bytes,
        (unsigned long long)most);
}

/* Loads the document at `ahead` or the first pending one after it; *found false: none. */
static loci_status open_document(loci_pipeline *pipeline, bool *found, loci_error *err) {
    loci_corpus *corpus = pipeline->corpus;
    for (;;) {
        pthread_mutex_lock(&corpus->lock);
        uint64_t sequence = loci_pending_next(corpus, pipeline->ahead.sequence);
        pthread_mutex_unlock(&corpus->lock);
        *found = sequence != 0;
        if (!*found) return LOCI_OK;
        if (sequence != pipeline->ahead.sequence)
            pipeline->ahead = (loci_cursor){.sequence = sequence};
        loci_buf_clear(&pipeline->text);
        loci_document *document = &pipeline->document;
        /* One view, since the document may be deleted while it is read. */
        loci_view *view = loci_view_open(corpus->store->rocks);
        loci_status status = loci_document_load(corpus, view, sequence, document, err);
        bool gone = status == LOCI_E_NOTFOUND || (status == LOCI_OK && document->dead);
        if (status == LOCI_OK && !gone) status = check_size(pipeline, err);
        if (status == LOCI_OK && !gone)
            status = loci_document_text(corpus, view, document, 0, document->bytes, &pipeline->text,
                                        err);
        loci_view_close(view);
        if (!gone) {
            pipeline->open = status == LOCI_OK;
            return status;
        }
        skip_document(pipeline);
    }
}

/* What an encoder must keep to; a violation is its bug, named, and not our crash. */
static loci_status check_split(const loci_pipeline *pipeline, const loci_split *split,
                               uint32_t most, loci_error *err) {
    uint64_t len = pipeline->text.len, at = pipeline->ahead.byte;
    bool good = split->segments <= most && split->next > at && split->next <= len;
    for (uint32_t i = 0; good && i < split->segments; i++) {
        uint32_t tokens = split->begin[i + 1] - split->begin[i];
        good = split->begin[i + 1] >= split->begin[i] && tokens > pipeline->prefix_tokens &&
               tokens - pipeline->prefix_tokens <= pipeline->corpus->geometry.segment_tokens &&
               split->start[i] >= at && split->end[i] > split->start[i] &&
               split->end[i] <= split->next;
        at = split->end[i];
    }
    if (good) return LOCI_OK;
    return loci_fail(err, LOCI_E_INTERNAL,
                     "the encoder cut document \"%.100s\" of corpus %s against its contract",
                     pipeline->document.id, pipeline->corpus->name);
}

static bool reserve_batch(encode_batch *batch, size_t tokens, size_t segments) {
    size_t need = batch->token_count + tokens;
    if (need > batch->token_capacity) {
        uint32_t *grown = realloc(batch->tokens, need * sizeof *grown);
        if (!grown) return false;
        batch->tokens = grown;
        batch->token_capacity = need;
    }
    need = batch->count + segments;
    if (need <= batch->capacity) return true;
    batch_segment *grown = realloc(batch->segments, need * sizeof *grown);
    if (grown) batch->segments = grown;
    uint32_t *begin = realloc(batch->begin, (need + 1) * sizeof *begin);
    if (begin) batch->begin = begin;
    if (!grown || !begin) return false;
    batch->capacity = need;
    return true;
}

static loci_status take_split(loci_pipeline *pipeline, const loci_split *split, loci_error *err) {
    encode_batch *batch = &pipeline->batch;
    loci_cursor *ahead = &pipeline->ahead;
    uint32_t skip = pipeline->prefix_tokens - pipeline->sink_tokens;
    uint32_t tokens = split->segments ? split->begin[split->segments] - split->begin[0] : 0;
    if (!reserve_batch(batch, tokens, split->segments)) return no_memory(pipeline, err);
    for (uint32_t i = 0; i < split->segments; i++) {
        batch_segment *segment = &batch->segments[batch->count];
        uint32_t count = split->begin[i + 1] - split->begin[i] - skip;
        uint32_t own = count - pipeline->sink_tokens;
        memcpy(batch->tokens + batch->token_count, split->tokens + split->begin[i] + skip,
               count * sizeof *batch->tokens);
        segment->built =
            (loci_built_segment){ahead->sequence, split->start[i], split->end[i], {0}, own};
        memcpy(segment->built.content, pipeline->document.content, sizeof segment->built.content);
        batch->begin[batch->count++] = (uint32_t)batch->token_count;
        batch->token_count += count;
        ahead->segments++;
        ahead->tokens += own;
        ahead->byte = i + 1 < split->segments ? split->start[i + 1] : split->next;
        segment->after = *ahead;
    }
    if (batch->count > 0) batch->begin[batch->count] = (uint32_t)batch->token_count;
    ahead->byte = split->next;
    return LOCI_OK;
}

/* The document's last segment, if it has any, ends the batch so far: its cursor moves on to the
 * next document. */
static loci_status finish_document(loci_pipeline *pipeline, uint32_t last_segments,
                                   loci_error *err) {
    if (pipeline->document_count == pipeline->document_capacity) {
        size_t capacity = pipeline->document_capacity ? 2 * pipeline->document_capacity : 64;
        loci_indexed_document *grown = realloc(pipeline->documents, capacity * sizeof *grown);
        if (!grown) return no_memory(pipeline, err);
        pipeline->documents = grown;
        pipeline->document_capacity = capacity;
    }
    const loci_cursor *ahead = &pipeline->ahead;
    pipeline->documents[pipeline->document_count++] =
        (loci_indexed_document){ahead->sequence, ahead->tokens, ahead->segments};
    skip_document(pipeline);
    if (last_segments > 0)
        pipeline->batch.segments[pipeline->batch.count - 1].after = pipeline->ahead;
    return LOCI_OK;
}

static loci_status gather_some(loci_pipeline *pipeline, loci_error *err) {
    const loci_encoder *encoder = pipeline->encoder;
    size_t room = pipeline->batch_tokens - pipeline->batch.token_count;
    uint32_t most = (uint32_t)(room / encoder->geometry.segment_tokens);
    if (most == 0) most = 1;
    const loci_split *split;
    loci_slice text = loci_slice_of(pipeline->text.data, pipeline->text.len);
    loci_status status =
        encoder->split(encoder->ctx, text, pipeline->ahead.byte, most, &split, err);
    if (status != LOCI_OK)
        return loci_fail_prefix(err, status, "document \"%.100s\" of corpus %s",
                                pipeline->document.id, pipeline->corpus->name);
    LOCI_TRY(check_split(pipeline, split, most, err));
    uint64_t next = split->next;
    uint32_t segments = split->segments;
    LOCI_TRY(take_split(pipeline, split, err));
    if (next < pipeline->text.len) return LOCI_OK;
    return finish_document(pipeline, segments, err);
}

/* Whether all that is left of the document fits in a causal corpus, before any of it is encoded. */
static loci_status check_length(loci_pipeline *pipeline, loci_error *err) {
    const loci_encoder *encoder = pipeline->encoder;
    loci_corpus *corpus = pipeline->corpus;
    uint64_t most = corpus->geometry.tokens_max;
    if (most == 0) return LOCI_OK;
    pthread_mutex_lock(&corpus->lock);
    uint64_t tokens = loci_manifest_tokens(corpus->manifest);
    pthread_mutex_unlock(&corpus->lock);
    loci_slice text = loci_slice_of(pipeline->text.data, pipeline->text.len);
    for (uint64_t at = pipeline->ahead.byte; at < text.len && tokens <= most;) {
        const loci_split *split;
        LOCI_TRY(encoder->split(encoder->ctx, text, at, LENGTH_SEGMENTS, &split, err));
        if (split->segments > 0)
            tokens += split->begin[split->segments] - split->begin[0] -
                      split->segments * pipeline->prefix_tokens;
        at = split->next > at ? split->next : text.len;
    }
    if (tokens <= most) return LOCI_OK;
    pipeline->open = false;
    return loci_fail_reason(
        err, LOCI_E_LIMIT, "TRAINED_LENGTH",
        "with document \"%.100s\" corpus %s would have more than %llu tokens, and its model was "
        "not "
        "trained on longer sequences: delete the document, or register in a corpus that was made "
        "with --beyond-trained-length or --encoding independent",
        pipeline->document.id, corpus->name, (unsigned long long)most);
}

static loci_status await_seal(loci_pipeline *pipeline, loci_error *err);

loci_status loci_pipeline_gather(loci_pipeline *pipeline, bool *more, loci_error *err) {
    encode_batch *batch = &pipeline->batch;
    if (pipeline->seal.running && atomic_load(&pipeline->seal.ended))
        LOCI_TRY(await_seal(pipeline, err));
    batch->count = batch->token_count = 0;
    batch->encoded = false;
    size_t documents = pipeline->document_count;
    while (batch->token_count < pipeline->batch_tokens) {
        if (pipeline->open) {
            pthread_mutex_lock(&pipeline->corpus->lock);
            bool pending = loci_pending_has(pipeline->corpus, pipeline->ahead.sequence);
            pthread_mutex_unlock(&pipeline->corpus->lock);
            if (!pending) skip_document(pipeline); /* deleted or replaced */
        }
        if (!pipeline->open) {
            bool found;
            if (pipeline->causal && batch->count > 0) break; /* one document at a time */
            loci_status status = open_document(pipeline, &found, err);
            if (status != LOCI_OK && batch->count > 0) break; /* those before it do not wait */
            LOCI_TRY(status);
            if (!found) break;
            if (pipeline->causal) LOCI_TRY(check_length(pipeline, err));
        }
        LOCI_TRY(gather_some(pipeline, err));
    }
    *more = batch->count > 0 || pipeline->document_count > documents;
    return LOCI_OK;
}

/* --- Encoding --------------------------------------------------------------------------- */

static bool reserve_rows(loci_pipeline *pipeline, size_t rows) {
    if (rows <= pipeline->row_capacity) return true;
    const loci_geometry *geometry = &pipeline->corpus->geometry;
    size_t bytes = rows * geometry->head_dim * sizeof(uint16_t);
    pipeline->row_capacity = 0;
    for (uint32_t p = 0; p < geometry->retrieval_layers * geometry->kv_heads; p++) {
        free(pipeline->k[p]);
        free(pipeline->v[p]);
        pipeline->k[p] = malloc(bytes);
        pipeline->v[p] = malloc(bytes);
        if (!pipeline->k[p] || !pipeline->v[p]) return false;
    }
    pipeline->row_capacity = rows;
    return true;
}

static loci_status encode_after(loci_pipeline *pipeline, loci_error *err) {
    const loci_encoder *encoder = pipeline->encoder;
    const encode_batch *batch = &pipeline->batch;
    loci_snapshot *past;
    LOCI_ASSERT(pipeline->builder->segment_count == 0); /* else the past would lack that */
    LOCI_TRY(loci_snapshot_acquire_past(pipeline->corpus, &past, err));
    loci_status status =
        encoder->encode_after(encoder->ctx, past, batch->tokens, (uint32_t)batch->token_count,
                              pipeline->k, pipeline->v, pipeline->cancel, err);
    loci_snapshot_release(past);
    return status;
}

loci_status loci_pipeline_encode(loci_pipeline *pipeline, loci_error *err) {
    encode_batch *batch = &pipeline->batch;
    if (batch->count == 0) {
        batch->encoded = true;
        return LOCI_OK;
    }
    if (!reserve_rows(pipeline, batch->token_count)) return no_memory(pipeline, err);
    const loci_encoder *encoder = pipeline->encoder;
    LOCI_FAILPOINT("encode");
    loci_status status =
        pipeline->causal
            ? encode_after(pipeline, err)
            : encoder->encode(encoder->ctx, batch->tokens, batch->begin, (uint32_t)batch->count,
                              pipeline->k, pipeline->v, pipeline->cancel, err);
    LOCI_FAILPOINT("encode");
    if (status != LOCI_OK)
        return loci_fail_prefix(err, status, "encoding documents of corpus %s",
                                pipeline->corpus->name);
    batch->encoded = true;
    pipeline->counts.tokens_encoded += batch->token_count;
    return LOCI_OK;
}

/* --- Taking in and committing ------------------------------------------------------------------
 */

/* Whether `more` further tokens fit in the extent that is being filled. The one that is being made
 * leaves no tail. */
static bool fits(const loci_pipeline *pipeline, uint32_t more) {
    loci_corpus *corpus = pipeline->corpus;
    uint32_t tail = 0;
    pthread_mutex_lock(&corpus->lock);
    if (!pipeline->seal.running)
        tail = loci_tail_tokens(corpus->manifest, corpus->extent_tokens_max);
    pthread_mutex_unlock(&corpus->lock);
    return tail + pipeline->builder->tokens + more <= corpus->extent_tokens_max;
}

bool loci_pipeline_will_seal(const loci_pipeline *pipeline) {
    uint32_t tokens = 0;
    for (size_t i = 0; i < pipeline->batch.count; i++)
        tokens += pipeline->batch.segments[i].built.tokens;
    return !fits(pipeline, tokens);
}

/* The documents that are complete at the cursor. */
static size_t complete_at(const loci_pipeline *pipeline, loci_cursor cursor) {
    return loci_sequence_place(pipeline->documents, pipeline->document_count,
                               sizeof *pipeline->documents, cursor.sequence);
}

static void drop_documents(loci_pipeline *pipeline, size_t count) {
    if (count == 0) return;
    pipeline->document_count -= count;
    memmove(pipeline->documents, pipeline->documents + count,
            pipeline->document_count * sizeof *pipeline->documents);
}

static void count_committed(loci_pipeline *pipeline, loci_builder *builder) {
    pipeline->counts.tokens_indexed += builder->tokens;
    pipeline->counts.segments_indexed += builder->segment_count;
    loci_builder_clear(builder);
}

static loci_fresh fresh_of_seal(const seal_job *seal) {
    return (loci_fresh){seal->builder, seal->cursor, seal->documents, seal->document_count};
}

/* On the job's own thread or the pipeline's. */
static void *run_seal(void *arg) {
    seal_job *seal = arg;
    const loci_pipeline *pipeline = seal->pipeline;
    loci_corpus *corpus = pipeline->corpus;
    loci_fresh fresh = fresh_of_seal(seal);
    seal->status = LOCI_E_ABORTED;
    while (seal->status == LOCI_E_ABORTED) {
        seal->status = loci_cancel_check(pipeline->cancel);
        if (seal->status != LOCI_OK) {
            loci_fail(&seal->err, seal->status, "indexing of corpus %s was stopped", corpus->name);
            break;
        }
        loci_manifest *base = loci_corpus_manifest(corpus);
        loci_rebuild_plan plan = loci_tail_plan(base, corpus->extent_tokens_max);
        seal->status = loci_rebuild(corpus, base, &plan, &fresh, true, pipeline->pool,
                                    pipeline->cancel, &seal->err);
        loci_manifest_unref(base);
    }
    atomic_store(&seal->ended, true);
    return NULL;
}

static void swap_builders(loci_pipeline *pipeline) {
    loci_builder *other = pipeline->builder;
    pipeline->builder = pipeline->seal.builder;
    pipeline->seal.builder = other;
}

static loci_status end_seal(loci_pipeline *pipeline, loci_error *err) {
    seal_job *seal = &pipeline->seal;
    seal->failed = seal->status != LOCI_OK;
    if (seal->failed) {
        if (err) *err = seal->err;
        return seal->status;
    }
    count_committed(pipeline, seal->builder);
    seal->document_count = 0;
    if (pipeline->builder->segment_count == 0) swap_builders(pipeline); /* the one with memory */
    return LOCI_OK;
}

/* Waits for the extent that is being made, if there is one. */
static loci_status await_seal(loci_pipeline *pipeline, loci_error *err) {
    seal_job *seal = &pipeline->seal;
    if (!seal->running) return LOCI_OK;
    pthread_join(seal->thread, NULL);
    seal->running = false;
    return end_seal(pipeline, err);
}

/* Takes what was gathered out of the builder and makes an extent of it: all of that, or what is
 * left to another thread. */
static loci_status seal_full(loci_pipeline *pipeline, loci_error *err) {
    seal_job *seal = &pipeline->seal;
    LOCI_TRY(await_seal(pipeline, err));
    size_t complete = complete_at(pipeline, pipeline->cursor);
    if (complete > seal->document_capacity) {
        loci_indexed_document *grown = realloc(seal->documents, complete * sizeof *grown);
        if (!grown) return no_memory(pipeline, err);
        seal->documents = grown;
        seal->document_capacity = complete;
    }
    if (complete) memcpy(seal->documents, pipeline->documents, complete * sizeof *seal->documents);
    seal->document_count = complete;
    drop_documents(pipeline, complete);
    seal->cursor = pipeline->cursor;
    swap_builders(pipeline);
    atomic_store(&seal->ended, false);
    bool beside = pipeline->corpus->store->options.seal_beside && !pipeline->causal;
    seal->running = beside && pthread_create(&seal->thread, NULL, run_seal, seal) == 0;
    if (seal->running) return LOCI_OK;
    run_seal(seal);
    return end_seal(pipeline, err);
}

/* Rows of some segments on their way from the batch to the builder, where they stand one after
 * another. */
typedef struct row_copy {
    const loci_pipeline *pipeline;
    size_t first, end; /* segments of the batch */
    size_t row;        /* of the builder */
} row_copy;

static void copy_rows(void *arg, size_t pair, unsigned thread) {
    const row_copy *copy = arg;
    const loci_pipeline *pipeline = copy->pipeline;
    const encode_batch *batch = &pipeline->batch;
    size_t dim = pipeline->corpus->geometry.head_dim, to = copy->row * dim;
    (void)thread;
    for (size_t i = copy->first; i < copy->end; i++) {
        size_t from = (batch->begin[i] + pipeline->sink_tokens) * dim;
        size_t values = batch->segments[i].built.tokens * dim;
        memcpy(pipeline->builder->k[pair] + to, pipeline->k[pair] + from, values * 2);
        memcpy(pipeline->builder->v[pair] + to, pipeline->v[pair] + from, values * 2);
        to += values;
    }
}

/* Takes in what fits of the batch from *at on, all of it in one loop of the pool, which others
 * use, too. */
static loci_status take_segments(loci_pipeline *pipeline, size_t *at, loci_error *err) {
    const encode_batch *batch = &pipeline->batch;
    row_copy copy = {pipeline, *at, *at, pipeline->builder->tokens};
    loci_status status = LOCI_OK;
    while (copy.end < batch->count && fits(pipeline, batch->segments[copy.end].built.tokens)) {
        uint32_t row;
        status = loci_builder_add(pipeline->builder, &batch->segments[copy.end].built, &row, err);
        if (status != LOCI_OK) break; /* those before it are whole */
        copy.end++;
    }
    if (copy.end == *at) return status;
    size_t bytes = (pipeline->builder->tokens - copy.row) *
                   loci_geometry_kv_bytes(&pipeline->corpus->geometry);
    loci_pool_run(bytes >= COPIED_TOGETHER_BYTES ? pipeline->pool : NULL, pipeline->builder->pairs,
                  copy_rows, &copy);
    *at = copy.end;
    pipeline->cursor = batch->segments[copy.end - 1].after;
    return status;
}

loci_status loci_pipeline_append(loci_pipeline *pipeline, loci_error *err) {
    const encode_batch *batch = &pipeline->batch;
    LOCI_ASSERT(batch->encoded);
    for (size_t at = 0; at < batch->count;) {
        LOCI_TRY(take_segments(pipeline, &at, err));
        if (at < batch->count) LOCI_TRY(seal_full(pipeline, err));
    }
    pipeline->cursor = pipeline->ahead;
    return LOCI_OK;
}

/* What could not be made an extent of is kept as flat segments. What came after it would not fit
 * beside it: that will be encoded again. */
static loci_status keep_failed(loci_pipeline *pipeline, loci_error *err) {
    seal_job *seal = &pipeline->seal;
    loci_fresh fresh = fresh_of_seal(seal);
    loci_status status = loci_commit_flat(pipeline->corpus, &fresh, err);
    if (status == LOCI_OK) count_committed(pipeline, seal->builder);
    return status;
}

loci_status loci_pipeline_flush(loci_pipeline *pipeline, loci_error *err) {
    loci_status status = await_seal(pipeline, err);
    if (pipeline->seal.failed) {
        loci_error other;
        loci_status kept = keep_failed(pipeline, status == LOCI_OK ? err : &other);
        if (status != LOCI_OK && kept != LOCI_OK)
            loci_log_warn("corpus %s: segments of an extent that was not made are not kept: %s",
                          pipeline->corpus->name, other.text);
        return status == LOCI_OK ? kept : status;
    }
    if (!loci_pipeline_dirty(pipeline)) return LOCI_OK;
    loci_fresh fresh = {pipeline->builder, pipeline->cursor, pipeline->documents,
                        pipeline->document_count};
    LOCI_TRY(loci_commit_flat(pipeline->corpus, &fresh, err));
    count_committed(pipeline, pipeline->builder);
    drop_documents(pipeline, complete_at(pipeline, pipeline->cursor));
    return LOCI_OK;
}
