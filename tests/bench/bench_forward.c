/* SPDX-License-Identifier: Apache-2.0
 *
 * Speed of the built-in model's forward passes: encoding, decoding, appending a question. One
 * line of JSON. bench_forward [threads] [model folder]; LOCI_ISA caps the instruction set.
 */
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "model/model.h"

#define SEGMENTS 64u
#define SEGMENT_TOKENS 255u
#define QUESTION_TOKENS 20u
#define DECODED 64u
#define REPEATS 3

static void check(loci_status status, const loci_error *err) {
    if (status == LOCI_OK) return;
    fprintf(stderr, "bench_forward: %s\n", err->text);
    exit(1);
}

static double seconds_since(uint64_t start) {
    return (double)(loci_now_ns() - start) * 1e-9;
}

/* Any tokens do; these are spread over the vocabulary. */
static uint32_t token_at(const loci_model *model, uint32_t i) {
    return 32u + i * 2654435761u % (loci_model_config_of(model)->vocab - 32u);
}

static double encode_rate(loci_model *model, uint32_t segments, uint32_t length) {
    const loci_model_config *c = loci_model_config_of(model);
    uint32_t pairs = c->retrieval_count * c->kv_heads, total = segments * length;
    uint32_t *tokens = malloc(total * sizeof *tokens);
    uint32_t *begin = malloc((segments + 1) * sizeof *begin);
    uint16_t **kv = malloc(2 * pairs * sizeof *kv);
    size_t values = (size_t)total * c->head_dim;
    uint16_t *data = malloc(2 * pairs * values * sizeof *data);
    if (!tokens || !begin || !kv || !data) exit(1);
    for (uint32_t i = 0; i < total; i++) tokens[i] = token_at(model, i);
    for (uint32_t i = 0; i <= segments; i++) begin[i] = i * length;
    for (uint32_t i = 0; i < 2 * pairs; i++) kv[i] = data + i * values;
    loci_encode_out out = {kv, kv + pairs};
    loci_error err;
    double best = 0.0;
    for (int i = 0; i < REPEATS; i++) {
        uint64_t start = loci_now_ns();
        check(loci_model_encode(model, tokens, begin, segments, &out, NULL, &err), &err);
        double rate = total / seconds_since(start);
        if (rate > best) best = rate;
    }
    free(tokens);
    free(begin);
    free((void *)kv);
    free(data);
    return best;
}

static void sequence_rates(loci_model *model, double *append_ms, double *decode_rate) {
    loci_sequence *sequence;
    loci_error err;
    uint32_t question[QUESTION_TOKENS], id;
    float logprob;
    const loci_sample_params greedy = {.top_p = 1.0f, .repetition_penalty = 1.0f};
    for (uint32_t i = 0; i < QUESTION_TOKENS; i++) question[i] = token_at(model, i);
    check(loci_sequence_open(model, 512, &sequence, &err), &err);
    *append_ms = 1e9;
    *decode_rate = 0.0;
    for (int i = 0; i < REPEATS; i++) {
        loci_sequence_reset(sequence);
        uint64_t start = loci_now_ns();
        check(loci_sequence_append(sequence, question, QUESTION_TOKENS, 1, -1, NULL, &err), &err);
        double ms = 1e3 * seconds_since(start);
        if (ms < *append_ms) *append_ms = ms;
        start = loci_now_ns();
        for (uint32_t t = 0; t < DECODED; t++) {
            check(loci_sequence_sample(sequence, &greedy, NULL, 0, NULL, 0, &id, &logprob, &err),
                  &err);
            check(loci_sequence_append(sequence, &id, 1, 1, -1, NULL, &err), &err);
        }
        double rate = DECODED / seconds_since(start);
        if (rate > *decode_rate) *decode_rate = rate;
    }
    loci_sequence_close(sequence);
}

int main(int argc, char **argv) {
    loci_backend_options options = {argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 0, NULL};
    const char *dir = argc > 2 ? argv[2] : "model/default";
    static const char *const names[] = {"f32", "bf16"};
    loci_backend *backend;
    loci_error err;
    check(loci_backend_open("cpu", &options, &backend, &err), &err);
    printf("{\"bench\":\"forward\",\"backend\":\"%s\"", backend->ops->describe(backend));
    for (int precision = LOCI_F32; precision <= LOCI_BF16; precision++) {
        loci_model *model;
        double append_ms, decode_rate;
        check(loci_model_open(dir, backend, (loci_dtype)precision, &model, &err), &err);
        double rate = encode_rate(model, SEGMENTS, SEGMENT_TOKENS);
        double single = encode_rate(model, 1, 1);
        sequence_rates(model, &append_ms, &decode_rate);
        printf(",\"%s\":{\"encode_tokens_per_s\":%.0f,\"encode_one_token_ms\":%.2f,"
               "\"append_20_ms\":%.2f,\"decode_tokens_per_s\":%.0f}",
               names[precision], rate, 1e3 / single, append_ms, decode_rate);
        loci_model_close(model);
    }
    printf("}\n");
    loci_backend_close(backend);
    return 0;
}
