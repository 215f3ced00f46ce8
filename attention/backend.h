/* SPDX-License-Identifier: Apache-2.0
 *
 * The one table of numeric operations behind which CPU and GPU stand.
 *
 * Contract
 * - Operations enqueue on a stream and may run later; results are visible to the host only
 *   after sync(). Host arrays passed in arguments (spans, views, parameters) must stay
 *   unchanged until sync(). upload() alone copies its source before it returns.
 * - Memory is an opaque loci_buffer; a loci_ref is a byte offset in one. The host never
 *   dereferences either. wrap() makes a read-only buffer over host memory that outlives it.
 * - Operations on one stream run in order. A stream belongs to one thread at a time;
 *   different streams may be used by different threads at once.
 * - An operation that fails while running makes sync() return the first failure; results
 *   of that stream since the previous sync() are then undefined.
 * - Results do not depend on the number of threads: same binary, backend, instruction set
 *   and settings give the same bytes.
 *
 * Shapes are row-major; "rows" are tokens. f32 activations everywhere; a weight is packed
 * once in the precision asked for, and products in BF16 round both factors to bf16 and
 * accumulate in f32.
 */
#ifndef LOCI_ATTENTION_BACKEND_H
#define LOCI_ATTENTION_BACKEND_H

#include "base/buf.h"
#include "base/status.h"

struct loci_pool;
struct loci_corpus_view;
struct loci_keys;
struct loci_clusters;

/* Numbers of rows that products treat alike: from 1 to FEW, and from STEADY on. */
#define LOCI_GEMM_FEW_ROWS 8u
#define LOCI_GEMM_STEADY_ROWS 32u
#define LOCI_ATTEND_EXACT_QUERIES 8u

typedef enum loci_dtype {
    LOCI_F32 = 0,
    LOCI_BF16 = 1,
    LOCI_F16 = 2,
    LOCI_I32 = 3,
    LOCI_I8 = 4
} loci_dtype;

typedef struct loci_buffer loci_buffer;
typedef struct loci_stream loci_stream;
typedef struct loci_weight loci_weight;
typedef struct loci_lookup loci_lookup;

typedef struct loci_ref {
    loci_buffer *buffer;
    size_t offset; /* bytes */
} loci_ref;

/* One run of queries over one run of keys. Query i of the span, i in [0, q_count), stands at
 * key position kv_count - q_count + i when causal. */
typedef struct loci_attend_span {
    uint32_t q_begin, q_count;   /* rows of q and out */
    uint32_t kv_begin, kv_count; /* rows of k and v */
} loci_attend_span;

/* Dense attention with online softmax (FlashAttention, arXiv 2205.14135, section 3.1).
 * q, out: f32 [rows][q_heads][head_dim], row strides in elements; k, v: kv_dtype
 * [kv rows][kv_heads][head_dim]. q_heads is a multiple of kv_heads; query head h reads KV
 * head h / (q_heads / kv_heads). lse, optional (buffer NULL): f32 [rows][q_heads], the log of
 * the sum of exp(logits). window: 0 = none, else key j is seen by position p iff p - j < window.
 * first_key_bias is added to the logits of key kv_begin of every span, and that key is seen
 * from every position whatever the window, when first_key_is_sink is set. A query that sees no
 * key gets out = 0 and lse = -INFINITY. precision BF16: products may round both factors to bf16, as
 * those with weights do, in spans of more than LOCI_ATTEND_EXACT_QUERIES queries; a query's result
 * depends on nothing but its own span in any case. */
typedef struct loci_attend_dense {
    loci_ref q, k, v, out, lse;
    uint32_t q_stride, kv_stride, out_stride;
    uint32_t q_heads, kv_heads, head_dim;
    loci_dtype kv_dtype, precision;
    float scale; /* of q.k, usually 1/sqrt(head_dim) */
    bool causal;
    uint32_t window;
    bool first_key_is_sink;
    float first_key_bias;
    const loci_attend_span *spans;
    uint32_t span_count;
} loci_attend_dense;

typedef enum loci_mode {
    LOCI_MODE_DENSE = 0,
    LOCI_MODE_SQUEEZED = 1,
    LOCI_MODE_HIERARCHICAL = 2
} loci_mode;

