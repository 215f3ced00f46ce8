/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, first half: the candidates of each row as a list in the order of
 * their places, and their estimates from the 4-bit codes. LANES threads have one candidate, whose
 * record (dim / 2 + 8 bytes) they read once for the row's vectors.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

/* A block for each run of words: its candidates. */
static __global__ void __launch_bounds__(LOCI_CUDA_RUN)
    k_count_words(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ uint32_t warps[WARPS_MAX];
    uint32_t w = blockIdx.x * LOCI_CUDA_RUN + threadIdx.x, lane = threadIdx.x % 32;
    uint32_t own = w < look.words ? __popc(c.candidates[(size_t)blockIdx.y * look.words + w]) : 0;
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(FULL_WARP, own, offset);
    if (lane == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    own = warps[lane];
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(FULL_WARP, own, offset);
    if (lane == 0) c.run_count[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = own;
}

extern "C" cudaError_t loci_cuda_k_count_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                                    const loci_cuda_choice *choice) {
    dim3 grid(loci_cuda_runs(look->words), look->kv_heads * look->rows);
    k_count_words<<<grid, LOCI_CUDA_RUN, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}

/* A block for each run of words, a thread for a word: candidates before it, and its own. */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_list(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t w = blockIdx.x * LOCI_CUDA_RUN + threadIdx.x;
    const uint32_t *runs = c.run_count + (size_t)blockIdx.y * gridDim.x;
    size_t at = (size_t)blockIdx.y * look.words + w;
    uint32_t bits = w < look.words ? c.candidates[at] : 0, sum = __popc(bits), before = 0;
    mass_t none = 0;
    for (uint32_t r = 0; r < blockIdx.x; r++) before += runs[r];
    scan_block(memory, &none, &sum);
    if (threadIdx.x == RADIX_THREADS - 1 && blockIdx.x == gridDim.x - 1)
        c.count[blockIdx.y] = before + sum;
    before += sum - __popc(bits);
    if (w < look.words) c.rank[at] = before;
    uint32_t *to = c.slots + (size_t)blockIdx.y * c.room + before;
    for (; bits; bits &= bits - 1) *to++ = w * 32 + __ffs((int)bits) - 1;
}

#define LANES 4u                         /* of one candidate */
#define CODE_WORDS (MAX_DIM / 8 / LANES) /* of a lane */

/* A code's product with a folded query, whole in every lane. */
static __device__ __forceinline__ int code_dot(const uint32_t *code, const int *q, uint32_t words) {
    int dot = 0;
#pragma unroll
    for (uint32_t j = 0; j < CODE_WORDS; j++) {
        uint32_t i = threadIdx.x % LANES + j * LANES;
        if (i >= words) break;
        uint32_t even = code[j] & 0x0f0f0f0fu, odd = code[j] >> 4 & 0x0f0f0f0fu;
        dot = __dp4a((int)__byte_perm(even, odd, 0x5140), q[2 * i], dot);
        dot = __dp4a((int)__byte_perm(even, odd, 0x7362), q[2 * i + 1], dot);
    }
    dot += __shfl_xor_sync(FULL_WARP, dot, 1);
    return dot + __shfl_xor_sync(FULL_WARP, dot, 2);
}

static __global__ void k_score_codes(const loci_cuda_look look, const loci_cuda_choice c) {
    uint32_t h = blockIdx.y / look.rows, row = blockIdx.y % look.rows, n = c.count[blockIdx.y];
    uint32_t lane = threadIdx.x % LANES, words = look.dim / 8;
    const uint32_t *slots = c.slots + (size_t)blockIdx.y * c.room;
    float *score = c.score + (size_t)blockIdx.y * look.group * c.room;
    uint32_t step = gridDim.x * blockDim.x / LANES, per_warp = 32 / LANES;
    uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    /* Whole warps go on: they exchange sums. */
    for (uint32_t i = first; i - first % per_warp < n; i += step) {
        uint32_t place = slots[i < n ? i : n - 1];
        size_t index = (size_t)extent_at(look, h, place / 32) * look.kv_heads + h;
        const loci_cuda_pair *pair = &look.pairs[index];
        size_t record = (size_t)(place - pair->word_base * 32) * pair->record_stride;
        const uint32_t *from = (const uint32_t *)(pair->records + record);
        uint32_t code[CODE_WORDS];
#pragma unroll
        for (uint32_t j = 0; j < CODE_WORDS; j++)
            code[j] = lane + j * LANES < words ? from[lane + j * LANES] : 0;
        for (uint32_t g = 0; g < look.group; g++) {
            size_t at = index * look.vectors + row * look.group + g;
            int dot = code_dot(code, (const int *)(c.folded + at * look.dim), words);
            if (lane != g % LANES || i >= n) continue;
            float centred = (float)dot - 7.5f * (float)c.folded_sum[at];
            score[g * c.room + i] = look.mean_terms[at] + c.folded_scale[at] * centred;
        }
    }
}

extern "C" cudaError_t loci_cuda_k_codes(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 runs(loci_cuda_runs(look->words), look->kv_heads * look->rows);
    k_list<<<runs, RADIX_THREADS, sizeof(radix_memory), stream>>>(*look, *choice);
    cudaError_t result =
        loci_cuda_k_fold(stream, look, choice->folded, choice->folded_scale, choice->folded_sum);
    if (result != cudaSuccess) return result;
    dim3 grid(256, look->kv_heads * look->rows);
    k_score_codes<<<grid, 256, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}
