/* SPDX-License-Identifier: Apache-2.0
 *
 * Radix selection by one block: the place in the descending order of keys at which enough mass or
 * enough keys are taken. Masses are integers, so that atomics give the same sums in any order.
 * Three passes over the keys (11, 11 and 10 bits), each a histogram and a scan from its top.
 */
#ifndef LOCI_ATTENTION_CUDA_RADIX_CUH
#define LOCI_ATTENTION_CUDA_RADIX_CUH

#include <cfloat>

#include "attention/cuda/device.cuh"

#define RADIX_BUCKETS 2048u
#define RADIX_THREADS 1024u

typedef unsigned long long mass_t;

/* Taken are all keys above `key` and the first `ties` that equal it; `mass` and `count` are those
 * of the keys above. */
struct radix_cut {
    uint32_t key;
    uint32_t ties;
    mass_t mass;
    uint32_t count;
    uint32_t equal; /* keys that equal `key` */
};

struct radix_memory {
    mass_t mass[RADIX_BUCKETS];
    uint32_t count[RADIX_BUCKETS];
    mass_t warp_mass[WARPS_MAX];
    uint32_t warp_count[WARPS_MAX];
    mass_t found_mass;
    uint32_t found, found_count, listed;
    float buffer[WARPS_MAX], kth;
};

/* Orders as floats do, negative ones included; -0 is 0. */
static __device__ __forceinline__ uint32_t ordered(float value) {
    uint32_t bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ bool radix_enough(mass_t mass, mass_t count, mass_t target,
                                                    mass_t most) {
    return mass >= target || count >= most;
}

/* Sums of this thread and those before it. */
static __device__ __forceinline__ void scan_block(radix_memory *m, mass_t *mass, uint32_t *count) {
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        mass_t a = __shfl_up_sync(FULL_WARP, *mass, offset);
        uint32_t b = __shfl_up_sync(FULL_WARP, *count, offset);
        if (lane >= (unsigned)offset) {
            *mass += a;
            *count += b;
        }
    }
    __syncthreads();
    if (lane == 31) {
        m->warp_mass[warp] = *mass;
        m->warp_count[warp] = *count;
    }
    __syncthreads();
    for (unsigned w = 0; w < warp; w++) {
        *mass += m->warp_mass[w];
        *count += m->warp_count[w];
    }
}

/* The bucket in which enough is reached when they are taken from the top on what `cut` has, into
 * m->found (RADIX_BUCKETS: all of them are not enough) with what stands above it. A thread has two
 * buckets. */
static __device__ __forceinline__ void find_bucket(radix_memory *m, const radix_cut &cut,
                                                   mass_t target, mass_t most) {
    uint32_t high = RADIX_BUCKETS - 1 - 2 * threadIdx.x, low = high - 1;
    mass_t mass = m->mass[high] + m->mass[low], own_mass = mass;
    uint32_t count = m->count[high] + m->count[low], own_count = count;
    if (threadIdx.x == 0) m->found = RADIX_BUCKETS;
    scan_block(m, &mass, &count);
    mass += cut.mass;
    count += cut.count;
    mass_t mass_before = mass - own_mass;
    uint32_t count_before = count - own_count;
    if (radix_enough(mass, count, target, most) &&
        !radix_enough(mass_before, count_before, target, most)) {
        bool first =
            radix_enough(mass_before + m->mass[high], count_before + m->count[high], target, most);
        m->found = first ? high : low;
        m->found_mass = mass_before + (first ? 0 : m->mass[high]);
        m->found_count = count_before + (first ? 0 : m->count[high]);
    }
    __syncthreads();
}

/* Adds in shared memory, which has atomics of 32 bits only. */
static __device__ __forceinline__ void add_mass(mass_t *to, mass_t mass) {
    uint32_t *halves = (uint32_t *)to, low = (uint32_t)mass, high = (uint32_t)(mass >> 32);
    uint32_t before = atomicAdd(&halves[0], low);
    high += before + low < before;
    if (high) atomicAdd(&halves[1], high);
}

/* Which bits of keys the three passes look at: all, or those of floats from 0 up to below 2. */
#define RADIX_ALL 21
#define RADIX_SHARES 19

