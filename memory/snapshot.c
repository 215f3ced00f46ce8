/* SPDX-License-Identifier: Apache-2.0
 *
 * Snapshots: one revision of a corpus, opened and laid out for the backends.
 *
 * The newest snapshot of a corpus is kept and handed out again until the revision changes. A new
 * revision shares the opened extents with older ones, and the live bitmaps of those that have dead
 * segments until more die; the flat segments are gathered in one buffer for each retrieval layer.
 *
 * The unfinished document at the manifest's cursor is not part of a snapshot: extents and flat
 * segments that hold nothing else, which are the last ones, are left out; its segments in a shared
 * extent are dead.
 */
#include "memory/snapshot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory/internal.h"

#define FLAT_TERM_BYTES 32u /* at most, of a flat token's words while they are gathered */

uint64_t loci_snapshots_oldest(const loci_snapshot *list) {
    uint64_t oldest = UINT64_MAX;
    for (; list; list = list->older)
        if (list->manifest->revision < oldest) oldest = list->manifest->revision;
    return oldest;
}

/* --- Extents ---------------------------------------------------------------------------- */

/* When a segment is dead, which are, and the bitmaps. Caller holds build_lock. */
static loci_status fill_dead(loci_extent_view *view, loci_extent *extent,
                             const loci_manifest *manifest, const loci_manifest_extent *entry,
                             loci_extent_dead **out, loci_error *err) {
    /* The document at the cursor can only be in the last run. */
    bool hides = loci_manifest_hides(manifest, entry->runs[entry->run_count - 1].sequence);
    if (entry->dead_segments == 0 && !hides) return LOCI_OK;
    uint8_t *dead = calloc(extent->segments, 1);
    if (!dead)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the live bitmaps of %s", extent->name);
    uint32_t at = 0;
    for (uint32_t r = 0; r < entry->run_count; r++) {
        const loci_run *run = &entry->runs[r];
        memset(dead + at, run->dead || loci_manifest_hides(manifest, run->sequence), run->segments);
        at += run->segments;
    }
    loci_status status = loci_extent_mask(extent, dead, out, err);
    free(dead);
    LOCI_TRY(status);
    view->live = (*out)->live;
    view->segment_dead = (*out)->segments;
    return LOCI_OK;
}

static uint32_t visible_extents(const loci_manifest *manifest) {
    uint32_t count = manifest->extent_count;
    while (count > 0 &&
           loci_manifest_hides(manifest, manifest->extents[count - 1].runs[0].sequence))
        count--;
    return count;
}

static uint32_t visible_flats(const loci_manifest *manifest) {
    uint32_t count = manifest->flat_count;
    while (count > 0 && loci_manifest_hides(manifest, manifest->flats[count - 1].sequence)) count--;
    return count;
}

static loci_status fill_extents(loci_snapshot *snapshot, loci_error *err) {
    const loci_manifest *manifest = snapshot->manifest;
    uint32_t count = visible_extents(manifest);
    snapshot->view.extent_count = count;
    snapshot->extents = calloc(count + 1u, sizeof *snapshot->extents);
    snapshot->extent_views = calloc(count + 1u, sizeof *snapshot->extent_views);
    snapshot->dead = calloc(count + 1u, sizeof(loci_extent_dead *));
    snapshot->terms = calloc(count + 1u, sizeof *snapshot->terms);
    if (!snapshot->extents || !snapshot->extent_views || !snapshot->dead || !snapshot->terms)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for a snapshot of %s",
                         snapshot->corpus->name);
    for (uint32_t i = 0; i < count; i++) {
        const loci_manifest_extent *entry = &manifest->extents[i];
        loci_extent *extent = NULL;
        LOCI_TRY(loci_corpus_extent(snapshot->corpus, entry, &extent, err));
        snapshot->extents[i] = extent;
        loci_extent_view *view = &snapshot->extent_views[i];
        view->buffer = extent->buffer;
        view->pair_at = extent->pair_at;
        view->pair_hash = extent->pair_hash;
        view->segment_begin = extent->segment_begin;
        view->tokens = extent->tokens;
        view->segments = extent->segments;
        view->segment_base = snapshot->extent_segments;
        for (int b = 8; b < 16; b++) view->id = view->id << 8 | extent->id[b];
        LOCI_TRY(fill_dead(view, extent, manifest, entry, &snapshot->dead[i], err));
        snapshot->extent_segments += extent->segments;
    }
    return LOCI_OK;
}

