/* SPDX-License-Identifier: Apache-2.0
 *
 * Sudden death at every kill point of memory/. A child process works through a script and notes
 * each step that was acknowledged; it dies at the n-th pass of a point. Then:
 * - the store opens, and every revision that it shows is whole;
 * - nothing acknowledged is lost;
 * - a second child goes on with the script, and ends in the manifest of a run that never died.
 */
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* How often the script dies at a point, at another passage each time. */
#ifdef __SANITIZE_ADDRESS__
#define DEATHS 1
#else
#define DEATHS 3
#endif

typedef enum step_kind { STEP_PUT, STEP_DELETE, STEP_SETTLE } step_kind;

typedef struct script_step {
    step_kind kind;
    const char *id;
    uint64_t seed;
    size_t size;
    size_t blanks; /* spaces before the text: several chunks at no cost in tokens */
} script_step;

static const script_step script[] = {
    {STEP_PUT, "x", 1, 1100, 0},         {STEP_PUT, "wide", 2, 300, 600000},
    {STEP_PUT, "v", 7, 1500, 0},         {STEP_SETTLE, NULL, 0, 0, 0},
    {STEP_PUT, "small", 3, 90, 0},       {STEP_SETTLE, NULL, 0, 0, 0},
    {STEP_DELETE, "x", 0, 0, 0},         {STEP_SETTLE, NULL, 0, 0, 0},
    {STEP_PUT, "wide", 4, 1300, 300000}, {STEP_SETTLE, NULL, 0, 0, 0},
    {STEP_PUT, "y", 5, 40, 0},           {STEP_PUT, "z", 6, 1100, 0},
    {STEP_PUT, "q", 8, 350, 0},          {STEP_SETTLE, NULL, 0, 0, 0},
    {STEP_DELETE, "q", 0, 0, 0},         {STEP_SETTLE, NULL, 0, 0, 0},
};
#define STEPS (sizeof script / sizeof *script)

static char *step_text(const script_step *step, size_t *len) {
    char *words = make_text(step->seed, step->size);
    *len = step->blanks + step->size;
    char *text = malloc(*len + 1);
    assert_non_null(text);
    memset(text, ' ', step->blanks);
    memcpy(text + step->blanks, words, step->size);
    free(words);
    return text;
}

/* --- The child -------------------------------------------------------------------------- */

static void run_step(fixture *f, const script_step *step) {
    loci_error err;
    uint64_t revision;
    if (step->kind == STEP_PUT) {
        size_t len;
        loci_document_info info;
        bool unchanged;
        char *text = step_text(step, &len);
        assert_ok(
            put_document(f, "a", step->id, loci_slice_of(text, len), &info, &unchanged, &err));
        free(text);
        assert_ok(loci_store_sync(f->store, &err));
        loci_ingest_wake(f->ingest);
    } else if (step->kind == STEP_DELETE) {
        loci_status status = loci_document_delete(f->store, "a", step->id, &revision, &err);
        assert_true(status == LOCI_OK || status == LOCI_E_NOTFOUND);
    } else {
        wait_settled(f, "a");
        wait_merged(f, "a");
    }
}

/* Steps before `from` were acknowledged to an earlier child. */
static int run_child(const char *dir, size_t from, int notes) {
    fixture f;
    loci_error err;
    loci_corpus_info info;
    fixture_init(&f, dir);
    f.options.extent_tokens = 512;
    f.options.merge_tokens = 4096;
    fixture_open(&f);
    if (loci_corpus_get(f.store, "a", &info, &err) == LOCI_E_NOTFOUND) fixture_create(&f, "a");
    fixture_start(&f);
    for (size_t i = from; i < STEPS; i++) {
        run_step(&f, &script[i]);
        if (write(notes, ".", 1) != 1) return 3;
    }
    fixture_close(&f);
    return 0;
}

/* --- The parent ------------------------------------------------------------------------- */

