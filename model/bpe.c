/* SPDX-License-Identifier: Apache-2.0
 *
 * Byte-pair encoding: vocabulary, merge table, and the merge loop.
 *
 * tokenizer.json spells each byte of a token as one character (GPT-2's byte alphabet); here tokens
 * are their bytes. Merging always takes the pair of lowest rank, leftmost first, from a heap over
 * a linked list of symbols: O(n log n) for a piece of n bytes.
 */
#include "model/bpe.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define NONE UINT32_MAX

enum {
    TOKEN_PRESENT = 1,
    TOKEN_SPELLED = 2, /* every character of it spells a byte: can come from text */
    TOKEN_WHOLE = 4    /* a piece with exactly its bytes encodes to it alone */
};

typedef struct merge {
    uint64_t pair; /* left id << 32 | right id; UINT64_MAX = free slot */
    uint32_t rank;
    uint32_t merged;
} merge;

struct loci_bpe {
    uint32_t limit;
    uint8_t *bytes;  /* of all tokens, in order of id */
    uint32_t *begin; /* limit + 1 */
    uint8_t *flags;
    uint32_t *by_bytes; /* open addressing over spelled tokens; NONE = free slot */
    size_t by_bytes_mask;
    merge *merges; /* open addressing */
    size_t merges_mask;
    uint32_t byte_id[256];
};

/* One symbol of a piece stands at the index of its first byte. */
typedef struct loci_bpe_symbol {
    uint32_t id; /* NONE: swallowed by the symbol before it */
    uint32_t previous, next;
} loci_bpe_symbol;

static loci_status no_memory(loci_error *err) {
    return loci_fail(err, LOCI_E_NOMEM, "no memory for a tokenizer");
}

/* Slots for count entries at a load of at most one half. */
static size_t table_slots(size_t count) {
    size_t slots = 16;
    while (slots < count * 2) slots *= 2;
    return slots;
}

/* --- Spelling ------------------------------------------------------------------------- */

/* The byte that a character of the byte alphabet stands for; -1 for other characters. Printable
 * Latin-1 characters stand for themselves, U+0100 and up for the other bytes in order. */
static int spelled_byte(uint32_t c) {
    if ((c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff))
        return (int)c;
    if (c < 0x100 || c > 0x143) return -1;
    c -= 0x100;
    if (c <= 0x20) return (int)c;
    return c < 0x43 ? (int)(c - 0x21 + 0x7f) : 0xad;
}

/* Bytes of a token spelled in the alphabet, appended; false (and nothing appended) when a
 * character is not of the alphabet. text is valid UTF-8; the alphabet has only characters of one
 * and two bytes. */
static bool unspell(const char *text, size_t len, loci_buf *out) {
    const size_t before = out->len;
    for (size_t i = 0; i < len; i++) {
        uint32_t c = (uint8_t)text[i];
        if (c >= 0xc0 && c < 0xe0 && i + 1 < len)
            c = (c & 0x1f) << 6 | ((uint8_t)text[++i] & 0x3f);
        else if (c >= 0x80)
            c = UINT32_MAX;
        int byte = spelled_byte(c);
        if (byte < 0) {
            out->len = before;
            return false;
        }
        loci_buf_u8(out, (uint8_t)byte);
    }
    return true;
}

/* --- Look-up -------------------------------------------------------------------------- */

static loci_slice token_bytes(const loci_bpe *bpe, uint32_t id) {
    return loci_slice_of(bpe->bytes + bpe->begin[id], bpe->begin[id + 1] - bpe->begin[id]);
}

/* The slot that holds these bytes, or the free slot for them. */
static size_t bytes_slot(const loci_bpe *bpe, loci_slice bytes) {
    size_t slot = (size_t)XXH3_64bits(bytes.data, bytes.len) & bpe->by_bytes_mask;
    while (bpe->by_bytes[slot] != NONE) {
        loci_slice other = token_bytes(bpe, bpe->by_bytes[slot]);
        if (other.len == bytes.len && memcmp(other.data, bytes.data, bytes.len) == 0) break;
        slot = (slot + 1) & bpe->by_bytes_mask;
    }
    return slot;
}

