/* SPDX-License-Identifier: Apache-2.0
 *
 * What a look-up tells the host: figures, selected tokens, scores of nodes and segments, candidate
 * segments. Figures come with sync(); the others wait for the stream at once.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/common.h"
#include "attention/cuda/lookup.h"

_Static_assert(sizeof(loci_cuda_stats) == sizeof(loci_lookup_stats) &&
                   offsetof(loci_cuda_stats, elapsed_ns) == offsetof(loci_lookup_stats, elapsed_ns),
               "figures are downloaded as they are");

/* What the host knows of a look-up's figures. */
static loci_cuda_stats known_stats(const loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_stats known = {
        .dense_kv_bytes = lookup->live_tokens * look->kv_heads * look->row_bytes,
    };
    if (look->extents == 0) return known;
    if (lookup->tokens_scored) known.root_bytes = look->roots_all * lookup->pairs[0].node_stride;
    for (uint32_t h = 0; h < look->kv_heads && lookup->mode == LOCI_MODE_SQUEEZED; h++) {
        /* Centroids of both levels, twice. */
        known.root_bytes += 2ull * lookup->heads[h].roots * (sizeof(float) + look->dim);
        known.leaf_bytes += 2ull * lookup->heads[h].leaves * (sizeof(float) + look->dim);
    }
    return known;
}

/* Adds them up from masks; NULL after a failure. */
static loci_cuda_stats *add_stats(loci_stream *stream, loci_lookup *lookup,
                                  const loci_cuda_stats *known) {
    loci_cuda_stats *to = look_mask(stream, lookup) ? look_alloc(stream, lookup, sizeof *to) : NULL;
    if (to &&
        look_launched(stream, lookup, cudaMemsetAsync(to, 0, sizeof *to, stream->stream),
                      "stats") &&
        look_launched(stream, lookup,
                      loci_cuda_k_stats(stream->stream, &lookup->look,
                                        lookup->tokens_scored ? &lookup->choice : NULL, known, to),
                      "stats"))
        return to;
    return NULL;
}

/* The same from a single row's lists, where attention has left zeros. */
static loci_cuda_stats *add_listed(loci_stream *stream, loci_lookup *lookup,
                                   const loci_cuda_stats *known) {
    if (!lookup->figured &&
        !look_launched(stream, lookup,
                       loci_cuda_k_stats_listed(stream->stream, &lookup->look, &lookup->choice,
                                                known, lookup->figures),
                       "stats"))
        return NULL;
    lookup->figured = true;
    return lookup->figures;
}

void loci_cuda_lookup_stats(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats) {
    *stats = (loci_lookup_stats){0};
    if (!lookup->ready || !lookup->tokens_selected) return;
    const loci_cuda_look *look = &lookup->look;
    loci_cuda_stats known = known_stats(lookup), *counted = NULL;
    if (lookup->mode == LOCI_MODE_DENSE && !lookup->deletions) { /* all are known */
        known.kv_bytes = known.kv_leaf_bytes = known.dense_kv_bytes;
        known.selected_tokens = lookup->live_tokens * look->kv_heads * look->rows;
    } else {
        bool listed = lookup->attended && lookup->logits && lookup->tokens_scored;
        counted = listed ? add_listed(stream, lookup, &known) : add_stats(stream, lookup, &known);
        if (!counted) return;
    }
    loci_cuda_stats *told =
        stream->recording ? look_told(lookup) : loci_cuda_stage(stream, stats, sizeof *told);
    lookup->reported = look_launched(
        stream, lookup, loci_cuda_k_tell(stream->stream, look, counted, &known, told), "stats");
    if (!stream->recording && lookup->params.each)
        look_unpin(lookup); /* nobody knows when there is a next one */
}

/* --- selected tokens ------------------------------------------------------------------- */

typedef struct selection {
    loci_selected *out;
    size_t capacity, count;
} selection;

