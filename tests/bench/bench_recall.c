/* SPDX-License-Identifier: Apache-2.0
 *
 * Quality of the index on the model's own KV: hierarchical look-ups with several settings beside
 * exact attention, in every retrieval layer, over the tokens of real questions and their answers.
 *
 *   bench_recall --data DIR --corpus NAME --questions FILE [--model DIR] [--steps N]
 *                [--set name=value,...]... [--against NAME] [--backend NAME] [--dump FILE]
 *
 * FILE holds a question a line. Prints one JSON line for each setting and kind of step (question,
 * decode): over rows with less than half of their mass on the sink, recall of the mass outside the
 * sink and relative error of the layer's attention output, mean over rows, for the worst (layer, KV
 * head) and over all; bytes by part against dense. The answer is generated from exact attention.
 * --against: exact attention is that over another corpus of the same documents, registered in the
 * same order; dense=1 is mode dense. So what int8 costs: --corpus INT8 --against BF16 --set
 * dense=1. --dump: what was asked, and all keys and values of the corpus, as a key-value dump
 * (tests/attention/corpus_fixture.h); queries with what the model's scale of attention makes of
 * them.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/index_layout.h"
#include "services/engine/query.h"

#define SETS_MAX 16
#define HEADS_MAX 64
#define STEPS_MAX 4096 /* look-ups whose bytes are kept for the percentiles */

typedef struct tally {
    double recall[HEADS_MAX], error[HEADS_MAX], rows[HEADS_MAX];
    double bytes, dense, steps, root, leaf, code, kv, nanoseconds, worst_bytes;
    double share[STEPS_MAX]; /* bytes of each look-up, of dense mode's */
} tally;

typedef struct bench {
    loci_query *query;
    const loci_corpus_view *exact;        /* NULL: the query's own */
    loci_select_params sets[SETS_MAX][2]; /* for a question, for a decoding step */
    uint32_t set_count;
    tally tallies[SETS_MAX][2];
    loci_lookup *lookup;
    loci_buffer *parts;
    size_t part_bytes;
    const char *dump; /* NULL: none */
    loci_buf q[LOCI_LAYERS_MAX], steady[LOCI_LAYERS_MAX], step_begin;
    uint32_t dumped; /* rows */
} bench;

static void fail_bench(const char *what, const loci_error *err) {
    fprintf(stderr, "bench_recall: %s: %s\n", what, err->text);
    exit(1);
}

static void merge_rows(float *out, float *lse, const float *b, float b_lse, uint32_t dim) {
    float most = *lse > b_lse ? *lse : b_lse;
    if (most == -INFINITY) return;
    float wa = expf(*lse - most), wb = expf(b_lse - most), sum = wa + wb;
    for (uint32_t d = 0; d < dim; d++) out[d] = (out[d] * wa + b[d] * wb) / sum;
    *lse = most + logf(sum);
}

/* Runs one look-up; out and lse to the host. */
static void run_lookup(bench *self, const loci_attend_call *call, const loci_corpus_view *view,
                       const loci_select_params *params, float *out, float *lse,
                       loci_lookup_stats *stats, double *nanoseconds) {
    const loci_backend_ops *ops = self->query->engine->backend->ops;
    loci_error err = {0};
    size_t count = (size_t)call->rows * call->q_heads, dim = call->head_dim;
    loci_ref out_at = loci_ref_at(self->parts, 0);
    loci_ref lse_at = loci_ref_at(self->parts, count * dim * sizeof(float));
    uint64_t begun = loci_now_ns();
    ops->lookup_begin(call->stream, self->lookup, view, call->retrieval_index, call->q,
                      call->q_stride, call->rows, call->q_heads, call->scale, call->lse, params);
    ops->score_nodes(call->stream, self->lookup);
    ops->score_codes(call->stream, self->lookup);
    ops->select(call->stream, self->lookup);
    ops->attend_sparse(call->stream, self->lookup, out_at, call->q_heads * call->head_dim, lse_at);
    ops->lookup_stats(call->stream, self->lookup, stats);
    if (ops->sync(call->stream, &err) != LOCI_OK) fail_bench("look-up", &err);
    *nanoseconds = (double)(loci_now_ns() - begun);
    ops->download(call->stream, out, out_at, count * dim * sizeof(float));
    ops->download(call->stream, lse, lse_at, count * sizeof(float));
    if (ops->sync(call->stream, &err) != LOCI_OK) fail_bench("look-up", &err);
}

