/* SPDX-License-Identifier: Apache-2.0
 *
 * Configuration; see config.h. The table `settings` is the single list of what can be set.
 */
#include "services/locid/config.h"

#include <cyaml/cyaml.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/model.h"
#include "services/common/text.h"
#include "services/engine/engine.h"

#define SETTINGS 16

typedef enum setting_kind { KIND_TEXT, KIND_LIST, KIND_SIZE, KIND_U64, KIND_BOOL } setting_kind;

typedef struct setting {
    const char *section; /* "" = top level */
    const char *key;
    const char *flag;
    setting_kind kind;
    size_t at, room; /* in loci_config */
    uint64_t min, max;
    const char *fallback; /* text of the default; NULL = none */
    const char *value;
    const char *help;
} setting;

#define AT(member) offsetof(loci_config, member), sizeof(((loci_config *)NULL)->member)

/* clang-format off */
static const setting settings[SETTINGS] = {
    {"", "data", "data", KIND_TEXT, AT(data), 0, 0, NULL, "DIR",
     "data directory, made if missing (required)"},
    {"", "model", "model", KIND_TEXT, AT(model), 0, 0, NULL, "DIR",
     "model folder (default: the built-in model)"},
    {"", "also_model", "also-model", KIND_TEXT, AT(also_model), 0, 0, NULL, "DIR",
     "model folder that only answers corpora encoded by it, until they are reindexed"},
    {"server", "listen", "listen", KIND_LIST, AT(listen), 0, 0, LOCI_DEFAULT_ADDRESS, "ADDR",
     "HOST:PORT, [V6]:PORT or unix:PATH; may be repeated (default " LOCI_DEFAULT_ADDRESS ")"},
    {"server", "insecure", "insecure", KIND_BOOL, AT(insecure), 0, 0, "false", NULL,
     "allow addresses that other machines can reach, without authentication"},
    {"server", "workers", "workers", KIND_U64, AT(workers), 1, 256, "8", "N",
     "threads that serve calls (default 8)"},
    {"server", "drain_seconds", "drain-seconds", KIND_U64, AT(drain_seconds), 0, 3600, "10", "N",
     "time for running calls at shutdown (default 10)"},
    {"engine", "backend", "backend", KIND_TEXT, AT(backend), 0, 0, "cpu", "NAME",
     "where numbers are crunched: cpu, or cuda in builds that have it (default cpu)"},
    {"engine", "precision", "precision", KIND_TEXT, AT(precision), 0, 0, "auto", "NAME",
     "auto, f32 or bf16 (default auto)"},
    {"engine", "memory", "memory", KIND_SIZE, AT(memory_bytes), 1u << 20, INT64_MAX, NULL,
     "BYTES", "memory budget, with suffix K, M or G (default: half of RAM)"},
    {"engine", "threads", "threads", KIND_U64, AT(threads), 0, 1024, "0", "N",
     "threads of the backend; 0 = one per usable CPU (default 0)"},
    {"engine", "queries", "queries", KIND_U64, AT(queries), 0, 64, "0", "N",
     "questions answered at the same time; 0 = 2, or 1 where memory is short (default 0)"},
    {"engine", "lexical", "lexical", KIND_U64, AT(lexical_percent), 0, 1000, "100", "PERCENT",
     "weight of the question's words in ranking, in percent of the usual; 0 = none (default 100)"},
    {"log", "level", "log-level", KIND_TEXT, AT(log_level), 0, 0, "info", "LEVEL",
     "debug, info, warn or error (default info)"},
    {"log", "json", "log-json", KIND_BOOL, AT(log_json), 0, 0, "false", NULL,
     "log lines as JSON objects"},
    {"", "config", "config", KIND_TEXT, 0, 0, 0, 0, NULL, "FILE",
     "YAML file with settings"},
};
/* clang-format on */
#define SETTING_LISTEN 3
#define SETTING_CONFIG (SETTINGS - 1) /* names the file itself: no member */

