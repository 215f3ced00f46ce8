/* SPDX-License-Identifier: Apache-2.0
 *
 * Mode squeezed: thresholds keep the share of tokens that was asked for, by a transcription in
 * double of the rule in attention/README.md ("Mode squeezed"), and are kept as a note; calibration
 * of a corpus's settings, and the memory that both reserve.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"
#include "tests/services/modes_support.h"

/* --- Thresholds ------------------------------------------------------------------------------ */

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
        change_settings(engine, "text", dense, round ? 0.8 : 1, 1);
        loci_query query;
        loci_error err = {0};
        begin_query(&query, engine, "text");
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
            assert_true(fabs(together / all - shares[s]) < 0.06 * shares[s]);
            assert_true(fabs(single / all - shares[s]) < 0.06 * shares[s]);
        }
        free(q);
        loci_query_fini(&query);
    }
    change_settings(engine, "text", 0, 1, 1);
    loci_engine_close(engine);
}

static loci_squeezed_table table_of(loci_engine *engine, const char *corpus, double share) {
    loci_query query;
    loci_error err = {0};
    begin_query(&query, engine, corpus);
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
        change_settings(engine, corpora[c], 0, 1, 1);
        loci_squeezed_table first = table_of(engine, corpora[c], 0.1);
        for (uint32_t i = 0; i + 1 < LOCI_SQUEEZED_SHARES; i++)
            for (int next = 0; next < 2; next++)
                assert_true(first.threshold[next][i][1] <= first.threshold[next][i + 1][1]);
        change_settings(engine, corpora[c], 0, 0.5, 1);
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
        change_settings(engine, corpora[c], 0, 1, 1);
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
        change_settings(engine, corpora[c], 0, 1, 1);
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
    loci_engine *engine = engine_in(modes_folder, "placeless");
    loci_corpus_info info;
    loci_error err = {0};
    create_corpus(engine, "short", LOCI_ENCODING_INDEPENDENT, false, &info);
    loci_calibration out;
    assert_int_equal(loci_engine_calibrate(engine, "short", false, NULL, &out, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "TOO_SHORT");
    add_file(engine, "short", modes_files[0], 420);
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
    change_settings(engine, "books", 1, 0.6, 0.95);
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
    change_settings(engine, "books", 0, 1, 1);
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
    change_settings(engine, "books", 0, 1, 1);
    change_settings(engine, "text", 0, 1, 1);
    /* Room for the rest of both, as far as it is small. */
    uint64_t taken = fill_budget(engine, loci_plan_slot_bytes(config, false, 4 * 255));
    assert_int_equal(loci_engine_calibrate(engine, "books", false, NULL, &out, &err), LOCI_E_LIMIT);
    assert_string_equal(err.reason, "MEMORY_BUDGET");
    assert_non_null(strstr(err.text, "comparing encodings of a corpus needs"));
    loci_budget_give(engine->budget, LOCI_MEMORY_PROCESS, taken);
    forget_thresholds(engine, "text");
    begin_query(&query, engine, "text");
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
    return cmocka_run_group_tests(tests, set_up_modes, tear_down_modes);
}
