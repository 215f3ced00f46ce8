/* SPDX-License-Identifier: Apache-2.0
 *
 * config.json: the built-in model's, the rules for layers, and everything that is refused.
 */
#include "support.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"
#include "model/rope.h"

static const char base[] =
    "{\"architectures\": [\"SmolLM3ForCausalLM\"], \"vocab_size\": 1000, \"hidden_size\": 96,"
    " \"intermediate_size\": 256, \"num_hidden_layers\": 4, \"num_attention_heads\": 6,"
    " \"num_key_value_heads\": 2, \"max_position_embeddings\": 2048, \"rms_norm_eps\": 1e-5,"
    " \"rope_theta\": 50000, \"eos_token_id\": 7}";

/* Writes `base` with the members of `changes` over it; a member that is "-" is removed. */
static void write_config(const char *changes) {
    json_t *config = json_loads(base, 0, NULL);
    json_t *over = json_loads(changes, 0, NULL);
    assert_non_null(config);
    if (!over) fail_msg("the test's own JSON is wrong: %s", changes);
    const char *key;
    json_t *value;
    json_object_foreach(over, key, value) {
        if (json_is_string(value) && strcmp(json_string_value(value), "-") == 0)
            json_object_del(config, key);
        else
            json_object_set(config, key, value);
    }
    char *text = json_dumps(config, 0);
    write_text("config.json", text);
    free(text);
    json_decref(over);
    json_decref(config);
}

static void load_ok(const char *folder, loci_model_config *out) {
    loci_error err = {0};
    if (loci_model_config_load(folder, out, &err) != LOCI_OK) fail_msg("%s", err.text);
}

static void test_built_in(void **state) {
    (void)state;
    loci_model_config c;
    load_ok("model/default", &c);
    assert_string_equal(c.architecture, "SmolLM3ForCausalLM");
    assert_int_equal(c.vocab, 8192);
    assert_int_equal(c.hidden, 384);
    assert_int_equal(c.intermediate, 1024);
    assert_int_equal(c.layers, 12);
    assert_int_equal(c.q_heads, 6);
    assert_int_equal(c.kv_heads, 2);
    assert_int_equal(c.head_dim, 64);
    assert_int_equal(c.positions_max, 32768);
    assert_true(c.rms_eps > 0.9e-6f && c.rms_eps < 1.1e-6f);
    assert_true(c.rope_theta > 9999 && c.rope_theta < 10001);
    assert_true(c.tied_embeddings);
    assert_int_equal(c.eos_id, 2);
    assert_int_equal(c.retrieval_count, 3);
    static const uint32_t retrieval[] = {5, 8, 11};
    for (uint32_t i = 0; i < 3; i++) assert_int_equal(c.retrieval_layer[i], retrieval[i]);
    for (uint32_t i = 0; i < 12; i++) {
        bool nope = i == 5 || i == 8 || i == 11;
        assert_int_equal(c.layer[i].rope, !nope);
        assert_int_equal(c.layer[i].retrieval, nope);
        assert_int_equal(c.layer[i].window, nope ? 0 : 256);
    }
}

#define LLAMA "{\"architectures\": [\"LlamaForCausalLM\"]"
#define MISTRAL "{\"architectures\": [\"MistralForCausalLM\"]"
#define QWEN2 "{\"architectures\": [\"Qwen2ForCausalLM\"]"
#define QWEN3 "{\"architectures\": [\"Qwen3ForCausalLM\"], \"head_dim\": 32"
#define FULL4 "[\"full_attention\", \"full_attention\", \"full_attention\", \"full_attention\"]"
#define LLAMA3_ROPE                                                                               \
    "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4," \
    " \"original_max_position_embeddings\": 512"

