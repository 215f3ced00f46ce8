/* SPDX-License-Identifier: Apache-2.0
 *
 * Changes of a corpus with a fake encoder: deletion, replacement, rewriting of extents, and
 * snapshots taken while they happen.
 */
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "memory/internal.h"
#include "memory/snapshot.h"

/* apart: the thread has put all in order between two deletions. */
static void delete_without_a_trace(fixture *f, const char *alone, const char *both, bool apart) {
    static const size_t sizes[] = {100, 700}; /* flat alone; a partial extent alone */
    fixture_create(f, alone);
    fixture_create(f, both);
    for (size_t i = 0; i < 2; i++) {
        char id[16];
        snprintf(id, sizeof id, "a%zu", i);
        put_text(f, alone, id, 100 + i, sizes[i]);
        wait_settled(f, alone);
        uint64_t expected = check_snapshot(f, alone);
        put_text(f, both, "b0", 7 + i, 300);
        put_text(f, both, id, 100 + i, sizes[i]);
        put_text(f, both, "b1", 8 + i, 2000);
        wait_settled(f, both);
        assert_true(check_snapshot(f, both) != expected);
        delete_document(f, both, "b0");
        if (apart) wait_settled(f, both);
        delete_document(f, both, "b1");
        check_snapshot(f, both); /* masked, before the rewrite or after */
        wait_settled(f, both);
        assert_int_equal(check_snapshot(f, both), expected);
        assert_int_equal(info_of(f, both).tokens, info_of(f, alone).tokens);
        assert_int_equal(info_of(f, both).bytes, info_of(f, alone).bytes);
        wait_extents(f, both, info_of(f, both).extents);
    }
    delete_document(f, both, "a0");
    delete_document(f, both, "a1");
    wait_settled(f, both);
    assert_int_equal(info_of(f, both).tokens, 0);
    assert_int_equal(info_of(f, both).bytes_on_disk, 0);
    wait_extents(f, both, 0);
    check_snapshot(f, both);
}

static void test_delete_and_rewrite_leave_what_was_never_there(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_start(f);
    delete_without_a_trace(f, "alone", "both", false);
    delete_without_a_trace(f, "alone-apart", "both-apart", true);
}

static void test_replacement_keeps_the_old_until_the_new(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info info;
    loci_buf text = LOCI_BUF_INIT;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "x", 1, 200);
    wait_searchable(f, "a");
    uint64_t old = check_snapshot(f, "a");
    fixture_close(f);
    fixture_open(f); /* nothing is indexed now */
    put_text(f, "a", "x", 2, 300);
    put_text(f, "a", "x", 3, 400);
    assert_ok(loci_document_get(f->store, "a", "x", &info, NULL, &err));
    assert_false(info.searchable);
    assert_int_equal(info.bytes, 400);
    assert_int_equal(info_of(f, "a").documents, 1);
    assert_int_equal(info_of(f, "a").pending_documents, 1);
    assert_int_equal(check_snapshot(f, "a"), old);
    loci_snapshot *pinned;
    assert_ok(loci_snapshot_acquire(f->store, "a", &pinned, &err));
    fixture_start(f);
    wait_searchable(f, "a");
    assert_true(check_snapshot(f, "a") != old);
    assert_int_equal(info_of(f, "a").tokens > 200, 1);
    /* The pinned revision still reads the old text, which nothing else can reach. */
    char *expected = make_text(1, 200);
    assert_ok(loci_snapshot_read(pinned, 0, 0, 200, &text, &err));
    assert_memory_equal(text.data, expected, 200);
    assert_true(loci_snapshot_info(pinned)->revision < info_of(f, "a").revision);
    loci_snapshot_release(pinned);
    free(expected);
    loci_buf_fini(&text);
    uint64_t now = check_snapshot(f, "a");
    fixture_close(f);
    fixture_open(f);
    fixture_start(f);
    wait_settled(f, "a");
    assert_int_equal(check_snapshot(f, "a"), now);
    delete_document(f, "a", "x");
    assert_int_equal(info_of(f, "a").documents, 0);
    assert_int_equal(info_of(f, "a").tokens, 0);
}

