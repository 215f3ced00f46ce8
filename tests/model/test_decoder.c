/* SPDX-License-Identifier: Apache-2.0
 *
 * The decoder against Hugging Face transformers (goldens of make_decoder_goldens.py), in both
 * precisions and on every instruction set of this machine; its own invariants (packing,
 * chunking, threads, cancelling); and the same work on the deferred backend, which proves that
 * nothing is read before a sync.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../attention/deferred.h"
#include "base/half.h"
#include "model/model.h"

/* The same tests are built once for each backend; only the CPU has instruction sets. */
#ifndef LOCI_TEST_BACKEND
#define LOCI_TEST_BACKEND "cpu"
#define LOCI_TEST_CPU
#endif

#define DATA "tests/data/model/"
#define BUILT_IN "model/default"
#define TINY DATA "tiny-3heads"

static loci_error err;

static void ok(loci_status status) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), err.text);
}

static void *grab(size_t bytes) {
    void *data = calloc(1, bytes + 1);
    assert_non_null(data);
    return data;
}

static loci_backend *open_backend(const char *isa, unsigned threads) {
    loci_backend_options options = {threads, isa};
    loci_backend *backend;
    ok(loci_backend_open(LOCI_TEST_BACKEND, &options, &backend, &err));
    return backend;
}

/* K and V of some segments; `all` is K of every pair, then V of every pair. */
typedef struct encoded {
    uint16_t *all;
    size_t count; /* values of K */
} encoded;

static encoded encode(loci_model *model, const uint32_t *tokens, const uint32_t *begin,
                      uint32_t segments) {
    const loci_model_config *c = loci_model_config_of(model);
    uint32_t pairs = c->retrieval_count * c->kv_heads;
    size_t each = (size_t)(begin[segments] - begin[0]) * c->head_dim;
    encoded result = {grab(2 * pairs * each * sizeof(uint16_t)), pairs * each};
    uint16_t **parts = grab(2 * pairs * sizeof *parts);
    for (uint32_t i = 0; i < 2 * pairs; i++) parts[i] = result.all + i * each;
    loci_encode_out out = {parts, parts + pairs};
    ok(loci_model_encode(model, tokens, begin, segments, &out, NULL, &err));
    free((void *)parts);
    return result;
}

/* |a - b| <= tolerance * (largest |b|): absolute at the row's scale. */
static void check_row(const float *a, const float *b, size_t count, double tolerance,
                      const char *what, uint32_t row) {
    double scale = 0.0, worst = 0.0;
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        if (fabs((double)b[i]) > scale) scale = fabs((double)b[i]);
        if (!(difference <= worst)) {
            worst = difference;
            at = i;
        }
    }
    if (!(worst <= tolerance * scale))
        fail_msg("%s, row %u: value %zu is %g, expected %g (scale %g)", what, row, at,
                 (double)a[at], (double)b[at], scale);
}

/* --- Goldens ------------------------------------------------------------------------------ */

typedef struct golden {
    uint8_t *data;
    loci_reader reader;
} golden;

static golden golden_open(const char *path) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    size_t size = (size_t)ftell(file);
    rewind(file);
    golden g = {grab(size), {0}};
    assert_int_equal(fread(g.data, 1, size, file), size);
    fclose(file);
    g.reader = loci_reader_of(loci_slice_of(g.data, size));
    return g;
}

static uint32_t *read_list(golden *g, uint32_t *count) {
    *count = loci_read_u32(&g->reader);
    uint32_t *list = grab(*count * sizeof *list);
    for (uint32_t i = 0; i < *count; i++) list[i] = loci_read_u32(&g->reader);
    return list;
}

static float *read_floats(golden *g, size_t count) {
    float *values = grab(count * sizeof *values);
    for (size_t i = 0; i < count; i++) {
        union {
            uint32_t u;
            float f;
        } bits = {loci_read_u32(&g->reader)};
        values[i] = bits.f;
    }
    return values;
}

