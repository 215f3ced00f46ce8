/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over all live tokens of the pairs for many vectors, and what each token has of it, on
 * the tensor cores of compute capability 9.0a (FlashAttention-3, arXiv 2407.08608, without its
 * overlap within a warpgroup). Two of a block's warpgroups multiply, the third one copies: tiles of
 * 128 slots of the block's chunk of a pair go through stages of shared memory, whose barriers say
 * what is there and what has been read. Of many vectors each warpgroup has 64 and goes through all
 * tiles; up to 64 both have all of them (NARROW) and every other tile, and leave a part each.
 * Blocks of the same chunk follow each other, so that its K and V come from memory once.
 *
 * EXACT: queries and weights go in two parts, rounded and the rest, which gives f32 results to
 * about 2^-17; else they are rounded.
 */
#include "attention/cuda/attribute.cuh"
#include "attention/cuda/chunks.cuh"
#include "attention/cuda/wide_copy.cuh"

#define GROUP_VECTORS LOCI_CUDA_WIDE_GROUP
static_assert(TILE_SLOTS == 128 && GROUP_VECTORS == 64, "shapes of the products");

#define GROUPS 2u /* warpgroups that multiply */
#define THREADS ((GROUPS + 1) * WARPGROUP)
#define WORK_REGISTERS 224 /* of a thread that multiplies, */
#define COPY_REGISTERS 56  /* or copies; 168 if it were the same */

/* STAGES: tiles in shared memory, K and V of each, or K alone. */
template <int DIM, bool NARROW, bool EXACT, int STAGES, bool VALUES> struct wide_shape {
    static const uint32_t vectors = (NARROW ? 1 : GROUPS) * GROUP_VECTORS;
    static const uint32_t query_bytes = vectors * DIM * 2;
    static const uint32_t rows_bytes = TILE_SLOTS * DIM * 2; /* K or V of a tile */
    static const uint32_t all_queries = (EXACT ? 2 : 1) * query_bytes;
    static const uint32_t stage_bytes = (VALUES ? 2 : 1) * rows_bytes;
    /* The first 1,024 bytes are what brings the rest to a multiple of it. */
    static const uint32_t bytes = 1024 + all_queries + STAGES * stage_bytes;
};

/* Eights of places that a row's vectors of a KV head take. */
static __host__ __device__ __forceinline__ uint32_t eights_of(const loci_cuda_look *look) {
    return (look->group + 7) / 8;
}

#if HAS_WGMMA

/* The vector at a place of the products: the same, or, with EACH, such that eight places are of one
 * row; past all vectors where there is none. */
template <bool EACH>
static __device__ __forceinline__ uint32_t vector_at(const loci_cuda_look &look, uint32_t place) {
    if (!EACH) return place;
    uint32_t eights = eights_of(&look), row = place / 8 / eights;
    uint32_t own = place / 8 % eights * 8 + place % 8;
    return own < look.group ? row * look.group + own : look.vectors;
}

/* The block's vectors in panels, rounded, and the rest behind them. */
template <int DIM, int VECTORS, bool EXACT, bool EACH>
static __device__ void put_vectors(const loci_cuda_look &look, const wide_work &w, uint8_t *to) {
    const float *q = look.q + (size_t)w.pair->kv_head * look.vectors * DIM;
    const uint32_t pieces = DIM / 8, panel = VECTORS * PANEL_ROW;
    const float unit = EXACT ? 1.0f : LOG2_E;
    for (uint32_t i = threadIdx.x; i < VECTORS * pieces; i += blockDim.x) {
        uint32_t row = i / pieces, p = i % pieces, high[4] = {}, rest[4] = {};
        uint32_t v = vector_at<EACH>(look, w.first + row);
        const float2 *from = (const float2 *)(q + (size_t)v * DIM + p * 8);
        for (uint32_t j = 0; j < 4 && v < look.vectors; j++)
            high[j] = split_pair(from[j].x * unit, from[j].y * unit, &rest[j]);
        uint8_t *at = to + p / 8 * panel + piece_at(row, p % 8);
        *(uint4 *)at = uint4{high[0], high[1], high[2], high[3]};
        if (EXACT) *(uint4 *)(at + VECTORS * DIM * 2) = uint4{rest[0], rest[1], rest[2], rest[3]};
    }
}

