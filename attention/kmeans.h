/* SPDX-License-Identifier: Apache-2.0
 *
 * Deterministic spherical K-means over the keys of one pair.
 *
 * Points are assigned by inner product to unit centroids, in 8-bit integers; a centroid is the
 * mean of its members as they are (their lengths count). Sums run in the order of `ids`, so that
 * the result depends on the arguments alone: not on threads, nor on the instruction set.
 */
#ifndef LOCI_ATTENTION_KMEANS_H
#define LOCI_ATTENTION_KMEANS_H

#include "attention/cluster.h"
#include "attention/cpu/corpus_kernels.h"
#include "attention/index_layout.h"

/* Points, borrowed. code: each point's direction as int8, plus 128; length: of the int8 vector. */
typedef struct loci_points {
    const float *x;
    const uint8_t *code;
    const float *length;
    uint32_t dim;
    const loci_corpus_kernels *kernels;
    const loci_cancel *cancel; /* looked at in each round; NULL = none */
} loci_points;

/* Fills code [count][dim] and length [count] from x. */
void loci_points_quantise(const float *x, uint32_t count, uint32_t dim, uint8_t *code,
                          float *length);

/* Puts each of the points ids[0 .. n) in one of k groups (0 < k <= n): group[i] is that of ids[i].
 * Groups may be empty only where points coincide. At most `rounds` rounds, from points taken at
 * even distances; where `sample` is not 0 and less than n, these rounds see only so many points,
 * at even distances, and two over all of them follow. pool may be NULL. LOCI_E_NOMEM,
 * LOCI_E_CANCELLED. */
LOCI_MUST_CHECK loci_status loci_kmeans(const loci_points *points, const uint32_t *ids, uint32_t n,
                                        uint32_t k, uint32_t rounds, uint32_t sample,
                                        struct loci_pool *pool, uint32_t *group, loci_error *err);

/* Reorders ids[0 .. n) so that the groups stand one after another, each in its former order, and
 * writes their beginnings, k + 1 entries. scratch: n entries. */
void loci_group(uint32_t *ids, const uint32_t *group, uint32_t n, uint32_t k, uint32_t *begin,
                uint32_t *scratch);

/* Cuts ids[0 .. n) into runs of at most `cap`, by halving along the line between two centroids
 * while a run is too long; each cut leaves at least an eighth on either side. Appends the end of
 * each run to ends[*count], counted on from the end before it (or from 0). At most n runs. */
LOCI_MUST_CHECK loci_status loci_kmeans_cut(const loci_points *points, uint32_t *ids, uint32_t n,
                                            uint32_t cap, uint32_t *ends, uint32_t *count,
                                            loci_error *err);

#endif
