/* SPDX-License-Identifier: Apache-2.0
 *
 * CorpusService. Create is idempotent by request id: the last REMEMBERED ids are kept in
 * memory with the corpus that each one made, so that a client that lost the reply and asks
 * again gets the same corpus instead of ALREADY_EXISTS.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "services/locid/node.h"
#include "services/locid/page.h"

#define REMEMBERED 256
#define REQUEST_ID_MAX 128

static struct {
    pthread_mutex_t mutex;
    char id[REMEMBERED][REQUEST_ID_MAX + 1];
    uint64_t uid[REMEMBERED]; /* of the corpus made */
    size_t next;
} made = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void remember(const char *id, uint64_t uid) {
    pthread_mutex_lock(&made.mutex);
    snprintf(made.id[made.next], sizeof made.id[0], "%s", id);
    made.uid[made.next] = uid;
    made.next = (made.next + 1) % REMEMBERED;
    pthread_mutex_unlock(&made.mutex);
}

static bool remembered(const char *id, uint64_t uid) {
    bool found = false;
    pthread_mutex_lock(&made.mutex);
    for (size_t i = 0; i < REMEMBERED && !found; i++)
        found = made.uid[i] == uid && strcmp(made.id[i], id) == 0;
    pthread_mutex_unlock(&made.mutex);
    return found;
}

/* name must outlive *out; so must info. */
static void fill_corpus(Loci__V1__Corpus *out, char name[LOCI_RESOURCE_MAX],
                        const loci_daemon *node, const loci_corpus_info *info) {
    const char *model = loci_model_fingerprint(loci_engine_model(node->engine));
    const char *also = loci_engine_also_fingerprint(node->engine);
    loci__v1__corpus__init(out);
    loci_corpus_name_format(name, info->name);
    out->name = name;
    out->model_fingerprint = (char *)(uintptr_t)info->geometry.fingerprint;
    out->encoding = (char *)(uintptr_t)(info->geometry.causal ? "causal" : "independent");
    out->kv = (char *)(uintptr_t)(info->geometry.kv_int8 ? "int8" : "bf16");
    out->tokens_max = info->geometry.tokens_max;
    out->create_time = info->created;
    out->revision = info->revision;
    out->documents = info->documents;
    out->pending_documents = info->pending_documents;
    out->segments = info->segments;
    out->tokens = info->tokens;
    out->bytes = info->bytes;
    out->bytes_on_disk = info->bytes_on_disk;
    out->extents = info->extents;
    out->merged = info->merged;
    out->other_model = strcmp(info->geometry.fingerprint, model) != 0;
    out->answers = !out->other_model || (also && strcmp(info->geometry.fingerprint, also) == 0);
    out->reindexing = info->reindexing;
    out->reindex_fingerprint = (char *)(uintptr_t)info->reindex_fingerprint;
    out->reindex_documents = info->reindex_documents;
    out->reindex_tokens = info->reindex_tokens;
    out->dense_layers = info->settings.dense_layers;
    out->attn_temperature = (double)info->settings.attn_temperature;
    out->attn_scale = (double)info->settings.attn_scale;
}

/* NULL names nothing. */
static loci_settings_change read_settings(const Loci__V1__CorpusSettings *in) {
    loci_settings_change out = {.dense_layers = -1};
    if (!in) return out;
    if (in->dense_case == LOCI__V1__CORPUS_SETTINGS__DENSE_DENSE_LAYERS)
        out.dense_layers = in->dense_layers;
    out.attn_temperature = in->attn_temperature;
    out.attn_scale = in->attn_scale;
    return out;
}

loci_status loci_daemon_send_corpus(loci_rpc_call *call, const loci_daemon *node,
                                    const loci_corpus_info *info, loci_error *err) {
    Loci__V1__Corpus reply;
    char name[LOCI_RESOURCE_MAX], hash[33];
    fill_corpus(&reply, name, node, info);
    loci_status status =
        loci_corpus_manifest_hash(loci_engine_store(node->engine), info->name, hash, err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    reply.manifest_hash = hash;
    loci_ingest_progress progress;
    status = loci_ingest_progress_of(loci_engine_ingest(node->engine), info->name, &progress, err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    reply.stage = (char *)(uintptr_t)progress.stage;
    if (progress.merge_failure.status != LOCI_OK) reply.merge_failure = progress.merge_failure.text;
    return loci_rpc_send(call, &reply.base, err);
}

static loci_status read_encoding(const char *name, loci_encoding *out, loci_error *err) {
    static const char *const names[] = {"", "independent", "causal"}; /* as loci_encoding */
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        *out = (loci_encoding)i;
        if (strcmp(name, names[i]) == 0) return LOCI_OK;
    }
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_ENCODING",
                            "field encoding: \"%.40s\" is neither independent nor causal", name);
}

