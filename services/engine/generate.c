/* SPDX-License-Identifier: Apache-2.0
 *
 * Generating an answer from the logits that the sequence holds.
 */
#include <math.h>
#include <string.h>

#include "services/engine/query.h"

#define RECENT_TOKENS 64u
#define LOOP_REPEATS 3u /* the same 4 tokens so many times in a row end the answer */
#define LOOP_TOKENS 4u
#define DEFAULT_ANSWER_TOKENS 32u
#define DEFAULT_STOCK_TOKENS 128u /* they answer in sentences */

static void none_probability(loci_query *query, loci_generation *out) {
    const loci_model_config *config = loci_model_config_of(query->engine->model);
    uint32_t none = loci_model_specials(query->engine->model)->none;
    out->none_logprob = -INFINITY;
    if (none == UINT32_MAX) return;
    const float *logits = loci_sequence_logits(query->slot->sequence);
    float most = logits[0];
    for (uint32_t i = 1; i < config->vocab; i++) most = logits[i] > most ? logits[i] : most;
    double sum = 0;
    for (uint32_t i = 0; i < config->vocab; i++) sum += exp((double)logits[i] - (double)most);
    out->none_logprob = (double)logits[none] - (double)most - log(sum);
    out->says_none = logits[none] >= most;
}

static bool loops(const uint32_t *ids, uint32_t count) {
    if (count < LOOP_REPEATS * LOOP_TOKENS) return false;
    const uint32_t *end = ids + count;
    for (uint32_t i = LOOP_TOKENS + 1; i <= LOOP_REPEATS * LOOP_TOKENS; i++) {
        if (end[-(int)i] != end[-(int)i + (int)LOOP_TOKENS]) return false;
    }
    return true;
}

static loci_status sample_next(loci_query *query, const loci_answer_request *request,
                               const uint32_t *ids, uint32_t count, uint32_t *id, float *logprob,
                               loci_error *err) {
    const loci_special_tokens *special = loci_model_specials(query->engine->model);
    const loci_model_config *config = loci_model_config_of(query->engine->model);
    uint32_t banned[8 + LOCI_EOS_MAX], banned_count = 0;
    const uint32_t never[] = {special->none,     special->doc,    special->question,
                              special->evidence, special->answer, special->bos};
    for (size_t i = 0; i < sizeof never / sizeof never[0]; i++) {
        if (never[i] != UINT32_MAX) banned[banned_count++] = never[i];
    }
    for (uint32_t i = 0; count == 0 && i < config->eos_count; i++)
        banned[banned_count++] = config->eos[i];
    uint32_t stop = loci_model_chat(query->engine->model)->stop;
    if (count == 0 && stop != UINT32_MAX) banned[banned_count++] = stop;
    loci_sample_params params = {.temperature = (float)request->temperature,
                                 .top_p = 1,
                                 .repetition_penalty = 1,
                                 .seed = request->seed,
                                 .step = count};
    uint32_t recent = count < RECENT_TOKENS ? count : RECENT_TOKENS;
    return loci_sequence_sample(query->slot->sequence, &params, banned, banned_count,
                                ids + count - recent, recent, id, logprob, err);
}

uint32_t loci_answer_tokens_most(const loci_query *query, const loci_answer_request *request) {
    uint32_t most = query->engine->stock ? DEFAULT_STOCK_TOKENS : DEFAULT_ANSWER_TOKENS;
    if (request->max_tokens) most = request->max_tokens;
    return most < LOCI_ANSWER_TOKENS_MAX ? most : LOCI_ANSWER_TOKENS_MAX;
}

loci_status loci_generate(loci_query *query, const loci_answer_request *request,
                          loci_generation *out, loci_piece_fn on_piece, void *ctx,
                          loci_error *err) {
    const loci_model *model = query->engine->model;
    bool stock = query->engine->stock;
    uint32_t most = loci_answer_tokens_most(query, request);
    uint32_t room = loci_sequence_room(query->slot->sequence);
    if (most > room + 1) most = room + 1; /* the last token is not appended */
    uint32_t ids[LOCI_ANSWER_TOKENS_MAX];
    loci_answer_text text = {.stock = stock,
                             .line = stock && loci_model_chat(model)->family == LOCI_CHAT_PLAIN,
                             .on_piece = on_piece,
                             .ctx = ctx,
                             .raw = LOCI_BUF_INIT,
                             .text = LOCI_BUF_INIT};
    loci_status status = LOCI_OK;
    *out = (loci_generation){.text = LOCI_BUF_INIT, .stop = "length"};
    none_probability(query, out);
    loci_sequence_decoding(query->slot->sequence, true);
    while (out->tokens < most) {
        uint32_t id = 0;
        float logprob = 0;
        LOCI_TRY_GOTO(sample_next(query, request, ids, out->tokens, &id, &logprob, err), out);
        out->logprob += (double)logprob;
        if (loci_model_ends(model, id)) {
            out->stop = "eos";
            break;
        }
        ids[out->tokens++] = id;
        LOCI_TRY_GOTO(loci_tokenizer_decode(loci_model_tokenizer(model), &id, 1, false, &text.raw),
                      out);
        LOCI_TRY_GOTO(loci_answer_text_take(&text, false, err), out);
        if (text.over || loops(ids, out->tokens)) {
            out->stop = text.over ? "eos" : "repetition";
            break;
        }
        if (out->tokens == most) break;
        LOCI_TRY_GOTO(
            loci_sequence_append(query->slot->sequence, &id, 1, 1, -1, query->cancel, err), out);
    }
    status = loci_answer_text_take(&text, true, err);
out:
    loci_sequence_decoding(query->slot->sequence, false);
    loci_buf_fini(&text.raw);
    if (status == LOCI_OK)
        out->text = text.text;
    else
        loci_buf_fini(&text.text);
    return status;
}

typedef struct answer_stream {
    loci_query *query;
    loci_event_fn on_event;
    void *ctx;
    bool first_sent;
} answer_stream;

static loci_status send_piece(void *ctx, const char *text, loci_error *err) {
    answer_stream *stream = ctx;
    if (!stream->first_sent)
        stream->query->usage.first_token_ms = loci_query_elapsed_ms(stream->query);
    stream->first_sent = true;
    loci_event event = {.kind = LOCI_EVENT_DELTA, .text = text};
    return stream->on_event(stream->ctx, &event, err);
}

loci_status loci_generate_streamed(loci_query *query, const loci_answer_request *request,
                                   loci_generation *out, loci_event_fn on_event, void *ctx,
                                   loci_error *err) {
    answer_stream stream = {query, on_event, ctx, false};
    uint64_t begun = loci_now_ns();
    LOCI_TRY(loci_generate(query, request, out, send_piece, &stream, err));
    double seconds = (double)(loci_now_ns() - begun) / 1e9;
    query->usage.decode_steps = out->tokens;
    if (seconds > 0) query->usage.decode_tokens_per_s = (double)out->tokens / seconds;
    return LOCI_OK;
}
