/* SPDX-License-Identifier: Apache-2.0
 *
 * The steps of K-means (kmeans.h), built without contraction. What decides is either an integer, a
 * sum in the order that the CPU has, or a maximum; atomics touch integers alone.
 */
#include "attention/cuda/device.cuh"
#include "attention/cuda/kmeans.h"
#include "attention/cuda/launch.cuh"

#define THREADS 256u
#define LANES 32u           /* in shared memory at a time */
#define ROUNDER 12582912.0f /* adding it rounds to the nearest integer, ties to even */
#define NEVER (-1073741824) /* what an empty group's products are: half the least */
#define CHANNELS_MAX 256u   /* of a row */

static inline dim3 blocks_of(uint64_t items, uint32_t each) {
    return dim3((unsigned)((items + each - 1) / each));
}

static __device__ __forceinline__ uint32_t thread_index(void) {
    return blockIdx.x * blockDim.x + threadIdx.x;
}

/* The set that a group, or a place, belongs to. */
static __device__ __forceinline__ uint32_t set_of(const loci_cuda_kmeans &k, uint32_t index,
                                                  bool place) {
    return last_at_most(k.set_count, index,
                        [&](uint32_t i) { return place ? k.sets[i].begin : k.sets[i].group; });
}

/* --- points and lists ------------------------------------------------------------------ */

/* A warp for each row. */
static __global__ void k_directions(const loci_cuda_points points, uint32_t n) {
    await_previous();
    uint32_t row = thread_index() / 32, lane = threadIdx.x % 32;
    if (row >= n) return;
    const float *x = points.x + (size_t)row * points.dim;
    float top = 0.0f;
    for (uint32_t i = lane; i < points.dim; i += 32) top = fmaxf(top, fabsf(x[i]));
    top = warp_max(top);
    float inverse = top > 0.0f ? 127.0f / top : 0.0f;
    if (!isfinite(inverse)) inverse = 0.0f;
    int32_t squares = 0;
    for (uint32_t i = lane; i < points.dim; i += 32) {
        float rounded = x[i] * inverse + ROUNDER;
        int32_t value = (int32_t)(rounded - ROUNDER);
        points.code[(size_t)row * points.dim + i] = (int8_t)value;
        squares += value * value;
    }
    for (int offset = 16; offset > 0; offset /= 2)
        squares += __shfl_xor_sync(FULL_WARP, squares, offset);
    if (lane == 0) points.length[row] = sqrtf((float)squares);
}

extern "C" cudaError_t loci_cuda_k_directions(cudaStream_t stream, const loci_cuda_points *points,
                                              uint32_t n) {
    return launch_behind(stream, k_directions, blocks_of(n, THREADS / 32), THREADS, 0, *points, n);
}

static __global__ void k_count_up(uint32_t *out, uint32_t n) {
    await_previous();
    uint32_t i = thread_index();
    if (i < n) out[i] = i;
}

extern "C" cudaError_t loci_cuda_k_count_up(cudaStream_t stream, uint32_t *out, uint32_t n) {
    return launch_behind(stream, k_count_up, blocks_of(n, THREADS), THREADS, 0, out, n);
}

static __global__ void k_take_even(uint32_t *out, const uint32_t *from, uint32_t n,
                                   uint32_t count) {
    await_previous();
    uint32_t i = thread_index();
    if (i < count) out[i] = from[(uint64_t)i * n / count];
}

extern "C" cudaError_t loci_cuda_k_take_even(cudaStream_t stream, uint32_t *out,
                                             const uint32_t *from, uint32_t n, uint32_t count) {
    return launch_behind(stream, k_take_even, blocks_of(count, THREADS), THREADS, 0, out, from, n,
                         count);
}

static __global__ void k_gather(uint32_t *out, const uint32_t *from, const uint32_t *at,
                                uint32_t n) {
    await_previous();
    uint32_t i = thread_index();
    if (i < n) out[i] = from[at[i]];
}

