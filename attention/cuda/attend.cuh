/* SPDX-License-Identifier: Apache-2.0
 *
 * Online-softmax attention of LOCI_CUDA_ROWS packed query rows over tiles of KEYS keys in shared
 * memory, in f32 (FlashAttention-2, arXiv 2307.08691, algorithm 1). dense.cu and sparse.cu differ
 * in which keys they load and which of them a row sees.
 *
 * A block has 256 threads. Warp w computes the logits of rows 2w and 2w + 1, a key a lane, from
 * float4s: key rows are padded by one, so that a quarter of a warp hits all banks. For the values a
 * thread owns a channel (two above 256) of every (256 / WIDE)-th row.
 */
#ifndef LOCI_ATTENTION_CUDA_ATTEND_CUH
#define LOCI_ATTENTION_CUDA_ATTEND_CUH

#include "attention/cuda/device.cuh"

#define ROWS LOCI_CUDA_ROWS
#define KEYS 32u
#define ATTEND_THREADS 256u

/* The shared memory of a block; all in floats, 16-byte aligned. width: dim rounded up to 4. */
struct attend_memory {
    float *q, *k, *v, *p, *keep, *max, *sum;
    uint32_t width;
};

static __host__ __device__ __forceinline__ uint32_t attend_width(uint32_t dim) {
    return (dim + 3) / 4 * 4;
}

static __host__ __device__ __forceinline__ size_t attend_floats(uint32_t dim) {
    uint32_t width = attend_width(dim);
    return ROWS * width + KEYS * (width + 4) + KEYS * width + ROWS * KEYS + 3 * ROWS;
}

static __device__ __forceinline__ attend_memory attend_layout(float *shared, uint32_t dim) {
    attend_memory m;
    m.width = attend_width(dim);
    m.q = shared;
    m.k = m.q + ROWS * m.width;
    m.v = m.k + KEYS * (m.width + 4);
    m.p = m.v + KEYS * m.width;
    m.keep = m.p + ROWS * KEYS;
    m.max = m.keep + ROWS;
    m.sum = m.max + ROWS;
    return m;
}

/* Eight channels of a key or value row as floats. */
static __device__ __forceinline__ void load_eight(float *to, const uint16_t *from) {
    uint4 bits = *(const uint4 *)from;
    uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ void load_eight(float *to, const float *from) {
    float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    ((float4 *)to)[0] = low;
    ((float4 *)to)[1] = high;
}

static __device__ __forceinline__ float load_one(const uint16_t *from) {
    return bf16_to_f32(*from);
}

static __device__ __forceinline__ float load_one(const float *from) {
    return *from;
}

/* One row of dim channels by `lanes` neighbouring threads, of which this is `lane`; from NULL:
 * zeros. wide: dim is a multiple of 8 and rows begin at multiples of 16 bytes. */
template <typename T>
static __device__ __forceinline__ void load_row(float *to, const T *from, uint32_t dim,
                                                uint32_t width, bool wide, uint32_t lane,
                                                uint32_t lanes) {
    if (from && wide) {
        for (uint32_t d = lane * 8; d < dim; d += lanes * 8) {
            float eight[8];
            load_eight(eight, from + d);
            ((float4 *)(to + d))[0] = ((float4 *)eight)[0];
            ((float4 *)(to + d))[1] = ((float4 *)eight)[1];
        }
    } else {
        for (uint32_t d = lane; d < width; d += lanes)
            to[d] = from && d < dim ? load_one(from + d) : 0.0f;
    }
}

/* The logits of this warp's two rows with the key of this lane. */
static __device__ __forceinline__ void attend_dots(const attend_memory &m, float (&logit)[2]) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 2;
    const float4 *k = (const float4 *)(m.k + (size_t)lane * (m.width + 4));
    const float4 *q0 = (const float4 *)(m.q + (size_t)row * m.width);
    const float4 *q1 = (const float4 *)(m.q + (size_t)(row + 1) * m.width);
    logit[0] = logit[1] = 0.0f;
#pragma unroll 4
    for (uint32_t i = 0; i < m.width / 4; i++) {
        float4 x = k[i], a = q0[i], b = q1[i];
        logit[0] += x.x * a.x + x.y * a.y + x.z * a.z + x.w * a.w;
        logit[1] += x.x * b.x + x.y * b.y + x.z * b.z + x.w * b.w;
    }
}

/* This warp's logits of its two rows with the key of this lane, -INFINITY for unseen, become
 * weights in p; updates maximum and sum, and leaves in keep by what the sums so far shrink. */
