/* SPDX-License-Identifier: Apache-2.0
 *
 * Changes of a corpus: one new revision, written in one atomic RocksDB write; the list of
 * pending documents; and the removal of what no revision needs any more. See internal.h.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "memory/internal.h"
#include "memory/lexical.h"
#include "memory/snapshot.h"

/* --- Pending documents ------------------------------------------------------------------ */

/* First place whose sequence is >= sequence. */
static size_t pending_place(const loci_corpus *corpus, uint64_t sequence) {
    if (corpus->pending_first == corpus->pending_end) return corpus->pending_first;
    const uint64_t *pending = corpus->pending + corpus->pending_first;
    size_t count = corpus->pending_end - corpus->pending_first;
    return corpus->pending_first + loci_sequence_place(pending, count, sizeof *pending, sequence);
}

bool loci_pending_push(loci_corpus *corpus, uint64_t sequence) {
    if (corpus->pending_end == corpus->pending_capacity) {
        size_t count = corpus->pending_end - corpus->pending_first;
        if (corpus->pending_first > count) {
            memmove(corpus->pending, corpus->pending + corpus->pending_first,
                    count * sizeof *corpus->pending);
            corpus->pending_first = 0;
            corpus->pending_end = count;
        } else {
            size_t capacity = corpus->pending_capacity ? 2 * corpus->pending_capacity : 64;
            uint64_t *grown = realloc(corpus->pending, capacity * sizeof *grown);
            if (!grown) return false;
            corpus->pending = grown;
            corpus->pending_capacity = capacity;
        }
    }
    corpus->pending[corpus->pending_end++] = sequence;
    return true;
}

bool loci_pending_has(const loci_corpus *corpus, uint64_t sequence) {
    size_t place = pending_place(corpus, sequence);
    return place < corpus->pending_end && corpus->pending[place] == sequence;
}

void loci_pending_erase(loci_corpus *corpus, uint64_t sequence) {
    size_t place = pending_place(corpus, sequence);
    if (place == corpus->pending_end || corpus->pending[place] != sequence) return;
    if (place == corpus->pending_first) {
        corpus->pending_first++;
        return;
    }
    corpus->pending_end--;
    memmove(corpus->pending + place, corpus->pending + place + 1,
            (corpus->pending_end - place) * sizeof *corpus->pending);
}

uint64_t loci_pending_next(const loci_corpus *corpus, uint64_t from) {
    size_t place = pending_place(corpus, from);
    return place < corpus->pending_end ? corpus->pending[place] : 0;
}

/* --- Opened extents ------------------------------------------------------------------------ */

static loci_extent *find_opened(const loci_corpus *corpus, const uint8_t *id) {
    for (size_t i = 0; i < corpus->opened_count; i++)
        if (memcmp(corpus->opened[i]->id, id, LOCI_EXTENT_ID_BYTES) == 0)
            return loci_extent_ref(corpus->opened[i]);
    return NULL;
}

loci_status loci_corpus_extent(loci_corpus *corpus, const loci_manifest_extent *entry,
                               loci_extent **out, loci_error *err) {
    pthread_mutex_lock(&corpus->lock);
    *out = find_opened(corpus, entry->id);
    pthread_mutex_unlock(&corpus->lock);
    if (*out) return LOCI_OK;
    loci_extent *extent = NULL;
    loci_status status = loci_extent_open(corpus->extents_dir, &corpus->geometry, entry,
                                          corpus->store->backend, &extent, err);
    if (status == LOCI_E_UNSUPPORTED)
        return loci_fail_prefix(err, status, "\"loci corpus reindex %s\" makes its index anew",
                                corpus->name);
    LOCI_TRY(status);
    pthread_mutex_lock(&corpus->lock);
    *out = find_opened(corpus, entry->id);
    if (*out) {
        pthread_mutex_unlock(&corpus->lock);
        loci_extent_unref(extent);
        return LOCI_OK;
    }
    loci_extent **grown =
        realloc(corpus->opened, (corpus->opened_count + 1) * sizeof *corpus->opened);
    if (grown) {
        corpus->opened = grown;
        grown[corpus->opened_count++] = loci_extent_ref(extent);
    }
    pthread_mutex_unlock(&corpus->lock);
    *out = extent; /* without memory for the list it is opened again next time */
    return LOCI_OK;
}

/* --- Purging ---------------------------------------------------------------------------- */

