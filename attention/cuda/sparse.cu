/* SPDX-License-Identifier: Apache-2.0
 *
 * Exact attention over the tokens that masks hold, the merge of its parts, the attention mass of
 * segments, figures.
 *
 * A block takes a chunk of a pair's slots and a tile of vectors: it lists the slots that any row of
 * the tile selected, gathers their K and V, and leaves one partial result, which k_join merges in
 * the order of extents and slots. K and V are read once for all vectors of a tile.
 *
 * Each warp of k_attend_sparse takes every fourth run of 16 listed slots through steps of its own:
 * their rows come to its part of shared memory while it works on the run before. Products run on
 * tensor cores: K and V are bf16, queries and weights are split into a rounded part and the rest,
 * which gives f32 results to about 2^-17.
 */
#include "attention/cuda/chunks.cuh"
#include "attention/cuda/rows.cuh"

/* --- attention ------------------------------------------------------------------------- */

/* Shared memory: queries, rounded and the rest, then for each warp two stages of K and V rows;
 * results of the warps take the place of the stages. */
template <int DIM> static __host__ __device__ constexpr uint32_t sparse_halves(void) {
    return (2 + 4 * TILE_WARPS) * RUN * WIDTH_OF(DIM);
}

/* Begins to copy K and V rows of a run, by one warp; row_of(i): of key i of `count`. Past the end
 * comes the last key again. int8: some may be. */
template <int DIM, typename ROW_OF>
static __device__ __forceinline__ void gather(uint32_t begin, uint32_t count, uint32_t dim,
                                              bool int8, uint16_t *k, ROW_OF row_of) {
    const uint32_t lanes = DIM / 4 < 32 ? DIM / 4 : 32;
    uint32_t lane = threadIdx.x % 32;
    if (begin < count) {
#pragma unroll
        for (uint32_t r = lane / lanes; r < RUN; r += 32 / lanes) {
            row_ref from = row_of(begin + r < count ? begin + r : count - 1);
            uint16_t *to = k + r * WIDTH_OF(DIM);
#pragma unroll
            for (uint32_t p = lane % lanes; p < DIM / 4; p += lanes)
                copy_piece<DIM>(p, from, dim, int8, to, to + RUN * WIDTH_OF(DIM));
        }
    }
    close_group();
}

/* Rows of a run that are to be kept, as they came to shared memory, to their frames; by a warp. */
template <int DIM, typename FRAME_OF>
static __device__ __forceinline__ void keep_rows(uint32_t begin, uint32_t count, uint32_t dim,
                                                 bool int8, const uint16_t *k, FRAME_OF frame_of) {
    uint32_t lane = threadIdx.x % 32;
    uint8_t *own = lane < RUN && begin + lane < count ? frame_of(begin + lane) : NULL;
    for (uint32_t left = __ballot_sync(FULL_WARP, own != NULL); left; left &= left - 1) {
        uint32_t r = (uint32_t)__ffs((int)left) - 1, most = NOT_INT8;
        uint4 *to = (uint4 *)__shfl_sync(FULL_WARP, (unsigned long long)own, (int)r);
        if (int8) most = *(const uint32_t *)(k + r * WIDTH_OF(DIM) + DIM);
        uint32_t half = most == NOT_INT8 ? dim / 8 : dim / 16; /* pieces of K, and of V */
        for (uint32_t p = lane; p < 2 * half; p += 32) {
            const uint16_t *from = k + (p >= half ? RUN + r : r) * WIDTH_OF(DIM);
            to[p] = ((const uint4 *)from)[p >= half ? p - half : p];
        }
        if (most != NOT_INT8 && lane == 0) to[2 * half] = uint4{most, 0, 0, 0};
    }
}

/* Keys 0 to `count` through all warps. ready(i): called by a warp before row_of of the keys of the
 * run that begins at i. sees(row, i, logit): whether vector `row` of the tile has key i. KEEP:
 * frame_of(i): where the rows of key i go, or NULL. */
