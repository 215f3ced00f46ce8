/* SPDX-License-Identifier: Apache-2.0
 *
 * Reindexing: a corpus gets a successor, which holds the same documents under the geometry of
 * another model (or of this program's layout), is indexed as any corpus is, and takes its place.
 *
 *   COPYING   its documents are coming; a process that ends now leaves nothing (the next open
 *             removes it)
 *   INDEXING  they are all there, verified; the ingest thread works on it, over any restart
 *   LIVE      one write has named it instead of the old one, which goes when its last snapshot does
 *
 * Documents keep their sequence numbers, so whoever waits for one to become searchable finds it in
 * either. From the moment when there is a successor until there is none the corpus takes no
 * documents and loses none: what was copied is what there is.
 */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>

#include "base/log.h"
#include "memory/internal.h"

#define BATCH_BYTES (1u << 20) /* written at a time; and one chunk */

/* --- Copying the documents ------------------------------------------------------------------ */

typedef struct copying {
    loci_corpus *from, *to;
    const loci_view *view; /* of `from`, which does not change but for dead documents that go */
    const loci_reindex_watch *watch;
    loci_batch *batch;
    size_t batch_bytes;
    uint8_t *raw; /* one chunk */
    XXH3_state_t *hash;
} copying;

/* A value under the key of the same document in the successor. */
static loci_key moved(const copying *c, const loci_key *key) {
    loci_key out = loci_key_uid(c->to->uid);
    memcpy(out.data + out.len, key->data + out.len, key->len - out.len);
    out.len = key->len;
    return out;
}

static loci_status write_batch(copying *c, loci_error *err) {
    LOCI_FAILPOINT("reindex_copy");
    LOCI_TRY(loci_batch_write(c->batch, false, err));
    LOCI_FAILPOINT("reindex_copy");
    loci_batch_destroy(c->batch);
    c->batch = loci_batch_create(c->from->store->rocks);
    c->batch_bytes = 0;
    if (loci_cancel_check(c->watch->cancel) != LOCI_OK)
        return loci_fail(err, LOCI_E_CANCELLED, "reindexing corpus %s was stopped", c->from->name);
    pthread_mutex_lock(&c->to->lock);
    bool given_up = c->to->deleted;
    uint64_t documents = c->to->documents;
    pthread_mutex_unlock(&c->to->lock);
    if (given_up)
        return loci_fail(err, LOCI_E_ABORTED, "reindexing corpus %s was given up", c->from->name);
    return c->watch->on_copied ? c->watch->on_copied(c->watch->ctx, documents, err) : LOCI_OK;
}

static loci_status put(copying *c, loci_family family, const loci_key *key, uint32_t kind,
                       loci_slice payload, loci_error *err) {
    loci_batch_put(c->batch, family, key, kind, payload);
    c->batch_bytes += key->len + payload.len + LOCI_ENVELOPE_BYTES;
    return c->batch_bytes < BATCH_BYTES ? LOCI_OK : write_batch(c, err);
}

static loci_status copy_chunk(copying *c, const loci_document *document, uint32_t index,
                              loci_error *err) {
    loci_key key = loci_key_pair(c->from->uid, document->upload);
    loci_key_u32(&key, index);
    loci_value *value = NULL;
    loci_slice payload = {0};
    uint64_t left = document->bytes - (uint64_t)index * LOCI_CHUNK_BYTES;
    size_t expected = left < LOCI_CHUNK_BYTES ? (size_t)left : LOCI_CHUNK_BYTES;
    loci_status status = loci_rocks_pin(c->from->store->rocks, c->view, LOCI_CF_CHUNK, &key,
                                        LOCI_KIND_CHUNK, &value, &payload, err);
    if (status == LOCI_E_NOTFOUND) return loci_fail(err, LOCI_E_CORRUPT, "chunk %u is gone", index);
    LOCI_TRY(status);
    if (payload.len < 4 ||
        ZSTD_decompress(c->raw, expected, payload.data + 4, payload.len - 4) != expected)
        status = loci_fail(err, LOCI_E_CORRUPT, "chunk %u does not decompress", index);
    if (status == LOCI_OK) {
        XXH3_128bits_update(c->hash, c->raw, expected);
        loci_key to = moved(c, &key);
        status = put(c, LOCI_CF_CHUNK, &to, LOCI_KIND_CHUNK, payload, err);
    }
    loci_value_free(value);
    return status;
}

