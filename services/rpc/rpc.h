/* SPDX-License-Identifier: Apache-2.0
 *
 * A small RPC runtime over the gRPC C core: the only place that includes <grpc/...>.
 *
 * Server. Methods stand in static tables; a handler is an ordinary blocking function that a worker
 * thread runs, never a poller. It receives messages with loci_rpc_recv and sends with
 * loci_rpc_send, each blocking until the transport took the message (at most one of each is
 * outstanding), until the call is cancelled, or its deadline passes. Returning ends the call with
 * the status returned and the details in *err as google.rpc.Status with ErrorInfo.
 *
 * Bounds: threads and queues of the lanes (a full one answers RESOURCE_EXHAUSTED with RetryInfo at
 * once), message and metadata sizes, memory of a call (arena) and of all messages together (what
 * does not fit is refused, reason MEMORY_BUDGET; a stream waits), armed slots, drain time.
 *
 * Threading: a loci_rpc_call belongs to its handler's thread, except that any thread may poll
 * loci_rpc_cancel_of and call loci_rpc_stop_recv while the handler runs. recv and send may be
 * called from two threads at once, one each.
 */
#ifndef LOCI_SERVICES_RPC_RPC_H
#define LOCI_SERVICES_RPC_RPC_H

#include <stdatomic.h>

#include <protobuf-c/protobuf-c.h>

#include "base/buf.h"
#include "base/cancel.h"

typedef struct loci_rpc_server loci_rpc_server;
typedef struct loci_rpc_call loci_rpc_call;

typedef enum loci_rpc_kind {
    LOCI_RPC_UNARY,
    LOCI_RPC_SERVER_STREAM,
    LOCI_RPC_CLIENT_STREAM,
    LOCI_RPC_BIDI
} loci_rpc_kind;

/* Which threads run a method's handlers. Each lane has its own, so none waits for another. */
typedef enum loci_rpc_lane {
    LOCI_RPC_WORKERS, /* options.workers threads and a queue: calls that end soon */
    LOCI_RPC_LONG,   /* a thread each, at once, options.long_calls_max at a time and no queue: calls
                        that may wait long (Register, questions, health Watch) */
    LOCI_RPC_PROMPT, /* few threads and a queue: calls that tell how the server is, and must be
                        answered however full the other lanes are (health Check, node status).
                        Unary, and their handlers neither wait nor compute. */
    LOCI_RPC_LANES
} loci_rpc_lane;

/* service_ctx is the pointer given when the table was added. */
typedef loci_status (*loci_rpc_handler)(loci_rpc_call *call, void *service_ctx, loci_error *err);

typedef struct loci_rpc_method {
    const char *path; /* "/loci.v1.QueryService/Answer" */
    loci_rpc_kind kind;
    const ProtobufCMessageDescriptor *request;
    const ProtobufCMessageDescriptor *response;
    loci_rpc_handler handler;
    loci_rpc_lane lane;
} loci_rpc_method;

typedef struct loci_rpc_service {
    const char *name; /* "loci.v1.QueryService" */
    const loci_rpc_method *methods;
    size_t method_count;
    void *ctx;
} loci_rpc_service;

typedef struct loci_rpc_server_options {
    unsigned workers;          /* default 8 */
    unsigned queue_max;        /* calls waiting for a worker; default 64 */
    unsigned long_calls_max;   /* default 128 */
    unsigned pollers;          /* default 1 */
    size_t message_bytes_max;  /* received; default 4 MiB */
    size_t send_bytes_max;     /* default 4 MiB */
    size_t metadata_bytes_max; /* default 8 KiB */
    size_t calls_bytes_max;    /* received messages, replies and open streams of all calls together;
                                  at least 8 * message_bytes_max; default 0 = no bound */
    unsigned drain_ms;         /* grace after shutdown; default 10,000 */
    unsigned stream_idle_ms;   /* a stream that moves no message for so long ends with
                                  DEADLINE_EXCEEDED; default 300,000; 0 = never */
} loci_rpc_server_options;

void loci_rpc_server_options_default(loci_rpc_server_options *options);

/* descriptor_set: serialised FileDescriptorSet for reflection (may be empty: no reflection).
 * Health (grpc.health.v1) and reflection (v1, v1alpha) are served by the runtime itself. */
LOCI_MUST_CHECK loci_status loci_rpc_server_create(const loci_rpc_server_options *options,
                                                   loci_slice descriptor_set, loci_rpc_server **out,
                                                   loci_error *err);
/* Before start. The table and its strings must outlive the server. */
LOCI_MUST_CHECK loci_status loci_rpc_server_add(loci_rpc_server *server,
                                                const loci_rpc_service *service, loci_error *err);
/* address: "127.0.0.1:7411", "[::1]:0", "unix:/path". *port: the bound port, 0 for unix sockets.
 * May be called several times. A stale socket file that nobody listens on is replaced. */
LOCI_MUST_CHECK loci_status loci_rpc_server_listen(loci_rpc_server *server, const char *address,
                                                   int *port, loci_error *err);
