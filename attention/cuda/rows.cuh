/* SPDX-License-Identifier: Apache-2.0
 *
 * How kernels read K and V rows that stand in memory of the host, and keep what they have read.
 */
#ifndef LOCI_ATTENTION_CUDA_ROWS_CUH
#define LOCI_ATTENTION_CUDA_ROWS_CUH

#include "attention/cuda/device.cuh"

/* The frame that holds the rows of a slot, numbered from 1; 0: none. */
static __device__ __forceinline__ uint32_t frame_at(const loci_cuda_row_cache &cache,
                                                    const loci_cuda_pair *pair, uint32_t slot) {
    return pair->frame_of && cache.frames ? pair->frame_of[slot] : 0;
}

static __device__ __forceinline__ uint16_t *frame_rows(const loci_cuda_row_cache &cache,
                                                       uint32_t frame) {
    return cache.frames + (size_t)(frame - 1) * 2 * cache.dim;
}

/* The rows of a slot where they are nearest. */
static __device__ __forceinline__ const uint16_t *
rows_at(const loci_cuda_row_cache &cache, const loci_cuda_pair *pair, uint32_t slot, uint32_t dim) {
    uint32_t frame = frame_at(cache, pair, slot);
    return frame ? frame_rows(cache, frame) : pair->kv + (size_t)slot * 2 * dim;
}

/* The frame for what is number `turn` of those taken from the ring in this step, or NULL: there are
 * none left. The caller fills it before the kernel ends; no other thread looks at the slot. */
static __device__ __forceinline__ uint16_t *take_frame(const loci_cuda_row_cache &cache,
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

#endif
