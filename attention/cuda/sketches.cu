/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 2 of mode hierarchical: the leaves of kept roots by the highest of their tokens' sketches,
 * the floors, and the candidates that reach one.
 *
 * A block takes one root: its sketches (dim / 8 bytes a token) come to shared memory once, then the
 * rows that keep the root pass, a token a thread. Sums of table entries are integers.
 */
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/radix.cuh"

#define THREADS 256u
#define PARTS_MAX (MAX_DIM / 4)
#define GROUP 32u /* tokens whose sketches are interleaved */

/* --- tables ---------------------------------------------------------------------------- */

/* A lane has parts lane and lane + 32. Sums run in the CPU's order. */
static __global__ void k_tables(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ float value[PARTS_MAX][16], low[PARTS_MAX], high[PARTS_MAX];
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    size_t at = (size_t)blockIdx.y * look.vectors + blockIdx.x;
    const float *q = look.q + ((size_t)pair->kv_head * look.vectors + blockIdx.x) * look.dim;
    uint32_t parts = look.dim / 4;
    for (uint32_t p = threadIdx.x; p < parts; p += 32) {
        const float *book = pair->codebook + (size_t)p * 64;
        float least = 0.0f, most = 0.0f;
        for (uint32_t w = 0; w < 16; w++) {
            float sum = 0.0f;
            for (uint32_t i = 0; i < 4; i++) sum += q[p * 4 + i] * book[i * 16 + w];
            value[p][w] = sum;
            least = w == 0 || sum < least ? sum : least;
            most = w == 0 || sum > most ? sum : most;
        }
        low[p] = least;
        high[p] = most;
    }
    __syncwarp();
    float base = 0.0f, widest = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        widest = high[p] - low[p] > widest ? high[p] - low[p] : widest;
        base += low[p];
    }
    bool usable = widest > 1e-30f && widest < 1e30f;
    float inverse = usable ? 255.0f / widest : 0.0f;
    uint8_t *table = c.table + at * parts * 16;
    for (uint32_t i = threadIdx.x; i < parts * 16; i += 32) {
        float step = (value[i / 16][i % 16] - low[i / 16]) * inverse + 0.5f;
        step = step < 256.0f ? step : 0.0f; /* products of a hostile codebook may be NaN */
        table[i] = (uint8_t)(int32_t)step;
    }
    if (threadIdx.x != 0) return;
    c.table_base[at] = base;
    c.table_scale[at] = usable ? widest / 255.0f : 0.0f;
}

/* --- sums of a root's tokens ----------------------------------------------------------- */

struct root_memory {
    uint32_t sketches[MAX_ROOT * MAX_DIM / 8 / 4];
    uint32_t table[PARTS_MAX * 4];
    uint16_t sum[MAX_ROOT];
};

struct root_place {
    const loci_cuda_pair *pair;
    const loci_cuda_head *head;
    const loci_cuda_root *root;
    uint32_t index, number; /* of the pair; of the root among the head's */
};

static __device__ __forceinline__ bool root_of(const loci_cuda_look &look, root_place *p) {
    p->index = blockIdx.y;
    p->pair = &look.pairs[blockIdx.y];
    p->head = &look.heads[p->pair->kv_head];
    if (blockIdx.x >= p->pair->roots) return false;
    p->root = &p->pair->root_table[blockIdx.x];
    p->number = p->pair->root_base + blockIdx.x;
    return true;
}

static __device__ __forceinline__ bool keeps(const loci_cuda_look &look, const loci_cuda_choice &c,
                                             const root_place &p, uint32_t row) {
    return c.root_kept[p.head->root_at * look.rows + (size_t)row * p.head->roots + p.number] != 0;
}

/* Whether any row keeps the root; all threads agree. */
static __device__ bool anyone_keeps(const loci_cuda_look &look, const loci_cuda_choice &c,
                                    const root_place &p) {
    int any = 0;
    for (uint32_t row = threadIdx.x; row < look.rows; row += THREADS) any |= keeps(look, c, p, row);
    return __syncthreads_or(any) != 0;
}

