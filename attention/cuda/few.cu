/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of few rows (decoding): y (+)= x W^T for 1 to LOCI_CUDA_FEW_ROWS rows. What bounds them
 * is reading W, once. A warp makes COLUMNS columns of y for all rows, its lanes 16 bytes of W
 * apart; a sum is the same for any number of rows: lane by lane along W's row, then over the lanes.
 * x is read again by every warp, from the L1. The first pieces of W, which nobody writes, are on
 * their way while the kernel before still makes x.
 */
#include "attention/cuda/device.cuh"
#include "attention/cuda/few.h"
#include "attention/cuda/launch.cuh"

#define WIDE_COLUMNS 8192u /* of a weight that keeps all multiprocessors busy in any case */
#define WARPS 4u
#define VECTOR_BYTES 16u
static constexpr int AHEAD = 4; /* pieces of W that a warp asks for before x is there */

/* The values of 16 bytes as floats. */
static __device__ __forceinline__ void unpack(uint4 bits, float (&out)[8], uint16_t) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ void unpack(uint4 bits, float (&out)[4], float) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = __uint_as_float(words[i]);
}

template <int ROWS, int COLUMNS, typename T>
static __global__ void __launch_bounds__(WARPS * 32)
    k_few(float *y, const T *x, const T *w, uint32_t columns, uint32_t width, bool accumulate) {
    constexpr uint32_t EACH = VECTOR_BYTES / sizeof(T);
    uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
    uint32_t first = warp * COLUMNS;
    if (first >= columns) return;
    const T *from[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) /* the last warp may make its last column twice */
        from[c] = w + (size_t)(first + c < columns ? first + c : columns - 1) * width;
    float sum[COLUMNS][ROWS] = {};
    uint4 ahead[AHEAD][COLUMNS];
    auto read = [&](uint4(&to)[COLUMNS], uint32_t at) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            to[c] = __ldcs((const uint4 *)(const void *)(from[c] + at));
    };
    auto multiply = [&](const uint4(&w)[COLUMNS], uint32_t at) {
        float weight[COLUMNS][EACH], value[EACH];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) unpack(w[c], weight[c], T());
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            unpack(*(const uint4 *)(const void *)(x + (size_t)r * width + at), value, T());
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                for (uint32_t i = 0; i < EACH; i++)
                    sum[c][r] = fmaf(weight[c][i], value[i], sum[c][r]);
        }
    };
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if ((lane + k * 32) * EACH < width) read(ahead[k], (lane + k * 32) * EACH);
    await_previous();
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if ((lane + k * 32) * EACH < width) multiply(ahead[k], (lane + k * 32) * EACH);
#pragma unroll AHEAD
    for (uint32_t at = (lane + AHEAD * 32) * EACH; at < width; at += 32 * EACH) {
        uint4 now[COLUMNS];
        read(now, at);
        multiply(now, at);
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float all = warp_sum(sum[c][r]);
            if (lane != 0 || first + c >= columns) continue;
            float *to = y + (size_t)r * columns + first + c;
            *to = accumulate ? *to + all : all;
        }
}

template <int ROWS, int COLUMNS, typename T>
static cudaError_t launch_columns(cudaStream_t stream, float *y, const void *x, const void *w,
                                  uint32_t columns, uint32_t width, bool accumulate) {
    uint32_t each = WARPS * COLUMNS;
    return launch_behind(stream, k_few<ROWS, COLUMNS, T>, dim3((columns + each - 1) / each),
                         WARPS * 32, 0, y, (const T *)x, (const T *)w, columns, width, accumulate);
}

/* More columns a warp read x less often, which is what counts when there are several rows; fewer
 * columns are more blocks, which a narrow weight needs to keep all multiprocessors busy. */
template <int ROWS, typename T>
static cudaError_t launch(cudaStream_t stream, float *y, const void *x, const void *w,
                          uint32_t rows, uint32_t columns, uint32_t width, bool accumulate) {
    if constexpr (ROWS < (int)LOCI_CUDA_FEW_ROWS)
        if (rows > ROWS)
            return launch<ROWS + 1, T>(stream, y, x, w, rows, columns, width, accumulate);
    constexpr int NARROW = ROWS <= 2 ? 1 : 2;
    if (columns < WIDE_COLUMNS)
        return launch_columns<ROWS, NARROW, T>(stream, y, x, w, columns, width, accumulate);
    return launch_columns<ROWS, 2 * NARROW, T>(stream, y, x, w, columns, width, accumulate);
}

extern "C" cudaError_t loci_cuda_k_few(cudaStream_t stream, float *y, const void *x, const void *w,
                                       bool bf16, uint32_t rows, uint32_t columns, uint32_t width,
                                       bool accumulate) {
    return bf16 ? launch<1, uint16_t>(stream, y, x, w, rows, columns, width, accumulate)
                : launch<1, float>(stream, y, x, w, rows, columns, width, accumulate);
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