static size_t merge_slot(const loci_bpe *bpe, uint64_t pair) {
    uint64_t hash = pair * 0x9e3779b97f4a7c15u; /* 2^64 / golden ratio */
    size_t slot = (size_t)(hash >> 32) & bpe->merges_mask;
    while (bpe->merges[slot].pair != pair && bpe->merges[slot].pair != UINT64_MAX)
        slot = (slot + 1) & bpe->merges_mask;
    return slot;
}

/* NULL when the two do not merge. */
static const merge *find_merge(const loci_bpe *bpe, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    const merge *found = &bpe->merges[merge_slot(bpe, pair)];
    return found->pair == pair ? found : NULL;
}

uint32_t loci_bpe_limit(const loci_bpe *bpe) {
    return bpe->limit;
}

bool loci_bpe_token(const loci_bpe *bpe, uint32_t id, loci_slice *bytes) {
    if (id >= bpe->limit || !(bpe->flags[id] & TOKEN_PRESENT)) return false;
    *bytes = token_bytes(bpe, id);
    return true;
}

uint32_t loci_bpe_find(const loci_bpe *bpe, loci_slice bytes) {
    return bpe->by_bytes[bytes_slot(bpe, bytes)];
}

uint32_t loci_bpe_byte(const loci_bpe *bpe, uint8_t byte) {
    return bpe->byte_id[byte];
}

void loci_bpe_hide(loci_bpe *bpe, uint32_t id) {
    if (id < bpe->limit) bpe->flags[id] &= (uint8_t)~TOKEN_WHOLE;
}

/* --- Merging -------------------------------------------------------------------------- */

static bool grow(void **array, size_t *capacity, size_t needed, size_t size) {
    if (needed <= *capacity) return true;
    size_t wanted = *capacity ? *capacity * 2 : 256;
    if (wanted < needed) wanted = needed;
    void *grown = realloc(*array, wanted * size);
    if (!grown) return false;
    *array = grown;
    *capacity = wanted;
    return true;
}

/* The heap orders by (rank, position), packed in one number. */
static void heap_push(uint64_t *heap, size_t *count, uint64_t item) {
    size_t i = (*count)++;
    while (i > 0 && heap[(i - 1) / 2] > item) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = item;
}

