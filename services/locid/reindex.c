/* SPDX-License-Identifier: Apache-2.0
 *
 * ReindexCorpus: begins or joins the reindexing of a corpus and shows how far it is. The work is
 * the ingest thread's: a caller that goes away only stops the copying of documents, at the
 * beginning.
 */
#include <string.h>

#include "services/locid/node.h"

#define POLL_MS 50u
#define PROGRESS_NS 500000000u

typedef struct reindexing {
    loci_daemon *node;
    loci_rpc_call *call;
    char corpus[LOCI_NAME_MAX + 1];
    uint64_t uid; /* of the old index */
    uint64_t started_ns, progress_ns;
} reindexing;

static loci_status send_progress(reindexing *r, const loci_corpus_info *info,
                                 const loci_ingest_progress *progress, const char *stage,
                                 loci_error *err) {
    Loci__V1__ReindexProgress body = LOCI__V1__REINDEX_PROGRESS__INIT;
    body.stage = (char *)(uintptr_t)stage;
    body.documents = info->reindex_documents;
    body.documents_total = info->documents;
    body.tokens = info->reindex_tokens;
    if (progress->tokens_encoded > progress->tokens_indexed)
        body.tokens += progress->tokens_encoded - progress->tokens_indexed;
    body.tokens_total = info->pending_documents == 0 ? info->tokens : 0;
    if (body.tokens_total > 0 && body.tokens > body.tokens_total) body.tokens = body.tokens_total;
    body.tokens_per_s = progress->tokens_per_s;
    body.eta_s = -1;
    if (body.tokens_total > 0 && progress->tokens_per_s > 0)
        body.eta_s = (double)(body.tokens_total - body.tokens) / progress->tokens_per_s;
    Loci__V1__ReindexCorpusResponse response = LOCI__V1__REINDEX_CORPUS_RESPONSE__INIT;
    response.event_case = LOCI__V1__REINDEX_CORPUS_RESPONSE__EVENT_PROGRESS;
    response.progress = &body;
    r->progress_ns = loci_now_ns();
    return loci_rpc_send(r->call, &response.base, err);
}

static loci_status send_summary(reindexing *r, const loci_corpus_info *info, bool unchanged,
                                loci_error *err) {
    Loci__V1__ReindexSummary body = LOCI__V1__REINDEX_SUMMARY__INIT;
    body.documents = info->documents;
    body.tokens = info->tokens;
    body.segments = info->segments;
    body.seconds = (double)(loci_now_ns() - r->started_ns) / 1e9;
    body.bytes_on_disk = info->bytes_on_disk;
    body.revision = info->revision;
    body.model_fingerprint = (char *)(uintptr_t)info->geometry.fingerprint;
    body.unchanged = unchanged;
    Loci__V1__ReindexCorpusResponse response = LOCI__V1__REINDEX_CORPUS_RESPONSE__INIT;
    response.event_case = LOCI__V1__REINDEX_CORPUS_RESPONSE__EVENT_SUMMARY;
    response.summary = &body;
    return loci_rpc_send(r->call, &response.base, err);
}

static loci_status wait_for_it(reindexing *r, loci_error *err) {
    loci_ingest *ingest = loci_engine_ingest(r->node->engine);
    loci_daemon_wait wait = {.node = r->node,
                             .call = r->call,
                             .corpus = r->corpus,
                             .doing = "reindexing",
                             .meanwhile = "its old index stays"};
    for (;;) {
        loci_corpus_info info;
        loci_ingest_progress progress;
        LOCI_TRY(loci_daemon_corpus(r->node, r->call, r->corpus, &info, err));
        if (info.uid != r->uid) return send_summary(r, &info, false, err);
        if (!info.reindexing)
            return loci_fail_reason(err, LOCI_E_ABORTED, "REINDEXING_CANCELLED",
                                    "reindexing of corpus %s was given up; it stays as it was",
                                    r->corpus);
        LOCI_TRY(loci_ingest_reindex_progress(ingest, r->corpus, &progress, err));
        LOCI_TRY(loci_daemon_check_going(&wait, &progress, err));
        if (loci_now_ns() - r->progress_ns >= PROGRESS_NS)
            LOCI_TRY(send_progress(r, &info, &progress, progress.stage, err));
        loci_sleep_ms(POLL_MS);
    }
}

typedef struct copying {
    reindexing *r;
    loci_corpus_info info; /* of before */
} copying;

static loci_status show_copying(void *ctx, uint64_t documents, loci_error *err) {
    copying *c = ctx;
    const loci_ingest_progress none = {0};
    if (loci_now_ns() - c->r->progress_ns < PROGRESS_NS) return LOCI_OK;
    c->info.reindex_documents = documents;
    return send_progress(c->r, &c->info, &none, "copying", err);
}

loci_status loci_reindex_handler(loci_rpc_call *call, void *ctx, loci_error *err) {
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__ReindexCorpusRequest *request = (void *)message;
    reindexing r = {.node = ctx, .call = call, .started_ns = loci_now_ns()};
    copying copy = {.r = &r};
    const loci_reindex_watch watch = {loci_rpc_cancel_of(call), show_copying, &copy};
    bool begun = false;
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", r.corpus, err));
    LOCI_TRY(loci_daemon_corpus(r.node, call, r.corpus, &copy.info, err));
    r.uid = copy.info.uid;
    if (!copy.info.reindexing) LOCI_TRY(show_copying(&copy, 0, err));
    loci_status status =
        loci_engine_reindex(r.node->engine, r.corpus, request->force, &watch, &begun, err);
    if (status == LOCI_OK)
        status = begun ? wait_for_it(&r, err) : send_summary(&r, &copy.info, true, err);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

loci_status loci_reindex_cancel_handler(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__CancelReindexCorpusRequest *request = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    loci_corpus_info info;
    LOCI_TRY(loci_corpus_name_parse(request->name, "name", corpus, err));
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &info, err));
    LOCI_TRY(loci_corpus_reindex_cancel(loci_engine_store(node->engine), corpus, err));
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &info, err));
    return loci_daemon_send_corpus(call, node, &info, err);
}
