/* SPDX-License-Identifier: Apache-2.0
 *
 * Passage ranking by late interaction in the ranking layer, in two stages as in ColBERT's PLAID
 * (arXiv 2205.09707): candidates from the centroid look-up, then the score of each from the
 * position-order codes. Small corpora are scored whole. A lexical score (lexical.c) adds candidates
 * of its own and joins in the score of all:
 *
 *   rank score = late interaction + LEXICAL_WEIGHT * lexical_percent / 100 * BM25
 *
 * Both are sums over the question's words of differences of log-probabilities, so one weight serves
 * short and long questions in any corpus.
 */
#include <stdlib.h>
#include <string.h>

#include "services/engine/query.h"

#define CANDIDATES 64u
#define LEXICAL_WEIGHT 3.0      /* attention/README.md says how it was chosen */
#define SCORE_ALL_SEGMENTS 256u /* up to here every segment is a candidate */

typedef struct rank_state {
    loci_query *query;
    loci_ranked *out;
    uint32_t limit;
    uint32_t *count;
    float *lexical; /* [segments]; NULL = off */
    double words;   /* the most that lexical can be; 0 when the question has no words */
} rank_state;

/* Adds the candidates that only their words speak for. */
static void add_lexical(const rank_state *state, uint32_t limit, uint32_t *segments,
                        uint32_t *count) {
    uint32_t found[LOCI_RETRIEVE_MAX], known = *count;
    if (!state->lexical) return;
    uint32_t more = loci_lexical_best(state->lexical,
                                      loci_snapshot_segments(state->query->snapshot), limit, found);
    for (uint32_t i = 0; i < more; i++) {
        uint32_t at = 0;
        while (at < known && segments[at] != found[i]) at++;
        if (at == known) segments[(*count)++] = found[i];
    }
}

static loci_status list_candidates(rank_state *state, const loci_attend_call *call, loci_ref lse,
                                   uint32_t *segments, uint32_t *count, loci_error *err) {
    loci_query *query = state->query;
    const loci_backend_ops *ops = query->engine->backend->ops;
    uint32_t total = loci_snapshot_segments(query->snapshot);
    if (query->view->live_segments <= SCORE_ALL_SEGMENTS) {
        *count = 0;
        for (uint32_t s = 0; s < total; s++) {
            if (loci_snapshot_segment_live(query->snapshot, s)) segments[(*count)++] = s;
        }
        return LOCI_OK;
    }
    loci_lookup *lookup = query->slot->lookup;
    loci_lookup_stats stats;
    loci_select_params params = query->params;
    loci_select_reach(&params, LOCI_REACH_RANKING);
    params.candidates_max = 0; /* of all rows, whose masses are compared */
    loci_ref q = call->q;
    q.offset += (size_t)call->q_stride * sizeof(float); /* the question's tokens, not <q> */
    lse.offset += (size_t)call->q_heads * sizeof(float);
    ops->lookup_begin(call->stream, lookup, query->view, call->retrieval_index, q, call->q_stride,
                      (uint32_t)query->question.count, call->q_heads, call->scale, lse, &params);
    ops->score_nodes(call->stream, lookup);
    ops->score_codes(call->stream, lookup);
    uint32_t limit = state->limit > CANDIDATES ? state->limit : CANDIDATES;
    ops->lookup_candidates(call->stream, lookup, limit, segments, count);
    ops->lookup_stats(call->stream, lookup, &stats);
    LOCI_TRY(loci_query_settle(query, call->stream, err));
    uint64_t bytes = stats.root_bytes + stats.leaf_bytes + stats.code_bytes;
    query->usage.index_read_bytes += bytes;
    query->usage.fetched_bytes += bytes;
    query->usage.kv_dense_bytes += stats.dense_kv_bytes;
    add_lexical(state, limit, segments, count);
    return LOCI_OK;
}

/* What score_segments reads: codes of extents, keys of flat segments. */
static loci_status count_reads(loci_query *query, const uint32_t *segments, uint32_t count,
                               loci_error *err) {
    const loci_corpus_view *view = query->view;
    for (uint32_t i = 0; i < count; i++) {
        loci_segment_info info;
        LOCI_TRY(loci_snapshot_segment(query->snapshot, segments[i], &info, err));
        uint64_t values = (uint64_t)info.tokens * view->kv_heads * view->head_dim;
        bool flat = segments[i] >= view->flat_segment_base;
        query->usage.index_read_bytes += flat ? 0 : values / 2;
        query->usage.kv_read_bytes += flat ? 2 * values : 0;
        query->usage.fetched_bytes += flat ? 0 : values / 2;
    }
    return LOCI_OK;
}

