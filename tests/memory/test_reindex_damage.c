/* SPDX-License-Identifier: Apache-2.0
 *
 * Reindexing where something cannot be read: a damaged document is named, no damage of one index
 * takes the other, an index of the layout before is made anew.
 */
#include "reindex_support.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

/* Puts the one chunk of some document in the place of the other's, as a sound value. */
static void swap_chunk(fixture *f) {
    loci_error err;
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key none = {.len = 0}, keys[2];
    loci_scan *scan = loci_scan_open(rocks, NULL, LOCI_CF_CHUNK, &none, NULL);
    loci_slice key;
    for (int i = 0; i < 2; i++) {
        assert_true(loci_scan_next(scan, &key));
        memcpy(keys[i].data, key.data, key.len);
        keys[i].len = key.len;
    }
    assert_ok(loci_scan_close(scan, &err));
    loci_buf payload = LOCI_BUF_INIT;
    assert_ok(
        loci_rocks_get(rocks, NULL, LOCI_CF_CHUNK, &keys[0], LOCI_KIND_CHUNK, &payload, &err));
    loci_batch *batch = loci_batch_create(rocks);
    loci_batch_put(batch, LOCI_CF_CHUNK, &keys[1], LOCI_KIND_CHUNK,
                   loci_slice_of(payload.data, payload.len));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_buf_fini(&payload);
    loci_rocks_close(rocks);
}

static void test_damaged_document_is_named(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    put_text(f, "a", "good", 1, 500);
    put_text(f, "a", "bad", 2, 500);
    wait_settled(f, "a");
    fixture_close(f);
    swap_chunk(f);
    fixture_open(f);
    run_model(f, OTHER_FINGERPRINT);
    assert_int_equal(reindex(f, "a", OTHER_FINGERPRINT, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "\"bad\" of corpus a"));
    assert_false(info_of(f, "a").reindexing); /* nothing has changed */
    delete_document(f, "a", "bad");
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    wait_reindexed(f, "a");
    check_snapshot(f, "a");
    assert_int_equal(info_of(f, "a").documents, 1);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 1);
}

/* A corpus of uid 1 that is being reindexed: all documents are copied, none is encoded. */
static void leave_reindexing(fixture *f) {
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    fill(f, "a", false);
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    fixture_close(f);
}

/* The record of the old index cannot be read: the new one is the corpus, with all documents. */
static void test_damaged_record_loses_no_successor(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info, page[2];
    size_t count;
    char hash[33], expected[33], extents[128];
    leave_reindexing(f);
    snprintf(extents, sizeof extents, "%s/extents/0000000000000001", f->dir);
    damage_catalog(f->dir, 'c', 1, LOCI_KIND_CORPUS);
    for (int again = 0; again < 2; again++) { /* before it is indexed, and after that */
        fixture_open(f);
        info = info_of(f, "a");
        assert_string_equal(info.geometry.fingerprint, OTHER_FINGERPRINT);
        assert_int_equal(info.documents, 4);
        assert_int_equal(info.pending_documents, again ? 0 : 4);
        assert_false(info.reindexing);
        assert_int_equal(access(extents, F_OK), 0); /* what cannot be read is left alone */
        run_model(f, OTHER_FINGERPRINT);
        wait_settled(f, "a");
        check_snapshot(f, "a");
        create_of(f, again ? "second" : "first", OTHER_FINGERPRINT);
        fill(f, again ? "second" : "first", false);
        hash_of(f, "a", hash);
        hash_of(f, again ? "second" : "first", expected);
        assert_string_equal(hash, expected);
        fixture_close(f);
    }
    /* It is a corpus as any: reindexed, changed, deleted. */
    fixture_open(f);
    run_model(f, FINGERPRINT);
    assert_ok(reindex(f, "a", FINGERPRINT, &err));
    wait_reindexed(f, "a");
    put_text(f, "a", "more", 8, 200);
    wait_searchable(f, "a");
    check_snapshot(f, "a");
    fixture_close(f);
    fixture_open(f);
    assert_int_equal(info_of(f, "a").documents, 5);
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    fixture_close(f);
    fixture_open(f);
    assert_ok(loci_corpus_list(f->store, "", 2, page, &count, &err));
    assert_int_equal(count, 2);
    assert_string_equal(page[0].name, "first");
}

