/* SPDX-License-Identifier: Apache-2.0
 *
 * Merging of extents: what becomes of documents on the way, and that nobody waits for it. Which are
 * to be merged: test_due.c.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/clock.h"
#include "memory/internal.h"
#include "memory/snapshot.h"

#define SEALED 512u
#define MERGED 4096u

static int merge_setup(void **state) {
    fixture_setup(state);
    fixture *f = *state;
    f->options.extent_tokens = SEALED;
    f->options.merge_tokens = MERGED;
    return 0;
}

static int merge_setup_int8(void **state) {
    merge_setup(state);
    fixture *f = *state;
    f->kv_int8 = true;
    return 0;
}

static int merge_setup_overlap(void **state) {
    merge_setup_int8(state);
    fixture *f = *state;
    f->backend.ops = &fake_clustering_ops;
    return 0;
}

/* A corpus of n sealed extents and more that is not merged yet; nothing runs afterwards, and what
 * is started next merges at once. */
static void fill(fixture *f, const char *corpus, uint64_t documents) {
    f->options.merge_tokens = 0; /* merges of the largest size do not wait for a calm */
    fixture_open(f);
    fixture_create(f, corpus);
    fixture_start(f);
    for (uint64_t i = 0; i < documents; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, corpus, id, i, 70 + i * 3);
    }
    wait_settled(f, corpus);
    assert_true(info_of(f, corpus).extents >= 6);
    check_snapshot(f, corpus);
    fixture_close(f);
    f->options.merge_tokens = MERGED;
}

static void hash_of(fixture *f, const char *corpus, char hash[33]) {
    loci_error err;
    assert_ok(loci_corpus_manifest_hash(f->store, corpus, hash, &err));
}

/* K, V, words, documents: the same before and after; and after a restart. */
static void test_extents_become_few(void **state) {
    fixture *f = *state;
    char merged[33], again[33];
    fill(f, "a", 30);
    fixture_open(f);
    loci_corpus_info before = info_of(f, "a"), after;
    fixture_start(f);
    wait_merged(f, "a");
    check_snapshot(f, "a");
    after = info_of(f, "a");
    assert_int_equal(after.tokens, before.tokens);
    assert_int_equal(after.segments, before.segments);
    assert_int_equal(after.documents, before.documents);
    assert_in_range(after.extents, 1, 3);
    assert_true(after.revision > before.revision);
    wait_extents(f, "a", after.extents);
    hash_of(f, "a", merged);
    fixture_close(f);
    fixture_open(f);
    check_snapshot(f, "a");
    hash_of(f, "a", again);
    assert_string_equal(merged, again);
}

/* The manifest at rest depends on the documents alone. */
static void test_interruptions_do_not_matter(void **state) {
    fixture *f = *state;
    char straight[33], torn[33];
    fill(f, "straight", 40);
    f->options.merge_calm_ms = 1;
    fixture_open(f);
    fixture_create(f, "torn");
    fixture_start(f);
    for (uint64_t i = 0; i < 40; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, "torn", id, i, 70 + i * 3);
        loci_ingest_wake(f->ingest);
        if (i % 5 == 2) wait_settled(f, "torn");
        if (i % 7 == 4) wait_merged(f, "torn");
        if (i % 9 != 8) continue;
        loci_sleep_ms((unsigned)i);
        fixture_close(f);
        fixture_open(f);
        fixture_start(f);
    }
    wait_settled(f, "torn");
    wait_merged(f, "torn");
    wait_merged(f, "straight");
    check_snapshot(f, "torn");
    hash_of(f, "straight", straight);
    hash_of(f, "torn", torn);
    assert_string_equal(straight, torn);
    wait_extents(f, "torn", info_of(f, "torn").extents);
}

