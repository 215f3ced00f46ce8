/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads config.json into loci_model_config.
 *
 * One row of `architectures` states what sets an architecture apart; everything else is common.
 * Sizes are bounded so that later products of them cannot overflow 64 bits.
 */
#include "model/config.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

#include "model/json.h"

enum { CONFIG_BYTES_MAX = 1 << 20, PATH_BYTES = 4096 };

typedef struct architecture {
    const char *name;
    bool nope;                 /* some layers have no positions: no_rope_layers */
    uint32_t no_rope_interval; /* of no_rope_layer_interval, when config.json has none */
    bool tied_embeddings;      /* of tie_word_embeddings, when config.json has none */
} architecture;

static const architecture architectures[] = {
    {"SmolLM3ForCausalLM", true, 4, true},
};
enum { ARCHITECTURE_COUNT = sizeof architectures / sizeof architectures[0] };

static bool ends_with(const char *text, const char *tail) {
    size_t len = strlen(text), tail_len = strlen(tail);
    return len >= tail_len && strcmp(text + len - tail_len, tail) == 0;
}

/* A folder whose weights are in another format gets an error that says what to bring instead. */
static loci_status check_folder(const char *dir, loci_error *err) {
    DIR *listing = opendir(dir);
    if (!listing) return loci_fail(err, LOCI_E_NOTFOUND, "model folder %s cannot be opened", dir);
    static const char *const foreign[] = {".gguf", ".ggml", ".bin", ".pth"};
    char found[256] = "";
    bool safetensors = false;
    for (const struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (ends_with(entry->d_name, ".safetensors")) safetensors = true;
        for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++)
            if (ends_with(entry->d_name, foreign[i]) && !ends_with(found, ".gguf"))
                snprintf(found, sizeof found, "%s", entry->d_name);
    }
    closedir(listing);
    if (found[0] && !safetensors)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_FORMAT",
                                "%s holds %.200s but no .safetensors file; use the model's "
                                "original folder, with config.json, tokenizer.json and "
                                "*.safetensors",
                                dir, found);
    return LOCI_OK;
}

static loci_status read_architecture(const loci_json *in, const architecture **arch,
                                     loci_model_config *out, loci_error *err) {
    const json_t *names = NULL;
    LOCI_TRY(loci_json_array(in, "architectures", LOCI_JSON_REQUIRED, &names, err));
    const char *name = json_string_value(json_array_get(names, 0));
    if (json_array_size(names) != 1 || !name)
        return loci_fail(err, LOCI_E_INVAL, "%s: \"architectures\" is not one name", in->what);
    for (size_t i = 0; i < ARCHITECTURE_COUNT; i++) {
        if (strcmp(name, architectures[i].name) != 0) continue;
        *arch = &architectures[i];
        snprintf(out->architecture, sizeof out->architecture, "%s", name);
        return LOCI_OK;
    }
    return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_ARCHITECTURE",
                            "%s: architecture %.100s is not supported", in->what, name);
}

static loci_status refuse_flag(const loci_json *in, const char *key, loci_error *err) {
    bool set = false;
    LOCI_TRY(loci_json_bool(in, key, LOCI_JSON_OPTIONAL, &set, err));
    if (set)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: \"%s\" true is not supported", in->what,
                         key);
    return LOCI_OK;
}

/* Options that change the computation and are not built. */
static loci_status refuse_options(const loci_json *in, loci_error *err) {
    LOCI_TRY(refuse_flag(in, "attention_bias", err));
    LOCI_TRY(refuse_flag(in, "mlp_bias", err));
    const char *act = "silu";
    LOCI_TRY(loci_json_string(in, "hidden_act", LOCI_JSON_OPTIONAL, &act, err));
    if (strcmp(act, "silu") != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: hidden_act \"%.40s\" is not supported",
                         in->what, act);
    loci_json quantization = {in->what, NULL};
    LOCI_TRY(loci_json_object(in, "quantization_config", in->what, LOCI_JSON_OPTIONAL,
                              &quantization, err));
    if (quantization.object) {
        const char *method = "unknown";
        LOCI_TRY(loci_json_string(&quantization, "quant_method", LOCI_JSON_OPTIONAL, &method, err));
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: the weights are quantized (%.40s), which is not supported; use the "
                         "model's bf16, f16 or f32 weights",
                         in->what, method);
    }
    return LOCI_OK;
}

