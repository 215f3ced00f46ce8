/* SPDX-License-Identifier: Apache-2.0
 *
 * Estimated mass of roots and leaves: log(live tokens) + q.c + (q * q).var / 2, in 8-bit integers.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define TILE 64u /* nodes scored together; no root has more leaves */

_Static_assert(LOCI_ROOT_LEAVES_MAX <= TILE, "the leaves of a root are one tile");

void lookup_score_tile(const loci_lookup *lookup, const lookup_pair *pair, const loci_node *first,
                       uint32_t count, const uint32_t *size, const float *mean_terms,
                       uint32_t block, float *out) {
    uint32_t dim = lookup->dim, h = pair->kv_head;
    size_t stride = loci_node_stride(dim), at = lookup_lane_at(lookup, h, block);
    size_t lane = ((size_t)h * lookup->blocks + block) * LOCI_LANES;
    uint8_t x[TILE * LOCI_HEAD_DIM_MAX];
    int32_t centroid_dot[TILE * LOCI_LANES], variance_dot[TILE * LOCI_LANES];
    if (count == 0 || dim == 0) return;
    for (uint32_t n = 0; n < count; n++) {
        const uint8_t *from = (const uint8_t *)first + n * stride + sizeof(loci_node);
        for (uint32_t i = 0; i < dim; i++) x[n * dim + i] = from[i] ^ 128u; /* int8 plus 128 */
    }
    lookup->kernels->dot_u8(centroid_dot, x, count, dim, lookup->q_codes + at);
    if (size) {
        for (uint32_t n = 0; n < count; n++)
            memcpy(x + (size_t)n * dim,
                   (const uint8_t *)first + n * stride + sizeof(loci_node) + dim, dim);
        lookup->kernels->dot_u8(variance_dot, x, count, dim, lookup->qq_codes + at);
    }
    for (uint32_t n = 0; n < count; n++) {
        const loci_node *node = (const void *)((const uint8_t *)first + n * stride);
        loci_node_terms terms = {
            .centroid_scale = node->centroid_scale,
            .variance_scale = size ? node->variance_scale : 0.0f,
            .log_size = !size     ? 0.0f
                        : size[n] ? logf((float)size[n])
                                  : -INFINITY,
            .mean_terms = mean_terms + (size_t)block * LOCI_LANES,
            .q_scale = lookup->q_scale + lane,
            .qq_scale = lookup->qq_scale + lane,
            .q_sum = lookup->q_sum + lane,
        };
        lookup->kernels->node_scores(out + (size_t)n * LOCI_LANES,
                                     centroid_dot + (size_t)n * LOCI_LANES,
                                     size ? variance_dot + (size_t)n * LOCI_LANES : NULL, &terms);
    }
}

static uint32_t live_tokens(const uint64_t *live, uint32_t first, uint32_t count) {
    if (!live) return count;
    uint32_t sum = 0;
    for (uint32_t at = 0; at < count; at += 32) {
        uint32_t part = count - at < 32 ? count - at : 32;
        sum += lookup_count_bits(lookup_live_bits(live, first + at, part));
    }
    return sum;
}

/* All roots of one pair. */
void lookup_root_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_pair *pair = &lookup->pairs[index];
    lookup_head *head = &lookup->heads[pair->kv_head];
    const loci_pair_header *header = loci_pair_header_of(pair->blob);
    if (loci_pair_check_roots(pair->blob, &pair->error) != LOCI_OK) return;
    pair->stats.root_bytes += header->roots * loci_node_stride(lookup->dim);
    uint32_t *live = head->root_live + pair->root_base, first = 0;
    for (uint32_t i = 0; i < header->roots; i++) {
        uint32_t tokens = loci_pair_root(pair->blob, i)->tokens;
        head->root_first[pair->root_base + i] = first;
        live[i] = live_tokens(pair->live, first, tokens);
        first += tokens;
    }
    if (lookup->mode != LOCI_MODE_HIERARCHICAL) return;
    float *mean_terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    lookup_mean_terms(lookup, pair, mean_terms);
    for (uint32_t i = 0; i < header->roots; i += TILE) {
        uint32_t count = header->roots - i < TILE ? header->roots - i : TILE;
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            float scores[TILE * LOCI_LANES];
            lookup_score_tile(lookup, pair, loci_pair_root(pair->blob, i), count, live + i,
                              mean_terms, b, scores);
            for (uint32_t l = 0; l < LOCI_LANES && b * LOCI_LANES + l < lookup->vectors; l++) {
                float *out = head->root_score + (size_t)(b * LOCI_LANES + l) * head->roots;
                for (uint32_t n = 0; n < count; n++)
                    out[pair->root_base + i + n] = scores[n * LOCI_LANES + l];
            }
        }
    }
}

/* The leaves of one root for all rows that keep it. */
static void score_leaves(const loci_lookup *lookup, const lookup_pair *pair, lookup_head *head,
                         uint32_t root, const loci_node *node, const float *mean_terms) {
    size_t begin = head->entry_begin[root], end = head->entry_begin[root + 1];
    uint32_t size[TILE];
    for (uint32_t l = 0; l < node->count; l++) size[l] = head->leaf_live[head->leaf_at[root] + l];
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        size_t first, last;
        float scores[TILE * LOCI_LANES];
        lookup_block_entries(lookup, head, begin, end, b, &first, &last);
        if (first == last) continue;
        lookup_score_tile(lookup, pair, loci_pair_leaf(pair->blob, node->begin), node->count, size,
                          mean_terms, b, scores);
        for (size_t e = first; e < last; e++) {
            for (uint32_t j = 0; j < lookup->group; j++) {
                uint32_t vector = head->entry_row[e] * lookup->group + j;
                if (vector / LOCI_LANES != b) continue;
                float *out = head->leaf_score + head->score_at[e] + (size_t)j * node->count;
                for (uint32_t l = 0; l < node->count; l++)
                    out[l] = scores[l * LOCI_LANES + vector % LOCI_LANES];
            }
        }
    }
}

/* All leaves of the roots of one pair that some row keeps. */
void lookup_leaf_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_pair *pair = &lookup->pairs[index];
    lookup_head *head = &lookup->heads[pair->kv_head];
    const float *mean_terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    for (uint32_t i = 0; i < loci_pair_header_of(pair->blob)->roots; i++) {
        uint32_t root = pair->root_base + i;
        size_t begin = head->entry_begin[root];
        if (begin == head->entry_begin[root + 1]) continue;
        if (loci_pair_check_leaves(pair->blob, i, head->root_first[root], &pair->error) != LOCI_OK)
            return;
        const loci_node *node = loci_pair_root(pair->blob, i);
        pair->stats.leaf_bytes += node->count * loci_node_stride(lookup->dim);
        uint8_t *live = head->leaf_live + head->leaf_at[root];
        for (uint32_t l = 0; l < node->count; l++) {
            const loci_node *leaf = loci_pair_leaf(pair->blob, node->begin + l);
            live[l] = (uint8_t)live_tokens(pair->live, leaf->begin, leaf->count);
            if (lookup->mode == LOCI_MODE_DENSE && live[l]) head->leaf_mask[begin] |= 1ull << l;
        }
        if (lookup->mode == LOCI_MODE_HIERARCHICAL)
            score_leaves(lookup, pair, head, root, node, mean_terms);
    }
}