/* --- warpgroups that multiply ---------------------------------------------------------- */

/* Logits of the group's 64 vectors with a tile's keys, there after wait_products. */
template <int DIM, int VECTORS, bool EXACT>
static __device__ __forceinline__ void begin_logits(uint32_t q, uint32_t k, float (&s)[64]) {
    begin_products();
#pragma unroll
    for (uint32_t part = 0; part < (EXACT ? 2 : 1); part++)
#pragma unroll
        for (uint32_t d = 0; d < DIM; d += 16) {
            uint32_t at = d % PANEL * 2, panel = d / PANEL * PANEL_ROW;
            multiply_shared(s, matrix_of(q + part * VECTORS * DIM * 2 + panel * VECTORS + at, 0),
                            matrix_of(k + panel * TILE_SLOTS + at, 0), part > 0 || d > 0);
        }
    close_products();
}

template <int DIM, int VECTORS, bool EXACT>
static __device__ __forceinline__ void tile_logits(uint32_t q, uint32_t k, float (&s)[64]) {
    begin_logits<DIM, VECTORS, EXACT>(q, k, s);
    wait_products();
}

/* Which of a tile's slots are there and live, four words. Most tiles are whole. */
struct tile_bits {
    uint32_t word[4];
    bool whole;
};

static __device__ __forceinline__ tile_bits bits_of(const wide_work &w, uint32_t tile) {
    tile_bits bits;
    bits.whole = tile + TILE_SLOTS <= w.end && !w.pair->live;
    if (bits.whole) return bits;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t slot = tile + 32 * i, left = slot < w.end ? w.end - slot : 0;
        bits.word[i] = left ? live_bits(w.pair, slot, left < 32 ? left : 32) : 0;
    }
    return bits;
}

/* Those that are not have no logit. */
static __device__ __forceinline__ void mask_logits(const tile_bits &bits, float (&s)[64]) {
    if (bits.whole) return;
#pragma unroll
    for (uint32_t n = 0; n < TILE_SLOTS / 8; n++)
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) {
            uint32_t slot = n * 8 + threadIdx.x % 4 * 2 + e % 2;
            if (!(bits.word[n / 4] >> slot % 32 & 1)) s[n * 4 + e] = -INFINITY;
        }
}

/* The vector of a lane's rows; half: the upper or the lower of the two. */
static __device__ __forceinline__ uint32_t vector_of(const wide_work &w, uint32_t half) {
    return w.first + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
}

/* Leaves logits for attribution, of slots that are there. */
static __device__ __forceinline__ void keep_logits(const loci_cuda_look &look,
                                                   const loci_cuda_attend &args, const wide_work &w,
                                                   uint32_t tile, const float (&s)[64]) {
    if (!args.logits) return;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t v = vector_of(w, half);
        if (v >= look.vectors) continue;
        float *to = args.logits + ((size_t)w.pair->kv_head * look.vectors + v) * args.room +
                    (size_t)w.pair->word_base * 32 + tile;
#pragma unroll
        for (uint32_t n = 0; n < TILE_SLOTS / 8; n++) {
            uint32_t slot = n * 8 + threadIdx.x % 4 * 2;
            if (tile + slot < w.end)
                *(float2 *)(to + slot) = float2{s[n * 4 + 2 * half], s[n * 4 + 2 * half + 1]};
        }
    }
}

/* Of a lane's two rows: the maximum, its part of the sum of exponentials, sums of values. */
template <int DIM> struct wide_state { float max[2], sum[2], out[DIM / 2]; };

