/* SPDX-License-Identifier: Apache-2.0
 *
 * Prompts of the chat families; see chat.h.
 *
 * A prompt is a run of special tokens and texts. Text between two special tokens is encoded in one
 * go, as it would be if the whole prompt was one string, so that ids are those of the reference.
 */
#include "model/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "model/json.h"

#define NONE UINT32_MAX

enum { TEMPLATE_BYTES_MAX = 1 << 20, CONFIG_BYTES_MAX = 16 << 20, PATH_BYTES = 4096 };

/* --- Recognising -------------------------------------------------------------------------- */

/* What a word in the template says of a member of chatml; the first that occurs counts. */
static const struct {
    const char *word, *text;
} chatml_systems[] = {
    {"You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
     "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {"You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
     "You are a helpful AI assistant named SmolLM, trained by Hugging Face."},
    {"You are a helpful AI assistant named SmolLM, trained by Hugging Face",
     "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    {"You are a helpful assistant", "You are a helpful assistant."},
};

static void set_chatml(const char *template, const loci_tokenizer *tokenizer, loci_chat *chat) {
    chat->family = LOCI_CHAT_CHATML;
    chat->open = loci_tokenizer_id(tokenizer, "<|im_start|>");
    chat->close = chat->stop = loci_tokenizer_id(tokenizer, "<|im_end|>");
    chat->bos = NONE;
    for (size_t i = 0; i < sizeof chatml_systems / sizeof chatml_systems[0]; i++) {
        if (!strstr(template, chatml_systems[i].word)) continue;
        chat->system_default = chatml_systems[i].text;
        break;
    }
    if (strstr(template, "enable_thinking")) {
        /* SmolLM3 has one line break behind it, Qwen3 two. */
        bool smollm = strstr(template, "SmolLM") != NULL;
        chat->answer_prefix = smollm ? "<think>\n\n</think>\n" : "<think>\n\n</think>\n\n";
        chat->prefix_history = smollm;
    }
}

static void set_llama3(const char *template, const loci_tokenizer *tokenizer, loci_chat *chat) {
    chat->family = LOCI_CHAT_LLAMA3;
    chat->open = loci_tokenizer_id(tokenizer, "<|start_header_id|>");
    chat->close = loci_tokenizer_id(tokenizer, "<|end_header_id|>");
    chat->stop = loci_tokenizer_id(tokenizer, "<|eot_id|>");
    chat->bos = loci_tokenizer_id(tokenizer, "<|begin_of_text|>");
    if (!strstr(template, "Cutting Knowledge Date")) return;
    /* Always there from 3.1 on. The date is the one of templates that are not told today's. */
    chat->system_prefix = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    chat->system_default = "";
}

static void set_mistral(const char *template, const loci_tokenizer *tokenizer, loci_chat *chat) {
    chat->family = LOCI_CHAT_MISTRAL;
    chat->open = loci_tokenizer_id(tokenizer, "[INST]");
    chat->close = loci_tokenizer_id(tokenizer, "[/INST]");
    chat->stop = loci_tokenizer_id(tokenizer, "</s>");
    chat->bos = loci_tokenizer_id(tokenizer, "<s>");
    chat->system_token = strstr(template, "[SYSTEM_PROMPT]") != NULL;
    if (!chat->system_token) return;
    chat->system_open = loci_tokenizer_id(tokenizer, "[SYSTEM_PROMPT]");
    chat->system_close = loci_tokenizer_id(tokenizer, "[/SYSTEM_PROMPT]");
}

static void set_plain(const loci_tokenizer *tokenizer, loci_chat *chat) {
    *chat = (loci_chat){.family = LOCI_CHAT_PLAIN, .system_prefix = "", .answer_prefix = ""};
    chat->open = chat->close = chat->stop = chat->system_open = chat->system_close = NONE;
    chat->bos = loci_tokenizer_bos(tokenizer);
}

static bool has_all_tokens(const loci_chat *chat) {
    return chat->open != NONE && chat->close != NONE && chat->stop != NONE &&
           (chat->bos != NONE || chat->family == LOCI_CHAT_CHATML) &&
           (!chat->system_token || (chat->system_open != NONE && chat->system_close != NONE));
}

static const struct {
    const char *word;
    void (*set)(const char *template, const loci_tokenizer *tokenizer, loci_chat *chat);
} families[] = {
    {"<|start_header_id|>", set_llama3}, {"<|im_start|>", set_chatml}, {"[INST]", set_mistral}};

static void recognise(const char *dir, const char *template, const loci_tokenizer *tokenizer,
                      loci_chat *chat) {
    set_plain(tokenizer, chat);
    if (!template) return;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        if (!strstr(template, families[i].word)) continue;
        families[i].set(template, tokenizer, chat);
        if (has_all_tokens(chat)) return;
        loci_log_warn("%s: the chat template is of family %s, but its special tokens are not in "
                      "tokenizer.json: plain prompts are used",
                      dir, loci_chat_family_name(chat->family));
        set_plain(tokenizer, chat);
        return;
    }
    loci_log_warn("%s: the chat template is of no known family (llama3, chatml, mistral): plain "
                  "prompts are used",
                  dir);
}

