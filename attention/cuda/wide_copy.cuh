/* SPDX-License-Identifier: Apache-2.0
 *
 * The warpgroup of whole_wide.cu that copies: K and V of a block's slots to stages of shared
 * memory, in panels as products want them. Rows of int8 come as bytes and become bf16 where they
 * stand, so products know of bf16 alone.
 */
#ifndef LOCI_ATTENTION_CUDA_WIDE_COPY_CUH
#define LOCI_ATTENTION_CUDA_WIDE_COPY_CUH

#include "attention/cuda/rows.cuh"
#include "attention/cuda/wgmma.cuh"
#include "attention/cuda/whole.h"

#define TILE_SLOTS LOCI_CUDA_WIDE_TILE

/* Barriers of a stage: K, V. */
struct wide_stage {
    uint64_t there[2], read[2];
};

/* What a block does. */
struct wide_work {
    const loci_cuda_pair *pair;
    uint32_t begin, end; /* slots */
    uint32_t first;      /* vector, of the warpgroup */
    uint32_t part;
};

#if HAS_WGMMA

/* Begins to copy K rows, or V rows, of a tile; past the end comes the last one again. TIERED: they
 * are in memory of the host, and some in the cache of rows. */
template <int DIM, bool TIERED>
static __device__ __forceinline__ void copy_rows(const loci_cuda_row_cache &cache,
                                                 const wide_work &w, const uint8_t *kv,
                                                 uint32_t tile, uint32_t value, uint8_t *to) {
    const uint32_t pieces = DIM / 8, panel = TILE_SLOTS * PANEL_ROW, row_bytes = 4 * DIM;
#pragma unroll 8
    for (uint32_t i = threadIdx.x % WARPGROUP; i < TILE_SLOTS * pieces; i += WARPGROUP) {
        uint32_t row = i / pieces, p = i % pieces;
        uint32_t slot = tile + row < w.end ? tile + row : w.end - 1;
        row_ref from = TIERED ? rows_at(cache, w.pair, slot) : kv + (size_t)slot * row_bytes;
        copy_16(to + p / 8 * panel + piece_at(row, p % 8), from + value * 2 * DIM + p * 16);
    }
}

template <int DIM, int STAGES, bool VALUES>
static __device__ __forceinline__ void copy_bf16(const loci_cuda_row_cache &cache,
                                                 const wide_work &w, wide_stage *stages,
                                                 uint8_t *memory) {
    const uint8_t *kv = w.pair->kv;
    bool tiered = cache.frames && w.pair->frame_of;
    const uint32_t rows_bytes = TILE_SLOTS * DIM * 2, values = VALUES ? 2 : 1;
    uint32_t turn = 0, phase = 0;
    for (uint32_t tile = w.begin; tile < w.end; tile += TILE_SLOTS) {
        for (uint32_t value = 0; value < values; value++) {
            wait_barrier(&stages[turn].read[value], phase ^ 1);
            uint8_t *to = memory + (turn * values + value) * rows_bytes;
            if (tiered)
                copy_rows<DIM, true>(cache, w, kv, tile, value, to);
            else
                copy_rows<DIM, false>(cache, w, kv, tile, value, to);
            arrive_copied(&stages[turn].there[value]);
        }
        if (++turn == STAGES) {
            turn = 0;
            phase ^= 1;
        }
    }
}

/* Where byte b of an int8 row comes, from the begin on of what holds the tile: into the bytes that
 * the row takes as bf16. What its greatest values are stands behind it. */
static __device__ __forceinline__ uint32_t byte_at(uint32_t row, uint32_t b) {
    return b / PANEL_ROW * TILE_SLOTS * PANEL_ROW + row * PANEL_ROW +
           ((b % PANEL_ROW / 16 ^ row % 2 * 4) << 4);
}

/* The pieces of 16 bytes of int8 rows that a thread copies and restores: one of each lot of rows. A
 * warp has whole rows, and eight lanes never two pieces in the same banks, as bytes or as bf16. */
template <int DIM> struct byte_piece {
    static const uint32_t lots = DIM / 16, lot = TILE_SLOTS / lots;
    uint32_t row, p;
    __device__ __forceinline__ byte_piece() {
        uint32_t lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;
        row = warp * (lot / 4) + (DIM == 64 ? lane / 4 : lane / 16 * 2 + lane / 4 % 2);
        p = lane % 4 + (DIM == 64 ? 0 : lane / 8 % 2 * 4);
    }
};

