/* SPDX-License-Identifier: Apache-2.0
 *
 * The state of one look-up on the CPU, shared by lookup.c (begin, stages, export), nodes.c
 * (scores of roots), sketches.c (of leaves), limited.c (candidates of a limited number), codes.c
 * (of tokens), select.c (what is kept), squeeze.c (the rule of Squeezed Attention), sparse.c
 * (attention) and rank.c (segments).
 *
 * One lookup_head for each KV head. Its roots are numbered over all extents, extent by extent.
 * An "entry" is a root kept by one row (or, where all rows share one set, by all of them, and then
 * row 0 stands for them); entries stand root by root, rows ascending, so that work by block walks
 * roots and work by row finds its entry in each root. All memory is the look-up's arena, which
 * is reset by begin. Parallel tasks work on some roots of one (extent, KV head), a "part", or on
 * one (KV head, row), and write nothing that another one writes.
 */
#ifndef LOCI_ATTENTION_CPU_LOOKUP_H
#define LOCI_ATTENTION_CPU_LOOKUP_H

#include "attention/cpu/corpus_kernels.h"
#include "attention/index_layout.h"

typedef struct lookup_chunk {
    uint8_t *data;
    size_t bytes;
} lookup_chunk;

typedef struct lookup_arena {
    lookup_chunk *chunks;
    size_t count, current, used;
    size_t bytes;       /* of all chunks */
    size_t recent;      /* what recent look-ups used at most, fading */
    loci_error refusal; /* status OK, or why the chunks could not grow */
} lookup_arena;

/* Up to cpu->part_roots roots of a pair. */
typedef struct lookup_part {
    const loci_extent_view *extent;
    const uint8_t *blob;
    const uint64_t *live;
    uint32_t kv_head;
    uint32_t root_base; /* number of the pair's first root among the head's */
    uint32_t first,
        end; /* its roots among the pair's; the part with root 0 checks the pair's own */
    size_t list_begin,
        list_end;     /* limited.c: its candidates, after select its tokens, among the head's */
    loci_error error; /* first failure of a task on this part */
    loci_lookup_stats stats;
} lookup_part;

/* A root that a row keeps (its number among the head's), and its entry. */
typedef struct lookup_kept {
    uint32_t root;
    size_t entry;
} lookup_kept;

/* How keys of limited.c stand for what one head of a group estimates. */
typedef struct lookup_key_scale {
    float step;
    double top;     /* what the most but the sums of sketches can give */
    uint16_t floor; /* the least key of a candidate */
} lookup_key_scale;

typedef struct lookup_head {
    uint32_t roots;       /* over all extents */
    float *root_score;    /* [vectors][roots]: log mass; in mode squeezed q.c */
    uint32_t *root_live;  /* [roots] */
    uint32_t *root_first; /* [roots] first slot in the root's pair */
    uint8_t *root_leaves; /* [roots] */
    uint8_t *root_groups; /* [roots] groups of sketches */
    uint64_t live_tokens;
    double spread;         /* sum over extents of the square root of their live tokens */
    uint8_t *root_kept;    /* [rows][roots]; absent where all rows share one set */
    size_t *entry_begin;   /* [roots + 1] */
    uint32_t *entry_row;   /* [entries] */
    size_t *row_begin;     /* [rows + 1] in row_kept; absent where all rows share one set */
    lookup_kept *row_kept; /* [entries] what each row keeps, root by root */
    size_t *leaf_at;    /* [roots] where the leaves of a root with entries begin in the next two */
    loci_leaf *leaf;    /* copies, so that later stages find them together */
    uint8_t *leaf_live; /* live tokens of a leaf */
    size_t *score_at;   /* [entries] in leaf_score: [group][leaves of the root] */
    float *leaf_score;
    float *centre;        /* [entries][group] q.(mean + root) */
    uint16_t *sum;        /* of sketches, where they are kept between stages; else NULL */
    size_t *sum_at;       /* [entries] in sum: [group][tokens of the root, in whole groups] */
    float *floor;         /* [vectors] what a token's sketch must reach to be a candidate */
    uint64_t *leaf_mask;  /* [entries] leaves with candidates, a bit each */
    size_t *mask_at;      /* [entries + 1] in the masks: one word a leaf of leaf_mask */
    uint32_t *candidates; /* candidates of the leaf, a bit each */
    uint32_t *token_mask; /* selected tokens of the leaf, a bit each */
    size_t *token_at;     /* [entries + 1]: see lookup_scores */
    float *token_score;
    size_t listed;      /* candidates */
    uint32_t *slots;    /* of a listed row: of the candidates, in their order; after select, of the
                           selected ones. Else NULL */
    float *root_centre; /* [group][roots] q.(mean + root); this and the next: limited.c */
    size_t *key_at;     /* [roots + 1] where the keys of a kept root begin */
    uint16_t *key;      /* [group][key_at[roots]] */
    uint16_t *sample;   /* room for some of one head's */
    lookup_key_scale *scale; /* [group] */
    float *squeezed[2];      /* mode squeezed: mean S of each root, of each leaf */
    size_t leaves;           /* of roots with entries */
} lookup_head;

