/* SPDX-License-Identifier: Apache-2.0
 *
 * Buffers and readers, errors, the thread pool, cancellation.
 */
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/cancel.h"
#include "base/pool.h"

static void test_buf_round_trip(void **state) {
    (void)state;
    loci_buf buf = LOCI_BUF_INIT;
    loci_buf_u8(&buf, 7);
    loci_buf_u32(&buf, 0xdeadbeefu);
    loci_buf_u64(&buf, 0x0123456789abcdefu);
    loci_buf_bytes(&buf, "abc", 3);
    loci_buf_bytes(&buf, NULL, 0);
    assert_int_equal(loci_buf_status(&buf), LOCI_OK);
    assert_int_equal(buf.data[1], 0xef); /* little-endian */
    loci_reader reader = loci_reader_of(loci_slice_of(buf.data, buf.len));
    assert_int_equal(loci_read_u8(&reader), 7);
    assert_int_equal(loci_read_u32(&reader), 0xdeadbeefu);
    assert_true(loci_read_u64(&reader) == 0x0123456789abcdefu);
    assert_true(loci_slice_equal(loci_read_bytes(&reader), loci_slice_text("abc")));
    assert_int_equal(loci_read_bytes(&reader).len, 0);
    assert_true(loci_reader_done(&reader));
    loci_buf_fini(&buf);
}

/* Every truncation of an encoding is noticed, and nothing is read past its end. */
static void test_reader_refuses_truncation(void **state) {
    (void)state;
    loci_buf buf = LOCI_BUF_INIT;
    loci_buf_u64(&buf, 1);
    loci_buf_bytes(&buf, "hello", 5);
    for (size_t len = 0; len < buf.len; len++) {
        loci_reader reader = loci_reader_of(loci_slice_of(buf.data, len));
        loci_read_u64(&reader);
        loci_read_bytes(&reader);
        assert_true(reader.failed);
        assert_false(loci_reader_done(&reader));
        assert_int_equal(loci_read_u8(&reader), 0);
    }
    loci_buf_fini(&buf);
}

static void test_buf_big_endian_orders_keys(void **state) {
    (void)state;
    loci_buf a = LOCI_BUF_INIT, b = LOCI_BUF_INIT;
    loci_buf_u64_big(&a, 255);
    loci_buf_u64_big(&b, 256);
    assert_true(memcmp(a.data, b.data, 8) < 0);
    loci_buf_fini(&a);
    loci_buf_fini(&b);
}

static void test_buf_remembers_failure(void **state) {
    (void)state;
    loci_buf buf = LOCI_BUF_INIT;
    loci_buf_append_text(&buf, "x");
    assert_null(loci_buf_extend(&buf, SIZE_MAX - 4));
    loci_buf_append_text(&buf, "y");
    assert_int_equal(loci_buf_status(&buf), LOCI_E_NOMEM);
    assert_int_equal(buf.len, 1);
    loci_buf_fini(&buf);
}

static void test_error_text_and_prefix(void **state) {
    (void)state;
    loci_error err = {0};
    assert_int_equal(loci_fail_reason(&err, LOCI_E_NOTFOUND, "NO_SUCH", "document %d", 7),
                     LOCI_E_NOTFOUND);
    loci_fail_prefix(&err, LOCI_E_NOTFOUND, "corpus %s", "c");
    assert_string_equal(err.text, "corpus c: document 7");
    assert_string_equal(err.reason, "NO_SUCH");
    assert_int_equal(loci_fail(NULL, LOCI_E_IO, "ignored"), LOCI_E_IO);
}

/* Each status has a text and survives the way over gRPC's codes where the code is its own. */
static void test_status_maps(void **state) {
    (void)state;
#define X(name, value, grpc, text)                            \
    assert_string_equal(loci_status_text(LOCI_##name), text); \
    assert_int_equal(loci_status_to_grpc(LOCI_##name), grpc); \
    assert_int_equal(loci_status_to_grpc(loci_status_from_grpc(grpc)), grpc);
    LOCI_STATUS_MAP(X)
#undef X
    assert_string_equal(loci_status_code_name(LOCI_E_LIMIT), "RESOURCE_EXHAUSTED");
}

typedef struct sum_arg {
    unsigned char seen[1000];
    unsigned threads;
    atomic_int bad_thread;
} sum_arg;

static void mark(void *arg, size_t index, unsigned thread) {
    sum_arg *sum = arg;
    sum->seen[index]++;
    if (thread >= sum->threads) atomic_store(&sum->bad_thread, 1);
}

static void test_pool_runs_each_index_once(void **state) {
    (void)state;
    for (unsigned threads = 1; threads <= 4; threads++) {
        loci_pool *pool;
        loci_error err = {0};
        assert_int_equal(loci_pool_create(threads, &pool, &err), LOCI_OK);
        assert_int_equal(loci_pool_threads(pool), threads);
        for (int round = 0; round < 200; round++) {
            sum_arg sum = {.threads = threads};
            size_t count = (size_t)(round * 5) % 1000;
            loci_pool_run(pool, count, mark, &sum);
            for (size_t i = 0; i < 1000; i++) assert_int_equal(sum.seen[i], i < count ? 1 : 0);
            assert_int_equal(atomic_load(&sum.bad_thread), 0);
        }
        loci_pool_destroy(pool);
    }
    loci_pool_destroy(NULL);
}

static void test_pool_keeps_to_its_cpus(void **state) {
    (void)state;
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    size_t cpu = 0;
    while (!CPU_ISSET(cpu, &before)) cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    loci_pool *pool;
    loci_error err = {0};
    assert_int_equal(loci_pool_create(0, &pool, &err), LOCI_OK);
    assert_int_equal(loci_pool_threads(pool), 1);
    loci_pool_destroy(pool);
    assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
}

static void test_pool_quota(void **state) {
    (void)state;
    static const struct {
        const char *text;
        unsigned cpus;
    } cases[] = {{"200000 100000\n", 2},
                 {"150000 100000\n", 2},
                 {"1000 100000\n", 1},
                 {"max 100000\n", 0},
                 {"100000 0\n", 0},
                 {"0 100000\n", 0},
                 {"100000\n", 0},
                 {"", 0},
                 {"99999999999999999999 1\n", 0}};
    char path[] = "/tmp/loci-quota-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        fputs(cases[i].text, file);
        fclose(file);
        assert_int_equal(loci_pool_quota(path), cases[i].cpus);
    }
    unlink(path);
    assert_int_equal(loci_pool_quota(path), 0);
}

static void test_cancel(void **state) {
    (void)state;
    loci_cancel cancel;
    loci_cancel_init(&cancel, 0);
    assert_int_equal(loci_cancel_check(NULL), LOCI_OK);
    assert_int_equal(loci_cancel_check(&cancel), LOCI_OK);
    loci_cancel_request(&cancel);
    assert_int_equal(loci_cancel_check(&cancel), LOCI_E_CANCELLED);
    loci_cancel_init(&cancel, 1); /* long past */
    assert_int_equal(loci_cancel_check(&cancel), LOCI_E_TIMEOUT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buf_round_trip),
        cmocka_unit_test(test_reader_refuses_truncation),
        cmocka_unit_test(test_buf_big_endian_orders_keys),
        cmocka_unit_test(test_buf_remembers_failure),
        cmocka_unit_test(test_error_text_and_prefix),
        cmocka_unit_test(test_status_maps),
        cmocka_unit_test(test_pool_runs_each_index_once),
        cmocka_unit_test(test_pool_keeps_to_its_cpus),
        cmocka_unit_test(test_pool_quota),
        cmocka_unit_test(test_cancel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
