/* SPDX-License-Identifier: Apache-2.0
 *
 * One corpus's way through the registration pipeline: pending documents are split, encoded in
 * batches that may span documents, gathered, and committed. Owned by the ingest thread.
 *
 * What is held in memory: the text of one document, one encode batch, and at most one extent's
 * worth of encoded segments, or two where a full extent is made while the next is encoded
 * (seal_beside of the store's options); loci_ingest_memory adds it up. Losing it costs encoding
 * time only: everything starts again from the manifest's cursor.
 */
#ifndef LOCI_MEMORY_PIPELINE_H
#define LOCI_MEMORY_PIPELINE_H

#include "memory/ingest.h"
#include "memory/internal.h"

typedef struct loci_pipeline loci_pipeline;

/* Totals since the pipeline was opened. */
typedef struct loci_pipeline_counts {
    uint64_t tokens_encoded, tokens_indexed, segments_indexed;
} loci_pipeline_counts;

/* LOCI_E_PRECONDITION, reason MODEL_MISMATCH, when the corpus is not the encoder's. Keeps a
 * reference to the corpus. */
LOCI_MUST_CHECK loci_status loci_pipeline_open(loci_corpus *corpus, const loci_encoder *encoder,
                                               struct loci_pool *pool, const loci_cancel *cancel,
                                               loci_pipeline **out, loci_error *err);
void loci_pipeline_close(loci_pipeline *pipeline); /* NULL allowed */
/* Tokens that are encoded together. */
uint32_t loci_pipeline_batch_tokens(const loci_geometry *geometry,
                                    const loci_store_options *options);

/* Splits the next documents into a batch. *more: something was pending. */
LOCI_MUST_CHECK loci_status loci_pipeline_gather(loci_pipeline *pipeline, bool *more,
                                                 loci_error *err);
LOCI_MUST_CHECK loci_status loci_pipeline_encode(loci_pipeline *pipeline, loci_error *err);
/* Takes the encoded batch in, sealing a full extent when one is complete: that may go on when this
 * returns, and if it fails a later call says so. After a failure only flush and close follow. */
LOCI_MUST_CHECK loci_status loci_pipeline_append(loci_pipeline *pipeline, loci_error *err);
/* Waits for the extent that is being sealed and commits what is not committed yet as flat segments;
 * where an extent could not be sealed, its segments and none that follow. */
LOCI_MUST_CHECK loci_status loci_pipeline_flush(loci_pipeline *pipeline, loci_error *err);

/* Whether the next append will seal an extent, which takes a while. */
bool loci_pipeline_will_seal(const loci_pipeline *pipeline);
bool loci_pipeline_sealing(const loci_pipeline *pipeline);     /* an extent, beside */
bool loci_pipeline_dirty(const loci_pipeline *pipeline);       /* something in the builder */
size_t loci_pipeline_documents(const loci_pipeline *pipeline); /* complete, not committed */
loci_pipeline_counts loci_pipeline_count(const loci_pipeline *pipeline);

/* Whether to flush, elapsed_ns after the last commit, with so many documents pending and complete:
 * soon when that makes some searchable, in any case after a minute. In ingest.c. */
bool loci_flush_due(uint64_t pending, size_t complete, uint64_t elapsed_ns);

#endif
