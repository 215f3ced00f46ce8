/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening model folders whose configuration and weights do not fit each other, or are damaged: each
 * is refused by name, whatever opens also runs, and nothing crashes.
 */
#include "support.h"

#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "model/model.h"

static loci_backend *backend;

static int set_up(void **state) {
    loci_backend_options options = {1, NULL};
    if (make_dir(state) != 0) return -1;
    return loci_backend_open("cpu", &options, &backend, NULL);
}

static int tear_down(void **state) {
    loci_backend_close(backend);
    return remove_dir(state);
}

/* Copies one file of a tiny model, `from`, if not NULL, replaced by `to` of the same length. */
static void copy_file(const char *model, const char *name, const char *from, const char *to) {
    char path[128];
    loci_buf data = LOCI_BUF_INIT;
    snprintf(path, sizeof path, "tests/data/model/tiny-%s/%s", model, name);
    read_file(path, &data);
    unsigned replaced = 0;
    size_t len = from ? strlen(from) : 0;
    for (uint8_t *at = data.data; from; at += len, replaced++) {
        at = memmem(at, (size_t)(data.data + data.len - at), from, len);
        if (!at) break;
        memcpy(at, to, len);
    }
    assert_true(!from || (replaced > 0 && strlen(to) == len));
    write_file(name, data.data, data.len);
    loci_buf_fini(&data);
}

/* The config.json of a tiny model with the members of `changes` over it; NULL: removed. */
static void copy_config(const char *model, const char *changes) {
    char path[128];
    snprintf(path, sizeof path, "tests/data/model/tiny-%s/config.json", model);
    json_t *config = json_load_file(path, 0, NULL), *over = json_loads(changes, 0, NULL);
    assert_non_null(config);
    if (!over) fail_msg("the test's own JSON is wrong: %s", changes);
    json_object_update(config, over);
    char *text = json_dumps(config, 0);
    write_text("config.json", text);
    free(text);
    json_decref(over);
    json_decref(config);
}

static void copy_model(const char *model, const char *changes) {
    copy_config(model, changes);
    copy_file(model, "tokenizer.json", NULL, NULL);
    copy_file(model, "model.safetensors", NULL, NULL);
}

