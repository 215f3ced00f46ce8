/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of the store: snapshots under a budget, mapped extents, what registration takes, documents
 * that are too large for it.
 */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "memory/internal.h"

#define MIB (1ull << 20)

static uint64_t held(loci_budget *budget) {
    loci_budget_usage usage;
    loci_budget_usage_of(budget, &usage);
    return usage.part[LOCI_MEMORY_SNAPSHOTS];
}

/* Two corpora: "flat" has open segments only, "dead" an extent with a dead document. */
static void fill(fixture *f) {
    loci_error err;
    uint64_t revision;
    fixture_open(f);
    fixture_create(f, "flat");
    fixture_create(f, "dead");
    fixture_start(f);
    put_text(f, "flat", "a", 1, 300);
    for (uint64_t i = 0; i < 8; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, "dead", id, 10 + i, 300);
    }
    wait_searchable(f, "flat");
    wait_settled(f, "dead");
    assert_ok(loci_document_delete(f->store, "dead", "d3", &revision, &err));
    fixture_close(f);
}

static void test_snapshots_reserve_and_give_back(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *flat = NULL, *dead = NULL, *again = NULL;
    loci_budget *budget = NULL;
    fill(f);
    assert_ok(loci_budget_create(MIB, &budget, &err));
    f->options.budget = budget;
    fixture_open(f);
    assert_ok(loci_snapshot_acquire(f->store, "flat", &flat, &err));
    uint64_t of_flat = held(budget), kv = 4ull * 2 * 2 * 16;
    assert_true(of_flat >= loci_snapshot_view(flat)->flat_tokens * kv && of_flat < 1 * MIB / 2);
    assert_ok(loci_snapshot_acquire(f->store, "dead", &dead, &err));
    assert_non_null(loci_snapshot_view(dead)->extents[0].live);
    uint64_t of_both = held(budget);
    assert_true(of_both >= of_flat + loci_snapshot_view(dead)->extents[0].tokens / 8 * 4);
    /* The same snapshot again costs nothing, a document that it names a little. */
    assert_ok(loci_snapshot_acquire(f->store, "flat", &again, &err));
    assert_true(held(budget) == of_both);
    loci_segment_info info;
    assert_ok(loci_snapshot_segment(dead, 0, &info, &err));
    assert_true(held(budget) > of_both);
    /* Kept for the next question; given up when memory is short, unless somebody reads it. */
    loci_snapshot_release(again);
    loci_snapshot_release(dead);
    assert_true(held(budget) > of_both);
    assert_ok(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, MIB - of_flat, "a test", &err));
    assert_true(held(budget) == of_flat);
    assert_int_equal(loci_snapshot_acquire(f->store, "dead", &dead, &err), LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "corpus dead"));
    assert_string_equal(err.reason, "MEMORY_BUDGET");
    assert_true(held(budget) == of_flat);
    loci_budget_give(budget, LOCI_MEMORY_LOOKUPS, MIB - of_flat);
    assert_ok(loci_snapshot_acquire(f->store, "dead", &dead, &err));
    loci_snapshot_release(dead);
    loci_snapshot_release(flat);
    fixture_close(f);
    assert_true(held(budget) == 0);
    loci_budget_destroy(budget);
    f->options.budget = NULL;
}

static void test_mapped_extents_are_counted(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_snapshot *snapshot = NULL;
    loci_store_figures now;
    fill(f);
    fixture_open(f);
    loci_store_figures_of(f->store, &now);
    assert_true(now.mapped_bytes == 0 && now.resident_bytes == 0);
    assert_ok(loci_snapshot_acquire(f->store, "dead", &snapshot, &err));
    const loci_corpus_view *view = loci_snapshot_view(snapshot);
    uint64_t expected = 0;
    for (uint32_t e = 0; e < view->extent_count; e++) expected += view->extents[e].buffer->bytes;
    loci_store_figures_of(f->store, &now);
    loci_snapshot_release(snapshot);
    assert_true(expected > 0 && now.mapped_bytes == expected);
    assert_true(now.resident_bytes > 0 &&
                now.resident_bytes <= now.mapped_bytes); /* it was verified just now */
}

