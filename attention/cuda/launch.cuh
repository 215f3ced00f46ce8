/* SPDX-License-Identifier: Apache-2.0
 *
 * Launches of kernels that follow each other in a stream. Where the device can (compute capability
 * 9), the next kernel's blocks come up while the last ones of the kernel before still run, and wait
 * in await_previous until all that it wrote is there.
 */
#ifndef LOCI_ATTENTION_CUDA_LAUNCH_CUH
#define LOCI_ATTENTION_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#define USUAL_SHARED_BYTES ((size_t)48 << 10) /* more than that a kernel must ask for */

/* First in every kernel that launch_behind launches: no memory that kernels write is touched
 * before. */
static __device__ __forceinline__ void await_previous(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The same where blocks of the next kernel, before they wait, read what the kernel before wrote. */
static __device__ __forceinline__ void await_previous_first(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static inline bool can_overlap(void) {
    static int major; /* the same for every thread that asks */
    int device = 0;
    if (major == 0 &&
        (cudaGetDevice(&device) != cudaSuccess ||
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess))
        return false;
    return major == 9; /* later ones run code for older devices, which does not wait */
}

/* overlaps: else it begins when all before it has ended, as it must where the stream waits for an
 * event of another. */
template <typename... PARAMS, typename... ARGS>
static inline cudaError_t launch_where(bool overlaps, cudaStream_t stream,
                                       void (*kernel)(PARAMS...), dim3 grid, uint32_t threads,
                                       size_t bytes, const ARGS &...args) {
    if (bytes > USUAL_SHARED_BYTES) {
        cudaError_t result =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (result != cudaSuccess) return result;
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlaps && can_overlap() ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... PARAMS, typename... ARGS>
static inline cudaError_t launch_behind(cudaStream_t stream, void (*kernel)(PARAMS...), dim3 grid,
                                        uint32_t threads, size_t bytes, const ARGS &...args) {
    return launch_where(true, stream, kernel, grid, threads, bytes, args...);
}

#endif
