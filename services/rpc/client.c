/* SPDX-License-Identifier: Apache-2.0
 *
 * The client side: channels, unary calls and streams, blocking.
 *
 * Each call has a pluck queue of its own, so that a reader and a writer can wait on it at once
 * (the core allows six pluckers; never is `next` used on such a queue). Waiting goes in steps
 * of 50 ms to look at the interrupt flag; a set flag cancels the call, and the wait goes on until
 * the core has ended the operation, because its memory is the core's until then.
 *
 * The first attempt to connect is bounded by 2 s and not waited for beyond: a call on a channel
 * without a connection fails with LOCI_E_UNAVAILABLE. A status that does not carry our
 * x-request-id came from the transport, not from the server.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <grpc/support/log.h>
#include <grpc/support/string_util.h>

#include "base/log.h"
#include "services/rpc/rpc_internal.h"

#define WAIT_STEP_MS 50
#define CONNECT_MS 1900
#define RECEIVE_BYTES_MAX (64u << 20)
#define SEND_BYTES_MAX (64u << 20)
#define NS_PER_MS 1000000u

struct loci_rpc_channel {
    grpc_channel *core;
    char address[256];
};

/* ------------------------------------------------------------------ process */

static void forward_log(gpr_log_func_args *args) {
    const char *file = strrchr(args->file, '/');
    loci_log(args->severity == GPR_LOG_SEVERITY_ERROR ? LOCI_LOG_WARN : LOCI_LOG_DEBUG,
             "grpc %s:%d: %s", file ? file + 1 : args->file, args->line, args->message);
}

void loci_rpc_init(void) {
    gpr_set_log_function(forward_log);
    grpc_init();
}

void loci_rpc_shutdown(void) {
    grpc_shutdown_blocking();
}

/* ------------------------------------------------------------------ channels */

static grpc_arg int_arg(const char *key, int value) {
    return (grpc_arg){GRPC_ARG_INTEGER, (char *)(uintptr_t)key, {.integer = value}};
}

loci_status loci_rpc_channel_open(const char *address, loci_rpc_channel **out, loci_error *err) {
    *out = NULL;
    loci_rpc_channel *channel = calloc(1, sizeof *channel);
    if (!channel) return loci_fail(err, LOCI_E_NOMEM, "no memory for a channel");
    if (strlen(address) >= sizeof channel->address || !address[0]) {
        free(channel);
        return loci_fail(err, LOCI_E_INVAL, "an address has 1 to %zu bytes",
                         sizeof channel->address - 1);
    }
    snprintf(channel->address, sizeof channel->address, "%s", address);
    grpc_arg list[] = {
        int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        int_arg(GRPC_ARG_ENABLE_RETRIES, 0),            /* callers know what may be repeated */
        int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1), /* a channel is a connection of its own */
        int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RECEIVE_BYTES_MAX),
        int_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, SEND_BYTES_MAX),
        int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_MS), /* also bounds connecting */
        int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200),
        int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, CONNECT_MS),
        int_arg(GRPC_ARG_DNS_ARES_QUERY_TIMEOUT_MS, CONNECT_MS),
    };
    grpc_channel_args args = {sizeof list / sizeof list[0], list};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    channel->core = grpc_channel_create(address, credentials, &args);
    grpc_channel_credentials_release(credentials);
    *out = channel;
    return LOCI_OK;
}

void loci_rpc_channel_close(loci_rpc_channel *channel) {
    if (!channel) return;
    grpc_channel_destroy(channel->core);
    free(channel);
}

/* ------------------------------------------------------------------ calls */

struct loci_rpc_client_call {
    loci_rpc_channel *channel;
    const ProtobufCMessageDescriptor *response_type;
    const atomic_int *interrupt;
    grpc_completion_queue *queue;
    grpc_call *core;
    pthread_mutex_t start_mu;  /* the starting of batches */
    pthread_mutex_t status_mu; /* one thread at a time waits for the status */
    bool finished;             /* the status is here; under status_mu */
    atomic_bool interrupted;
    atomic_bool got_message;
    bool initial_asked;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    grpc_byte_buffer *received;
    char status_tag, send_tag, close_tag, read_tag; /* only their addresses count */
};

