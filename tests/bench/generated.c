/* SPDX-License-Identifier: Apache-2.0
 *
 * See generated.h. The ingest thread must not find the document pending: it looks once a second, or
 * when it is woken, and the extent is committed right behind the document.
 */
#include "tests/bench/generated.h"

#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/pool.h"
#include "memory/extent.h"
#include "memory/lexical.h"
#include "services/engine/query.h"
#include "services/engine/split.h"

#define TASK_TOKENS 4096u
#define TOPIC_TOKENS 64u
#define SETS 2u /* of rows, for all pairs in turn */

typedef struct generator {
    loci_pool *pool;
    uint32_t tokens, dim;
    uint16_t *rows[SETS][2]; /* keys, values */
    float *topics;
    uint32_t topic_count;
    /* Of the drawing under way. */
    uint16_t *to;
    uint64_t seed;
} generator;

static uint64_t draw(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static float uniform(uint64_t *state) { /* [-1, 1) */
    return (float)(int32_t)(draw(state) >> 32) * 0x1p-31f;
}

static void draw_rows(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const generator *g = arg;
    uint64_t state = (g->seed + index) * 0x9e3779b97f4a7c15u | 1;
    for (size_t t = index * TASK_TOKENS; t < (index + 1) * TASK_TOKENS && t < g->tokens; t++) {
        const float *topic = g->topics + draw(&state) % g->topic_count * g->dim;
        for (uint32_t i = 0; i < g->dim; i++)
            g->to[t * g->dim + i] = loci_f32_to_bf16(topic[i] + uniform(&state));
    }
}

static loci_status read_pair(void *ctx, uint32_t pair, const uint16_t **k, const uint16_t **v,
                             loci_error *err) {
    const generator *g = ctx;
    (void)err;
    *k = g->rows[pair % SETS][0];
    *v = g->rows[pair % SETS][1];
    return LOCI_OK;
}

static void generator_fini(generator *g) {
    for (uint32_t i = 0; i < 2 * SETS; i++) free(g->rows[i / 2][i % 2]);
    free(g->topics);
}

static loci_status generator_init(generator *g, const loci_engine *engine, uint32_t tokens,
                                  loci_error *err) {
    uint32_t dim = engine->geometry.head_dim;
    uint64_t state = 1;
    *g = (generator){.pool = loci_backend_pool(engine->backend), .tokens = tokens, .dim = dim};
    g->topic_count = tokens / TOPIC_TOKENS + 1;
    g->topics = malloc((size_t)g->topic_count * dim * sizeof *g->topics);
    bool ok = g->topics != NULL;
    for (size_t i = 0; ok && i < (size_t)g->topic_count * dim; i++)
        g->topics[i] = 1.7f * uniform(&state); /* of variance 1 */
    for (uint32_t i = 0; ok && i < 2 * SETS; i++) {
        g->to = g->rows[i / 2][i % 2] = malloc((size_t)tokens * dim * sizeof *g->to);
        g->seed = (uint64_t)i << 32;
        ok = g->to != NULL;
        if (ok) loci_pool_run(g->pool, (tokens + TASK_TOKENS - 1) / TASK_TOKENS, draw_rows, g);
    }
    return ok ? LOCI_OK : loci_fail(err, LOCI_E_NOMEM, "no memory to generate %u tokens", tokens);
}

/* Lists the text's segments up to `tokens`; *end: where the next one would begin. */
static loci_status list_segments(const loci_engine *engine, loci_slice text, uint32_t tokens,
                                 loci_builder *builder, uint64_t *end, loci_error *err) {
    loci_splitter *splitter = NULL;
    const loci_split *split;
    loci_status status;
    builder->listed = true;
    *end = 0;
    LOCI_TRY(loci_splitter_open(loci_model_tokenizer(engine->model),
                                engine->geometry.segment_tokens,
                                loci_model_specials(engine->model)->begin, &splitter, err));
    while (*end < text.len && builder->tokens < tokens) {
        uint32_t row;
        LOCI_TRY_GOTO(loci_splitter_split(splitter, text, *end, 1, &split, err), out);
        *end = split->next;
        if (split->segments == 0) continue;
        uint32_t own = split->begin[1] - split->begin[0] - 1;
        if (own > tokens - builder->tokens) own = tokens - builder->tokens;
        loci_built_segment segment = {1, split->start[0], split->end[0], {0}, own};
        LOCI_TRY_GOTO(loci_builder_add(builder, &segment, &row, err), out);
    }
    status = LOCI_OK;
out:
    loci_splitter_close(splitter);
    return status;
}

static loci_status put_document(loci_engine *engine, const char *name, loci_slice text,
                                loci_error *err) {
    loci_document_writer *writer;
    loci_document_info info;
    bool unchanged;
    LOCI_TRY(
        loci_document_begin(engine->store, name, "text", loci_slice_of(NULL, 0), &writer, err));
    LOCI_TRY(loci_document_append(writer, text, err));
    return loci_document_commit(writer, &info, &unchanged, err);
}

/* The document is complete with this extent. Caller holds corpus->lock. */
static loci_status commit_extent(loci_corpus *corpus, const loci_builder *builder,
                                 loci_manifest_extent *extent, loci_change *change,
                                 loci_error *err) {
    loci_document document;
    loci_status status;
    LOCI_TRY(loci_change_begin(corpus, change, err));
    LOCI_TRY_GOTO(loci_document_load(corpus, NULL, 1, &document, err), fail);
    document.tokens = builder->tokens;
    document.segments = builder->segment_count;
    loci_document_store(corpus, &document, change->batch);
    LOCI_TRY_GOTO(loci_change_done(change, 1, err), fail);
    change->next->cursor = (loci_cursor){.sequence = 2};
    if (!loci_manifest_replace(change->next, 0, change->next->extent_count, extent)) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to change corpus %s", corpus->name);
        goto fail;
    }
    return loci_change_commit(change, "manifest_commit", err);
fail:
    loci_change_abort(change);
    return status;
}

