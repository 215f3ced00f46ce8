/* SPDX-License-Identifier: Apache-2.0
 *
 * See structured.h.
 */
#include "tests/bench/gpu/structured.h"

#include <pthread.h>

#include "base/half.h"
#include "tests/bench/gpu/bench.h"

#define TOPICS 2000u
#define SEGMENT_TOKENS 256u /* divides an extent */
#define SPREAD 0.7f

typedef struct generator {
    fixture *f;
    uint32_t head;
} generator;

/* As fixture_generate, a KV head a thread. */
static void *generate_head(void *arg) {
    const generator *g = arg;
    fixture *f = g->f;
    uint64_t rng = 11 + g->head;
    uint32_t dim = f->dim;
    float *topic = need(malloc((size_t)(TOPICS + 1) * dim * sizeof *topic));
    float *offset = topic + (size_t)TOPICS * dim;
    for (uint32_t i = 0; i < dim; i++) offset[i] = 2.0f * fixture_normal(&rng);
    for (size_t i = 0; i < (size_t)TOPICS * dim; i++) topic[i] = fixture_normal(&rng);
    for (size_t t = 0; t < f->tokens; t++) {
        float u = fixture_uniform(&rng);
        const float *from = topic + (size_t)(u * u * (float)TOPICS) * dim;
        for (uint32_t i = 0; i < dim; i++) {
            float key = offset[i] + from[i] + SPREAD * fixture_normal(&rng);
            f->k[g->head][t * dim + i] = loci_f32_to_bf16(key);
            f->v[g->head][t * dim + i] = loci_f32_to_bf16(fixture_normal(&rng));
        }
    }
    free(topic);
    return NULL;
}

void structured_generate(fixture *f, uint32_t tokens, uint32_t q_heads, uint32_t kv_heads,
                         uint32_t dim) {
    uint32_t heads = kv_heads;
    *f = (fixture){.layers = 1, .kv_heads = heads, .dim = dim, .q_heads = q_heads};
    f->tokens = tokens;
    f->segments = (tokens + SEGMENT_TOKENS - 1) / SEGMENT_TOKENS;
    f->segment_begin = need(malloc((f->segments + 1) * sizeof *f->segment_begin));
    for (uint32_t s = 0; s <= f->segments; s++)
        f->segment_begin[s] = s < f->segments ? s * SEGMENT_TOKENS : tokens;
    f->k = need(calloc(heads, sizeof *f->k));
    f->v = need(calloc(heads, sizeof *f->v));
    pthread_t *threads = need(calloc(heads, sizeof *threads));
    generator *work = need(calloc(heads, sizeof *work));
    for (uint32_t h = 0; h < heads; h++) {
        f->k[h] = need(malloc((size_t)tokens * f->dim * sizeof **f->k));
        f->v[h] = need(malloc((size_t)tokens * f->dim * sizeof **f->v));
        work[h] = (generator){f, h};
        LOCI_ASSERT(pthread_create(&threads[h], NULL, generate_head, &work[h]) == 0);
    }
    for (uint32_t h = 0; h < heads; h++) (void)pthread_join(threads[h], NULL);
    free(threads);
    free(work);
}
