/* SPDX-License-Identifier: Apache-2.0
 *
 * The test service as a program: prints "port N" and serves until SIGTERM; then drains, prints the
 * counters of the handlers and "bye". Options are KEY=VALUE arguments; see `keys`.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/descriptor_set.h"
#include "rpc_testservice.h"

static bool set_option(loci_rpc_server_options *options, const char *argument) {
    const char *equals = strchr(argument, '=');
    if (!equals) return false;
    size_t len = (size_t)(equals - argument);
    unsigned value = (unsigned)strtoul(equals + 1, NULL, 10);
    const struct {
        const char *key;
        unsigned *number;
        size_t *size;
    } keys[] = {
        {"workers", &options->workers, NULL},           {"queue", &options->queue_max, NULL},
        {"long", &options->long_calls_max, NULL},       {"pollers", &options->pollers, NULL},
        {"message", NULL, &options->message_bytes_max}, {"send", NULL, &options->send_bytes_max},
        {"drain_ms", &options->drain_ms, NULL},         {"idle_ms", &options->stream_idle_ms, NULL},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        if (strlen(keys[i].key) != len || strncmp(keys[i].key, argument, len) != 0) continue;
        if (keys[i].number)
            *keys[i].number = value;
        else
            *keys[i].size = value;
        return true;
    }
    return false;
}

int main(int argc, char **argv) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); /* before gRPC starts threads */

    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    const char *address = "127.0.0.1:0";
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "listen=", 7) == 0) {
            address = argv[i] + 7;
        } else if (!set_option(&options, argv[i])) {
            fprintf(stderr, "unknown argument %s\n", argv[i]);
            return 2;
        }
    }
    loci_rpc_init();
    loci_error err = {LOCI_OK, "", ""};
    test_service state;
    loci_rpc_service service;
    loci_rpc_server *server = NULL;
    int port = 0;
    test_service_fill(&service, &state);
    loci_status status = loci_rpc_server_create(&options, loci_descriptor_set(), &server, &err);
    if (status == LOCI_OK) status = loci_rpc_server_add(server, &service, &err);
    if (status == LOCI_OK) status = loci_rpc_server_listen(server, address, &port, &err);
    test_service_set_server(server);
    if (status == LOCI_OK) status = loci_rpc_server_start(server, &err);
    if (status == LOCI_OK) {
        printf("port %d\n", port);
        fflush(stdout);
        int signal_number;
        sigwait(&signals, &signal_number);
        loci_rpc_server_shutdown(server);
    } else {
        fprintf(stderr, "rpc_testserver: %s\n", err.text);
    }
    loci_rpc_server_destroy(server);
    loci_rpc_shutdown();
    printf("running %d finished %d cancelled %d timed_out %d false_ends %d\nbye\n",
           atomic_load(&state.running), atomic_load(&state.finished), atomic_load(&state.cancelled),
           atomic_load(&state.timed_out), atomic_load(&state.false_ends));
    return status == LOCI_OK ? 0 : 1;
}
