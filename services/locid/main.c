/* SPDX-License-Identifier: Apache-2.0
 *
 * locid, the daemon: configuration, engine, server, signals.
 *
 * Order at start: signals are blocked before any thread exists, the engine opens (model, store,
 * pipeline), then the addresses are bound; so whoever can connect is served. At SIGTERM or SIGINT
 * running calls get drain_seconds; a second signal ends the process at once, which is safe: what
 * was acknowledged is on disk.
 */
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "proto/descriptor_set.h"
#include "services/common/text.h"
#include "services/locid/config.h"
#include "services/locid/node.h"

static void block_signals(sigset_t *set) {
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGUSR1); /* our own: the drain has ended */
    pthread_sigmask(SIG_BLOCK, set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* Every extent is an open, mapped file: take what the system allows. */
static void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* Large blocks go back to the system when they are freed, which glibc otherwise stops doing for
 * sizes that it has seen freed; few arenas, so that what one thread frees serves another. Measured:
 * 264 MiB of anonymous memory after a registration of 300,000 tokens without, 145 with. */
static void tune_malloc(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 256 << 10);
    mallopt(M_TRIM_THRESHOLD, 1 << 20);
    mallopt(M_ARENA_MAX, 4);
#endif
}

/* Ends this process when its parent does; false when the parent is gone already. */
static bool follow_parent(uint64_t parent) {
    if (parent == 0) return true;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    return (uint64_t)getppid() == parent;
}

/* For messages and streams of all calls together, which the server keeps to: a message and what is
 * made of it for each worker, and not less than what the server asks for. */
static size_t calls_bytes(const loci_config *config) {
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    size_t bytes = (size_t)config->workers * (options.message_bytes_max + (1u << 20));
    size_t least = 8 * options.message_bytes_max;
    return bytes > least ? bytes : least;
}

static loci_status open_engine(const loci_config *config, loci_engine **out, loci_error *err) {
    loci_engine_options options = {0};
    options.data = config->data;
    options.model = config->model;
    options.also_model = config->also_model[0] ? config->also_model : NULL;
    options.backend = config->backend;
    options.precision = config->precision;
    options.memory_bytes = config->memory_bytes;
    options.calls_bytes = calls_bytes(config);
    options.threads = (unsigned)config->threads;
    options.queries_max = (unsigned)config->queries;
    options.lexical_percent = config->lexical_percent > 0 ? (int)config->lexical_percent : -1;
    return loci_engine_open(&options, out, err);
}

static loci_rpc_service services[4];

static loci_status add_services(loci_daemon *node, loci_error *err) {
    const loci_rpc_service all[] = {
        {"loci.v1.CorpusService", loci_corpus_methods, loci_corpus_method_count, node},
        {"loci.v1.DocumentService", loci_document_methods, loci_document_method_count, node},
        {"loci.v1.QueryService", loci_query_methods, loci_query_method_count, node},
        {"loci.v1.NodeService", loci_node_methods, loci_node_method_count, node},
    };
    memcpy(services, all, sizeof services);
    for (size_t i = 0; i < sizeof services / sizeof services[0]; i++)
        LOCI_TRY(loci_rpc_server_add(node->server, &services[i], err));
    return LOCI_OK;
}

