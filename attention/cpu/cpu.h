/* SPDX-License-Identifier: Apache-2.0
 *
 * Internals shared by the files of the cpu backend. Operations run at once, on the calling
 * thread and the backend's pool; sync() only reports the first failure.
 */
#ifndef LOCI_ATTENTION_CPU_CPU_H
#define LOCI_ATTENTION_CPU_CPU_H

#include "attention/backend.h"
#include "base/half.h"
#include "base/pool.h"

/* Ordered: a higher level includes the lower ones. */
typedef enum loci_cpu_isa {
    LOCI_ISA_PORTABLE = 0,
    LOCI_ISA_AVX2 = 1,       /* AVX2 + FMA + F16C */
    LOCI_ISA_AVX512 = 2,     /* F, BW, DQ, VL, VNNI */
    LOCI_ISA_AVX512_BF16 = 3 /* and BF16 */
} loci_cpu_isa;

struct loci_buffer {
    uint8_t *data;
    size_t bytes;
    bool owned;
    void *allocation; /* what to free when owned; data lies inside it */
};

/* Growable working memory; contents do not survive loci_cpu_scratch_get. */
typedef struct loci_cpu_scratch {
    void *data;
    size_t bytes;
} loci_cpu_scratch;

typedef struct loci_cpu {
    loci_pool *pool;
    loci_cpu_isa isa;
    char description[96];
    const struct loci_cpu_kernels *kernels; /* of isa */
    struct loci_dnnl *dnnl;                 /* NULL: own kernels only */
    loci_cpu_scratch *thread_scratch;    /* one for each pool thread; inside pool tasks only, which
                                            are exclusive: the pool runs one loop at a time */
    loci_lookup_memory_fn lookup_memory; /* NULL: not counted */
    void *lookup_memory_ctx;
    uint32_t part_roots; /* most roots of a part of a pair (lookup.h); tests have few */
    size_t kept_bytes;   /* most that a look-up keeps of one kind of result that two stages need,
                            rather than work it out twice; tests vary it */
} loci_cpu;

struct loci_stream {
    loci_cpu *cpu;
    loci_error error; /* first failure since the last sync; status OK = none */
    loci_cpu_scratch scratch;
};

/* The best instruction set of this machine, capped by `isa` (NULL = no cap). */
loci_status loci_cpu_isa_detect(const char *isa, loci_cpu_isa *out, loci_error *err);
const char *loci_cpu_isa_name(loci_cpu_isa isa);
const struct loci_cpu_kernels *loci_cpu_kernels_of(loci_cpu_isa isa);

/* Host pointer of a ref; asserts that [offset, offset + bytes) lies in the buffer. */
void *loci_cpu_ptr(loci_ref ref, size_t bytes);
/* Records a failure in the stream unless one stands already. */
void loci_cpu_fail(loci_stream *stream, loci_status status, const char *format, ...)
    LOCI_PRINTF(3, 4);

#define LOCI_CPU_HEAD_DIM_MAX 512u

/* 64-byte aligned memory of at least `bytes`, kept for the next call; NULL when there is none. */
void *loci_cpu_scratch_get(loci_cpu_scratch *scratch, size_t bytes);

/* Runs fn over [0, rows) in runs of rows, on the pool when the work (about row_cost elements a
 * row) is worth waking it. */
typedef void (*loci_cpu_rows_fn)(void *arg, uint32_t begin, uint32_t end);
void loci_cpu_for_rows(loci_stream *stream, uint32_t rows, size_t row_cost, loci_cpu_rows_fn fn,
                       void *arg);

/* Entries of the table, by file. gemm.c */
loci_status loci_cpu_weight_create(loci_backend *self, const void *const *data,
                                   const uint32_t *rows, uint32_t parts, uint32_t cols,
                                   loci_dtype dtype, loci_dtype precision, loci_weight **out,
                                   loci_error *err);