static loci_status read_sizes(const loci_json *in, loci_model_config *out, loci_error *err) {
    const loci_json_need need = LOCI_JSON_REQUIRED;
    LOCI_TRY(loci_json_u32(in, "vocab_size", need, 1, 1u << 22, &out->vocab, err));
    LOCI_TRY(loci_json_u32(in, "hidden_size", need, 1, 1u << 16, &out->hidden, err));
    LOCI_TRY(loci_json_u32(in, "intermediate_size", need, 1, 1u << 20, &out->intermediate, err));
    LOCI_TRY(loci_json_u32(in, "num_hidden_layers", need, 1, LOCI_LAYERS_MAX, &out->layers, err));
    LOCI_TRY(loci_json_u32(in, "num_attention_heads", need, 1, 1024, &out->q_heads, err));
    LOCI_TRY(
        loci_json_u32(in, "max_position_embeddings", need, 1, 1u << 30, &out->positions_max, err));
    LOCI_TRY(loci_json_float(in, "rms_norm_eps", need, 1e-12, 0.1, &out->rms_eps, err));
    /* null means "as many as query heads"; missing would mean a default of each architecture. */
    if (!json_object_get(in->object, "num_key_value_heads"))
        return loci_fail(err, LOCI_E_INVAL, "%s lacks \"num_key_value_heads\"", in->what);
    out->kv_heads = out->q_heads;
    LOCI_TRY(loci_json_u32(in, "num_key_value_heads", LOCI_JSON_OPTIONAL, 1, out->q_heads,
                           &out->kv_heads, err));
    if (out->q_heads % out->kv_heads != 0)
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: num_attention_heads %u is not a multiple of num_key_value_heads %u",
                         in->what, out->q_heads, out->kv_heads);
    if (!loci_json_member(in, "head_dim") && out->hidden % out->q_heads != 0)
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: hidden_size %u is not a multiple of num_attention_heads %u and "
                         "there is no head_dim",
                         in->what, out->hidden, out->q_heads);
    out->head_dim = out->hidden / out->q_heads;
    LOCI_TRY(loci_json_u32(in, "head_dim", LOCI_JSON_OPTIONAL, 1, 1024, &out->head_dim, err));
    if (out->head_dim % 2 != 0 || out->head_dim == 0 || out->head_dim > 1024)
        return loci_fail(err, LOCI_E_INVAL, "%s: head_dim %u is not an even number up to 1024",
                         in->what, out->head_dim);
    return LOCI_OK;
}

/* The first id where there are several; the tokenizer's end-of-text. */
static loci_status read_eos(const loci_json *in, loci_model_config *out, loci_error *err) {
    const json_t *eos = loci_json_member(in, "eos_token_id");
    if (!eos) return loci_fail(err, LOCI_E_INVAL, "%s lacks \"eos_token_id\"", in->what);
    if (json_is_array(eos)) eos = json_array_get(eos, 0);
    if (!json_is_integer(eos))
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: \"eos_token_id\" is neither an integer nor a list of integers",
                         in->what);
    json_int_t id = json_integer_value(eos);
    if (id < 0 || id >= (json_int_t)out->vocab)
        return loci_fail(err, LOCI_E_INVAL, "%s: eos_token_id %lld is outside the vocabulary of %u",
                         in->what, (long long)id, out->vocab);
    out->eos_id = (uint32_t)id;
    return LOCI_OK;
}

