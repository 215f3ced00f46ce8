/* SPDX-License-Identifier: Apache-2.0
 *
 * The server: options, listening, armed slots, pollers, and the order of a graceful stop.
 *
 * One completion queue, polled by `pollers` threads, carries every tag of the server, the one of
 * the shutdown included. Requests are taken with generic slots, so that unknown methods are
 * answered too. A slot is armed again when its call was accepted, unless too many calls live; then
 * when one ends.
 *
 * Order of a stop:
 *   1. health NOT_SERVING; calls that come from now on are refused; up to drain_ms for the others;
 *   2. shutdown_and_notify: armed slots come back, and each connection gets GOAWAY and PING and is
 *      closed when the client has answered the PING, which proves that it has read all replies.
 *      Were this the first step, the core would close a connection together with its last call,
 *      and a client that writes (flow control) before it has read all would find a broken pipe;
 *   3. cancel_all_calls, when a call outlived step 1 or a client does not answer: READ_MS after the
 *      last call has ended, but at least CLOSE_MS;
 *   4. without bound until no call lives, no slot is armed and the shutdown tag came; only then are
 *      the pools and the queue closed, because the shutdown tag can come while handlers still hold
 *      calls and a batch on a closed queue aborts.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "services/rpc/rpc_internal.h"

/* gRPC 1.51 is said to be remotely abortable by crafted header blocks above 8 KiB
 * (CVE-2023-1428): stay below whatever the options say. */
#define METADATA_BYTES_CAP 8000
#define STREAMS_PER_CONNECTION 256
#define FIRST_MESSAGE_MS 30000
#define TICK_MS 250
#define READ_MS 2000 /* for a client to read its last reply */
#define CLOSE_MS 300 /* for clients that have, to close */
#define PROMPT_THREADS 2
#define PROMPT_QUEUE 64
#define NS_PER_MS 1000000u

void loci_rpc_server_options_default(loci_rpc_server_options *options) {
    *options = (loci_rpc_server_options){.workers = 8,
                                         .queue_max = 64,
                                         .long_calls_max = 128,
                                         .pollers = 1,
                                         .message_bytes_max = 4u << 20,
                                         .send_bytes_max = 4u << 20,
                                         .metadata_bytes_max = 8u << 10,
                                         .drain_ms = 10000,
                                         .stream_idle_ms = 300000};
}

/* ------------------------------------------------------------------ creation */

static loci_status check_options(const loci_rpc_server_options *options, loci_error *err) {
    if (options->workers == 0 || options->workers > 1024 || options->long_calls_max == 0 ||
        options->long_calls_max > 4096 || options->queue_max > 65536 || options->pollers == 0 ||
        options->pollers > LOCI__POLLERS_MAX) {
        return loci_fail(err, LOCI_E_INVAL,
                         "rpc options: workers 1-1024, long_calls_max 1-4096, queue_max 0-65536, "
                         "pollers 1-%d",
                         LOCI__POLLERS_MAX);
    }
    if (options->message_bytes_max < 1024 || options->message_bytes_max > (256u << 20) ||
        options->send_bytes_max < 1024 || options->send_bytes_max > (256u << 20) ||
        options->metadata_bytes_max < 1024) {
        return loci_fail(err, LOCI_E_INVAL,
                         "rpc options: messages of 1 KiB to 256 MiB, metadata of at least 1 KiB");
    }
    if (options->calls_bytes_max > 0 && options->calls_bytes_max / 8 < options->message_bytes_max) {
        return loci_fail(err, LOCI_E_INVAL,
                         "rpc options: calls_bytes_max is 0 or at least 8 times message_bytes_max");
    }
    return LOCI_OK;
}

static grpc_arg int_arg(const char *key, size_t value) {
    return (grpc_arg){GRPC_ARG_INTEGER, (char *)(uintptr_t)key, {.integer = (int)value}};
}

