/* SPDX-License-Identifier: Apache-2.0
 *
 * Making parts of a corpus anew: sealing a full extent, the canonical tail, rewriting what is a
 * quarter dead. One mechanism: gather live segments in memory in the order of registration, write
 * them as one extent (or as flat segments), and swap them in with one change.
 *
 * Only the ingest thread calls this, so extents keep their places in the manifest meanwhile;
 * documents may be buried by others at any time. A document buried while its segments were
 * gathered is dead in what the change commits. So is a document that was left unfinished because
 * another replaced it: its record lives on until its successor is complete, its segments do not.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "memory/ingest.h"
#include "memory/internal.h"
#include "memory/lexical.h"

/* --- What is due ------------------------------------------------------------------------- */

static uint32_t partial_place(const loci_manifest *manifest) {
    uint32_t count = manifest->extent_count;
    return count > 0 && manifest->extents[count - 1].partial ? count - 1 : count;
}

uint32_t loci_tail_tokens(const loci_manifest *manifest) {
    uint32_t place = partial_place(manifest);
    uint32_t tokens = (uint32_t)manifest->flat_tokens;
    if (place < manifest->extent_count)
        tokens += loci_extent_live_tokens(&manifest->extents[place]);
    return tokens;
}

loci_rebuild_plan loci_tail_plan(const loci_manifest *manifest) {
    return (loci_rebuild_plan){
        .first = partial_place(manifest), .last = manifest->extent_count, .tail = true};
}

/* A rewritten extent takes its neighbours in as long as they fit, those behind it first, and
 * becomes part of the tail when nothing is left behind it: so deletions leave neither small extents
 * nor a tail of the wrong form, whether there was time to rewrite between them or not. */
static void plan_rewrite(const loci_manifest *manifest, uint32_t place, uint32_t most,
                         loci_rebuild_plan *out) {
    uint64_t sum = loci_extent_live_tokens(&manifest->extents[place]);
    *out = (loci_rebuild_plan){.first = place, .last = place + 1, .rewrite = true};
    if (sum == 0) return;
    while (out->last < manifest->extent_count &&
           sum + loci_extent_live_tokens(&manifest->extents[out->last]) <= most)
        sum += loci_extent_live_tokens(&manifest->extents[out->last++]);
    while (out->first > 0 &&
           sum + loci_extent_live_tokens(&manifest->extents[out->first - 1]) <= most)
        sum += loci_extent_live_tokens(&manifest->extents[--out->first]);
    out->tail = out->last == manifest->extent_count && sum + manifest->flat_tokens <= most;
}

bool loci_rebuild_due(const loci_manifest *manifest, uint32_t extent_tokens_max,
                      loci_tail_demand demand, loci_rebuild_plan *out) {
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        const loci_manifest_extent *extent = &manifest->extents[i];
        if (4ull * extent->dead_tokens < extent->tokens) continue;
        plan_rewrite(manifest, i, extent_tokens_max, out);
        return true;
    }
    if (demand == LOCI_TAIL_KEEP || manifest->flat_count == 0) return false;
    uint32_t place = partial_place(manifest);
    bool due = manifest->flat_tokens >= loci_tail_seal_tokens(extent_tokens_max);
    if (place < manifest->extent_count)
        due = due || demand == LOCI_TAIL_ANY ||
              4 * manifest->flat_tokens >= loci_extent_live_tokens(&manifest->extents[place]);
    if (!due) return false;
    *out = loci_tail_plan(manifest);
    return true;
}

/* --- Gathering -------------------------------------------------------------------------- */

