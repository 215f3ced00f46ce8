/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of memory/ share: the store, the corpus object and changes to a corpus.
 *
 * Locks, in the order in which they may be taken:
 *   corpus.build_lock   making a snapshot of the corpus (slow: opens files)
 *   store.lock          the table of corpora
 *   corpus.lock         everything that changes in a corpus; held over small RocksDB reads and over
 *                       the write that commits a change, so that changes of a corpus are ordered;
 *                       that of its successor comes after it
 *   the merger's lock   what it knows of corpora (merge.c)
 * A corpus object lives while somebody holds a reference; the last release of a deleted corpus
 * removes its data.
 *
 * Documents die in two steps. First a change buries them: the record is marked dead, a grave is
 * written, their segments go dead in the manifest, all in one write. Then, when no snapshot of an
 * older revision is left, the record and the text are removed.
 */
#ifndef LOCI_MEMORY_INTERNAL_H
#define LOCI_MEMORY_INTERNAL_H

#include <pthread.h>
#include <string.h>

#include "base/failpoint.h"
#include "memory/extent.h"
#include "memory/manifest.h"
#include "memory/rocks.h"
#include "memory/store.h"

#define LOCI_CHUNK_BYTES 262144u
#define LOCI_PATH_BYTES 4096u

typedef struct loci_corpus loci_corpus;

struct loci_store {
    char *dir;
    int lock_fd;
    loci_store_options options;
    loci_backend *backend;
    loci_rocks *rocks;
    pthread_mutex_t lock;
    loci_corpus **corpora; /* by name; each holds one reference */
    size_t corpus_count;
    uint64_t next_uid;
    uint64_t next_upload, upload_limit; /* limit: stored, no upload number reaches it */
    /* Group commit: a sync asked for after the running one began waits for the next. */
    pthread_mutex_t sync_lock;
    pthread_cond_t sync_done;
    uint64_t sync_wanted, sync_reached;
    bool sync_running;
    /* usage.c: the last figures; a leaf. */
    pthread_mutex_t figures_lock;
    loci_store_figures figures;
    double resident_share; /* under store->lock, as what follows */
    uint64_t resident_ns;  /* when it was looked at; 0 = never */
};

typedef struct loci_grave {
    uint64_t sequence, upload, revision; /* dead from this revision on */
    uint32_t chunks;
} loci_grave;

typedef struct loci_id_list {
    uint8_t (*ids)[LOCI_EXTENT_ID_BYTES];
    size_t count;
} loci_id_list;

/* What a corpus's catalogue value says it is (FORMAT.md). */
typedef enum loci_corpus_stage {
    LOCI_CORPUS_LIVE,
    LOCI_CORPUS_DELETED,
    LOCI_CORPUS_COPYING, /* the successor of a corpus of its name; its documents are coming */
    LOCI_CORPUS_INDEXING /* ... they are all there; it takes that corpus's place when it is indexed
                          */
} loci_corpus_stage;

struct loci_corpus {
    loci_store *store;
    atomic_uint refs;
    /* Fixed. */
    char name[LOCI_NAME_MAX + 1];
    loci_geometry geometry;
    uint64_t uid;
    int64_t created;
    uint32_t extent_tokens_max;
    float *sinks; /* K, then V; NULL without sink */
    size_t sink_floats;
    loci_buffer *sink_buffer;
    char *extents_dir;
    loci_error damage; /* status OK unless a catalogue value could not be read */

    /* usage.c, under store->lock: what it saw last. */
    uint64_t seen_tokens, seen_pending, seen_mapped;
    size_t seen_extents;

    pthread_mutex_t build_lock;
    pthread_mutex_t lock; /* guards what follows */
    bool deleted;
    loci_corpus_settings settings;
    loci_corpus_stage stage; /* as on disk */
    bool replaced;           /* deleted, since its successor took its place */
    /* The corpus that will take this one's place (reindex.c), and one reference to it; changed
     * under store->lock and this lock. While there is one, documents neither come nor go. */
    loci_corpus *successor;
    uint64_t last_sequence, documents, bytes;
    loci_manifest *manifest;
    /* Live documents to be indexed, ascending: pending[pending_first .. pending_end). */
    uint64_t *pending;
    size_t pending_first, pending_end, pending_capacity;
    bool stuck; /* the last attempt to index them failed; tried again, but they may never be */
    loci_grave *graves;
    size_t grave_count, grave_capacity;
    loci_extent **opened; /* each holds one reference */
    size_t opened_count;
    loci_id_list superseded; /* files to unlink when nobody needs them */
    loci_id_list apart; /* extents that a merge could not read; others are merged around them */
    /* Being written, [0] by the ingest thread, [1] by the merger. */
    uint8_t building_id[2][LOCI_EXTENT_ID_BYTES];
    bool building[2];
    loci_cancel *merging;             /* the merge that is under way; NULL = none */
    loci_manifest *snapshot_manifest; /* of the snapshot being made */
    loci_snapshot *snapshots;         /* all live ones */
    loci_snapshot *current;           /* holds one reference; of the newest revision */
};