/* --- Flat segments ------------------------------------------------------------------------- */

/* Where K (v = 0) or V (v = 1) of a layer begins in flat_data. */
static uint16_t *flat_rows(const loci_snapshot *snapshot, uint32_t layer, uint32_t v) {
    const loci_geometry *geometry = &snapshot->corpus->geometry;
    size_t row = (size_t)geometry->kv_heads * geometry->head_dim;
    return snapshot->flat_data + (2 * (size_t)layer + v) * snapshot->view.flat_tokens * row;
}

/* Spreads one flat value, [pair][K, V][tokens][head_dim], over the layers' buffers. */
static void spread_flat(const loci_snapshot *snapshot, const uint8_t *data, uint32_t first,
                        uint32_t tokens) {
    const loci_geometry *geometry = &snapshot->corpus->geometry;
    size_t dim = geometry->head_dim, row = geometry->kv_heads * dim;
    for (uint32_t layer = 0; layer < geometry->retrieval_layers; layer++)
        for (uint32_t head = 0; head < geometry->kv_heads; head++)
            for (uint32_t v = 0; v < 2; v++) {
                uint16_t *to = flat_rows(snapshot, layer, v) + first * row + head * dim;
                for (uint32_t t = 0; t < tokens; t++, data += dim * 2)
                    memcpy(to + t * row, data, dim * 2);
            }
}

static loci_status load_flats(loci_snapshot *snapshot, loci_error *err) {
    const loci_manifest *manifest = snapshot->manifest;
    loci_corpus *corpus = snapshot->corpus;
    for (uint32_t i = 0; i < snapshot->view.flat_segments; i++) {
        const loci_manifest_flat *flat = &manifest->flats[i];
        char name[LOCI_NAME_MAX + 64];
        snprintf(name, sizeof name, "flat segment %llu of corpus %s",
                 (unsigned long long)flat->number, corpus->name);
        loci_key key = loci_key_pair(corpus->uid, flat->number);
        loci_value *value;
        loci_slice payload;
        loci_status status =
            loci_rocks_pin(corpus->store->rocks, snapshot->rocks_view, LOCI_CF_FLAT, &key,
                           LOCI_KIND_FLAT, &value, &payload, err);
        if (status != LOCI_OK) return loci_fail_prefix(err, status, "%s", name);
        const uint8_t *data = NULL;
        status = loci_flat_check(payload, &corpus->geometry, flat->tokens, name, &data, err);
        if (status == LOCI_OK) spread_flat(snapshot, data, snapshot->flat_begin[i], flat->tokens);
        loci_value_free(value);
        LOCI_TRY(status);
    }
    return LOCI_OK;
}

static loci_status fill_flats(loci_snapshot *snapshot, loci_error *err) {
    const loci_manifest *manifest = snapshot->manifest;
    const loci_geometry *geometry = &snapshot->corpus->geometry;
    loci_backend *backend = snapshot->corpus->store->backend;
    uint32_t layers = geometry->retrieval_layers, count = visible_flats(manifest);
    snapshot->flat_k = calloc(layers, sizeof(loci_buffer *));
    snapshot->flat_v = calloc(layers, sizeof(loci_buffer *));
    snapshot->flat_begin = calloc(count + 1u, sizeof *snapshot->flat_begin);
    snapshot->flat_data = malloc(manifest->flat_tokens * loci_geometry_kv_bytes(geometry) + 1);
    if (!snapshot->flat_k || !snapshot->flat_v || !snapshot->flat_begin || !snapshot->flat_data)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the flat segments of corpus %s",
                         snapshot->corpus->name);
    for (uint32_t i = 0; i < count; i++)
        snapshot->flat_begin[i + 1] = snapshot->flat_begin[i] + manifest->flats[i].tokens;
    snapshot->view.flat_tokens = snapshot->flat_begin[count];
    snapshot->view.flat_segments = count;
    if (count == 0) return LOCI_OK;
    LOCI_TRY(load_flats(snapshot, err));
    size_t bytes = (size_t)snapshot->view.flat_tokens * geometry->kv_heads * geometry->head_dim * 2;
    for (uint32_t layer = 0; layer < layers; layer++) {
        LOCI_TRY(backend->ops->wrap(backend, flat_rows(snapshot, layer, 0), bytes,
                                    &snapshot->flat_k[layer], err));
        LOCI_TRY(backend->ops->wrap(backend, flat_rows(snapshot, layer, 1), bytes,
                                    &snapshot->flat_v[layer], err));
    }
    return LOCI_OK;
}

