/* SPDX-License-Identifier: Apache-2.0
 *
 * What the .cu files offer the host: one launcher for each operation, over plain device pointers.
 * A launcher enqueues on the stream and returns the error of the launch. C and C++ read this file.
 *
 * Every sum runs in an order that depends on the shapes alone: no floating-point atomics.
 */
#ifndef LOCI_ATTENTION_CUDA_KERNELS_H
#define LOCI_ATTENTION_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOCI_CUDA_LOGS 1024u /* tokens of the largest node */

/* Why a kernel gave up; the first one is kept. */
enum {
    LOCI_CUDA_FAULT_NONE = 0,
    LOCI_CUDA_FAULT_TOKEN = 1,    /* a: id, b: rows of the table */
    LOCI_CUDA_FAULT_NAN = 2,      /* a: place, b: row of logits */
    LOCI_CUDA_FAULT_INFINITE = 3, /* a: place, b: row of logits */
    LOCI_CUDA_FAULT_BANNED = 4    /* a: row, b: vocabulary */
};

typedef struct loci_cuda_fault {
    uint32_t code, a, b;
} loci_cuda_fault;

/* --- pointwise.cu ---------------------------------------------------------------------- */

cudaError_t loci_cuda_k_rms_norm(cudaStream_t stream, float *y, const float *x, const float *gain,
                                 uint32_t rows, uint32_t cols, float eps);
cudaError_t loci_cuda_k_rope(cudaStream_t stream, float *x, uint32_t stride,
                             const int32_t *positions, const float *inv_freq, uint32_t rows,
                             uint32_t heads, uint32_t head_dim);
cudaError_t loci_cuda_k_swiglu(cudaStream_t stream, float *y, const float *x, uint32_t rows,
                               uint32_t cols);
cudaError_t loci_cuda_k_to_f32(cudaStream_t stream, float *dst, uint32_t dst_stride,
                               const float *src, uint32_t src_stride, uint32_t rows, uint32_t cols);
/* Columns from cols up to cols_padded become zero. */
cudaError_t loci_cuda_k_to_bf16(cudaStream_t stream, uint16_t *dst, uint32_t dst_stride,
                                const float *src, uint32_t src_stride, uint32_t rows, uint32_t cols,
                                uint32_t cols_padded);
/* y [rows][cols] = table[ids[row]], bf16 or f32 rows of table_stride elements. */
cudaError_t loci_cuda_k_embed(cudaStream_t stream, float *y, const void *table, bool bf16,
                              uint32_t table_rows, uint32_t table_stride, const int32_t *ids,
                              uint32_t rows, uint32_t cols, loci_cuda_fault *fault);
cudaError_t loci_cuda_k_merge(cudaStream_t stream, float *out_a, uint32_t stride_a, float *lse_a,
                              const float *out_b, uint32_t stride_b, const float *lse_b,
                              uint32_t rows, uint32_t heads, uint32_t head_dim);

/* --- dense.cu -------------------------------------------------------------------------- */

#define LOCI_CUDA_ROWS 16u      /* packed query rows (query x head of the group) of one tile */
#define LOCI_CUDA_WIDE_ROWS 64u /* of a tile of many rows, on tensor cores */

/* A span and how it is cut: tiles of `rows` packed rows, runs of `chunk` keys. Its tasks are
 * numbered from first_task on, [kv_head][split][tile]; a span that is merged leaves one partial
 * result a task, in rows of partial from first_partial on, and has one merge a (kv_head, tile). */
typedef struct loci_cuda_span {
    uint32_t q_begin, q_count, kv_begin, kv_count;
    uint32_t rows, tiles, splits, chunk;
    uint32_t first_task, first_partial, first_merge, merged;
} loci_cuda_span;

#define LOCI_CUDA_FEW_SPANS 8u

