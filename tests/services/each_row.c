/* SPDX-License-Identifier: Apache-2.0
 *
 * attribute_each on the CPU; see each_row.h.
 */
#include "tests/services/each_row.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/lookup.h"

_Atomic uint64_t each_row_calls, each_row_rows;
static loci_backend_ops ops;

/* Row by row: of the others all weights are 0. */
static void attribute_each(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                           const loci_ref *mass) {
    size_t heads = lookup->q_heads, count = lookup->rows * heads;
    float *total = loci_cpu_ptr(total_lse, count * sizeof *total);
    float *kept = malloc(count * sizeof *kept);
    if (!kept) abort();
    memcpy(kept, total, count * sizeof *kept);
    atomic_fetch_add(&each_row_calls, 1);
    atomic_fetch_add(&each_row_rows, lookup->rows);
    for (uint32_t row = 0; row < lookup->rows; row++) {
        for (size_t i = 0; i < count; i++) total[i] = i / heads == row ? kept[i] : INFINITY;
        if (mass[row].buffer) ops.attribute(stream, lookup, total_lse, 0, mass[row]);
    }
    memcpy(total, kept, count * sizeof *kept);
    free(kept);
}

void each_row_begin(loci_backend *cpu) {
    ops = *cpu->ops;
    ops.attribute_each = attribute_each;
    cpu->ops = &ops;
    each_row_calls = each_row_rows = 0;
}

void each_row_end(loci_backend *cpu) {
    cpu->ops = &loci_backend_cpu;
}