/* Returns the number of steps acknowledged in all; *killed: by a kill point. */
static size_t spawn(const char *dir, size_t from, const char *fail_at, bool *killed) {
    int pipe_ends[2];
    assert_int_equal(pipe(pipe_ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        char first[16], notes[16];
        snprintf(first, sizeof first, "%zu", from);
        snprintf(notes, sizeof notes, "%d", pipe_ends[1]);
        if (fail_at)
            setenv("LOCI_FAIL_AT", fail_at, 1);
        else
            unsetenv("LOCI_FAIL_AT");
        execl("/proc/self/exe", "test_crash", "child", dir, first, notes, (char *)NULL);
        _exit(4);
    }
    close(pipe_ends[1]);
    char byte;
    while (read(pipe_ends[0], &byte, 1) == 1) from++;
    close(pipe_ends[0]);
    int result;
    assert_int_equal(waitpid(pid, &result, 0), pid);
    *killed = WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL;
    if (!*killed && (!WIFEXITED(result) || WEXITSTATUS(result) != 0))
        fail_msg("the child failed at %s, status %x", fail_at ? fail_at : "no point", result);
    return from;
}

static void check_document(fixture *f, const script_step *step) {
    loci_error err;
    loci_buf text = LOCI_BUF_INIT, metadata = LOCI_BUF_INIT;
    loci_document_info info;
    size_t len;
    char *expected = step_text(step, &len);
    assert_ok(loci_document_get(f->store, "a", step->id, &info, &metadata, &err));
    assert_int_equal(metadata.len, 4);
    assert_ok(loci_document_read(f->store, "a", step->id, 0, UINT64_MAX, &text, &err));
    assert_int_equal(text.len, len);
    assert_memory_equal(text.data, expected, len);
    free(expected);
    loci_buf_fini(&text);
    loci_buf_fini(&metadata);
}

/* Whether a step at or after `from` touches the document: then it may be in either state. */
static bool touched_later(const char *id, size_t from) {
    for (size_t i = from; i < STEPS; i++)
        if (script[i].id && strcmp(script[i].id, id) == 0) return true;
    return false;
}

static void check_acknowledged(fixture *f, size_t acknowledged) {
    loci_error err;
    loci_corpus_info info;
    if (loci_corpus_get(f->store, "a", &info, &err) == LOCI_E_NOTFOUND) {
        assert_int_equal(acknowledged, 0);
        return;
    }
    for (size_t i = 0; i < acknowledged; i++) {
        if (!script[i].id || touched_later(script[i].id, i + 1)) continue;
        if (script[i].kind == STEP_PUT)
            check_document(f, &script[i]);
        else
            assert_int_equal(loci_document_get(f->store, "a", script[i].id,
                                               &(loci_document_info){.bytes = 0}, NULL, &err),
                             LOCI_E_NOTFOUND);
    }
    check_snapshot(f, "a");
    loci_corpus_get(f->store, "a", &info, &err) == LOCI_OK ? (void)0 : fail();
    wait_extents(f, "a", info.extents);
}

/* Opens the store, checks it, closes it; returns the hash of the corpus, 0 when there is none. What
 * was half done must be gone afterwards. */
static uint64_t check_store(const char *dir, size_t acknowledged) {
    fixture f;
    loci_error err;
    loci_snapshot *snapshot;
    fixture_init(&f, dir);
    fixture_open(&f);
    check_acknowledged(&f, acknowledged);
    uint64_t hash = 0;
    uint32_t flats = 0;
    uint64_t extents = 0, visible = 0;
    if (loci_snapshot_acquire(f.store, "a", &snapshot, &err) == LOCI_OK) {
        flats = loci_snapshot_view(snapshot)->flat_segments;
        visible = loci_snapshot_view(snapshot)->extent_count;
        extents = loci_snapshot_info(snapshot)->extents;
        loci_snapshot_release(snapshot);
        hash = check_snapshot(&f, "a");
    }
    fixture_close(&f);
    static const key_group groups[] = {
        {LOCI_CF_FLAT, ""}, {LOCI_CF_TERMS, ""}, {LOCI_CF_CATALOG, "g"}, {LOCI_CF_CATALOG, "u"}};
    size_t keys[4];
    count_each(dir, groups, 4, keys);
    assert_int_equal(keys[0], flats);
    /* One index of words for each extent; of an unfinished document it may be still to come. */
    assert_in_range(keys[1], visible, extents);
    assert_true(keys[2] == 0 && keys[3] == 0);
    return hash;
}

static uint64_t final_state(const char *dir) {
    uint64_t hash = check_store(dir, STEPS);
    /* Nothing is left of what was deleted or replaced: wide (2 chunks), v, small, y, z. */
    static const key_group groups[] = {
        {LOCI_CF_CHUNK, ""}, {LOCI_CF_DOCUMENT, ""}, {LOCI_CF_NAME, ""}};
    size_t keys[3];
    count_each(dir, groups, 3, keys);
    assert_int_equal(keys[0], 6);
    assert_int_equal(keys[1], 10);
    assert_int_equal(keys[2], 5);
    return hash;
}

static uint64_t expected_hash;

static void test_undisturbed(void **state) {
    (void)state;
    char dir[64];
    bool killed;
    make_crash_directory("crash", dir);
    assert_int_equal(spawn(dir, 0, NULL, &killed), STEPS);
    assert_false(killed);
    expected_hash = final_state(dir);
    remove_tree(dir);
}

/* False when the point is passed fewer than n times. */
static bool die_once(const char *name, int n) {
    char dir[64], fail_at[80];
    bool killed, again;
    make_crash_directory("crash", dir);
    snprintf(fail_at, sizeof fail_at, "%s:%d", name, n);
    size_t acknowledged = spawn(dir, 0, fail_at, &killed);
    if (killed) {
        check_store(dir, acknowledged);
        assert_int_equal(spawn(dir, acknowledged, NULL, &again), STEPS);
        assert_false(again);
    }
    if (final_state(dir) != expected_hash)
        fail_msg("dying at %s leads to another manifest", fail_at);
    remove_tree(dir);
    return killed;
}

static void test_every_point(void **state) {
    (void)state;
    static const int passages[] = {1, 2, 6};
    for (size_t i = 0; loci_failpoints[i]; i++) {
        int p = 0;
        if (strncmp(loci_failpoints[i], "reindex", 7) == 0) continue; /* test_reindex.c */
        while (p < DEATHS && die_once(loci_failpoints[i], passages[p])) p++;
        if (p == 0) fail_msg("the script never passes %s", loci_failpoints[i]);
    }
}

int main(int argc, char **argv) {
    if (argc == 5 && strcmp(argv[1], "child") == 0)
        return run_child(argv[2], (size_t)strtoul(argv[3], NULL, 10),
                         (int)strtol(argv[4], NULL, 10));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_undisturbed),
        cmocka_unit_test(test_every_point),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
