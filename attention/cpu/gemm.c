/* SPDX-License-Identifier: Apache-2.0
 *
 * Weights and matrix products.
 *
 * A weight W [rows][cols] is packed once, in blocks of 64 of its rows (columns of the
 * product), each block contiguous:
 *
 *   f32:  [block][k, padded to 16][64]        k counts columns of W
 *   bf16: [block][k / 2, padded to 16][64][2] a pair of neighbouring k side by side
 *
 * which oneDNN calls BA16a64b and BA16a64b2a, so that its kernels and ours read the same bytes.
 * Padding is zero.
 *
 * Many rows go through oneDNN, where it has a fast kernel: in tiles of always TILE_ROWS rows (the
 * last one filled up) by WIDE_COLUMNS columns, each by the same kernel, so that a row's
 * result depends neither on the other rows nor on their number. Few rows (decoding), where most of
 * a tile would be filling, and machines without such a kernel take our own kernels, cut by
 * blocks of 64 columns, for which the same holds. The two differ by rounding.
 *
 * A mapped weight stays where it is, bf16 row by row: few rows are multiplied in place, for many a
 * task packs the columns that it is about to multiply.
 */
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/cpu/gemm_dnnl.h"
#include "attention/cpu/kernels.h"

#define BLOCK LOCI_GEMM_COLUMNS
#define TILE_ROWS 32u
#define WIDE_COLUMNS 256u
/* Up to here our kernels win: they read the weights as fast as memory gives them. */
#define FEW_ROWS LOCI_GEMM_FEW_ROWS
/* Tiles that one task runs under the same columns, to read these from the cache. */
#define GROUP_TILES_MAX 8u
#define PARTS_MAX 3u

struct loci_weight {
    uint32_t rows, cols;
    uint32_t cols_padded;  /* as packed: oneDNN is given whole blocks only */
    uint32_t steps;        /* of our kernels: k, or pairs of k with padding */
    uint32_t blocks;       /* of 64 rows */
    size_t block_elements; /* floats, or pairs */
    loci_dtype precision;
    void *packed; /* NULL: mapped */
    const uint16_t *mapped[PARTS_MAX];
    uint32_t mapped_rows[PARTS_MAX];
    /* Of WIDE_COLUMNS columns, and of those left over; both NULL: own kernels only. */
    const loci_dnnl_matmul *wide, *rest;
};

typedef struct pack_job {
    const void *const *data;
    const uint32_t *rows;
    uint32_t parts;
    loci_dtype dtype;
    loci_weight *weight;
} pack_job;

static float element(const void *data, loci_dtype dtype, size_t at) {
    if (dtype == LOCI_F32) return ((const float *)data)[at];
    uint16_t half = ((const uint16_t *)data)[at];
    return dtype == LOCI_BF16 ? loci_bf16_to_f32(half) : loci_f16_to_f32(half);
}

/* Row `row` of the stacked parts; returns its part and makes *row relative to it. */
static const void *part_of(const pack_job *job, uint32_t *row) {
    uint32_t part = 0;
    while (*row >= job->rows[part]) *row -= job->rows[part++];
    return job->data[part];
}

static const uint16_t *mapped_row(const loci_weight *w, uint32_t row) {
    uint32_t part = 0;
    while (row >= w->mapped_rows[part]) row -= w->mapped_rows[part++];
    return w->mapped[part] + (size_t)row * w->cols;
}

/* bf16 to bf16, a pair of columns at a time; cols is even. */
static void pack_pairs(const loci_weight *w, const uint16_t *const *rows, uint32_t count,
                       uint32_t *to) {
    for (uint32_t k = 0; k < w->steps; k += 16) {
        uint32_t end = w->steps - k < 16 ? w->steps : k + 16;
        for (uint32_t c = 0; c < count; c++)
            for (uint32_t s = k; s < end; s++)
                memcpy(to + (size_t)s * BLOCK + c, rows[c] + 2 * (size_t)s, sizeof *to);
    }
}