/* visit(add) calls add(key, mass) for each key of this thread, which says whether later passes look
 * at it; three times the same ones, twice where `filled`: m has the first pass's histogram. All
 * RADIX_THREADS threads get the result. None are taken if target is 0 or most is 0. */
template <int FIRST = RADIX_ALL, typename VISIT>
static __device__ radix_cut radix_select(radix_memory *m, mass_t target, mass_t most, bool filled,
                                         VISIT visit) {
    radix_cut cut = {0xffffffffu, 0, 0, 0, 0};
    if (radix_enough(0, 0, target, most)) return cut;
    uint32_t fixed = 0;
    cut.key = 0;
    for (int level = 0; level < 3; level++) {
        int shift = level == 0 ? FIRST : level == 1 ? FIRST - 11 : 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS && !(filled && level == 0);
             i += RADIX_THREADS) {
            m->mass[i] = 0;
            m->count[i] = 0;
        }
        __syncthreads();
        if (!(filled && level == 0))
            visit([&](uint32_t key, mass_t mass) {
                if ((key & fixed) != cut.key) return false;
                uint32_t at = (key & ~fixed) >> shift;
                if (mass) add_mass(&m->mass[at], mass);
                atomicAdd(&m->count[at], 1u);
                return true;
            });
        __syncthreads();
        find_bucket(m, cut, target, most);
        if (m->found == RADIX_BUCKETS) { /* at the first level only: all are taken */
            cut.key = 0;
            cut.ties = cut.equal = 0xffffffffu;
            return cut;
        }
        cut.key |= m->found << shift;
        cut.mass = m->found_mass;
        cut.count = m->found_count;
        fixed = ~0u << shift;
    }
    uint32_t at = cut.key & ((1u << (FIRST - 11)) - 1), equal = m->count[at];
    mass_t each = equal ? m->mass[at] / equal : 0, wanted = most - cut.count;
    if (target > cut.mass && each > 0) {
        mass_t by_mass = (target - cut.mass + each - 1) / each;
        wanted = by_mass < wanted ? by_mass : wanted;
    }
    cut.ties = wanted < equal ? (uint32_t)wanted : equal;
    cut.equal = equal;
    __syncthreads();
    return cut;
}

/* --- values of a block ----------------------------------------------------------------- */

#define SWEEP_EACH 16u /* loads of a thread that are under way together */

/* visit(value) for the values of this thread, -INFINITY and NaN left out. */
template <typename VISIT>
static __device__ __forceinline__ void sweep(const float *value, uint32_t n, VISIT visit) {
    for (uint32_t begin = threadIdx.x; begin < n; begin += SWEEP_EACH * RADIX_THREADS) {
        float x[SWEEP_EACH];
#pragma unroll
        for (uint32_t j = 0; j < SWEEP_EACH; j++) {
            uint32_t i = begin + j * RADIX_THREADS;
            x[j] = i < n ? value[i] : -INFINITY;
        }
#pragma unroll
        for (uint32_t j = 0; j < SWEEP_EACH; j++)
            if (x[j] > -INFINITY) visit(x[j]);
    }
}

/* Values that a block visits several times: EACH of a thread in registers and `held` of the block
 * in shared memory, where all of them find room. */
template <uint32_t EACH> struct block_values {
    const float *value;
    uint32_t n, held;
    float own[EACH], *more;
    bool fits;
};

template <uint32_t EACH>
static __device__ __forceinline__ void load_values(block_values<EACH> &b, const float *value,
                                                   uint32_t n, float *more, uint32_t held) {
    const uint32_t first = EACH * RADIX_THREADS;
    b.value = value;
    b.n = n;
    b.held = n > first ? n - first : 0;
    b.more = more;
    b.fits = b.held <= held;
    if (!b.fits) return;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < b.held; i += RADIX_THREADS) more[i] = value[first + i];
#pragma unroll
    for (uint32_t j = 0; j < EACH; j++) {
        uint32_t i = j * RADIX_THREADS + threadIdx.x;
        b.own[j] = i < n ? value[i] : -INFINITY;
    }
}

