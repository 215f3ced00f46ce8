/* SPDX-License-Identifier: Apache-2.0
 *
 * The calls of the RPC runtime from inside: messages, errors, and ends before time. A foreign
 * client is in test_rpc_foreign.py.
 */
#include "rpc_support.h"

#include <pthread.h>
#include <stdlib.h>

/* ------------------------------------------------------------------ calls */

static void test_unary_answers(void **unused) {
    (void)unused;
    rpc_fixture f;
    char reply[256];
    setenv("http_proxy", "http://127.0.0.1:1", 1); /* must not be used */
    setenv("grpc_proxy", "http://127.0.0.1:1", 1);
    rpc_start(&f, NULL);
    check_ok(unary(&f, "Echo", "hällo", 0, 5000, reply), &f.err);
    assert_string_equal(reply, "hällo");
    check_ok(unary(&f, "Echo", "", 0, 0, reply), &f.err);
    assert_string_equal(reply, "");
    unsetenv("http_proxy");
    unsetenv("grpc_proxy");
    rpc_stop(&f);
}

static void test_errors_carry_reason_and_text(void **unused) {
    (void)unused;
    rpc_fixture f;
    char reply[256];
    rpc_start(&f, NULL);
    const loci_status statuses[] = {LOCI_E_INVAL,     LOCI_E_NOTFOUND,    LOCI_E_EXISTS,
                                    LOCI_E_LIMIT,     LOCI_E_CORRUPT,     LOCI_E_ABORTED,
                                    LOCI_E_CANCELLED, LOCI_E_UNAVAILABLE, LOCI_E_UNSUPPORTED};
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        uint64_t code = (uint64_t)loci_status_to_grpc(statuses[i]);
        assert_int_equal(unary(&f, "Fail", "ñ", code, 5000, reply), statuses[i]);
        assert_string_equal(f.err.text, "asked to fail: ñ");
        assert_string_equal(f.err.reason, "TEST_REASON");
    }
    assert_int_equal(unary(&f, "Nope", "", 0, 5000, reply), LOCI_E_UNSUPPORTED);
    assert_string_equal(f.err.reason, "UNKNOWN_METHOD");
    assert_int_equal(unary(&f, "NoReply", "", 0, 5000, reply), LOCI_E_INTERNAL);
    assert_string_equal(f.err.reason, "INTERNAL");
    assert_int_equal(unary(&f, "TwoReplies", "", 0, 5000, reply), LOCI_E_INTERNAL);
    assert_int_equal(unary(&f, "Big", "", 8 * MIB, 5000, reply), LOCI_E_LIMIT);
    assert_string_equal(f.err.reason, "MESSAGE_TOO_LARGE");
    rpc_stop(&f);
}

static void test_streams_carry_messages(void **unused) {
    (void)unused;
    rpc_fixture f;
    loci_status status;
    rpc_start(&f, NULL);
    loci_rpc_client_call *call = open_call(&f, "Down", 10000, NULL);
    send_text(&f, call, "", 500);
    check_ok(loci_rpc_call_half_close(call, &f.err), &f.err);
    for (uint64_t i = 0; i < 500; i++) assert_int_equal(read_number(&f, call, &status), i);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_OK);
    assert_true(read_number(&f, call, &status) == UINT64_MAX); /* and again */
    assert_int_equal(status, LOCI_OK);
    loci_rpc_call_close(call);

    call = open_call(&f, "Chat", 10000, NULL);
    for (uint64_t i = 0; i < 100; i++) {
        send_text(&f, call, "x", i);
        assert_int_equal(read_number(&f, call, &status), i);
    }
    check_ok(loci_rpc_call_half_close(call, &f.err), &f.err);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_OK);
    loci_rpc_call_close(call);

    uint8_t data[1000] = {1};
    call = open_call(&f, "Up", 10000, NULL);
    for (int i = 0; i < 100; i++) {
        text_message message = text_of("x", 0);
        message.data = (ProtobufCBinaryData){sizeof data, data};
        check_ok(loci_rpc_call_send(call, &message.base, &f.err), &f.err);
    }
    check_ok(loci_rpc_call_half_close(call, &f.err), &f.err);
    assert_int_equal(read_number(&f, call, &status), 100000);
    loci_rpc_call_close(call);
    rpc_stop(&f);
}

/* A handler that leaves without reading: the writer is told and the reader gets the status. */
static void test_early_end_stops_the_writer(void **unused) {
    (void)unused;
    rpc_fixture f;
    loci_status status = LOCI_OK;
    rpc_start(&f, NULL);
    loci_rpc_client_call *call = open_call(&f, "Leave", 10000, NULL);
    text_message message = text_of("x", 0);
    for (int i = 0; i < 100000 && status == LOCI_OK; i++) {
        status = loci_rpc_call_send(call, &message.base, &f.err);
    }
    assert_int_equal(status, LOCI_E_RPC);
    assert_string_equal(f.err.reason, "STREAM_ENDED");
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_OK);
    loci_rpc_call_close(call);
    rpc_stop(&f);
}

