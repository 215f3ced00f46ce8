/* SPDX-License-Identifier: Apache-2.0
 *
 * A part of whole_wide.cu: attribution where each of a few rows has masses of its own. Places of
 * the products are eights of one row, so a warp has two such eights, and what it sums over eight
 * lanes is a row's. Both warpgroups that multiply have all eights of a block and every other tile.
 * What they found in a tile goes to the masses beside the next one's products.
 */
#ifndef LOCI_ATTENTION_CUDA_WHOLE_EACH_CUH
#define LOCI_ATTENTION_CUDA_WHOLE_EACH_CUH

#define EACH_STAGES 4
#define EACH_EIGHTS (GROUP_VECTORS / 8)
#define EACH_SEGMENTS 640u /* whose masses there is room for in a block */

/* What a warpgroup found in a tile, in turns: weights that are summed over eight vectors, in rows
 * that begin in other banks, and the slots' segments. */
struct each_tile {
    float sums[2][EACH_EIGHTS][TILE_SLOTS + 4];
    uint32_t segment[2][TILE_SLOTS];
};

#if HAS_WGMMA

/* The number of a slot's segment among those of the view, or a greater one. */
static __device__ __forceinline__ uint32_t segment_of(const loci_cuda_attribution &args,
                                                      const wide_work &w, uint32_t word) {
    uint32_t segment = word >> 16;
    return segment < w.pair->segments ? w.pair->segment_base + segment : args.segments;
}

/* As weigh_tile, each eight of the warp by itself. */
template <int DIM, typename MEANWHILE>
static __device__ __forceinline__ void
weigh_eights(const wide_work &w, wide_stage *stages, uint32_t q, uint32_t memory, uint32_t tile,
             uint32_t n, const float (&total)[2], float (*sums)[TILE_SLOTS + 4],
             MEANWHILE meanwhile) {
    float s[64];
    key_logits<DIM, GROUP_VECTORS, true, EACH_STAGES>(w, stages, q, memory, tile, n, s, meanwhile);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float c[32];
#pragma unroll
        for (uint32_t i = 0; i < 32; i++)
            c[i] = share_of(s[i / 2 * 4 + half * 2 + i % 2] - total[half]);
        add_lanes(c, sums[half]);
    }
}

/* What a tile's slots have of the attention of the block's eights, to the rows' masses of their
 * segments; lanes of the same slot add side by side. */
static __device__ __forceinline__ void add_slots(const loci_cuda_attribution &args,
                                                 const each_tile *found, uint32_t turn,
                                                 uint32_t row, mass_t *own) {
    uint32_t thread = threadIdx.x % WARPGROUP, segment[EACH_EIGHTS];
    mass_t mass[EACH_EIGHTS];
#pragma unroll
    for (uint32_t i = 0; i < EACH_EIGHTS; i++) { /* all under way at once */
        uint32_t slot = i * (WARPGROUP / EACH_EIGHTS) + thread / EACH_EIGHTS;
        segment[i] = found->segment[turn][slot];
        mass[i] = mass_of_weight(found->sums[turn][thread % EACH_EIGHTS][slot]);
    }
#pragma unroll
    for (uint32_t i = 0; i < EACH_EIGHTS; i++) {
        if (mass[i] == 0 || segment[i] >= args.segments) continue;
        size_t at = each_at(row, segment[i]);
        if (own)
            add_mass(&own[at], mass[i]);
        else
            atomicAdd(&args.mass[at], mass[i]);
    }
}

static __device__ __forceinline__ void await_group(uint32_t group) {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + group), "n"(WARPGROUP) : "memory");
}

