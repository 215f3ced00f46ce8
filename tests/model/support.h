/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared by the tests of model/: one temporary folder for a test program, and files in it.
 */
#ifndef LOCI_TESTS_MODEL_SUPPORT_H
#define LOCI_TESTS_MODEL_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/buf.h"

#define PATH_BYTES 512

/* The folder: made by the set-up of the program (make_dir), emptied after a test (clear_dir),
 * removed with all that is in it at the end (remove_dir). */
extern char dir[];
int make_dir(void **state);
int clear_dir(void **state);
int remove_dir(void **state);

/* DIR/name. */
const char *path_of(char out[static PATH_BYTES], const char *name);
void write_file(const char *name, const void *data, size_t len);
void write_text(const char *name, const char *text);
/* Appends a file, of any folder, and a NUL that does not count. */
void read_file(const char *path, loci_buf *out);

uint32_t xorshift(uint32_t *state);

#endif
