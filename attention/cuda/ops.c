/* SPDX-License-Identifier: Apache-2.0
 *
 * Operations on rows and dense attention: resolve refs, cut the work, call the launchers.
 */
#include <stdlib.h>
#include <string.h>

#include "attention/common.h"
#include "attention/cuda/cuda.h"
#include "attention/cuda/few.h"

#define HEAD_DIM_MAX 512u
/* Tasks that a span is cut into at most, where its keys suffice: four blocks on each multiprocessor
 * of a large device; a constant, so that results do not depend on the device. A span of more than
 * half as many tiles stays whole: it fills the device about as well, and beside other spans its
 * partial results would be written and merged for nothing. */
#define SPAN_TASKS 528u
#define SPLIT_KEYS 512u /* least keys of a split: its partial result is then 3% of their bytes */
#define KEYS_UNIT 64u   /* of a tile */
_Static_assert(2 * SPLIT_KEYS <= LOCI_CUDA_ROW_KEYS, "a query over keys that are not split");

static void *strided(loci_stream *stream, loci_ref ref, size_t rows, size_t stride, size_t width,
                     size_t size) {
    return loci_cuda_ptr(stream, ref, rows ? ((rows - 1) * stride + width) * size : 0);
}

void loci_cuda_rms_norm(loci_stream *stream, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                        uint32_t cols, float eps) {
    if (rows == 0) return;
    size_t bytes = (size_t)rows * cols * sizeof(float);
    float *to = loci_cuda_ptr(stream, y, bytes);
    const float *from = loci_cuda_ptr(stream, x, bytes);
    const float *by = loci_cuda_ptr(stream, gain, cols * sizeof(float));
    if (to && from && by)
        (void)loci_cuda_ok(stream,
                           loci_cuda_k_rms_norm(stream->stream, to, from, by, rows, cols, eps),
                           "rms_norm");
}

void loci_cuda_rope(loci_stream *stream, loci_ref x, uint32_t stride, loci_ref positions,
                    loci_ref inv_freq, uint32_t rows, uint32_t heads, uint32_t head_dim) {
    if (rows == 0) return;
    float *at = strided(stream, x, rows, stride, (size_t)heads * head_dim, sizeof(float));
    const int32_t *where = loci_cuda_ptr(stream, positions, rows * sizeof(int32_t));
    const float *by = loci_cuda_ptr(stream, inv_freq, head_dim / 2 * sizeof(float));
    if (at && where && by)
        (void)loci_cuda_ok(
            stream, loci_cuda_k_rope(stream->stream, at, stride, where, by, rows, heads, head_dim),
            "rope");
}

void loci_cuda_swiglu(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols) {
    size_t bytes = (size_t)rows * cols * sizeof(float);
    if (bytes == 0) return;
    float *to = loci_cuda_ptr(stream, y, bytes);
    const float *from = loci_cuda_ptr(stream, x, 2 * bytes);
    if (to && from)
        (void)loci_cuda_ok(stream, loci_cuda_k_swiglu(stream->stream, to, from, rows, cols),
                           "swiglu");
}

void loci_cuda_convert(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                       loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols) {
    if (rows == 0 || cols == 0) return;
    if (dst_dtype != LOCI_F32 && dst_dtype != LOCI_BF16) {
        loci_cuda_fail(stream, LOCI_E_UNSUPPORTED, "convert: only to f32 and bf16");
        return;
    }
    size_t size = dst_dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
    void *to = strided(stream, dst, rows, dst_stride, cols, size);
    const float *from = strided(stream, src, rows, src_stride, cols, sizeof(float));
    if (!to || !from) return;
    cudaError_t result =
        dst_dtype == LOCI_F32
            ? loci_cuda_k_to_f32(stream->stream, to, dst_stride, from, src_stride, rows, cols)
            : loci_cuda_k_to_bf16(stream->stream, to, dst_stride, from, src_stride, rows, cols,
                                  cols);
    (void)loci_cuda_ok(stream, result, "convert");
}

void loci_cuda_scatter(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_ref at,
                       loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols) {
    if (rows == 0 || cols == 0) return;
    float *to = loci_cuda_ptr(stream, dst, cols * sizeof(float));
    const int32_t *where = loci_cuda_ptr(stream, at, rows * sizeof(int32_t));
    const float *from = strided(stream, src, rows, src_stride, cols, sizeof(float));
    if (to && where && from)
        (void)loci_cuda_ok(stream,
                           loci_cuda_k_scatter_rows(stream->stream, to, dst_stride, where, from,
                                                    src_stride, rows, cols),
                           "scatter");
}

