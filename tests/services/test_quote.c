/* SPDX-License-Identifier: Apache-2.0
 *
 * Which sentences of a passage are quoted, and where an answer stands in a text.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/rng.h"
#include "services/common/text.h"
#include "services/engine/quote.h"

#define HEADING "# The orchid house\n\n"
#define HEATED "The orchid house is heated to 21 degrees."
#define KEEPER "Its keeper is Dr. Dagny\nHolmqvist, who came in 1998."
#define PLANTS "The house has 340 plants and is closed on Mondays."
#define SECOND "Dagny Holmqvist waters them."
#define PASSAGE HEADING HEATED "  " KEEPER " " PLANTS "\n\n" SECOND "\n"

static void expect(const char *passage, const char *question, const char *answer,
                   const char *expected) {
    uint64_t from, to;
    loci_quote_choose(loci_slice_text(passage), loci_slice_text(question), loci_slice_text(answer),
                      &from, &to);
    assert_true(from <= to && to <= strlen(passage));
    if (!loci_slice_equal(loci_slice_of(passage + from, to - from), loci_slice_text(expected)))
        fail_msg("%s / %s: quoted \"%.*s\"", question, answer, (int)(to - from), passage + from);
}

static void test_the_sentence_that_holds_the_answer(void **state) {
    (void)state;
    expect(PASSAGE, "How warm is it there?", "21 degrees", HEATED);
    expect(PASSAGE, "How many plants?", " 340 PLANTS ", PLANTS);
    expect(PASSAGE, "When did the keeper come?", "1998", KEEPER);
    /* Over several sentences, over paragraphs. */
    expect(PASSAGE, "?", "degrees. Its keeper", HEATED "  " KEEPER);
    expect(PASSAGE, "?", "Mondays. Dagny", PLANTS "\n\n" SECOND);
    /* Of several places the one that fits the question, whatever the white space. */
    expect(PASSAGE, "Who is the keeper?", "Dagny  Holmqvist", KEEPER);
    expect(PASSAGE, "Who waters the orchids?", "Dagny Holmqvist", SECOND);
    expect(PASSAGE, "?", "The orchid house", HEATED);
    expect("# Room 12", "?", "room 12", "# Room 12");
}

static void test_else_the_most_similar_sentence(void **state) {
    (void)state;
    expect(PASSAGE, "On which days is the orchid house closed?", "", PLANTS);
    expect(PASSAGE, "When is it open?", "not on Mondays", PLANTS);
    /* Part of a word is not the word; headings are never quoted for their words. */
    expect(PASSAGE, "Is it heated?", "1 degree", HEATED);
    expect(PASSAGE, "house?", "", HEATED);
    expect("Of the men and of the ships. A captain is there.", "Who of the crew is captain?", "",
           "A captain is there.");
    expect("He came\xe2\x80\x94Olaf Berg\xe2\x80\x94late. She went.", "Olaf", "",
           "He came\xe2\x80\x94Olaf Berg\xe2\x80\x94late.");
    /* U+206F separates, U+2074 and U+207F are letters like others. */
    expect("Then a\xe2\x81\xaf"
           "bc came. He came bc.",
           "bc", "",
           "Then a\xe2\x81\xaf"
           "bc came.");
    expect("Then a\xe2\x81\xb4"
           "bc came. He came bc.",
           "bc", "", "He came bc.");
    expect("Then a\xe2\x81\xbf"
           "bc came. He came bc.",
           "bc", "", "He came bc.");
    expect("Der Turm ist hoch. Die M\xc3\xbchle mahlt.", "Wo ist die M\xc3\xbchle?", "",
           "Die M\xc3\xbchle mahlt.");
}

static void test_else_the_passage(void **state) {
    (void)state;
    expect(PASSAGE, "Wo?", "dort", PASSAGE);
    expect(PASSAGE, "", "", PASSAGE);
    expect(" \n", "Wo?", "dort", " \n");
    expect("", "Wo?", "dort", "");
}

/* Any bytes: a range inside, on the same input the same, and it holds the answer that stands in. */
static void test_any_bytes(void **state) {
    (void)state;
    static const char letters[] = "ab A.\n\xe2\x80\x94#1 \xff\xc3\xa4-?";
    uint64_t seed = 31;
    for (int round = 0; round < 20000; round++) {
        char text[48], answer[8];
        size_t len = loci_rng_next(&seed) % sizeof text, at = 0;
        for (size_t i = 0; i < len; i++)
            text[i] = letters[loci_rng_next(&seed) % (sizeof letters - 1)];
        size_t most = len < sizeof answer ? len : sizeof answer;
        size_t answer_len = most > 0 ? loci_rng_next(&seed) % most : 0;
        if (len > answer_len) at = loci_rng_next(&seed) % (len - answer_len);
        memcpy(answer, text + at, answer_len);
        loci_slice passage = loci_slice_of(text, len), wanted = loci_slice_of(answer, answer_len);
        uint64_t from, to;
        size_t start, end;
        loci_quote_choose(passage, loci_slice_text("a ab \xe2"), wanted, &from, &to);
        assert_true(from <= to && to <= len);
        if (loci_text_find(passage, 0, wanted, &start, &end))
            assert_true(
                loci_text_find(loci_slice_of(text + from, to - from), 0, wanted, &start, &end));
    }
}

static void expect_found(const char *text, const char *wanted, int start, int end) {
    size_t at = 0, stop = 0;
    bool found = loci_text_find(loci_slice_text(text), 0, loci_slice_text(wanted), &at, &stop);
    assert_int_equal(found, start >= 0);
    if (!found) return;
    assert_int_equal(at, start);
    assert_int_equal(stop, end);
}

static void test_text_find(void **state) {
    (void)state;
    expect_found("38 litres", "38 litres", 0, 9);
    expect_found("has 38 \n\tLitres.", "38 litreS", 4, 15);
    expect_found("a 138 38", "38", 6, 8);
    expect_found("a 38th", "38", -1, 0);
    expect_found("\xc3\xa4"
                 "38\xc3\xa4",
                 " 38\n", 2, 4);
    expect_found("(38)", "(38)", 0, 4);
    expect_found("a b", "ab", -1, 0);
    expect_found("ab", "a b", -1, 0);
    expect_found("a", "a b", -1, 0);
    expect_found("any", " ", -1, 0);
    expect_found("", "a", -1, 0);
    size_t at, stop;
    assert_true(loci_text_find(loci_slice_text("x y x"), 1, loci_slice_text("x"), &at, &stop));
    assert_int_equal(at, 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_sentence_that_holds_the_answer),
        cmocka_unit_test(test_else_the_most_similar_sentence),
        cmocka_unit_test(test_else_the_passage),
        cmocka_unit_test(test_any_bytes),
        cmocka_unit_test(test_text_find),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
