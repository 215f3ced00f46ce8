/* SPDX-License-Identifier: Apache-2.0
 *
 * The stages of a look-up in order, up to the selection, and its memory; see lookup.h. Sizes are
 * known to the host when a look-up begins; what is selected stays on the device.
 */
#include "attention/cuda/lookup.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/common.h"
#include "attention/index_layout.h"

#define CHUNK_BYTES ((size_t)8 << 20)
#define KEEP_CHUNKS 8u /* more than that are given back at the next begin */

#define LIMITED_GROUP 16u /* heads of a KV head, at most, whose candidates may be limited */

/* --- memory ---------------------------------------------------------------------------- */

static void arena_clear(lookup_arena *arena) {
    for (size_t i = 0; i < arena->count; i++) (void)cudaFree(arena->chunks[i].data);
    arena->count = arena->current = arena->used = 0;
    arena->cleared++;
}

static bool arena_grow(loci_stream *stream, loci_lookup *lookup, size_t bytes) {
    lookup_arena *arena = &lookup->arena;
    if (loci_cuda_records(stream)) return false;
    size_t size = arena->count ? 2 * arena->chunks[arena->count - 1].bytes : CHUNK_BYTES;
    if (size > (size_t)1 << 30) size = (size_t)1 << 30;
    if (size < bytes) size = bytes;
    lookup_chunk *chunks = realloc(arena->chunks, (arena->count + 1) * sizeof *chunks);
    if (!chunks) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for a look-up");
        return false;
    }
    arena->chunks = chunks;
    void *data = NULL;
    loci_error err;
    if (loci_cuda_malloc(lookup->cuda, size, &data, &err) != LOCI_OK &&
        (size == bytes || loci_cuda_malloc(lookup->cuda, size = bytes, &data, &err) != LOCI_OK)) {
        loci_cuda_fail(stream, err.status, "a look-up of %u rows: %s", lookup->look.rows, err.text);
        return false;
    }
    chunks[arena->count++] = (lookup_chunk){data, size};
    return true;
}

void *look_alloc(loci_stream *stream, loci_lookup *lookup, size_t bytes) {
    lookup_arena *arena = &lookup->arena;
    bytes = (bytes + 255) / 256 * 256 + 256;
    while (arena->current < arena->count &&
           arena->chunks[arena->current].bytes - arena->used < bytes) {
        arena->current++;
        arena->used = 0;
    }
    if (arena->current == arena->count && !arena_grow(stream, lookup, bytes)) {
        lookup->ready = false;
        return NULL;
    }
    void *at = arena->chunks[arena->current].data + arena->used;
    arena->used += bytes;
    return at;
}

void *look_put(loci_stream *stream, loci_lookup *lookup, const void *data, size_t bytes) {
    void *to = look_alloc(stream, lookup, bytes);
    return to && loci_cuda_send(stream, to, data, bytes) ? to : NULL;
}

bool look_launched(loci_stream *stream, loci_lookup *lookup, cudaError_t result, const char *what) {
    lookup->ready = loci_cuda_ok(stream, result, what) && lookup->ready;
    return lookup->ready;
}

uint64_t look_limit(const loci_lookup *lookup) {
    bool applies = lookup->mode == LOCI_MODE_HIERARCHICAL && lookup->look.rows == 1 &&
                   lookup->look.group <= LIMITED_GROUP && !lookup->params.estimate_tail;
    return applies ? lookup->params.candidates_max : 0;
}

bool look_listed(const loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    return lookup->mode == LOCI_MODE_HIERARCHICAL && look->rows == 1 && look->extents > 0 &&
           loci_cuda_tiles(look->vectors) == 1 && !lookup->params.estimate_tail;
}

bool look_shared(const loci_lookup *lookup) {
    return lookup->mode != LOCI_MODE_HIERARCHICAL;
}

bool look_read(loci_stream *stream, void *to, const void *from, size_t bytes) {
    return bytes == 0 ||
           (!loci_cuda_records(stream) &&
            loci_cuda_ok(stream,
                         cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream->stream),
                         "cudaMemcpy to the host") &&
            loci_cuda_ok(stream, cudaStreamSynchronize(stream->stream), "a look-up"));
}

