/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads config.json into loci_model_config.
 *
 * One row of `architectures` states what sets an architecture apart; everything else is common.
 * Sizes are bounded so that later products of them cannot overflow 64 bits.
 */
#include "model/config.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "attention/index_layout.h"
#include "model/json.h"
#include "model/rope.h"

enum { CONFIG_BYTES_MAX = 1 << 20, PATH_BYTES = 4096 };

/* Which layers have the sliding window where config.json lists no layer_types. */
typedef enum window_rule {
    WINDOW_NEVER, /* such a list may only say full_attention */
    WINDOW_ALL,   /* sliding_window, if not null, is of all layers */
    WINDOW_UPPER, /* if use_sliding_window: of the layers from max_window_layers on */
    WINDOW_NOPE   /* if use_sliding_window: of the layers without positions */
} window_rule;

typedef struct architecture {
    const char *name;
    window_rule window;
    bool nope;            /* some layers have no positions: no_rope_layers */
    bool tied_embeddings; /* of tie_word_embeddings, when config.json has none */
    bool qkv_bias, head_norm;
    bool head_dim; /* must be given: it is not hidden_size / num_attention_heads by default */
} architecture;

static const architecture architectures[] = {
    {.name = "LlamaForCausalLM", .window = WINDOW_NEVER},
    {.name = "MistralForCausalLM", .window = WINDOW_ALL},
    {.name = "Qwen2ForCausalLM", .window = WINDOW_UPPER, .qkv_bias = true},
    {.name = "Qwen3ForCausalLM", .window = WINDOW_UPPER, .head_norm = true, .head_dim = true},
    {.name = "SmolLM3ForCausalLM", .window = WINDOW_NOPE, .nope = true, .tied_embeddings = true},
};
enum { ARCHITECTURE_COUNT = sizeof architectures / sizeof architectures[0] };

static bool ends_with(const char *text, const char *tail) {
    size_t len = strlen(text), tail_len = strlen(tail);
    return len >= tail_len && strcmp(text + len - tail_len, tail) == 0;
}

loci_status loci_model_check_folder(const char *dir, loci_error *err) {
    if (ends_with(dir, ".gguf"))
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_FORMAT",
                                "%s is a GGUF file, which is not supported; use the folder that it "
                                "was made from, with config.json, tokenizer.json and *.safetensors",
                                dir);
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
                            "%s: architecture %.100s is not supported; those that are: "
                            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
                            "Qwen3ForCausalLM, SmolLM3ForCausalLM",
                            in->what, name);
}

/* Members of other models' configurations that change the computation: refused unless they are
 * missing, null, false or zero. */
static const struct {
    const char *key, *what;
} foreign_members[] = {
    {"num_experts", "mixture of experts"},
    {"num_local_experts", "mixture of experts"},
    {"n_routed_experts", "mixture of experts"},
    {"kv_lora_rank", "multi-head latent attention"},
    {"q_lora_rank", "multi-head latent attention"},
    {"attention_bias", "a bias of all attention projections"},
    {"mlp_bias", "a bias of the MLP"},
    {"qk_layernorm", "LayerNorm of queries and keys"},
    {"use_qk_norm", "norm of queries and keys by a flag"},
    {"attention_chunk_size", "chunked attention"},
    {"dual_chunk_attention_config", "dual chunk attention"},
    {"attn_logit_softcapping", "capped logits"},
    {"final_logit_softcapping", "capped logits"},
    {"clip_qkv", "clipped projections"},
    {"query_pre_attn_scalar", "another scale of attention"},
    {"attention_multiplier", "another scale of attention"},
    {"embedding_multiplier", "scaled embeddings"},
    {"residual_multiplier", "scaled residuals"},
    {"logits_scaling", "scaled logits"},
    {"logit_scale", "scaled logits"},
    {"compression_config", "compressed weights"},
    {"cross_attention_layers", "cross-attention"},
    {"vision_config", "vision"},
    {"audio_config", "audio"},
};

static bool is_set(const json_t *value) {
    if (!value || json_is_false(value)) return false;
    return !json_is_number(value) || json_number_value(value) < 0 || json_number_value(value) > 0;
}

static loci_status refuse_foreign(const loci_json *in, loci_error *err) {
    for (size_t i = 0; i < sizeof foreign_members / sizeof foreign_members[0]; i++)
        if (is_set(loci_json_member(in, foreign_members[i].key)))
            return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_OPTION",
                                    "%s: \"%s\" (%s) is not supported", in->what,
                                    foreign_members[i].key, foreign_members[i].what);
    return LOCI_OK;
}