static loci_status copy_metadata(copying *c, uint64_t sequence, loci_error *err) {
    loci_key key = loci_key_pair(c->from->uid, sequence);
    loci_key_u8(&key, 'm');
    loci_value *value = NULL;
    loci_slice payload = {0};
    loci_status status = loci_rocks_pin(c->from->store->rocks, c->view, LOCI_CF_DOCUMENT, &key,
                                        LOCI_KIND_METADATA, &value, &payload, err);
    if (status == LOCI_E_NOTFOUND) return LOCI_OK; /* none was given */
    LOCI_TRY(status);
    loci_key to = moved(c, &key);
    status = put(c, LOCI_CF_DOCUMENT, &to, LOCI_KIND_METADATA, payload, err);
    loci_value_free(value);
    return status;
}

static loci_status copy_document(copying *c, loci_document *document, loci_error *err) {
    XXH128_canonical_t canonical;
    XXH3_128bits_reset(c->hash);
    for (uint32_t i = 0; i < document->chunks; i++) LOCI_TRY(copy_chunk(c, document, i, err));
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(c->hash));
    if (memcmp(canonical.digest, document->content, sizeof document->content) != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "the text is not the one that was registered");
    LOCI_TRY(copy_metadata(c, document->sequence, err));
    loci_key from = loci_key_uid(c->from->uid);
    loci_key_text(&from, document->id);
    loci_key to = moved(c, &from);
    uint8_t sequence[8];
    for (int i = 0; i < 8; i++) sequence[i] = (uint8_t)(document->sequence >> (8 * i));
    LOCI_TRY(put(c, LOCI_CF_NAME, &to, LOCI_KIND_NAME, loci_slice_of(sequence, 8), err));
    document->replaces = document->tokens = document->segments = 0;
    loci_document_store(c->to, document, c->batch);
    c->batch_bytes += LOCI_DOCUMENT_ID_MAX;
    pthread_mutex_lock(&c->to->lock); /* figures are shown meanwhile */
    bool pushed = loci_pending_push(c->to, document->sequence);
    c->to->last_sequence = document->sequence;
    c->to->documents++;
    c->to->bytes += document->bytes;
    pthread_mutex_unlock(&c->to->lock);
    if (pushed) return LOCI_OK;
    return loci_fail(err, LOCI_E_NOMEM, "no memory to reindex corpus %s", c->from->name);
}

/* The newest document of each id, in order of registration. */
static loci_status copy_documents(copying *c, loci_error *err) {
    loci_rocks *rocks = c->from->store->rocks;
    loci_key prefix = loci_key_uid(c->from->uid);
    loci_scan *scan = loci_scan_open(rocks, c->view, LOCI_CF_DOCUMENT, &prefix, NULL);
    loci_status status = LOCI_OK;
    loci_slice key;
    while (status == LOCI_OK && loci_scan_next(scan, &key)) {
        if (key.len != 16) continue; /* metadata */
        loci_document document;
        uint64_t newest = 0, sequence = loci_key_read_u64(key.data + 8);
        status = loci_document_load(c->from, c->view, sequence, &document, err);
        if (status != LOCI_OK || document.dead) continue;
        status = loci_document_find(c->from, c->view, document.id, &newest, err);
        if (status != LOCI_OK || newest != sequence) continue;
        status = copy_document(c, &document, err);
        if (status == LOCI_E_CORRUPT)
            loci_fail_prefix(err, status,
                             "document \"%.100s\" of corpus %s is damaged, delete it or register "
                             "it again before reindexing",
                             document.id, c->from->name);
    }
    loci_status closed = loci_scan_close(scan, status == LOCI_OK ? err : NULL);
    if (status == LOCI_OK) status = closed;
    return status == LOCI_OK ? write_batch(c, err) : status;
}

/* --- Beginning ---------------------------------------------------------------------------- */

/* Takes the successor away from its corpus and marks it deleted; the caller releases it. Caller
 * holds store->lock and corpus->lock. */
static loci_corpus *detach(loci_corpus *corpus) {
    loci_corpus *successor = corpus->successor;
    corpus->successor = NULL;
    pthread_mutex_lock(&successor->lock);
    loci_corpus_end(successor);
    pthread_mutex_unlock(&successor->lock);
    return successor;
}

