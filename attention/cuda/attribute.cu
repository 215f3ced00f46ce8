/* SPDX-License-Identifier: Apache-2.0
 *
 * What attention over a corpus tells beside its output: the attention mass of segments, and the
 * figures of a look-up. Those of a single row, and masses of each of a few rows where
 * whole_wide.cu does not serve, come from the logits that attention left; else a block takes a
 * chunk of a pair's slots and a tile of vectors, lists what masks hold and reads their keys again.
 */
#include "attention/cuda/attribute.cuh"
#include "attention/cuda/chunks.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda/whole.h"

/* --- attribution ----------------------------------------------------------------------- */

/* NaN where a row has nothing at all. */
static __device__ __forceinline__ float weight_of(float below_total) {
    return below_total > -INFINITY ? share_of(below_total) : 0.0f;
}

static __device__ __forceinline__ mass_t mass_of(float below_total) {
    return mass_of_weight(weight_of(below_total));
}

/* Shared memory of k_attribute: queries, rounded and the rest; for each warp two stages of K. */
template <int DIM> static __host__ __device__ constexpr uint32_t attribute_halves(void) {
    return (2 + 2 * TILE_WARPS) * RUN * WIDTH_OF(DIM);
}

/* Begins to copy the keys of a run, by one warp. Past the end comes the last one again. */
template <int DIM>
static __device__ __forceinline__ void
gather_keys(const loci_cuda_look &look, const loci_cuda_row_cache &cache, const chunk_work &w,
            const uint16_t *list, uint32_t begin, uint32_t count, uint16_t *k) {
    const uint32_t lanes = DIM / 8;
    uint32_t lane = threadIdx.x % 32, p = lane % lanes;
    if (begin < count) {
#pragma unroll
        for (uint32_t r = lane / lanes; r < RUN; r += 32 / lanes) {
            uint32_t i = begin + r < count ? begin + r : count - 1;
            row_ref from = rows_at(cache, w.pair, w.first + list[i]);
            uint16_t *to = k + r * WIDTH_OF(DIM);
            if (p < look.dim / (row_is_int8(from) ? 16 : 8))
                copy_piece<DIM>(p, from, look.dim, look.int8, to, NULL);
        }
    }
    close_group();
}

/* The weights of a run's logits to the segments of its keys. total: of the lane's two vectors. */
static __device__ __forceinline__ void
add_run(const loci_cuda_look &look, const loci_cuda_attribution &args, const chunk_work &w,
        const uint16_t *list, uint32_t begin, uint32_t count, const float (&logit)[2][4],
        const float (&total)[2]) {
    uint32_t lane = threadIdx.x % 32;
    mass_t mass[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t key = begin + i / 4 * 8 + lane % 4 * 2 + i % 2, half = i / 2 % 2;
        if (key < count && selected(look, w, lane / 4 + half * 8, w.first + list[key]))
            mass[i / 4 * 2 + i % 2] += mass_of(logit[i / 4][i % 4] - total[half]);
    }
    mass_t own = 0;
#pragma unroll
    for (uint32_t k = 0; k < 4; k++) {
        for (int offset = 4; offset < 32; offset *= 2)
            mass[k] += __shfl_xor_sync(FULL_WARP, mass[k], offset);
        if (lane / 4 == k) own = mass[k];
    }
    if (own == 0) return;
    uint32_t key = begin + lane / 4 / 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
    uint32_t segment = slot_word(w.pair, w.first + list[key], look.dim) >> 16;
    if (segment >= w.pair->segments || w.pair->segment_base + segment >= args.segments) return;
    atomicAdd(&args.mass[w.pair->segment_base + segment], own);
}