static void setting_name(const setting *s, char out[64]) {
    snprintf(out, 64, "%s%s%s", s->section, s->section[0] ? "." : "", s->key);
}

static loci_status bad_value(const setting *s, const char *origin, const char *text,
                             const char *rule, loci_error *err) {
    char name[64];
    setting_name(s, name);
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG", "%s: %s \"%.100s\" %s", origin,
                            name, text, rule);
}

static loci_status set_number(const setting *s, const char *text, const char *origin, uint64_t *out,
                              loci_error *err) {
    char rule[96];
    if (s->kind == KIND_SIZE) {
        if (!loci_parse_size(text, out))
            return bad_value(s, origin, text, "is not a size such as 512M or 4G", err);
        if (*out >= s->min) return LOCI_OK;
        char least[32];
        snprintf(rule, sizeof rule, "is less than %s", loci_format_size(least, s->min));
        return bad_value(s, origin, text, rule, err);
    }
    if (loci_parse_u64(text, s->min, s->max, out)) return LOCI_OK;
    snprintf(rule, sizeof rule, "is not a whole number from %llu to %llu",
             (unsigned long long)s->min, (unsigned long long)s->max);
    return bad_value(s, origin, text, rule, err);
}

/* Appends one address to a list; the caller emptied the list first. */
static loci_status add_item(loci_config *config, const setting *s, const char *text,
                            const char *origin, loci_error *err) {
    if (config->listen_count == LOCI_LIST_MAX)
        return bad_value(s, origin, text, "is one address too many (at most 8)", err);
    if (strlen(text) >= LOCI_CONFIG_TEXT_MAX) return bad_value(s, origin, text, "is too long", err);
    snprintf(config->listen[config->listen_count++], LOCI_CONFIG_TEXT_MAX, "%s", text);
    return LOCI_OK;
}

static loci_status set_value(loci_config *config, const setting *s, const char *text,
                             const char *origin, loci_error *err) {
    char *member = (char *)config + s->at;
    switch (s->kind) {
    case KIND_TEXT:
        if (text[0] == '\0') return bad_value(s, origin, text, "is empty", err);
        if (strlen(text) >= s->room) return bad_value(s, origin, text, "is too long", err);
        snprintf(member, s->room, "%s", text);
        return LOCI_OK;
    case KIND_LIST: return add_item(config, s, text, origin, err);
    case KIND_BOOL:
        if (loci_parse_bool(text, (bool *)member)) return LOCI_OK;
        return bad_value(s, origin, text, "is neither true nor false", err);
    case KIND_SIZE:
    case KIND_U64: {
        uint64_t number = 0;
        LOCI_TRY(set_number(s, text, origin, &number, err));
        memcpy(member, &number, sizeof number);
        return LOCI_OK;
    }
    }
    return LOCI_OK;
}

/* --- The file -------------------------------------------------------------------------- */
typedef struct file_server {
    char **listen;
    unsigned listen_count;
    char *insecure, *workers, *drain_seconds;
} file_server;
typedef struct file_engine {
    char *backend, *precision, *memory, *threads, *queries, *lexical;
} file_engine;
typedef struct file_log {
    char *level, *json;
} file_log;
typedef struct file_root {
    char *data, *model, *also_model;
    file_server *server;
    file_engine *engine;
    file_log *log;
} file_root;

