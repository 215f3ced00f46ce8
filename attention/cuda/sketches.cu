/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 2 of mode hierarchical: the leaves of kept roots by the highest of their tokens' sketches,
 * the floors, which a limit to candidates may raise, and the candidates that reach one.
 *
 * A block has the table of one lot of LOCI_CUDA_LOT vectors in shared memory, a warp takes one root
 * after another: the codewords of 64 tokens come to it transposed, so that a lane has those of two
 * tokens. Sums of table entries are integers of 16 bits, those of a lot side by side: one look-up
 * and a few additions serve all its vectors. They are kept for the candidates: 16 bytes a token,
 * which mostly stay in the L2.
 */
#include "attention/cuda/nodes.cuh"
#include "attention/cuda/query.cuh"
#include "attention/cuda/radix.cuh"

#define WARPS 4u
#define THREADS (32 * WARPS)
#define PREPARE_THREADS 256u
#define PARTS_MAX (MAX_DIM / 4)
#define GROUP 32u /* tokens whose sketches are interleaved */
#define LOT LOCI_CUDA_LOT
#define STEP (2 * GROUP) /* tokens that a warp sums at a time */
#define RING (4 * GROUP) /* tokens whose sums it remembers: of a step, and of a leaf before it */
#define BLOCKS 1600u     /* that share the kept roots, about */
#define PART_BYTES 128u  /* of a table */
#define SUMS_ALIGN 128u

/* --- what a vector knows of a pair ------------------------------------------------------- */

/* The entries of one lot of a row: 4 dim of LOT bytes. */
static __device__ __forceinline__ uint4 *table_of(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, uint32_t pair,
                                                  uint32_t row, uint32_t lot) {
    size_t at = ((size_t)pair * look.rows + row) * loci_cuda_lots(&look) + lot;
    return (uint4 *)(c.table + at * look.dim * 4 * LOT);
}

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

/* --- a warp's share ---------------------------------------------------------------------- */

/* The lot, and the kept roots, that a block works on; blockIdx: pair and row, share, lot. */
struct lot_work {
    loci_cuda_pair pair; /* read once, not behind every result that is written */
    loci_cuda_head head;
    uint32_t index, row, lot, kept;
    uint32_t first, count; /* vectors of the lot */
    size_t kept_at;        /* of the pair's first root, as in root_kept */
    size_t sums_at;        /* of the pair's first slot */
};

static __device__ __forceinline__ lot_work work_of(const loci_cuda_look &look,
                                                   const loci_cuda_choice &c) {
    lot_work w;
    w.index = blockIdx.x / look.rows;
    w.row = blockIdx.x % look.rows;
    w.lot = blockIdx.z;
    w.pair = look.pairs[w.index];
    w.head = look.heads[w.pair.kv_head];
    w.kept = c.kept_count[blockIdx.x];
    w.first = w.row * look.group + w.lot * LOT;
    uint32_t left = look.group - w.lot * LOT;
    w.count = left < LOT ? left : LOT;
    w.kept_at = w.head.root_at * look.rows + (size_t)w.row * w.head.roots + w.pair.root_base;
    size_t hr = (size_t)w.pair.kv_head * look.rows + w.row;
    w.sums_at = ((hr * gridDim.z + w.lot) * look.words + w.pair.word_base) * 32;
    return w;
}

static __device__ __forceinline__ float centre_of(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, const lot_work &w,
                                                  uint32_t root, uint32_t g) {
    if (g >= w.count) return 0.0f;
    return c.root_centre[w.head.root_at * look.vectors + (size_t)(w.first + g) * w.head.roots +
                         w.pair.root_base + root];
}

/* Shared memory of a block: the table, then for each warp sums of RING tokens and the codewords of
 * a step, a column for each two tokens. */
static __host__ __device__ __forceinline__ uint32_t column_words(uint32_t dim) {
    return dim / 16 | 1u; /* an odd number: no two columns share banks */
}

