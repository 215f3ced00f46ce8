/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 2 of mode hierarchical: the leaves of kept roots by the highest of their tokens' sketches,
 * the floors, and the candidates that reach one.
 *
 * A block takes one root: its sketches (dim / 8 bytes a token) come to shared memory once, then the
 * rows that keep the root pass, a token a thread. Sums of table entries are integers of 16 bits,
 * those of a lot of LOCI_CUDA_LOT vectors side by side: one look-up and four additions serve them
 * all.
 */
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/radix.cuh"

#define THREADS 256u
#define PARTS_MAX (MAX_DIM / 4)
#define GROUP 32u /* tokens whose sketches are interleaved */
#define LOT LOCI_CUDA_LOT
#define BLOCKS 1024u /* that share the kept roots */

/* --- tables ---------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t lots_of(const loci_cuda_look &look) {
    return (look.group + LOT - 1) / LOT;
}

/* The entries of one lot of a row: 4 dim of LOT bytes. */
static __device__ __forceinline__ uint4 *table_of(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, uint32_t pair,
                                                  uint32_t row, uint32_t lot) {
    size_t at = ((size_t)pair * look.rows + row) * lots_of(look) + lot;
    return (uint4 *)(c.table + at * look.dim * 4 * LOT);
}

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
    uint32_t row = blockIdx.x / look.group, g = blockIdx.x % look.group;
    uint8_t *table = (uint8_t *)table_of(look, c, blockIdx.y, row, g / LOT) + g % LOT;
    for (uint32_t i = threadIdx.x; i < parts * 16; i += 32) {
        float step = (value[i / 16][i % 16] - low[i / 16]) * inverse + 0.5f;
        step = step < 256.0f ? step : 0.0f; /* products of a hostile codebook may be NaN */
        table[i * LOT] = (uint8_t)(int32_t)step;
    }
    if (threadIdx.x != 0) return;
    c.table_base[at] = base;
    c.table_scale[at] = usable ? widest / 255.0f : 0.0f;
}

/* --- sums of a root's tokens ----------------------------------------------------------- */

/* Behind it: sums, sketches and listed tokens of a root, each as long as the largest root needs. */
struct root_memory {
    uint4 table[MAX_DIM * 4 * LOT / 16];
    float centre[LOT], base[LOT], scale[LOT], floor[LOT];
    alignas(16) uint32_t near[MAX_ROOT / 32], before[MAX_ROOT / 32 + 1];
    uint4 *sum; /* see vector_of */
    uint2 *sketches;
    uint16_t *list;
};

static __host__ __device__ __forceinline__ uint32_t tokens_room(const loci_cuda_look &look) {
    return (look.root_tokens_max + GROUP - 1) / GROUP * GROUP;
}

static size_t memory_bytes(const loci_cuda_look &look) {
    return sizeof(root_memory) +
           (size_t)tokens_room(look) * (sizeof(uint4) + look.dim / 8 + sizeof(uint16_t));
}

/* The memory of this block. */
static __device__ __forceinline__ root_memory *lay_out(const loci_cuda_look &look, float4 *shared) {
    root_memory *m = (root_memory *)shared;
    if (threadIdx.x == 0) {
        m->sum = (uint4 *)(m + 1);
        m->sketches = (uint2 *)(m->sum + tokens_room(look));
        m->list = (uint16_t *)(m->sketches + (size_t)tokens_room(look) * look.dim / 64);
    }
    __syncthreads();
    return m;
}

struct root_place {
    const loci_cuda_pair *pair;
    const loci_cuda_head *head;
    const loci_cuda_root *root;
    uint32_t index, number; /* of the pair; of the root among the head's */
};

static __device__ __forceinline__ root_place place_of(const loci_cuda_look &look,
                                                      const loci_cuda_choice &c, uint32_t i) {
    root_place p;
    uint32_t root = c.kept[i].root;
    p.index = c.kept[i].pair;
    p.pair = &look.pairs[p.index];
    p.head = &look.heads[p.pair->kv_head];
    p.root = &p.pair->root_table[root];
    p.number = p.pair->root_base + root;
    return p;
}

