/* SPDX-License-Identifier: Apache-2.0
 *
 * Exact attention over the tokens that masks hold, the merge of its parts, the attention mass of
 * segments, figures.
 *
 * A block takes a chunk of a pair's slots and a tile of vectors: it lists the slots that any row of
 * the tile selected, gathers their K and V in tiles, and leaves one partial result, which k_join
 * merges in the order of extents and slots. K and V are read once for all vectors of a tile.
 */
#include "attention/cuda/attend.cuh"
#include "attention/cuda/look.cuh"

#define CHUNK_WORDS (LOCI_CUDA_CHUNK / 32)

struct chunk_work {
    const loci_cuda_pair *pair;
    uint32_t part, tile;        /* part: pair and chunk */
    uint32_t first, words;      /* slot and number of mask words of the chunk */
    uint32_t row_low, row_high; /* rows of masks that the tile's vectors look at */
};

static __device__ __forceinline__ bool chunk_of(const loci_cuda_look &look, uint32_t chunks,
                                                chunk_work *w) {
    uint32_t chunk = blockIdx.x % chunks;
    w->pair = &look.pairs[blockIdx.x / chunks];
    w->part = blockIdx.x;
    w->tile = blockIdx.y;
    w->first = chunk * LOCI_CUDA_CHUNK;
    if (w->first >= w->pair->tokens) return false;
    uint32_t words = pair_words(w->pair) - chunk * CHUNK_WORDS;
    w->words = words < CHUNK_WORDS ? words : CHUNK_WORDS;
    uint32_t last = (w->tile + 1) * ROWS < look.vectors ? (w->tile + 1) * ROWS : look.vectors;
    bool shared = look.mask_rows == 1;
    w->row_low = shared ? 0 : w->tile * ROWS / look.group;
    w->row_high = shared ? 0 : (last - 1) / look.group;
    return true;
}

/* The slots of the chunk that any row of the tile selected, in their order; returns their number.
 * list: LOCI_CUDA_CHUNK entries of shared memory. */
static __device__ uint32_t list_slots(const loci_cuda_look &look, const chunk_work &w,
                                      uint16_t *list) {
    __shared__ uint32_t counts[CHUNK_WORDS + 1];
    uint32_t t = threadIdx.x, bits = 0;
    if (t < w.words)
        for (uint32_t row = w.row_low; row <= w.row_high; row++)
            bits |= look.token_mask[mask_at(look, w.pair, row) + w.first / 32 + t];
    if (t < CHUNK_WORDS) counts[t] = __popc(bits);
    __syncthreads();
    if (t == 0) {
        uint32_t sum = 0;
        for (uint32_t i = 0; i < CHUNK_WORDS; i++) {
            uint32_t count = counts[i];
            counts[i] = sum;
            sum += count;
        }
        counts[CHUNK_WORDS] = sum;
    }
    __syncthreads();
    if (t < w.words)
        for (uint32_t at = counts[t]; bits; bits &= bits - 1)
            list[at++] = (uint16_t)(t * 32 + __ffs((int)bits) - 1);
    __syncthreads();
    return counts[CHUNK_WORDS];
}

static __device__ __forceinline__ void load_vectors(const loci_cuda_look &look, const chunk_work &w,
                                                    const attend_memory &m) {
    const float *q = look.q + (size_t)w.pair->kv_head * look.vectors * look.dim;
    for (uint32_t i = threadIdx.x; i < ROWS * look.dim; i += ATTEND_THREADS) {
        uint32_t v = w.tile * ROWS + i / look.dim;
        m.q[i] = v < look.vectors ? q[(size_t)v * look.dim + i % look.dim] : 0.0f;
    }
    if (threadIdx.x < ROWS) {
        m.max[threadIdx.x] = -INFINITY;
        m.sum[threadIdx.x] = 0.0f;
    }
}

static __device__ __forceinline__ void load_slots(const loci_cuda_look &look, const chunk_work &w,
                                                  const attend_memory &m, const uint16_t *list,
                                                  uint32_t begin, uint32_t count, bool values) {
    uint32_t key = threadIdx.x / 8, lane = threadIdx.x % 8;
    const uint16_t *k = NULL, *v = NULL;
    if (begin + key < count) {
        k = w.pair->kv + (size_t)(w.first + list[begin + key]) * 2 * look.dim;
        v = k + look.dim;
    }
    load_row(m.k + (size_t)key * (m.width + 4), k, look.dim, m.width, true, lane, 8);
    if (values) load_row(m.v + (size_t)key * m.width, v, look.dim, m.width, true, lane, 8);
}

