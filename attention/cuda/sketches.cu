/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 2 of mode hierarchical, first half: the leaves of kept roots by the highest of their tokens'
 * sketches, and the floors.
 */
#include "attention/cuda/query.cuh"
#include "attention/cuda/radix.cuh"
#include "attention/cuda/sketches.cuh"

#define PREPARE_THREADS 256u

/* --- what a vector knows of a pair ------------------------------------------------------- */

/* Products of codewords with the query, and the least and greatest of each part. Sums run in the
 * CPU's order. */
static __device__ void multiply_book(const float *book, const float *q, uint32_t parts,
                                     float *value, float *low, float *high) {
    for (uint32_t i = threadIdx.x; i < parts * 16; i += PREPARE_THREADS) { /* whole warps */
        uint32_t p = i / 16, w = i % 16;
        float sum = 0.0f;
        for (uint32_t j = 0; j < 4; j++) sum += q[p * 4 + j] * book[p * 64 + j * 16 + w];
        value[i] = sum;
        float least = sum, most = sum;
        for (int offset = 8; offset > 0; offset /= 2) {
            least = fminf(least, __shfl_xor_sync(FULL_WARP, least, offset));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
        }
        if (w != 0) continue;
        low[p] = least;
        high[p] = most;
    }
}

/* A block for each (vector, pair): the query's forms, what it knows of the pair. Blocks behind the
 * last pair clear memory. */
static __global__ void __launch_bounds__(PREPARE_THREADS)
    k_prepare(const loci_cuda_look look, const loci_cuda_choice c,
              const loci_cuda_look_query query) {
    __shared__ float value[PARTS_MAX * 16], low[PARTS_MAX], high[PARTS_MAX];
    __shared__ float scaled[MAX_DIM], products[MAX_DIM];
    await_previous();
    uint32_t v = blockIdx.x, warp = threadIdx.x / 32, parts = look.dim / 4;
    if (blockIdx.y == look.extents * look.kv_heads) {
        for (size_t i = (size_t)v * PREPARE_THREADS + threadIdx.x; i < c.zeroed_count;
             i += (size_t)gridDim.x * PREPARE_THREADS)
            c.zeroed[i] = uint4{0, 0, 0, 0};
        return;
    }
    uint32_t h = blockIdx.y % look.kv_heads;
    size_t at = (size_t)blockIdx.y * look.vectors + v;
    scale_vector(look, query, h, v, scaled);
    multiply_book(look.pairs[blockIdx.y].codebook, scaled, parts, value, low, high);
    if (warp == 0) put_mean_term(look, blockIdx.y, v, scaled, products);
    if (warp == 1 && blockIdx.y < look.kv_heads) put_vector(look, query, h, v, scaled);
    if (warp == 2) fold_vector(look, blockIdx.y, v, scaled, c.folded, c.folded_scale, c.folded_sum);
    __syncthreads();
    float base = 0.0f, widest = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        widest = fmaxf(widest, high[p] - low[p]);
        base += low[p];
    }
    bool usable = widest > 1e-30f && widest < 1e30f;
    float inverse = usable ? 255.0f / widest : 0.0f;
    uint32_t row = v / look.group, g = v % look.group;
    uint8_t *table = (uint8_t *)table_of(look, c, blockIdx.y, row, g / LOT) + g % LOT;
    for (uint32_t i = threadIdx.x; i < parts * 16; i += PREPARE_THREADS) {
        float step = (value[i] - low[i / 16]) * inverse + 0.5f;
        step = step < 256.0f ? step : 0.0f; /* products of a hostile codebook may be NaN */
        table[i * LOT] = (uint8_t)(int32_t)step;
    }
    if (threadIdx.x != 0) return;
    c.table_base[at] = base;
    c.table_scale[at] = usable ? widest / 255.0f : 0.0f;
}

extern "C" cudaError_t loci_cuda_k_prepare(cudaStream_t stream, const loci_cuda_look *look,
                                           const loci_cuda_choice *choice,
                                           const loci_cuda_look_query *query) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid(look->vectors, look->extents * look->kv_heads + 1);
    k_prepare<<<grid, PREPARE_THREADS, 0, stream>>>(*look, *choice, *query);
    return cudaGetLastError();
}

