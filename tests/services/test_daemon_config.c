/* SPDX-License-Identifier: Apache-2.0
 *
 * The daemon's configuration: precedence, every refusal by name, and that --print-config gives a
 * file that reads back as the same configuration.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "services/locid/config.h"

#define MODEL "model/default" /* tests run in the repository root */

/* The environment of a test: NAME, VALUE, NAME, VALUE, NULL. */
static const char *const *variables;

static char *lookup(const char *name) {
    for (size_t i = 0; variables && variables[i]; i += 2) {
        if (strcmp(variables[i], name) == 0) return (char *)(uintptr_t)variables[i + 1];
    }
    return NULL;
}

static loci_config config;
static loci_config_request request;
static loci_error err;

/* Arguments after the program's name, up to NULL. */
static loci_status load(const char *const *args) {
    char *argv[32] = {(char *)(uintptr_t) "locid"};
    int argc = 1;
    for (size_t i = 0; args[i]; i++) argv[argc++] = (char *)(uintptr_t)args[i];
    memset(&err, 0, sizeof err);
    return loci_config_load(argc, argv, lookup, &config, &request, &err);
}
#define LOAD(...) load((const char *const[]){__VA_ARGS__, NULL})

static char path[64];

static void write_file(const char *text) {
    snprintf(path, sizeof path, "/tmp/loci-test-config-%ld.yaml", (long)getpid());
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int teardown(void **state) {
    (void)state;
    variables = NULL;
    if (path[0]) unlink(path);
    return 0;
}

static void refused(const char *words) {
    if (!strstr(err.text, words)) fail_msg("\"%s\" does not say \"%s\"", err.text, words);
}

static void test_defaults(void **state) {
    (void)state;
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL), LOCI_OK);
    assert_string_equal(config.data, "/d");
    assert_int_equal(config.listen_count, 1);
    assert_string_equal(config.listen[0], "127.0.0.1:7411");
    assert_string_equal(config.backend, "cpu");
    assert_int_equal(config.memory_bytes, 0);
    assert_int_equal(config.lexical_percent, 100);
    assert_false(config.insecure);
    assert_false(config.log_json);
    assert_int_equal(LOAD("--model", MODEL), LOCI_E_INVAL);
    refused("no data directory");
}

static void test_precedence(void **state) {
    (void)state;
    write_file("data: /file\nengine:\n  threads: 1\n  memory: 300M\nlog: {level: warn}\n");
    static const char *const set[] = {
        "LOCI_ENGINE_THREADS", "2", "LOCI_LOG_LEVEL", "error", "LOCI_MODEL", MODEL, NULL};
    variables = set;
    assert_int_equal(LOAD("--config", path, "--log-level", "debug"), LOCI_OK);
    assert_string_equal(config.data, "/file");           /* file over default */
    assert_int_equal(config.memory_bytes, 300ull << 20); /* file over default */
    assert_int_equal(config.threads, 2);                 /* environment over file */
    assert_string_equal(config.log_level, "debug");      /* flag over environment */
    assert_string_equal(config.model, MODEL);
}

static void test_lists_are_replaced(void **state) {
    (void)state;
    write_file("data: /d\nserver:\n  listen: ['127.0.0.1:1', 'unix:/s']\n");
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_OK);
    assert_int_equal(config.listen_count, 2);
    assert_string_equal(config.listen[1], "unix:/s");
    static const char *const set[] = {"LOCI_SERVER_LISTEN", "127.0.0.1:3,127.0.0.1:4,[::1]:5",
                                      NULL};
    variables = set;
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_OK);
    assert_int_equal(config.listen_count, 3);
    assert_string_equal(config.listen[0], "127.0.0.1:3");
    assert_int_equal(LOAD("--config", path, "--model", MODEL, "--listen", "unix:/t"), LOCI_OK);
    assert_int_equal(config.listen_count, 1);
    assert_string_equal(config.listen[0], "unix:/t");
}

static void test_file_errors_are_named(void **state) {
    (void)state;
    write_file("data: /d\nserver:\n  lissten: ['127.0.0.1:1']\n");
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_E_INVAL);
    refused("lissten");
    refused(path);
    write_file("data: /d\ncolour: blue\n");
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_E_INVAL);
    refused("colour");
    write_file("data: /d\nengine:\n  memory: lots\n");
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_E_INVAL);
    refused("engine.memory \"lots\"");
    write_file("data: [1, 2\n");
    assert_int_equal(LOAD("--config", path, "--model", MODEL), LOCI_E_INVAL);
    write_file("");
    assert_int_equal(LOAD("--config", path, "--model", MODEL, "--data", "/d"), LOCI_OK);
    assert_int_equal(LOAD("--config", "/nowhere.yaml", "--data", "/d"), LOCI_E_INVAL);
    refused("/nowhere.yaml");
}

