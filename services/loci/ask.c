/* SPDX-License-Identifier: Apache-2.0
 *
 * loci ask (streams the answer, then its evidence) and loci search (evidence only).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"

#define SHARE_OTHER 0.05  /* of the passage of another answer that is listed */
#define SHARE_SHOWN 0.001 /* of a second and later passage, for people; --json has all */

/* --- ask ------------------------------------------------------------------------------------ */
typedef struct asking {
    bool json;
    bool terminal;                 /* stages are shown on standard error and wiped again */
    bool started;                  /* some text of the answer was printed */
    ProtobufCMessage *usage_event; /* owned; the last one */
    ProtobufCMessage *finished_event;
} asking;

static void wipe_stage(const asking *ask) {
    if (ask->terminal) fprintf(stderr, "\r\x1b[K");
}

static json_t *text_json(const char *text) {
    return loci_json_text(loci_slice_text(text));
}

static json_t *evidence_json(Loci__V1__Evidence *const *items, size_t count) {
    json_t *array = json_array();
    for (size_t i = 0; i < count; i++) {
        const Loci__V1__Evidence *e = items[i];
        json_t *object =
            loci_json_passage(e->document, e->start, e->end, e->quote, "share", e->share);
        json_object_set_new(object, "passage_start", json_integer((json_int_t)e->passage_start));
        json_object_set_new(object, "passage_end", json_integer((json_int_t)e->passage_end));
        if (e->answer[0]) json_object_set_new(object, "answer", text_json(e->answer));
        if (e->answer_end > e->answer_start) {
            json_object_set_new(object, "answer_start", json_integer((json_int_t)e->answer_start));
            json_object_set_new(object, "answer_end", json_integer((json_int_t)e->answer_end));
        }
        json_array_append_new(array, object);
    }
    return array;
}

static const char *mode_name(Loci__V1__Mode mode) {
    return mode == LOCI__V1__MODE__DENSE      ? "dense"
           : mode == LOCI__V1__MODE__SQUEEZED ? "squeezed"
                                              : "hierarchical";
}

/* JSON has no infinities. */
static double number(double value) {
    return isfinite(value) ? value : 0.0;
}

static json_t *event_json(const Loci__V1__AnswerEvent *event) {
    switch (event->event_case) {
    case LOCI__V1__ANSWER_EVENT__EVENT_STARTED:
        return json_pack("{s:s,s:s,s:I,s:s,s:b,s:s}", "event", "started", "corpus",
                         event->started->corpus, "revision", (json_int_t)event->started->revision,
                         "mode", mode_name(event->started->mode), "read_twice",
                         (int)event->started->read_twice, "model_fingerprint",
                         event->started->model_fingerprint);
    case LOCI__V1__ANSWER_EVENT__EVENT_PROGRESS:
        return json_pack("{s:s,s:s,s:I,s:I}", "event", "progress", "stage", event->progress->stage,
                         "done", (json_int_t)event->progress->done, "total",
                         (json_int_t)event->progress->total);
    case LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE:
        return json_pack("{s:s,s:o}", "event", "evidence", "evidence",
                         evidence_json(event->evidence->items, event->evidence->n_items));
    case LOCI__V1__ANSWER_EVENT__EVENT_CANDIDATE: {
        const Loci__V1__AnswerCandidate *c = event->candidate;
        return json_pack("{s:s,s:o,s:b,s:f,s:f,s:f,s:f,s:f,s:o}", "event", "candidate", "answer",
                         text_json(c->answer), "found", (int)c->found, "score", number(c->score),
                         "rank", number(c->rank), "words", number(c->words), "answer_logprob",
                         number(c->answer_logprob), "none_logprob", number(c->none_logprob),
                         "passage", evidence_json(&c->passage, c->passage ? 1 : 0));
    }
    case LOCI__V1__ANSWER_EVENT__EVENT_DELTA:
        return json_pack("{s:s,s:o}", "event", "delta", "text", text_json(event->delta->text));
    case LOCI__V1__ANSWER_EVENT__EVENT_USAGE:
        return json_pack("{s:s,s:o}", "event", "usage", "usage", loci_json_usage(event->usage));
    default: return NULL;
    }
}

static void show_event(asking *ask, const Loci__V1__AnswerEvent *event) {
    if (ask->json) {
        json_t *object = event_json(event);
        if (object) loci_print_json(object);
        return;
    }
    if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_PROGRESS && ask->terminal &&
        !ask->started) {
        fprintf(stderr, "\r\x1b[K%s %llu/%llu", event->progress->stage,
                (unsigned long long)event->progress->done,
                (unsigned long long)event->progress->total);
    } else if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_DELTA) {
        if (!ask->started) wipe_stage(ask);
        ask->started = true;
        fputs(event->delta->text, stdout);
        fflush(stdout);
    }
}

