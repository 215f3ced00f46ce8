/* SPDX-License-Identifier: Apache-2.0
 *
 * What a stock model is asked: one fixed wording in the turns of its chat family (model/chat.h).
 *
 * From passages, the question stands before and after them: read the second time, they are read
 * knowing it. Without passages the corpus stands before the prompt, by attention alone.
 *
 * A stock model has no token for "not here". It is asked to say so in fixed words; an answer that
 * begins with them (answer_text.h) counts as not found, any other as found.
 */
#include <string.h>

#include "services/engine/query.h"

#define SYSTEM                                                                                  \
    "Answer the question from the documents alone, as briefly as you can. If the documents do " \
    "not hold the answer, reply: " LOCI_REFUSAL "."

/* The text in the form that segments were encoded in. */
static void put_text(loci_buf *out, loci_slice text) {
    loci_buf normal = LOCI_BUF_INIT;
    loci_passage_text(text, &normal);
    if (loci_buf_status(&normal) == LOCI_OK && normal.len > 0)
        loci_buf_append(out, normal.data + 1, normal.len - 1); /* without the space before it */
    loci_buf_fini(&normal);
}

static void put_question(loci_buf *out, const char *question) {
    loci_buf_printf(out, "Question: ");
    put_text(out, loci_slice_text(question));
}

static loci_status encode(const loci_model *model, const char *question,
                          const loci_passage *passages, uint32_t count, loci_tokens *out,
                          loci_error *err) {
    const loci_chat *chat = loci_model_chat(model);
    loci_buf text = LOCI_BUF_INIT;
    put_question(&text, question);
    for (uint32_t i = 0; i < count; i++) {
        loci_buf_printf(&text, "\n\nDocument %u: ", i + 1);
        put_text(&text, passages[i].passage);
    }
    if (count > 0) {
        loci_buf_printf(&text, "\n\n");
        put_question(&text, question);
    }
    if (chat->family == LOCI_CHAT_PLAIN) loci_buf_printf(&text, "\nAnswer:");
    loci_status status = loci_buf_status(&text);
    if (status == LOCI_OK) {
        const loci_chat_turn turns[] = {
            {LOCI_CHAT_SYSTEM, loci_slice_text(SYSTEM)},
            {LOCI_CHAT_USER, loci_slice_of(text.data, text.len)},
        };
        status = loci_chat_encode(chat, loci_model_tokenizer(model), turns, 2, out, err);
    } else {
        loci_fail(err, status, "no memory for a prompt");
    }
    loci_buf_fini(&text);
    return status;
}

loci_status loci_stock_prompt(const loci_query *query, const loci_passage *passages, uint32_t count,
                              loci_tokens *out, uint32_t *head, loci_error *err) {
    const loci_model *model = query->engine->model;
    loci_tokens empty = {0};
    *head = 0;
    out->count = 0;
    LOCI_TRY(encode(model, query->text, passages, count, out, err));
    if (count > 0) return LOCI_OK;
    loci_status status;
    LOCI_TRY_GOTO(encode(model, "", NULL, 0, &empty, err), out);
    size_t same = 0;
    while (same < empty.count && same + 1 < out->count && empty.ids[same] == out->ids[same]) same++;
    size_t begin = out->count > 1 && out->ids[0] == loci_model_specials(model)->begin;
    memmove(out->ids, out->ids + begin, (out->count - begin) * sizeof *out->ids);
    out->count -= begin;
    *head = (uint32_t)(same - (same > 0 ? begin : 0));
out:
    loci_tokens_fini(&empty);
    return status;
}

loci_status loci_stock_prompt_tokens(const loci_model *model, uint32_t *out, loci_error *err) {
    static const loci_passage passage = {.passage = {NULL, 0}};
    loci_tokens tokens = {0};
    loci_status status = encode(model, "", &passage, 1, &tokens, err);
    *out = (uint32_t)tokens.count;
    loci_tokens_fini(&tokens);
    return status;
}