template <int DIM, bool KEEP, typename READY, typename ROW_OF, typename SEES, typename FRAME_OF>
static __device__ __forceinline__ void
attend_keys(warp_state<DIM> &s, const uint16_t *q, uint16_t *own, uint32_t count, uint32_t dim,
            bool int8, READY ready, ROW_OF row_of, SEES sees, FRAME_OF frame_of) {
    const uint32_t stage = 2 * RUN * WIDTH_OF(DIM), step = TILE_WARPS * RUN;
    uint32_t lane = threadIdx.x % 32, first = threadIdx.x / 32 * RUN, turn = 0;
    ready(first);
    gather<DIM>(first, count, dim, int8, own, row_of);
    for (uint32_t begin = first; begin < count; begin += step, turn ^= 1) {
        ready(begin + step);
        gather<DIM>(begin + step, count, dim, int8, own + (turn ^ 1) * stage, row_of);
        wait_groups<1>();
        __syncwarp();
        uint16_t *k = own + turn * stage;
        if (KEEP) keep_rows<DIM>(begin, count, dim, int8, k, frame_of);
        if (KEEP && int8) __syncwarp();
        if (int8) restore_run<DIM>(dim, k, k + RUN * WIDTH_OF(DIM));
        float logit[2][4] = {};
        run_logits<DIM, 1, true>(q, ROWS, k, dim, logit);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t key = begin + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (key >= count || !sees(lane / 4 + i / 2 % 2 * 8, key, logit[i / 4][i % 4]))
                logit[i / 4][i % 4] = -INFINITY;
        }
        run_softmax<DIM, 1, false>(s, logit);
        run_values<DIM, 1, true>(s, k + RUN * WIDTH_OF(DIM), dim, logit);
        __syncwarp(); /* all lanes have read the stage that is filled next */
    }
    wait_groups<0>();
}

static __device__ __forceinline__ void always_ready(uint32_t) {
}

static __device__ __forceinline__ uint8_t *no_frame(uint32_t) {
    return NULL;
}

/* TIERED: of some pairs K and V are in memory of the host. */
template <int DIM, bool TIERED>
static __global__ void __launch_bounds__(TILE_THREADS)
    k_attend_sparse(const loci_cuda_look look, const loci_cuda_attend args) {
    extern __shared__ float4 shared[];
    __shared__ uint16_t list[LOCI_CUDA_CHUNK_MAX];
    uint32_t pair = blockIdx.x / args.chunks, chunk = blockIdx.x % args.chunks;
    size_t part = (size_t)pair * args.parts + chunk;
    float *partial = args.partial + (part * gridDim.y + blockIdx.y) * ROWS * (look.dim + 2);
    chunk_work w;
    bool any = chunk_of(look, args.chunk, args.chunks, &w);
    uint32_t count = any ? list_slots<TILE_THREADS>(look, w, list) : 0;
    if (count == 0) {
        put_nothing(partial, look.dim);
        return;
    }
    uint16_t *q = (uint16_t *)shared, *stages = q + 2 * ROWS * WIDTH_OF(DIM);
    split_vectors<DIM>(look, w.pair->kv_head, w.tile, q);
    __syncthreads();
    bool alone = w.row_low == w.row_high; /* the list is what every vector selected */
    row_ref kv = rows_of(w.pair, w.first);
    uint32_t row_bytes = w.pair->row_bytes;
    warp_state<DIM> s = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
    attend_keys<DIM, false>(
        s, q, stages + threadIdx.x / 32 * 4 * RUN * WIDTH_OF(DIM), count, look.dim, look.int8,
        always_ready,
        [&](uint32_t i) {
            return TIERED ? rows_at(args.cache, w.pair, w.first + list[i])
                          : kv + (size_t)list[i] * row_bytes;
        },
        [&](uint32_t row, uint32_t i, float) {
            return alone || selected(look, w, row, w.first + list[i]);
        },
        no_frame);
    __syncthreads();
    merge_warps<DIM>(s, look.dim, look.vectors - w.tile * ROWS, (float *)stages, partial);
}

