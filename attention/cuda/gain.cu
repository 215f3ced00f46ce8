/* SPDX-License-Identifier: Apache-2.0
 *
 * What the candidates of a look-up say about segments: for each vector and segment the log of one
 * plus the mass of its candidates over the vector's floor. One block a row and KV head; masses are
 * added up as integers, so that the order does not matter, relative to the segment's own best
 * score: scores reach down to 60 below the vector's best, which no unit common to all would hold.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

#define THREADS 1024u
#define MASS_UNIT 1099511627776.0 /* 2^40 */
#define FLOOR_BELOW 60.0f         /* as on the CPU */
#define MASS_BELOW -87.0f         /* masses below e^-87 of the largest are 0 there */

/* The highest a token that this vector has not scored could about have. */
static __device__ float floor_of(const loci_cuda_look &look, const loci_cuda_choice &c, uint32_t h,
                                 uint32_t v, float *buffer) {
    const loci_cuda_head *head = &look.heads[h];
    const uint8_t *kept =
        c.root_kept + head->root_at * look.rows + (size_t)(v / look.group) * head->roots;
    const float *score = c.root_score + head->root_at * look.vectors + (size_t)v * head->roots;
    float best = -INFINITY;
    for (uint32_t r = threadIdx.x; r < head->roots; r += THREADS) {
        uint32_t live = look.root_live[head->root_at + r];
        if (!kept[r] && live) best = fmaxf(best, score[r] - look.logs[live]);
    }
    return fmaxf(block_max(best, buffer), c.floor[(size_t)h * look.vectors + v]);
}

static __device__ float sink_logit(const loci_cuda_look &look, const loci_cuda_gain &args,
                                   uint32_t h, uint32_t v, float *buffer) {
    if (!args.sink_k) return -INFINITY;
    const float *q = look.q + ((size_t)h * look.vectors + v) * look.dim;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < look.dim; i += THREADS)
        sum += q[i] * args.sink_k[(size_t)h * look.dim + i];
    return block_sum(sum, buffer);
}

/* The segment of a slot; `segments` where it has none. */
static __device__ uint32_t segment_of(const loci_cuda_look &look, uint32_t h, uint32_t slot,
                                      uint32_t segments) {
    uint32_t e = extent_at(look, h, slot / 32);
    const loci_cuda_pair *pair = &look.pairs[(size_t)e * look.kv_heads + h];
    uint32_t segment = slot_word(pair, slot - pair->word_base * 32, look.dim) >> 16;
    if (segment >= pair->segments) return segments;
    return min(pair->segment_base + segment, segments);
}

/* The best score of each segment's candidates (`ordered`; tops and sums: zeroed), then the sum of
 * exp(score - best) in MASS_UNIT. */
static __device__ void add_tokens(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const loci_cuda_gain &args, const float *score, float max,
                                  uint32_t h, uint32_t *tops, unsigned long long *sums) {
    const uint32_t *slots = c.slots + (size_t)blockIdx.x * c.room;
    uint32_t count = c.count[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint32_t to = segment_of(look, h, slots[i], args.segments);
        if (to < args.segments && score[i] - max >= MASS_BELOW)
            atomicMax(&tops[to], ordered(score[i]));
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint32_t to = segment_of(look, h, slots[i], args.segments);
        if (to >= args.segments || !(score[i] - max >= MASS_BELOW)) continue;
        float weight = expf(score[i] - unordered(tops[to]));
        atomicAdd(&sums[to], (unsigned long long)((double)weight * MASS_UNIT));
    }
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS)
    k_gain(const loci_cuda_look look, const loci_cuda_choice c, const loci_cuda_gain args) {
    __shared__ float buffer[WARPS_MAX];
    uint32_t h = blockIdx.x / look.rows, row = blockIdx.x % look.rows;
    unsigned long long *sums = args.sums + (size_t)blockIdx.x * args.segments;
    uint32_t *tops = args.tops + (size_t)blockIdx.x * args.segments;
    float *gain = args.gain + (size_t)blockIdx.x * args.segments;
    for (uint32_t s = threadIdx.x; s < args.segments; s += THREADS) gain[s] = 0.0f;
    for (uint32_t g = 0; g < look.group; g++) {
        uint32_t v = row * look.group + g;
        const float *score = c.score + ((size_t)blockIdx.x * look.group + g) * c.room;
        float max = -INFINITY;
        for (uint32_t i = threadIdx.x; i < c.count[blockIdx.x]; i += THREADS)
            max = fmaxf(max, score[i]);
        max = block_max(max, buffer);
        if (max == -INFINITY) continue;
        float floor = floor_of(look, c, h, v, buffer);
        floor = fmaxf(floor, sink_logit(look, args, h, v, buffer));
        floor = fmaxf(floor, max - FLOOR_BELOW);
        add_tokens(look, c, args, score, max, h, tops, sums);
        for (uint32_t s = threadIdx.x; s < args.segments; s += THREADS) {
            float over = tops[s] ? expf(unordered(tops[s]) - floor) : 0.0f;
            gain[s] += log1pf((float)((double)sums[s] / MASS_UNIT) * over);
            sums[s] = 0;
            tops[s] = 0;
        }
        __syncthreads();
    }
}

static __global__ void k_sum_gain(const loci_cuda_look look, const loci_cuda_gain args) {
    uint32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= args.segments) return;
    double sum = 0.0;
    for (uint32_t i = 0; i < look.kv_heads * look.rows; i++)
        sum += (double)args.gain[(size_t)i * args.segments + s];
    args.total[s] = (float)sum;
}

extern "C" cudaError_t loci_cuda_k_gain(cudaStream_t stream, const loci_cuda_look *look,
                                        const loci_cuda_choice *choice,
                                        const loci_cuda_gain *args) {
    if (args->segments == 0) return cudaSuccess;
    k_gain<<<look->kv_heads * look->rows, THREADS, 0, stream>>>(*look, *choice, *args);
    cudaError_t result = cudaGetLastError();
    if (result != cudaSuccess) return result;
    k_sum_gain<<<(args->segments + 255) / 256, 256, 0, stream>>>(*look, *args);
    return cudaGetLastError();
}
