/* SPDX-License-Identifier: Apache-2.0
 *
 * One layer's attention of a decoding step on the GPU: hierarchical look-ups, dense
 * mode, and dense attention over plain K and V. One JSON line each.
 *
 *   bench_cuda_attention [--layers N] [--steps N] [--rows N]... [--heads Q KV DIM]
 *                        [--reach ROOTS CANDIDATES TOP_P]... [--squeezed SHARE]
 *                        [--kv FILE | TOKENS]
 *
 * Keys are the generator's (topics around a common offset); queries look for one planted key each.
 * Every layer has device copies of its own, a step takes the next layer and fresh queries, and
 * memory larger than the cache is written between two steps, so that nothing is read from the L2.
 * --kv: keys, values and queries of a model instead, layers as it has them (a key-value dump:
 * tests/attention/corpus_fixture.h, bench_recall --dump). --rows: query tokens of a step, of a dump
 * 1 (decoding) or more (a question's, as many as it has). --reach adds look-ups with other rates
 * than the defaults, --squeezed some that keep about that share of the tokens. ms: median over
 * steps, from begin to the output, by events on the stream; stages: means of begin, score_nodes,
 * score_codes, select, attend_sparse over steps of their own, since an event between two kernels
 * keeps them apart; host_ms: until the stream has all of it. error: relative L2 error of the output
 * against dense mode's, mean over steps and heads; recall: the share of the attention mass that was
 * read. Of a dump, outputs are weighed against what is attended beside the corpus, and rows and
 * heads that give the corpus less than half are not counted. bytes: what must be read, by the
 * look-up's figures.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "base/clock.h"
#include "base/half.h"
#include "tests/attention/corpus_fixture.h"
#include "tests/bench/gpu/bench.h"
#include "tests/bench/gpu/structured.h"

#define REACHES_MAX 8u
#define ROWS_MAX 4u
#define DRAWS 8u /* of queries that thresholds of mode squeezed are made of */
#define STAGES 5
#define WARM_STEPS 3u

typedef struct reach {
    float roots, candidates, top_p;
} reach;

typedef struct options {
    uint32_t layers, steps, q_heads, kv_heads, dim, tokens, reaches, row_counts;
    uint32_t rows[ROWS_MAX];
    reach reach[REACHES_MAX];
    float squeezed; /* share of the tokens; 0 = not run */
    const char *kv;
} options;

typedef struct bench {
    options o;
    fixture f;                /* all tokens, one layer or a dump's; keys stay for the queries */
    loci_extent_view **views; /* [layers][extents]: the same bytes, copied for each layer */
    uint32_t rows_max;
    loci_buffer *memory, *flush;
    size_t flush_bytes;
    cudaEvent_t begin, end, stage[STAGES];
    loci_error err;
} bench;

/* --- the corpus ------------------------------------------------------------------------ */

/* A view of the extents for each layer, over buffers of its own. */
static void copy_layers(bench *b) {
    const fixture *f = &b->f;
    b->views = need(calloc(b->o.layers, sizeof *b->views));
    for (uint32_t l = 0; l < b->o.layers; l++) {
        b->views[l] = need(calloc(f->extents, sizeof *b->views[l]));
        for (uint32_t e = 0; e < f->extents; e++) {
            b->views[l][e] = f->views[e];
            must(&b->err, f->backend->ops->wrap(f->backend, f->memory[e], f->memory_bytes[e],
                                                &b->views[l][e].buffer, &b->err));
        }
    }
}

static loci_corpus_view view_of(const bench *b, uint32_t layer) {
    loci_corpus_view view = b->f.view;
    if (!b->o.kv) view.extents = b->views[layer];
    return view;
}

/* --- steps ----------------------------------------------------------------------------- */

typedef struct place {
    loci_ref q, steady, out, lse;
    size_t values, heads; /* bytes */
} place;

static place place_of(const bench *b, uint32_t rows) {
    place p;
    p.heads = (size_t)rows * b->o.q_heads * sizeof(float);
    p.values = p.heads * b->o.dim;
    p.q = loci_ref_at(b->memory, 0);
    p.out = loci_ref_at(b->memory, p.values);
    p.steady = loci_ref_at(b->memory, 2 * p.values);
    p.lse = loci_ref_at(b->memory, 2 * p.values + p.heads);
    return p;
}

