/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over all live tokens of the pairs. A block takes a chunk of a pair's slots and a tile
 * of vectors. Its four warps share tiles of 64 slots, 16 for each, whose K and V, which stand side
 * by side in memory, come to shared memory while two tiles before are worked on. Products are those
 * of sparse.cu.
 */
#include "attention/cuda/chunks.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda/whole.h"

#define TILE_SLOTS LOCI_CUDA_WHOLE_TILE
static_assert(TILE_SLOTS == TILE_WARPS * RUN, "a run for each warp");

/* STAGES: tiles in shared memory. With three of them two blocks fit a multiprocessor up to 128
 * channels, where a block may use so much. */
template <int DIM, int STAGES> static __host__ __device__ constexpr uint32_t whole_halves(void) {
    return (2 * ROWS + STAGES * 2 * TILE_SLOTS) * WIDTH_OF(DIM);
}

/* Begins to copy K and V rows of slots [tile, end), no more than TILE_SLOTS; past the end comes the
 * last one again. */
template <int DIM, bool TIERED>
static __device__ __forceinline__ void
copy_tile(const loci_cuda_row_cache &cache, const loci_cuda_pair *pair, row_ref kv,
          uint32_t row_bytes, uint32_t dim, uint32_t tile, uint32_t end, uint16_t *stage) {
    const uint32_t lanes = DIM / 4; /* of a slot */
#pragma unroll
    for (uint32_t i = threadIdx.x; i < TILE_SLOTS * lanes; i += TILE_THREADS) {
        uint32_t row = i / lanes, p = i % lanes, slot = tile + row < end ? tile + row : end - 1;
        uint16_t *to = stage + row * WIDTH_OF(DIM);
        row_ref from = TIERED ? rows_at(cache, pair, slot) : kv + (size_t)slot * row_bytes;
        copy_piece<DIM>(p, from, dim, false, to, to + TILE_SLOTS * WIDTH_OF(DIM));
    }
}

/* Logits of a run's 16 slots as they count, from `slot` on; keeps those of one row. bits: which of
 * the run are there and live. */
static __device__ __forceinline__ void mask_logits(const loci_cuda_look &look, float *kept,
                                                   uint64_t room, uint32_t bits,
                                                   float (&logit)[2][4]) {
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t n = 0; n < 2; n++) {
        uint32_t key = n * 8 + lane % 4 * 2;
#pragma unroll
        for (uint32_t e = 0; e < 4; e++)
            if (!(bits >> (key + e % 2) & 1)) logit[n][e] = -INFINITY;
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t v = blockIdx.y * ROWS + lane / 4 + 8 * half;
            if (kept && v < look.vectors)
                *(float2 *)(kept + v * room + key) =
                    float2{logit[n][2 * half], logit[n][2 * half + 1]};
        }
    }
}

/* Whether there are and live, of 16 slots from `slot` on. */
static __device__ __forceinline__ uint32_t run_bits(const loci_cuda_pair *pair, uint32_t slot,
                                                    uint32_t end) {
    uint32_t all = slot + RUN <= end ? 0xffffu : slot < end ? (1u << (end - slot)) - 1 : 0;
    if (!pair->live || !all) return all;
    return (uint32_t)(pair->live[slot / 64] >> (slot % 64)) & all;
}

