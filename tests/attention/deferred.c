/* SPDX-License-Identifier: Apache-2.0
 *
 * The deferred test backend; see deferred.h. A recorded call is its arguments by value and a
 * function that replays it on the inner backend, with refs translated at that moment.
 */
#include "deferred.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/index.h"

#define POISON 0xfb

struct loci_buffer {
    loci_backend *owner;
    loci_buffer *inner;
};

/* Host memory that must be unchanged at sync. */
typedef struct watch {
    const void *data;
    size_t bytes;
    uint64_t hash;
} watch;

typedef struct call call;
typedef void (*replay_fn)(loci_stream *stream, call *c);

struct call {
    const char *name;
    replay_fn replay;
    watch watches[3];
    loci_ref ref[4];
    uint32_t n[6];
    float f;
    bool flag;
    loci_dtype dtype;
    const loci_weight *weight;
    const loci_attend_dense *dense;
    const loci_sample_params *sample;
    const uint32_t *list[2];
    loci_lookup *lookup;
    const loci_corpus_view *view;
    const loci_select_params *select;
    void *host, *count;
    size_t bytes;
    void *copy; /* of an upload's source */
    loci_stream *other;
    uint64_t until; /* of its calls */
    call *next;
};

/* A translated view: the inner lookup may keep a pointer to it, so it lives as long as the
 * backend. */
typedef struct kept_view {
    loci_corpus_view view;
    loci_extent_view *extents;
    loci_buffer **flat;
    struct kept_view *next;
} kept_view;

typedef struct deferred {
    loci_backend *inner;
    kept_view *views;
    char description[128];
} deferred;

struct loci_stream {
    loci_backend *owner;
    loci_stream *inner;
    call *first, **last;
    uint64_t recorded, replayed, marked; /* calls since it was opened */
};

static deferred *of(const loci_backend *self) {
    return self->ctx;
}

static const loci_backend_ops *inner_ops(const loci_stream *stream) {
    return of(stream->owner)->inner->ops;
}

static uint64_t hash(const void *data, size_t bytes) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) h = (h ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return h;
}

static void misuse(const char *name, const char *what) {
    fprintf(stderr, "deferred backend: %s: %s\n", name, what);
    abort();
}

static loci_ref inside(loci_ref ref) {
    if (ref.buffer) ref.buffer = ref.buffer->inner;
    return ref;
}

static call *record(loci_stream *stream, const char *name, replay_fn replay) {
    call *c = calloc(1, sizeof *c);
    if (!c) misuse(name, "out of memory");
    c->name = name;
    c->replay = replay;
    *stream->last = c;
    stream->last = &c->next;
    stream->recorded++;
    return c;
}

static call *record_refs(loci_stream *stream, const char *name, replay_fn replay, loci_ref first,
                         loci_ref second) {
    call *c = record(stream, name, replay);
    c->ref[0] = first;
    c->ref[1] = second;
    return c;
}

static void watch_memory(call *c, int slot, const void *data, size_t bytes) {
    c->watches[slot] = (watch){data, bytes, hash(data, bytes)};
}

/* The calls up to the `end`-th. A call may replay those of other streams, which may await this one.
 */
static void replay_until(loci_stream *stream, uint64_t end) {
    while (stream->replayed < end) {
        call *c = stream->first;
        stream->first = c->next;
        if (!c->next) stream->last = &stream->first;
        stream->replayed++;
        for (int i = 0; i < 3; i++)
            if (hash(c->watches[i].data, c->watches[i].bytes) != c->watches[i].hash &&
                c->watches[i].bytes)
                misuse(c->name, "a host array changed before sync");
        c->replay(stream, c);
        free(c->copy);
        free(c);
    }
}

static loci_status sync_stream(loci_stream *stream, loci_error *err) {
    replay_until(stream, stream->recorded);
    return inner_ops(stream)->sync(stream->inner, err);
}

static void mark(loci_stream *stream) {
    stream->marked = stream->recorded;
}

static void replay_await(loci_stream *s, call *c) {
    (void)s;
    replay_until(c->other, c->until);
}

static void await(loci_stream *stream, const loci_stream *other) {
    call *c = record(stream, "await", replay_await);
    c->other = (loci_stream *)(uintptr_t)other; /* whose calls may run now */
    c->until = other->marked;
}

/* --- Memory and streams ------------------------------------------------------------------ */