void look_unpin(loci_lookup *lookup) {
    for (size_t i = 0; i < lookup->pinned_count; i++)
        loci_cuda_pairs_unpin(lookup->cuda->pairs, lookup->pinned[i]);
    lookup->pinned_count = 0;
}

loci_status loci_cuda_lookup_create(loci_backend *self, loci_lookup **out, loci_error *err) {
    loci_lookup *lookup = calloc(1, sizeof *lookup);
    if (!lookup) return loci_fail(err, LOCI_E_NOMEM, "no memory for a look-up");
    lookup->cuda = self->ctx;
    *out = lookup;
    return LOCI_OK;
}

void loci_cuda_lookup_free(loci_backend *self, loci_lookup *lookup) {
    (void)self;
    if (!lookup) return;
    look_unpin(lookup);
    look_forget_steps(lookup);
    arena_clear(&lookup->arena);
    for (uint32_t i = 0; i < lookup->table_count; i++) {
        free(lookup->tables[i].host);
        if (lookup->tables[i].device) (void)cudaFree(lookup->tables[i].device);
    }
    free(lookup->tables);
    free(lookup->arena.chunks);
    free(lookup->pinned);
    free(lookup->pairs);
    free(lookup);
}

/* --- begin ----------------------------------------------------------------------------- */

/* Room for the pairs, and for the heads behind them: they are sent together. */
static bool reserve_tables(loci_stream *stream, loci_lookup *lookup, size_t pairs,
                           uint32_t kv_heads) {
    loci_cuda_pair *table =
        realloc(lookup->pairs, pairs * sizeof *table + kv_heads * sizeof *lookup->heads);
    if (table) lookup->pairs = table;
    bool ok = table != NULL;
    if (pairs > lookup->pinned_room) {
        loci_cuda_pair_entry **pinned = realloc(lookup->pinned, pairs * sizeof *pinned);
        if (pinned) lookup->pinned = pinned;
        ok = ok && pinned;
        if (ok) lookup->pinned_room = pairs;
    }
    if (!ok) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for a look-up");
        return false;
    }
    lookup->heads = (void *)(lookup->pairs + pairs);
    memset(lookup->heads, 0, kv_heads * sizeof *lookup->heads);
    return true;
}

static lookup_table *table_of(loci_lookup *lookup, uint32_t layer) {
    if (layer >= lookup->table_count) {
        lookup_table *tables = realloc(lookup->tables, (layer + 1u) * sizeof *tables);
        if (!tables) return NULL;
        memset(tables + lookup->table_count, 0,
               (layer + 1u - lookup->table_count) * sizeof *tables);
        lookup->tables = tables;
        lookup->table_count = layer + 1;
    }
    return &lookup->tables[layer];
}

/* The tables on the device; sent unless they are there from the last look-up of the layer. */
static const void *put_tables(loci_stream *stream, loci_lookup *lookup, size_t bytes) {
    lookup_table *table = table_of(lookup, lookup->layer);
    if (table && table->bytes == bytes && memcmp(table->host, lookup->pairs, bytes) == 0)
        return table->device;
    void *host = table ? realloc(table->host, bytes) : NULL, *device = NULL;
    if (!host) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for a look-up");
        return NULL;
    }
    table->host = host;
    if (table->bytes != bytes) {
        loci_error err;
        table->bytes = 0;
        if (table->device) (void)cudaFree(table->device);
        table->device = NULL;
        if (loci_cuda_malloc(lookup->cuda, bytes, &device, &err) != LOCI_OK) {
            loci_cuda_fail(stream, err.status, "%s", err.text);
            return NULL;
        }
        table->device = device;
    }
    memcpy(host, lookup->pairs, bytes);
    table->bytes = loci_cuda_send(stream, table->device, host, bytes) ? bytes : 0;
    return table->bytes ? table->device : NULL;
}

/* Tokens of an extent that are not deleted; all its pairs have the same. */
static uint64_t live_tokens(const loci_extent_view *extent, const uint64_t *live) {
    if (!live) return extent->tokens;
    uint64_t count = 0;
    for (uint32_t w = 0; w < extent->tokens / 64; w++)
        count += (uint64_t)__builtin_popcountll(live[w]);
    uint32_t rest = extent->tokens % 64;
    uint64_t last = rest ? live[extent->tokens / 64] & ((1ull << rest) - 1) : 0;
    return count + (uint64_t)__builtin_popcountll(last);
}