/* Runs a few tokens through a model that opened. */
static void run(loci_model *model) {
    uint32_t tokens[] = {1, 0, 2}, begin[] = {0, 3};
    const loci_model_config *c = loci_model_config_of(model);
    loci_error err = {0};
    loci_sequence *sequence;
    if (c->positions_max < 3 || c->vocab < 3) return;
    if (loci_sequence_open(model, 3, &sequence, &err) != LOCI_OK) fail_msg("%s", err.text);
    if (loci_sequence_append(sequence, tokens, 3, 1, -1, NULL, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    assert_non_null(loci_sequence_logits(sequence));
    loci_sequence_close(sequence);
    uint32_t pairs = c->retrieval_count * c->kv_heads;
    uint16_t **parts = calloc(pairs, sizeof *parts);
    uint16_t *sink = calloc(3 * (size_t)c->head_dim, sizeof *sink);
    assert_true(parts && sink);
    for (uint32_t i = 0; i < pairs; i++) parts[i] = sink;
    loci_encode_out out = {parts, parts};
    if (loci_model_encode(model, tokens, begin, 1, &out, NULL, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    free(sink);
    free((void *)parts);
}

static loci_status open_and_run(loci_error *err) {
    loci_model *model = NULL;
    *err = (loci_error){0};
    loci_status status = loci_model_open(dir, backend, LOCI_F32, &model, err);
    if (status == LOCI_OK) run(model);
    loci_model_close(model);
    return status;
}

static const struct {
    const char *model, *changes;
    loci_status status;
    const char *says;
} cases[] = {
    {"llama", "{}", LOCI_OK, ""},
    /* A configuration of one architecture over the weights of another. */
    {"llama", "{\"architectures\": [\"Qwen2ForCausalLM\"], \"rope_scaling\": null}",
     LOCI_E_NOTFOUND, "model.layers.0.self_attn.q_proj.bias"},
    {"llama", "{\"architectures\": [\"Qwen3ForCausalLM\"]}", LOCI_E_NOTFOUND,
     "model.layers.0.self_attn.q_norm.weight"},
    {"qwen2", "{\"architectures\": [\"LlamaForCausalLM\"], \"sliding_window\": null}",
     LOCI_E_UNSUPPORTED, "self_attn.k_proj.bias is no part of a LlamaForCausalLM"},
    {"qwen3", "{\"architectures\": [\"LlamaForCausalLM\"]}", LOCI_E_UNSUPPORTED,
     "self_attn.k_norm.weight is no part of a LlamaForCausalLM"},
    {"llama", "{\"architectures\": [\"MistralForCausalLM\"], \"sliding_window\": null}", LOCI_OK,
     ""},
    /* Sizes. */
    {"llama", "{\"intermediate_size\": 40}", LOCI_E_INVAL, "mlp.gate_proj.weight"},
    {"llama", "{\"hidden_size\": 64}", LOCI_E_INVAL, "embed_tokens"},
    {"llama", "{\"vocab_size\": 1000}", LOCI_E_INVAL, "embed_tokens"},
    {"llama", "{\"vocab_size\": 200}", LOCI_E_INVAL,
     "the tokenizer has 264 tokens, config.json says 200"},
    {"llama", "{\"head_dim\": 32}", LOCI_E_INVAL, "self_attn.q_proj.weight"},
    {"mistral", "{\"num_attention_heads\": 5}", LOCI_E_INVAL, "self_attn.q_proj.weight"},
    {"qwen3", "{\"num_key_value_heads\": 1}", LOCI_E_INVAL, "self_attn.k_proj.weight"},
    {"qwen2", "{\"num_hidden_layers\": 4}", LOCI_E_NOTFOUND, "model.layers.3."},
    {"qwen2", "{\"num_hidden_layers\": 2}", LOCI_E_UNSUPPORTED, "model.layers.2."},
    /* A head that is not there; one that is not asked for. */
    {"qwen2", "{\"tie_word_embeddings\": false}", LOCI_E_NOTFOUND, "lm_head.weight"},
    {"llama", "{\"tie_word_embeddings\": true}", LOCI_OK, ""},
};

static void test_configuration_and_weights(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        loci_error err;
        copy_model(cases[i].model, cases[i].changes);
        loci_status status = open_and_run(&err);
        if (status != cases[i].status || (status != LOCI_OK && !strstr(err.text, cases[i].says)))
            fail_msg("%s, %s: status %d, \"%s\"", cases[i].model, cases[i].changes, status,
                     err.text);
    }
}

static const struct {
    const char *model, *from, *to; /* in the header of the weights */
    loci_status status;
    const char *says;
} damaged[] = {
    {"qwen3", "layers.1.self_attn.k_norm.weight", "layers.1.self_attn.k_norn.weight",
     LOCI_E_NOTFOUND, "model.layers.1.self_attn.k_norm.weight"},
    {"qwen2", "layers.2.self_attn.v_proj.bias", "layers.2.self_attn.v_proj.bios", LOCI_E_NOTFOUND,
     "model.layers.2.self_attn.v_proj.bias"},
    {"llama", "model.norm.weight", "model.norm.height", LOCI_E_NOTFOUND, "model.norm.weight"},
    {"mistral", "layers.0.mlp.up_proj.weight\":{\"dtype\":\"BF16\"",
     "layers.0.mlp.up_proj.weight\":{\"dtype\":\"F16\" ", LOCI_E_UNSUPPORTED,
     "mlp.up_proj.weight has another dtype than"},
    {"mistral", "layers.0.mlp.up_proj.weight\":{\"dtype\":\"BF16\"",
     "layers.0.mlp.up_proj.weight\":{\"dtype\":\"I16\" ", LOCI_E_UNSUPPORTED, "I16"},
};

static void test_damaged_weights(void **state) {
    (void)state;
    loci_error err;
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        copy_model(damaged[i].model, "{}");
        copy_file(damaged[i].model, "model.safetensors", damaged[i].from, damaged[i].to);
        loci_status status = open_and_run(&err);
        if (status != damaged[i].status || !strstr(err.text, damaged[i].says))
            fail_msg("%s: status %d, \"%s\"", damaged[i].to, status, err.text);
    }
    /* Cut off anywhere. */
    loci_buf whole = LOCI_BUF_INIT;
    copy_model("mistral", "{}");
    read_file("tests/data/model/tiny-mistral/model.safetensors", &whole);
    for (size_t part = 0; part < 40; part++) {
        write_file("model.safetensors", whole.data, whole.len * part / 40);
        assert_int_not_equal(open_and_run(&err), LOCI_OK);
        assert_true(err.text[0] != 0);
    }
    loci_buf_fini(&whole);
    clear_dir(state);
    copy_config("mistral", "{}");
    assert_int_equal(open_and_run(&err), LOCI_E_NOTFOUND);
    assert_non_null(strstr(err.text, "tokenizer.json"));
}

static void test_ends_and_chat(void **state) {
    (void)state;
    static const char template[] = "{\"chat_template\": \"<|im_start|>\"}";
    loci_error err = {0};
    loci_model *model = NULL;
    copy_model("qwen2", "{\"eos_token_id\": [2, 7]}");
    write_file("tokenizer_config.json", template, sizeof template - 1);
    if (loci_model_open(dir, backend, LOCI_F32, &model, &err) != LOCI_OK) fail_msg("%s", err.text);
    assert_true(loci_model_ends(model, 2));
    assert_true(loci_model_ends(model, 7));
    assert_false(loci_model_ends(model, 3));
    assert_false(loci_model_ends(model, UINT32_MAX));
    /* Its tokenizer has no <|im_start|>. */
    assert_int_equal(loci_model_chat(model)->family, LOCI_CHAT_PLAIN);
    assert_int_equal(loci_model_specials(model)->bos, 1);
    loci_model_close(model);
}

/* Told by its special tokens, all of them; what begins a text of others is their own. */
static void test_built_in_family(void **state) {
    (void)state;
    loci_error err = {0};
    loci_model *model = NULL;
    copy_model("llama", "{}");
    if (loci_model_open(dir, backend, LOCI_F32, &model, &err) != LOCI_OK) fail_msg("%s", err.text);
    assert_true(loci_model_is_built_in(model));
    assert_int_equal(loci_model_specials(model)->begin, 3);
    loci_model_close(model);
    copy_file("llama", "tokenizer.json", "<ev>", "<xx>");
    if (loci_model_open(dir, backend, LOCI_F32, &model, &err) != LOCI_OK) fail_msg("%s", err.text);
    assert_false(loci_model_is_built_in(model));
    assert_int_equal(loci_model_specials(model)->begin, 1);
    loci_model_close(model);
}

/* Scaling frequencies changes keys and values of a text: its fingerprint must differ. */
static void test_fingerprint_has_the_rope(void **state) {
    (void)state;
    static const char *const scalings[] = {
        "{}", "{\"rope_scaling\": null}",
        "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 4.0, \"high_freq_factor\": 4.0,"
        " \"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 64}}"};
    char seen[3][33];
    for (size_t i = 0; i < 3; i++) {
        loci_error err = {0};
        loci_model *model = NULL;
        copy_model("llama", scalings[i]);
        if (loci_model_open(dir, backend, LOCI_F32, &model, &err) != LOCI_OK)
            fail_msg("%s", err.text);
        snprintf(seen[i], sizeof seen[i], "%s", loci_model_fingerprint(model));
        for (size_t j = 0; j < i; j++) assert_string_not_equal(seen[i], seen[j]);
        loci_model_close(model);
    }
}

/* --- Mutations ------------------------------------------------------------------------ */

/* Bytes of config.json, or of the head of the weights, overwritten: whatever still opens runs. */
static void test_mutated_files(void **state) {
    (void)state;
    static const char *const sound[] = {"3heads", "llama", "mistral", "qwen2", "qwen3"};
    unsigned opened = 0, refused = 0;
    for (uint32_t start = 1; start <= 400; start++) {
        uint32_t seed = start * 2654435761u | 1u;
        bool weights = start % 2;
        const char *name = weights ? "model.safetensors" : "config.json";
        const char *model = sound[start % 5];
        char path[128];
        loci_buf data = LOCI_BUF_INIT;
        loci_error err;
        copy_model(model, "{}");
        snprintf(path, sizeof path, "tests/data/model/tiny-%s/%s", model, name);
        read_file(path, &data);
        size_t len = weights && data.len > 1500 ? 1500 : data.len;
        for (uint32_t i = xorshift(&seed) % 3 + 1; i > 0; i--) {
            static const char likely[] = "0123456789\"[]{},:-enut";
            uint32_t r = xorshift(&seed);
            data.data[xorshift(&seed) % len] =
                (uint8_t)(r % 3 ? likely[r / 3 % (sizeof likely - 1)] : (char)(r >> 8));
        }
        write_file(name, data.data, data.len);
        loci_status status = open_and_run(&err);
        if (status != LOCI_OK && !err.text[0]) fail_msg("seed %u: refused without a word", start);
        opened += status == LOCI_OK;
        refused += status != LOCI_OK;
        loci_buf_fini(&data);
    }
    if (opened < 20 || refused < 100) fail_msg("%u opened, %u were refused", opened, refused);
}

/* What everybody who clones the repository downloads. */
static void test_built_in_folder_is_small(void **state) {
    (void)state;
    struct dirent **names;
    uint64_t sum = 0;
    bool card = false;
    int count = scandir("model/default", &names, NULL, alphasort);
    assert_true(count > 0);
    for (int i = 0; i < count; i++) {
        char path[300];
        struct stat info;
        snprintf(path, sizeof path, "model/default/%.200s", names[i]->d_name);
        assert_int_equal(stat(path, &info), 0);
        if (S_ISREG(info.st_mode)) {
            if (info.st_size > 16 << 20) fail_msg("%s has more than 16 MiB", path);
            sum += (uint64_t)info.st_size;
        }
        card = card || strcmp(names[i]->d_name, "README.md") == 0;
        free(names[i]);
    }
    free(names);
    assert_true(card);
    if (sum > 48u << 20) fail_msg("model/default has %llu bytes", (unsigned long long)sum);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_built_in_folder_is_small),
        cmocka_unit_test_teardown(test_configuration_and_weights, clear_dir),
        cmocka_unit_test_teardown(test_damaged_weights, clear_dir),
        cmocka_unit_test_teardown(test_ends_and_chat, clear_dir),
        cmocka_unit_test_teardown(test_built_in_family, clear_dir),
        cmocka_unit_test_teardown(test_fingerprint_has_the_rope, clear_dir),
        cmocka_unit_test_teardown(test_mutated_files, clear_dir),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
