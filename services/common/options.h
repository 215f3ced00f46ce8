/* SPDX-License-Identifier: Apache-2.0
 *
 * Command-line options from a table: --name VALUE, --name=VALUE, -x VALUE, flags, switches
 * (--name / --no-name), and the text of --help. "--" ends the options; options and arguments
 * may be mixed. Both programs parse with this; an unknown option is named.
 */
#ifndef LOCI_SERVICES_COMMON_OPTIONS_H
#define LOCI_SERVICES_COMMON_OPTIONS_H

#include <stdio.h>

#include "base/status.h"

#define LOCI_LIST_MAX 8

typedef enum loci_option_kind {
    LOCI_OPTION_FLAG,   /* bool */
    LOCI_OPTION_SWITCH, /* int: 1 for --name, 0 for --no-name */
    LOCI_OPTION_STRING, /* const char *, into argv */
    LOCI_OPTION_U64,    /* uint64_t in [min, max] */
    LOCI_OPTION_DOUBLE, /* double in [min, max] */
    LOCI_OPTION_LIST    /* loci_option_list: may be given up to LOCI_LIST_MAX times */
} loci_option_kind;

typedef struct loci_option_list {
    const char *items[LOCI_LIST_MAX];
    size_t count;
} loci_option_list;

typedef struct loci_option {
    const char *name; /* without dashes */
    char letter;      /* 0 = none */
    loci_option_kind kind;
    void *out;
    double min, max;
    const char *value; /* what --help calls it, for kinds with a value */
    const char *help;
} loci_option;

/* Parses argv[1..); arguments that are no options go to args[0..*arg_count) in order (args has
 * room for argc entries). LOCI_E_INVAL names the option at fault. */
LOCI_MUST_CHECK loci_status loci_options_parse(const loci_option *options, size_t count, int argc,
                                               char **argv, const char **args, size_t *arg_count,
                                               loci_error *err);
/* One paragraph a line, aligned. */
void loci_options_help(FILE *out, const loci_option *options, size_t count);

#endif
