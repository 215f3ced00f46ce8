/* SPDX-License-Identifier: Apache-2.0
 *
 * The catalogue: the store's counters, and reading all corpora when the store opens. That also
 * finishes what a sudden end interrupted: deletions, and files and values that no manifest names.
 * A damaged catalogue value makes its corpus unusable and nothing else.
 *
 * loci_corpora_load runs before anything else may use the store; the rest under store->lock.
 */
#include <stdlib.h>

#include "base/log.h"
#include "memory/internal.h"
#include "memory/lexical.h"

#define UPLOADS_RESERVED 4096u /* numbers taken from the catalogue at a time */

/* --- Counters ------------------------------------------------------------------------------- */

static loci_key key_next(void) {
    loci_key key = {.len = 0};
    loci_key_u8(&key, 'n');
    return key;
}

loci_status loci_catalog_next(uint64_t next_uid, uint64_t upload_limit, loci_batch *batch) {
    loci_buf payload = LOCI_BUF_INIT;
    loci_buf_u64(&payload, next_uid);
    loci_buf_u64(&payload, upload_limit);
    loci_status status = loci_buf_status(&payload);
    loci_key key = key_next();
    if (status == LOCI_OK)
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_NEXT,
                       loci_slice_of(payload.data, payload.len));
    loci_buf_fini(&payload);
    return status;
}

loci_status loci_upload_number(loci_store *store, uint64_t *out, loci_error *err) {
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&store->lock);
    if (store->next_upload == store->upload_limit) {
        loci_batch *batch = loci_batch_create(store->rocks);
        uint64_t limit = store->upload_limit + UPLOADS_RESERVED;
        status = loci_catalog_next(store->next_uid, limit, batch);
        if (status == LOCI_OK)
            status = loci_batch_write(batch, false, err);
        else
            loci_fail(err, status, "no memory for an upload");
        loci_batch_destroy(batch);
        if (status == LOCI_OK) store->upload_limit = limit;
    }
    if (status == LOCI_OK) *out = store->next_upload++;
    pthread_mutex_unlock(&store->lock);
    return status;
}

static loci_status load_next(loci_store *store, loci_error *err) {
    loci_buf payload = LOCI_BUF_INIT;
    loci_key key = key_next();
    loci_status status =
        loci_rocks_get(store->rocks, NULL, LOCI_CF_CATALOG, &key, LOCI_KIND_NEXT, &payload, err);
    store->next_uid = store->next_upload = store->upload_limit = 1;
    if (status == LOCI_E_NOTFOUND) {
        status = LOCI_OK; /* a new store */
    } else if (status == LOCI_OK) {
        loci_reader reader = loci_reader_of(loci_slice_of(payload.data, payload.len));
        store->next_uid = loci_read_u64(&reader);
        store->next_upload = store->upload_limit = loci_read_u64(&reader);
        if (!loci_reader_done(&reader))
            status = loci_fail(err, LOCI_E_CORRUPT, "the store's counters are damaged");
    }
    loci_buf_fini(&payload);
    return status;
}

/* --- Loading ---------------------------------------------------------------------------- */

static loci_status load_state(loci_corpus *corpus, loci_error *err) {
    loci_buf payload = LOCI_BUF_INIT;
    loci_key key = loci_key_catalog('s', corpus->uid);
    loci_status status = loci_rocks_get(corpus->store->rocks, NULL, LOCI_CF_CATALOG, &key,
                                        LOCI_KIND_STATE, &payload, err);
    if (status == LOCI_OK) {
        loci_reader reader = loci_reader_of(loci_slice_of(payload.data, payload.len));
        corpus->last_sequence = loci_read_u64(&reader);
        corpus->documents = loci_read_u64(&reader);
        corpus->bytes = loci_read_u64(&reader);
        if (!loci_reader_done(&reader))
            status = loci_fail(err, LOCI_E_CORRUPT, "the counters have another size");
    }
    loci_buf_fini(&payload);
    return status;
}

static loci_status load_manifest(loci_corpus *corpus, loci_error *err) {
    loci_buf payload = LOCI_BUF_INIT;
    loci_key key = loci_key_catalog('m', corpus->uid);
    loci_status status = loci_rocks_get(corpus->store->rocks, NULL, LOCI_CF_CATALOG, &key,
                                        LOCI_KIND_MANIFEST, &payload, err);
    if (status == LOCI_OK)
        status = loci_manifest_decode(loci_slice_of(payload.data, payload.len),
                                      corpus->geometry.fingerprint, corpus->name, &corpus->manifest,
                                      err);
    loci_buf_fini(&payload);
    return status;
}

