/* SPDX-License-Identifier: Apache-2.0
 *
 * Stable sorting by radix: CUB's, which comes with the CUDA toolkit.
 */
#include <cub/device/device_radix_sort.cuh>

#include "attention/cuda/kmeans.h"

extern "C" cudaError_t loci_cuda_k_sort(cudaStream_t stream, void *temp, size_t *temp_bytes,
                                        const uint32_t *keys, uint32_t *keys_out,
                                        const uint32_t *values, uint32_t *values_out, uint32_t n,
                                        uint32_t bits) {
    return cub::DeviceRadixSort::SortPairs(temp, *temp_bytes, keys, keys_out, values, values_out, n,
                                           0, (int)bits, stream);
}