/* Caller holds store->lock. */
static loci_status find_corpus(loci_store *store, const char *name, loci_corpus **out,
                               loci_error *err) {
    bool found;
    size_t place = loci_corpus_place(store, name, &found);
    if (!found)
        return loci_fail(err, LOCI_E_NOTFOUND, "there is no corpus \"%.*s\"", LOCI_NAME_MAX, name);
    *out = store->corpora[place];
    if ((*out)->damage.status == LOCI_OK) return LOCI_OK;
    if (err) *err = (*out)->damage;
    return (*out)->damage.status;
}

/* Gives the corpus a successor without documents; *to stays NULL when it has one of this model, and
 * one of another model goes to *old. Each has a reference, *from too. */
static loci_status begin(loci_store *store, const char *name, const loci_geometry *geometry,
                         const loci_corpus_settings *settings, const float *sink_k,
                         const float *sink_v, loci_corpus **from, loci_corpus **to,
                         loci_corpus **old, loci_error *err) {
    loci_corpus *corpus = NULL, *successor = NULL;
    pthread_mutex_lock(&store->lock);
    loci_status status = find_corpus(store, name, &corpus, err);
    if (status != LOCI_OK) goto out;
    pthread_mutex_lock(&corpus->lock);
    uint64_t revision = corpus->manifest->revision;
    bool same = corpus->successor &&
                strcmp(corpus->successor->geometry.fingerprint, geometry->fingerprint) == 0;
    if (corpus->successor && !same) *old = detach(corpus);
    bool own = strcmp(corpus->geometry.fingerprint, geometry->fingerprint) == 0;
    loci_corpus_settings kept = own ? corpus->settings : *settings;
    pthread_mutex_unlock(&corpus->lock);
    if (same) goto out;
    LOCI_TRY_GOTO(loci_corpus_make(store, name, geometry, &kept, sink_k, sink_v,
                                   LOCI_CORPUS_COPYING, corpus->created, revision, &successor, err),
                  out);
    pthread_mutex_lock(&corpus->lock);
    corpus->successor = successor;
    pthread_mutex_unlock(&corpus->lock);
    *from = loci_corpus_ref(corpus);
    *to = loci_corpus_ref(successor);
out:
    pthread_mutex_unlock(&store->lock);
    return status;
}

/* What an earlier run left under the old one's uid must not come back. */
static void forget(loci_corpus *old) {
    loci_error err;
    loci_batch *batch = loci_batch_create(old->store->rocks);
    if (!loci_corpus_store(old, LOCI_CORPUS_DELETED, batch) ||
        loci_batch_write(batch, true, &err) != LOCI_OK)
        loci_log_warn("an abandoned index of corpus %s was not marked as such", old->name);
    loci_batch_destroy(batch);
    loci_corpus_release(old);
}

static loci_status copy_all(loci_corpus *from, loci_corpus *to, const loci_reindex_watch *watch,
                            loci_error *err) {
    loci_rocks *rocks = from->store->rocks;
    loci_view *view = loci_view_open(rocks);
    copying c = {.from = from, .to = to, .view = view, .watch = watch};
    c.batch = loci_batch_create(rocks);
    c.raw = malloc(LOCI_CHUNK_BYTES);
    c.hash = XXH3_createState();
    loci_status status;
    if (c.raw && c.hash)
        status = copy_documents(&c, err);
    else
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to reindex corpus %s", from->name);
    loci_batch_destroy(c.batch);
    XXH3_freeState(c.hash);
    free(c.raw);
    loci_view_close(view);
    return status;
}

/* All documents are there: from now on it is the ingest thread's, in this process or the next. */
static loci_status hand_over(loci_corpus *from, loci_corpus *to, loci_error *err) {
    loci_store *store = from->store;
    loci_batch *batch = loci_batch_create(store->rocks);
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&store->lock);
    pthread_mutex_lock(&from->lock);
    if (from->successor != to) {
        status = loci_fail(err, LOCI_E_ABORTED, "reindexing corpus %s was given up", from->name);
    }
    if (status == LOCI_OK) { /* what may have changed since the beginning */
        bool own = strcmp(from->geometry.fingerprint, to->geometry.fingerprint) == 0;
        if (own) to->settings = from->settings;
        if (to->last_sequence < from->last_sequence) to->last_sequence = from->last_sequence;
    }
    if (status == LOCI_OK && !loci_corpus_store(to, LOCI_CORPUS_INDEXING, batch)) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to reindex corpus %s", from->name);
    } else if (status == LOCI_OK) {
        loci_state_store(to, to->last_sequence, to->documents, to->bytes, batch);
        LOCI_FAILPOINT("reindex_begin");
        status = loci_batch_write(batch, true, err);
        LOCI_FAILPOINT("reindex_begin");
    }
    if (status == LOCI_OK) {
        pthread_mutex_lock(&to->lock);
        to->stage = LOCI_CORPUS_INDEXING;
        pthread_mutex_unlock(&to->lock);
    } else if (from->successor == to) {
        loci_corpus_release(detach(from)); /* the caller has a reference, too */
    }
    pthread_mutex_unlock(&from->lock);
    pthread_mutex_unlock(&store->lock);
    loci_batch_destroy(batch);
    return status;
}

