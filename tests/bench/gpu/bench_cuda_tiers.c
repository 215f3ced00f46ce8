/* SPDX-License-Identifier: Apache-2.0
 *
 * One layer's attention of decoding steps whose K and V are on the device, below (in page-locked
 * memory of the host) with a cache of rows, and below with next to none. One JSON line each.
 *
 *   bench_cuda_tiers [--layers N] [--steps N] [--heads Q KV DIM] [--keep SHARE]... TOKENS
 *
 * Keys are the structured generator's. A head looks for one planted key; from step to step it stays
 * with it with probability SHARE (0.9), with other noise, or takes another. All layers have the
 * same bytes, copied for each, and queries of their own. Memory larger than the L2 is written
 * before each look-up. where: "device": everything there. "below": a budget for indexes and a cache
 * of rows of a third of them. "bus": one for the indexes alone. ms: of a layer, from begin to the
 * output, by events: first: median over the layers of the first step, with an empty cache; last:
 * over the second half of the steps. hit: the share of rows read that were there. dense_ms: mode
 * dense, all K and V over the bus, and at what rate. equal: outputs have the bits of those with
 * everything on the device. lost: the attention mass that is not read, and the same where a step
 * attends what the step before it had selected (mean over heads, layer 0).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "base/half.h"
#include "tests/bench/gpu/bench.h"
#include "tests/bench/gpu/structured.h"

#define KEEPS_MAX 4u
#define LOST_STEPS 4u /* steps that the lost mass is measured in */
#define FLUSH_BYTES ((size_t)1 << 28)

typedef struct options {
    uint32_t layers, steps, q_heads, kv_heads, dim, tokens, keeps;
    float keep[KEEPS_MAX];
} options;

typedef struct bench {
    options o;
    fixture f;
    loci_extent_view **views; /* [layers][extents] over buffers of their own */
    loci_buffer *memory, *flush;
    size_t values;  /* of one row of all heads */
    float *q, *out; /* [keeps][steps][layers][values]: queries, and results on the device */
    float *got;     /* [values + q_heads]: output and log-sum-exp */
    cudaEvent_t begin, end;
    loci_lookup *lookup;
    loci_error err;
} bench;

static loci_cuda_pairs *pairs_of(const bench *b) {
    return ((loci_cuda *)b->f.backend->ctx)->pairs;
}

static loci_cuda_pairs_stats stats_of(const bench *b) {
    loci_cuda_pairs_stats stats;
    loci_cuda_pairs_stats_of(pairs_of(b), &stats);
    return stats;
}

static float *at(const bench *b, float *all, uint32_t keep, uint32_t step, uint32_t layer) {
    return all + (((size_t)keep * b->o.steps + step) * b->o.layers + layer) * b->values;
}

/* --- corpus and queries ---------------------------------------------------------------- */

static void draw_queries(bench *b) {
    uint32_t group = b->o.q_heads / b->o.kv_heads, dim = b->o.dim;
    uint64_t rng = 99, *target = need(calloc((size_t)b->o.layers * b->o.q_heads, sizeof *target));
    size_t all = (size_t)b->o.keeps * b->o.steps * b->o.layers * b->values;
    b->q = need(malloc(2 * all * sizeof *b->q));
    b->out = b->q + all;
    for (uint32_t k = 0; k < b->o.keeps; k++)
        for (uint32_t s = 0; s < b->o.steps; s++)
            for (uint32_t i = 0; i < b->o.layers * b->o.q_heads; i++) {
                uint32_t layer = i / b->o.q_heads, h = i % b->o.q_heads;
                if (s == 0 || !(fixture_uniform(&rng) < b->o.keep[k]))
                    target[i] = fixture_random(&rng) % b->o.tokens;
                const uint16_t *key = b->f.k[h / group] + target[i] * dim;
                float *q = at(b, b->q, k, s, layer) + (size_t)h * dim;
                for (uint32_t d = 0; d < dim; d++)
                    q[d] = 1.2f * loci_bf16_to_f32(key[d]) + 0.5f * fixture_normal(&rng);
            }
    free(target);
}

