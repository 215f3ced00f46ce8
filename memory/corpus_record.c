/* SPDX-License-Identifier: Apache-2.0
 *
 * A corpus's catalogue value (FORMAT.md, kind LCco), and what a causal corpus refuses.
 */
#include <stdlib.h>
#include <string.h>

#include "memory/internal.h"

void loci_corpus_encode(const loci_corpus *corpus, bool deleted, loci_buf *out) {
    const loci_geometry *geometry = &corpus->geometry;
    loci_buf_bytes(out, corpus->name, strlen(corpus->name));
    loci_buf_u64(out, (uint64_t)corpus->created);
    loci_buf_u8(out, deleted);
    loci_buf_append(out, geometry->fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_u32(out, geometry->retrieval_layers);
    loci_buf_u32(out, geometry->kv_heads);
    loci_buf_u32(out, geometry->head_dim);
    loci_buf_u32(out, geometry->ranking_layer);
    loci_buf_u32(out, geometry->segment_tokens);
    loci_buf_u8(out, geometry->has_sink);
    loci_buf_u32(out, (uint32_t)(corpus->sink_floats / 2));
    loci_buf_append(out, corpus->sinks, corpus->sink_floats * sizeof(float));
    if (!geometry->causal) return;
    loci_buf_u8(out, 1);
    loci_buf_u64(out, geometry->tokens_max);
}

bool loci_geometry_valid(const loci_geometry *geometry) {
    return strlen(geometry->fingerprint) == LOCI_FINGERPRINT_LEN &&
           geometry->retrieval_layers >= 1 && geometry->retrieval_layers <= 1024 &&
           geometry->kv_heads >= 1 && geometry->kv_heads <= 1024 && geometry->head_dim >= 16 &&
           geometry->head_dim <= 256 && geometry->head_dim % 16 == 0 &&
           geometry->ranking_layer < geometry->retrieval_layers && geometry->segment_tokens >= 1 &&
           geometry->segment_tokens <= LOCI_EXTENT_TOKENS_MAX;
}

size_t loci_sink_floats(const loci_geometry *geometry) {
    if (!geometry->has_sink) return 0;
    return 2u * (size_t)geometry->retrieval_layers * geometry->kv_heads * geometry->head_dim;
}

/* What a causal corpus has behind its sinks. */
static bool read_causal(const loci_reader *after_count, size_t sink_bytes, uint64_t *tokens_max) {
    if (after_count->len - after_count->at != sink_bytes + 9) return false;
    const uint8_t *data = after_count->data + after_count->at + sink_bytes;
    loci_reader reader = loci_reader_of(loci_slice_of(data, 9));
    bool known = loci_read_u8(&reader) == 1;
    *tokens_max = loci_read_u64(&reader);
    return known;
}

loci_status loci_corpus_decode(loci_corpus *corpus, loci_slice payload, loci_error *err) {
    loci_reader reader = loci_reader_of(payload);
    loci_geometry *geometry = &corpus->geometry;
    loci_slice name = loci_read_bytes(&reader);
    corpus->created = (int64_t)loci_read_u64(&reader);
    corpus->deleted = loci_read_u8(&reader) != 0;
    for (size_t i = 0; i < LOCI_FINGERPRINT_LEN; i++)
        geometry->fingerprint[i] = (char)loci_read_u8(&reader);
    geometry->retrieval_layers = loci_read_u32(&reader);
    geometry->kv_heads = loci_read_u32(&reader);
    geometry->head_dim = loci_read_u32(&reader);
    geometry->ranking_layer = loci_read_u32(&reader);
    geometry->segment_tokens = loci_read_u32(&reader);
    geometry->has_sink = loci_read_u8(&reader) != 0;
    size_t floats = 2u * (size_t)loci_read_u32(&reader);
    size_t left = reader.len - reader.at, bytes = floats * sizeof(float);
    geometry->causal = left != bytes;
    if (reader.failed || name.len == 0 || name.len > LOCI_NAME_MAX ||
        !loci_geometry_valid(geometry) || floats != loci_sink_floats(geometry) ||
        (geometry->causal && !read_causal(&reader, bytes, &geometry->tokens_max)))
        return loci_fail(err, LOCI_E_CORRUPT, "the catalogue entry of corpus %016llx is damaged",
                         (unsigned long long)corpus->uid);
    memcpy(corpus->name, name.data, name.len);
    corpus->sink_floats = floats;
    if (floats == 0) return LOCI_OK;
    corpus->sinks = malloc(floats * sizeof(float));
    if (!corpus->sinks) return loci_fail(err, LOCI_E_NOMEM, "no memory for a corpus");
    memcpy(corpus->sinks, reader.data + reader.at, floats * sizeof(float));
    return LOCI_OK;
}

loci_status loci_append_only(const loci_corpus *corpus, const char *id, const char *what,
                             loci_error *err) {
    return loci_fail_reason(
        err, LOCI_E_PRECONDITION, "APPEND_ONLY",
        "document \"%.100s\" cannot be %s: corpus %s is causal, what came after "
        "it was encoded knowing it (one made with --encoding independent can "
        "be changed)",
        id, what, corpus->name);
}
