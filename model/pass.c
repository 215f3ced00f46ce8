/* SPDX-License-Identifier: Apache-2.0
 *
 * One forward pass over chunks of one or several sequences; see sequence.h.
 *
 * Who fails or is cancelled is left out of attention from that layer on. The rows run on, since
 * taking them out would move the others; they touch nobody else's.
 *
 * Nothing here waits before the end. Where there are several members, each member's stream waits
 * for the pass's in a retrieval layer, and the pass's for all of theirs. Members that are reached
 * together (loci_attend_together) have one stream of the batch in their place, by the set that they
 * are: what fails there is found at the end, and theirs alone. Where they are all of the pass they
 * have the pass's own, and no stream waits for another.
 */
#include "model/sequence.h"

static bool in_pass(const loci_sequence *s) {
    return s->step.status == LOCI_OK;
}

static bool anybody_left(const loci_pass *p) {
    for (uint32_t i = 0; i < p->count; i++)
        if (in_pass(p->member[i])) return true;
    return false;
}

static void drop_cancelled(loci_pass *p, uint32_t layer) {
    for (uint32_t i = 0; i < p->count; i++) {
        loci_step *step = &p->member[i]->step;
        loci_status cancelled = loci_cancel_check(step->cancel);
        if (step->status == LOCI_OK && cancelled != LOCI_OK)
            step->status = loci_fail(&step->error, cancelled,
                                     "the forward pass was stopped in layer %u of %u: %s", layer,
                                     p->decoder.model->config.layers, loci_status_text(cancelled));
    }
}

/* The new keys and values of all rows join their caches, which are one buffer. */
static void keep_keys(const loci_pass *p, uint32_t layer) {
    const loci_model_config *c = &p->decoder.model->config;
    p->decoder.model->backend->ops->scatter(
        p->decoder.stream, loci_cache_at(p->member[0], layer, 0), loci_cache_width(c),
        p->decoder.scratch->places, loci_decoder_heads(&p->decoder, c->q_heads),
        loci_decoder_qkv_width(c), p->decoder.rows, loci_cache_width(c));
}

static float scale_of(const loci_sequence *s, uint32_t layer) {
    return s->model->config.layer[layer].retrieval ? s->attention_scale : 1;
}

/* The own attention of members [first, end), which have the same scale. */
static void attend_own(const loci_pass *p, uint32_t first, uint32_t end, uint32_t layer) {
    const loci_sequence *s = p->member[first];
    const loci_model_config *c = &s->model->config;
    loci_attend_dense *args = &s->attention[layer];
    *args = loci_decoder_attention(&p->decoder, layer);
    args->k = args->v = loci_cache_at(s, layer, p->count == 1 ? s->cache_row : 0);
    args->v.offset += loci_cache_width(c) / 2 * sizeof(float);
    args->kv_stride = loci_cache_width(c);
    args->kv_dtype = LOCI_F32;
    args->scale *= scale_of(s, layer);
    args->spans = &p->span[first];
    args->span_count = end - first;
    if (c->layer[layer].retrieval) args->lse = loci_ref_at(p->member[0]->lse, 0);
    s->model->backend->ops->attend_dense(p->decoder.stream, args);
}

static loci_attend_call call_of(const loci_pass *p, const loci_sequence *s) {
    const loci_step *step = &s->step;
    uint32_t layer = s->model->config.retrieval_layer[step->retrieval];
    loci_attend_dense own = loci_decoder_attention(&p->decoder, layer);
    return (loci_attend_call){
        .stream = s->stream,
        .retrieval_index = step->retrieval,
        .rows = step->rows,
        .row_position = s->length,
        .in_company = p->count > 1,
        .q_heads = own.q_heads,
        .head_dim = own.head_dim,
        .q = loci_ref_row(own.q, step->row, own.q_stride),
        .q_stride = own.q_stride,
        .scale = own.scale * scale_of(s, layer),
        .precision = own.precision,
        .out = loci_ref_row(own.out, step->row, own.out_stride),
        .out_stride = own.out_stride,
        .lse = loci_ref_row(loci_ref_at(p->member[0]->lse, 0), step->row, own.q_heads),
    };
}

/* --- Groups ------------------------------------------------------------------------------------
 */

/* What callbacks for several members are given, and which members these are. */
typedef struct callers {
    void *ctx[LOCI_PASS_MEMBERS];
    loci_attend_call call[LOCI_PASS_MEMBERS];
    uint32_t member[LOCI_PASS_MEMBERS], count;
} callers;

static callers callers_of(const loci_pass *p, uint32_t set) {
    callers c = {0};
    for (uint32_t left = set; left; left &= left - 1) {
        uint32_t i = (uint32_t)__builtin_ctz(left);
        c.ctx[c.count] = p->member[i]->attend_ctx;
        c.call[c.count] = call_of(p, p->member[i]);
        c.member[c.count++] = i;
    }
    return c;
}

