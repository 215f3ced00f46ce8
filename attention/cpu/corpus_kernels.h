/* SPDX-License-Identifier: Apache-2.0
 *
 * The inner loops of clustering, look-up and sparse attention, one table for each
 * instruction set.
 *
 * Vectors (query rows x heads of one KV head's group, or centroids) stand in "lanes", 16 to a
 * block, so that one loaded key serves 16 of them and sums run over channels or tokens in a
 * fixed order without horizontal adds. Block b of an int8 operand is [dim / 4][16][4] bytes,
 * of an f32 operand [dim][16] floats.
 *
 * Estimates (dot_u8, sketch_sums, nearest_words, exp_sub, sum) give the same bits on every
 * instruction set: integers, and elementwise f32 without contraction. Exact attention (dot_f32,
 * add_values) uses fused multiply-add where there is one and agrees to rounding. Pure functions, no
 * state.
 */
#ifndef LOCI_ATTENTION_CPU_CORPUS_KERNELS_H
#define LOCI_ATTENTION_CPU_CORPUS_KERNELS_H

#include "attention/cpu/cpu.h"
#include "attention/index.h"

#define LOCI_LANES 16u
#define LOCI_SKETCH_VECTORS 4u /* looked up together */

/* What turns the integer dots of one node into scores, for 16 lanes. */
typedef struct loci_node_terms {
    float centroid_scale, variance_scale, log_size;
    const float *mean_terms, *q_scale, *qq_scale;
    const int32_t *q_sum;
} loci_node_terms;

/* Online softmax of 16 lanes: maximum, sum of exponentials, and by what the sums so far shrink. */
typedef struct loci_lane_softmax {
    float max[LOCI_LANES], sum[LOCI_LANES], keep[LOCI_LANES];
} loci_lane_softmax;

/* What one query vector knows of a pair: the table [parts][16], and how to read sums of its
 * entries: base + scale * sum. */
typedef struct loci_sketch_table {
    float base, scale;
    uint8_t *entry;
} loci_sketch_table;

/* A few queries with the code scales of one pair folded in, as their channels stand in codes. */
typedef struct loci_code_queries {
    uint32_t count;  /* at most LOCI_LANES */
    uint32_t padded; /* dim / 2 up to a multiple of 32 */
    float base[LOCI_LANES], scale[LOCI_LANES];
    int32_t sum[LOCI_LANES];
    int8_t *values; /* [count][2][padded]: even channels, then odd ones, 0 behind them */
} loci_code_queries;

