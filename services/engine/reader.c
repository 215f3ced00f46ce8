/* SPDX-License-Identifier: Apache-2.0
 *
 * Read twice (Just Read Twice, arXiv 2407.05483): the best passages are read again after the
 * question, one at a time and without the rest of the corpus. Which answer is given, and whether
 * there is one, is decided in belief.c.
 *
 * A stock model reads as many of the passages as there is room for in one prompt (prompt.c).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"
#include "services/engine/belief.h"
#include "services/engine/query.h"

static loci_status push_all(loci_tokens *out, const loci_tokens *tokens) {
    for (size_t i = 0; i < tokens->count; i++) LOCI_TRY(loci_tokens_push(out, tokens->ids[i], 0));
    return LOCI_OK;
}

/* <q> question <ev> passage <q> question <a> */
static loci_status reading_prompt(loci_query *query, const loci_passage *passage, loci_tokens *out,
                                  loci_error *err) {
    const loci_special_tokens *special = loci_model_specials(query->engine->model);
    loci_buf text = LOCI_BUF_INIT;
    loci_tokens words = {0};
    loci_status status;
    loci_passage_text(passage->passage, &text);
    LOCI_TRY_GOTO(loci_buf_status(&text), out);
    LOCI_TRY_GOTO(loci_tokenizer_encode(loci_model_tokenizer(query->engine->model),
                                        loci_slice_of(text.data, text.len), false, &words, err),
                  out);
    LOCI_TRY_GOTO(loci_tokens_push(out, special->question, 0), out);
    LOCI_TRY_GOTO(push_all(out, &query->question), out);
    LOCI_TRY_GOTO(loci_tokens_push(out, special->evidence, 0), out);
    LOCI_TRY_GOTO(push_all(out, &words), out);
    LOCI_TRY_GOTO(loci_tokens_push(out, special->question, 0), out);
    LOCI_TRY_GOTO(push_all(out, &query->question), out);
    LOCI_TRY_GOTO(loci_tokens_push(out, special->answer, 0), out);
out:
    loci_buf_fini(&text);
    loci_tokens_fini(&words);
    if (status != LOCI_OK && err && err->status == LOCI_OK)
        return loci_fail(err, status, "no memory to read a passage");
    return status;
}

/* The answer as it stands in the passage, its white space as single spaces: a name keeps its
 * capitals, a number its form. What is not literally there stays as it is. */
static loci_status take_literally(loci_passage *passage, const char *question, loci_buf *answer,
                                  loci_error *err) {
    const char *text = (const char *)answer->data;
    loci_passages_cite(passage, 1, question, text);
    if (answer->len == 0 || !loci_passage_mark(passage, text)) return LOCI_OK;
    loci_buf literal = LOCI_BUF_INIT;
    const uint8_t *data = passage->passage.data;
    for (uint64_t at = passage->answer_start; at < passage->answer_end; at++) {
        uint8_t byte = data[at - passage->passage_start];
        bool blank = byte == ' ' || (byte >= '\t' && byte <= '\r');
        if (!blank)
            loci_buf_u8(&literal, byte);
        else if (literal.len > 0 && literal.data[literal.len - 1] != ' ')
            loci_buf_u8(&literal, ' ');
    }
    if (!loci_buf_text(&literal) || !loci_utf8_valid(loci_slice_of(literal.data, literal.len))) {
        loci_status status = loci_buf_status(&literal);
        loci_buf_fini(&literal);
        return status == LOCI_OK ? LOCI_OK : loci_fail(err, status, "no memory for an answer");
    }
    loci_buf_fini(answer);
    *answer = literal;
    return LOCI_OK;
}

static loci_status read_passage(loci_query *query, const loci_answer_request *request,
                                loci_passage *passage, loci_generation *out, loci_error *err) {
    loci_sequence *sequence = query->slot->sequence;
    loci_tokens prompt = {0};
    loci_sequence_reset(sequence);
    loci_sequence_set_attend(sequence, NULL, NULL, NULL);
    loci_status status = reading_prompt(query, passage, &prompt, err);
    if (status == LOCI_OK)
        status = loci_sequence_append(sequence, prompt.ids, (uint32_t)prompt.count, 1, -1,
                                      query->cancel, err);
    loci_tokens_fini(&prompt);
    LOCI_TRY(status);
    LOCI_TRY(loci_generate(query, request, out, NULL, NULL, err));
    return take_literally(passage, request->question, &out->text, err);
}

