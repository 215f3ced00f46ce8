/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine with the built-in model: answers, exact evidence, modes against each other, deletion,
 * cancelling, and damaged extents (a named error or an equal answer, never another).
 */
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rng.h"
#include "services/engine/belief.h"
#include "tests/services/engine_support.h"

#define ORCHID                                                                                    \
    "The orchid house is heated to 21 degrees. Its keeper is Dagny Holmqvist, who came in 1998. " \
    "The orchid house has 340 plants and is closed on Mondays.\n"

static char folder[FOLDER_BYTES];
static loci_engine *engine;

static void open_engine(void) {
    engine = engine_of(&(loci_engine_options){.data = folder, .model = "model/default"});
}

static void add_text(const char *corpus, const char *id, loci_slice text) {
    put_text(engine, corpus, id, text);
}

static void add_handbook(const char *corpus) {
    struct dirent **names;
    int count = scandir(HANDBOOK, &names, NULL, alphasort);
    assert_true(count > 10);
    for (int i = 0; i < count; i++) {
        if (names[i]->d_name[0] != '.')
            add_text(corpus, names[i]->d_name, read_handbook(names[i]->d_name));
        free(names[i]);
    }
    free(names);
    settle(engine, corpus);
}

static bool kv_int8; /* of all corpora */

static int set_up(void **state) {
    (void)state;
    make_folder("engine", folder);
    open_engine();
    loci_corpus_info info;
    loci_error err = {0};
    loci_corpus_options options = {.encoding = LOCI_ENCODING_INDEPENDENT, .kv_int8 = kv_int8};
    static const char *const corpora[] = {"handbook", "both", "flat", "empty", "copies"};
    for (size_t i = 0; i < 5; i++)
        if (loci_engine_create_corpus(engine, corpora[i], &options, &info, &err) != LOCI_OK)
            fail_msg("%s", err.text);
    add_handbook("handbook");
    add_text("both", "orchid", loci_slice_text(ORCHID));
    add_handbook("both");
    add_text("flat", "orchid", loci_slice_text(ORCHID));
    settle(engine, "flat");
    for (int i = 0; i < 600; i++) {
        char id[16];
        snprintf(id, sizeof id, "orchid%d", i);
        add_text("copies", id, loci_slice_text(ORCHID));
    }
    settle(engine, "copies");
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    loci_engine_close(engine);
    remove_folder(folder);
    return 0;
}

typedef struct outcome {
    char answer[512], streamed[512], stop[32], first[128], quote[1024];
    bool found;
    double shares; /* evidence + sink + rest */
    size_t passages;
    loci_usage usage;
    int last_kind, finished;
    bool mentions_orchid;
    loci_reading readings[16];
    char read[16][512]; /* what was read in each passage */
    uint32_t readings_count;
} outcome;

/* The answer of several readings is the best one's, if it is believed. */
static void check_readings(const outcome *out, const loci_event *finished) {
    if (out->readings_count == 0) return;
    uint32_t best = loci_readings_best(out->readings, out->readings_count);
    assert_int_equal(finished->found,
                     loci_readings_belief(out->readings, out->readings_count) >= 0);
    assert_string_equal(finished->text, finished->found ? out->read[best] : "");
}