static grpc_op op_of(grpc_op_type type) {
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = type;
    return op;
}

static void start_batch(loci_rpc_client_call *call, const grpc_op *ops, size_t count, void *tag) {
    pthread_mutex_lock(&call->start_mu);
    grpc_call_error error = grpc_call_start_batch(call->core, ops, count, tag, NULL);
    pthread_mutex_unlock(&call->start_mu);
    LOCI_ASSERT(error == GRPC_CALL_OK);
}

/* Waits for the tag whatever happens; true when its batch succeeded. */
static bool pluck(loci_rpc_client_call *call, void *tag) {
    for (;;) {
        /* Before every wait: a stream whose messages come quickly never waits for long. */
        if (call->interrupt && *call->interrupt && !atomic_exchange(&call->interrupted, true))
            grpc_call_cancel(call->core, NULL);
        gpr_timespec until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                          gpr_time_from_millis(WAIT_STEP_MS, GPR_TIMESPAN));
        grpc_event event = grpc_completion_queue_pluck(call->queue, tag, until, NULL);
        if (event.type == GRPC_OP_COMPLETE) return event.success != 0;
        LOCI_ASSERT(event.type == GRPC_QUEUE_TIMEOUT);
    }
}

static grpc_op status_op(loci_rpc_client_call *call) {
    grpc_op op = op_of(GRPC_OP_RECV_STATUS_ON_CLIENT);
    op.data.recv_status_on_client.trailing_metadata = &call->trailing;
    op.data.recv_status_on_client.status = &call->code;
    op.data.recv_status_on_client.status_details = &call->details;
    return op;
}

static loci_rpc_client_call *create_call(loci_rpc_channel *channel, const char *path,
                                         const ProtobufCMessageDescriptor *response_type,
                                         unsigned timeout_ms, const atomic_int *interrupt) {
    loci_rpc_client_call *call = calloc(1, sizeof *call);
    if (!call) return NULL;
    call->channel = channel;
    call->response_type = response_type;
    call->interrupt = interrupt;
    call->queue = grpc_completion_queue_create_for_pluck(NULL);
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (timeout_ms) {
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
    }
    grpc_slice method = grpc_slice_from_copied_string(path);
    call->core = grpc_channel_create_call(channel->core, NULL, GRPC_PROPAGATE_DEFAULTS, call->queue,
                                          method, NULL, deadline, NULL);
    grpc_slice_unref(method);
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    call->details = grpc_empty_slice();
    atomic_init(&call->interrupted, false);
    atomic_init(&call->got_message, false);
    pthread_mutex_init(&call->start_mu, NULL);
    pthread_mutex_init(&call->status_mu, NULL);
    return call;
}

/* Every batch has been plucked, so the queue is empty. */
static void free_call(loci_rpc_client_call *call) {
    if (call->received) grpc_byte_buffer_destroy(call->received);
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
    grpc_call_unref(call->core);
    grpc_completion_queue_shutdown(call->queue);
    grpc_completion_queue_destroy(call->queue);
    pthread_mutex_destroy(&call->status_mu);
    pthread_mutex_destroy(&call->start_mu);
    free(call);
}

static const grpc_slice *find_trailing(const loci_rpc_client_call *call, const char *key) {
    for (size_t i = 0; i < call->trailing.count; i++) {
        const grpc_metadata *entry = &call->trailing.metadata[i];
        if (grpc_slice_str_cmp(entry->key, key) == 0) return &entry->value;
    }
    return NULL;
}

