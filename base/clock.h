/* SPDX-License-Identifier: Apache-2.0
 *
 * Monotonic and wall time in one place, so that tests can replace them.
 */
#ifndef LOCI_BASE_CLOCK_H
#define LOCI_BASE_CLOCK_H

#include <stdint.h>

uint64_t loci_now_ns(void);      /* monotonic; for durations and deadlines */
int64_t loci_wall_seconds(void); /* Unix time; for records only */
void loci_sleep_ms(unsigned ms);

#endif
