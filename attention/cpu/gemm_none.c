/* SPDX-License-Identifier: Apache-2.0
 *
 * In place of gemm_dnnl.c in builds without oneDNN: there is no fast kernel, gemm.c takes its own.
 */
#include "attention/cpu/gemm_dnnl.h"

loci_status loci_dnnl_open(unsigned threads, loci_dnnl **out, loci_error *err) {
    (void)threads;
    (void)err;
    *out = NULL;
    return LOCI_OK;
}

void loci_dnnl_close(loci_dnnl *dnnl) {
    (void)dnnl;
}

const loci_dnnl_matmul *loci_dnnl_matmul_get(loci_dnnl *dnnl, uint32_t tile_rows, uint32_t rows,
                                             uint32_t cols, loci_dtype precision) {
    (void)dnnl;
    (void)tile_rows;
    (void)rows;
    (void)cols;
    (void)precision;
    return NULL;
}

size_t loci_dnnl_scratch_bytes(const loci_dnnl_matmul *matmul) {
    (void)matmul;
    return 0;
}

const char *loci_dnnl_name(const loci_dnnl_matmul *matmul) {
    (void)matmul;
    return "none";
}

bool loci_dnnl_run(loci_dnnl *dnnl, const loci_dnnl_matmul *matmul, unsigned thread, const void *x,
                   const void *w, float *y, void *scratch) {
    (void)dnnl;
    (void)matmul;
    (void)thread;
    (void)x;
    (void)w;
    (void)y;
    (void)scratch;
    return false;
}
