/* SPDX-License-Identifier: Apache-2.0
 *
 * A query in the forms that the stages of a look-up read, each made by one warp from the scaled
 * query in shared memory. Files that include this one are built without contraction of products and
 * sums: estimates have the bits that the CPU has.
 */
#ifndef LOCI_ATTENTION_CUDA_QUERY_CUH
#define LOCI_ATTENTION_CUDA_QUERY_CUH

#include "attention/cuda/look.cuh"

/* int8(x) of attention/README.md for the vector x(0) to x(dim - 1), by one warp. */
template <typename VALUE>
static __device__ __forceinline__ void round_vector(int8_t *out, float *scale, int32_t *sum,
                                                    uint32_t dim, VALUE x) {
    uint32_t lane = threadIdx.x % 32;
    float top = 0.0f;
    for (uint32_t i = lane; i < dim; i += 32) top = fmaxf(top, fabsf(x(i)));
    top = warp_max(top);
    bool usable = top > 0.0f && isfinite(top);
    float inverse = usable ? 127.0f / top : 0.0f;
    int32_t total = 0;
    for (uint32_t i = lane; i < dim; i += 32) {
        int32_t value = usable ? (int32_t)((x(i) * inverse + 12582912.0f) - 12582912.0f) : 0;
        value = value > 127 ? 127 : value < -127 ? -127 : value;
        out[i] = (int8_t)value;
        total += value;
    }
    for (int offset = 16; offset > 0; offset /= 2)
        total += __shfl_xor_sync(FULL_WARP, total, offset);
    if (lane == 0) {
        *scale = usable ? top / 127.0f : 0.0f;
        *sum = total;
    }
}

/* q times the code scales of a pair, rounded. */
static __device__ __forceinline__ void fold_vector(const loci_cuda_look &look, uint32_t index,
                                                   uint32_t v, const float *q, int8_t *folded,
                                                   float *scale, int32_t *sum) {
    const float *code_scale = look.pairs[index].code_scale;
    size_t at = (size_t)index * look.vectors + v;
    round_vector(folded + at * look.dim, &scale[at], &sum[at], look.dim,
                 [&](uint32_t i) { return q[i] * code_scale[i]; });
}

/* Vector v of a KV head, scaled, to scaled[dim], by all threads of the block. */
static __device__ __forceinline__ void scale_vector(const loci_cuda_look &look,
                                                    const loci_cuda_look_query &query, uint32_t h,
                                                    uint32_t v, float *scaled) {
    uint32_t row = v / look.group, head = h * look.group + v % look.group;
    const float *from = query.q + (size_t)row * query.q_stride + (size_t)head * look.dim;
    for (uint32_t i = threadIdx.x; i < look.dim; i += blockDim.x) scaled[i] = from[i] * query.scale;
    __syncthreads();
}

/* q.mean of a pair; products: [dim] of shared memory. The sum runs in the CPU's order. */
static __device__ __forceinline__ void put_mean_term(const loci_cuda_look &look, uint32_t index,
                                                     uint32_t v, const float *scaled,
                                                     float *products) {
    const float *mean = look.pairs[index].mean;
    for (uint32_t i = threadIdx.x % 32; i < look.dim; i += 32) products[i] = scaled[i] * mean[i];
    __syncwarp();
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t i = 0; i < look.dim; i++) sum += products[i];
    if (threadIdx.x % 32 == 0) look.mean_terms[(size_t)index * look.vectors + v] = sum;
}

static __device__ __forceinline__ unsigned long long device_ns(void) {
    unsigned long long ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

/* What no pair has a part in. */
static __device__ __forceinline__ void put_vector(const loci_cuda_look &look,
                                                  const loci_cuda_look_query &query, uint32_t h,
                                                  uint32_t v, const float *scaled) {
    uint32_t at = h * look.vectors + v, row = v / look.group;
    uint32_t head = h * look.group + v % look.group;
    for (uint32_t i = threadIdx.x % 32; i < look.dim; i += 32)
        look.q[(size_t)at * look.dim + i] = scaled[i];
    int32_t unused;
    round_vector(look.q8 + (size_t)at * look.dim, &look.q_scale[at], &look.q_sum[at], look.dim,
                 [&](uint32_t i) { return scaled[i]; });
    round_vector(look.qq8 + (size_t)at * look.dim, &look.qq_scale[at], &unused, look.dim,
                 [&](uint32_t i) { return scaled[i] * scaled[i] * 0.5f; });
    if (threadIdx.x % 32 != 0) return;
    look.steady[at] = query.steady ? query.steady[(size_t)row * look.q_heads + head] : -INFINITY;
    if (at == 0) *look.begun_ns = device_ns();
}

#endif
