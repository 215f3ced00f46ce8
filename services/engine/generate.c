/* SPDX-License-Identifier: Apache-2.0
 *
 * Generating an answer from the logits that the sequence holds.
 *
 * Text is handed on in pieces of whole UTF-8 characters: a token can end inside one.
 */
#include <math.h>
#include <string.h>

#include "services/engine/query.h"

#define RECENT_TOKENS 64u
#define LOOP_REPEATS 3u /* the same 4 tokens so many times in a row end the answer */
#define LOOP_TOKENS 4u
#define DEFAULT_ANSWER_TOKENS 32u

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

/* Length of the longest prefix that ends at a character border; bytes that can never become valid
 * count as characters. */
static size_t whole_characters(const uint8_t *data, size_t len) {
    for (size_t back = 1; back <= 3 && back <= len; back++) {
        uint8_t c = data[len - back];
        if ((c & 0xc0) == 0x80) continue;
        size_t need = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
        return need > back ? len - back : len;
    }
    return len;
}

/* Appends bytes with anything that is not UTF-8 replaced by U+FFFD. */
static void append_utf8(loci_buf *out, const uint8_t *data, size_t len) {
    for (size_t at = 0; at < len;) {
        uint8_t c = data[at];
        size_t need = c < 0x80 ? 1 : c >= 0xf0 && c < 0xf5 ? 4 : c >= 0xe0 ? 3 : c >= 0xc2 ? 2 : 0;
        bool ok = need > 0 && c < 0xf5 && at + need <= len;
        for (size_t i = 1; ok && i < need; i++) ok = (data[at + i] & 0xc0) == 0x80;
        if (ok && need == 3)
            ok = !(c == 0xe0 && data[at + 1] < 0xa0) && !(c == 0xed && data[at + 1] > 0x9f);
        if (ok && need == 4)
            ok = !(c == 0xf0 && data[at + 1] < 0x90) && !(c == 0xf4 && data[at + 1] > 0x8f);
        if (ok) {
            loci_buf_append(out, data + at, need);
            at += need;
        } else {
            loci_buf_append(out, "\xef\xbf\xbd", 3);
            at++;
        }
    }
}

/* Hands on what is whole of raw[*sent..]; everything at the end. */
static loci_status emit(loci_generation *out, const loci_buf *raw, size_t *sent, bool last,
                        loci_piece_fn on_piece, void *ctx, loci_error *err) {
    size_t whole = last ? raw->len : whole_characters(raw->data, raw->len);
    if (whole <= *sent) return LOCI_OK;
    size_t from = *sent;
    if (from == 0 && raw->data[0] == ' ') from = 1;
    size_t before = out->text.len;
    append_utf8(&out->text, raw->data + from, whole - from);
    *sent = whole;
    if (!loci_buf_text(&out->text)) return loci_fail(err, LOCI_E_NOMEM, "no memory for the answer");
    if (!on_piece || out->text.len == before) return LOCI_OK;
    return on_piece(ctx, (const char *)out->text.data + before, err);
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

loci_status loci_generate(loci_query *query, const loci_answer_request *request,
                          loci_generation *out, loci_piece_fn on_piece, void *ctx,
                          loci_error *err) {
    const loci_tokenizer *tokenizer = loci_model_tokenizer(query->engine->model);
    uint32_t most = request->max_tokens ? request->max_tokens : DEFAULT_ANSWER_TOKENS;
    if (most > LOCI_ANSWER_TOKENS_MAX) most = LOCI_ANSWER_TOKENS_MAX;
    uint32_t ids[LOCI_ANSWER_TOKENS_MAX];
    loci_buf raw = LOCI_BUF_INIT;
    size_t sent = 0;
    loci_status status = LOCI_OK;
    *out = (loci_generation){.text = LOCI_BUF_INIT, .stop = "length"};
    none_probability(query, out);
    while (out->tokens < most) {
        uint32_t id = 0;
        float logprob = 0;
        LOCI_TRY_GOTO(sample_next(query, request, ids, out->tokens, &id, &logprob, err), out);
        out->logprob += (double)logprob;
        if (loci_model_ends(query->engine->model, id)) {
            out->stop = "eos";
            break;
        }
        ids[out->tokens++] = id;
        LOCI_TRY_GOTO(loci_tokenizer_decode(tokenizer, &id, 1, false, &raw), out);
        LOCI_TRY_GOTO(emit(out, &raw, &sent, false, on_piece, ctx, err), out);
        if (loops(ids, out->tokens)) {
            out->stop = "repetition";
            break;
        }
        if (out->tokens == most) break;
        LOCI_TRY_GOTO(
            loci_sequence_append(query->slot->sequence, &id, 1, 1, -1, query->cancel, err), out);
    }
    status = emit(out, &raw, &sent, true, on_piece, ctx, err);
    if (status == LOCI_OK && !loci_buf_text(&out->text))
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for the answer");
out:
    loci_buf_fini(&raw);
    if (status != LOCI_OK) loci_buf_fini(&out->text);
    return status;
}