static const char *describe(loci_backend *self) {
    return of(self)->description;
}

static struct loci_pool *pool(loci_backend *self) {
    return loci_backend_pool(of(self)->inner);
}

static loci_status new_buffer(loci_backend *self, loci_buffer *inner, loci_buffer **out) {
    *out = calloc(1, sizeof **out);
    if (!*out) misuse("alloc", "out of memory");
    **out = (loci_buffer){self, inner};
    return LOCI_OK;
}

static loci_status alloc(loci_backend *self, size_t bytes, loci_buffer **out, loci_error *err) {
    loci_backend *inner = of(self)->inner;
    loci_buffer *buffer;
    *out = NULL;
    LOCI_TRY(inner->ops->alloc(inner, bytes, &buffer, err));
    return new_buffer(self, buffer, out);
}

static loci_status wrap(loci_backend *self, const void *host, size_t bytes, loci_buffer **out,
                        loci_error *err) {
    loci_backend *inner = of(self)->inner;
    loci_buffer *buffer;
    *out = NULL;
    LOCI_TRY(inner->ops->wrap(inner, host, bytes, &buffer, err));
    return new_buffer(self, buffer, out);
}

static void free_buffer(loci_backend *self, loci_buffer *buffer) {
    if (!buffer) return;
    loci_backend *inner = of(self)->inner;
    inner->ops->free(inner, buffer->inner);
    free(buffer);
}

static loci_status stream_open(loci_backend *self, loci_stream **out, loci_error *err) {
    loci_backend *inner = of(self)->inner;
    loci_stream *stream = calloc(1, sizeof *stream);
    *out = NULL;
    if (!stream) return loci_fail(err, LOCI_E_NOMEM, "no memory for a stream");
    stream->owner = self;
    stream->last = &stream->first;
    loci_status status = inner->ops->stream_open(inner, &stream->inner, err);
    if (status != LOCI_OK) {
        free(stream);
        return status;
    }
    *out = stream;
    return LOCI_OK;
}

static void stream_close(loci_backend *self, loci_stream *stream) {
    if (!stream) return;
    if (stream->first) misuse(stream->first->name, "the stream was closed without a sync");
    loci_backend *inner = of(self)->inner;
    inner->ops->stream_close(inner, stream->inner);
    free(stream);
}

static void replay_upload(loci_stream *s, call *c) {
    inner_ops(s)->upload(s->inner, inside(c->ref[0]), c->copy, c->bytes);
}

static void upload(loci_stream *s, loci_ref dst, const void *src, size_t bytes) {
    call *c = record(s, "upload", replay_upload);
    c->ref[0] = dst;
    c->bytes = bytes;
    c->copy = malloc(bytes + 1);
    if (!c->copy) misuse("upload", "out of memory");
    if (bytes) memcpy(c->copy, src, bytes);
}

static void replay_download(loci_stream *s, call *c) {
    inner_ops(s)->download(s->inner, c->host, inside(c->ref[0]), c->bytes);
}

static void download(loci_stream *s, void *dst, loci_ref src, size_t bytes) {
    call *c = record(s, "download", replay_download);
    c->ref[0] = src;
    c->host = dst;
    c->bytes = bytes;
    if (bytes) memset(dst, POISON, bytes);
}

static void replay_copy(loci_stream *s, call *c) {
    inner_ops(s)->copy(s->inner, inside(c->ref[0]), inside(c->ref[1]), c->bytes);
}

static void copy(loci_stream *s, loci_ref dst, loci_ref src, size_t bytes) {
    call *c = record_refs(s, "copy", replay_copy, dst, src);
    c->bytes = bytes;
}

static void move(loci_stream *s, const loci_move *moves, uint32_t count) {
    if (count > LOCI_MOVES_MAX) misuse("move", "too many");
    for (uint32_t i = 0; i < count; i++)
        if (moves[i].to.buffer)
            copy(s, moves[i].to, moves[i].from, moves[i].bytes);
        else
            download(s, moves[i].host, moves[i].from, moves[i].bytes);
}

static loci_status weight_create(loci_backend *self, const void *const *data, const uint32_t *rows,
                                 uint32_t parts, uint32_t cols, loci_dtype dtype,
                                 loci_dtype precision, loci_weight **out, loci_error *err) {
    loci_backend *inner = of(self)->inner;
    return inner->ops->weight_create(inner, data, rows, parts, cols, dtype, precision, out, err);
}