/* What each set of changes makes of the four layers: r = rope, w = window, R = retrieval. */
static const struct {
    const char *changes;
    const char *layers[4];
} layer_rules[] = {
    /* every fourth layer has no positions, by default */
    {"{}", {"r", "r", "r", "R"}},
    {"{\"no_rope_layer_interval\": 2}", {"r", "R", "r", "R"}},
    {"{\"no_rope_layers\": [0, 1, 1, 1, 0], \"no_rope_layer_interval\": 2}", {"R", "r", "r", "r"}},
    /* without a layer of that kind all layers reach the corpus */
    {"{\"no_rope_layers\": [1, 1, 1, 1]}", {"rR", "rR", "rR", "rR"}},
    {"{\"no_rope_layer_interval\": 5}", {"rR", "rR", "rR", "rR"}},
    {"{\"sliding_window\": 8, \"use_sliding_window\": true, \"layer_types\": [\"full_attention\","
     " \"sliding_attention\", \"full_attention\", \"full_attention\"]}",
     {"r", "rw", "r", "R"}},
    /* a layer without positions but with a window is no retrieval layer */
    {"{\"sliding_window\": 8, \"use_sliding_window\": true, \"no_rope_layers\": [0, 1, 1, 0],"
     " \"layer_types\": [\"sliding_attention\", \"full_attention\", \"full_attention\","
     " \"full_attention\"]}",
     {"w", "r", "r", "R"}},
    /* without layer_types the window is of the layers without positions, as in transformers */
    {"{\"sliding_window\": 8, \"use_sliding_window\": true}", {"rR", "rR", "rR", "w"}},
    {"{\"sliding_window\": 8, \"use_sliding_window\": false}", {"r", "r", "r", "R"}},
    {LLAMA "}", {"rR", "rR", "rR", "rR"}},
    {LLAMA ", \"sliding_window\": null, \"use_sliding_window\": true, \"layer_types\": " FULL4 "}",
     {"rR", "rR", "rR", "rR"}},
    {MISTRAL ", \"sliding_window\": 8}", {"rwR", "rwR", "rwR", "rwR"}},
    {MISTRAL ", \"sliding_window\": null}", {"rR", "rR", "rR", "rR"}},
    {MISTRAL ", \"sliding_window\": 8, \"layer_types\": [\"sliding_attention\","
             " \"sliding_attention\", \"sliding_attention\", \"sliding_attention\"]}",
     {"rwR", "rwR", "rwR", "rwR"}},
    /* a window only if asked for, and only from max_window_layers on */
    {QWEN2 ", \"sliding_window\": 8, \"max_window_layers\": 2}", {"rR", "rR", "rR", "rR"}},
    {QWEN2 ", \"sliding_window\": 8, \"use_sliding_window\": true, \"max_window_layers\": 3}",
     {"rR", "rR", "rR", "rw"}},
    {QWEN2 ", \"sliding_window\": 8, \"use_sliding_window\": true, \"max_window_layers\": 0}",
     {"rwR", "rwR", "rwR", "rwR"}},
    {QWEN3 ", \"sliding_window\": 8, \"use_sliding_window\": true, \"layer_types\": "
           "[\"sliding_attention\", \"full_attention\", \"sliding_attention\","
           " \"full_attention\"]}",
     {"rw", "rR", "rw", "rR"}},
    {QWEN3 ", \"sliding_window\": null, \"layer_types\": " FULL4 "}", {"rR", "rR", "rR", "rR"}},
    /* only SmolLM3 has layers without positions */
    {QWEN3 ", \"no_rope_layers\": [0, 0, 0, 0], \"no_rope_layer_interval\": 2}",
     {"rR", "rR", "rR", "rR"}},
};

static void test_layer_rules(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof layer_rules / sizeof layer_rules[0]; i++) {
        loci_model_config c;
        write_config(layer_rules[i].changes);
        load_ok(dir, &c);
        uint32_t count = 0;
        for (uint32_t j = 0; j < 4; j++) {
            const char *want = layer_rules[i].layers[j];
            bool retrieval = strchr(want, 'R') != NULL;
            if (c.layer[j].rope != (strchr(want, 'r') != NULL) ||
                c.layer[j].window != (strchr(want, 'w') ? 8 : 0) ||
                c.layer[j].retrieval != retrieval)
                fail_msg("%s: layer %u is not \"%s\"", layer_rules[i].changes, j, want);
            if (retrieval) assert_int_equal(c.retrieval_layer[count++], j);
        }
        assert_int_equal(c.retrieval_count, count);
    }
}