/* Prefill, prefill in two parts, and token by token must all give the reference's logits. */
static void check_logits(loci_model *model, golden *g, double tolerance) {
    uint32_t count, rows, vocab = loci_model_config_of(model)->vocab;
    uint32_t *tokens = read_list(g, &count), *row = read_list(g, &rows);
    float *expected = read_floats(g, (size_t)rows * vocab);
    loci_sequence *sequence;
    ok(loci_sequence_open(model, count, &sequence, &err));
    ok(loci_sequence_append(sequence, tokens, count, count, -1, NULL, &err));
    const float *all = loci_sequence_logits(sequence);
    for (uint32_t i = 0; i < rows; i++)
        check_row(all + (size_t)row[i] * vocab, expected + (size_t)i * vocab, vocab, tolerance,
                  "prefill", row[i]);
    loci_sequence_reset(sequence);
    uint32_t last = row[rows - 1], done = last > 8 ? last - 8 : 0;
    if (done) ok(loci_sequence_append(sequence, tokens, done, 0, -1, NULL, &err));
    for (uint32_t i = 0; done <= last; done++) {
        ok(loci_sequence_append(sequence, tokens + done, 1, 1, -1, NULL, &err));
        while (i < rows && row[i] < done) i++;
        if (i < rows && row[i] == done)
            check_row(loci_sequence_logits(sequence), expected + (size_t)i * vocab, vocab,
                      tolerance, "token by token", done);
    }
    assert_int_equal(loci_sequence_length(sequence), last + 1);
    loci_sequence_close(sequence);
    free(tokens);
    free(row);
    free(expected);
}

/* The segment alone and between two others; both must be the reference's, and the same bytes. */
static void check_segment(loci_model *model, golden *g, double tolerance) {
    const loci_model_config *c = loci_model_config_of(model);
    uint32_t count;
    uint32_t *tokens = read_list(g, &count);
    uint32_t values = loci_read_u32(&g->reader);
    float *expected = read_floats(g, 2 * (size_t)values);
    uint32_t alone_begin[] = {0, count}, packed_begin[] = {0, 9, 9 + count, 9 + count + 40};
    uint32_t *packed_tokens = grab((count + 49) * sizeof *tokens);
    for (uint32_t i = 0; i < count + 49; i++) packed_tokens[i] = (i * 7 + 3) % c->vocab;
    memcpy(packed_tokens + 9, tokens, count * sizeof *tokens);
    encoded alone = encode(model, tokens, alone_begin, 1);
    encoded packed = encode(model, packed_tokens, packed_begin, 3);
    assert_int_equal(alone.count, values);
    float *row = grab(c->head_dim * sizeof *row);
    for (size_t i = 0; i < 2 * (size_t)values; i += c->head_dim) {
        for (uint32_t d = 0; d < c->head_dim; d++) row[d] = loci_bf16_to_f32(alone.all[i + d]);
        check_row(row, expected + i, c->head_dim, tolerance, "segment",
                  (uint32_t)(i / c->head_dim));
        size_t pair = i / c->head_dim / count, at = i / c->head_dim % count;
        assert_memory_equal(alone.all + i,
                            packed.all + (pair * (count + 49) + 9 + at) * c->head_dim,
                            c->head_dim * sizeof(uint16_t));
    }
    free(row);
    free(alone.all);
    free(packed.all);
    free(packed_tokens);
    free(tokens);
    free(expected);
}

static void check_goldens(const char *dir, const char *path, loci_backend *backend,
                          loci_dtype precision, bool mapped) {
    loci_model *model;
    ok(loci_model_prepare(dir, &model, &err));
    ok(loci_model_load(model, dir, backend, precision, mapped, &err));
    golden g = golden_open(path);
    /* Keys are rounded to bf16 (2^-9) in both precisions. */
    double logits = precision == LOCI_F32 ? 1e-4 : 2e-2, kv = precision == LOCI_F32 ? 4e-3 : 4e-2;
    unsigned records = 0;
    while (!loci_reader_done(&g.reader)) {
        uint32_t kind = loci_read_u32(&g.reader);
        assert_true(kind == 1 || kind == 2);
        if (kind == 1)
            check_logits(model, &g, logits);
        else
            check_segment(model, &g, kv);
        assert_false(g.reader.failed);
        records++;
    }
    assert_true(records >= 5);
    free(g.data);
    loci_model_close(model);
}

