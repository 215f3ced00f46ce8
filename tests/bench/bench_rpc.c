/* SPDX-License-Identifier: Apache-2.0
 *
 * The RPC runtime over loopback, client and server in one process. Prints one JSON line: unary
 * latency with one call in flight, unary calls a second with 64 threads, and the rate of a server
 * stream of 256 KiB messages.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "loci/v1/loci.pb-c.h"
#include "services/rpc/rpc.h"

#define CALLS 5000
#define THREADS 64
#define CALLS_PER_THREAD 500
#define STREAM_MESSAGES 2000
#define MESSAGE_BYTES (256u << 10)

static uint8_t payload[MESSAGE_BYTES];

static loci_status echo(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    ProtobufCMessage *message;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    return loci_rpc_send(call, message, err);
}

static loci_status stream(loci_rpc_call *call, void *ctx, loci_error *err) {
    (void)ctx;
    ProtobufCMessage *message;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    Loci__V1__ReadDocumentResponse reply = LOCI__V1__READ_DOCUMENT_RESPONSE__INIT;
    reply.data = (ProtobufCBinaryData){sizeof payload, payload};
    for (int i = 0; i < STREAM_MESSAGES; i++) LOCI_TRY(loci_rpc_send(call, &reply.base, err));
    return LOCI_OK;
}

static const loci_rpc_method methods[] = {
    {"/loci.bench.Bench/Echo", LOCI_RPC_UNARY, &loci__v1__read_document_response__descriptor,
     &loci__v1__read_document_response__descriptor, echo, LOCI_RPC_WORKERS},
    {"/loci.bench.Bench/Stream", LOCI_RPC_SERVER_STREAM,
     &loci__v1__read_document_response__descriptor, &loci__v1__read_document_response__descriptor,
     stream, LOCI_RPC_WORKERS},
};
static const loci_rpc_service service = {"loci.bench.Bench", methods, 2, NULL};

static void must(loci_status status, const loci_error *err) {
    if (status == LOCI_OK) return;
    fprintf(stderr, "bench_rpc: %s\n", err->text);
    abort();
}

static void call_echo(loci_rpc_channel *channel) {
    loci_error err;
    Loci__V1__ReadDocumentResponse request = LOCI__V1__READ_DOCUMENT_RESPONSE__INIT;
    request.data = (ProtobufCBinaryData){16, payload};
    ProtobufCMessage *response;
    must(loci_rpc_unary(channel, methods[0].path, &request.base, methods[0].response, 0, NULL,
                        &response, &err),
         &err);
    protobuf_c_message_free_unpacked(response, NULL);
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void *run_thread(void *channel) {
    for (int i = 0; i < CALLS_PER_THREAD; i++) call_echo(channel);
    return NULL;
}

static double calls_per_s(loci_rpc_channel *channel) {
    pthread_t threads[THREADS];
    uint64_t from = loci_now_ns();
    for (int i = 0; i < THREADS; i++) {
        if (pthread_create(&threads[i], NULL, run_thread, channel) != 0) abort();
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    return THREADS * CALLS_PER_THREAD * 1e9 / (double)(loci_now_ns() - from);
}

static double stream_mb_per_s(loci_rpc_channel *channel) {
    loci_error err;
    loci_rpc_client_call *call;
    Loci__V1__ReadDocumentResponse request = LOCI__V1__READ_DOCUMENT_RESPONSE__INIT;
    uint64_t from = loci_now_ns(), bytes = 0;
    must(loci_rpc_call_open(channel, methods[1].path, methods[1].response, 0, NULL, &call, &err),
         &err);
    must(loci_rpc_call_send(call, &request.base, &err), &err);
    for (;;) {
        ProtobufCMessage *message;
        must(loci_rpc_call_read(call, &message, &err), &err);
        if (!message) break;
        bytes += ((Loci__V1__ReadDocumentResponse *)message)->data.len;
        protobuf_c_message_free_unpacked(message, NULL);
    }
    loci_rpc_call_close(call);
    return (double)bytes * 1e3 / (double)(loci_now_ns() - from);
}

int main(void) {
    loci_rpc_init();
    loci_error err;
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    loci_rpc_server *server;
    loci_rpc_channel *channel;
    int port;
    must(loci_rpc_server_create(&options, loci_slice_of(NULL, 0), &server, &err), &err);
    must(loci_rpc_server_add(server, &service, &err), &err);
    must(loci_rpc_server_listen(server, "127.0.0.1:0", &port, &err), &err);
    must(loci_rpc_server_start(server, &err), &err);
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    must(loci_rpc_channel_open(address, &channel, &err), &err);

    static uint64_t times[CALLS];
    for (int i = 0; i < 200; i++) call_echo(channel);
    for (int i = 0; i < CALLS; i++) {
        uint64_t from = loci_now_ns();
        call_echo(channel);
        times[i] = loci_now_ns() - from;
    }
    qsort(times, CALLS, sizeof times[0], compare);
    double rate = calls_per_s(channel);
    double stream_rate = stream_mb_per_s(channel);
    printf("{\"bench\": \"rpc\", \"unary_p50_us\": %.0f, \"unary_p99_us\": %.0f, "
           "\"unary_rps_64\": %.0f, \"stream_mb_s\": %.0f}\n",
           (double)times[CALLS / 2] / 1e3, (double)times[CALLS * 99 / 100] / 1e3, rate,
           stream_rate);
    loci_rpc_channel_close(channel);
    loci_rpc_server_destroy(server);
    loci_rpc_shutdown();
    return 0;
}
