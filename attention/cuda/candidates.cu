/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 2 of mode hierarchical, second half: the candidates, which are the tokens whose sketches
 * reach a floor of the row, and the floors where their number is limited.
 */
#include "attention/cuda/radix.cuh"
#include "attention/cuda/sketches.cuh"

/* --- candidates -------------------------------------------------------------------------- */

#define AHEAD 4u /* steps whose sums are read together */
#define SUM_MAX (PARTS_MAX * 255u)
#define NO_SUM 0xffffu
#define STEPS_MAX 65535u

/* What one vector, that of the lane, needs of a root's tokens; offset: the root's centre and the
 * base. */
struct lane_floor {
    float offset, scale, floor;
};

static __device__ __forceinline__ float estimate_of(const lane_floor &f, uint32_t sum) {
    return f.offset + f.scale * (float)sum;
}

/* The least sum whose estimate reaches the floor; NO_SUM if none does. */
static __device__ __forceinline__ uint32_t least_sum(const lane_floor &f) {
    if (!(estimate_of(f, SUM_MAX) >= f.floor)) return NO_SUM;
    float steps = (f.floor - f.offset) / f.scale;
    uint32_t sum = !(steps > 0.0f) ? 0 : steps < (float)SUM_MAX ? (uint32_t)steps : SUM_MAX;
    while (sum > 0 && estimate_of(f, sum - 1) >= f.floor) sum--;
    while (!(estimate_of(f, sum) >= f.floor)) sum++;
    return sum;
}

/* Not later, where the first use is. */
static __device__ __forceinline__ uint4 read_now(const uint4 *from) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

/* Least sums of a lot, side by side as sums are; the same in every lane. */
struct lot_least {
    uint32_t word[4];
};

static __device__ __forceinline__ void set_lot(lot_least &lot, uint32_t least) {
#pragma unroll
    for (uint32_t w = 0; w < 4; w++)
        lot.word[w] = __shfl_sync(FULL_WARP, least, (int)vector_of(w, 0)) |
                      __shfl_sync(FULL_WARP, least, (int)vector_of(w, 1)) << 16;
}

/* Whether any vector of the lot reaches its floor: where the greater one of a sum and the least is
 * the sum itself. */
static __device__ __forceinline__ bool reaches(const lot_least &lot, uint4 sum) {
    uint32_t x = __vmaxu2(sum.x, lot.word[0]) ^ sum.x, y = __vmaxu2(sum.y, lot.word[1]) ^ sum.y;
    uint32_t z = __vmaxu2(sum.z, lot.word[2]) ^ sum.z, w = __vmaxu2(sum.w, lot.word[3]) ^ sum.w;
    uint32_t off = __vminu2(__vminu2(x, y), __vminu2(z, w));
    return !(off & 0xffffu) || !(off >> 16);
}

/* Where candidates are limited, sums of a root become keys: whole steps of one scale a head, from
 * STEPS_MAX for what no token exceeds downwards; sum * times / 2^16, then more or less, within 16
 * bits. 0 is no candidate. */
struct lane_keys {
    uint32_t times, more, less, floor;
};

static __device__ __forceinline__ uint32_t key_of(const lane_keys &k, uint32_t sum) {
    uint32_t key = (sum * k.times >> 16) + k.more;
    key = key < STEPS_MAX ? key : STEPS_MAX;
    return key > k.less ? key - k.less : 0;
}

/* base: what a sum of 0 of the root means; scale: of the pair's table. */
static __device__ __forceinline__ lane_keys keys_of(const loci_cuda_look &look,
                                                    const loci_cuda_key_scale &head, double base,
                                                    float scale) {
    lane_keys k = {0, 0, STEPS_MAX, head.floor};
    double lacks = (head.top - base) / (double)head.step;
    double offset = (double)STEPS_MAX - look.dim / 4 * 255.0 - floor(lacks + 0.5);
    k.times = (uint32_t)floor((double)scale / (double)head.step * 65536.0);
    if (!(offset > -(double)STEPS_MAX)) return k;
    k.less = offset < 0.0 ? (uint32_t)-offset : 0;
    k.more = offset < 0.0 ? 0 : (uint32_t)offset;
    return k;
}

