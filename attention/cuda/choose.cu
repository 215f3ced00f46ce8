/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, second half: the candidates' shares of the attention, the best of
 * them until those left hold less than 1 - top_p, and, of one row, a list of these. Shares become
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

#define STEP_LIST LOCI_CUDA_STEP_LIST

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

#define CUT_ALONE 16384u /* shares that one block goes through by itself */

/* The shares of the cut's step, which all blocks of the hr look for, each in its part; true in the
 * last block, with all that were found. */
static __device__ bool list_step(const loci_cuda_choice &c, radix_memory *memory, mass_t target,
                                 mass_t most, step_list &steps) {
    __shared__ uint32_t place;
    const radix_cut none = {0, 0, 0, 0, 0};
    find_bucket(memory, none, target, most);
    uint32_t step = memory->found, each = (steps.n + gridDim.y - 1) / gridDim.y;
    uint32_t begin = blockIdx.y * each, left = begin < steps.n ? steps.n - begin : 0;
    uint32_t *count = c.step_listed + 2 * blockIdx.x;
    float *all = c.step_list + (size_t)blockIdx.x * STEP_LIST;
    sweep(steps.share + begin, left < each ? left : each, [&](float x) {
        if (__float_as_uint(x) >> RADIX_SHARES != step) return;
        uint32_t at = atomicAdd(steps.listed, 1u);
        if (at < STEP_LIST) steps.list[at] = x;
    });
    __syncthreads();
    uint32_t own = *steps.listed;
    if (threadIdx.x == 0) place = atomicAdd(&count[0], own);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < own && i < STEP_LIST && place + i < STEP_LIST;
         i += RADIX_THREADS)
        all[place + i] = steps.list[i];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) place = atomicAdd(&count[1], 1u);
    __syncthreads();
    if (place + 1 < gridDim.y) return false;
    __threadfence();
    own = __ldcg(&count[0]);
    for (uint32_t i = threadIdx.x; i < own && i < STEP_LIST; i += RADIX_THREADS)
        steps.list[i] = __ldcg(&all[i]);
    steps.filled = own <= STEP_LIST;
    if (threadIdx.x == 0) *steps.listed = steps.filled ? own : 0; /* 0: it reads all of them */
    __syncthreads();
    return true;
}

/* --- what is selected ------------------------------------------------------------------ */

#define CHOOSER_THREADS 256u
#define CHOOSER_EACH 8u    /* candidates of a lane whose loads are under way together */
#define CHOOSER_PART 2048u /* a block more for so many places */

/* What all blocks of the head before this one have, which tell it each other: as blocks come up in
 * their order, those before run or have run. */
static __device__ __forceinline__ uint32_t count_before(uint32_t *told, uint32_t own) {
    uint32_t sum = 0, all;
    if (threadIdx.x == 0) *(volatile uint32_t *)&told[blockIdx.x] = own + 1;
    for (uint32_t b = threadIdx.x; b < blockIdx.x; b += CHOOSER_THREADS) {
        uint32_t count;
        do count = *(volatile uint32_t *)&told[b];
        while (count == 0);
        sum += count - 1;
    }
    (void)sum_before<CHOOSER_THREADS>(sum, &all);
    return all;
}

/* Candidates of a warp whose loads are under way together. */
struct chooser_lot {
    float share[CHOOSER_EACH];
    loci_cuda_chosen entry[CHOOSER_EACH];
};

static __device__ __forceinline__ void load_lot(chooser_lot &lot, const loci_cuda_choice &c,
                                                uint32_t h, uint32_t begin, uint32_t end) {
    const size_t at = (size_t)h * c.room;
#pragma unroll
    for (uint32_t j = 0; j < CHOOSER_EACH; j++) {
        uint32_t i = begin + j * 32 + threadIdx.x % 32;
        if (i >= end) continue;
        lot.share[j] = __ldcg(&c.share[at + i]);
        lot.entry[j] = {__ldcg(&c.slots[at + i]), __ldcg(&c.segment[at + i])};
    }
}

/* Which of candidates [begin + 32 j, begin + 32 j + 32) are selected, up to `end`. */
static __device__ __forceinline__ uint32_t chosen_bits(const chooser_lot &lot,
                                                       const loci_cuda_cut &cut, uint32_t j,
                                                       uint32_t begin, uint32_t end) {
    uint32_t i = begin + j * 32 + threadIdx.x % 32;
    return __ballot_sync(FULL_WARP, i < end && is_chosen(cut, lot.share[j], i));
}

/* Of `blocks` for a head, one; a warp has a part of its candidates. cut_of(): called once the first
 * ones are on their way. */