/* The text of a file, or *out empty when there is no such file. */
static loci_status read_template(const char *path, loci_buf *out, loci_error *err) {
    FILE *file = fopen(path, "rb");
    if (!file) return LOCI_OK;
    char chunk[4096];
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, file)) > 0;) {
        loci_buf_append(out, chunk, n);
        if (out->len > TEMPLATE_BYTES_MAX) break;
    }
    bool failed = ferror(file) != 0;
    fclose(file);
    if (failed) return loci_fail(err, LOCI_E_IO, "%s cannot be read", path);
    if (out->len > TEMPLATE_BYTES_MAX)
        return loci_fail(err, LOCI_E_LIMIT, "%s has more than %d bytes", path,
                         (int)TEMPLATE_BYTES_MAX);
    return loci_buf_status(out) == LOCI_OK ? LOCI_OK
                                           : loci_fail(err, LOCI_E_NOMEM, "no memory for %s", path);
}

/* A string, or a list of named ones, of which "default" counts. */
static const char *template_of(const json_t *value) {
    if (json_is_string(value)) return json_string_value(value);
    size_t i;
    const json_t *entry;
    json_array_foreach(value, i, entry) {
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name && strcmp(name, "default") == 0)
            return json_string_value(json_object_get(entry, "template"));
    }
    return NULL;
}

loci_status loci_chat_open(const char *dir, const loci_tokenizer *tokenizer, loci_chat *out,
                           loci_error *err) {
    loci_buf text = LOCI_BUF_INIT;
    json_t *config = NULL;
    char path[PATH_BYTES];
    loci_status status = LOCI_OK;
    set_plain(tokenizer, out);
    if (snprintf(path, sizeof path, "%s/chat_template.jinja", dir) >= (int)sizeof path)
        return loci_fail(err, LOCI_E_INVAL, "the name of the model folder is too long");
    loci_error damage = {0};
    status = read_template(path, &text, &damage);
    if (status != LOCI_OK) goto out;
    if (text.len > 0) {
        recognise(dir, loci_buf_text(&text), tokenizer, out);
        goto out;
    }
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    status = loci_json_read(path, CONFIG_BYTES_MAX, &config, &damage);
    if (status == LOCI_OK)
        recognise(dir, template_of(json_object_get(config, "chat_template")), tokenizer, out);
    else if (status == LOCI_E_NOTFOUND)
        status = LOCI_OK;
out:
    /* Text is read without a template, too. */
    if (status != LOCI_OK && status != LOCI_E_NOMEM) {
        loci_log_warn("%s: plain prompts are used", damage.text);
        status = LOCI_OK;
    } else if (status != LOCI_OK && err) {
        *err = damage;
    }
    json_decref(config);
    loci_buf_fini(&text);
    return status;
}

const char *loci_chat_family_name(loci_chat_family family) {
    static const char *const names[] = {"plain", "llama3", "chatml", "mistral"};
    return names[family];
}

/* --- Prompts ------------------------------------------------------------------------------ */

/* Text waits in `text` until a special token or the end comes. */
typedef struct prompt {
    const loci_chat *chat;
    const loci_tokenizer *tokenizer;
    loci_tokens *out;
    loci_buf text;
    size_t length; /* of the text already encoded */
    loci_status status;
    loci_error *err;
} prompt;

