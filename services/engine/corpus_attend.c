/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over a corpus in one retrieval layer: the shared prefix (sink) with multiplicity, the
 * flat open segments, and the extents through the index, merged into the sequence's own attention
 * by log-sum-exp.
 *
 * A tile's step only enqueues. What it has to tell, bytes and attention mass, is in a record that
 * the query keeps until the pass has run (loci_corpus_attended), so that on a device the host is
 * ahead and does not let it stand still.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "services/engine/attend_step.h"

#define TILE_ROWS 32u
#define TILE_BYTES (192ull << 20) /* about what the scores of one tile may take */
/* What is enqueued before the host waits: records, more than decoding has layers, mostly; and rows
 * times tokens of the corpus, some tenths of a second of a device's, after which a cancel is seen.
 */
#define STEPS_MOST 64u
#define WORK_MOST (1ull << 30)

static size_t part_bytes(uint32_t rows, uint32_t heads, uint32_t head_dim, uint32_t extra_rows) {
    return ((size_t)rows * head_dim + rows + extra_rows) * heads * sizeof(float);
}

loci_status loci_slot_part(loci_engine *engine, loci_slot *slot, uint32_t rows, uint32_t heads,
                           uint32_t head_dim, uint32_t extra_rows, loci_ref *out, loci_ref *lse,
                           loci_error *err) {
    loci_backend *backend = engine->backend;
    size_t out_bytes = (size_t)rows * heads * head_dim * sizeof(float);
    size_t bytes = part_bytes(rows, heads, head_dim, extra_rows);
    if (bytes > slot->part_bytes) {
        backend->ops->free(backend, slot->part);
        slot->part = NULL;
        slot->part_bytes = 0;
        LOCI_TRY(backend->ops->alloc(backend, bytes, &slot->part, err));
        slot->part_bytes = bytes;
        slot->serial++;
    }
    *out = loci_ref_at(slot->part, 0);
    *lse = loci_ref_at(slot->part, out_bytes);
    return LOCI_OK;
}

loci_status loci_corpus_attend_begin(loci_query *query, loci_error *err) {
    loci_slot *slot = query->slot;
    loci_backend *backend = query->engine->backend;
    size_t bytes = ((size_t)loci_snapshot_segments(query->snapshot) + 1) * sizeof(float);
    /* alloc zero-fills; the buffer is as long as the corpus has segments, 4 bytes each. */
    backend->ops->free(backend, slot->mass);
    slot->mass = NULL;
    LOCI_TRY(backend->ops->alloc(backend, bytes, &slot->mass, err));
    slot->serial++;
    query->sink_mass = 0;
    return LOCI_OK;
}

typedef loci_attend_step step;
typedef loci_exact_part exact_part;

loci_select_params loci_attend_params(const loci_query *query, const loci_attend_call *call) {
    loci_backend *backend = query->engine->backend;
    loci_select_params params = query->params;
    params.precision = call->precision;
    bool dense = call->retrieval_index < query->settings.dense_layers;
    if (params.mode == LOCI_MODE_HIERARCHICAL && params.budget == 0 && backend->ops->reads_whole)
        dense = dense || backend->ops->reads_whole(backend, query->view, call->retrieval_index,
                                                   call->rows, call->q_heads);
    if (dense) params.mode = LOCI_MODE_DENSE;
    return params;
}

static void attend_rows(const step *s, exact_part *part, const loci_corpus_view *view, loci_ref k,
                        loci_ref v, loci_dtype dtype, uint32_t count, float scale, float bias) {
    const loci_attend_call *call = &s->call;
    /* A row of a question has nothing to do with those of others. */
    uint32_t spans = s->sharers ? call->rows : 1, rows = call->rows / spans;
    for (uint32_t i = 0; i < spans; i++)
        part->span[i] = (loci_attend_span){i * rows, rows, 0, count};
    part->args = (loci_attend_dense){
        .q = call->q,
        .k = k,
        .v = v,
        .out = s->out,
        .lse = part == &s->sink ? s->sink_lse : s->lse,
        .q_stride = call->q_stride,
        .kv_stride = view->kv_heads * view->head_dim,
        .out_stride = call->q_heads * call->head_dim,
        .q_heads = call->q_heads,
        .kv_heads = view->kv_heads,
        .head_dim = call->head_dim,
        .kv_dtype = dtype,
        .scale = scale,
        .first_key_is_sink = bias != 0,
        .first_key_bias = bias,
        .spans = part->span,
        .span_count = spans,
    };
}