typedef struct loci_corpus_kernels {
    /* out[r * LOCI_LANES + lane] = sum over i of x[r * dim + i] * q[i / 4][lane][i % 4] */
    void (*dot_u8)(int32_t *out, const uint8_t *x, uint32_t n, uint32_t dim, const int8_t *q);
    /* out[v * out_stride + i] = base + scale * (code of slots[i] . q - 7.5 sum) of query v; the
     * code of a slot at records + slot * record_stride, where q->padded bytes are readable. */
    void (*list_scores)(float *out, size_t out_stride, const uint8_t *records, size_t record_stride,
                        const uint32_t *slots, uint32_t n, const loci_code_queries *q);
    /* For each row of x, over the lanes of `blocks` blocks of q (block stride 16 * dim bytes), the
     * first lane (numbered through all blocks) with the highest dot + bias. */
    void (*argmax_u8)(uint32_t *best, int32_t *best_dot, const uint8_t *x, uint32_t n, uint32_t dim,
                      const int8_t *q, const int32_t *bias, uint32_t blocks);
    /* out[lane] = log_size + mean term + q.c + (q * q).var / 2; centroid dots are of c + 128.
     * variance_dot NULL: without the last term. */
    void (*node_scores)(float *out, const int32_t *centroid_dot, const int32_t *variance_dot,
                        const loci_node_terms *terms);
    /* out[r][lane] = base + scale * (dot - 7.5 sum) */
    void (*code_scores)(float *out, const int32_t *dot, uint32_t n, const float *base,
                        const float *scale, const int32_t *sum);
    /* logits [n][16] become weights exp(logit - new maximum); a lane of -INFINITY stays out. */
    void (*softmax_lanes)(float *logits, uint32_t n, loci_lane_softmax *state);
    /* Two channels a byte to one a byte; n rows of dim. */
    void (*unpack)(uint8_t *out, const uint8_t *codes, size_t channels);
    /* Products of q's channels with the codewords of each part, less the least of their part, in
     * steps of a 255th of the widest part. book as in index.h. */
    void (*sketch_table)(loci_sketch_table *out, const float *q, const float *book, uint32_t parts);
    /* Which of a part's codewords is nearest to each of n tokens (a multiple of LOCI_LANES): that
     * of the highest x.c - half_norm, the first among equals. x: [LOCI_SKETCH_CHANNELS][stride];
     * book: [LOCI_SKETCH_CHANNELS][LOCI_SKETCH_WORDS]. */
    void (*nearest_words)(uint8_t *word, const float *x, size_t stride, uint32_t n,
                          const float *book, const float *half_norm);
    /* out[v * stride + 32 g + t] = sum over parts p of table[v][p][word of token t of group g],
     * for v < count <= LOCI_SKETCH_VECTORS; sketches as in index.h, 4 <= parts <= 64 and a multiple
     * of 4. */
    void (*sketch_sums)(uint16_t *out, size_t stride, const uint8_t *sketches, uint32_t groups,
                        uint32_t parts, const uint8_t *const *table, uint32_t count);
    /* out[v] = the highest of sum[v * stride + i] over the set bits i of mask, 0 if there is none.
     * Here and below all 32 are readable. */
    void (*masked_tops)(uint16_t *out, const uint16_t *sum, size_t stride, uint32_t count,
                        uint32_t mask);
    /* For which i < 32 some sum[v * stride + i] is at least least[v], a bit each. */
    uint32_t (*reaching)(const uint16_t *sum, size_t stride, const uint16_t *least, uint32_t count);
    /* The numbers from `first` on of those in `groups` groups of 32 which `reaching` says; returns
     * how many. Up to 16 entries behind them are written over. */
    size_t (*list_reaching)(uint32_t *out, uint32_t first, const uint16_t *sum, size_t stride,
                            uint32_t groups, const uint16_t *least, uint32_t count);
    /* key[i] * times / 2^16 (times <= 2^16) + more - less, bounded by 0 and 65535; n a multiple of
     * 32. */
    void (*shift_keys)(uint16_t *key, size_t n, uint32_t times, uint16_t more, uint16_t less);
    /* How many of n keys are at least `least`; n a multiple of 32. */
    size_t (*count_keys)(const uint16_t *key, size_t n, uint16_t least);
    /* XXH3, which the other kernels' instructions compute without a call. */
    uint64_t (*hash)(const void *data, size_t bytes);
    /* How many of n values are at least `least`; NaN is not. */
    size_t (*count_from)(const float *x, size_t n, float least);
    /* out[i] = exp(x[i] - sub); 0 below -87. out may be x. */
    void (*exp_sub)(float *out, const float *x, size_t n, float sub);
    /* Sum and maximum; sixteen partial results, joined in order. */
    float (*sum)(const float *x, size_t n);
    float (*max)(const float *x, size_t n);
    /* y[i] += x[i] * factor */
    void (*axpy)(float *y, const float *x, size_t n, float factor);
    void (*widen)(float *out, const uint16_t *bf16, size_t n);
    void (*widen_i8)(float *out, const int8_t *x, size_t n, float scale);
    /* out[r * LOCI_LANES + lane] = sum over i of x[r * dim + i] * q[i * LOCI_LANES + lane] */
    void (*dot_f32)(float *out, const float *x, uint32_t n, uint32_t dim, const float *q);
    /* o[i] = o[i] * keep + sum over r < n of weight[r * LOCI_LANES] * v[r * dim + i] */
    void (*add_values)(float *o, float keep, const float *weight, const float *v, uint32_t n,
                       uint32_t dim);
} loci_corpus_kernels;

extern const loci_corpus_kernels loci_corpus_kernels_portable;
#if defined(__x86_64__)
extern const loci_corpus_kernels loci_corpus_kernels_avx2;
extern const loci_corpus_kernels loci_corpus_kernels_avx512;
#endif

const loci_corpus_kernels *loci_corpus_kernels_of(loci_cpu_isa isa);

/* Packs `count` f32 vectors (row stride `stride`) as int8 lanes: lane v = round(x / scale[v]),
 * scale[v] = max |x| / 127 (0 for a zero vector, whose lanes are 0). Lanes from count up to the
 * end of the last block are zero. sums[v] = sum over channels of the int8 values. */
void loci_pack_lanes_i8(int8_t *q, float *scale, int32_t *sums, const float *x, size_t stride,
                        uint32_t count, uint32_t dim);
/* The int8 values of one vector as they stand in a lane. */
void loci_round_i8(int8_t *values, float *scale, int32_t *sum, const float *x, uint32_t dim);
/* One lane of one block; the others are left as they are. */
void loci_pack_lane_i8(int8_t *block, uint32_t lane, float *scale, int32_t *sum, const float *x,
                       uint32_t dim);
/* The same for f32 lanes. */
void loci_pack_lanes_f32(float *q, const float *x, size_t stride, uint32_t count, uint32_t dim);

/* Queries with the code scales of one pair folded in (codes.c). memory: loci_folded_bytes. */
typedef struct loci_folded {
    float *scale; /* [lanes] */
    int32_t *sum; /* [lanes] */
    int8_t *codes;
} loci_folded;

static inline size_t loci_folded_bytes(uint32_t lanes, uint32_t dim) {
    return (size_t)lanes * (sizeof(float) + sizeof(int32_t) + dim);
}

void loci_fold_query(loci_folded *out, uint8_t *memory, const float *q, uint32_t vectors,
                     uint32_t dim, const float *code_scale);
/* Logits of n <= 32 tokens with unpacked codes, for one block of lanes: out [n][16]. */
void loci_score_codes_tile(const loci_corpus_kernels *kernels, const loci_folded *folded,
                           const float *mean_terms, const uint8_t *codes, uint32_t n, uint32_t dim,
                           uint32_t block, float *out);

static inline uint32_t loci_lane_blocks(uint32_t count) {
    return (count + LOCI_LANES - 1) / LOCI_LANES;
}

#endif
