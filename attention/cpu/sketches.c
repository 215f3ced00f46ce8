/* SPDX-License-Identifier: Apache-2.0
 *
 * The leaves of kept roots, each estimated by the highest of its tokens, from their sketches.
 *
 * key = mean + root centroid + a codeword in each part, so q.key is what the query gives with mean
 * and centroid plus one entry of a table for each part (q times each codeword); the table is
 * rounded to 8 bits so that shuffles look it up (Andre, Kermarrec, Le Scouarnec: Cache locality is
 * not enough, 2015).
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

static size_t table_bytes(const loci_lookup *lookup) {
    return (size_t)loci_sketch_parts(lookup->dim) * LOCI_SKETCH_WORDS;
}

static loci_sketch_table *tables_of(const loci_lookup *lookup, const lookup_part *part) {
    return lookup->tables + (size_t)(part - lookup->parts) * lookup->vectors;
}

bool lookup_prepare_sketches(loci_stream *stream, loci_lookup *lookup) {
    size_t count = lookup->part_count * lookup->vectors;
    size_t bytes = table_bytes(lookup);
    lookup->tables = lookup_alloc(lookup, count * sizeof *lookup->tables);
    uint8_t *entries = lookup_alloc(lookup, count * bytes);
    if (!lookup->tables || !entries) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    for (size_t i = 0; i < count; i++)
        lookup->tables[i] = (loci_sketch_table){.entry = entries + i * bytes};
    return true;
}

void lookup_make_tables(const loci_lookup *lookup, const lookup_part *part) {
    const float *book = loci_pair_codebook(part->blob);
    const float *q = lookup->q + (size_t)part->kv_head * lookup->vectors * lookup->dim;
    for (uint32_t v = 0; v < lookup->vectors; v++)
        lookup->kernels->sketch_table(tables_of(lookup, part) + v, q + (size_t)v * lookup->dim,
                                      book, loci_sketch_parts(lookup->dim));
}

/* Vectors of one row under one root. */
typedef struct sketch_run {
    const lookup_part *part;
    const loci_root *root;
    const loci_leaf *leaves;
    const loci_sketch_table *table;
    uint32_t count; /* of vectors, at most LOCI_SKETCH_VECTORS */
    float *centre;  /* [count] q.(mean + root) */
    uint16_t *sum;  /* [count][stride] */
    size_t stride;
    bool kept; /* the sums are those that were computed when the leaves were scored */
} sketch_run;

/* The sums of groups [first, end) of the root. */
static void sum_groups(const loci_lookup *lookup, sketch_run *run, uint32_t first, uint32_t end) {
    const uint8_t *entries[LOCI_SKETCH_VECTORS];
    uint32_t parts = loci_sketch_parts(lookup->dim);
    for (uint32_t v = 0; v < run->count; v++) entries[v] = run->table[v].entry;
    lookup->kernels->sketch_sums(run->sum + first * LOCI_SKETCH_GROUP, run->stride,
                                 loci_root_sketches(run->part->blob, run->root) +
                                     (size_t)first * parts * LOCI_SKETCH_WORDS,
                                 end - first, parts, entries, run->count);
}

/* What a token with this sum is estimated at. */
static float estimate_of(const sketch_run *run, uint32_t v, uint32_t sum) {
    return run->centre[v] + run->table[v].base + run->table[v].scale * (float)sum;
}

/* The highest estimate among each leaf's live tokens: out [count][leaves]. */
static void top_leaves(const loci_lookup *lookup, const sketch_run *run, const uint8_t *live,
                       float *out) {
    const loci_leaf *leaves = run->leaves;
    for (uint32_t l = 0; l < run->root->count; l++) {
        uint32_t mask = lookup_live_bits(run->part->live, leaves[l].begin, leaves[l].count);
        uint16_t top[LOCI_SKETCH_VECTORS];
        lookup->kernels->masked_tops(top, run->sum + (leaves[l].begin - leaves[0].begin),
                                     run->stride, run->count, mask);
        for (uint32_t v = 0; v < run->count; v++)
            out[v * run->root->count + l] = live[l] ? estimate_of(run, v, top[v]) : -INFINITY;
    }
}

/* The least sum whose estimate reaches the floor; SKETCH_SUM_MAX + 1 if none does. */
#define SKETCH_SUM_MAX (LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS * 255u)
static uint16_t least_sum(const sketch_run *run, uint32_t v, float floor) {
    float steps = (floor - run->centre[v] - run->table[v].base) / run->table[v].scale;
    uint32_t sum = !(steps > 0.0f)          ? 0
                   : steps < SKETCH_SUM_MAX ? (uint32_t)steps
                                            : SKETCH_SUM_MAX + 1;
    while (sum > 0 && estimate_of(run, v, sum - 1) >= floor) sum--;
    while (sum <= SKETCH_SUM_MAX && !(estimate_of(run, v, sum) >= floor)) sum++;
    return (uint16_t)sum;
}