/* Options that change the computation and are not built. */
static loci_status refuse_options(const loci_json *in, loci_error *err) {
    LOCI_TRY(refuse_foreign(in, err));
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

static loci_status read_head_dim(const loci_json *in, const architecture *arch,
                                 loci_model_config *out, loci_error *err) {
    const loci_json_need need = arch->head_dim ? LOCI_JSON_REQUIRED : LOCI_JSON_OPTIONAL;
    out->head_dim = 0;
    LOCI_TRY(loci_json_u32(in, "head_dim", need, 1, UINT32_MAX, &out->head_dim, err));
    if (out->head_dim == 0 && out->hidden % out->q_heads != 0)
        return loci_fail(err, LOCI_E_INVAL,
                         "%s: hidden_size %u is not a multiple of num_attention_heads %u and "
                         "there is no head_dim",
                         in->what, out->hidden, out->q_heads);
    if (out->head_dim == 0) out->head_dim = out->hidden / out->q_heads;
    if (out->head_dim % 2 != 0 || out->head_dim == 0 || out->head_dim > LOCI_HEAD_DIM_MAX)
        return loci_fail(err, LOCI_E_INVAL, "%s: head_dim %u is not an even number up to %u",
                         in->what, out->head_dim, LOCI_HEAD_DIM_MAX);
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
    return LOCI_OK;
}

/* One id or a list of them, each of which ends a text; and the id that begins one, if any. */
static loci_status read_ends(const loci_json *in, loci_model_config *out, loci_error *err) {
    const json_t *eos = loci_json_member(in, "eos_token_id");
    if (!eos) return loci_fail(err, LOCI_E_INVAL, "%s lacks \"eos_token_id\"", in->what);
    size_t count = json_is_array(eos) ? json_array_size(eos) : 1;
    if (count == 0 || count > LOCI_EOS_MAX)
        return loci_fail(err, LOCI_E_INVAL, "%s: \"eos_token_id\" lists %zu ids, not 1 to %d",
                         in->what, count, LOCI_EOS_MAX);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_is_array(eos) ? json_array_get(eos, i) : eos;
        json_int_t id = json_integer_value(value);
        if (!json_is_integer(value))
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: \"eos_token_id\" is neither an integer nor a list of integers",
                             in->what);
        if (id < 0 || id >= (json_int_t)out->vocab)
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: eos_token_id %lld is outside the vocabulary of %u", in->what,
                             (long long)id, out->vocab);
        out->eos[out->eos_count++] = (uint32_t)id;
    }
    out->eos_id = out->eos[0];
    out->bos_id = UINT32_MAX;
    return loci_json_u32(in, "bos_token_id", LOCI_JSON_OPTIONAL, 0, out->vocab - 1, &out->bos_id,
                         err);
}

/* Which layers have positions: the list, else every no_rope_layer_interval-th (SmolLM3: fourth)
 * has none. */
static loci_status read_nope(const loci_json *in, const architecture *arch, loci_model_config *out,
                             loci_error *err) {
    for (uint32_t i = 0; i < out->layers; i++) out->layer[i].rope = true;
    if (!arch->nope) return LOCI_OK;
    const json_t *list = NULL;
    LOCI_TRY(loci_json_array(in, "no_rope_layers", LOCI_JSON_OPTIONAL, &list, err));
    uint32_t interval = 4;
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

/* layer_types states for each layer what the architecture's own rule would also say, or, where the
 * rule asks for use_sliding_window, decides in its place. */
static loci_status read_layer_types(const loci_json *in, const architecture *arch,
                                    const json_t *types, uint32_t window, loci_model_config *out,
                                    loci_error *err) {
    if (json_array_size(types) != out->layers)
        return loci_fail(err, LOCI_E_INVAL, "%s: layer_types has %zu entries for %u layers",
                         in->what, json_array_size(types), out->layers);
    bool fixed = arch->window == WINDOW_NEVER || arch->window == WINDOW_ALL;
    for (uint32_t i = 0; i < out->layers; i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type)
            return loci_fail(err, LOCI_E_INVAL, "%s: layer_types[%u] is not a string", in->what, i);
        bool sliding = strcmp(type, "sliding_attention") == 0;
        if ((!sliding && strcmp(type, "full_attention") != 0) ||
            (fixed && sliding != (out->layer[i].window > 0)))
            return loci_fail(err, LOCI_E_UNSUPPORTED,
                             "%s: layer type \"%.40s\" of layer %u is not supported in %s",
                             in->what, type, i, arch->name);
        if (sliding && window == 0)
            return loci_fail(err, LOCI_E_INVAL,
                             "%s: layer %u is sliding_attention without use_sliding_window true "
                             "and a sliding_window",
                             in->what, i);
        out->layer[i].window = sliding ? window : 0;
    }
    return LOCI_OK;
}

