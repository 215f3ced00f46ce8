/* SPDX-License-Identifier: Apache-2.0
 *
 * Pre-tokenizers: reading them from tokenizer.json, their regexes, and the cursor over pieces.
 *
 * Regexes are written for Oniguruma with the Unicode tables of the reference implementation
 * (tokenizers 0.23: Unicode 16; its Digits step: Unicode 17) and run by PCRE2, whose tables may be
 * as old as Unicode 14 and whose \s also matches U+180E. They are translated: \s and \S become
 * White_Space, \p{L}, \p{N} and \p{M} get the ranges that were assigned since Unicode 14, and what
 * the two engines read differently is refused.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/pretokenize.h"

#include <ctype.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { MATCH_STEPS = 10000000 }; /* PCRE2's default limit */

struct loci_pretokenizer {
    pcre2_code *split[LOCI_SPLITS_MAX];
    size_t count;
    bool byte_level; /* seen ByteLevel, which must come last */
};

#define NUMBERS_16                                                    \
    "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}" \
    "\\x{11f50}-\\x{11f59}\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}" \
    "\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}\\x{1e4f0}-\\x{1e4f9}" \
    "\\x{1e5f1}-\\x{1e5fa}"
#define NUMBERS_17 NUMBERS_16 "\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}"

typedef struct property {
    const char *name;
    const char *newer; /* class ranges assigned after Unicode 14 */
} property;

static const property properties[] = {
    {"L", "\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}"
          "\\x{10d4a}-\\x{10d65}\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}"
          "\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}"
          "\\x{113d3}\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}"
          "\\x{1342f}\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}"
          "\\x{16d40}-\\x{16d6c}\\x{18cff}\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}"
          "\\x{1e030}-\\x{1e06d}\\x{1e4d0}-\\x{1e4eb}\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}"
          "\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"},
    {"N", NUMBERS_16},
    {"M", "\\x{897}\\x{cf3}\\x{ece}\\x{10d69}-\\x{10d6d}\\x{10efc}-\\x{10eff}\\x{11241}"
          "\\x{113b8}-\\x{113c0}\\x{113c2}\\x{113c5}\\x{113c7}-\\x{113ca}\\x{113cc}-\\x{113d0}"
          "\\x{113d2}\\x{113e1}-\\x{113e2}\\x{11f00}-\\x{11f01}\\x{11f03}\\x{11f34}-\\x{11f3a}"
          "\\x{11f3e}-\\x{11f42}\\x{11f5a}\\x{13440}\\x{13447}-\\x{13455}\\x{1611e}-\\x{1612f}"
          "\\x{1e08f}\\x{1e4ec}-\\x{1e4ef}\\x{1e5ee}-\\x{1e5ef}"},
};