/* Documents at or after the cursor that are the newest of their id. */
static loci_status load_pending(loci_corpus *corpus, loci_error *err) {
    loci_key prefix = loci_key_uid(corpus->uid);
    loci_key from = loci_key_pair(corpus->uid, corpus->manifest->cursor.sequence);
    loci_scan *scan = loci_scan_open(corpus->store->rocks, NULL, LOCI_CF_DOCUMENT, &prefix, &from);
    loci_status status = LOCI_OK;
    loci_slice key;
    while (status == LOCI_OK && loci_scan_next(scan, &key)) {
        if (key.len != 16) continue; /* metadata */
        loci_document document;
        uint64_t newest = 0;
        uint64_t sequence = loci_key_read_u64(key.data + 8);
        status = loci_document_load(corpus, NULL, sequence, &document, err);
        if (status != LOCI_OK || document.dead) continue;
        status = loci_document_find(corpus, NULL, document.id, &newest, err);
        if (status == LOCI_OK && newest == sequence && !loci_pending_push(corpus, sequence))
            status = loci_fail(err, LOCI_E_NOMEM, "no memory for the pending documents");
    }
    loci_status closed = loci_scan_close(scan, status == LOCI_OK ? err : NULL);
    return status != LOCI_OK ? status : closed;
}

/* All graves are due: no snapshot outlives the process. */
static loci_status load_graves(loci_corpus *corpus, loci_error *err) {
    loci_key prefix = loci_key_catalog('g', corpus->uid);
    loci_scan *scan = loci_scan_open(corpus->store->rocks, NULL, LOCI_CF_CATALOG, &prefix, NULL);
    loci_status status = LOCI_OK;
    loci_slice key;
    while (status == LOCI_OK && loci_scan_next(scan, &key)) {
        loci_slice payload;
        LOCI_TRY_GOTO(loci_scan_payload(scan, LOCI_KIND_GRAVE, &payload, err), out);
        loci_reader reader = loci_reader_of(payload);
        loci_grave grave = {.sequence = loci_key_read_u64(key.data + 9)};
        grave.upload = loci_read_u64(&reader);
        grave.chunks = loci_read_u32(&reader);
        if (corpus->grave_count == corpus->grave_capacity) {
            size_t capacity = corpus->grave_capacity ? 2 * corpus->grave_capacity : 64;
            loci_grave *grown = realloc(corpus->graves, capacity * sizeof *grown);
            if (!grown) {
                status = loci_fail(err, LOCI_E_NOMEM, "no memory for the graves");
                goto out;
            }
            corpus->graves = grown;
            corpus->grave_capacity = capacity;
        }
        corpus->graves[corpus->grave_count++] = grave;
    }
out:;
    loci_status closed = loci_scan_close(scan, status == LOCI_OK ? err : NULL);
    return status != LOCI_OK ? status : closed;
}

/* Flat values that were written and then not named by a manifest. */
static loci_status clean_flats(loci_corpus *corpus, loci_error *err) {
    loci_key prefix = loci_key_uid(corpus->uid);
    loci_key from = loci_key_pair(corpus->uid, corpus->manifest->next_flat);
    loci_scan *scan = loci_scan_open(corpus->store->rocks, NULL, LOCI_CF_FLAT, &prefix, &from);
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_slice found;
    while (loci_scan_next(scan, &found)) {
        if (found.len != 16) continue;
        loci_key key = loci_key_pair(corpus->uid, loci_key_read_u64(found.data + 8));
        loci_batch_delete(batch, LOCI_CF_FLAT, &key);
    }
    loci_status status = loci_scan_close(scan, err);
    if (status == LOCI_OK) status = loci_batch_write(batch, false, err);
    loci_batch_destroy(batch);
    return status;
}

static loci_status load_contents(loci_corpus *corpus, loci_error *err) {
    LOCI_TRY(loci_corpus_prepare(corpus, err));
    LOCI_TRY(load_state(corpus, err));
    LOCI_TRY(load_manifest(corpus, err));
    LOCI_TRY(load_pending(corpus, err));
    LOCI_TRY(load_graves(corpus, err));
    LOCI_TRY(loci_document_clean(corpus, err));
    LOCI_TRY(clean_flats(corpus, err));
    LOCI_TRY(loci_lexical_clean(corpus, err));
    loci_extents_clean(corpus->extents_dir, corpus->manifest);
    loci_corpus_purge(corpus);
    return LOCI_OK;
}