static uint64_t heap_pop(uint64_t *heap, size_t *count) {
    uint64_t top = heap[0], last = heap[--*count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *count) break;
        if (child + 1 < *count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* Notes the pair that begins at symbol `at`, if it merges. */
static bool offer(const loci_bpe *bpe, loci_bpe_scratch *scratch, size_t len, uint32_t at,
                  size_t *count) {
    const loci_bpe_symbol *left = &scratch->symbols[at];
    if (left->next >= len) return true;
    const merge *found = find_merge(bpe, left->id, scratch->symbols[left->next].id);
    if (!found) return true;
    void *heap = scratch->heap;
    if (!grow(&heap, &scratch->heap_capacity, *count + 1, sizeof *scratch->heap)) return false;
    scratch->heap = heap;
    heap_push(scratch->heap, count, (uint64_t)found->rank << 32 | at);
    return true;
}

/* Merges the symbols of a piece until nothing merges; they are left in scratch->symbols. */
static bool merge_piece(const loci_bpe *bpe, loci_bpe_scratch *scratch, loci_slice piece) {
    void *grown = scratch->symbols;
    size_t len = piece.len, count = 0;
    if (!grow(&grown, &scratch->symbol_capacity, len, sizeof *scratch->symbols)) return false;
    loci_bpe_symbol *symbols = scratch->symbols = grown;
    for (uint32_t i = 0; i < len; i++)
        symbols[i] = (loci_bpe_symbol){bpe->byte_id[piece.data[i]], i - 1, i + 1};
    for (uint32_t i = 0; i + 1 < len; i++)
        if (!offer(bpe, scratch, len, i, &count)) return false;
    while (count > 0) {
        uint64_t top = heap_pop(scratch->heap, &count);
        uint32_t at = (uint32_t)top;
        loci_bpe_symbol *left = &symbols[at];
        if (left->id == NONE || left->next >= len) continue;
        loci_bpe_symbol *right = &symbols[left->next];
        /* The pair at this place may have changed since it was noted. */
        const merge *found = find_merge(bpe, left->id, right->id);
        if (!found || found->rank != (uint32_t)(top >> 32)) continue;
        left->id = found->merged;
        left->next = right->next;
        right->id = NONE;
        if (left->next < len) symbols[left->next].previous = at;
        if (at > 0 && !offer(bpe, scratch, len, left->previous, &count)) return false;
        if (!offer(bpe, scratch, len, at, &count)) return false;
    }
    return true;
}

loci_status loci_bpe_encode(const loci_bpe *bpe, loci_bpe_scratch *scratch, loci_slice piece,
                            uint32_t base, loci_tokens *out, loci_error *err) {
    uint32_t whole = loci_bpe_find(bpe, piece);
    loci_status status = LOCI_OK;
    if (whole != NONE && bpe->flags[whole] & TOKEN_WHOLE) {
        status = loci_tokens_push(out, whole, base + (uint32_t)piece.len);
        return status == LOCI_OK ? status : no_memory(err);
    }
    if (piece.len > LOCI_PIECE_BYTES_MAX)
        return loci_fail(err, LOCI_E_LIMIT,
                         "the text has a run of %zu bytes from byte %u on that the tokenizer "
                         "cannot cut; at most %d can be encoded",
                         piece.len, base, (int)LOCI_PIECE_BYTES_MAX);
    if (!merge_piece(bpe, scratch, piece)) return no_memory(err);
    for (uint32_t at = 0; at < piece.len && status == LOCI_OK; at = scratch->symbols[at].next)
        status = loci_tokens_push(out, scratch->symbols[at].id, base + scratch->symbols[at].next);
    return status == LOCI_OK ? status : no_memory(err);
}

void loci_bpe_scratch_fini(loci_bpe_scratch *scratch) {
    free(scratch->symbols);
    free(scratch->heap);
    *scratch = (loci_bpe_scratch){0};
}

/* --- Reading -------------------------------------------------------------------------- */

/* unk_token and fuse_unk are of no effect: every byte has a token (fill_vocab sees to it). */
static loci_status refuse_options(const loci_json *in, loci_error *err) {
    /* Old files, GPT-2's for one, do not say what they are; only BPE has merges. */
    const char *type = loci_json_member(in, "merges") ? "BPE" : "of no type";
    LOCI_TRY(loci_json_string(in, "type", LOCI_JSON_OPTIONAL, &type, err));
    if (strcmp(type, "BPE") != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: a model of type %.40s is not supported",
                         in->what, type);
    float dropout = 0;
    bool fallback = false;
    const char *prefix = "", *suffix = "";
    LOCI_TRY(loci_json_float(in, "dropout", LOCI_JSON_OPTIONAL, 0, 1, &dropout, err));
    LOCI_TRY(loci_json_bool(in, "byte_fallback", LOCI_JSON_OPTIONAL, &fallback, err));
    LOCI_TRY(loci_json_string(in, "continuing_subword_prefix", LOCI_JSON_OPTIONAL, &prefix, err));
    LOCI_TRY(loci_json_string(in, "end_of_word_suffix", LOCI_JSON_OPTIONAL, &suffix, err));
    const char *option = dropout > 0 ? "dropout"
                         : fallback  ? "byte_fallback"
                         : prefix[0] ? "continuing_subword_prefix"
                         : suffix[0] ? "end_of_word_suffix"
                                     : NULL;
    if (option)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: option %s is not supported", in->what,
                         option);
    return LOCI_OK;
}

/* Spellings in order of id; NULL where an id has no token. */
static loci_status order_vocab(const loci_json *vocab, const char ***out, uint32_t *limit,
                               loci_error *err) {
    const char *spelling;
    json_t *value;
    json_t *object = (json_t *)(uintptr_t)vocab->object;
    *limit = 0;
    json_object_foreach(object, spelling, value) {
        json_int_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || id >= LOCI_VOCAB_MAX)
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: the id of token \"%.80s\" is not an integer below %d",
                             vocab->what, spelling, (int)LOCI_VOCAB_MAX);
        if ((uint32_t)id >= *limit) *limit = (uint32_t)id + 1;
    }
    const char **spellings = calloc((size_t)*limit + 1, sizeof *spellings);
    if (!spellings) return no_memory(err);
    *out = spellings;
    json_object_foreach(object, spelling, value) {
        json_int_t id = json_integer_value(value);
        if (spellings[id])
            return loci_fail(err, LOCI_E_INVAL, "%s: tokens \"%.80s\" and \"%.80s\" have one id",
                             vocab->what, spellings[id], spelling);
        spellings[id] = spelling;
    }
    return LOCI_OK;
}

