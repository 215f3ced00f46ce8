/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels of corpus_kernels.h for AVX2 and FMA. Entered only after isa.c found them.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"
#include "attention/cpu/corpus_kernels_body.h"
#include "attention/cpu/corpus_list_scores.h"

/* Adds to the eight lanes of *sum the products of four channels. vpmaddubsw would saturate for
 * values above 128, so both sides are widened to 16 bits: word pairs (0, 1) and (2, 3) apart. */
static inline __m256i dot_step(__m256i sum, __m256i x_even, __m256i x_odd, __m256i q_even,
                               __m256i q_odd) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x_even, q_even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x_odd, q_odd));
}

static inline void dot_block(__m256i sum[2], const uint8_t *x, uint32_t dim, const int8_t *q) {
    const __m256i low = _mm256_set1_epi16(255);
    sum[0] = sum[1] = _mm256_setzero_si256();
    for (uint32_t i = 0; i < dim; i += 4) {
        int32_t word;
        memcpy(&word, x + i, sizeof word);
        __m256i four = _mm256_set1_epi32(word);
        __m256i x_even = _mm256_and_si256(four, low); /* channels 0 and 2 */
        __m256i x_odd = _mm256_srli_epi16(four, 8);   /* channels 1 and 3 */
        for (int half = 0; half < 2; half++) {
            const int8_t *at = q + (size_t)i * LOCI_LANES + 32 * half;
            __m256i lanes = _mm256_loadu_si256((const void *)at);
            __m256i q_even = _mm256_srai_epi16(_mm256_slli_epi16(lanes, 8), 8);
            __m256i q_odd = _mm256_srai_epi16(lanes, 8);
            sum[half] = dot_step(sum[half], x_even, x_odd, q_even, q_odd);
        }
    }
}

/* Four rows at a time share the widening of q. */
static inline void dot_rows(__m256i sum[4][2], const uint8_t *x, uint32_t dim, const int8_t *q) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int r = 0; r < 4; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (uint32_t i = 0; i < dim; i += 4) {
        const int8_t *at = q + (size_t)i * LOCI_LANES;
        __m256i first = _mm256_loadu_si256((const void *)at);
        __m256i second = _mm256_loadu_si256((const void *)(at + 32));
        __m256i even[2] = {_mm256_srai_epi16(_mm256_slli_epi16(first, 8), 8),
                           _mm256_srai_epi16(_mm256_slli_epi16(second, 8), 8)};
        __m256i odd[2] = {_mm256_srai_epi16(first, 8), _mm256_srai_epi16(second, 8)};
        for (int r = 0; r < 4; r++) {
            int32_t word;
            memcpy(&word, x + (size_t)r * dim + i, sizeof word);
            __m256i four = _mm256_set1_epi32(word);
            __m256i x_even = _mm256_and_si256(four, low);
            __m256i x_odd = _mm256_srli_epi16(four, 8);
            sum[r][0] = dot_step(sum[r][0], x_even, x_odd, even[0], odd[0]);
            sum[r][1] = dot_step(sum[r][1], x_even, x_odd, even[1], odd[1]);
        }
    }
}

static void dot_u8(int32_t *out, const uint8_t *x, uint32_t n, uint32_t dim, const int8_t *q) {
    uint32_t r = 0;
    for (; r + 4 <= n; r += 4) {
        __m256i sum[4][2];
        dot_rows(sum, x + (size_t)r * dim, dim, q);
        for (uint32_t j = 0; j < 4; j++) {
            _mm256_storeu_si256((void *)(out + (size_t)(r + j) * LOCI_LANES), sum[j][0]);
            _mm256_storeu_si256((void *)(out + (size_t)(r + j) * LOCI_LANES + 8), sum[j][1]);
        }
    }
    for (; r < n; r++) {
        __m256i sum[2];
        dot_block(sum, x + (size_t)r * dim, dim, q);
        _mm256_storeu_si256((void *)(out + (size_t)r * LOCI_LANES), sum[0]);
        _mm256_storeu_si256((void *)(out + (size_t)r * LOCI_LANES + 8), sum[1]);
    }
}

