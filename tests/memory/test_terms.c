/* SPDX-License-Identifier: Apache-2.0
 *
 * Words of texts, blocks of postings, and what the store keeps of them: under additions, deletions
 * and replacements (check_snapshot compares all postings with the text), lost, and damaged.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rng.h"
#include "memory/terms.h"

/* --- Terms ------------------------------------------------------------------------------ */

static loci_term_list terms_of(const char *text, bool question) {
    loci_term_list list = {0};
    loci_error err;
    assert_ok(loci_terms_of(loci_slice_text(text), 3, question, &list, &err));
    return list;
}

/* Both texts have these terms, in this order. */
static void assert_same(const char *a, const char *b, size_t count) {
    loci_term_list x = terms_of(a, false), y = terms_of(b, false);
    if (x.count != count || y.count != count)
        fail_msg("\"%s\": %zu, \"%s\": %zu terms", a, x.count, b, y.count);
    for (size_t i = 0; i < count; i++) {
        if (x.items[i].hash != y.items[i].hash)
            fail_msg("\"%s\" and \"%s\" differ in term %zu", a, b, i);
        assert_int_equal(x.items[i].segment, 3);
    }
    loci_term_list_fini(&x);
    loci_term_list_fini(&y);
}

static void assert_different(const char *a, const char *b) {
    loci_term_list x = terms_of(a, false), y = terms_of(b, false);
    assert_int_equal(x.count, 1);
    assert_int_equal(y.count, 1);
    if (x.items[0].hash == y.items[0].hash) fail_msg("\"%s\" and \"%s\" are one term", a, b);
    loci_term_list_fini(&x);
    loci_term_list_fini(&y);
}

static void test_terms_fold_and_stem(void **state) {
    (void)state;
    assert_same("The Telescopes, designed", "the telescope design", 3);
    assert_same("A380 (1990) 7,000-fold", "a380 1990 7 000 fold", 5);
    assert_same("Beyonc\xc3\xa9 na\xc3\xafve", "beyonce NAIVE", 2); /* composed */
    assert_same("Beyonce\xcc\x81", "beyonce", 1);                   /* decomposed */
    assert_same("STRASSE stra\xc3\x9f"
                "e",
                "strasse strasse", 2); /* full folding */
    assert_same("\xce\x9f\xce\x94\xce\x9f\xce\xa3", "\xce\xbf\xce\xb4\xce\xbf\xcf\x82",
                1);                                          /* sigma */
    assert_same("\xef\xac\x81sh \xef\xbc\xa1", "fish a", 2); /* compatibility */
    assert_same("\xd0\x9c\xd0\xbe\xd1\x81\xd0\xba\xd0\xb2\xd0\xb0",
                "\xd0\xbc\xd0\xbe\xd1\x81\xd0\xba\xd0\xb2\xd0\xb0", 1);
    assert_same("\xe6\x9d\xb1\xe4\xba\xac", "\xe6\x9d\xb1 \xe4\xba\xac", 2); /* Han, one by one */
    assert_different("lease", "leash");
    assert_different("1998", "1999");
    assert_different("\xe0\xa4\x95\xe0\xa4\xbf", "\xe0\xa4\x95\xe0\xa5\x80"); /* vowels stay */
}

