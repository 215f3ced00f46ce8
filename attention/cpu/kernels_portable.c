/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels in plain C: for processors without AVX2, and the yardstick of the others.
 */
#include "attention/cpu/vec.h"

#include "attention/cpu/dense_body.h"
#include "attention/cpu/gemm_body.h"
#include "attention/cpu/pointwise_body.h"

const loci_cpu_kernels loci_cpu_kernels_portable = {
    gemm_f32, gemm_bf16, gemm_rows, VW, dense, NULL, rms_norm, swiglu, rope, to_bf16, exp_sum};
