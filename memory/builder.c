/* SPDX-License-Identifier: Apache-2.0
 *
 * Segments in memory, and the flat value made of one; see builder.h.
 */
#include "memory/builder.h"

#include <stdlib.h>
#include <string.h>

#define FLAT_HEAD_BYTES (LOCI_FINGERPRINT_LEN + 16u)

uint32_t loci_extent_tokens_max(const loci_geometry *geometry, const loci_store_options *options) {
    uint64_t most = options->extent_kv_bytes / loci_geometry_kv_bytes(geometry);
    if (most > options->extent_tokens) most = options->extent_tokens;
    if (most < geometry->segment_tokens) most = geometry->segment_tokens;
    return most < LOCI_EXTENT_SEAL_TOKENS ? (uint32_t)most : LOCI_EXTENT_SEAL_TOKENS;
}

uint32_t loci_tail_seal_tokens(uint32_t most) {
    return most / 2 < LOCI_TAIL_SEAL_TOKENS ? most / 2 : LOCI_TAIL_SEAL_TOKENS;
}

loci_status loci_builder_create(const loci_geometry *geometry, loci_builder **out,
                                loci_error *err) {
    loci_builder *builder = calloc(1, sizeof *builder);
    if (!builder) return loci_fail(err, LOCI_E_NOMEM, "no memory for the extent builder");
    builder->geometry = *geometry;
    builder->pairs = geometry->retrieval_layers * geometry->kv_heads;
    builder->k = calloc(builder->pairs, sizeof *builder->k);
    builder->v = calloc(builder->pairs, sizeof *builder->v);
    if (!builder->k || !builder->v) {
        loci_builder_destroy(builder);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the extent builder");
    }
    *out = builder;
    return LOCI_OK;
}

void loci_builder_destroy(loci_builder *builder) {
    if (!builder) return;
    for (uint32_t p = 0; p < builder->pairs; p++) {
        if (builder->k) free(builder->k[p]);
        if (builder->v) free(builder->v[p]);
    }
    free(builder->k);
    free(builder->v);
    free(builder->segments);
    free(builder);
}

void loci_builder_clear(loci_builder *builder) {
    builder->segment_count = 0;
    builder->tokens = 0;
}

/* On failure some pairs have grown and others not; token_capacity still holds for all. */
static bool reserve_rows(loci_builder *builder, uint32_t tokens) {
    if (builder->listed || tokens <= builder->token_capacity) return true;
    uint32_t capacity = builder->token_capacity ? builder->token_capacity : 1024;
    while (capacity < tokens) capacity *= 2;
    size_t bytes = (size_t)capacity * builder->geometry.head_dim * sizeof(uint16_t);
    for (uint32_t p = 0; p < builder->pairs; p++) {
        uint16_t *k = realloc(builder->k[p], bytes);
        if (!k) return false;
        builder->k[p] = k;
        uint16_t *v = realloc(builder->v[p], bytes);
        if (!v) return false;
        builder->v[p] = v;
    }
    builder->token_capacity = capacity;
    return true;
}

static bool reserve_segment(loci_builder *builder) {
    if (builder->segment_count < builder->segment_capacity) return true;
    uint32_t capacity = builder->segment_capacity ? 2 * builder->segment_capacity : 64;
    loci_built_segment *grown = realloc(builder->segments, capacity * sizeof *grown);
    if (!grown) return false;
    builder->segments = grown;
    builder->segment_capacity = capacity;
    return true;
}

loci_status loci_builder_add(loci_builder *builder, const loci_built_segment *segment,
                             uint32_t *row, loci_error *err) {
    LOCI_ASSERT(segment->tokens > 0 && segment->tokens <= LOCI_EXTENT_SEAL_TOKENS);
    if (builder->tokens + segment->tokens > LOCI_EXTENT_TOKENS_MAX ||
        builder->segment_count == LOCI_EXTENT_SEGMENTS_MAX)
        return loci_fail(err, LOCI_E_INTERNAL,
                         "more than %u tokens or %u segments gathered for one extent",
                         LOCI_EXTENT_TOKENS_MAX, LOCI_EXTENT_SEGMENTS_MAX);
    if (!reserve_rows(builder, builder->tokens + segment->tokens) || !reserve_segment(builder))
        return loci_fail(err, LOCI_E_NOMEM, "no memory for %u tokens of an extent",
                         builder->tokens + segment->tokens);
    *row = builder->tokens;
    builder->segments[builder->segment_count++] = *segment;
    builder->tokens += segment->tokens;
    return LOCI_OK;
}

loci_status loci_builder_add_all(loci_builder *builder, const loci_builder *from, loci_error *err) {
    size_t dim = builder->geometry.head_dim;
    uint32_t from_row = 0;
    for (uint32_t i = 0; i < from->segment_count; i++) {
        uint32_t row, tokens = from->segments[i].tokens;
        LOCI_TRY(loci_builder_add(builder, &from->segments[i], &row, err));
        for (uint32_t p = 0; p < builder->pairs; p++) {
            memcpy(builder->k[p] + row * dim, from->k[p] + from_row * dim, tokens * dim * 2);
            memcpy(builder->v[p] + row * dim, from->v[p] + from_row * dim, tokens * dim * 2);
        }
        from_row += tokens;
    }
    return LOCI_OK;
}

static loci_status held_pair(void *ctx, uint32_t pair, const uint16_t **k, const uint16_t **v,
                             loci_error *err) {
    const loci_builder *builder = ctx;
    (void)err;
    *k = builder->k[pair];
    *v = builder->v[pair];
    return LOCI_OK;
}

loci_pair_source loci_builder_source(loci_builder *builder) {
    return (loci_pair_source){builder, held_pair};
}

void loci_flat_encode(const loci_builder *builder, uint32_t first_row, uint32_t tokens,
                      loci_buf *out) {
    size_t dim = builder->geometry.head_dim;
    loci_buf_append(out, builder->geometry.fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_u32(out, tokens);
    loci_buf_u32(out, builder->pairs);
    loci_buf_u32(out, builder->geometry.head_dim);
    loci_buf_u32(out, 0);
    for (uint32_t p = 0; p < builder->pairs; p++) {
        loci_buf_append(out, builder->k[p] + first_row * dim, tokens * dim * 2);
        loci_buf_append(out, builder->v[p] + first_row * dim, tokens * dim * 2);
    }
}

loci_status loci_flat_check(loci_slice payload, const loci_geometry *geometry, uint32_t tokens,
                            const char *name, const uint8_t **data, loci_error *err) {
    uint64_t expected = FLAT_HEAD_BYTES + tokens * loci_geometry_kv_bytes(geometry);
    if (payload.len != expected ||
        memcmp(payload.data, geometry->fingerprint, LOCI_FINGERPRINT_LEN) != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "%s does not match the corpus", name);
    loci_reader reader =
        loci_reader_of(loci_slice_of(payload.data + LOCI_FINGERPRINT_LEN, FLAT_HEAD_BYTES));
    if (loci_read_u32(&reader) != tokens ||
        loci_read_u32(&reader) != geometry->retrieval_layers * geometry->kv_heads ||
        loci_read_u32(&reader) != geometry->head_dim)
        return loci_fail(err, LOCI_E_CORRUPT, "%s has another shape than the corpus", name);
    *data = payload.data + FLAT_HEAD_BYTES;
    return LOCI_OK;
}
