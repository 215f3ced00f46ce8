/* SPDX-License-Identifier: Apache-2.0
 *
 * Segments of documents: limits, exact ranges, coverage, resuming at any border.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "services/engine/split.h"

static loci_tokenizer *tokenizer;

static int open_tokenizer(void **state) {
    (void)state;
    loci_error err = {0};
    return loci_tokenizer_open("model/default/tokenizer.json", &tokenizer, &err) == LOCI_OK ? 0
                                                                                            : -1;
}

static int close_tokenizer(void **state) {
    (void)state;
    loci_tokenizer_close(tokenizer);
    return 0;
}

/* Words, sentences, paragraphs, headings, lists, long words, bytes that are not UTF-8. */
static void random_text(uint64_t seed, size_t bytes, loci_buf *out) {
    static const char *const parts[] = {"mirror",        "The",         "dome",     "of",
                                        "12.5",          "observatory", "is",       "closed",
                                        "M\xc3\xbcller", "\"quoted\"",  "\xff\xfe", "a"};
    static const char *const ends[] = {". ", "? ", "! ", ".\n\n", "\n", "\n- ", "\n# ", ", ", " "};
    while (out->len < bytes) {
        uint64_t r = loci_rng_next(&seed);
        loci_buf_append_text(out, parts[r % 12]);
        loci_buf_append_text(out, (r >> 8) % 6 == 0 ? ends[(r >> 16) % 9] : " ");
        if ((r >> 24) % 400 == 0) {
            for (int i = 0; i < 3000; i++) loci_buf_u8(out, (uint8_t)('a' + i % 26));
        }
    }
}

static void check_split(loci_slice text, const loci_split *split, uint32_t tokens_max) {
    uint64_t at = 0;
    for (uint32_t s = 0; s < split->segments; s++) {
        assert_true(split->start[s] >= at && split->end[s] > split->start[s]);
        for (uint64_t i = at; i < split->start[s]; i++) /* only white space is left out */
            assert_non_null(strchr(" \t\n\r\v\f", text.data[i]));
        assert_true(split->begin[s + 1] - split->begin[s] <= tokens_max + 1);
        assert_true(split->begin[s + 1] - split->begin[s] >= 2);
        assert_int_equal(split->tokens[split->begin[s]], 3);
        at = split->end[s];
    }
    for (uint64_t i = at; i < split->next; i++)
        assert_non_null(strchr(" \t\n\r\v\f", text.data[i]));
}

static void test_split_covers_and_limits(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        loci_buf text = LOCI_BUF_INIT;
        loci_error err = {0};
        loci_splitter *splitter;
        const loci_split *split;
        random_text(seed, 40000, &text);
        loci_slice slice = loci_slice_of(text.data, text.len);
        assert_int_equal(loci_splitter_open(tokenizer, 255, 3, &splitter, &err), LOCI_OK);
        assert_int_equal(loci_splitter_split(splitter, slice, 0, 10000, &split, &err), LOCI_OK);
        assert_int_equal(split->next, text.len);
        check_split(slice, split, 255);
        loci_splitter_close(splitter);
        loci_buf_fini(&text);
    }
}

/* Cutting three segments at a time gives the same segments as cutting all at once. */
static void test_split_resumes_anywhere(void **state) {
    (void)state;
    loci_buf text = LOCI_BUF_INIT;
    loci_error err = {0};
    loci_splitter *whole, *parts;
    const loci_split *all, *some;
    random_text(77, 60000, &text);
    loci_slice slice = loci_slice_of(text.data, text.len);
    assert_int_equal(loci_splitter_open(tokenizer, 255, 3, &whole, &err), LOCI_OK);
    assert_int_equal(loci_splitter_open(tokenizer, 255, 3, &parts, &err), LOCI_OK);
    assert_int_equal(loci_splitter_split(whole, slice, 0, 10000, &all, &err), LOCI_OK);
    uint64_t at = 0;
    uint32_t seen = 0;
    while (at < text.len) {
        assert_int_equal(loci_splitter_split(parts, slice, at, 3, &some, &err), LOCI_OK);
        for (uint32_t s = 0; s < some->segments; s++, seen++) {
            assert_int_equal(some->start[s], all->start[seen]);
            assert_int_equal(some->end[s], all->end[seen]);
        }
        assert_true(some->next > at);
        at = some->next;
    }
    assert_int_equal(seen, all->segments);
    loci_splitter_close(whole);
    loci_splitter_close(parts);
    loci_buf_fini(&text);
}