static loci_status emit_candidate(const loci_generation *read, const loci_reading *reading,
                                  const char *question, loci_passage *passage,
                                  loci_event_fn on_event, void *ctx, loci_error *err) {
    const char *answer = (const char *)read->text.data;
    const char *cited = read->says_none ? "" : answer;
    loci_passages_cite(passage, 1, question, cited);
    (void)loci_passage_mark(passage, cited);
    loci_event event = {.kind = LOCI_EVENT_CANDIDATE,
                        .text = answer,
                        .found = !read->says_none,
                        .score = loci_reading_score(reading),
                        .reading = reading,
                        .passages = passage,
                        .passage_count = 1};
    return on_event(ctx, &event, err);
}

/* Shares among the passages read: softmax of the scores; the rest of the corpus was not read. */
static void share_scores(loci_passage *passages, const double *scores, uint32_t count) {
    double most = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    for (uint32_t i = 0; i < count; i++) sum += exp(scores[i] - most);
    for (uint32_t i = 0; i < count; i++) passages[i].share = exp(scores[i] - most) / sum;
}

static int by_share(const void *a, const void *b) {
    const loci_passage *x = a, *y = b;
    return x->share > y->share ? -1 : x->share < y->share;
}

static loci_status finish(loci_query *query, const char *question, const loci_generation *read,
                          const loci_reading *readings, loci_passage *passages, uint32_t count,
                          loci_event_fn on_event, void *ctx, loci_error *err) {
    bool found = count > 0 && loci_readings_belief(readings, count) >= 0;
    uint32_t best = count > 0 ? loci_readings_best(readings, count) : 0;
    double scores[LOCI_EVIDENCE_MAX];
    for (uint32_t i = 0; i < count; i++) scores[i] = loci_reading_score(&readings[i]);
    loci_usage *usage = &query->usage;
    usage->first_token_ms = usage->total_ms = loci_query_elapsed_ms(query);
    const char *text = "";
    if (count > 0 && found) {
        text = (const char *)read[best].text.data;
        usage->answer_tokens = read[best].tokens;
        loci_event delta = {.kind = LOCI_EVENT_DELTA, .text = text};
        LOCI_TRY(on_event(ctx, &delta, err));
    }
    /* Each for what was read there itself, if anything: different answers are not merged. */
    for (uint32_t i = 0; i < count; i++) {
        bool own = found && (i == best || !read[i].says_none);
        const char *cited = own ? (const char *)read[i].text.data : text;
        loci_passages_cite(&passages[i], 1, question, cited);
        if (!loci_passage_mark(&passages[i], cited) && !own) passages[i].answer = "";
    }
    bool verbatim = found && passages[best].answer_end > passages[best].answer_start;
    share_scores(passages, scores, count);
    if (count > 0) { /* the chosen passage first, then by share */
        loci_passage chosen = passages[best];
        passages[best] = passages[0];
        passages[0] = chosen;
        if (count > 1) qsort(passages + 1, count - 1, sizeof *passages, by_share);
    }
    loci_event event = {.kind = LOCI_EVENT_USAGE, .usage = usage};
    LOCI_TRY(on_event(ctx, &event, err));
    event = (loci_event){.kind = LOCI_EVENT_FINISHED,
                         .text = text,
                         .found = found,
                         .verbatim = verbatim,
                         .stop = found ? read[best].stop : "not_found",
                         .passages = passages,
                         .passage_count = found ? count : 0};
    return on_event(ctx, &event, err);
}

static loci_status load_best(loci_query *query, const char *question, uint32_t limit,
                             loci_ranked *ranked, uint32_t *count, loci_buf *bytes,
                             loci_passage *passages, loci_error *err) {
    LOCI_TRY(loci_query_rank(query, limit, ranked, count, err));
    for (uint32_t i = 0; i < *count; i++)
        LOCI_TRY(loci_passage_load(query, &ranked[i], bytes, &passages[i], err));
    loci_passages_bind(passages, *count, bytes);
    loci_passages_cite(passages, *count, question, "");
    double scores[LOCI_EVIDENCE_MAX];
    for (uint32_t i = 0; i < *count; i++)
        scores[i] = loci_reading_score(&(loci_reading){.rank = ranked[i].score});
    share_scores(passages, scores, *count);
    return LOCI_OK;
}

/* The prompt with as many of the passages, the best ones, as leave room for the answer. */
static loci_status prompt_together(loci_query *query, const loci_answer_request *request,
                                   const loci_passage *passages, uint32_t *count, loci_tokens *out,
                                   loci_error *err) {
    uint32_t room = loci_sequence_room(query->slot->sequence), head;
    uint32_t most = loci_answer_tokens_most(query, request);
    for (uint32_t i = *count; i > 0; i--) {
        LOCI_TRY(loci_stock_prompt(query, passages, i, out, &head, err));
        if (i > 1 && out->count + most > room) continue;
        *count = i;
        return LOCI_OK;
    }
    return LOCI_OK;
}

