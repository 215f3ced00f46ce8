/* SPDX-License-Identifier: Apache-2.0
 *
 * Cutting text into terms, and blocks of postings; see terms.h.
 */
#include "memory/terms.h"

#include <libstemmer.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

#define FOLDED_MAX 18 /* most characters that one decomposes to (U+FDFA) */
#define HEAD_BYTES 12u

/* --- Terms ------------------------------------------------------------------------------ */

/* Sorted. What is left of contractions ("don't" gives "don" and "t") is here too. */
static const char *const function_words[] = {
    "a",      "about", "above", "after",   "again", "against", "all",     "also",    "am",
    "an",     "and",   "any",   "are",     "as",    "at",      "be",      "because", "been",
    "before", "being", "below", "between", "both",  "but",     "by",      "can",     "could",
    "d",      "did",   "do",    "does",    "doing", "don",     "down",    "during",  "each",
    "few",    "for",   "from",  "further", "had",   "has",     "have",    "having",  "he",
    "her",    "here",  "hers",  "him",     "his",   "how",     "i",       "if",      "in",
    "into",   "is",    "it",    "its",     "just",  "ll",      "many",    "may",     "me",
    "might",  "more",  "most",  "much",    "must",  "my",      "no",      "nor",     "not",
    "now",    "of",    "off",   "on",      "once",  "only",    "or",      "other",   "our",
    "out",    "over",  "own",   "re",      "s",     "same",    "shall",   "she",     "should",
    "so",     "some",  "such",  "t",       "than",  "that",    "the",     "their",   "them",
    "then",   "there", "these", "they",    "this",  "those",   "through", "to",      "too",
    "under",  "until", "up",    "ve",      "very",  "was",     "we",      "were",    "what",
    "when",   "where", "which", "while",   "who",   "whom",    "whose",   "why",     "will",
    "with",   "would", "you",   "your",    "yours",
};

static int compare_words(const void *a, const void *b) {
    return strcmp(a, *(const char *const *)b);
}

static bool is_function_word(const char *word) {
    size_t count = sizeof function_words / sizeof *function_words;
    return bsearch(word, function_words, count, sizeof *function_words, compare_words) != NULL;
}

/* The word being gathered. */
typedef struct cutter {
    struct sb_stemmer *stemmer;
    loci_term_list *out;
    uint32_t segment;
    bool question, failed;
    size_t len;
    char word[LOCI_TERM_BYTES_MAX + 1];
} cutter;

static bool push_term(loci_term_list *list, uint64_t hash, uint32_t segment) {
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 256;
        loci_term *grown = realloc(list->items, capacity * sizeof *grown);
        if (!grown) return false;
        list->items = grown;
        list->capacity = capacity;
    }
    list->items[list->count++] = (loci_term){hash, segment};
    return true;
}

static void end_word(cutter *self) {
    if (self->len == 0) return;
    self->word[self->len] = 0;
    size_t len = self->len;
    self->len = 0;
    if (self->question && is_function_word(self->word)) return;
    const sb_symbol *stem = sb_stemmer_stem(self->stemmer, (const sb_symbol *)self->word, (int)len);
    if (!stem) {
        self->failed = true;
        return;
    }
    uint64_t hash = XXH3_64bits(stem, (size_t)sb_stemmer_length(self->stemmer));
    if (!push_term(self->out, hash, self->segment)) self->failed = true;
}

static void add_bytes(cutter *self, const utf8proc_uint8_t *bytes, size_t len) {
    if (self->len + len > LOCI_TERM_BYTES_MAX) end_word(self);
    memcpy(self->word + self->len, bytes, len);
    self->len += len;
}

static bool is_word(utf8proc_int32_t c) {
    utf8proc_category_t category = utf8proc_category(c);
    return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NO;
}

