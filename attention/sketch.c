/* SPDX-License-Identifier: Apache-2.0
 *
 * Training and packing of sketches; see sketch.h.
 */
#include "attention/sketch.h"

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
    const loci_corpus_kernels *kernels;
    float *book;
    uint8_t *word;
} sketch_job;

static void half_norms(const float *book, float *out) {
    for (uint32_t w = 0; w < WORDS; w++) out[w] = 0.0f;
    for (uint32_t c = 0; c < CHANNELS; c++)
        for (uint32_t w = 0; w < WORDS; w++)
            out[w] += 0.5f * book[c * WORDS + w] * book[c * WORDS + w];
}

/* The tokens of one run of channels that it is trained on, channel by channel, up to a whole number
 * of lanes. Returns how many there are. */
static uint32_t take_sample(const sketch_job *job, size_t part, float (*out)[SAMPLE]) {
    uint32_t n = job->tokens < SAMPLE ? job->tokens : SAMPLE;
    for (uint32_t t = 0; t < (n + LOCI_LANES - 1) / LOCI_LANES * LOCI_LANES; t++) {
        uint32_t from = t < n ? t : n - 1;
        const float *x = job->x + (size_t)from * job->tokens / n * job->dim + part * CHANNELS;
        for (uint32_t c = 0; c < CHANNELS; c++) out[c][t] = x[c];
    }
    return n;
}

/* K-means of one run of channels. A codeword that nothing is near keeps its place. */
static void train_part(void *arg, size_t part, unsigned thread) {
    (void)thread;
    sketch_job *job = arg;
    float row[CHANNELS][SAMPLE], norm[WORDS];
    uint8_t word[SAMPLE];
    uint32_t n = take_sample(job, part, row),
             padded = (n + LOCI_LANES - 1) / LOCI_LANES * LOCI_LANES;
    float *book = job->book + part * CHANNELS * WORDS;
    const float *x = job->x + part * CHANNELS;
    for (uint32_t w = 0; w < WORDS; w++) {
        size_t token = (2 * (size_t)w + 1) * job->tokens / (2 * WORDS);
        for (uint32_t c = 0; c < CHANNELS; c++) book[c * WORDS + w] = x[token * job->dim + c];
    }
    for (int round = 0; round < ROUNDS; round++) {
        double sum[WORDS][CHANNELS] = {{0}};
        uint32_t count[WORDS] = {0};
        half_norms(book, norm);
        job->kernels->nearest_words(word, row[0], SAMPLE, padded, book, norm);
        for (uint32_t t = 0; t < n; t++) {
            for (uint32_t c = 0; c < CHANNELS; c++) sum[word[t]][c] += (double)row[c][t];
            count[word[t]]++;
        }
        for (uint32_t w = 0; w < WORDS; w++)
            for (uint32_t c = 0; c < CHANNELS && count[w]; c++)
                book[c * WORDS + w] = (float)(sum[w][c] / count[w]);
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
        uint8_t word[TOGETHER];
        half_norms(book, norm);
        for (uint32_t first = begin; first < end; first += TOGETHER) {
            uint32_t count = end - first < TOGETHER ? end - first : TOGETHER;
            for (uint32_t t = 0; t < count; t++)
                for (uint32_t c = 0; c < CHANNELS; c++)
                    x[c][t] = job->x[(size_t)(first + t) * job->dim + part * CHANNELS + c];
            job->kernels->nearest_words(word, x[0], TOGETHER, TOGETHER, book, norm);
            for (uint32_t t = 0; t < count; t++)
                job->word[(size_t)(first + t) * parts + part] = word[t];
        }
    }
}

void loci_sketch_train(const float *x, uint32_t tokens, uint32_t dim,
                       const loci_corpus_kernels *kernels, struct loci_pool *pool, float *book,
                       uint8_t *word) {
    sketch_job job = {
        .x = x, .tokens = tokens, .dim = dim, .kernels = kernels, .book = book, .word = word};
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
