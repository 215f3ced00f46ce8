/* SPDX-License-Identifier: Apache-2.0
 *
 * The cuda backend: its table, device, memory and streams.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/cublaslt.h"
#include "attention/cuda/cuda.h"
#include "attention/cuda/moves.h"
#include "attention/cuda/pairs.h"

/* --- errors ---------------------------------------------------------------------------- */

void loci_cuda_fail(loci_stream *stream, loci_status status, const char *format, ...) {
    if (stream->error.status != LOCI_OK) return;
    char text[sizeof stream->error.text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    /* The code returned is the one recorded; nothing can fail here. */
    (void)!loci_fail(&stream->error, status, "%s", text);
}

loci_status loci_cuda_try(cudaError_t result, const char *what, loci_error *err) {
    if (result == cudaSuccess) return LOCI_OK;
    (void)cudaGetLastError(); /* the next call must not report this one */
    loci_status status = result == cudaErrorMemoryAllocation ? LOCI_E_NOMEM : LOCI_E_INTERNAL;
    return loci_fail(err, status, "CUDA: %s failed: %s", what, cudaGetErrorString(result));
}

bool loci_cuda_ok(loci_stream *stream, cudaError_t result, const char *what) {
    loci_error err;
    if (loci_cuda_try(result, what, &err) == LOCI_OK) return true;
    loci_cuda_fail(stream, err.status, "%s", err.text);
    return false;
}

cudaError_t loci_cuda_drain(loci_cuda *cuda) {
    pthread_mutex_lock(&cuda->recording);
    cudaError_t result = cudaDeviceSynchronize();
    pthread_mutex_unlock(&cuda->recording);
    return result;
}

bool loci_cuda_records(loci_stream *stream) {
    stream->unrecordable = stream->unrecordable || stream->recording;
    return stream->recording;
}

/* --- open ------------------------------------------------------------------------------ */

#define ROOM_BYTES ((uint64_t)2 << 30)

static loci_status no_device(cudaError_t result, loci_error *err) {
    int driver = 0;
    (void)cudaGetLastError();
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return loci_fail(err, LOCI_E_UNAVAILABLE,
                         "backend cuda: there is no NVIDIA driver on this machine");
    if (result == cudaErrorInsufficientDriver)
        return loci_fail(err, LOCI_E_UNAVAILABLE,
                         "backend cuda: the NVIDIA driver is too old: it has CUDA %d.%d, this "
                         "build needs %d.%d",
                         driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                         CUDART_VERSION % 1000 / 10);
    return loci_fail(err, LOCI_E_UNAVAILABLE, "backend cuda: no GPU can be used: %s",
                     cudaGetErrorString(result == cudaSuccess ? cudaErrorNoDevice : result));
}

static loci_status open_device(loci_cuda *cuda, loci_error *err) {
    int count = 0;
    struct cudaDeviceProp device;
    cudaError_t result = cudaGetDeviceCount(&count);
    if (result != cudaSuccess || count == 0) return no_device(result, err);
    LOCI_TRY(loci_cuda_try(cudaSetDevice(0), "cudaSetDevice", err));
    LOCI_TRY(loci_cuda_try(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties", err));
    if (device.major < 8)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "backend cuda: %s has compute capability %d.%d; 8.0 is the least",
                         device.name, device.major, device.minor);
    cuda->multiprocessors = device.multiProcessorCount;
    cuda->block_bytes = device.sharedMemPerBlockOptin;
#ifdef LOCI_CUDA_90A
    cuda->wgmma = device.major == 9 && device.minor == 0;
#endif
    cuda->room_bytes = ROOM_BYTES;
    snprintf(cuda->description, sizeof cuda->description,
             "cuda %.80s (sm_%d%d, %d multiprocessors, %zu MiB, bf16)", device.name, device.major,
             device.minor, device.multiProcessorCount, device.totalGlobalMem >> 20);
    return LOCI_OK;
}

/* The logarithms that estimates add, as the CPU has them. */
static loci_status put_logs(loci_cuda *cuda, loci_error *err) {
    float logs[LOCI_CUDA_LOGS + 1];
    logs[0] = -INFINITY;
    for (uint32_t n = 1; n <= LOCI_CUDA_LOGS; n++) logs[n] = logf((float)n);
    void *memory;
    LOCI_TRY(loci_cuda_malloc(cuda, sizeof logs, &memory, err));
    cuda->logs = memory;
    return loci_cuda_try(cudaMemcpy(memory, logs, sizeof logs, cudaMemcpyHostToDevice),
                         "cudaMemcpy", err);
}

static void free_stream(loci_stream *stream) {
    if (stream->stream) (void)cudaStreamDestroy(stream->stream);
    if (stream->marked) (void)cudaEventDestroy(stream->marked);
    if (stream->scratch) (void)cudaFree(stream->scratch);
    if (stream->fault) (void)cudaFreeHost(stream->fault);
    if (stream->staging) (void)cudaFreeHost(stream->staging);
    free(stream);
}

static void cuda_close(loci_backend *self) {
    loci_cuda *cuda = self->ctx;
    if (!cuda) return;
    for (loci_stream *next, *idle = cuda->idle; idle; idle = next) {
        next = idle->next;
        free_stream(idle);
    }
    loci_cuda_pairs_close(cuda->pairs);
    loci_cublaslt_close(cuda->blas);
    if (cuda->logs) (void)cudaFree(cuda->logs);
    if (cuda->copies) (void)cudaStreamDestroy(cuda->copies);
    loci_pool_destroy(cuda->pool);
    pthread_mutex_destroy(&cuda->lock);
    pthread_mutex_destroy(&cuda->idle_lock);
    pthread_mutex_destroy(&cuda->recording);
    free(cuda);
    self->ctx = NULL;
}

static loci_status cuda_open(const loci_backend_options *options, loci_backend *self,
                             loci_error *err) {
    loci_cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cuda backend");
    self->ctx = cuda;
    pthread_mutex_init(&cuda->lock, NULL);
    pthread_mutex_init(&cuda->idle_lock, NULL);
    pthread_mutex_init(&cuda->recording, NULL);
    loci_status status;
    LOCI_TRY_GOTO(open_device(cuda, err), out);
    LOCI_TRY_GOTO(loci_pool_create(options->threads, &cuda->pool, err), out);
    LOCI_TRY_GOTO(loci_cublaslt_open(&cuda->blas, err), out);
    LOCI_TRY_GOTO(loci_cuda_try(cudaStreamCreateWithFlags(&cuda->copies, cudaStreamNonBlocking),
                                "cudaStreamCreate", err),
                  out);
    LOCI_TRY_GOTO(loci_cuda_pairs_open(cuda, &cuda->pairs, err), out);
    status = put_logs(cuda, err);
out:
    if (status != LOCI_OK) cuda_close(self);
    return status;
}

static const char *cuda_describe(loci_backend *self) {
    return ((loci_cuda *)self->ctx)->description;
}

static loci_pool *cuda_pool(loci_backend *self) {
    return ((loci_cuda *)self->ctx)->pool;
}

/* --- memory ---------------------------------------------------------------------------- */

bool loci_cuda_shrink_idle(loci_cuda *cuda) {
    bool freed = false;
    pthread_mutex_lock(&cuda->idle_lock);
    for (loci_stream *idle = cuda->idle; idle; idle = idle->next) {
        freed = freed || idle->scratch;
        if (idle->scratch) (void)cudaFree(idle->scratch);
        idle->scratch = NULL;
        idle->scratch_bytes = 0;
    }
    pthread_mutex_unlock(&cuda->idle_lock);
    return freed;
}

loci_status loci_cuda_malloc(loci_cuda *cuda, size_t bytes, void **out, loci_error *err) {
    *out = NULL;
    cudaError_t result = cudaMalloc(out, bytes ? bytes : 1);
    while (result == cudaErrorMemoryAllocation &&
           (loci_cuda_shrink_idle(cuda) || loci_cuda_pairs_shrink(cuda->pairs, bytes))) {
        (void)cudaGetLastError();
        result = cudaMalloc(out, bytes ? bytes : 1);
    }
    if (result == cudaSuccess) return LOCI_OK;
    *out = NULL;
    (void)cudaGetLastError();
    if (result == cudaErrorMemoryAllocation)
        return loci_fail(err, LOCI_E_NOMEM, "the GPU has no memory for %zu bytes", bytes);
    return loci_cuda_try(result, "cudaMalloc", err);
}

static loci_status cuda_alloc(loci_backend *self, size_t bytes, loci_buffer **out,
                              loci_error *err) {
    loci_cuda *cuda = self->ctx;
    void *device = NULL;
    *out = NULL;
    loci_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return loci_fail(err, LOCI_E_NOMEM, "no memory for a buffer");
    loci_status status = loci_cuda_malloc(cuda, bytes, &device, err);
    if (status == LOCI_OK)
        status = loci_cuda_try(cudaMemsetAsync(device, 0, bytes, cuda->copies), "cudaMemset", err);
    /* Other streams may use it at once. */
    if (status == LOCI_OK)
        status = loci_cuda_try(cudaStreamSynchronize(cuda->copies), "cudaMemset", err);
    if (status != LOCI_OK) {
        (void)cudaFree(device);
        free(buffer);
        return status;
    }
    *buffer = (loci_buffer){device, bytes, NULL};
    *out = buffer;
    return LOCI_OK;
}

static loci_status cuda_wrap(loci_backend *self, const void *host, size_t bytes, loci_buffer **out,
                             loci_error *err) {
    (void)self;
    *out = NULL;
    loci_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return loci_fail(err, LOCI_E_NOMEM, "no memory for a buffer");
    *buffer = (loci_buffer){NULL, bytes, host};
    *out = buffer;
    return LOCI_OK;
}

static void cuda_free(loci_backend *self, loci_buffer *buffer) {
    loci_cuda *cuda = self->ctx;
    if (!buffer) return;
    if (buffer->host) loci_cuda_pairs_forget(cuda->pairs, buffer);
    if (buffer->device) (void)cudaFree(buffer->device);
    free(buffer);
}

/* The whole of a wrapped buffer onto the device, once. */
static loci_status copy_wrapped(loci_cuda *cuda, loci_buffer *buffer, loci_error *err) {
    void *device = NULL;
    LOCI_TRY(loci_cuda_malloc(cuda, buffer->bytes, &device, err));
    loci_status status = loci_cuda_try(
        cudaMemcpyAsync(device, buffer->host, buffer->bytes, cudaMemcpyHostToDevice, cuda->copies),
        "cudaMemcpy", err);
    if (status == LOCI_OK)
        status = loci_cuda_try(cudaStreamSynchronize(cuda->copies), "cudaMemcpy", err);
    if (status != LOCI_OK)
        (void)cudaFree(device);
    else
        buffer->device = device;
    return status;
}

void *loci_cuda_ptr(loci_stream *stream, loci_ref ref, size_t bytes) {
    loci_buffer *buffer = ref.buffer;
    LOCI_ASSERT(buffer && ref.offset <= buffer->bytes && bytes <= buffer->bytes - ref.offset);
    uint8_t *device = atomic_load_explicit(&buffer->device, memory_order_acquire);
    if (!device && buffer->host && loci_cuda_records(stream)) return NULL;
    if (!device && buffer->host) {
        loci_error err = {0};
        pthread_mutex_lock(&stream->cuda->lock);
        if (!buffer->device) (void)!copy_wrapped(stream->cuda, buffer, &err);
        device = buffer->device;
        pthread_mutex_unlock(&stream->cuda->lock);
        if (err.status != LOCI_OK) loci_cuda_fail(stream, err.status, "%s", err.text);
    }
    return device ? device + ref.offset : NULL;
}

/* --- streams --------------------------------------------------------------------------- */

static void cuda_stream_close(loci_backend *self, loci_stream *stream) {
    loci_cuda *cuda = self->ctx;
    if (!stream) return;
    bool well = cudaStreamSynchronize(stream->stream) == cudaSuccess;
    memset(&stream->error, 0, sizeof stream->error);
    *stream->fault = (loci_cuda_fault){0};
    stream->download_count = 0;
    stream->staged = 0;
    if (stream->scratch_bytes > LOCI_CUDA_IDLE_SCRATCH) {
        (void)cudaFree(stream->scratch);
        stream->scratch = NULL;
        stream->scratch_bytes = 0;
    }
    pthread_mutex_lock(&cuda->idle_lock);
    bool keep = well && cuda->idle_count < LOCI_CUDA_IDLE_STREAMS;
    /* The encoder's staging, which has grown, is kept for its two batches. */
    unsigned grown = 0;
    for (const loci_stream *idle = cuda->idle; idle; idle = idle->next)
        grown += idle->staging_bytes > LOCI_CUDA_STAGING_BYTES;
    keep = keep && (stream->staging_bytes == LOCI_CUDA_STAGING_BYTES || grown < 2);
    if (keep) {
        stream->next = cuda->idle;
        cuda->idle = stream;
        cuda->idle_count++;
    }
    pthread_mutex_unlock(&cuda->idle_lock);
    if (!keep) free_stream(stream);
}

static loci_stream *take_idle_stream(loci_cuda *cuda) {
    pthread_mutex_lock(&cuda->idle_lock);
    loci_stream *stream = cuda->idle;
    if (stream) {
        cuda->idle = stream->next;
        cuda->idle_count--;
    }
    pthread_mutex_unlock(&cuda->idle_lock);
    return stream;
}

static loci_status cuda_stream_open(loci_backend *self, loci_stream **out, loci_error *err) {
    *out = take_idle_stream(self->ctx);
    if (*out) return LOCI_OK;
    loci_stream *stream = calloc(1, sizeof *stream);
    if (!stream) return loci_fail(err, LOCI_E_NOMEM, "no memory for a stream");
    stream->cuda = self->ctx;
    void *fault = NULL, *staging = NULL;
    loci_status status;
    LOCI_TRY_GOTO(loci_cuda_try(cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking),
                                "cudaStreamCreate", err),
                  out);
    LOCI_TRY_GOTO(loci_cuda_try(cudaEventCreateWithFlags(&stream->marked, cudaEventDisableTiming),
                                "cudaEventCreate", err),
                  out);
    LOCI_TRY_GOTO(
        loci_cuda_try(cudaMallocHost(&fault, sizeof *stream->fault), "cudaMallocHost", err), out);
    stream->fault = fault;
    *stream->fault = (loci_cuda_fault){0};
    LOCI_TRY_GOTO(
        loci_cuda_try(cudaMallocHost(&staging, LOCI_CUDA_STAGING_BYTES), "cudaMallocHost", err),
        out);
    stream->staging = staging;
    stream->staging_bytes = LOCI_CUDA_STAGING_BYTES;
    *out = stream;
out:
    if (status != LOCI_OK) free_stream(stream);
    return status;
}

static void report_fault(loci_stream *stream, const loci_cuda_fault *fault) {
    switch (fault->code) {
    case LOCI_CUDA_FAULT_NONE: return;
    case LOCI_CUDA_FAULT_TOKEN:
        loci_cuda_fail(stream, LOCI_E_INVAL, "token id %d is outside the table of %u rows",
                       (int)fault->a, fault->b);
        return;
    case LOCI_CUDA_FAULT_NAN:
    case LOCI_CUDA_FAULT_INFINITE:
        loci_cuda_fail(stream, LOCI_E_INTERNAL, "logit %u of row %u is %s", fault->a, fault->b,
                       fault->code == LOCI_CUDA_FAULT_NAN ? "not a number" : "infinite");
        return;
    case LOCI_CUDA_FAULT_BANNED:
        loci_cuda_fail(stream, LOCI_E_INVAL,
                       "row %u has no token left to choose: all %u are banned", fault->a, fault->b);
        return;
    default: loci_cuda_fail(stream, LOCI_E_INTERNAL, "CUDA: unknown fault %u", fault->code);
    }
}

static void copy_download(void *arg, size_t index, unsigned thread) {
    const loci_stream *stream = arg;
    const loci_cuda_download *download = &stream->downloads[index];
    (void)thread;
    memcpy(download->to, download->from, download->bytes);
}

/* Waits, and hands out the downloads that stood in staging; many bytes by all threads. */
static void settle(loci_stream *stream) {
    if (loci_cuda_ok(stream, cudaStreamSynchronize(stream->stream), "a kernel"))
        loci_pool_run(stream->staged > LOCI_CUDA_STAGING_BYTES ? stream->cuda->pool : NULL,
                      stream->download_count, copy_download, stream);
    stream->download_count = 0;
    stream->staged = 0;
}

/* Makes room for more downloads at a time; nothing stands in it. */
static void grow_staging(loci_stream *stream) {
    void *more = NULL;
    size_t bytes = 4 * stream->staging_bytes;
    if (bytes > LOCI_CUDA_STAGING_MOST) bytes = LOCI_CUDA_STAGING_MOST;
    if (bytes == stream->staging_bytes) return;
    if (cudaMallocHost(&more, bytes) != cudaSuccess) {
        (void)cudaGetLastError(); /* it goes on with what it has */
        return;
    }
    (void)cudaFreeHost(stream->staging);
    stream->staging = more;
    stream->staging_bytes = bytes;
}

static loci_status cuda_sync(loci_stream *stream, loci_error *err) {
    settle(stream);
    /* Read after the stream has come to rest, through memory that kernels may have written. */
    loci_cuda_fault fault = *(volatile loci_cuda_fault *)stream->fault;
    report_fault(stream, &fault);
    *stream->fault = (loci_cuda_fault){0};
    loci_status status = stream->error.status;
    if (status != LOCI_OK && err) *err = stream->error;
    memset(&stream->error, 0, sizeof stream->error);
    return status;
}

static void cuda_mark(loci_stream *stream) {
    (void)loci_cuda_ok(stream, cudaEventRecord(stream->marked, stream->stream), "cudaEventRecord");
}

static void cuda_await(loci_stream *stream, const loci_stream *other) {
    (void)loci_cuda_ok(stream, cudaStreamWaitEvent(stream->stream, other->marked, 0),
                       "cudaStreamWaitEvent");
}

bool loci_cuda_send(loci_stream *stream, void *to, const void *src, size_t bytes) {
    /* From memory that is not page-locked CUDA copies the source before it returns. */
    return bytes == 0 || loci_cuda_records(stream) ||
           loci_cuda_ok(stream,
                        cudaMemcpyAsync(to, src, bytes, cudaMemcpyHostToDevice, stream->stream),
                        "cudaMemcpy to the device");
}

static void cuda_upload(loci_stream *stream, loci_ref dst, const void *src, size_t bytes) {
    void *to = bytes ? loci_cuda_ptr(stream, dst, bytes) : NULL;
    if (to) (void)loci_cuda_send(stream, to, src, bytes);
}

/* Room for so many downloads, or as much as there can be. In their order: the same bytes may be
 * asked for twice. */
static void make_room(loci_stream *stream, unsigned count, size_t bytes) {
    if (stream->download_count + count <= LOCI_CUDA_DOWNLOADS &&
        bytes <= stream->staging_bytes - stream->staged)
        return;
    settle(stream);
    if (bytes > 0) grow_staging(stream);
}

static size_t staged_bytes(size_t bytes) {
    return (bytes + 15) / 16 * 16;
}

/* The place of a download for which there is room. */
static uint8_t *stage(loci_stream *stream, void *to, size_t bytes) {
    uint8_t *at = stream->staging + stream->staged;
    stream->downloads[stream->download_count++] = (loci_cuda_download){to, at, bytes};
    stream->staged += staged_bytes(bytes);
    if (stream->staged > stream->staging_bytes) stream->staged = stream->staging_bytes;
    return at;
}

void *loci_cuda_stage(loci_stream *stream, void *to, size_t bytes) {
    LOCI_ASSERT(bytes <= LOCI_CUDA_STAGING_BYTES);
    make_room(stream, 1, bytes);
    return stage(stream, to, bytes);
}

void loci_cuda_tell(loci_stream *stream, void *to, const void *from, size_t bytes) {
    make_room(stream, 1, 0);
    stream->downloads[stream->download_count++] = (loci_cuda_download){to, from, bytes};
}

void loci_cuda_told(loci_stream *stream, const void *from) {
    bool pending = false;
    for (unsigned i = 0; i < stream->download_count && !pending; i++)
        pending = stream->downloads[i].from == from;
    if (pending) settle(stream);
}

static void cuda_download(loci_stream *stream, void *dst, loci_ref src, size_t bytes) {
    const void *from = bytes ? loci_cuda_ptr(stream, src, bytes) : NULL;
    if (!from || loci_cuda_records(stream)) return;
    make_room(stream, 1, bytes);
    void *to = bytes <= stream->staging_bytes ? stage(stream, dst, bytes) : dst;
    (void)loci_cuda_ok(stream,
                       cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream->stream),
                       "cudaMemcpy to the host");
}

