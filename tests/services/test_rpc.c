/* SPDX-License-Identifier: Apache-2.0
 *
 * The RPC runtime from inside: server and client in one process on the test service, and the parts
 * that meet hostile bytes (arena, wire walk, details, reflection) by themselves. A foreign client
 * is in test_rpc_foreign.py.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "grpc/health/v1/health.pb-c.h"
#include "loci/v1/loci.pb-c.h"
#include "proto/descriptor_set.h"
#include "rpc_testservice.h"
#include "services/rpc/rpc_internal.h"

typedef Loci__V1__RegisterRequest text_message;
#define TEXT_INIT LOCI__V1__REGISTER_REQUEST__INIT
#define TEXT_TYPE (&loci__v1__register_request__descriptor)
#define MIB (1u << 20)

static const loci_error no_error = {LOCI_OK, "", ""};

static void check_ok(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), err->text);
}

/* ------------------------------------------------------------------ a server for one test */

typedef struct fixture {
    loci_rpc_server *server;
    loci_rpc_channel *channel;
    test_service state;
    loci_rpc_service service;
    char address[64];
    loci_error err;
} fixture;

static void start(fixture *f, const loci_rpc_server_options *options) {
    loci_rpc_server_options defaults;
    loci_rpc_server_options_default(&defaults);
    if (!options) options = &defaults;
    memset(f, 0, sizeof *f);
    test_service_fill(&f->service, &f->state);
    int port;
    check_ok(loci_rpc_server_create(options, loci_descriptor_set(), &f->server, &f->err), &f->err);
    check_ok(loci_rpc_server_add(f->server, &f->service, &f->err), &f->err);
    check_ok(loci_rpc_server_listen(f->server, "127.0.0.1:0", &port, &f->err), &f->err);
    assert_in_range(port, 1, 65535);
    check_ok(loci_rpc_server_start(f->server, &f->err), &f->err);
    test_service_set_server(f->server);
    snprintf(f->address, sizeof f->address, "127.0.0.1:%d", port);
    check_ok(loci_rpc_channel_open(f->address, &f->channel, &f->err), &f->err);
}

static void stop(fixture *f) {
    loci_rpc_channel_close(f->channel);
    loci_rpc_server_shutdown(f->server);
    assert_int_equal(atomic_load(&f->state.running), 0);
    assert_int_equal(atomic_load(&f->state.false_ends), 0);
    assert_int_equal(f->server->memory.used, 0);
    assert_int_equal(f->server->memory.streams, 0);
    loci_rpc_server_destroy(f->server);
    test_service_set_server(NULL);
}

static text_message text_of(const char *text, uint64_t number) {
    text_message message = TEXT_INIT;
    message.corpus = (char *)(uintptr_t)text;
    message.total_bytes_hint = number;
    return message;
}

/* The reply's text is copied to `reply` (may be NULL). */
static loci_status unary(fixture *f, const char *method, const char *text, uint64_t number,
                         unsigned timeout_ms, char reply[static 256]) {
    char path[64];
    snprintf(path, sizeof path, "/loci.test.Test/%s", method);
    text_message request = text_of(text, number);
    ProtobufCMessage *response;
    f->err = no_error;
    loci_status status = loci_rpc_unary(f->channel, path, &request.base, TEXT_TYPE, timeout_ms,
                                        NULL, &response, &f->err);
    if (status == LOCI_OK) {
        snprintf(reply, 256, "%s", ((text_message *)response)->corpus);
        protobuf_c_message_free_unpacked(response, NULL);
    } else {
        assert_null(response);
        assert_int_equal(f->err.status, status);
        assert_true(f->err.text[0] != 0);
    }
    return status;
}

static loci_rpc_client_call *open_call(fixture *f, const char *method, unsigned timeout_ms,
                                       const volatile int *interrupt) {
    char path[64];
    snprintf(path, sizeof path, "/loci.test.Test/%s", method);
    loci_rpc_client_call *call;
    check_ok(loci_rpc_call_open(f->channel, path, TEXT_TYPE, timeout_ms, interrupt, &call, &f->err),
             &f->err);
    return call;
}

static void send_text(fixture *f, loci_rpc_client_call *call, const char *text, uint64_t number) {
    text_message message = text_of(text, number);
    check_ok(loci_rpc_call_send(call, &message.base, &f->err), &f->err);
}

