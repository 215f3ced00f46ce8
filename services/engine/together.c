/* SPDX-License-Identifier: Apache-2.0
 *
 * Attention over a corpus for questions that decode in one pass: where the next tokens of several
 * of them read all of a layer, one look-up reads it for all.
 *
 * Those of the same snapshot, which is the same object, go together: rows that differ in nothing
 * but their queries. Each is told its row: its masses, its part of what was read (equal parts of
 * each byte, so that the sum over questions is what was read), and the whole time.
 */
#include <math.h>
#include <stdlib.h>

#include "services/engine/attend_step.h"

typedef loci_attend_step step;

/* --- Who goes together ------------------------------------------------------------------------ */

/* Whether nothing but the queries tells their calls in mode dense from each other. */
static bool alike(const loci_query *a, const loci_attend_call *a_call, const loci_query *b,
                  const loci_attend_call *b_call) {
    return a->engine == b->engine && a->view == b->view && a->causal == b->causal &&
           a->settings.attn_temperature == b->settings.attn_temperature &&
           a_call->scale == b_call->scale && a_call->precision == b_call->precision;
}

/* One row, which counts as evidence. */
static bool may_share(const loci_query *query, const loci_attend_call *call) {
    return call->rows == 1 && call->row_position >= query->evidence_from &&
           !loci_attend_apart(query);
}

static bool reads_whole(const loci_query *query, const loci_attend_call *call, uint32_t rows) {
    loci_attend_call all = *call;
    all.rows = rows;
    const loci_select_params params = loci_attend_params(query, &all);
    return loci_select_all(&params);
}

/* Whether a question's row is read whole may depend on how many there are. */
static uint32_t choose(void *const *ctx, const loci_attend_call *calls, uint32_t count) {
    uint32_t chosen = 0, before;
    for (uint32_t i = 0; i < count; i++)
        chosen |=
            (uint32_t)(may_share(ctx[i], &calls[i]) && alike(ctx[0], &calls[0], ctx[i], &calls[i]))
            << i;
    do {
        before = chosen;
        uint32_t rows = (uint32_t)__builtin_popcount(before);
        for (uint32_t i = 0; i < count; i++)
            if (before >> i & 1 && !reads_whole(ctx[i], &calls[i], rows)) chosen &= ~(1u << i);
    } while (chosen != before);
    return chosen & 1 ? chosen : 1;
}

/* --- Working memory --------------------------------------------------------------------------- */

/* Floats of loci_company.rows: copies of q, out and lse; out and lse of a part, lse of the sink. */
typedef struct places {
    loci_ref q, out, lse, part, part_lse, sink_lse;
} places;

static size_t place(const loci_attend_call *call, loci_buffer *rows, places *out) {
    size_t heads = LOCI_GEMM_FEW_ROWS * (size_t)call->q_heads, values = heads * call->head_dim;
    loci_ref *const refs[] = {&out->q,   &out->out,      &out->part,
                              &out->lse, &out->part_lse, &out->sink_lse};
    size_t at = 0;
    for (size_t i = 0; i < sizeof refs / sizeof *refs; i++) {
        *refs[i] = loci_ref_at(rows, at);
        at += (i < 3 ? values : heads) * sizeof(float);
    }
    return at;
}

/* A group's calls come one after another, whoever makes them. */
static loci_status open_company(loci_engine *engine, const loci_attend_call *call,
                                loci_company *company, places *out, loci_error *err) {
    loci_backend *backend = engine->backend;
    if (!company->lookup) LOCI_TRY(backend->ops->lookup_create(backend, &company->lookup, err));
    if (!company->rows)
        LOCI_TRY(backend->ops->alloc(backend, place(call, NULL, out), &company->rows, err));
    (void)place(call, company->rows, out);
    return LOCI_OK;
}

void loci_company_close(loci_engine *engine, loci_company *company) {
    loci_backend *backend = engine->backend;
    if (company->lookup) backend->ops->lookup_free(backend, company->lookup);
    if (company->rows)
        backend->ops->free(backend, company->rows); /* else there may be no backend */
}

/* --- The step --------------------------------------------------------------------------------- */

/* A step and the questions' records of it, the last of which frees it. */
static loci_status open_shared(void *const *ctx, const loci_attend_call *calls, uint32_t count,
                               step **out, loci_error *err) {
    size_t floats = 2 * (size_t)count * calls[0].q_heads;
    step *shared = *out = calloc(1, sizeof *shared + floats * sizeof(float));
    if (!shared) return loci_fail(err, LOCI_E_NOMEM, "no memory for an attention step");
    shared->call = calls[0];
    shared->call.rows = count;
    for (uint32_t i = 0; i < count; i++) {
        step *s = calloc(1, sizeof *s);
        if (!s) {
            if (i == 0) free(shared);
            return loci_fail(err, LOCI_E_NOMEM, "no memory for an attention step");
        }
        s->shared = shared;
        s->row = i;
        s->dense_reads = true;
        atomic_fetch_add(&shared->sharers, 1);
        loci_attend_keep(ctx[i], s);
    }
    return LOCI_OK;
}

