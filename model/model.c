/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening a model folder: configuration, tokenizer, weights, fingerprint.
 *
 * Weights are packed by the backend while the safetensors files are mapped, and nothing of the
 * files is kept afterwards; or they are used where they are mapped, and the files stay open.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/half.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/rope.h"
#include "model/safetensors.h"

#define NAME_MAX_BYTES 128

typedef struct loader {
    loci_model *model;
    const char *dir;
    loci_safetensors *file;
    bool mapped;
    loci_stream *stream;
    size_t constants_at; /* fill level of the constants buffer */
    bool *used;          /* for each tensor of the file */
} loader;

static void layer_name(char *out, uint32_t layer, const char *what) {
    snprintf(out, NAME_MAX_BYTES, "model.layers.%u.%s", layer, what);
}

static loci_status get_tensor(loader *l, const char *name, uint32_t dims, const uint64_t *shape,
                              loci_tensor *out, loci_error *err) {
    LOCI_TRY(loci_safetensors_get(l->file, name, dims, shape, out, err));
    size_t low = 0, high = loci_safetensors_count(l->file);
    while (low + 1 < high) {
        size_t middle = (low + high) / 2;
        if (strcmp(loci_safetensors_name(l->file, middle), name) <= 0)
            low = middle;
        else
            high = middle;
    }
    l->used[low] = true;
    return LOCI_OK;
}

/* A tensor that nothing asked for belongs to something that is not built: a bias, a norm, another
 * layer. Left alone are frequencies stored by old exporters and a head that the config ties. */
static loci_status check_all_used(const loader *l, loci_error *err) {
    for (size_t i = 0; i < loci_safetensors_count(l->file); i++) {
        const char *name = loci_safetensors_name(l->file, i), *dot = strrchr(name, '.');
        if (l->used[i] || (dot && strcmp(dot, ".inv_freq") == 0)) continue;
        if (l->model->config.tied_embeddings && strcmp(name, "lm_head.weight") == 0) continue;
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "MODEL_TENSOR",
                                "%s: tensor %.120s is no part of a %s as config.json describes it",
                                l->dir, name, l->model->config.architecture);
    }
    return LOCI_OK;
}

/* A weight stacked of up to three tensors of one layer (layer UINT32_MAX: full names). */
static loci_status load_weight(loader *l, uint32_t layer, const char *const *names,
                               const uint32_t *rows, uint32_t parts, uint32_t cols,
                               loci_weight **out, loci_error *err) {
    const void *data[3];
    loci_dtype dtype = LOCI_F32;
    char name[NAME_MAX_BYTES];
    for (uint32_t i = 0; i < parts; i++) {
        uint64_t shape[2] = {rows[i], cols};
        loci_tensor tensor;
        if (layer == UINT32_MAX)
            snprintf(name, sizeof name, "%s", names[i]);
        else
            layer_name(name, layer, names[i]);
        LOCI_TRY(get_tensor(l, name, 2, shape, &tensor, err));
        if (i > 0 && tensor.dtype != dtype)
            return loci_fail(err, LOCI_E_UNSUPPORTED,
                             "%s: tensor %s has another dtype than %s, beside which it is packed",
                             l->dir, name, names[0]);
        dtype = tensor.dtype;
        data[i] = tensor.data;
    }
    loci_backend *backend = l->model->backend;
    if (l->mapped && dtype != LOCI_BF16)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: %s is not in bf16 and cannot be mapped",
                         l->dir, name);
    if (l->mapped) return backend->ops->weight_map(backend, data, rows, parts, cols, out, err);
    loci_status status = backend->ops->weight_create(backend, data, rows, parts, cols, dtype,
                                                     l->model->precision, out, err);
    return status == LOCI_OK ? status : loci_fail_prefix(err, status, "%s", name);
}

static float read_float(const loci_tensor *tensor, size_t at) {
    if (tensor->dtype == LOCI_F32) return ((const float *)tensor->data)[at];
    uint16_t bits = ((const uint16_t *)tensor->data)[at];
    return tensor->dtype == LOCI_BF16 ? loci_bf16_to_f32(bits) : loci_f16_to_f32(bits);
}

static loci_ref put_constants(loader *l, const float *values, uint32_t count) {
    loci_ref ref = loci_ref_at(l->model->constants, l->constants_at);
    loci_decoder_reserve(&l->constants_at, count * sizeof *values);
    l->model->backend->ops->upload(l->stream, ref, values, count * sizeof *values);
    return ref;
}

