/* SPDX-License-Identifier: Apache-2.0
 *
 * Folders of stock models; see stock_model.h.
 */
#include "tests/services/stock_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/buf.h"

/* Names that take the places of the built-in family's tokens: begin, and the four after <eos>. */
static const char *const marks[] = {"<bos>", "<doc>", "<q>", "<ev>", "<a>", "<none>"};
static const struct {
    const char *name, *template;
    const char *tokens[6];
} chats[] = {
    {"none", "", {"<|begin|>", "<s1>", "<s2>", "<s3>", "<s4>", "<s5>"}},
    {"llama3",
     "<|start_header_id|>",
     {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s4>",
      "<s5>"}},
    {"chatml",
     "<|im_start|>",
     {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s3>", "<s4>", "<s5>"}},
};

static void read_base(const char *base, const char *name, loci_buf *out) {
    char path[300];
    static uint8_t bytes[1 << 16];
    snprintf(path, sizeof path, "tests/data/model/tiny-%s/%s", base, name);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    loci_buf_append(out, bytes, fread(bytes, 1, sizeof bytes, file));
    fclose(file);
    assert_non_null(loci_buf_text(out));
}

static void write_text(const char *dir, const char *name, const char *text) {
    char path[400];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void replace_all(loci_buf *text, const char *from, const char *to) {
    loci_buf out = LOCI_BUF_INIT;
    const char *rest = loci_buf_text(text);
    for (const char *at; (at = strstr(rest, from)); rest = at + strlen(from)) {
        loci_buf_append(&out, rest, (size_t)(at - rest));
        loci_buf_printf(&out, "%s", to);
    }
    loci_buf_printf(&out, "%s", rest);
    loci_buf_fini(text);
    *text = out;
    assert_non_null(loci_buf_text(text));
}

void stock_model_make(const stock_model *model, const char *dir) {
    char from[600], to[600], root[256], positions[64];
    loci_buf config = LOCI_BUF_INIT, tokenizer = LOCI_BUF_INIT;
    size_t chat = 0;
    while (model->chat && strcmp(chats[chat].name, model->chat) != 0) chat++;
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_non_null(getcwd(root, sizeof root));
    snprintf(from, sizeof from, "%s/tests/data/model/tiny-%s/model.safetensors", root, model->base);
    snprintf(to, sizeof to, "%s/model.safetensors", dir);
    assert_int_equal(symlink(from, to), 0);
    read_base(model->base, "tokenizer.json", &tokenizer);
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        replace_all(&tokenizer, marks[i], chats[chat].tokens[i]);
    write_text(dir, "tokenizer.json", loci_buf_text(&tokenizer));
    read_base(model->base, "config.json", &config);
    snprintf(positions, sizeof positions, "\"max_position_embeddings\": %u", model->positions);
    replace_all(&config, "\"max_position_embeddings\": 512", positions);
    if (model->from) {
        assert_non_null(strstr(loci_buf_text(&config), model->from));
        replace_all(&config, model->from, model->to);
    }
    write_text(dir, "config.json", loci_buf_text(&config));
    if (model->chat) write_text(dir, "chat_template.jinja", chats[chat].template);
    loci_buf_fini(&config);
    loci_buf_fini(&tokenizer);
}