/* Contents of the old index, then also of the new one, cannot be read. */
static void test_damaged_contents_lose_no_successor(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    leave_reindexing(f);
    damage_catalog(f->dir, 'm', 1, LOCI_KIND_MANIFEST);
    damage_catalog(f->dir, 'm', 2, LOCI_KIND_MANIFEST);
    fixture_open(f);
    assert_int_equal(loci_corpus_get(f->store, "a", &info, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "corpus a is damaged"));
    loci_corpus_info page[2];
    size_t count;
    loci_store_figures figures;
    assert_ok(loci_corpus_list(f->store, "", 2, page, &count, &err));
    assert_int_equal(count, 1);
    assert_false(page[0].reindexing);
    loci_store_figures_of(f->store, &figures);
    run_model(f, OTHER_FINGERPRINT);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 8); /* the documents are there twice */
    fixture_open(f);
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 0);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "c"), 0);
}

/* The old index is sound: a new one that is damaged goes. Only the old one is damaged: the new one
 * takes its place. */
static void test_one_sound_index_suffices(void **state) {
    fixture *f = *state;
    leave_reindexing(f);
    damage_catalog(f->dir, 'm', 2, LOCI_KIND_MANIFEST);
    fixture_open(f);
    run_model(f, FINGERPRINT);
    assert_false(info_of(f, "a").reindexing);
    check_snapshot(f, "a");
    loci_error err;
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    assert_ok(reindex(f, "a", OTHER_FINGERPRINT, &err));
    fixture_close(f);
    damage_catalog(f->dir, 'm', 1, LOCI_KIND_MANIFEST);
    fixture_open(f);
    loci_corpus_info info;
    assert_int_equal(loci_corpus_get(f->store, "a", &info, &err), LOCI_E_CORRUPT);
    run_model(f, OTHER_FINGERPRINT);
    uint64_t end = loci_now_ns() + FAR_NS;
    while (loci_corpus_get(f->store, "a", &info, &err) != LOCI_OK) {
        assert_true(loci_now_ns() < end);
        loci_sleep_ms(5);
    }
    assert_int_equal(info.documents, 4);
    check_snapshot(f, "a");
}

static void write_at(const char *path, long at, const char *text, size_t len) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, at, SEEK_SET), 0);
    assert_int_equal(fwrite(text, 1, len, file), len);
    assert_int_equal(fclose(file), 0);
}

static void test_layout_before_is_reindexed(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *snapshot;
    char extent[512], layout[128], hash[33], again[33];
    bool outdated = true;
    fixture_open(f);
    fixture_create(f, "a");
    run_model(f, FINGERPRINT);
    put_text(f, "a", "x", 1, 700);
    wait_settled(f, "a");
    hash_of(f, "a", hash);
    assert_true(find_extent(f, "a", extent));
    assert_ok(loci_corpus_outdated(f->store, "a", FINGERPRINT, &outdated, &err));
    assert_false(outdated);
    fixture_close(f);
    write_at(extent, 8, "\x02", 1);
    snprintf(layout, sizeof layout, "%s/LAYOUT", f->dir);
    write_at(layout, 0, "loci store layout 2\n", 20);
    fixture_open(f);
    assert_int_equal(loci_snapshot_acquire(f->store, "a", &snapshot, &err), LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "LAYOUT_TOO_OLD");
    assert_non_null(strstr(err.text, "loci corpus reindex a"));
    assert_ok(loci_corpus_outdated(f->store, "a", FINGERPRINT, &outdated, &err));
    assert_true(outdated);
    assert_ok(reindex(f, "a", FINGERPRINT, &err));
    run_model(f, FINGERPRINT);
    wait_reindexed(f, "a");
    check_snapshot(f, "a");
    hash_of(f, "a", again);
    assert_string_equal(hash, again);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, reindex_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_damaged_document_is_named),          TEST(test_damaged_record_loses_no_successor),
        TEST(test_damaged_contents_lose_no_successor), TEST(test_one_sound_index_suffices),
        TEST(test_layout_before_is_reindexed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
