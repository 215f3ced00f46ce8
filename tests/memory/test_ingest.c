/* SPDX-License-Identifier: Apache-2.0
 *
 * The registration pipeline with a fake encoder: what becomes searchable, in which extents, and
 * what failures and interruptions do to it.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "attention/cluster.h"
#include "base/clock.h"
#include "memory/pipeline.h"

static void test_small_documents_are_searchable_quickly(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    for (uint64_t i = 0; i < 5; i++) {
        char id[16];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, "a", id, i, 50 + i);
        uint64_t begin = loci_now_ns();
        wait_searchable(f, "a");
        assert_true(loci_now_ns() - begin < 1000000000ull);
        loci_corpus_info info = info_of(f, "a");
        assert_int_equal(info.documents, i + 1);
        assert_int_equal(info.pending_documents, 0);
        check_snapshot(f, "a");
    }
    loci_error err;
    loci_document_info document;
    assert_ok(loci_document_get(f->store, "a", "d2", &document, NULL, &err));
    assert_true(document.searchable);
    assert_int_equal(document.segments, 2);
    assert_int_equal(info_of(f, "a").extents, 0);
}

static void test_full_extents_and_tail(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "long", 1, 5000);
    wait_searchable(f, "a");
    assert_true(info_of(f, "a").extents >= 4);
    check_snapshot(f, "a");
    put_text(f, "a", "more", 2, 700);
    wait_settled(f, "a");
    uint64_t hash = check_snapshot(f, "a");
    loci_corpus_info info = info_of(f, "a");
    wait_extents(f, "a", info.extents);
    assert_true(info.bytes_on_disk > info.tokens * 2 * 2 * 16 * 4);
    fixture_close(f);
    fixture_open(f);
    assert_int_equal(check_snapshot(f, "a"), hash);
    assert_int_equal(info_of(f, "a").tokens, info.tokens);
    assert_int_equal(info_of(f, "a").revision, info.revision);
}

/* The manifest at rest depends on the documents alone. */
static void test_interruptions_do_not_matter(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "straight");
    fixture_create(f, "torn");
    fixture_start(f);
    static const size_t sizes[] = {3000, 40, 900, 2500, 1, 4200, 300};
    for (size_t i = 0; i < 7; i++) {
        char id[16];
        snprintf(id, sizeof id, "d%zu", i);
        put_text(f, "straight", id, i, sizes[i]);
    }
    wait_settled(f, "straight");
    uint64_t expected = check_snapshot(f, "straight");
    for (size_t i = 0; i < 7; i++) {
        char id[16];
        snprintf(id, sizeof id, "d%zu", i);
        put_text(f, "torn", id, i, sizes[i]);
        if (i % 3 == 1) wait_settled(f, "torn");
        loci_ingest_wake(f->ingest);
        f->encode_ms = 3;
        loci_sleep_ms((unsigned)i);
        fixture_close(f);
        fixture_open(f);
        fixture_start(f);
    }
    f->encode_ms = 0;
    wait_settled(f, "torn");
    assert_int_equal(check_snapshot(f, "torn"), expected);
    loci_error err;
    char hashes[3][33];
    assert_ok(loci_corpus_manifest_hash(f->store, "straight", hashes[0], &err));
    assert_ok(loci_corpus_manifest_hash(f->store, "torn", hashes[1], &err));
    assert_string_equal(hashes[0], hashes[1]);
    delete_document(f, "torn", "d2");
    assert_ok(loci_corpus_manifest_hash(f->store, "torn", hashes[2], &err));
    assert_string_not_equal(hashes[0], hashes[2]);
    wait_extents(f, "torn", info_of(f, "torn").extents);
}

/* Small streams do not settle the corpus: then the hash tells how the tail stands, which depends on
 * time. At rest it does not. */
