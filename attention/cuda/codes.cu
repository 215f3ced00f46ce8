/* SPDX-License-Identifier: Apache-2.0
 *
 * Step 3 of mode hierarchical, first half: the candidates of each row as a list in the order of
 * their places, and their estimates from the 4-bit codes. A block lists a run of a pair's slots and
 * scores what it has listed: a warp reads the records (dim / 2 + 8 bytes) of 16 candidates once for
 * the row's vectors; products run on tensor cores, in integers.
 */
#include "attention/cuda/look.cuh"
#include "attention/cuda/mma.cuh"
#include "attention/cuda/radix.cuh"

#define THREADS LOCI_CUDA_RUN
#define EACH 16u                     /* candidates of a warp's step */
#define WIDE 8u                      /* vectors of a product */
#define K_STEPS (MAX_DIM / 32)       /* of 4 words of codes */
#define FOLD_WORDS (MAX_DIM / 4 + 8) /* of a vector: no bank conflicts between four of them */

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

/* Into `list` the slots of the run's candidates, counted from its first. Returns how many; *before:
 * of the row before them. */
static __device__ uint32_t list_run(const loci_cuda_look &look, const loci_cuda_choice &c,
                                    const run_work &w, uint16_t *list, uint32_t *before) {
    uint32_t extent = w.index / look.kv_heads, word = blockIdx.x * LOCI_CUDA_RUN + threadIdx.x;
    uint32_t runs = loci_cuda_runs(&look), all;
    *before = count_before(c.run_count + w.hr * runs,
                           w.pair->word_base / LOCI_CUDA_RUN + extent + blockIdx.x);
    size_t at = mask_at(look, w.pair, w.row) + word;
    bool there = word < pair_words(w.pair);
    uint32_t bits = there ? c.candidates[at] : 0, place = sum_before<THREADS>(__popc(bits), &all);
    if (there) c.rank[at] = *before + place;
    bool last = extent + 1 == look.extents && word + 1 == pair_words(w.pair);
    if (last) c.count[w.hr] = *before + all;
    uint32_t *to = c.slots + w.hr * c.room + *before;
    for (; bits; bits &= bits - 1, place++) {
        uint32_t slot = word * 32 + __ffs((int)bits) - 1;
        to[place] = w.pair->word_base * 32 + slot;
        list[place] = (uint16_t)(slot - blockIdx.x * LOCI_CUDA_RUN * 32);
    }
    __syncthreads();
    return all;
}

/* Folded queries of vectors [first, first + count) of the row, as products take them: for each word
 * of codes those of its even channels, then those of its odd ones. */
static __device__ void load_folded(const loci_cuda_look &look, const loci_cuda_choice &c,
                                   const run_work &w, uint32_t first, uint32_t count,
                                   uint32_t (*folded)[FOLD_WORDS]) {
    uint32_t words = look.dim / 8;
    for (uint32_t i = threadIdx.x; i < WIDE * words; i += THREADS) {
        uint32_t g = i / words, word = i % words, even = 0, odd = 0;
        if (g < count) {
            size_t at = (size_t)w.index * look.vectors + w.row * look.group + first + g;
            const uint32_t *q = (const uint32_t *)(c.folded + at * look.dim) + 2 * word;
            even = __byte_perm(q[0], q[1], 0x6420);
            odd = __byte_perm(q[0], q[1], 0x7531);
        }
        folded[g][2 * word] = even;
        folded[g][2 * word + 1] = odd;
    }
    __syncthreads();
}

/* Products of the codes of two records, those of rows lane / 4 and 8 further, with 8 vectors. */
static __device__ __forceinline__ void multiply_codes(int (&dot)[4], const uint8_t *const *record,
                                                      const uint32_t (*folded)[FOLD_WORDS],
                                                      uint32_t words) {
    uint32_t code[K_STEPS][2], lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t k = 0; k < K_STEPS; k++)
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t word = 4 * k + lane % 4;
            code[k][i] = word < words ? ((const uint32_t *)record[i])[word] : 0;
        }
    dot[0] = dot[1] = dot[2] = dot[3] = 0;