/* Logits become weights; what stands so far shrinks where a maximum has grown. */
template <int DIM, bool EXACT>
static __device__ __forceinline__ void tile_softmax(wide_state<DIM> &state, float (&s)[64]) {
    const float unit = EXACT ? LOG2_E : 1.0f; /* weights are powers of 2 */
    float keep[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = state.max[half];
#pragma unroll
        for (uint32_t n = 0; n < TILE_SLOTS / 8; n++)
            top = fmaxf(top, fmaxf(s[n * 4 + 2 * half], s[n * 4 + 2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        float base = top > -INFINITY ? top : 0.0f;
        keep[half] = weight_of<true>((state.max[half] - base) * unit);
        state.max[half] = top;
        float sum = 0.0f;
#pragma unroll
        for (uint32_t n = 0; n < TILE_SLOTS / 8; n++)
#pragma unroll
            for (uint32_t e = 2 * half; e < 2 * half + 2; e++) {
                s[n * 4 + e] = weight_of<true>((s[n * 4 + e] - base) * unit);
                sum += s[n * 4 + e];
            }
        state.sum[half] = state.sum[half] * keep[half] + sum;
    }
    if (!__any_sync(FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f)) return;
#pragma unroll
    for (uint32_t i = 0; i < DIM / 2; i++) state.out[i] *= keep[i / 2 % 2];
}

template <int DIM, bool EXACT>
static __device__ __forceinline__ void tile_values(wide_state<DIM> &state, uint32_t v,
                                                   const float (&s)[64]) {
    uint32_t high[TILE_SLOTS / 16][4], rest[TILE_SLOTS / 16][4];
#pragma unroll
    for (uint32_t i = 0; i < TILE_SLOTS / 16; i++)
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
            high[i][j] = split_pair(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1], &rest[i][j]);
    begin_products();
#pragma unroll
    for (uint32_t i = 0; i < TILE_SLOTS / 16; i++) {
        uint64_t values = matrix_of(v + i * 16 * PANEL_ROW, TILE_SLOTS * PANEL_ROW);
        multiply_rows(state.out, high[i], values);
        if (EXACT) multiply_rows(state.out, rest[i], values);
    }
    close_products();
    wait_products();
}

/* A partial result, as attend_sparse leaves it. */
template <int DIM, bool EXACT>
static __device__ __forceinline__ void put_partial(const loci_cuda_look &look,
                                                   const loci_cuda_attend &args, const wide_work &w,
                                                   const wide_state<DIM> &state) {
    size_t rows = (size_t)loci_cuda_tiles(look.vectors) * ROWS;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float sum = state.sum[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        uint32_t v = vector_of(w, half), lane = threadIdx.x % 4;
        if (v >= look.vectors) continue;
        float *to = args.partial + (w.part * rows + v) * (DIM + 2);
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; n++)
            *(float2 *)(to + n * 8 + lane * 2) =
                float2{state.out[n * 4 + 2 * half], state.out[n * 4 + 2 * half + 1]};
        if (lane != 0) continue;
        to[DIM] = EXACT ? state.max[half] : state.max[half] * LN_2;
        to[DIM + 1] = sum;
    }
}

/* A warpgroup without a vector lets the tiles go by; VALUES: V, too. */
template <int STAGES, bool VALUES>
static __device__ __forceinline__ void pass_tile(wide_stage *stages, uint32_t n) {
    for (uint32_t i = 0; i < (VALUES ? 2 : 1); i++) {
        wait_barrier(&stages[n % STAGES].there[i], n / STAGES % 2);
        if (threadIdx.x % 32 == 0) arrive(&stages[n % STAGES].read[i]);
    }
}

/* With NARROW a warpgroup comes back to a stage when the other one's tile has been there in
 * between, two phases later. It does not see the end of that one's phase; but the tile before its
 * own came after it, and a thread's copies arrive in their order. */
template <int DIM, bool NARROW, bool EXACT, int STAGES>
static __device__ __forceinline__ void
attend_tiles(const loci_cuda_look &look, const loci_cuda_attend &args, const wide_work &w,
             wide_stage *stages, uint32_t q, uint32_t memory) {
    typedef wide_shape<DIM, NARROW, EXACT, STAGES, true> shape;
    const uint32_t step = NARROW ? GROUPS : 1;
    uint32_t n = NARROW ? threadIdx.x / WARPGROUP : 0; /* of the tile */
    wide_state<DIM> state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
    for (uint32_t tile = w.begin + n * TILE_SLOTS; tile < w.end; tile += step * TILE_SLOTS) {
        wide_stage *stage = &stages[n % STAGES];
        uint32_t k = memory + n % STAGES * shape::stage_bytes, phase = n / STAGES % 2;
        float s[64];
        if (w.first >= look.vectors) {
            pass_tile<STAGES, true>(stages, n);
            n += step;
            continue;
        }
        wait_barrier(&stage->there[0], phase);
        show_products();
        tile_logits<DIM, shape::vectors, EXACT>(q, k, s);
        if (threadIdx.x % 32 == 0) arrive(&stage->read[0]);
        mask_logits(bits_of(w, tile), s);
        if (NARROW) keep_logits(look, args, w, tile, s);
        tile_softmax<DIM, EXACT>(state, s);
        wait_barrier(&stage->there[1], phase);
        show_products();
        tile_values<DIM, EXACT>(state, k + shape::rows_bytes, s);
        if (threadIdx.x % 32 == 0) arrive(&stage->read[1]);
        n += step;
    }
    put_partial<DIM, EXACT>(look, args, w, state);
}

/* --- blocks ---------------------------------------------------------------------------- */

/* The extent that has chunk *index of a KV head's, and in *index which of its own that is; by whole
 * warps. */
static __device__ __forceinline__ uint32_t extent_of(const loci_cuda_look &look, uint32_t chunk,
                                                     uint32_t *index) {
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = 0; first < look.extents; first += 32) {
        uint32_t e = first + lane, own = 0;
        if (e < look.extents)
            own = loci_cuda_chunks(look.pairs[(size_t)e * look.kv_heads].tokens, chunk);
        uint32_t end = own;
        for (int offset = 1; offset < 32; offset *= 2) {
            uint32_t before = __shfl_up_sync(FULL_WARP, end, offset);
            if (lane >= (uint32_t)offset) end += before;
        }
        uint32_t behind = __ballot_sync(FULL_WARP, end > *index);
        uint32_t at = behind ? (uint32_t)__ffs((int)behind) - 1 : 31;
        uint32_t begin = __shfl_sync(FULL_WARP, behind ? end - own : end, (int)at);
        *index -= begin;
        if (behind) return first + at;
    }
    return look.extents - 1;
}

