/* SPDX-License-Identifier: Apache-2.0
 *
 * One call on the server: from its acceptance by a poller over its messages to its status.
 *
 * Rules of the core that this file keeps: at most one SEND_MESSAGE and one RECV_MESSAGE under way;
 * every grpc_op zeroed; batches of a call started under call->mu; a byte buffer is destroyed right
 * after the batch that sends it was started (the core took its slices); key and value slices of
 * metadata belong to the grpc_call; a batch that the core refuses is our bug and asserted.
 *
 * Back-pressure: a send returns when the transport took the message, so a slow reader holds its
 * handler, and at most one message of the call waits in our memory. The transports buffer some
 * megabytes more on each side.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "services/rpc/rpc_internal.h"

/* The core's own timer may fire this much before our deadline: then it is the deadline, not a
 * cancellation by the client. */
#define DEADLINE_SLACK_NS 50000000u
#define RETRY_MS 1000
#define ROOM_MS 10 /* between two looks for room for a stream's message */
#define ERROR_KEY_MAX 64
#define ERROR_VALUE_MAX 256
#define NS_PER_MS 1000000u

static void on_close(void *owner, bool ok);
static void on_recv(void *owner, bool ok);
static void on_send(void *owner, bool ok);
static void on_finish(void *owner, bool ok);

/* ------------------------------------------------------------------ life */