static void weight_free(loci_backend *self, loci_weight *weight) {
    loci_backend *inner = of(self)->inner;
    inner->ops->weight_free(inner, weight);
}

/* --- Dense operations -------------------------------------------------------------------- */

static void replay_gemm(loci_stream *s, call *c) {
    inner_ops(s)->gemm(s->inner, inside(c->ref[0]), inside(c->ref[1]), c->n[0], c->weight, c->flag);
}

static void gemm(loci_stream *s, loci_ref y, loci_ref x, uint32_t rows, const loci_weight *weight,
                 bool accumulate) {
    call *c = record_refs(s, "gemm", replay_gemm, y, x);
    c->n[0] = rows;
    c->weight = weight;
    c->flag = accumulate;
}

static void replay_embed(loci_stream *s, call *c) {
    inner_ops(s)->embed(s->inner, inside(c->ref[0]), c->weight, inside(c->ref[1]), c->n[0]);
}

static void embed(loci_stream *s, loci_ref y, const loci_weight *table, loci_ref ids,
                  uint32_t rows) {
    call *c = record_refs(s, "embed", replay_embed, y, ids);
    c->n[0] = rows;
    c->weight = table;
}

static void replay_norm(loci_stream *s, call *c) {
    inner_ops(s)->rms_norm(s->inner, inside(c->ref[0]), inside(c->ref[1]), inside(c->ref[2]),
                           c->n[0], c->n[1], c->f);
}

static void rms_norm(loci_stream *s, loci_ref y, loci_ref x, loci_ref gain, uint32_t rows,
                     uint32_t cols, float eps) {
    call *c = record_refs(s, "rms_norm", replay_norm, y, x);
    c->ref[2] = gain;
    c->n[0] = rows;
    c->n[1] = cols;
    c->f = eps;
}

static void replay_rope(loci_stream *s, call *c) {
    inner_ops(s)->rope(s->inner, inside(c->ref[0]), c->n[0], inside(c->ref[1]), inside(c->ref[2]),
                       c->n[1], c->n[2], c->n[3]);
}

static void rope(loci_stream *s, loci_ref x, uint32_t stride, loci_ref positions, loci_ref inv_freq,
                 uint32_t rows, uint32_t heads, uint32_t head_dim) {
    call *c = record_refs(s, "rope", replay_rope, x, positions);
    c->ref[2] = inv_freq;
    c->n[0] = stride;
    c->n[1] = rows;
    c->n[2] = heads;
    c->n[3] = head_dim;
}

static void replay_swiglu(loci_stream *s, call *c) {
    inner_ops(s)->swiglu(s->inner, inside(c->ref[0]), inside(c->ref[1]), c->n[0], c->n[1]);
}

static void swiglu(loci_stream *s, loci_ref y, loci_ref x, uint32_t rows, uint32_t cols) {
    call *c = record_refs(s, "swiglu", replay_swiglu, y, x);
    c->n[0] = rows;
    c->n[1] = cols;
}

static void replay_convert(loci_stream *s, call *c) {
    inner_ops(s)->convert(s->inner, inside(c->ref[0]), c->n[0], c->dtype, inside(c->ref[1]),
                          c->n[1], c->n[2], c->n[3]);
}

static void convert(loci_stream *s, loci_ref dst, uint32_t dst_stride, loci_dtype dst_dtype,
                    loci_ref src, uint32_t src_stride, uint32_t rows, uint32_t cols) {
    call *c = record_refs(s, "convert", replay_convert, dst, src);
    c->dtype = dst_dtype;
    c->n[0] = dst_stride;
    c->n[1] = src_stride;
    c->n[2] = rows;
    c->n[3] = cols;
}

static void replay_scatter(loci_stream *s, call *c) {
    inner_ops(s)->scatter(s->inner, inside(c->ref[0]), c->n[0], inside(c->ref[1]),
                          inside(c->ref[2]), c->n[1], c->n[2], c->n[3]);
}

static void scatter(loci_stream *s, loci_ref dst, uint32_t dst_stride, loci_ref at, loci_ref src,
                    uint32_t src_stride, uint32_t rows, uint32_t cols) {
    call *c = record_refs(s, "scatter", replay_scatter, dst, at);
    c->ref[2] = src;
    c->n[0] = dst_stride;
    c->n[1] = src_stride;
    c->n[2] = rows;
    c->n[3] = cols;
}

