/* SPDX-License-Identifier: Apache-2.0
 *
 * The stages of a look-up in order, its memory, and what it tells the host; see lookup.h.
 */
#include "attention/cpu/lookup.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define CHUNK_BYTES ((size_t)1 << 20)
#define KEEP_BYTES ((size_t)8 << 20) /* never given back before the look-up is freed */

static void arena_clear(loci_lookup *lookup) {
    lookup_arena *arena = &lookup->arena;
    loci_cpu *cpu = lookup->cpu;
    for (size_t i = 0; i < arena->count; i++) free(arena->chunks[i].data);
    if (cpu->lookup_memory && arena->bytes > 0)
        (void)cpu->lookup_memory(cpu->lookup_memory_ctx, -(int64_t)arena->bytes, NULL);
    arena->count = arena->bytes = 0;
}

loci_status loci_cpu_lookup_create(loci_backend *self, loci_lookup **out, loci_error *err) {
    loci_lookup *lookup = calloc(1, sizeof *lookup);
    if (!lookup) return loci_fail(err, LOCI_E_NOMEM, "no memory for a look-up");
    lookup->cpu = self->ctx;
    lookup->kernels = loci_corpus_kernels_of(lookup->cpu->isa);
    *out = lookup;
    return LOCI_OK;
}

void loci_cpu_lookup_free(loci_backend *self, loci_lookup *lookup) {
    (void)self;
    if (!lookup) return;
    arena_clear(lookup);
    free(lookup->arena.chunks);
    free(lookup);
}

void loci_cpu_lookup_account(loci_backend *self, loci_lookup_memory_fn fn, void *ctx) {
    loci_cpu *cpu = self->ctx;
    cpu->lookup_memory = fn;
    cpu->lookup_memory_ctx = ctx;
}

/* Twice the last chunk, or as much as is needed where so much is refused. */
static bool arena_grow(loci_lookup *lookup, size_t bytes) {
    lookup_arena *arena = &lookup->arena;
    loci_cpu *cpu = lookup->cpu;
    loci_error refusal;
    size_t size = arena->count ? arena->chunks[arena->count - 1].bytes : CHUNK_BYTES / 2;
    size = size < (size_t)1 << 28 ? size * 2 : size;
    if (size < bytes) size = bytes;
    if (bytes > INT64_MAX) return false;
    lookup_chunk *chunks = realloc(arena->chunks, (arena->count + 1) * sizeof *chunks);
    if (!chunks) return false;
    arena->chunks = chunks;
    if (cpu->lookup_memory) {
        loci_status status = cpu->lookup_memory(cpu->lookup_memory_ctx, (int64_t)size, &refusal);
        if (status != LOCI_OK && size > bytes) {
            size = bytes;
            status = cpu->lookup_memory(cpu->lookup_memory_ctx, (int64_t)size, &refusal);
        }
        if (status != LOCI_OK) {
            arena->refusal = refusal;
            return false;
        }
    }
    void *data = NULL;
    if (posix_memalign(&data, 64, size) != 0) {
        if (cpu->lookup_memory)
            (void)cpu->lookup_memory(cpu->lookup_memory_ctx, -(int64_t)size, NULL);
        return false;
    }
    chunks[arena->count++] = (lookup_chunk){data, size};
    arena->bytes += size;
    return true;
}

static size_t arena_used(const lookup_arena *arena) {
    size_t used = arena->used;
    for (size_t i = 0; i < arena->current; i++) used += arena->chunks[i].bytes;
    return used;
}

/* Everything is free again. Chunks far larger than what recent look-ups used are given back. */
static void arena_reset(loci_lookup *lookup) {
    lookup_arena *arena = &lookup->arena;
    size_t used = arena_used(arena);
    arena->recent -= arena->recent / 16;
    if (used > arena->recent) arena->recent = used;
    if (arena->bytes > KEEP_BYTES && arena->bytes / 4 > arena->recent) arena_clear(lookup);
    arena->current = arena->used = 0;
    arena->refusal.status = LOCI_OK;
}