/* A tensor of `count` values, as f32. */
static loci_status read_vector(loader *l, const char *name, uint32_t count, float *out,
                               loci_error *err) {
    uint64_t shape[1] = {count};
    loci_tensor tensor;
    LOCI_TRY(get_tensor(l, name, 1, shape, &tensor, err));
    for (uint32_t i = 0; i < count; i++) out[i] = read_float(&tensor, i);
    return LOCI_OK;
}

static loci_status load_gain(loader *l, const char *name, uint32_t count, loci_ref *out,
                             loci_error *err) {
    float *values = malloc(count * sizeof *values);
    if (!values) return loci_fail(err, LOCI_E_NOMEM, "no memory to read %s", name);
    loci_status status = read_vector(l, name, count, values, err);
    if (status == LOCI_OK) *out = put_constants(l, values, count);
    free(values);
    return status;
}

/* Always in f32: rounding it would cost accuracy and save nothing. */
static loci_status load_qkv_bias(loader *l, uint32_t index, const uint32_t *rows, loci_weight **out,
                                 loci_error *err) {
    static const char *const names[] = {"self_attn.q_proj.bias", "self_attn.k_proj.bias",
                                        "self_attn.v_proj.bias"};
    loci_backend *backend = l->model->backend;
    uint32_t width = loci_decoder_qkv_width(&l->model->config), at = 0, one = 1;
    char name[NAME_MAX_BYTES];
    float *values = malloc(width * sizeof *values);
    if (!values) return loci_fail(err, LOCI_E_NOMEM, "no memory to read a bias");
    loci_status status = LOCI_OK;
    for (uint32_t i = 0; i < 3 && status == LOCI_OK; at += rows[i++]) {
        layer_name(name, index, names[i]);
        status = read_vector(l, name, rows[i], values + at, err);
    }
    const void *data = values;
    if (status == LOCI_OK)
        status = backend->ops->weight_create(backend, &data, &one, 1, width, LOCI_F32, LOCI_F32,
                                             out, err);
    free(values);
    return status;
}

static loci_status load_head_gains(loader *l, uint32_t index, loci_error *err) {
    loci_decoder_layer *layer = &l->model->layer[index];
    uint32_t head_dim = l->model->config.head_dim;
    char name[NAME_MAX_BYTES];
    layer_name(name, index, "self_attn.q_norm.weight");
    LOCI_TRY(load_gain(l, name, head_dim, &layer->q_gain, err));
    layer_name(name, index, "self_attn.k_norm.weight");
    return load_gain(l, name, head_dim, &layer->k_gain, err);
}

