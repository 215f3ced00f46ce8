/* SPDX-License-Identifier: Apache-2.0
 *
 * oneDNN behind three functions: y = x W^T for a fixed number of rows. oneDNN is run on one
 * thread (the pool splits the work), because its OpenMP threads would spin against ours.
 */
#ifndef LOCI_ATTENTION_CPU_GEMM_DNNL_H
#define LOCI_ATTENTION_CPU_GEMM_DNNL_H

#include "attention/backend.h"

typedef struct loci_dnnl loci_dnnl;
typedef struct loci_dnnl_matmul loci_dnnl_matmul;

/* NULL in *out and LOCI_OK when oneDNN has no engine for this machine. */
loci_status loci_dnnl_open(unsigned threads, loci_dnnl **out, loci_error *err);
void loci_dnnl_close(loci_dnnl *dnnl);
/* A product of [tile_rows][cols] by `rows` rows of a weight packed as gemm.c packs it, shared by
 * all weights of that shape; NULL when oneDNN has no fast kernel for it. Thread-safe. */
const loci_dnnl_matmul *loci_dnnl_matmul_get(loci_dnnl *dnnl, uint32_t tile_rows, uint32_t rows,
                                             uint32_t cols, loci_dtype precision);
size_t loci_dnnl_scratch_bytes(const loci_dnnl_matmul *matmul);
/* The name of the kernel, for descriptions. */
const char *loci_dnnl_name(const loci_dnnl_matmul *matmul);
/* x [tile_rows][cols] in the precision, y f32 [tile_rows][rows], both dense. False on failure. */
bool loci_dnnl_run(loci_dnnl *dnnl, const loci_dnnl_matmul *matmul, unsigned thread, const void *x,
                   const void *w, float *y, void *scratch);

#endif
