/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over a corpus layer by layer, under its settings: random queries of a GQA model whose
 * every layer is a retrieval layer, against plain transcriptions in double of the rules in
 * attention/README.md ("Settings of a corpus").
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"
#include "base/rng.h"
#include "tests/services/modes_support.h"

#define ROWS 5u

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

static void attend_rows(loci_query *query, uint32_t layer, attended *a, uint32_t rows,
                        bool in_company) {
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
                             .rows = rows,
                             .row_position = 1,
                             .in_company = in_company,
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
    if (loci_corpus_attended(query, ops->sync(stream, &err), &err) != LOCI_OK)
        fail_msg("%s", err.text);
    for (int i = 0; i < 3; i++) ops->free(backend, buffers[i]);
}

static void attend(loci_query *query, uint32_t layer, attended *a) {
    attend_rows(query, layer, a, ROWS, false);
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
                                                  extent->segment_begin, extent->segments, NULL,
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
        change_settings(engine, cases[c].corpus, 0, cases[c].temperature, cases[c].scale);
        begin_query(&query, engine, cases[c].corpus);
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
        change_settings(engine, cases[c].corpus, 0, 1, 1);
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
    static const char *const corpora[] = {"books", "text", "narrow"};
    loci_engine *engine = open_engine();
    for (int c = 0; c < 6; c++) {
        bool int8 = c % 3 == 2;
        change_settings(engine, corpora[c % 3], 2, c < 3 ? 1 : 0.8, c < 3 ? 1 : 0.9);
        loci_query query;
        begin_query(&query, engine, corpora[c % 3]);
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
            size_t token = loci_kv_stride(DIM, int8 ? LOCI_I8 : LOCI_BF16);
            size_t flat = (size_t)query.view->flat_tokens * KV_HEADS * 4 * DIM;
            size_t most = (query.view->tokens - query.view->flat_tokens) * KV_HEADS * token + flat;
            assert_true((read >= most) == all);
        }
        loci_query_fini(&query);
        change_settings(engine, corpora[c % 3], 0, 1, 1);
    }
    loci_engine_close(engine);
}

/* What the cpu backend is asked as if it were a device that reads two rows faster than it selects.
 */
static bool reads_two(loci_backend *self, const loci_corpus_view *corpus, uint32_t layer,
                      uint32_t rows, uint32_t q_heads) {
    (void)self;
    assert_int_equal(layer, 1);
    assert_true(corpus->tokens > 0 && q_heads == HEADS);
    return rows >= 2;
}

/* Mode hierarchical reads everything where the backend takes less time for that, and says so; with
 * a budget, and in mode squeezed, it does not. */
static void test_reading_all_where_it_is_faster(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    const loci_backend_ops *ops = engine->backend->ops;
    loci_backend_ops reading = *ops;
    reading.reads_whole = reads_two;
    loci_query query;
    attended dense, other;
    begin_query(&query, engine, "books");
    query.params.top_p = 0.5f;
    query.params.roots_min = query.params.candidates_min = 1;
    query.params.roots = query.params.candidates = 0.01f;
    draw(&dense, 23);
    for (uint32_t rows = 1; rows <= 2; rows++)
        for (uint32_t budget = 0; budget <= 8; budget += 8) {
            bool all = rows == 2 && budget == 0;
            other = dense;
            query.params.budget = 0;
            query.params.mode = LOCI_MODE_DENSE;
            uint64_t before = query.usage.kv_read_bytes;
            attend_rows(&query, 1, &dense, rows, false);
            uint64_t whole = query.usage.kv_read_bytes - before;
            query.params.budget = budget;
            query.params.mode = LOCI_MODE_HIERARCHICAL;
            engine->backend->ops = &reading;
            before = query.usage.kv_read_bytes;
            attend_rows(&query, 1, &other, rows, false);
            engine->backend->ops = ops;
            assert_true((query.usage.kv_read_bytes - before == whole) == all);
            assert_true((memcmp(other.out, dense.out, rows * WIDTH * sizeof(float)) == 0) == all);
            memcpy(dense.out, dense.own, sizeof dense.out);
        }
    loci_query_fini(&query);
    loci_engine_close(engine);
}