static void merge(const loci_backend *backend, const loci_attend_call *call, loci_ref out,
                  uint32_t stride, loci_ref lse, loci_ref part, loci_ref part_lse) {
    backend->ops->merge(call->stream, out, stride, lse, part, call->q_heads * call->head_dim,
                        part_lse, call->rows, call->q_heads, call->head_dim);
}

uint64_t loci_attend_sinks(const loci_query *query) {
    if (!query->view->has_sink) return 0;
    return query->causal ? 1 : query->view->live_segments;
}

static void attend_sink(const loci_query *query, step *s) {
    const loci_corpus_view *view = query->view;
    const loci_backend *backend = query->engine->backend;
    const loci_attend_call *call = &s->call;
    uint64_t sinks = loci_attend_sinks(query);
    if (sinks == 0) return;
    size_t row = (size_t)view->kv_heads * view->head_dim * sizeof(float);
    loci_ref k = view->sink_k, v = view->sink_v;
    k.offset += call->retrieval_index * row;
    v.offset += call->retrieval_index * row;
    attend_rows(s, &s->sink, view, k, v, LOCI_F32, 1, call->scale, logf((float)sinks));
    backend->ops->attend_dense(call->stream, &s->sink.args);
    merge(backend, call, call->out, call->out_stride, call->lse, s->out, s->sink_lse);
}

/* The open segments, exactly. */
static void attend_flat(const loci_query *query, step *s) {
    const loci_corpus_view *view = query->view;
    const loci_backend *backend = query->engine->backend;
    const loci_attend_call *call = &s->call;
    if (view->flat_tokens == 0) return;
    loci_ref k = loci_ref_at(view->flat_k[call->retrieval_index], 0);
    loci_ref v = loci_ref_at(view->flat_v[call->retrieval_index], 0);
    attend_rows(s, &s->flat, view, k, v, LOCI_BF16, view->flat_tokens, s->scale, 0);
    backend->ops->attend_dense(call->stream, &s->flat.args);
    merge(backend, call, s->all, s->all_stride, s->all_lse, s->out, s->lse);
}

static void look_up(const loci_query *query, step *s) {
    const loci_backend *backend = query->engine->backend;
    const loci_backend_ops *ops = backend->ops;
    const loci_attend_call *call = &s->call;
    loci_lookup *lookup = s->lookup;
    ops->lookup_begin(call->stream, lookup, query->view, call->retrieval_index, call->q,
                      call->q_stride, call->rows, call->q_heads, s->scale, s->all_lse, &s->params);
    ops->score_nodes(call->stream, lookup);
    ops->score_codes(call->stream, lookup);
    ops->select(call->stream, lookup);
    ops->attend_sparse(call->stream, lookup, s->out, call->q_heads * call->head_dim, s->lse);
    merge(backend, call, s->all, s->all_stride, s->all_lse, s->out, s->lse);
}

void loci_attend_enqueue(const loci_query *query, step *s) {
    attend_sink(query, s);
    attend_flat(query, s);
    look_up(query, s);
}

/* The corpus's tokens have an output of their own, empty at first. */
static void begin_apart(const loci_query *query, step *s) {
    const loci_backend_ops *ops = query->engine->backend->ops;
    const loci_attend_call *call = &s->call;
    size_t count = (size_t)call->rows * call->q_heads;
    s->all = s->out;
    s->all.offset += count * call->head_dim * sizeof(float);
    s->all_lse = s->lse;
    s->all_lse.offset += count * sizeof(float);
    s->all_stride = call->q_heads * call->head_dim;
    float *none = s->host + 2 * count, *zeros = s->host + 3 * count;
    for (size_t i = 0; i < count; i++) none[i] = -INFINITY;
    ops->upload(call->stream, s->all_lse, none, count * sizeof(float));
    ops->upload(call->stream, s->all, zeros, count * call->head_dim * sizeof(float));
}

/* Scales their log-sum-exp L by S and merges them; s->lse becomes that by which attribution weighs
 * them: a token of logit x has exp(x - L) exp(S L - total) of the attention. The host does it, and
 * waits. */
