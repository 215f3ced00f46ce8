/* SPDX-License-Identifier: Apache-2.0
 *
 * Upkeep of the cache of K and V rows between two steps; see rows.h.
 */
#include <cuda_runtime.h>

#include "attention/cuda/look.cuh"

#define SWEEP_THREADS 1024u
/* Windows of SWEEP_THREADS * LOCI_CUDA_FRAME_LOT frames that one sweep looks at, at most: where
 * nearly all are in use a step must not wait long. */
#define SWEEP_WINDOWS 8u

/* One block. A thread has LOCI_CUDA_FRAME_LOT frames of a window; the ring is filled in the order
 * of the hand, which stops at the first thread that the ring has no room for. */
static __global__ void __launch_bounds__(SWEEP_THREADS) k_rows_sweep(loci_cuda_row_cache cache) {
    uint32_t head = cache.state->head, tail = cache.state->tail, hand = cache.state->hand;
    uint32_t seen = 0, evicted = 0;
    if ((int32_t)(tail - head) < 0) head = tail;
    for (uint32_t window = 0; window < SWEEP_WINDOWS && seen < cache.count; window++) {
        uint32_t room = cache.ring_count - (tail - head);
        if (room == 0) break;
        uint32_t place = threadIdx.x * LOCI_CUDA_FRAME_LOT, idle = 0, all;
        bool there = place < cache.count - seen;
        uint32_t first = there ? (hand + place) % cache.count : 0;
        uint4 *from = (uint4 *)(cache.use + first);
        union {
            uint4 words;
            uint8_t use[LOCI_CUDA_FRAME_LOT];
        } lot;
        if (there) lot.words = *from;
        for (uint32_t i = 0; i < LOCI_CUDA_FRAME_LOT && there; i++)
            idle += lot.use[i] == LOCI_CUDA_FRAME_IDLE;
        uint32_t at = sum_before<SWEEP_THREADS>(idle, &all);
        bool mine = there && at < room;
        for (uint32_t i = 0; i < LOCI_CUDA_FRAME_LOT && mine; i++) {
            if (lot.use[i] == LOCI_CUDA_FRAME_USED) {
                lot.use[i] = LOCI_CUDA_FRAME_IDLE;
            } else if (lot.use[i] == LOCI_CUDA_FRAME_IDLE && at < room) {
                uint32_t *owner = cache.owner[first + i];
                if (owner) *owner = 0;
                if (owner) evicted++;
                cache.owner[first + i] = NULL;
                cache.ring[(tail + at++) & (cache.ring_count - 1)] = first + i;
                lot.use[i] = LOCI_CUDA_FRAME_FREE;
            }
        }
        if (mine) *from = lot.words;
        uint32_t moved = (uint32_t)__syncthreads_count(mine) * LOCI_CUDA_FRAME_LOT;
        tail += all < room ? all : room;
        hand = (uint32_t)(((uint64_t)hand + moved) % cache.count);
        seen += moved;
    }
    uint32_t sum;
    (void)sum_before<SWEEP_THREADS>(evicted, &sum);
    if (threadIdx.x != 0) return;
    cache.state->head = head;
    cache.state->tail = tail;
    cache.state->hand = hand;
    cache.state->evicted += sum;
}

extern "C" cudaError_t loci_cuda_k_rows_sweep(cudaStream_t stream,
                                              const loci_cuda_row_cache *cache) {
    k_rows_sweep<<<1, SWEEP_THREADS, 0, stream>>>(*cache);
    return cudaGetLastError();
}

static __global__ void k_rows_forget(loci_cuda_row_cache cache, const uint32_t *table,
                                     uint32_t tokens) {
    for (uint64_t f = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; f < cache.count;
         f += (uint64_t)gridDim.x * blockDim.x) {
        const uint32_t *owner = cache.owner[f];
        if (!owner || owner < table || owner >= table + tokens) continue;
        cache.owner[f] = NULL;
        cache.use[f] = LOCI_CUDA_FRAME_IDLE;
    }
}

extern "C" cudaError_t loci_cuda_k_rows_forget(cudaStream_t stream,
                                               const loci_cuda_row_cache *cache,
                                               const uint32_t *table, uint32_t tokens) {
    k_rows_forget<<<1024, 256, 0, stream>>>(*cache, table, tokens);
    return cudaGetLastError();
}