static void test_small_streams_settle_to_the_same(void **state) {
    fixture *f = *state;
    loci_error err;
    char together[33], apart[33];
    fixture_open(f);
    fixture_create(f, "together");
    fixture_create(f, "apart");
    fixture_start(f);
    put_text(f, "together", "large", 1, 700);
    put_text(f, "together", "small", 2, 60);
    wait_settled(f, "together");
    put_text(f, "apart", "large", 1, 700);
    wait_settled(f, "apart");
    put_text(f, "apart", "small", 2, 60);
    wait_searchable(f, "apart");
    assert_ok(loci_corpus_manifest_hash(f->store, "together", together, &err));
    assert_ok(loci_corpus_manifest_hash(f->store, "apart", apart, &err));
    assert_string_not_equal(together, apart);
    wait_settled(f, "apart");
    assert_ok(loci_corpus_manifest_hash(f->store, "apart", apart, &err));
    assert_string_equal(together, apart);
    assert_int_equal(check_snapshot(f, "together"), check_snapshot(f, "apart"));
}

static void test_failures_are_reported_and_retried(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "x", 1, 3000);
    f->fail_encodes = 2;
    fixture_start(f);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    uint64_t end = loci_now_ns() + 10000000000ull;
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_INTERNAL);
    assert_non_null(strstr(progress.failure.text, "told to fail"));
    wait_searchable(f, "a");
    wait_settled(f, "a");
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_OK);
    assert_true(progress.tokens_indexed == info_of(f, "a").tokens);
    check_snapshot(f, "a");
}

/* Extents cannot be written: documents are kept, the corpus recovers. */
static void test_write_errors_lose_nothing(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    char dir[256];
    fixture_open(f);
    fixture_create(f, "a");
    snprintf(dir, sizeof dir, "%s/extents/%016llx", f->dir,
             (unsigned long long)info_of(f, "a").uid);
    FILE *obstacle = fopen(dir, "w");
    assert_non_null(obstacle);
    fclose(obstacle);
    put_text(f, "a", "x", 1, 3000);
    fixture_start(f);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    uint64_t end = loci_now_ns() + 10000000000ull;
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_IO);
    assert_int_equal(info_of(f, "a").documents, 1);
    assert_int_equal(unlink(dir), 0);
    wait_searchable(f, "a");
    check_snapshot(f, "a");
}

static void test_another_model_is_refused(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "x", 1, 100);
    loci_corpus_info info = info_of(f, "a");
    assert_int_equal(loci_corpus_check_model(&info, OTHER_FINGERPRINT, &err), LOCI_E_PRECONDITION);
    memcpy(f->encoder.geometry.fingerprint, OTHER_FINGERPRINT, LOCI_FINGERPRINT_LEN);
    fixture_start(f);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    uint64_t end = loci_now_ns() + 10000000000ull;
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_PRECONDITION);
    assert_string_equal(progress.failure.reason, "MODEL_MISMATCH");
    assert_int_equal(info_of(f, "a").pending_documents, 1);
}

static void test_damaged_extent_is_named_and_others_serve(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *snapshot;
    char path[512];
    fixture_open(f);
    fixture_create(f, "good");
    fixture_create(f, "bad");
    fixture_start(f);
    put_text(f, "good", "x", 1, 1500);
    put_text(f, "bad", "x", 2, 1500);
    wait_settled(f, "good");
    wait_settled(f, "bad");
    assert_true(find_extent(f, "bad", path));
    fixture_close(f);
    flip_byte(path, 20);
    fixture_open(f);
    check_snapshot(f, "good");
    assert_int_equal(loci_snapshot_acquire(f->store, "bad", &snapshot, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, strrchr(path, '/') + 1));
    flip_byte(path, 20);
    check_snapshot(f, "bad");
}

static void test_corpora_take_turns(void **state) {
    fixture *f = *state;
    fixture_open(f);
    char name[16];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "c%d", i);
        fixture_create(f, name);
        for (uint64_t d = 0; d < 20; d++) {
            char id[16];
            snprintf(id, sizeof id, "d%llu", (unsigned long long)d);
            put_text(f, name, id, d, 100);
        }
    }
    fixture_start(f);
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "c%d", i);
        wait_settled(f, name);
        check_snapshot(f, name);
    }
    loci_store_figures figures;
    loci_store_figures_of(f->store, &figures);
    assert_int_equal(figures.pending_documents, 0);
}

