/* SPDX-License-Identifier: Apache-2.0
 *
 * Row-wise operations: norm, activation, rotary positions, conversion, embedding, merging. Each
 * reads its inputs and writes its output once; memory bounds them all.
 */
#include "attention/cuda/device.cuh"
#include "attention/cuda/launch.cuh"

#define THREADS 256u
#define NORM_EACH 4u /* neighbouring columns of a thread */
#define NORM_THREADS 1024u
#define EMBED_EACH 4u

static unsigned blocks_for(size_t count) {
    size_t blocks = (count + THREADS - 1) / THREADS, most = 1u << 20;
    return (unsigned)(blocks < most ? blocks : most);
}

static __device__ __forceinline__ float4 read_columns(const float *from, uint32_t count,
                                                      bool aligned) {
    if (aligned) return *(const float4 *)(const void *)from;
    return make_float4(from[0], count > 1 ? from[1] : 0.0f, count > 2 ? from[2] : 0.0f,
                       count > 3 ? from[3] : 0.0f);
}

static __device__ __forceinline__ void write_columns(float *to, float4 x, uint32_t count,
                                                     bool aligned) {
    if (aligned) {
        *(float4 *)(void *)to = x;
        return;
    }
    to[0] = x.x;
    if (count > 1) to[1] = x.y;
    if (count > 2) to[2] = x.z;
    if (count > 3) to[3] = x.w;
}

/* aligned: all rows and the gain, to 16 bytes. The order of sums does not depend on it. */
static __global__ void k_rms_norm(float *y, const float *x, const float *gain, uint32_t cols,
                                  float eps, bool aligned) {
    __shared__ float buffer[WARPS_MAX];
    const float *from = x + (size_t)blockIdx.x * cols;
    float *to = y + (size_t)blockIdx.x * cols, sum = 0.0f;
    uint32_t first = threadIdx.x * NORM_EACH, step = blockDim.x * NORM_EACH;
    await_previous();
    for (uint32_t i = first; i < cols; i += step) {
        float4 a = read_columns(from + i, cols - i, aligned);
        sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
    }
    sum = block_sum(sum, buffer);
    float scale = 1.0f / sqrtf(sum / (float)cols + eps);
    for (uint32_t i = first; i < cols; i += step) {
        float4 a = read_columns(from + i, cols - i, aligned);
        float4 g = read_columns(gain + i, cols - i, aligned);
        a = make_float4(a.x * scale * g.x, a.y * scale * g.y, a.z * scale * g.z, a.w * scale * g.w);
        write_columns(to + i, a, cols - i, aligned);
    }
}

extern "C" cudaError_t loci_cuda_k_rms_norm(cudaStream_t stream, float *y, const float *x,
                                            const float *gain, uint32_t rows, uint32_t cols,
                                            float eps) {
    uint32_t threads = ((cols + NORM_EACH - 1) / NORM_EACH + 31) / 32 * 32;
    if (threads > NORM_THREADS) threads = NORM_THREADS;
    bool aligned =
        cols % NORM_EACH == 0 && ((uintptr_t)y | (uintptr_t)x | (uintptr_t)gain) % 16 == 0;
    return launch_behind(stream, k_rms_norm, dim3(rows), threads, 0, y, x, gain, cols, eps,
                         aligned);
}

/* A thread turns one pair of channels. The angle is rounded to float as the CPU does; sincosf
 * reduces it exactly. */
static __global__ void k_rope(float *x, uint32_t stride, const int32_t *positions,
                              const float *inv_freq, uint32_t heads, uint32_t half) {
    uint32_t i = blockIdx.y * blockDim.x + threadIdx.x, head = i / half, at = i % half;
    await_previous();
    if (head >= heads) return;
    float position = (float)positions[blockIdx.x];
    float *low = x + (size_t)blockIdx.x * stride + (size_t)head * 2 * half + at, *high = low + half;
    float s, c, a = *low, b = *high;
    sincosf(__fmul_rn(position, inv_freq[at]), &s, &c);
    *low = a * c - b * s;
    *high = b * c + a * s;
}

