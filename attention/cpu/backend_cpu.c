/* SPDX-License-Identifier: Apache-2.0
 *
 * The cpu backend: its table, memory and streams. Operations run at once; sync() reports
 * the first failure of the stream and clears it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/cpu/gemm_dnnl.h"
#include "attention/cpu/kernels.h"

#define ALIGNMENT 64u
#define KEPT_BYTES ((size_t)2 << 20) /* what a core's cache has, or little more */
#define PART_ROOTS 128u              /* 32,768 tokens: so that threads end at about the same time */

const loci_cpu_kernels *loci_cpu_kernels_of(loci_cpu_isa isa) {
#if defined(__x86_64__)
    if (isa == LOCI_ISA_AVX512_BF16) return &loci_cpu_kernels_avx512_bf16;
    if (isa == LOCI_ISA_AVX512) return &loci_cpu_kernels_avx512;
    if (isa == LOCI_ISA_AVX2) return &loci_cpu_kernels_avx2;
#endif
    (void)isa;
    return &loci_cpu_kernels_portable;
}

static void cpu_close(loci_backend *self) {
    loci_cpu *cpu = self->ctx;
    if (!cpu) return;
    if (cpu->thread_scratch)
        for (unsigned i = 0; i < loci_pool_threads(cpu->pool); i++)
            free(cpu->thread_scratch[i].data);
    free(cpu->thread_scratch);
    loci_dnnl_close(cpu->dnnl);
    loci_pool_destroy(cpu->pool);
    free(cpu);
    self->ctx = NULL;
}

static loci_status cpu_open(const loci_backend_options *options, loci_backend *self,
                            loci_error *err) {
    loci_cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cpu backend");
    self->ctx = cpu;
    cpu->part_roots = PART_ROOTS;
    cpu->kept_bytes = KEPT_BYTES;
    loci_status status;
    LOCI_TRY_GOTO(loci_cpu_isa_detect(options->isa, &cpu->isa, err), out);
    LOCI_TRY_GOTO(loci_pool_create(options->threads, &cpu->pool, err), out);
    unsigned threads = loci_pool_threads(cpu->pool);
    cpu->kernels = loci_cpu_kernels_of(cpu->isa);
    cpu->thread_scratch = calloc(threads, sizeof *cpu->thread_scratch);
    if (!cpu->thread_scratch) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for the cpu backend");
        goto out;
    }
    /* oneDNN picks its kernels by the machine, not by our cap; its f32 and bf16 kernels pay from
     * AVX-512 with BF16 on (below, bf16 falls to a path six times slower than ours). */
    if (cpu->isa == LOCI_ISA_AVX512_BF16)
        LOCI_TRY_GOTO(loci_dnnl_open(threads, &cpu->dnnl, err), out);
    const loci_dnnl_matmul *probe =
        cpu->dnnl ? loci_dnnl_matmul_get(cpu->dnnl, 32, 256, 256, LOCI_BF16) : NULL;
    snprintf(cpu->description, sizeof cpu->description, "cpu %s (products: %s), %u threads",
             loci_cpu_isa_name(cpu->isa), probe ? loci_dnnl_name(probe) : "own", threads);
out:
    if (status != LOCI_OK) cpu_close(self);
    return status;
}

static const char *cpu_describe(loci_backend *self) {
    return ((loci_cpu *)self->ctx)->description;
}

static loci_pool *cpu_pool(loci_backend *self) {
    return ((loci_cpu *)self->ctx)->pool;
}

static loci_status cpu_alloc(loci_backend *self, size_t bytes, loci_buffer **out, loci_error *err) {
    (void)self;
    *out = NULL;
    loci_buffer *buffer = calloc(1, sizeof *buffer);
    /* calloc, so that large buffers take pages only when they are touched. */
    void *allocation = bytes <= SIZE_MAX - ALIGNMENT ? calloc(1, bytes + ALIGNMENT) : NULL;
    if (!buffer || !allocation) {
        free(buffer);
        free(allocation);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for a buffer of %zu bytes", bytes);
    }
    size_t skip = (ALIGNMENT - (uintptr_t)allocation % ALIGNMENT) % ALIGNMENT;
    *buffer = (loci_buffer){(uint8_t *)allocation + skip, bytes, true, allocation};
    *out = buffer;
    return LOCI_OK;
}

static loci_status cpu_wrap(loci_backend *self, const void *host, size_t bytes, loci_buffer **out,
                            loci_error *err) {
    (void)self;
    *out = NULL;
    loci_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return loci_fail(err, LOCI_E_NOMEM, "no memory for a buffer");
    *buffer = (loci_buffer){(uint8_t *)(uintptr_t)host, bytes, false, NULL};
    *out = buffer;
    return LOCI_OK;
}