static loci_status pin_pairs(loci_lookup *lookup, bool below, loci_error *err) {
    const loci_corpus_view *corpus = lookup->corpus;
    for (uint32_t e = 0; e < corpus->extent_count; e++)
        for (uint32_t h = 0; h < corpus->kv_heads; h++) {
            size_t at = (size_t)e * corpus->kv_heads + h;
            LOCI_TRY(loci_cuda_pairs_pin(lookup->cuda->pairs, &corpus->extents[e], lookup->layer,
                                         corpus->kv_heads, h, corpus->head_dim, below,
                                         &lookup->pinned[at], &lookup->pairs[at], err));
            lookup->pinned_count = at + 1;
            const loci_cuda_pair *pair = &lookup->pairs[at];
            if (pair->frame_of) lookup->cached = true;
            if (pair->int8) lookup->look.int8 = true;
            if (pair->row_bytes > lookup->look.row_bytes) lookup->look.row_bytes = pair->row_bytes;
        }
    return LOCI_OK;
}

/* Pins all pairs of the layer; a second time where their own keys and values, pinned before, stood
 * in the way of an index. */
static bool pin_layer(loci_stream *stream, loci_lookup *lookup) {
    loci_error err;
    loci_status status = pin_pairs(lookup, false, &err);
    if (status == LOCI_E_LIMIT) {
        look_unpin(lookup);
        loci_cuda_pairs_lower(lookup->cuda->pairs);
        status = pin_pairs(lookup, true, &err);
    }
    if (status != LOCI_OK) loci_cuda_fail(stream, err.status, "%s", err.text);
    return status == LOCI_OK;
}

/* Numbers roots, leaves and words of one pair. */
static bool open_pair(loci_stream *stream, loci_lookup *lookup, uint32_t e, uint32_t h) {
    const loci_corpus_view *corpus = lookup->corpus;
    const loci_extent_view *extent = &corpus->extents[e];
    loci_cuda_head *head = &lookup->heads[h];
    loci_cuda_pair *pair = &lookup->pairs[(size_t)e * corpus->kv_heads + h];
    pair->kv_head = h;
    pair->root_base = head->roots;
    pair->leaf_base = head->leaves;
    pair->segments = extent->segments;
    pair->segment_base = extent->segment_base;
    pair->word_base = lookup->look.words; /* grown once all heads are through */
    head->roots += pair->roots;
    head->leaves += pair->leaves;
    const uint64_t *live = extent->live ? extent->live[lookup->layer * corpus->kv_heads + h] : NULL;
    if (h == 0) {
        uint64_t tokens = live_tokens(extent, live);
        lookup->live_tokens += tokens;
        lookup->spread += sqrt((double)tokens);
    }
    if (live) {
        lookup->deletions = true;
        /* A kernel may read one word more than there are. */
        size_t bytes = (pair->tokens + 63) / 64 * sizeof *live;
        uint64_t *copy = look_alloc(stream, lookup, bytes + sizeof *live);
        if (!copy || !loci_cuda_send(stream, copy, live, bytes)) return false;
        pair->live = copy;
    }
    loci_cuda_look *look = &lookup->look;
    if (pair->tokens > look->tokens_max) look->tokens_max = pair->tokens;
    if (pair->roots > look->roots_max) look->roots_max = pair->roots;
    if (pair->leaves > look->leaves_max) look->leaves_max = pair->leaves;
    if (pair->root_tokens > look->root_tokens_max) look->root_tokens_max = pair->root_tokens;
    return true;
}

static bool open_pairs(loci_stream *stream, loci_lookup *lookup) {
    const loci_corpus_view *corpus = lookup->corpus;
    loci_cuda_look *look = &lookup->look;
    size_t pairs = (size_t)corpus->extent_count * corpus->kv_heads;
    if (!reserve_tables(stream, lookup, pairs, corpus->kv_heads) || !pin_layer(stream, lookup))
        return false;
    for (uint32_t e = 0; e < corpus->extent_count; e++) {
        for (uint32_t h = 0; h < corpus->kv_heads; h++)
            if (!open_pair(stream, lookup, e, h)) return false;
        look->words += (corpus->extents[e].tokens + 31) / 32;
    }
    look->words += 1; /* mask_bits reads into the next word */
    for (uint32_t h = 0; h < corpus->kv_heads; h++) {
        lookup->heads[h].root_at = look->roots_all;
        lookup->heads[h].leaf_at = look->leaves_all;
        look->roots_all += lookup->heads[h].roots;
        look->leaves_all += lookup->heads[h].leaves;
    }
    size_t heads = corpus->kv_heads * sizeof *lookup->heads;
    look->pairs = put_tables(stream, lookup, pairs * sizeof *lookup->pairs + heads);
    look->heads = look->pairs ? (const void *)(look->pairs + pairs) : NULL;
    return look->pairs != NULL;
}

