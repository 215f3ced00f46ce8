/* SPDX-License-Identifier: Apache-2.0
 *
 * Weights and matrix products. A weight stands row by row in its precision, rows filled up with
 * zeros to 16 bytes; x is converted to the same form in the stream's scratch, but for one or two
 * rows that few.cu reads in f32. From LOCI_GEMM_STEADY_ROWS rows on one plan of cuBLASLt, without
 * split sums, serves all numbers of rows; fewer go through our own kernel (few.cu), so many at a
 * time as it takes. So a row's result does not depend on the others. (Plans for few rows read the
 * weights at a tenth of the rate where these are narrow and long.)
 */
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/cublaslt.h"
#include "attention/cuda/cuda.h"
#include "attention/cuda/few.h"
#include "base/half.h"

/* As many rows are read in f32 by products with weights in bf16: for more of them reading twice the
 * bytes takes longer than rounding them first. */
#define UNROUNDED_ROWS 2u
#define PLAN_ROWS 256u /* what the one plan is made for */
#define PACK_BYTES ((size_t)64 << 20)

struct loci_weight {
    loci_cuda *cuda;
    uint32_t rows, cols, cols_padded;
    loci_dtype precision;
    void *data;
    loci_cublaslt_plan *plans[2]; /* [y aligned] */
};

typedef struct pack_job {
    const uint8_t *data;
    loci_dtype dtype;
    const loci_weight *weight;
    uint8_t *out;
    uint32_t first;
} pack_job;

static size_t size_of(loci_dtype dtype) {
    return dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
}

static float element(const void *data, loci_dtype dtype, size_t at) {
    if (dtype == LOCI_F32) return ((const float *)data)[at];
    uint16_t half = ((const uint16_t *)data)[at];
    return dtype == LOCI_BF16 ? loci_bf16_to_f32(half) : loci_f16_to_f32(half);
}

static void pack_row(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const pack_job *job = arg;
    const loci_weight *w = job->weight;
    size_t from = (job->first + index) * w->cols, to = index * w->cols_padded;
    for (uint32_t i = 0; i < w->cols_padded; i++) {
        float value = i < w->cols ? element(job->data, job->dtype, from + i) : 0.0f;
        if (w->precision == LOCI_F32)
            ((float *)(void *)job->out)[to + i] = value;
        else
            ((uint16_t *)(void *)job->out)[to + i] = loci_f32_to_bf16(value);
    }
}

/* One part of stacked rows, in runs that fit the buffer. */
static loci_status pack_part(const loci_weight *w, const void *data, loci_dtype dtype,
                             uint32_t rows, uint32_t at, uint8_t *buffer, loci_error *err) {
    size_t row_bytes = w->cols_padded * size_of(w->precision);
    size_t step = PACK_BYTES / row_bytes ? PACK_BYTES / row_bytes : 1;
    for (size_t first = 0; first < rows; first += step) {
        size_t count = rows - first < step ? rows - first : step;
        pack_job job = {data, dtype, w, buffer, (uint32_t)first};
        loci_pool_run(w->cuda->pool, count, pack_row, &job);
        uint8_t *to = (uint8_t *)w->data + (at + first) * row_bytes;
        LOCI_TRY(loci_cuda_try(
            cudaMemcpyAsync(to, buffer, count * row_bytes, cudaMemcpyHostToDevice, w->cuda->copies),
            "cudaMemcpy", err));
        LOCI_TRY(loci_cuda_try(cudaStreamSynchronize(w->cuda->copies), "cudaMemcpy", err));
    }
    return LOCI_OK;
}

