/* SPDX-License-Identifier: Apache-2.0
 *
 * Parts of the command line: options, what is registered under which id, and clipped quotes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "services/common/options.h"
#include "services/common/text.h"
#include "services/loci/output.h"
#include "services/loci/sources.h"

/* --- Options ---------------------------------------------------------------------------------- */
typedef struct parsed {
    bool flag;
    int twice;
    const char *text;
    uint64_t number;
    double share;
    loci_option_list list;
    const char *args[16];
    size_t arg_count;
    loci_error err;
} parsed;

static loci_status parse(parsed *p, const char *const *given) {
    *p = (parsed){.twice = -1};
    const loci_option options[] = {
        {"flag", 'f', LOCI_OPTION_FLAG, &p->flag, 0, 0, NULL, ""},
        {"twice", 0, LOCI_OPTION_SWITCH, &p->twice, 0, 0, NULL, ""},
        {"text", 't', LOCI_OPTION_STRING, &p->text, 0, 0, "TEXT", ""},
        {"k", 'k', LOCI_OPTION_U64, &p->number, 1, 100, "N", ""},
        {"share", 0, LOCI_OPTION_DOUBLE, &p->share, 0, 1, "P", ""},
        {"list", 0, LOCI_OPTION_LIST, &p->list, 0, 0, "ITEM", ""},
    };
    char *argv[16] = {(char *)(uintptr_t) "program"};
    int argc = 1;
    for (size_t i = 0; given[i]; i++) argv[argc++] = (char *)(uintptr_t)given[i];
    return loci_options_parse(options, 6, argc, argv, p->args, &p->arg_count, &p->err);
}
#define PARSE(p, ...) parse(p, (const char *const[]){__VA_ARGS__, NULL})

static void test_options(void **state) {
    (void)state;
    parsed p;
    assert_int_equal(PARSE(&p, "one", "-f", "--text", "-x", "two", "-k7", "--share=0.5",
                           "--no-twice", "--list", "a", "--list=b", "-", "--", "--flag"),
                     LOCI_OK);
    assert_true(p.flag);
    assert_int_equal(p.twice, 0);
    assert_string_equal(p.text, "-x");
    assert_int_equal(p.number, 7);
    assert_true(p.share > 0.49 && p.share < 0.51);
    assert_int_equal(p.list.count, 2);
    assert_string_equal(p.list.items[1], "b");
    assert_int_equal(p.arg_count, 4);
    assert_string_equal(p.args[1], "two");
    assert_string_equal(p.args[2], "-");
    assert_string_equal(p.args[3], "--flag");
    assert_int_equal(PARSE(&p, "--twice"), LOCI_OK);
    assert_int_equal(p.twice, 1);
}

static void test_options_refused(void **state) {
    (void)state;
    parsed p;
    static const char *const bad[][2] = {
        {"--colour", NULL},  {"-z", NULL},      {"--flag=1", NULL}, {"--text", NULL},
        {"--k", "0"},        {"--k", "101"},    {"--share", "1.1"}, {"--share", "half"},
        {"--no-flag", NULL}, {"---flag", NULL}, {"--fla", NULL}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const char *const given[] = {bad[i][0], bad[i][1], NULL};
        assert_int_equal(parse(&p, given), LOCI_E_INVAL);
        const char *name = bad[i][0] + strspn(bad[i][0], "-");
        char start[8];
        snprintf(start, sizeof start, "%.3s", name);
        if (!strstr(p.err.text, start)) fail_msg("\"%s\" does not name %s", p.err.text, name);
    }
}

/* --- Sources ---------------------------------------------------------------------------------- */
static char root[64], old_dir[1024];