static void print_timing(const Loci__V1__Usage *u) {
    char tokens[32], read[32], dense[32];
    uint64_t bytes = u->kv_read_bytes + u->index_read_bytes;
    printf("\nfirst token %.0f ms, total %.0f ms, %.1f tokens/s", u->first_token_ms, u->total_ms,
           u->decode_tokens_per_s);
    if (u->kv_dense_bytes > 0)
        printf("; read %s of %s (%.2f%%) over %s tokens", loci_format_size(read, bytes),
               loci_format_size(dense, u->kv_dense_bytes),
               100.0 * (double)bytes / (double)u->kv_dense_bytes,
               loci_format_count(tokens, u->corpus_tokens));
    printf("\n");
}

/* One is a part of the other: "Holmqvist", "Dagny Holmqvist". */
static bool same_answer(const char *a, const char *b) {
    loci_slice x = loci_slice_text(a), y = loci_slice_text(b);
    size_t from, to;
    return loci_text_find(x, 0, y, &from, &to) || loci_text_find(y, 0, x, &from, &to);
}

/* Another answer that was read in another document, with some share, and not yet listed. */
static bool is_other(const Loci__V1__AnswerFinished *finished, size_t index) {
    const Loci__V1__Evidence *e = finished->evidence[index];
    if (!finished->found || e->answer[0] == '\0' || e->share < SHARE_OTHER ||
        strcmp(e->document, finished->evidence[0]->document) == 0 ||
        same_answer(e->answer, finished->answer))
        return false;
    for (size_t i = 1; i < index; i++)
        if (is_other(finished, i) && same_answer(finished->evidence[i]->answer, e->answer) &&
            strcmp(finished->evidence[i]->document, e->document) == 0)
            return false;
    return true;
}

static json_t *others_json(const Loci__V1__AnswerFinished *finished) {
    json_t *array = json_array();
    for (size_t i = 1; i < finished->n_evidence; i++) {
        const Loci__V1__Evidence *e = finished->evidence[i];
        if (!is_other(finished, i)) continue;
        json_array_append_new(array,
                              json_pack("{s:o,s:s,s:f}", "answer", text_json(e->answer), "document",
                                        loci_document_name_id(e->document), "share", e->share));
    }
    return array;
}

static void print_others(const Loci__V1__AnswerFinished *finished) {
    bool first = true;
    for (size_t i = 1; i < finished->n_evidence; i++) {
        const Loci__V1__Evidence *e = finished->evidence[i];
        if (!is_other(finished, i)) continue;
        if (first) printf("\nOther answers, in other documents:\n");
        first = false;
        printf("  %s  (%s, %.1f%%)\n", e->answer, loci_document_name_id(e->document),
               100.0 * e->share);
    }
}

static void print_result(const asking *ask, const Loci__V1__AnswerFinished *finished,
                         const Loci__V1__Usage *usage) {
    if (!ask->started) wipe_stage(ask);
    if (ask->started) printf("\n");
    if (!finished->found)
        printf("No answer found in this corpus.\n");
    else if (!ask->started)
        printf("%s\n", finished->answer);
    if (finished->found && !finished->verbatim && finished->n_evidence > 0)
        printf("(not in these words in the passages below)\n");
    print_others(finished);
    if (finished->n_evidence > 0) printf("\n%s\n", finished->found ? "Evidence:" : "Looked at:");
    for (size_t i = 0; i < finished->n_evidence; i++) {
        const Loci__V1__Evidence *e = finished->evidence[i];
        if (i > 0 && e->share < SHARE_SHOWN) continue;
        char share[32];
        snprintf(share, sizeof share, "%.1f%%", 100.0 * e->share);
        loci_print_passage(e->document, e->start, e->end, e->quote, share,
                           !finished->found ? ""
                           : e->answer[0]   ? e->answer
                                            : finished->answer);
    }
    if (usage) print_timing(usage);
}

static loci_status finish(const asking *ask, loci_error *err) {
    if (!ask->finished_event)
        return loci_fail(err, LOCI_E_RPC, "the answer ended without its last event");
    const Loci__V1__AnswerFinished *finished =
        ((const Loci__V1__AnswerEvent *)ask->finished_event)->finished;
    const Loci__V1__Usage none = LOCI__V1__USAGE__INIT;
    const Loci__V1__Usage *usage =
        ask->usage_event ? ((const Loci__V1__AnswerEvent *)ask->usage_event)->usage : &none;
    if (!ask->json) {
        print_result(ask, finished, usage);
        return LOCI_OK;
    }
    loci_print_json(json_pack(
        "{s:o,s:b,s:b,s:s,s:o,s:o,s:o}", "answer", text_json(finished->answer), "found",
        (int)finished->found, "verbatim", (int)finished->verbatim, "stop", finished->stop,
        "other_answers", others_json(finished), "evidence",
        evidence_json(finished->evidence, finished->n_evidence), "usage", loci_json_usage(usage)));
    return LOCI_OK;
}