/* Keeps what a client would see, and checks every quote against the document. */
static loci_status keep(void *ctx, const loci_event *event, loci_error *err) {
    outcome *out = ctx;
    assert_int_equal(out->finished, 0); /* nothing follows FINISHED */
    out->last_kind = (int)event->kind;
    if (event->kind == LOCI_EVENT_DELTA)
        strncat(out->streamed, event->text, sizeof out->streamed - strlen(out->streamed) - 1);
    if (event->kind == LOCI_EVENT_USAGE) out->usage = *event->usage;
    for (size_t i = 0; i < event->passage_count; i++) {
        const loci_passage *passage = &event->passages[i];
        loci_buf bytes = LOCI_BUF_INIT;
        const char *corpus = strcmp(passage->document, "orchid") == 0       ? "flat"
                             : strncmp(passage->document, "orchid", 6) == 0 ? "copies"
                                                                            : "handbook";
        assert_int_equal(loci_document_read(loci_engine_store(engine), corpus, passage->document,
                                            passage->start, passage->end, &bytes, err),
                         LOCI_OK);
        assert_true(loci_slice_equal(loci_slice_of(bytes.data, bytes.len), passage->quote));
        loci_buf_fini(&bytes);
        assert_true(passage->passage_start <= passage->start &&
                    passage->end <= passage->passage_end);
        if (strcmp(passage->document, "orchid") == 0) out->mentions_orchid = true;
    }
    if (event->kind == LOCI_EVENT_CANDIDATE) {
        snprintf(out->read[out->readings_count], sizeof out->read[0], "%s", event->text);
        out->readings[out->readings_count++] = *event->reading;
        assert_true(event->score == loci_reading_score(event->reading));
        assert_true(event->reading->words >= 0 && event->reading->words < 1);
    }
    if (event->kind == LOCI_EVENT_FINISHED) {
        check_readings(out, event);
        snprintf(out->answer, sizeof out->answer, "%s", event->text);
        snprintf(out->stop, sizeof out->stop, "%s", event->stop);
        out->found = event->found;
        out->passages = event->passage_count;
        for (size_t i = 0; i < event->passage_count; i++) out->shares += event->passages[i].share;
        if (event->passage_count) {
            const loci_passage *first = &event->passages[0];
            snprintf(out->first, sizeof out->first, "%s", first->document);
            snprintf(out->quote, sizeof out->quote, "%.*s", (int)first->quote.len,
                     (const char *)first->quote.data);
        }
        out->finished = 1;
    }
    return LOCI_OK;
}

static loci_status ask(const char *corpus, const char *question, int mode, int read_twice,
                       double top_p, outcome *out, loci_error *err) {
    loci_answer_request request = {.corpus = corpus,
                                   .question = question,
                                   .mode = mode,
                                   .read_twice = read_twice,
                                   .top_p = top_p};
    *out = (outcome){.finished = 0};
    *err = (loci_error){0};
    return loci_engine_answer(engine, &request, NULL, keep, out, err);
}

static outcome asked(const char *corpus, const char *question, int mode, int read_twice,
                     double top_p) {
    outcome out;
    loci_error err;
    if (ask(corpus, question, mode, read_twice, top_p, &out, &err) != LOCI_OK)
        fail_msg("%s: %s", question, err.text);
    assert_int_equal(out.finished, 1);
    assert_string_equal(out.answer, out.streamed);
    return out;
}

static void test_every_mode_answers_with_evidence(void **state) {
    (void)state;
    for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode++) {
        for (int twice = 0; twice <= 1; twice++) {
            outcome out = asked("handbook", QUESTION, mode, twice, 0);
            assert_string_equal(out.answer, "Philippa Rouncewell");
            assert_true(out.found);
            assert_string_equal(out.first, "north-dome.md");
            assert_non_null(strstr(out.quote, "Philippa Rouncewell"));
            assert_string_equal(out.stop, "eos");
        }
    }
}

static void test_shares_add_up(void **state) {
    (void)state;
    outcome out = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 0, 0);
    assert_true(out.usage.share_sink > 0.01 && out.usage.share_sink < 0.99);
    double all = out.shares + out.usage.share_sink + out.usage.share_unattributed;
    assert_true(all > 0.999 && all < 1.001);
    out = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 1, 0);
    assert_true(out.shares > 0.999 && out.shares < 1.001);
}

static void test_hierarchical_reads_less_and_equals_dense_in_full(void **state) {
    (void)state;
    outcome dense = asked("handbook", QUESTION, LOCI_MODE_DENSE, 0, 0);
    outcome full = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 0, 1.0);
    outcome sparse = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 0, 0);
    assert_string_equal(dense.answer, full.answer);
    assert_true(dense.shares - full.shares < 1e-3 && full.shares - dense.shares < 1e-3);
    assert_true(dense.usage.kv_read_bytes >= dense.usage.kv_dense_bytes);
    assert_int_equal(dense.usage.kv_dense_bytes, sparse.usage.kv_dense_bytes);
    assert_true((sparse.usage.kv_read_bytes + sparse.usage.index_read_bytes) * 4 <
                dense.usage.kv_read_bytes);
}

