/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz entry: any bytes as a model.safetensors; whatever opens must be readable to its last byte.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_all(const loci_safetensors *file) {
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < loci_safetensors_count(file); i++) {
        loci_tensor tensor;
        loci_error err;
        const char *name = loci_safetensors_name(file, i);
        if (loci_safetensors_get(file, name, 0, NULL, &tensor, &err) != LOCI_OK) continue;
        for (uint64_t j = 0; j < tensor.bytes; j++)
            sum = (uint8_t)(sum + ((const uint8_t *)tensor.data)[j]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char dir[] = "/tmp/loci-fuzz-XXXXXX";
    static char path[sizeof dir + 32];
    if (!path[0]) {
        if (!mkdtemp(dir)) abort();
        snprintf(path, sizeof path, "%s/model.safetensors", dir);
    }
    FILE *out = fopen(path, "wb");
    if (!out) abort();
    if (fwrite(data, 1, size, out) != size) abort();
    if (fclose(out) != 0) abort();
    loci_safetensors *file = NULL;
    loci_error err;
    if (loci_safetensors_open(dir, &file, &err) == LOCI_OK) read_all(file);
    loci_safetensors_close(file);
    return 0;
}