/* chunks: of a KV head; the grid has blocks for `count` vectors from `first` on. */
template <bool NARROW>
static __device__ __forceinline__ wide_work work_of(const loci_cuda_look &look, uint32_t chunk,
                                                    uint32_t chunks, uint32_t first,
                                                    uint32_t count) {
    const uint32_t vectors = (NARROW ? 1 : GROUPS) * GROUP_VECTORS;
    uint32_t tiles = loci_cuda_chunks(count, vectors);
    wide_work w;
    w.part = blockIdx.x / tiles;
    uint32_t index = w.part % chunks, extent = extent_of(look, chunk, &index);
    w.pair = &look.pairs[(size_t)extent * look.kv_heads + w.part / chunks];
    w.begin = index * chunk;
    w.end = w.begin + chunk < w.pair->tokens ? w.begin + chunk : w.pair->tokens;
    w.first = first + blockIdx.x % tiles * vectors;
    return w;
}

/* Barriers of all stages; queries in shared memory, from `q` on. */
template <int DIM, bool NARROW, bool EXACT, int STAGES, bool EACH = false>
static __device__ __forceinline__ void open_block(const loci_cuda_look &look, const wide_work &w,
                                                  wide_stage *stages, uint8_t *q) {
    if (threadIdx.x < STAGES)
        for (uint32_t i = 0; i < 2; i++) {
            open_barrier(&stages[threadIdx.x].there[i], WARPGROUP);
            open_barrier(&stages[threadIdx.x].read[i], (NARROW ? 1 : GROUPS) * WARPGROUP / 32);
        }
    put_vectors<DIM, (NARROW ? 1 : GROUPS) * GROUP_VECTORS, EXACT, EACH>(look, w, q);
    show_products();
    __syncthreads();
}

#endif

