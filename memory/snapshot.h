/* SPDX-License-Identifier: Apache-2.0
 *
 * Snapshots inside memory/; the public part is in store.h.
 */
#ifndef LOCI_MEMORY_SNAPSHOT_H
#define LOCI_MEMORY_SNAPSHOT_H

#include "memory/store.h"

/* The smallest revision in a corpus's list of snapshots; UINT64_MAX when it is empty. */
uint64_t loci_snapshots_oldest(const loci_snapshot *list);

#endif