loci_rpc_call *loci__call_create(loci_rpc_server *server, void (*on_accept)(void *owner, bool ok)) {
    loci_rpc_call *call = calloc(1, sizeof *call);
    if (!call) return NULL;
    call->server = server;
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    atomic_init(&call->refs, 1);
    loci_cancel_init(&call->cancel, 0);
    call->accept_tag = (loci__tag){on_accept, call};
    call->close_tag = (loci__tag){on_close, call};
    call->recv_tag = (loci__tag){on_recv, call};
    call->send_tag = (loci__tag){on_send, call};
    call->finish_tag = (loci__tag){on_finish, call};
    call->status_text = grpc_empty_slice();
    pthread_mutex_init(&call->mu, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&call->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    /* Twice the largest message for its scan, its structures and its copy of bytes fields, and as
     * much again for what is worst among messages of honest shape. */
    size_t limit = 4 * server->options.message_bytes_max + (64u << 10);
    loci__arena_init(&call->arena, limit);
    loci__arena_init(&call->recv_arena, limit);
    call->arena.memory = call->recv_arena.memory = &server->memory;
    return call;
}

void loci__call_free(loci_rpc_call *call) {
    if (call->received) grpc_byte_buffer_destroy(call->received);
    if (call->reply) grpc_byte_buffer_destroy(call->reply);
    for (size_t i = 0; i < call->trailing_count; i++) grpc_slice_unref(call->trailing[i].value);
    grpc_slice_unref(call->status_text);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    if (call->core) grpc_call_unref(call->core);
    loci__arena_fini(&call->arena);
    loci__arena_fini(&call->recv_arena);
    loci__memory_give(&call->server->memory, call->held_bytes);
    if (call->streaming) loci__memory_give_stream(&call->server->memory);
    pthread_cond_destroy(&call->changed);
    pthread_mutex_destroy(&call->mu);
    free(call);
}

static void call_ref(loci_rpc_call *call) {
    atomic_fetch_add_explicit(&call->refs, 1, memory_order_relaxed);
}

static void call_unref(loci_rpc_call *call) {
    if (atomic_fetch_sub_explicit(&call->refs, 1, memory_order_acq_rel) != 1) return;
    loci_rpc_server *server = call->server;
    bool late = call->late;
    loci__call_free(call);
    loci__server_call_ended(server, late);
}

/* Under call->mu. Takes a reference for the batch. */
static void start_batch(loci_rpc_call *call, const grpc_op *ops, size_t count, loci__tag *tag) {
    call_ref(call);
    LOCI__TAG_GIVEN(tag);
    grpc_call_error error = grpc_call_start_batch(call->core, ops, count, tag, NULL);
    LOCI_ASSERT(error == GRPC_CALL_OK);
}

static grpc_op op_of(grpc_op_type type) {
    grpc_op op;
    memset(&op, 0, sizeof op); /* flags and reserved are checked by the core */
    op.op = type;
    return op;
}

static bool one_request(const loci_rpc_call *call) {
    return call->method->kind == LOCI_RPC_UNARY || call->method->kind == LOCI_RPC_SERVER_STREAM;
}

static bool one_response(const loci_rpc_call *call) {
    return call->method->kind == LOCI_RPC_UNARY || call->method->kind == LOCI_RPC_CLIENT_STREAM;
}

/* ------------------------------------------------------------------ finishing */

static void add_trailing(loci_rpc_call *call, const char *key, grpc_slice value) {
    grpc_metadata *entry = &call->trailing[call->trailing_count++];
    memset(entry, 0, sizeof *entry);
    entry->key = grpc_slice_from_static_string(key);
    entry->value = value;
}

/* Ends the call and consumes the owner's reference. */
static void finish(loci_rpc_call *call, loci_status status, const loci_error *cause) {
    loci_error err = {status, "", ""};
    if (status != LOCI_OK) {
        err = *cause;
        if (!err.text[0]) snprintf(err.text, sizeof err.text, "%s", loci_status_text(status));
        loci__utf8_sanitise(err.text);
        loci__utf8_sanitise(err.reason);
    }
    pthread_mutex_lock(&call->mu);
    if (call->closed) {
        /* Cancelled: the client has its status from the core. */
    } else if (call->send_pending) {
        /* A status would wait behind the message that the reader does not take. */
        grpc_call_cancel_with_status(call->core, (grpc_status_code)loci_status_to_grpc(status),
                                     err.text, NULL);
    } else {
        grpc_op ops[3];
        size_t count = 0;
        if (!call->initial_sent) ops[count++] = op_of(GRPC_OP_SEND_INITIAL_METADATA);
        if (call->reply && status == LOCI_OK) {
            ops[count] = op_of(GRPC_OP_SEND_MESSAGE);
            ops[count++].data.send_message.send_message = call->reply;
        }
        add_trailing(call, "x-request-id", grpc_slice_from_copied_string(call->request_id));
        if (status != LOCI_OK) {
            add_trailing(call, "grpc-status-details-bin",
                         loci__error_details_pack(status, &err, call->pairs, call->pair_count,
                                                  call->retry_ms));
            call->status_text = grpc_slice_from_copied_string(err.text);
        }
        ops[count] = op_of(GRPC_OP_SEND_STATUS_FROM_SERVER);
        ops[count].data.send_status_from_server.trailing_metadata = call->trailing;
        ops[count].data.send_status_from_server.trailing_metadata_count = call->trailing_count;
        ops[count].data.send_status_from_server.status =
            (grpc_status_code)loci_status_to_grpc(status);
        ops[count++].data.send_status_from_server.status_details = &call->status_text;
        start_batch(call, ops, count, &call->finish_tag);
    }
    pthread_mutex_unlock(&call->mu);
    call_unref(call);
}

static void refuse(loci_rpc_call *call, unsigned retry_ms, const loci_error *err) {
    call->retry_ms = retry_ms;
    finish(call, err->status, err);
}

static void on_finish(void *owner, bool ok) {
    (void)ok; /* the client may be gone; nothing is left to do either way */
    call_unref(owner);
}

/* ------------------------------------------------------------------ accepting */

static bool request_id_valid(const uint8_t *data, size_t len) {
    if (len == 0 || len > LOCI__REQUEST_ID_MAX) return false;
    for (size_t i = 0; i < len; i++) {
        if (data[i] < 0x20 || data[i] > 0x7e) return false;
    }
    return true;
}

static const grpc_slice *find_metadata(const loci_rpc_call *call, const char *key) {
    for (size_t i = 0; i < call->metadata.count; i++) {
        if (grpc_slice_str_cmp(call->metadata.metadata[i].key, key) == 0) {
            return &call->metadata.metadata[i].value;
        }
    }
    return NULL;
}

static void set_request_id(loci_rpc_call *call) {
    const grpc_slice *given = find_metadata(call, "x-request-id");
    if (given && request_id_valid(GRPC_SLICE_START_PTR(*given), GRPC_SLICE_LENGTH(*given))) {
        memcpy(call->request_id, GRPC_SLICE_START_PTR(*given), GRPC_SLICE_LENGTH(*given));
        return; /* the rest is zero */
    }
    uint8_t random[16] = {0};
    if (getrandom(random, sizeof random, GRND_NONBLOCK) != (ssize_t)sizeof random) {
        uint64_t now = loci_now_ns(); /* before the pool is seeded: unique enough for a log line */
        memcpy(random, &now, sizeof now);
    }
    for (size_t i = 0; i < sizeof random; i++) {
        snprintf(call->request_id + 2 * i, 3, "%02x", random[i]);
    }
}

/* Monotonic nanoseconds, 0 when there is no deadline (or one beyond a year). */
static uint64_t deadline_ns(gpr_timespec deadline) {
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) return 0;
    gpr_timespec left = gpr_time_sub(gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC),
                                     gpr_now(GPR_CLOCK_MONOTONIC));
    if (left.tv_sec > 365 * 86400) return 0;
    uint64_t now = loci_now_ns();
    if (left.tv_sec < 0) return now;
    return now + (uint64_t)left.tv_sec * 1000000000u + (uint64_t)left.tv_nsec;
}

