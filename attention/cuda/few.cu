/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of few rows (decoding): y (+)= x W^T for 1 to LOCI_CUDA_FEW_ROWS rows. What bounds them
 * is reading W, once. By weights in bf16 a block makes 16 columns of y for all rows on tensor
 * cores, whose other operand are the rows, zeros where there are fewer than 8; so a row's sums are
 * the same in any company. Its warps take every so many-th piece of 32 elements, so that together
 * they read long runs of a few rows of W, and their sums are added in order. A piece of a row is 16
 * bytes of each of 4 lanes: in which order elements meet does not matter as long as x has the same.
 * The first pieces of W, which nobody writes, are on their way while the kernel before still makes
 * x.
 */
#include "attention/cuda/device.cuh"
#include "attention/cuda/few.h"
#include "attention/cuda/launch.cuh"
#include "attention/cuda/mma.cuh"

static_assert(LOCI_CUDA_FEW_ROWS == 8, "columns of a product on tensor cores");

/* --- Weights in bf16 ------------------------------------------------------------------- */

#define WARPS 8u
#define COLUMNS 16u
#define VALUES (COLUMNS * LOCI_CUDA_FEW_ROWS)
#define PIECE 32u                    /* elements */
static constexpr uint32_t AHEAD = 4; /* pieces of W that a warp has asked for */

/* 16 bytes that nobody reads again soon, and to the L2 what stands next to them. */
static __device__ __forceinline__ uint4 read_once(const uint16_t *from) {
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from));
    return bits;
}

static __device__ __forceinline__ uint4 read_values(const uint16_t *from) {
    return *(const uint4 *)(const void *)from;
}

/* As k_to_bf16 rounds. */
static __device__ __forceinline__ uint4 read_values(const float *from) {
    float4 a = *(const float4 *)(const void *)from, b = *(const float4 *)(const void *)(from + 4);
    return make_uint4(round_pair(a.x, a.y), round_pair(a.z, a.w), round_pair(b.x, b.y),
                      round_pair(b.z, b.w));
}

/* x: as it is, or rounded to bf16 before. */
template <typename X>
static __global__ void __launch_bounds__(WARPS * 32)
    k_few_bf16(float *y, const X *x, const uint16_t *w, uint32_t rows, uint32_t columns,
               uint32_t width, bool accumulate) {
    __shared__ float sums[WARPS][VALUES];
    const uint32_t t = threadIdx.x, lane = t % 32, warp = t / 32, row = lane / 4;
    const uint32_t first = blockIdx.x * COLUMNS, step = WARPS * PIECE;
    const uint16_t *from[2];
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) { /* the last column again where there is none */
        uint32_t column = first + h * 8 + row;
        from[h] = w + (size_t)(column < columns ? column : columns - 1) * width;
    }
    uint4 ahead[AHEAD][2];
    auto read = [&](uint4(&to)[2], uint32_t at) {
#pragma unroll
        for (uint32_t h = 0; h < 2; h++)
            to[h] = at < width ? read_once(from[h] + at) : make_uint4(0, 0, 0, 0);
    };
    uint32_t at = warp * PIECE + lane % 4 * 8, end = width + lane % 4 * 8;
#pragma unroll
    for (uint32_t k = 0; k < AHEAD; k++) read(ahead[k], at + k * step);
    await_previous();
    /* A thread's value is element t / 32 of lane t % 32. */
    uint32_t column = first + lane / 4 + t / 64 * 8, place = lane % 4 * 2 + warp % 2;
    bool has = t < VALUES && column < columns && place < rows;
    float *to = y + (size_t)place * columns + column, before = has && accumulate ? *to : 0.0f;
    const X *values = x + (size_t)(row < rows ? row : 0) * width;
    float sum[2][4] = {};
    for (; at < end; at += AHEAD * step) { /* the same number of times for all lanes */
        uint4 value[AHEAD];
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++)
            value[k] = row < rows && at + k * step < width ? read_values(values + at + k * step)
                                                           : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t k = 0; k < AHEAD; k++) {
            const uint4 *a = ahead[k];
            multiply(sum[0], {a[0].x, a[1].x, a[0].y, a[1].y}, value[k].x, value[k].y);
            multiply(sum[1], {a[0].z, a[1].z, a[0].w, a[1].w}, value[k].z, value[k].w);
            read(ahead[k], at + (AHEAD + k) * step);
        }
    }
#pragma unroll
    for (uint32_t e = 0; e < 4; e++) sums[warp][e * 32 + lane] = sum[0][e] + sum[1][e];
    __syncthreads();
    if (!has) return;
    float all = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < WARPS; i++) all += sums[i][t];
    *to = accumulate ? before + all : all;
}

