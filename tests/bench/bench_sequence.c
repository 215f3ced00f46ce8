/* SPDX-License-Identifier: Apache-2.0
 *
 * Speed of one sequence without a corpus, in bf16; one JSON line a test.
 *
 *   bench_sequence FOLDER THREADS TEST...     TEST: pp:512 (prefill of 512 tokens), tg:4096
 * (decoding behind 4096 tokens of the sequence's own), tg:0
 *
 * peer_llama.c runs the same tests on llama.cpp. A prefill computes the logits of its last token;
 * decoding takes a token that does not depend on the one before.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model/model.h"

#define DECODED 64u
#define PREFILL_SECONDS_MIN 0.5 /* short ones are repeated for so long */

static void check(loci_status status, const loci_error *err) {
    if (status == LOCI_OK) return;
    fprintf(stderr, "bench_sequence: %s\n", err->text);
    exit(1);
}

/* Wall clock, or with BENCH_CLOCK=cpu the processor time of all threads. */
static double now(void) {
    struct timespec t;
    const char *name = getenv("BENCH_CLOCK");
    bool cpu = name && strcmp(name, "cpu") == 0;
    clock_gettime(cpu ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void append(loci_sequence *sequence, const uint32_t *tokens, uint32_t count) {
    loci_error err;
    check(loci_sequence_append(sequence, tokens, count, 1, -1, NULL, &err), &err);
}

/* Tokens a second. */
static double prefill(loci_sequence *sequence, const uint32_t *tokens, uint32_t count) {
    append(sequence, tokens, count < 64 ? count : 64);
    double begun = now(), taken = 0;
    uint64_t done = 0;
    for (; taken < PREFILL_SECONDS_MIN; taken = now() - begun, done += count) {
        loci_sequence_reset(sequence);
        append(sequence, tokens, count);
    }
    return (double)done / taken;
}

static double decode(loci_sequence *sequence, const uint32_t *tokens, uint32_t depth) {
    loci_sequence_reset(sequence);
    if (depth > 0) append(sequence, tokens, depth);
    append(sequence, tokens + depth, 1);
    double begun = now();
    for (uint32_t i = 1; i <= DECODED; i++) append(sequence, tokens + depth + i, 1);
    return DECODED / (now() - begun);
}

static void run_test(loci_model *model, const char *test) {
    loci_error err;
    char *end = NULL;
    bool is_prefill = strncmp(test, "pp:", 3) == 0;
    unsigned long count = strlen(test) > 3 ? strtoul(test + 3, &end, 10) : 0;
    if ((!is_prefill && strncmp(test, "tg:", 3) != 0) || !end || *end || count > 1u << 20 ||
        (is_prefill && count == 0)) {
        fprintf(stderr, "bench_sequence: '%s' is no test\n", test);
        exit(2);
    }
    uint32_t vocab = loci_model_config_of(model)->vocab, total = (uint32_t)count + DECODED + 1;
    uint32_t *tokens = malloc(total * sizeof *tokens);
    if (!tokens) exit(1);
    for (uint32_t i = 0; i < total; i++) tokens[i] = 32u + i * 2654435761u % (vocab - 32u);
    loci_sequence *sequence;
    check(loci_sequence_open(model, total, &sequence, &err), &err);
    double rate = is_prefill ? prefill(sequence, tokens, (uint32_t)count)
                             : decode(sequence, tokens, (uint32_t)count);
    printf("{\"bench\":\"sequence\",\"test\":\"%s\",\"tokens_per_s\":%.2f}\n", test, rate);
    fflush(stdout);
    loci_sequence_close(sequence);
    free(tokens);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: bench_sequence FOLDER THREADS TEST...\n");
        return 2;
    }
    loci_backend_options options = {(unsigned)strtoul(argv[2], NULL, 10), NULL};
    loci_backend *backend;
    loci_model *model;
    loci_error err;
    check(loci_backend_open("cpu", &options, &backend, &err), &err);
    check(loci_model_open(argv[1], backend, LOCI_BF16, &model, &err), &err);
    for (int i = 3; i < argc; i++) run_test(model, argv[i]);
    loci_model_close(model);
    loci_backend_close(backend);
    return 0;
}
