/* SPDX-License-Identifier: Apache-2.0
 *
 * Internals of the engine: what one running question holds.
 *
 * A slot is the reusable working memory of a question (sequence, look-ups, device buffers); the
 * engine has queries_max of them and a question owns one from admission to its end. All of a slot
 * is touched by the question's thread only, but the sequence by whoever runs its pass, and in it,
 * in its place while it waits, by a question that reads the corpus for both (model/batch.h).
 */
#ifndef LOCI_SERVICES_ENGINE_QUERY_H
#define LOCI_SERVICES_ENGINE_QUERY_H

#include <pthread.h>

#include "model/batch.h"
#include "services/engine/answer_text.h"
#include "services/engine/engine.h"
#include "services/engine/plan.h"
#include "services/engine/split.h"

/* With <q> and <a> one chunk of a sequence (256 rows, model/sequence.c): ranking reads the queries
 * of the whole question in one call. */
#define LOCI_QUESTION_TOKENS_MAX 254u
#define LOCI_ANSWER_TOKENS_MAX 512u
#define LOCI_RETRIEVE_MAX 100u
#define LOCI_EVIDENCE_MAX 16u

typedef struct loci_slot {
    bool busy;
    loci_sequence *sequence;
    loci_lookup *lookup; /* of one layer after another; NULL when memory was short */
    loci_buffer *part;   /* out and lse of one part of the attention; grown on demand */
    size_t part_bytes;
    loci_buffer *row;  /* q, out and lse of one row in company; NULL until it is needed */
    uint64_t serial;   /* of question, snapshot and buffers: another one, other steps */
    loci_buffer *mass; /* f32, one for each segment of the view; while a question runs; NULL: the
                          attention on each is not asked for */
} loci_slot;

/* Working memory of the look-ups that several questions have in common, of one group of a pass
 * (loci_attend_together); made when it is first used. */
typedef struct loci_company {
    loci_lookup *lookup;
    loci_buffer *rows; /* of LOCI_GEMM_FEW_ROWS rows (together.c) */
} loci_company;

/* Thresholds of mode squeezed for one corpus revision (squeezed.c): of a question's rows and of a
 * next token, for the shares 2^(-i/2) of the tokens to be kept, of roots and leaves. */
#define LOCI_SQUEEZED_SHARES 17u
typedef struct loci_squeezed_table {
    uint64_t uid, revision;
    uint32_t dense_layers;
    float scale; /* loci_query_corpus_scale */
    float threshold[2][LOCI_SQUEEZED_SHARES][2];
} loci_squeezed_table;

/* A model and what questions to it need. The engine of --also-model lacks what registers, and all
 * that is shared (backend, store, budget) is the other one's. */
struct loci_engine {
    loci_engine *also; /* or NULL */
    loci_backend *backend;
    loci_model *model;
    loci_store *store;
    loci_ingest *ingest;
    loci_splitter *splitter; /* of the ingest thread */
    loci_geometry geometry;
    bool stock;               /* asked by prompts of its chat family (prompt.c) */
    uint32_t sequence_tokens; /* of a slot */
    uint32_t question_start;  /* the position of what looks at an independent corpus */
    uint32_t question_room;   /* most tokens of what looks at a corpus, and its answer */
    float *sink_k, *sink_v;
    loci_budget *budget;
    loci_plan plan;
    double lexical_percent;
    pthread_mutex_t lock;
    pthread_cond_t slot_free;
    loci_batch *batch; /* of the slots' sequences; NULL where there is one slot */
    loci_company company[LOCI_ATTEND_GROUPS]; /* by group of a pass of the batch */
    loci_slot *slots;
    unsigned slot_count, waiting, waiting_max;
    loci_squeezed_table squeezed; /* the last one used; under lock */
};

/* The state of one running question. */
typedef struct loci_query {
    loci_engine *engine;
    loci_slot *slot;
    loci_snapshot *snapshot;
    const loci_corpus_view *view;
    const loci_cancel *cancel;
    loci_select_params params;
    loci_corpus_settings settings;
    bool causal;          /* the corpus */
    float squeezed[2][2]; /* thresholds of a question's rows and of a next token */
    uint32_t start;       /* the position of what looks at the corpus */
    const char *text;     /* the question, the caller's */
    loci_tokens question; /* ids of " question" */
    loci_usage usage;
    uint64_t started_ns;
    uint32_t evidence_from; /* the first row of the sequence whose attention is evidence */
    double
        sink_mass; /* attention on the shared prefix so far, summed over layers, rows and heads */
    uint64_t step_bytes;                        /* read since it was last set to 0 */
    struct loci_attend_step *steps, *last_step; /* corpus_attend.c: of the pass under way */
    uint32_t step_count;                        /* that are its own alone */
    uint64_t step_work;                         /* rows times tokens of these */
    uint64_t reserved;                          /* in the memory budget, beyond the slot */
} loci_query;