void look_open(loci_stream *stream, loci_lookup *lookup, const loci_corpus_view *corpus,
               uint32_t layer) {
    look_unpin(lookup);
    if (lookup->arena.count > KEEP_CHUNKS) arena_clear(&lookup->arena);
    lookup->arena.current = lookup->arena.used = 0;
    lookup->corpus = corpus;
    lookup->layer = layer;
    lookup->deletions = lookup->cached = false;
    lookup->live_tokens = 0;
    lookup->spread = 0.0;
    lookup->flat_segment_begin = NULL;
    lookup->look = (loci_cuda_look){
        .extents = corpus->extent_count,
        .kv_heads = corpus->kv_heads,
        .rows = lookup->look.rows,
        .dim = corpus->head_dim,
    };
    lookup->ready = true;
    lookup->ready = open_pairs(stream, lookup);
    if (!lookup->ready || corpus->flat_tokens == 0) return;
    lookup->flat_segment_begin = look_put(stream, lookup, corpus->flat_segment_begin,
                                          (corpus->flat_segments + 1u) * sizeof(uint32_t));
    lookup->ready = lookup->flat_segment_begin != NULL;
}

const uint16_t *look_flat_k(loci_stream *stream, const loci_lookup *lookup) {
    const loci_corpus_view *corpus = lookup->corpus;
    size_t row = (size_t)corpus->kv_heads * corpus->head_dim * sizeof(uint16_t);
    return loci_cuda_ptr(stream, loci_ref_at(corpus->flat_k[lookup->layer], 0),
                         corpus->flat_tokens * row);
}

static size_t mask_bytes(const loci_cuda_look *look) {
    return (size_t)look->kv_heads * look->mask_rows * look->words * sizeof(uint32_t);
}

static bool clear_mask(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    return look_launched(stream, lookup,
                         cudaMemsetAsync(look->token_mask, 0, mask_bytes(look), stream->stream),
                         "cudaMemset");
}

bool look_mask(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    if (lookup->masked || lookup->mode == LOCI_MODE_SQUEEZED) return lookup->ready;
    lookup->masked = true;
    return clear_mask(stream, lookup) &&
           look_launched(stream, lookup,
                         lookup->mode == LOCI_MODE_DENSE
                             ? loci_cuda_k_mask_live(stream->stream, look)
                             : loci_cuda_k_mask_chosen(stream->stream, look, &lookup->choice),
                         "select");
}

static bool alloc_look(loci_stream *stream, loci_lookup *lookup) {
    loci_cuda_look *look = &lookup->look;
    size_t vectors = (size_t)look->kv_heads * look->vectors, values = vectors * look->dim;
    size_t pairs = (size_t)look->extents * look->kv_heads;
    look->q = look_alloc(stream, lookup, values * sizeof(float));
    look->q8 = look_alloc(stream, lookup, values);
    look->qq8 = look_alloc(stream, lookup, values);
    look->q_scale = look_alloc(stream, lookup, vectors * sizeof(float));
    look->qq_scale = look_alloc(stream, lookup, vectors * sizeof(float));
    look->q_sum = look_alloc(stream, lookup, vectors * sizeof(int32_t));
    look->steady = look_alloc(stream, lookup, vectors * sizeof(float));
    look->mean_terms = look_alloc(stream, lookup, pairs * look->vectors * sizeof(float));
    look->token_mask = look_alloc(stream, lookup, mask_bytes(look));
    look->begun_ns = look_alloc(stream, lookup, sizeof *look->begun_ns);
    return lookup->ready;
}

/* Sums of all tokens' sketches are kept for so many lots of vectors and in so much room, which the
 * L2 mostly holds; else they are added up twice. */
