/* SPDX-License-Identifier: Apache-2.0
 *
 * Questions that run at the same time, which share forward passes: each is answered as if it were
 * asked alone, event by event and to the last bit of every score, whoever else asks, is cancelled
 * or meets a damaged extent; also where those of one corpus read layers together.
 */
#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rng.h"
#include "tests/services/each_row.h"
#include "tests/services/modes_support.h"

#define AT_ONCE 8u
#define ASKERS 16u

static char data[FOLDER_BYTES];  /* of the built-in model's engine */
static loci_engine *stock, *own; /* the corpora of modes_support.h; "note" of the built-in model */

static const char *const questions[] = {
    "Who designed the dome of the North Telescope?",
    "What should one drink against altitude?",
    "How many people died in the avalanche?",
    "Who pays for the kitchen?",
    "When did the avalanche come down the slope, and what did it destroy on its way to the valley?",
    "Which partner gives the most money?",
    "How high is the station?",
    "What is the budget of the observatory this year, and who are the partners that pay for it?"};

/* One question and all that comes of it. */
typedef struct asker {
    loci_engine *engine;
    loci_answer_request request;
    pthread_t thread;
    loci_cancel *cancel; /* requested at the third event from `cancel_from` on */
    bool cancels;
    unsigned events;
    loci_buf seen; /* every event but for times, and for bytes where they are read together */
    loci_usage usage;
    bool together;
    loci_status status;
    loci_error err;
} asker;

static void put_double(loci_buf *out, double value) {
    loci_buf_append(out, &value, sizeof value);
}

static loci_status keep(void *ctx, const loci_event *event, loci_error *err) {
    (void)err;
    asker *a = ctx;
    a->events++;
    loci_buf_printf(&a->seen, "%d %s %s ", (int)event->kind, event->text ? event->text : "",
                    event->stop ? event->stop : "");
    if (event->kind == LOCI_EVENT_CANDIDATE) put_double(&a->seen, event->score);
    for (size_t i = 0; i < event->passage_count; i++) {
        const loci_passage *p = &event->passages[i];
        loci_buf_printf(&a->seen, "%s %llu %llu ", p->document, (unsigned long long)p->start,
                        (unsigned long long)p->end);
        put_double(&a->seen, p->share);
    }
    if (event->kind == LOCI_EVENT_USAGE) a->usage = *event->usage;
    if (event->kind == LOCI_EVENT_USAGE && !a->together)
        loci_buf_printf(&a->seen, "%llu %llu %llu ", (unsigned long long)event->usage->decode_steps,
                        (unsigned long long)event->usage->index_read_bytes,
                        (unsigned long long)event->usage->kv_read_bytes);
    if (a->cancels && a->events == 3) loci_cancel_request(a->cancel);
    return LOCI_OK;
}

static void *ask(void *arg) {
    asker *a = arg;
    a->seen.len = 0;
    a->events = 0;
    a->err = (loci_error){0};
    a->status = loci_engine_answer(a->engine, &a->request, a->cancel, keep, a, &a->err);
    return NULL;
}

static int set_up(void **state) {
    char folder[128], model[128];
    loci_corpus_info info;
    assert_int_equal(set_up_modes(state), 0);
    snprintf(model, sizeof model, "%s/model", modes_folder);
    snprintf(folder, sizeof folder, "%s/model-data", modes_folder);
    stock = engine_of(&(loci_engine_options){
        .data = folder, .model = model, .precision = "f32", .queries_max = AT_ONCE});
    make_folder("concurrent", data);
    own = engine_of(
        &(loci_engine_options){.data = data, .model = "model/default", .queries_max = AT_ONCE});
    create_corpus(own, "note", LOCI_ENCODING_INDEPENDENT, false, &info);
    put_text(own, "note", "avalanche", read_handbook("avalanche-1987.md"));
    settle(own, "note");
    return 0;
}

static int tear_down(void **state) {
    loci_engine_close(stock);
    loci_engine_close(own);
    remove_folder(data);
    return tear_down_modes(state);
}

