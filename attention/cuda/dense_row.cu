/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention of one query over few keys, in f32: the own keys of a decoding step, and the
 * shared prefix. A block has one query head; its warps take keys, then its threads channels, so
 * that nothing is waited for more than a few times. Over a single key, the shared prefix, it has
 * as few threads as it can, with the same result.
 */
#include "attention/cuda/attend.cuh"
#include "attention/cuda/dense.cuh"
#include "attention/cuda/launch.cuh"

#define ROW_THREADS 1024u
#define KEY_THREADS 128u /* over one key, but a thread has one channel at most */
static_assert(LOCI_CUDA_ROW_KEYS == ROW_THREADS, "a thread has a key's weight");

/* Keys of a warp whose loads are under way together. */
template <int DIM> static __device__ constexpr uint32_t ahead_of(void) {
    return DIM > 256 ? 1 : DIM > 128 ? 2 : 4;
}

/* The products of the query, in registers, with all keys, by all warps. */
template <int DIM, uint32_t THREADS, typename T>
static __device__ __forceinline__ void put_logits(const loci_cuda_dense &args, const dense_place &p,
                                                  const float *query, float *logits) {
    const uint32_t each = DIM / 32, ahead = ahead_of<DIM>(), warps = THREADS / 32;
    uint32_t lane = threadIdx.x % 32, count = p.span.kv_count;
    const T *k =
        (const T *)args.k + (size_t)p.span.kv_begin * args.kv_stride + (size_t)p.kv_head * args.dim;
    float q[each];
#pragma unroll
    for (uint32_t i = 0; i < each; i++)
        q[i] = lane + 32 * i < args.dim ? query[lane + 32 * i] * args.scale : 0.0f;
    for (uint32_t first = threadIdx.x / 32; first < count; first += ahead * warps) {
        float sum[ahead];
#pragma unroll
        for (uint32_t j = 0; j < ahead; j++) {
            uint32_t key = first + j * warps;
            const T *row = k + (size_t)(key < count ? key : first) * args.kv_stride;
            sum[j] = 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < each; i++)
                if (lane + 32 * i < args.dim) sum[j] += q[i] * load_one(row + lane + 32 * i);
        }
#pragma unroll
        for (uint32_t j = 0; j < ahead; j++) {
            float all = warp_sum(sum[j]);
            uint32_t key = first + j * warps;
            if (lane == 0 && key < count) logits[key] = all;
        }
    }
}

/* The first values of a channel, which a thread asks for before it knows their weights. */
static constexpr uint32_t EARLY = 12;

template <int DIM, uint32_t THREADS, typename T>
static __global__ void __launch_bounds__(THREADS)
    k_attend_row(const __grid_constant__ loci_cuda_dense args) {
    __shared__ float logits[THREADS], weights[THREADS];
    await_previous();
    const dense_place p = find_task(args, blockIdx.x);
    const uint32_t group = args.q_heads / args.kv_heads, t = threadIdx.x, lane = t % 32;
    const uint32_t count = p.span.kv_count, head = p.kv_head * group + p.tile % group;
    size_t row = p.span.q_begin + p.tile / group;
    /* Every `slices`-th value of a channel. */
    const uint32_t slices = THREADS / DIM, slice = t / DIM, channel = t % DIM;
    bool has = channel < args.dim;
    const T *v = (const T *)args.v + (size_t)p.span.kv_begin * args.kv_stride +
                 (size_t)p.kv_head * args.dim + channel;
    float early[EARLY];
#pragma unroll
    for (uint32_t i = 0; i < EARLY; i++) {
        uint32_t key = slice + i * slices;
        early[i] = has && key < count ? load_one(v + (size_t)key * args.kv_stride) : 0.0f;
    }
    put_logits<DIM, THREADS, T>(args, p, args.q + row * args.q_stride + (size_t)head * args.dim,
                                logits);
    __syncthreads();
    int64_t first, last;
    visible(args, p.span, p.tile, group, &first, &last);
    auto seen = [&](uint32_t key) {
        if (key == 0 && args.sink) return logits[key] + args.bias;
        return key >= first && key < last ? logits[key] : -INFINITY;
    };
    /* Of all keys, by each warp for itself, so that none waits for another. */
    float max = -INFINITY, sum = 0.0f, value = 0.0f;
    for (uint32_t key = lane; key < count; key += 32) max = fmaxf(max, seen(key));
    max = warp_max(max);
    weights[t] = t < count ? expf(seen(t) - (max > -INFINITY ? max : 0.0f)) : 0.0f;
    __syncthreads();
    for (uint32_t key = lane; key < count; key += 32) sum += weights[key];
    sum = warp_sum(sum);
    auto add = [&](uint32_t key, float x) {
        float weight = weights[key];
        value += weight > 0.0f ? weight * x : 0.0f;
    };
#pragma unroll
    for (uint32_t i = 0; i < EARLY; i++)
        if (slice + i * slices < count) add(slice + i * slices, early[i]);
#pragma unroll 8
    for (uint32_t key = slice + EARLY * slices; has && key < count; key += slices)
        add(key, load_one(v + (size_t)key * args.kv_stride));
    logits[t] = value; /* all have read the logits */
    __syncthreads();
    if (t < args.dim) {
#pragma unroll
        for (uint32_t i = 1; i < slices; i++) value += logits[i * DIM + t];
        put_value(args, p.span, p.kv_head, p.tile, t, value * factor_of(sum));
    }
    if (t == 0) put_lse(args, p.span, p.kv_head, p.tile, max, sum);
}

static bool single_keys(const loci_cuda_dense *args) {
    for (uint32_t i = 0; i < args->span_count; i++)
        if (args->spans || args->few[i].kv_count > 1) return false;
    return true;
}

template <int DIM, typename T>
static cudaError_t launch(cudaStream_t stream, const loci_cuda_dense *args) {
    const uint32_t few = DIM > KEY_THREADS ? DIM : KEY_THREADS;
    if (single_keys(args))
        return launch_behind(stream, k_attend_row<DIM, few, T>, args->tasks, few, 0, *args);
    return launch_behind(stream, k_attend_row<DIM, ROW_THREADS, T>, args->tasks, ROW_THREADS, 0,
                         *args);
}

template <typename T>
static cudaError_t launch_by_dim(cudaStream_t stream, const loci_cuda_dense *args) {
    return args->dim <= 32    ? launch<32, T>(stream, args)
           : args->dim <= 64  ? launch<64, T>(stream, args)
           : args->dim <= 128 ? launch<128, T>(stream, args)
           : args->dim <= 256 ? launch<256, T>(stream, args)
                              : launch<512, T>(stream, args);
}

extern "C" cudaError_t loci_cuda_k_attend_row(cudaStream_t stream, const loci_cuda_dense *args) {
    if (args->tasks == 0) return cudaSuccess;
    return args->kv_bf16 ? launch_by_dim<uint16_t>(stream, args)
                         : launch_by_dim<float>(stream, args);
}