static __device__ __forceinline__ uint32_t least_sum(const lane_keys &k) {
    uint32_t low = 0, high = SUM_MAX;
    if (key_of(k, SUM_MAX) < k.floor) return NO_SUM;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (key_of(k, middle) >= k.floor)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* The keys of all vectors, the same in every lane. */
struct lot_keys {
    lane_keys vector[LOT];
};

static __device__ __forceinline__ void set_lot(lot_keys &lot, const lane_keys &own) {
#pragma unroll
    for (uint32_t g = 0; g < LOT; g++) {
        lot.vector[g].times = __shfl_sync(FULL_WARP, own.times, (int)g);
        lot.vector[g].more = __shfl_sync(FULL_WARP, own.more, (int)g);
        lot.vector[g].less = __shfl_sync(FULL_WARP, own.less, (int)g);
        lot.vector[g].floor = __shfl_sync(FULL_WARP, own.floor, (int)g);
    }
}

/* How many candidates a lane has found in the last run of mask words that it came to: counters of
 * all runs stand in a few lines of memory, where one addition waits for the other. */
struct run_tally {
    uint32_t *runs; /* of the pair */
    uint32_t run, count;
};

static __device__ __forceinline__ void count_run(run_tally &tally) {
    if (tally.count) atomicAdd(&tally.runs[tally.run], tally.count);
    tally.count = 0;
}

static __device__ __forceinline__ run_tally open_tally(const loci_cuda_look &look,
                                                       const loci_cuda_choice &c,
                                                       const lot_work &w) {
    size_t hr = (size_t)w.pair.kv_head * look.rows + w.row;
    return {c.run_count + hr * loci_cuda_runs(&look) + w.pair.word_base / LOCI_CUDA_RUN +
                w.index / look.kv_heads,
            0, 0};
}

/* Candidates among slots [slot, slot + 32) of the pair, by one lane. Other lots may have found the
 * same ones. */
static __device__ __forceinline__ void mark_slots(const loci_cuda_look &look,
                                                  const loci_cuda_choice &c, const lot_work &w,
                                                  uint32_t slot, uint32_t bits, run_tally &tally) {
    uint32_t *words = c.candidates + mask_at(look, &w.pair, w.row);
    uint32_t shift = slot % 32, part[2] = {bits << shift, shift ? bits >> (32 - shift) : 0};
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        if (!part[i]) continue;
        uint32_t at = slot / 32 + i, fresh = part[i];
        if (gridDim.z == 1)
            (void)atomicOr(&words[at], part[i]); /* waits for nothing */
        else
            fresh &= ~atomicOr(&words[at], part[i]);
        if (at / LOCI_CUDA_RUN != tally.run) count_run(tally);
        tally.run = at / LOCI_CUDA_RUN;
        tally.count += (uint32_t)__popc(fresh);
    }
}

/* The candidates of a step. */
static __device__ __forceinline__ void take_step(const loci_cuda_look &look,
                                                 const loci_cuda_choice &c, const lot_work &w,
                                                 const loci_cuda_root &root, const lot_least &lot,
                                                 uint32_t base, const uint4 (&sum)[2],
                                                 run_tally &tally) {
    uint32_t lane = threadIdx.x % 32, t = lane_token(base);
    uint32_t low = __ballot_sync(FULL_WARP, t < root.tokens && reaches(lot, sum[0]));
    uint32_t high = __ballot_sync(FULL_WARP, t + 16 < root.tokens && reaches(lot, sum[1]));
    uint32_t bits = lane == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & ~0xffffu);
    if (lane > 1 || !bits) return;
    uint32_t first = root.first_slot + base + lane * GROUP;
    uint32_t left = root.tokens - base - lane * GROUP;
    bits &= live_bits(&w.pair, first, left < GROUP ? left : GROUP);
    mark_slots(look, c, w, first, bits, tally);
}

/* The keys that reach a floor in a step, to the list of their vector, in any order. */
static __device__ __forceinline__ void take_step(const loci_cuda_look &look,
                                                 const loci_cuda_choice &c, const lot_work &w,
                                                 const loci_cuda_root &root, const lot_keys &lot,
                                                 uint32_t base, const uint4 (&sum)[2],
                                                 run_tally &) {
    uint32_t lane = threadIdx.x % 32, t = lane_token(base);
#pragma unroll
    for (uint32_t i = 0; i < 2; i++, t += 16) {
        bool live = t < root.tokens && live_bits(&w.pair, root.first_slot + t, 1);
        uint32_t words[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w};
#pragma unroll
        for (uint32_t j = 0; j < LOT; j++) {
            uint32_t g = vector_of(j / 2, j % 2), half = words[j / 2] >> j % 2 * 16 & 0xffffu;
            uint32_t key = key_of(lot.vector[g], half);
            bool hit = live && g < w.count && key >= lot.vector[g].floor;
            uint32_t hits = __ballot_sync(FULL_WARP, hit), at = 0;
            if (!hits) continue;
            size_t vector = (size_t)w.pair.kv_head * look.vectors + w.first + g;
            if (lane == 0) at = atomicAdd(&c.reached_count[vector], (uint32_t)__popc(hits));
            at = __shfl_sync(FULL_WARP, at, 0) + (uint32_t)__popc(hits & ((1u << lane) - 1));
            if (hit && at < c.reached_room) c.reached[vector * c.reached_room + at] = (float)key;
        }
    }
}

