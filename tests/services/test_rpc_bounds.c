/* SPDX-License-Identifier: Apache-2.0
 *
 * What the RPC runtime bounds: idle time, workers and queues, and the memory of all calls.
 */
#include "rpc_support.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ time, workers, queues */

static void test_stream_idle_ends(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.stream_idle_ms = 300;
    rpc_fixture f;
    loci_status status;
    rpc_start(&f, &options);
    loci_rpc_client_call *call = open_call(&f, "Hold", 0, NULL);
    assert_true(read_number(&f, call, &status) == UINT64_MAX);
    assert_int_equal(status, LOCI_E_TIMEOUT);
    assert_string_equal(f.err.reason, "STREAM_IDLE");
    loci_rpc_call_close(call);
    rpc_stop(&f);
}

static void test_full_queue_refuses(void **unused) {
    (void)unused;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = 1;
    options.queue_max = 1;
    rpc_fixture f;
    char reply[256];
    loci_status status;
    rpc_start(&f, &options);
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
    rpc_stop(&f);
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
    rpc_fixture f;
    char reply[256];
    loci_status status;
    rpc_start(&f, &options);
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
    rpc_stop(&f);
}

/* ------------------------------------------------------------------ memory of all calls */

static void start_small(rpc_fixture *f, unsigned workers) {
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = workers;
    options.message_bytes_max = 1 * MIB;
    options.calls_bytes_max = 8 * MIB;
    rpc_start(f, &options);
}

static void send_bytes(rpc_fixture *f, loci_rpc_client_call *call, size_t len) {
    text_message message = TEXT_INIT;
    message.total_bytes_hint = 0;
    message.data.len = len;
    message.data.data = calloc(1, len);
    assert_non_null(message.data.data);
    check_ok(loci_rpc_call_send(call, &message.base, &f->err), &f->err);
    free(message.data.data);
}

static size_t memory_used(rpc_fixture *f) {
    pthread_mutex_lock(&f->server->memory.mu);
    size_t used = f->server->memory.used;
    pthread_mutex_unlock(&f->server->memory.mu);
    return used;
}

static void wait_memory(rpc_fixture *f, size_t least, size_t most) {
    for (int i = 0; i < 1000 && (memory_used(f) < least || memory_used(f) > most); i++)
        loci_sleep_ms(5);
    assert_in_range(memory_used(f), least, most);
}

/* Open streams get half of it, each its share; what a stream sent is not kept while it is idle. */
static void test_idle_streams_are_counted_and_bounded(void **unused) {
    (void)unused;
    rpc_fixture f;
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
    rpc_stop(&f);
}

/* Calls that wait for a worker hold their messages: what does not fit is refused, small ones and
 * the prompt lane are not, and all is given back. */
static void test_queued_messages_are_counted_and_bounded(void **unused) {
    (void)unused;
    rpc_fixture f;
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
    rpc_stop(&f);
}

/* A stream is not broken off for want of memory: it waits. */
static void test_streams_wait_for_memory(void **unused) {
    (void)unused;
    rpc_fixture f;
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
    rpc_stop(&f);
}

/* A receipt that waits for an idle client can be ended by the handler's other thread. */
static void test_receipts_can_be_stopped(void **unused) {
    (void)unused;
    rpc_fixture f;
    loci_status status;
    rpc_start(&f, NULL);
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
    rpc_stop(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stream_idle_ends),
        cmocka_unit_test(test_full_queue_refuses),
        cmocka_unit_test(test_lanes_are_apart_and_bounded),
        cmocka_unit_test(test_idle_streams_are_counted_and_bounded),
        cmocka_unit_test(test_queued_messages_are_counted_and_bounded),
        cmocka_unit_test(test_streams_wait_for_memory),
        cmocka_unit_test(test_receipts_can_be_stopped),
    };
    return cmocka_run_group_tests(tests, rpc_set_up, rpc_tear_down);
}
