/* SPDX-License-Identifier: Apache-2.0
 *
 * Clustering the keys of one pair on the CPU; see cluster.h.
 *
 * (Rounds of every key against every leaf would tighten the leaves, by an eighth of their variance,
 * but loosen the roots, of which a third more must then be read.)
 */
#include "attention/cluster.h"

#include <stdlib.h>
#include <string.h>

#include "attention/kmeans.h"
#include "base/pool.h"

#define QUANTISE_CHUNK 4096u

typedef struct root_run {
    uint32_t begin, count; /* ids */
    uint32_t leaf_base;    /* of its leaves before large ones are cut */
    loci_status status;
} root_run;

typedef struct clustering {
    const loci_keys *keys;
    loci_pool *pool;
    loci_clusters *out;
    loci_points points;
    uint8_t *code;     /* [tokens][dim] */
    float *length;     /* [tokens] */
    uint32_t *group;   /* [tokens]: root, then leaf of each of ids */
    uint32_t *scratch; /* [2 tokens + 2] */
    root_run *roots;
} clustering;

static loci_status no_memory(const clustering *c, loci_error *err) {
    return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", c->keys->tokens);
}

static loci_status alloc_all(clustering *c, loci_error *err) {
    size_t n = c->keys->tokens;
    c->code = malloc(n * c->keys->dim);
    c->length = malloc(n * sizeof *c->length);
    c->group = malloc(n * sizeof *c->group);
    c->scratch = malloc((2 * n + 2) * sizeof *c->scratch);
    if (c->code && c->length && c->group && c->scratch) return LOCI_OK;
    return no_memory(c, err);
}

static void quantise_chunk(void *arg, size_t index, unsigned thread) {
    (void)thread;
    clustering *c = arg;
    size_t begin = index * QUANTISE_CHUNK, left = c->keys->tokens - begin, dim = c->keys->dim;
    loci_points_quantise(c->keys->x + begin * dim,
                         (uint32_t)(left < QUANTISE_CHUNK ? left : QUANTISE_CHUNK), c->keys->dim,
                         c->code + begin * dim, c->length + begin);
}

/* Clusters all keys into roots. */
static loci_status make_roots(clustering *c, loci_error *err) {
    uint32_t n = c->keys->tokens, k = (n + LOCI_ROOT_TOKENS - 1) / LOCI_ROOT_TOKENS;
    uint32_t *ids = c->out->ids, *begin = c->scratch + n;
    uint32_t *ends = c->group; /* when group is done with */
    for (uint32_t i = 0; i < n; i++) ids[i] = i;
    LOCI_TRY(loci_kmeans(&c->points, ids, n, k, LOCI_ROOT_ROUNDS, k * LOCI_ROOT_SAMPLE, c->pool,
                         c->group, err));
    loci_group(ids, c->group, n, k, begin, c->scratch);
    for (uint32_t r = 0; r < k; r++)
        LOCI_TRY(loci_kmeans_cut(&c->points, ids + begin[r], begin[r + 1] - begin[r],
                                 LOCI_ROOT_TOKENS_CUT, ends, &c->out->roots, err));
    c->roots = malloc(c->out->roots * sizeof *c->roots);
    if (!c->roots) return no_memory(c, err);
    for (uint32_t r = 0, base = 0; r < c->out->roots; r++) {
        uint32_t from = r ? ends[r - 1] : 0;
        c->roots[r] = (root_run){from, ends[r] - from, base, LOCI_OK};
        base += loci_root_leaf_count(ends[r] - from);
    }
    return LOCI_OK;
}

/* Clusters the keys of one root into leaves, numbered through all roots. */
static void first_leaves(void *arg, size_t index, unsigned thread) {
    (void)thread;
    clustering *c = arg;
    root_run *root = &c->roots[index];
    uint32_t *group = c->group + root->begin;
    root->status =
        loci_kmeans(&c->points, c->out->ids + root->begin, root->count,
                    loci_root_leaf_count(root->count), c->keys->rounds, 0, NULL, group, NULL);
    for (uint32_t i = 0; i < root->count; i++) group[i] += root->leaf_base;
}

/* Sorts the keys by leaf and cuts leaves that are too large. */
static loci_status final_leaves(clustering *c, loci_error *err) {
    const root_run *last = &c->roots[c->out->roots - 1];
    uint32_t leaves = last->leaf_base + loci_root_leaf_count(last->count);
    uint32_t *begin = malloc((leaves + 1) * sizeof *begin), *ids = c->out->ids;
    if (!begin) return no_memory(c, err);
    loci_status status = LOCI_OK;
    loci_group(ids, c->group, c->keys->tokens, leaves, begin, c->scratch);
    for (uint32_t r = 0; r < c->out->roots; r++) {
        uint32_t first = c->out->leaves, leaf = c->roots[r].leaf_base;
        uint32_t end = leaf + loci_root_leaf_count(c->roots[r].count);
        for (; leaf < end; leaf++)
            LOCI_TRY_GOTO(loci_kmeans_cut(&c->points, ids + begin[leaf],
                                          begin[leaf + 1] - begin[leaf], LOCI_LEAF_TOKENS_MAX,
                                          c->out->leaf_ends, &c->out->leaves, err),
                          out);
        c->out->root_leaves[r] = c->out->leaves - first;
    }
out:
    free(begin);
    return status;
}

static int compare_ids(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static loci_status cluster(clustering *c, loci_error *err) {
    LOCI_TRY(make_roots(c, err));
    loci_pool_run(c->pool, c->out->roots, first_leaves, c);
    for (uint32_t r = 0; r < c->out->roots; r++)
        if (c->roots[r].status == LOCI_E_NOMEM)
            return no_memory(c, err);
        else if (c->roots[r].status != LOCI_OK)
            return loci_fail(err, c->roots[r].status, "indexing %u tokens was stopped",
                             c->keys->tokens);
    LOCI_TRY(final_leaves(c, err));
    for (uint32_t l = 0; l < c->out->leaves; l++) {
        uint32_t from = l ? c->out->leaf_ends[l - 1] : 0;
        qsort(c->out->ids + from, c->out->leaf_ends[l] - from, sizeof *c->out->ids, compare_ids);
    }
    return LOCI_OK;
}

loci_status loci_cluster_keys(const loci_keys *keys, const char *isa, loci_pool *pool,
                              loci_clusters *out, loci_error *err) {
    clustering c = {.keys = keys, .pool = pool, .out = out};
    loci_cpu_isa found;
    loci_status status;
    out->leaves = out->roots = 0;
    LOCI_TRY(loci_cpu_isa_detect(isa, &found, err));
    LOCI_TRY_GOTO(alloc_all(&c, err), out);
    loci_pool_run(pool, (keys->tokens + QUANTISE_CHUNK - 1) / QUANTISE_CHUNK, quantise_chunk, &c);
    c.points = (loci_points){
        keys->x, c.code, c.length, keys->dim, loci_corpus_kernels_of(found), keys->cancel};
    status = cluster(&c, err);
out:
    free(c.code);
    free(c.length);
    free(c.group);
    free(c.scratch);
    free(c.roots);
    return status;
}
