/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, second half: the candidates' shares of the attention, and the best
 * of them until those left hold less than 1 - top_p. One block a row and KV head. Shares become
 * integers of 2^-52 where they are added up, so that the choice is the same in every run.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

#define SHARE_UNIT 4503599627370496.0 /* 2^52 */

static __device__ __forceinline__ mass_t mass_of(float share) {
    return (mass_t)((double)share * SHARE_UNIT);
}

/* share[i] = mean over heads of exp(score - log of all mass). */
static __device__ void share_out(const loci_cuda_look &look, const loci_cuda_choice &c, uint32_t n,
                                 float *share, float *buffer) {
    uint32_t h = blockIdx.x / look.rows, row = blockIdx.x % look.rows;
    for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS) share[i] = 0.0f;
    for (uint32_t g = 0; g < look.group; g++) {
        const float *score = c.score + ((size_t)blockIdx.x * look.group + g) * c.room;
        float steady = look.steady[(size_t)h * look.vectors + row * look.group + g];
        float max = -INFINITY, sum = 0.0f;
        for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS) max = fmaxf(max, score[i]);
        max = fmaxf(block_max(max, buffer), steady);
        if (max == -INFINITY) continue;
        for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS) sum += expf(score[i] - max);
        float total = block_sum(sum, buffer) + expf(steady - max);
        float factor = 1.0f / (total * (float)look.group);
        for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS)
            share[i] += expf(score[i] - max) * factor;
    }
}

/* The sum of the shares as integers; every thread gets it. */
static __device__ mass_t sum_shares(radix_memory *memory, const float *share, uint32_t n) {
    mass_t own = 0;
    uint32_t unused = 0;
    for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS) own += mass_of(share[i]);
    scan_block(memory, &own, &unused);
    if (threadIdx.x == RADIX_THREADS - 1) memory->found_mass = own;
    __syncthreads();
    mass_t total = memory->found_mass;
    __syncthreads();
    return total;
}

/* Sets the bits of what the cut takes, of equal ones the first. */
static __device__ void mark(const loci_cuda_look &look, const loci_cuda_choice &c,
                            radix_memory *memory, const radix_cut &cut, const float *share,
                            uint32_t n) {
    const uint32_t *slots = c.slots + (size_t)blockIdx.x * c.room;
    uint32_t *words = look.token_mask + (size_t)blockIdx.x * look.words, passed = 0;
    for (uint32_t begin = 0; begin < n; begin += RADIX_THREADS) {
        uint32_t i = begin + threadIdx.x, key = i < n ? __float_as_uint(share[i]) : 0;
        bool equal = i < n && key == cut.key, taken = i < n && key > cut.key;
        uint32_t place = equal ? 1 : 0;
        mass_t none = 0;
        scan_block(memory, &none, &place);
        taken = taken || (equal && passed + place <= cut.ties);
        if (taken) atomicOr(&words[slots[i] / 32], 1u << (slots[i] % 32));
        passed += (uint32_t)__syncthreads_count(equal);
    }
}

static __global__ void __launch_bounds__(RADIX_THREADS)
    k_choose(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    __shared__ float buffer[WARPS_MAX];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t n = c.count[blockIdx.x];
    float *share = c.share + (size_t)blockIdx.x * c.room;
    share_out(look, c, n, share, buffer);
    mass_t total = sum_shares(memory, share, n);
    mass_t slack = (mass_t)((1.0 - (double)c.top_p) * SHARE_UNIT);
    mass_t target = total > slack ? total - slack : 0;
    radix_cut cut = radix_select(memory, target, c.budget ? c.budget : ~(mass_t)0, [&](auto add) {
        for (uint32_t i = threadIdx.x; i < n; i += RADIX_THREADS)
            add(__float_as_uint(share[i]), mass_of(share[i]));
    });
    __syncthreads();
    mark(look, c, memory, cut, share, n);
}

extern "C" cudaError_t loci_cuda_k_choose_tokens(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    k_choose<<<look->kv_heads * look->rows, RADIX_THREADS, sizeof(radix_memory), stream>>>(*look,
                                                                                           *choice);
    return cudaGetLastError();
}

/* --- figures --------------------------------------------------------------------------- */

/* One block for each pair: root nodes, blocks of kept roots (read twice), records of candidates. */
static __global__ void k_choice_stats(const loci_cuda_look look, const loci_cuda_choice c,
                                      loci_cuda_stats *stats) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    unsigned long long blocks = 0, records = 0, candidates = 0, tail = 0;
    for (uint32_t r = threadIdx.x; r < pair->roots; r += blockDim.x) {
        bool kept = false;
        for (uint32_t row = 0; row < look.rows; row++)
            kept = kept || c.root_kept[head->root_at * look.rows + (size_t)row * head->roots +
                                       pair->root_base + r];
        uint32_t groups = (pair->root_table[r].tokens + 31) / 32;
        tail += 2 * look.dim;
        if (!kept) continue;
        blocks += pair->root_table[r].leaves * 4 + groups * (look.dim / 4) * 16;
        tail += (unsigned long long)pair->root_table[r].leaves * (pair->node_stride + 2 * look.dim);
    }
    for (uint32_t w = threadIdx.x; w < pair_words(pair); w += blockDim.x) {
        uint32_t all = 0;
        for (uint32_t row = 0; row < look.rows; row++) {
            uint32_t bits = c.candidates[mask_at(look, pair, row) + w];
            candidates += __popc(bits);
            all |= bits;
        }
        records += __popc(all);
    }
    atomicAdd(&stats->leaf_bytes, blocks);
    atomicAdd(&stats->code_bytes, records * pair->record_stride);
    atomicAdd(&stats->candidate_tokens, candidates);
    if (c.tail) atomicAdd(&stats->tail_bytes, tail);
    if (threadIdx.x == 0)
        atomicAdd(&stats->root_bytes, (unsigned long long)pair->roots * pair->node_stride);
}

extern "C" cudaError_t loci_cuda_k_choice_stats(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_choice *choice,
                                                loci_cuda_stats *stats) {
    if (look->extents == 0) return cudaSuccess;
    k_choice_stats<<<look->extents * look->kv_heads, 256, 0, stream>>>(*look, *choice, stats);
    return cudaGetLastError();
}