/* Waits until so many extents are there; the last document must not be complete by then. */
static void wait_part(fixture *f, const char *corpus, uint64_t extents) {
    uint64_t end = loci_now_ns() + 10000000000ull;
    loci_ingest_wake(f->ingest);
    while (info_of(f, corpus).extents < extents) {
        assert_true(loci_now_ns() < end);
        loci_sleep_ms(2);
    }
    assert_int_equal(info_of(f, corpus).pending_documents, 1);
}

static void assert_counts(fixture *f, const char *corpus, const loci_corpus_info *expected) {
    loci_corpus_info info = info_of(f, corpus);
    assert_int_equal(info.tokens, expected->tokens);
    assert_int_equal(info.segments, expected->segments);
    check_snapshot(f, corpus);
}

/* Nothing of a document shows before all of it does; what was left unfinished never shows. */
static void check_unfinished(fixture *f, const char *corpus, bool restart) {
    fixture_create(f, corpus);
    put_text(f, corpus, "other", 1, 100);
    put_text(f, corpus, "x", 2, 200);
    wait_searchable(f, corpus);
    loci_corpus_info before = info_of(f, corpus), final = info_of(f, "final");
    f->encode_ms = 100;
    put_text(f, corpus, "x", 3, 30000);
    wait_part(f, corpus, 3);
    assert_counts(f, corpus, &before);
    if (restart) {
        fixture_close(f);
        fixture_open(f);
        assert_true(info_of(f, corpus).extents >= 3);
        assert_counts(f, corpus, &before);
    }
    put_text(f, corpus, "x", 4, 12000);
    if (restart) fixture_start(f);
    loci_ingest_wake(f->ingest);
    unsigned hidden = 0;
    while (info_of(f, corpus).pending_documents > 0) {
        loci_corpus_info info = info_of(f, corpus);
        if (info.pending_documents > 0) assert_int_equal(info.tokens, before.tokens);
        check_snapshot(f, corpus);
        hidden++;
    }
    assert_true(hidden > 2);
    f->encode_ms = 0;
    assert_counts(f, corpus, &final);
    wait_settled(f, corpus);
    assert_counts(f, corpus, &final);
}

static void test_unfinished_documents_are_hidden(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "final");
    fixture_start(f);
    put_text(f, "final", "other", 1, 100);
    put_text(f, "final", "x", 4, 12000);
    wait_searchable(f, "final");
    check_unfinished(f, "live", false);
    check_unfinished(f, "torn", true);
}

/* Replaced before anything of it was committed: its first segments are encoded with the end of the
 * document before. */
static void test_a_replaced_beginning_never_shows(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "first");
    fixture_create(f, "a");
    put_text(f, "first", "d", 1, 3900);
    put_text(f, "a", "d", 1, 3900);
    put_text(f, "a", "x", 2, 30000);
    f->encode_ms = 300;
    fixture_start(f);
    wait_searchable(f, "first");
    loci_sleep_ms(100); /* amid the first batch of the other corpus */
    put_text(f, "a", "x", 3, 12000);
    uint64_t tokens = info_of(f, "first").tokens;
    unsigned seen = 0;
    for (;;) {
        loci_corpus_info info = info_of(f, "a");
        if (info.pending_documents == 0) break;
        assert_true(info.tokens == 0 || info.tokens == tokens);
        seen += info.tokens == tokens;
        loci_sleep_ms(1);
    }
    assert_true(seen > 0);
    check_snapshot(f, "a");
}

static uint32_t flats_of(fixture *f, const char *corpus) {
    loci_error err;
    loci_snapshot *snapshot;
    assert_ok(loci_snapshot_acquire(f->store, corpus, &snapshot, &err));
    uint32_t flats = loci_snapshot_view(snapshot)->flat_segments;
    loci_snapshot_release(snapshot);
    return flats;
}

