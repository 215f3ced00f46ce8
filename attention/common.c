/* SPDX-License-Identifier: Apache-2.0
 *
 * See common.h; the measured reach of look-ups (backend.h).
 */
#include "attention/common.h"

#include <math.h>
#include <stdlib.h>

void loci_select_reach(loci_select_params *params, loci_reach reach) {
    static const float roots[] = {0.48f, 0.26f, 0.25f}, candidates[] = {2.4f, 1.9f, 2.0f};
    params->roots = roots[reach];
    params->candidates = candidates[reach];
    params->roots_min = 64;
    params->candidates_min = 512;
}

void loci_select_defaults(loci_select_params *params) {
    *params = (loci_select_params){.mode = LOCI_MODE_HIERARCHICAL, .top_p = 0.999f};
    loci_select_reach(params, LOCI_REACH_ANSWER);
}

uint64_t loci_select_count(float rate, double spread, uint64_t live, uint64_t least) {
    double wanted = ceil((double)rate * spread);
    uint64_t count = wanted >= (double)live ? live : wanted > 0.0 ? (uint64_t)wanted : 0;
    uint64_t most = count > least ? count : least;
    return most ? most : 1;
}

float loci_select_root_slack(float top_p) {
    float slack = 1.0f - top_p;
    return slack > 0.0f ? logf(0.1f * slack) : -INFINITY;
}

size_t loci_attend_rows(const loci_attend_dense *args, bool keys) {
    size_t most = 0;
    for (uint32_t i = 0; i < args->span_count; i++) {
        const loci_attend_span *s = &args->spans[i];
        size_t end = keys ? (size_t)s->kv_begin + s->kv_count : (size_t)s->q_begin + s->q_count;
        if ((keys ? s->kv_count : s->q_count) > 0 && end > most) most = end;
    }
    return most;
}

static int compare_scored(const void *a, const void *b) {
    const loci_scored *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

void loci_take_best(loci_scored *list, uint32_t n, float least, uint32_t limit, uint32_t *segments,
                    uint32_t *count) {
    qsort(list, n, sizeof *list, compare_scored);
    for (uint32_t i = 0; i < n && *count < limit && list[i].score > least; i++)
        segments[(*count)++] = list[i].segment;
}