/* Whether these are all members of the pass. */
static bool are_all(const loci_pass *p, uint32_t members) {
    return members == (1u << p->count) - 1;
}

/* The number of such a group, which is new or was there in a layer before; LOCI_ATTEND_GROUPS: the
 * pass has too many. */
static uint32_t group_of(loci_pass *p, uint32_t members) {
    for (uint32_t g = 0; g < p->group_count; g++)
        if (p->group[g] == members) return g;
    uint32_t g = p->group_count;
    if (g == LOCI_ATTEND_GROUPS) return g;
    if (!are_all(p, members) && !loci_batch_group_stream(p->batch, g)) return LOCI_ATTEND_GROUPS;
    p->group[p->group_count++] = members;
    return g;
}

/* Who of `left` is reached together with the first of them. */
static uint32_t choose(loci_pass *p, uint32_t left) {
    loci_sequence *first = p->member[__builtin_ctz(left)];
    uint32_t alone = left & -left, set = alone, members = alone;
    for (uint32_t i = 0; i < p->count; i++)
        if (left >> i & 1 && first->together && p->member[i]->together == first->together)
            set |= 1u << i;
    if (set == alone) return alone;
    callers c = callers_of(p, set);
    uint32_t chosen = first->together->choose(c.ctx, c.call, c.count);
    for (uint32_t i = 1; i < c.count; i++) members |= (chosen >> i & 1) << c.member[i];
    if (members == alone) return alone;
    first->step.group = group_of(p, members);
    return first->step.group < LOCI_ATTEND_GROUPS ? members : alone;
}

static loci_stream *stream_of(const loci_pass *p, const loci_sequence *s) {
    bool several = s->step.with & (s->step.with - 1);
    if (are_all(p, s->step.with)) return p->decoder.stream;
    return several ? loci_batch_group_stream(p->batch, s->step.group) : s->stream;
}

/* All that `first` is to reach the corpus for, itself among them; what fails, fails for all. */
static void reach_together(const loci_pass *p, loci_sequence *first, loci_stream *stream) {
    loci_error err = {0};
    callers c = callers_of(p, first->step.with);
    for (uint32_t i = 0; i < c.count; i++) {
        c.call[i].stream = stream;
        c.call[i].group = first->step.group;
    }
    loci_status status = first->together->reach(c.ctx, c.call, c.count, &err);
    for (uint32_t i = 0; i < c.count && status != LOCI_OK; i++) {
        p->member[c.member[i]]->step.status = status;
        p->member[c.member[i]]->step.error = err;
    }
}

void loci_pass_reach(const loci_pass *p, loci_sequence *s) {
    loci_step *step = &s->step;
    const loci_backend_ops *ops = s->model->backend->ops;
    loci_stream *stream = stream_of(p, s);
    bool apart = stream != p->decoder.stream && ops->mark;
    if (apart) ops->await(stream, p->decoder.stream);
    if (stream == s->stream) {
        loci_attend_call call = call_of(p, s);
        step->status = s->attend(s->attend_ctx, &call, &step->error);
    } else {
        reach_together(p, s, stream);
    }
    if (apart) ops->mark(stream);
}

/* All members that are left and have a callback. */
static void reach(loci_pass *p) {
    const loci_backend_ops *ops = p->decoder.model->backend->ops;
    uint32_t left = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        p->member[i]->step.with = 0;
        if (in_pass(p->member[i]) && p->member[i]->attend) left |= 1u << i;
    }
    while (left) {
        loci_sequence *first = p->member[__builtin_ctz(left)];
        first->step.with = choose(p, left);
        left &= ~first->step.with;
    }
    if (are_all(p, p->member[0]->step.with)) {
        loci_pass_reach(p, p->member[0]);
        return;
    }
    if (ops->mark) ops->mark(p->decoder.stream);
    loci_batch_reach(p);
    for (uint32_t i = 0; i < p->count && ops->mark; i++)
        if (p->member[i]->step.with) ops->await(p->decoder.stream, stream_of(p, p->member[i]));
}

/* What failed on a group's own stream is a failure of its members. */
static void settle_groups(const loci_pass *p) {
    for (uint32_t g = 0; g < p->group_count; g++) {
        loci_error err = {0};
        if (are_all(p, p->group[g])) continue;
        loci_status status =
            p->decoder.model->backend->ops->sync(loci_batch_group_stream(p->batch, g), &err);
        for (uint32_t i = 0; i < p->count && status != LOCI_OK; i++) {
            loci_step *step = &p->member[i]->step;
            if (!(p->group[g] >> i & 1) || step->status != LOCI_OK) continue;
            step->status = status;
            step->error = err;
        }
    }
}