static __device__ __forceinline__ size_t root_score_at(const loci_cuda_look &look,
                                                       const root_place &p, uint32_t v) {
    return p.head->root_at * look.vectors + (size_t)v * p.head->roots + p.number;
}

/* Of a row, in root_kept and leaf_place. */
static __device__ __forceinline__ size_t kept_at(const loci_cuda_look &look, const root_place &p,
                                                 uint32_t row) {
    return p.head->root_at * look.rows + (size_t)row * p.head->roots + p.number;
}

/* Of the leaves of the root for vector 0; the next vector's stand head->leaves further. */
static __device__ __forceinline__ float *leaf_scores(const loci_cuda_look &look,
                                                     const loci_cuda_choice &c, const root_place &p,
                                                     uint32_t row) {
    return c.leaf_score + p.head->leaf_at * look.vectors + c.leaf_place[kept_at(look, p, row)];
}

static __device__ void load_sketches(const loci_cuda_look &look, const root_place &p,
                                     root_memory *m) {
    uint32_t count = (p.root->tokens + GROUP - 1) / GROUP * (look.dim / 2);
    const uint2 *from = (const uint2 *)(p.pair->blob + p.root->sketches_at);
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) m->sketches[i] = from[i];
}

/* The table of a lot, and what turns its sums into estimates. */
static __device__ void load_lot(const loci_cuda_look &look, const loci_cuda_choice &c,
                                const root_place &p, uint32_t row, uint32_t lot, root_memory *m) {
    const uint4 *from = table_of(look, c, p.index, row, lot);
    for (uint32_t i = threadIdx.x; i < look.dim * 4 * LOT / 16; i += THREADS) m->table[i] = from[i];
    uint32_t g = lot * LOT + threadIdx.x, v = row * look.group + g;
    if (threadIdx.x >= LOT || g >= look.group) return;
    size_t at = (size_t)p.index * look.vectors + v;
    m->centre[threadIdx.x] = c.root_centre[root_score_at(look, p, v)];
    m->base[threadIdx.x] = c.table_base[at];
    m->scale[threadIdx.x] = c.table_scale[at];
    m->floor[threadIdx.x] = c.floor[(size_t)p.pair->kv_head * look.vectors + v];
}

/* The sums of token t of the root for all vectors of a lot. Of a word of entries the first sum has
 * bytes 0 and 2, into which 1 and 3 carry, the second has bytes 1 and 3. */
static __device__ __forceinline__ uint4 token_sums(const root_memory *m, uint32_t t, uint32_t dim) {
    uint32_t parts = dim / 4, within = t % GROUP, shift = within < 16 ? 0 : 4;
    const uint8_t *bytes =
        (const uint8_t *)m->sketches + (size_t)(t / GROUP) * parts * 16 + within % 16;
    const uint2 *table = (const uint2 *)m->table;
    uint4 sum = {0, 0, 0, 0};
#pragma unroll 8
    for (uint32_t i = 0; i < parts; i++) {
        uint2 entry = table[i * 16 + (bytes[i * 16] >> shift & 15u)];
        sum.x += entry.x;
        sum.y += __byte_perm(entry.x, 0, 0x4341);
        sum.z += entry.y;
        sum.w += __byte_perm(entry.y, 0, 0x4341);
    }
    sum.x -= sum.y << 8;
    sum.z -= sum.w << 8;
    return sum;
}

/* Word w of sums, and its half, belong to vector (w / 2) * 4 + w % 2 + 2 * half of the lot. */
static __device__ __forceinline__ uint32_t vector_of(uint32_t w, uint32_t half) {
    return w / 2 * 4 + w % 2 + 2 * half;
}

static __device__ __forceinline__ float value_of(const root_memory *m, uint32_t g, uint32_t sum) {
    return m->centre[g] + m->base[g] + m->scale[g] * (float)sum;
}