extern "C" cudaError_t loci_cuda_k_gather(cudaStream_t stream, uint32_t *out, const uint32_t *from,
                                          const uint32_t *at, uint32_t n) {
    return launch_behind(stream, k_gather, blocks_of(n, THREADS), THREADS, 0, out, from, at, n);
}

static __global__ void k_scatter(uint32_t *to, const uint32_t *at, const uint32_t *from,
                                 uint32_t n) {
    await_previous();
    uint32_t i = thread_index();
    if (i < n) to[at[i]] = from[i];
}

extern "C" cudaError_t loci_cuda_k_scatter(cudaStream_t stream, uint32_t *to, const uint32_t *at,
                                           const uint32_t *from, uint32_t n) {
    return launch_behind(stream, k_scatter, blocks_of(n, THREADS), THREADS, 0, to, at, from, n);
}

static __global__ void k_owners(uint32_t *to, const uint32_t *at, const uint32_t *ends,
                                uint32_t runs, uint32_t n) {
    await_previous();
    uint32_t i = thread_index(), low = 0, high = runs;
    if (i >= n) return;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (ends[middle] > i)
            high = middle;
        else
            low = middle + 1;
    }
    to[at[i]] = low;
}

extern "C" cudaError_t loci_cuda_k_owners(cudaStream_t stream, uint32_t *to, const uint32_t *at,
                                          const uint32_t *ends, uint32_t runs, uint32_t n) {
    return launch_behind(stream, k_owners, blocks_of(n, THREADS), THREADS, 0, to, at, ends, runs,
                         n);
}

/* --- centroids ------------------------------------------------------------------------- */

/* A warp for each group. */
static __global__ void k_seeds(const loci_cuda_kmeans k) {
    await_previous();
    uint32_t group = thread_index() / 32, lane = threadIdx.x % 32;
    if (group >= k.groups) return;
    const loci_cuda_set set = k.sets[set_of(k, group, false)];
    uint64_t at = ((uint64_t)(group - set.group) * 2 + 1) * set.count / (2 * (uint64_t)set.groups);
    const float *x = k.points.x + (size_t)k.ids[set.begin + at] * k.points.dim;
    for (uint32_t i = lane; i < k.points.dim; i += 32)
        k.centroid[(size_t)group * k.points.dim + i] = x[i];
    if (lane == 0) k.size[group] = 1;
}

extern "C" cudaError_t loci_cuda_k_seeds(cudaStream_t stream, const loci_cuda_kmeans *k) {
    return launch_behind(stream, k_seeds, blocks_of(k->groups, THREADS / 32), THREADS, 0, *k);
}

/* A thread for each group, whose squares are added channel after channel. */
static __global__ void k_tops(const loci_cuda_kmeans k, bool unit) {
    await_previous();
    uint32_t group = thread_index();
    if (group >= k.groups) return;
    float *row = k.centroid + (size_t)group * k.points.dim, inverse = 1.0f, top = 0.0f;
    if (unit) {
        double squares = 0.0;
        for (uint32_t i = 0; i < k.points.dim; i++) squares += (double)row[i] * (double)row[i];
        inverse = squares > 0.0 ? (float)(1.0 / sqrt(squares)) : 0.0f;
        if (!isfinite(inverse)) inverse = 0.0f;
    }
    for (uint32_t i = 0; i < k.points.dim; i++) {
        float value = row[i] * inverse;
        row[i] = value;
        top = fmaxf(top, fabsf(value));
    }
    atomicMax(&k.top[set_of(k, group, false)], __float_as_uint(top)); /* not below 0: same order */
}

extern "C" cudaError_t loci_cuda_k_tops(cudaStream_t stream, const loci_cuda_kmeans *k, bool unit) {
    return launch_behind(stream, k_tops, blocks_of(k->groups, 64), 64, 0, *k, unit);
}

