/* SPDX-License-Identifier: Apache-2.0
 *
 * Online-softmax attention of a few packed query rows over tiles of keys (FlashAttention-2,
 * arXiv 2307.08691, algorithm 1, without its split over heads). Included once by each
 * kernels_*.c, after vec.h. head_dim is a multiple of VW.
 *
 * Tiles begin at multiples of LOCI_DENSE_KEYS of the span's own keys, and a masked key adds an
 * exact zero, so a row's result does not depend on the rows beside it.
 */
#include "attention/cpu/kernels.h"
#include "attention/index_layout.h"

/* So few rows are not worth a tile of keys as floats: narrow values are widened as they are read.
 */
#define DENSE_FEW_ROWS 2u
#define DENSE_FEW_ROWS_I8 16u

typedef struct dense_tile {
    const void *k, *v;
    loci_dtype type;
    size_t stride;
    uint32_t begin, count;                                    /* keys of the span */
    float k_scale[LOCI_DENSE_KEYS], v_scale[LOCI_DENSE_KEYS]; /* of int8 */
} dense_tile;

VINLINE vf dense_read(const void *from, loci_dtype type, size_t at) {
    if (type == LOCI_I8) return v_load_i8((const int8_t *)from + at);
    return type == LOCI_BF16 ? v_load_bf16((const uint16_t *)from + at)
                             : v_load((const float *)from + at);
}

VINLINE size_t dense_size(loci_dtype type) {
    return type == LOCI_I8 ? sizeof(int8_t) : type == LOCI_BF16 ? sizeof(uint16_t) : sizeof(float);
}

VINLINE void dense_scales(const loci_dense_job *job, dense_tile *tile) {
    const int8_t *row = (const int8_t *)job->k + tile->begin * job->kv_stride + 2 * job->head_dim;
    uint32_t most[LOCI_DENSE_KEYS];
    for (uint32_t j = 0; j < tile->count; j++, row += job->kv_stride)
        memcpy(&most[j], row, sizeof most[j]);
    memset(most + tile->count, 0, (LOCI_DENSE_KEYS - tile->count) * sizeof *most);
    vf step = v_set1(LOCI_KV_STEP);
    for (uint32_t j = 0; j < LOCI_DENSE_KEYS; j += VW) {
        v_store(tile->k_scale + j, v_mul(v_pairs_even(most + j), step));
        v_store(tile->v_scale + j, v_mul(v_pairs_odd(most + j), step));
    }
}

/* One key and value as floats. */
VINLINE void dense_widen(const loci_dense_job *job, loci_dtype type, const dense_tile *tile,
                         uint32_t j) {
    uint32_t dim = job->head_dim;
    size_t at = (tile->begin + j) * job->kv_stride;
    float *k = job->k_tile + (size_t)j * dim, *v = job->v_tile + (size_t)j * dim;
    vf k_scale = v_set1(type == LOCI_I8 ? tile->k_scale[j] : 1.0f);
    vf v_scale = v_set1(type == LOCI_I8 ? tile->v_scale[j] : 1.0f);
    for (uint32_t i = 0; i < dim; i += VW) {
        vf a = dense_read(job->k, type, at + i), b = dense_read(job->v, type, at + i);
        v_store(k + i, type == LOCI_I8 ? v_mul(a, k_scale) : a);
        v_store(v + i, type == LOCI_I8 ? v_mul(b, v_scale) : b);
    }
}

/* The keys [begin, begin + count): a full tile in place when they are floats or rows are few, else
 * as floats, filled up with zeros. */
VINLINE void dense_load(const loci_dense_job *job, uint32_t begin, uint32_t count,
                        dense_tile *tile) {
    loci_dtype type = job->kv_dtype;
    tile->begin = begin;
    tile->count = count;
    if (type == LOCI_I8) dense_scales(job, tile);
    uint32_t few = type == LOCI_I8 ? DENSE_FEW_ROWS_I8 : DENSE_FEW_ROWS;
    if (count == LOCI_DENSE_KEYS && (type == LOCI_F32 || job->rows <= few)) {
        size_t bytes = begin * job->kv_stride * dense_size(type);
        tile->k = (const uint8_t *)job->k + bytes;
        tile->v = (const uint8_t *)job->v + bytes;
        tile->type = type;
        tile->stride = job->kv_stride;
        return;
    }
    tile->k = job->k_tile;
    tile->v = job->v_tile;
    tile->type = LOCI_F32;
    tile->stride = job->head_dim;
    for (uint32_t j = 0; j < count; j++) {
        if (type == LOCI_I8)
            dense_widen(job, LOCI_I8, tile, j);
        else if (type == LOCI_BF16)
            dense_widen(job, LOCI_BF16, tile, j);
        else
            dense_widen(job, LOCI_F32, tile, j);
    }
    size_t used = (size_t)count * job->head_dim, all = (size_t)LOCI_DENSE_KEYS * job->head_dim;
    memset(job->k_tile + used, 0, (all - used) * sizeof(float));
    memset(job->v_tile + used, 0, (all - used) * sizeof(float));
}