/* Figures come at once whoever holds which lock; what could not be looked at is as it was. */
static void test_figures_do_not_wait(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_store_figures first, figures;
    loci_snapshot *snapshot = NULL;
    fill(f);
    fixture_open(f);
    assert_ok(loci_snapshot_acquire(f->store, "dead", &snapshot, &err));
    loci_snapshot_release(snapshot);
    put_text(f, "flat", "b", 2, 300);
    loci_store_figures_of(f->store, &first);
    assert_true(first.corpora == 2 && first.pending_documents == 1 && first.mapped_bytes > 0);
    assert_true(first.tokens == info_of(f, "flat").tokens + info_of(f, "dead").tokens);
    loci_corpus *corpus = f->store->corpora[0];
    assert_string_equal(corpus->name, "dead");
    pthread_mutex_t *locks[] = {&corpus->lock, &f->store->lock};
    for (size_t i = 0; i < 2; i++) {
        put_text(f, "flat", i == 0 ? "c" : "d", 3, 100); /* seen only if its corpus is */
        pthread_mutex_lock(locks[i]);
        uint64_t from = loci_now_ns();
        loci_store_figures_of(f->store, &figures);
        assert_true(loci_now_ns() - from < 2000000000u);
        pthread_mutex_unlock(locks[i]);
        assert_true(figures.corpora == 2 && figures.tokens == first.tokens &&
                    figures.mapped_bytes == first.mapped_bytes);
        assert_int_equal(figures.pending_documents, 2);
    }
    loci_store_figures_of(f->store, &figures);
    assert_int_equal(figures.pending_documents, 3);
}

static void test_registration_needs_what_it_is_given(void **state) {
    (void)state;
    loci_geometry geometry = test_geometry();
    loci_store_options options;
    loci_store_options_default(&options);
    options.merge_tokens = 0;
    uint64_t whole = loci_ingest_memory(&geometry, &options);
    uint64_t extent = 4ull * 2 * 2 * 16 * options.extent_tokens;
    assert_true(whole > options.document_bytes_max + 2 * extent);
    assert_true(whole < options.document_bytes_max + 4 * extent + 32 * MIB);
    options.seal_beside = true; /* one extent more */
    assert_true(loci_ingest_memory(&geometry, &options) == whole + extent);
    options.seal_beside = false;
    options.document_bytes_max /= 2;
    assert_true(loci_ingest_memory(&geometry, &options) == whole - options.document_bytes_max);
    options.extent_tokens /= 2;
    assert_true(loci_ingest_memory(&geometry, &options) <
                whole - options.document_bytes_max - extent / 2);
}

/* One pair's keys and values are held, not all; more memory allows larger merges, at most as large
 * as an extent can be. */
static void test_merges_fit_into_what_they_are_given(void **state) {
    (void)state;
    loci_geometry geometry = test_geometry();
    loci_store_options options;
    loci_store_options_default(&options);
    uint64_t kv = 4ull * 2 * 2 * 16, before = 0;
    for (uint64_t bytes = MIB; bytes < 4096 * MIB; bytes += bytes / 3) {
        uint32_t tokens = loci_merge_tokens_within(&geometry, &options, bytes);
        assert_true(tokens >= before && tokens <= LOCI_EXTENT_TOKENS_MAX);
        before = tokens;
        options.merge_tokens = 0;
        uint64_t without = loci_ingest_memory(&geometry, &options);
        options.merge_tokens = tokens;
        uint64_t merge = loci_ingest_memory(&geometry, &options) - without;
        assert_true(merge <= bytes);
        if (tokens == 0) continue;
        assert_true(tokens % (2 * options.extent_tokens) == 0);
        assert_true(merge > tokens * kv / 4);
        if (tokens == LOCI_EXTENT_TOKENS_MAX) continue;
        options.merge_tokens = 2 * tokens;
        assert_true(loci_ingest_memory(&geometry, &options) - without > bytes);
    }
    assert_int_equal(before, LOCI_EXTENT_TOKENS_MAX);
    /* Where pairs overlap the next one's rows and keys are there as well. */
    uint64_t single = loci_ingest_memory(&geometry, &options);
    options.pairs_overlap = true;
    assert_true(loci_ingest_memory(&geometry, &options) >= single + before * 8ull * 16);
    options.pairs_overlap = false;
    assert_int_equal(loci_merge_tokens_within(&geometry, &options, MIB), 0);
}

