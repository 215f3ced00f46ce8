/* SPDX-License-Identifier: Apache-2.0
 *
 * loci corpus reindex: begins or joins the making of a corpus's index anew, and shows progress.
 */
#include <stdlib.h>
#include <string.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"

typedef struct showing {
    const char *corpus;
    bool json;
    loci_progress_line line;
} showing;

static void show_progress(showing *show, const Loci__V1__ReindexProgress *p) {
    if (show->json)
        loci_print_json(json_pack(
            "{s:s,s:s,s:I,s:I,s:I,s:I,s:f,s:f}", "event", "progress", "stage", p->stage,
            "documents", (json_int_t)p->documents, "documents_total",
            (json_int_t)p->documents_total, "tokens", (json_int_t)p->tokens, "tokens_total",
            (json_int_t)p->tokens_total, "tokens_per_s", p->tokens_per_s, "eta_s", p->eta_s));
    else
        loci_progress_show(
            &show->line,
            &(loci_progress){
                p->tokens_total > 0 ? (double)p->tokens / (double)p->tokens_total : 0.0, p->stage,
                p->documents, p->documents_total, p->tokens, p->tokens_per_s, p->eta_s});
}

static void show_summary(const showing *show, const Loci__V1__ReindexSummary *s) {
    const char *corpus = show->corpus;
    if (show->json) {
        loci_print_json(
            json_pack("{s:s,s:I,s:I,s:I,s:f,s:I,s:I,s:s,s:b}", "corpus", corpus, "documents",
                      (json_int_t)s->documents, "tokens", (json_int_t)s->tokens, "segments",
                      (json_int_t)s->segments, "seconds", s->seconds, "bytes_on_disk",
                      (json_int_t)s->bytes_on_disk, "revision", (json_int_t)s->revision,
                      "model_fingerprint", s->model_fingerprint, "unchanged", (int)s->unchanged));
        return;
    }
    if (s->unchanged) {
        printf("corpus %s is of this locid's model (%.12s) already; --force makes its index anew\n",
               corpus, s->model_fingerprint);
        return;
    }
    char documents[32], tokens[32], disk[32];
    printf("reindexed %s documents, %s tokens in %.1f s with model %.12s; %s holds %s on disk\n",
           loci_format_count(documents, s->documents), loci_format_count(tokens, s->tokens),
           s->seconds, s->model_fingerprint, corpus, loci_format_size(disk, s->bytes_on_disk));
}

static void show_event(void *ctx, const ProtobufCMessage *message) {
    showing *show = ctx;
    const Loci__V1__ReindexCorpusResponse *event = (const void *)message;
    if (event->event_case == LOCI__V1__REINDEX_CORPUS_RESPONSE__EVENT_PROGRESS) {
        show_progress(show, event->progress);
    } else if (event->event_case == LOCI__V1__REINDEX_CORPUS_RESPONSE__EVENT_SUMMARY) {
        loci_progress_wipe(&show->line);
        show_summary(show, event->summary);
    }
}

static loci_status follow(loci_cli *cli, const char *corpus, char *name, bool force,
                          loci_error *err) {
    loci_rpc_client_call *call = NULL;
    Loci__V1__ReindexCorpusRequest request = LOCI__V1__REINDEX_CORPUS_REQUEST__INIT;
    request.name = name;
    request.force = force;
    LOCI_TRY(loci_rpc_call_open(cli->channel, "/loci.v1.CorpusService/ReindexCorpus",
                                &loci__v1__reindex_corpus_response__descriptor, 0,
                                &loci_interrupted, &call, err));
    showing show = {.corpus = corpus, .json = cli->json, .line = loci_progress_begin()};
    /* A failed send means that the call has ended: reading tells why. */
    loci_error ignored;
    if (loci_rpc_call_send(call, &request.base, &ignored) == LOCI_OK)
        (void)(loci_rpc_call_half_close(call, &ignored) == LOCI_OK);
    loci_status status = loci_cli_events(call, show_event, &show, err);
    loci_progress_wipe(&show.line);
    loci_rpc_call_close(call);
    return status;
}

static loci_status give_up(loci_cli *cli, const char *corpus, char *name, loci_error *err) {
    Loci__V1__CancelReindexCorpusRequest request = LOCI__V1__CANCEL_REINDEX_CORPUS_REQUEST__INIT;
    request.name = name;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.CorpusService/CancelReindexCorpus", &request.base,
                           &loci__v1__corpus__descriptor, &response, err));
    if (cli->json)
        loci_print_json(json_pack("{s:s,s:b,s:s}", "corpus", corpus, "cancelled", 1,
                                  "model_fingerprint",
                                  ((Loci__V1__Corpus *)response)->model_fingerprint));
    else
        printf("gave up reindexing corpus %s; it stays as it was\n", corpus);
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

loci_status loci_corpus_reindex_run(loci_cli *cli, const loci_command *command, int argc,
                                    char **argv, loci_error *err) {
    bool force = false, cancel = false;
    const loci_option options[] = {
        {"force", 0, LOCI_OPTION_FLAG, &force, 0, 0, NULL,
         "also where the index is of the daemon's model: repairs damaged extents"},
        {"cancel", 0, LOCI_OPTION_FLAG, &cancel, 0, 0, NULL,
         "give up what is under way: the corpus stays as it was"},
    };
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    char name[LOCI_RESOURCE_MAX];
    loci_status status =
        loci_cli_parse(cli, command, options, 2, argc, argv, args, &count, 1, 1, err);
    if (status != LOCI_OK || cli->help) goto out;
    if (force && cancel) {
        status = loci_cli_usage(cli, err, "--force and --cancel exclude each other");
        goto out;
    }
    LOCI_TRY_GOTO(loci_cli_corpus(cli, args[0], name, err), out);
    LOCI_TRY_GOTO(loci_cli_connect(cli, err), out);
    status = cancel ? give_up(cli, args[0], name, err) : follow(cli, args[0], name, force, err);
out:
    free(args);
    return status;
}
