/* SPDX-License-Identifier: Apache-2.0
 *
 * Choosing the next token from a row of logits, as attention/cpu/sample.c states it: penalty, bans,
 * temperature, top-p, one draw named by (seed, step, row). Blocks look through parts of a row, and
 * one block a row makes the token of what they found. Weights become integers of 2^-40 of the best
 * one's; the nucleus and the token that the draw falls on are both found by radix selection: blocks
 * list the row by the first bits of weights, and the last one looks at those tokens alone whose
 * first bits are the wanted ones.
 */
#include "attention/cuda/launch.cuh"
#include "attention/cuda/look.cuh"
#include "attention/cuda/radix.cuh"
#include "base/rng.h"

#define UNIT 1099511627776.0 /* 2^40 */
#define PART_THREADS 256u
#define PART_EACH (LOCI_CUDA_SAMPLE_PART / PART_THREADS)
static_assert(LOCI_CUDA_SAMPLE_STEPS == RADIX_BUCKETS, "steps are the first histogram");

/* Uniform in [0, 1), 53 bits. */
static __device__ double draw(uint64_t seed, uint64_t step, uint32_t row) {
    uint64_t z[3] = {seed, step + 1, (uint64_t)row + 1}, state = 0;
    for (int i = 0; i < 3; i++) {
        state = i == 0 ? z[0] + LOCI_RNG_GAMMA : state + LOCI_RNG_GAMMA * z[i];
        state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
        state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
        state ^= state >> 31;
    }
    return (double)(state >> 11) * 0x1.0p-53;
}

/* The higher value, of equal ones the lower place. */
static __device__ __forceinline__ void take_better(float *value, uint32_t *at, float other,
                                                   uint32_t other_at) {
    if (other < *value || (other == *value && other_at >= *at)) return;
    *value = other;
    *at = other_at;
}

static __device__ void warp_best(float *value, uint32_t *at) {
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_xor_sync(FULL_WARP, *value, offset);
        uint32_t other_at = __shfl_xor_sync(FULL_WARP, *at, offset);
        take_better(value, at, other, other_at);
    }
}

/* Penalty and bans of the tokens [begin, begin + count), in shared memory. */
static __device__ void adjust(const loci_cuda_sample_args &args, const float *original,
                              uint32_t begin, uint32_t count, float *adjusted) {
    if (args.penalty > 0.0f && args.penalty != 1.0f)
        for (uint32_t i = threadIdx.x; i < args.recent_count; i += blockDim.x) {
            uint32_t at = args.recent[i] - begin;
            if (at >= count) continue;
            float logit = original[begin + at];
            adjusted[at] = logit > 0.0f ? logit / args.penalty : logit * args.penalty;
        }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < args.banned_count; i += blockDim.x)
        if (args.banned[i] - begin < count) adjusted[args.banned[i] - begin] = -INFINITY;
    __syncthreads();
}

/* The best of a part, over the block; thread 0 has it. */
static __device__ void part_best(const float *adjusted, uint32_t count, float *best,
                                 uint32_t *place) {
    __shared__ float values[PART_THREADS / 32];
    __shared__ uint32_t places[PART_THREADS / 32];
    float value = -INFINITY;
    uint32_t at = 0xffffffffu;
    for (uint32_t i = threadIdx.x; i < count; i += PART_THREADS)
        take_better(&value, &at, adjusted[i], i);
    warp_best(&value, &at);
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = value;
        places[threadIdx.x / 32] = at;
    }
    __syncthreads();
    for (uint32_t w = 1; threadIdx.x == 0 && w < PART_THREADS / 32; w++)
        take_better(&value, &at, values[w], places[w]);
    *best = value;
    *place = at;
}