static void put(const char *name, const char *text) {
    FILE *file = fopen(name, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int make_tree(void **state) {
    (void)state;
    snprintf(root, sizeof root, "/tmp/loci-test-XXXXXX");
    if (!getcwd(old_dir, sizeof old_dir) || !mkdtemp(root) || chdir(root) != 0) return -1;
    mkdir("docs", 0700);
    mkdir("docs/b", 0700);
    mkdir("docs/.git", 0700);
    mkdir("bare", 0700);
    put("docs/z.txt", "z");
    put("docs/a.md", "aa");
    put("docs/b/m.Markdown", "mmm");
    put("docs/b/ignored.pdf", "x");
    put("docs/b/empty.txt", "");
    put("docs/.git/x.txt", "x");
    put("docs/.hidden.md", "x");
    put("rows.jsonl", "{}");
    put("plain.c", "code");
    put("void.txt", "");
    if (symlink("../docs", "docs/loop") != 0) return -1;
    return 0;
}

static int remove_tree(void **state) {
    (void)state;
    static const char *const names[] = {
        "docs/loop",          "docs/z.txt",       "docs/a.md",       "docs/b/m.Markdown",
        "docs/b/ignored.pdf", "docs/b/empty.txt", "docs/.git/x.txt", "docs/.hidden.md",
        "rows.jsonl",         "plain.c",          "void.txt"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) unlink(names[i]);
    static const char *const dirs[] = {"docs/b", "docs/.git", "docs", "bare"};
    for (size_t i = 0; i < 4; i++) rmdir(dirs[i]);
    if (chdir(old_dir) != 0) return -1;
    return rmdir(root);
}

static void test_sources(void **state) {
    (void)state;
    loci_sources sources = {0};
    loci_error err;
    assert_int_equal(loci_sources_add(&sources, "docs", "stdin", false, &err), LOCI_OK);
    assert_int_equal(sources.count, 3);
    assert_string_equal(sources.items[0].id, "a.md");
    assert_string_equal(sources.items[1].id, "b/m.Markdown");
    assert_string_equal(sources.items[1].path, "docs/b/m.Markdown");
    assert_string_equal(sources.items[2].id, "z.txt");
    assert_int_equal(sources.bytes, 6);
    assert_int_equal(sources.skipped_empty, 1);
    assert_int_equal(loci_sources_add(&sources, "./plain.c", "stdin", false, &err), LOCI_OK);
    assert_string_equal(sources.items[3].id, "plain.c");
    assert_int_equal(loci_sources_add(&sources, "docs/z.txt", "stdin", false, &err), LOCI_OK);
    assert_string_equal(sources.items[4].id, "docs/z.txt");
    assert_int_equal(loci_sources_add(&sources, "rows.jsonl", "stdin", false, &err), LOCI_OK);
    assert_int_equal(sources.items[5].kind, LOCI_SOURCE_ROWS);
    assert_int_equal(loci_sources_add(&sources, "-", "typed", false, &err), LOCI_OK);
    assert_string_equal(sources.items[6].id, "typed");
    assert_int_equal(loci_sources_check(&sources, &err), LOCI_OK);
    char absolute[128];
    snprintf(absolute, sizeof absolute, "%s/docs/z.txt", root);
    assert_int_equal(loci_sources_add(&sources, absolute, "stdin", false, &err), LOCI_OK);
    assert_string_equal(sources.items[7].id, "z.txt");
    assert_int_equal(loci_sources_check(&sources, &err), LOCI_E_INVAL); /* docs has a z.txt too */
    assert_non_null(strstr(err.text, "z.txt"));
    loci_sources_fini(&sources);
}

static void test_sources_refused(void **state) {
    (void)state;
    loci_sources sources = {0};
    loci_error err;
    static const char *const bad[] = {"bare", "void.txt", "missing.txt"};
    for (size_t i = 0; i < 3; i++) {
        assert_int_not_equal(loci_sources_add(&sources, bad[i], "stdin", false, &err), LOCI_OK);
        assert_non_null(strstr(err.text, bad[i]));
    }
    loci_sources_fini(&sources);
}

/* --- Quotes ------------------------------------------------------------------------------------
 */
static void expect_clip(const char *quote, const char *answer, size_t width, bool color,
                        const char *expected) {
    loci_buf out = LOCI_BUF_INIT;
    loci_clip_quote(loci_slice_text(quote), answer, width, color, &out);
    assert_string_equal(loci_buf_text(&out), expected);
    loci_buf_fini(&out);
}

static void test_clip(void **state) {
    (void)state;
    expect_clip("  two\n\n words ", "", 80, false, "two words");
    expect_clip("the cryostat holds 38 litres", "38 litres", 80, true,
                "the cryostat holds \x1b[1m38 litres\x1b[0m");
    expect_clip("abcdefghij", "", 4, false, "abcd...");
    expect_clip("aaaaaaaaaa NEEDLE bbbbbbbbbb", "NEEDLE", 12, false, "...aa NEEDLE bb...");
    expect_clip("aaaaaaaaaa NEEDLE", "NEEDLE", 8, true, "...a \x1b[1mNEEDLE\x1b[0m");
    expect_clip("not here", "elsewhere", 80, true, "not here");
    expect_clip("", "x", 80, true, "");
    expect_clip("long answer", "long answer", 4, true, "long...");
    /* Never half a character, never a raw malformed byte. */
    expect_clip("\xc3\xa4\xc3\xa4\xc3\xa4", "", 3, false, "\xc3\xa4...");
    expect_clip("a\xff", "", 80, false, "a\xef\xbf\xbd");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_options_refused),
        cmocka_unit_test_setup_teardown(test_sources, make_tree, remove_tree),
        cmocka_unit_test_setup_teardown(test_sources_refused, make_tree, remove_tree),
        cmocka_unit_test(test_clip),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
