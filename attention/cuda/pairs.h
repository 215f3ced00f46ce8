/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs (one KV head of one retrieval layer in one extent) in device memory: copied at first use,
 * kept while there is room, given up least recently used first. A pair is verified whole, every
 * hash, before it is copied; on the device it is trusted.
 *
 * This is the one place that knows the bytes of a pair blob; kernels get a loci_cuda_pair. Calls
 * may come from any thread.
 */
#ifndef LOCI_ATTENTION_CUDA_PAIRS_H
#define LOCI_ATTENTION_CUDA_PAIRS_H

#include "attention/cuda/cuda.h"
#include "attention/index.h"

typedef struct loci_cuda_pairs loci_cuda_pairs;
typedef struct loci_cuda_pair_entry loci_cuda_pair_entry;

typedef struct loci_cuda_pairs_stats {
    uint64_t hits, misses, evictions, bytes, budget;
} loci_cuda_pairs_stats;

/* The budget is LOCI_CUDA_CACHE_PERCENT of the memory that is free when the backend opens. */
#define LOCI_CUDA_CACHE_PERCENT 70u

LOCI_MUST_CHECK loci_status loci_cuda_pairs_open(loci_cuda *cuda, loci_cuda_pairs **out,
                                                 loci_error *err);
void loci_cuda_pairs_close(loci_cuda_pairs *pairs); /* NULL allowed */

/* A pair on the device, pinned until loci_cuda_pairs_unpin. What stands in *out is complete but for
 * what a look-up adds (live, root_base and the like). LOCI_E_CORRUPT names the extent and what is
 * wrong; LOCI_E_LIMIT: all room is taken by pinned pairs. */
LOCI_MUST_CHECK loci_status loci_cuda_pairs_pin(loci_cuda_pairs *pairs,
                                                const loci_extent_view *extent, uint32_t layer,
                                                uint32_t kv_heads, uint32_t kv_head,
                                                uint32_t head_dim, loci_cuda_pair_entry **entry,
                                                loci_cuda_pair *out, loci_error *err);
void loci_cuda_pairs_unpin(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry);
/* Drops what was copied from a buffer that goes away. */
void loci_cuda_pairs_forget(loci_cuda_pairs *pairs, const loci_buffer *buffer);
/* Gives up about `bytes` of unpinned pairs; false if there are none. NULL allowed. */
bool loci_cuda_pairs_shrink(loci_cuda_pairs *pairs, size_t bytes);
/* Another budget; what is over it goes as others come. */
void loci_cuda_pairs_limit(loci_cuda_pairs *pairs, uint64_t bytes);
void loci_cuda_pairs_stats_of(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out);

#endif