static void add_words(selection *s, const uint32_t *words, uint32_t tokens, loci_selected at) {
    for (uint32_t w = 0; w < (tokens + 31) / 32; w++)
        for (uint32_t bits = words[w]; bits; bits &= bits - 1) {
            at.slot = w * 32 + (uint32_t)__builtin_ctz(bits);
            if (s->count < s->capacity) s->out[s->count] = at;
            s->count++;
        }
}

void loci_cuda_lookup_selected(loci_stream *stream, loci_lookup *lookup, loci_selected *selected,
                               size_t capacity, size_t *count) {
    *count = 0;
    if (!lookup->ready || !lookup->tokens_selected || !look_mask(stream, lookup)) return;
    const loci_cuda_look *look = &lookup->look;
    size_t bytes = (size_t)look->kv_heads * look->mask_rows * look->words * sizeof(uint32_t);
    uint32_t *masks = malloc(bytes ? bytes : 1);
    if (!masks) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for selected tokens");
        return;
    }
    selection s = {selected, capacity, 0};
    bool ok = look_read(stream, masks, look->token_mask, bytes);
    for (uint32_t i = 0; ok && i < look->extents * look->kv_heads; i++) {
        const loci_cuda_pair *pair = &lookup->pairs[i];
        for (uint32_t row = 0; row < look->rows; row++) {
            size_t mask =
                (size_t)pair->kv_head * look->mask_rows + (look->mask_rows == 1 ? 0 : row);
            add_words(&s, masks + mask * look->words + pair->word_base, pair->tokens,
                      (loci_selected){i / look->kv_heads, pair->kv_head, row, 0});
        }
    }
    *count = s.count;
    free(masks);
}

/* --- mode squeezed --------------------------------------------------------------------- */

typedef struct level_copy {
    float *score, *root_score;
    uint32_t *root_live;
    uint8_t *leaf_live;
} level_copy;

static bool read_level(loci_stream *stream, const loci_lookup *lookup, unsigned level,
                       level_copy *c) {
    const loci_cuda_look *look = &lookup->look;
    size_t nodes = level == 0 ? look->roots_all : look->leaves_all;
    c->score = malloc((nodes + 1) * sizeof(float));
    c->root_score = malloc((look->roots_all + 1) * sizeof(float));
    c->root_live = malloc((look->roots_all + 1) * sizeof(uint32_t));
    c->leaf_live = malloc(look->leaves_all + 1);
    if (!c->score || !c->root_score || !c->root_live || !c->leaf_live) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for the scores of nodes");
        return false;
    }
    return look_read(stream, c->score, lookup->squeeze.score[level], nodes * sizeof(float)) &&
           look_read(stream, c->root_score, lookup->squeeze.score[0],
                     look->roots_all * sizeof(float)) &&
           look_read(stream, c->root_live, look->root_live, look->roots_all * sizeof(uint32_t)) &&
           look_read(stream, c->leaf_live, look->leaf_live, look->leaves_all);
}

/* The roots of the leaves of a pair, from the device. */
static uint32_t *read_leaf_roots(loci_stream *stream, const loci_cuda_pair *pair) {
    uint32_t *roots = malloc((pair->leaves + 1u) * sizeof *roots);
    if (roots && look_read(stream, roots, pair->leaf_root, pair->leaves * sizeof *roots))
        return roots;
    if (!roots) loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for the scores of nodes");
    free(roots);
    return NULL;
}

