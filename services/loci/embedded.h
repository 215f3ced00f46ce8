/* SPDX-License-Identifier: Apache-2.0
 *
 * A daemon for one call: `loci --data DIR` starts the locid that lies beside it, on a unix socket
 * in a private temporary directory, and ends it afterwards. The child runs in a process group
 * of its own, so that Ctrl-C reaches only us, and ends when we are killed (locid --parent).
 */
#ifndef LOCI_SERVICES_LOCI_EMBEDDED_H
#define LOCI_SERVICES_LOCI_EMBEDDED_H

#include <stdatomic.h>
#include <sys/types.h>

#include "base/status.h"

typedef struct loci_embedded {
    pid_t pid;         /* 0 = not running */
    char dir[80];      /* "" = none */
    char address[100]; /* unix:DIR/socket */
} loci_embedded;

/* Returns when the daemon accepts connections; bounded. When it dies first, *err holds what it
 * said. */
LOCI_MUST_CHECK loci_status loci_embedded_start(loci_embedded *embedded, const char *data,
                                                const atomic_int *interrupt, loci_error *err);
/* Ends it: SIGTERM, then SIGKILL when that takes too long. Idempotent. */
void loci_embedded_stop(loci_embedded *embedded);

#endif