/* Reads one message and returns its number; UINT64_MAX at the end, with *status. */
static uint64_t read_number(fixture *f, loci_rpc_client_call *call, loci_status *status) {
    ProtobufCMessage *message;
    f->err = no_error;
    *status = loci_rpc_call_read(call, &message, &f->err);
    if (!message) return UINT64_MAX;
    assert_int_equal(*status, LOCI_OK);
    uint64_t number = ((text_message *)message)->total_bytes_hint;
    protobuf_c_message_free_unpacked(message, NULL);
    return number;
}

static void wait_for(atomic_int *counter, int value) {
    for (int i = 0; i < 1000 && atomic_load(counter) != value; i++) loci_sleep_ms(5);
    assert_int_equal(atomic_load(counter), value);
}

/* ------------------------------------------------------------------ calls */

static void test_unary_answers(void **unused) {
    (void)unused;
    fixture f;
    char reply[256];
    setenv("http_proxy", "http://127.0.0.1:1", 1); /* must not be used */
    setenv("grpc_proxy", "http://127.0.0.1:1", 1);
    start(&f, NULL);
    check_ok(unary(&f, "Echo", "hällo", 0, 5000, reply), &f.err);
    assert_string_equal(reply, "hällo");
    check_ok(unary(&f, "Echo", "", 0, 0, reply), &f.err);
    assert_string_equal(reply, "");
    unsetenv("http_proxy");
    unsetenv("grpc_proxy");
    stop(&f);
}

static void test_errors_carry_reason_and_text(void **unused) {
    (void)unused;
    fixture f;
    char reply[256];
    start(&f, NULL);
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
    stop(&f);
}

static void test_streams_carry_messages(void **unused) {
    (void)unused;
    fixture f;
    loci_status status;
    start(&f, NULL);
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
    stop(&f);
}

/* A handler that leaves without reading: the writer is told and the reader gets the status. */
static void test_early_end_stops_the_writer(void **unused) {
    (void)unused;
    fixture f;
    loci_status status = LOCI_OK;
    start(&f, NULL);
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
    stop(&f);
}

typedef struct writer {
    fixture *f;
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
    fixture f;
    loci_status status;
    start(&f, NULL);
    writer w = {&f, open_call(&f, "Duplex", 20000, NULL), 400};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, write_messages, &w), 0);
    int count = 0;
    while (read_number(&f, w.call, &status) != UINT64_MAX) count++;
    check_ok(status, &f.err);
    assert_int_equal(count, 401);
    pthread_join(thread, NULL);
    loci_rpc_call_close(w.call);
    stop(&f);
}

/* ------------------------------------------------------------------ ends before time */

static void test_deadline_reaches_both_ends(void **unused) {
    (void)unused;
    fixture f;
    char reply[256];
    start(&f, NULL);
    assert_int_equal(unary(&f, "Sleep", "", 5000, 100, reply), LOCI_E_TIMEOUT);
    wait_for(&f.state.timed_out, 1);
    assert_int_equal(atomic_load(&f.state.cancelled), 0);
    stop(&f);
}

static void *set_soon(void *arg) {
    loci_sleep_ms(150);
    *(volatile int *)arg = 1;
    return NULL;
}

static void test_interrupt_cancels(void **unused) {
    (void)unused;
    fixture f;
    volatile int interrupt = 0;
    start(&f, NULL);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, set_soon, (void *)(uintptr_t)&interrupt), 0);
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

    interrupt = 0;
    loci_rpc_client_call *call = open_call(&f, "Hold", 0, &interrupt);
    assert_int_equal(pthread_create(&thread, NULL, set_soon, (void *)(uintptr_t)&interrupt), 0);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_CANCELLED);
    pthread_join(thread, NULL);
    loci_rpc_call_close(call);
    wait_for(&f.state.cancelled, 2);
    stop(&f);
}

static void test_close_cancels(void **unused) {
    (void)unused;
    fixture f;
    loci_status status;
    start(&f, NULL);
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
    stop(&f);
}

