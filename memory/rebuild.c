/* SPDX-License-Identifier: Apache-2.0
 *
 * Making parts of a corpus anew: sealing a full extent, the canonical tail, rewriting what is a
 * quarter dead, merging extents. One mechanism: list the live segments in the order of
 * registration, write them as one extent (or as flat segments), and swap them in with one change.
 * K and V are gathered in memory, but for a merge: that reads them pair by pair as they are
 * written, so that one pair of a large extent is in memory at a time, or two (attention/index.h).
 *
 * The ingest thread and the merger call this, each for extents that the other leaves alone, unless
 * they began before that was so; documents may be buried by others at any time. So places are
 * looked up again at the commit, and a plan whose extents are no more there is given up. A document
 * buried while its segments were gathered is dead in what the change commits. So is a document that
 * was left unfinished because another replaced it: its record lives on until its successor is
 * complete, its segments do not.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "memory/ingest.h"
#include "memory/internal.h"
#include "memory/lexical.h"

/* --- Gathering -------------------------------------------------------------------------- */

/* One part of a corpus being made anew. */
typedef struct rebuild {
    loci_corpus *corpus;
    const loci_manifest *base; /* what the plan is of */
    const loci_rebuild_plan *plan;
    const loci_fresh *fresh; /* NULL = none */
    struct loci_pool *pool;
    loci_builder *builder; /* only read once it is filled */
    bool borrowed;         /* it is that of `fresh` */
    loci_extent **sources; /* of a merge, [last - first]; NULL where nothing lives */
    /* Of a merge: one pair, with room to read each source whole; several in turn where they
     * overlap. */
    uint16_t *k[LOCI_PAIRS_AHEAD_MOST + 1], *v[LOCI_PAIRS_AHEAD_MOST + 1];
    uint32_t held;
} rebuild;

/* Moves the live rows of a pair, which stand in position order, together. */
static void keep_live(const loci_extent *extent, const loci_manifest_extent *entry,
                      uint16_t *rows) {
    size_t dim = extent->head_dim;
    uint32_t segment = 0;
    uint16_t *to = rows;
    for (uint32_t r = 0; r < entry->run_count; r++) {
        uint32_t begin = extent->segment_begin[segment];
        segment += entry->runs[r].segments;
        size_t values = (extent->segment_begin[segment] - begin) * dim;
        if (entry->runs[r].dead) continue;
        if (to != rows + begin * dim) memmove(to, rows + begin * dim, values * sizeof *to);
        to += values;
    }
}

/* K and V of the live tokens of a pair; k and v have room for all tokens. */
static loci_status read_live(const rebuild *r, const loci_extent *extent,
                             const loci_manifest_extent *entry, uint32_t pair, uint16_t *k,
                             uint16_t *v, loci_error *err) {
    LOCI_TRY(loci_extent_read_pair(extent, pair, r->pool, k, v, err));
    keep_live(extent, entry, k);
    keep_live(extent, entry, v);
    return LOCI_OK;
}

static loci_status add_live_segments(const loci_extent *extent, const loci_manifest_extent *entry,
                                     loci_builder *builder, loci_error *err) {
    uint32_t at = 0;
    for (uint32_t r = 0; r < entry->run_count; r++) {
        const loci_run *run = &entry->runs[r];
        for (uint32_t i = 0; i < run->segments; i++, at++) {
            if (run->dead) continue;
            loci_extent_segment found = loci_extent_segment_at(extent, at);
            loci_built_segment segment = {run->sequence, found.start, found.end, {0}, found.tokens};
            memcpy(segment.content, found.content, sizeof segment.content);
            uint32_t row;
            LOCI_TRY(loci_builder_add(builder, &segment, &row, err));
        }
    }
    return LOCI_OK;
}