static double relative_error(const float *a, const float *b, uint32_t dim) {
    double difference = 0, norm = 0;
    for (uint32_t d = 0; d < dim; d++) {
        difference += ((double)a[d] - (double)b[d]) * ((double)a[d] - (double)b[d]);
        norm += (double)b[d] * (double)b[d];
    }
    return norm > 0 ? sqrt(difference / norm) : 0;
}

typedef struct host_parts {
    float *steady, *steady_lse, *dense, *dense_lse, *sparse, *sparse_lse;
} host_parts;

static void add_bytes(tally *to, const loci_lookup_stats *stats, double nanoseconds) {
    double bytes = (double)(stats->root_bytes + stats->leaf_bytes + stats->code_bytes +
                            stats->hash_bytes + stats->kv_bytes);
    to->root += (double)stats->root_bytes;
    to->leaf += (double)stats->leaf_bytes;
    to->code += (double)stats->code_bytes;
    to->kv += (double)(stats->hash_bytes + stats->kv_bytes);
    to->bytes += bytes;
    to->dense += (double)stats->dense_kv_bytes;
    to->nanoseconds += nanoseconds;
    double share = bytes / (double)stats->dense_kv_bytes;
    if (share > to->worst_bytes) to->worst_bytes = share;
    if (to->steps < STEPS_MAX) to->share[(size_t)to->steps] = share;
    to->steps++;
}

/* Compares one setting with exact attention, row by row. sink_share: of the total, by row and head.
 */
static void compare(const loci_attend_call *call, const loci_corpus_view *view,
                    const host_parts *host, tally *to) {
    uint32_t dim = call->head_dim, group = call->q_heads / view->kv_heads;
    float exact[256], rough[256];
    for (uint32_t row = call->row_position == 0 ? 1 : 0; row < call->rows; row++) {
        for (uint32_t h = 0; h < call->q_heads; h++) {
            size_t i = (size_t)row * call->q_heads + h;
            uint32_t slot = call->retrieval_index * view->kv_heads + h / group;
            memcpy(exact, host->steady + i * dim, dim * sizeof(float));
            memcpy(rough, host->steady + i * dim, dim * sizeof(float));
            float exact_lse = host->steady_lse[i], rough_lse = host->steady_lse[i];
            merge_rows(exact, &exact_lse, host->dense + i * dim, host->dense_lse[i], dim);
            merge_rows(rough, &rough_lse, host->sparse + i * dim, host->sparse_lse[i], dim);
            if (host->dense_lse[i] < exact_lse + logf(0.5f)) continue; /* mostly sink or own */
            to->recall[slot] += exp((double)host->sparse_lse[i] - (double)host->dense_lse[i]);
            to->error[slot] += relative_error(rough, exact, dim);
            to->rows[slot]++;
        }
    }
}

/* --- the dump -------------------------------------------------------------------------- */

static void dump_call(bench *self, const loci_attend_call *call, const float *steady_lse) {
    const loci_backend_ops *ops = self->query->engine->backend->ops;
    size_t width = (size_t)call->q_heads * call->head_dim;
    float *q = malloc(call->rows * width * sizeof *q), factor;
    loci_error err = {0};
    LOCI_ASSERT(q != NULL);
    for (uint32_t r = 0; r < call->rows; r++) {
        loci_ref from = call->q;
        from.offset += (size_t)r * call->q_stride * sizeof(float);
        ops->download(call->stream, q + r * width, from, width * sizeof *q);
    }
    if (ops->sync(call->stream, &err) != LOCI_OK) fail_bench("queries", &err);
    factor = call->scale * sqrtf((float)call->head_dim);
    for (size_t i = 0; i < call->rows * width; i++) q[i] *= factor;
    uint32_t layer = call->retrieval_index;
    loci_buf_append(&self->q[layer], q, call->rows * width * sizeof *q);
    loci_buf_append(&self->steady[layer], steady_lse,
                    (size_t)call->rows * call->q_heads * sizeof(float));
    free(q);
    if (layer > 0) return;
    loci_buf_append(&self->step_begin, &self->dumped, sizeof self->dumped);
    self->dumped += call->rows;
}