static __host__ __device__ __forceinline__ uint32_t warp_words(uint32_t dim) {
    return RING * 4 + 32 * column_words(dim);
}

static size_t memory_bytes(uint32_t dim) {
    return SUMS_ALIGN + (size_t)dim * 4 * LOT + WARPS * warp_words(dim) * sizeof(uint32_t);
}

struct warp_memory {
    uint32_t table; /* address */
    uint4 *ring;
    uint32_t *columns;
};

/* Brings the table of the block's lot; a barrier is the caller's. */
static __device__ __forceinline__ warp_memory open_memory(const loci_cuda_look &look,
                                                          const loci_cuda_choice &c,
                                                          const lot_work &w, uint32_t dim,
                                                          float4 *shared) {
    warp_memory m;
    uint32_t start = (uint32_t)__cvta_generic_to_shared(shared);
    uint32_t skip = (SUMS_ALIGN - start % SUMS_ALIGN) % SUMS_ALIGN;
    uint4 *table = (uint4 *)((uint8_t *)shared + skip), *from;
    uint32_t entries = dim * 4 * LOT / 16;
    from = table_of(look, c, w.index, w.row, w.lot);
    for (uint32_t i = threadIdx.x; i < entries; i += THREADS) table[i] = from[i];
    m.table = start + skip;
    m.ring = (uint4 *)((uint32_t *)(table + entries) + threadIdx.x / 32 * warp_words(dim));
    m.columns = (uint32_t *)(m.ring + RING);
    return m;
}

/* What a lane copies of a step: WORDS times four parts' bytes of four tokens. */
template <int WORDS> struct step_words { uint32_t word[WORDS][4]; };

/* Begins to read the sketches of up to two groups. */
template <int WORDS>
static __device__ __forceinline__ void fetch_step(step_words<WORDS> &step, const uint32_t *sketches,
                                                  uint32_t groups, uint32_t dim) {
#pragma unroll
    for (uint32_t k = 0; k < WORDS; k++) {
        uint32_t i = threadIdx.x % 32 + 32 * k, part = i / 4, group = part >= dim / 16;
        if (i >= groups * dim / 4) break;
        const uint32_t *from = sketches + group * dim + 16 * (part - group * (dim / 16)) + i % 4;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) step.word[k][j] = __ldg(from + 4 * j);
    }
}

/* Codewords to columns. Column i has those of tokens i / 16 * 32 + i % 16 and 16 more, in the low
 * and high nibbles of its bytes. */
template <int WORDS>
static __device__ __forceinline__ void put_step(const step_words<WORDS> &step, uint32_t *columns,
                                                uint32_t groups, uint32_t dim) {
    uint32_t width = column_words(dim);
#pragma unroll
    for (uint32_t k = 0; k < WORDS; k++) {
        uint32_t i = threadIdx.x % 32 + 32 * k, part = i / 4, group = part >= dim / 16;
        if (i >= groups * dim / 4) break;
        const uint32_t *w = step.word[k];
        uint32_t low = __byte_perm(w[0], w[1], 0x5140), high = __byte_perm(w[2], w[3], 0x5140);
        uint32_t *to = columns + (group * 16 + i % 4 * 4) * width + part - group * (dim / 16);
        to[0] = __byte_perm(low, high, 0x5410);
        to[width] = __byte_perm(low, high, 0x7632);
        low = __byte_perm(w[0], w[1], 0x7362);
        high = __byte_perm(w[2], w[3], 0x7362);
        to[2 * width] = __byte_perm(low, high, 0x5410);
        to[3 * width] = __byte_perm(low, high, 0x7632);
    }
}

/* Adds the entry of the codeword at bit BIT of a column's word, of PART in that word. Of a word of
 * entries the first sum has bytes 0 and 2, into which 1 and 3 carry, the second has bytes 1 and 3.
 */
