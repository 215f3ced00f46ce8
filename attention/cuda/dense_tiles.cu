/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention over packed spans on tensor cores, K and V in bf16. A block's four warps share
 * tiles of 64 keys, which come to shared memory while the tile before is worked on: each warp has
 * 16 rows of a wide tile and all its keys, or the 16 rows of a narrow one and every fourth run of
 * its keys. How a span is cut depends on that span alone, and so does a row's result.
 */
#include "attention/cuda/attend_mma.cuh"
#include "attention/cuda/dense.cuh"
#include "attention/cuda/launch.cuh"

#define THREADS (32 * TILE_WARPS)
#define TILE_KEYS (TILE_WARPS * RUN)

/* Shared memory: queries (and their rest), then two stages of K and V rows. */
static constexpr size_t tile_bytes(uint32_t dim, bool exact) {
    return ((exact ? 2 : 1) * LOCI_CUDA_WIDE_ROWS + 4 * TILE_KEYS) * WIDTH_OF(dim) *
           sizeof(uint16_t);
}

/* Logits that need not be exact are of base 2. */
template <bool EXACT> static __device__ __forceinline__ float unit_of(void) {
    return EXACT ? 1.0f : LOG2_E;
}

template <int DIM, bool EXACT>
static __device__ void load_queries(const loci_cuda_dense &args, const dense_place &p,
                                    uint16_t *q) {
    uint32_t group = args.q_heads / args.kv_heads, pairs = args.dim / 2;
    uint32_t *to = (uint32_t *)q, *rest = to + LOCI_CUDA_WIDE_ROWS * WIDTH_OF(DIM) / 2;
    for (uint32_t i = threadIdx.x; i < p.span.rows * pairs; i += THREADS) {
        uint32_t row = i / pairs, d = i % pairs, query = (p.tile * p.span.rows + row) / group;
        float2 x = {0.0f, 0.0f};
        if (query < p.span.q_count) {
            uint32_t head = p.kv_head * group + (p.tile * p.span.rows + row) % group;
            const float *from = args.q + (size_t)(p.span.q_begin + query) * args.q_stride +
                                (size_t)head * args.dim + 2 * d;
            x.x = from[0] * (args.scale * unit_of<EXACT>());
            x.y = from[1] * (args.scale * unit_of<EXACT>());
        }
        uint32_t at = row * WIDTH_OF(DIM) / 2 + d, left;
        to[at] = split_pair(x.x, x.y, &left);
        if (EXACT) rest[at] = left;
    }
}

/* Begins to copy K and V rows of keys [tile, end), no more than TILE_KEYS; past the end comes the
 * last one again. */
template <int DIM>
static __device__ __forceinline__ void copy_tile(const loci_cuda_dense &args, const dense_place &p,
                                                 uint32_t tile, uint32_t end, uint16_t *stage) {
    const uint32_t lanes = DIM / 8; /* of a row */
    size_t base = (size_t)p.span.kv_begin * args.kv_stride + (size_t)p.kv_head * args.dim;
#pragma unroll
    for (uint32_t i = threadIdx.x; i < TILE_KEYS * lanes; i += THREADS) {
        uint32_t row = i / lanes, d = i % lanes * 8, key = tile + row < end ? tile + row : end - 1;
        if (d >= args.dim) continue;
        size_t at = base + (size_t)key * args.kv_stride + d;
        copy_16(stage + row * WIDTH_OF(DIM) + d, (const uint16_t *)args.k + at);
        copy_16(stage + (TILE_KEYS + row) * WIDTH_OF(DIM) + d, (const uint16_t *)args.v + at);
    }
}

/* What the two rows of a lane see: keys [first, last), and key 0 with a bias where it is a sink. */
struct row_view {
    uint32_t first[2], last[2];
    bool there[2];
};

/* The logits of keys from `key` on as they count; key: of element 0 of the lane. */
template <int RUNS>
static __device__ __forceinline__ void mask_logits(const loci_cuda_dense &args, float bias,
                                                   const row_view &view, uint32_t key,
                                                   float (&logit)[2 * RUNS][4]) {
    bool all = !(args.sink && key < 8);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++)
        all = all && view.first[half] <= key && key + 16 * RUNS <= view.last[half];
    if (__all_sync(FULL_WARP, all)) return;
#pragma unroll
    for (uint32_t n = 0; n < 2 * RUNS; n++)
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) {
            uint32_t own = key + n * 8 + e % 2, half = e / 2;
            if (args.sink && own == 0 && view.there[half])
                logit[n][e] += bias;
            else if (own < view.first[half] || own >= view.last[half])
                logit[n][e] = -INFINITY;
        }
}

/* One tile of keys, RUNS runs of it from `run` on. */
template <int DIM, int RUNS, bool EXACT>
static __device__ __forceinline__ void
attend_tile(const loci_cuda_dense &args, const row_view &view, warp_state<DIM> &s,
            const uint16_t *q, const uint16_t *stage, uint32_t tile, uint32_t run) {
    const uint16_t *k = stage + run * RUN * WIDTH_OF(DIM);
    float logit[2 * RUNS][4] = {};
    run_logits<DIM, RUNS, EXACT>(q, LOCI_CUDA_WIDE_ROWS, k, args.dim, logit);
    mask_logits<RUNS>(args, args.bias * unit_of<EXACT>(), view,
                      tile + run * RUN + threadIdx.x % 4 * 2, logit);
    run_softmax<DIM, RUNS, !EXACT>(s, logit);
    run_values<DIM, RUNS, EXACT>(s, k + TILE_KEYS * WIDTH_OF(DIM), args.dim, logit);
}

