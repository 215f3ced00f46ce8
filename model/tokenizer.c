/* SPDX-License-Identifier: Apache-2.0
 *
 * Tokenizer: tokenizer.json as a whole, added tokens, and the way from bytes to ids and back.
 *
 * Text is cut four times, each cut inside the pieces of the one before: at added tokens (if asked
 * for), at bytes that are not UTF-8, by the pre-tokenizer (pretokenize.c), by merges (bpe.c). A
 * normalizer runs between the first cut at added tokens and the second, that at added tokens which
 * are marked "normalized".
 * All state of a call lives in one `encoding` on the caller's stack.
 */
#include "model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "model/bpe.h"
#include "model/json.h"
#include "model/nfc.h"
#include "model/pretokenize.h"

#define NONE UINT32_MAX

/* Llama 3's tokenizer.json has 9 MB; ADDED_BYTES_MAX bounds the trie of added tokens. */
enum { FILE_BYTES_MAX = 64 << 20, ADDED_BYTES_MAX = 1 << 22 };

/* Added tokens of one kind as a trie: a node's children are a linked list. Node 0 is the root,
 * whose children are also in first[]. */
typedef struct trie_node {
    uint32_t child, sibling; /* 0 = none */
    uint32_t id;             /* of the token that ends here, or NONE */
    uint8_t byte;
} trie_node;

typedef struct trie {
    trie_node *nodes;
    uint32_t count, capacity;
    uint32_t first[256];
} trie;

typedef struct added_token {
    char *content;
    size_t len;
    uint32_t id;
    bool special;
} added_token;

struct loci_tokenizer {
    loci_bpe *bpe;
    loci_pretokenizer *pretokenizer;
    added_token *added; /* sorted by id */
    size_t added_count;
    trie tries[2]; /* [0]: matched first; [1]: those marked "normalized", matched in the rest */
    uint32_t limit;
    uint32_t bos;
    bool normalizes;
};

typedef struct encoding {
    const loci_tokenizer *tokenizer;
    loci_slice text; /* normalized, inside encode_normalized */
    bool special;
    loci_nfc nfc;
    loci_tokens *out;
    loci_error *err;
    loci_pieces pieces;
    loci_bpe_scratch scratch;
} encoding;

/* --- Token lists ---------------------------------------------------------------------- */

void loci_tokens_fini(loci_tokens *tokens) {
    free(tokens->ids);
    free(tokens->ends);
    *tokens = (loci_tokens){0};
}

loci_status loci_tokens_push(loci_tokens *tokens, uint32_t id, uint32_t end) {
    if (tokens->count == tokens->capacity) {
        size_t capacity = tokens->capacity ? tokens->capacity * 2 : 64;
        uint32_t *ids = realloc(tokens->ids, capacity * sizeof *ids);
        if (!ids) return LOCI_E_NOMEM;
        tokens->ids = ids;
        uint32_t *ends = realloc(tokens->ends, capacity * sizeof *ends);
        if (!ends) return LOCI_E_NOMEM;
        tokens->ends = ends;
        tokens->capacity = capacity;
    }
    tokens->ids[tokens->count] = id;
    tokens->ends[tokens->count++] = end;
    return LOCI_OK;
}

/* --- Added tokens --------------------------------------------------------------------- */

static uint32_t trie_child(const trie *t, uint32_t node, uint8_t byte) {
    if (node == 0) return t->first[byte];
    uint32_t child = t->nodes[node].child;
    while (child && t->nodes[child].byte != byte) child = t->nodes[child].sibling;
    return child;
}

static uint32_t trie_add_child(trie *t, uint32_t node, uint8_t byte) {
    uint32_t added = t->count++;
    t->nodes[added] = (trie_node){.sibling = t->nodes[node].child, .id = NONE, .byte = byte};
    t->nodes[node].child = added;
    if (node == 0) t->first[byte] = added;
    return added;
}

static loci_status trie_add(trie *t, const added_token *token, loci_error *err) {
    if (t->count + token->len + 1 > t->capacity) {
        size_t capacity = 2 * (t->count + token->len + 1);
        trie_node *nodes = realloc(t->nodes, capacity * sizeof *nodes);
        if (!nodes) return loci_fail(err, LOCI_E_NOMEM, "no memory for a tokenizer");
        t->nodes = nodes;
        t->capacity = (uint32_t)capacity;
    }
    if (t->count == 0) t->nodes[t->count++] = (trie_node){.id = NONE};
    uint32_t node = 0;
    for (size_t i = 0; i < token->len; i++) {
        uint8_t byte = (uint8_t)token->content[i];
        uint32_t child = trie_child(t, node, byte);
        node = child ? child : trie_add_child(t, node, byte);
    }
    t->nodes[node].id = token->id;
    return LOCI_OK;
}

