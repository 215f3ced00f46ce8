/* SPDX-License-Identifier: Apache-2.0
 *
 * The corpus object and the table of corpora: creating, finding, listing, changing settings,
 * deleting. catalogue.c fills the table when the store opens.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "memory/internal.h"

/* --- The corpus object ------------------------------------------------------------------ */

loci_corpus *loci_corpus_alloc(loci_store *store, uint64_t uid) {
    loci_corpus *corpus = calloc(1, sizeof *corpus);
    size_t len = strlen(store->dir) + 40;
    char *dir = malloc(len);
    if (!corpus || !dir) {
        free(corpus);
        free(dir);
        return NULL;
    }
    snprintf(dir, len, "%s/extents/%016llx", store->dir, (unsigned long long)uid);
    corpus->extents_dir = dir;
    corpus->store = store;
    corpus->uid = uid;
    atomic_init(&corpus->refs, 1);
    pthread_mutex_init(&corpus->build_lock, NULL);
    pthread_mutex_init(&corpus->lock, NULL);
    return corpus;
}

void loci_corpus_free(loci_corpus *corpus) {
    LOCI_ASSERT(!corpus->snapshots && !corpus->current && !corpus->merging && !corpus->successor);
    for (size_t i = 0; i < corpus->opened_count; i++) loci_extent_unref(corpus->opened[i]);
    if (corpus->sink_buffer)
        corpus->store->backend->ops->free(corpus->store->backend, corpus->sink_buffer);
    loci_manifest_unref(corpus->manifest);
    pthread_mutex_destroy(&corpus->lock);
    pthread_mutex_destroy(&corpus->build_lock);
    free(corpus->opened);
    free(corpus->superseded.ids);
    free(corpus->apart.ids);
    free(corpus->graves);
    free(corpus->pending);
    free(corpus->sinks);
    free(corpus->extents_dir);
    free(corpus);
}

void loci_extents_clean(const char *dir, const loci_manifest *manifest) {
    DIR *listing = opendir(dir);
    if (!listing) return;
    for (struct dirent *entry; (entry = readdir(listing));) {
        if (entry->d_name[0] == '.') continue;
        bool named = false;
        for (uint32_t i = 0; manifest && !named && i < manifest->extent_count; i++) {
            char name[LOCI_EXTENT_NAME_BYTES];
            loci_extent_name(manifest->extents[i].id, name);
            named = strcmp(name, entry->d_name) == 0;
        }
        if (named) continue;
        LOCI_FAILPOINT("unlink");
        if (unlinkat(dirfd(listing), entry->d_name, 0) != 0)
            loci_log_warn("cannot remove %s/%s: %s", dir, entry->d_name, strerror(errno));
    }
    closedir(listing);
}

/* Files first, then values: an interruption is finished at the next open. */
static loci_status erase_corpus(loci_corpus *corpus, loci_error *err) {
    loci_extents_clean(corpus->extents_dir, NULL);
    if (rmdir(corpus->extents_dir) != 0 && errno != ENOENT)
        loci_log_warn("cannot remove %s: %s", corpus->extents_dir, strerror(errno));
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_key prefix = loci_key_uid(corpus->uid);
    loci_batch_delete_prefix(batch, LOCI_CF_DOCUMENT, &prefix);
    loci_batch_delete_prefix(batch, LOCI_CF_NAME, &prefix);
    loci_batch_delete_prefix(batch, LOCI_CF_CHUNK, &prefix);
    loci_batch_delete_prefix(batch, LOCI_CF_FLAT, &prefix);
    loci_batch_delete_prefix(batch, LOCI_CF_TERMS, &prefix);
    static const char kinds[] = {'c', 's', 'm', 'g', 'u', 'q', 't'};
    for (size_t i = 0; i < sizeof kinds; i++) {
        prefix = loci_key_catalog(kinds[i], corpus->uid);
        loci_batch_delete_prefix(batch, LOCI_CF_CATALOG, &prefix);
    }
    loci_status status = loci_batch_write(batch, true, err);
    loci_batch_destroy(batch);
    return status;
}

void loci_corpus_end(loci_corpus *corpus) {
    corpus->deleted = true;
    if (corpus->merging) loci_cancel_request(corpus->merging);
}