typedef struct loci_cuda_dense {
    const float *q;
    const void *k, *v;
    float *out, *lse; /* lse may be NULL */
    uint32_t q_stride, kv_stride, out_stride;
    uint32_t q_heads, kv_heads, dim;
    bool kv_bf16, causal, sink;
    float scale, bias;
    uint32_t window;
    loci_cuda_span few[LOCI_CUDA_FEW_SPANS]; /* no more stand here, ... */
    const loci_cuda_span *spans;             /* ... others on the device */
    uint32_t span_count, tasks, merges;
    uint32_t partials, merge_rows; /* rows of partial; the most of a tile that is merged */
    float *partial;                /* [partials][dim + 2]: sums, maximum, sum of exponentials */
} loci_cuda_dense;

/* Spans in tiles of LOCI_CUDA_ROWS, in f32. */
cudaError_t loci_cuda_k_attend_dense(cudaStream_t stream, const loci_cuda_dense *args);
/* dense_row.cu: spans of one query and no more than LOCI_CUDA_ROW_KEYS keys, in tiles of one row,
 * in f32. */
#define LOCI_CUDA_ROW_KEYS 1024u
cudaError_t loci_cuda_k_attend_row(cudaStream_t stream, const loci_cuda_dense *args);
/* dense_tiles.cu: on tensor cores, tiles of LOCI_CUDA_ROWS (all merged) or LOCI_CUDA_WIDE_ROWS. K
 * and V are bf16, dim is a multiple of 16 up to 256, K and V rows begin at multiples of 16 bytes.
 * exact: to about 2^-17, else queries and weights are rounded to bf16. */
cudaError_t loci_cuda_k_attend_tiles(cudaStream_t stream, const loci_cuda_dense *args, bool exact);
/* Shared memory of a block. */
size_t loci_cuda_k_tile_bytes(uint32_t dim, bool exact);
/* Merges what either left. */
cudaError_t loci_cuda_k_merge_splits(cudaStream_t stream, const loci_cuda_dense *args);

/* --- pairs ----------------------------------------------------------------------------- */

/* Roots and leaves of a pair, in words that pairs.c takes from the blob. */
typedef struct loci_cuda_root {
    uint32_t first_slot, tokens, first_leaf, leaves;
    uint32_t sketches_at; /* in the blob; groups as in attention/index.h */
} loci_cuda_root;

/* One pair on the device. Nodes: float centroid and variance scale, int8 centroid[dim], uint8
 * variance[dim]. Records: code[dim / 2], slot word, check. kv: K row and V row of each slot, in
 * row_bytes, on the device or in mapped memory of the host; there frame_of, unless NULL, has for
 * each slot 1 + the frame of the row cache that holds its rows, or 0. Rows are bf16 or, with int8,
 * bytes, behind which stands what their greatest values are, as in the blob (loci_kv_scales). */
typedef struct loci_cuda_pair {
    const uint8_t *blob, *root_nodes, *leaf_nodes, *records, *position_codes;
    const uint8_t *kv;
    const uint16_t *value_means; /* roots, then leaves */
    const float *mean, *code_scale, *codebook;
    const loci_cuda_root *root_table;
    const uint32_t *leaf_begin; /* [leaves + 1] slots */
    const uint32_t *leaf_root;  /* [leaves] */
    uint32_t tokens, leaves, roots, node_stride, record_stride;
    uint32_t root_tokens; /* of the largest root */
    uint32_t row_bytes;   /* a multiple of 16 */
    bool int8;
    uint32_t *frame_of;
    /* Added by a look-up: */
    const uint64_t *live;          /* a bit a slot; NULL: all */
    const uint32_t *segment_begin; /* positions; NULL where not needed */
    uint32_t kv_head;
    uint32_t root_base, leaf_base; /* of its first one among those of the head */
    uint32_t word_base;            /* of its first mask word among those of the head */
    uint32_t segments, segment_base;
} loci_cuda_pair;

/* --- rows.cu: the cache of K and V rows ------------------------------------------------- */

#define LOCI_CUDA_FRAME_LOT 16u /* frames are a multiple of it */

