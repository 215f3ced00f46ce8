/* SPDX-License-Identifier: Apache-2.0
 *
 * Resource names, page tokens and text helpers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "services/common/names.h"
#include "services/common/text.h"
#include "services/locid/page.h"

static char text_600[601];

static int setup(void **state) {
    (void)state;
    memset(text_600, 'a', 600);
    return 0;
}

static void test_corpus_ids(void **state) {
    (void)state;
    assert_true(loci_corpus_id_valid("a"));
    assert_true(loci_corpus_id_valid("9-lives_of-a-cat"));
    assert_true(loci_corpus_id_valid(text_600 + 600 - 63));
    static const char *const bad[] = {"", "-a", "_a", "A", "a b", "a/b", "a.b", "\xc3\xa4"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_false(loci_corpus_id_valid(bad[i]));
    assert_false(loci_corpus_id_valid(text_600 + 600 - 64));
}

static void test_document_ids(void **state) {
    (void)state;
    assert_true(loci_document_id_valid("guide/chapter 1.md"));
    assert_true(loci_document_id_valid("\xe6\x97\xa5\xe6\x9c\xac.txt"));
    assert_true(loci_document_id_valid(text_600 + 600 - 512));
    static const char *const bad[] = {"",     "a\nb",     "a\x7f",       "\x01",
                                      "\xff", "\xc0\x80", "\xed\xa0\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_false(loci_document_id_valid(bad[i]));
    assert_false(loci_document_id_valid(text_600 + 600 - 513));
}

static void test_names_round_trip(void **state) {
    (void)state;
    char name[LOCI_RESOURCE_MAX], corpus[LOCI_NAME_MAX + 1], id[LOCI_DOCUMENT_ID_MAX + 1];
    loci_error err;
    loci_corpus_name_format(name, "demo");
    assert_string_equal(name, "tenants/default/corpora/demo");
    assert_int_equal(loci_corpus_name_parse(name, "name", corpus, &err), LOCI_OK);
    assert_string_equal(corpus, "demo");
    /* The longest names of all fit, and an id may look like a name. */
    loci_document_name_format(name, text_600 + 600 - 63, text_600 + 600 - 512);
    assert_int_equal(loci_document_name_parse(name, "name", corpus, id, &err), LOCI_OK);
    assert_int_equal(strlen(corpus), 63);
    assert_int_equal(strlen(id), 512);
    loci_document_name_format(name, "demo", "a/documents/b");
    assert_int_equal(loci_document_name_parse(name, "name", corpus, id, &err), LOCI_OK);
    assert_string_equal(id, "a/documents/b");
    assert_string_equal(loci_document_name_id(name), "a/documents/b");
    assert_string_equal(loci_document_name_id("elsewhere"), "elsewhere");
}

static void test_names_refused(void **state) {
    (void)state;
    char corpus[LOCI_NAME_MAX + 1], id[LOCI_DOCUMENT_ID_MAX + 1];
    loci_error err;
    static const char *const bad[] = {"",
                                      "demo",
                                      "tenants/other/corpora/demo",
                                      "tenants/default/corpora/",
                                      "tenants/default/corpora/A",
                                      "tenants/default/corpora/demo/documents/x"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(loci_corpus_name_parse(bad[i], "corpus", corpus, &err), LOCI_E_INVAL);
        assert_string_equal(err.reason, "INVALID_CORPUS_NAME");
        assert_non_null(strstr(err.text, "field corpus"));
    }
    static const char *const bad_documents[] = {"",
                                                "tenants/default/corpora/demo",
                                                "tenants/default/corpora/demo/documents/",
                                                "tenants/default/corpora/Demo/documents/a",
                                                "tenants/default/corpora/demo/segments/a",
                                                "tenants/default/corpora/demo/documents/a\nb"};
    for (size_t i = 0; i < sizeof bad_documents / sizeof bad_documents[0]; i++) {
        assert_int_equal(loci_document_name_parse(bad_documents[i], "name", corpus, id, &err),
                         LOCI_E_INVAL);
        assert_string_equal(err.reason, "INVALID_DOCUMENT_NAME");
    }
    assert_int_equal(loci_parent_check("tenants/default", "parent", &err), LOCI_OK);
    assert_int_equal(loci_parent_check("tenants/other", "parent", &err), LOCI_E_INVAL);
}

static void test_page_sizes(void **state) {
    (void)state;
    loci_error err;
    size_t size = 0;
    assert_int_equal(loci_page_size(0, &size, &err), LOCI_OK);
    assert_int_equal(size, LOCI_PAGE_DEFAULT);
    assert_int_equal(loci_page_size(7, &size, &err), LOCI_OK);
    assert_int_equal(size, 7);
    assert_int_equal(loci_page_size(INT32_MAX, &size, &err), LOCI_OK);
    assert_int_equal(size, LOCI_PAGE_MAX);
    assert_int_equal(loci_page_size(-1, &size, &err), LOCI_E_INVAL);
    assert_string_equal(err.reason, "INVALID_PAGE_SIZE");
}

