/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection rule of Squeezed Attention (arXiv 2411.09688, sections 3.2 and 3.3) on the two
 * levels of the index: S_i = exp(q.C_i) / sum_j N_j exp(q.C_j) over all live nodes of a level,
 * averaged over the rows and heads of a KV head; a node is kept iff the mean exceeds the level's
 * threshold, a leaf only under a kept root. N counts live tokens; nodes without any are left out of
 * maximum and sum. Two passes over the nodes (log-sum-exp, then S) instead of storing all scores.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define TILE 64u /* nodes scored together; no root has more leaves */

_Static_assert(LOCI_ROOT_LEAVES_MAX <= TILE, "the leaves of a root are one tile");

typedef struct squeeze_job {
    loci_lookup *lookup;
    int level;              /* 0 = roots, 1 = leaves */
    loci_lane_softmax *lse; /* [parts][blocks] of pass one */
    float *total;           /* [kv_heads][blocks * 16] log-sum-exp over all extents */
} squeeze_job;

typedef void (*tile_fn)(squeeze_job *job, size_t index, uint32_t block, const uint32_t *live,
                        uint32_t count, size_t first_node, float *scores);

/* Calls fn for each block of lanes of each run of up to 64 nodes of a part at the job's level. */
static void walk_nodes(squeeze_job *job, size_t index, tile_fn fn) {
    loci_lookup *lookup = job->lookup;
    const lookup_part *part = &lookup->parts[index];
    lookup_head *head = &lookup->heads[part->kv_head];
    float *terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    float scores[TILE * LOCI_LANES];
    lookup_mean_terms(lookup, part, terms);
    for (uint32_t i = part->first, step; i < part->end; i += step) {
        const loci_root *root = loci_pair_root(part->blob, i);
        const loci_node *first = loci_pair_root_node(part->blob, i);
        uint32_t live[TILE], count = root->count;
        size_t node = head->leaf_at[part->root_base + i];
        step = 1;
        if (job->level == 0) {
            count = step = part->end - i < TILE ? part->end - i : TILE;
            node = part->root_base + i;
            memcpy(live, head->root_live + node, count * sizeof *live);
        } else {
            first = loci_pair_leaf_node(part->blob, root->begin);
            for (uint32_t l = 0; l < count; l++) live[l] = head->leaf_live[node + l];
        }
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            lookup_score_tile(lookup, part, first, count, NULL, terms, b, scores, NULL);
            fn(job, index, b, live, count, node, scores);
        }
    }
}

/* N exp(c) = exp(c + log N). */
static void add_lse(squeeze_job *job, size_t index, uint32_t block, const uint32_t *live,
                    uint32_t count, size_t first_node, float *scores) {
    (void)first_node;
    for (uint32_t n = 0; n < count; n++) {
        float log_live = live[n] ? logf((float)live[n]) : -INFINITY;
        for (uint32_t l = 0; l < LOCI_LANES; l++) scores[n * LOCI_LANES + l] += log_live;
    }
    job->lookup->kernels->softmax_lanes(scores, count,
                                        &job->lse[index * job->lookup->blocks + block]);
}

static void add_shares(squeeze_job *job, size_t index, uint32_t block, const uint32_t *live,
                       uint32_t count, size_t first_node, float *scores) {
    const loci_lookup *lookup = job->lookup;
    uint32_t kv_head = lookup->parts[index].kv_head;
    const float *total = job->total + ((size_t)kv_head * lookup->blocks + block) * LOCI_LANES;
    float *out = lookup->heads[kv_head].squeezed[job->level] + first_node;
    for (uint32_t n = 0; n < count; n++) {
        float sum = 0.0f;
        for (uint32_t l = 0; l < LOCI_LANES && block * LOCI_LANES + l < lookup->vectors; l++)
            sum += expf(scores[n * LOCI_LANES + l] - total[l]);
        if (live[n]) out[n] += sum / (float)lookup->vectors;
    }
}

static void lse_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    walk_nodes(arg, index, add_lse);
}

static void share_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    walk_nodes(arg, index, add_shares);
}