void loci_cuda_merge(loci_stream *stream, loci_ref out_a, uint32_t stride_a, loci_ref lse_a,
                     loci_ref out_b, uint32_t stride_b, loci_ref lse_b, uint32_t rows,
                     uint32_t heads, uint32_t head_dim) {
    if (rows == 0 || heads == 0) return;
    size_t width = (size_t)heads * head_dim, lse_bytes = (size_t)rows * heads * sizeof(float);
    float *a = strided(stream, out_a, rows, stride_a, width, sizeof(float));
    const float *b = strided(stream, out_b, rows, stride_b, width, sizeof(float));
    float *a_lse = loci_cuda_ptr(stream, lse_a, lse_bytes);
    const float *b_lse = loci_cuda_ptr(stream, lse_b, lse_bytes);
    if (a && b && a_lse && b_lse)
        (void)loci_cuda_ok(stream,
                           loci_cuda_k_merge(stream->stream, a, stride_a, a_lse, b, stride_b, b_lse,
                                             rows, heads, head_dim),
                           "merge");
}

/* --- dense attention ------------------------------------------------------------------- */

/* How a span is computed: in f32, of one query over few keys in f32, or on tensor cores to about
 * 2^-17 or with factors rounded. */
enum { PATH_PLAIN, PATH_ROW, PATH_EXACT, PATH_ROUNDED, PATHS };

/* By the call's types and the span's own counts. tensor: shapes suit tensor cores. */
static int path_of(const loci_attend_dense *args, const loci_attend_span *span, bool tensor) {
    bool exact = args->precision != LOCI_BF16 || span->q_count <= LOCI_ATTEND_EXACT_QUERIES;
    if (exact && span->q_count == 1 && span->kv_count < 2 * SPLIT_KEYS) return PATH_ROW;
    if (!tensor || (args->kv_dtype == LOCI_F32 && exact)) return PATH_PLAIN;
    return exact ? PATH_EXACT : PATH_ROUNDED;
}

/* How a span is cut; by nothing but its own counts and path. */
static loci_cuda_span cut_span(const loci_attend_span *s, uint32_t group, uint32_t kv_heads,
                               int path) {
    uint64_t rows = (uint64_t)s->q_count * group;
    loci_cuda_span span = {.q_begin = s->q_begin,
                           .q_count = s->q_count,
                           .kv_begin = s->kv_begin,
                           .kv_count = s->kv_count,
                           .rows = LOCI_CUDA_ROWS,
                           .splits = 1,
                           .chunk = UINT32_MAX / KEYS_UNIT * KEYS_UNIT};
    bool tiles = path == PATH_EXACT || path == PATH_ROUNDED;
    if (path == PATH_ROW) span.rows = 1;
    if (tiles && rows > LOCI_CUDA_ROWS) span.rows = LOCI_CUDA_WIDE_ROWS;
    span.tiles = (uint32_t)((rows + span.rows - 1) / span.rows);
    uint32_t tasks = span.tiles * kv_heads, most = s->kv_count / SPLIT_KEYS, wanted = 1;
    if (tasks > 0 && most >= 2) wanted = SPAN_TASKS / tasks;
    if (wanted > most) wanted = most;
    if (wanted >= 2) {
        uint32_t chunk = (s->kv_count + wanted - 1) / wanted;
        span.chunk = (chunk + KEYS_UNIT - 1) / KEYS_UNIT * KEYS_UNIT;
        span.splits = (s->kv_count + span.chunk - 1) / span.chunk;
    }
    span.merged = span.splits > 1 || (tiles && span.rows == LOCI_CUDA_ROWS);
    return span;
}

/* Appends a span to those of a path. */
static void add_span(loci_cuda_dense *path, loci_cuda_span *spans, loci_cuda_span span) {
    uint32_t tasks = span.tiles * path->kv_heads * span.splits;
    span.first_task = path->tasks;
    span.first_partial = path->partials;
    span.first_merge = path->merges;
    path->tasks += tasks;
    if (span.merged) {
        path->partials += tasks * span.rows;
        path->merges += span.tiles * path->kv_heads;
        if (span.rows > path->merge_rows) path->merge_rows = span.rows;
    }
    spans[path->span_count++] = span;
}

