/* SPDX-License-Identifier: Apache-2.0
 *
 * The merger: a background thread beside that of registration (ingest.h), which makes few large
 * extents of many small ones. The larger an extent, the better its clusters tell what a question
 * needs of it; a small document must not wait for that, and does not: nothing but the commit of a
 * merge takes a lock that others need.
 */
#ifndef LOCI_MEMORY_MERGE_H
#define LOCI_MEMORY_MERGE_H

#include "memory/internal.h"

/* --- Failures, of this thread and of the other ---------------------------------------------- */
typedef struct loci_backoff {
    unsigned failures;
    uint64_t retry_ns; /* no work before */
    loci_error failure;
} loci_backoff;

void loci_backoff_clear(loci_backoff *backoff);
/* Tried again with growing pauses. True when it is another failure than the last one. */
bool loci_backoff_add(loci_backoff *backoff, loci_status status, const loci_error *err);

/* --- The thread ----------------------------------------------------------------------------- */
typedef struct loci_merger loci_merger;

/* threads: to build with, the merger's own; what the thread does has a lower priority. */
LOCI_MUST_CHECK loci_status loci_merger_start(loci_store *store, unsigned threads,
                                              loci_merger **out, loci_error *err);
void loci_merger_stop(loci_merger *merger); /* at once; NULL allowed */
/* Whether the corpus is being merged, and why it is not (status OK: no failure). */
void loci_merger_state(loci_merger *merger, uint64_t uid, bool *merging, loci_error *failure);

#endif
