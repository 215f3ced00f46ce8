/* SPDX-License-Identifier: Apache-2.0
 *
 * loci document list | show | delete
 */
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"

#define PAGE 1000

static const char *state_name(const Loci__V1__Document *d) {
    return d->state == LOCI__V1__DOCUMENT_STATE__SEARCHABLE ? "searchable" : "stored";
}

static json_t *document_json(const Loci__V1__Document *d) {
    json_t *object =
        json_pack("{s:s,s:I,s:I,s:I,s:s,s:s,s:I,s:s}", "document", loci_document_name_id(d->name),
                  "bytes", (json_int_t)d->bytes, "tokens", (json_int_t)d->tokens, "segments",
                  (json_int_t)d->segments, "state", state_name(d), "content_hash", d->content_hash,
                  "create_time", (json_int_t)d->create_time, "name", d->name);
    if (d->metadata_json[0] != '\0')
        json_object_set_new(object, "metadata", json_loads(d->metadata_json, 0, NULL));
    return object;
}

/* Parses "NAME ID" with a command's options, connects. */
static loci_status open_named(loci_cli *cli, const loci_command *command,
                              const loci_option *options, size_t option_count, int argc,
                              char **argv, char name[LOCI_RESOURCE_MAX], loci_error *err) {
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    loci_status status =
        loci_cli_parse(cli, command, options, option_count, argc, argv, args, &count, 2, 2, err);
    if (status == LOCI_OK && !cli->help)
        status = loci_cli_document(cli, args[0], args[1], name, err);
    if (status == LOCI_OK && !cli->help) status = loci_cli_connect(cli, err);
    free(args);
    return status;
}

static loci_status print_content(loci_cli *cli, char *name, loci_error *err) {
    loci_rpc_client_call *call = NULL;
    LOCI_TRY(loci_rpc_call_open(cli->channel, "/loci.v1.DocumentService/ReadDocument",
                                &loci__v1__read_document_response__descriptor, 0, &loci_interrupted,
                                &call, err));
    Loci__V1__ReadDocumentRequest request = LOCI__V1__READ_DOCUMENT_REQUEST__INIT;
    request.name = name;
    /* A failed send means that the call has ended: reading tells why. */
    loci_error ignored;
    if (loci_rpc_call_send(call, &request.base, &ignored) == LOCI_OK)
        (void)(loci_rpc_call_half_close(call, &ignored) == LOCI_OK);
    loci_status status = LOCI_OK;
    ProtobufCMessage *message = NULL;
    do {
        status = loci_rpc_call_read(call, &message, err);
        if (status != LOCI_OK || !message) break;
        const Loci__V1__ReadDocumentResponse *part = (void *)message;
        fwrite(part->data.data, 1, part->data.len, stdout);
        protobuf_c_message_free_unpacked(message, NULL);
    } while (!ferror(stdout));
    loci_rpc_call_close(call);
    return status;
}

static loci_status run_show(loci_cli *cli, const loci_command *command, int argc, char **argv,
                            loci_error *err) {
    bool content = false;
    const loci_option options[] = {{"content", 0, LOCI_OPTION_FLAG, &content, 0, 0, NULL,
                                    "print its bytes as they were registered"}};
    char name[LOCI_RESOURCE_MAX];
    LOCI_TRY(open_named(cli, command, options, 1, argc, argv, name, err));
    if (cli->help) return LOCI_OK;
    if (content) return print_content(cli, name, err);
    Loci__V1__GetDocumentRequest request = LOCI__V1__GET_DOCUMENT_REQUEST__INIT;
    request.name = name;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.DocumentService/GetDocument", &request.base,
                           &loci__v1__document__descriptor, &response, err));
    const Loci__V1__Document *d = (void *)response;
    char bytes[32], tokens[32];
    if (cli->json)
        loci_print_json(document_json(d));
    else
        printf("document  %s\nstate     %s\nsize      %s, %s tokens, %llu segments\n"
               "hash      %s\n%s%s%s",
               loci_document_name_id(d->name), state_name(d), loci_format_size(bytes, d->bytes),
               loci_format_count(tokens, d->tokens), (unsigned long long)d->segments,
               d->content_hash, d->metadata_json[0] ? "metadata  " : "", d->metadata_json,
               d->metadata_json[0] ? "\n" : "");
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