/* *window: of the layers that have one; 0 when none has. */
static loci_status read_window(const loci_json *in, const architecture *arch, uint32_t *window,
                               loci_error *err) {
    bool sliding = arch->window == WINDOW_ALL;
    *window = 0;
    if (arch->window == WINDOW_NEVER && loci_json_member(in, "sliding_window"))
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: \"sliding_window\" is not supported in %s",
                         in->what, arch->name);
    if (arch->window == WINDOW_NEVER) return LOCI_OK;
    /* null means "none"; missing would mean a default of the architecture. */
    if (arch->window == WINDOW_ALL && !json_object_get(in->object, "sliding_window"))
        return loci_fail(err, LOCI_E_INVAL, "%s lacks \"sliding_window\"", in->what);
    if (arch->window != WINDOW_ALL)
        LOCI_TRY(loci_json_bool(in, "use_sliding_window", LOCI_JSON_OPTIONAL, &sliding, err));
    LOCI_TRY(loci_json_u32(in, "sliding_window", LOCI_JSON_OPTIONAL, 1, 1u << 30, window, err));
    if (!sliding) *window = 0;
    return LOCI_OK;
}

static loci_status read_windows(const loci_json *in, const architecture *arch,
                                loci_model_config *out, loci_error *err) {
    uint32_t window, full = 0; /* WINDOW_UPPER: layers below the first with a window */
    const json_t *types = NULL;
    LOCI_TRY(read_window(in, arch, &window, err));
    LOCI_TRY(loci_json_array(in, "layer_types", LOCI_JSON_OPTIONAL, &types, err));
    if (arch->window == WINDOW_UPPER && window > 0 && !types)
        LOCI_TRY(
            loci_json_u32(in, "max_window_layers", LOCI_JSON_REQUIRED, 0, UINT32_MAX, &full, err));
    for (uint32_t i = 0; i < out->layers; i++) {
        bool has = arch->window == WINDOW_NOPE ? !out->layer[i].rope : i >= full;
        out->layer[i].window = has ? window : 0;
    }
    return types ? read_layer_types(in, arch, types, window, out, err) : LOCI_OK;
}

/* The corpus is reached from the layers without positions that see everything, where the model
 * has such layers; else from all that see everything; else, where all have a window, from all. */
static void choose_retrieval_layers(loci_model_config *out) {
    bool nope = false, full = false;
    for (uint32_t i = 0; i < out->layers; i++) {
        full = full || out->layer[i].window == 0;
        nope = nope || (out->layer[i].window == 0 && !out->layer[i].rope);
    }
    for (uint32_t i = 0; i < out->layers; i++) {
        loci_layer_config *layer = &out->layer[i];
        layer->retrieval = (!full || layer->window == 0) && (!nope || !layer->rope);
        if (layer->retrieval) out->retrieval_layer[out->retrieval_count++] = i;
    }
}

/* What is ours in config.json stands in one object that others do not read. */
static loci_status read_own(const loci_json *in, loci_model_config *out, loci_error *err) {
    loci_json own = {0};
    LOCI_TRY(loci_json_object(in, "loci", in->what, LOCI_JSON_OPTIONAL, &own, err));
    if (!own.object) return LOCI_OK;
    return loci_json_u32(&own, "attention_scale_tokens", LOCI_JSON_OPTIONAL, 2, 1u << 30,
                         &out->attention_scale_tokens, err);
}

float loci_model_attention_scale(const loci_model_config *config, uint64_t tokens) {
    uint32_t base = config->attention_scale_tokens;
    if (base < 2 || tokens <= base) return 1.0f;
    return (float)(log((double)tokens) / log((double)base));
}

static loci_status read_config(const loci_json *in, loci_model_config *out, loci_error *err) {
    const architecture *arch = NULL;
    LOCI_TRY(read_architecture(in, &arch, out, err));
    LOCI_TRY(refuse_options(in, err));
    LOCI_TRY(read_sizes(in, out, err));
    LOCI_TRY(read_head_dim(in, arch, out, err));
    LOCI_TRY(read_ends(in, out, err));
    LOCI_TRY(loci_rope_read(in, out, err));
    out->qkv_bias = arch->qkv_bias;
    out->head_norm = arch->head_norm;
    out->tied_embeddings = arch->tied_embeddings;
    LOCI_TRY(
        loci_json_bool(in, "tie_word_embeddings", LOCI_JSON_OPTIONAL, &out->tied_embeddings, err));
    LOCI_TRY(read_nope(in, arch, out, err));
    LOCI_TRY(read_windows(in, arch, out, err));
    choose_retrieval_layers(out);
    return read_own(in, out, err);
}

loci_status loci_model_config_load(const char *dir, loci_model_config *out, loci_error *err) {
    LOCI_TRY(loci_model_check_folder(dir, err));
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