/* Whether vector `local` of the tile selected the slot. */
static __device__ __forceinline__ bool selected(const loci_cuda_look &look, const chunk_work &w,
                                                uint32_t local, uint32_t slot) {
    uint32_t v = w.tile * ROWS + local;
    if (v >= look.vectors) return false;
    if (look.mask_rows == 1) return true; /* the list is this set */
    uint32_t word = look.token_mask[mask_at(look, w.pair, v / look.group) + slot / 32];
    return word >> (slot % 32) & 1;
}

template <int DIM>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attend_sparse(const loci_cuda_look look, const loci_cuda_attend args) {
    extern __shared__ float4 shared[];
    __shared__ uint16_t list[LOCI_CUDA_CHUNK];
    attend_memory m = attend_layout((float *)shared, look.dim);
    uint32_t pair = blockIdx.x / args.chunks, chunk = blockIdx.x % args.chunks;
    size_t part = (size_t)pair * args.parts + chunk;
    float *partial = args.partial + (part * gridDim.y + blockIdx.y) * ROWS * (look.dim + 2);
    float acc[ROWS_OF(DIM)][EACH_OF(DIM)] = {};
    chunk_work w;
    bool any = chunk_of(look, args.chunks, &w);
    uint32_t count = any ? list_slots(look, w, list) : 0;
    if (count == 0) {
        if (threadIdx.x < ROWS) {
            partial[(size_t)threadIdx.x * (look.dim + 2) + look.dim] = -INFINITY;
            partial[(size_t)threadIdx.x * (look.dim + 2) + look.dim + 1] = 0.0f;
        }
        return;
    }
    load_vectors(look, w, m);
    for (uint32_t begin = 0; begin < count; begin += KEYS) {
        __syncthreads();
        load_slots(look, w, m, list, begin, count, true);
        __syncthreads();
        attend_logits(m, [&](uint32_t row, uint32_t lane, float logit) {
            bool seen =
                begin + lane < count && selected(look, w, row, w.first + list[begin + lane]);
            return seen ? logit : -INFINITY;
        });
        __syncthreads();
        attend_values<DIM>(m, acc);
    }
    __syncthreads();
    attend_store<DIM>(m, acc, look.dim, partial);
}