/* The candidates of a root (LOT_OF: lot_least) or what reaches the floors in it (lot_keys).
 * STORED: sums are there. */
template <bool STORED, typename LOT_OF>
static __device__ __forceinline__ void
take_root(const loci_cuda_look &look, const loci_cuda_choice &c, const lot_work &w,
          const loci_cuda_root &root, const warp_memory &m, const LOT_OF &lot) {
    const uint4 *from = c.sums + w.sums_at + root.first_slot;
    run_tally tally = open_tally(look, c, w);
    for (uint32_t first = 0; first < root.tokens; first += AHEAD * STEP) {
        uint4 sum[AHEAD][2];
#pragma unroll
        for (uint32_t j = 0; j < AHEAD && STORED; j++) {
            uint32_t t = lane_token(first + j * STEP);
            sum[j][0] = read_now(from + (t < root.tokens ? t : 0));
            sum[j][1] = read_now(from + (t + 16 < root.tokens ? t + 16 : 0));
        }
#pragma unroll
        for (uint32_t j = 0; j < AHEAD; j++) {
            uint32_t base = first + j * STEP;
            if (base >= root.tokens) break;
            if (!STORED) {
                step_words<MAX_DIM / 64> step;
                fetch_step(step, sketches_of(w, root, look.dim, base), groups_of(root, base),
                           look.dim);
                __syncwarp(); /* all have read the step before */
                put_step(step, m.columns, groups_of(root, base), look.dim);
                __syncwarp();
                add_columns(m, look.dim, sum[j]);
            }
            take_step(look, c, w, root, lot, base, sum[j], tally);
        }
    }
    count_run(tally);
}

/* What a lane gives a lot: whole numbers where candidates are limited. */
static __device__ __forceinline__ void fill_lot(const loci_cuda_look &look,
                                                const loci_cuda_choice &, lot_keys &lot,
                                                const loci_cuda_key_scale &head,
                                                const lane_floor &own, double base) {
    set_lot(lot, keys_of(look, head, base, own.scale));
}

static __device__ __forceinline__ void fill_lot(const loci_cuda_look &look,
                                                const loci_cuda_choice &c, lot_least &lot,
                                                const loci_cuda_key_scale &head,
                                                const lane_floor &own, double base) {
    uint32_t least = NO_SUM;
    if (!c.limit)
        least = least_sum(own);
    else if (head.step > 0.0f)
        least = least_sum(keys_of(look, head, base, own.scale));
    set_lot(lot, least);
}

template <bool STORED, typename LOT_OF>
static __global__ void __launch_bounds__(THREADS)
    k_take_tokens(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    const lot_work w = work_of(look, c);
    if (blockIdx.y * WARPS >= w.kept) return;
    uint32_t lane = threadIdx.x % 32;
    lane_floor own = {0.0f, 0.0f, INFINITY};
    loci_cuda_key_scale head = {}; /* of lanes beyond the lot: no sum is enough */
    float base = 0.0f;
    if (lane < w.count) {
        size_t vector = (size_t)w.pair.kv_head * look.vectors + w.first + lane;
        size_t at = (size_t)w.index * look.vectors + w.first + lane;
        base = c.table_base[at];
        own.scale = c.table_scale[at];
        own.floor = c.floor[vector];
        if (c.limit) head = c.key_scale[vector];
    }
    warp_memory m = {};
    if (!STORED) {
        m = open_memory(look, c, w, look.dim, shared);
        __syncthreads();
    }
    for (uint32_t i = blockIdx.y * WARPS + threadIdx.x / 32; i < w.kept; i += gridDim.y * WARPS) {
        uint32_t number = c.kept[w.kept_at + i];
        LOT_OF lot;
        float centre = centre_of(look, c, w, number, lane);
        if (lane < w.count) own.offset = centre + base;
        fill_lot(look, c, lot, head, own, (double)centre + (double)base);
        take_root<STORED>(look, c, w, w.pair.root_table[number], m, lot);
    }
}

/* The least key of an estimate of at least `limit`. */
static __device__ __forceinline__ uint32_t key_from(const loci_cuda_look &look,
                                                    const loci_cuda_key_scale &scale,
                                                    double limit) {
    double steps =
        (double)STEPS_MAX - look.dim / 4 * 255.0 + (limit - scale.top) / (double)scale.step;
    return steps > (double)STEPS_MAX ? STEPS_MAX : steps > 1.0 ? (uint32_t)ceil(steps) : 1;
}