static void join_lse(squeeze_job *job) {
    const loci_lookup *lookup = job->lookup;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        for (uint32_t v = 0; v < lookup->blocks * LOCI_LANES; v++) {
            float max = -INFINITY, sum = 0.0f;
            for (int pass = 0; pass < 2; pass++) {
                for (size_t p = 0; p < lookup->part_count; p++) {
                    if (lookup->parts[p].kv_head != h) continue;
                    const loci_lane_softmax *state = &job->lse[p * lookup->blocks + v / LOCI_LANES];
                    float other = state->max[v % LOCI_LANES];
                    if (pass == 0)
                        max = other > max ? other : max;
                    else if (other > -INFINITY)
                        sum += state->sum[v % LOCI_LANES] * expf(other - max);
                }
            }
            job->total[(size_t)h * lookup->blocks * LOCI_LANES + v] =
                sum > 0.0f ? max + logf(sum) : INFINITY;
        }
    }
}

static bool squeeze_level(loci_lookup *lookup, int level) {
    size_t states = lookup->part_count * lookup->blocks;
    squeeze_job job = {
        .lookup = lookup,
        .level = level,
        .lse = lookup_alloc(lookup, states * sizeof *job.lse),
        .total = lookup_alloc(lookup, (size_t)lookup->kv_heads * lookup->blocks * LOCI_LANES *
                                          sizeof *job.total),
    };
    if (!job.lse || !job.total) return false;
    for (size_t i = 0; i < states; i++) {
        for (uint32_t l = 0; l < LOCI_LANES; l++) job.lse[i].max[l] = -INFINITY;
        memset(job.lse[i].sum, 0, sizeof job.lse[i].sum);
    }
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        lookup_head *head = &lookup->heads[h];
        size_t nodes = level == 0 ? head->roots : head->leaves;
        head->squeezed[level] = lookup_alloc(lookup, nodes * sizeof(float));
        if (!head->squeezed[level]) return false;
        memset(head->squeezed[level], 0, nodes * sizeof(float));
    }
    loci_pool_run(lookup->cpu->pool, lookup->part_count, lse_task, &job);
    join_lse(&job);
    loci_pool_run(lookup->cpu->pool, lookup->part_count, share_task, &job);
    return true;
}

void lookup_squeeze(loci_stream *stream, loci_lookup *lookup) {
    if (!squeeze_level(lookup, 0) || !squeeze_level(lookup, 1)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    const float *threshold = lookup->params.squeezed_threshold;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        lookup_head *head = &lookup->heads[h];
        for (uint32_t r = 0; r < head->roots; r++) {
            if (!(head->squeezed[0][r] > threshold[0])) continue;
            size_t at = head->leaf_at[r];
            size_t end = r + 1 < head->roots ? head->leaf_at[r + 1] : head->leaves;
            for (size_t l = 0; l < end - at; l++)
                if (head->leaf_live[at + l] && head->squeezed[1][at + l] > threshold[1])
                    head->leaf_mask[head->entry_begin[r]] |= 1ull << l;
        }
    }
}

void loci_cpu_lookup_squeezed(loci_stream *stream, loci_lookup *lookup, unsigned level,
                              float *scores, uint32_t *tokens, float *root_scores, size_t capacity,
                              size_t *count) {
    (void)stream;
    *count = 0;
    if (!lookup->ready || lookup->mode != LOCI_MODE_SQUEEZED || level > 1) return;
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        const lookup_head *head = &lookup->heads[h];
        size_t nodes = level == 0 ? head->roots : head->leaves, root = 0;
        for (size_t i = 0; i < nodes; i++) {
            while (level == 1 && root + 1 < head->roots && head->leaf_at[root + 1] <= i) root++;
            uint32_t live = level == 0 ? head->root_live[i] : head->leaf_live[i];
            if (!live || !head->squeezed[level]) continue;
            if (*count < capacity) {
                scores[*count] = head->squeezed[level][i];
                tokens[*count] = live;
                if (root_scores) root_scores[*count] = head->squeezed[0][level == 0 ? i : root];
            }
            (*count)++;
        }
    }
}