#ifdef LOCI_TEST_CPU
static const char *const isas[] = {"portable", "avx2", "avx512", "avx512_bf16"};
#else
static const char *const isas[] = {NULL};
#endif

static const char *const tiny[] = {"3heads", "untied", "llama", "mistral", "qwen2", "qwen3"};

static void test_tiny_models_equal_transformers(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        loci_backend *backend = open_backend(isas[i], 2);
        for (size_t m = 0; m < sizeof tiny / sizeof *tiny; m++) {
            char dir[64], path[64];
            snprintf(dir, sizeof dir, DATA "tiny-%s", tiny[m]);
            snprintf(path, sizeof path, DATA "decoder_tiny-%s.bin", tiny[m]);
            bool can_map;
            check_goldens(dir, path, backend, LOCI_F32, false);
            check_goldens(dir, path, backend, LOCI_BF16, false);
            ok(loci_model_can_map(dir, backend, LOCI_F32, &can_map, &err));
            assert_false(can_map);
            ok(loci_model_can_map(dir, backend, LOCI_BF16, &can_map, &err));
            bool in_bf16 = strcmp(tiny[m], "3heads") != 0;
            assert_int_equal(can_map, in_bf16 && backend->ops->weight_map != NULL);
            if (can_map) check_goldens(dir, path, backend, LOCI_BF16, true);
        }
        loci_backend_close(backend);
    }
}

static void test_built_in_model_equals_transformers(void **state) {
    (void)state;
    loci_backend *backend = open_backend(NULL, 0);
    check_goldens(BUILT_IN, DATA "decoder_built-in.bin", backend, LOCI_F32, false);
    check_goldens(BUILT_IN, DATA "decoder_built-in.bin", backend, LOCI_BF16, false);
    if (backend->ops->weight_map)
        check_goldens(BUILT_IN, DATA "decoder_built-in.bin", backend, LOCI_BF16, true);
    loci_backend_close(backend);
}

/* --- Invariants --------------------------------------------------------------------------- */

#ifdef __SANITIZE_ADDRESS__
#define MANY 900u /* each length once */
#else
#define MANY 2500u /* over one batch */
#endif

/* Segments of odd lengths. */
static uint32_t make_segments(uint32_t vocab, uint32_t *tokens, uint32_t *begin) {
    static const uint32_t lengths[] = {1, 255, 3, 64, 31, 32, 33, 200, 256, 7};
    uint32_t segments = 0;
    for (uint32_t i = 0; i < MANY; i++) tokens[i] = (i * 2654435761u >> 7) % vocab;
    begin[0] = 0;
    for (uint32_t at = 0; at < MANY; segments++) {
        at += lengths[segments % (sizeof lengths / sizeof *lengths)];
        begin[segments + 1] = at < MANY ? at : MANY;
    }
    return segments;
}

static void test_encoding_does_not_depend_on_packing_or_threads(void **state) {
    (void)state;
    static uint32_t tokens[MANY], begin[MANY + 1];
    loci_backend *backends[] = {open_backend(NULL, 2), open_backend(NULL, 3)};
    static const struct {
        const char *dir;
        loci_dtype precision;
    } runs[] = {{TINY, LOCI_F32},
                {BUILT_IN, LOCI_BF16},
                {DATA "tiny-qwen2", LOCI_F32},
                {DATA "tiny-qwen2", LOCI_BF16},
                {DATA "tiny-qwen3", LOCI_F32}};
    for (size_t run = 0; run < sizeof runs / sizeof *runs; run++) {
        loci_model *model[2];
        for (int i = 0; i < 2; i++)
            ok(loci_model_open(runs[run].dir, backends[i], runs[run].precision, &model[i], &err));
        const loci_model_config *c = loci_model_config_of(model[0]);
        uint32_t segments = make_segments(c->vocab, tokens, begin);
        encoded all = encode(model[0], tokens, begin, segments);
        encoded threads = encode(model[1], tokens, begin, segments);
        assert_memory_equal(all.all, threads.all, 2 * all.count * sizeof *all.all);
        uint32_t pairs = 2 * c->retrieval_count * c->kv_heads;
        for (uint32_t s = 0; s < segments; s++) {
            uint32_t length = begin[s + 1] - begin[s];
            encoded one = encode(model[0], tokens, begin + s, 1);
            for (uint32_t p = 0; p < pairs; p++)
                assert_memory_equal(one.all + (size_t)p * length * c->head_dim,
                                    all.all + ((size_t)p * MANY + begin[s]) * c->head_dim,
                                    length * c->head_dim * sizeof(uint16_t));
            free(one.all);
        }
        free(all.all);
        free(threads.all);
        for (int i = 0; i < 2; i++) loci_model_close(model[i]);
    }
    for (int i = 0; i < 2; i++) loci_backend_close(backends[i]);
}

