/* SPDX-License-Identifier: Apache-2.0
 *
 * Rotary positions; see rope.h.
 *
 * config.json has them in three places: "rope_theta", "rope_scaling" and, in newer files,
 * "rope_parameters", which holds both. Where several speak they must agree.
 */
#include "model/rope.h"

#include <math.h>
#include <string.h>

static loci_status refuse_partial(const loci_json *in, const char *where, loci_error *err) {
    float partial = 1;
    LOCI_TRY(loci_json_float(in, "partial_rotary_factor", LOCI_JSON_OPTIONAL, 0, 1, &partial, err));
    if (partial < 1)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: partial_rotary_factor %g in %s is not supported", in->what,
                         (double)partial, where);
    return LOCI_OK;
}

static loci_status read_scaling(const loci_json *rope, loci_rope_scaling *out, loci_error *err) {
    const loci_json_need need = LOCI_JSON_REQUIRED;
    loci_rope_scaling found = {0};
    LOCI_TRY(loci_json_float(rope, "factor", need, 1, 1e6, &found.factor, err));
    LOCI_TRY(loci_json_float(rope, "low_freq_factor", need, 1e-6, 1e6, &found.low_freq, err));
    LOCI_TRY(loci_json_float(rope, "high_freq_factor", need, 1e-6, 1e6, &found.high_freq, err));
    LOCI_TRY(loci_json_u32(rope, "original_max_position_embeddings", need, 1, 1u << 30,
                           &found.positions_max, err));
    if (found.high_freq <= found.low_freq)
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: high_freq_factor %g is not above low_freq_factor %g", rope->what,
                         (double)found.high_freq, (double)found.low_freq);
    *out = found;
    return LOCI_OK;
}

static loci_status read_kind(const loci_json *rope, const char *key, loci_rope_scaling *out,
                             loci_error *err) {
    const char *type = "default", *old = NULL;
    *out = (loci_rope_scaling){0};
    LOCI_TRY(loci_json_string(rope, "type", LOCI_JSON_OPTIONAL, &old, err));
    if (old) type = old;
    LOCI_TRY(loci_json_string(rope, "rope_type", LOCI_JSON_OPTIONAL, &type, err));
    if (old && strcmp(type, old) != 0)
        return loci_fail(err, LOCI_E_INVAL, "%s: %s is of type \"%.40s\" and \"%.40s\"", rope->what,
                         key, old, type);
    if (strcmp(type, "llama3") == 0) return read_scaling(rope, out, err);
    if (strcmp(type, "default") == 0) return LOCI_OK;
    return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_OPTION",
                            "%s: %s of type \"%.40s\" is not supported; \"default\" and "
                            "\"llama3\" are",
                            rope->what, key, type);
}

/* *seen: out->rope_scaling was already filled from another object. */
static loci_status read_object(const loci_json *in, const char *key, bool *seen,
                               loci_model_config *out, loci_error *err) {
    loci_json rope = {in->what, NULL};
    loci_rope_scaling scaling;
    LOCI_TRY(loci_json_object(in, key, in->what, LOCI_JSON_OPTIONAL, &rope, err));
    if (!rope.object) return LOCI_OK;
    LOCI_TRY(read_kind(&rope, key, &scaling, err));
    if (*seen && memcmp(&scaling, &out->rope_scaling, sizeof scaling) != 0)
        return loci_fail(err, LOCI_E_INVAL, "%s: rope_scaling and rope_parameters disagree",
                         in->what);
    *seen = true;
    out->rope_scaling = scaling;
    LOCI_TRY(refuse_partial(&rope, key, err));
    float found = out->rope_theta;
    LOCI_TRY(loci_json_float(&rope, "rope_theta", LOCI_JSON_OPTIONAL, 1, 1e12, &found, err));
    if (out->rope_theta > 0 && (found < out->rope_theta || found > out->rope_theta))
        return loci_fail(err, LOCI_E_INVAL, "%s: rope_theta is %g, but %g in %s", in->what,
                         (double)out->rope_theta, (double)found, key);
    out->rope_theta = found;
    return LOCI_OK;
}

loci_status loci_rope_read(const loci_json *in, loci_model_config *out, loci_error *err) {
    bool seen = false;
    LOCI_TRY(refuse_partial(in, "config.json", err));
    out->rope_theta = 0;
    LOCI_TRY(loci_json_float(in, "rope_theta", LOCI_JSON_OPTIONAL, 1, 1e12, &out->rope_theta, err));
    LOCI_TRY(read_object(in, "rope_scaling", &seen, out, err));
    LOCI_TRY(read_object(in, "rope_parameters", &seen, out, err));
    if (out->rope_theta <= 0)
        return loci_fail(err, LOCI_E_INVAL, "%s lacks \"rope_theta\"", in->what);
    return LOCI_OK;
}

/* Llama 3.1's rule: turns is how often a frequency goes round within the original positions. */
static float scale_frequency(const loci_rope_scaling *s, float frequency) {
    float turns = (float)s->positions_max * frequency / (2 * 3.14159265358979f);
    if (turns >= s->high_freq) return frequency;
    if (turns <= s->low_freq) return frequency / s->factor;
    float smooth = (turns - s->low_freq) / (s->high_freq - s->low_freq);
    return (1 - smooth) * frequency / s->factor + smooth * frequency;
}

void loci_rope_frequencies(const loci_model_config *config, float *out) {
    for (uint32_t i = 0; i < config->head_dim / 2; i++) {
        out[i] = 1.0f / powf(config->rope_theta, (float)(2 * i) / (float)config->head_dim);
        if (config->rope_scaling.factor > 0)
            out[i] = scale_frequency(&config->rope_scaling, out[i]);
    }
}
