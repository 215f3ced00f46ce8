/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels of corpus_kernels.h for AVX-512 with VNNI. Entered only after isa.c found it.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"
#include "attention/cpu/corpus_kernels_body.h"
#include "attention/cpu/corpus_list_scores.h"

static inline __m512i broadcast4(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

/* Eight rows at a time: eight independent chains hide the latency of vpdpbusd. */
static inline void dot_rows(__m512i sum[8], const uint8_t *x, uint32_t dim, const int8_t *q) {
    for (int r = 0; r < 8; r++) sum[r] = _mm512_setzero_si512();
    for (uint32_t i = 0; i < dim; i += 4) {
        __m512i lanes = _mm512_loadu_si512((const void *)(q + (size_t)i * LOCI_LANES));
        for (int r = 0; r < 8; r++)
            sum[r] = _mm512_dpbusd_epi32(sum[r], broadcast4(x + (size_t)r * dim + i), lanes);
    }
}

static inline __m512i dot_row(const uint8_t *x, uint32_t dim, const int8_t *q) {
    __m512i sum = _mm512_setzero_si512();
    for (uint32_t i = 0; i < dim; i += 4) {
        __m512i lanes = _mm512_loadu_si512((const void *)(q + (size_t)i * LOCI_LANES));
        sum = _mm512_dpbusd_epi32(sum, broadcast4(x + i), lanes);
    }
    return sum;
}

static void dot_u8(int32_t *out, const uint8_t *x, uint32_t n, uint32_t dim, const int8_t *q) {
    uint32_t r = 0;
    for (; r + 8 <= n; r += 8) {
        __m512i sum[8];
        dot_rows(sum, x + (size_t)r * dim, dim, q);
        for (uint32_t j = 0; j < 8; j++)
            _mm512_storeu_si512((void *)(out + (size_t)(r + j) * LOCI_LANES), sum[j]);
    }
    for (; r < n; r++)
        _mm512_storeu_si512((void *)(out + (size_t)r * LOCI_LANES),
                            dot_row(x + (size_t)r * dim, dim, q));
}

/* The highest value, and among equals the lowest index. */
static inline void reduce_best(__m512i value, __m512i index, uint32_t *best, int32_t *best_dot) {
    int32_t top = _mm512_reduce_max_epi32(value);
    __mmask16 equal = _mm512_cmpeq_epi32_mask(value, _mm512_set1_epi32(top));
    *best = _mm512_mask_reduce_min_epu32(equal, index);
    *best_dot = top;
}

static void argmax_u8(uint32_t *best, int32_t *best_dot, const uint8_t *x, uint32_t n, uint32_t dim,
                      const int8_t *q, const int32_t *bias, uint32_t blocks) {
    const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (uint32_t r = 0; r < n; r += 8) {
        uint32_t rows = n - r < 8 ? n - r : 8;
        __m512i value[8], index[8];
        for (int j = 0; j < 8; j++) {
            value[j] = _mm512_set1_epi32(INT32_MIN);
            index[j] = _mm512_setzero_si512();
        }
        for (uint32_t b = 0; b < blocks; b++) {
            const int8_t *block = q + (size_t)b * LOCI_LANES * dim;
            __m512i add = _mm512_loadu_si512((const void *)(bias + (size_t)b * LOCI_LANES));
            __m512i lane = _mm512_add_epi32(iota, _mm512_set1_epi32((int32_t)(b * LOCI_LANES)));
            __m512i sum[8];
            if (rows == 8) {
                dot_rows(sum, x + (size_t)r * dim, dim, block);
            } else {
                for (uint32_t j = 0; j < 8; j++)
                    sum[j] = j < rows ? dot_row(x + (size_t)(r + j) * dim, dim, block)
                                      : _mm512_setzero_si512();
            }
            for (int j = 0; j < 8; j++) {
                __m512i total = _mm512_add_epi32(sum[j], add);
                __mmask16 better = _mm512_cmpgt_epi32_mask(total, value[j]);
                value[j] = _mm512_mask_mov_epi32(value[j], better, total);
                index[j] = _mm512_mask_mov_epi32(index[j], better, lane);
            }
        }
        for (uint32_t j = 0; j < rows; j++)
            reduce_best(value[j], index[j], &best[r + j], &best_dot[r + j]);
    }
}

static void unpack(uint8_t *out, const uint8_t *codes, size_t channels) {
    const __m256i low = _mm256_set1_epi8(15);
    size_t i = 0;
    for (; i + 32 <= channels; i += 32) {
        __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(codes + i / 2)));
        __m256i both = _mm256_or_si256(two, _mm256_slli_epi16(two, 4));
        _mm256_storeu_si256((void *)(out + i), _mm256_and_si256(both, low));
    }
    if (i < channels) body_unpack(out + i, codes + i / 2, channels - i);
}

