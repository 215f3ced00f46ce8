/* SPDX-License-Identifier: Apache-2.0
 *
 * Normalization form C: equal to utf8proc's own (which does it all at once, and in quadratic time)
 * on random text of the kinds of characters that it treats differently; where changes are said to
 * have come from; and that hostile text takes no longer than other text.
 */
#include "support.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/clock.h"
#include "model/nfc.h"

/* First and number of code points: letters, marks of many classes, Hangul, Indic vowels,
 * singletons, exclusions; none that came after Unicode 9. */
static const uint32_t ranges[][2] = {
    {0x41, 58},       {0xc0, 0x180},   {0x300, 0x70},    {0x591, 0x80},   {0x900, 0xfe},
    {0xa00, 0x23c},   {0xc3d, 0xfe},   {0xd3d, 0x17d},   {0x1100, 0x100}, {0xac00, 0x60},
    {0x1e00, 0x200},  {0x2000, 0x200}, {0x3040, 0x60},   {0xf900, 0x300}, {0x1d150, 0x80},
    {0x11080, 0x2bb}, {0x20, 0x8d},    {0x20000, 0xfffe}};

static size_t random_text(uint32_t *seed, uint8_t *text, size_t characters) {
    size_t len = 0;
    for (size_t i = 0; i < characters; i++) {
        uint32_t r = xorshift(seed) % (sizeof ranges / sizeof ranges[0] + 3);
        if (r >= sizeof ranges / sizeof ranges[0]) r = 2; /* marks, more often */
        uint32_t c = ranges[r][0] + xorshift(seed) % ranges[r][1];
        if (c >= 0xd800 && c < 0xe000) c = 0x301;
        len += (size_t)utf8proc_encode_char((utf8proc_int32_t)c, text + len);
    }
    return len;
}

static void check_origins(const loci_nfc *nfc, size_t len) {
    for (size_t i = 0; i < nfc->count; i++) {
        const loci_nfc_change *c = &nfc->changes[i], *before = i ? c - 1 : NULL;
        assert_true(c->end > c->begin && c->end <= nfc->text.len && c->origin <= len);
        assert_true(!before || (c->begin >= before->end && c->origin > before->origin));
    }
    uint32_t ends[2] = {(uint32_t)nfc->text.len, (uint32_t)nfc->text.len};
    loci_nfc_origins(nfc, ends, 2);
    assert_int_equal(ends[0], len);
    assert_int_equal(ends[1], len);
}

