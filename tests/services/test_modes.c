/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over a corpus layer by layer, under its settings: random queries of a GQA model whose
 * every layer is a retrieval layer, against plain transcriptions in double of the rules in
 * attention/README.md ("Settings of a corpus", "Mode squeezed").
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"
#include "base/rng.h"
#include "services/engine/query.h"
#include "tests/services/engine_support.h"
#include "tests/services/stock_model.h"

#define SHAPE                                                                                   \
    "\"use_sliding_window\": true,\n \"sliding_window\": 24,\n \"no_rope_layers\": [\n  1,\n  " \
    "1,\n  0\n ],\n \"no_rope_layer_interval\": 3,\n \"layer_types\": [\n  "                    \
    "\"sliding_attention\",\n  \"sliding_attention\",\n  \"full_attention\"\n ],"
#define LAYERS 3u
#define HEADS 4u
#define KV_HEADS 2u
#define DIM 32u
#define ROWS 5u
#define WIDTH (HEADS * DIM)

static char folder[FOLDER_BYTES];
static const char *const files[] = {"north-dome.md", "cryogenics.md", "library.md"};
static const stock_model model = {"untied", "chatml", 16384, SHAPE,
                                  "\"use_sliding_window\": false, \"no_rope_layers\": [1, 1, 1],"};

/* Without positions anywhere, a passage encoded apart is what it is in one sequence. */
static const stock_model placeless = {
    "untied", "chatml", 16384, SHAPE,
    "\"use_sliding_window\": false, \"no_rope_layers\": [0, 0, 0],"};

static loci_engine *open_engine(void) {
    return engine_in(folder, "model");
}

/* The first `most` bytes of a file of the handbook. */
static void add_file(loci_engine *engine, const char *corpus, const char *name, size_t most) {
    loci_slice text = read_handbook(name);
    if (text.len > most) text.len = most;
    put_text(engine, corpus, name, text);
    settle(engine, corpus);
}

/* "books": extents; "mixed": an extent and flat segments; "text": causal; "note": flat only. */
static int set_up(void **state) {
    (void)state;
    char dir[300];
    loci_error err = {0};
    loci_corpus_info info;
    static const char *const corpora[] = {"books", "text", "note"};
    make_folder("modes", folder);
    snprintf(dir, sizeof dir, "%s/model", folder);
    stock_model_make(&model, dir);
    snprintf(dir, sizeof dir, "%s/placeless", folder);
    stock_model_make(&placeless, dir);
    loci_engine *engine = open_engine();
    for (size_t i = 0; i < 3; i++) {
        loci_encoding encoding = i == 1 ? LOCI_ENCODING_CAUSAL : LOCI_ENCODING_INDEPENDENT;
        create_corpus(engine, corpora[i], encoding, false, &info);
        assert_int_equal(info.settings.dense_layers, 0); /* a quarter of three */
    }
    for (size_t i = 0; i < 3; i++) add_file(engine, "books", files[i], SIZE_MAX);
    for (size_t i = 0; i < 3; i++) add_file(engine, "text", files[i], SIZE_MAX);
    add_file(engine, "note", files[0], 700);
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "books", &info, &err), LOCI_OK);
    assert_true(info.extents >= 1);
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "note", &info, &err), LOCI_OK);
    assert_true(info.extents == 0 && info.tokens > 300);
    loci_engine_close(engine);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    remove_folder(folder);
    return 0;
}

static void begin(loci_query *query, loci_engine *engine, const char *corpus) {
    loci_error err = {0};
    if (loci_query_init(query, engine, corpus, QUESTION, 0, NULL, &err)) fail_msg("%s", err.text);
    assert_true(query->view->kv_heads == KV_HEADS && query->view->head_dim == DIM &&
                query->view->retrieval_layers == LAYERS);
}

static void set(loci_engine *engine, const char *corpus, uint32_t dense, double temperature,
                double scale) {
    loci_settings_change change = {dense, temperature, scale};
    loci_corpus_info info;
    loci_error err = {0};
    if (loci_corpus_set(loci_engine_store(engine), corpus, 0, &change, &info, &err))
        fail_msg("%s", err.text);
}

static float uniform(uint64_t *state) {
    return (float)(loci_rng_next(state) >> 40) / (float)(1 << 23) - 1;
}

/* What a step finds before the corpus is merged in, and its result. */
typedef struct attended {
    float q[ROWS * WIDTH], own[ROWS * WIDTH], own_lse[ROWS * HEADS];
    float out[ROWS * WIDTH], lse[ROWS * HEADS];
} attended;

static void draw(attended *a, uint64_t seed) {
    for (uint32_t i = 0; i < ROWS * WIDTH; i++) {
        a->q[i] = 3 * uniform(&seed);
        a->own[i] = uniform(&seed);
    }
    for (uint32_t i = 0; i < ROWS * HEADS; i++) a->own_lse[i] = 2 + uniform(&seed);
}