/* --- Keys (FORMAT.md section 2) ------------------------------------------------------------ */
static inline loci_key loci_key_uid(uint64_t uid) { /* a prefix */
    loci_key key = {.len = 0};
    loci_key_u64(&key, uid);
    return key;
}

/* Families document and flat; a prefix in chunk. */
static inline loci_key loci_key_pair(uint64_t uid, uint64_t second) {
    loci_key key = loci_key_uid(uid);
    loci_key_u64(&key, second);
    return key;
}

static inline loci_key loci_key_catalog(char kind, uint64_t uid) {
    loci_key key = {.len = 0};
    loci_key_u8(&key, (uint8_t)kind);
    loci_key_u64(&key, uid);
    return key;
}

static inline loci_key loci_key_catalog2(char kind, uint64_t uid, uint64_t second) {
    loci_key key = loci_key_catalog(kind, uid);
    loci_key_u64(&key, second);
    return key;
}

/* Among items of `stride` bytes that begin with their u64 sequence and ascend by it: the place of
 * the first that is not below `sequence`. */
static inline size_t loci_sequence_place(const void *items, size_t count, size_t stride,
                                         uint64_t sequence) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        uint64_t found;
        memcpy(&found, (const uint8_t *)items + middle * stride, sizeof found);
        if (found < sequence)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* --- Documents -------------------------------------------------------------------------- */
typedef struct loci_document {
    bool dead;
    char id[LOCI_DOCUMENT_ID_MAX + 1];
    uint64_t sequence, upload, bytes, replaces, tokens;
    uint32_t chunks, segments;
    uint8_t content[LOCI_CONTENT_HASH_BYTES];
    int64_t created;
} loci_document;

LOCI_MUST_CHECK loci_status loci_document_load(const loci_corpus *corpus, const loci_view *view,
                                               uint64_t sequence, loci_document *out,
                                               loci_error *err);
void loci_document_store(const loci_corpus *corpus, const loci_document *document,
                         loci_batch *batch);
/* Sequence of the newest document of that id. */
LOCI_MUST_CHECK loci_status loci_document_find(const loci_corpus *corpus, const loci_view *view,
                                               const char *id, uint64_t *sequence, loci_error *err);
/* Appends bytes [start, end) of the text; end <= document->bytes. */
LOCI_MUST_CHECK loci_status loci_document_text(const loci_corpus *corpus, const loci_view *view,
                                               const loci_document *document, uint64_t start,
                                               uint64_t end, loci_buf *out, loci_error *err);
/* A number for chunk keys that was never used before. */
LOCI_MUST_CHECK loci_status loci_upload_number(loci_store *store, uint64_t *out, loci_error *err);
void loci_state_store(const loci_corpus *corpus, uint64_t last_sequence, uint64_t documents,
                      uint64_t bytes, loci_batch *batch);
/* Caller holds corpus->lock. */
void loci_document_fill_info(const loci_corpus *corpus, const loci_document *document,
                             loci_document_info *out);
/* Removes the chunks of uploads that were never committed. At open. */
LOCI_MUST_CHECK loci_status loci_document_clean(loci_corpus *corpus, loci_error *err);

/* --- Corpora ---------------------------------------------------------------------------- */
/* catalogue.c: reads all corpora into the store, finishes interrupted deletions. */
LOCI_MUST_CHECK loci_status loci_corpora_load(loci_store *store, loci_error *err);
/* Puts the store's counters into the batch. Caller holds store->lock. LOCI_E_NOMEM. */
LOCI_MUST_CHECK loci_status loci_catalog_next(uint64_t next_uid, uint64_t upload_limit,
                                              loci_batch *batch);
/* An empty object with one reference, in no table; NULL: no memory. */
loci_corpus *loci_corpus_alloc(loci_store *store, uint64_t uid);
/* For one that nobody else has a reference to; its data stays. */
void loci_corpus_free(loci_corpus *corpus);
/* Sets what follows from the geometry: the length of extents, the sinks' buffer. */
LOCI_MUST_CHECK loci_status loci_corpus_prepare(loci_corpus *corpus, loci_error *err);
/* Caller holds store->lock (or opens the store). Takes over the reference; false: no memory. */
LOCI_MUST_CHECK bool loci_corpus_insert(loci_store *store, size_t place, loci_corpus *corpus);
/* Removes every file in dir that manifest (NULL = none) does not name. */
void loci_extents_clean(const char *dir, const loci_manifest *manifest);
/* With a reference. LOCI_E_NOTFOUND; LOCI_E_CORRUPT when its catalogue values are damaged. */
LOCI_MUST_CHECK loci_status loci_corpus_acquire(loci_store *store, const char *name,
                                                loci_corpus **out, loci_error *err);