static __device__ void load_sketches(const loci_cuda_look &look, const root_place &p,
                                     root_memory *m) {
    uint32_t words = (p.root->tokens + GROUP - 1) / GROUP * (look.dim / 4) * 4;
    const uint32_t *from = (const uint32_t *)(p.pair->blob + p.root->sketches_at);
    for (uint32_t i = threadIdx.x; i < words; i += THREADS) m->sketches[i] = from[i];
}

static __device__ void load_table(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const root_place &p, uint32_t v, root_memory *m) {
    const uint32_t *from =
        (const uint32_t *)(c.table + ((size_t)p.index * look.vectors + v) * look.dim * 4);
    for (uint32_t i = threadIdx.x; i < look.dim; i += THREADS) m->table[i] = from[i];
}

static __device__ __forceinline__ uint32_t token_sum(const loci_cuda_look &look,
                                                     const root_memory *m, uint32_t t) {
    uint32_t parts = look.dim / 4, within = t % GROUP, sum = 0;
    const uint8_t *bytes =
        (const uint8_t *)m->sketches + (size_t)(t / GROUP) * parts * 16 + within % 16;
    const uint8_t *table = (const uint8_t *)m->table;
    uint32_t shift = within < 16 ? 0 : 4;
    for (uint32_t i = 0; i < parts; i++) sum += table[i * 16 + (bytes[i * 16] >> shift & 15u)];
    return sum;
}

/* q.(mean + root) and what turns a sum into an estimate. */
struct estimate {
    float centre, base, scale;
};

static __device__ __forceinline__ estimate estimate_for(const loci_cuda_look &look,
                                                        const loci_cuda_choice &c,
                                                        const root_place &p, uint32_t v) {
    size_t q = (size_t)p.pair->kv_head * look.vectors + v;
    size_t at = (size_t)p.index * look.vectors + v;
    const uint8_t *node = p.pair->root_nodes + (size_t)blockIdx.x * p.pair->node_stride;
    estimate e = {
        centre_score(node, look.q8 + q * look.dim, look.q_scale[q], look.mean_terms[at], look.dim),
        c.table_base[at], c.table_scale[at]};
    return e;
}

static __device__ __forceinline__ float value_of(const estimate &e, uint32_t sum) {
    return e.centre + e.base + e.scale * (float)sum;
}

/* --- leaves ---------------------------------------------------------------------------- */

static __device__ void put_leaves(const root_place &p, const root_memory *m, const estimate &e,
                                  float *out) {
    for (uint32_t l = threadIdx.x; l < p.root->leaves; l += THREADS) {
        uint32_t begin = p.pair->leaf_begin[p.root->first_leaf + l];
        uint32_t count = p.pair->leaf_begin[p.root->first_leaf + l + 1] - begin, top = 0;
        uint32_t live = live_bits(p.pair, begin, count), all = live;
        for (; live; live &= live - 1) {
            uint32_t sum = m->sum[begin - p.root->first_slot + __ffs((int)live) - 1];
            top = sum > top ? sum : top;
        }
        out[p.root->first_leaf + l] = all ? value_of(e, top) : -INFINITY;
    }
}

static __global__ void __launch_bounds__(THREADS)
    k_score_leaves(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    root_memory *m = (root_memory *)shared;
    root_place p;
    if (!root_of(look, &p)) return;
    bool any = anyone_keeps(look, c, p);
    if (any) load_sketches(look, p, m);
    for (uint32_t v = 0; v < look.vectors; v++) {
        float *out = c.leaf_score + p.head->leaf_at * look.vectors + (size_t)v * p.head->leaves +
                     p.pair->leaf_base;
        if (!any || !keeps(look, c, p, v / look.group)) {
            for (uint32_t l = threadIdx.x; l < p.root->leaves; l += THREADS)
                out[p.root->first_leaf + l] = -INFINITY;
            continue;
        }
        load_table(look, c, p, v, m);
        __syncthreads();
        for (uint32_t t = threadIdx.x; t < p.root->tokens; t += THREADS)
            m->sum[t] = (uint16_t)token_sum(look, m, t);
        __syncthreads();
        put_leaves(p, m, estimate_for(look, c, p, v), out);
        __syncthreads();
    }
}