static void test_page_tokens(void **state) {
    (void)state;
    loci_error err;
    char cursor[LOCI_CURSOR_MAX + 1];
    for (size_t len = 0; len <= 512; len += len < 8 ? 1 : 63) {
        loci_buf token = LOCI_BUF_INIT;
        loci_page_token_make("List", "parent", text_600 + 600 - len, &token);
        char *text = (char *)(uintptr_t)loci_buf_text(&token);
        assert_int_equal(loci_page_token_open("List", "parent", text, cursor, &err), LOCI_OK);
        assert_string_equal(cursor, text_600 + 600 - len);
        /* Other arguments, another method, and any changed character are refused. */
        assert_int_equal(loci_page_token_open("List", "other", text, cursor, &err), LOCI_E_INVAL);
        assert_int_equal(loci_page_token_open("Other", "parent", text, cursor, &err), LOCI_E_INVAL);
        for (size_t i = 0; i < token.len; i++) {
            char kept = text[i];
            text[i] = kept == 'A' ? 'B' : 'A';
            assert_int_equal(loci_page_token_open("List", "parent", text, cursor, &err),
                             LOCI_E_INVAL);
            text[i] = '!';
            assert_int_equal(loci_page_token_open("List", "parent", text, cursor, &err),
                             LOCI_E_INVAL);
            text[i] = kept;
        }
        /* Bits that no byte needs are refused too: a token has one spelling. */
        char last = text[token.len - 1];
        for (char c = 'A'; c <= 'Z'; c++) {
            text[token.len - 1] = c;
            if (c != last)
                assert_int_equal(loci_page_token_open("List", "parent", text, cursor, &err),
                                 LOCI_E_INVAL);
        }
        text[token.len - 1] = '\0';
        assert_int_equal(loci_page_token_open("List", "parent", text, cursor, &err), LOCI_E_INVAL);
        assert_string_equal(err.reason, "INVALID_PAGE_TOKEN");
        loci_buf_fini(&token);
    }
    assert_int_equal(loci_page_token_open("List", "parent", "", cursor, &err), LOCI_OK);
    assert_string_equal(cursor, "");
    char endless[4001];
    memset(endless, 'A', 4000);
    endless[4000] = '\0';
    assert_int_equal(loci_page_token_open("List", "parent", endless, cursor, &err), LOCI_E_INVAL);
}

static void test_utf8(void **state) {
    (void)state;
    static const char *const good[] = {"",
                                       "plain",
                                       "\xc2\x80",
                                       "\xe0\xa0\x80",
                                       "\xef\xbf\xbf",
                                       "\xf0\x90\x80\x80",
                                       "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80",
                                      "\xc0\xaf",
                                      "\xc1\xbf",
                                      "\xc2",
                                      "\xe0\x80\x80",
                                      "\xe0\xa0",
                                      "\xed\xa0\x80",
                                      "\xf0\x80\x80\x80",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "a\xff"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        assert_true(loci_utf8_valid(loci_slice_text(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_false(loci_utf8_valid(loci_slice_text(bad[i])));
        loci_buf clean = LOCI_BUF_INIT;
        loci_utf8_append_clean(&clean, loci_slice_text(bad[i]));
        assert_true(loci_utf8_valid(loci_slice_of(clean.data, clean.len)));
        loci_buf_fini(&clean);
    }
}

static void test_numbers(void **state) {
    (void)state;
    uint64_t n = 0;
    double d = 0;
    assert_true(loci_parse_size("268435456", &n) && n == 268435456);
    assert_true(loci_parse_size("256M", &n) && n == 256ull << 20);
    assert_true(loci_parse_size("1.5g", &n) && n == 3ull << 29);
    assert_true(loci_parse_size("2GiB", &n) && n == 2ull << 30);
    static const char *const bad_sizes[] = {"", "M", "-1", "1X", "1MM", "1 M", "1e30", "nan"};
    for (size_t i = 0; i < sizeof bad_sizes / sizeof bad_sizes[0]; i++)
        assert_false(loci_parse_size(bad_sizes[i], &n));
    assert_true(loci_parse_u64("18446744073709551615", 0, UINT64_MAX, &n) && n == UINT64_MAX);
    assert_false(loci_parse_u64("18446744073709551616", 0, UINT64_MAX, &n));
    assert_false(loci_parse_u64("-1", 0, UINT64_MAX, &n));
    assert_false(loci_parse_u64("5", 6, 9, &n));
    assert_true(loci_parse_double("0.25", 0, 1, &d) && d > 0.249 && d < 0.251);
    assert_false(loci_parse_double("nan", 0, 1, &d));
    assert_false(loci_parse_double("1.1", 0, 1, &d));
    assert_false(loci_parse_double("", 0, 1, &d));
    char out[32];
    assert_string_equal(loci_format_count(out, 1234567), "1,234,567");
    assert_string_equal(loci_format_count(out, 999), "999");
    assert_string_equal(loci_format_size(out, 1536), "1.50 KiB");
    assert_string_equal(loci_format_size(out, 12), "12 B");
}

static void test_addresses(void **state) {
    (void)state;
    loci_error err;
    bool local = false;
    static const char *const here[] = {"127.0.0.1:7411", "127.8.9.10:0", "localhost:1", "[::1]:5",
                                       "unix:/run/loci.sock"};
    static const char *const there[] = {
        "0.0.0.0:7411",  "10.0.0.1:80", "[::]:80", "example.org:80", "127.0.0.1.example.org:80",
        "1270.0.0.1:80", "[fe80::1]:80"};
    static const char *const bad[] = {
        "", "7411", ":7411", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "::1:80", "unix:"};
    for (size_t i = 0; i < sizeof here / sizeof here[0]; i++) {
        assert_int_equal(loci_address_check(here[i], &local, &err), LOCI_OK);
        assert_true(local);
    }
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++) {
        assert_int_equal(loci_address_check(there[i], &local, &err), LOCI_OK);
        assert_false(local);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_int_equal(loci_address_check(bad[i], &local, &err), LOCI_E_INVAL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_corpus_ids),
        cmocka_unit_test(test_document_ids),
        cmocka_unit_test(test_names_round_trip),
        cmocka_unit_test(test_names_refused),
        cmocka_unit_test(test_page_sizes),
        cmocka_unit_test(test_page_tokens),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_addresses),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