/* One block of a mapped weight, with its padding. */
static void pack_mapped(const loci_weight *w, uint32_t block, uint32_t *to) {
    const uint16_t *rows[BLOCK];
    uint32_t count = w->rows - block * BLOCK < BLOCK ? w->rows - block * BLOCK : BLOCK;
    for (uint32_t c = 0; c < count; c++) rows[c] = mapped_row(w, block * BLOCK + c);
    if (count < BLOCK || w->steps * BLOCK < w->block_elements)
        memset(to, 0, w->block_elements * sizeof *to);
    pack_pairs(w, rows, count, to);
}

static void pack_block(void *arg, size_t block, unsigned thread) {
    (void)thread;
    const pack_job *job = arg;
    loci_weight *w = job->weight;
    const uint16_t *pairs[BLOCK];
    uint32_t count = 0;
    for (uint32_t c = 0; c < BLOCK; c++) {
        uint32_t row = (uint32_t)block * BLOCK + c;
        if (row >= w->rows) break;
        const void *data = part_of(job, &row);
        size_t at = (size_t)row * w->cols;
        if (job->dtype == LOCI_BF16 && w->precision == LOCI_BF16 && w->cols % 2 == 0) {
            pairs[count++] = (const uint16_t *)data + at;
            continue;
        }
        if (w->precision == LOCI_F32) {
            float *to = (float *)w->packed + block * w->block_elements + c;
            for (uint32_t k = 0; k < w->cols; k++)
                to[(size_t)k * BLOCK] = element(data, job->dtype, at + k);
        } else {
            uint16_t *to = (uint16_t *)w->packed + (block * w->block_elements + c) * 2;
            for (uint32_t k = 0; k < w->cols; k++)
                to[(size_t)(k / 2) * BLOCK * 2 + k % 2] =
                    loci_f32_to_bf16(element(data, job->dtype, at + k));
        }
    }
    if (count > 0) pack_pairs(w, pairs, count, (uint32_t *)w->packed + block * w->block_elements);
}

/* Columns of the product that the block from `column` on holds, with and without padding. */
static uint32_t columns_at(const loci_weight *w, uint32_t column, bool padded) {
    uint32_t left = w->rows - column;
    if (left >= WIDE_COLUMNS) return WIDE_COLUMNS;
    return padded ? (left + BLOCK - 1) / BLOCK * BLOCK : left;
}

static void choose_kernels(loci_cpu *cpu, loci_weight *w) {
    uint32_t wide = w->rows / WIDE_COLUMNS * WIDE_COLUMNS;
    if (!cpu->dnnl) return;
    if (wide > 0)
        w->wide =
            loci_dnnl_matmul_get(cpu->dnnl, TILE_ROWS, WIDE_COLUMNS, w->cols_padded, w->precision);
    if (wide < w->rows)
        w->rest = loci_dnnl_matmul_get(cpu->dnnl, TILE_ROWS, columns_at(w, wide, true),
                                       w->cols_padded, w->precision);
    if ((wide > 0 && !w->wide) || (wide < w->rows && !w->rest)) w->wide = w->rest = NULL;
}

static loci_status make_weight(loci_cpu *cpu, const uint32_t *rows, uint32_t parts, uint32_t cols,
                               loci_dtype precision, loci_weight **out, loci_error *err) {
    *out = NULL;
    uint64_t total = 0;
    for (uint32_t i = 0; i < parts; i++) total += rows[i];
    if (total == 0 || cols == 0 || total > INT32_MAX || cols > INT32_MAX)
        return loci_fail(err, LOCI_E_INVAL, "a weight of %llu x %u cannot be packed",
                         (unsigned long long)total, cols);
    loci_weight *w = calloc(1, sizeof *w);
    if (!w) return loci_fail(err, LOCI_E_NOMEM, "no memory for a weight");
    w->rows = (uint32_t)total;
    w->cols = cols;
    w->precision = precision;
    w->blocks = (w->rows + BLOCK - 1) / BLOCK;
    uint32_t halves = (cols + 1) / 2;
    w->steps = precision == LOCI_F32 ? cols : halves;
    uint32_t steps_padded = (w->steps + 15) / 16 * 16;
    w->cols_padded = precision == LOCI_F32 ? steps_padded : 2 * steps_padded;
    w->block_elements = (size_t)steps_padded * BLOCK;
    choose_kernels(cpu, w);
    *out = w;
    return LOCI_OK;
}