static void test_terms_of_anything(void **state) {
    (void)state;
    loci_error err;
    assert_same("one\xff\xfetwo\xc3", "one two", 2);
    assert_same("\xed\xa0\x80x\xf5\x80\x80\x80", "x", 1);
    loci_term_list none = terms_of(" .,;--- \n\t\"'", false);
    assert_int_equal(none.count, 0);
    loci_term_list_fini(&none);
    char word[200];
    memset(word, 'q', sizeof word - 1);
    word[sizeof word - 1] = 0;
    loci_term_list cut = terms_of(word, false);
    assert_int_equal(cut.count, (sizeof word - 1 + LOCI_TERM_BYTES_MAX - 1) / LOCI_TERM_BYTES_MAX);
    loci_term_list_fini(&cut);
    uint64_t seed = 7;
    for (int round = 0; round < 300; round++) { /* random bytes: never a crash, always the same */
        uint8_t bytes[97];
        loci_term_list a = {0}, b = {0};
        for (size_t i = 0; i < sizeof bytes; i++) {
            uint64_t r = loci_rng_next(&seed);
            bytes[i] = (uint8_t)(r % 3 == 0 ? r >> 8 : (r >> 8) % 0x40 + 0xc0 * (r % 2));
        }
        size_t len = (size_t)(loci_rng_next(&seed) % (sizeof bytes + 1));
        assert_ok(loci_terms_of(loci_slice_of(bytes, len), 0, false, &a, &err));
        assert_ok(loci_terms_of(loci_slice_of(bytes, len), 0, false, &b, &err));
        assert_int_equal(a.count, b.count);
        for (size_t i = 0; i < a.count; i++) assert_int_equal(a.items[i].hash, b.items[i].hash);
        loci_term_list_fini(&a);
        loci_term_list_fini(&b);
    }
}

static void test_questions_drop_function_words(void **state) {
    (void)state;
    static const struct {
        const char *question;
        size_t left;
    } cases[] = {{"Who designed the dome of the North Telescope?", 4},
                 {"What is it, and why wouldn't they?", 1 /* wouldn */},
                 {"A YOURS a with", 0},
                 {"", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        loci_term_list list = terms_of(cases[i].question, true);
        if (list.count != cases[i].left) fail_msg("%s: %zu", cases[i].question, list.count);
        loci_term_list_fini(&list);
    }
}

/* --- Blocks ----------------------------------------------------------------------------- */

typedef struct counts {
    uint32_t times[64];
    uint32_t last;
} counts;

static void count_times(void *ctx, uint32_t segment, uint32_t times) {
    counts *found = ctx;
    assert_true(segment < 64 && (found->last == UINT32_MAX || segment > found->last));
    found->times[segment] = times;
    found->last = segment;
}

static void random_block(uint64_t *seed, uint32_t segments, uint32_t vocabulary,
                         uint32_t expected[][64], loci_buf *out) {
    loci_error err;
    loci_term_list list = {0};
    uint8_t present[64];
    memset(present, 1, sizeof present);
    size_t count = (size_t)(loci_rng_next(seed) % 2000);
    list.items = malloc((count + 1) * sizeof *list.items);
    assert_non_null(list.items);
    list.capacity = count + 1;
    for (; list.count < count; list.count++) {
        uint64_t r = loci_rng_next(seed);
        uint32_t term = (uint32_t)(r % vocabulary), segment = (uint32_t)((r >> 32) % segments);
        if (r >> 60 == 0) segment = 0, term = 0; /* one stands often: counts of two bytes */
        list.items[list.count] = (loci_term){loci_rng_mix(term), segment};
        expected[term][segment]++;
    }
    assert_ok(loci_term_block_encode(&list, segments, present, out, &err));
    loci_term_list_fini(&list);
}

static void test_blocks_hold_what_was_put_in(void **state) {
    (void)state;
    loci_error err;
    uint64_t seed = 11;
    for (int round = 0; round < 40; round++) {
        uint32_t segments = 1 + (uint32_t)(loci_rng_next(&seed) % 64), vocabulary = 80;
        static uint32_t expected[80][64];
        memset(expected, 0, sizeof expected);
        loci_buf bytes = LOCI_BUF_INIT;
        random_block(&seed, segments, vocabulary, expected, &bytes);
        loci_term_block block;
        assert_ok(loci_term_block_open(loci_slice_of(bytes.data, bytes.len), segments, "b", &block,
                                       &err));
        for (uint32_t t = 0; t < vocabulary; t++) {
            counts found = {.last = UINT32_MAX};
            assert_ok(
                loci_term_block_find(&block, loci_rng_mix(t), "b", count_times, &found, &err));
            assert_memory_equal(found.times, expected[t], sizeof found.times);
        }
        loci_buf_fini(&bytes);
    }
}

static void ignore(void *ctx, uint32_t segment, uint32_t times) {
    (void)times;
    assert_true(segment < *(uint32_t *)ctx);
}

/* The envelope's hash catches damage first; without it nothing worse than an error may come. */
static void test_damaged_blocks_do_no_harm(void **state) {
    (void)state;
    loci_error err;
    uint64_t seed = 13;
    static uint32_t expected[20][64];
    uint32_t segments = 30;
    loci_buf bytes = LOCI_BUF_INIT;
    random_block(&seed, segments, 20, expected, &bytes);
    loci_term_block block;
    for (size_t len = 0; len < bytes.len; len++)
        assert_int_equal(
            loci_term_block_open(loci_slice_of(bytes.data, len), segments, "b", &block, &err),
            LOCI_E_CORRUPT);
    assert_int_equal(
        loci_term_block_open(loci_slice_of(bytes.data, bytes.len), segments + 1, "b", &block, &err),
        LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "b is not of the expected size"));
    for (size_t at = 0; at < 8 * bytes.len; at++) {
        uint8_t *copy = malloc(bytes.len);
        assert_non_null(copy);
        memcpy(copy, bytes.data, bytes.len);
        copy[at / 8] ^= (uint8_t)(1u << at % 8);
        if (loci_term_block_open(loci_slice_of(copy, bytes.len), segments, "b", &block, &err) ==
            LOCI_OK)
            for (uint32_t t = 0; t < 20; t++)
                (void)!loci_term_block_find(&block, loci_rng_mix(t), "b", ignore, &segments, &err);
        free(copy);
    }
    loci_buf_fini(&bytes);
}

