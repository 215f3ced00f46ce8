/* SPDX-License-Identifier: Apache-2.0
 *
 * Online-softmax attention of a warp's 16 rows on tensor cores, K and V rows of bf16 in shared
 * memory (FlashAttention-2, arXiv 2307.08691). SPLIT: queries and weights go in two parts, rounded
 * and the rest, which gives f32 results to about 2^-17; else they are rounded.
 */
#ifndef LOCI_ATTENTION_CUDA_ATTEND_MMA_CUH
#define LOCI_ATTENTION_CUDA_ATTEND_MMA_CUH

#include "attention/cuda/device.cuh"
#include "attention/cuda/mma.cuh"

#define TILE_WARPS 4u /* of a block */
#define RUN 16u       /* keys of a product */
/* Of a row in shared memory: no two of eight rows share a bank. */
#define WIDTH_OF(DIM) ((DIM) + 8)

/* What a warp has so far: of rows lane / 4 and lane / 4 + 8 the maximum, this lane's part of the
 * sum of exponentials, and sums of values. */
template <int DIM> struct warp_state { float max[2], sum[2], out[DIM / 8][4]; };

/* Logits of 16 rows with RUNS runs of keys in k. The rest of the queries stands rest_rows rows
 * behind them. */
template <int DIM, int RUNS, bool SPLIT>
static __device__ __forceinline__ void run_logits(const uint16_t *q, uint32_t rest_rows,
                                                  const uint16_t *k, uint32_t dim,
                                                  float (&logit)[2 * RUNS][4]) {
    uint32_t lane = threadIdx.x % 32;
    const uint16_t *q_row = q + lane % 16 * WIDTH_OF(DIM) + lane / 16 * 8;
    const uint16_t *k_row = k + (lane / 16 * 8 + lane % 8) * WIDTH_OF(DIM) + lane / 8 % 2 * 8;
#pragma unroll
    for (uint32_t d = 0; d < DIM; d += 16) {
        if (d >= dim) break;
        uint32_t high[4], rest[4], keys[4];
        load_matrices(high, q_row + d);
        if (SPLIT) load_matrices(rest, q_row + rest_rows * WIDTH_OF(DIM) + d);
#pragma unroll
        for (uint32_t r = 0; r < RUNS; r++) {
            load_matrices(keys, k_row + r * RUN * WIDTH_OF(DIM) + d);
            multiply(logit[2 * r], high, keys[0], keys[1]);
            multiply(logit[2 * r + 1], high, keys[2], keys[3]);
            if (!SPLIT) continue;
            multiply(logit[2 * r], rest, keys[0], keys[1]);
            multiply(logit[2 * r + 1], rest, keys[2], keys[3]);
        }
    }
}

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

/* exp(x), or 2^x to about 2^-22. */
template <bool BASE2> static __device__ __forceinline__ float weight_of(float x) {
    if (!BASE2) return expf(x);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Logits become weights; what stands so far shrinks where a maximum has grown. BASE2: logits, and
 * the maxima of s, are of base 2. */
template <int DIM, int RUNS, bool BASE2>
static __device__ __forceinline__ void run_softmax(warp_state<DIM> &s,
                                                   float (&logit)[2 * RUNS][4]) {
    float keep[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float top = fmaxf(logit[0][2 * half], logit[0][2 * half + 1]);
#pragma unroll
        for (uint32_t n = 1; n < 2 * RUNS; n++)
            top = fmaxf(top, fmaxf(logit[n][2 * half], logit[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        top = fmaxf(top, s.max[half]);
        float base = top > -INFINITY ? top : 0.0f;
        keep[half] = weight_of<BASE2>(s.max[half] - base);
        s.sum[half] *= keep[half];
        s.max[half] = top;
#pragma unroll
        for (uint32_t n = 0; n < 2 * RUNS; n++)
#pragma unroll
            for (uint32_t e = 2 * half; e < 2 * half + 2; e++) {
                logit[n][e] = weight_of<BASE2>(logit[n][e] - base);
                s.sum[half] += logit[n][e];
            }
    }
    if (!__any_sync(FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f)) return;
#pragma unroll
    for (uint32_t n = 0; n < DIM / 8; n++)
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) s.out[n][e] *= keep[e / 2];
}

template <int DIM, int RUNS, bool SPLIT>
static __device__ __forceinline__ void run_values(warp_state<DIM> &s, const uint16_t *v,
                                                  uint32_t dim,
                                                  const float (&weight)[2 * RUNS][4]) {
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t r = 0; r < RUNS; r++) {
        uint32_t high[4], rest[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            high[i] = split_pair(weight[2 * r + i / 2][i % 2 * 2],
                                 weight[2 * r + i / 2][i % 2 * 2 + 1], &rest[i]);
        const uint16_t *v_row = v + (r * RUN + lane % 16) * WIDTH_OF(DIM) + lane / 16 * 8;
#pragma unroll
        for (uint32_t d = 0; d < DIM; d += 16) {
            if (d >= dim) break;
            uint32_t values[4];
            load_transposed(values, v_row + d);
            multiply(s.out[d / 8], high, values[0], values[1]);
            multiply(s.out[d / 8 + 1], high, values[2], values[3]);
            if (!SPLIT) continue;
            multiply(s.out[d / 8], rest, values[0], values[1]);
            multiply(s.out[d / 8 + 1], rest, values[2], values[3]);
        }
    }
}

/* The states of all warps, in their order, become one partial result of the first `rows` rows.
 * memory: floats for each warp [RUN][DIM + 4]. */
template <int DIM>
static __device__ void merge_warps(warp_state<DIM> &s, uint32_t dim, uint32_t rows, float *memory,
                                   float *partial) {
    __shared__ float factor[TILE_WARPS][RUN];
    const uint32_t width = DIM + 4;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *own = memory + warp * RUN * width;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float *row = own + (lane / 4 + 8 * half) * width, sum = s.sum[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; n++) {
            row[n * 8 + lane % 4 * 2] = s.out[n][2 * half];
            row[n * 8 + lane % 4 * 2 + 1] = s.out[n][2 * half + 1];
        }
        if (lane % 4 == 0) {
            row[DIM] = s.max[half];
            row[DIM + 1] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < RUN) {
        float max = -INFINITY, sum = 0.0f;
        const float *row = memory + threadIdx.x * width;
        for (uint32_t i = 0; i < TILE_WARPS; i++) max = fmaxf(max, row[i * RUN * width + DIM]);
        float base = max > -INFINITY ? max : 0.0f;
        for (uint32_t i = 0; i < TILE_WARPS; i++) {
            factor[i][threadIdx.x] = expf(row[i * RUN * width + DIM] - base);
            sum += row[i * RUN * width + DIM + 1] * factor[i][threadIdx.x];
        }
        partial[(size_t)threadIdx.x * (dim + 2) + dim] = max;
        partial[(size_t)threadIdx.x * (dim + 2) + dim + 1] = sum;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < (rows < RUN ? rows : RUN) * dim; i += 32 * TILE_WARPS) {
        uint32_t row = i / dim, d = i % dim;
        float value = 0.0f;
        for (uint32_t j = 0; j < TILE_WARPS; j++)
            value += memory[(j * RUN + row) * width + d] * factor[j][row];
        partial[(size_t)row * (dim + 2) + d] = value;
    }
}

#endif
