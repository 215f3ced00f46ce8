/* SPDX-License-Identifier: Apache-2.0
 *
 * The manifest: which extents and flat segments make up a corpus at one revision.
 *
 * A manifest that others can see never changes: a change clones it, edits the clone and swaps.
 * Reference-counted, so that a snapshot keeps the one it was made from. FORMAT.md section 3
 * states the bytes.
 */
#ifndef LOCI_MEMORY_MANIFEST_H
#define LOCI_MEMORY_MANIFEST_H

#include <stdatomic.h>

#include "memory/store.h"

#define LOCI_EXTENT_ID_BYTES 16u
#define LOCI_CONTENT_HASH_BYTES 16u

/* Consecutive segments of one document in an extent. */
typedef struct loci_run {
    uint64_t sequence;
    uint32_t segments, tokens;
    bool dead;
} loci_run;

typedef struct loci_manifest_extent {
    uint8_t id[LOCI_EXTENT_ID_BYTES];
    uint64_t file_bytes, header_hash;
    uint32_t tokens, segments;
    bool partial;
    loci_run *runs;
    uint32_t run_count;
    uint32_t dead_tokens, dead_segments; /* derived */
} loci_manifest_extent;

typedef struct loci_manifest_flat {
    uint64_t number, sequence, start, end;
    uint8_t content[LOCI_CONTENT_HASH_BYTES];
    uint32_t tokens;
} loci_manifest_flat;

/* Where indexing goes on: byte `byte` of document `sequence` or the first one after it. */
typedef struct loci_cursor {
    uint64_t sequence, byte;
    uint32_t segments; /* of that document, already indexed */
    uint64_t tokens;
} loci_cursor;

typedef struct loci_manifest {
    atomic_uint refs;
    char fingerprint[LOCI_FINGERPRINT_LEN + 1];
    uint64_t revision;
    loci_cursor cursor;
    uint64_t next_flat;
    loci_manifest_extent *extents;
    uint32_t extent_count;
    loci_manifest_flat *flats;
    uint32_t flat_count;
    /* Derived by loci_manifest_sum: live segments and tokens, without those of the unfinished
     * document; tokens of all flat segments. */
    uint64_t live_segments, live_tokens, flat_tokens, file_bytes;
} loci_manifest;

/* NULL when there is no memory. */
loci_manifest *loci_manifest_create(const char *fingerprint);
loci_manifest *loci_manifest_clone(const loci_manifest *manifest);
loci_manifest *loci_manifest_ref(loci_manifest *manifest);
void loci_manifest_unref(loci_manifest *manifest); /* NULL allowed */

/* XXH3-128, canonical, of what the manifest makes searchable and in which extents. At rest
 * (loci_ingest_settled, and merged: loci_corpus_info) equal for the same documents registered in
 * the same order, whatever interrupted that; before, when flat segments are sealed depends on time.
 * Covers every byte of the extents through the hashes of their headers; ids of documents are not
 * part of it. False when there is no memory. */
bool loci_manifest_hash(const loci_manifest *manifest, uint8_t out[LOCI_EXTENT_ID_BYTES]);

void loci_manifest_encode(const loci_manifest *manifest, loci_buf *out);
/* Checks every count and sum; `name` is for messages. */
LOCI_MUST_CHECK loci_status loci_manifest_decode(loci_slice payload, const char *fingerprint,
                                                 const char *name, loci_manifest **out,
                                                 loci_error *err);
/* Fills what is derived; to be called after every edit. */
void loci_manifest_sum(loci_manifest *manifest);

/* Frees the runs. */
void loci_manifest_extent_fini(loci_manifest_extent *extent);
/* Replaces extents [first, last) by *extent, whose runs move into the manifest, or by nothing
 * (NULL). False when there is no memory; nothing is moved then. */
bool loci_manifest_replace(loci_manifest *manifest, uint32_t first, uint32_t last,
                           loci_manifest_extent *extent);
/* False when there is no memory. */
bool loci_manifest_add_flat(loci_manifest *manifest, const loci_manifest_flat *flat);
/* Marks every run of the document dead; flat segments are the caller's. */
void loci_manifest_bury(loci_manifest *manifest, uint64_t sequence);
/* Whether the document is the one at the cursor, unfinished: what is committed of it is kept like
 * any live segment, and counts as dead for everybody who reads until the document is complete. Its
 * segments are the last of the manifest. */
static inline bool loci_manifest_hides(const loci_manifest *manifest, uint64_t sequence) {
    return manifest->cursor.byte > 0 && manifest->cursor.sequence == sequence;
}
bool loci_manifest_names(const loci_manifest *manifest, const uint8_t id[LOCI_EXTENT_ID_BYTES]);

static inline uint32_t loci_extent_live_tokens(const loci_manifest_extent *extent) {
    return extent->tokens - extent->dead_tokens;
}

/* Live tokens, those of the document at the cursor included. */
static inline uint64_t loci_manifest_tokens(const loci_manifest *manifest) {
    uint64_t tokens = manifest->flat_tokens;
    for (uint32_t i = 0; i < manifest->extent_count; i++)
        tokens += loci_extent_live_tokens(&manifest->extents[i]);
    return tokens;
}

#endif