static loci_status fill_vocab(loci_bpe *bpe, const loci_json *in, const char *const *spellings,
                              loci_error *err) {
    loci_buf bytes = LOCI_BUF_INIT;
    for (uint32_t id = 0; id < bpe->limit; id++) {
        bpe->begin[id] = (uint32_t)bytes.len;
        if (!spellings[id]) continue;
        size_t len = strlen(spellings[id]);
        bool spelled = unspell(spellings[id], len, &bytes);
        if (!spelled) loci_buf_append(&bytes, spellings[id], len);
        bpe->flags[id] = spelled && len > 0 ? TOKEN_PRESENT | TOKEN_SPELLED : TOKEN_PRESENT;
    }
    bpe->begin[bpe->limit] = (uint32_t)bytes.len;
    bpe->bytes = bytes.data;
    if (loci_buf_status(&bytes) != LOCI_OK) return no_memory(err);
    for (uint32_t id = 0; id < bpe->limit; id++)
        if (bpe->flags[id] & TOKEN_SPELLED)
            bpe->by_bytes[bytes_slot(bpe, token_bytes(bpe, id))] = id;
    for (unsigned byte = 0; byte < 256; byte++) {
        bpe->byte_id[byte] = loci_bpe_find(bpe, loci_slice_of(&(uint8_t){(uint8_t)byte}, 1));
        if (bpe->byte_id[byte] == NONE)
            return loci_fail(err, LOCI_E_UNSUPPORTED,
                             "%s: the vocabulary has no token for byte 0x%02x", in->what, byte);
    }
    return LOCI_OK;
}

static loci_status read_vocab(loci_bpe *bpe, const loci_json *in, loci_error *err) {
    loci_json vocab = {in->what, NULL};
    LOCI_TRY(loci_json_object(in, "vocab", in->what, LOCI_JSON_REQUIRED, &vocab, err));
    const char **spellings = NULL;
    loci_status status = order_vocab(&vocab, &spellings, &bpe->limit, err);
    if (status != LOCI_OK) goto out;
    size_t slots = table_slots(bpe->limit);
    bpe->by_bytes_mask = slots - 1;
    bpe->by_bytes = malloc(slots * sizeof *bpe->by_bytes);
    bpe->begin = calloc((size_t)bpe->limit + 1, sizeof *bpe->begin);
    bpe->flags = calloc((size_t)bpe->limit + 1, 1);
    if (!bpe->by_bytes || !bpe->begin || !bpe->flags) {
        status = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < slots; i++) bpe->by_bytes[i] = NONE;
    status = fill_vocab(bpe, in, spellings, err);
out:
    free(spellings);
    return status;
}

/* The two spellings of a merge: "left right" or ["left", "right"]. */
static bool merge_sides(const json_t *value, const char *side[2], size_t len[2]) {
    if (json_is_array(value) && json_array_size(value) == 2) {
        for (size_t i = 0; i < 2; i++) {
            const json_t *text = json_array_get(value, i);
            side[i] = json_string_value(text);
            len[i] = json_string_length(text);
            if (!side[i]) return false;
        }
        return true;
    }
    const char *text = json_string_value(value);
    const char *space = text ? strchr(text, ' ') : NULL;
    if (!space || strchr(space + 1, ' ')) return false;
    side[0] = text;
    len[0] = (size_t)(space - text);
    side[1] = space + 1;
    len[1] = strlen(side[1]);
    return true;
}

