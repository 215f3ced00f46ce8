/* SPDX-License-Identifier: Apache-2.0
 *
 * See fake_cuda.h.
 */
#include "tests/attention/fake_cuda.h"

#include <stdlib.h>
#include <string.h>

fake_cuda fake;

/* A head before each allocation, so that what is freed is known. */
typedef struct block {
    size_t bytes;
    uint64_t call; /* that made it */
    bool device;
    uint8_t pad[64 - sizeof(size_t) - sizeof(uint64_t) - sizeof(bool)];
} block;

static cudaError_t take(void **out, size_t bytes, bool device) {
    *out = NULL;
    if (++fake.calls == fake.fail_at) return cudaErrorMemoryAllocation;
    if (device && fake.device_bytes + bytes > fake.device_room) return cudaErrorMemoryAllocation;
    block *b = malloc(sizeof *b + bytes);
    if (!b) return cudaErrorMemoryAllocation;
    *b = (block){.bytes = bytes, .device = device, .call = fake.calls};
    memset(b + 1, 0xa5, bytes);
    size_t *sum = device ? &fake.device_bytes : &fake.host_bytes;
    size_t *most = device ? &fake.device_most : &fake.host_most;
    *(device ? &fake.device : &fake.host) += 1;
    *sum += bytes;
    if (*sum > *most) *most = *sum;
    *out = b + 1;
    return cudaSuccess;
}

static cudaError_t give(void *memory, bool device) {
    if (!memory) return cudaSuccess;
    block *b = (block *)memory - 1;
    if (b->device != device || b->call <= fake.enqueued) abort();
    *(device ? &fake.device : &fake.host) -= 1;
    *(device ? &fake.device_bytes : &fake.host_bytes) -= b->bytes;
    memset(b + 1, 0x5a, b->bytes);
    free(b);
    return cudaSuccess;
}

#define FAKE(name) __wrap_##name
#define DECLARE(name, ...) cudaError_t FAKE(name)(__VA_ARGS__)

DECLARE(cudaMalloc, void **out, size_t bytes);
DECLARE(cudaHostAlloc, void **out, size_t bytes, unsigned flags);
DECLARE(cudaMallocHost, void **out, size_t bytes);
DECLARE(cudaFree, void *memory);
DECLARE(cudaFreeHost, void *memory);
DECLARE(cudaMemGetInfo, size_t *available, size_t *total);
DECLARE(cudaMemcpy, void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind);
DECLARE(cudaMemcpyAsync, void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
        cudaStream_t stream);
DECLARE(cudaMemset, void *to, int value, size_t bytes);
DECLARE(cudaMemsetAsync, void *to, int value, size_t bytes, cudaStream_t stream);
DECLARE(cudaStreamSynchronize, cudaStream_t stream);
DECLARE(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags);
DECLARE(cudaDeviceSynchronize, void);
DECLARE(cudaEventCreateWithFlags, cudaEvent_t *event, unsigned flags);
DECLARE(cudaEventRecord, cudaEvent_t event, cudaStream_t stream);
DECLARE(cudaEventSynchronize, cudaEvent_t event);
DECLARE(cudaEventDestroy, cudaEvent_t event);
DECLARE(cudaGetLastError, void);
DECLARE(loci_cuda_k_rows_sweep, cudaStream_t stream, const loci_cuda_row_cache *cache);
DECLARE(loci_cuda_k_rows_forget, cudaStream_t stream, const loci_cuda_row_cache *cache,
        const uint32_t *table, uint32_t tokens);

cudaError_t FAKE(cudaMalloc)(void **out, size_t bytes) {
    return take(out, bytes, true);
}

cudaError_t FAKE(cudaHostAlloc)(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    return take(out, bytes, false);
}

cudaError_t FAKE(cudaMallocHost)(void **out, size_t bytes) {
    return take(out, bytes, false);
}

cudaError_t FAKE(cudaFree)(void *memory) {
    return give(memory, true);
}

cudaError_t FAKE(cudaFreeHost)(void *memory) {
    return give(memory, false);
}

cudaError_t FAKE(cudaMemGetInfo)(size_t *available, size_t *total) {
    *available = *total = fake.device_room;
    return cudaSuccess;
}