/* Text without any border, and white space of megabytes: quotes stay short, and the work linear
 * (the quadratic splitter took minutes here). */
static void test_split_without_borders(void **state) {
    (void)state;
    loci_buf text = LOCI_BUF_INIT;
    loci_error err = {0};
    loci_splitter *splitter;
    const loci_split *split;
    for (int i = 0; i < 60000; i++) loci_buf_printf(&text, "%d,value ", i % 9973);
    for (int i = 0; i < 3000000; i++) loci_buf_u8(&text, ' ');
    loci_buf_append_text(&text, "The end.");
    loci_slice slice = loci_slice_of(text.data, text.len);
    assert_int_equal(loci_splitter_open(tokenizer, 255, 3, &splitter, &err), LOCI_OK);
    assert_int_equal(loci_splitter_split(splitter, slice, 0, 100000, &split, &err), LOCI_OK);
    check_split(slice, split, 255);
    assert_int_equal(split->next, text.len);
    for (uint32_t s = 0; s < split->segments; s++)
        assert_true(split->end[s] - split->start[s] < 16384);
    loci_splitter_close(splitter);
    loci_buf_fini(&text);
}

static void test_split_white_space_only(void **state) {
    (void)state;
    loci_error err = {0};
    loci_splitter *splitter;
    const loci_split *split;
    assert_int_equal(loci_splitter_open(tokenizer, 255, 3, &splitter, &err), LOCI_OK);
    assert_int_equal(loci_splitter_split(splitter, loci_slice_text(" \n\t\n "), 0, 8, &split, &err),
                     LOCI_OK);
    assert_int_equal(split->segments, 0);
    assert_int_equal(split->next, 5);
    loci_splitter_close(splitter);
}

static void check_passage(const char *text, const char *expected) {
    loci_buf out = LOCI_BUF_INIT;
    loci_passage_text(loci_slice_text(text), &out);
    assert_string_equal(loci_buf_text(&out), expected);
    loci_buf_fini(&out);
}

static void test_passage_text(void **state) {
    (void)state;
    check_passage("  One  two\nthree\t four ", " One two three four");
    check_passage("First line.\n\n\nSecond.", " First line.\nSecond.");
    check_passage("# Title\nBody text.", " # Title\nBody text.");
    check_passage("Steps:\n- one\n- two\n3. three", " Steps:\n- one\n- two\n3. three");
}

static void test_sentence_around(void **state) {
    (void)state;
    const char *text = "The dome opens. It holds 38 litres. Then it closes.";
    uint64_t from, to, at = (uint64_t)(strstr(text, "38") - text);
    loci_sentence_around(loci_slice_text(text), at, at + 9, &from, &to);
    assert_int_equal(from, 16);
    assert_int_equal(to, 35);
    loci_sentence_around(loci_slice_text(text), 4, at, &from, &to);
    assert_int_equal(from, 0);
    assert_int_equal(to, 35);
    loci_sentence_around(loci_slice_text(" a. "), 1, 2, &from, &to);
    assert_int_equal(from, 1);
    assert_int_equal(to, 3);
}

static void test_sentences(void **state) {
    (void)state;
    static const char *const sentences[] = {
        "# St. Ann", "Dr. J. Crane came in May.", "He left, cf. p. 5!", "- \"No.\"", "Why?", "Mr."};
    loci_slice text = loci_slice_text(
        "\n# St. Ann\nDr. J. Crane came in May.  He left, cf. p. 5!\n- \"No.\" Why?\n\nMr.\n\n");
    uint64_t at = 0, from, to;
    for (size_t i = 0; i < sizeof sentences / sizeof sentences[0]; i++) {
        assert_true(loci_sentence_next(text, &at, &from, &to));
        assert_true(loci_slice_equal(loci_slice_of(text.data + from, to - from),
                                     loci_slice_text(sentences[i])));
    }
    assert_false(loci_sentence_next(text, &at, &from, &to));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_split_covers_and_limits),
        cmocka_unit_test(test_split_resumes_anywhere),
        cmocka_unit_test(test_split_without_borders),
        cmocka_unit_test(test_split_white_space_only),
        cmocka_unit_test(test_passage_text),
        cmocka_unit_test(test_sentence_around),
        cmocka_unit_test(test_sentences),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}