/* With either setting the attention on sink, corpus and own tokens adds up. */
static void test_masses_add_up(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    for (int c = 0; c < 2; c++) {
        change_settings(engine, "books", 0, c ? 0.8 : 1, c ? 0.85 : 1);
        loci_query query;
        loci_error err = {0};
        attended a;
        begin_query(&query, engine, "books");
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
    change_settings(engine, "books", 0, 1, 1);
    loci_engine_close(engine);
}

/* --- Steps that a backend can enqueue as a whole ---------------------------------------------- */

/* What the cpu backend is asked as if it could. */
static struct {
    uint8_t key[2][512];
    size_t bytes;
    unsigned begun, ended;
} steps;

static bool begin_step(loci_stream *stream, loci_lookup *lookup, const loci_corpus_view *corpus,
                       uint32_t layer, const void *key, size_t bytes) {
    (void)stream;
    (void)lookup;
    (void)corpus;
    (void)layer;
    assert_true(bytes <= sizeof steps.key[0]);
    memcpy(steps.key[0], steps.key[1], sizeof steps.key[0]);
    memcpy(steps.key[1], key, bytes);
    steps.bytes = bytes;
    steps.begun++;
    return false;
}

static bool end_step(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats) {
    (void)stream;
    (void)lookup;
    assert_true(stats->dense_kv_bytes > 0); /* lookup_stats is part of the step */
    steps.ended++;
    return true;
}

/* The last two steps. */
static bool same_key(void) {
    return memcmp(steps.key[0], steps.key[1], steps.bytes) == 0;
}

static loci_backend_ops with_steps(const loci_backend_ops *ops) {
    loci_backend_ops stepping = *ops;
    stepping.step_begin = begin_step;
    stepping.step_end = end_step;
    return stepping;
}

/* One row in company has the bits that it has alone, and is the same step wherever the others put
 * it. */
static void test_one_row_alone_and_in_company(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    const loci_backend_ops *ops = engine->backend->ops;
    loci_backend_ops stepping = with_steps(ops);
    loci_query query;
    attended plain, stepped;
    begin_query(&query, engine, "books");
    query.params.budget = 30;
    draw(&plain, 11);
    attend_rows(&query, 1, &plain, 1, false);
    engine->backend->ops = &stepping;
    for (int company = 0; company < 2; company++)
        for (int again = 0; again < 2; again++) {
            stepped = plain;
            memset(stepped.out, 0, sizeof stepped.out);
            attend_rows(&query, 1, &stepped, 1, company == 1);
            assert_memory_equal(stepped.out, plain.out, WIDTH * sizeof(float));
            assert_memory_equal(stepped.lse, plain.lse, HEADS * sizeof(float));
        }
    assert_int_equal(steps.begun, 4);
    assert_int_equal(steps.ended, 4);
    assert_true(same_key());
    engine->backend->ops = ops;
    loci_query_fini(&query);
    loci_engine_close(engine);
}

/* What makes it another one; and what is none. */
static void test_other_steps(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    const loci_backend_ops *ops = engine->backend->ops;
    loci_backend_ops stepping = with_steps(ops);
    engine->backend->ops = &stepping;
    loci_query query;
    loci_error err = {0};
    attended a;
    begin_query(&query, engine, "books");
    draw(&a, 12);
    for (int change = 0; change < 6; change++) {
        attend_rows(&query, 1, &a, 1, true);
        attend_rows(&query, 1, &a, 1, true);
        assert_true(same_key());
        if (change == 0) query.params.budget = 31;
        if (change == 1) query.params.candidates *= 2;
        if (change == 2) query.settings.attn_temperature = 0.9f;
        if (change == 3) query.settings.dense_layers = 2;
        if (change == 4) assert_int_equal(loci_corpus_attend_begin(&query, &err), LOCI_OK);
        if (change == 5) {
            loci_select_params params = query.params;
            loci_corpus_settings settings = query.settings;
            loci_query_fini(&query); /* the same question once more */
            begin_query(&query, engine, "books");
            query.params = params;
            query.settings = settings;
        }
        attend_rows(&query, 1, &a, 1, true);
        assert_false(same_key());
    }
    unsigned begun = steps.begun;
    attend(&query, 1, &a);
    query.settings.attn_scale = 0.5f; /* the host has a part in it */
    attend_rows(&query, 1, &a, 1, true);
    assert_int_equal(steps.begun, begun);
    engine->backend->ops = ops;
    loci_query_fini(&query);
    loci_engine_close(engine);
}

/* Relative L2 error of what comes out of a layer, over int8 against over bf16. */
static void test_int8_is_near_bf16(void **state) {
    (void)state;
    loci_engine *engine = open_engine();
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        attended a[2];
        for (int int8 = 0; int8 < 2; int8++) {
            loci_query query;
            begin_query(&query, engine, int8 ? "narrow" : "books");
            query.params.mode = LOCI_MODE_DENSE;
            draw(&a[int8], 19 + layer);
            attend(&query, layer, &a[int8]);
            loci_query_fini(&query);
        }
        double off = 0, norm = 0;
        for (uint32_t i = 0; i < ROWS * WIDTH; i++) {
            double delta = (double)a[1].out[i] - (double)a[0].out[i];
            off += delta * delta;
            norm += (double)a[0].out[i] * (double)a[0].out[i];
        }
        print_message("layer %u: %.5f\n", layer, sqrt(off / norm));
        assert_true(off > 0 && sqrt(off / norm) < 0.01);
    }
    loci_engine_close(engine);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_temperature_and_scale_are_those_of_the_formula),
        cmocka_unit_test(test_dense_layers_and_reading_all),
        cmocka_unit_test(test_reading_all_where_it_is_faster),
        cmocka_unit_test(test_masses_add_up),
        cmocka_unit_test(test_one_row_alone_and_in_company),
        cmocka_unit_test(test_other_steps),
        cmocka_unit_test(test_int8_is_near_bf16),
    };
    return cmocka_run_group_tests(tests, set_up_modes, tear_down_modes);
}
