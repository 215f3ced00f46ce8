/* SPDX-License-Identifier: Apache-2.0
 *
 * Exact attention over selected tokens, the estimated tail, and the share of segments.
 *
 * One task walks the selected leaves of one part, each leaf once for all rows that need any of
 * its tokens; what it has summed for each vector is merged over the parts in their order.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define TOKENS LOCI_LEAF_TOKENS_MAX
#define TAIL_SKIP 1e-7f

/* Selected tokens of one leaf. */
typedef struct leaf_work {
    loci_lookup *lookup;
    lookup_part *part;
    const loci_leaf *leaf;
    uint32_t root, bit;    /* number of the root among the head's; of the leaf in the root */
    uint32_t n;            /* tokens of the leaf that some row needs */
    uint8_t index[TOKENS]; /* their places in the leaf */
    float k[TOKENS * LOCI_HEAD_DIM_MAX], v[TOKENS * LOCI_HEAD_DIM_MAX];
    float logits[TOKENS * LOCI_LANES];
    uint32_t allowed[LOCI_LANES]; /* tokens of the leaf that a lane's row selected */
} leaf_work;

typedef struct partial {
    loci_lane_softmax *state; /* [blocks] */
    float *o;                 /* [vectors][dim] */
} partial;

typedef struct attend_job {
    loci_lookup *lookup;
    partial *partials; /* [parts] */
    float *out, *lse;
    uint32_t out_stride;
    const float *total_lse;
    uint32_t row_begin;
    double *mass; /* [segments of the view] */
} attend_job;

static partial partial_of(const attend_job *job, size_t index) {
    return job->partials[index];
}

/* The mask words of a leaf: shared entries hold one for all rows. */
static uint32_t mask_of(const lookup_head *head, size_t entry, uint32_t bit) {
    uint64_t below = head->leaf_mask[entry] & ((1ull << bit) - 1);
    return head->token_mask[head->mask_at[entry] + lookup_count_bits(below)];
}

/* v may be NULL. */
static void widen_token(const loci_lookup *lookup, const uint8_t *blob, uint32_t slot, float *k,
                        float *v) {
    const loci_corpus_kernels *kernels = lookup->kernels;
    const void *row = loci_slot_kv(blob, slot);
    uint32_t dim = lookup->dim;
    if (loci_pair_header_of(blob)->kv_dtype == LOCI_I8) {
        float k_scale, v_scale;
        loci_kv_scales(row, dim, &k_scale, &v_scale);
        kernels->widen_i8(k, row, dim, k_scale);
        if (v) kernels->widen_i8(v, (const int8_t *)row + dim, dim, v_scale);
    } else {
        kernels->widen(k, row, dim);
        if (v) kernels->widen(v, (const uint16_t *)row + dim, dim);
    }
}

/* Gathers, verifies and widens the tokens of `all`, a bit each. False when one is damaged. Without
 * values nothing is verified: attend_sparse has done it. */
static bool load_tokens(leaf_work *w, uint32_t all, bool values) {
    const uint8_t *blob = w->part->blob;
    uint32_t dim = w->lookup->dim;
    w->n = 0;
    for (uint32_t t = 0; t < w->leaf->count; t++) {
        if (!(all >> t & 1)) continue;
        if (values && !loci_slot_check_kv(blob, w->leaf->begin + t)) {
            lookup_fault(w->part, "KV of slot", w->leaf->begin + t);
            return false;
        }
        float *v = values ? w->v + (size_t)w->n * dim : NULL;
        widen_token(w->lookup, blob, w->leaf->begin + t, w->k + (size_t)w->n * dim, v);
        w->index[w->n++] = (uint8_t)t;
    }
    return true;
}

/* The same tokens without their keys. */
static void list_tokens(leaf_work *w, uint32_t all) {
    w->n = 0;
    for (; all; all &= all - 1) w->index[w->n++] = (uint8_t)__builtin_ctz(all);
}

