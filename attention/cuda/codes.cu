/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, first half: the candidates of each row as a list in the order of
 * their places, their estimates from the 4-bit codes, and their segments. A warp reads the records
 * (dim / 2 + 8 bytes) of 16 candidates once for the row's vectors; products run on tensor cores, in
 * integers.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/mma.cuh"

#define THREADS LOCI_CUDA_RUN
#define EACH 16u /* candidates of a warp's step */
#define WIDE 8u  /* vectors of a product */

/* --- the list ---------------------------------------------------------------------------- */

struct run_work {
    const loci_cuda_pair *pair;
    uint32_t index, row;
    size_t hr;
};

/* Candidates of the row before run `run`. */
static __device__ __forceinline__ uint32_t count_before(const uint32_t *runs, uint32_t run) {
    uint32_t own = 0, all;
    for (uint32_t i = threadIdx.x; i < run; i += THREADS) own += runs[i];
    (void)sum_before<THREADS>(own, &all);
    return all;
}

/* A block for a run of a pair's mask words, and a row. */
static __global__ void __launch_bounds__(THREADS)
    k_list_candidates(const loci_cuda_look look, const loci_cuda_choice c) {
    await_previous();
    const loci_cuda_pair *pair = &look.pairs[blockIdx.y];
    uint32_t extent = blockIdx.y / look.kv_heads, word = blockIdx.x * LOCI_CUDA_RUN + threadIdx.x;
    uint32_t runs = loci_cuda_runs(&look), all;
    size_t hr = (size_t)pair->kv_head * look.rows + blockIdx.z;
    if (blockIdx.x * LOCI_CUDA_RUN >= pair_words(pair)) return;
    size_t at = mask_at(look, pair, blockIdx.z) + word;
    bool there = word < pair_words(pair);
    uint32_t bits = there ? c.candidates[at] : 0;
    uint32_t place = count_before(c.run_count + hr * runs,
                                  pair->word_base / LOCI_CUDA_RUN + extent + blockIdx.x);
    place += sum_before<THREADS>(__popc(bits), &all);
    if (there) c.rank[at] = place;
    if (extent + 1 == look.extents && word + 1 == pair_words(pair))
        c.count[hr] = place + __popc(bits);
    uint32_t *to = c.slots + hr * c.room;
    for (; bits; bits &= bits - 1)
        to[place++] = (pair->word_base + word) * 32 + __ffs((int)bits) - 1;
}

/* --- scores ------------------------------------------------------------------------------ */

/* 16 candidates of a list as a warp has them: a lane those of rows lane / 4 and 8 further. STEPS:
 * of 32 channels, as many as hold dim. */
template <uint32_t STEPS> struct code_rows {
    uint32_t code[STEPS][2], extent[2];
    uint32_t first, last; /* extents of all 16 */
    uint32_t word;        /* the slot word of row lane / 4 + 8 (lane % 4), of lanes below 2 there */
    uint32_t place[2];    /* of the candidates of the warp's next step */
};

/* Places of candidates from `begin` on; of those behind the list's end anything. */
template <uint32_t STEPS>
static __device__ __forceinline__ void load_places(code_rows<STEPS> &r, const uint32_t *slots,
                                                   uint32_t begin, uint64_t room) {
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t at = begin + threadIdx.x % 32 / 4 + 8 * i;
        r.place[i] = at < room ? slots[at] : 0;
    }
}

/* The candidates from `begin` on, whose places are there; none behind the list's end. WORDS: with
 * their slot words. Places become those of the step behind. */