static loci_status run_delete(loci_cli *cli, const loci_command *command, int argc, char **argv,
                              loci_error *err) {
    char name[LOCI_RESOURCE_MAX];
    LOCI_TRY(open_named(cli, command, NULL, 0, argc, argv, name, err));
    if (cli->help) return LOCI_OK;
    Loci__V1__DeleteDocumentRequest request = LOCI__V1__DELETE_DOCUMENT_REQUEST__INIT;
    request.name = name;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.DocumentService/DeleteDocument", &request.base,
                           &loci__v1__delete_document_response__descriptor, &response, err));
    uint64_t revision = ((Loci__V1__DeleteDocumentResponse *)response)->revision;
    protobuf_c_message_free_unpacked(response, NULL);
    if (cli->json)
        loci_print_json(json_pack("{s:s,s:b,s:I}", "document", loci_document_name_id(name),
                                  "deleted", 1, "revision", (json_int_t)revision));
    else
        printf("deleted document %s\n", loci_document_name_id(name));
    return LOCI_OK;
}

static void print_row(const Loci__V1__Document *d) {
    char bytes[32], tokens[32];
    printf("%-48s %10s %12s  %s\n", loci_document_name_id(d->name),
           loci_format_size(bytes, d->bytes), loci_format_count(tokens, d->tokens), state_name(d));
}

/* One page; *token is replaced by the next page's (to be freed), NULL at the end. */
static loci_status list_page(loci_cli *cli, char *parent, char **token, json_t *rows,
                             loci_error *err) {
    Loci__V1__ListDocumentsRequest request = LOCI__V1__LIST_DOCUMENTS_REQUEST__INIT;
    request.parent = parent;
    request.page_size = PAGE;
    if (*token) request.page_token = *token;
    ProtobufCMessage *response = NULL;
    loci_status status =
        loci_cli_call(cli, "/loci.v1.DocumentService/ListDocuments", &request.base,
                      &loci__v1__list_documents_response__descriptor, &response, err);
    bool first = !*token;
    free(*token);
    *token = NULL;
    if (status != LOCI_OK) return status;
    if (first && !rows) printf("%-48s %10s %12s  %s\n", "DOCUMENT", "SIZE", "TOKENS", "STATE");
    const Loci__V1__ListDocumentsResponse *page = (void *)response;
    for (size_t i = 0; i < page->n_documents; i++) {
        if (rows)
            json_array_append_new(rows, document_json(page->documents[i]));
        else
            print_row(page->documents[i]);
    }
    if (page->next_page_token[0] != '\0') *token = strdup(page->next_page_token);
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

static loci_status run_list(loci_cli *cli, const loci_command *command, int argc, char **argv,
                            loci_error *err) {
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    char parent[LOCI_RESOURCE_MAX];
    loci_status status = loci_cli_parse(cli, command, NULL, 0, argc, argv, args, &count, 1, 1, err);
    if (status == LOCI_OK && !cli->help) status = loci_cli_corpus(cli, args[0], parent, err);
    free(args);
    if (status != LOCI_OK || cli->help) return status;
    LOCI_TRY(loci_cli_connect(cli, err));
    json_t *rows = cli->json ? json_array() : NULL;
    char *token = NULL;
    do status = list_page(cli, parent, &token, rows, err);
    while (status == LOCI_OK && token);
    if (rows && status == LOCI_OK)
        loci_print_json(json_pack("{s:o}", "documents", rows));
    else
        json_decref(rows);
    return status;
}

const loci_command loci_document_commands[3] = {
    {"document list", "NAME", "list the documents of a corpus", NULL, run_list},
    {"document show", "NAME ID", "show a document, or print its content", NULL, run_show},
    {"document delete", "NAME ID", "delete a document; it is never quoted again", NULL, run_delete},
};
