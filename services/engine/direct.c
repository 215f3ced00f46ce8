/* SPDX-License-Identifier: Apache-2.0
 *
 * Answering through the corpus's attention alone: the question and each token of the answer
 * attend to the corpus in every retrieval layer.
 */
#include <stdlib.h>

#include "services/engine/query.h"

/* The passages with most attention so far; "" while there is no answer. */
static loci_status load_evidence(loci_query *query, const loci_answer_request *request,
                                 const char *answer, loci_buf *bytes, loci_passage *passages,
                                 uint32_t *count, loci_error *err) {
    uint32_t limit = request->evidence_count ? request->evidence_count : 4;
    loci_ranked ranked[LOCI_EVIDENCE_MAX];
    bytes->len = 0;
    LOCI_TRY(loci_corpus_attend_best(query, limit, ranked, count, err));
    for (uint32_t i = 0; i < *count; i++)
        LOCI_TRY(loci_passage_load(query, &ranked[i], bytes, &passages[i], err));
    loci_passages_bind(passages, *count, bytes);
    loci_passages_cite(passages, *count, request->question, answer);
    return LOCI_OK;
}

/* What a stock model is told before the question looks at the corpus too, but evidence is what the
 * question and the answer look at. */
static loci_status ask_question(loci_query *query, loci_error *err) {
    loci_tokens prompt = {0};
    uint32_t head = 0;
    loci_sequence *sequence = query->slot->sequence;
    loci_sequence_reset(sequence);
    loci_sequence_jump(sequence, query->start);
    loci_sequence_set_attend(sequence, loci_corpus_attend, loci_corpus_attended, query);
    if (query->engine->backend->ops->attribute_each)
        loci_sequence_set_together(sequence, &loci_corpus_together);
    loci_sequence_scale_attention(sequence, loci_query_attention_scale(query));
    loci_query_reach(query, true);
    loci_status status;
    LOCI_TRY_GOTO(loci_corpus_attend_begin(query, err), out);
    if (query->engine->stock)
        LOCI_TRY_GOTO(loci_stock_prompt(query, NULL, 0, &prompt, &head, err), out);
    else
        LOCI_TRY_GOTO(loci_query_prompt(query, &prompt, err), out);
    if (head > 0) query->evidence_from = head;
    /* In mode squeezed rows of a pass share one set, which is to be the question's. */
    uint32_t from = query->params.mode == LOCI_MODE_SQUEEZED ? head : 0;
    if (from > 0)
        LOCI_TRY_GOTO(loci_sequence_append(sequence, prompt.ids, from, 0, -1, query->cancel, err),
                      out);
    status = loci_sequence_append(sequence, prompt.ids + from, (uint32_t)prompt.count - from, 1, -1,
                                  query->cancel, err);
out:
    loci_tokens_fini(&prompt);
    loci_query_reach(query, false);
    query->usage.question_read_bytes = query->step_bytes;
    query->step_bytes = 0;
    return status;
}

static loci_status finish(loci_query *query, const loci_generation *answer, loci_passage *passages,
                          uint32_t count, loci_event_fn on_event, void *ctx, loci_error *err) {
    query->usage.decode_read_bytes = query->step_bytes;
    query->usage.answer_tokens = answer->tokens;
    query->usage.total_ms = loci_query_elapsed_ms(query);
    loci_event event = {.kind = LOCI_EVENT_USAGE, .usage = &query->usage};
    LOCI_TRY(on_event(ctx, &event, err));
    bool found = answer->text.len > 0;
    const char *text = found ? (const char *)answer->text.data : "";
    bool verbatim = loci_passages_mark(passages, count, text);
    event = (loci_event){.kind = LOCI_EVENT_FINISHED,
                         .text = text,
                         .found = found,
                         .verbatim = verbatim,
                         .stop = found ? answer->stop : "not_found",
                         .passages = passages,
                         .passage_count = count};
    return on_event(ctx, &event, err);
}

loci_status loci_answer_direct(loci_query *query, const loci_answer_request *request,
                               loci_event_fn on_event, void *ctx, loci_error *err) {
    uint32_t count = 0;
    loci_passage passages[LOCI_EVIDENCE_MAX];
    loci_buf bytes = LOCI_BUF_INIT;
    loci_generation answer = {.text = LOCI_BUF_INIT};
    loci_status status;
    loci_event event = {.kind = LOCI_EVENT_PROGRESS, .stage = "question", .total = 1};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    LOCI_TRY_GOTO(ask_question(query, err), out);
    LOCI_TRY_GOTO(load_evidence(query, request, "", &bytes, passages, &count, err), out);
    event = (loci_event){.kind = LOCI_EVENT_EVIDENCE, .passages = passages, .passage_count = count};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    if (query->view->live_segments == 0) { /* nothing to answer from */
        status = finish(query, &answer, passages, 0, on_event, ctx, err);
        goto out;
    }
    LOCI_TRY_GOTO(loci_generate_streamed(query, request, &answer, on_event, ctx, err), out);
    const char *text = (const char *)answer.text.data;
    LOCI_TRY_GOTO(load_evidence(query, request, text, &bytes, passages, &count, err), out);
    status = finish(query, &answer, passages, count, on_event, ctx, err);
out:
    loci_buf_fini(&answer.text);
    loci_buf_fini(&bytes);
    return status;
}