static void attend(loci_query *query, uint32_t layer, attended *a) {
    loci_backend *backend = query->engine->backend;
    const loci_backend_ops *ops = backend->ops;
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    loci_error err = {0};
    loci_buffer *buffers[3];
    const void *data[3] = {a->q, a->own, a->own_lse};
    const size_t bytes[3] = {sizeof a->q, sizeof a->own, sizeof a->own_lse};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(ops->alloc(backend, bytes[i], &buffers[i], &err), LOCI_OK);
        ops->upload(stream, loci_ref_at(buffers[i], 0), data[i], bytes[i]);
    }
    loci_attend_call call = {.stream = stream,
                             .retrieval_index = layer,
                             .rows = ROWS,
                             .row_position = 1,
                             .q_heads = HEADS,
                             .head_dim = DIM,
                             .q = loci_ref_at(buffers[0], 0),
                             .q_stride = WIDTH,
                             .scale = 1 / sqrtf(DIM),
                             .out = loci_ref_at(buffers[1], 0),
                             .out_stride = WIDTH,
                             .lse = loci_ref_at(buffers[2], 0)};
    if (loci_corpus_attend(query, &call, &err) != LOCI_OK) fail_msg("%s", err.text);
    ops->download(stream, a->out, call.out, sizeof a->out);
    ops->download(stream, a->lse, call.lse, sizeof a->lse);
    assert_int_equal(ops->sync(stream, &err), LOCI_OK);
    for (int i = 0; i < 3; i++) ops->free(backend, buffers[i]);
}

/* K and V of all tokens of a layer and KV head, as f32, in the order of the view. */
static uint32_t read_kv(const loci_query *query, uint32_t layer, uint32_t head, float **k,
                        float **v) {
    const loci_corpus_view *view = query->view;
    uint32_t tokens = view->flat_tokens, at = 0;
    loci_error err = {0};
    for (uint32_t e = 0; e < view->extent_count; e++) tokens += view->extents[e].tokens;
    uint16_t *rows[2];
    for (int i = 0; i < 2; i++) assert_non_null(rows[i] = calloc(tokens, DIM * sizeof **rows));
    for (uint32_t e = 0; e < view->extent_count; e++) {
        const loci_extent_view *extent = &view->extents[e];
        uint64_t begins = extent->pair_at[layer * KV_HEADS + head];
        assert_int_equal(loci_pair_read_positions(extent->buffer->data + begins,
                                                  extent->buffer->bytes - begins,
                                                  extent->segment_begin, extent->segments,
                                                  rows[0] + at * DIM, rows[1] + at * DIM, &err),
                         LOCI_OK);
        at += extent->tokens;
    }
    for (uint32_t t = 0; t < view->flat_tokens; t++, at++) {
        size_t from = ((size_t)t * KV_HEADS + head) * DIM * sizeof(uint16_t);
        memcpy(rows[0] + at * DIM, view->flat_k[layer]->data + from, DIM * sizeof(uint16_t));
        memcpy(rows[1] + at * DIM, view->flat_v[layer]->data + from, DIM * sizeof(uint16_t));
    }
    float **out[2] = {k, v};
    for (int i = 0; i < 2; i++) {
        assert_non_null(*out[i] = calloc(tokens, DIM * sizeof(float)));
        for (size_t j = 0; j < (size_t)tokens * DIM; j++)
            (*out[i])[j] = loci_bf16_to_f32(rows[i][j]);
        free(rows[i]);
    }
    return tokens;
}