static void test_stream_idle_ends(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.stream_idle_ms = 300;
    fixture f;
    loci_status status;
    start(&f, &options);
    loci_rpc_client_call *call = open_call(&f, "Hold", 0, NULL);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_TIMEOUT);
    assert_string_equal(f.err.reason, "STREAM_IDLE");
    loci_rpc_call_close(call);
    stop(&f);
}

static void test_full_queue_refuses(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = 1;
    options.queue_max = 1;
    fixture f;
    char reply[256];
    loci_status status;
    start(&f, &options);
    loci_rpc_client_call *calls[2];
    for (int i = 0; i < 2; i++) {
        calls[i] = open_call(&f, "Block", 0, NULL);
        send_text(&f, calls[i], "", 300);
        check_ok(loci_rpc_call_half_close(calls[i], &f.err), &f.err);
    }
    wait_for(&f.state.running, 1);
    for (int i = 0; i < 1000 && loci_rpc_server_load(f.server).queued != 1; i++) loci_sleep_ms(1);
    assert_int_equal(loci_rpc_server_load(f.server).active, 1);
    assert_int_equal(unary(&f, "Echo", "x", 0, 5000, reply), LOCI_E_LIMIT);
    assert_string_equal(f.err.reason, "OVERLOADED");
    for (int i = 0; i < 2; i++) {
        assert_true(read_number(&f, calls[i], &status) != UINT64_MAX);
        loci_rpc_call_close(calls[i]);
    }
    check_ok(unary(&f, "Echo", "x", 0, 5000, reply), &f.err);
    stop(&f);
}

/* Lanes: long calls are bounded and leave the workers free, and what tells how the server is gets
 * its answer however full both are. */