typedef struct attend_log {
    uint32_t calls, rows, retrieval[64], position[64];
    float scale;
} attend_log;

static loci_status log_attend(void *ctx, const loci_attend_call *call, loci_error *e) {
    (void)e;
    attend_log *log = ctx;
    log->retrieval[log->calls % 64] = call->retrieval_index;
    log->position[log->calls % 64] = call->row_position;
    log->calls++;
    log->rows += call->rows;
    log->scale = call->scale;
    return LOCI_OK;
}

static void test_attend_callback_and_stopping(void **state) {
    (void)state;
    loci_backend *backend = open_backend(NULL, 1);
    loci_model *model;
    loci_sequence *sequence;
    uint32_t tokens[300];
    attend_log log = {0};
    for (uint32_t i = 0; i < 300; i++) tokens[i] = i % 100;
    ok(loci_model_open(TINY, backend, LOCI_F32, &model, &err));
    ok(loci_sequence_open(model, 310, &sequence, &err));
    loci_sequence_set_attend(sequence, log_attend, NULL, &log);
    ok(loci_sequence_append(sequence, tokens, 300, 1, -1, NULL, &err));
    assert_int_equal(log.calls, 4); /* two chunks, two retrieval layers */
    assert_int_equal(log.rows, 600);
    assert_int_equal(log.retrieval[1], 1);
    assert_int_equal(log.position[2], 256);
    loci_sequence_reset(sequence);
    log = (attend_log){0};
    ok(loci_sequence_append(sequence, tokens, 10, 0, 0, NULL, &err));
    assert_int_equal(log.calls, 1);
    assert_null(loci_sequence_logits(sequence));
    /* The layers above have no keys of these tokens: going on must be refused. */
    assert_int_equal(loci_sequence_append(sequence, tokens, 1, 1, -1, NULL, &err),
                     LOCI_E_PRECONDITION);
    ok(loci_sequence_append(sequence, tokens, 1, 0, 0, NULL, &err));
    assert_int_equal(loci_sequence_append(sequence, tokens, 1, 0, 2, NULL, &err), LOCI_E_INVAL);
    assert_int_equal(loci_sequence_append(sequence, tokens, 1, 1, 0, NULL, &err), LOCI_E_INVAL);
    assert_int_equal(loci_sequence_append(sequence, tokens, 300, 0, 0, NULL, &err), LOCI_E_LIMIT);
    loci_sequence_close(sequence);
    loci_model_close(model);
    loci_backend_close(backend);
}

static void append_and_copy(loci_sequence *sequence, const uint32_t *tokens, uint32_t count,
                            float *logits, uint32_t vocab) {
    loci_sequence_reset(sequence);
    loci_sequence_scale_attention(sequence, logits[0]);
    ok(loci_sequence_append(sequence, tokens, count, 1, -1, NULL, &err));
    memcpy(logits, loci_sequence_logits(sequence), vocab * sizeof *logits);
}

/* The factor reaches the sequence's own attention and the corpus's, in retrieval layers alone,
 * until reset. */