static double dot(const float *a, const float *b) {
    double sum = 0;
    for (uint32_t i = 0; i < DIM; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* The result of one row and head by the formulas; T and S as in attention/README.md. */
static void transcribe(const loci_query *query, uint32_t layer, const attended *a, uint32_t row,
                       uint32_t head, const float *k, const float *v, uint32_t tokens,
                       double out[DIM], double *lse) {
    double T = (double)query->settings.attn_temperature, S = (double)query->settings.attn_scale;
    const float *q = a->q + row * WIDTH + head * DIM;
    uint32_t kv = head / (HEADS / KV_HEADS);
    double sum = 0, mean[DIM] = {0};
    for (uint32_t t = 0; t < tokens; t++) {
        double weight = exp(dot(q, k + (size_t)t * DIM) / (T * sqrt(DIM)));
        sum += weight;
        for (uint32_t i = 0; i < DIM; i++)
            mean[i] += weight * (double)v[(size_t)t * (size_t)DIM + i];
    }
    const float *sink_k = query->engine->sink_k + (layer * KV_HEADS + kv) * DIM;
    const float *sink_v = query->engine->sink_v + (layer * KV_HEADS + kv) * DIM;
    double sinks = query->causal ? 1 : (double)query->view->live_segments;
    double corpus = pow(sum, S), sink = sinks * exp(dot(q, sink_k) / sqrt(DIM));
    double own = exp((double)a->own_lse[row * HEADS + head]), all = corpus + sink + own;
    for (uint32_t i = 0; i < DIM; i++)
        out[i] = (corpus * mean[i] / sum + sink * (double)sink_v[i] +
                  own * (double)a->own[row * WIDTH + head * DIM + i]) /
                 all;
    *lse = log(all);
}

static void test_temperature_and_scale_are_those_of_the_formula(void **state) {
    (void)state;
    static const struct {
        const char *corpus;
        double temperature, scale;
    } cases[] = {{"books", 1, 1},    {"books", 0.7, 1},   {"books", 1.3, 0.8},
                 {"note", 0.5, 0.9}, {"text", 0.8, 1.25}, {"note", 1, 0.5}};
    loci_engine *engine = open_engine();
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        loci_query query;
        attended a;
        uint64_t seed = 41 + c;
        set(engine, cases[c].corpus, 0, cases[c].temperature, cases[c].scale);
        begin(&query, engine, cases[c].corpus);
        query.params.mode = LOCI_MODE_DENSE;
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            draw(&a, seed + layer);
            attend(&query, layer, &a);
            for (uint32_t head = 0; head < HEADS; head++) {
                float *k, *v;
                uint32_t tokens = read_kv(&query, layer, head / (HEADS / KV_HEADS), &k, &v);
                assert_int_equal(tokens, query.view->tokens);
                for (uint32_t row = 0; row < ROWS; row++) {
                    double out[DIM], lse;
                    transcribe(&query, layer, &a, row, head, k, v, tokens, out, &lse);
                    double off = fabs(lse - (double)a.lse[row * HEADS + head]);
                    for (uint32_t i = 0; i < DIM; i++)
                        off = fmax(off, fabs(out[i] - (double)a.out[row * WIDTH + head * DIM + i]));
                    if (!(off < 2e-4)) fail_msg("case %zu, layer %u: off by %g", c, layer, off);
                }
                free(k);
                free(v);
            }
        }
        loci_query_fini(&query);
        set(engine, cases[c].corpus, 0, 1, 1);
    }
    loci_engine_close(engine);
}

static double difference(const attended *a, const attended *b) {
    double off = 0;
    for (uint32_t i = 0; i < ROWS * WIDTH; i++)
        off = fmax(off, fabs((double)a->out[i] - (double)b->out[i]));
    return off;
}

/* Reading all is dense mode, and so are the first layers, however little the others read. */
static void test_dense_layers_and_reading_all(void **state) {
    (void)state;
    static const char *const corpora[] = {"books", "text"};
    loci_engine *engine = open_engine();
    for (int c = 0; c < 4; c++) {
        set(engine, corpora[c % 2], 2, c < 2 ? 1 : 0.8, c < 2 ? 1 : 0.9);
        loci_query query;
        begin(&query, engine, corpora[c % 2]);
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            attended dense, full, little, squeezed;
            draw(&dense, 7 + layer);
            full = little = squeezed = dense;
            query.params.mode = LOCI_MODE_DENSE;
            attend(&query, layer, &dense);
            query.params.mode = LOCI_MODE_HIERARCHICAL;
            query.params.top_p = 1;
            attend(&query, layer, &full);
            assert_true(difference(&dense, &full) < 1e-5);
            query.params.budget = 8;
            uint64_t before = query.usage.kv_read_bytes;
            attend(&query, layer, &little);
            uint64_t read = query.usage.kv_read_bytes - before;
            query.params.mode = LOCI_MODE_SQUEEZED;
            query.params.squeezed_threshold[0] = query.params.squeezed_threshold[1] = 1;
            attend(&query, layer, &squeezed);
            query.params.budget = 0;
            bool all = layer < 2;
            assert_true((difference(&dense, &little) < 1e-5) == all);
            assert_true((difference(&dense, &squeezed) < 1e-5) == all);
            assert_true((read >= query.view->tokens * KV_HEADS * 4 * DIM) == all);
        }
        loci_query_fini(&query);
        set(engine, corpora[c % 2], 0, 1, 1);
    }
    loci_engine_close(engine);
}