static void test_values_are_checked(void **state) {
    (void)state;
    assert_int_equal(LOAD("--data", "/d", "--memory", "1023K"), LOCI_E_INVAL);
    refused("1.00 MiB");
    assert_int_equal(LOAD("--data", "/d", "--memory", "1M", "--model", MODEL), LOCI_OK);
    assert_int_equal(LOAD("--data", "/d", "--threads", "many"), LOCI_E_INVAL);
    refused("engine.threads");
    assert_int_equal(LOAD("--data", "/d", "--log-level", "loud"), LOCI_E_INVAL);
    refused("loud");
    assert_int_equal(LOAD("--data", "/d", "--precision", "f8"), LOCI_E_INVAL);
    refused("f8");
    assert_int_equal(LOAD("--data", "/d", "--model", "/nowhere"), LOCI_E_INVAL);
    refused("/nowhere");
    assert_int_equal(LOAD("--data", "/d", "--colour"), LOCI_E_INVAL);
    refused("--colour");
    assert_int_equal(LOAD("--data", "/d", "stray"), LOCI_E_INVAL);
    refused("stray");
    assert_int_equal(LOAD("--data"), LOCI_E_INVAL);
    refused("needs a value");
    static const char *const set[] = {"LOCI_LOG_JSON", "maybe", NULL};
    variables = set;
    assert_int_equal(LOAD("--data", "/d"), LOCI_E_INVAL);
    refused("LOCI_LOG_JSON");
}

static void test_addresses_must_be_local(void **state) {
    (void)state;
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL, "--listen", "0.0.0.0:7411"),
                     LOCI_E_INVAL);
    assert_string_equal(err.reason, "INSECURE_ADDRESS");
    refused("--insecure");
    assert_int_equal(
        LOAD("--data", "/d", "--model", MODEL, "--listen", "unix:/s", "--listen", "[::]:7411"),
        LOCI_E_INVAL);
    assert_int_equal(
        LOAD("--data", "/d", "--model", MODEL, "--listen", "0.0.0.0:7411", "--insecure"), LOCI_OK);
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL, "--listen", "nonsense"), LOCI_E_INVAL);
    assert_string_equal(err.reason, "INVALID_ADDRESS");
}

static void test_print_reads_back(void **state) {
    (void)state;
    assert_int_equal(LOAD("--data", "/it's", "--model", MODEL, "--listen", "unix:/a b", "--listen",
                          "0.0.0.0:1", "--insecure", "--memory", "1G", "--threads", "3",
                          "--queries", "5", "--workers", "7", "--drain-seconds", "9", "--log-level",
                          "warn", "--log-json", "--precision", "f32", "--backend", "other",
                          "--also-model", "tests/data/model/tiny-llama"),
                     LOCI_OK);
    assert_string_equal(config.also_model, "tests/data/model/tiny-llama");
    static loci_config before;
    before = config;
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    loci_config_print(out, &config);
    fclose(out);
    write_file(text);
    free(text);
    assert_int_equal(LOAD("--config", path), LOCI_OK);
    assert_memory_equal(&before, &config, sizeof config);
}

static void test_requests(void **state) {
    (void)state;
    assert_int_equal(LOAD("--help"), LOCI_OK);
    assert_true(request.help);
    assert_int_equal(LOAD("--version"), LOCI_OK);
    assert_true(request.version);
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL, "--check-config"), LOCI_OK);
    assert_int_equal(LOAD("--data", "/d", "--model", "tests/data/model/tiny-llama"), LOCI_OK);
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL, "--also-model", "/nowhere"),
                     LOCI_E_INVAL);
    assert_non_null(strstr(err.text, "/nowhere"));
    assert_int_equal(
        LOAD("--data", "/d", "--model", "tests/data/model/tiny-llama", "--check-config"),
        LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "MODEL_POSITIONS");
    assert_true(request.check);
    assert_int_equal(LOAD("--data", "/d", "--model", MODEL, "--parent", "17"), LOCI_OK);
    assert_int_equal(request.parent, 17);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_defaults, teardown),
        cmocka_unit_test_teardown(test_precedence, teardown),
        cmocka_unit_test_teardown(test_lists_are_replaced, teardown),
        cmocka_unit_test_teardown(test_file_errors_are_named, teardown),
        cmocka_unit_test_teardown(test_values_are_checked, teardown),
        cmocka_unit_test_teardown(test_addresses_must_be_local, teardown),
        cmocka_unit_test_teardown(test_print_reads_back, teardown),
        cmocka_unit_test_teardown(test_requests, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