loci_status loci_cpu_weight_map(loci_backend *self, const void *const *data, const uint32_t *rows,
                                uint32_t parts, uint32_t cols, loci_weight **out, loci_error *err);
void loci_cpu_weight_free(loci_backend *self, loci_weight *weight);
void loci_cpu_gemm(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows,
                   const loci_weight *weight, bool accumulate);
void loci_cpu_embed(loci_stream *stream, loci_ref y, const loci_weight *table, loci_ref ids,
                    uint32_t rows);
/* pointwise.c */
void loci_cpu_rms_norm(loci_stream *stream, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                       uint32_t cols, float eps);
void loci_cpu_rope(loci_stream *stream, loci_ref x, uint32_t stride, loci_ref positions,
                   loci_ref inv_freq, uint32_t rows, uint32_t heads, uint32_t head_dim);
void loci_cpu_swiglu(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols);
void loci_cpu_scatter(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_ref at,
                      loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
void loci_cpu_convert(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                      loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
/* dense.c */
void loci_cpu_attend_dense(loci_stream *stream, const loci_attend_dense *args);
void loci_cpu_merge(loci_stream *stream, loci_ref out_a, uint32_t stride_a, loci_ref lse_a,
                    loci_ref out_b, uint32_t stride_b, loci_ref lse_b, uint32_t rows,
                    uint32_t heads, uint32_t head_dim);
/* dense_corpus.c: mode dense here, other modes by sparse.c */
void loci_cpu_attend_corpus(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                            uint32_t out_stride, loci_ref lse);
void loci_cpu_attribute_corpus(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                               uint32_t row_begin, loci_ref mass);
/* sample.c */
void loci_cpu_sample(loci_stream *stream, loci_ref ids, loci_ref logprob, loci_ref logits,
                     uint32_t rows, uint32_t vocab, const loci_sample_params *params,
                     const uint32_t *banned, uint32_t banned_count, const uint32_t *recent,
                     uint32_t recent_count);
/* lookup.c and its parts */
loci_status loci_cpu_lookup_create(loci_backend *self, loci_lookup **out, loci_error *err);
void loci_cpu_lookup_free(loci_backend *self, loci_lookup *lookup);
void loci_cpu_lookup_account(loci_backend *self, loci_lookup_memory_fn fn, void *ctx);
void loci_cpu_lookup_begin(loci_stream *stream, loci_lookup *lookup,
                           const struct loci_corpus_view *corpus, uint32_t retrieval_layer,
                           loci_ref q, uint32_t q_stride, uint32_t rows, uint32_t q_heads,
                           float scale, loci_ref steady_lse, const loci_select_params *params);
void loci_cpu_score_nodes(loci_stream *stream, loci_lookup *lookup);
void loci_cpu_score_codes(loci_stream *stream, loci_lookup *lookup);
void loci_cpu_select(loci_stream *stream, loci_lookup *lookup);
void loci_cpu_attend_sparse(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                            uint32_t out_stride, loci_ref lse);
void loci_cpu_attribute(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                        uint32_t row_begin, loci_ref mass);
void loci_cpu_score_segments(loci_stream *stream, const struct loci_corpus_view *corpus,
                             uint32_t retrieval_layer, loci_ref q, uint32_t q_stride, uint32_t rows,
                             uint32_t q_heads, float scale, const uint32_t *segments,
                             uint32_t count, loci_ref scores);
void loci_cpu_lookup_candidates(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                                uint32_t *segments, uint32_t *count);
void loci_cpu_lookup_selected(loci_stream *stream, loci_lookup *lookup, loci_selected *selected,
                              size_t capacity, size_t *count);
void loci_cpu_lookup_stats(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats);
void loci_cpu_lookup_squeezed(loci_stream *stream, loci_lookup *lookup, unsigned level,
                              float *scores, uint32_t *tokens, float *root_scores, size_t capacity,
                              size_t *count);

#endif
