/* SPDX-License-Identifier: Apache-2.0
 *
 * The durable side of Loci: corpora, documents, manifests and extents in one data directory.
 *
 *   DIR/LOCK             held by the one process that uses the directory
 *   DIR/LAYOUT           the layout version; a newer one is refused
 *   DIR/db/              RocksDB: catalogue, manifests, documents (zstd), open segments
 *   DIR/extents/UID/ID   immutable extent files, memory-mapped (memory/FORMAT.md)
 *
 * RocksDB holds whatever changes; an extent never changes after its file was written, fsynced
 * and named in a manifest by one atomic write. A file that no manifest names is removed at open.
 *
 * Durability: loci_document_commit makes a document part of its corpus; it is STORED (survives kill
 * -9 and power loss) once loci_store_sync returned after that. Documents are indexed in the order
 * of their sequence numbers; the manifest of a corpus depends only on that order and on deletions,
 * not on interruptions.
 *
 * Threading: every function may be called from any thread. Snapshots are reference-counted.
 */
#ifndef LOCI_MEMORY_STORE_H
#define LOCI_MEMORY_STORE_H

#include "attention/index.h"
#include "base/budget.h"
#include "base/cancel.h"

#define LOCI_NAME_MAX 63
#define LOCI_DOCUMENT_ID_MAX 512
#define LOCI_METADATA_MAX 65536
#define LOCI_FINGERPRINT_LEN 32

typedef struct loci_store loci_store;
typedef struct loci_snapshot loci_snapshot;
typedef struct loci_document_writer loci_document_writer;

/* The shape of what a model keeps of a token; fixed for a corpus at creation. */
typedef struct loci_geometry {
    char fingerprint[LOCI_FINGERPRINT_LEN + 1];
    uint32_t retrieval_layers, kv_heads, head_dim;
    uint32_t ranking_layer;  /* retrieval index whose codes are kept in position order too */
    uint32_t segment_tokens; /* most tokens of a segment, shared prefix not counted */
    bool has_sink;
    /* The corpus's own choice, not its model's. Causal: its text is one growing sequence, each
     * token encoded with all before it in view; segments are but runs of it. Nothing searchable can
     * be deleted or replaced then, since what follows was encoded knowing it. */
    bool causal;
    uint64_t tokens_max; /* most tokens of a causal corpus, 0 = no limit */
    bool kv_int8;        /* K and V in extents are int8 (attention/index.h), else bf16 */
} loci_geometry;

/* How questions look at a corpus; nothing that is stored depends on them. The formulas stand in
 * attention/README.md ("Settings of a corpus"). */
typedef struct loci_corpus_settings {
    uint32_t dense_layers;  /* so many first retrieval layers are read in mode dense, always */
    float attn_temperature; /* T: logits of the corpus's tokens are divided by it */
    float attn_scale;       /* S: the log-sum-exp of the corpus's tokens is multiplied by it */
} loci_corpus_settings;

void loci_corpus_settings_default(loci_corpus_settings *settings); /* 0, 1, 1 */

/* Settings that somebody names; the others stay. */
typedef struct loci_settings_change {
    int64_t dense_layers;                /* below 0: not named */
    double attn_temperature, attn_scale; /* 0: not named */
} loci_settings_change;

void loci_corpus_settings_apply(const loci_settings_change *change, loci_corpus_settings *settings);

typedef struct loci_store_options {
    uint64_t document_bytes_max; /* default 64 MiB */
    uint64_t memory_bytes;       /* for RocksDB caches and write buffers; default 256 MiB */
    uint32_t extent_tokens;      /* of an extent when it is sealed; default (and most) 32768 */
    uint64_t extent_kv_bytes;    /* of its K and V, so that models with large ones stay within
                                    bounds; default 256 MiB */
    uint32_t merge_tokens;       /* most of a merged one; default (and most) 1 << 22, 0 = none is */
    bool pairs_overlap;          /* the backend has loci_pairs_ahead: that takes memory */
    bool seal_beside;            /* a full extent is made while the next is encoded: that takes
                                    the memory of one more */
    uint32_t merge_calm_ms;      /* without a change before a merge begins; default 3000 */
    const char *fingerprint;     /* of the node's model, for the figures below; NULL = none */
    loci_budget *budget;         /* snapshots reserve their memory there; NULL = not counted */
} loci_store_options;

