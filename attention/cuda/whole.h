/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention of mode dense over pairs: every live token, without a mask.
 */
#ifndef LOCI_ATTENTION_CUDA_WHOLE_H
#define LOCI_ATTENTION_CUDA_WHOLE_H

#include "attention/cuda/kernels.h"

#define LOCI_CUDA_WHOLE_TILE 64u    /* slots that a block takes at a time */
#define LOCI_CUDA_WHOLE_BLOCKS 528u /* for all pairs and tiles of vectors, about */
#define LOCI_CUDA_WIDE_TILE 128u    /* whole_wide.cu: slots at a time */
#define LOCI_CUDA_WIDE_GROUP 64u    /* vectors of a warpgroup */

#ifdef __cplusplus
extern "C" {
#endif

/* whole_wide.cu: attention and attribution over all live tokens for any number of vectors, dim 64
 * or 128, on compute capability 9.0a. Of so few vectors it leaves two parts a chunk. */
static inline bool loci_cuda_wide_narrow(const loci_cuda_look *look) {
    return look->vectors <= LOCI_CUDA_WIDE_GROUP;
}

/* Slots of a block, in whole tiles: even shares of all pairs. */
static inline uint32_t loci_cuda_whole_chunk(const loci_cuda_look *look) {
    uint64_t tokens = (uint64_t)look->words * 32 * look->kv_heads * loci_cuda_tiles(look->vectors);
    uint64_t tiles = tokens / LOCI_CUDA_WHOLE_BLOCKS / LOCI_CUDA_WHOLE_TILE + 1;
    return (uint32_t)tiles * LOCI_CUDA_WHOLE_TILE;
}

/* A partial result for each chunk of a pair, args->chunks of a pair, as attend_sparse leaves it.
 * block_bytes: the shared memory that a block may use. */
cudaError_t loci_cuda_k_attend_whole(cudaStream_t stream, const loci_cuda_look *look,
                                     const loci_cuda_attend *args, size_t block_bytes);

/* In chunks of whole LOCI_CUDA_WIDE_TILE. exact: to about 2^-17, else, of more than
 * LOCI_CUDA_WIDE_GROUP vectors, queries and weights are rounded to bf16. */
cudaError_t loci_cuda_k_attend_wide(cudaStream_t stream, const loci_cuda_look *look,
                                    const loci_cuda_attend *args, bool exact);
/* What live tokens of pairs have of the attention, to the masses of their segments, in chunks of
 * args->wide_chunk; of each row, exact, those that its own kept logits would give. */
cudaError_t loci_cuda_k_attribute_wide(cudaStream_t stream, const loci_cuda_look *look,
                                       const loci_cuda_attribution *args);

#ifdef __cplusplus
}
#endif

#endif