template <int DIM>
static __global__ void __launch_bounds__(TILE_THREADS)
    k_attribute(const loci_cuda_look look, const loci_cuda_attribution args, uint32_t chunk,
                uint32_t chunks) {
    extern __shared__ float4 shared[];
    __shared__ uint16_t list[LOCI_CUDA_CHUNK_MAX];
    const uint32_t stage = RUN * WIDTH_OF(DIM), step = TILE_WARPS * RUN;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, turn = 0;
    uint16_t *q = (uint16_t *)shared, *own = q + (2 + 2 * warp) * stage;
    float total[2];
    chunk_work w;
    if (!chunk_of(look, chunk, chunks, &w)) return;
    if ((w.tile + 1) * ROWS <= args.row_begin * look.group ||
        w.tile * ROWS >= args.row_end * look.group)
        return;
    uint32_t count = list_slots<TILE_THREADS>(look, w, list);
    split_vectors<DIM>(look, w.pair->kv_head, w.tile, q);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t v = w.tile * ROWS + lane / 4 + half * 8;
        total[half] = total_of(look, args, w.pair->kv_head, v);
    }
    __syncthreads();
    gather_keys<DIM>(look, args.cache, w, list, warp * RUN, count, own);
    for (uint32_t begin = warp * RUN; begin < count; begin += step, turn ^= 1) {
        gather_keys<DIM>(look, args.cache, w, list, begin + step, count, own + (turn ^ 1) * stage);
        wait_groups<1>();
        __syncwarp();
        if (look.int8) restore_rows<DIM>(look.dim, false, own + turn * stage, own + turn * stage);
        float logit[2][4] = {};
        run_logits<DIM, 1, true>(q, ROWS, own + turn * stage, look.dim, logit);
        __syncwarp(); /* all lanes have read the stage that is filled next */
        add_run(look, args, w, list, begin, count, logit, total);
    }
    wait_groups<0>();
}

/* The last segment of the flat part that begins at or before the token. */
static __device__ uint32_t flat_segment(const loci_cuda_attribution &args, uint32_t token) {
    return args.flat_segment_base + last_at_most(args.flat_segments, token, [&](uint32_t s) {
               return args.flat_segment_begin[s];
           });
}

/* The weights of a tile's logits, relative to the vectors' totals, to the segment of the lane's
 * flat token. */
static __device__ __forceinline__ void add_flat(const loci_cuda_look &look,
                                                const loci_cuda_attribution &args,
                                                const attend_memory &m, uint32_t kv_head,
                                                uint32_t tile, uint32_t token) {
    float logit[2];
    attend_dots(m, logit);
    mass_t mass[2] = {};
    uint32_t first = tile * ROWS + 2 * (threadIdx.x / 32), at[2];
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t v = first + i, row = at[i] = v / look.group;
        if (v >= look.vectors || !counts_row(args, row) || token >= args.flat_tokens) continue;
        uint32_t head = kv_head * look.group + v % look.group;
        mass[i] = mass_of(logit[i] - args.total_lse[(size_t)row * look.q_heads + head]);
    }
    if (!args.each || at[0] == at[1]) {
        mass[0] += mass[1];
        mass[1] = 0;
    }
    if (mass[0] == 0 && mass[1] == 0) return;
    uint32_t to = flat_segment(args, token);
    if (to >= args.segments) return;
    for (uint32_t i = 0; i < 2; i++)
        if (mass[i]) atomicAdd(&args.mass[mass_at(args, at[i], to)], mass[i]);
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
        add_flat(look, args, m, h, tile, begin + threadIdx.x % 32);
    }
}

/* Masses join the outputs, one for each blockIdx.y, and begin anew. */
static __global__ void k_add_mass(const loci_cuda_attribution args) {
    uint32_t s = blockIdx.x * blockDim.x + threadIdx.x;
    float *out = args.out[blockIdx.y];
    await_previous();
    if (s >= args.segments) return;
    mass_t *mass = &args.mass[mass_at(args, blockIdx.y, s)];
    if (out) out[s] += (float)((double)*mass / LOCI_CUDA_MASS_UNIT);
    *mass = 0;
}

#define LIST_THREADS 256u
#define LIST_SEGMENTS 32u
#define WHOLE_THREADS 1024u
#define WHOLE_BLOCKS 264u    /* of all KV heads and rows together */
#define WHOLE_SEGMENTS 6144u /* as many as need no more shared memory than any kernel may use */

