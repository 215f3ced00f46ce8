/* SPDX-License-Identifier: Apache-2.0
 *
 * QueryService: requests are checked here, engine events become messages. Events are sent from
 * the engine's callback, so a slow reader slows the answer down (flow control), and a reader that
 * went away ends it.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"
#include "services/engine/belief.h"
#include "services/locid/node.h"

#define QUESTION_BYTES_MAX 8192u
#define ANSWER_TOKENS_MAX 512u
#define EVIDENCE_MAX 16u
#define HITS_MAX 100u

static loci_status bad_field(loci_error *err, const char *reason, const char *field,
                             const char *rule) {
    return loci_fail_reason(err, LOCI_E_INVAL, reason, "field %s: %s", field, rule);
}

static loci_status check_question(const char *question, loci_error *err) {
    size_t len = strlen(question);
    if (strspn(question, " \t\r\n") == len)
        return bad_field(err, "INVALID_QUESTION", "question", "it is empty");
    if (len > QUESTION_BYTES_MAX)
        return bad_field(err, "INVALID_QUESTION", "question", "it is longer than 8192 bytes");
    if (!loci_utf8_valid(loci_slice_text(question)))
        return bad_field(err, "INVALID_QUESTION", "question", "it is not valid UTF-8");
    return LOCI_OK;
}

static bool within(double value, double min, double max) {
    return isfinite(value) && value >= min && value <= max;
}

/* Fills *out from the message; the strings are borrowed. */
static loci_status translate(const Loci__V1__AnswerRequest *in, const char *corpus,
                             loci_answer_request *out, loci_error *err) {
    static const int modes[] = {-1, LOCI_MODE_DENSE, LOCI_MODE_SQUEEZED, LOCI_MODE_HIERARCHICAL};
    static const int switches[] = {-1, 1, 0};
    LOCI_TRY(check_question(in->question, err));
    if ((unsigned)in->mode > 3)
        return bad_field(err, "INVALID_MODE", "mode", "it is none of the modes known");
    if ((unsigned)in->read_twice > 2)
        return bad_field(err, "INVALID_READ_TWICE", "read_twice", "it is neither ON nor OFF");
    if (!within(in->top_p, 0.0, 1.0))
        return bad_field(err, "INVALID_TOP_P", "top_p", "it must be from 0 to 1");
    if (!within(in->temperature, 0.0, 10.0))
        return bad_field(err, "INVALID_TEMPERATURE", "temperature", "it must be from 0 to 10");
    if (!within(in->sparsity, 0.0, 0.999))
        return bad_field(err, "INVALID_SPARSITY", "sparsity", "it must be from 0 to 0.999");
    if (in->max_tokens > ANSWER_TOKENS_MAX)
        return bad_field(err, "INVALID_MAX_TOKENS", "max_tokens", "it must be at most 512");
    if (in->evidence_count > EVIDENCE_MAX)
        return bad_field(err, "INVALID_EVIDENCE_COUNT", "evidence_count", "it must be at most 16");
    memset(out, 0, sizeof *out);
    out->corpus = corpus;
    out->question = in->question;
    out->mode = modes[in->mode];
    out->top_p = in->top_p;
    out->budget = in->budget;
    out->read_twice = switches[in->read_twice];
    out->max_tokens = in->max_tokens;
    out->temperature = in->temperature;
    out->seed = in->seed;
    out->sparsity = in->sparsity;
    out->min_revision = in->min_revision;
    out->evidence_count = in->evidence_count;
    return LOCI_OK;
}

/* --- Events ------------------------------------------------------------------------------- */
typedef struct evidence_slot {
    Loci__V1__Evidence message;
    Loci__V1__Evidence *pointer;
    char name[LOCI_RESOURCE_MAX];
} evidence_slot;

typedef struct answer_stream {
    loci_rpc_call *call;
    loci_daemon *node;
    const char *corpus;
    char corpus_name[LOCI_RESOURCE_MAX];
    uint64_t seq;
    evidence_slot slots[EVIDENCE_MAX];
    Loci__V1__Evidence *pointers[EVIDENCE_MAX];
} answer_stream;

static char *text_of(const char *text) {
    return text ? (char *)(uintptr_t)text : (char *)(uintptr_t)protobuf_c_empty_string;
}