/* Asked for by clients that went away; and unasked. */
static void test_tiny_documents_do_not_make_the_tail_anew(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_start(f);
    put_text(f, "a", "x", 1, 700);
    wait_settled(f, "a");
    assert_int_equal(info_of(f, "a").extents, 1);
    loci_ingest_settle(f->ingest, "a"); /* nothing is due */
    loci_sleep_ms(200);
    put_text(f, "a", "y", 2, 20);
    wait_searchable(f, "a");
    loci_sleep_ms(200);
    assert_int_equal(flats_of(f, "a"), 1);
    loci_ingest_settle(f->ingest, "a");
    uint64_t end = loci_now_ns() + 5000000000ull;
    while (flats_of(f, "a") > 0 && loci_now_ns() < end) loci_sleep_ms(5);
    assert_int_equal(flats_of(f, "a"), 0);
    put_text(f, "a", "z", 3, 20);
    wait_searchable(f, "a");
    loci_sleep_ms(4200); /* longer than a corpus must be idle */
    assert_int_equal(flats_of(f, "a"), 1);
    wait_settled(f, "a");
    assert_int_equal(flats_of(f, "a"), 0);
}

static void test_what_tail_is_due(void **state) {
    (void)state;
    loci_run run = {.sequence = 1, .segments = 20, .tokens = 640};
    loci_manifest_extent extent = {
        .tokens = 640, .segments = 20, .partial = true, .runs = &run, .run_count = 1};
    loci_manifest_flat flat = {.number = 1, .sequence = 2, .end = 32, .tokens = 32};
    loci_manifest manifest = {
        .extents = &extent, .extent_count = 1, .flats = &flat, .flat_count = 1};
    loci_rebuild_plan plan;
    static const struct {
        uint32_t partials, tokens;
        bool large, any;
    } cases[] = {{1, 32, false, true}, {1, 159, false, true},  {1, 160, true, true},
                 {1, 600, true, true}, {0, 511, false, false}, {0, 512, true, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        manifest.extent_count = cases[i].partials;
        flat.tokens = cases[i].tokens;
        loci_manifest_sum(&manifest);
        assert_false(loci_rebuild_due(&manifest, 1024, LOCI_TAIL_KEEP, &plan));
        assert_int_equal(loci_rebuild_due(&manifest, 1024, LOCI_TAIL_LARGE, &plan), cases[i].large);
        assert_int_equal(loci_rebuild_due(&manifest, 1024, LOCI_TAIL_ANY, &plan), cases[i].any);
    }
    /* Extents are smaller than they were: this one is not gathered again. */
    manifest.extent_count = 1;
    flat.tokens = 512;
    loci_manifest_sum(&manifest);
    assert_int_equal(loci_tail_tokens(&manifest, 640), 640 + 512);
    assert_int_equal(loci_tail_tokens(&manifest, 639), 512);
    assert_true(loci_rebuild_due(&manifest, 639, LOCI_TAIL_ANY, &plan));
    assert_int_equal(plan.first, 1);
    assert_int_equal(plan.last, 1);
    assert_true(plan.tail);
}

static void test_when_to_flush(void **state) {
    (void)state;
    const uint64_t ms = 1000000;
    assert_false(loci_flush_due(1, 1, 100 * ms));
    assert_true(loci_flush_due(1, 1, 600 * ms));
    assert_false(loci_flush_due(1, 0, 600 * ms));
    assert_false(loci_flush_due(1000, 1, 600 * ms));
    assert_true(loci_flush_due(1000, 1, 60000 * ms));
    assert_true(loci_flush_due(1, 0, 60000 * ms)); /* within one long document */
}

static void test_a_failure_goes_with_its_document(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "x", 1, 100);
    f->fail_encodes = 1000;
    fixture_start(f);
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    uint64_t end = loci_now_ns() + 5000000000ull;
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_INTERNAL);
    delete_document(f, "a", "x");
    end = loci_now_ns() + 5000000000ull;
    while (progress.failure.status != LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_OK);
}

