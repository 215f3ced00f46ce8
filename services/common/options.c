/* SPDX-License-Identifier: Apache-2.0
 *
 * Command-line options; see options.h.
 */
#include "services/common/options.h"

#include <string.h>

#include "services/common/text.h"

static bool takes_value(const loci_option *option) {
    return option->kind != LOCI_OPTION_FLAG && option->kind != LOCI_OPTION_SWITCH;
}

/* name is not terminated: len bytes. *off is set for the --no- form of a switch. */
static const loci_option *find_long(const loci_option *options, size_t count, const char *name,
                                    size_t len, bool *off) {
    *off = false;
    for (size_t i = 0; i < count; i++) {
        const loci_option *o = &options[i];
        if (strlen(o->name) == len && memcmp(o->name, name, len) == 0) return o;
        if (o->kind == LOCI_OPTION_SWITCH && len > 3 && memcmp(name, "no-", 3) == 0 &&
            strlen(o->name) == len - 3 && memcmp(o->name, name + 3, len - 3) == 0) {
            *off = true;
            return o;
        }
    }
    return NULL;
}

static const loci_option *find_short(const loci_option *options, size_t count, char letter) {
    for (size_t i = 0; i < count; i++) {
        if (options[i].letter == letter) return &options[i];
    }
    return NULL;
}

static loci_status store_value(const loci_option *option, const char *value, loci_error *err) {
    switch (option->kind) {
    case LOCI_OPTION_STRING: *(const char **)option->out = value; return LOCI_OK;
    case LOCI_OPTION_U64:
        if (loci_parse_u64(value, (uint64_t)option->min, (uint64_t)option->max,
                           (uint64_t *)option->out))
            return LOCI_OK;
        return loci_fail(err, LOCI_E_INVAL,
                         "--%s \"%.80s\" is not a whole number from %.0f to %.0f", option->name,
                         value, option->min, option->max);
    case LOCI_OPTION_DOUBLE:
        if (loci_parse_double(value, option->min, option->max, (double *)option->out))
            return LOCI_OK;
        return loci_fail(err, LOCI_E_INVAL, "--%s \"%.80s\" is not a number from %g to %g",
                         option->name, value, option->min, option->max);
    case LOCI_OPTION_LIST: {
        loci_option_list *list = option->out;
        if (list->count == LOCI_LIST_MAX)
            return loci_fail(err, LOCI_E_INVAL, "--%s is given more than %d times", option->name,
                             LOCI_LIST_MAX);
        list->items[list->count++] = value;
        return LOCI_OK;
    }
    case LOCI_OPTION_FLAG:
    case LOCI_OPTION_SWITCH: break;
    }
    return LOCI_OK;
}

/* One option at argv[*at]; moves *at past a value that stands apart. */
static loci_status parse_one(const loci_option *options, size_t count, int argc, char **argv,
                             int *at, loci_error *err) {
    const char *text = argv[*at];
    const char *attached = NULL;
    const loci_option *option = NULL;
    bool off = false;
    if (text[1] == '-') {
        const char *equals = strchr(text, '=');
        size_t len = equals ? (size_t)(equals - text) - 2 : strlen(text) - 2;
        option = find_long(options, count, text + 2, len, &off);
        attached = equals ? equals + 1 : NULL;
    } else {
        option = find_short(options, count, text[1]);
        attached = text[2] != '\0' ? text + 2 : NULL;
    }
    if (!option) return loci_fail(err, LOCI_E_INVAL, "unknown option \"%.80s\"", text);
    if (!takes_value(option)) {
        if (attached) return loci_fail(err, LOCI_E_INVAL, "--%s takes no value", option->name);
        if (option->kind == LOCI_OPTION_FLAG) *(bool *)option->out = true;
        if (option->kind == LOCI_OPTION_SWITCH) *(int *)option->out = off ? 0 : 1;
        return LOCI_OK;
    }
    if (!attached) {
        if (*at + 1 >= argc)
            return loci_fail(err, LOCI_E_INVAL, "--%s needs a value (%s)", option->name,
                             option->value);
        attached = argv[++*at];
    }
    return store_value(option, attached, err);
}

loci_status loci_options_parse(const loci_option *options, size_t count, int argc, char **argv,
                               const char **args, size_t *arg_count, loci_error *err) {
    bool ended = false;
    *arg_count = 0;
    for (int at = 1; at < argc; at++) {
        const char *text = argv[at];
        if (ended || text[0] != '-' || text[1] == '\0') {
            args[(*arg_count)++] = text;
        } else if (strcmp(text, "--") == 0) {
            ended = true;
        } else {
            LOCI_TRY(parse_one(options, count, argc, argv, &at, err));
        }
    }
    return LOCI_OK;
}

void loci_options_help(FILE *out, const loci_option *options, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const loci_option *o = &options[i];
        char left[64];
        char letter[8] = "    ";
        if (o->letter) snprintf(letter, sizeof letter, "-%c, ", o->letter);
        if (takes_value(o))
            snprintf(left, sizeof left, "%s--%s %s", letter, o->name, o->value);
        else
            snprintf(left, sizeof left, "%s--%s%s", letter,
                     o->kind == LOCI_OPTION_SWITCH ? "[no-]" : "", o->name);
        fprintf(out, "  %-27s %s\n", left, o->help);
    }
}