static __global__ void __launch_bounds__(PART_THREADS) k_sample_parts(loci_cuda_sample_args args) {
    __shared__ float adjusted[LOCI_CUDA_SAMPLE_PART], buffer[WARPS_MAX];
    uint32_t row = blockIdx.y, begin = blockIdx.x * LOCI_CUDA_SAMPLE_PART;
    const float *original = args.logits + (size_t)row * args.vocab;
    uint32_t count = min(LOCI_CUDA_SAMPLE_PART, args.vocab - begin);
    float x[PART_EACH], max = -INFINITY, sum = 0.0f;
    loci_cuda_sample_part part;
    await_previous();
#pragma unroll
    for (uint32_t j = 0; j < PART_EACH; j++) {
        uint32_t i = threadIdx.x + j * PART_THREADS;
        x[j] = i < count ? original[begin + i] : -INFINITY;
    }
#pragma unroll
    for (uint32_t j = 0; j < PART_EACH; j++) {
        uint32_t i = threadIdx.x + j * PART_THREADS;
        if (isnan(x[j]) || x[j] == INFINITY)
            raise_fault(args.fault, isnan(x[j]) ? LOCI_CUDA_FAULT_NAN : LOCI_CUDA_FAULT_INFINITE,
                        begin + i, row);
        max = fmaxf(max, x[j]);
        if (i < count) adjusted[i] = x[j];
    }
    max = block_max(max, buffer);
#pragma unroll
    for (uint32_t j = 0; j < PART_EACH; j++) sum += max == -INFINITY ? 0.0f : expf(x[j] - max);
    sum = block_sum(sum, buffer);
    adjust(args, original, begin, count, adjusted);
    part_best(adjusted, count, &part.best, &part.place);
    if (args.temperature > 0.0f) {
        for (uint32_t i = threadIdx.x; i < count; i += PART_THREADS)
            args.adjusted[(size_t)row * args.vocab + begin + i] = adjusted[i];
        for (uint32_t i = threadIdx.x; blockIdx.x == 0 && i < RADIX_BUCKETS; i += PART_THREADS)
            args.steps[(size_t)row * RADIX_BUCKETS + i] = {};
    }
    if (threadIdx.x != 0) return;
    part.max = max;
    part.sum = sum;
    part.place += begin;
    args.parts[(size_t)row * gridDim.x + blockIdx.x] = part;
}

/* All parts of a row as one; every warp that calls it has the result. */
static __device__ loci_cuda_sample_part join_parts(const loci_cuda_sample_part *parts,
                                                   uint32_t count) {
    loci_cuda_sample_part all = {-INFINITY, 0.0f, -INFINITY, 0xffffffffu};
    for (uint32_t i = threadIdx.x % 32; i < count; i += 32) {
        all.max = fmaxf(all.max, parts[i].max);
        take_better(&all.best, &all.place, parts[i].best, parts[i].place);
    }
    all.max = warp_max(all.max);
    warp_best(&all.best, &all.place);
    for (uint32_t i = threadIdx.x % 32; i < count; i += 32)
        if (parts[i].max > -INFINITY) all.sum += parts[i].sum * expf(parts[i].max - all.max);
    all.sum = warp_sum(all.sum);
    return all;
}

static __device__ __forceinline__ float weigh(float logit, float best, float temperature) {
    return expf((logit - best) / temperature);
}

static __device__ __forceinline__ mass_t mass_of(float weight) {
    return (mass_t)((double)weight * UNIT);
}

static __device__ __forceinline__ uint32_t step_of(float weight) {
    return __float_as_uint(weight) >> RADIX_SHARES;
}

/* Adds the weights of a part to the row's steps, which have the keys' first bits. */
static __global__ void __launch_bounds__(PART_THREADS)
    k_sample_steps(loci_cuda_sample_args args, uint32_t parts) {
    __shared__ mass_t mass[RADIX_BUCKETS];
    __shared__ uint32_t count[RADIX_BUCKETS];
    uint32_t row = blockIdx.y, begin = blockIdx.x * LOCI_CUDA_SAMPLE_PART;
    uint32_t end = min(begin + LOCI_CUDA_SAMPLE_PART, args.vocab);
    const float *adjusted = args.adjusted + (size_t)row * args.vocab;
    for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS; i += PART_THREADS) mass[i] = count[i] = 0;
    __syncthreads();
    await_previous();
    float best = join_parts(args.parts + (size_t)row * parts, parts).best;
#pragma unroll 8
    for (uint32_t i = begin + threadIdx.x; i < end; i += PART_THREADS) {
        float weight = weigh(adjusted[i], best, args.temperature);
        if (!(weight > 0.0f)) continue;
        uint32_t at = step_of(weight);
        add_mass(&mass[at], mass_of(weight));
        atomicAdd(&count[at], 1u);
    }
    __syncthreads();
    loci_cuda_sample_step *steps = args.steps + (size_t)row * RADIX_BUCKETS;
    for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS; i += PART_THREADS) {
        if (count[i] == 0) continue;
        atomicAdd(&steps[i].mass, mass[i]);
        atomicAdd(&steps[i].count, count[i]);
    }
}

