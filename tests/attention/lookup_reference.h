/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection rules of attention/README.md once more, written plainly and in double, and dense
 * attention from the keys: what the look-up is compared with. Shares nothing with the backend but
 * the layout of the blob.
 */
#ifndef LOCI_TESTS_ATTENTION_LOOKUP_REFERENCE_H
#define LOCI_TESTS_ATTENTION_LOOKUP_REFERENCE_H

#include "tests/attention/corpus_fixture.h"

/* Tokens of all extents in slot order, extent after extent: the index of a token. */
uint32_t reference_tokens(const fixture *f);
uint32_t reference_index(const fixture *f, uint32_t extent, uint32_t slot);

/* chosen [kv_heads][rows][reference_tokens], 1 = selected. */
void reference_select(const fixture *f, uint32_t layer, uint32_t rows, const float *q,
                      const float *steady, const loci_select_params *params, uint8_t *chosen);

/* Exact attention over chosen tokens (NULL: all live ones); out [rows][q_heads][dim], lse. */
void reference_attend(const fixture *f, uint32_t layer, uint32_t rows, const float *q,
                      const uint8_t *chosen, double *out, double *lse);

#endif
