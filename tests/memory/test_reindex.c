/* SPDX-License-Identifier: Apache-2.0
 *
 * Reindexing: the new index is the one of a fresh registration with the new model, the old one
 * answers until then, changes are refused and nothing is lost or doubled, whenever the process is
 * killed.
 */
#include "reindex_support.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

static bool is_of(fixture *f, const char *corpus, const char *fingerprint) {
    return strcmp(info_of(f, corpus).geometry.fingerprint, fingerprint) == 0;
}

static void compare_documents(const loci_document_info *a, const loci_document_info *b,
                              size_t count) {
    for (size_t i = 0; i < count; i++) {
        assert_string_equal(a[i].id, b[i].id);
        assert_string_equal(a[i].content_hash, b[i].content_hash);
        assert_int_equal(a[i].sequence, b[i].sequence);
        assert_int_equal(a[i].created, b[i].created);
        assert_int_equal(a[i].tokens, b[i].tokens);
        assert_true(a[i].searchable && b[i].searchable);
    }
}

static void test_new_index_is_that_of_a_registration(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *old;
    loci_document_info before[8], after[8];
    size_t count_before, count_after;
    char hash[33], expected[33], dir[128];
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    fill(f, "a", true);
    loci_corpus_info info = info_of(f, "a");
    assert_ok(loci_document_list(f->store, "a", "", 8, before, &count_before, &err));
    assert_ok(loci_snapshot_acquire(f->store, "a", &old, &err));

    run_model(f, OTHER_FINGERPRINT);
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    wait_reindexed(f, "a");
    check_snapshot(f, "a");
    loci_corpus_info now = info_of(f, "a");
    assert_string_equal(now.geometry.fingerprint, OTHER_FINGERPRINT);
    assert_true(now.revision > info.revision && now.created == info.created);
    assert_true(now.documents == info.documents && now.bytes == info.bytes &&
                now.tokens == info.tokens);
    assert_ok(loci_document_list(f->store, "a", "", 8, after, &count_after, &err));
    assert_int_equal(count_before, 4);
    assert_int_equal(count_after, 4);
    compare_documents(before, after, 4);

    loci_buf metadata = LOCI_BUF_INIT;
    assert_ok(loci_document_get(f->store, "a", "wide", after, &metadata, &err));
    assert_int_equal(metadata.len, 4);
    loci_buf_fini(&metadata);
    create_of(f, "fresh", OTHER_FINGERPRINT);
    fill(f, "fresh", false);
    hash_of(f, "a", hash);
    hash_of(f, "fresh", expected);
    assert_string_equal(hash, expected);

    /* Who holds the old index still reads it; then it goes. */
    loci_buf text = LOCI_BUF_INIT;
    assert_string_equal(loci_snapshot_info(old)->geometry.fingerprint, FINGERPRINT);
    for (uint32_t s = 0; s < loci_snapshot_segments(old); s++)
        if (loci_snapshot_segment_live(old, s))
            assert_ok(loci_snapshot_read(old, s, 0, 10, &text, &err));
    loci_buf_fini(&text);
    snprintf(dir, sizeof dir, "%s/extents/%016llx", f->dir, (unsigned long long)info.uid);
    assert_int_equal(access(dir, F_OK), 0);
    loci_snapshot_release(old);
    for (int i = 0; i < 500 && access(dir, F_OK) == 0; i++) loci_sleep_ms(10);
    assert_int_equal(access(dir, F_OK), -1);
    put_text(f, "a", "more", 8, 200);
    wait_searchable(f, "a");
    check_snapshot(f, "a");
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 5 + 4);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "c"), 2);
    fixture_open(f);
    check_snapshot(f, "a");
}