/* Which tokens each lane of a block selected; false if none did. */
static bool set_allowed(leaf_work *w, uint32_t block, uint32_t shared_mask) {
    const loci_lookup *lookup = w->lookup;
    const lookup_head *head = &lookup->heads[w->part->kv_head];
    memset(w->allowed, 0, sizeof w->allowed);
    if (lookup_shared(lookup)) {
        for (uint32_t l = 0; l < LOCI_LANES && block * LOCI_LANES + l < lookup->vectors; l++)
            w->allowed[l] = shared_mask;
        return shared_mask != 0;
    }
    size_t first, last;
    uint32_t any = 0;
    lookup_block_entries(lookup, head, head->entry_begin[w->root], head->entry_begin[w->root + 1],
                         block, &first, &last);
    for (size_t e = first; e < last; e++) {
        if (!(head->leaf_mask[e] >> w->bit & 1)) continue;
        uint32_t mask = mask_of(head, e, w->bit);
        any |= mask;
        for (uint32_t j = 0; j < lookup->group; j++) {
            uint32_t vector = head->entry_row[e] * lookup->group + j;
            if (vector / LOCI_LANES == block) w->allowed[vector % LOCI_LANES] = mask;
        }
    }
    return any != 0;
}

/* Exact logits of a block's lanes, -INFINITY where a lane's row did not select the token. */
static void score_block(leaf_work *w, uint32_t block) {
    const loci_lookup *lookup = w->lookup;
    lookup->kernels->dot_f32(w->logits, w->k, w->n, lookup->dim,
                             lookup->q_lanes + lookup_lane_at(lookup, w->part->kv_head, block));
    for (uint32_t t = 0; t < w->n; t++)
        for (uint32_t l = 0; l < LOCI_LANES; l++)
            if (!(w->allowed[l] >> w->index[t] & 1)) w->logits[t * LOCI_LANES + l] = -INFINITY;
}

/* Adds n tokens with these logits and values to the partial results of a block; allowed is 0 for
 * the lanes that have none of them. */
static void add_block(const loci_lookup *lookup, const partial *own, uint32_t block, float *logits,
                      const float *v, uint32_t n, const uint32_t *allowed) {
    loci_lane_softmax *state = &own->state[block];
    lookup->kernels->softmax_lanes(logits, n, state);
    for (uint32_t l = 0; l < LOCI_LANES && block * LOCI_LANES + l < lookup->vectors; l++) {
        if (state->max[l] == -INFINITY || !allowed[l]) continue;
        float *o = own->o + (size_t)(block * LOCI_LANES + l) * lookup->dim;
        lookup->kernels->add_values(o, state->keep[l], logits + l, v, n, lookup->dim);
    }
}

typedef void (*leaf_fn)(attend_job *job, leaf_work *work, uint32_t block, size_t index);

/* A root with selected tokens: of each leaf, those that some row needs. */
typedef struct root_tokens {
    uint32_t root; /* its number among the pair's */
    uint32_t all[LOCI_ROOT_LEAVES_MAX];
} root_tokens;

/* Keys, values and their hashes, or where they are not read again the records, on their way to the
 * cache. Inlined: gcc drops calls of what does nothing else. */
static inline __attribute__((always_inline)) void prefetch_token(const leaf_work *w, uint32_t slot,
                                                                 bool read) {
    const uint8_t *blob = w->part->blob;
    if (!read) {
        __builtin_prefetch(loci_slot_record(blob, slot) + w->lookup->dim / 2);
        return;
    }
    __builtin_prefetch(loci_slot_kv_hash(blob, slot));
    const uint8_t *row = loci_slot_kv(blob, slot);
    for (size_t i = 0; i < loci_pair_kv_stride(blob); i += 64) __builtin_prefetch(row + i);
}

/* The next root of the part, from `local` on, with leaves that some row keeps; false if there is
 * none. */
static bool find_selected(const leaf_work *w, uint32_t local, bool read, root_tokens *out) {
    const loci_lookup *lookup = w->lookup;
    const lookup_head *head = &lookup->heads[w->part->kv_head];
    while (local < w->part->end && !lookup_has_leaves(head, w->part->root_base + local)) local++;
    if (local == w->part->end) return false;
    uint32_t root = w->part->root_base + local;
    const loci_leaf *leaves = lookup_leaves(head, root);
    out->root = local;
    lookup_join_masks(head, root, head->token_mask, out->all);
    for (uint32_t l = 0; l < head->root_leaves[root] && !lookup_shared(lookup); l++)
        for (uint32_t all = out->all[l]; all; all &= all - 1)
            prefetch_token(w, leaves[l].begin + (uint32_t)__builtin_ctz(all), read);
    return true;
}

