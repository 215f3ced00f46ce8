/* SPDX-License-Identifier: Apache-2.0
 *
 * The registry of backends: opens one by name. The tables themselves live with their
 * backends; this file only lists those that were built.
 */
#include "attention/backend.h"

#include <stdlib.h>
#include <string.h>

static const loci_backend_ops *const known[] = {
    &loci_backend_cpu,
#ifdef LOCI_WITH_CUDA
    &loci_backend_cuda,
#endif
};
#define KNOWN_COUNT (sizeof known / sizeof *known)

static loci_status unknown_backend(const char *name, loci_error *err) {
    loci_buf names = LOCI_BUF_INIT;
    for (size_t i = 0; i < KNOWN_COUNT; i++)
        loci_buf_printf(&names, "%s%s", i ? ", " : "", known[i]->name);
    const char *text = loci_buf_text(&names);
    loci_status status =
        loci_fail(err, LOCI_E_UNSUPPORTED, "there is no backend '%s' in this build; it has: %s",
                  name, text ? text : "(out of memory)");
    loci_buf_fini(&names);
    return status;
}

loci_status loci_backend_open(const char *name, const loci_backend_options *options,
                              loci_backend **out, loci_error *err) {
    static const loci_backend_options defaults = {0, NULL};
    *out = NULL;
    for (size_t i = 0; i < KNOWN_COUNT; i++) {
        if (strcmp(known[i]->name, name) != 0) continue;
        loci_backend *backend = calloc(1, sizeof *backend);
        if (!backend) return loci_fail(err, LOCI_E_NOMEM, "no memory for the %s backend", name);
        backend->ops = known[i];
        loci_status status = known[i]->open(options ? options : &defaults, backend, err);
        if (status != LOCI_OK) {
            free(backend);
            return status;
        }
        *out = backend;
        return LOCI_OK;
    }
    return unknown_backend(name, err);
}

void loci_backend_close(loci_backend *backend) {
    if (!backend) return;
    backend->ops->close(backend);
    free(backend);
}

struct loci_pool *loci_backend_pool(loci_backend *backend) {
    return backend->ops->pool(backend);
}
