/* SPDX-License-Identifier: Apache-2.0
 *
 * Pair blobs as the device has them, in two parts: the index (everything that look-ups search, and
 * what they would have to add up from roots and leaves) and K and V, rows of bf16 or int8 that
 * begin at multiples of 16 bytes. This is the one place that knows the bytes of a blob; kernels get
 * a loci_cuda_pair. A part is verified before it is copied; copied, it is trusted.
 */
#ifndef LOCI_ATTENTION_CUDA_PAIR_BLOB_H
#define LOCI_ATTENTION_CUDA_PAIR_BLOB_H

#include "attention/cuda/cuda.h"

/* Two pieces of page-locked memory through which bytes go to the device. One thread at a time. */
typedef struct loci_cuda_staging {
    cudaStream_t stream;
    uint8_t *memory[2];
    cudaEvent_t copied[2]; /* the memory is free again */
} loci_cuda_staging;

LOCI_MUST_CHECK loci_status loci_cuda_staging_open(loci_cuda_staging *staging, cudaStream_t stream,
                                                   loci_error *err);
void loci_cuda_staging_close(loci_cuda_staging *staging); /* zeroed or opened, or what that left */

/* What both parts need: shape, ranges of roots and leaves. First of all. */
LOCI_MUST_CHECK loci_status loci_cuda_blob_open(const uint8_t *blob, uint64_t bytes, uint64_t hash,
                                                loci_error *err);
/* The rest of a part: every hash. */
LOCI_MUST_CHECK loci_status loci_cuda_blob_check_index(loci_pool *pool, const uint8_t *blob,
                                                       loci_error *err);
LOCI_MUST_CHECK loci_status loci_cuda_blob_check_kv(loci_pool *pool, const uint8_t *blob,
                                                    loci_error *err);
size_t loci_cuda_blob_index_bytes(const uint8_t *blob);
size_t loci_cuda_blob_kv_bytes(const uint8_t *blob);
size_t loci_cuda_blob_row_bytes(const uint8_t *blob); /* K and V of a slot */
/* Copies the index to the device, of index_bytes, and describes it; kv and frame_of are NULL. */
LOCI_MUST_CHECK loci_status loci_cuda_blob_put_index(loci_cuda_staging *staging, loci_pool *pool,
                                                     const uint8_t *blob, uint8_t *device,
                                                     loci_cuda_pair *out, loci_error *err);
/* K and V to the device, or (staging NULL) to memory of the host. */
LOCI_MUST_CHECK loci_status loci_cuda_blob_put_kv(loci_cuda_staging *staging, loci_pool *pool,
                                                  const uint8_t *blob, uint8_t *to,
                                                  loci_error *err);

#endif