struct loci_lookup {
    loci_cpu *cpu;
    const loci_corpus_kernels *kernels;
    const loci_corpus_view *corpus;
    loci_select_params params;
    loci_mode mode; /* dense where hierarchical would read everything */
    bool ready;     /* the last stage succeeded */
    bool tokens_scored, tokens_selected, attended;
    uint64_t begun_ns;
    uint32_t layer, rows, q_heads, kv_heads, group, dim;
    uint32_t vectors; /* of one KV head: rows * group; vector = row * group + head in group */
    uint32_t blocks;  /* of lanes */
    /* Of scaled queries, one KV head after another: rows [vectors][dim]; f32 lanes; int8 lanes of
     * q and of q * q / 2 with their scales and sums. */
    float *q, *q_lanes, *q_scale, *qq_scale;
    int8_t *q_codes, *qq_codes;
    int32_t *q_sum, *qq_sum;
    float *steady;      /* [kv_heads][vectors] */
    lookup_part *parts; /* [part_count], extent by extent, KV head by KV head */
    size_t *pair_begin; /* [extents * kv_heads + 1]: where a pair's begin */
    size_t part_count;
    lookup_head *heads;        /* [kv_heads] */
    float *task_terms;         /* [parts][blocks * 16]: q.mean */
    loci_sketch_table *tables; /* [parts][vectors] */
    float *part_most;          /* limited.c: [parts][group] of its kept roots' root_centre */
    uint8_t *folded;           /* [threads][folded_stride]: queries with a pair's code scales */
    size_t folded_stride;
    float **scratch;  /* [threads] */
    float *logits;    /* exact ones of selected tokens, kept for attribution, or NULL: of each leaf
                         [blocks][tokens][16] */
    size_t *logit_at; /* [parts] number of a part's first selected token */
    struct corpus_job *dense; /* dense_corpus.c: what it attended, or NULL */
    lookup_arena arena;
};

/* 64-byte aligned, not initialised; NULL when memory is short. */
void *lookup_alloc(loci_lookup *lookup, size_t bytes);
/* One scratch of that many floats for each thread of the pool. */
bool lookup_scratch(loci_lookup *lookup, size_t floats);

/* The first part of a pair, extent * kv_heads + KV head. */
static inline lookup_part *lookup_first_part(const loci_lookup *lookup, size_t pair) {
    return &lookup->parts[lookup->pair_begin[pair]];
}

static inline bool lookup_shared(const loci_lookup *lookup) {
    return lookup->mode != LOCI_MODE_HIERARCHICAL;
}

/* Whether some entry of a root has leaves with candidates. */
static inline bool lookup_has_leaves(const lookup_head *head, uint32_t root) {
    return head->mask_at[head->entry_begin[root]] != head->mask_at[head->entry_begin[root + 1]];
}