/* --- Making and releasing ------------------------------------------------------------------- */

/* Reserves what fill_view is about to allocate. */
static loci_status reserve(loci_snapshot *snapshot, loci_error *err) {
    const loci_manifest *manifest = snapshot->manifest;
    const loci_corpus *corpus = snapshot->corpus;
    uint64_t pairs = (uint64_t)corpus->geometry.retrieval_layers * corpus->geometry.kv_heads;
    uint64_t flat = loci_geometry_kv_bytes(&corpus->geometry) + FLAT_TERM_BYTES;
    uint64_t bytes =
        manifest->flat_tokens * flat + manifest->flat_count * sizeof *snapshot->flat_begin;
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        const loci_manifest_extent *entry = &manifest->extents[i];
        bytes += 2 * sizeof(void *) + sizeof *snapshot->extent_views + sizeof *snapshot->terms;
        uint64_t last = entry->runs[entry->run_count - 1].sequence;
        if (entry->dead_segments == 0 && !loci_manifest_hides(manifest, last)) continue;
        bytes += pairs * (sizeof(uint64_t *) + (entry->tokens + 63u) / 64u * sizeof(uint64_t)) +
                 entry->segments;
    }
    char what[LOCI_NAME_MAX + 32];
    snprintf(what, sizeof what, "a snapshot of corpus %s", corpus->name);
    LOCI_TRY(
        loci_budget_take(corpus->store->options.budget, LOCI_MEMORY_SNAPSHOTS, bytes, what, err));
    snapshot->reserved = bytes;
    return LOCI_OK;
}

static loci_status fill_view(loci_snapshot *snapshot, loci_error *err) {
    loci_corpus *corpus = snapshot->corpus;
    const loci_geometry *geometry = &corpus->geometry;
    loci_corpus_view *view = &snapshot->view;
    LOCI_TRY(reserve(snapshot, err));
    LOCI_TRY(fill_extents(snapshot, err));
    LOCI_TRY(fill_flats(snapshot, err));
    view->retrieval_layers = geometry->retrieval_layers;
    view->kv_heads = geometry->kv_heads;
    view->head_dim = geometry->head_dim;
    view->extents = snapshot->extent_views;
    view->flat_k = snapshot->flat_k;
    view->flat_v = snapshot->flat_v;
    view->flat_segment_begin = snapshot->flat_begin;
    view->flat_segment_base = snapshot->extent_segments;
    view->has_sink = geometry->has_sink;
    if (view->has_sink) {
        view->sink_k = loci_ref_at(corpus->sink_buffer, 0);
        view->sink_v = loci_ref_at(corpus->sink_buffer, corpus->sink_floats / 2 * sizeof(float));
    }
    view->live_segments = snapshot->manifest->live_segments;
    view->tokens = snapshot->manifest->live_tokens;
    view->revision = snapshot->manifest->revision;
    return LOCI_OK;
}

/* Everything but the list and the corpus's reference. */
static void snapshot_free(loci_snapshot *snapshot) {
    loci_store *store = snapshot->corpus->store;
    loci_backend *backend = store->backend;
    uint32_t layers = snapshot->corpus->geometry.retrieval_layers;
    for (uint32_t i = 0; i < layers; i++) {
        if (snapshot->flat_k) backend->ops->free(backend, snapshot->flat_k[i]);
        if (snapshot->flat_v) backend->ops->free(backend, snapshot->flat_v[i]);
    }
    for (uint32_t i = 0; i < snapshot->view.extent_count; i++) {
        if (snapshot->extents) loci_extent_unref(snapshot->extents[i]);
        if (snapshot->dead) loci_extent_dead_unref(snapshot->dead[i]);
    }
    for (size_t i = 0; i < snapshot->known_count; i++) free(snapshot->known[i].document);
    free(snapshot->known);
    free(snapshot->extents);
    free(snapshot->dead);
    free(snapshot->extent_views);
    free(snapshot->flat_data);
    free(snapshot->flat_k);
    free(snapshot->flat_v);
    free(snapshot->flat_begin);
    for (uint32_t i = 0; snapshot->terms && i <= snapshot->view.extent_count; i++)
        loci_buf_fini(&snapshot->terms[i]);
    free(snapshot->terms);
    loci_manifest_unref(snapshot->manifest);
    loci_budget_give(store->options.budget, LOCI_MEMORY_SNAPSHOTS, snapshot->reserved);
    pthread_mutex_destroy(&snapshot->lock);
    free(snapshot);
}

