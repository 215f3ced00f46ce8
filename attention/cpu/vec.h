/* SPDX-License-Identifier: Apache-2.0
 *
 * One float vector type over three instruction sets, chosen by the flags that a file is
 * compiled with: 16 lanes (AVX-512), 8 lanes (AVX2 and FMA) or 1 (plain C).
 */
#ifndef LOCI_ATTENTION_CPU_VEC_H
#define LOCI_ATTENTION_CPU_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define VINLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512F__)

#define VW 16
typedef __m512 vf;
VINLINE vf v_zero(void) {
    return _mm512_setzero_ps();
}
VINLINE vf v_set1(float a) {
    return _mm512_set1_ps(a);
}
VINLINE vf v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
VINLINE void v_store(float *p, vf a) {
    _mm512_storeu_ps(p, a);
}
VINLINE vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
VINLINE vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
VINLINE vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
VINLINE vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
VINLINE vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
VINLINE vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
VINLINE vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
VINLINE float v_reduce_add(vf a) {
    return _mm512_reduce_add_ps(a);
}
VINLINE float v_reduce_max(vf a) {
    return _mm512_reduce_max_ps(a);
}
VINLINE vf v_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
VINLINE vf v_load_i8(const int8_t *p) {
    __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
}
/* The even and the odd elements of VW pairs of bf16. */
VINLINE vf v_pairs_even(const uint32_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
VINLINE vf v_pairs_odd(const uint32_t *p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}
/* a * 2^n for integral n in [-126, 127] */
VINLINE vf v_scale2(vf a, vf n) {
    __m512i bits =
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(a, _mm512_castsi512_ps(bits));
}
/* Unoptimised this is a macro, and gcc 12 names all lanes in it by a number of the other sign. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
VINLINE vf v_round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#pragma GCC diagnostic pop
/* Zero in the lanes where a < b, else c. */
VINLINE vf v_zero_below(vf a, vf b, vf c) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), c);
}
/* Lane i of the result is the sum of the lanes of a[i]. */
VINLINE vf v_sum_rows(const vf *a) {
    vf u[4];
    for (int i = 0; i < 4; i++) {
        const vf *b = a + 4 * i;
        __m512d t0 =
            _mm512_castps_pd(v_add(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1])));
        __m512d t1 =
            _mm512_castps_pd(v_add(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3])));
        u[i] = v_add(_mm512_castpd_ps(_mm512_unpacklo_pd(t0, t1)),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t1)));
    }
    vf low = v_add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    vf high = v_add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return v_add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

#elif defined(__AVX2__)

#define VW 8
typedef __m256 vf;
VINLINE vf v_zero(void) {
    return _mm256_setzero_ps();
}
VINLINE vf v_set1(float a) {
    return _mm256_set1_ps(a);
}
VINLINE vf v_load(const float *p) {
    return _mm256_loadu_ps(p);
}
VINLINE void v_store(float *p, vf a) {
    _mm256_storeu_ps(p, a);
}
VINLINE vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
VINLINE vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
VINLINE vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
VINLINE vf v_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
VINLINE vf v_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
VINLINE vf v_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
VINLINE vf v_min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
VINLINE float v_reduce_add(vf a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
VINLINE float v_reduce_max(vf a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
VINLINE vf v_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
VINLINE vf v_load_i8(const int8_t *p) {
    __m128i narrow = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
}
VINLINE vf v_pairs_even(const uint32_t *p) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
VINLINE vf v_pairs_odd(const uint32_t *p) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}
VINLINE vf v_scale2(vf a, vf n) {
    __m256i bits =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
}
VINLINE vf v_round(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
VINLINE vf v_zero_below(vf a, vf b, vf c) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), c);
}
VINLINE vf v_sum_rows(const vf *a) {
    vf low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    vf high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return v_add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

#else

#define VW 1
typedef float vf;
VINLINE vf v_zero(void) {
    return 0.0f;
}
VINLINE vf v_set1(float a) {
    return a;
}
VINLINE vf v_load(const float *p) {
    return *p;
}
VINLINE void v_store(float *p, vf a) {
    *p = a;
}
VINLINE vf v_add(vf a, vf b) {
    return a + b;
}
VINLINE vf v_sub(vf a, vf b) {
    return a - b;
}
VINLINE vf v_mul(vf a, vf b) {
    return a * b;
}
VINLINE vf v_div(vf a, vf b) {
    return a / b;
}
VINLINE vf v_fma(vf a, vf b, vf c) {
    return a * b + c;
}
VINLINE vf v_max(vf a, vf b) {
    return a > b ? a : b;
}
VINLINE vf v_min(vf a, vf b) {
    return a < b ? a : b;
}
VINLINE float v_reduce_add(vf a) {
    return a;
}
VINLINE float v_reduce_max(vf a) {
    return a;
}
VINLINE float v_of_bits(uint32_t bits) {
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}
VINLINE vf v_load_bf16(const uint16_t *p) {
    return v_of_bits((uint32_t)*p << 16);
}
VINLINE vf v_load_i8(const int8_t *p) {
    return (float)*p;
}
VINLINE vf v_pairs_even(const uint32_t *p) {
    return v_of_bits(*p << 16);
}
VINLINE vf v_pairs_odd(const uint32_t *p) {
    return v_of_bits(*p & 0xffff0000u);
}
VINLINE vf v_scale2(vf a, vf n) {
    return a * v_of_bits((uint32_t)((int32_t)n + 127) << 23);
}
/* To nearest for |a| < 2^22. */
VINLINE vf v_round(vf a) {
    return (a + 12582912.0f) - 12582912.0f;
}
VINLINE vf v_zero_below(vf a, vf b, vf c) {
    return a < b ? 0.0f : c;
}
VINLINE vf v_sum_rows(const vf *a) {
    return a[0];
}

#endif

/* exp(x), relative error below 2e-7 for x in [-87.3, 88]; 0 below, exp(88) above. NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2 and ln 2 in two parts, exp(r) by a polynomial
 * (Cephes expf), scaled by 2^n. */
VINLINE vf v_exp(vf x) {
    vf lowest = v_set1(-87.3f);
    vf clamped = v_max(lowest, v_min(v_set1(88.0f), x));
    vf n = v_round(v_mul(clamped, v_set1(1.44269504088896341f)));
    vf r = v_fma(n, v_set1(-0.693359375f), clamped);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vf p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return v_zero_below(x, lowest, v_scale2(p, n));
}

#endif
