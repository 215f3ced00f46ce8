/* SPDX-License-Identifier: Apache-2.0
 *
 * Internals shared by the host files of the cuda backend, which are C; kernels.h is the border to
 * the .cu files. One device, the first that the CUDA runtime shows. Operations enqueue work on the
 * stream's CUDA stream and return; the first failure, of the host or of a kernel, is kept in the
 * stream until sync().
 */
#ifndef LOCI_ATTENTION_CUDA_CUDA_H
#define LOCI_ATTENTION_CUDA_CUDA_H

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#include "attention/backend.h"
#include "attention/cuda/kernels.h"
#include "base/pool.h"

struct loci_cublaslt;
struct loci_cuda_pairs;

/* Memory of the device; of a wrapped buffer it is a copy made at first use (loci_cuda_ptr), except
 * of extents, which pairs.c keeps pair by pair. */
struct loci_buffer {
    _Atomic(uint8_t *) device; /* of a wrapped one set once, under the backend's lock */
    size_t bytes;
    const uint8_t *host; /* wrapped */
};

typedef struct loci_cuda {
    loci_pool *pool; /* of the CPU: index building, packing of weights */
    struct loci_cublaslt *blas;
    struct loci_cuda_pairs *pairs;
    pthread_mutex_t lock; /* device copies of wrapped buffers, plans of weights */
    pthread_mutex_t idle_lock;
    loci_stream *idle; /* closed ones, with what they hold: to be opened again */
    unsigned idle_count;
    cudaStream_t copies;       /* what no stream of a caller waits for */
    pthread_mutex_t recording; /* while a stream records or the device is waited for: the device
                                  cannot be waited for while a stream records */
    _Atomic uint64_t steps_recorded, steps_replayed;
    float *logs; /* log n for n <= LOCI_CUDA_LOGS, on the device */
    int multiprocessors;
    size_t block_bytes;  /* most shared memory of a block */
    bool wgmma;          /* compute capability 9.0, and code for it: products of warpgroups */
    uint64_t room_bytes; /* most that a look-up reserves of one kind before it knows how much it
                            needs; tests lower it */
    char description[160];
} loci_cuda;

/* A small download waits in page-locked memory for sync(), so that it stops nothing. */
typedef struct loci_cuda_download {
    void *to;
    const uint8_t *from;
    size_t bytes;
} loci_cuda_download;

#define LOCI_CUDA_STAGING_BYTES ((size_t)1 << 20)
#define LOCI_CUDA_STAGING_MOST ((size_t)64 << 20) /* about a pass of the encoder */
#define LOCI_CUDA_DOWNLOADS 512u
/* Closed streams that are kept, and the most scratch that each keeps. */
#define LOCI_CUDA_IDLE_STREAMS 8u
#define LOCI_CUDA_IDLE_SCRATCH ((size_t)256 << 20)

struct loci_stream {
    loci_cuda *cuda;
    cudaStream_t stream;
    cudaEvent_t marked;     /* what mark() remembered */
    loci_error error;       /* first failure since the last sync; status OK = none */
    loci_cuda_fault *fault; /* the first failure of a kernel; page-locked, kernels write there */
    uint8_t *scratch;       /* growable; contents do not survive an operation */
    size_t scratch_bytes;
    uint8_t *staging; /* page-locked; grows, to LOCI_CUDA_STAGING_MOST */
    size_t staging_bytes, staged;
    loci_cuda_download downloads[LOCI_CUDA_DOWNLOADS];
    unsigned download_count;
    bool recording;    /* a step of a look-up (steps.c) */
    bool unrecordable; /* and it did what cannot be recorded */
    loci_stream *next; /* while it is idle */
};

/* Device pointer of a ref; asserts that [offset, offset + bytes) lies in the buffer. NULL, and a
 * failure of the stream, when a wrapped buffer cannot be copied. */
void *loci_cuda_ptr(loci_stream *stream, loci_ref ref, size_t bytes);
/* Records a failure in the stream unless one stands already. */
void loci_cuda_fail(loci_stream *stream, loci_status status, const char *format, ...)
    LOCI_PRINTF(3, 4);
/* The same from a CUDA call; true when it succeeded. */
bool loci_cuda_ok(loci_stream *stream, cudaError_t result, const char *what);
/* A CUDA call outside of streams. */
LOCI_MUST_CHECK loci_status loci_cuda_try(cudaError_t result, const char *what, loci_error *err);
/* Waits for all streams of the device, after which nothing that was enqueued reads memory. */
cudaError_t loci_cuda_drain(loci_cuda *cuda);
/* Whether the stream records a step, which then fails: for what cannot be recorded, or must not
 * happen meanwhile. */
bool loci_cuda_records(loci_stream *stream);
/* Gives up the scratch that idle streams keep; false if that is nothing. Any thread. */
bool loci_cuda_shrink_idle(loci_cuda *cuda);
/* Device memory; gives up that and cached pairs before it fails. */
LOCI_MUST_CHECK loci_status loci_cuda_malloc(loci_cuda *cuda, size_t bytes, void **out,
                                             loci_error *err);
/* Device memory of at least `bytes`, kept for the next operation of the stream; NULL, and a failure
 * of the stream, when there is none. */