/* A thread for each four channels of a lane. */
static __global__ void k_lanes(const loci_cuda_kmeans k) {
    await_previous();
    uint32_t words = k.points.dim / 4, lane = thread_index() / words, word = thread_index() % words;
    if (lane >= k.groups) return;
    uint32_t group = k.lane_group ? k.lane_group[lane] : lane, packed = 0;
    bool empty = k.size && k.size[group] == 0;
    float top = __uint_as_float(k.top[set_of(k, group, false)]);
    float scale = top > 0.0f ? 127.0f / top : 0.0f;
    const float *row = k.centroid + (size_t)group * k.points.dim + 4 * word;
    for (uint32_t i = 0; i < 4 && !empty; i++) {
        float rounded = row[i] * scale + ROUNDER;
        packed |= (uint32_t)(uint8_t)(int8_t)(int32_t)(rounded - ROUNDER) << (8 * i);
    }
    ((uint32_t *)k.lanes)[(size_t)lane * words + word] = packed;
    if (word == 0) k.bias[lane] = empty ? NEVER : 0;
}

extern "C" cudaError_t loci_cuda_k_lanes(cudaStream_t stream, const loci_cuda_kmeans *k) {
    uint64_t items = (uint64_t)k->groups * (k->points.dim / 4);
    return launch_behind(stream, k_lanes, blocks_of(items, THREADS), THREADS, 0, *k);
}

/* A warp for each group; its rows come 32 at a time, a lane adds up every 32nd channel. */
template <int EACH> static __global__ void k_sums(const loci_cuda_kmeans k) {
    await_previous();
    uint32_t group = thread_index() / 32, lane = threadIdx.x % 32, dim = k.points.dim;
    if (group >= k.groups) return;
    uint32_t end = k.begin[group + 1];
    float sum[EACH] = {};
    for (uint32_t at = k.begin[group]; at < end; at += 32) {
        uint32_t count = end - at < 32 ? end - at : 32;
        uint32_t own = lane < count ? k.ids[k.order[at + lane]] : 0;
#pragma unroll 4
        for (uint32_t i = 0; i < count; i++) {
            const float *x = k.points.x + (size_t)__shfl_sync(FULL_WARP, own, (int)i) * dim;
#pragma unroll
            for (uint32_t e = 0; e < EACH; e++)
                if (e * 32 + lane < dim) sum[e] += x[e * 32 + lane];
        }
    }
#pragma unroll
    for (uint32_t e = 0; e < EACH; e++)
        if (e * 32 + lane < dim) k.centroid[(size_t)group * dim + e * 32 + lane] = sum[e];
}

extern "C" cudaError_t loci_cuda_k_sums(cudaStream_t stream, const loci_cuda_kmeans *k) {
    auto kernel = k->points.dim <= 64 ? k_sums<2> : k->points.dim <= 128 ? k_sums<4> : k_sums<8>;
    return launch_behind(stream, kernel, blocks_of(k->groups, THREADS / 32), THREADS, 0, *k);
}

/* --- the nearest ----------------------------------------------------------------------- */

/* A row's words in registers, filled up with zeros. */
template <int WORDS>
static __device__ __forceinline__ void load_row(uint4 (&to)[WORDS / 4], const int8_t *code,
                                                uint32_t dim) {
#pragma unroll
    for (uint32_t i = 0; i < WORDS / 4; i++)
        to[i] = 16 * i < dim ? ((const uint4 *)code)[i] : make_uint4(0, 0, 0, 0);
}

template <int WORDS>
static __device__ __forceinline__ int product(const uint4 (&row)[WORDS / 4], const uint4 *lane,
                                              int sum) {
#pragma unroll
    for (uint32_t i = 0; i < WORDS / 4; i++) {
        uint4 other = lane[i];
        sum = __dp4a((int)row[i].x, (int)other.x, sum);
        sum = __dp4a((int)row[i].y, (int)other.y, sum);
        sum = __dp4a((int)row[i].z, (int)other.z, sum);
        sum = __dp4a((int)row[i].w, (int)other.w, sum);
    }
    return sum;
}

