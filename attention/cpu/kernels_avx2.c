/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels for AVX2 with FMA; entered only after the run-time check in isa.c.
 */
#if defined(__x86_64__)

#include "attention/cpu/vec.h"

#include "attention/cpu/dense_body.h"
#include "attention/cpu/gemm_body.h"
#include "attention/cpu/pointwise_body.h"

const loci_cpu_kernels loci_cpu_kernels_avx2 = {
    gemm_f32, gemm_bf16, gemm_rows, VW, dense, NULL, rms_norm, swiglu, rope, to_bf16, exp_sum};

#endif