/* Global positions of the first tokens of all segments, and the number of tokens. */
static uint32_t *list_segments(const loci_corpus_view *view, uint32_t segments) {
    uint32_t *begin = calloc(segments + 1u, sizeof *begin), at = 0;
    LOCI_ASSERT(begin != NULL);
    for (uint32_t e = 0; e < view->extent_count; e++) {
        const loci_extent_view *extent = &view->extents[e];
        for (uint32_t s = 0; s < extent->segments; s++)
            begin[extent->segment_base + s] = at + extent->segment_begin[s];
        at += extent->tokens;
    }
    for (uint32_t s = 0; s <= view->flat_segments; s++)
        begin[view->flat_segment_base + s] = at + view->flat_segment_begin[s];
    return begin;
}

/* K and V of one pair in the order of positions. */
static void read_pair(loci_backend *backend, loci_stream *stream, const loci_corpus_view *view,
                      uint32_t layer, uint32_t head, const uint32_t *begin, uint16_t *k,
                      uint16_t *v) {
    const loci_backend_ops *ops = backend->ops;
    size_t dim = view->head_dim, row = dim * sizeof *k;
    loci_error err = {0};
    for (uint32_t e = 0; e < view->extent_count; e++) {
        const loci_extent_view *extent = &view->extents[e];
        loci_ref at = loci_ref_at(extent->buffer, extent->pair_at[layer * view->kv_heads + head]);
        loci_pair_header header;
        ops->download(stream, &header, at, sizeof header);
        if (ops->sync(stream, &err) != LOCI_OK) fail_bench("an extent", &err);
        uint8_t *blob = malloc(header.blob_bytes);
        LOCI_ASSERT(blob != NULL);
        ops->download(stream, blob, at, header.blob_bytes);
        if (ops->sync(stream, &err) != LOCI_OK) fail_bench("an extent", &err);
        for (uint32_t slot = 0; slot < extent->tokens; slot++) {
            uint32_t word = loci_slot_word(blob, slot);
            size_t to = begin[extent->segment_base + LOCI_SLOT_SEGMENT(word)];
            to = (to + LOCI_SLOT_OFFSET(word)) * dim;
            loci_slot_read(blob, slot, k + to, v + to);
        }
        free(blob);
    }
    size_t flat = (size_t)view->flat_tokens * view->kv_heads * row;
    uint16_t *rows = malloc(flat + 1);
    LOCI_ASSERT(rows != NULL);
    for (int i = 0; i < 2 && flat > 0; i++) {
        uint16_t *to = (i ? v : k) + begin[view->flat_segment_base] * dim;
        loci_buffer *from = (i ? view->flat_v : view->flat_k)[layer];
        ops->download(stream, rows, loci_ref_at(from, 0), flat);
        if (ops->sync(stream, &err) != LOCI_OK) fail_bench("the flat part", &err);
        for (uint32_t t = 0; t < view->flat_tokens; t++)
            memcpy(to + t * dim, rows + ((size_t)t * view->kv_heads + head) * dim, row);
    }
    free(rows);
}

static void put_dump(FILE *file, const void *data, size_t bytes) {
    if (fwrite(data, 1, bytes, file) != bytes) {
        fprintf(stderr, "bench_recall: the dump cannot be written\n");
        exit(1);
    }
}

static void write_dump(bench *self, loci_backend *backend, const loci_corpus_view *view,
                       uint32_t q_heads) {
    uint32_t segments = view->flat_segment_base + view->flat_segments, layers;
    uint32_t *begin = list_segments(view, segments), steps;
    size_t bytes = (size_t)begin[segments] * view->head_dim * sizeof(uint16_t);
    uint16_t *k = malloc(bytes), *v = malloc(bytes);
    FILE *file = fopen(self->dump, "wb");
    loci_stream *stream;
    loci_error err = {0};
    LOCI_ASSERT(k && v);
    if (!file || backend->ops->stream_open(backend, &stream, &err)) {
        fprintf(stderr, "bench_recall: cannot write %s\n", self->dump);
        exit(1);
    }
    layers = view->retrieval_layers;
    steps = (uint32_t)(self->step_begin.len / sizeof(uint32_t));
    const uint32_t head[8] = {layers,          view->kv_heads, view->head_dim, q_heads,
                              begin[segments], segments,       steps,          self->dumped};
    put_dump(file, "LOCIKV1", 8);
    put_dump(file, head, sizeof head);
    put_dump(file, begin, (segments + 1u) * sizeof *begin);
    put_dump(file, self->step_begin.data, self->step_begin.len);
    put_dump(file, &self->dumped, sizeof self->dumped);
    for (uint32_t l = 0; l < layers; l++) {
        put_dump(file, self->q[l].data, self->q[l].len);
        put_dump(file, self->steady[l].data, self->steady[l].len);
    }
    for (uint32_t p = 0; p < layers * view->kv_heads; p++) {
        read_pair(backend, stream, view, p / view->kv_heads, p % view->kv_heads, begin, k, v);
        put_dump(file, k, bytes);
        put_dump(file, v, bytes);
    }
    if (fclose(file) != 0) fprintf(stderr, "bench_recall: %s is not whole\n", self->dump);
    backend->ops->stream_close(backend, stream);
    free(begin);
    free(k);
    free(v);
}