static void test_a_small_document_does_not_wait_for_a_long_one(void **state) {
    fixture *f = *state;
    fixture_open(f);
    fixture_create(f, "long");
    fixture_create(f, "small");
    fixture_start(f);
    f->encode_ms = 150;
    put_text(f, "long", "x", 1, 120000);
    wait_part(f, "long", 1);
    for (uint64_t i = 0; i < 2; i++) {
        put_text(f, "small", "y", i, 1000);
        uint64_t begin = loci_now_ns();
        wait_searchable(f, "small");
        assert_true(loci_now_ns() - begin < 4000000000ull);
        assert_int_equal(info_of(f, "long").pending_documents, 1);
    }
    f->encode_ms = 0;
    wait_settled(f, "long");
    check_snapshot(f, "long");
}

/* Clusters the first keys only when so many batches were begun and nobody holds it, or fails then
 * if it is told to. */
static atomic_uint cluster_after;
static atomic_bool cluster_fails, cluster_waited, cluster_hold;

static loci_status cluster_late(loci_backend *self, const loci_keys *keys, loci_clusters *out,
                                loci_error *err) {
    fixture *f = self->ctx;
    uint64_t end = loci_now_ns() + 10000000000ull;
    unsigned after = atomic_exchange(&cluster_after, 0);
    while (f->encodes < after && loci_now_ns() < end) loci_sleep_ms(1);
    if (after) cluster_waited = f->encodes >= after;
    while (after && cluster_hold && loci_cancel_check(keys->cancel) == LOCI_OK) loci_sleep_ms(1);
    if (after && cluster_fails) return loci_fail(err, LOCI_E_INTERNAL, "the device is out");
    return loci_cluster_keys(keys, NULL, NULL, out, err);
}

/* With a corpus "a" of documents whose first extent ends within "cut" and is being made; it stays
 * so until cluster_hold ends. */
static void hold_a_seal(fixture *f) {
    static loci_backend_ops ops;
    ops = fake_clustering_ops;
    ops.cluster_keys = cluster_late;
    f->backend.ops = &ops;
    /* A batch is a quarter of an extent; the fifth says that the first extent is full. */
    f->options.extent_kv_bytes = EXTENT_TOKENS * 256;
    cluster_fails = cluster_waited = false;
    cluster_hold = true;
    cluster_after = 7;
    f->encode_ms = 30; /* so that batches are still to come */
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "before", 1, 300);
    put_text(f, "a", "cut", 2, 2 * EXTENT_TOKENS);
    put_text(f, "a", "after", 3, 900);
    fixture_start(f);
    uint64_t end = loci_now_ns() + 20000000000ull;
    while (!cluster_waited && loci_now_ns() < end) loci_sleep_ms(1);
    assert_true(cluster_waited);
}

/* Documents, and nothing of others: as they would be had nothing happened on the way. */
static void release_seal(fixture *f, uint64_t documents) {
    cluster_hold = false;
    f->encode_ms = 0;
    wait_settled(f, "a");
    check_snapshot(f, "a");
    assert_int_equal(info_of(f, "a").documents, documents);
    wait_extents(f, "a", info_of(f, "a").extents);
}

static void test_the_cut_document_goes_while_its_extent_is_made(void **state) {
    fixture *f = *state;
    hold_a_seal(f);
    delete_document(f, "a", "cut");
    release_seal(f, 2);
}

static void test_the_cut_document_is_replaced_while_its_extent_is_made(void **state) {
    fixture *f = *state;
    hold_a_seal(f);
    put_text(f, "a", "cut", 9, 1500);
    release_seal(f, 3);
}

static void test_the_corpus_goes_while_an_extent_is_made(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    hold_a_seal(f);
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    cluster_hold = false;
    fixture_create(f, "a");
    put_text(f, "a", "new", 5, 1500);
    release_seal(f, 1);
    fixture_close(f);
    fixture_open(f);
    assert_ok(loci_corpus_get(f->store, "a", &info, &err));
    check_snapshot(f, "a");
}

