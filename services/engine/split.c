/* SPDX-License-Identifier: Apache-2.0
 *
 * Segments; see split.h.
 *
 * A document is a row of pieces: sentences, or parts of a sentence too long for a segment. A
 * segment takes pieces while they fit; it ends early at a paragraph border once it holds enough,
 * and a paragraph that needs several segments is cut in parts of about equal size. Each decision
 * looks only at bytes from the segment's start on, so that cutting can resume at any segment
 * border.
 */
#include "services/engine/split.h"

#include <stdlib.h>
#include <string.h>

#define SLACK_TOKENS 5u       /* newline tokens and merges over piece borders */
#define PARAGRAPH_TOKENS 110u /* a segment of so many tokens ends at a paragraph border */
#define LOOKAHEAD_SEGMENTS 4u /* paragraphs longer than this are not balanced */
#define WORD_BYTES_MAX 240u   /* a longer run without white space is cut: at least a byte a token */
#define TOKEN_BYTES 16u /* a sentence of more bytes for each token of a segment is cut unread */
#define GAP_BYTES_MAX                                                          \
    256u /* longer white space is never inside a segment, so quotes stay short \
          */

typedef struct piece {
    uint64_t start, end; /* trimmed byte range */
    uint32_t tokens;
    bool paragraph; /* first of its paragraph */
} piece;

struct loci_splitter {
    const loci_tokenizer *tokenizer;
    uint32_t tokens_max, prefix;
    loci_tokens scratch, all;
    loci_buf text;
    loci_split split;
    uint32_t capacity; /* segments */
};

