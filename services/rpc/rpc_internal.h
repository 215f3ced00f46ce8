/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the runtime share: arenas, wire reading, the call object, thread pools,
 * error details, health and reflection. Nobody outside services/rpc includes this.
 *
 * Life of a server call. An armed call waits in the core for a request. Accepted, it starts
 * RECV_CLOSE_ON_SERVER (the only notice of a cancellation) and, if the method takes exactly one
 * request, the receipt of that request; then it goes to a pool. The pool's thread runs the handler
 * and finishes the call with one status batch. A call holds one reference for its owner (poller,
 * then pool, then handler) and one for each batch under way; the last one frees it. The core's
 * completion queue is closed only when no call lives: a batch started on a closed queue aborts the
 * process.
 *
 * Lock order: health -> call; server, pool and memory locks are leaves. No lock is held while a
 * handler runs.
 */
#ifndef LOCI_SERVICES_RPC_RPC_INTERNAL_H
#define LOCI_SERVICES_RPC_RPC_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>

#include "services/rpc/rpc.h"

/* What a thread wrote before it gave a tag to the core is seen by the thread that polls the tag.
 * ThreadSanitizer cannot know, since the core is not built with it. */
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define LOCI__TAG_GIVEN(tag) __tsan_release(tag)
#define LOCI__TAG_TAKEN(tag) __tsan_acquire(tag)
#else
#define LOCI__TAG_GIVEN(tag) ((void)(tag))
#define LOCI__TAG_TAKEN(tag) ((void)(tag))
#endif

/* --- arena.c: bump allocation with a bound, as a protobuf-c allocator ----------------- */
/* What a client's stream holds while it is idle: its thread, a kept block of its arena, and what a
 * handler keeps between two messages (measured with Register inside a document). */
#define LOCI__STREAM_BYTES (512u << 10)

/* What the messages of all calls of a server take together. */
typedef struct loci__memory {
    pthread_mutex_t mu;
    size_t used, most; /* most 0: no bound */
    size_t streams;
} loci__memory;

void loci__memory_init(loci__memory *memory, size_t most);
void loci__memory_fini(loci__memory *memory);
/* False when it does not fit. Small amounts always fit. memory NULL: nothing is counted. */
bool loci__memory_take(loci__memory *memory, size_t bytes);
void loci__memory_give(loci__memory *memory, size_t bytes);
/* LOCI__STREAM_BYTES; streams together get at most half, so that their messages find room. */
bool loci__memory_take_stream(loci__memory *memory);
void loci__memory_give_stream(loci__memory *memory);

typedef struct loci__arena_block loci__arena_block;
typedef struct loci__arena {
    loci__arena_block *head;
    size_t allocated_bytes; /* over all blocks */
    size_t limit_bytes;
    size_t paid_bytes;    /* taken from `memory`; at least allocated_bytes */
    bool exhausted;       /* an allocation was refused since the last reset */
    bool refused;         /* ... because of `memory` */
    loci__memory *memory; /* NULL = not counted */
    ProtobufCAllocator allocator;
} loci__arena;

void loci__arena_init(loci__arena *arena, size_t limit_bytes);
void loci__arena_reset(loci__arena *arena);
void loci__arena_fini(loci__arena *arena);
void *loci__arena_alloc(loci__arena *arena, size_t bytes); /* NULL beyond the limit */
/* A NUL-terminated copy, or NULL. */
char *loci__arena_text(loci__arena *arena, const void *data, size_t len);

/* --- message.c: messages and wire format ---------------------------------------------- */
/* One field of a serialised message: value for the varint and fixed types, bytes for type 2. */
typedef struct loci__wire_field {
    uint32_t number;
    unsigned type;
    uint64_t value;
    loci_slice bytes;
} loci__wire_field;
typedef struct loci__wire {
    loci_slice bytes;
    size_t at;
    bool failed;
} loci__wire;

loci__wire loci__wire_of(loci_slice bytes);
/* The next field; false at the end and when the bytes are malformed (then wire->failed). */
bool loci__wire_next(loci__wire *wire, loci__wire_field *field);

/* Takes the buffer. allocator NULL = malloc. LOCI_E_INVAL for what is no valid message: also for
 * text that is not UTF-8 or holds a NUL, which protobuf-c would cut silently. */
