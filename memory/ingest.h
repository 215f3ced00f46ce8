/* SPDX-License-Identifier: Apache-2.0
 *
 * The registration pipeline: a background thread that turns stored documents into extents, and one
 * that merges these (merge.h).
 *
 *   stored document -> split into segments -> encode (model) -> builder (<= 32k tokens)
 *     -> sealed extent file -> manifest (one atomic RocksDB write) -> SEARCHABLE
 *     -> merged extent files (<= 4M tokens)
 *
 * Rules (they make the final manifest a function of the documents' order alone):
 * - A full extent is sealed when the next segment would not fit in LOCI_EXTENT_SEAL_TOKENS.
 * - When no document is pending, or 60 s after the last commit, or soon after small documents
 *   arrived (they must be searchable within a second), the rest of the builder is committed as flat
 *   open segments in RocksDB: searchable at once, scanned exactly.
 * - A commit may fall within a document. What it holds of that is dead for readers until the
 *   document is complete, and for good when it is replaced or deleted before.
 * - Canonical tail: when a Register stream asks for it (loci_ingest_settle), a tail of at least
 *   LOCI_TAIL_SEAL_TOKENS is sealed into one partial extent, which replaces the previous partial
 *   extent (its K and V are read back in position order); a smaller tail stays flat. So then a
 *   corpus is: full extents, then at most one partial extent or flat segments.
 * - Unasked, when the corpus has been idle for a moment, the tail is sealed only when its flat
 *   segments have LOCI_TAIL_SEAL_TOKENS or a quarter of the partial extent's tokens: a tiny
 * document does not make an extent anew.
 * - An extent with at least a quarter of its tokens dead is rewritten, together with its neighbours
 *   as far as all fit one.
 * - Full extents are merged: n of them become as many as n has ones in binary, each a power of two
 *   of them, at most merge_tokens. That begins when nothing has changed for merge_calm_ms, or at
 *   once for one of a million tokens (or the largest size, if that is less), and nobody waits for
 *   it: neither loci_ingest_settle nor a document. Merged ones that are a quarter dead are
 *   rewritten by the merger. (With so short segments that LOCI_EXTENT_SEGMENTS_MAX binds, which are
 *   merged may depend on when.)
 * - Work never holds more than the builder and one encode batch in memory, or two builders: where
 *   there is room (seal_beside), a full extent is clustered and written while the segments of the
 *   next are encoded. Commits come in the same order, with the same bytes.
 * - A causal corpus is committed batch by batch, none of which holds tokens of two documents: what
 * a batch is encoded after is all in the store. Where batches end changes how floating-point sums
 *   are rounded, so after an interruption K and V may differ in their last bit; in int8 also by
 *   what sealing rounds, since what is sealed when depends on time.
 */
#ifndef LOCI_MEMORY_INGEST_H
#define LOCI_MEMORY_INGEST_H

#include "memory/store.h"

#define LOCI_TAIL_SEAL_TOKENS 4096u /* at most half an extent: loci_tail_seal_tokens */

/* Segments of a document: tokens with the shared prefix token first if the model has one. */
typedef struct loci_split {
    uint32_t *tokens;      /* of all segments, one after another */
    uint32_t *begin;       /* segments + 1 offsets into tokens */
    uint64_t *start, *end; /* byte range of each segment in the document */
    uint32_t segments;
    uint64_t next; /* where to go on; equals the text's length at the end */
} loci_split;