static loci_status join_apart(const loci_query *query, step *s, loci_error *err) {
    const loci_backend *backend = query->engine->backend;
    const loci_backend_ops *ops = backend->ops;
    const loci_attend_call *call = &s->call;
    size_t count = (size_t)call->rows * call->q_heads, bytes = count * sizeof(float);
    float *total = s->host + count, *own = s->host + 2 * count, factor = query->settings.attn_scale;
    ops->download(call->stream, own, s->all_lse, bytes);
    LOCI_TRY(ops->sync(call->stream, err));
    for (size_t i = 0; i < count; i++) total[i] = factor * own[i];
    ops->upload(call->stream, s->all_lse, total, bytes);
    merge(backend, call, call->out, call->out_stride, call->lse, s->all, s->all_lse);
    ops->download(call->stream, total, call->lse, bytes);
    LOCI_TRY(ops->sync(call->stream, err));
    for (size_t i = 0; i < count; i++)
        own[i] = isfinite(own[i]) ? total[i] + own[i] - factor * own[i] : total[i];
    ops->upload(call->stream, s->lse, own, bytes);
    return LOCI_OK;
}

static loci_status enqueue(loci_query *query, step *s, loci_error *err) {
    const loci_backend_ops *ops = query->engine->backend->ops;
    loci_stream *stream = s->call.stream;
    if (s->apart) begin_apart(query, s);
    loci_attend_enqueue(query, s);
    if (s->apart) LOCI_TRY(join_apart(query, s, err));
    if (query->slot->mass && s->row_begin < s->call.rows)
        ops->attribute(stream, s->lookup, s->apart ? s->lse : s->call.lse, s->row_begin,
                       loci_ref_at(query->slot->mass, 0));
    ops->lookup_stats(stream, s->lookup, &s->stats);
    return LOCI_OK;
}

/* --- Steps of one row ------------------------------------------------------------------------- */

/* All that tells the operations of one row's step from another's of the same slot. */
typedef struct step_key {
    uint64_t serial; /* of the slot: its buffers, the question and its snapshot */
    loci_ref q, out, lse;
    loci_select_params params;
    uint32_t q_stride, out_stride, q_heads, head_dim, row_begin;
    float scale, corpus_scale;
} step_key;

static void put_key(const loci_query *query, const step *s, step_key *key) {
    const loci_attend_call *call = &s->call;
    const loci_select_params *params = &s->params;
    memset(key, 0, sizeof *key); /* what is between the fields, too */
    key->serial = query->slot->serial;
    key->q = call->q;
    key->out = call->out;
    key->lse = call->lse;
    key->params.mode = params->mode;
    key->params.top_p = params->top_p;
    key->params.budget = params->budget;
    key->params.roots = params->roots;
    key->params.candidates = params->candidates;
    key->params.roots_min = params->roots_min;
    key->params.candidates_min = params->candidates_min;
    key->params.candidates_max = params->candidates_max;
    key->params.estimate_tail = params->estimate_tail;
    memcpy(key->params.squeezed_threshold, params->squeezed_threshold,
           sizeof key->params.squeezed_threshold);
    key->q_stride = call->q_stride;
    key->out_stride = call->out_stride;
    key->q_heads = call->q_heads;
    key->head_dim = call->head_dim;
    key->row_begin = s->row_begin;
    key->scale = call->scale;
    key->corpus_scale = s->scale;
}

/* As the last one of its kind where it is the same. */
static void enqueue_row(loci_query *query, step *s) {
    const loci_backend_ops *ops = query->engine->backend->ops;
    const loci_attend_call *call = &s->call;
    loci_lookup *lookup = query->slot->lookup;
    loci_error none;
    step_key key;
    put_key(query, s, &key);
    bool done =
        ops->step_begin(call->stream, lookup, query->view, call->retrieval_index, &key, sizeof key);
    do {
        if (!done) (void)!enqueue(query, s, &none); /* fails only apart */
        done = false;
    } while (!ops->step_end(call->stream, lookup, &s->stats));
}

