/* SPDX-License-Identifier: Apache-2.0
 *
 * The text of an answer while its tokens arrive: whole UTF-8 characters, without the white space
 * before it, handed on piece by piece.
 *
 * Of a stock model it also tells the fixed reply by which such a model says that the documents hold
 * no answer (prompt.c): nothing of that reply is handed on, and the text is empty then.
 */
#ifndef LOCI_SERVICES_ENGINE_ANSWER_TEXT_H
#define LOCI_SERVICES_ENGINE_ANSWER_TEXT_H

#include "base/buf.h"

/* What a stock model is to reply where the documents hold no answer. */
#define LOCI_REFUSAL "Not in the documents"

typedef loci_status (*loci_piece_fn)(void *ctx, const char *text, loci_error *err);

typedef struct loci_answer_text {
    bool stock;
    bool line;              /* a stock model that does not end its answers: a line is all */
    loci_piece_fn on_piece; /* NULL allowed */
    void *ctx;
    loci_buf raw;  /* the tokens' bytes: append here, then take */
    loci_buf text; /* so far */
    size_t taken;  /* of raw: is in text */
    size_t handed; /* of text: was given to on_piece */
    bool over;     /* what follows does not matter */
} loci_answer_text;

/* Takes up what was appended to raw; all of it if no more will come (last). */
LOCI_MUST_CHECK loci_status loci_answer_text_take(loci_answer_text *self, bool last,
                                                  loci_error *err);

#endif