/* --- floors ---------------------------------------------------------------------------- */

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    __shared__ float buffer[WARPS_MAX];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.leaf_score + head->leaf_at * look.vectors + (size_t)v * head->leaves;
    float top = -INFINITY;
    for (uint32_t i = threadIdx.x; i < head->leaves; i += RADIX_THREADS) top = fmaxf(top, score[i]);
    top = fmaxf(block_max(top, buffer), look.steady[blockIdx.x]);
    float kth = radix_kth(memory, score, head->leaves, c.candidates_wanted);
    if (threadIdx.x == 0) c.floor[blockIdx.x] = fmaxf(fmaxf(kth, top - c.reach), -FLT_MAX);
}

extern "C" cudaError_t loci_cuda_k_leaves(cudaStream_t stream, const loci_cuda_look *look,
                                          const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 tables(look->vectors, look->extents * look->kv_heads);
    dim3 roots(look->roots_max, look->extents * look->kv_heads);
    cudaError_t result = cudaFuncSetAttribute(
        k_score_leaves, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(root_memory));
    if (result != cudaSuccess) return result;
    k_tables<<<tables, 32, 0, stream>>>(*look, *choice);
    k_score_leaves<<<roots, THREADS, sizeof(root_memory), stream>>>(*look, *choice);
    k_floors<<<look->kv_heads * look->vectors, RADIX_THREADS, sizeof(radix_memory), stream>>>(
        *look, *choice);
    return cudaGetLastError();
}

/* --- candidates ------------------------------------------------------------------------ */

/* Whether any leaf of the root reaches the floor of any vector of the row; all threads agree. */
static __device__ bool row_reaches(const loci_cuda_look &look, const loci_cuda_choice &c,
                                   const root_place &p, uint32_t row) {
    int any = 0;
    for (uint32_t i = threadIdx.x; i < p.root->leaves * look.group; i += THREADS) {
        uint32_t v = row * look.group + i / p.root->leaves;
        const float *score = c.leaf_score + p.head->leaf_at * look.vectors +
                             (size_t)v * p.head->leaves + p.pair->leaf_base;
        any |= score[p.root->first_leaf + i % p.root->leaves] >=
               c.floor[(size_t)p.pair->kv_head * look.vectors + v];
    }
    return __syncthreads_or(any) != 0;
}

static __global__ void __launch_bounds__(THREADS)
    k_mark_candidates(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    root_memory *m = (root_memory *)shared;
    root_place p;
    if (!root_of(look, &p) || !anyone_keeps(look, c, p)) return;
    bool loaded = false;
    uint32_t rounded = (p.root->tokens + 31) / 32 * 32;
    for (uint32_t row = 0; row < look.rows; row++) {
        if (!keeps(look, c, p, row) || !row_reaches(look, c, p, row)) continue;
        if (!loaded) load_sketches(look, p, m);
        loaded = true;
        uint32_t *words = c.candidates + mask_at(look, p.pair, row);
        for (uint32_t g = 0; g < look.group; g++) {
            uint32_t v = row * look.group + g;
            float floor = c.floor[(size_t)p.pair->kv_head * look.vectors + v];
            estimate e = estimate_for(look, c, p, v);
            __syncthreads();
            load_table(look, c, p, v, m);
            __syncthreads();
            for (uint32_t t = threadIdx.x; t < rounded; t += THREADS) {
                bool hit = t < p.root->tokens && value_of(e, token_sum(look, m, t)) >= floor;
                uint32_t bits = __ballot_sync(FULL_WARP, hit);
                if (threadIdx.x % 32 != 0 || !bits) continue;
                uint32_t left = p.root->tokens - t, slot = p.root->first_slot + t;
                or_bits(words, slot, bits & live_bits(p.pair, slot, left < 32 ? left : 32));
            }
        }
    }
}

extern "C" cudaError_t loci_cuda_k_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                              const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 roots(look->roots_max, look->extents * look->kv_heads);
    cudaError_t result = cudaFuncSetAttribute(
        k_mark_candidates, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(root_memory));
    if (result != cudaSuccess) return result;
    k_mark_candidates<<<roots, THREADS, sizeof(root_memory), stream>>>(*look, *choice);
    return cudaGetLastError();
}