static void dot_f32(float *out, const float *x, uint32_t n, uint32_t dim, const float *q) {
    uint32_t r = 0;
    for (; r + 8 <= n; r += 8) {
        const float *row = x + (size_t)r * dim;
        __m512 sum[8];
        for (int j = 0; j < 8; j++) sum[j] = _mm512_setzero_ps();
        for (uint32_t i = 0; i < dim; i++) {
            __m512 lanes = _mm512_loadu_ps(q + (size_t)i * LOCI_LANES);
            for (int j = 0; j < 8; j++)
                sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(row[(size_t)j * dim + i]), lanes, sum[j]);
        }
        for (uint32_t j = 0; j < 8; j++)
            _mm512_storeu_ps(out + (size_t)(r + j) * LOCI_LANES, sum[j]);
    }
    for (; r < n; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (uint32_t i = 0; i < dim; i++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(x[(size_t)r * dim + i]),
                                  _mm512_loadu_ps(q + (size_t)i * LOCI_LANES), sum);
        _mm512_storeu_ps(out + (size_t)r * LOCI_LANES, sum);
    }
}

static void add_values(float *o, float keep, const float *weight, const float *v, uint32_t n,
                       uint32_t dim) {
    for (uint32_t i = 0; i < dim; i += 16) {
        __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(o + i), _mm512_set1_ps(keep));
        for (uint32_t r = 0; r < n; r++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(weight[(size_t)r * LOCI_LANES]),
                                  _mm512_loadu_ps(v + (size_t)r * dim + i), sum);
        _mm512_storeu_ps(o + i, sum);
    }
}

/* Even and odd tokens of two parts, summed apart in 16 bits, to their order. */
static inline void store_tokens(uint16_t *out, __m256i even, __m256i odd) {
    __m128i e = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
    __m128i o = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256(odd, 1));
    _mm_storeu_si128((void *)out, _mm_unpacklo_epi16(e, o));
    _mm_storeu_si128((void *)(out + 8), _mm_unpackhi_epi16(e, o));
}

/* Two parts at a time: their tokens 0-15, then their tokens 16-31. In 16 bits, which wrap, sum
 * entries of even tokens plus 256 times those of odd ones, and the odd ones alone; the even ones
 * are what is left. count is a constant where this is inlined, so that the sums stay in
 * registers. */
static inline __attribute__((always_inline)) void sum_group(uint16_t *out, size_t stride,
                                                            const uint8_t *group, uint32_t parts,
                                                            const uint8_t *const *table,
                                                            uint32_t count) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i all[LOCI_SKETCH_VECTORS], odd[LOCI_SKETCH_VECTORS];
    for (uint32_t v = 0; v < count; v++) all[v] = odd[v] = _mm512_setzero_si512();
    for (uint32_t p = 0; p < parts; p += 2) {
        __m256i words = _mm256_loadu_si256((const void *)(group + p * 16));
        __m512i both =
            _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
        __m512i index = _mm512_and_si512(both, low);
        for (uint32_t v = 0; v < count; v++) {
            __m256i entries = _mm256_loadu_si256((const void *)(table[v] + p * 16));
            __m512i values = _mm512_shuffle_epi8(_mm512_broadcast_i64x4(entries), index);
            all[v] = _mm512_add_epi16(all[v], values);
            odd[v] = _mm512_add_epi16(odd[v], _mm512_srli_epi16(values, 8));
        }
    }
    for (uint32_t v = 0; v < count; v++, out += stride) {
        __m512i even = _mm512_sub_epi16(all[v], _mm512_slli_epi16(odd[v], 8));
        store_tokens(out, _mm512_castsi512_si256(even), _mm512_castsi512_si256(odd[v]));
        store_tokens(out + 16, _mm512_extracti64x4_epi64(even, 1),
                     _mm512_extracti64x4_epi64(odd[v], 1));
    }
}

