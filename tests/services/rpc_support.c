/* SPDX-License-Identifier: Apache-2.0
 *
 * See rpc_support.h.
 */
#include "rpc_support.h"

#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "proto/descriptor_set.h"

static const loci_error no_error = {LOCI_OK, "", ""};

void check_ok(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), err->text);
}

void rpc_start(rpc_fixture *f, const loci_rpc_server_options *options) {
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
    test_service_set_server(f->server);
    check_ok(loci_rpc_server_start(f->server, &f->err), &f->err);
    snprintf(f->address, sizeof f->address, "127.0.0.1:%d", port);
    check_ok(loci_rpc_channel_open(f->address, &f->channel, &f->err), &f->err);
}

void rpc_stop(rpc_fixture *f) {
    loci_rpc_channel_close(f->channel);
    loci_rpc_server_shutdown(f->server);
    assert_int_equal(atomic_load(&f->state.running), 0);
    assert_int_equal(atomic_load(&f->state.false_ends), 0);
    assert_int_equal(f->server->memory.used, 0);
    assert_int_equal(f->server->memory.streams, 0);
    loci_rpc_server_destroy(f->server);
    test_service_set_server(NULL);
}

text_message text_of(const char *text, uint64_t number) {
    text_message message = TEXT_INIT;
    message.corpus = (char *)(uintptr_t)text;
    message.total_bytes_hint = number;
    return message;
}

loci_status unary(rpc_fixture *f, const char *method, const char *text, uint64_t number,
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

loci_rpc_client_call *open_call(rpc_fixture *f, const char *method, unsigned timeout_ms,
                                const atomic_int *interrupt) {
    char path[64];
    snprintf(path, sizeof path, "/loci.test.Test/%s", method);
    loci_rpc_client_call *call;
    check_ok(loci_rpc_call_open(f->channel, path, TEXT_TYPE, timeout_ms, interrupt, &call, &f->err),
             &f->err);
    return call;
}

void send_text(rpc_fixture *f, loci_rpc_client_call *call, const char *text, uint64_t number) {
    text_message message = text_of(text, number);
    check_ok(loci_rpc_call_send(call, &message.base, &f->err), &f->err);
}

uint64_t read_number(rpc_fixture *f, loci_rpc_client_call *call, loci_status *status) {
    ProtobufCMessage *message;
    f->err = no_error;
    *status = loci_rpc_call_read(call, &message, &f->err);
    if (!message) return UINT64_MAX;
    assert_int_equal(*status, LOCI_OK);
    uint64_t number = ((text_message *)message)->total_bytes_hint;
    protobuf_c_message_free_unpacked(message, NULL);
    return number;
}

void wait_for(atomic_int *counter, int value) {
    for (int i = 0; i < 1000 && atomic_load(counter) != value; i++) loci_sleep_ms(5);
    assert_int_equal(atomic_load(counter), value);
}

int rpc_set_up(void **state) {
    (void)state;
    loci_log_configure(LOCI_LOG_ERROR, false);
    loci_rpc_init();
    return 0;
}

int rpc_tear_down(void **state) {
    (void)state;
    loci_rpc_shutdown();
    return 0;
}