static void test_lanes_are_apart_and_bounded(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = 1;
    options.queue_max = 0;
    options.long_calls_max = 3;
    fixture f;
    char reply[256];
    loci_status status;
    start(&f, &options);
    loci_rpc_client_call *calls[3];
    for (int i = 0; i < 3; i++) calls[i] = open_call(&f, "Hold", 0, NULL);
    wait_for(&f.state.running, 3);
    loci_rpc_client_call *more = open_call(&f, "Hold", 0, NULL);
    assert_true(read_number(&f, more, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_LIMIT);
    assert_string_equal(f.err.reason, "OVERLOADED");
    loci_rpc_call_close(more);
    check_ok(unary(&f, "Echo", "x", 0, 5000, reply), &f.err);
    for (int i = 0; i < 1000 && loci_rpc_server_load(f.server).active != 3; i++) loci_sleep_ms(1);
    loci_rpc_client_call *block = open_call(&f, "Block", 0, NULL);
    send_text(&f, block, "", 1000);
    wait_for(&f.state.running, 4);
    assert_int_equal(unary(&f, "Echo", "x", 0, 5000, reply), LOCI_E_LIMIT);
    for (int i = 0; i < 3; i++) {
        check_ok(unary(&f, "Stats", "", 0, 5000, reply), &f.err);
        assert_non_null(strstr(reply, "\"active\": 4"));
    }
    for (int i = 0; i < 3; i++) loci_rpc_call_close(calls[i]);
    loci_rpc_call_close(block);
    wait_for(&f.state.running, 0);
    stop(&f);
}

/* ------------------------------------------------------------------ memory of all calls */

static void start_small(fixture *f, unsigned workers) {
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = workers;
    options.message_bytes_max = 1 * MIB;
    options.calls_bytes_max = 8 * MIB;
    start(f, &options);
}

static void send_bytes(fixture *f, loci_rpc_client_call *call, size_t len) {
    text_message message = TEXT_INIT;
    message.total_bytes_hint = 0;
    message.data.len = len;
    message.data.data = calloc(1, len);
    assert_non_null(message.data.data);
    check_ok(loci_rpc_call_send(call, &message.base, &f->err), &f->err);
    free(message.data.data);
}

static size_t memory_used(fixture *f) {
    pthread_mutex_lock(&f->server->memory.mu);
    size_t used = f->server->memory.used;
    pthread_mutex_unlock(&f->server->memory.mu);
    return used;
}

static void wait_memory(fixture *f, size_t least, size_t most) {
    for (int i = 0; i < 1000 && (memory_used(f) < least || memory_used(f) > most); i++)
        loci_sleep_ms(5);
    assert_in_range(memory_used(f), least, most);
}

/* Open streams get half of it, each its share; what a stream sent is not kept while it is idle. */
static void test_idle_streams_are_counted_and_bounded(void **unused) {
    (void)unused;
    fixture f;
    loci_status status;
    start_small(&f, 2);
    loci_rpc_client_call *calls[8];
    for (size_t i = 0; i < 8; i++) {
        calls[i] = open_call(&f, "Hold", 0, NULL);
        for (int j = 0; j < 3; j++) send_bytes(&f, calls[i], 900u << 10);
    }
    wait_for(&f.state.running, 8);
    loci_rpc_client_call *more = open_call(&f, "Hold", 0, NULL);
    assert_true(read_number(&f, more, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_LIMIT);
    assert_string_equal(f.err.reason, "MEMORY_BUDGET");
    loci_rpc_call_close(more);
    wait_memory(&f, 4 * MIB, 8 * (LOCI__STREAM_BYTES + (80u << 10)));
    for (size_t i = 0; i < 8; i++) loci_rpc_call_close(calls[i]);
    wait_memory(&f, 0, 0);
    stop(&f);
}

/* Calls that wait for a worker hold their messages: what does not fit is refused, small ones and
 * the prompt lane are not, and all is given back. */
static void test_queued_messages_are_counted_and_bounded(void **unused) {
    (void)unused;
    fixture f;
    char reply[256];
    loci_status status;
    start_small(&f, 1);
    loci_rpc_client_call *calls[6], *block = open_call(&f, "Block", 0, NULL);
    send_text(&f, block, "", 700);
    wait_for(&f.state.running, 1);
    int refused = 0;
    for (size_t i = 0; i < 6; i++) {
        calls[i] = open_call(&f, "Sleep", 0, NULL);
        send_bytes(&f, calls[i], 900u << 10);
    }
    wait_memory(&f, 4 * MIB, 8 * MIB);
    check_ok(unary(&f, "Stats", "", 0, 5000, reply), &f.err);
    check_ok(unary(&f, "Echo", "x", 0, 5000, reply), &f.err);
    for (size_t i = 0; i < 6; i++) {
        read_number(&f, calls[i], &status);
        if (status == LOCI_OK) continue;
        assert_int_equal(status, LOCI_E_LIMIT);
        assert_string_equal(f.err.reason, "MEMORY_BUDGET");
        refused++;
    }
    assert_in_range(refused, 1, 4);
    for (size_t i = 0; i < 6; i++) loci_rpc_call_close(calls[i]);
    loci_rpc_call_close(block);
    wait_memory(&f, 0, 0);
    assert_true(loci__memory_take(&f.server->memory, 8 * MIB - 1000)); /* replies, too */
    assert_int_equal(unary(&f, "Big", "", 500000, 5000, reply), LOCI_E_LIMIT);
    assert_string_equal(f.err.reason, "MEMORY_BUDGET");
    loci__memory_give(&f.server->memory, 8 * MIB - 1000);
    check_ok(unary(&f, "Big", "", 500000, 5000, reply), &f.err);
    stop(&f);
}

/* A stream is not broken off for want of memory: it waits. */
static void test_streams_wait_for_memory(void **unused) {
    (void)unused;
    fixture f;
    loci_status status;
    start_small(&f, 1);
    loci_rpc_client_call *call = open_call(&f, "Chat", 10000, NULL);
    wait_for(&f.state.running, 1);
    size_t taken = 8 * MIB - LOCI__STREAM_BYTES - 1000;
    assert_true(loci__memory_take(&f.server->memory, taken));
    send_bytes(&f, call, 900u << 10);
    loci_sleep_ms(100);
    assert_in_range(memory_used(&f), taken, 8 * MIB);
    uint64_t from = loci_now_ns();
    loci__memory_give(&f.server->memory, taken);
    assert_int_equal(read_number(&f, call, &status), 0);
    assert_true(loci_now_ns() - from < 5000000000u);
    loci_rpc_call_close(call);
    stop(&f);
}

/* A receipt that waits for an idle client can be ended by the handler's other thread. */
static void test_receipts_can_be_stopped(void **unused) {
    (void)unused;
    fixture f;
    loci_status status;
    start(&f, NULL);
    for (uint64_t before = 0; before < 2; before++) {
        uint64_t from = loci_now_ns();
        loci_rpc_client_call *call = open_call(&f, "Stopped", 10000, NULL);
        send_text(&f, call, "x", before);
        assert_int_equal(read_number(&f, call, &status), 7);
        assert_true(read_number(&f, call, &status) == UINT64_MAX);
        assert_int_equal(status, LOCI_E_NOTFOUND);
        assert_string_equal(f.err.reason, "GONE");
        assert_true(loci_now_ns() - from < 5000000000u);
        loci_rpc_call_close(call);
    }
    stop(&f);
}

/* ------------------------------------------------------------------ connections */

static void expect_unreachable(const char *address, unsigned within_ms) {
    fixture f = {.err = no_error};
    char reply[256];
    uint64_t from = loci_now_ns();
    check_ok(loci_rpc_channel_open(address, &f.channel, &f.err), &f.err);
    assert_int_equal(unary(&f, "Echo", "x", 0, 0, reply), LOCI_E_UNAVAILABLE);
    assert_string_equal(f.err.reason, "CANNOT_CONNECT");
    char expected[300];
    snprintf(expected, sizeof expected, "cannot reach locid at %s: ", address);
    assert_memory_equal(f.err.text, expected, strlen(expected));
    assert_true(loci_now_ns() - from < within_ms * 1000000ull);

    loci_status status;
    from = loci_now_ns();
    loci_rpc_client_call *call = open_call(&f, "Chat", 0, NULL);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_UNAVAILABLE);
    loci_rpc_call_close(call);
    assert_true(loci_now_ns() - from < within_ms * 1000000ull);
    loci_rpc_channel_close(f.channel);
}

static int listen_mutely(int *port) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    if (bind(fd, (const struct sockaddr *)&at, sizeof at) != 0 || listen(fd, 8) != 0 ||
        getsockname(fd, (struct sockaddr *)&at, &len) != 0) {
        fail_msg("%s", strerror(errno));
    }
    *port = ntohs(at.sin_port);
    return fd;
}

