/* SPDX-License-Identifier: Apache-2.0
 *
 * Handlers of the test service; see rpc_testservice.h.
 */
#include "rpc_testservice.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loci/v1/loci.pb-c.h"

typedef Loci__V1__RegisterRequest text_message;
#define TEXT_INIT LOCI__V1__REGISTER_REQUEST__INIT

static loci_rpc_server *running_server; /* for Serving and Stats */

static loci_status leave(test_service *state, loci_status status) {
    if (status == LOCI_E_CANCELLED) atomic_fetch_add(&state->cancelled, 1);
    if (status == LOCI_E_TIMEOUT) atomic_fetch_add(&state->timed_out, 1);
    atomic_fetch_sub(&state->running, 1);
    atomic_fetch_add(&state->finished, 1);
    return status;
}

static test_service *enter(void *ctx) {
    test_service *state = ctx;
    atomic_fetch_add(&state->running, 1);
    return state;
}

static loci_status receive(loci_rpc_call *call, text_message **request, loci_error *err) {
    ProtobufCMessage *message;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    *request = (text_message *)message;
    return LOCI_OK;
}

static loci_status reply_text(loci_rpc_call *call, const char *text, uint64_t number,
                              loci_error *err) {
    text_message reply = TEXT_INIT;
    reply.corpus = (char *)(uintptr_t)text;
    reply.total_bytes_hint = number;
    return loci_rpc_send(call, &reply.base, err);
}

static loci_status echo(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    text_message *request;
    LOCI_TRY(receive(call, &request, err));
    return loci_rpc_send(call, &request->base, err);
}

static loci_status fail(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    text_message *request;
    LOCI_TRY(receive(call, &request, err));
    loci_rpc_error_metadata(call, "corpus", request->corpus);
    loci_rpc_error_metadata(call, "agent", loci_rpc_metadata(call, "user-agent"));
    LOCI_TRY(reply_text(call, "a reply that must not be seen", 0, err));
    return loci_fail_reason(err, loci_status_from_grpc((int)request->total_bytes_hint),
                            "TEST_REASON", "asked to fail: %s", request->corpus);
}

static loci_status sleeper(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    text_message *request;
    loci_status status = receive(call, &request, err);
    if (status == LOCI_OK) {
        uint64_t until = loci_now_ns() + request->total_bytes_hint * 1000000u;
        while (loci_now_ns() < until && status == LOCI_OK) {
            loci_sleep_ms(2);
            status = loci_cancel_check(loci_rpc_cancel_of(call));
        }
        if (status != LOCI_OK) loci_fail(err, status, "the sleep was cut short");
    }
    if (status == LOCI_OK) status = reply_text(call, "slept", 0, err);
    return leave(state, status);
}

static loci_status block(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    text_message *request;
    loci_status status = receive(call, &request, err);
    if (status == LOCI_OK) {
        loci_sleep_ms((unsigned)request->total_bytes_hint);
        status = reply_text(call, "blocked", 0, err);
    }
    return leave(state, status);
}

static loci_status no_reply(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    text_message *request;
    return receive(call, &request, err);
}

static loci_status two_replies(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    LOCI_TRY(reply_text(call, "one", 1, err));
    return reply_text(call, "two", 2, err);
}

static loci_status down(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    text_message *request;
    loci_status status = receive(call, &request, err);
    uint64_t count = status == LOCI_OK ? request->total_bytes_hint : 0;
    for (uint64_t i = 0; i < count && status == LOCI_OK; i++) {
        text_message reply = TEXT_INIT;
        reply.data = request->data;
        reply.total_bytes_hint = i;
        status = loci_rpc_send(call, &reply.base, err);
        if (status == LOCI_OK) atomic_fetch_add(&state->sent_bytes, reply.data.len);
    }
    return leave(state, status);
}

static loci_status big(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    text_message *request;
    LOCI_TRY(receive(call, &request, err));
    text_message reply = TEXT_INIT;
    reply.data.len = request->total_bytes_hint;
    reply.data.data = calloc(1, reply.data.len);
    if (!reply.data.data) return loci_fail(err, LOCI_E_NOMEM, "no memory");
    loci_status status = loci_rpc_send(call, &reply.base, err);
    free(reply.data.data);
    return status;
}

static loci_status drain_requests(loci_rpc_call *call, uint64_t *bytes, loci_error *err) {
    for (;;) {
        text_message *request;
        LOCI_TRY(receive(call, &request, err));
        if (!request) return LOCI_OK;
        *bytes += request->data.len;
    }
}

static loci_status up(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    uint64_t bytes = 0;
    loci_status status = drain_requests(call, &bytes, err);
    if (status == LOCI_OK) status = reply_text(call, "received", bytes, err);
    return leave(state, status);
}

static loci_status chat(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    loci_status status;
    for (;;) {
        text_message *request;
        status = receive(call, &request, err);
        if (status != LOCI_OK || !request) break;
        status = loci_rpc_send(call, &request->base, err);
        if (status != LOCI_OK) break;
    }
    return leave(state, status);
}

/* The clients of Hold never half-close, so an end that is no error is a cancellation that was
 * taken for a half-close. */
static loci_status hold(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    uint64_t bytes = 0;
    loci_status status = drain_requests(call, &bytes, err);
    if (status == LOCI_OK) atomic_fetch_add(&state->false_ends, 1);
    return leave(state, status);
}

typedef struct duplex_sender {
    loci_rpc_call *call;
    uint64_t count;
    loci_status status;
} duplex_sender;