static loci_status pack_weight(loci_weight *w, const void *const *data, const uint32_t *rows,
                               uint32_t parts, loci_dtype dtype, loci_error *err) {
    size_t row_bytes = w->cols_padded * size_of(w->precision), all = row_bytes * w->rows;
    LOCI_TRY(loci_cuda_malloc(w->cuda, all, &w->data, err));
    size_t room = all < PACK_BYTES ? all : PACK_BYTES > row_bytes ? PACK_BYTES : row_bytes;
    uint8_t *buffer = malloc(room);
    if (!buffer) return loci_fail(err, LOCI_E_NOMEM, "no memory to pack a weight");
    loci_status status = LOCI_OK;
    for (uint32_t i = 0, at = 0; i < parts && status == LOCI_OK; at += rows[i++])
        status = pack_part(w, data[i], dtype, rows[i], at, buffer, err);
    free(buffer);
    return status;
}

loci_status loci_cuda_weight_create(loci_backend *self, const void *const *data,
                                    const uint32_t *rows, uint32_t parts, uint32_t cols,
                                    loci_dtype dtype, loci_dtype precision, loci_weight **out,
                                    loci_error *err) {
    *out = NULL;
    uint64_t total = 0;
    for (uint32_t i = 0; i < parts; i++) total += rows[i];
    if (total == 0 || cols == 0 || total > INT32_MAX || cols > INT32_MAX)
        return loci_fail(err, LOCI_E_INVAL, "a weight of %llu x %u cannot be packed",
                         (unsigned long long)total, cols);
    if (dtype == LOCI_I32 || (precision != LOCI_F32 && precision != LOCI_BF16))
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "weights are packed from f32, bf16 or f16 to f32 or bf16");
    loci_weight *w = calloc(1, sizeof *w);
    if (!w) return loci_fail(err, LOCI_E_NOMEM, "no memory for a weight");
    uint32_t unit = 16u / (uint32_t)size_of(precision);
    w->cuda = self->ctx;
    w->rows = (uint32_t)total;
    w->cols = cols;
    w->cols_padded = (cols + unit - 1) / unit * unit;
    w->precision = precision;
    loci_status status = pack_weight(w, data, rows, parts, dtype, err);
    if (status != LOCI_OK) {
        loci_cuda_weight_free(self, w);
        return status;
    }
    *out = w;
    return LOCI_OK;
}

void loci_cuda_weight_free(loci_backend *self, loci_weight *weight) {
    (void)self;
    if (!weight) return;
    if (weight->data) (void)cudaFree(weight->data);
    for (size_t i = 0; i < 2; i++) loci_cublaslt_plan_free(weight->plans[i]);
    free(weight);
}

static loci_status plan_of(const loci_weight *weight, bool aligned, const loci_cublaslt_plan **out,
                           loci_error *err) {
    loci_weight *w = (loci_weight *)(uintptr_t)weight; /* plans are a cache, behind the lock */
    loci_cublaslt_plan **plan = &w->plans[aligned];
    loci_cublaslt_shape shape = {w->rows, w->cols, w->cols_padded, w->precision, aligned};
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&w->cuda->lock);
    if (!*plan) status = loci_cublaslt_plan_make(w->cuda->blas, &shape, PLAN_ROWS, plan, err);
    *out = *plan;
    pthread_mutex_unlock(&w->cuda->lock);
    return status;
}

/* Whether the product reads x as it is. */
static bool reads_floats(const loci_weight *w, const float *x, uint32_t rows) {
    return w->cols == w->cols_padded && (uintptr_t)x % 16 == 0 &&
           (w->precision == LOCI_F32 || rows <= UNROUNDED_ROWS);
}

/* x in the weight's form; NULL on failure. */
static const void *prepare_x(loci_stream *stream, const loci_weight *w, const float *x,
                             uint32_t rows, uint8_t *scratch) {
    cudaError_t result;
    if (w->precision == LOCI_F32) {
        size_t bytes = (size_t)rows * w->cols_padded * sizeof(float);
        result = cudaMemsetAsync(scratch, 0, bytes, stream->stream);
        if (result == cudaSuccess)
            result = loci_cuda_k_to_f32(stream->stream, (float *)(void *)scratch, w->cols_padded, x,
                                        w->cols, rows, w->cols);
    } else {
        result = loci_cuda_k_to_bf16(stream->stream, (uint16_t *)(void *)scratch, w->cols_padded, x,
                                     w->cols, rows, w->cols, w->cols_padded);
    }
    return loci_cuda_ok(stream, result, "conversion for a product") ? scratch : NULL;
}

