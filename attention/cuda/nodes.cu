/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 1 of mode hierarchical: the estimated mass of all roots, and which of them each row keeps.
 * Reads every root node once: 8 + 2 dim bytes for about 256 tokens. Products run on tensor cores,
 * in integers: estimates have the CPU's bits.
 */
#include "attention/cuda/mma.cuh"
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/radix.cuh"

#define NODES 16u /* of a warp */
#define WARPS 4u
#define WIDE 8u /* vectors of a product */
#define K_STEPS (MAX_DIM / 32)

/* The words of rows lane / 4 and 8 further, from byte `at` on, as the left side of products. */
static __device__ __forceinline__ void
load_nodes(uint32_t (&a)[K_STEPS][4], const uint8_t *const *row, uint32_t at, uint32_t dim) {
#pragma unroll
    for (uint32_t k = 0; k < K_STEPS; k++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t byte = 32 * k + i / 2 * 16 + threadIdx.x % 4 * 4;
            a[k][i] = 0;
            if (byte < dim) a[k][i] = *(const uint32_t *)(row[i % 2] + at + byte);
        }
}

/* Products of a warp's nodes with 8 vectors. */
template <bool SIGNS>
static __device__ __forceinline__ void
multiply_nodes(int (&dot)[4], const uint32_t (&a)[K_STEPS][4], const int8_t *q, uint32_t dim) {
    dot[0] = dot[1] = dot[2] = dot[3] = 0;
#pragma unroll
    for (uint32_t k = 0; k < K_STEPS; k++) {
        uint32_t byte = 32 * k + threadIdx.x % 4 * 4;
        if (32 * k >= dim) break;
        uint32_t b0 = *(const uint32_t *)(q + byte);
        uint32_t b1 = byte + 16 < dim ? *(const uint32_t *)(q + byte + 16) : 0;
        if (SIGNS)
            multiply_s8(dot, a[k], b0, b1);
        else
            multiply_u8(dot, a[k], b0, b1);
    }
}

/* A warp for NODES roots of a pair. */
static __global__ void __launch_bounds__(32 * WARPS)
    k_score_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    await_previous();
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t first = (blockIdx.x * WARPS + threadIdx.x / 32) * NODES, lane = threadIdx.x % 32;
    if (first >= pair->roots) return;
    uint32_t centroids[K_STEPS][4], variances[K_STEPS][4], root[2];
    const uint8_t *row[2];
    float scale[2][2], log_size[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        root[i] = first + lane / 4 + 8 * i;
        uint32_t there = root[i] < pair->roots ? root[i] : pair->roots - 1;
        row[i] = pair->root_nodes + (size_t)there * pair->node_stride;
        uint32_t live = pair->live ? look.root_live[head->root_at + pair->root_base + there]
                                   : pair->root_table[there].tokens;
        scale[i][0] = ((const float *)row[i])[0];
        scale[i][1] = ((const float *)row[i])[1];
        log_size[i] = look.logs[live];
    }
    load_nodes(centroids, row, 8, look.dim);
    load_nodes(variances, row, 8 + look.dim, look.dim);
    for (uint32_t v = 0; v < look.vectors; v += WIDE) {
        uint32_t column = v + lane / 4 < look.vectors ? v + lane / 4 : look.vectors - 1;
        size_t q = (size_t)pair->kv_head * look.vectors;
        int centre[4], variance[4];
        multiply_nodes<true>(centre, centroids, look.q8 + (q + column) * look.dim, look.dim);
        multiply_nodes<false>(variance, variances, look.qq8 + (q + column) * look.dim, look.dim);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t own = v + lane % 4 * 2 + i % 2, r = root[i / 2];
            if (own >= look.vectors || r >= pair->roots) continue;
            float x = look.mean_terms[(size_t)blockIdx.y * look.vectors + own] +
                      (float)centre[i] * (scale[i / 2][0] * look.q_scale[q + own]);
            size_t at =
                head->root_at * look.vectors + (size_t)own * head->roots + pair->root_base + r;
            c.root_centre[at] = x;
            x += (float)variance[i] * (scale[i / 2][1] * look.qq_scale[q + own]);
            c.root_score[at] = x + log_size[i / 2];
        }
    }
}

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_root_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.root_score + head->root_at * look.vectors + (size_t)v * head->roots;
    float top, least = radix_kth((radix_memory *)shared, score, head->roots, c.roots_wanted, &top);
    if (threadIdx.x == 0)
        c.root_floor[blockIdx.x] = fmaxf(least, look.steady[blockIdx.x] + c.root_slack);
}

#define LIST_THREADS 128u

/* A block for some roots of a pair, and a row: which of them the row keeps, and where their leaves
 * get their places. Blocks' shares come in any order; nothing that is selected depends on it. */
static __global__ void __launch_bounds__(LIST_THREADS)
    k_list_roots(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ uint32_t first[2];
    await_previous();
    uint32_t i = blockIdx.y * LIST_THREADS + threadIdx.x, row = blockIdx.z, all, leaves_all;
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    if (blockIdx.y * LIST_THREADS >= pair->roots) return;
    size_t hr = (size_t)pair->kv_head * look.rows + row, q = hr * look.group;
    size_t at = head->root_at * look.rows + (size_t)row * head->roots + pair->root_base;
    const float *score = c.root_score + head->root_at * look.vectors +
                         (size_t)row * look.group * head->roots + pair->root_base;
    bool kept = false;
    uint32_t leaves = 0;
    if (i < pair->roots) {
        leaves = pair->root_table[i].leaves;
        for (uint32_t first = 0; first < look.group; first += WIDE) {
            float x[WIDE]; /* all under way at once */
#pragma unroll
            for (uint32_t g = 0; g < WIDE; g++)
                x[g] = first + g < look.group ? score[(size_t)(first + g) * head->roots + i] : 0.0f;
#pragma unroll
            for (uint32_t g = 0; g < WIDE; g++)
                kept |= first + g < look.group && x[g] >= c.root_floor[q + first + g];
        }
        c.root_kept[at + i] = kept;
    }
    uint32_t place = sum_before<LIST_THREADS>(kept, &all);
    uint32_t leaf = sum_before<LIST_THREADS>(kept ? leaves : 0, &leaves_all);
    if (all == 0) return;
    if (threadIdx.x == 0) {
        first[0] = atomicAdd(&c.kept_count[(size_t)blockIdx.x * look.rows + row], all);
        first[1] = atomicAdd(&c.leaf_count[hr], leaves_all);
    }
    __syncthreads();
    if (!kept) return;
    c.kept[at + first[0] + place] = (uint16_t)i;
    c.leaf_place[at + i] = first[1] + leaf;
}

extern "C" cudaError_t loci_cuda_k_roots(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t pairs = look->extents * look->kv_heads, each = NODES * WARPS;
    dim3 grid((look->roots_max + each - 1) / each, pairs);
    cudaError_t result = launch_behind(stream, k_score_roots, grid, 32 * WARPS, 0, *look, *choice);
    if (result != cudaSuccess) return result;
    result = launch_behind(stream, k_root_floors, look->kv_heads * look->vectors, RADIX_THREADS,
                           sizeof(radix_memory), *look, *choice);
    if (result != cudaSuccess) return result;
    dim3 lists(pairs, (look->roots_max + LIST_THREADS - 1) / LIST_THREADS, look->rows);
    return launch_behind(stream, k_list_roots, lists, LIST_THREADS, 0, *look, *choice);
}