#define SUMS_LOTS 4u
#define SUMS_BYTES ((size_t)512 << 20)

static size_t sums_bytes(const loci_cuda_look *look) {
    size_t lots = (size_t)look->kv_heads * look->rows * loci_cuda_lots(look);
    return lots * look->words * 32 * sizeof(uint4);
}

/* What kernels count in, one piece of memory that the first one clears. */
static bool alloc_zeroed(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_choice *c = &lookup->choice;
    size_t hr = (size_t)look->kv_heads * look->rows, pairs = (size_t)look->extents * look->kv_heads;
    size_t masses = hr * LOCI_CUDA_STEPS * sizeof *c->step_mass;
    size_t words =
        hr * (LOCI_CUDA_STEPS + look->words + loci_cuda_runs(look) + 4) + pairs * look->rows;
    if (c->limit) words += hr * look->vectors;
    if (look_listed(lookup)) words += hr * LOCI_CUDA_CHOOSERS;
    size_t bytes = (masses + words * sizeof(uint32_t) + 15) / 16 * 16;
    c->zeroed_count = bytes / 16;
    c->zeroed = look_alloc(stream, lookup, bytes);
    if (!c->zeroed) return false;
    c->step_mass = (unsigned long long *)c->zeroed;
    c->step_count = (uint32_t *)(c->step_mass + hr * LOCI_CUDA_STEPS);
    c->candidates = c->step_count + hr * LOCI_CUDA_STEPS;
    c->run_count = c->candidates + hr * look->words;
    c->leaf_count = c->run_count + hr * loci_cuda_runs(look);
    c->count = c->leaf_count + hr;
    c->step_listed = c->count + hr;
    c->kept_count = c->step_listed + 2 * hr;
    c->reached_count = c->kept_count + pairs * look->rows;
    c->chosen_told = c->reached_count + (c->limit ? hr * look->vectors : 0);
    return true;
}

static bool alloc_choice(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    const loci_select_params *params = &lookup->params;
    float slack = 1.0f - params->top_p;
    loci_cuda_choice *c = &lookup->choice;
    size_t vectors = look->vectors, pairs = (size_t)look->extents * look->kv_heads;
    size_t lots = loci_cuda_lots(look), hr = (size_t)look->kv_heads * look->rows;
    size_t sums = sums_bytes(look);
    bool keeps =
        look->rows * lots <= SUMS_LOTS && sums <= SUMS_BYTES && sums <= lookup->cuda->room_bytes;
    uint64_t limit = look_limit(lookup);
    uint32_t slices = hr < LOCI_CUDA_SLICES ? (uint32_t)(LOCI_CUDA_SLICES / hr) : 1;
    *c = (loci_cuda_choice){
        .roots_wanted = loci_select_count(params->roots, lookup->spread, lookup->live_tokens,
                                          params->roots_min),
        .candidates_wanted =
            limit ? limit
                  : loci_select_count(params->candidates, sqrt((double)lookup->live_tokens),
                                      lookup->live_tokens, params->candidates_min),
        .budget = params->budget,
        .limit = limit,
        .key_reach = slack > 0.0f ? log((double)lookup->live_tokens / (1.0 - (double)params->top_p))
                                  : (double)INFINITY,
        .root_slack = loci_select_root_slack(params->top_p),
        .reach = slack > 0.0f && !limit ? logf((float)lookup->live_tokens / slack) : INFINITY,
        .top_p = params->top_p,
        .tail = params->estimate_tail,
        .root_score = look_alloc(stream, lookup, look->roots_all * vectors * sizeof(float)),
        .root_centre = look_alloc(stream, lookup, look->roots_all * vectors * sizeof(float)),
        .root_floor = look_alloc(stream, lookup, look->kv_heads * vectors * sizeof(float)),
        .root_kept = look_alloc(stream, lookup, look->roots_all * look->rows),
        .kept = look_alloc(stream, lookup, look->roots_all * look->rows * sizeof *c->kept),
        .leaf_place = look_alloc(stream, lookup, look->roots_all * look->rows * sizeof(uint32_t)),
        .table =
            look_alloc(stream, lookup, pairs * look->rows * lots * LOCI_CUDA_LOT * look->dim * 4),
        .table_base = look_alloc(stream, lookup, pairs * vectors * sizeof(float)),
        .table_scale = look_alloc(stream, lookup, pairs * vectors * sizeof(float)),
        .leaf_score = look_alloc(stream, lookup, look->leaves_all * vectors * sizeof(float)),
        .sums = keeps ? look_alloc(stream, lookup, sums) : NULL,
        .floor = look_alloc(stream, lookup, look->kv_heads * vectors * sizeof(float)),
        .key_scale =
            limit ? look_alloc(stream, lookup, look->kv_heads * vectors * sizeof *c->key_scale)
                  : NULL,
        .rank = look_alloc(stream, lookup, hr * look->words * sizeof(uint32_t)),
        .slices = slices,
        .totals = look_alloc(stream, lookup, look->kv_heads * vectors * slices * 2 * sizeof(float)),
        .step_list =
            hr <= LOCI_CUDA_CUT_BLOCKS
                ? look_alloc(stream, lookup, hr * LOCI_CUDA_STEP_LIST * sizeof *c->step_list)
                : NULL,
        .cut = look_alloc(stream, lookup, hr * sizeof *c->cut),
        .chosen_count = look_alloc(stream, lookup, hr * sizeof *c->chosen_count),
        .folded = look_alloc(stream, lookup, pairs * vectors * look->dim),
        .folded_scale = look_alloc(stream, lookup, pairs * vectors * sizeof(float)),
        .folded_sum = look_alloc(stream, lookup, pairs * vectors * sizeof(int32_t)),
    };
    return alloc_zeroed(stream, lookup) && lookup->ready;
}