/* --- The store -------------------------------------------------------------------------- */

static void put(fixture *f, const char *id, const char *text) {
    loci_error err;
    loci_document_info info;
    bool unchanged;
    assert_ok(put_document(f, "a", id, loci_slice_text(text), &info, &unchanged, &err));
}

static void count_segments(void *ctx, uint32_t term, uint32_t segment, uint32_t tokens,
                           uint32_t times) {
    (void)segment;
    (void)tokens;
    (void)times;
    ((uint32_t *)ctx)[term]++;
}

/* How many live segments hold the word. */
static uint32_t frequency(fixture *f, const char *word) {
    loci_error err;
    loci_snapshot *snapshot;
    loci_term_list list = terms_of(word, false);
    uint32_t count = 0;
    uint64_t bytes = 0;
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    assert_ok(loci_snapshot_postings(snapshot, &list.items[0].hash, 1, NULL, count_segments, &count,
                                     &bytes, &err));
    loci_snapshot_release(snapshot);
    loci_term_list_fini(&list);
    return count;
}

static void open_with_words(fixture *f) {
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put(f, "one", "the orchid house");
    put_text(f, "a", "filler", 5, 2500); /* two extents and a tail */
    put(f, "two", "an orchid, a second one");
    wait_settled(f, "a");
}

static void test_frequencies_follow_the_documents(void **state) {
    fixture *f = *state;
    loci_error err;
    uint64_t revision;
    open_with_words(f);
    assert_int_equal(frequency(f, "Orchids"), 2);
    assert_int_equal(frequency(f, "house"), 1);
    put(f, "three", "Orchids!"); /* flat */
    wait_searchable(f, "a");
    assert_int_equal(frequency(f, "orchid"), 3);
    loci_snapshot *old;
    assert_ok(loci_snapshot_acquire(f->store, "a", &old, &err));
    put(f, "one", "the fern house"); /* replaces */
    wait_searchable(f, "a");
    assert_int_equal(frequency(f, "orchid"), 2);
    assert_int_equal(frequency(f, "fern"), 1);
    assert_ok(loci_document_delete(f->store, "a", "two", &revision, &err));
    assert_int_equal(frequency(f, "orchid"), 1);
    uint32_t count = 0; /* a snapshot stays what it was */
    uint64_t bytes = 0;
    loci_term_list list = terms_of("orchid", false);
    assert_ok(loci_snapshot_postings(old, &list.items[0].hash, 1, NULL, count_segments, &count,
                                     &bytes, &err));
    assert_int_equal(count, 3);
    loci_snapshot_release(old);
    loci_term_list_fini(&list);
    check_snapshot(f, "a");
    wait_settled(f, "a");
    fixture_close(f);
    fixture_open(f);
    assert_int_equal(frequency(f, "orchid"), 1);
    check_snapshot(f, "a");
}

