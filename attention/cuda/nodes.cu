/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 1 of mode hierarchical: the estimated mass of all roots, and which of them each row keeps.
 * Reads every root node once: 8 + 2 dim bytes for about 256 tokens.
 */
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/radix.cuh"

#define NODES 64u
#define THREADS 256u

/* A block for NODES roots of a pair: their nodes come to shared memory once, a row an odd number of
 * words, and a thread takes one of them for every fourth vector. */
static __global__ void __launch_bounds__(THREADS)
    k_score_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    uint32_t *nodes = (uint32_t *)shared;
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t first = blockIdx.x * NODES, words = pair->node_stride / 4, width = words | 1u;
    if (first >= pair->roots) return;
    uint32_t count = pair->roots - first < NODES ? pair->roots - first : NODES;
    const uint32_t *from = (const uint32_t *)(pair->root_nodes + (size_t)first * pair->node_stride);
    for (uint32_t i = threadIdx.x; i < count * words; i += THREADS)
        nodes[i / words * width + i % words] = from[i];
    __syncthreads();
    uint32_t local = threadIdx.x % NODES, i = first + local;
    if (local >= count) return;
    const uint8_t *node = (const uint8_t *)(nodes + local * width);
    float log_size = look.logs[look.root_live[head->root_at + pair->root_base + i]];
    size_t at = head->root_at * look.vectors + pair->root_base + i;
    for (uint32_t v = threadIdx.x / NODES; v < look.vectors; v += THREADS / NODES) {
        size_t q = (size_t)pair->kv_head * look.vectors + v;
        float x = centre_score(node, look.q8 + q * look.dim, look.q_scale[q],
                               look.mean_terms[(size_t)blockIdx.y * look.vectors + v], look.dim);
        c.root_centre[at + (size_t)v * head->roots] = x;
        x += variance_score(node, look.qq8 + q * look.dim, look.qq_scale[q], look.dim);
        c.root_score[at + (size_t)v * head->roots] = x + log_size;
    }
}

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_root_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.root_score + head->root_at * look.vectors + (size_t)v * head->roots;
    float top, least = radix_kth((radix_memory *)shared, score, head->roots, c.roots_wanted, &top);
    if (threadIdx.x == 0)
        c.root_floor[blockIdx.x] = fmaxf(least, look.steady[blockIdx.x] + c.root_slack);
    if (threadIdx.x == 0 && v % look.group == 0) c.leaf_count[blockIdx.x / look.group] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) *c.kept_count = 0;
}

/* A thread for each root of a pair: which rows keep it, where their leaves get their places. Places
 * come in any order; nothing that is selected depends on them. */
static __global__ void k_list_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pair->roots) return;
    uint32_t leaves = pair->root_table[i].leaves;
    size_t hr = (size_t)pair->kv_head * look.rows;
    const float *score = c.root_score + head->root_at * look.vectors + pair->root_base + i;
    bool any = false;
    for (uint32_t row = 0; row < look.rows; row++) {
        bool kept = false;
#pragma unroll 4
        for (uint32_t g = 0; g < look.group; g++) {
            uint32_t v = row * look.group + g;
            kept |= score[(size_t)v * head->roots] >=
                    c.root_floor[(size_t)pair->kv_head * look.vectors + v];
        }
        size_t at = head->root_at * look.rows + (size_t)row * head->roots + pair->root_base + i;
        c.root_kept[at] = kept;
        if (kept) c.leaf_place[at] = atomicAdd(&c.leaf_count[hr + row], leaves);
        any = any || kept;
    }
    if (any) c.kept[atomicAdd(c.kept_count, 1u)] = (loci_cuda_kept){blockIdx.y, i};
}

extern "C" cudaError_t loci_cuda_k_roots(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid((look->roots_max + NODES - 1) / NODES, look->extents * look->kv_heads);
    size_t bytes = NODES * ((2 + look->dim / 2) | 1u) * sizeof(uint32_t);
    k_score_roots<<<grid, THREADS, bytes, stream>>>(*look, *choice);
    k_root_floors<<<look->kv_heads * look->vectors, RADIX_THREADS, sizeof(radix_memory), stream>>>(
        *look, *choice);
    dim3 lists((look->roots_max + 127) / 128, look->extents * look->kv_heads);
    k_list_roots<<<lists, 128, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}