static int by_score(const void *a, const void *b) {
    const loci_ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static loci_status score_candidates(rank_state *state, const loci_attend_call *call,
                                    loci_buffer *scores_buffer, const uint32_t *segments,
                                    uint32_t count, loci_error *err) {
    loci_query *query = state->query;
    const loci_backend_ops *ops = query->engine->backend->ops;
    float *scores = malloc(((size_t)count + 1) * sizeof *scores);
    loci_ranked *all = malloc(((size_t)count + 1) * sizeof *all);
    loci_status status = LOCI_OK;
    if (!scores || !all) status = loci_fail(err, LOCI_E_NOMEM, "no memory to rank passages");
    if (status == LOCI_OK) {
        loci_ref q = call->q, at = loci_ref_at(scores_buffer, 0);
        q.offset += (size_t)call->q_stride * sizeof(float);
        ops->score_segments(call->stream, query->view, call->retrieval_index, q, call->q_stride,
                            (uint32_t)query->question.count, call->q_heads, call->scale, segments,
                            count, at);
        ops->download(call->stream, scores, at, count * sizeof *scores);
        status = loci_query_settle(query, call->stream, err);
    }
    if (status == LOCI_OK) status = count_reads(query, segments, count, err);
    if (status == LOCI_OK) {
        double weight = LEXICAL_WEIGHT * query->engine->lexical_percent / 100;
        for (uint32_t i = 0; i < count; i++) {
            double words = state->lexical ? (double)state->lexical[segments[i]] : 0;
            all[i] = (loci_ranked){.segment = segments[i],
                                   .score = (double)scores[i] + weight * words,
                                   .words = state->words > 0 ? words / state->words : -1};
        }
        qsort(all, count, sizeof *all, by_score);
        *state->count = count < state->limit ? count : state->limit;
        memcpy(state->out, all, *state->count * sizeof *all);
    }
    free(scores);
    free(all);
    return status;
}

/* Called in the ranking layer; scores instead of attending. */
static loci_status rank_hook(void *ctx, const loci_attend_call *call, loci_error *err) {
    rank_state *state = ctx;
    loci_query *query = state->query;
    if (call->retrieval_index != query->engine->geometry.ranking_layer) return LOCI_OK;
    loci_backend *backend = query->engine->backend;
    size_t room = SCORE_ALL_SEGMENTS + LOCI_RETRIEVE_MAX;
    if (loci_snapshot_segments(query->snapshot) > room)
        room = loci_snapshot_segments(query->snapshot);
    uint32_t *segments = malloc(room * sizeof *segments), count = 0;
    loci_buffer *scores = NULL;
    loci_status status;
    if (!segments) return loci_fail(err, LOCI_E_NOMEM, "no memory to rank passages");
    LOCI_TRY_GOTO(backend->ops->alloc(backend, room * sizeof(float), &scores, err), out);
    LOCI_TRY_GOTO(list_candidates(state, call, call->lse, segments, &count, err), out);
    if (count > 0) LOCI_TRY_GOTO(score_candidates(state, call, scores, segments, count, err), out);
out:
    backend->ops->free(backend, scores);
    free(segments);
    return status;
}

loci_status loci_query_rank(loci_query *query, uint32_t limit, loci_ranked *out, uint32_t *count,
                            loci_error *err) {
    rank_state state = {.query = query, .out = out, .limit = limit, .count = count};
    uint64_t begun = loci_now_ns();
    *count = 0;
    if (query->view->live_segments == 0) return LOCI_OK;
    loci_tokens prompt = {0};
    loci_sequence *sequence = query->slot->sequence;
    loci_status status;
    if (query->engine->lexical_percent > 0) {
        state.lexical = malloc(loci_snapshot_segments(query->snapshot) * sizeof *state.lexical);
        if (!state.lexical) {
            status = loci_fail(err, LOCI_E_NOMEM, "no memory to rank passages");
            goto out;
        }
        LOCI_TRY_GOTO(loci_query_lexical(query, state.lexical, &state.words, err), out);
    }
    LOCI_TRY_GOTO(loci_query_prompt(query, &prompt, err), out);
    loci_sequence_reset(sequence);
    loci_sequence_jump(sequence, query->start);
    loci_sequence_set_attend(sequence, rank_hook, NULL, &state);
    status = loci_sequence_append(sequence, prompt.ids, (uint32_t)prompt.count, 0,
                                  (int)query->engine->geometry.ranking_layer, query->cancel, err);
    loci_sequence_set_attend(sequence, NULL, NULL, NULL);
out:
    loci_tokens_fini(&prompt);
    free(state.lexical);
    query->usage.lookup_ms += (double)(loci_now_ns() - begun) / 1e6;
    return status;
}
