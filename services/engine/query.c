/* SPDX-License-Identifier: Apache-2.0
 *
 * Admission of questions and what they hold; see query.h.
 */
#include "services/engine/query.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

/* What ranking and attribution keep of each segment: its number, scores, masses. */
#define SEGMENT_BYTES 24u
/* Reach of other models than the one that the rates were measured on. With a budget no more is
 * wanted than the best `budget` tokens (attention/README.md has the figures). */
#define STOCK_REACH 3.0f
#define BUDGET_ROOTS 1.5f          /* of the roots */
#define BUDGET_CANDIDATES 4.0f     /* by the square root of the corpus, */
#define BUDGET_LEAVES 0.5f         /* but no more for each token of the budget, */
#define BUDGET_CANDIDATE_MAX 1.25f /* and no more tokens for each */

static loci_slot *find_free(loci_engine *engine) {
    for (unsigned i = 0; i < engine->slot_count; i++) {
        if (!engine->slots[i].busy) return &engine->slots[i];
    }
    return NULL;
}

/* Waits for a slot, looking at the cancel flag every 20 ms. */
static loci_status take_slot(loci_engine *engine, const loci_cancel *cancel, loci_slot **out,
                             loci_error *err) {
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&engine->lock);
    loci_slot *slot = find_free(engine);
    if (!slot && engine->waiting >= engine->waiting_max) {
        status =
            loci_fail_reason(err, LOCI_E_LIMIT, "TOO_MANY_QUESTIONS",
                             "%u questions are waiting already; try again later", engine->waiting);
    } else {
        engine->waiting++;
        while (!(slot = find_free(engine)) && status == LOCI_OK) {
            struct timespec until = loci_moment_in(CLOCK_REALTIME, 20);
            pthread_cond_timedwait(&engine->slot_free, &engine->lock, &until);
            status = loci_cancel_check(cancel);
        }
        engine->waiting--;
        if (status == LOCI_OK) slot->busy = true;
        if (status == LOCI_OK) slot->serial++;
    }
    pthread_mutex_unlock(&engine->lock);
    *out = status == LOCI_OK ? slot : NULL;
    if (status == LOCI_E_CANCELLED || status == LOCI_E_TIMEOUT)
        return loci_fail(err, status, "the question ended while it waited for its turn");
    return status;
}

static void give_slot(loci_engine *engine, loci_slot *slot) {
    engine->backend->ops->free(engine->backend, slot->mass);
    slot->mass = NULL;
    pthread_mutex_lock(&engine->lock);
    slot->busy = false;
    pthread_cond_signal(&engine->slot_free);
    pthread_mutex_unlock(&engine->lock);
}

static loci_status tokenize_question(loci_query *query, const char *question, loci_error *err) {
    loci_slice text = loci_slice_text(question);
    loci_buf normal = LOCI_BUF_INIT;
    loci_passage_text(text, &normal);
    loci_status status = loci_buf_status(&normal);
    if (status == LOCI_OK && normal.len <= 1)
        status = loci_fail_reason(err, LOCI_E_INVAL, "EMPTY_QUESTION", "the question is empty");
    if (status == LOCI_OK)
        status = loci_tokenizer_encode(loci_model_tokenizer(query->engine->model),
                                       loci_slice_of(normal.data, normal.len), false,
                                       &query->question, err);
    if (status == LOCI_OK && query->question.count > LOCI_QUESTION_TOKENS_MAX)
        status = loci_fail_reason(err, LOCI_E_INVAL, "QUESTION_TOO_LONG",
                                  "the question has %zu tokens; at most %u are allowed",
                                  query->question.count, LOCI_QUESTION_TOKENS_MAX);
    loci_buf_fini(&normal);
    return status;
}

loci_status loci_query_reserve(loci_query *query, uint64_t bytes, const char *what,
                               loci_error *err) {
    LOCI_TRY(loci_budget_take(query->engine->budget, LOCI_MEMORY_LOOKUPS, bytes, what, err));
    query->reserved += bytes;
    return LOCI_OK;
}

void loci_query_give_back(loci_query *query, uint64_t bytes) {
    LOCI_ASSERT(bytes <= query->reserved);
    loci_budget_give(query->engine->budget, LOCI_MEMORY_LOOKUPS, bytes);
    query->reserved -= bytes;
}

/* The one whose model encoded the corpus. */
static loci_status choose_engine(loci_engine *engine, const char *corpus, loci_engine **out,
                                 loci_error *err) {
    loci_corpus_info info;
    LOCI_TRY(loci_corpus_get(engine->store, corpus, &info, err));
    *out = engine;
    if (engine->also && strcmp(info.geometry.fingerprint, engine->also->geometry.fingerprint) == 0)
        *out = engine->also;
    return loci_corpus_check_model(&info, (*out)->geometry.fingerprint, err);
}

