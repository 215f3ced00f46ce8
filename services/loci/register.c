/* SPDX-License-Identifier: Apache-2.0
 *
 * loci register: a thread sends the documents, this one reads acknowledgements and shows progress.
 * The sender's own failure (an unreadable file, a malformed row) ends the sending: what was sent
 * before it is registered and acknowledged, then the failure gets reported.
 */
#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"
#include "services/loci/sources.h"

#define CHUNK (256u << 10)
#define POLL_MS 100
#define BYTE_ORDER_MARK "\xef\xbb\xbf" /* some editors begin UTF-8 with it */

typedef struct sending {
    loci_rpc_client_call *call;
    const loci_sources *sources;
    const char *corpus_name;
    bool first;         /* the next message is the stream's first */
    atomic_bool stop;   /* the call has ended: do not wait for more standard input */
    loci_status status; /* read after joining */
    bool local;         /* the failure is ours, not the call's */
    loci_error err;
} sending;

/* --- Sending -------------------------------------------------------------------------------- */
static loci_status send_chunk(sending *s, const char *id, const char *metadata, const void *data,
                              size_t len, bool end) {
    Loci__V1__RegisterRequest message = LOCI__V1__REGISTER_REQUEST__INIT;
    if (s->first) {
        message.corpus = (char *)(uintptr_t)s->corpus_name;
        message.total_bytes_hint = s->sources->bytes;
        s->first = false;
    }
    if (id) message.document_id = (char *)(uintptr_t)id;
    if (metadata) message.metadata_json = (char *)(uintptr_t)metadata;
    message.data.data = (uint8_t *)(uintptr_t)data;
    message.data.len = len;
    message.end = end;
    return loci_rpc_call_send(s->call, &message.base, &s->err);
}

static loci_status local_failure(sending *s, const char *path, uint64_t line, const char *what) {
    s->local = true;
    if (line > 0)
        return loci_fail(&s->err, LOCI_E_INVAL, "%.200s:%llu: %s", path, (unsigned long long)line,
                         what);
    return loci_fail(&s->err, LOCI_E_IO, "%.200s: %s", path, what);
}

/* One document from a stream of bytes. */
static loci_status send_stream(sending *s, const loci_source *source, FILE *file) {
    uint8_t *chunk = malloc(CHUNK);
    if (!chunk) return local_failure(s, source->path, 0, "no memory");
    loci_status status = LOCI_OK;
    const char *id = source->id;
    bool end = false;
    while (status == LOCI_OK && !end) {
        size_t len = fread(chunk, 1, CHUNK, file);
        if (ferror(file)) {
            status = local_failure(s, source->path, 0, strerror(errno));
            break;
        }
        end = feof(file);
        status = send_chunk(s, id, NULL, chunk, len, end);
        id = NULL;
    }
    free(chunk);
    return status;
}

static loci_status send_text(sending *s, const char *id, const char *metadata, const char *text,
                             size_t len) {
    size_t at = 0;
    loci_status status = LOCI_OK;
    do {
        size_t n = len - at < CHUNK ? len - at : CHUNK;
        status = send_chunk(s, at == 0 ? id : NULL, at == 0 ? metadata : NULL, text + at, n,
                            at + n == len);
        at += n;
    } while (status == LOCI_OK && at < len);
    return status;
}

/* One row: {"id": text, "text": text, "metadata": object or absent}. */
static loci_status send_row(sending *s, const char *path, uint64_t line, const char *row,
                            size_t len) {
    json_error_t why;
    json_t *object = json_loadb(row, len, 0, &why);
    if (!object) return local_failure(s, path, line, why.text);
    const json_t *id = json_object_get(object, "id"), *text = json_object_get(object, "text");
    const json_t *metadata = json_object_get(object, "metadata");
    loci_status status = LOCI_OK;
    char *packed = NULL;
    if (!json_is_string(id) || !json_is_string(text)) {
        status = local_failure(s, path, line, "a row needs the strings \"id\" and \"text\"");
    } else if (metadata && !json_is_object(metadata) && !json_is_null(metadata)) {
        status = local_failure(s, path, line, "\"metadata\" is not an object");
    } else if (!loci_document_id_valid(json_string_value(id))) {
        status =
            local_failure(s, path, line, "\"id\" must be 1-512 bytes without control characters");
    } else if (json_string_length(text) == 0) {
        status = local_failure(s, path, line, "\"text\" is empty");
    } else {
        if (json_is_object(metadata)) packed = json_dumps(metadata, JSON_COMPACT);
        status = send_text(s, json_string_value(id), packed, json_string_value(text),
                           json_string_length(text));
    }
    free(packed);
    json_decref(object);
    return status;
}