static void argmax_u8(uint32_t *best, int32_t *best_dot, const uint8_t *x, uint32_t n, uint32_t dim,
                      const int8_t *q, const int32_t *bias, uint32_t blocks) {
    for (uint32_t r = 0; r < n; r += 4) {
        uint32_t rows = n - r < 4 ? n - r : 4;
        int32_t value[4][LOCI_LANES];
        uint32_t index[4][LOCI_LANES];
        for (uint32_t j = 0; j < 4; j++) {
            for (uint32_t l = 0; l < LOCI_LANES; l++) {
                value[j][l] = INT32_MIN;
                index[j][l] = 0;
            }
        }
        for (uint32_t b = 0; b < blocks; b++) {
            int32_t dot[4 * LOCI_LANES];
            dot_u8(dot, x + (size_t)r * dim, rows, dim, q + (size_t)b * LOCI_LANES * dim);
            for (uint32_t j = 0; j < rows; j++) {
                for (uint32_t l = 0; l < LOCI_LANES; l++) {
                    int32_t total = dot[j * LOCI_LANES + l] + bias[b * LOCI_LANES + l];
                    uint32_t lane = b * LOCI_LANES + l;
                    index[j][l] = total > value[j][l] ? lane : index[j][l];
                    value[j][l] = total > value[j][l] ? total : value[j][l];
                }
            }
        }
        for (uint32_t j = 0; j < rows; j++) {
            best[r + j] = index[j][0];
            best_dot[r + j] = value[j][0];
            for (uint32_t l = 1; l < LOCI_LANES; l++) {
                bool better = value[j][l] > best_dot[r + j] ||
                              (value[j][l] == best_dot[r + j] && index[j][l] < best[r + j]);
                if (!better) continue;
                best_dot[r + j] = value[j][l];
                best[r + j] = index[j][l];
            }
        }
    }
}

static void dot_f32(float *out, const float *x, uint32_t n, uint32_t dim, const float *q) {
    uint32_t r = 0;
    for (; r + 4 <= n; r += 4) {
        const float *row = x + (size_t)r * dim;
        __m256 sum[4][2];
        for (int j = 0; j < 4; j++) sum[j][0] = sum[j][1] = _mm256_setzero_ps();
        for (uint32_t i = 0; i < dim; i++) {
            __m256 first = _mm256_loadu_ps(q + (size_t)i * LOCI_LANES);
            __m256 second = _mm256_loadu_ps(q + (size_t)i * LOCI_LANES + 8);
            for (int j = 0; j < 4; j++) {
                __m256 value = _mm256_set1_ps(row[(size_t)j * dim + i]);
                sum[j][0] = _mm256_fmadd_ps(value, first, sum[j][0]);
                sum[j][1] = _mm256_fmadd_ps(value, second, sum[j][1]);
            }
        }
        for (uint32_t j = 0; j < 4; j++) {
            _mm256_storeu_ps(out + (size_t)(r + j) * LOCI_LANES, sum[j][0]);
            _mm256_storeu_ps(out + (size_t)(r + j) * LOCI_LANES + 8, sum[j][1]);
        }
    }
    for (; r < n; r++) {
        __m256 first = _mm256_setzero_ps(), second = _mm256_setzero_ps();
        for (uint32_t i = 0; i < dim; i++) {
            __m256 value = _mm256_set1_ps(x[(size_t)r * dim + i]);
            const float *lanes = q + (size_t)i * LOCI_LANES;
            first = _mm256_fmadd_ps(value, _mm256_loadu_ps(lanes), first);
            second = _mm256_fmadd_ps(value, _mm256_loadu_ps(lanes + 8), second);
        }
        _mm256_storeu_ps(out + (size_t)r * LOCI_LANES, first);
        _mm256_storeu_ps(out + (size_t)r * LOCI_LANES + 8, second);
    }
}

static void add_values(float *o, float keep, const float *weight, const float *v, uint32_t n,
                       uint32_t dim) {
    for (uint32_t i = 0; i < dim; i += 8) {
        __m256 sum = _mm256_mul_ps(_mm256_loadu_ps(o + i), _mm256_set1_ps(keep));
        for (uint32_t r = 0; r < n; r++)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(weight[(size_t)r * LOCI_LANES]),
                                  _mm256_loadu_ps(v + (size_t)r * dim + i), sum);
        _mm256_storeu_ps(o + i, sum);
    }
}

