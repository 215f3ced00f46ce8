/* SPDX-License-Identifier: Apache-2.0
 *
 * Cutting a document into segments, and the text that the model sees of one.
 *
 * The model was trained on passages whose white space is single spaces, with one newline between
 * paragraphs and a space before the first word. Segments are byte ranges of the document as
 * registered; loci_passage_text makes the model's view of such a range. Both are pure functions of
 * the bytes, so that a passage read again later gives the same tokens.
 */
#ifndef LOCI_SERVICES_ENGINE_SPLIT_H
#define LOCI_SERVICES_ENGINE_SPLIT_H

#include "memory/ingest.h"
#include "model/tokenizer.h"

typedef struct loci_splitter loci_splitter;

/* tokens_max: most tokens of a segment, its prefix token not counted; prefix: the token id put
 * first in every segment, UINT32_MAX = none. A splitter belongs to one thread at a time. */
LOCI_MUST_CHECK loci_status loci_splitter_open(const loci_tokenizer *tokenizer, uint32_t tokens_max,
                                               uint32_t prefix, loci_splitter **out,
                                               loci_error *err);
void loci_splitter_close(loci_splitter *splitter);
/* See loci_encoder.split in memory/ingest.h. */
LOCI_MUST_CHECK loci_status loci_splitter_split(loci_splitter *splitter, loci_slice text,
                                                uint64_t from, uint32_t segments_max,
                                                const loci_split **out, loci_error *err);
/* Appends " " and the text with its white space made uniform. */
void loci_passage_text(loci_slice text, loci_buf *out);
/* The first sentence of `text` at or after *at, which is moved to the one that follows: its borders
 * to *from, *to (trimmed); false when there is none. For quotes: unlike in segments, the full stop
 * of an initial or a title ("Dr.") ends no sentence. */
bool loci_sentence_next(loci_slice text, uint64_t *at, uint64_t *from, uint64_t *to);
/* The sentences of `text` that hold [start, end): borders to *from, *to (trimmed). */
void loci_sentence_around(loci_slice text, uint64_t start, uint64_t end, uint64_t *from,
                          uint64_t *to);

#endif