loci_status loci_corpus_reindex(loci_store *store, const char *name, const loci_geometry *geometry,
                                const loci_corpus_settings *settings, const float *sink_k,
                                const float *sink_v, const loci_reindex_watch *watch,
                                loci_error *err) {
    loci_corpus *from = NULL, *to = NULL, *old = NULL;
    const loci_reindex_watch nobody = {0};
    loci_corpus_settings defaults;
    loci_corpus_settings_default(&defaults);
    if (!settings) settings = &defaults;
    if (!loci_geometry_valid(geometry) || geometry->has_sink != (sink_k && sink_v))
        return loci_fail(err, LOCI_E_INVAL, "corpus %s: the model's geometry is out of range",
                         name);
    loci_status status =
        begin(store, name, geometry, settings, sink_k, sink_v, &from, &to, &old, err);
    if (old) forget(old);
    if (status != LOCI_OK || !to) return status;
    status = copy_all(from, to, watch ? watch : &nobody, err);
    if (status == LOCI_OK) {
        status = hand_over(from, to, err);
    } else {
        loci_corpus *gone = NULL;
        pthread_mutex_lock(&store->lock);
        pthread_mutex_lock(&from->lock);
        if (from->successor == to) gone = detach(from);
        pthread_mutex_unlock(&from->lock);
        pthread_mutex_unlock(&store->lock);
        loci_corpus_release(gone);
    }
    loci_corpus_release(to);
    loci_corpus_release(from);
    return status;
}

/* --- Ending ------------------------------------------------------------------------------- */

loci_status loci_corpus_reindex_cancel(loci_store *store, const char *name, loci_error *err) {
    loci_corpus *corpus = NULL, *gone = NULL;
    pthread_mutex_lock(&store->lock);
    loci_status status = find_corpus(store, name, &corpus, err);
    if (status == LOCI_OK) {
        pthread_mutex_lock(&corpus->lock);
        if (corpus->successor)
            gone = detach(corpus);
        else
            status = loci_fail_reason(err, LOCI_E_PRECONDITION, "NOT_REINDEXING",
                                      "corpus %s is not being reindexed", name);
        pthread_mutex_unlock(&corpus->lock);
    }
    pthread_mutex_unlock(&store->lock);
    if (gone) forget(gone);
    return status;
}

loci_status loci_corpus_successor(loci_store *store, const char *name, loci_corpus **out,
                                  loci_error *err) {
    loci_corpus *corpus = NULL;
    *out = NULL;
    pthread_mutex_lock(&store->lock);
    loci_status status = find_corpus(store, name, &corpus, err);
    if (status == LOCI_OK && corpus->successor) *out = loci_corpus_ref(corpus->successor);
    pthread_mutex_unlock(&store->lock);
    return status;
}

