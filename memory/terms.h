/* SPDX-License-Identifier: Apache-2.0
 *
 * Terms: the words of a text, folded and stemmed, as 64-bit hashes; and blocks, which say which of
 * a list of segments hold which terms how often (an inverted index; FORMAT.md section 6). Pure
 * functions of their input: the same text gives the same block. lexical.c keeps blocks for corpora.
 *
 * A term is a run of letters, digits and marks, decomposed (compatibility form), case-folded,
 * without the accents of U+0300..036F, at most LOCI_TERM_BYTES_MAX bytes of UTF-8 (a longer run is
 * cut), then stemmed by Snowball's English stemmer, which leaves what is not English mostly alone.
 * A character of a script that writes no spaces (Han, kana) is a term by itself. Bytes that are
 * not UTF-8 separate terms.
 */
#ifndef LOCI_MEMORY_TERMS_H
#define LOCI_MEMORY_TERMS_H

#include "base/buf.h"

#define LOCI_TERM_BYTES_MAX 64u

typedef struct loci_term {
    uint64_t hash;
    uint32_t segment;
} loci_term;

typedef struct loci_term_list {
    loci_term *items;
    size_t count, capacity;
} loci_term_list;

/* Appends the terms of the text in order. question: without the function words of English, which
 * say how something is asked and not what about. */
LOCI_MUST_CHECK loci_status loci_terms_of(loci_slice text, uint32_t segment, bool question,
                                          loci_term_list *out, loci_error *err);
void loci_term_list_fini(loci_term_list *list);

/* The block of segments 0 .. segments - 1 from their terms (which are sorted by this), appended to
 * *out. present: [segments], 0 where the text was not there: the block knows nothing of it. */
LOCI_MUST_CHECK loci_status loci_term_block_encode(loci_term_list *terms, uint32_t segments,
                                                   const uint8_t *present, loci_buf *out,
                                                   loci_error *err);

/* A block in place, over bytes that the caller keeps. */
typedef struct loci_term_block {
    uint32_t segments, terms;
    size_t bytes;
    const uint8_t *present, *hashes, *ends, *postings;
} loci_term_block;

/* LOCI_E_CORRUPT, naming `name`, when the bytes are no block of so many segments. */
LOCI_MUST_CHECK loci_status loci_term_block_open(loci_slice bytes, uint32_t segments,
                                                 const char *name, loci_term_block *out,
                                                 loci_error *err);
/* Calls fn for every segment that holds the term, in order. */
typedef void (*loci_term_fn)(void *ctx, uint32_t segment, uint32_t times);
LOCI_MUST_CHECK loci_status loci_term_block_find(const loci_term_block *block, uint64_t hash,
                                                 const char *name, loci_term_fn fn, void *ctx,
                                                 loci_error *err);

#endif
