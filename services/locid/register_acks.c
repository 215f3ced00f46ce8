/* SPDX-License-Identifier: Apache-2.0
 *
 * Register: the acknowledging side of the stream, see register.h.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "services/locid/register.h"

#define POLL_MS 25u            /* while the client may send more */
#define WAIT_MS 250u           /* once everything is stored */
#define PROGRESS_NS 500000000u /* at least once a second is promised */
#define SETTLE_TOKENS LOCI_TAIL_SEAL_TOKENS
#define SETTLE_NS 10000000000u /* others may keep the corpus busy for ever */

static loci_status send_ack(loci_registration *r, const loci_registered *item,
                            Loci__V1__DocumentState state, uint64_t revision, loci_error *err) {
    char name[LOCI_RESOURCE_MAX];
    loci_document_name_format(name, r->corpus, item->id);
    Loci__V1__RegisterAck ack = LOCI__V1__REGISTER_ACK__INIT;
    ack.document = name;
    ack.state = state;
    ack.unchanged = item->unchanged;
    ack.revision = revision;
    Loci__V1__RegisterResponse response = LOCI__V1__REGISTER_RESPONSE__INIT;
    response.event_case = LOCI__V1__REGISTER_RESPONSE__EVENT_ACK;
    response.ack = &ack;
    return loci_rpc_send(r->call, &response.base, err);
}

/* Takes what was committed since; waits up to wait_ms for something. Returns whether the reader
 * has ended. The list taken is the caller's. */
static bool take_committed(loci_registration *r, unsigned wait_ms, loci_registered_list *taken,
                           bool *failed) {
    struct timespec until = loci_moment_in(CLOCK_MONOTONIC, wait_ms);
    pthread_mutex_lock(&r->mutex);
    while (r->committed.count == 0 && !r->reading_done) {
        if (pthread_cond_timedwait(&r->changed, &r->mutex, &until) != 0) break;
    }
    *taken = r->committed;
    memset(&r->committed, 0, sizeof r->committed);
    bool done = r->reading_done;
    *failed = r->reading_failed;
    pthread_mutex_unlock(&r->mutex);
    return done;
}

/* Moves the items of `taken` to r->waiting, acknowledging each as STORED. */
static loci_status acknowledge_stored(loci_registration *r, loci_registered_list *taken,
                                      loci_error *err) {
    size_t need = r->waiting.count + taken->count;
    if (need > r->waiting.capacity) {
        size_t capacity = need < 2 * r->waiting.capacity ? 2 * r->waiting.capacity : need;
        loci_registered *items = realloc(r->waiting.items, capacity * sizeof *items);
        if (!items) return loci_fail(err, LOCI_E_NOMEM, "no memory for the list of documents");
        r->waiting.items = items;
        r->waiting.capacity = capacity;
    }
    LOCI_TRY(loci_store_sync(loci_engine_store(r->node->engine), err));
    loci_ingest_wake(loci_engine_ingest(r->node->engine));
    size_t count = taken->count;
    taken->count = 0; /* from here on the items belong to r->waiting */
    for (size_t i = 0; i < count; i++) r->waiting.items[r->waiting.count + i] = taken->items[i];
    size_t first = r->waiting.count;
    r->waiting.count += count;
    r->stored += count;
    for (size_t i = first; i < first + count; i++) {
        r->unchanged += r->waiting.items[i].unchanged;
        LOCI_TRY(send_ack(r, &r->waiting.items[i], LOCI__V1__DOCUMENT_STATE__STORED, 0, err));
    }
    return LOCI_OK;
}

/* One document has become searchable. It may have been deleted meanwhile: then it counts no
 * tokens. */
static loci_status acknowledge_one(loci_registration *r, const loci_registered *item,
                                   uint64_t revision, loci_error *err) {
    loci_document_info info;
    loci_error ignored;
    loci_status status = loci_document_get(loci_engine_store(r->node->engine), r->corpus, item->id,
                                           &info, NULL, &ignored);
    if (status == LOCI_OK) {
        r->tokens += info.tokens;
        r->segments += info.segments;
    }
    r->searchable++;
    r->bytes_searchable += item->bytes;
    return send_ack(r, item, LOCI__V1__DOCUMENT_STATE__SEARCHABLE, revision, err);
}

static loci_status acknowledge_searchable(loci_registration *r,
                                          const loci_ingest_progress *progress, loci_error *err) {
    loci_status status = LOCI_OK;
    size_t kept = 0, gone = 0;
    for (size_t i = 0; i < r->waiting.count; i++) {
        loci_registered item = r->waiting.items[i];
        if (item.sequence > progress->searchable_sequence || status != LOCI_OK) {
            r->waiting.items[kept++] = item;
            continue;
        }
        status = acknowledge_one(r, &item, progress->revision, err);
        free(item.id);
        gone++;
    }
    r->waiting.count = kept;
    if (gone > 0) {
        pthread_mutex_lock(&r->mutex);
        r->outstanding -= gone;
        pthread_cond_broadcast(&r->changed);
        pthread_mutex_unlock(&r->mutex);
    }
    return status;
}

/* Seconds until everything that the client means to send is indexed, by the bytes per token of the
 * documents that are searchable; negative = unknown. */
static double estimate_eta(const loci_registration *r, uint64_t bytes_hint, uint64_t bytes_received,
                           double tokens_encoded, double tokens_per_s) {
    double bytes = (double)(bytes_hint > bytes_received ? bytes_hint : bytes_received);
    if (tokens_per_s <= 0.0 || r->bytes_searchable == 0 || r->tokens == 0) return -1.0;
    double left = bytes * (double)r->tokens / (double)r->bytes_searchable - tokens_encoded;
    return left > 0.0 ? left / tokens_per_s : 0.0;
}

