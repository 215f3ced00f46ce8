/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared parts of the tests of reindexing; see reindex_support.h.
 */
#include "reindex_support.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

float reindex_sinks[2 * 2 * 16];

loci_geometry geometry_of(const char *fingerprint) {
    loci_geometry geometry = test_geometry();
    memcpy(geometry.fingerprint, fingerprint, LOCI_FINGERPRINT_LEN);
    return geometry;
}

int reindex_setup(void **state) {
    fixture_setup(state);
    ((fixture *)*state)->options.extent_tokens = SMALL_EXTENT_TOKENS;
    return 0;
}

void run_model(fixture *f, const char *fingerprint) {
    loci_ingest_stop(f->ingest);
    f->encoder.geometry = geometry_of(fingerprint);
    fake_model = strcmp(fingerprint, FINGERPRINT) != 0;
    fixture_start(f);
}

loci_status reindex(fixture *f, const char *corpus, const char *fingerprint, loci_error *err) {
    loci_geometry geometry = geometry_of(fingerprint);
    loci_status status = loci_corpus_reindex(f->store, corpus, &geometry, NULL, reindex_sinks,
                                             reindex_sinks, NULL, err);
    if (f->ingest) loci_ingest_wake(f->ingest);
    return status;
}

void wait_reindexed(fixture *f, const char *corpus) {
    uint64_t end = loci_now_ns() + FAR_NS;
    while (info_of(f, corpus).reindexing) {
        assert_true(loci_now_ns() < end);
        loci_sleep_ms(5);
    }
}

static void put_wide(fixture *f, const char *corpus) {
    loci_error err;
    loci_document_info info;
    bool unchanged;
    char *words = make_text(4, 650), *text = malloc(300000 + 650);
    assert_non_null(text);
    memset(text, ' ', 300000);
    memcpy(text + 300000, words, 650);
    assert_ok(
        put_document(f, corpus, "wide", loci_slice_of(text, 300650), &info, &unchanged, &err));
    free(text);
    free(words);
}

void fill(fixture *f, const char *corpus, bool detours) {
    if (detours) put_text(f, corpus, "gone", 9, 350);
    put_text(f, corpus, "x", 1, 1250);
    if (detours) put_text(f, corpus, "wide", 2, 200);
    if (detours) wait_settled(f, corpus);
    put_wide(f, corpus);
    put_text(f, corpus, "y", 5, 40);
    if (detours) delete_document(f, corpus, "gone");
    put_text(f, corpus, "z", 6, 550);
    wait_settled(f, corpus);
}

void hash_of(fixture *f, const char *corpus, char out[33]) {
    loci_error err;
    assert_ok(loci_corpus_manifest_hash(f->store, corpus, out, &err));
}

void create_of(fixture *f, const char *corpus, const char *fingerprint) {
    loci_error err;
    loci_corpus_info info;
    loci_geometry geometry = geometry_of(fingerprint);
    assert_ok(loci_corpus_create(f->store, corpus, &geometry, NULL, reindex_sinks, reindex_sinks,
                                 &info, &err));
}