/* The selected tokens of one leaf, number `token` of the part and following: reads them and calls
 * fn for each block of lanes with a stake in them. */
static bool walk_leaf(attend_job *job, leaf_work *w, uint32_t all, size_t token, size_t index,
                      bool values, leaf_fn fn) {
    const loci_lookup *lookup = w->lookup;
    bool read = values || !lookup->logits;
    if (read && !load_tokens(w, all, values)) return false;
    if (!read) list_tokens(w, all);
    if (values) {
        w->part->stats.hash_bytes += w->n * sizeof(uint64_t);
        size_t token_bytes = loci_pair_kv_stride(w->part->blob);
        w->part->stats.kv_bytes += w->n * token_bytes;
        w->part->stats.kv_leaf_bytes += w->leaf->count * token_bytes;
    }
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        if (!set_allowed(w, b, all)) continue;
        float *kept = lookup->logits;
        if (kept) kept += (token * lookup->blocks + (size_t)b * w->n) * LOCI_LANES;
        if (read) score_block(w, b);
        if (kept && read) memcpy(kept, w->logits, w->n * LOCI_LANES * sizeof *kept);
        if (!read) memcpy(w->logits, kept, w->n * LOCI_LANES * sizeof *kept);
        fn(job, w, b, index);
    }
    return true;
}

/* Calls fn for each selected leaf of a part and each block of lanes with a stake in it. */
static void walk_selected(attend_job *job, size_t index, bool values, leaf_fn fn) {
    loci_lookup *lookup = job->lookup;
    lookup_part *part = &lookup->parts[index];
    const lookup_head *head = &lookup->heads[part->kv_head];
    bool read = values || !lookup->logits;
    size_t token = lookup->logits ? lookup->logit_at[index] : 0;
    root_tokens roots[2]; /* one is worked on while the tokens of the other come */
    leaf_work w;
    w.lookup = lookup;
    w.part = part;
    uint32_t now = 0;
    bool found = find_selected(&w, part->first, read, &roots[now]);
    while (found) {
        const root_tokens *at = &roots[now];
        now = 1 - now;
        found = find_selected(&w, at->root + 1, read, &roots[now]);
        w.root = part->root_base + at->root;
        for (w.bit = 0; w.bit < head->root_leaves[w.root]; w.bit++) {
            if (!at->all[w.bit]) continue;
            w.leaf = &lookup_leaves(head, w.root)[w.bit];
            if (!walk_leaf(job, &w, at->all[w.bit], token, index, values, fn)) return;
            token += w.n;
        }
    }
}

static void attend_leaf(attend_job *job, leaf_work *w, uint32_t block, size_t index) {
    partial own = partial_of(job, index);
    add_block(w->lookup, &own, block, w->logits, w->v, w->n, w->allowed);
}

/* --- the tail -------------------------------------------------------------------------- */

/* Adds n means with these estimated logits. Values whose weights together are below TAIL_SKIP of
 * the sum so far are left out: they are most, and there are too few tiles for it to show. */
static void add_tail(const loci_lookup *lookup, const partial *own, uint32_t block, float *logits,
                     const float *means, uint32_t n) {
    float weight[LOCI_LANES] = {0};
    loci_lane_softmax *state = &own->state[block], before = *state;
    lookup->kernels->softmax_lanes(logits, n, state);
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t l = 0; l < LOCI_LANES; l++) weight[l] += logits[t * LOCI_LANES + l];
    for (uint32_t l = 0; l < LOCI_LANES && block * LOCI_LANES + l < lookup->vectors; l++) {
        if (before.max[l] == state->max[l] && weight[l] <= TAIL_SKIP * state->sum[l]) continue;
        float *o = own->o + (size_t)(block * LOCI_LANES + l) * lookup->dim;
        lookup->kernels->add_values(o, state->keep[l], logits + l, means, n, lookup->dim);
    }
}

static bool widen_means(lookup_part *part, const loci_lookup *lookup, uint32_t first,
                        uint32_t count, uint64_t hash, float *out) {
    const uint16_t *means = loci_pair_value_mean(part->blob, first);
    lookup->kernels->widen(out, means, (size_t)count * lookup->dim);
    part->stats.tail_bytes += (size_t)count * 2 * lookup->dim;
    return !hash || loci_hash_bytes(means, (size_t)count * 2 * lookup->dim) == hash;
}

