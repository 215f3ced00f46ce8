/* SPDX-License-Identifier: Apache-2.0
 *
 * loci corpus create | list | show | set | calibrate | delete, and the list of those with reindex
 * (reindex.c)
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "services/common/text.h"
#include "services/loci/cli.h"
#include "services/loci/output.h"

#define PAGE 1000

/* Kept as a float; shown as it was typed. */
static json_t *setting_json(double value) {
    char text[32];
    snprintf(text, sizeof text, "%.6g", value);
    return json_real(strtod(text, NULL));
}

static const char *corpus_id(const Loci__V1__Corpus *corpus) {
    return corpus->name + sizeof(LOCI_PARENT "/corpora/") - 1;
}

static json_t *corpus_json(const Loci__V1__Corpus *c) {
    json_t *object =
        json_pack("{s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:s,s:s,s:I,s:s}", "corpus", corpus_id(c),
                  "documents", (json_int_t)c->documents, "pending_documents",
                  (json_int_t)c->pending_documents, "segments", (json_int_t)c->segments, "tokens",
                  (json_int_t)c->tokens, "bytes", (json_int_t)c->bytes, "bytes_on_disk",
                  (json_int_t)c->bytes_on_disk, "extents", (json_int_t)c->extents, "revision",
                  (json_int_t)c->revision, "encoding", c->encoding, "model_fingerprint",
                  c->model_fingerprint, "create_time", (json_int_t)c->create_time, "name", c->name);
    json_object_set_new(object, "kv", json_string(c->kv));
    json_object_set_new(object, "dense_layers", json_integer((json_int_t)c->dense_layers));
    json_object_set_new(object, "attn_temperature", setting_json(c->attn_temperature));
    json_object_set_new(object, "attn_scale", setting_json(c->attn_scale));
    if (c->tokens_max > 0)
        json_object_set_new(object, "tokens_max", json_integer((json_int_t)c->tokens_max));
    json_object_set_new(object, "other_model", json_boolean(c->other_model));
    json_object_set_new(object, "answers", json_boolean(c->answers));
    json_object_set_new(object, "reindexing", json_boolean(c->reindexing));
    if (c->reindexing) {
        json_object_set_new(object, "reindex_fingerprint", json_string(c->reindex_fingerprint));
        json_object_set_new(object, "reindex_documents",
                            json_integer((json_int_t)c->reindex_documents));
    }
    json_object_set_new(object, "merged", json_boolean(c->merged));
    if (c->stage[0]) json_object_set_new(object, "stage", json_string(c->stage));
    if (c->merge_failure[0])
        json_object_set_new(object, "merge_failure", json_string(c->merge_failure));
    if (c->manifest_hash[0])
        json_object_set_new(object, "manifest_hash", json_string(c->manifest_hash));
    return object;
}

/* What a corpus of another model, or on the way to one, needs. */
static void print_model_note(const Loci__V1__Corpus *c) {
    if (c->other_model)
        printf("note       this locid registers with another model%s\n",
               c->answers ? " and answers with this one" : " and cannot answer with this one");
    if (c->reindexing)
        printf(
            "           being reindexed for model %s, %llu of %llu documents: loci corpus reindex "
            "%s\n",
            c->reindex_fingerprint, (unsigned long long)c->reindex_documents,
            (unsigned long long)c->documents, corpus_id(c));
    else if (c->other_model)
        printf("           to encode it anew: loci corpus reindex %s\n", corpus_id(c));
}