static void refused(fixture *f, const char *corpus) {
    loci_error err;
    loci_document_info info;
    uint64_t revision;
    bool unchanged;
    assert_int_equal(
        put_document(f, corpus, "new", loci_slice_text("text"), &info, &unchanged, &err),
        LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "REINDEXING");
    assert_non_null(strstr(err.text, "loci corpus reindex a"));
    assert_int_equal(loci_document_delete(f->store, corpus, "x", &revision, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "REINDEXING");
}

static void test_old_index_answers_and_nothing_changes_meanwhile(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info info;
    loci_document_writer *writer;
    bool unchanged;
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    fill(f, "a", true);
    uint64_t revision = info_of(f, "a").revision, old = check_snapshot(f, "a");
    assert_ok(loci_document_begin(f->store, "a", "late", loci_slice_of(NULL, 0), &writer, &err));
    assert_ok(loci_document_append(writer, loci_slice_text("late"), &err));

    f->fail_encodes = 1000000;
    run_model(f, OTHER_FINGERPRINT);
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    refused(f, "a");
    assert_int_equal(loci_document_commit(writer, &info, &unchanged, &err), LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "REINDEXING");
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err)); /* the same one */
    assert_true(info_of(f, "a").reindexing);
    assert_string_equal(info_of(f, "a").reindex_fingerprint, OTHER_FINGERPRINT);
    fake_model = 0;
    assert_int_equal(check_snapshot(f, "a"), old);
    assert_int_equal(info_of(f, "a").revision, revision);
    loci_ingest_progress progress;
    uint64_t end = loci_now_ns() + FAR_NS;
    do assert_ok(loci_ingest_reindex_progress(f->ingest, "a", &progress, &err));
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end);
    assert_int_equal(progress.failure.status, LOCI_E_INTERNAL);

    assert_ok(loci_corpus_reindex_cancel(f->store, "a", &err));
    assert_int_equal(loci_corpus_reindex_cancel(f->store, "a", &err), LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "NOT_REINDEXING");
    run_model(f, FINGERPRINT);
    f->fail_encodes = 0;
    put_text(f, "a", "new", 7, 100);
    wait_searchable(f, "a");
    check_snapshot(f, "a");
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "c"), 1); /* given up without a trace */
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 5);
}

static void test_goes_on_after_a_restart(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    char hash[33], again[33];
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    fill(f, "a", false);
    hash_of(f, "a", hash);
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    fixture_close(f);
    /* A daemon of the old model answers as before and says why nothing goes on. */
    fixture_open(f);
    run_model(f, FINGERPRINT);
    check_snapshot(f, "a");
    refused(f, "a");
    uint64_t end = loci_now_ns() + FAR_NS;
    do assert_ok(loci_ingest_reindex_progress(f->ingest, "a", &progress, &err));
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end);
    assert_string_equal(progress.failure.reason, "MODEL_MISMATCH");
    assert_true(is_of(f, "a", FINGERPRINT));
    fixture_close(f);
    fixture_open(f);
    run_model(f, OTHER_FINGERPRINT);
    wait_reindexed(f, "a");
    assert_true(is_of(f, "a", OTHER_FINGERPRINT));
    check_snapshot(f, "a");
    /* And back: the index is the first one again. */
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    assert_ok(
        reindex(f, "a", "00000000000000000000000000000000", &err)); /* a third one, given up */
    assert_ok(reindex(f, "a", FINGERPRINT, &err));
    run_model(f, FINGERPRINT);
    wait_reindexed(f, "a");
    check_snapshot(f, "a");
    hash_of(f, "a", again);
    assert_string_equal(hash, again);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "c"), 1);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CHUNK, ""), 5);
}

typedef struct watching {
    uint64_t documents; /* as last told */
    unsigned calls, stop_at;
} watching;

static loci_status watch_copying(void *ctx, uint64_t documents, loci_error *err) {
    watching *self = ctx;
    assert_true(documents >= self->documents);
    self->documents = documents;
    if (++self->calls == self->stop_at) return loci_fail(err, LOCI_E_UNAVAILABLE, "enough");
    return LOCI_OK;
}