static loci_status read_kv(const char *name, bool *int8, loci_error *err) {
    *int8 = strcmp(name, "int8") == 0;
    if (*int8 || name[0] == '\0' || strcmp(name, "bf16") == 0) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_KV",
                            "field kv: \"%.40s\" is neither bf16 nor int8", name);
}

static loci_status create_corpus(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__CreateCorpusRequest *request = (void *)message;
    LOCI_TRY(loci_parent_check(request->parent, "parent", err));
    if (!loci_corpus_id_valid(request->corpus_id))
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CORPUS_ID",
                                "field corpus_id: \"%.80s\" must match [a-z0-9][a-z0-9_-]{0,62}",
                                request->corpus_id);
    if (strlen(request->request_id) > REQUEST_ID_MAX)
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_REQUEST_ID",
                                "field request_id: longer than %d bytes", REQUEST_ID_MAX);
    loci_rpc_error_metadata(call, "corpus", request->corpus_id);
    loci_corpus_info info;
    const loci_settings_change settings = read_settings(request->settings);
    loci_corpus_options options = {.beyond_trained_length = request->beyond_trained_length,
                                   .settings = &settings};
    LOCI_TRY(read_encoding(request->encoding, &options.encoding, err));
    LOCI_TRY(read_kv(request->kv, &options.kv_int8, err));
    loci_status status =
        loci_engine_create_corpus(node->engine, request->corpus_id, &options, &info, err);
    bool named = request->request_id[0] != '\0';
    if (status == LOCI_E_EXISTS && named && remembered(request->request_id, info.uid))
        status = LOCI_OK;
    if (status != LOCI_OK) return loci_daemon_reason(err, status, LOCI_E_EXISTS, "CORPUS_EXISTS");
    if (named) remember(request->request_id, info.uid);
    return loci_daemon_send_corpus(call, node, &info, err);
}

static loci_status update_corpus(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__UpdateCorpusRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", corpus, err));
    loci_rpc_error_metadata(call, "corpus", corpus);
    const loci_settings_change settings = read_settings(request->settings);
    loci_corpus_info info;
    loci_status status =
        loci_corpus_set(loci_engine_store(node->engine), corpus, 0, &settings, &info, err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    return loci_daemon_send_corpus(call, node, &info, err);
}

static loci_status send_calibration(loci_rpc_call *call, const loci_calibration *in,
                                    loci_error *err) {
    Loci__V1__CalibrateCorpusResponse reply = LOCI__V1__CALIBRATE_CORPUS_RESPONSE__INIT;
    Loci__V1__CalibrateCorpusResponse__Row rows[LOCI_CALIBRATION_ROWS];
    Loci__V1__CalibrateCorpusResponse__Row *pointers[LOCI_CALIBRATION_ROWS];
    for (uint32_t i = 0; i < in->row_count; i++) {
        const loci_calibration_row *row = &in->rows[i];
        loci__v1__calibrate_corpus_response__row__init(&rows[i]);
        rows[i].attn_temperature = (double)row->temperature;
        rows[i].attn_scale = (double)row->scale;
        rows[i].loss = row->loss;
        rows[i].error = row->error;
        rows[i].agreement = row->agreement;
        rows[i].present = row->present;
        pointers[i] = &rows[i];
    }
    reply.n_rows = in->row_count;
    reply.rows = pointers;
    reply.comparable = in->comparable;
    reply.encoding = (char *)(uintptr_t)(in->causal ? "causal" : "independent");
    reply.samples = in->samples;
    reply.tokens = in->tokens;
    reply.context_tokens = in->context_tokens;
    reply.seconds = in->seconds;
    reply.causal_loss = in->causal_loss;
    reply.alone_loss = in->alone_loss;
    reply.best = in->best;
    reply.applied = in->applied;
    reply.thresholds = in->thresholds;
    reply.revision = in->revision;
    return loci_rpc_send(call, &reply.base, err);
}

static loci_status calibrate_corpus(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__CalibrateCorpusRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", corpus, err));
    loci_rpc_error_metadata(call, "corpus", corpus);
    loci_calibration out;
    loci_status status = loci_engine_calibrate(node->engine, corpus, request->apply,
                                               loci_rpc_cancel_of(call), &out, err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    return send_calibration(call, &out, err);
}

static loci_status get_corpus(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__GetCorpusRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", corpus, err));
    loci_corpus_info info;
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &info, err));
    return loci_daemon_send_corpus(call, node, &info, err);
}

typedef struct listed_corpus {
    Loci__V1__Corpus message;
    loci_corpus_info info;
    char name[LOCI_RESOURCE_MAX];
} listed_corpus;