/* Han and kana, in the planes where they stand. */
static bool stands_alone(utf8proc_int32_t c) {
    return (c >= 0x2e80 && c <= 0xa4cf) || (c >= 0xf900 && c <= 0xfaff) ||
           (c >= 0x20000 && c <= 0x3ffff);
}

static void add_character(cutter *self, utf8proc_int32_t c) {
    utf8proc_int32_t folded[FOLDED_MAX];
    int boundary = 0;
    utf8proc_ssize_t count = utf8proc_decompose_char(
        c, folded, FOLDED_MAX, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT | UTF8PROC_CASEFOLD, &boundary);
    for (utf8proc_ssize_t i = 0; i < count && i < FOLDED_MAX; i++) {
        if (folded[i] >= 0x300 && folded[i] <= 0x36f) continue; /* accents */
        if (!is_word(folded[i])) {
            end_word(self);
            continue;
        }
        utf8proc_uint8_t bytes[4];
        bool alone = stands_alone(folded[i]);
        if (alone) end_word(self);
        add_bytes(self, bytes, (size_t)utf8proc_encode_char(folded[i], bytes));
        if (alone) end_word(self);
    }
}

loci_status loci_terms_of(loci_slice text, uint32_t segment, bool question, loci_term_list *out,
                          loci_error *err) {
    cutter self = {.out = out, .segment = segment, .question = question};
    self.stemmer = sb_stemmer_new("english", "UTF_8");
    if (!self.stemmer) return loci_fail(err, LOCI_E_NOMEM, "no memory for a stemmer");
    for (size_t at = 0; at < text.len && !self.failed;) {
        uint8_t c = text.data[at];
        if (c < 0x80) {
            uint8_t low = c >= 'A' && c <= 'Z' ? (uint8_t)(c | 0x20) : c;
            if ((low >= 'a' && low <= 'z') || (low >= '0' && low <= '9'))
                add_bytes(&self, &low, 1);
            else
                end_word(&self);
            at++;
            continue;
        }
        utf8proc_int32_t point;
        size_t left = text.len - at < 4 ? text.len - at : 4;
        utf8proc_ssize_t used = utf8proc_iterate(text.data + at, (utf8proc_ssize_t)left, &point);
        if (used > 0)
            add_character(&self, point);
        else
            end_word(&self);
        at += used > 0 ? (size_t)used : 1;
    }
    end_word(&self);
    sb_stemmer_delete(self.stemmer);
    if (self.failed) return loci_fail(err, LOCI_E_NOMEM, "no memory for the terms of a text");
    return LOCI_OK;
}

void loci_term_list_fini(loci_term_list *list) {
    free(list->items);
    *list = (loci_term_list){0};
}

/* --- Blocks ----------------------------------------------------------------------------- */

