/* SPDX-License-Identifier: Apache-2.0
 *
 * Named points at which a test can kill the process: LOCI_FAIL_AT="name:n" makes
 * the n-th pass (from 1) through LOCI_FAILPOINT("name") end it with SIGKILL, as
 * a power cut would. Without the variable a point costs one branch.
 */
#ifndef LOCI_BASE_FAILPOINT_H
#define LOCI_BASE_FAILPOINT_H

void loci_failpoint(const char *name);
#define LOCI_FAILPOINT(name) loci_failpoint(name)

#endif