static void flush(prompt *p) {
    if (p->status == LOCI_OK && loci_buf_status(&p->text) != LOCI_OK)
        p->status = loci_fail(p->err, LOCI_E_NOMEM, "no memory for a prompt");
    if (p->status == LOCI_OK && p->length + p->text.len > (size_t)1 << 31)
        p->status = loci_fail(p->err, LOCI_E_LIMIT, "a prompt of %zu bytes is too long",
                              p->length + p->text.len);
    if (p->status != LOCI_OK || p->text.len == 0) return;
    size_t first = p->out->count;
    p->status = loci_tokenizer_encode(p->tokenizer, loci_slice_of(p->text.data, p->text.len), false,
                                      p->out, p->err);
    for (size_t i = first; p->status == LOCI_OK && i < p->out->count; i++)
        p->out->ends[i] += (uint32_t)p->length;
    p->length += p->text.len;
    loci_buf_clear(&p->text);
}

static void put_special(prompt *p, uint32_t id) {
    flush(p);
    if (p->status != LOCI_OK || id == NONE) return;
    p->status = loci_tokens_push(p->out, id, (uint32_t)p->length);
    if (p->status != LOCI_OK) (void)loci_fail(p->err, p->status, "no memory for a prompt");
}

static void put_text(prompt *p, loci_slice text) {
    loci_buf_append(&p->text, text.data, text.len);
}

static void put(prompt *p, const char *text) {
    loci_buf_append_text(&p->text, text);
}

static bool is_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

/* Bytes of the white space that a text begins with (or ends with): 0 if there is none. */
static size_t space_at(loci_slice text, bool behind) {
    for (size_t len = 1; len <= 3 && len <= text.len; len++) {
        const uint8_t *at = behind ? text.data + text.len - len : text.data;
        if (len == 1 && at[0] < 0x80 && is_space(at[0])) return 1;
        if (len == 2 && (at[0] & 0xe0) == 0xc0 && is_space((at[0] & 0x1fu) << 6 | (at[1] & 0x3fu)))
            return 2;
        if (len == 3 && (at[0] & 0xf0) == 0xe0 &&
            is_space((at[0] & 0xfu) << 12 | (at[1] & 0x3fu) << 6 | (at[2] & 0x3fu)))
            return 3;
    }
    return 0;
}

/* As Jinja's filter of this name. */
static loci_slice trim(loci_slice text) {
    for (size_t n; (n = space_at(text, false)) > 0;)
        text = loci_slice_of(text.data + n, text.len - n);
    for (size_t n; (n = space_at(text, true)) > 0;) text.len -= n;
    return text;
}

static const char *role_name(loci_chat_role role) {
    return role == LOCI_CHAT_SYSTEM ? "system" : role == LOCI_CHAT_USER ? "user" : "assistant";
}

static void llama3_turn(prompt *p, loci_chat_role role, const char *prefix, loci_slice text) {
    put_special(p, p->chat->open);
    put(p, role_name(role));
    put_special(p, p->chat->close);
    put(p, "\n\n");
    put(p, prefix);
    put_text(p, trim(text));
    put_special(p, p->chat->stop);
}

static void llama3_prompt(prompt *p, const loci_slice *system, const loci_chat_turn *turns,
                          size_t count) {
    put_special(p, p->chat->bos);
    if (system) llama3_turn(p, LOCI_CHAT_SYSTEM, p->chat->system_prefix, *system);
    for (size_t i = 0; i < count; i++) llama3_turn(p, turns[i].role, "", turns[i].text);
    put_special(p, p->chat->open);
    put(p, role_name(LOCI_CHAT_ASSISTANT));
    put_special(p, p->chat->close);
    put(p, "\n\n");
}

/* What a thinking model answered, without what it thought. */
static loci_slice without_thoughts(loci_slice text) {
    static const char end[] = "</think>";
    const uint8_t *at = text.data, *stop = text.data + text.len, *found;
    while (at && (found = memmem(at, (size_t)(stop - at), end, sizeof end - 1)) != NULL)
        at = found + sizeof end - 1;
    if (at == text.data) return text;
    while (at < stop && *at == '\n') at++;
    return loci_slice_of(at, (size_t)(stop - at));
}

/* <think> is a token of its own where the tokenizer has it. */
static void put_answer_prefix(prompt *p) {
    static const char *const tags[] = {"<think>", "</think>"};
    const char *rest = p->chat->answer_prefix;
    for (size_t i = 0; i < 2 && *rest; i++) {
        const char *tag = strstr(rest, tags[i]);
        uint32_t id = loci_tokenizer_id(p->tokenizer, tags[i]);
        if (!tag || id == NONE) continue;
        put_text(p, loci_slice_of(rest, (size_t)(tag - rest)));
        put_special(p, id);
        rest = tag + strlen(tags[i]);
    }
    put(p, rest);
}