/* With either setting the attention on sink, corpus and own tokens adds up. */
static void test_masses_add_up(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    for (int c = 0; c < 2; c++) {
        set(engine, "books", 0, c ? 0.8 : 1, c ? 0.85 : 1);
        loci_query query;
        loci_error err = {0};
        attended a;
        begin(&query, engine, "books");
        query.params.mode = LOCI_MODE_DENSE;
        assert_int_equal(loci_corpus_attend_begin(&query, &err), LOCI_OK);
        draw(&a, 3);
        attend(&query, 1, &a);
        uint32_t segments = loci_snapshot_segments(query.snapshot);
        float *mass = calloc(segments, sizeof *mass);
        loci_stream *stream = loci_sequence_stream(query.slot->sequence);
        engine->backend->ops->download(stream, mass, loci_ref_at(query.slot->mass, 0),
                                       segments * sizeof *mass);
        assert_int_equal(engine->backend->ops->sync(stream, &err), LOCI_OK);
        double all = query.sink_mass;
        for (uint32_t s = 0; s < segments; s++) all += (double)mass[s];
        for (uint32_t i = 0; i < ROWS * HEADS; i++) all += exp((double)(a.own_lse[i] - a.lse[i]));
        assert_true(fabs(all - ROWS * HEADS) < 1e-3);
        free(mass);
        loci_query_fini(&query);
    }
    set(engine, "books", 0, 1, 1);
    loci_engine_close(engine);
}

/* --- Mode squeezed --------------------------------------------------------------------------- */

/* Logits of a node's mean key, by the bytes of the index. */
static double node_logit(const uint8_t *blob, const loci_node *node, const float *q, double scale) {
    const float *mean = loci_pair_mean(blob);
    const int8_t *centroid = loci_node_centroid(node);
    double sum = 0;
    for (uint32_t i = 0; i < DIM; i++)
        sum +=
            (double)q[i] * ((double)mean[i] + (double)node->centroid_scale * (double)centroid[i]);
    return scale * sum;
}

/* S of every root and leaf of a KV head for one query head, added to s. */
static void add_scores(const loci_query *query, uint32_t layer, uint32_t kv, const float *q,
                       double weight, double *roots, double *leaves) {
    const loci_extent_view *extent = &query->view->extents[0];
    const uint8_t *blob = extent->buffer->data + extent->pair_at[layer * KV_HEADS + kv];
    const loci_pair_header *header = loci_pair_header_of(blob);
    double scale = 1 / (sqrt(DIM) * (double)query->settings.attn_temperature), sum[2] = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t r = 0; r < header->roots; r++) {
            const loci_root *root = loci_pair_root(blob, r);
            double x = exp(node_logit(blob, loci_pair_root_node(blob, r), q, scale));
            if (pass == 0) sum[0] += root->tokens * x;
            if (pass == 1) roots[r] += weight * x / sum[0];
            for (uint32_t l = 0; l < root->count; l++) {
                const loci_leaf *leaf = &loci_root_leaves(blob, root)[l];
                x = exp(node_logit(blob, loci_pair_leaf_node(blob, root->begin + l), q, scale));
                if (pass == 0) sum[1] += leaf->count * x;
                if (pass == 1) leaves[root->begin + l] += weight * x / sum[1];
            }
        }
    }
}

/* Tokens of a KV head that the rule keeps for these rows together. */
static uint64_t kept(const loci_query *query, uint32_t layer, uint32_t kv, const float *rows,
                     uint32_t count, const float threshold[2]) {
    const loci_extent_view *extent = &query->view->extents[0];
    const uint8_t *blob = extent->buffer->data + extent->pair_at[layer * KV_HEADS + kv];
    const loci_pair_header *header = loci_pair_header_of(blob);
    double *roots = calloc(header->roots, sizeof *roots);
    double *leaves = calloc(header->leaves, sizeof *leaves);
    uint32_t group = HEADS / KV_HEADS;
    for (uint32_t i = 0; i < count * group; i++)
        add_scores(query, layer, kv, rows + (i / group) * WIDTH + (kv * group + i % group) * DIM,
                   1.0 / (count * group), roots, leaves);
    uint64_t tokens = 0;
    for (uint32_t r = 0; r < header->roots; r++) {
        const loci_root *root = loci_pair_root(blob, r);
        for (uint32_t l = 0; l < root->count; l++)
            if (roots[r] > (double)threshold[0] && leaves[root->begin + l] > (double)threshold[1])
                tokens += loci_root_leaves(blob, root)[l].count;
    }
    free(roots);
    free(leaves);
    return tokens;
}

static float *recorded(loci_query *query, uint32_t *count) {
    loci_recorder recorder;
    loci_error err = {0};
    assert_int_equal(loci_recorder_open(query, &recorder, &err), LOCI_OK);
    assert_true(loci_recorder_restore(&recorder, query->start));
    float *out = malloc((size_t)LAYERS * LOCI_RECORDED * WIDTH * sizeof *out);
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    for (uint32_t i = 0; i < LAYERS; i++)
        query->engine->backend->ops->download(stream, out + (size_t)i * LOCI_RECORDED * WIDTH,
                                              loci_ref_at(recorder.q[i], 0),
                                              (size_t)LOCI_RECORDED * WIDTH * sizeof *out);
    assert_int_equal(query->engine->backend->ops->sync(stream, &err), LOCI_OK);
    *count = recorder.taken;
    loci_recorder_close(&recorder);
    return out;
}