template <int DIM>
static cudaError_t launch_attend(cudaStream_t stream, const loci_cuda_look *look,
                                 const loci_cuda_attend *args) {
    size_t bytes = attend_floats(look->dim) * sizeof(float);
    cudaError_t result = cudaFuncSetAttribute(
        k_attend_sparse<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    dim3 grid(look->extents * look->kv_heads * args->chunks, loci_cuda_tiles(look->vectors));
    k_attend_sparse<DIM><<<grid, ATTEND_THREADS, bytes, stream>>>(*look, *args);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_attend_sparse(cudaStream_t stream, const loci_cuda_look *look,
                                                 const loci_cuda_attend *args) {
    if (look->extents == 0) return cudaSuccess;
    if (look->dim <= 32) return launch_attend<32>(stream, look, args);
    if (look->dim <= 64) return launch_attend<64>(stream, look, args);
    if (look->dim <= 128) return launch_attend<128>(stream, look, args);
    return launch_attend<256>(stream, look, args);
}

/* One block for each (KV head, vector). */
static __global__ void k_join(const loci_cuda_look look, const loci_cuda_attend args) {
    __shared__ float buffer[WARPS_MAX];
    uint32_t h = blockIdx.x / look.vectors, v = blockIdx.x % look.vectors;
    uint32_t tiles = loci_cuda_tiles(look.vectors), parts = look.extents * args.parts;
    size_t row = look.dim + 2, stride = (size_t)tiles * ROWS * row;
    const float *from = args.partial + (size_t)(v / ROWS * ROWS + v % ROWS) * row;
    /* Part p of the head: extent p / parts, part p % parts of its pair. */
    auto at = [&](uint32_t p) {
        size_t pair = (size_t)(p / args.parts) * look.kv_heads + h;
        return from + (pair * args.parts + p % args.parts) * stride;
    };
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t p = threadIdx.x; p < parts; p += blockDim.x) max = fmaxf(max, at(p)[look.dim]);
    max = block_max(max, buffer);
    float base = max > -INFINITY ? max : 0.0f;
    for (uint32_t p = threadIdx.x; p < parts; p += blockDim.x)
        sum += at(p)[look.dim + 1] * expf(at(p)[look.dim] - base);
    sum = block_sum(sum, buffer);
    uint32_t to_row = v / look.group, head = h * look.group + v % look.group;
    float *out = args.out + (size_t)to_row * args.out_stride + (size_t)head * look.dim;
    for (uint32_t d = threadIdx.x; d < look.dim; d += blockDim.x) {
        float value = 0.0f;
        for (uint32_t p = 0; p < parts; p++) {
            const float *part = at(p);
            if (part[look.dim + 1] > 0.0f) value += part[d] * expf(part[look.dim] - base);
        }
        out[d] = sum > 0.0f ? value / sum : 0.0f;
    }
    if (threadIdx.x == 0)
        args.lse[(size_t)to_row * look.q_heads + head] = sum > 0.0f ? max + logf(sum) : -INFINITY;
}

extern "C" cudaError_t loci_cuda_k_join(cudaStream_t stream, const loci_cuda_look *look,
                                        const loci_cuda_attend *args) {
    k_join<<<look->kv_heads * look->vectors, 128, 0, stream>>>(*look, *args);
    return cudaGetLastError();
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

/* --- attribution ----------------------------------------------------------------------- */

/* The weights of a tile's logits, relative to the vectors' totals, to the segments of its keys.
 * segment(lane): of a key; only its low lanes have one. */
template <typename SEEN, typename SEGMENT>
static __device__ __forceinline__ void
add_weights(const loci_cuda_look &look, const loci_cuda_attribution &args, const attend_memory &m,
            uint32_t kv_head, uint32_t tile, SEEN seen, SEGMENT segment) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float logit[2];
    attend_dots(m, logit);
    unsigned long long mass = 0;
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t local = 2 * warp + i, v = tile * ROWS + local, row = v / look.group;
        if (v >= look.vectors || row < args.row_begin || !seen(local, lane)) continue;
        uint32_t head = kv_head * look.group + v % look.group;
        float weight = expf(logit[i] - args.total_lse[(size_t)row * look.q_heads + head]);
        mass += (unsigned long long)((double)fminf(weight, 6.0e7f) * LOCI_CUDA_MASS_UNIT);
    }
    if (mass == 0) return;
    uint32_t to = segment(lane);
    if (to < args.segments) atomicAdd(&args.mass[to], mass);
}

static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attribute(const loci_cuda_look look, const loci_cuda_attribution args, uint32_t chunks) {
    extern __shared__ float4 shared[];
    __shared__ uint16_t list[LOCI_CUDA_CHUNK];
    attend_memory m = attend_layout((float *)shared, look.dim);
    chunk_work w;
    if (!chunk_of(look, chunks, &w)) return;
    uint32_t count = list_slots(look, w, list);
    load_vectors(look, w, m);
    for (uint32_t begin = 0; begin < count; begin += KEYS) {
        __syncthreads();
        load_slots(look, w, m, list, begin, count, false);
        __syncthreads();
        add_weights(
            look, args, m, w.pair->kv_head, w.tile,
            [&](uint32_t local, uint32_t lane) {
                return begin + lane < count &&
                       selected(look, w, local, w.first + list[begin + lane]);
            },
            [&](uint32_t lane) {
                uint32_t word = slot_word(w.pair, w.first + list[begin + lane], look.dim);
                return word >> 16 < w.pair->segments ? w.pair->segment_base + (word >> 16)
                                                     : 0xffffffffu;
            });
    }
}