template <int DIM, bool NARROW, bool EXACT, int STAGES>
static __global__ void __launch_bounds__(THREADS, 1)
    k_attend_wide(const loci_cuda_look look, const loci_cuda_attend args) {
#if HAS_WGMMA
    typedef wide_shape<DIM, NARROW, EXACT, STAGES, true> shape;
    extern __shared__ uint8_t shared_bytes[];
    __shared__ wide_stage stages[STAGES];
    await_previous();
    uint32_t group = threadIdx.x / WARPGROUP;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < args.zeroed_count;
         i += gridDim.x * THREADS)
        args.zeroed[i] = 0;
    wide_work w = work_of<NARROW>(look, args.chunk, args.chunks, 0, look.vectors);
    uint8_t *q = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
    uint8_t *memory = q + shape::all_queries;
    open_block<DIM, NARROW, EXACT, STAGES>(look, w, stages, q);
    if (group == GROUPS) {
        give_registers<COPY_REGISTERS>();
        copy_tiles<DIM, STAGES, true>(args.cache, w, stages, memory);
    } else {
        take_registers<WORK_REGISTERS>();
        uint32_t queries = shared_address(q);
        if (NARROW) {
            w.part = w.part * GROUPS + group;
        } else {
            w.first += group * GROUP_VECTORS;
            queries += group * GROUP_VECTORS * PANEL_ROW;
        }
        attend_tiles<DIM, NARROW, EXACT, STAGES>(look, args, w, stages, queries,
                                                 shared_address(memory));
    }
#else
    __trap(); /* loci_cuda.wgmma says that this is not launched */
#endif
}

/* A chunk's tiles of vectors follow each other. */
static dim3 blocks_of(const loci_cuda_look *look, uint32_t chunks, uint32_t vectors,
                      uint32_t each) {
    return dim3(look->kv_heads * chunks * loci_cuda_chunks(vectors, each));
}

template <int DIM, bool NARROW, bool EXACT, int STAGES>
static cudaError_t launch_attend(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_attend *args) {
    typedef wide_shape<DIM, NARROW, EXACT, STAGES, true> shape;
    dim3 grid = blocks_of(look, args->chunks, look->vectors, shape::vectors);
    return launch_where(!args->cache.frames, stream, k_attend_wide<DIM, NARROW, EXACT, STAGES>,
                        grid, THREADS, shape::bytes, *look, *args);
}

template <int DIM>
static cudaError_t launch_attend_dim(cudaStream_t stream, const loci_cuda_look *look,
                                     const loci_cuda_attend *args, bool exact) {
    if (loci_cuda_wide_narrow(look)) return launch_attend<DIM, true, true, 3>(stream, look, args);
    if (exact) return launch_attend<DIM, false, true, 2>(stream, look, args);
    return launch_attend<DIM, false, false, 2>(stream, look, args);
}

extern "C" cudaError_t loci_cuda_k_attend_wide(cudaStream_t stream, const loci_cuda_look *look,
                                               const loci_cuda_attend *args, bool exact) {
    if (look->extents == 0) return cudaSuccess;
    return look->dim == 64 ? launch_attend_dim<64>(stream, look, args, exact)
                           : launch_attend_dim<128>(stream, look, args, exact);
}

/* --- attribution ----------------------------------------------------------------------- */

#define MASS_STAGES 3
#define MASS_WARPS (GROUPS * WARPGROUP / 32)
#define MASS_SEGMENTS 6144u /* as many as there is shared memory for in any case */

#if HAS_WGMMA

/* Lanes HALF apart have other vectors of the same slots: each goes on with half of them. */
template <uint32_t HALF> static __device__ __forceinline__ void fold(float (&c)[32]) {
    bool upper = threadIdx.x & HALF;
#pragma unroll
    for (uint32_t i = 0; i < HALF; i++) {
        float own = upper ? c[HALF + i] : c[i], other = upper ? c[i] : c[HALF + i];
        c[i] = own + __shfl_xor_sync(FULL_WARP, other, (int)HALF);
    }
}

/* Sums of each of a tile's slots over eight vectors of a warp, to `sums`; c: a lane's parts. */
static __device__ __forceinline__ void add_lanes(float (&c)[32], float *sums) {
    uint32_t lane = threadIdx.x % 32, n = lane / 16 * 8 + lane / 8 % 2 * 4 + lane / 4 % 2 * 2;
    fold<16>(c);
    fold<8>(c);
    fold<4>(c);
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
        *(float2 *)(sums + (n + i) * 8 + lane % 4 * 2) = float2{c[2 * i], c[2 * i + 1]};
}

/* The same over a warp's 16 vectors; s: weights. */
static __device__ __forceinline__ void add_vectors(const float (&s)[64], float *sums) {
    float c[32];
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) c[i] = s[i / 2 * 4 + i % 2] + s[i / 2 * 4 + 2 + i % 2];
    add_lanes(c, sums);
}