static void test_equals_the_library(void **state) {
    (void)state;
    loci_nfc nfc = {0};
    loci_error err;
    unsigned changes = 0;
    for (uint32_t start = 1; start <= 20000; start++) {
        uint32_t seed = start * 2654435761u | 1u;
        uint8_t text[4 * 24];
        size_t len = random_text(&seed, text, xorshift(&seed) % 24);
        utf8proc_uint8_t *expected = NULL;
        utf8proc_ssize_t want =
            utf8proc_map(text, (utf8proc_ssize_t)len, &expected,
                         (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
        assert_true(want >= 0);
        bool changed;
        assert_int_equal(loci_nfc_run(&nfc, loci_slice_of(text, len), &changed, &err), LOCI_OK);
        bool differs = (size_t)want != len || memcmp(expected, text, len) != 0;
        if (changed != differs) fail_msg("seed %u: changed %d, not %d", start, changed, differs);
        if (changed &&
            ((size_t)want != nfc.text.len || memcmp(expected, nfc.text.data, nfc.text.len) != 0))
            fail_msg("seed %u: another normal form", start);
        if (changed) check_origins(&nfc, len);
        changes += changed;
        free(expected);
    }
    assert_true(changes > 5000);
    loci_nfc_fini(&nfc);
}

static const struct {
    const char *text, *normal; /* NULL: the same */
} forms[] = {
    {"", NULL},
    {"plain ASCII", NULL},
    {"d\u00e9j\u00e0 \u4e2d\u6587 \uac00\uac01", NULL},
    {"e\u0301", "\u00e9"},
    {"xe\u0301y", "x\u00e9y"},
    {"\u0301e", NULL},                 /* a mark with nothing to stand on */
    {"a\u0302\u0323", "\u1ead"},       /* ordered, then composed twice */
    {"a\u0338\u0302", "\u00e2\u0338"}, /* an overlay blocks nothing above */
    {"a\u0315\u0300\u05ae\u0300b", "\u00e0\u05ae\u0300\u0315b"},
    {"\u212b\u2126", "\u00c5\u03a9"}, /* singletons */
    {"\u0958", "\u0915\u093c"},       /* excluded from composition */
    {"\u1100\u1161\u11a8", "\uac01"}, /* Hangul */
    {"\uac00\u11a8\u11a8", "\uac01\u11a8"},
    {"\u0b47\u0b3e", "\u0b4b"}, /* vowels of class 0 */
    {"\u0344", "\u0308\u0301"},
    {"a\u0898\u0323", NULL}, /* a mark of Unicode 14 neither moves nor composes */
    {"\U00011935\U00011930", NULL},
    {"\U00011938\u0323\u0301", NULL},
    {"e\xff\u0301", NULL}, /* nothing composes across bytes that are not UTF-8 */
    {"\xc3\x28 \xe2\x82 e\u0301\xf0\x9f", "\xc3\x28 \xe2\x82 \u00e9\xf0\x9f"},
};

static void test_known_forms(void **state) {
    (void)state;
    loci_nfc nfc = {0};
    loci_error err;
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        bool changed;
        loci_slice text = loci_slice_text(forms[i].text);
        assert_int_equal(loci_nfc_run(&nfc, text, &changed, &err), LOCI_OK);
        if (changed != (forms[i].normal != NULL)) fail_msg("form %zu: changed %d", i, changed);
        if (!changed) continue;
        if (strcmp(loci_buf_text(&nfc.text), forms[i].normal) != 0)
            fail_msg("form %zu: \"%s\"", i, (const char *)nfc.text.data);
        check_origins(&nfc, text.len);
    }
    loci_nfc_fini(&nfc);
}

static void test_origins(void **state) {
    (void)state;
    /* a + (e, acute -> 2 bytes) + bc + (U+0958 -> 6 bytes) + d */
    loci_nfc nfc = {0};
    loci_error err;
    bool changed;
    assert_int_equal(loci_nfc_run(&nfc, loci_slice_text("ae\u0301bc\u0958d"), &changed, &err),
                     LOCI_OK);
    assert_int_equal(nfc.count, 2);
    uint32_t ends[] = {1, 2, 3, 4, 5, 6, 8, 11, 12};
    static const uint32_t expected[] = {1, 4, 4, 5, 6, 9, 9, 9, 10};
    loci_nfc_origins(&nfc, ends, 9);
    for (size_t i = 0; i < 9; i++) assert_int_equal(ends[i], expected[i]);
    loci_nfc_fini(&nfc);
}

/* Marks in falling order of class, over and over: the worst case of an ordering by exchange. */
static void test_hostile_text_is_not_slow(void **state) {
    (void)state;
    enum { MARKS = 400000 };
    char *text = malloc(2 * MARKS + 1);
    assert_non_null(text);
    text[0] = 'a';
    for (size_t i = 0; i < MARKS; i++)
        memcpy(text + 1 + 2 * i, i < MARKS / 2 ? "\u0301" : "\u0323", 2);
    loci_nfc nfc = {0};
    loci_error err;
    bool changed;
    uint64_t begin = loci_now_ns();
    assert_int_equal(
        loci_nfc_run(&nfc, loci_slice_of((uint8_t *)text, 2 * MARKS + 1), &changed, &err), LOCI_OK);
    assert_true(changed);
    assert_memory_equal(nfc.text.data, "\u1ea1\u0323", 5);
    assert_true(loci_now_ns() - begin < 20 * UINT64_C(1000000000));
    loci_nfc_fini(&nfc);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_the_library),
        cmocka_unit_test(test_known_forms),
        cmocka_unit_test(test_origins),
        cmocka_unit_test(test_hostile_text_is_not_slow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
