/* SPDX-License-Identifier: Apache-2.0
 *
 * The public reads and the deletion of documents. A read works on one view of the database, so that
 * a concurrent replacement or deletion never tears it.
 */
#include <stdlib.h>
#include <string.h>

#include "memory/internal.h"

/* The newest document of that id within the view. */
static loci_status find_document(const loci_corpus *corpus, const loci_view *view, const char *id,
                                 loci_document *out, loci_error *err) {
    if (strlen(id) > LOCI_DOCUMENT_ID_MAX)
        return loci_fail(err, LOCI_E_NOTFOUND, "corpus %s has no document of so long an id",
                         corpus->name);
    uint64_t sequence;
    LOCI_TRY(loci_document_find(corpus, view, id, &sequence, err));
    loci_status status = loci_document_load(corpus, view, sequence, out, err);
    if (status != LOCI_E_NOTFOUND) return status;
    return loci_fail(err, LOCI_E_CORRUPT, "document \"%.100s\" of corpus %s has no record", id,
                     corpus->name);
}

static void info_of(loci_corpus *corpus, const loci_document *document, loci_document_info *out) {
    pthread_mutex_lock(&corpus->lock);
    loci_document_fill_info(corpus, document, out);
    pthread_mutex_unlock(&corpus->lock);
}

loci_status loci_document_get(loci_store *store, const char *corpus_name, const char *id,
                              loci_document_info *out, loci_buf *metadata, loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_document document;
    LOCI_TRY(loci_corpus_acquire(store, corpus_name, &corpus, err));
    loci_view *view = loci_view_open(store->rocks);
    loci_status status = find_document(corpus, view, id, &document, err);
    if (status == LOCI_OK) info_of(corpus, &document, out);
    if (status == LOCI_OK && metadata) {
        loci_key key = loci_key_pair(corpus->uid, document.sequence);
        loci_key_u8(&key, 'm');
        status = loci_rocks_get(store->rocks, view, LOCI_CF_DOCUMENT, &key, LOCI_KIND_METADATA,
                                metadata, err);
        if (status == LOCI_E_NOTFOUND) status = LOCI_OK; /* none was given */
    }
    loci_view_close(view);
    loci_corpus_release(corpus);
    return status;
}

loci_status loci_document_list(loci_store *store, const char *corpus_name, const char *after,
                               size_t limit, loci_document_info *out, size_t *count,
                               loci_error *err) {
    *count = 0;
    if (strlen(after) > LOCI_DOCUMENT_ID_MAX)
        return loci_fail(err, LOCI_E_INVAL, "the id to list after is too long");
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(store, corpus_name, &corpus, err));
    loci_view *view = loci_view_open(store->rocks);
    loci_key prefix = loci_key_uid(corpus->uid), from = prefix;
    loci_key_text(&from, after);
    loci_scan *scan = loci_scan_open(store->rocks, view, LOCI_CF_NAME, &prefix, &from);
    loci_status status = LOCI_OK;
    loci_slice key;
    while (status == LOCI_OK && *count < limit && loci_scan_next(scan, &key)) {
        if (loci_slice_equal(key, loci_slice_of(from.data, from.len))) continue;
        char id[LOCI_DOCUMENT_ID_MAX + 1];
        size_t len = key.len - prefix.len;
        if (len == 0 || len > LOCI_DOCUMENT_ID_MAX) continue; /* no such key is ever written */
        memcpy(id, key.data + prefix.len, len);
        id[len] = 0;
        loci_document document;
        status = find_document(corpus, view, id, &document, err);
        if (status == LOCI_OK) info_of(corpus, &document, &out[(*count)++]);
    }
    loci_status closed = loci_scan_close(scan, status == LOCI_OK ? err : NULL);
    loci_view_close(view);
    loci_corpus_release(corpus);
    return status != LOCI_OK ? status : closed;
}

loci_status loci_document_read(loci_store *store, const char *corpus_name, const char *id,
                               uint64_t start, uint64_t end, loci_buf *out, loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_document document;
    LOCI_TRY(loci_corpus_acquire(store, corpus_name, &corpus, err));
    loci_view *view = loci_view_open(store->rocks);
    loci_status status = find_document(corpus, view, id, &document, err);
    if (status == LOCI_OK) {
        if (end > document.bytes) end = document.bytes;
        if (start > end)
            status =
                loci_fail(err, LOCI_E_INVAL, "document \"%.100s\" has %llu bytes, none at %llu", id,
                          (unsigned long long)document.bytes, (unsigned long long)start);
        else
            status = loci_document_text(corpus, view, &document, start, end, out, err);
    }
    loci_view_close(view);
    loci_corpus_release(corpus);
    return status;
}

/* Caller holds corpus->lock. */
static loci_status delete_locked(loci_corpus *corpus, const char *id, loci_change *change,
                                 loci_error *err) {
    loci_document document;
    LOCI_TRY(loci_corpus_changeable(corpus, err));
    LOCI_TRY(loci_change_begin(corpus, change, err));
    loci_status status = find_document(corpus, NULL, id, &document, err);
    if (status == LOCI_OK && corpus->geometry.causal && document.segments > 0)
        status = loci_append_only(corpus, id, "deleted", err);
    if (status == LOCI_OK) status = loci_change_bury(change, document.sequence, err);
    if (status != LOCI_OK) {
        loci_change_abort(change);
        return status;
    }
    loci_key key = loci_key_uid(corpus->uid);
    loci_key_text(&key, id);
    loci_batch_delete(change->batch, LOCI_CF_NAME, &key);
    uint64_t documents = corpus->documents - 1, bytes = corpus->bytes - document.bytes;
    loci_state_store(corpus, corpus->last_sequence, documents, bytes, change->batch);
    LOCI_TRY(loci_change_commit(change, "delete_commit", err));
    corpus->documents = documents;
    corpus->bytes = bytes;
    return LOCI_OK;
}

loci_status loci_document_delete(loci_store *store, const char *corpus_name, const char *id,
                                 uint64_t *revision, loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_change change;
    LOCI_TRY(loci_corpus_acquire(store, corpus_name, &corpus, err));
    pthread_mutex_lock(&corpus->lock);
    loci_status status = delete_locked(corpus, id, &change, err);
    if (status == LOCI_OK) *revision = corpus->manifest->revision;
    pthread_mutex_unlock(&corpus->lock);
    if (status == LOCI_OK) loci_change_after(&change);
    loci_corpus_release(corpus);
    return status;
}
