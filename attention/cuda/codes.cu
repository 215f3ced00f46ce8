/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, first half: the candidates of each row as a list in the order of
 * their places, and their estimates from the 4-bit codes. A thread has one candidate, whose record
 * (dim / 2 + 8 bytes) it reads once for the row's vectors.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

/* One block for each hr: candidates before each word, and all. */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_rank_words(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    const uint32_t *words = c.candidates + (size_t)blockIdx.x * look.words;
    uint32_t *rank = c.rank + (size_t)blockIdx.x * look.words, before = 0;
    for (uint32_t begin = 0; begin < look.words; begin += RADIX_THREADS) {
        uint32_t w = begin + threadIdx.x, own = w < look.words ? __popc(words[w]) : 0, sum = own;
        mass_t none = 0;
        scan_block(memory, &none, &sum);
        if (w < look.words) rank[w] = before + sum - own;
        if (threadIdx.x == RADIX_THREADS - 1) memory->found = sum;
        __syncthreads();
        before += memory->found;
        __syncthreads();
    }
    if (threadIdx.x == 0) c.count[blockIdx.x] = before;
}

extern "C" cudaError_t loci_cuda_k_rank_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                                   const loci_cuda_choice *choice) {
    k_rank_words<<<look->kv_heads * look->rows, RADIX_THREADS, sizeof(radix_memory), stream>>>(
        *look, *choice);
    return cudaGetLastError();
}

static __global__ void k_list(const loci_cuda_look look, const loci_cuda_choice c) {
    uint32_t w = blockIdx.x * blockDim.x + threadIdx.x;
    if (w >= look.words) return;
    size_t at = (size_t)blockIdx.y * look.words + w;
    uint32_t *to = c.slots + (size_t)blockIdx.y * c.room + c.rank[at];
    for (uint32_t bits = c.candidates[at]; bits; bits &= bits - 1)
        *to++ = w * 32 + __ffs((int)bits) - 1;
}

static __device__ __forceinline__ float
code_score(const loci_cuda_look &look, const loci_cuda_choice &c, size_t at, const uint32_t *code) {
    const int *q = (const int *)(c.folded + at * look.dim);
    int dot = 0;
    for (uint32_t i = 0; i < look.dim / 8; i++) {
        uint32_t eight = code[i], even = eight & 0x0f0f0f0fu, odd = eight >> 4 & 0x0f0f0f0fu;
        dot = __dp4a((int)__byte_perm(even, odd, 0x5140), q[2 * i], dot);
        dot = __dp4a((int)__byte_perm(even, odd, 0x7362), q[2 * i + 1], dot);
    }
    float centred = (float)dot - 7.5f * (float)c.folded_sum[at];
    return look.mean_terms[at] + c.folded_scale[at] * centred;
}

static __global__ void k_score_codes(const loci_cuda_look look, const loci_cuda_choice c) {
    uint32_t h = blockIdx.y / look.rows, row = blockIdx.y % look.rows, n = c.count[blockIdx.y];
    const uint32_t *slots = c.slots + (size_t)blockIdx.y * c.room;
    float *score = c.score + (size_t)blockIdx.y * look.group * c.room;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        uint32_t e = extent_at(look, h, slots[i] / 32);
        size_t index = (size_t)e * look.kv_heads + h;
        const loci_cuda_pair *pair = &look.pairs[index];
        uint32_t slot = slots[i] - pair->word_base * 32;
        const uint32_t *code =
            (const uint32_t *)(pair->records + (size_t)slot * pair->record_stride);
        for (uint32_t g = 0; g < look.group; g++)
            score[g * c.room + i] =
                code_score(look, c, index * look.vectors + row * look.group + g, code);
    }
}

extern "C" cudaError_t loci_cuda_k_codes(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 words((look->words + 255) / 256, look->kv_heads * look->rows);
    k_list<<<words, 256, 0, stream>>>(*look, *choice);
    cudaError_t result =
        loci_cuda_k_fold(stream, look, choice->folded, choice->folded_scale, choice->folded_sum);
    if (result != cudaSuccess) return result;
    dim3 grid(64, look->kv_heads * look->rows);
    k_score_codes<<<grid, 128, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}
