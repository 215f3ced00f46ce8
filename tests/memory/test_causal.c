/* SPDX-License-Identifier: Apache-2.0
 *
 * Causal corpora in the store: every token is encoded behind all before it and none else, in one
 * row of positions over documents, extents, batches and sudden deaths; what came first stays.
 *
 * The encoder here makes K and V of a token from its position alone.
 */
#include "support.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "memory/snapshot.h"

#define DIM 16u
#define PAIRS 4u

static const size_t sizes[] = {2500, 90, 3300, 40, 700};
enum { DOCUMENTS = sizeof sizes / sizeof *sizes };

static uint16_t value_at(uint32_t position, uint32_t pair, uint32_t channel, uint32_t v) {
    return fake_value(7, position, pair, channel, v);
}

static loci_status encode_after(void *ctx, const loci_snapshot *past, const uint32_t *tokens,
                                uint32_t count, uint16_t *const *k, uint16_t *const *v,
                                const loci_cancel *cancel, loci_error *err) {
    uint32_t position = loci_snapshot_end(past);
    fixture *f = ctx;
    (void)cancel;
    (void)err;
    if (f->encode_ms) loci_sleep_ms(f->encode_ms);
    for (uint32_t t = 0; t < count; t++) {
        assert_int_not_equal(tokens[t], 256); /* the prefix stands before the text, once */
        for (uint32_t p = 0; p < PAIRS; p++)
            for (uint32_t c = 0; c < DIM; c++) {
                k[p][t * DIM + c] = value_at(position + t, p, c, 0);
                v[p][t * DIM + c] = value_at(position + t, p, c, 1);
            }
    }
    return LOCI_OK;
}

static uint32_t extent_tokens; /* 0 = the fixture's, unmerged */

/* The corpus "a", made if it is not there; the thread runs. */
static void start(fixture *f, const char *dir, uint64_t tokens_max) {
    loci_error err;
    loci_corpus_info info;
    loci_geometry geometry = test_geometry();
    float sink[PAIRS * DIM] = {0};
    fixture_init(f, dir);
    if (extent_tokens) {
        f->options.extent_tokens = extent_tokens;
        f->options.merge_tokens = 8 * extent_tokens;
    }
    f->encoder.encode = NULL;
    f->encoder.encode_after = encode_after;
    fixture_open(f);
    geometry.causal = true;
    geometry.tokens_max = tokens_max;
    loci_status status =
        loci_corpus_create(f->store, "a", &geometry, NULL, sink, sink, &info, &err);
    if (status != LOCI_E_EXISTS) assert_ok(status);
    assert_true(info.geometry.causal);
    assert_int_equal(info.geometry.tokens_max, tokens_max);
    fixture_start(f);
}

static void expect_row(const uint16_t *row, uint32_t position, uint32_t pair, uint32_t v) {
    for (uint32_t c = 0; c < DIM; c++)
        if (row[c] != value_at(position, pair, c, v))
            fail_msg("the token at position %u has not its K and V", position);
}

/* Live tokens of one extent have the positions from `position` on; returns how many there are. */
static uint32_t check_extent(const loci_extent *extent, const uint8_t *dead, uint32_t position) {
    loci_error err;
    uint32_t live = 0;
    uint16_t *k = malloc((size_t)extent->tokens * DIM * sizeof *k);
    uint16_t *v = malloc((size_t)extent->tokens * DIM * sizeof *v);
    assert_true(k && v);
    for (uint32_t p = 0; p < PAIRS; p++) {
        assert_ok(loci_extent_read_pair(extent, p, NULL, k, v, &err));
        live = 0;
        for (uint32_t s = 0; s < extent->segments; s++) {
            uint32_t end = extent->segment_begin[s + 1];
            if (dead && dead[s]) continue;
            for (uint32_t t = extent->segment_begin[s]; t < end; t++, live++) {
                expect_row(k + (size_t)t * DIM, position + live, p, 0);
                expect_row(v + (size_t)t * DIM, position + live, p, 1);
            }
        }
    }
    free(k);
    free(v);
    return live;
}

