/* SPDX-License-Identifier: Apache-2.0
 *
 * A fixed pool of threads that runs one parallel loop at a time.
 *
 * loci_pool_run splits [0, count) into tasks that threads take in order; every
 * index is run exactly once, by an unspecified thread, so results must not
 * depend on which thread ran which index. The caller takes part and the call
 * returns when all indices are done. Calls from several threads queue up; a task
 * must not call loci_pool_run on the same pool.
 */
#ifndef LOCI_BASE_POOL_H
#define LOCI_BASE_POOL_H

#include <stddef.h>

#include "base/status.h"

typedef struct loci_pool loci_pool;
/* thread is in [0, loci_pool_threads): an index for per-thread scratch. */
typedef void (*loci_pool_fn)(void *arg, size_t index, unsigned thread);

/* threads counts the caller; 0 = one for each CPU that the calling thread may run on (taskset,
 * cpusets), or as many as the cgroup's quota of processor time (v2, as containers see it) is worth
 * where that is fewer. */
loci_status loci_pool_create(unsigned threads, loci_pool **out, loci_error *err);
void loci_pool_destroy(loci_pool *pool); /* NULL is allowed */
unsigned loci_pool_threads(const loci_pool *pool);
/* pool NULL: the caller runs all of them. */
void loci_pool_run(loci_pool *pool, size_t count, loci_pool_fn fn, void *arg);

/* CPUs' worth of a cgroup v2 file cpu.max ("quota period" in microseconds), rounded up; 0 = no
 * limit, or no such file. */
unsigned loci_pool_quota(const char *path);

#endif
