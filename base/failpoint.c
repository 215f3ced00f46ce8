/* SPDX-License-Identifier: Apache-2.0
 *
 * Kill points; see failpoint.h.
 */
#include "base/failpoint.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char armed_name[64];
static atomic_long passes_left;

static void read_environment(void) {
    const char *value = getenv("LOCI_FAIL_AT");
    if (!value) return;
    const char *colon = strrchr(value, ':');
    size_t len = colon ? (size_t)(colon - value) : strlen(value);
    if (len == 0 || len >= sizeof armed_name) return;
    memcpy(armed_name, value, len);
    armed_name[len] = 0;
    atomic_store(&passes_left, colon ? strtol(colon + 1, NULL, 10) : 1);
}

void loci_failpoint(const char *name) {
    pthread_once(&once, read_environment);
    if (armed_name[0] == 0 || strcmp(name, armed_name) != 0) return;
    if (atomic_fetch_sub(&passes_left, 1) == 1) kill(getpid(), SIGKILL);
}