/* As sweep. */
template <uint32_t EACH, typename VISIT>
static __device__ __forceinline__ void visit_values(const block_values<EACH> &b, VISIT visit) {
    if (!b.fits) {
        sweep(b.value, b.n, visit);
        return;
    }
    for (uint32_t i = threadIdx.x; i < b.held; i += RADIX_THREADS) /* its own ones */
        if (b.more[i] > -INFINITY) visit(b.more[i]);
#pragma unroll
    for (uint32_t j = 0; j < EACH; j++) {
        if (j * RADIX_THREADS >= b.n) break;
        if (b.own[j] > -INFINITY) visit(b.own[j]);
    }
}

/* --- the k-th highest value ------------------------------------------------------------ */

#define KTH_EACH 24u   /* values of a thread in registers */
#define KTH_LIST 1024u /* values of one bucket that are ranked by comparing them all */

/* The r-th highest of the `count` values listed in m->mass. */
static __device__ float kth_listed(radix_memory *m, uint32_t count, uint32_t r) {
    const float *list = (const float *)m->mass;
    if (threadIdx.x < count) {
        float own = list[threadIdx.x];
        uint32_t above = 0, equal = 0, before = 0;
        for (uint32_t i = 0; i < count; i++) {
            above += list[i] > own;
            equal += list[i] == own;
            before += list[i] == own && i < threadIdx.x;
        }
        if (before == 0 && above < r && r <= above + equal) m->kth = own;
    }
    __syncthreads();
    return m->kth;
}

/* Into m->found the bucket, counted from 0, that holds the k-th value (RADIX_BUCKETS: there are
 * fewer), into m->found_count how many stand before it. */
static __device__ void kth_bucket(radix_memory *m, mass_t k) {
    uint32_t at = 2 * threadIdx.x, own = m->count[at] + m->count[at + 1], sum = own;
    mass_t none = 0;
    if (threadIdx.x == 0) {
        m->found = RADIX_BUCKETS;
        m->listed = 0;
    }
    scan_block(m, &none, &sum);
    uint32_t before = sum - own;
    if (before < k && k <= sum) {
        bool first = k <= before + m->count[at];
        m->found = first ? at : at + 1;
        m->found_count = first ? before : before + m->count[at];
    }
    __syncthreads();
}

/* The k-th highest of n values, k > 0, -INFINITY and NaN not counted; -FLT_MAX if there are not so
 * many. *top: the highest. All threads get them. Values fall into even steps between the lowest and
 * the highest, so that few threads meet in one counter; those of the k-th one's step are compared.
 * held: values that there is room for behind m, in shared memory. */
static __device__ float radix_kth(radix_memory *m, const float *value, uint32_t n, mass_t k,
                                  float *top, uint32_t held = 0) {
    float high = -INFINITY, low = INFINITY;
    block_values<KTH_EACH> all;
    load_values(all, value, n, (float *)(m + 1), held);
    visit_values(all, [&](float x) {
        high = fmaxf(high, x);
        low = fminf(low, x);
    });
    high = block_max(high, m->buffer);
    low = -block_max(-low, m->buffer);
    *top = high;
    if (high == -INFINITY) return -FLT_MAX;
    float factor = (float)(RADIX_BUCKETS - 1) / (high - low);
    if (factor > 0.0f && factor < 1e30f) {
        auto bucket = [&](float x) {
            uint32_t at = (uint32_t)((high - x) * factor);
            return at < RADIX_BUCKETS ? at : RADIX_BUCKETS - 1;
        };
        for (uint32_t i = threadIdx.x; i < RADIX_BUCKETS; i += RADIX_THREADS) m->count[i] = 0;
        __syncthreads();
        visit_values(all, [&](float x) { atomicAdd(&m->count[bucket(x)], 1u); });
        __syncthreads();
        kth_bucket(m, k);
        if (m->found == RADIX_BUCKETS) return -FLT_MAX;
        uint32_t found = m->found, count = m->count[found], before = m->found_count;
        if (count <= KTH_LIST) {
            float *list = (float *)m->mass;
            visit_values(all, [&](float x) {
                if (bucket(x) == found) list[atomicAdd(&m->listed, 1u)] = x;
            });
            __syncthreads();
            return kth_listed(m, count, (uint32_t)k - before);
        }
    }
    radix_cut cut = radix_select(m, ~(mass_t)0, k, false, [&](auto add) {
        sweep(value, n, [&](float x) { add(ordered(x), 0); });
    });
    return cut.ties == 0xffffffffu ? -FLT_MAX : unordered(cut.key);
}

#endif