/* Its share of what is read next, of some keys of the tile. */
VINLINE void dense_ahead(const loci_dense_job *job, const dense_tile *tile, uint32_t j,
                         uint32_t count) {
    if (!job->ahead) return;
    size_t lines = job->ahead_bytes / 64, first = tile->begin + j;
    size_t end = lines * (first + count) / job->key_end;
    for (size_t at = lines * first / job->key_end; at < end; at++)
        __builtin_prefetch(job->ahead + 64 * at, 0, 2);
}

/* logits = q . k for all keys of the tile and `rows` rows: VW products at once, each with a vector
 * of partial sums, which are then added across in one go. */
VINLINE void dense_logits(const loci_dense_job *job, const dense_tile *tile, loci_dtype type,
                          uint32_t row, int rows) {
    const int keys = VW / rows;
    const uint32_t dim = job->head_dim;
    const float *q = job->q + (size_t)row * dim;
    float *logits = job->logits + (size_t)row * LOCI_DENSE_KEYS, dot[VW];
    for (uint32_t j = 0; j < LOCI_DENSE_KEYS && j < tile->count; j += (uint32_t)keys) {
        vf sum[VW];
        size_t at = (size_t)j * tile->stride;
        if (row == 0) dense_ahead(job, tile, j, (uint32_t)keys);
        for (int i = 0; i < VW; i++) sum[i] = v_zero();
        for (uint32_t d = 0; d < dim; d += VW)
            for (int i = 0; i < keys; i++) {
                vf k = dense_read(tile->k, type, at + (size_t)i * tile->stride + d);
                for (int r = 0; r < rows; r++)
                    sum[r * keys + i] =
                        v_fma(v_load(q + (size_t)r * dim + d), k, sum[r * keys + i]);
            }
        v_store(dot, v_sum_rows(sum));
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < keys; i++) {
                float scale = type == LOCI_I8 ? tile->k_scale[j + (uint32_t)i] : 1.0f;
                logits[(uint32_t)r * LOCI_DENSE_KEYS + j + (uint32_t)i] = dot[r * keys + i] * scale;
            }
    }
}

/* Masks one row of logits, turns it into weights relative to the new maximum and rescales what
 * was summed before. */
VINLINE void dense_softmax(const loci_dense_job *job, const dense_tile *tile, uint32_t row,
                           float *logits) {
    uint32_t first = job->first[row], last = job->last[row];
    uint32_t begin = first > tile->begin ? first - tile->begin : 0;
    uint32_t end = last > tile->begin ? last - tile->begin : 0;
    if (end > tile->count) end = tile->count;
    if (begin > end) begin = end;
    bool has_first = tile->begin == 0 && tile->count > 0;
    float first_logit = logits[0] + job->first_bias;
    for (uint32_t j = 0; j < begin; j++) logits[j] = -INFINITY;
    for (uint32_t j = end; j < LOCI_DENSE_KEYS; j++) logits[j] = -INFINITY;
    if (has_first && (job->sink || (begin == 0 && end > 0))) logits[0] = first_logit;

    vf top = v_set1(-INFINITY);
    for (uint32_t j = 0; j < LOCI_DENSE_KEYS; j += VW) top = v_max(top, v_load(logits + j));
    float before = job->max[row], max = v_reduce_max(top);
    if (max < before) max = before;
    if (max == -INFINITY) {
        memset(logits, 0, LOCI_DENSE_KEYS * sizeof *logits);
        return;
    }
    vf sum = v_zero(), shift = v_set1(max);
    for (uint32_t j = 0; j < LOCI_DENSE_KEYS; j += VW) {
        vf weight = v_exp(v_sub(v_load(logits + j), shift));
        v_store(logits + j, weight);
        sum = v_add(sum, weight);
    }
    float tile_sum = v_reduce_add(sum);
    if (max > before) {
        float shrink = before == -INFINITY ? 0.0f : expf(before - max);
        float *out = job->out + (size_t)row * job->head_dim;
        for (uint32_t d = 0; d < job->head_dim; d += VW)
            v_store(out + d, v_mul(v_load(out + d), v_set1(shrink)));
        job->sum[row] *= shrink;
        job->max[row] = max;
    }
    job->sum[row] += tile_sum;
}

