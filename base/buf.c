/* SPDX-License-Identifier: Apache-2.0
 *
 * Growable byte buffers; see buf.h.
 */
#include "base/buf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void loci_buf_fini(loci_buf *buf) {
    free(buf->data);
    *buf = (loci_buf)LOCI_BUF_INIT;
}

void loci_buf_clear(loci_buf *buf) {
    buf->len = 0;
    buf->failed = false;
}

loci_status loci_buf_status(const loci_buf *buf) {
    return buf->failed ? LOCI_E_NOMEM : LOCI_OK;
}

uint8_t *loci_buf_extend(loci_buf *buf, size_t len) {
    if (buf->failed || len > SIZE_MAX / 2 - buf->len) {
        buf->failed = true;
        return NULL;
    }
    size_t need = buf->len + len;
    if (need > buf->capacity) {
        size_t capacity = buf->capacity ? buf->capacity : 64;
        while (capacity < need) capacity *= 2;
        uint8_t *data = realloc(buf->data, capacity);
        if (!data) {
            buf->failed = true;
            return NULL;
        }
        buf->data = data;
        buf->capacity = capacity;
    }
    uint8_t *at = buf->data ? buf->data + buf->len : NULL;
    buf->len = need;
    return at;
}

void loci_buf_append(loci_buf *buf, const void *data, size_t len) {
    if (len == 0) return;
    uint8_t *at = loci_buf_extend(buf, len);
    if (at) memcpy(at, data, len);
}

void loci_buf_append_text(loci_buf *buf, const char *text) {
    loci_buf_append(buf, text, strlen(text));
}

void loci_buf_printf(loci_buf *buf, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int len = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (len < 0) {
        buf->failed = true;
        return;
    }
    uint8_t *at = loci_buf_extend(buf, (size_t)len + 1);
    if (!at) return;
    va_start(args, format);
    vsnprintf((char *)at, (size_t)len + 1, format, args);
    va_end(args);
    buf->len--;
}

void loci_buf_u8(loci_buf *buf, uint8_t value) {
    loci_buf_append(buf, &value, 1);
}

void loci_buf_u32(loci_buf *buf, uint32_t value) {
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    loci_buf_append(buf, bytes, 4);
}

void loci_buf_u64(loci_buf *buf, uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    loci_buf_append(buf, bytes, 8);
}

void loci_buf_u64_big(loci_buf *buf, uint64_t value) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(value >> (56 - 8 * i));
    loci_buf_append(buf, bytes, 8);
}

void loci_buf_bytes(loci_buf *buf, const void *data, size_t len) {
    if (len > UINT32_MAX) {
        buf->failed = true;
        return;
    }
    loci_buf_u32(buf, (uint32_t)len);
    loci_buf_append(buf, data, len);
}

const char *loci_buf_text(loci_buf *buf) {
    uint8_t *at = loci_buf_extend(buf, 1);
    if (!at) return NULL;
    *at = 0;
    buf->len--;
    return (const char *)buf->data;
}

loci_slice loci_slice_of(const void *data, size_t len) {
    return (loci_slice){data, len};
}

loci_slice loci_slice_text(const char *text) {
    return (loci_slice){(const uint8_t *)text, strlen(text)};
}

bool loci_slice_equal(loci_slice a, loci_slice b) {
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

loci_reader loci_reader_of(loci_slice bytes) {
    return (loci_reader){bytes.data, bytes.len, 0, false};
}

static const uint8_t *take(loci_reader *reader, size_t len) {
    if (reader->failed || reader->len - reader->at < len) {
        reader->failed = true;
        return NULL;
    }
    const uint8_t *at = reader->data + reader->at;
    reader->at += len;
    return at;
}

uint8_t loci_read_u8(loci_reader *reader) {
    const uint8_t *at = take(reader, 1);
    return at ? *at : 0;
}

uint32_t loci_read_u32(loci_reader *reader) {
    const uint8_t *at = take(reader, 4);
    uint32_t value = 0;
    for (int i = 0; at && i < 4; i++) value |= (uint32_t)at[i] << (8 * i);
    return value;
}

uint64_t loci_read_u64(loci_reader *reader) {
    const uint8_t *at = take(reader, 8);
    uint64_t value = 0;
    for (int i = 0; at && i < 8; i++) value |= (uint64_t)at[i] << (8 * i);
    return value;
}

loci_slice loci_read_bytes(loci_reader *reader) {
    uint32_t len = loci_read_u32(reader);
    const uint8_t *at = take(reader, len);
    return at ? (loci_slice){at, len} : (loci_slice){NULL, 0};
}

bool loci_reader_done(const loci_reader *reader) {
    return !reader->failed && reader->at == reader->len;
}