static loci_status send_rows(sending *s, const loci_source *source, FILE *file) {
    char *row = NULL;
    size_t room = 0;
    ssize_t len;
    uint64_t line = 0;
    loci_status status = LOCI_OK;
    while (status == LOCI_OK && (len = getline(&row, &room, file)) >= 0) {
        line++;
        const char *text = row;
        if (line == 1 && len >= 3 && memcmp(row, BYTE_ORDER_MARK, 3) == 0) {
            text += 3;
            len -= 3;
        }
        if (strspn(text, " \t\r\n") == (size_t)len) continue;
        status = send_row(s, source->path, line, text, (size_t)len);
    }
    if (status == LOCI_OK && ferror(file))
        status = local_failure(s, source->path, 0, strerror(errno));
    free(row);
    return status;
}

/* Standard input that can be given up: reading a terminal or a pipe may last for ever. */
static ssize_t read_standard(void *cookie, char *data, size_t len) {
    sending *s = cookie;
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    while (!atomic_load(&s->stop) && !loci_interrupted) {
        int ready = poll(&input, 1, POLL_MS);
        if (ready > 0) return read(STDIN_FILENO, data, len);
        if (ready < 0 && errno != EINTR) return -1;
    }
    return 0;
}

static loci_status send_source(sending *s, const loci_source *source) {
    bool standard = strcmp(source->path, "-") == 0;
    const cookie_io_functions_t standard_io = {.read = read_standard};
    FILE *file = standard ? fopencookie(s, "r", standard_io) : fopen(source->path, "r");
    if (!file) return local_failure(s, source->path, 0, strerror(errno));
    loci_status status = source->kind == LOCI_SOURCE_ROWS ? send_rows(s, source, file)
                                                          : send_stream(s, source, file);
    fclose(file);
    return status;
}

static void *send_all(void *arg) {
    sending *s = arg;
    s->status = LOCI_OK;
    for (size_t i = 0; i < s->sources->count && s->status == LOCI_OK && !loci_interrupted; i++)
        s->status = send_source(s, &s->sources->items[i]);
    if (s->status == LOCI_OK && s->first) /* nothing to send: the corpus still has to be named */
        s->status = send_chunk(s, NULL, NULL, NULL, 0, false);
    if (s->status == LOCI_OK) {
        s->status = loci_rpc_call_half_close(s->call, &s->err);
    } else if (s->local) { /* s->err stays; if the call has ended, the reader knows */
        loci_error ignored;
        (void)(loci_rpc_call_half_close(s->call, &ignored) == LOCI_OK);
    }
    return NULL;
}

/* --- Showing -------------------------------------------------------------------------------- */
typedef struct showing {
    const char *corpus;
    bool json;
    uint64_t started_ns;
    uint64_t stored; /* acknowledged documents */
    loci_progress_line line;
} showing;

static json_t *progress_json(const Loci__V1__RegisterProgress *p) {
    return json_pack("{s:s,s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f}", "event", "progress", "stage",
                     p->stage, "documents_received", (json_int_t)p->documents_received,
                     "documents_stored", (json_int_t)p->documents_stored, "documents_searchable",
                     (json_int_t)p->documents_searchable, "bytes_received",
                     (json_int_t)p->bytes_received, "tokens_encoded", (json_int_t)p->tokens_encoded,
                     "tokens_indexed", (json_int_t)p->tokens_indexed, "tokens_per_s",
                     p->tokens_per_s, "eta_s", p->eta_s);
}