static loci_status gather_extent(const rebuild *r, const loci_manifest_extent *entry,
                                 loci_error *err) {
    loci_corpus *corpus = r->corpus;
    loci_builder *builder = r->builder;
    if (entry->dead_tokens == entry->tokens) return LOCI_OK;
    loci_extent *extent = NULL;
    size_t bytes = (size_t)entry->tokens * corpus->geometry.head_dim * sizeof(uint16_t);
    uint16_t *k = malloc(bytes), *v = malloc(bytes);
    loci_status status = LOCI_E_NOMEM;
    if (!k || !v) {
        loci_fail(err, status, "no memory to read an extent of corpus %s", corpus->name);
        goto out;
    }
    LOCI_TRY_GOTO(loci_corpus_extent(corpus, entry, &extent, err), out);
    size_t first = (size_t)builder->tokens * corpus->geometry.head_dim;
    size_t live = (size_t)loci_extent_live_tokens(entry) * corpus->geometry.head_dim;
    LOCI_TRY_GOTO(add_live_segments(extent, entry, builder, err), out);
    for (uint32_t p = 0; p < builder->pairs; p++) {
        LOCI_TRY_GOTO(read_live(r, extent, entry, p, k, v, err), out);
        memcpy(builder->k[p] + first, k, live * sizeof *k);
        memcpy(builder->v[p] + first, v, live * sizeof *v);
    }
out:
    loci_extent_unref(extent);
    free(k);
    free(v);
    return status;
}

/* The document of a flat segment may be buried, and its value removed, at any time. */
static loci_status gather_flat(loci_corpus *corpus, const loci_manifest_flat *flat,
                               loci_builder *builder, loci_error *err) {
    char name[LOCI_NAME_MAX + 64];
    snprintf(name, sizeof name, "flat segment %llu of corpus %s", (unsigned long long)flat->number,
             corpus->name);
    loci_key key = loci_key_pair(corpus->uid, flat->number);
    loci_value *value = NULL;
    loci_slice payload = {0};
    loci_status status = loci_rocks_pin(corpus->store->rocks, NULL, LOCI_CF_FLAT, &key,
                                        LOCI_KIND_FLAT, &value, &payload, err);
    if (status != LOCI_OK) return loci_fail_prefix(err, status, "%s", name);
    const uint8_t *data = NULL;
    uint32_t row;
    LOCI_TRY_GOTO(loci_flat_check(payload, &corpus->geometry, flat->tokens, name, &data, err), out);
    loci_built_segment segment = {flat->sequence, flat->start, flat->end, {0}, flat->tokens};
    memcpy(segment.content, flat->content, sizeof segment.content);
    LOCI_TRY_GOTO(loci_builder_add(builder, &segment, &row, err), out);
    size_t dim = corpus->geometry.head_dim, bytes = flat->tokens * dim * sizeof(uint16_t);
    for (uint32_t p = 0; p < builder->pairs; p++, data += 2 * bytes) {
        memcpy(builder->k[p] + row * dim, data, bytes);
        memcpy(builder->v[p] + row * dim, data + bytes, bytes);
    }
out:
    loci_value_free(value);
    return status;
}

/* The other extents are merged without one that cannot be read. */
static loci_status note_damage(const rebuild *r, const loci_manifest_extent *entry,
                               loci_status status) {
    if (status == LOCI_E_CORRUPT) loci_corpus_set_apart(r->corpus, entry->id);
    return status;
}

/* The sources of a merge, and a list of their live segments. */
static loci_status list_sources(rebuild *r, loci_error *err) {
    uint32_t count = r->plan->last - r->plan->first;
    uint64_t room = 1;
    r->builder->listed = true;
    r->sources = calloc(count, sizeof(loci_extent *));
    if (!r->sources)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to merge extents of corpus %s",
                         r->corpus->name);
    for (uint32_t i = 0; i < count; i++) {
        const loci_manifest_extent *entry = &r->base->extents[r->plan->first + i];
        if (loci_extent_live_tokens(entry) == 0) continue;
        if (r->builder->tokens + entry->tokens > room) room = r->builder->tokens + entry->tokens;
        LOCI_TRY(note_damage(r, entry, loci_corpus_extent(r->corpus, entry, &r->sources[i], err)));
        LOCI_TRY(add_live_segments(r->sources[i], entry, r->builder, err));
    }
    size_t bytes = room * r->corpus->geometry.head_dim * sizeof(uint16_t);
    r->held = 1 + loci_pairs_ahead(r->corpus->store->backend, r->builder->tokens);
    for (uint32_t i = 0; i < r->held; i++) {
        r->k[i] = malloc(bytes);
        r->v[i] = malloc(bytes);
        if (!r->k[i] || !r->v[i])
            return loci_fail(err, LOCI_E_NOMEM, "no memory to merge %llu tokens of corpus %s",
                             (unsigned long long)room, r->corpus->name);
    }
    return LOCI_OK;
}