static bool extent_needed(const loci_corpus *corpus, const uint8_t *id) {
    return loci_manifest_names(corpus->manifest, id) ||
           (corpus->snapshot_manifest && loci_manifest_names(corpus->snapshot_manifest, id)) ||
           (corpus->building[0] && memcmp(corpus->building_id[0], id, LOCI_EXTENT_ID_BYTES) == 0) ||
           (corpus->building[1] && memcmp(corpus->building_id[1], id, LOCI_EXTENT_ID_BYTES) == 0);
}

/* When that fails, the next open does it. */
static void drop_terms(const loci_corpus *corpus, const uint8_t *id) {
    loci_error err;
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_lexical_drop(corpus, id, batch);
    if (loci_batch_write(batch, false, &err) != LOCI_OK)
        loci_log_warn("an index of words of corpus %s goes later: %s", corpus->name, err.text);
    loci_batch_destroy(batch);
}

/* What is taken away without the lock: to unmap and unlink gigabytes takes long. */
typedef struct purged {
    loci_extent **extents; /* each holds one reference */
    size_t extent_count;
    loci_id_list gone; /* files that have been renamed */
} purged;

/* Takes over the reference. */
static void take_extent(purged *out, loci_extent *extent) {
    void *grown = realloc(out->extents, (out->extent_count + 1) * sizeof(loci_extent *));
    if (!grown) {
        loci_extent_unref(extent);
        return;
    }
    out->extents = grown;
    out->extents[out->extent_count++] = extent;
}

static bool add_id(loci_id_list *list, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    void *grown = realloc(list->ids, (list->count + 1) * sizeof *list->ids);
    if (!grown) return false;
    list->ids = grown;
    memcpy(list->ids[list->count++], id, LOCI_EXTENT_ID_BYTES);
    return true;
}

void loci_corpus_set_apart(loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    pthread_mutex_lock(&corpus->lock);
    (void)add_id(&corpus->apart, id); /* without memory: merges wait */
    pthread_mutex_unlock(&corpus->lock);
}

static void path_of(const loci_corpus *corpus, const uint8_t *id, const char *end,
                    char path[LOCI_PATH_BYTES]) {
    char name[LOCI_EXTENT_NAME_BYTES];
    loci_extent_name(id, name);
    snprintf(path, LOCI_PATH_BYTES, "%s/%s%s", corpus->extents_dir, name, end);
}

static void unlink_file(const char *path) {
    if (unlink(path) != 0 && errno != ENOENT)
        loci_log_warn("cannot remove %s: %s", path, strerror(errno));
}

/* Caller holds the lock. The name is free at once, for a file of the same content. */
static void take_file(const loci_corpus *corpus, const uint8_t *id, purged *out) {
    char path[LOCI_PATH_BYTES], gone[LOCI_PATH_BYTES];
    path_of(corpus, id, "", path);
    path_of(corpus, id, ".gone", gone);
    LOCI_FAILPOINT("unlink");
    if (!add_id(&out->gone, id))
        unlink_file(path);
    else if (rename(path, gone) != 0 && errno != ENOENT)
        loci_log_warn("cannot remove %s: %s", path, strerror(errno));
    LOCI_FAILPOINT("unlink");
}

/* Caller holds the lock. */
static void purge_files(loci_corpus *corpus, purged *out) {
    size_t kept = 0;
    for (size_t i = 0; i < corpus->opened_count; i++) {
        loci_extent *extent = corpus->opened[i];
        if (atomic_load(&extent->refs) == 1 && !extent_needed(corpus, extent->id))
            take_extent(out, extent);
        else
            corpus->opened[kept++] = extent;
    }
    corpus->opened_count = kept;
    loci_id_list *list = &corpus->superseded;
    kept = 0;
    for (size_t i = 0; i < list->count; i++) {
        loci_extent *opened = find_opened(corpus, list->ids[i]);
        loci_extent_unref(opened);
        if (opened) {
            memmove(list->ids[kept++], list->ids[i], LOCI_EXTENT_ID_BYTES);
            continue;
        }
        /* Needed again under the same identity: the file stays, the entry goes. */
        if (extent_needed(corpus, list->ids[i])) continue;
        take_file(corpus, list->ids[i], out);
        drop_terms(corpus, list->ids[i]);
    }
    list->count = kept;
}

/* Without the lock. */
static void finish_purge(const loci_corpus *corpus, purged *out) {
    for (size_t i = 0; i < out->extent_count; i++) loci_extent_unref(out->extents[i]);
    for (size_t i = 0; i < out->gone.count; i++) {
        char gone[LOCI_PATH_BYTES];
        path_of(corpus, out->gone.ids[i], ".gone", gone);
        LOCI_FAILPOINT("unlink");
        unlink_file(gone);
    }
    free(out->extents);
    free(out->gone.ids);
}