#pragma unroll
    for (uint32_t k = 0; k < K_STEPS; k++) {
        if (4 * k >= words) break;
        uint32_t a[4] = {code[k][0] & 0x0f0f0f0fu, code[k][1] & 0x0f0f0f0fu,
                         code[k][0] >> 4 & 0x0f0f0f0fu, code[k][1] >> 4 & 0x0f0f0f0fu};
        uint2 b = {0, 0};
        if (4 * k + lane % 4 < words) b = *(const uint2 *)&folded[lane / 4][2 * (4 * k + lane % 4)];
        multiply_u8(dot, a, b.x, b.y);
    }
}

/* Scores of the listed candidates for vectors [first, first + count) of the row. */
static __device__ void score_list(const loci_cuda_look &look, const loci_cuda_choice &c,
                                  const run_work &w, const uint16_t *list, uint32_t n,
                                  uint32_t before, uint32_t first, uint32_t count,
                                  const uint32_t (*folded)[FOLD_WORDS]) {
    uint32_t lane = threadIdx.x % 32;
    float mean[2] = {}, scale[2] = {}, sum[2] = {}, top[2] = {-INFINITY, -INFINITY};
    float *score = c.score + (w.hr * look.group + first + lane % 4 * 2) * c.room + before;
    const uint8_t *records =
        w.pair->records + (size_t)blockIdx.x * LOCI_CUDA_RUN * 32 * w.pair->record_stride;
    size_t vector = (size_t)w.row * look.group + first + lane % 4 * 2;
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        if (lane % 4 * 2 + e >= count) break;
        size_t at = (size_t)w.index * look.vectors + vector + e;
        mean[e] = look.mean_terms[at];
        scale[e] = c.folded_scale[at];
        sum[e] = 7.5f * (float)c.folded_sum[at];
    }
    for (uint32_t i = threadIdx.x / 32 * EACH; i < n; i += THREADS / 32 * EACH) {
        const uint8_t *record[2];
        int dot[4];
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t at = i + lane / 4 + 8 * half;
            record[half] = records + (size_t)list[at < n ? at : n - 1] * w.pair->record_stride;
        }
        multiply_codes(dot, record, folded, look.dim / 8);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t at = i + lane / 4 + j / 2 * 8, e = j % 2;
            if (at >= n || lane % 4 * 2 + e >= count) continue;
            float x = mean[e] + scale[e] * ((float)dot[j] - sum[e]);
            score[e * c.room + at] = x;
            top[e] = fmaxf(top[e], x);
        }
    }
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        for (int offset = 4; offset < 32; offset *= 2)
            top[e] = fmaxf(top[e], __shfl_xor_sync(FULL_WARP, top[e], offset));
        if (lane < 4 && lane * 2 + e < count && top[e] > -INFINITY)
            atomicMax(&c.top[(size_t)w.pair->kv_head * look.vectors + vector + e], ordered(top[e]));
    }
}

static __global__ void __launch_bounds__(THREADS, 3)
    k_score_codes(const loci_cuda_look look, const loci_cuda_choice c) {
    __shared__ uint16_t list[LOCI_CUDA_RUN * 32];
    __shared__ alignas(16) uint32_t folded[WIDE][FOLD_WORDS];
    await_previous();
    run_work w = {&look.pairs[blockIdx.y], blockIdx.y, blockIdx.z, 0};
    w.hr = (size_t)w.pair->kv_head * look.rows + w.row;
    if (blockIdx.x * LOCI_CUDA_RUN >= pair_words(w.pair)) return;
    uint32_t before, n = list_run(look, c, w, list, &before);
    if (n == 0) return;
    for (uint32_t first = 0; first < look.group; first += WIDE) {
        uint32_t count = look.group - first < WIDE ? look.group - first : WIDE;
        __syncthreads(); /* all are through with the vectors before */
        load_folded(look, c, w, first, count, folded);
        score_list(look, c, w, list, n, before, first, count, folded);
    }
}

extern "C" cudaError_t loci_cuda_k_codes(cudaStream_t stream, const loci_cuda_look *look,
                                         const loci_cuda_choice *choice) {
    if (look->extents == 0) return cudaSuccess;
    uint32_t words = (look->tokens_max + 31) / 32;
    dim3 grid((words + LOCI_CUDA_RUN - 1) / LOCI_CUDA_RUN, look->extents * look->kv_heads,
              look->rows);
    return launch_behind(stream, k_score_codes, grid, THREADS, 0, *look, *choice);
}