static loci_status attend(void *ctx, uint32_t layer, bool *stop, loci_error *err) {
    loci_pass *p = ctx;
    (void)err;
    const loci_model_config *c = &p->decoder.model->config;
    bool reaches = false;
    drop_cancelled(p, layer);
    keep_keys(p, layer);
    for (uint32_t i = 0, end; i < p->count; i = end) {
        const loci_sequence *s = p->member[i];
        for (end = i + 1; end < p->count && in_pass(s); end++)
            if (!in_pass(p->member[end]) || scale_of(p->member[end], layer) != scale_of(s, layer))
                break;
        if (in_pass(s)) attend_own(p, i, end, layer);
        for (uint32_t j = i; j < end; j++) reaches |= in_pass(p->member[j]) && p->member[j]->attend;
    }
    if (c->layer[layer].retrieval) {
        uint32_t retrieval = loci_retrieval_index(c, layer);
        for (uint32_t i = 0; i < p->count; i++) p->member[i]->step.retrieval = retrieval;
        if (reaches) reach(p);
        *stop = p->member[0]->step.stop_after == (int)retrieval;
    }
    return anybody_left(p) ? LOCI_OK : LOCI_E_CANCELLED; /* each knows why */
}

/* Logits that are wanted of neighbouring rows are one product while these are few: the vocabulary
 * is the largest weight. */
static void put_logits(const loci_pass *p) {
    const loci_backend_ops *ops = p->decoder.model->backend->ops;
    size_t row_bytes = (size_t)p->decoder.model->config.vocab * sizeof(float);
    uint32_t most = 0;
    loci_ref shared = {NULL, 0};
    if (p->count > 1) shared = loci_batch_logits(p->batch, &most);
    for (uint32_t i = 0, next; i < p->count; i = next) {
        const loci_step *step = &p->member[i]->step;
        uint32_t count = step->logits_rows, begin = step->row + step->rows - count;
        for (next = i + 1; count > 0 && next < p->count; next++) {
            const loci_step *more = &p->member[next]->step;
            if (more->logits_rows != more->rows || count + more->rows > most) break;
            count += more->rows;
        }
        if (count == 0) continue;
        loci_ref own = loci_ref_at(p->member[i]->logits, step->logits_at * row_bytes);
        bool joint = next > i + 1;
        loci_ref from = joint ? shared : own;
        loci_decoder_logits(&p->decoder, begin, count, from);
        for (uint32_t j = i; joint && j < next; j++) {
            const loci_step *to = &p->member[j]->step;
            size_t bytes = to->logits_rows * row_bytes;
            ops->copy(p->decoder.stream,
                      loci_ref_at(p->member[j]->logits, to->logits_at * row_bytes), from, bytes);
            from.offset += bytes;
        }
    }
}

/* Ids, positions and places of all rows, one chunk after another, in one upload. */
static void upload_rows(loci_pass *p) {
    const loci_decoder_scratch *to = p->decoder.scratch;
    size_t apart = (to->positions.offset - to->ids.offset) / sizeof(int32_t);
    int32_t ids[3 * LOCI_CHUNK_ROWS] = {0}, *positions = ids + apart, *places = positions + apart;
    LOCI_ASSERT(apart <= LOCI_CHUNK_ROWS &&
                to->places.offset - to->positions.offset == apart * sizeof *ids);
    p->decoder.rows = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        loci_sequence *s = p->member[i];
        loci_step *step = &s->step;
        step->row = p->decoder.rows;
        /* Alone its keys are counted from its own first one: some backends prepare all before. */
        p->span[i] = (loci_attend_span){step->row, step->rows, p->count == 1 ? 0 : s->cache_row,
                                        s->length + step->rows};
        LOCI_ASSERT(step->rows <= to->rows - step->row);
        for (uint32_t r = 0; r < step->rows; r++) {
            ids[step->row + r] = (int32_t)step->tokens[r];
            positions[step->row + r] = (int32_t)(s->skipped + s->length + r);
            places[step->row + r] = (int32_t)(s->cache_row + s->length + r);
        }
        p->decoder.rows += step->rows;
    }
    p->decoder.model->backend->ops->upload(p->decoder.stream, to->ids, ids,
                                           (2 * apart + p->decoder.rows) * sizeof *ids);
}

void loci_pass_run(loci_pass *p) {
    loci_sequence *leader = p->member[0];
    loci_error err = {0};
    loci_stream *stream = p->count > 1 ? loci_batch_stream(p->batch) : leader->stream;
    p->decoder = (loci_decoder_pass){.model = leader->model,
                                     .stream = stream,
                                     .scratch = &leader->scratch,
                                     .attend = attend,
                                     .ctx = p};
    upload_rows(p);
    loci_status status = loci_decoder_run(&p->decoder, &err);
    if (status == LOCI_OK) put_logits(p);
    status = loci_decoder_finish(&p->decoder, status, &err);
    settle_groups(p);
    for (uint32_t i = 0; i < p->count; i++) {
        loci_sequence *s = p->member[i];
        if (in_pass(s) && status != LOCI_OK) {
            s->step.status = status;
            s->step.error = err;
        }
    }
}