static void test_defaults_and_spellings(void **state) {
    (void)state;
    loci_model_config c;
    write_config("{\"num_key_value_heads\": null, \"eos_token_id\": [9, 10]}");
    load_ok(dir, &c);
    assert_int_equal(c.head_dim, 16);
    assert_int_equal(c.kv_heads, 6);
    assert_int_equal(c.eos_id, 9);
    assert_true(c.tied_embeddings);
    write_config("{\"head_dim\": 64, \"tie_word_embeddings\": false, \"rope_theta\": \"-\","
                 " \"rope_scaling\": {\"type\": \"default\"},"
                 " \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 2e6}}");
    load_ok(dir, &c);
    assert_int_equal(c.head_dim, 64);
    assert_false(c.tied_embeddings);
    assert_true(c.rope_theta > 1.9e6f && c.rope_theta < 2.1e6f);
    write_config("{\"eos_token_id\": [9, 10, 11], \"attention_bias\": false, \"mlp_bias\": null,"
                 " \"num_experts\": 0, \"quantization_config\": null}");
    load_ok(dir, &c);
    assert_int_equal(c.eos_count, 3);
    assert_int_equal(c.eos[2], 11);
}

static void test_architectures(void **state) {
    (void)state;
    static const struct {
        const char *changes;
        bool tied, bias, norm;
    } rows[] = {{LLAMA "}", false, false, false},
                {MISTRAL ", \"sliding_window\": null}", false, false, false},
                {QWEN2 "}", false, true, false},
                {QWEN3 "}", false, false, true},
                {"{}", true, false, false}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        loci_model_config c;
        write_config(rows[i].changes);
        load_ok(dir, &c);
        assert_int_equal(c.tied_embeddings, rows[i].tied);
        assert_int_equal(c.qkv_bias, rows[i].bias);
        assert_int_equal(c.head_norm, rows[i].norm);
        assert_int_equal(c.head_dim, rows[i].norm ? 32 : 16);
        assert_true(c.rope_scaling.factor <= 0);
    }
}

/* Both spellings; frequencies as transformers computes them. */
static void test_llama3_rope(void **state) {
    (void)state;
    static const float expected[] = {1.0f,
                                     0.258600146f,
                                     0.0668740347f,
                                     0.00422575977f,
                                     0.000559017004f,
                                     0.000144561869f,
                                     3.73837211e-05f,
                                     9.66743482e-06f};
    static const char *const spellings[] = {
        LLAMA ", \"rope_scaling\": " LLAMA3_ROPE "}}",
        LLAMA ", \"rope_theta\": \"-\", \"rope_parameters\": " LLAMA3_ROPE
              ", \"rope_theta\": 50000}}",
        LLAMA ", \"rope_scaling\": " LLAMA3_ROPE "}, \"rope_parameters\": " LLAMA3_ROPE "}}",
    };
    for (size_t i = 0; i < sizeof spellings / sizeof *spellings; i++) {
        loci_model_config c;
        float frequencies[8];
        write_config(spellings[i]);
        load_ok(dir, &c);
        assert_int_equal(c.rope_scaling.positions_max, 512);
        loci_rope_frequencies(&c, frequencies);
        for (size_t j = 0; j < sizeof expected / sizeof *expected; j++)
            if (fabsf(frequencies[j] - expected[j]) > 2e-6f * expected[j])
                fail_msg("frequency %zu: %.9g", j, (double)frequencies[j]);
    }
}