static void replay_dense(loci_stream *s, call *c) {
    loci_attend_dense args = *c->dense;
    args.q = inside(args.q);
    args.k = inside(args.k);
    args.v = inside(args.v);
    args.out = inside(args.out);
    args.lse = inside(args.lse);
    inner_ops(s)->attend_dense(s->inner, &args);
}

static void attend_dense(loci_stream *s, const loci_attend_dense *args) {
    call *c = record(s, "attend_dense", replay_dense);
    c->dense = args;
    watch_memory(c, 0, args, sizeof *args);
    watch_memory(c, 1, args->spans, args->span_count * sizeof *args->spans);
}

static void replay_merge(loci_stream *s, call *c) {
    inner_ops(s)->merge(s->inner, inside(c->ref[0]), c->n[0], inside(c->ref[1]), inside(c->ref[2]),
                        c->n[1], inside(c->ref[3]), c->n[2], c->n[3], c->n[4]);
}

static void merge(loci_stream *s, loci_ref out_a, uint32_t stride_a, loci_ref lse_a, loci_ref out_b,
                  uint32_t stride_b, loci_ref lse_b, uint32_t rows, uint32_t heads,
                  uint32_t head_dim) {
    call *c = record_refs(s, "merge", replay_merge, out_a, lse_a);
    c->ref[2] = out_b;
    c->ref[3] = lse_b;
    c->n[0] = stride_a;
    c->n[1] = stride_b;
    c->n[2] = rows;
    c->n[3] = heads;
    c->n[4] = head_dim;
}

static void replay_sample(loci_stream *s, call *c) {
    inner_ops(s)->sample(s->inner, inside(c->ref[0]), inside(c->ref[1]), inside(c->ref[2]), c->n[0],
                         c->n[1], c->sample, c->list[0], c->n[2], c->list[1], c->n[3]);
}

static void sample(loci_stream *s, loci_ref ids, loci_ref logprob, loci_ref logits, uint32_t rows,
                   uint32_t vocab, const loci_sample_params *params, const uint32_t *banned,
                   uint32_t banned_count, const uint32_t *recent, uint32_t recent_count) {
    call *c = record_refs(s, "sample", replay_sample, ids, logprob);
    c->ref[2] = logits;
    c->n[0] = rows;
    c->n[1] = vocab;
    c->n[2] = banned_count;
    c->n[3] = recent_count;
    c->sample = params;
    c->list[0] = banned;
    c->list[1] = recent;
    watch_memory(c, 0, params, sizeof *params);
    watch_memory(c, 1, banned, banned_count * sizeof *banned);
    watch_memory(c, 2, recent, recent_count * sizeof *recent);
}

/* --- Corpus operations ------------------------------------------------------------------- */

static loci_status lookup_create(loci_backend *self, loci_lookup **out, loci_error *err) {
    loci_backend *inner = of(self)->inner;
    return inner->ops->lookup_create(inner, out, err);
}

static void lookup_free(loci_backend *self, loci_lookup *lookup) {
    loci_backend *inner = of(self)->inner;
    inner->ops->lookup_free(inner, lookup);
}

static const loci_corpus_view *translate(loci_backend *self, const loci_corpus_view *view) {
    kept_view *kept = calloc(1, sizeof *kept);
    uint32_t layers = view->retrieval_layers;
    loci_extent_view *extents = calloc((size_t)view->extent_count + 1, sizeof *extents);
    loci_buffer **flat = calloc(2 * (size_t)layers + 1, sizeof *flat);
    if (!kept || !extents || !flat) misuse("view", "out of memory");
    for (uint32_t i = 0; i < view->extent_count; i++) {
        extents[i] = view->extents[i];
        if (extents[i].buffer) extents[i].buffer = extents[i].buffer->inner;
    }
    for (uint32_t i = 0; i < layers; i++) {
        if (view->flat_k && view->flat_k[i]) flat[i] = view->flat_k[i]->inner;
        if (view->flat_v && view->flat_v[i]) flat[layers + i] = view->flat_v[i]->inner;
    }
    kept->extents = extents;
    kept->flat = flat;
    kept->view = *view;
    kept->view.extents = extents;
    if (view->flat_k) kept->view.flat_k = flat;
    if (view->flat_v) kept->view.flat_v = flat + layers;
    kept->view.sink_k = inside(view->sink_k);
    kept->view.sink_v = inside(view->sink_v);
    kept->next = of(self)->views;
    of(self)->views = kept;
    return &kept->view;
}