/* The segment of a slot in its record, in the upper half. */
static __device__ __forceinline__ uint32_t word_of(const wide_work &w, uint32_t slot,
                                                   uint32_t dim) {
    return slot < w.end ? slot_word(w.pair, slot, dim) : 0xffffffffu;
}

/* What a slot has of the attention of the block's vectors, to its segment; own: the block's sums of
 * segments in shared memory, or NULL. */
static __device__ __forceinline__ void add_slot(const loci_cuda_attribution &args,
                                                const wide_work &w, uint32_t word,
                                                const float (*sums)[TILE_SLOTS], mass_t *own) {
    float weight = 0.0f;
    for (uint32_t i = 0; i < MASS_WARPS; i++) weight += sums[i][threadIdx.x];
    mass_t mass = mass_of_weight(weight);
    uint32_t segment = word >> 16;
    if (mass == 0 || segment >= w.pair->segments || w.pair->segment_base + segment >= args.segments)
        return;
    segment += w.pair->segment_base;
    if (own)
        add_mass(&own[segment], mass);
    else
        atomicAdd(&args.mass[segment], mass);
}

static __device__ __forceinline__ void await_workers(void) {
    asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * WARPGROUP) : "memory");
}

/* Logits of a tile where only K is copied; VECTORS: of the block. meanwhile(): runs beside the
 * products, after the fence, which waits for all that a thread has under way. */
template <int DIM, int VECTORS, bool EXACT, int STAGES, typename MEANWHILE>
static __device__ __forceinline__ void key_logits(const wide_work &w, wide_stage *stages,
                                                  uint32_t q, uint32_t memory, uint32_t tile,
                                                  uint32_t n, float (&s)[64], MEANWHILE meanwhile) {
    wide_stage *stage = &stages[n % STAGES];
    wait_barrier(&stage->there[0], n / STAGES % 2);
    show_products();
    begin_logits<DIM, VECTORS, EXACT>(q, memory + n % STAGES * TILE_SLOTS * DIM * 2, s);
    meanwhile();
    wait_products();
    if (threadIdx.x % 32 == 0) arrive(&stage->read[0]);
    mask_logits(bits_of(w, tile), s);
}

/* What a tile's slots have of the attention of a warp's vectors, to `sums`. total: their sums of
 * exponentials, of base 2. */
template <int DIM, bool EXACT, typename MEANWHILE>
static __device__ __forceinline__ void
weigh_tile(const wide_work &w, wide_stage *stages, uint32_t q, uint32_t memory, uint32_t tile,
           uint32_t n, const float (&total)[2], float *sums, MEANWHILE meanwhile) {
    float s[64];
    key_logits<DIM, GROUPS * GROUP_VECTORS, EXACT, MASS_STAGES>(w, stages, q, memory, tile, n, s,
                                                                meanwhile);
#pragma unroll
    for (uint32_t i = 0; i < 64; i++)
        s[i] = weight_of<true>(EXACT ? fmaf(s[i], LOG2_E, -total[i / 2 % 2])
                                     : s[i] - total[i / 2 % 2]);
    add_vectors(s, sums);
}

template <int DIM, bool EXACT>
static __device__ __forceinline__ void
attribute_tiles(const loci_cuda_look &look, const loci_cuda_attribution &args, const wide_work &w,
                wide_stage *stages, uint32_t q, uint32_t memory,
                float (*sums)[MASS_WARPS][TILE_SLOTS], mass_t *own) {
    uint32_t n = 0, word = 0, next = 0;
    float total[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        total[half] = total_of(look, args, w.pair->kv_head, vector_of(w, half)) * LOG2_E;
        if (!(total[half] > -INFINITY)) total[half] = INFINITY; /* and all weights are 0 */
    }
    bool idle = w.first >= look.vectors;
    for (uint32_t i = threadIdx.x % 32; idle && i < TILE_SLOTS; i += 32)
        sums[0][threadIdx.x / 32][i] = sums[1][threadIdx.x / 32][i] = 0.0f;
    if (threadIdx.x < TILE_SLOTS) next = word_of(w, w.begin + threadIdx.x, DIM);
    for (uint32_t tile = w.begin; tile < w.end; tile += TILE_SLOTS, n++) {
        auto add_last = [&] {
            if (threadIdx.x >= TILE_SLOTS) return; /* of the warpgroup that is never idle */
            if (n > 0) add_slot(args, w, word, sums[(n - 1) % 2], own);
            word = next;
            next = word_of(w, tile + TILE_SLOTS + threadIdx.x, DIM);
        };
        if (idle)
            pass_tile<MASS_STAGES, false>(stages, n);
        else
            weigh_tile<DIM, EXACT>(w, stages, q, memory, tile, n, total,
                                   sums[n % 2][threadIdx.x / 32], add_last);
        await_workers();
    }
    if (threadIdx.x < TILE_SLOTS) add_slot(args, w, word, sums[(n - 1) % 2], own);
    if (!own) return;
    await_workers();
    for (uint32_t i = threadIdx.x; i < args.segments; i += GROUPS * WARPGROUP)
        if (own[i]) atomicAdd(&args.mass[i], own[i]);
}