static loci_status open_snapshot(loci_query *query, const char *corpus, uint64_t min_revision,
                                 const loci_cancel *cancel, loci_error *err) {
    loci_engine *engine = query->engine;
    /* First the turn, then the snapshot: whoever waits pins nothing. */
    LOCI_TRY(take_slot(engine, cancel, &query->slot, err));
    LOCI_TRY(loci_snapshot_acquire(engine->store, corpus, &query->snapshot, err));
    const loci_corpus_info *info = loci_snapshot_info(query->snapshot);
    if (strcmp(info->geometry.fingerprint, engine->geometry.fingerprint) != 0)
        return loci_fail(err, LOCI_E_ABORTED, "corpus %s was reindexed meanwhile: ask again",
                         corpus);
    if (info->revision < min_revision)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "REVISION_NOT_REACHED",
                                "corpus %s is at revision %llu, %llu was asked for", corpus,
                                (unsigned long long)info->revision,
                                (unsigned long long)min_revision);
    query->view = loci_snapshot_view(query->snapshot);
    loci_query_reach(query, false);
    query->settings = info->settings;
    query->causal = info->geometry.causal;
    query->start = query->causal ? loci_snapshot_end(query->snapshot) : engine->question_start;
    query->evidence_from = 1; /* not <q> itself */
    query->usage.corpus_tokens = query->view->tokens;
    query->usage.question_tokens = query->question.count;
    loci_sequence_reset(query->slot->sequence);
    loci_sequence_set_attend(query->slot->sequence, NULL, NULL, NULL);
    char what[64];
    snprintf(what, sizeof what, "a question to %llu tokens",
             (unsigned long long)query->view->tokens);
    LOCI_TRY(loci_query_reserve(
        query, SEGMENT_BYTES * (uint64_t)loci_snapshot_segments(query->snapshot), what, err));
    if (query->slot->lookup) return LOCI_OK;
    return engine->backend->ops->lookup_create(engine->backend, &query->slot->lookup, err);
}

loci_status loci_query_settle(const loci_query *query, loci_stream *stream, loci_error *err) {
    loci_status status = query->engine->backend->ops->sync(stream, err);
    LOCI_TRY(loci_snapshot_check(query->snapshot, err));
    return status;
}

loci_status loci_query_init(loci_query *query, loci_engine *engine, const char *corpus,
                            const char *question, uint64_t min_revision, const loci_cancel *cancel,
                            loci_error *err) {
    loci_status status = LOCI_E_ABORTED;
    *query = (loci_query){.engine = engine};
    /* Once more when the corpus was reindexed between the look and the snapshot. */
    for (int attempt = 0; status == LOCI_E_ABORTED && attempt < 2; attempt++) {
        loci_query_fini(query);
        *query = (loci_query){
            .engine = engine, .cancel = cancel, .text = question, .started_ns = loci_now_ns()};
        LOCI_TRY(choose_engine(engine, corpus, &query->engine, err));
        loci_select_defaults(&query->params);
        LOCI_TRY(tokenize_question(query, question, err));
        status = open_snapshot(query, corpus, min_revision, cancel, err);
    }
    return status;
}

void loci_query_fini(loci_query *query) {
    if (query->slot) give_slot(query->engine, query->slot);
    loci_snapshot_release(query->snapshot);
    loci_budget_give(query->engine->budget, LOCI_MEMORY_LOOKUPS, query->reserved);
    loci_tokens_fini(&query->question);
    *query = (loci_query){0};
}

float loci_query_attention_scale(const loci_query *query) {
    return loci_model_attention_scale(loci_model_config_of(query->engine->model),
                                      query->view->tokens);
}

float loci_query_corpus_scale(const loci_query *query) {
    return loci_query_attention_scale(query) / query->settings.attn_temperature;
}

void loci_query_reach(loci_query *query, bool question) {
    loci_select_reach(&query->params, question ? LOCI_REACH_QUESTION : LOCI_REACH_ANSWER);
    /* The rates were measured on a model whose attention was trained to be narrow. */
    bool stock = loci_model_config_of(query->engine->model)->attention_scale_tokens == 0;
    loci_select_params *params = &query->params;
    params->candidates_max = 0;
    if (stock && params->budget > 0) {
        float budget = (float)params->budget;
        float root = sqrtf(fmaxf((float)query->view->tokens, 1.0f));
        params->roots *= BUDGET_ROOTS;
        params->candidates = fminf(BUDGET_CANDIDATES, BUDGET_LEAVES * budget / root);
        params->candidates_max = (uint32_t)fminf(ceilf(BUDGET_CANDIDATE_MAX * budget), 4e9f);
    } else if (stock) {
        params->roots *= STOCK_REACH;
        params->candidates *= STOCK_REACH;
    }
    memcpy(query->params.squeezed_threshold, query->squeezed[question ? 0 : 1],
           sizeof query->params.squeezed_threshold);
}

double loci_query_elapsed_ms(const loci_query *query) {
    return (double)(loci_now_ns() - query->started_ns) / 1e6;
}

loci_status loci_query_prompt(const loci_query *query, loci_tokens *out, loci_error *err) {
    const loci_special_tokens *special = loci_model_specials(query->engine->model);
    bool stock = query->engine->stock;
    loci_status status = loci_tokens_push(out, stock ? special->begin : special->question, 0);
    for (size_t i = 0; i < query->question.count && status == LOCI_OK; i++)
        status = loci_tokens_push(out, query->question.ids[i], 0);
    if (!stock && status == LOCI_OK) status = loci_tokens_push(out, special->answer, 0);
    return status == LOCI_OK ? LOCI_OK : loci_fail(err, status, "no memory for the question");
}