#define LIST_EACH 4u /* listed tokens of a thread */
#define LIST_LOT (LIST_EACH * TILE_THREADS)

/* Where the rows of a lot of listed tokens stand, and to where those go that come from the host: as
 * many as there are free frames. By all threads. */
static __device__ __forceinline__ void list_tiered(const loci_cuda_look &look,
                                                   const loci_cuda_row_cache &cache, uint32_t h,
                                                   const loci_cuda_chosen *chosen, uint32_t count,
                                                   row_ref *rows, uint8_t **frames) {
    __shared__ uint32_t turn;
    uint32_t missed = 0, hits = 0, sum, slot;
#pragma unroll
    for (uint32_t j = 0; j < LIST_EACH; j++) {
        uint32_t i = j * TILE_THREADS + threadIdx.x;
        if (i >= count) continue;
        const loci_cuda_pair *pair = pair_at(look, h, chosen[i].place, &slot);
        uint32_t frame = frame_at(cache, pair, slot);
        frames[i] = NULL;
        rows[i] = frame ? frame_rows(cache, frame) + pair->int8 : rows_of(pair, slot);
        if (!pair->frame_of || !cache.frames) continue;
        if (frame) cache.use[frame - 1] = LOCI_CUDA_FRAME_USED;
        if (frame) hits++;
        if (!frame) missed |= 1u << j;
    }
    uint32_t before = sum_before<TILE_THREADS>((uint32_t)__popc(missed) | hits << 16, &sum);
    if (threadIdx.x == 0) turn = sum ? count_reads(cache, sum >> 16, sum & 0xffff) : 0;
    __syncthreads();
    uint32_t next = turn + (before & 0xffff);
#pragma unroll
    for (uint32_t j = 0; j < LIST_EACH; j++) {
        if (!(missed >> j & 1)) continue;
        uint32_t i = j * TILE_THREADS + threadIdx.x;
        const loci_cuda_pair *pair = pair_at(look, h, chosen[i].place, &slot);
        frames[i] = take_frame(cache, pair, slot, next++);
    }
    __syncthreads();
}

/* A block's share of what is selected for a head. */
struct listed_share {
    const loci_cuda_chosen *chosen;
    float *logits; /* of its first token and vector */
    uint32_t h, count;
    uint16_t *q, *stages;
};

static __device__ __forceinline__ void put_logit(const loci_cuda_look &look,
                                                 const loci_cuda_attend &args, float *logits,
                                                 uint32_t row, uint32_t i, float logit) {
    if (row < look.vectors) logits[row * args.room + i] = logit;
}

/* Rows that may stand in memory of the host: lot by lot, which all warps look up together. */
template <int DIM>
static __device__ __forceinline__ void attend_tiered(const loci_cuda_look &look,
                                                     const loci_cuda_attend &args,
                                                     const listed_share &w, warp_state<DIM> &s) {
    __shared__ row_ref rows[LIST_LOT];
    __shared__ uint8_t *frames[LIST_LOT];
    for (uint32_t at = 0; at < w.count; at += LIST_LOT) {
        uint32_t count = w.count - at < LIST_LOT ? w.count - at : LIST_LOT;
        list_tiered(look, args.cache, w.h, w.chosen + at, count, rows, frames);
        attend_keys<DIM, true>(
            s, w.q, w.stages + threadIdx.x / 32 * 4 * RUN * WIDTH_OF(DIM), count, look.dim,
            look.int8, always_ready, [&](uint32_t i) { return rows[i]; },
            [&](uint32_t row, uint32_t i, float logit) {
                put_logit(look, args, w.logits + at, row, i, logit);
                return true;
            },
            [&](uint32_t i) { return frames[i]; });
        __syncthreads();
    }
}