void *lookup_alloc(loci_lookup *lookup, size_t bytes) {
    lookup_arena *arena = &lookup->arena;
    bytes = (bytes + 63) / 64 * 64 + 64; /* vector loads may reach past the end */
    while (arena->current < arena->count &&
           arena->chunks[arena->current].bytes - arena->used < bytes) {
        arena->current++;
        arena->used = 0;
    }
    if (arena->current == arena->count && !arena_grow(lookup, bytes)) return NULL;
    void *at = arena->chunks[arena->current].data + arena->used;
    arena->used += bytes;
    return at;
}

bool lookup_scratch(loci_lookup *lookup, size_t floats) {
    unsigned threads = loci_pool_threads(lookup->cpu->pool);
    lookup->scratch = lookup_alloc(lookup, threads * sizeof *lookup->scratch);
    for (unsigned i = 0; lookup->scratch && i < threads; i++) {
        lookup->scratch[i] = lookup_alloc(lookup, floats * sizeof(float));
        if (!lookup->scratch[i]) return false;
    }
    return lookup->scratch != NULL;
}

void lookup_no_memory(loci_stream *stream, loci_lookup *lookup) {
    const loci_error *refusal = &lookup->arena.refusal;
    lookup->ready = false;
    if (refusal->status == LOCI_OK)
        loci_cpu_fail(stream, LOCI_E_NOMEM, "no memory for a look-up of %u rows", lookup->rows);
    else if (stream->error.status == LOCI_OK)
        stream->error = *refusal;
}

void lookup_fault(lookup_part *part, const char *what, uint32_t index) {
    if (part->error.status != LOCI_OK) return;
    (void)loci_fail(&part->error, LOCI_E_CORRUPT, "%s %u: wrong hash", what, index);
}

bool lookup_report(loci_stream *stream, loci_lookup *lookup) {
    for (size_t i = 0; i < lookup->part_count; i++) {
        const lookup_part *part = &lookup->parts[i];
        if (part->error.status == LOCI_OK) continue;
        lookup->ready = false;
        loci_cpu_fail(stream, part->error.status, "extent %016llx, layer %u, KV head %u: %s",
                      (unsigned long long)part->extent->id, lookup->layer, part->kv_head,
                      part->error.text);
        return false;
    }
    return true;
}

void lookup_run_parts(loci_stream *stream, loci_lookup *lookup, loci_pool_fn fn) {
    loci_pool_run(lookup->cpu->pool, lookup->part_count, fn, lookup);
    (void)lookup_report(stream, lookup);
}

void lookup_run_rows(loci_lookup *lookup, loci_pool_fn fn) {
    loci_pool_run(lookup->cpu->pool, (size_t)lookup->kv_heads * lookup->rows, fn, lookup);
}

void lookup_join_masks(const lookup_head *head, uint32_t root, const uint32_t *masks,
                       uint32_t *all) {
    memset(all, 0, LOCI_ROOT_LEAVES_MAX * sizeof *all);
    for (size_t e = head->entry_begin[root]; e < head->entry_begin[root + 1]; e++) {
        const uint32_t *mask = masks + head->mask_at[e];
        for (uint64_t kept = head->leaf_mask[e]; kept; kept &= kept - 1)
            all[__builtin_ctzll(kept)] |= *mask++;
    }
}

void lookup_mean_terms(const loci_lookup *lookup, const lookup_part *part, float *out) {
    const float *mean = loci_pair_mean(part->blob);
    const float *q = lookup->q + (size_t)part->kv_head * lookup->vectors * lookup->dim;
    for (uint32_t v = 0; v < lookup->blocks * LOCI_LANES; v++) {
        float sum = 0.0f;
        for (uint32_t i = 0; v < lookup->vectors && i < lookup->dim; i++)
            sum += q[(size_t)v * lookup->dim + i] * mean[i];
        out[v] = sum;
    }
}

/* --- begin ----------------------------------------------------------------------------- */

