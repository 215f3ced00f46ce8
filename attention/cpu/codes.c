/* SPDX-License-Identifier: Apache-2.0
 *
 * Estimated logits of the candidates, from their 4-bit codes.
 *
 * key = mean + scale (code - 7.5), so with the scales folded into the query
 * q.key = q.mean + (q scale).code - 7.5 sum(q scale); the folded query is int8.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

/* Where the masks of each entry stand. */
static bool place_masks(loci_lookup *lookup, lookup_head *head) {
    size_t entries = lookup_entries(head), masks = 0;
    head->mask_at = lookup_alloc(lookup, (entries + 1) * sizeof *head->mask_at);
    if (!head->mask_at) return false;
    for (size_t e = 0; e < entries; e++) {
        head->mask_at[e] = masks;
        masks += lookup_count_bits(head->leaf_mask[e]);
    }
    head->mask_at[entries] = masks;
    head->token_mask = lookup_alloc(lookup, masks * sizeof *head->token_mask);
    head->candidates = lookup_alloc(lookup, masks * sizeof *head->candidates);
    if (!head->token_mask || !head->candidates) return false;
    memset(head->token_mask, 0, masks * sizeof *head->token_mask);
    memset(head->candidates, 0, masks * sizeof *head->candidates);
    return true;
}

bool lookup_place_masks(loci_stream *stream, loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        if (place_masks(lookup, &lookup->heads[h])) continue;
        lookup_no_memory(stream, lookup);
        return false;
    }
    return true;
}

/* Where the scores of each entry stand. */
static bool place_scores(loci_lookup *lookup, lookup_head *head) {
    size_t entries = lookup_entries(head), scores = 0;
    head->token_at = lookup_alloc(lookup, (entries + 1) * sizeof *head->token_at);
    if (!head->token_at) return false;
    for (size_t e = 0; e < entries; e++) {
        head->token_at[e] = scores;
        for (size_t i = head->mask_at[e]; i < head->mask_at[e + 1]; i++)
            scores += (size_t)lookup_count_bits(head->candidates[i]) * lookup->group;
    }
    head->token_at[entries] = scores;
    head->token_score = lookup_alloc(lookup, scores * sizeof *head->token_score);
    head->listed = scores / lookup->group;
    if (!lookup_listed(lookup)) return head->token_score != NULL;
    head->slots = lookup_alloc(lookup, head->listed * sizeof *head->slots);
    return head->token_score && head->slots;
}

static uint32_t padded_code(uint32_t dim) {
    return (dim / 2 + 31) / 32 * 32;
}

bool lookup_prepare_codes(loci_stream *stream, loci_lookup *lookup) {
    bool ok = lookup->ready;
    if (!ok) return false;
    for (uint32_t h = 0; ok && !lookup_limited(lookup) && h < lookup->kv_heads; h++)
        ok = place_scores(lookup, &lookup->heads[h]);
    lookup->folded_stride = lookup_listed(lookup)
                                ? 2 * (size_t)lookup->group * padded_code(lookup->dim)
                                : loci_folded_bytes(lookup->blocks * LOCI_LANES, lookup->dim);
    unsigned threads = loci_pool_threads(lookup->cpu->pool);
    if (ok) lookup->folded = lookup_alloc(lookup, threads * lookup->folded_stride);
    ok = ok && lookup->folded;
    if (!ok) lookup_no_memory(stream, lookup);
    return ok;
}

void loci_fold_query(loci_folded *out, uint8_t *memory, const float *q, uint32_t vectors,
                     uint32_t dim, const float *code_scale) {
    uint32_t lanes = loci_lane_blocks(vectors) * LOCI_LANES;
    out->scale = (void *)memory;
    out->sum = (void *)(out->scale + lanes);
    out->codes = (void *)(out->sum + lanes);
    float row[LOCI_HEAD_DIM_MAX];
    memset(out->codes, 0, (size_t)lanes * dim);
    for (uint32_t v = 0; v < lanes; v++) {
        out->scale[v] = 0.0f;
        out->sum[v] = 0;
        if (v >= vectors) continue;
        for (uint32_t i = 0; i < dim; i++) row[i] = q[(size_t)v * dim + i] * code_scale[i];
        loci_pack_lane_i8(out->codes + (size_t)(v / LOCI_LANES) * LOCI_LANES * dim, v % LOCI_LANES,
                          &out->scale[v], &out->sum[v], row, dim);
    }
}