/* --- asking ---------------------------------------------------------------------------- */

/* Exact attention goes on to the next layer; every setting is measured on the way. */
static loci_status bench_hook(void *ctx, const loci_attend_call *call, loci_error *err) {
    bench *self = ctx;
    loci_query *query = self->query;
    const loci_backend_ops *ops = query->engine->backend->ops;
    size_t count = (size_t)call->rows * call->q_heads, values = count * call->head_dim;
    size_t need = (values + count) * sizeof(float);
    if (need > self->part_bytes) {
        ops->free(query->engine->backend, self->parts);
        LOCI_TRY(ops->alloc(query->engine->backend, need, &self->parts, err));
        self->part_bytes = need;
    }
    /* Sink and flat part through the product's own hook, with a view that has no extents. */
    loci_corpus_view steady = *query->view;
    steady.extent_count = 0;
    const loci_corpus_view *whole = query->view;
    query->view = &steady;
    LOCI_TRY(loci_corpus_attend(query, call, err));
    query->view = whole;
    float *memory = calloc(3 * (values + count), sizeof(float));
    if (!memory) return loci_fail(err, LOCI_E_NOMEM, "no memory");
    host_parts host = {memory, memory + values, NULL, NULL, NULL, NULL};
    host.dense = host.steady_lse + count;
    host.dense_lse = host.dense + values;
    host.sparse = host.dense_lse + count;
    host.sparse_lse = host.sparse + values;
    for (uint32_t r = 0; r < call->rows; r++) {
        loci_ref from = call->out;
        from.offset += (size_t)r * call->out_stride * sizeof(float);
        size_t row = (size_t)call->q_heads * call->head_dim;
        ops->download(call->stream, host.steady + r * row, from, row * sizeof(float));
    }
    ops->download(call->stream, host.steady_lse, call->lse, count * sizeof(float));
    LOCI_TRY(ops->sync(call->stream, err));
    if (self->dump) dump_call(self, call, host.steady_lse);
    loci_lookup_stats stats;
    double nanoseconds;
    uint32_t kind = call->row_position == 0 ? 0 : 1;
    loci_select_params dense = self->sets[0][0];
    dense.mode = LOCI_MODE_DENSE;
    run_lookup(self, call, self->exact ? self->exact : whole, &dense, host.dense, host.dense_lse,
               &stats, &nanoseconds);
    for (uint32_t s = 0; s < self->set_count; s++) {
        run_lookup(self, call, whole, &self->sets[s][kind], host.sparse, host.sparse_lse, &stats,
                   &nanoseconds);
        add_bytes(&self->tallies[s][kind], &stats, nanoseconds);
        compare(call, whole, &host, &self->tallies[s][kind]);
    }
    for (uint32_t r = 0; r < call->rows; r++) {
        for (uint32_t h = 0; h < call->q_heads; h++) {
            size_t i = (size_t)r * call->q_heads + h;
            merge_rows(host.steady + i * call->head_dim, &host.steady_lse[i],
                       host.dense + i * call->head_dim, host.dense_lse[i], call->head_dim);
        }
        loci_ref to = call->out;
        to.offset += (size_t)r * call->out_stride * sizeof(float);
        size_t row = (size_t)call->q_heads * call->head_dim;
        ops->upload(call->stream, to, host.steady + r * row, row * sizeof(float));
    }
    free(memory);
    return ops->sync(call->stream, err);
}

static loci_status bench_attended(void *ctx, loci_status status, loci_error *err) {
    return loci_corpus_attended(((bench *)ctx)->query, status, err);
}