static bool is_space(uint8_t c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool is_letter(uint8_t c) {
    return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
}

/* Does a line that starts at `at` begin a block of its own (heading, list item, table row)? */
static bool starts_block(loci_slice text, uint64_t at) {
    while (at < text.len && (text.data[at] == ' ' || text.data[at] == '\t')) at++;
    if (at >= text.len) return false;
    uint8_t c = text.data[at];
    uint8_t next = at + 1 < text.len ? text.data[at + 1] : 0;
    if (c == '#' || c == '|' || c == '>') return true;
    if ((c == '-' || c == '*' || c == '+') && next == ' ') return true;
    while (at < text.len && text.data[at] >= '0' && text.data[at] <= '9') at++;
    return at > 0 && at + 1 < text.len && text.data[at] == '.' && text.data[at + 1] == ' ' &&
           text.data[at - 1] >= '0' && text.data[at - 1] <= '9';
}

/* Is the line that ends at `at` (a newline) a Markdown heading? */
static bool ends_heading(loci_slice text, uint64_t begin, uint64_t at) {
    uint64_t line = at;
    while (line > begin && text.data[line - 1] != '\n') line--;
    return text.data[line] == '#';
}

/* The white space run at `at`: its end, and whether it separates paragraphs. */
static uint64_t space_run(loci_slice text, uint64_t begin, uint64_t at, bool *paragraph) {
    uint64_t end = at, newlines = 0, last = 0;
    while (end < text.len && is_space(text.data[end])) {
        if (text.data[end] == '\n') {
            if (newlines++ == 0) last = end;
        }
        end++;
    }
    *paragraph = newlines > 1 ||
                 (newlines == 1 && (starts_block(text, end) || ends_heading(text, begin, last)));
    return end;
}

void loci_passage_text(loci_slice text, loci_buf *out) {
    loci_buf_u8(out, ' ');
    uint64_t at = 0;
    while (at < text.len && is_space(text.data[at])) at++;
    uint64_t begin = at;
    while (at < text.len) {
        uint64_t word = at;
        while (at < text.len && !is_space(text.data[at])) at++;
        loci_buf_append(out, text.data + word, at - word);
        if (at >= text.len) break;
        bool paragraph;
        at = space_run(text, begin, at, &paragraph);
        if (at < text.len) loci_buf_u8(out, paragraph ? '\n' : ' ');
    }
}

static bool closes_quote(uint8_t c) {
    return c == '"' || c == '\'' || c == ')' || c == ']';
}

/* Does a sentence end just before the white space at `at`, and another begin at `next`? */
static bool sentence_border(loci_slice text, uint64_t begin, uint64_t at, uint64_t next) {
    uint64_t end = at;
    while (end > begin && closes_quote(text.data[end - 1])) end--;
    if (end > begin + 2 && memcmp(text.data + end - 3, "\xe2\x80\x9d", 3) == 0) end -= 3;
    if (end == begin || !strchr(".!?", text.data[end - 1])) return false;
    uint8_t c = next < text.len ? text.data[next] : 0;
    return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || strchr("\"'([", c) || c >= 0x80;
}

/* Does the word before `end` (a full stop) ask for what follows: an initial, a title? */
static bool ends_abbreviated(loci_slice text, uint64_t begin, uint64_t end) {
    static const char *const titles[] = {"Dr", "Mr", "Mrs", "Ms", "Prof", "St"};
    if (end == begin || text.data[end - 1] != '.') return false;
    uint64_t word = --end;
    while (word > begin && is_letter(text.data[word - 1])) word--;
    size_t len = end - word;
    if (len == 1) return true;
    for (size_t i = 0; i < sizeof titles / sizeof titles[0]; i++) {
        if (len == strlen(titles[i]) && memcmp(text.data + word, titles[i], len) == 0) return true;
    }
    return false;
}

static uint64_t skip_space(loci_slice text, uint64_t at) {
    while (at < text.len && is_space(text.data[at])) at++;
    return at;
}

/* End of the sentence that starts at `start`, looked for in `most` bytes; *next: start of what
 * follows; *paragraph: whether that begins a paragraph. abbreviations: their full stops count not.
 */
static uint64_t sentence_end(loci_slice text, uint64_t start, uint64_t most, bool abbreviations,
                             uint64_t *next, bool *paragraph) {
    uint64_t at = start;
    for (;;) {
        while (at < text.len && !is_space(text.data[at]) && at - start < most) at++;
        if (at < text.len && at - start >= most)
            while (at > start + 1 && (text.data[at] & 0xc0) == 0x80) at--;
        uint64_t end = at;
        *paragraph = false;
        *next = space_run(text, start, at, paragraph);
        if (*next >= text.len || *paragraph || *next == end || *next - end > GAP_BYTES_MAX ||
            *next - start >= most)
            return end;
        if (sentence_border(text, start, end, *next) &&
            !(abbreviations && ends_abbreviated(text, start, end)))
            return end;
        at = *next;
    }
}

static loci_status count_tokens(loci_splitter *splitter, loci_slice text, uint32_t *out,
                                loci_error *err) {
    loci_buf_clear(&splitter->text);
    loci_passage_text(text, &splitter->text);
    LOCI_TRY(loci_buf_status(&splitter->text));
    splitter->scratch.count = 0;
    LOCI_TRY(loci_tokenizer_encode(splitter->tokenizer,
                                   loci_slice_of(splitter->text.data, splitter->text.len), false,
                                   &splitter->scratch, err));
    *out = (uint32_t)splitter->scratch.count;
    return LOCI_OK;
}

/* Shortens an over-long sentence [start, end) to the words that fit in `limit` tokens. */
static loci_status cut_long(loci_splitter *splitter, loci_slice text, uint64_t start, uint64_t end,
                            uint32_t limit, piece *out, loci_error *err) {
    uint64_t at = start, stop = start;
    uint32_t total = 0;
    while (at < end) {
        uint64_t word = at;
        while (at < end && !is_space(text.data[at]) && at - word < WORD_BYTES_MAX) at++;
        if (at < end && !is_space(text.data[at])) {
            while (at > word + 1 && (text.data[at] & 0xc0) == 0x80)
                at--; /* not inside a character */
        }
        uint32_t tokens;
        LOCI_TRY(count_tokens(splitter, loci_slice_of(text.data + word, at - word), &tokens, err));
        while (tokens > limit && at - word > 4) { /* a normal form can be longer than the text */
            at = word + (at - word) / 2;
            while (at > word + 1 && (text.data[at] & 0xc0) == 0x80) at--;
            LOCI_TRY(
                count_tokens(splitter, loci_slice_of(text.data + word, at - word), &tokens, err));
        }
        if (total > 0 && total + tokens > limit) break;
        total += tokens;
        stop = at;
        at = skip_space(text, at);
    }
    *out = (piece){start, stop, total, out->paragraph};
    return LOCI_OK;
}

/* The piece at `at` (not white space). *next: where the following one starts; *paragraph: whether
 * it begins a paragraph. */
static loci_status next_piece(loci_splitter *splitter, loci_slice text, uint64_t at, piece *out,
                              uint64_t *next, bool *paragraph, loci_error *err) {
    uint32_t limit = splitter->tokens_max - SLACK_TOKENS;
    uint64_t most = (uint64_t)limit * TOKEN_BYTES;
    uint64_t end = sentence_end(text, at, most, false, next, paragraph);
    *out = (piece){at, end, 0, false};
    LOCI_TRY(count_tokens(splitter, loci_slice_of(text.data + at, end - at), &out->tokens, err));
    if (out->tokens <= limit) return LOCI_OK;
    LOCI_TRY(cut_long(splitter, text, at, end, limit, out, err));
    if (out->end < end) {
        *next = skip_space(text, out->end);
        *paragraph = false;
    }
    return LOCI_OK;
}

/* How many tokens a segment that starts at `at` should hold so that the rest of its paragraph is
 * cut in equal parts. */
static loci_status segment_target(loci_splitter *splitter, loci_slice text, uint64_t at,
                                  uint32_t *target, loci_error *err) {
    uint32_t limit = splitter->tokens_max - SLACK_TOKENS, total = 0;
    bool paragraph = false;
    *target = limit;
    while (at < text.len && !paragraph) {
        piece part;
        LOCI_TRY(next_piece(splitter, text, at, &part, &at, &paragraph, err));
        total += part.tokens;
        if (total > LOOKAHEAD_SEGMENTS * limit) return LOCI_OK;
    }
    if (total > limit) {
        uint32_t parts = (total + limit - 1) / limit;
        uint32_t even = total / parts + limit / 10;
        *target = even < limit ? even : limit;
    }
    return LOCI_OK;
}

static loci_status grow(loci_splitter *splitter, uint32_t segments, loci_error *err) {
    if (segments <= splitter->capacity) return LOCI_OK;
    loci_split *split = &splitter->split;
    uint32_t *begin = realloc(split->begin, ((size_t)segments + 1) * sizeof *begin);
    if (begin) split->begin = begin;
    uint64_t *start = realloc(split->start, (size_t)segments * sizeof *start);
    if (start) split->start = start;
    uint64_t *end = realloc(split->end, (size_t)segments * sizeof *end);
    if (end) split->end = end;
    if (!begin || !start || !end) return loci_fail(err, LOCI_E_NOMEM, "no memory for segments");
    splitter->capacity = segments;
    return LOCI_OK;
}

/* Adds the segment [start, end): its tokens and range. LOCI_E_LIMIT when it has too many tokens. */
static loci_status add_segment(loci_splitter *splitter, loci_slice text, uint64_t start,
                               uint64_t end, loci_error *err) {
    uint32_t count;
    LOCI_TRY(count_tokens(splitter, loci_slice_of(text.data + start, end - start), &count, err));
    if (count > splitter->tokens_max) return LOCI_E_LIMIT;
    loci_split *split = &splitter->split;
    uint32_t s = split->segments;
    if (splitter->prefix != UINT32_MAX)
        LOCI_TRY(loci_tokens_push(&splitter->all, splitter->prefix, 0));
    for (uint32_t i = 0; i < count; i++)
        LOCI_TRY(loci_tokens_push(&splitter->all, splitter->scratch.ids[i], 0));
    split->start[s] = start;
    split->end[s] = end;
    split->begin[s + 1] = (uint32_t)splitter->all.count;
    split->segments = s + 1;
    return LOCI_OK;
}

/* Takes one segment from `at`; *next: where the following one starts. */
static loci_status take_segment(loci_splitter *splitter, loci_slice text, uint64_t at,
                                uint64_t *next, loci_error *err) {
    uint32_t limit = splitter->tokens_max - SLACK_TOKENS, target, held = 0, pieces = 0;
    LOCI_TRY(segment_target(splitter, text, at, &target, err));
    uint64_t start = at, end = at, before_last = at, at_last = at;
    bool paragraph = false, first_paragraph = true;
    while (at < text.len) {
        piece part;
        uint64_t after;
        bool border;
        LOCI_TRY(next_piece(splitter, text, at, &part, &after, &border, err));
        if (paragraph) first_paragraph = false;
        uint32_t most = first_paragraph ? target : limit;
        if (pieces > 0 && (held + part.tokens + 1 > most || at - end > GAP_BYTES_MAX ||
                           (paragraph && held >= PARAGRAPH_TOKENS)))
            break;
        before_last = end;
        at_last = at;
        held += part.tokens + (paragraph ? 1 : 0);
        end = part.end;
        at = after;
        paragraph = border;
        pieces++;
    }
    *next = at;
    loci_status status = add_segment(splitter, text, start, end, err);
    if (status == LOCI_E_LIMIT && pieces > 1) { /* merges went the other way: leave the last out */
        *next = at_last;
        status = add_segment(splitter, text, start, before_last, err);
    }
    if (status == LOCI_E_LIMIT) {
        return loci_fail(err, LOCI_E_INTERNAL, "a segment at byte %llu has too many tokens",
                         (unsigned long long)start);
    }
    return status;
}

loci_status loci_splitter_open(const loci_tokenizer *tokenizer, uint32_t tokens_max,
                               uint32_t prefix, loci_splitter **out, loci_error *err) {
    LOCI_ASSERT(tokens_max > WORD_BYTES_MAX);
    loci_splitter *splitter = calloc(1, sizeof *splitter);
    if (!splitter) return loci_fail(err, LOCI_E_NOMEM, "no memory for a splitter");
    splitter->tokenizer = tokenizer;
    splitter->tokens_max = tokens_max;
    splitter->prefix = prefix;
    *out = splitter;
    return LOCI_OK;
}

void loci_splitter_close(loci_splitter *splitter) {
    if (!splitter) return;
    loci_tokens_fini(&splitter->scratch);
    loci_tokens_fini(&splitter->all);
    loci_buf_fini(&splitter->text);
    free(splitter->split.begin);
    free(splitter->split.start);
    free(splitter->split.end);
    free(splitter);
}

loci_status loci_splitter_split(loci_splitter *splitter, loci_slice text, uint64_t from,
                                uint32_t segments_max, const loci_split **out, loci_error *err) {
    LOCI_TRY(grow(splitter, segments_max, err));
    loci_split *split = &splitter->split;
    splitter->all.count = 0;
    split->segments = 0;
    split->begin[0] = 0;
    uint64_t at = skip_space(text, from);
    while (at < text.len && split->segments < segments_max)
        LOCI_TRY(take_segment(splitter, text, at, &at, err));
    split->tokens = splitter->all.ids;
    split->next = at;
    *out = split;
    return LOCI_OK;
}

bool loci_sentence_next(loci_slice text, uint64_t *at, uint64_t *from, uint64_t *to) {
    *at = *from = skip_space(text, *at);
    if (*at >= text.len) return false;
    bool paragraph;
    *to = sentence_end(text, *from, text.len, true, at, &paragraph);
    return true;
}

void loci_sentence_around(loci_slice text, uint64_t start, uint64_t end, uint64_t *from,
                          uint64_t *to) {
    uint64_t at = 0, first, last;
    *from = skip_space(text, 0);
    *to = text.len;
    while (loci_sentence_next(text, &at, &first, &last)) {
        if (first <= start) *from = first;
        if (last < end) continue;
        *to = last;
        return;
    }
}