static void test_it_stops_while_an_extent_is_made(void **state) {
    fixture *f = *state;
    hold_a_seal(f);
    fixture_close(f);
    fixture_open(f);
    fixture_start(f);
    release_seal(f, 3);
}

/* The failure of the encoder is told; what the extent was of is kept. */
static void test_encoding_and_sealing_fail(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    hold_a_seal(f);
    cluster_fails = true;
    f->fail_encodes = 1;
    put_text(f, "a", "more", 4, 100);
    uint64_t end = loci_now_ns() + 5000000000ull;
    while (f->fail_encodes > 0 && loci_now_ns() < end) loci_sleep_ms(1);
    bool encoder_failed = f->fail_encodes == 0; /* else all was encoded already */
    cluster_hold = false;
    assert_ok(loci_ingest_progress_of(f->ingest, "a", &progress, &err));
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "a", 100, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_INTERNAL);
    assert_true(encoder_failed);
    assert_non_null(strstr(progress.failure.text, "the fake encoder was told to fail"));
    release_seal(f, 4);
}

/* The next segments are encoded while an extent is made. If that fails, what it was of is kept,
 * what was encoded meanwhile is not, and the end is the same. */
static void test_an_extent_is_made_beside(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress;
    static loci_backend_ops ops;
    ops = fake_clustering_ops;
    ops.cluster_keys = cluster_late;
    f->backend.ops = &ops;
    /* A batch is a quarter of an extent; the fifth says that the first extent is full. */
    f->options.extent_kv_bytes = EXTENT_TOKENS * 256;
    fixture_open(f);
    fixture_create(f, "straight");
    fixture_create(f, "fails");
    fixture_start(f);
    cluster_fails = cluster_waited = false;
    cluster_after = f->encodes + 7;
    put_text(f, "straight", "x", 3, 6 * EXTENT_TOKENS);
    put_text(f, "straight", "y", 4, 700);
    wait_settled(f, "straight");
    assert_true(cluster_waited);
    uint64_t expected = check_snapshot(f, "straight");
    cluster_waited = false;
    cluster_fails = true;
    cluster_after = f->encodes + 7;
    put_text(f, "fails", "x", 3, 6 * EXTENT_TOKENS);
    put_text(f, "fails", "y", 4, 700);
    loci_ingest_wake(f->ingest);
    assert_ok(loci_ingest_progress_of(f->ingest, "fails", &progress, &err));
    uint64_t end = loci_now_ns() + 20000000000ull;
    while (progress.failure.status == LOCI_OK && loci_now_ns() < end)
        assert_ok(loci_ingest_wait(f->ingest, "fails", 1000, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_INTERNAL);
    assert_non_null(strstr(progress.failure.text, "the device is out"));
    assert_true(cluster_waited);
    wait_settled(f, "fails");
    assert_int_equal(check_snapshot(f, "fails"), expected);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_small_documents_are_searchable_quickly),
        TEST(test_full_extents_and_tail),
        TEST(test_interruptions_do_not_matter),
        TEST(test_small_streams_settle_to_the_same),
        TEST(test_failures_are_reported_and_retried),
        TEST(test_write_errors_lose_nothing),
        TEST(test_another_model_is_refused),
        TEST(test_damaged_extent_is_named_and_others_serve),
        TEST(test_corpora_take_turns),
        TEST(test_unfinished_documents_are_hidden),
        TEST(test_a_replaced_beginning_never_shows),
        TEST(test_tiny_documents_do_not_make_the_tail_anew),
        cmocka_unit_test(test_what_tail_is_due),
        cmocka_unit_test(test_when_to_flush),
        TEST(test_a_failure_goes_with_its_document),
        TEST(test_a_small_document_does_not_wait_for_a_long_one),
        TEST(test_an_extent_is_made_beside),
        TEST(test_the_cut_document_goes_while_its_extent_is_made),
        TEST(test_the_cut_document_is_replaced_while_its_extent_is_made),
        TEST(test_the_corpus_goes_while_an_extent_is_made),
        TEST(test_it_stops_while_an_extent_is_made),
        TEST(test_encoding_and_sealing_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