/* Replaces every stored block by `payload` under `kind`, or removes it (kind 0). */
static size_t spoil_blocks(fixture *f, uint32_t kind, loci_slice payload) {
    loci_error err;
    loci_rocks *rocks;
    char path[128];
    size_t count = 0;
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key all = {.len = 0};
    loci_batch *batch = loci_batch_create(rocks);
    loci_scan *scan = loci_scan_open(rocks, NULL, LOCI_CF_TERMS, &all, NULL);
    for (loci_slice found; loci_scan_next(scan, &found); count++) {
        loci_key key = {.len = found.len};
        memcpy(key.data, found.data, found.len);
        if (kind)
            loci_batch_put(batch, LOCI_CF_TERMS, &key, kind, payload);
        else
            loci_batch_delete(batch, LOCI_CF_TERMS, &key);
    }
    assert_ok(loci_scan_close(scan, &err));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
    return count;
}

static void test_lost_and_damaged_blocks_are_made_anew(void **state) {
    fixture *f = *state;
    open_with_words(f);
    fixture_close(f);
    static const struct {
        uint32_t kind;
        const char *payload;
    } spoils[] = {{0, ""},
                  {LOCI_KIND_FLAT, "of another kind"},
                  {LOCI_KIND_TERMS, ""},
                  {LOCI_KIND_TERMS, "no block at all"}};
    for (size_t i = 0; i < sizeof spoils / sizeof *spoils; i++) {
        size_t blocks = spoil_blocks(f, spoils[i].kind, loci_slice_text(spoils[i].payload));
        assert_true(blocks >= 2);
        fixture_open(f);
        assert_int_equal(frequency(f, "orchid"), 2);
        check_snapshot(f, "a");
        fixture_close(f);
        assert_int_equal(count_keys(f->dir, LOCI_CF_TERMS, ""), blocks); /* and kept */
    }
    fixture_open(f);
}

/* A block may know nothing of dead segments; when the same extent has them alive again, it is made
 * anew. */
static void test_blocks_that_know_too_little(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_buf bytes = LOCI_BUF_INIT;
    open_with_words(f);
    loci_snapshot *snapshot;
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    uint32_t segments = loci_snapshot_view(snapshot)->extents[0].segments;
    loci_snapshot_release(snapshot);
    fixture_close(f);
    uint8_t *absent = calloc(segments, 1);
    loci_term_list none = {0};
    assert_non_null(absent);
    assert_ok(loci_term_block_encode(&none, segments, absent, &bytes, &err));
    spoil_blocks(f, LOCI_KIND_TERMS, loci_slice_of(bytes.data, bytes.len));
    fixture_open(f);
    check_snapshot(f, "a");
    free(absent);
    loci_buf_fini(&bytes);
}

/* Extents that go take their blocks with them; so do corpora. */
static void test_blocks_go_with_extents(void **state) {
    fixture *f = *state;
    loci_error err;
    uint64_t revision;
    open_with_words(f);
    assert_ok(loci_document_delete(f->store, "a", "filler", &revision, &err));
    wait_settled(f, "a");
    assert_int_equal(frequency(f, "orchid"), 2);
    loci_corpus_info info;
    assert_ok(loci_corpus_get(f->store, "a", &info, &err));
    wait_extents(f, "a", info.extents);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_TERMS, ""), info.extents);
    loci_rocks *rocks; /* a block that no manifest names goes at open */
    char path[128];
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key key = {.len = 0};
    loci_key_u64(&key, info.uid);
    for (uint32_t i = 0; i < 4; i++) loci_key_u32(&key, i);
    loci_batch *batch = loci_batch_create(rocks);
    loci_batch_put(batch, LOCI_CF_TERMS, &key, LOCI_KIND_TERMS, loci_slice_text("x"));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
    fixture_open(f);
    fixture_start(f);
    put_text(f, "a", "more", 6, 1500);
    wait_settled(f, "a");
    assert_ok(loci_corpus_get(f->store, "a", &info, &err));
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_TERMS, ""), info.extents);
    fixture_open(f);
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    fixture_start(f);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_TERMS, ""), 0);
    fixture_open(f);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)

