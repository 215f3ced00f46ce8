/* SPDX-License-Identifier: Apache-2.0
 *
 * The inner kernels of the cpu backend, one set for each instruction set. The bodies
 * (gemm_body.h, dense_body.h, pointwise_body.h) are written once over the vector type of
 * vec.h and compiled in kernels_portable.c, kernels_avx2.c and kernels_avx512.c. A kernel
 * runs on one thread and touches only its arguments.
 */
#ifndef LOCI_ATTENTION_CPU_KERNELS_H
#define LOCI_ATTENTION_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "attention/backend.h"

/* Output columns of one packed block of a weight; see gemm.c. */
#define LOCI_GEMM_COLUMNS 64u
/* Keys that a dense attention kernel takes at once. */
#define LOCI_DENSE_KEYS 64u
/* Query rows of a task of dense_bf16, and the bytes of its working memory. */
#define LOCI_DENSE_DP_ROWS 64u
#define LOCI_DENSE_DP_BYTES(dim)                                    \
    (LOCI_DENSE_DP_ROWS * ((size_t)(dim)*6 + LOCI_DENSE_KEYS * 6) + \
     LOCI_DENSE_KEYS * (size_t)(dim)*4)

/* y[row][column] (+)= sum over steps of x and w, for `rows` rows and the first `columns` columns
 * of one block. Each element is one chain of additions in the order of the steps, whatever the
 * number of rows. */
typedef struct loci_gemm_job {
    const void *x;   /* f32: float [rows][x_stride]; bf16: pairs of bf16 as uint32_t */
    size_t x_stride; /* in floats or pairs */
    const void *w;   /* f32: float [steps][64]; bf16: uint32_t [steps][64], a pair each */
    uint32_t steps;  /* f32: columns of W; bf16: half of them, rounded up */
    float *y;
    size_t y_stride;
    uint32_t rows, columns;
    bool accumulate;
} loci_gemm_job;

/* y[row][i] (+)= x[row] . w[i] for `rows` rows and `count` rows of a weight that is not packed, all
 * of them bf16 and `cols` long. */
typedef struct loci_gemm_rows_job {
    const uint16_t *x, *w;
    size_t x_stride, cols;
    float *y;
    size_t y_stride;
    uint32_t rows, count;
    bool accumulate;
} loci_gemm_rows_job;

/* Online softmax attention of packed query rows over the keys [key_begin, key_end) of a span, in
 * tiles of LOCI_DENSE_KEYS that begin at multiples of it. Row r sees keys [first[r], last[r]), and
 * key 0 whatever they say when sink is set. */
typedef struct loci_dense_job {
    const float *q; /* [rows][head_dim], scaled */
    uint32_t rows, head_dim;
    const void *k, *v; /* row 0 of the span, this head */
    size_t kv_stride;  /* elements */
    /* LOCI_F32, LOCI_BF16, or LOCI_I8 (`dense` only): the rows of a token side by side with their
     * scales behind, as in a pair (loci_kv_scales). */
    loci_dtype kv_dtype;
    uint32_t key_begin, key_end;
    const uint32_t *first, *last;
    bool sink;
    float first_bias; /* added to the logit of key 0 */
    /* Working memory: k_tile, v_tile [LOCI_DENSE_KEYS][head_dim], logits
     * [rows][LOCI_DENSE_KEYS]. */
    float *k_tile, *v_tile, *logits;
    /* (optional) exp(logit - keep_max) of all keys, [rows][key_end], and [rows][tiles] the maximum
     * when the tile was taken; `dense` only, key_begin 0. */
    float *keep, *keep_max;
    /* (optional) What is read next, on its way to the cache meanwhile; `dense` only. */
    const uint8_t *ahead;
    size_t ahead_bytes;
    /* State and result: out [rows][head_dim] unnormalised, running maximum and sum of each row.
     * The caller starts them at 0, -INFINITY and 0. */
    float *out, *max, *sum;
    void *work; /* of dense_bf16, instead of k_tile, v_tile and logits: LOCI_DENSE_DP_BYTES */
} loci_dense_job;

typedef struct loci_cpu_kernels {
    void (*gemm_f32)(const loci_gemm_job *job);
    void (*gemm_bf16)(const loci_gemm_job *job);
    void (*gemm_rows)(const loci_gemm_rows_job *job);
    uint32_t dense_multiple; /* head_dim that `dense` can take is a multiple of this */
    void (*dense)(const loci_dense_job *job);
    /* (optional) The same with products of factors rounded to bf16, for at most LOCI_DENSE_DP_ROWS
     * rows; first, last, max and sum have that many entries. head_dim: as dense. */
    void (*dense_bf16)(const loci_dense_job *job);
    void (*rms_norm)(float *y, const float *x, const float *gain, uint32_t cols, float eps);
    void (*swiglu)(float *y, const float *gate, const float *up, uint32_t cols);
    void (*rope)(float *x, float position, const float *inv_freq, uint32_t heads,
                 uint32_t head_dim);
    void (*to_bf16)(uint16_t *dst, const float *src, size_t count);
    /* sum of exp(x[i] - shift) */
    float (*exp_sum)(const float *x, size_t count, float shift);
} loci_cpu_kernels;

extern const loci_cpu_kernels loci_cpu_kernels_portable;
#if defined(__x86_64__)
extern const loci_cpu_kernels loci_cpu_kernels_avx2;
extern const loci_cpu_kernels loci_cpu_kernels_avx512;
extern const loci_cpu_kernels loci_cpu_kernels_avx512_bf16;
#endif

#endif
