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

/* What one vector knows of a pair: the table [parts][16], and how to read its sums. */
typedef struct sketch_table {
    float base, scale;
    uint8_t *entry;
} sketch_table;

static size_t table_bytes(const loci_lookup *lookup) {
    return (size_t)loci_sketch_parts(lookup->dim) * LOCI_SKETCH_WORDS;
}

static sketch_table *tables_of(const loci_lookup *lookup, unsigned thread) {
    return lookup->tables + (size_t)thread * lookup->vectors;
}

bool lookup_prepare_sketches(loci_stream *stream, loci_lookup *lookup) {
    size_t count = (size_t)loci_pool_threads(lookup->cpu->pool) * lookup->vectors;
    size_t bytes = table_bytes(lookup);
    lookup->tables = lookup_alloc(lookup, count * sizeof *lookup->tables);
    uint8_t *entries = lookup_alloc(lookup, count * bytes);
    if (!lookup->tables || !entries) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    for (size_t i = 0; i < count; i++)
        lookup->tables[i] = (sketch_table){.entry = entries + i * bytes};
    return true;
}

/* Entries less the least of their part, in steps of a 255th of the widest part. */
static void make_table(sketch_table *table, const float *q, const float *book, uint32_t parts) {
    float value[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS * LOCI_SKETCH_WORDS];
    float low[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS], widest = 0.0f;
    table->base = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        float *v = value + p * LOCI_SKETCH_WORDS, high;
        memset(v, 0, LOCI_SKETCH_WORDS * sizeof *v);
        for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++, book += LOCI_SKETCH_WORDS)
            for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++)
                v[w] += q[p * LOCI_SKETCH_CHANNELS + c] * book[w];
        low[p] = high = v[0];
        for (uint32_t w = 1; w < LOCI_SKETCH_WORDS; w++) {
            low[p] = v[w] < low[p] ? v[w] : low[p];
            high = v[w] > high ? v[w] : high;
        }
        widest = high - low[p] > widest ? high - low[p] : widest;
        table->base += low[p];
    }
    bool usable = widest > 1e-30f && widest < 1e30f; /* else all alike, or a hostile codebook */
    float inverse = usable ? 255.0f / widest : 0.0f;
    table->scale = usable ? widest / 255.0f : 0.0f;
    for (uint32_t p = 0; p < parts; p++)
        for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
            size_t i = (size_t)p * LOCI_SKETCH_WORDS + w;
            table->entry[i] = usable ? (uint8_t)((value[i] - low[p]) * inverse + 0.5f) : 0;
        }
}

void lookup_make_tables(const loci_lookup *lookup, const lookup_pair *pair, unsigned thread) {
    const float *book = loci_pair_codebook(pair->blob);
    const float *q = lookup->q + (size_t)pair->kv_head * lookup->vectors * lookup->dim;
    for (uint32_t v = 0; v < lookup->vectors; v++)
        make_table(tables_of(lookup, thread) + v, q + (size_t)v * lookup->dim, book,
                   loci_sketch_parts(lookup->dim));
}

/* One run of vectors of one entry: the highest estimate among each leaf's live tokens. */
static void score_run(const loci_lookup *lookup, const lookup_pair *pair, const loci_root *root,
                      const uint8_t *live, const sketch_table *table, uint32_t count,
                      const float *centroid, float *out) {
    uint16_t sum[LOCI_SKETCH_VECTORS * LOCI_ROOT_TOKENS_MAX + LOCI_LEAF_TOKENS_MAX];
    const uint8_t *entries[LOCI_SKETCH_VECTORS];
    const loci_leaf *leaves = loci_root_leaves(pair->blob, root);
    for (uint32_t v = 0; v < count; v++) entries[v] = table[v].entry;
    lookup->kernels->sketch_sums(sum, loci_root_sketches(pair->blob, root),
                                 loci_sketch_groups(root->tokens), loci_sketch_parts(lookup->dim),
                                 entries, count);
    for (uint32_t l = 0; l < root->count; l++) {
        uint32_t mask = lookup_live_bits(pair->live, leaves[l].begin, leaves[l].count);
        const uint16_t *of_leaf = sum + (leaves[l].begin - leaves[0].begin);
        for (uint32_t v = 0; v < count; v++, of_leaf += LOCI_ROOT_TOKENS_MAX) {
            float top = (float)lookup->kernels->masked_top(of_leaf, mask);
            out[v * root->count + l] =
                live[l] ? centroid[v] + table[v].base + table[v].scale * top : -INFINITY;
        }
    }
}

void lookup_score_sketches(const loci_lookup *lookup, const lookup_pair *pair, uint32_t root_index,
                           unsigned thread) {
    lookup_head *head = &lookup->heads[pair->kv_head];
    const loci_root *root = loci_pair_root(pair->blob, root_index);
    const float *mean_terms =
        lookup->task_terms + (size_t)(pair - lookup->pairs) * lookup->blocks * LOCI_LANES;
    uint32_t r = pair->root_base + root_index;
    const uint8_t *live = head->leaf_live + head->leaf_at[r];
    float centroid[LOCI_LANES];
    for (uint32_t b = 0; b < lookup->blocks; b++) {
        size_t first, last;
        lookup_block_entries(lookup, head, head->entry_begin[r], head->entry_begin[r + 1], b,
                             &first, &last);
        if (first == last) continue;
        lookup_score_tile(lookup, pair, loci_pair_root_node(pair->blob, root_index), 1, NULL,
                          mean_terms, b, centroid);
        for (size_t e = first; e < last; e++) {
            uint32_t from = head->entry_row[e] * lookup->group, end = from + lookup->group;
            uint32_t low = b * LOCI_LANES, high = low + LOCI_LANES;
            float *out = head->leaf_score + head->score_at[e];
            for (uint32_t v = from < low ? low : from, n; v < end && v < high; v += n) {
                n = (end < high ? end : high) - v;
                n = n < LOCI_SKETCH_VECTORS ? n : LOCI_SKETCH_VECTORS;
                score_run(lookup, pair, root, live, tables_of(lookup, thread) + v, n,
                          centroid + (v - low), out + (size_t)(v - from) * root->count);
            }
        }
    }
}
