/* SPDX-License-Identifier: Apache-2.0
 *
 * cuBLASLt, found when the backend opens: a build runs on machines without it. Products
 * y [rows][n] = x [rows][k] W^T, W [n][k], all row-major; x and W in one precision with rows of
 * k_padded elements, y in f32.
 */
#ifndef LOCI_ATTENTION_CUDA_CUBLASLT_H
#define LOCI_ATTENTION_CUDA_CUBLASLT_H

#include <cuda_runtime_api.h>

#include "attention/backend.h"

#define LOCI_CUBLASLT_WORKSPACE ((size_t)8 << 20)

typedef struct loci_cublaslt loci_cublaslt;
/* How products of one weight are computed; the same plan gives a row the same bytes whatever the
 * number of rows. */
typedef struct loci_cublaslt_plan loci_cublaslt_plan;

typedef struct loci_cublaslt_shape {
    uint32_t n, k, k_padded;
    loci_dtype precision; /* F32 or BF16 */
    bool y_aligned;       /* y and its rows begin at multiples of 16 bytes */
} loci_cublaslt_shape;

LOCI_MUST_CHECK loci_status loci_cublaslt_open(loci_cublaslt **out, loci_error *err);
void loci_cublaslt_close(loci_cublaslt *blas); /* NULL allowed */
/* The best plan for `rows` rows that splits no sum. */
LOCI_MUST_CHECK loci_status loci_cublaslt_plan_make(loci_cublaslt *blas,
                                                    const loci_cublaslt_shape *shape, uint32_t rows,
                                                    loci_cublaslt_plan **out, loci_error *err);
void loci_cublaslt_plan_free(loci_cublaslt_plan *plan); /* NULL allowed */
/* workspace: LOCI_CUBLASLT_WORKSPACE bytes. */
LOCI_MUST_CHECK loci_status loci_cublaslt_run(loci_cublaslt *blas, const loci_cublaslt_plan *plan,
                                              uint32_t rows, const void *x, const void *w, float *y,
                                              bool accumulate, void *workspace, cudaStream_t stream,
                                              loci_error *err);

#endif
