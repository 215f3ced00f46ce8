/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine with stock models: random weights that are asked through their chat prompts. What they
 * say means nothing, so it is compared: modes with each other, before and after a restart, and
 * attention over a corpus with the same tokens in one plain sequence.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "services/engine/query.h"
#include "tests/services/engine_support.h"
#include "tests/services/stock_model.h"

/* Random weights at temperature 0 say one letter for ever. */
#define TEMPERATURE 0.8
#define SEED 7
#define NOTE                                                                                      \
    "The orchid house is heated to 21 degrees. Its keeper is Dagny Holmqvist, who came in 1998. " \
    "The house has 340 plants."

static char folder[FOLDER_BYTES];

static const stock_model models[] = {
    {"llama", "llama3", 16384, NULL, NULL},
    {"qwen3", "chatml", 16384, NULL, NULL},
    {"qwen3", NULL, 2048, NULL, NULL},
    {"llama", "llama3", 4096, NULL, NULL},
    {"qwen3", "chatml", 4096,
     "\"use_sliding_window\": false,\n \"sliding_window\": null,\n \"max_window_layers\": 2",
     "\"use_sliding_window\": true, \"sliding_window\": 19, \"max_window_layers\": 1"},
};
/* The first MODELS have corpora when the tests begin. */
enum { MODELS = 3, FOLDERS = sizeof models / sizeof *models };

static const char *const files[] = {"north-dome.md", "cryogenics.md", "library.md"};
enum { FILES = sizeof files / sizeof *files };

static loci_engine *open_engine(int model) {
    char name[16];
    snprintf(name, sizeof name, "model%d", model);
    return engine_in(folder, name);
}

static int set_up(void **state) {
    (void)state;
    make_folder("stock", folder);
    for (int m = 0; m < FOLDERS; m++) {
        char dir[300];
        loci_corpus_info info;
        loci_error err = {0};
        snprintf(dir, sizeof dir, "%s/model%d", folder, m);
        stock_model_make(&models[m], dir);
        if (m >= MODELS) continue;
        loci_engine *engine = open_engine(m);
        static const char *const corpora[] = {"books", "note", "empty"};
        for (size_t i = 0; i < 3; i++)
            create_corpus(engine, corpora[i], LOCI_ENCODING_INDEPENDENT, false, &info);
        for (size_t i = 0; i < FILES; i++)
            put_text(engine, "books", files[i], read_handbook(files[i]));
        put_text(engine, "note", "orchid", loci_slice_text(NOTE));
        settle(engine, "books");
        settle(engine, "note");
        assert_int_equal(loci_corpus_get(loci_engine_store(engine), "books", &info, &err), LOCI_OK);
        assert_true(info.extents >= 1); /* sealed: there is something to look up */
        loci_engine_close(engine);
    }
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    remove_folder(folder);
    return 0;
}

typedef struct outcome {
    loci_engine *engine;
    const char *corpus;
    char answer[2048], streamed[2048], stop[32];
    bool found, finished, read_twice;
    size_t passages;
    double shares;
    loci_usage usage;
} outcome;

/* Every quote is exactly the bytes it says, inside its passage. */
static void check_passage(const outcome *out, const loci_passage *passage, loci_error *err) {
    loci_buf bytes = LOCI_BUF_INIT;
    assert_int_equal(loci_document_read(loci_engine_store(out->engine), out->corpus,
                                        passage->document, passage->start, passage->end, &bytes,
                                        err),
                     LOCI_OK);
    assert_true(bytes.len > 0);
    assert_true(loci_slice_equal(loci_slice_of(bytes.data, bytes.len), passage->quote));
    assert_true(passage->passage_start <= passage->start && passage->end <= passage->passage_end);
    assert_true(passage->share >= 0 && passage->share <= 1);
    loci_buf_fini(&bytes);
}

static loci_status keep(void *ctx, const loci_event *event, loci_error *err) {
    outcome *out = ctx;
    assert_false(out->finished);
    for (size_t i = 0; i < event->passage_count; i++) check_passage(out, &event->passages[i], err);
    if (event->kind == LOCI_EVENT_STARTED) out->read_twice = event->read_twice;
    if (event->kind == LOCI_EVENT_DELTA)
        strncat(out->streamed, event->text, sizeof out->streamed - strlen(out->streamed) - 1);
    if (event->kind == LOCI_EVENT_USAGE) out->usage = *event->usage;
    if (event->kind != LOCI_EVENT_FINISHED) return LOCI_OK;
    snprintf(out->answer, sizeof out->answer, "%s", event->text);
    snprintf(out->stop, sizeof out->stop, "%s", event->stop);
    out->found = event->found;
    out->passages = event->passage_count;
    for (size_t i = 0; i < event->passage_count; i++) out->shares += event->passages[i].share;
    out->finished = true;
    return LOCI_OK;
}

