/* SPDX-License-Identifier: Apache-2.0
 *
 * A cache of single tokens' K and V rows in device memory, above pairs whose K and V stand in
 * page-locked memory of the host (pairs.h). It is by token and not by leaf: a look-up takes a few
 * tokens of a leaf, and what it did not ask for would have to come over the bus, too.
 *
 * All its state is on the device, so that a step needs no host: a pair's frame_of says which frame
 * has a slot's rows; attention reads a frame where there is one, the host's memory where there is
 * none, and then keeps what it read in a frame from a ring of free ones, while heads whose rows are
 * there go on. A frame that is given out stays for the step. When attention has run,
 * loci_cuda_k_rows_sweep refills the ring by CLOCK: the hand passes frames read since it last came
 * by and takes the others. So what the last tokens selected is what the next finds there. Values
 * are the same wherever they are read, and so are results.
 *
 * Threads and streams: whatever reads or writes frames, tables (frame_of) or state is enqueued
 * between enter and leave, which hold the cache's lock for that long and chain such work of all
 * streams by an event; it runs one after another on the device, in the order of enter. Between
 * enter and leave nothing may allocate device memory (the cache may be what gives way). A table is
 * freed after loci_cuda_rows_forget, when no work that could write it is left to be enqueued: its
 * pair is not pinned.
 */
#ifndef LOCI_ATTENTION_CUDA_ROWS_H
#define LOCI_ATTENTION_CUDA_ROWS_H

#include <pthread.h>

#include "attention/cuda/kernels.h"
#include "base/status.h"

struct loci_cuda;

typedef struct loci_cuda_rows {
    pthread_mutex_t lock;
    cudaStream_t copies;
    cudaEvent_t last; /* what was enqueued before the last leave */
    loci_cuda_row_cache cache;
    uint8_t *memory; /* NULL: there is no cache */
    size_t bytes;
    loci_cuda_row_state before; /* figures of caches that are gone */
} loci_cuda_rows;

/* copies: a stream for the cache's own work, outlives it. */
LOCI_MUST_CHECK loci_status loci_cuda_rows_init(loci_cuda_rows *rows, cudaStream_t copies,
                                                loci_error *err);
void loci_cuda_rows_fini(loci_cuda_rows *rows); /* zeroed or initialised; frees the memory */
/* Least memory that is worth a cache. */
size_t loci_cuda_rows_least(uint32_t dim);
/* Lays a cache out in device memory, which becomes its own. There is none so far. */
LOCI_MUST_CHECK loci_status loci_cuda_rows_use(loci_cuda_rows *rows, uint8_t *memory, size_t bytes,
                                               uint32_t dim, loci_error *err);
/* Frees the cache; work under way is waited for. Tables must be cleared before another is used. */
void loci_cuda_rows_drop(loci_cuda_rows *rows, struct loci_cuda *cuda);
/* Nothing of the cache points to this table any more when it returns. */
void loci_cuda_rows_forget(loci_cuda_rows *rows, const uint32_t *table, uint32_t tokens);
/* *out has no frames where there is no cache; leave follows in any case. used: frames may have been
 * read or filled, and the ring is to be refilled. */
LOCI_MUST_CHECK cudaError_t loci_cuda_rows_enter(loci_cuda_rows *rows, cudaStream_t stream,
                                                 loci_cuda_row_cache *out);
LOCI_MUST_CHECK cudaError_t loci_cuda_rows_leave(loci_cuda_rows *rows, cudaStream_t stream,
                                                 bool used);
/* Waits for what was enqueued before. Row reads by decoding steps, and rows by the others' sets. */
void loci_cuda_rows_figures(loci_cuda_rows *rows, loci_cuda_row_state *out);

#endif
