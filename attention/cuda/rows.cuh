/* SPDX-License-Identifier: Apache-2.0
 *
 * How kernels read K and V rows: those that stand in memory of the host and are kept in frames, and
 * those of int8, which come to shared memory as they are and become bf16 there, the same bits as
 * loci_kv_restore has.
 */
#ifndef LOCI_ATTENTION_CUDA_ROWS_CUH
#define LOCI_ATTENTION_CUDA_ROWS_CUH

#include "attention/cuda/attend_mma.cuh"

/* The frame that holds the rows of a slot, numbered from 1; 0: none. */
static __device__ __forceinline__ uint32_t frame_at(const loci_cuda_row_cache &cache,
                                                    const loci_cuda_pair *pair, uint32_t slot) {
    return pair->frame_of && cache.frames ? pair->frame_of[slot] : 0;
}

static __device__ __forceinline__ uint8_t *frame_rows(const loci_cuda_row_cache &cache,
                                                      uint32_t frame) {
    return cache.frames + (size_t)(frame - 1) * 4 * cache.dim;
}

/* Where a slot's K row begins; of int8 rows the address is one more. */
typedef const uint8_t *row_ref;

static __device__ __forceinline__ row_ref rows_of(const loci_cuda_pair *pair, uint32_t slot) {
    return pair->kv + (size_t)slot * pair->row_bytes + pair->int8;
}

static __device__ __forceinline__ bool row_is_int8(row_ref row) {
    return (uintptr_t)row & 1;
}

/* The rows of a slot where they are nearest. */
static __device__ __forceinline__ row_ref rows_at(const loci_cuda_row_cache &cache,
                                                  const loci_cuda_pair *pair, uint32_t slot) {
    uint32_t frame = frame_at(cache, pair, slot);
    return frame ? frame_rows(cache, frame) + pair->int8 : rows_of(pair, slot);
}

/* The frame for what is number `turn` of those taken from the ring in this step, or NULL: there are
 * none left. The caller fills it before the kernel ends; no other thread looks at the slot. */
static __device__ __forceinline__ uint8_t *take_frame(const loci_cuda_row_cache &cache,
                                                      const loci_cuda_pair *pair, uint32_t slot,
                                                      uint32_t turn) {
    if ((int32_t)(cache.state->tail - turn) <= 0) return NULL;
    uint32_t frame = cache.ring[turn & (cache.ring_count - 1)];
    cache.owner[frame] = &pair->frame_of[slot];
    cache.use[frame] = LOCI_CUDA_FRAME_USED;
    pair->frame_of[slot] = frame + 1;
    return frame_rows(cache, frame + 1);
}

/* What thread 0 of a block adds to the figures; returns the first of `misses` turns. */
static __device__ __forceinline__ uint32_t count_reads(const loci_cuda_row_cache &cache,
                                                       uint32_t hits, uint32_t misses) {
    loci_cuda_row_state *state = cache.state;
    if (hits) atomicAdd(&state->hits, (unsigned long long)hits);
    if (!misses) return 0;
    atomicAdd(&state->misses, (unsigned long long)misses);
    return atomicAdd(&state->head, misses);
}

/* --- int8 ------------------------------------------------------------------------------ */

/* Four bytes of a row as four bf16; by the same two roundings as on the host. */
static __device__ __forceinline__ uint2 restored(uint32_t bytes, float scale) {
    float x[4];
    bytes ^= 0x80808080u; /* as many more than -128 */
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) /* in the mantissa of 2^23 */
        x[i] = (__uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u | i)) - 8388736.0f) * scale;
    return uint2{round_pair(x[0], x[1]), round_pair(x[2], x[3])};
}

/* Sixteen bytes of a row, by what its greatest value is. */
static __device__ __forceinline__ void restore_16(const uint4 &bytes, uint32_t most, uint4 *first,
                                                  uint4 *second) {
    float scale = __uint_as_float(most << 16) * (1.0f / 127.0f);
    uint2 a = restored(bytes.x, scale), b = restored(bytes.y, scale);
    uint2 c = restored(bytes.z, scale), d = restored(bytes.w, scale);
    *first = uint4{a.x, a.y, b.x, b.y};
    *second = uint4{c.x, c.y, d.x, d.y};
}

#define NOT_INT8 0xffffffffu /* where the greatest values of an int8 row would stand */

/* Begins to copy piece p, of 16 bytes, of the K and V rows of a slot to rows of WIDTH_OF(DIM) in
 * shared memory. Rows of int8 take the first half of theirs and leave their greatest values behind
 * the K row; any_int8: such rows may be among them. */
template <int DIM>
static __device__ __forceinline__ void copy_piece(uint32_t p, row_ref row, uint32_t dim,
                                                  bool any_int8, uint16_t *k, uint16_t *v) {
    if (!row_is_int8(row)) {
        bool value = p >= dim / 8;
        if (p < dim / 4) copy_16((value ? v : k) + (value ? p - dim / 8 : p) * 8, row + p * 16);
        if (any_int8 && p == 0) *(uint32_t *)(k + DIM) = NOT_INT8;
        return;
    }
    bool value = p >= dim / 16;
    const uint8_t *from = row - 1;
    if (p < dim / 8) copy_16((value ? v : k) + (value ? p - dim / 16 : p) * 8, from + p * 16);
    if (p == 0) copy_4(k + DIM, from + 2 * dim);
}

/* Those of RUN slots, K rows from k on, that are int8 become bf16 in K or V rows from `rows` on, by
 * one warp, which sees all that was copied. */
template <int DIM>
static __device__ __forceinline__ void restore_rows(uint32_t dim, bool value, const uint16_t *k,
                                                    uint16_t *rows) {
    const uint32_t pieces = DIM / 16;
    uint32_t p = threadIdx.x % 32 % pieces;
#pragma unroll 2
    for (uint32_t r = threadIdx.x % 32 / pieces; r < RUN; r += 32 / pieces) {
        uint32_t most = *(const uint32_t *)(k + r * WIDTH_OF(DIM) + DIM);
        uint4 *row = (uint4 *)(rows + r * WIDTH_OF(DIM)), bytes = row[p];
        bool own = most != NOT_INT8 && p < dim / 16;
        __syncwarp(); /* the row is read */
        if (own)
            restore_16(bytes, value ? most >> 16 : most & 0xffff, &row[2 * p], &row[2 * p + 1]);
    }
    __syncwarp();
}

template <int DIM>
static __device__ __forceinline__ void restore_run(uint32_t dim, uint16_t *k, uint16_t *v) {
    restore_rows<DIM>(dim, false, k, k);
    restore_rows<DIM>(dim, true, k, v);
}

#endif