/* Documents that die before, and after. */
static void test_the_dead_are_left_out(void **state) {
    fixture *f = *state;
    fill(f, "a", 30);
    fixture_open(f);
    delete_document(f, "a", "d3");
    fixture_start(f);
    wait_merged(f, "a");
    check_snapshot(f, "a");
    loci_corpus_info info = info_of(f, "a");
    assert_int_equal(info.documents, 29);
    /* Few dead tokens stay; when they are a quarter, the merged extent is written anew. */
    delete_document(f, "a", "d4");
    wait_merged(f, "a");
    check_snapshot(f, "a");
    for (int i = 5; i < 20; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%d", i);
        delete_document(f, "a", id);
    }
    wait_settled(f, "a");
    wait_merged(f, "a");
    uint64_t tokens = info_of(f, "a").tokens;
    check_snapshot(f, "a");
    assert_true(info_of(f, "a").bytes_on_disk < info.bytes_on_disk);
    put_text(f, "a", "d2", 99, 500); /* replaced */
    wait_settled(f, "a");
    wait_merged(f, "a");
    check_snapshot(f, "a");
    assert_true(info_of(f, "a").tokens > tokens);
    for (int i = 0; i < 30; i++) {
        loci_error err;
        char id[8];
        uint64_t revision;
        snprintf(id, sizeof id, "d%d", i);
        loci_status status = loci_document_delete(f->store, "a", id, &revision, &err);
        assert_true(status == LOCI_OK || status == LOCI_E_NOTFOUND);
    }
    wait_settled(f, "a");
    wait_merged(f, "a");
    assert_int_equal(info_of(f, "a").tokens, 0);
    wait_extents(f, "a", 0);
}

static void delete_one(fixture *f) {
    delete_document(f, "a", "d3");
}

/* Its segments are in the new extent, and dead there. */
static void test_a_document_dies_meanwhile(void **state) {
    fixture *f = *state;
    fill(f, "a", 30);
    fixture_open(f);
    f->on_wrap = delete_one; /* when the merger opens what it merges */
    fixture_start(f);
    wait_merged(f, "a");
    assert_null(f->on_wrap);
    assert_int_equal(info_of(f, "a").documents, 29);
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
}

static void delete_and_rewrite(fixture *f) {
    loci_corpus_info before = info_of(f, "a");
    for (int i = 0; i < 6; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%d", i);
        delete_document(f, "a", id);
    }
    wait_settled(f, "a");
    assert_true(info_of(f, "a").bytes_on_disk < before.bytes_on_disk);
}

/* When the new extent is written and about to be named. */
static void delete_and_rewrite_late(fixture *f) {
    if (count_extents(f, "a") > info_of(f, "a").extents)
        delete_and_rewrite(f);
    else
        f->on_wrap = delete_and_rewrite_late;
}

/* A corpus that is merged from the start; `when` runs as the first merge opens its extents. */
static void start_with(fixture *f, void (*when)(fixture *)) {
    fill(f, "a", 30);
    fixture_open(f);
    pthread_mutex_lock(&f->store->lock); /* until f->ingest is set */
    f->on_wrap = when;
    fixture_start(f);
    pthread_mutex_unlock(&f->store->lock);
}

/* Extents are written anew by the other thread while they are merged: that merge comes to nothing,
 * its file goes, and another one is made. */
static void give_up(fixture *f, void (*when)(fixture *)) {
    loci_error err;
    loci_ingest_progress progress;
    start_with(f, when);
    wait_merged(f, "a");
    assert_null(f->on_wrap);
    assert_int_equal(info_of(f, "a").documents, 24);
    assert_in_range(info_of(f, "a").extents, 1, 4);
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    assert_int_equal(progress.merge_failure.status, LOCI_OK); /* that was none */
}

static void rewrite_the_second(fixture *f) {
    delete_document(f, "a", "d7");
    delete_document(f, "a", "d8");
    wait_settled(f, "a");
}

/* An extent that goes before the merge has opened it was not damaged. */
static void test_what_is_gone_is_not_damaged(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus *corpus;
    start_with(f, rewrite_the_second);
    uint64_t end = loci_now_ns() + 10000000000ull;
    while (!info_of(f, "a").merged && loci_now_ns() < end) loci_sleep_ms(5);
    assert_ok(loci_corpus_acquire(f->store, "a", &corpus, &err));
    assert_int_equal(corpus->apart.count, 0);
    loci_corpus_release(corpus);
    assert_true(info_of(f, "a").merged);
    check_snapshot(f, "a");
}

static void test_a_merge_gives_up(void **state) {
    give_up(*state, delete_and_rewrite);
}

static void test_a_merge_gives_up_in_the_end(void **state) {
    give_up(*state, delete_and_rewrite_late);
}

/* An extent that was written anew without its dead documents, and has the same text again since, is
 * the same file; but what died in it when the merge began lives in it now. */