static bool alloc_queries(loci_lookup *lookup) {
    size_t heads = lookup->kv_heads, lanes = (size_t)lookup->blocks * LOCI_LANES;
    size_t vectors = lookup->vectors, dim = lookup->dim;
    lookup->q = lookup_alloc(lookup, heads * vectors * dim * sizeof(float));
    lookup->q_lanes = lookup_alloc(lookup, heads * lanes * dim * sizeof(float));
    lookup->q_codes = lookup_alloc(lookup, heads * lanes * dim);
    lookup->qq_codes = lookup_alloc(lookup, heads * lanes * dim);
    lookup->q_scale = lookup_alloc(lookup, heads * lanes * sizeof(float));
    lookup->qq_scale = lookup_alloc(lookup, heads * lanes * sizeof(float));
    lookup->q_sum = lookup_alloc(lookup, heads * lanes * sizeof(int32_t));
    lookup->qq_sum = lookup_alloc(lookup, heads * lanes * sizeof(int32_t));
    lookup->steady = lookup_alloc(lookup, heads * vectors * sizeof(float));
    return lookup->q && lookup->q_lanes && lookup->q_codes && lookup->qq_codes && lookup->q_scale &&
           lookup->qq_scale && lookup->q_sum && lookup->qq_sum && lookup->steady;
}

/* Copies, scales and packs the queries of one KV head after another. */
static bool load_queries(loci_lookup *lookup, loci_ref q, uint32_t q_stride, float scale,
                         loci_ref steady_lse) {
    uint32_t dim = lookup->dim, group = lookup->group, vectors = lookup->vectors;
    size_t last = (size_t)(lookup->rows - 1) * q_stride + (size_t)lookup->q_heads * dim;
    const float *in = loci_cpu_ptr(q, last * sizeof(float));
    size_t steady_bytes = (size_t)lookup->rows * lookup->q_heads * sizeof(float);
    const float *steady = steady_lse.buffer ? loci_cpu_ptr(steady_lse, steady_bytes) : NULL;
    float *squares = lookup_alloc(lookup, (size_t)vectors * dim * sizeof *squares);
    if (!alloc_queries(lookup) || !squares) return false;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        float *out = lookup->q + (size_t)h * vectors * dim;
        for (uint32_t v = 0; v < vectors; v++) {
            uint32_t row = v / group, head = h * group + v % group;
            const float *from = in + (size_t)row * q_stride + (size_t)head * dim;
            for (uint32_t i = 0; i < dim; i++) {
                float value = from[i] * scale;
                out[(size_t)v * dim + i] = value;
                squares[(size_t)v * dim + i] = value * value * 0.5f;
            }
            lookup->steady[h * vectors + v] =
                steady ? steady[row * lookup->q_heads + head] : -INFINITY;
        }
        size_t lanes = (size_t)h * lookup->blocks * LOCI_LANES;
        loci_pack_lanes_f32(lookup->q_lanes + lanes * dim, out, dim, vectors, dim);
        loci_pack_lanes_i8(lookup->q_codes + lanes * dim, lookup->q_scale + lanes,
                           lookup->q_sum + lanes, out, dim, vectors, dim);
        loci_pack_lanes_i8(lookup->qq_codes + lanes * dim, lookup->qq_scale + lanes,
                           lookup->qq_sum + lanes, squares, dim, vectors, dim);
    }
    return true;
}

/* The blob of a pair, its header checked. */
static loci_status open_pair(const loci_lookup *lookup, const loci_extent_view *extent,
                             uint32_t index, const uint8_t **blob, loci_error *err) {
    uint64_t at = extent->pair_at[index], size = extent->buffer->bytes;
    if (at > size || at % 8 != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "pair lies outside its block");
    *blob = extent->buffer->data + at;
    LOCI_TRY(loci_pair_check_header(*blob, size - at, extent->pair_hash[index], err));
    const loci_pair_header *header = loci_pair_header_of(*blob);
    if (header->head_dim == lookup->dim && header->tokens == extent->tokens) return LOCI_OK;
    return loci_fail(err, LOCI_E_CORRUPT, "header: of another shape than its extent");
}

/* Most roots of a part. Tables and partial results are there once a part and vector: of many rows,
 * which keep all threads at work anyway, there are fewer, larger ones. */
static uint32_t most_roots(const loci_lookup *lookup) {
    return lookup->rows == 1 ? lookup->cpu->part_roots : 4 * lookup->cpu->part_roots;
}