/* One block for each (KV head, vector): its steps, and a floor that no fewer than `limit` tokens
 * reach, where there are so many: a little below the leaf that is that far down, since keys are
 * rounded. */
static __global__ void __launch_bounds__(THREADS)
    k_key_scales(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ double tops[WARPS];
    await_previous();
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors, lane = threadIdx.x % 32;
    const loci_cuda_head *head = &look.heads[h];
    loci_cuda_key_scale scale = {-(double)INFINITY, 0.0f, 1};
    for (uint32_t e = 0; e < look.extents; e++) {
        size_t index = (size_t)e * look.kv_heads + h, at = index * look.vectors + v;
        const loci_cuda_pair *pair = &look.pairs[index];
        double base = (double)c.table_base[at];
        scale.step = fmaxf(scale.step, c.table_scale[at]);
        for (uint32_t r = pair->root_base + threadIdx.x; r < pair->root_base + pair->roots;
             r += THREADS)
            if (c.root_kept[head->root_at + r])
                scale.top = fmax(scale.top, (double)c.root_centre[head->root_at * look.vectors +
                                                                  (size_t)v * head->roots + r] +
                                                base);
    }
    for (int offset = 16; offset > 0; offset /= 2)
        scale.top = fmax(scale.top, __shfl_xor_sync(FULL_WARP, scale.top, offset));
    if (lane == 0) tops[threadIdx.x / 32] = scale.top;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t i = 0; i < WARPS; i++) scale.top = fmax(scale.top, tops[i]);
    if (!(scale.step > 0.0f)) scale.step = 1.0f;
    double leaf = (double)c.floor[blockIdx.x];
    if (leaf > -FLT_MAX && scale.top > -(double)INFINITY) {
        double rounding = (fabs(leaf) + fabs(scale.top)) * 0x1p-21 + 5.0 * (double)scale.step;
        scale.floor = key_from(look, scale, leaf - rounding);
    }
    c.key_scale[blockIdx.x] = scale;
}

template <typename LOT_OF>
static cudaError_t launch_take(cudaStream_t stream, const loci_cuda_look *look,
                               const loci_cuda_choice *choice) {
    if (choice->sums)
        return launch_behind(stream, k_take_tokens<true, LOT_OF>, share_roots(look), THREADS, 0,
                             *look, *choice);
    return launch_behind(stream, k_take_tokens<false, LOT_OF>, share_roots(look), THREADS,
                         memory_bytes(look->dim), *look, *choice);
}

extern "C" cudaError_t loci_cuda_k_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                              const loci_cuda_choice *choice) {
    return look->extents ? launch_take<lot_least>(stream, look, choice) : cudaSuccess;
}

extern "C" cudaError_t loci_cuda_k_list_reaching(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    cudaError_t result = launch_behind(stream, k_key_scales, look->kv_heads * look->vectors,
                                       THREADS, 0, *look, *choice);
    return result == cudaSuccess ? launch_take<lot_keys>(stream, look, choice) : result;
}

/* One block for each (KV head, vector). Where more tokens reach a floor than the limit, it rises to
 * the last of those that may, or to what is in reach. */
static __global__ void __launch_bounds__(RADIX_THREADS, 1)
    k_raise_floors(const loci_cuda_look look, const loci_cuda_choice c) {
    extern __shared__ float4 shared[];
    await_previous();
    uint32_t n = c.reached_count[blockIdx.x];
    const float *reached = c.reached + (size_t)blockIdx.x * c.reached_room;
    float top, kth = radix_kth((radix_memory *)shared, reached, n, c.limit, &top);
    if (threadIdx.x != 0) return;
    loci_cuda_key_scale *scale = &c.key_scale[blockIdx.x];
    uint32_t floor = n >= c.limit ? (uint32_t)kth : 1;
    if (c.key_reach < (double)INFINITY) {
        double most = (n > 0 ? (double)top : 1.0) - ((double)STEPS_MAX - look.dim / 4 * 255.0);
        double greatest = scale->top + most * (double)scale->step;
        greatest = fmax(greatest, (double)look.steady[blockIdx.x]);
        uint32_t reach = key_from(look, *scale, greatest - c.key_reach);
        floor = reach > floor ? reach : floor;
    }
    scale->floor = floor;
}

extern "C" cudaError_t loci_cuda_k_raise_floors(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    return launch_behind(stream, k_raise_floors, look->kv_heads * look->vectors, RADIX_THREADS,
                         sizeof(radix_memory), *look, *choice);
}
