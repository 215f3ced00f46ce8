/* SPDX-License-Identifier: Apache-2.0
 *
 * Output of the commands; see output.h.
 */
#include "services/loci/output.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "services/common/names.h"
#include "services/common/text.h"

#define QUOTE_WIDTH 150u
#define BAR_WIDTH 24
#define DRAW_NS 100000000u
#define LINE_NS 5000000000u
#define BOLD "\x1b[1m"
#define DIM "\x1b[2m"
#define PLAIN "\x1b[0m"

void loci_print_json(json_t *object) {
    char *line = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    if (line) printf("%s\n", line);
    fflush(stdout);
    free(line);
    json_decref(object);
}

json_t *loci_json_text(loci_slice text) {
    loci_buf clean = LOCI_BUF_INIT;
    loci_utf8_append_clean(&clean, text);
    json_t *value = clean.failed ? NULL : json_stringn((const char *)clean.data, clean.len);
    if (!clean.failed && clean.len == 0) value = json_string("");
    loci_buf_fini(&clean);
    return value;
}

json_t *loci_json_passage(const char *name, uint64_t start, uint64_t end, ProtobufCBinaryData quote,
                          const char *last, double value) {
    json_t *object = json_object();
    json_object_set_new(object, "document", json_string(loci_document_name_id(name)));
    json_object_set_new(object, "start", json_integer((json_int_t)start));
    json_object_set_new(object, "end", json_integer((json_int_t)end));
    json_object_set_new(object, "quote", loci_json_text(loci_slice_of(quote.data, quote.len)));
    json_object_set_new(object, last, json_real(value));
    json_object_set_new(object, "name", json_string(name));
    return object;
}