/* Copying is shown as it goes on, and stops when its watcher says so. */
static void test_copying_is_watched(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info info;
    bool unchanged;
    fixture_open(f);
    fixture_create(f, "a");
    for (int i = 0; i < 8; i++) { /* bytes that do not shrink */
        static uint8_t noise[800000];
        char id[8] = {(char)('a' + i)};
        uint64_t draw = (uint64_t)i + 1;
        for (size_t at = 0; at < sizeof noise; at++) {
            draw = draw * 6364136223846793005u + 1442695040888963407u;
            noise[at] = (uint8_t)(33 + (draw >> 33) % 94);
        }
        assert_ok(
            put_document(f, "a", id, loci_slice_of(noise, sizeof noise), &info, &unchanged, &err));
    }
    watching self = {.stop_at = 3};
    loci_reindex_watch watch = {.on_copied = watch_copying, .ctx = &self};
    loci_geometry geometry = geometry_of(OTHER_FINGERPRINT);
    assert_int_equal(loci_corpus_reindex(f->store, "a", &geometry, NULL, reindex_sinks,
                                         reindex_sinks, &watch, &err),
                     LOCI_E_UNAVAILABLE);
    assert_string_equal(err.text, "enough");
    assert_true(self.calls == 3 && self.documents > 0 && self.documents < 8);
    assert_false(info_of(f, "a").reindexing);
    self = (watching){0};
    assert_ok(loci_corpus_reindex(f->store, "a", &geometry, NULL, reindex_sinks, reindex_sinks,
                                  &watch, &err));
    assert_true(self.calls > 4 && self.documents == 8);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 16);
}

/* A replacement that is not searchable yet: only it comes along. */
static void test_pending_documents_come_along(void **state) {
    fixture *f = *state;
    loci_error err;
    char hash[33], expected[33];
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    put_text(f, "a", "x", 1, 900);
    put_text(f, "a", "y", 2, 900);
    wait_settled(f, "a");
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    put_text(f, "a", "x", 3, 700);
    put_text(f, "a", "z", 4, 300);
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    run_model(f, OTHER_FINGERPRINT);
    wait_reindexed(f, "a");
    check_snapshot(f, "a");
    assert_int_equal(info_of(f, "a").documents, 3);
    create_of(f, "fresh", OTHER_FINGERPRINT);
    put_text(f, "fresh", "y", 2, 900);
    put_text(f, "fresh", "x", 3, 700);
    put_text(f, "fresh", "z", 4, 300);
    wait_settled(f, "fresh");
    hash_of(f, "a", hash);
    hash_of(f, "fresh", expected);
    assert_string_equal(hash, expected);
}

static void test_deleting_takes_both(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    fill(f, "a", false);
    f->encode_ms = 20;
    run_model(f, OTHER_FINGERPRINT);
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    assert_int_equal(reindex(f, "a", OTHER_FINGERPRINT, &err), LOCI_E_NOTFOUND);
    fixture_close(f);
    static const loci_family families[] = {LOCI_CF_DOCUMENT, LOCI_CF_NAME, LOCI_CF_CHUNK,
                                           LOCI_CF_FLAT, LOCI_CF_TERMS};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        assert_int_equal(count_keys(f->dir, families[i], ""), 0);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "c"), 0);
}

/* --- Sudden death --------------------------------------------------------------------------- */

static int run_child(const char *dir, bool prepare) {
    fixture f;
    loci_error err;
    bool outdated;
    fixture_init(&f, dir);
    f.options.extent_tokens = SMALL_EXTENT_TOKENS;
    fixture_open(&f);
    if (prepare) {
        fixture_create(&f, "a");
        run_model(&f, FINGERPRINT);
        fill(&f, "a", true);
    } else {
        run_model(&f, OTHER_FINGERPRINT);
        assert_ok(loci_corpus_outdated(f.store, "a", OTHER_FINGERPRINT, &outdated, &err));
        if (outdated) assert_ok(reindex(&f, "a", OTHER_FINGERPRINT, &err));
        wait_reindexed(&f, "a");
    }
    fixture_close(&f);
    return 0;
}

static char prepared[64]; /* the directory that all begin with */

