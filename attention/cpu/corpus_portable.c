/* SPDX-License-Identifier: Apache-2.0
 *
 * The portable kernels of corpus_kernels.h, the choice of a table, and lane packing.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"
#include "attention/cpu/corpus_kernels_body.h"

static void dot_u8(int32_t *out, const uint8_t *x, uint32_t n, uint32_t dim, const int8_t *q) {
    for (uint32_t r = 0; r < n; r++) {
        int32_t sum[LOCI_LANES] = {0};
        for (uint32_t i = 0; i < dim; i++) {
            const int8_t *lane = q + (size_t)(i / 4) * 4 * LOCI_LANES + i % 4;
            int32_t value = x[(size_t)r * dim + i];
            for (uint32_t l = 0; l < LOCI_LANES; l++) sum[l] += value * lane[4 * l];
        }
        memcpy(out + (size_t)r * LOCI_LANES, sum, sizeof sum);
    }
}

static void argmax_u8(uint32_t *best, int32_t *best_dot, const uint8_t *x, uint32_t n, uint32_t dim,
                      const int8_t *q, const int32_t *bias, uint32_t blocks) {
    for (uint32_t r = 0; r < n; r++) {
        best[r] = 0;
        best_dot[r] = INT32_MIN;
        for (uint32_t b = 0; b < blocks; b++) {
            int32_t dot[LOCI_LANES];
            dot_u8(dot, x + (size_t)r * dim, 1, dim, q + (size_t)b * LOCI_LANES * dim);
            for (uint32_t l = 0; l < LOCI_LANES; l++) {
                int32_t value = dot[l] + bias[b * LOCI_LANES + l];
                if (value <= best_dot[r]) continue;
                best_dot[r] = value;
                best[r] = b * LOCI_LANES + l;
            }
        }
    }
}

static void dot_f32(float *out, const float *x, uint32_t n, uint32_t dim, const float *q) {
    for (uint32_t r = 0; r < n; r++) {
        float sum[LOCI_LANES] = {0};
        for (uint32_t i = 0; i < dim; i++) {
            float value = x[(size_t)r * dim + i];
            for (uint32_t l = 0; l < LOCI_LANES; l++) sum[l] += value * q[i * LOCI_LANES + l];
        }
        memcpy(out + (size_t)r * LOCI_LANES, sum, sizeof sum);
    }
}

static void add_values(float *o, float keep, const float *weight, const float *v, uint32_t n,
                       uint32_t dim) {
    for (uint32_t i = 0; i < dim; i++) o[i] *= keep;
    for (uint32_t r = 0; r < n; r++) body_axpy(o, v + (size_t)r * dim, dim, weight[r * LOCI_LANES]);
}

static void sketch_sums(uint16_t *out, size_t stride, const uint8_t *sketches, uint32_t groups,
                        uint32_t parts, const uint8_t *const *table, uint32_t count) {
    for (uint32_t i = 0; i < groups * count; i++) {
        const uint8_t *group = sketches + (size_t)(i / count) * parts * 16;
        const uint8_t *entry = table[i % count];
        uint16_t *to = out + (size_t)(i % count) * stride + i / count * 32;
        memset(to, 0, 32 * sizeof *to);
        for (uint32_t p = 0; p < parts; p++, entry += 16, group += 16) {
            for (uint32_t t = 0; t < 16; t++) {
                to[t] = (uint16_t)(to[t] + entry[group[t] & 15u]);
                to[t + 16] = (uint16_t)(to[t + 16] + entry[group[t] >> 4]);
            }
        }
    }
}

static void nearest_words(uint8_t *word, const float *x, size_t stride, uint32_t n,
                          const float *book, const float *half_norm) {
    for (uint32_t t = 0; t < n; t += LOCI_LANES) {
        float best[LOCI_LANES], score[LOCI_LANES];
        int32_t at[LOCI_LANES] = {0};
        for (uint32_t l = 0; l < LOCI_LANES; l++) best[l] = -INFINITY;
        for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
            for (uint32_t l = 0; l < LOCI_LANES; l++) score[l] = -half_norm[w];
            for (uint32_t c = 0; c < LOCI_SKETCH_CHANNELS; c++)
                for (uint32_t l = 0; l < LOCI_LANES; l++)
                    score[l] += x[c * stride + t + l] * book[c * LOCI_SKETCH_WORDS + w];
            for (uint32_t l = 0; l < LOCI_LANES; l++) {
                at[l] = score[l] > best[l] ? (int32_t)w : at[l];
                best[l] = score[l] > best[l] ? score[l] : best[l];
            }
        }
        for (uint32_t l = 0; l < LOCI_LANES; l++) word[t + l] = (uint8_t)at[l];
    }
}

static size_t list_reaching(uint32_t *out, uint32_t first, const uint16_t *sum, size_t stride,
                            uint32_t groups, const uint16_t *least, uint32_t count) {
    return body_list_reaching(out, first, sum, stride, groups, least, count, body_reaching);
}

const loci_corpus_kernels loci_corpus_kernels_portable = {
    .sketch_table = body_sketch_table,
    .nearest_words = nearest_words,
    .sketch_sums = sketch_sums,
    .masked_tops = body_masked_tops,
    .reaching = body_reaching,
    .list_reaching = list_reaching,
    .dot_u8 = dot_u8,
    .argmax_u8 = argmax_u8,
    .unpack = body_unpack,
    .node_scores = body_node_scores,
    .code_scores = body_code_scores,
    .list_scores = body_list_scores,
    .softmax_lanes = body_softmax_lanes,
    .shift_keys = body_shift_keys,
    .count_keys = body_count_keys,
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

const loci_corpus_kernels *loci_corpus_kernels_of(loci_cpu_isa isa) {
#if defined(__x86_64__)
    if (isa >= LOCI_ISA_AVX512) return &loci_corpus_kernels_avx512;
    if (isa >= LOCI_ISA_AVX2) return &loci_corpus_kernels_avx2;
#endif
    (void)isa;
    return &loci_corpus_kernels_portable;
}

void loci_round_i8(int8_t *values, float *scale, int32_t *sum, const float *x, uint32_t dim) {
    float top = 0.0f;
    for (uint32_t i = 0; i < dim; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    *scale = 0.0f;
    *sum = 0;
    memset(values, 0, dim);
    if (!(top > 0.0f) || !isfinite(top)) return;
    float inverse = 127.0f / top;
    *scale = top / 127.0f;
    for (uint32_t i = 0; i < dim; i++) {
        /* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even. */
        float rounded = x[i] * inverse + 12582912.0f;
        int32_t value = (int32_t)(rounded - 12582912.0f);
        value = value > 127 ? 127 : value < -127 ? -127 : value;
        values[i] = (int8_t)value;
        *sum += value;
    }
}