/* What the pipeline needs from a model; given by services/. */
typedef struct loci_encoder {
    void *ctx;
    loci_geometry geometry;
    /* Cuts text from byte `from` (a segment border) into at most segments_max segments.
     * Deterministic: the cuts do not depend on segments_max. The arrays belong to the encoder and
     * stay valid until its next call. Whitespace-only text gives no segments. */
    loci_status (*split)(void *ctx, loci_slice text, uint64_t from, uint32_t segments_max,
                         const loci_split **out, loci_error *err);
    /* K and V (bf16) of the retrieval layers, for pair = layer * kv_heads + head host arrays
     * [tokens][head_dim], prefix tokens included (the pipeline drops the first row of each
     * segment when geometry.has_sink). */
    loci_status (*encode)(void *ctx, const uint32_t *tokens, const uint32_t *begin,
                          uint32_t segments, uint16_t *const *k, uint16_t *const *v,
                          const loci_cancel *cancel, loci_error *err);
    /* For causal corpora; NULL: there can be none. The same of tokens, without prefix, that follow
     * all those of `past`, from position loci_snapshot_end(past) on. */
    loci_status (*encode_after)(void *ctx, const loci_snapshot *past, const uint32_t *tokens,
                                uint32_t count, uint16_t *const *k, uint16_t *const *v,
                                const loci_cancel *cancel, loci_error *err);
} loci_encoder;

typedef struct loci_ingest loci_ingest;

/* The most memory that registration holds for a corpus of this geometry, what the encoder itself
 * takes not counted: one document, one batch, two extents' worth of segments (three with
 * seal_beside), one index being built; and one merge. document_bytes_max, extent_tokens,
 * extent_kv_bytes, merge_tokens, pairs_overlap and seal_beside of the options count. */
uint64_t loci_ingest_memory(const loci_geometry *geometry, const loci_store_options *options);
/* The largest merge, a power of two of sealed extents, that fits into so many bytes: for
 * merge_tokens of the options. 0 = none. */
uint32_t loci_merge_tokens_within(const loci_geometry *geometry, const loci_store_options *options,
                                  uint64_t bytes);

typedef struct loci_ingest_progress {
    uint64_t stored_sequence;                /* last committed document of the corpus */
    uint64_t searchable_sequence;            /* every document up to it is searchable */
    uint64_t tokens_encoded, tokens_indexed; /* since the process started, this corpus */
    uint64_t segments_indexed;
    double tokens_per_s; /* recent */
    const char *stage;   /* "idle", "encoding", "indexing", "merging"; static string */
    uint64_t revision;
    loci_error failure;       /* status OK, or why indexing of this corpus stands still (retried) */
    loci_error merge_failure; /* the same of merging, for which nobody needs to wait */
} loci_ingest_progress;

/* Starts the thread; unfinished work of earlier runs goes on by itself. pool is for index building.
 */
LOCI_MUST_CHECK loci_status loci_ingest_start(loci_store *store, const loci_encoder *encoder,
                                              struct loci_pool *pool, loci_ingest **out,
                                              loci_error *err);
/* Stops at the next step (builder contents are committed flat if that is quick, else encoded
 * again). */
void loci_ingest_stop(loci_ingest *ingest);
/* Tells the thread that documents were committed. */
void loci_ingest_wake(loci_ingest *ingest);
LOCI_MUST_CHECK loci_status loci_ingest_progress_of(loci_ingest *ingest, const char *corpus,
                                                    loci_ingest_progress *out, loci_error *err);
/* The same of the index that loci_corpus_reindex is making; nothing when it is not. */
LOCI_MUST_CHECK loci_status loci_ingest_reindex_progress(loci_ingest *ingest, const char *corpus,
                                                         loci_ingest_progress *out,
                                                         loci_error *err);
/* Waits until something changed for the corpus since *out was last filled, or timeout_ms. */
LOCI_MUST_CHECK loci_status loci_ingest_wait(loci_ingest *ingest, const char *corpus,
                                             unsigned timeout_ms, loci_ingest_progress *in_out,
                                             loci_error *err);
/* Asks for the canonical tail, once, as soon as nothing is pending; loci_ingest_settled tells when,
 * and asks again if others registered meanwhile. Who stops waiting leaves nothing behind. */
void loci_ingest_settle(loci_ingest *ingest, const char *corpus);
bool loci_ingest_settled(loci_ingest *ingest, const char *corpus);

#endif
