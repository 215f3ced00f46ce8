/* SPDX-License-Identifier: Apache-2.0
 *
 * Online-softmax attention whose products round both factors to bf16 (VDPBF16PS), for many packed
 * query rows; included by kernels_avx512.c after gemm_body.h.
 *
 * Everything lies transposed, a query row in each lane: logits^T [key][row] is a product with the
 * keys as they are stored, out^T [d][row] one with the values of two neighbouring keys side by
 * side, and the softmax runs over the keys lane by lane. As in dense_body.h, tiles begin at
 * multiples of LOCI_DENSE_KEYS and a masked key adds an exact zero: a row's result does not depend
 * on the rows beside it.
 */
#include "attention/cpu/kernels.h"

#define DP_VECTORS ((int)LOCI_DENSE_DP_ROWS / VW)
#define DP_STEPS 6 /* rows of x at once: with DP_VECTORS vectors each they fill the registers */

/* The parts of job->work. */
typedef struct dp_work {
    uint32_t *q;   /* [dim / 2][rows], pairs along dim */
    float *out;    /* [dim][rows] */
    float *logits; /* [keys][rows] */
    uint32_t *p;   /* [keys / 2][rows], pairs along keys */
    uint16_t *k;   /* [keys][dim] */
    uint32_t *v;   /* [keys / 2][dim], pairs along keys */
} dp_work;

static dp_work dp_parts(const loci_dense_job *job) {
    size_t dim = job->head_dim;
    dp_work w = {.q = (uint32_t *)(void *)job->work};
    w.out = (float *)(void *)(w.q + dim / 2 * LOCI_DENSE_DP_ROWS);
    w.logits = w.out + dim * LOCI_DENSE_DP_ROWS;
    w.p = (uint32_t *)(void *)(w.logits + LOCI_DENSE_KEYS * LOCI_DENSE_DP_ROWS);
    w.v = w.p + LOCI_DENSE_KEYS / 2 * LOCI_DENSE_DP_ROWS;
    w.k = (uint16_t *)(void *)(w.v + LOCI_DENSE_KEYS / 2 * dim);
    return w;
}

/* sum[r][v] += x[r] . w over the steps, x being pairs broadcast to all lanes. */
VINLINE void dp_sums(__m512 sum[DP_STEPS][DP_VECTORS], const uint8_t *x, size_t row_bytes,
                     size_t step_bytes, const uint32_t *w, uint32_t steps, int rows) {
    for (uint32_t s = 0; s < steps; s++, w += LOCI_DENSE_DP_ROWS, x += step_bytes) {
        __m512bh b[DP_VECTORS];
        for (int v = 0; v < DP_VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(w + v * VW);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + (size_t)r * row_bytes, sizeof pair);
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < DP_VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], b[v], a);
        }
    }
}