static void start_recv(loci_rpc_call *call) {
    grpc_op op = op_of(GRPC_OP_RECV_MESSAGE);
    op.data.recv_message.recv_message = &call->received;
    call->recv_pending = true;
    start_batch(call, &op, 1, &call->recv_tag);
}

static loci_status no_room(loci_rpc_call *call, loci_error *err) {
    call->retry_ms = RETRY_MS;
    return loci_fail_reason(err, LOCI_E_LIMIT, "MEMORY_BUDGET",
                            "the calls at this moment take all of the %zu MiB of memory that is "
                            "for calls; try again, or give locid more --workers",
                            call->server->memory.most >> 20);
}

/* Under call->mu. A message takes its bytes three times while it is unpacked: as it came, joined,
 * and in the arena, which is paid for that much. */
static bool take_message(loci_rpc_call *call, grpc_byte_buffer *buffer, loci__arena *arena) {
    size_t len = grpc_byte_buffer_length(buffer);
    if (!loci__memory_take(&call->server->memory, 3 * len)) return false;
    call->held_bytes += 2 * len;
    arena->paid_bytes += len;
    return true;
}

/* Gives the owner's reference to the pool. room: there was memory for what the call holds. */
static void submit(loci_rpc_call *call, bool room) {
    loci_error err;
    if (!room) {
        (void)no_room(call, &err);
        refuse(call, RETRY_MS, &err);
        return;
    }
    if (loci__pool_submit(call->pool, call)) return;
    loci_fail_reason(&err, LOCI_E_LIMIT, "OVERLOADED", "the server has too many calls; try again");
    refuse(call, RETRY_MS, &err);
}

void loci__call_accepted(loci_rpc_call *call) {
    loci_rpc_server *server = call->server;
    call->accepted_ns = call->moved_ns = loci_now_ns();
    call->cancel.deadline_ns = deadline_ns(call->details.deadline);
    set_request_id(call);
    pthread_mutex_lock(&call->mu);
    grpc_op op = op_of(GRPC_OP_RECV_CLOSE_ON_SERVER);
    op.data.recv_close_on_server.cancelled = &call->close_cancelled;
    start_batch(call, &op, 1, &call->close_tag);
    pthread_mutex_unlock(&call->mu);

    loci_error err;
    call->method = loci__server_find(server, call->details.method, &call->service_ctx);
    if (!call->method) {
        loci_slice path = loci_slice_of(GRPC_SLICE_START_PTR(call->details.method),
                                        GRPC_SLICE_LENGTH(call->details.method));
        loci_fail_reason(&err, LOCI_E_UNSUPPORTED, "UNKNOWN_METHOD", "there is no method %.*s",
                         path.len > 256 ? 256 : (int)path.len, (const char *)path.data);
        refuse(call, 0, &err);
        return;
    }
    if (call->late) {
        loci_fail_reason(&err, LOCI_E_UNAVAILABLE, "DRAINING", "the server is shutting down");
        refuse(call, RETRY_MS, &err);
        return;
    }
    call->pool = &server->pools[call->method->lane];
    if (!one_request(call)) {
        call->streaming = loci__memory_take_stream(&server->memory);
        submit(call, call->streaming);
        return;
    }
    /* A client that sends no message must not hold a worker: the call waits outside of the pools
     * and the owner's reference waits with it; on_recv submits. */
    loci__server_awaiting(server, call, true);
    pthread_mutex_lock(&call->mu);
    start_recv(call);
    pthread_mutex_unlock(&call->mu);
}