/* "name":[mean over the rows of each (layer, KV head)] */
static void print_heads(const char *name, const double *sum, const double *rows, uint32_t heads) {
    printf(",\"%s\":[", name);
    for (uint32_t i = 0; i < heads; i++)
        printf("%s%.4f", i ? "," : "", rows[i] > 0 ? sum[i] / rows[i] : 0.0);
    printf("]");
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Of the look-ups' bytes. */
static void print_percentiles(const tally *t) {
    static double sorted[STEPS_MAX];
    size_t n = t->steps < STEPS_MAX ? (size_t)t->steps : STEPS_MAX;
    memcpy(sorted, t->share, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, compare_doubles);
    if (n)
        printf(",\"bytes_percent_p50\":%.3f,\"bytes_percent_p95\":%.3f", 100 * sorted[n / 2],
               100 * sorted[n * 95 / 100]);
}

static void print_tally(const loci_query *query, const loci_select_params *set, uint32_t number,
                        const char *kind, const tally *t) {
    double recall = 1, error = 0, all = 0, all_error = 0, rows = 0;
    uint32_t heads = query->view->retrieval_layers * query->view->kv_heads;
    for (uint32_t i = 0; i < heads; i++) {
        if (t->rows[i] == 0) continue;
        double mean = t->recall[i] / t->rows[i], mean_error = t->error[i] / t->rows[i];
        if (mean < recall) recall = mean;
        if (mean_error > error) error = mean_error;
        all += t->recall[i];
        all_error += t->error[i];
        rows += t->rows[i];
    }
    printf("{\"bench\":\"recall\",\"set\":%u,\"step\":\"%s\",\"tokens\":%llu,\"rows\":%.0f,"
           "\"recall_worst_head\":%.4f,\"recall_mean\":%.4f,\"error_worst_head\":%.4f,"
           "\"error_mean\":%.4f,\"bytes_percent\":%.3f,\"bytes_percent_max\":%.3f,"
           "\"roots\":%.3f,\"leaves\":%.3f,\"codes\":%.3f,\"kv\":%.3f,\"ms\":%.2f,"
           "\"top_p\":%g,\"budget\":%u,\"roots_rate\":%g,\"roots_min\":%u,"
           "\"candidates_rate\":%g,\"candidates_min\":%u",
           number, kind, (unsigned long long)query->view->tokens, rows, recall,
           rows > 0 ? all / rows : 0, error, rows > 0 ? all_error / rows : 0,
           100 * t->bytes / t->dense, 100 * t->worst_bytes, 100 * t->root / t->dense,
           100 * t->leaf / t->dense, 100 * t->code / t->dense, 100 * t->kv / t->dense,
           t->nanoseconds / t->steps / 1e6, (double)set->top_p, set->budget, (double)set->roots,
           set->roots_min, (double)set->candidates, set->candidates_min);
    print_percentiles(t);
    print_heads("recall_heads", t->recall, t->rows, heads);
    print_heads("error_heads", t->error, t->rows, heads);
    printf("}\n");
}

static void parse_set(const char *text, loci_select_params *set) {
    char copy[256], *rest = copy;
    snprintf(copy, sizeof copy, "%s", text);
    for (char *item; (item = strsep(&rest, ","));) {
        char *equals = strchr(item, '=');
        if (!equals) continue;
        *equals = 0;
        double value = strtod(equals + 1, NULL);
        if (!strcmp(item, "top_p"))
            set->top_p = (float)value;
        else if (!strcmp(item, "budget"))
            set->budget = (uint32_t)value;
        else if (!strcmp(item, "roots"))
            set->roots = (float)value;
        else if (!strcmp(item, "roots_min"))
            set->roots_min = (uint32_t)value;
        else if (!strcmp(item, "candidates"))
            set->candidates = (float)value;
        else if (!strcmp(item, "candidates_min"))
            set->candidates_min = (uint32_t)value;
        else if (!strcmp(item, "candidates_max"))
            set->candidates_max = (uint32_t)value;
        else if (!strcmp(item, "dense"))
            set->mode = value != 0 ? LOCI_MODE_DENSE : set->mode;
        else if (!strcmp(item, "estimate_tail"))
            set->estimate_tail = value != 0;
        else
            fprintf(stderr, "bench_recall: unknown setting %s\n", item);
    }
}

static void add_set(bench *self, const char *text) {
    loci_select_params *set = self->sets[self->set_count++];
    for (int kind = 0; kind < 2; kind++) {
        loci_select_defaults(&set[kind]);
        loci_select_reach(&set[kind], kind == 0 ? LOCI_REACH_QUESTION : LOCI_REACH_ANSWER);
        parse_set(text, &set[kind]);
    }
}

static void ask(loci_engine *engine, bench *self, const char *corpus, const char *question,
                uint32_t steps) {
    loci_query query;
    loci_error err = {0};
    if (loci_query_init(&query, engine, corpus, question, 0, NULL, &err) != LOCI_OK)
        fail_bench(question, &err);
    self->query = &query;
    loci_tokens prompt = {0};
    loci_sequence *sequence = query.slot->sequence;
    loci_sequence_set_attend(sequence, bench_hook, bench_attended, self);
    loci_sequence_scale_attention(sequence, loci_query_attention_scale(&query));
    if (loci_corpus_attend_begin(&query, &err) != LOCI_OK ||
        loci_query_prompt(&query, &prompt, &err) != LOCI_OK ||
        loci_sequence_append(sequence, prompt.ids, (uint32_t)prompt.count, 1, -1, NULL, &err) !=
            LOCI_OK)
        fail_bench(question, &err);
    loci_sample_params greedy = {.top_p = 1, .repetition_penalty = 1};
    uint32_t none = loci_model_specials(engine->model)->none, id = 0;
    float logprob;
    for (uint32_t i = 0; i < steps; i++) {
        if (loci_sequence_sample(sequence, &greedy, &none, 1, NULL, 0, &id, &logprob, &err) !=
            LOCI_OK)
            fail_bench(question, &err);
        if (id == loci_model_config_of(engine->model)->eos_id) break;
        if (loci_sequence_append(sequence, &id, 1, 1, -1, NULL, &err) != LOCI_OK)
            fail_bench(question, &err);
    }
    loci_tokens_fini(&prompt);
}

int main(int argc, char **argv) {
    const char *data = NULL, *corpus = NULL, *questions = NULL, *model = "model/default";
    const char *against = NULL, *backend = NULL;
    uint32_t steps = 6;
    static bench self;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--data"))
            data = argv[i + 1];
        else if (!strcmp(argv[i], "--corpus"))
            corpus = argv[i + 1];
        else if (!strcmp(argv[i], "--questions"))
            questions = argv[i + 1];
        else if (!strcmp(argv[i], "--against"))
            against = argv[i + 1];
        else if (!strcmp(argv[i], "--model"))
            model = argv[i + 1];
        else if (!strcmp(argv[i], "--backend"))
            backend = argv[i + 1];
        else if (!strcmp(argv[i], "--dump"))
            self.dump = argv[i + 1];
        else if (!strcmp(argv[i], "--steps"))
            steps = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--set") && self.set_count < SETS_MAX) {
            add_set(&self, argv[i + 1]);
        }
    }
    if (self.set_count == 0) add_set(&self, "");
    FILE *file = questions ? fopen(questions, "r") : NULL;
    if (!data || !corpus || !file) {
        fprintf(stderr,
                "usage: bench_recall --data DIR --corpus NAME --questions FILE [--set ...]\n");
        return 2;
    }
    loci_engine_options options = {.data = data, .model = model, .backend = backend};
    loci_engine *engine;
    loci_error err = {0};
    if (loci_engine_open(&options, &engine, &err) != LOCI_OK) fail_bench(data, &err);
    if (engine->backend->ops->lookup_create(engine->backend, &self.lookup, &err) != LOCI_OK)
        fail_bench("look-up", &err);
    loci_snapshot *other = NULL;
    if (against && loci_snapshot_acquire(engine->store, against, &other, &err) != LOCI_OK)
        fail_bench(against, &err);
    if (other) self.exact = loci_snapshot_view(other);
    char line[1024];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!line[0]) continue;
        ask(engine, &self, corpus, line, steps);
        loci_query_fini(self.query);
    }
    fclose(file);
    loci_snapshot *snapshot;
    if (loci_snapshot_acquire(engine->store, corpus, &snapshot, &err) != LOCI_OK)
        fail_bench(corpus, &err);
    loci_query last = {.view = loci_snapshot_view(snapshot)};
    for (uint32_t s = 0; s < self.set_count; s++) {
        print_tally(&last, &self.sets[s][0], s, "question", &self.tallies[s][0]);
        if (self.tallies[s][1].steps > 0)
            print_tally(&last, &self.sets[s][1], s, "decode", &self.tallies[s][1]);
    }
    if (self.dump)
        write_dump(&self, engine->backend, last.view, loci_model_config_of(engine->model)->q_heads);
    loci_snapshot_release(snapshot);
    loci_snapshot_release(other);
    engine->backend->ops->lookup_free(engine->backend, self.lookup);
    engine->backend->ops->free(engine->backend, self.parts);
    loci_engine_close(engine);
    return 0;
}