static void test_the_dead_come_back_meanwhile(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus *corpus;
    const loci_rebuild_plan both = {.first = 0, .last = 2, .merge = true};
    f->options.merge_tokens = 0;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "p", 1, 700);
    put_text(f, "a", "x", 2, 250);
    put_text(f, "a", "z", 3, 200);
    wait_settled(f, "a");
    fixture_close(f);
    fixture_open(f);
    loci_corpus_info before = info_of(f, "a");
    delete_document(f, "a", "x");
    delete_document(f, "a", "z");
    assert_ok(loci_corpus_acquire(f->store, "a", &corpus, &err));
    loci_manifest *base = loci_corpus_manifest(corpus);
    fixture_start(f);
    wait_settled(f, "a");
    put_text(f, "a", "y", 2, 250);
    put_text(f, "a", "z", 3, 200);
    wait_settled(f, "a");
    assert_int_equal(info_of(f, "a").tokens, before.tokens);
    loci_manifest *now = loci_corpus_manifest(corpus);
    assert_memory_equal(now->extents[1].id, base->extents[1].id, sizeof now->extents[1].id);
    assert_int_equal(loci_rebuild(corpus, base, &both, NULL, false, NULL, NULL, &err),
                     LOCI_E_ABORTED);
    assert_int_equal(info_of(f, "a").tokens, before.tokens);
    assert_ok(loci_rebuild(corpus, now, &both, NULL, false, NULL, NULL, &err));
    assert_int_equal(info_of(f, "a").tokens, before.tokens);
    check_snapshot(f, "a");
    loci_manifest_unref(now);
    loci_manifest_unref(base);
    loci_corpus_release(corpus);
}

static atomic_bool held, go_on;

static void hold(fixture *f) {
    (void)f;
    held = true;
    while (!go_on) loci_sleep_ms(1);
}

/* While a merge stands still. */
static void test_nobody_waits(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    held = go_on = false;
    fill(f, "a", 30);
    fixture_open(f);
    f->on_wrap = hold;
    fixture_start(f);
    while (!held) loci_sleep_ms(1);
    uint64_t extents = info_of(f, "a").extents;
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    assert_string_equal(progress.stage, "merging");
    for (uint64_t i = 0; i < 3; i++) {
        char id[8];
        snprintf(id, sizeof id, "n%llu", (unsigned long long)i);
        put_text(f, "a", id, 1000 + i, 60);
        uint64_t begin = loci_now_ns();
        wait_searchable(f, "a");
        assert_true(loci_now_ns() - begin < 1000000000ull);
        check_snapshot(f, "a");
    }
    put_text(f, "a", "more", 7, 2000); /* seals extents */
    delete_document(f, "a", "d0");
    wait_settled(f, "a");
    check_snapshot(f, "a");
    assert_true(info_of(f, "a").extents > extents);
    assert_false(info_of(f, "a").merged);
    go_on = true;
    wait_merged(f, "a");
    assert_true(info_of(f, "a").extents < extents);
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
}

/* Neither the end of the corpus nor that of the process leaves anything. */
static void test_the_corpus_ends_meanwhile(void **state) {
    fixture *f = *state;
    loci_error err;
    char path[512];
    held = go_on = false;
    fill(f, "a", 30);
    fixture_open(f);
    f->on_wrap = hold;
    fixture_start(f);
    while (!held) loci_sleep_ms(1);
    assert_true(find_extent(f, "a", path));
    *strrchr(path, '/') = 0;
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    go_on = true;
    for (int i = 0; i < 500 && access(path, F_OK) == 0; i++) loci_sleep_ms(10);
    assert_int_equal(access(path, F_OK), -1);
}

static void test_the_process_ends_meanwhile(void **state) {
    fixture *f = *state;
    fill(f, "a", 30);
    for (unsigned ms = 0; ms < 40; ms += 4) {
        f->options.merge_calm_ms = 1;
        fixture_open(f);
        check_snapshot(f, "a");
        fixture_start(f);
        loci_sleep_ms(ms);
        fixture_close(f);
    }
    fixture_open(f);
    fixture_start(f);
    wait_merged(f, "a");
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
}

static void test_snapshots_read_the_old_files(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *pinned;
    fill(f, "a", 30);
    fixture_open(f);
    assert_ok(loci_snapshot_acquire(f->store, "a", &pinned, &err));
    const loci_corpus_view *view = loci_snapshot_view(pinned);
    fixture_start(f);
    wait_merged(f, "a");
    assert_true(view->extent_count > info_of(f, "a").extents);
    assert_true(count_extents(f, "a") > info_of(f, "a").extents);
    loci_buf text = LOCI_BUF_INIT;
    uint16_t *k = malloc(SEALED * 32), *v = malloc(SEALED * 32);
    for (uint32_t e = 0; e < view->extent_count; e++)
        assert_ok(loci_pair_read_positions(
            view->extents[e].buffer->data + view->extents[e].pair_at[1],
            view->extents[e].buffer->bytes - view->extents[e].pair_at[1],
            view->extents[e].segment_begin, view->extents[e].segments, NULL, k, v, &err));
    for (uint32_t s = 0; s < loci_snapshot_segments(pinned); s++) {
        loci_segment_info info;
        assert_ok(loci_snapshot_segment(pinned, s, &info, &err));
        assert_ok(loci_snapshot_read(pinned, s, info.start, info.end, &text, &err));
    }
    free(k);
    free(v);
    loci_buf_fini(&text);
    loci_snapshot_release(pinned);
    wait_extents(f, "a", info_of(f, "a").extents);
}

