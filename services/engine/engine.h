/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine of one node: a model on a backend, a store, and the registration pipeline, joined to
 * answer questions. It knows nothing of RPC; handlers in services/locid translate.
 *
 * Threading: one engine serves any number of threads; at most options.queries_max questions run
 * at once, others wait for a place (bounded by their cancel) or get LOCI_E_LIMIT when more than
 * options.queries_waiting_max wait. Those that run share forward passes (model/batch.h); what each
 * is answered does not depend on the others, but how long it takes does.
 *
 * Memory: options.memory_bytes bounds what the process allocates (plan.h, base/budget.h). What a
 * question needs beyond its slot is refused with LOCI_E_LIMIT, reason MEMORY_BUDGET, when it does
 * not fit. Extents are mapped files, page cache, and not part of it.
 */
#ifndef LOCI_SERVICES_ENGINE_ENGINE_H
#define LOCI_SERVICES_ENGINE_ENGINE_H

#include "base/cancel.h"
#include "memory/ingest.h"
#include "memory/store.h"
#include "model/model.h"

typedef struct loci_engine loci_engine;

typedef struct loci_engine_options {
    const char *data;       /* data directory, made if missing */
    const char *model;      /* model folder */
    const char *also_model; /* of one that only answers corpora that it encoded; NULL = none */
    const char *backend;    /* "cpu" or "cuda"; NULL = cpu */
    const char *precision;  /* "auto" (bf16 where the backend has it), "f32", "bf16" */
    uint64_t memory_bytes;  /* the budget; 0 = half of RAM */
    uint64_t calls_bytes;   /* of it for messages of running calls */
    unsigned threads;       /* 0 = one per usable CPU */
    unsigned queries_max;   /* 0 = 2, or 1 where memory is short */
    unsigned queries_waiting_max; /* 0 = 64 */
    /* Weight of the lexical score in ranking, in percent of the tuned one (rank.c): 0 = 100; below
     * 0 = none. */
    int lexical_percent;
} loci_engine_options;

/* Whether an engine can run the model of this folder, told from its configuration and tokenizer
 * alone. Opening begins with this, before memory is shared out and weights are read. */
LOCI_MUST_CHECK loci_status loci_engine_check_model(const char *dir, loci_error *err);
LOCI_MUST_CHECK loci_status loci_engine_open(const loci_engine_options *options, loci_engine **out,
                                             loci_error *err);
void loci_engine_close(loci_engine *engine);
loci_store *loci_engine_store(loci_engine *engine);
loci_ingest *loci_engine_ingest(loci_engine *engine);
loci_model *loci_engine_model(loci_engine *engine);
const char *loci_engine_also_fingerprint(loci_engine *engine); /* NULL without also_model */
const char *loci_engine_backend_name(loci_engine *engine);     /* describe() of the backend */

typedef struct loci_engine_status {
    loci_budget_usage memory;
    uint64_t memory_used_bytes; /* anonymous memory of the process */
    unsigned queries_running, queries_waiting;
    loci_tier_stats tiers; /* zero where the backend has no memory of its own */
} loci_engine_status;
void loci_engine_status_of(loci_engine *engine, loci_engine_status *out);

typedef enum loci_encoding {
    LOCI_ENCODING_DEFAULT, /* causal where the model can and its keys carry positions */
    LOCI_ENCODING_INDEPENDENT,
    LOCI_ENCODING_CAUSAL
} loci_encoding;

/* What is chosen for a corpus once and for all, and its first settings. */
typedef struct loci_corpus_options {
    loci_encoding encoding;
    bool beyond_trained_length; /* a causal one may grow longer than the sequences that its model
                                   was trained on */
    bool kv_int8;               /* K and V of its extents are kept as int8 rather than bf16 */
    const loci_settings_change *settings; /* NULL = none is named */
} loci_corpus_options;

/* Creates a corpus for the engine's model. By default the first two layers are dense where every
 * layer of a stock model reaches the corpus, but at most a quarter of them. LOCI_E_UNSUPPORTED,
 * reason ENCODING, where the model cannot; LOCI_E_INVAL, reason INVALID_SETTINGS. */
LOCI_MUST_CHECK loci_status loci_engine_create_corpus(loci_engine *engine, const char *name,
                                                      const loci_corpus_options *options,
                                                      loci_corpus_info *out, loci_error *err);

/* --- Calibration ---------------------------------------------------------------------------- */
#define LOCI_CALIBRATION_ROWS 16u
typedef struct loci_calibration_row {
    float temperature, scale; /* attn_temperature, attn_scale */
    double loss;              /* of a next token behind passages encoded apart, in nats */
    double error;             /* standard error of the difference to the first row, over samples */
    double agreement;         /* how often the likeliest next token is that of the causal reading */
    bool present;             /* as the corpus has them */
} loci_calibration_row;

typedef struct loci_calibration {
    bool comparable; /* false: of the built-in model, whose corpora are never causal; no rows */
    bool causal;     /* the corpus */
    uint32_t samples;
    uint64_t tokens, context_tokens; /* next tokens in all; tokens before each text, on average */
    double seconds;
    double causal_loss, alone_loss; /* the passages and the text as one sequence; no passages */
    loci_calibration_row rows[LOCI_CALIBRATION_ROWS]; /* the first: 1, 1 */
    uint32_t row_count, best;
    bool applied;    /* the best row's settings are the corpus's now */
    bool thresholds; /* those of mode squeezed are kept for this revision */
    uint64_t revision;
} loci_calibration;

