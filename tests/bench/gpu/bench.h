/* SPDX-License-Identifier: Apache-2.0
 *
 * What the benchmarks of this folder share: a failure ends the program with its text.
 */
#ifndef LOCI_TESTS_BENCH_GPU_BENCH_H
#define LOCI_TESTS_BENCH_GPU_BENCH_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/status.h"

static inline void must(const loci_error *err, loci_status status) {
    if (status == LOCI_OK) return;
    (void)fprintf(stderr, "%s: %s\n", program_invocation_short_name, err->text);
    exit(1);
}

static inline void *need(void *memory) {
    LOCI_ASSERT(memory != NULL);
    return memory;
}

#endif