/* Opens the pairs, numbers their roots and counts their parts. */
static bool open_pairs(loci_stream *stream, loci_lookup *lookup, lookup_part *pairs) {
    const loci_corpus_view *corpus = lookup->corpus;
    uint32_t most = most_roots(lookup);
    for (size_t i = 0; i < (size_t)corpus->extent_count * lookup->kv_heads; i++) {
        const loci_extent_view *extent = &corpus->extents[i / lookup->kv_heads];
        uint32_t h = (uint32_t)(i % lookup->kv_heads), index = lookup->layer * lookup->kv_heads + h;
        lookup_part *whole = &pairs[i];
        *whole = (lookup_part){.extent = extent, .kv_head = h, .root_base = lookup->heads[h].roots};
        whole->live = extent->live ? extent->live[index] : NULL;
        loci_error err = {0};
        if (open_pair(lookup, extent, index, &whole->blob, &err) != LOCI_OK) {
            loci_cpu_fail(stream, err.status, "extent %016llx, layer %u, KV head %u: %s",
                          (unsigned long long)extent->id, lookup->layer, h, err.text);
            return false;
        }
        whole->end = loci_pair_header_of(whole->blob)->roots;
        lookup->heads[h].roots += whole->end;
        lookup->pair_begin[i] = lookup->part_count;
        lookup->part_count += (whole->end + most - 1) / most;
    }
    return true;
}

static void cut_pair(const lookup_part *whole, uint32_t most, lookup_part *parts) {
    for (uint32_t first = 0; first < whole->end; first += most) {
        *parts = *whole;
        parts->first = first;
        if (whole->end - first > most) parts->end = first + most;
        parts++;
    }
}

static bool make_parts(loci_stream *stream, loci_lookup *lookup) {
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads;
    lookup_part *whole = lookup_alloc(lookup, pairs * sizeof *whole);
    lookup->pair_begin = lookup_alloc(lookup, (pairs + 1) * sizeof *lookup->pair_begin);
    if (!whole || !lookup->pair_begin) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    if (!open_pairs(stream, lookup, whole)) return false;
    lookup->pair_begin[pairs] = lookup->part_count;
    size_t lanes = lookup->part_count * lookup->blocks * LOCI_LANES;
    lookup->parts = lookup_alloc(lookup, lookup->part_count * sizeof *lookup->parts);
    lookup->task_terms = lookup_alloc(lookup, lanes * sizeof *lookup->task_terms);
    if (!lookup->parts || !lookup->task_terms) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    for (size_t i = 0; i < pairs; i++)
        cut_pair(&whole[i], most_roots(lookup), lookup->parts + lookup->pair_begin[i]);
    return true;
}

static bool alloc_heads(loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        lookup_head *head = &lookup->heads[h];
        size_t roots = head->roots;
        head->root_live = lookup_alloc(lookup, roots * sizeof *head->root_live);
        head->root_first = lookup_alloc(lookup, roots * sizeof *head->root_first);
        head->root_leaves = lookup_alloc(lookup, roots);
        head->root_groups = lookup_alloc(lookup, roots);
        head->entry_begin = lookup_alloc(lookup, (roots + 1) * sizeof *head->entry_begin);
        head->leaf_at = lookup_alloc(lookup, roots * sizeof *head->leaf_at);
        head->floor = lookup_alloc(lookup, lookup->vectors * sizeof *head->floor);
        if (!head->root_live || !head->root_first || !head->root_leaves || !head->root_groups ||
            !head->entry_begin || !head->leaf_at || !head->floor)
            return false;
        head->entry_begin[roots] = 0;
    }
    return true;
}