/* By a transcription of the rule the thresholds keep, of the recorded queries' tokens, the share
 * that was asked for: of all together, and on average of single ones. */
static void test_squeezed_thresholds_keep_the_share(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    for (int round = 0; round < 2; round++) {
        uint32_t dense = round ? 1 : 0, count = 0;
        set(engine, "text", dense, round ? 0.8 : 1, 1);
        loci_query query;
        loci_error err = {0};
        begin(&query, engine, "text");
        assert_true(query.view->extent_count == 1 && query.view->flat_tokens == 0);
        float *q = recorded(&query, &count);
        assert_int_equal(count, LOCI_RECORDED);
        double all = (double)query.view->tokens * KV_HEADS * (LAYERS - dense);
        static const double shares[] = {0.5, 0.3, 0.1, 0.04};
        for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
            if (loci_query_squeezed(&query, shares[s], &err)) fail_msg("%s", err.text);
            double together = 0, single = 0;
            for (uint32_t layer = dense; layer < LAYERS; layer++) {
                const float *rows = q + (size_t)layer * LOCI_RECORDED * WIDTH;
                for (uint32_t kv = 0; kv < KV_HEADS; kv++) {
                    together += (double)kept(&query, layer, kv, rows, count, query.squeezed[0]);
                    for (uint32_t i = 0; i < count; i += 5)
                        single += (double)kept(&query, layer, kv, rows + (size_t)i * WIDTH, 1,
                                               query.squeezed[1]) /
                                  (LOCI_RECORDED / 5);
                }
            }
            print_message("share %g: %g together, %g single\n", shares[s], together / all,
                          single / all);
            assert_true(fabs(together / all - shares[s]) < 0.05 * shares[s]);
            assert_true(fabs(single / all - shares[s]) < 0.04 * shares[s]);
        }
        free(q);
        loci_query_fini(&query);
    }
    set(engine, "text", 0, 1, 1);
    loci_engine_close(engine);
}

static loci_squeezed_table table_of(loci_engine *engine, const char *corpus, double share) {
    loci_query query;
    loci_error err = {0};
    begin(&query, engine, corpus);
    if (loci_query_squeezed(&query, share, &err)) fail_msg("%s", err.text);
    for (int next = 0; next < 2; next++) {
        loci_query_reach(&query, next == 0);
        assert_memory_equal(query.params.squeezed_threshold, query.squeezed[next],
                            sizeof query.squeezed[next]);
    }
    assert_true(query.squeezed[0][1] != query.squeezed[1][1]);
    loci_query_fini(&query);
    return engine->squeezed;
}

/* Thresholds are a note on the corpus: found again after a restart, made anew for other settings
 * or where the note is damaged, gone with the corpus. */
static void test_squeezed_thresholds_are_kept(void **state) {
    (void)state;
    static const char *const corpora[] = {"books", "text"};
    loci_error err = {0};
    loci_corpus_info info;
    for (int c = 0; c < 2; c++) {
        loci_engine *engine = open_engine();
        set(engine, corpora[c], 0, 1, 1);
        loci_squeezed_table first = table_of(engine, corpora[c], 0.1);
        for (uint32_t i = 0; i + 1 < LOCI_SQUEEZED_SHARES; i++)
            for (int next = 0; next < 2; next++)
                assert_true(first.threshold[next][i][1] <= first.threshold[next][i + 1][1]);
        set(engine, corpora[c], 0, 0.5, 1);
        loci_squeezed_table other = table_of(engine, corpora[c], 0.1);
        assert_memory_not_equal(first.threshold, other.threshold, sizeof first.threshold);
        loci_engine_close(engine);
        engine = open_engine();
        loci_store *store = loci_engine_store(engine);
        assert_int_equal(loci_corpus_get(store, corpora[c], &info, &err), LOCI_OK);
        /* A threshold of another value shows that the note is what is used. */
        loci_buf note = LOCI_BUF_INIT;
        assert_int_equal(loci_corpus_note_get(store, &info, LOCI_NOTE_THRESHOLDS, &note, &err),
                         LOCI_OK);
        float mark = 0.125f;
        memcpy(note.data + note.len - sizeof mark, &mark, sizeof mark);
        loci_slice data = loci_slice_of(note.data, note.len);
        assert_int_equal(loci_corpus_note_put(store, &info, LOCI_NOTE_THRESHOLDS, data, &err),
                         LOCI_OK);
        loci_squeezed_table again = table_of(engine, corpora[c], 0.1);
        assert_true(again.threshold[1][LOCI_SQUEEZED_SHARES - 1][1] == mark);
        again.threshold[1][LOCI_SQUEEZED_SHARES - 1][1] =
            other.threshold[1][LOCI_SQUEEZED_SHARES - 1][1];
        assert_memory_equal(again.threshold, other.threshold, sizeof other.threshold);
        /* Not of the shape that is known: made anew. */
        float broken = NAN;
        memcpy(note.data + note.len - sizeof broken, &broken, sizeof broken);
        assert_int_equal(loci_corpus_note_put(store, &info, LOCI_NOTE_THRESHOLDS, data, &err),
                         LOCI_OK);
        engine->squeezed.uid = 0;
        again = table_of(engine, corpora[c], 0.1);
        assert_memory_equal(again.threshold, other.threshold, sizeof other.threshold);
        info.uid += 1000;
        assert_int_equal(loci_corpus_note_put(store, &info, LOCI_NOTE_THRESHOLDS, data, &err),
                         LOCI_E_NOTFOUND);
        loci_buf_fini(&note);
        set(engine, corpora[c], 0, 1, 1);
        loci_engine_close(engine);
    }
}

