/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared parts of the commands; see cli.h.
 */
#include "services/loci/cli.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"

#define COMMON_OPTIONS 4
#define OPTIONS_MAX 24
#define UNARY_MS 0 /* calls end when they end; Ctrl-C cancels */
#define PROBE_MS 5000

atomic_int loci_interrupted = 0;

loci_status loci_cli_usage(loci_cli *cli, loci_error *err, const char *format, ...) {
    cli->usage = true;
    va_list args;
    va_start(args, format);
    err->status = LOCI_E_INVAL;
    err->reason[0] = '\0';
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return LOCI_E_INVAL;
}

/* Where to read on, behind a complaint about an option. */
static void append_hint(loci_error *err, const char *command) {
    size_t len = strlen(err->text);
    snprintf(err->text + len, sizeof err->text - len, "; see loci %s --help", command);
}

static void print_help(const loci_command *command, const loci_option *own, size_t own_count,
                       const loci_option *common) {
    printf("usage: loci %s %s%s[options]\n\n%c%s.\n", command->name, command->usage,
           command->usage[0] ? " " : "", toupper((unsigned char)command->summary[0]),
           command->summary + 1);
    if (command->details) printf("%s", command->details);
    printf("\n");
    loci_options_help(stdout, own, own_count);
    loci_options_help(stdout, common, COMMON_OPTIONS);
}

loci_status loci_cli_parse(loci_cli *cli, const loci_command *command, const loci_option *options,
                           size_t option_count, int argc, char **argv, const char **args,
                           size_t *arg_count, size_t least, size_t most, loci_error *err) {
    const char *address = NULL;
    const loci_option common[COMMON_OPTIONS] = {
        {"address", 0, LOCI_OPTION_STRING, &address, 0, 0, "ADDR",
         "the daemon's address (default: LOCI_ADDRESS or " LOCI_DEFAULT_ADDRESS ")"},
        {"data", 0, LOCI_OPTION_STRING, &cli->data, 0, 0, "DIR",
         "run a daemon on this directory for the call if none serves it"},
        {"json", 0, LOCI_OPTION_FLAG, &cli->json, 0, 0, NULL,
         "one JSON object a line, the last one is the result"},
        {"help", 'h', LOCI_OPTION_FLAG, &cli->help, 0, 0, NULL, "print this"},
    };
    loci_option all[OPTIONS_MAX];
    LOCI_ASSERT(option_count + COMMON_OPTIONS <= OPTIONS_MAX);
    if (option_count > 0) memcpy(all, options, option_count * sizeof *all);
    memcpy(all + option_count, common, sizeof common);
    loci_status status =
        loci_options_parse(all, option_count + COMMON_OPTIONS, argc, argv, args, arg_count, err);
    if (cli->help) {
        print_help(command, options, option_count, common);
        return LOCI_OK;
    }
    if (status == LOCI_OK && (*arg_count < least || *arg_count > most))
        status = loci_fail(err, LOCI_E_INVAL, "usage: loci %s %s", command->name, command->usage);
    else if (status != LOCI_OK)
        append_hint(err, command->name);
    cli->usage = status != LOCI_OK;
    if (status != LOCI_OK) return status;
    if (!address) address = getenv("LOCI_ADDRESS");
    cli->address_given = address && address[0] != '\0';
    cli->address = cli->address_given ? address : LOCI_DEFAULT_ADDRESS;
    bool local = false;
    return loci_address_check(cli->address, &local, err);
}

loci_status loci_cli_corpus(loci_cli *cli, const char *corpus, char name[LOCI_RESOURCE_MAX],
                            loci_error *err) {
    if (!loci_corpus_id_valid(corpus))
        return loci_cli_usage(cli, err,
                              "\"%.80s\" is not a corpus name: it must match "
                              "[a-z0-9][a-z0-9_-]{0,62}",
                              corpus);
    loci_corpus_name_format(name, corpus);
    return LOCI_OK;
}

