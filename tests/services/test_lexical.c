/* SPDX-License-Identifier: Apache-2.0
 *
 * The lexical score joined to late interaction: the numbers themselves, against BM25 computed here
 * from the documents; and that a rare code is found among passages that are alike otherwise.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "memory/rocks.h"
#include "memory/terms.h"
#include "services/engine/belief.h"
#include "services/engine/query.h"
#include "tests/services/engine_support.h"

#define PARTS 300  /* more than are scored without a look-up */
#define WEIGHT 3.0 /* at 100 percent */

static char folder[FOLDER_BYTES];
static loci_engine *engine;
static char texts[PARTS][200];
static char codes[PARTS][16];
static bool gone[PARTS];

static void open_engine(int lexical_percent) {
    engine = engine_of(&(loci_engine_options){
        .data = folder, .model = "model/default", .lexical_percent = lexical_percent});
}

static void add_parts(uint64_t seed) {
    for (int i = 0; i < PARTS; i++) {
        uint64_t r = loci_rng_next(&seed);
        snprintf(codes[i], sizeof codes[i], "K%06llu", (unsigned long long)(r % 1000000));
        snprintf(texts[i], sizeof texts[i],
                 "The storeroom keeps part %.15s. It is made of brass, weighs %llu grams%s",
                 codes[i], (unsigned long long)(10 + (r >> 32) % 90),
                 r >> 63 ? ", and nobody has ordered one since the winter." : ".");
        char id[16];
        snprintf(id, sizeof id, "p%d", i);
        put_text(engine, "parts", id, loci_slice_text(texts[i]));
    }
    settle(engine, "parts");
}

static int set_up(void **state) {
    (void)state;
    loci_corpus_info info;
    make_folder("lexical", folder);
    open_engine(0);
    create_corpus(engine, "parts", LOCI_ENCODING_INDEPENDENT, false, &info);
    add_parts(20);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    loci_engine_close(engine);
    remove_folder(folder);
    return 0;
}

typedef struct hits {
    int part[LOCI_RETRIEVE_MAX];
    double score[LOCI_RETRIEVE_MAX];
    size_t count;
} hits;

static loci_status keep(void *ctx, const loci_passage *found, size_t count, const loci_usage *usage,
                        uint64_t revision, loci_error *err) {
    hits *out = ctx;
    (void)usage;
    (void)revision;
    (void)err;
    out->count = count;
    for (size_t i = 0; i < count; i++) {
        out->part[i] = (int)strtol(found[i].document + 1, NULL, 10);
        out->score[i] = found[i].share;
    }
    return LOCI_OK;
}