static void cuda_copy(loci_stream *stream, loci_ref dst, loci_ref src, size_t bytes) {
    if (!bytes) return;
    void *to = loci_cuda_ptr(stream, dst, bytes);
    const void *from = loci_cuda_ptr(stream, src, bytes);
    if (to && from)
        (void)loci_cuda_ok(
            stream, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream->stream),
            "cudaMemcpy");
}

static void cuda_move(loci_stream *stream, const loci_move *moves, uint32_t count) {
    loci_cuda_moves list;
    size_t bytes = 0;
    LOCI_ASSERT(count > 0 && count <= LOCI_MOVES_MAX);
    if (loci_cuda_records(stream)) return;
    for (uint32_t i = 0; i < count; i++) {
        LOCI_ASSERT(moves[i].bytes % 4 == 0);
        if (!moves[i].to.buffer) bytes += staged_bytes(moves[i].bytes);
    }
    make_room(stream, count, bytes);
    LOCI_ASSERT(bytes <= stream->staging_bytes - stream->staged);
    for (uint32_t i = 0; i < count; i++) {
        const loci_move *move = &moves[i];
        list.move[i].from = loci_cuda_ptr(stream, move->from, move->bytes);
        list.move[i].to = move->to.buffer ? loci_cuda_ptr(stream, move->to, move->bytes)
                                          : (void *)stage(stream, move->host, move->bytes);
        list.move[i].words = (uint32_t)(move->bytes / 4);
        if (!list.move[i].from || !list.move[i].to) return;
    }
    (void)loci_cuda_ok(stream, loci_cuda_k_move(stream->stream, &list, count), "move");
}

