/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensor-core products of bf16 with f32 sums, what loads their operands from shared memory, and
 * copies to shared memory that run by themselves. A warp's 16 x 8 result: lane l has columns
 * 2 (l % 4) and the next of rows l / 4 (elements 0, 1) and l / 4 + 8 (elements 2, 3).
 */
#ifndef LOCI_ATTENTION_CUDA_MMA_CUH
#define LOCI_ATTENTION_CUDA_MMA_CUH

#include <stdint.h>

static __device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const uint16_t *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

static __device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const uint16_t *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

/* d += a b; a: 16 x 16, b: 16 x 8. */
static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same for integers of 8 bits; a: 16 x 32, b: 32 x 8. Of the words of a row and of a column,
 * lane l has the first at 4 (l % 4) and the second 16 further. */
static __device__ __forceinline__ void multiply_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* a without signs. */
static __device__ __forceinline__ void multiply_u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two floats rounded to bf16, the first in the low half. */
static __device__ __forceinline__ uint32_t round_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

/* The same; rest: what rounding left, in the same form, so that the two together hold 16 bits of
 * mantissa. */
static __device__ __forceinline__ uint32_t split_pair(float first, float second, uint32_t *rest) {
    uint32_t high = round_pair(first, second);
    first -= __uint_as_float(high << 16);
    second -= __uint_as_float(high & 0xffff0000u);
    *rest = round_pair(first, second);
    return high;
}

/* 16 bytes; both addresses are multiples of 16. */
static __device__ __forceinline__ void copy_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

/* 4 bytes; both addresses are multiples of 4. */
static __device__ __forceinline__ void copy_4(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

/* What this thread copied since the last call becomes one group. */
static __device__ __forceinline__ void close_group(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until all groups of this thread but the last `left` are there. */
template <int LEFT> static __device__ __forceinline__ void wait_groups(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

#endif
