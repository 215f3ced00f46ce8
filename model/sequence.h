/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences and passes from within; internal to model/.
 *
 * A pass (pass.c) runs one chunk each of up to LOCI_PASS_MEMBERS sequences through the layers: rows
 * one chunk after another, one product for each weight over all of them, attention chunk by chunk
 * with the arguments that it would have alone. The first sequence, the leader, lends its scratch
 * and thread; the pass has the batch's stream, since a failure on a member's own is nobody else's.
 * What a chunk gives does not depend on its company as long as the rows of the pass lie in the
 * range (attention/backend.h, gemm) that those of the chunk alone lie in, which batch.c sees to.
 */
#ifndef LOCI_MODEL_SEQUENCE_H
#define LOCI_MODEL_SEQUENCE_H

#include <pthread.h>

#include "model/batch.h"
#include "model/decoder.h"

#define LOCI_CHUNK_ROWS 256u
#define LOCI_PASS_MEMBERS 8u
_Static_assert(LOCI_PASS_MEMBERS >= LOCI_GEMM_FEW_ROWS, "a pass has as many chunks as rows allow");

/* Where a chunk is on its way through a batch; under the batch's lock. */
typedef enum loci_step_state {
    LOCI_STEP_DONE,
    LOCI_STEP_WAITING,  /* in the queue of its batch */
    LOCI_STEP_RUNNING,  /* in a pass that another thread runs */
    LOCI_STEP_ATTENDING /* as before, and it is this thread's turn to reach the corpus */
} loci_step_state;

/* One chunk. In a pass it belongs to the leader's thread, but while ATTENDING to its own. */
typedef struct loci_pass loci_pass;
typedef struct loci_step {
    const uint32_t *tokens;
    uint32_t rows, row;              /* of the pass: how many, from which on */
    uint32_t logits_rows, logits_at; /* of the last rows; where they go */
    int stop_after;                  /* retrieval layer; -1 = none */
    const loci_cancel *cancel;
    loci_status status; /* other than LOCI_OK: left out from here on */
    loci_error error;
    uint32_t retrieval; /* of which layer */
    uint32_t with;      /* members that it reaches the corpus for, as bits; 0 = another does */
    uint32_t group;     /* of the pass; where `with` names several */
    loci_step_state state;
} loci_step;

struct loci_sequence {
    loci_model *model;
    loci_stream *stream;
    loci_decoder_scratch scratch;
    uint32_t tokens_max, length;
    uint32_t skipped;      /* positions without a token */
    uint32_t layers_valid; /* layers whose cache holds all tokens: fewer after a stopped pass */
    /* f32, for each layer [cache_rows][K and V][kv_heads][head_dim]; its own, or its batch's, where
     * it has tokens_max rows from cache_row on. */
    loci_buffer *cache;
    uint32_t cache_rows, cache_row;
    bool owns_cache;
    loci_buffer *lse;      /* f32 [rows][q_heads] */
    float attention_scale; /* of logits in retrieval layers */
    loci_attend_fn attend;
    loci_attended_fn attended;
    const loci_attend_together *together; /* or NULL */
    void *attend_ctx;
    loci_attend_dense *attention; /* one for each layer: the stream reads them until sync */
    loci_buffer *logits;          /* f32 [logits_capacity][vocab] */
    float *host_logits;
    uint32_t logits_capacity, logits_rows;
    bool logits_on_host;
    loci_buffer *sampled; /* i32 id, f32 logprob */
    loci_step step;
    /* Of its batch (NULL: none), under the batch's lock: */
    loci_batch *batch;
    pthread_cond_t turn;
    loci_sequence *next; /* in the queue */
    loci_pass *pass;     /* ATTENDING: that waits */
    bool decoding;       /* its owner will bring the next token */
    uint64_t away;       /* the pass (by number) after which it is waited for; 0 = it is not */
};

struct loci_pass {
    loci_sequence *member[LOCI_PASS_MEMBERS]; /* the first is the leader */
    uint32_t count, rows;
    uint32_t group[LOCI_ATTEND_GROUPS]; /* members of each, as bits */
    uint32_t group_count;
    loci_batch *batch;  /* NULL: the leader alone */
    uint32_t attending; /* members that enqueue their look-ups right now; under the batch's lock */
    loci_attend_span span[LOCI_PASS_MEMBERS]; /* of the members; the stream reads them until sync */
    loci_decoder_pass decoder;
};

/* K of a layer's first row in the cache; V is loci_cache_width / 2 floats behind. */
static inline uint32_t loci_cache_width(const loci_model_config *c) {
    return 2 * c->kv_heads * c->head_dim;
}

static inline loci_ref loci_cache_at(const loci_sequence *s, uint32_t layer, uint32_t row) {
    size_t width = loci_cache_width(&s->model->config) * sizeof(float);
    return loci_ref_at(s->cache, ((size_t)layer * s->cache_rows + row) * width);
}

/* sequence.c: with a cache of its own where `cache` is NULL. */
LOCI_MUST_CHECK loci_status loci_sequence_make(loci_model *model, uint32_t tokens_max,
                                               loci_buffer *cache, uint32_t cache_rows,
                                               uint32_t cache_row, loci_sequence **out,
                                               loci_error *err);

/* pass.c: runs the pass on the calling thread, the leader's. Each member's step has its status;
 * failures of its own stream are still there. */
void loci_pass_run(loci_pass *pass);
/* The member's callback in step.retrieval on its own stream, that of its group, or the pass's,
 * where the group is all of it; on the member's thread. */
void loci_pass_reach(const loci_pass *pass, loci_sequence *member);

/* batch.c: runs the step of a sequence that has joined a batch, in company if there is any. */
void loci_batch_run(loci_sequence *sequence);
/* Has the members that are to reach the corpus (step.with) do so, each on its thread. */
void loci_batch_reach(loci_pass *pass);
/* Of passes of several members. */
loci_stream *loci_batch_stream(const loci_batch *batch);
/* Of a group of such a pass, below LOCI_ATTEND_GROUPS; by the thread of the pass. NULL where it
 * cannot be opened. */
loci_stream *loci_batch_group_stream(loci_batch *batch, uint32_t group);
/* f32 [*rows][vocab], of the pass of few rows. */
loci_ref loci_batch_logits(const loci_batch *batch, uint32_t *rows);
/* The sequence's owner is not waited for any longer. */
void loci_batch_leave(loci_sequence *sequence);

#endif