#endif

/* together: a block adds up masses in shared memory first, since many tokens are to few segments.
 */
template <int DIM, bool EXACT>
static __global__ void __launch_bounds__(THREADS, 1)
    k_attribute_wide(const loci_cuda_look look, const loci_cuda_attribution args, bool together) {
#if HAS_WGMMA
    typedef wide_shape<DIM, false, EXACT, MASS_STAGES, false> shape;
    extern __shared__ uint8_t shared_bytes[];
    __shared__ wide_stage stages[MASS_STAGES];
    __shared__ float sums[2][MASS_WARPS][TILE_SLOTS];
    await_previous();
    uint32_t group = threadIdx.x / WARPGROUP;
    wide_work w =
        work_of<false>(look, args.wide_chunk, args.wide_chunks, args.row_begin * look.group,
                       (args.row_end - args.row_begin) * look.group);
    uint8_t *q = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
    uint8_t *memory = q + shape::all_queries;
    mass_t *own = together ? (mass_t *)(memory + MASS_STAGES * shape::stage_bytes) : NULL;
    for (uint32_t i = threadIdx.x; i < args.segments && own; i += THREADS) own[i] = 0;
    open_block<DIM, false, EXACT, MASS_STAGES>(look, w, stages, q);
    if (group == GROUPS) {
        give_registers<COPY_REGISTERS>();
        copy_tiles<DIM, MASS_STAGES, false>(args.cache, w, stages, memory);
    } else {
        take_registers<WORK_REGISTERS>();
        const loci_cuda_pair pair = *w.pair; /* in registers */
        w.pair = &pair;
        w.first += group * GROUP_VECTORS;
        attribute_tiles<DIM, EXACT>(look, args, w, stages,
                                    shared_address(q) + group * GROUP_VECTORS * PANEL_ROW,
                                    shared_address(memory), sums, own);
    }
#else
    __trap();
#endif
}

template <int DIM, bool EXACT>
static cudaError_t launch_attribute(cudaStream_t stream, const loci_cuda_look *look,
                                    const loci_cuda_attribution *args) {
    typedef wide_shape<DIM, false, EXACT, MASS_STAGES, false> shape;
    bool together = args->segments <= MASS_SEGMENTS;
    size_t bytes = shape::bytes + MASS_SEGMENTS * sizeof(mass_t); /* the same for every thread */
    uint32_t vectors = (args->row_end - args->row_begin) * look->group;
    dim3 grid = blocks_of(look, args->wide_chunks, vectors, shape::vectors);
    return launch_where(!args->cache.frames, stream, k_attribute_wide<DIM, EXACT>, grid, THREADS,
                        bytes, *look, *args, together);
}

#include "attention/cuda/whole_each.cuh"

extern "C" cudaError_t loci_cuda_k_attribute_wide(cudaStream_t stream, const loci_cuda_look *look,
                                                  const loci_cuda_attribution *args) {
    if (args->row_begin >= args->row_end) return cudaSuccess;
    if (args->each)
        return look->dim == 64 ? launch_each<64>(stream, look, args)
                               : launch_each<128>(stream, look, args);
    if (look->dim == 64)
        return args->exact ? launch_attribute<64, true>(stream, look, args)
                           : launch_attribute<64, false>(stream, look, args);
    return args->exact ? launch_attribute<128, true>(stream, look, args)
                       : launch_attribute<128, false>(stream, look, args);
}
