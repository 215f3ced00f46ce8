/* SPDX-License-Identifier: Apache-2.0
 *
 * Estimated logits of the tokens of kept leaves, from their 4-bit codes.
 *
 * key = mean + scale (code - 7.5), so with the scales folded into the query
 * q.key = q.mean + (q scale).code - 7.5 sum(q scale); the folded query is int8.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

/* Where the scores and masks of each entry stand. */
static bool place_tokens(loci_lookup *lookup, uint32_t kv_head) {
    lookup_head *head = &lookup->heads[kv_head];
    size_t entries = lookup_entries(head), tokens = 0, masks = 0;
    bool scores = lookup->mode == LOCI_MODE_HIERARCHICAL;
    head->token_at = lookup_alloc(lookup, (entries + 1) * sizeof *head->token_at);
    head->mask_at = lookup_alloc(lookup, (entries + 1) * sizeof *head->mask_at);
    if (!head->token_at || !head->mask_at) return false;
    for (uint32_t e = 0; e < lookup->corpus->extent_count; e++) {
        const lookup_pair *pair = lookup_pair_at(lookup, e, kv_head);
        for (uint32_t i = 0; i < loci_pair_header_of(pair->blob)->roots; i++) {
            const loci_root *root = loci_pair_root(pair->blob, i);
            uint32_t r = pair->root_base + i;
            for (size_t x = head->entry_begin[r]; x < head->entry_begin[r + 1]; x++) {
                head->token_at[x] = tokens;
                head->mask_at[x] = masks;
                masks += lookup_count_bits(head->leaf_mask[x]);
                for (uint32_t l = 0; scores && l < root->count; l++) {
                    if (!(head->leaf_mask[x] >> l & 1)) continue;
                    const loci_leaf *leaf = &loci_root_leaves(pair->blob, root)[l];
                    tokens += (size_t)leaf->count * lookup->group;
                }
            }
        }
    }
    head->token_at[entries] = tokens;
    head->mask_at[entries] = masks;
    head->token_mask = lookup_alloc(lookup, masks * sizeof *head->token_mask);
    head->token_score = lookup_alloc(lookup, tokens * sizeof *head->token_score);
    if (!head->token_mask || !head->token_score) return false;
    memset(head->token_mask, 0, masks * sizeof *head->token_mask);
    return true;
}

bool lookup_prepare_codes(loci_stream *stream, loci_lookup *lookup) {
    size_t lanes = (size_t)lookup->blocks * LOCI_LANES;
    bool ok = true;
    for (uint32_t h = 0; ok && h < lookup->kv_heads; h++) ok = place_tokens(lookup, h);
    if (ok && lookup->mode == LOCI_MODE_HIERARCHICAL) {
        /* One folded query operand for each thread. */
        lookup->code_stride = loci_folded_bytes((uint32_t)lanes, lookup->dim);
        unsigned threads = loci_pool_threads(lookup->cpu->pool);
        lookup->folded = lookup_alloc(lookup, threads * lookup->code_stride);
        ok = lookup->folded != NULL;
    }
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

/* One leaf for all rows that keep it. */
static void score_leaf(const loci_lookup *lookup, lookup_head *head, const lookup_pair *pair,
                       const loci_folded *folded, const float *mean_terms, uint32_t root,
                       uint32_t bit, const loci_leaf *leaf) {
    size_t begin = head->entry_begin[root], end = head->entry_begin[root + 1];
    uint8_t codes[LOCI_LEAF_TOKENS_MAX * LOCI_HEAD_DIM_MAX];
    float scores[LOCI_LEAF_TOKENS_MAX * LOCI_LANES];
    uint32_t live = lookup_live_bits(pair->live, leaf->begin, leaf->count);
    lookup->kernels->unpack(codes, loci_leaf_codes(pair->blob, leaf),
                            (size_t)leaf->count * lookup->dim);
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        size_t first, last, wanted = 0;
        lookup_block_entries(lookup, head, begin, end, b, &first, &last);
        for (size_t e = first; e < last; e++) wanted += head->leaf_mask[e] >> bit & 1;
        if (!wanted) continue;
        loci_score_codes_tile(lookup->kernels, folded, mean_terms, codes, leaf->count, lookup->dim,
                              b, scores);
        for (size_t e = first; e < last; e++) {
            if (!(head->leaf_mask[e] >> bit & 1)) continue;
            size_t tokens = (head->token_at[e + 1] - head->token_at[e]) / lookup->group;
            for (uint32_t j = 0; j < lookup->group; j++) {
                uint32_t vector = head->entry_row[e] * lookup->group + j;
                if (vector / LOCI_LANES != b) continue;
                float *out = head->token_score + head->token_at[e] + j * tokens + head->fill[e];
                for (uint32_t t = 0; t < leaf->count; t++)
                    out[t] =
                        live >> t & 1 ? scores[t * LOCI_LANES + vector % LOCI_LANES] : -INFINITY;
            }
        }
    }
    for (size_t e = begin; e < end; e++)
        if (head->leaf_mask[e] >> bit & 1) head->fill[e] += leaf->count;
}

void lookup_code_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    lookup_pair *pair = &lookup->pairs[index];
    lookup_head *head = &lookup->heads[pair->kv_head];
    const float *mean_terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    loci_folded folded;
    loci_fold_query(&folded, lookup->folded + thread * lookup->code_stride,
                    lookup->q + (size_t)pair->kv_head * lookup->vectors * lookup->dim,
                    lookup->vectors, lookup->dim, loci_pair_code_scale(pair->blob));
    for (uint32_t i = 0; i < loci_pair_header_of(pair->blob)->roots; i++) {
        const loci_root *root = loci_pair_root(pair->blob, i);
        uint32_t r = pair->root_base + i;
        uint64_t kept = 0;
        for (size_t e = head->entry_begin[r]; e < head->entry_begin[r + 1]; e++) {
            head->fill[e] = 0;
            kept |= head->leaf_mask[e];
        }
        const loci_leaf *leaves = loci_root_leaves(pair->blob, root);
        for (uint64_t left = kept; left; left &= left - 1) {
            const loci_leaf *leaf = &leaves[__builtin_ctzll(left)];
            const uint8_t *codes = loci_leaf_codes(pair->blob, leaf);
            for (size_t at = 0; at < leaf->count * loci_code_stride(lookup->dim); at += 64)
                __builtin_prefetch(codes + at);
        }
        for (uint32_t l = 0; l < root->count; l++) {
            if (!(kept >> l & 1)) continue;
            const loci_leaf *leaf = &leaves[l];
            if (!loci_leaf_check_codes(pair->blob, leaf)) {
                lookup_fault(pair, "codes of leaf", root->begin + l);
                return;
            }
            pair->stats.code_bytes += leaf->count * loci_code_stride(lookup->dim);
            score_leaf(lookup, head, pair, &folded, mean_terms, r, l, leaf);
        }
    }
}