/* Every token has the position that it should have; returns how many there are. */
static uint32_t check_positions(fixture *f) {
    loci_error err;
    loci_snapshot *snapshot;
    uint32_t position = 1;
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    for (uint32_t e = 0; e < snapshot->view.extent_count; e++)
        position +=
            check_extent(snapshot->extents[e], snapshot->extent_views[e].segment_dead, position);
    uint32_t flat = snapshot->view.flat_tokens;
    for (uint32_t t = 0; t < flat; t++)
        for (uint32_t p = 0; p < PAIRS; p++)
            for (uint32_t v = 0; v < 2; v++)
                expect_row(snapshot->flat_data + ((2 * (size_t)(p / 2) + v) * flat + t) * 2 * DIM +
                               (size_t)(p % 2) * DIM,
                           position + t, p, v);
    position += flat;
    assert_int_equal(loci_snapshot_end(snapshot), position);
    loci_snapshot_release(snapshot);
    return position - 1;
}

static void register_all(fixture *f) {
    for (size_t i = 0; i < DOCUMENTS; i++) {
        char id[16];
        snprintf(id, sizeof id, "d%zu", i);
        put_text(f, "a", id, i + 1, sizes[i]);
        if (i % 2) wait_settled(f, "a");
    }
    wait_settled(f, "a");
}

static void make_directory(char dir[64]) {
    snprintf(dir, 64, "/tmp/loci-causal-XXXXXX");
    assert_non_null(mkdtemp(dir));
}

static uint32_t all_tokens;

static void test_positions_run_through(void **state) {
    (void)state;
    char dir[64];
    fixture f;
    loci_corpus_info info;
    loci_error err;
    make_directory(dir);
    start(&f, dir, 0);
    register_all(&f);
    all_tokens = check_positions(&f);
    assert_in_range(all_tokens, 6000, 6630);
    assert_ok(loci_corpus_get(f.store, "a", &info, &err));
    assert_true(info.extents > 2); /* full ones and the tail */
    fixture_close(&f);
    start(&f, dir, 0);
    assert_int_equal(check_positions(&f), all_tokens);
    fixture_close(&f);
    remove_tree(dir);
}

/* Merged extents keep the order of positions; what is registered later stands behind them. */
static void test_positions_run_through_merged_extents(void **state) {
    (void)state;
    char dir[64];
    fixture f;
    loci_corpus_info info;
    loci_error err;
    make_directory(dir);
    extent_tokens = 512;
    start(&f, dir, 0);
    register_all(&f);
    wait_merged(&f, "a");
    assert_int_equal(check_positions(&f), all_tokens);
    assert_ok(loci_corpus_get(f.store, "a", &info, &err));
    assert_in_range(info.extents, 1, all_tokens / 512 / 2);
    put_text(&f, "a", "late", 9, 1500);
    wait_settled(&f, "a");
    wait_merged(&f, "a");
    assert_true(check_positions(&f) > all_tokens + 1000);
    fixture_close(&f);
    extent_tokens = 0;
    remove_tree(dir);
}

/* A child registers and dies at the n-th pass of a point; true if it did. */
static bool die_at(const char *dir, const char *point, int n) {
    char fail_at[64];
    int result;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        snprintf(fail_at, sizeof fail_at, "%s:%d", point, n);
        setenv("LOCI_FAIL_AT", fail_at, 1);
        execl("/proc/self/exe", "test_causal", "child", dir, (char *)NULL);
        _exit(4);
    }
    assert_int_equal(waitpid(pid, &result, 0), pid);
    return WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL;
}