/* The regex of a ByteLevel step with use_regex, from GPT-2. */
static const char byte_level_regex[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* --- Translation ---------------------------------------------------------------------- */

typedef struct translation {
    const char *at; /* what is left of the Oniguruma pattern */
    bool in_class;
    loci_buf out;
} translation;

/* \p{NAME} or \P{NAME}; at stands behind the p. */
static bool translate_property(translation *t, bool negative) {
    size_t len = t->at[0] == '{' ? strspn(t->at + 1, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                                     "abcdefghijklmnopqrstuvwxyz_")
                                 : 0;
    if (len == 0 || len > 64 || t->at[1 + len] != '}') return false;
    const char *name = t->at + 1, *newer = NULL;
    for (size_t i = 0; i < sizeof properties / sizeof properties[0]; i++)
        if (len == 1 && properties[i].name[0] == name[0]) newer = properties[i].newer;
    t->at += len + 2;
    if (newer && negative && t->in_class) return false;
    if (newer && !t->in_class)
        loci_buf_printf(&t->out, negative ? "[^\\p{%.*s}%s]" : "[\\p{%.*s}%s]", (int)len, name,
                        newer);
    else if (newer)
        loci_buf_printf(&t->out, "\\p{%.*s}%s", (int)len, name, newer);
    else
        loci_buf_printf(&t->out, negative ? "\\P{%.*s}" : "\\p{%.*s}", (int)len, name);
    return true;
}

/* at stands behind the backslash. */
static bool translate_escape(translation *t) {
    char c = *t->at;
    if (c == 0) return false;
    t->at++;
    switch (c) {
    case 'p': return translate_property(t, false);
    case 'P': return translate_property(t, true);
    case 's': loci_buf_append_text(&t->out, "\\p{White_Space}"); return true;
    case 'S': loci_buf_append_text(&t->out, "\\P{White_Space}"); return true;
    case 'r':
    case 'n':
    case 't': break;
    default:
        if (isalnum((unsigned char)c) || (unsigned char)c >= 0x80) return false;
    }
    loci_buf_printf(&t->out, "\\%c", c);
    return true;
}

/* The kinds of group that both engines read alike; at stands behind the "(". */
static bool known_group(const char *at) {
    static const char *const kinds[] = {"?:", "?i:", "?=", "?!", "?<=", "?<!", "?>"};
    if (*at != '?') return *at != '*';
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (strncmp(at, kinds[i], strlen(kinds[i])) == 0) return true;
    return false;
}

/* {n}, {n,} and {n,m}, not followed by + (possessive in PCRE2, a second repetition in Oniguruma);
 * at stands behind the "{". */
static bool known_repeat(const char *at) {
    size_t len = strspn(at, "0123456789");
    if (len == 0) return false;
    at += len;
    if (*at == ',') at += 1 + strspn(at + 1, "0123456789");
    return at[0] == '}' && at[1] != '+';
}

static bool translate_one(translation *t) {
    char c = *t->at++;
    if (c == '\\') return translate_escape(t);
    if (t->in_class) {
        if (c == '[' || (c == '&' && *t->at == '&')) return false;
        if (c == ']') t->in_class = false;
    } else {
        if (c == '^' || c == '$' || (c == '(' && !known_group(t->at)) ||
            (c == '{' && !known_repeat(t->at)))
            return false;
        if (c == '[') {
            t->in_class = true;
            const char *first = t->at + (*t->at == '^');
            if (*first == ']') return false;
        }
    }
    loci_buf_u8(&t->out, (uint8_t)c);
    return true;
}

static loci_status translate(const char *what, const char *pattern, loci_buf *out,
                             loci_error *err) {
    translation t = {.at = pattern, .out = LOCI_BUF_INIT};
    while (*t.at) {
        const char *from = t.at;
        if (translate_one(&t)) continue;
        loci_buf_fini(&t.out);
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: the regex of a pre-tokenizer is not supported from \"%.60s\" on",
                         what, from);
    }
    *out = t.out;
    return loci_buf_status(out);
}

/* --- Reading -------------------------------------------------------------------------- */

static loci_status add_split(loci_pretokenizer *p, const char *what, const char *pattern,
                             uint32_t options, loci_error *err) {
    if (p->count == LOCI_SPLITS_MAX)
        return loci_fail(err, LOCI_E_LIMIT, "%s: the pre-tokenizer has more than %d steps", what,
                         (int)LOCI_SPLITS_MAX);
    int code;
    PCRE2_SIZE offset;
    pcre2_code *split =
        pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options, &code, &offset, NULL);
    if (!split) {
        PCRE2_UCHAR text[128] = "";
        pcre2_get_error_message(code, text, sizeof text);
        return loci_fail(err, LOCI_E_INVAL, "%s: the regex of a pre-tokenizer is wrong: %s", what,
                         (const char *)text);
    }
    p->split[p->count++] = split;
    uint32_t empty = 0;
    pcre2_pattern_info(split, PCRE2_INFO_MATCHEMPTY, &empty);
    if (empty)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: the regex of a pre-tokenizer can match nothing", what);
    /* Where there is no JIT the interpreter does the same, slower. */
    (void)pcre2_jit_compile(split, PCRE2_JIT_COMPLETE);
    return LOCI_OK;
}

static loci_status add_regex(loci_pretokenizer *p, const char *what, const char *pattern,
                             loci_error *err) {
    loci_buf translated = LOCI_BUF_INIT;
    loci_status status = translate(what, pattern, &translated, err);
    if (status == LOCI_OK) {
        const char *text = loci_buf_text(&translated);
        status = text ? add_split(p, what, text, PCRE2_UTF | PCRE2_UCP, err)
                      : loci_fail(err, LOCI_E_NOMEM, "no memory for a regex of %s", what);
    }
    loci_buf_fini(&translated);
    return status;
}

