/* SPDX-License-Identifier: Apache-2.0
 *
 * How kernels of a look-up read pairs and masks.
 */
#ifndef LOCI_ATTENTION_CUDA_LOOK_CUH
#define LOCI_ATTENTION_CUDA_LOOK_CUH

#include "attention/cuda/device.cuh"
#include "attention/cuda/launch.cuh"

#define MAX_DIM 256u
#define MAX_LEAF 32u /* tokens */
#define MAX_ROOT 1024u

/* Bits [first, first + count) of the live bitmap, 1 <= count <= 32. */
static __device__ __forceinline__ uint32_t live_bits(const loci_cuda_pair *pair, uint32_t first,
                                                     uint32_t count) {
    uint32_t all = count == 32 ? 0xffffffffu : (1u << count) - 1;
    if (!pair->live) return all;
    uint64_t bits = pair->live[first / 64] >> (first % 64);
    if (first % 64 + count > 64) bits |= pair->live[first / 64 + 1] << (64 - first % 64);
    return (uint32_t)bits & all;
}

/* Words of a pair in a mask. */
static __device__ __forceinline__ uint32_t pair_words(const loci_cuda_pair *pair) {
    return (pair->tokens + 31) / 32;
}

/* The mask words of a pair for one row. */
static __device__ __forceinline__ size_t mask_at(const loci_cuda_look &look,
                                                 const loci_cuda_pair *pair, uint32_t row) {
    return ((size_t)pair->kv_head * look.mask_rows + row) * look.words + pair->word_base;
}

/* Bits [first, first + count) of mask words, 1 <= count <= 32. */
static __device__ __forceinline__ uint32_t mask_bits(const uint32_t *words, uint32_t first,
                                                     uint32_t count) {
    uint32_t bits = words[first / 32] >> (first % 32);
    if (first % 32 + count > 32) bits |= words[first / 32 + 1] << (32 - first % 32);
    return count == 32 ? bits : bits & ((1u << count) - 1);
}

/* Sets bits of mask words from `first` on; other threads may do so, too. */
static __device__ __forceinline__ void or_bits(uint32_t *words, uint32_t first, uint32_t bits) {
    uint32_t shift = first % 32, low = bits << shift, high = shift ? bits >> (32 - shift) : 0;
    if (low) atomicOr(&words[first / 32], low);
    if (high) atomicOr(&words[first / 32 + 1], high);
}

/* The extent whose pair of a KV head has this mask word. */
static __device__ __forceinline__ uint32_t extent_at(const loci_cuda_look &look, uint32_t h,
                                                     uint32_t word) {
    return last_at_most(look.extents, word, [&](uint32_t e) {
        return look.pairs[(size_t)e * look.kv_heads + h].word_base;
    });
}

/* The pair that has a place of a head's mask, and the slot there. */
static __device__ __forceinline__ const loci_cuda_pair *
pair_at(const loci_cuda_look &look, uint32_t h, uint32_t place, uint32_t *slot) {
    size_t index = (size_t)extent_at(look, h, place / 32) * look.kv_heads + h;
    const loci_cuda_pair *pair = &look.pairs[index];
    *slot = place - pair->word_base * 32;
    return pair;
}

static __device__ __forceinline__ uint32_t slot_word(const loci_cuda_pair *pair, uint32_t slot,
                                                     uint32_t dim) {
    return *(const uint32_t *)(pair->records + (size_t)slot * pair->record_stride + dim / 2);
}

/* Whether candidate i of a list is selected. */
static __device__ __forceinline__ bool is_chosen(const loci_cuda_cut &cut, float share,
                                                 uint32_t i) {
    uint32_t key = __float_as_uint(share);
    return key > cut.key || (key == cut.key && i < cut.ties);
}

/* The sum of what threads before this one have; *all: of all THREADS of the block. */
template <uint32_t THREADS>
static __device__ __forceinline__ uint32_t sum_before(uint32_t own, uint32_t *all) {
    __shared__ __align__(16) uint32_t warps[THREADS / 32]; /* read in words of 16 bytes */
    uint32_t sum = own, lane = threadIdx.x % 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        uint32_t before = __shfl_up_sync(FULL_WARP, sum, offset);
        if (lane >= (uint32_t)offset) sum += before;
    }
    __syncthreads(); /* all have read the sums of a call before */
    if (lane == 31) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum -= own;
    *all = 0;
    for (uint32_t i = 0; i < THREADS / 32; i++) {
        if (i < threadIdx.x / 32) sum += warps[i];
        *all += warps[i];
    }
    return sum;
}

#endif