static const struct {
    const char *changes;
    loci_status status;
    const char *says;
} refused[] = {
    {"{\"architectures\": [\"MambaForCausalLM\"]}", LOCI_E_UNSUPPORTED, "MambaForCausalLM"},
    {"{\"architectures\": []}", LOCI_E_INVAL, "architectures"},
    {"{\"architectures\": \"-\"}", LOCI_E_INVAL, "lacks \"architectures\""},
    {"{\"rope_scaling\": {\"rope_type\": \"yarn\"}}", LOCI_E_UNSUPPORTED, "type \"yarn\""},
    {"{\"rope_scaling\": {\"type\": \"linear\"}}", LOCI_E_UNSUPPORTED, "type \"linear\""},
    {"{\"rope_scaling\": {\"rope_type\": \"dynamic\"}}", LOCI_E_UNSUPPORTED, "type \"dynamic\""},
    {"{\"rope_scaling\": {\"rope_type\": \"longrope\"}}", LOCI_E_UNSUPPORTED, "\"longrope\""},
    {"{\"rope_scaling\": {\"type\": \"mrope\"}}", LOCI_E_UNSUPPORTED, "type \"mrope\""},
    {"{\"rope_scaling\": {\"type\": \"yarn\", \"rope_type\": \"default\"}}", LOCI_E_INVAL,
     "of type \"yarn\" and \"default\""},
    {"{\"rope_scaling\": 8}", LOCI_E_INVAL, "\"rope_scaling\" is not an object"},
    {"{\"rope_parameters\": {\"rope_type\": \"llama3\"}}", LOCI_E_INVAL, "lacks \"factor\""},
    {"{\"rope_scaling\": " LLAMA3_ROPE "}, \"rope_parameters\": {\"rope_type\": \"default\"}}",
     LOCI_E_INVAL, "disagree"},
    {"{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4,"
     " \"high_freq_factor\": 4, \"original_max_position_embeddings\": 512}}",
     LOCI_E_INVAL, "high_freq_factor 4 is not above"},
    {"{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 0.5, \"low_freq_factor\": 1,"
     " \"high_freq_factor\": 4, \"original_max_position_embeddings\": 512}}",
     LOCI_E_INVAL, "\"factor\" is 0.5"},
    {"{\"rope_parameters\": {\"rope_theta\": 1e6}}", LOCI_E_INVAL, "rope_theta is 50000, but"},
    {"{\"rope_parameters\": {\"partial_rotary_factor\": 0.5}}", LOCI_E_UNSUPPORTED, "partial"},
    {"{\"partial_rotary_factor\": 0.5}", LOCI_E_UNSUPPORTED, "partial_rotary_factor"},
    {"{\"rope_theta\": \"-\"}", LOCI_E_INVAL, "lacks \"rope_theta\""},
    {"{\"rope_theta\": 0}", LOCI_E_INVAL, "rope_theta"},
    {"{\"attention_bias\": true}", LOCI_E_UNSUPPORTED, "attention_bias"},
    {"{\"mlp_bias\": true}", LOCI_E_UNSUPPORTED, "mlp_bias"},
    {LLAMA ", \"attention_bias\": true}", LOCI_E_UNSUPPORTED, "attention_bias"},
    {QWEN3 ", \"attention_bias\": \"yes\"}", LOCI_E_UNSUPPORTED, "attention_bias"},
    {QWEN3 ", \"num_experts\": 128}", LOCI_E_UNSUPPORTED, "\"num_experts\" (mixture of experts)"},
    {LLAMA ", \"num_local_experts\": 8}", LOCI_E_UNSUPPORTED, "mixture of experts"},
    {LLAMA ", \"n_routed_experts\": 8}", LOCI_E_UNSUPPORTED, "mixture of experts"},
    {LLAMA ", \"kv_lora_rank\": 512}", LOCI_E_UNSUPPORTED, "\"kv_lora_rank\" (multi-head latent"},
    {LLAMA ", \"q_lora_rank\": 512}", LOCI_E_UNSUPPORTED, "\"q_lora_rank\" (multi-head latent"},
    {LLAMA ", \"final_logit_softcapping\": 30.0}", LOCI_E_UNSUPPORTED, "capped logits"},
    {LLAMA ", \"attn_logit_softcapping\": 50.0}", LOCI_E_UNSUPPORTED, "capped logits"},
    {LLAMA ", \"query_pre_attn_scalar\": 256}", LOCI_E_UNSUPPORTED, "query_pre_attn_scalar"},
    {LLAMA ", \"attention_multiplier\": 0.1}", LOCI_E_UNSUPPORTED, "attention_multiplier"},
    {LLAMA ", \"embedding_multiplier\": 12.0}", LOCI_E_UNSUPPORTED, "embedding_multiplier"},
    {LLAMA ", \"residual_multiplier\": 0.2}", LOCI_E_UNSUPPORTED, "residual_multiplier"},
    {LLAMA ", \"logits_scaling\": 8.0}", LOCI_E_UNSUPPORTED, "logits_scaling"},
    {LLAMA ", \"logit_scale\": 0.06}", LOCI_E_UNSUPPORTED, "logit_scale"},
    {LLAMA ", \"clip_qkv\": 8.0}", LOCI_E_UNSUPPORTED, "clip_qkv"},
    {LLAMA ", \"qk_layernorm\": true}", LOCI_E_UNSUPPORTED, "qk_layernorm"},
    {LLAMA ", \"use_qk_norm\": true}", LOCI_E_UNSUPPORTED, "use_qk_norm"},
    {LLAMA ", \"attention_chunk_size\": 8192}", LOCI_E_UNSUPPORTED, "chunked attention"},
    {QWEN2 ", \"dual_chunk_attention_config\": {}}", LOCI_E_UNSUPPORTED, "dual chunk"},
    {LLAMA ", \"compression_config\": {}}", LOCI_E_UNSUPPORTED, "compressed weights"},
    {LLAMA ", \"cross_attention_layers\": [3]}", LOCI_E_UNSUPPORTED, "cross-attention"},
    {LLAMA ", \"vision_config\": {}}", LOCI_E_UNSUPPORTED, "vision_config"},
    {LLAMA ", \"audio_config\": {}}", LOCI_E_UNSUPPORTED, "audio_config"},
    {LLAMA ", \"hidden_act\": \"gelu_pytorch_tanh\"}", LOCI_E_UNSUPPORTED, "gelu_pytorch_tanh"},
    {LLAMA ", \"sliding_window\": 8}", LOCI_E_UNSUPPORTED,
     "\"sliding_window\" is not supported in"},
    {LLAMA ", \"layer_types\": [\"full_attention\", \"full_attention\", \"full_attention\","
           " \"sliding_attention\"]}",
     LOCI_E_UNSUPPORTED, "layer type \"sliding_attention\" of layer 3 is not supported in Llama"},
    {MISTRAL "}", LOCI_E_INVAL, "lacks \"sliding_window\""},
    {MISTRAL ", \"sliding_window\": 8, \"layer_types\": " FULL4 "}", LOCI_E_UNSUPPORTED,
     "layer type \"full_attention\" of layer 0 is not supported in Mistral"},
    {QWEN2 ", \"use_sliding_window\": true, \"sliding_window\": 8}", LOCI_E_INVAL,
     "lacks \"max_window_layers\""},
    {"{\"architectures\": [\"Qwen3ForCausalLM\"]}", LOCI_E_INVAL, "lacks \"head_dim\""},
    {"{\"architectures\": [\"Qwen3MoeForCausalLM\"]}", LOCI_E_UNSUPPORTED, "Qwen3MoeForCausalLM"},
    {"{\"architectures\": [\"MixtralForCausalLM\"]}", LOCI_E_UNSUPPORTED, "MixtralForCausalLM"},
    {"{\"architectures\": [\"DeepseekV3ForCausalLM\"]}", LOCI_E_UNSUPPORTED, "DeepseekV3"},
    {"{\"architectures\": [\"LlamaForCausalLM\", \"x\"]}", LOCI_E_INVAL, "not one name"},
    {"{\"hidden_act\": \"gelu\"}", LOCI_E_UNSUPPORTED, "gelu"},
    {"{\"quantization_config\": {\"quant_method\": \"gptq\"}}", LOCI_E_UNSUPPORTED, "gptq"},
    {"{\"quantization_config\": {}}", LOCI_E_UNSUPPORTED, "quantized"},
    {"{\"vocab_size\": 0}", LOCI_E_INVAL, "\"vocab_size\" is 0"},
    {"{\"vocab_size\": \"8\"}", LOCI_E_INVAL, "not an integer"},
    {"{\"vocab_size\": \"-\"}", LOCI_E_INVAL, "lacks \"vocab_size\""},
    {"{\"hidden_size\": -8}", LOCI_E_INVAL, "hidden_size"},
    {"{\"hidden_size\": 4294967296}", LOCI_E_INVAL, "hidden_size"},
    {"{\"intermediate_size\": 0}", LOCI_E_INVAL, "intermediate_size"},
    {"{\"num_hidden_layers\": 257}", LOCI_E_INVAL, "num_hidden_layers"},
    {"{\"num_attention_heads\": 0}", LOCI_E_INVAL, "num_attention_heads"},
    {"{\"num_key_value_heads\": 4}", LOCI_E_INVAL, "6 is not a multiple of"},
    {"{\"num_key_value_heads\": 12}", LOCI_E_INVAL, "num_key_value_heads"},
    {"{\"num_key_value_heads\": \"-\"}", LOCI_E_INVAL, "lacks \"num_key_value_heads\""},
    {"{\"hidden_size\": 100}", LOCI_E_INVAL, "not a multiple of num_attention_heads"},
    {"{\"head_dim\": 15}", LOCI_E_INVAL, "head_dim 15"},
    {"{\"hidden_size\": 90}", LOCI_E_INVAL, "head_dim 15"},
    {"{\"hidden_size\": 60000}", LOCI_E_INVAL, "head_dim 10000"},
    {"{\"max_position_embeddings\": 0}", LOCI_E_INVAL, "max_position_embeddings"},
    {"{\"rms_norm_eps\": 0}", LOCI_E_INVAL, "rms_norm_eps"},
    {"{\"rms_norm_eps\": \"-\"}", LOCI_E_INVAL, "lacks \"rms_norm_eps\""},
    {"{\"eos_token_id\": 1000}", LOCI_E_INVAL, "outside the vocabulary"},
    {"{\"eos_token_id\": []}", LOCI_E_INVAL, "eos_token_id"},
    {"{\"eos_token_id\": [1, 2, 3, 4, 5, 6, 7, 8, 9]}", LOCI_E_INVAL, "lists 9 ids"},
    {"{\"eos_token_id\": [1, 1000]}", LOCI_E_INVAL, "1000 is outside the vocabulary"},
    {"{\"eos_token_id\": [1, \"2\"]}", LOCI_E_INVAL, "list of integers"},
    {"{\"head_dim\": 258}", LOCI_E_INVAL, "head_dim 258 is not an even number up to 256"},
    {"{\"eos_token_id\": null}", LOCI_E_INVAL, "lacks \"eos_token_id\""},
    {"{\"no_rope_layers\": [1, 1, 0]}", LOCI_E_INVAL, "3 entries for 4 layers"},
    {"{\"no_rope_layers\": [1, 2, 0, 0]}", LOCI_E_INVAL, "no_rope_layers[1]"},
    {"{\"no_rope_layer_interval\": 0}", LOCI_E_INVAL, "no_rope_layer_interval"},
    {"{\"layer_types\": [\"full_attention\"]}", LOCI_E_INVAL, "1 entries for 4 layers"},
    {"{\"layer_types\": [1, 2, 3, 4]}", LOCI_E_INVAL, "layer_types[0]"},
    {"{\"layer_types\": [\"full_attention\", \"full_attention\", \"full_attention\","
     " \"linear_attention\"]}",
     LOCI_E_UNSUPPORTED, "linear_attention"},
    {"{\"sliding_window\": 8, \"layer_types\": [\"full_attention\", \"full_attention\","
     " \"full_attention\", \"sliding_attention\"]}",
     LOCI_E_INVAL, "layer 3 is sliding_attention without"},
    {"{\"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"full_attention\","
     " \"full_attention\", \"sliding_attention\"]}",
     LOCI_E_INVAL, "layer 3 is sliding_attention without"},
    {"{\"use_sliding_window\": true, \"sliding_window\": 0}", LOCI_E_INVAL, "sliding_window"},
    {"{\"loci\": 4096}", LOCI_E_INVAL, "\"loci\""},
    {"{\"loci\": {\"attention_scale_tokens\": 1}}", LOCI_E_INVAL, "attention_scale_tokens"},
    {"{\"loci\": {\"attention_scale_tokens\": 4.5}}", LOCI_E_INVAL, "attention_scale_tokens"},
};

