/* SPDX-License-Identifier: Apache-2.0
 *
 * Thresholds of squeezed mode (Squeezed Attention, arXiv 2411.09688, section 4): for each level the
 * quantile of the scores of recorded query vectors. An independent corpus has no last queries, so
 * the last tokens of 100 segments drawn with a fixed seed stand in. Kept for the revision last
 * used.
 */
#include "services/engine/query.h"

loci_status loci_query_squeezed_threshold(loci_query *query, double sparsity, loci_error *err) {
    (void)query;
    (void)sparsity;
    return loci_fail(err, LOCI_E_UNSUPPORTED, "squeezed mode is not ready");
}
