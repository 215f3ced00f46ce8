/* SPDX-License-Identifier: Apache-2.0
 *
 * The plain C kernels of corpus_kernels.h, compiled once for each instruction set by the file
 * that includes this one. The compiler vectorises them; a file that has intrinsics for some
 * of them names its own functions in the table instead.
 */
#ifndef LOCI_ATTENTION_CPU_CORPUS_KERNELS_BODY_H
#define LOCI_ATTENTION_CPU_CORPUS_KERNELS_BODY_H

#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL /* in the vectors of the including file */
#include <xxhash.h>

#include "attention/cpu/corpus_kernels.h"
#include "attention/index_layout.h"

/* Limits by masks: choices would have gcc jump instead of vectorise. */
static inline float exp_one(float x) {
    /* 2^k e^r with |r| <= ln 2 / 2; ln 2 in two parts; minimax polynomial of degree 6 (relative
     * error below 2e-7). k comes from adding 1.5 * 2^23, which rounds to nearest. */
    union {
        float f;
        uint32_t u;
    } in = {x}, bits, power, out;
    const uint32_t keep = 0u - (uint32_t) !(x < -87.0f), small = 0u - (uint32_t) !(x > 88.0f);
    in.u = (in.u & keep & small) | (0x42b00000u & ~small); /* 88 */
    float shifted = in.f * 1.44269504f + 12582912.0f;
    float k = shifted - 12582912.0f;
    float r = in.f - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    bits.f = shifted;
    power.u = (bits.u - 0x4b400000u + 127u) << 23;
    out.f = y * power.f;
    out.u &= keep;
    return out.f;
}

static void body_exp_sub(float *out, const float *x, size_t n, float sub) {
    for (size_t i = 0; i < n; i++) out[i] = exp_one(x[i] - sub);
}

static float body_sum(const float *x, size_t n) {
    float part[LOCI_LANES] = {0};
    size_t whole = n / LOCI_LANES * LOCI_LANES;
    for (size_t i = 0; i < whole; i += LOCI_LANES)
        for (size_t l = 0; l < LOCI_LANES; l++) part[l] += x[i + l];
    for (size_t i = whole; i < n; i++) part[i - whole] += x[i];
    float total = 0.0f;
    for (size_t l = 0; l < LOCI_LANES; l++) total += part[l];
    return total;
}

static float body_max(const float *x, size_t n) {
    float part[LOCI_LANES];
    for (size_t l = 0; l < LOCI_LANES; l++) part[l] = -INFINITY;
    size_t whole = n / LOCI_LANES * LOCI_LANES;
    for (size_t i = 0; i < whole; i += LOCI_LANES)
        for (size_t l = 0; l < LOCI_LANES; l++) part[l] = x[i + l] > part[l] ? x[i + l] : part[l];
    for (size_t i = whole; i < n; i++)
        part[i - whole] = x[i] > part[i - whole] ? x[i] : part[i - whole];
    float best = -INFINITY;
    for (size_t l = 0; l < LOCI_LANES; l++) best = part[l] > best ? part[l] : best;
    return best;
}

static void body_node_scores(float *out, const int32_t *centroid_dot, const int32_t *variance_dot,
                             const loci_node_terms *terms) {
    for (size_t l = 0; l < LOCI_LANES; l++) {
        float dot = (float)(centroid_dot[l] - 128 * terms->q_sum[l]);
        out[l] = terms->mean_terms[l] + dot * (terms->centroid_scale * terms->q_scale[l]);
    }
    for (size_t l = 0; variance_dot && l < LOCI_LANES; l++)
        out[l] += (float)variance_dot[l] * (terms->variance_scale * terms->qq_scale[l]);
    for (size_t l = 0; l < LOCI_LANES; l++) out[l] += terms->log_size;
}

static void body_code_scores(float *out, const int32_t *dot, uint32_t n, const float *base,
                             const float *scale, const int32_t *sum) {
    for (size_t r = 0; r < n; r++)
        for (size_t l = 0; l < LOCI_LANES; l++) {
            float centred = (float)dot[r * LOCI_LANES + l] - 7.5f * (float)sum[l];
            out[r * LOCI_LANES + l] = base[l] + scale[l] * centred;
        }
}