static void test_flat_segments_answer_at_once(void **state) {
    (void)state;
    for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode++) {
        outcome out = asked("flat", "Who is the keeper of the orchid house?", mode, 0, 0);
        assert_string_equal(out.answer, "Dagny Holmqvist");
        assert_string_equal(out.first, "orchid");
        assert_true(out.shares > 0.01);
    }
    outcome out = asked("flat", "Who is the keeper of the orchid house?", -1, 1, 0);
    assert_string_equal(out.answer, "Dagny Holmqvist");
    assert_string_equal(out.quote, "Its keeper is Dagny Holmqvist, who came in 1998.");
}

/* 600 copies of a segment have 600 sinks: stored once, weighed 600 times, the shares of sink
 * and segments stay what they are with one. */
static void test_sink_counts_for_every_segment(void **state) {
    (void)state;
    const char *question = "Who is the keeper of the orchid house?";
    double one = asked("flat", question, LOCI_MODE_DENSE, 0, 0).usage.share_sink;
    double many = asked("copies", question, LOCI_MODE_DENSE, 0, 0).usage.share_sink;
    assert_true(one > 0.1 && one < 0.9);
    assert_true(many > one - 0.05 && many < one + 0.05); /* a single sink would lose 0.08 */
}

static void test_nothing_is_found_in_an_empty_corpus(void **state) {
    (void)state;
    for (int twice = 0; twice <= 1; twice++) {
        outcome out = asked("empty", QUESTION, -1, twice, 0);
        assert_false(out.found);
        assert_string_equal(out.stop, "not_found");
        assert_int_equal(out.passages, 0);
    }
    outcome out = asked("handbook", "What is the capital of Australia?", -1, 1, 0);
    assert_false(out.found);
    assert_string_equal(out.answer, "");
}

/* Where the first passage is not the one whose answer is given, or says nothing itself. */
static void test_readings_decide(void **state) {
    (void)state;
    static const char *const questions[] = {
        "What is the emergency telephone number?",
        "How thick is the new aluminium layer on the North mirror?",
        "What is the deadline for semester A proposals?",
        "Which company insures the North Telescope?",
        "Who composed the anthem of the observatory?",
        "What is the shoe size of the director?",
        "How long is the tunnel between Tarn Lodge and the summit?",
    };
    uint32_t other = 0, silent = 0;
    for (size_t q = 0; q < sizeof questions / sizeof *questions; q++) {
        outcome out = asked("handbook", questions[q], -1, 1, 0); /* keep compares */
        assert_int_equal(out.readings_count, 4);
        other += loci_readings_best(out.readings, 4) > 0;
        silent += out.readings[0].none_logprob > -0.7;
    }
    assert_true(other > 0 && silent > 0);
}

/* Registers A and B, deletes B: every mode answers as a corpus of A alone; B is never quoted. */
static void test_deleted_documents_are_gone(void **state) {
    (void)state;
    static const char *const questions[] = {QUESTION, "Who is the keeper of the orchid house?",
                                            "How many plants does the orchid house have?"};
    uint64_t revision;
    loci_error err = {0};
    assert_int_equal(
        loci_document_delete(loci_engine_store(engine), "both", "orchid", &revision, &err),
        LOCI_OK);
    for (int round = 0; round < 2; round++) {
        for (size_t q = 0; q < 3; q++) {
            for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode++) {
                for (int twice = 0; twice <= 1; twice++) {
                    /* Clusters still know B's keys until the rewrite, so only the exact mode and
                     * the passages read again are equal at once. */
                    outcome both = asked("both", questions[q], mode, twice, 0);
                    outcome alone = asked("handbook", questions[q], mode, twice, 0);
                    assert_false(both.mentions_orchid);
                    assert_null(strstr(both.answer, "Dagny"));
                    if (mode == LOCI_MODE_DENSE || q == 0)
                        assert_string_equal(both.answer, alone.answer);
                }
            }
        }
        settle(engine, "both");
    }
}

static void test_cancel_ends_the_answer(void **state) {
    (void)state;
    loci_answer_request request = {
        .corpus = "handbook", .question = QUESTION, .mode = -1, .read_twice = 0};
    loci_cancel cancel;
    loci_error err = {0};
    outcome out = {.finished = 0};
    loci_cancel_init(&cancel, 0);
    loci_cancel_request(&cancel);
    assert_int_equal(loci_engine_answer(engine, &request, &cancel, keep, &out, &err),
                     LOCI_E_CANCELLED);
    loci_cancel_init(&cancel, loci_now_ns() + 1000000);
    assert_int_equal(loci_engine_answer(engine, &request, &cancel, keep, &out, &err),
                     LOCI_E_TIMEOUT);
    loci_engine_status status;
    loci_engine_status_of(engine, &status);
    assert_int_equal(status.queries_running, 0);
}