/* Names of all kill points (base/failpoint.h) of this module, NULL at the end. */
extern const char *const loci_failpoints[];

void loci_store_options_default(loci_store_options *options);
LOCI_MUST_CHECK loci_status loci_store_open(const char *dir, const loci_store_options *options,
                                            loci_backend *backend, loci_store **out,
                                            loci_error *err);
/* All snapshots, writers and the ingest must be gone. */
void loci_store_close(loci_store *store);
/* Everything written so far survives power loss after this returns (group commit). */
LOCI_MUST_CHECK loci_status loci_store_sync(loci_store *store, loci_error *err);
/* Sums over all corpora. */
typedef struct loci_store_figures {
    uint64_t corpora, tokens;   /* tokens: searchable */
    uint64_t pending_documents; /* of corpora that are not damaged */
    uint64_t reindexing;        /* corpora that are */
    uint64_t other_models;      /* corpora of another model than options.fingerprint */
    uint64_t mapped_bytes;      /* extents that are open */
    uint64_t resident_bytes;    /* about how much of that is in RAM; looked at once a second */
} loci_store_figures;

/* For those who must be answered whatever goes on: waits a few milliseconds at most; a corpus that
 * is busy for longer (a write to a slow disk) counts with its last figures. Takes no references, so
 * nothing is ever freed or removed here. */
void loci_store_figures_of(loci_store *store, loci_store_figures *out);

/* --- Corpora -------------------------------------------------------------------------- */
typedef struct loci_corpus_info {
    char name[LOCI_NAME_MAX + 1];
    loci_geometry geometry;
    loci_corpus_settings settings;
    uint64_t uid; /* never reused */
    int64_t created;
    uint64_t revision;
    uint64_t documents, pending_documents, segments, tokens;
    uint64_t bytes;         /* of live documents as registered */
    uint64_t bytes_on_disk; /* extent files and open segments */
    uint64_t extents;
    bool merged;     /* nothing is pending, no extents are to be rewritten or merged */
    bool reindexing; /* what follows is of the index that is being made */
    char reindex_fingerprint[LOCI_FINGERPRINT_LEN + 1];
    uint64_t reindex_documents, reindex_tokens; /* in it */
} loci_corpus_info;

/* Names: [a-z0-9][a-z0-9_-]{0,62}. settings: NULL = the default ones. sink_k, sink_v: f32
 * [layers][kv_heads][head_dim], NULL without sink. LOCI_E_EXISTS, with *out filled, when there is
 * one of this name. */
LOCI_MUST_CHECK loci_status loci_corpus_create(loci_store *store, const char *name,
                                               const loci_geometry *geometry,
                                               const loci_corpus_settings *settings,
                                               const float *sink_k, const float *sink_v,
                                               loci_corpus_info *out, loci_error *err);
/* LOCI_E_INVAL, reason INVALID_SETTINGS, with a sentence that says what may be. */
LOCI_MUST_CHECK loci_status loci_corpus_settings_check(const loci_corpus_settings *settings,
                                                       const loci_geometry *geometry,
                                                       loci_error *err);
/* On disk when this returns; snapshots acquired from then on have them. No new revision. Callers at
 * the same time that name different settings all have their way. uid: LOCI_E_ABORTED unless it is
 * the corpus's (another one, or another index of it, has the name by now); 0 = any. */
LOCI_MUST_CHECK loci_status loci_corpus_set(loci_store *store, const char *name, uint64_t uid,
                                            const loci_settings_change *change,
                                            loci_corpus_info *out, loci_error *err);
LOCI_MUST_CHECK loci_status loci_corpus_get(loci_store *store, const char *name,
                                            loci_corpus_info *out, loci_error *err);
/* Hexadecimal hash of what is searchable and in which extents (loci_manifest_hash). */
LOCI_MUST_CHECK loci_status loci_corpus_manifest_hash(loci_store *store, const char *name,
                                                      char out[33], loci_error *err);
/* Names in order, the first strictly after `after` ("" = from the start); *count <= limit. */
LOCI_MUST_CHECK loci_status loci_corpus_list(loci_store *store, const char *after, size_t limit,
                                             loci_corpus_info *out, size_t *count, loci_error *err);
