/* SPDX-License-Identifier: Apache-2.0
 *
 * Conversations as the tokens that instruction-tuned models were trained on.
 *
 * A model folder states its prompt as a Jinja template. Templates are not interpreted: the family
 * is recognised by words in the template, and the families' prompts are written in chat.c, without
 * tools, images and today's date (SmolLM3's is the one of "/system_override /no_think"; Mistral
 * Small's default system text, which tells the date, is left out). Users' text
 * never becomes a special token.
 */
#ifndef LOCI_MODEL_CHAT_H
#define LOCI_MODEL_CHAT_H

#include "model/tokenizer.h"

typedef enum loci_chat_family {
    LOCI_CHAT_PLAIN,  /* no template, or an unknown one: texts with an empty line between them */
    LOCI_CHAT_LLAMA3, /* Llama 3, 3.1, 3.2, 3.3 */
    LOCI_CHAT_CHATML, /* Qwen2, Qwen2.5, Qwen3, SmolLM2, SmolLM3 */
    LOCI_CHAT_MISTRAL /* Mistral Nemo, Small 2501 */
} loci_chat_family;

typedef struct loci_chat {
    loci_chat_family family;
    /* Opens the system turn, before the caller's text (Llama 3.1: its dates); "" if nothing does.
     */
    const char *system_prefix;
    /* The system turn's text if the caller has none; NULL: then there is no such turn. */
    const char *system_default;
    /* Opens the answer: an empty stretch of thinking, in models that would think otherwise. */
    const char *answer_prefix;
    bool prefix_history; /* so do the answers before it, else they have no prefix */
    bool system_token;   /* Mistral: the system text has special tokens of its own */
    /* Special tokens of the family; UINT32_MAX where it has none. stop ends an answer. */
    uint32_t bos, open, close, stop, system_open, system_close;
} loci_chat;

typedef enum loci_chat_role {
    LOCI_CHAT_SYSTEM, /* at most one, which comes first */
    LOCI_CHAT_USER,
    LOCI_CHAT_ASSISTANT
} loci_chat_role;

typedef struct loci_chat_turn {
    loci_chat_role role;
    loci_slice text;
} loci_chat_turn;

/* Reads the template of a model folder: chat_template.jinja, else "chat_template" in
 * tokenizer_config.json. A template that is not known, or a file that cannot be read, is reported
 * in one log line, and the family is plain. Fails only for want of memory or a name that is too
 * long. */
LOCI_MUST_CHECK loci_status loci_chat_open(const char *dir, const loci_tokenizer *tokenizer,
                                           loci_chat *out, loci_error *err);
const char *loci_chat_family_name(loci_chat_family family);
/* Appends the prompt after which the assistant's next answer follows. Turns: an optional system
 * turn, then user and assistant in turn, ending with the user's (else LOCI_E_INVAL). Ends in *out
 * count from the beginning of the prompt, special tokens taking no room. */
LOCI_MUST_CHECK loci_status loci_chat_encode(const loci_chat *chat, const loci_tokenizer *tokenizer,
                                             const loci_chat_turn *turns, size_t count,
                                             loci_tokens *out, loci_error *err);

#endif