static void keep(ProtobufCMessage **slot, ProtobufCMessage *message) {
    if (*slot) protobuf_c_message_free_unpacked(*slot, NULL);
    *slot = message;
}

static loci_status read_answer(loci_rpc_client_call *call, asking *ask, loci_error *err) {
    for (;;) {
        ProtobufCMessage *message = NULL;
        LOCI_TRY(loci_rpc_call_read(call, &message, err));
        if (!message) return finish(ask, err);
        const Loci__V1__AnswerEvent *event = (void *)message;
        show_event(ask, event);
        if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_USAGE)
            keep(&ask->usage_event, message);
        else if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_FINISHED)
            keep(&ask->finished_event, message);
        else
            protobuf_c_message_free_unpacked(message, NULL);
    }
}

static loci_status stream_answer(loci_cli *cli, const Loci__V1__AnswerRequest *request,
                                 loci_error *err) {
    loci_rpc_client_call *call = NULL;
    LOCI_TRY(loci_rpc_call_open(cli->channel, "/loci.v1.QueryService/Answer",
                                &loci__v1__answer_event__descriptor, 0, &loci_interrupted, &call,
                                err));
    asking ask = {.json = cli->json,
                  .terminal = !cli->json && isatty(STDERR_FILENO) && isatty(STDOUT_FILENO)};
    /* A failed send means that the call has ended: reading tells why. */
    loci_error ignored;
    if (loci_rpc_call_send(call, &request->base, &ignored) == LOCI_OK)
        (void)(loci_rpc_call_half_close(call, &ignored) == LOCI_OK);
    loci_status status = read_answer(call, &ask, err);
    if (status != LOCI_OK) wipe_stage(&ask);
    if (status != LOCI_OK && ask.started) printf("\n");
    keep(&ask.usage_event, NULL);
    keep(&ask.finished_event, NULL);
    loci_rpc_call_close(call);
    return status;
}

typedef struct ask_options {
    const char *mode;
    double top_p, sparsity; /* negative: not given */
    double temperature;
    uint64_t budget, max_tokens, seed, evidence;
    int read_twice;
} ask_options;

/* On the wire 0 stands for the default, so a 0 that was typed must not get there. */
static loci_status check_shares(loci_cli *cli, const ask_options *o, loci_error *err) {
    if (o->top_p == 0)
        return loci_cli_usage(cli, err, "--top-p must be more than 0: nothing would be read");
    if (o->sparsity == 0)
        return loci_cli_usage(cli, err,
                              "--sparsity must be more than 0; --mode dense reads every key");
    return LOCI_OK;
}

static loci_status fill_request(loci_cli *cli, const ask_options *o, const char *question,
                                char *corpus, Loci__V1__AnswerRequest *request, loci_error *err) {
    static const char *const modes[] = {"", "dense", "squeezed", "hierarchical"};
    loci__v1__answer_request__init(request);
    request->corpus = corpus;
    request->question = (char *)(uintptr_t)question;
    for (int i = 1; i < 4 && o->mode; i++) {
        if (strcmp(o->mode, modes[i]) == 0) request->mode = (Loci__V1__Mode)i;
    }
    if (o->mode && request->mode == LOCI__V1__MODE__MODE_UNSPECIFIED)
        return loci_cli_usage(cli, err, "--mode \"%.40s\" is none of hierarchical, squeezed, dense",
                              o->mode);
    LOCI_TRY(check_shares(cli, o, err));
    request->top_p = o->top_p > 0 ? o->top_p : 0;
    request->temperature = o->temperature;
    request->sparsity = o->sparsity > 0 ? o->sparsity : 0;
    request->budget = (uint32_t)o->budget;
    request->max_tokens = (uint32_t)o->max_tokens;
    request->seed = o->seed;
    request->evidence_count = (uint32_t)o->evidence;
    request->read_twice = o->read_twice < 0   ? LOCI__V1__SWITCH__SWITCH_DEFAULT
                          : o->read_twice > 0 ? LOCI__V1__SWITCH__ON
                                              : LOCI__V1__SWITCH__OFF;
    return LOCI_OK;
}

