/* SPDX-License-Identifier: Apache-2.0
 *
 * Estimated mass of roots, log(live tokens) + q.c + (q * q).var / 2, in 8-bit integers; what a
 * look-up must know of the leaves of kept roots.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define TILE 64u /* nodes scored together */
/* Of a block, which is read in order: what follows, the CPU fetches by itself, and more at once are
 * more lines than can be under way. */
#define PREFETCH_BYTES 256u

void lookup_score_tile(const loci_lookup *lookup, const lookup_part *part, const loci_node *first,
                       uint32_t count, const uint32_t *size, const float *mean_terms,
                       uint32_t block, float *out, float *centre) {
    uint32_t dim = lookup->dim, h = part->kv_head;
    size_t stride = loci_node_stride(dim), at = lookup_lane_at(lookup, h, block);
    size_t lane = ((size_t)h * lookup->blocks + block) * LOCI_LANES;
    uint8_t x[TILE * LOCI_HEAD_DIM_MAX];
    int32_t centroid_dot[TILE * LOCI_LANES], variance_dot[TILE * LOCI_LANES];
    if (count == 0 || dim == 0) return;
    for (uint32_t n = 0; n < count; n++) {
        const uint8_t *from = (const uint8_t *)first + n * stride + sizeof(loci_node);
        for (uint32_t i = 0; i < dim; i += sizeof(uint64_t)) { /* int8 plus 128 */
            uint64_t eight;
            memcpy(&eight, from + i, sizeof eight);
            eight ^= 0x8080808080808080u;
            memcpy(x + n * dim + i, &eight, sizeof eight);
        }
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
        terms.log_size = 0.0f;
        if (centre)
            lookup->kernels->node_scores(centre + (size_t)n * LOCI_LANES,
                                         centroid_dot + (size_t)n * LOCI_LANES, NULL, &terms);
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

void lookup_check_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_part *part = &lookup->parts[index];
    if (part->first == 0) part->error.status = loci_pair_check_roots(part->blob, &part->error);
}

/* What is known of the roots of one part without their scores. */
static void count_roots(const lookup_part *part, lookup_head *head) {
    uint32_t slot = 0;
    for (uint32_t i = 0; i < part->first; i++) slot += loci_pair_root(part->blob, i)->tokens;
    for (uint32_t i = part->first; i < part->end; i++) {
        const loci_root *root = loci_pair_root(part->blob, i);
        uint32_t r = part->root_base + i;
        head->root_leaves[r] = (uint8_t)root->count;
        head->root_groups[r] = (uint8_t)loci_sketch_groups(root->tokens);
        head->root_first[r] = slot;
        head->root_live[r] = live_tokens(part->live, slot, root->tokens);
        slot += root->tokens;
    }
}

/* All roots of one part. */
void lookup_root_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_part *part = &lookup->parts[index];
    lookup_head *head = &lookup->heads[part->kv_head];
    part->stats.root_bytes +=
        (part->end - part->first) * (sizeof(loci_root) + loci_node_stride(lookup->dim));
    count_roots(part, head);
    if (lookup->mode != LOCI_MODE_HIERARCHICAL) return;
    float *mean_terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    lookup_mean_terms(lookup, part, mean_terms);
    for (uint32_t i = part->first; i < part->end; i += TILE) {
        uint32_t count = part->end - i < TILE ? part->end - i : TILE, r = part->root_base + i;
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            float scores[TILE * LOCI_LANES], centre[TILE * LOCI_LANES];
            lookup_score_tile(lookup, part, loci_pair_root_node(part->blob, i), count,
                              head->root_live + r, mean_terms, b, scores,
                              head->root_centre ? centre : NULL);
            for (uint32_t l = 0; l < LOCI_LANES && b * LOCI_LANES + l < lookup->vectors; l++) {
                float *out = head->root_score + (size_t)(b * LOCI_LANES + l) * head->roots + r;
                for (uint32_t n = 0; n < count; n++) out[n] = scores[n * LOCI_LANES + l];
                for (uint32_t n = 0; head->root_centre && n < count; n++)
                    head->root_centre[(size_t)l * head->roots + r + n] = centre[n * LOCI_LANES + l];
            }
        }
    }
}

uint32_t lookup_next_kept(const loci_lookup *lookup, const lookup_part *part, uint32_t local) {
    const lookup_head *head = &lookup->heads[part->kv_head];
    const size_t *begin = head->entry_begin + part->root_base;
    while (local < part->end && begin[local] == begin[local + 1]) local++;
    if (local == part->end) return local;
    const loci_root *root = loci_pair_root(part->blob, local);
    const uint8_t *block = (const void *)loci_root_leaves(part->blob, root);
    size_t bytes = loci_block_bytes(lookup->dim, root->count, root->tokens);
    for (size_t i = 0; i < bytes && i < PREFETCH_BYTES; i += 64) __builtin_prefetch(block + i);
    return local;
}

/* All leaves of the roots of one part that some row keeps. */
void lookup_leaf_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_part *part = &lookup->parts[index];
    lookup_head *head = &lookup->heads[part->kv_head];
    bool sketches = lookup->mode == LOCI_MODE_HIERARCHICAL;
    if (sketches) lookup_make_tables(lookup, part);
    for (uint32_t i = lookup_next_kept(lookup, part, part->first), next; i < part->end; i = next) {
        uint32_t r = part->root_base + i;
        size_t begin = head->entry_begin[r];
        next = lookup_next_kept(lookup, part, i + 1);
        if (loci_pair_check_block(part->blob, i, head->root_first[r], &part->error) != LOCI_OK)
            return;
        const loci_root *root = loci_pair_root(part->blob, i);
        const loci_leaf *leaves = loci_root_leaves(part->blob, root);
        part->stats.leaf_bytes += loci_block_bytes(lookup->dim, root->count, root->tokens);
        uint8_t *live = head->leaf_live + head->leaf_at[r];
        memcpy(head->leaf + head->leaf_at[r], leaves, root->count * sizeof *leaves);
        for (uint32_t l = 0; l < root->count; l++) {
            live[l] = (uint8_t)live_tokens(part->live, leaves[l].begin, leaves[l].count);
            if (lookup->mode == LOCI_MODE_DENSE && live[l]) head->leaf_mask[begin] |= 1ull << l;
        }
        if (sketches) {
            lookup_score_sketches(lookup, part, i);
        } else if (lookup->mode == LOCI_MODE_SQUEEZED) {
            if (loci_pair_check_leaf_nodes(part->blob, i, &part->error) != LOCI_OK) return;
            part->stats.leaf_bytes += root->count * loci_node_stride(lookup->dim);
        }
    }
}
