/* SPDX-License-Identifier: Apache-2.0
 *
 * A backend for tests that does nothing until sync().
 *
 * It wraps another backend and keeps to the letter of the contract in attention/backend.h:
 * its buffers are private (no caller can dereference one), calls are only recorded, host
 * arrays in arguments are not copied but read at sync(), which first checks that they did not
 * change, and host outputs hold poison until then. A caller that passes on it reads
 * nothing early, and orders streams that read what others write: what is awaited of another stream
 * runs then, and not before. Streams may be used by different threads; look-ups may not.
 */
#ifndef LOCI_TESTS_DEFERRED_H
#define LOCI_TESTS_DEFERRED_H

#include "attention/backend.h"

/* Both must outlive whatever was made on *out. A misuse aborts with a message. */
loci_status deferred_open(loci_backend *inner, loci_backend **out, loci_error *err);
/* Does not close the inner backend. */
void deferred_close(loci_backend *backend);

#endif