/* out[rows] += weights . v over the tile's keys, for `rows` rows and `vectors` vectors. */
VINLINE void dense_values(const loci_dense_job *job, const dense_tile *tile, loci_dtype type,
                          uint32_t row, uint32_t d, int rows, int vectors) {
    vf sum[4][4];
    float *out = job->out + (size_t)row * job->head_dim + d;
    const float *weight = job->logits + (size_t)row * LOCI_DENSE_KEYS;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = v_load(out + (size_t)r * job->head_dim + v * VW);
    size_t at = d;
    for (uint32_t j = 0; j < tile->count; j++, at += tile->stride) {
        vf value[4];
        for (int v = 0; v < vectors; v++) value[v] = dense_read(tile->v, type, at + (size_t)v * VW);
        for (int r = 0; r < rows; r++) {
            vf a = v_set1(weight[(size_t)r * LOCI_DENSE_KEYS + j]);
            for (int v = 0; v < vectors; v++) sum[r][v] = v_fma(a, value[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            v_store(out + (size_t)r * job->head_dim + v * VW, sum[r][v]);
}

/* Four rows by two vectors keep enough sums going; fewer rows take more vectors. */
VINLINE void dense_values_rows(const loci_dense_job *job, const dense_tile *tile, loci_dtype type,
                               uint32_t row, int rows) {
    uint32_t d = 0;
    for (; rows < 4 && d + 4 * VW <= job->head_dim; d += 4 * VW)
        dense_values(job, tile, type, row, d, rows, 4);
    for (; d + 2 * VW <= job->head_dim; d += 2 * VW) dense_values(job, tile, type, row, d, rows, 2);
    for (; d < job->head_dim; d += VW) dense_values(job, tile, type, row, d, rows, 1);
}

VINLINE void dense_keep(const loci_dense_job *job, const dense_tile *tile, uint32_t row,
                        const float *weights) {
    uint32_t tiles = (job->key_end + LOCI_DENSE_KEYS - 1) / LOCI_DENSE_KEYS;
    memcpy(job->keep + (size_t)row * job->key_end + tile->begin, weights,
           tile->count * sizeof *weights);
    job->keep_max[row * tiles + tile->begin / LOCI_DENSE_KEYS] = job->max[row];
}

VINLINE void dense_tile_rows(const loci_dense_job *job, const dense_tile *tile, loci_dtype type) {
    uint32_t row = 0;
#if VW > 1
    for (; row + 2 <= job->rows; row += 2) dense_logits(job, tile, type, row, 2);
#endif
    for (; row < job->rows; row++) dense_logits(job, tile, type, row, 1);
    for (row = 0; row < job->rows; row++) {
        float *logits = job->logits + (size_t)row * LOCI_DENSE_KEYS;
        dense_softmax(job, tile, row, logits);
        if (job->keep) dense_keep(job, tile, row, logits);
        for (uint32_t j = 0; type == LOCI_I8 && j < LOCI_DENSE_KEYS; j += VW)
            v_store(logits + j, v_mul(v_load(logits + j), v_load(tile->v_scale + j)));
    }
    row = 0;
    for (; row + 4 <= job->rows; row += 4) dense_values_rows(job, tile, type, row, 4);
    for (; row + 2 <= job->rows; row += 2) dense_values_rows(job, tile, type, row, 2);
    for (; row < job->rows; row++) dense_values_rows(job, tile, type, row, 1);
}

static void dense(const loci_dense_job *job) {
    uint32_t begin = job->key_begin / LOCI_DENSE_KEYS * LOCI_DENSE_KEYS;
    dense_tile tile;
    if (job->sink) begin = 0;
    for (; begin < job->key_end; begin += LOCI_DENSE_KEYS) {
        if (job->sink && begin > 0 && begin + LOCI_DENSE_KEYS <= job->key_begin) continue;
        uint32_t left = job->key_end - begin;
        dense_load(job, begin, left < LOCI_DENSE_KEYS ? left : LOCI_DENSE_KEYS, &tile);
        if (tile.type == LOCI_I8)
            dense_tile_rows(job, &tile, LOCI_I8);
        else if (tile.type == LOCI_BF16)
            dense_tile_rows(job, &tile, LOCI_BF16);
        else
            dense_tile_rows(job, &tile, LOCI_F32);
    }
}