static void chatml_open(prompt *p, loci_chat_role role) {
    put_special(p, p->chat->open);
    put(p, role_name(role));
    put(p, "\n");
}

static void chatml_turn(prompt *p, loci_chat_role role, loci_slice text) {
    chatml_open(p, role);
    if (role == LOCI_CHAT_ASSISTANT && p->chat->answer_prefix[0]) text = without_thoughts(text);
    if (role == LOCI_CHAT_ASSISTANT && p->chat->prefix_history) {
        put_answer_prefix(p);
        while (text.len > 0 && text.data[0] == '\n')
            text = loci_slice_of(text.data + 1, text.len - 1);
    }
    put_text(p, text);
    put_special(p, p->chat->close);
    put(p, "\n");
}

static void chatml_prompt(prompt *p, const loci_slice *system, const loci_chat_turn *turns,
                          size_t count) {
    if (system) chatml_turn(p, LOCI_CHAT_SYSTEM, *system);
    for (size_t i = 0; i < count; i++) chatml_turn(p, turns[i].role, turns[i].text);
    chatml_open(p, LOCI_CHAT_ASSISTANT);
    put_answer_prefix(p);
}

static void mistral_prompt(prompt *p, const loci_slice *system, const loci_chat_turn *turns,
                           size_t count) {
    put_special(p, p->chat->bos);
    if (system && p->chat->system_token) {
        put_special(p, p->chat->system_open);
        put_text(p, *system);
        put_special(p, p->chat->system_close);
    }
    for (size_t i = 0; i < count; i++) {
        if (turns[i].role == LOCI_CHAT_ASSISTANT) {
            put_text(p, turns[i].text);
            put_special(p, p->chat->stop);
            continue;
        }
        put_special(p, p->chat->open);
        if (system && !p->chat->system_token && i + 1 == count) {
            put_text(p, *system);
            put(p, "\n\n");
        }
        put_text(p, turns[i].text);
        put_special(p, p->chat->close);
    }
}

static void plain_prompt(prompt *p, const loci_slice *system, const loci_chat_turn *turns,
                         size_t count) {
    put_special(p, p->chat->bos);
    if (system) {
        put_text(p, *system);
        put(p, "\n\n");
    }
    for (size_t i = 0; i < count; i++) {
        put_text(p, turns[i].text);
        put(p, "\n\n");
    }
}

static loci_status check_turns(const loci_chat_turn *turns, size_t count, loci_error *err) {
    size_t first = count > 0 && turns[0].role == LOCI_CHAT_SYSTEM;
    if (count == first || turns[count - 1].role != LOCI_CHAT_USER)
        return loci_fail(err, LOCI_E_INVAL, "a conversation must end with a turn of the user");
    for (size_t i = first; i < count; i++)
        if (turns[i].role != ((i - first) % 2 ? LOCI_CHAT_ASSISTANT : LOCI_CHAT_USER))
            return loci_fail(err, LOCI_E_INVAL,
                             "turn %zu of the conversation is the %s's: after the system's, user "
                             "and assistant must follow one another",
                             i + 1, role_name(turns[i].role));
    return LOCI_OK;
}

loci_status loci_chat_encode(const loci_chat *chat, const loci_tokenizer *tokenizer,
                             const loci_chat_turn *turns, size_t count, loci_tokens *out,
                             loci_error *err) {
    static void (*const prompts[])(prompt *, const loci_slice *, const loci_chat_turn *, size_t) = {
        plain_prompt, llama3_prompt, chatml_prompt, mistral_prompt};
    LOCI_TRY(check_turns(turns, count, err));
    size_t before = out->count, first = turns[0].role == LOCI_CHAT_SYSTEM;
    loci_slice system = first                  ? turns[0].text
                        : chat->system_default ? loci_slice_text(chat->system_default)
                                               : loci_slice_text("");
    bool has_system = first || chat->system_default;
    prompt p = {.chat = chat, .tokenizer = tokenizer, .out = out, .err = err};
    prompts[chat->family](&p, has_system ? &system : NULL, turns + first, count - first);
    flush(&p);
    loci_buf_fini(&p.text);
    if (p.status != LOCI_OK) out->count = before;
    return p.status;
}
