/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection rule of Squeezed Attention (arXiv 2411.09688, sections 3.2 and 3.3) on roots and
 * leaves: S_i = exp(q.C_i) / sum_j N_j exp(q.C_j) over the live nodes of a level, averaged over all
 * vectors of a KV head. Reads the centroids of a level twice.
 */
#include "attention/cuda/nodes.cuh"

struct level_nodes {
    const uint8_t *first;
    uint32_t count, stride;
    uint64_t base; /* of the pair's first node among all heads' */
};

static __device__ __forceinline__ level_nodes nodes_of(const loci_cuda_look &look,
                                                       const loci_cuda_pair *pair, int level) {
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    level_nodes n = {pair->root_nodes, pair->roots, pair->node_stride,
                     head->root_at + pair->root_base};
    if (level == 1) {
        n.first = pair->leaf_nodes;
        n.count = pair->leaves;
        n.base = head->leaf_at + pair->leaf_base;
    }
    return n;
}

static __device__ __forceinline__ float log_live(const loci_cuda_look &look, uint64_t node,
                                                 int level) {
    return look.logs[level == 0 ? look.root_live[node] : look.leaf_live[node]];
}

static __device__ __forceinline__ float
score_of(const loci_cuda_look &look, const loci_cuda_pair *pair, const uint8_t *node, uint32_t v) {
    size_t q = (size_t)pair->kv_head * look.vectors + v;
    size_t index = (size_t)(pair - look.pairs) * look.vectors + v;
    return centre_score(node, look.q8 + q * look.dim, look.q_scale[q], look.mean_terms[index],
                        look.dim);
}

/* A warp for each run of 32 nodes: maximum and sum of N exp(q.C) for each vector. */
static __global__ void k_runs(const loci_cuda_look look, const loci_cuda_squeeze s, int level) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    level_nodes nodes = nodes_of(look, pair, level);
    uint32_t run = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t i = run * 32 + lane;
    if (run * 32 >= nodes.count) return;
    bool there = i < nodes.count;
    const uint8_t *node = nodes.first + (size_t)(there ? i : 0) * nodes.stride;
    float size = there ? log_live(look, nodes.base + i, level) : -INFINITY;
    float *out = s.partial + ((size_t)blockIdx.y * s.runs + run) * look.vectors * 2;
    for (uint32_t v = 0; v < look.vectors; v++) {
        float x = score_of(look, pair, node, v) + size;
        if (!there) x = -INFINITY;
        float max = warp_max(x), base = max > -INFINITY ? max : 0.0f;
        float sum = warp_sum(expf(x - base));
        if (lane == 0) {
            out[2 * v] = max;
            out[2 * v + 1] = sum;
        }
    }
}

/* One block for each (KV head, vector). */
static __global__ void k_totals(const loci_cuda_look look, const loci_cuda_squeeze s, int level) {
    __shared__ float buffer[WARPS_MAX];
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    float max = -INFINITY, sum = 0.0f;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t e = 0; e < look.extents; e++) {
            size_t index = (size_t)e * look.kv_heads + h;
            uint32_t count = nodes_of(look, &look.pairs[index], level).count;
            for (uint32_t run = threadIdx.x; run * 32 < count; run += blockDim.x) {
                const float *part = s.partial + ((index * s.runs + run) * look.vectors + v) * 2;
                if (pass == 0)
                    max = fmaxf(max, part[0]);
                else if (part[0] > -INFINITY)
                    sum += part[1] * expf(part[0] - max);
            }
        }
        if (pass == 0) max = block_max(max, buffer);
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) s.total[blockIdx.x] = sum > 0.0f ? max + logf(sum) : INFINITY;
}

static __global__ void k_shares(const loci_cuda_look look, const loci_cuda_squeeze s, int level) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    level_nodes nodes = nodes_of(look, pair, level);
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= nodes.count) return;
    const uint8_t *node = nodes.first + (size_t)i * nodes.stride;
    const float *total = s.total + (size_t)pair->kv_head * look.vectors;
    float sum = 0.0f;
    for (uint32_t v = 0; v < look.vectors; v++)
        sum += expf(score_of(look, pair, node, v) - total[v]);
    bool live = log_live(look, nodes.base + i, level) > -INFINITY;
    s.score[level][nodes.base + i] = live ? sum / (float)look.vectors : 0.0f;
}

extern "C" cudaError_t loci_cuda_k_squeeze(cudaStream_t stream, const loci_cuda_look *look,
                                           const loci_cuda_squeeze *squeeze) {
    uint32_t pairs = look->extents * look->kv_heads;
    for (int level = 0; level < 2 && pairs > 0; level++) {
        uint32_t most = level == 0 ? look->roots_max : look->leaves_max;
        dim3 grid((most + 127) / 128, pairs);
        k_runs<<<grid, 128, 0, stream>>>(*look, *squeeze, level);
        k_totals<<<look->kv_heads * look->vectors, 128, 0, stream>>>(*look, *squeeze, level);
        k_shares<<<grid, 128, 0, stream>>>(*look, *squeeze, level);
    }
    return cudaGetLastError();
}

/* A thread for each leaf. Leaves share words: their bits are or-ed in. */
static __global__ void k_squeeze_select(const loci_cuda_look look, const loci_cuda_squeeze s) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t l = blockIdx.x * blockDim.x + threadIdx.x;
    if (l >= pair->leaves) return;
    float root = s.score[0][head->root_at + pair->root_base + pair->leaf_root[l]];
    uint64_t leaf = head->leaf_at + pair->leaf_base + l;
    if (!(root > s.threshold[0]) || !look.leaf_live[leaf] || !(s.score[1][leaf] > s.threshold[1]))
        return;
    uint32_t begin = pair->leaf_begin[l], count = pair->leaf_begin[l + 1] - begin;
    or_bits(look.token_mask + mask_at(look, pair, 0), begin, live_bits(pair, begin, count));
}

extern "C" cudaError_t loci_cuda_k_squeeze_select(cudaStream_t stream, const loci_cuda_look *look,
                                                  const loci_cuda_squeeze *squeeze) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid((look->leaves_max + 127) / 128, look->extents * look->kv_heads);
    k_squeeze_select<<<grid, 128, 0, stream>>>(*look, *squeeze);
    return cudaGetLastError();
}