/* Reading twice and every mode, greedy and sampled, of several corpora. */
static void draw(asker *a, loci_engine *engine, unsigned number, uint64_t seed) {
    static const char *const corpora[] = {"books", "text", "note"};
    uint64_t random = seed + number;
    *a = (asker){.engine = engine, .seen = LOCI_BUF_INIT};
    a->request = (loci_answer_request){
        .corpus = engine == own ? "note" : corpora[number % 3],
        .question = questions[loci_rng_next(&random) % (sizeof questions / sizeof *questions)],
        .mode = number % 4 == 3 ? -1 : (int)(number % 4),
        .read_twice = number % 4 == 3,
        .max_tokens = 12,
        .temperature = loci_rng_next(&random) % 2 ? 1.0 : 0.0,
        .seed = seed};
}

static uint64_t alone_read; /* by the questions asked alone */

static void same_as_alone(asker *a) {
    asker alone = {
        .engine = a->engine, .request = a->request, .together = a->together, .seen = LOCI_BUF_INIT};
    ask(&alone);
    if (alone.status != LOCI_OK) fail_msg("%s", alone.err.text);
    if (a->status != LOCI_OK) fail_msg("%s", a->err.text);
    assert_int_equal(a->seen.len, alone.seen.len);
    assert_memory_equal(a->seen.data, alone.seen.data, alone.seen.len);
    loci_buf_fini(&alone.seen);
    assert_true(a->usage.kv_dense_bytes == alone.usage.kv_dense_bytes);
    assert_true(a->usage.decode_steps == alone.usage.decode_steps);
    alone_read += alone.usage.kv_read_bytes + alone.usage.index_read_bytes;
}

static void ask_together(asker *askers, unsigned count) {
    for (unsigned i = 0; i < count; i++)
        assert_int_equal(pthread_create(&askers[i].thread, NULL, ask, &askers[i]), 0);
    for (unsigned i = 0; i < count; i++) pthread_join(askers[i].thread, NULL);
    loci_engine_status status;
    loci_engine_status_of(askers[0].engine, &status);
    assert_int_equal(status.queries_running, 0);
}

static void test_answers_are_those_of_questions_asked_alone(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        loci_engine *engine = seed == 4 ? own : stock;
        loci_batch_usage usage;
        asker askers[ASKERS];
        for (unsigned i = 0; i < ASKERS; i++) draw(&askers[i], engine, i, seed);
        ask_together(askers, ASKERS);
        for (unsigned i = 0; i < ASKERS; i++) {
            same_as_alone(&askers[i]);
            loci_buf_fini(&askers[i].seen);
        }
        loci_batch_usage_of(engine->batch, &usage);
        assert_true(usage.chunks > usage.passes); /* of which some were shared */
        assert_int_equal(usage.waiting, 0);
    }
}

/* --- Read together ----------------------------------------------------------------------------
 */

/* Of 16, those of the causal corpus and those without a mode of their own among them; in the first
 * layer all of one corpus read everything. */
static void draw_together(asker *a, unsigned number, uint64_t seed) {
    static const int modes[] = {LOCI_MODE_DENSE, LOCI_MODE_DENSE, LOCI_MODE_HIERARCHICAL,
                                LOCI_MODE_SQUEEZED};
    draw(a, stock, number, seed);
    a->together = true;
    a->request.corpus = number % 5 == 4 ? "text" : number % 7 == 6 ? "note" : "books";
    a->request.mode = modes[number % 4];
    a->request.read_twice = 0;
    a->request.max_tokens = 24;
}

static void check_cancelled(void (*draw_one)(asker *a, unsigned number, uint64_t seed),
                            unsigned count) {
    asker askers[ASKERS];
    loci_cancel cancel[ASKERS];
    unsigned cancelled = 0;
    for (unsigned i = 0; i < count; i++) {
        draw_one(&askers[i], i, 5);
        loci_cancel_init(&cancel[i], 0);
        askers[i].cancel = &cancel[i];
        askers[i].cancels = i % 5 == 1;
        askers[i].request.max_tokens = 32;
        if (askers[i].cancels) askers[i].request.read_twice = 0; /* it streams */
    }
    ask_together(askers, count);
    for (unsigned i = 0; i < count; i++) {
        if (askers[i].cancels && askers[i].status != LOCI_OK) {
            assert_int_equal(askers[i].status, LOCI_E_CANCELLED);
            cancelled++;
        } else {
            same_as_alone(&askers[i]);
        }
        loci_buf_fini(&askers[i].seen);
    }
    assert_true(cancelled > 0);
}

