/* SPDX-License-Identifier: Apache-2.0
 *
 * Late-interaction scores of listed segments, from position-order codes or, in the flat part, from
 * the keys: for each vector the log-sum-exp over a segment's tokens and the shared prefix. One
 * block for each segment and KV head, one warp for each vector, a token a lane.
 */
#include "attention/cuda/query.cuh"

#define THREADS 128u

/* One warp for each (pair, vector): q times the pair's code scales as int8. */
static __global__ void k_fold(const loci_cuda_look look, int8_t *folded, float *scale,
                              int32_t *sum) {
    size_t h = look.pairs[blockIdx.y].kv_head;
    const float *q = look.q + (h * look.vectors + blockIdx.x) * look.dim;
    fold_vector(look, blockIdx.y, blockIdx.x, q, folded, scale, sum);
}

extern "C" cudaError_t loci_cuda_k_fold(cudaStream_t stream, const loci_cuda_look *look,
                                        int8_t *folded, float *scale, int32_t *sum) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid(look->vectors, look->extents * look->kv_heads);
    k_fold<<<grid, 32, 0, stream>>>(*look, folded, scale, sum);
    return cudaGetLastError();
}

/* Log-sum-exp of a stream of logits, one a lane at a time. */
struct lane_lse {
    float max, sum;
};

static __device__ __forceinline__ void add_logit(lane_lse *state, float logit) {
    float top = fmaxf(state->max, logit);
    if (top == -INFINITY) return;
    state->sum = state->sum * expf(state->max - top) + expf(logit - top);
    state->max = top;
}

static __device__ __forceinline__ double warp_lse(lane_lse state) {
    float max = warp_max(state.max);
    if (max == -INFINITY) return -INFINITY;
    float sum = warp_sum(state.max == -INFINITY ? 0.0f : state.sum * expf(state.max - max));
    return (double)max + log((double)sum);
}

static __device__ __forceinline__ float
sink_logit(const loci_cuda_look &look, const loci_cuda_rank &args, uint32_t h, const float *q) {
    if (!args.sink_k) return -INFINITY;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x % 32; i < look.dim; i += 32)
        sum += q[i] * args.sink_k[(size_t)h * look.dim + i];
    return warp_sum(sum);
}

/* Tokens [begin, end) of a pair in position order, for the vector of this warp. */
static __device__ double score_codes(const loci_cuda_look &look, const loci_cuda_rank &args,
                                     const loci_cuda_pair *pair, size_t at, uint32_t begin,
                                     uint32_t end, lane_lse state) {
    const int *q = (const int *)(args.folded + at * look.dim);
    float base = look.mean_terms[at], scale = args.folded_scale[at];
    float sum = 7.5f * (float)args.folded_sum[at];
    for (uint32_t t = begin + threadIdx.x % 32; t < end; t += 32) {
        const uint32_t *code = (const uint32_t *)(pair->position_codes + (size_t)t * look.dim / 2);
        int dot = 0;
        for (uint32_t i = 0; i < look.dim / 8; i++) {
            uint32_t eight = code[i], even = eight & 0x0f0f0f0fu, odd = eight >> 4 & 0x0f0f0f0fu;
            dot = __dp4a((int)__byte_perm(even, odd, 0x5140), q[2 * i], dot);
            dot = __dp4a((int)__byte_perm(even, odd, 0x7362), q[2 * i + 1], dot);
        }
        add_logit(&state, base + scale * ((float)dot - sum));
    }
    return warp_lse(state);
}

static __device__ double score_flat(const loci_cuda_look &look, const loci_cuda_rank &args,
                                    uint32_t h, const float *q, uint32_t begin, uint32_t end,
                                    lane_lse state) {
    for (uint32_t t = begin + threadIdx.x % 32; t < end; t += 32) {
        const uint16_t *k = args.flat_k + ((size_t)t * look.kv_heads + h) * look.dim;
        float dot = 0.0f;
        for (uint32_t i = 0; i < look.dim; i++) dot += q[i] * bf16_to_f32(k[i]);
        add_logit(&state, dot);
    }
    return warp_lse(state);
}

/* Where a segment stands. */
struct segment_place {
    uint32_t extent, begin, end; /* tokens of the extent, or of the flat part */
    bool flat, there;
};

static __device__ segment_place place_of(const loci_cuda_look &look, const loci_cuda_rank &args,
                                         uint32_t segment) {
    segment_place p = {0, 0, 0, false, false};
    if (segment >= args.flat_segment_base) {
        uint32_t s = segment - args.flat_segment_base;
        if (s >= args.flat_segments) return p;
        p.flat = true;
        p.begin = args.flat_segment_begin[s];
        p.end = args.flat_segment_begin[s + 1];
        p.there = p.begin < p.end;
        return p;
    }
    p.extent =
        last_at_most(look.extents, segment, [&](uint32_t e) { return args.extent_segment[e]; });
    const loci_cuda_pair *pair = &look.pairs[(size_t)p.extent * look.kv_heads];
    uint32_t s = segment - args.extent_segment[p.extent];
    p.begin = pair->segment_begin[s];
    p.end = pair->segment_begin[s + 1];
    p.there = p.begin < p.end && p.end <= pair->tokens && !(args.dead && args.dead[segment]);
    return p;
}

static __global__ void k_score_segments(const loci_cuda_look look, const loci_cuda_rank args) {
    __shared__ double sums[THREADS / 32];
    uint32_t h = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    segment_place p = place_of(look, args, args.segments[blockIdx.x]);
    double sum = 0.0;
    for (uint32_t v = warp; p.there && v < look.vectors; v += THREADS / 32) {
        const float *q = look.q + ((size_t)h * look.vectors + v) * look.dim;
        float sink = sink_logit(look, args, h, q);
        lane_lse state = {lane == 0 ? sink : -INFINITY,
                          lane == 0 && sink > -INFINITY ? 1.0f : 0.0f};
        size_t pair = (size_t)p.extent * look.kv_heads + h;
        sum += p.flat ? score_flat(look, args, h, q, p.begin, p.end, state)
                      : score_codes(look, args, &look.pairs[pair], pair * look.vectors + v, p.begin,
                                    p.end, state);
    }
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double all = 0.0;
    for (uint32_t w = 0; w < THREADS / 32; w++) all += sums[w];
    args.parts[(size_t)blockIdx.x * look.kv_heads + h] = p.there ? all : -INFINITY;
}

static __global__ void k_sum_parts(const loci_cuda_look look, const loci_cuda_rank args) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.count) return;
    double sum = 0.0;
    for (uint32_t h = 0; h < look.kv_heads; h++) sum += args.parts[(size_t)i * look.kv_heads + h];
    args.scores[i] = (float)(sum / look.q_heads);
}

extern "C" cudaError_t loci_cuda_k_score_segments(cudaStream_t stream, const loci_cuda_look *look,
                                                  const loci_cuda_rank *args) {
    if (args->count == 0) return cudaSuccess;
    dim3 grid(args->count, look->kv_heads);
    k_score_segments<<<grid, THREADS, 0, stream>>>(*look, *args);
    cudaError_t result = cudaGetLastError();
    if (result != cudaSuccess) return result;
    k_sum_parts<<<(args->count + 127) / 128, 128, 0, stream>>>(*look, *args);
    return cudaGetLastError();
}