template <int BIT, int PART>
static __device__ __forceinline__ void add_entry(uint4 &sum, uint32_t word, uint32_t table) {
    uint32_t x, y, at = ((BIT < 3 ? word << (3 - BIT) : word >> (BIT - 3)) & 0x78u) | table;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];"
                 : "=r"(x), "=r"(y)
                 : "r"(at), "n"(PART * (int)PART_BYTES));
    sum.x += x;
    sum.y += __byte_perm(x, 0, 0x4341);
    sum.z += y;
    sum.w += __byte_perm(y, 0, 0x4341);
}

/* Sums of this lane's two tokens for all vectors of the lot. */
static __device__ __forceinline__ void add_columns(const warp_memory &m, uint32_t dim,
                                                   uint4 (&sum)[2]) {
    uint32_t words = dim / 16;
    const uint32_t *column = m.columns + threadIdx.x % 32 * column_words(dim);
    sum[0] = sum[1] = uint4{0, 0, 0, 0};
#pragma unroll
    for (uint32_t r = 0; r < MAX_DIM / 16; r++) {
        if (r >= words) break;
        uint32_t word = column[r], table = m.table + r * 4 * PART_BYTES;
        add_entry<0, 0>(sum[0], word, table);
        add_entry<4, 0>(sum[1], word, table);
        add_entry<8, 1>(sum[0], word, table);
        add_entry<12, 1>(sum[1], word, table);
        add_entry<16, 2>(sum[0], word, table);
        add_entry<20, 2>(sum[1], word, table);
        add_entry<24, 3>(sum[0], word, table);
        add_entry<28, 3>(sum[1], word, table);
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        sum[i].x -= sum[i].y << 8;
        sum[i].z -= sum[i].w << 8;
    }
}

static __device__ __forceinline__ const uint32_t *
sketches_of(const lot_work &w, const loci_cuda_root &root, uint32_t dim, uint32_t base) {
    return (const uint32_t *)(w.pair.blob + root.sketches_at) + base / GROUP * dim;
}

static __device__ __forceinline__ uint32_t groups_of(const loci_cuda_root &root, uint32_t base) {
    return root.tokens - base > GROUP ? 2 : 1;
}

/* The first of this lane's two tokens of a step; the second stands 16 further. */
static __device__ __forceinline__ uint32_t lane_token(uint32_t base) {
    uint32_t lane = threadIdx.x % 32;
    return base + lane / 16 * GROUP + lane % 16;
}

/* Word w of sums, and its half, belong to vector (w / 2) * 4 + w % 2 + 2 * half of the lot. */
static __device__ __forceinline__ uint32_t vector_of(uint32_t w, uint32_t half) {
    return w / 2 * 4 + w % 2 + 2 * half;
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
#pragma unroll 4
        for (uint32_t t = begin + v.half; t < end; t += 2)
            top = __vmaxu2(top, ((const uint32_t *)ring)[(t * 4 + v.word) % (RING * 4)]);
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

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    await_previous();
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    const loci_cuda_head *head = &look.heads[h];
    const float *score = c.leaf_score + head->leaf_at * look.vectors + (size_t)v * head->leaves;
    uint32_t n = c.leaf_count[(size_t)h * look.rows + v / look.group];
    float top, kth = radix_kth(memory, score, n, c.candidates_wanted, &top);
    top = fmaxf(top, look.steady[blockIdx.x]);
    if (threadIdx.x == 0) c.floor[blockIdx.x] = fmaxf(fmaxf(kth, top - c.reach), -FLT_MAX);
}

/* As many blocks for each lot of a row and pair as they all together leave. */
static dim3 share_roots(const loci_cuda_look *look) {
    uint32_t rows = look->extents * look->kv_heads * look->rows, lots = loci_cuda_lots(look);
    uint32_t most = (look->roots_max + WARPS - 1) / WARPS, each = BLOCKS / rows / lots;
    if (each > most) each = most;
    return dim3(rows, each ? each : 1, lots);
}