/* log(live tokens) + q.c: below the true mass (Jensen), where the selection's estimate, which has
 * the variance in it, is at times far above and would drown what was read. */
static void low_mass_tile(const loci_lookup *lookup, const lookup_part *part,
                          const loci_node *first, uint32_t count, const uint32_t *live,
                          uint32_t block, float *out) {
    size_t index = (size_t)(part - lookup->parts);
    const float *terms = lookup->task_terms + index * lookup->blocks * LOCI_LANES;
    lookup_score_tile(lookup, part, first, count, NULL, terms, block, out, NULL);
    for (uint32_t n = 0; n < count; n++) {
        float log_live = live[n] ? logf((float)live[n]) : -INFINITY;
        for (uint32_t l = 0; l < LOCI_LANES; l++) out[n * LOCI_LANES + l] += log_live;
    }
}

/* Roots that a row does not keep. */
static void add_root_tail(attend_job *job, size_t index) {
    const loci_lookup *lookup = job->lookup;
    lookup_part *part = &job->lookup->parts[index];
    const lookup_head *head = &lookup->heads[part->kv_head];
    const loci_pair_header *header = loci_pair_header_of(part->blob);
    partial own = partial_of(job, index);
    float means[TOKENS * LOCI_HEAD_DIM_MAX], logits[TOKENS * LOCI_LANES];
    size_t bytes = (size_t)header->roots * 2 * lookup->dim;
    if (part->first == 0 &&
        loci_hash_bytes(loci_pair_value_mean(part->blob, 0), bytes) != header->hash_root_values) {
        lookup_fault(part, "value means of roots from", 0);
        return;
    }
    for (uint32_t i = part->first; i < part->end; i += TOKENS) {
        uint32_t n = part->end - i < TOKENS ? part->end - i : TOKENS;
        size_t root = part->root_base + i;
        (void)widen_means(part, lookup, i, n, 0, means);
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            low_mass_tile(lookup, part, loci_pair_root_node(part->blob, i), n,
                          head->root_live + root, b, logits);
            for (uint32_t x = 0; x < n * LOCI_LANES; x++) {
                uint32_t row = (b * LOCI_LANES + x % LOCI_LANES) / lookup->group;
                if (row >= lookup->rows ||
                    head->root_kept[(size_t)row * head->roots + root + x / LOCI_LANES])
                    logits[x] = -INFINITY;
            }
            add_tail(lookup, &own, b, logits, means, n);
        }
    }
}

/* The log of the estimated mass of a leaf's candidates that were not selected; score: of all of its
 * candidates. */
static float unselected_mass(const float *score, uint32_t candidates, uint32_t selected) {
    float max = -INFINITY, sum = 0.0f;
    const float *at = score;
    for (uint32_t left = candidates; left; left &= left - 1, at++)
        if (!(selected & left & (0u - left)) && *at > max) max = *at;
    if (max == -INFINITY) return max;
    for (uint32_t left = candidates; left; left &= left - 1, score++)
        if (!(selected & left & (0u - left))) sum += expf(*score - max);
    return max + logf(sum);
}

/* What the leaves of a root leave unread, for one entry and head; both arrays [leaf][16] from the
 * lane. mass: of whole leaves, of which those that are no candidates have their share. */
static void leaf_tail_logits(const loci_lookup *lookup, const lookup_head *head,
                             const uint32_t *live, uint32_t leaves, size_t entry, uint32_t j,
                             const float *mass, float *logits) {
    const float *score = lookup_scores(lookup, head, entry, j);
    size_t at = head->mask_at[entry];
    for (uint32_t l = 0; l < leaves; l++) {
        float whole = mass[l * LOCI_LANES];
        logits[l * LOCI_LANES] = whole;
        if (!(head->leaf_mask[entry] >> l & 1)) continue;
        uint32_t candidates = lookup_count_bits(head->candidates[at]);
        float near = unselected_mass(score, head->candidates[at], head->token_mask[at]);
        float far = whole + logf((float)(live[l] - candidates) / (float)live[l]);
        float most = fmaxf(near, far);
        logits[l * LOCI_LANES] =
            most == -INFINITY ? most : most + logf(expf(near - most) + expf(far - most));
        score += candidates;
        at++;
    }
}

