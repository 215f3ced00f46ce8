/* SPDX-License-Identifier: Apache-2.0
 *
 * DocumentService but for Register (register.c). List leaves metadata out, so that a page stays
 * within the message size; Get has it.
 */
#include <stdlib.h>
#include <string.h>

#include "services/locid/node.h"
#include "services/locid/page.h"

#define READ_CHUNK (256u << 10)

static void fill_document(Loci__V1__Document *out, char name[LOCI_RESOURCE_MAX], const char *corpus,
                          const loci_document_info *info) {
    loci__v1__document__init(out);
    loci_document_name_format(name, corpus, info->id);
    out->name = name;
    out->bytes = info->bytes;
    out->content_hash = (char *)(uintptr_t)info->content_hash;
    out->state =
        info->searchable ? LOCI__V1__DOCUMENT_STATE__SEARCHABLE : LOCI__V1__DOCUMENT_STATE__STORED;
    out->create_time = info->created;
    out->tokens = info->tokens;
    out->segments = info->segments;
}

/* Parses a document name and looks its corpus up. */
static loci_status open_name(loci_daemon *node, loci_rpc_call *call, const char *name,
                             char corpus[LOCI_NAME_MAX + 1], char id[LOCI_DOCUMENT_ID_MAX + 1],
                             loci_error *err) {
    LOCI_TRY(loci_document_name_parse(name, "name", corpus, id, err));
    loci_rpc_error_metadata(call, "document", id);
    loci_corpus_info info;
    return loci_daemon_corpus(node, call, corpus, &info, err);
}

static loci_status get_document(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__GetDocumentRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1], id[LOCI_DOCUMENT_ID_MAX + 1];
    LOCI_TRY(open_name(node, call, request->name, corpus, id, err));
    loci_document_info info;
    loci_buf metadata = LOCI_BUF_INIT;
    loci_status status =
        loci_document_get(loci_engine_store(node->engine), corpus, id, &info, &metadata, err);
    if (status == LOCI_OK) {
        Loci__V1__Document reply;
        char name[LOCI_RESOURCE_MAX];
        fill_document(&reply, name, corpus, &info);
        reply.metadata_json = (char *)(uintptr_t)loci_buf_text(&metadata);
        status = loci_buf_status(&metadata);
        if (status == LOCI_OK) status = loci_rpc_send(call, &reply.base, err);
    }
    loci_buf_fini(&metadata);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "DOCUMENT_NOT_FOUND");
}

typedef struct listed_document {
    Loci__V1__Document message;
    char name[LOCI_RESOURCE_MAX];
} listed_document;

static loci_status send_documents(loci_rpc_call *call, const char *parent, const char *corpus,
                                  const loci_document_info *infos, size_t count, bool more,
                                  loci_error *err) {
    listed_document *items = calloc(count + 1, sizeof *items);
    Loci__V1__Document **pointers = calloc(count + 1, sizeof *pointers);
    loci_status status = LOCI_OK;
    if (!items || !pointers) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for a page of %zu documents", count);
        goto out;
    }
    Loci__V1__ListDocumentsResponse reply = LOCI__V1__LIST_DOCUMENTS_RESPONSE__INIT;
    for (size_t i = 0; i < count; i++) {
        fill_document(&items[i].message, items[i].name, corpus, &infos[i]);
        pointers[i] = &items[i].message;
    }
    reply.n_documents = count;
    reply.documents = pointers;
    status = loci_page_send(call, &reply.base, &reply.next_page_token, "ListDocuments", parent,
                            more ? infos[count - 1].id : NULL, err);
out:
    free(pointers);
    free(items);
    return status;
}