/* In company q, out and lse stand elsewhere each time: the slot's copies do not. */
static loci_status enter_company(loci_query *query, step *s, loci_error *err) {
    loci_backend *backend = query->engine->backend;
    loci_slot *slot = query->slot;
    loci_attend_call *call = &s->call;
    size_t count = (size_t)call->q_heads, values = count * call->head_dim;
    if (!slot->row)
        LOCI_TRY(
            backend->ops->alloc(backend, (2 * values + count) * sizeof(float), &slot->row, err));
    loci_ref q = loci_ref_at(slot->row, 0), out = loci_ref_at(slot->row, values * sizeof(float));
    loci_ref lse = loci_ref_at(slot->row, 2 * values * sizeof(float));
    const loci_move moves[] = {{q, call->q, NULL, values * sizeof(float)},
                               {out, call->out, NULL, values * sizeof(float)},
                               {lse, call->lse, NULL, count * sizeof(float)}};
    backend->ops->move(call->stream, moves, 3);
    call->q = q;
    call->out = s->all = out;
    call->lse = s->all_lse = lse;
    return LOCI_OK;
}

/* --- What a step tells ------------------------------------------------------------------------ */

/* Adds up the sink's weight, exp(part lse - total lse), over rows and heads. */
static void add_sink_mass(loci_query *query, const step *s, uint32_t begin, uint32_t end) {
    uint32_t heads = s->call.q_heads;
    const float *total = s->host + (size_t)s->call.rows * heads;
    for (size_t i = (size_t)begin * heads; i < (size_t)end * heads && query->view->has_sink; i++)
        query->sink_mass += exp((double)s->host[i] - (double)total[i]);
}

/* Its part of what `members` questions read once. */
static uint64_t part_of(uint64_t bytes, uint32_t member, uint32_t members) {
    return bytes * (member + 1) / members - bytes * member / members;
}

/* of: whose step it is, of several questions' or its own. */
static void add_usage(loci_query *query, const step *s, const step *of) {
    uint32_t member = s->row, members = of == s ? 1 : of->call.rows;
    const loci_lookup_stats *stats = &of->stats;
    const loci_corpus_view *view = query->view;
    uint64_t flat = (uint64_t)view->flat_tokens * view->kv_heads * view->head_dim * 4u;
    uint64_t index = stats->root_bytes + stats->leaf_bytes + stats->code_bytes + stats->hash_bytes;
    uint64_t kv = part_of(stats->kv_bytes + stats->tail_bytes + flat, member, members);
    index = part_of(index, member, members);
    query->usage.index_read_bytes += index;
    query->usage.kv_read_bytes += kv;
    if (s->dense_reads) query->usage.kv_dense_bytes += stats->dense_kv_bytes + flat;
    query->usage.fetched_bytes += index + part_of(stats->kv_leaf_bytes, member, members);
    query->step_bytes += index + kv;
    query->usage.lookup_ms += (double)stats->elapsed_ns / 1e6;
}

/* What a step tells, which has run. */
static void add_told(loci_query *query, const step *s) {
    const step *of = s->shared ? s->shared : s;
    add_usage(query, s, of);
    if (s->shared)
        add_sink_mass(query, of, s->row, s->row + 1);
    else
        add_sink_mass(query, s, s->row_begin, s->call.rows);
}

static void drop_step(step *s) {
    if (s->shared && atomic_fetch_sub(&s->shared->sharers, 1) == 1) free(s->shared);
    free(s);
}

/* To the host the sums of exponentials that weigh the sink; from copies what the call is to get. */
static void finish(const loci_query *query, step *s, const loci_attend_call *call) {
    size_t count = (size_t)call->rows * call->q_heads, bytes = count * sizeof(float);
    loci_ref nowhere = {0};
    loci_move moves[4] = {{nowhere, s->call.lse, s->host + count, bytes}};
    uint32_t n = 1;
    if (loci_attend_sinks(query) > 0)
        moves[n++] = (loci_move){nowhere, s->sink_lse, s->host, bytes};
    if (s->call.lse.buffer != call->lse.buffer) {
        moves[n++] = (loci_move){call->out, s->call.out, NULL, bytes * call->head_dim};
        moves[n++] = (loci_move){call->lse, s->call.lse, NULL, bytes};
    }
    query->engine->backend->ops->move(call->stream, moves, n);
}

/* The steps so far, which have run: counted, or only dropped. Before the pass has ended those that
 * others have too, of whose stream nobody knows, stay. */
static void close_steps(loci_query *query, bool counted, bool ended) {
    step *all = query->steps;
    query->steps = query->last_step = NULL;
    query->step_count = 0;
    query->step_work = 0;
    for (step *s = all, *next; s; s = next) {
        next = s->next;
        s->next = NULL;
        if (s->shared && !ended) {
            loci_attend_keep(query, s);
            continue;
        }
        if (counted) add_told(query, s);
        drop_step(s);
    }
}

