/* SPDX-License-Identifier: Apache-2.0
 *
 * A corpus whose keys and values come from a generator instead of the model: one document, one
 * extent, written and committed as a merge does it, so that everything that reads it is as always.
 */
#ifndef LOCI_TESTS_BENCH_GENERATED_H
#define LOCI_TESTS_BENCH_GENERATED_H

#include "services/engine/engine.h"

/* Creates the corpus and fills it with the text's first `tokens` tokens, or with all where they are
 * fewer. Keys gather around topics, 64 to each on average; values alike. Two sets of them serve all
 * pairs in turn. */
LOCI_MUST_CHECK loci_status generated_corpus(loci_engine *engine, const char *name,
                                             const loci_corpus_options *options, loci_slice text,
                                             uint32_t tokens, loci_error *err);

#endif
