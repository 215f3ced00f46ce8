/* SPDX-License-Identifier: Apache-2.0
 *
 * Files mapped for reading, whose read errors are errors and not the end of the process.
 *
 * Where a page of a mapped file cannot be read (a failing disk, a file that was cut short), the
 * kernel raises SIGBUS. The handler that opening a mapping installs puts a page of zeros in that
 * place and marks the mapping as failed; whoever reads asks loci_mapping_check before what was read
 * counts. A failed mapping stays failed. SIGBUS anywhere else goes to the handler that stood there
 * before.
 *
 * Threading: all functions may be called from any thread; a mapping is closed when nobody reads it.
 * SIGBUS must not be blocked in a thread that reads.
 */
#ifndef LOCI_BASE_MAPPING_H
#define LOCI_BASE_MAPPING_H

#include "base/status.h"

typedef struct loci_mapping loci_mapping;

/* Maps the first `bytes` > 0 of an open file, which the caller names in errors and may close. */
LOCI_MUST_CHECK loci_status loci_mapping_open(int fd, uint64_t bytes, const char *name,
                                              loci_mapping **out, loci_error *err);
void loci_mapping_close(loci_mapping *mapping); /* NULL allowed */

const uint8_t *loci_mapping_data(const loci_mapping *mapping);
/* LOCI_E_IO once a page could not be read. */
LOCI_MUST_CHECK loci_status loci_mapping_check(const loci_mapping *mapping, loci_error *err);

#endif