/* What one step asks of a layer. */
typedef struct question {
    uint32_t rows, layer;
    float *q, *steady; /* [rows][q_heads][dim], [rows][q_heads]; of a dump its own */
} question;

static void draw_queries(const bench *b, uint64_t *rng, question *ask) {
    uint32_t group = b->o.q_heads / b->o.kv_heads, dim = b->o.dim;
    uint64_t tokens = b->f.view.tokens;
    for (uint32_t h = 0; h < ask->rows * b->o.q_heads; h++) {
        const uint16_t *key = b->f.k[h % b->o.q_heads / group] + fixture_random(rng) % tokens * dim;
        for (uint32_t i = 0; i < dim; i++)
            ask->q[(size_t)h * dim + i] =
                1.2f * loci_bf16_to_f32(key[i]) + 0.5f * fixture_normal(rng);
        ask->steady[h] = 4.0f;
    }
}

/* The next step of a dump that has one row, or more. */
static void next_recorded(const bench *b, bool one, uint32_t *at, question *ask) {
    const fixture *f = &b->f;
    for (uint32_t tried = 0;; tried++) {
        uint32_t s = (*at)++ % f->steps, row = f->step_begin[s];
        LOCI_ASSERT(tried <= f->steps); /* there is such a step */
        ask->rows = f->step_begin[s + 1] - row;
        if ((ask->rows == 1) != one) continue;
        if (ask->rows > b->rows_max) ask->rows = b->rows_max;
        ask->q = f->q[ask->layer] + (size_t)row * f->q_heads * f->dim;
        ask->steady = f->steady[ask->layer] + (size_t)row * f->q_heads;
        return;
    }
}

/* Where the questions of a run come from: the same ones each time. */
typedef struct source {
    uint32_t rows, at, turn;
    uint64_t rng;
    question ask;
} source;

static source open_source(const bench *b, uint32_t rows) {
    source from = {.rows = rows, .rng = 99};
    if (b->o.kv) return from;
    from.ask.q = need(calloc((size_t)rows * b->o.q_heads * (b->o.dim + 1), sizeof(float)));
    from.ask.steady = from.ask.q + (size_t)rows * b->o.q_heads * b->o.dim;
    return from;
}

static const question *next_question(const bench *b, source *from) {
    from->ask.layer = from->turn % b->o.layers;
    if (b->o.kv) {
        uint32_t at = from->at; /* all layers are asked by the same step */
        next_recorded(b, from->rows == 1, &at, &from->ask);
        if (from->turn % b->o.layers == b->o.layers - 1) from->at = at;
    } else {
        from->ask.rows = from->rows;
        draw_queries(b, &from->rng, &from->ask);
    }
    from->turn++;
    return &from->ask;
}

static void close_source(const bench *b, source *from) {
    if (!b->o.kv) free(from->ask.q); /* with steady behind it */
}

typedef struct result {
    float *out, *lse;
    loci_lookup_stats stats;
    float ms, stage_ms[STAGES], host_ms;
} result;

static void flush_cache(bench *b) {
    (void)loci_cuda_ok(b->f.stream,
                       cudaMemsetAsync(b->flush->device, 1, b->flush_bytes, b->f.stream->stream),
                       "flush");
}