static loci_status start_server(const loci_config *config, loci_daemon *node, loci_error *err) {
    loci_rpc_server_options options;
    loci_rpc_server_options_default(&options);
    options.workers = (unsigned)config->workers;
    options.calls_bytes_max = calls_bytes(config);
    options.drain_ms = (unsigned)config->drain_seconds * 1000u;
    LOCI_TRY(loci_rpc_server_create(&options, loci_descriptor_set(), &node->server, err));
    LOCI_TRY(add_services(node, err));
    loci_engine_status engine;
    loci_engine_status_of(node->engine, &engine);
    char budget[32];
    loci_format_size(budget, engine.memory.limit);
    for (size_t i = 0; i < config->listen_count; i++) {
        int port = 0;
        LOCI_TRY(loci_rpc_server_listen(node->server, config->listen[i], &port, err));
        char bound[LOCI_CONFIG_TEXT_MAX + 16];
        const char *colon = strrchr(config->listen[i], ':');
        if (port > 0) /* also tells which port an asked-for port 0 became */
            snprintf(bound, sizeof bound, "%.*s:%d", (int)(colon - config->listen[i]),
                     config->listen[i], port);
        else
            snprintf(bound, sizeof bound, "%s", config->listen[i]);
        loci_log_info("locid %s: backend %s, model %s (%.12s), address %s, data %s, memory %s",
                      LOCI_VERSION, loci_engine_backend_name(node->engine), config->model,
                      loci_model_fingerprint(loci_engine_model(node->engine)), bound, config->data,
                      budget);
    }
    LOCI_TRY(loci_rpc_server_start(node->server, err));
    loci_rpc_server_set_serving(node->server, "", true);
    for (size_t i = 0; i < sizeof services / sizeof services[0]; i++)
        loci_rpc_server_set_serving(node->server, services[i].name, true);
    loci_log_info("ready");
    return LOCI_OK;
}

static void *shut_down(void *arg) {
    loci_rpc_server_shutdown(arg);
    kill(getpid(), SIGUSR1); /* wakes the wait below */
    return NULL;
}

/* Waits for a signal, then drains; a second signal does not wait. */
static void serve(loci_daemon *node, sigset_t signals) {
    int number = 0;
    do sigwait(&signals, &number);
    while (number == SIGUSR1);
    loci_log_info("%s: draining", strsignal(number));
    atomic_store(&node->draining, true);
    pthread_t thread;
    if (pthread_create(&thread, NULL, shut_down, node->server) != 0) {
        loci_rpc_server_shutdown(node->server);
        return;
    }
    sigwait(&signals, &number);
    if (number != SIGUSR1) {
        loci_log_warn("%s again: ending at once", strsignal(number));
        _exit(1);
    }
    pthread_join(thread, NULL);
}

static int run(const loci_config *config) {
    loci_log_level level = LOCI_LOG_INFO;
    if (loci_log_level_parse(config->log_level, &level))
        loci_log_configure(level, config->log_json);
    sigset_t signals;
    block_signals(&signals);
    raise_file_limit();
    tune_malloc();
    loci_rpc_init();
    loci_error err = {LOCI_OK, "", ""};
    loci_daemon node = {.model = config->model,
                        .also_model = config->also_model,
                        .data = config->data,
                        .started_ns = loci_now_ns()};
    loci_status status = open_engine(config, &node.engine, &err);
    if (status == LOCI_OK) status = start_server(config, &node, &err);
    if (status == LOCI_OK)
        serve(&node, signals);
    else
        loci_log_error("%s", err.text);
    if (node.server) {
        loci_rpc_server_shutdown(node.server);
        loci_rpc_server_destroy(node.server);
    }
    if (node.engine) loci_engine_close(node.engine);
    loci_rpc_shutdown();
    if (status == LOCI_OK) loci_log_info("stopped");
    return status == LOCI_OK ? 0 : 1;
}

int main(int argc, char **argv) {
    static loci_config config;
    loci_config_request request;
    loci_error err = {LOCI_OK, "", ""};
    if (loci_config_load(argc, argv, getenv, &config, &request, &err) != LOCI_OK) {
        fprintf(stderr, "locid: %s\n", err.text);
        return 2;
    }
    if (request.help) {
        loci_config_help(stdout);
        return 0;
    }
    if (request.version) {
        printf("locid %s\n", LOCI_VERSION);
        return 0;
    }
    if (request.print) loci_config_print(stdout, &config);
    if (request.check) fprintf(stderr, "configuration ok\n");
    if (request.print || request.check) return 0;
    if (!follow_parent(request.parent)) return 1;
    return run(&config);
}
