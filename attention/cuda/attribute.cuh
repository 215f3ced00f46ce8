/* SPDX-License-Identifier: Apache-2.0
 *
 * How weights of attention become masses of segments, whoever reads the keys or keeps the logits.
 */
#ifndef LOCI_ATTENTION_CUDA_ATTRIBUTE_CUH
#define LOCI_ATTENTION_CUDA_ATTRIBUTE_CUH

#include "attention/cuda/attend_mma.cuh"
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

#define WEIGHT_MOST 6.0e7f /* of what is added at once: sums stay below 2^64 units */

static __device__ __forceinline__ mass_t mass_of_weight(float weight) {
    return (mass_t)((double)fminf(weight, WEIGHT_MOST) * LOCI_CUDA_MASS_UNIT);
}

static __device__ __forceinline__ bool counts_row(const loci_cuda_attribution &args, uint32_t row) {
    return row >= args.row_begin && row < args.row_end;
}

/* The weight of a logit so far below the total. */
static __device__ __forceinline__ float share_of(float below_total) {
    return weight_of<true>(below_total * LOG2_E);
}

/* Where a row's mass of a segment stands where whole_wide.cu adds up each row's: those of a segment
 * side by side. */
static __device__ __forceinline__ size_t each_at(uint32_t row, uint32_t segment) {
    return (size_t)segment * LOCI_CUDA_EACH_ROWS + row;
}

/* Where it stands in any case. */
static __device__ __forceinline__ size_t mass_at(const loci_cuda_attribution &args, uint32_t row,
                                                 uint32_t segment) {
    if (!args.each) return segment;
    if (args.wide_chunk && !args.logits) return each_at(row, segment);
    return (size_t)row * args.segments + segment;
}

/* The log-sum-exp that vector v of a KV head is weighed by; of one that does not count INFINITY, by
 * which all weights are 0. */
static __device__ __forceinline__ float total_of(const loci_cuda_look &look,
                                                 const loci_cuda_attribution &args,
                                                 uint32_t kv_head, uint32_t v) {
    uint32_t row = v / look.group;
    size_t at = (size_t)row * look.q_heads + kv_head * look.group + v % look.group;
    return v < look.vectors && counts_row(args, row) ? args.total_lse[at] : INFINITY;
}

#endif