/* Adds to the candidates of an entry the tokens that reach their vector's floor. Sums that were not
 * kept are made again, of groups with tokens of kept leaves. */
static void mark_run(const loci_lookup *lookup, sketch_run *run, const float *floor, uint64_t kept,
                     uint32_t *candidates) {
    const loci_leaf *leaves = run->leaves;
    uint16_t least[LOCI_SKETCH_VECTORS];
    uint32_t summed = 0;
    for (uint32_t v = 0; v < run->count; v++) least[v] = least_sum(run, v, floor[v]);
    for (; kept; kept &= kept - 1, candidates++) {
        const loci_leaf *leaf = &leaves[__builtin_ctzll(kept)];
        uint32_t begin = leaf->begin - leaves[0].begin;
        uint32_t first = begin / LOCI_SKETCH_GROUP;
        uint32_t end = (begin + leaf->count - 1) / LOCI_SKETCH_GROUP + 1;
        first = first > summed ? first : summed;
        if (first < end && !run->kept) sum_groups(lookup, run, first, end);
        summed = end;
        uint32_t mask = lookup->kernels->reaching(run->sum + begin, run->stride, least, run->count);
        *candidates |= mask & lookup_live_bits(run->part->live, leaf->begin, leaf->count);
    }
}

/* The query on a root's centre, for each head of an entry: computed when leaves are scored, found
 * when candidates are marked. */
static float *centre_of(const loci_lookup *lookup, const lookup_head *head, size_t entry) {
    return head->centre + entry * lookup->group;
}

/* Scores the leaves of a root for the entries that keep it, or marks their candidates. */
static void walk_entries(const loci_lookup *lookup, const lookup_part *part, uint32_t root_index,
                         bool mark) {
    lookup_head *head = &lookup->heads[part->kv_head];
    uint16_t sums[LOCI_SKETCH_VECTORS * LOCI_ROOT_TOKENS_MAX + LOCI_LEAF_TOKENS_MAX];
    sketch_run run;
    run.part = part;
    run.sum = sums;
    run.stride = LOCI_ROOT_TOKENS_MAX;
    run.kept = head->sum && mark;
    run.root = loci_pair_root(part->blob, root_index);
    const float *mean_terms =
        lookup->task_terms + (size_t)(part - lookup->parts) * lookup->blocks * LOCI_LANES;
    uint32_t r = part->root_base + root_index;
    run.leaves = lookup_leaves(head, r);
    const uint8_t *live = head->leaf_live + head->leaf_at[r];
    if (head->sum) run.stride = (size_t)head->root_groups[r] * LOCI_SKETCH_GROUP;
    float centre[LOCI_LANES];
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        size_t first, last;
        lookup_block_entries(lookup, head, head->entry_begin[r], head->entry_begin[r + 1], b,
                             &first, &last);
        if (first == last) continue;
        if (!mark)
            lookup_score_tile(lookup, part, loci_pair_root_node(part->blob, root_index), 1, NULL,
                              mean_terms, b, centre, NULL);
        for (size_t e = first; e < last; e++) {
            if (mark && !head->leaf_mask[e]) continue;
            uint32_t from = head->entry_row[e] * lookup->group, end = from + lookup->group;
            uint32_t low = b * LOCI_LANES, high = low + LOCI_LANES;
            for (uint32_t v = from < low ? low : from; v < end && v < high; v += run.count) {
                uint32_t left = (end < high ? end : high) - v;
                run.count = left < LOCI_SKETCH_VECTORS ? left : LOCI_SKETCH_VECTORS;
                run.table = tables_of(lookup, part) + v;
                run.centre = centre_of(lookup, head, e) + (v - from);
                if (head->sum) run.sum = head->sum + head->sum_at[e] + (v - from) * run.stride;
                if (mark) {
                    mark_run(lookup, &run, head->floor + v, head->leaf_mask[e],
                             head->candidates + head->mask_at[e]);
                    continue;
                }
                memcpy(run.centre, centre + (v - low), run.count * sizeof *centre);
                sum_groups(lookup, &run, 0, loci_sketch_groups(run.root->tokens));
                top_leaves(lookup, &run, live,
                           head->leaf_score + head->score_at[e] +
                               (size_t)(v - from) * run.root->count);
            }
        }
    }
}

void lookup_score_sketches(const loci_lookup *lookup, const lookup_part *part, uint32_t root) {
    walk_entries(lookup, part, root, false);
}

void lookup_candidate_task(void *arg, size_t index, unsigned thread) {
    const loci_lookup *lookup = arg;
    const lookup_part *part = &lookup->parts[index];
    (void)thread;
    for (uint32_t i = part->first; i < part->end; i++) walk_entries(lookup, part, i, true);
}