/* Rows on the device: a warp looks up those of its next run while it waits for the last ones. */
template <int DIM>
static __device__ __forceinline__ void attend_listed(const loci_cuda_look &look,
                                                     const loci_cuda_attend &args,
                                                     const listed_share &w, warp_state<DIM> &s) {
    __shared__ row_ref rows[TILE_WARPS][RUN];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, ahead = 0;
    auto place_of = [&](uint32_t run) {
        uint32_t i = run + lane < w.count ? run + lane : w.count - 1;
        return lane < RUN ? w.chosen[i].place : 0;
    };
    ahead = place_of(warp * RUN);
    __syncthreads(); /* queries are there */
    attend_keys<DIM, false>(
        s, w.q, w.stages + warp * 4 * RUN * WIDTH_OF(DIM), w.count, look.dim, look.int8,
        [&](uint32_t run) {
            uint32_t slot;
            if (run >= w.count) return;
            __syncwarp(); /* all lanes have read the run before */
            if (lane < RUN) {
                const loci_cuda_pair *pair = pair_at(look, w.h, ahead, &slot);
                rows[warp][lane] = rows_of(pair, slot);
            }
            __syncwarp();
            if (run + TILE_WARPS * RUN < w.count) ahead = place_of(run + TILE_WARPS * RUN);
        },
        [&](uint32_t i) { return rows[warp][i % RUN]; },
        [&](uint32_t row, uint32_t i, float logit) {
            put_logit(look, args, w.logits, row, i, logit);
            return true;
        },
        no_frame);
    __syncthreads();
}

/* The same for one row from the list of what is selected, in even shares. */
template <int DIM, bool TIERED>
static __global__ void __launch_bounds__(TILE_THREADS)
    k_attend_listed(const loci_cuda_look look, const loci_cuda_choice c,
                    const loci_cuda_attend args) {
    extern __shared__ float4 shared[];
    await_previous();
    uint32_t h = blockIdx.x / args.parts, part = blockIdx.x % args.parts, n = c.chosen_count[h];
    uint32_t share = (n + args.parts - 1) / args.parts, begin = part * share;
    uint32_t end = begin + share < n ? begin + share : n;
    float *partial = args.partial + (size_t)blockIdx.x * ROWS * (look.dim + 2);
    clear_counts(args);
    if (begin >= end) {
        put_nothing(partial, look.dim);
        return;
    }
    uint16_t *q = (uint16_t *)shared;
    const listed_share w = {c.chosen + (size_t)h * c.room + begin,
                            args.logits + (size_t)h * look.vectors * args.room + begin,
                            h,
                            end - begin,
                            q,
                            q + 2 * ROWS * WIDTH_OF(DIM)};
    split_vectors<DIM>(look, h, 0, q);
    warp_state<DIM> s = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
    if (TIERED)
        attend_tiered<DIM>(look, args, w, s);
    else
        attend_listed<DIM>(look, args, w, s);
    merge_warps<DIM>(s, look.dim, look.vectors, (float *)w.stages, partial);
}

/* Before tiles of many vectors: what any row selected and only the host has comes into frames, as
 * far as there are free ones. A warp has a row at a time; a slot is looked at by one warp alone. */
static __global__ void __launch_bounds__(TILE_THREADS)
    k_fetch_rows(const loci_cuda_look look, const loci_cuda_attend args) {
    __shared__ uint16_t list[LOCI_CUDA_CHUNK_MAX];
    chunk_work w;
    if (!chunk_of(look, args.chunk, args.chunks, &w) || !w.pair->frame_of) return;
    w.row_low = 0;
    w.row_high = look.mask_rows - 1;
    uint32_t count = list_slots<TILE_THREADS>(look, w, list), lane = threadIdx.x % 32, hits = 0;
    for (uint32_t i = threadIdx.x / 32; i < count; i += TILE_WARPS) {
        uint32_t slot = w.first + list[i], frame = frame_at(args.cache, w.pair, slot);
        unsigned long long to = 0;
        __syncwarp();
        if (frame) {
            if (lane == 0) args.cache.use[frame - 1] = LOCI_CUDA_FRAME_USED;
            hits++;
            continue;
        }
        if (lane == 0)
            to = (unsigned long long)take_frame(args.cache, w.pair, slot,
                                                count_reads(args.cache, 0, 1));
        to = __shfl_sync(FULL_WARP, to, 0);
        const uint4 *from = (const uint4 *)(w.pair->kv + (size_t)slot * w.pair->row_bytes);
        for (uint32_t p = lane; p < w.pair->row_bytes / 16 && to; p += 32)
            ((uint4 *)to)[p] = from[p];
    }
    if (lane == 0) (void)count_reads(args.cache, hits, 0);
}

