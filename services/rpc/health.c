/* SPDX-License-Identifier: Apache-2.0
 *
 * grpc.health.v1 for the runtime's own server. A watcher is a long-lived call that sleeps until it
 * is poked; the list of watchers is bounded by the pool of long-lived calls.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "grpc/health/v1/health.pb-c.h"
#include "services/rpc/rpc_internal.h"

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_status;
#define SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN
#define UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__UNKNOWN

loci_status loci__health_init(loci__health *health, size_t watchers_max, loci_error *err) {
    health->watchers = calloc(watchers_max, sizeof(loci_rpc_call *));
    if (!health->watchers) return loci_fail(err, LOCI_E_NOMEM, "no memory for health watchers");
    health->watchers_max = watchers_max;
    pthread_mutex_init(&health->mu, NULL);
    return LOCI_OK;
}

void loci__health_fini(loci__health *health) {
    if (!health->watchers) return;
    LOCI_ASSERT(health->watcher_count == 0);
    free(health->watchers);
    health->watchers = NULL;
    pthread_mutex_destroy(&health->mu);
}

/* Under health->mu. */
static loci__health_name *find_name(loci__health *health, const char *service) {
    for (size_t i = 0; i < health->name_count; i++) {
        if (strcmp(health->names[i].name, service) == 0) return &health->names[i];
    }
    return NULL;
}

static void poke_watchers(loci__health *health) {
    for (size_t i = 0; i < health->watcher_count; i++) loci__call_poke(health->watchers[i]);
}

void loci__health_set(loci__health *health, const char *service, bool serving, bool keep) {
    pthread_mutex_lock(&health->mu);
    loci__health_name *entry = find_name(health, service);
    if (entry && keep) goto out;
    if (!entry) {
        if (health->name_count == LOCI__HEALTH_NAMES_MAX ||
            strlen(service) > LOCI__SERVICE_NAME_MAX) {
            loci_log_warn("health of service %s is not kept: too many or too long names", service);
            goto out;
        }
        entry = &health->names[health->name_count++];
        snprintf(entry->name, sizeof entry->name, "%s", service);
    }
    entry->serving = serving;
    poke_watchers(health);
out:
    pthread_mutex_unlock(&health->mu);
}

void loci__health_drain(loci__health *health) {
    pthread_mutex_lock(&health->mu);
    health->draining = true;
    poke_watchers(health);
    pthread_mutex_unlock(&health->mu);
}

static serving_status status_of(loci__health *health, const char *service, bool *draining) {
    pthread_mutex_lock(&health->mu);
    const loci__health_name *entry = find_name(health, service);
    serving_status status = SERVICE_UNKNOWN;
    if (entry) status = entry->serving && !health->draining ? SERVING : NOT_SERVING;
    *draining = health->draining;
    pthread_mutex_unlock(&health->mu);
    return status;
}

static loci_status send_status(loci_rpc_call *call, serving_status status, loci_error *err) {
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = status;
    return loci_rpc_send(call, &response.base, err);
}

static loci_status check(loci_rpc_call *call, void *service_ctx, loci_error *err) {
    loci_rpc_server *server = service_ctx;
    ProtobufCMessage *message;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const char *service = ((Grpc__Health__V1__HealthCheckRequest *)message)->service;
    bool draining;
    serving_status status = status_of(&server->health, service, &draining);
    if (status == SERVICE_UNKNOWN) {
        return loci_fail_reason(err, LOCI_E_NOTFOUND, "UNKNOWN_SERVICE", "there is no service %s",
                                service);
    }
    return send_status(call, status, err);
}

static bool add_watcher(loci__health *health, loci_rpc_call *call) {
    pthread_mutex_lock(&health->mu);
    bool added = health->watcher_count < health->watchers_max;
    if (added) health->watchers[health->watcher_count++] = call;
    pthread_mutex_unlock(&health->mu);
    return added;
}

static void remove_watcher(loci__health *health, const loci_rpc_call *call) {
    pthread_mutex_lock(&health->mu);
    for (size_t i = 0; i < health->watcher_count; i++) {
        if (health->watchers[i] != call) continue;
        health->watchers[i] = health->watchers[--health->watcher_count];
        break;
    }
    pthread_mutex_unlock(&health->mu);
}

static loci_status watch(loci_rpc_call *call, void *service_ctx, loci_error *err) {
    loci_rpc_server *server = service_ctx;
    ProtobufCMessage *message;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const char *service = ((Grpc__Health__V1__HealthCheckRequest *)message)->service;
    if (!add_watcher(&server->health, call)) {
        return loci_fail(err, LOCI_E_LIMIT, "too many health watchers");
    }
    serving_status last = UNKNOWN; /* never sent: the first status always differs */
    loci_status status;
    for (;;) {
        bool draining;
        serving_status now = status_of(&server->health, service, &draining);
        status = now == last ? LOCI_OK : send_status(call, now, err);
        last = now;
        if (status == LOCI_OK && draining) {
            status = loci_fail_reason(err, LOCI_E_UNAVAILABLE, "DRAINING",
                                      "the server is shutting down");
        }
        if (status == LOCI_OK) status = loci__call_wait_poke(call);
        if (status != LOCI_OK) break;
    }
    remove_watcher(&server->health, call);
    return status;
}

const loci_rpc_method loci__health_methods[2] = {
    {"/grpc.health.v1.Health/Check", LOCI_RPC_UNARY,
     &grpc__health__v1__health_check_request__descriptor,
     &grpc__health__v1__health_check_response__descriptor, check, LOCI_RPC_PROMPT},
    {"/grpc.health.v1.Health/Watch", LOCI_RPC_SERVER_STREAM,
     &grpc__health__v1__health_check_request__descriptor,
     &grpc__health__v1__health_check_response__descriptor, watch, LOCI_RPC_LONG},
};