static loci_status read_together(loci_query *query, const loci_answer_request *request,
                                 loci_passage *passages, uint32_t count, loci_event_fn on_event,
                                 void *ctx, loci_error *err) {
    loci_sequence *sequence = query->slot->sequence;
    loci_generation answer = {.text = LOCI_BUF_INIT};
    loci_tokens prompt = {0};
    loci_usage *usage = &query->usage;
    uint64_t begun = loci_now_ns();
    loci_status status;
    loci_sequence_reset(sequence);
    loci_sequence_set_attend(sequence, NULL, NULL, NULL);
    LOCI_TRY_GOTO(prompt_together(query, request, passages, &count, &prompt, err), out);
    if (count > 0) {
        LOCI_TRY_GOTO(loci_sequence_append(sequence, prompt.ids, (uint32_t)prompt.count, 1, -1,
                                           query->cancel, err),
                      out);
        LOCI_TRY_GOTO(loci_generate_streamed(query, request, &answer, on_event, ctx, err), out);
    }
    bool found = answer.text.len > 0;
    const char *text = found ? (const char *)answer.text.data : "";
    loci_passages_cite(passages, count, request->question, text);
    bool verbatim = loci_passages_mark(passages, count, text);
    usage->answer_tokens = answer.tokens;
    usage->read_twice_ms = (double)(loci_now_ns() - begun) / 1e6;
    usage->total_ms = loci_query_elapsed_ms(query);
    loci_event event = {.kind = LOCI_EVENT_USAGE, .usage = usage};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    event = (loci_event){.kind = LOCI_EVENT_FINISHED,
                         .text = text,
                         .found = found,
                         .verbatim = verbatim,
                         .stop = found ? answer.stop : "not_found",
                         .passages = passages,
                         .passage_count = found ? count : 0};
    status = on_event(ctx, &event, err);
out:
    loci_tokens_fini(&prompt);
    loci_buf_fini(&answer.text);
    return status;
}

loci_status loci_answer_read_twice(loci_query *query, const loci_answer_request *request,
                                   loci_event_fn on_event, void *ctx, loci_error *err) {
    uint32_t limit = request->evidence_count ? request->evidence_count : 4, count = 0;
    loci_ranked ranked[LOCI_EVIDENCE_MAX];
    loci_passage passages[LOCI_EVIDENCE_MAX];
    loci_generation read[LOCI_EVIDENCE_MAX] = {0};
    loci_reading readings[LOCI_EVIDENCE_MAX];
    loci_buf bytes = LOCI_BUF_INIT;
    loci_status status;
    loci_event event = {.kind = LOCI_EVENT_PROGRESS, .stage = "rank", .total = 1};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    LOCI_TRY_GOTO(load_best(query, request->question, limit, ranked, &count, &bytes, passages, err),
                  out);
    query->usage.question_read_bytes = query->usage.index_read_bytes + query->usage.kv_read_bytes;
    event = (loci_event){.kind = LOCI_EVENT_EVIDENCE, .passages = passages, .passage_count = count};
    LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    if (query->engine->stock) {
        status = read_together(query, request, passages, count, on_event, ctx, err);
        goto out;
    }
    uint64_t begun = loci_now_ns();
    for (uint32_t i = 0; i < count; i++) {
        LOCI_TRY_GOTO(read_passage(query, request, &passages[i], &read[i], err), out);
        readings[i] = (loci_reading){.rank = ranked[i].score,
                                     .words = ranked[i].words,
                                     .logprob = read[i].logprob,
                                     .none_logprob = read[i].none_logprob};
        LOCI_TRY_GOTO(emit_candidate(&read[i], &readings[i], request->question, &passages[i],
                                     on_event, ctx, err),
                      out);
        query->usage.decode_steps += read[i].tokens;
        event = (loci_event){
            .kind = LOCI_EVENT_PROGRESS, .stage = "read", .done = i + 1, .total = count};
        LOCI_TRY_GOTO(on_event(ctx, &event, err), out);
    }
    query->usage.read_twice_ms = (double)(loci_now_ns() - begun) / 1e6;
    if (query->usage.read_twice_ms > 0)
        query->usage.decode_tokens_per_s =
            (double)query->usage.decode_steps * 1e3 / query->usage.read_twice_ms;
    status = finish(query, request->question, read, readings, passages, count, on_event, ctx, err);
out:
    for (uint32_t i = 0; i < count; i++) loci_buf_fini(&read[i].text);
    loci_buf_fini(&bytes);
    return status;
}
