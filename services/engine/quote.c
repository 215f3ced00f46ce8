/* SPDX-License-Identifier: Apache-2.0
 *
 * Quotes; see quote.h.
 *
 * What two texts share is counted in letters of their common words, so that short function words
 * weigh little. Words are runs of ASCII letters, digits and bytes above 0x7f, compared without
 * regard to ASCII case; general punctuation (U+2000 to U+206F: dashes, curly quotes) separates.
 */
#include "services/engine/quote.h"

#include <strings.h>

#include "services/common/text.h"
#include "services/engine/split.h"

static bool is_word(loci_slice text, size_t at) {
    uint8_t c = text.data[at];
    if (c == 0xe2 && at + 2 < text.len) {
        uint8_t second = text.data[at + 1], third = text.data[at + 2];
        return second != 0x80 && !(second == 0x81 && third < 0xb0);
    }
    return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') || c >= 0x80;
}

/* The next word from *at on, which is moved behind it; an empty slice at the end. */
static loci_slice next_word(loci_slice text, size_t *at) {
    while (*at < text.len && !is_word(text, *at)) *at += text.data[*at] == 0xe2 ? 3 : 1;
    if (*at >= text.len) return loci_slice_of(NULL, 0);
    size_t start = *at;
    while (*at < text.len && is_word(text, *at)) (*at)++;
    return loci_slice_of(text.data + start, *at - start);
}

static bool has_word(loci_slice text, loci_slice word) {
    size_t at = 0;
    for (;;) {
        loci_slice other = next_word(text, &at);
        if (other.len == 0) return false;
        if (other.len == word.len &&
            strncasecmp((const char *)other.data, (const char *)word.data, word.len) == 0)
            return true;
    }
}

/* Letters of the different words of `sentence` that stand in question or answer. A heading counts
 * nothing: it names what a passage is about and states nothing. */
static uint64_t shared(loci_slice sentence, loci_slice question, loci_slice answer) {
    uint64_t letters = 0;
    size_t at = 0;
    if (sentence.data[0] == '#') return 0;
    for (;;) {
        loci_slice word = next_word(sentence, &at);
        if (word.len == 0) return letters;
        loci_slice before = loci_slice_of(sentence.data, (size_t)(word.data - sentence.data));
        if (!has_word(before, word) && (has_word(question, word) || has_word(answer, word)))
            letters += word.len;
    }
}

static bool choose_literal(loci_slice passage, loci_slice question, loci_slice answer,
                           uint64_t *from, uint64_t *to) {
    bool found = false;
    uint64_t most = 0;
    size_t start, end;
    for (size_t at = 0; loci_text_find(passage, at, answer, &start, &end); at = end) {
        uint64_t first, last;
        loci_sentence_around(passage, start, end, &first, &last);
        uint64_t letters =
            shared(loci_slice_of(passage.data + first, last - first), question, answer);
        if (found && letters <= most) continue;
        *from = first;
        *to = last;
        most = letters;
        found = true;
    }
    return found;
}

static bool choose_similar(loci_slice passage, loci_slice question, loci_slice answer,
                           uint64_t *from, uint64_t *to) {
    uint64_t most = 0, at = 0, first, last;
    while (loci_sentence_next(passage, &at, &first, &last)) {
        uint64_t letters =
            shared(loci_slice_of(passage.data + first, last - first), question, answer);
        if (letters <= most) continue;
        *from = first;
        *to = last;
        most = letters;
    }
    return most > 0;
}

void loci_quote_choose(loci_slice passage, loci_slice question, loci_slice answer, uint64_t *from,
                       uint64_t *to) {
    *from = 0;
    *to = passage.len;
    if (choose_literal(passage, question, answer, from, to)) return;
    (void)choose_similar(passage, question, answer, from, to);
}
