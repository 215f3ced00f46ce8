/* SPDX-License-Identifier: Apache-2.0
 *
 * What the benchmarks of this folder share: a failure ends the program with its text.
 */
#ifndef LOCI_TESTS_BENCH_GPU_BENCH_H
#define LOCI_TESTS_BENCH_GPU_BENCH_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "attention/backend.h"
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

/* The cuda backend; ends the program as skipped where there is no GPU. options: NULL allowed. */
static inline loci_backend *open_or_skip(const loci_backend_options *options) {
    loci_backend *backend;
    loci_error err;
    loci_status status = loci_backend_open("cuda", options, &backend, &err);
    if (status == LOCI_E_UNAVAILABLE || status == LOCI_E_UNSUPPORTED) {
        printf("skipped: %s\n", err.text);
        exit(77);
    }
    must(&err, status);
    return backend;
}

#endif
