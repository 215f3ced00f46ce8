/* SPDX-License-Identifier: Apache-2.0
 *
 * Monotonic and wall time in one place, so that tests can replace them.
 */
#ifndef LOCI_BASE_CLOCK_H
#define LOCI_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

uint64_t loci_now_ns(void);      /* monotonic; for durations and deadlines */
int64_t loci_wall_seconds(void); /* Unix time; for records only */
void loci_sleep_ms(unsigned ms);
/* The moment in so many ms on a clock, as waits for locks and conditions want it. */
struct timespec loci_moment_in(clockid_t clock, unsigned ms);

#endif