/* A warpgroup's tiles, every other one. */
template <int DIM>
static __device__ __forceinline__ void
each_tiles(const loci_cuda_look &look, const loci_cuda_attribution &args, const wide_work &w,
           wide_stage *stages, uint32_t q, uint32_t memory, each_tile *found, mass_t *own) {
    uint32_t group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    uint32_t row = (w.first / 8 + thread % EACH_EIGHTS) / eights_of(&look), n = group;
    float total[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t v = vector_at<true>(look, vector_of(w, half));
        total[half] = total_of(look, args, w.pair->kv_head, v);
        if (!(total[half] > -INFINITY)) total[half] = INFINITY; /* and all weights are 0 */
    }
    uint32_t word, next = word_of(w, w.begin + n * TILE_SLOTS + thread, DIM);
    for (uint32_t tile = w.begin + n * TILE_SLOTS; tile < w.end; tile += GROUPS * TILE_SLOTS) {
        uint32_t turn = n / GROUPS % 2;
        weigh_eights<DIM>(w, stages, q, memory, tile, n, total, found->sums[turn] + thread / 32 * 2,
                          [&] {
                              if (n >= GROUPS) add_slots(args, found, turn ^ 1, row, own);
                              word = next;
                              next = word_of(w, tile + GROUPS * TILE_SLOTS + thread, DIM);
                          });
        found->segment[turn][thread] = segment_of(args, w, word);
        await_group(group);
        n += GROUPS;
    }
    if (n >= GROUPS) add_slots(args, found, n / GROUPS % 2 ^ 1, row, own);
    if (!own) return;
    await_workers();
    for (uint32_t i = threadIdx.x; i < args.segments * LOCI_CUDA_EACH_ROWS; i += GROUPS * WARPGROUP)
        if (own[i]) atomicAdd(&args.mass[i], own[i]);
}

#endif

/* together: as above. */
template <int DIM>
static __global__ void __launch_bounds__(THREADS, 1)
    k_attribute_each(const loci_cuda_look look, const loci_cuda_attribution args, bool together) {
#if HAS_WGMMA
    typedef wide_shape<DIM, true, true, EACH_STAGES, false> shape;
    extern __shared__ uint8_t shared_bytes[];
    __shared__ wide_stage stages[EACH_STAGES];
    __shared__ each_tile found[GROUPS];
    await_previous();
    uint32_t group = threadIdx.x / WARPGROUP;
    wide_work w =
        work_of<true>(look, args.wide_chunk, args.wide_chunks, 0, look.rows * eights_of(&look) * 8);
    uint8_t *q = shared_bytes + (1024 - shared_address(shared_bytes) % 1024) % 1024;
    uint8_t *memory = q + shape::all_queries;
    mass_t *own = together ? (mass_t *)(memory + EACH_STAGES * shape::stage_bytes) : NULL;
    for (uint32_t i = threadIdx.x; own && i < args.segments * LOCI_CUDA_EACH_ROWS; i += THREADS)
        own[i] = 0;
    open_block<DIM, true, true, EACH_STAGES, true>(look, w, stages, q);
    if (group == GROUPS) {
        give_registers<COPY_REGISTERS>();
        copy_tiles<DIM, EACH_STAGES, false>(args.cache, w, stages, memory);
    } else {
        take_registers<WORK_REGISTERS>();
        const loci_cuda_pair pair = *w.pair; /* in registers */
        w.pair = &pair;
        each_tiles<DIM>(look, args, w, stages, shared_address(q), shared_address(memory),
                        &found[group], own);
    }
#else
    __trap();
#endif
}

template <int DIM>
static cudaError_t launch_each(cudaStream_t stream, const loci_cuda_look *look,
                               const loci_cuda_attribution *args) {
    typedef wide_shape<DIM, true, true, EACH_STAGES, false> shape;
    bool together = args->segments <= EACH_SEGMENTS;
    size_t bytes = shape::bytes + EACH_SEGMENTS * LOCI_CUDA_EACH_ROWS * sizeof(mass_t);
    uint32_t places = look->rows * eights_of(look) * 8;
    dim3 grid = blocks_of(look, args->wide_chunks, places, shape::vectors);
    return launch_where(!args->cache.frames, stream, k_attribute_each<DIM>, grid, THREADS, bytes,
                        *look, *args, together);
}

#endif
