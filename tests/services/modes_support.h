/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of a corpus's settings and of mode squeezed share: a GQA model whose every layer
 * is a retrieval layer, and corpora of it. Each call fails the test when it cannot do what it says.
 */
#ifndef LOCI_TESTS_SERVICES_MODES_SUPPORT_H
#define LOCI_TESTS_SERVICES_MODES_SUPPORT_H

#include "services/engine/query.h"
#include "tests/services/engine_support.h"

#define LAYERS 3u
#define HEADS 4u
#define KV_HEADS 2u
#define DIM 32u
#define WIDTH (HEADS * DIM)

extern char modes_folder[FOLDER_BYTES];  /* of the models "model" and "placeless" */
extern const char *const modes_files[3]; /* of the handbook */

/* For cmocka groups. "books": extents; "text": causal; "note": flat segments only; "narrow": as
 * "books", K and V in int8. */
int set_up_modes(void **state);
int tear_down_modes(void **state);

loci_engine *open_engine(void); /* of "model"; with the corpora */
/* The first `most` bytes of a file of the handbook. */
void add_file(loci_engine *engine, const char *corpus, const char *name, size_t most);
void begin_query(loci_query *query, loci_engine *engine, const char *corpus);
void change_settings(loci_engine *engine, const char *corpus, uint32_t dense, double temperature,
                     double scale);

#endif