/* Where K and V of the first extent's first pair stand in its file. */
static long kv_place(fixture *f, const char *corpus, char path[512]) {
    loci_error err;
    loci_snapshot *snapshot;
    assert_ok(loci_snapshot_acquire(f->store, corpus, &snapshot, &err));
    const loci_extent_view *extent = &loci_snapshot_view(snapshot)->extents[0];
    const loci_pair_header *header = (const void *)(extent->buffer->data + extent->pair_at[0]);
    long place = (long)(extent->pair_at[0] + header->kv_at);
    snprintf(path, 512, "%s/extents/%016llx/%s", f->dir, (unsigned long long)info_of(f, corpus).uid,
             snapshot->extents[0]->name);
    loci_snapshot_release(snapshot);
    return place;
}

/* Until the others of so many extents of "a" are merged around the damaged one, or `end`. */
static void wait_merged_around(fixture *f, uint64_t extents, uint64_t end) {
    while (info_of(f, "a").extents > extents / 2 + 1 && loci_now_ns() < end) loci_sleep_ms(2);
    assert_in_range(info_of(f, "a").extents, 2, extents / 2 + 1);
}

static void test_damage_is_named_and_replaces_nothing(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress = {0};
    char path[512];
    fill(f, "a", 30);
    fixture_open(f);
    long place = kv_place(f, "a", path);
    uint64_t extents = info_of(f, "a").extents;
    flip_byte(path, place);
    fixture_start(f);
    uint64_t end = loci_now_ns() + 20000000000ull;
    while (progress.merge_failure.status == LOCI_OK && loci_now_ns() < end) {
        loci_sleep_ms(2);
        assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    }
    assert_int_equal(progress.merge_failure.status, LOCI_E_CORRUPT);
    assert_non_null(strstr(progress.merge_failure.text, strrchr(path, '/') + 1));
    assert_int_equal(progress.failure.status, LOCI_OK); /* registration goes on */
    put_text(f, "a", "n", 1, 60);
    wait_searchable(f, "a");
    /* The others are merged around the first, and the failure is told until it is none. */
    wait_merged_around(f, extents, end);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    assert_int_equal(progress.merge_failure.status, LOCI_E_CORRUPT);
    assert_false(info_of(f, "a").merged);
    flip_byte(path, place);
    wait_merged(f, "a");
    check_snapshot(f, "a");
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    assert_int_equal(progress.merge_failure.status, LOCI_OK);
}

/* The same of one that is to be rewritten, which the ingest thread cannot. */
static void test_damage_of_what_is_rewritten(void **state) {
    fixture *f = *state;
    char path[512];
    fill(f, "a", 30);
    fixture_open(f);
    long place = kv_place(f, "a", path);
    uint64_t extents = info_of(f, "a").extents;
    flip_byte(path, place);
    delete_document(f, "a", "d0");
    delete_document(f, "a", "d1");
    f->options.merge_calm_ms = 20;
    fixture_start(f);
    uint64_t end = loci_now_ns() + 10000000000ull;
    wait_merged_around(f, extents, end);
}

static void test_the_index_is_made_anew(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_geometry geometry = test_geometry();
    geometry.kv_int8 = f->kv_int8;
    float sink[2 * 2 * 16] = {0};
    char before[33], after[33];
    fill(f, "a", 30);
    fixture_open(f);
    fixture_start(f);
    wait_merged(f, "a");
    hash_of(f, "a", before);
    assert_ok(loci_corpus_reindex(f->store, "a", &geometry, NULL, sink, sink, NULL, &err));
    loci_ingest_wake(f->ingest);
    while (info_of(f, "a").reindexing) loci_sleep_ms(5);
    wait_settled(f, "a");
    wait_merged(f, "a");
    check_snapshot(f, "a");
    hash_of(f, "a", after);
    assert_string_equal(before, after);
}

static atomic_bool disk_full;

int __real_statvfs(const char *path, struct statvfs *out);
int __wrap_statvfs(const char *path, struct statvfs *out);