void *loci_cuda_scratch(loci_stream *stream, size_t bytes) {
    if (stream->scratch && bytes <= stream->scratch_bytes) return stream->scratch;
    if (loci_cuda_records(stream)) return NULL;
    loci_error err;
    void *memory = NULL;
    size_t size = bytes + bytes / 4 + 4096;
    /* cudaFree waits for what still uses it. */
    if (stream->scratch) (void)cudaFree(stream->scratch);
    stream->scratch = NULL;
    stream->scratch_bytes = 0;
    if (loci_cuda_malloc(stream->cuda, size, &memory, &err) != LOCI_OK) {
        loci_cuda_fail(stream, err.status, "%s", err.text);
        return NULL;
    }
    stream->scratch = memory;
    stream->scratch_bytes = size;
    return memory;
}

static void cuda_tiers(loci_backend *self, loci_tier_stats *out) {
    loci_cuda_pairs_stats stats;
    loci_cuda_pairs_last_stats(((loci_cuda *)self->ctx)->pairs, &stats);
    *out = (loci_tier_stats){
        .device_bytes = stats.bytes,
        .device_budget = stats.budget,
        .host_bytes = stats.host_bytes,
        .host_budget = stats.host_budget,
        .row_hits = stats.row_hits,
        .row_misses = stats.row_misses,
    };
}

