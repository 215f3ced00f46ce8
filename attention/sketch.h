/* SPDX-License-Identifier: Apache-2.0
 *
 * Sketches: the product quantiser of index.h (Jegou, Douze, Schmid: Product quantization for
 * nearest neighbor search, 2011), trained on what the keys of one pair differ from their roots'
 * centroids. The same bytes on every instruction set.
 */
#ifndef LOCI_ATTENTION_SKETCH_H
#define LOCI_ATTENTION_SKETCH_H

#include "attention/cpu/corpus_kernels.h"
#include "attention/index_layout.h"

struct loci_pool;

/* x: [tokens][dim]; dim a multiple of 16. Fills the codebook, loci_sketch_book(dim) floats, by
 * K-means in each run of channels over at most 8,192 evenly spaced tokens, and word
 * [tokens][dim / LOCI_SKETCH_CHANNELS], the nearest codeword of each token and run. The result
 * depends on the arguments only; pool may be NULL. */
void loci_sketch_train(const float *x, uint32_t tokens, uint32_t dim,
                       const loci_corpus_kernels *kernels, struct loci_pool *pool, float *book,
                       uint8_t *word);

/* Interleaves the words of `tokens` tokens (rows of parts bytes, by ids) into groups: out has
 * loci_sketch_groups(tokens) * loci_sketch_group(dim) zeroed bytes. */
void loci_sketch_pack(uint8_t *out, const uint8_t *word, const uint32_t *ids, uint32_t tokens,
                      uint32_t dim);

#endif