/* query.c: takes a slot and a snapshot, tokenises the question; fini releases all. */
LOCI_MUST_CHECK loci_status loci_query_init(loci_query *query, loci_engine *engine,
                                            const char *corpus, const char *question,
                                            uint64_t min_revision, const loci_cancel *cancel,
                                            loci_error *err);
void loci_query_fini(loci_query *query);
/* Reserves memory of the budget until fini, or until it is given back; what: for the sentence of a
 * refusal. */
LOCI_MUST_CHECK loci_status loci_query_reserve(loci_query *query, uint64_t bytes, const char *what,
                                               loci_error *err);
void loci_query_give_back(loci_query *query, uint64_t bytes);
double loci_query_elapsed_ms(const loci_query *query);
/* Of the logits of the question's and the answer's rows: among themselves, and over the corpus's
 * tokens (A and A / T of attention/README.md). */
float loci_query_attention_scale(const loci_query *query);
float loci_query_corpus_scale(const loci_query *query);
/* How far the rows from now on look: a question's, or the next token of an answer. */
void loci_query_reach(loci_query *query, bool question);
/* <q> question <a> into *out; of a stock model, for ranking: begin question. Either way the
 * question's tokens are query->question and begin in the second row. */
LOCI_MUST_CHECK loci_status loci_query_prompt(const loci_query *query, loci_tokens *out,
                                              loci_error *err);
/* Waits for what reads the corpus. A page that could not be read explains any other failure, and
 * makes the results of a success worthless. */
LOCI_MUST_CHECK loci_status loci_query_settle(const loci_query *query, loci_stream *stream,
                                              loci_error *err);

/* prompt.c: what a stock model is asked. Appends the prompt of the question, to be answered from
 * the passages, or, without any, from the corpus that the prompt's tokens will see; its begin token
 * is left out then, being the corpus's own. *head: how many of the tokens come before the question.
 */
LOCI_MUST_CHECK loci_status loci_stock_prompt(const loci_query *query, const loci_passage *passages,
                                              uint32_t count, loci_tokens *out, uint32_t *head,
                                              loci_error *err);
/* The tokens of the longer prompt around question and passages. */
LOCI_MUST_CHECK loci_status loci_stock_prompt_tokens(const loci_model *model, uint32_t *out,
                                                     loci_error *err);

/* corpus_attend.c: the hooks that add the corpus's part in a retrieval layer (loci_attend_fn), and
 * at the pass's end what that has read to the usage (loci_attended_fn). */
loci_status loci_corpus_attend(void *ctx, const loci_attend_call *call, loci_error *err);
loci_status loci_corpus_attended(void *ctx, loci_status status, loci_error *err);
/* together.c: for loci_sequence_set_together with these hooks. Questions about one revision of a
 * corpus, whose next tokens read a layer whole, read it together. */
extern const loci_attend_together loci_corpus_together;
void loci_company_close(loci_engine *engine, loci_company *company);
/* Clears the masses; before the first step of an attributed pass. */
LOCI_MUST_CHECK loci_status loci_corpus_attend_begin(loci_query *query, loci_error *err);
/* The `count` segments with most mass, best first; share of each of the corpus's mass. */
typedef struct loci_ranked {
    uint32_t segment;
    double score;
    double words; /* of rank.c: BM25 of the most that the question's words can give, 0..1; -1 where
                     words are left out or the question has none */
} loci_ranked;
LOCI_MUST_CHECK loci_status loci_corpus_attend_best(loci_query *query, uint32_t limit,
                                                    loci_ranked *out, uint32_t *count,
                                                    loci_error *err);
/* Out and lse of a part of `rows` rows (grown if needed). */
void loci_slot_close(loci_engine *engine, loci_slot *slot);
LOCI_MUST_CHECK loci_status loci_slot_part(loci_engine *engine, loci_slot *slot, uint32_t rows,
                                           uint32_t heads, uint32_t head_dim, uint32_t extra_rows,
                                           loci_ref *out, loci_ref *lse, loci_error *err);

/* rank.c: the best passages for the question by late interaction and words, best first. */
LOCI_MUST_CHECK loci_status loci_query_rank(loci_query *query, uint32_t limit, loci_ranked *out,
                                            uint32_t *count, loci_error *err);

/* lexical.c: the BM25 score of every segment; 0 for those that hold no term of the question. *most:
 * what a segment of nothing but the question's words comes close to; 0 when it has none. */
LOCI_MUST_CHECK loci_status loci_query_lexical(loci_query *query, float *scores, double *most,
                                               loci_error *err);
/* The segments of highest positive score, best first, equal ones in order; returns their number. */
uint32_t loci_lexical_best(const float *scores, uint32_t segments, uint32_t limit, uint32_t *out);

/* passage.c: a segment as a passage that is quoted whole; its bytes are appended to *bytes and the
 * lengths set, the data left NULL until loci_passages_bind (the buffer may move while it grows). */