static void add_leaf_tail(attend_job *job, size_t index) {
    const loci_lookup *lookup = job->lookup;
    lookup_part *part = &job->lookup->parts[index];
    const lookup_head *head = &lookup->heads[part->kv_head];
    const loci_pair_header *header = loci_pair_header_of(part->blob);
    partial own = partial_of(job, index);
    float means[LOCI_ROOT_LEAVES_MAX * LOCI_HEAD_DIM_MAX];
    float logits[LOCI_ROOT_LEAVES_MAX * LOCI_LANES], mass[LOCI_ROOT_LEAVES_MAX * LOCI_LANES];
    uint32_t live[LOCI_ROOT_LEAVES_MAX];
    for (uint32_t i = part->first; i < part->end; i++) {
        const loci_root *root = loci_pair_root(part->blob, i);
        size_t begin = head->entry_begin[part->root_base + i];
        size_t end = head->entry_begin[part->root_base + i + 1];
        if (begin == end) continue;
        if (loci_pair_check_leaf_nodes(part->blob, i, &part->error) != LOCI_OK) return;
        part->stats.tail_bytes += root->count * loci_node_stride(lookup->dim);
        if (!widen_means(part, lookup, header->roots + root->begin, root->count, root->hash_values,
                         means)) {
            lookup_fault(part, "value means of root", i);
            return;
        }
        const uint8_t *leaf_live = head->leaf_live + head->leaf_at[part->root_base + i];
        for (uint32_t l = 0; l < root->count; l++) live[l] = leaf_live[l];
        for (uint32_t b = 0; b < lookup->blocks; b++) {
            size_t first, last;
            lookup_block_entries(lookup, head, begin, end, b, &first, &last);
            if (first == last) continue;
            low_mass_tile(lookup, part, loci_pair_leaf_node(part->blob, root->begin), root->count,
                          live, b, mass);
            for (uint32_t x = 0; x < root->count * LOCI_LANES; x++) logits[x] = -INFINITY;
            for (size_t e = first; e < last; e++) {
                for (uint32_t j = 0; j < lookup->group; j++) {
                    uint32_t vector = head->entry_row[e] * lookup->group + j;
                    if (vector / LOCI_LANES == b)
                        leaf_tail_logits(lookup, head, live, root->count, e, j,
                                         mass + vector % LOCI_LANES, logits + vector % LOCI_LANES);
                }
            }
            add_tail(lookup, &own, b, logits, means, root->count);
        }
    }
}

/* --- attend ---------------------------------------------------------------------------- */

static void attend_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    attend_job *job = arg;
    loci_lookup *lookup = job->lookup;
    partial own = partial_of(job, index);
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        for (uint32_t l = 0; l < LOCI_LANES; l++) own.state[b].max[l] = -INFINITY;
        memset(own.state[b].sum, 0, sizeof own.state[b].sum);
    }
    memset(own.o, 0, (size_t)lookup->vectors * lookup->dim * sizeof *own.o);
    walk_selected(job, index, true, attend_leaf);
    if (!lookup->params.estimate_tail || lookup->mode != LOCI_MODE_HIERARCHICAL) return;
    add_root_tail(job, index);
    add_leaf_tail(job, index);
}

/* Joins the parts of one row of one KV head. */
static void join_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    attend_job *job = arg;
    const loci_lookup *lookup = job->lookup;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    uint32_t dim = lookup->dim;
    for (uint32_t j = 0; j < lookup->group; j++) {
        uint32_t vector = row * lookup->group + j, head = h * lookup->group + j;
        float *out = job->out + (size_t)row * job->out_stride + (size_t)head * dim;
        float max = -INFINITY, sum = 0.0f;
        memset(out, 0, dim * sizeof *out);
        for (size_t p = 0; p < lookup->part_count; p++) {
            if (lookup->parts[p].kv_head != h) continue;
            partial own = partial_of(job, p);
            float other = own.state[vector / LOCI_LANES].max[vector % LOCI_LANES];
            max = other > max ? other : max;
        }
        for (size_t p = 0; p < lookup->part_count && max > -INFINITY; p++) {
            if (lookup->parts[p].kv_head != h) continue;
            partial own = partial_of(job, p);
            const loci_lane_softmax *state = &own.state[vector / LOCI_LANES];
            float weight = expf(state->max[vector % LOCI_LANES] - max);
            sum += state->sum[vector % LOCI_LANES] * weight;
            lookup->kernels->axpy(out, own.o + (size_t)vector * dim, dim, weight);
        }
        for (uint32_t i = 0; i < dim && sum > 0.0f; i++) out[i] /= sum;
        job->lse[(size_t)row * lookup->q_heads + head] = sum > 0.0f ? max + logf(sum) : -INFINITY;
    }
}

