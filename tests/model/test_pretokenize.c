/* SPDX-License-Identifier: Apache-2.0
 *
 * Where pre-tokenizers cut: pieces as the Hugging Face tokenizers library (0.23) gives them, above
 * all at characters that its Unicode tables and PCRE2's tell apart.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/pretokenize.h"

#define DIGITS(individual) "{\"type\": \"Digits\", \"individual_digits\": " individual "}"
#define BYTES(regex) \
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": " regex "}"
#define SPLIT(kind, pattern)                                       \
    "{\"type\": \"Split\", \"pattern\": {\"" kind "\": \"" pattern \
    "\"}, \"behavior\": \"Isolated\"}"
#define LLAMA3                                                                                   \
    SPLIT("Regex", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+"        \
                   "|\\\\p{N}{1,3}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+" \
                   "|\\\\s+(?!\\\\S)|\\\\s+")

static const struct {
    const char *steps;
    const char *pieces; /* joined by | */
} cuts[] = {
    {DIGITS("true") ", " BYTES("false"), "x|1|2|½|٣|y"},
    {DIGITS("true") ", " BYTES("false"), "a|\U00011de0|\U00016ff5|b"},
    {DIGITS("true") ", " BYTES("false"), "\U000323afa"},
    {DIGITS("false") ", " BYTES("false"), "a|\U00011de0\U00016ff512|b"},
    {BYTES("true"), "It|'s| | a|\u180e|b|\u3000|\u3000|c| 12³|!?|\n\n| d"},
    {BYTES("true"), " \U000323af\u1c89x| \U0001e5f1\U000116d01| \U00011de0"},
    {BYTES("true"), "  \n"},
    {BYTES("true"), ""},
    {DIGITS("true") ", " BYTES("true"), "in| |2|0|2|4|:| | x"},
    {DIGITS("true") ", " BYTES("true"), " |\U00011de0"},
    {LLAMA3 ", " BYTES("false"), "WE|'LL| |123|45| '|\u017f|\r\n\r\n| | (|foo|)\n| | bar"},
    {LLAMA3 ", " BYTES("false"), "a|\u0897\U000323af|!\r\n| x|\u00a0y"},
    {SPLIT("Regex", "\\\\p{M}+|[\\\\p{M}x]") ", " BYTES("false"), "a|\u0897\u0301\U0001e08f|b"},
    {SPLIT("Regex", "\\\\P{L}") ", " BYTES("false"), "a\U000323af|1|b"},
    {SPLIT("String", "a.b") ", " BYTES("false"), "x|a.b|a.b|c a-b"},
    {BYTES("false"), "all of it 12"},
};

typedef struct cutter {
    json_t *root;
    loci_pretokenizer *pretokenizer;
    loci_pieces pieces;
} cutter;

static void open_cutter(cutter *out, const char *steps) {
    char text[1024];
    loci_error err = {0};
    int len =
        snprintf(text, sizeof text,
                 "{\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [%s]}}", steps);
    assert_true(len > 0 && (size_t)len < sizeof text);
    loci_status status = loci_json_parse("the test", text, (size_t)len, &out->root, &err);
    if (status == LOCI_OK)
        status =
            loci_pretokenizer_open(&(loci_json){"the test", out->root}, &out->pretokenizer, &err);
    if (status != LOCI_OK) fail_msg("%s", err.text);
    assert_int_equal(loci_pieces_init(&out->pieces, out->pretokenizer, &err), LOCI_OK);
}

static void close_cutter(cutter *out) {
    loci_pieces_fini(&out->pieces);
    loci_pretokenizer_close(out->pretokenizer);
    json_decref(out->root);
}

static void test_cuts(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        loci_buf text = LOCI_BUF_INIT, joined = LOCI_BUF_INIT;
        for (const char *c = cuts[i].pieces; *c; c++)
            if (*c != '|') loci_buf_u8(&text, (uint8_t)*c);
        cutter c;
        loci_error err;
        open_cutter(&c, cuts[i].steps);
        loci_pieces_start(&c.pieces, loci_slice_of(text.data, text.len));
        for (loci_slice piece;;) {
            assert_int_equal(loci_pieces_next(&c.pieces, &piece, &err), LOCI_OK);
            if (piece.len == 0) break;
            if (joined.len) loci_buf_u8(&joined, '|');
            loci_buf_append(&joined, piece.data, piece.len);
        }
        if (strcmp(loci_buf_text(&joined), cuts[i].pieces) != 0)
            fail_msg("cut %zu: \"%s\", not \"%s\"", i, (const char *)joined.data, cuts[i].pieces);
        close_cutter(&c);
        loci_buf_fini(&joined);
        loci_buf_fini(&text);
    }
}

/* A run that a regex reads to its end and back again is within PCRE2's limits; a regex that tries
 * the parts of a run in every way is stopped, with an error. */
static void test_match_limits(void **state) {
    (void)state;
    enum { LEN = 12 << 20 };
    uint8_t *spaces = malloc(LEN);
    assert_non_null(spaces);
    memset(spaces, ' ', LEN);
    cutter c;
    loci_error err;
    loci_slice piece;
    open_cutter(&c, LLAMA3 ", " BYTES("false"));
    loci_pieces_start(&c.pieces, loci_slice_of(spaces, LEN));
    assert_int_equal(loci_pieces_next(&c.pieces, &piece, &err), LOCI_OK);
    assert_int_equal(piece.len, LEN);
    close_cutter(&c);
    open_cutter(&c, SPLIT("Regex", "(?: +)+[xy]") ", " BYTES("false"));
    loci_pieces_start(&c.pieces, loci_slice_of(spaces, 64));
    assert_int_equal(loci_pieces_next(&c.pieces, &piece, &err), LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "regex gave up"));
    close_cutter(&c);
    free(spaces);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_match_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
