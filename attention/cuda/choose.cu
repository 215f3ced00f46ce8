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

/* Of each of the row's vectors what its shares are relative to: total[2 g] the greatest score,
 * total[2 g + 1] 1 / (the sum of exp(score - that) times the heads of the group). */
static __device__ void merge_totals(const loci_cuda_look &look, const loci_cuda_choice &c,
                                    uint32_t hr, float *total) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t g = warp; g < look.group; g += blockDim.x / 32) {
        size_t v = (size_t)hr * look.group + g;
        const float *from = c.totals + 2 * v * c.slices;
        float steady = look.steady[v], top = steady, sum = 0.0f;
        for (uint32_t i = lane; i < c.slices; i += 32) top = fmaxf(top, from[2 * i]);
        top = warp_max(top);
        float base = top > -INFINITY ? top : 0.0f;
        for (uint32_t i = lane; i < c.slices; i += 32)
            sum += from[2 * i + 1] * expf(from[2 * i] - base);
        sum = warp_sum(sum) + expf(steady - base);
        if (lane != 0) continue;
        total[2 * g] = top;
        total[2 * g + 1] = top > -INFINITY ? 1.0f / (sum * (float)look.group) : 0.0f;
    }
    __syncthreads();
}

/* share[i] = mean over heads of exp(score - log of all mass), and the masses of all steps. */
static __global__ void k_shares(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    /* Of the block: few steps hold most candidates, and all blocks would add to the same ones. */
    __shared__ mass_t own_mass[LOCI_CUDA_STEPS];
    __shared__ uint32_t own_count[LOCI_CUDA_STEPS];
    float *total = (float *)shared;
    for (uint32_t i = threadIdx.x; i < LOCI_CUDA_STEPS; i += blockDim.x) {
        own_mass[i] = 0;
        own_count[i] = 0;
    }
    await_previous();
    const float *score = c.score + (size_t)blockIdx.y * look.group * c.room;
    unsigned long long *mass = c.step_mass + (size_t)blockIdx.y * LOCI_CUDA_STEPS;
    uint32_t *count = c.step_count + (size_t)blockIdx.y * LOCI_CUDA_STEPS;
    uint32_t n = c.count[blockIdx.y];
    if (blockIdx.x * blockDim.x >= n) return;
    merge_totals(look, c, blockIdx.y, total);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        float share = 0.0f;
        for (uint32_t first = 0; first < look.group; first += LOCI_CUDA_LOT) {
            float x[LOCI_CUDA_LOT]; /* all under way at once */
#pragma unroll
            for (uint32_t g = 0; g < LOCI_CUDA_LOT; g++)
                x[g] = first + g < look.group ? score[(first + g) * c.room + i] : -INFINITY;
#pragma unroll
            for (uint32_t g = 0; g < LOCI_CUDA_LOT; g++) {
                const float *of = total + 2 * (first + g);
                if (first + g < look.group && of[0] > -INFINITY)
                    share += expf(x[g] - of[0]) * of[1];
            }
        }
        c.share[(size_t)blockIdx.y * c.room + i] = share;
        if (!(share >= 0.0f)) continue;
        uint32_t step = __float_as_uint(share) >> RADIX_SHARES;
        if (step >= LOCI_CUDA_STEPS) step = LOCI_CUDA_STEPS - 1;
        add_mass(&own_mass[step], mass_of(share));
        if (c.budget) atomicAdd(&own_count[step], 1u);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < LOCI_CUDA_STEPS; i += blockDim.x) {
        if (own_mass[i]) atomicAdd(&mass[i], own_mass[i]);
        if (own_count[i]) atomicAdd(&count[i], own_count[i]);
    }
}

/* Brings the masses of all steps to `memory`; every thread gets their sum. */
static __device__ mass_t load_steps(const loci_cuda_choice &c, radix_memory *memory) {
    static_assert(LOCI_CUDA_STEPS == RADIX_BUCKETS, "steps are the first buckets of the cut");
    mass_t own = 0;
    uint32_t unused = 0;
    for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS; i += RADIX_THREADS) {
        memory->mass[i] = c.step_mass[(size_t)blockIdx.x * LOCI_CUDA_STEPS + i];
        memory->count[i] = c.step_count[(size_t)blockIdx.x * LOCI_CUDA_STEPS + i];
        own += memory->mass[i];
    }
    scan_block(memory, &own, &unused);
    if (threadIdx.x == RADIX_THREADS - 1) memory->found_mass = own;
    __syncthreads();
    mass_t total = memory->found_mass;
    __syncthreads();
    return total;
}