/* The corpus with the smallest uid above `after`, with a reference; NULL at the end. Damaged
 * ones are left out, successors that have their documents are not. */
loci_corpus *loci_corpus_next(loci_store *store, uint64_t after);
loci_corpus *loci_corpus_ref(loci_corpus *corpus);
void loci_corpus_release(loci_corpus *corpus); /* NULL allowed */
/* Writes a new, empty corpus that is in no table; *out has one reference. The first revision is
 * `revision`. Caller holds store->lock. */
LOCI_MUST_CHECK loci_status loci_corpus_make(loci_store *store, const char *name,
                                             const loci_geometry *geometry,
                                             const loci_corpus_settings *settings,
                                             const float *sink_k, const float *sink_v,
                                             loci_corpus_stage stage, int64_t created,
                                             uint64_t revision, loci_corpus **out, loci_error *err);
/* Puts the catalogue value into the batch; false when there is no memory. */
bool loci_corpus_store(const loci_corpus *corpus, loci_corpus_stage stage, loci_batch *batch);
/* Caller holds store->lock. The place of name in the table, or where it would stand. */
size_t loci_corpus_place(const loci_store *store, const char *name, bool *found);
/* Caller holds the lock. An error unless documents may come and go: LOCI_E_NOTFOUND when it was
 * deleted, LOCI_E_PRECONDITION, reason REINDEXING, while it has a successor or after that took its
 * place. */
LOCI_MUST_CHECK loci_status loci_corpus_changeable(const loci_corpus *corpus, loci_error *err);
/* Caller holds the lock. */
void loci_corpus_fill_info(const loci_corpus *corpus, loci_corpus_info *out);
/* corpus_record.c: the catalogue value; decode fills the name, geometry, creation and sinks. */
bool loci_geometry_valid(const loci_geometry *geometry);
size_t loci_sink_floats(const loci_geometry *geometry); /* of K and V together */
void loci_corpus_encode(const loci_corpus *corpus, loci_corpus_stage stage, loci_buf *out);
LOCI_MUST_CHECK loci_status loci_corpus_decode(loci_corpus *corpus, loci_slice payload,
                                               loci_error *err);
/* The error that a document of a causal corpus cannot be `what` ("deleted"). */
loci_status loci_append_only(const loci_corpus *corpus, const char *id, const char *what,
                             loci_error *err);
bool loci_pending_push(loci_corpus *corpus, uint64_t sequence); /* false: no memory */
void loci_pending_erase(loci_corpus *corpus, uint64_t sequence);
bool loci_pending_has(const loci_corpus *corpus, uint64_t sequence);
/* The first pending sequence >= from; 0 when there is none. */
uint64_t loci_pending_next(const loci_corpus *corpus, uint64_t from);
/* An open extent, with a reference. Takes the lock. */
LOCI_MUST_CHECK loci_status loci_corpus_extent(loci_corpus *corpus,
                                               const loci_manifest_extent *entry, loci_extent **out,
                                               loci_error *err);
/* With a reference. Takes the lock. */
loci_manifest *loci_corpus_manifest(loci_corpus *corpus);
/* Most tokens of a merged extent: 0, none is merged, in corpora of other models, which are to be
 * reindexed and may take more memory. */
uint32_t loci_corpus_merge_tokens(const loci_corpus *corpus);
/* Caller holds the lock. Nothing is to be done for the corpus any more. */
void loci_corpus_end(loci_corpus *corpus);
/* Caller holds the lock. The extent's file goes with the next purge that finds it unneeded; without
 * memory to remember it, at the next open. */
void loci_corpus_supersede(loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES]);
/* Merges leave the extent out until it can be read again. Takes the lock. */
void loci_corpus_set_apart(loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES]);
/* Removes files and dead documents that nobody needs any more. Takes the lock. */
void loci_corpus_purge(loci_corpus *corpus);

/* --- Reindexing (reindex.c) --------------------------------------------------------------- */
/* The successor of a corpus, with a reference, or NULL. LOCI_E_NOTFOUND without such a corpus. */
LOCI_MUST_CHECK loci_status loci_corpus_successor(loci_store *store, const char *name,
                                                  loci_corpus **out, loci_error *err);
/* The successor takes its corpus's place, once nothing in it is pending; else nothing happens. */
LOCI_MUST_CHECK loci_status loci_reindex_finish(loci_corpus *successor, loci_error *err);

