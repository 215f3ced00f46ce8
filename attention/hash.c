/* SPDX-License-Identifier: Apache-2.0
 *
 * The hash of blocks, by the CPU's instruction set. In a file of its own: index_layout.c has the
 * same hash inline, for what is short, and the library's header is one or the other.
 */
#include "attention/index_layout.h"

#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h> /* XXH3 by the CPU's instruction set; the same values */
#endif

uint64_t loci_hash_bytes(const void *data, size_t bytes) {
    return XXH3_64bits(data, bytes);
}
