/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention over packed spans: the queries of a GQA group stand side by side in one tile, so
 * that keys and values are read once for all of them; long spans with few queries are cut into runs
 * of keys, whose partial results a second kernel merges in their order. How a span is cut depends
 * on that span alone, and so does a row's result.
 */
#include "attention/cuda/attend.cuh"
#include "attention/cuda/dense.cuh"

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

template <int DIM, typename T>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attend_dense(const __grid_constant__ loci_cuda_dense args, bool wide) {
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
    if (p.span.merged) {
        attend_store<DIM>(m, acc, args.dim, args.partial + (size_t)p.partial * (args.dim + 2));
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

#define MERGE_THREADS 128u
#define MERGE_EACH 4u /* channels of a thread, of 512 */

/* A block for a row of a (KV head, tile) of a span whose partial results are merged: the weights of
 * a lot of splits stand in shared memory, then a thread adds up its channels. */
static __global__ void __launch_bounds__(MERGE_THREADS)
    k_merge_splits(const __grid_constant__ loci_cuda_dense args) {
    __shared__ float buffer[WARPS_MAX], weight[MERGE_THREADS];
    const loci_cuda_span *spans = spans_of(args);
    const loci_cuda_span span = spans[span_of(spans, args.span_count, blockIdx.x, true)];
    uint32_t index = blockIdx.x - span.first_merge, local = blockIdx.y, t = threadIdx.x;
    uint32_t kv_head = index / span.tiles, tile = index % span.tiles;
    uint32_t row = tile * span.rows + local, group = args.q_heads / args.kv_heads;
    if (!span.merged || local >= span.rows || row >= span.q_count * group) return;
    size_t width = args.dim + 2, stride = (size_t)span.tiles * span.rows * width;
    const float *from =
        args.partial + (span.first_partial +
                        ((size_t)kv_head * span.splits * span.tiles + tile) * span.rows + local) *
                           width;
    float max = -INFINITY, sum = 0.0f, value[MERGE_EACH] = {};
    for (uint32_t s = t; s < span.splits; s += MERGE_THREADS)
        max = fmaxf(max, from[s * stride + args.dim]);
    max = block_max(max, buffer);
    float base = max > -INFINITY ? max : 0.0f;
    for (uint32_t first = 0; first < span.splits; first += MERGE_THREADS) {
        uint32_t left = span.splits - first, count = left < MERGE_THREADS ? left : MERGE_THREADS;
        const float *lot = from + first * stride;
        float own = t < count ? expf(lot[t * stride + args.dim] - base) : 0.0f;
        if (t < count) sum += lot[t * stride + args.dim + 1] * own;
        __syncthreads();
        weight[t] = own;
        __syncthreads();
#pragma unroll
        for (uint32_t e = 0; e < MERGE_EACH; e++) {
            uint32_t d = e * MERGE_THREADS + t;
            if (d >= args.dim) break;
#pragma unroll 8
            for (uint32_t s = 0; s < count; s++) value[e] += lot[s * stride + d] * weight[s];
        }
    }
    sum = block_sum(sum, buffer);
#pragma unroll
    for (uint32_t e = 0; e < MERGE_EACH; e++) {
        uint32_t d = e * MERGE_THREADS + t;
        if (d < args.dim) put_value(args, span, kv_head, row, d, value[e] * factor_of(sum));
    }
    if (t == 0) put_lse(args, span, kv_head, row, max, sum);
}

extern "C" cudaError_t loci_cuda_k_merge_splits(cudaStream_t stream, const loci_cuda_dense *args) {
    if (args->merges == 0) return cudaSuccess;
    k_merge_splits<<<dim3(args->merges, args->merge_rows), MERGE_THREADS, 0, stream>>>(*args);
    return cudaGetLastError();
}

template <int DIM, typename T>
static cudaError_t launch(cudaStream_t stream, const loci_cuda_dense *args) {
    size_t bytes = attend_floats(args->dim) * sizeof(float);
    uintptr_t at = (uintptr_t)args->k | (uintptr_t)args->v;
    bool wide = args->dim % 8 == 0 && args->kv_stride % 8 == 0 && at % 16 == 0;
    cudaError_t result = cudaFuncSetAttribute(
        k_attend_dense<DIM, T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
        (int)(attend_floats(DIM) * sizeof(float))); /* the same in every thread's launch */
    if (result != cudaSuccess) return result;
    k_attend_dense<DIM, T><<<args->tasks, ATTEND_THREADS, bytes, stream>>>(*args, wide);
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