static int by_hash(const void *a, const void *b) {
    const loci_term *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static void put_varint(loci_buf *out, uint32_t value) {
    for (; value >= 0x80; value >>= 7) loci_buf_u8(out, (uint8_t)(value | 0x80));
    loci_buf_u8(out, (uint8_t)value);
}

/* One term's postings, items [first, last). */
static void put_postings(const loci_term *items, size_t first, size_t last, loci_buf *out) {
    uint32_t before = 0;
    for (size_t i = first; i < last;) {
        size_t next = i + 1;
        while (next < last && items[next].segment == items[i].segment) next++;
        put_varint(out, items[i].segment - before);
        put_varint(out, (uint32_t)(next - i));
        before = items[i].segment;
        i = next;
    }
}

loci_status loci_term_block_encode(loci_term_list *terms, uint32_t segments, const uint8_t *present,
                                   loci_buf *out, loci_error *err) {
    loci_buf hashes = LOCI_BUF_INIT, ends = LOCI_BUF_INIT, postings = LOCI_BUF_INIT;
    uint32_t distinct = 0;
    if (terms->count > 0) qsort(terms->items, terms->count, sizeof *terms->items, by_hash);
    for (size_t first = 0; first < terms->count; distinct++) {
        size_t last = first + 1;
        while (last < terms->count && terms->items[last].hash == terms->items[first].hash) last++;
        put_postings(terms->items, first, last, &postings);
        loci_buf_u64(&hashes, terms->items[first].hash);
        loci_buf_u32(&ends, (uint32_t)postings.len);
        first = last;
    }
    loci_buf_u32(out, segments);
    loci_buf_u32(out, distinct);
    loci_buf_u32(out, (uint32_t)postings.len);
    loci_buf_append(out, present, segments);
    loci_buf_append(out, hashes.data, hashes.len);
    loci_buf_append(out, ends.data, ends.len);
    loci_buf_append(out, postings.data, postings.len);
    bool failed = hashes.failed || ends.failed || postings.failed || out->failed;
    loci_buf_fini(&hashes);
    loci_buf_fini(&ends);
    loci_buf_fini(&postings);
    if (failed) return loci_fail(err, LOCI_E_NOMEM, "no memory for an index of words");
    return LOCI_OK;
}

static uint32_t u32_at(const uint8_t *data, size_t index) {
    loci_reader reader = loci_reader_of(loci_slice_of(data + 4 * index, 4));
    return loci_read_u32(&reader);
}

static uint64_t u64_at(const uint8_t *data, size_t index) {
    loci_reader reader = loci_reader_of(loci_slice_of(data + 8 * index, 8));
    return loci_read_u64(&reader);
}

loci_status loci_term_block_open(loci_slice bytes, uint32_t segments, const char *name,
                                 loci_term_block *out, loci_error *err) {
    loci_reader reader = loci_reader_of(bytes);
    out->segments = loci_read_u32(&reader);
    out->terms = loci_read_u32(&reader);
    uint64_t postings = loci_read_u32(&reader);
    uint64_t expected = HEAD_BYTES + (uint64_t)out->segments + 12ull * out->terms + postings;
    if (reader.failed || out->segments != segments || bytes.len != expected)
        return loci_fail(err, LOCI_E_CORRUPT, "%s is not of the expected size", name);
    out->bytes = bytes.len;
    out->present = bytes.data + HEAD_BYTES;
    out->hashes = out->present + segments;
    out->ends = out->hashes + 8ull * out->terms;
    out->postings = out->ends + 4ull * out->terms;
    if (out->terms > 0 && u32_at(out->ends, out->terms - 1) != postings)
        return loci_fail(err, LOCI_E_CORRUPT, "%s contradicts itself", name);
    return LOCI_OK;
}

static uint32_t read_varint(loci_reader *reader) {
    uint32_t value = 0;
    for (unsigned shift = 0; shift < 35; shift += 7) {
        uint8_t byte = loci_read_u8(reader);
        value |= (uint32_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return value;
    }
    reader->failed = true;
    return 0;
}

loci_status loci_term_block_find(const loci_term_block *block, uint64_t hash, const char *name,
                                 loci_term_fn fn, void *ctx, loci_error *err) {
    uint32_t low = 0, high = block->terms;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (u64_at(block->hashes, middle) < hash)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == block->terms || u64_at(block->hashes, low) != hash) return LOCI_OK;
    uint32_t begin = low > 0 ? u32_at(block->ends, low - 1) : 0, end = u32_at(block->ends, low);
    bool good = begin <= end && end <= u32_at(block->ends, block->terms - 1);
    uint64_t segment = 0;
    loci_reader reader =
        loci_reader_of(loci_slice_of(block->postings + begin, good ? end - begin : 0));
    while (good && reader.at < reader.len) {
        segment += read_varint(&reader);
        uint32_t times = read_varint(&reader);
        good = !reader.failed && segment < block->segments;
        if (good) fn(ctx, (uint32_t)segment, times);
    }
    if (!good) return loci_fail(err, LOCI_E_CORRUPT, "%s contradicts itself", name);
    return LOCI_OK;
}
