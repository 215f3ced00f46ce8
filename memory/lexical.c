/* SPDX-License-Identifier: Apache-2.0
 *
 * Blocks of postings of a corpus: making, keeping, reading; see lexical.h.
 */
#include "memory/lexical.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "memory/snapshot.h"
#include "memory/terms.h"

#define WINDOW_BYTES (1u << 20) /* of a document, read at once */
#define NAME_BYTES (LOCI_NAME_MAX + 96u)

/* A segment by where its text stands. */
typedef struct text_place {
    uint64_t sequence, start, end;
} text_place;

static loci_key key_of(const loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    loci_key key = loci_key_uid(corpus->uid);
    for (size_t i = 0; i < LOCI_EXTENT_ID_BYTES; i++) loci_key_u8(&key, id[i]);
    return key;
}

/* --- Making ----------------------------------------------------------------------------- */

/* A block being made. */
typedef struct block_maker {
    const loci_corpus *corpus;
    const loci_cancel *cancel; /* NULL = none */
    bool quiet;                /* what is unreadable was logged before */
    loci_view *view;           /* records and texts go together */
    loci_document document;
    loci_buf text;
    loci_term_list terms;
} block_maker;

/* Places [first, last) are of one document, which is loaded. */
static loci_status add_window(block_maker *self, const text_place *places, uint32_t first,
                              uint32_t last, loci_error *err) {
    uint64_t start = places[first].start, end = places[last - 1].end;
    if (end > self->document.bytes || start > end)
        return loci_fail(err, LOCI_E_CORRUPT,
                         "document \"%.100s\" of corpus %s is shorter than its segments",
                         self->document.id, self->corpus->name);
    loci_buf_clear(&self->text);
    LOCI_TRY(loci_document_text(self->corpus, self->view, &self->document, start, end, &self->text,
                                err));
    for (uint32_t i = first; i < last; i++) {
        loci_slice part = loci_slice_of(self->text.data + (places[i].start - start),
                                        (size_t)(places[i].end - places[i].start));
        LOCI_TRY(loci_terms_of(part, i, false, &self->terms, err));
    }
    return LOCI_OK;
}

/* Documents that are gone leave their segments absent. What is damaged has no words and keeps no
 * question from the rest: who reads it is told. */
static loci_status gather_terms(block_maker *self, const text_place *places, uint32_t count,
                                uint8_t *present, loci_error *err) {
    loci_status found = LOCI_E_NOTFOUND;
    bool told = self->quiet;
    for (uint32_t first = 0, last; first < count; first = last) {
        const text_place *place = &places[first];
        loci_error damage = {0};
        LOCI_TRY(loci_cancel_check(self->cancel));
        for (last = first + 1; last < count && places[last].sequence == place->sequence &&
                               places[last].start >= places[last - 1].end &&
                               places[last].end - place->start <= WINDOW_BYTES;
             last++) {
        }
        if (first == 0 || places[first - 1].sequence != place->sequence) {
            told = self->quiet;
            found = loci_document_load(self->corpus, self->view, place->sequence, &self->document,
                                       &damage);
        }
        if (found == LOCI_E_NOTFOUND) continue;
        loci_status status = found;
        if (status == LOCI_OK) status = add_window(self, places, first, last, &damage);
        if (status != LOCI_OK && status != LOCI_E_CORRUPT) {
            if (err) *err = damage;
            return status;
        }
        if (status == LOCI_E_CORRUPT && !told) {
            loci_log_warn("words that cannot be read are not searched: %s", damage.text);
            told = true; /* once a document */
        }
        memset(present + first, 1, last - first);
    }
    return LOCI_OK;
}

static loci_status make_block(const loci_corpus *corpus, const text_place *places, uint32_t count,
                              bool quiet, const loci_cancel *cancel, loci_buf *out,
                              loci_error *err) {
    block_maker self = {.corpus = corpus, .cancel = cancel, .quiet = quiet};
    uint8_t *present = calloc(count + 1u, 1);
    if (!present) return loci_fail(err, LOCI_E_NOMEM, "no memory for an index of words");
    self.view = loci_view_open(corpus->store->rocks);
    loci_status status = gather_terms(&self, places, count, present, err);
    loci_view_close(self.view);
    if (status == LOCI_OK) status = loci_term_block_encode(&self.terms, count, present, out, err);
    free(present);
    loci_buf_fini(&self.text);
    loci_term_list_fini(&self.terms);
    return status;
}