enum { LOCI_CUDA_FRAME_IDLE = 0, LOCI_CUDA_FRAME_USED = 1, LOCI_CUDA_FRAME_FREE = 2 };

/* On the device. head and tail count what was taken from and put into the ring of free frames; in
 * a step head may run past tail. hand: where the next sweep begins. */
typedef struct loci_cuda_row_state {
    unsigned long long hits, misses, evicted;
    uint32_t head, tail, hand;
} loci_cuda_row_state;

/* Frames, of 4 dim bytes, hold K row and V row of a slot as its pair has them. No frames: all NULL.
 * rows.h says who may use it when. */
typedef struct loci_cuda_row_cache {
    uint8_t *frames;
    uint8_t *use;     /* [count]: idle, read since the hand came by, or free */
    uint32_t **owner; /* [count]: the entry of a frame_of that names it; NULL = none */
    uint32_t *ring;   /* [ring_count], a power of two */
    loci_cuda_row_state *state;
    uint32_t count, ring_count, dim;
} loci_cuda_row_cache;

/* Refills the ring: frames from the hand on, used ones only marked idle (CLOCK). */
cudaError_t loci_cuda_k_rows_sweep(cudaStream_t stream, const loci_cuda_row_cache *cache);
/* Entries [table, table + tokens) go: their frames have no owner any more. */
cudaError_t loci_cuda_k_rows_forget(cudaStream_t stream, const loci_cuda_row_cache *cache,
                                    const uint32_t *table, uint32_t tokens);

/* --- look-ups -------------------------------------------------------------------------- */

/* What all kernels of one look-up read. A mask has a bit a slot in words of 32, the pairs of a head
 * one after another, each from a new word: [kv_heads][mask_rows][words]. A vector is a query row
 * and head: row * group + head in the group. All of one KV head: */
typedef struct loci_cuda_head {
    uint32_t roots, leaves; /* over all extents */
    uint64_t root_at;       /* of its first root among those of all heads */
    uint64_t leaf_at;       /* the same for leaves */
} loci_cuda_head;

typedef struct loci_cuda_look {
    const loci_cuda_pair *pairs; /* [extents][kv_heads] */
    const loci_cuda_head *heads;
    uint32_t extents, kv_heads, q_heads, group, rows, vectors, dim;
    uint32_t words;                             /* of a mask and head */
    uint32_t mask_rows;                         /* rows, or 1 where all rows share one set */
    uint32_t tokens_max, roots_max, leaves_max; /* of a pair */
    uint32_t root_tokens_max;                   /* of a root */
    uint32_t row_bytes;                         /* of a slot's K and V; the largest of all pairs */
    bool int8;                                  /* of some pairs */
    uint64_t roots_all, leaves_all;             /* of all heads */
    const float *logs;
    float *q;                           /* [kv_heads][vectors][dim], scaled */
    int8_t *q8, *qq8;                   /* the same, rounded, and of q * q / 2 */
    float *q_scale, *qq_scale, *steady; /* [kv_heads][vectors] */
    int32_t *q_sum;
    float *mean_terms;   /* [pairs][vectors]: q.mean */
    uint32_t *root_live; /* [roots_all] */
    uint8_t *leaf_live;  /* [leaves_all] */
    uint32_t *token_mask;
    unsigned long long *begun_ns; /* by the device's clock */
} loci_cuda_look;

typedef struct loci_cuda_look_query {
    const float *q, *steady; /* steady: NULL = none */
    uint32_t q_stride;
    float scale;
} loci_cuda_look_query;

/* query.cu: fills q to mean_terms, and begun_ns. */
cudaError_t loci_cuda_k_queries(cudaStream_t stream, const loci_cuda_look *look,
                                const loci_cuda_look_query *query);
/* query.cu: live tokens of all roots and leaves. Roots are scored without where no token of a pair
 * is deleted. */