/* --- leaves ------------------------------------------------------------------------------ */

/* The vector of the lot whose scores a lane writes, and what turns its sums into estimates. */
struct lane_vector {
    uint32_t g, word, half;
    float base, scale;
};

static __device__ __forceinline__ lane_vector vector_of_lane(const loci_cuda_look &look,
                                                             const loci_cuda_choice &c,
                                                             const lot_work &w) {
    lane_vector v = {0, threadIdx.x / 2 % 4, threadIdx.x % 2, 0.0f, 0.0f};
    v.g = vector_of(v.word, v.half);
    if (v.g >= w.count) return v;
    size_t at = (size_t)w.index * look.vectors + w.first + v.g;
    v.base = c.table_base[at];
    v.scale = c.table_scale[at];
    return v;
}

/* A root as the lanes of a warp have it: its leaf `lane`, slots counted from the root's first, what
 * the lane's vector is to it, and the words of its next step. */
template <int WORDS> struct root_lane {
    loci_cuda_root root;
    uint32_t begin, end;
    float centre;
    float *out; /* of leaf 0 */
    step_words<WORDS> step;
};

/* Begins to read root `i` of those that are kept. */
template <int WORDS>
static __device__ __forceinline__ void
open_root(const loci_cuda_look &look, const loci_cuda_choice &c, const lot_work &w,
          const lane_vector &v, uint32_t dim, uint32_t i, root_lane<WORDS> &own) {
    uint32_t lane = threadIdx.x % 32, number = c.kept[w.kept_at + i];
    own.root = w.pair.root_table[number];
    fetch_step(own.step, sketches_of(w, own.root, dim, 0), groups_of(own.root, 0), dim);
    own.begin = own.root.tokens;
    if (lane < own.root.leaves)
        own.begin = w.pair.leaf_begin[own.root.first_leaf + lane] - own.root.first_slot;
    own.end = __shfl_down_sync(FULL_WARP, own.begin, 1);
    if (lane + 1 >= own.root.leaves) own.end = own.root.tokens;
    own.centre = centre_of(look, c, w, number, v.g);
    own.out = c.leaf_score + w.head.leaf_at * look.vectors +
              (size_t)(w.first + v.g) * w.head.leaves + c.leaf_place[w.kept_at + number];
}

/* Scores of leaves [first, last) of the root, which are summed: two lanes for a leaf and a word of
 * sums, each for every other token, and then for one of the word's vectors. */
template <int WORDS>
static __device__ __forceinline__ void put_leaves(const lot_work &w, const root_lane<WORDS> &own,
                                                  const lane_vector &v, const uint4 *ring,
                                                  uint32_t first, uint32_t last) {
    for (uint32_t from = first; from < last; from += 4) { /* whole warps */
        uint32_t l = from + threadIdx.x % 32 / 8, top = 0;
        uint32_t begin = __shfl_sync(FULL_WARP, own.begin, (int)(l % 32));
        uint32_t end = __shfl_sync(FULL_WARP, own.end, (int)(l % 32));
        if (l >= last) begin = end = 0;
        for (uint32_t t = begin + v.half; t < end; t += 8) {
            uint32_t sum[4]; /* all under way at once, the last one again behind the leaf's end */
#pragma unroll
            for (uint32_t j = 0; j < 4; j++)
                sum[j] =
                    ((const uint32_t *)ring)[(min(t + 2 * j, end - 1) * 4 + v.word) % (RING * 4)];
            top = __vmaxu2(__vmaxu2(top, __vmaxu2(sum[0], sum[1])), __vmaxu2(sum[2], sum[3]));
        }
        top = __vmaxu2(top, __shfl_xor_sync(FULL_WARP, top, 1));
        if (l >= last || v.g >= w.count) continue;
        bool live = live_bits(&w.pair, own.root.first_slot + begin, end - begin);
        float sum = (float)(v.half ? top >> 16 : top & 0xffffu);
        own.out[l] = live ? own.centre + v.base + v.scale * sum : -INFINITY;
    }
}

/* Sums of a lane's tokens t and 16 further: all of them for the candidates, those of live tokens
 * for the leaves. */