/* The leaves of a root with entries, once the leaves are scored. */
static inline const loci_leaf *lookup_leaves(const lookup_head *head, uint32_t root) {
    return head->leaf + head->leaf_at[root];
}

/* Candidates of an entry. */
static inline size_t lookup_candidates(const loci_lookup *lookup, const lookup_head *head,
                                       size_t entry) {
    return (head->token_at[entry + 1] - head->token_at[entry]) / lookup->group;
}

/* Whether one row is looked up, whose vectors fit into a block: it has a list of slots. */
static inline bool lookup_listed(const loci_lookup *lookup) {
    return lookup->mode == LOCI_MODE_HIERARCHICAL && lookup->rows == 1 && lookup->blocks == 1;
}

/* Whether there is a limit to its candidates: they are found as limited.c says, without leaves. */
static inline bool lookup_limited(const loci_lookup *lookup) {
    return lookup_listed(lookup) && lookup->params.candidates_max > 0 &&
           !lookup->params.estimate_tail;
}

/* The scores of an entry's candidates by head `j` of the group. Of a single row, those of all
 * entries follow each other for each head. */
static inline float *lookup_scores(const loci_lookup *lookup, const lookup_head *head, size_t entry,
                                   uint32_t j) {
    size_t at = head->token_at[entry];
    if (lookup_listed(lookup)) return head->token_score + at / lookup->group + j * head->listed;
    return head->token_score + at + j * lookup_candidates(lookup, head, entry);
}

static inline size_t lookup_entries(const lookup_head *head) {
    return head->entry_begin[head->roots];
}

/* Lanes of a KV head in an operand with `unit` bytes or floats a lane and channel. */
static inline size_t lookup_lane_at(const loci_lookup *lookup, uint32_t kv_head, uint32_t block) {
    return ((size_t)kv_head * lookup->blocks + block) * LOCI_LANES * lookup->dim;
}

/* Bits [first, first + count) of the live bitmap, 1 <= count <= 32. */
static inline uint32_t lookup_live_bits(const uint64_t *live, uint32_t first, uint32_t count) {
    uint64_t all = (1ull << count) - 1;
    if (!live) return (uint32_t)all;
    uint64_t bits = live[first / 64] >> (first % 64);
    if (first % 64 + count > 64) bits |= live[first / 64 + 1] << (64 - first % 64);
    return (uint32_t)(bits & all);
}

/* Without a call, which it would be on the oldest x86-64. */
static inline uint32_t lookup_count_bits(uint64_t bits) {
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (uint32_t)(bits * 0x0101010101010101u >> 56);
}

/* The entries among [begin, end) whose rows have a vector in `block`: [*first, *last). */
static inline void lookup_block_entries(const loci_lookup *lookup, const lookup_head *head,
                                        size_t begin, size_t end, uint32_t block, size_t *first,
                                        size_t *last) {
    uint32_t low = block * LOCI_LANES / lookup->group;
    uint32_t high = (block * LOCI_LANES + LOCI_LANES - 1) / lookup->group;
    while (begin < end && head->entry_row[begin] < low) begin++;
    *first = begin;
    while (begin < end && head->entry_row[begin] <= high) begin++;
    *last = begin;
}

/* all [LOCI_ROOT_LEAVES_MAX]: what the masks (candidates or token_mask) of a root's entries hold
 * together, a word for each of its leaves. */
void lookup_join_masks(const lookup_head *head, uint32_t root, const uint32_t *masks,
                       uint32_t *all);

/* q of a KV head times the mean of its pair: out [blocks * 16], 0 in unused lanes. */
void lookup_mean_terms(const loci_lookup *lookup, const lookup_part *part, float *out);

