/* SPDX-License-Identifier: Apache-2.0
 *
 * Speed of llama.cpp, unmodified, through its public interface; the tests of bench_sequence.c, one
 * JSON line each. Not part of the build: bench_llama.py compiles it against a llama.cpp that was
 * built outside of the repository.
 *
 *   peer_llama FILE.gguf THREADS FLASH KV TEST...     FLASH: 0, 1; KV: f16, bf16, q8_0
 *
 * Batches are those of llama-bench (2048 tokens, 512 at once). Prefill is by decoding a prompt, as
 * there. For decoding at a depth beyond CHUNK tokens only the first CHUNK are a prompt: their state
 * is saved and restored as another sequence, which is then joined to the first, as often as
 * needed. Cells of the cache then hold the same keys and stand at the same positions, all before
 * the new token's, which therefore attends to every one of them: the work of a true prompt.
 */
#include <llama.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHUNK 4096
#define BATCH 2048
#define DECODED 64
#define DECODED_DEEP 16 /* behind more than DEEP tokens */
#define DEEP 32768
#define PREFILL_SECONDS_MIN 0.5

/* Wall clock, or with BENCH_CLOCK=cpu the processor time of all threads. */
static double now(void) {
    struct timespec t;
    const char *name = getenv("BENCH_CLOCK");
    int cpu = name && strcmp(name, "cpu") == 0;
    clock_gettime(cpu ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void fail(const char *what) {
    fprintf(stderr, "peer_llama: %s\n", what);
    exit(1);
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* Decodes `count` tokens of sequence 0, with the logits of the last one of a batch. */
static void run(struct llama_context *context, int32_t vocab, int count, uint32_t *seed) {
    llama_token tokens[BATCH];
    for (int done = 0; done < count; done += BATCH) {
        int rows = count - done < BATCH ? count - done : BATCH;
        for (int i = 0; i < rows; i++)
            tokens[i] = 32 + (llama_token)((*seed)++ * 2654435761u % (uint32_t)(vocab - 32));
        if (llama_decode(context, llama_batch_get_one(tokens, rows)) != 0) fail("decoding failed");
    }
    llama_synchronize(context);
}

static double prefill(struct llama_context *context, int32_t vocab, int count) {
    uint32_t seed = 0;
    llama_memory_t memory = llama_get_memory(context);
    run(context, vocab, count < 512 ? count : 512, &seed);
    double begun = now(), taken = 0;
    int done = 0;
    for (; taken < PREFILL_SECONDS_MIN; taken = now() - begun, done += count) {
        llama_memory_clear(memory, false);
        run(context, vocab, count, &seed);
    }
    return done / taken;
}

static void fill(struct llama_context *context, int32_t vocab, int depth, uint32_t *seed) {
    llama_memory_t memory = llama_get_memory(context);
    int chunk = depth < CHUNK ? depth : CHUNK;
    if (depth % chunk != 0) fail("a depth is to be a multiple of 4096, or less than that");
    run(context, vocab, chunk, seed);
    if (depth == chunk) return;
    size_t bytes = llama_state_seq_get_size(context, 0);
    uint8_t *state = malloc(bytes);
    if (!state || llama_state_seq_get_data(context, state, bytes, 0) == 0)
        fail("the state of a sequence could not be saved");
    for (int done = chunk; done < depth; done += chunk) {
        if (llama_state_seq_set_data(context, state, bytes, 1) == 0)
            fail("the state of a sequence could not be restored");
        llama_memory_seq_cp(memory, 1, 0, -1, -1);
        llama_memory_seq_rm(memory, 1, -1, -1);
    }
    free(state);
}

static double decode(struct llama_context *context, int32_t vocab, int depth) {
    uint32_t seed = 0;
    int count = depth > DEEP ? DECODED_DEEP : DECODED;
    if (depth > 0) fill(context, vocab, depth, &seed);
    run(context, vocab, 1, &seed);
    double begun = now();
    for (int i = 0; i < count; i++) run(context, vocab, 1, &seed);
    return count / (now() - begun);
}

static void run_test(struct llama_model *model, char **argv, const char *test) {
    int is_prefill = strncmp(test, "pp:", 3) == 0;
    int32_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    long count = strlen(test) > 3 ? strtol(test + 3, NULL, 10) : -1;
    if (count < is_prefill) fail("a test is pp:N or tg:N");
    struct llama_context_params params = llama_context_default_params();
    enum ggml_type type = strcmp(argv[4], "bf16") == 0   ? GGML_TYPE_BF16
                          : strcmp(argv[4], "q8_0") == 0 ? GGML_TYPE_Q8_0
                                                         : GGML_TYPE_F16;
    params.n_ctx = (uint32_t)(count + 256);
    params.n_batch = BATCH;
    params.n_ubatch = 512;
    params.n_seq_max = 2;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = (int32_t)strtol(argv[2], NULL, 10);
    params.flash_attn_type =
        argv[3][0] == '1' ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = type;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) fail("no context with these settings");
    double rate =
        is_prefill ? prefill(context, vocab, (int)count) : decode(context, vocab, (int)count);
    printf("{\"bench\":\"peer_llama\",\"test\":\"%s\",\"flash\":%c,\"kv\":\"%s\","
           "\"tokens_per_s\":%.2f}\n",
           test, argv[3][0], argv[4], rate);
    fflush(stdout);
    llama_free(context);
}

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: peer_llama FILE.gguf THREADS FLASH KV TEST...\n");
        return 2;
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("the model could not be loaded");
    for (int i = 5; i < argc; i++) run_test(model, argv, argv[i]);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