cudaError_t FAKE(cudaMemcpy)(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t FAKE(cudaMemcpyAsync)(void *to, const void *from, size_t bytes,
                                  enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    return FAKE(cudaMemcpy)(to, from, bytes, kind);
}

cudaError_t FAKE(cudaMemset)(void *to, int value, size_t bytes) {
    memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t FAKE(cudaMemsetAsync)(void *to, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    return FAKE(cudaMemset)(to, value, bytes);
}

cudaError_t FAKE(cudaStreamSynchronize)(cudaStream_t stream) {
    (void)stream;
    return cudaSuccess;
}

cudaError_t FAKE(cudaStreamWaitEvent)(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)stream;
    (void)event;
    (void)flags;
    return cudaSuccess;
}

cudaError_t FAKE(cudaDeviceSynchronize)(void) {
    fake.enqueued = 0;
    return cudaSuccess;
}

cudaError_t FAKE(cudaEventCreateWithFlags)(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    *event = NULL;
    return cudaSuccess;
}

cudaError_t FAKE(cudaEventRecord)(cudaEvent_t event, cudaStream_t stream) {
    (void)event;
    (void)stream;
    return cudaSuccess;
}

cudaError_t FAKE(cudaEventSynchronize)(cudaEvent_t event) {
    (void)event;
    return cudaSuccess;
}

cudaError_t FAKE(cudaEventDestroy)(cudaEvent_t event) {
    (void)event;
    return cudaSuccess;
}

cudaError_t FAKE(cudaGetLastError)(void) {
    return cudaSuccess;
}

/* --- kernels --------------------------------------------------------------------------- */

cudaError_t FAKE(loci_cuda_k_rows_sweep)(cudaStream_t stream, const loci_cuda_row_cache *cache) {
    (void)stream;
    loci_cuda_row_state *s = cache->state;
    if ((int32_t)(s->tail - s->head) < 0) s->head = s->tail;
    for (uint32_t seen = 0; seen < cache->count && s->tail - s->head < cache->ring_count; seen++) {
        uint32_t frame = s->hand;
        s->hand = (s->hand + 1) % cache->count;
        if (cache->use[frame] == LOCI_CUDA_FRAME_USED) {
            cache->use[frame] = LOCI_CUDA_FRAME_IDLE;
        } else if (cache->use[frame] == LOCI_CUDA_FRAME_IDLE) {
            if (cache->owner[frame]) {
                *cache->owner[frame] = 0;
                s->evicted++;
            }
            cache->owner[frame] = NULL;
            cache->use[frame] = LOCI_CUDA_FRAME_FREE;
            cache->ring[s->tail++ % cache->ring_count] = frame;
        }
    }
    return cudaSuccess;
}

cudaError_t FAKE(loci_cuda_k_rows_forget)(cudaStream_t stream, const loci_cuda_row_cache *cache,
                                          const uint32_t *table, uint32_t tokens) {
    (void)stream;
    for (uint32_t f = 0; f < cache->count; f++) {
        if (cache->owner[f] < table || cache->owner[f] >= table + tokens) continue;
        cache->owner[f] = NULL;
        cache->use[f] = LOCI_CUDA_FRAME_IDLE;
    }
    return cudaSuccess;
}

const uint8_t *fake_read_rows(const loci_cuda_row_cache *cache, const loci_cuda_pair *pair,
                              uint32_t slot, uint32_t dim) {
    const uint8_t *rows = pair->kv + (size_t)slot * pair->row_bytes;
    if (!cache->frames || !pair->frame_of) return rows;
    if (pair->frame_of[slot]) {
        uint32_t frame = pair->frame_of[slot] - 1;
        cache->use[frame] = LOCI_CUDA_FRAME_USED;
        cache->state->hits++;
        return cache->frames + (size_t)frame * 4 * dim;
    }
    cache->state->misses++;
    uint32_t turn = cache->state->head++;
    if ((int32_t)(cache->state->tail - turn) <= 0) return rows;
    uint32_t frame = cache->ring[turn % cache->ring_count];
    cache->owner[frame] = &pair->frame_of[slot];
    cache->use[frame] = LOCI_CUDA_FRAME_USED;
    pair->frame_of[slot] = frame + 1;
    memcpy(cache->frames + (size_t)frame * 4 * dim, rows, pair->row_bytes);
    return rows;
}
