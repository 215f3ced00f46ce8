/* SPDX-License-Identifier: Apache-2.0
 *
 * Late-interaction scores of segments: exact ones from position-order codes (or, in the flat
 * part, from the keys), and the choice of candidates from what a look-up has scored.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/common.h"
#include "attention/cpu/lookup.h"

#define TILE LOCI_LEAF_TOKENS_MAX
#define FLOOR_BELOW 60.0f /* how far below a vector's best logit its floor is at least held */

typedef struct rank_job {
    loci_lookup *lookup;
    loci_folded *folded; /* [pairs] */
    const uint32_t *segments;
    float *scores;
    loci_error *errors; /* [count] */
    /* candidates */
    float *gain;  /* [kv_heads * rows][segments] */
    uint32_t all; /* segments of the view's extents */
} rank_job;

/* --- scores of listed segments ----------------------------------------------------------- */

static void score_tile(const loci_lookup *lookup, loci_lane_softmax *state, float *logits,
                       uint32_t n) {
    lookup->kernels->softmax_lanes(logits, n, state);
}

/* Logits of one block of vectors with the shared prefix, which every segment begins with; -INFINITY
 * without one. It keeps words that attend to nothing from ranking by noise. */
static void sink_logits(const loci_lookup *lookup, uint32_t kv_head, uint32_t block,
                        float logits[LOCI_LANES]) {
    const loci_corpus_view *corpus = lookup->corpus;
    for (uint32_t l = 0; l < LOCI_LANES; l++) logits[l] = -INFINITY;
    if (!corpus->has_sink) return;
    size_t row = (size_t)lookup->dim * sizeof(float);
    loci_ref at = corpus->sink_k;
    at.offset += ((size_t)lookup->layer * corpus->kv_heads + kv_head) * row;
    lookup->kernels->dot_f32(logits, loci_cpu_ptr(at, row), 1, lookup->dim,
                             lookup->q_lanes + lookup_lane_at(lookup, kv_head, block));
}

static void start(const loci_lookup *lookup, uint32_t kv_head, uint32_t block,
                  loci_lane_softmax *state) {
    sink_logits(lookup, kv_head, block, state->max);
    for (uint32_t l = 0; l < LOCI_LANES; l++)
        state->sum[l] = state->max[l] > -INFINITY ? 1.0f : 0.0f;
}

static double sum_logs(const loci_lookup *lookup, const loci_lane_softmax *state, uint32_t block) {
    double sum = 0.0;
    for (uint32_t l = 0; l < LOCI_LANES && block * LOCI_LANES + l < lookup->vectors; l++)
        sum += (double)state->max[l] + log((double)state->sum[l]);
    return sum;
}

/* Positions [begin, end) of one part, all lanes: sum over vectors of the log-sum-exp. */
static double score_positions(const loci_lookup *lookup, const lookup_part *part,
                              const loci_folded *folded, const float *terms, uint32_t begin,
                              uint32_t end) {
    const loci_pair_header *header = loci_pair_header_of(part->blob);
    uint8_t codes[TILE * LOCI_HEAD_DIM_MAX];
    float logits[TILE * LOCI_LANES];
    double total = 0.0;
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        loci_lane_softmax state;
        start(lookup, part->kv_head, b, &state);
        for (uint32_t at = begin; at < end; at += TILE) {
            uint32_t n = end - at < TILE ? end - at : TILE;
            lookup->kernels->unpack(
                codes, part->blob + header->position_codes_at + (size_t)at * (lookup->dim / 2),
                (size_t)n * lookup->dim);
            loci_score_codes_tile(lookup->kernels, folded, terms, codes, n, lookup->dim, b, logits);
            score_tile(lookup, &state, logits, n);
        }
        total += sum_logs(lookup, &state, b);
    }
    return total;
}

static float *mean_terms_of(const loci_lookup *lookup, const lookup_part *part) {
    return lookup->task_terms + (size_t)(part - lookup->parts) * lookup->blocks * LOCI_LANES;
}

/* The blocks of codes that positions [begin, end) touch. */
static bool positions_ok(const lookup_part *part, uint32_t begin, uint32_t end, uint32_t *bad) {
    const loci_pair_header *header = loci_pair_header_of(part->blob);
    const uint64_t *hashes = (const void *)(part->blob + header->position_hashes_at);
    for (uint32_t b = begin / LOCI_POSITION_BLOCK; b * LOCI_POSITION_BLOCK < end; b++) {
        uint32_t from = b * LOCI_POSITION_BLOCK, left = header->tokens - from;
        size_t bytes = (size_t)(left < LOCI_POSITION_BLOCK ? left : LOCI_POSITION_BLOCK) *
                       (header->head_dim / 2);
        *bad = b;
        if (loci_hash_bytes(part->blob + header->position_codes_at +
                                (size_t)from * (header->head_dim / 2),
                            bytes) != hashes[b])
            return false;
    }
    return true;
}

