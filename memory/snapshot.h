/* SPDX-License-Identifier: Apache-2.0
 *
 * Snapshots inside memory/; the public part is in store.h.
 */
#ifndef LOCI_MEMORY_SNAPSHOT_H
#define LOCI_MEMORY_SNAPSHOT_H

#include "memory/internal.h"

/* Ids handed out by loci_snapshot_segment; they stay until the snapshot goes. */
typedef struct loci_known_document {
    uint64_t sequence; /* first: loci_sequence_place */
    loci_document *document;
} loci_known_document;

struct loci_snapshot {
    atomic_uint refs;
    loci_snapshot *older, *newer; /* the corpus's list, under its lock */
    loci_corpus *corpus;
    loci_manifest *manifest;
    loci_corpus_info info;
    loci_corpus_view view;
    loci_extent **extents;
    loci_extent_view *extent_views;
    loci_extent_dead **dead;  /* [extents]; NULL where none is */
    uint32_t extent_segments; /* of all extents */
    uint16_t *flat_data;      /* K then V of each layer */
    loci_buffer **flat_k, **flat_v;
    uint32_t *flat_begin;
    loci_view *rocks_view; /* of the manifest's moment; while the snapshot is being made */
    pthread_mutex_t lock;  /* guards what follows */
    uint64_t reserved;     /* in the budget */
    loci_known_document *known;
    size_t known_count;
    /* [extents + 1] blocks of words that are only in memory (lexical.c), the last of the flat
     * segments; each empty until it is needed. */
    loci_buf *terms;
    bool terms_unkept; /* one found no room; said in the log */
};

/* Of everything that is committed, the unfinished document too; for encoding what follows it. It is
 * not kept for others. */
LOCI_MUST_CHECK loci_status loci_snapshot_acquire_past(loci_corpus *corpus, loci_snapshot **out,
                                                       loci_error *err);
/* The smallest revision in a corpus's list of snapshots; UINT64_MAX when it is empty. */
uint64_t loci_snapshots_oldest(const loci_snapshot *list);
/* Releases the snapshots, and live bitmaps, that are only kept for the next question; for
 * loci_budget_on_shortage, ctx is the store. */
void loci_snapshots_let_go(void *store);

#endif
