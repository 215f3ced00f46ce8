/* SPDX-License-Identifier: Apache-2.0
 *
 * Speed of sequences without a corpus, in bf16; one JSON line a test.
 *
 *   bench_sequence FOLDER THREADS TEST...     TEST: pp:512 (prefill of 512 tokens), tg:4096
 * (decoding behind 4096 tokens of the sequence's own), tg:0; tg:0:8 (eight sequences at once, each
 * on a thread of its own, in a batch), apart:0:8 (the same without a batch)
 *
 * peer_llama.c runs the tests of one sequence on llama.cpp. A prefill computes the logits of its
 * last token; decoding takes a token that does not depend on the one before. With BENCH_CLOCK=cpu
 * tokens are divided by the processor time of all threads; BENCH_BACKEND is cpu or cuda.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model/batch.h"

#define DECODED 64u
#define AT_ONCE_MAX 64u
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

/* --- Several at once ------------------------------------------------------------------------- */

typedef struct talk {
    loci_sequence *sequence;
    const uint32_t *tokens;
    uint32_t depth;
    pthread_t thread;
    pthread_barrier_t *start;
} talk;

static void *talk_on(void *arg) {
    talk *t = arg;
    if (t->depth > 0) append(t->sequence, t->tokens, t->depth);
    append(t->sequence, t->tokens + t->depth, 1);
    loci_sequence_decoding(t->sequence, true);
    pthread_barrier_wait(t->start);
    for (uint32_t i = 1; i <= DECODED; i++) {
        uint32_t id;
        float logprob;
        loci_error err;
        loci_sample_params params = {0, 1, 1, 1, i};
        check(loci_sequence_sample(t->sequence, &params, NULL, 0, NULL, 0, &id, &logprob, &err),
              &err);
        append(t->sequence, t->tokens + t->depth + i, 1);
    }
    loci_sequence_decoding(t->sequence, false);
    return NULL;
}

/* Tokens a second of all together; *shared: how many shared a pass, on average. */
static double decode_at_once(loci_model *model, const uint32_t *tokens, uint32_t depth,
                             uint32_t count, bool batched, double *shared) {
    loci_batch *batch;
    loci_batch_usage before, after;
    loci_error err;
    pthread_barrier_t start;
    talk talks[AT_ONCE_MAX];
    check(loci_batch_open(model, count, depth + DECODED + 1, &batch, &err), &err);
    pthread_barrier_init(&start, NULL, count + 1);
    for (uint32_t i = 0; i < count; i++) {
        talk *t = &talks[i];
        *t = (talk){.tokens = tokens, .depth = depth, .start = &start};
        check(batched ? loci_batch_add(batch, &t->sequence, &err)
                      : loci_sequence_open(model, depth + DECODED + 1, &t->sequence, &err),
              &err);
        if (pthread_create(&t->thread, NULL, talk_on, t) != 0) exit(1);
    }
    pthread_barrier_wait(&start);
    loci_batch_usage_of(batch, &before);
    double begun = now();
    for (uint32_t i = 0; i < count; i++) pthread_join(talks[i].thread, NULL);
    double seconds = now() - begun;
    loci_batch_usage_of(batch, &after);
    for (uint32_t i = 0; i < count; i++) loci_sequence_close(talks[i].sequence);
    *shared = batched
                  ? (double)(after.chunks - before.chunks) / (double)(after.passes - before.passes)
                  : 1;
    loci_batch_close(batch);
    pthread_barrier_destroy(&start);
    return (double)count * DECODED / seconds;
}

static void run_test(loci_model *model, const char *test) {
    loci_error err;
    char *end = NULL;
    bool is_prefill = strncmp(test, "pp:", 3) == 0, apart = strncmp(test, "apart:", 6) == 0;
    const char *number = strchr(test, ':');
    unsigned long count = number ? strtoul(number + 1, &end, 10) : 0, at_once = 0;
    if (end && *end == ':' && !is_prefill) at_once = strtoul(end + 1, &end, 10);
    if ((!is_prefill && !apart && strncmp(test, "tg:", 3) != 0) || !end || *end ||
        count > 1u << 20 || (is_prefill && count == 0) || at_once > AT_ONCE_MAX ||
        (apart && at_once == 0)) {
        fprintf(stderr, "bench_sequence: '%s' is no test\n", test);
        exit(2);
    }
    uint32_t vocab = loci_model_config_of(model)->vocab, total = (uint32_t)count + DECODED + 1;
    uint32_t *tokens = malloc(total * sizeof *tokens);
    if (!tokens) exit(1);
    for (uint32_t i = 0; i < total; i++) tokens[i] = 32u + i * 2654435761u % (vocab - 32u);
    if (at_once > 0) {
        double shared, together = decode_at_once(model, tokens, (uint32_t)count, (uint32_t)at_once,
                                                 !apart, &shared);
        printf("{\"bench\":\"sequence\",\"test\":\"%s\",\"tokens_per_s\":%.2f,\"shared\":%.2f}\n",
               test, together, shared);
        fflush(stdout);
        free(tokens);
        return;
    }
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
    const char *name = getenv("BENCH_BACKEND");
    check(loci_backend_open(name ? name : "cpu", &options, &backend, &err), &err);
    check(loci_model_open(argv[1], backend, LOCI_BF16, &model, &err), &err);
    for (int i = 3; i < argc; i++) run_test(model, argv[i]);
    loci_model_close(model);
    loci_backend_close(backend);
    return 0;
}