static const loci_extent_view *extent_of(const loci_corpus_view *corpus, uint32_t segment,
                                         uint32_t *extent) {
    uint32_t low = 0, high = corpus->extent_count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (corpus->extents[middle].segment_base <= segment)
            low = middle;
        else
            high = middle;
    }
    *extent = low;
    return &corpus->extents[low];
}

static float score_extent_segment(const rank_job *job, uint32_t segment, loci_error *err) {
    const loci_lookup *lookup = job->lookup;
    uint32_t e = 0, bad = 0;
    const loci_extent_view *extent = extent_of(lookup->corpus, segment, &e);
    uint32_t s = segment - extent->segment_base;
    uint32_t begin = extent->segment_begin[s], end = extent->segment_begin[s + 1];
    if ((extent->segment_dead && extent->segment_dead[s]) || begin >= end) return -INFINITY;
    double sum = 0.0;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        size_t index = (size_t)e * lookup->kv_heads + h;
        const lookup_part *part = lookup_first_part(lookup, index);
        if (end > loci_pair_header_of(part->blob)->tokens ||
            !positions_ok(part, begin, end, &bad)) {
            (void)loci_fail(err, LOCI_E_CORRUPT,
                            "extent %016llx, layer %u, KV head %u: position codes of block %u: "
                            "wrong hash",
                            (unsigned long long)extent->id, lookup->layer, h, bad);
            return -INFINITY;
        }
        sum += score_positions(lookup, part, &job->folded[index], mean_terms_of(lookup, part),
                               begin, end);
    }
    return (float)(sum / lookup->q_heads);
}

static float score_flat_segment(const loci_lookup *lookup, uint32_t segment) {
    const loci_corpus_view *corpus = lookup->corpus;
    const uint16_t *keys = (const void *)corpus->flat_k[lookup->layer]->data;
    uint32_t s = segment - corpus->flat_segment_base, dim = lookup->dim;
    uint32_t begin = corpus->flat_segment_begin[s], end = corpus->flat_segment_begin[s + 1];
    float k[TILE * LOCI_HEAD_DIM_MAX], logits[TILE * LOCI_LANES];
    double sum = 0.0;
    if (begin >= end) return -INFINITY;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            loci_lane_softmax state;
            start(lookup, h, b, &state);
            for (uint32_t at = begin; at < end; at += TILE) {
                uint32_t n = end - at < TILE ? end - at : TILE;
                for (uint32_t t = 0; t < n; t++)
                    lookup->kernels->widen(k + (size_t)t * dim,
                                           keys + ((size_t)(at + t) * lookup->kv_heads + h) * dim,
                                           dim);
                lookup->kernels->dot_f32(logits, k, n, dim,
                                         lookup->q_lanes + lookup_lane_at(lookup, h, b));
                score_tile(lookup, &state, logits, n);
            }
            sum += sum_logs(lookup, &state, b);
        }
    }
    return (float)(sum / lookup->q_heads);
}

static void segment_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    rank_job *job = arg;
    const loci_corpus_view *corpus = job->lookup->corpus;
    uint32_t segment = job->segments[index];
    if (segment >= corpus->flat_segment_base &&
        segment < corpus->flat_segment_base + corpus->flat_segments)
        job->scores[index] = score_flat_segment(job->lookup, segment);
    else if (segment < corpus->flat_segment_base)
        job->scores[index] = score_extent_segment(job, segment, &job->errors[index]);
    else
        job->scores[index] = -INFINITY;
}

/* Folds the queries for each pair and verifies its position hashes. */
static void fold_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    rank_job *job = arg;
    loci_lookup *lookup = job->lookup;
    lookup_part *part = lookup_first_part(lookup, index);
    const loci_pair_header *header = loci_pair_header_of(part->blob);
    if (header->position_codes_at == 0) {
        (void)loci_fail(&part->error, LOCI_E_PRECONDITION, "it was built without position codes");
        return;
    }
    size_t hashes = (header->tokens + LOCI_POSITION_BLOCK - 1) / LOCI_POSITION_BLOCK;
    if (loci_hash_bytes(part->blob + header->position_hashes_at, hashes * sizeof(uint64_t)) !=
        header->hash_position_hashes) {
        (void)loci_fail(&part->error, LOCI_E_CORRUPT, "position hashes: wrong hash");
        return;
    }
    uint8_t *memory =
        (uint8_t *)(job->folded + (size_t)lookup->corpus->extent_count * lookup->kv_heads);
    memory += index * loci_folded_bytes(lookup->blocks * LOCI_LANES, lookup->dim);
    loci_fold_query(&job->folded[index], memory,
                    lookup->q + (size_t)part->kv_head * lookup->vectors * lookup->dim,
                    lookup->vectors, lookup->dim, loci_pair_code_scale(part->blob));
    lookup_mean_terms(lookup, part, mean_terms_of(lookup, part));
}