#define TEXT_FIELD(type, key) \
    CYAML_FIELD_STRING_PTR(#key, CYAML_FLAG_OPTIONAL, type, key, 0, LOCI_CONFIG_TEXT_MAX)
#define SECTION_FIELD(key, fields) \
    CYAML_FIELD_MAPPING_PTR(#key, CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL, file_root, key, fields)

static const cyaml_schema_value_t listen_entry = {
    CYAML_VALUE_STRING(CYAML_FLAG_POINTER, char, 0, LOCI_CONFIG_TEXT_MAX)};
static const cyaml_schema_field_t server_fields[] = {
    CYAML_FIELD_SEQUENCE("listen", CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL, file_server, listen,
                         &listen_entry, 1, LOCI_LIST_MAX),
    TEXT_FIELD(file_server, insecure), TEXT_FIELD(file_server, workers),
    TEXT_FIELD(file_server, drain_seconds), CYAML_FIELD_END};
static const cyaml_schema_field_t engine_fields[] = {TEXT_FIELD(file_engine, backend),
                                                     TEXT_FIELD(file_engine, precision),
                                                     TEXT_FIELD(file_engine, memory),
                                                     TEXT_FIELD(file_engine, threads),
                                                     TEXT_FIELD(file_engine, queries),
                                                     TEXT_FIELD(file_engine, lexical),
                                                     CYAML_FIELD_END};
static const cyaml_schema_field_t log_fields[] = {TEXT_FIELD(file_log, level),
                                                  TEXT_FIELD(file_log, json), CYAML_FIELD_END};
static const cyaml_schema_field_t root_fields[] = {TEXT_FIELD(file_root, data),
                                                   TEXT_FIELD(file_root, model),
                                                   TEXT_FIELD(file_root, also_model),
                                                   SECTION_FIELD(server, server_fields),
                                                   SECTION_FIELD(engine, engine_fields),
                                                   SECTION_FIELD(log, log_fields),
                                                   CYAML_FIELD_END};
static const cyaml_schema_value_t root_schema = {
    CYAML_VALUE_MAPPING(CYAML_FLAG_POINTER, file_root, root_fields)};

/* Keeps the first complaint ("Load: Unexpected key: spelling") and, from the backtrace that
 * follows, the first place ("in mapping field 'server' (line: 3, column: 5)"). */
typedef struct yaml_complaint {
    char what[160], where[160];
} yaml_complaint;

static void remember_complaint(cyaml_log_t level, void *ctx, const char *format, va_list args) {
    (void)level;
    yaml_complaint *complaint = ctx;
    char line[160];
    vsnprintf(line, sizeof line, format, args);
    line[strcspn(line, "\n")] = '\0';
    const char *text = strncmp(line, "Load: ", 6) == 0 ? line + 6 : line;
    while (*text == ' ') text++;
    if (complaint->what[0] == '\0')
        snprintf(complaint->what, sizeof complaint->what, "%s", text);
    else if (complaint->where[0] == '\0' && strstr(text, "line:"))
        snprintf(complaint->where, sizeof complaint->where, "%s", text);
}

/* The text of a scalar setting (index into `settings`) in the file, NULL when absent. */
static const char *file_text(const file_root *root, size_t index) {
    const file_server *server = root->server;
    const file_engine *engine = root->engine;
    const file_log *log = root->log;
    switch (index) {
    case 0: return root->data;
    case 1: return root->model;
    case 2: return root->also_model;
    case 4: return server ? server->insecure : NULL;
    case 5: return server ? server->workers : NULL;
    case 6: return server ? server->drain_seconds : NULL;
    case 7: return engine ? engine->backend : NULL;
    case 8: return engine ? engine->precision : NULL;
    case 9: return engine ? engine->memory : NULL;
    case 10: return engine ? engine->threads : NULL;
    case 11: return engine ? engine->queries : NULL;
    case 12: return engine ? engine->lexical : NULL;
    case 13: return log ? log->level : NULL;
    case 14: return log ? log->json : NULL;
    default: return NULL;
    }
}

static loci_status load_file(const char *path, loci_config *config, loci_error *err) {
    yaml_complaint complaint = {"", ""};
    const cyaml_config_t yaml = {.log_fn = remember_complaint,
                                 .log_ctx = &complaint,
                                 .mem_fn = cyaml_mem,
                                 .log_level = CYAML_LOG_ERROR};
    file_root *root = NULL;
    if (access(path, R_OK) != 0)
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "configuration file %s cannot be read: %s", path, strerror(errno));
    cyaml_err_t result = cyaml_load_file(path, &yaml, &root_schema, (cyaml_data_t **)&root, NULL);
    if (result != CYAML_OK)
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "configuration file %s: %s%s%s", path,
                                complaint.what[0] ? complaint.what : cyaml_strerror(result),
                                complaint.where[0] ? ", " : "", complaint.where);
    loci_status status = LOCI_OK;
    for (size_t i = 0; root && i < SETTING_CONFIG && status == LOCI_OK; i++) {
        const char *text = file_text(root, i);
        if (text) status = set_value(config, &settings[i], text, path, err);
    }
    if (status == LOCI_OK && root && root->server && root->server->listen_count > 0) {
        config->listen_count = 0;
        for (unsigned i = 0; i < root->server->listen_count && status == LOCI_OK; i++)
            status =
                add_item(config, &settings[SETTING_LISTEN], root->server->listen[i], path, err);
    }
    cyaml_free(&yaml, &root_schema, root, 0);
    return status;
}

