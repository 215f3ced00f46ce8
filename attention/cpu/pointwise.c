/* SPDX-License-Identifier: Apache-2.0
 *
 * Row-wise operations: resolve refs, cut the rows over the pool, call the kernels.
 */
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/cpu/kernels.h"

/* Elements worth a task of their own: about 5 us of work, above the cost of a wake-up. */
#define TASK_ELEMENTS 16384u

typedef struct rows_job {
    loci_cpu_rows_fn fn;
    void *arg;
    uint32_t rows, step;
} rows_job;

static void run_rows(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const rows_job *job = arg;
    uint32_t begin = (uint32_t)index * job->step;
    uint32_t end = job->rows - begin < job->step ? job->rows : begin + job->step;
    job->fn(job->arg, begin, end);
}

void loci_cpu_for_rows(loci_stream *stream, uint32_t rows, size_t row_cost, loci_cpu_rows_fn fn,
                       void *arg) {
    if (rows == 0) return;
    size_t step = row_cost >= TASK_ELEMENTS ? 1 : TASK_ELEMENTS / (row_cost ? row_cost : 1);
    if (step >= rows) {
        fn(arg, 0, rows);
        return;
    }
    rows_job job = {fn, arg, rows, (uint32_t)step};
    loci_pool_run(stream->cpu->pool, (rows + step - 1) / step, run_rows, &job);
}

typedef struct norm_job {
    const loci_cpu_kernels *kernels;
    float *y;
    const float *x, *gain;
    uint32_t cols;
    float eps;
} norm_job;

static void norm_rows(void *arg, uint32_t begin, uint32_t end) {
    const norm_job *job = arg;
    for (uint32_t r = begin; r < end; r++)
        job->kernels->rms_norm(job->y + (size_t)r * job->cols, job->x + (size_t)r * job->cols,
                               job->gain, job->cols, job->eps);
}

void loci_cpu_rms_norm(loci_stream *stream, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                       uint32_t cols, float eps) {
    size_t bytes = (size_t)rows * cols * sizeof(float);
    norm_job job = {stream->cpu->kernels,
                    loci_cpu_ptr(y, bytes),
                    loci_cpu_ptr(x, bytes),
                    loci_cpu_ptr(gain, cols * sizeof(float)),
                    cols,
                    eps};
    loci_cpu_for_rows(stream, rows, cols, norm_rows, &job);
}

typedef struct rope_job {
    const loci_cpu_kernels *kernels;
    float *x;
    size_t stride;
    const int32_t *positions;
    const float *inv_freq;
    uint32_t heads, head_dim;
} rope_job;

static void rope_rows(void *arg, uint32_t begin, uint32_t end) {
    const rope_job *job = arg;
    for (uint32_t r = begin; r < end; r++)
        job->kernels->rope(job->x + r * job->stride, (float)job->positions[r], job->inv_freq,
                           job->heads, job->head_dim);
}

void loci_cpu_rope(loci_stream *stream, loci_ref x, uint32_t stride, loci_ref positions,
                   loci_ref inv_freq, uint32_t rows, uint32_t heads, uint32_t head_dim) {
    if (rows == 0) return;
    if (head_dim > LOCI_CPU_HEAD_DIM_MAX) {
        loci_cpu_fail(stream, LOCI_E_UNSUPPORTED, "rope: head_dim %u is above %u", head_dim,
                      LOCI_CPU_HEAD_DIM_MAX);
        return;
    }
    size_t elements = (size_t)(rows - 1) * stride + (size_t)heads * head_dim;
    rope_job job = {stream->cpu->kernels,
                    loci_cpu_ptr(x, elements * sizeof(float)),
                    stride,
                    loci_cpu_ptr(positions, rows * sizeof(int32_t)),
                    loci_cpu_ptr(inv_freq, head_dim / 2 * sizeof(float)),
                    heads,
                    head_dim};
    loci_cpu_for_rows(stream, rows, (size_t)(heads + 4) * head_dim, rope_rows, &job);
}

typedef struct swiglu_job {
    const loci_cpu_kernels *kernels;
    float *y;
    const float *x;
    uint32_t cols;
} swiglu_job;

static void swiglu_rows(void *arg, uint32_t begin, uint32_t end) {
    const swiglu_job *job = arg;
    for (uint32_t r = begin; r < end; r++) {
        const float *gate = job->x + (size_t)r * 2 * job->cols;
        job->kernels->swiglu(job->y + (size_t)r * job->cols, gate, gate + job->cols, job->cols);
    }
}

void loci_cpu_swiglu(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols) {
    size_t bytes = (size_t)rows * cols * sizeof(float);
    swiglu_job job = {stream->cpu->kernels, loci_cpu_ptr(y, bytes), loci_cpu_ptr(x, 2 * bytes),
                      cols};
    loci_cpu_for_rows(stream, rows, 4 * (size_t)cols, swiglu_rows, &job);
}

void loci_cpu_scatter(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_ref at,
                      loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols) {
    (void)stream;
    if (rows == 0) return;
    const int32_t *to = loci_cpu_ptr(at, rows * sizeof *to);
    const float *from = loci_cpu_ptr(src, ((size_t)(rows - 1) * src_stride + cols) * sizeof *from);
    for (uint32_t r = 0; r < rows; r++, from += src_stride) {
        loci_ref row = dst;
        row.offset += (size_t)to[r] * dst_stride * sizeof *from;
        memcpy(loci_cpu_ptr(row, cols * sizeof *from), from, cols * sizeof *from);
    }
}

typedef struct convert_job {
    const loci_cpu_kernels *kernels;
    uint8_t *dst;
    const float *src;
    size_t dst_stride, src_stride;
    bool bf16;
    uint32_t cols;
} convert_job;

static void convert_rows(void *arg, uint32_t begin, uint32_t end) {
    const convert_job *job = arg;
    for (uint32_t r = begin; r < end; r++) {
        const float *src = job->src + r * job->src_stride;
        if (job->bf16)
            job->kernels->to_bf16((uint16_t *)(void *)job->dst + r * job->dst_stride, src,
                                  job->cols);
        else
            memcpy((float *)(void *)job->dst + r * job->dst_stride, src, job->cols * sizeof(float));
    }
}

void loci_cpu_convert(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                      loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols) {
    if (rows == 0) return;
    if (dst_dtype != LOCI_F32 && dst_dtype != LOCI_BF16) {
        loci_cpu_fail(stream, LOCI_E_UNSUPPORTED, "convert: only to f32 and bf16");
        return;
    }
    size_t size = dst_dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
    convert_job job = {
        stream->cpu->kernels,
        loci_cpu_ptr(dst, ((size_t)(rows - 1) * dst_stride + cols) * size),
        loci_cpu_ptr(src, ((size_t)(rows - 1) * src_stride + cols) * sizeof(float)),
        dst_stride,
        src_stride,
        dst_dtype == LOCI_BF16,
        cols,
    };
    loci_cpu_for_rows(stream, rows, cols, convert_rows, &job);
}