/* Even and odd tokens, summed apart in 16 bits, to their order. */
static inline void store_tokens(uint16_t *out, __m128i even, __m128i odd) {
    _mm_storeu_si128((void *)out, _mm_unpacklo_epi16(even, odd));
    _mm_storeu_si128((void *)(out + 8), _mm_unpackhi_epi16(even, odd));
}

/* In 16 bits, which wrap, sum entries of even tokens plus 256 times those of odd ones, and the odd
 * ones alone; the even ones are what is left. count is a constant where this is inlined, so that
 * the sums stay in registers. */
static inline __attribute__((always_inline)) void sum_group(uint16_t *out, size_t stride,
                                                            const uint8_t *group, uint32_t parts,
                                                            const uint8_t *const *table,
                                                            uint32_t count) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i all[LOCI_SKETCH_VECTORS], odd[LOCI_SKETCH_VECTORS];
    for (uint32_t v = 0; v < count; v++) all[v] = odd[v] = _mm256_setzero_si256();
    for (uint32_t p = 0; p < parts; p++) {
        __m128i words = _mm_loadu_si128((const void *)(group + p * 16));
        __m256i index = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(words, 4), words), low);
        for (uint32_t v = 0; v < count; v++) {
            __m128i entries = _mm_loadu_si128((const void *)(table[v] + p * 16));
            __m256i values = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
            all[v] = _mm256_add_epi16(all[v], values);
            odd[v] = _mm256_add_epi16(odd[v], _mm256_srli_epi16(values, 8));
        }
    }
    for (uint32_t v = 0; v < count; v++, out += stride) {
        __m256i even = _mm256_sub_epi16(all[v], _mm256_slli_epi16(odd[v], 8));
        store_tokens(out, _mm256_castsi256_si128(even), _mm256_castsi256_si128(odd[v]));
        store_tokens(out + 16, _mm256_extracti128_si256(even, 1),
                     _mm256_extracti128_si256(odd[v], 1));
    }
}

static void sketch_sums(uint16_t *out, size_t stride, const uint8_t *sketches, uint32_t groups,
                        uint32_t parts, const uint8_t *const *table, uint32_t count) {
    body_sketch_sums(out, stride, sketches, groups, parts, table, count, sum_group);
}

static uint32_t reaching(const uint16_t *sum, size_t stride, const uint16_t *least,
                         uint32_t count) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (uint32_t v = 0; v < count; v++, sum += stride) {
        __m256i limit = _mm256_set1_epi16((short)least[v]);
        __m256i x = _mm256_loadu_si256((const __m256i *)sum);
        __m256i y = _mm256_loadu_si256((const __m256i *)(sum + 16));
        low = _mm256_or_si256(low, _mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
        high = _mm256_or_si256(high, _mm256_cmpeq_epi16(_mm256_max_epu16(y, limit), y));
    }
    /* Packs by halves of 128 bits: put them back in order. */
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return (uint32_t)_mm256_movemask_epi8(both);
}