void loci_score_codes_tile(const loci_corpus_kernels *kernels, const loci_folded *folded,
                           const float *mean_terms, const uint8_t *codes, uint32_t n, uint32_t dim,
                           uint32_t block, float *out) {
    int32_t dot[LOCI_LEAF_TOKENS_MAX * LOCI_LANES];
    const float *scale = folded->scale + (size_t)block * LOCI_LANES;
    const int32_t *sum = folded->sum + (size_t)block * LOCI_LANES;
    const float *base = mean_terms + (size_t)block * LOCI_LANES;
    kernels->dot_u8(dot, codes, n, dim, folded->codes + (size_t)block * LOCI_LANES * dim);
    kernels->code_scores(out, dot, n, base, scale, sum);
}

/* The candidates of some row under one root. */
typedef struct root_work {
    const lookup_part *part;
    uint32_t root;                      /* its number among the head's */
    uint32_t all[LOCI_ROOT_LEAVES_MAX]; /* of each leaf, a bit each */
    uint32_t at[LOCI_ROOT_LEAVES_MAX];  /* number of the leaf's first among the root's */
    uint32_t n;
    uint8_t codes[LOCI_ROOT_TOKENS_MAX * LOCI_HEAD_DIM_MAX / 2];
} root_work;

static void join_candidates(root_work *w, const lookup_head *head) {
    const loci_leaf *leaves = lookup_leaves(head, w->root);
    size_t stride = loci_record_stride(loci_pair_header_of(w->part->blob)->head_dim);
    lookup_join_masks(head, w->root, head->candidates, w->all);
    w->n = 0;
    for (uint32_t l = 0; l < head->root_leaves[w->root]; l++) {
        w->at[l] = w->n;
        w->n += lookup_count_bits(w->all[l]);
        for (uint32_t left = w->all[l]; left; left &= left - 1) {
            const uint8_t *record =
                loci_slot_record(w->part->blob, leaves[l].begin + (uint32_t)__builtin_ctz(left));
            __builtin_prefetch(record);
            __builtin_prefetch(record + stride - 1);
        }
    }
}

/* The next root from `local` on that has candidates, its records on their way to the cache; false
 * if there is none. */
static bool find_candidates(root_work *w, const lookup_head *head, uint32_t local) {
    uint32_t end = w->part->root_base + w->part->end;
    for (w->root = w->part->root_base + local; w->root < end; w->root++) {
        if (!lookup_has_leaves(head, w->root)) continue;
        join_candidates(w, head);
        if (w->n > 0) return true;
    }
    return false;
}

static bool take_code(lookup_part *part, uint32_t slot, uint32_t dim, uint8_t *out) {
    if (!loci_slot_check_record(part->blob, slot)) {
        lookup_fault(part, "record of slot", slot);
        return false;
    }
    memcpy(out, loci_slot_record(part->blob, slot), dim / 2);
    return true;
}

/* Verifies the candidates' records and gathers their codes; false when one is damaged. */
static bool gather_codes(root_work *w, lookup_part *part, const lookup_head *head, uint32_t dim) {
    const loci_leaf *leaves = lookup_leaves(head, w->root);
    uint8_t *out = w->codes;
    for (uint32_t l = 0; l < head->root_leaves[w->root]; l++) {
        for (uint32_t left = w->all[l]; left; left &= left - 1, out += dim / 2) {
            uint32_t slot = leaves[l].begin + (uint32_t)__builtin_ctz(left);
            if (!take_code(part, slot, dim, out)) return false;
        }
    }
    part->stats.code_bytes += w->n * loci_record_stride(dim);
    return true;
}