static void cpu_free(loci_backend *self, loci_buffer *buffer) {
    (void)self;
    if (!buffer) return;
    free(buffer->allocation);
    free(buffer);
}

void *loci_cpu_ptr(loci_ref ref, size_t bytes) {
    LOCI_ASSERT(ref.buffer && ref.offset <= ref.buffer->bytes &&
                bytes <= ref.buffer->bytes - ref.offset);
    return ref.buffer->data + ref.offset;
}

void *loci_cpu_scratch_get(loci_cpu_scratch *scratch, size_t bytes) {
    if (scratch->data && bytes <= scratch->bytes) return scratch->data;
    if (bytes > SIZE_MAX / 2) return NULL;
    free(scratch->data);
    size_t size = (bytes + bytes / 4 + 4096) / ALIGNMENT * ALIGNMENT;
    scratch->data = aligned_alloc(ALIGNMENT, size);
    scratch->bytes = scratch->data ? size : 0;
    return scratch->data;
}

static loci_status cpu_stream_open(loci_backend *self, loci_stream **out, loci_error *err) {
    *out = calloc(1, sizeof **out);
    if (!*out) return loci_fail(err, LOCI_E_NOMEM, "no memory for a stream");
    (*out)->cpu = self->ctx;
    return LOCI_OK;
}

static void cpu_stream_close(loci_backend *self, loci_stream *stream) {
    (void)self;
    if (!stream) return;
    free(stream->scratch.data);
    free(stream);
}

static loci_status cpu_sync(loci_stream *stream, loci_error *err) {
    loci_status status = stream->error.status;
    if (status != LOCI_OK && err) *err = stream->error;
    memset(&stream->error, 0, sizeof stream->error);
    return status;
}

void loci_cpu_fail(loci_stream *stream, loci_status status, const char *format, ...) {
    if (stream->error.status != LOCI_OK) return;
    char text[sizeof stream->error.text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    /* The code returned is the one recorded; nothing can fail here. */
    (void)!loci_fail(&stream->error, status, "%s", text);
}

static void cpu_upload(loci_stream *stream, loci_ref dst, const void *src, size_t bytes) {
    (void)stream;
    if (bytes) memcpy(loci_cpu_ptr(dst, bytes), src, bytes);
}

static void cpu_download(loci_stream *stream, void *dst, loci_ref src, size_t bytes) {
    (void)stream;
    if (bytes) memcpy(dst, loci_cpu_ptr(src, bytes), bytes);
}

static void cpu_copy(loci_stream *stream, loci_ref dst, loci_ref src, size_t bytes) {
    (void)stream;
    if (bytes) memmove(loci_cpu_ptr(dst, bytes), loci_cpu_ptr(src, bytes), bytes);
}

static void cpu_move(loci_stream *stream, const loci_move *moves, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (moves[i].to.buffer)
            cpu_copy(stream, moves[i].to, moves[i].from, moves[i].bytes);
        else
            cpu_download(stream, moves[i].host, moves[i].from, moves[i].bytes);
}

const loci_backend_ops loci_backend_cpu = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .pool = cpu_pool,
    .alloc = cpu_alloc,
    .wrap = cpu_wrap,
    .free = cpu_free,
    .stream_open = cpu_stream_open,
    .stream_close = cpu_stream_close,
    .sync = cpu_sync,
    .upload = cpu_upload,
    .download = cpu_download,
    .copy = cpu_copy,
    .move = cpu_move,
    .weight_create = loci_cpu_weight_create,
    .weight_map = loci_cpu_weight_map,
    .weight_free = loci_cpu_weight_free,
    .gemm = loci_cpu_gemm,
    .embed = loci_cpu_embed,
    .rms_norm = loci_cpu_rms_norm,
    .rope = loci_cpu_rope,
    .swiglu = loci_cpu_swiglu,
    .convert = loci_cpu_convert,
    .scatter = loci_cpu_scatter,
    .attend_dense = loci_cpu_attend_dense,
    .merge = loci_cpu_merge,
    .sample = loci_cpu_sample,
    .lookup_create = loci_cpu_lookup_create,
    .lookup_free = loci_cpu_lookup_free,
    .lookup_account = loci_cpu_lookup_account,
    .lookup_begin = loci_cpu_lookup_begin,
    .score_nodes = loci_cpu_score_nodes,
    .score_codes = loci_cpu_score_codes,
    .select = loci_cpu_select,
    .attend_sparse = loci_cpu_attend_corpus,
    .attribute = loci_cpu_attribute_corpus,
    .score_segments = loci_cpu_score_segments,
    .lookup_candidates = loci_cpu_lookup_candidates,
    .lookup_selected = loci_cpu_lookup_selected,
    .lookup_squeezed = loci_cpu_lookup_squeezed,
    .lookup_stats = loci_cpu_lookup_stats,
};