/* Blocks of LIST_THREADS for a KV head's list, by the tokens that there are: the host does not know
 * how many it has. */
static uint32_t list_blocks(const loci_cuda_look *look) {
    uint32_t blocks = look->words * 32 / (4 * LIST_THREADS);
    return blocks < 16 ? 16 : blocks > 256 ? 256 : blocks;
}

/* A row's segments from the logits of what it attended to: LISTED, what `chosen` holds, else all
 * places, where tokens that are not live have none. Blocks of one place are next to each other row
 * by row, since they read the same words of slots. together: a block adds up masses in shared
 * memory first, where many tokens are to few segments. */
template <bool LISTED, uint32_t THREADS>
static __global__ void __launch_bounds__(THREADS)
    k_attribute_kept(const loci_cuda_look look, const loci_cuda_choice c,
                     const loci_cuda_attribution args, bool together) {
    extern __shared__ float4 shared[];
    mass_t *own = (mass_t *)shared;
    uint32_t row = LISTED ? 0 : blockIdx.x % look.rows, first_block = blockIdx.x / look.rows;
    mass_t *masses = args.mass + mass_at(args, row, 0);
    for (uint32_t s = threadIdx.x; s < args.segments && together; s += THREADS) own[s] = 0;
    await_previous();
    if (!counts_row(args, row) || (args.each && !args.out[row])) return;
    __syncthreads();
    uint32_t h = blockIdx.y, n = LISTED ? c.chosen_count[h] : look.words * 32;
    const float *logits =
        args.logits + ((size_t)h * look.rows + row) * look.group * (size_t)args.room;
    const float *total = args.total_lse + (size_t)row * look.q_heads + h * look.group;
    for (uint32_t i = first_block * THREADS + threadIdx.x; i < n;
         i += gridDim.x / look.rows * THREADS) {
        uint32_t slot = 0, segment = 0;
        const loci_cuda_pair *pair = NULL;
        if (LISTED) segment = c.chosen[(size_t)h * c.room + i].segment;
        if (!LISTED) pair = pair_at(look, h, i, &slot);
        if (!LISTED && slot >= pair->tokens) continue;
        mass_t mass = 0; /* an integer for eight heads, added in the order of add_lanes */
        static_assert(LOCI_CUDA_LOT == 8, "what add_lanes adds up");
        for (uint32_t first = 0; first < look.group; first += LOCI_CUDA_LOT) {
            float below[LOCI_CUDA_LOT]; /* all under way at once */
#pragma unroll
            for (uint32_t g = 0; g < LOCI_CUDA_LOT; g++)
                below[g] = first + g < look.group
                               ? logits[(first + g) * args.room + i] - total[first + g]
                               : -INFINITY;
#pragma unroll
            for (uint32_t g = 0; g < LOCI_CUDA_LOT; g++) below[g] = weight_of(below[g]);
            mass += mass_of_weight(((below[0] + below[4]) + (below[2] + below[6])) +
                                   ((below[1] + below[5]) + (below[3] + below[7])));
        }
        if (mass == 0) continue;
        if (!LISTED) {
            segment = slot_word(pair, slot, look.dim) >> 16;
            if (segment >= pair->segments) continue;
            segment += pair->segment_base;
        }
        if (segment >= args.segments) continue;
        if (together)
            add_mass(&own[segment], mass);
        else
            atomicAdd(&masses[segment], mass);
    }
    __syncthreads();
    for (uint32_t s = threadIdx.x; s < args.segments && together; s += THREADS)
        if (own[s]) atomicAdd(&masses[s], own[s]);
}