static void expect_refusal(const char *what, loci_status expected, const char *says) {
    loci_model_config c;
    loci_error err = {0};
    loci_status status = loci_model_config_load(dir, &c, &err);
    if (status != expected || !strstr(err.text, says))
        fail_msg("%s: status %d, \"%s\"", what, status, err.text);
}

/* Logits over large corpora: max(1, ln n / ln base). */
static void test_attention_scale(void **state) {
    (void)state;
    loci_model_config c;
    write_config("{\"loci\": {\"attention_scale_tokens\": 1000}}");
    load_ok(dir, &c);
    assert_int_equal(c.attention_scale_tokens, 1000);
    assert_true(loci_model_attention_scale(&c, 0) == 1.0f);
    assert_true(loci_model_attention_scale(&c, 999) == 1.0f);
    assert_true(fabsf(loci_model_attention_scale(&c, 1000000) - 2.0f) < 1e-6f);
    assert_true(fabsf(loci_model_attention_scale(&c, 31623) - 1.5f) < 1e-5f);
    write_config("{\"loci\": {}}");
    load_ok(dir, &c);
    assert_true(loci_model_attention_scale(&c, 1000000) == 1.0f);
    write_config("{}");
    load_ok(dir, &c);
    assert_true(loci_model_attention_scale(&c, 1000000) == 1.0f);
}