static void expect_error(const loci_answer_request *request, loci_status expected) {
    outcome out = {.finished = 0};
    loci_error err = {0};
    assert_int_equal(loci_engine_answer(engine, request, NULL, keep, &out, &err), expected);
    assert_true(strlen(err.text) > 10);
}

static void test_bad_requests_are_named(void **state) {
    (void)state;
    const loci_answer_request good = {
        .corpus = "handbook", .question = QUESTION, .mode = -1, .read_twice = -1};
    loci_answer_request bad = good;
    bad.corpus = "nowhere";
    expect_error(&bad, LOCI_E_NOTFOUND);
    bad = good;
    bad.question = " \n ";
    expect_error(&bad, LOCI_E_INVAL);
    bad = good;
    bad.top_p = 1.5;
    expect_error(&bad, LOCI_E_INVAL);
    bad = good;
    bad.temperature = -1;
    expect_error(&bad, LOCI_E_INVAL);
    bad = good;
    bad.max_tokens = 100000;
    expect_error(&bad, LOCI_E_INVAL);
    bad = good;
    bad.min_revision = 1000000;
    expect_error(&bad, LOCI_E_PRECONDITION);
    char *words = calloc(1, 20000);
    assert_non_null(words);
    for (size_t i = 0; i + 5 < 20000; i += 5) memcpy(words + i, "word ", 5);
    bad = good;
    bad.question = words;
    expect_error(&bad, LOCI_E_INVAL);
    free(words);
}

static loci_status count_hits(void *ctx, const loci_passage *hits, size_t count,
                              const loci_usage *usage, uint64_t revision, loci_error *err) {
    (void)usage;
    (void)err;
    assert_true(revision > 0);
    for (size_t i = 1; i < count; i++) assert_true(hits[i - 1].share >= hits[i].share);
    assert_string_equal(hits[0].document, "north-dome.md");
    *(size_t *)ctx = count;
    return LOCI_OK;
}

static void test_retrieve_ranks(void **state) {
    (void)state;
    loci_error err = {0};
    size_t count = 0;
    for (uint32_t k = 1; k <= 100; k += 33) {
        assert_int_equal(loci_engine_retrieve(engine, "handbook", QUESTION, k, 0, NULL, count_hits,
                                              &count, &err),
                         LOCI_OK);
        assert_int_equal(count, k);
    }
    assert_int_equal(
        loci_engine_retrieve(engine, "handbook", QUESTION, 101, 0, NULL, count_hits, &count, &err),
        LOCI_E_INVAL);
}

/* --- damage ------------------------------------------------------------------------------ */

static char extent_path[512], extent_folder[64];

static int find_extent(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)at;
    if (kind == FTW_F && strstr(path, extent_folder) && info->st_size > (1 << 20))
        snprintf(extent_path, sizeof extent_path, "%s", path);
    return 0;
}

static void flip(off_t offset, unsigned bit) {
    chmod(extent_path, 0600);
    int file = open(extent_path, O_RDWR);
    uint8_t byte;
    assert_true(file >= 0);
    assert_int_equal(pread(file, &byte, 1, offset), 1);
    byte = (uint8_t)(byte ^ (1u << bit));
    assert_int_equal(pwrite(file, &byte, 1, offset), 1);
    close(file);
}

/* An extent of the handbook: extent_path, its size returned. */
static off_t choose_extent(void) {
    struct stat info;
    loci_corpus_info corpus;
    extent_path[0] = 0;
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "handbook", &corpus, NULL),
                     LOCI_OK);
    snprintf(extent_folder, sizeof extent_folder, "/extents/%016llx/",
             (unsigned long long)corpus.uid);
    nftw(folder, find_extent, 16, FTW_PHYS);
    assert_int_equal(stat(extent_path, &info), 0);
    return info.st_size;
}

