/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention: cuts the spans into tasks for the kernels, and merges partial results.
 *
 * A task is (span, KV head, run of queries): the queries of a GQA group are packed side by
 * side, so that keys and values are read once for all of them. Masks become, for each
 * packed row, the range of keys that it sees.
 */
#include <math.h>
#include <string.h>

#include "attention/common.h"
#include "attention/cpu/cpu.h"
#include "attention/cpu/kernels.h"

/* Packed query rows of a task: enough to pay for converting a tile of keys, few enough that
 * queries, logits and sums (4 bytes x rows x (2 head_dim + 64)) stay in the first-level caches. */
#define TASK_ROWS 48u

typedef struct dense_run {
    loci_stream *stream;
    const loci_attend_dense *args;
    const loci_cpu_kernels *kernels;
    const float *q;
    const uint8_t *k, *v;
    float *out, *lse;
    uint32_t group; /* query heads of a KV head */
    _Atomic bool failed;
} dense_run;

typedef struct dense_task {
    loci_attend_span span;
    uint32_t kv_head, begin, count; /* queries of the span */
} dense_task;

/* Heads below this gain little from products in bf16, the softmax being most of their work, and
 * lose most, their rounding errors averaging over few terms. */
#define BF16_HEAD_DIM_MIN 32u

/* Is the span one for products in bf16? */
static bool takes_bf16(const dense_run *run, const loci_attend_span *span) {
    return run->args->precision == LOCI_BF16 && run->kernels->dense_bf16 &&
           run->group <= LOCI_DENSE_DP_ROWS && run->args->head_dim >= BF16_HEAD_DIM_MIN &&
           span->q_count > LOCI_ATTEND_EXACT_QUERIES;
}

/* Queries of a task. */
static uint32_t queries_of(const dense_run *run, const loci_attend_span *span) {
    uint32_t rows = takes_bf16(run, span) ? LOCI_DENSE_DP_ROWS : TASK_ROWS;
    return rows > run->group ? rows / run->group : 1;
}

static size_t tasks_of(const dense_run *run, const loci_attend_span *span) {
    uint32_t queries = queries_of(run, span);
    return (size_t)(span->q_count / queries + (span->q_count % queries != 0)) * run->args->kv_heads;
}

/* Task `index` over all spans. Later queries come first: in causal spans they are the longest. */
static dense_task find_task(const dense_run *run, size_t index) {
    const loci_attend_span *span = run->args->spans;
    for (size_t n; index >= (n = tasks_of(run, span)); span++) index -= n;
    dense_task task = {.span = *span};
    size_t runs = tasks_of(run, span) / run->args->kv_heads;
    uint32_t queries = queries_of(run, span);
    task.kv_head = (uint32_t)(index / runs);
    task.begin = (uint32_t)(runs - 1 - index % runs) * queries;
    task.count = task.span.q_count - task.begin;
    if (task.count > queries) task.count = queries;
    return task;
}

/* The keys that query `query` of the span sees. */
static void visible(const loci_attend_dense *args, const loci_attend_span *span, uint32_t query,
                    uint32_t *first, uint32_t *last) {
    int64_t position = (int64_t)span->kv_count - span->q_count + query;
    int64_t begin = args->window ? position - args->window + 1 : 0;
    int64_t end = args->causal ? position + 1 : span->kv_count;
    if (begin < 0) begin = 0;
    if (begin > span->kv_count) begin = span->kv_count;
    if (end < begin) end = begin;
    *first = (uint32_t)begin;
    *last = (uint32_t)end;
}

static void pack_queries(const dense_run *run, const dense_task *task, float *q) {
    const loci_attend_dense *args = run->args;
    for (uint32_t i = 0; i < task->count; i++) {
        const float *from = run->q +
                            (size_t)(task->span.q_begin + task->begin + i) * args->q_stride +
                            (size_t)task->kv_head * run->group * args->head_dim;
        for (size_t d = 0; d < (size_t)run->group * args->head_dim; d++)
            *q++ = from[d] * args->scale;
    }
}