static loci_status run_ask(loci_cli *cli, const loci_command *command, int argc, char **argv,
                           loci_error *err) {
    ask_options o = {.top_p = -1, .sparsity = -1, .read_twice = -1};
    const loci_option options[] = {
        {"mode", 0, LOCI_OPTION_STRING, &o.mode, 0, 0, "MODE",
         "hierarchical (default), squeezed or dense"},
        {"top-p", 0, LOCI_OPTION_DOUBLE, &o.top_p, 0, 1, "P", "share of the attention to read"},
        {"budget", 0, LOCI_OPTION_U64, &o.budget, 1, UINT32_MAX, "TOKENS",
         "most tokens read for each head and query token"},
        {"sparsity", 0, LOCI_OPTION_DOUBLE, &o.sparsity, 0, 0.999, "S",
         "squeezed: share of the keys to drop (default 0.9)"},
        {"read-twice", 0, LOCI_OPTION_SWITCH, &o.read_twice, 0, 0, NULL,
         "read the best passages again, one at a time"},
        {"max-tokens", 0, LOCI_OPTION_U64, &o.max_tokens, 1, 512, "N", "length of the answer"},
        {"temperature", 0, LOCI_OPTION_DOUBLE, &o.temperature, 0, 10, "T",
         "0 = always the likeliest token (default)"},
        {"seed", 0, LOCI_OPTION_U64, &o.seed, 0, 9e15, "S", "of the sampling"},
        {"evidence", 0, LOCI_OPTION_U64, &o.evidence, 1, 16, "N", "passages to cite (default 4)"},
    };
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    char corpus[LOCI_RESOURCE_MAX];
    Loci__V1__AnswerRequest request;
    loci_status status = loci_cli_parse(cli, command, options, sizeof options / sizeof options[0],
                                        argc, argv, args, &count, 2, 2, err);
    if (status != LOCI_OK || cli->help) goto out;
    LOCI_TRY_GOTO(loci_cli_corpus(cli, args[0], corpus, err), out);
    LOCI_TRY_GOTO(fill_request(cli, &o, args[1], corpus, &request, err), out);
    LOCI_TRY_GOTO(loci_cli_connect(cli, err), out);
    status = stream_answer(cli, &request, err);
out:
    free(args);
    return status;
}

/* --- search ------------------------------------------------------------------------------------
 */
static void print_hits(const Loci__V1__RetrieveResponse *reply) {
    if (reply->n_hits == 0) printf("Nothing found: the corpus is empty.\n");
    for (size_t i = 0; i < reply->n_hits; i++) {
        const Loci__V1__Hit *hit = reply->hits[i];
        char score[32];
        snprintf(score, sizeof score, "%.3f", hit->score);
        loci_print_passage(hit->document, hit->start, hit->end, hit->quote, score, "");
    }
    if (reply->usage) printf("\ntotal %.0f ms\n", reply->usage->total_ms);
}

static json_t *hits_json(const Loci__V1__RetrieveResponse *reply) {
    json_t *hits = json_array();
    for (size_t i = 0; i < reply->n_hits; i++) {
        const Loci__V1__Hit *hit = reply->hits[i];
        json_array_append_new(hits, loci_json_passage(hit->document, hit->start, hit->end,
                                                      hit->quote, "score", hit->score));
    }
    const Loci__V1__Usage none = LOCI__V1__USAGE__INIT;
    return json_pack("{s:o,s:o,s:I}", "hits", hits, "usage",
                     loci_json_usage(reply->usage ? reply->usage : &none), "revision",
                     (json_int_t)reply->revision);
}

static loci_status run_search(loci_cli *cli, const loci_command *command, int argc, char **argv,
                              loci_error *err) {
    uint64_t k = 0;
    const loci_option options[] = {
        {"k", 'k', LOCI_OPTION_U64, &k, 1, 100, "N", "number of passages (default 5)"}};
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    char corpus[LOCI_RESOURCE_MAX];
    Loci__V1__RetrieveRequest request = LOCI__V1__RETRIEVE_REQUEST__INIT;
    ProtobufCMessage *response = NULL;
    loci_status status =
        loci_cli_parse(cli, command, options, 1, argc, argv, args, &count, 2, 2, err);
    if (status != LOCI_OK || cli->help) goto out;
    LOCI_TRY_GOTO(loci_cli_corpus(cli, args[0], corpus, err), out);
    LOCI_TRY_GOTO(loci_cli_connect(cli, err), out);
    request.corpus = corpus;
    request.question = (char *)(uintptr_t)args[1];
    request.k = (uint32_t)k;
    LOCI_TRY_GOTO(loci_cli_call(cli, "/loci.v1.QueryService/Retrieve", &request.base,
                                &loci__v1__retrieve_response__descriptor, &response, err),
                  out);
    if (cli->json)
        loci_print_json(hits_json((Loci__V1__RetrieveResponse *)response));
    else
        print_hits((Loci__V1__RetrieveResponse *)response);
    protobuf_c_message_free_unpacked(response, NULL);
out:
    free(args);
    return status;
}

const loci_command loci_ask_command = {
    "ask", "NAME QUESTION", "ask a corpus; the answer streams, its evidence follows",
    "\nThe exit status is 0 also when no answer was found; --json tells with \"found\".\n",
    run_ask};
const loci_command loci_search_command = {
    "search", "NAME QUESTION", "find the best passages for a question, without an answer", NULL,
    run_search};