void loci__call_expire(loci_rpc_call *call) {
    grpc_call_cancel_with_status(call->core, GRPC_STATUS_DEADLINE_EXCEEDED,
                                 "the request message did not come", NULL);
}

/* ------------------------------------------------------------------ tags of an open call */

static bool near_deadline(const loci_rpc_call *call) {
    uint64_t deadline = call->cancel.deadline_ns;
    return deadline && loci_now_ns() + DEADLINE_SLACK_NS >= deadline;
}

static void on_close(void *owner, bool ok) {
    loci_rpc_call *call = owner;
    pthread_mutex_lock(&call->mu);
    if (!ok || call->close_cancelled) {
        call->closed = true;
        if (!near_deadline(call)) loci_cancel_request(&call->cancel);
    }
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&call->mu);
    call_unref(call);
}

static void on_recv(void *owner, bool ok) {
    loci_rpc_call *call = owner;
    bool first, room = true;
    pthread_mutex_lock(&call->mu);
    first = one_request(call) && !call->first_taken;
    if (first && call->received) room = take_message(call, call->received, &call->arena);
    call->recv_pending = false;
    call->recv_ready = true;
    call->recv_ok = ok;
    call->moved_ns = loci_now_ns();
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&call->mu);
    if (first) {
        loci__server_awaiting(call->server, call, false);
        submit(call, room);
    }
    call_unref(call);
}

static void on_send(void *owner, bool ok) {
    loci_rpc_call *call = owner;
    pthread_mutex_lock(&call->mu);
    call->send_pending = false;
    call->send_ok = ok;
    call->moved_ns = loci_now_ns();
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&call->mu);
    call_unref(call);
}

/* ------------------------------------------------------------------ waiting */

static loci_status check_open(const loci_rpc_call *call, loci_error *err) {
    loci_status status = loci_cancel_check(&call->cancel);
    if (status == LOCI_E_CANCELLED) return loci_fail(err, status, "the call was cancelled");
    if (status == LOCI_E_TIMEOUT) return loci_fail(err, status, "the call's deadline has passed");
    return status;
}

/* Under call->mu; until 0 = no bound. */
static void wait_changed(loci_rpc_call *call, uint64_t until) {
    uint64_t deadline = call->cancel.deadline_ns;
    if (deadline && (!until || deadline < until)) until = deadline;
    if (!until) {
        pthread_cond_wait(&call->changed, &call->mu);
        return;
    }
    struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&call->changed, &call->mu, &at);
}

/* Under call->mu: until *pending is false, the call ends, its receipts are stopped (for those), or
 * the stream was idle for too long. A receipt counts any message as life; a send only itself, or a
 * client could hold a handler by writing without ever reading. */
static loci_status await(loci_rpc_call *call, const bool *pending, bool sending, loci_error *err) {
    uint64_t started = loci_now_ns();
    uint64_t idle = (uint64_t)call->server->options.stream_idle_ms * NS_PER_MS;
    while (*pending) {
        LOCI_TRY(check_open(call, err));
        if (!sending && call->recv_stopped)
            return loci_fail(err, LOCI_E_CANCELLED, "the handler takes no more messages");
        uint64_t from = sending || call->moved_ns < started ? started : call->moved_ns;
        uint64_t until = idle ? from + idle : 0;
        if (until && loci_now_ns() >= until) {
            return loci_fail_reason(err, LOCI_E_TIMEOUT, "STREAM_IDLE",
                                    "the stream moved no message for %u ms",
                                    call->server->options.stream_idle_ms);
        }
        wait_changed(call, until);
    }
    return LOCI_OK;
}

/* Under call->mu, after a batch failed: why the call ended. The close tag is on its way; until it
 * is here a status of ours could overtake the core's. */