static void test_refused(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        write_config(refused[i].changes);
        expect_refusal(refused[i].changes, refused[i].status, refused[i].says);
    }
}

static void test_refused_folders(void **state) {
    write_text("config.json", "{\"architectures\": ");
    expect_refusal("half a file", LOCI_E_CORRUPT, "config.json is not valid JSON");
    write_config("{}");
    write_text("model-q4.gguf", "GGUF");
    expect_refusal("gguf", LOCI_E_UNSUPPORTED, "holds model-q4.gguf but no .safetensors file");
    write_text("model.safetensors", "");
    loci_model_config c;
    load_ok(dir, &c);
    clear_dir(state);
    expect_refusal("no config.json", LOCI_E_NOTFOUND, "config.json cannot be opened");
    loci_error err;
    assert_int_equal(loci_model_config_load("/models/llama-q4.gguf", &c, &err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "llama-q4.gguf is a GGUF file"));
    assert_non_null(strstr(err.text, "*.safetensors"));
    assert_int_equal(loci_model_config_load("/no/such/folder", &c, &err), LOCI_E_NOTFOUND);
    assert_non_null(strstr(err.text, "/no/such/folder"));
}

/* --- Mutations -------------------------------------------------------------------------- */

/* A value such as no exporter writes. */
static json_t *odd_value(uint32_t *seed, const json_t *instead_of) {
    switch (xorshift(seed) % 12) {
    case 0: return json_null();
    case 1: return json_true();
    case 2: return json_integer(0);
    case 3: return json_integer(-1);
    case 4: return json_integer((json_int_t)1 << (xorshift(seed) % 63));
    case 5: return json_integer((json_int_t)(xorshift(seed) % 300));
    case 6: return json_real(1e300);
    case 7: return json_real(-0.5);
    case 8: return json_string("llama3");
    case 9: return json_array();
    case 10: return json_object();
    default: return json_deep_copy(instead_of);
    }
}