/* rope_scaling and rope_parameters (its later name): only the plain kind is built. */
static loci_status read_rope_object(const loci_json *in, const char *key, float *theta,
                                    loci_error *err) {
    loci_json rope = {in->what, NULL};
    LOCI_TRY(loci_json_object(in, key, in->what, LOCI_JSON_OPTIONAL, &rope, err));
    if (!rope.object) return LOCI_OK;
    const char *type = "default";
    LOCI_TRY(loci_json_string(&rope, "type", LOCI_JSON_OPTIONAL, &type, err));
    LOCI_TRY(loci_json_string(&rope, "rope_type", LOCI_JSON_OPTIONAL, &type, err));
    if (strcmp(type, "default") != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: %s of type \"%.40s\" is not supported",
                         in->what, key, type);
    float partial = 1;
    LOCI_TRY(
        loci_json_float(&rope, "partial_rotary_factor", LOCI_JSON_OPTIONAL, 0, 1, &partial, err));
    if (partial < 1)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: partial_rotary_factor %g in %s is not supported", in->what,
                         (double)partial, key);
    float found = *theta;
    LOCI_TRY(loci_json_float(&rope, "rope_theta", LOCI_JSON_OPTIONAL, 1, 1e12, &found, err));
    if (*theta > 0 && (found < *theta || found > *theta))
        return loci_fail(err, LOCI_E_INVAL, "%s: rope_theta is %g, but %g in %s", in->what,
                         (double)*theta, (double)found, key);
    *theta = found;
    return LOCI_OK;
}

static loci_status read_rope(const loci_json *in, loci_model_config *out, loci_error *err) {
    float partial = 1;
    LOCI_TRY(loci_json_float(in, "partial_rotary_factor", LOCI_JSON_OPTIONAL, 0, 1, &partial, err));
    if (partial < 1)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: partial_rotary_factor %g is not supported",
                         in->what, (double)partial);
    out->rope_theta = 0;
    LOCI_TRY(loci_json_float(in, "rope_theta", LOCI_JSON_OPTIONAL, 1, 1e12, &out->rope_theta, err));
    LOCI_TRY(read_rope_object(in, "rope_scaling", &out->rope_theta, err));
    LOCI_TRY(read_rope_object(in, "rope_parameters", &out->rope_theta, err));
    if (out->rope_theta <= 0)
        return loci_fail(err, LOCI_E_INVAL, "%s lacks \"rope_theta\"", in->what);
    return LOCI_OK;
}

/* Which layers have positions: the list, else every no_rope_layer_interval-th has none. */
static loci_status read_nope(const loci_json *in, const architecture *arch, loci_model_config *out,
                             loci_error *err) {
    for (uint32_t i = 0; i < out->layers; i++) out->layer[i].rope = true;
    if (!arch->nope) return LOCI_OK;
    const json_t *list = NULL;
    LOCI_TRY(loci_json_array(in, "no_rope_layers", LOCI_JSON_OPTIONAL, &list, err));
    uint32_t interval = arch->no_rope_interval;
    LOCI_TRY(loci_json_u32(in, "no_rope_layer_interval", LOCI_JSON_OPTIONAL, 1, UINT32_MAX,
                           &interval, err));
    if (list && json_array_size(list) < out->layers)
        return loci_fail(err, LOCI_E_INVAL, "%s: no_rope_layers has %zu entries for %u layers",
                         in->what, json_array_size(list), out->layers);
    for (uint32_t i = 0; i < out->layers; i++) {
        if (!list) {
            out->layer[i].rope = (i + 1) % interval != 0;
            continue;
        }
        const json_t *flag = json_array_get(list, i);
        json_int_t value = json_integer_value(flag);
        if (!json_is_integer(flag) || value < 0 || value > 1)
            return loci_fail(err, LOCI_E_INVAL, "%s: no_rope_layers[%u] is neither 0 nor 1",
                             in->what, i);
        out->layer[i].rope = value == 1;
    }
    return LOCI_OK;
}