/* --- Damaged texts, blocks that cannot be stored ------------------------------------------ */

static int log_pipe[2], kept_stderr;

static void catch_log(void) {
    assert_int_equal(pipe(log_pipe), 0);
    loci_log_configure(LOCI_LOG_WARN, false);
    fflush(stderr);
    kept_stderr = dup(STDERR_FILENO);
    dup2(log_pipe[1], STDERR_FILENO);
}

/* How many lines of the caught log hold the words. */
static size_t logged(const char *words) {
    static char text[1 << 16];
    loci_log_configure(LOCI_LOG_ERROR, false);
    dup2(kept_stderr, STDERR_FILENO);
    close(kept_stderr);
    close(log_pipe[1]);
    size_t len = 0, count = 0;
    for (ssize_t n; (n = read(log_pipe[0], text + len, sizeof text - 1 - len)) > 0;)
        len += (size_t)n;
    close(log_pipe[0]);
    text[len] = 0;
    for (const char *at = text; (at = strstr(at, words)); at++) count++;
    return count;
}

/* The chunk of a document, in order of registration, becomes one that does not decompress. */
static void damage_chunk(fixture *f, unsigned which) {
    loci_error err;
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key all = {.len = 0};
    loci_batch *batch = loci_batch_create(rocks);
    loci_scan *scan = loci_scan_open(rocks, NULL, LOCI_CF_CHUNK, &all, NULL);
    unsigned count = 0;
    for (loci_slice found; loci_scan_next(scan, &found); count++) {
        if (count != which) continue;
        loci_key key = {.len = found.len};
        memcpy(key.data, found.data, found.len);
        loci_batch_put(batch, LOCI_CF_CHUNK, &key, LOCI_KIND_CHUNK, loci_slice_text("damaged"));
    }
    assert_true(which < count);
    assert_ok(loci_scan_close(scan, &err));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
}

/* Reading the segments of the document fails and names it; all others are read. */
static void check_readable_but(fixture *f, const char *damaged) {
    loci_error err;
    loci_snapshot *snapshot;
    loci_segment_info info;
    loci_buf text = LOCI_BUF_INIT;
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    for (uint32_t s = 0; s < loci_snapshot_segments(snapshot); s++) {
        assert_ok(loci_snapshot_segment(snapshot, s, &info, &err));
        loci_status status = loci_snapshot_read(snapshot, s, info.start, info.end, &text, &err);
        assert_int_equal(status, strcmp(info.document, damaged) ? LOCI_OK : LOCI_E_CORRUPT);
        if (status != LOCI_OK) assert_non_null(strstr(err.text, damaged));
    }
    loci_snapshot_release(snapshot);
    loci_buf_fini(&text);
}

/* Of the chunks of "one" (in an extent), filler, and "two" (flat), one is damaged: the words of the
 * other documents are found. */
static void check_damaged(fixture *f, unsigned chunk, const char *id) {
    loci_error err;
    loci_snapshot *held;
    bool first = strcmp(id, "one") == 0;
    open_with_words(f);
    fixture_close(f);
    damage_chunk(f, chunk);
    assert_true(spoil_blocks(f, 0, loci_slice_text("")) >= 2);
    fixture_open(f);
    assert_ok(loci_snapshot_acquire(f->store, "a", &held, &err));
    catch_log();
    uint32_t orchids = 0;
    for (int again = 0; again < 4; again++) orchids += frequency(f, "orchid");
    uint32_t houses = frequency(f, "house"), seconds = frequency(f, "second");
    loci_snapshot_release(held);
    size_t lines = logged("words that cannot be read");
    assert_int_equal(orchids, 4);
    assert_int_equal(lines, 1);
    assert_int_equal(houses, !first);
    assert_int_equal(seconds, first);
    check_readable_but(f, id);
}

