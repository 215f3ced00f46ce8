/* SPDX-License-Identifier: Apache-2.0
 *
 * Growable byte buffers, borrowed slices, and little-endian encoding.
 *
 * A buffer that could not grow remembers it: appends become no-ops and
 * loci_buf_status reports LOCI_E_NOMEM, so that a chain of appends needs one
 * check at its end. Not thread-safe; ownership is the caller's.
 */
#ifndef LOCI_BASE_BUF_H
#define LOCI_BASE_BUF_H

#include "base/status.h"

typedef struct loci_slice {
    const uint8_t *data;
    size_t len;
} loci_slice;

typedef struct loci_buf {
    uint8_t *data;
    size_t len;
    size_t capacity;
    bool failed;
} loci_buf;

#define LOCI_BUF_INIT \
    { NULL, 0, 0, false }

void loci_buf_fini(loci_buf *buf);
void loci_buf_clear(loci_buf *buf);
loci_status loci_buf_status(const loci_buf *buf);
/* Room for len more bytes after buf->len, which is advanced past them; NULL when
 * memory is short. The bytes are not initialised. */
uint8_t *loci_buf_extend(loci_buf *buf, size_t len);
void loci_buf_append(loci_buf *buf, const void *data, size_t len);
void loci_buf_append_text(loci_buf *buf, const char *text);
void loci_buf_printf(loci_buf *buf, const char *format, ...) LOCI_PRINTF(2, 3);
void loci_buf_u8(loci_buf *buf, uint8_t value);
void loci_buf_u32(loci_buf *buf, uint32_t value);     /* little-endian */
void loci_buf_u64(loci_buf *buf, uint64_t value);     /* little-endian */
void loci_buf_u64_big(loci_buf *buf, uint64_t value); /* for ordered keys */
/* u32 length, then the bytes. */
void loci_buf_bytes(loci_buf *buf, const void *data, size_t len);
/* NUL-terminated text of the buffer (the NUL is not counted); NULL on failure. */
const char *loci_buf_text(loci_buf *buf);

loci_slice loci_slice_of(const void *data, size_t len);
loci_slice loci_slice_text(const char *text);
bool loci_slice_equal(loci_slice a, loci_slice b);

/* A cursor over encoded bytes: reading past the end sets `failed` and yields
 * zeros, so that a parser needs one check at its end. */
typedef struct loci_reader {
    const uint8_t *data;
    size_t len;
    size_t at;
    bool failed;
} loci_reader;

loci_reader loci_reader_of(loci_slice bytes);
uint8_t loci_read_u8(loci_reader *reader);
uint32_t loci_read_u32(loci_reader *reader);
uint64_t loci_read_u64(loci_reader *reader);
loci_slice loci_read_bytes(loci_reader *reader);  /* u32 length, then bytes; borrowed */
bool loci_reader_done(const loci_reader *reader); /* all read and nothing failed */

#endif