/* --- leaves ---------------------------------------------------------------------------- */

/* A thread for a leaf and two vectors of the lot. */
static __device__ void put_leaves(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const root_place &p, uint32_t row, uint32_t lot,
                                  const root_memory *m) {
    float *out = leaf_scores(look, c, p, row);
    for (uint32_t i = threadIdx.x; i < p.root->leaves * 4; i += THREADS) {
        uint32_t l = i / 4, w = i % 4, top = 0;
        uint32_t begin = p.pair->leaf_begin[p.root->first_leaf + l];
        uint32_t count = p.pair->leaf_begin[p.root->first_leaf + l + 1] - begin;
        uint32_t live = live_bits(p.pair, begin, count);
        const uint32_t *sums = (const uint32_t *)(m->sum + (begin - p.root->first_slot)) + w;
        for (uint32_t left = live; left; left &= left - 1)
            top = __vmaxu2(top, sums[4 * (__ffs((int)left) - 1)]);
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t g = vector_of(w, half), in_row = lot * LOT + g;
            if (in_row >= look.group) continue;
            float value = value_of(m, g, half ? top >> 16 : top & 0xffffu);
            out[(size_t)(row * look.group + in_row) * p.head->leaves + l] =
                live ? value : -INFINITY;
        }
    }
}

static __global__ void __launch_bounds__(THREADS)
    k_score_leaves(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    root_memory *m = lay_out(look, shared);
    for (uint32_t i = blockIdx.x; i < *c.kept_count; i += gridDim.x) {
        root_place p = place_of(look, c, i);
        load_sketches(look, p, m);
        for (uint32_t row = 0; row < look.rows; row++) {
            if (!c.root_kept[kept_at(look, p, row)]) continue;
            for (uint32_t lot = 0; lot < lots_of(look); lot++) {
                load_lot(look, c, p, row, lot, m);
                __syncthreads();
                for (uint32_t t = threadIdx.x; t < p.root->tokens; t += THREADS)
                    m->sum[t] = token_sums(m, t, look.dim);
                __syncthreads();
                put_leaves(look, c, p, row, lot, m);
                __syncthreads();
            }
        }
    }
}

/* --- floors ---------------------------------------------------------------------------- */

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.leaf_score + head->leaf_at * look.vectors + (size_t)v * head->leaves;
    uint32_t n = c.leaf_count[(size_t)h * look.rows + v / look.group];
    float top, kth = radix_kth(memory, score, n, c.candidates_wanted, &top);
    top = fmaxf(top, look.steady[blockIdx.x]);
    if (threadIdx.x == 0) c.floor[blockIdx.x] = fmaxf(fmaxf(kth, top - c.reach), -FLT_MAX);
}