/* False, with a failure of the stream, for what no look-up can be made of. */
static bool check_call(loci_stream *stream, const loci_corpus_view *corpus,
                       const loci_select_params *params) {
    uint32_t dim = corpus->head_dim;
    const float *threshold = params->squeezed_threshold;
    if (dim == 0 || dim > LOCI_HEAD_DIM_MAX || dim % 16 != 0) {
        loci_cuda_fail(stream, LOCI_E_UNSUPPORTED, "head_dim %u is not a multiple of 16 up to %u",
                       dim, LOCI_HEAD_DIM_MAX);
        return false;
    }
    if (params->mode == LOCI_MODE_SQUEEZED && !(isfinite(threshold[0]) && isfinite(threshold[1]))) {
        loci_cuda_fail(stream, LOCI_E_INVAL, "thresholds of mode squeezed are not finite");
        return false;
    }
    return true;
}

/* The queries; in mode hierarchical also what they know of each pair. select makes the mask in mode
 * squeezed alone, else look_mask does. */
static void put_queries(loci_stream *stream, loci_lookup *lookup,
                        const loci_cuda_look_query *query) {
    const loci_cuda_look *look = &lookup->look;
    if (lookup->mode == LOCI_MODE_SQUEEZED && !clear_mask(stream, lookup)) return;
    if (lookup->mode != LOCI_MODE_HIERARCHICAL || look->extents == 0)
        (void)look_launched(stream, lookup, loci_cuda_k_queries(stream->stream, look, query),
                            "lookup_begin");
    else if (alloc_choice(stream, lookup))
        (void)look_launched(stream, lookup,
                            loci_cuda_k_prepare(stream->stream, look, &lookup->choice, query),
                            "lookup_begin");
}

void loci_cuda_lookup_begin(loci_stream *stream, loci_lookup *lookup,
                            const loci_corpus_view *corpus, uint32_t retrieval_layer, loci_ref q,
                            uint32_t q_stride, uint32_t rows, uint32_t q_heads, float scale,
                            loci_ref steady_lse, const loci_select_params *params) {
    LOCI_ASSERT(rows > 0 && q_heads % corpus->kv_heads == 0 && q_heads > 0);
    bool opened = lookup->opened;
    lookup->opened = false;
    lookup->params = *params;
    lookup->mode = params->mode;
    if (loci_select_all(params)) lookup->mode = LOCI_MODE_DENSE;
    lookup->tokens_scored = lookup->tokens_selected = lookup->attended = false;
    lookup->masked = lookup->counted = lookup->figured = false;
    lookup->wide_chunk = 0;
    lookup->logits = NULL;
    lookup->mass = NULL;
    lookup->figures = NULL;
    lookup->ready = check_call(stream, corpus, params);
    lookup->look.rows = rows;
    if (lookup->ready && !opened) look_open(stream, lookup, corpus, retrieval_layer);
    loci_cuda_look *look = &lookup->look;
    look->q_heads = q_heads;
    look->group = q_heads / corpus->kv_heads;
    look->vectors = rows * look->group;
    look->mask_rows = look_shared(lookup) ? 1 : rows;
    look->logs = lookup->cuda->logs;
    size_t last = (size_t)(rows - 1) * q_stride + (size_t)q_heads * corpus->head_dim;
    loci_cuda_look_query query = {
        .q = loci_cuda_ptr(stream, q, last * sizeof(float)),
        .q_stride = q_stride,
        .scale = scale,
    };
    if (steady_lse.buffer)
        query.steady = loci_cuda_ptr(stream, steady_lse, (size_t)rows * q_heads * sizeof(float));
    lookup->ready = lookup->ready && query.q && alloc_look(stream, lookup);
    if (lookup->ready) put_queries(stream, lookup, &query);
}

