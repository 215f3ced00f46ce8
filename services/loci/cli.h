/* SPDX-License-Identifier: Apache-2.0
 *
 * What the commands of `loci` share: parsing with the common options, the connection (to a
 * running daemon, or to one started for the call), and the interrupt flag.
 *
 * A command is a function of its arguments that fills *err on failure; main.c prints it as the one
 * line "loci: ..." and chooses the exit status: 0, 1 failure, 2 usage, 128 + signal.
 */
#ifndef LOCI_SERVICES_LOCI_CLI_H
#define LOCI_SERVICES_LOCI_CLI_H

#include <stdatomic.h>

#include "loci/v1/loci.pb-c.h"
#include "services/common/names.h"
#include "services/common/options.h"
#include "services/loci/embedded.h"
#include "services/rpc/rpc.h"

/* Number of the signal that asked for an end, 0 = none. */
extern atomic_int loci_interrupted;

typedef struct loci_cli {
    const char *address; /* --address, LOCI_ADDRESS, or the default */
    bool address_given;
    const char *data; /* --data: a daemon of our own if none serves this directory */
    bool json;
    bool help;  /* --help was printed: nothing else is to be done */
    bool usage; /* the error is one of usage */
    bool rpc;   /* the runtime was initialised */
    loci_embedded embedded;
    loci_rpc_channel *channel;
} loci_cli;

typedef struct loci_command {
    const char *name;    /* "corpus create" */
    const char *usage;   /* "NAME" */
    const char *summary; /* for the list of commands */
    const char *details; /* more for --help of the command; may be NULL */
    loci_status (*run)(loci_cli *cli, const struct loci_command *command, int argc, char **argv,
                       loci_error *err);
} loci_command;

/* Parses argv[1..) with the command's options (may be NULL) and the common ones. args has room for
 * argc entries; least <= *arg_count <= most is checked. With --help it prints and sets
 * cli->help. */
LOCI_MUST_CHECK loci_status loci_cli_parse(loci_cli *cli, const loci_command *command,
                                           const loci_option *options, size_t option_count,
                                           int argc, char **argv, const char **args,
                                           size_t *arg_count, size_t least, size_t most,
                                           loci_error *err);
/* LOCI_E_INVAL that exits with status 2. */
LOCI_MUST_CHECK loci_status loci_cli_usage(loci_cli *cli, loci_error *err, const char *format, ...)
    LOCI_PRINTF(3, 4);
/* Checks the name of a corpus that was typed, and makes its resource name. */
LOCI_MUST_CHECK loci_status loci_cli_corpus(loci_cli *cli, const char *corpus,
                                            char name[LOCI_RESOURCE_MAX], loci_error *err);
LOCI_MUST_CHECK loci_status loci_cli_document(loci_cli *cli, const char *corpus,
                                              const char *document, char name[LOCI_RESOURCE_MAX],
                                              loci_error *err);
/* Opens the channel, starting a daemon where --data asks for it. */
LOCI_MUST_CHECK loci_status loci_cli_connect(loci_cli *cli, loci_error *err);
/* Closes the channel and ends the daemon that was started. */
void loci_cli_disconnect(loci_cli *cli);
/* A unary call on the open channel; free the response with
 * protobuf_c_message_free_unpacked(response, NULL). */
LOCI_MUST_CHECK loci_status loci_cli_call(loci_cli *cli, const char *path,
                                          const ProtobufCMessage *request,
                                          const ProtobufCMessageDescriptor *response_type,
                                          ProtobufCMessage **response, loci_error *err);

/* Hands each message of a stream to `show` until the stream ends; it is freed after that. */
LOCI_MUST_CHECK loci_status loci_cli_events(loci_rpc_client_call *call,
                                            void (*show)(void *ctx, const ProtobufCMessage *event),
                                            void *ctx, loci_error *err);

/* loci corpus reindex (reindex.c), listed in corpus.c. */
loci_status loci_corpus_reindex_run(loci_cli *cli, const loci_command *command, int argc,
                                    char **argv, loci_error *err);

#define LOCI_CORPUS_COMMANDS 7
extern const loci_command loci_corpus_commands[LOCI_CORPUS_COMMANDS], loci_document_commands[3],
    loci_register_command, loci_ask_command, loci_search_command, loci_status_command;

#endif