static void test_unreachable_is_told_soon(void **unused) {
    (void)unused;
    expect_unreachable("127.0.0.1:1", 1000);
    expect_unreachable("unix:/nonexistent/socket", 1000);
    int port;
    int fd = listen_mutely(&port); /* takes connections and says nothing */
    char address[64];
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    expect_unreachable(address, 2500);
    close(fd);
    loci_rpc_channel *channel;
    loci_error err;
    assert_int_equal(loci_rpc_channel_open("", &channel, &err), LOCI_E_INVAL);
    loci_rpc_channel_close(NULL);
}

static void test_bad_listening(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    loci_rpc_server *server;
    loci_error err;
    int port, mute_port;
    check_ok(loci_rpc_server_create(&options, loci_slice_of(NULL, 0), &server, &err), &err);
    static const char *const bad[] = {
        "",      "127.0.0.1",    ":80",       "127.0.0.1:", "h:99999", "h:1x",
        "::1:5", "127.0.0.1:-1", "h:1234567", "unix:",      "[::1]"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(loci_rpc_server_listen(server, bad[i], &port, &err), LOCI_E_INVAL);
        assert_int_equal(port, 0);
    }
    char address[300];
    int fd = listen_mutely(&mute_port);
    snprintf(address, sizeof address, "127.0.0.1:%d", mute_port);
    assert_int_equal(loci_rpc_server_listen(server, address, &port, &err), LOCI_E_UNAVAILABLE);
    close(fd);
    snprintf(address, sizeof address, "unix:/%0*d", 200, 1);
    assert_int_equal(loci_rpc_server_listen(server, address, &port, &err), LOCI_E_INVAL);
    assert_int_equal(loci_rpc_server_listen(server, "unix:/nonexistent/a/b", &port, &err),
                     LOCI_E_UNAVAILABLE);
    check_ok(loci_rpc_server_listen(server, "127.0.0.1:0", &port, &err), &err);
    check_ok(loci_rpc_server_listen(server, "127.0.0.1:0", &port, &err), &err);
    loci_rpc_server_destroy(server); /* never started */
    loci_rpc_server_destroy(NULL);

    options.workers = 0;
    assert_int_equal(loci_rpc_server_create(&options, loci_slice_of(NULL, 0), &server, &err),
                     LOCI_E_INVAL);
    loci_rpc_server_options_default(&options);
    assert_int_equal(
        loci_rpc_server_create(&options, loci_slice_text("\x0a\xffgarbage"), &server, &err),
        LOCI_E_INVAL);
    assert_null(server);
}

