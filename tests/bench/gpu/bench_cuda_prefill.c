/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention of a prefill on the GPU: SEGMENTS packed segments of TOKENS tokens, causal, K and
 * V as the encoder has them (f32, rounded where precision is BF16) or in bf16. One JSON line each;
 * dense_torch.py --prefill times PyTorch at the same shapes.
 *
 *   bench_cuda_prefill [--steps N] [--heads Q KV DIM] SEGMENTS TOKENS
 *
 * ms: median over steps, by events on the stream, of what one call enqueues; the cache is written
 * over between steps. error: relative L2 error of the output against precision F32.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/cuda.h"
#include "base/half.h"
#include "tests/attention/corpus_fixture.h"
#include "tests/bench/gpu/bench.h"

#define FLUSH_BYTES ((size_t)1 << 30)
#define WARM_STEPS 3u

typedef struct bench {
    uint32_t steps, q_heads, kv_heads, dim, segments, tokens;
    loci_backend *backend;
    loci_stream *stream;
    loci_buffer *q, *k, *v, *half_k, *half_v, *out, *flush;
    loci_attend_span *spans;
    cudaEvent_t begin, end;
    loci_error err;
} bench;

static size_t values_of(const bench *b, uint32_t heads) {
    return (size_t)b->segments * b->tokens * heads * b->dim;
}