/* Scores of one vector's candidates under a root, out of all that were scored there. */
static void pick_scores(const root_work *w, uint64_t kept, const uint32_t *mask, const float *lane,
                        float *out) {
    for (; kept; kept &= kept - 1, mask++) {
        uint32_t l = (uint32_t)__builtin_ctzll(kept);
        for (uint32_t left = *mask; left; left &= left - 1) {
            uint32_t below = w->all[l] & ((left & (0u - left)) - 1);
            *out++ = lane[(w->at[l] + lookup_count_bits(below)) * LOCI_LANES];
        }
    }
}

/* Hands the scores of a block's lanes, [candidates of the root][16], to the entries. */
static void spread_scores(const loci_lookup *lookup, lookup_head *head, const root_work *w,
                          uint32_t block, size_t first, size_t last, const float *scores) {
    for (size_t e = first; e < last; e++) {
        size_t tokens = lookup_candidates(lookup, head, e);
        for (uint32_t j = 0; j < lookup->group; j++) {
            uint32_t vector = head->entry_row[e] * lookup->group + j;
            if (vector / LOCI_LANES != block) continue;
            const float *lane = scores + vector % LOCI_LANES;
            float *out = lookup_scores(lookup, head, e, j);
            if (tokens == w->n) { /* all of them, as when one row alone keeps the root */
                for (size_t t = 0; t < tokens; t++) out[t] = lane[t * LOCI_LANES];
                continue;
            }
            pick_scores(w, head->leaf_mask[e], head->candidates + head->mask_at[e], lane, out);
        }
    }
}

static void score_root(const loci_lookup *lookup, lookup_head *head, const root_work *w,
                       const loci_folded *folded, const float *mean_terms) {
    uint8_t codes[LOCI_LEAF_TOKENS_MAX * LOCI_HEAD_DIM_MAX];
    float scores[LOCI_ROOT_TOKENS_MAX * LOCI_LANES];
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        size_t first, last;
        lookup_block_entries(lookup, head, head->entry_begin[w->root],
                             head->entry_begin[w->root + 1], b, &first, &last);
        if (first == last) continue;
        for (uint32_t at = 0, n; at < w->n; at += n) {
            n = w->n - at < LOCI_LEAF_TOKENS_MAX ? w->n - at : LOCI_LEAF_TOKENS_MAX;
            lookup->kernels->unpack(codes, w->codes + (size_t)at * lookup->dim / 2,
                                    (size_t)n * lookup->dim);
            loci_score_codes_tile(lookup->kernels, folded, mean_terms, codes, n, lookup->dim, b,
                                  scores + (size_t)at * LOCI_LANES);
        }
        spread_scores(lookup, head, w, b, first, last, scores);
    }
}

/* Candidates of a single row whose records are on their way: most are in another page, which takes
 * long to find. */
#define AHEAD 48u

/* A record on its way to the cache. Inlined: gcc drops calls of what does nothing else. */
static inline __attribute__((always_inline)) void prefetch_record(const uint8_t *blob,
                                                                  uint32_t slot) {
    const uint8_t *record = loci_slot_record(blob, slot);
    __builtin_prefetch(record);
    __builtin_prefetch(record + loci_record_stride(loci_pair_header_of(blob)->head_dim) - 1);
}

/* The slots of the part's candidates, in their order; returns their number. */
static size_t list_candidates(const lookup_part *part, const lookup_head *head, uint32_t *slots) {
    size_t n = 0;
    for (uint32_t r = part->root_base + part->first; r < part->root_base + part->end; r++) {
        size_t entry = head->entry_begin[r];
        if (entry == head->entry_begin[r + 1]) continue;
        const loci_leaf *leaves = lookup_leaves(head, r);
        const uint32_t *mask = head->candidates + head->mask_at[entry];
        for (uint64_t kept = head->leaf_mask[entry]; kept; kept &= kept - 1, mask++) {
            uint32_t begin = leaves[__builtin_ctzll(kept)].begin;
            for (uint32_t left = *mask; left; left &= left - 1)
                slots[n++] = begin + (uint32_t)__builtin_ctz(left);
        }
    }
    return n;
}