/* Caller holds build_lock. Takes over the reference to manifest; view is of the moment when that
 * was current, since a later change may remove the flat values that it names. *out on success has
 * one reference for the caller and stands in the corpus's list. */
static loci_status make_snapshot(loci_corpus *corpus, loci_manifest *manifest, loci_view *view,
                                 const loci_corpus_info *info, loci_snapshot **out,
                                 loci_error *err) {
    loci_snapshot *snapshot = calloc(1, sizeof *snapshot);
    loci_status status = LOCI_E_NOMEM;
    if (snapshot) {
        atomic_init(&snapshot->refs, 1);
        pthread_mutex_init(&snapshot->lock, NULL);
        snapshot->corpus = corpus;
        snapshot->manifest = manifest;
        snapshot->info = *info;
        snapshot->rocks_view = view;
        status = fill_view(snapshot, err);
        snapshot->rocks_view = NULL;
    } else {
        loci_fail(err, status, "no memory for a snapshot of %s", corpus->name);
    }
    pthread_mutex_lock(&corpus->lock);
    corpus->snapshot_manifest = NULL;
    if (status == LOCI_OK) {
        atomic_fetch_add(&corpus->refs, 1);
        snapshot->info.settings = corpus->settings; /* they may have changed meanwhile */
        snapshot->older = corpus->snapshots;
        if (snapshot->older) snapshot->older->newer = snapshot;
        corpus->snapshots = snapshot;
        if (corpus->manifest == manifest && !corpus->deleted) {
            LOCI_ASSERT(!corpus->current);
            atomic_fetch_add(&snapshot->refs, 1);
            corpus->current = snapshot;
        }
    }
    pthread_mutex_unlock(&corpus->lock);
    if (status == LOCI_OK)
        *out = snapshot;
    else if (snapshot)
        snapshot_free(snapshot);
    else
        loci_manifest_unref(manifest);
    return status;
}

loci_status loci_snapshot_acquire(loci_store *store, const char *corpus_name, loci_snapshot **out,
                                  loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_corpus_info info;
    loci_manifest *manifest = NULL;
    loci_view *view = NULL;
    LOCI_TRY(loci_corpus_acquire(store, corpus_name, &corpus, err));
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&corpus->lock);
    loci_snapshot *current = corpus->current;
    if (current) atomic_fetch_add(&current->refs, 1);
    pthread_mutex_unlock(&corpus->lock);
    if (!current) {
        pthread_mutex_lock(&corpus->build_lock);
        pthread_mutex_lock(&corpus->lock);
        current = corpus->current; /* another thread may have made it meanwhile */
        if (current) {
            atomic_fetch_add(&current->refs, 1);
        } else {
            manifest = loci_manifest_ref(corpus->manifest);
            corpus->snapshot_manifest = manifest;
            view = loci_view_open(store->rocks);
            loci_corpus_fill_info(corpus, &info);
        }
        pthread_mutex_unlock(&corpus->lock);
        if (manifest) status = make_snapshot(corpus, manifest, view, &info, &current, err);
        loci_view_close(view);
        pthread_mutex_unlock(&corpus->build_lock);
    }
    loci_corpus_release(corpus);
    if (status == LOCI_OK) *out = current;
    return status;
}

loci_status loci_snapshot_acquire_past(loci_corpus *corpus, loci_snapshot **out, loci_error *err) {
    loci_corpus_info info;
    pthread_mutex_lock(&corpus->build_lock);
    pthread_mutex_lock(&corpus->lock);
    loci_manifest *manifest = loci_manifest_clone(corpus->manifest);
    loci_view *view = loci_view_open(corpus->store->rocks);
    if (manifest) {
        manifest->cursor = (loci_cursor){0}; /* so that it hides nothing */
        loci_manifest_sum(manifest);
        corpus->snapshot_manifest = manifest;
        loci_corpus_fill_info(corpus, &info);
    }
    pthread_mutex_unlock(&corpus->lock);
    loci_status status =
        manifest ? make_snapshot(corpus, manifest, view, &info, out, err)
                 : loci_fail(err, LOCI_E_NOMEM, "no memory for a snapshot of %s", corpus->name);
    loci_view_close(view);
    pthread_mutex_unlock(&corpus->build_lock);
    return status;
}