static void put_result(const dense_run *run, const dense_task *task, const loci_dense_job *job) {
    const loci_attend_dense *args = run->args;
    for (uint32_t row = 0; row < job->rows; row++) {
        size_t to = task->span.q_begin + task->begin + row / run->group;
        uint32_t head = task->kv_head * run->group + row % run->group;
        float *out = run->out + to * args->out_stride + (size_t)head * args->head_dim;
        const float *sum = job->out + (size_t)row * args->head_dim;
        float total = job->sum[row], factor = total > 0.0f ? 1.0f / total : total;
        for (uint32_t d = 0; d < args->head_dim; d++) out[d] = sum[d] * factor;
        if (run->lse)
            run->lse[to * args->q_heads + head] =
                total == 0.0f ? -INFINITY : job->max[row] + logf(total);
    }
}

/* Cuts a task's memory: what the kernel works in, then queries, sums and the state of `rows` rows.
 * NULL in job->out when there is none. */
static void place(const dense_run *run, unsigned thread, bool bf16, uint32_t rows,
                  loci_dense_job *job, float **q, uint32_t **first, uint32_t **last) {
    size_t dim = job->head_dim, tile = (size_t)LOCI_DENSE_KEYS * dim;
    size_t work =
        bf16 ? LOCI_DENSE_DP_BYTES(dim) / sizeof(float) : 2 * tile + (size_t)rows * LOCI_DENSE_KEYS;
    size_t floats = work + rows * (2 * dim + 4);
    float *at =
        loci_cpu_scratch_get(&run->stream->cpu->thread_scratch[thread], floats * sizeof(float));
    if (!at) return;
    job->work = at;
    job->k_tile = at;
    job->v_tile = at + tile;
    job->logits = at + 2 * tile;
    *q = at + work;
    job->out = *q + rows * dim;
    job->max = job->out + rows * dim;
    job->sum = job->max + rows;
    *first = (uint32_t *)(void *)(job->sum + rows);
    *last = *first + rows;
}

static void dense_run_task(void *arg, size_t index, unsigned thread) {
    dense_run *run = arg;
    const loci_attend_dense *args = run->args;
    dense_task task = find_task(run, index);
    bool bf16 = takes_bf16(run, &task.span);
    uint32_t dim = args->head_dim, rows = task.count * run->group;
    size_t size = args->kv_dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
    size_t kv_at =
        ((size_t)task.span.kv_begin * args->kv_stride + (size_t)task.kv_head * dim) * size;
    loci_dense_job job = {
        .rows = rows,
        .head_dim = dim,
        .k = run->k + kv_at,
        .v = run->v + kv_at,
        .kv_stride = args->kv_stride,
        .kv_dtype = args->kv_dtype,
        .key_begin = UINT32_MAX,
        .sink = args->first_key_is_sink,
        .first_bias = args->first_key_is_sink ? args->first_key_bias : 0.0f,
    };
    float *q = NULL;
    uint32_t *first = NULL, *last = NULL, padded = bf16 ? LOCI_DENSE_DP_ROWS : rows;
    place(run, thread, bf16, padded, &job, &q, &first, &last);
    if (!job.out) {
        run->failed = true;
        return;
    }
    for (uint32_t row = 0; row < padded; row++) {
        job.max[row] = -INFINITY;
        job.sum[row] = 0.0f;
    }
    memset(first, 0, 2 * padded * sizeof *first); /* last too */
    for (uint32_t row = 0; row < rows; row++) {
        visible(args, &task.span, task.begin + row / run->group, &first[row], &last[row]);
        if (first[row] < job.key_begin) job.key_begin = first[row];
        if (last[row] > job.key_end) job.key_end = last[row];
    }
    if (job.sink && job.key_end == 0 && task.span.kv_count > 0) job.key_end = 1;
    pack_queries(run, &task, q);
    memset(job.out, 0, (size_t)rows * dim * sizeof(float));
    job.q = q;
    job.first = first;
    job.last = last;
    (bf16 ? run->kernels->dense_bf16 : run->kernels->dense)(&job);
    put_result(run, &task, &job);
}

static void *strided(loci_ref ref, size_t rows, size_t stride, size_t width, size_t size) {
    return loci_cpu_ptr(ref, rows ? ((rows - 1) * stride + width) * size : 0);
}