/* The queries of a KV head, whose vectors fit into a block, with the code scales of a pair. */
static loci_code_queries fold_few(const loci_lookup *lookup, const lookup_part *part,
                                  const float *mean_terms, uint8_t *memory) {
    uint32_t dim = lookup->dim, padded = padded_code(dim);
    const float *code_scale = loci_pair_code_scale(part->blob);
    const float *q = lookup->q + (size_t)part->kv_head * lookup->vectors * dim;
    loci_code_queries out = {
        .count = lookup->vectors, .padded = padded, .values = (int8_t *)memory};
    memset(memory, 0, 2 * (size_t)out.count * padded);
    for (uint32_t v = 0; v < out.count; v++, q += dim, memory += 2 * (size_t)padded) {
        float row[LOCI_HEAD_DIM_MAX];
        int8_t values[LOCI_HEAD_DIM_MAX];
        for (uint32_t i = 0; i < dim; i++) row[i] = q[i] * code_scale[i];
        loci_round_i8(values, &out.scale[v], &out.sum[v], row, dim);
        for (uint32_t i = 0; i < dim; i++) memory[i % 2 * padded + i / 2] = (uint8_t)values[i];
        out.base[v] = mean_terms[v];
    }
    return out;
}

/* The scores of all candidates of a part, of one row. */
static void score_row(const loci_lookup *lookup, lookup_part *part, lookup_head *head,
                      const float *mean_terms, uint8_t *memory) {
    loci_code_queries q = fold_few(lookup, part, mean_terms, memory);
    size_t stride = loci_record_stride(lookup->dim);
    if (!lookup_limited(lookup)) {
        size_t entry = head->entry_begin[part->root_base + part->first];
        part->list_begin = head->token_at[entry] / lookup->group;
        part->list_end =
            part->list_begin + list_candidates(part, head, head->slots + part->list_begin);
    }
    size_t begin = part->list_begin, n = part->list_end - begin;
    const uint32_t *slots = head->slots + begin;
    for (size_t i = 0; i < n && i < AHEAD; i++) prefetch_record(part->blob, slots[i]);
    for (size_t i = 0; i < n;) {
        uint32_t count = n - i < LOCI_LEAF_TOKENS_MAX ? (uint32_t)(n - i) : LOCI_LEAF_TOKENS_MAX;
        for (uint32_t t = 0; t < count; t++) {
            if (i + t + AHEAD < n) prefetch_record(part->blob, slots[i + t + AHEAD]);
            if (loci_slot_check_record(part->blob, slots[i + t])) continue;
            lookup_fault(part, "record of slot", slots[i + t]);
            return;
        }
        lookup->kernels->list_scores(head->token_score + begin + i, head->listed,
                                     loci_slot_record(part->blob, 0), stride, slots + i, count, &q);
        i += count;
    }
    part->stats.code_bytes += n * stride;
}

void lookup_code_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    lookup_part *part = &lookup->parts[index];
    lookup_head *head = &lookup->heads[part->kv_head];
    const float *mean_terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    uint8_t *memory = lookup->folded + thread * lookup->folded_stride;
    loci_folded folded;
    if (lookup_listed(lookup)) {
        score_row(lookup, part, head, mean_terms, memory);
        return;
    }
    loci_fold_query(&folded, memory,
                    lookup->q + (size_t)part->kv_head * lookup->vectors * lookup->dim,
                    lookup->vectors, lookup->dim, loci_pair_code_scale(part->blob));
    root_work work[2]; /* one is scored while the records of the other come */
    work[0].part = work[1].part = part;
    uint32_t now = 0;
    bool found = find_candidates(&work[now], head, part->first);
    while (found) {
        root_work *w = &work[now];
        now = 1 - now;
        found = find_candidates(&work[now], head, w->root - part->root_base + 1);
        if (!gather_codes(w, part, head, lookup->dim)) return;
        score_root(lookup, head, w, &folded, mean_terms);
    }
}
