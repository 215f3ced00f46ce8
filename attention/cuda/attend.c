/* SPDX-License-Identifier: Apache-2.0
 *
 * The last stages of a look-up, which read keys and values: attention over what is selected, and
 * how much of it each segment has. Rows may stand in memory of the host (rows.h).
 */
#include "attention/cuda/lookup.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/whole.h"

_Static_assert(LOCI_CUDA_EACH_ROWS == LOCI_GEMM_FEW_ROWS, "as many as decode together");

/* Between these two, work that reads rows of pairs. */
static void enter_rows(loci_stream *stream, loci_lookup *lookup, loci_cuda_row_cache *cache) {
    *cache = (loci_cuda_row_cache){0};
    if (!lookup->cached) return;
    cudaError_t result =
        loci_cuda_rows_enter(loci_cuda_pairs_rows(lookup->cuda->pairs), stream->stream, cache);
    if (cache->dim != lookup->look.dim) *cache = (loci_cuda_row_cache){0};
    (void)look_launched(stream, lookup, result, "the cache of rows");
}

static void leave_rows(loci_stream *stream, loci_lookup *lookup, bool used) {
    if (!lookup->cached) return;
    (void)look_launched(
        stream, lookup,
        loci_cuda_rows_leave(loci_cuda_pairs_rows(lookup->cuda->pairs), stream->stream, used),
        "the cache of rows");
}

/* Whether products of whole_wide.cu are exact. */
static bool wide_exact(const loci_lookup *lookup) {
    return loci_cuda_wide_narrow(&lookup->look) || lookup->params.precision != LOCI_BF16 ||
           lookup->look.rows <= LOCI_ATTEND_EXACT_QUERIES;
}

static cudaError_t attend_pairs(loci_stream *stream, const loci_lookup *lookup, bool listed,
                                const loci_cuda_attend *args) {
    if (lookup->wide_chunk)
        return loci_cuda_k_attend_wide(stream->stream, &lookup->look, args, wide_exact(lookup));
    if (lookup->mode == LOCI_MODE_DENSE)
        return loci_cuda_k_attend_whole(stream->stream, &lookup->look, args,
                                        lookup->cuda->block_bytes);
    if (listed)
        return loci_cuda_k_attend_listed(stream->stream, &lookup->look, &lookup->choice, args);
    return loci_cuda_k_attend_sparse(stream->stream, &lookup->look, args);
}

/* Attention over all tokens, or what is selected, from the list or from the mask. Of all tokens'
 * rows none are kept: they would drive out the others. */
static bool attend_rows(loci_stream *stream, loci_lookup *lookup, bool listed,
                        loci_cuda_attend *args) {
    const loci_cuda_look *look = &lookup->look;
    enter_rows(stream, lookup, &args->cache);
    bool fetches = args->cache.frames && lookup->mode != LOCI_MODE_DENSE;
    if (lookup->ready && fetches && !listed)
        (void)look_launched(stream, lookup, loci_cuda_k_fetch_rows(stream->stream, look, args),
                            "attend_sparse");
    if (lookup->ready)
        (void)look_launched(stream, lookup, attend_pairs(stream, lookup, listed, args),
                            "attend_sparse");
    leave_rows(stream, lookup, fetches);
    return lookup->ready;
}

static uint32_t segments_of(const loci_corpus_view *corpus) {
    return corpus->flat_segment_base + corpus->flat_segments;
}

/* Masses of all segments. */
static size_t mass_count(const loci_lookup *lookup) {
    return (size_t)segments_of(lookup->corpus) * (lookup->params.each ? LOCI_CUDA_EACH_ROWS : 1);
}

