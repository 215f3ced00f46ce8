/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 1 of mode hierarchical: the estimated mass of all roots, and which of them each row keeps.
 * Reads every root node once: 8 + 2 dim bytes for about 256 tokens.
 */
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/radix.cuh"

/* A thread for each root of a pair; all vectors. */
static __global__ void k_score_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pair->roots) return;
    const uint8_t *node = pair->root_nodes + (size_t)i * pair->node_stride;
    float log_size = look.logs[look.root_live[head->root_at + pair->root_base + i]];
    float *out = c.root_score + head->root_at * look.vectors + pair->root_base + i;
    for (uint32_t v = 0; v < look.vectors; v++) {
        size_t q = (size_t)pair->kv_head * look.vectors + v;
        float x = centre_score(node, look.q8 + q * look.dim, look.q_scale[q],
                               look.mean_terms[(size_t)blockIdx.y * look.vectors + v], look.dim);
        x += variance_score(node, look.qq8 + q * look.dim, look.qq_scale[q], look.dim);
        out[(size_t)v * head->roots] = x + log_size;
    }
}

/* One block for each (KV head, row). */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_keep_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t h = blockIdx.x / look.rows, row = blockIdx.x % look.rows;
    const loci_cuda_head *head = &look.heads[h];
    uint32_t n = head->roots;
    uint8_t *kept = c.root_kept + head->root_at * look.rows + (size_t)row * n;
    for (uint32_t g = 0; g < look.group; g++) {
        const float *score =
            c.root_score + head->root_at * look.vectors + ((size_t)row * look.group + g) * n;
        float least = radix_kth(memory, score, n, c.roots_wanted);
        for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS)
            kept[i] = (uint8_t)((g > 0 && kept[i]) || score[i] >= least);
        __syncthreads();
    }
}

extern "C" cudaError_t loci_cuda_k_roots(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid((look->roots_max + 63) / 64, look->extents * look->kv_heads);
    k_score_roots<<<grid, 64, 0, stream>>>(*look, *choice);
    k_keep_roots<<<look->kv_heads * look->rows, RADIX_THREADS, sizeof(radix_memory), stream>>>(
        *look, *choice);
    return cudaGetLastError();
}
