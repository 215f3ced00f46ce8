/* SPDX-License-Identifier: Apache-2.0
 *
 * Matrix product over one packed block of 64 columns, for few rows or where oneDNN has no
 * fast kernel. Included once by each kernels_*.c, after vec.h. A group of rows keeps
 * its sums in registers over all steps; the number of vectors side by side follows from the
 * number of registers.
 */
#include "attention/cpu/kernels.h"
#include "base/half.h"

#if VW == 16
#define GEMM_VECTORS 4
#define GEMM_ROWS 6
#else
#define GEMM_VECTORS (VW == 8 ? 2 : 8)
#define GEMM_ROWS (VW == 8 ? 5 : 1)
#endif

/* Writes or adds one row of sums, of which `valid` columns exist. */
VINLINE void gemm_put(float *y, const vf *sum, int vectors, uint32_t valid, bool accumulate) {
    if (valid >= (uint32_t)(vectors * VW)) {
        for (int v = 0; v < vectors; v++)
            v_store(y + v * VW, accumulate ? v_add(v_load(y + v * VW), sum[v]) : sum[v]);
        return;
    }
    float row[LOCI_GEMM_COLUMNS];
    for (int v = 0; v < vectors; v++) v_store(row + v * VW, sum[v]);
    for (uint32_t c = 0; c < valid; c++) y[c] = accumulate ? y[c] + row[c] : row[c];
}

VINLINE void gemm_group(const loci_gemm_job *job, bool bf16, uint32_t row, uint32_t column,
                        int rows, int vectors) {
    vf sum[GEMM_ROWS][GEMM_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = v_zero();
    size_t at = row * job->x_stride;
    if (bf16) {
        const uint32_t *x = (const uint32_t *)job->x + at;
        const uint32_t *w = (const uint32_t *)job->w + column;
        for (uint32_t s = 0; s < job->steps; s++, w += LOCI_GEMM_COLUMNS) {
            vf even[GEMM_VECTORS], odd[GEMM_VECTORS];
            for (int v = 0; v < vectors; v++) {
                even[v] = v_pairs_even(w + v * VW);
                odd[v] = v_pairs_odd(w + v * VW);
            }
            for (int r = 0; r < rows; r++) {
                uint32_t bits = x[(size_t)r * job->x_stride + s];
                uint32_t parts[2] = {bits << 16, bits & 0xffff0000u};
                float pair[2];
                memcpy(pair, parts, sizeof pair);
                for (int v = 0; v < vectors; v++)
                    sum[r][v] =
                        v_fma(v_set1(pair[1]), odd[v], v_fma(v_set1(pair[0]), even[v], sum[r][v]));
            }
        }
    } else {
        const float *x = (const float *)job->x + at;
        const float *w = (const float *)job->w + column;
        for (uint32_t s = 0; s < job->steps; s++, w += LOCI_GEMM_COLUMNS) {
            vf b[GEMM_VECTORS];
            for (int v = 0; v < vectors; v++) b[v] = v_load(w + v * VW);
            for (int r = 0; r < rows; r++) {
                vf a = v_set1(x[(size_t)r * job->x_stride + s]);
                for (int v = 0; v < vectors; v++) sum[r][v] = v_fma(a, b[v], sum[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        gemm_put(job->y + (row + (uint32_t)r) * job->y_stride + column, sum[r], vectors,
                 job->columns - column, job->accumulate);
}

VINLINE void gemm_block(const loci_gemm_job *job, bool bf16) {
    for (uint32_t column = 0; column < job->columns; column += GEMM_VECTORS * VW) {
        uint32_t row = 0;
        for (; row + GEMM_ROWS <= job->rows; row += GEMM_ROWS)
            gemm_group(job, bf16, row, column, GEMM_ROWS, GEMM_VECTORS);
        for (; row + 2 <= job->rows && GEMM_ROWS > 2; row += 2)
            gemm_group(job, bf16, row, column, GEMM_ROWS > 2 ? 2 : 1, GEMM_VECTORS);
        for (; row < job->rows; row++) gemm_group(job, bf16, row, column, 1, GEMM_VECTORS);
    }
}

static void gemm_f32(const loci_gemm_job *job) {
    gemm_block(job, false);
}

static void gemm_bf16(const loci_gemm_job *job) {
    gemm_block(job, true);
}

VINLINE void gemm_put_one(const loci_gemm_rows_job *job, uint32_t row, uint32_t i, float sum) {
    float *y = job->y + row * job->y_stride + i;
    *y = job->accumulate ? *y + sum : sum;
}

static void gemm_rows(const loci_gemm_rows_job *job) {
    size_t whole = job->cols / VW * VW;
    for (uint32_t i = 0; i < job->count; i++) {
        const uint16_t *w = job->w + i * job->cols;
        for (uint32_t r = 0; r < job->rows; r++) {
            const uint16_t *x = job->x + r * job->x_stride;
            vf a = v_zero(), b = v_zero();
            size_t k = 0;
            for (; k + 2 * VW <= whole; k += 2 * VW) {
                a = v_fma(v_load_bf16(w + k), v_load_bf16(x + k), a);
                b = v_fma(v_load_bf16(w + k + VW), v_load_bf16(x + k + VW), b);
            }
            for (; k < whole; k += VW) a = v_fma(v_load_bf16(w + k), v_load_bf16(x + k), a);
            float sum = v_reduce_add(v_add(a, b));
            for (; k < job->cols; k++) sum += loci_bf16_to_f32(w[k]) * loci_bf16_to_f32(x[k]);
            gemm_put_one(job, r, i, sum);
        }
    }
}
