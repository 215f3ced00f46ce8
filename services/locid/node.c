/* SPDX-License-Identifier: Apache-2.0
 *
 * NodeService, and what all handlers share.
 */
#include "services/locid/node.h"

#include <stdio.h>

#define FAILING_NS 10000000000u

loci_status loci_daemon_reason(loci_error *err, loci_status status, loci_status when,
                               const char *reason) {
    if (status == when && err && err->reason[0] == '\0')
        snprintf(err->reason, sizeof err->reason, "%s", reason);
    return status;
}

loci_status loci_daemon_corpus(loci_daemon *node, loci_rpc_call *call, const char *corpus,
                               loci_corpus_info *out, loci_error *err) {
    loci_rpc_error_metadata(call, "corpus", corpus);
    loci_status status = loci_corpus_get(loci_engine_store(node->engine), corpus, out, err);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

loci_status loci_daemon_check_going(loci_daemon_wait *wait, const loci_ingest_progress *progress,
                                    loci_error *err) {
    loci_status status = loci_cancel_check(loci_rpc_cancel_of(wait->call));
    if (status != LOCI_OK)
        return loci_fail(err, status, "the call for corpus %s ended", wait->corpus);
    if (atomic_load(&wait->node->draining))
        return loci_fail_reason(err, LOCI_E_UNAVAILABLE, "NODE_DRAINING",
                                "the node is shutting down; %s of corpus %s goes on when it runs "
                                "again, %s",
                                wait->doing, wait->corpus, wait->meanwhile);
    uint64_t now = loci_now_ns();
    if (progress->failure.status == LOCI_OK) {
        wait->failing_since_ns = 0;
        return LOCI_OK;
    }
    if (wait->failing_since_ns == 0) wait->failing_since_ns = now;
    if (now - wait->failing_since_ns < FAILING_NS) return LOCI_OK;
    *err = progress->failure;
    return loci_fail_prefix(err, progress->failure.status, "%s of corpus %s stands still, %s",
                            wait->doing, wait->corpus, wait->meanwhile);
}

static void fill_parts(const loci_budget_usage *memory, Loci__V1__MemoryPart *parts,
                       Loci__V1__MemoryPart **list) {
    for (unsigned i = 0; i < LOCI_MEMORY_PARTS; i++) {
        parts[i] = (Loci__V1__MemoryPart)LOCI__V1__MEMORY_PART__INIT;
        parts[i].name = (char *)(uintptr_t)loci_memory_part_name((loci_memory_part)i);
        parts[i].reserved_bytes = memory->part[i];
        list[i] = &parts[i];
    }
}

static loci_status get_status(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *request = NULL;
    LOCI_TRY(loci_rpc_recv(call, &request, err));
    loci_engine_status engine;
    loci_engine_status_of(node->engine, &engine);
    loci_rpc_load load = loci_rpc_server_load(node->server);
    loci_model *model = loci_engine_model(node->engine);

    Loci__V1__NodeStatus reply = LOCI__V1__NODE_STATUS__INIT;
    reply.version = (char *)LOCI_VERSION;
    reply.backend = (char *)(uintptr_t)loci_engine_backend_name(node->engine);
    reply.model = (char *)(uintptr_t)node->model;
    reply.model_fingerprint = (char *)(uintptr_t)loci_model_fingerprint(model);
    reply.architecture = (char *)(uintptr_t)loci_model_config_of(model)->architecture;
    reply.uptime_s = (double)(loci_now_ns() - node->started_ns) / 1e9;
    Loci__V1__MemoryPart parts[LOCI_MEMORY_PARTS], *part_list[LOCI_MEMORY_PARTS];
    fill_parts(&engine.memory, parts, part_list);
    reply.memory_budget_bytes = engine.memory.limit;
    reply.memory_used_bytes = engine.memory_used_bytes;
    reply.memory_reserved_bytes = engine.memory.used;
    reply.n_memory_parts = LOCI_MEMORY_PARTS;
    reply.memory_parts = part_list;
    reply.active_calls = load.active; /* this one not counted */
    reply.queued_calls = load.queued;
    Loci__V1__DeviceExtents device = LOCI__V1__DEVICE_EXTENTS__INIT;
    device.device_bytes = engine.tiers.device_bytes;
    device.device_budget_bytes = engine.tiers.device_budget;
    device.host_bytes = engine.tiers.host_bytes;
    device.host_budget_bytes = engine.tiers.host_budget;
    device.row_hits = engine.tiers.row_hits;
    device.row_misses = engine.tiers.row_misses;
    if (engine.tiers.device_budget > 0) reply.device_extents = &device;
    loci_store_figures figures;
    loci_store_figures_of(loci_engine_store(node->engine), &figures);
    reply.mapped_bytes = figures.mapped_bytes;
    reply.resident_bytes = figures.resident_bytes;
    reply.corpora = figures.corpora;
    reply.tokens = figures.tokens;
    reply.pending_documents = figures.pending_documents;
    reply.other_model_corpora = figures.other_models;
    reply.reindexing_corpora = figures.reindexing;
    const char *also = loci_engine_also_fingerprint(node->engine);
    if (also) reply.also_model = (char *)(uintptr_t)node->also_model;
    if (also) reply.also_model_fingerprint = (char *)(uintptr_t)also;
    reply.state = atomic_load(&node->draining) ? "draining" : "serving";
    reply.data = (char *)(uintptr_t)node->data;
    return loci_rpc_send(call, &reply.base, err);
}

const loci_rpc_method loci_node_methods[] = {
    {"/loci.v1.NodeService/GetStatus", LOCI_RPC_UNARY, &loci__v1__get_status_request__descriptor,
     &loci__v1__node_status__descriptor, get_status, LOCI_RPC_PROMPT},
};
const size_t loci_node_method_count = sizeof loci_node_methods / sizeof loci_node_methods[0];