static loci_status store_block(const loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES],
                               const loci_buf *block, loci_error *err) {
    loci_key key = key_of(corpus, id);
    loci_batch *batch = loci_batch_create(corpus->store->rocks);
    loci_batch_put(batch, LOCI_CF_TERMS, &key, LOCI_KIND_TERMS,
                   loci_slice_of(block->data, block->len));
    LOCI_FAILPOINT("terms_write");
    loci_status status = loci_batch_write(batch, false, err);
    LOCI_FAILPOINT("terms_write");
    loci_batch_destroy(batch);
    return status;
}

loci_status loci_lexical_write(const loci_corpus *corpus, const loci_builder *builder,
                               const uint8_t id[LOCI_EXTENT_ID_BYTES], loci_error *err) {
    uint32_t count = builder->segment_count;
    text_place *places = malloc((count + 1u) * sizeof *places);
    if (!places) return loci_fail(err, LOCI_E_NOMEM, "no memory for an index of words");
    for (uint32_t i = 0; i < count; i++) {
        const loci_built_segment *segment = &builder->segments[i];
        places[i] = (text_place){segment->sequence, segment->start, segment->end};
    }
    loci_buf block = LOCI_BUF_INIT;
    loci_status status = make_block(corpus, places, count, false, NULL, &block, err);
    if (status == LOCI_OK) status = store_block(corpus, id, &block, err);
    loci_buf_fini(&block);
    free(places);
    return status;
}

void loci_lexical_drop(const loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES],
                       loci_batch *batch) {
    loci_key key = key_of(corpus, id);
    loci_batch_delete(batch, LOCI_CF_TERMS, &key);
}

loci_status loci_lexical_clean(const loci_corpus *corpus, loci_error *err) {
    loci_rocks *rocks = corpus->store->rocks;
    loci_key prefix = loci_key_uid(corpus->uid);
    loci_scan *scan = loci_scan_open(rocks, NULL, LOCI_CF_TERMS, &prefix, NULL);
    loci_batch *batch = loci_batch_create(rocks);
    loci_slice found;
    while (loci_scan_next(scan, &found)) {
        if (found.len != prefix.len + LOCI_EXTENT_ID_BYTES) continue;
        const uint8_t *id = found.data + prefix.len;
        if (!loci_manifest_names(corpus->manifest, id)) loci_lexical_drop(corpus, id, batch);
    }
    loci_status status = loci_scan_close(scan, err);
    /* Damaged blocks are made anew when they are read; the corpus opens without them. */
    if (status == LOCI_E_CORRUPT) {
        loci_log_warn("the index of words of corpus %s is damaged", corpus->name);
        status = LOCI_OK;
    }
    if (status == LOCI_OK) status = loci_batch_write(batch, false, err);
    loci_batch_destroy(batch);
    return status;
}

/* --- Reading ---------------------------------------------------------------------------- */

/* Postings of one block, handed on for live segments. */
typedef struct posting_state {
    loci_posting_fn fn;
    void *ctx;
    const uint32_t *begin; /* [segments + 1] tokens before each segment of the block */
    const uint8_t *dead;   /* NULL = none is */
    uint32_t base, term;
} posting_state;

static void hand_on(void *ctx, uint32_t segment, uint32_t times) {
    const posting_state *state = ctx;
    if (state->dead && state->dead[segment]) return;
    state->fn(state->ctx, state->term, state->base + segment,
              state->begin[segment + 1] - state->begin[segment], times);
}

static loci_status find_terms(const loci_term_block *block, const char *name, const uint64_t *terms,
                              uint32_t count, posting_state *state, loci_error *err) {
    for (state->term = 0; state->term < count; state->term++)
        LOCI_TRY(loci_term_block_find(block, terms[state->term], name, hand_on, state, err));
    return LOCI_OK;
}

/* Every live segment must be known to the block. */
static bool complete(const loci_term_block *block, const uint8_t *dead) {
    for (uint32_t i = 0; i < block->segments; i++)
        if (!block->present[i] && !(dead && dead[i])) return false;
    return true;
}

/* Blocks in memory: of extents where the database does not take them, and of the flat segments. A
 * block that is there stays as it is. */
static loci_slice kept_block(loci_snapshot *snapshot, uint32_t place, bool *quiet) {
    pthread_mutex_lock(&snapshot->lock);
    loci_slice block = loci_slice_of(snapshot->terms[place].data, snapshot->terms[place].len);
    *quiet = snapshot->terms_unkept;
    pthread_mutex_unlock(&snapshot->lock);
    return block;
}

