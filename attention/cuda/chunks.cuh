/* SPDX-License-Identifier: Apache-2.0
 *
 * What kernels over the tokens of pairs share: the slots of a chunk that masks hold, queries in two
 * parts for tensor cores, partial results.
 */
#ifndef LOCI_ATTENTION_CUDA_CHUNKS_CUH
#define LOCI_ATTENTION_CUDA_CHUNKS_CUH

#include "attention/cuda/attend.cuh"
#include "attention/cuda/attend_mma.cuh"
#include "attention/cuda/look.cuh"

#define TILE_THREADS (32 * TILE_WARPS)
#define WORDS_MAX (LOCI_CUDA_CHUNK_MAX / 32)

struct chunk_work {
    const loci_cuda_pair *pair;
    uint32_t part, tile;        /* part: pair and chunk */
    uint32_t first, words;      /* slot and number of mask words of the chunk */
    uint32_t row_low, row_high; /* rows of masks that the tile's vectors look at */
};

static __device__ __forceinline__ bool chunk_of(const loci_cuda_look &look, uint32_t size,
                                                uint32_t chunks, chunk_work *w) {
    uint32_t chunk = blockIdx.x % chunks;
    w->pair = &look.pairs[blockIdx.x / chunks];
    w->part = blockIdx.x;
    w->tile = blockIdx.y;
    w->first = chunk * size;
    if (w->first >= w->pair->tokens) return false;
    uint32_t words = pair_words(w->pair) - w->first / 32;
    w->words = words < size / 32 ? words : size / 32;
    uint32_t last = (w->tile + 1) * ROWS < look.vectors ? (w->tile + 1) * ROWS : look.vectors;
    bool shared = look.mask_rows == 1;
    w->row_low = shared ? 0 : w->tile * ROWS / look.group;
    w->row_high = shared ? 0 : (last - 1) / look.group;
    return true;
}

/* The slots of the chunk that any row of the tile selected, in their order; returns their number.
 * list: LOCI_CUDA_CHUNK_MAX entries of shared memory. THREADS: of the block. */
template <uint32_t THREADS>
static __device__ uint32_t list_slots(const loci_cuda_look &look, const chunk_work &w,
                                      uint16_t *list) {
    const uint32_t each = WORDS_MAX / THREADS;
    uint32_t first = threadIdx.x * each, bits[each], own = 0;
#pragma unroll
    for (uint32_t j = 0; j < each; j++) {
        bits[j] = 0;
        if (first + j < w.words)
            for (uint32_t row = w.row_low; row <= w.row_high; row++)
                bits[j] |= look.token_mask[mask_at(look, w.pair, row) + w.first / 32 + first + j];
        own += __popc(bits[j]);
    }
    uint32_t all, at = sum_before<THREADS>(own, &all);
#pragma unroll
    for (uint32_t j = 0; j < each; j++)
        for (uint32_t left = bits[j]; left; left &= left - 1)
            list[at++] = (uint16_t)((first + j) * 32 + __ffs((int)left) - 1);
    __syncthreads();
    return all;
}

/* Whether vector `local` of the tile selected the slot. */
static __device__ __forceinline__ bool selected(const loci_cuda_look &look, const chunk_work &w,
                                                uint32_t local, uint32_t slot) {
    uint32_t v = w.tile * ROWS + local;
    if (v >= look.vectors) return false;
    if (look.mask_rows == 1) return true; /* the list is this set */
    uint32_t word = look.token_mask[mask_at(look, w.pair, v / look.group) + slot / 32];
    return word >> (slot % 32) & 1;
}

/* The vectors of a tile, rounded, and the rest behind them. */
template <int DIM>
static __device__ void split_vectors(const loci_cuda_look &look, uint32_t kv_head, uint32_t tile,
                                     uint16_t *high) {
    const float *q = look.q + (size_t)kv_head * look.vectors * look.dim;
    uint32_t *to = (uint32_t *)high, *rest = to + ROWS * WIDTH_OF(DIM) / 2;
    for (uint32_t i = threadIdx.x; i < ROWS * look.dim / 2; i += TILE_THREADS) {
        uint32_t row = i / (look.dim / 2), d = i % (look.dim / 2), v = tile * ROWS + row;
        float2 x = {0.0f, 0.0f};
        if (v < look.vectors) x = ((const float2 *)q)[(size_t)v * look.dim / 2 + d];
        uint32_t at = row * WIDTH_OF(DIM) / 2 + d;
        to[at] = split_pair(x.x, x.y, &rest[at]);
    }
}

/* By all blocks of a grid together. */
static __device__ __forceinline__ void clear_counts(const loci_cuda_attend &args) {
    if (blockIdx.y > 0) return;
    for (uint32_t i = blockIdx.x * TILE_THREADS + threadIdx.x; i < args.zeroed_count;
         i += gridDim.x * TILE_THREADS)
        args.zeroed[i] = 0;
}

/* What a block leaves that attends to nothing. */
static __device__ __forceinline__ void put_nothing(float *partial, uint32_t dim) {
    if (threadIdx.x >= ROWS) return;
    partial[(size_t)threadIdx.x * (dim + 2) + dim] = -INFINITY;
    partial[(size_t)threadIdx.x * (dim + 2) + dim + 1] = 0.0f;
}

#endif