/* --- Changes ---------------------------------------------------------------------------- */
/* One new revision being made: begin, edit next and batch, then commit or abort. The caller
 * holds corpus->lock from begin to the end; then calls loci_change_after without it. */
typedef struct loci_change {
    loci_corpus *corpus;
    loci_batch *batch;
    loci_manifest *next;
    loci_grave *buried;
    size_t buried_count;
    uint64_t *done; /* sequences that are pending no more */
    size_t done_count;
    loci_snapshot *stale;
} loci_change;

LOCI_MUST_CHECK loci_status loci_change_begin(loci_corpus *corpus, loci_change *out,
                                              loci_error *err);
/* Buries a document and those it replaces; unknown sequences are fine. */
LOCI_MUST_CHECK loci_status loci_change_bury(loci_change *change, uint64_t sequence,
                                             loci_error *err);
/* Segments of a document go dead; its record stays. */
void loci_change_drop(loci_change *change, uint64_t sequence);
LOCI_MUST_CHECK loci_status loci_change_done(loci_change *change, uint64_t sequence,
                                             loci_error *err);
/* Writes and makes it current; durable on return. Ends the change in any case. */
LOCI_MUST_CHECK loci_status loci_change_commit(loci_change *change, const char *failpoint,
                                               loci_error *err);
void loci_change_abort(loci_change *change);
/* After a commit, without the lock: drops what the change made stale. */
void loci_change_after(loci_change *change);

/* --- Rebuilding (due.c, rebuild.c), on the ingest thread and the merger ----------------------- */
typedef struct loci_indexed_document {
    uint64_t sequence; /* first: loci_sequence_place */
    uint64_t tokens;
    uint32_t segments;
} loci_indexed_document;

/* What the pipeline has encoded since the last commit. */
typedef struct loci_fresh {
    const loci_builder *builder; /* may be empty */
    loci_cursor cursor;          /* after its last segment */
    const loci_indexed_document *documents;
    size_t document_count; /* those below cursor.sequence are complete */
} loci_fresh;

/* Which part of a corpus is made anew. */
typedef struct loci_rebuild_plan {
    uint32_t first, last; /* entries of the manifest */
    bool tail;            /* and all flat segments */
    bool rewrite;         /* because of dead segments; for failpoints and progress */
    bool merge;           /* by the merger: several become one, or a merged one is rewritten */
} loci_rebuild_plan;

/* How much of a tail is worth a rebuild. */
typedef enum loci_tail_demand {
    LOCI_TAIL_KEEP,  /* none */
    LOCI_TAIL_LARGE, /* unasked: flat segments enough for a partial extent, or a quarter of it */
    LOCI_TAIL_ANY    /* asked for: the canonical tail */
} loci_tail_demand;

/* What the ingest thread is to do. False when nothing is due. */
bool loci_rebuild_due(const loci_manifest *manifest, uint32_t extent_tokens_max,
                      loci_tail_demand demand, loci_rebuild_plan *out);
bool loci_id_listed(const loci_id_list *list, const uint8_t id[LOCI_EXTENT_ID_BYTES]);
/* What the merger is to do, the largest merge first, extents of at most merge_tokens, those that
 * stand apart (NULL = none) left as they are. Not calm: only what will be the same whatever is
 * registered yet. Each merge leaves fewer extents or no dead tokens, so there is an end. */
bool loci_merge_due(const loci_manifest *manifest, uint32_t extent_tokens_max,
                    uint32_t merge_tokens, bool calm, const loci_id_list *apart,
                    loci_rebuild_plan *out);
/* The partial extent, if there is one of at most so many tokens, and all flat segments. */
loci_rebuild_plan loci_tail_plan(const loci_manifest *manifest, uint32_t extent_tokens_max);
/* Tokens that the next full extent would already hold. */
uint32_t loci_tail_tokens(const loci_manifest *manifest, uint32_t extent_tokens_max);
/* Commits fresh segments as flat ones. */
LOCI_MUST_CHECK loci_status loci_commit_flat(loci_corpus *corpus, const loci_fresh *fresh,
                                             loci_error *err);
/* Gathers the live segments of the plan, which was made of the manifest `base`, and the fresh ones
 * (NULL = none) and commits them as one extent, or as flat segments where the tail is small; full:
 * always as a full extent. LOCI_E_ABORTED: extents went or a document was buried meanwhile; to be
 * planned anew. */
LOCI_MUST_CHECK loci_status loci_rebuild(loci_corpus *corpus, const loci_manifest *base,
                                         const loci_rebuild_plan *plan, const loci_fresh *fresh,
                                         bool full, struct loci_pool *pool,
                                         const loci_cancel *cancel, loci_error *err);

#endif