/* As many moves as are asked for, LOCI_MOVES_MAX at a time. */
typedef struct move_list {
    const loci_backend_ops *ops;
    loci_stream *stream;
    loci_move moves[LOCI_MOVES_MAX];
    uint32_t count;
} move_list;

static void flush(move_list *list) {
    if (list->count > 0) list->ops->move(list->stream, list->moves, list->count);
    list->count = 0;
}

static void move(move_list *list, loci_ref to, loci_ref from, size_t bytes) {
    list->moves[list->count++] = (loci_move){to, from, NULL, bytes};
    if (list->count == LOCI_MOVES_MAX) flush(list);
}

static bool same_place(loci_ref a, loci_ref b) {
    return a.buffer == b.buffer && a.offset == b.offset;
}

/* Whether the calls' rows follow each other in the pass. */
static bool neighbours(const loci_attend_call *calls, uint32_t count) {
    const loci_attend_call *first = calls;
    for (uint32_t i = 1; i < count; i++)
        if (!same_place(calls[i].q, loci_ref_row(first->q, i, first->q_stride)) ||
            !same_place(calls[i].out, loci_ref_row(first->out, i, first->out_stride)) ||
            !same_place(calls[i].lse, loci_ref_row(first->lse, i, first->q_heads)))
            return false;
    return true;
}

/* Copies what the calls bring, and has the step use that. */
static void gather(const loci_attend_call *calls, uint32_t count, const places *at, step *s,
                   const loci_backend_ops *ops) {
    size_t heads = s->call.q_heads, values = heads * s->call.head_dim;
    move_list list = {.ops = ops, .stream = s->call.stream};
    for (uint32_t i = 0; i < count; i++) {
        move(&list, loci_ref_row(at->q, i, values), calls[i].q, values * sizeof(float));
        move(&list, loci_ref_row(at->out, i, values), calls[i].out, values * sizeof(float));
        move(&list, loci_ref_row(at->lse, i, heads), calls[i].lse, heads * sizeof(float));
    }
    flush(&list);
    s->call.q = at->q;
    s->call.out = at->out;
    s->call.lse = at->lse;
    s->call.q_stride = s->call.out_stride = (uint32_t)values;
}

static void put_back(const loci_attend_call *calls, uint32_t count, const step *s,
                     const loci_backend_ops *ops) {
    size_t heads = s->call.q_heads, values = heads * s->call.head_dim;
    move_list list = {.ops = ops, .stream = s->call.stream};
    for (uint32_t i = 0; i < count; i++) {
        move(&list, calls[i].out, loci_ref_row(s->call.out, i, values), values * sizeof(float));
        move(&list, calls[i].lse, loci_ref_row(s->call.lse, i, heads), heads * sizeof(float));
    }
    flush(&list);
}

/* What attribution and figures tell. */
static void tell(void *const *ctx, const loci_query *first, step *s) {
    const loci_backend_ops *ops = first->engine->backend->ops;
    loci_stream *stream = s->call.stream;
    size_t count = (size_t)s->call.rows * s->call.q_heads, bytes = count * sizeof(float);
    loci_ref mass[LOCI_GEMM_FEW_ROWS] = {0};
    bool wanted = false;
    for (uint32_t i = 0; i < s->call.rows; i++) {
        const loci_query *query = ctx[i];
        mass[i] = loci_ref_at(query->slot->mass, 0);
        wanted = wanted || query->slot->mass;
    }
    if (wanted) ops->attribute_each(stream, s->lookup, s->call.lse, mass);
    ops->lookup_stats(stream, s->lookup, &s->stats);
    const loci_move moves[] = {{{0}, s->call.lse, s->host + count, bytes},
                               {{0}, s->sink_lse, s->host, bytes}};
    ops->move(stream, moves, loci_attend_sinks(first) > 0 ? 2 : 1);
}

static loci_status reach(void *const *ctx, const loci_attend_call *calls, uint32_t count,
                         loci_error *err) {
    const loci_query *first = ctx[0];
    loci_engine *engine = first->engine;
    loci_company *company = &engine->company[calls[0].group];
    places at;
    LOCI_ASSERT(count <= LOCI_GEMM_FEW_ROWS);
    LOCI_TRY(open_company(engine, &calls[0], company, &at, err));
    step *s;
    LOCI_TRY(open_shared(ctx, calls, count, &s, err));
    s->lookup = company->lookup;
    s->params = loci_attend_params(first, &s->call);
    s->params.mode = LOCI_MODE_DENSE;
    s->params.each = true;
    s->out = at.part;
    s->lse = at.part_lse;
    s->sink_lse = at.sink_lse;
    s->scale = calls[0].scale / first->settings.attn_temperature;
    bool gathered = !neighbours(calls, count);
    if (gathered) gather(calls, count, &at, s, engine->backend->ops);
    s->all = s->call.out;
    s->all_lse = s->call.lse;
    s->all_stride = s->call.out_stride;
    loci_attend_enqueue(first, s);
    tell(ctx, first, s);
    if (gathered) put_back(calls, count, s, engine->backend->ops);
    return LOCI_OK;
}

const loci_attend_together loci_corpus_together = {choose, reach};