/* Zeros, which attention writes by the way, for attribution and figures to begin with. */
static bool take_zeros(loci_stream *stream, loci_lookup *lookup, loci_cuda_attend *args) {
    size_t masses = mass_count(lookup);
    args->zeroed_count = (uint32_t)(masses + sizeof *lookup->figures / sizeof *args->zeroed);
    args->zeroed = look_alloc(stream, lookup, args->zeroed_count * sizeof *args->zeroed);
    lookup->mass = args->zeroed;
    lookup->figures = args->zeroed ? (void *)(args->zeroed + masses) : NULL;
    return args->zeroed != NULL;
}

/* Room for the logits of a single row, or of a few, a list's in the place of its estimates, which
 * have done their work. */
static bool keep_logits(loci_stream *stream, loci_lookup *lookup, bool listed,
                        loci_cuda_attend *args) {
    if (listed) {
        args->logits = lookup->choice.score;
        args->room = lookup->choice.room;
    } else {
        args->room = (uint64_t)lookup->look.words * 32;
        size_t bytes = lookup->look.rows * lookup->look.q_heads * args->room * sizeof *args->logits;
        if (bytes > lookup->cuda->room_bytes) return true; /* keys are read again */
        args->logits = look_alloc(stream, lookup, bytes);
        if (!args->logits) return false;
    }
    lookup->logits = args->logits;
    lookup->room = args->room;
    return true;
}

void loci_cuda_attend_sparse(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                             uint32_t out_stride, loci_ref lse) {
    if (!lookup->ready || !lookup->tokens_selected) return;
    const loci_cuda_look *look = &lookup->look;
    bool tail = lookup->params.estimate_tail && lookup->mode == LOCI_MODE_HIERARCHICAL;
    bool whole = lookup->mode == LOCI_MODE_DENSE && look->extents > 0;
    size_t last = (size_t)(look->rows - 1) * out_stride + (size_t)look->q_heads * look->dim;
    bool wide = whole && loci_cuda_whole_wide(lookup->cuda, look->dim);
    if (wide) lookup->wide_chunk = loci_cuda_wide_chunk(lookup);
    loci_cuda_attend args = {
        .chunk = wide    ? lookup->wide_chunk
                 : whole ? loci_cuda_whole_chunk(look)
                         : loci_cuda_chunk(look),
        .extents = look->extents,
        .out = loci_cuda_ptr(stream, out, last * sizeof(float)),
        .lse = loci_cuda_ptr(stream, lse, (size_t)look->rows * look->q_heads * sizeof(float)),
        .out_stride = out_stride,
    };
    args.chunks = loci_cuda_chunks(look->tokens_max, args.chunk);
    args.parts = args.chunks + (tail ? 1 : 0);
    if (wide) {
        args.extents = 1;
        args.chunks = loci_cuda_wide_parts(lookup, args.chunk);
        args.parts = args.chunks * (loci_cuda_wide_narrow(look) ? 2 : 1);
    }
    bool listed = lookup->tokens_scored && look_listed(lookup);
    if (listed) {
        args.extents = 1;
        args.parts = (LOCI_CUDA_LISTED + look->kv_heads - 1) / look->kv_heads;
    }
    bool each = whole && lookup->params.each; /* of several rows whole_wide.cu reads keys again */
    bool keeps = listed || (wide ? look->rows == 1 && loci_cuda_wide_narrow(look)
                                 : whole && (look->rows == 1 || each));
    if ((keeps || each) && !take_zeros(stream, lookup, &args)) return;
    if (keeps && !keep_logits(stream, lookup, listed, &args)) return;
    size_t partials = (size_t)args.extents * look->kv_heads * args.parts *
                      loci_cuda_tiles(look->vectors) * LOCI_CUDA_ROWS;
    args.partial = look_alloc(stream, lookup, partials * (look->dim + 2) * sizeof(float));
    if (!args.partial || !args.out || !args.lse) return;
    if (!listed && !whole && !look_mask(stream, lookup)) return;
    if (!attend_rows(stream, lookup, listed, &args)) return;
    if (tail && !look_count(stream, lookup)) return;
    if (tail && !look_launched(
                    stream, lookup,
                    loci_cuda_k_attend_tail(stream->stream, look, &lookup->choice, &args), "tail"))
        return;
    lookup->attended = look_launched(stream, lookup, loci_cuda_k_join(stream->stream, look, &args),
                                     "attend_sparse");
}