static bool spawn(const char *dir, const char *what, const char *fail_at) {
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        if (!what) execlp("cp", "cp", "-a", prepared, dir, (char *)NULL);
        if (fail_at)
            setenv("LOCI_FAIL_AT", fail_at, 1);
        else
            unsetenv("LOCI_FAIL_AT");
        execl("/proc/self/exe", "test_reindex", what, dir, (char *)NULL);
        _exit(4);
    }
    int result;
    assert_int_equal(waitpid(pid, &result, 0), pid);
    bool killed = WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL;
    if (!killed && (!WIFEXITED(result) || WEXITSTATUS(result) != 0))
        fail_msg("the child failed at %s, status %x", fail_at ? fail_at : "no point", result);
    return killed;
}

/* The store is whole and answers, by the old index or the new one; returns whether by the new. */
static bool check_store(const char *dir, char hash[33]) {
    fixture f;
    fixture_init(&f, dir);
    f.options.extent_tokens = SMALL_EXTENT_TOKENS;
    fixture_open(&f);
    loci_corpus_info info = info_of(&f, "a");
    fake_model = strcmp(info.geometry.fingerprint, OTHER_FINGERPRINT) == 0;
    check_snapshot(&f, "a");
    assert_int_equal(info.documents, 4);
    assert_int_equal(info.pending_documents, 0);
    hash_of(&f, "a", hash);
    bool begun = info.reindexing;
    fixture_close(&f);
    static const key_group groups[] = {
        {LOCI_CF_NAME, ""}, {LOCI_CF_CHUNK, ""}, {LOCI_CF_CATALOG, "c"}};
    size_t keys[3];
    count_each(dir, groups, 3, keys);
    assert_int_equal(keys[0], begun ? 8 : 4);
    assert_int_equal(keys[1], begun ? 10 : 5);
    assert_int_equal(keys[2], begun ? 2 : 1);
    return fake_model != 0;
}

static bool die_once(const char *name, int n, char expected[33]) {
    char dir[80], fail_at[80], hash[33];
    snprintf(dir, sizeof dir, "%s.copy", prepared);
    snprintf(fail_at, sizeof fail_at, "%s:%d", name, n);
    assert_false(spawn(dir, NULL, NULL));
    bool killed = spawn(dir, "reindex", n > 0 ? fail_at : NULL);
    if (killed) {
        check_store(dir, hash);
        assert_false(spawn(dir, "reindex", NULL));
    }
    assert_true(check_store(dir, hash));
    if (expected[0] == 0) memcpy(expected, hash, 33);
    if (strcmp(hash, expected) != 0) fail_msg("dying at %s leads to another index", fail_at);
    remove_tree(dir);
    return killed;
}

static void test_every_kill_point(void **state) {
    (void)state;
    char expected[33] = "";
    make_crash_directory("reindex", prepared);
    assert_false(spawn(prepared, "prepare", NULL));
    assert_false(die_once("", 0, expected));
    static const int passes[] = {1, 2, 4};
    for (size_t i = 0; loci_failpoints[i]; i++) {
        size_t p = 0;
        while (p < 3 && die_once(loci_failpoints[i], passes[p], expected)) p++;
        if (p < 2 && strncmp(loci_failpoints[i], "reindex", 7) == 0)
            fail_msg("reindexing never passes %s twice", loci_failpoints[i]);
    }
    remove_tree(prepared);
}

int main(int argc, char **argv) {
    if (argc == 3) return run_child(argv[2], strcmp(argv[1], "prepare") == 0);
#define TEST(name) cmocka_unit_test_setup_teardown(name, reindex_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_new_index_is_that_of_a_registration),
        TEST(test_old_index_answers_and_nothing_changes_meanwhile),
        TEST(test_goes_on_after_a_restart),
        TEST(test_copying_is_watched),
        TEST(test_pending_documents_come_along),
        TEST(test_deleting_takes_both),
        cmocka_unit_test(test_every_kill_point),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