/* The longest added token that begins at data; its length, or 0. */
static size_t trie_match(const trie *t, const uint8_t *data, size_t len, uint32_t *id) {
    size_t longest = 0;
    uint32_t node = 0;
    for (size_t i = 0; i < len; i++) {
        node = trie_child(t, node, data[i]);
        if (node == 0) break;
        if (t->nodes[node].id == NONE) continue;
        *id = t->nodes[node].id;
        longest = i + 1;
    }
    return longest;
}

/* The first added token in [begin, end): its place and length; length 0 at end when there is none.
 */
static size_t find_added(const trie *t, const uint8_t *text, size_t begin, size_t end, size_t *len,
                         uint32_t *id) {
    *len = 0;
    if (t->count == 0) return end;
    for (size_t at = begin; at < end; at++) {
        if (!t->first[text[at]]) continue;
        *len = trie_match(t, text + at, end - at, id);
        if (*len) return at;
    }
    return end;
}

static const added_token *added_by_id(const loci_tokenizer *tokenizer, uint32_t id) {
    size_t low = 0, high = tokenizer->added_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (tokenizer->added[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    bool found = low < tokenizer->added_count && tokenizer->added[low].id == id;
    return found ? &tokenizer->added[low] : NULL;
}

/* --- Encoding ------------------------------------------------------------------------- */

static loci_status push(encoding *e, uint32_t id, size_t end) {
    loci_status status = loci_tokens_push(e->out, id, (uint32_t)end);
    return status == LOCI_OK ? status
                             : loci_fail(e->err, status, "no memory for the tokens of a text");
}

/* The first byte at or behind begin that is not UTF-8. */
static size_t utf8_end(const uint8_t *text, size_t begin, size_t end) {
    for (size_t len; begin < end; begin += len) {
        len = loci_utf8_length(text + begin, end - begin);
        if (len == 0) break;
    }
    return begin;
}

static loci_status encode_valid(encoding *e, size_t begin, size_t end) {
    loci_slice piece;
    loci_pieces_start(&e->pieces, loci_slice_of(e->text.data + begin, end - begin));
    for (;;) {
        LOCI_TRY(loci_pieces_next(&e->pieces, &piece, e->err));
        if (piece.len == 0) return LOCI_OK;
        LOCI_TRY(loci_bpe_encode(e->tokenizer->bpe, &e->scratch, piece,
                                 (uint32_t)(piece.data - e->text.data), e->out, e->err));
    }
}

/* Text between added tokens. */
static loci_status encode_plain(encoding *e, size_t begin, size_t end) {
    while (begin < end) {
        size_t valid = utf8_end(e->text.data, begin, end);
        if (valid > begin) LOCI_TRY(encode_valid(e, begin, valid));
        begin = valid;
        if (begin == end) break;
        begin++;
        LOCI_TRY(push(e, loci_bpe_byte(e->tokenizer->bpe, e->text.data[begin - 1]), begin));
    }
    return LOCI_OK;
}

typedef loci_status (*encode_fn)(encoding *, size_t begin, size_t end);

static loci_status encode_around(encoding *e, const trie *t, size_t begin, size_t end,
                                 encode_fn encode_rest) {
    while (begin < end) {
        size_t len;
        uint32_t id = NONE;
        size_t at = find_added(t, e->text.data, begin, end, &len, &id);
        if (at > begin) LOCI_TRY(encode_rest(e, begin, at));
        if (len > 0) LOCI_TRY(push(e, id, at + len));
        begin = at + len;
    }
    return LOCI_OK;
}

/* Text in which added tokens marked "normalized" are still to be found. */
static loci_status encode_found(encoding *e, size_t begin, size_t end) {
    if (!e->special) return encode_plain(e, begin, end);
    return encode_around(e, &e->tokenizer->tries[1], begin, end, encode_plain);
}

/* Text between the added tokens that are matched before the normalizer runs. */
static loci_status encode_normalized(encoding *e, size_t begin, size_t end) {
    if (!e->tokenizer->normalizes) return encode_found(e, begin, end);
    bool changed;
    LOCI_TRY(
        loci_nfc_run(&e->nfc, loci_slice_of(e->text.data + begin, end - begin), &changed, e->err));
    if (!changed) return encode_found(e, begin, end);
    loci_slice text = e->text;
    size_t first = e->out->count;
    e->text = loci_slice_of(e->nfc.text.data, e->nfc.text.len);
    loci_status status = encode_found(e, 0, e->text.len);
    e->text = text;
    if (status != LOCI_OK) return status;
    loci_nfc_origins(&e->nfc, e->out->ends + first, e->out->count - first);
    for (size_t i = first; i < e->out->count; i++) e->out->ends[i] += (uint32_t)begin;
    return LOCI_OK;
}

loci_status loci_tokenizer_encode(const loci_tokenizer *tokenizer, loci_slice text, bool special,
                                  loci_tokens *out, loci_error *err) {
    if (text.len > (size_t)1 << 31)
        return loci_fail(err, LOCI_E_LIMIT, "a text of %zu bytes is too long to tokenize",
                         text.len);
    encoding e = {.tokenizer = tokenizer, .text = text, .special = special, .out = out, .err = err};
    LOCI_TRY(loci_pieces_init(&e.pieces, tokenizer->pretokenizer, err));
    size_t before = out->count;
    loci_status status =
        special ? encode_around(&e, &tokenizer->tries[0], 0, text.len, encode_normalized)
                : encode_normalized(&e, 0, text.len);
    if (status != LOCI_OK) out->count = before;
    loci_bpe_scratch_fini(&e.scratch);
    loci_pieces_fini(&e.pieces);
    loci_nfc_fini(&e.nfc);
    return status;
}

loci_status loci_tokenizer_decode(const loci_tokenizer *tokenizer, const uint32_t *ids,
                                  size_t count, bool keep_special, loci_buf *out) {
    for (size_t i = 0; i < count; i++) {
        const added_token *added = added_by_id(tokenizer, ids[i]);
        loci_slice bytes;
        if (added && (!added->special || keep_special))
            loci_buf_append(out, added->content, added->len);
        else if (!added && loci_bpe_token(tokenizer->bpe, ids[i], &bytes))
            loci_buf_append(out, bytes.data, bytes.len);
    }
    return loci_buf_status(out);
}

uint32_t loci_tokenizer_id(const loci_tokenizer *tokenizer, const char *token) {
    size_t len = strlen(token);
    uint32_t id = NONE;
    for (size_t i = 0; i < 2; i++)
        if (len > 0 && tokenizer->tries[i].count > 0 &&
            trie_match(&tokenizer->tries[i], (const uint8_t *)token, len, &id) == len)
            return id;
    return loci_bpe_find(tokenizer->bpe, loci_slice_text(token));
}

uint32_t loci_tokenizer_vocab_size(const loci_tokenizer *tokenizer) {
    return tokenizer->limit;
}

bool loci_tokenizer_is_special(const loci_tokenizer *tokenizer, uint32_t id) {
    const added_token *added = added_by_id(tokenizer, id);
    return added && added->special;
}

uint32_t loci_tokenizer_bos(const loci_tokenizer *tokenizer) {
    return tokenizer->bos;
}

bool loci_tokenizer_normalizes(const loci_tokenizer *tokenizer) {
    return tokenizer->normalizes;
}

/* --- Reading -------------------------------------------------------------------------- */

/* An added token either has an id of its own or spells the token of the vocabulary with its id. */
static loci_status check_added_token(const loci_tokenizer *tokenizer, const char *what,
                                     const added_token *token, loci_error *err) {
    for (size_t i = 0; i < 2; i++) {
        uint32_t id;
        const trie *t = &tokenizer->tries[i];
        if (t->count > 0 &&
            trie_match(t, (const uint8_t *)token->content, token->len, &id) == token->len)
            return loci_fail(err, LOCI_E_INVAL, "%s: added token \"%.80s\" occurs twice", what,
                             token->content);
    }
    loci_slice bytes;
    if (loci_bpe_token(tokenizer->bpe, token->id, &bytes) &&
        !loci_slice_equal(bytes, loci_slice_of(token->content, token->len)))
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: added token \"%.80s\" has id %u, which is another token's", what,
                         token->content, token->id);
    return LOCI_OK;
}

/* What is matched in normalized text must be normalized, or it would never be found. */
static loci_status check_normalized(const char *what, const added_token *token, loci_error *err) {
    loci_nfc nfc = {0};
    bool changed = false;
    loci_status status =
        loci_nfc_run(&nfc, loci_slice_of(token->content, token->len), &changed, err);
    loci_nfc_fini(&nfc);
    if (status == LOCI_OK && changed)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: added token \"%.80s\" changes when it is normalized", what,
                         token->content);
    return status;
}

