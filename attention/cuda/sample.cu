/* SPDX-License-Identifier: Apache-2.0
 *
 * Choosing the next token from a row of logits, as attention/cpu/sample.c states it: penalty, bans,
 * temperature, top-p, one draw named by (seed, step, row). One block a row. Weights become integers
 * of 2^-40 of the best one's; the nucleus and the token that the draw falls on are both found by
 * radix selection, without a sort.
 */
#include "attention/cuda/radix.cuh"
#include "base/rng.h"

#define UNIT 1099511627776.0 /* 2^40 */

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

/* The highest value and its lowest place; every thread gets both. */
static __device__ void block_best(const float *x, uint32_t n, float *best, uint32_t *place) {
    __shared__ float values[WARPS_MAX];
    __shared__ uint32_t places[WARPS_MAX];
    float value = -INFINITY;
    uint32_t at = 0xffffffffu;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
        if (x[i] > value || at == 0xffffffffu) {
            value = x[i];
            at = i;
        }
    for (int round = 0; round < 2; round++) {
        for (int offset = 16; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(FULL_WARP, value, offset);
            uint32_t other_at = __shfl_xor_sync(FULL_WARP, at, offset);
            if (other > value || (other == value && other_at < at)) {
                value = other;
                at = other_at;
            }
        }
        if (round == 1) break;
        __syncthreads();
        if (threadIdx.x % 32 == 0) {
            values[threadIdx.x / 32] = value;
            places[threadIdx.x / 32] = at;
        }
        __syncthreads();
        unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
        value = lane < warps ? values[lane] : -INFINITY;
        at = lane < warps ? places[lane] : 0xffffffffu;
    }
    *best = value;
    *place = at;
}

static __device__ bool check_row(const float *logits, uint32_t vocab, uint32_t row,
                                 loci_cuda_fault *fault) {
    int bad = 0;
    for (uint32_t i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (!isnan(logits[i]) && logits[i] != INFINITY) continue;
        bad = 1;
        raise_fault(fault, isnan(logits[i]) ? LOCI_CUDA_FAULT_NAN : LOCI_CUDA_FAULT_INFINITE, i,
                    row);
    }
    return __syncthreads_or(bad) == 0;
}

static __device__ void adjust(const loci_cuda_sample_args &args, const float *original,
                              float *adjusted) {
    for (uint32_t i = threadIdx.x; i < args.vocab; i += blockDim.x) adjusted[i] = original[i];
    __syncthreads();
    if (args.penalty > 0.0f && args.penalty != 1.0f)
        for (uint32_t i = threadIdx.x; i < args.recent_count; i += blockDim.x) {
            uint32_t id = args.recent[i];
            if (id >= args.vocab) continue;
            float logit = original[id];
            adjusted[id] = logit > 0.0f ? logit / args.penalty : logit * args.penalty;
        }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < args.banned_count; i += blockDim.x)
        if (args.banned[i] < args.vocab) adjusted[args.banned[i]] = -INFINITY;
    __syncthreads();
}

/* The first token, by its place, after which `target` is exceeded in descending order of weight. */
static __device__ uint32_t token_at(radix_memory *memory, const float *adjusted, uint32_t vocab,
                                    float best, float temperature, mass_t target) {
    __shared__ uint32_t chosen, passed;
    auto visit = [&](auto add) {
        for (uint32_t i = threadIdx.x; i < vocab; i += RADIX_THREADS) {
            float weight = expf((adjusted[i] - best) / temperature);
            if (weight > 0.0f) add(__float_as_uint(weight), (mass_t)((double)weight * UNIT));
        }
    };
    radix_cut cut = radix_select(memory, target, ~(mass_t)0, false, visit);
    if (threadIdx.x == 0) {
        chosen = vocab;
        passed = 0;
    }
    __syncthreads();
    /* Of the equal ones the cut.ties-th, counted by their place. */
    for (uint32_t begin = 0; begin < vocab; begin += RADIX_THREADS) {
        uint32_t i = begin + threadIdx.x;
        bool hit =
            i < vocab && __float_as_uint(expf((adjusted[i] - best) / temperature)) == cut.key;
        mass_t none = 0;
        uint32_t count = hit ? 1 : 0;
        scan_block(memory, &none, &count);
        if (hit && passed + count == cut.ties) chosen = i;
        uint32_t total = (uint32_t)__syncthreads_count(hit);
        if (threadIdx.x == 0) passed += total;
        __syncthreads();
        if (chosen < vocab) break;
    }
    return chosen;
}

