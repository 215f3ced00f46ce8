/* SPDX-License-Identifier: Apache-2.0
 *
 * Keys of one pair into leaves, and leaves into roots: the rule, which every backend follows to
 * the bit, and the CPU's way to carry it out.
 *
 * All keys are clustered into roots (K-means, kmeans.h) and those that are too large are halved;
 * then the keys of each root are clustered into leaves, and those that are too large are halved. A
 * leaf stays under the root that it was made for.
 *
 * The result depends on keys and rounds alone. What makes that so: products of keys and centroids
 * are integers; sums of floats run in the order of the keys, without contraction; of equal
 * products the lowest group's counts. K-means that has come to rest stays as it is, so that
 * whether rounds that change nothing are left out does not matter.
 */
#ifndef LOCI_ATTENTION_CLUSTER_H
#define LOCI_ATTENTION_CLUSTER_H

#include "attention/index.h"

#define LOCI_ROOT_TOKENS (LOCI_LEAF_TOKENS * LOCI_ROOT_LEAVES) /* mean size aimed at */
/* Half more than that: with leaves of 16 a root stays below LOCI_ROOT_LEAVES_MAX leaves. */
#define LOCI_ROOT_TOKENS_CUT (LOCI_ROOT_TOKENS * 3 / 2)
#define LOCI_ROOT_ROUNDS 10u
#define LOCI_ROOT_SAMPLE 64u /* keys a root on which the roots' centroids are trained */
#define LOCI_WHOLE_ROUNDS 2u /* over all points, after those over a sample */
#define LOCI_HALVE_ROUNDS 4u
/* Of more groups than this, a point is compared with those in the LOCI_PROBES bundles of similar
 * groups that look nearest: about 4 sqrt(groups) of them instead of all. */
#define LOCI_BUNDLE_FROM 1024u
#define LOCI_BUNDLE_ROUNDS 4u
#define LOCI_BUNDLES_MAX 256u
#define LOCI_PROBES 4u

static inline uint32_t loci_bundles(uint32_t groups) {
    uint32_t bundles = 1;
    while (groups >= LOCI_BUNDLE_FROM && bundles < LOCI_BUNDLES_MAX && bundles * bundles < groups)
        bundles *= 2;
    return bundles;
}

/* Where n points that two means have parted, `first` before the others, are cut: in the middle of
 * their order where that is too uneven (keys that coincide). */
static inline uint32_t loci_half(uint32_t first, uint32_t n) {
    bool uneven = first < n / 8 || first > n - n / 8 || first == 0 || first == n;
    return uneven ? n / 2 : first;
}

/* Leaves of a root of so many keys. */
static inline uint32_t loci_root_leaf_count(uint32_t keys) {
    return (keys + LOCI_LEAF_TOKENS - 1) / LOCI_LEAF_TOKENS;
}

/* x: [tokens][dim], less their mean, finite. rounds: of the leaves. */
typedef struct loci_keys {
    const float *x;
    uint32_t tokens, dim, rounds;
    const loci_cancel *cancel; /* NULL = none */
} loci_keys;

/* The caller's arrays, each with room for `tokens` entries. */
typedef struct loci_clusters {
    uint32_t *ids;         /* [tokens]: leaf by leaf, ascending in each */
    uint32_t *leaf_ends;   /* [leaves]: among ids */
    uint32_t *root_leaves; /* [roots]: leaves of each, which stand side by side; may be many */
    uint32_t leaves, roots;
} loci_clusters;

/* isa: names as in loci_backend_options. pool may be NULL. LOCI_E_NOMEM; LOCI_E_CANCELLED soon
 * after it is requested. */
LOCI_MUST_CHECK loci_status loci_cluster_keys(const loci_keys *keys, const char *isa,
                                              struct loci_pool *pool, loci_clusters *out,
                                              loci_error *err);

#endif