template <typename KERNEL>
static cudaError_t launch_roots(cudaStream_t stream, const loci_cuda_look *look,
                                const loci_cuda_choice *choice, KERNEL kernel) {
    uint64_t roots = look->roots_all < BLOCKS ? look->roots_all : BLOCKS;
    size_t bytes = memory_bytes(*look);
    cudaError_t result =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    kernel<<<(uint32_t)roots, THREADS, bytes, stream>>>(*look, *choice);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_leaves(cudaStream_t stream, const loci_cuda_look *look,
                                          const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 tables(look->vectors, look->extents * look->kv_heads);
    k_tables<<<tables, 32, 0, stream>>>(*look, *choice);
    cudaError_t result = launch_roots(stream, look, choice, k_score_leaves);
    if (result != cudaSuccess) return result;
    k_floors<<<look->kv_heads * look->vectors, RADIX_THREADS, sizeof(radix_memory), stream>>>(
        *look, *choice);
    return cudaGetLastError();
}

/* --- candidates ------------------------------------------------------------------------ */

/* Into m->list the live tokens of leaves that reach the floor of any vector of the row: only there
 * can a token reach one. Returns how many; all threads agree. */
static __device__ uint32_t list_near(const loci_cuda_look &look, const loci_cuda_choice &c,
                                     const root_place &p, uint32_t row, root_memory *m) {
    const float *score = leaf_scores(look, c, p, row);
    uint32_t t = threadIdx.x;
    __syncthreads();
    if (t < MAX_ROOT / 32) m->near[t] = 0;
    __syncthreads();
    for (uint32_t i = t; i < p.root->leaves * look.group; i += THREADS) {
        uint32_t l = i % p.root->leaves, v = row * look.group + i / p.root->leaves;
        float floor = c.floor[(size_t)p.pair->kv_head * look.vectors + v];
        if (!(score[(size_t)v * p.head->leaves + l] >= floor)) continue;
        uint32_t begin = p.pair->leaf_begin[p.root->first_leaf + l];
        uint32_t count = p.pair->leaf_begin[p.root->first_leaf + l + 1] - begin;
        or_bits(m->near, begin - p.root->first_slot, live_bits(p.pair, begin, count));
    }
    __syncthreads();
    if (t < 32) { /* MAX_ROOT / 32 words */
        uint32_t own = __popc(m->near[t]), sum = own;
        for (int offset = 1; offset < 32; offset *= 2) {
            uint32_t before = __shfl_up_sync(FULL_WARP, sum, offset);
            if (t >= (uint32_t)offset) sum += before;
        }
        m->before[t] = sum - own;
        if (t == 31) m->before[32] = sum;
    }
    __syncthreads();
    for (uint32_t i = t; i < p.root->tokens; i += THREADS) {
        uint32_t bits = m->near[i / 32];
        if (bits >> (i % 32) & 1)
            m->list[m->before[i / 32] + __popc(bits & ((1u << (i % 32)) - 1))] = (uint16_t)i;
    }
    __syncthreads();
    return m->before[32];
}

/* Whether any vector of the lot, of which `count` are there, reaches its floor. */
static __device__ __forceinline__ bool reaches(const root_memory *m, uint4 sum, uint32_t count) {
    uint32_t words[4] = {sum.x, sum.y, sum.z, sum.w};
    bool hit = false;
#pragma unroll
    for (uint32_t w = 0; w < 4; w++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t g = vector_of(w, half);
            if (g < count)
                hit = hit ||
                      value_of(m, g, half ? words[w] >> 16 : words[w] & 0xffffu) >= m->floor[g];
        }
    return hit;
}

/* Candidates of one row below the root. */
static __device__ void mark_row(const loci_cuda_look &look, const loci_cuda_choice &c,
                                const root_place &p, uint32_t row, uint32_t count, root_memory *m) {
    uint32_t *words = c.candidates + mask_at(look, p.pair, row);
    for (uint32_t lot = 0; lot < lots_of(look); lot++) {
        uint32_t left = look.group - lot * LOT;
        __syncthreads();
        load_lot(look, c, p, row, lot, m);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
            uint32_t t = m->list[i], slot = p.root->first_slot + t;
            if (reaches(m, token_sums(m, t, look.dim), left < LOT ? left : LOT))
                atomicOr(&words[slot / 32], 1u << (slot % 32));
        }
    }
}

static __global__ void __launch_bounds__(THREADS)
    k_mark_candidates(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    root_memory *m = lay_out(look, shared);
    for (uint32_t i = blockIdx.x; i < *c.kept_count; i += gridDim.x) {
        root_place p = place_of(look, c, i);
        bool loaded = false;
        for (uint32_t row = 0; row < look.rows; row++) {
            if (!c.root_kept[kept_at(look, p, row)]) continue;
            uint32_t count = list_near(look, c, p, row, m);
            if (count == 0) continue;
            if (!loaded) load_sketches(look, p, m);
            loaded = true;
            mark_row(look, c, p, row, count, m);
        }
        __syncthreads();
    }
}

extern "C" cudaError_t loci_cuda_k_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                              const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    return launch_roots(stream, look, choice, k_mark_candidates);
}