static void masked_tops(uint16_t *out, const uint16_t *sum, size_t stride, uint32_t count,
                        uint32_t mask) {
    const __m256i bit = _mm256_set_epi16((short)0x8000, 0x4000, 0x2000, 0x1000, 0x800, 0x400, 0x200,
                                         0x100, 0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
    __m256i low = _mm256_and_si256(_mm256_set1_epi16((short)mask), bit);
    __m256i high = _mm256_and_si256(_mm256_set1_epi16((short)(mask >> 16)), bit);
    low = _mm256_cmpeq_epi16(low, bit);
    high = _mm256_cmpeq_epi16(high, bit);
    for (uint32_t v = 0; v < count; v++, sum += stride) {
        __m256i x = _mm256_and_si256(_mm256_loadu_si256((const void *)sum), low);
        __m256i y = _mm256_and_si256(_mm256_loadu_si256((const void *)(sum + 16)), high);
        __m256i half = _mm256_max_epu16(x, y);
        __m128i part =
            _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        __m128i least = _mm_minpos_epu16(_mm_xor_si128(part, _mm_set1_epi16(-1)));
        out[v] = (uint16_t)~_mm_extract_epi16(least, 0);
    }
}

static void shift_keys(uint16_t *key, size_t n, uint32_t times, uint16_t more, uint16_t less) {
    const __m256i factor = _mm256_set1_epi16((short)times);
    for (size_t i = 0; i < n; i += 16) {
        __m256i x = _mm256_loadu_si256((const void *)(key + i));
        if (times <= UINT16_MAX) x = _mm256_mulhi_epu16(x, factor);
        x = _mm256_adds_epu16(x, _mm256_set1_epi16((short)more));
        x = _mm256_subs_epu16(x, _mm256_set1_epi16((short)less));
        _mm256_storeu_si256((void *)(key + i), x);
    }
}

static size_t count_keys(const uint16_t *key, size_t n, uint16_t least) {
    const __m256i limit = _mm256_set1_epi16((short)least);
    size_t count = 0;
    for (size_t i = 0; i < n;) {
        __m256i sum = _mm256_setzero_si256(); /* of so few that lanes of 16 bits hold them */
        size_t end = n - i < 1u << 19 ? n : i + (1u << 19);
        for (; i < end; i += 32) {
            __m256i x = _mm256_loadu_si256((const void *)(key + i));
            __m256i y = _mm256_loadu_si256((const void *)(key + i + 16));
            sum = _mm256_sub_epi16(sum, _mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
            sum = _mm256_sub_epi16(sum, _mm256_cmpeq_epi16(_mm256_max_epu16(y, limit), y));
        }
        uint16_t lanes[16];
        _mm256_storeu_si256((void *)lanes, sum);
        for (int l = 0; l < 16; l++) count += lanes[l];
    }
    return count;
}

/* 16 tokens at a time, all in registers. */
static void nearest_words(uint8_t *word, const float *x, size_t stride, uint32_t n,
                          const float *book, const float *half_norm) {
    for (uint32_t t = 0; t < n; t += 16) {
        __m256 low[LOCI_SKETCH_CHANNELS], high[LOCI_SKETCH_CHANNELS];
        __m256 best[2] = {_mm256_set1_ps(-INFINITY), _mm256_set1_ps(-INFINITY)};
        __m256 at[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++) {
            low[c] = _mm256_loadu_ps(x + c * stride + t);
            high[c] = _mm256_loadu_ps(x + c * stride + t + 8);
        }
        for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
            __m256 score[2] = {_mm256_set1_ps(-half_norm[w]), _mm256_set1_ps(-half_norm[w])};
            __m256 number = _mm256_castsi256_ps(_mm256_set1_epi32((int)w));
            for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++) {
                __m256 of = _mm256_set1_ps(book[c * LOCI_SKETCH_WORDS + w]);
                score[0] = _mm256_add_ps(score[0], _mm256_mul_ps(low[c], of));
                score[1] = _mm256_add_ps(score[1], _mm256_mul_ps(high[c], of));
            }
            for (int h = 0; h < 2; h++) {
                __m256 better = _mm256_cmp_ps(score[h], best[h], _CMP_GT_OQ);
                at[h] = _mm256_blendv_ps(at[h], number, better);
                best[h] = _mm256_max_ps(score[h], best[h]);
            }
        }
        __m256i words = _mm256_packus_epi32(_mm256_castps_si256(at[0]), _mm256_castps_si256(at[1]));
        words = _mm256_permute4x64_epi64(words, 0xd8);
        __m128i bytes =
            _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((void *)(word + t), bytes);
    }
}

static size_t list_reaching(uint32_t *out, uint32_t first, const uint16_t *sum, size_t stride,
                            uint32_t groups, const uint16_t *least, uint32_t count) {
    return body_list_reaching(out, first, sum, stride, groups, least, count, reaching);
}

const loci_corpus_kernels loci_corpus_kernels_avx2 = {
    .sketch_table = body_sketch_table,
    .nearest_words = nearest_words,
    .sketch_sums = sketch_sums,
    .masked_tops = masked_tops,
    .reaching = reaching,
    .list_reaching = list_reaching,
    .dot_u8 = dot_u8,
    .argmax_u8 = argmax_u8,
    .unpack = body_unpack,
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
typedef int loci_corpus_avx2_unused;
#endif