/* Keeps *made, which is moved, unless another thread was first; *out is the one that stays. */
static loci_status keep_block(loci_snapshot *snapshot, uint32_t place, const char *name,
                              loci_buf *made, loci_slice *out, loci_error *err) {
    loci_budget *budget = snapshot->corpus->store->options.budget;
    LOCI_TRY(loci_budget_take(budget, LOCI_MEMORY_SNAPSHOTS, made->capacity, name, err));
    loci_buf *kept = &snapshot->terms[place];
    pthread_mutex_lock(&snapshot->lock);
    if (kept->len == 0) {
        snapshot->reserved += made->capacity;
        *kept = *made;
        *made = (loci_buf)LOCI_BUF_INIT;
    } else {
        loci_budget_give(budget, LOCI_MEMORY_SNAPSHOTS, made->capacity);
    }
    *out = loci_slice_of(kept->data, kept->len);
    pthread_mutex_unlock(&snapshot->lock);
    return LOCI_OK;
}

static loci_status make_extent_block(const loci_snapshot *snapshot, uint32_t index, bool quiet,
                                     const loci_cancel *cancel, loci_buf *out, loci_error *err) {
    const loci_manifest_extent *entry = &snapshot->manifest->extents[index];
    const loci_extent *extent = snapshot->extents[index];
    text_place *places = malloc((extent->segments + 1u) * sizeof *places);
    if (!places) return loci_fail(err, LOCI_E_NOMEM, "no memory for an index of words");
    uint32_t at = 0;
    for (uint32_t r = 0; r < entry->run_count; r++)
        for (uint32_t i = 0; i < entry->runs[r].segments; i++, at++) {
            loci_extent_segment segment = loci_extent_segment_at(extent, at);
            places[at] = (text_place){entry->runs[r].sequence, segment.start, segment.end};
        }
    loci_status status = loci_extent_check(extent, err);
    if (status == LOCI_OK)
        status = make_block(snapshot->corpus, places, extent->segments, quiet, cancel, out, err);
    free(places);
    return status;
}

/* A new block in *made, which is stored, or else kept in memory, or else only lent. */
static loci_status renew_extent_block(loci_snapshot *snapshot, uint32_t index, const char *name,
                                      bool quiet, const loci_cancel *cancel, loci_buf *made,
                                      loci_term_block *out, loci_error *err) {
    const loci_extent *extent = snapshot->extents[index];
    loci_error unkept = {0};
    LOCI_TRY(make_extent_block(snapshot, index, quiet, cancel, made, err));
    loci_slice bytes = loci_slice_of(made->data, made->len);
    LOCI_TRY(loci_term_block_open(bytes, extent->segments, name, out, err));
    if (!complete(out, snapshot->extent_views[index].segment_dead))
        return loci_fail(err, LOCI_E_CORRUPT, "%s: a document of it has no record", name);
    if (store_block(snapshot->corpus, extent->id, made, &unkept) == LOCI_OK) return LOCI_OK;
    /* The answer does not need it. */
    if (!quiet) loci_log_warn("%s is not kept: %s", name, unkept.text);
    if (keep_block(snapshot, index, name, made, &bytes, &unkept) == LOCI_OK)
        return loci_term_block_open(bytes, extent->segments, name, out, err);
    pthread_mutex_lock(&snapshot->lock);
    snapshot->terms_unkept = true;
    pthread_mutex_unlock(&snapshot->lock);
    return LOCI_OK;
}

/* The stored block in *value, or a new one in *made, or one in memory. */
static loci_status load_extent_block(loci_snapshot *snapshot, uint32_t index, const char *name,
                                     const loci_cancel *cancel, loci_value **value, loci_buf *made,
                                     loci_term_block *out, loci_error *err) {
    const loci_corpus *corpus = snapshot->corpus;
    const loci_extent *extent = snapshot->extents[index];
    bool quiet = false;
    loci_slice payload = kept_block(snapshot, index, &quiet);
    if (payload.len > 0) return loci_term_block_open(payload, extent->segments, name, out, err);
    loci_key key = key_of(corpus, extent->id);
    loci_error first = {0};
    loci_status status = loci_rocks_pin(corpus->store->rocks, NULL, LOCI_CF_TERMS, &key,
                                        LOCI_KIND_TERMS, value, &payload, &first);
    if (status == LOCI_OK)
        status = loci_term_block_open(payload, extent->segments, name, out, &first);
    if (status == LOCI_OK && complete(out, snapshot->extent_views[index].segment_dead))
        return LOCI_OK;
    loci_value_free(*value);
    *value = NULL;
    if (status == LOCI_E_CORRUPT) {
        if (!quiet) loci_log_warn("%s is made anew: %s", name, first.text);
    } else if (status != LOCI_OK && status != LOCI_E_NOTFOUND) {
        return loci_fail(err, status, "%s", first.text);
    }
    return renew_extent_block(snapshot, index, name, quiet, cancel, made, out, err);
}