void loci_cuda_lookup_squeezed(loci_stream *stream, loci_lookup *lookup, unsigned level,
                               float *scores, uint32_t *tokens, float *root_scores, size_t capacity,
                               size_t *count) {
    *count = 0;
    if (!lookup->ready || lookup->mode != LOCI_MODE_SQUEEZED || level > 1) return;
    const loci_cuda_look *look = &lookup->look;
    level_copy c = {0};
    bool ok = read_level(stream, lookup, level, &c);
    size_t pairs = (size_t)look->extents * look->kv_heads;
    for (size_t i = 0; ok && i < pairs; i++) { /* head by head, extents in their order */
        const loci_cuda_pair *pair =
            &lookup->pairs[i % look->extents * look->kv_heads + i / look->extents];
        const loci_cuda_head *head = &lookup->heads[pair->kv_head];
        uint32_t *roots = level == 1 ? read_leaf_roots(stream, pair) : NULL;
        ok = level == 0 || roots;
        uint64_t root_at = head->root_at + pair->root_base;
        uint64_t at = level == 0 ? root_at : head->leaf_at + pair->leaf_base;
        for (uint32_t n = 0; ok && n < (level == 0 ? pair->roots : pair->leaves); n++) {
            uint32_t live = level == 0 ? c.root_live[at + n] : c.leaf_live[at + n];
            if (!live) continue;
            if (*count < capacity) {
                scores[*count] = c.score[at + n];
                tokens[*count] = live;
                if (root_scores)
                    root_scores[*count] = c.root_score[root_at + (level == 0 ? n : roots[n])];
            }
            (*count)++;
        }
        free(roots);
    }
    free(c.score);
    free(c.root_score);
    free(c.root_live);
    free(c.leaf_live);
}

/* --- segments -------------------------------------------------------------------------- */

/* Tables of where segments stand and which are dead. */
static bool put_places(loci_stream *stream, loci_lookup *lookup, loci_cuda_rank *rank) {
    const loci_corpus_view *corpus = lookup->corpus;
    uint32_t all = corpus->flat_segment_base, extents = corpus->extent_count;
    uint32_t *first = malloc((extents + 1u) * sizeof *first);
    uint8_t *dead = calloc(all + 1u, 1);
    bool ok = first && dead;
    if (!ok) loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory to score segments");
    for (uint32_t e = 0; ok && e < extents; e++) {
        const loci_extent_view *extent = &corpus->extents[e];
        first[e] = extent->segment_base;
        for (uint32_t s = 0; extent->segment_dead && s < extent->segments; s++)
            dead[extent->segment_base + s] = extent->segment_dead[s];
        const uint32_t *begin = look_put(stream, lookup, extent->segment_begin,
                                         (extent->segments + 1u) * sizeof *begin);
        ok = begin != NULL;
        for (uint32_t h = 0; h < corpus->kv_heads; h++)
            lookup->pairs[(size_t)e * corpus->kv_heads + h].segment_begin = begin;
    }
    size_t pairs = (size_t)extents * corpus->kv_heads;
    if (ok)
        lookup->look.pairs = look_put(stream, lookup, lookup->pairs, pairs * sizeof *lookup->pairs);
    if (ok) rank->extent_segment = look_put(stream, lookup, first, extents * sizeof *first);
    if (ok) rank->dead = look_put(stream, lookup, dead, all);
    free(first);
    free(dead);
    return ok && lookup->look.pairs && rank->extent_segment && rank->dead;
}

static bool put_flat(loci_stream *stream, loci_lookup *lookup, loci_cuda_rank *rank) {
    const loci_corpus_view *corpus = lookup->corpus;
    rank->flat_segment_base = corpus->flat_segment_base;
    rank->flat_segments = corpus->flat_segments;
    if (corpus->flat_tokens == 0) return true;
    rank->flat_segment_begin = lookup->flat_segment_begin;
    rank->flat_k = look_flat_k(stream, lookup);
    return rank->flat_k != NULL;
}

/* K of the shared prefix in the look-up's layer, f32 [kv_heads][dim]; NULL without one. */
static const float *sink_of(loci_stream *stream, const loci_lookup *lookup) {
    const loci_corpus_view *corpus = lookup->corpus;
    if (!corpus->has_sink) return NULL;
    size_t row = (size_t)corpus->kv_heads * corpus->head_dim * sizeof(float);
    loci_ref at = corpus->sink_k;
    at.offset += lookup->layer * row;
    return loci_cuda_ptr(stream, at, row);
}