loci_status loci_cli_document(loci_cli *cli, const char *corpus, const char *document,
                              char name[LOCI_RESOURCE_MAX], loci_error *err) {
    LOCI_TRY(loci_cli_corpus(cli, corpus, name, err));
    if (!loci_document_id_valid(document))
        return loci_cli_usage(cli, err,
                              "\"%.80s\" is not a document id: it must be 1-512 bytes of UTF-8 "
                              "without control characters",
                              document);
    loci_document_name_format(name, corpus, document);
    return LOCI_OK;
}

/* --- The connection ---------------------------------------------------------------------- */
static bool same_directory(const char *a, const char *b) {
    char *real_a = realpath(a, NULL), *real_b = realpath(b, NULL);
    bool same = real_a && real_b && strcmp(real_a, real_b) == 0;
    free(real_a);
    free(real_b);
    return same;
}

/* Whether a daemon at cli->address serves the directory of --data. LOCI_E_UNAVAILABLE when none
 * is there. */
static loci_status probe(loci_cli *cli, bool *serves, loci_error *err) {
    Loci__V1__GetStatusRequest request = LOCI__V1__GET_STATUS_REQUEST__INIT;
    ProtobufCMessage *response = NULL;
    loci_rpc_channel *channel = NULL;
    *serves = false;
    LOCI_TRY(loci_rpc_channel_open(cli->address, &channel, err));
    loci_status status = loci_rpc_unary(channel, "/loci.v1.NodeService/GetStatus", &request.base,
                                        &loci__v1__node_status__descriptor, PROBE_MS,
                                        &loci_interrupted, &response, err);
    if (status == LOCI_OK) {
        *serves = same_directory(((Loci__V1__NodeStatus *)response)->data, cli->data);
        if (!*serves && cli->address_given)
            status =
                loci_fail(err, LOCI_E_PRECONDITION, "the daemon at %s serves %.200s, not %.100s",
                          cli->address, ((Loci__V1__NodeStatus *)response)->data, cli->data);
        protobuf_c_message_free_unpacked(response, NULL);
    } else if (status != LOCI_E_PRECONDITION && loci_interrupted == 0) {
        status = LOCI_OK; /* nobody there, or no daemon of ours */
    }
    loci_rpc_channel_close(channel);
    return status;
}

loci_status loci_cli_connect(loci_cli *cli, loci_error *err) {
    const char *address = cli->address;
    loci_rpc_init();
    cli->rpc = true;
    if (cli->data) {
        bool serves = false;
        LOCI_TRY(probe(cli, &serves, err));
        if (!serves) {
            LOCI_TRY(loci_embedded_start(&cli->embedded, cli->data, &loci_interrupted, err));
            address = cli->embedded.address;
        }
    }
    return loci_rpc_channel_open(address, &cli->channel, err);
}

void loci_cli_disconnect(loci_cli *cli) {
    loci_rpc_channel_close(cli->channel);
    cli->channel = NULL;
    loci_embedded_stop(&cli->embedded);
    if (cli->rpc) loci_rpc_shutdown();
    cli->rpc = false;
}

loci_status loci_cli_call(loci_cli *cli, const char *path, const ProtobufCMessage *request,
                          const ProtobufCMessageDescriptor *response_type,
                          ProtobufCMessage **response, loci_error *err) {
    return loci_rpc_unary(cli->channel, path, request, response_type, UNARY_MS, &loci_interrupted,
                          response, err);
}

loci_status loci_cli_events(loci_rpc_client_call *call,
                            void (*show)(void *ctx, const ProtobufCMessage *event), void *ctx,
                            loci_error *err) {
    for (;;) {
        ProtobufCMessage *message = NULL;
        LOCI_TRY(loci_rpc_call_read(call, &message, err));
        if (!message) return LOCI_OK;
        show(ctx, message);
        protobuf_c_message_free_unpacked(message, NULL);
    }
}
