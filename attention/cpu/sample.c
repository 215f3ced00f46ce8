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
#include <math.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/cpu/kernels.h"
#include "base/rng.h"

typedef struct candidate {
    float weight;
    uint32_t id;
} candidate;

/* Uniform in [0, 1), 53 bits. */
static double draw(const loci_sample_params *params, uint32_t row) {
    uint64_t state = loci_rng_mix(params->seed + LOCI_RNG_GAMMA);
    state = loci_rng_mix(state + LOCI_RNG_GAMMA * (params->step + 1));
    state = loci_rng_mix(state + LOCI_RNG_GAMMA * ((uint64_t)row + 1));
    return (double)(state >> 11) * 0x1.0p-53;
}

static bool before(candidate a, candidate b) {
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

static void sift_down(candidate *heap, size_t count, size_t at) {
    candidate moved = heap[at];
    for (size_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* Moves the most probable tokens, best first, to the end of heap until they hold `share` of the
 * weight; returns how many. A heap, because top-p mostly keeps few of very many. */
static size_t nucleus(candidate *heap, size_t count, double share, double *kept) {
    double total = 0.0, sum = 0.0;
    for (size_t i = 0; i < count; i++) total += (double)heap[i].weight;
    for (size_t i = count / 2; i-- > 0;) sift_down(heap, count, i);
    size_t left = count;
    while (left > 0 && (sum < share * total || left == count)) {
        candidate best = heap[0];
        heap[0] = heap[--left];
        heap[left] = best;
        sum += (double)best.weight;
        if (left > 0) sift_down(heap, left, 0);
    }
    *kept = sum;
    return count - left;
}

static uint32_t best_of(const float *logits, uint32_t vocab) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Draws from the adjusted logits; heap has room for vocab candidates. */
static uint32_t draw_token(const float *logits, uint32_t vocab, candidate *heap,
                           const loci_sample_params *params, uint32_t row) {
    uint32_t best = best_of(logits, vocab);
    if (params->temperature <= 0.0f || logits[best] == -INFINITY) return best;
    size_t count = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        float weight = expf((logits[i] - logits[best]) / params->temperature);
        if (weight > 0.0f) heap[count++] = (candidate){weight, i};
    }
    float top_p = params->top_p > 0.0f && params->top_p < 1.0f ? params->top_p : 1.0f;
    double kept = 0.0;
    size_t chosen = nucleus(heap, count, (double)top_p, &kept);
    double target = draw(params, row) * kept;
    for (size_t i = 0; i + 1 < chosen; i++) {
        target -= (double)heap[count - 1 - i].weight;
        if (target < 0.0) return heap[count - 1 - i].id;
    }
    return heap[count - chosen].id;
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

/* Records a failure for a NaN or +infinity; *max is the largest logit. */
static bool check_row(loci_stream *stream, const float *logits, uint32_t vocab, uint32_t row,
                      float *max) {
    *max = -INFINITY;
    for (uint32_t i = 0; i < vocab; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY) {
            loci_cpu_fail(stream, LOCI_E_INTERNAL, "logit %u of row %u is %s", i, row,
                          isnan(logits[i]) ? "not a number" : "infinite");
            return false;
        }
        if (logits[i] > *max) *max = logits[i];
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
    float *adjusted =
        loci_cpu_scratch_get(&stream->scratch, vocab * (sizeof(float) + sizeof(candidate)));
    if (!adjusted) {
        loci_cpu_fail(stream, LOCI_E_NOMEM, "no memory to sample from %u tokens", vocab);
        return;
    }
    candidate *heap = (candidate *)(void *)(adjusted + vocab);
    for (uint32_t row = 0; row < rows; row++) {
        const float *original = all + (size_t)row * vocab;
        float max;
        if (!check_row(stream, original, vocab, row, &max)) return;
        adjust(adjusted, vocab, params, original, banned, banned_count, recent, recent_count);
        uint32_t token = draw_token(adjusted, vocab, heap, params, row);
        if (adjusted[token] == -INFINITY) {
            loci_cpu_fail(stream, LOCI_E_INVAL,
                          "row %u has no token left to choose: all %u are banned", row, vocab);
            return;
        }
        id[row] = (int32_t)token;
        log_p[row] =
            original[token] - max - logf(stream->cpu->kernels->exp_sum(original, vocab, max));
    }
}