/* Segments must name position codes where they stand in extents. */
static bool check_codes(loci_stream *stream, loci_lookup *lookup, const uint32_t *segments,
                        uint32_t count) {
    bool codes = false;
    for (uint32_t i = 0; i < count; i++)
        codes = codes || segments[i] < lookup->corpus->flat_segment_base;
    for (uint32_t i = 0; codes && i < lookup->look.extents * lookup->look.kv_heads; i++) {
        const loci_cuda_pair *pair = &lookup->pairs[i];
        if (pair->position_codes) continue;
        loci_cuda_fail(stream, LOCI_E_PRECONDITION,
                       "extent %016llx, layer %u, KV head %u: it was built without position codes",
                       (unsigned long long)lookup->corpus->extents[i / lookup->look.kv_heads].id,
                       lookup->layer, pair->kv_head);
        lookup->ready = false;
        return false;
    }
    return true;
}

/* On a look-up after begin: scores [count] on the device. */
static bool score_listed(loci_stream *stream, loci_lookup *lookup, const uint32_t *segments,
                         uint32_t count, float *scores) {
    const loci_cuda_look *look = &lookup->look;
    size_t vectors = (size_t)look->extents * look->kv_heads * look->vectors;
    loci_cuda_rank rank = {.count = count, .scores = scores};
    if (!check_codes(stream, lookup, segments, count) || !put_places(stream, lookup, &rank) ||
        !put_flat(stream, lookup, &rank))
        return false;
    rank.sink_k = sink_of(stream, lookup);
    rank.segments = look_put(stream, lookup, segments, count * sizeof *segments);
    rank.folded = look_alloc(stream, lookup, vectors * look->dim);
    rank.folded_scale = look_alloc(stream, lookup, vectors * sizeof(float));
    rank.folded_sum = look_alloc(stream, lookup, vectors * sizeof(int32_t));
    rank.parts = look_alloc(stream, lookup, (size_t)count * look->kv_heads * sizeof(double));
    return rank.segments && lookup->ready &&
           look_launched(stream, lookup,
                         loci_cuda_k_fold(stream->stream, look, rank.folded, rank.folded_scale,
                                          rank.folded_sum),
                         "score_segments") &&
           look_launched(stream, lookup, loci_cuda_k_score_segments(stream->stream, look, &rank),
                         "score_segments");
}

void loci_cuda_score_segments(loci_stream *stream, const loci_corpus_view *corpus,
                              uint32_t retrieval_layer, loci_ref q, uint32_t q_stride,
                              uint32_t rows, uint32_t q_heads, float scale,
                              const uint32_t *segments, uint32_t count, loci_ref scores) {
    if (count == 0) return;
    loci_backend self = {.ctx = stream->cuda};
    loci_lookup *lookup = NULL;
    loci_error err;
    loci_select_params params = {.mode = LOCI_MODE_DENSE};
    float *to = loci_cuda_ptr(stream, scores, count * sizeof(float));
    if (!to) return;
    if (loci_cuda_lookup_create(&self, &lookup, &err) != LOCI_OK) {
        loci_cuda_fail(stream, err.status, "%s", err.text);
        return;
    }
    loci_cuda_lookup_begin(stream, lookup, corpus, retrieval_layer, q, q_stride, rows, q_heads,
                           scale, loci_ref_at(NULL, 0), &params);
    if (lookup->ready && score_listed(stream, lookup, segments, count, to))
        (void)loci_cuda_ok(stream, cudaStreamSynchronize(stream->stream), "score_segments");
    loci_cuda_lookup_free(&self, lookup);
}

/* --- candidates ------------------------------------------------------------------------ */

/* Appends the best of segments [first, first + n), those with a score above `least`, up to `limit`
 * in *count. scores: on the device. */