/* 200 single bits anywhere in an extent that is in use. */
static void test_damage_is_named_or_harmless(void **state) {
    (void)state;
    uint64_t seed = 20261124;
    int named = 0;
    off_t bytes = choose_extent();
    outcome clean[3], out;
    loci_error err;
    static const int modes[3] = {LOCI_MODE_DENSE, LOCI_MODE_SQUEEZED, LOCI_MODE_HIERARCHICAL};
    for (int m = 0; m < 3; m++) clean[m] = asked("handbook", QUESTION, modes[m], 0, 0);
    for (int round = 0; round < 200; round++) {
        off_t offset = (off_t)(loci_rng_next(&seed) % (uint64_t)bytes);
        if (round % 4 == 0) offset %= 1 << 17; /* headers and nodes more often */
        unsigned bit = (unsigned)(loci_rng_next(&seed) % 8);
        int m = round % 3;
        flip(offset, bit);
        loci_status status = ask("handbook", QUESTION, modes[m], 0, 0, &out, &err);
        if (status == LOCI_OK) {
            assert_string_equal(out.answer, clean[m].answer);
            assert_true(out.shares == clean[m].shares);
        } else {
            assert_int_equal(status, LOCI_E_CORRUPT);
            assert_non_null(strstr(err.text, "extent"));
            named++;
        }
        flip(offset, bit);
    }
    assert_true(named > 40); /* dense mode alone meets a third of them */
    for (int m = 0; m < 3; m++) {
        out = asked("handbook", QUESTION, modes[m], 0, 0);
        assert_string_equal(out.answer, clean[m].answer);
    }
}

/* Pages of an extent in use that cannot be read any more: an error that names the file, in every
 * mode, until it is whole and opened again. */
static void test_unreadable_pages_are_an_error(void **state) {
    (void)state;
    off_t bytes = choose_extent(), kept = 1 << 14;
    size_t lost = (size_t)(bytes - kept), hits = 0;
    loci_engine_close(engine);
    open_engine(); /* after cmocka has taken SIGBUS for this test */
    outcome clean = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 0, 0), out;
    uint8_t *tail = malloc(lost);
    assert_non_null(tail);
    chmod(extent_path, 0600);
    int file = open(extent_path, O_RDWR);
    assert_true(file >= 0);
    assert_int_equal(pread(file, tail, lost, kept), lost);
    assert_int_equal(ftruncate(file, kept), 0);
    for (int whole = 0; whole < 2; whole++) {
        for (int mode = LOCI_MODE_DENSE; mode <= LOCI_MODE_HIERARCHICAL; mode++) {
            loci_error err = {0};
            assert_int_equal(ask("handbook", QUESTION, mode, 0, 0, &out, &err), LOCI_E_IO);
            assert_non_null(strstr(err.text, extent_path));
            assert_non_null(strstr(err.text, "could not be read"));
        }
        loci_error err = {0};
        assert_int_equal(
            loci_engine_retrieve(engine, "handbook", QUESTION, 4, 0, NULL, count_hits, &hits, &err),
            LOCI_E_IO);
        assert_int_equal(pwrite(file, tail, lost, kept), lost);
    }
    close(file);
    free(tail);
    loci_engine_close(engine);
    open_engine();
    out = asked("handbook", QUESTION, LOCI_MODE_HIERARCHICAL, 0, 0);
    assert_string_equal(out.answer, clean.answer);
    assert_true(out.shares == clean.shares);
}

static void test_reopening_changes_nothing(void **state) {
    (void)state;
    outcome before = asked("handbook", QUESTION, -1, 0, 0);
    loci_engine_close(engine);
    open_engine();
    outcome after = asked("handbook", QUESTION, -1, 0, 0);
    assert_string_equal(before.answer, after.answer);
    assert_true(before.shares == after.shares);
}

/* --- Other models ------------------------------------------------------------------------- */

/* What no memory helps is said first, not how much memory would be needed. */
static void test_models_that_cannot_serve_are_refused_at_once(void **state) {
    (void)state;
    loci_error err = {0};
    loci_engine *other = NULL;
    loci_engine_options options = {
        .data = "/nowhere", .model = "tests/data/model/tiny-llama", .memory_bytes = 8u << 20};
    assert_int_equal(loci_engine_open(&options, &other, &err), LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "MODEL_POSITIONS");
    assert_non_null(strstr(err.text, "has 512 positions"));
    assert_null(other);
    assert_int_equal(loci_engine_check_model("tests/data/model/tiny-llama", &err),
                     LOCI_E_UNSUPPORTED);
    assert_int_equal(loci_engine_check_model("model/default", &err), LOCI_OK);
    options.model = "model/default";
    assert_int_equal(loci_engine_open(&options, &other, &err), LOCI_E_INVAL);
    assert_string_equal(err.reason, "MEMORY_TOO_SMALL");
}