/* Puts the weights of a part to the row's in the order of their steps, the heaviest first. */
static __global__ void __launch_bounds__(PART_THREADS)
    k_sample_list(loci_cuda_sample_args args, uint32_t parts) {
    __shared__ uint32_t first[RADIX_BUCKETS]; /* of a step */
    const uint32_t each = RADIX_BUCKETS / PART_THREADS;
    __shared__ uint32_t count[RADIX_BUCKETS];
    uint32_t row = blockIdx.y, begin = blockIdx.x * LOCI_CUDA_SAMPLE_PART;
    uint32_t end = min(begin + LOCI_CUDA_SAMPLE_PART, args.vocab);
    uint32_t top = RADIX_BUCKETS - 1 - threadIdx.x * each, own = 0, all, before[PART_EACH];
    float weight[PART_EACH];
    const float *adjusted = args.adjusted + (size_t)row * args.vocab;
    loci_cuda_sample_step *steps = args.steps + (size_t)row * RADIX_BUCKETS;
    loci_cuda_sample_token *list = args.list + (size_t)row * args.vocab;
    await_previous();
#pragma unroll
    for (uint32_t j = 0; j < each; j++) own += count[top - j] = steps[top - j].count;
    uint32_t at = sum_before<PART_THREADS>(own, &all);
#pragma unroll
    for (uint32_t j = 0; j < each; j++) {
        first[top - j] = at;
        at += count[top - j];
        count[top - j] = 0;
    }
    __syncthreads();
    float best = join_parts(args.parts + (size_t)row * parts, parts).best;
#pragma unroll
    for (uint32_t j = 0; j < PART_EACH; j++) {
        uint32_t i = begin + threadIdx.x + j * PART_THREADS;
        weight[j] = i < end ? weigh(adjusted[i], best, args.temperature) : 0.0f;
        if (weight[j] > 0.0f) before[j] = atomicAdd(&count[step_of(weight[j])], 1u);
    }
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < each; j++)
        if (count[top - j] > 0) first[top - j] += atomicAdd(&steps[top - j].listed, count[top - j]);
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < PART_EACH; j++)
        if (weight[j] > 0.0f)
            list[first[step_of(weight[j])] + before[j]] = {weight[j],
                                                           begin + threadIdx.x + j * PART_THREADS};
}

/* What a block needs to draw from a row. */
typedef struct draw_memory {
    radix_memory radix;
    uint32_t chosen;
} draw_memory;

/* Tokens of one step, in any order. */
typedef struct step_tokens {
    const loci_cuda_sample_token *list;
    uint32_t count;
} step_tokens;

/* The row's steps as the first histogram of a selection, and all weight. */
static __device__ mass_t take_steps(draw_memory *memory, const loci_cuda_sample_step *steps) {
    mass_t own = 0;
    uint32_t unused = 0;
    for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS; i += RADIX_THREADS) {
        memory->radix.mass[i] = steps[i].mass;
        memory->radix.count[i] = steps[i].count;
        own += steps[i].mass;
    }
    scan_block(&memory->radix, &own, &unused);
    if (threadIdx.x == RADIX_THREADS - 1) memory->radix.found_mass = own;
    __syncthreads();
    mass_t all = memory->radix.found_mass;
    __syncthreads();
    return all;
}

/* Where in descending order of weight `target` is reached, and the tokens of the step that that is
 * in. */
static __device__ radix_cut cut_row(draw_memory *memory, const loci_cuda_sample_args &args,
                                    uint32_t row, mass_t target, step_tokens *tokens) {
    *tokens = {};
    auto visit = [&](auto add) {
        if (!tokens->list) {
            const radix_memory *m = &memory->radix; /* of the first histogram */
            tokens->list = args.list + (size_t)row * args.vocab + m->found_count;
            tokens->count = args.steps[(size_t)row * RADIX_BUCKETS + m->found].count;
        }
        for (uint32_t i = threadIdx.x; i < tokens->count; i += RADIX_THREADS) {
            float weight = tokens->list[i].weight;
            (void)add(__float_as_uint(weight), mass_of(weight));
        }
    };
    return radix_select<RADIX_SHARES>(&memory->radix, target, ~(mass_t)0, true, visit);
}

