/* SPDX-License-Identifier: Apache-2.0
 *
 * Mapped files: what cannot be read is an error of its mapping, and of nothing else.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/mapping.h"

enum { PAGES = 8, PAGE = 4096, BYTES = PAGES * PAGE - 100 };

/* A file without a name, byte i being i / PAGE + 1. */
static int make_file(void) {
    char path[] = "/tmp/loci-mapping-XXXXXX";
    int file = mkstemp(path);
    uint8_t page[PAGE];
    assert_true(file >= 0);
    unlink(path);
    for (int p = 0; p < PAGES; p++) {
        memset(page, p + 1, sizeof page);
        assert_int_equal(pwrite(file, page, sizeof page, (off_t)p * PAGE), PAGE);
    }
    assert_int_equal(ftruncate(file, BYTES), 0);
    return file;
}

static unsigned long sum_of(const loci_mapping *mapping) {
    const volatile uint8_t *data = loci_mapping_data(mapping);
    unsigned long sum = 0;
    for (size_t i = 0; i < BYTES; i++) sum += data[i];
    return sum;
}

static void *sum_task(void *mapping) {
    return (void *)(uintptr_t)sum_of(mapping);
}

static void test_a_short_file_fails_its_mapping_only(void **state) {
    (void)state;
    loci_error err = {0};
    loci_mapping *good, *bad;
    int file = make_file(), other = make_file();
    assert_int_equal(loci_mapping_open(file, BYTES, "first", &bad, &err), LOCI_OK);
    assert_int_equal(loci_mapping_open(other, BYTES, "second", &good, &err), LOCI_OK);
    unsigned long whole = sum_of(good);
    assert_int_equal(sum_of(bad), whole);
    assert_int_equal(ftruncate(file, 2 * PAGE), 0);
    assert_int_equal(loci_mapping_check(bad, &err), LOCI_OK); /* nothing was read since */
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, sum_task, bad), 0);
    for (int i = 0; i < 4; i++) {
        void *sum;
        assert_int_equal(pthread_join(threads[i], &sum), 0);
        assert_int_equal((uintptr_t)sum, PAGE * 1 + PAGE * 2);
    }
    assert_int_equal(loci_mapping_check(bad, &err), LOCI_E_IO);
    assert_non_null(strstr(err.text, "first could not be read"));
    assert_int_equal(sum_of(good), whole);
    assert_int_equal(loci_mapping_check(good, &err), LOCI_OK);
    loci_mapping_close(bad);
    assert_int_equal(loci_mapping_open(other, BYTES, "third", &bad, &err), LOCI_OK);
    assert_int_equal(loci_mapping_check(bad, &err), LOCI_OK); /* not the failure before it */
    assert_int_equal(sum_of(bad), whole);
    loci_mapping_close(bad);
    loci_mapping_close(good);
    loci_mapping_close(NULL);
    close(file);
    close(other);
}

static void test_many_mappings(void **state) {
    (void)state;
    enum { COUNT = 300 };
    static loci_mapping *mappings[COUNT];
    loci_error err = {0};
    int file = make_file();
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < COUNT; i++)
            assert_int_equal(loci_mapping_open(file, BYTES, "many", &mappings[i], &err), LOCI_OK);
        assert_int_equal(sum_of(mappings[round]), sum_of(mappings[COUNT - 1]));
        for (int i = 0; i < COUNT; i++) loci_mapping_close(mappings[i]);
    }
    close(file);
}

/* The signal of memory that is nobody's mapping still ends the process. */
static void test_other_bus_errors_are_not_hidden(void **state) {
    (void)state;
    loci_error err = {0};
    loci_mapping *mapping;
    int file = make_file();
    pid_t child = fork();
    if (child == 0) {
        signal(SIGBUS, SIG_DFL); /* cmocka has its own */
        alarm(10);
        if (loci_mapping_open(file, BYTES, "ours", &mapping, &err) != LOCI_OK) _exit(4);
        uint8_t *map = mmap(NULL, PAGE * 2, PROT_READ, MAP_SHARED, file, 0);
        if (map == MAP_FAILED || ftruncate(file, 0) != 0) _exit(3);
        _exit(((volatile uint8_t *)map)[PAGE]);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_short_file_fails_its_mapping_only),
        cmocka_unit_test(test_many_mappings),
        cmocka_unit_test(test_other_bus_errors_are_not_hidden),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
