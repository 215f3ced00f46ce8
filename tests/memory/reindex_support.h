/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of reindexing share: changing models, what a corpus holds, and its index's hash.
 */
#ifndef LOCI_TESTS_MEMORY_REINDEX_SUPPORT_H
#define LOCI_TESTS_MEMORY_REINDEX_SUPPORT_H

#include "support.h"

#define FAR_NS 60000000000ull
/* Indexes are made a hundred times: small ones, of a few extents all the same. */
#define SMALL_EXTENT_TOKENS (EXTENT_TOKENS / 2)

extern float reindex_sinks[2 * 2 * 16];

int reindex_setup(void **state); /* fixture_setup, with small extents */
loci_geometry geometry_of(const char *fingerprint);
/* (Re)starts the ingest thread with a model. */
void run_model(fixture *f, const char *fingerprint);
/* Asks for it and wakes the thread, if there is one. */
loci_status reindex(fixture *f, const char *corpus, const char *fingerprint, loci_error *err);
void wait_reindexed(fixture *f, const char *corpus);
void create_of(fixture *f, const char *corpus, const char *fingerprint);
/* What a corpus holds in the end; before: with detours that must leave no trace. */
void fill(fixture *f, const char *corpus, bool detours);
void hash_of(fixture *f, const char *corpus, char out[33]);

#endif