static void test_attention_is_scaled(void **state) {
    (void)state;
    loci_backend *backend = open_backend(NULL, 1);
    loci_model *model;
    loci_sequence *sequence;
    attend_log log = {0};
    uint32_t tokens[20];
    for (uint32_t i = 0; i < 20; i++) tokens[i] = 1 + i;
    ok(loci_model_open(TINY, backend, LOCI_F32, &model, &err));
    uint32_t vocab = loci_model_config_of(model)->vocab;
    float *plain = malloc(vocab * sizeof *plain), *sharp = malloc(vocab * sizeof *sharp);
    ok(loci_sequence_open(model, 32, &sequence, &err));
    loci_sequence_set_attend(sequence, log_attend, NULL, &log);
    plain[0] = 1.0f;
    append_and_copy(sequence, tokens, 20, plain, vocab);
    float scale = log.scale;
    sharp[0] = 1.5f;
    append_and_copy(sequence, tokens, 20, sharp, vocab);
    assert_true(fabsf(log.scale - 1.5f * scale) < 1e-6f);
    assert_memory_not_equal(plain, sharp, vocab * sizeof *plain);
    loci_sequence_reset(sequence);
    ok(loci_sequence_append(sequence, tokens, 20, 1, -1, NULL, &err));
    assert_true(log.scale == scale);
    assert_memory_equal(plain, loci_sequence_logits(sequence), vocab * sizeof *plain);
    /* One row attends to itself alone: nothing to sharpen. */
    plain[0] = 1.0f;
    append_and_copy(sequence, tokens, 1, plain, vocab);
    sharp[0] = 1.5f;
    append_and_copy(sequence, tokens, 1, sharp, vocab);
    assert_memory_equal(plain, sharp, vocab * sizeof *plain);
    loci_sequence_close(sequence);
    free(plain);
    free(sharp);
    loci_model_close(model);
    loci_backend_close(backend);
}

static loci_status cancel_at_once(void *ctx, const loci_attend_call *call, loci_error *e) {
    (void)call;
    (void)e;
    loci_cancel_request(ctx);
    return LOCI_OK;
}

static void test_bad_input_and_cancel(void **state) {
    (void)state;
    loci_backend *backend = open_backend(NULL, 1);
    loci_model *model;
    loci_sequence *sequence;
    uint32_t tokens[] = {1, 2, 271}, begin[] = {0, 3}, backwards[] = {0, 3, 1};
    uint16_t sink[4096];
    uint16_t *parts[] = {sink, sink};
    loci_encode_out out = {parts, parts};
    ok(loci_model_open(TINY, backend, LOCI_F32, &model, &err));
    ok(loci_sequence_open(model, 8, &sequence, &err));
    assert_int_equal(loci_sequence_append(sequence, tokens, 3, 0, -1, NULL, &err), LOCI_E_INVAL);
    assert_non_null(strstr(err.text, "271"));
    assert_int_equal(loci_model_encode(model, tokens, begin, 1, &out, NULL, &err), LOCI_E_INVAL);
    assert_int_equal(loci_model_encode(model, tokens, backwards, 2, &out, NULL, &err),
                     LOCI_E_INVAL);
    assert_int_equal(loci_sequence_append(sequence, tokens, 0, 0, -1, NULL, &err), LOCI_E_INVAL);
    assert_int_equal(loci_sequence_append(sequence, tokens, 1, 2, -1, NULL, &err), LOCI_E_INVAL);
    uint32_t id;
    float logprob;
    loci_sample_params params = {0};
    assert_int_equal(loci_sequence_sample(sequence, &params, NULL, 0, NULL, 0, &id, &logprob, &err),
                     LOCI_E_PRECONDITION);
    loci_cancel cancel;
    loci_cancel_init(&cancel, 0);
    loci_sequence_set_attend(sequence, cancel_at_once, NULL, &cancel);
    assert_int_equal(loci_sequence_append(sequence, tokens, 2, 1, -1, &cancel, &err),
                     LOCI_E_CANCELLED);
    assert_int_equal(loci_sequence_length(sequence), 0);
    assert_null(loci_sequence_logits(sequence));
    assert_int_equal(loci_model_encode(model, tokens, (uint32_t[]){0, 2}, 1, &out, &cancel, &err),
                     LOCI_E_CANCELLED);
    loci_sequence *refused;
    assert_int_equal(loci_sequence_open(model, 100000, &refused, &err), LOCI_E_INVAL);
    loci_sequence_close(sequence);
    loci_model_close(model);
    loci_backend_close(backend);
}

