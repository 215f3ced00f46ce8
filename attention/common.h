/* SPDX-License-Identifier: Apache-2.0
 *
 * What the backends have in common: arithmetic of the rules (attention/README.md) that stands on
 * the host in each. Pure functions.
 */
#ifndef LOCI_ATTENTION_COMMON_H
#define LOCI_ATTENTION_COMMON_H

#include "attention/backend.h"

/* How many roots or candidates are kept: ceil(rate * spread), but no more than there are live
 * tokens; at least `least`, and 1. */
uint64_t loci_select_count(float rate, double spread, uint64_t live, uint64_t least);

/* By how much a root's log mass may lie below what is attended exactly anyway: log(a tenth of
 * 1 - top_p); -INFINITY where nothing may be left out. */
float loci_select_root_slack(float top_p);

/* Rows past the last one that any span touches, of queries or of keys. */
size_t loci_attend_rows(const loci_attend_dense *args, bool keys);

typedef struct loci_scored {
    float score;
    uint32_t segment;
} loci_scored;

/* Sorts the list, best first, equal ones by their numbers, and appends the segments with a score
 * above `least` to segments[*count], up to `limit` there. */
void loci_take_best(loci_scored *list, uint32_t n, float least, uint32_t limit, uint32_t *segments,
                    uint32_t *count);

#endif