/* --- Environment, flags, and the whole -------------------------------------------------- */
static void environment_name(const setting *s, char out[64]) {
    snprintf(out, 64, "LOCI_%s%s%s", s->section, s->section[0] ? "_" : "", s->key);
    for (char *c = out; *c; c++) {
        if (*c >= 'a' && *c <= 'z') *c = (char)(*c - 'a' + 'A');
    }
}

/* Lists stand in one variable, separated by commas. */
static loci_status load_environment(char *(*environment)(const char *name), loci_config *config,
                                    loci_error *err) {
    for (size_t i = 0; i < SETTING_CONFIG; i++) {
        char name[64];
        environment_name(&settings[i], name);
        const char *text = environment(name);
        if (!text || text[0] == '\0') continue;
        if (settings[i].kind != KIND_LIST) {
            LOCI_TRY(set_value(config, &settings[i], text, name, err));
            continue;
        }
        config->listen_count = 0;
        while (*text) {
            char item[LOCI_CONFIG_TEXT_MAX];
            size_t len = strcspn(text, ",");
            snprintf(item, sizeof item, "%.*s", (int)len, text);
            LOCI_TRY(add_item(config, &settings[i], item, name, err));
            text += len + (text[len] == ',');
        }
    }
    return LOCI_OK;
}

typedef struct flag_values {
    const char *text[SETTINGS];
    bool flag[SETTINGS];
    loci_option_list list;
} flag_values;

#define EXTRA_OPTIONS 5
static size_t make_options(flag_values *values, loci_config_request *request,
                           loci_option out[SETTINGS + EXTRA_OPTIONS]) {
    size_t n = 0;
    for (size_t i = 0; i < SETTINGS; i++) {
        const setting *s = &settings[i];
        loci_option o = {.name = s->flag, .value = s->value, .help = s->help};
        o.kind = s->kind == KIND_BOOL   ? LOCI_OPTION_FLAG
                 : s->kind == KIND_LIST ? LOCI_OPTION_LIST
                                        : LOCI_OPTION_STRING;
        o.out = s->kind == KIND_BOOL   ? (void *)&values->flag[i]
                : s->kind == KIND_LIST ? (void *)&values->list
                                       : (void *)&values->text[i];
        out[n++] = o;
    }
    const loci_option extra[EXTRA_OPTIONS] = {
        {"check-config", 0, LOCI_OPTION_FLAG, &request->check, 0, 0, NULL,
         "check the configuration and end"},
        {"print-config", 0, LOCI_OPTION_FLAG, &request->print, 0, 0, NULL,
         "print the configuration as YAML and end"},
        {"parent", 0, LOCI_OPTION_U64, &request->parent, 0, INT_MAX, "PID",
         "end when this parent process ends"},
        {"version", 0, LOCI_OPTION_FLAG, &request->version, 0, 0, NULL, "print the version"},
        {"help", 'h', LOCI_OPTION_FLAG, &request->help, 0, 0, NULL, "print this"},
    };
    for (size_t i = 0; i < EXTRA_OPTIONS; i++) out[n++] = extra[i];
    return n;
}