static loci_status gather(rebuild *r, loci_error *err) {
    const loci_rebuild_plan *plan = r->plan;
    bool nothing_old = plan->first == plan->last && !(plan->tail && r->base->flat_count > 0);
    r->borrowed = r->fresh && nothing_old;
    if (r->borrowed) {
        r->builder = (loci_builder *)(uintptr_t)r->fresh->builder;
        return LOCI_OK;
    }
    LOCI_TRY(loci_builder_create(&r->corpus->geometry, &r->builder, err));
    if (plan->merge) return list_sources(r, err);
    for (uint32_t i = plan->first; i < plan->last; i++)
        LOCI_TRY(gather_extent(r, &r->base->extents[i], err));
    for (uint32_t i = 0; plan->tail && i < r->base->flat_count; i++)
        LOCI_TRY(gather_flat(r->corpus, &r->base->flats[i], r->builder, err));
    return r->fresh ? loci_builder_add_all(r->builder, r->fresh->builder, err) : LOCI_OK;
}

/* The same content may be there twice, or again, under other documents: then what was dead in it
 * may not be. */
static bool same_extent(const loci_manifest_extent *a, const loci_manifest_extent *b) {
    bool same = memcmp(a->id, b->id, sizeof a->id) == 0 && a->run_count == b->run_count;
    for (uint32_t i = 0; same && i < a->run_count; i++)
        same = a->runs[i].sequence == b->runs[i].sequence;
    return same;
}

/* Where the plan's extents stand side by side in the manifest as it is now; false when they are no
 * more there. A plan without extents is of the end. */
static bool find_place(const rebuild *r, const loci_manifest *now, uint32_t *first) {
    uint32_t count = r->plan->last - r->plan->first;
    *first = now->extent_count;
    if (count == 0) return true;
    for (uint32_t at = 0; at + count <= now->extent_count; at++) {
        uint32_t same = 0;
        while (same < count &&
               same_extent(&now->extents[at + same], &r->base->extents[r->plan->first + same]))
            same++;
        *first = at;
        if (same == count) return true;
    }
    return false;
}

/* The loci_pair_source of a merge. */
static loci_status read_sources(void *ctx, uint32_t pair, const uint16_t **k, const uint16_t **v,
                                loci_error *err) {
    rebuild *r = ctx;
    uint32_t place;
    pthread_mutex_lock(&r->corpus->lock);
    bool stands = find_place(r, r->corpus->manifest, &place);
    pthread_mutex_unlock(&r->corpus->lock);
    if (!stands)
        return loci_fail(err, LOCI_E_ABORTED, "extents of corpus %s changed while they were merged",
                         r->corpus->name);
    uint16_t *to_k = r->k[pair % r->held], *to_v = r->v[pair % r->held];
    size_t at = 0;
    for (uint32_t i = r->plan->first; i < r->plan->last; i++) {
        const loci_manifest_extent *entry = &r->base->extents[i];
        const loci_extent *source = r->sources[i - r->plan->first];
        if (!source) continue;
        LOCI_TRY(
            note_damage(r, entry, read_live(r, source, entry, pair, to_k + at, to_v + at, err)));
        at += (size_t)loci_extent_live_tokens(entry) * source->head_dim;
    }
    *k = to_k;
    *v = to_v;
    return LOCI_OK;
}

/* --- Committing ------------------------------------------------------------------------- */

/* Remembers the last answer: segments of a document stand together. */
typedef struct life_check {
    loci_corpus *corpus;
    const loci_fresh *fresh; /* NULL = none */
    uint64_t unfinished;     /* the document at the cursor after the change; 0 = none */
    uint64_t sequence;
    bool alive;
} life_check;

