/* SPDX-License-Identifier: Apache-2.0
 *
 * Linked into tests that are built for the cuda backend: where it cannot be opened, the program
 * says why and ends as skipped before it has begun. LOCI_TEST_FILTER=PATTERN runs only the tests
 * whose names match (cmocka's * and ?): sanitizers take long.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>

#include "attention/backend.h"

#define SKIPPED 77

static void __attribute__((constructor)) open_or_skip(void) {
    loci_backend *backend;
    loci_error err;
    loci_status status = loci_backend_open("cuda", NULL, &backend, &err);
    if (status == LOCI_E_UNAVAILABLE || status == LOCI_E_UNSUPPORTED) {
        printf("skipped: %s\n", err.text);
        fflush(stdout);
        _Exit(SKIPPED);
    }
    if (status == LOCI_OK) loci_backend_close(backend);
    const char *filter = getenv("LOCI_TEST_FILTER");
    if (filter) cmocka_set_test_filter(filter);
}