static void test_shares_between_and_beyond_the_table(void **state) {
    (void)state;
    loci_squeezed_table table = {0};
    float out[2][2];
    for (uint32_t i = 0; i < LOCI_SQUEEZED_SHARES; i++)
        for (int next = 0; next < 2; next++)
            for (int level = 0; level < 2; level++)
                table.threshold[next][i][level] = (float)(i * (uint32_t)(1 + next + 2 * level));
    loci_squeezed_choose(&table, 1, out);
    assert_true(out[0][0] == 0 && out[1][1] == 0);
    loci_squeezed_choose(&table, 0.25, out); /* the fifth */
    assert_true(fabsf(out[0][1] - 12) < 1e-5f && fabsf(out[1][1] - 16) < 1e-5f);
    loci_squeezed_choose(&table, (0.25 + 0.5) / 2, out);
    assert_true(out[0][0] > 2 && out[0][0] < 4);
    loci_squeezed_choose(&table, exp2(-8) / 4, out);
    assert_true(fabsf(out[0][0] - 16) < 1e-5f && fabsf(out[0][1] - 4 * 48) < 1e-3f);
}

static void forget_thresholds(loci_engine *engine, const char *corpus) {
    loci_corpus_info info;
    loci_error err = {0};
    loci_store *store = loci_engine_store(engine);
    assert_int_equal(loci_corpus_get(store, corpus, &info, &err), LOCI_OK);
    assert_int_equal(
        loci_corpus_note_put(store, &info, LOCI_NOTE_THRESHOLDS, loci_slice_text("none"), &err),
        LOCI_OK);
    engine->squeezed.uid = 0;
}

typedef struct reads {
    double share;
    loci_usage usage;
} reads;

static loci_status keep_usage(void *ctx, const loci_event *event, loci_error *err) {
    (void)err;
    reads *out = ctx;
    if (event->kind != LOCI_EVENT_USAGE) return LOCI_OK;
    out->share = (double)event->usage->kv_read_bytes / (double)event->usage->kv_dense_bytes;
    out->usage = *event->usage;
    return LOCI_OK;
}

/* A budget of tokens is a share of them; answers read about that share. */
static void test_a_squeezed_answer_reads_its_budget(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    static const char *const corpora[] = {"books", "text"};
    for (int c = 0; c < 2; c++) {
        loci_corpus_info info;
        loci_error err = {0};
        assert_int_equal(loci_corpus_get(loci_engine_store(engine), corpora[c], &info, &err),
                         LOCI_OK);
        for (int by = 0; by < 2; by++) {
            reads out = {0};
            loci_answer_request request = {.corpus = corpora[c],
                                           .question = QUESTION,
                                           .mode = LOCI_MODE_SQUEEZED,
                                           .temperature = 0.8,
                                           .seed = 7,
                                           .max_tokens = 40};
            if (by == 0)
                request.budget = (uint32_t)info.tokens / 8;
            else
                request.sparsity = 0.875;
            if (loci_engine_answer(engine, &request, NULL, keep_usage, &out, &err))
                fail_msg("%s", err.text);
            print_message("%s: reads %g\n", corpora[c], out.share);
            assert_true(out.share > 0.125 / 2 && out.share < 0.125 * 2);
        }
    }
    loci_engine_close(engine);
}