/* The place in the list behind the last of those that equal the cut and are taken. */
static __device__ uint32_t place_of_ties(radix_memory *memory, const radix_cut &cut,
                                         const float *share, uint32_t n) {
    uint32_t passed = 0;
    if (threadIdx.x == 0) memory->found = 0;
    for (uint32_t begin = 0; begin < n && passed < cut.ties; begin += RADIX_THREADS) {
        uint32_t i = begin + threadIdx.x;
        bool equal = i < n && __float_as_uint(share[i]) == cut.key;
        uint32_t place = equal ? 1 : 0;
        mass_t none = 0;
        scan_block(memory, &none, &place);
        if (equal && passed + place == cut.ties) memory->found = i + 1;
        passed += (uint32_t)__syncthreads_count(equal);
    }
    __syncthreads();
    return memory->found;
}

#define STEP_LIST 4096u /* shares of one step that stand in shared memory */

/* The shares among which the cut is found: all of them, then those of its step. */
struct step_list {
    const float *share;
    uint32_t n, *listed; /* listed: how many, more than STEP_LIST if they do not fit */
    float *list;
    bool filled;

    template <typename ADD> __device__ __forceinline__ void operator()(ADD add) {
        if (filled && *listed <= STEP_LIST) {
            for (uint32_t i = threadIdx.x; i < *listed; i += RADIX_THREADS)
                (void)add(__float_as_uint(list[i]), mass_of(list[i]));
            return;
        }
        sweep(share, n, [&](float x) {
            if (!add(__float_as_uint(x), mass_of(x)) || filled) return;
            uint32_t at = atomicAdd(listed, 1u);
            if (at < STEP_LIST) list[at] = x;
        });
        filled = true; /* a barrier follows */
    }
};

/* One block for each hr. */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_cut(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    __shared__ float list[STEP_LIST];
    radix_memory *memory = (radix_memory *)shared;
    await_previous();
    step_list steps = {c.share + (size_t)blockIdx.x * c.room, c.count[blockIdx.x], &memory->listed,
                       list, false};
    if (threadIdx.x == 0) memory->listed = 0;
    mass_t total = load_steps(c, memory);
    mass_t slack = (mass_t)((1.0 - (double)c.top_p) * SHARE_UNIT);
    mass_t target = total > slack ? total - slack : 0, most = c.budget ? c.budget : ~(mass_t)0;
    radix_cut cut = radix_select<RADIX_SHARES>(memory, target, most, true, steps);
    __syncthreads();
    uint32_t ties = 0xffffffffu;
    if (cut.ties < cut.equal) ties = place_of_ties(memory, cut, steps.share, steps.n);
    if (threadIdx.x == 0) c.cut[blockIdx.x] = loci_cuda_cut{cut.key, ties};
}

#define SPREAD 128u /* blocks of a row and KV head where a thread has a candidate */

extern "C" cudaError_t loci_cuda_k_choose_tokens(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t rows = look->kv_heads * look->rows;
    cudaError_t result = launch_behind(stream, k_shares, dim3(SPREAD, rows), 256,
                                       (look->group + 1) / 2 * sizeof(float4), *look, *choice);
    if (result != cudaSuccess) return result;
    return launch_behind(stream, k_cut, rows, RADIX_THREADS, sizeof(radix_memory), *look, *choice);
}

static __global__ void k_mask_chosen(const loci_cuda_look look, const loci_cuda_choice c) {
    const loci_cuda_cut cut = c.cut[blockIdx.y];
    const uint32_t *slots = c.slots + (size_t)blockIdx.y * c.room;
    const float *share = c.share + (size_t)blockIdx.y * c.room;
    uint32_t *words = look.token_mask + (size_t)blockIdx.y * look.words;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < c.count[blockIdx.y];
         i += gridDim.x * blockDim.x)
        if (is_chosen(cut, share[i], i)) atomicOr(&words[slots[i] / 32], 1u << (slots[i] % 32));
}

extern "C" cudaError_t loci_cuda_k_mask_chosen(cudaStream_t stream, const loci_cuda_look *look,
                                               const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    dim3 spread(SPREAD, look->kv_heads * look->rows);
    k_mask_chosen<<<spread, 256, 0, stream>>>(*look, *choice);
    return cudaGetLastError();
}
