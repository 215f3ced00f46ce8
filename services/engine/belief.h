/* SPDX-License-Identifier: Apache-2.0
 *
 * What is believed of several passages that were read one at a time: which answer, and whether
 * there is one. Pure functions of a few figures of each reading. The rule and its coefficients,
 * which belong to the weights of the built-in model, stand in belief.c alone.
 */
#ifndef LOCI_SERVICES_ENGINE_BELIEF_H
#define LOCI_SERVICES_ENGINE_BELIEF_H

#include <stdint.h>

/* Of one passage; those of a question stand by rank, best first. */
typedef struct loci_reading {
    double rank;    /* rank score of the passage (rank.c) */
    double words;   /* its share of what the question's words can give, 0..1; below 0: not known */
    double logprob; /* of the answer that was read, its end counted */
    double none_logprob; /* of <none> in the answer's place */
} loci_reading;

/* The answer's, to be compared with those of the question's other passages. */
double loci_reading_score(const loci_reading *reading);
/* The reading whose answer is given: of the highest score, of equal ones the first. count > 0. */
uint32_t loci_readings_best(const loci_reading *readings, uint32_t count);
/* For an answer to be there: there is one where it is 0 or more. count > 0. */
double loci_readings_belief(const loci_reading *readings, uint32_t count);

#endif