static loci_status add_token(loci_tokenizer *tokenizer, const char *what, added_token token,
                             bool normalized, loci_error *err) {
    LOCI_TRY(check_added_token(tokenizer, what, &token, err));
    if (normalized && tokenizer->normalizes) LOCI_TRY(check_normalized(what, &token, err));
    LOCI_TRY(trie_add(&tokenizer->tries[normalized], &token, err));
    token.content = strdup(token.content);
    if (!token.content) return loci_fail(err, LOCI_E_NOMEM, "no memory for a tokenizer");
    tokenizer->added[tokenizer->added_count++] = token;
    if (token.id >= tokenizer->limit) tokenizer->limit = token.id + 1;
    if (token.special) loci_bpe_hide(tokenizer->bpe, token.id);
    return LOCI_OK;
}

static loci_status read_added_token(loci_tokenizer *tokenizer, const loci_json *in, size_t *total,
                                    loci_error *err) {
    const loci_json_need optional = LOCI_JSON_OPTIONAL;
    const char *content = NULL;
    uint32_t id = 0;
    bool special = false, single = false, lstrip = false, rstrip = false, normalized = true;
    LOCI_TRY(loci_json_string(in, "content", LOCI_JSON_REQUIRED, &content, err));
    LOCI_TRY(loci_json_u32(in, "id", LOCI_JSON_REQUIRED, 0, LOCI_VOCAB_MAX - 1, &id, err));
    LOCI_TRY(loci_json_bool(in, "special", optional, &special, err));
    LOCI_TRY(loci_json_bool(in, "normalized", optional, &normalized, err));
    LOCI_TRY(loci_json_bool(in, "single_word", optional, &single, err));
    LOCI_TRY(loci_json_bool(in, "lstrip", optional, &lstrip, err));
    LOCI_TRY(loci_json_bool(in, "rstrip", optional, &rstrip, err));
    if (single || lstrip || rstrip)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: single_word, lstrip or rstrip of added token \"%.80s\" is not "
                         "supported",
                         in->what, content);
    size_t len = strlen(content);
    *total += len;
    if (len == 0 || *total > ADDED_BYTES_MAX)
        return loci_fail(err, LOCI_E_INVAL, "%s: added token %u is empty or too long", in->what,
                         id);
    added_token token = {
        .content = (char *)(uintptr_t)content, .len = len, .id = id, .special = special};
    return add_token(tokenizer, in->what, token, normalized, err);
}