/* --- stages ---------------------------------------------------------------------------- */

/* Room for the live tokens of nodes. */
static bool alloc_live(loci_stream *stream, loci_lookup *lookup) {
    loci_cuda_look *look = &lookup->look;
    look->root_live = look_alloc(stream, lookup, look->roots_all * sizeof(uint32_t));
    look->leaf_live = look_alloc(stream, lookup, look->leaves_all);
    return lookup->ready;
}

bool look_count(loci_stream *stream, loci_lookup *lookup) {
    if (lookup->counted) return lookup->ready;
    lookup->counted = true;
    return look_launched(stream, lookup, loci_cuda_k_count_live(stream->stream, &lookup->look),
                         "score_nodes");
}

static bool alloc_squeeze(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_squeeze *s = &lookup->squeeze;
    uint32_t runs = (look->leaves_max + 31) / 32; /* no fewer leaves than roots */
    size_t pairs = (size_t)look->extents * look->kv_heads;
    *s = (loci_cuda_squeeze){
        .score = {look_alloc(stream, lookup, look->roots_all * sizeof(float)),
                  look_alloc(stream, lookup, look->leaves_all * sizeof(float))},
        .total = look_alloc(stream, lookup, (size_t)look->kv_heads * look->vectors * sizeof(float)),
        .partial = look_alloc(stream, lookup, pairs * runs * look->vectors * 2 * sizeof(float)),
        .runs = runs,
        .threshold = {lookup->params.squeezed_threshold[0], lookup->params.squeezed_threshold[1]},
    };
    return lookup->ready;
}

/* Waits for `count` numbers of the device and gives the greatest sum of `each` of them, at least 1;
 * 0 after a failure. */
static uint64_t read_most(loci_stream *stream, loci_lookup *lookup, const uint32_t *from,
                          size_t count, size_t each) {
    uint32_t *counts = malloc(count * each * sizeof *counts);
    uint64_t most = 1;
    if (!counts) loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for a look-up");
    lookup->ready = counts && look_read(stream, counts, from, count * each * sizeof *counts);
    for (size_t i = 0; lookup->ready && i < count; i++) {
        uint64_t sum = 0;
        for (size_t j = 0; j < each; j++) sum += counts[i * each + j];
        if (sum > most) most = sum;
    }
    free(counts);
    return lookup->ready ? most : 0;
}

/* Floors such that no more tokens reach them than a limit allows. There is room for all tokens, or,
 * where that is much, for as many as are counted first, which the host must wait for. */
static void limit_candidates(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_choice *c = &lookup->choice;
    size_t vectors = (size_t)look->kv_heads * look->vectors;
    uint64_t room = (uint64_t)look->words * 32;
    if (vectors * room * sizeof(float) > lookup->cuda->room_bytes) {
        if (!look_launched(stream, lookup, loci_cuda_k_list_reaching(stream->stream, look, c),
                           "limit"))
            return;
        room = read_most(stream, lookup, c->reached_count, vectors, 1);
        if (!room ||
            !look_launched(stream, lookup,
                           cudaMemsetAsync(c->reached_count, 0, vectors * sizeof *c->reached_count,
                                           stream->stream),
                           "cudaMemset"))
            return;
    }
    c->reached_room = room;
    c->reached = look_alloc(stream, lookup, vectors * room * sizeof(float));
    if (c->reached &&
        look_launched(stream, lookup, loci_cuda_k_list_reaching(stream->stream, look, c), "limit"))
        (void)look_launched(stream, lookup, loci_cuda_k_raise_floors(stream->stream, look, c),
                            "limit");
}

