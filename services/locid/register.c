/* SPDX-License-Identifier: Apache-2.0
 *
 * Register: the reading side of the stream, see register.h. A stream that ends early, for whatever
 * reason, loses nothing that was acknowledged: committed documents are indexed all the same.
 */
#include "services/locid/register.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_MAX (1u << 20)

/* --- Documents, chunk by chunk ------------------------------------------------------------ */
static loci_status check_metadata(const char *document, const char *text, loci_error *err) {
    size_t len = strlen(text);
    if (len == 0) return LOCI_OK;
    if (len > LOCI_METADATA_MAX)
        return loci_fail_reason(err, LOCI_E_INVAL, "METADATA_TOO_LARGE",
                                "field metadata_json of document \"%.200s\": longer than %d bytes",
                                document, LOCI_METADATA_MAX);
    json_error_t why;
    json_t *value = json_loadb(text, len, 0, &why);
    bool object = json_is_object(value);
    json_decref(value);
    if (object) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_METADATA",
                            "field metadata_json of document \"%.200s\": not a JSON object",
                            document);
}

static loci_status begin_document(loci_registration *r, const Loci__V1__RegisterRequest *chunk,
                                  loci_error *err) {
    if (!loci_document_id_valid(chunk->document_id))
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_DOCUMENT_ID",
                                "field document_id: \"%.80s\" must be 1-512 bytes of UTF-8 without "
                                "control characters",
                                chunk->document_id);
    LOCI_TRY(check_metadata(chunk->document_id, chunk->metadata_json, err));
    snprintf(r->document, sizeof r->document, "%s", chunk->document_id);
    loci_status status =
        loci_document_begin(loci_engine_store(r->node->engine), r->corpus, r->document,
                            loci_slice_text(chunk->metadata_json), &r->writer, err);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

static loci_status push(loci_registered_list *list, const loci_registered *item) {
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        loci_registered *items = realloc(list->items, capacity * sizeof *items);
        if (!items) return LOCI_E_NOMEM;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = *item;
    return LOCI_OK;
}

/* Hands a committed document to the acknowledger; waits while too many are outstanding. */
static loci_status hand_over(loci_registration *r, const loci_document_info *info, bool unchanged,
                             loci_error *err) {
    loci_registered item = {strdup(info->id), info->sequence, info->bytes, unchanged};
    if (!item.id) return loci_fail(err, LOCI_E_NOMEM, "no memory for a document's name");
    pthread_mutex_lock(&r->mutex);
    while (r->outstanding >= LOCI_OUTSTANDING_MAX && !r->acks_done)
        pthread_cond_wait(&r->changed, &r->mutex);
    loci_status status = push(&r->committed, &item);
    if (status == LOCI_OK) {
        r->outstanding++;
        r->documents_received++;
        pthread_cond_broadcast(&r->changed);
    }
    pthread_mutex_unlock(&r->mutex);
    if (status == LOCI_OK) return LOCI_OK;
    free(item.id);
    return loci_fail(err, status, "no memory for the list of documents");
}

static loci_status end_document(loci_registration *r, loci_error *err) {
    loci_document_info info;
    bool unchanged = false;
    loci_document_writer *writer = r->writer;
    r->writer = NULL; /* commit ends it in any case */
    loci_status status = loci_document_commit(writer, &info, &unchanged, err);
    status = loci_daemon_reason(err, status, LOCI_E_INVAL, "INVALID_DOCUMENT");
    status = loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    if (status != LOCI_OK) return status;
    return hand_over(r, &info, unchanged, err);
}

/* A document that exceeds the limit is the caller's mistake: trying again does not help. */
static loci_status append_data(loci_registration *r, const Loci__V1__RegisterRequest *chunk,
                               loci_error *err) {
    if (chunk->data.len > CHUNK_MAX)
        return loci_fail_reason(err, LOCI_E_INVAL, "CHUNK_TOO_LARGE",
                                "field data of document \"%.200s\": a chunk of %zu bytes, at most "
                                "%u are allowed",
                                r->document, chunk->data.len, CHUNK_MAX);
    loci_status status =
        loci_document_append(r->writer, loci_slice_of(chunk->data.data, chunk->data.len), err);
    if (status == LOCI_E_LIMIT) {
        status = LOCI_E_INVAL;
        err->status = status;
        snprintf(err->reason, sizeof err->reason, "DOCUMENT_TOO_LARGE");
    }
    if (status != LOCI_OK) return status;
    pthread_mutex_lock(&r->mutex);
    r->bytes_received += chunk->data.len;
    pthread_mutex_unlock(&r->mutex);
    return LOCI_OK;
}