/* All weight of the row, and of the nucleus. */
static __device__ mass_t nucleus_mass(radix_memory *memory, const float *adjusted, uint32_t vocab,
                                      float best, const loci_cuda_sample_args &args) {
    mass_t own = 0;
    uint32_t unused = 0;
    auto visit = [&](auto add) {
        for (uint32_t i = threadIdx.x; i < vocab; i += RADIX_THREADS) {
            float weight = expf((adjusted[i] - best) / args.temperature);
            if (weight > 0.0f) add(__float_as_uint(weight), (mass_t)((double)weight * UNIT));
        }
    };
    visit([&](uint32_t, mass_t mass) { own += mass; });
    scan_block(memory, &own, &unused);
    if (threadIdx.x == RADIX_THREADS - 1) memory->found_mass = own;
    __syncthreads();
    mass_t total = memory->found_mass;
    __syncthreads();
    if (!(args.top_p > 0.0f && args.top_p < 1.0f)) return total;
    mass_t target = (mass_t)ceil((double)args.top_p * (double)total);
    radix_cut cut = radix_select(memory, target ? target : 1, ~(mass_t)0, false, visit);
    if (cut.ties == 0xffffffffu) return total;
    return cut.mass + (mass_t)((double)__uint_as_float(cut.key) * UNIT) * cut.ties;
}

static __global__ void __launch_bounds__(RADIX_THREADS) k_sample(loci_cuda_sample_args args) {
    extern __shared__ float4 shared[];
    __shared__ float buffer[WARPS_MAX];
    radix_memory *memory = (radix_memory *)shared;
    uint32_t row = blockIdx.x, token;
    const float *original = args.logits + (size_t)row * args.vocab;
    float *adjusted = args.adjusted + (size_t)row * args.vocab, max = -INFINITY, sum = 0.0f, best;
    if (!check_row(original, args.vocab, row, args.fault)) return;
    for (uint32_t i = threadIdx.x; i < args.vocab; i += blockDim.x) max = fmaxf(max, original[i]);
    max = block_max(max, buffer);
    for (uint32_t i = threadIdx.x; i < args.vocab; i += blockDim.x) sum += expf(original[i] - max);
    sum = block_sum(sum, buffer);
    adjust(args, original, adjusted);
    block_best(adjusted, args.vocab, &best, &token);
    if (best == -INFINITY) {
        if (threadIdx.x == 0) raise_fault(args.fault, LOCI_CUDA_FAULT_BANNED, row, args.vocab);
        return;
    }
    if (args.temperature > 0.0f) {
        mass_t kept = nucleus_mass(memory, adjusted, args.vocab, best, args);
        mass_t target = (mass_t)(draw(args.seed, args.step, row) * (double)kept) + 1;
        uint32_t drawn = token_at(memory, adjusted, args.vocab, best, args.temperature,
                                  target < kept ? target : kept);
        if (drawn < args.vocab) token = drawn;
    }
    if (threadIdx.x != 0) return;
    args.ids[row] = (int32_t)token;
    args.logprob[row] = original[token] - max - logf(sum);
}

extern "C" cudaError_t loci_cuda_k_sample(cudaStream_t stream, const loci_cuda_sample_args *args) {
    k_sample<<<args->rows, RADIX_THREADS, sizeof(radix_memory), stream>>>(*args);
    return cudaGetLastError();
}