/* Copies the live rows of one pair, which stand in position order in k and v. */
static void copy_live(const loci_extent *extent, const loci_manifest_extent *entry,
                      const uint16_t *from, uint16_t *to) {
    size_t dim = extent->head_dim;
    uint32_t segment = 0;
    for (uint32_t r = 0; r < entry->run_count; r++) {
        uint32_t begin = extent->segment_begin[segment];
        segment += entry->runs[r].segments;
        size_t values = (extent->segment_begin[segment] - begin) * dim;
        if (entry->runs[r].dead) continue;
        memcpy(to, from + begin * dim, values * sizeof *to);
        to += values;
    }
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

static loci_status gather_extent(loci_corpus *corpus, const loci_manifest_extent *entry,
                                 loci_builder *builder, loci_error *err) {
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
    LOCI_TRY_GOTO(add_live_segments(extent, entry, builder, err), out);
    for (uint32_t p = 0; p < builder->pairs; p++) {
        LOCI_TRY_GOTO(loci_extent_read_pair(extent, p, k, v, err), out);
        copy_live(extent, entry, k, builder->k[p] + first);
        copy_live(extent, entry, v, builder->v[p] + first);
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

static loci_status gather(loci_corpus *corpus, const loci_manifest *base,
                          const loci_rebuild_plan *plan, const loci_fresh *fresh,
                          loci_builder *builder, loci_error *err) {
    for (uint32_t i = plan->first; i < plan->last; i++)
        LOCI_TRY(gather_extent(corpus, &base->extents[i], builder, err));
    for (uint32_t i = 0; plan->tail && i < base->flat_count; i++)
        LOCI_TRY(gather_flat(corpus, &base->flats[i], builder, err));
    return fresh ? loci_builder_add_all(builder, fresh->builder, err) : LOCI_OK;
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
static loci_status commit_locked(loci_corpus *corpus, const loci_rebuild_plan *plan,
                                 const loci_builder *builder, loci_manifest_extent *extent,
                                 const loci_fresh *fresh, const char *failpoint,
                                 loci_change *change, loci_error *err) {
    LOCI_TRY(loci_change_begin(corpus, change, err));
    life_check check = life_check_of(corpus, fresh);
    loci_status status = LOCI_OK;
    if (extent) LOCI_TRY_GOTO(fill_runs(check, builder, extent, err), fail);
    if (plan->tail) remove_flats(change);
    if (!loci_manifest_replace(change->next, plan->first, plan->last, extent)) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to change corpus %s", corpus->name);
        goto fail;
    }
    if (!extent) LOCI_TRY_GOTO(name_flats(change, check, builder, err), fail);
    if (fresh) LOCI_TRY_GOTO(complete_documents(change, fresh, err), fail);
    return loci_change_commit(change, failpoint, err);
fail:
    loci_change_abort(change);
    return status;
}

static loci_status commit(loci_corpus *corpus, const loci_rebuild_plan *plan,
                          const loci_builder *builder, loci_manifest_extent *extent,
                          const loci_fresh *fresh, const char *failpoint, loci_error *err) {
    loci_change change;
    pthread_mutex_lock(&corpus->lock);
    loci_status status =
        commit_locked(corpus, plan, builder, extent, fresh, failpoint, &change, err);
    corpus->building = false;
    pthread_mutex_unlock(&corpus->lock);
    if (status == LOCI_OK) loci_change_after(&change);
    return status;
}

/* --- Entry points ----------------------------------------------------------------------- */

static loci_manifest *current_manifest(loci_corpus *corpus) {
    pthread_mutex_lock(&corpus->lock);
    loci_manifest *manifest = loci_manifest_ref(corpus->manifest);
    pthread_mutex_unlock(&corpus->lock);
    return manifest;
}

loci_status loci_commit_flat(loci_corpus *corpus, const loci_fresh *fresh, loci_error *err) {
    loci_manifest *base = current_manifest(corpus);
    loci_rebuild_plan plan = {.first = base->extent_count, .last = base->extent_count};
    loci_status status = LOCI_OK;
    if (fresh->builder->segment_count > 0)
        status = write_flats(corpus, fresh->builder, base->next_flat, err);
    loci_manifest_unref(base);
    LOCI_TRY(status);
    return commit(corpus, &plan, fresh->builder, NULL, fresh, "flat_commit", err);
}

/* Claims the identity, so that nobody unlinks its file. True when a file of it is there already;
 * *out then describes it. */
static bool claim_extent(loci_corpus *corpus, const loci_builder *builder,
                         loci_manifest_extent *out) {
    bool found = false;
    memset(out, 0, sizeof *out);
    loci_extent_identify(builder, out->id);
    out->tokens = builder->tokens;
    out->segments = builder->segment_count;
    pthread_mutex_lock(&corpus->lock);
    memcpy(corpus->building_id, out->id, sizeof out->id);
    corpus->building = true;
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

/* A file that no change came to name is forgotten: the next open removes it, or the next attempt
 * replaces it. */
static loci_status seal(loci_corpus *corpus, const loci_rebuild_plan *plan,
                        const loci_builder *builder, const loci_fresh *fresh, bool partial,
                        struct loci_pool *pool, const loci_cancel *cancel, loci_error *err) {
    loci_manifest_extent extent;
    loci_extent *opened = NULL;
    loci_status status = LOCI_OK;
    if (!claim_extent(corpus, builder, &extent))
        status = loci_extent_write(corpus->extents_dir, builder, pool, cancel, &extent, err);
    /* Read back and verified before anything that it replaces goes. */
    if (status == LOCI_OK) status = loci_corpus_extent(corpus, &extent, &opened, err);
    extent.partial = partial;
    /* Without its words the extent is as good: who asks makes them anew. */
    loci_error words;
    if (status == LOCI_OK && loci_lexical_write(corpus, builder, extent.id, &words) != LOCI_OK)
        loci_log_warn("corpus %s: %s", corpus->name, words.text);
    if (status == LOCI_OK)
        status = commit(corpus, plan, builder, &extent, fresh,
                        plan->rewrite ? "rewrite_commit" : "manifest_commit", err);
    loci_manifest_extent_fini(&extent);
    loci_extent_unref(opened);
    pthread_mutex_lock(&corpus->lock);
    corpus->building = false;
    pthread_mutex_unlock(&corpus->lock);
    return status;
}

loci_status loci_rebuild(loci_corpus *corpus, const loci_rebuild_plan *plan,
                         const loci_fresh *fresh, bool full, struct loci_pool *pool,
                         const loci_cancel *cancel, loci_error *err) {
    loci_builder *builder = NULL;
    LOCI_TRY(loci_builder_create(&corpus->geometry, &builder, err));
    pthread_mutex_lock(&corpus->lock);
    loci_manifest *base = loci_manifest_ref(corpus->manifest);
    uint64_t burials = corpus->burials;
    pthread_mutex_unlock(&corpus->lock);
    uint32_t seal_from = loci_tail_seal_tokens(corpus->extent_tokens_max);
    loci_status status = gather(corpus, base, plan, fresh, builder, err);
    if (status == LOCI_E_NOTFOUND) {
        pthread_mutex_lock(&corpus->lock);
        bool buried = corpus->burials != burials;
        pthread_mutex_unlock(&corpus->lock);
        status = buried ? LOCI_E_ABORTED : LOCI_E_CORRUPT;
    }
    if (status != LOCI_OK) goto out;
    bool flat = builder->tokens == 0 || (plan->tail && !full && builder->tokens < seal_from);
    if (flat) {
        LOCI_TRY_GOTO(write_flats(corpus, builder, base->next_flat, err), out);
        status = commit(corpus, plan, builder, NULL, fresh,
                        plan->rewrite ? "rewrite_commit" : "manifest_commit", err);
    } else {
        status = seal(corpus, plan, builder, fresh, plan->tail && !full, pool, cancel, err);
    }
out:
    loci_manifest_unref(base);
    loci_builder_destroy(builder);
    return status;
}