const loci_backend_ops loci_backend_cuda = {
    .name = "cuda",
    .on_device = true,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .pool = cuda_pool,
    .alloc = cuda_alloc,
    .wrap = cuda_wrap,
    .free = cuda_free,
    .stream_open = cuda_stream_open,
    .stream_close = cuda_stream_close,
    .sync = cuda_sync,
    .mark = cuda_mark,
    .await = cuda_await,
    .upload = cuda_upload,
    .download = cuda_download,
    .copy = cuda_copy,
    .move = cuda_move,
    .weight_create = loci_cuda_weight_create,
    .weight_free = loci_cuda_weight_free,
    .gemm = loci_cuda_gemm,
    .embed = loci_cuda_embed,
    .rms_norm = loci_cuda_rms_norm,
    .rope = loci_cuda_rope,
    .swiglu = loci_cuda_swiglu,
    .convert = loci_cuda_convert,
    .scatter = loci_cuda_scatter,
    .attend_dense = loci_cuda_attend_dense,
    .merge = loci_cuda_merge,
    .sample = loci_cuda_sample,
    .reads_whole = loci_cuda_reads_whole,
    .lookup_create = loci_cuda_lookup_create,
    .lookup_free = loci_cuda_lookup_free,
    /* No lookup_account: what look-ups take is the device's memory, not the node's. */
    .lookup_begin = loci_cuda_lookup_begin,
    .score_nodes = loci_cuda_score_nodes,
    .score_codes = loci_cuda_score_codes,
    .select = loci_cuda_select,
    .attend_sparse = loci_cuda_attend_sparse,
    .attribute = loci_cuda_attribute,
    .attribute_each = loci_cuda_attribute_each,
    .score_segments = loci_cuda_score_segments,
    .lookup_candidates = loci_cuda_lookup_candidates,
    .lookup_selected = loci_cuda_lookup_selected,
    .lookup_squeezed = loci_cuda_lookup_squeezed,
    .lookup_stats = loci_cuda_lookup_stats,
    .step_begin = loci_cuda_step_begin,
    .step_end = loci_cuda_step_end,
    .tiers = cuda_tiers,
    .cluster_keys = loci_cuda_cluster_keys,
};