static loci_status read_merge(loci_bpe *bpe, const char *what, const json_t *value, uint32_t rank,
                              loci_buf *bytes, loci_error *err) {
    const char *side[2];
    size_t len[2];
    if (!merge_sides(value, side, len))
        return loci_fail(err, LOCI_E_INVAL, "%s: merge %u is not a pair of tokens", what, rank);
    loci_buf_clear(bytes);
    if (!unspell(side[0], len[0], bytes)) goto unknown;
    size_t left_len = bytes->len;
    if (!unspell(side[1], len[1], bytes)) goto unknown;
    LOCI_TRY(loci_buf_status(bytes));
    uint32_t left = loci_bpe_find(bpe, loci_slice_of(bytes->data, left_len));
    uint32_t right =
        loci_bpe_find(bpe, loci_slice_of(bytes->data + left_len, bytes->len - left_len));
    uint32_t merged = loci_bpe_find(bpe, loci_slice_of(bytes->data, bytes->len));
    if (left == NONE || right == NONE || merged == NONE) goto unknown;
    uint64_t pair = (uint64_t)left << 32 | right;
    bpe->merges[merge_slot(bpe, pair)] = (merge){pair, rank, merged};
    return LOCI_OK;
unknown:
    return loci_fail(err, LOCI_E_INVAL,
                     "%s: merge %u (\"%.*s\", \"%.*s\") is not between tokens of the vocabulary",
                     what, rank, (int)(len[0] < 60 ? len[0] : 60), side[0],
                     (int)(len[1] < 60 ? len[1] : 60), side[1]);
}

static loci_status read_merges(loci_bpe *bpe, const loci_json *in, loci_error *err) {
    const json_t *list = NULL;
    LOCI_TRY(loci_json_array(in, "merges", LOCI_JSON_REQUIRED, &list, err));
    size_t slots = table_slots(json_array_size(list));
    bpe->merges_mask = slots - 1;
    bpe->merges = malloc(slots * sizeof *bpe->merges);
    if (!bpe->merges) return no_memory(err);
    for (size_t i = 0; i < slots; i++) bpe->merges[i].pair = UINT64_MAX;
    loci_buf bytes = LOCI_BUF_INIT;
    loci_status status = LOCI_OK;
    size_t i;
    const json_t *value;
    json_array_foreach(list, i, value)
        LOCI_TRY_GOTO(read_merge(bpe, in->what, value, (uint32_t)i, &bytes, err), out);
out:
    loci_buf_fini(&bytes);
    return status;
}

/* Finds the tokens that a piece of their bytes encodes to: all of them when merges are ignored for
 * whole pieces, else those that their own merges lead to. */
static loci_status mark_whole(loci_bpe *bpe, const loci_json *in, loci_error *err) {
    bool ignore_merges = false;
    LOCI_TRY(loci_json_bool(in, "ignore_merges", LOCI_JSON_OPTIONAL, &ignore_merges, err));
    loci_bpe_scratch scratch = {0};
    loci_status status = LOCI_OK;
    for (uint32_t id = 0; id < bpe->limit; id++) {
        if (!(bpe->flags[id] & TOKEN_SPELLED)) continue;
        loci_slice bytes = token_bytes(bpe, id);
        bool whole = ignore_merges;
        if (!whole) {
            if (!merge_piece(bpe, &scratch, bytes)) {
                status = no_memory(err);
                break;
            }
            whole = scratch.symbols[0].id == id && scratch.symbols[0].next == bytes.len;
        }
        if (whole) bpe->flags[id] |= TOKEN_WHOLE;
    }
    loci_bpe_scratch_fini(&scratch);
    return status;
}

static loci_status read_model(loci_bpe *bpe, const loci_json *in, loci_error *err) {
    LOCI_TRY(refuse_options(in, err));
    LOCI_TRY(read_vocab(bpe, in, err));
    LOCI_TRY(read_merges(bpe, in, err));
    return mark_whole(bpe, in, err);
}

loci_status loci_bpe_open(const loci_json *model, loci_bpe **out, loci_error *err) {
    loci_bpe *bpe = calloc(1, sizeof *bpe);
    if (!bpe) return no_memory(err);
    loci_status status = read_model(bpe, model, err);
    if (status != LOCI_OK) {
        loci_bpe_close(bpe);
        return status;
    }
    *out = bpe;
    return LOCI_OK;
}

void loci_bpe_close(loci_bpe *bpe) {
    if (!bpe) return;
    free(bpe->bytes);
    free(bpe->begin);
    free(bpe->flags);
    free(bpe->by_bytes);
    free(bpe->merges);
    free(bpe);
}