/* LOCI_E_PRECONDITION, reason MODEL_MISMATCH, unless the corpus is of the model `fingerprint`; the
 * text says what to type. */
LOCI_MUST_CHECK loci_status loci_corpus_check_model(const loci_corpus_info *info,
                                                    const char *fingerprint, loci_error *err);
/* Gone at once for new calls; files go when the last snapshot is released. */
LOCI_MUST_CHECK loci_status loci_corpus_delete(loci_store *store, const char *name,
                                               loci_error *err);

/* Notes on a corpus by those who use it, which can be made again: one that was damaged, lost with
 * the power or made by another model is LOCI_E_NOTFOUND. They go with the corpus. */
typedef enum loci_note {
    LOCI_NOTE_QUERIES,   /* of the last tokens of a causal corpus (services/engine/recorder.c) */
    LOCI_NOTE_THRESHOLDS /* of mode squeezed (services/engine/squeezed.c) */
} loci_note;
LOCI_MUST_CHECK loci_status loci_corpus_note_put(loci_store *store, const loci_corpus_info *info,
                                                 loci_note note, loci_slice data, loci_error *err);
LOCI_MUST_CHECK loci_status loci_corpus_note_get(loci_store *store, const loci_corpus_info *info,
                                                 loci_note note, loci_buf *out, loci_error *err);
/* --- Reindexing --------------------------------------------------------------------------- */
/* Who waits while documents are copied; all of it may be NULL. on_copied: so many are, every
 * megabyte and at the end; an error that it returns stops the copying. */
typedef struct loci_reindex_watch {
    const loci_cancel *cancel;
    loci_status (*on_copied)(void *ctx, uint64_t documents, loci_error *err);
    void *ctx;
} loci_reindex_watch;

/* Makes the index of a corpus anew from its documents, for the model of `geometry`. This call
 * copies the documents into a successor of the corpus, verifying them; the ingest thread encodes
 * them, and the successor takes the corpus's place in one atomic write when all of them are
 * searchable. Until then the old index answers and the corpus takes no documents and loses none
 * (LOCI_E_PRECONDITION, reason REINDEXING). Documents keep ids, metadata, order and times, the
 * corpus its revision, plus one. A killed process leaves either nothing, or a successor with all
 * documents, which goes on by itself. Where that is under way for this model already, nothing
 * happens. A damaged document is LOCI_E_CORRUPT naming it, and nothing is changed. `settings` are
 * for a corpus that another model made (NULL: the default ones); one of this model keeps its own.
 * watch: NULL = nobody. */
LOCI_MUST_CHECK loci_status loci_corpus_reindex(loci_store *store, const char *name,
                                                const loci_geometry *geometry,
                                                const loci_corpus_settings *settings,
                                                const float *sink_k, const float *sink_v,
                                                const loci_reindex_watch *watch, loci_error *err);
/* Gives it up: the corpus stays as it was. LOCI_E_PRECONDITION, reason NOT_REINDEXING. */
LOCI_MUST_CHECK loci_status loci_corpus_reindex_cancel(loci_store *store, const char *name,
                                                       loci_error *err);
/* Whether the index can not be used with this model and this program: it is of another model, or an
 * extent is of an older layout. */
LOCI_MUST_CHECK loci_status loci_corpus_outdated(loci_store *store, const char *name,
                                                 const char *fingerprint, bool *outdated,
                                                 loci_error *err);

/* --- Documents -------------------------------------------------------------------------- */
typedef struct loci_document_info {
    char id[LOCI_DOCUMENT_ID_MAX + 1];
    uint64_t sequence; /* order of registration in the corpus, from 1 */
    uint64_t bytes;
    char content_hash[33];
    int64_t created;
    bool searchable;
    uint64_t tokens, segments; /* 0 while not searchable */
} loci_document_info;

/* A document arrives in pieces; nothing is visible before commit; abort or a crash leaves nothing.
 * Ids: 1-512 bytes of UTF-8 without control characters. Errors: LOCI_E_NOTFOUND (corpus),
 * LOCI_E_INVAL (id, empty document, metadata), LOCI_E_LIMIT (too large). In a causal corpus another
 * content for a known id is LOCI_E_PRECONDITION, reason APPEND_ONLY, at commit. */