template <int DIM, bool TIERED>
static cudaError_t launch_attend(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_attend *args) {
    size_t bytes = sparse_halves<DIM>() * sizeof(uint16_t);
    cudaError_t result = cudaFuncSetAttribute(
        k_attend_sparse<DIM, TIERED>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    dim3 grid(look->extents * look->kv_heads * args->chunks, loci_cuda_tiles(look->vectors));
    k_attend_sparse<DIM, TIERED><<<grid, TILE_THREADS, bytes, stream>>>(*look, *args);
    return cudaGetLastError();
}

/* What waits for an event of another stream does not overlap the kernel before. */
template <int DIM>
static cudaError_t launch_listed(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_choice *choice, const loci_cuda_attend *args) {
    size_t bytes = sparse_halves<DIM>() * sizeof(uint16_t);
    uint32_t grid = look->kv_heads * args->parts;
    auto kernel = args->cache.frames ? k_attend_listed<DIM, true> : k_attend_listed<DIM, false>;
    /* With what lists take, more than the usual even where this alone is not. */
    cudaError_t result =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    if (!args->cache.frames)
        return launch_behind(stream, kernel, grid, TILE_THREADS, bytes, *look, *choice, *args);
    kernel<<<grid, TILE_THREADS, bytes, stream>>>(*look, *choice, *args);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_attend_listed(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_choice *choice,
                                                 const loci_cuda_attend *args) {
    if (look->dim <= 32) return launch_listed<32>(stream, look, choice, args);
    if (look->dim <= 64) return launch_listed<64>(stream, look, choice, args);
    if (look->dim <= 128) return launch_listed<128>(stream, look, choice, args);
    return launch_listed<256>(stream, look, choice, args);
}

template <bool TIERED>
static cudaError_t launch_sparse(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_attend *args) {
    if (look->dim <= 32) return launch_attend<32, TIERED>(stream, look, args);
    if (look->dim <= 64) return launch_attend<64, TIERED>(stream, look, args);
    if (look->dim <= 128) return launch_attend<128, TIERED>(stream, look, args);
    return launch_attend<256, TIERED>(stream, look, args);
}

extern "C" cudaError_t loci_cuda_k_attend_sparse(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_attend *args) {
    if (look->extents == 0) return cudaSuccess;
    return args->cache.frames ? launch_sparse<true>(stream, look, args)
                              : launch_sparse<false>(stream, look, args);
}

extern "C" cudaError_t loci_cuda_k_fetch_rows(cudaStream_t stream, const loci_cuda_look *look,
                                              const loci_cuda_attend *args) {
    k_fetch_rows<<<look->extents * look->kv_heads * args->chunks, TILE_THREADS, 0, stream>>>(*look,
                                                                                             *args);
    return cudaGetLastError();
}

/* --- the merge of all parts ------------------------------------------------------------ */

#define JOIN_THREADS 512u
#define JOIN_WIDE 32u /* channels of a block */

/* A block for each (KV head, vector) and JOIN_WIDE channels. A thread has a channel and every
 * (JOIN_THREADS / JOIN_WIDE)-th part of a lot of JOIN_THREADS, whose weights stand in shared
 * memory. */
static __global__ void __launch_bounds__(JOIN_THREADS)
    k_join(const loci_cuda_look look, const loci_cuda_attend args) {
    __shared__ float buffer[WARPS_MAX], weight[JOIN_THREADS], sums[JOIN_THREADS];
    await_previous();
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors, t = threadIdx.x;
    uint32_t tiles = loci_cuda_tiles(look.vectors), parts = args.extents * args.parts;
    size_t row = look.dim + 2, stride = (size_t)tiles * ROWS * row;
    const float *from = args.partial + (size_t)v * row;
    /* Part p of the head: extent p / parts, part p % parts of its pair. */
    auto at = [&](uint32_t p) {
        size_t pair = (size_t)(p / args.parts) * look.kv_heads + h;
        return from + (pair * args.parts + p % args.parts) * stride;
    };
    float max = -INFINITY, sum = 0.0f, value = 0.0f;
    for (uint32_t p = t; p < parts; p += JOIN_THREADS) max = fmaxf(max, at(p)[look.dim]);
    max = block_max(max, buffer);
    float base = max > -INFINITY ? max : 0.0f;
    const uint32_t slices = JOIN_THREADS / JOIN_WIDE;
    uint32_t slice = t / JOIN_WIDE, wide = blockIdx.y * JOIN_WIDE + t % JOIN_WIDE;
    uint32_t d = wide < look.dim ? wide : look.dim - 1;
    for (uint32_t first = 0; first < parts; first += JOIN_THREADS) {
        uint32_t count = parts - first < JOIN_THREADS ? parts - first : JOIN_THREADS;
        float own = 0.0f, part_sum = t < count ? at(first + t)[look.dim + 1] : 0.0f;
        if (part_sum > 0.0f) own = expf(at(first + t)[look.dim] - base);
        sum += part_sum * own;
        __syncthreads();
        weight[t] = own;
        __syncthreads();
#pragma unroll 8
        for (uint32_t p = slice; p < count; p += slices) {
            float x = at(first + p)[d]; /* of an empty part anything */
            value += weight[p] > 0.0f ? x * weight[p] : 0.0f;
        }
    }
    sum = block_sum(sum, buffer);
    sums[t] = value;
    __syncthreads();
    uint32_t to_row = v / look.group, head = h * look.group + v % look.group;
    float *out = args.out + (size_t)to_row * args.out_stride + (size_t)head * look.dim;
    if (t < JOIN_WIDE && wide < look.dim) {
        for (uint32_t i = 1; i < slices; i++) value += sums[i * JOIN_WIDE + t];
        out[d] = sum > 0.0f ? value / sum : 0.0f;
    }
    if (t == 0 && blockIdx.y == 0)
        args.lse[(size_t)to_row * look.q_heads + head] = sum > 0.0f ? max + logf(sum) : -INFINITY;
}

extern "C" cudaError_t loci_cuda_k_join(cudaStream_t stream, const loci_cuda_look *look,
                                        const loci_cuda_attend *args) {
    dim3 grid(look->kv_heads * look->vectors, (look->dim + JOIN_WIDE - 1) / JOIN_WIDE);
    return launch_behind(stream, k_join, grid, JOIN_THREADS, 0, *look, *args);
}

static __global__ void k_mask_live(const loci_cuda_look look) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    uint32_t w = blockIdx.x * blockDim.x + threadIdx.x;
    if (w >= pair_words(pair)) return;
    uint32_t left = pair->tokens - w * 32;
    look.token_mask[mask_at(look, pair, 0) + w] = live_bits(pair, w * 32, left < 32 ? left : 32);
}

extern "C" cudaError_t loci_cuda_k_mask_live(cudaStream_t stream, const loci_cuda_look *look) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid((look->tokens_max / 32 + 256) / 256, look->extents * look->kv_heads);
    k_mask_live<<<grid, 256, 0, stream>>>(*look);
    return cudaGetLastError();
}