void loci_snapshot_release(loci_snapshot *snapshot) {
    if (!snapshot || atomic_fetch_sub(&snapshot->refs, 1) != 1) return;
    loci_corpus *corpus = snapshot->corpus;
    pthread_mutex_lock(&corpus->lock);
    if (snapshot->newer)
        snapshot->newer->older = snapshot->older;
    else
        corpus->snapshots = snapshot->older;
    if (snapshot->older) snapshot->older->newer = snapshot->newer;
    pthread_mutex_unlock(&corpus->lock);
    snapshot_free(snapshot);
    loci_corpus_purge(corpus);
    loci_corpus_release(corpus);
}

/* Caller holds the lock: nobody else has such an extent, or gets it meanwhile. */
static void let_bitmaps_go(loci_corpus *corpus) {
    for (size_t i = 0; i < corpus->opened_count; i++)
        if (atomic_load(&corpus->opened[i]->refs) == 1) loci_extent_let_go(corpus->opened[i]);
}

void loci_snapshots_let_go(void *store) {
    uint64_t after = 0;
    for (loci_corpus *corpus; (corpus = loci_corpus_next(store, after));) {
        after = corpus->uid;
        loci_snapshot *idle = NULL;
        pthread_mutex_lock(&corpus->lock);
        if (corpus->current && atomic_load(&corpus->current->refs) == 1) {
            idle = corpus->current;
            corpus->current = NULL;
        }
        pthread_mutex_unlock(&corpus->lock);
        loci_snapshot_release(idle);
        pthread_mutex_lock(&corpus->lock);
        let_bitmaps_go(corpus);
        pthread_mutex_unlock(&corpus->lock);
        loci_corpus_release(corpus);
    }
}

/* --- Reading ---------------------------------------------------------------------------- */

uint32_t loci_snapshot_end(const loci_snapshot *snapshot) {
    return (uint32_t)(snapshot->view.has_sink + snapshot->view.tokens);
}

const loci_corpus_view *loci_snapshot_view(const loci_snapshot *snapshot) {
    return &snapshot->view;
}

const loci_corpus_info *loci_snapshot_info(const loci_snapshot *snapshot) {
    return &snapshot->info;
}

uint32_t loci_snapshot_segments(const loci_snapshot *snapshot) {
    return snapshot->extent_segments + snapshot->view.flat_segments;
}

/* The extent of a segment below extent_segments. */
static uint32_t extent_of(const loci_snapshot *snapshot, uint32_t segment) {
    uint32_t low = 0, high = snapshot->view.extent_count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (snapshot->extent_views[middle].segment_base <= segment)
            low = middle;
        else
            high = middle;
    }
    return low;
}

loci_status loci_snapshot_check(const loci_snapshot *snapshot, loci_error *err) {
    for (uint32_t i = 0; i < snapshot->view.extent_count; i++)
        LOCI_TRY(loci_extent_check(snapshot->extents[i], err));
    return LOCI_OK;
}

bool loci_snapshot_segment_live(const loci_snapshot *snapshot, uint32_t segment) {
    LOCI_ASSERT(segment < loci_snapshot_segments(snapshot));
    if (segment >= snapshot->extent_segments) return true;
    const loci_extent_view *view = &snapshot->extent_views[extent_of(snapshot, segment)];
    return !view->segment_dead || !view->segment_dead[segment - view->segment_base];
}

/* The document of a segment, and what the segment covers of it. */
static uint64_t sequence_of(const loci_snapshot *snapshot, uint32_t segment,
                            loci_segment_info *out) {
    const loci_manifest *manifest = snapshot->manifest;
    if (segment >= snapshot->extent_segments) {
        const loci_manifest_flat *flat = &manifest->flats[segment - snapshot->extent_segments];
        *out = (loci_segment_info){NULL, flat->start, flat->end, flat->tokens};
        return flat->sequence;
    }
    uint32_t index = extent_of(snapshot, segment);
    const loci_manifest_extent *entry = &manifest->extents[index];
    uint32_t local = segment - snapshot->extent_views[index].segment_base;
    loci_extent_segment found = loci_extent_segment_at(snapshot->extents[index], local);
    *out = (loci_segment_info){NULL, found.start, found.end, found.tokens};
    uint32_t run = 0;
    while (local >= entry->runs[run].segments) local -= entry->runs[run++].segments;
    return entry->runs[run].sequence;
}