/* On a look-up after begin. `codes`: some of the segments stand in extents. */
static void score_listed(loci_stream *stream, loci_lookup *lookup, const uint32_t *segments,
                         uint32_t count, float *scores, bool codes) {
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads;
    size_t folded = loci_folded_bytes(lookup->blocks * LOCI_LANES, lookup->dim);
    rank_job job = {.lookup = lookup, .segments = segments, .scores = scores};
    job.folded = lookup_alloc(lookup, pairs * (sizeof *job.folded + folded));
    job.errors = lookup_alloc(lookup, count * sizeof *job.errors);
    if (!job.folded || !job.errors) {
        lookup_no_memory(stream, lookup);
        return;
    }
    memset(job.errors, 0, count * sizeof *job.errors);
    if (codes) {
        loci_pool_run(lookup->cpu->pool, pairs, fold_task, &job);
        if (!lookup_report(stream, lookup)) return;
    }
    loci_pool_run(lookup->cpu->pool, count, segment_task, &job);
    for (uint32_t i = 0; i < count; i++) {
        if (job.errors[i].status == LOCI_OK) continue;
        loci_cpu_fail(stream, job.errors[i].status, "%s", job.errors[i].text);
        return;
    }
}

void loci_cpu_score_segments(loci_stream *stream, const loci_corpus_view *corpus,
                             uint32_t retrieval_layer, loci_ref q, uint32_t q_stride, uint32_t rows,
                             uint32_t q_heads, float scale, const uint32_t *segments,
                             uint32_t count, loci_ref scores) {
    loci_backend self = {.ctx = stream->cpu};
    loci_lookup *lookup = NULL;
    loci_error err;
    loci_select_params params = {.mode = LOCI_MODE_DENSE};
    if (loci_cpu_lookup_create(&self, &lookup, &err) != LOCI_OK) {
        loci_cpu_fail(stream, err.status, "%s", err.text);
        return;
    }
    loci_cpu_lookup_begin(stream, lookup, corpus, retrieval_layer, q, q_stride, rows, q_heads,
                          scale, loci_ref_at(NULL, 0), &params);
    bool codes = false;
    for (uint32_t i = 0; i < count; i++) codes = codes || segments[i] < corpus->flat_segment_base;
    if (lookup->ready)
        score_listed(stream, lookup, segments, count, loci_cpu_ptr(scores, count * sizeof(float)),
                     codes);
    loci_cpu_lookup_free(&self, lookup);
}

/* --- candidates ------------------------------------------------------------------------ */

/* For one vector: the log of what an unscored token could about contribute at most: the floor of
 * candidates, or the highest mean mass a token of the unkept roots. */
static float floor_of(const loci_lookup *lookup, uint32_t kv_head, uint32_t vector) {
    const lookup_head *head = &lookup->heads[kv_head];
    const uint8_t *kept = head->root_kept + (size_t)(vector / lookup->group) * head->roots;
    const float *score = head->root_score + (size_t)vector * head->roots;
    float best = head->floor[vector];
    for (uint32_t r = 0; r < head->roots; r++) {
        if (kept[r] || !head->root_live[r]) continue;
        best = fmaxf(best, score[r] - logf((float)head->root_live[r]));
    }
    return best;
}

/* Adds, for each token that this vector has scored, exp(logit - max) to its segment. */
static void add_tokens(const loci_lookup *lookup, uint32_t kv_head, uint32_t vector, float max,
                       float *sums) {
    const lookup_head *head = &lookup->heads[kv_head];
    uint32_t row = vector / lookup->group, j = vector % lookup->group;
    const lookup_part *part = lookup->parts;
    for (size_t i = head->row_begin[row]; i < head->row_begin[row + 1]; i++) {
        lookup_kept at = head->row_kept[i];
        while (part->kv_head != kv_head || at.root >= part->root_base + part->end) part++;
        const loci_leaf *leaves = lookup_leaves(head, at.root);
        const float *score = lookup_scores(lookup, head, at.entry, j);
        const uint32_t *mask = head->candidates + head->mask_at[at.entry];
        for (uint64_t left = head->leaf_mask[at.entry]; left; left &= left - 1, mask++) {
            const loci_leaf *leaf = &leaves[__builtin_ctzll(left)];
            float weight[LOCI_LEAF_TOKENS_MAX];
            uint32_t n = lookup_count_bits(*mask), bits = *mask;
            lookup->kernels->exp_sub(weight, score, n, max);
            for (uint32_t t = 0; t < n; t++, bits &= bits - 1) {
                uint32_t slot = leaf->begin + (uint32_t)__builtin_ctz(bits);
                uint32_t segment = LOCI_SLOT_SEGMENT(loci_slot_word(part->blob, slot));
                if (segment < part->extent->segments)
                    sums[part->extent->segment_base + segment] += weight[t];
            }
            score += n;
        }
    }
}

