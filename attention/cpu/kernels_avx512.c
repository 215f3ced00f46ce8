/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels for AVX-512, without and with BF16; entered only after the run-time check in
 * isa.c.
 */
#if defined(__x86_64__)

#include "attention/cpu/vec.h"

#include "attention/cpu/dense_body.h"
#include "attention/cpu/dense_dp.h"
#include "attention/cpu/gemm_body.h"
#include "attention/cpu/pointwise_body.h"

/* A group of rows by VDPBF16PS, which multiplies a pair of bf16 in each lane. */
VINLINE void gemm_dp_group(const loci_gemm_job *job, uint32_t row, int rows) {
    __m512 sum[GEMM_ROWS][GEMM_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < GEMM_VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
    const uint32_t *x = (const uint32_t *)job->x + row * job->x_stride;
    const uint32_t *w = job->w;
    for (uint32_t s = 0; s < job->steps; s++, w += LOCI_GEMM_COLUMNS) {
        __m512bh b[GEMM_VECTORS];
        for (int v = 0; v < GEMM_VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(w + v * VW);
        for (int r = 0; r < rows; r++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[(size_t)r * job->x_stride + s]);
            for (int v = 0; v < GEMM_VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], b[v], a);
        }
    }
    for (int r = 0; r < rows; r++)
        gemm_put(job->y + (row + (uint32_t)r) * job->y_stride, sum[r], GEMM_VECTORS, job->columns,
                 job->accumulate);
}

static void gemm_dp_bf16(const loci_gemm_job *job) {
    uint32_t row = 0;
    for (; row + GEMM_ROWS <= job->rows; row += GEMM_ROWS) gemm_dp_group(job, row, GEMM_ROWS);
    for (; row + 2 <= job->rows; row += 2) gemm_dp_group(job, row, 2);
    for (; row < job->rows; row++) gemm_dp_group(job, row, 1);
}

/* `streams` rows of the weight side by side: the sums are long chains otherwise. */
VINLINE void gemm_dp_streams(const loci_gemm_rows_job *job, uint32_t i, int streams) {
    const uint16_t *w = job->w + i * job->cols;
    for (uint32_t r = 0; r < job->rows; r++) {
        const uint16_t *x = job->x + r * job->x_stride;
        __m512 sum[4];
        for (int s = 0; s < streams; s++) sum[s] = _mm512_setzero_ps();
        for (size_t k = 0; k < job->cols; k += 32) {
            __mmask32 some = job->cols - k >= 32 ? ~0u : (1u << (job->cols - k)) - 1;
            __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(some, x + k);
            for (int s = 0; s < streams; s++)
                sum[s] = _mm512_dpbf16_ps(
                    sum[s], a,
                    (__m512bh)_mm512_maskz_loadu_epi16(some, w + (size_t)s * job->cols + k));
        }
        for (int s = 0; s < streams; s++)
            gemm_put_one(job, r, i + (uint32_t)s, v_reduce_add(sum[s]));
    }
}

static void gemm_dp_rows(const loci_gemm_rows_job *job) {
    uint32_t i = 0;
    for (; i + 4 <= job->count; i += 4) gemm_dp_streams(job, i, 4);
    for (; i < job->count; i++) gemm_dp_streams(job, i, 1);
}

const loci_cpu_kernels loci_cpu_kernels_avx512 = {
    gemm_f32, gemm_bf16, gemm_rows, VW, dense, NULL, rms_norm, swiglu, rope, to_bf16, exp_sum};

const loci_cpu_kernels loci_cpu_kernels_avx512_bf16 = {gemm_f32, gemm_dp_bf16, gemm_dp_rows, VW,
                                                       dense,    dense_dp,     rms_norm,     swiglu,
                                                       rope,     to_bf16,      exp_sum};

#endif