static loci_status fill(loci_engine *engine, loci_corpus *corpus, loci_slice text, uint32_t tokens,
                        loci_builder *builder, generator *g, loci_error *err) {
    loci_manifest_extent extent = {0};
    loci_change change;
    uint64_t end;
    LOCI_TRY(list_segments(engine, text, tokens, builder, &end, err));
    LOCI_TRY(generator_init(g, engine, builder->tokens, err));
    LOCI_TRY(loci_extent_write(corpus->extents_dir, builder, (loci_pair_source){g, read_pair},
                               engine->backend, g->pool, NULL, &extent, err));
    loci_run run = {.sequence = 1, .segments = builder->segment_count, .tokens = builder->tokens};
    extent.runs = malloc(sizeof *extent.runs);
    if (!extent.runs) return loci_fail(err, LOCI_E_NOMEM, "no memory for an extent's documents");
    extent.runs[0] = run;
    extent.run_count = 1;
    uint8_t id[LOCI_EXTENT_ID_BYTES];
    memcpy(id, extent.id, sizeof id);
    LOCI_TRY(put_document(engine, corpus->name, loci_slice_of(text.data, end), err));
    pthread_mutex_lock(&corpus->lock);
    loci_status status = commit_extent(corpus, builder, &extent, &change, err);
    pthread_mutex_unlock(&corpus->lock);
    LOCI_TRY(status);
    loci_change_after(&change);
    return loci_lexical_write(corpus, builder, id, err);
}

loci_status generated_corpus(loci_engine *engine, const char *name,
                             const loci_corpus_options *options, loci_slice text, uint32_t tokens,
                             loci_error *err) {
    loci_corpus_info info;
    loci_corpus *corpus = NULL;
    loci_builder *builder = NULL;
    generator g = {0};
    loci_status status;
    LOCI_TRY(loci_engine_create_corpus(engine, name, options, &info, err));
    LOCI_TRY(loci_corpus_acquire(engine->store, name, &corpus, err));
    LOCI_TRY_GOTO(loci_builder_create(&corpus->geometry, &builder, err), out);
    status = fill(engine, corpus, text, tokens, builder, &g, err);
out:
    generator_fini(&g);
    loci_builder_destroy(builder);
    loci_corpus_release(corpus);
    return status;
}
