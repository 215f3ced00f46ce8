/* SPDX-License-Identifier: Apache-2.0
 *
 * One step of attention over a corpus, for rows of one question (corpus_attend.c) or for one row
 * each of several (together.c), and what both enqueue. A question keeps the records of its steps
 * until the pass has run.
 */
#ifndef LOCI_SERVICES_ENGINE_ATTEND_STEP_H
#define LOCI_SERVICES_ENGINE_ATTEND_STEP_H

#include <stdatomic.h>

#include "services/engine/query.h"

/* Exact attention over some rows. */
typedef struct loci_exact_part {
    loci_attend_span span[LOCI_GEMM_FEW_ROWS];
    loci_attend_dense args;
} loci_exact_part;

/* Everything one step needs on the host until sync, and what it tells then. */
typedef struct loci_attend_step {
    struct loci_attend_step *next; /* of the query's */
    /* Where several questions have a step in common each has a record that has nothing but these
     * three: their step, and which row of it is its own. */
    struct loci_attend_step *shared;
    uint32_t row;
    bool dense_reads; /* dense mode would read the corpus again for these rows */

    loci_attend_call call;    /* whose q, out and lse are copies in the slot where others stand
                                 elsewhere the next time */
    _Atomic uint32_t sharers; /* records that have it; 0 = it is one's own */
    loci_lookup *lookup;
    loci_exact_part sink, flat;
    loci_select_params params; /* of this layer */
    uint32_t row_begin;
    loci_lookup_stats stats;
    loci_ref out, lse; /* of one part */
    loci_ref sink_lse;
    /* What the corpus's tokens are merged into: the call's own, or, when their log-sum-exp is to be
     * scaled, an output of their own first. */
    loci_ref all, all_lse;
    uint32_t all_stride;
    float scale;  /* of logits over the corpus's tokens */
    bool apart;   /* that own output is there */
    float host[]; /* [3][rows][heads]: lse of the sink, of all, of the corpus's tokens */
} loci_attend_step;

/* How a call's rows select. The first layers read everything, whatever the mode; so do all in mode
 * hierarchical where a device takes less time for that than for a selection, but for a question
 * that sets a budget. */
loci_select_params loci_attend_params(const loci_query *query, const loci_attend_call *call);
/* Whether the corpus's tokens have an output of their own first. */
bool loci_attend_apart(const loci_query *query);
/* Identical rows that the shared prefix stands for; a causal corpus has one. 0: there is none. */
uint64_t loci_attend_sinks(const loci_query *query);
/* The query's from here on. */
void loci_attend_keep(loci_query *query, loci_attend_step *step);
/* Sink, open segments and extents, merged. */
void loci_attend_enqueue(const loci_query *query, loci_attend_step *step);

#endif