/* Caller holds corpus->lock. */
static life_check life_check_of(loci_corpus *corpus, const loci_fresh *fresh) {
    const loci_cursor *cursor = fresh ? &fresh->cursor : &corpus->manifest->cursor;
    return (life_check){
        .corpus = corpus, .fresh = fresh, .unfinished = cursor->byte > 0 ? cursor->sequence : 0};
}

/* Whether the document becomes complete with this change. */
static bool completes(const loci_fresh *fresh, uint64_t sequence) {
    if (sequence >= fresh->cursor.sequence) return false;
    size_t place = loci_sequence_place(fresh->documents, fresh->document_count,
                                       sizeof *fresh->documents, sequence);
    return place < fresh->document_count && fresh->documents[place].sequence == sequence;
}

static loci_status check_alive(life_check *check, uint64_t sequence, bool *alive, loci_error *err) {
    if (check->sequence != sequence) {
        loci_document document;
        loci_status status = loci_document_load(check->corpus, NULL, sequence, &document, err);
        if (status != LOCI_OK && status != LOCI_E_NOTFOUND) return status;
        check->sequence = sequence;
        check->alive = status == LOCI_OK && !document.dead &&
                       (document.segments > 0 || sequence == check->unfinished ||
                        (check->fresh && completes(check->fresh, sequence)));
    }
    *alive = check->alive;
    return LOCI_OK;
}

/* Runs of the builder's segments; documents that are dead by now get dead runs. */
static loci_status fill_runs(life_check check, const loci_builder *builder,
                             loci_manifest_extent *extent, loci_error *err) {
    extent->runs = calloc(builder->segment_count, sizeof *extent->runs);
    if (!extent->runs) return loci_fail(err, LOCI_E_NOMEM, "no memory for an extent's documents");
    loci_run *run = NULL;
    for (uint32_t i = 0; i < builder->segment_count; i++) {
        const loci_built_segment *segment = &builder->segments[i];
        if (!run || run->sequence != segment->sequence) {
            bool alive;
            LOCI_TRY(check_alive(&check, segment->sequence, &alive, err));
            run = &extent->runs[extent->run_count++];
            *run = (loci_run){.sequence = segment->sequence, .dead = !alive};
        }
        run->segments++;
        run->tokens += segment->tokens;
    }
    return LOCI_OK;
}

/* Runs of a merged extent, from those that its sources have by now: they know what died. */
static loci_status carry_runs(const rebuild *r, const loci_manifest_extent *now,
                              loci_manifest_extent *extent, loci_error *err) {
    uint32_t count = 0, sources = r->plan->last - r->plan->first;
    for (uint32_t i = 0; i < sources; i++) count += now[i].run_count;
    extent->runs = calloc(count, sizeof *extent->runs);
    if (!extent->runs) return loci_fail(err, LOCI_E_NOMEM, "no memory for an extent's documents");
    loci_run *run = NULL;
    for (uint32_t i = 0; i < sources; i++) {
        const loci_run *before = r->base->extents[r->plan->first + i].runs;
        for (uint32_t from = 0; from < now[i].run_count; from++) {
            const loci_run *one = &now[i].runs[from];
            if (before[from].dead) continue; /* not in the new one */
            if (!run || run->sequence != one->sequence) {
                run = &extent->runs[extent->run_count++];
                *run = (loci_run){.sequence = one->sequence, .dead = one->dead};
            }
            run->segments += one->segments;
            run->tokens += one->tokens;
        }
    }
    return LOCI_OK;
}