/* Caller holds the locks of the store and both corpora. */
static loci_status switch_locked(loci_corpus *old, loci_corpus *new, loci_error *err) {
    loci_manifest *next = loci_manifest_clone(new->manifest);
    loci_batch *batch = loci_batch_create(old->store->rocks);
    loci_buf manifest = LOCI_BUF_INIT;
    loci_status status = LOCI_E_NOMEM;
    if (next) {
        uint64_t least = old->manifest ? old->manifest->revision : 0; /* none: damaged */
        next->revision = (next->revision > least ? next->revision : least) + 1;
        loci_manifest_encode(next, &manifest);
    }
    if (next && loci_buf_status(&manifest) == LOCI_OK &&
        loci_corpus_store(old, LOCI_CORPUS_DELETED, batch) &&
        loci_corpus_store(new, LOCI_CORPUS_LIVE, batch)) {
        loci_key key = loci_key_catalog('m', new->uid);
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_MANIFEST,
                       loci_slice_of(manifest.data, manifest.len));
        LOCI_FAILPOINT("reindex_switch");
        status = loci_batch_write(batch, true, err);
        LOCI_FAILPOINT("reindex_switch");
    } else {
        loci_fail(err, status, "no memory to reindex corpus %s", old->name);
    }
    if (status == LOCI_OK) {
        loci_manifest *before = new->manifest;
        new->manifest = next;
        new->stage = LOCI_CORPUS_LIVE;
        next = before;
        loci_corpus_end(old);
        old->replaced = true;
        old->successor = NULL;
    }
    loci_manifest_unref(next);
    loci_batch_destroy(batch);
    loci_buf_fini(&manifest);
    return status;
}

loci_status loci_reindex_finish(loci_corpus *successor, loci_error *err) {
    loci_store *store = successor->store;
    loci_snapshot *current = NULL;
    loci_status status = LOCI_OK;
    bool found, done = false;
    pthread_mutex_lock(&store->lock);
    size_t place = loci_corpus_place(store, successor->name, &found);
    loci_corpus *old = found ? store->corpora[place] : NULL;
    if (old && old->successor == successor) {
        pthread_mutex_lock(&old->lock);
        pthread_mutex_lock(&successor->lock);
        if (successor->pending_first == successor->pending_end) {
            status = switch_locked(old, successor, err);
            done = status == LOCI_OK;
        }
        pthread_mutex_unlock(&successor->lock);
        if (done) {
            store->corpora[place] = successor; /* with old->successor's reference */
            current = old->current;
            old->current = NULL;
        }
        pthread_mutex_unlock(&old->lock);
    }
    pthread_mutex_unlock(&store->lock);
    if (!done) return status;
    loci_log_info("corpus %s is reindexed: model %s", old->name, successor->geometry.fingerprint);
    loci_snapshot_release(current);
    loci_corpus_release(old); /* the table's */
    return LOCI_OK;
}

/* --- What needs it ------------------------------------------------------------------------ */

loci_status loci_corpus_changeable(const loci_corpus *corpus, loci_error *err) {
    if (corpus->successor || corpus->replaced)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "REINDEXING",
                                "corpus %s is being reindexed and takes no changes meanwhile: try "
                                "again when that is done (\"loci corpus reindex %s\" waits for it)",
                                corpus->name, corpus->name);
    if (corpus->deleted)
        return loci_fail(err, LOCI_E_NOTFOUND, "corpus %s was deleted", corpus->name);
    return LOCI_OK;
}

loci_status loci_corpus_check_model(const loci_corpus_info *info, const char *fingerprint,
                                    loci_error *err) {
    if (strcmp(info->geometry.fingerprint, fingerprint) == 0) return LOCI_OK;
    if (info->reindexing && strcmp(info->reindex_fingerprint, fingerprint) == 0)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "MODEL_MISMATCH",
                                "corpus %s was encoded by model %s and is being reindexed for "
                                "model %s: ask again when that is done (\"loci corpus reindex %s\" "
                                "waits for it; locid --also-model FOLDER, with the old model, "
                                "answers meanwhile)",
                                info->name, info->geometry.fingerprint, fingerprint, info->name);
    return loci_fail_reason(err, LOCI_E_PRECONDITION, "MODEL_MISMATCH",
                            "corpus %s was encoded by model %s, and this locid runs model %s: "
                            "\"loci corpus reindex %s\" encodes its documents anew (locid "
                            "--also-model FOLDER, with the old model, answers meanwhile)",
                            info->name, info->geometry.fingerprint, fingerprint, info->name);
}

loci_status loci_corpus_outdated(loci_store *store, const char *name, const char *fingerprint,
                                 bool *outdated, loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(store, name, &corpus, err));
    loci_manifest *manifest = loci_corpus_manifest(corpus);
    *outdated = strcmp(corpus->geometry.fingerprint, fingerprint) != 0;
    for (uint32_t i = 0; !*outdated && i < manifest->extent_count; i++)
        *outdated = loci_extent_outdated(corpus->extents_dir, manifest->extents[i].id);
    loci_manifest_unref(manifest);
    loci_corpus_release(corpus);
    return LOCI_OK;
}