static void print_corpus(const Loci__V1__Corpus *c) {
    char documents[32], tokens[32], segments[32], bytes[32], disk[32], created[40];
    char most[32], limit[64] = "";
    if (c->tokens_max > 0)
        snprintf(limit, sizeof limit, " (at most %s tokens)",
                 loci_format_count(most, c->tokens_max));
    struct tm utc;
    time_t when = (time_t)c->create_time;
    gmtime_r(&when, &utc);
    strftime(created, sizeof created, "%Y-%m-%d %H:%M:%S UTC", &utc);
    printf("corpus     %s\n"
           "documents  %s (%llu not yet searchable)\n"
           "tokens     %s in %s segments, %llu extents%s\n"
           "size       %s of text, %s on disk\n"
           "revision   %llu\n"
           "encoding   %s%s, K and V in %s, model %s\n"
           "attention  first %u layers dense, temperature %g, scale %g\n"
           "created    %s\n",
           corpus_id(c), loci_format_count(documents, c->documents),
           (unsigned long long)c->pending_documents, loci_format_count(tokens, c->tokens),
           loci_format_count(segments, c->segments), (unsigned long long)c->extents,
           c->merged ? "" : " (to be merged)", loci_format_size(bytes, c->bytes),
           loci_format_size(disk, c->bytes_on_disk), (unsigned long long)c->revision, c->encoding,
           limit, c->kv, c->model_fingerprint, c->dense_layers, c->attn_temperature, c->attn_scale,
           created);
    if (c->merge_failure[0]) printf("note       not merged: %s\n", c->merge_failure);
    print_model_note(c);
}

/* Parses "NAME", connects. */
static loci_status open_named(loci_cli *cli, const loci_command *command,
                              const loci_option *options, size_t option_count, int argc,
                              char **argv, char id[LOCI_NAME_MAX + 1], char name[LOCI_RESOURCE_MAX],
                              loci_error *err) {
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t count = 0;
    loci_status status =
        loci_cli_parse(cli, command, options, option_count, argc, argv, args, &count, 1, 1, err);
    if (status == LOCI_OK && !cli->help) {
        status = loci_cli_corpus(cli, args[0], name, err);
        if (status == LOCI_OK) {
            snprintf(id, LOCI_NAME_MAX + 1, "%s", args[0]);
            status = loci_cli_connect(cli, err);
        }
    }
    free(args);
    return status;
}

/* What create and set have in common. */
typedef struct settings_flags {
    uint64_t dense_layers; /* UINT64_MAX: not given */
    double temperature, scale;
} settings_flags;

#define SETTINGS_OPTIONS 3
static const settings_flags no_settings = {.dense_layers = UINT64_MAX};

static void settings_options(settings_flags *flags, loci_option options[SETTINGS_OPTIONS]) {
    options[0] = (loci_option){"dense-layers",
                               0,
                               LOCI_OPTION_U64,
                               &flags->dense_layers,
                               0,
                               65536,
                               "N",
                               "so many first layers always read everything"};
    options[1] = (loci_option){"attn-temperature",
                               0,
                               LOCI_OPTION_DOUBLE,
                               &flags->temperature,
                               0.05,
                               20,
                               "T",
                               "divides the logits of the corpus's tokens (1)"};
    options[2] = (loci_option){"attn-scale",
                               0,
                               LOCI_OPTION_DOUBLE,
                               &flags->scale,
                               0.05,
                               2,
                               "S",
                               "multiplies their log-sum-exp (1)"};
}

static void fill_settings(const settings_flags *flags, Loci__V1__CorpusSettings *out) {
    loci__v1__corpus_settings__init(out);
    if (flags->dense_layers != UINT64_MAX) {
        out->dense_case = LOCI__V1__CORPUS_SETTINGS__DENSE_DENSE_LAYERS;
        out->dense_layers = (uint32_t)flags->dense_layers;
    }
    out->attn_temperature = flags->temperature;
    out->attn_scale = flags->scale;
}

