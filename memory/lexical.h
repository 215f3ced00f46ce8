/* SPDX-License-Identifier: Apache-2.0
 *
 * The words of a corpus: one block of postings (terms.h) for each extent, in RocksDB under the
 * extent's identity, and one in memory for the flat segments of a snapshot.
 *
 * A block follows from the text alone. It is written before the manifest that names its extent, and
 * goes with the extent's file. One that is missing or damaged is made anew from the documents when
 * it is needed, so nothing else has to be atomic: a question sees the postings of the segments that
 * live in its snapshot, whatever happened before. A snapshot keeps those that cannot be stored.
 *
 * A text that is damaged has no words in a block, which is logged when the block is made: it cannot
 * be found by them, and every other document can.
 */
#ifndef LOCI_MEMORY_LEXICAL_H
#define LOCI_MEMORY_LEXICAL_H

#include "memory/internal.h"

/* Stores the block of the extent that the builder's segments make. */
LOCI_MUST_CHECK loci_status loci_lexical_write(const loci_corpus *corpus,
                                               const loci_builder *builder,
                                               const uint8_t id[LOCI_EXTENT_ID_BYTES],
                                               loci_error *err);
void loci_lexical_drop(const loci_corpus *corpus, const uint8_t id[LOCI_EXTENT_ID_BYTES],
                       loci_batch *batch);
/* Removes the blocks of extents that the manifest does not name. At open. */
LOCI_MUST_CHECK loci_status loci_lexical_clean(const loci_corpus *corpus, loci_error *err);

#endif