/* How a look-up selects; see attention/README.md for the rules word by word. */
typedef struct loci_select_params {
    loci_mode mode;
    float top_p;     /* (0, 1]; 1 with budget 0 reads everything */
    uint32_t budget; /* most tokens for each KV head and query token; 0 = no limit */
    /* For each query head the best roots, so many times the sum over extents of the square root of
     * their live tokens, and the best tokens below them as candidates, so many times the square
     * root of all live tokens; but at least so many. */
    float roots, candidates;
    uint32_t roots_min, candidates_min;
    /* Of a single row: no more candidates than so many for each head, but for ties; 0 = no limit. A
     * budget wants a few times as many candidates, where the best leaves may hold far more. */
    uint32_t candidates_max;
    bool estimate_tail;          /* add the unread nodes by centroid, size and value mean */
    bool each;                   /* attribute_each follows, not attribute */
    float squeezed_threshold[2]; /* T of roots and leaves; mode squeezed */
    /* BF16: products of more than LOCI_ATTEND_EXACT_QUERIES rows with keys and values may round
     * queries and weights to bf16, as those with weights do. */
    loci_dtype precision;
} loci_select_params;

/* Whether a look-up reads everything. */
static inline bool loci_select_all(const loci_select_params *params) {
    return params->mode == LOCI_MODE_DENSE ||
           (params->mode == LOCI_MODE_HIERARCHICAL && params->top_p >= 1.0f && params->budget == 0);
}

/* The measured defaults: mode hierarchical; attention/README.md has the figures behind them. */
void loci_select_defaults(loci_select_params *params);
/* How many roots and candidates. Passages need their best tokens only, not nearly all mass, and all
 * rows of a question are ranked together. */
typedef enum loci_reach {
    LOCI_REACH_QUESTION, /* the rows of a question */
    LOCI_REACH_ANSWER,   /* the next token of an answer */
    LOCI_REACH_RANKING   /* the rows of a question that passages are ranked for */
} loci_reach;
void loci_select_reach(loci_select_params *params, loci_reach reach);

/* Bytes read by one look-up, counted where they are read, each block once a step. leaf_bytes: the
 * blocks of kept roots; hash_bytes: what K and V are verified by; kv_bytes: K and V of the tokens
 * attended; kv_leaf_bytes: of the whole leaves that hold them (where
 * candidates_max holds: of them alone). */
typedef struct loci_lookup_stats {
    uint64_t root_bytes, leaf_bytes, code_bytes, hash_bytes, kv_bytes, kv_leaf_bytes, tail_bytes;
    uint64_t dense_kv_bytes;  /* the kv_bytes of dense mode */
    uint64_t selected_tokens; /* over KV heads and query tokens */
    uint64_t candidate_tokens;
    uint64_t elapsed_ns; /* from begin to the figures, by the clock of where the look-up runs */
} loci_lookup_stats;

/* A copy on the device, or, without a buffer in `to`, a download to `host`. */
typedef struct loci_move {
    loci_ref to, from;
    void *host;
    size_t bytes; /* whole floats, as the offsets are */
} loci_move;
#define LOCI_MOVES_MAX 4u

/* Where a device has the extents that look-ups read: in its own memory, and keys and values that do
 * not fit in memory of the host below it; rows: keys and values of tokens read from there, of which
 * hits were cached on the device. Rows count since the backend opened. */
typedef struct loci_tier_stats {
    uint64_t device_bytes, device_budget, host_bytes, host_budget, row_hits, row_misses;
} loci_tier_stats;

/* Is asked before the memory of look-ups grows by `bytes` > 0, and may refuse with a status and a
 * sentence; is told of memory given back with `bytes` < 0. Any thread. */
typedef loci_status (*loci_lookup_memory_fn)(void *ctx, int64_t bytes, loci_error *err);

/* One selected token, for tests, proofs and evidence. */
typedef struct loci_selected {
    uint32_t extent, kv_head, row, slot;
} loci_selected;

typedef struct loci_sample_params {
    float temperature; /* 0 = greedy */
    float top_p;
    float repetition_penalty; /* 1 = none; over the recent tokens given */
    uint64_t seed, step;
} loci_sample_params;

typedef struct loci_backend_options {
    unsigned threads; /* 0 = one per usable CPU */
    const char *isa;  /* NULL = best; "portable", "avx2", "avx512" for tests */
} loci_backend_options;

typedef struct loci_backend loci_backend;