static void test_snapshot_outlives_rewrites_and_deletion(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *pinned;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "x", 1, 1500);
    put_text(f, "a", "y", 2, 1500);
    wait_settled(f, "a");
    unsigned files = count_extents(f, "a");
    assert_ok(loci_snapshot_acquire(f->store, "a", &pinned, &err));
    delete_document(f, "a", "x");
    wait_settled(f, "a");
    assert_true(count_extents(f, "a") >= files); /* the old files wait */
    const loci_extent_view *extent = &loci_snapshot_view(pinned)->extents[0];
    uint16_t *k = malloc(EXTENT_TOKENS * 32), *v = malloc(EXTENT_TOKENS * 32);
    for (uint32_t p = 0; p < 4; p++)
        assert_ok(loci_pair_read_positions(
            extent->buffer->data + extent->pair_at[p], extent->buffer->bytes - extent->pair_at[p],
            extent->segment_begin, extent->segments, NULL, k, v, &err));
    free(k);
    free(v);
    loci_segment_info segment;
    assert_ok(loci_snapshot_segment(pinned, 0, &segment, &err));
    assert_string_equal(segment.document, "x");
    loci_snapshot_release(pinned);
    wait_extents(f, "a", info_of(f, "a").extents);
    assert_ok(loci_snapshot_acquire(f->store, "a", &pinned, &err));
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    assert_int_equal(loci_corpus_get(f->store, "a", &(loci_corpus_info){0}, &err), LOCI_E_NOTFOUND);
    assert_ok(loci_snapshot_segment(pinned, 0, &segment, &err));
    assert_string_equal(segment.document, "y");
    loci_snapshot_release(pinned);
}

/* The same content again makes an extent of the same identity, whose file an old snapshot still
 * uses and whose removal was already planned. */
static void test_identity_comes_back(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *pinned;
    char first[512], second[512];
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "x", 1, 800);
    wait_settled(f, "a");
    assert_true(find_extent(f, "a", first));
    assert_ok(loci_snapshot_acquire(f->store, "a", &pinned, &err));
    delete_document(f, "a", "x");
    wait_settled(f, "a");
    assert_int_equal(info_of(f, "a").extents, 0);
    put_text(f, "a", "y", 1, 800);
    wait_settled(f, "a");
    assert_int_equal(info_of(f, "a").extents, 1);
    loci_snapshot_release(pinned);
    assert_true(find_extent(f, "a", second));
    assert_string_equal(first, second);
    fixture_close(f);
    fixture_open(f);
    check_snapshot(f, "a");
    wait_extents(f, "a", 1);
}

static void test_delete_while_pending_and_empty_documents(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "gone", 1, 4000);
    put_text(f, "a", "stays", 2, 100);
    loci_document_info info;
    bool unchanged;
    assert_ok(put_document(f, "a", "blank", loci_slice_text("  \n "), &info, &unchanged, &err));
    delete_document(f, "a", "gone");
    assert_int_equal(info_of(f, "a").pending_documents, 2);
    fixture_start(f);
    wait_searchable(f, "a");
    check_snapshot(f, "a");
    assert_ok(loci_document_get(f->store, "a", "blank", &info, NULL, &err));
    assert_true(info.searchable);
    assert_int_equal(info.segments, 0);
    assert_true(info_of(f, "a").tokens <= 100);
    /* Deleted while its segments are on their way. */
    f->encode_ms = 20;
    put_text(f, "a", "large", 3, 20000);
    loci_ingest_wake(f->ingest);
    loci_sleep_ms(30);
    delete_document(f, "a", "large");
    wait_settled(f, "a");
    check_snapshot(f, "a");
    assert_true(info_of(f, "a").tokens <= 100);
}

/* One thread changes the corpus, others read snapshots: each is whole and stays as it was. */
typedef struct reader_thread {
    fixture *f;
    atomic_bool *stop;
    unsigned rounds;
} reader_thread;

static void *read_snapshots(void *arg) {
    reader_thread *self = arg;
    while (!atomic_load(self->stop)) {
        loci_error err;
        loci_snapshot *snapshot;
        assert_ok(loci_snapshot_acquire(self->f->store, "a", &snapshot, &err));
        uint64_t revision = loci_snapshot_info(snapshot)->revision, live = 0, tokens = 0;
        loci_buf text = LOCI_BUF_INIT;
        for (uint32_t s = 0; s < loci_snapshot_segments(snapshot); s++) {
            if (!loci_snapshot_segment_live(snapshot, s)) continue;
            loci_segment_info info;
            loci_buf_clear(&text);
            assert_ok(loci_snapshot_segment(snapshot, s, &info, &err));
            assert_ok(loci_snapshot_read(snapshot, s, info.start, info.end, &text, &err));
            assert_int_equal(text.len, info.tokens);
            live++;
            tokens += info.tokens;
        }
        loci_buf_fini(&text);
        assert_int_equal(loci_snapshot_view(snapshot)->live_segments, live);
        assert_int_equal(loci_snapshot_info(snapshot)->tokens, tokens);
        assert_int_equal(loci_snapshot_view(snapshot)->revision, revision);
        loci_snapshot_release(snapshot);
        self->rounds++;
    }
    return NULL;
}