loci_status loci_cpu_weight_create(loci_backend *self, const void *const *data,
                                   const uint32_t *rows, uint32_t parts, uint32_t cols,
                                   loci_dtype dtype, loci_dtype precision, loci_weight **out,
                                   loci_error *err) {
    loci_cpu *cpu = self->ctx;
    loci_weight *w;
    *out = NULL;
    if (dtype == LOCI_I32 || (precision != LOCI_F32 && precision != LOCI_BF16))
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "weights are packed from f32, bf16 or f16 to f32 or bf16");
    LOCI_TRY(make_weight(cpu, rows, parts, cols, precision, &w, err));
    size_t bytes = w->blocks * w->block_elements * sizeof(uint32_t);
    w->packed = aligned_alloc(64, bytes);
    if (!w->packed) {
        free(w);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for a packed weight of %zu bytes", bytes);
    }
    memset(w->packed, 0, bytes);
    pack_job job = {data, rows, parts, dtype, w};
    loci_pool_run(cpu->pool, w->blocks, pack_block, &job);
    *out = w;
    return LOCI_OK;
}

loci_status loci_cpu_weight_map(loci_backend *self, const void *const *data, const uint32_t *rows,
                                uint32_t parts, uint32_t cols, loci_weight **out, loci_error *err) {
    *out = NULL;
    if (parts > PARTS_MAX || cols % 2 != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "a weight of %u parts and %u columns is not mapped", parts, cols);
    LOCI_TRY(make_weight(self->ctx, rows, parts, cols, LOCI_BF16, out, err));
    for (uint32_t i = 0; i < parts; i++) {
        (*out)->mapped[i] = data[i];
        (*out)->mapped_rows[i] = rows[i];
    }
    return LOCI_OK;
}

void loci_cpu_weight_free(loci_backend *self, loci_weight *weight) {
    (void)self;
    if (!weight) return;
    free(weight->packed);
    free(weight);
}

typedef struct gemm_run {
    loci_stream *stream;
    const loci_weight *weight;
    const float *x;
    float *y;
    uint32_t rows;
    bool accumulate;
    const void *own_x; /* x as our kernels take it */
    size_t own_stride;
    uint32_t group_rows;   /* rows of a oneDNN task, a multiple of TILE_ROWS */
    uint32_t column_tasks; /* 1: a task runs all columns; else as many as blocks of columns */
    _Atomic bool failed;
} gemm_run;

static void own_block(void *arg, size_t block, unsigned thread) {
    (void)thread;
    const gemm_run *run = arg;
    const loci_weight *w = run->weight;
    uint32_t column = (uint32_t)block * BLOCK;
    loci_gemm_job job = {
        .x = run->own_x,
        .x_stride = run->own_stride,
        .w = (const uint32_t *)w->packed + block * w->block_elements,
        .steps = w->steps,
        .y = run->y + column,
        .y_stride = w->rows,
        .rows = run->rows,
        .columns = w->rows - column < BLOCK ? w->rows - column : BLOCK,
        .accumulate = run->accumulate,
    };
    const loci_cpu_kernels *kernels = run->stream->cpu->kernels;
    (w->precision == LOCI_F32 ? kernels->gemm_f32 : kernels->gemm_bf16)(&job);
}

typedef struct pairs_job {
    const gemm_run *run;
    uint32_t *pairs; /* [rows][steps] */
} pairs_job;

static void to_pairs(void *arg, uint32_t begin, uint32_t end) {
    const pairs_job *job = arg;
    const loci_weight *w = job->run->weight;
    for (uint32_t r = begin; r < end; r++) {
        uint16_t *to = (uint16_t *)(job->pairs + (size_t)r * w->steps);
        job->run->stream->cpu->kernels->to_bf16(to, job->run->x + (size_t)r * w->cols, w->cols);
        if (w->cols % 2) to[w->cols] = 0;
    }
}

static void run_own(gemm_run *run) {
    const loci_weight *w = run->weight;
    run->own_x = run->x;
    run->own_stride = w->cols;
    if (w->precision == LOCI_BF16) {
        size_t bytes = (size_t)run->rows * w->steps * sizeof(uint32_t);
        pairs_job job = {run, loci_cpu_scratch_get(&run->stream->scratch, bytes)};
        if (!job.pairs) {
            run->failed = true;
            return;
        }
        loci_cpu_for_rows(run->stream, run->rows, w->cols, to_pairs, &job);
        run->own_x = job.pairs;
        run->own_stride = w->steps;
    }
    loci_pool_run(run->stream->cpu->pool, w->blocks, own_block, run);
}