void loci_corpus_release(loci_corpus *corpus) {
    if (!corpus || atomic_fetch_sub(&corpus->refs, 1) != 1) return;
    loci_error err;
    if (corpus->deleted && erase_corpus(corpus, &err) != LOCI_OK)
        loci_log_warn("the data of deleted corpus %s goes at the next start: %s", corpus->name,
                      err.text);
    loci_corpus_free(corpus);
}

size_t loci_corpus_place(const loci_store *store, const char *name, bool *found) {
    size_t low = 0, high = store->corpus_count;
    *found = false;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(store->corpora[middle]->name, name);
        if (order == 0) {
            *found = true;
            return middle;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool loci_corpus_insert(loci_store *store, size_t place, loci_corpus *corpus) {
    loci_corpus **grown = realloc(store->corpora, (store->corpus_count + 1) * sizeof *grown);
    if (!grown) return false;
    store->corpora = grown;
    memmove(&grown[place + 1], &grown[place], (store->corpus_count - place) * sizeof *grown);
    grown[place] = corpus;
    store->corpus_count++;
    return true;
}

loci_corpus *loci_corpus_ref(loci_corpus *corpus) {
    atomic_fetch_add(&corpus->refs, 1);
    return corpus;
}

/* Also damaged ones. */
static loci_status acquire_any(loci_store *store, const char *name, loci_corpus **out,
                               loci_error *err) {
    pthread_mutex_lock(&store->lock);
    bool found;
    size_t place = loci_corpus_place(store, name, &found);
    *out = found ? loci_corpus_ref(store->corpora[place]) : NULL;
    pthread_mutex_unlock(&store->lock);
    if (*out) return LOCI_OK;
    return loci_fail(err, LOCI_E_NOTFOUND, "there is no corpus \"%.*s\"", LOCI_NAME_MAX, name);
}

loci_status loci_corpus_acquire(loci_store *store, const char *name, loci_corpus **out,
                                loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(acquire_any(store, name, &corpus, err));
    if (corpus->damage.status != LOCI_OK) {
        if (err) *err = corpus->damage;
        loci_status status = corpus->damage.status;
        loci_corpus_release(corpus);
        return status;
    }
    *out = corpus;
    return LOCI_OK;
}

loci_corpus *loci_corpus_next(loci_store *store, uint64_t after) {
    pthread_mutex_lock(&store->lock);
    loci_corpus *best = NULL;
    for (size_t i = 0; i < store->corpus_count; i++) {
        loci_corpus *both[] = {store->corpora[i], store->corpora[i]->successor};
        for (size_t b = 0; b < 2; b++)
            if (both[b] && both[b]->uid > after && both[b]->damage.status == LOCI_OK &&
                both[b]->stage != LOCI_CORPUS_COPYING && (!best || both[b]->uid < best->uid))
                best = both[b];
    }
    if (best) loci_corpus_ref(best);
    pthread_mutex_unlock(&store->lock);
    return best;
}

void loci_corpus_fill_info(const loci_corpus *corpus, loci_corpus_info *out) {
    memset(out, 0, sizeof *out);
    memcpy(out->name, corpus->name, sizeof out->name);
    out->geometry = corpus->geometry;
    out->settings = corpus->settings;
    out->uid = corpus->uid;
    out->created = corpus->created;
    out->documents = corpus->documents;
    out->bytes = corpus->bytes;
    out->pending_documents = corpus->pending_end - corpus->pending_first;
    loci_corpus *successor = corpus->successor;
    if (successor && successor->damage.status == LOCI_OK) {
        out->reindexing = true;
        pthread_mutex_lock(&successor->lock);
        memcpy(out->reindex_fingerprint, successor->geometry.fingerprint, LOCI_FINGERPRINT_LEN);
        if (successor->stage == LOCI_CORPUS_INDEXING)
            out->reindex_documents =
                successor->documents - (successor->pending_end - successor->pending_first);
        out->reindex_tokens = successor->manifest->live_tokens;
        pthread_mutex_unlock(&successor->lock);
    }
    const loci_manifest *manifest = corpus->manifest;
    if (!manifest) return; /* damaged */
    out->revision = manifest->revision;
    out->segments = manifest->live_segments;
    out->tokens = manifest->live_tokens;
    out->extents = manifest->extent_count;
    loci_rebuild_plan plan;
    out->merged = out->pending_documents == 0 && corpus->apart.count == 0 &&
                  !loci_rebuild_due(manifest, corpus->extent_tokens_max, LOCI_TAIL_KEEP, &plan) &&
                  !loci_merge_due(manifest, corpus->extent_tokens_max,
                                  loci_corpus_merge_tokens(corpus), true, &corpus->apart, &plan);
    out->bytes_on_disk =
        manifest->file_bytes + manifest->flat_tokens * loci_geometry_kv_bytes(&corpus->geometry);
}

loci_status loci_corpus_prepare(loci_corpus *corpus, loci_error *err) {
    corpus->extent_tokens_max = loci_extent_tokens_max(&corpus->geometry, &corpus->store->options);
    if (corpus->sink_floats == 0) return LOCI_OK;
    loci_backend *backend = corpus->store->backend;
    return backend->ops->wrap(backend, corpus->sinks, corpus->sink_floats * sizeof(float),
                              &corpus->sink_buffer, err);
}

/* --- Public ----------------------------------------------------------------------------- */

static bool name_valid(const char *name) {
    size_t len = strlen(name);
    if (len == 0 || len > LOCI_NAME_MAX) return false;
    for (size_t i = 0; i < len; i++) {
        char c = name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        if (!letter && (i == 0 || (c != '-' && c != '_'))) return false;
    }
    return true;
}

bool loci_corpus_store(const loci_corpus *corpus, loci_corpus_stage stage, loci_batch *batch) {
    loci_buf record = LOCI_BUF_INIT;
    loci_corpus_encode(corpus, stage, &record);
    bool good = loci_buf_status(&record) == LOCI_OK;
    loci_key key = loci_key_catalog('c', corpus->uid);
    if (good)
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_CORPUS,
                       loci_slice_of(record.data, record.len));
    loci_buf_fini(&record);
    return good;
}

static loci_status write_new(loci_corpus *corpus, loci_error *err) {
    loci_store *store = corpus->store;
    loci_buf manifest = LOCI_BUF_INIT;
    loci_manifest_encode(corpus->manifest, &manifest);
    loci_batch *batch = loci_batch_create(store->rocks);
    loci_status status = LOCI_E_NOMEM;
    if (!manifest.failed && loci_corpus_store(corpus, corpus->stage, batch)) {
        loci_key key = loci_key_catalog('m', corpus->uid);
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_MANIFEST,
                       loci_slice_of(manifest.data, manifest.len));
        loci_state_store(corpus, 0, 0, 0, batch);
        status = loci_catalog_next(corpus->uid + 1, store->upload_limit, batch);
    }
    if (status == LOCI_OK)
        status = loci_batch_write(batch, true, err);
    else
        loci_fail(err, status, "no memory for corpus %s", corpus->name);
    loci_batch_destroy(batch);
    loci_buf_fini(&manifest);
    return status;
}