cudaError_t loci_cuda_k_count_live(cudaStream_t stream, const loci_cuda_look *look);
/* sparse.cu: token_mask becomes all live tokens; mask_rows is 1. */
cudaError_t loci_cuda_k_mask_live(cudaStream_t stream, const loci_cuda_look *look);

/* Most slots that one block attends over, and least. */
#define LOCI_CUDA_CHUNK_MAX 8192u
#define LOCI_CUDA_CHUNK_MIN 256u

#ifdef __CUDACC__
#define LOCI_CUDA_BOTH static __host__ __device__ __forceinline__
#else
#define LOCI_CUDA_BOTH static inline
#endif

LOCI_CUDA_BOTH uint32_t loci_cuda_chunks(uint32_t tokens, uint32_t chunk) {
    return (tokens + chunk - 1) / chunk;
}

LOCI_CUDA_BOTH uint32_t loci_cuda_tiles(uint32_t vectors) {
    return (vectors + LOCI_CUDA_ROWS - 1) / LOCI_CUDA_ROWS;
}

/* Slots of a block: as many as leave some blocks to each multiprocessor of a large device. */
LOCI_CUDA_BOTH uint32_t loci_cuda_chunk(const loci_cuda_look *look) {
    uint32_t chunk = LOCI_CUDA_CHUNK_MAX;
    uint64_t each = (uint64_t)look->extents * look->kv_heads * loci_cuda_tiles(look->vectors);
    while (chunk > LOCI_CUDA_CHUNK_MIN && each * loci_cuda_chunks(look->tokens_max, chunk) < 512)
        chunk /= 2;
    return chunk;
}

#define LOCI_CUDA_LISTED 256u /* blocks that share what is selected of all heads' lists, about */

/* Partial results of attention over the pairs: for each (pair, part of it) and tile of vectors,
 * [LOCI_CUDA_ROWS][dim + 2] as in loci_cuda_dense. parts: chunks, and one more for a tail. Where
 * there is a list of what is selected (loci_cuda_choice.chosen), the parts of a head are even
 * shares of it instead. */
typedef struct loci_cuda_attend {
    uint32_t extents; /* whose parts are merged: 1 where lists are used */
    float *partial;   /* [pairs * parts][tiles][ROWS][dim + 2] */
    uint32_t chunk, chunks, parts;
    float *out, *lse;
    uint32_t out_stride;
    loci_cuda_row_cache cache; /* of pairs with frame_of */
    /* For attribution, of one row, or of each of a few: exact logits [kv_heads][vectors][room], by
     * place in the list of what is selected or in a mask; NULL = not kept. Cleared by the way: what
     * attribution and figures count in. */
    float *logits;
    uint64_t room;
    unsigned long long *zeroed;
    uint32_t zeroed_count;
} loci_cuda_attend;

/* sparse.cu. fetch_rows: before attend_sparse of modes that leave tokens out, into the row cache.
 */
cudaError_t loci_cuda_k_fetch_rows(cudaStream_t stream, const loci_cuda_look *look,
                                   const loci_cuda_attend *args);
cudaError_t loci_cuda_k_attend_sparse(cudaStream_t stream, const loci_cuda_look *look,
                                      const loci_cuda_attend *args);
cudaError_t loci_cuda_k_join(cudaStream_t stream, const loci_cuda_look *look,
                             const loci_cuda_attend *args);

#define LOCI_CUDA_EACH_ROWS 8u /* most rows that have a mass each */

/* Segment masses as integers of 2^-36, so that atomics add them up the same in any order. */
#define LOCI_CUDA_MASS_UNIT 68719476736.0