static void build(bench *b) {
    loci_pair_build_options usual = {0};
    structured_generate(&b->f, b->o.tokens, b->o.q_heads, b->o.kv_heads, b->o.dim);
    must(&b->err, fixture_build(&b->f, NULL, 0, LOCI_EXTENT_TOKENS_MAX, 0, &usual, &b->err));
    const loci_backend_ops *ops = b->f.backend->ops;
    b->views = need(calloc(b->o.layers, sizeof *b->views));
    for (uint32_t l = 0; l < b->o.layers; l++) {
        b->views[l] = need(calloc(b->f.extents, sizeof *b->views[l]));
        for (uint32_t e = 0; e < b->f.extents; e++) {
            b->views[l][e] = b->f.views[e];
            must(&b->err, ops->wrap(b->f.backend, b->f.memory[e], b->f.memory_bytes[e],
                                    &b->views[l][e].buffer, &b->err));
        }
    }
    b->values = (size_t)b->o.q_heads * b->o.dim;
    b->got = need(calloc(b->values + b->o.q_heads, sizeof *b->got));
    draw_queries(b);
    must(&b->err, ops->alloc(b->f.backend, FLUSH_BYTES, &b->flush, &b->err));
    must(&b->err, ops->alloc(b->f.backend, 2 * (b->values + b->o.q_heads) * sizeof(float),
                             &b->memory, &b->err));
    must(&b->err, ops->lookup_create(b->f.backend, &b->lookup, &b->err));
    must(&b->err, loci_cuda_try(cudaEventCreate(&b->begin), "event", &b->err));
    must(&b->err, loci_cuda_try(cudaEventCreate(&b->end), "event", &b->err));
}

static void close_bench(bench *b) {
    const loci_backend_ops *ops = b->f.backend->ops;
    ops->lookup_free(b->f.backend, b->lookup);
    for (uint32_t l = 0; l < b->o.layers; l++) {
        for (uint32_t e = 0; e < b->f.extents; e++) ops->free(b->f.backend, b->views[l][e].buffer);
        free(b->views[l]);
    }
    free(b->views);
    ops->free(b->f.backend, b->memory);
    ops->free(b->f.backend, b->flush);
    free(b->q); /* with out behind it */
    free(b->got);
    fixture_close(&b->f);
}

/* --- steps ----------------------------------------------------------------------------- */

