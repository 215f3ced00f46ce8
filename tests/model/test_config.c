/* SPDX-License-Identifier: Apache-2.0
 *
 * config.json: the built-in model's, the rules for layers, and everything that is refused.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/config.h"

static char dir[] = "/tmp/loci-config-XXXXXX";

static int make_dir(void **state) {
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static void path_of(char *out, size_t size, const char *name) {
    snprintf(out, size, "%s/%s", dir, name);
}

static int remove_dir(void **state) {
    (void)state;
    char path[256];
    path_of(path, sizeof path, "config.json");
    unlink(path);
    return rmdir(dir);
}

static void write_file(const char *name, const char *text) {
    char path[256];
    path_of(path, sizeof path, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

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
    write_file("config.json", text);
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
    {"{\"sliding_window\": 8, \"use_sliding_window\": true}", {"rR", "rR", "rR", "wR"}},
    {"{\"sliding_window\": 8, \"use_sliding_window\": false}", {"r", "r", "r", "R"}},
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
    {"{\"rope_parameters\": {\"rope_type\": \"llama3\"}}", LOCI_E_UNSUPPORTED, "llama3"},
    {"{\"rope_parameters\": {\"rope_theta\": 1e6}}", LOCI_E_INVAL, "rope_theta is 50000, but"},
    {"{\"rope_parameters\": {\"partial_rotary_factor\": 0.5}}", LOCI_E_UNSUPPORTED, "partial"},
    {"{\"partial_rotary_factor\": 0.5}", LOCI_E_UNSUPPORTED, "partial_rotary_factor"},
    {"{\"rope_theta\": \"-\"}", LOCI_E_INVAL, "lacks \"rope_theta\""},
    {"{\"rope_theta\": 0}", LOCI_E_INVAL, "rope_theta"},
    {"{\"attention_bias\": true}", LOCI_E_UNSUPPORTED, "attention_bias"},
    {"{\"mlp_bias\": true}", LOCI_E_UNSUPPORTED, "mlp_bias"},
    {"{\"mlp_bias\": 0}", LOCI_E_INVAL, "not true or false"},
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
};

static void expect_refusal(const char *what, loci_status expected, const char *says) {
    loci_model_config c;
    loci_error err = {0};
    loci_status status = loci_model_config_load(dir, &c, &err);
    if (status != expected || !strstr(err.text, says))
        fail_msg("%s: status %d, \"%s\"", what, status, err.text);
}

static void test_refused(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        write_config(refused[i].changes);
        expect_refusal(refused[i].changes, refused[i].status, refused[i].says);
    }
}

static void test_refused_folders(void **state) {
    (void)state;
    char gguf[256], safetensors[256], path[256];
    write_file("config.json", "{\"architectures\": ");
    expect_refusal("half a file", LOCI_E_CORRUPT, "config.json is not valid JSON");
    write_config("{}");
    path_of(gguf, sizeof gguf, "model-q4.gguf");
    write_file("model-q4.gguf", "GGUF");
    expect_refusal("gguf", LOCI_E_UNSUPPORTED, "holds model-q4.gguf but no .safetensors file");
    path_of(safetensors, sizeof safetensors, "model.safetensors");
    write_file("model.safetensors", "");
    loci_model_config c;
    load_ok(dir, &c);
    unlink(gguf);
    unlink(safetensors);
    path_of(path, sizeof path, "config.json");
    unlink(path);
    expect_refusal("no config.json", LOCI_E_NOTFOUND, "config.json cannot be opened");
    loci_error err;
    assert_int_equal(loci_model_config_load("/no/such/folder", &c, &err), LOCI_E_NOTFOUND);
    assert_non_null(strstr(err.text, "/no/such/folder"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_built_in),
        cmocka_unit_test(test_layer_rules),
        cmocka_unit_test(test_defaults_and_spellings),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_refused_folders),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