static loci_status broken_off(loci_rpc_call *call, loci_error *err) {
    uint64_t until = loci_now_ns() + 1000u * (uint64_t)NS_PER_MS;
    while (!call->closed && check_open(call, NULL) == LOCI_OK && loci_now_ns() < until) {
        wait_changed(call, until);
    }
    LOCI_TRY(check_open(call, err));
    if (near_deadline(call)) {
        return loci_fail(err, LOCI_E_TIMEOUT, "the call's deadline has passed");
    }
    return loci_fail(err, LOCI_E_CANCELLED, "the call was broken off");
}

loci_status loci__call_wait_poke(loci_rpc_call *call) {
    loci_status status;
    pthread_mutex_lock(&call->mu);
    while ((status = check_open(call, NULL)) == LOCI_OK && !call->poked) wait_changed(call, 0);
    call->poked = false;
    pthread_mutex_unlock(&call->mu);
    return status;
}

void loci__call_poke(loci_rpc_call *call) {
    pthread_mutex_lock(&call->mu);
    call->poked = true;
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&call->mu);
}

/* ------------------------------------------------------------------ inside a handler */

/* Under call->mu. *buffer NULL at the end of the client's messages. */
static loci_status next_buffer(loci_rpc_call *call, grpc_byte_buffer **buffer, loci_error *err) {
    *buffer = NULL;
    if (call->half_closed) return LOCI_OK;
    if (!call->recv_ready && !call->recv_pending) start_recv(call);
    LOCI_TRY(await(call, &call->recv_pending, false, err));
    call->recv_ready = false;
    *buffer = call->received;
    call->received = NULL;
    if (*buffer) return LOCI_OK;
    /* NULL is the client's half-close or the end of the call, and the close tag may come later: */
    if (!call->recv_ok || call->closed || grpc_call_failed_before_recv_message(call->core)) {
        return broken_off(call, err);
    }
    call->half_closed = true;
    return LOCI_OK;
}

/* Under call->mu: waits until there is memory for a stream's message, as long as a stream may stand
 * still. The client waits with it, since nothing more is received meanwhile. */
static loci_status await_room(loci_rpc_call *call, grpc_byte_buffer *buffer, loci_error *err) {
    uint64_t idle = (uint64_t)call->server->options.stream_idle_ms * NS_PER_MS;
    uint64_t started = loci_now_ns();
    while (!take_message(call, buffer, &call->recv_arena)) {
        LOCI_TRY(check_open(call, err));
        uint64_t now = loci_now_ns();
        if (call->recv_stopped || (idle && now - started >= idle)) return no_room(call, err);
        wait_changed(call, now + ROOM_MS * (uint64_t)NS_PER_MS);
    }
    return LOCI_OK;
}

/* Under call->mu. *buffer NULL: no message. */
static loci_status take_buffer(loci_rpc_call *call, bool first, grpc_byte_buffer **buffer,
                               loci_error *err) {
    *buffer = NULL;
    if (one_request(call)) return first ? next_buffer(call, buffer, err) : LOCI_OK;
    loci__arena_reset(&call->recv_arena); /* now: an idle stream keeps little */
    LOCI_TRY(next_buffer(call, buffer, err));
    if (!*buffer) return LOCI_OK;
    loci_status status = await_room(call, *buffer, err);
    if (status != LOCI_OK) grpc_byte_buffer_destroy(*buffer);
    return status;
}

/* Takes the buffer and gives back what was taken for it, but for the arena's. */
static loci_status unpack(loci_rpc_call *call, grpc_byte_buffer *buffer, loci__arena *arena,
                          ProtobufCMessage **message, loci_error *err) {
    size_t bytes = 2 * grpc_byte_buffer_length(buffer);
    loci_status status =
        loci__message_unpack(call->method->request, buffer, &arena->allocator, message, err);
    loci__memory_give(&call->server->memory, bytes);
    pthread_mutex_lock(&call->mu);
    call->held_bytes -= bytes;
    pthread_mutex_unlock(&call->mu);
    if (status == LOCI_OK || !arena->exhausted) return status;
    if (arena->refused) return no_room(call, err);
    return loci_fail_reason(err, LOCI_E_LIMIT, "MESSAGE_TOO_LARGE",
                            "a message %s needs more than the %zu bytes of memory of a call",
                            call->method->request->name, arena->limit_bytes);
}

