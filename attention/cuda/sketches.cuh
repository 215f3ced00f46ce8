/* SPDX-License-Identifier: Apache-2.0
 *
 * How kernels sum up sketches: the work of a block and a warp, tables in shared memory, codewords
 * in columns.
 *
 * A block has the table of one lot of LOCI_CUDA_LOT vectors in shared memory, a warp takes one root
 * after another: the codewords of 64 tokens come to it transposed, so that a lane has those of two
 * tokens. Sums of table entries are integers of 16 bits, those of a lot side by side: one look-up
 * and a few additions serve all its vectors. They are kept for the candidates: 16 bytes a token,
 * which mostly stay in the L2.
 */
#ifndef LOCI_ATTENTION_CUDA_SKETCHES_CUH
#define LOCI_ATTENTION_CUDA_SKETCHES_CUH

#include "attention/cuda/nodes.cuh"

#define WARPS 4u
#define THREADS (32 * WARPS)
#define PARTS_MAX (MAX_DIM / 4)
#define GROUP 32u /* tokens whose sketches are interleaved */
#define LOT LOCI_CUDA_LOT
#define STEP (2 * GROUP) /* tokens that a warp sums at a time */
#define RING (4 * GROUP) /* tokens whose sums it remembers: of a step, and of a leaf before it */
#define BLOCKS 1600u     /* that share the kept roots, about */
#define PART_BYTES 128u  /* of a table */
#define SUMS_ALIGN 256u  /* of tables: a codeword takes the low byte of an address */

/* The entries of one lot of a row: 4 dim of LOT bytes. */
static __device__ __forceinline__ uint4 *table_of(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, uint32_t pair,
                                                  uint32_t row, uint32_t lot) {
    size_t at = ((size_t)pair * look.rows + row) * loci_cuda_lots(&look) + lot;
    return (uint4 *)(c.table + at * look.dim * 4 * LOT);
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

#define SUM_BITS 14 /* hold PARTS_MAX * 255 */
#define SUM_WEIGHTS (1u | 1u << (16 + SUM_BITS))

/* Adds the entry of PART, of a column's word, for the codeword in that byte, 8 times. Of a word of
 * entries bytes 0 and 1 go into the first sum, 2 and 3 into the second, SUM_BITS apart: products,
 * since the unit that adds, shifts and permutes is the one that all others wait for. */
template <int PART>
static __device__ __forceinline__ void add_entry(uint4 &sum, uint32_t codes, uint32_t table) {
    uint32_t x, y, at = __byte_perm(codes, table, 0x7650 + PART);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];"
                 : "=r"(x), "=r"(y)
                 : "r"(at), "n"(PART * (int)PART_BYTES));
    sum.x = __dp2a_lo(SUM_WEIGHTS, x, sum.x);
    sum.y = __dp2a_hi(SUM_WEIGHTS, x, sum.y);
    sum.z = __dp2a_lo(SUM_WEIGHTS, y, sum.z);
    sum.w = __dp2a_hi(SUM_WEIGHTS, y, sum.w);
}

/* Sums of this lane's two tokens for all vectors of the lot, 16 bits each. */
static __device__ __forceinline__ void add_columns(const warp_memory &m, uint32_t dim,
                                                   uint4 (&sum)[2]) {
    const uint32_t words = dim / 16, low = (1u << SUM_BITS) - 1;
    const uint32_t *column = m.columns + threadIdx.x % 32 * column_words(dim);
    sum[0] = sum[1] = uint4{0, 0, 0, 0};
#pragma unroll
    for (uint32_t r = 0; r < MAX_DIM / 16; r++) {
        if (r >= words) break;
        uint32_t word = column[r], table = m.table + r * 4 * PART_BYTES;
        uint32_t codes[2] = {word << 3 & 0x78787878u, word >> 1 & 0x78787878u};
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            add_entry<0>(sum[i], codes[i], table);
            add_entry<1>(sum[i], codes[i], table);
            add_entry<2>(sum[i], codes[i], table);
            add_entry<3>(sum[i], codes[i], table);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        sum[i] = {(sum[i].x & low) | (sum[i].y & low) << 16,
                  sum[i].x >> SUM_BITS | sum[i].y >> SUM_BITS << 16,
                  (sum[i].z & low) | (sum[i].w & low) << 16,
                  sum[i].z >> SUM_BITS | sum[i].w >> SUM_BITS << 16};
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

/* As many blocks for each lot of a row and pair as they all together leave. */
static dim3 share_roots(const loci_cuda_look *look) {
    uint32_t rows = look->extents * look->kv_heads * look->rows, lots = loci_cuda_lots(look);
    uint32_t most = (look->roots_max + WARPS - 1) / WARPS, each = BLOCKS / rows / lots;
    if (each > most) each = most;
    return dim3(rows, each ? each : 1, lots);
}

#endif