static void sketch_table(loci_sketch_table *out, const float *q, const float *book,
                         uint32_t parts) {
    __m512 value[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS];
    float low[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS], widest = 0.0f;
    out->base = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        __m512 sum = _mm512_setzero_ps();
        for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++, q++, book += LOCI_SKETCH_WORDS)
            sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(*q), _mm512_loadu_ps(book)));
        float high = _mm512_reduce_max_ps(sum);
        value[p] = sum;
        low[p] = _mm512_reduce_min_ps(sum);
        widest = high - low[p] > widest ? high - low[p] : widest;
        out->base += low[p];
    }
    bool usable = body_table_scale(out, widest);
    const __m512 inverse = _mm512_set1_ps(usable ? 255.0f / widest : 0.0f);
    for (uint32_t p = 0; p < parts; p++) {
        __m512 steps = _mm512_mul_ps(_mm512_sub_ps(value[p], _mm512_set1_ps(low[p])), inverse);
        steps = _mm512_add_ps(steps, _mm512_set1_ps(0.5f));
        __mmask16 sane = _mm512_cmp_ps_mask(steps, _mm512_set1_ps(256.0f), _CMP_LT_OQ);
        __m512i whole = _mm512_maskz_cvttps_epi32(sane, steps);
        _mm_storeu_si128((void *)(out->entry + p * LOCI_SKETCH_WORDS), _mm512_cvtepi32_epi8(whole));
    }
}

static void sketch_sums(uint16_t *out, size_t stride, const uint8_t *sketches, uint32_t groups,
                        uint32_t parts, const uint8_t *const *table, uint32_t count) {
    body_sketch_sums(out, stride, sketches, groups, parts, table, count, sum_group);
}

/* 32 tokens at a time where there are so many, all in registers. */
static inline __attribute__((always_inline)) void nearest_some(uint8_t *word, const float *x,
                                                               size_t stride, const float *book,
                                                               const float *half_norm, int count) {
    __m512 row[LOCI_SKETCH_CHANNELS][2], best[2];
    __m512i at[2];
    for (int h = 0; h < count; h++) {
        best[h] = _mm512_set1_ps(-INFINITY);
        at[h] = _mm512_setzero_si512();
        for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++)
            row[c][h] = _mm512_loadu_ps(x + c * stride + 16 * h);
    }
    for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
        __m512i number = _mm512_set1_epi32((int)w);
        for (int h = 0; h < count; h++) {
            __m512 score = _mm512_set1_ps(-half_norm[w]);
            for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++) {
                __m512 of = _mm512_set1_ps(book[c * LOCI_SKETCH_WORDS + w]);
                score = _mm512_add_ps(score, _mm512_mul_ps(row[c][h], of));
            }
            __mmask16 better = _mm512_cmp_ps_mask(score, best[h], _CMP_GT_OQ);
            at[h] = _mm512_mask_mov_epi32(at[h], better, number);
            best[h] = _mm512_max_ps(score, best[h]);
        }
    }
    for (int h = 0; h < count; h++)
        _mm_storeu_si128((void *)(word + 16 * h), _mm512_cvtepi32_epi8(at[h]));
}

static void nearest_words(uint8_t *word, const float *x, size_t stride, uint32_t n,
                          const float *book, const float *half_norm) {
    uint32_t t = 0;
    for (; t + 32 <= n; t += 32) nearest_some(word + t, x + t, stride, book, half_norm, 2);
    if (t < n) nearest_some(word + t, x + t, stride, book, half_norm, 1);
}