/* A successor that cannot be used goes, and its corpus is as it was before; but not where that is
 * damaged, too: then it stays beside it, for whoever can read it, and is deleted with it. */
static void load_successor(loci_corpus *successor, loci_corpus *corpus) {
    loci_error damage = {0};
    loci_status status;
    if (corpus->successor)
        status = loci_fail(&damage, LOCI_E_EXISTS, "another one is under way");
    else
        status = load_contents(successor, &damage);
    if (status == LOCI_OK) {
        corpus->successor = successor;
    } else if (corpus->damage.status != LOCI_OK && !corpus->successor) {
        loci_log_error("corpus %s is damaged, and so is its new index: %s", corpus->name,
                       damage.text);
        successor->damage = damage;
        corpus->successor = successor;
    } else {
        loci_log_error("the reindexing of corpus %s begins anew: %s", corpus->name, damage.text);
        successor->deleted = true;
        loci_corpus_release(successor);
    }
}

/* A corpus that stands for itself, into its place in the table. */
static loci_status load_live(loci_corpus *corpus, size_t place, loci_error *err) {
    loci_error damage = {0};
    loci_status status = load_contents(corpus, &damage);
    if (status != LOCI_OK) {
        if (status == LOCI_E_NOTFOUND) status = LOCI_E_CORRUPT; /* a value that must be there */
        loci_fail_prefix(&damage, status, "corpus %s is damaged", corpus->name);
        damage.status = status;
        loci_log_error("%s", damage.text);
        corpus->damage = damage;
    }
    if (loci_corpus_insert(corpus->store, place, corpus)) return LOCI_OK;
    loci_corpus_free(corpus);
    return loci_fail(err, LOCI_E_NOMEM, "no memory for a corpus");
}

/* One corpus of the catalogue. Damage is logged and kept in the object, not returned. What stands
 * under a record that cannot be read is never removed. */
static loci_status load_corpus(loci_store *store, uint64_t uid, loci_scan *scan, loci_error *err) {
    loci_error damage = {0};
    loci_slice payload = {0};
    bool found = false;
    loci_corpus *corpus = loci_corpus_alloc(store, uid);
    if (!corpus) return loci_fail(err, LOCI_E_NOMEM, "no memory for a corpus");
    loci_status status = loci_scan_payload(scan, LOCI_KIND_CORPUS, &payload, &damage);
    if (status == LOCI_OK) status = loci_corpus_decode(corpus, payload, &damage);
    if (status == LOCI_OK && corpus->deleted) {
        loci_corpus_release(corpus);
        return LOCI_OK;
    }
    /* The corpus of a successor has a smaller uid: it was read before. */
    size_t place = status == LOCI_OK ? loci_corpus_place(store, corpus->name, &found) : 0;
    if (status == LOCI_OK && found && corpus->stage == LOCI_CORPUS_INDEXING) {
        load_successor(corpus, store->corpora[place]);
        return LOCI_OK;
    }
    if (found) status = loci_fail(&damage, LOCI_E_CORRUPT, "two are named %s", corpus->name);
    if (status != LOCI_OK) {
        loci_corpus_free(corpus);
        if (status == LOCI_E_NOMEM) return loci_fail(err, status, "%s", damage.text);
        loci_log_error("corpus %016llx cannot be used, its data stays: %s", (unsigned long long)uid,
                       damage.text);
        return LOCI_OK;
    }
    if (corpus->stage == LOCI_CORPUS_INDEXING) {
        /* A reindexing ends in one write and its corpus is deleted together with it: the record of
         * that corpus is one of those that could not be read. All documents are here. */
        loci_log_error("corpus %s: the record of the index that was being replaced cannot be read; "
                       "the new one, %016llx, has all documents and takes its place",
                       corpus->name, (unsigned long long)uid);
        corpus->stage = LOCI_CORPUS_LIVE;
    }
    return load_live(corpus, place, err);
}

loci_status loci_corpora_load(loci_store *store, loci_error *err) {
    LOCI_TRY(load_next(store, err));
    loci_key prefix = {.len = 0};
    loci_key_u8(&prefix, 'c');
    loci_scan *scan = loci_scan_open(store->rocks, NULL, LOCI_CF_CATALOG, &prefix, NULL);
    loci_status status = LOCI_OK;
    loci_slice key;
    while (status == LOCI_OK && loci_scan_next(scan, &key)) {
        if (key.len != 9) continue;
        status = load_corpus(store, loci_key_read_u64(key.data + 1), scan, err);
    }
    loci_status closed = loci_scan_close(scan, status == LOCI_OK ? err : NULL);
    return status != LOCI_OK ? status : closed;
}