loci_status loci_corpus_make(loci_store *store, const char *name, const loci_geometry *geometry,
                             const loci_corpus_settings *settings, const float *sink_k,
                             const float *sink_v, loci_corpus_stage stage, int64_t created,
                             uint64_t revision, loci_corpus **out, loci_error *err) {
    loci_corpus *corpus = loci_corpus_alloc(store, store->next_uid);
    loci_status status = LOCI_E_NOMEM;
    if (!corpus) return loci_fail(err, status, "no memory for corpus %s", name);
    memcpy(corpus->name, name, strlen(name) + 1);
    corpus->geometry = *geometry;
    corpus->settings = *settings;
    corpus->created = created;
    corpus->stage = stage;
    corpus->manifest = loci_manifest_create(geometry->fingerprint);
    corpus->sink_floats = loci_sink_floats(geometry);
    if (corpus->sink_floats) corpus->sinks = malloc(corpus->sink_floats * sizeof(float));
    if (!corpus->manifest || (corpus->sink_floats && !corpus->sinks)) {
        loci_fail(err, status, "no memory for corpus %s", name);
        goto fail;
    }
    corpus->manifest->revision = revision;
    if (corpus->sinks) {
        size_t half = corpus->sink_floats / 2;
        memcpy(corpus->sinks, sink_k, half * sizeof(float));
        memcpy(corpus->sinks + half, sink_v, half * sizeof(float));
    }
    LOCI_TRY_GOTO(loci_corpus_prepare(corpus, err), fail);
    LOCI_TRY_GOTO(write_new(corpus, err), fail);
    store->next_uid = corpus->uid + 1;
    *out = corpus;
    return LOCI_OK;
fail:
    loci_corpus_free(corpus);
    return status;
}