/* Compares independent with causal encoding on samples of the corpus, under several temperatures
 * and scales, for about a minute at most (calibrate.c), and makes the thresholds of mode squeezed.
 * apply: sets the best; LOCI_E_PRECONDITION, reason ENCODING, of a causal corpus; reason TOO_SHORT
 * where there is nothing to compare on. */
LOCI_MUST_CHECK loci_status loci_engine_calibrate(loci_engine *engine, const char *corpus,
                                                  bool apply, const loci_cancel *cancel,
                                                  loci_calibration *out, loci_error *err);

/* Begins to make the index of a corpus anew for the engine's model, or joins what is under way
 * (loci_corpus_reindex); *begun is false when that would change nothing, which `force` does all the
 * same. The encoding stays. */
LOCI_MUST_CHECK loci_status loci_engine_reindex(loci_engine *engine, const char *name, bool force,
                                                const loci_reindex_watch *watch, bool *begun,
                                                loci_error *err);

/* Evidence quotes the sentences that matter (quote.h); a hit quotes its whole passage. */
typedef struct loci_passage {
    const char *document;                /* id */
    uint64_t start, end;                 /* of the quote */
    loci_slice quote;                    /* exactly those bytes */
    uint64_t passage_start, passage_end; /* of the passage that holds it */
    loci_slice passage;                  /* exactly those bytes */
    double share;                        /* of the passage; or its score, in hits */
    const char *answer; /* what was read there ("" or NULL: nothing), see loci_passage_mark */
    uint64_t answer_start, answer_end; /* where it stands in the document; equal: not literally */
} loci_passage;

/* Of what questions that decode in one pass read once for all of them (together.c) each has an
 * equal part of the bytes, but for kv_dense_bytes, and the whole of lookup_ms. */
typedef struct loci_usage {
    uint64_t corpus_tokens, question_tokens, answer_tokens, decode_steps;
    uint64_t kv_read_bytes, index_read_bytes, kv_dense_bytes, fetched_bytes;
    uint64_t question_read_bytes, decode_read_bytes;
    double first_token_ms, decode_tokens_per_s, total_ms, lookup_ms, read_twice_ms;
    double share_sink, share_unattributed;
} loci_usage;

typedef enum loci_event_kind {
    LOCI_EVENT_STARTED,
    LOCI_EVENT_PROGRESS,
    LOCI_EVENT_EVIDENCE,
    LOCI_EVENT_CANDIDATE,
    LOCI_EVENT_DELTA,
    LOCI_EVENT_USAGE,
    LOCI_EVENT_FINISHED
} loci_event_kind;

/* Pointers are valid during the callback only. */
typedef struct loci_event {
    loci_event_kind kind;
    uint64_t revision; /* STARTED */
    loci_mode mode;    /* STARTED */
    const char *model; /* STARTED: the fingerprint of the one that answers */
    bool read_twice;   /* STARTED */
    const char *stage; /* PROGRESS: "question", "rank", "read", "decode" */
    uint64_t done, total;
    const loci_passage *passages; /* EVIDENCE, FINISHED; CANDIDATE: the one passage */
    size_t passage_count;
    const char *text; /* CANDIDATE, FINISHED: the answer; DELTA: the next piece (valid UTF-8) */
    bool found;       /* CANDIDATE, FINISHED */
    bool verbatim;    /* FINISHED: some passage has the answer literally, marked in it */
    double score;     /* CANDIDATE: the highest gives the answer */
    const struct loci_reading *reading; /* CANDIDATE: see belief.h */
    const char *stop;                   /* FINISHED: "eos", "length", "repetition", "not_found" */
    const loci_usage *usage;            /* USAGE */
} loci_event;

/* An error returned by the callback ends the answer with it (the client went away). */
typedef loci_status (*loci_event_fn)(void *ctx, const loci_event *event, loci_error *err);

typedef struct loci_answer_request {
    const char *corpus, *question;
    int mode;            /* loci_mode, or -1 = default (hierarchical) */
    double top_p;        /* 0 = default */
    uint32_t budget;     /* 0 = no limit */
    int read_twice;      /* 1 on, 0 off, -1 = default: on */
    uint32_t max_tokens; /* 0 = default (32; stock models 128) */
    double temperature;
    uint64_t seed;
    double sparsity; /* squeezed; 0 = 0.9 */
    uint64_t min_revision;
    uint32_t evidence_count; /* 0 = 4; at most 16 */
} loci_answer_request;

/* Events in order: STARTED, PROGRESS..., EVIDENCE, (CANDIDATE...), DELTA..., USAGE, FINISHED. Stock
 * models have no candidates. */
LOCI_MUST_CHECK loci_status loci_engine_answer(loci_engine *engine,
                                               const loci_answer_request *request,
                                               const loci_cancel *cancel, loci_event_fn on_event,
                                               void *ctx, loci_error *err);

typedef loci_status (*loci_hits_fn)(void *ctx, const loci_passage *hits, size_t count,
                                    const loci_usage *usage, uint64_t revision, loci_error *err);
/* The k best passages; k in 1..100, 0 = 5. The callback runs once. */
LOCI_MUST_CHECK loci_status loci_engine_retrieve(loci_engine *engine, const char *corpus,
                                                 const char *question, uint32_t k,
                                                 uint64_t min_revision, const loci_cancel *cancel,
                                                 loci_hits_fn on_hits, void *ctx, loci_error *err);

#endif
