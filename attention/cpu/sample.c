/* SPDX-License-Identifier: Apache-2.0
 *
 * Choosing the next token from a row of logits.
 *
 * Order: the repetition penalty (CTRL, arXiv 1909.05858, section 4.1: a positive logit of a
 * recent token is divided by it, a negative one multiplied), bans, temperature, top-p (the
 * smallest set of most probable tokens that reaches top_p; nucleus sampling,
 * arXiv 1904.09751), then one draw. The draw comes from a counter-based generator, so that
 * (seed, step, row) names it, whatever was drawn before. Ties go to the lowest id.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attention/cpu/kernels.h"
#include "attention/cpu/lookup.h"
#include "base/rng.h"

/* Tokens that may be drawn, and which of them are. */
typedef struct candidates {
    float *weight; /* [count] in the order of their ids */
    uint32_t *id;
    uint8_t *taken;
    uint32_t count;
} candidates;

/* Uniform in [0, 1), 53 bits. */
static double draw(const loci_sample_params *params, uint32_t row) {
    uint64_t state = loci_rng_mix(params->seed + LOCI_RNG_GAMMA);
    state = loci_rng_mix(state + LOCI_RNG_GAMMA * (params->step + 1));
    state = loci_rng_mix(state + LOCI_RNG_GAMMA * ((uint64_t)row + 1));
    return (double)(state >> 11) * 0x1.0p-53;
}

static double sum_weights(const float *weight, uint32_t count) {
    double part[8] = {0}, sum = 0.0;
    uint32_t whole = count / 8 * 8;
    for (uint32_t i = 0; i < whole; i += 8)
        for (uint32_t l = 0; l < 8; l++) part[l] += (double)weight[i + l];
    for (uint32_t l = 0; l < 8; l++) sum += part[l];
    for (uint32_t i = whole; i < count; i++) sum += (double)weight[i];
    return sum;
}

/* Keeps the candidates of at least that weight. */
static void keep_from(candidates *c, float least) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < c->count; i++) {
        float weight = c->weight[i];
        c->weight[kept] = weight;
        c->id[kept] = c->id[i];
        kept += weight >= least;
    }
    c->count = kept;
}

/* Keeps the most probable ones that reach `share` of the weight, and at least one; returns their
 * weight. Those of less than the rest's share of an even distribution are not among them. */
static double nucleus(const loci_corpus_kernels *kernels, candidates *c, double share) {
    double total = sum_weights(c->weight, c->count);
    keep_from(c, fmaxf((float)(total * (1.0 - share) / c->count) * 0.999f, FLT_TRUE_MIN));
    if (share < 1.0) {
        lookup_choose(kernels, c->weight, c->count, share * total, UINT64_MAX, c->taken);
        uint32_t kept = 0;
        for (uint32_t i = 0; i < c->count; i++) {
            c->weight[kept] = c->weight[i];
            c->id[kept] = c->id[i];
            kept += c->taken[i];
        }
        c->count = kept;
    }
    return sum_weights(c->weight, c->count);
}

/* The candidate at which the sum of weights, the most probable first, exceeds `target`. */
static uint32_t candidate_at(const loci_corpus_kernels *kernels, const candidates *c,
                             double target) {
    lookup_choose(kernels, c->weight, c->count, nextafter(target, INFINITY), UINT64_MAX, c->taken);
    float least = FLT_MAX;
    for (uint32_t i = 0; i < c->count; i++) {
        float weight = c->taken[i] ? c->weight[i] : FLT_MAX;
        least = weight < least ? weight : least;
    }
    uint32_t last = c->count;
    while (last > 0 && !(c->taken[last - 1] && c->weight[last - 1] == least)) last--;
    LOCI_ASSERT(last > 0);
    return c->id[last - 1];
}

static uint32_t best_of(const loci_corpus_kernels *kernels, const float *logits, uint32_t vocab) {
    float max = kernels->max(logits, vocab);
    uint32_t best = 0;
    while (best + 1 < vocab && logits[best] != max) best++;
    return best;
}