static void test_damaged_texts_of_extents_have_no_words(void **state) {
    check_damaged(*state, 0, "one");
}

static void test_damaged_flat_texts_have_no_words(void **state) {
    check_damaged(*state, 2, "two");
}

/* An extent that is sealed over a damaged text has a block all the same. */
static void test_extents_of_damaged_texts_have_blocks(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put(f, "one", "the orchid house");
    wait_searchable(f, "a");
    fixture_close(f);
    damage_chunk(f, 0);
    fixture_open(f);
    fixture_start(f);
    put(f, "two", "an orchid, a second one");
    put_text(f, "a", "filler", 5, 2500);
    wait_settled(f, "a");
    uint64_t extents = info_of(f, "a").extents;
    fixture_close(f);
    assert_true(extents >= 2);
    assert_int_equal(count_keys(f->dir, LOCI_CF_TERMS, ""), extents);
    fixture_open(f);
    assert_int_equal(frequency(f, "orchid"), 1);
    assert_int_equal(frequency(f, "house"), 0);
    check_readable_but(f, "one");
}

/* In the place of loci_batch_write (--wrap): a full disk. */
static bool writes_fail;
loci_status __real_loci_batch_write(loci_batch *batch, bool sync, loci_error *err);
loci_status __wrap_loci_batch_write(loci_batch *batch, bool sync, loci_error *err);

loci_status __wrap_loci_batch_write(loci_batch *batch, bool sync, loci_error *err) {
    if (writes_fail) return loci_fail(err, LOCI_E_IO, "the disk is full");
    return __real_loci_batch_write(batch, sync, err);
}

/* A full disk: the block is made and logged once for the snapshot, and answers. */
static void test_blocks_that_cannot_be_stored_stay_in_memory(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *held;
    open_with_words(f);
    fixture_close(f);
    size_t blocks = spoil_blocks(f, 0, loci_slice_text(""));
    fixture_open(f);
    assert_ok(loci_snapshot_acquire(f->store, "a", &held, &err));
    catch_log();
    writes_fail = true;
    uint32_t orchids = 0;
    for (int again = 0; again < 3; again++) orchids += frequency(f, "orchid");
    writes_fail = false;
    loci_snapshot_release(held);
    assert_int_equal(logged("is not kept"), blocks);
    assert_int_equal(orchids, 6);
}

static void test_cancelled_questions_end(void **state) {
    fixture *f = *state;
    loci_error err = {0};
    loci_snapshot *snapshot;
    loci_cancel cancel;
    uint64_t term = 1, bytes = 0;
    uint32_t count = 0;
    open_with_words(f);
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    loci_cancel_init(&cancel, 0);
    assert_ok(
        loci_snapshot_postings(snapshot, &term, 1, &cancel, count_segments, &count, &bytes, &err));
    assert_true(bytes > 0);
    bytes = 0;
    loci_cancel_request(&cancel);
    assert_int_equal(
        loci_snapshot_postings(snapshot, &term, 1, &cancel, count_segments, &count, &bytes, &err),
        LOCI_E_CANCELLED);
    assert_int_equal(bytes, 0);
    loci_snapshot_release(snapshot);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_terms_fold_and_stem),
        cmocka_unit_test(test_terms_of_anything),
        cmocka_unit_test(test_questions_drop_function_words),
        cmocka_unit_test(test_blocks_hold_what_was_put_in),
        cmocka_unit_test(test_damaged_blocks_do_no_harm),
        TEST(test_frequencies_follow_the_documents),
        TEST(test_lost_and_damaged_blocks_are_made_anew),
        TEST(test_blocks_that_know_too_little),
        TEST(test_blocks_go_with_extents),
        TEST(test_damaged_texts_of_extents_have_no_words),
        TEST(test_damaged_flat_texts_have_no_words),
        TEST(test_extents_of_damaged_texts_have_blocks),
        TEST(test_blocks_that_cannot_be_stored_stay_in_memory),
        TEST(test_cancelled_questions_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