void loci_cpu_lookup_begin(loci_stream *stream, loci_lookup *lookup, const loci_corpus_view *corpus,
                           uint32_t retrieval_layer, loci_ref q, uint32_t q_stride, uint32_t rows,
                           uint32_t q_heads, float scale, loci_ref steady_lse,
                           const loci_select_params *params) {
    arena_reset(lookup);
    lookup_arena arena = lookup->arena;
    *lookup = (loci_lookup){
        .cpu = lookup->cpu,
        .kernels = lookup->kernels,
        .corpus = corpus,
        .params = *params,
        .mode = params->mode,
        .begun_ns = loci_now_ns(),
        .layer = retrieval_layer,
        .rows = rows,
        .q_heads = q_heads,
        .kv_heads = corpus->kv_heads,
        .group = q_heads / corpus->kv_heads,
        .dim = corpus->head_dim,
        .arena = arena,
    };
    LOCI_ASSERT(rows > 0 && q_heads % corpus->kv_heads == 0 && q_heads > 0);
    if (loci_select_all(params)) lookup->mode = LOCI_MODE_DENSE;
    if (lookup->dim == 0 || lookup->dim > LOCI_HEAD_DIM_MAX || lookup->dim % 16 != 0) {
        loci_cpu_fail(stream, LOCI_E_UNSUPPORTED, "head_dim %u is not a multiple of 16 up to %u",
                      lookup->dim, LOCI_HEAD_DIM_MAX);
        return;
    }
    if (params->mode == LOCI_MODE_SQUEEZED &&
        !(isfinite(params->squeezed_threshold[0]) && isfinite(params->squeezed_threshold[1]))) {
        loci_cpu_fail(stream, LOCI_E_INVAL, "thresholds of mode squeezed are not finite");
        return;
    }
    lookup->vectors = rows * lookup->group;
    lookup->blocks = loci_lane_blocks(lookup->vectors);
    lookup->heads = lookup_alloc(lookup, corpus->kv_heads * sizeof *lookup->heads);
    if (!lookup->heads || !load_queries(lookup, q, q_stride, scale, steady_lse)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    memset(lookup->heads, 0, corpus->kv_heads * sizeof *lookup->heads);
    if (!make_parts(stream, lookup)) return;
    if (!alloc_heads(lookup)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    lookup->ready = true;
}

/* --- stages ---------------------------------------------------------------------------- */

/* Where the entries of each root begin: those of root_kept, or one for each root where rows share
 * one set. */
static void count_entries(const loci_lookup *lookup, lookup_head *head) {
    bool shared = lookup_shared(lookup);
    memset(head->entry_begin, 0, (head->roots + 1) * sizeof *head->entry_begin);
    for (uint32_t t = 0; !shared && t < lookup->rows; t++) {
        const uint8_t *kept = head->root_kept + (size_t)t * head->roots;
        for (uint32_t r = 0; r < head->roots; r++) head->entry_begin[r + 1] += kept[r];
    }
    for (uint32_t r = 0; r < head->roots; r++)
        head->entry_begin[r + 1] = head->entry_begin[r] + (shared ? 1 : head->entry_begin[r + 1]);
}

/* The same entries row by row, and the row of each. */
static bool list_rows(loci_lookup *lookup, lookup_head *head) {
    size_t *next = lookup_alloc(lookup, head->roots * sizeof *next), n = 0;
    head->row_begin = lookup_alloc(lookup, (lookup->rows + 1u) * sizeof *head->row_begin);
    head->row_kept = lookup_alloc(lookup, lookup_entries(head) * sizeof *head->row_kept);
    if (!next || !head->row_begin || !head->row_kept) return false;
    memcpy(next, head->entry_begin, head->roots * sizeof *next);
    for (uint32_t t = 0; t < lookup->rows; t++) {
        const uint8_t *kept = head->root_kept + (size_t)t * head->roots;
        head->row_begin[t] = n;
        for (uint32_t r = 0; r < head->roots; r++) {
            if (!kept[r]) continue;
            head->entry_row[next[r]] = t;
            head->row_kept[n++] = (lookup_kept){r, next[r]++};
        }
    }
    head->row_begin[lookup->rows] = n;
    return true;
}

/* Sums of sketches are needed when leaves are scored and again when candidates are marked. They
 * are kept where they stay in the cache: for few rows. */
static bool keep_sums(loci_lookup *lookup, lookup_head *head) {
    size_t entries = lookup_entries(head), sums = 0;
    head->sum_at = lookup_alloc(lookup, entries * sizeof *head->sum_at);
    if (!head->sum_at) return false;
    for (uint32_t r = 0; r < head->roots; r++) {
        for (size_t e = head->entry_begin[r]; e < head->entry_begin[r + 1]; e++) {
            head->sum_at[e] = sums;
            sums += (size_t)head->root_groups[r] * LOCI_SKETCH_GROUP * lookup->group;
        }
    }
    if (sums * sizeof *head->sum > lookup->cpu->kept_bytes) return true; /* made twice */
    head->sum = lookup_alloc(lookup, (sums + LOCI_SKETCH_GROUP) * sizeof *head->sum);
    return head->sum != NULL;
}

static bool make_entries(loci_lookup *lookup, lookup_head *head) {
    bool shared = lookup_shared(lookup);
    size_t leaves = 0, scores = 0;
    count_entries(lookup, head);
    size_t entries = lookup_entries(head);
    head->entry_row = lookup_alloc(lookup, entries * sizeof *head->entry_row);
    head->score_at = lookup_alloc(lookup, entries * sizeof *head->score_at);
    head->leaf_mask = lookup_alloc(lookup, entries * sizeof *head->leaf_mask);
    if (!head->entry_row || !head->score_at || !head->leaf_mask) return false;
    memset(head->entry_row, 0, entries * sizeof *head->entry_row);
    memset(head->leaf_mask, 0, entries * sizeof *head->leaf_mask);
    if (!shared && !list_rows(lookup, head)) return false;
    for (uint32_t r = 0; r < head->roots; r++) {
        size_t entry = head->entry_begin[r];
        head->leaf_at[r] = leaves;
        if (entry < head->entry_begin[r + 1]) leaves += head->root_leaves[r];
        for (; entry < head->entry_begin[r + 1]; entry++) {
            head->score_at[entry] = scores;
            if (!shared) scores += (size_t)head->root_leaves[r] * lookup->group;
        }
    }
    head->leaves = leaves;
    if (!shared && !keep_sums(lookup, head)) return false;
    head->leaf = lookup_alloc(lookup, leaves * sizeof *head->leaf);
    head->leaf_live = lookup_alloc(lookup, leaves);
    head->leaf_score = lookup_alloc(lookup, scores * sizeof *head->leaf_score);
    head->centre = lookup_alloc(lookup, shared ? 0 : entries * lookup->group * sizeof(float));
    return head->leaf && head->leaf_live && head->leaf_score && head->centre;
}

static bool make_all_entries(loci_stream *stream, loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        if (make_entries(lookup, &lookup->heads[h])) continue;
        lookup_no_memory(stream, lookup);
        return false;
    }
    return true;
}

/* The most leaves (or, with codes, tokens) that one row has to choose from. */
static size_t most_choices(const loci_lookup *lookup, bool tokens) {
    size_t most = 0;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        const lookup_head *head = &lookup->heads[h];
        if (lookup_limited(lookup)) {
            most = head->listed > most ? head->listed : most;
            continue;
        }
        for (uint32_t t = 0; t < lookup->rows; t++) {
            size_t sum = 0;
            for (size_t i = head->row_begin[t]; i < head->row_begin[t + 1]; i++)
                sum += tokens ? lookup_candidates(lookup, head, head->row_kept[i].entry)
                              : head->root_leaves[head->row_kept[i].root];
            most = sum > most ? sum : most;
        }
    }
    return most;
}