template <int DIM, bool TIERED>
static __device__ __forceinline__ void copy_bytes(const loci_cuda_row_cache &cache,
                                                  const wide_work &w, const uint8_t *kv,
                                                  uint32_t tile, uint32_t value, uint8_t *to) {
    const byte_piece<DIM> own;
    const uint32_t row_bytes = 2 * DIM + 16;
#pragma unroll
    for (uint32_t i = 0; i < own.lots; i++) {
        uint32_t row = own.row + i * own.lot;
        uint32_t slot = tile + row < w.end ? tile + row : w.end - 1;
        const uint8_t *from =
            TIERED ? rows_at(cache, w.pair, slot) - 1 : kv + (size_t)slot * row_bytes;
        copy_16(to + byte_at(row, own.p * 16), from + value * DIM + own.p * 16);
        if (own.p == 0) copy_4(to + byte_at(row, DIM), from + 2 * DIM);
    }
}

/* Rows of bytes become rows of bf16 where they stand. */
template <int DIM>
static __device__ __forceinline__ void restore_tile(uint32_t value, uint8_t *to) {
    const byte_piece<DIM> own;
    const uint32_t each = 4; /* lots at a time */
    uint8_t *panel = to + own.p / 4 * TILE_SLOTS * PANEL_ROW;
#pragma unroll
    for (uint32_t i = 0; i < own.lots; i += each) {
        uint4 bytes[each];
        uint32_t most[each];
#pragma unroll
        for (uint32_t j = 0; j < each; j++) {
            uint32_t row = own.row + (i + j) * own.lot;
            bytes[j] = *(const uint4 *)(to + byte_at(row, own.p * 16));
            most[j] = *(const uint32_t *)(to + byte_at(row, DIM));
        }
        __syncwarp(); /* all have read */
#pragma unroll
        for (uint32_t j = 0; j < each; j++) {
            uint32_t row = own.row + (i + j) * own.lot, at = own.p % 4 * 2;
            restore_16(bytes[j], value ? most[j] >> 16 : most[j] & 0xffff,
                       (uint4 *)(panel + piece_at(row, at)),
                       (uint4 *)(panel + piece_at(row, at + 1)));
        }
    }
}

/* The same for int8: tiles come as bytes, some of them on their way while earlier ones become bf16.
 */
template <int DIM, int STAGES, bool VALUES>
static __device__ __forceinline__ void copy_int8(const loci_cuda_row_cache &cache,
                                                 const wide_work &w, wide_stage *stages,
                                                 uint8_t *memory) {
    const uint8_t *kv = w.pair->kv;
    bool tiered = cache.frames && w.pair->frame_of;
    const uint32_t rows_bytes = TILE_SLOTS * DIM * 2, values = VALUES ? 2 : 1;
    const uint32_t ahead = VALUES ? STAGES : STAGES - 1; /* times K or V of a tile */
    uint32_t tiles = (w.end - w.begin + TILE_SLOTS - 1) / TILE_SLOTS, all = tiles * values;
    for (uint32_t i = 0; i < all + ahead; i++) {
        if (i < all) {
            uint32_t n = i / values, value = i % values, turn = n % STAGES;
            uint8_t *to = memory + (turn * values + value) * rows_bytes;
            wait_barrier(&stages[turn].read[value], n / STAGES % 2 ^ 1);
            if (tiered)
                copy_bytes<DIM, true>(cache, w, kv, w.begin + n * TILE_SLOTS, value, to);
            else
                copy_bytes<DIM, false>(cache, w, kv, w.begin + n * TILE_SLOTS, value, to);
        }
        close_group();
        if (i < ahead) continue;
        uint32_t n = (i - ahead) / values, value = (i - ahead) % values, turn = n % STAGES;
        wait_groups<ahead>();
        __syncwarp(); /* what all lanes copied is there */
        restore_tile<DIM>(value, memory + (turn * values + value) * rows_bytes);
        arrive(&stages[turn].there[value]);
    }
}

template <int DIM, int STAGES, bool VALUES>
static __device__ __forceinline__ void copy_tiles(const loci_cuda_row_cache &cache,
                                                  const wide_work &w, wide_stage *stages,
                                                  uint8_t *memory) {
    if (w.pair->int8)
        copy_int8<DIM, STAGES, VALUES>(cache, w, stages, memory);
    else
        copy_bf16<DIM, STAGES, VALUES>(cache, w, stages, memory);
}

#endif

#endif