static loci_status create_at(loci_store *store, size_t place, const char *name,
                             const loci_geometry *geometry, const loci_corpus_settings *settings,
                             const float *sink_k, const float *sink_v, loci_corpus_info *out,
                             loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_make(store, name, geometry, settings, sink_k, sink_v, LOCI_CORPUS_LIVE,
                              loci_wall_seconds(), 1, &corpus, err));
    loci_corpus_fill_info(corpus, out);
    if (loci_corpus_insert(store, place, corpus)) return LOCI_OK;
    loci_corpus_free(corpus);
    return loci_fail(err, LOCI_E_NOMEM, "no memory for corpus %s", name);
}

loci_status loci_corpus_create(loci_store *store, const char *name, const loci_geometry *geometry,
                               const loci_corpus_settings *settings, const float *sink_k,
                               const float *sink_v, loci_corpus_info *out, loci_error *err) {
    loci_corpus_settings defaults;
    loci_corpus_settings_default(&defaults);
    if (!settings) settings = &defaults;
    if (!name_valid(name))
        return loci_fail(err, LOCI_E_INVAL,
                         "\"%.*s\" is not a corpus name: 1 to %d of a-z 0-9 - _, the first a "
                         "letter or digit",
                         LOCI_NAME_MAX + 1, name, LOCI_NAME_MAX);
    if (!loci_geometry_valid(geometry) || geometry->has_sink != (sink_k && sink_v))
        return loci_fail(err, LOCI_E_INVAL, "corpus %s: the model's geometry is out of range",
                         name);
    LOCI_TRY(loci_corpus_settings_check(settings, geometry, err));
    pthread_mutex_lock(&store->lock);
    bool found;
    loci_status status;
    size_t place = loci_corpus_place(store, name, &found);
    if (found) {
        loci_corpus *corpus = store->corpora[place];
        pthread_mutex_lock(&corpus->lock);
        loci_corpus_fill_info(corpus, out);
        pthread_mutex_unlock(&corpus->lock);
        status = loci_fail(err, LOCI_E_EXISTS, "there is already a corpus %s", name);
    } else {
        status = create_at(store, place, name, geometry, settings, sink_k, sink_v, out, err);
    }
    pthread_mutex_unlock(&store->lock);
    return status;
}

loci_status loci_corpus_get(loci_store *store, const char *name, loci_corpus_info *out,
                            loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(store, name, &corpus, err));
    pthread_mutex_lock(&corpus->lock);
    loci_corpus_fill_info(corpus, out);
    pthread_mutex_unlock(&corpus->lock);
    loci_corpus_release(corpus);
    return LOCI_OK;
}

/* Writes the catalogue value as the corpus is now; caller holds corpus->lock. */
static loci_status write_record(loci_corpus *corpus, loci_error *err) {
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_status status = LOCI_E_NOMEM;
    if (loci_corpus_store(corpus, corpus->stage, batch))
        status = loci_batch_write(batch, true, err);
    else
        loci_fail(err, status, "no memory for the record of corpus %s", corpus->name);
    loci_batch_destroy(batch);
    return status;
}

/* Caller holds corpus->lock. */
static loci_status change_settings(loci_corpus *corpus, const loci_settings_change *change,
                                   loci_error *err) {
    loci_corpus_settings before = corpus->settings, next = before;
    loci_corpus_settings_apply(change, &next);
    LOCI_TRY(loci_corpus_settings_check(&next, &corpus->geometry, err));
    LOCI_TRY(loci_corpus_changeable(corpus, err));
    corpus->settings = next;
    loci_status status = write_record(corpus, err);
    if (status != LOCI_OK) corpus->settings = before;
    return status;
}