/* TIERED: of some pairs K and V are in memory of the host. */
template <int DIM, int STAGES, bool TIERED>
static __global__ void __launch_bounds__(TILE_THREADS)
    k_attend_whole(const loci_cuda_look look, const loci_cuda_attend args) {
    extern __shared__ float4 shared[];
    const uint32_t stages = STAGES, stage = 2 * TILE_SLOTS * WIDTH_OF(DIM);
    await_previous();
    clear_counts(args);
    uint32_t index = blockIdx.x / args.chunks, begin = blockIdx.x % args.chunks * args.chunk;
    const loci_cuda_pair *pair = &look.pairs[index];
    uint32_t end = begin + args.chunk < pair->tokens ? begin + args.chunk : pair->tokens;
    float *partial =
        args.partial + ((size_t)blockIdx.x * gridDim.y + blockIdx.y) * ROWS * (look.dim + 2);
    if (begin >= end) {
        put_nothing(partial, look.dim);
        return;
    }
    row_ref kv = rows_of(pair, 0);
    uint32_t row_bytes = pair->row_bytes;
    uint16_t *q = (uint16_t *)shared, *memory = q + 2 * ROWS * WIDTH_OF(DIM);
    float *kept = args.logits;
    if (kept)
        kept += (size_t)pair->kv_head * look.vectors * args.room + (size_t)pair->word_base * 32;
#pragma unroll
    for (uint32_t i = 0; i + 1 < stages; i++) {
        uint32_t tile = begin + i * TILE_SLOTS;
        if (tile < end)
            copy_tile<DIM, TIERED>(args.cache, pair, kv, row_bytes, look.dim, tile, end,
                                   memory + i * stage);
        close_group();
    }
    split_vectors<DIM>(look, pair->kv_head, blockIdx.y, q);
    warp_state<DIM> s = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
    uint32_t run = threadIdx.x / 32 * RUN, turn = 0;
    for (uint32_t tile = begin; tile < end; tile += TILE_SLOTS) {
        wait_groups<STAGES - 2>();
        __syncthreads(); /* the tile is there, and all are through with the one before */
        uint32_t next = tile + (stages - 1) * TILE_SLOTS, free = turn ? turn - 1 : stages - 1;
        if (next < end)
            copy_tile<DIM, TIERED>(args.cache, pair, kv, row_bytes, look.dim, next, end,
                                   memory + free * stage);
        close_group();
        uint16_t *k = memory + turn * stage + run * WIDTH_OF(DIM);
        uint32_t bits = run_bits(pair, tile + run, end);
        turn = turn + 1 < stages ? turn + 1 : 0;
        if (tile + run >= end) continue;
        if (row_is_int8(kv)) restore_run<DIM>(look.dim, k, k + TILE_SLOTS * WIDTH_OF(DIM));
        float logit[2][4] = {};
        run_logits<DIM, 1, true>(q, ROWS, k, look.dim, logit);
        mask_logits(look, kept ? kept + tile + run : NULL, args.room, bits, logit);
        run_softmax<DIM, 1, false>(s, logit);
        run_values<DIM, 1, true>(s, k + TILE_SLOTS * WIDTH_OF(DIM), look.dim, logit);
    }
    wait_groups<0>();
    __syncthreads();
    merge_warps<DIM>(s, look.dim, look.vectors - blockIdx.y * ROWS, (float *)memory, partial);
}

template <int DIM, int STAGES, bool TIERED>
static cudaError_t launch(cudaStream_t stream, const loci_cuda_look *look,
                          const loci_cuda_attend *args) {
    dim3 grid(look->extents * look->kv_heads * args->chunks, loci_cuda_tiles(look->vectors));
    size_t bytes = whole_halves<DIM, STAGES>() * sizeof(uint16_t);
    /* What waits for an event of another stream does not overlap the kernel before. */
    return launch_where(!TIERED, stream, k_attend_whole<DIM, STAGES, TIERED>, grid, TILE_THREADS,
                        bytes, *look, *args);
}

template <bool TIERED>
static cudaError_t launch_by_dim(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_attend *args, size_t block_bytes) {
    if (look->dim <= 32) return launch<32, 3, TIERED>(stream, look, args);
    if (look->dim <= 64) return launch<64, 3, TIERED>(stream, look, args);
    if (look->dim > 128) return launch<256, 2, TIERED>(stream, look, args);
    if (whole_halves<128, 3>() * sizeof(uint16_t) <= block_bytes)
        return launch<128, 3, TIERED>(stream, look, args);
    return launch<128, 2, TIERED>(stream, look, args);
}

extern "C" cudaError_t loci_cuda_k_attend_whole(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_attend *args, size_t block_bytes) {
    if (look->extents == 0) return cudaSuccess;
    return args->cache.frames ? launch_by_dim<true>(stream, look, args, block_bytes)
                              : launch_by_dim<false>(stream, look, args, block_bytes);
}