static __device__ __forceinline__ void keep_sums(const loci_cuda_choice &c, const lot_work &w,
                                                 const loci_cuda_root &root, uint32_t t,
                                                 const uint4 (&sum)[2], uint4 *ring) {
#pragma unroll
    for (uint32_t i = 0; i < 2; i++, t += 16) {
        if (t >= root.tokens) break;
        bool live = live_bits(&w.pair, root.first_slot + t, 1);
        ring[t % RING] = live ? sum[i] : uint4{0, 0, 0, 0};
        if (c.sums) c.sums[w.sums_at + root.first_slot + t] = sum[i];
    }
}

/* DIM: the channels, or 0 where that is not known. */
template <int DIM>
static __global__ void __launch_bounds__(THREADS)
    k_score_leaves(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    const uint32_t dim = DIM ? DIM : look.dim, lane = threadIdx.x % 32;
    const lot_work w = work_of(look, c);
    if (blockIdx.y * WARPS >= w.kept) return;
    const lane_vector v = vector_of_lane(look, c, w);
    root_lane<(DIM ? DIM : MAX_DIM) / 64> own;
    uint32_t i = blockIdx.y * WARPS + threadIdx.x / 32, stride = gridDim.y * WARPS;
    if (i < w.kept) open_root(look, c, w, v, dim, i, own); /* comes while the table does */
    const warp_memory m = open_memory(look, c, w, dim, shared);
    __syncthreads();
    for (; i < w.kept; i += stride) {
        const loci_cuda_root root = own.root;
        uint32_t ready = 0;
        for (uint32_t base = 0; base < root.tokens; base += STEP) {
            uint32_t done = base + STEP;
            uint4 sum[2];
            put_step(own.step, m.columns, groups_of(root, base), dim);
            __syncwarp();
            if (done < root.tokens)
                fetch_step(own.step, sketches_of(w, root, dim, done), groups_of(root, done), dim);
            else
                done = root.tokens;
            add_columns(m, dim, sum);
            keep_sums(c, w, root, lane_token(base), sum, m.ring);
            __syncwarp();
            uint32_t now = __popc(__ballot_sync(FULL_WARP, lane < root.leaves && own.end <= done));
            put_leaves(w, own, v, m.ring, ready, now);
            ready = now;
            __syncwarp();
        }
        if (i + stride < w.kept) open_root(look, c, w, v, dim, i + stride, own);
    }
}

/* --- floors ------------------------------------------------------------------------------ */

#define FLOOR_HELD (40u << 10) /* with those in registers all leaves of a million tokens, about */

/* One block for each (KV head, vector). held: values that there is shared memory for. */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_floors(const loci_cuda_look look, const loci_cuda_choice c, uint32_t held) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    await_previous();
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.leaf_score + head->leaf_at * look.vectors + (size_t)v * head->leaves;
    uint32_t n = c.leaf_count[(size_t)h * look.rows + v / look.group];
    float top, kth = radix_kth(memory, score, n, c.candidates_wanted, &top, held);
    top = fmaxf(top, look.steady[blockIdx.x]);
    if (threadIdx.x == 0) c.floor[blockIdx.x] = fmaxf(fmaxf(kth, top - c.reach), -FLT_MAX);
}

extern "C" cudaError_t loci_cuda_k_leaves(cudaStream_t stream, const loci_cuda_look *look,
                                          const loci_cuda_choice *choice, size_t block_bytes) {
    if (look->extents == 0) return cudaSuccess;
    auto kernel = look->dim == 64    ? k_score_leaves<64>
                  : look->dim == 128 ? k_score_leaves<128>
                                     : k_score_leaves<0>;
    cudaError_t result = launch_behind(stream, kernel, share_roots(look), THREADS,
                                       memory_bytes(look->dim), *look, *choice);
    if (result != cudaSuccess) return result;
    size_t most = (size_t)look->leaves_max * look->extents, own = KTH_EACH * RADIX_THREADS;
    size_t room = (block_bytes - sizeof(radix_memory) - 1024) / sizeof(float);
    uint32_t held = most <= own ? 0 : (uint32_t)(room < FLOOR_HELD ? room : FLOOR_HELD);
    return launch_behind(stream, k_floors, look->kv_heads * look->vectors, RADIX_THREADS,
                         sizeof(radix_memory) + held * sizeof(float), *look, *choice, held);
}