loci_status loci__message_unpack(const ProtobufCMessageDescriptor *descriptor,
                                 grpc_byte_buffer *buffer, ProtobufCAllocator *allocator,
                                 ProtobufCMessage **out, loci_error *err);
/* LOCI_E_LIMIT when it is larger than bytes_max. */
loci_status loci__message_pack(const ProtobufCMessage *message, size_t bytes_max,
                               grpc_byte_buffer **out, loci_error *err);
bool loci__utf8_valid(const uint8_t *data, size_t len);
/* Puts '?' in the place of bytes that are not UTF-8 or would break a header line. */
void loci__utf8_sanitise(char *text);

/* --- errors.c: google.rpc.Status ------------------------------------------------------ */
#define LOCI__ERROR_PAIRS_MAX 8
typedef struct loci__error_pair {
    const char *key;
    const char *value;
} loci__error_pair;

/* The serialised Status for grpc-status-details-bin, with ErrorInfo, and with RetryInfo when
 * retry_ms > 0. err->text must be valid UTF-8. */
grpc_slice loci__error_details_pack(loci_status status, const loci_error *err,
                                    const loci__error_pair *pairs, size_t pair_count,
                                    unsigned retry_ms);
/* Fills reason (and text when err->text is empty) from serialised details; ignores what it cannot
 * read. */
void loci__error_details_read(loci_slice details, loci_error *err);

/* --- workers.c: bounded pools of threads that run calls ------------------------------- */
typedef struct loci__pool {
    pthread_mutex_t mu;
    pthread_cond_t wake;
    loci_rpc_call *head, *tail; /* waiting calls, linked by call->next */
    pthread_t *threads;
    unsigned thread_count, threads_max;
    unsigned idle; /* threads that will take a call without further notice */
    unsigned queued, queue_max;
    bool stopping;
    char name[16];
} loci__pool;

loci_status loci__pool_init(loci__pool *pool, const char *name, unsigned threads_max,
                            unsigned queue_max, loci_error *err);
/* Gives the owner's reference of the call to the pool; false when it is full. */
bool loci__pool_submit(loci__pool *pool, loci_rpc_call *call);
/* Ends and joins the threads; the queue must be empty and stay so. */
void loci__pool_stop(loci__pool *pool);
void loci__pool_fini(loci__pool *pool); /* after stop */
/* Adds what the pool runs and what waits in it. */
void loci__pool_load(loci__pool *pool, loci_rpc_load *load);

/* --- call.c ---------------------------------------------------------------------------- */
#define LOCI__REQUEST_ID_MAX 128

/* What a completion queue hands back. */
typedef struct loci__tag {
    void (*fn)(void *owner, bool ok);
    void *owner;
} loci__tag;

struct loci_rpc_call {
    loci_rpc_server *server;
    grpc_call *core;
    grpc_call_details details;
    grpc_metadata_array metadata;
    const loci_rpc_method *method;
    void *service_ctx;
    loci__pool *pool;
    loci_rpc_call *next, *previous; /* in the pool's queue, or in server->awaiting */
    uint64_t accepted_ns;
    atomic_uint refs;
    loci_cancel cancel;
    loci__tag accept_tag, close_tag, recv_tag, send_tag, finish_tag;
    int close_cancelled; /* the core's; read in the close tag only */
    bool late;           /* it came after the drain began */

    pthread_mutex_t mu; /* guards what follows and the starting of batches */
    pthread_cond_t changed;
    grpc_byte_buffer *received;
    bool recv_pending, recv_ready, recv_ok;
    bool first_taken, half_closed, recv_stopped;
    bool send_pending, send_ok, initial_sent;
    bool poked, closed;
    bool streaming;          /* it took loci__memory_take_stream */
    size_t held_bytes;       /* taken from server->memory beside that and the arenas */
    uint64_t moved_ns;       /* when a message last moved */
    grpc_byte_buffer *reply; /* of a method with one response: goes out with the status */

    loci__arena arena;      /* lives as long as the call, as the message of one_request calls */
    loci__arena recv_arena; /* of streams: until the next recv */
    unsigned retry_ms;
    loci__error_pair pairs[LOCI__ERROR_PAIRS_MAX];
    size_t pair_count;
    grpc_metadata trailing[2];
    size_t trailing_count;
    grpc_slice status_text;
    char request_id[LOCI__REQUEST_ID_MAX + 1];
};