/* The last segment of the flat part that begins at or before the token. */
static __device__ uint32_t flat_segment(const loci_cuda_attribution &args, uint32_t token) {
    uint32_t low = 0, high = args.flat_segments;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (args.flat_segment_begin[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return args.flat_segment_base + low;
}

/* Flat tokens, KEYS a block; all vectors of one KV head. */
static __global__ void __launch_bounds__(ATTEND_THREADS)
    k_attribute_flat(const loci_cuda_look look, const loci_cuda_attribution args) {
    extern __shared__ float4 shared[];
    attend_memory m = attend_layout((float *)shared, look.dim);
    uint32_t h = blockIdx.y, begin = blockIdx.x * KEYS, key = threadIdx.x / 8;
    const uint16_t *k = NULL;
    if (begin + key < args.flat_tokens)
        k = args.flat_k + ((size_t)(begin + key) * look.kv_heads + h) * look.dim;
    load_row(m.k + (size_t)key * (m.width + 4), k, look.dim, m.width, true, threadIdx.x % 8, 8);
    for (uint32_t tile = 0; tile * ROWS < look.vectors; tile++) {
        __syncthreads();
        const float *q = look.q + (size_t)h * look.vectors * look.dim;
        for (uint32_t i = threadIdx.x; i < ROWS * look.dim; i += ATTEND_THREADS) {
            uint32_t v = tile * ROWS + i / look.dim;
            m.q[i] = v < look.vectors ? q[(size_t)v * look.dim + i % look.dim] : 0.0f;
        }
        __syncthreads();
        add_weights(
            look, args, m, h, tile,
            [&](uint32_t, uint32_t lane) { return begin + lane < args.flat_tokens; },
            [&](uint32_t lane) { return flat_segment(args, begin + lane); });
    }
}

static __global__ void k_add_mass(const loci_cuda_attribution args) {
    uint32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s < args.segments) args.out[s] += (float)((double)args.mass[s] / LOCI_CUDA_MASS_UNIT);
}

extern "C" cudaError_t loci_cuda_k_attribute(cudaStream_t stream, const loci_cuda_look *look,
                                             const loci_cuda_attribution *args) {
    size_t bytes = attend_floats(look->dim) * sizeof(float);
    uint32_t chunks = loci_cuda_chunks(look->tokens_max);
    cudaError_t result =
        cudaFuncSetAttribute(k_attribute, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result == cudaSuccess)
        result = cudaFuncSetAttribute(k_attribute_flat, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)bytes);
    if (result == cudaSuccess && look->extents > 0) {
        dim3 grid(look->extents * look->kv_heads * chunks, loci_cuda_tiles(look->vectors));
        k_attribute<<<grid, ATTEND_THREADS, bytes, stream>>>(*look, *args, chunks);
        result = cudaGetLastError();
    }
    if (result == cudaSuccess && args->flat_tokens > 0) {
        dim3 grid((args->flat_tokens + KEYS - 1) / KEYS, look->kv_heads);
        k_attribute_flat<<<grid, ATTEND_THREADS, bytes, stream>>>(*look, *args);
        result = cudaGetLastError();
    }
    if (result != cudaSuccess || args->segments == 0) return result;
    k_add_mass<<<(args->segments + 255) / 256, 256, 0, stream>>>(*args);
    return cudaGetLastError();
}

/* --- figures --------------------------------------------------------------------------- */

/* One block for each pair. */
static __global__ void k_stats(const loci_cuda_look look, loci_cuda_stats *stats) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    unsigned long long selected = 0, read = 0, live = 0, leaf_tokens = 0;
    for (uint32_t w = threadIdx.x; w < pair_words(pair); w += blockDim.x) {
        uint32_t all = 0, left = pair->tokens - w * 32;
        for (uint32_t row = 0; row < look.mask_rows; row++) {
            uint32_t bits = look.token_mask[mask_at(look, pair, row) + w];
            selected += __popc(bits);
            all |= bits;
        }
        read += __popc(all);
        live += __popc(live_bits(pair, w * 32, left < 32 ? left : 32));
    }
    for (uint32_t l = threadIdx.x; l < pair->leaves; l += blockDim.x) {
        uint32_t begin = pair->leaf_begin[l], count = pair->leaf_begin[l + 1] - begin, all = 0;
        for (uint32_t row = 0; row < look.mask_rows && !all; row++)
            all = mask_bits(look.token_mask + mask_at(look, pair, row), begin, count);
        if (all) leaf_tokens += count;
    }
    if (look.mask_rows == 1) selected *= look.rows;
    atomicAdd(&stats->selected_tokens, selected);
    atomicAdd(&stats->kv_bytes, read * 4 * look.dim);
    atomicAdd(&stats->kv_leaf_bytes, leaf_tokens * 4 * look.dim);
    atomicAdd(&stats->dense_kv_bytes, live * 4 * look.dim);
}

extern "C" cudaError_t loci_cuda_k_stats(cudaStream_t stream, const loci_cuda_look *look,
                                         loci_cuda_stats *stats) {
    if (look->extents == 0) return cudaSuccess;
    k_stats<<<look->extents * look->kv_heads, 256, 0, stream>>>(*look, stats);
    return cudaGetLastError();
}
