/* SPDX-License-Identifier: Apache-2.0
 *
 * Extent files: writing them once, opening them verified. FORMAT.md section 4 states the bytes.
 * An open extent is immutable and reference-counted; it may be used by any thread.
 */
#ifndef LOCI_MEMORY_EXTENT_H
#define LOCI_MEMORY_EXTENT_H

#include "base/mapping.h"
#include "memory/builder.h"
#include "memory/manifest.h"

#define LOCI_LAYOUT_VERSION 3u
#define LOCI_LAYOUT_OLDEST 2u /* of a directory that is opened; its corpora are to be reindexed */
#define LOCI_EXTENT_NAME_BYTES (2u * LOCI_EXTENT_ID_BYTES + 1u)

/* Which segments of an extent are dead, and for each pair a bitmap over its slots. Never changes.
 */
typedef struct loci_extent_dead {
    atomic_uint refs;
    const uint64_t **live; /* [pairs] */
    uint8_t segments[];    /* 1 = dead */
} loci_extent_dead;

typedef struct loci_extent {
    atomic_uint refs;
    uint8_t id[LOCI_EXTENT_ID_BYTES];
    char name[LOCI_EXTENT_NAME_BYTES];
    loci_backend *backend;
    loci_mapping *mapping;
    const uint8_t *map; /* its data */
    uint64_t bytes, header_hash;
    loci_buffer *buffer; /* map, as the backend sees it */
    uint32_t tokens, segments, pairs, head_dim;
    bool kv_int8;
    const uint8_t *table;    /* the segment table */
    uint64_t *pair_at;       /* [pairs] */
    uint64_t *pair_bytes;    /* [pairs] */
    uint64_t *pair_hash;     /* [pairs] */
    uint32_t *segment_begin; /* [segments + 1] */
    /* As last asked for: it costs a look at every record. Only one thread at a time may ask. */
    loci_extent_dead *dead;
} loci_extent;

typedef struct loci_extent_segment {
    const uint8_t *content; /* LOCI_CONTENT_HASH_BYTES */
    uint64_t start, end;
    uint32_t tokens;
} loci_extent_segment;

/* The identity of the extent that the builder's segments make. */
void loci_extent_identify(const loci_builder *builder, uint8_t id[LOCI_EXTENT_ID_BYTES]);
void loci_extent_name(const uint8_t id[LOCI_EXTENT_ID_BYTES], char name[LOCI_EXTENT_NAME_BYTES]);

/* Writes the builder's segments, with K and V from the source, as an extent into directory dir
 * (made if it is missing) and fills *out but for runs and partial. backend: clusters keys if it
 * can; NULL allowed. The file is on disk when this
 * returns. A file of the same name is replaced. */
LOCI_MUST_CHECK loci_status loci_extent_write(const char *dir, const loci_builder *builder,
                                              loci_pair_source source, loci_backend *backend,
                                              struct loci_pool *pool, const loci_cancel *cancel,
                                              loci_manifest_extent *out, loci_error *err);

/* Opens and verifies all but codes and KV. */
LOCI_MUST_CHECK loci_status loci_extent_open(const char *dir, const loci_geometry *geometry,
                                             const loci_manifest_extent *expected,
                                             loci_backend *backend, loci_extent **out,
                                             loci_error *err);
/* Whether the file says that it is of an older layout. */
bool loci_extent_outdated(const char *dir, const uint8_t id[LOCI_EXTENT_ID_BYTES]);
loci_extent *loci_extent_ref(loci_extent *extent);
void loci_extent_unref(loci_extent *extent); /* NULL allowed */

/* LOCI_E_IO if anything that was read of the extent since it was opened could not be read; until
 * then everything else that stands here may have seen zeros. */
LOCI_MUST_CHECK loci_status loci_extent_check(const loci_extent *extent, loci_error *err);

loci_extent_segment loci_extent_segment_at(const loci_extent *extent, uint32_t segment);
/* K and V of a pair in position order, verified. pool may be NULL. */
LOCI_MUST_CHECK loci_status loci_extent_read_pair(const loci_extent *extent, uint32_t pair,
                                                  struct loci_pool *pool, uint16_t *k, uint16_t *v,
                                                  loci_error *err);
/* The bitmaps of live slots where segment_dead, [segments], says what is dead. With a reference;
 * the extent keeps them, too, for the next one who asks for the same. One caller at a time. */
LOCI_MUST_CHECK loci_status loci_extent_mask(loci_extent *extent, const uint8_t *segment_dead,
                                             loci_extent_dead **out, loci_error *err);
void loci_extent_let_go(loci_extent *extent);        /* of the bitmaps that it keeps */
void loci_extent_dead_unref(loci_extent_dead *dead); /* NULL allowed */

#endif