static int by_id(const void *a, const void *b) {
    uint32_t x = ((const added_token *)a)->id, y = ((const added_token *)b)->id;
    return x < y ? -1 : x > y;
}

static loci_status read_added(loci_tokenizer *tokenizer, const loci_json *in, loci_error *err) {
    const json_t *list = NULL, *value;
    LOCI_TRY(loci_json_array(in, "added_tokens", LOCI_JSON_OPTIONAL, &list, err));
    tokenizer->added = calloc(json_array_size(list) + 1, sizeof *tokenizer->added);
    if (!tokenizer->added) return loci_fail(err, LOCI_E_NOMEM, "no memory for a tokenizer");
    size_t i, total = 0;
    json_array_foreach(list, i, value) {
        if (!json_is_object(value))
            return loci_fail(err, LOCI_E_INVAL, "%s: an added token is not an object", in->what);
        LOCI_TRY(read_added_token(tokenizer, &(loci_json){in->what, value}, &total, err));
    }
    qsort(tokenizer->added, tokenizer->added_count, sizeof *tokenizer->added, by_id);
    for (i = 1; i < tokenizer->added_count; i++)
        if (tokenizer->added[i - 1].id == tokenizer->added[i].id)
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: added tokens \"%.80s\" and \"%.80s\" have one id", in->what,
                             tokenizer->added[i - 1].content, tokenizer->added[i].content);
    return LOCI_OK;
}

/* The type of a part of the file; "none" when there is no such part. */
static loci_status read_type(const loci_json *in, const char *part, loci_json *object,
                             const char **type, loci_error *err) {
    *type = "none";
    *object = (loci_json){in->what, NULL};
    LOCI_TRY(loci_json_object(in, part, in->what, LOCI_JSON_OPTIONAL, object, err));
    if (!object->object) return LOCI_OK;
    *type = "of no type";
    return loci_json_string(object, "type", LOCI_JSON_OPTIONAL, type, err);
}

/* SentencePiece tokenizers differ in all parts: the sentence says so, instead of naming one part.
 */