static size_t fill_evidence(answer_stream *stream, const loci_event *event) {
    size_t count = event->passage_count < EVIDENCE_MAX ? event->passage_count : EVIDENCE_MAX;
    for (size_t i = 0; i < count; i++) {
        const loci_passage *passage = &event->passages[i];
        evidence_slot *slot = &stream->slots[i];
        loci__v1__evidence__init(&slot->message);
        loci_document_name_format(slot->name, stream->corpus, passage->document);
        slot->message.document = slot->name;
        slot->message.start = passage->start;
        slot->message.end = passage->end;
        slot->message.quote.data = (uint8_t *)(uintptr_t)passage->quote.data;
        slot->message.quote.len = passage->quote.len;
        slot->message.share = passage->share;
        slot->message.passage_start = passage->passage_start;
        slot->message.passage_end = passage->passage_end;
        slot->message.answer = text_of(passage->answer);
        slot->message.answer_start = passage->answer_start;
        slot->message.answer_end = passage->answer_end;
        stream->pointers[i] = &slot->message;
    }
    return count;
}

static void fill_usage(Loci__V1__Usage *out, const loci_usage *usage) {
    loci__v1__usage__init(out);
    out->corpus_tokens = usage->corpus_tokens;
    out->question_tokens = usage->question_tokens;
    out->answer_tokens = usage->answer_tokens;
    out->kv_read_bytes = usage->kv_read_bytes;
    out->index_read_bytes = usage->index_read_bytes;
    out->kv_dense_bytes = usage->kv_dense_bytes;
    out->fetched_bytes = usage->fetched_bytes;
    out->first_token_ms = usage->first_token_ms;
    out->decode_tokens_per_s = usage->decode_tokens_per_s;
    out->total_ms = usage->total_ms;
    out->question_read_bytes = usage->question_read_bytes;
    out->decode_read_bytes = usage->decode_read_bytes;
    out->share_sink = usage->share_sink;
    out->share_unattributed = usage->share_unattributed;
    out->lookup_ms = usage->lookup_ms;
    out->read_twice_ms = usage->read_twice_ms;
    out->decode_steps = usage->decode_steps;
}

/* All bodies of an event's oneof: one of them is used. */
typedef union event_body {
    Loci__V1__AnswerStarted started;
    Loci__V1__AnswerProgress progress;
    Loci__V1__AnswerEvidence evidence;
    Loci__V1__AnswerCandidate candidate;
    Loci__V1__AnswerDelta delta;
    Loci__V1__Usage usage;
    Loci__V1__AnswerFinished finished;
} event_body;

static void fill_started(answer_stream *stream, const loci_event *event,
                         Loci__V1__AnswerStarted *out) {
    loci__v1__answer_started__init(out);
    out->corpus = stream->corpus_name;
    out->revision = event->revision;
    out->mode = event->mode == LOCI_MODE_DENSE      ? LOCI__V1__MODE__DENSE
                : event->mode == LOCI_MODE_SQUEEZED ? LOCI__V1__MODE__SQUEEZED
                                                    : LOCI__V1__MODE__HIERARCHICAL;
    out->read_twice = event->read_twice;
    out->model_fingerprint = text_of(event->model);
}

static void fill_candidate(answer_stream *stream, const loci_event *event,
                           Loci__V1__AnswerCandidate *out) {
    loci__v1__answer_candidate__init(out);
    out->answer = text_of(event->text);
    out->found = event->found;
    out->score = event->score;
    out->rank = event->reading->rank;
    out->words = event->reading->words;
    out->answer_logprob = event->reading->logprob;
    out->none_logprob = event->reading->none_logprob;
    if (fill_evidence(stream, event) > 0) out->passage = stream->pointers[0];
}

static void fill_finished(answer_stream *stream, const loci_event *event,
                          Loci__V1__AnswerFinished *out) {
    loci__v1__answer_finished__init(out);
    out->answer = text_of(event->text);
    out->found = event->found;
    out->verbatim = event->verbatim;
    out->stop = text_of(event->stop);
    out->n_evidence = fill_evidence(stream, event);
    out->evidence = stream->pointers;
}

static loci_status send_event(void *ctx, const loci_event *event, loci_error *err) {
    answer_stream *stream = ctx;
    Loci__V1__AnswerEvent message = LOCI__V1__ANSWER_EVENT__INIT;
    event_body body;
    message.seq = ++stream->seq;
    message.started = &body.started; /* the oneof's pointers share their storage */
    switch (event->kind) {
    case LOCI_EVENT_STARTED:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_STARTED;
        fill_started(stream, event, &body.started);
        break;
    case LOCI_EVENT_PROGRESS:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_PROGRESS;
        loci__v1__answer_progress__init(&body.progress);
        body.progress.stage = text_of(event->stage);
        body.progress.done = event->done;
        body.progress.total = event->total;
        break;
    case LOCI_EVENT_EVIDENCE:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE;
        loci__v1__answer_evidence__init(&body.evidence);
        body.evidence.n_items = fill_evidence(stream, event);
        body.evidence.items = stream->pointers;
        break;
    case LOCI_EVENT_CANDIDATE:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_CANDIDATE;
        fill_candidate(stream, event, &body.candidate);
        break;
    case LOCI_EVENT_DELTA:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_DELTA;
        loci__v1__answer_delta__init(&body.delta);
        body.delta.text = text_of(event->text);
        break;
    case LOCI_EVENT_USAGE:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_USAGE;
        fill_usage(&body.usage, event->usage);
        break;
    case LOCI_EVENT_FINISHED:
        message.event_case = LOCI__V1__ANSWER_EVENT__EVENT_FINISHED;
        fill_finished(stream, event, &body.finished);
        break;
    }
    return loci_rpc_send(stream->call, &message.base, err);
}

