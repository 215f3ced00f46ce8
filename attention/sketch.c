/* SPDX-License-Identifier: Apache-2.0
 *
 * Training and packing of sketches; see sketch.h.
 */
#include "attention/sketch.h"

#include <math.h>
#include <string.h>

#include "base/pool.h"

#define WORDS LOCI_SKETCH_WORDS
#define CHANNELS LOCI_SKETCH_CHANNELS
#define SAMPLE 8192u
#define ROUNDS 8
#define CHUNK 1024u  /* tokens of one task of assignment */
#define TOGETHER 64u /* of these looked at together, side by side in vectors */

typedef struct sketch_job {
    const float *x;
    uint32_t tokens, dim;
    float *book;
    uint8_t *word;
} sketch_job;

/* The nearest of 16 codewords for each of TOGETHER tokens: the highest x.c - c.c / 2, the first
 * among equals. */
static void nearest_of(float (*x)[TOGETHER], const float *book, const float *half_norm,
                       int32_t *word) {
    float best[TOGETHER];
    for (uint32_t t = 0; t < TOGETHER; t++) {
        best[t] = -INFINITY;
        word[t] = 0;
    }
    for (uint32_t w = 0; w < WORDS; w++) {
        float score[TOGETHER];
        for (uint32_t t = 0; t < TOGETHER; t++) score[t] = -half_norm[w];
        for (uint32_t c = 0; c < CHANNELS; c++)
            for (uint32_t t = 0; t < TOGETHER; t++) score[t] += x[c][t] * book[c * WORDS + w];
        for (uint32_t t = 0; t < TOGETHER; t++) {
            word[t] = score[t] > best[t] ? (int32_t)w : word[t];
            best[t] = score[t] > best[t] ? score[t] : best[t];
        }
    }
}

static void half_norms(const float *book, float *out) {
    for (uint32_t w = 0; w < WORDS; w++) out[w] = 0.0f;
    for (uint32_t c = 0; c < CHANNELS; c++)
        for (uint32_t w = 0; w < WORDS; w++)
            out[w] += 0.5f * book[c * WORDS + w] * book[c * WORDS + w];
}

/* K-means of one run of channels. A codeword that nothing is near keeps its place. */
static void train_part(void *arg, size_t part, unsigned thread) {
    (void)thread;
    sketch_job *job = arg;
    uint32_t n = job->tokens < SAMPLE ? job->tokens : SAMPLE;
    float *book = job->book + part * CHANNELS * WORDS, norm[WORDS];
    const float *x = job->x + part * CHANNELS;
    for (uint32_t w = 0; w < WORDS; w++) {
        size_t token = (2 * (size_t)w + 1) * job->tokens / (2 * WORDS);
        for (uint32_t c = 0; c < CHANNELS; c++) book[c * WORDS + w] = x[token * job->dim + c];
    }
    for (int round = 0; round < ROUNDS; round++) {
        double sum[CHANNELS * WORDS] = {0};
        uint32_t count[WORDS] = {0};
        half_norms(book, norm);
        for (uint32_t first = 0; first < n; first += TOGETHER) {
            float row[CHANNELS][TOGETHER] = {{0}};
            int32_t word[TOGETHER];
            uint32_t some = n - first < TOGETHER ? n - first : TOGETHER;
            for (uint32_t t = 0; t < some; t++)
                for (uint32_t c = 0; c < CHANNELS; c++)
                    row[c][t] = x[(size_t)(first + t) * job->tokens / n * job->dim + c];
            nearest_of(row, book, norm, word);
            for (uint32_t t = 0; t < some; t++) {
                for (uint32_t c = 0; c < CHANNELS; c++)
                    sum[c * WORDS + (uint32_t)word[t]] += (double)row[c][t];
                count[word[t]]++;
            }
        }
        for (uint32_t i = 0; i < CHANNELS * WORDS; i++)
            if (count[i % WORDS]) book[i] = (float)(sum[i] / count[i % WORDS]);
    }
}

static void assign_chunk(void *arg, size_t index, unsigned thread) {
    (void)thread;
    sketch_job *job = arg;
    uint32_t parts = loci_sketch_parts(job->dim), begin = (uint32_t)index * CHUNK;
    uint32_t end = job->tokens - begin < CHUNK ? job->tokens : begin + CHUNK;
    for (uint32_t part = 0; part < parts; part++) {
        const float *book = job->book + (size_t)part * CHANNELS * WORDS;
        float norm[WORDS], x[CHANNELS][TOGETHER] = {{0}};
        int32_t word[TOGETHER];
        half_norms(book, norm);
        for (uint32_t first = begin; first < end; first += TOGETHER) {
            uint32_t count = end - first < TOGETHER ? end - first : TOGETHER;
            for (uint32_t t = 0; t < count; t++)
                for (uint32_t c = 0; c < CHANNELS; c++)
                    x[c][t] = job->x[(size_t)(first + t) * job->dim + part * CHANNELS + c];
            nearest_of(x, book, norm, word);
            for (uint32_t t = 0; t < count; t++)
                job->word[(size_t)(first + t) * parts + part] = (uint8_t)word[t];
        }
    }
}

void loci_sketch_train(const float *x, uint32_t tokens, uint32_t dim, struct loci_pool *pool,
                       float *book, uint8_t *word) {
    sketch_job job = {.x = x, .tokens = tokens, .dim = dim, .book = book, .word = word};
    loci_pool_run(pool, loci_sketch_parts(dim), train_part, &job);
    loci_pool_run(pool, (tokens + CHUNK - 1) / CHUNK, assign_chunk, &job);
}

void loci_sketch_pack(uint8_t *out, const uint8_t *word, const uint32_t *ids, uint32_t tokens,
                      uint32_t dim) {
    uint32_t parts = loci_sketch_parts(dim), half = LOCI_SKETCH_GROUP / 2;
    for (uint32_t t = 0; t < tokens; t++) {
        uint8_t *group = out + t / LOCI_SKETCH_GROUP * loci_sketch_group(dim);
        uint32_t at = t % LOCI_SKETCH_GROUP, shift = at < half ? 0 : 4;
        for (uint32_t p = 0; p < parts; p++)
            group[p * half + at % half] |= (uint8_t)(word[(size_t)ids[t] * parts + p] << shift);
    }
}