static cudaError_t attribute_kept(cudaStream_t stream, const loci_cuda_look *look,
                                  const loci_cuda_choice *choice,
                                  const loci_cuda_attribution *args) {
    bool together = args->segments <= (choice ? LIST_SEGMENTS : WHOLE_SEGMENTS);
    size_t bytes = together ? args->segments * sizeof(mass_t) : 0;
    if (args->row_begin >= args->row_end) return cudaSuccess;
    if (choice)
        return launch_behind(stream, k_attribute_kept<true, LIST_THREADS>,
                             dim3(list_blocks(look), look->kv_heads), LIST_THREADS, bytes, *look,
                             *choice, *args, together);
    uint32_t blocks = WHOLE_BLOCKS / (look->kv_heads * look->rows);
    uint32_t most = (look->words * 32 + WHOLE_THREADS - 1) / WHOLE_THREADS;
    if (blocks > most) blocks = most;
    if (blocks == 0) blocks = 1;
    dim3 grid(blocks * look->rows, look->kv_heads);
    return launch_behind(stream, k_attribute_kept<false, WHOLE_THREADS>, grid, WHOLE_THREADS, bytes,
                         *look, loci_cuda_choice{}, *args, together);
}

template <int DIM>
static cudaError_t launch_attribute(cudaStream_t stream, const loci_cuda_look *look,
                                    const loci_cuda_attribution *args) {
    const uint32_t bytes = attribute_halves<DIM>() * sizeof(uint16_t);
    uint32_t chunk = loci_cuda_chunk(look), chunks = loci_cuda_chunks(look->tokens_max, chunk);
    dim3 grid(look->extents * look->kv_heads * chunks, loci_cuda_tiles(look->vectors));
    cudaError_t result = cudaFuncSetAttribute(
        k_attribute<DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    k_attribute<DIM><<<grid, TILE_THREADS, bytes, stream>>>(*look, *args, chunk, chunks);
    return cudaGetLastError();
}

/* Reads the keys again. */
static cudaError_t attribute_anew(cudaStream_t stream, const loci_cuda_look *look,
                                  const loci_cuda_attribution *args) {
    if (args->wide_chunk) return loci_cuda_k_attribute_wide(stream, look, args);
    if (look->dim <= 32) return launch_attribute<32>(stream, look, args);
    if (look->dim <= 64) return launch_attribute<64>(stream, look, args);
    if (look->dim <= 128) return launch_attribute<128>(stream, look, args);
    return launch_attribute<256>(stream, look, args);
}

/* Segments of pairs. */
static cudaError_t attribute_pairs(cudaStream_t stream, const loci_cuda_look *look,
                                   const loci_cuda_choice *choice,
                                   const loci_cuda_attribution *args) {
    cudaError_t result = cudaSuccess;
    if (args->logits) return attribute_kept(stream, look, choice, args);
    if (!args->each || args->wide_chunk) return attribute_anew(stream, look, args);
    for (uint32_t row = args->row_begin; row < args->row_end && result == cudaSuccess; row++) {
        loci_cuda_attribution one = *args;
        one.row_begin = row;
        one.row_end = row + 1;
        one.each = false;
        one.mass = args->mass + (size_t)row * args->segments;
        if (args->out[row]) result = attribute_anew(stream, look, &one);
    }
    return result;
}

extern "C" cudaError_t loci_cuda_k_attribute(cudaStream_t stream, const loci_cuda_look *look,
                                             const loci_cuda_choice *choice,
                                             const loci_cuda_attribution *args) {
    if (args->segments == 0) return cudaSuccess;
    if (look->extents > 0) {
        cudaError_t result = attribute_pairs(stream, look, choice, args);
        if (result != cudaSuccess) return result;
    }
    if (args->flat_tokens > 0) {
        size_t bytes = attend_floats(look->dim) * sizeof(float);
        cudaError_t result =
            cudaFuncSetAttribute(k_attribute_flat, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)(attend_floats(MAX_DIM) * sizeof(float)));
        if (result != cudaSuccess) return result;
        dim3 grid((args->flat_tokens + KEYS - 1) / KEYS, look->kv_heads);
        k_attribute_flat<<<grid, ATTEND_THREADS, bytes, stream>>>(*look, *args);
        result = cudaGetLastError();
        if (result != cudaSuccess) return result;
    }
    dim3 grid((args->segments + 255) / 256, args->each ? look->rows : 1);
    return launch_behind(stream, k_add_mass, grid, 256, 0, *args);
}