/* K and V of f32 as bf16 rows of their own for the path that rounds them. */
static bool round_keys(loci_stream *stream, loci_cuda_dense *path, size_t keys, uint8_t *to) {
    uint32_t width = path->kv_heads * path->dim;
    uint16_t *k = (void *)to, *v = k + keys * width;
    if (!loci_cuda_ok(stream,
                      loci_cuda_k_to_bf16(stream->stream, k, width, path->k, path->kv_stride,
                                          (uint32_t)keys, width, width),
                      "attend_dense") ||
        !loci_cuda_ok(stream,
                      loci_cuda_k_to_bf16(stream->stream, v, width, path->v, path->kv_stride,
                                          (uint32_t)keys, width, width),
                      "attend_dense"))
        return false;
    path->k = k;
    path->v = v;
    path->kv_stride = width;
    return true;
}

/* Cuts all spans, path by path, and puts them, unless they are few, and room for partial results,
 * and for rounded K and V, into the stream's scratch. */
static bool cut_spans(loci_stream *stream, const loci_attend_dense *args, size_t keys, bool tensor,
                      loci_cuda_dense *paths) {
    bool few = args->span_count <= LOCI_CUDA_FEW_SPANS;
    loci_cuda_span own[LOCI_CUDA_FEW_SPANS];
    loci_cuda_span *spans = few ? own : malloc(args->span_count * sizeof *spans);
    if (!spans) {
        loci_cuda_fail(stream, LOCI_E_NOMEM, "no memory for %u spans", args->span_count);
        return false;
    }
    uint32_t count = 0, group = args->q_heads / args->kv_heads;
    size_t partials = 0, row = (args->head_dim + 2) * sizeof(float);
    for (int path = 0; path < PATHS; path++) {
        for (uint32_t i = 0; i < args->span_count; i++)
            if (path_of(args, &args->spans[i], tensor) == path)
                add_span(&paths[path], spans + count,
                         cut_span(&args->spans[i], group, args->kv_heads, path));
        if (few) memcpy(paths[path].few, spans + count, paths[path].span_count * sizeof *spans);
        count += paths[path].span_count;
        partials += paths[path].partials;
    }
    bool round = args->kv_dtype == LOCI_F32 && paths[PATH_ROUNDED].span_count > 0;
    size_t spans_bytes = few ? 0 : (args->span_count * sizeof *spans + 255) / 256 * 256;
    size_t partial_bytes = (partials * row + 255) / 256 * 256;
    size_t keys_bytes = round ? 2 * keys * args->kv_heads * args->head_dim * sizeof(uint16_t) : 0;
    uint8_t *scratch = loci_cuda_scratch(stream, spans_bytes + partial_bytes + keys_bytes);
    bool ok = scratch &&
              (few || loci_cuda_send(stream, scratch, spans, args->span_count * sizeof *spans));
    if (!few) free(spans);
    if (!ok) return false;
    const loci_cuda_span *next = few ? NULL : (const void *)scratch;
    float *partial = (float *)(void *)(scratch + spans_bytes);
    for (int path = 0; path < PATHS; path++) {
        paths[path].spans = next;
        paths[path].partial = partial;
        if (next) next += paths[path].span_count;
        partial += paths[path].partials * (size_t)(args->head_dim + 2);
    }
    return !round ||
           round_keys(stream, &paths[PATH_ROUNDED], keys, scratch + spans_bytes + partial_bytes);
}

/* Whether K and V can be read by tensor-core kernels, f32 ones after rounding. */
static bool suits_tensor_cores(const loci_cuda *cuda, const loci_cuda_dense *dense) {
    if (dense->dim % 16 != 0 || dense->dim > 256) return false;
    if (loci_cuda_k_tile_bytes(dense->dim, true) > cuda->block_bytes) return false;
    uintptr_t at = (uintptr_t)dense->k | (uintptr_t)dense->v;
    return !dense->kv_bf16 || (dense->kv_stride % 8 == 0 && at % 16 == 0);
}