static loci_status run_create(loci_cli *cli, const loci_command *command, int argc, char **argv,
                              loci_error *err) {
    char id[LOCI_NAME_MAX + 1], name[LOCI_RESOURCE_MAX];
    const char *encoding = NULL, *kv = NULL;
    bool beyond = false;
    settings_flags flags = no_settings;
    loci_option options[SETTINGS_OPTIONS + 3] = {
        {"encoding", 0, LOCI_OPTION_STRING, &encoding, 0, 0, "ENCODING",
         "independent or causal (default: what suits the model)"},
        {"beyond-trained-length", 0, LOCI_OPTION_FLAG, &beyond, 0, 0, NULL,
         "causal: may be longer than what the model was trained on"},
        {"kv", 0, LOCI_OPTION_STRING, &kv, 0, 0, "TYPE",
         "keep keys and values as bf16 (default) or int8, half the size"},
    };
    settings_options(&flags, options + 3);
    LOCI_TRY(open_named(cli, command, options, sizeof options / sizeof options[0], argc, argv, id,
                        name, err));
    if (cli->help) return LOCI_OK;
    Loci__V1__CreateCorpusRequest request = LOCI__V1__CREATE_CORPUS_REQUEST__INIT;
    request.parent = (char *)LOCI_PARENT;
    request.corpus_id = id;
    if (encoding) request.encoding = (char *)(uintptr_t)encoding;
    if (kv) request.kv = (char *)(uintptr_t)kv;
    request.beyond_trained_length = beyond;
    Loci__V1__CorpusSettings settings;
    fill_settings(&flags, &settings);
    request.settings = &settings;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.CorpusService/CreateCorpus", &request.base,
                           &loci__v1__corpus__descriptor, &response, err));
    if (cli->json)
        loci_print_json(corpus_json((Loci__V1__Corpus *)response));
    else
        printf("created corpus %s\n", id);
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

/* A call that is answered by a corpus, which is printed. */
static loci_status call_and_print(loci_cli *cli, const char *method, ProtobufCMessage *request,
                                  loci_error *err) {
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, method, request, &loci__v1__corpus__descriptor, &response, err));
    if (cli->json)
        loci_print_json(corpus_json((Loci__V1__Corpus *)response));
    else
        print_corpus((Loci__V1__Corpus *)response);
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

static loci_status run_show(loci_cli *cli, const loci_command *command, int argc, char **argv,
                            loci_error *err) {
    char id[LOCI_NAME_MAX + 1], name[LOCI_RESOURCE_MAX];
    LOCI_TRY(open_named(cli, command, NULL, 0, argc, argv, id, name, err));
    if (cli->help) return LOCI_OK;
    Loci__V1__GetCorpusRequest request = LOCI__V1__GET_CORPUS_REQUEST__INIT;
    request.name = name;
    return call_and_print(cli, "/loci.v1.CorpusService/GetCorpus", &request.base, err);
}

static loci_status run_set(loci_cli *cli, const loci_command *command, int argc, char **argv,
                           loci_error *err) {
    char id[LOCI_NAME_MAX + 1], name[LOCI_RESOURCE_MAX];
    settings_flags flags = no_settings;
    loci_option options[SETTINGS_OPTIONS];
    settings_options(&flags, options);
    LOCI_TRY(open_named(cli, command, options, SETTINGS_OPTIONS, argc, argv, id, name, err));
    if (cli->help) return LOCI_OK;
    if (flags.dense_layers == UINT64_MAX && flags.temperature == 0 && flags.scale == 0)
        return loci_cli_usage(cli, err, "corpus set: nothing to set; --help lists the settings");
    Loci__V1__UpdateCorpusRequest request = LOCI__V1__UPDATE_CORPUS_REQUEST__INIT;
    Loci__V1__CorpusSettings settings;
    fill_settings(&flags, &settings);
    request.name = name;
    request.settings = &settings;
    return call_and_print(cli, "/loci.v1.CorpusService/UpdateCorpus", &request.base, err);
}

static json_t *calibration_json(const char *id, const Loci__V1__CalibrateCorpusResponse *c) {
    json_t *rows = json_array();
    for (size_t i = 0; i < c->n_rows; i++) {
        const Loci__V1__CalibrateCorpusResponse__Row *row = c->rows[i];
        json_array_append_new(rows, json_pack("{s:o,s:o,s:f,s:f,s:f,s:b}", "attn_temperature",
                                              setting_json(row->attn_temperature), "attn_scale",
                                              setting_json(row->attn_scale), "loss", row->loss,
                                              "error", row->error, "agreement", row->agreement,
                                              "present", (int)row->present));
    }
    json_t *object =
        json_pack("{s:s,s:b,s:b,s:b,s:I,s:o}", "corpus", id, "comparable", (int)c->comparable,
                  "applied", (int)c->applied, "thresholds", (int)c->thresholds, "revision",
                  (json_int_t)c->revision, "rows", rows);
    if (!c->comparable) return object;
    json_t *more =
        json_pack("{s:s,s:i,s:I,s:I,s:f,s:f,s:f,s:i}", "encoding", c->encoding, "samples",
                  (int)c->samples, "tokens", (json_int_t)c->tokens, "context_tokens",
                  (json_int_t)c->context_tokens, "seconds", c->seconds, "causal_loss",
                  c->causal_loss, "alone_loss", c->alone_loss, "best", (int)c->best);
    json_object_update(object, more);
    json_decref(more);
    return object;
}

