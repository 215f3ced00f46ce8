/* SPDX-License-Identifier: Apache-2.0
 *
 * Launchers of few.cu; see kernels.h.
 */
#ifndef LOCI_ATTENTION_CUDA_FEW_H
#define LOCI_ATTENTION_CUDA_FEW_H

#include "attention/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LOCI_CUDA_FEW_ROWS 8u
/* y [rows][columns] (+)= x [rows][width] w^T, w [columns][width], at 16-byte addresses, at most
 * LOCI_CUDA_FEW_ROWS rows. Either w in bf16, width a multiple of 8, and x in bf16 or, to be rounded
 * to it, in f32; or both in f32, width a multiple of 4. A row's result depends on no other row, not
 * on how many they are, and not on whether its values were rounded before. */
cudaError_t loci_cuda_k_few(cudaStream_t stream, float *y, const void *x, bool x_bf16,
                            const void *w, bool w_bf16, uint32_t rows, uint32_t columns,
                            uint32_t width, bool accumulate);
cudaError_t loci_cuda_k_scatter_rows(cudaStream_t stream, float *dst, uint32_t dst_stride,
                                     const int32_t *at, const float *src, uint32_t src_stride,
                                     uint32_t rows, uint32_t cols);

#ifdef __cplusplus
}
#endif

#endif
