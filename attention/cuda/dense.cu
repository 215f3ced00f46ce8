/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention over packed spans: the queries of a GQA group stand side by side in one tile, so
 * that keys and values are read once for all of them; long spans with few queries are cut into runs
 * of keys, whose partial results a second kernel merges in their order. How a span is cut depends
 * on that span alone, and so does a row's result.
 */
#include "attention/cuda/attend.cuh"

/* A task's place in its span. */
struct dense_place {
    loci_cuda_span span;
    uint32_t kv_head, split, tile, partial;
};

/* The last span that begins at or before `index`, by one of its counts. */
static __device__ __forceinline__ uint32_t span_of(const loci_cuda_span *spans, uint32_t count,
                                                   uint32_t index, bool merge) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        uint32_t first = merge ? spans[middle].first_merge : spans[middle].first_task;
        if (first <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static __device__ __forceinline__ dense_place find_task(const loci_cuda_dense &args,
                                                        uint32_t index) {
    dense_place p;
    p.span = args.spans[span_of(args.spans, args.span_count, index, false)];
    index -= p.span.first_task;
    p.partial = p.span.first_partial + index;
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

template <typename T>
static __device__ __forceinline__ void load_tile(const attend_memory &m,
                                                 const loci_cuda_dense &args, const dense_place &p,
                                                 uint32_t begin, uint32_t count, bool wide) {
    uint32_t key = threadIdx.x / 8, lane = threadIdx.x % 8;
    size_t at =
        (size_t)(p.span.kv_begin + begin + key) * args.kv_stride + (size_t)p.kv_head * args.dim;
    const T *k = key < count ? (const T *)args.k + at : NULL;
    const T *v = key < count ? (const T *)args.v + at : NULL;
    load_row(m.k + (size_t)key * (m.width + 4), k, args.dim, m.width, wide, lane, 8);
    load_row(m.v + (size_t)key * m.width, v, args.dim, m.width, wide, lane, 8);
}

static __device__ __forceinline__ void load_queries(const attend_memory &m,
                                                    const loci_cuda_dense &args,
                                                    const dense_place &p, uint32_t group) {
    for (uint32_t i = threadIdx.x; i < ROWS * m.width; i += ATTEND_THREADS) {
        uint32_t row = p.tile * ROWS + i / m.width, d = i % m.width, query = row / group;
        float value = 0.0f;
        if (query < p.span.q_count && d < args.dim)
            value = args.q[(size_t)(p.span.q_begin + query) * args.q_stride +
                           (size_t)(p.kv_head * group + row % group) * args.dim + d] *
                    args.scale;
        m.q[i] = value;
    }
    if (threadIdx.x < ROWS) {
        m.max[threadIdx.x] = -INFINITY;
        m.sum[threadIdx.x] = 0.0f;
    }
}

/* The keys that any row of the tile sees, within the task's split. */
static __device__ __forceinline__ void range_of(const loci_cuda_dense &args, const dense_place &p,
                                                uint32_t group, uint32_t *begin, uint32_t *end) {
    int64_t first, last, low = (int64_t)p.split * p.span.chunk, high = low + p.span.chunk;
    uint32_t row = p.tile * ROWS, rows = p.span.q_count * group;
    uint32_t top = row + ROWS - 1 < rows ? row + ROWS - 1 : rows - 1;
    if (high > p.span.kv_count) high = p.span.kv_count;
    visible(args, p.span, row, group, &first, &last);
    *begin = (uint32_t)(first > low ? first : low);
    visible(args, p.span, top, group, &first, &last);
    *end = (uint32_t)(last < high ? (last > 0 ? last : 0) : high);
}

template <int DIM, typename T>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attend_dense(const loci_cuda_dense args, bool wide) {
    extern __shared__ float4 shared[];
    attend_memory m = attend_layout((float *)shared, args.dim);
    const dense_place p = find_task(args, blockIdx.x);
    uint32_t group = args.q_heads / args.kv_heads, begin, end;
    int64_t first[2], last[2];
    float acc[ROWS_OF(DIM)][EACH_OF(DIM)] = {};
    for (uint32_t i = 0; i < 2; i++)
        visible(args, p.span, p.tile * ROWS + threadIdx.x / 32 * 2 + i, group, &first[i], &last[i]);
    load_queries(m, args, p, group);
    range_of(args, p, group, &begin, &end);
    begin = begin / KEYS * KEYS;
    bool sink = args.sink && p.split == 0 && p.span.kv_count > 0;
    if (sink && end == 0) end = 1;
    for (uint32_t tile = sink ? 0 : begin; tile < end; tile += KEYS) {
        if (tile > 0 && tile < begin) tile = begin; /* behind the sink's own */
        if (tile >= end) break;
        uint32_t count = end - tile < KEYS ? end - tile : KEYS;
        __syncthreads();
        load_tile<T>(m, args, p, tile, count, wide);
        __syncthreads();
        attend_logits(m, [&](uint32_t row, uint32_t lane, float logit) {
            int64_t key = tile + lane;
            uint32_t i = row % 2;
            if (key == 0 && args.sink && (p.tile * ROWS + row) / group < p.span.q_count)
                return logit + args.bias;
            return key >= first[i] && key < last[i] && lane < count ? logit : -INFINITY;
        });
        __syncthreads();
        attend_values<DIM>(m, acc);
    }
    __syncthreads();
    if (p.span.splits > 1) {
        attend_store<DIM>(m, acc, args.dim,
                          args.partial + (size_t)p.partial * ROWS * (args.dim + 2));
        return;
    }
    uint32_t rows = p.span.q_count * group;
#pragma unroll
    for (uint32_t i = 0; i < ROWS_OF(DIM); i++) {
        uint32_t local = i * (ATTEND_THREADS / WIDE_OF(DIM)) + threadIdx.x / WIDE_OF(DIM);
        uint32_t row = p.tile * ROWS + local;
        if (row >= rows) break;
#pragma unroll
        for (uint32_t e = 0; e < EACH_OF(DIM); e++) {
            uint32_t channel = threadIdx.x % WIDE_OF(DIM) + 256 * e;
            if (channel < args.dim)
                put_value(args, p.span, p.kv_head, row, channel,
                          acc[i][e] * factor_of(m.sum[local]));
        }
    }
    uint32_t row = p.tile * ROWS + threadIdx.x;
    if (threadIdx.x < ROWS && row < rows)
        put_lse(args, p.span, p.kv_head, row, m.max[threadIdx.x], m.sum[threadIdx.x]);
}

/* The partial results of one (KV head, tile) of a span with several splits. */
static __global__ void k_merge_splits(const loci_cuda_dense args) {
    const loci_cuda_span span =
        args.spans[span_of(args.spans, args.span_count, blockIdx.x / ROWS, true)];
    uint32_t index = blockIdx.x / ROWS - span.first_merge, local = blockIdx.x % ROWS;
    uint32_t kv_head = index / span.tiles, tile = index % span.tiles;
    uint32_t row = tile * ROWS + local, group = args.q_heads / args.kv_heads;
    if (span.splits < 2 || row >= span.q_count * group) return;
    size_t stride = (size_t)span.tiles * ROWS * (args.dim + 2);
    const float *from =
        args.partial +
        ((size_t)(span.first_partial + kv_head * span.splits * span.tiles + tile) * ROWS + local) *
            (args.dim + 2);
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t s = 0; s < span.splits; s++) max = fmaxf(max, from[s * stride + args.dim]);
    float base = max > -INFINITY ? max : 0.0f;
    for (uint32_t s = 0; s < span.splits; s++)
        sum += from[s * stride + args.dim + 1] * expf(from[s * stride + args.dim] - base);
    for (uint32_t d = threadIdx.x; d < args.dim; d += blockDim.x) {
        float value = 0.0f;
        for (uint32_t s = 0; s < span.splits; s++)
            value += from[s * stride + d] * expf(from[s * stride + args.dim] - base);
        put_value(args, span, kv_head, row, d, value * factor_of(sum));
    }
    if (threadIdx.x == 0) put_lse(args, span, kv_head, row, max, sum);
}

template <int DIM, typename T>
static cudaError_t launch(cudaStream_t stream, const loci_cuda_dense *args) {
    size_t bytes = attend_floats(args->dim) * sizeof(float);
    uintptr_t at = (uintptr_t)args->k | (uintptr_t)args->v;
    bool wide = args->dim % 8 == 0 && args->kv_stride % 8 == 0 && at % 16 == 0;
    cudaError_t result = cudaFuncSetAttribute(
        k_attend_dense<DIM, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    k_attend_dense<DIM, T><<<args->tasks, ATTEND_THREADS, bytes, stream>>>(*args, wide);
    result = cudaGetLastError();
    if (result != cudaSuccess || args->merges == 0) return result;
    k_merge_splits<<<args->merges * ROWS, 128, 0, stream>>>(*args);
    return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_by_dim(cudaStream_t stream, const loci_cuda_dense *args) {
    if (args->dim <= 32) return launch<32, T>(stream, args);
    if (args->dim <= 64) return launch<64, T>(stream, args);
    if (args->dim <= 128) return launch<128, T>(stream, args);
    if (args->dim <= 256) return launch<256, T>(stream, args);
    return launch<512, T>(stream, args);
}

extern "C" cudaError_t loci_cuda_k_attend_dense(cudaStream_t stream, const loci_cuda_dense *args) {
    if (args->tasks == 0) return cudaSuccess;
    return args->kv_bf16 ? launch_by_dim<uint16_t>(stream, args)
                         : launch_by_dim<float>(stream, args);
}