void loci_attend_keep(loci_query *query, step *s) {
    *(query->last_step ? &query->last_step->next : &query->steps) = s;
    query->last_step = s;
}

loci_status loci_corpus_attended(void *ctx, loci_status status, loci_error *err) {
    loci_query *query = ctx;
    loci_status read = loci_snapshot_check(query->snapshot, err);
    if (read != LOCI_OK) status = read;
    close_steps(query, status == LOCI_OK, true);
    return status;
}

bool loci_attend_apart(const loci_query *query) {
    return query->settings.attn_scale != 1;
}

/* Of the slot's part. */
static uint32_t part_rows(const loci_query *query, const loci_attend_call *call) {
    return (loci_attend_apart(query) ? 2 : 1) * call->rows;
}

/* Whether the steps so far have to have run before the next is enqueued: they are many, each is
 * large (apart), or the part that they use is to grow. */
static bool must_wait(const loci_query *query, const loci_attend_call *call) {
    size_t bytes = part_bytes(part_rows(query, call), call->q_heads, call->head_dim, call->rows);
    return query->step_count > 0 &&
           (query->step_count == STEPS_MOST || query->step_work > WORK_MOST ||
            loci_attend_apart(query) || bytes > query->slot->part_bytes);
}

/* The record of a tile's step; the query's from here on. */
static loci_status open_step(loci_query *query, const loci_attend_call *call,
                             const loci_select_params *params, bool dense_reads, step **out,
                             loci_error *err) {
    *out = NULL;
    size_t count = (size_t)call->rows * call->q_heads;
    bool apart = loci_attend_apart(query);
    /* Behind the three, what an output of its own begins with. */
    step *s = calloc(1, sizeof *s + count * (3 + (apart ? call->head_dim : 0)) * sizeof(float));
    if (!s) return loci_fail(err, LOCI_E_NOMEM, "no memory for an attention step");
    *out = s;
    loci_attend_keep(query, s);
    query->step_count++;
    query->step_work += call->rows * query->view->tokens;
    s->call = *call;
    s->lookup = query->slot->lookup;
    s->params = *params;
    uint32_t from = query->evidence_from, position = call->row_position;
    uint32_t before = from > position ? from - position : 0;
    s->row_begin = before < call->rows ? before : call->rows;
    s->all = call->out;
    s->all_lse = call->lse;
    s->all_stride = call->out_stride;
    s->scale = call->scale / query->settings.attn_temperature;
    s->apart = apart;
    s->dense_reads = dense_reads;
    uint32_t rows = part_rows(query, call);
    LOCI_TRY(loci_slot_part(query->engine, query->slot, rows, call->q_heads, call->head_dim,
                            call->rows, &s->out, &s->lse, err));
    s->sink_lse = s->lse;
    s->sink_lse.offset += (size_t)rows * call->q_heads * sizeof(float);
    return LOCI_OK;
}

/* All parts for the rows of one tile. */
static loci_status attend_tile(loci_query *query, const loci_attend_call *call,
                               const loci_select_params *params, bool dense_reads,
                               loci_error *err) {
    const loci_backend_ops *ops = query->engine->backend->ops;
    LOCI_TRY(loci_cancel_check(query->cancel));
    if (must_wait(query, call)) {
        LOCI_TRY(loci_query_settle(query, call->stream, err));
        close_steps(query, true, false);
    }
    step *s;
    LOCI_TRY(open_step(query, call, params, dense_reads, &s, err));
    bool repeats = call->rows == 1 && !s->apart && ops->step_begin;
    if (repeats && call->in_company) LOCI_TRY(enter_company(query, s, err));
    if (repeats)
        enqueue_row(query, s);
    else
        LOCI_TRY(enqueue(query, s, err));
    finish(query, s, call);
    return LOCI_OK;
}

/* Rows of one tile of mode dense. */
static uint32_t dense_rows(const loci_query *query, const loci_attend_call *call) {
    return query->engine->backend->ops->on_device ? call->rows : TILE_ROWS;
}

/* Rows of one tile, by what a row's scores usually take: floats for all roots, for the leaves of
 * the kept ones and for about twice as many candidates as are asked for, and each extent's table of
 * sketches. A corpus that repeats itself can have several times as many; what bounds memory is the
 * look-up's account, which refuses. */