/* Logits are kept for attribution where they are few. */
static bool keep_logits(loci_lookup *lookup) {
    size_t tokens = 0;
    lookup->logits = NULL;
    lookup->logit_at = lookup_alloc(lookup, lookup->part_count * sizeof *lookup->logit_at);
    if (!lookup->logit_at) return false;
    for (size_t p = 0; p < lookup->part_count; p++) {
        const lookup_part *part = &lookup->parts[p];
        const lookup_head *head = &lookup->heads[part->kv_head];
        size_t begin = head->entry_begin[part->root_base + part->first];
        size_t end = head->entry_begin[part->root_base + part->end];
        lookup->logit_at[p] = tokens;
        for (size_t i = head->mask_at[begin]; i < head->mask_at[end]; i++)
            tokens += lookup_count_bits(head->token_mask[i]); /* of several rows: or fewer */
    }
    size_t bytes = tokens * lookup->blocks * LOCI_LANES * sizeof(float);
    if (bytes > lookup->cpu->kept_bytes) return true;
    lookup->logits = lookup_alloc(lookup, bytes);
    return lookup->logits != NULL;
}

void loci_cpu_attend_sparse(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                            uint32_t out_stride, loci_ref lse) {
    if (!lookup->ready || !lookup->tokens_selected) return;
    size_t last = (size_t)(lookup->rows - 1) * out_stride + (size_t)lookup->q_heads * lookup->dim;
    attend_job job = {
        .lookup = lookup,
        .partials = lookup_alloc(lookup, lookup->part_count * sizeof *job.partials),
        .out = loci_cpu_ptr(out, last * sizeof(float)),
        .out_stride = out_stride,
        .lse = loci_cpu_ptr(lse, (size_t)lookup->rows * lookup->q_heads * sizeof(float)),
    };
    bool ok = job.partials && keep_logits(lookup);
    for (size_t i = 0; ok && i < lookup->part_count; i++) {
        partial *own = &job.partials[i];
        own->state = lookup_alloc(lookup, lookup->blocks * sizeof *own->state);
        own->o = lookup_alloc(lookup, (size_t)lookup->vectors * lookup->dim * sizeof *own->o);
        ok = own->state && own->o;
    }
    if (!ok) {
        lookup_no_memory(stream, lookup);
        return;
    }
    loci_pool_run(lookup->cpu->pool, lookup->part_count, attend_task, &job);
    if (!lookup_report(stream, lookup)) return;
    loci_pool_run(lookup->cpu->pool, (size_t)lookup->kv_heads * lookup->rows, join_task, &job);
    lookup->attended = true;
}

/* --- attribution ----------------------------------------------------------------------- */

/* By lane, the log-sum-exp that weights are relative to; INFINITY where nothing is attributed. */
static void lane_totals(const attend_job *job, uint32_t kv_head, uint32_t block, float *total) {
    const loci_lookup *lookup = job->lookup;
    for (uint32_t l = 0; l < LOCI_LANES; l++) {
        uint32_t vector = block * LOCI_LANES + l, row = vector / lookup->group;
        uint32_t head = kv_head * lookup->group + vector % lookup->group;
        total[l] = vector < lookup->vectors && row >= job->row_begin
                       ? job->total_lse[(size_t)row * lookup->q_heads + head]
                       : INFINITY;
    }
}

/* Logits [n][16] become weights. */
static void lane_weights(const loci_lookup *lookup, float *logits, uint32_t n, const float *total) {
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t l = 0; l < LOCI_LANES; l++) logits[t * LOCI_LANES + l] -= total[l];
    lookup->kernels->exp_sub(logits, logits, (size_t)n * LOCI_LANES, 0.0f);
}