/* Writes flat values under numbers that no manifest names yet. */
static loci_status write_flats(loci_corpus *corpus, const loci_builder *builder,
                               uint64_t first_number, loci_error *err) {
    loci_buf payload = LOCI_BUF_INIT;
    loci_status status = LOCI_OK;
    uint32_t row = 0;
    for (uint32_t i = 0; status == LOCI_OK && i < builder->segment_count; i++) {
        loci_buf_clear(&payload);
        loci_flat_encode(builder, row, builder->segments[i].tokens, &payload);
        row += builder->segments[i].tokens;
        if (payload.failed) {
            status = loci_fail(err, LOCI_E_NOMEM, "no memory for a flat segment");
            break;
        }
        loci_key key = loci_key_pair(corpus->uid, first_number + i);
        loci_batch *batch = loci_batch_create(corpus->store->rocks);
        loci_batch_put(batch, LOCI_CF_FLAT, &key, LOCI_KIND_FLAT,
                       loci_slice_of(payload.data, payload.len));
        status = loci_batch_write(batch, false, err);
        loci_batch_destroy(batch);
    }
    loci_buf_fini(&payload);
    /* Long writes reach the disk here, before the lock that readers need. */
    return status == LOCI_OK ? loci_rocks_sync(corpus->store->rocks, err) : status;
}

/* Names the flat values that write_flats wrote. */
static loci_status name_flats(loci_change *change, life_check check, const loci_builder *builder,
                              loci_error *err) {
    for (uint32_t i = 0; i < builder->segment_count; i++) {
        const loci_built_segment *segment = &builder->segments[i];
        loci_manifest_flat flat = {change->next->next_flat++,
                                   segment->sequence,
                                   segment->start,
                                   segment->end,
                                   {0},
                                   segment->tokens};
        memcpy(flat.content, segment->content, sizeof flat.content);
        bool alive;
        LOCI_TRY(check_alive(&check, segment->sequence, &alive, err));
        if (!alive) {
            loci_key key = loci_key_pair(change->corpus->uid, flat.number);
            loci_batch_delete(change->batch, LOCI_CF_FLAT, &key);
        } else if (!loci_manifest_add_flat(change->next, &flat)) {
            return loci_fail(err, LOCI_E_NOMEM, "no memory to change corpus %s",
                             change->corpus->name);
        }
    }
    return LOCI_OK;
}

/* Documents that are complete with this change become searchable and bury what they replace. */
static loci_status complete_documents(loci_change *change, const loci_fresh *fresh,
                                      loci_error *err) {
    for (size_t i = 0; i < fresh->document_count; i++) {
        const loci_indexed_document *indexed = &fresh->documents[i];
        if (indexed->sequence >= fresh->cursor.sequence) break;
        loci_document document;
        loci_status status =
            loci_document_load(change->corpus, NULL, indexed->sequence, &document, err);
        if (status == LOCI_E_NOTFOUND || (status == LOCI_OK && document.dead)) continue;
        LOCI_TRY(status);
        LOCI_TRY(loci_change_bury(change, document.replaces, err));
        document.replaces = 0;
        document.tokens = indexed->tokens;
        document.segments = indexed->segments;
        loci_document_store(change->corpus, &document, change->batch);
        LOCI_TRY(loci_change_done(change, document.sequence, err));
    }
    loci_cursor before = change->next->cursor;
    if (before.byte > 0 && before.sequence < fresh->cursor.sequence &&
        !completes(fresh, before.sequence))
        loci_change_drop(change, before.sequence); /* replaced or deleted on the way */
    change->next->cursor = fresh->cursor;
    return LOCI_OK;
}

static void remove_flats(loci_change *change) {
    for (uint32_t i = 0; i < change->next->flat_count; i++) {
        loci_key key = loci_key_pair(change->corpus->uid, change->next->flats[i].number);
        loci_batch_delete(change->batch, LOCI_CF_FLAT, &key);
    }
    change->next->flat_count = 0;
}