static loci_status read_byte_level(loci_pretokenizer *p, const loci_json *in, loci_error *err) {
    bool prefix = true, regex = true;
    LOCI_TRY(loci_json_bool(in, "add_prefix_space", LOCI_JSON_OPTIONAL, &prefix, err));
    LOCI_TRY(loci_json_bool(in, "use_regex", LOCI_JSON_OPTIONAL, &regex, err));
    if (prefix)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: add_prefix_space true of ByteLevel is not supported", in->what);
    p->byte_level = true;
    return regex ? add_regex(p, in->what, byte_level_regex, err) : LOCI_OK;
}

static loci_status read_digits(loci_pretokenizer *p, const loci_json *in, loci_error *err) {
    bool individual = false;
    LOCI_TRY(loci_json_bool(in, "individual_digits", LOCI_JSON_OPTIONAL, &individual, err));
    return add_split(p, in->what, individual ? "[\\p{N}" NUMBERS_17 "]" : "[\\p{N}" NUMBERS_17 "]+",
                     PCRE2_UTF | PCRE2_UCP, err);
}

static loci_status read_split(loci_pretokenizer *p, const loci_json *in, loci_error *err) {
    const char *behavior = NULL, *regex = NULL, *literal = NULL;
    loci_json pattern = {in->what, NULL};
    LOCI_TRY(loci_json_string(in, "behavior", LOCI_JSON_REQUIRED, &behavior, err));
    LOCI_TRY(loci_json_object(in, "pattern", in->what, LOCI_JSON_REQUIRED, &pattern, err));
    LOCI_TRY(loci_json_string(&pattern, "Regex", LOCI_JSON_OPTIONAL, &regex, err));
    LOCI_TRY(loci_json_string(&pattern, "String", LOCI_JSON_OPTIONAL, &literal, err));
    /* "invert" swaps matches and the rest, which makes no difference where both are kept. */
    if (strcmp(behavior, "Isolated") != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: behavior %.40s of a Split pre-tokenizer is not supported", in->what,
                         behavior);
    if (regex) return add_regex(p, in->what, regex, err);
    if (literal && literal[0])
        return add_split(p, in->what, literal, PCRE2_UTF | PCRE2_LITERAL, err);
    return loci_fail(err, LOCI_E_INVAL, "%s: a Split pre-tokenizer has no pattern", in->what);
}

static loci_status read_step(loci_pretokenizer *p, const char *what, const json_t *value,
                             loci_error *err) {
    static const struct {
        const char *type;
        loci_status (*read)(loci_pretokenizer *, const loci_json *, loci_error *);
    } kinds[] = {{"ByteLevel", read_byte_level}, {"Digits", read_digits}, {"Split", read_split}};
    const loci_json in = {what, value};
    const char *type = NULL;
    if (!json_is_object(value))
        return loci_fail(err, LOCI_E_INVAL, "%s: a pre-tokenizer is not an object", what);
    LOCI_TRY(loci_json_string(&in, "type", LOCI_JSON_REQUIRED, &type, err));
    if (p->byte_level)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: pre-tokenizer %.40s follows ByteLevel", what,
                         type);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (strcmp(type, kinds[i].type) == 0) return kinds[i].read(p, &in, err);
    return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: pre-tokenizer %.40s is not supported", what,
                     type);
}

static loci_status read_steps(loci_pretokenizer *p, const loci_json *in, loci_error *err) {
    loci_json step = {in->what, NULL};
    LOCI_TRY(loci_json_object(in, "pre_tokenizer", in->what, LOCI_JSON_REQUIRED, &step, err));
    const json_t *list = loci_json_member(&step, "pretokenizers");
    const char *type = json_string_value(loci_json_member(&step, "type"));
    if (type && strcmp(type, "Sequence") == 0 && json_is_array(list)) {
        size_t i;
        const json_t *value;
        json_array_foreach(list, i, value) LOCI_TRY(read_step(p, in->what, value, err));
    } else {
        LOCI_TRY(read_step(p, in->what, step.object, err));
    }
    if (!p->byte_level)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: only byte-level tokenizers are supported, and no pre-tokenizer is "
                         "ByteLevel",
                         in->what);
    return LOCI_OK;
}

loci_status loci_pretokenizer_open(const loci_json *in, loci_pretokenizer **out, loci_error *err) {
    loci_pretokenizer *p = calloc(1, sizeof *p);
    if (!p) return loci_fail(err, LOCI_E_NOMEM, "no memory for the pre-tokenizer of %s", in->what);
    loci_status status = read_steps(p, in, err);
    if (status != LOCI_OK) {
        loci_pretokenizer_close(p);
        return status;
    }
    *out = p;
    return LOCI_OK;
}