/* The finished call's status. */
static loci_status status_of(const loci_rpc_client_call *call, loci_error *err) {
    loci_status status = loci_status_from_grpc((int)call->code);
    if (status == LOCI_OK) return LOCI_OK;
    loci_error local;
    if (!err) err = &local;
    if (atomic_load(&call->interrupted)) {
        return loci_fail_reason(err, LOCI_E_CANCELLED, "INTERRUPTED", "interrupted");
    }
    *err = (loci_error){status, "", ""};
    size_t len = GRPC_SLICE_LENGTH(call->details);
    if (len >= sizeof err->text) len = sizeof err->text - 1;
    if (len) memcpy(err->text, GRPC_SLICE_START_PTR(call->details), len);
    err->text[len] = 0;
    const grpc_slice *details = find_trailing(call, "grpc-status-details-bin");
    if (details) {
        loci__error_details_read(
            loci_slice_of(GRPC_SLICE_START_PTR(*details), GRPC_SLICE_LENGTH(*details)), err);
    }
    if (!err->text[0]) snprintf(err->text, sizeof err->text, "%s", loci_status_text(status));
    if (status == LOCI_E_UNAVAILABLE && !find_trailing(call, "x-request-id")) {
        bool lost = atomic_load(&call->got_message);
        snprintf(err->reason, sizeof err->reason, "%s",
                 lost ? "CONNECTION_LOST" : "CANNOT_CONNECT");
        return loci_fail_prefix(err, status, "%s %s",
                                lost ? "lost the connection to locid at" : "cannot reach locid at",
                                call->channel->address);
    }
    return status;
}

/* Waits for the status of the call. */
static loci_status finish(loci_rpc_client_call *call, loci_error *err) {
    pthread_mutex_lock(&call->status_mu);
    if (!call->finished) {
        pluck(call, &call->status_tag);
        call->finished = true;
    }
    loci_status status = status_of(call, err);
    pthread_mutex_unlock(&call->status_mu);
    return status;
}

loci_status loci_rpc_call_open(loci_rpc_channel *channel, const char *path,
                               const ProtobufCMessageDescriptor *response_type, unsigned timeout_ms,
                               const atomic_int *interrupt, loci_rpc_client_call **out,
                               loci_error *err) {
    *out = NULL;
    loci_rpc_client_call *call = create_call(channel, path, response_type, timeout_ms, interrupt);
    if (!call) return loci_fail(err, LOCI_E_NOMEM, "no memory for a call of %s", path);
    grpc_op op = status_op(call);
    start_batch(call, &op, 1, &call->status_tag);
    op = op_of(GRPC_OP_SEND_INITIAL_METADATA);
    start_batch(call, &op, 1, &call->send_tag);
    pluck(call, &call->send_tag); /* without a connection the next operation tells */
    *out = call;
    return LOCI_OK;
}

/* What ended a send: the call's status when it is known already. Waiting for it here could last for
 * ever, as the core holds it back until all messages were read. */
static loci_status send_failure(loci_rpc_client_call *call, loci_error *err) {
    pthread_mutex_lock(&call->status_mu);
    if (!call->finished) {
        gpr_timespec now = gpr_time_0(GPR_CLOCK_MONOTONIC);
        grpc_event event = grpc_completion_queue_pluck(call->queue, &call->status_tag, now, NULL);
        call->finished = event.type == GRPC_OP_COMPLETE;
    }
    loci_status status = call->finished ? status_of(call, err) : LOCI_OK;
    pthread_mutex_unlock(&call->status_mu);
    if (status != LOCI_OK) return status;
    return loci_fail_reason(err, LOCI_E_RPC, "STREAM_ENDED", "the server has ended the call");
}

loci_status loci_rpc_call_send(loci_rpc_client_call *call, const ProtobufCMessage *message,
                               loci_error *err) {
    grpc_op op = op_of(GRPC_OP_SEND_MESSAGE);
    LOCI_TRY(loci__message_pack(message, SEND_BYTES_MAX, &op.data.send_message.send_message, err));
    start_batch(call, &op, 1, &call->send_tag);
    grpc_byte_buffer_destroy(op.data.send_message.send_message);
    if (pluck(call, &call->send_tag)) return LOCI_OK;
    return send_failure(call, err);
}