void loci_cuda_score_nodes(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready || lookup->mode == LOCI_MODE_DENSE || !alloc_live(stream, lookup)) return;
    const loci_cuda_look *look = &lookup->look;
    if (lookup->mode == LOCI_MODE_SQUEEZED) {
        if (look_count(stream, lookup) && alloc_squeeze(stream, lookup))
            (void)look_launched(stream, lookup,
                                loci_cuda_k_squeeze(stream->stream, look, &lookup->squeeze),
                                "score_nodes");
        return;
    }
    const loci_cuda_choice *c = &lookup->choice;
    if (lookup->deletions && !look_count(stream, lookup)) return;
    if (look_launched(stream, lookup, loci_cuda_k_roots(stream->stream, look, c), "roots") &&
        look_launched(stream, lookup,
                      loci_cuda_k_leaves(stream->stream, look, c, lookup->cuda->block_bytes),
                      "leaves") &&
        c->limit && look->extents > 0)
        limit_candidates(stream, lookup);
}

/* Memory where the sums of sketches stand, which have done their work, or, where that is used up,
 * of the arena. */
static void *alloc_over_sums(loci_stream *stream, loci_lookup *lookup, size_t *used, size_t bytes) {
    size_t room = lookup->choice.sums ? sums_bytes(&lookup->look) : 0;
    bytes = (bytes + 15) / 16 * 16;
    if (room - *used < bytes) return look_alloc(stream, lookup, bytes);
    void *at = (uint8_t *)lookup->choice.sums + *used;
    *used += bytes;
    return at;
}

/* Room for the candidates of each row: for all tokens, or, where that is much, for as many as there
 * are, which the host must wait for. What is chosen of a single row, its segments and slots fit
 * over its sums. */
static bool reserve_candidates(loci_stream *stream, loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_choice *c = &lookup->choice;
    bool listed = look_listed(lookup);
    size_t own = sizeof *c->chosen + sizeof *c->segment;
    uint64_t rows = (uint64_t)look->kv_heads * look->rows;
    uint64_t each = (look->group + 2) * 4 + (listed ? own : 0);
    c->room = (uint64_t)look->words * 32;
    if (rows * c->room * each > lookup->cuda->room_bytes)
        c->room = read_most(stream, lookup, c->run_count, rows, loci_cuda_runs(look));
    if (!c->room) return false;
    size_t places = rows * c->room, used = 0;
    if (listed) {
        c->chosen = alloc_over_sums(stream, lookup, &used, places * sizeof *c->chosen);
        c->segment = alloc_over_sums(stream, lookup, &used, places * sizeof *c->segment);
    }
    c->slots = alloc_over_sums(stream, lookup, &used, places * sizeof *c->slots);
    c->share = alloc_over_sums(stream, lookup, &used, places * sizeof *c->share);
    c->score = look_alloc(stream, lookup, look->group * places * sizeof *c->score);
    return lookup->ready;
}

void loci_cuda_score_codes(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready || lookup->mode != LOCI_MODE_HIERARCHICAL) return;
    const loci_cuda_look *look = &lookup->look;
    const loci_cuda_choice *c = &lookup->choice;
    if (!look_launched(stream, lookup, loci_cuda_k_candidates(stream->stream, look, c),
                       "candidates") ||
        !reserve_candidates(stream, lookup))
        return;
    lookup->tokens_scored =
        look_launched(stream, lookup, loci_cuda_k_codes(stream->stream, look, c), "score_codes");
}

void loci_cuda_select(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready) return;
    if (lookup->mode == LOCI_MODE_SQUEEZED)
        (void)look_launched(
            stream, lookup,
            loci_cuda_k_squeeze_select(stream->stream, &lookup->look, &lookup->squeeze), "select");
    else if (lookup->mode == LOCI_MODE_HIERARCHICAL)
        (void)look_launched(
            stream, lookup,
            loci_cuda_k_choose_tokens(stream->stream, &lookup->look, &lookup->choice), "select");
    lookup->tokens_selected = lookup->ready;
}
