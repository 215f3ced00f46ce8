/* SPDX-License-Identifier: Apache-2.0
 *
 * What kmeans.cu and sort.cu offer cluster.c: the steps of K-means over many sets of points at
 * once, each set by itself, with the CPU's bits (attention/cluster.h). Launchers enqueue on the
 * stream and return the error of the launch; all pointers are the device's.
 */
#ifndef LOCI_ATTENTION_CUDA_KMEANS_H
#define LOCI_ATTENTION_CUDA_KMEANS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOCI_CUDA_TILE 128u /* places of a tile */
#define LOCI_CUDA_PROBES 4u /* LOCI_PROBES */

/* Rows, the direction of each as int8, and the length of that. dim: a multiple of 16 up to 256. */
typedef struct loci_cuda_points {
    float *x;
    int8_t *code;
    float *length;
    uint32_t dim;
} loci_cuda_points;

/* Places [begin, begin + count), which go into groups [group, group + groups). */
typedef struct loci_cuda_set {
    uint32_t begin, count, group, groups;
} loci_cuda_set;

/* Entries [first, first + count) that are compared with lanes [lane, lane + lanes). */
typedef struct loci_cuda_tile {
    uint32_t first, count, lane, lanes;
} loci_cuda_tile;

typedef struct loci_cuda_kmeans {
    loci_cuda_points points;
    const uint32_t *ids; /* [n]: the row at each place */
    loci_cuda_set *sets; /* [set_count]: they cover places and groups in order */
    uint32_t n, groups, set_count;
    uint32_t *group;      /* [n] */
    uint64_t *best;       /* [n]: the highest product, and its lane; 0 = none */
    uint32_t *order;      /* [n]: places group by group, ascending in each */
    uint32_t *begin;      /* [groups + 1]: among order */
    float *centroid;      /* [groups][dim] */
    uint32_t *size;       /* [groups]; NULL: none is empty */
    uint32_t *top;        /* [set_count]: bits of the greatest |channel| of the centroids */
    int8_t *lanes;        /* [groups][dim]: centroids as int8 */
    int32_t *bias;        /* [groups]: what a lane's products are less where its group is empty */
    uint32_t *lane_group; /* [groups]: whose lane; NULL: its own */
    uint32_t *empty;      /* how many groups are */
} loci_cuda_kmeans;

/* Fills code and length of n rows. */
cudaError_t loci_cuda_k_directions(cudaStream_t stream, const loci_cuda_points *points, uint32_t n);
/* out[i] = i */
cudaError_t loci_cuda_k_count_up(cudaStream_t stream, uint32_t *out, uint32_t n);
/* out[i] = from[i * n / count] */
cudaError_t loci_cuda_k_take_even(cudaStream_t stream, uint32_t *out, const uint32_t *from,
                                  uint32_t n, uint32_t count);
/* out[i] = from[at[i]], and to[at[i]] = from[i]. */
cudaError_t loci_cuda_k_gather(cudaStream_t stream, uint32_t *out, const uint32_t *from,
                               const uint32_t *at, uint32_t n);
cudaError_t loci_cuda_k_scatter(cudaStream_t stream, uint32_t *to, const uint32_t *at,
                                const uint32_t *from, uint32_t n);
/* to[at[i]] = the first run whose end is above i. */
cudaError_t loci_cuda_k_owners(cudaStream_t stream, uint32_t *to, const uint32_t *at,
                               const uint32_t *ends, uint32_t runs, uint32_t n);

/* Centroids from points at even distances; sizes 1. */
cudaError_t loci_cuda_k_seeds(cudaStream_t stream, const loci_cuda_kmeans *k);
/* Raises top to the greatest |channel|, after making centroids unit vectors if asked to. */
cudaError_t loci_cuda_k_tops(cudaStream_t stream, const loci_cuda_kmeans *k, bool unit);
/* Fills lanes and bias. */
cudaError_t loci_cuda_k_lanes(cudaStream_t stream, const loci_cuda_kmeans *k);
/* Raises best by the lanes of each tile; places: those of the entries, NULL = themselves. */
cudaError_t loci_cuda_k_nearest(cudaStream_t stream, const loci_cuda_kmeans *k,
                                const loci_cuda_tile *tiles, uint32_t tile_count,
                                const uint32_t *places);
/* Groups by best, and their sizes (zero before). */
cudaError_t loci_cuda_k_settle(cudaStream_t stream, const loci_cuda_kmeans *k);
/* Raises *empty (zero before) by the number of empty groups. */
cudaError_t loci_cuda_k_count_empty(cudaStream_t stream, const loci_cuda_kmeans *k);
/* A key for each place that grows with the cosine to its centroid. */
cudaError_t loci_cuda_k_far_keys(cudaStream_t stream, const loci_cuda_kmeans *k, uint32_t *keys);
/* The set of each of n places. */
cudaError_t loci_cuda_k_set_keys(cudaStream_t stream, const loci_cuda_kmeans *k,
                                 const uint32_t *places, uint32_t *keys);
/* Gives each empty group the first place of its set that is left and not alone in its group;
 * places: set by set, farthest first. */
cudaError_t loci_cuda_k_fill(cudaStream_t stream, const loci_cuda_kmeans *k,
                             const uint32_t *places);
/* begin[g] = the first of n ascending keys that is not below g, for g <= groups. */
cudaError_t loci_cuda_k_begins(cudaStream_t stream, uint32_t *begin, const uint32_t *keys,
                               uint32_t n, uint32_t groups);
/* Centroids become the sums of their groups' rows, in their order. */
cudaError_t loci_cuda_k_sums(cudaStream_t stream, const loci_cuda_kmeans *k);
/* Centroids of `bundle` become the means of those of k: bundle's points are k's groups. */
cudaError_t loci_cuda_k_bundle_means(cudaStream_t stream, const loci_cuda_kmeans *bundle,
                                     const loci_cuda_kmeans *k);
/* The bundles with the highest products for each place, LOCI_CUDA_PROBES each: keys
 * [LOCI_CUDA_PROBES * n] the bundle, places as many. */
cudaError_t loci_cuda_k_probes(cudaStream_t stream, const loci_cuda_kmeans *bundle,
                               const loci_cuda_kmeans *k, uint32_t *keys, uint32_t *places);

/* Sorts values by the lowest `bits` bits of their keys, stable. temp NULL: *temp_bytes becomes what
 * it must be for n. */
cudaError_t loci_cuda_k_sort(cudaStream_t stream, void *temp, size_t *temp_bytes,
                             const uint32_t *keys, uint32_t *keys_out, const uint32_t *values,
                             uint32_t *values_out, uint32_t n, uint32_t bits);

#ifdef __cplusplus
}
#endif
#endif