static void test_death_leaves_no_gap(void **state) {
    (void)state;
    static const char *const points[] = {"encode", "flat_commit", "manifest_commit"};
    unsigned deaths = 0;
    for (size_t p = 0; p < 3; p++) {
        for (int n = 1; n <= 7; n += 2) {
            char dir[64];
            fixture f;
            make_directory(dir);
            if (die_at(dir, points[p], n)) deaths++;
            start(&f, dir, 0);
            check_positions(&f); /* whatever is complete by now */
            register_all(&f);
            assert_int_equal(check_positions(&f), all_tokens);
            fixture_close(&f);
            remove_tree(dir);
        }
    }
    assert_true(deaths >= 10);
}

/* What was encoded of it is no more; the next document takes its place. */
static void test_a_document_is_deleted_on_the_way(void **state) {
    (void)state;
    for (size_t after = 1000; after <= 3000; after += 1000) {
        char dir[64];
        fixture f;
        loci_error err;
        loci_ingest_progress progress = {0};
        uint64_t revision;
        make_directory(dir);
        start(&f, dir, 0);
        put_text(&f, "a", "first", 1, 300);
        wait_settled(&f, "a");
        uint32_t first = check_positions(&f);
        f.encode_ms = 50;
        put_text(&f, "a", "long", 2, 4500);
        put_text(&f, "a", "next", 3, 200);
        loci_ingest_wake(f.ingest);
        for (int i = 0; i < 2000 && progress.tokens_encoded < first + after; i++) {
            loci_sleep_ms(5);
            assert_ok(loci_ingest_progress_of(f.ingest, "a", &progress, &err));
        }
        assert_ok(loci_document_delete(f.store, "a", "long", &revision, &err));
        wait_settled(&f, "a");
        assert_int_equal(check_positions(&f), first + 200);
        fixture_close(&f);
        remove_tree(dir);
    }
}

static void test_bounds_and_changes_are_refused(void **state) {
    (void)state;
    char dir[64];
    fixture f;
    loci_error err;
    loci_document_info info;
    loci_ingest_progress progress = {0};
    uint64_t revision;
    bool unchanged;
    make_directory(dir);
    start(&f, dir, 3000);
    put_text(&f, "a", "d0", 1, sizes[0]);
    wait_settled(&f, "a");
    uint32_t first = check_positions(&f);
    put_text(&f, "a", "small", 9, 100); /* both before the thread looks, or not */
    put_text(&f, "a", "large", 10, 1000);
    for (int i = 0; i < 1000 && progress.failure.status == LOCI_OK; i++) {
        loci_sleep_ms(10);
        assert_ok(loci_ingest_progress_of(f.ingest, "a", &progress, &err));
    }
    assert_int_equal(progress.failure.status, LOCI_E_LIMIT);
    assert_string_equal(progress.failure.reason, "TRAINED_LENGTH");
    assert_non_null(strstr(progress.failure.text, "\"large\""));
    assert_int_equal(check_positions(&f), first + 100); /* what came before does not wait */
    assert_int_equal(loci_document_delete(f.store, "a", "d0", &revision, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "APPEND_ONLY");
    char *text = make_text(77, 50);
    assert_int_equal(put_document(&f, "a", "d0", loci_slice_of(text, 50), &info, &unchanged, &err),
                     LOCI_E_PRECONDITION);
    free(text);
    assert_string_equal(err.reason, "APPEND_ONLY");
    put_text(&f, "a", "d0", 1, sizes[0]); /* the same again is no change */
    assert_ok(loci_document_delete(f.store, "a", "large", &revision, &err)); /* not begun */
    put_text(&f, "a", "last", 11, 60);
    wait_settled(&f, "a");
    assert_int_equal(check_positions(&f), first + 160);
    fixture_close(&f);
    remove_tree(dir);
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "child") == 0) {
        fixture f;
        start(&f, argv[2], 0);
        register_all(&f);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_positions_run_through),
        cmocka_unit_test(test_positions_run_through_merged_extents),
        cmocka_unit_test(test_death_leaves_no_gap),
        cmocka_unit_test(test_a_document_is_deleted_on_the_way),
        cmocka_unit_test(test_bounds_and_changes_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