static void masked_tops(uint16_t *out, const uint16_t *sum, size_t stride, uint32_t count,
                        uint32_t mask) {
    for (uint32_t v = 0; v < count; v++, sum += stride) {
        __m512i all = _mm512_maskz_loadu_epi16(mask, sum);
        __m256i half =
            _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        __m128i part =
            _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        __m128i least = _mm_minpos_epu16(_mm_xor_si128(part, _mm_set1_epi16(-1)));
        out[v] = (uint16_t)~_mm_extract_epi16(least, 0);
    }
}

static uint32_t reaching(const uint16_t *sum, size_t stride, const uint16_t *least,
                         uint32_t count) {
    uint32_t mask = 0;
    for (uint32_t v = 0; v < count; v++, sum += stride)
        mask |=
            _mm512_cmpge_epu16_mask(_mm512_loadu_si512(sum), _mm512_set1_epi16((short)least[v]));
    return mask;
}

static size_t list_reaching(uint32_t *out, uint32_t first, const uint16_t *sum, size_t stride,
                            uint32_t groups, const uint16_t *least, uint32_t count) {
    const __m512i sixteen = _mm512_set1_epi32(16);
    __m512i number =
        _mm512_add_epi32(_mm512_set1_epi32((int)first),
                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    size_t n = 0;
    for (uint32_t g = 0; g < groups; g++, sum += 32) {
        uint32_t mask = reaching(sum, stride, least, count);
        for (int half = 0; half < 2; half++, mask >>= 16) {
            __mmask16 some = (__mmask16)mask;
            _mm512_storeu_si512((void *)(out + n), _mm512_maskz_compress_epi32(some, number));
            n += (size_t)__builtin_popcount(some);
            number = _mm512_add_epi32(number, sixteen);
        }
    }
    return n;
}

static void shift_keys(uint16_t *key, size_t n, uint32_t times, uint16_t more, uint16_t less) {
    const __m512i factor = _mm512_set1_epi16((short)times);
    for (size_t i = 0; i < n; i += 32) {
        __m512i x = _mm512_loadu_si512((const void *)(key + i));
        if (times <= UINT16_MAX) x = _mm512_mulhi_epu16(x, factor);
        x = _mm512_adds_epu16(x, _mm512_set1_epi16((short)more));
        x = _mm512_subs_epu16(x, _mm512_set1_epi16((short)less));
        _mm512_storeu_si512((void *)(key + i), x);
    }
}

static size_t count_keys(const uint16_t *key, size_t n, uint16_t least) {
    const __m512i limit = _mm512_set1_epi16((short)least);
    size_t count = 0;
    for (size_t i = 0; i < n; i += 32) {
        __m512i x = _mm512_loadu_si512((const void *)(key + i));
        count += (size_t)__builtin_popcount(_mm512_cmpge_epu16_mask(x, limit));
    }
    return count;
}

const loci_corpus_kernels loci_corpus_kernels_avx512 = {
    .sketch_table = sketch_table,
    .nearest_words = nearest_words,
    .sketch_sums = sketch_sums,
    .masked_tops = masked_tops,
    .reaching = reaching,
    .list_reaching = list_reaching,
    .dot_u8 = dot_u8,
    .argmax_u8 = argmax_u8,
    .unpack = unpack,
    .node_scores = body_node_scores,
    .code_scores = body_code_scores,
    .list_scores = list_scores,
    .softmax_lanes = body_softmax_lanes,
    .shift_keys = shift_keys,
    .count_keys = count_keys,
    .hash = body_hash,
    .count_from = body_count_from,
    .exp_sub = body_exp_sub,
    .sum = body_sum,
    .max = body_max,
    .axpy = body_axpy,
    .widen = body_widen,
    .widen_i8 = body_widen_i8,
    .dot_f32 = dot_f32,
    .add_values = add_values,
};
#else
typedef int loci_corpus_avx512_unused;
#endif