/* Rows of x in the weight's precision, filled up with zeros to cols_padded and whole tiles. */
static void prepare_x(const gemm_run *run, uint32_t begin, uint32_t rows, uint32_t rows_padded,
                      uint8_t *dst) {
    const loci_weight *w = run->weight;
    bool bf16 = w->precision == LOCI_BF16;
    size_t size = bf16 ? sizeof(uint16_t) : sizeof(float);
    size_t used = w->cols * size, all = w->cols_padded * size;
    for (uint32_t r = 0; r < rows; r++, dst += all) {
        const float *from = run->x + (size_t)(begin + r) * w->cols;
        if (bf16)
            run->stream->cpu->kernels->to_bf16((uint16_t *)(void *)dst, from, w->cols);
        else
            memcpy(dst, from, used);
        memset(dst + used, 0, all - used);
    }
    memset(dst, 0, (rows_padded - rows) * all);
}

static void put_tile(const gemm_run *run, uint32_t row, uint32_t rows, uint32_t column,
                     const float *tile) {
    const loci_weight *w = run->weight;
    uint32_t columns = columns_at(w, column, false), stride = columns_at(w, column, true);
    float *y = run->y + (size_t)row * w->rows + column;
    for (uint32_t r = 0; r < rows; r++, y += w->rows, tile += stride) {
        if (run->accumulate)
            for (uint32_t c = 0; c < columns; c++) y[c] += tile[c];
        else
            memcpy(y, tile, columns * sizeof *y);
    }
}

/* Rows [begin, begin + rows) under the columns from `column` on. */
static bool run_columns(const gemm_run *run, uint32_t begin, uint32_t rows, uint32_t column,
                        const uint8_t *x, const void *packed, float *tile, unsigned thread) {
    const loci_weight *w = run->weight;
    const loci_dnnl_matmul *matmul = w->rows - column >= WIDE_COLUMNS ? w->wide : w->rest;
    size_t size = w->precision == LOCI_BF16 ? sizeof(uint16_t) : sizeof(float);
    for (uint32_t r = 0; r < rows; r += TILE_ROWS, x += TILE_ROWS * w->cols_padded * size) {
        if (!loci_dnnl_run(run->stream->cpu->dnnl, matmul, thread, x, packed, tile,
                           tile + TILE_ROWS * WIDE_COLUMNS))
            return false;
        put_tile(run, begin + r, rows - r < TILE_ROWS ? rows - r : TILE_ROWS, column, tile);
    }
    return true;
}

/* Of a tile of results and what oneDNN needs beside. */
static size_t tile_bytes_of(const loci_weight *w) {
    size_t extra = w->wide ? loci_dnnl_scratch_bytes(w->wide) : 0;
    if (w->rest && loci_dnnl_scratch_bytes(w->rest) > extra)
        extra = loci_dnnl_scratch_bytes(w->rest);
    return TILE_ROWS * WIDE_COLUMNS * sizeof(float) + (extra + 63) / 64 * 64;
}

static void dnnl_task(void *arg, size_t index, unsigned thread) {
    gemm_run *run = arg;
    const loci_weight *w = run->weight;
    uint32_t begin = (uint32_t)(index / run->column_tasks) * run->group_rows;
    uint32_t rows = run->rows - begin < run->group_rows ? run->rows - begin : run->group_rows;
    uint32_t padded = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    size_t tile_bytes = tile_bytes_of(w);
    uint8_t *scratch =
        loci_cpu_scratch_get(&run->stream->cpu->thread_scratch[thread],
                             tile_bytes + (size_t)padded * w->cols_padded * sizeof(float));
    if (!scratch) {
        run->failed = true;
        return;
    }
    float *tile = (float *)(void *)scratch;
    uint8_t *x = scratch + tile_bytes;
    prepare_x(run, begin, rows, padded, x);
    uint32_t first = 0, last = w->rows;
    if (run->column_tasks > 1) {
        first = (uint32_t)(index % run->column_tasks) * WIDE_COLUMNS;
        last = first + 1;
    }
    for (uint32_t column = first; column < last; column += WIDE_COLUMNS) {
        const void *packed = (const uint32_t *)w->packed + column / BLOCK * w->block_elements;
        if (!run_columns(run, begin, rows, column, x, packed, tile, thread)) run->failed = true;
    }
}

