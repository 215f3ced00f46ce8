/* SPDX-License-Identifier: Apache-2.0
 *
 * See rows.h; the kernels are in rows.cu and sparse.cu. Memory of a cache: frames, owners, ring,
 * use, state.
 */
#include "attention/cuda/rows.h"

#include <string.h>

#include "attention/cuda/cuda.h"

#define RING_MOST 65536u /* rows that one step may keep */
#define FRAMES_MOST ((uint64_t)1 << 30)
#define SLACK_BYTES 1024u /* state, and what alignment takes */

/* Of a frame: rows, owner, use, a quarter of a place in the ring. */
static size_t frame_cost(uint32_t dim) {
    return 4 * (size_t)dim + sizeof(uint32_t *) + 1 + sizeof(uint32_t) / 4;
}

size_t loci_cuda_rows_least(uint32_t dim) {
    return LOCI_CUDA_FRAME_LOT * frame_cost(dim) + SLACK_BYTES;
}

static loci_cuda_row_cache lay_out(uint8_t *memory, size_t bytes, uint32_t dim) {
    uint64_t count = (bytes - SLACK_BYTES) / frame_cost(dim);
    if (count > FRAMES_MOST) count = FRAMES_MOST;
    count = count / LOCI_CUDA_FRAME_LOT * LOCI_CUDA_FRAME_LOT;
    uint32_t ring = 1;
    while (ring < RING_MOST && ring * 8 <= count) ring *= 2;
    loci_cuda_row_cache cache = {.count = (uint32_t)count, .ring_count = ring, .dim = dim};
    cache.frames = (void *)memory;
    cache.owner = (void *)(memory + count * 4 * dim);
    cache.use = (void *)(cache.owner + count); /* 16 bytes at a time: count is even */
    cache.ring = (void *)(cache.use + count);
    size_t at = (size_t)((uint8_t *)(cache.ring + ring) - memory);
    cache.state = (void *)(memory + (at + 255) / 256 * 256);
    LOCI_ASSERT((uint8_t *)(cache.state + 1) <= memory + bytes);
    return cache;
}

loci_status loci_cuda_rows_init(loci_cuda_rows *rows, cudaStream_t copies, loci_error *err) {
    *rows = (loci_cuda_rows){.copies = copies};
    pthread_mutex_init(&rows->lock, NULL);
    cudaEvent_t event;
    LOCI_TRY(
        loci_cuda_try(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEvent", err));
    rows->last = event;
    return LOCI_OK;
}

void loci_cuda_rows_fini(loci_cuda_rows *rows) {
    if (rows->memory) (void)cudaFree(rows->memory);
    if (rows->last) (void)cudaEventDestroy(rows->last);
    if (rows->copies) pthread_mutex_destroy(&rows->lock);
    *rows = (loci_cuda_rows){0};
}

loci_status loci_cuda_rows_use(loci_cuda_rows *rows, uint8_t *memory, size_t bytes, uint32_t dim,
                               loci_error *err) {
    LOCI_ASSERT(!rows->memory && bytes >= loci_cuda_rows_least(dim));
    loci_cuda_row_cache cache = lay_out(memory, bytes, dim);
    size_t frames = (size_t)cache.count * 4 * dim;
    cudaError_t result = cudaMemsetAsync(memory + frames, 0, bytes - frames, rows->copies);
    if (result == cudaSuccess) result = loci_cuda_k_rows_sweep(rows->copies, &cache);
    if (result == cudaSuccess) result = cudaStreamSynchronize(rows->copies);
    LOCI_TRY(loci_cuda_try(result, "a cache of rows", err));
    pthread_mutex_lock(&rows->lock);
    rows->cache = cache;
    rows->memory = memory;
    rows->bytes = bytes;
    pthread_mutex_unlock(&rows->lock);
    return LOCI_OK;
}

/* The state as what was enqueued so far leaves it; under the lock. */
static void read_state(loci_cuda_rows *rows, loci_cuda_row_state *out) {
    *out = (loci_cuda_row_state){0};
    if (!rows->memory) return;
    (void)cudaStreamWaitEvent(rows->copies, rows->last, 0);
    (void)cudaMemcpyAsync(out, rows->cache.state, sizeof *out, cudaMemcpyDeviceToHost,
                          rows->copies);
    (void)cudaStreamSynchronize(rows->copies);
}

static void add_figures(loci_cuda_row_state *to, const loci_cuda_row_state *more) {
    to->hits += more->hits;
    to->misses += more->misses;
    to->evicted += more->evicted;
}

void loci_cuda_rows_drop(loci_cuda_rows *rows, loci_cuda *cuda) {
    pthread_mutex_lock(&rows->lock);
    (void)loci_cuda_drain(cuda);
    loci_cuda_row_state state;
    read_state(rows, &state);
    add_figures(&rows->before, &state);
    if (rows->memory) (void)cudaFree(rows->memory);
    rows->memory = NULL;
    rows->bytes = 0;
    rows->cache = (loci_cuda_row_cache){0};
    pthread_mutex_unlock(&rows->lock);
}

void loci_cuda_rows_forget(loci_cuda_rows *rows, const uint32_t *table, uint32_t tokens) {
    pthread_mutex_lock(&rows->lock);
    if (rows->memory) {
        (void)cudaStreamWaitEvent(rows->copies, rows->last, 0);
        (void)loci_cuda_k_rows_forget(rows->copies, &rows->cache, table, tokens);
        (void)cudaStreamSynchronize(rows->copies);
    }
    pthread_mutex_unlock(&rows->lock);
}

cudaError_t loci_cuda_rows_enter(loci_cuda_rows *rows, cudaStream_t stream,
                                 loci_cuda_row_cache *out) {
    pthread_mutex_lock(&rows->lock);
    *out = rows->cache;
    return cudaStreamWaitEvent(stream, rows->last, 0);
}

cudaError_t loci_cuda_rows_leave(loci_cuda_rows *rows, cudaStream_t stream, bool used) {
    cudaError_t result = cudaSuccess;
    if (used && rows->memory) result = loci_cuda_k_rows_sweep(stream, &rows->cache);
    cudaError_t recorded = cudaEventRecord(rows->last, stream);
    pthread_mutex_unlock(&rows->lock);
    return result != cudaSuccess ? result : recorded;
}

void loci_cuda_rows_figures(loci_cuda_rows *rows, loci_cuda_row_state *out) {
    pthread_mutex_lock(&rows->lock);
    read_state(rows, out);
    add_figures(out, &rows->before);
    pthread_mutex_unlock(&rows->lock);
}