extern "C" cudaError_t loci_cuda_k_leaves(cudaStream_t stream, const loci_cuda_look *look,
                                          const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    auto kernel = look->dim == 64    ? k_score_leaves<64>
                  : look->dim == 128 ? k_score_leaves<128>
                                     : k_score_leaves<0>;
    cudaError_t result = launch_behind(stream, kernel, share_roots(look), THREADS,
                                       memory_bytes(look->dim), *look, *choice);
    if (result != cudaSuccess) return result;
    return launch_behind(stream, k_floors, look->kv_heads * look->vectors, RADIX_THREADS,
                         sizeof(radix_memory), *look, *choice);
}

/* --- candidates -------------------------------------------------------------------------- */

#define AHEAD 4u /* steps whose sums are read together */
#define SUM_MAX (PARTS_MAX * 255u)
#define NO_SUM 0xffffu

/* What one vector, that of the lane, needs of a root's tokens; offset: the root's centre and the
 * base. */
struct lane_floor {
    float offset, scale, floor;
};

static __device__ __forceinline__ float estimate_of(const lane_floor &f, uint32_t sum) {
    return f.offset + f.scale * (float)sum;
}

/* The least sum whose estimate reaches the floor; NO_SUM if none does. */
static __device__ __forceinline__ uint32_t least_sum(const lane_floor &f) {
    if (!(estimate_of(f, SUM_MAX) >= f.floor)) return NO_SUM;
    float steps = (f.floor - f.offset) / f.scale;
    uint32_t sum = !(steps > 0.0f) ? 0 : steps < (float)SUM_MAX ? (uint32_t)steps : SUM_MAX;
    while (sum > 0 && estimate_of(f, sum - 1) >= f.floor) sum--;
    while (!(estimate_of(f, sum) >= f.floor)) sum++;
    return sum;
}

/* Not later, where the first use is. */
static __device__ __forceinline__ uint4 read_now(const uint4 *from) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

/* Least sums of a lot, side by side as sums are; the same in every lane. */
struct lot_least {
    uint32_t word[4];
};

static __device__ __forceinline__ void set_lot(lot_least &lot, const lane_floor &own) {
    uint32_t least = least_sum(own);
#pragma unroll
    for (uint32_t w = 0; w < 4; w++)
        lot.word[w] = __shfl_sync(FULL_WARP, least, (int)vector_of(w, 0)) |
                      __shfl_sync(FULL_WARP, least, (int)vector_of(w, 1)) << 16;
}

/* Whether any vector of the lot reaches its floor: where the greater one of a sum and the least is
 * the sum itself. */
static __device__ __forceinline__ bool reaches(const lot_least &lot, uint4 sum) {
    uint32_t x = __vmaxu2(sum.x, lot.word[0]) ^ sum.x, y = __vmaxu2(sum.y, lot.word[1]) ^ sum.y;
    uint32_t z = __vmaxu2(sum.z, lot.word[2]) ^ sum.z, w = __vmaxu2(sum.w, lot.word[3]) ^ sum.w;
    uint32_t off = __vminu2(__vminu2(x, y), __vminu2(z, w));
    return !(off & 0xffffu) || !(off >> 16);
}

/* All vectors' floors, the same in every lane. */
struct lot_floors {
    lane_floor vector[LOT];
};

static __device__ __forceinline__ void set_lot(lot_floors &lot, const lane_floor &own) {
#pragma unroll
    for (uint32_t g = 0; g < LOT; g++) {
        lot.vector[g].offset = __shfl_sync(FULL_WARP, own.offset, (int)g);
        lot.vector[g].scale = __shfl_sync(FULL_WARP, own.scale, (int)g);
        lot.vector[g].floor = __shfl_sync(FULL_WARP, own.floor, (int)g);
    }
}