/* Per choice: a score for each head of the group, a share, a weight and a mark. */
static bool reserve_choices(loci_stream *stream, loci_lookup *lookup, size_t choices) {
    size_t words = lookup->group + 3u;
    if (choices < SIZE_MAX / 64 / words && lookup_scratch(lookup, words * (choices + 64)))
        return true;
    lookup_no_memory(stream, lookup);
    return false;
}

static void count_live(loci_lookup *lookup) {
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads;
    for (size_t i = 0; lookup->ready && i < pairs; i++) {
        lookup_part *part = lookup_first_part(lookup, i);
        lookup_head *head = &lookup->heads[part->kv_head];
        const uint32_t *live = head->root_live + part->root_base;
        uint32_t roots = loci_pair_header_of(part->blob)->roots;
        uint64_t tokens = 0;
        for (uint32_t r = 0; r < roots; r++) tokens += live[r];
        head->live_tokens += tokens;
        head->spread += sqrt((double)tokens);
    }
}

/* Checks the roots' hashes, then reads the roots. */
static void run_roots(loci_stream *stream, loci_lookup *lookup) {
    lookup_run_parts(stream, lookup, lookup_check_task);
    if (lookup->ready) lookup_run_parts(stream, lookup, lookup_root_task);
    count_live(lookup);
}

