/* SPDX-License-Identifier: Apache-2.0
 *
 * loci status: succeeds exactly when the daemon answers and serves, so it is also a health check.
 */
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"

#define STATUS_MS 10000

static json_t *status_json(const Loci__V1__NodeStatus *s, const char *address) {
    json_t *object =
        json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:f}", "state", s->state, "address", address,
                  "version", s->version, "backend", s->backend, "model", s->model,
                  "model_fingerprint", s->model_fingerprint, "architecture", s->architecture,
                  "data", s->data, "uptime_s", s->uptime_s);
    const struct {
        const char *name;
        uint64_t value;
    } counts[] = {{"memory_budget_bytes", s->memory_budget_bytes},
                  {"memory_used_bytes", s->memory_used_bytes},
                  {"memory_reserved_bytes", s->memory_reserved_bytes},
                  {"mapped_bytes", s->mapped_bytes},
                  {"resident_bytes", s->resident_bytes},
                  {"corpora", s->corpora},
                  {"other_model_corpora", s->other_model_corpora},
                  {"reindexing_corpora", s->reindexing_corpora},
                  {"tokens", s->tokens},
                  {"pending_documents", s->pending_documents},
                  {"active_calls", s->active_calls},
                  {"queued_calls", s->queued_calls}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        json_object_set_new(object, counts[i].name, json_integer((json_int_t)counts[i].value));
    if (s->also_model[0]) {
        json_object_set_new(object, "also_model", json_string(s->also_model));
        json_object_set_new(object, "also_model_fingerprint",
                            json_string(s->also_model_fingerprint));
    }
    json_t *parts = json_object();
    for (size_t i = 0; i < s->n_memory_parts; i++)
        json_object_set_new(parts, s->memory_parts[i]->name,
                            json_integer((json_int_t)s->memory_parts[i]->reserved_bytes));
    json_object_set_new(object, "memory_parts", parts);
    const Loci__V1__DeviceExtents *d = s->device_extents;
    if (d)
        json_object_set_new(
            object, "device_extents",
            json_pack("{s:I,s:I,s:I,s:I,s:I,s:I}", "device_bytes", (json_int_t)d->device_bytes,
                      "device_budget_bytes", (json_int_t)d->device_budget_bytes, "host_bytes",
                      (json_int_t)d->host_bytes, "host_budget_bytes",
                      (json_int_t)d->host_budget_bytes, "row_hits", (json_int_t)d->row_hits,
                      "row_misses", (json_int_t)d->row_misses));
    return object;
}

/* "model 48 MiB, lookups 12 MiB": parts that hold something. */
static void print_parts(const Loci__V1__NodeStatus *s) {
    const char *before = "          reserved for ";
    for (size_t i = 0; i < s->n_memory_parts; i++) {
        char size[32];
        if (s->memory_parts[i]->reserved_bytes == 0) continue;
        printf("%s%s %s", before, s->memory_parts[i]->name,
               loci_format_size(size, s->memory_parts[i]->reserved_bytes));
        before = ", ";
    }
    printf("\n");
}

/* "device    3.1 GiB of 96 GiB, 12 GiB of 31 GiB below it (cached rows: 97% of 120k reads)". */
static void print_device(const Loci__V1__DeviceExtents *d) {
    char bytes[32], budget[32], host[32], host_budget[32], reads[32];
    printf("device    %s of %s for extents", loci_format_size(bytes, d->device_bytes),
           loci_format_size(budget, d->device_budget_bytes));
    if (d->host_bytes > 0)
        printf(", %s of %s below it", loci_format_size(host, d->host_bytes),
               loci_format_size(host_budget, d->host_budget_bytes));
    uint64_t all = d->row_hits + d->row_misses;
    if (all > 0)
        printf(" (cached rows: %.0f%% of %s reads)", 100.0 * (double)d->row_hits / (double)all,
               loci_format_count(reads, all));
    printf("\n");
}

static void print_status(const Loci__V1__NodeStatus *s, const char *address) {
    char used[32], budget[32], reserved[32], tokens[32], mapped[32], resident[32];
    printf("locid %s at %s: %s for %.0f s\n"
           "backend   %s\n"
           "model     %s, %s (%.12s)\n"
           "data      %s\n"
           "holds     %llu corpora, %s tokens, %llu documents not yet searchable\n"
           "extents   %s mapped, %s of them in RAM\n"
           "calls     %llu active, %llu queued\n"
           "memory    %s used, %s reserved of %s\n",
           s->version, address, s->state, s->uptime_s, s->backend, s->model, s->architecture,
           s->model_fingerprint, s->data, (unsigned long long)s->corpora,
           loci_format_count(tokens, s->tokens), (unsigned long long)s->pending_documents,
           loci_format_size(mapped, s->mapped_bytes), loci_format_size(resident, s->resident_bytes),
           (unsigned long long)s->active_calls, (unsigned long long)s->queued_calls,
           loci_format_size(used, s->memory_used_bytes),
           loci_format_size(reserved, s->memory_reserved_bytes),
           loci_format_size(budget, s->memory_budget_bytes));
    print_parts(s);
    if (s->device_extents) print_device(s->device_extents);
    if (s->also_model[0])
        printf("also      %s (%.12s), for corpora that it encoded\n", s->also_model,
               s->also_model_fingerprint);
    if (s->other_model_corpora > 0)
        printf(
            "to do     %llu corpora are of another model (loci corpus list): loci corpus reindex "
            "NAME\n",
            (unsigned long long)s->other_model_corpora);
    if (s->reindexing_corpora > 0)
        printf("          %llu corpora are being reindexed\n",
               (unsigned long long)s->reindexing_corpora);
}

static loci_status run_status(loci_cli *cli, const loci_command *command, int argc, char **argv,
                              loci_error *err) {
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    loci_status status = loci_cli_parse(cli, command, NULL, 0, argc, argv, args, &count, 0, 0, err);
    free(args);
    if (status != LOCI_OK || cli->help) return status;
    LOCI_TRY(loci_cli_connect(cli, err));
    Loci__V1__GetStatusRequest request = LOCI__V1__GET_STATUS_REQUEST__INIT;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_rpc_unary(cli->channel, "/loci.v1.NodeService/GetStatus", &request.base,
                            &loci__v1__node_status__descriptor, STATUS_MS, &loci_interrupted,
                            &response, err));
    const Loci__V1__NodeStatus *node = (void *)response;
    const char *address = cli->embedded.pid > 0 ? cli->embedded.address : cli->address;
    if (cli->json)
        loci_print_json(status_json(node, address));
    else
        print_status(node, address);
    if (strcmp(node->state, "serving") != 0)
        status = loci_fail(err, LOCI_E_UNAVAILABLE, "the daemon at %s is %s", address, node->state);
    protobuf_c_message_free_unpacked(response, NULL);
    return status;
}

const loci_command loci_status_command = {
    "status", "", "show the daemon's state; fails when it does not serve", NULL, run_status};