VINLINE void dp_logits(float *logits, const uint8_t *k, size_t stride, const uint32_t *q,
                       uint32_t steps, int keys) {
    __m512 sum[DP_STEPS][DP_VECTORS];
    for (int r = 0; r < keys; r++)
        for (int v = 0; v < DP_VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
    dp_sums(sum, k, stride, sizeof(uint32_t), q, steps, keys);
    for (int r = 0; r < keys; r++)
        for (int v = 0; v < DP_VECTORS; v++)
            v_store(logits + r * (int)LOCI_DENSE_DP_ROWS + v * VW, sum[r][v]);
}

/* out = out * keep + the tile's part, for `dims` dimensions. */
VINLINE void dp_values(float *out, const vf *keep, const uint32_t *v_pairs, uint32_t dim,
                       const uint32_t *p, uint32_t steps, int dims) {
    __m512 sum[DP_STEPS][DP_VECTORS];
    for (int r = 0; r < dims; r++)
        for (int v = 0; v < DP_VECTORS; v++)
            sum[r][v] = v_mul(keep[v], v_load(out + r * (int)LOCI_DENSE_DP_ROWS + v * VW));
    dp_sums(sum, (const uint8_t *)v_pairs, sizeof(uint32_t), dim * sizeof(uint32_t), p, steps,
            dims);
    for (int r = 0; r < dims; r++)
        for (int v = 0; v < DP_VECTORS; v++)
            v_store(out + r * (int)LOCI_DENSE_DP_ROWS + v * VW, sum[r][v]);
}

/* The pairs (a[i], b[i]) as bf16. */
VINLINE __m512i dp_interleave(vf a, vf b) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

VINLINE void dp_transpose(__m512i *rows) {
    __m512i t[VW];
    for (int i = 0; i < VW; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < VW; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < VW; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* Queries to pairs, a row a lane; rows that do not exist are zero. */
static void dp_pack_queries(const loci_dense_job *job, uint32_t *to) {
    uint32_t dim = job->head_dim;
    for (uint32_t d = 0; d < dim; d += 2 * VW) {
        uint32_t steps = dim - d < 2 * VW ? VW / 2 : VW;
        for (uint32_t begin = 0; begin < LOCI_DENSE_DP_ROWS; begin += VW) {
            __m512i rows[VW];
            for (uint32_t r = 0; r < VW; r++) {
                rows[r] = _mm512_setzero_si512();
                if (begin + r >= job->rows) continue;
                const float *q = job->q + (size_t)(begin + r) * dim + d;
                __m512 high = steps == VW ? _mm512_loadu_ps(q + VW) : _mm512_setzero_ps();
                rows[r] = (__m512i)_mm512_cvtne2ps_pbh(high, _mm512_loadu_ps(q));
            }
            dp_transpose(rows);
            for (uint32_t s = 0; s < steps; s++)
                _mm512_storeu_si512(to + (size_t)(d / 2 + s) * LOCI_DENSE_DP_ROWS + begin, rows[s]);
        }
    }
}

static void dp_put_out(const loci_dense_job *job, const float *from) {
    for (uint32_t d = 0; d < job->head_dim; d += VW) {
        for (uint32_t begin = 0; begin < job->rows; begin += VW) {
            __m512i rows[VW];
            for (uint32_t i = 0; i < VW; i++)
                rows[i] = _mm512_loadu_si512(from + (size_t)(d + i) * LOCI_DENSE_DP_ROWS + begin);
            dp_transpose(rows);
            for (uint32_t r = 0; r < VW && begin + r < job->rows; r++)
                _mm512_storeu_si512(job->out + (size_t)(begin + r) * job->head_dim + d, rows[r]);
        }
    }
}

VINLINE vf dp_load(const loci_dense_job *job, const void *from, size_t at) {
    return job->kv_dtype == LOCI_BF16 ? v_load_bf16((const uint16_t *)from + at)
                                      : v_load((const float *)from + at);
}

/* The tile's values in pairs of keys; a last key without neighbour gets a zero. */
static void dp_pack_values(const loci_dense_job *job, uint32_t begin, uint32_t count,
                           uint32_t *to) {
    for (uint32_t j = 0; j < count; j += 2, to += job->head_dim) {
        size_t at = (begin + j) * job->kv_stride;
        for (uint32_t d = 0; d < job->head_dim; d += VW) {
            vf next = j + 1 < count ? dp_load(job, job->v, at + job->kv_stride + d) : v_zero();
            _mm512_storeu_si512(to + d, dp_interleave(dp_load(job, job->v, at + d), next));
        }
    }
}

/* The tile's keys as bf16, in place if they are; *stride in bytes. */
static const uint8_t *dp_keys(const loci_dense_job *job, uint32_t begin, uint32_t count,
                              uint16_t *to, size_t *stride) {
    size_t at = begin * job->kv_stride, dim = job->head_dim;
    *stride = (job->kv_dtype == LOCI_BF16 ? job->kv_stride : dim) * sizeof(uint16_t);
    if (job->kv_dtype == LOCI_BF16) return (const uint8_t *)((const uint16_t *)job->k + at);
    for (uint32_t j = 0; j < count; j++, at += job->kv_stride)
        for (size_t d = 0; d < dim; d += VW)
            _mm256_storeu_si256(
                (__m256i *)(void *)(to + j * dim + d),
                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps((const float *)job->k + at + d)));
    return (const uint8_t *)to;
}

/* Keys that a row does not see get -INFINITY. */
static void dp_mask(const loci_dense_job *job, uint32_t begin, uint32_t count, float *logits) {
    for (int v = 0; v < DP_VECTORS; v++) {
        __m512i first = _mm512_loadu_si512(job->first + v * VW);
        __m512i last = _mm512_loadu_si512(job->last + v * VW);
        for (uint32_t j = 0; j < count; j++) {
            if (job->sink && begin + j == 0) continue;
            __m512i key = _mm512_set1_epi32((int)(begin + j));
            __mmask16 seen =
                _mm512_cmple_epu32_mask(first, key) & _mm512_cmplt_epu32_mask(key, last);
            float *at = logits + j * LOCI_DENSE_DP_ROWS + v * VW;
            v_store(at, _mm512_mask_mov_ps(v_set1(-INFINITY), seen, v_load(at)));
        }
    }
}

/* Logits become weights in bf16 pairs; keep: what sums so far are to be multiplied by. */
static void dp_softmax(const loci_dense_job *job, float *logits, uint32_t count, uint32_t *p,
                       vf *keep) {
    if (count % 2) {
        for (int v = 0; v < DP_VECTORS; v++)
            v_store(logits + count * LOCI_DENSE_DP_ROWS + v * VW, v_set1(-INFINITY));
    }
    for (int v = 0; v < DP_VECTORS; v++) {
        vf before = v_load(job->max + v * VW), top = before, sum = v_zero();
        const float *at = logits + v * VW;
        for (uint32_t j = 0; j < count; j++) top = v_max(top, v_load(at + j * LOCI_DENSE_DP_ROWS));
        /* Rows that have seen nothing yet: any finite shift leaves their weights zero. */
        __mmask16 none = _mm512_cmp_ps_mask(top, v_set1(-INFINITY), _CMP_EQ_OQ);
        vf shift = _mm512_mask_mov_ps(top, none, v_zero());
        keep[v] = v_exp(v_sub(before, shift));
        for (uint32_t j = 0; j < count; j += 2, at += 2 * LOCI_DENSE_DP_ROWS) {
            vf a = v_exp(v_sub(v_load(at), shift));
            vf b = v_exp(v_sub(v_load(at + LOCI_DENSE_DP_ROWS), shift));
            sum = v_add(sum, v_add(a, b));
            _mm512_storeu_si512(p + j / 2 * LOCI_DENSE_DP_ROWS + v * VW, dp_interleave(a, b));
        }
        v_store(job->max + v * VW, top);
        v_store(job->sum + v * VW, v_fma(v_load(job->sum + v * VW), keep[v], sum));
    }
}

static void dp_tile(const loci_dense_job *job, const dp_work *w, uint32_t begin, uint32_t count,
                    bool masked) {
    uint32_t dim = job->head_dim, steps = (count + 1) / 2;
    size_t stride;
    const uint8_t *k = dp_keys(job, begin, count, w->k, &stride);
    uint32_t j = 0;
    for (; j + DP_STEPS <= count; j += DP_STEPS)
        dp_logits(w->logits + j * LOCI_DENSE_DP_ROWS, k + j * stride, stride, w->q, dim / 2,
                  DP_STEPS);
    for (; j < count; j++)
        dp_logits(w->logits + j * LOCI_DENSE_DP_ROWS, k + j * stride, stride, w->q, dim / 2, 1);
    if (begin == 0 && job->sink)
        for (uint32_t r = 0; r < LOCI_DENSE_DP_ROWS; r++) w->logits[r] += job->first_bias;
    if (masked) dp_mask(job, begin, count, w->logits);
    vf keep[DP_VECTORS];
    dp_softmax(job, w->logits, count, w->p, keep);
    dp_pack_values(job, begin, count, w->v);
    uint32_t d = 0;
    for (; d + DP_STEPS <= dim; d += DP_STEPS)
        dp_values(w->out + d * LOCI_DENSE_DP_ROWS, keep, w->v + d, dim, w->p, steps, DP_STEPS);
    for (; d + 2 <= dim; d += 2)
        dp_values(w->out + d * LOCI_DENSE_DP_ROWS, keep, w->v + d, dim, w->p, steps, 2);
}

static void dense_dp(const loci_dense_job *job) {
    dp_work w = dp_parts(job);
    uint32_t all_from = 0, all_to = UINT32_MAX; /* keys that every row sees */
    for (uint32_t r = 0; r < job->rows; r++) {
        if (job->first[r] > all_from) all_from = job->first[r];
        if (job->last[r] < all_to) all_to = job->last[r];
    }
    dp_pack_queries(job, w.q);
    memset(w.out, 0, (size_t)job->head_dim * LOCI_DENSE_DP_ROWS * sizeof(float));
    uint32_t begin = job->sink ? 0 : job->key_begin / LOCI_DENSE_KEYS * LOCI_DENSE_KEYS;
    for (; begin < job->key_end; begin += LOCI_DENSE_KEYS) {
        if (job->sink && begin > 0 && begin + LOCI_DENSE_KEYS <= job->key_begin) continue;
        uint32_t left = job->key_end - begin;
        uint32_t count = left < LOCI_DENSE_KEYS ? left : LOCI_DENSE_KEYS;
        dp_tile(job, &w, begin, count, begin < all_from || begin + count > all_to);
    }
    dp_put_out(job, w.out);
}