static loci_status take_chunk(loci_registration *r, const Loci__V1__RegisterRequest *chunk,
                              loci_error *err) {
    if (chunk->corpus[0] != '\0') {
        char corpus[LOCI_NAME_MAX + 1];
        LOCI_TRY(loci_corpus_name_parse(chunk->corpus, "corpus", corpus, err));
        if (strcmp(corpus, r->corpus) != 0)
            return loci_fail_reason(err, LOCI_E_INVAL, "CORPUS_CHANGED",
                                    "field corpus: the stream is for %s, not %s", r->corpus,
                                    corpus);
    }
    if (chunk->total_bytes_hint > 0) {
        pthread_mutex_lock(&r->mutex);
        r->bytes_hint = chunk->total_bytes_hint;
        pthread_mutex_unlock(&r->mutex);
    }
    bool has_id = chunk->document_id[0] != '\0';
    if (!r->writer && !has_id && chunk->data.len == 0 && !chunk->end) return LOCI_OK;
    if (r->writer && has_id && strcmp(chunk->document_id, r->document) != 0)
        return loci_fail_reason(err, LOCI_E_INVAL, "DOCUMENT_NOT_ENDED",
                                "field document_id: \"%.80s\" begins before \"%.80s\" has ended",
                                chunk->document_id, r->document);
    if (!r->writer) LOCI_TRY(begin_document(r, chunk, err));
    if (chunk->data.len > 0) LOCI_TRY(append_data(r, chunk, err));
    return chunk->end ? end_document(r, err) : LOCI_OK;
}

static bool acknowledger_ended(loci_registration *r) {
    pthread_mutex_lock(&r->mutex);
    bool ended = r->acks_done;
    pthread_mutex_unlock(&r->mutex);
    return ended;
}

/* Takes chunks until the client half-closes; `chunk` is the first one. */
static loci_status read_documents(loci_registration *r, const Loci__V1__RegisterRequest *chunk,
                                  loci_error *err) {
    while (chunk && !acknowledger_ended(r)) {
        LOCI_TRY(take_chunk(r, chunk, err));
        ProtobufCMessage *message = NULL;
        LOCI_TRY(loci_rpc_recv(r->call, &message, err));
        chunk = (void *)message;
    }
    if (!chunk && r->writer)
        return loci_fail_reason(err, LOCI_E_INVAL, "DOCUMENT_NOT_ENDED",
                                "document \"%.200s\" was not ended before the stream was",
                                r->document);
    return LOCI_OK;
}

/* --- The call -------------------------------------------------------------------------------- */
static loci_status open_registration(loci_registration *r, const Loci__V1__RegisterRequest *first,
                                     loci_error *err) {
    if (!first || first->corpus[0] == '\0')
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CORPUS_NAME",
                                "field corpus: missing in the first message");
    LOCI_TRY(loci_corpus_name_parse(first->corpus, "corpus", r->corpus, err));
    loci_corpus_info info;
    LOCI_TRY(loci_daemon_corpus(r->node, r->call, r->corpus, &info, err));
    LOCI_TRY(loci_corpus_check_model(
        &info, loci_model_fingerprint(loci_engine_model(r->node->engine)), err));
    loci_ingest_progress progress = {0};
    LOCI_TRY(
        loci_ingest_progress_of(loci_engine_ingest(r->node->engine), r->corpus, &progress, err));
    r->encoded_before = progress.tokens_encoded;
    r->indexed_before = progress.tokens_indexed;
    return LOCI_OK;
}

static void free_list(loci_registered_list *list) {
    for (size_t i = 0; i < list->count; i++) free(list->items[i].id);
    free(list->items);
}

/* Runs both sides and joins their results: the reader's error says what went wrong first,
 * unless the reader only saw the stream break or was stopped by the acknowledger. */
static loci_status run(loci_registration *r, const Loci__V1__RegisterRequest *first,
                       loci_error *err) {
    pthread_t acknowledger;
    if (pthread_create(&acknowledger, NULL, loci_registration_acknowledge, r) != 0)
        return loci_fail(err, LOCI_E_LIMIT, "no thread for the stream's acknowledgements");
    loci_status status = read_documents(r, first, err);
    pthread_mutex_lock(&r->mutex);
    r->reading_done = true;
    r->reading_failed = status != LOCI_OK;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->mutex);
    pthread_join(acknowledger, NULL);
    loci_document_abort(r->writer);
    r->writer = NULL;
    if ((status == LOCI_OK || status == LOCI_E_CANCELLED) && r->acks_status != LOCI_OK) {
        *err = r->acks_error;
        status = r->acks_status;
    }
    return status;
}

loci_status loci_register_handler(loci_rpc_call *call, void *ctx, loci_error *err) {
    ProtobufCMessage *first = NULL;
    LOCI_TRY(loci_rpc_recv(call, &first, err));
    loci_registration *r = calloc(1, sizeof *r);
    if (!r) return loci_fail(err, LOCI_E_NOMEM, "no memory for a registration");
    r->node = ctx;
    r->call = call;
    r->started_ns = loci_now_ns();
    r->wait = (loci_daemon_wait){.node = r->node,
                                 .call = call,
                                 .corpus = r->corpus,
                                 .doing = "indexing",
                                 .meanwhile = "its documents stay stored"};
    pthread_mutex_init(&r->mutex, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&r->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    loci_status status = open_registration(r, (void *)first, err);
    if (status == LOCI_OK) status = run(r, (void *)first, err);
    free_list(&r->committed);
    free_list(&r->waiting);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->mutex);
    free(r);
    return status;
}