/* ------------------------------------------------------------------ stopping */

static void *shut_down(void *server) {
    loci_rpc_server_shutdown(server);
    return NULL;
}

/* Two threads stop a server with a running call, a stream and a deaf handler. */
static void test_shutdown_is_graceful_and_idempotent(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.drain_ms = 400;
    fixture f;
    loci_status status;
    char reply[256];
    start(&f, &options);
    loci_rpc_client_call *quick = open_call(&f, "Block", 0, NULL);
    send_text(&f, quick, "", 200);
    loci_rpc_client_call *deaf = open_call(&f, "Block", 0, NULL);
    send_text(&f, deaf, "", 1500);
    loci_rpc_client_call *hold = open_call(&f, "Hold", 0, NULL);
    wait_for(&f.state.running, 3);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, shut_down, f.server);
    assert_true(read_number(&f, quick, &status) != UINT64_MAX); /* finishes in the grace */
    assert_int_equal(unary(&f, "Echo", "late", 0, 0, reply), LOCI_E_UNAVAILABLE);
    assert_true(read_number(&f, hold, &status) == UINT64_MAX); /* cancelled after it */
    assert_int_not_equal(status, LOCI_OK);
    assert_true(read_number(&f, deaf, &status) == UINT64_MAX);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    assert_int_equal(atomic_load(&f.state.finished), 3); /* the deaf one was waited for */
    loci_rpc_call_close(quick);
    loci_rpc_call_close(deaf);
    loci_rpc_call_close(hold);
    stop(&f);
}

static void test_health_and_watch(void **unused) {
    (void)unused;
    fixture f;
    start(&f, NULL);
    const ProtobufCMessageDescriptor *type = &grpc__health__v1__health_check_response__descriptor;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    loci_rpc_client_call *call;
    check_ok(
        loci_rpc_call_open(f.channel, "/grpc.health.v1.Health/Watch", type, 0, NULL, &call, &f.err),
        &f.err);
    check_ok(loci_rpc_call_send(call, &request.base, &f.err), &f.err);
    check_ok(loci_rpc_call_half_close(call, &f.err), &f.err);
    const Grpc__Health__V1__HealthCheckResponse__ServingStatus expected[2] = {
        GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING,
        GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING};
    for (int i = 0; i < 20; i++) {
        ProtobufCMessage *message;
        check_ok(loci_rpc_call_read(call, &message, &f.err), &f.err);
        assert_non_null(message);
        assert_int_equal(((Grpc__Health__V1__HealthCheckResponse *)message)->status,
                         expected[i % 2]);
        protobuf_c_message_free_unpacked(message, NULL);
        loci_rpc_server_set_serving(f.server, "", i % 2);
    }
    loci_rpc_call_close(call);
    for (int i = 0; i < 80; i++) { /* more names than are kept, and one too long */
        char name[200];
        snprintf(name, sizeof name, "%0*d", i == 0 ? 180 : 5, i);
        loci_rpc_server_set_serving(f.server, name, true);
    }
    stop(&f);
}

/* ------------------------------------------------------------------ parts that meet bytes */

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static grpc_byte_buffer *buffer_of(const uint8_t *data, size_t len) {
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)data, len);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static size_t pack_sample(uint8_t out[static 512]) {
    Loci__V1__Evidence evidence = LOCI__V1__EVIDENCE__INIT;
    Loci__V1__Evidence *items[3] = {&evidence, &evidence, &evidence};
    evidence.document = (char *)(uintptr_t) "tenants/default/corpora/c/documents/d";
    evidence.quote = (ProtobufCBinaryData){5, (uint8_t *)(uintptr_t) "quote"};
    Loci__V1__AnswerEvidence list = LOCI__V1__ANSWER_EVIDENCE__INIT;
    list.n_items = 3;
    list.items = items;
    Loci__V1__AnswerEvent event = LOCI__V1__ANSWER_EVENT__INIT;
    event.seq = 77;
    event.event_case = LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE;
    event.evidence = &list;
    assert_true(loci__v1__answer_event__get_packed_size(&event) <= 512);
    return loci__v1__answer_event__pack(&event, out);
}

