/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the engine share: a folder, engines in it, documents and their registration.
 * Each call fails the test when it cannot do what it says.
 */
#ifndef LOCI_TESTS_SERVICES_ENGINE_SUPPORT_H
#define LOCI_TESTS_SERVICES_ENGINE_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "services/engine/engine.h"

#define HANDBOOK "tests/data/handbook"
#define QUESTION "Who designed the dome of the North Telescope?"

#define FOLDER_BYTES 64
void make_folder(const char *name, char out[FOLDER_BYTES]);
void remove_folder(const char *folder); /* with all that is in it */

loci_engine *engine_of(const loci_engine_options *options);
/* In FOLDER/NAME-data, of the model in FOLDER/NAME. */
loci_engine *engine_in(const char *folder, const char *name);

void create_corpus(loci_engine *engine, const char *corpus, loci_encoding encoding, bool beyond,
                   loci_corpus_info *info);
/* Stored; wakes the thread that indexes. */
void put_text(loci_engine *engine, const char *corpus, const char *id, loci_slice text);
/* A file of the handbook. Valid until the next call. */
loci_slice read_handbook(const char *name);
/* Waits until everything is searchable and at rest. */
void settle(loci_engine *engine, const char *corpus);

#endif