void loci_cuda_attend_dense(loci_stream *stream, const loci_attend_dense *args) {
    if (args->kv_heads == 0 || args->q_heads % args->kv_heads != 0 || args->head_dim == 0 ||
        args->head_dim > HEAD_DIM_MAX ||
        (args->kv_dtype != LOCI_F32 && args->kv_dtype != LOCI_BF16)) {
        loci_cuda_fail(stream, LOCI_E_UNSUPPORTED,
                       "attend_dense: %u query heads, %u KV heads of %u, dtype %d", args->q_heads,
                       args->kv_heads, args->head_dim, (int)args->kv_dtype);
        return;
    }
    size_t rows = loci_attend_rows(args, false), keys = loci_attend_rows(args, true);
    if (rows == 0) return;
    size_t q_width = (size_t)args->q_heads * args->head_dim;
    size_t kv_width = (size_t)args->kv_heads * args->head_dim;
    size_t kv_size = args->kv_dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
    loci_cuda_dense dense = {
        .q = strided(stream, args->q, rows, args->q_stride, q_width, sizeof(float)),
        .k = strided(stream, args->k, keys, args->kv_stride, kv_width, kv_size),
        .v = strided(stream, args->v, keys, args->kv_stride, kv_width, kv_size),
        .out = strided(stream, args->out, rows, args->out_stride, q_width, sizeof(float)),
        .q_stride = args->q_stride,
        .kv_stride = args->kv_stride,
        .out_stride = args->out_stride,
        .q_heads = args->q_heads,
        .kv_heads = args->kv_heads,
        .dim = args->head_dim,
        .kv_bf16 = args->kv_dtype == LOCI_BF16,
        .causal = args->causal,
        .sink = args->first_key_is_sink,
        .scale = args->scale,
        .bias = args->first_key_is_sink ? args->first_key_bias : 0.0f,
        .window = args->window,
    };
    if (args->lse.buffer)
        dense.lse = loci_cuda_ptr(stream, args->lse, rows * args->q_heads * sizeof(float));
    if (!dense.q || !dense.k || !dense.v || !dense.out) return;
    loci_cuda_dense paths[PATHS] = {dense, dense, dense, dense};
    if (!cut_spans(stream, args, keys, suits_tensor_cores(stream->cuda, &dense), paths)) return;
    for (int path = 0; path < PATHS; path++) {
        const loci_cuda_dense *p = &paths[path];
        cudaError_t result = path == PATH_PLAIN ? loci_cuda_k_attend_dense(stream->stream, p)
                             : path == PATH_ROW
                                 ? loci_cuda_k_attend_row(stream->stream, p)
                                 : loci_cuda_k_attend_tiles(stream->stream, p, path == PATH_EXACT);
        if (result == cudaSuccess) result = loci_cuda_k_merge_splits(stream->stream, p);
        if (!loci_cuda_ok(stream, result, "attend_dense")) return;
    }
}

/* --- sampling -------------------------------------------------------------------------- */

void loci_cuda_sample(loci_stream *stream, loci_ref ids, loci_ref logprob, loci_ref logits,
                      uint32_t rows, uint32_t vocab, const loci_sample_params *params,
                      const uint32_t *banned, uint32_t banned_count, const uint32_t *recent,
                      uint32_t recent_count) {
    if (rows == 0 || vocab == 0) return;
    size_t count = (size_t)rows * vocab, lists = (size_t)banned_count + recent_count;
    size_t parts = rows * (((size_t)vocab + LOCI_CUDA_SAMPLE_PART - 1) / LOCI_CUDA_SAMPLE_PART);
    loci_cuda_sample_args args = {
        .logits = loci_cuda_ptr(stream, logits, count * sizeof(float)),
        .ids = loci_cuda_ptr(stream, ids, rows * sizeof(int32_t)),
        .logprob = loci_cuda_ptr(stream, logprob, rows * sizeof(float)),
        .rows = rows,
        .vocab = vocab,
        .temperature = params->temperature,
        .top_p = params->top_p,
        .penalty = params->repetition_penalty,
        .seed = params->seed,
        .step = params->step,
        .banned_count = banned_count,
        .recent_count = recent_count,
        .fault = stream->fault,
    };
    size_t steps = (size_t)rows * LOCI_CUDA_SAMPLE_STEPS;
    size_t listed = args.temperature > 0.0f ? count : 0;
    args.steps = loci_cuda_scratch(stream, steps * sizeof *args.steps + parts * sizeof *args.parts +
                                               listed * sizeof *args.list + count * sizeof(float) +
                                               lists * sizeof(uint32_t));
    if (!args.logits || !args.ids || !args.logprob || !args.steps) return;
    args.parts = (loci_cuda_sample_part *)(void *)(args.steps + steps);
    args.list = (loci_cuda_sample_token *)(void *)(args.parts + parts);
    args.adjusted = (float *)(void *)(args.list + listed);
    uint32_t *device_banned = (uint32_t *)(void *)(args.adjusted + count);
    uint32_t *device_recent = device_banned + banned_count;
    args.banned = device_banned;
    args.recent = device_recent;
    if (loci_cuda_send(stream, device_banned, banned, banned_count * sizeof *banned) &&
        loci_cuda_send(stream, device_recent, recent, recent_count * sizeof *recent))
        (void)loci_cuda_ok(stream, loci_cuda_k_sample(stream->stream, &args), "sample");
}
