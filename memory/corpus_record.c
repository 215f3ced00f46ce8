/* SPDX-License-Identifier: Apache-2.0
 *
 * A corpus's catalogue value (FORMAT.md, kind LCco), its settings, and what a causal corpus
 * refuses.
 */
#include <stdlib.h>
#include <string.h>

#include "memory/internal.h"

/* What is behind the sinks. */
enum { TAIL_CAUSAL = 1, TAIL_SETTINGS = 2, TAIL_INT8 = 3 };

/* Far beyond what helped anywhere (published: 0.2 to 1), and far from infinite logits. */
#define TEMPERATURE_LEAST 0.05f
#define TEMPERATURE_MOST 20.0f
#define SCALE_LEAST 0.05f
#define SCALE_MOST 2.0f

void loci_corpus_encode(const loci_corpus *corpus, loci_corpus_stage stage, loci_buf *out) {
    const loci_geometry *geometry = &corpus->geometry;
    loci_buf_bytes(out, corpus->name, strlen(corpus->name));
    loci_buf_u64(out, (uint64_t)corpus->created);
    loci_buf_u8(out, (uint8_t)stage);
    loci_buf_append(out, geometry->fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_u32(out, geometry->retrieval_layers);
    loci_buf_u32(out, geometry->kv_heads);
    loci_buf_u32(out, geometry->head_dim);
    loci_buf_u32(out, geometry->ranking_layer);
    loci_buf_u32(out, geometry->segment_tokens);
    loci_buf_u8(out, geometry->has_sink);
    loci_buf_u32(out, (uint32_t)(corpus->sink_floats / 2));
    loci_buf_append(out, corpus->sinks, corpus->sink_floats * sizeof(float));
    loci_buf_u8(out, geometry->kv_int8 ? TAIL_INT8 : TAIL_SETTINGS);
    loci_buf_u8(out, geometry->causal);
    loci_buf_u64(out, geometry->tokens_max);
    loci_buf_u32(out, corpus->settings.dense_layers);
    loci_buf_append(out, &corpus->settings.attn_temperature, sizeof(float));
    loci_buf_append(out, &corpus->settings.attn_scale, sizeof(float));
}

void loci_corpus_settings_default(loci_corpus_settings *settings) {
    *settings = (loci_corpus_settings){.attn_temperature = 1, .attn_scale = 1};
}

void loci_corpus_settings_apply(const loci_settings_change *change,
                                loci_corpus_settings *settings) {
    if (change->dense_layers >= 0)
        settings->dense_layers =
            change->dense_layers < UINT32_MAX ? (uint32_t)change->dense_layers : UINT32_MAX;
    if (change->attn_temperature != 0) settings->attn_temperature = (float)change->attn_temperature;
    if (change->attn_scale != 0) settings->attn_scale = (float)change->attn_scale;
}

static bool in_range(float value, float least, float most) {
    return value >= least && value <= most; /* not NaN */
}

loci_status loci_corpus_settings_check(const loci_corpus_settings *settings,
                                       const loci_geometry *geometry, loci_error *err) {
    static const char reason[] = "INVALID_SETTINGS";
    if (settings->dense_layers > geometry->retrieval_layers)
        return loci_fail_reason(err, LOCI_E_INVAL, reason,
                                "dense_layers is %u, and the model has %u retrieval layers",
                                settings->dense_layers, geometry->retrieval_layers);
    if (!in_range(settings->attn_temperature, TEMPERATURE_LEAST, TEMPERATURE_MOST))
        return loci_fail_reason(err, LOCI_E_INVAL, reason,
                                "attn_temperature is %g; it must lie in [%g, %g]",
                                (double)settings->attn_temperature, (double)TEMPERATURE_LEAST,
                                (double)TEMPERATURE_MOST);
    if (!in_range(settings->attn_scale, SCALE_LEAST, SCALE_MOST))
        return loci_fail_reason(
            err, LOCI_E_INVAL, reason, "attn_scale is %g; it must lie in [%g, %g]",
            (double)settings->attn_scale, (double)SCALE_LEAST, (double)SCALE_MOST);
    return LOCI_OK;
}

bool loci_geometry_valid(const loci_geometry *geometry) {
    return strlen(geometry->fingerprint) == LOCI_FINGERPRINT_LEN &&
           geometry->retrieval_layers >= 1 && geometry->retrieval_layers <= 1024 &&
           geometry->kv_heads >= 1 && geometry->kv_heads <= 1024 && geometry->head_dim >= 16 &&
           geometry->head_dim <= 256 && geometry->head_dim % 16 == 0 &&
           geometry->ranking_layer < geometry->retrieval_layers && geometry->segment_tokens >= 1 &&
           geometry->segment_tokens <= LOCI_EXTENT_SEAL_TOKENS;
}

size_t loci_sink_floats(const loci_geometry *geometry) {
    if (!geometry->has_sink) return 0;
    return 2u * (size_t)geometry->retrieval_layers * geometry->kv_heads * geometry->head_dim;
}

/* What stands behind the sinks: nothing (an independent corpus of before there were settings), a
 * causal one's bound (likewise), or all of it; its kind says what K and V are, too. */
static bool read_tail(loci_slice tail, loci_geometry *geometry, loci_corpus_settings *settings) {
    loci_reader reader = loci_reader_of(tail);
    loci_corpus_settings_default(settings);
    if (tail.len == 0) return true;
    uint8_t kind = loci_read_u8(&reader);
    geometry->causal = kind == TAIL_CAUSAL || loci_read_u8(&reader) == 1;
    geometry->tokens_max = loci_read_u64(&reader);
    if (kind == TAIL_CAUSAL) return loci_reader_done(&reader);
    uint32_t bits[3];
    for (int i = 0; i < 3; i++) bits[i] = loci_read_u32(&reader);
    settings->dense_layers = bits[0];
    memcpy(&settings->attn_temperature, &bits[1], sizeof(float));
    memcpy(&settings->attn_scale, &bits[2], sizeof(float));
    geometry->kv_int8 = kind == TAIL_INT8;
    return (kind == TAIL_SETTINGS || kind == TAIL_INT8) && loci_reader_done(&reader) &&
           loci_corpus_settings_check(settings, geometry, NULL) == LOCI_OK;
}

loci_status loci_corpus_decode(loci_corpus *corpus, loci_slice payload, loci_error *err) {
    loci_reader reader = loci_reader_of(payload);
    loci_geometry *geometry = &corpus->geometry;
    loci_slice name = loci_read_bytes(&reader);
    corpus->created = (int64_t)loci_read_u64(&reader);
    uint8_t stage = loci_read_u8(&reader);
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
    if (reader.failed || stage > LOCI_CORPUS_INDEXING || name.len == 0 ||
        name.len > LOCI_NAME_MAX || !loci_geometry_valid(geometry) ||
        floats != loci_sink_floats(geometry) || left < bytes ||
        !read_tail(loci_slice_of(reader.data + reader.at + bytes, left - bytes), geometry,
                   &corpus->settings))
        return loci_fail(err, LOCI_E_CORRUPT, "the catalogue entry of corpus %016llx is damaged",
                         (unsigned long long)corpus->uid);
    memcpy(corpus->name, name.data, name.len);
    corpus->stage = (loci_corpus_stage)stage;
    corpus->deleted = stage == LOCI_CORPUS_DELETED || stage == LOCI_CORPUS_COPYING;
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