typedef struct loci_backend_ops {
    const char *name;
    bool on_device; /* buffers, weights, streams and look-ups are in memory of a device, not of the
                       process */
    loci_status (*open)(const loci_backend_options *options, loci_backend *self, loci_error *err);
    void (*close)(loci_backend *self);
    /* One line for logs and figures: "cpu avx512_bf16, 2 threads". */
    const char *(*describe)(loci_backend *self);
    /* Threads of the CPU for host-side work (index building). */
    struct loci_pool *(*pool)(loci_backend *self);

    /* Memory. alloc: zero-filled, 64-byte aligned. */
    loci_status (*alloc)(loci_backend *self, size_t bytes, loci_buffer **out, loci_error *err);
    loci_status (*wrap)(loci_backend *self, const void *host, size_t bytes, loci_buffer **out,
                        loci_error *err);
    void (*free)(loci_backend *self, loci_buffer *buffer); /* NULL allowed; not while in use */

    /* Streams. */
    loci_status (*stream_open)(loci_backend *self, loci_stream **out, loci_error *err);
    void (*stream_close)(loci_backend *self, loci_stream *stream);
    loci_status (*sync)(loci_stream *stream, loci_error *err);
    /* (optional) Order among streams without the host, where operations run later. mark: remembers
     * what is enqueued so far; await: what follows on `stream` runs after what `other` had marked
     * last. While threads await a stream nobody uses it. Failures stay where they are. */
    void (*mark)(loci_stream *stream);
    void (*await)(loci_stream *stream, const loci_stream *other);
    void (*upload)(loci_stream *stream, loci_ref dst, const void *src, size_t bytes);
    void (*download)(loci_stream *stream, void *dst, loci_ref src, size_t bytes);
    void (*copy)(loci_stream *stream, loci_ref dst, loci_ref src, size_t bytes);
    /* Up to LOCI_MOVES_MAX small copies and downloads at once; none reads what another writes. */
    void (*move)(loci_stream *stream, const loci_move *moves, uint32_t count);

    /* Weights: data of `dtype` [rows][cols], packed for y = x W^T in `precision` (F32 or BF16).
     * parts > 1: matrices of the same cols, stacked by rows. */
    loci_status (*weight_create)(loci_backend *self, const void *const *data, const uint32_t *rows,
                                 uint32_t parts, uint32_t cols, loci_dtype dtype,
                                 loci_dtype precision, loci_weight **out, loci_error *err);
    /* (optional) The same for products in BF16 without a copy: data, bf16, is read where it is, and
     * outlives the weight. Products of few rows run about as fast, those of many pay for packing
     * each time, with the same results; those of few differ by rounding. */
    loci_status (*weight_map)(loci_backend *self, const void *const *data, const uint32_t *rows,
                              uint32_t parts, uint32_t cols, loci_weight **out, loci_error *err);
    void (*weight_free)(loci_backend *self, loci_weight *weight);

    /* Dense operations; all refs f32 unless said. */
    /* y [rows][weight rows] (+)= x [rows][cols] W^T. A row's result does not depend on the other
     * rows; nor on how many they are, from 1 to LOCI_GEMM_FEW_ROWS, and from LOCI_GEMM_STEADY_ROWS
     * on. */
    void (*gemm)(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows,
                 const loci_weight *weight, bool accumulate);
    /* y [rows][cols] = table[ids[row]]; ids i32 in range (checked by the caller) */
    void (*embed)(loci_stream *stream, loci_ref y, const loci_weight *table, loci_ref ids,
                  uint32_t rows);
    /* y = x / sqrt(mean(x^2) + eps) * gain, for each of `rows` rows of `cols` */
    void (*rms_norm)(loci_stream *stream, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                     uint32_t cols, float eps);
    /* In place on x [rows] with row stride `stride` elements: heads x head_dim at the row's start,
     * rotate-half form; positions i32 [rows]; inv_freq f32 [head_dim / 2]. */
    void (*rope)(loci_stream *stream, loci_ref x, uint32_t stride, loci_ref positions,
                 loci_ref inv_freq, uint32_t rows, uint32_t heads, uint32_t head_dim);
    /* y [rows][cols] = silu(x[..cols]) * x[cols..2 cols] */
    void (*swiglu)(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols);
    /* dst (dst_dtype) [rows][cols], row stride dst_stride elements, = src (f32, src_stride) */
    void (*convert)(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                    loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
    /* Row at[row] of dst = row of src, f32 rows of `cols`; strides in elements; at: i32 [rows], in
     * range (checked by the caller), all different. */
    void (*scatter)(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_ref at,
                    loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
    void (*attend_dense)(loci_stream *stream, const loci_attend_dense *args);
    /* out (rows x heads x head_dim) and lse (rows x heads) of part `a` become the merge of a and b
     * by log-sum-exp; strides of out in elements. */
    void (*merge)(loci_stream *stream, loci_ref out_a, uint32_t stride_a, loci_ref lse_a,
                  loci_ref out_b, uint32_t stride_b, loci_ref lse_b, uint32_t rows, uint32_t heads,
                  uint32_t head_dim);
    /* ids i32 [rows]: the sampled token of each row of logits f32 [rows][vocab]; logprob f32
     * [rows]: its log-probability under the unmodified distribution. banned: token ids never
     * chosen. recent: token ids that the repetition penalty applies to (host arrays). */
    void (*sample)(loci_stream *stream, loci_ref ids, loci_ref logprob, loci_ref logits,
                   uint32_t rows, uint32_t vocab, const loci_sample_params *params,
                   const uint32_t *banned, uint32_t banned_count, const uint32_t *recent,
                   uint32_t recent_count);

    /* (optional) Whether so many rows of a look-up in one layer take less time in mode dense than
     * in mode hierarchical, as far as can be told beforehand. Any thread; the answer changes when
     * keys and values of the corpus go down to a slower memory, or come back. */
    bool (*reads_whole)(loci_backend *self, const struct loci_corpus_view *corpus,
                        uint32_t retrieval_layer, uint32_t rows, uint32_t q_heads);

    /* Corpus operations. A loci_lookup is the device-side state of one look-up:
     * begin -> score_nodes -> score_codes -> select -> attend_sparse -> merge (-> attribute).
     * In modes dense and squeezed score_codes does nothing.
     * begin: q f32 [rows][q_heads][head_dim] (row stride q_stride, NOT scaled; scale is applied
     * here), steady_lse f32 [rows][q_heads]: log-sum-exp of the exact part (sink, flat, own
     * tokens). shared: in mode squeezed all rows share one set (prefill). Everything is for one
     * retrieval layer, all KV heads. */
    loci_status (*lookup_create)(loci_backend *self, loci_lookup **out, loci_error *err);
    void (*lookup_free)(loci_backend *self, loci_lookup *lookup);
    /* (optional) Puts the memory of all look-ups made from now on under fn: a look-up refused by it
     * fails at sync() with that error. A look-up keeps memory for the next one, but not many times
     * of what recent ones used. */
    void (*lookup_account)(loci_backend *self, loci_lookup_memory_fn fn, void *ctx);
    void (*lookup_begin)(loci_stream *stream, loci_lookup *lookup,
                         const struct loci_corpus_view *corpus, uint32_t retrieval_layer,
                         loci_ref q, uint32_t q_stride, uint32_t rows, uint32_t q_heads,
                         float scale, loci_ref steady_lse, const loci_select_params *params);
    void (*score_nodes)(loci_stream *stream, loci_lookup *lookup);
    void (*score_codes)(loci_stream *stream, loci_lookup *lookup);
    void (*select)(loci_stream *stream, loci_lookup *lookup);
    /* out f32 [rows][q_heads][head_dim] (stride), lse f32 [rows][q_heads]; exact over the selected
     * tokens, plus the estimated tail if asked for. */
    void (*attend_sparse)(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                          uint32_t out_stride, loci_ref lse);
    /* mass f32 [segments of the view] += for each segment the attention weight of its selected
     * tokens, and of all tokens of flat segments, exp(logit - total_lse), summed over rows
     * [row_begin, rows) and query heads. total_lse f32 [rows][q_heads]: the merged log-sum-exp,
     * so that no weight exceeds 1. After attend_sparse. */
    void (*attribute)(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                      uint32_t row_begin, loci_ref mass);
    /* (optional) The same of a look-up of mode dense with up to LOCI_GEMM_FEW_ROWS rows, of each
     * row by itself: mass[row]; without a buffer it is not asked for. The array is read at once. */
    void (*attribute_each)(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                           const loci_ref *mass);
    /* Late-interaction score of segments (ColBERT's PLAID, arXiv 2205.09707, section 4, with
     * log-sum-exp in place of max): for each listed segment, sum over rows and mean over query
     * heads of log sum over its tokens of exp(scale q.k), keys from the position-order codes of
     * the retrieval layer. segments: host array of view segment numbers; scores f32 [count]. */
    void (*score_segments)(loci_stream *stream, const struct loci_corpus_view *corpus,
                           uint32_t retrieval_layer, loci_ref q, uint32_t q_stride, uint32_t rows,
                           uint32_t q_heads, float scale, const uint32_t *segments, uint32_t count,
                           loci_ref scores);
    /* Candidate segments of a look-up after score_codes: the `limit` best by an approximate
     * late-interaction score made from the scored tokens alone; host arrays segments[limit],
     * *count, filled at sync(). Flat segments are always among them while there are fewer than
     * limit / 2, else the best of them by attention. */
    void (*lookup_candidates)(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                              uint32_t *segments, uint32_t *count);
    /* Host copies, filled at sync(). selected: at most `capacity`, sorted by (extent, kv_head, row,
     * slot); *count is the true number. */
    void (*lookup_selected)(loci_stream *stream, loci_lookup *lookup, loci_selected *selected,
                            size_t capacity, size_t *count);
    void (*lookup_stats)(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats);
    /* Mode squeezed, after score_nodes: S and live tokens of each live node of a level (0 = roots,
     * 1 = leaves) over all KV heads, and of leaves the S of their roots (NULL: not wanted); host
     * arrays, *count is the true number. For calibrating thresholds. */
    void (*lookup_squeezed)(loci_stream *stream, loci_lookup *lookup, unsigned level, float *scores,
                            uint32_t *tokens, float *root_scores, size_t capacity, size_t *count);

    /* (optional, both) A step of a look-up is all that is enqueued for one row in a layer, from
     * what comes before lookup_begin to lookup_stats. Where the same came before it may be enqueued
     * as a whole. key: all that its arguments are made of, so that equal bytes mean equal
     * operations, on a view that is the same, too. step_begin returns true where the step was
     * enqueued as recorded, and nothing is left to do but step_end; else the caller enqueues the
     * operations. step_end returns false where they have to be enqueued once more, with another
     * step_end; else *stats are those of lookup_stats. Within a step nothing is downloaded, and
     * sync is not called. */
    bool (*step_begin)(loci_stream *stream, loci_lookup *lookup,
                       const struct loci_corpus_view *corpus, uint32_t retrieval_layer,
                       const void *key, size_t key_bytes);
    bool (*step_end)(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats);

    /* (optional) Any thread, without waiting for long. */
    void (*tiers)(loci_backend *self, loci_tier_stats *out);
    /* (optional) Clusters the keys of one pair (attention/cluster.h) with the result that the CPU
     * has, to the bit. Host arrays; returns when it is done. Any thread. LOCI_E_NOMEM: the CPU is
     * to do it; LOCI_E_CANCELLED. */
    loci_status (*cluster_keys)(loci_backend *self, const struct loci_keys *keys,
                                struct loci_clusters *out, loci_error *err);
} loci_backend_ops;

struct loci_backend {
    const loci_backend_ops *ops;
    void *ctx;
};

extern const loci_backend_ops loci_backend_cpu;
#ifdef LOCI_WITH_CUDA
extern const loci_backend_ops loci_backend_cuda;
#endif

/* name: "cpu" (or "cuda" in builds that have it). LOCI_E_UNSUPPORTED names the known ones. */
LOCI_MUST_CHECK loci_status loci_backend_open(const char *name, const loci_backend_options *options,
                                              loci_backend **out, loci_error *err);
void loci_backend_close(loci_backend *backend);             /* NULL allowed */
struct loci_pool *loci_backend_pool(loci_backend *backend); /* ops->pool */

static inline loci_ref loci_ref_at(loci_buffer *buffer, size_t offset) {
    loci_ref ref = {buffer, offset};
    return ref;
}

/* So many rows of `width` floats further. */
static inline loci_ref loci_ref_row(loci_ref ref, size_t row, size_t width) {
    ref.offset += row * width * sizeof(float);
    return ref;
}

#endif