template <uint32_t STEPS, bool WORDS>
static __device__ __forceinline__ void load_codes(code_rows<STEPS> &r, const loci_cuda_look &look,
                                                  const uint32_t *slots, uint64_t room, uint32_t h,
                                                  uint32_t begin, uint32_t step, uint32_t n) {
    uint32_t lane = threadIdx.x % 32, left = n - begin, last = left < EACH ? left - 1 : EACH - 1;
    uint32_t place[2] = {r.place[0], r.place[1]}, front = __shfl_sync(FULL_WARP, place[0], 0);
    if (begin >= n) return;
    load_places(r, slots, begin + step, room);
    r.first = r.last = 0;
    if (look.extents > 1) {
        r.first = extent_at(look, h, front / 32);
        uint32_t back = __shfl_sync(FULL_WARP, last < 8 ? place[0] : place[1], (int)(last % 8 * 4));
        r.last = extent_at(look, h, back / 32);
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t slot = lane / 4 + 8 * i <= last ? place[i] : front;
        r.extent[i] = r.first == r.last ? r.first : extent_at(look, h, slot / 32);
        const loci_cuda_pair *pair = &look.pairs[(size_t)r.extent[i] * look.kv_heads + h];
        const uint32_t *from =
            (const uint32_t *)(pair->records +
                               (size_t)(slot - pair->word_base * 32) * pair->record_stride);
#pragma unroll
        for (uint32_t k = 0; k < STEPS; k++) {
            uint32_t word = 4 * k + lane % 4;
            r.code[k][i] = word < look.dim / 8 ? from[word] : 0;
        }
        if (WORDS && lane % 4 == i) r.word = from[look.dim / 8];
    }
}

/* The segments of 16 candidates. */
template <uint32_t STEPS>
static __device__ __forceinline__ void
put_segments(const loci_cuda_look &look, const loci_cuda_choice &c, const code_rows<STEPS> &r,
             uint32_t begin, uint32_t n) {
    uint32_t lane = threadIdx.x % 32, at = begin + lane / 4 + lane % 4 * 8;
    if (lane % 4 > 1 || at >= n) return;
    uint32_t extent = lane % 4 ? r.extent[1] : r.extent[0], segment = r.word >> 16;
    const loci_cuda_pair *pair = &look.pairs[(size_t)extent * look.kv_heads + blockIdx.y];
    c.segment[blockIdx.y * c.room + at] =
        segment < pair->segments ? pair->segment_base + segment : 0xffffffffu;
}

/* Products of the codes with folded queries; q: of vector lane / 4, or NULL. */
template <uint32_t STEPS>
static __device__ __forceinline__ void multiply_codes(int (&dot)[4], const code_rows<STEPS> &r,
                                                      const int8_t *q, uint32_t words) {
    dot[0] = dot[1] = dot[2] = dot[3] = 0;
#pragma unroll
    for (uint32_t k = 0; k < STEPS; k++) {
        uint32_t word = 4 * k + threadIdx.x % 4;
        uint32_t a[4] = {r.code[k][0] & 0x0f0f0f0fu, r.code[k][1] & 0x0f0f0f0fu,
                         r.code[k][0] >> 4 & 0x0f0f0f0fu, r.code[k][1] >> 4 & 0x0f0f0f0fu};
        uint2 x = {0, 0}; /* of a word's even channels, then of its odd ones */
        if (q && word < words) x = ((const uint2 *)q)[word];
        multiply_u8(dot, a, __byte_perm(x.x, x.y, 0x6420), __byte_perm(x.x, x.y, 0x7531));
    }
}

/* Of two vectors the greatest score so far, and the sum of exp(score - that). */
struct lane_totals {
    float max[2], sum[2];
};

static __device__ __forceinline__ void add_score(lane_totals &t, uint32_t e, float x) {
    if (!(x > -INFINITY)) return;
    float top = fmaxf(t.max[e], x);
    t.sum[e] = t.sum[e] * expf(t.max[e] - top) + expf(x - top);
    t.max[e] = top;
}

/* Scores of those of the 16 candidates that stand in one extent, for up to 8 vectors of the row
 * from `first` on. */
template <uint32_t STEPS>
static __device__ __forceinline__ void
score_codes(const loci_cuda_look &look, const loci_cuda_choice &c, const code_rows<STEPS> &r,
            uint32_t begin, uint32_t n, uint32_t extent, uint32_t first, lane_totals &totals) {
    uint32_t lane = threadIdx.x % 32, h = blockIdx.y / look.rows, row = blockIdx.y % look.rows;
    size_t vector = ((size_t)extent * look.kv_heads + h) * look.vectors + row * look.group;
    uint32_t column = first + lane / 4, own = first + lane % 4 * 2;
    int dot[4];
    multiply_codes(dot, r, column < look.group ? c.folded + (vector + column) * look.dim : NULL,
                   look.dim / 8);
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        if (own + e >= look.group) break;
        float mean = look.mean_terms[vector + own + e], scale = c.folded_scale[vector + own + e];
        float sum = 7.5f * (float)c.folded_sum[vector + own + e];
        float *score = c.score + ((size_t)blockIdx.y * look.group + own + e) * c.room;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t at = begin + lane / 4 + 8 * i;
            if (at >= n || r.extent[i] != extent) continue;
            float x = mean + scale * ((float)dot[2 * i + e] - sum);
            score[at] = x;
            add_score(totals, e, x);
        }
    }
}

