/* SPDX-License-Identifier: Apache-2.0
 *
 * A flag and a deadline that long work polls: set from any thread, once.
 */
#ifndef LOCI_BASE_CANCEL_H
#define LOCI_BASE_CANCEL_H

#include <stdatomic.h>

#include "base/clock.h"
#include "base/status.h"

typedef struct loci_cancel {
    atomic_bool requested;
    uint64_t deadline_ns; /* monotonic; 0 = none */
} loci_cancel;

static inline void loci_cancel_init(loci_cancel *cancel, uint64_t deadline_ns) {
    atomic_init(&cancel->requested, false);
    cancel->deadline_ns = deadline_ns;
}

static inline void loci_cancel_request(loci_cancel *cancel) {
    atomic_store_explicit(&cancel->requested, true, memory_order_release);
}

/* LOCI_OK, LOCI_E_CANCELLED or LOCI_E_TIMEOUT. cancel may be NULL. */
static inline loci_status loci_cancel_check(const loci_cancel *cancel) {
    if (!cancel) return LOCI_OK;
    if (atomic_load_explicit(&((loci_cancel *)(uintptr_t)cancel)->requested, memory_order_acquire))
        return LOCI_E_CANCELLED;
    if (cancel->deadline_ns && loci_now_ns() >= cancel->deadline_ns) return LOCI_E_TIMEOUT;
    return LOCI_OK;
}

#endif
