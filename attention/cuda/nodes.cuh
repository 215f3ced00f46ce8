/* SPDX-License-Identifier: Apache-2.0
 *
 * Estimates of nodes by one thread a node: its int8 centroid and uint8 variance stay in registers
 * while the vectors pass. Files that include this one are built without contraction, so that
 * estimates have the CPU's bits.
 */
#ifndef LOCI_ATTENTION_CUDA_NODES_CUH
#define LOCI_ATTENTION_CUDA_NODES_CUH

#include "attention/cuda/look.cuh"

/* q.mean + q8.c of one node for one vector. q8: dim bytes. */
static __device__ __forceinline__ float centre_score(const uint8_t *node, const int8_t *q8,
                                                     float q_scale, float mean_term, uint32_t dim) {
    const int *centroid = (const int *)(node + 8), *q = (const int *)q8;
    int dot = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < dim / 4; i++) dot = __dp4a(centroid[i], q[i], dot);
    return mean_term + (float)dot * (*(const float *)node * q_scale);
}

#endif
