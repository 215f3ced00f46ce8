/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA calls of attention/cuda/pairs.c, pair_blob.c and rows.c over ordinary memory, and plain
 * versions of the kernels that they and look-ups use on cached rows, so that the host's part of the
 * memory tiers is tested where there is no GPU. Linked with --wrap
 * (tests/attention/CMakeLists.txt).
 */
#ifndef LOCI_TESTS_ATTENTION_FAKE_CUDA_H
#define LOCI_TESTS_ATTENTION_FAKE_CUDA_H

#include "attention/cuda/kernels.h"

typedef struct fake_cuda {
    size_t device, host;           /* allocations that live */
    size_t device_most, host_most; /* bytes that live at the same time, at most */
    size_t device_bytes, host_bytes;
    uint64_t calls, fail_at; /* of all allocations; 0 = none fails */
    size_t device_room;      /* what the device has */
    uint64_t enqueued;       /* by calls: work that reads what was there then runs until the device
                                is waited for; 0 = none. Freeing it meanwhile aborts */
} fake_cuda;

extern fake_cuda fake;

/* What a decoding step does with the rows of a slot (rows.cuh): reads them, and keeps them in a
 * frame where there is a free one. */
const uint8_t *fake_read_rows(const loci_cuda_row_cache *cache, const loci_cuda_pair *pair,
                              uint32_t slot, uint32_t dim);

#endif