static inline void body_list_scores(float *out, size_t out_stride, const uint8_t *records,
                                    size_t record_stride, const uint32_t *slots, uint32_t n,
                                    const loci_code_queries *q) {
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *code = records + slots[i] * record_stride;
        for (uint32_t v = 0; v < q->count; v++) {
            const int8_t *even = q->values + (size_t)v * 2 * q->padded, *odd = even + q->padded;
            int32_t dot = 0;
            for (uint32_t c = 0; c < q->padded; c++)
                dot += (code[c] & 15) * even[c] + (code[c] >> 4) * odd[c];
            float centred = (float)dot - 7.5f * (float)q->sum[v];
            out[v * out_stride + i] = q->base[v] + q->scale[v] * centred;
        }
    }
}

static void body_softmax_lanes(float *logits, uint32_t n, loci_lane_softmax *state) {
    float top[LOCI_LANES], base[LOCI_LANES], sum[LOCI_LANES] = {0};
    memcpy(top, state->max, sizeof top);
    for (size_t r = 0; r < n; r++)
        for (size_t l = 0; l < LOCI_LANES; l++) {
            float x = logits[r * LOCI_LANES + l];
            top[l] = x > top[l] ? x : top[l];
        }
    for (size_t l = 0; l < LOCI_LANES; l++) {
        base[l] = top[l] > -INFINITY ? top[l] : 0.0f;
        state->keep[l] = exp_one(state->max[l] - base[l]);
        state->max[l] = top[l];
    }
    for (size_t r = 0; r < n; r++)
        for (size_t l = 0; l < LOCI_LANES; l++) {
            float weight = exp_one(logits[r * LOCI_LANES + l] - base[l]);
            logits[r * LOCI_LANES + l] = weight;
            sum[l] += weight;
        }
    for (size_t l = 0; l < LOCI_LANES; l++) state->sum[l] = state->sum[l] * state->keep[l] + sum[l];
}

static uint64_t body_hash(const void *data, size_t bytes) {
    return XXH3_64bits(data, bytes);
}

static void body_axpy(float *y, const float *x, size_t n, float factor) {
    for (size_t i = 0; i < n; i++) y[i] += x[i] * factor;
}

static void body_widen(float *out, const uint16_t *bf16, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = loci_bf16_to_f32(bf16[i]);
}

static void body_widen_i8(float *out, const int8_t *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) out[i] = (float)x[i] * scale;
}

/* False where all entries are alike, or the codebook is hostile: then all entries are 0. */
static inline bool body_table_scale(loci_sketch_table *table, float widest) {
    bool usable = widest > 1e-30f && widest < 1e30f;
    table->scale = usable ? widest / 255.0f : 0.0f;
    return usable;
}

static inline void body_sketch_table(loci_sketch_table *out, const float *q, const float *book,
                                     uint32_t parts) {
    float value[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS * LOCI_SKETCH_WORDS];
    float low[LOCI_HEAD_DIM_MAX / LOCI_SKETCH_CHANNELS], widest = 0.0f;
    out->base = 0.0f;
    for (uint32_t p = 0; p < parts; p++) {
        float sum[LOCI_SKETCH_WORDS] = {0}, least[LOCI_SKETCH_WORDS], most[LOCI_SKETCH_WORDS];
        for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++, book += LOCI_SKETCH_WORDS)
            for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++)
                sum[w] += q[p * LOCI_SKETCH_CHANNELS + c] * book[w];
        memcpy(value + p * LOCI_SKETCH_WORDS, sum, sizeof sum);
        memcpy(least, sum, sizeof sum);
        memcpy(most, sum, sizeof sum);
        for (uint32_t half = LOCI_SKETCH_WORDS / 2; half > 0; half /= 2)
            for (uint32_t w = 0; w < half; w++) {
                least[w] = least[w + half] < least[w] ? least[w + half] : least[w];
                most[w] = most[w + half] > most[w] ? most[w + half] : most[w];
            }
        low[p] = least[0];
        widest = most[0] - least[0] > widest ? most[0] - least[0] : widest;
        out->base += least[0];
    }
    float inverse = body_table_scale(out, widest) ? 255.0f / widest : 0.0f;
    for (uint32_t p = 0; p < parts; p++)
        for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
            float step = (value[p * LOCI_SKETCH_WORDS + w] - low[p]) * inverse + 0.5f;
            step = step < 256.0f ? step : 0.0f; /* products of a hostile codebook may be NaN */
            out->entry[p * LOCI_SKETCH_WORDS + w] = (uint8_t)(int32_t)step;
        }
}