static uint32_t tile_rows(const loci_query *query, const loci_attend_call *call,
                          const loci_select_params *params) {
    if (params->mode == LOCI_MODE_SQUEEZED) return call->rows;   /* they share one set */
    if (loci_select_all(params)) return dense_rows(query, call); /* no scores */
    double live = (double)query->view->tokens, spread = 0;
    for (uint32_t e = 0; e < query->view->extent_count; e++)
        spread += sqrt((double)query->view->extents[e].tokens);
    double roots = fmax((double)params->roots * spread, (double)params->roots_min);
    double candidates =
        fmax((double)params->candidates * sqrt(live), (double)params->candidates_min);
    double scores = fmin(roots * LOCI_ROOT_LEAVES + 2 * candidates, live) * call->q_heads;
    scores = scores * call->q_heads / query->view->kv_heads;
    scores += live / (LOCI_ROOT_LEAVES * LOCI_LEAF_TOKENS) * call->q_heads;
    double tables = (double)query->view->extent_count * call->q_heads * (4.0 * call->head_dim + 24);
    double row = scores * sizeof(float) + tables + 1;
    double most = (double)TILE_BYTES / row;
    return most >= TILE_ROWS ? TILE_ROWS : most > 1 ? (uint32_t)most : 1;
}

/* Many rows go in tiles, but for those that read everything on a device: memory stays bounded, and
 * cancelling takes effect between them, on a device where the host waits for it. */
loci_status loci_corpus_attend(void *ctx, const loci_attend_call *call, loci_error *err) {
    loci_query *query = ctx;
    const loci_select_params params = loci_attend_params(query, call);
    uint32_t most = tile_rows(query, call, &params), dense = dense_rows(query, call);
    for (uint32_t row = 0; row < call->rows; row += most) {
        loci_attend_call tile = *call;
        tile.rows = call->rows - row < most ? call->rows - row : most;
        tile.row_position += row;
        tile.q = loci_ref_row(call->q, row, call->q_stride);
        tile.out = loci_ref_row(call->out, row, call->out_stride);
        tile.lse = loci_ref_row(call->lse, row, call->q_heads);
        /* Dense mode's tiles are larger, where few rows are together here. */
        bool dense_reads = row == 0 || row / dense != (row - most) / dense;
        LOCI_TRY(attend_tile(query, &tile, &params, dense_reads, err));
    }
    return LOCI_OK;
}

/* Keeps the `limit` best in `out`, best first; ties by segment number. */
static void keep_best(loci_ranked *out, uint32_t *count, uint32_t limit, loci_ranked item) {
    uint32_t at = *count;
    if (at == limit) {
        if (item.score <= out[at - 1].score) return;
        at--;
    } else {
        (*count)++;
    }
    while (at > 0 && out[at - 1].score < item.score) {
        out[at] = out[at - 1];
        at--;
    }
    out[at] = item;
}

loci_status loci_corpus_attend_best(loci_query *query, uint32_t limit, loci_ranked *out,
                                    uint32_t *count, loci_error *err) {
    loci_backend *backend = query->engine->backend;
    loci_stream *stream = loci_sequence_stream(query->slot->sequence);
    uint32_t segments = loci_snapshot_segments(query->snapshot);
    *count = 0;
    float *mass = calloc((size_t)segments + 1, sizeof *mass);
    if (!mass) return loci_fail(err, LOCI_E_NOMEM, "no memory for attention masses");
    backend->ops->download(stream, mass, loci_ref_at(query->slot->mass, 0),
                           (size_t)segments * sizeof *mass);
    loci_status status = backend->ops->sync(stream, err);
    if (status == LOCI_OK) {
        double corpus_mass = 0;
        for (uint32_t s = 0; s < segments; s++) {
            corpus_mass += (double)mass[s];
            loci_ranked item = {.segment = s, .score = (double)mass[s], .words = -1};
            if (mass[s] > 0) keep_best(out, count, limit, item);
        }
        double all = query->sink_mass + corpus_mass;
        for (uint32_t i = 0; i < *count && all > 0; i++) out[i].score /= all;
        query->usage.share_sink = all > 0 ? query->sink_mass / all : 0;
        double shown = query->usage.share_sink;
        for (uint32_t i = 0; i < *count; i++) shown += out[i].score;
        query->usage.share_unattributed = all > 0 && shown < 1 ? 1 - shown : 0;
    }
    free(mass);
    return status;
}