static loci_status apply_flags(const flag_values *values, loci_config *config, loci_error *err) {
    for (size_t i = 0; i < SETTING_CONFIG; i++) {
        char origin[64];
        snprintf(origin, sizeof origin, "--%s", settings[i].flag);
        const char *text = values->flag[i] ? "true" : values->text[i];
        if (text) LOCI_TRY(set_value(config, &settings[i], text, origin, err));
    }
    if (values->list.count > 0) config->listen_count = 0;
    for (size_t i = 0; i < values->list.count; i++)
        LOCI_TRY(
            add_item(config, &settings[SETTING_LISTEN], values->list.items[i], "--listen", err));
    return LOCI_OK;
}

/* The built-in model: beside an installed binary (PREFIX/bin/locid), else in the source tree. */
static void resolve_model(loci_config *config) {
    if (config->model[0] != '\0') return;
    char binary[512];
    ssize_t len = readlink("/proc/self/exe", binary, sizeof binary - 1);
    binary[len > 0 ? len : 0] = '\0';
    char *slash = strrchr(binary, '/');
    if (slash) {
        *slash = '\0';
        struct stat info;
        snprintf(config->model, sizeof config->model, "%s/../share/loci/model/default", binary);
        if (stat(config->model, &info) == 0) return;
    }
    snprintf(config->model, sizeof config->model, "%s", LOCI_SOURCE_MODEL);
}

static loci_status check_folder(const char *model, bool thoroughly, loci_error *err) {
    char path[LOCI_CONFIG_TEXT_MAX + 16];
    snprintf(path, sizeof path, "%s/config.json", model);
    if (access(path, R_OK) != 0) {
        int why = errno;
        loci_status status = loci_model_check_folder(model, err);
        if (status == LOCI_E_UNSUPPORTED) return status;
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "model folder %.200s has no readable config.json: %s", model,
                                strerror(why));
    }
    return thoroughly ? loci_engine_check_model(model, err) : LOCI_OK;
}

/* thoroughly: also what the start finds out, as far as it takes a moment only. */
static loci_status check(const loci_config *config, bool thoroughly, loci_error *err) {
    loci_log_level level;
    if (config->data[0] == '\0')
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "no data directory: give --data DIR, LOCI_DATA, or data: in the "
                                "configuration file");
    if (!loci_log_level_parse(config->log_level, &level))
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "log.level \"%s\" is none of debug, info, warn, error",
                                config->log_level);
    if (strcmp(config->precision, "auto") != 0 && strcmp(config->precision, "f32") != 0 &&
        strcmp(config->precision, "bf16") != 0)
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CONFIG",
                                "engine.precision \"%s\" is none of auto, f32, bf16",
                                config->precision);
    for (size_t i = 0; i < config->listen_count; i++) {
        bool local = false;
        LOCI_TRY(loci_address_check(config->listen[i], &local, err));
        if (!local && !config->insecure)
            return loci_fail_reason(err, LOCI_E_INVAL, "INSECURE_ADDRESS",
                                    "address %s can be reached from other machines and there is "
                                    "no authentication yet; use a loopback or unix: address, or "
                                    "allow it with --insecure",
                                    config->listen[i]);
    }
    LOCI_TRY(check_folder(config->model, thoroughly, err));
    return config->also_model[0] ? check_folder(config->also_model, thoroughly, err) : LOCI_OK;
}