/* Candidates among slots [slot, slot + 32) of the pair, by one lane. Other lots may have found the
 * same ones. */
static __device__ __forceinline__ void mark_slots(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, const lot_work &w,
                                                  uint32_t slot, uint32_t bits) {
    uint32_t *words = c.candidates + mask_at(look, &w.pair, w.row);
    size_t hr = (size_t)w.pair.kv_head * look.rows + w.row;
    uint32_t *runs = c.run_count + hr * loci_cuda_runs(&look) + w.pair.word_base / LOCI_CUDA_RUN +
                     w.index / look.kv_heads;
    uint32_t shift = slot % 32, part[2] = {bits << shift, shift ? bits >> (32 - shift) : 0};
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        if (!part[i]) continue;
        uint32_t at = slot / 32 + i, fresh = part[i] & ~atomicOr(&words[at], part[i]);
        if (fresh) atomicAdd(&runs[at / LOCI_CUDA_RUN], (uint32_t)__popc(fresh));
    }
}

/* The candidates of a step. */
static __device__ __forceinline__ void take_step(const loci_cuda_look &look,
                                                 const loci_cuda_choice &c, const lot_work &w,
                                                 const loci_cuda_root &root, const lot_least &lot,
                                                 uint32_t base, const uint4 (&sum)[2]) {
    uint32_t lane = threadIdx.x % 32, t = lane_token(base);
    uint32_t low = __ballot_sync(FULL_WARP, t < root.tokens && reaches(lot, sum[0]));
    uint32_t high = __ballot_sync(FULL_WARP, t + 16 < root.tokens && reaches(lot, sum[1]));
    uint32_t bits = lane == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & ~0xffffu);
    if (lane > 1 || !bits) return;
    uint32_t first = root.first_slot + base + lane * GROUP;
    uint32_t left = root.tokens - base - lane * GROUP;
    bits &= live_bits(&w.pair, first, left < GROUP ? left : GROUP);
    mark_slots(look, c, w, first, bits);
}

/* What reaches a floor in a step, to the list of its vector, in any order. */
static __device__ __forceinline__ void take_step(const loci_cuda_look &look,
                                                 const loci_cuda_choice &c, const lot_work &w,
                                                 const loci_cuda_root &root, const lot_floors &lot,
                                                 uint32_t base, const uint4 (&sum)[2]) {
    uint32_t lane = threadIdx.x % 32, t = lane_token(base);
#pragma unroll
    for (uint32_t i = 0; i < 2; i++, t += 16) {
        bool live = t < root.tokens && live_bits(&w.pair, root.first_slot + t, 1);
        uint32_t words[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w};
#pragma unroll
        for (uint32_t j = 0; j < LOT; j++) {
            uint32_t g = vector_of(j / 2, j % 2), half = words[j / 2] >> j % 2 * 16 & 0xffffu;
            float own = estimate_of(lot.vector[g], half);
            bool hit = live && own >= lot.vector[g].floor;
            uint32_t hits = __ballot_sync(FULL_WARP, hit), at = 0;
            if (!hits) continue;
            size_t vector = (size_t)w.pair.kv_head * look.vectors + w.first + g;
            if (lane == 0) at = atomicAdd(&c.reached_count[vector], (uint32_t)__popc(hits));
            at = __shfl_sync(FULL_WARP, at, 0) + (uint32_t)__popc(hits & ((1u << lane) - 1));
            if (hit && at < c.reached_room) c.reached[vector * c.reached_room + at] = own;
        }
    }
}

/* The candidates of a root (LOT_OF: lot_least) or what reaches the floors in it (lot_floors).
 * STORED: sums are there. */