static void score_limited(loci_stream *stream, loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++) count_entries(lookup, &lookup->heads[h]);
    if (!lookup_prepare_keys(stream, lookup)) return;
    lookup_run_parts(stream, lookup, lookup_key_task);
    if (!lookup->ready) return;
    loci_pool_run(lookup->cpu->pool, lookup->kv_heads, lookup_key_floors_task, lookup);
}

static void score_hierarchical(loci_stream *stream, loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        lookup_head *head = &lookup->heads[h];
        size_t roots = head->roots;
        head->root_score = lookup_alloc(lookup, roots * lookup->vectors * sizeof(float));
        head->root_kept = lookup_alloc(lookup, roots * lookup->rows);
        if (!head->root_score || !head->root_kept) {
            lookup_no_memory(stream, lookup);
            return;
        }
        if (!lookup_limited(lookup)) continue;
        head->root_centre = lookup_alloc(lookup, roots * lookup->group * sizeof(float));
        if (!head->root_centre) {
            lookup_no_memory(stream, lookup);
            return;
        }
    }
    run_roots(stream, lookup);
    if (!lookup->ready) return;
    lookup_run_rows(lookup, lookup_keep_roots_task);
    if (lookup_limited(lookup)) {
        score_limited(stream, lookup);
        return;
    }
    if (!make_all_entries(stream, lookup) || !lookup_prepare_sketches(stream, lookup)) return;
    lookup_run_parts(stream, lookup, lookup_leaf_task);
    if (!lookup->ready || !reserve_choices(stream, lookup, most_choices(lookup, false))) return;
    lookup_run_rows(lookup, lookup_find_floors_task);
}

void loci_cpu_score_nodes(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready) return;
    if (lookup->mode == LOCI_MODE_HIERARCHICAL) {
        score_hierarchical(stream, lookup);
        return;
    }
    /* Dense and squeezed walk all roots and leaves. */
    run_roots(stream, lookup);
    if (!lookup->ready || !make_all_entries(stream, lookup)) return;
    lookup_run_parts(stream, lookup, lookup_leaf_task);
    if (lookup->ready && lookup->mode == LOCI_MODE_SQUEEZED) lookup_squeeze(stream, lookup);
}

void loci_cpu_score_codes(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready) return;
    if (lookup_limited(lookup)) {
        if (!lookup_prepare_list(stream, lookup)) return;
        loci_pool_run(lookup->cpu->pool, lookup->kv_heads, lookup_list_task, lookup);
    } else {
        if (!lookup_place_masks(stream, lookup)) return;
        if (lookup->mode != LOCI_MODE_HIERARCHICAL) return;
        lookup_run_parts(stream, lookup, lookup_candidate_task);
    }
    if (!lookup_prepare_codes(stream, lookup)) return;
    lookup_run_parts(stream, lookup, lookup_code_task);
    lookup->tokens_scored = lookup->ready;
}

/* Every live token of every kept leaf. */
static void select_whole_leaves(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    const lookup_part *part = &lookup->parts[index];
    lookup_head *head = &lookup->heads[part->kv_head];
    for (uint32_t i = part->first; i < part->end; i++) {
        const loci_root *root = loci_pair_root(part->blob, i);
        size_t entry = head->entry_begin[part->root_base + i];
        uint32_t *mask = head->token_mask + head->mask_at[entry];
        for (uint32_t l = 0; l < root->count; l++) {
            if (!(head->leaf_mask[entry] >> l & 1)) continue;
            const loci_leaf *leaf = &lookup_leaves(head, part->root_base + i)[l];
            *mask++ = lookup_live_bits(part->live, leaf->begin, leaf->count);
        }
    }
}

void loci_cpu_select(loci_stream *stream, loci_lookup *lookup) {
    if (!lookup->ready) return;
    if (lookup_shared(lookup)) {
        lookup_run_parts(stream, lookup, select_whole_leaves);
    } else {
        if (!reserve_choices(stream, lookup, most_choices(lookup, true))) return;
        lookup_run_rows(lookup, lookup_select_task);
    }
    lookup->tokens_selected = lookup->ready;
}

/* --- what the host may see ------------------------------------------------------------- */