static loci_status answer(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__AnswerRequest *in = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(in->corpus, "corpus", corpus, err));
    loci_answer_request request;
    LOCI_TRY(translate(in, corpus, &request, err));
    loci_corpus_info info;
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &info, err));
    answer_stream *stream = calloc(1, sizeof *stream);
    if (!stream) return loci_fail(err, LOCI_E_NOMEM, "no memory for an answer");
    stream->call = call;
    stream->node = node;
    stream->corpus = corpus;
    loci_corpus_name_format(stream->corpus_name, corpus);
    loci_status status = loci_engine_answer(node->engine, &request, loci_rpc_cancel_of(call),
                                            send_event, stream, err);
    free(stream);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

/* --- Retrieve ------------------------------------------------------------------------------- */
typedef struct hit_slot {
    Loci__V1__Hit message;
    char name[LOCI_RESOURCE_MAX];
} hit_slot;

typedef struct retrieve_reply {
    loci_rpc_call *call;
    const char *corpus;
    hit_slot slots[HITS_MAX];
    Loci__V1__Hit *pointers[HITS_MAX];
} retrieve_reply;

static loci_status send_hits(void *ctx, const loci_passage *hits, size_t count,
                             const loci_usage *usage, uint64_t revision, loci_error *err) {
    retrieve_reply *reply = ctx;
    if (count > HITS_MAX) count = HITS_MAX;
    for (size_t i = 0; i < count; i++) {
        hit_slot *slot = &reply->slots[i];
        loci__v1__hit__init(&slot->message);
        loci_document_name_format(slot->name, reply->corpus, hits[i].document);
        slot->message.document = slot->name;
        slot->message.start = hits[i].start;
        slot->message.end = hits[i].end;
        slot->message.quote.data = (uint8_t *)(uintptr_t)hits[i].quote.data;
        slot->message.quote.len = hits[i].quote.len;
        slot->message.score = hits[i].share;
        reply->pointers[i] = &slot->message;
    }
    Loci__V1__RetrieveResponse message = LOCI__V1__RETRIEVE_RESPONSE__INIT;
    Loci__V1__Usage used;
    fill_usage(&used, usage);
    message.n_hits = count;
    message.hits = reply->pointers;
    message.usage = &used;
    message.revision = revision;
    return loci_rpc_send(reply->call, &message.base, err);
}

static loci_status retrieve(loci_rpc_call *call, void *ctx, loci_error *err) {
    loci_daemon *node = ctx;
    ProtobufCMessage *message = NULL;
    LOCI_TRY(loci_rpc_recv(call, &message, err));
    const Loci__V1__RetrieveRequest *in = (void *)message;
    char corpus[LOCI_NAME_MAX + 1];
    LOCI_TRY(loci_corpus_name_parse(in->corpus, "corpus", corpus, err));
    LOCI_TRY(check_question(in->question, err));
    if (in->k > HITS_MAX) return bad_field(err, "INVALID_K", "k", "it must be at most 100");
    loci_corpus_info info;
    LOCI_TRY(loci_daemon_corpus(node, call, corpus, &info, err));
    retrieve_reply *reply = calloc(1, sizeof *reply);
    if (!reply) return loci_fail(err, LOCI_E_NOMEM, "no memory for hits");
    reply->call = call;
    reply->corpus = corpus;
    loci_status status =
        loci_engine_retrieve(node->engine, corpus, in->question, in->k, in->min_revision,
                             loci_rpc_cancel_of(call), send_hits, reply, err);
    free(reply);
    return loci_daemon_reason(err, status, LOCI_E_NOTFOUND, "CORPUS_NOT_FOUND");
}

const loci_rpc_method loci_query_methods[] = {
    {"/loci.v1.QueryService/Answer", LOCI_RPC_SERVER_STREAM, &loci__v1__answer_request__descriptor,
     &loci__v1__answer_event__descriptor, answer, LOCI_RPC_LONG},
    {"/loci.v1.QueryService/Retrieve", LOCI_RPC_UNARY, &loci__v1__retrieve_request__descriptor,
     &loci__v1__retrieve_response__descriptor, retrieve, LOCI_RPC_LONG},
};
const size_t loci_query_method_count = sizeof loci_query_methods / sizeof loci_query_methods[0];