/* Every limit from none to enough: an allocation fails in every place of the unpacking. */
static void test_unpacking_survives_every_limit(void **unused) {
    (void)unused;
    uint8_t bytes[512];
    size_t len = pack_sample(bytes);
    bool whole = false;
    for (size_t limit = 0; limit < 8192; limit += 16) {
        loci__arena arena;
        loci_error err;
        ProtobufCMessage *message;
        loci__arena_init(&arena, limit);
        loci_status status =
            loci__message_unpack(&loci__v1__answer_event__descriptor, buffer_of(bytes, len),
                                 &arena.allocator, &message, &err);
        assert_true(arena.allocated_bytes <= limit);
        assert_int_equal(status == LOCI_OK, !arena.exhausted);
        assert_true(!whole || status == LOCI_OK);
        whole = status == LOCI_OK;
        if (whole) {
            uint8_t again[512];
            assert_int_equal(protobuf_c_message_pack(message, again), len);
            assert_memory_equal(again, bytes, len);
        }
        loci__arena_fini(&arena);
    }
    assert_true(whole);
}

static void test_arena_reset_reuses(void **unused) {
    (void)unused;
    loci__arena arena;
    loci__arena_init(&arena, 1 * MIB);
    for (int round = 0; round < 100; round++) {
        size_t total = 0;
        for (size_t size = 1; size < 100000; size = size * 3 + 1) {
            uint8_t *at = loci__arena_alloc(&arena, size);
            assert_non_null(at);
            assert_int_equal((uintptr_t)at % 16, 0);
            memset(at, round, size);
            total += size;
        }
        assert_true(total <= arena.allocated_bytes && arena.allocated_bytes <= 1 * MIB);
        loci__arena_reset(&arena);
    }
    assert_null(loci__arena_alloc(&arena, 2 * MIB));
    assert_true(arena.exhausted);
    assert_null(loci__arena_alloc(&arena, SIZE_MAX));
    loci__arena_reset(&arena);
    assert_false(arena.exhausted);
    assert_string_equal(loci__arena_text(&arena, "abcdef", 3), "abc");
    loci__arena_fini(&arena);
}

/* Mutated messages are refused or unpacked, and text that comes through is UTF-8. */
static void test_unpacking_survives_mutation(void **unused) {
    (void)unused;
    uint64_t seed = 0x9e3779b97f4a7c15u;
    uint8_t sample[512];
    size_t sample_len = pack_sample(sample);
    int accepted = 0;
    for (int i = 0; i < 20000; i++) {
        uint8_t bytes[512];
        memcpy(bytes, sample, sample_len);
        size_t len = sample_len;
        for (uint64_t edits = 1 + next_random(&seed) % 4; edits > 0; edits--) {
            bytes[next_random(&seed) % len] = (uint8_t)next_random(&seed);
        }
        if (next_random(&seed) % 4 == 0) len = next_random(&seed) % len;
        loci__arena arena;
        loci_error err;
        ProtobufCMessage *message;
        loci__arena_init(&arena, 1 * MIB);
        loci_status status =
            loci__message_unpack(&loci__v1__answer_event__descriptor, buffer_of(bytes, len),
                                 &arena.allocator, &message, &err);
        if (status == LOCI_OK) {
            const Loci__V1__AnswerEvent *event = (const Loci__V1__AnswerEvent *)message;
            accepted++;
            if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE) {
                for (size_t j = 0; j < event->evidence->n_items; j++) {
                    const char *text = event->evidence->items[j]->document;
                    assert_true(loci__utf8_valid((const uint8_t *)text, strlen(text)));
                }
            }
        } else {
            assert_int_equal(status, LOCI_E_INVAL);
        }
        loci__arena_fini(&arena);
    }
    assert_in_range(accepted, 100, 19900);
}