/* One look-up; ms, with output and log-sum-exp in b->got. */
static float look_up(bench *b, uint32_t layer, const float *q, const loci_select_params *params) {
    const loci_backend_ops *ops = b->f.backend->ops;
    loci_stream *stream = b->f.stream;
    size_t bytes = (b->values + b->o.q_heads) * sizeof(float);
    loci_ref out = loci_ref_at(b->memory, 0),
             lse = loci_ref_at(b->memory, b->values * sizeof(float));
    loci_ref q_at = loci_ref_at(b->memory, bytes);
    loci_ref steady = loci_ref_at(b->memory, bytes + b->values * sizeof(float));
    loci_corpus_view view = b->f.view;
    view.extents = b->views[layer];
    for (uint32_t h = 0; h < b->o.q_heads; h++) b->got[h] = 4.0f;
    ops->upload(stream, steady, b->got, b->o.q_heads * sizeof(float));
    ops->upload(stream, q_at, q, b->values * sizeof(float));
    (void)cudaMemsetAsync(b->flush->device, 1, FLUSH_BYTES, stream->stream);
    (void)cudaEventRecord(b->begin, stream->stream);
    ops->lookup_begin(stream, b->lookup, &view, 0, q_at, (uint32_t)b->values, 1, b->o.q_heads,
                      1.0f / sqrtf((float)b->o.dim), steady, params);
    ops->score_nodes(stream, b->lookup);
    ops->score_codes(stream, b->lookup);
    ops->select(stream, b->lookup);
    ops->attend_sparse(stream, b->lookup, out, (uint32_t)b->values, lse);
    (void)cudaEventRecord(b->end, stream->stream);
    ops->download(stream, b->got, out, bytes);
    must(&b->err, ops->sync(stream, &b->err));
    float ms = 0.0f;
    must(&b->err, loci_cuda_try(cudaEventElapsedTime(&ms, b->begin, b->end), "event", &b->err));
    return ms;
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static double median(float *ms, size_t count) {
    qsort(ms, count, sizeof *ms, compare_floats);
    return (double)ms[count / 2];
}

static double share_of(const loci_cuda_pairs_stats *a, const loci_cuda_pairs_stats *b) {
    double hits = (double)(b->row_hits - a->row_hits);
    double all = hits + (double)(b->row_misses - a->row_misses);
    return all > 0.0 ? hits / all : 0.0;
}

/* The steps of one drift. check: against the results on the device, else they are those. */
static void run_steps(bench *b, const char *where, uint32_t keep, bool check) {
    loci_select_params params, all = {.mode = LOCI_MODE_DENSE};
    loci_select_defaults(&params);
    loci_select_reach(&params, LOCI_REACH_ANSWER);
    uint32_t layers = b->o.layers, steps = b->o.steps;
    float *ms = need(calloc((size_t)steps * layers, sizeof *ms)), dense = 0.0f;
    bool equal = true;
    /* Everything is where it belongs, and the cache of rows is there and empty. */
    for (uint32_t l = 0; l < layers; l++) (void)look_up(b, l, at(b, b->q, keep, 0, l), &all);
    dense = look_up(b, 0, at(b, b->q, keep, 0, 0), &all);
    loci_cuda_pairs_stats before = stats_of(b), first = before, middle = before;
    for (uint32_t s = 0; s < steps; s++) {
        for (uint32_t l = 0; l < layers; l++) {
            ms[s * layers + l] = look_up(b, l, at(b, b->q, keep, s, l), &params);
            float *expected = at(b, b->out, keep, s, l);
            if (!check) memcpy(expected, b->got, b->values * sizeof *expected);
            equal = equal && memcmp(expected, b->got, b->values * sizeof *expected) == 0;
        }
        if (s == 0) first = stats_of(b);
        if (s == steps / 2 - 1) middle = stats_of(b);
    }
    loci_cuda_pairs_stats last = stats_of(b);
    double bytes = (double)b->o.tokens * b->o.kv_heads * b->o.dim * 4;
    double rows = (double)(last.row_hits + last.row_misses - middle.row_hits - middle.row_misses) /
                  ((double)(steps - steps / 2) * layers);
    printf(
        "{\"bench\":\"cuda_tiers\",\"where\":\"%s\",\"tokens\":%u,\"q_heads\":%u,\"kv_heads\":%u,"
        "\"dim\":%u,\"layers\":%u,\"steps\":%u,\"keep\":%.2f,\"ms_first\":%.4f,\"ms_last\":%.4f,"
        "\"hit_first\":%.4f,\"hit_last\":%.4f,\"rows\":%.0f,\"evicted\":%llu,\"dense_ms\":%.3f,"
        "\"dense_gbps\":%.1f,\"device_mib\":%llu,\"of_rows_mib\":%llu,\"host_mib\":%llu,"
        "\"equal\":%s}\n",
        where, b->o.tokens, b->o.q_heads, b->o.kv_heads, b->o.dim, layers, steps,
        (double)b->o.keep[keep], median(ms, layers),
        median(ms + (size_t)steps / 2 * layers, (size_t)(steps - steps / 2) * layers),
        share_of(&before, &first), share_of(&middle, &last), rows,
        (unsigned long long)(last.row_evictions - before.row_evictions), (double)dense,
        bytes / (double)dense / 1e6, (unsigned long long)(last.bytes >> 20),
        (unsigned long long)(last.frames * 4 * b->o.dim >> 20),
        (unsigned long long)(last.host_bytes >> 20), check ? (equal ? "true" : "false") : "null");
    (void)fflush(stdout);
    free(ms);
}

/* --- what reusing a selection loses ---------------------------------------------------- */

typedef struct picked {
    loci_selected *at;
    size_t count;
} picked;

static picked read_selected(bench *b) {
    const loci_backend_ops *ops = b->f.backend->ops;
    picked p = {NULL, 0};
    ops->lookup_selected(b->f.stream, b->lookup, NULL, 0, &p.count);
    must(&b->err, ops->sync(b->f.stream, &b->err));
    p.at = need(malloc((p.count + 1) * sizeof *p.at));
    ops->lookup_selected(b->f.stream, b->lookup, p.at, p.count, &p.count);
    must(&b->err, ops->sync(b->f.stream, &b->err));
    return p;
}

/* The log-sum-exp of a query head's logits over tokens selected for its KV head. */
static double lse_over(const bench *b, const picked *p, const float *q, uint32_t head) {
    uint32_t kv_head = head / (b->o.q_heads / b->o.kv_heads), dim = b->o.dim;
    double sum = 0.0, max = -INFINITY;
    for (size_t i = 0; i < p->count; i++) {
        if (p->at[i].kv_head != kv_head) continue;
        uint32_t t = fixture_position(&b->f, 0, p->at[i].extent, kv_head, p->at[i].slot);
        const uint16_t *key = b->f.k[kv_head] + (size_t)t * dim;
        float dot = 0.0f;
        for (uint32_t d = 0; d < dim; d++) dot += q[head * dim + d] * loci_bf16_to_f32(key[d]);
        double logit = (double)dot / sqrt((double)dim);
        if (logit > max) {
            sum *= exp(max - logit);
            max = logit;
        }
        sum += exp(logit - max);
    }
    return sum > 0.0 ? max + log(sum) : -INFINITY;
}

static void measure_lost(bench *b, uint32_t keep) {
    loci_select_params params, all = {.mode = LOCI_MODE_DENSE};
    loci_select_defaults(&params);
    loci_select_reach(&params, LOCI_REACH_ANSWER);
    picked last = {NULL, 0};
    double own = 0.0, reused = 0.0, count = 0.0, common = 0.0;
    float *lse = need(calloc(b->o.q_heads, sizeof *lse));
    uint32_t steps = b->o.steps < LOST_STEPS ? b->o.steps : LOST_STEPS;
    for (uint32_t s = 0; s < steps; s++) {
        const float *q = at(b, b->q, keep, s, 0);
        (void)look_up(b, 0, q, &params);
        memcpy(lse, b->got + b->values, b->o.q_heads * sizeof *lse);
        picked now = read_selected(b);
        (void)look_up(b, 0, q, &all);
        for (uint32_t h = 0; h < b->o.q_heads && s > 0; h++) {
            double whole = (double)b->got[b->values + h];
            own += 1.0 - exp((double)lse[h] - whole);
            reused += 1.0 - exp(lse_over(b, &last, q, h) - whole);
            count++;
        }
        size_t both = 0;
        /* Sorted by extent, KV head, row and slot. */
        for (size_t i = 0, j = 0; i < now.count && j < last.count;) {
            const loci_selected *x = &now.at[i], *y = &last.at[j];
            uint64_t a = (uint64_t)x->extent << 40 | (uint64_t)x->kv_head << 32 | x->slot;
            uint64_t c = (uint64_t)y->extent << 40 | (uint64_t)y->kv_head << 32 | y->slot;
            both += a == c;
            i += a <= c;
            j += a >= c;
        }
        if (s > 0) common += (double)both / (double)(now.count ? now.count : 1) / (steps - 1);
        free(last.at);
        last = now;
    }
    free(last.at);
    free(lse);
    if (count == 0.0) return;
    printf("{\"bench\":\"cuda_recycled\",\"tokens\":%u,\"keep\":%.2f,\"steps\":%u,\"common\":%.4f,"
           "\"lost\":%.5f,\"lost_reused\":%.5f}\n",
           b->o.tokens, (double)b->o.keep[keep], steps - 1, common, own / count, reused / count);
    (void)fflush(stdout);
}

/* GB/s of a copy from page-locked memory. */
static void copy_rate(bench *b) {
    void *host = NULL;
    float best = 1e9f, ms = 0.0f;
    must(&b->err, loci_cuda_try(cudaMallocHost(&host, FLUSH_BYTES), "cudaMallocHost", &b->err));
    for (int i = 0; i < 5; i++) {
        (void)cudaEventRecord(b->begin, b->f.stream->stream);
        (void)cudaMemcpyAsync(b->flush->device, host, FLUSH_BYTES, cudaMemcpyHostToDevice,
                              b->f.stream->stream);
        (void)cudaEventRecord(b->end, b->f.stream->stream);
        must(&b->err, loci_cuda_try(cudaStreamSynchronize(b->f.stream->stream), "copy", &b->err));
        (void)cudaEventElapsedTime(&ms, b->begin, b->end);
        if (ms < best) best = ms;
    }
    (void)cudaFreeHost(host);
    printf("{\"bench\":\"cuda_bus\",\"gbps\":%.1f}\n", (double)FLUSH_BYTES / (double)best / 1e6);
    (void)fflush(stdout);
}

/* --- main ------------------------------------------------------------------------------ */

static void run(bench *b) {
    const uint64_t no_end = UINT64_MAX / 2;
    copy_rate(b);
    for (uint32_t k = 0; k < b->o.keeps; k++) run_steps(b, "device", k, false);
    for (uint32_t k = 0; k < b->o.keeps; k++) measure_lost(b, k);
    loci_cuda_pairs_stats stats = stats_of(b);
    uint64_t index = stats.bytes - stats.kv_bytes;
    loci_cuda_pairs_limit(pairs_of(b), index / 3 * 4 + index / 16, no_end);
    /* Nobody holds what is to move. */
    b->f.backend->ops->lookup_free(b->f.backend, b->lookup);
    must(&b->err, b->f.backend->ops->lookup_create(b->f.backend, &b->lookup, &b->err));
    loci_cuda_pairs_lower(pairs_of(b));
    for (uint32_t k = 0; k < b->o.keeps; k++) {
        run_steps(b, "below", k, true);
        (void)loci_cuda_pairs_shrink(pairs_of(b), 1); /* the cache of rows */
        loci_cuda_pairs_limit(pairs_of(b), index / 3 * 4 + index / 16, no_end);
    }
    loci_cuda_pairs_limit(pairs_of(b), index, no_end);
    run_steps(b, "bus", 0, true);
}

static bool parse(options *o, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        uint32_t *to[3] = {NULL, NULL, NULL};
        if (strcmp(argv[i], "--keep") == 0 && argc - i > 1 && o->keeps < KEEPS_MAX) {
            o->keep[o->keeps++] = strtof(argv[++i], NULL);
            continue;
        }
        if (strcmp(argv[i], "--layers") == 0) to[0] = &o->layers;
        if (strcmp(argv[i], "--steps") == 0) to[0] = &o->steps;
        if (strcmp(argv[i], "--heads") == 0) {
            to[0] = &o->q_heads;
            to[1] = &o->kv_heads;
            to[2] = &o->dim;
        }
        if (!to[0]) {
            if (o->tokens) return false;
            o->tokens = (uint32_t)strtoul(argv[i], NULL, 10);
            continue;
        }
        for (int n = 0; n < 3 && to[n]; n++) {
            if (++i >= argc) return false;
            *to[n] = (uint32_t)strtoul(argv[i], NULL, 10);
        }
    }
    if (o->keeps == 0) o->keep[o->keeps++] = 0.9f;
    return o->tokens > 0 && o->layers > 0 && o->steps > 1 && o->kv_heads > 0 &&
           o->q_heads % o->kv_heads == 0 && o->dim % 16 == 0 && o->dim > 0;
}

int main(int argc, char **argv) {
    bench b = {.o = {.layers = 4, .steps = 24, .q_heads = 28, .kv_heads = 4, .dim = 128}};
    if (!parse(&b.o, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_cuda_tiers [--layers N] [--steps N] [--heads Q KV DIM] "
                              "[--keep SHARE]... TOKENS\n");
        return 2;
    }
    loci_backend_close(open_or_skip(NULL)); /* the fixture opens its own */
    build(&b);
    run(&b);
    close_bench(&b);
    return 0;
}