json_t *loci_json_usage(const Loci__V1__Usage *u) {
    json_t *object = json_object();
    const struct {
        const char *name;
        uint64_t value;
    } counts[] = {{"corpus_tokens", u->corpus_tokens},
                  {"question_tokens", u->question_tokens},
                  {"answer_tokens", u->answer_tokens},
                  {"kv_read_bytes", u->kv_read_bytes},
                  {"index_read_bytes", u->index_read_bytes},
                  {"kv_dense_bytes", u->kv_dense_bytes},
                  {"fetched_bytes", u->fetched_bytes},
                  {"question_read_bytes", u->question_read_bytes},
                  {"decode_read_bytes", u->decode_read_bytes},
                  {"decode_steps", u->decode_steps}};
    const struct {
        const char *name;
        double value;
    } reals[] = {{"first_token_ms", u->first_token_ms},
                 {"decode_tokens_per_s", u->decode_tokens_per_s},
                 {"total_ms", u->total_ms},
                 {"lookup_ms", u->lookup_ms},
                 {"read_twice_ms", u->read_twice_ms},
                 {"share_sink", u->share_sink},
                 {"share_unattributed", u->share_unattributed}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        json_object_set_new(object, counts[i].name, json_integer((json_int_t)counts[i].value));
    for (size_t i = 0; i < sizeof reals / sizeof reals[0]; i++)
        json_object_set_new(object, reals[i].name, json_real(reals[i].value));
    return object;
}

bool loci_color(void) {
    const char *no_color = getenv("NO_COLOR");
    const char *term = getenv("TERM");
    return isatty(STDOUT_FILENO) && !(no_color && no_color[0]) && term && strcmp(term, "dumb") != 0;
}

/* Clean UTF-8, runs of blanks and control characters as one space. */
static void normalise(loci_slice text, loci_buf *out) {
    loci_buf clean = LOCI_BUF_INIT;
    loci_utf8_append_clean(&clean, text);
    bool blank = true; /* also drops the blanks at the beginning */
    for (size_t i = 0; i < clean.len; i++) {
        bool space = clean.data[i] <= 0x20 || clean.data[i] == 0x7f;
        if (!space)
            loci_buf_u8(out, clean.data[i]);
        else if (!blank)
            loci_buf_u8(out, ' ');
        blank = space;
    }
    if (out->len > 0 && out->data[out->len - 1] == ' ') out->len--;
    out->failed = out->failed || clean.failed;
    loci_buf_fini(&clean);
}

/* Moves a byte offset to the beginning of its character. */
static size_t character_at(const loci_buf *text, size_t at) {
    while (at > 0 && at < text->len && (text->data[at] & 0xc0) == 0x80) at--;
    return at;
}

void loci_clip_quote(loci_slice quote, const char *answer, size_t width, bool color,
                     loci_buf *out) {
    loci_buf text = LOCI_BUF_INIT;
    normalise(quote, &text);
    size_t at = 0, stop = 0, begin = 0;
    bool hit =
        loci_text_find(loci_slice_of(text.data, text.len), 0, loci_slice_text(answer), &at, &stop);
    size_t len = hit ? stop - at : 0;
    size_t lead = len < width ? (width - len) / 2 : 0;
    if (text.len > width && at > lead) begin = at - lead;
    if (text.len > width && begin + width > text.len) begin = text.len - width;
    begin = character_at(&text, begin);
    size_t end = character_at(&text, begin + width < text.len ? begin + width : text.len);
    if (begin > 0) loci_buf_append_text(out, "...");
    bool whole = hit && at + len <= end;
    if (whole && color) {
        loci_buf_append(out, text.data + begin, at - begin);
        loci_buf_append_text(out, BOLD);
        loci_buf_append(out, text.data + at, len);
        loci_buf_append_text(out, PLAIN);
        loci_buf_append(out, text.data + at + len, end - at - len);
    } else if (text.len > 0) {
        loci_buf_append(out, text.data + begin, end - begin);
    }
    if (end < text.len) loci_buf_append_text(out, "...");
    out->failed = out->failed || text.failed;
    loci_buf_fini(&text);
}

void loci_print_passage(const char *name, uint64_t start, uint64_t end, ProtobufCBinaryData quote,
                        const char *value, const char *answer) {
    bool color = loci_color();
    loci_buf line = LOCI_BUF_INIT;
    loci_clip_quote(loci_slice_of(quote.data, quote.len), answer, QUOTE_WIDTH, color, &line);
    const char *text = loci_buf_text(&line);
    printf("  %s:%llu-%llu  %s\n    %s%s%s\n", loci_document_name_id(name),
           (unsigned long long)start, (unsigned long long)end, value,
           color && answer[0] == '\0' ? DIM : "", text ? text : "",
           color && answer[0] == '\0' ? PLAIN : "");
    loci_buf_fini(&line);
}

loci_progress_line loci_progress_begin(void) {
    bool terminal = isatty(STDERR_FILENO) != 0;
    return (loci_progress_line){.terminal = terminal, .shown_ns = terminal ? 0 : loci_now_ns()};
}

void loci_progress_show(loci_progress_line *line, const loci_progress *p) {
    uint64_t now = loci_now_ns();
    if (now - line->shown_ns < (line->terminal ? DRAW_NS : LINE_NS)) return;
    char tokens[32], speed[32], bar[BAR_WIDTH + 1], eta[32] = "  ETA --:--";
    for (int i = 0; i < BAR_WIDTH; i++) bar[i] = i < (int)(p->share * BAR_WIDTH) ? '#' : '-';
    bar[BAR_WIDTH] = '\0';
    if (p->eta_s >= 0)
        snprintf(eta, sizeof eta, "  ETA %u:%02u", (unsigned)p->eta_s / 60,
                 (unsigned)p->eta_s % 60);
    if (line->terminal) fprintf(stderr, "\r\x1b[K[%s] ", bar);
    fprintf(stderr, "%s%s%llu/%llu documents  %s tokens  %s tokens/s%s%s", p->stage,
            p->stage[0] ? "  " : "", (unsigned long long)p->documents,
            (unsigned long long)p->documents_total, loci_format_count(tokens, p->tokens),
            loci_format_count(speed, (uint64_t)(p->tokens_per_s + 0.5)), eta,
            line->terminal ? "" : "\n");
    line->shown_ns = now;
    line->drawn = true;
}

void loci_progress_wipe(loci_progress_line *line) {
    if (line->drawn && line->terminal) fprintf(stderr, "\r\x1b[K");
    line->drawn = false;
}