typedef struct loci_cuda_attribution {
    const float *total_lse; /* [rows][q_heads] */
    uint32_t row_begin, row_end;
    bool each;                /* a mass for each row, else one for all of them */
    unsigned long long *mass; /* [rows or 1][segments], or [segments][LOCI_CUDA_EACH_ROWS] where
                                 whole_wide.cu adds up each row's; zeros before and after */
    float *out[LOCI_CUDA_EACH_ROWS]; /* NULL: the row's is not asked for */
    uint32_t segments;
    uint32_t wide_chunk;  /* of whole_wide.cu, over all live tokens; 0: over what masks hold */
    uint32_t wide_chunks; /* of all pairs of a KV head */
    bool exact;           /* whole_wide.cu */
    /* the flat part */
    const uint16_t *flat_k;
    const uint32_t *flat_segment_begin;
    uint32_t flat_tokens, flat_segments, flat_segment_base;
    const float *logits; /* as attention left them; NULL: masks say what was attended to */
    uint64_t room;
    loci_cuda_row_cache cache;
} loci_cuda_attribution;

/* Figures of a look-up in the order of loci_lookup_stats, added up on the device. */
typedef struct loci_cuda_stats {
    unsigned long long root_bytes, leaf_bytes, code_bytes, hash_bytes, kv_bytes, kv_leaf_bytes,
        tail_bytes, dense_kv_bytes, selected_tokens, candidate_tokens, elapsed_ns;
} loci_cuda_stats;

/* query.cu: what was counted on the device, or, where that is NULL, what the host knows, and the
 * time since the queries came; told is page-locked. */
cudaError_t loci_cuda_k_tell(cudaStream_t stream, const loci_cuda_look *look,
                             const loci_cuda_stats *counted, const loci_cuda_stats *known,
                             loci_cuda_stats *told);

/* --- mode squeezed: squeeze.cu --------------------------------------------------------- */

typedef struct loci_cuda_squeeze {
    float *score[2]; /* [roots_all], [leaves_all]: S of attention/README.md */
    float *total;    /* [kv_heads][vectors]: log-sum-exp of a level */
    float *partial;  /* [pairs][runs][vectors][2]: maximum and sum of runs of 32 nodes */
    uint32_t runs;   /* of the largest pair's leaves */
    float threshold[2];
} loci_cuda_squeeze;

/* Both levels' scores; after count_live. */
cudaError_t loci_cuda_k_squeeze(cudaStream_t stream, const loci_cuda_look *look,
                                const loci_cuda_squeeze *squeeze);
/* token_mask becomes the live tokens of kept leaves; it has been zeroed. */
cudaError_t loci_cuda_k_squeeze_select(cudaStream_t stream, const loci_cuda_look *look,
                                       const loci_cuda_squeeze *squeeze);

/* --- mode hierarchical ----------------------------------------------------------------- */

#define LOCI_CUDA_LOT 8u /* vectors whose sketches are summed together */

/* Selected are the candidates whose share has more than these bits, and those up to place `ties` of
 * the list that equal them. */
typedef struct loci_cuda_cut {
    uint32_t key, ties;
} loci_cuda_cut;

#define LOCI_CUDA_RUN 256u /* mask words of a pair whose bits are counted together */

/* Runs of a mask. A pair's begin at word_base / LOCI_CUDA_RUN + its extent. */
LOCI_CUDA_BOTH uint32_t loci_cuda_runs(const loci_cuda_look *look) {
    return look->words / LOCI_CUDA_RUN + look->extents + 1;
}

#define LOCI_CUDA_SLICES 800u     /* of all lists, each scored by a block, about */
#define LOCI_CUDA_STEPS 2048u     /* of shares, 16 to each power of two: the cut begins with them */
#define LOCI_CUDA_STEP_LIST 4096u /* shares of the cut's step that are listed, at most */
#define LOCI_CUDA_CUT_BLOCKS 16u  /* of an hr, where there are no more hr and many shares */
#define LOCI_CUDA_CHOOSERS 128u   /* blocks, at most, that list what is selected for a head */

/* What is selected: its place in the mask, and the number of its segment among those of the view,
 * or any greater number if it has none. */
typedef struct loci_cuda_chosen {
    uint32_t place, segment;
} loci_cuda_chosen;

/* How a vector's estimates by sketch are counted where candidates are limited: in steps, top being
 * what a sum of 0 means to the best kept root; floor: the least key (candidates.cu) of a candidate.
 */