/* Draws from the adjusted logits; *c has room for vocab candidates. */
static uint32_t draw_token(const loci_corpus_kernels *kernels, const float *logits, uint32_t vocab,
                           candidates *c, const loci_sample_params *params, uint32_t row) {
    uint32_t best = best_of(kernels, logits, vocab);
    if (params->temperature <= 0.0f || logits[best] == -INFINITY) return best;
    c->count = vocab;
    for (uint32_t i = 0; i < vocab; i++) {
        c->weight[i] = (logits[i] - logits[best]) / params->temperature;
        c->id[i] = i;
    }
    kernels->exp_sub(c->weight, c->weight, vocab, 0.0f);
    double share = params->top_p > 0.0f && params->top_p < 1.0f ? (double)params->top_p : 1.0;
    double kept = nucleus(kernels, c, share);
    return candidate_at(kernels, c, draw(params, row) * kept);
}

static void adjust(float *logits, uint32_t vocab, const loci_sample_params *params,
                   const float *original, const uint32_t *banned, uint32_t banned_count,
                   const uint32_t *recent, uint32_t recent_count) {
    memcpy(logits, original, vocab * sizeof *logits);
    float penalty = params->repetition_penalty;
    if (penalty > 0.0f && penalty != 1.0f)
        for (uint32_t i = 0; i < recent_count; i++)
            if (recent[i] < vocab) { /* from the original: a token listed twice counts once */
                float logit = original[recent[i]];
                logits[recent[i]] = logit > 0.0f ? logit / penalty : logit * penalty;
            }
    for (uint32_t i = 0; i < banned_count; i++)
        if (banned[i] < vocab) logits[banned[i]] = -INFINITY;
}

/* Records a failure for a NaN or +infinity; false if there is one. */
static bool check_row(loci_stream *stream, const float *logits, uint32_t vocab, uint32_t row) {
    for (uint32_t i = 0; i < vocab; i++) {
        if (!isnan(logits[i]) && logits[i] != INFINITY) continue;
        loci_cpu_fail(stream, LOCI_E_INTERNAL, "logit %u of row %u is %s", i, row,
                      isnan(logits[i]) ? "not a number" : "infinite");
        return false;
    }
    return true;
}

void loci_cpu_sample(loci_stream *stream, loci_ref ids, loci_ref logprob, loci_ref logits,
                     uint32_t rows, uint32_t vocab, const loci_sample_params *params,
                     const uint32_t *banned, uint32_t banned_count, const uint32_t *recent,
                     uint32_t recent_count) {
    if (rows == 0 || vocab == 0) return;
    const float *all = loci_cpu_ptr(logits, (size_t)rows * vocab * sizeof(float));
    int32_t *id = loci_cpu_ptr(ids, rows * sizeof(int32_t));
    float *log_p = loci_cpu_ptr(logprob, rows * sizeof(float));
    const loci_corpus_kernels *kernels = loci_corpus_kernels_of(stream->cpu->isa);
    float *adjusted =
        loci_cpu_scratch_get(&stream->scratch, vocab * (3 * sizeof(float) + sizeof(uint8_t)));
    if (!adjusted) {
        loci_cpu_fail(stream, LOCI_E_NOMEM, "no memory to sample from %u tokens", vocab);
        return;
    }
    candidates c = {.weight = adjusted + vocab};
    c.id = (uint32_t *)(void *)(c.weight + vocab);
    c.taken = (uint8_t *)(c.id + vocab);
    for (uint32_t row = 0; row < rows; row++) {
        const float *original = all + (size_t)row * vocab;
        float max = kernels->max(original, vocab);
        float sum = stream->cpu->kernels->exp_sum(original, vocab, max);
        /* Where there is a NaN or +infinity, the sum is none; and where all are -infinity. */
        if (isnan(sum) && !check_row(stream, original, vocab, row)) return;
        adjust(adjusted, vocab, params, original, banned, banned_count, recent, recent_count);
        uint32_t token = draw_token(kernels, adjusted, vocab, &c, params, row);
        if (adjusted[token] == -INFINITY) {
            loci_cpu_fail(stream, LOCI_E_INVAL,
                          "row %u has no token left to choose: all %u are banned", row, vocab);
            return;
        }
        id[row] = (int32_t)token;
        log_p[row] = original[token] - max - logf(sum);
    }
}
