/* SPDX-License-Identifier: Apache-2.0
 *
 * Keys and values of one layer from the structured generator: topics around a common offset.
 */
#ifndef LOCI_TESTS_BENCH_GPU_STRUCTURED_H
#define LOCI_TESTS_BENCH_GPU_STRUCTURED_H

#include "tests/attention/corpus_fixture.h"

/* Fills what fixture_build needs; the same numbers each time. */
void structured_generate(fixture *f, uint32_t tokens, uint32_t q_heads, uint32_t kv_heads,
                         uint32_t dim);

#endif