typedef struct loci_cuda_key_scale {
    double top;
    float step;
    uint32_t floor;
} loci_cuda_key_scale;

/* "hr" numbers (KV head, row), a "lot" LOCI_CUDA_LOT vectors of a row. A table is what a vector
 * knows of a pair: [parts][16] entries, and base + scale * (sum of entries) the estimate behind the
 * root's centre. */
typedef struct loci_cuda_choice {
    uint64_t roots_wanted, candidates_wanted, budget; /* for each head; budget 0 = none */
    float root_slack, reach, top_p;
    bool tail;     /* for the figures */
    uint4 *zeroed; /* what kernels count in, cleared first: zeroed_count times 16 bytes */
    size_t zeroed_count;
    float *root_score;  /* of a head [vectors][roots], from root_at * vectors on */
    float *root_centre; /* the same of q.mean + q8.c alone */
    float *root_floor;  /* [kv_heads][vectors]: the least score that is kept */
    uint8_t *root_kept; /* of a head [rows][roots], from root_at * rows on */
    uint8_t *table; /* [pairs][rows][lots][dim / 4][16][LOCI_CUDA_LOT]: an entry of each vector of a
                       lot stands side by side */
    float *table_base, *table_scale; /* [pairs][vectors] */
    uint16_t *kept;       /* as root_kept: for each pair and row the roots that are kept */
    uint32_t *kept_count; /* [pairs][rows] (zeroed) */
    uint32_t *leaf_count; /* [hr]: leaves of the roots that the row keeps (zeroed) */
    uint32_t *leaf_place; /* as root_kept: where the leaves of a root begin among those */
    float *leaf_score;    /* of a head [vectors][leaves], from leaf_at * vectors on; the first
                             leaf_count of them are there */
    uint4 *sums;          /* [hr][lots][words * 32]: sums of entries of the tokens of kept roots;
                             NULL where that were too much: they are added up again */
    float *floor;         /* [kv_heads][vectors] */
    /* Where no more than `limit` tokens are to be candidates of a vector, but for ties (of one row;
     * 0 = any number; candidates_wanted is the same then): keys of those that reach a floor before
     * it is known, reached_count of reached_room of them. key_reach: by how much the floor's
     * estimate may lie below the greatest. */
    uint64_t limit, reached_room;
    double key_reach;
    loci_cuda_key_scale *key_scale; /* [kv_heads][vectors] */
    float *reached;                 /* [kv_heads][vectors][reached_room], in any order */
    uint32_t *reached_count; /* [kv_heads][vectors] (zeroed); may be more than there is room for */
    uint32_t *candidates;    /* a mask (zeroed) */
    uint32_t *run_count;     /* [hr][runs]: candidates of the run (zeroed) */
    uint32_t *rank;          /* [hr][words]: candidates before the word */
    uint32_t *count;         /* [hr] (zeroed) */
    uint64_t room;           /* of one row in the next three */
    uint32_t *slots;         /* [hr][room]: place in the mask of each candidate, ascending */
    float *score;            /* [hr][group][room] */
    float *share;            /* [hr][room] */
    uint32_t slices;         /* of a list */
    float *totals; /* [kv_heads][vectors][slices][2]: of a slice of the list the greatest score,
                      and the sum of exp(score - that) */
    unsigned long long *step_mass; /* [hr][LOCI_CUDA_STEPS]: shares of a step together (zeroed) */
    uint32_t *step_count;          /* the same: how many, where there is a budget (zeroed) */
    /* [hr][LOCI_CUDA_STEP_LIST]: shares of the cut's step; NULL of more than LOCI_CUDA_CUT_BLOCKS
     * hr, where one block looks for the cut. */
    float *step_list;
    uint32_t *step_listed; /* [hr][2] (zeroed): how many; blocks that have listed theirs */
    loci_cuda_cut *cut;    /* [hr] */
    /* Of one row in a tile, of which attention reads a list; else NULL. As slots, `room` a head: */
    uint32_t *segment;        /* of each candidate, as in loci_cuda_chosen */
    loci_cuda_chosen *chosen; /* what is selected, in the order of places, side by side */
    uint32_t *chosen_count;   /* [kv_heads] */
    uint32_t *chosen_told;    /* [kv_heads][LOCI_CUDA_CHOOSERS] (zeroed): 1 + how many of a part */
    int8_t *folded;           /* [pairs][vectors][dim], as in loci_cuda_rank */
    float *folded_scale;
    int32_t *folded_sum;
} loci_cuda_choice;