static loci_status load_layer(loader *l, uint32_t index, loci_error *err) {
    static const char *const qkv[] = {"self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                      "self_attn.v_proj.weight"};
    static const char *const o[] = {"self_attn.o_proj.weight"};
    static const char *const gate_up[] = {"mlp.gate_proj.weight", "mlp.up_proj.weight"};
    static const char *const down[] = {"mlp.down_proj.weight"};
    const loci_model_config *c = &l->model->config;
    loci_decoder_layer *layer = &l->model->layer[index];
    uint32_t q = c->q_heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    uint32_t qkv_rows[] = {q, kv, kv}, ff[] = {c->intermediate, c->intermediate};
    char name[NAME_MAX_BYTES];
    LOCI_TRY(load_weight(l, index, qkv, qkv_rows, 3, c->hidden, &layer->qkv, err));
    LOCI_TRY(load_weight(l, index, o, &c->hidden, 1, q, &layer->o, err));
    LOCI_TRY(load_weight(l, index, gate_up, ff, 2, c->hidden, &layer->gate_up, err));
    LOCI_TRY(load_weight(l, index, down, &c->hidden, 1, c->intermediate, &layer->down, err));
    if (c->qkv_bias) LOCI_TRY(load_qkv_bias(l, index, qkv_rows, &layer->qkv_bias, err));
    if (c->head_norm) LOCI_TRY(load_head_gains(l, index, err));
    layer_name(name, index, "input_layernorm.weight");
    LOCI_TRY(load_gain(l, name, c->hidden, &layer->attention_gain, err));
    layer_name(name, index, "post_attention_layernorm.weight");
    return load_gain(l, name, c->hidden, &layer->mlp_gain, err);
}

static loci_status load_inv_freq(loader *l, loci_error *err) {
    const loci_model_config *c = &l->model->config;
    uint32_t half = c->head_dim / 2;
    float *values = malloc(half * sizeof *values);
    if (!values) return loci_fail(err, LOCI_E_NOMEM, "no memory for rotary frequencies");
    loci_rope_frequencies(c, values);
    l->model->inv_freq = put_constants(l, values, half);
    free(values);
    return LOCI_OK;
}

static loci_status load_weights(loader *l, loci_error *err) {
    static const char *const embedding[] = {"model.embed_tokens.weight"};
    static const char *const head[] = {"lm_head.weight"};
    loci_model *model = l->model;
    const loci_model_config *c = &model->config;
    loci_backend *backend = model->backend;
    l->used = calloc(loci_safetensors_count(l->file) + 1, sizeof *l->used);
    if (!l->used) return loci_fail(err, LOCI_E_NOMEM, "no memory to load %s", l->dir);
    size_t gains = (2 * (size_t)c->layers + 1) * (c->hidden * sizeof(float) + 64);
    size_t heads = (2 * (size_t)c->layers + 1) * (c->head_dim * sizeof(float) + 64);
    LOCI_TRY(backend->ops->alloc(backend, gains + heads, &model->constants, err));
    LOCI_TRY(backend->ops->stream_open(backend, &l->stream, err));
    LOCI_TRY(
        load_weight(l, UINT32_MAX, embedding, &c->vocab, 1, c->hidden, &model->embedding, err));
    if (!c->tied_embeddings)
        LOCI_TRY(load_weight(l, UINT32_MAX, head, &c->vocab, 1, c->hidden, &model->head, err));
    for (uint32_t i = 0; i < c->layers; i++) LOCI_TRY(load_layer(l, i, err));
    LOCI_TRY(load_gain(l, "model.norm.weight", c->hidden, &model->final_gain, err));
    LOCI_TRY(check_all_used(l, err));
    LOCI_TRY(load_inv_freq(l, err));
    return backend->ops->sync(l->stream, err);
}

static void hash_config(XXH3_state_t *state, const loci_model *model) {
    const loci_model_config *c = &model->config;
    loci_buf buf = LOCI_BUF_INIT;
    uint32_t eps, theta;
    memcpy(&eps, &c->rms_eps, sizeof eps);
    memcpy(&theta, &c->rope_theta, sizeof theta);
    const uint32_t values[] = {c->vocab,   c->hidden,   c->intermediate,    c->layers,
                               c->q_heads, c->kv_heads, c->head_dim,        c->positions_max,
                               eps,        theta,       c->tied_embeddings, c->eos_id};
    loci_buf_bytes(&buf, c->architecture, strlen(c->architecture));
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) loci_buf_u32(&buf, values[i]);
    for (uint32_t i = 0; i < c->layers; i++) {
        loci_buf_u32(&buf, c->layer[i].window);
        loci_buf_u8(&buf, c->layer[i].rope);
        loci_buf_u8(&buf, c->layer[i].retrieval);
    }
    if (c->rope_scaling.factor > 0) loci_buf_bytes(&buf, &c->rope_scaling, sizeof c->rope_scaling);
    if (!loci_model_is_built_in(model)) loci_buf_u32(&buf, model->specials.begin);
    if (loci_buf_status(&buf) == LOCI_OK) XXH3_128bits_update(state, buf.data, buf.len);
    loci_buf_fini(&buf);
}

static loci_status hash_file(XXH3_state_t *state, const char *path, loci_error *err) {
    FILE *file = fopen(path, "rb");
    if (!file) return loci_fail(err, LOCI_E_NOTFOUND, "%s: %s", path, strerror(errno));
    char chunk[16384];
    uint64_t total = 0;
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, file)) > 0; total += n)
        XXH3_128bits_update(state, chunk, n);
    bool failed = ferror(file) != 0;
    fclose(file);
    if (failed) return loci_fail(err, LOCI_E_IO, "%s: reading failed", path);
    XXH3_128bits_update(state, &total, sizeof total);
    return LOCI_OK;
}

