/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs (one KV head of one retrieval layer in one extent) in the memory of the device and, below
 * it, of the host. A pair has two parts, verified whole, every hash, before they are copied at
 * first use (pair_blob.h): the index, which is on the device when a look-up begins, and K and V, on
 * the device where there is room, else in page-locked memory of the host that kernels read over the
 * bus, with a cache of single rows on the device (rows.h). Results have the same bits either way.
 *
 * Three budgets, known when the backend opens: LOCI_CUDA_CACHE_PERCENT of the device's free memory
 * for all that is there, of which LOCI_CUDA_ROWS_PERCENT for cached rows as soon as anything stands
 * below, and LOCI_CUDA_HOST_PERCENT of the host's memory (of the container's, where that is less).
 * Each part lives by itself, what was least recently used goes first, and what a look-up has pinned
 * neither goes nor moves. Pins are held while work that reads a pair is enqueued, not until it has
 * run: before a part goes or moves the device is waited for. K and V that come take the device's
 * free room, then the place of older ones, which go down; on the host older ones give way to
 * younger, and are read again from their extent when they are needed. For an index K and V go down,
 * then an index that has been idle for long, cached rows, any other index.
 *
 * Calls may come from any thread.
 */
#ifndef LOCI_ATTENTION_CUDA_PAIRS_H
#define LOCI_ATTENTION_CUDA_PAIRS_H

#include "attention/cuda/cuda.h"
#include "attention/index.h"

typedef struct loci_cuda_pairs loci_cuda_pairs;
typedef struct loci_cuda_pair_entry loci_cuda_pair_entry;
struct loci_cuda_rows;

typedef struct loci_cuda_pairs_stats {
    uint64_t hits, misses;            /* of pins: whether a part had to be copied */
    uint64_t evictions;               /* of parts */
    uint64_t lowered;                 /* K and V that went down */
    uint64_t bytes, budget;           /* on the device, cached rows included */
    uint64_t kv_bytes;                /* of them K and V of pairs */
    uint64_t host_bytes, host_budget; /* below */
    uint64_t frames, row_hits, row_misses, row_evictions; /* of the cache of rows */
} loci_cuda_pairs_stats;

#define LOCI_CUDA_CACHE_PERCENT 70u
#define LOCI_CUDA_ROWS_PERCENT 25u
#define LOCI_CUDA_HOST_PERCENT 25u

LOCI_MUST_CHECK loci_status loci_cuda_pairs_open(loci_cuda *cuda, loci_cuda_pairs **out,
                                                 loci_error *err);
void loci_cuda_pairs_close(loci_cuda_pairs *pairs); /* NULL allowed */

/* A pair, pinned until loci_cuda_pairs_unpin. What stands in *out is complete but for what a
 * look-up adds (live, root_base and the like). below: K and V that are not there yet leave the
 * device's room to indexes. LOCI_E_CORRUPT names the extent and what is wrong; LOCI_E_LIMIT: all
 * room is taken by what is pinned; without `below`, K and V may be that, which
 * loci_cuda_pairs_lower moves once the caller has unpinned them. */
LOCI_MUST_CHECK loci_status loci_cuda_pairs_pin(loci_cuda_pairs *pairs,
                                                const loci_extent_view *extent, uint32_t layer,
                                                uint32_t kv_heads, uint32_t kv_head,
                                                uint32_t head_dim, bool below,
                                                loci_cuda_pair_entry **entry, loci_cuda_pair *out,
                                                loci_error *err);
void loci_cuda_pairs_unpin(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry);
/* All K and V that are not pinned go down from the device. */
void loci_cuda_pairs_lower(loci_cuda_pairs *pairs);
/* Of K and V of a token and head on the device, by what the first extent's header says; all extents
 * of a corpus are alike. */
uint64_t loci_cuda_row_bytes(const loci_corpus_view *corpus);
/* Whether a corpus fits the device and, of one layer, no K and V stand below. */
bool loci_cuda_pairs_above(loci_cuda_pairs *pairs, const loci_corpus_view *corpus, uint32_t layer);
/* Drops what was copied from a buffer that goes away. */
void loci_cuda_pairs_forget(loci_cuda_pairs *pairs, const loci_buffer *buffer);
/* Gives up about `bytes` of the device's memory; false if nothing can go. NULL allowed. */
bool loci_cuda_pairs_shrink(loci_cuda_pairs *pairs, size_t bytes);
/* Other budgets of device and host; what is over them goes as others come. */
void loci_cuda_pairs_limit(loci_cuda_pairs *pairs, uint64_t bytes, uint64_t host_bytes);
/* What look-ups enter to read pairs with frame_of. */
struct loci_cuda_rows *loci_cuda_pairs_rows(loci_cuda_pairs *pairs);
void loci_cuda_pairs_stats_of(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out);
/* The same, but while pairs are loaded those told last. */
void loci_cuda_pairs_last_stats(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out);

#endif
