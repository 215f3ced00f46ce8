/* SPDX-License-Identifier: Apache-2.0
 *
 * Page tokens; see page.h.
 */
#include "services/locid/page.h"

#include <string.h>
#include <xxhash.h>

#define TOKEN_VERSION 1u
#define TOKEN_HEAD 9u /* version and checksum */

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

loci_status loci_page_size(int32_t asked, size_t *out, loci_error *err) {
    if (asked < 0)
        return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_PAGE_SIZE",
                                "field page_size: %d is negative", (int)asked);
    *out = asked == 0 ? LOCI_PAGE_DEFAULT : (size_t)asked;
    if (*out > LOCI_PAGE_MAX) *out = LOCI_PAGE_MAX;
    return LOCI_OK;
}

static uint64_t checksum(const char *method, const char *parent, const char *cursor) {
    uint64_t hash = XXH3_64bits(method, strlen(method));
    hash = XXH3_64bits_withSeed(parent, strlen(parent), hash);
    return XXH3_64bits_withSeed(cursor, strlen(cursor), hash);
}

static void encode(loci_slice bytes, loci_buf *out) {
    for (size_t i = 0; i < bytes.len; i += 3) {
        size_t n = bytes.len - i < 3 ? bytes.len - i : 3;
        uint32_t word = 0;
        for (size_t j = 0; j < 3; j++) word = word << 8 | (j < n ? bytes.data[i + j] : 0u);
        for (size_t j = 0; j <= n; j++)
            loci_buf_u8(out, (uint8_t)alphabet[word >> (18 - 6 * j) & 63u]);
    }
}

/* Decodes at most TOKEN_HEAD + LOCI_CURSOR_MAX bytes; false on any character or length that
 * encode() does not make. */
static bool decode(const char *token, uint8_t *out, size_t *len) {
    uint32_t word = 0;
    unsigned bits = 0;
    *len = 0;
    for (; *token; token++) {
        const char *at = memchr(alphabet, *token, 64);
        if (!at) return false;
        word = word << 6 | (uint32_t)(at - alphabet);
        bits += 6;
        if (bits >= 8) {
            bits -= 8;
            if (*len == TOKEN_HEAD + LOCI_CURSOR_MAX) return false;
            out[(*len)++] = (uint8_t)(word >> bits);
        }
    }
    return bits < 6 && (word & ((1u << bits) - 1u)) == 0;
}

void loci_page_token_make(const char *method, const char *parent, const char *cursor,
                          loci_buf *out) {
    loci_buf plain = LOCI_BUF_INIT;
    loci_buf_u8(&plain, TOKEN_VERSION);
    loci_buf_u64(&plain, checksum(method, parent, cursor));
    loci_buf_append(&plain, cursor, strlen(cursor));
    if (plain.failed)
        out->failed = true;
    else
        encode(loci_slice_of(plain.data, plain.len), out);
    loci_buf_fini(&plain);
}

loci_status loci_page_token_open(const char *method, const char *parent, const char *token,
                                 char cursor[LOCI_CURSOR_MAX + 1], loci_error *err) {
    cursor[0] = '\0';
    if (token[0] == '\0') return LOCI_OK;
    uint8_t plain[TOKEN_HEAD + LOCI_CURSOR_MAX];
    size_t len = 0;
    bool good = decode(token, plain, &len) && len >= TOKEN_HEAD && plain[0] == TOKEN_VERSION;
    if (good) {
        loci_reader reader = loci_reader_of(loci_slice_of(plain + 1, len - 1));
        uint64_t expected = loci_read_u64(&reader);
        memcpy(cursor, plain + TOKEN_HEAD, len - TOKEN_HEAD);
        cursor[len - TOKEN_HEAD] = '\0';
        good = strlen(cursor) == len - TOKEN_HEAD && expected == checksum(method, parent, cursor);
    }
    if (good) return LOCI_OK;
    cursor[0] = '\0';
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_PAGE_TOKEN",
                            "field page_token: it was not made by this method for these arguments");
}

loci_status loci_page_send(loci_rpc_call *call, const ProtobufCMessage *reply, char **token,
                           const char *method, const char *parent, const char *last,
                           loci_error *err) {
    loci_buf next = LOCI_BUF_INIT;
    if (last) {
        loci_page_token_make(method, parent, last, &next);
        *token = (char *)(uintptr_t)loci_buf_text(&next);
    }
    loci_status status = loci_buf_status(&next);
    if (status == LOCI_OK)
        status = loci_rpc_send(call, reply, err);
    else
        (void)loci_fail(err, status, "no memory for a page token");
    loci_buf_fini(&next);
    return status;
}