static loci_status hash_tensors(XXH3_state_t *state, const loci_safetensors *file,
                                loci_error *err) {
    for (size_t i = 0; i < loci_safetensors_count(file); i++) {
        const char *name = loci_safetensors_name(file, i);
        loci_tensor tensor;
        LOCI_TRY(loci_safetensors_get(file, name, 0, NULL, &tensor, err));
        uint64_t head[3] = {strlen(name), (uint64_t)tensor.dtype, tensor.dims};
        XXH3_128bits_update(state, head, sizeof head);
        XXH3_128bits_update(state, name, strlen(name));
        XXH3_128bits_update(state, tensor.shape, tensor.dims * sizeof *tensor.shape);
        XXH3_128bits_update(state, tensor.data, tensor.bytes);
    }
    return LOCI_OK;
}

static loci_status make_fingerprint(const loader *l, const char *tokenizer_path, loci_error *err) {
    XXH3_state_t *state = XXH3_createState();
    if (!state) return loci_fail(err, LOCI_E_NOMEM, "no memory to hash the model");
    XXH3_128bits_reset(state);
    hash_config(state, l->model);
    loci_status status;
    LOCI_TRY_GOTO(hash_file(state, tokenizer_path, err), out);
    LOCI_TRY_GOTO(hash_tensors(state, l->file, err), out);
    XXH128_canonical_t bytes;
    XXH128_canonicalFromHash(&bytes, XXH3_128bits_digest(state));
    for (size_t i = 0; i < sizeof bytes.digest; i++)
        snprintf(l->model->fingerprint + 2 * i, 3, "%02x", bytes.digest[i]);
out:
    XXH3_freeState(state);
    return status;
}

static void find_specials(loci_model *model) {
    const loci_tokenizer *t = model->tokenizer;
    model->specials = (loci_special_tokens){
        .doc = loci_tokenizer_id(t, "<doc>"),
        .question = loci_tokenizer_id(t, "<q>"),
        .evidence = loci_tokenizer_id(t, "<ev>"),
        .answer = loci_tokenizer_id(t, "<a>"),
        .none = loci_tokenizer_id(t, "<none>"),
        .eos = model->config.eos_id,
        .bos = loci_tokenizer_id(t, "<bos>"),
    };
    if (model->specials.bos == UINT32_MAX) model->specials.bos = loci_tokenizer_bos(t);
    const uint32_t begins[] = {loci_model_is_built_in(model) ? model->specials.doc : UINT32_MAX,
                               model->specials.bos, model->config.bos_id, model->config.eos_id};
    size_t first = 0;
    while (begins[first] == UINT32_MAX) first++;
    model->specials.begin = begins[first];
}

/* More tokens than rows of the embedding would let text produce ids that cannot be embedded. */
static loci_status check_vocabulary(const loci_model *model, const char *dir, loci_error *err) {
    uint32_t size = loci_tokenizer_vocab_size(model->tokenizer);
    if (size <= model->config.vocab) return LOCI_OK;
    return loci_fail(err, LOCI_E_INVAL, "%s: the tokenizer has %u tokens, config.json says %u", dir,
                     size, model->config.vocab);
}

loci_status loci_model_prepare(const char *dir, loci_model **out, loci_error *err) {
    *out = NULL;
    loci_model *model = calloc(1, sizeof *model);
    if (!model) return loci_fail(err, LOCI_E_NOMEM, "no memory for a model");
    loci_buf path = LOCI_BUF_INIT;
    loci_buf_printf(&path, "%s/tokenizer.json", dir);
    loci_status status;
    LOCI_TRY_GOTO(loci_buf_status(&path), out);
    LOCI_TRY_GOTO(loci_model_config_load(dir, &model->config, err), out);
    LOCI_TRY_GOTO(loci_tokenizer_open(loci_buf_text(&path), &model->tokenizer, err), out);
    LOCI_TRY_GOTO(check_vocabulary(model, dir, err), out);
    LOCI_TRY_GOTO(loci_chat_open(dir, model->tokenizer, &model->chat, err), out);
    find_specials(model);
out:
    loci_buf_fini(&path);
    if (status == LOCI_OK)
        *out = model;
    else
        loci_model_close(model);
    return status;
}

