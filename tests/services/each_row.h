/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU with attribute_each, which it does not have since rows of several questions in one
 * look-up would not keep their bits: for tests of questions that read a corpus together.
 */
#ifndef LOCI_TESTS_SERVICES_EACH_ROW_H
#define LOCI_TESTS_SERVICES_EACH_ROW_H

#include <stdatomic.h>

#include "attention/backend.h"

/* From now on the backend has it, until each_row_end; one backend at a time. */
void each_row_begin(loci_backend *cpu);
void each_row_end(loci_backend *cpu);
/* Since begin: how often, and for how many rows. */
extern _Atomic uint64_t each_row_calls, each_row_rows;

#endif