static void attribute_leaf(attend_job *job, leaf_work *w, uint32_t block, size_t index) {
    (void)index;
    const loci_extent_view *extent = w->part->extent;
    float total[LOCI_LANES];
    lane_totals(job, w->part->kv_head, block, total);
    lane_weights(w->lookup, w->logits, w->n, total);
    for (uint32_t t = 0; t < w->n; t++) {
        uint32_t word = loci_slot_word(w->part->blob, w->leaf->begin + w->index[t]);
        uint32_t segment = LOCI_SLOT_SEGMENT(word);
        if (segment >= extent->segments) continue;
        job->mass[extent->segment_base + segment] +=
            (double)w->lookup->kernels->sum(w->logits + (size_t)t * LOCI_LANES, LOCI_LANES);
    }
}

/* Records name the segment; score_codes has verified them if it read them. */
static void attribute_verified(attend_job *job, leaf_work *w, uint32_t block, size_t index) {
    for (uint32_t t = 0; t < w->n && block == 0 && !w->lookup->tokens_scored; t++) {
        uint32_t slot = w->leaf->begin + w->index[t];
        if (loci_slot_check_record(w->part->blob, slot)) continue;
        lookup_fault(w->part, "record of slot", slot);
        return;
    }
    attribute_leaf(job, w, block, index);
}

/* All KV heads of one extent, in order: they add to the same segments. */
static void attribute_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    attend_job *job = arg;
    const loci_lookup *lookup = job->lookup;
    const size_t *begin = lookup->pair_begin + index * lookup->kv_heads;
    for (size_t p = begin[0]; p < begin[lookup->kv_heads]; p++)
        walk_selected(job, p, false, attribute_verified);
}

/* The flat part is always read whole; one flat segment. */
static void attribute_flat_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    attend_job *job = arg;
    const loci_lookup *lookup = job->lookup;
    const loci_corpus_view *corpus = lookup->corpus;
    const uint16_t *keys = (const void *)corpus->flat_k[lookup->layer]->data;
    uint32_t dim = lookup->dim;
    float k[TOKENS * LOCI_HEAD_DIM_MAX], logits[TOKENS * LOCI_LANES], total[LOCI_LANES];
    double sum = 0.0;
    uint32_t end = corpus->flat_segment_begin[index + 1], n;
    for (uint32_t t = corpus->flat_segment_begin[index]; t < end; t += n) {
        n = end - t < TOKENS ? end - t : TOKENS;
        for (uint32_t h = 0; h < lookup->kv_heads; h++) {
            for (uint32_t i = 0; i < n; i++)
                lookup->kernels->widen(k + (size_t)i * dim,
                                       keys + ((size_t)(t + i) * lookup->kv_heads + h) * dim, dim);
            for (uint32_t b = 0; b < lookup->blocks; b++) {
                lookup->kernels->dot_f32(logits, k, n, dim,
                                         lookup->q_lanes + lookup_lane_at(lookup, h, b));
                lane_totals(job, h, b, total);
                lane_weights(lookup, logits, n, total);
                sum += (double)lookup->kernels->sum(logits, (size_t)n * LOCI_LANES);
            }
        }
    }
    job->mass[corpus->flat_segment_base + index] += sum;
}

void loci_cpu_attribute(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                        uint32_t row_begin, loci_ref mass) {
    if (!lookup->ready || !lookup->attended) return;
    const loci_corpus_view *corpus = lookup->corpus;
    size_t segments = (size_t)corpus->flat_segment_base + corpus->flat_segments;
    float *to = loci_cpu_ptr(mass, segments * sizeof *to);
    attend_job job = {
        .lookup = lookup,
        .total_lse =
            loci_cpu_ptr(total_lse, (size_t)lookup->rows * lookup->q_heads * sizeof(float)),
        .row_begin = row_begin,
        .mass = lookup_alloc(lookup, segments * sizeof *job.mass),
    };
    if (!job.mass) {
        lookup_no_memory(stream, lookup);
        return;
    }
    memset(job.mass, 0, segments * sizeof *job.mass);
    loci_pool_run(lookup->cpu->pool, corpus->extent_count, attribute_task, &job);
    if (!lookup_report(stream, lookup)) return;
    loci_pool_run(lookup->cpu->pool, corpus->flat_segments, attribute_flat_task, &job);
    for (size_t s = 0; s < segments; s++) to[s] += (float)job.mass[s];
}