static json_t *ack_json(const Loci__V1__RegisterAck *ack) {
    bool searchable = ack->state == LOCI__V1__DOCUMENT_STATE__SEARCHABLE;
    return json_pack("{s:s,s:s,s:s,s:b,s:I,s:s}", "event", "ack", "document",
                     loci_document_name_id(ack->document), "state",
                     searchable ? "searchable" : "stored", "unchanged", (int)ack->unchanged,
                     "revision", (json_int_t)ack->revision, "name", ack->document);
}

static void show_progress(showing *show, const Loci__V1__RegisterProgress *p) {
    if (show->json) {
        loci_print_json(progress_json(p));
        return;
    }
    double elapsed = (double)(loci_now_ns() - show->started_ns) / 1e9;
    double share = p->eta_s >= 0.0 ? elapsed / (elapsed + p->eta_s + 1e-9) : 0.0;
    loci_progress_show(&show->line,
                       &(loci_progress){share, "", p->documents_searchable, p->documents_received,
                                        p->tokens_encoded, p->tokens_per_s, p->eta_s});
}

static void show_summary(const showing *show, const Loci__V1__RegisterSummary *s) {
    const char *corpus = show->corpus;
    if (show->json) {
        loci_print_json(json_pack(
            "{s:I,s:I,s:I,s:f,s:I,s:I,s:I,s:s}", "documents", (json_int_t)s->documents, "tokens",
            (json_int_t)s->tokens, "segments", (json_int_t)s->segments, "seconds", s->seconds,
            "bytes_on_disk", (json_int_t)s->bytes_on_disk, "unchanged", (json_int_t)s->unchanged,
            "revision", (json_int_t)s->revision, "corpus", corpus));
        return;
    }
    char documents[32], tokens[32], segments[32], speed[32], disk[32];
    double seconds = s->seconds > 1e-3 ? s->seconds : 1e-3;
    printf("registered %s documents (%llu unchanged), %s tokens, %s segments in %.1f s "
           "(%s tokens/s); %s holds %s on disk\n",
           loci_format_count(documents, s->documents), (unsigned long long)s->unchanged,
           loci_format_count(tokens, s->tokens), loci_format_count(segments, s->segments),
           s->seconds, loci_format_count(speed, (uint64_t)((double)s->tokens / seconds)), corpus,
           loci_format_size(disk, s->bytes_on_disk));
}

/* --- The command ------------------------------------------------------------------------------ */
static loci_status create_if_missing(loci_cli *cli, const char *corpus, loci_error *err) {
    Loci__V1__CreateCorpusRequest request = LOCI__V1__CREATE_CORPUS_REQUEST__INIT;
    request.parent = (char *)LOCI_PARENT;
    request.corpus_id = (char *)(uintptr_t)corpus;
    ProtobufCMessage *response = NULL;
    loci_status status = loci_cli_call(cli, "/loci.v1.CorpusService/CreateCorpus", &request.base,
                                       &loci__v1__corpus__descriptor, &response, err);
    if (status == LOCI_OK) protobuf_c_message_free_unpacked(response, NULL);
    return status == LOCI_E_EXISTS ? LOCI_OK : status;
}

static void show_event(void *ctx, const ProtobufCMessage *message) {
    showing *show = ctx;
    const Loci__V1__RegisterResponse *event = (const void *)message;
    switch (event->event_case) {
    case LOCI__V1__REGISTER_RESPONSE__EVENT_ACK:
        show->stored += event->ack->state == LOCI__V1__DOCUMENT_STATE__STORED;
        if (show->json) loci_print_json(ack_json(event->ack));
        break;
    case LOCI__V1__REGISTER_RESPONSE__EVENT_PROGRESS: show_progress(show, event->progress); break;
    case LOCI__V1__REGISTER_RESPONSE__EVENT_SUMMARY:
        loci_progress_wipe(&show->line);
        show_summary(show, event->summary);
        break;
    default: break;
    }
}