static void delete_document(const loci_corpus *corpus, const loci_grave *grave, loci_batch *batch) {
    loci_key key = loci_key_pair(corpus->uid, grave->sequence);
    loci_batch_delete(batch, LOCI_CF_DOCUMENT, &key);
    loci_key_u8(&key, 'm');
    loci_batch_delete(batch, LOCI_CF_DOCUMENT, &key);
    for (uint32_t i = 0; i < grave->chunks; i++) {
        key = loci_key_pair(corpus->uid, grave->upload);
        loci_key_u32(&key, i);
        loci_batch_delete(batch, LOCI_CF_CHUNK, &key);
    }
    key = loci_key_catalog2('g', corpus->uid, grave->sequence);
    loci_batch_delete(batch, LOCI_CF_CATALOG, &key);
}

/* Caller holds the lock. */
static void purge_graves(loci_corpus *corpus) {
    uint64_t oldest = loci_snapshots_oldest(corpus->snapshots);
    if (corpus->snapshot_manifest && corpus->snapshot_manifest->revision < oldest)
        oldest = corpus->snapshot_manifest->revision;
    loci_batch *batch = NULL;
    size_t kept = 0;
    for (size_t i = 0; i < corpus->grave_count; i++) {
        if (corpus->graves[i].revision > oldest) kept++;
    }
    if (kept == corpus->grave_count) return;
    batch = loci_batch_create(corpus->store->rocks);
    for (size_t i = 0; i < corpus->grave_count; i++)
        if (corpus->graves[i].revision <= oldest)
            delete_document(corpus, &corpus->graves[i], batch);
    loci_error err;
    if (loci_batch_write(batch, false, &err) != LOCI_OK) {
        loci_log_warn("deleted documents of corpus %s go later: %s", corpus->name, err.text);
    } else {
        kept = 0;
        for (size_t i = 0; i < corpus->grave_count; i++)
            if (corpus->graves[i].revision > oldest) corpus->graves[kept++] = corpus->graves[i];
        corpus->grave_count = kept;
    }
    loci_batch_destroy(batch);
}

void loci_corpus_purge(loci_corpus *corpus) {
    purged out = {0};
    pthread_mutex_lock(&corpus->lock);
    if (!corpus->deleted) { /* else everything goes with the corpus */
        purge_files(corpus, &out);
        purge_graves(corpus);
    }
    pthread_mutex_unlock(&corpus->lock);
    finish_purge(corpus, &out);
}

/* --- Changes ---------------------------------------------------------------------------- */

loci_status loci_change_begin(loci_corpus *corpus, loci_change *out, loci_error *err) {
    memset(out, 0, sizeof *out);
    if (corpus->deleted)
        return loci_fail(err, LOCI_E_NOTFOUND, "corpus %s was deleted", corpus->name);
    out->next = loci_manifest_clone(corpus->manifest);
    if (!out->next) return loci_fail(err, LOCI_E_NOMEM, "no memory to change %s", corpus->name);
    out->corpus = corpus;
    out->batch = loci_batch_create(corpus->store->rocks);
    return LOCI_OK;
}

void loci_change_abort(loci_change *change) {
    loci_batch_destroy(change->batch);
    loci_manifest_unref(change->next);
    free(change->buried);
    free(change->done);
    memset(change, 0, sizeof *change);
}

static void bury_flats(loci_change *change, uint64_t sequence) {
    loci_manifest *next = change->next;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < next->flat_count; i++) {
        if (next->flats[i].sequence != sequence) {
            next->flats[kept++] = next->flats[i];
            continue;
        }
        loci_key key = loci_key_pair(change->corpus->uid, next->flats[i].number);
        loci_batch_delete(change->batch, LOCI_CF_FLAT, &key);
    }
    next->flat_count = kept;
}

void loci_change_drop(loci_change *change, uint64_t sequence) {
    loci_manifest_bury(change->next, sequence);
    bury_flats(change, sequence);
}

static loci_status bury_one(loci_change *change, loci_document *document, loci_error *err) {
    loci_grave *grown =
        realloc(change->buried, (change->buried_count + 1) * sizeof *change->buried);
    if (!grown) return loci_fail(err, LOCI_E_NOMEM, "no memory to delete a document");
    change->buried = grown;
    grown[change->buried_count++] =
        (loci_grave){document->sequence, document->upload, 0, document->chunks};
    document->dead = true;
    loci_document_store(change->corpus, document, change->batch);
    uint8_t bytes[12];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(document->upload >> (8 * i));
    for (int i = 0; i < 4; i++) bytes[8 + i] = (uint8_t)(document->chunks >> (8 * i));
    loci_key key = loci_key_catalog2('g', change->corpus->uid, document->sequence);
    loci_batch_put(change->batch, LOCI_CF_CATALOG, &key, LOCI_KIND_GRAVE,
                   loci_slice_of(bytes, sizeof bytes));
    loci_change_drop(change, document->sequence);
    return LOCI_OK;
}