/* Of the tokens at the cut the last one that is taken, by its place; vocab: there is none. */
static __device__ uint32_t token_at(draw_memory *memory, const step_tokens &tokens,
                                    const radix_cut &cut, uint32_t vocab) {
    auto visit = [&](auto add) {
        for (uint32_t i = threadIdx.x; i < tokens.count; i += RADIX_THREADS)
            if (__float_as_uint(tokens.list[i].weight) == cut.key) add(tokens.list[i].place);
    };
    uint32_t shift = (uint32_t)__clz((int)vocab); /* so that the first bits differ */
    if (cut.equal > 1 && tokens.count > 0)
        return ~radix_select(&memory->radix, ~(mass_t)0, cut.ties, false,
                             [&](auto add) {
                                 visit([&](uint32_t place) { (void)add(~(place << shift), 0); });
                             })
                    .key >>
               shift;
    if (threadIdx.x == 0) memory->chosen = vocab;
    __syncthreads();
    visit([&](uint32_t place) { memory->chosen = place; });
    __syncthreads();
    return memory->chosen;
}

/* A draw from the nucleus: the first token, in descending order of weight and by its place, after
 * which the drawn share of its mass is exceeded. */
static __device__ uint32_t draw_token(draw_memory *memory, uint32_t row,
                                      const loci_cuda_sample_args &args) {
    const loci_cuda_sample_step *steps = args.steps + (size_t)row * RADIX_BUCKETS;
    step_tokens tokens;
    mass_t all = take_steps(memory, steps), kept = all;
    if (args.top_p > 0.0f && args.top_p < 1.0f) {
        mass_t most = (mass_t)ceil((double)args.top_p * (double)all);
        radix_cut nucleus = cut_row(memory, args, row, most ? most : 1, &tokens);
        if (nucleus.ties != 0xffffffffu)
            kept = nucleus.mass + mass_of(__uint_as_float(nucleus.key)) * nucleus.ties;
        __syncthreads();
        (void)take_steps(memory, steps);
    }
    mass_t target = (mass_t)(draw(args.seed, args.step, row) * (double)kept) + 1;
    radix_cut cut = cut_row(memory, args, row, target < kept ? target : kept, &tokens);
    return token_at(memory, tokens, cut, args.vocab);
}

static __global__ void __launch_bounds__(RADIX_THREADS)
    k_sample(loci_cuda_sample_args args, uint32_t parts) {
    extern __shared__ float4 shared[];
    uint32_t row = blockIdx.x;
    await_previous();
    loci_cuda_sample_part all = join_parts(args.parts + (size_t)row * parts, parts);
    uint32_t token = all.place;
    if (all.best == -INFINITY) {
        if (threadIdx.x == 0) raise_fault(args.fault, LOCI_CUDA_FAULT_BANNED, row, args.vocab);
        return;
    }
    if (args.temperature > 0.0f) {
        uint32_t drawn = draw_token((draw_memory *)shared, row, args);
        if (drawn < args.vocab) token = drawn;
    }
    if (threadIdx.x != 0) return;
    args.ids[row] = (int32_t)token;
    args.logprob[row] = args.logits[(size_t)row * args.vocab + token] - all.max - logf(all.sum);
}

extern "C" cudaError_t loci_cuda_k_sample(cudaStream_t stream, const loci_cuda_sample_args *args) {
    uint32_t parts = (args->vocab + LOCI_CUDA_SAMPLE_PART - 1) / LOCI_CUDA_SAMPLE_PART;
    bool draws = args->temperature > 0.0f;
    dim3 grid(parts, args->rows);
    cudaError_t result = launch_behind(stream, k_sample_parts, grid, PART_THREADS, 0, *args);
    if (result == cudaSuccess && draws)
        result = launch_behind(stream, k_sample_steps, grid, PART_THREADS, 0, *args, parts);
    if (result == cudaSuccess && draws)
        result = launch_behind(stream, k_sample_list, grid, PART_THREADS, 0, *args, parts);
    if (result != cudaSuccess) return result;
    return launch_behind(stream, k_sample, dim3(args->rows), draws ? RADIX_THREADS : 32,
                         draws ? sizeof(draw_memory) : 0, *args, parts);
}
