/* SPDX-License-Identifier: Apache-2.0
 *
 * Folders of stock models for tests: the random weights of tests/data/model under a tokenizer
 * without the built-in family's special tokens and, where asked for, a chat template. The
 * tokenizer has a token for every byte, so lengths are bytes.
 */
#ifndef LOCI_TESTS_SERVICES_STOCK_MODEL_H
#define LOCI_TESTS_SERVICES_STOCK_MODEL_H

#include <stdint.h>

typedef struct stock_model {
    const char *base; /* "llama": tests/data/model/tiny-llama */
    const char *chat; /* "llama3", "chatml"; NULL: no template */
    uint32_t positions;
    const char *from, *to; /* of a change in config.json, or NULL */
} stock_model;

/* Makes the folder `dir`, which must not be there; fails the test if it cannot. */
void stock_model_make(const stock_model *model, const char *dir);

#endif