LOCI_CUDA_BOTH uint32_t loci_cuda_lots(const loci_cuda_look *look) {
    return (look->group + LOCI_CUDA_LOT - 1) / LOCI_CUDA_LOT;
}

/* sketches.cu: what loci_cuda_k_queries does; clears what is zeroed, fills table and folded. */
cudaError_t loci_cuda_k_prepare(cudaStream_t stream, const loci_cuda_look *look,
                                const loci_cuda_choice *choice, const loci_cuda_look_query *query);
/* nodes.cu: root_score, root_centre, root_floor, then what says which roots are kept. */
cudaError_t loci_cuda_k_roots(cudaStream_t stream, const loci_cuda_look *look,
                              const loci_cuda_choice *choice);
/* sketches.cu: leaf_score and sums, then floor; candidates and run_count. block_bytes: the shared
 * memory that a block may use. */
cudaError_t loci_cuda_k_leaves(cudaStream_t stream, const loci_cuda_look *look,
                               const loci_cuda_choice *choice, size_t block_bytes);
cudaError_t loci_cuda_k_candidates(cudaStream_t stream, const loci_cuda_look *look,
                                   const loci_cuda_choice *choice);
/* Between these two, where there is a limit: key_scale, reached and its counts; the floors there.
 */
cudaError_t loci_cuda_k_list_reaching(cudaStream_t stream, const loci_cuda_look *look,
                                      const loci_cuda_choice *choice);
cudaError_t loci_cuda_k_raise_floors(cudaStream_t stream, const loci_cuda_look *look,
                                     const loci_cuda_choice *choice);
/* codes.cu: rank, count, slots, segment, score and totals. */
cudaError_t loci_cuda_k_codes(cudaStream_t stream, const loci_cuda_look *look,
                              const loci_cuda_choice *choice);
/* choose.cu: share, cut and chosen; then token_mask, which has been zeroed. */
cudaError_t loci_cuda_k_choose_tokens(cudaStream_t stream, const loci_cuda_look *look,
                                      const loci_cuda_choice *choice);
cudaError_t loci_cuda_k_mask_chosen(cudaStream_t stream, const loci_cuda_look *look,
                                    const loci_cuda_choice *choice);
/* sparse.cu: loci_cuda_k_attend_sparse for one row and one tile of vectors, from `chosen`. */
cudaError_t loci_cuda_k_attend_listed(cudaStream_t stream, const loci_cuda_look *look,
                                      const loci_cuda_choice *choice, const loci_cuda_attend *args);
/* tail.cu: the last part of each pair's partial results. */
cudaError_t loci_cuda_k_attend_tail(cudaStream_t stream, const loci_cuda_look *look,
                                    const loci_cuda_choice *choice, const loci_cuda_attend *args);

/* --- attribute.cu ----------------------------------------------------------------------- */

/* choice: logits are those of `chosen`; NULL: of all places. */
cudaError_t loci_cuda_k_attribute(cudaStream_t stream, const loci_cuda_look *look,
                                  const loci_cuda_choice *choice,
                                  const loci_cuda_attribution *args);
/* Adds what the masks of a look-up hold, what candidates took to find (choice: NULL = none), and
 * base. */
cudaError_t loci_cuda_k_stats(cudaStream_t stream, const loci_cuda_look *look,
                              const loci_cuda_choice *choice, const loci_cuda_stats *base,
                              loci_cuda_stats *stats);