static loci_status run_stream(loci_cli *cli, const char *corpus, const char *corpus_name,
                              const loci_sources *sources, loci_error *err) {
    sending send = {.sources = sources, .corpus_name = corpus_name, .first = true};
    LOCI_TRY(loci_rpc_call_open(cli->channel, "/loci.v1.DocumentService/Register",
                                &loci__v1__register_response__descriptor, 0, &loci_interrupted,
                                &send.call, err));
    showing show = {.corpus = corpus,
                    .json = cli->json,
                    .started_ns = loci_now_ns(),
                    .line = loci_progress_begin()};
    pthread_t sender;
    loci_status status = LOCI_OK;
    if (pthread_create(&sender, NULL, send_all, &send) != 0) {
        status = loci_fail(err, LOCI_E_LIMIT, "no thread for sending");
    } else {
        status = loci_cli_events(send.call, show_event, &show, err);
        atomic_store(&send.stop, true);
        if (status != LOCI_OK) loci_rpc_call_cancel(send.call);
        pthread_join(sender, NULL);
        if (send.local)
            status = loci_fail(err, send.status, "%.300s; documents registered before it: %llu",
                               send.err.text, (unsigned long long)show.stored);
    }
    loci_progress_wipe(&show.line);
    loci_rpc_call_close(send.call);
    if (status == LOCI_E_NOTFOUND && strcmp(err->reason, "CORPUS_NOT_FOUND") == 0)
        return loci_fail_reason(err, status, "CORPUS_NOT_FOUND",
                                "there is no corpus %s; make it with: loci corpus create %s (or "
                                "register with --create)",
                                corpus, corpus);
    return status;
}

static loci_status run_register(loci_cli *cli, const loci_command *command, int argc, char **argv,
                                loci_error *err) {
    bool create = false, rows = false;
    const char *stdin_id = "stdin";
    const loci_option options[] = {
        {"create", 0, LOCI_OPTION_FLAG, &create, 0, 0, NULL, "make the corpus if it is missing"},
        {"id", 0, LOCI_OPTION_STRING, &stdin_id, 0, 0, "ID",
         "document id for standard input (default stdin)"},
        {"jsonl", 0, LOCI_OPTION_FLAG, &rows, 0, 0, NULL, "standard input holds JSON rows"},
    };
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    char name[LOCI_RESOURCE_MAX];
    loci_sources sources = {0};
    loci_status status =
        loci_cli_parse(cli, command, options, 3, argc, argv, args, &count, 2, SIZE_MAX, err);
    if (status != LOCI_OK || cli->help) goto out;
    LOCI_TRY_GOTO(loci_cli_corpus(cli, args[0], name, err), out);
    for (size_t i = 1; i < count; i++)
        LOCI_TRY_GOTO(loci_sources_add(&sources, args[i], stdin_id, rows, err), out);
    LOCI_TRY_GOTO(loci_sources_check(&sources, err), out);
    if (sources.skipped_empty > 0 && !cli->json)
        fprintf(stderr, "skipped %zu empty files\n", sources.skipped_empty);
    LOCI_TRY_GOTO(loci_cli_connect(cli, err), out);
    if (create) LOCI_TRY_GOTO(create_if_missing(cli, args[0], err), out);
    status = run_stream(cli, args[0], name, &sources, err);
out:
    loci_sources_fini(&sources);
    free(args);
    return status;
}

const loci_command loci_register_command = {
    "register", "NAME PATH...", "put documents into a corpus",
    "\nPATH is a text or Markdown file, a folder (searched for *.txt, *.md, *.markdown), a .jsonl\n"
    "file with rows {\"id\", \"text\", \"metadata\"}, or - for standard input. Document ids are "
    "paths:\nbelow a folder, relative to it; of a file, as given (its name alone if absolute).\n"
    "Registering the same id again replaces the document; the same content costs nothing.\n",
    run_register};
