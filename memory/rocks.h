/* SPDX-License-Identifier: Apache-2.0
 *
 * A thin wrapper around RocksDB's C interface: one database, seven column families, error
 * translation and checked values. Every value is wrapped in the envelope of FORMAT.md section 1;
 * nothing else in memory/ sees raw RocksDB values. Thread-safe, except that one batch or one
 * iterator belongs to one thread.
 */
#ifndef LOCI_MEMORY_ROCKS_H
#define LOCI_MEMORY_ROCKS_H

#include "base/buf.h"
#include "base/status.h"

typedef enum loci_family {
    LOCI_CF_DEFAULT, /* unused, RocksDB insists on it */
    LOCI_CF_CATALOG,
    LOCI_CF_DOCUMENT,
    LOCI_CF_NAME,
    LOCI_CF_CHUNK,
    LOCI_CF_FLAT,
    LOCI_CF_TERMS,
    LOCI_CF_COUNT
} loci_family;

#define LOCI_KIND(a, b) \
    ((uint32_t)'L' | (uint32_t)'C' << 8 | (uint32_t)(a) << 16 | (uint32_t)(b) << 24)
#define LOCI_KIND_CORPUS LOCI_KIND('c', 'o')
#define LOCI_KIND_STATE LOCI_KIND('s', 't')
#define LOCI_KIND_MANIFEST LOCI_KIND('m', 'a')
#define LOCI_KIND_GRAVE LOCI_KIND('g', 'r')
#define LOCI_KIND_UPLOAD LOCI_KIND('u', 'p')
#define LOCI_KIND_NEXT LOCI_KIND('n', 'x')
#define LOCI_KIND_DOCUMENT LOCI_KIND('d', 'o')
#define LOCI_KIND_METADATA LOCI_KIND('m', 'e')
#define LOCI_KIND_NAME LOCI_KIND('i', 'd')
#define LOCI_KIND_CHUNK LOCI_KIND('c', 'h')
#define LOCI_KIND_FLAT LOCI_KIND('f', 'l')
#define LOCI_KIND_TERMS LOCI_KIND('t', 'e')

#define LOCI_KEY_MAX 560u
#define LOCI_ENVELOPE_BYTES 16u

/* A key built by appending; big enough for every key of FORMAT.md. */
typedef struct loci_key {
    uint8_t data[LOCI_KEY_MAX];
    size_t len;
} loci_key;

void loci_key_u8(loci_key *key, uint8_t value);
void loci_key_u32(loci_key *key, uint32_t value); /* big-endian */
void loci_key_u64(loci_key *key, uint64_t value); /* big-endian */
void loci_key_text(loci_key *key, const char *text);
/* The smallest key after every key that starts with *key; len 0 when there is none. */
loci_key loci_key_after_prefix(const loci_key *key);
uint64_t loci_key_read_u64(const uint8_t *data); /* big-endian */

typedef struct loci_rocks loci_rocks;
typedef struct loci_batch loci_batch;
typedef struct loci_view loci_view;   /* a consistent view for several reads */
typedef struct loci_scan loci_scan;   /* an iterator over a prefix */
typedef struct loci_value loci_value; /* a checked value that stays pinned */

/* memory_bytes bounds block cache, write buffers and what goes with them. */
LOCI_MUST_CHECK loci_status loci_rocks_open(const char *path, uint64_t memory_bytes,
                                            loci_rocks **out, loci_error *err);
void loci_rocks_close(loci_rocks *rocks); /* NULL allowed */
/* Everything written before the call is on disk after it. */
LOCI_MUST_CHECK loci_status loci_rocks_sync(loci_rocks *rocks, loci_error *err);

/* Appends the payload to *out. LOCI_E_NOTFOUND when there is no such key, LOCI_E_CORRUPT when the
 * envelope is not as expected. view may be NULL (newest). */
LOCI_MUST_CHECK loci_status loci_rocks_get(loci_rocks *rocks, const loci_view *view,
                                           loci_family family, const loci_key *key, uint32_t kind,
                                           loci_buf *out, loci_error *err);
/* The same without a copy; the payload stays valid until loci_value_free. */
LOCI_MUST_CHECK loci_status loci_rocks_pin(loci_rocks *rocks, const loci_view *view,
                                           loci_family family, const loci_key *key, uint32_t kind,
                                           loci_value **out, loci_slice *payload, loci_error *err);
void loci_value_free(loci_value *value); /* NULL allowed */

loci_view *loci_view_open(loci_rocks *rocks); /* never NULL */
void loci_view_close(loci_view *view);        /* NULL allowed */

loci_batch *loci_batch_create(loci_rocks *rocks); /* never NULL */
void loci_batch_destroy(loci_batch *batch);       /* NULL allowed */
/* The payload is copied. */
void loci_batch_put(loci_batch *batch, loci_family family, const loci_key *key, uint32_t kind,
                    loci_slice payload);
void loci_batch_delete(loci_batch *batch, loci_family family, const loci_key *key);
void loci_batch_delete_prefix(loci_batch *batch, loci_family family, const loci_key *prefix);
/* All or nothing. sync: on disk when this returns. */
LOCI_MUST_CHECK loci_status loci_batch_write(loci_batch *batch, bool sync, loci_error *err);

/* Keys that start with prefix, from `from` (NULL = the first) in order. */
loci_scan *loci_scan_open(loci_rocks *rocks, const loci_view *view, loci_family family,
                          const loci_key *prefix, const loci_key *from);
/* False at the end; *key is valid until the next call. */
bool loci_scan_next(loci_scan *scan, loci_slice *key);
/* The payload of the present key, checked; valid until the next call. */
LOCI_MUST_CHECK loci_status loci_scan_payload(loci_scan *scan, uint32_t kind, loci_slice *payload,
                                              loci_error *err);
/* Ends the scan (NULL allowed) and returns its read error, if any. */
LOCI_MUST_CHECK loci_status loci_scan_close(loci_scan *scan, loci_error *err);

#endif