static __device__ __forceinline__ void attend_softmax(const attend_memory &m,
                                                      const float (&logit)[2]) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        float before = m.max[row + i], top = fmaxf(warp_max(logit[i]), before);
        float base = top > -INFINITY ? top : 0.0f;
        float weight = expf(logit[i] - base), sum = warp_sum(weight);
        m.p[(row + i) * KEYS + lane] = weight;
        __syncwarp(); /* all lanes have read the maximum */
        if (lane == 0) {
            float keep = expf(before - base);
            m.keep[row + i] = keep;
            m.sum[row + i] = m.sum[row + i] * keep + sum;
            m.max[row + i] = top;
        }
    }
}

/* attend_dots, then attend_softmax; mask(row, key, logit) gives the logit to use. All threads;
 * barriers before (q, k filled) and after are the caller's. */
template <typename MASK>
static __device__ __forceinline__ void attend_logits(const attend_memory &m, MASK mask) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 2;
    float logit[2];
    attend_dots(m, logit);
    logit[0] = mask(row, lane, logit[0]);
    logit[1] = mask(row + 1, lane, logit[1]);
    attend_softmax(m, logit);
}

/* Threads of one row's channels, and channels of a thread. */
#define WIDE_OF(DIM) ((DIM) > 256 ? 256 : (DIM))
#define EACH_OF(DIM) ((DIM) > 256 ? 2 : 1)
#define ROWS_OF(DIM) (ROWS * WIDE_OF(DIM) / ATTEND_THREADS)

/* acc[i][e]: row i * (256 / WIDE) + thread / WIDE, channel thread % WIDE + 256 e. DIM: a power of
 * two, 32 to 512, that holds dim. */
template <int DIM>
static __device__ __forceinline__ void attend_values(const attend_memory &m,
                                                     float (&acc)[ROWS_OF(DIM)][EACH_OF(DIM)]) {
    const uint32_t groups = ATTEND_THREADS / WIDE_OF(DIM);
    uint32_t channel = threadIdx.x % WIDE_OF(DIM), first = threadIdx.x / WIDE_OF(DIM);
#pragma unroll
    for (uint32_t i = 0; i < ROWS_OF(DIM); i++)
#pragma unroll
        for (uint32_t e = 0; e < EACH_OF(DIM); e++) acc[i][e] *= m.keep[i * groups + first];
    if (channel >= m.width) return;
    for (uint32_t t = 0; t < KEYS; t += 4) {
        float v[4][EACH_OF(DIM)];
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
#pragma unroll
            for (uint32_t e = 0; e < EACH_OF(DIM); e++) {
                uint32_t at = channel + 256 * e;
                v[j][e] = at < m.width ? m.v[(t + j) * m.width + at] : 0.0f;
            }
#pragma unroll
        for (uint32_t i = 0; i < ROWS_OF(DIM); i++) {
            float4 p = *(const float4 *)(m.p + (i * groups + first) * KEYS + t);
#pragma unroll
            for (uint32_t e = 0; e < EACH_OF(DIM); e++)
                acc[i][e] += p.x * v[0][e] + p.y * v[1][e] + p.z * v[2][e] + p.w * v[3][e];
        }
    }
}

/* Sums as they are, then maximum and sum of exponentials, to partial [ROWS][dim + 2]. */
template <int DIM>
static __device__ __forceinline__ void attend_store(const attend_memory &m,
                                                    const float (&acc)[ROWS_OF(DIM)][EACH_OF(DIM)],
                                                    uint32_t dim, float *partial) {
    const uint32_t groups = ATTEND_THREADS / WIDE_OF(DIM);
    uint32_t channel = threadIdx.x % WIDE_OF(DIM), first = threadIdx.x / WIDE_OF(DIM);
#pragma unroll
    for (uint32_t i = 0; i < ROWS_OF(DIM); i++)
#pragma unroll
        for (uint32_t e = 0; e < EACH_OF(DIM); e++) {
            uint32_t at = channel + 256 * e;
            if (at < dim) partial[(size_t)(i * groups + first) * (dim + 2) + at] = acc[i][e];
        }
    if (threadIdx.x < ROWS) {
        partial[(size_t)threadIdx.x * (dim + 2) + dim] = m.max[threadIdx.x];
        partial[(size_t)threadIdx.x * (dim + 2) + dim + 1] = m.sum[threadIdx.x];
    }
}

#endif