static void mutate(json_t *config, uint32_t *seed) {
    size_t count = json_object_size(config), chosen = xorshift(seed) % (count ? count : 1);
    const char *key;
    json_t *value;
    json_object_foreach(config, key, value) {
        if (chosen-- > 0) continue;
        if (json_is_object(value) && json_object_size(value) > 0 && xorshift(seed) % 4)
            mutate(value, seed);
        else if (json_is_array(value) && json_array_size(value) > 0 && xorshift(seed) % 4)
            json_array_set_new(value, xorshift(seed) % json_array_size(value),
                               odd_value(seed, json_array_get(value, 0)));
        else if (xorshift(seed) % 6 == 0)
            json_object_del(config, key);
        else
            json_object_set_new(config, key, odd_value(seed, value));
        return;
    }
}

/* Whatever loads must be sane; whatever does not must say why. */
static bool check_outcome(uint32_t seed) {
    loci_model_config c;
    loci_error err = {0};
    if (loci_model_config_load(dir, &c, &err) != LOCI_OK) {
        if (!err.text[0]) fail_msg("seed %u: refused without a word", seed);
        return false;
    }
    if (c.kv_heads == 0 || c.q_heads % c.kv_heads != 0 || c.head_dim == 0 || c.head_dim > 256 ||
        c.layers == 0 || c.layers > LOCI_LAYERS_MAX || c.retrieval_count > c.layers ||
        c.eos_count == 0 || c.eos_count > LOCI_EOS_MAX || c.eos_id >= c.vocab || c.vocab == 0)
        fail_msg("seed %u: a configuration that cannot be", seed);
    float frequencies[128];
    loci_rope_frequencies(&c, frequencies);
    for (uint32_t i = 0; i < c.head_dim / 2; i++)
        if (!(frequencies[i] >= 0 && frequencies[i] <= 1))
            fail_msg("seed %u: frequency %g", seed, (double)frequencies[i]);
    return true;
}