void loci_pack_lane_i8(int8_t *block, uint32_t lane, float *scale, int32_t *sum, const float *x,
                       uint32_t dim) {
    int8_t values[LOCI_HEAD_DIM_MAX];
    loci_round_i8(values, scale, sum, x, dim);
    for (uint32_t i = 0; i < dim; i++)
        block[(size_t)(i / 4) * 4 * LOCI_LANES + 4 * lane + i % 4] = values[i];
}

void loci_pack_lanes_i8(int8_t *q, float *scale, int32_t *sums, const float *x, size_t stride,
                        uint32_t count, uint32_t dim) {
    uint32_t lanes = loci_lane_blocks(count) * LOCI_LANES;
    memset(q, 0, (size_t)lanes * dim);
    for (uint32_t v = 0; v < lanes; v++) {
        scale[v] = 0.0f;
        sums[v] = 0;
        if (v < count)
            loci_pack_lane_i8(q + (size_t)(v / LOCI_LANES) * LOCI_LANES * dim, v % LOCI_LANES,
                              &scale[v], &sums[v], x + v * stride, dim);
    }
}

void loci_pack_lanes_f32(float *q, const float *x, size_t stride, uint32_t count, uint32_t dim) {
    uint32_t lanes = loci_lane_blocks(count) * LOCI_LANES;
    memset(q, 0, (size_t)lanes * dim * sizeof *q);
    for (uint32_t v = 0; v < count; v++) {
        float *lane = q + (size_t)(v / LOCI_LANES) * LOCI_LANES * dim + v % LOCI_LANES;
        for (uint32_t i = 0; i < dim; i++) lane[(size_t)i * LOCI_LANES] = x[v * stride + i];
    }
}