loci_status loci_rpc_call_half_close(loci_rpc_client_call *call, loci_error *err) {
    grpc_op op = op_of(GRPC_OP_SEND_CLOSE_FROM_CLIENT);
    start_batch(call, &op, 1, &call->close_tag);
    if (pluck(call, &call->close_tag)) return LOCI_OK;
    return send_failure(call, err);
}

static grpc_op initial_op(loci_rpc_client_call *call) {
    grpc_op op = op_of(GRPC_OP_RECV_INITIAL_METADATA);
    op.data.recv_initial_metadata.recv_initial_metadata = &call->initial;
    call->initial_asked = true;
    return op;
}

static loci_status unpack(loci_rpc_client_call *call, ProtobufCMessage **message, loci_error *err) {
    grpc_byte_buffer *buffer = call->received;
    call->received = NULL;
    atomic_store(&call->got_message, true);
    loci_status status = loci__message_unpack(call->response_type, buffer, NULL, message, err);
    if (status == LOCI_E_INVAL) {
        return loci_fail_prefix(err, LOCI_E_RPC, "a bad reply from locid at %s",
                                call->channel->address);
    }
    return status;
}

loci_status loci_rpc_call_read(loci_rpc_client_call *call, ProtobufCMessage **message,
                               loci_error *err) {
    *message = NULL;
    grpc_op ops[2];
    size_t count = 0;
    if (!call->initial_asked) ops[count++] = initial_op(call);
    ops[count] = op_of(GRPC_OP_RECV_MESSAGE);
    ops[count++].data.recv_message.recv_message = &call->received;
    start_batch(call, ops, count, &call->read_tag);
    pluck(call, &call->read_tag);
    if (!call->received) return finish(call, err);
    return unpack(call, message, err);
}

void loci_rpc_call_cancel(loci_rpc_client_call *call) {
    grpc_call_cancel(call->core, NULL);
}

void loci_rpc_call_close(loci_rpc_client_call *call) {
    if (!call) return;
    pthread_mutex_lock(&call->status_mu);
    bool finished = call->finished;
    pthread_mutex_unlock(&call->status_mu);
    if (!finished) grpc_call_cancel(call->core, NULL);
    (void)finish(call, NULL);
    free_call(call);
}

loci_status loci_rpc_unary(loci_rpc_channel *channel, const char *path,
                           const ProtobufCMessage *request,
                           const ProtobufCMessageDescriptor *response_type, unsigned timeout_ms,
                           const atomic_int *interrupt, ProtobufCMessage **response,
                           loci_error *err) {
    *response = NULL;
    grpc_byte_buffer *buffer;
    LOCI_TRY(loci__message_pack(request, SEND_BYTES_MAX, &buffer, err));
    loci_rpc_client_call *call = create_call(channel, path, response_type, timeout_ms, interrupt);
    if (!call) {
        grpc_byte_buffer_destroy(buffer);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for a call of %s", path);
    }
    grpc_op ops[6] = {op_of(GRPC_OP_SEND_INITIAL_METADATA),  op_of(GRPC_OP_SEND_MESSAGE),
                      op_of(GRPC_OP_SEND_CLOSE_FROM_CLIENT), initial_op(call),
                      op_of(GRPC_OP_RECV_MESSAGE),           status_op(call)};
    ops[1].data.send_message.send_message = buffer;
    ops[4].data.recv_message.recv_message = &call->received;
    start_batch(call, ops, 6, &call->status_tag);
    grpc_byte_buffer_destroy(buffer);
    loci_status status = finish(call, err);
    if (status == LOCI_OK && !call->received) {
        status = loci_fail(err, LOCI_E_RPC, "%s answered without a message", path);
    }
    if (status == LOCI_OK) status = unpack(call, response, err);
    free_call(call);
    return status;
}
