/* SPDX-License-Identifier: Apache-2.0
 *
 * Small device functions that several .cu files share: reductions over a warp or a block in a fixed
 * order, bf16 as bits, the first fault of a stream.
 */
#ifndef LOCI_ATTENTION_CUDA_DEVICE_CUH
#define LOCI_ATTENTION_CUDA_DEVICE_CUH

#include "attention/cuda/kernels.h"

#define FULL_WARP 0xffffffffu
#define WARPS_MAX 32

/* Every lane gets the result. */
static __device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

/* Every thread gets the result. buffer: WARPS_MAX floats of shared memory, free again after the
 * next barrier of the block. */
static __device__ __forceinline__ float block_sum(float x, float *buffer) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) buffer[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? buffer[lane] : 0.0f);
}

static __device__ __forceinline__ float block_max(float x, float *buffer) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) buffer[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? buffer[lane] : -INFINITY);
}

static __device__ __forceinline__ float bf16_to_f32(uint16_t value) {
    return __uint_as_float((uint32_t)value << 16);
}

/* The last of `count` ascending numbers that is at most `value`, by binary search; 0 if none is.
 * at(i): the i-th. */
template <typename AT>
static __device__ __forceinline__ uint32_t last_at_most(uint32_t count, uint32_t value, AT at) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (at(middle) <= value)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Round to nearest even; NaN stays NaN. */
static __device__ __forceinline__ uint16_t f32_to_bf16(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static __device__ __forceinline__ void raise_fault(loci_cuda_fault *fault, uint32_t code,
                                                   uint32_t a, uint32_t b) {
    if (atomicCAS(&fault->code, 0u, code) != 0u) return;
    fault->a = a;
    fault->b = b;
}

#endif