template <bool STORED, typename LOT_OF>
static __device__ __forceinline__ void
take_root(const loci_cuda_look &look, const loci_cuda_choice &c, const lot_work &w,
          const loci_cuda_root &root, const warp_memory &m, const LOT_OF &lot) {
    const uint4 *from = c.sums + w.sums_at + root.first_slot;
    for (uint32_t first = 0; first < root.tokens; first += AHEAD * STEP) {
        uint4 sum[AHEAD][2];
#pragma unroll
        for (uint32_t j = 0; j < AHEAD && STORED; j++) {
            uint32_t t = lane_token(first + j * STEP);
            sum[j][0] = read_now(from + (t < root.tokens ? t : 0));
            sum[j][1] = read_now(from + (t + 16 < root.tokens ? t + 16 : 0));
        }
#pragma unroll
        for (uint32_t j = 0; j < AHEAD; j++) {
            uint32_t base = first + j * STEP;
            if (base >= root.tokens) break;
            if (!STORED) {
                step_words<MAX_DIM / 64> step;
                fetch_step(step, sketches_of(w, root, look.dim, base), groups_of(root, base),
                           look.dim);
                __syncwarp(); /* all have read the step before */
                put_step(step, m.columns, groups_of(root, base), look.dim);
                __syncwarp();
                add_columns(m, look.dim, sum[j]);
            }
            take_step(look, c, w, root, lot, base, sum[j]);
        }
    }
}

template <bool STORED, typename LOT_OF>
static __global__ void __launch_bounds__(THREADS)
    k_take_tokens(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    const lot_work w = work_of(look, c);
    if (blockIdx.y * WARPS >= w.kept) return;
    uint32_t lane = threadIdx.x % 32;
    lane_floor own = {0.0f, 0.0f, INFINITY};
    float base = 0.0f;
    if (lane < w.count) {
        size_t at = (size_t)w.index * look.vectors + w.first + lane;
        base = c.table_base[at];
        own.scale = c.table_scale[at];
        own.floor = c.floor[(size_t)w.pair.kv_head * look.vectors + w.first + lane];
    }
    warp_memory m = {};
    if (!STORED) {
        m = open_memory(look, c, w, look.dim, shared);
        __syncthreads();
    }
    for (uint32_t i = blockIdx.y * WARPS + threadIdx.x / 32; i < w.kept; i += gridDim.y * WARPS) {
        uint32_t number = c.kept[w.kept_at + i];
        LOT_OF lot;
        if (lane < w.count) own.offset = centre_of(look, c, w, number, lane) + base;
        set_lot(lot, own);
        take_root<STORED>(look, c, w, w.pair.root_table[number], m, lot);
    }
}

template <typename LOT_OF>
static cudaError_t launch_take(cudaStream_t stream, const loci_cuda_look *look,
                               const loci_cuda_choice *choice) {
    if (choice->sums)
        return launch_behind(stream, k_take_tokens<true, LOT_OF>, share_roots(look), THREADS, 0,
                             *look, *choice);
    return launch_behind(stream, k_take_tokens<false, LOT_OF>, share_roots(look), THREADS,
                         memory_bytes(look->dim), *look, *choice);
}

extern "C" cudaError_t loci_cuda_k_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                              const loci_cuda_choice *choice) {
    return look->extents ? launch_take<lot_least>(stream, look, choice) : cudaSuccess;
}

extern "C" cudaError_t loci_cuda_k_list_reaching(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    return look->extents ? launch_take<lot_floors>(stream, look, choice) : cudaSuccess;
}

/* One block for each (KV head, vector). */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_raise_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    uint32_t n = c.reached_count[blockIdx.x];
    if (n <= c.limit) return;
    const float *reached = c.reached + (size_t)blockIdx.x * c.reached_room;
    float top, kth = radix_kth((radix_memory *)shared, reached, n, c.limit, &top);
    if (threadIdx.x == 0) c.floor[blockIdx.x] = kth;
}

extern "C" cudaError_t loci_cuda_k_raise_floors(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    return launch_behind(stream, k_raise_floors, look->kv_heads * look->vectors, RADIX_THREADS,
                         sizeof(radix_memory), *look, *choice);
}