/* Sums of one group of tokens for `count` vectors, in the registers of one instruction set. */
typedef void (*body_sum_group)(uint16_t *out, size_t stride, const uint8_t *group, uint32_t parts,
                               const uint8_t *const *table, uint32_t count);

/* Walks the groups. Inlined with the sum, count a constant, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void
body_sketch_sums(uint16_t *out, size_t stride, const uint8_t *sketches, uint32_t groups,
                 uint32_t parts, const uint8_t *const *table, uint32_t count, body_sum_group sum) {
    for (uint32_t g = 0; g < groups; g++, out += 32, sketches += (size_t)parts * 16) {
        switch (count) {
        case 1: sum(out, stride, sketches, parts, table, 1); break;
        case 2: sum(out, stride, sketches, parts, table, 2); break;
        case 3: sum(out, stride, sketches, parts, table, 3); break;
        default: sum(out, stride, sketches, parts, table, 4); break;
        }
    }
}

static inline uint32_t body_reaching(const uint16_t *sum, size_t stride, const uint16_t *least,
                                     uint32_t count) {
    uint32_t mask = 0;
    for (uint32_t v = 0; v < count; v++, sum += stride)
        for (uint32_t i = 0; i < 32; i++) mask |= (uint32_t)(sum[i] >= least[v]) << i;
    return mask;
}

typedef uint32_t (*body_mask)(const uint16_t *sum, size_t stride, const uint16_t *least,
                              uint32_t count);

/* Inlined with the mask of one instruction set. */
static inline __attribute__((always_inline)) size_t
body_list_reaching(uint32_t *out, uint32_t first, const uint16_t *sum, size_t stride,
                   uint32_t groups, const uint16_t *least, uint32_t count, body_mask mask_of) {
    size_t n = 0;
    for (uint32_t g = 0; g < groups; g++, first += 32, sum += 32)
        for (uint32_t mask = mask_of(sum, stride, least, count); mask; mask &= mask - 1)
            out[n++] = first + (uint32_t)__builtin_ctz(mask);
    return n;
}

static inline void body_shift_keys(uint16_t *key, size_t n, uint32_t times, uint16_t more,
                                   uint16_t less) {
    for (size_t i = 0; i < n; i++) {
        uint32_t x = (uint32_t)((uint64_t)key[i] * times >> 16) + more;
        x = x < UINT16_MAX ? x : UINT16_MAX;
        key[i] = (uint16_t)(x > less ? x - less : 0);
    }
}

static inline size_t body_count_keys(const uint16_t *key, size_t n, uint16_t least) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += key[i] >= least;
    return count;
}

static size_t body_count_from(const float *x, size_t n, float least) {
    size_t sum = 0;
    for (size_t i = 0; i < n;) {
        uint32_t part = 0; /* of so few that lanes of 32 bits hold it */
        for (size_t end = n - i < 1u << 20 ? n : i + (1u << 20); i < end; i++)
            part += x[i] >= least ? 1u : 0u;
        sum += part;
    }
    return sum;
}

static inline void body_masked_tops(uint16_t *out, const uint16_t *sum, size_t stride,
                                    uint32_t count, uint32_t mask) {
    for (uint32_t v = 0; v < count; v++, sum += stride) {
        out[v] = 0;
        for (uint32_t left = mask; left; left &= left - 1) {
            uint16_t value = sum[__builtin_ctz(left)];
            out[v] = value > out[v] ? value : out[v];
        }
    }
}

static void body_unpack(uint8_t *out, const uint8_t *codes, size_t channels) {
    for (size_t i = 0; i < channels / 2; i++) {
        out[2 * i] = codes[i] & 15u;
        out[2 * i + 1] = (uint8_t)(codes[i] >> 4);
    }
}

#endif