static loci_status send_corpora(loci_rpc_call *call, const loci_daemon *node, const char *parent,
                                const loci_corpus_info *infos, size_t count, bool more,
                                loci_error *err) {
    listed_corpus *items = calloc(count + 1, sizeof *items);
    Loci__V1__Corpus **pointers = calloc(count + 1, sizeof *pointers);
    loci_status status = LOCI_OK;
    if (!items || !pointers) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for a page of %zu corpora", count);
        goto out;
    }
    Loci__V1__ListCorporaResponse reply = LOCI__V1__LIST_CORPORA_RESPONSE__INIT;
    for (size_t i = 0; i < count; i++) {
        fill_corpus(&items[i].message, items[i].name, node, &infos[i]);
        pointers[i] = &items[i].message;
    }
    reply.n_corpora = count;
    reply.corpora = pointers;
    status = loci_page_send(call, &reply.base, &reply.next_page_token, "ListCorpora", parent,
                            more ? infos[count - 1].name : NULL, err);
out:
    free(pointers);
    free(items);
    return status;
}

static loci_status list_corpora(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__ListCorporaRequest *request = (void *)message;
    LOCI_TRY(loci_parent_check(request->parent, "parent", err));
    size_t size = 0;
    LOCI_TRY(loci_page_size(request->page_size, &size, err));
    char cursor[LOCI_CURSOR_MAX + 1];
    LOCI_TRY(
        loci_page_token_open("ListCorpora", request->parent, request->page_token, cursor, err));
    /* One more than asked for tells whether there is a next page. */
    loci_corpus_info *infos = calloc(size + 1, sizeof *infos);
    if (!infos) return loci_fail(err, LOCI_E_NOMEM, "no memory for a page of %zu corpora", size);
    size_t count = 0;
    loci_status status =
        loci_corpus_list(loci_engine_store(node->engine), cursor, size + 1, infos, &count, err);
    bool more = count > size;
    if (status == LOCI_OK)
        status = send_corpora(call, node, request->parent, infos, more ? size : count, more, err);
    free(infos);
    return status;
}

static loci_status delete_corpus(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__DeleteCorpusRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", corpus, err));
    loci_rpc_error_metadata(call, "corpus", corpus);
    loci_status status = loci_corpus_delete(loci_engine_store(node->engine), corpus, err);
    if (status == LOCI_OK) status = loci_store_sync(loci_engine_store(node->engine), err);
    if (status != LOCI_OK)
        return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
    Loci__V1__DeleteCorpusResponse reply = LOCI__V1__DELETE_CORPUS_RESPONSE__INIT;
    return loci_rpc_send(call, &reply.base, err);
}

const loci_rpc_method loci_corpus_methods[] = {
    {"/loci.v1.CorpusService/CreateCorpus", LOCI_RPC_UNARY,
     &loci__v1__create_corpus_request__descriptor, &loci__v1__corpus__descriptor, create_corpus,
     LOCI_RPC_WORKERS},
    {"/loci.v1.CorpusService/GetCorpus", LOCI_RPC_UNARY, &loci__v1__get_corpus_request__descriptor,
     &loci__v1__corpus__descriptor, get_corpus, LOCI_RPC_WORKERS},
    {"/loci.v1.CorpusService/ListCorpora", LOCI_RPC_UNARY,
     &loci__v1__list_corpora_request__descriptor, &loci__v1__list_corpora_response__descriptor,
     list_corpora, LOCI_RPC_WORKERS},
    {"/loci.v1.CorpusService/DeleteCorpus", LOCI_RPC_UNARY,
     &loci__v1__delete_corpus_request__descriptor, &loci__v1__delete_corpus_response__descriptor,
     delete_corpus, LOCI_RPC_WORKERS},
    {"/loci.v1.CorpusService/UpdateCorpus", LOCI_RPC_UNARY,
     &loci__v1__update_corpus_request__descriptor, &loci__v1__corpus__descriptor, update_corpus,
     LOCI_RPC_WORKERS},
    {"/loci.v1.CorpusService/CalibrateCorpus", LOCI_RPC_UNARY,
     &loci__v1__calibrate_corpus_request__descriptor,
     &loci__v1__calibrate_corpus_response__descriptor, calibrate_corpus, LOCI_RPC_LONG},
    {"/loci.v1.CorpusService/ReindexCorpus", LOCI_RPC_SERVER_STREAM,
     &loci__v1__reindex_corpus_request__descriptor, &loci__v1__reindex_corpus_response__descriptor,
     loci_reindex_handler, LOCI_RPC_LONG},
    {"/loci.v1.CorpusService/CancelReindexCorpus", LOCI_RPC_UNARY,
     &loci__v1__cancel_reindex_corpus_request__descriptor, &loci__v1__corpus__descriptor,
     loci_reindex_cancel_handler, LOCI_RPC_WORKERS},
};
const size_t loci_corpus_method_count = sizeof loci_corpus_methods / sizeof loci_corpus_methods[0];
