/* SPDX-License-Identifier: Apache-2.0
 *
 * Small copies by a kernel: several at once, and to page-locked memory of the host, where each by
 * itself would cost a call of the driver and a turn of the copy engine.
 */
#ifndef LOCI_ATTENTION_CUDA_MOVES_H
#define LOCI_ATTENTION_CUDA_MOVES_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#define LOCI_CUDA_MOVES 4u

typedef struct loci_cuda_move {
    const uint32_t *from;
    uint32_t *to; /* of the device, or page-locked */
    uint32_t words;
} loci_cuda_move;

typedef struct loci_cuda_moves {
    loci_cuda_move move[LOCI_CUDA_MOVES];
} loci_cuda_moves;

#ifdef __cplusplus
extern "C" {
#endif
/* moves.cu: the first `count`. */
cudaError_t loci_cuda_k_move(cudaStream_t stream, const loci_cuda_moves *moves, uint32_t count);
#ifdef __cplusplus
}
#endif

#endif