/* Where the flat part's keys and segments stand. */
static bool put_flat(loci_stream *stream, loci_lookup *lookup, loci_cuda_attribution *args) {
    const loci_corpus_view *corpus = lookup->corpus;
    args->flat_tokens = corpus->flat_tokens;
    args->flat_segments = corpus->flat_segments;
    args->flat_segment_base = corpus->flat_segment_base;
    if (corpus->flat_tokens == 0) return true;
    args->flat_segment_begin = lookup->flat_segment_begin;
    args->flat_k = look_flat_k(stream, lookup);
    return args->flat_k != NULL;
}

/* Sums of masses where attention has not left zeros. */
static bool clear_mass(loci_stream *stream, loci_lookup *lookup) {
    size_t bytes = mass_count(lookup) * sizeof *lookup->mass;
    if (lookup->mass) return true;
    lookup->mass = look_alloc(stream, lookup, bytes);
    return lookup->mass &&
           look_launched(stream, lookup, cudaMemsetAsync(lookup->mass, 0, bytes, stream->stream),
                         "cudaMemset");
}

/* args: which rows, and where their masses go. */
static void attribute(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                      loci_cuda_attribution *args) {
    const loci_cuda_look *look = &lookup->look;
    size_t lse = (size_t)look->rows * look->q_heads * sizeof(float);
    args->segments = segments_of(lookup->corpus);
    args->total_lse = loci_cuda_ptr(stream, total_lse, lse);
    args->logits = lookup->logits;
    args->room = lookup->room;
    args->wide_chunk = lookup->wide_chunk;
    if (lookup->wide_chunk) args->wide_chunks = loci_cuda_wide_parts(lookup, lookup->wide_chunk);
    args->exact = wide_exact(lookup);
    if (!args->total_lse || !clear_mass(stream, lookup) || !put_flat(stream, lookup, args)) return;
    args->mass = lookup->mass;
    if (!lookup->logits) enter_rows(stream, lookup, &args->cache);
    if (lookup->ready)
        (void)look_launched(stream, lookup,
                            loci_cuda_k_attribute(stream->stream, look,
                                                  lookup->tokens_scored ? &lookup->choice : NULL,
                                                  args),
                            "attribute");
    if (!lookup->logits) leave_rows(stream, lookup, false);
}

/* Whether there is something to attribute; masks where they say what was attended to. */
static bool may_attribute(loci_stream *stream, loci_lookup *lookup) {
    return lookup->ready && lookup->attended &&
           (lookup->logits || lookup->wide_chunk || look_mask(stream, lookup));
}

void loci_cuda_attribute(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                         uint32_t row_begin, loci_ref mass) {
    if (!may_attribute(stream, lookup)) return;
    size_t bytes = segments_of(lookup->corpus) * sizeof(float);
    loci_cuda_attribution args = {.row_begin = row_begin, .row_end = lookup->look.rows};
    args.out[0] = loci_cuda_ptr(stream, mass, bytes);
    if (args.out[0]) attribute(stream, lookup, total_lse, &args);
}

void loci_cuda_attribute_each(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                              const loci_ref *mass) {
    LOCI_ASSERT(lookup->params.each && lookup->look.rows <= LOCI_GEMM_FEW_ROWS);
    if (!may_attribute(stream, lookup)) return;
    size_t bytes = segments_of(lookup->corpus) * sizeof(float);
    loci_cuda_attribution args = {.row_end = lookup->look.rows, .each = true};
    for (uint32_t row = 0; row < lookup->look.rows; row++)
        if (mass[row].buffer) args.out[row] = loci_cuda_ptr(stream, mass[row], bytes);
    attribute(stream, lookup, total_lse, &args);
}