static void replay_begin(loci_stream *s, call *c) {
    inner_ops(s)->lookup_begin(s->inner, c->lookup, translate(s->owner, c->view), c->n[0],
                               inside(c->ref[0]), c->n[1], c->n[2], c->n[3], c->f,
                               inside(c->ref[1]), c->select);
}

static void lookup_begin(loci_stream *s, loci_lookup *lookup, const loci_corpus_view *corpus,
                         uint32_t retrieval_layer, loci_ref q, uint32_t q_stride, uint32_t rows,
                         uint32_t q_heads, float scale, loci_ref steady_lse,
                         const loci_select_params *params) {
    call *c = record(s, "lookup_begin", replay_begin);
    c->lookup = lookup;
    c->view = corpus;
    c->n[0] = retrieval_layer;
    c->n[1] = q_stride;
    c->n[2] = rows;
    c->n[3] = q_heads;
    c->f = scale;
    c->ref[0] = q;
    c->ref[1] = steady_lse;
    c->select = params;
    watch_memory(c, 0, corpus, sizeof *corpus);
    watch_memory(c, 1, corpus->extents, corpus->extent_count * sizeof *corpus->extents);
    watch_memory(c, 2, params, sizeof *params);
}

static void replay_score_nodes(loci_stream *s, call *c) {
    inner_ops(s)->score_nodes(s->inner, c->lookup);
}

static void score_nodes(loci_stream *s, loci_lookup *lookup) {
    record(s, "score_nodes", replay_score_nodes)->lookup = lookup;
}

static void replay_score_codes(loci_stream *s, call *c) {
    inner_ops(s)->score_codes(s->inner, c->lookup);
}

static void score_codes(loci_stream *s, loci_lookup *lookup) {
    record(s, "score_codes", replay_score_codes)->lookup = lookup;
}

static void replay_select(loci_stream *s, call *c) {
    inner_ops(s)->select(s->inner, c->lookup);
}

static void select_tokens(loci_stream *s, loci_lookup *lookup) {
    record(s, "select", replay_select)->lookup = lookup;
}

static void replay_sparse(loci_stream *s, call *c) {
    inner_ops(s)->attend_sparse(s->inner, c->lookup, inside(c->ref[0]), c->n[0], inside(c->ref[1]));
}

static void attend_sparse(loci_stream *s, loci_lookup *lookup, loci_ref out, uint32_t out_stride,
                          loci_ref lse) {
    call *c = record(s, "attend_sparse", replay_sparse);
    c->lookup = lookup;
    c->ref[0] = out;
    c->ref[1] = lse;
    c->n[0] = out_stride;
}

static void replay_attribute(loci_stream *s, call *c) {
    inner_ops(s)->attribute(s->inner, c->lookup, inside(c->ref[0]), c->n[0], inside(c->ref[1]));
}

static void attribute(loci_stream *s, loci_lookup *lookup, loci_ref total_lse, uint32_t row_begin,
                      loci_ref mass) {
    call *c = record(s, "attribute", replay_attribute);
    c->lookup = lookup;
    c->ref[0] = total_lse;
    c->ref[1] = mass;
    c->n[0] = row_begin;
}

static void replay_segments(loci_stream *s, call *c) {
    inner_ops(s)->score_segments(s->inner, translate(s->owner, c->view), c->n[0], inside(c->ref[0]),
                                 c->n[1], c->n[2], c->n[3], c->f, c->list[0], c->n[4],
                                 inside(c->ref[1]));
}

static void score_segments(loci_stream *s, const loci_corpus_view *corpus, uint32_t retrieval_layer,
                           loci_ref q, uint32_t q_stride, uint32_t rows, uint32_t q_heads,
                           float scale, const uint32_t *segments, uint32_t count, loci_ref scores) {
    call *c = record(s, "score_segments", replay_segments);
    c->view = corpus;
    c->n[0] = retrieval_layer;
    c->n[1] = q_stride;
    c->n[2] = rows;
    c->n[3] = q_heads;
    c->n[4] = count;
    c->f = scale;
    c->list[0] = segments;
    c->ref[0] = q;
    c->ref[1] = scores;
    watch_memory(c, 0, corpus, sizeof *corpus);
    watch_memory(c, 1, segments, count * sizeof *segments);
}

