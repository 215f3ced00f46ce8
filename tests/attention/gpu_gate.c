/* SPDX-License-Identifier: Apache-2.0
 *
 * Linked into tests that are built for the cuda backend: where it cannot be opened, the program
 * says why and ends as skipped before it has begun.
 */
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
}
