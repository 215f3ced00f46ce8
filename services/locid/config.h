/* SPDX-License-Identifier: Apache-2.0
 *
 * Configuration of the daemon. Every setting has one row in a table (config.c) that gives its
 * key in the YAML file (section.key), its environment variable (LOCI_SECTION_KEY), its flag
 * and its rule. Precedence: flag > environment > file > default. All sources hand over text
 * to one setter, so that a bad value is refused with the same sentence wherever it stood.
 */
#ifndef LOCI_SERVICES_LOCID_CONFIG_H
#define LOCI_SERVICES_LOCID_CONFIG_H

#include <limits.h>

#include "base/log.h"
#include "base/status.h"
#include "services/common/options.h"

#define LOCI_CONFIG_TEXT_MAX 1024

typedef struct loci_config {
    char data[LOCI_CONFIG_TEXT_MAX];
    char model[LOCI_CONFIG_TEXT_MAX];      /* "" until resolved */
    char also_model[LOCI_CONFIG_TEXT_MAX]; /* "" = none */
    char listen[LOCI_LIST_MAX][LOCI_CONFIG_TEXT_MAX];
    size_t listen_count;
    char backend[64];
    char precision[16];
    uint64_t memory_bytes;    /* 0 = half of RAM */
    uint64_t threads;         /* 0 = one per usable CPU */
    uint64_t queries;         /* questions at a time */
    uint64_t lexical_percent; /* weight of words in ranking */
    uint64_t workers;         /* threads for calls */
    uint64_t drain_seconds;
    char log_level[16];
    bool log_json;
    bool insecure;
} loci_config;

/* What the command line asked for besides settings. */
typedef struct loci_config_request {
    bool check, print, version, help;
    uint64_t parent; /* end with this parent process; 0 = none */
} loci_config_request;

/* Reads flags, environment, and the file named by --config or LOCI_CONFIG. `environment` looks
 * a variable up (getenv in the daemon). *config is complete and checked on success, except that
 * with --help or --version nothing but *request is filled. */
LOCI_MUST_CHECK loci_status loci_config_load(int argc, char **argv,
                                             char *(*environment)(const char *name),
                                             loci_config *config, loci_config_request *request,
                                             loci_error *err);
/* The configuration as a YAML file that would give it. */
void loci_config_print(FILE *out, const loci_config *config);
void loci_config_help(FILE *out);

#endif