static void test_mutated_configs(void **state) {
    (void)state;
    static const char *const sound[] = {"3heads", "llama", "mistral", "qwen2", "qwen3"};
    unsigned loaded = 0, count = 0;
    for (uint32_t start = 1; start <= 2000; start++, count++) {
        uint32_t seed = start * 2654435761u | 1u;
        char path[128];
        snprintf(path, sizeof path, "tests/data/model/tiny-%s/config.json", sound[start % 5]);
        json_t *config = json_load_file(path, 0, NULL);
        assert_non_null(config);
        for (uint32_t i = xorshift(&seed) % 3 + 1; i > 0; i--) mutate(config, &seed);
        char *text = json_dumps(config, 0);
        assert_non_null(text);
        size_t len = strlen(text);
        /* A quarter is also damaged as text. */
        if (start % 4 == 0) text[xorshift(&seed) % len] = (char)(xorshift(&seed) % 255 + 1);
        write_text("config.json", text);
        loaded += check_outcome(start);
        free(text);
        json_decref(config);
    }
    /* Mutations that change nothing of importance load; most do not. */
    assert_true(loaded > count / 20 && loaded < count * 3 / 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_built_in),
        cmocka_unit_test(test_layer_rules),
        cmocka_unit_test(test_defaults_and_spellings),
        cmocka_unit_test(test_attention_scale),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_refused_folders),
        cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_llama3_rope),
        cmocka_unit_test(test_mutated_configs),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