/* The same where there is `chosen`. */
cudaError_t loci_cuda_k_stats_listed(cudaStream_t stream, const loci_cuda_look *look,
                                     const loci_cuda_choice *choice, const loci_cuda_stats *base,
                                     loci_cuda_stats *stats);

/* gain.cu: the sum over vectors of log(1 + sum over a segment's candidates of exp(S - floor)). */
typedef struct loci_cuda_gain {
    const float *sink_k;      /* [kv_heads][dim]; NULL = none */
    uint32_t segments;        /* of extents */
    uint32_t *tops;           /* [hr][segments], zeroed */
    unsigned long long *sums; /* [hr][segments], zeroed */
    float *gain;              /* [hr][segments] */
    float *total;             /* [segments] */
} loci_cuda_gain;

cudaError_t loci_cuda_k_gain(cudaStream_t stream, const loci_cuda_look *look,
                             const loci_cuda_choice *choice, const loci_cuda_gain *args);

/* --- rank.cu --------------------------------------------------------------------------- */

typedef struct loci_cuda_rank {
    const uint32_t *segments; /* [count] numbers of the view's segments */
    uint32_t count;
    const uint32_t *extent_segment; /* [extents] segment_base */
    const float *sink_k;            /* [kv_heads][dim]; NULL = none */
    const uint16_t *flat_k;
    const uint32_t *flat_segment_begin;
    uint32_t flat_segment_base, flat_segments;
    const uint8_t *dead; /* [flat_segment_base]; NULL = none */
    int8_t *folded;      /* [pairs][vectors][dim]: q times the code scales of the pair, rounded */
    float *folded_scale; /* [pairs][vectors] */
    int32_t *folded_sum;
    double *parts; /* [count][kv_heads] */
    float *scores; /* [count] */
} loci_cuda_rank;

cudaError_t loci_cuda_k_fold(cudaStream_t stream, const loci_cuda_look *look, int8_t *folded,
                             float *scale, int32_t *sum);
cudaError_t loci_cuda_k_score_segments(cudaStream_t stream, const loci_cuda_look *look,
                                       const loci_cuda_rank *args);

/* --- sample.cu ------------------------------------------------------------------------- */

/* What a block found in its part of a row: the greatest logit and the sum of exp(logit - that); the
 * greatest one after penalty and bans, and its place. */
typedef struct loci_cuda_sample_part {
    float max, sum, best;
    uint32_t place;
} loci_cuda_sample_part;

#define LOCI_CUDA_SAMPLE_PART 4096u /* tokens of a part */

/* Tokens whose weight has the same first bits. */
typedef struct loci_cuda_sample_step {
    unsigned long long mass;
    uint32_t count, listed;
} loci_cuda_sample_step;

typedef struct loci_cuda_sample_token {
    float weight;
    uint32_t place;
} loci_cuda_sample_token;

#define LOCI_CUDA_SAMPLE_STEPS 2048u

typedef struct loci_cuda_sample_args {
    const float *logits;
    float *adjusted;              /* [rows][vocab] */
    loci_cuda_sample_part *parts; /* [rows][parts], a part for each LOCI_CUDA_SAMPLE_PART tokens */
    loci_cuda_sample_step *steps; /* [rows][LOCI_CUDA_SAMPLE_STEPS]; of draws */
    loci_cuda_sample_token *list; /* [rows][vocab]; of draws: by steps, the heaviest first */
    int32_t *ids;
    float *logprob;
    uint32_t rows, vocab;
    float temperature, top_p, penalty;
    uint64_t seed, step;
    const uint32_t *banned, *recent; /* on the device */
    uint32_t banned_count, recent_count;
    loci_cuda_fault *fault;
} loci_cuda_sample_args;

cudaError_t loci_cuda_k_sample(cudaStream_t stream, const loci_cuda_sample_args *args);

#ifdef __cplusplus
}
#endif

#endif