static loci_status run_plan(loci_stream *stream, const loci_weight *w, float *y, const void *x,
                            uint32_t rows, bool accumulate, void *workspace, loci_error *err) {
    const loci_cublaslt_plan *plan;
    bool aligned = w->rows % 4 == 0 && (uintptr_t)y % 16 == 0;
    LOCI_TRY(plan_of(w, aligned, &plan, err));
    return loci_cublaslt_run(w->cuda->blas, plan, rows, x, w->data, y, accumulate, workspace,
                             stream->stream, err);
}

static loci_status run_few(loci_stream *stream, const loci_weight *w, float *y, const void *x,
                           loci_dtype dtype, uint32_t rows, bool accumulate, loci_error *err) {
    size_t row_bytes = w->cols_padded * size_of(dtype);
    for (uint32_t first = 0; first < rows; first += LOCI_CUDA_FEW_ROWS) {
        uint32_t count = rows - first < LOCI_CUDA_FEW_ROWS ? rows - first : LOCI_CUDA_FEW_ROWS;
        LOCI_TRY(loci_cuda_try(
            loci_cuda_k_few(stream->stream, y + (size_t)first * w->rows,
                            (const uint8_t *)x + first * row_bytes, dtype == LOCI_BF16, w->data,
                            w->precision == LOCI_BF16, count, w->rows, w->cols_padded, accumulate),
            "a kernel", err));
    }
    return LOCI_OK;
}

void loci_cuda_gemm(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows,
                    const loci_weight *weight, bool accumulate) {
    if (rows == 0) return;
    const loci_weight *w = weight;
    const float *from = loci_cuda_ptr(stream, x, (size_t)rows * w->cols * sizeof(float));
    float *to = loci_cuda_ptr(stream, y, (size_t)rows * w->rows * sizeof(float));
    size_t x_bytes = (size_t)rows * w->cols_padded * size_of(w->precision);
    uint8_t *scratch =
        from && to ? loci_cuda_scratch(stream, LOCI_CUBLASLT_WORKSPACE + x_bytes) : NULL;
    if (!scratch) return;
    bool floats = reads_floats(w, from, rows);
    const void *ready =
        floats ? from : prepare_x(stream, w, from, rows, scratch + LOCI_CUBLASLT_WORKSPACE);
    if (!ready) return;
    loci_error err;
    loci_status status = rows < LOCI_GEMM_STEADY_ROWS
                             ? run_few(stream, w, to, ready, floats ? LOCI_F32 : w->precision, rows,
                                       accumulate, &err)
                             : run_plan(stream, w, to, ready, rows, accumulate, scratch, &err);
    if (status != LOCI_OK)
        loci_cuda_fail(stream, status, "a product of %u x %u x %u: %s", rows, w->rows, w->cols,
                       err.text);
}

void loci_cuda_embed(loci_stream *stream, loci_ref y, const loci_weight *table, loci_ref ids,
                     uint32_t rows) {
    if (rows == 0) return;
    const loci_weight *w = table;
    float *to = loci_cuda_ptr(stream, y, (size_t)rows * w->cols * sizeof(float));
    const int32_t *id = loci_cuda_ptr(stream, ids, rows * sizeof(int32_t));
    if (to && id)
        (void)loci_cuda_ok(stream,
                           loci_cuda_k_embed(stream->stream, to, w->data, w->precision == LOCI_BF16,
                                             w->rows, w->cols_padded, id, rows, w->cols,
                                             stream->fault),
                           "embed");
}