/* --- figures --------------------------------------------------------------------------- */

#define STATS_THREADS LIST_THREADS

static __device__ __forceinline__ void add_base(loci_cuda_stats *stats,
                                                const loci_cuda_stats &base) {
    if (base.root_bytes) atomicAdd(&stats->root_bytes, base.root_bytes);
    if (base.leaf_bytes) atomicAdd(&stats->leaf_bytes, base.leaf_bytes);
    atomicAdd(&stats->dense_kv_bytes, base.dense_kv_bytes);
}

/* Adds what all threads of a block have; one atomic a block, since all go to one place. */
static __device__ __forceinline__ void add_figure(unsigned long long *to, unsigned long long own) {
    __shared__ unsigned long long warps[STATS_THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(FULL_WARP, own, offset);
    __syncthreads(); /* all have read the sums of a call before */
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < STATS_THREADS / 32; w++) own += warps[w];
    if (own) atomicAdd(to, own);
}

/* Word w of a pair's masks: which bits any of the rows has; *bits grows by how many all have. */
static __device__ __forceinline__ uint32_t count_word(const loci_cuda_look &look,
                                                      const uint32_t *mask,
                                                      const loci_cuda_pair *pair, uint32_t rows,
                                                      uint32_t w, unsigned long long *bits) {
    uint32_t any = 0;
    for (uint32_t row = 0; row < rows; row++) {
        uint32_t word = mask[mask_at(look, pair, row) + w];
        *bits += __popc(word);
        any |= word;
    }
    return any;
}

/* What candidates and roots of one pair took to read: root nodes, blocks of kept roots, records. */
static __device__ void add_choice(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const loci_cuda_pair *pair, loci_cuda_stats *stats) {
    const loci_cuda_head *head = &look.heads[pair->kv_head];
    uint32_t first = blockIdx.y * STATS_THREADS + threadIdx.x, step = gridDim.y * STATS_THREADS;
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
    for (uint32_t w = first; w < pair_words(pair); w += step)
        records += __popc(count_word(look, c.candidates, pair, look.rows, w, &candidates));
    add_figure(&stats->leaf_bytes, blocks);
    add_figure(&stats->code_bytes, records * pair->record_stride);
    add_figure(&stats->candidate_tokens, candidates);
    if (c.tail) add_figure(&stats->tail_bytes, tail);
}

/* gridDim.y blocks for each pair. base: what the host knows; CHOICE: mode hierarchical. */
template <bool CHOICE>
static __global__ void __launch_bounds__(STATS_THREADS)
    k_stats(const loci_cuda_look look, const loci_cuda_choice c, const loci_cuda_stats base,
            loci_cuda_stats *stats) {
    const loci_cuda_pair *pair = &look.pairs[blockIdx.x];
    uint32_t first = blockIdx.y * STATS_THREADS + threadIdx.x, step = gridDim.y * STATS_THREADS;
    unsigned long long selected = 0, read = 0, leaf_tokens = 0;
    for (uint32_t w = first; w < pair_words(pair); w += step)
        read += __popc(count_word(look, look.token_mask, pair, look.mask_rows, w, &selected));
    for (uint32_t l = first; l < pair->leaves && !c.limit; l += step) {
        uint32_t begin = pair->leaf_begin[l], count = pair->leaf_begin[l + 1] - begin, all = 0;
        for (uint32_t row = 0; row < look.mask_rows && !all; row++)
            all = mask_bits(look.token_mask + mask_at(look, pair, row), begin, count);
        if (all) leaf_tokens += count;
    }
    if (look.mask_rows == 1) selected *= look.rows;
    add_figure(&stats->selected_tokens, selected);
    add_figure(&stats->kv_bytes, read * look.row_bytes);
    add_figure(&stats->kv_leaf_bytes, (c.limit ? read : leaf_tokens) * look.row_bytes);
    if (CHOICE) add_choice(look, c, pair, stats);
    if (blockIdx.x == 0 && first == 0) add_base(stats, base);
}

