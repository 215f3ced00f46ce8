/* SPDX-License-Identifier: Apache-2.0
 *
 * Cuts text in pieces that byte-pair merging never crosses; internal to model/.
 *
 * A pre-tokenizer is a short chain of regexes: each cuts every piece of the one before it in
 * matches and what lies between them. It is immutable and shared by threads; a loci_pieces cursor
 * belongs to one thread. Pieces come one after another and cover the text, so that no list of
 * them is kept and memory does not grow with the text.
 */
#ifndef LOCI_MODEL_PRETOKENIZE_H
#define LOCI_MODEL_PRETOKENIZE_H

#include "base/buf.h"
#include "model/json.h"

enum { LOCI_SPLITS_MAX = 8 };

typedef struct loci_pretokenizer loci_pretokenizer;

/* Reads the "pre_tokenizer" of a tokenizer.json; `in` is the whole file. */
LOCI_MUST_CHECK loci_status loci_pretokenizer_open(const loci_json *in, loci_pretokenizer **out,
                                                   loci_error *err);
void loci_pretokenizer_close(loci_pretokenizer *pretokenizer);

/* One piece being cut: [at, end) is left of it; a match already found waits in [match, match_end).
 */
typedef struct loci_piece_level {
    size_t begin, at, end;
    size_t match, match_end;
} loci_piece_level;

typedef struct loci_pieces {
    const loci_pretokenizer *pretokenizer;
    struct pcre2_real_match_data_8 *match_data;
    struct pcre2_real_match_context_8 *limits;
    const uint8_t *text;
    loci_piece_level level[LOCI_SPLITS_MAX + 1];
} loci_pieces;

LOCI_MUST_CHECK loci_status loci_pieces_init(loci_pieces *pieces,
                                             const loci_pretokenizer *pretokenizer,
                                             loci_error *err);
void loci_pieces_fini(loci_pieces *pieces);
/* text is valid UTF-8 and stays in place until its last piece was taken. */
void loci_pieces_start(loci_pieces *pieces, loci_slice text);
/* An empty piece ends the text. LOCI_E_LIMIT when a regex takes too long. */
LOCI_MUST_CHECK loci_status loci_pieces_next(loci_pieces *pieces, loci_slice *piece,
                                             loci_error *err);

#endif
