/* SPDX-License-Identifier: Apache-2.0
 *
 * One Register stream: what its two threads share.
 *
 *   reader (the handler's thread)           acknowledger (a thread of the stream)
 *   recv chunks -> document writer -> commit -> `committed` -> sync the store (group commit)
 *                                              -> STORED acks -> `waiting` -> SEARCHABLE acks,
 *                                              progress, summary
 *
 * While one sync runs, the reader commits on; the next sync covers all of that. The reader stops
 * receiving while OUTSTANDING_MAX documents are committed and not yet searchable.
 * Fields below `mutex` are guarded by it; the others belong to one thread, as marked.
 */
#ifndef LOCI_SERVICES_LOCID_REGISTER_H
#define LOCI_SERVICES_LOCID_REGISTER_H

#include <pthread.h>

#include "services/locid/node.h"

#define LOCI_OUTSTANDING_MAX 16384u

typedef struct loci_registered {
    char *id; /* owned */
    uint64_t sequence, bytes;
    bool unchanged;
} loci_registered;

typedef struct loci_registered_list {
    loci_registered *items;
    size_t count, capacity;
} loci_registered_list;

typedef struct loci_registration {
    loci_daemon *node;
    loci_rpc_call *call;
    char corpus[LOCI_NAME_MAX + 1];
    uint64_t started_ns;

    /* The reader's. */
    loci_document_writer *writer; /* of the document that is being received */
    char document[LOCI_DOCUMENT_ID_MAX + 1];

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    loci_registered_list committed; /* not yet synced */
    size_t outstanding;             /* committed and not yet searchable */
    uint64_t documents_received, bytes_received, bytes_hint;
    bool reading_done;   /* no more documents will come */
    bool reading_failed; /* ... because of an error: acknowledge what is stored, then end */
    bool acks_done;      /* the acknowledger has ended */

    /* The acknowledger's; its result is read after joining it. */
    loci_registered_list waiting; /* stored, not yet searchable */
    uint64_t stored, searchable, unchanged, tokens, segments, bytes_searchable;
    uint64_t encoded_before, indexed_before; /* counters of the corpus when the stream began */
    uint64_t progress_ns;
    loci_daemon_wait wait;
    loci_status acks_status;
    loci_error acks_error;
} loci_registration;

/* The acknowledger's thread; arg is the loci_registration. */
void *loci_registration_acknowledge(void *arg);

#endif