/* The first answer of a revision, for which thresholds are made, counts what any other does. */
static void test_thresholds_are_not_part_of_an_answer(void **state) {
    (void)state;
    static const char *const corpora[] = {"books", "text"};
    loci_engine *engine = open_engine();
    loci_store *store = loci_engine_store(engine);
    for (int c = 0; c < 2; c++) {
        loci_corpus_info info;
        loci_error err = {0};
        reads out[2];
        set(engine, corpora[c], 0, 1, 1);
        forget_thresholds(engine, corpora[c]);
        assert_int_equal(loci_corpus_get(store, corpora[c], &info, &err), LOCI_OK);
        assert_int_equal(/* what a causal corpus has kept: its end is read again */
                         loci_corpus_note_put(store, &info, LOCI_NOTE_QUERIES,
                                              loci_slice_text("none"), &err),
                         LOCI_OK);
        for (int i = 0; i < 2; i++) {
            loci_answer_request request = {.corpus = corpora[c],
                                           .question = QUESTION,
                                           .mode = LOCI_MODE_SQUEEZED,
                                           .sparsity = 0.875,
                                           .max_tokens = 4};
            if (loci_engine_answer(engine, &request, NULL, keep_usage, &out[i], &err))
                fail_msg("%s", err.text);
        }
        const loci_usage *first = &out[0].usage, *second = &out[1].usage;
        assert_true(second->kv_read_bytes > 0);
        assert_int_equal(first->kv_read_bytes, second->kv_read_bytes);
        assert_int_equal(first->kv_dense_bytes, second->kv_dense_bytes);
        assert_int_equal(first->index_read_bytes, second->index_read_bytes);
        assert_int_equal(first->fetched_bytes, second->fetched_bytes);
        assert_int_equal(first->question_read_bytes, second->question_read_bytes);
        assert_int_equal(first->decode_read_bytes, second->decode_read_bytes);
    }
    loci_engine_close(engine);
}

/* --- Calibration ------------------------------------------------------------------------------ */

static loci_calibration calibrated(loci_engine *engine, const char *corpus, bool apply) {
    loci_calibration out;
    loci_error err = {0};
    if (loci_engine_calibrate(engine, corpus, apply, NULL, &out, &err)) fail_msg("%s", err.text);
    return out;
}

/* Of one passage without positions both encodings are the same, so both readings are; under other
 * settings they are not. */
static void test_calibration_of_equal_encodings_finds_no_difference(void **state) {
    (void)state;
    loci_engine *engine = engine_in(folder, "placeless");
    loci_corpus_info info;
    loci_error err = {0};
    create_corpus(engine, "short", LOCI_ENCODING_INDEPENDENT, false, &info);
    loci_calibration out;
    assert_int_equal(loci_engine_calibrate(engine, "short", false, NULL, &out, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "TOO_SHORT");
    add_file(engine, "short", files[0], 420);
    out = calibrated(engine, "short", false);
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "short", &info, &err), LOCI_OK);
    assert_int_equal(info.segments, 2);
    assert_true(out.comparable && !out.causal && !out.applied && !out.thresholds);
    assert_true(out.samples == 1 && out.row_count == 15 && out.tokens == 63);
    assert_true(out.context_tokens > 50 && out.context_tokens < 256);
    print_message("causal %g, apart %g, alone %g, T 0.5 %g\n", out.causal_loss, out.rows[0].loss,
                  out.alone_loss, out.rows[4].loss);
    assert_true(fabs(out.rows[0].loss - out.causal_loss) < 5e-4 * out.causal_loss);
    assert_true(out.rows[0].agreement > 0.95);
    assert_true(fabs(out.alone_loss - out.causal_loss) > 0.01 * out.causal_loss);
    assert_true(fabs(out.rows[4].loss - out.causal_loss) > 2e-3 * out.causal_loss);
    loci_engine_close(engine);
}

