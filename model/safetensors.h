/* SPDX-License-Identifier: Apache-2.0
 *
 * Reader of .safetensors files, one or many shards, memory-mapped.
 *
 * The header is hostile input: its length, the JSON, every dtype, shape and offset are checked
 * before use (no overlap, no overflow, inside the file, bytes = product of shape * size).
 * Immutable after open; tensors stay valid until close.
 */
#ifndef LOCI_MODEL_SAFETENSORS_H
#define LOCI_MODEL_SAFETENSORS_H

#include "attention/backend.h"

typedef struct loci_safetensors loci_safetensors;

typedef struct loci_tensor {
    const char *name;
    loci_dtype dtype; /* F32, BF16 or F16; others are refused when asked for */
    uint32_t dims;
    uint64_t shape[4];
    const void *data;
    uint64_t bytes;
} loci_tensor;

/* dir: a model folder with model.safetensors, or model.safetensors.index.json and its shards. */
LOCI_MUST_CHECK loci_status loci_safetensors_open(const char *dir, loci_safetensors **out,
                                                  loci_error *err);
/* LOCI_E_IO if some of what was read of the files since they were opened could not be read. */
LOCI_MUST_CHECK loci_status loci_safetensors_check(const loci_safetensors *file, loci_error *err);
void loci_safetensors_close(loci_safetensors *file);
/* LOCI_E_NOTFOUND names the tensor; LOCI_E_UNSUPPORTED its dtype; LOCI_E_INVAL a shape that is not
 * the expected one (dims expected values; pass 0 dims to accept any). */
LOCI_MUST_CHECK loci_status loci_safetensors_get(const loci_safetensors *file, const char *name,
                                                 uint32_t dims, const uint64_t *shape,
                                                 loci_tensor *out, loci_error *err);
size_t loci_safetensors_count(const loci_safetensors *file);
const char *loci_safetensors_name(const loci_safetensors *file, size_t index); /* sorted by name */

#endif