loci_status loci_rpc_recv(loci_rpc_call *call, ProtobufCMessage **message, loci_error *err) {
    *message = NULL;
    grpc_byte_buffer *buffer;
    pthread_mutex_lock(&call->mu);
    bool first = !call->first_taken;
    call->first_taken = true;
    loci_status status = take_buffer(call, first, &buffer, err);
    pthread_mutex_unlock(&call->mu);
    if (status != LOCI_OK) return status;
    if (!buffer) {
        if (!first || !one_request(call)) return LOCI_OK;
        return loci_fail_reason(err, LOCI_E_INVAL, "NO_REQUEST", "the call came without a request");
    }
    return unpack(call, buffer, one_request(call) ? &call->arena : &call->recv_arena, message, err);
}

void loci_rpc_stop_recv(loci_rpc_call *call) {
    pthread_mutex_lock(&call->mu);
    call->recv_stopped = true;
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&call->mu);
}

loci_status loci_rpc_send(loci_rpc_call *call, const ProtobufCMessage *message, loci_error *err) {
    LOCI_ASSERT(message->descriptor == call->method->response);
    grpc_byte_buffer *buffer;
    LOCI_TRY(loci__message_pack(message, call->server->options.send_bytes_max, &buffer, err));
    pthread_mutex_lock(&call->mu);
    loci_status status = check_open(call, err);
    if (status != LOCI_OK) goto out;
    if (call->send_pending || call->reply) {
        status = loci_fail(err, LOCI_E_INTERNAL, "%s sent a message before its last one was taken",
                           call->method->path);
        goto out;
    }
    if (one_response(call)) {
        size_t len = grpc_byte_buffer_length(buffer);
        if (!loci__memory_take(&call->server->memory, len)) {
            status = no_room(call, err);
            goto out;
        }
        call->held_bytes += len;
        call->reply = buffer;
        buffer = NULL;
        goto out;
    }
    grpc_op ops[2];
    size_t count = 0;
    if (!call->initial_sent) ops[count++] = op_of(GRPC_OP_SEND_INITIAL_METADATA);
    call->initial_sent = true;
    ops[count] = op_of(GRPC_OP_SEND_MESSAGE);
    ops[count++].data.send_message.send_message = buffer;
    call->send_pending = true;
    start_batch(call, ops, count, &call->send_tag);
    status = await(call, &call->send_pending, true, err);
    if (status == LOCI_OK && !call->send_ok) status = broken_off(call, err);
out:
    pthread_mutex_unlock(&call->mu);
    if (buffer) grpc_byte_buffer_destroy(buffer);
    return status;
}

const loci_cancel *loci_rpc_cancel_of(const loci_rpc_call *call) {
    return &call->cancel;
}

const char *loci_rpc_request_id(const loci_rpc_call *call) {
    return call->request_id;
}

const char *loci_rpc_metadata(const loci_rpc_call *call, const char *key) {
    const grpc_slice *value = find_metadata(call, key);
    if (!value) return NULL;
    loci_rpc_call *owner = (loci_rpc_call *)(uintptr_t)call; /* const for the caller only */
    return loci__arena_text(&owner->arena, GRPC_SLICE_START_PTR(*value), GRPC_SLICE_LENGTH(*value));
}

/* At most `max` bytes, without an incomplete character at the end. */
static const char *copy_text(loci_rpc_call *call, const char *text, size_t max) {
    char *copy = loci__arena_text(&call->arena, text, strnlen(text, max));
    if (copy) loci__utf8_sanitise(copy);
    return copy;
}

void loci_rpc_error_metadata(loci_rpc_call *call, const char *key, const char *value) {
    if (call->pair_count == LOCI__ERROR_PAIRS_MAX) return;
    loci__error_pair pair = {copy_text(call, key, ERROR_KEY_MAX),
                             copy_text(call, value, ERROR_VALUE_MAX)};
    if (pair.key && pair.value) call->pairs[call->pair_count++] = pair;
}

void loci__call_run(loci_rpc_call *call) {
    loci_error err = {LOCI_OK, "", ""};
    loci_status status = check_open(call, &err); /* it may have waited long in the queue */
    if (status == LOCI_OK) status = call->method->handler(call, call->service_ctx, &err);
    if (status == LOCI_OK && one_response(call) && !call->reply) {
        status = loci_fail(&err, LOCI_E_INTERNAL, "%s sent no reply", call->method->path);
    }
    finish(call, status, &err);
}