static void test_calibration_sets_the_best(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    loci_store *store = loci_engine_store(engine);
    loci_corpus_info info;
    loci_error err = {0};
    loci_calibration first, out;
    set(engine, "books", 1, 0.6, 0.95);
    first = calibrated(engine, "books", false);
    assert_true(first.samples == 16 && first.row_count == 16 && first.thresholds);
    assert_true(first.rows[15].present && !first.rows[0].present && first.rows[0].error == 0);
    for (uint32_t i = 0; i < first.row_count; i++) {
        assert_true(first.rows[i].loss >= first.rows[first.best].loss);
        assert_true(first.rows[i].agreement >= 0 && first.rows[i].agreement <= 1);
    }
    assert_int_equal(loci_corpus_get(store, "books", &info, &err), LOCI_OK);
    assert_true(info.settings.attn_temperature == 0.6f); /* it was only looked at */
    out = calibrated(engine, "books", true);
    assert_memory_equal(out.rows, first.rows, sizeof out.rows);
    assert_true(out.applied && out.revision == info.revision);
    assert_int_equal(loci_corpus_get(store, "books", &info, &err), LOCI_OK);
    assert_true(info.settings.attn_temperature == out.rows[out.best].temperature &&
                info.settings.attn_scale == out.rows[out.best].scale &&
                info.settings.dense_layers == 1);
    assert_true(engine->squeezed.scale == 1 / info.settings.attn_temperature); /* made for these */
    out = calibrated(engine, "text", false);
    assert_true(out.causal && out.samples > 0);
    assert_int_equal(loci_engine_calibrate(engine, "text", true, NULL, &out, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "ENCODING");
    assert_int_equal(loci_engine_calibrate(engine, "none", true, NULL, &out, &err),
                     LOCI_E_NOTFOUND);
    loci_cancel cancel;
    loci_cancel_init(&cancel, 0);
    loci_cancel_request(&cancel);
    assert_int_equal(loci_engine_calibrate(engine, "books", false, &cancel, &out, &err),
                     LOCI_E_CANCELLED);
    set(engine, "books", 0, 1, 1);
    loci_engine_close(engine);
}

/* --- Memory ----------------------------------------------------------------------------------- */

/* Takes all of the budget but `left`; returns how much that is. */
static uint64_t fill_budget(loci_engine *engine, uint64_t left) {
    loci_budget_usage usage;
    loci_error err = {0};
    loci_budget_usage_of(engine->budget, &usage);
    uint64_t taken = usage.limit - usage.used - left;
    assert_int_equal(loci_budget_take(engine->budget, LOCI_MEMORY_PROCESS, taken, "a test", &err),
                     LOCI_OK);
    return taken;
}

static uint64_t used_for_lookups(loci_engine *engine) {
    loci_budget_usage usage;
    loci_budget_usage_of(engine->budget, &usage);
    return usage.part[LOCI_MEMORY_LOOKUPS];
}

/* What does not fit is refused by name, what was reserved is given back. */
static void test_calibration_reserves_its_memory(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    const loci_model_config *config = loci_model_config_of(loci_engine_model(engine));
    loci_error err = {0};
    loci_calibration out;
    loci_query query;
    set(engine, "books", 0, 1, 1);
    set(engine, "text", 0, 1, 1);
    /* Room for the rest of both, as far as it is small. */
    uint64_t taken = fill_budget(engine, loci_plan_slot_bytes(config, 4 * 255));
    assert_int_equal(loci_engine_calibrate(engine, "books", false, NULL, &out, &err), LOCI_E_LIMIT);
    assert_string_equal(err.reason, "MEMORY_BUDGET");
    assert_non_null(strstr(err.text, "comparing encodings of a corpus needs"));
    loci_budget_give(engine->budget, LOCI_MEMORY_PROCESS, taken);
    forget_thresholds(engine, "text");
    begin(&query, engine, "text");
    uint64_t before = used_for_lookups(engine);
    taken = fill_budget(engine, loci_recorder_bytes(config, true));
    assert_int_equal(loci_query_squeezed(&query, 0.1, &err), LOCI_E_LIMIT);
    assert_string_equal(err.reason, "MEMORY_BUDGET");
    assert_non_null(strstr(err.text, "calibrating mode squeezed needs"));
    loci_budget_give(engine->budget, LOCI_MEMORY_PROCESS, taken);
    assert_int_equal(used_for_lookups(engine), before);
    assert_int_equal(loci_query_squeezed(&query, 0.1, &err), LOCI_OK);
    assert_int_equal(query.reserved, 24 * (uint64_t)loci_snapshot_segments(query.snapshot));
    loci_query_fini(&query);
    assert_true(calibrated(engine, "books", false).samples > 0);
    loci_engine_close(engine);
}

/* Of a model of 8 billion parameters: 100 rows of 32 layers of 4,096 floats, and halves of them. */
static void test_recorded_queries_of_a_large_model(void **state) {
    (void)state;
    const loci_model_config large = {.q_heads = 32, .head_dim = 128, .retrieval_count = 32};
    uint64_t rows = 100ull * 32 * 4096;
    assert_int_equal(loci_recorder_bytes(&large, false), 4 * rows);
    assert_true(loci_recorder_bytes(&large, true) > 4 * rows + 4 * 2 * rows);
    assert_true(loci_recorder_bytes(&large, true) < 4 * rows + 8 * 2 * rows);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_temperature_and_scale_are_those_of_the_formula),
        cmocka_unit_test(test_dense_layers_and_reading_all),
        cmocka_unit_test(test_masses_add_up),
        cmocka_unit_test(test_squeezed_thresholds_keep_the_share),
        cmocka_unit_test(test_squeezed_thresholds_are_kept),
        cmocka_unit_test(test_shares_between_and_beyond_the_table),
        cmocka_unit_test(test_a_squeezed_answer_reads_its_budget),
        cmocka_unit_test(test_thresholds_are_not_part_of_an_answer),
        cmocka_unit_test(test_calibration_of_equal_encodings_finds_no_difference),
        cmocka_unit_test(test_calibration_sets_the_best),
        cmocka_unit_test(test_calibration_reserves_its_memory),
        cmocka_unit_test(test_recorded_queries_of_a_large_model),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