static void test_fingerprint(void **state) {
    (void)state;
    loci_backend *backend = open_backend(NULL, 1);
    loci_model *a, *b, *c;
    ok(loci_model_open(TINY, backend, LOCI_F32, &a, &err));
    ok(loci_model_open(TINY, backend, LOCI_BF16, &b, &err));
    ok(loci_model_open(DATA "tiny-untied", backend, LOCI_F32, &c, &err));
    assert_int_equal(strlen(loci_model_fingerprint(a)), 32);
    assert_int_equal(strspn(loci_model_fingerprint(a), "0123456789abcdef"), 32);
    assert_string_equal(loci_model_fingerprint(a), loci_model_fingerprint(b));
    assert_string_not_equal(loci_model_fingerprint(a), loci_model_fingerprint(c));
    assert_int_equal(loci_model_specials(a)->doc, 3);
    loci_model_close(a);
    loci_model_close(b);
    loci_model_close(c);
    loci_backend_close(backend);
}

/* --- Deferred ----------------------------------------------------------------------------- */

/* Everything a caller can get of a model, as bytes. */
static void run_all(loci_backend *backend, const char *dir, loci_buf *out) {
    loci_model *model;
    loci_sequence *sequence;
    uint32_t tokens[400], begin[] = {0, 1, 120, 400}, id = 0, recent[] = {5, 9}, banned[] = {7};
    float logprob;
    for (uint32_t i = 0; i < 400; i++) tokens[i] = i * 37 % 131;
    ok(loci_model_open(dir, backend, LOCI_BF16, &model, &err));
    const loci_model_config *c = loci_model_config_of(model);
    encoded kv = encode(model, tokens, begin, 3);
    loci_buf_append(out, kv.all, 2 * kv.count * sizeof *kv.all);
    free(kv.all);
    ok(loci_sequence_open(model, 400, &sequence, &err));
    ok(loci_sequence_append(sequence, tokens, 300, 280, -1, NULL, &err));
    loci_buf_append(out, loci_sequence_logits(sequence), 280 * c->vocab * sizeof(float));
    for (uint64_t step = 0; step < 12; step++) {
        loci_sample_params params = {0.8f, 0.95f, 1.1f, 42, step};
        ok(loci_sequence_sample(sequence, &params, banned, 1, recent, 2, &id, &logprob, &err));
        loci_buf_u32(out, id);
        loci_buf_append(out, &logprob, sizeof logprob);
        recent[step % 2] = id;
        ok(loci_sequence_append(sequence, &id, 1, 1, -1, NULL, &err));
    }
    loci_sequence_close(sequence);
    loci_model_close(model);
}

static void test_deferred_backend_gives_the_same_bytes(void **state) {
    (void)state;
    loci_backend *cpu = open_backend(NULL, 2), *deferred;
    loci_buf now = LOCI_BUF_INIT, later = LOCI_BUF_INIT;
    ok(deferred_open(cpu, &deferred, &err));
    for (size_t i = 0; i < sizeof tiny / sizeof *tiny; i++) {
        char dir[64];
        snprintf(dir, sizeof dir, DATA "tiny-%s", tiny[i]);
        run_all(cpu, dir, &now);
        run_all(deferred, dir, &later);
    }
    assert_int_equal(loci_buf_status(&now), LOCI_OK);
    assert_int_equal(now.len, later.len);
    assert_memory_equal(now.data, later.data, now.len);
    loci_buf_fini(&now);
    loci_buf_fini(&later);
    deferred_close(deferred);
    loci_backend_close(cpu);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny_models_equal_transformers),
        cmocka_unit_test(test_built_in_model_equals_transformers),
        cmocka_unit_test(test_encoding_does_not_depend_on_packing_or_threads),
        cmocka_unit_test(test_attend_callback_and_stopping),
        cmocka_unit_test(test_attention_is_scaled),
        cmocka_unit_test(test_bad_input_and_cancel),
        cmocka_unit_test(test_fingerprint),
        cmocka_unit_test(test_deferred_backend_gives_the_same_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