/* Up to LANES lanes from `first` on, and their biases, into shared memory, by the whole block. */
template <int WORDS>
static __device__ __forceinline__ void share_lanes(uint4 *to, int *bias, const loci_cuda_kmeans &k,
                                                   uint32_t first, uint32_t count) {
    const uint32_t parts = WORDS / 4;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count * parts; i += blockDim.x) {
        const int8_t *lane = k.lanes + (size_t)(first + i / parts) * k.points.dim;
        to[i] = 16 * (i % parts) < k.points.dim ? ((const uint4 *)lane)[i % parts]
                                                : make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x < count) bias[threadIdx.x] = k.bias[first + threadIdx.x];
    __syncthreads();
}

/* A block for each tile, a thread for each of its entries. Of equal products the lowest lane's
 * counts, in a tile and between tiles. */
template <int WORDS>
static __global__ void __launch_bounds__(LOCI_CUDA_TILE)
    k_nearest(const loci_cuda_kmeans k, const loci_cuda_tile *tiles, const uint32_t *places) {
    __shared__ uint4 lanes[LANES * WORDS / 4];
    __shared__ int bias[LANES];
    await_previous();
    const loci_cuda_tile tile = tiles[blockIdx.x];
    bool there = threadIdx.x < tile.count;
    uint32_t entry = tile.first + (there ? threadIdx.x : 0);
    uint32_t place = places ? places[entry] : entry, nearest = 0;
    uint4 row[WORDS / 4];
    load_row<WORDS>(row, k.points.code + (size_t)k.ids[place] * k.points.dim, k.points.dim);
    int best = INT32_MIN;
    for (uint32_t first = 0; first < tile.lanes; first += LANES) {
        uint32_t count = tile.lanes - first < LANES ? tile.lanes - first : LANES;
        share_lanes<WORDS>(lanes, bias, k, tile.lane + first, count);
        for (uint32_t l = 0; l < count; l++) {
            int value = product<WORDS>(row, lanes + l * (WORDS / 4), bias[l]);
            if (value <= best) continue;
            best = value;
            nearest = tile.lane + first + l;
        }
    }
    unsigned long long key = (unsigned long long)((uint32_t)best ^ 0x80000000u) << 32 | ~nearest;
    if (there) atomicMax((unsigned long long *)&k.best[place], key);
}

extern "C" cudaError_t loci_cuda_k_nearest(cudaStream_t stream, const loci_cuda_kmeans *k,
                                           const loci_cuda_tile *tiles, uint32_t tile_count,
                                           const uint32_t *places) {
    if (tile_count == 0) return cudaSuccess;
    auto kernel = k->points.dim <= 64    ? k_nearest<16>
                  : k->points.dim <= 128 ? k_nearest<32>
                                         : k_nearest<64>;
    return launch_behind(stream, kernel, dim3(tile_count), LOCI_CUDA_TILE, 0, *k, tiles, places);
}

static __global__ void k_settle(const loci_cuda_kmeans k) {
    await_previous();
    uint32_t place = thread_index();
    if (place >= k.n) return;
    uint64_t key = k.best[place];
    uint32_t lane = ~(uint32_t)key, group = k.group[place];
    if (key != 0) group = k.lane_group ? k.lane_group[lane] : lane;
    k.group[place] = group;
    atomicAdd(&k.size[group], 1u);
}

extern "C" cudaError_t loci_cuda_k_settle(cudaStream_t stream, const loci_cuda_kmeans *k) {
    return launch_behind(stream, k_settle, blocks_of(k->n, THREADS), THREADS, 0, *k);
}

/* --- empty groups ---------------------------------------------------------------------- */