/* Live bitmaps go with the snapshots when memory is short, unless somebody reads with them. */
static void test_bitmaps_go_when_memory_is_short(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *snapshot;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "few", 1, 100);
    put_text(f, "a", "many", 2, 1500);
    wait_settled(f, "a");
    delete_document(f, "a", "few");
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    loci_extent *extent = snapshot->extents[0];
    const loci_extent_dead *mask = extent->dead;
    assert_non_null(mask);
    loci_snapshots_let_go(f->store);
    assert_ptr_equal(extent->dead, mask);
    loci_snapshot_release(snapshot);
    assert_ptr_equal(extent->dead, mask); /* for the next question */
    loci_snapshots_let_go(f->store);
    assert_null(extent->dead);
    check_snapshot(f, "a");
}

static void test_readers_during_changes(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    atomic_bool stop = false;
    pthread_t threads[2];
    reader_thread readers[2] = {{f, &stop, 0}, {f, &stop, 0}};
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, read_snapshots, &readers[i]), 0);
    for (uint64_t round = 0; round < 12; round++) {
        put_text(f, "a", "x", round, 900 + round * 10);
        put_text(f, "a", "y", round + 50, 30);
        loci_ingest_wake(f->ingest);
        loci_sleep_ms(round % 4 * 5);
        put_text(f, "a", "z", round + 100, 400);
        wait_searchable(f, "a");
        if (round % 3 == 2) delete_document(f, "a", "x");
        if (round % 4 == 3) wait_settled(f, "a");
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        assert_true(readers[i].rounds > 0);
    }
    wait_settled(f, "a");
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
}

static void delete_flat_document(fixture *f) {
    delete_document(f, "a", "flat");
}

/* The segments of a document go while a snapshot of the revision before is being made. */
static void test_deletion_while_a_snapshot_is_made(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *snapshot;
    loci_buf text = LOCI_BUF_INIT;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "long", 1, 1000);
    wait_settled(f, "a");
    put_text(f, "a", "flat", 2, 100);
    wait_searchable(f, "a");
    fixture_close(f);
    fixture_open(f);
    f->on_wrap = delete_flat_document;
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    assert_null(f->on_wrap);
    uint32_t segments = loci_snapshot_segments(snapshot);
    uint32_t flats = loci_snapshot_view(snapshot)->flat_segments;
    assert_true(flats > 0);
    assert_ok(loci_snapshot_read(snapshot, segments - 1, 0, 100, &text, &err));
    char *expected = make_text(2, 100);
    assert_memory_equal(text.data, expected, 100);
    free(expected);
    loci_buf_fini(&text);
    uint64_t revision = loci_snapshot_info(snapshot)->revision;
    loci_snapshot_release(snapshot);
    assert_ok(loci_snapshot_acquire(f->store, "a", &snapshot, &err));
    assert_true(loci_snapshot_info(snapshot)->revision > revision);
    assert_int_equal(loci_snapshot_view(snapshot)->flat_segments, 0);
    loci_snapshot_release(snapshot);
}

static void *hold_and_drop(void *manifest) {
    for (int i = 0; i < 2000; i++) loci_manifest_unref(loci_manifest_ref(manifest));
    return NULL;
}

/* As when a document is deleted while the indexing thread holds the manifest: nothing but the
 * references may be written meanwhile, and ThreadSanitizer must agree. */
static void test_clones_beside_references(void **state) {
    (void)state;
    pthread_t thread;
    loci_manifest *manifest = loci_manifest_create(FINGERPRINT);
    assert_non_null(manifest);
    manifest->revision = 7;
    manifest->live_tokens = 9;
    assert_int_equal(pthread_create(&thread, NULL, hold_and_drop, manifest), 0);
    for (int i = 0; i < 2000; i++) {
        loci_manifest *clone = loci_manifest_clone(manifest);
        assert_non_null(clone);
        assert_string_equal(clone->fingerprint, FINGERPRINT);
        assert_int_equal(clone->revision, 7);
        assert_int_equal(clone->live_tokens, 9);
        assert_int_equal(clone->refs, 1);
        loci_manifest_unref(clone);
    }
    pthread_join(thread, NULL);
    loci_manifest_unref(manifest);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_delete_and_rewrite_leave_what_was_never_there),
        TEST(test_replacement_keeps_the_old_until_the_new),
        TEST(test_snapshot_outlives_rewrites_and_deletion),
        TEST(test_identity_comes_back),
        TEST(test_delete_while_pending_and_empty_documents),
        TEST(test_bitmaps_go_when_memory_is_short),
        TEST(test_readers_during_changes),
        TEST(test_deletion_while_a_snapshot_is_made),
        cmocka_unit_test(test_clones_beside_references),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
