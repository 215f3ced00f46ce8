/* SPDX-License-Identifier: Apache-2.0
 *
 * The queries of a look-up, and the live tokens of nodes.
 */
#include "attention/cuda/query.cuh"

/* One warp for each vector and pair; the first extent's also leave the query's forms. */
static __global__ void k_queries(const loci_cuda_look look, const loci_cuda_look_query query) {
    __shared__ float scaled[MAX_DIM], products[MAX_DIM];
    await_previous();
    uint32_t h = blockIdx.y % look.kv_heads, v = blockIdx.x;
    scale_vector(look, query, h, v, scaled);
    if (look.extents > 0) put_mean_term(look, blockIdx.y, v, scaled, products);
    if (blockIdx.y < look.kv_heads) put_vector(look, query, h, v, scaled);
}

extern "C" cudaError_t loci_cuda_k_queries(cudaStream_t stream, const loci_cuda_look *look,
                                           const loci_cuda_look_query *query) {
    dim3 grid(look->vectors, (look->extents ? look->extents : 1) * look->kv_heads);
    return launch_behind(stream, k_queries, grid, 32, 0, *look, *query);
}

static __global__ void k_tell(const unsigned long long *begun, const loci_cuda_stats *counted,
                              const loci_cuda_stats known, loci_cuda_stats *told) {
    await_previous();
    loci_cuda_stats stats = counted ? *counted : known;
    stats.elapsed_ns = device_ns() - *begun;
    *told = stats;
}

extern "C" cudaError_t loci_cuda_k_tell(cudaStream_t stream, const loci_cuda_look *look,
                                        const loci_cuda_stats *counted,
                                        const loci_cuda_stats *known, loci_cuda_stats *told) {
    return launch_behind(stream, k_tell, 1, 1, 0, look->begun_ns, counted, *known, told);
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