void loci_pretokenizer_close(loci_pretokenizer *p) {
    if (!p) return;
    for (size_t i = 0; i < p->count; i++) pcre2_code_free(p->split[i]);
    free(p);
}

/* --- Cutting -------------------------------------------------------------------------- */

loci_status loci_pieces_init(loci_pieces *pieces, const loci_pretokenizer *pretokenizer,
                             loci_error *err) {
    *pieces = (loci_pieces){.pretokenizer = pretokenizer,
                            .match_data = pcre2_match_data_create(1, NULL),
                            .limits = pcre2_match_context_create(NULL)};
    if (pieces->match_data && pieces->limits) return LOCI_OK;
    loci_pieces_fini(pieces);
    return loci_fail(err, LOCI_E_NOMEM, "no memory to tokenize");
}

void loci_pieces_fini(loci_pieces *pieces) {
    pcre2_match_data_free(pieces->match_data);
    pcre2_match_context_free(pieces->limits);
    *pieces = (loci_pieces){0};
}

static loci_piece_level fresh_level(size_t begin, size_t end) {
    return (loci_piece_level){.begin = begin, .at = begin, .end = end};
}

void loci_pieces_start(loci_pieces *pieces, loci_slice text) {
    /* Room for a pass back over a long run, not for trying its parts in every way. */
    uint64_t steps = MATCH_STEPS + 16 * (uint64_t)text.len;
    pcre2_set_match_limit(pieces->limits, steps < UINT32_MAX ? (uint32_t)steps : UINT32_MAX);
    pieces->text = text.data;
    for (size_t i = 0; i <= LOCI_SPLITS_MAX; i++) pieces->level[i] = fresh_level(0, 0);
    pieces->level[0] = fresh_level(0, text.len);
}

/* Finds the next match at or behind at; the end of the piece stands for none. */
static loci_status find_match(loci_pieces *pieces, size_t depth, loci_error *err) {
    loci_piece_level *level = &pieces->level[depth];
    const pcre2_code *split = pieces->pretokenizer->split[depth];
    PCRE2_SPTR subject = pieces->text + level->begin;
    size_t len = level->end - level->begin, from = level->at - level->begin;
    int found = pcre2_match(split, subject, len, from, PCRE2_NO_UTF_CHECK, pieces->match_data,
                            pieces->limits);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter uses the heap */
        found = pcre2_match(split, subject, len, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                            pieces->match_data, pieces->limits);
    if (found == PCRE2_ERROR_NOMATCH) {
        level->match = level->match_end = level->end;
        return LOCI_OK;
    }
    if (found < 0)
        return loci_fail(
            err, found == PCRE2_ERROR_NOMEMORY ? LOCI_E_NOMEM : LOCI_E_LIMIT,
            "the tokenizer's regex gave up after byte %zu of the text (PCRE2 error %d)", level->at,
            found);
    const PCRE2_SIZE *span = pcre2_get_ovector_pointer(pieces->match_data);
    level->match = level->begin + span[0];
    level->match_end = level->begin + span[1];
    if (level->match_end <= level->match || level->match < level->at)
        return loci_fail(err, LOCI_E_INTERNAL, "the tokenizer's regex matched nothing");
    return LOCI_OK;
}

/* Takes the next match or the next run between matches off a level that has something left. */
static loci_status take(loci_pieces *pieces, size_t depth, loci_piece_level *out, loci_error *err) {
    loci_piece_level *level = &pieces->level[depth];
    if (level->match_end <= level->at) LOCI_TRY(find_match(pieces, depth, err));
    size_t end = level->match > level->at ? level->match : level->match_end;
    *out = fresh_level(level->at, end);
    level->at = end;
    return LOCI_OK;
}

loci_status loci_pieces_next(loci_pieces *pieces, loci_slice *piece, loci_error *err) {
    size_t count = pieces->pretokenizer->count, depth = count;
    loci_piece_level *level = pieces->level;
    /* The deepest level that still has something gives the next piece, which is then cut by the
     * steps below it. */
    while (depth > 0 && level[depth].at == level[depth].end) depth--;
    *piece = loci_slice_of(pieces->text, 0);
    if (level[depth].at == level[depth].end) return LOCI_OK;
    for (; depth < count; depth++) LOCI_TRY(take(pieces, depth, &level[depth + 1], err));
    *piece = loci_slice_of(pieces->text + level[count].at, level[count].end - level[count].at);
    level[count].at = level[count].end;
    return LOCI_OK;
}