/* Caller holds corpus->lock. extent NULL: the builder's segments become flat ones. */
static loci_status commit_locked(const rebuild *r, loci_manifest_extent *extent,
                                 const char *failpoint, loci_change *change, loci_error *err) {
    loci_corpus *corpus = r->corpus;
    uint32_t first, count = r->plan->last - r->plan->first;
    if (!find_place(r, corpus->manifest, &first))
        return loci_fail(err, LOCI_E_ABORTED, "extents of corpus %s changed meanwhile",
                         corpus->name);
    LOCI_TRY(loci_change_begin(corpus, change, err));
    life_check check = life_check_of(corpus, r->fresh);
    loci_status status = LOCI_OK;
    if (extent && r->plan->merge)
        LOCI_TRY_GOTO(carry_runs(r, &corpus->manifest->extents[first], extent, err), fail);
    else if (extent)
        LOCI_TRY_GOTO(fill_runs(check, r->builder, extent, err), fail);
    if (r->plan->tail) remove_flats(change);
    if (!loci_manifest_replace(change->next, first, first + count, extent)) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to change corpus %s", corpus->name);
        goto fail;
    }
    if (!extent) LOCI_TRY_GOTO(name_flats(change, check, r->builder, err), fail);
    if (r->fresh) LOCI_TRY_GOTO(complete_documents(change, r->fresh, err), fail);
    return loci_change_commit(change, failpoint, err);
fail:
    loci_change_abort(change);
    return status;
}

static loci_status commit(const rebuild *r, loci_manifest_extent *extent, const char *failpoint,
                          loci_error *err) {
    loci_change change;
    pthread_mutex_lock(&r->corpus->lock);
    loci_status status = commit_locked(r, extent, failpoint, &change, err);
    pthread_mutex_unlock(&r->corpus->lock);
    if (status == LOCI_OK) loci_change_after(&change);
    return status;
}

/* --- Entry points ----------------------------------------------------------------------- */

loci_manifest *loci_corpus_manifest(loci_corpus *corpus) {
    pthread_mutex_lock(&corpus->lock);
    loci_manifest *manifest = loci_manifest_ref(corpus->manifest);
    pthread_mutex_unlock(&corpus->lock);
    return manifest;
}

loci_status loci_commit_flat(loci_corpus *corpus, const loci_fresh *fresh, loci_error *err) {
    loci_manifest *base = loci_corpus_manifest(corpus);
    loci_rebuild_plan plan = {.first = base->extent_count, .last = base->extent_count};
    /* Only read. */
    loci_builder *builder = (loci_builder *)(uintptr_t)fresh->builder;
    rebuild r = {.corpus = corpus, .base = base, .plan = &plan, .fresh = fresh, .builder = builder};
    loci_status status = LOCI_OK;
    if (builder->segment_count > 0) status = write_flats(corpus, builder, base->next_flat, err);
    if (status == LOCI_OK) status = commit(&r, NULL, "flat_commit", err);
    loci_manifest_unref(base);
    return status;
}

/* Claims the identity, so that nobody unlinks its file. True when a file of it is there already;
 * *out then describes it. */
static bool claim_extent(const rebuild *r, loci_manifest_extent *out) {
    loci_corpus *corpus = r->corpus;
    bool found = false;
    memset(out, 0, sizeof *out);
    loci_extent_identify(r->builder, out->id);
    out->tokens = r->builder->tokens;
    out->segments = r->builder->segment_count;
    pthread_mutex_lock(&corpus->lock);
    memcpy(corpus->building_id[r->plan->merge], out->id, sizeof out->id);
    corpus->building[r->plan->merge] = true;
    for (uint32_t i = 0; !found && i < corpus->manifest->extent_count; i++) {
        const loci_manifest_extent *other = &corpus->manifest->extents[i];
        found = memcmp(other->id, out->id, sizeof out->id) == 0;
        out->file_bytes = other->file_bytes;
        out->header_hash = other->header_hash;
    }
    for (size_t i = 0; !found && i < corpus->opened_count; i++) {
        const loci_extent *other = corpus->opened[i];
        found = memcmp(other->id, out->id, sizeof out->id) == 0;
        out->file_bytes = other->bytes;
        out->header_hash = other->header_hash;
    }
    pthread_mutex_unlock(&corpus->lock);
    return found;
}

/* A file that no change came to name goes, unless it is needed for something else. */
static void unclaim_extent(const rebuild *r, const loci_manifest_extent *extent, bool named) {
    pthread_mutex_lock(&r->corpus->lock);
    r->corpus->building[r->plan->merge] = false;
    if (!named) loci_corpus_supersede(r->corpus, extent->id);
    pthread_mutex_unlock(&r->corpus->lock);
}