template <uint32_t THREADS, typename CUT_OF>
static __device__ __forceinline__ void list_chosen(const loci_cuda_choice &c, uint32_t h,
                                                   uint32_t block, uint32_t blocks, CUT_OF cut_of) {
    const uint32_t step = CHOOSER_EACH * 32;
    uint32_t n = __ldcg(&c.count[h]), lane = threadIdx.x % 32, before = 0;
    uint32_t warps = blocks * (THREADS / 32), each = (n + warps - 1) / warps;
    uint32_t first = (block * THREADS + threadIdx.x) / 32 * each;
    uint32_t end = first + each < n ? first + each : n, own = 0, all;
    chooser_lot lot;
    load_lot(lot, c, h, first, end);
    const loci_cuda_cut cut = cut_of();
    for (uint32_t begin = first; begin < end; begin += step) {
        if (begin != first) load_lot(lot, c, h, begin, end);
#pragma unroll
        for (uint32_t j = 0; j < CHOOSER_EACH; j++)
            own += (uint32_t)__popc(chosen_bits(lot, cut, j, begin, end));
    }
    uint32_t place = sum_before<THREADS>(lane == 0 ? own : 0, &all);
    if (blocks > 1) before = count_before(c.chosen_told + h * LOCI_CUDA_CHOOSERS, all);
    if (block + 1 == blocks && threadIdx.x == 0) c.chosen_count[h] = before + all;
    place = before + __shfl_sync(FULL_WARP, place, 0);
    loci_cuda_chosen *to = c.chosen + (size_t)h * c.room;
    for (uint32_t begin = first; begin < end; begin += step) {
        if (each > step) load_lot(lot, c, h, begin, end);
#pragma unroll
        for (uint32_t j = 0; j < CHOOSER_EACH; j++) {
            uint32_t bits = chosen_bits(lot, cut, j, begin, end);
            if (bits >> lane & 1) to[place + __popc(bits & ((1u << lane) - 1))] = lot.entry[j];
            place += (uint32_t)__popc(bits);
        }
    }
}

/* Comes up once the shares are there (k_cut), and reads them while the cut is looked for. */
static __global__ void __launch_bounds__(CHOOSER_THREADS) k_list_chosen(const loci_cuda_choice c) {
    list_chosen<CHOOSER_THREADS>(c, blockIdx.y, blockIdx.x, gridDim.x, [&]() {
        await_previous();
        uint2 cut = __ldcg((const uint2 *)&c.cut[blockIdx.y]);
        return loci_cuda_cut{cut.x, cut.y};
    });
}

/* --- the cut ---------------------------------------------------------------------------- */

/* gridDim.y blocks for each hr; where all tokens are few, they list what is selected. */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_cut(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    __shared__ float list[STEP_LIST];
    radix_memory *memory = (radix_memory *)shared;
    await_previous_first();
    step_list steps = {c.share + (size_t)blockIdx.x * c.room, c.count[blockIdx.x], &memory->listed,
                       list, false};
    if (blockIdx.y > 0 && steps.n <= CUT_ALONE) return;
    if (threadIdx.x == 0) memory->listed = 0;
    mass_t total = load_steps(c, memory);
    mass_t slack = (mass_t)((1.0 - (double)c.top_p) * SHARE_UNIT);
    mass_t target = total > slack ? total - slack : 0, most = c.budget ? c.budget : ~(mass_t)0;
    if (gridDim.y > 1 && steps.n > CUT_ALONE && !list_step(c, memory, target, most, steps)) return;
    radix_cut cut = radix_select<RADIX_SHARES>(memory, target, most, true, steps);
    __syncthreads();
    uint32_t ties = 0xffffffffu;
    if (cut.ties < cut.equal) ties = place_of_ties(memory, cut, steps.share, steps.n);
    const loci_cuda_cut found = {cut.key, ties};
    if (threadIdx.x == 0) c.cut[blockIdx.x] = found;
    if (c.chosen && c.room <= CUT_ALONE)
        list_chosen<RADIX_THREADS>(c, blockIdx.x, 0, 1, [&]() { return found; });
}

#define SPREAD 128u /* blocks of a row and KV head where a thread has a candidate */

extern "C" cudaError_t loci_cuda_k_choose_tokens(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t rows = look->kv_heads * look->rows;
    cudaError_t result = launch_behind(stream, k_shares, dim3(SPREAD, rows), 256,
                                       (look->group + 1) / 2 * sizeof(float4), *look, *choice);
    if (result != cudaSuccess) return result;
    bool alone = !choice->step_list || choice->room <= CUT_ALONE;
    result = launch_behind(stream, k_cut, dim3(rows, alone ? 1 : LOCI_CUDA_CUT_BLOCKS),
                           RADIX_THREADS, sizeof(radix_memory), *look, *choice);
    if (result != cudaSuccess || !choice->chosen || choice->room <= CUT_ALONE) return result;
    uint64_t blocks = (choice->room + CHOOSER_PART - 1) / CHOOSER_PART;
    dim3 grid(blocks < LOCI_CUDA_CHOOSERS ? (uint32_t)blocks : LOCI_CUDA_CHOOSERS, look->kv_heads);
    return launch_behind(stream, k_list_chosen, grid, CHOOSER_THREADS, 0, *choice);
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