void lookup_fault(lookup_part *part, const char *what, uint32_t index);
/* Puts the first error of a part, in their order, in the stream; false if there is one. */
bool lookup_report(loci_stream *stream, loci_lookup *lookup);
/* Runs fn(lookup, number of a part) over the pool, then reports the first error. */
void lookup_run_parts(loci_stream *stream, loci_lookup *lookup, loci_pool_fn fn);
/* Runs fn(lookup, head * rows + row). */
void lookup_run_rows(loci_lookup *lookup, loci_pool_fn fn);
void lookup_no_memory(loci_stream *stream, loci_lookup *lookup);

/* nodes.c: the roots' hashes, before all else; scores. */
void lookup_check_task(void *arg, size_t index, unsigned thread);
void lookup_root_task(void *arg, size_t index, unsigned thread);
void lookup_leaf_task(void *arg, size_t index, unsigned thread);
/* Scores of nodes [0, count), count <= 64, for one block of lanes: out [count][16]. size NULL: q.c
 * alone, without mass and variance; centre: (optional) that beside it. */
void lookup_score_tile(const loci_lookup *lookup, const lookup_part *part, const loci_node *first,
                       uint32_t count, const uint32_t *size, const float *mean_terms,
                       uint32_t block, float *out, float *centre);
/* The next root of a part, from `local` on, with entries; the end if there is none. The first lines
 * of its block are on their way to the cache. */
uint32_t lookup_next_kept(const loci_lookup *lookup, const lookup_part *part, uint32_t local);
/* sketches.c: tables of one part, then the leaves of one of its roots for all rows that keep it. */
bool lookup_prepare_sketches(loci_stream *stream, loci_lookup *lookup);
void lookup_make_tables(const loci_lookup *lookup, const lookup_part *part);
void lookup_score_sketches(const loci_lookup *lookup, const lookup_part *part, uint32_t root);
/* Marks the tokens of one part that reach a floor of a row. */
void lookup_candidate_task(void *arg, size_t index, unsigned thread);
/* limited.c. Keys: room, tables and steps; then those of one part's kept roots. */
bool lookup_prepare_keys(loci_stream *stream, loci_lookup *lookup);
void lookup_key_task(void *arg, size_t index, unsigned thread);
/* The floors of one KV head; room for its list and its scores; the list. */
void lookup_key_floors_task(void *arg, size_t index, unsigned thread);
bool lookup_prepare_list(loci_stream *stream, loci_lookup *lookup);
void lookup_list_task(void *arg, size_t index, unsigned thread);
/* The list of a KV head without what is not taken. */
void lookup_keep_listed(loci_lookup *lookup, uint32_t kv_head, const uint8_t *taken);
/* The k-th highest of n keys, n a multiple of LOCI_SKETCH_GROUP; 1 if there are not so many above
 * it. sample: room for n / 16 + LOCI_SKETCH_GROUP. */
uint16_t lookup_kth_key(const loci_corpus_kernels *kernels, const uint16_t *key, size_t n,
                        uint64_t k, uint16_t *sample);
/* codes.c: room for the masks of leaf_mask, then for the scores of the candidates. */
bool lookup_place_masks(loci_stream *stream, loci_lookup *lookup);
bool lookup_prepare_codes(loci_stream *stream, loci_lookup *lookup);
void lookup_code_task(void *arg, size_t index, unsigned thread);
/* select.c */
void lookup_keep_roots_task(void *arg, size_t index, unsigned thread);
void lookup_find_floors_task(void *arg, size_t index, unsigned thread);
void lookup_select_task(void *arg, size_t index, unsigned thread);
/* squeeze.c: scores and keeps roots and leaves by the paper's rule. */
void lookup_squeeze(loci_stream *stream, loci_lookup *lookup);

/* Marks elements in descending value, ties by index, until their sum reaches `target` or there are
 * `most`. An element of negative or NaN value is never taken. */
void lookup_choose(const loci_corpus_kernels *kernels, const float *value, size_t n, double target,
                   uint64_t most, uint8_t *taken);
/* The k-th highest of n values, k > 0; -INFINITY if there are not so many above it. */
float lookup_kth(const loci_corpus_kernels *kernels, const float *value, size_t n, uint64_t k);

#endif