/* Cuts the work in about two tasks for each thread or more: by groups of tiles while they
 * suffice, else also by columns. Results do not depend on it. */
static void run_dnnl(gemm_run *run) {
    loci_pool *pool = run->stream->cpu->pool;
    uint32_t wanted = 2 * loci_pool_threads(pool), tiles = (run->rows + TILE_ROWS - 1) / TILE_ROWS;
    uint32_t group = GROUP_TILES_MAX;
    while (group > 1 && (tiles + group - 1) / group < wanted) group /= 2;
    uint32_t groups = (tiles + group - 1) / group;
    run->group_rows = group * TILE_ROWS;
    run->column_tasks = 1;
    if (groups < wanted) run->column_tasks = (run->weight->rows + WIDE_COLUMNS - 1) / WIDE_COLUMNS;
    loci_pool_run(pool, (size_t)groups * run->column_tasks, dnnl_task, run);
}

/* --- mapped weights -------------------------------------------------------------------- */

typedef struct mapped_run {
    gemm_run run;
    uint32_t begin, rows; /* of x: the group under way */
    uint16_t *x;          /* [rows, filled up to tiles][cols_padded] */
} mapped_run;

/* Few rows by one block of the weight in place. */
static void in_place_block(void *arg, size_t block, unsigned thread) {
    (void)thread;
    const mapped_run *mapped = arg;
    const gemm_run *run = &mapped->run;
    const loci_weight *w = run->weight;
    uint32_t row = (uint32_t)block * BLOCK, end = w->rows - row < BLOCK ? w->rows : row + BLOCK;
    for (uint32_t first = 0, part = 0; row < end; first += w->mapped_rows[part++]) {
        uint32_t part_end = first + w->mapped_rows[part];
        if (row >= part_end) continue;
        uint32_t count = (end < part_end ? end : part_end) - row;
        loci_gemm_rows_job job = {
            .x = mapped->x,
            .w = mapped_row(w, row),
            .x_stride = w->cols_padded,
            .cols = w->cols,
            .y = run->y + row,
            .y_stride = w->rows,
            .rows = mapped->rows,
            .count = count,
            .accumulate = run->accumulate,
        };
        run->stream->cpu->kernels->gemm_rows(&job);
        row += count;
    }
}

/* Packs WIDE_COLUMNS columns, and multiplies all rows of the group. */
static void packing_task(void *arg, size_t index, unsigned thread) {
    mapped_run *mapped = arg;
    gemm_run *run = &mapped->run;
    const loci_weight *w = run->weight;
    uint32_t column = (uint32_t)index * WIDE_COLUMNS, block = column / BLOCK;
    uint32_t blocks =
        w->blocks - block < WIDE_COLUMNS / BLOCK ? w->blocks - block : WIDE_COLUMNS / BLOCK;
    size_t tile_bytes = tile_bytes_of(w);
    uint8_t *scratch = loci_cpu_scratch_get(&run->stream->cpu->thread_scratch[thread],
                                            tile_bytes + blocks * w->block_elements * 4);
    if (!scratch) {
        run->failed = true;
        return;
    }
    uint32_t *packed = (uint32_t *)(void *)(scratch + tile_bytes);
    for (uint32_t b = 0; b < blocks; b++) pack_mapped(w, block + b, packed + b * w->block_elements);
    if (w->wide || w->rest) {
        if (!run_columns(run, mapped->begin, mapped->rows, column, (const uint8_t *)mapped->x,
                         packed, (float *)(void *)scratch, thread))
            run->failed = true;
        return;
    }
    for (uint32_t b = 0; b < blocks; b++) {
        uint32_t at = column + b * BLOCK;
        loci_gemm_job job = {
            .x = mapped->x,
            .x_stride = w->cols_padded / 2,
            .w = packed + b * w->block_elements,
            .steps = w->steps,
            .y = run->y + (size_t)mapped->begin * w->rows + at,
            .y_stride = w->rows,
            .rows = mapped->rows,
            .columns = w->rows - at < BLOCK ? w->rows - at : BLOCK,
            .accumulate = run->accumulate,
        };
        run->stream->cpu->kernels->gemm_bf16(&job);
    }
}