static loci_status extent_postings(loci_snapshot *snapshot, uint32_t index, const uint64_t *terms,
                                   uint32_t count, posting_state *state, uint64_t *bytes,
                                   const loci_cancel *cancel, loci_error *err) {
    const loci_extent_view *view = &snapshot->extent_views[index];
    char name[NAME_BYTES];
    snprintf(name, sizeof name, "the index of words of extent %s of corpus %s",
             snapshot->extents[index]->name, snapshot->corpus->name);
    loci_value *value = NULL;
    loci_buf made = LOCI_BUF_INIT;
    loci_term_block block;
    loci_status status =
        load_extent_block(snapshot, index, name, cancel, &value, &made, &block, err);
    if (status == LOCI_OK) {
        state->begin = view->segment_begin;
        state->dead = view->segment_dead;
        state->base = view->segment_base;
        status = find_terms(&block, name, terms, count, state, err);
        *bytes += block.bytes;
    }
    loci_value_free(value);
    loci_buf_fini(&made);
    return status;
}

static loci_status make_flat_block(const loci_snapshot *snapshot, const loci_cancel *cancel,
                                   loci_buf *out, loci_error *err) {
    uint32_t count = snapshot->view.flat_segments;
    text_place *places = malloc((count + 1u) * sizeof *places);
    if (!places) return loci_fail(err, LOCI_E_NOMEM, "no memory for an index of words");
    for (uint32_t i = 0; i < count; i++) {
        const loci_manifest_flat *flat = &snapshot->manifest->flats[i];
        places[i] = (text_place){flat->sequence, flat->start, flat->end};
    }
    loci_status status = make_block(snapshot->corpus, places, count, false, cancel, out, err);
    free(places);
    return status;
}

/* The flat segments' block, made once, without the lock: others go on meanwhile. */
static loci_status flat_block(loci_snapshot *snapshot, const char *name, const loci_cancel *cancel,
                              loci_term_block *out, loci_error *err) {
    uint32_t count = snapshot->view.flat_segments, place = snapshot->view.extent_count;
    bool quiet;
    loci_slice block = kept_block(snapshot, place, &quiet);
    if (block.len == 0) {
        loci_buf made = LOCI_BUF_INIT;
        loci_status status = make_flat_block(snapshot, cancel, &made, err);
        if (status == LOCI_OK) status = keep_block(snapshot, place, name, &made, &block, err);
        loci_buf_fini(&made);
        LOCI_TRY(status);
    }
    LOCI_TRY(loci_term_block_open(block, count, name, out, err));
    if (complete(out, NULL)) return LOCI_OK;
    return loci_fail(err, LOCI_E_CORRUPT, "%s: a document of it has no record", name);
}

loci_status loci_snapshot_postings(const loci_snapshot *snapshot, const uint64_t *terms,
                                   uint32_t count, const loci_cancel *cancel, loci_posting_fn fn,
                                   void *ctx, uint64_t *bytes, loci_error *err) {
    posting_state state = {.fn = fn, .ctx = ctx};
    loci_snapshot *owner = (loci_snapshot *)(uintptr_t)snapshot; /* a cache, behind its lock */
    loci_status status = LOCI_OK;
    for (uint32_t i = 0; i < snapshot->view.extent_count && status == LOCI_OK; i++) {
        status = loci_cancel_check(cancel);
        if (status == LOCI_OK)
            status = extent_postings(owner, i, terms, count, &state, bytes, cancel, err);
    }
    if (status == LOCI_OK && snapshot->view.flat_segments > 0) {
        char name[NAME_BYTES];
        snprintf(name, sizeof name, "the index of words of the tail of corpus %s",
                 snapshot->corpus->name);
        loci_term_block block;
        status = flat_block(owner, name, cancel, &block, err);
        state.begin = snapshot->flat_begin;
        state.dead = NULL;
        state.base = snapshot->extent_segments;
        if (status == LOCI_OK) status = find_terms(&block, name, terms, count, &state, err);
    }
    if (status == LOCI_E_CANCELLED || status == LOCI_E_TIMEOUT)
        return loci_fail(err, status, "the question ended while its words were looked up");
    return status;
}