static void draw_stock(asker *a, unsigned number, uint64_t seed) {
    draw(a, stock, number, seed);
}

static void test_cancelled_questions_disturb_nobody(void **state) {
    (void)state;
    check_cancelled(draw_stock, ASKERS);
    each_row_begin(stock->backend);
    check_cancelled(draw_together, AT_ONCE);
    assert_true(each_row_rows >= 2 * each_row_calls && each_row_calls > 0);
    each_row_end(stock->backend);
}

static bool reads_three(loci_backend *self, const loci_corpus_view *corpus,
                        uint32_t retrieval_layer, uint32_t rows, uint32_t q_heads) {
    (void)self;
    (void)corpus;
    (void)retrieval_layer;
    (void)q_heads;
    return rows >= 3;
}

/* Who of four questions are reached with the first in a layer. */
static uint32_t chosen(loci_query *queries, uint32_t layer, const loci_attend_call *last) {
    void *ctx[4];
    loci_attend_call calls[4];
    for (uint32_t i = 0; i < 4; i++) {
        ctx[i] = &queries[i];
        calls[i] = (loci_attend_call){.retrieval_index = layer,
                                      .rows = 1,
                                      .row_position = 40,
                                      .in_company = true,
                                      .q_heads = HEADS,
                                      .head_dim = DIM,
                                      .scale = 0.25f};
    }
    if (last) calls[3] = *last;
    return loci_corpus_together.choose(ctx, calls, 4);
}

/* One snapshot, one way to read, one row each. */
static void test_who_goes_together(void **state) {
    (void)state;
    loci_query q[4];
    loci_backend_ops reading = *stock->backend->ops;
    const loci_backend_ops *ops = stock->backend->ops;
    const loci_attend_call plain = {
        .rows = 1, .row_position = 40, .q_heads = HEADS, .head_dim = DIM, .scale = 0.25f};
    change_settings(stock, "books", 1, 1, 1);
    for (uint32_t i = 0; i < 4; i++) begin_query(&q[i], stock, i == 2 ? "text" : "books");
    q[3].params.mode = LOCI_MODE_DENSE;
    assert_int_equal(chosen(q, 0, NULL), 0xb); /* layer 0 is dense for all */
    assert_int_equal(chosen(q, 1, NULL), 0x1); /* two of three would select */
    for (uint32_t i = 0; i < 3; i++) q[i].params.mode = LOCI_MODE_DENSE;
    assert_int_equal(chosen(q, 1, NULL), 0xb);
    q[1].params.mode = LOCI_MODE_SQUEEZED;
    assert_int_equal(chosen(q, 1, NULL), 0x9);
    assert_int_equal(chosen(q, 0, NULL), 0xb);
    for (uint32_t change = 0; change < 6; change++) {
        loci_attend_call call = plain;
        loci_query before = q[3];
        if (change == 1) call.rows = 2;
        if (change == 2) call.row_position = q[3].evidence_from - 1;
        if (change == 3) call.scale = 0.26f;
        if (change == 4) q[3].settings.attn_scale = 0.9f;
        if (change == 5) q[3].settings.attn_temperature = 0.9f;
        assert_int_equal(chosen(q, 0, &call), change ? 0x3 : 0xb);
        q[3] = before;
    }
    reading.reads_whole = reads_three;
    stock->backend->ops = &reading;
    q[0].params.mode = q[1].params.mode = q[3].params.mode = LOCI_MODE_HIERARCHICAL;
    assert_int_equal(chosen(q, 1, NULL), 0xb); /* three do not select */
    q[3].params.budget = 9;
    assert_int_equal(chosen(q, 1, NULL), 0x1); /* one does in any case, and so do two */
    stock->backend->ops = ops;
    for (uint32_t i = 0; i < 4; i++) loci_query_fini(&q[i]);
    change_settings(stock, "books", 0, 1, 1);
}

