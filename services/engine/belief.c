/* SPDX-License-Identifier: Apache-2.0
 *
 * The rule of readings; see belief.h.
 *
 * The answer is the one of the highest
 *
 *   log p(answer) + CHOICE_RANK * rank score
 *
 * There is one where the passages, weighed by w = softmax(SHARE_RANK * rank score), the lead of the
 * first over the next three, and the question's words in the passages together speak for it:
 *
 *   logit(sum w (1 - p(<none>))) + LEAD * lead + WORDS * sum w words >= LEAST
 *
 * tests/quality/fit_belief.py fits the coefficients; attention/README.md (Segments) has the
 * figures.
 */
#include "services/engine/belief.h"

#include <math.h>

#define LEAD_OVER 3u    /* passages */
#define SURE 1e-4       /* probabilities are not believed to be nearer to 0 and 1 */
#define USUAL_WORDS 0.3 /* of passages whose words were not looked at */

static const struct {
    double choice_rank, share_rank, lead, words, least;
} rule = {.choice_rank = 0.2, .share_rank = 0.1, .lead = 0.06, .words = 8.2, .least = 1.28};

double loci_reading_score(const loci_reading *reading) {
    return reading->logprob + rule.choice_rank * reading->rank;
}

uint32_t loci_readings_best(const loci_reading *readings, uint32_t count) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (loci_reading_score(&readings[i]) > loci_reading_score(&readings[best])) best = i;
    return best;
}

double loci_readings_belief(const loci_reading *readings, uint32_t count) {
    double weights = 0, some = 0, words = 0, others = 0;
    uint32_t over = count - 1 < LEAD_OVER ? count - 1 : LEAD_OVER;
    for (uint32_t i = 0; i < count; i++) {
        const loci_reading *read = &readings[i];
        double weight = exp(rule.share_rank * (read->rank - readings[0].rank));
        weights += weight;
        some += weight * (1 - exp(read->none_logprob));
        words += weight * (read->words >= 0 ? read->words : USUAL_WORDS);
        if (i > 0 && i <= over) others += read->rank / over;
    }
    some = fmin(fmax(some / weights, SURE), 1 - SURE);
    double lead = over > 0 ? readings[0].rank - others : 0;
    return log(some / (1 - some)) + rule.lead * lead + rule.words * words / weights - rule.least;
}