/* Random values, of f32 and, where asked for, rounded to bf16. */
static void draw(bench *b, uint64_t seed, uint32_t heads, loci_buffer **out, loci_buffer **half) {
    const loci_backend_ops *ops = b->backend->ops;
    size_t n = values_of(b, heads);
    float *x = need(malloc(n * sizeof *x));
    uint16_t *rounded = need(malloc(n * sizeof *rounded));
    for (size_t i = 0; i < n; i++) {
        x[i] = fixture_normal(&seed);
        rounded[i] = loci_f32_to_bf16(x[i]);
    }
    must(&b->err, ops->alloc(b->backend, n * sizeof *x, out, &b->err));
    ops->upload(b->stream, loci_ref_at(*out, 0), x, n * sizeof *x);
    if (half) {
        must(&b->err, ops->alloc(b->backend, n * sizeof *rounded, half, &b->err));
        ops->upload(b->stream, loci_ref_at(*half, 0), rounded, n * sizeof *rounded);
    }
    must(&b->err, ops->sync(b->stream, &b->err));
    free(x);
    free(rounded);
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Median ms of a call; its output to `out`. */
static float run(bench *b, loci_dtype dtype, loci_dtype precision, float *out) {
    const loci_backend_ops *ops = b->backend->ops;
    loci_attend_dense args = {.q = loci_ref_at(b->q, 0),
                              .k = loci_ref_at(dtype == LOCI_F32 ? b->k : b->half_k, 0),
                              .v = loci_ref_at(dtype == LOCI_F32 ? b->v : b->half_v, 0),
                              .out = loci_ref_at(b->out, 0),
                              .q_stride = b->q_heads * b->dim,
                              .kv_stride = b->kv_heads * b->dim,
                              .out_stride = b->q_heads * b->dim,
                              .q_heads = b->q_heads,
                              .kv_heads = b->kv_heads,
                              .head_dim = b->dim,
                              .kv_dtype = dtype,
                              .precision = precision,
                              .scale = 1.0f / sqrtf((float)b->dim),
                              .causal = true,
                              .spans = b->spans,
                              .span_count = b->segments};
    float *ms = need(malloc((b->steps + WARM_STEPS) * sizeof *ms));
    for (uint32_t s = 0; s < b->steps + WARM_STEPS; s++) {
        must(&b->err,
             loci_cuda_try(cudaMemsetAsync(b->flush->device, 1, FLUSH_BYTES, b->stream->stream),
                           "flush", &b->err));
        (void)cudaEventRecord(b->begin, b->stream->stream);
        ops->attend_dense(b->stream, &args);
        (void)cudaEventRecord(b->end, b->stream->stream);
        must(&b->err, ops->sync(b->stream, &b->err));
        must(&b->err,
             loci_cuda_try(cudaEventElapsedTime(&ms[s], b->begin, b->end), "event", &b->err));
    }
    ops->download(b->stream, out, args.out, values_of(b, b->q_heads) * sizeof *out);
    must(&b->err, ops->sync(b->stream, &b->err));
    qsort(ms + WARM_STEPS, b->steps, sizeof *ms, compare_floats);
    float median = ms[WARM_STEPS + b->steps / 2];
    free(ms);
    return median;
}

static void report(const bench *b, const char *path, float ms, const float *out,
                   const float *exact) {
    double off = 0.0, norm = 0.0, flop = 2.0 * b->segments * b->q_heads * b->dim;
    for (size_t i = 0; i < values_of(b, b->q_heads); i++) {
        double x = (double)out[i] - (double)exact[i];
        off += x * x;
        norm += (double)exact[i] * (double)exact[i];
    }
    flop *= (double)b->tokens * b->tokens;
    printf(
        "{\"bench\":\"cuda_prefill\",\"path\":\"%s\",\"prefill\":%u,\"tokens\":%u,\"q_heads\":%u,"
        "\"kv_heads\":%u,\"dim\":%u,\"steps\":%u,\"ms\":%.4f,\"tflops\":%.1f,\"error\":%.2e}\n",
        path, b->segments, b->tokens, b->q_heads, b->kv_heads, b->dim, b->steps, (double)ms,
        flop / (double)ms / 1e9, sqrt(off / norm));
    (void)fflush(stdout);
}

static bool parse(bench *b, int argc, char **argv) {
    uint32_t *plain[2] = {&b->segments, &b->tokens}, given = 0;
    for (int i = 1; i < argc; i++) {
        uint32_t *to[3] = {given < 2 ? plain[given] : NULL, NULL, NULL};
        int first = i;
        if (strcmp(argv[i], "--steps") == 0) {
            to[0] = &b->steps;
            first++;
        } else if (strcmp(argv[i], "--heads") == 0) {
            to[0] = &b->q_heads;
            to[1] = &b->kv_heads;
            to[2] = &b->dim;
            first++;
        } else {
            given++;
        }
        if (!to[0]) return false;
        for (int n = 0; n < 3 && to[n]; n++, first++) {
            if (first >= argc) return false;
            *to[n] = (uint32_t)strtoul(argv[first], NULL, 10);
            i = first;
        }
    }
    return given == 2 && b->segments > 0 && b->tokens > 0 && b->steps > 0 && b->kv_heads > 0 &&
           b->q_heads % b->kv_heads == 0 && b->dim > 0;
}

int main(int argc, char **argv) {
    bench b = {.steps = 10, .q_heads = 28, .kv_heads = 4, .dim = 128};
    if (!parse(&b, argc, argv)) {
        (void)fprintf(stderr,
                      "usage: bench_cuda_prefill [--steps N] [--heads Q KV DIM] SEGMENTS TOKENS\n");
        return 2;
    }
    b.backend = open_or_skip(NULL);
    const loci_backend_ops *ops = b.backend->ops;
    must(&b.err, ops->stream_open(b.backend, &b.stream, &b.err));
    must(&b.err, loci_cuda_try(cudaEventCreate(&b.begin), "event", &b.err));
    must(&b.err, loci_cuda_try(cudaEventCreate(&b.end), "event", &b.err));
    must(&b.err, ops->alloc(b.backend, FLUSH_BYTES, &b.flush, &b.err));
    size_t values = values_of(&b, b.q_heads);
    must(&b.err, ops->alloc(b.backend, values * sizeof(float), &b.out, &b.err));
    draw(&b, 1, b.q_heads, &b.q, NULL);
    draw(&b, 2, b.kv_heads, &b.k, &b.half_k);
    draw(&b, 3, b.kv_heads, &b.v, &b.half_v);
    b.spans = need(malloc(b.segments * sizeof *b.spans));
    for (uint32_t i = 0; i < b.segments; i++)
        b.spans[i] = (loci_attend_span){i * b.tokens, b.tokens, i * b.tokens, b.tokens};
    float *exact = need(malloc(values * sizeof *exact)), *out = need(malloc(values * sizeof *out));
    float ms = run(&b, LOCI_F32, LOCI_F32, exact);
    report(&b, "f32", ms, exact, exact);
    ms = run(&b, LOCI_F32, LOCI_BF16, out);
    report(&b, "f32 rounded", ms, out, exact);
    ms = run(&b, LOCI_BF16, LOCI_F32, out);
    report(&b, "bf16 exact", ms, out, exact);
    ms = run(&b, LOCI_BF16, LOCI_BF16, out);
    report(&b, "bf16 rounded", ms, out, exact);
    return 0; /* the process ends with all it holds */
}