void *loci_cuda_scratch(loci_stream *stream, size_t bytes);
/* Bytes from the host into device memory, in the order of the stream; src may change afterwards. */
bool loci_cuda_send(loci_stream *stream, void *to, const void *src, size_t bytes);

/* Page-locked memory, of at most LOCI_CUDA_STAGING_BYTES, that work on the stream is to write: it
 * comes to `to` at sync(). */
void *loci_cuda_stage(loci_stream *stream, void *to, size_t bytes);
/* The same of page-locked memory that is there. */
void loci_cuda_tell(loci_stream *stream, void *to, const void *from, size_t bytes);
/* Before it is written again: waits if it is still to be told. */
void loci_cuda_told(loci_stream *stream, const void *from);

/* Entries of the table, by file. gemm.c */
loci_status loci_cuda_weight_create(loci_backend *self, const void *const *data,
                                    const uint32_t *rows, uint32_t parts, uint32_t cols,
                                    loci_dtype dtype, loci_dtype precision, loci_weight **out,
                                    loci_error *err);
void loci_cuda_weight_free(loci_backend *self, loci_weight *weight);
void loci_cuda_gemm(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows,
                    const loci_weight *weight, bool accumulate);
void loci_cuda_embed(loci_stream *stream, loci_ref y, const loci_weight *table, loci_ref ids,
                     uint32_t rows);
/* ops.c */
void loci_cuda_rms_norm(loci_stream *stream, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                        uint32_t cols, float eps);
void loci_cuda_rope(loci_stream *stream, loci_ref x, uint32_t stride, loci_ref positions,
                    loci_ref inv_freq, uint32_t rows, uint32_t heads, uint32_t head_dim);
void loci_cuda_swiglu(loci_stream *stream, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols);
void loci_cuda_convert(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                       loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
void loci_cuda_scatter(loci_stream *stream, loci_ref dst, uint32_t dst_stride, loci_ref at,
                       loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols);
void loci_cuda_attend_dense(loci_stream *stream, const loci_attend_dense *args);
void loci_cuda_merge(loci_stream *stream, loci_ref out_a, uint32_t stride_a, loci_ref lse_a,
                     loci_ref out_b, uint32_t stride_b, loci_ref lse_b, uint32_t rows,
                     uint32_t heads, uint32_t head_dim);
void loci_cuda_sample(loci_stream *stream, loci_ref ids, loci_ref logprob, loci_ref logits,
                      uint32_t rows, uint32_t vocab, const loci_sample_params *params,
                      const uint32_t *banned, uint32_t banned_count, const uint32_t *recent,
                      uint32_t recent_count);
/* lookup.c, report.c */
bool loci_cuda_reads_whole(loci_backend *self, const struct loci_corpus_view *corpus,
                           uint32_t retrieval_layer, uint32_t rows, uint32_t q_heads);
loci_status loci_cuda_lookup_create(loci_backend *self, loci_lookup **out, loci_error *err);
void loci_cuda_lookup_free(loci_backend *self, loci_lookup *lookup);
void loci_cuda_lookup_begin(loci_stream *stream, loci_lookup *lookup,
                            const struct loci_corpus_view *corpus, uint32_t retrieval_layer,
                            loci_ref q, uint32_t q_stride, uint32_t rows, uint32_t q_heads,
                            float scale, loci_ref steady_lse, const loci_select_params *params);
void loci_cuda_score_nodes(loci_stream *stream, loci_lookup *lookup);
void loci_cuda_score_codes(loci_stream *stream, loci_lookup *lookup);
void loci_cuda_select(loci_stream *stream, loci_lookup *lookup);
void loci_cuda_attend_sparse(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                             uint32_t out_stride, loci_ref lse);
void loci_cuda_attribute(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                         uint32_t row_begin, loci_ref mass);
void loci_cuda_attribute_each(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                              const loci_ref *mass);
void loci_cuda_score_segments(loci_stream *stream, const struct loci_corpus_view *corpus,
                              uint32_t retrieval_layer, loci_ref q, uint32_t q_stride,
                              uint32_t rows, uint32_t q_heads, float scale,
                              const uint32_t *segments, uint32_t count, loci_ref scores);
void loci_cuda_lookup_candidates(loci_stream *stream, loci_lookup *lookup, uint32_t limit,
                                 uint32_t *segments, uint32_t *count);
void loci_cuda_lookup_selected(loci_stream *stream, loci_lookup *lookup, loci_selected *selected,
                               size_t capacity, size_t *count);
void loci_cuda_lookup_stats(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats);
void loci_cuda_lookup_squeezed(loci_stream *stream, loci_lookup *lookup, unsigned level,
                               float *scores, uint32_t *tokens, float *root_scores, size_t capacity,
                               size_t *count);
/* steps.c */
bool loci_cuda_step_begin(loci_stream *stream, loci_lookup *lookup,
                          const struct loci_corpus_view *corpus, uint32_t retrieval_layer,
                          const void *key, size_t key_bytes);
bool loci_cuda_step_end(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats);
/* cluster.c */
loci_status loci_cuda_cluster_keys(loci_backend *self, const struct loci_keys *keys,
                                   struct loci_clusters *out, loci_error *err);

#endif