static loci_status read_layer_types(const loci_json *in, const json_t *types, uint32_t window,
                                    loci_model_config *out, loci_error *err) {
    if (json_array_size(types) != out->layers)
        return loci_fail(err, LOCI_E_INVAL, "%s: layer_types has %zu entries for %u layers",
                         in->what, json_array_size(types), out->layers);
    for (uint32_t i = 0; i < out->layers; i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type)
            return loci_fail(err, LOCI_E_INVAL, "%s: layer_types[%u] is not a string", in->what, i);
        if (strcmp(type, "full_attention") == 0) continue;
        if (strcmp(type, "sliding_attention") != 0)
            return loci_fail(err, LOCI_E_UNSUPPORTED,
                             "%s: layer type \"%.40s\" of layer %u is not supported", in->what,
                             type, i);
        if (window == 0)
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: layer %u is sliding_attention without use_sliding_window true "
                             "and a sliding_window",
                             in->what, i);
        out->layer[i].window = window;
    }
    return LOCI_OK;
}

static loci_status read_windows(const loci_json *in, loci_model_config *out, loci_error *err) {
    bool sliding = false;
    uint32_t window = 0;
    const json_t *types = NULL;
    LOCI_TRY(loci_json_bool(in, "use_sliding_window", LOCI_JSON_OPTIONAL, &sliding, err));
    LOCI_TRY(loci_json_u32(in, "sliding_window", LOCI_JSON_OPTIONAL, 1, 1u << 30, &window, err));
    if (!sliding) window = 0;
    LOCI_TRY(loci_json_array(in, "layer_types", LOCI_JSON_OPTIONAL, &types, err));
    if (types) return read_layer_types(in, types, window, out, err);
    /* Without layer_types the window belongs to the layers without positions. */
    for (uint32_t i = 0; i < out->layers; i++)
        out->layer[i].window = out->layer[i].rope ? 0 : window;
    return LOCI_OK;
}

/* The corpus is reached from the layers without positions that see everything, where the model
 * has such layers; from all layers otherwise. */
static void choose_retrieval_layers(loci_model_config *out) {
    bool any = false;
    for (uint32_t i = 0; i < out->layers; i++) {
        out->layer[i].retrieval = !out->layer[i].rope && out->layer[i].window == 0;
        any = any || out->layer[i].retrieval;
    }
    for (uint32_t i = 0; i < out->layers; i++) {
        if (!any) out->layer[i].retrieval = true;
        if (out->layer[i].retrieval) out->retrieval_layer[out->retrieval_count++] = i;
    }
}

static loci_status read_config(const loci_json *in, loci_model_config *out, loci_error *err) {
    const architecture *arch = NULL;
    LOCI_TRY(read_architecture(in, &arch, out, err));
    LOCI_TRY(refuse_options(in, err));
    LOCI_TRY(read_sizes(in, out, err));
    LOCI_TRY(read_eos(in, out, err));
    LOCI_TRY(read_rope(in, out, err));
    out->tied_embeddings = arch->tied_embeddings;
    LOCI_TRY(
        loci_json_bool(in, "tie_word_embeddings", LOCI_JSON_OPTIONAL, &out->tied_embeddings, err));
    LOCI_TRY(read_nope(in, arch, out, err));
    LOCI_TRY(read_windows(in, out, err));
    choose_retrieval_layers(out);
    return LOCI_OK;
}

loci_status loci_model_config_load(const char *dir, loci_model_config *out, loci_error *err) {
    LOCI_TRY(check_folder(dir, err));
    char path[PATH_BYTES];
    int len = snprintf(path, sizeof path, "%s/config.json", dir);
    if (len < 0 || (size_t)len >= sizeof path)
        return loci_fail(err, LOCI_E_INVAL, "the name of the model folder is too long");
    json_t *root = NULL;
    LOCI_TRY(loci_json_read(path, CONFIG_BYTES_MAX, &root, err));
    *out = (loci_model_config){0};
    loci_status status = read_config(&(loci_json){path, root}, out, err);
    json_decref(root);
    return status;
}