/* A warp's 16 rows of a wide tile, as results or partial ones. */
template <int DIM>
static __device__ void put_rows(const loci_cuda_dense &args, const dense_place &p,
                                const warp_state<DIM> &s) {
    uint32_t lane = threadIdx.x % 32, group = args.q_heads / args.kv_heads;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float sum = s.sum[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        uint32_t local = threadIdx.x / 32 * RUN + lane / 4 + 8 * half;
        uint32_t row = p.tile * p.span.rows + local;
        if (row >= p.span.q_count * group) continue;
        float *partial = args.partial + ((size_t)p.partial + local) * (args.dim + 2);
        float factor = p.span.merged ? 1.0f : factor_of(sum);
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; n++)
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t channel = n * 8 + lane % 4 * 2 + e;
                if (channel >= args.dim) break;
                float value = s.out[n][2 * half + e] * factor;
                if (p.span.merged)
                    partial[channel] = value;
                else
                    put_value(args, p.span, p.kv_head, row, channel, value);
            }
        if (lane % 4 != 0) continue;
        if (p.span.merged) {
            partial[args.dim] = s.max[half];
            partial[args.dim + 1] = sum;
        } else {
            put_lse(args, p.span, p.kv_head, row, s.max[half], sum);
        }
    }
}

static __device__ __forceinline__ row_view view_of(const loci_cuda_dense &args,
                                                   const dense_place &p, bool wide) {
    row_view view;
    uint32_t group = args.q_heads / args.kv_heads;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        int64_t first, last;
        uint32_t row = p.tile * p.span.rows + (wide ? threadIdx.x / 32 * RUN : 0) +
                       threadIdx.x % 32 / 4 + 8 * half;
        visible(args, p.span, row, group, &first, &last);
        view.first[half] = (uint32_t)first;
        view.last[half] = (uint32_t)(last > 0 ? last : 0);
        view.there[half] = row / group < p.span.q_count;
    }
    return view;
}

template <int DIM, bool EXACT>
static __global__ void __launch_bounds__(THREADS)
    k_attend_tiles(const __grid_constant__ loci_cuda_dense args) {
    extern __shared__ float4 shared[];
    const dense_place p = find_task(args, blockIdx.x);
    uint32_t warp = threadIdx.x / 32, begin, end;
    bool wide = p.span.rows == LOCI_CUDA_WIDE_ROWS;
    uint16_t *q = (uint16_t *)shared;
    uint16_t *stages = q + (EXACT ? 2 : 1) * LOCI_CUDA_WIDE_ROWS * WIDTH_OF(DIM);
    const uint32_t stage = 2 * TILE_KEYS * WIDTH_OF(DIM);
    range_of(args, p, args.q_heads / args.kv_heads, &begin, &end);
    begin = begin / TILE_KEYS * TILE_KEYS;
    bool sink = args.sink && p.split == 0 && p.span.kv_count > 0;
    if (sink && end == 0) end = 1;
    const row_view view = view_of(args, p, wide);
    load_queries<DIM, EXACT>(args, p, q);
    warp_state<DIM> s = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
    uint32_t tile = sink ? 0 : begin, turn = 0;
    if (tile < end) copy_tile<DIM>(args, p, tile, end, stages);
    close_group();
    while (tile < end) {
        uint32_t next = tile + TILE_KEYS < begin ? begin : tile + TILE_KEYS;
        if (next < end) copy_tile<DIM>(args, p, next, end, stages + (turn ^ 1) * stage);
        close_group();
        wait_groups<1>();
        __syncthreads();
        const uint16_t *at = stages + turn * stage;
        if (wide)
            attend_tile<DIM, TILE_WARPS, EXACT>(args, view, s, q + warp * RUN * WIDTH_OF(DIM), at,
                                                tile, 0);
        else
            attend_tile<DIM, 1, EXACT>(args, view, s, q, at, tile, warp);
        __syncthreads(); /* the stage is filled next */
        tile = next;
        turn ^= 1;
    }
    wait_groups<0>();
    if (!EXACT) {
        s.max[0] *= LN_2;
        s.max[1] *= LN_2;
    }
    if (wide) {
        put_rows<DIM>(args, p, s);
        return;
    }
    __syncthreads();
    merge_warps<DIM>(s, args.dim, RUN, (float *)stages,
                     args.partial + (size_t)p.partial * (args.dim + 2));
}

extern "C" size_t loci_cuda_k_tile_bytes(uint32_t dim, bool exact) {
    if (dim <= 64) return tile_bytes(64, exact);
    return tile_bytes(dim <= 128 ? 128 : 256, exact);
}

template <int DIM>
static cudaError_t launch(cudaStream_t stream, const loci_cuda_dense *args, bool exact) {
    auto kernel = exact ? k_attend_tiles<DIM, true> : k_attend_tiles<DIM, false>;
    size_t bytes = tile_bytes(DIM, exact);
    cudaError_t result =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result != cudaSuccess) return result;
    kernel<<<args->tasks, THREADS, bytes, stream>>>(*args);
    return cudaGetLastError();
}

extern "C" cudaError_t loci_cuda_k_attend_tiles(cudaStream_t stream, const loci_cuda_dense *args,
                                                bool exact) {
    if (args->tasks == 0) return cudaSuccess;
    if (args->dim <= 64) return launch<64>(stream, args, exact);
    if (args->dim <= 128) return launch<128>(stream, args, exact);
    return launch<256>(stream, args, exact);
}