static void print_calibration(const char *id, const Loci__V1__CalibrateCorpusResponse *c) {
    if (!c->comparable) {
        printf("corpus %s: nothing to calibrate, the built-in model's corpora are never causal\n",
               id);
    } else {
        printf("corpus %s (%s): %u samples, %llu next tokens, each text behind %llu tokens of "
               "passages; %.1f s\n\n"
               "%-34s %8s %8s %10s\n"
               "%-34s %8.4f\n%-34s %8.4f\n",
               id, c->encoding, c->samples, (unsigned long long)c->tokens,
               (unsigned long long)c->context_tokens, c->seconds, "passages", "loss", "+-",
               "agreement", "read with the text (causal)", c->causal_loss, "none", c->alone_loss);
        for (size_t i = 0; i < c->n_rows; i++) {
            const Loci__V1__CalibrateCorpusResponse__Row *row = c->rows[i];
            char name[64];
            snprintf(name, sizeof name, "apart, temperature %g, scale %g%s", row->attn_temperature,
                     row->attn_scale, row->present ? " *" : "");
            printf("%-34s %8.4f %8.4f %9.1f%%%s\n", name, row->loss, row->error,
                   100 * row->agreement, i == c->best ? "  best" : "");
        }
        printf("\n* as the corpus has them%s; +-: standard error of the difference to the first "
               "line apart\n",
               c->applied ? " had them, now the best" : "");
    }
    if (c->thresholds)
        printf("thresholds of mode squeezed are there for revision %llu\n",
               (unsigned long long)c->revision);
}

static loci_status run_calibrate(loci_cli *cli, const loci_command *command, int argc, char **argv,
                                 loci_error *err) {
    char id[LOCI_NAME_MAX + 1], name[LOCI_RESOURCE_MAX];
    bool apply = false;
    const loci_option options[] = {{"apply", 0, LOCI_OPTION_FLAG, &apply, 0, 0, NULL,
                                    "set the temperature and scale of the least loss"}};
    LOCI_TRY(open_named(cli, command, options, 1, argc, argv, id, name, err));
    if (cli->help) return LOCI_OK;
    Loci__V1__CalibrateCorpusRequest request = LOCI__V1__CALIBRATE_CORPUS_REQUEST__INIT;
    request.name = name;
    request.apply = apply;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.CorpusService/CalibrateCorpus", &request.base,
                           &loci__v1__calibrate_corpus_response__descriptor, &response, err));
    if (cli->json)
        loci_print_json(calibration_json(id, (void *)response));
    else
        print_calibration(id, (void *)response);
    protobuf_c_message_free_unpacked(response, NULL);
    return LOCI_OK;
}

static loci_status run_delete(loci_cli *cli, const loci_command *command, int argc, char **argv,
                              loci_error *err) {
    char id[LOCI_NAME_MAX + 1], name[LOCI_RESOURCE_MAX];
    LOCI_TRY(open_named(cli, command, NULL, 0, argc, argv, id, name, err));
    if (cli->help) return LOCI_OK;
    Loci__V1__DeleteCorpusRequest request = LOCI__V1__DELETE_CORPUS_REQUEST__INIT;
    request.name = name;
    ProtobufCMessage *response = NULL;
    LOCI_TRY(loci_cli_call(cli, "/loci.v1.CorpusService/DeleteCorpus", &request.base,
                           &loci__v1__delete_corpus_response__descriptor, &response, err));
    protobuf_c_message_free_unpacked(response, NULL);
    if (cli->json)
        loci_print_json(json_pack("{s:s,s:b}", "corpus", id, "deleted", 1));
    else
        printf("deleted corpus %s\n", id);
    return LOCI_OK;
}