static void *duplex_send(void *arg) {
    duplex_sender *sender = arg;
    loci_error err;
    for (uint64_t i = 0; i < sender->count && sender->status == LOCI_OK; i++) {
        sender->status = reply_text(sender->call, "unasked", i, &err);
    }
    return NULL;
}

static loci_status duplex(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    text_message *request;
    uint64_t bytes = 0;
    loci_status status = receive(call, &request, err);
    if (status != LOCI_OK || !request) return leave(state, status);
    duplex_sender sender = {call, request->total_bytes_hint, LOCI_OK};
    pthread_t thread;
    if (pthread_create(&thread, NULL, duplex_send, &sender) != 0) abort();
    status = drain_requests(call, &bytes, err);
    pthread_join(thread, NULL);
    if (status == LOCI_OK) status = sender.status;
    if (status == LOCI_OK) status = reply_text(call, "received", bytes, err);
    return leave(state, status);
}

static void *stop_recv_soon(void *call) {
    loci_sleep_ms(100);
    loci_rpc_stop_recv(call);
    return NULL;
}

/* Another thread ends the waiting for messages; the status is the handler's own. Number 1 in the
 * first message: it is ended before it begins. */
static loci_status stopped(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = enter(ctx);
    text_message *request;
    uint64_t bytes = 0;
    pthread_t thread;
    loci_status status = receive(call, &request, err);
    if (status != LOCI_OK || !request) return leave(state, status);
    bool before = request->total_bytes_hint == 1;
    if (before) loci_rpc_stop_recv(call);
    if (!before && pthread_create(&thread, NULL, stop_recv_soon, call) != 0) abort();
    status = drain_requests(call, &bytes, err);
    if (!before) pthread_join(thread, NULL);
    if (status != LOCI_E_CANCELLED) return leave(state, status);
    status = reply_text(call, "sends go on", 7, err);
    if (status == LOCI_OK) status = loci_fail_reason(err, LOCI_E_NOTFOUND, "GONE", "it is gone");
    return leave(state, status);
}

static loci_status leave_at_once(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)call;
    (void)ctx;
    (void)err;
    return LOCI_OK;
}

static loci_status stats(loci_rpc_call *call, void *ctx, loci_error *err) {
    test_service *state = ctx;
    loci_rpc_load load = {0, 0};
    if (running_server) load = loci_rpc_server_load(running_server);
    char text[256];
    snprintf(text, sizeof text,
             "{\"running\": %d, \"finished\": %d, \"cancelled\": %d, \"timed_out\": %d, "
             "\"false_ends\": %d, \"sent_bytes\": %llu, \"active\": %u, \"queued\": %u}",
             atomic_load(&state->running), atomic_load(&state->finished),
             atomic_load(&state->cancelled), atomic_load(&state->timed_out),
             atomic_load(&state->false_ends), atomic_load(&state->sent_bytes), load.active,
             load.queued);
    return reply_text(call, text, 0, err);
}

static loci_status serving(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    text_message *request;
    LOCI_TRY(receive(call, &request, err));
    loci_rpc_server_set_serving(running_server, request->corpus, request->total_bytes_hint != 0);
    return reply_text(call, "set", 0, err);
}

#define METHOD(name, kind, handler, lane)                                       \
    {                                                                           \
        "/loci.test.Test/" name, kind, &loci__v1__register_request__descriptor, \
            &loci__v1__register_request__descriptor, handler, lane              \
    }

static const loci_rpc_method methods[] = {
    METHOD("Echo", LOCI_RPC_UNARY, echo, LOCI_RPC_WORKERS),
    METHOD("Fail", LOCI_RPC_UNARY, fail, LOCI_RPC_WORKERS),
    METHOD("Sleep", LOCI_RPC_UNARY, sleeper, LOCI_RPC_WORKERS),
    METHOD("Block", LOCI_RPC_UNARY, block, LOCI_RPC_WORKERS),
    METHOD("NoReply", LOCI_RPC_UNARY, no_reply, LOCI_RPC_WORKERS),
    METHOD("TwoReplies", LOCI_RPC_UNARY, two_replies, LOCI_RPC_WORKERS),
    METHOD("Big", LOCI_RPC_UNARY, big, LOCI_RPC_WORKERS),
    METHOD("Down", LOCI_RPC_SERVER_STREAM, down, LOCI_RPC_WORKERS),
    METHOD("Up", LOCI_RPC_CLIENT_STREAM, up, LOCI_RPC_WORKERS),
    METHOD("Chat", LOCI_RPC_BIDI, chat, LOCI_RPC_WORKERS),
    METHOD("Hold", LOCI_RPC_BIDI, hold, LOCI_RPC_LONG),
    METHOD("Duplex", LOCI_RPC_BIDI, duplex, LOCI_RPC_LONG),
    METHOD("Stopped", LOCI_RPC_BIDI, stopped, LOCI_RPC_LONG),
    METHOD("Leave", LOCI_RPC_BIDI, leave_at_once, LOCI_RPC_WORKERS),
    METHOD("Stats", LOCI_RPC_UNARY, stats, LOCI_RPC_PROMPT),
    METHOD("Serving", LOCI_RPC_UNARY, serving, LOCI_RPC_PROMPT),
};

void test_service_set_server(loci_rpc_server *server) {
    running_server = server;
}

void test_service_fill(loci_rpc_service *service, test_service *state) {
    memset(state, 0, sizeof *state);
    *service =
        (loci_rpc_service){"loci.test.Test", methods, sizeof methods / sizeof methods[0], state};
}