loci_status loci_model_load(loci_model *model, const char *dir, loci_backend *backend,
                            loci_dtype precision, bool mapped, loci_error *err) {
    LOCI_ASSERT(!model->backend);
    model->backend = backend;
    model->precision = precision;
    loader l = {.model = model, .dir = dir, .mapped = mapped};
    loci_buf path = LOCI_BUF_INIT;
    loci_buf_printf(&path, "%s/tokenizer.json", dir);
    loci_status status;
    LOCI_TRY_GOTO(loci_buf_status(&path), out);
    LOCI_TRY_GOTO(loci_safetensors_open(dir, &l.file, err), out);
    LOCI_TRY_GOTO(load_weights(&l, err), out);
    LOCI_TRY_GOTO(make_fingerprint(&l, loci_buf_text(&path), err), out);
    LOCI_TRY_GOTO(loci_safetensors_check(l.file, err), out);
out:
    if (l.stream) backend->ops->stream_close(backend, l.stream);
    if (mapped)
        model->file = l.file; /* also after a failure: weights may point into it */
    else
        loci_safetensors_close(l.file);
    free(l.used);
    loci_buf_fini(&path);
    return status;
}

loci_status loci_model_can_map(const char *dir, const loci_backend *backend, loci_dtype precision,
                               bool *out, loci_error *err) {
    loci_safetensors *file;
    loci_tensor tensor;
    loci_error ignored; /* what is no tensor of ours is refused, or left alone, by loading */
    *out = precision == LOCI_BF16 && backend->ops->weight_map;
    if (!*out) return LOCI_OK;
    LOCI_TRY(loci_safetensors_open(dir, &file, err));
    for (size_t i = 0; i < loci_safetensors_count(file); i++) {
        const char *name = loci_safetensors_name(file, i);
        if (loci_safetensors_get(file, name, 0, NULL, &tensor, &ignored) != LOCI_OK) continue;
        if (tensor.dims == 2 && (tensor.dtype != LOCI_BF16 || tensor.shape[1] % 2 != 0))
            *out = false;
    }
    loci_safetensors_close(file);
    return LOCI_OK;
}

loci_status loci_model_open(const char *dir, loci_backend *backend, loci_dtype precision,
                            loci_model **out, loci_error *err) {
    loci_model *model;
    *out = NULL;
    LOCI_TRY(loci_model_prepare(dir, &model, err));
    loci_status status = loci_model_load(model, dir, backend, precision, false, err);
    if (status == LOCI_OK)
        *out = model;
    else
        loci_model_close(model);
    return status;
}

static void free_weights(loci_model *model) {
    loci_backend *backend = model->backend;
    backend->ops->weight_free(backend, model->embedding);
    backend->ops->weight_free(backend, model->head);
    for (uint32_t i = 0; i < model->config.layers && i < LOCI_LAYERS_MAX; i++) {
        loci_decoder_layer *layer = &model->layer[i];
        backend->ops->weight_free(backend, layer->qkv);
        backend->ops->weight_free(backend, layer->o);
        backend->ops->weight_free(backend, layer->gate_up);
        backend->ops->weight_free(backend, layer->down);
        backend->ops->weight_free(backend, layer->qkv_bias);
    }
    backend->ops->free(backend, model->constants);
}

void loci_model_close(loci_model *model) {
    if (!model) return;
    loci_tokenizer_close(model->tokenizer);
    if (model->backend) free_weights(model);
    loci_safetensors_close(model->file);
    free(model);
}

const loci_model_config *loci_model_config_of(const loci_model *model) {
    return &model->config;
}

const loci_tokenizer *loci_model_tokenizer(const loci_model *model) {
    return model->tokenizer;
}

const loci_special_tokens *loci_model_specials(const loci_model *model) {
    return &model->specials;
}

bool loci_model_is_built_in(const loci_model *model) {
    const loci_special_tokens *s = &model->specials;
    const uint32_t marks[] = {s->doc, s->question, s->evidence, s->answer, s->none};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (marks[i] == UINT32_MAX) return false;
    return true;
}

const loci_chat *loci_model_chat(const loci_model *model) {
    return &model->chat;
}

bool loci_model_ends(const loci_model *model, uint32_t id) {
    for (uint32_t i = 0; i < model->config.eos_count; i++)
        if (model->config.eos[i] == id) return true;
    return id == model->chat.stop && id != UINT32_MAX;
}

loci_backend *loci_model_backend(const loci_model *model) {
    return model->backend;
}

const char *loci_model_fingerprint(const loci_model *model) {
    return model->fingerprint;
}