static hits search(const char *question, uint32_t k) {
    hits out = {.count = 0};
    loci_error err = {0};
    if (loci_engine_retrieve(engine, "parts", question, k, 0, NULL, keep, &out, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    return out;
}

static void test_best_are_the_highest(void **state) {
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 200; round++) {
        float scores[40];
        uint32_t out[16], count = 1 + (uint32_t)(loci_rng_next(&seed) % 40);
        uint32_t limit = 1 + (uint32_t)(loci_rng_next(&seed) % 16), positive = 0;
        for (uint32_t i = 0; i < count; i++) {
            scores[i] = (float)(loci_rng_next(&seed) % 8);
            positive += scores[i] > 0;
        }
        uint32_t found = loci_lexical_best(scores, count, limit, out);
        assert_int_equal(found, positive < limit ? positive : limit);
        for (uint32_t i = 0; i < found; i++) {
            uint32_t better = 0; /* how many stand before it, by score and then by number */
            for (uint32_t s = 0; s < count; s++)
                better += scores[s] > scores[out[i]] || (scores[s] == scores[out[i]] && s < out[i]);
            assert_int_equal(better, i);
        }
    }
}

static void test_codes_are_found(void **state) {
    (void)state;
    for (int i = 0; i < PARTS; i += 5) { /* but for the code, it is about something else */
        char question[120];
        snprintf(question, sizeof question,
                 "Did the emperor's younger daughter sing of %.15s in the opera?", codes[i]);
        hits found = search(question, 3);
        if (found.count != 3 || strcmp(codes[found.part[0]], codes[i]) != 0)
            fail_msg("%s leads to %s", question, codes[found.part[0]]);
    }
}

static size_t count_term(const loci_term_list *list, uint64_t hash) {
    size_t count = 0;
    for (size_t i = 0; i < list->count; i++) count += list->items[i].hash == hash;
    return count;
}

/* BM25 of every part, from its definition; returns what a part of the question's words alone comes
 * close to. */
static double score_parts(const char *question, double out[PARTS]) {
    loci_error err = {0};
    loci_term_list asked = {0}, lists[PARTS] = {{0}};
    double tokens[PARTS], mean = 0, live = 0, most = 0;
    assert_int_equal(loci_terms_of(loci_slice_text(question), 0, true, &asked, &err), LOCI_OK);
    for (int i = 0; i < PARTS; i++) {
        if (gone[i]) continue;
        char id[16];
        loci_document_info info;
        snprintf(id, sizeof id, "p%d", i);
        assert_int_equal(
            loci_document_get(loci_engine_store(engine), "parts", id, &info, NULL, &err), LOCI_OK);
        assert_int_equal(info.segments, 1);
        tokens[i] = (double)info.tokens;
        mean += tokens[i];
        live++;
        assert_int_equal(loci_terms_of(loci_slice_text(texts[i]), 0, false, &lists[i], &err),
                         LOCI_OK);
    }
    mean /= live;
    memset(out, 0, PARTS * sizeof *out);
    for (size_t t = 0; t < asked.count; t++) { /* the questions here repeat no word */
        double df = 0;
        for (int i = 0; i < PARTS; i++) df += count_term(&lists[i], asked.items[t].hash) > 0;
        most += 2.2 * log(1 + (live - df + 0.5) / (df + 0.5));
        for (int i = 0; i < PARTS; i++) {
            double tf = (double)count_term(&lists[i], asked.items[t].hash);
            if (tf > 0)
                out[i] += log(1 + (live - df + 0.5) / (df + 0.5)) * tf * 2.2 /
                          (tf + 1.2 * (0.25 + 0.75 * tokens[i] / mean));
        }
    }
    for (int i = 0; i < PARTS; i++) loci_term_list_fini(&lists[i]);
    loci_term_list_fini(&asked);
    return most;
}

/* The joined score less the learned one is the weighted BM25, whatever lived and died before. */
static void check_scores(const char *question, int percent) {
    double expected[PARTS], learned[PARTS], weight = WEIGHT * percent / 100;
    score_parts(question, expected);
    loci_engine_close(engine);
    open_engine(percent);
    hits joined = search(question, 100);
    loci_engine_close(engine);
    open_engine(-1);
    hits alone = search(question, 100);
    loci_engine_close(engine);
    open_engine(0);
    for (int i = 0; i < PARTS; i++) learned[i] = NAN;
    for (size_t i = 0; i < alone.count; i++) learned[alone.part[i]] = alone.score[i];
    size_t both = 0;
    for (size_t i = 0; i < joined.count; i++) {
        int part = joined.part[i];
        assert_false(gone[part]);
        if (i > 0) assert_true(joined.score[i] <= joined.score[i - 1]);
        if (isnan(learned[part])) { /* a candidate by its words alone */
            assert_true(expected[part] > 0);
            continue;
        }
        both++;
        assert_true(fabs(joined.score[i] - learned[part] - weight * expected[part]) < 2e-3);
    }
    assert_true(both > 20 && (percent == 100 || both < joined.count));
}

static void test_scores_are_bm25(void **state) {
    (void)state;
    check_scores("Which parts made of brass nobody ordered since winter weigh 42 grams?", 100);
    char list[400] =
        "Which of the emperor's operas"; /* more codes than late interaction tells apart */
    for (int i = 3; i < PARTS; i += 14) {
        size_t len = strlen(list);
        snprintf(list + len, sizeof list - len, " %.15s", codes[i]);
    }
    check_scores(list, 1000);
    loci_error err = {0};
    uint64_t revision;
    for (int i = 0; i < PARTS; i += 7) { /* so few that their extent is not rewritten */
        char id[16];
        snprintf(id, sizeof id, "p%d", i);
        assert_int_equal(
            loci_document_delete(loci_engine_store(engine), "parts", id, &revision, &err), LOCI_OK);
        gone[i] = true;
    }
    check_scores("Which brass part weighs 42 grams, nobody ordered?", 100);
}

typedef struct shares {
    double words[LOCI_EVIDENCE_MAX];
    int part[LOCI_EVIDENCE_MAX], count;
} shares;

static loci_status keep_words(void *ctx, const loci_event *event, loci_error *err) {
    shares *out = ctx;
    (void)err;
    if (event->kind != LOCI_EVENT_CANDIDATE) return LOCI_OK;
    out->part[out->count] = (int)strtol(event->passages[0].document + 1, NULL, 10);
    out->words[out->count++] = event->reading->words;
    return LOCI_OK;
}

static shares words_read(const char *question) {
    shares out = {.count = 0};
    loci_error err = {0};
    loci_answer_request request = {
        .corpus = "parts", .question = question, .mode = -1, .read_twice = 1};
    if (loci_engine_answer(engine, &request, NULL, keep_words, &out, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    assert_int_equal(out.count, 4);
    return out;
}

/* Readings know how much of the question their passage has; -1 where that is not to be had. */
static void test_readings_have_shares_of_words(void **state) {
    (void)state;
    static const char question[] = "Which brass part weighs 42 grams, oh emperor of Samarkand?";
    double expected[PARTS], most = score_parts(question, expected);
    shares read = words_read(question);
    for (int i = 0; i < read.count; i++)
        assert_true(fabs(read.words[i] - expected[read.part[i]] / most) < 1e-4);
    assert_true(read.words[0] > 0.05 && read.words[0] < 0.6); /* words that nothing has count too */
    assert_true(words_read("What is it about?").words[0] == -1);
    loci_engine_close(engine);
    open_engine(-1);
    assert_true(words_read(question).words[0] == -1);
    loci_engine_close(engine);
    open_engine(0);
}

/* The text of the last part is damaged and all blocks of words are gone; the engine is closed. */
static void damage_last_text(void) {
    loci_error err = {0};
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", folder);
    assert_int_equal(loci_rocks_open(path, 16u << 20, &rocks, &err), LOCI_OK);
    static const loci_family families[] = {LOCI_CF_TERMS, LOCI_CF_CHUNK};
    for (size_t i = 0; i < 2; i++) {
        loci_key all = {.len = 0}, key = {.len = 0};
        loci_batch *batch = loci_batch_create(rocks);
        loci_scan *scan = loci_scan_open(rocks, NULL, families[i], &all, NULL);
        for (loci_slice found; loci_scan_next(scan, &found);) {
            key.len = found.len;
            memcpy(key.data, found.data, found.len);
            if (i == 0) loci_batch_delete(batch, LOCI_CF_TERMS, &key);
        }
        assert_int_equal(loci_scan_close(scan, &err), LOCI_OK);
        assert_true(key.len > 0);
        if (i == 1)
            loci_batch_put(batch, LOCI_CF_CHUNK, &key, LOCI_KIND_CHUNK, loci_slice_text("damaged"));
        assert_int_equal(loci_batch_write(batch, true, &err), LOCI_OK);
        loci_batch_destroy(batch);
    }
    loci_rocks_close(rocks);
}

static loci_status ignore(void *ctx, const loci_passage *found, size_t count,
                          const loci_usage *usage, uint64_t revision, loci_error *err) {
    (void)ctx;
    (void)found;
    (void)count;
    (void)usage;
    (void)revision;
    (void)err;
    return LOCI_OK;
}

/* One damaged text: questions about other documents are answered; a list of passages that holds it
 * cannot be given, and the error names it. */
static void test_a_damaged_text_harms_no_other(void **state) {
    (void)state;
    loci_engine_close(engine);
    damage_last_text();
    open_engine(0);
    for (int i = 1; i < PARTS - 1; i += 37) {
        char question[120];
        if (gone[i]) continue;
        snprintf(question, sizeof question, "Which part is %.15s?", codes[i]);
        assert_string_equal(codes[search(question, 1).part[0]], codes[i]);
    }
    loci_error err = {0};
    char id[16];
    snprintf(id, sizeof id, "p%d", PARTS - 1);
    loci_buf text = LOCI_BUF_INIT;
    assert_int_equal(loci_document_read(loci_engine_store(engine), "parts", id, 0, 10, &text, &err),
                     LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, id));
    loci_buf_fini(&text);
    for (int i = 0; i < PARTS - 10; i++) { /* so few are left that all are listed */
        uint64_t revision;
        snprintf(id, sizeof id, "p%d", i);
        if (!gone[i])
            assert_int_equal(
                loci_document_delete(loci_engine_store(engine), "parts", id, &revision, &err),
                LOCI_OK);
        gone[i] = true;
    }
    snprintf(id, sizeof id, "p%d", PARTS - 1);
    assert_int_equal(
        loci_engine_retrieve(engine, "parts", "Which part?", 100, 0, NULL, ignore, NULL, &err),
        LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, id));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_best_are_the_highest),
        cmocka_unit_test(test_codes_are_found),
        cmocka_unit_test(test_scores_are_bm25),
        cmocka_unit_test(test_readings_have_shares_of_words),
        cmocka_unit_test(test_a_damaged_text_harms_no_other),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