LOCI_MUST_CHECK loci_status loci_rpc_server_start(loci_rpc_server *server, loci_error *err);
/* Health of a service name ("" = the whole server); watchers are told. At the start "" and all
 * added services become SERVING, unless this was called for them before. */
void loci_rpc_server_set_serving(loci_rpc_server *server, const char *service, bool serving);
/* Graceful: NOT_SERVING, new calls are refused (UNAVAILABLE, reason DRAINING), waits up to drain_ms
 * for the running ones, then cancels them and waits until their handlers have returned; connections
 * are closed when their clients have read everything, or 2 s after the last call. Idempotent; any
 * thread but a handler's. Afterwards the server can only be destroyed. */
void loci_rpc_server_shutdown(loci_rpc_server *server);
void loci_rpc_server_destroy(loci_rpc_server *server); /* after shutdown; NULL allowed */

typedef struct loci_rpc_load {
    unsigned active, queued;
} loci_rpc_load;
loci_rpc_load loci_rpc_server_load(loci_rpc_server *server);

/* --- Inside a handler ---------------------------------------------------------------- */
/* Next request message, in the call's memory, valid until the next recv of this call. *message =
 * NULL when the client has half-closed. LOCI_E_CANCELLED, LOCI_E_TIMEOUT, LOCI_E_INVAL (malformed)
 * end the call. For unary and server-stream methods call it once. */
LOCI_MUST_CHECK loci_status loci_rpc_recv(loci_rpc_call *call, ProtobufCMessage **message,
                                          loci_error *err);
/* From now on a recv that would wait, also one that waits already, fails with LOCI_E_CANCELLED
 * instead: for the other thread of a handler, when nothing that comes matters any more. Sends go
 * on, and the status that the handler returns ends the call. */
void loci_rpc_stop_recv(loci_rpc_call *call);
/* Serialises and sends; the message may be reused after return. The one reply of a unary or
 * client-stream method is kept and goes out with the status, or not at all when the handler then
 * returns an error. LOCI_E_LIMIT when the message is over send_bytes_max. */
LOCI_MUST_CHECK loci_status loci_rpc_send(loci_rpc_call *call, const ProtobufCMessage *message,
                                          loci_error *err);
const loci_cancel *loci_rpc_cancel_of(const loci_rpc_call *call);
/* The caller's x-request-id, or one made for the call; answered in trailing metadata. */
const char *loci_rpc_request_id(const loci_rpc_call *call);
/* First value of a request metadata key (copied into the call's arena), or NULL. */
const char *loci_rpc_metadata(const loci_rpc_call *call, const char *key);
/* Adds ErrorInfo metadata to the error that the handler is about to return; both strings are
 * copied. */
void loci_rpc_error_metadata(loci_rpc_call *call, const char *key, const char *value);

/* --- Client -------------------------------------------------------------------------- */
typedef struct loci_rpc_channel loci_rpc_channel;
typedef struct loci_rpc_client_call loci_rpc_client_call;

LOCI_MUST_CHECK loci_status loci_rpc_channel_open(const char *address, loci_rpc_channel **out,
                                                  loci_error *err);
void loci_rpc_channel_close(loci_rpc_channel *channel);
/* timeout_ms 0 = none. While a call waits it polls *interrupt (may be NULL) every 50 ms and cancels
 * the call when it is set (by a signal handler or another thread). */
LOCI_MUST_CHECK loci_status loci_rpc_unary(loci_rpc_channel *channel, const char *path,
                                           const ProtobufCMessage *request,
                                           const ProtobufCMessageDescriptor *response_type,
                                           unsigned timeout_ms, const atomic_int *interrupt,
                                           ProtobufCMessage **response, loci_error *err);
LOCI_MUST_CHECK loci_status loci_rpc_call_open(loci_rpc_channel *channel, const char *path,
                                               const ProtobufCMessageDescriptor *response_type,
                                               unsigned timeout_ms, const atomic_int *interrupt,
                                               loci_rpc_client_call **out, loci_error *err);
/* send and read may be called from two threads at once, one each. A send to a server that has ended
 * the call fails with the call's status when it is known, else with LOCI_E_RPC, reason
 * STREAM_ENDED: then read on to the end for the status, which may be OK. */
LOCI_MUST_CHECK loci_status loci_rpc_call_send(loci_rpc_client_call *call,
                                               const ProtobufCMessage *message, loci_error *err);
LOCI_MUST_CHECK loci_status loci_rpc_call_half_close(loci_rpc_client_call *call, loci_error *err);
/* *message = NULL at the end of the stream; then the status is that of the call, with text and
 * reason from the server in *err. Free messages with protobuf_c_message_free_unpacked(m, NULL). */
LOCI_MUST_CHECK loci_status loci_rpc_call_read(loci_rpc_client_call *call,
                                               ProtobufCMessage **message, loci_error *err);
void loci_rpc_call_cancel(loci_rpc_client_call *call);
void loci_rpc_call_close(loci_rpc_client_call *call); /* cancels if unfinished */

/* Call once in a process before / after all use. Block signals first: gRPC starts threads. */
void loci_rpc_init(void);
void loci_rpc_shutdown(void);

#endif