/* The totals of all lanes and warps, in a fixed order. */
static __device__ void put_totals(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  uint32_t first, lane_totals &t) {
    __shared__ float max[WIDE][THREADS / 32], sum[WIDE][THREADS / 32];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        float top = t.max[e];
        for (int offset = 4; offset < 32; offset *= 2)
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, offset));
        float part = t.max[e] > -INFINITY ? t.sum[e] * expf(t.max[e] - top) : 0.0f;
        for (int offset = 4; offset < 32; offset *= 2)
            part += __shfl_xor_sync(FULL_WARP, part, offset);
        if (lane >= 4) continue;
        max[lane * 2 + e][warp] = top;
        sum[lane * 2 + e][warp] = part;
    }
    __syncthreads();
    if (threadIdx.x < WIDE && first + threadIdx.x < look.group) {
        float top = -INFINITY, all = 0.0f;
        for (uint32_t w = 0; w < THREADS / 32; w++) top = fmaxf(top, max[threadIdx.x][w]);
        for (uint32_t w = 0; w < THREADS / 32; w++)
            if (max[threadIdx.x][w] > -INFINITY)
                all += sum[threadIdx.x][w] * expf(max[threadIdx.x][w] - top);
        size_t vector = (size_t)blockIdx.y * look.group + first + threadIdx.x;
        float *to = c.totals + 2 * (vector * c.slices + blockIdx.x);
        to[0] = top;
        to[1] = all;
    }
    __syncthreads();
}

/* A warp reads the next candidates' records while it scores the last ones. LISTED: their segments
 * are kept. */
template <uint32_t STEPS, bool LISTED>
static __global__ void __launch_bounds__(THREADS, STEPS > 4 ? 2 : 4)
    k_score_codes(const loci_cuda_look look, const loci_cuda_choice c) {
    await_previous();
    const uint32_t warps = THREADS / 32, step = gridDim.x * warps * EACH;
    const uint32_t *slots = c.slots + (size_t)blockIdx.y * c.room;
    for (uint32_t first = 0; first < look.group; first += WIDE) {
        lane_totals totals = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        uint32_t begin = (blockIdx.x * warps + threadIdx.x / 32) * EACH;
        code_rows<STEPS> next = {};
        load_places(next, slots, begin, c.room); /* comes together with the count */
        uint32_t n = c.count[blockIdx.y];
        load_codes<STEPS, LISTED>(next, look, slots, c.room, blockIdx.y / look.rows, begin, step,
                                  n);
        for (; begin < n; begin += step) {
            const code_rows<STEPS> r = next;
            load_codes<STEPS, LISTED>(next, look, slots, c.room, blockIdx.y / look.rows,
                                      begin + step, step, n);
            if (LISTED && first == 0) put_segments(look, c, r, begin, n);
            for (uint32_t extent = r.first; extent <= r.last; extent++)
                score_codes(look, c, r, begin, n, extent, first, totals);
        }
        put_totals(look, c, first, totals);
    }
}

template <bool LISTED>
static cudaError_t launch_score(cudaStream_t stream, const loci_cuda_look *look,
                                const loci_cuda_choice *choice) {
    auto kernel = look->dim <= 64    ? k_score_codes<2, LISTED>
                  : look->dim <= 128 ? k_score_codes<4, LISTED>
                                     : k_score_codes<MAX_DIM / 32, LISTED>;
    return launch_behind(stream, kernel, dim3(choice->slices, look->kv_heads * look->rows), THREADS,
                         0, *look, *choice);
}

extern "C" cudaError_t loci_cuda_k_codes(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t words = (look->tokens_max + 31) / 32;
    dim3 runs((words + LOCI_CUDA_RUN - 1) / LOCI_CUDA_RUN, look->extents * look->kv_heads,
              look->rows);
    cudaError_t result = launch_behind(stream, k_list_candidates, runs, THREADS, 0, *look, *choice);
    if (result != cudaSuccess) return result;
    return choice->segment ? launch_score<true>(stream, look, choice)
                           : launch_score<false>(stream, look, choice);
}