static void create_core(loci_rpc_server *server) {
    const loci_rpc_server_options *options = &server->options;
    size_t metadata = options->metadata_bytes_max;
    if (metadata > METADATA_BYTES_CAP) metadata = METADATA_BYTES_CAP;
    grpc_arg list[] = {
        int_arg(GRPC_ARG_ALLOW_REUSEPORT, 0), /* or two servers silently share a port */
        int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, options->message_bytes_max),
        int_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, options->send_bytes_max),
        int_arg(GRPC_ARG_MAX_METADATA_SIZE, metadata),
        int_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, STREAMS_PER_CONNECTION),
        /* A message of 4 MiB could unzip to 4 GiB. */
        int_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1u << GRPC_COMPRESS_NONE),
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        int_arg(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000),
        int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, 60000), /* finds clients that vanished */
        int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000),
        int_arg(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000),
    };
    grpc_channel_args args = {sizeof list / sizeof list[0], list};
    server->core = grpc_server_create(&args, NULL);
    server->queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server->core, server->queue, NULL);
}

static loci_status add_builtin(loci_rpc_server *server, loci_error *err) {
    const loci_rpc_service health = {"grpc.health.v1.Health", loci__health_methods, 2, server};
    LOCI_TRY(loci_rpc_server_add(server, &health, err));
    server->reflection.services = server->services;
    server->reflection.service_count = &server->service_count;
    if (server->reflection.file_count == 0) return LOCI_OK;
    const loci_rpc_service services[2] = {
        {"grpc.reflection.v1.ServerReflection", &loci__reflection_methods[0], 1,
         &server->reflection},
        {"grpc.reflection.v1alpha.ServerReflection", &loci__reflection_methods[1], 1,
         &server->reflection},
    };
    LOCI_TRY(loci_rpc_server_add(server, &services[0], err));
    return loci_rpc_server_add(server, &services[1], err);
}

static void on_core_stopped(void *owner, bool ok) {
    (void)ok;
    loci_rpc_server *server = owner;
    pthread_mutex_lock(&server->mu);
    server->core_stopped = true;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mu);
}

static loci_status init_pools(loci_rpc_server *server, loci_error *err) {
    const loci_rpc_server_options *options = &server->options;
    LOCI_TRY(loci__pool_init(&server->pools[LOCI_RPC_WORKERS], "rpc-worker", options->workers,
                             options->queue_max, err));
    LOCI_TRY(loci__pool_init(&server->pools[LOCI_RPC_LONG], "rpc-long", options->long_calls_max, 0,
                             err));
    return loci__pool_init(&server->pools[LOCI_RPC_PROMPT], "rpc-prompt", PROMPT_THREADS,
                           PROMPT_QUEUE, err);
}