extern "C" cudaError_t loci_cuda_k_rope(cudaStream_t stream, float *x, uint32_t stride,
                                        const int32_t *positions, const float *inv_freq,
                                        uint32_t rows, uint32_t heads, uint32_t head_dim) {
    dim3 grid(rows, (heads * (head_dim / 2) + THREADS - 1) / THREADS);
    return launch_behind(stream, k_rope, grid, THREADS, 0, x, stride, positions, inv_freq, heads,
                         head_dim / 2);
}

static __global__ void k_swiglu(float *y, const float *x, size_t count, uint32_t cols) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    await_previous();
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        size_t row = i / cols, col = i % cols;
        float gate = x[row * 2 * cols + col], up = x[(row * 2 + 1) * cols + col];
        y[i] = gate / (1.0f + expf(-gate)) * up;
    }
}

extern "C" cudaError_t loci_cuda_k_swiglu(cudaStream_t stream, float *y, const float *x,
                                          uint32_t rows, uint32_t cols) {
    size_t count = (size_t)rows * cols;
    return launch_behind(stream, k_swiglu, dim3(blocks_for(count)), THREADS, 0, y, x, count, cols);
}

static __global__ void k_to_f32(float *dst, uint32_t dst_stride, const float *src,
                                uint32_t src_stride, size_t count, uint32_t cols) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    await_previous();
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
        dst[i / cols * dst_stride + i % cols] = src[i / cols * src_stride + i % cols];
}

extern "C" cudaError_t loci_cuda_k_to_f32(cudaStream_t stream, float *dst, uint32_t dst_stride,
                                          const float *src, uint32_t src_stride, uint32_t rows,
                                          uint32_t cols) {
    size_t count = (size_t)rows * cols;
    return launch_behind(stream, k_to_f32, dim3(blocks_for(count)), THREADS, 0, dst, dst_stride,
                         src, src_stride, count, cols);
}

static __global__ void k_to_bf16(uint16_t *dst, uint32_t dst_stride, const float *src,
                                 uint32_t src_stride, size_t count, uint32_t cols,
                                 uint32_t cols_padded) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    await_previous();
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
    return launch_behind(stream, k_to_bf16, dim3(blocks_for(count)), THREADS, 0, dst, dst_stride,
                         src, src_stride, count, cols, cols_padded);
}

static __global__ void k_embed(float *y, const void *table, bool bf16, uint32_t table_rows,
                               uint32_t table_stride, const int32_t *ids, uint32_t cols,
                               loci_cuda_fault *fault) {
    await_previous();
    int32_t id = ids[blockIdx.x];
    if (id < 0 || (uint32_t)id >= table_rows) {
        if (threadIdx.x == 0) raise_fault(fault, LOCI_CUDA_FAULT_TOKEN, (uint32_t)id, table_rows);
        return;
    }
    size_t at = (size_t)id * table_stride;
    float *to = y + (size_t)blockIdx.x * cols;
    uint32_t first = blockIdx.y * EMBED_EACH * THREADS + threadIdx.x;
#pragma unroll
    for (uint32_t j = 0; j < EMBED_EACH; j++) {
        uint32_t i = first + j * THREADS;
        if (i >= cols) return;
        to[i] =
            bf16 ? bf16_to_f32(((const uint16_t *)table)[at + i]) : ((const float *)table)[at + i];
    }
}

extern "C" cudaError_t loci_cuda_k_embed(cudaStream_t stream, float *y, const void *table,
                                         bool bf16, uint32_t table_rows, uint32_t table_stride,
                                         const int32_t *ids, uint32_t rows, uint32_t cols,
                                         loci_cuda_fault *fault) {
    dim3 grid(rows, (cols + EMBED_EACH * THREADS - 1) / (EMBED_EACH * THREADS));
    return launch_behind(stream, k_embed, grid, THREADS, 0, y, table, bf16, table_rows,
                         table_stride, ids, cols, fault);
}

/* One block for each row and head. */
static __global__ void k_merge(float *out_a, uint32_t stride_a, float *lse_a, const float *out_b,
                               uint32_t stride_b, const float *lse_b, uint32_t heads,
                               uint32_t head_dim) {
    size_t row = blockIdx.x / heads, at = (size_t)(blockIdx.x % heads) * head_dim;
    await_previous();
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
    return launch_behind(stream, k_merge, dim3(rows * heads), 64, 0, out_a, stride_a, lse_a, out_b,
                         stride_b, lse_b, heads, head_dim);
}
