/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensor-core products of a warpgroup (four warps, compute capability 9.0a) with operands in shared
 * memory, and the barriers in shared memory by which warps pass stages of it to one another (PTX
 * ISA 8.0, "asynchronous warpgroup level matrix instructions" and "mbarrier").
 *
 * A matrix in shared memory stands in panels of 64 columns: a row of a panel is 128 bytes, eight
 * pieces of 16, of which piece c stands in the place of c ^ (row % 8); a panel begins at a multiple
 * of 1,024 bytes. A result of 64 rows: warp w of the group has rows 16 w and on as in mma.cuh, with
 * columns 8 n + 2 (lane % 4) and the next in elements 4 n to 4 n + 3.
 */
#ifndef LOCI_ATTENTION_CUDA_WGMMA_CUH
#define LOCI_ATTENTION_CUDA_WGMMA_CUH

#include "attention/cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

#define WARPGROUP 128u
#define PANEL 64u                  /* columns */
#define PANEL_ROW (PANEL * 2u)     /* bytes */
#define EIGHT_ROWS (8 * PANEL_ROW) /* bytes; the swizzle repeats after them */

/* Where 16 bytes of a row stand, from the panel's begin on. */
static __device__ __forceinline__ uint32_t piece_at(uint32_t row, uint32_t piece) {
    return row * PANEL_ROW + ((piece ^ (row % 8)) << 4);
}

/* What the products take for a matrix. panel: bytes from one panel to the next, where a product
 * takes more than one. */
static __device__ __forceinline__ uint64_t matrix_of(uint32_t address, uint32_t panel) {
    const uint64_t swizzled = 1ull << 62;
    return (uint64_t)((address & 0x3ffffu) >> 4) | (uint64_t)(panel >> 4) << 16 |
           (uint64_t)(EIGHT_ROWS >> 4) << 32 | swizzled;
}

#define NAMES_32                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                  \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_8(d, i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(d, i) SUMS_8(d, i), SUMS_8(d, i + 8), SUMS_8(d, i + 16), SUMS_8(d, i + 24)
#define TYPES ".f32.bf16.bf16 "
#define WHETHER_TO_ADD(number) "{\n.reg .pred add;\nsetp.ne.b32 add, " number ", 0;\n"

#if HAS_WGMMA

/* d (+)= a b^T; a: 64 rows, b: 128 rows, both of 16 columns. Runs until wait_products. */
static __device__ __forceinline__ void multiply_shared(float (&d)[64], uint64_t a, uint64_t b,
                                                       bool add) {
    asm volatile(WHETHER_TO_ADD("%66") "wgmma.mma_async.sync.aligned.m64n128k16" TYPES "{" NAMES_64
                                       "}, %64, %65, add, 1, 1, 0, 0;\n}"
                 : SUMS_32(d, 0), SUMS_32(d, 32)
                 : "l"(a), "l"(b), "r"((int)add));
}

/* d += a b; a: 64 x 16, as multiply has it; b: 16 rows of 128 or 64 columns. */
static __device__ __forceinline__ void multiply_rows(float (&d)[64], const uint32_t (&a)[4],
                                                     uint64_t b) {
    asm volatile(WHETHER_TO_ADD("%69") "wgmma.mma_async.sync.aligned.m64n128k16" TYPES "{" NAMES_64
                                       "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
                 : SUMS_32(d, 0), SUMS_32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

static __device__ __forceinline__ void multiply_rows(float (&d)[32], const uint32_t (&a)[4],
                                                     uint64_t b) {
    asm volatile(WHETHER_TO_ADD("%37") "wgmma.mma_async.sync.aligned.m64n64k16" TYPES "{" NAMES_32
                                       "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
                 : SUMS_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

/* Before products whose registers other instructions have written, and after all that follow one
 * another. */
static __device__ __forceinline__ void begin_products(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void close_products(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wait_products(void) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

/* Registers of each thread of the warpgroup from here on. */
template <int COUNT> static __device__ __forceinline__ void take_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> static __device__ __forceinline__ void give_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* --- barriers -------------------------------------------------------------------------- */

static __device__ __forceinline__ void open_barrier(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

static __device__ __forceinline__ void arrive(uint64_t *barrier) {
    asm volatile(
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

/* Arrives once all that this thread has begun to copy is there. */
static __device__ __forceinline__ void arrive_copied(uint64_t *barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

/* Until the phase of that parity has ended. */
static __device__ __forceinline__ void wait_barrier(uint64_t *barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* What threads wrote to shared memory is there for products. */
static __device__ __forceinline__ void show_products(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

#endif
