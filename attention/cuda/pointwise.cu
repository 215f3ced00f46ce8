/* SPDX-License-Identifier: Apache-2.0
 *
 * Row-wise operations: norm, activation, rotary positions, conversion, embedding, merging. Each
 * reads its inputs and writes its output once; memory bounds them all.
 */
#include "attention/cuda/device.cuh"

#define THREADS 256u

static unsigned blocks_for(size_t count) {
    size_t blocks = (count + THREADS - 1) / THREADS, most = 1u << 20;
    return (unsigned)(blocks < most ? blocks : most);
}

/* Calls for count = 0 would be launches of no block, which CUDA refuses. */
#define LAUNCHED(...)              \
    do {                           \
        __VA_ARGS__;               \
        return cudaGetLastError(); \
    } while (0)

static __global__ void k_rms_norm(float *y, const float *x, const float *gain, uint32_t cols,
                                  float eps) {
    __shared__ float buffer[WARPS_MAX];
    const float *from = x + (size_t)blockIdx.x * cols;
    float *to = y + (size_t)blockIdx.x * cols, sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) sum += from[i] * from[i];
    sum = block_sum(sum, buffer);
    float scale = 1.0f / sqrtf(sum / (float)cols + eps);
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i] * scale * gain[i];
}

extern "C" cudaError_t loci_cuda_k_rms_norm(cudaStream_t stream, float *y, const float *x,
                                            const float *gain, uint32_t rows, uint32_t cols,
                                            float eps) {
    unsigned threads = cols <= 128 ? 64 : THREADS;
    LAUNCHED(k_rms_norm<<<rows, threads, 0, stream>>>(y, x, gain, cols, eps));
}

/* A thread turns one pair of channels in all heads. The angle is rounded to float as the CPU does;
 * sincosf reduces it exactly. */
static __global__ void k_rope(float *x, uint32_t stride, const int32_t *positions,
                              const float *inv_freq, uint32_t heads, uint32_t half) {
    float *row = x + (size_t)blockIdx.x * stride;
    float position = (float)positions[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < heads * half; i += blockDim.x) {
        uint32_t head = i / half, at = i % half;
        float *low = row + (size_t)head * 2 * half + at, *high = low + half;
        float s, c, a = *low, b = *high;
        sincosf(__fmul_rn(position, inv_freq[at]), &s, &c);
        *low = a * c - b * s;
        *high = b * c + a * s;
    }
}

extern "C" cudaError_t loci_cuda_k_rope(cudaStream_t stream, float *x, uint32_t stride,
                                        const int32_t *positions, const float *inv_freq,
                                        uint32_t rows, uint32_t heads, uint32_t head_dim) {
    LAUNCHED(
        k_rope<<<rows, THREADS, 0, stream>>>(x, stride, positions, inv_freq, heads, head_dim / 2));
}

static __global__ void k_swiglu(float *y, const float *x, size_t count, uint32_t cols) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        size_t row = i / cols, col = i % cols;
        float gate = x[row * 2 * cols + col], up = x[(row * 2 + 1) * cols + col];
        y[i] = gate / (1.0f + expf(-gate)) * up;
    }
}

extern "C" cudaError_t loci_cuda_k_swiglu(cudaStream_t stream, float *y, const float *x,
                                          uint32_t rows, uint32_t cols) {
    size_t count = (size_t)rows * cols;
    LAUNCHED(k_swiglu<<<blocks_for(count), THREADS, 0, stream>>>(y, x, count, cols));
}

static __global__ void k_to_f32(float *dst, uint32_t dst_stride, const float *src,
                                uint32_t src_stride, size_t count, uint32_t cols) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        dst[i / cols * dst_stride + i % cols] = src[i / cols * src_stride + i % cols];
}

extern "C" cudaError_t loci_cuda_k_to_f32(cudaStream_t stream, float *dst, uint32_t dst_stride,
                                          const float *src, uint32_t src_stride, uint32_t rows,
                                          uint32_t cols) {
    size_t count = (size_t)rows * cols;
    LAUNCHED(k_to_f32<<<blocks_for(count), THREADS, 0, stream>>>(dst, dst_stride, src, src_stride,
                                                                 count, cols));
}

