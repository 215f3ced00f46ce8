/* SPDX-License-Identifier: Apache-2.0
 *
 * The lexical score of passages: BM25 (Robertson and Zaragoza 2009, with the idf that is never
 * negative) over the terms of memory/terms.h. A passage is a segment, its length its tokens;
 * document frequencies are those of the snapshot, dead segments left out.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "memory/terms.h"
#include "services/engine/query.h"

#define K1 1.2
#define B 0.75

typedef struct bm25 {
    double mean_tokens;
    uint32_t *frequency; /* [terms]: segments that hold the term */
    double *weight;      /* [terms] */
    float *scores;       /* [segments] */
} bm25;

static int by_value(const void *a, const void *b) {
    const uint64_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* The different terms of the question, ascending; the caller frees. */
static loci_status question_terms(const loci_query *query, uint64_t **out, uint32_t *count,
                                  loci_error *err) {
    loci_term_list list = {0};
    uint64_t *terms = NULL;
    loci_status status = loci_terms_of(loci_slice_text(query->text), 0, true, &list, err);
    *count = 0;
    if (status == LOCI_OK) {
        terms = malloc((list.count + 1) * sizeof *terms);
        if (!terms) status = loci_fail(err, LOCI_E_NOMEM, "no memory for the question's words");
    }
    if (status == LOCI_OK) {
        for (size_t i = 0; i < list.count; i++) terms[i] = list.items[i].hash;
        qsort(terms, list.count, sizeof *terms, by_value);
        for (size_t i = 0; i < list.count; i++)
            if (i == 0 || terms[i] != terms[i - 1]) terms[(*count)++] = terms[i];
    }
    loci_term_list_fini(&list);
    *out = terms;
    return status;
}

static void count_posting(void *ctx, uint32_t term, uint32_t segment, uint32_t tokens,
                          uint32_t times) {
    bm25 *self = ctx;
    (void)segment;
    (void)tokens;
    (void)times;
    self->frequency[term]++;
}

static void add_posting(void *ctx, uint32_t term, uint32_t segment, uint32_t tokens,
                        uint32_t times) {
    bm25 *self = ctx;
    double length = (double)tokens / self->mean_tokens, tf = (double)times;
    double share = tf * (K1 + 1) / (tf + K1 * (1 - B + B * length));
    self->scores[segment] += (float)(self->weight[term] * share);
}

/* Two passes over the postings: what is held in memory is one number a segment. */
static loci_status score_terms(loci_query *query, const uint64_t *terms, uint32_t count, bm25 *self,
                               loci_error *err) {
    double all = (double)query->view->live_segments;
    uint64_t bytes = 0;
    LOCI_TRY(loci_snapshot_postings(query->snapshot, terms, count, query->cancel, count_posting,
                                    self, &bytes, err));
    for (uint32_t t = 0; t < count; t++) {
        double df = (double)self->frequency[t];
        self->weight[t] = log(1 + (all - df + 0.5) / (df + 0.5));
    }
    LOCI_TRY(loci_snapshot_postings(query->snapshot, terms, count, query->cancel, add_posting, self,
                                    &bytes, err));
    query->usage.index_read_bytes += bytes;
    query->usage.fetched_bytes += bytes;
    return LOCI_OK;
}

loci_status loci_query_lexical(loci_query *query, float *scores, double *most, loci_error *err) {
    uint64_t *terms = NULL;
    uint32_t count = 0;
    *most = 0;
    memset(scores, 0, loci_snapshot_segments(query->snapshot) * sizeof *scores);
    LOCI_TRY(question_terms(query, &terms, &count, err));
    bm25 self = {.mean_tokens = (double)query->view->tokens / (double)query->view->live_segments,
                 .frequency = calloc(count + 1u, sizeof *self.frequency),
                 .weight = calloc(count + 1u, sizeof *self.weight),
                 .scores = scores};
    loci_status status = LOCI_OK;
    if (!self.frequency || !self.weight)
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for the question's words");
    else if (count > 0)
        status = score_terms(query, terms, count, &self, err);
    for (uint32_t t = 0; status == LOCI_OK && t < count; t++) *most += (K1 + 1) * self.weight[t];
    free(terms);
    free(self.frequency);
    free(self.weight);
    return status;
}

uint32_t loci_lexical_best(const float *scores, uint32_t segments, uint32_t limit, uint32_t *out) {
    uint32_t count = 0;
    for (uint32_t s = 0; s < segments; s++) {
        if (scores[s] <= 0) continue;
        if (count == limit && scores[s] <= scores[out[count - 1]]) continue;
        uint32_t at = count < limit ? count++ : count - 1;
        for (; at > 0 && scores[out[at - 1]] < scores[s]; at--) out[at] = out[at - 1];
        out[at] = s;
    }
    return count;
}
