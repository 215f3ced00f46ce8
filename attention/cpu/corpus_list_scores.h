/* SPDX-License-Identifier: Apache-2.0
 *
 * list_scores of corpus_kernels.h in registers of 256 bits, for AVX2 and, with VNNI, AVX-512. A
 * code's nibbles are taken apart where they lie: low ones meet a query's even channels, high ones
 * its odd channels.
 */
#ifndef LOCI_ATTENTION_CPU_CORPUS_LIST_SCORES_H
#define LOCI_ATTENTION_CPU_CORPUS_LIST_SCORES_H

#include <immintrin.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"

#define LIST_ROWS 8u

/* Adds 32 bytes of a code to eight partial sums; in 16 bits (AVX2) four products of at most 15 *
 * 127 a step, which four steps, the most there are, do not overflow. */
static inline __m256i list_step(__m256i sum, __m256i low, __m256i high, const int8_t *even,
                                const int8_t *odd) {
    __m256i q_even = _mm256_loadu_si256((const void *)even);
    __m256i q_odd = _mm256_loadu_si256((const void *)odd);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(sum, low, q_even), high, q_odd);
#else
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(low, q_even));
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(high, q_odd));
#endif
}

static inline __m256i list_sums(__m256i sum) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return sum;
#else
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
}

/* The sums of eight vectors, one each. */
static inline __m256i list_across(const __m256i *x) {
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_permute2x128_si256(a, b, 0x31));
}

/* Eight codes: scores [count][8]. Inlined with steps a constant where it is 1. */
static inline __attribute__((always_inline)) void list_eight(float scores[][LIST_ROWS],
                                                             const uint8_t *const *code,
                                                             const loci_code_queries *q,
                                                             uint32_t steps) {
    __m256i sum[LOCI_LANES][LIST_ROWS];
    const __m256i nibble = _mm256_set1_epi8(15);
    for (uint32_t r = 0; r < LIST_ROWS; r++) {
        for (uint32_t s = 0; s < steps; s++) {
            __m256i two = _mm256_loadu_si256((const void *)(code[r] + 32 * (size_t)s));
            __m256i low = _mm256_and_si256(two, nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(two, 4), nibble);
            const int8_t *value = q->values + 32 * (size_t)s;
            for (uint32_t v = 0; v < q->count; v++, value += 64 * (size_t)steps) {
                __m256i before = s ? sum[v][r] : _mm256_setzero_si256();
                sum[v][r] = list_step(before, low, high, value, value + 32 * (size_t)steps);
            }
        }
    }
    for (uint32_t v = 0; v < q->count; v++) {
        for (uint32_t r = 0; r < LIST_ROWS; r++) sum[v][r] = list_sums(sum[v][r]);
        __m256 dot = _mm256_cvtepi32_ps(list_across(sum[v]));
        __m256 centred = _mm256_sub_ps(dot, _mm256_set1_ps(7.5f * (float)q->sum[v]));
        __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(q->scale[v]), centred);
        _mm256_storeu_ps(scores[v], _mm256_add_ps(_mm256_set1_ps(q->base[v]), scaled));
    }
}

static void list_scores(float *out, size_t out_stride, const uint8_t *records, size_t record_stride,
                        const uint32_t *slots, uint32_t n, const loci_code_queries *q) {
    uint32_t steps = q->padded / 32;
    for (uint32_t i = 0; i < n; i += LIST_ROWS) {
        const uint8_t *code[LIST_ROWS];
        float scores[LOCI_LANES][LIST_ROWS];
        uint32_t rows = n - i < LIST_ROWS ? n - i : LIST_ROWS;
        for (uint32_t r = 0; r < LIST_ROWS; r++)
            code[r] = records + slots[r < rows ? i + r : i] * record_stride;
        if (steps == 1)
            list_eight(scores, code, q, 1);
        else
            list_eight(scores, code, q, steps);
        for (uint32_t v = 0; v < q->count; v++)
            memcpy(out + v * out_stride + i, scores[v], rows * sizeof(float));
    }
}

#endif