loci_status loci_change_bury(loci_change *change, uint64_t sequence, loci_error *err) {
    while (sequence != 0) {
        for (size_t i = 0; i < change->buried_count; i++)
            if (change->buried[i].sequence == sequence) return LOCI_OK;
        loci_document document;
        loci_status status = loci_document_load(change->corpus, NULL, sequence, &document, err);
        if (status == LOCI_E_NOTFOUND || (status == LOCI_OK && document.dead)) return LOCI_OK;
        LOCI_TRY(status);
        LOCI_TRY(bury_one(change, &document, err));
        LOCI_TRY(loci_change_done(change, sequence, err));
        sequence = document.replaces;
    }
    return LOCI_OK;
}

loci_status loci_change_done(loci_change *change, uint64_t sequence, loci_error *err) {
    uint64_t *grown = realloc(change->done, (change->done_count + 1) * sizeof *change->done);
    if (!grown) return loci_fail(err, LOCI_E_NOMEM, "no memory to change a corpus");
    change->done = grown;
    grown[change->done_count++] = sequence;
    return LOCI_OK;
}

void loci_corpus_supersede(loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    (void)add_id(&corpus->superseded, id);
}

/* Files of the old manifest that the new one does not name. */
static void note_superseded(loci_corpus *corpus, const loci_manifest *old,
                            const loci_manifest *next) {
    for (uint32_t i = 0; i < old->extent_count; i++)
        if (!loci_manifest_names(next, old->extents[i].id))
            loci_corpus_supersede(corpus, old->extents[i].id);
}

/* After the write: nothing here can fail. */
static void apply(loci_change *change) {
    loci_corpus *corpus = change->corpus;
    loci_manifest *old = corpus->manifest;
    note_superseded(corpus, old, change->next);
    corpus->manifest = change->next;
    change->next = NULL;
    for (size_t i = 0; i < change->done_count; i++) loci_pending_erase(corpus, change->done[i]);
    for (size_t i = 0; i < change->buried_count; i++) {
        change->buried[i].revision = corpus->manifest->revision;
        corpus->graves[corpus->grave_count++] = change->buried[i];
    }
    change->stale = corpus->current;
    corpus->current = NULL;
    loci_manifest_unref(old);
}

static bool reserve_graves(loci_corpus *corpus, size_t more) {
    size_t need = corpus->grave_count + more;
    if (need <= corpus->grave_capacity) return true;
    size_t capacity = corpus->grave_capacity ? corpus->grave_capacity : 64;
    while (capacity < need) capacity *= 2;
    loci_grave *grown = realloc(corpus->graves, capacity * sizeof *grown);
    if (!grown) return false;
    corpus->graves = grown;
    corpus->grave_capacity = capacity;
    return true;
}

loci_status loci_change_commit(loci_change *change, const char *failpoint, loci_error *err) {
    loci_corpus *corpus = change->corpus;
    loci_buf payload = LOCI_BUF_INIT;
    loci_status status = LOCI_E_NOMEM;
    change->next->revision++;
    loci_manifest_sum(change->next);
    loci_manifest_encode(change->next, &payload);
    if (payload.failed || !reserve_graves(corpus, change->buried_count)) {
        loci_fail(err, status, "no memory to change corpus %s", corpus->name);
        goto out;
    }
    loci_key key = loci_key_catalog('m', corpus->uid);
    loci_batch_put(change->batch, LOCI_CF_CATALOG, &key, LOCI_KIND_MANIFEST,
                   loci_slice_of(payload.data, payload.len));
    LOCI_FAILPOINT(failpoint);
    status = loci_batch_write(change->batch, true, err);
    LOCI_FAILPOINT(failpoint);
    if (status == LOCI_OK) apply(change);
out:
    loci_buf_fini(&payload);
    loci_snapshot *stale = change->stale;
    loci_change_abort(change); /* frees what is left */
    change->stale = stale;
    change->corpus = corpus;
    return status;
}

void loci_change_after(loci_change *change) {
    loci_snapshot *stale = change->stale;
    change->stale = NULL;
    loci_snapshot_release(stale);
    loci_corpus_purge(change->corpus);
}
