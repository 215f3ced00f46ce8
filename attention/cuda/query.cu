/* SPDX-License-Identifier: Apache-2.0
 *
 * The queries of a look-up in the forms that its stages read, and the live tokens of nodes. Built
 * without contraction of products and sums: estimates have the bits that the CPU has.
 */
#include "attention/cuda/look.cuh"

/* One warp for each vector and pair; the first extent's also leave the query's forms. */
static __global__ void k_queries(const loci_cuda_look look, const loci_cuda_look_query query) {
    __shared__ float scaled[MAX_DIM], other[MAX_DIM];
    uint32_t h = blockIdx.y % look.kv_heads, v = blockIdx.x, at = h * look.vectors + v;
    uint32_t row = v / look.group, head = h * look.group + v % look.group;
    const float *from = query.q + (size_t)row * query.q_stride + (size_t)head * look.dim;
    for (uint32_t i = threadIdx.x; i < look.dim; i += 32) scaled[i] = from[i] * query.scale;
    if (look.extents > 0) {
        const float *mean = look.pairs[blockIdx.y].mean;
        for (uint32_t i = threadIdx.x; i < look.dim; i += 32) other[i] = scaled[i] * mean[i];
        __syncwarp();
        float sum = 0.0f; /* in the CPU's order */
#pragma unroll 8
        for (uint32_t i = 0; i < look.dim; i++) sum += other[i];
        if (threadIdx.x == 0) look.mean_terms[(size_t)blockIdx.y * look.vectors + v] = sum;
    }
    if (blockIdx.y >= look.kv_heads) return;
    __syncwarp();
    for (uint32_t i = threadIdx.x; i < look.dim; i += 32) {
        look.q[(size_t)at * look.dim + i] = scaled[i];
        other[i] = scaled[i] * scaled[i] * 0.5f;
    }
    __syncwarp();
    int32_t unused;
    round_vector(look.q8 + (size_t)at * look.dim, &look.q_scale[at], &look.q_sum[at], look.dim,
                 [&](uint32_t i) { return scaled[i]; });
    round_vector(look.qq8 + (size_t)at * look.dim, &look.qq_scale[at], &unused, look.dim,
                 [&](uint32_t i) { return other[i]; });
    if (threadIdx.x == 0)
        look.steady[at] =
            query.steady ? query.steady[(size_t)row * look.q_heads + head] : -INFINITY;
}

extern "C" cudaError_t loci_cuda_k_queries(cudaStream_t stream, const loci_cuda_look *look,
                                           const loci_cuda_look_query *query) {
    dim3 grid(look->vectors, (look->extents ? look->extents : 1) * look->kv_heads);
    k_queries<<<grid, 32, 0, stream>>>(*look, *query);
    return cudaGetLastError();
}

static __device__ __forceinline__ uint32_t count_live(const loci_cuda_pair *pair, uint32_t first,
                                                      uint32_t count) {
    uint32_t sum = 0;
    if (!pair->live) return count;
    for (uint32_t at = 0; at < count; at += 32)
        sum += __popc(live_bits(pair, first + at, count - at < 32 ? count - at : 32));
    return sum;
}

static __global__ void k_count_live(const loci_cuda_look look) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < pair->roots)
        look.root_live[head->root_at + pair->root_base + i] =
            count_live(pair, pair->root_table[i].first_slot, pair->root_table[i].tokens);
    if (i < pair->leaves)
        look.leaf_live[head->leaf_at + pair->leaf_base + i] = (uint8_t)count_live(
            pair, pair->leaf_begin[i], pair->leaf_begin[i + 1] - pair->leaf_begin[i]);
}

extern "C" cudaError_t loci_cuda_k_count_live(cudaStream_t stream, const loci_cuda_look *look) {
    uint32_t pairs = look->extents * look->kv_heads;
    if (pairs == 0) return cudaSuccess;
    dim3 grid((look->leaves_max + 255) / 256, pairs); /* no fewer leaves than roots */
    k_count_live<<<grid, 256, 0, stream>>>(*look);
    return cudaGetLastError();
}
