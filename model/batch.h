/* SPDX-License-Identifier: Apache-2.0
 *
 * Batches: sequences whose forward passes run together (continuous batching, as in Orca, Yu et al.
 * 2022).
 *
 * Whoever appends up to LOCI_GEMM_FEW_ROWS tokens, a step of decoding, to a sequence of a batch
 * joins a queue. When no shared pass runs, the first thread of the queue runs one for all that
 * wait; who comes meanwhile waits for the next. There is no thread beside those of the callers.
 * Longer chunks fill the machine by themselves: they run alone, beside the shared passes, so a step
 * waits for the last few rows of a prefill at most. Since products do not tell one row from
 * LOCI_GEMM_FEW_ROWS (attention/backend.h), a sequence's results are the same, to the bit, in any
 * company and in none.
 *
 * In retrieval layers each caller's thread runs its own callback on its own stream; the pass goes
 * on behind all of them. An error or a cancel ends the one sequence's append when the pass is
 * through, and no other. Callers whose callbacks say so (loci_attend_together) are reached by one
 * of them for all: they share its errors, and their results are the same in any company as far as
 * those of their callback are.
 */
#ifndef LOCI_MODEL_BATCH_H
#define LOCI_MODEL_BATCH_H

#include "model/model.h"

typedef struct loci_batch loci_batch;

typedef struct loci_batch_usage {
    uint64_t passes, chunks; /* run so far; chunks / passes: how many shared one */
    uint32_t waiting;        /* chunks in the queue right now */
} loci_batch_usage;

/* For `members` sequences of tokens_max tokens, whose caches it holds: f32 [layers]
 * [members * tokens_max][K and V][kv_heads][head_dim]; and f32 [min(members, LOCI_GEMM_FEW_ROWS)]
 * [vocab]. */
LOCI_MUST_CHECK loci_status loci_batch_open(loci_model *model, uint32_t members,
                                            uint32_t tokens_max, loci_batch **out, loci_error *err);
/* The next of its sequences; from one thread, before any of them is used. */
LOCI_MUST_CHECK loci_status loci_batch_add(loci_batch *batch, loci_sequence **out, loci_error *err);
void loci_batch_close(loci_batch *batch); /* after its sequences; NULL is allowed */
/* From any thread. */
void loci_batch_usage_of(loci_batch *batch, loci_batch_usage *out);
/* Whether the caller is about to append one token after another. The next step of a batch waits for
 * those of the last one who are, else they would go round in two groups for ever; but for an eighth
 * of the time that the last one took at most, so that nobody is held up by a reader who is slow to
 * take a token. Without a batch it does nothing. */
void loci_sequence_decoding(loci_sequence *sequence, bool decoding);

#endif
