/* SPDX-License-Identifier: Apache-2.0
 *
 * See moves.h.
 */
#include "attention/cuda/moves.h"

#include "attention/cuda/launch.cuh"

#define THREADS 256u
#define BLOCKS 8u /* of each copy, so that a row of queries takes a few words a thread */

static __global__ void __launch_bounds__(THREADS) k_move(const loci_cuda_moves moves) {
    await_previous();
    const loci_cuda_move &move = moves.move[blockIdx.y];
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < move.words; i += BLOCKS * THREADS)
        move.to[i] = move.from[i];
}

extern "C" cudaError_t loci_cuda_k_move(cudaStream_t stream, const loci_cuda_moves *moves,
                                        uint32_t count) {
    return launch_behind(stream, k_move, dim3(BLOCKS, count), THREADS, 0, *moves);
}