void loci_cpu_attend_dense(loci_stream *stream, const loci_attend_dense *args) {
    if (args->kv_heads == 0 || args->q_heads % args->kv_heads != 0 || args->head_dim == 0 ||
        args->head_dim > LOCI_CPU_HEAD_DIM_MAX ||
        (args->kv_dtype != LOCI_F32 && args->kv_dtype != LOCI_BF16)) {
        loci_cpu_fail(stream, LOCI_E_UNSUPPORTED,
                      "attend_dense: %u query heads, %u KV heads of %u, dtype %d", args->q_heads,
                      args->kv_heads, args->head_dim, (int)args->kv_dtype);
        return;
    }
    size_t rows = loci_attend_rows(args, false), keys = loci_attend_rows(args, true);
    size_t q_width = (size_t)args->q_heads * args->head_dim;
    size_t kv_width = (size_t)args->kv_heads * args->head_dim;
    size_t kv_size = args->kv_dtype == LOCI_F32 ? sizeof(float) : sizeof(uint16_t);
    dense_run run = {
        .stream = stream,
        .args = args,
        .kernels = stream->cpu->kernels,
        .q = strided(args->q, rows, args->q_stride, q_width, sizeof(float)),
        .k = strided(args->k, keys, args->kv_stride, kv_width, kv_size),
        .v = strided(args->v, keys, args->kv_stride, kv_width, kv_size),
        .out = strided(args->out, rows, args->out_stride, q_width, sizeof(float)),
        .group = args->q_heads / args->kv_heads,
    };
    if (args->lse.buffer) run.lse = loci_cpu_ptr(args->lse, rows * args->q_heads * sizeof(float));
    if (args->head_dim % run.kernels->dense_multiple != 0) run.kernels = &loci_cpu_kernels_portable;
    size_t tasks = 0;
    for (uint32_t i = 0; i < args->span_count; i++) tasks += tasks_of(&run, &args->spans[i]);
    loci_pool_run(stream->cpu->pool, tasks, dense_run_task, &run);
    if (run.failed) loci_cpu_fail(stream, LOCI_E_NOMEM, "no memory for dense attention's scratch");
}

typedef struct merge_job {
    float *out_a, *lse_a;
    const float *out_b, *lse_b;
    size_t stride_a, stride_b;
    uint32_t heads, head_dim;
} merge_job;

static void merge_rows(void *arg, uint32_t begin, uint32_t end) {
    const merge_job *job = arg;
    for (size_t i = (size_t)begin * job->heads; i < (size_t)end * job->heads; i++) {
        float a = job->lse_a[i], b = job->lse_b[i];
        if (b == -INFINITY) continue;
        size_t row = i / job->heads, at = i % job->heads * job->head_dim;
        float *out_a = job->out_a + row * job->stride_a + at;
        const float *out_b = job->out_b + row * job->stride_b + at;
        float max = a > b ? a : b;
        float weight_a = expf(a - max), weight_b = expf(b - max), total = weight_a + weight_b;
        weight_a /= total;
        weight_b /= total;
        for (uint32_t d = 0; d < job->head_dim; d++)
            out_a[d] = weight_a * out_a[d] + weight_b * out_b[d];
        job->lse_a[i] = max + logf(total);
    }
}

void loci_cpu_merge(loci_stream *stream, loci_ref out_a, uint32_t stride_a, loci_ref lse_a,
                    loci_ref out_b, uint32_t stride_b, loci_ref lse_b, uint32_t rows,
                    uint32_t heads, uint32_t head_dim) {
    size_t width = (size_t)heads * head_dim, lse_bytes = (size_t)rows * heads * sizeof(float);
    merge_job job = {
        .out_a = strided(out_a, rows, stride_a, width, sizeof(float)),
        .lse_a = loci_cpu_ptr(lse_a, lse_bytes),
        .out_b = strided(out_b, rows, stride_b, width, sizeof(float)),
        .lse_b = loci_cpu_ptr(lse_b, lse_bytes),
        .stride_a = stride_a,
        .stride_b = stride_b,
        .heads = heads,
        .head_dim = head_dim,
    };
    loci_cpu_for_rows(stream, rows, 2 * width, merge_rows, &job);
}