int __wrap_statvfs(const char *path, struct statvfs *out) {
    int result = __real_statvfs(path, out);
    if (disk_full) out->f_bavail = 1;
    return result;
}

static void test_a_full_disk_is_left_to_registration(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress = {0};
    fill(f, "a", 30);
    disk_full = true;
    fixture_open(f);
    uint64_t extents = info_of(f, "a").extents;
    fixture_start(f);
    uint64_t end = loci_now_ns() + 20000000000ull;
    while (progress.merge_failure.status == LOCI_OK && loci_now_ns() < end) {
        loci_sleep_ms(2);
        assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    }
    assert_int_equal(progress.merge_failure.status, LOCI_E_LIMIT);
    put_text(f, "a", "n", 1, 60);
    wait_searchable(f, "a");
    assert_int_equal(info_of(f, "a").extents, extents);
    disk_full = false;
    wait_merged(f, "a");
    check_snapshot(f, "a");
}

/* Corpora of another model are left alone. */
static void test_other_models_wait_for_theirs(void **state) {
    fixture *f = *state;
    fill(f, "a", 30);
    f->options.fingerprint = OTHER_FINGERPRINT;
    fixture_open(f);
    uint64_t extents = info_of(f, "a").extents;
    assert_true(info_of(f, "a").merged);
    fixture_start(f);
    loci_sleep_ms(200);
    assert_int_equal(info_of(f, "a").extents, extents);
    f->options.fingerprint = NULL;
}

/* --- All at once ---------------------------------------------------------------------------- */

static void *read_on(void *arg) {
    fixture *f = arg;
    while (!go_on) check_snapshot(f, "a");
    return NULL;
}

/* Documents come, go and are replaced, extents are sealed, rewritten and merged, and somebody reads
 * all of it all the time. */
static void test_all_at_once(void **state) {
    fixture *f = *state;
    pthread_t reader;
    go_on = false;
    f->options.merge_calm_ms = 1;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    assert_int_equal(pthread_create(&reader, NULL, read_on, f), 0);
    for (uint64_t i = 0; i < 120; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)(i * 7 % 60));
        put_text(f, "a", id, i, 40 + i * 37 % 300);
        loci_ingest_wake(f->ingest);
        if (i % 6 == 5) wait_searchable(f, "a");
        if (i % 10 == 9) delete_document(f, "a", id);
        if (i % 17 == 16) wait_settled(f, "a");
        if (i % 40 == 39) wait_merged(f, "a");
    }
    wait_settled(f, "a");
    wait_merged(f, "a");
    go_on = true;
    pthread_join(reader, NULL);
    check_snapshot(f, "a");
    wait_extents(f, "a", info_of(f, "a").extents);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, merge_setup, fixture_teardown)
#define TEST_INT8(name) \
    { #name "_int8", name, merge_setup_int8, fixture_teardown, NULL }
#define TEST_OVERLAP(name) \
    { #name "_overlap", name, merge_setup_overlap, fixture_teardown, NULL }
    const struct CMUnitTest tests[] = {
        TEST(test_extents_become_few),
        TEST(test_interruptions_do_not_matter),
        TEST(test_the_dead_are_left_out),
        TEST(test_a_document_dies_meanwhile),
        TEST(test_what_is_gone_is_not_damaged),
        TEST(test_damage_of_what_is_rewritten),
        TEST(test_a_merge_gives_up),
        TEST(test_a_merge_gives_up_in_the_end),
        TEST(test_the_dead_come_back_meanwhile),
        TEST(test_nobody_waits),
        TEST(test_the_corpus_ends_meanwhile),
        TEST(test_the_process_ends_meanwhile),
        TEST(test_snapshots_read_the_old_files),
        TEST(test_damage_is_named_and_replaces_nothing),
        TEST(test_the_index_is_made_anew),
        TEST(test_a_full_disk_is_left_to_registration),
        TEST(test_other_models_wait_for_theirs),
        TEST(test_all_at_once),
        TEST_INT8(test_extents_become_few),
        TEST_INT8(test_interruptions_do_not_matter),
        TEST_INT8(test_the_dead_are_left_out),
        TEST_INT8(test_damage_is_named_and_replaces_nothing),
        TEST_INT8(test_the_index_is_made_anew),
        TEST_INT8(test_all_at_once),
        TEST_OVERLAP(test_extents_become_few),
        TEST_OVERLAP(test_the_dead_are_left_out),
        TEST_OVERLAP(test_damage_is_named_and_replaces_nothing),
        TEST_OVERLAP(test_a_merge_gives_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