static void print_row(const Loci__V1__Corpus *c) {
    char documents[32], tokens[32], disk[32];
    const char *note = c->reindexing     ? "  reindexing"
                       : !c->other_model ? ""
                       : c->answers      ? "  old model: to be reindexed"
                                         : "  other model: to be reindexed";
    printf("%-32s %12s %16s %10s%s\n", corpus_id(c), loci_format_count(documents, c->documents),
           loci_format_count(tokens, c->tokens), loci_format_size(disk, c->bytes_on_disk), note);
}

/* One page; *token is replaced by the next page's (to be freed), NULL at the end. */
static loci_status list_page(loci_cli *cli, char **token, json_t *rows, loci_error *err) {
    Loci__V1__ListCorporaRequest request = LOCI__V1__LIST_CORPORA_REQUEST__INIT;
    request.parent = (char *)LOCI_PARENT;
    request.page_size = PAGE;
    if (*token) request.page_token = *token;
    ProtobufCMessage *response = NULL;
    loci_status status =
        loci_cli_call(cli, "/loci.v1.CorpusService/ListCorpora", &request.base,
                      &loci__v1__list_corpora_response__descriptor, &response, err);
    bool first = !*token;
    free(*token);
    *token = NULL;
    if (status != LOCI_OK) return status;
    if (first && !rows)
        printf("%-32s %12s %16s %10s\n", "CORPUS", "DOCUMENTS", "TOKENS", "ON DISK");
    const Loci__V1__ListCorporaResponse *page = (void *)response;
    for (size_t i = 0; i < page->n_corpora; i++) {
        if (rows)
            json_array_append_new(rows, corpus_json(page->corpora[i]));
        else
            print_row(page->corpora[i]);
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
    loci_status status = loci_cli_parse(cli, command, NULL, 0, argc, argv, args, &count, 0, 0, err);
    free(args);
    if (status != LOCI_OK || cli->help) return status;
    LOCI_TRY(loci_cli_connect(cli, err));
    json_t *rows = cli->json ? json_array() : NULL;
    char *token = NULL;
    do status = list_page(cli, &token, rows, err);
    while (status == LOCI_OK && token);
    if (rows && status == LOCI_OK)
        loci_print_json(json_pack("{s:o}", "corpora", rows));
    else
        json_decref(rows);
    return status;
}

const loci_command loci_corpus_commands[LOCI_CORPUS_COMMANDS] = {
    {"corpus create", "NAME", "make an empty corpus",
     "\nNAME: lower-case letters, digits, _ and -; at most 63; begins with a letter or digit.\n"
     "independent: segments are encoded each by itself; documents can be changed and deleted.\n"
     "causal: all documents are one text, encoded as a model reads it; they can only be added, "
     "and\n"
     "not more than the model was trained on. The default of stock models that can.\n",
     run_create},
    {"corpus list", "", "list the corpora", NULL, run_list},
    {"corpus show", "NAME", "show a corpus", NULL, run_show},
    {"corpus set", "NAME", "change how questions look at a corpus",
     "\nNothing that is stored depends on these settings; questions from then on have them.\n",
     run_set},
    {"corpus calibrate", "NAME", "compare independent with causal encoding",
     "\nReads passages of the corpus before the text that follows them, as one sequence and "
     "encoded\n"
     "apart under several temperatures and scales, for about a minute at most, and compares the\n"
     "losses of the next tokens. Also makes the thresholds of mode squeezed.\n",
     run_calibrate},
    {"corpus reindex", "NAME", "encode its documents anew with the daemon's model",
     "\nThe old index answers until the new one is complete (where locid has its model: "
     "--also-model),"
     "\nthen they are swapped; meanwhile the corpus takes no documents and loses none. Once the\n"
     "documents are copied, the work goes on when this command ends, and over restarts; the same\n"
     "command shows it again. Needed after a change of the model or of the index's layout.\n",
     loci_corpus_reindex_run},
    {"corpus delete", "NAME", "delete a corpus and all its documents", NULL, run_delete},
};
