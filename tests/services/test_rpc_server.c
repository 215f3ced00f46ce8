/* SPDX-License-Identifier: Apache-2.0
 *
 * The life of a server of the RPC runtime: connections, listening, health, shutdown.
 */
#include "rpc_support.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "grpc/health/v1/health.pb-c.h"

/* ------------------------------------------------------------------ connections */

static void expect_unreachable(const char *address, unsigned within_ms) {
    rpc_fixture f = {.err = {LOCI_OK, "", ""}};
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
    rpc_fixture f;
    loci_status status;
    char reply[256];
    rpc_start(&f, &options);
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
    rpc_stop(&f);
}

static void test_health_and_watch(void **unused) {
    (void)unused;
    rpc_fixture f;
    rpc_start(&f, NULL);
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
    rpc_stop(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unreachable_is_told_soon),
        cmocka_unit_test(test_bad_listening),
        cmocka_unit_test(test_shutdown_is_graceful_and_idempotent),
        cmocka_unit_test(test_health_and_watch),
    };
    return cmocka_run_group_tests(tests, rpc_set_up, rpc_tear_down);
}