typedef struct writer {
    rpc_fixture *f;
    loci_rpc_client_call *call;
    int count;
} writer;

static void *write_messages(void *arg) {
    writer *w = arg;
    loci_error err;
    text_message message = text_of("x", 400);
    for (int i = 0; i < w->count; i++) {
        if (loci_rpc_call_send(w->call, &message.base, &err) != LOCI_OK) abort();
    }
    if (loci_rpc_call_half_close(w->call, &err) != LOCI_OK) abort();
    return NULL;
}

/* Both ends send and receive at once, each from two threads. */
static void test_duplex_from_two_threads(void **unused) {
    (void)unused;
    rpc_fixture f;
    loci_status status;
    rpc_start(&f, NULL);
    writer w = {&f, open_call(&f, "Duplex", 20000, NULL), 400};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, write_messages, &w), 0);
    int count = 0;
    while (read_number(&f, w.call, &status) != UINT64_MAX) count++;
    check_ok(status, &f.err);
    assert_int_equal(count, 401);
    pthread_join(thread, NULL);
    loci_rpc_call_close(w.call);
    rpc_stop(&f);
}

/* ------------------------------------------------------------------ ends before time */

static void test_deadline_reaches_both_ends(void **unused) {
    (void)unused;
    rpc_fixture f;
    char reply[256];
    rpc_start(&f, NULL);
    assert_int_equal(unary(&f, "Sleep", "", 5000, 100, reply), LOCI_E_TIMEOUT);
    wait_for(&f.state.timed_out, 1);
    assert_int_equal(atomic_load(&f.state.cancelled), 0);
    rpc_stop(&f);
}

static void *set_soon(void *arg) {
    loci_sleep_ms(150);
    atomic_store((atomic_int *)arg, 1);
    return NULL;
}

static void test_interrupt_cancels(void **unused) {
    (void)unused;
    rpc_fixture f;
    atomic_int interrupt = 0;
    rpc_start(&f, NULL);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, set_soon, &interrupt), 0);
    text_message request = text_of("", 20000);
    ProtobufCMessage *response;
    uint64_t from = loci_now_ns();
    loci_status status = loci_rpc_unary(f.channel, "/loci.test.Test/Sleep", &request.base,
                                        TEXT_TYPE, 0, &interrupt, &response, &f.err);
    assert_int_equal(status, LOCI_E_CANCELLED);
    assert_string_equal(f.err.reason, "INTERRUPTED");
    assert_true(loci_now_ns() - from < 2000000000u);
    pthread_join(thread, NULL);
    wait_for(&f.state.cancelled, 1);

    atomic_store(&interrupt, 0);
    loci_rpc_client_call *call = open_call(&f, "Hold", 0, &interrupt);
    assert_int_equal(pthread_create(&thread, NULL, set_soon, &interrupt), 0);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_CANCELLED);
    pthread_join(thread, NULL);
    loci_rpc_call_close(call);
    wait_for(&f.state.cancelled, 2);
    rpc_stop(&f);
}

static void test_close_cancels(void **unused) {
    (void)unused;
    rpc_fixture f;
    loci_status status;
    rpc_start(&f, NULL);
    loci_rpc_client_call *call = open_call(&f, "Hold", 0, NULL);
    wait_for(&f.state.running, 1);
    loci_rpc_call_close(call);
    wait_for(&f.state.cancelled, 1);
    call = open_call(&f, "Down", 0, NULL); /* closed in the midst of messages */
    text_message message = text_of("x", 1000000);
    check_ok(loci_rpc_call_send(call, &message.base, &f.err), &f.err);
    for (int i = 0; i < 10; i++) read_number(&f, call, &status);
    loci_rpc_call_cancel(call);
    loci_rpc_call_close(call);
    wait_for(&f.state.cancelled, 2);
    for (int i = 0; i < 200; i++) {
        call = open_call(&f, i % 2 ? "Hold" : "Chat", 0, NULL);
        loci_rpc_call_close(call);
    }
    loci_rpc_call_close(NULL);
    wait_for(&f.state.running, 0);
    rpc_stop(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unary_answers),
        cmocka_unit_test(test_errors_carry_reason_and_text),
        cmocka_unit_test(test_streams_carry_messages),
        cmocka_unit_test(test_early_end_stops_the_writer),
        cmocka_unit_test(test_duplex_from_two_threads),
        cmocka_unit_test(test_deadline_reaches_both_ends),
        cmocka_unit_test(test_interrupt_cancels),
        cmocka_unit_test(test_close_cancels),
    };
    return cmocka_run_group_tests(tests, rpc_set_up, rpc_tear_down);
}