static __global__ void k_count_empty(const loci_cuda_kmeans k) {
    await_previous();
    uint32_t group = thread_index();
    unsigned empty = __ballot_sync(FULL_WARP, group < k.groups && k.size[group] == 0);
    if (threadIdx.x % 32 == 0 && empty) atomicAdd(k.empty, (uint32_t)__popc(empty));
}

extern "C" cudaError_t loci_cuda_k_count_empty(cudaStream_t stream, const loci_cuda_kmeans *k) {
    return launch_behind(stream, k_count_empty, blocks_of(k->groups, THREADS), THREADS, 0, *k);
}

static __global__ void k_far_keys(const loci_cuda_kmeans k, uint32_t *keys) {
    await_previous();
    uint32_t place = thread_index();
    if (place >= k.n) return;
    int32_t dot = (int32_t)((uint32_t)(k.best[place] >> 32) ^ 0x80000000u);
    float length = k.points.length[k.ids[place]];
    uint32_t bits = __float_as_uint(length > 0.0f ? (float)dot / length : 0.0f);
    keys[place] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

extern "C" cudaError_t loci_cuda_k_far_keys(cudaStream_t stream, const loci_cuda_kmeans *k,
                                            uint32_t *keys) {
    return launch_behind(stream, k_far_keys, blocks_of(k->n, THREADS), THREADS, 0, *k, keys);
}

static __global__ void k_set_keys(const loci_cuda_kmeans k, const uint32_t *places,
                                  uint32_t *keys) {
    await_previous();
    uint32_t i = thread_index();
    if (i < k.n) keys[i] = set_of(k, places[i], true);
}

extern "C" cudaError_t loci_cuda_k_set_keys(cudaStream_t stream, const loci_cuda_kmeans *k,
                                            const uint32_t *places, uint32_t *keys) {
    return launch_behind(stream, k_set_keys, blocks_of(k->n, THREADS), THREADS, 0, *k, places,
                         keys);
}

/* A warp for each set looks for its empty groups; its first lane goes through the places. A group
 * of one stays one, and none becomes empty. */
static __global__ void k_fill(const loci_cuda_kmeans k, const uint32_t *places) {
    await_previous();
    uint32_t index = thread_index() / 32, lane = threadIdx.x % 32;
    if (index >= k.set_count) return;
    const loci_cuda_set set = k.sets[index];
    uint32_t at = set.begin, end = set.begin + set.count;
    for (uint32_t base = 0; base < set.groups; base += 32) {
        bool inside = base + lane < set.groups;
        unsigned empty = __ballot_sync(FULL_WARP, inside && k.size[set.group + base + lane] == 0);
        for (; empty && lane == 0; empty &= empty - 1) {
            uint32_t to = set.group + base + (uint32_t)__ffs((int)empty) - 1, from = 0, place = 0;
            for (; at < end; at++) {
                place = places[at];
                from = k.group[place];
                if (k.size[from] >= 2) break;
            }
            if (at == end) break;
            k.size[from]--;
            k.group[place] = to;
            k.size[to] = 1;
            at++;
        }
        __syncwarp();
    }
}

extern "C" cudaError_t loci_cuda_k_fill(cudaStream_t stream, const loci_cuda_kmeans *k,
                                        const uint32_t *places) {
    return launch_behind(stream, k_fill, blocks_of(k->set_count, 4), 128, 0, *k, places);
}

static __global__ void k_begins(uint32_t *begin, const uint32_t *keys, uint32_t n,
                                uint32_t groups) {
    await_previous();
    uint32_t i = thread_index();
    if (i > n) return;
    uint32_t first = i > 0 ? keys[i - 1] + 1 : 0, last = i < n ? keys[i] : groups;
    for (uint32_t group = first; group <= last; group++) begin[group] = i;
}

extern "C" cudaError_t loci_cuda_k_begins(cudaStream_t stream, uint32_t *begin,
                                          const uint32_t *keys, uint32_t n, uint32_t groups) {
    return launch_behind(stream, k_begins, blocks_of((uint64_t)n + 1, THREADS), THREADS, 0, begin,
                         keys, n, groups);
}

/* --- bundles --------------------------------------------------------------------------- */

/* A block for each bundle, a thread for each channel. */
static __global__ void k_bundle_means(const loci_cuda_kmeans bundle, const float *centroid) {
    await_previous();
    uint32_t begin = bundle.begin[blockIdx.x], end = bundle.begin[blockIdx.x + 1];
    float mean = 0.0f, count = (float)(end - begin);
    if (threadIdx.x >= bundle.points.dim) return;
    for (uint32_t at = begin; at < end; at++)
        mean += centroid[(size_t)bundle.order[at] * bundle.points.dim + threadIdx.x] / count;
    bundle.centroid[(size_t)blockIdx.x * bundle.points.dim + threadIdx.x] = mean;
}

extern "C" cudaError_t loci_cuda_k_bundle_means(cudaStream_t stream, const loci_cuda_kmeans *bundle,
                                                const loci_cuda_kmeans *k) {
    return launch_behind(stream, k_bundle_means, dim3(bundle->groups), CHANNELS_MAX, 0, *bundle,
                         (const float *)k->centroid);
}

/* A thread for each place. */
template <int WORDS>
static __global__ void __launch_bounds__(LOCI_CUDA_TILE)
    k_probes(const loci_cuda_kmeans bundle, const loci_cuda_kmeans k, uint32_t *keys,
             uint32_t *places) {
    __shared__ uint4 lanes[LANES * WORDS / 4];
    __shared__ int bias[LANES];
    await_previous();
    uint32_t place = thread_index(), probe[LOCI_CUDA_PROBES] = {};
    bool there = place < k.n;
    uint4 row[WORDS / 4];
    load_row<WORDS>(row, k.points.code + (size_t)k.ids[there ? place : 0] * k.points.dim,
                    k.points.dim);
    int best[LOCI_CUDA_PROBES];
    for (uint32_t p = 0; p < LOCI_CUDA_PROBES; p++) best[p] = INT32_MIN;
    for (uint32_t first = 0; first < bundle.groups; first += LANES) {
        uint32_t count = bundle.groups - first < LANES ? bundle.groups - first : LANES;
        share_lanes<WORDS>(lanes, bias, bundle, first, count);
        for (uint32_t l = 0; l < count; l++) {
            int value = product<WORDS>(row, lanes + l * (WORDS / 4), bias[l]);
            if (value <= best[LOCI_CUDA_PROBES - 1]) continue;
            best[LOCI_CUDA_PROBES - 1] = value;
            probe[LOCI_CUDA_PROBES - 1] = first + l;
#pragma unroll
            for (uint32_t p = LOCI_CUDA_PROBES - 1; p > 0; p--) {
                if (best[p] <= best[p - 1]) continue;
                int lower = best[p - 1];
                uint32_t other = probe[p - 1];
                best[p - 1] = best[p];
                probe[p - 1] = probe[p];
                best[p] = lower;
                probe[p] = other;
            }
        }
    }
    for (uint32_t p = 0; p < LOCI_CUDA_PROBES && there; p++) {
        keys[(size_t)p * k.n + place] = probe[p];
        places[(size_t)p * k.n + place] = place;
    }
}

extern "C" cudaError_t loci_cuda_k_probes(cudaStream_t stream, const loci_cuda_kmeans *bundle,
                                          const loci_cuda_kmeans *k, uint32_t *keys,
                                          uint32_t *places) {
    auto kernel = k->points.dim <= 64    ? k_probes<16>
                  : k->points.dim <= 128 ? k_probes<32>
                                         : k_probes<64>;
    return launch_behind(stream, kernel, blocks_of(k->n, LOCI_CUDA_TILE), LOCI_CUDA_TILE, 0,
                         *bundle, *k, keys, places);
}
