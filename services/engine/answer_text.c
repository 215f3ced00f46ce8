/* SPDX-License-Identifier: Apache-2.0
 *
 * Text of an answer; see answer_text.h.
 */
#include "services/engine/answer_text.h"

#include <string.h>

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

/* Where the text goes on in the raw text: not with the space that the first word has before it, nor
 * with what white space else a stock model puts there. */
static size_t skip_lead(const loci_answer_text *self, size_t whole) {
    size_t at = self->taken;
    if (!self->stock) return at == 0 && self->raw.data[0] == ' ' ? 1 : at;
    if (self->text.len > 0) return at;
    while (at < whole && (self->raw.data[at] == ' ' || self->raw.data[at] == '\n')) at++;
    return at;
}

typedef enum refusal { REFUSAL_NO, REFUSAL_OPEN, REFUSAL_YES } refusal;

static uint8_t lower(uint8_t c) {
    return c >= 'A' && c <= 'Z' ? c | 0x20 : c;
}

/* Does the text begin as the fixed reply? Open: it may yet, being so short. */
static refusal refusal_of(const loci_buf *text) {
    static const char words[] = LOCI_REFUSAL;
    for (size_t i = 0; i + 1 < sizeof words; i++) {
        if (i == text->len) return REFUSAL_OPEN;
        if (lower(text->data[i]) != lower((uint8_t)words[i])) return REFUSAL_NO;
    }
    return REFUSAL_YES;
}

/* What a stock model's text says so far. True while it may yet become the fixed reply. */
static bool judge(loci_answer_text *self) {
    loci_buf *text = &self->text;
    refusal said = refusal_of(text);
    if (said == REFUSAL_YES) text->len = 0;
    const uint8_t *end = self->line && text->len > 0 ? memchr(text->data, '\n', text->len) : NULL;
    if (end) text->len = (size_t)(end - text->data);
    self->over = said == REFUSAL_YES || end;
    return said == REFUSAL_OPEN;
}

loci_status loci_answer_text_take(loci_answer_text *self, bool last, loci_error *err) {
    loci_buf *text = &self->text;
    size_t whole = last ? self->raw.len : whole_characters(self->raw.data, self->raw.len);
    bool hold = false;
    if (!self->over && whole > self->taken) {
        size_t from = skip_lead(self, whole);
        append_utf8(text, self->raw.data + from, whole - from);
        self->taken = whole;
        if (self->stock && loci_buf_status(text) == LOCI_OK) hold = judge(self);
    }
    if (loci_buf_status(&self->raw) != LOCI_OK || !loci_buf_text(text))
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the answer");
    if (!self->on_piece || text->len <= self->handed || (hold && !last)) return LOCI_OK;
    size_t from = self->handed;
    self->handed = text->len;
    return self->on_piece(self->ctx, (const char *)text->data + from, err);
}