static void look_up(bench *b, loci_lookup *lookup, const loci_corpus_view *view,
                    const loci_select_params *params, const question *ask, bool staged, result *r) {
    const loci_backend_ops *ops = b->f.backend->ops;
    loci_stream *stream = b->f.stream;
    place p = place_of(b, ask->rows);
    ops->upload(stream, p.q, ask->q, p.values);
    ops->upload(stream, p.steady, ask->steady, p.heads);
    flush_cache(b);
    (void)cudaEventRecord(b->begin, stream->stream);
    uint64_t start = loci_now_ns();
    ops->lookup_begin(stream, lookup, view, b->o.kv ? ask->layer : 0, p.q, b->o.q_heads * b->o.dim,
                      ask->rows, b->o.q_heads, 1.0f / sqrtf((float)b->o.dim), p.steady, params);
    if (staged) (void)cudaEventRecord(b->stage[0], stream->stream);
    ops->score_nodes(stream, lookup);
    if (staged) (void)cudaEventRecord(b->stage[1], stream->stream);
    ops->score_codes(stream, lookup);
    if (staged) (void)cudaEventRecord(b->stage[2], stream->stream);
    ops->select(stream, lookup);
    if (staged) (void)cudaEventRecord(b->stage[3], stream->stream);
    ops->attend_sparse(stream, lookup, p.out, b->o.q_heads * b->o.dim, p.lse);
    (void)cudaEventRecord(b->stage[4], stream->stream);
    r->host_ms = (float)((double)(loci_now_ns() - start) / 1e6);
    ops->lookup_stats(stream, lookup, &r->stats);
    ops->download(stream, r->out, p.out, p.values);
    ops->download(stream, r->lse, p.lse, p.heads);
    must(&b->err, ops->sync(stream, &b->err));
    for (int i = 0; i < STAGES && staged; i++)
        must(&b->err,
             loci_cuda_try(
                 cudaEventElapsedTime(&r->stage_ms[i], i ? b->stage[i - 1] : b->begin, b->stage[i]),
                 "event", &b->err));
    must(&b->err, loci_cuda_try(cudaEventElapsedTime(&r->ms, b->begin, b->stage[STAGES - 1]),
                                "event", &b->err));
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static uint64_t bytes_of(const loci_lookup_stats *s) {
    return s->root_bytes + s->leaf_bytes + s->code_bytes + s->hash_bytes + s->kv_bytes +
           s->tail_bytes;
}

typedef struct tally {
    float *ms, *host_ms;
    double error, recall, bytes, selected, candidates, rows, heads, stage_ms[STAGES];
    uint32_t steps, staged;
} tally;

/* The weight that the corpus's part has in the layer's output. */
static double weight_of(const bench *b, float lse, float steady) {
    return b->o.kv ? 1.0 / (1.0 + exp((double)steady - (double)lse)) : 1.0;
}

static void compare(const bench *b, const question *ask, const result *sparse, const result *dense,
                    tally *t) {
    uint32_t sets = ask->rows * b->o.kv_heads;
    /* The first row of a dump's question is the shared prefix, which sees nothing else. */
    uint32_t first = b->o.kv && ask->rows > 1 ? b->o.q_heads : 0;
    for (uint32_t h = first; h < ask->rows * b->o.q_heads; h++) {
        double off = 0.0, norm = 0.0, ours = weight_of(b, sparse->lse[h], ask->steady[h]);
        double all = weight_of(b, dense->lse[h], ask->steady[h]);
        if (b->o.kv && all < 0.5) continue;
        for (uint32_t i = 0; i < b->o.dim; i++) {
            double x = ours * (double)sparse->out[h * b->o.dim + i];
            double y = all * (double)dense->out[h * b->o.dim + i];
            off += (x - y) * (x - y);
            norm += y * y;
        }
        t->error += norm > 0.0 ? sqrt(off / norm) : 0.0;
        t->recall += exp((double)sparse->lse[h] - (double)dense->lse[h]);
        t->heads++;
    }
    t->bytes += (double)bytes_of(&sparse->stats);
    t->selected += (double)sparse->stats.selected_tokens / sets;
    t->candidates += (double)sparse->stats.candidate_tokens / sets;
    t->rows += ask->rows;
}

static void print_line(const bench *b, const char *mode, const loci_select_params *params, tally *t,
                       double gbps) {
    qsort(t->ms, t->steps, sizeof *t->ms, compare_floats);
    qsort(t->host_ms, t->steps, sizeof *t->host_ms, compare_floats);
    double ms = (double)t->ms[t->steps / 2], n = t->steps, bytes = t->bytes / n;
    double staged = t->staged ? t->staged : 1.0, heads = t->heads > 0.0 ? t->heads : 1.0;
    printf("{\"bench\":\"cuda_attention\",\"mode\":\"%s\",\"keys\":\"%s\",\"tokens\":%llu,"
           "\"q_heads\":%u,\"kv_heads\":%u,\"dim\":%u,\"rows\":%.1f,\"layers\":%u,\"steps\":%u,"
           "\"ms\":%.4f,"
           "\"ms_p90\":%.4f,\"host_ms\":%.4f,\"bytes\":%.0f,\"gbps\":%.1f,\"of_copy\":%.3f,"
           "\"error\":%.5f,\"recall\":%.5f,\"selected_head\":%.0f,\"candidates_head\":%.0f,"
           "\"reach\":[%g,%g,%g],\"stages\":[%.4f,%.4f,%.4f,%.4f,%.4f]}\n",
           mode, b->o.kv ? "a model's" : "generated", (unsigned long long)b->f.view.tokens,
           b->o.q_heads, b->o.kv_heads, b->o.dim, t->rows / n, b->o.layers, t->steps, ms,
           (double)t->ms[t->steps * 9 / 10], (double)t->host_ms[t->steps / 2], bytes,
           bytes / ms / 1e6, bytes / ms / 1e6 / gbps, t->error / heads, t->recall / heads,
           t->selected / n, t->candidates / n, (double)params->roots, (double)params->candidates,
           (double)params->top_p, t->stage_ms[0] / staged, t->stage_ms[1] / staged,
           t->stage_ms[2] / staged, t->stage_ms[3] / staged, t->stage_ms[4] / staged);
    (void)fflush(stdout);
}

static result new_result(const bench *b) {
    result r = {0};
    size_t heads = (size_t)b->rows_max * b->o.q_heads;
    r.out = need(calloc(heads * (b->o.dim + 1), sizeof(float)));
    r.lse = r.out + heads * b->o.dim;
    return r;
}

/* Steps of one mode beside dense mode over the same layer and queries. */
static void run_mode(bench *b, uint32_t rows, const char *mode, const loci_select_params *params,
                     double gbps) {
    const loci_backend_ops *ops = b->f.backend->ops;
    loci_select_params all = {.mode = LOCI_MODE_DENSE};
    loci_lookup *lookup, *whole;
    uint32_t steps = b->o.steps + WARM_STEPS;
    tally t = {.ms = need(calloc(steps, sizeof(float))),
               .host_ms = need(calloc(steps, sizeof(float)))};
    result sparse = new_result(b), dense = new_result(b);
    source from = open_source(b, rows);
    must(&b->err, ops->lookup_create(b->f.backend, &lookup, &b->err));
    must(&b->err, ops->lookup_create(b->f.backend, &whole, &b->err));
    loci_corpus_view view = {0};
    for (uint32_t s = 0; s < 2 * steps + b->o.layers; s++) { /* first each layer once */
        bool staged = s >= steps + b->o.layers;
        const question *ask = next_question(b, &from);
        view = view_of(b, ask->layer);
        look_up(b, lookup, &view, params, ask, staged, &sparse);
        if (s < WARM_STEPS + b->o.layers) continue;
        for (int i = 0; i < STAGES && staged; i++) t.stage_ms[i] += (double)sparse.stage_ms[i];
        t.staged += staged;
        if (staged) continue;
        look_up(b, whole, &view, &all, ask, false, &dense);
        t.ms[t.steps] = sparse.ms;
        t.host_ms[t.steps++] = sparse.host_ms;
        compare(b, ask, &sparse, &dense, &t);
    }
    print_line(b, mode, params, &t, gbps);
    ops->lookup_free(b->f.backend, lookup);
    ops->lookup_free(b->f.backend, whole);
    close_source(b, &from);
    free(t.ms);
    free(t.host_ms);
    free(sparse.out); /* with lse behind it */
    free(dense.out);
}

/* --- mode squeezed --------------------------------------------------------------------- */

typedef struct scored {
    float score, root;
    uint32_t tokens;
} scored;

static int compare_scored(const void *a, const void *b) {
    const scored *x = a, *y = b;
    return (x->score < y->score) - (x->score > y->score);
}

/* The score above which nodes hold `share` of all tokens, those below dropped roots not counted. */
static float threshold_of(scored *nodes, size_t count, float root_threshold, double share) {
    double all = 0.0, taken = 0.0;
    for (size_t i = 0; i < count; i++) all += nodes[i].tokens;
    qsort(nodes, count, sizeof *nodes, compare_scored);
    for (size_t i = 0; i < count; i++) {
        if (!(nodes[i].root > root_threshold)) continue;
        taken += nodes[i].tokens;
        if (taken >= share * all) return nodes[i].score;
    }
    return 0.0f;
}

/* Scores of a level for the next question, behind those at *count. */
static void score_level(bench *b, loci_lookup *lookup, source *from, unsigned level, scored *out,
                        size_t room, size_t *count) {
    const loci_backend_ops *ops = b->f.backend->ops;
    const question *ask = next_question(b, from);
    loci_select_params params = {.mode = LOCI_MODE_SQUEEZED};
    loci_corpus_view view = view_of(b, ask->layer);
    place p = place_of(b, ask->rows);
    float *scores = need(calloc(2 * room, sizeof *scores));
    uint32_t *tokens = need(calloc(room, sizeof *tokens));
    size_t found;
    ops->upload(b->f.stream, p.q, ask->q, p.values);
    ops->lookup_begin(b->f.stream, lookup, &view, b->o.kv ? ask->layer : 0, p.q,
                      b->o.q_heads * b->o.dim, ask->rows, b->o.q_heads,
                      1.0f / sqrtf((float)b->o.dim), loci_ref_at(NULL, 0), &params);
    ops->score_nodes(b->f.stream, lookup);
    ops->lookup_squeezed(b->f.stream, lookup, level, scores, tokens, level ? scores + room : NULL,
                         room, &found);
    must(&b->err, ops->sync(b->f.stream, &b->err));
    LOCI_ASSERT(found <= room);
    for (size_t i = 0; i < found; i++)
        out[(*count)++] = (scored){scores[i], level ? scores[room + i] : 1.0f, tokens[i]};
    free(scores);
    free(tokens);
}

/* Thresholds that keep about a share of the tokens, roots half of them, over some questions. */
static void set_thresholds(bench *b, uint32_t rows, loci_select_params *params) {
    const loci_backend_ops *ops = b->f.backend->ops;
    size_t room = (size_t)b->o.tokens * b->o.kv_heads / 4;
    scored *nodes = need(malloc(DRAWS * room * sizeof *nodes));
    loci_lookup *lookup;
    must(&b->err, ops->lookup_create(b->f.backend, &lookup, &b->err));
    for (unsigned level = 0; level < 2; level++) {
        source from = open_source(b, rows);
        size_t count = 0;
        for (uint32_t i = 0; i < DRAWS; i++)
            score_level(b, lookup, &from, level, nodes, room, &count);
        double share = level ? (double)b->o.squeezed : fmax(0.5, 2.0 * (double)b->o.squeezed);
        params->squeezed_threshold[level] =
            threshold_of(nodes, count, level ? params->squeezed_threshold[0] : -1.0f, share);
        close_source(b, &from);
    }
    ops->lookup_free(b->f.backend, lookup);
    free(nodes);
}

/* --- ceilings -------------------------------------------------------------------------- */

/* GB/s of a device-to-device copy, bytes read and written together. */
static double copy_rate(bench *b) {
    size_t half = b->flush_bytes / 2;
    float best = 1e9f, ms;
    cudaStream_t stream = b->f.stream->stream;
    for (int i = 0; i < 6; i++) {
        (void)cudaEventRecord(b->begin, stream);
        must(&b->err, loci_cuda_try(cudaMemcpyAsync(b->flush->device, b->flush->device + half, half,
                                                    cudaMemcpyDeviceToDevice, stream),
                                    "copy", &b->err));
        (void)cudaEventRecord(b->end, stream);
        must(&b->err, loci_cuda_try(cudaStreamSynchronize(stream), "copy", &b->err));
        (void)cudaEventElapsedTime(&ms, b->begin, b->end);
        if (i > 0 && ms < best) best = ms;
    }
    printf("{\"bench\":\"cuda_copy\",\"backend\":\"%s\",\"bytes\":%zu,\"gbps\":%.1f}\n",
           b->f.backend->ops->describe(b->f.backend), half,
           2.0 * (double)half / (double)best / 1e6);
    return 2.0 * (double)half / (double)best / 1e6;
}

/* attend_dense over plain bf16 K and V, as the flat part is read. */
static void run_plain(bench *b, uint32_t query_rows, double gbps) {
    uint32_t tokens = b->o.tokens;
    loci_select_params none = {.mode = LOCI_MODE_DENSE};
    const loci_backend_ops *ops = b->f.backend->ops;
    size_t width = (size_t)b->o.kv_heads * b->o.dim, bytes = tokens * width * sizeof(uint16_t);
    place p = place_of(b, query_rows);
    loci_attend_span span = {0, query_rows, 0, tokens};
    loci_buffer **kv = need(calloc(2 * b->o.layers, sizeof(loci_buffer *)));
    tally t = {.ms = need(calloc(b->o.steps, sizeof(float))),
               .host_ms = need(calloc(b->o.steps, sizeof(float)))};
    uint16_t *rows = need(malloc(bytes));
    for (uint32_t i = 0; i < 2 * b->o.layers; i++) {
        for (size_t r = 0; r < (size_t)tokens * b->o.kv_heads && i < 2; r++)
            memcpy(rows + r * b->o.dim,
                   (i ? b->f.v : b->f.k)[r % b->o.kv_heads] + r / b->o.kv_heads * b->o.dim,
                   b->o.dim * sizeof *rows);
        must(&b->err, ops->alloc(b->f.backend, bytes, &kv[i], &b->err));
        ops->upload(b->f.stream, loci_ref_at(kv[i], 0), rows, bytes);
    }
    free(rows);
    for (uint32_t s = 0; s < b->o.steps + WARM_STEPS; s++) {
        uint32_t l = s % b->o.layers;
        loci_attend_dense args = {.q = p.q,
                                  .k = loci_ref_at(kv[2 * l], 0),
                                  .v = loci_ref_at(kv[2 * l + 1], 0),
                                  .out = p.out,
                                  .lse = p.lse,
                                  .q_stride = b->o.q_heads * b->o.dim,
                                  .kv_stride = (uint32_t)width,
                                  .out_stride = b->o.q_heads * b->o.dim,
                                  .q_heads = b->o.q_heads,
                                  .kv_heads = b->o.kv_heads,
                                  .head_dim = b->o.dim,
                                  .kv_dtype = LOCI_BF16,
                                  .precision = LOCI_BF16,
                                  .scale = 1.0f / sqrtf((float)b->o.dim),
                                  .spans = &span,
                                  .span_count = 1};
        float ms;
        flush_cache(b);
        (void)cudaEventRecord(b->begin, b->f.stream->stream);
        ops->attend_dense(b->f.stream, &args);
        (void)cudaEventRecord(b->end, b->f.stream->stream);
        must(&b->err, ops->sync(b->f.stream, &b->err));
        (void)cudaEventElapsedTime(&ms, b->begin, b->end);
        if (s < WARM_STEPS) continue;
        t.ms[t.steps++] = ms;
        t.bytes += 2.0 * (double)bytes;
        t.rows += query_rows;
        t.recall++;
        t.heads++;
    }
    print_line(b, "plain dense", &none, &t, gbps);
    for (uint32_t i = 0; i < 2 * b->o.layers; i++) ops->free(b->f.backend, kv[i]);
    free(kv);
    free(t.ms);
    free(t.host_ms);
}

static bool parse(options *o, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        uint32_t *to[3] = {NULL, NULL, NULL};
        if (strcmp(argv[i], "--reach") == 0) {
            if (o->reaches == REACHES_MAX || argc - i < 4) return false;
            o->reach[o->reaches++] = (reach){strtof(argv[i + 1], NULL), strtof(argv[i + 2], NULL),
                                             strtof(argv[i + 3], NULL)};
            i += 3;
            continue;
        }
        if (argc - i > 1 && strcmp(argv[i], "--kv") == 0 && (o->kv = argv[++i])) continue;
        if (argc - i > 1 && strcmp(argv[i], "--squeezed") == 0) {
            o->squeezed = strtof(argv[++i], NULL);
            continue;
        }
        if (strcmp(argv[i], "--layers") == 0) to[0] = &o->layers;
        if (strcmp(argv[i], "--steps") == 0) to[0] = &o->steps;
        if (strcmp(argv[i], "--rows") == 0 && o->row_counts < ROWS_MAX)
            to[0] = &o->rows[o->row_counts++];
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
    if (o->row_counts == 0) o->rows[o->row_counts++] = 1;
    for (uint32_t i = 0; i < o->row_counts; i++)
        if (o->rows[i] == 0) return false;
    return (o->tokens > 0) == !o->kv && o->layers > 0 && o->steps > 0 && o->kv_heads > 0 &&
           o->q_heads % o->kv_heads == 0 && o->dim % 16 == 0 && o->dim > 0;
}

/* Takes shape and queries from a dump. */
static void load(bench *b) {
    options *o = &b->o;
    must(&b->err, fixture_load(&b->f, o->kv, &b->err));
    o->layers = b->f.layers;
    o->q_heads = b->f.q_heads;
    o->kv_heads = b->f.kv_heads;
    o->dim = b->f.dim;
    o->tokens = b->f.tokens;
    b->rows_max = 1;
    for (uint32_t s = 0; s < b->f.steps; s++) {
        uint32_t rows = b->f.step_begin[s + 1] - b->f.step_begin[s];
        if (rows > b->rows_max) b->rows_max = rows;
    }
}

static void build(bench *b) {
    uint64_t start = loci_now_ns();
    if (b->o.kv)
        load(b);
    else
        structured_generate(&b->f, b->o.tokens, b->o.q_heads, b->o.kv_heads, b->o.dim);
    double generated = (double)(loci_now_ns() - start) / 1e9;
    loci_pair_build_options usual = {0};
    start = loci_now_ns();
    must(&b->err, fixture_build(&b->f, NULL, 0, LOCI_EXTENT_TOKENS_MAX, 0, &usual, &b->err));
    printf("{\"bench\":\"index_build_cpu\",\"tokens\":%u,\"pairs\":%u,\"generate_s\":%.1f,"
           "\"build_s\":%.1f}\n",
           b->f.tokens, b->f.extents * b->f.layers * b->f.kv_heads, generated,
           (double)(loci_now_ns() - start) / 1e9);
    (void)fflush(stdout);
}

static void open_device(bench *b) {
    const loci_backend_ops *ops = b->f.backend->ops;
    b->flush_bytes = (size_t)1 << 30;
    must(&b->err, ops->alloc(b->f.backend, b->flush_bytes, &b->flush, &b->err));
    must(&b->err, ops->alloc(b->f.backend, (size_t)b->rows_max * b->o.q_heads * (b->o.dim + 1) * 8,
                             &b->memory, &b->err));
    for (int i = -2; i < STAGES; i++) {
        cudaEvent_t *event = i < 0 ? (i < -1 ? &b->begin : &b->end) : &b->stage[i];
        must(&b->err, loci_cuda_try(cudaEventCreate(event), "event", &b->err));
    }
    if (!b->o.kv) copy_layers(b);
}

static void close_bench(bench *b) {
    const loci_backend_ops *ops = b->f.backend->ops;
    for (uint32_t l = 0; l < b->o.layers && b->views; l++) {
        for (uint32_t e = 0; e < b->f.extents; e++) ops->free(b->f.backend, b->views[l][e].buffer);
        free(b->views[l]);
    }
    free(b->views);
    ops->free(b->f.backend, b->memory);
    ops->free(b->f.backend, b->flush);
    fixture_close(&b->f);
}

/* All modes for one number of rows. */
static void run_rows(bench *b, uint32_t rows, double gbps) {
    loci_select_params params, dense = {.mode = LOCI_MODE_DENSE};
    loci_select_defaults(&params);
    loci_select_reach(&params, rows > 1 ? LOCI_REACH_QUESTION : LOCI_REACH_ANSWER);
    run_mode(b, rows, "hierarchical", &params, gbps);
    for (uint32_t i = 0; i < b->o.reaches; i++) {
        params.roots = b->o.reach[i].roots;
        params.candidates = b->o.reach[i].candidates;
        params.top_p = b->o.reach[i].top_p;
        run_mode(b, rows, "hierarchical", &params, gbps);
    }
    if (b->o.squeezed > 0.0f) {
        params = (loci_select_params){.mode = LOCI_MODE_SQUEEZED};
        set_thresholds(b, rows, &params);
        run_mode(b, rows, "squeezed", &params, gbps);
    }
    run_mode(b, rows, "dense", &dense, gbps);
    if (!b->o.kv) run_plain(b, rows, gbps);
}

int main(int argc, char **argv) {
    bench b = {.o = {.layers = 8, .steps = 40, .q_heads = 28, .kv_heads = 4, .dim = 128}};
    if (!parse(&b.o, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_cuda_attention [--layers N] [--steps N] [--rows N]... "
                              "[--heads Q KV DIM] [--reach ROOTS CANDIDATES TOP_P]... "
                              "[--squeezed SHARE] [--kv FILE | TOKENS]\n");
        return 2;
    }
    loci_backend_close(open_or_skip(NULL)); /* the fixture opens its own */
    for (uint32_t i = 0; i < b.o.row_counts; i++)
        if (b.o.rows[i] > b.rows_max) b.rows_max = b.o.rows[i];
    build(&b);
    open_device(&b);
    double gbps = copy_rate(&b);
    for (uint32_t i = 0; i < b.o.row_counts; i++) run_rows(&b, b.o.rows[i], gbps);
    close_bench(&b);
    return 0;
}