static void replay_candidates(loci_stream *s, call *c) {
    inner_ops(s)->lookup_candidates(s->inner, c->lookup, c->n[0], c->host, c->count);
}

static void lookup_candidates(loci_stream *s, loci_lookup *lookup, uint32_t limit,
                              uint32_t *segments, uint32_t *count) {
    call *c = record(s, "lookup_candidates", replay_candidates);
    c->lookup = lookup;
    c->n[0] = limit;
    c->host = segments;
    c->count = count;
    if (limit) memset(segments, POISON, limit * sizeof *segments);
    memset(count, POISON, sizeof *count);
}

static void replay_selected(loci_stream *s, call *c) {
    inner_ops(s)->lookup_selected(s->inner, c->lookup, c->host, c->bytes, c->count);
}

static void lookup_selected(loci_stream *s, loci_lookup *lookup, loci_selected *selected,
                            size_t capacity, size_t *count) {
    call *c = record(s, "lookup_selected", replay_selected);
    c->lookup = lookup;
    c->host = selected;
    c->bytes = capacity;
    c->count = count;
    if (capacity) memset(selected, POISON, capacity * sizeof *selected);
    memset(count, POISON, sizeof *count);
}

static void replay_stats(loci_stream *s, call *c) {
    inner_ops(s)->lookup_stats(s->inner, c->lookup, c->host);
}

static void lookup_stats(loci_stream *s, loci_lookup *lookup, loci_lookup_stats *stats) {
    call *c = record(s, "lookup_stats", replay_stats);
    c->lookup = lookup;
    c->host = stats;
    memset(stats, POISON, sizeof *stats);
}

/* --- The table --------------------------------------------------------------------------- */

static loci_status refuse_open(const loci_backend_options *options, loci_backend *self,
                               loci_error *err) {
    (void)options;
    (void)self;
    return loci_fail(err, LOCI_E_UNSUPPORTED, "the deferred backend is opened by deferred_open");
}

static void refuse_close(loci_backend *self) {
    (void)self;
    misuse("close", "the deferred backend is closed by deferred_close");
}

static const loci_backend_ops table = {
    .name = "deferred",
    .open = refuse_open,
    .close = refuse_close,
    .describe = describe,
    .pool = pool,
    .alloc = alloc,
    .wrap = wrap,
    .free = free_buffer,
    .stream_open = stream_open,
    .stream_close = stream_close,
    .sync = sync_stream,
    .upload = upload,
    .download = download,
    .copy = copy,
    .move = move,
    .weight_create = weight_create,
    .weight_free = weight_free,
    .gemm = gemm,
    .embed = embed,
    .rms_norm = rms_norm,
    .rope = rope,
    .swiglu = swiglu,
    .convert = convert,
    .scatter = scatter,
    .attend_dense = attend_dense,
    .merge = merge,
    .sample = sample,
    .lookup_create = lookup_create,
    .lookup_free = lookup_free,
    .lookup_begin = lookup_begin,
    .score_nodes = score_nodes,
    .score_codes = score_codes,
    .select = select_tokens,
    .attend_sparse = attend_sparse,
    .attribute = attribute,
    .score_segments = score_segments,
    .lookup_candidates = lookup_candidates,
    .lookup_selected = lookup_selected,
    .lookup_stats = lookup_stats,
    .mark = mark,
    .await = await,
};

loci_status deferred_open(loci_backend *inner, loci_backend **out, loci_error *err) {
    *out = NULL;
    loci_backend *backend = calloc(1, sizeof *backend);
    deferred *ctx = calloc(1, sizeof *ctx);
    if (!backend || !ctx) {
        free(backend);
        free(ctx);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the deferred backend");
    }
    ctx->inner = inner;
    snprintf(ctx->description, sizeof ctx->description, "deferred %s", inner->ops->describe(inner));
    *backend = (loci_backend){&table, ctx};
    *out = backend;
    return LOCI_OK;
}

void deferred_close(loci_backend *backend) {
    if (!backend) return;
    deferred *ctx = of(backend);
    while (ctx->views) {
        kept_view *kept = ctx->views;
        ctx->views = kept->next;
        free(kept->extents);
        free((void *)kept->flat);
        free(kept);
    }
    free(ctx);
    free(backend);
}
