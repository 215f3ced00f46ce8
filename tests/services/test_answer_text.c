/* SPDX-License-Identifier: Apache-2.0
 *
 * The text of an answer as its bytes arrive: whole characters, no white space before it, and of a
 * stock model nothing of the fixed reply, wherever the pieces are cut.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "services/engine/answer_text.h"

static char handed[256];
static unsigned pieces;

static loci_status keep(void *ctx, const char *text, loci_error *err) {
    (void)ctx;
    (void)err;
    assert_true(text[0] != 0);
    strncat(handed, text, sizeof handed - strlen(handed) - 1);
    pieces++;
    return LOCI_OK;
}

/* Feeds `text` in pieces of `step` bytes; what was handed on must be the text at any time. */
static void feed(const char *text, size_t step, bool stock, bool line, const char *expected,
                 bool over) {
    loci_answer_text answer = {.stock = stock,
                               .line = line,
                               .on_piece = keep,
                               .raw = LOCI_BUF_INIT,
                               .text = LOCI_BUF_INIT};
    loci_error err = {0};
    size_t len = strlen(text);
    handed[0] = 0;
    pieces = 0;
    for (size_t at = 0; at < len; at += step) {
        loci_buf_append(&answer.raw, text + at, len - at < step ? len - at : step);
        assert_int_equal(loci_answer_text_take(&answer, false, &err), LOCI_OK);
        assert_memory_equal(handed, expected, strlen(handed));
    }
    assert_int_equal(loci_answer_text_take(&answer, true, &err), LOCI_OK);
    assert_string_equal((const char *)answer.text.data, expected);
    assert_string_equal(handed, expected);
    assert_int_equal(answer.over, over);
    loci_buf_fini(&answer.raw);
    loci_buf_fini(&answer.text);
}

static void test_any_pieces_give_the_same(void **state) {
    (void)state;
    for (size_t step = 1; step < 40; step++) {
        feed(" Gr\xc3\xb6\xc3\x9f"
             "e \xe2\x82\xac 5",
             step, false, false,
             "Gr\xc3\xb6\xc3\x9f"
             "e \xe2\x82\xac 5",
             false);
        feed("  two", step, false, false, " two", false); /* one space is the word's own */
        feed("a\xff\xe2\x82", step, false, false, "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", false);
        feed(" \n\n Two\nlines", step, true, false, "Two\nlines", false);
        feed("\nOne line\nQuestion: next", step, true, true, "One line", true);
        feed("Not in the documents", step, false, false, "Not in the documents", false);
    }
}

static void test_the_fixed_reply_is_no_text(void **state) {
    (void)state;
    for (size_t step = 1; step < 40; step++) {
        feed("Not in the documents.", step, true, false, "", true);
        feed(" \nNOT in the Documents, sorry", step, true, true, "", true);
        feed("Not in Paris", step, true, false, "Not in Paris", false);
        feed("Not in the doc", step, true, false, "Not in the doc", false); /* all there was */
        feed("It is not in the documents", step, true, false, "It is not in the documents", false);
        feed("Not in\nthe documents", step, true, true, "Not in", true);
    }
}

static void test_pieces_come_as_soon_as_they_are_sure(void **state) {
    (void)state;
    feed("Not so fast", 1, true, false, "Not so fast", false);
    assert_int_equal(pieces, 7); /* "Not s", then letter by letter */
    feed("No", 1, false, false, "No", false);
    assert_int_equal(pieces, 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_pieces_give_the_same),
        cmocka_unit_test(test_the_fixed_reply_is_no_text),
        cmocka_unit_test(test_pieces_come_as_soon_as_they_are_sure),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