loci_rpc_call *loci__call_create(loci_rpc_server *server, void (*on_accept)(void *owner, bool ok));
void loci__call_free(loci_rpc_call *call); /* one that was never accepted */
/* After the core filled it: takes over the reference of the accept tag as the owner's. Returns
 * with the call on its way to a pool, waiting for its first message, or refused. */
void loci__call_accepted(loci_rpc_call *call);
/* Runs the handler and finishes; consumes the owner's reference. */
void loci__call_run(loci_rpc_call *call);
/* Blocks until loci__call_poke or the end of the call. */
loci_status loci__call_wait_poke(loci_rpc_call *call);
void loci__call_poke(loci_rpc_call *call);
/* Ends a call that waited too long for its first message. */
void loci__call_expire(loci_rpc_call *call);

/* --- health.c -------------------------------------------------------------------------- */
#define LOCI__HEALTH_NAMES_MAX 64
#define LOCI__SERVICE_NAME_MAX 127
typedef struct loci__health_name {
    char name[LOCI__SERVICE_NAME_MAX + 1];
    bool serving;
} loci__health_name;
typedef struct loci__health {
    pthread_mutex_t mu;
    loci__health_name names[LOCI__HEALTH_NAMES_MAX];
    size_t name_count;
    bool draining;
    loci_rpc_call **watchers;
    size_t watcher_count, watchers_max;
} loci__health;

loci_status loci__health_init(loci__health *health, size_t watchers_max, loci_error *err);
void loci__health_fini(loci__health *health);
/* keep: does not change a name that is known already. */
void loci__health_set(loci__health *health, const char *service, bool serving, bool keep);
/* Everything NOT_SERVING for good; watchers are told and their streams end. */
void loci__health_drain(loci__health *health);
extern const loci_rpc_method loci__health_methods[2];

/* --- reflection.c ---------------------------------------------------------------------- */
#define LOCI__FILES_MAX 64
typedef struct loci__reflection {
    loci_slice files[LOCI__FILES_MAX]; /* serialised FileDescriptorProto */
    size_t file_count;
    const loci_rpc_service *services; /* the server's */
    const size_t *service_count;
} loci__reflection;

loci_status loci__reflection_init(loci__reflection *reflection, loci_slice descriptor_set,
                                  loci_error *err);
extern const loci_rpc_method loci__reflection_methods[2]; /* v1, v1alpha */

/* --- server.c -------------------------------------------------------------------------- */
#define LOCI__SERVICES_MAX 32
#define LOCI__POLLERS_MAX 16
#define LOCI__SLOTS 64

typedef enum loci__server_state {
    LOCI__CREATED,
    LOCI__RUNNING,
    LOCI__DRAINING,
    LOCI__STOPPED
} loci__server_state;

struct loci_rpc_server {
    loci_rpc_server_options options;
    grpc_server *core;
    grpc_completion_queue *queue;
    loci_rpc_service services[LOCI__SERVICES_MAX];
    size_t service_count;
    loci__pool pools[LOCI_RPC_LANES];
    loci__memory memory;
    loci__health health;
    loci__reflection reflection;
    loci_buf sockets; /* paths of our unix sockets, each with its NUL */
    pthread_t pollers[LOCI__POLLERS_MAX];
    unsigned poller_count;
    loci__tag shutdown_tag;

    pthread_mutex_t mu; /* guards what follows */
    pthread_cond_t changed;
    loci__server_state state;
    unsigned armed, live, live_max;
    unsigned late;           /* live calls that came after the drain began: they are refused */
    bool closing;            /* the core takes no more calls */
    uint64_t ended_ns;       /* when a call last ended */
    loci_rpc_call *awaiting; /* accepted calls that wait for their first message */
    bool core_stopped;       /* the shutdown tag came back */
};

void loci__server_call_ended(loci_rpc_server *server, bool late);
void loci__server_awaiting(loci_rpc_server *server, loci_rpc_call *call, bool add);
const loci_rpc_method *loci__server_find(const loci_rpc_server *server, grpc_slice path,
                                         void **service_ctx);

#endif