/* The built-in model under another list of ends: the first is a token that is never generated, the
 * second the one that the model learned. */
static void make_model(char dir[300]) {
    static const char *const files[] = {
        "tokenizer.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json"};
    static const char one[] = "\"eos_token_id\": 2", both[] = "\"eos_token_id\": [1, 2]";
    char from[600], to[600], root[256], config[4096];
    snprintf(dir, 300, "%s/model", folder);
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_non_null(getcwd(root, sizeof root));
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(from, sizeof from, "%s/model/default/%s", root, files[i]);
        snprintf(to, sizeof to, "%s/%s", dir, files[i]);
        assert_int_equal(symlink(from, to), 0);
    }
    FILE *file = fopen("model/default/config.json", "rb");
    assert_non_null(file);
    config[fread(config, 1, sizeof config - 1, file)] = 0;
    fclose(file);
    char *at = strstr(config, one);
    assert_non_null(at);
    snprintf(to, sizeof to, "%s/config.json", dir);
    file = fopen(to, "wb");
    assert_non_null(file);
    fprintf(file, "%.*s%s%s", (int)(at - config), config, both, at + strlen(one));
    fclose(file);
}

static void test_every_end_of_text_ends_an_answer(void **state) {
    (void)state;
    static const char keeper[] = "Who is the keeper of the orchid house?";
    outcome usual = asked("flat", keeper, LOCI_MODE_DENSE, 0, 0);
    assert_string_equal(usual.stop, "eos");
    char model[300], data[300];
    make_model(model);
    snprintf(data, sizeof data, "%s/other", folder);
    loci_engine *kept = engine;
    loci_corpus_info info;
    engine = engine_of(&(loci_engine_options){.data = data, .model = model});
    create_corpus(engine, "flat", LOCI_ENCODING_INDEPENDENT, false, &info);
    add_text("flat", "orchid", loci_slice_text(ORCHID));
    settle(engine, "flat");
    outcome other = asked("flat", keeper, LOCI_MODE_DENSE, 0, 0);
    loci_engine_close(engine);
    engine = kept;
    assert_string_equal(other.stop, "eos");
    assert_string_equal(other.answer, usual.answer);
}

/* test_engine [int8] */
/* Before there is anything to close. */
static void test_an_unknown_backend_is_refused_by_name(void **state) {
    (void)state;
    char other[FOLDER_BYTES];
    loci_error err = {0};
    loci_engine *none = NULL;
    make_folder("no-backend", other);
    const loci_engine_options options = {
        .data = other, .model = "model/default", .backend = "abacus"};
    assert_int_equal(loci_engine_open(&options, &none, &err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "abacus"));
    assert_null(none);
    remove_folder(other);
}

int main(int argc, char **argv) {
    kv_int8 = argc > 1 && strcmp(argv[1], "int8") == 0;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_mode_answers_with_evidence),
        cmocka_unit_test(test_shares_add_up),
        cmocka_unit_test(test_hierarchical_reads_less_and_equals_dense_in_full),
        cmocka_unit_test(test_flat_segments_answer_at_once),
        cmocka_unit_test(test_sink_counts_for_every_segment),
        cmocka_unit_test(test_nothing_is_found_in_an_empty_corpus),
        cmocka_unit_test(test_readings_decide),
        cmocka_unit_test(test_cancel_ends_the_answer),
        cmocka_unit_test(test_bad_requests_are_named),
        cmocka_unit_test(test_retrieve_ranks),
        cmocka_unit_test(test_reopening_changes_nothing),
        cmocka_unit_test(test_damage_is_named_or_harmless),
        cmocka_unit_test(test_unreadable_pages_are_an_error),
        cmocka_unit_test(test_deleted_documents_are_gone),
        cmocka_unit_test(test_models_that_cannot_serve_are_refused_at_once),
        cmocka_unit_test(test_an_unknown_backend_is_refused_by_name),
        cmocka_unit_test(test_every_end_of_text_ends_an_answer),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