LOCI_MUST_CHECK loci_status loci_passage_load(loci_query *query, const loci_ranked *ranked,
                                              loci_buf *bytes, loci_passage *out, loci_error *err);
/* Appends the tokens of a segment as it was encoded, without its begin token. */
LOCI_MUST_CHECK loci_status loci_segment_tokens(const loci_query *query, uint32_t segment,
                                                loci_tokens *out, loci_error *err);
void loci_passages_bind(loci_passage *passages, size_t count, const loci_buf *bytes);
/* Quotes of each what matters for the question and the answer ("" = none yet). */
void loci_passages_cite(loci_passage *passages, size_t count, const char *question,
                        const char *answer);

/* Marks where the answer stands in the quote: without regard to ASCII case and the kind of white
 * space (loci_text_find). False where it does not. */
bool loci_passage_mark(loci_passage *passage, const char *answer);
/* The same in each that has it, no answer in others; whether there is one. */
bool loci_passages_mark(loci_passage *passages, size_t count, const char *answer);

/* generate.c: one answer, token by token. */
typedef struct loci_generation {
    loci_buf text;       /* of the answer, without its leading space */
    uint32_t tokens;     /* steps taken, the end not counted */
    double logprob;      /* sum over the answer's tokens and the end */
    double none_logprob; /* of <none> as the first token; stock models have none */
    bool says_none;      /* <none> was the likeliest first token */
    const char *stop;
} loci_generation;
/* A stock model's fixed reply (answer_text.h) leaves *out without text. */
LOCI_MUST_CHECK loci_status loci_generate(loci_query *query, const loci_answer_request *request,
                                          loci_generation *out, loci_piece_fn on_piece, void *ctx,
                                          loci_error *err);
/* The same, with pieces as DELTA events and the figures of decoding in the query's usage. */
LOCI_MUST_CHECK loci_status loci_generate_streamed(loci_query *query,
                                                   const loci_answer_request *request,
                                                   loci_generation *out, loci_event_fn on_event,
                                                   void *ctx, loci_error *err);
uint32_t loci_answer_tokens_most(const loci_query *query, const loci_answer_request *request);

/* reader.c: read twice. direct.c: over the corpus's attention. Both emit all events after STARTED.
 */
LOCI_MUST_CHECK loci_status loci_answer_read_twice(loci_query *query,
                                                   const loci_answer_request *request,
                                                   loci_event_fn on_event, void *ctx,
                                                   loci_error *err);
LOCI_MUST_CHECK loci_status loci_answer_direct(loci_query *query,
                                               const loci_answer_request *request,
                                               loci_event_fn on_event, void *ctx, loci_error *err);

/* causal.c: what registration encodes in a causal corpus (loci_encoder.encode_after). */
loci_status loci_encode_after(void *ctx, const loci_snapshot *past, const uint32_t *tokens,
                              uint32_t count, uint16_t *const *k, uint16_t *const *v,
                              const loci_cancel *cancel, loci_error *err);
/* LOCI_E_UNSUPPORTED where a model cannot: some layer's keys and values are not kept, or see only a
 * window. */
LOCI_MUST_CHECK loci_status loci_causal_check(const loci_model *model, loci_error *err);

/* recorder.c: query vectors of tokens in the retrieval layers. */
#define LOCI_RECORDED 100u
typedef struct loci_recorder {
    loci_query *query;
    loci_buffer **q; /* of each retrieval layer: f32 [LOCI_RECORDED][q_heads][head_dim] */
    uint32_t taken;  /* so many rows of them */
    uint32_t first;  /* row of the pass under way from which on they are taken */
    bool attends;    /* the passes look at the corpus */
} loci_recorder;

LOCI_MUST_CHECK loci_status loci_recorder_open(loci_query *query, loci_recorder *out,
                                               loci_error *err);
void loci_recorder_close(loci_recorder *recorder); /* also after a failed open */
/* What it takes; note: with keep or restore, which copy its rows. */
uint64_t loci_recorder_bytes(const loci_model_config *config, bool note);
/* Runs tokens on the slot's sequence, which is empty, and takes the queries of the last `keep`. */
LOCI_MUST_CHECK loci_status loci_recorder_pass(loci_recorder *recorder, const uint32_t *ids,
                                               uint32_t count, uint32_t keep, loci_error *err);
/* The recorded rows as those of the tokens of a causal corpus up to position `end`, with the ones
 * kept up to `start` before them. A failure is logged: they can be had again. */
void loci_recorder_keep(loci_recorder *recorder, uint64_t start, uint64_t end);
/* Those kept for `end`; false: there are none. */
bool loci_recorder_restore(loci_recorder *recorder, uint64_t end);

/* squeezed.c: sets the query's thresholds so that about `share` of the tokens are kept. */
LOCI_MUST_CHECK loci_status loci_query_squeezed(loci_query *query, double share, loci_error *err);
void loci_squeezed_choose(const loci_squeezed_table *table, double share, float out[2][2]);

#endif