loci_status loci_corpus_set(loci_store *store, const char *name, uint64_t uid,
                            const loci_settings_change *change, loci_corpus_info *out,
                            loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_snapshot *stale = NULL;
    loci_status status;
    LOCI_TRY(loci_corpus_acquire(store, name, &corpus, err));
    pthread_mutex_lock(&corpus->lock);
    if (uid != 0 && uid != corpus->uid)
        status = loci_fail(err, LOCI_E_ABORTED,
                           "corpus %s was made anew meanwhile; its settings stay", name);
    else
        status = change_settings(corpus, change, err);
    if (status == LOCI_OK) {
        stale = corpus->current; /* it has the settings of before */
        corpus->current = NULL;
    }
    loci_corpus_fill_info(corpus, out);
    pthread_mutex_unlock(&corpus->lock);
    loci_snapshot_release(stale);
    loci_corpus_release(corpus);
    return status;
}

loci_status loci_corpus_manifest_hash(loci_store *store, const char *name, char out[33],
                                      loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(store, name, &corpus, err));
    loci_manifest *manifest = loci_corpus_manifest(corpus);
    uint8_t hash[LOCI_EXTENT_ID_BYTES];
    bool done = loci_manifest_hash(manifest, hash);
    loci_manifest_unref(manifest);
    loci_corpus_release(corpus);
    if (!done) return loci_fail(err, LOCI_E_NOMEM, "no memory to hash the manifest of %s", name);
    loci_extent_name(hash, out); /* as hexadecimal */
    return LOCI_OK;
}

loci_status loci_corpus_list(loci_store *store, const char *after, size_t limit,
                             loci_corpus_info *out, size_t *count, loci_error *err) {
    (void)err;
    pthread_mutex_lock(&store->lock);
    bool found;
    size_t place = loci_corpus_place(store, after, &found);
    if (found) place++;
    *count = 0;
    for (; place < store->corpus_count && *count < limit; place++) {
        loci_corpus *corpus = store->corpora[place];
        pthread_mutex_lock(&corpus->lock);
        loci_corpus_fill_info(corpus, &out[(*count)++]);
        pthread_mutex_unlock(&corpus->lock);
    }
    pthread_mutex_unlock(&store->lock);
    return LOCI_OK;
}

/* Marks the corpus and its successor deleted on disk and in memory; caller holds store->lock.
 * *successor: its reference. */
static loci_status mark_deleted(loci_corpus *corpus, loci_snapshot **current,
                                loci_corpus **successor, loci_error *err) {
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&corpus->lock);
    *successor = corpus->successor;
    if (!loci_corpus_store(corpus, LOCI_CORPUS_DELETED, batch) ||
        (*successor && !loci_corpus_store(*successor, LOCI_CORPUS_DELETED, batch)))
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to delete %s", corpus->name);
    LOCI_FAILPOINT("delete_commit");
    if (status == LOCI_OK) status = loci_batch_write(batch, true, err);
    LOCI_FAILPOINT("delete_commit");
    if (status == LOCI_OK) {
        loci_corpus_end(corpus);
        *current = corpus->current;
        corpus->current = NULL;
        corpus->successor = NULL;
    } else {
        *successor = NULL;
    }
    pthread_mutex_unlock(&corpus->lock);
    if (*successor) {
        pthread_mutex_lock(&(*successor)->lock);
        loci_corpus_end(*successor);
        pthread_mutex_unlock(&(*successor)->lock);
    }
    loci_batch_destroy(batch);
    return status;
}

loci_status loci_corpus_delete(loci_store *store, const char *name, loci_error *err) {
    loci_corpus *corpus = NULL, *successor = NULL;
    loci_snapshot *current = NULL;
    LOCI_TRY(acquire_any(store, name, &corpus, err));
    pthread_mutex_lock(&store->lock);
    bool found;
    size_t place = loci_corpus_place(store, name, &found);
    loci_status status = LOCI_E_NOTFOUND;
    if (found && store->corpora[place] == corpus)
        status = mark_deleted(corpus, &current, &successor, err);
    else
        loci_fail(err, status, "there is no corpus \"%s\"", name);
    if (status == LOCI_OK) {
        store->corpus_count--;
        memmove(&store->corpora[place], &store->corpora[place + 1],
                (store->corpus_count - place) * sizeof *store->corpora);
    }
    pthread_mutex_unlock(&store->lock);
    loci_snapshot_release(current);
    loci_corpus_release(successor);
    if (status == LOCI_OK) loci_corpus_release(corpus); /* the table's */
    loci_corpus_release(corpus);
    return status;
}
