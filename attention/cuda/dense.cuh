/* SPDX-License-Identifier: Apache-2.0
 *
 * The tasks of dense attention, shared by dense.cu and dense_tiles.cu: where a task stands in its
 * span, which keys its rows see, where results go.
 */
#ifndef LOCI_ATTENTION_CUDA_DENSE_CUH
#define LOCI_ATTENTION_CUDA_DENSE_CUH

#include "attention/cuda/device.cuh"

/* A task's place in its span. */
struct dense_place {
    loci_cuda_span span;
    uint32_t kv_head, split, tile, partial;
};

/* The last span that begins at or before `index`, by one of its counts. */
static __device__ __forceinline__ uint32_t span_of(const loci_cuda_span *spans, uint32_t count,
                                                   uint32_t index, bool merge) {
    return last_at_most(count, index, [&](uint32_t i) {
        return merge ? spans[i].first_merge : spans[i].first_task;
    });
}

/* Kernels take args as a __grid_constant__, so that this is no copy of them. */
static __device__ __forceinline__ const loci_cuda_span *spans_of(const loci_cuda_dense &args) {
    return args.spans ? args.spans : args.few;
}

static __device__ __forceinline__ dense_place find_task(const loci_cuda_dense &args,
                                                        uint32_t index) {
    dense_place p;
    const loci_cuda_span *spans = spans_of(args);
    p.span = spans[span_of(spans, args.span_count, index, false)];
    index -= p.span.first_task;
    p.partial = p.span.first_partial + index * p.span.rows;
    p.tile = index % p.span.tiles;
    p.split = index / p.span.tiles % p.span.splits;
    p.kv_head = index / p.span.tiles / p.span.splits;
    return p;
}

/* The keys that packed row `row` of a span sees: [first, last), and key 0 of a sink. */
static __device__ __forceinline__ void visible(const loci_cuda_dense &args,
                                               const loci_cuda_span &span, uint32_t row,
                                               uint32_t group, int64_t *first, int64_t *last) {
    int64_t query = row / group, count = span.kv_count;
    int64_t position = count - span.q_count + query;
    int64_t begin = args.window ? position - args.window + 1 : 0;
    int64_t end = args.causal ? position + 1 : count;
    *first = *last = 0;
    if (query >= span.q_count) return;
    begin = begin < 0 ? 0 : begin > count ? count : begin;
    *first = begin;
    *last = end < begin ? begin : end;
}

/* What a row of the span gets. */
static __device__ __forceinline__ void put_value(const loci_cuda_dense &args,
                                                 const loci_cuda_span &span, uint32_t kv_head,
                                                 uint32_t row, uint32_t channel, float value) {
    uint32_t group = args.q_heads / args.kv_heads;
    size_t to = span.q_begin + row / group;
    uint32_t head = kv_head * group + row % group;
    args.out[to * args.out_stride + (size_t)head * args.dim + channel] = value;
}

static __device__ __forceinline__ void put_lse(const loci_cuda_dense &args,
                                               const loci_cuda_span &span, uint32_t kv_head,
                                               uint32_t row, float max, float sum) {
    uint32_t group = args.q_heads / args.kv_heads;
    size_t to = span.q_begin + row / group;
    if (args.lse)
        args.lse[to * args.q_heads + kv_head * group + row % group] =
            sum == 0.0f ? -INFINITY : max + logf(sum);
}

static __device__ __forceinline__ float factor_of(float sum) {
    return sum > 0.0f ? 1.0f / sum : sum;
}

/* The keys that any row of the tile sees, within the task's split. */
static __device__ __forceinline__ void range_of(const loci_cuda_dense &args, const dense_place &p,
                                                uint32_t group, uint32_t *begin, uint32_t *end) {
    int64_t first, last, low = (int64_t)p.split * p.span.chunk, high = low + p.span.chunk;
    uint32_t row = p.tile * p.span.rows, rows = p.span.q_count * group;
    uint32_t top = row + p.span.rows - 1 < rows ? row + p.span.rows - 1 : rows - 1;
    if (high > p.span.kv_count) high = p.span.kv_count;
    visible(args, p.span, row, group, &first, &last);
    *begin = (uint32_t)(first > low ? first : low);
    visible(args, p.span, top, group, &first, &last);
    *end = (uint32_t)(last < high ? (last > 0 ? last : 0) : high);
}

#endif