static void add_selected(const lookup_part *part, uint32_t extent, uint32_t row, uint32_t first,
                         uint32_t mask, loci_selected *selected, size_t capacity, size_t *count) {
    for (uint32_t t = 0; t < LOCI_LEAF_TOKENS_MAX; t++) {
        if (!(mask >> t & 1)) continue;
        if (*count < capacity)
            selected[*count] = (loci_selected){extent, part->kv_head, row, first + t};
        (*count)++;
    }
}

/* What one entry of a row selected under a root of an extent. */
static void add_entry_selected(const lookup_part *part, const lookup_head *head, uint32_t extent,
                               uint32_t row, lookup_kept at, loci_selected *selected,
                               size_t capacity, size_t *count) {
    const loci_leaf *leaves = lookup_leaves(head, at.root);
    const uint32_t *mask = head->token_mask + head->mask_at[at.entry];
    for (uint64_t left = head->leaf_mask[at.entry]; left; left &= left - 1, mask++) {
        uint32_t first = leaves[__builtin_ctzll(left)].begin;
        add_selected(part, extent, row, first, *mask, selected, capacity, count);
    }
}

void loci_cpu_lookup_selected(loci_stream *stream, loci_lookup *lookup, loci_selected *selected,
                              size_t capacity, size_t *count) {
    (void)stream;
    *count = 0;
    if (!lookup->tokens_selected) return;
    bool shared = lookup_shared(lookup);
    for (size_t i = 0; i < lookup->part_count; i++) {
        const lookup_part *part = &lookup->parts[i];
        const lookup_head *head = &lookup->heads[part->kv_head];
        uint32_t begin = part->root_base + part->first, end = part->root_base + part->end;
        uint32_t extent = (uint32_t)(part->extent - lookup->corpus->extents);
        for (size_t k = part->list_begin; lookup_limited(lookup) && k < part->list_end; k++)
            add_selected(part, extent, 0, head->slots[k], 1, selected, capacity, count);
        for (uint32_t t = 0; !lookup_limited(lookup) && t < lookup->rows; t++) {
            size_t last = shared ? end : head->row_begin[t + 1];
            for (size_t k = shared ? begin : head->row_begin[t]; k < last; k++) {
                lookup_kept at = shared ? (lookup_kept){(uint32_t)k, k} : head->row_kept[k];
                if (at.root >= begin && at.root < end)
                    add_entry_selected(part, head, extent, t, at, selected, capacity, count);
            }
        }
    }
}

void loci_cpu_lookup_stats(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats) {
    (void)stream;
    *stats = (loci_lookup_stats){.elapsed_ns = loci_now_ns() - lookup->begun_ns};
    if (!lookup->ready) return;
    size_t token = lookup->part_count ? loci_pair_kv_stride(lookup->parts[0].blob) : 0;
    for (size_t i = 0; i < lookup->part_count; i++) {
        const lookup_part *part = &lookup->parts[i];
        stats->root_bytes += part->stats.root_bytes;
        stats->leaf_bytes += part->stats.leaf_bytes;
        stats->code_bytes += part->stats.code_bytes;
        stats->hash_bytes += part->stats.hash_bytes;
        stats->kv_bytes += part->stats.kv_bytes;
        stats->kv_leaf_bytes += part->stats.kv_leaf_bytes;
        if (lookup_limited(lookup) && lookup->tokens_selected)
            stats->selected_tokens += part->list_end - part->list_begin;
        stats->tail_bytes += part->stats.tail_bytes;
    }
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        const lookup_head *head = &lookup->heads[h];
        uint64_t sharers = lookup_shared(lookup) ? lookup->rows : 1;
        stats->dense_kv_bytes += head->live_tokens * token;
        if (lookup_limited(lookup)) {
            stats->candidate_tokens += lookup->tokens_scored ? head->listed : 0;
            continue;
        }
        if (lookup->tokens_scored)
            stats->candidate_tokens += head->token_at[lookup_entries(head)] / lookup->group;
        for (size_t i = 0; lookup->tokens_selected && i < head->mask_at[lookup_entries(head)]; i++)
            stats->selected_tokens += lookup_count_bits(head->token_mask[i]) * sharers;
    }
}
