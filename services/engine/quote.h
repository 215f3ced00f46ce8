/* SPDX-License-Identifier: Apache-2.0
 *
 * Which sentences of a passage a citation quotes. Pure functions of the bytes.
 */
#ifndef LOCI_SERVICES_ENGINE_QUOTE_H
#define LOCI_SERVICES_ENGINE_QUOTE_H

#include "base/buf.h"

/* The byte range [*from, *to) of `passage` to quote for a question and its answer (which may be
 * empty):
 *   where the answer stands literally (loci_text_find), the sentences that hold it, of several
 *   places the one whose sentences share most with the question;
 *   else the sentence that shares most with question and answer;
 *   else, where none shares a word, the whole passage.
 * The range begins and ends at characters that are not white space, unless it is the passage. */
void loci_quote_choose(loci_slice passage, loci_slice question, loci_slice answer, uint64_t *from,
                       uint64_t *to);

#endif
