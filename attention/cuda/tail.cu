/* SPDX-License-Identifier: Apache-2.0
 *
 * The estimated tail: what a row does not read, as pseudo-tokens with a node's value mean: roots
 * that it does not keep, leaves without candidates, and of other leaves what was not selected
 * (attention/README.md). One block for each pair and tile of vectors; reads all its nodes.
 */
#include "attention/cuda/attend.cuh"
#include "attention/cuda/nodes.cuh"

struct tail_work {
    const loci_cuda_pair *pair;
    const loci_cuda_head *head;
    uint32_t index; /* of the pair */
};

/* The log of the mass of a leaf's candidates that were not selected, for one vector. */
static __device__ float near_mass(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const tail_work &w, uint32_t v, uint32_t begin,
                                  uint32_t candidates, uint32_t selected) {
    uint32_t row = v / look.group;
    size_t hr = (size_t)w.pair->kv_head * look.rows + row;
    const float *score = c.score + (hr * look.group + v % look.group) * c.room;
    size_t words = mask_at(look, w.pair, row);
    float max = -INFINITY, sum = 0.0f;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t left = candidates & ~selected; left; left &= left - 1) {
            uint32_t slot = begin + __ffs((int)left) - 1;
            uint32_t below = c.candidates[words + slot / 32] & ((1u << (slot % 32)) - 1);
            float x = score[c.rank[words + slot / 32] + __popc(below)];
            if (pass == 0)
                max = fmaxf(max, x);
            else
                sum += expf(x - max);
        }
        if (max == -INFINITY) return max;
    }
    return max + logf(sum);
}

/* Of pseudo-token `key` (roots, then leaves) for vector v; -INFINITY where there is nothing. */
static __device__ float tail_logit(const loci_cuda_look &look, const loci_cuda_choice &c,
                                   const tail_work &w, uint32_t key, uint32_t v) {
    const loci_cuda_pair *pair = w.pair;
    if (v >= look.vectors || key >= pair->roots + pair->leaves) return -INFINITY;
    uint32_t row = v / look.group, leaf = key - pair->roots;
    bool is_root = key < pair->roots;
    uint32_t root = is_root ? key : pair->leaf_root[leaf];
    bool kept = c.root_kept[w.head->root_at * look.rows + (size_t)row * w.head->roots +
                            pair->root_base + root];
    if (kept == is_root) return -INFINITY;
    size_t q = (size_t)pair->kv_head * look.vectors + v;
    const uint8_t *node = is_root ? pair->root_nodes + (size_t)key * pair->node_stride
                                  : pair->leaf_nodes + (size_t)leaf * pair->node_stride;
    uint32_t live = is_root ? look.root_live[w.head->root_at + pair->root_base + key]
                            : look.leaf_live[w.head->leaf_at + pair->leaf_base + leaf];
    float whole = centre_score(node, look.q8 + q * look.dim, look.q_scale[q],
                               look.mean_terms[(size_t)w.index * look.vectors + v], look.dim) +
                  look.logs[live];
    if (is_root) return whole;
    uint32_t begin = pair->leaf_begin[leaf], count = pair->leaf_begin[leaf + 1] - begin;
    uint32_t candidates = mask_bits(c.candidates + mask_at(look, pair, row), begin, count);
    if (!candidates) return whole;
    uint32_t selected = mask_bits(look.token_mask + mask_at(look, pair, row), begin, count);
    float near = near_mass(look, c, w, v, begin, candidates, selected);
    float far = whole + logf((float)(live - __popc(candidates)) / (float)live);
    float most = fmaxf(near, far);
    return most == -INFINITY ? most : most + logf(expf(near - most) + expf(far - most));
}

template <int DIM>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attend_tail(const loci_cuda_look look, const loci_cuda_choice c,
                  const loci_cuda_attend args) {
    extern __shared__ float4 shared[];
    attend_memory m = attend_layout((float *)shared, look.dim);
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    tail_work w = {pair, &look.heads[pair->kv_head], blockIdx.x};
    uint32_t all = pair->roots + pair->leaves, lane = threadIdx.x % 32;
    uint32_t v = blockIdx.y * ROWS + threadIdx.x / 32 * 2;
    float acc[ROWS_OF(DIM)][EACH_OF(DIM)] = {};
    if (threadIdx.x < ROWS) {
        m.max[threadIdx.x] = -INFINITY;
        m.sum[threadIdx.x] = 0.0f;
    }
    for (uint32_t begin = 0; begin < all; begin += KEYS) {
        uint32_t key = begin + threadIdx.x / 8;
        const uint16_t *mean = key < all ? pair->value_means + (size_t)key * look.dim : NULL;
        __syncthreads();
        load_row(m.v + (size_t)(threadIdx.x / 8) * m.width, mean, look.dim, m.width, true,
                 threadIdx.x % 8, 8);
        float logit[2] = {tail_logit(look, c, w, begin + lane, v),
                          tail_logit(look, c, w, begin + lane, v + 1)};
        attend_softmax(m, logit);
        __syncthreads();
        attend_values<DIM>(m, acc);
    }
    __syncthreads();
    size_t part = (size_t)blockIdx.x * args.parts + args.chunks;
    attend_store<DIM>(m, acc, look.dim,
                      args.partial + (part * gridDim.y + blockIdx.y) * ROWS * (look.dim + 2));
}

template <int DIM>
static cudaError_t launch_tail(cudaStream_t stream, const loci_cuda_look *look,
                               const loci_cuda_choice *choice, const loci_cuda_attend *args) {
    size_t bytes = attend_floats(look->dim) * sizeof(float);
    cudaError_t result = cudaFuncSetAttribute(
        k_attend_tail<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
        (int)(attend_floats(DIM) * sizeof(float))); /* the same in every thread's launch */
    if (result != cudaSuccess) return result;
    dim3 grid(look->extents * look->kv_heads, loci_cuda_tiles(look->vectors));
    k_attend_tail<DIM><<<grid, ATTEND_THREADS, bytes, stream>>>(*look, *choice, *args);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_attend_tail(cudaStream_t stream, const loci_cuda_look *look,
                                               const loci_cuda_choice *choice,
                                               const loci_cuda_attend *args) {
    if (look->extents == 0) return cudaSuccess;
    if (look->dim <= 32) return launch_tail<32>(stream, look, choice, args);
    if (look->dim <= 64) return launch_tail<64>(stream, look, choice, args);
    if (look->dim <= 128) return launch_tail<128>(stream, look, choice, args);
    return launch_tail<256>(stream, look, choice, args);
}