loci_status loci_rpc_server_create(const loci_rpc_server_options *options,
                                   loci_slice descriptor_set, loci_rpc_server **out,
                                   loci_error *err) {
    *out = NULL;
    LOCI_TRY(check_options(options, err));
    loci_rpc_server *server = calloc(1, sizeof *server);
    if (!server) return loci_fail(err, LOCI_E_NOMEM, "no memory for an rpc server");
    server->options = *options;
    server->live_max = options->workers + options->queue_max + options->long_calls_max +
                       PROMPT_THREADS + PROMPT_QUEUE + LOCI__SLOTS;
    server->shutdown_tag = (loci__tag){on_core_stopped, server};
    loci__memory_init(&server->memory, options->calls_bytes_max);
    pthread_mutex_init(&server->mu, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&server->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    create_core(server);

    loci_status status = init_pools(server, err);
    if (status == LOCI_OK) {
        status = loci__health_init(&server->health, options->long_calls_max, err);
    }
    if (status == LOCI_OK) {
        status = loci__reflection_init(&server->reflection, descriptor_set, err);
    }
    if (status == LOCI_OK) status = add_builtin(server, err);
    if (status != LOCI_OK) {
        loci_rpc_server_destroy(server);
        return status;
    }
    *out = server;
    return LOCI_OK;
}

loci_status loci_rpc_server_add(loci_rpc_server *server, const loci_rpc_service *service,
                                loci_error *err) {
    if (server->state != LOCI__CREATED || server->service_count == LOCI__SERVICES_MAX) {
        return loci_fail(err, LOCI_E_PRECONDITION,
                         "service %s cannot be added: the server runs or has %d services",
                         service->name, LOCI__SERVICES_MAX);
    }
    server->services[server->service_count++] = *service;
    return LOCI_OK;
}

const loci_rpc_method *loci__server_find(const loci_rpc_server *server, grpc_slice path,
                                         void **service_ctx) {
    for (size_t i = 0; i < server->service_count; i++) {
        const loci_rpc_service *service = &server->services[i];
        for (size_t j = 0; j < service->method_count; j++) {
            if (grpc_slice_str_cmp(path, service->methods[j].path) != 0) continue;
            *service_ctx = service->ctx;
            return &service->methods[j];
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------ listening */

/* LOCI_OK when the path is free or was a socket that nobody listens on (then it is removed). */
static loci_status clear_stale_socket(const char *path, loci_error *err) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!path[0] || strlen(path) >= sizeof address.sun_path) {
        return loci_fail(err, LOCI_E_INVAL, "unix:%s: a socket path has 1 to %zu bytes", path,
                         sizeof address.sun_path - 1);
    }
    struct stat info;
    if (lstat(path, &info) != 0) {
        if (errno == ENOENT) return LOCI_OK;
        return loci_fail(err, LOCI_E_IO, "unix:%s: %s", path, strerror(errno));
    }
    if (!S_ISSOCK(info.st_mode)) {
        return loci_fail(err, LOCI_E_EXISTS, "unix:%s: the file exists and is no socket", path);
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return loci_fail(err, LOCI_E_IO, "unix:%s: %s", path, strerror(errno));
    memcpy(address.sun_path, path, strlen(path));
    int failed = connect(fd, (const struct sockaddr *)&address, sizeof address) != 0 ? errno : 0;
    close(fd);
    if (failed != ECONNREFUSED) {
        return loci_fail(err, LOCI_E_EXISTS, "unix:%s: another server listens there", path);
    }
    if (unlink(path) != 0 && errno != ENOENT) {
        return loci_fail(err, LOCI_E_IO, "unix:%s: cannot remove the stale socket: %s", path,
                         strerror(errno));
    }
    return LOCI_OK;
}

/* HOST:PORT with HOST not empty and PORT 0-65535. */
static bool tcp_address_valid(const char *address) {
    const char *colon = strrchr(address, ':');
    if (!colon || colon == address || strlen(colon) < 2 || strlen(colon) > 6) return false;
    if (strspn(colon + 1, "0123456789") != strlen(colon + 1)) return false;
    if (strtoul(colon + 1, NULL, 10) > 65535) return false;
    bool bracketed = address[0] == '[' && colon[-1] == ']';
    return bracketed || strchr(address, ':') == colon;
}

static int add_port(loci_rpc_server *server, const char *address) {
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    int bound = grpc_server_add_http2_port(server->core, address, credentials);
    grpc_server_credentials_release(credentials);
    return bound;
}

loci_status loci_rpc_server_listen(loci_rpc_server *server, const char *address, int *port,
                                   loci_error *err) {
    *port = 0;
    if (server->state != LOCI__CREATED) {
        return loci_fail(err, LOCI_E_PRECONDITION, "%s: the server runs already", address);
    }
    if (strncmp(address, "unix:", 5) == 0) {
        const char *path = address + 5;
        LOCI_TRY(clear_stale_socket(path, err));
        mode_t old = umask(0177); /* bind creates the file 0600: nobody else connects meanwhile */
        int bound = add_port(server, address);
        umask(old);
        if (!bound) {
            return loci_fail_reason(err, LOCI_E_UNAVAILABLE, "CANNOT_LISTEN",
                                    "cannot listen on %s: is its directory there and writable?",
                                    address);
        }
        loci_buf_append(&server->sockets, path, strlen(path) + 1);
        return loci_buf_status(&server->sockets);
    }
    if (!tcp_address_valid(address)) {
        return loci_fail(err, LOCI_E_INVAL, "%s: an address is HOST:PORT, [HOST]:PORT or unix:PATH",
                         address);
    }
    *port = add_port(server, address);
    if (*port <= 0) {
        *port = 0;
        return loci_fail_reason(err, LOCI_E_UNAVAILABLE, "CANNOT_LISTEN",
                                "cannot listen on %s: the port is in use, or the address is not "
                                "of this machine",
                                address);
    }
    return LOCI_OK;
}

static void remove_sockets(loci_rpc_server *server) {
    const loci_buf *sockets = &server->sockets;
    for (size_t at = 0; at < sockets->len; at += strlen((const char *)sockets->data + at) + 1) {
        unlink((const char *)sockets->data + at);
    }
    loci_buf_fini(&server->sockets);
}

/* ------------------------------------------------------------------ slots and pollers */

static void on_accept(void *owner, bool ok);

/* Under server->mu: arms what is missing while the core takes calls and there is room for them.
 * Every armed slot may become a live call. */
static void arm_slots(loci_rpc_server *server) {
    while (!server->closing && server->armed < LOCI__SLOTS &&
           server->live + server->armed < server->live_max) {
        loci_rpc_call *call = loci__call_create(server, on_accept);
        if (!call) break; /* the next call that ends tries again */
        LOCI__TAG_GIVEN(&call->accept_tag);
        grpc_call_error error =
            grpc_server_request_call(server->core, &call->core, &call->details, &call->metadata,
                                     server->queue, server->queue, &call->accept_tag);
        if (error != GRPC_CALL_OK) {
            loci__call_free(call);
            break;
        }
        server->armed++;
    }
}

static void on_accept(void *owner, bool ok) {
    loci_rpc_call *call = owner;
    loci_rpc_server *server = call->server;
    pthread_mutex_lock(&server->mu);
    server->armed--;
    call->late = server->state != LOCI__RUNNING;
    if (ok) server->live++;
    if (ok && call->late) server->late++;
    arm_slots(server);
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mu);
    if (ok)
        loci__call_accepted(call);
    else
        loci__call_free(call);
}

void loci__server_call_ended(loci_rpc_server *server, bool late) {
    pthread_mutex_lock(&server->mu);
    server->live--;
    server->ended_ns = loci_now_ns();
    if (late) server->late--;
    arm_slots(server);
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mu);
}

void loci__server_awaiting(loci_rpc_server *server, loci_rpc_call *call, bool add) {
    pthread_mutex_lock(&server->mu);
    if (add) {
        call->previous = NULL;
        call->next = server->awaiting;
        if (call->next) call->next->previous = call;
        server->awaiting = call;
    } else {
        if (call->previous)
            call->previous->next = call->next;
        else
            server->awaiting = call->next;
        if (call->next) call->next->previous = call->previous;
        call->next = call->previous = NULL;
    }
    pthread_mutex_unlock(&server->mu);
}

/* Calls on the list hold references, and leave it under server->mu before they drop them. */
static void expire_awaiting(loci_rpc_server *server) {
    uint64_t limit_ms = server->options.stream_idle_ms;
    if (limit_ms == 0 || limit_ms > FIRST_MESSAGE_MS) limit_ms = FIRST_MESSAGE_MS;
    uint64_t now = loci_now_ns();
    pthread_mutex_lock(&server->mu);
    for (loci_rpc_call *call = server->awaiting; call; call = call->next) {
        if (now - call->accepted_ns > limit_ms * NS_PER_MS) loci__call_expire(call);
    }
    pthread_mutex_unlock(&server->mu);
}

/* Runs tags until the queue is closed and empty. */
static void *poll_queue(void *arg) {
    loci_rpc_server *server = arg;
    uint64_t swept_ns = loci_now_ns();
    for (;;) {
        gpr_timespec until =
            gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(TICK_MS, GPR_TIMESPAN));
        grpc_event event = grpc_completion_queue_next(server->queue, until, NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        if (event.type == GRPC_OP_COMPLETE) {
            loci__tag *tag = event.tag;
            LOCI__TAG_TAKEN(tag);
            tag->fn(tag->owner, event.success != 0);
        }
        uint64_t now = loci_now_ns();
        if (now - swept_ns < TICK_MS * (uint64_t)NS_PER_MS) continue;
        swept_ns = now;
        expire_awaiting(server);
    }
}

loci_status loci_rpc_server_start(loci_rpc_server *server, loci_error *err) {
    if (server->state != LOCI__CREATED) {
        return loci_fail(err, LOCI_E_PRECONDITION, "the rpc server was started before");
    }
    grpc_server_start(server->core);
    for (unsigned i = 0; i < server->options.pollers; i++) {
        int failed = pthread_create(&server->pollers[i], NULL, poll_queue, server);
        if (failed) {
            if (server->poller_count > 0) break; /* one is enough */
            return loci_fail(err, LOCI_E_NOMEM, "cannot start a poller: %s", strerror(failed));
        }
        pthread_setname_np(server->pollers[i], "rpc-poller");
        server->poller_count++;
    }
    loci__health_set(&server->health, "", true, true);
    for (size_t i = 0; i < server->service_count; i++) {
        loci__health_set(&server->health, server->services[i].name, true, true);
    }
    pthread_mutex_lock(&server->mu);
    server->state = LOCI__RUNNING;
    arm_slots(server);
    pthread_mutex_unlock(&server->mu);
    return LOCI_OK;
}

void loci_rpc_server_set_serving(loci_rpc_server *server, const char *service, bool serving) {
    loci__health_set(&server->health, service, serving, false);
}

loci_rpc_load loci_rpc_server_load(loci_rpc_server *server) {
    loci_rpc_load load = {0, 0};
    loci__pool_load(&server->pools[LOCI_RPC_WORKERS], &load);
    loci__pool_load(&server->pools[LOCI_RPC_LONG], &load);
    return load;
}

/* ------------------------------------------------------------------ stopping */

static bool is_drained(const loci_rpc_server *server) {
    return server->live == server->late;
}

static bool is_closed(const loci_rpc_server *server) {
    return server->live == 0 && server->armed == 0 && server->core_stopped;
}

static bool wait_until(loci_rpc_server *server, bool (*reached)(const loci_rpc_server *server),
                       unsigned ms) {
    uint64_t until = loci_now_ns() + (uint64_t)ms * NS_PER_MS;
    struct timespec at = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_mutex_lock(&server->mu);
    bool done;
    while (!(done = reached(server))) {
        if (pthread_cond_timedwait(&server->changed, &server->mu, &at) != 0) break;
    }
    pthread_mutex_unlock(&server->mu);
    return done;
}

static void close_core(loci_rpc_server *server) {
    pthread_mutex_lock(&server->mu);
    server->closing = true;
    pthread_mutex_unlock(&server->mu);
    LOCI__TAG_GIVEN(&server->shutdown_tag);
    grpc_server_shutdown_and_notify(server->core, server->queue, &server->shutdown_tag);
}

/* How long clients may take to read and close; idle ones may not look at their connection. */
static unsigned close_ms(loci_rpc_server *server) {
    pthread_mutex_lock(&server->mu);
    uint64_t since_ms = (loci_now_ns() - server->ended_ns) / NS_PER_MS;
    pthread_mutex_unlock(&server->mu);
    return since_ms + CLOSE_MS < READ_MS ? READ_MS - (unsigned)since_ms : CLOSE_MS;
}

static void stop_running(loci_rpc_server *server) {
    loci__health_drain(&server->health);
    bool drained = wait_until(server, is_drained, server->options.drain_ms);
    close_core(server);
    if (drained && wait_until(server, is_closed, close_ms(server))) return;
    if (!drained) {
        loci_log_warn("rpc: calls still run after %u ms of draining; cancelling them",
                      server->options.drain_ms);
    }
    grpc_server_cancel_all_calls(server->core); /* closes the connections, too */
    while (!wait_until(server, is_closed, 10000)) {
        loci_rpc_load load = loci_rpc_server_load(server);
        loci_log_warn("rpc: waiting for %u cancelled handlers to return", load.active);
    }
}

void loci_rpc_server_shutdown(loci_rpc_server *server) {
    pthread_mutex_lock(&server->mu);
    bool started = server->state == LOCI__RUNNING;
    bool mine = started || server->state == LOCI__CREATED;
    if (mine) server->state = LOCI__DRAINING;
    while (!mine && server->state != LOCI__STOPPED) {
        pthread_cond_wait(&server->changed, &server->mu);
    }
    pthread_mutex_unlock(&server->mu);
    if (!mine) return;

    if (started)
        stop_running(server);
    else
        close_core(server);
    for (int lane = 0; lane < LOCI_RPC_LANES; lane++) loci__pool_stop(&server->pools[lane]);
    grpc_completion_queue_shutdown(server->queue);
    if (server->poller_count == 0) poll_queue(server);
    for (unsigned i = 0; i < server->poller_count; i++) pthread_join(server->pollers[i], NULL);
    grpc_server_destroy(server->core);
    grpc_completion_queue_destroy(server->queue);
    remove_sockets(server);

    pthread_mutex_lock(&server->mu);
    server->state = LOCI__STOPPED;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mu);
}

void loci_rpc_server_destroy(loci_rpc_server *server) {
    if (!server) return;
    loci_rpc_server_shutdown(server);
    for (int lane = 0; lane < LOCI_RPC_LANES; lane++) loci__pool_fini(&server->pools[lane]);
    loci__health_fini(&server->health);
    loci__memory_fini(&server->memory);
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->mu);
    free(server);
}