loci_status loci_config_load(int argc, char **argv, char *(*environment)(const char *name),
                             loci_config *config, loci_config_request *request, loci_error *err) {
    memset(config, 0, sizeof *config);
    memset(request, 0, sizeof *request);
    flag_values values = {{NULL}, {false}, {{NULL}, 0}};
    loci_option options[SETTINGS + EXTRA_OPTIONS];
    size_t count = make_options(&values, request, options);
    const char **args = calloc((size_t)argc, sizeof *args);
    if (!args) return loci_fail(err, LOCI_E_NOMEM, "no memory for the command line");
    size_t arg_count = 0;
    loci_status status = loci_options_parse(options, count, argc, argv, args, &arg_count, err);
    if (status == LOCI_OK && arg_count > 0)
        status = loci_fail(err, LOCI_E_INVAL, "unexpected argument \"%.100s\"", args[0]);
    free(args);
    if (status != LOCI_OK || request->help || request->version) return status;

    for (size_t i = 0; i < SETTING_CONFIG; i++) {
        if (settings[i].fallback)
            LOCI_TRY(set_value(config, &settings[i], settings[i].fallback, "default", err));
    }
    const char *file = values.text[SETTING_CONFIG];
    if (!file) file = environment("LOCI_CONFIG");
    if (file && file[0] != '\0') LOCI_TRY(load_file(file, config, err));
    LOCI_TRY(load_environment(environment, config, err));
    LOCI_TRY(apply_flags(&values, config, err));
    resolve_model(config);
    return check(config, request->check, err);
}

/* Single-quoted YAML: the only escape is a doubled quote. */
static void print_text(FILE *out, const char *text) {
    fputc('\'', out);
    for (; *text; text++) {
        if (*text == '\'') fputc('\'', out);
        fputc(*text, out);
    }
    fputc('\'', out);
}

static void print_value(FILE *out, const loci_config *config, const setting *s) {
    const char *member = (const char *)config + s->at;
    uint64_t number = 0;
    switch (s->kind) {
    case KIND_TEXT: print_text(out, member); break;
    case KIND_BOOL: fputs(*(const bool *)member ? "true" : "false", out); break;
    case KIND_SIZE:
    case KIND_U64:
        memcpy(&number, member, sizeof number);
        fprintf(out, "%llu", (unsigned long long)number);
        break;
    case KIND_LIST:
        fputc('[', out);
        for (size_t i = 0; i < config->listen_count; i++) {
            if (i > 0) fputs(", ", out);
            print_text(out, config->listen[i]);
        }
        fputc(']', out);
        break;
    }
}

void loci_config_print(FILE *out, const loci_config *config) {
    const char *section = "";
    for (size_t i = 0; i < SETTING_CONFIG; i++) {
        const setting *s = &settings[i];
        if (strcmp(section, s->section) != 0) fprintf(out, "%s:\n", s->section);
        section = s->section;
        fprintf(out, "%s", section[0] ? "  " : "");
        if (s->kind == KIND_TEXT && ((const char *)config + s->at)[0] == '\0') {
            fprintf(out, "# %s: none\n", s->key);
            continue;
        }
        if (s->kind == KIND_SIZE && config->memory_bytes == 0) {
            fprintf(out, "# %s: half of RAM\n", s->key);
            continue;
        }
        fprintf(out, "%s: ", s->key);
        print_value(out, config, s);
        fputc('\n', out);
    }
}

void loci_config_help(FILE *out) {
    flag_values values = {{NULL}, {false}, {{NULL}, 0}};
    loci_config_request request;
    loci_option options[SETTINGS + EXTRA_OPTIONS];
    size_t count = make_options(&values, &request, options);
    fputs("usage: locid --data DIR [options]\n\n"
          "The Loci daemon: registers documents and answers questions over gRPC.\n\n",
          out);
    loci_options_help(out, options, count);
    fputs("\nEvery setting can also stand in the environment (LOCI_DATA, LOCI_SERVER_LISTEN, ...)\n"
          "and in the YAML file; --print-config shows the keys. Flags win over the environment,\n"
          "the environment over the file.\n",
          out);
}