LOCI_MUST_CHECK loci_status loci_document_begin(loci_store *store, const char *corpus,
                                                const char *id, loci_slice metadata,
                                                loci_document_writer **out, loci_error *err);
LOCI_MUST_CHECK loci_status loci_document_append(loci_document_writer *writer, loci_slice data,
                                                 loci_error *err);
/* Ends the writer in any case. *unchanged: the same id with the same content was there; nothing was
 * written. Another content replaces the old document: the old one stays searchable until the new
 * one is, and its segments die in that same revision. */
LOCI_MUST_CHECK loci_status loci_document_commit(loci_document_writer *writer,
                                                 loci_document_info *out, bool *unchanged,
                                                 loci_error *err);
void loci_document_abort(loci_document_writer *writer); /* NULL allowed */

/* metadata may be NULL, else it is appended. */
LOCI_MUST_CHECK loci_status loci_document_get(loci_store *store, const char *corpus, const char *id,
                                              loci_document_info *out, loci_buf *metadata,
                                              loci_error *err);
LOCI_MUST_CHECK loci_status loci_document_list(loci_store *store, const char *corpus,
                                               const char *after, size_t limit,
                                               loci_document_info *out, size_t *count,
                                               loci_error *err);
/* Appends bytes [start, end) of the document; end is clipped to its size. */
LOCI_MUST_CHECK loci_status loci_document_read(loci_store *store, const char *corpus,
                                               const char *id, uint64_t start, uint64_t end,
                                               loci_buf *out, loci_error *err);
/* The document and its segments are gone from the revision returned on. LOCI_E_PRECONDITION, reason
 * APPEND_ONLY, for a searchable document of a causal corpus. */
LOCI_MUST_CHECK loci_status loci_document_delete(loci_store *store, const char *corpus,
                                                 const char *id, uint64_t *revision,
                                                 loci_error *err);

/* --- Snapshots: one revision of a corpus, pinned ------------------------------------------ */
typedef struct loci_segment_info {
    const char *document; /* id; valid while the snapshot is held */
    uint64_t start, end;  /* byte range in the document */
    uint32_t tokens;
} loci_segment_info;

LOCI_MUST_CHECK loci_status loci_snapshot_acquire(loci_store *store, const char *corpus,
                                                  loci_snapshot **out, loci_error *err);
void loci_snapshot_release(loci_snapshot *snapshot); /* NULL allowed */
/* Where the next token of a causal corpus stands: behind the shared prefix and all live tokens. */
uint32_t loci_snapshot_end(const loci_snapshot *snapshot);
const loci_corpus_view *loci_snapshot_view(const loci_snapshot *snapshot);
const loci_corpus_info *loci_snapshot_info(const loci_snapshot *snapshot);
uint32_t loci_snapshot_segments(const loci_snapshot *snapshot); /* dead ones included */
/* LOCI_E_IO if something that was read of the snapshot's extents could not be read: what was
 * computed from them must not be used. */
LOCI_MUST_CHECK loci_status loci_snapshot_check(const loci_snapshot *snapshot, loci_error *err);
bool loci_snapshot_segment_live(const loci_snapshot *snapshot, uint32_t segment);
LOCI_MUST_CHECK loci_status loci_snapshot_segment(const loci_snapshot *snapshot, uint32_t segment,
                                                  loci_segment_info *out, loci_error *err);
/* Where terms (memory/terms.h, as hashes) stand: fn is called for every live segment that holds
 * terms[term], times in `tokens` tokens, in the same order at every call. *bytes: what was read is
 * added. Texts that are damaged have no words here. */
typedef void (*loci_posting_fn)(void *ctx, uint32_t term, uint32_t segment, uint32_t tokens,
                                uint32_t times);
LOCI_MUST_CHECK loci_status loci_snapshot_postings(const loci_snapshot *snapshot,
                                                   const uint64_t *terms, uint32_t count,
                                                   const loci_cancel *cancel, loci_posting_fn fn,
                                                   void *ctx, uint64_t *bytes, loci_error *err);
/* Bytes of a document as of this snapshot, even if it was deleted or replaced since. */
LOCI_MUST_CHECK loci_status loci_snapshot_read(const loci_snapshot *snapshot, uint32_t segment,
                                               uint64_t start, uint64_t end, loci_buf *out,
                                               loci_error *err);

#endif
