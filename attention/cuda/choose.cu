/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, second half: the candidates' shares of the attention, and the best
 * of them until those left hold less than 1 - top_p. Shares become
 * integers of 2^-52 where they are added up, so that the choice is the same in every run.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"

#define SHARE_UNIT 4503599627370496.0 /* 2^52 */

static __device__ __forceinline__ mass_t mass_of(float share) {
    return (mass_t)((double)share * SHARE_UNIT);
}

/* One block for each (KV head, vector): its greatest score, and 1 / (its sum of exp(score - that)
 * times the heads of the group). */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_totals(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ float buffer[WARPS_MAX];
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    size_t hr = (size_t)h * look.rows + v / look.group;
    const float *score = c.score + (hr * look.group + v % look.group) * c.room;
    uint32_t n = c.count[hr];
    float steady = look.steady[blockIdx.x], max = -INFINITY, sum = 0.0f;
    sweep(score, n, [&](float x) { max = fmaxf(max, x); });
    max = fmaxf(block_max(max, buffer), steady);
    if (max > -INFINITY) {
        sweep(score, n, [&](float x) { sum += expf(x - max); });
        sum = block_sum(sum, buffer) + expf(steady - max);
    }
    if (threadIdx.x != 0) return;
    c.total[2 * blockIdx.x] = max;
    c.total[2 * blockIdx.x + 1] = max > -INFINITY ? 1.0f / (sum * (float)look.group) : 0.0f;
}

/* share[i] = mean over heads of exp(score - log of all mass). */
static __global__ void k_shares(const loci_cuda_look look, const loci_cuda_choice c) {
    uint32_t h = blockIdx.y / look.rows, row = blockIdx.y % look.rows;
    const float *total = c.total + 2 * ((size_t)h * look.vectors + row * look.group);
    const float *score = c.score + (size_t)blockIdx.y * look.group * c.room;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < c.count[blockIdx.y];
         i += gridDim.x * blockDim.x) {
        float share = 0.0f;
        for (uint32_t g = 0; g < look.group; g++)
            if (total[2 * g] > -INFINITY)
                share += expf(score[g * c.room + i] - total[2 * g]) * total[2 * g + 1];
        c.share[(size_t)blockIdx.y * c.room + i] = share;
    }
}

/* The sum of the shares as integers; every thread gets it. */
static __device__ mass_t sum_shares(radix_memory *memory, const float *share, uint32_t n) {
    mass_t own = 0;
    uint32_t unused = 0;
    sweep(share, n, [&](float x) { own += mass_of(x); });
    scan_block(memory, &own, &unused);
    if (threadIdx.x == RADIX_THREADS - 1) memory->found_mass = own;
    __syncthreads();
    mass_t total = memory->found_mass;
    __syncthreads();
    return total;
}

/* The first of those that equal the cut, where not all are taken. */
static __device__ void mark_ties(const loci_cuda_look &look, const loci_cuda_choice &c,
                                 radix_memory *memory, const radix_cut &cut, const float *share,
                                 uint32_t n) {
    const uint32_t *slots = c.slots + (size_t)blockIdx.x * c.room;
    uint32_t *words = look.token_mask + (size_t)blockIdx.x * look.words, passed = 0;
    for (uint32_t begin = 0; begin < n && passed < cut.ties; begin += RADIX_THREADS) {
        uint32_t i = begin + threadIdx.x;
        bool equal = i < n && __float_as_uint(share[i]) == cut.key;
        uint32_t place = equal ? 1 : 0;
        mass_t none = 0;
        scan_block(memory, &none, &place);
        if (equal && passed + place <= cut.ties)
            atomicOr(&words[slots[i] / 32], 1u << (slots[i] % 32));
        passed += (uint32_t)__syncthreads_count(equal);
    }
}

/* One block for each hr. */
static __global__ void __launch_bounds__(RADIX_THREADS)
    k_cut(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t n = c.count[blockIdx.x];
    const float *share = c.share + (size_t)blockIdx.x * c.room;
    mass_t total = sum_shares(memory, share, n);
    mass_t slack = (mass_t)((1.0 - (double)c.top_p) * SHARE_UNIT);
    mass_t target = total > slack ? total - slack : 0;
    radix_cut cut =
        radix_select<RADIX_SHARES>(memory, target, c.budget ? c.budget : ~(mass_t)0, [&](auto add) {
            sweep(share, n, [&](float x) { add(__float_as_uint(x), mass_of(x)); });
        });
    __syncthreads();
    bool whole = cut.ties >= cut.equal;
    if (threadIdx.x == 0) c.cut[blockIdx.x] = (loci_cuda_cut){cut.key, whole};
    if (!whole) mark_ties(look, c, memory, cut, share, n);
}

static __global__ void k_take(const loci_cuda_look look, const loci_cuda_choice c) {
    const loci_cuda_cut cut = c.cut[blockIdx.y];
    const uint32_t *slots = c.slots + (size_t)blockIdx.y * c.room;
    const float *share = c.share + (size_t)blockIdx.y * c.room;
    uint32_t *words = look.token_mask + (size_t)blockIdx.y * look.words;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < c.count[blockIdx.y];
         i += gridDim.x * blockDim.x) {
        uint32_t key = __float_as_uint(share[i]);
        if (key > cut.key || (cut.equal && key == cut.key))
            atomicOr(&words[slots[i] / 32], 1u << (slots[i] % 32));
    }
}

#define SPREAD 128u /* blocks of a row and KV head where a thread has a candidate */

extern "C" cudaError_t loci_cuda_k_choose_tokens(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t rows = look->kv_heads * look->rows;
    dim3 spread(SPREAD, rows);
    k_totals<<<look->kv_heads * look->vectors, RADIX_THREADS, 0, stream>>>(*look, *choice);
    k_shares<<<spread, 256, 0, stream>>>(*look, *choice);
    k_cut<<<rows, RADIX_THREADS, sizeof(radix_memory), stream>>>(*look, *choice);
    k_take<<<spread, 256, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}

/* --- figures --------------------------------------------------------------------------- */

/* gridDim.y blocks for each pair: root nodes, blocks of kept roots (read twice), records of
 * candidates. */
static __global__ void k_choice_stats(const loci_cuda_look look, const loci_cuda_choice c,
                                      loci_cuda_stats *stats) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    unsigned long long blocks = 0, records = 0, candidates = 0, tail = 0;
    for (uint32_t r = first; r < pair->roots; r += step) {
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
    for (uint32_t w = first; w < pair_words(pair); w += step) {
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
    if (first == 0)
        atomicAdd(&stats->root_bytes, (unsigned long long)pair->roots * pair->node_stride);
}

extern "C" cudaError_t loci_cuda_k_choice_stats(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_choice *choice,
                                                loci_cuda_stats *stats) {
    if (look->extents == 0) return cudaSuccess;
    k_choice_stats<<<dim3(look->extents * look->kv_heads, 16), 256, 0, stream>>>(*look, *choice,
                                                                                 stats);
    return cudaGetLastError();
}
