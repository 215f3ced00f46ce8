/* SPDX-License-Identifier: Apache-2.0
 *
 * Segments with their K and V in memory, in position order: what an extent or flat segments are
 * made of. Owned by one thread.
 */
#ifndef LOCI_MEMORY_BUILDER_H
#define LOCI_MEMORY_BUILDER_H

#include "memory/ingest.h"
#include "memory/manifest.h"

typedef struct loci_built_segment {
    uint64_t sequence, start, end;
    uint8_t content[LOCI_CONTENT_HASH_BYTES];
    uint32_t tokens;
} loci_built_segment;

typedef struct loci_builder {
    loci_geometry geometry;
    uint32_t pairs;
    loci_built_segment *segments;
    uint32_t segment_count, segment_capacity;
    uint32_t tokens, token_capacity;
    uint16_t **k, **v; /* [pairs]: bf16 [token_capacity][head_dim] */
    bool listed;       /* segments only, no rows are held; set before the first is added */
} loci_builder;

/* Where an extent's K and V come from: of all segments of a builder, one pair at a time. */
typedef struct loci_pair_source {
    void *ctx;
    /* bf16 [tokens][head_dim]; they stay until the next call but so many as pairs are begun
     * ahead (loci_pairs_ahead). Calls come in the order of the pairs. */
    loci_status (*read)(void *ctx, uint32_t pair, const uint16_t **k, const uint16_t **v,
                        loci_error *err);
} loci_pair_source;

/* Bytes of K and V of one token over all pairs. */
static inline uint64_t loci_geometry_kv_bytes(const loci_geometry *geometry) {
    return 4u * (uint64_t)geometry->retrieval_layers * geometry->kv_heads * geometry->head_dim;
}

/* Most tokens of an extent when it is sealed. */
uint32_t loci_extent_tokens_max(const loci_geometry *geometry, const loci_store_options *options);
/* Fewest tokens of the tail that are worth a partial extent, where a full one has `most`. */
uint32_t loci_tail_seal_tokens(uint32_t most);

LOCI_MUST_CHECK loci_status loci_builder_create(const loci_geometry *geometry, loci_builder **out,
                                                loci_error *err);
void loci_builder_destroy(loci_builder *builder); /* NULL allowed */
/* Empties it and keeps the memory. */
void loci_builder_clear(loci_builder *builder);
/* Adds a segment and makes room for its rows: the caller fills rows [*row, *row + tokens) of
 * every pair. */
LOCI_MUST_CHECK loci_status loci_builder_add(loci_builder *builder,
                                             const loci_built_segment *segment, uint32_t *row,
                                             loci_error *err);
/* Adds all segments of another builder of the same geometry. */
LOCI_MUST_CHECK loci_status loci_builder_add_all(loci_builder *builder, const loci_builder *from,
                                                 loci_error *err);

/* The builder's own rows; it must outlive what this returns. */
loci_pair_source loci_builder_source(loci_builder *builder);

/* The payload of the flat value of a segment, appended to *out (FORMAT.md, kind LCfl). */
void loci_flat_encode(const loci_builder *builder, uint32_t first_row, uint32_t tokens,
                      loci_buf *out);
/* Checks the payload's head and returns where pair 0's K begins; pair p's K and V are
 * tokens * head_dim * 2 bytes each, one after the other. */
LOCI_MUST_CHECK loci_status loci_flat_check(loci_slice payload, const loci_geometry *geometry,
                                            uint32_t tokens, const char *name, const uint8_t **data,
                                            loci_error *err);

#endif