static loci_status send_progress(loci_registration *r, const loci_ingest_progress *progress,
                                 bool reading, loci_error *err) {
    uint64_t now = loci_now_ns();
    if (now - r->progress_ns < PROGRESS_NS) return LOCI_OK;
    r->progress_ns = now;
    pthread_mutex_lock(&r->mutex);
    uint64_t documents = r->documents_received, bytes = r->bytes_received, hint = r->bytes_hint;
    pthread_mutex_unlock(&r->mutex);
    Loci__V1__RegisterProgress body = LOCI__V1__REGISTER_PROGRESS__INIT;
    body.documents_received = documents;
    body.documents_stored = r->stored;
    body.documents_searchable = r->searchable;
    body.bytes_received = bytes;
    body.tokens_encoded = progress->tokens_encoded - r->encoded_before;
    body.tokens_indexed = progress->tokens_indexed - r->indexed_before;
    body.tokens_per_s = progress->tokens_per_s;
    body.eta_s = estimate_eta(r, hint, bytes, (double)body.tokens_encoded, body.tokens_per_s);
    bool merging = strcmp(progress->stage, "merging") == 0; /* which it does not wait for */
    bool idle = merging || strcmp(progress->stage, "idle") == 0;
    const char *stage = merging ? "idle" : progress->stage;
    body.stage = idle && reading ? (char *)"storing" : (char *)(uintptr_t)stage;
    Loci__V1__RegisterResponse response = LOCI__V1__REGISTER_RESPONSE__INIT;
    response.event_case = LOCI__V1__REGISTER_RESPONSE__EVENT_PROGRESS;
    response.progress = &body;
    return loci_rpc_send(r->call, &response.base, err);
}

/* After a stream of many tokens the tail of the corpus is sealed before the summary, so that the
 * size on disk in the summary is the one at rest, and that a registration that was interrupted and
 * is repeated ends as an uninterrupted one. It can be at rest only while nobody else registers into
 * the corpus: after SETTLE_NS the summary goes out with the size that there is. */
static loci_status settle(loci_registration *r, loci_ingest_progress *progress, loci_error *err) {
    loci_ingest *ingest = loci_engine_ingest(r->node->engine);
    if (r->tokens < SETTLE_TOKENS) return LOCI_OK;
    loci_ingest_settle(ingest, r->corpus);
    uint64_t until = loci_now_ns() + SETTLE_NS;
    while (loci_now_ns() < until && !loci_ingest_settled(ingest, r->corpus)) {
        LOCI_TRY(loci_daemon_check_going(&r->wait, progress, err));
        LOCI_TRY(send_progress(r, progress, false, err));
        LOCI_TRY(loci_ingest_wait(ingest, r->corpus, WAIT_MS, progress, err));
    }
    return LOCI_OK;
}

static loci_status send_summary(loci_registration *r, loci_error *err) {
    loci_corpus_info info;
    LOCI_TRY(loci_daemon_corpus(r->node, r->call, r->corpus, &info, err));
    Loci__V1__RegisterSummary body = LOCI__V1__REGISTER_SUMMARY__INIT;
    body.documents = r->searchable;
    body.unchanged = r->unchanged;
    body.tokens = r->tokens;
    body.segments = r->segments;
    body.seconds = (double)(loci_now_ns() - r->started_ns) / 1e9;
    body.bytes_on_disk = info.bytes_on_disk;
    body.revision = info.revision;
    Loci__V1__RegisterResponse response = LOCI__V1__REGISTER_RESPONSE__INIT;
    response.event_case = LOCI__V1__REGISTER_RESPONSE__EVENT_SUMMARY;
    response.summary = &body;
    return loci_rpc_send(r->call, &response.base, err);
}

static loci_status acknowledge(loci_registration *r, loci_error *err) {
    loci_ingest *ingest = loci_engine_ingest(r->node->engine);
    loci_ingest_progress progress = {0};
    loci_registered_list taken = {0};
    loci_status status = LOCI_OK;
    for (;;) {
        bool failed = false;
        bool done = take_committed(r, POLL_MS, &taken, &failed);
        bool fresh = taken.count > 0;
        if (fresh) LOCI_TRY_GOTO(acknowledge_stored(r, &taken, err), out);
        free(taken.items);
        memset(&taken, 0, sizeof taken);
        if (failed) return LOCI_OK; /* the reader's error ends the stream */
        LOCI_TRY_GOTO(loci_ingest_progress_of(ingest, r->corpus, &progress, err), out);
        LOCI_TRY_GOTO(acknowledge_searchable(r, &progress, err), out);
        LOCI_TRY_GOTO(loci_daemon_check_going(&r->wait, &progress, err), out);
        if (r->waiting.count > 0 || fresh)
            LOCI_TRY_GOTO(send_progress(r, &progress, !done, err), out);
        if (done && r->waiting.count == 0) break;
        if (done) LOCI_TRY_GOTO(loci_ingest_wait(ingest, r->corpus, WAIT_MS, &progress, err), out);
    }
    LOCI_TRY_GOTO(settle(r, &progress, err), out);
    status = send_summary(r, err);
out:
    for (size_t i = 0; i < taken.count; i++) free(taken.items[i].id);
    free(taken.items);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

void *loci_registration_acknowledge(void *arg) {
    loci_registration *r = arg;
    r->progress_ns = loci_now_ns();
    r->acks_status = acknowledge(r, &r->acks_error);
    pthread_mutex_lock(&r->mutex);
    r->acks_done = true;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->mutex);
    loci_rpc_stop_recv(r->call); /* the reader may wait for a client that has nothing to send */
    return NULL;
}