static loci_status refuse_sentencepiece(const loci_json *in, loci_error *err) {
    static const struct {
        const char *part, *type;
    } signs[] = {{"model", "Unigram"}, {"pre_tokenizer", "Metaspace"}, {"decoder", "Metaspace"}};
    loci_json part;
    const char *type;
    bool fallback = false;
    LOCI_TRY(read_type(in, "model", &part, &type, err));
    if (part.object)
        LOCI_TRY(loci_json_bool(&part, "byte_fallback", LOCI_JSON_OPTIONAL, &fallback, err));
    const char *found = fallback ? "byte_fallback" : NULL;
    for (size_t i = 0; i < sizeof signs / sizeof signs[0] && !found; i++) {
        LOCI_TRY(read_type(in, signs[i].part, &part, &type, err));
        if (strcmp(type, signs[i].type) == 0) found = type;
    }
    if (!found) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "TOKENIZER_KIND",
                            "%s has %s: it is a SentencePiece tokenizer, as of Llama 2 and Mistral "
                            "7B, which is not supported; byte-level BPE is (GPT-2, Llama 3, Qwen, "
                            "Mistral Nemo)",
                            in->what, found);
}

/* A decoder other than ByteLevel changes text back in its own way. */
static loci_status read_options(loci_tokenizer *tokenizer, const loci_json *in, loci_error *err) {
    loci_json part;
    const char *type;
    LOCI_TRY(refuse_sentencepiece(in, err));
    LOCI_TRY(read_type(in, "normalizer", &part, &type, err));
    tokenizer->normalizes = strcmp(type, "NFC") == 0;
    if (part.object && !tokenizer->normalizes)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: normalizer %.40s is not supported; NFC and none are", in->what, type);
    LOCI_TRY(read_type(in, "decoder", &part, &type, err));
    if (!part.object) return loci_fail(err, LOCI_E_INVAL, "%s lacks \"decoder\"", in->what);
    if (strcmp(type, "ByteLevel") != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: decoder %.40s is not supported", in->what,
                         type);
    return LOCI_OK;
}

/* The first special token of a TemplateProcessing's "single", alone or in a Sequence. A token that
 * it does not know is of no use and left out. */
static uint32_t find_bos(const loci_tokenizer *tokenizer, const json_t *processor) {
    const char *type = json_string_value(json_object_get(processor, "type"));
    if (!type) return NONE;
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        const json_t *value, *list = json_object_get(processor, "processors");
        json_array_foreach(list, i, value) {
            const char *inner = json_string_value(json_object_get(value, "type"));
            if (inner && strcmp(inner, "TemplateProcessing") == 0)
                return find_bos(tokenizer, value);
        }
    }
    if (strcmp(type, "TemplateProcessing") != 0) return NONE;
    const json_t *first = json_array_get(json_object_get(processor, "single"), 0);
    const char *id =
        json_string_value(json_object_get(json_object_get(first, "SpecialToken"), "id"));
    return id ? loci_tokenizer_id(tokenizer, id) : NONE;
}

static loci_status read_tokenizer(loci_tokenizer *tokenizer, const loci_json *in, loci_error *err) {
    loci_json model = {in->what, NULL};
    LOCI_TRY(read_options(tokenizer, in, err));
    LOCI_TRY(loci_json_object(in, "model", in->what, LOCI_JSON_REQUIRED, &model, err));
    LOCI_TRY(loci_pretokenizer_open(in, &tokenizer->pretokenizer, err));
    LOCI_TRY(loci_bpe_open(&model, &tokenizer->bpe, err));
    tokenizer->limit = loci_bpe_limit(tokenizer->bpe);
    LOCI_TRY(read_added(tokenizer, in, err));
    tokenizer->bos = find_bos(tokenizer, loci_json_member(in, "post_processor"));
    return LOCI_OK;
}

loci_status loci_tokenizer_open(const char *path, loci_tokenizer **out, loci_error *err) {
    json_t *root = NULL;
    LOCI_TRY(loci_json_read(path, FILE_BYTES_MAX, &root, err));
    loci_tokenizer *tokenizer = calloc(1, sizeof *tokenizer);
    loci_status status = tokenizer
                             ? read_tokenizer(tokenizer, &(loci_json){path, root}, err)
                             : loci_fail(err, LOCI_E_NOMEM, "no memory for tokenizer %s", path);
    json_decref(root);
    if (status != LOCI_OK) {
        loci_tokenizer_close(tokenizer);
        return status;
    }
    *out = tokenizer;
    return LOCI_OK;
}

void loci_tokenizer_close(loci_tokenizer *tokenizer) {
    if (!tokenizer) return;
    for (size_t i = 0; i < tokenizer->added_count; i++) free(tokenizer->added[i].content);
    free(tokenizer->added);
    for (size_t i = 0; i < 2; i++) free(tokenizer->tries[i].nodes);
    loci_pretokenizer_close(tokenizer->pretokenizer);
    loci_bpe_close(tokenizer->bpe);
    free(tokenizer);
}