template <typename X>
static cudaError_t launch_bf16(cudaStream_t stream, float *y, const void *x, const void *w,
                               uint32_t rows, uint32_t columns, uint32_t width, bool accumulate) {
    return launch_behind(stream, k_few_bf16<X>, dim3((columns + COLUMNS - 1) / COLUMNS), WARPS * 32,
                         0, y, (const X *)x, (const uint16_t *)w, rows, columns, width, accumulate);
}

/* --- Weights in f32 -------------------------------------------------------------------- */

#define F32_WARPS 4u
#define F32_COLUMNS 2 /* of y that a warp makes for all rows, its lanes 16 bytes of W apart */
#define VECTOR 4u     /* floats of 16 bytes */

template <int ROWS>
static __global__ void __launch_bounds__(F32_WARPS * 32)
    k_few_f32(float *y, const float *x, const float *w, uint32_t columns, uint32_t width,
              bool accumulate) {
    uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * F32_WARPS + threadIdx.x / 32;
    uint32_t first = warp * F32_COLUMNS;
    if (first >= columns) return;
    const float *from[F32_COLUMNS];
#pragma unroll
    for (int c = 0; c < F32_COLUMNS; c++) /* the last warp may make its last column twice */
        from[c] = w + (size_t)(first + c < columns ? first + c : columns - 1) * width;
    float sum[F32_COLUMNS][ROWS] = {};
    await_previous();
#pragma unroll 4
    for (uint32_t at = lane * VECTOR; at < width; at += 32 * VECTOR) {
        float4 weight[F32_COLUMNS];
#pragma unroll
        for (int c = 0; c < F32_COLUMNS; c++)
            weight[c] = __ldcs((const float4 *)(const void *)(from[c] + at));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float4 value = *(const float4 *)(const void *)(x + (size_t)r * width + at);
#pragma unroll
            for (int c = 0; c < F32_COLUMNS; c++) {
                sum[c][r] = fmaf(weight[c].x, value.x, sum[c][r]);
                sum[c][r] = fmaf(weight[c].y, value.y, sum[c][r]);
                sum[c][r] = fmaf(weight[c].z, value.z, sum[c][r]);
                sum[c][r] = fmaf(weight[c].w, value.w, sum[c][r]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < F32_COLUMNS; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float all = warp_sum(sum[c][r]);
            if (lane != 0 || first + c >= columns) continue;
            float *to = y + (size_t)r * columns + first + c;
            *to = accumulate ? *to + all : all;
        }
}

template <int ROWS>
static cudaError_t launch_f32(cudaStream_t stream, float *y, const float *x, const float *w,
                              uint32_t rows, uint32_t columns, uint32_t width, bool accumulate) {
    if constexpr (ROWS < (int)LOCI_CUDA_FEW_ROWS)
        if (rows > ROWS)
            return launch_f32<ROWS + 1>(stream, y, x, w, rows, columns, width, accumulate);
    uint32_t each = F32_WARPS * F32_COLUMNS;
    return launch_behind(stream, k_few_f32<ROWS>, dim3((columns + each - 1) / each), F32_WARPS * 32,
                         0, y, x, w, columns, width, accumulate);
}

extern "C" cudaError_t loci_cuda_k_few(cudaStream_t stream, float *y, const void *x, bool x_bf16,
                                       const void *w, bool w_bf16, uint32_t rows, uint32_t columns,
                                       uint32_t width, bool accumulate) {
    if (!w_bf16)
        return x_bf16 ? cudaErrorInvalidValue
                      : launch_f32<1>(stream, y, (const float *)x, (const float *)w, rows, columns,
                                      width, accumulate);
    return x_bf16 ? launch_bf16<uint16_t>(stream, y, x, w, rows, columns, width, accumulate)
                  : launch_bf16<float>(stream, y, x, w, rows, columns, width, accumulate);
}

static __global__ void k_scatter(float *dst, uint32_t dst_stride, const int32_t *at,
                                 const float *src, uint32_t src_stride, uint32_t cols) {
    await_previous();
    float *to = dst + (size_t)at[blockIdx.x] * dst_stride;
    const float *from = src + (size_t)blockIdx.x * src_stride;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
}

extern "C" cudaError_t loci_cuda_k_scatter_rows(cudaStream_t stream, float *dst,
                                                uint32_t dst_stride, const int32_t *at,
                                                const float *src, uint32_t src_stride,
                                                uint32_t rows, uint32_t cols) {
    return launch_behind(stream, k_scatter, dim3(rows), 256, 0, dst, dst_stride, at, src,
                         src_stride, cols);
}