static const char *failpoint_of(const loci_rebuild_plan *plan) {
    if (plan->merge) return "merge_commit";
    return plan->rewrite ? "rewrite_commit" : "manifest_commit";
}

static loci_status seal(rebuild *r, bool partial, const loci_cancel *cancel, loci_error *err) {
    loci_corpus *corpus = r->corpus;
    loci_manifest_extent extent;
    loci_extent *opened = NULL;
    loci_status status = LOCI_OK;
    loci_pair_source source = loci_builder_source(r->builder);
    if (r->plan->merge) source = (loci_pair_source){r, read_sources};
    if (!claim_extent(r, &extent))
        status = loci_extent_write(corpus->extents_dir, r->builder, source, corpus->store->backend,
                                   r->pool, cancel, &extent, err);
    else if (r->plan->merge && loci_id_listed(&corpus->apart, extent.id))
        status = loci_fail(err, LOCI_E_CORRUPT, "an extent of the same segments is damaged");
    /* Read back and verified before anything that it replaces goes. */
    if (status == LOCI_OK) status = loci_corpus_extent(corpus, &extent, &opened, err);
    extent.partial = partial;
    /* Without its words the extent is as good: who asks makes them anew. */
    loci_error words;
    if (status == LOCI_OK && loci_lexical_write(corpus, r->builder, extent.id, &words) != LOCI_OK)
        loci_log_warn("corpus %s: %s", corpus->name, words.text);
    if (status == LOCI_OK) status = commit(r, &extent, failpoint_of(r->plan), err);
    loci_manifest_extent_fini(&extent);
    loci_extent_unref(opened);
    unclaim_extent(r, &extent, status == LOCI_OK);
    return status;
}

static void rebuild_fini(rebuild *r) {
    for (uint32_t i = 0; r->sources && i < r->plan->last - r->plan->first; i++)
        loci_extent_unref(r->sources[i]);
    free(r->sources);
    for (uint32_t i = 0; i <= LOCI_PAIRS_AHEAD_MOST; i++) {
        free(r->k[i]);
        free(r->v[i]);
    }
    if (!r->borrowed) loci_builder_destroy(r->builder);
}

/* What could not be read may have gone since the plan was made, with its document or extent. */
static loci_status explain(const rebuild *r, loci_status status) {
    uint32_t place;
    pthread_mutex_lock(&r->corpus->lock);
    bool changed = r->corpus->manifest != r->base;
    bool stands = find_place(r, r->corpus->manifest, &place);
    pthread_mutex_unlock(&r->corpus->lock);
    if (!stands || (changed && status == LOCI_E_NOTFOUND)) return LOCI_E_ABORTED;
    return status == LOCI_E_NOTFOUND ? LOCI_E_CORRUPT : status;
}

loci_status loci_rebuild(loci_corpus *corpus, const loci_manifest *base,
                         const loci_rebuild_plan *plan, const loci_fresh *fresh, bool full,
                         struct loci_pool *pool, const loci_cancel *cancel, loci_error *err) {
    rebuild r = {.corpus = corpus, .base = base, .plan = plan, .fresh = fresh, .pool = pool};
    uint32_t seal_from = loci_tail_seal_tokens(corpus->extent_tokens_max);
    loci_status status = gather(&r, err);
    if (status != LOCI_OK) {
        status = explain(&r, status);
        goto out;
    }
    bool flat = r.builder->tokens == 0 || (plan->tail && !full && r.builder->tokens < seal_from);
    if (flat) {
        LOCI_TRY_GOTO(write_flats(corpus, r.builder, base->next_flat, err), out);
        status = commit(&r, NULL, failpoint_of(plan), err);
    } else {
        status = seal(&r, plan->tail && !full, cancel, err);
    }
out:
    rebuild_fini(&r);
    /* Files that were held until now, or came to nothing. */
    if (plan->merge || status != LOCI_OK) loci_corpus_purge(corpus);
    return status;
}