/* A document that came when more memory was there waits, named, and is indexed when there is. */
static void test_a_document_too_large_waits(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress = {0};
    uint64_t most = f->options.document_bytes_max;
    fixture_open(f);
    fixture_create(f, "c");
    put_text(f, "c", "before", 4, 200);
    put_text(f, "c", "large", 1, 3000);
    put_text(f, "c", "after", 3, 100);
    fixture_create(f, "way-out");
    put_text(f, "way-out", "large", 1, 3000);
    put_text(f, "way-out", "after", 3, 100);
    fixture_close(f);
    f->options.document_bytes_max = 2999;
    fixture_open(f);
    fixture_start(f);
    for (int i = 0; i < 100 && progress.failure.status == LOCI_OK; i++)
        assert_ok(loci_ingest_wait(f->ingest, "c", 100, &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_LIMIT);
    assert_non_null(strstr(progress.failure.text, "\"large\""));
    assert_non_null(strstr(progress.failure.text, "until it is deleted or replaced"));
    assert_in_range(info_of(f, "c").tokens, 150, 200); /* what came before it does not wait */
    /* The way out with the memory that is there: those after it wait no more. */
    delete_document(f, "way-out", "large");
    wait_searchable(f, "way-out");
    assert_true(info_of(f, "way-out").tokens > 0);
    char *text = make_text(2, 3000);
    bool unchanged;
    loci_document_info info;
    assert_int_equal(
        put_document(f, "c", "next", loci_slice_of(text, 3000), &info, &unchanged, &err),
        LOCI_E_LIMIT);
    free(text);
    fixture_close(f);
    f->options.document_bytes_max = most;
    fixture_open(f);
    fixture_start(f);
    wait_searchable(f, "c");
    check_snapshot(f, "c");
}

/* The extents of what came before such a document are merged meanwhile. */
static void test_merges_do_not_wait_for_it(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_ingest_progress progress = {0};
    uint64_t most = f->options.document_bytes_max;
    f->options.extent_tokens = 512;
    f->options.merge_tokens = 32 * 512; /* more than there is: nothing is merged at once */
    f->options.merge_calm_ms = 1u << 30;
    fixture_open(f);
    fixture_create(f, "c");
    fixture_start(f);
    for (uint64_t i = 0; i < 30; i++) {
        char id[8];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)i);
        put_text(f, "c", id, i, 150);
    }
    wait_settled(f, "c");
    fixture_close(f);
    fixture_open(f);
    put_text(f, "c", "large", 1, 3000);
    uint64_t extents = info_of(f, "c").extents;
    assert_true(extents >= 6);
    fixture_close(f);
    f->options.document_bytes_max = 2999;
    f->options.merge_calm_ms = 20;
    fixture_open(f);
    fixture_start(f);
    for (int i = 0; i < 400 && info_of(f, "c").extents > 3; i++) loci_sleep_ms(50);
    assert_in_range(info_of(f, "c").extents, 1, 3);
    assert_ok(loci_ingest_progress_of(f->ingest, "c", &progress, &err));
    assert_int_equal(progress.failure.status, LOCI_E_LIMIT);
    check_snapshot(f, "c");
    f->options.document_bytes_max = most;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_snapshots_reserve_and_give_back, fixture_setup,
                                        fixture_teardown),
        cmocka_unit_test_setup_teardown(test_mapped_extents_are_counted, fixture_setup,
                                        fixture_teardown),
        cmocka_unit_test_setup_teardown(test_figures_do_not_wait, fixture_setup, fixture_teardown),
        cmocka_unit_test(test_registration_needs_what_it_is_given),
        cmocka_unit_test(test_merges_fit_into_what_they_are_given),
        cmocka_unit_test_setup_teardown(test_a_document_too_large_waits, fixture_setup,
                                        fixture_teardown),
        cmocka_unit_test_setup_teardown(test_merges_do_not_wait_for_it, fixture_setup,
                                        fixture_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
