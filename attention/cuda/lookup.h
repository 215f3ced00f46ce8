/* SPDX-License-Identifier: Apache-2.0
 *
 * The state of one look-up on the device, shared by lookup.c (begin, stages) and report.c (what it
 * tells the host). Its device memory is its arena, which begin resets, and the tables of each
 * layer; the pairs of the layer stay pinned from begin to the next begin or the end,
 * though what was enqueued may run on (pairs.h).
 */
#ifndef LOCI_ATTENTION_CUDA_LOOKUP_H
#define LOCI_ATTENTION_CUDA_LOOKUP_H

#include "attention/cuda/cuda.h"
#include "attention/cuda/pairs.h"

typedef struct lookup_chunk {
    uint8_t *data;
    size_t bytes;
} lookup_chunk;

typedef struct lookup_arena {
    lookup_chunk *chunks;
    size_t count, current, used;
    uint64_t cleared; /* how often its chunks were freed */
} lookup_arena;

/* Pairs and heads of a layer as they were sent last: from one token to the next they rarely change.
 */
typedef struct lookup_table {
    void *host;
    uint8_t *device;
    size_t bytes;
} lookup_table;

/* What was enqueued for one row in one layer; see steps.c. */
typedef enum lookup_step_state {
    SEEN_NEVER,
    SEEN_ONCE, /* and may be recorded */
    RECORDED,
    UNRECORDABLE
} lookup_step_state;

typedef struct lookup_step {
    void *key;
    size_t key_bytes;
    lookup_step_state state;
    uint64_t used; /* by the look-up's step_clock */
    cudaGraphExec_t graph;
    /* What it uses: */
    const loci_stream *stream;
    const void *scratch;
    uint64_t arena; /* its `cleared` */
    const loci_cuda_pair *pairs;
} lookup_step;

#define LOOKUP_STEPS 2u /* of a layer */

struct loci_lookup {
    loci_cuda *cuda;
    const loci_corpus_view *corpus;
    loci_select_params params;
    loci_mode mode; /* dense where hierarchical would read everything */
    bool ready;     /* the last stage was enqueued */
    bool tokens_scored, tokens_selected, attended;
    bool masked, counted; /* by look_mask, by look_count */
    bool deletions;       /* tokens of a pair are not live */
    bool cached;          /* rows of a pair go through the cache of rows */
    uint32_t wide_chunk;  /* of whole_wide.cu, which attends; 0: another kernel does */
    uint32_t layer;
    uint64_t live_tokens;
    double spread; /* sum over extents of the square root of their live tokens */
    loci_cuda_look look;
    loci_cuda_choice choice; /* mode hierarchical */
    loci_cuda_squeeze squeeze;
    /* Of a single row, or of each of a few, once they are attended: logits (loci_cuda_attend),
     * masses of segments and figures; else NULL. */
    float *logits;
    uint64_t room;
    unsigned long long *mass;
    loci_cuda_stats *figures;
    bool figured;                  /* figures are there */
    loci_cuda_pair_entry **pinned; /* [pinned_count], room for pinned_room */
    size_t pinned_count, pinned_room;
    loci_cuda_pair *pairs; /* host copy of look.pairs */
    loci_cuda_head *heads; /* host copy of look.heads, [look.kv_heads], behind pairs */
    lookup_table *tables;  /* [table_count], by layer */
    uint32_t table_count;
    const uint32_t *flat_segment_begin; /* on the device; NULL without flat tokens */
    bool reported;                      /* figures go to the host */
    lookup_step *steps;                 /* [step_count], LOOKUP_STEPS a layer */
    uint32_t step_count;
    uint64_t step_clock;
    lookup_step *step;     /* under way, or the last one */
    loci_cuda_stats *told; /* by step, page-locked: figures of recorded steps; or NULL */
    bool opened;           /* by step_begin, for lookup_begin */
    bool replayed;         /* the step */
    lookup_arena arena;
};

/* Device memory of the arena, 256-byte aligned; NULL, and a failure of the stream, when there is
 * none. */
void *look_alloc(loci_stream *stream, loci_lookup *lookup, size_t bytes);
/* look_alloc and a copy from the host. */
void *look_put(loci_stream *stream, loci_lookup *lookup, const void *data, size_t bytes);
/* After a launcher: not ready any more on failure. */
bool look_launched(loci_stream *stream, loci_lookup *lookup, cudaError_t result, const char *what);
/* What was enqueued may run on. */
void look_unpin(loci_lookup *lookup);
/* Pins the pairs of a layer, and sends what kernels must know of them. `ready` says whether that
 * went well; the host's part of a look-up is as before lookup_begin but for that. */
void look_open(loci_stream *stream, loci_lookup *lookup, const loci_corpus_view *corpus,
               uint32_t layer);
/* The flat part's keys in the look-up's layer; NULL after a failure. */
const uint16_t *look_flat_k(loci_stream *stream, const loci_lookup *lookup);
/* steps.c: where the figures of the step that is recorded or replayed go. */
loci_cuda_stats *look_told(const loci_lookup *lookup);
/* steps.c: frees all that was recorded. */
void look_forget_steps(loci_lookup *lookup);
/* whole.c: whether whole_wide.cu serves that width, and slots of its blocks. */
bool loci_cuda_whole_wide(const loci_cuda *cuda, uint32_t dim);
uint32_t loci_cuda_wide_chunk(const loci_lookup *lookup);
/* In how many such chunks the pairs of a KV head are cut. */
uint32_t loci_cuda_wide_parts(const loci_lookup *lookup, uint32_t chunk);
/* The mask of selected tokens, for those who read it. */
bool look_mask(loci_stream *stream, loci_lookup *lookup);
/* root_live and leaf_live. */
bool look_count(loci_stream *stream, loci_lookup *lookup);
bool look_shared(const loci_lookup *lookup);
/* Whether what is selected becomes a list that attention, attribution and figures read. */
bool look_listed(const loci_lookup *lookup);
/* The limit to a row's candidates, 0 where there is none. */
uint64_t look_limit(const loci_lookup *lookup);
/* Waits for the stream and reads device memory; false on failure. */
bool look_read(loci_stream *stream, void *to, const void *from, size_t bytes);

#endif