static loci_status list_documents(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__ListDocumentsRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(request->parent, "parent", corpus, err));
    size_t size = 0;
    LOCI_TRY(loci_page_size(request->page_size, &size, err));
    char cursor[LOCI_CURSOR_MAX + 1];
    LOCI_TRY(
        loci_page_token_open("ListDocuments", request->parent, request->page_token, cursor, err));
    loci_corpus_info corpus_info;
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &corpus_info, err));
    /* One more than asked for tells whether there is a next page. */
    loci_document_info *infos = calloc(size + 1, sizeof *infos);
    if (!infos) return loci_fail(err, LOCI_E_NOMEM, "no memory for a page of %zu documents", size);
    size_t count = 0;
    loci_status status = loci_document_list(loci_engine_store(node->engine), corpus, cursor,
                                            size + 1, infos, &count, err);
    bool more = count > size;
    if (status == LOCI_OK)
        status =
            send_documents(call, request->parent, corpus, infos, more ? size : count, more, err);
    free(infos);
    return status;
}

static loci_status delete_document(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__DeleteDocumentRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1], id[LOCI_DOCUMENT_ID_MAX + 1];
    LOCI_TRY(open_name(node, call, request->name, corpus, id, err));
    Loci__V1__DeleteDocumentResponse reply = LOCI__V1__DELETE_DOCUMENT_RESPONSE__INIT;
    loci_store *store = loci_engine_store(node->engine);
    loci_status status = loci_document_delete(store, corpus, id, &reply.revision, err);
    if (status == LOCI_OK) status = loci_store_sync(store, err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "DOCUMENT_NOT_FOUND");
    loci_ingest_wake(loci_engine_ingest(node->engine)); /* an extent may be due for rewriting */
    return loci_rpc_send(call, &reply.base, err);
}

static loci_status read_document(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__ReadDocumentRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1], id[LOCI_DOCUMENT_ID_MAX + 1];
    LOCI_TRY(open_name(node, call, request->name, corpus, id, err));
    loci_buf bytes = LOCI_BUF_INIT;
    loci_status status =
        loci_document_read(loci_engine_store(node->engine), corpus, id, 0, UINT64_MAX, &bytes, err);
    if (status == LOCI_OK) status = loci_buf_status(&bytes);
    for (size_t at = 0; status == LOCI_OK && at < bytes.len; at += READ_CHUNK) {
        Loci__V1__ReadDocumentResponse reply = LOCI__V1__READ_DOCUMENT_RESPONSE__INIT;
        reply.data.data = bytes.data + at;
        reply.data.len = bytes.len - at < READ_CHUNK ? bytes.len - at : READ_CHUNK;
        status = loci_rpc_send(call, &reply.base, err);
    }
    loci_buf_fini(&bytes);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "DOCUMENT_NOT_FOUND");
}

const loci_rpc_method loci_document_methods[] = {
    {"/loci.v1.DocumentService/Register", LOCI_RPC_BIDI, &loci__v1__register_request__descriptor,
     &loci__v1__register_response__descriptor, loci_register_handler, LOCI_RPC_LONG},
    {"/loci.v1.DocumentService/GetDocument", LOCI_RPC_UNARY,
     &loci__v1__get_document_request__descriptor, &loci__v1__document__descriptor, get_document,
     LOCI_RPC_WORKERS},
    {"/loci.v1.DocumentService/ListDocuments", LOCI_RPC_UNARY,
     &loci__v1__list_documents_request__descriptor, &loci__v1__list_documents_response__descriptor,
     list_documents, LOCI_RPC_WORKERS},
    {"/loci.v1.DocumentService/DeleteDocument", LOCI_RPC_UNARY,
     &loci__v1__delete_document_request__descriptor,
     &loci__v1__delete_document_response__descriptor, delete_document, LOCI_RPC_WORKERS},
    {"/loci.v1.DocumentService/ReadDocument", LOCI_RPC_SERVER_STREAM,
     &loci__v1__read_document_request__descriptor, &loci__v1__read_document_response__descriptor,
     read_document, LOCI_RPC_WORKERS},
};
const size_t loci_document_method_count =
    sizeof loci_document_methods / sizeof loci_document_methods[0];