/* Tokens of the leaf of chosen token i, unless the one before it is of the same leaf. */
static __device__ uint32_t leaf_tokens_of(const loci_cuda_look &look, uint32_t h,
                                          const loci_cuda_chosen *chosen, uint32_t i) {
    uint32_t slot, before = i ? chosen[i - 1].place : 0;
    const loci_cuda_pair *pair = pair_at(look, h, chosen[i].place, &slot);
    uint32_t leaf =
        last_at_most(pair->leaves, slot, [&](uint32_t l) { return pair->leaf_begin[l]; });
    uint32_t begin = pair->leaf_begin[leaf], end = pair->leaf_begin[leaf + 1];
    return i && before >= pair->word_base * 32 + begin ? 0 : end - begin;
}

/* The figures of one row from its lists; gridDim.x blocks for each KV head. */
static __global__ void __launch_bounds__(STATS_THREADS)
    k_stats_listed(const loci_cuda_look look, const loci_cuda_choice c, const loci_cuda_stats base,
                   loci_cuda_stats *stats) {
    await_previous();
    uint32_t h = blockIdx.y, n = c.count[h], chosen = c.chosen_count[h];
    uint32_t first = blockIdx.x * STATS_THREADS + threadIdx.x, step = gridDim.x * STATS_THREADS;
    const loci_cuda_head *head = &look.heads[h];
    unsigned long long blocks = 0, leaf_tokens = 0;
    for (uint32_t e = 0; e < look.extents; e++) {
        size_t index = (size_t)e * look.kv_heads + h;
        const loci_cuda_pair *pair = &look.pairs[index];
        const uint16_t *kept = c.kept + head->root_at + pair->root_base;
        for (uint32_t i = first; i < c.kept_count[index]; i += step) {
            const loci_cuda_root *root = &pair->root_table[kept[i]];
            blocks += root->leaves * 4 + (root->tokens + 31) / 32 * (look.dim / 4) * 16;
        }
    }
    for (uint32_t i = first; i < chosen && !c.limit; i += step)
        leaf_tokens += leaf_tokens_of(look, h, c.chosen + (size_t)h * c.room, i);
    if (c.limit && first == 0) leaf_tokens = chosen;
    add_figure(&stats->leaf_bytes, blocks);
    add_figure(&stats->kv_leaf_bytes, leaf_tokens * look.row_bytes);
    if (first != 0) return;
    atomicAdd(&stats->selected_tokens, (unsigned long long)chosen);
    atomicAdd(&stats->kv_bytes, (unsigned long long)look.row_bytes * chosen);
    atomicAdd(&stats->candidate_tokens, (unsigned long long)n);
    atomicAdd(&stats->code_bytes, (unsigned long long)n * look.pairs[h].record_stride);
    if (h == 0) add_base(stats, base);
}

extern "C" cudaError_t loci_cuda_k_stats(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice,
                                         const loci_cuda_stats *base, loci_cuda_stats *stats) {
    if (look->extents == 0) return cudaSuccess;
    dim3 grid(look->extents * look->kv_heads, 32);
    if (choice)
        k_stats<true><<<grid, STATS_THREADS, 0, stream>>>(*look, *choice, *base, stats);
    else
        k_stats<false><<<grid, STATS_THREADS, 0, stream>>>(*look, loci_cuda_choice{}, *base, stats);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_stats_listed(cudaStream_t stream, const loci_cuda_look *look,
                                                const loci_cuda_choice *choice,
                                                const loci_cuda_stats *base,
                                                loci_cuda_stats *stats) {
    return launch_behind(stream, k_stats_listed, dim3(list_blocks(look), look->kv_heads),
                         STATS_THREADS, 0, *look, *choice, *base, stats);
}