/* Caller holds snapshot->lock. The record stays in the database while the snapshot lives. */
static loci_status load_known(loci_snapshot *snapshot, uint64_t sequence, const loci_document **out,
                              loci_error *err) {
    size_t place = loci_sequence_place(snapshot->known, snapshot->known_count,
                                       sizeof *snapshot->known, sequence);
    if (place < snapshot->known_count && snapshot->known[place].sequence == sequence) {
        *out = snapshot->known[place].document;
        return LOCI_OK;
    }
    uint64_t bytes = sizeof(loci_document) + sizeof(loci_known_document);
    LOCI_TRY(loci_budget_take(snapshot->corpus->store->options.budget, LOCI_MEMORY_SNAPSHOTS, bytes,
                              "a cited document", err));
    snapshot->reserved += bytes;
    loci_document *document = malloc(sizeof *document);
    loci_known_document *grown =
        realloc(snapshot->known, (snapshot->known_count + 1) * sizeof *snapshot->known);
    if (grown) snapshot->known = grown;
    loci_status status = LOCI_E_NOMEM;
    if (document && grown)
        status = loci_document_load(snapshot->corpus, NULL, sequence, document, err);
    else
        loci_fail(err, status, "no memory for a document of corpus %s", snapshot->corpus->name);
    if (status != LOCI_OK) {
        free(document);
        snapshot->reserved -= bytes;
        loci_budget_give(snapshot->corpus->store->options.budget, LOCI_MEMORY_SNAPSHOTS, bytes);
        if (status != LOCI_E_NOTFOUND) return status;
        return loci_fail(err, LOCI_E_CORRUPT, "document %llu of corpus %s has no record",
                         (unsigned long long)sequence, snapshot->corpus->name);
    }
    memmove(&grown[place + 1], &grown[place], (snapshot->known_count - place) * sizeof *grown);
    grown[place] = (loci_known_document){sequence, document};
    snapshot->known_count++;
    *out = document;
    return LOCI_OK;
}

static loci_status find_segment(const loci_snapshot *snapshot, uint32_t segment,
                                loci_segment_info *info, const loci_document **document,
                                loci_error *err) {
    if (segment >= loci_snapshot_segments(snapshot))
        return loci_fail(err, LOCI_E_INVAL, "corpus %s has no segment %u", snapshot->corpus->name,
                         segment);
    uint64_t sequence = sequence_of(snapshot, segment, info);
    if (segment < snapshot->extent_segments)
        LOCI_TRY(loci_extent_check(snapshot->extents[extent_of(snapshot, segment)], err));
    loci_snapshot *owner = (loci_snapshot *)(uintptr_t)snapshot; /* a cache, behind its lock */
    pthread_mutex_lock(&owner->lock);
    loci_status status = load_known(owner, sequence, document, err);
    pthread_mutex_unlock(&owner->lock);
    return status;
}

loci_status loci_snapshot_segment(const loci_snapshot *snapshot, uint32_t segment,
                                  loci_segment_info *out, loci_error *err) {
    const loci_document *document;
    LOCI_TRY(find_segment(snapshot, segment, out, &document, err));
    out->document = document->id;
    return LOCI_OK;
}

loci_status loci_snapshot_read(const loci_snapshot *snapshot, uint32_t segment, uint64_t start,
                               uint64_t end, loci_buf *out, loci_error *err) {
    loci_segment_info info;
    const loci_document *document;
    LOCI_TRY(find_segment(snapshot, segment, &info, &document, err));
    if (end > document->bytes) end = document->bytes;
    if (start > end)
        return loci_fail(err, LOCI_E_INVAL, "document \"%.100s\" has %llu bytes, none at %llu",
                         document->id, (unsigned long long)document->bytes,
                         (unsigned long long)start);
    return loci_document_text(snapshot->corpus, NULL, document, start, end, out, err);
}