static float max_logit(const loci_lookup *lookup, uint32_t kv_head, uint32_t vector) {
    const lookup_head *head = &lookup->heads[kv_head];
    uint32_t row = vector / lookup->group, j = vector % lookup->group;
    float best = -INFINITY;
    for (size_t i = head->row_begin[row]; i < head->row_begin[row + 1]; i++) {
        size_t entry = head->row_kept[i].entry;
        float top = lookup->kernels->max(lookup_scores(lookup, head, entry, j),
                                         lookup_candidates(lookup, head, entry));
        best = top > best ? top : best;
    }
    return best;
}

/* One row: gain[segment] = sum over heads of log(1 + sum / floor). */
static void gain_task(void *arg, size_t index, unsigned thread) {
    rank_job *job = arg;
    loci_lookup *lookup = job->lookup;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    float *gain = job->gain + index * job->all, *sums = lookup->scratch[thread];
    float sink[LOCI_LANES];
    memset(gain, 0, job->all * sizeof *gain);
    for (uint32_t j = 0; j < lookup->group; j++) {
        uint32_t vector = row * lookup->group + j;
        float max = max_logit(lookup, h, vector), floor = floor_of(lookup, h, vector);
        if (max == -INFINITY) continue;
        sink_logits(lookup, h, vector / LOCI_LANES, sink);
        floor = sink[vector % LOCI_LANES] > floor ? sink[vector % LOCI_LANES] : floor;
        floor = floor > max - FLOOR_BELOW ? floor : max - FLOOR_BELOW;
        memset(sums, 0, job->all * sizeof *sums);
        add_tokens(lookup, h, vector, max, sums);
        float inverse = expf(max - floor);
        for (uint32_t s = 0; s < job->all; s++)
            if (sums[s] > 0.0f) gain[s] += log1pf(sums[s] * inverse);
    }
}

/* Scores segments [first, first + n) and appends the best. */
static bool take_scored(loci_stream *stream, loci_lookup *lookup, uint32_t first, uint32_t n,
                        uint32_t limit, bool codes, uint32_t *segments, uint32_t *count) {
    uint32_t *numbers = lookup_alloc(lookup, n * sizeof *numbers);
    float *scores = lookup_alloc(lookup, n * sizeof *scores);
    loci_scored *list = lookup_alloc(lookup, n * sizeof *list);
    if (!numbers || !scores || !list) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    for (uint32_t i = 0; i < n; i++) numbers[i] = first + i;
    score_listed(stream, lookup, numbers, n, scores, codes);
    if (stream->error.status != LOCI_OK) return false;
    for (uint32_t i = 0; i < n; i++) list[i] = (loci_scored){scores[i], first + i};
    loci_take_best(list, n, -INFINITY, limit, segments, count);
    return true;
}

static void take_gained(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                        uint32_t *segments, uint32_t *count) {
    uint32_t all = lookup->corpus->flat_segment_base, n = 0;
    size_t tasks = (size_t)lookup->kv_heads * lookup->rows;
    rank_job job = {.lookup = lookup, .all = all};
    job.gain = lookup_alloc(lookup, tasks * all * sizeof *job.gain);
    loci_scored *list = lookup_alloc(lookup, all * sizeof *list);
    if (!job.gain || !list || !lookup_scratch(lookup, all)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    loci_pool_run(lookup->cpu->pool, tasks, gain_task, &job);
    for (uint32_t s = 0; s < all; s++) {
        double sum = 0.0;
        for (size_t i = 0; i < tasks; i++) sum += (double)job.gain[i * all + s];
        if (sum > 0.0) list[n++] = (loci_scored){(float)sum, s};
    }
    loci_take_best(list, n, -INFINITY, limit, segments, count);
}

void loci_cpu_lookup_candidates(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                                uint32_t *segments, uint32_t *count) {
    *count = 0;
    if (!lookup->ready || stream->error.status != LOCI_OK) return;
    const loci_corpus_view *corpus = lookup->corpus;
    uint32_t flat = corpus->flat_segments, flat_base = corpus->flat_segment_base;
    if (flat < limit / 2) {
        for (uint32_t i = 0; i < flat; i++) segments[(*count)++] = flat_base + i;
    } else if (!take_scored(stream, lookup, flat_base, flat, limit / 2, false, segments, count)) {
        return;
    }
    if (lookup->tokens_scored)
        take_gained(stream, lookup, limit, segments, count);
    else /* nothing was scored: dense and squeezed rank all segments */
        (void)take_scored(stream, lookup, 0, flat_base, limit, true, segments, count);
}