static outcome asked(loci_engine *engine, const char *corpus, int mode, int read_twice,
                     double top_p) {
    outcome out = {.engine = engine, .corpus = corpus};
    loci_answer_request request = {.corpus = corpus,
                                   .question = QUESTION,
                                   .mode = mode,
                                   .read_twice = read_twice,
                                   .top_p = top_p,
                                   .temperature = TEMPERATURE,
                                   .seed = SEED,
                                   .max_tokens = 24};
    loci_error err = {0};
    if (loci_engine_answer(engine, &request, NULL, keep, &out, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    assert_true(out.finished);
    assert_string_equal(out.answer, out.streamed);
    assert_int_equal(out.found, out.answer[0] != 0);
    return out;
}

static void expect_equal(const outcome *a, const outcome *b, double tolerance) {
    assert_string_equal(a->answer, b->answer);
    assert_string_equal(a->stop, b->stop);
    assert_int_equal(a->passages, b->passages);
    assert_true(a->shares - b->shares <= tolerance && b->shares - a->shares <= tolerance);
}

static void test_every_mode_answers_before_and_after_a_restart(void **state) {
    (void)state;
    for (int m = 0; m < MODELS; m++) {
        outcome before[6], out;
        for (int round = 0; round < 2; round++) {
            loci_engine *engine = open_engine(m);
            for (int i = 0; i < 6; i++) {
                out = asked(engine, "books", LOCI_MODE_DENSE + i / 2, i % 2, 0);
                assert_int_equal(out.read_twice, i % 2);
                assert_true(out.found && out.passages > 0);
                assert_true(out.usage.corpus_tokens > 4096 && out.usage.answer_tokens > 0);
                if (round == 0)
                    before[i] = out;
                else
                    expect_equal(&before[i], &out, 0);
            }
            assert_true(asked(engine, "note", -1, -1, 0).read_twice); /* the default */
            loci_engine_close(engine);
        }
        /* Read twice, the mode only finds the passages. */
        assert_string_equal(before[1].answer, before[5].answer);
        double all = before[0].shares + before[0].usage.share_sink;
        all += before[0].usage.share_unattributed;
        assert_true(all > 0.999 && all < 1.001 && before[0].usage.share_sink > 0);
        assert_true(before[1].shares > 0.999 && before[1].shares < 1.001);
    }
}

static void test_hierarchical_in_full_is_dense(void **state) {
    (void)state;
    for (int m = 0; m < MODELS; m++) {
        loci_engine *engine = open_engine(m);
        outcome dense = asked(engine, "books", LOCI_MODE_DENSE, 0, 0);
        outcome full = asked(engine, "books", LOCI_MODE_HIERARCHICAL, 0, 1.0);
        expect_equal(&dense, &full, 1e-3);
        assert_int_equal(dense.usage.kv_dense_bytes, full.usage.kv_dense_bytes);
        loci_engine_close(engine);
    }
}

static void test_nothing_is_found_in_an_empty_corpus(void **state) {
    (void)state;
    loci_engine *engine = open_engine(0);
    for (int twice = 0; twice <= 1; twice++) {
        outcome out = asked(engine, "empty", -1, twice, 0);
        assert_false(out.found);
        assert_string_equal(out.stop, "not_found");
        assert_int_equal(out.passages, 0);
    }
    loci_engine_close(engine);
}

/* --- Against one plain sequence -------------------------------------------------------------- */

/* The tokens of a text as the corpus has them, appended. */
static void split_text(loci_engine *engine, loci_slice text, loci_tokens *out) {
    loci_splitter *splitter;
    const loci_split *split;
    loci_error err = {0};
    assert_int_equal(loci_splitter_open(loci_model_tokenizer(loci_engine_model(engine)), 255,
                                        UINT32_MAX, &splitter, &err),
                     LOCI_OK);
    assert_int_equal(loci_splitter_split(splitter, text, 0, 1000, &split, &err), LOCI_OK);
    assert_true(split->next == text.len);
    for (uint32_t i = 0; i < split->begin[split->segments]; i++)
        assert_int_equal(loci_tokens_push(out, split->tokens[i], 0), LOCI_OK);
    loci_splitter_close(splitter);
}

/* Logits after begin, text and, from `position` on (0: at once), the prompt. */
static void plain_logits(loci_engine *engine, const loci_tokens *text, uint32_t position,
                         const loci_tokens *prompt, float *out) {
    loci_model *model = loci_engine_model(engine);
    loci_error err = {0};
    loci_sequence *sequence;
    uint32_t begin = loci_model_specials(model)->begin;
    uint32_t most = loci_model_config_of(model)->positions_max;
    assert_int_equal(loci_sequence_open(model, most, &sequence, &err), LOCI_OK);
    assert_int_equal(loci_sequence_append(sequence, &begin, 1, 0, -1, NULL, &err), LOCI_OK);
    assert_int_equal(
        loci_sequence_append(sequence, text->ids, (uint32_t)text->count, 0, -1, NULL, &err),
        LOCI_OK);
    if (position) loci_sequence_jump(sequence, position);
    assert_int_equal(
        loci_sequence_append(sequence, prompt->ids, (uint32_t)prompt->count, 1, -1, NULL, &err),
        LOCI_OK);
    uint32_t vocab = loci_model_config_of(model)->vocab;
    memcpy(out, loci_sequence_logits(sequence), vocab * sizeof *out);
    loci_sequence_close(sequence);
}

/* Those after the prompt alone, which looks at the corpus, are the same; what a corpus keeps is
 * bf16. */
static void expect_plain(loci_engine *engine, const char *corpus, const loci_tokens *text,
                         uint32_t position) {
    static float plain[512];
    loci_error err = {0};
    loci_tokens prompt = {0};
    loci_query query;
    loci_model *model = loci_engine_model(engine);
    uint32_t head, vocab = loci_model_config_of(model)->vocab;
    if (loci_query_init(&query, engine, corpus, QUESTION, 0, NULL, &err)) fail_msg("%s", err.text);
    assert_int_equal(query.view->tokens, text->count);
    query.params.mode = LOCI_MODE_DENSE;
    assert_int_equal(loci_stock_prompt(&query, NULL, 0, &prompt, &head, &err), LOCI_OK);
    assert_true(prompt.ids[0] != loci_model_specials(model)->begin);
    assert_true(head > 10 && head < prompt.count);
    plain_logits(engine, text, position, &prompt, plain);
    loci_sequence *sequence = query.slot->sequence;
    assert_int_equal(loci_corpus_attend_begin(&query, &err), LOCI_OK);
    loci_sequence_jump(sequence, query.start);
    loci_sequence_set_attend(sequence, loci_corpus_attend, loci_corpus_attended, &query);
    assert_int_equal(
        loci_sequence_append(sequence, prompt.ids, (uint32_t)prompt.count, 1, -1, NULL, &err),
        LOCI_OK);
    const float *logits = loci_sequence_logits(sequence);
    float most = 0, off = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        most = fmaxf(most, fabsf(plain[i]));
        off = fmaxf(off, fabsf(plain[i] - logits[i]));
    }
    if (!(most > 1) || !(off < 0.01f * most))
        fail_msg("%s: logits up to %g differ by %g", corpus, (double)most, (double)off);
    loci_tokens_fini(&prompt);
    loci_query_fini(&query);
}

static void test_a_corpus_of_one_segment_is_a_plain_sequence(void **state) {
    (void)state;
    for (int m = 0; m < 2; m++) {
        loci_engine *engine = open_engine(m);
        loci_tokens text = {0};
        split_text(engine, loci_slice_text(NOTE), &text);
        expect_plain(engine, "note", &text, 256);
        loci_tokens_fini(&text);
        loci_engine_close(engine);
    }
}

static void begin_stock(loci_query *query) {
    loci_sequence *sequence = query->slot->sequence;
    loci_error err = {0};
    loci_sequence_reset(sequence);
    loci_sequence_jump(sequence, query->start);
    loci_sequence_set_attend(sequence, loci_corpus_attend, loci_corpus_attended, query);
    assert_int_equal(loci_corpus_attend_begin(query, &err), LOCI_OK);
}

static void append(loci_query *query, const uint32_t *ids, size_t count) {
    loci_error err = {0};
    if (loci_sequence_append(query->slot->sequence, ids, (uint32_t)count, 0, -1, NULL, &err))
        fail_msg("%s", err.text);
}

/* Evidence of a prompt in one pass is that of the question's rows in a pass of their own. */
static void test_evidence_begins_with_the_question(void **state) {
    (void)state;
    enum { MOST = 8 };
    loci_engine *engine = open_engine(0);
    loci_ranked ranked[3][MOST];
    uint32_t count[3], head;
    double sink[3];
    loci_tokens prompt = {0};
    loci_error err = {0};
    loci_query query;
    if (loci_query_init(&query, engine, "books", QUESTION, 0, NULL, &err)) fail_msg("%s", err.text);
    query.params.mode = LOCI_MODE_DENSE;
    assert_int_equal(loci_stock_prompt(&query, NULL, 0, &prompt, &head, &err), LOCI_OK);
    for (int how = 0; how < 3; how++) { /* apart, in one pass, and all rows' */
        begin_stock(&query);
        query.evidence_from = how == 1 ? head : 1;
        if (how == 0) append(&query, prompt.ids, head);
        if (how == 0) assert_int_equal(loci_corpus_attend_begin(&query, &err), LOCI_OK);
        uint32_t from = how == 0 ? head : 0;
        append(&query, prompt.ids + from, prompt.count - from);
        assert_int_equal(loci_corpus_attend_best(&query, MOST, ranked[how], &count[how], &err),
                         LOCI_OK);
        assert_int_equal(count[how], MOST);
        sink[how] = query.sink_mass;
    }
    for (uint32_t i = 0; i < MOST; i++)
        assert_true(fabs(ranked[0][i].score - ranked[1][i].score) < 1e-4 * ranked[0][i].score);
    assert_true(fabs(sink[0] - sink[1]) < 1e-3 * sink[0] && sink[2] > 1.2 * sink[0]);
    loci_tokens_fini(&prompt);
    loci_query_fini(&query);
    loci_engine_close(engine);
}

/* --- Causal corpora -------------------------------------------------------------------------- */

/* Several documents of several batches, before and behind an extent. */
static void download(loci_recorder *recorder, uint32_t layer, float *out) {
    const loci_query *query = recorder->query;
    const loci_model_config *config = loci_model_config_of(query->engine->model);
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    loci_error err = {0};
    query->engine->backend->ops->download(stream, out, loci_ref_at(recorder->q[layer], 0),
                                          (size_t)LOCI_RECORDED * config->q_heads *
                                              config->head_dim * sizeof *out);
    assert_int_equal(query->engine->backend->ops->sync(stream, &err), LOCI_OK);
}

/* What was kept at registration are the queries of the last tokens in one plain sequence. */
static void expect_recorded(loci_engine *engine, const char *corpus, const loci_tokens *text) {
    static float kept[LOCI_RECORDED * 256], plain[LOCI_RECORDED * 256];
    const loci_model_config *config = loci_model_config_of(engine->model);
    size_t floats = (size_t)LOCI_RECORDED * config->q_heads * config->head_dim;
    assert_true(floats <= sizeof kept / sizeof *kept);
    loci_query query;
    loci_recorder before, again;
    loci_error err = {0};
    loci_tokens all = {0};
    if (loci_query_init(&query, engine, corpus, QUESTION, 0, NULL, &err)) fail_msg("%s", err.text);
    assert_int_equal(loci_recorder_open(&query, &before, &err), LOCI_OK);
    assert_int_equal(loci_recorder_open(&query, &again, &err), LOCI_OK);
    assert_false(loci_recorder_restore(&before, query.start - 1)); /* of another text */
    assert_true(loci_recorder_restore(&before, query.start));
    assert_int_equal(before.taken, LOCI_RECORDED);
    assert_int_equal(loci_tokens_push(&all, loci_model_specials(engine->model)->begin, 0), LOCI_OK);
    for (size_t i = 0; i < text->count; i++)
        assert_int_equal(loci_tokens_push(&all, text->ids[i], 0), LOCI_OK);
    loci_sequence *own = query.slot->sequence;
    assert_int_equal(
        loci_sequence_open(engine->model, (uint32_t)all.count, &query.slot->sequence, &err),
        LOCI_OK);
    assert_int_equal(loci_recorder_pass(&again, all.ids, (uint32_t)all.count, LOCI_RECORDED, &err),
                     LOCI_OK);
    for (uint32_t layer = 0; layer < config->retrieval_count; layer++) {
        download(&before, layer, kept);
        download(&again, layer, plain);
        float most = 0, off = 0;
        for (size_t i = 0; i < floats; i++) {
            most = fmaxf(most, fabsf(plain[i]));
            off = fmaxf(off, fabsf(plain[i] - kept[i]));
        }
        if (!(most > 0.1f) || !(off < 0.02f * most))
            fail_msg("layer %u: queries up to %g differ by %g", layer, (double)most, (double)off);
    }
    loci_sequence_close(query.slot->sequence);
    query.slot->sequence = own;
    loci_recorder_close(&before);
    loci_recorder_close(&again);
    loci_tokens_fini(&all);
    loci_query_fini(&query);
}

static void test_a_causal_corpus_is_a_plain_sequence(void **state) {
    (void)state;
    for (int m = 0; m < 2; m++) {
        loci_engine *engine = open_engine(m);
        loci_tokens text = {0};
        loci_corpus_info info;
        create_corpus(engine, "growing", LOCI_ENCODING_DEFAULT, false, &info);
        assert_true(info.geometry.causal);
        assert_true(info.geometry.tokens_max > 14000 && info.geometry.tokens_max < 16384);
        for (size_t i = 0; i < FILES; i++) {
            loci_slice bytes = read_handbook(files[i]);
            put_text(engine, "growing", files[i], bytes);
            split_text(engine, bytes, &text);
            if (i == 1) settle(engine, "growing");
            if (i == 1) expect_plain(engine, "growing", &text, 0);
        }
        settle(engine, "growing");
        assert_int_equal(loci_corpus_get(loci_engine_store(engine), "growing", &info, NULL),
                         LOCI_OK);
        assert_true(info.extents > 0 && info.tokens == text.count);
        expect_plain(engine, "growing", &text, 0);
        expect_recorded(engine, "growing", &text);
        put_text(engine, "growing", "orchid", loci_slice_text(NOTE));
        split_text(engine, loci_slice_text(NOTE), &text);
        settle(engine, "growing");
        expect_plain(engine, "growing", &text, 0);
        expect_recorded(engine, "growing", &text);
        put_text(engine, "growing", "short", loci_slice_text("It fits.")); /* joins those before */
        split_text(engine, loci_slice_text("It fits."), &text);
        settle(engine, "growing");
        expect_recorded(engine, "growing", &text);
        outcome dense = asked(engine, "growing", LOCI_MODE_DENSE, 0, 0);
        outcome full = asked(engine, "growing", LOCI_MODE_HIERARCHICAL, 0, 1.0);
        outcome squeezed = asked(engine, "growing", LOCI_MODE_SQUEEZED, 0, 0);
        expect_equal(&dense, &full, 1e-3);
        assert_true(squeezed.usage.kv_read_bytes < dense.usage.kv_read_bytes / 2);
        loci_engine_close(engine);
        engine = open_engine(m);
        assert_int_equal(loci_corpus_get(loci_engine_store(engine), "growing", &info, NULL),
                         LOCI_OK);
        assert_true(info.geometry.causal && info.geometry.tokens_max > 14000);
        outcome again = asked(engine, "growing", LOCI_MODE_DENSE, 0, 0);
        expect_equal(&dense, &again, 0);
        loci_tokens_fini(&text);
        loci_engine_close(engine);
    }
}

/* The process ends within a document, again and again: it goes on where it was. */
static void test_a_causal_registration_is_resumed(void **state) {
    (void)state;
    loci_engine *engine = open_engine(0);
    loci_tokens text = {0};
    loci_corpus_info info;
    unsigned stops = 0;
    create_corpus(engine, "stopped", LOCI_ENCODING_CAUSAL, false, &info);
    loci_buf all = LOCI_BUF_INIT;
    for (size_t i = 0; i < FILES; i++) {
        loci_slice bytes = read_handbook(files[i]);
        loci_buf_append(&all, bytes.data, bytes.len);
    }
    loci_slice whole = loci_slice_of(all.data, all.len);
    put_text(engine, "stopped", "long", whole);
    split_text(engine, whole, &text);
    for (uint64_t revision = info.revision; stops < 100;) {
        loci_sleep_ms(20);
        assert_int_equal(loci_corpus_get(loci_engine_store(engine), "stopped", &info, NULL),
                         LOCI_OK);
        if (info.pending_documents == 0) break;
        if (info.revision == revision) continue;
        assert_int_equal(info.tokens, 0); /* not to be seen before it is complete */
        loci_engine_close(engine);
        engine = open_engine(0);
        revision = info.revision;
        stops++;
    }
    assert_true(stops > 1);
    settle(engine, "stopped");
    expect_plain(engine, "stopped", &text, 0);
    loci_tokens_fini(&text);
    loci_buf_fini(&all);
    loci_engine_close(engine);
}

static void test_the_trained_length_is_kept_to(void **state) {
    (void)state;
    loci_engine *engine = open_engine(3); /* 4,096 positions */
    loci_store *store = loci_engine_store(engine);
    loci_ingest_progress progress = {0};
    loci_corpus_info info;
    loci_error err = {0};
    uint64_t revision;
    create_corpus(engine, "short", LOCI_ENCODING_DEFAULT, false, &info);
    uint64_t most = info.geometry.tokens_max;
    assert_true(info.geometry.causal && most > 2400 && most < 3600);
    put_text(engine, "short", files[0], read_handbook(files[0]));
    put_text(engine, "short", files[1], read_handbook(files[1]));
    for (int i = 0; i < 1000 && progress.failure.status == LOCI_OK; i++) {
        loci_sleep_ms(10);
        assert_int_equal(
            loci_ingest_progress_of(loci_engine_ingest(engine), "short", &progress, &err), LOCI_OK);
    }
    assert_int_equal(progress.failure.status, LOCI_E_LIMIT);
    assert_string_equal(progress.failure.reason, "TRAINED_LENGTH");
    char number[32];
    snprintf(number, sizeof number, "more than %llu tokens", (unsigned long long)most);
    assert_non_null(strstr(progress.failure.text, number));
    assert_non_null(strstr(progress.failure.text, files[1]));
    assert_int_equal(loci_corpus_get(store, "short", &info, &err), LOCI_OK);
    assert_true(info.tokens > 1000 && info.pending_documents == 1); /* the first is there */
    assert_int_equal(loci_document_delete(store, "short", files[1], &revision, &err), LOCI_OK);
    put_text(engine, "short", "orchid", loci_slice_text(NOTE));
    settle(engine, "short");
    loci_tokens text = {0};
    split_text(engine, read_handbook(files[0]), &text);
    split_text(engine, loci_slice_text(NOTE), &text);
    expect_plain(engine, "short", &text, 0);
    loci_tokens_fini(&text);
    create_corpus(engine, "long", LOCI_ENCODING_CAUSAL, true, &info);
    assert_int_equal(info.geometry.tokens_max, 0);
    for (size_t i = 0; i < FILES; i++) put_text(engine, "long", files[i], read_handbook(files[i]));
    settle(engine, "long");
    outcome out = asked(engine, "long", LOCI_MODE_HIERARCHICAL, 0, 0);
    assert_true(out.usage.corpus_tokens > 5000);
    loci_engine_close(engine);
}

static void test_causal_corpora_are_append_only(void **state) {
    (void)state;
    loci_engine *engine = open_engine(0);
    loci_store *store = loci_engine_store(engine);
    loci_corpus_info info;
    loci_error err = {0};
    loci_document_writer *writer;
    loci_document_info document;
    uint64_t revision;
    bool unchanged = false;
    create_corpus(engine, "fixed", LOCI_ENCODING_CAUSAL, false, &info);
    put_text(engine, "fixed", "orchid", loci_slice_text(NOTE));
    settle(engine, "fixed");
    assert_int_equal(loci_document_delete(store, "fixed", "orchid", &revision, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "APPEND_ONLY");
    static const char *const contents[] = {NOTE, "Another text."};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(
            loci_document_begin(store, "fixed", "orchid", loci_slice_of(NULL, 0), &writer, &err),
            LOCI_OK);
        assert_int_equal(loci_document_append(writer, loci_slice_text(contents[i]), &err), LOCI_OK);
        assert_int_equal(loci_document_commit(writer, &document, &unchanged, &err),
                         i == 0 ? LOCI_OK : LOCI_E_PRECONDITION);
        assert_int_equal(unchanged, i == 0);
    }
    assert_string_equal(err.reason, "APPEND_ONLY");
    assert_int_equal(loci_corpus_get(store, "fixed", &info, &err), LOCI_OK);
    assert_true(info.documents == 1 && info.tokens > 100);
    loci_engine_close(engine);
}

/* Layers with a window find their past nowhere. */
static void test_models_with_windows_have_independent_corpora(void **state) {
    (void)state;
    loci_engine *engine = open_engine(4);
    loci_corpus_info info;
    loci_error err = {0};
    create_corpus(engine, "usual", LOCI_ENCODING_DEFAULT, false, &info);
    assert_false(info.geometry.causal);
    loci_corpus_options causal = {.encoding = LOCI_ENCODING_CAUSAL};
    loci_corpus_options beyond = {.beyond_trained_length = true};
    assert_int_equal(loci_engine_create_corpus(engine, "other", &causal, &info, &err),
                     LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "ENCODING");
    assert_non_null(strstr(err.text, "layer 1 sees a sliding window only"));
    assert_int_equal(loci_engine_create_corpus(engine, "other", &beyond, &info, &err),
                     LOCI_E_INVAL);
    loci_engine_close(engine);
}

/* Evidence is read in one prompt, as much of it as there are positions for. */
static void test_much_evidence_is_read_as_far_as_it_fits(void **state) {
    (void)state;
    loci_engine *engine = open_engine(2);
    outcome out = {.engine = engine, .corpus = "books"};
    loci_answer_request request = {.corpus = "books",
                                   .question = QUESTION,
                                   .mode = -1,
                                   .read_twice = 1,
                                   .max_tokens = 512,
                                   .evidence_count = 16};
    loci_error err = {0};
    if (loci_engine_answer(engine, &request, NULL, keep, &out, &err)) fail_msg("%s", err.text);
    assert_true(out.passages >= 1 && out.passages < 16);
    loci_engine_close(engine);
}

static void test_models_that_cannot_serve_are_refused_by_name(void **state) {
    (void)state;
    static const struct {
        stock_model model;
        const char *reason, *says;
    } cases[] = {
        {{"qwen2", "chatml", 4096, NULL, NULL}, "MODEL_HEAD_DIM", "have 8 channels (head_dim)"},
        {{"mistral", NULL, 4096, NULL, NULL}, "MODEL_HEAD_DIM", "MistralForCausalLM have 24"},
        {{"llama", "llama3", 1024, NULL, NULL}, "MODEL_POSITIONS", "has 1024 positions"},
        {{"llama", "llama3", 4096, "\"bos_token_id\": 1", "\"bos_token_id\": 265"},
         "",
         "\"bos_token_id\" is 265, outside 0 to 264"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[300];
        loci_error err = {0};
        loci_engine *engine = NULL;
        snprintf(dir, sizeof dir, "%s/refused%zu", folder, i);
        stock_model_make(&cases[i].model, dir);
        const loci_engine_options options = {.data = "/nowhere", .model = dir};
        assert_int_not_equal(loci_engine_check_model(dir, &err), LOCI_OK);
        assert_string_equal(err.reason, cases[i].reason);
        if (!strstr(err.text, cases[i].says)) fail_msg("%s", err.text);
        assert_int_not_equal(loci_engine_open(&options, &engine, &err), LOCI_OK);
        assert_null(engine);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_mode_answers_before_and_after_a_restart),
        cmocka_unit_test(test_hierarchical_in_full_is_dense),
        cmocka_unit_test(test_nothing_is_found_in_an_empty_corpus),
        cmocka_unit_test(test_a_corpus_of_one_segment_is_a_plain_sequence),
        cmocka_unit_test(test_evidence_begins_with_the_question),
        cmocka_unit_test(test_a_causal_corpus_is_a_plain_sequence),
        cmocka_unit_test(test_a_causal_registration_is_resumed),
        cmocka_unit_test(test_the_trained_length_is_kept_to),
        cmocka_unit_test(test_causal_corpora_are_append_only),
        cmocka_unit_test(test_models_with_windows_have_independent_corpora),
        cmocka_unit_test(test_much_evidence_is_read_as_far_as_it_fits),
        cmocka_unit_test(test_models_that_cannot_serve_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