static void take_best(loci_stream *stream, const float *scores, uint32_t first, uint32_t n,
                      float least, uint32_t limit, uint32_t *segments, uint32_t *count) {
    float *copy = malloc((n + 1u) * sizeof *copy);
    loci_scored *list = malloc((n + 1u) * sizeof *list);
    if (!copy || !list) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory to rank %u segments", n);
    } else if (look_read(stream, copy, scores, n * sizeof *copy)) {
        for (uint32_t i = 0; i < n; i++) list[i] = (loci_scored){copy[i], first + i};
        loci_take_best(list, n, least, limit, segments, count);
    }
    free(copy);
    free(list);
}

static bool take_scored(loci_stream *stream, loci_lookup *lookup, uint32_t first, uint32_t n,
                        uint32_t limit, uint32_t *segments, uint32_t *count) {
    if (n == 0) return true;
    uint32_t *numbers = malloc(n * sizeof *numbers);
    float *scores = look_alloc(stream, lookup, n * sizeof *scores);
    for (uint32_t i = 0; numbers && i < n; i++) numbers[i] = first + i;
    if (!numbers) loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory to rank %u segments", n);
    bool ok = numbers && scores && score_listed(stream, lookup, numbers, n, scores);
    free(numbers);
    if (ok) take_best(stream, scores, first, n, -INFINITY, limit, segments, count);
    return ok;
}

static void take_gained(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                        uint32_t *segments, uint32_t *count) {
    const loci_cuda_look *look = &lookup->look;
    uint32_t all = lookup->corpus->flat_segment_base;
    size_t sums = (size_t)look->kv_heads * look->rows * all;
    if (all == 0 || !look_count(stream, lookup)) return;
    loci_cuda_gain gain = {
        .sink_k = sink_of(stream, lookup),
        .segments = all,
        .tops = look_alloc(stream, lookup, sums * sizeof *gain.tops),
        .sums = look_alloc(stream, lookup, sums * sizeof *gain.sums),
        .gain = look_alloc(stream, lookup, sums * sizeof *gain.gain),
        .total = look_alloc(stream, lookup, all * sizeof *gain.total),
    };
    if (gain.tops && gain.sums && gain.gain && gain.total &&
        look_launched(stream, lookup,
                      cudaMemsetAsync(gain.tops, 0, sums * sizeof *gain.tops, stream->stream),
                      "cudaMemset") &&
        look_launched(stream, lookup,
                      cudaMemsetAsync(gain.sums, 0, sums * sizeof *gain.sums, stream->stream),
                      "cudaMemset") &&
        look_launched(stream, lookup,
                      loci_cuda_k_gain(stream->stream, look, &lookup->choice, &gain),
                      "lookup_candidates"))
        take_best(stream, gain.total, 0, all, 0.0f, limit, segments, count);
}

void loci_cuda_lookup_candidates(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                                 uint32_t *segments, uint32_t *count) {
    *count = 0;
    if (!lookup->ready || stream->error.status != LOCI_OK) return;
    const loci_corpus_view *corpus = lookup->corpus;
    uint32_t flat = corpus->flat_segments, flat_base = corpus->flat_segment_base;
    if (lookup->tokens_scored && lookup->logits) { /* estimates gave them their place */
        lookup->logits = NULL;
        lookup->figures = NULL;
        if (!look_launched(stream, lookup,
                           loci_cuda_k_codes(stream->stream, &lookup->look, &lookup->choice),
                           "score_codes"))
            return;
    }
    if (flat < limit / 2) {
        for (uint32_t i = 0; i < flat; i++) segments[(*count)++] = flat_base + i;
    } else if (!take_scored(stream, lookup, flat_base, flat, limit / 2, segments, count)) {
        return;
    }
    if (lookup->tokens_scored)
        take_gained(stream, lookup, limit, segments, count);
    else /* nothing was scored: dense and squeezed rank all segments */
        (void)take_scored(stream, lookup, 0, flat_base, limit, segments, count);
}