static __global__ void k_to_bf16(uint16_t *dst, uint32_t dst_stride, const float *src,
                                 uint32_t src_stride, size_t count, uint32_t cols,
                                 uint32_t cols_padded) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        uint32_t col = (uint32_t)(i % cols_padded);
        size_t row = i / cols_padded;
        dst[row * dst_stride + col] = col < cols ? f32_to_bf16(src[row * src_stride + col]) : 0;
    }
}

extern "C" cudaError_t loci_cuda_k_to_bf16(cudaStream_t stream, uint16_t *dst, uint32_t dst_stride,
                                           const float *src, uint32_t src_stride, uint32_t rows,
                                           uint32_t cols, uint32_t cols_padded) {
    size_t count = (size_t)rows * cols_padded;
    LAUNCHED(k_to_bf16<<<blocks_for(count), THREADS, 0, stream>>>(dst, dst_stride, src, src_stride,
                                                                  count, cols, cols_padded));
}

static __global__ void k_embed(float *y, const void *table, bool bf16, uint32_t table_rows,
                               uint32_t table_stride, const int32_t *ids, uint32_t cols,
                               loci_cuda_fault *fault) {
    int32_t id = ids[blockIdx.x];
    if (id < 0 || (uint32_t)id >= table_rows) {
        if (threadIdx.x == 0) raise_fault(fault, LOCI_CUDA_FAULT_TOKEN, (uint32_t)id, table_rows);
        return;
    }
    size_t at = (size_t)id * table_stride;
    float *to = y + (size_t)blockIdx.x * cols;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x)
        to[i] =
            bf16 ? bf16_to_f32(((const uint16_t *)table)[at + i]) : ((const float *)table)[at + i];
}

extern "C" cudaError_t loci_cuda_k_embed(cudaStream_t stream, float *y, const void *table,
                                         bool bf16, uint32_t table_rows, uint32_t table_stride,
                                         const int32_t *ids, uint32_t rows, uint32_t cols,
                                         loci_cuda_fault *fault) {
    LAUNCHED(k_embed<<<rows, THREADS, 0, stream>>>(y, table, bf16, table_rows, table_stride, ids,
                                                   cols, fault));
}

/* One block for each row and head. */
static __global__ void k_merge(float *out_a, uint32_t stride_a, float *lse_a, const float *out_b,
                               uint32_t stride_b, const float *lse_b, uint32_t heads,
                               uint32_t head_dim) {
    size_t row = blockIdx.x / heads, at = (size_t)(blockIdx.x % heads) * head_dim;
    float a = lse_a[blockIdx.x], b = lse_b[blockIdx.x];
    if (b == -INFINITY) return;
    float max = fmaxf(a, b), weight_a = expf(a - max), weight_b = expf(b - max);
    float total = weight_a + weight_b;
    float *to = out_a + row * stride_a + at;
    const float *from = out_b + row * stride_b + at;
    weight_a /= total;
    weight_b /= total;
    for (uint32_t d = threadIdx.x; d < head_dim; d += blockDim.x)
        to[d] = weight_a * to[d] + weight_b * from[d];
    __syncthreads(); /* all have read lse_a */
    if (threadIdx.x == 0) lse_a[blockIdx.x] = max + logf(total);
}

extern "C" cudaError_t loci_cuda_k_merge(cudaStream_t stream, float *out_a, uint32_t stride_a,
                                         float *lse_a, const float *out_b, uint32_t stride_b,
                                         const float *lse_b, uint32_t rows, uint32_t heads,
                                         uint32_t head_dim) {
    LAUNCHED(k_merge<<<rows * heads, 64, 0, stream>>>(out_a, stride_a, lse_a, out_b, stride_b,
                                                      lse_b, heads, head_dim));
}