static void test_questions_of_a_corpus_read_it_together(void **state) {
    (void)state;
    change_settings(stock, "books", 1, 1, 1);
    each_row_begin(stock->backend);
    uint64_t read = 0;
    asker askers[ASKERS];
    for (unsigned i = 0; i < ASKERS; i++) draw_together(&askers[i], i, 11);
    ask_together(askers, ASKERS);
    alone_read = 0;
    for (unsigned i = 0; i < ASKERS; i++) {
        same_as_alone(&askers[i]);
        read += askers[i].usage.kv_read_bytes + askers[i].usage.index_read_bytes;
        loci_buf_fini(&askers[i].seen);
    }
    assert_true(read < alone_read);
    print_message("%llu rows in %llu look-ups\n", (unsigned long long)each_row_rows,
                  (unsigned long long)each_row_calls);
    assert_true(each_row_rows >= 2 * each_row_calls && each_row_calls > 0);
    each_row_end(stock->backend);
    change_settings(stock, "books", 0, 1, 1);
}

static char extent_path[512], extent_folder[64];

static int find_extent(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)at;
    if (kind == FTW_F && strstr(path, extent_folder) && info->st_size > (1 << 14))
        snprintf(extent_path, sizeof extent_path, "%s", path);
    return 0;
}

static void damage_extent(const char *corpus) {
    loci_corpus_info info;
    struct stat file_info;
    assert_int_equal(loci_corpus_get(loci_engine_store(stock), corpus, &info, NULL), LOCI_OK);
    snprintf(extent_folder, sizeof extent_folder, "/extents/%016llx/",
             (unsigned long long)info.uid);
    nftw(modes_folder, find_extent, 16, FTW_PHYS);
    assert_int_equal(chmod(extent_path, 0600), 0);
    int file = open(extent_path, O_RDWR);
    assert_true(file >= 0);
    assert_int_equal(fstat(file, &file_info), 0);
    for (off_t at = file_info.st_size / 2; at < file_info.st_size; at += 512) {
        uint8_t byte;
        assert_int_equal(pread(file, &byte, 1, at), 1);
        byte ^= 0x55;
        assert_int_equal(pwrite(file, &byte, 1, at), 1);
    }
    close(file);
}

static void check_damaged(void (*draw_one)(asker *a, unsigned number, uint64_t seed),
                          unsigned count) {
    asker askers[ASKERS];
    for (unsigned i = 0; i < count; i++) {
        draw_one(&askers[i], i, 6);
        if (i % 4 != 0) continue;
        askers[i].request.corpus = "narrow";
        askers[i].request.mode = LOCI_MODE_DENSE;
        askers[i].request.read_twice = 0;
    }
    ask_together(askers, count);
    for (unsigned i = 0; i < count; i++) {
        if (i % 4 == 0) {
            assert_int_equal(askers[i].status, LOCI_E_CORRUPT);
            assert_non_null(strstr(askers[i].err.text, "extent"));
        } else {
            same_as_alone(&askers[i]);
        }
        loci_buf_fini(&askers[i].seen);
    }
}

static void test_a_damaged_extent_is_one_corpuss_own(void **state) {
    (void)state;
    damage_extent("narrow");
    check_damaged(draw_stock, ASKERS);
    each_row_begin(stock->backend);
    check_damaged(draw_together, AT_ONCE);
    each_row_end(stock->backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_are_those_of_questions_asked_alone),
        cmocka_unit_test(test_cancelled_questions_disturb_nobody),
        cmocka_unit_test(test_who_goes_together),
        cmocka_unit_test(test_questions_of_a_corpus_read_it_together),
        cmocka_unit_test(test_a_damaged_extent_is_one_corpuss_own),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