static void test_utf8(void **unused) {
    (void)unused;
    static const char *const good[] = {"", "a", "é", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80",
                                      "\xc0\x80",
                                      "\xc3",
                                      "\xe0\x80\x80",
                                      "\xed\xa0\x80",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "\xf0\x80\x80\x80",
                                      "\xe2\x82"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        assert_true(loci__utf8_valid((const uint8_t *)good[i], strlen(good[i])));
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_false(loci__utf8_valid((const uint8_t *)bad[i], strlen(bad[i])));
        char text[32];
        snprintf(text, sizeof text, "x%sé", bad[i]);
        loci__utf8_sanitise(text);
        assert_true(loci__utf8_valid((const uint8_t *)text, strlen(text)));
        assert_true(text[0] == 'x' && strstr(text, "é"));
    }
}

/* The largest details fit into the metadata of a client with default limits, and come back. */
static void test_error_details_round_trip(void **unused) {
    (void)unused;
    char key[65], value[257];
    memset(key, 'k', 64);
    memset(value, 'v', 256);
    key[64] = value[256] = 0;
    loci__error_pair pairs[LOCI__ERROR_PAIRS_MAX];
    for (size_t i = 0; i < LOCI__ERROR_PAIRS_MAX; i++) pairs[i] = (loci__error_pair){key, value};
    loci_error err = {LOCI_E_LIMIT, "", ""};
    memset(err.reason, 'R', sizeof err.reason - 1);
    memset(err.text, 't', sizeof err.text - 1);
    grpc_slice details =
        loci__error_details_pack(LOCI_E_LIMIT, &err, pairs, LOCI__ERROR_PAIRS_MAX, 1500);
    size_t len = GRPC_SLICE_LENGTH(details);
    assert_true(len * 4 / 3 + 3 * sizeof err.text < 8192 - 1000); /* base64, percent-encoding */
    loci_slice bytes = loci_slice_of(GRPC_SLICE_START_PTR(details), len);
    loci_error back = {LOCI_E_LIMIT, "", ""};
    loci__error_details_read(bytes, &back);
    assert_string_equal(back.reason, err.reason);
    assert_string_equal(back.text, err.text);
    for (size_t cut = 0; cut < len; cut += 7) { /* truncated details do no harm */
        loci_error some = {LOCI_E_LIMIT, "", ""};
        loci__error_details_read(loci_slice_of(bytes.data, cut), &some);
    }
    grpc_slice_unref(details);
}

static void test_reflection_survives_mutation(void **unused) {
    (void)unused;
    uint64_t seed = 0x2545f4914f6cdd1du;
    loci_slice set = loci_descriptor_set();
    uint8_t *copy = malloc(set.len);
    assert_non_null(copy);
    for (int i = 0; i < 300; i++) {
        memcpy(copy, set.data, set.len);
        for (int j = 0; j < 20; j++) {
            copy[next_random(&seed) % set.len] = (uint8_t)next_random(&seed);
        }
        size_t count = 0;
        loci__reflection reflection = {.service_count = &count};
        loci_error err;
        if (loci__reflection_init(&reflection, loci_slice_of(copy, set.len), &err) == LOCI_OK) {
            assert_in_range(reflection.file_count, 1, LOCI__FILES_MAX);
        }
    }
    free(copy);
}

static int set_up(void **state) {
    (void)state;
    loci_log_configure(LOCI_LOG_ERROR, false);
    loci_rpc_init();
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    loci_rpc_shutdown();
    return 0;
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
        cmocka_unit_test(test_stream_idle_ends),
        cmocka_unit_test(test_full_queue_refuses),
        cmocka_unit_test(test_lanes_are_apart_and_bounded),
        cmocka_unit_test(test_idle_streams_are_counted_and_bounded),
        cmocka_unit_test(test_queued_messages_are_counted_and_bounded),
        cmocka_unit_test(test_streams_wait_for_memory),
        cmocka_unit_test(test_receipts_can_be_stopped),
        cmocka_unit_test(test_unreachable_is_told_soon),
        cmocka_unit_test(test_bad_listening),
        cmocka_unit_test(test_shutdown_is_graceful_and_idempotent),
        cmocka_unit_test(test_health_and_watch),
        cmocka_unit_test(test_unpacking_survives_every_limit),
        cmocka_unit_test(test_arena_reset_reuses),
        cmocka_unit_test(test_unpacking_survives_mutation),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_error_details_round_trip),
        cmocka_unit_test(test_reflection_survives_mutation),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