static void mapped_x(void *arg, uint32_t begin, uint32_t end) {
    const mapped_run *mapped = arg;
    uint8_t *to = (uint8_t *)(mapped->x + (size_t)begin * mapped->run.weight->cols_padded);
    prepare_x(&mapped->run, mapped->begin + begin, end - begin, end - begin, to);
}

/* Rows in groups, whose x is prepared once for all tasks. */
static void run_mapped(gemm_run *run) {
    const loci_weight *w = run->weight;
    loci_pool *pool = run->stream->cpu->pool;
    uint32_t most = GROUP_TILES_MAX * TILE_ROWS;
    uint32_t padded = run->rows < most ? (run->rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : most;
    size_t bytes = (size_t)padded * w->cols_padded * sizeof(uint16_t);
    mapped_run mapped = {.run = *run, .x = loci_cpu_scratch_get(&run->stream->scratch, bytes)};
    if (!mapped.x) {
        run->failed = true;
        return;
    }
    for (; mapped.begin < run->rows; mapped.begin += most) {
        uint32_t left = run->rows - mapped.begin;
        mapped.rows = left < most ? left : most;
        loci_cpu_for_rows(run->stream, mapped.rows, w->cols, mapped_x, &mapped);
        size_t used = (size_t)mapped.rows * w->cols_padded * sizeof(uint16_t);
        memset((uint8_t *)mapped.x + used, 0, bytes - used);
        if (run->rows <= FEW_ROWS)
            loci_pool_run(pool, w->blocks, in_place_block, &mapped);
        else
            loci_pool_run(pool, (w->rows + WIDE_COLUMNS - 1) / WIDE_COLUMNS, packing_task, &mapped);
    }
    if (mapped.run.failed) run->failed = true;
}

void loci_cpu_gemm(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows,
                   const loci_weight *weight, bool accumulate) {
    if (rows == 0) return;
    const loci_weight *w = weight;
    gemm_run run = {
        .stream = stream,
        .weight = w,
        .x = loci_cpu_ptr(x, (size_t)rows * w->cols * sizeof(float)),
        .y = loci_cpu_ptr(y, (size_t)rows * w->rows * sizeof(float)),
        .rows = rows,
        .accumulate = accumulate,
    };
    if (!w->packed)
        run_mapped(&run);
    else if (rows > FEW_ROWS && (w->wide || w->rest))
        run_dnnl(&run);
    else
        run_own(&run);
    if (run.failed)
        loci_cpu_fail(stream, LOCI_E_INTERNAL, "a matrix product of %u x %u x %u failed", rows,
                      w->rows, w->cols);
}

void loci_cpu_embed(loci_stream *stream, loci_ref y, const loci_weight *table, loci_ref ids,
                    uint32_t rows) {
    const loci_weight *w = table;
    float *to = loci_cpu_ptr(y, (size_t)rows * w->cols * sizeof(float));
    const int32_t *id = loci_cpu_ptr(ids, rows * sizeof(int32_t));
    for (uint32_t r = 0; r < rows; r++, to += w->cols) {
        if (id[r] < 0 || (uint32_t)id[r] >= w->rows) {
            loci_cpu_fail(stream, LOCI_E_INVAL, "token id %d is outside the table of %u rows",
                          id[r], w->rows);
            return;
        }
        uint32_t row = (uint32_t)id[r];
        if (!w->packed) {
            const uint16_t *from = mapped_row(w, row);
            for (uint32_t k = 0; k < w->cols; k++) to[k] = loci_bf16_to_f32(from[k]);
            continue;
        }
        size_t at = row / BLOCK * w->block_elements + row % BLOCK;
        for (uint32_t k = 0; k < w->cols; k++) {
            if (w->precision == LOCI_F32)
                to[k] = ((const float *)w->packed)[at + (size_t)k * BLOCK];
            else
                to[k] = loci_bf16_to_f32(
                    ((const uint16_t *)w->packed)[(at + (size_t)(k / 2) * BLOCK) * 2 + k % 2]);
        }
    }
}
