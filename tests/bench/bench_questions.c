/* SPDX-License-Identifier: Apache-2.0
 *
 * Questions that run at the same time over one corpus: one JSON line for each number of them.
 *
 *   bench_questions MODEL TEXT BACKEND HOW QUESTIONS TOKENS N...
 *
 * MODEL is a folder, TEXT a file that is registered in a corpus of its own, encoded independently;
 * HOW is read-twice, hierarchical, squeezed or dense. The same QUESTIONS questions, each some words
 * of the text, are answered with at most TOKENS tokens, sampled at temperature 1 with a fixed seed,
 * by N threads that take one after the other.
 *
 * steps_per_s      tokens decoded in all, by the wall clock from the first question to the last
 *                  answer; question_ms, first_ms: medians of a question's time
 * cpu_ms_per_step  processor time of the whole process
 * answers          a hash of all answers in order: the same for every N, or something is wrong
 */
#include <ftw.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "services/engine/engine.h"

#define QUESTIONS_MAX 1024u
#define WORDS 8u

typedef struct question {
    char text[160];
    uint64_t hash, steps;
    double total_ms, first_ms;
} question;

typedef struct run {
    loci_engine *engine;
    const char *how;
    uint32_t tokens, count;
    question *questions;
    atomic_uint next;
} run;

static void check(loci_status status, const loci_error *err) {
    if (status == LOCI_OK) return;
    fprintf(stderr, "bench_questions: %s\n", err->text);
    exit(1);
}

static uint64_t hash_text(uint64_t hash, const char *text) { /* FNV-1a */
    for (; *text; text++) hash = (hash ^ (uint8_t)*text) * 1099511628211u;
    return hash;
}

static loci_status on_event(void *ctx, const loci_event *event, loci_error *err) {
    (void)err;
    question *q = ctx;
    if (event->kind == LOCI_EVENT_DELTA) q->hash = hash_text(q->hash, event->text);
    if (event->kind == LOCI_EVENT_USAGE) {
        q->steps = event->usage->decode_steps;
        q->total_ms = event->usage->total_ms;
        q->first_ms = event->usage->first_token_ms;
    }
    return LOCI_OK;
}

static void *ask_all(void *arg) {
    static const char *const modes[] = {"dense", "squeezed", "hierarchical"};
    run *r = arg;
    int mode = -1;
    for (int i = 0; i < 3; i++)
        if (strcmp(r->how, modes[i]) == 0) mode = i;
    for (uint32_t i; (i = atomic_fetch_add(&r->next, 1)) < r->count;) {
        question *q = &r->questions[i];
        loci_error err = {0};
        loci_answer_request request = {.corpus = "bench",
                                       .question = q->text,
                                       .mode = mode,
                                       .read_twice = mode < 0,
                                       .max_tokens = r->tokens,
                                       .temperature = 1,
                                       .seed = i + 1};
        q->hash = 14695981039346656037u;
        check(loci_engine_answer(r->engine, &request, NULL, on_event, q, &err), &err);
    }
    return NULL;
}

/* --- the corpus --------------------------------------------------------------------------------
 */

static loci_buf read_text(const char *path) {
    loci_buf text = LOCI_BUF_INIT;
    static uint8_t bytes[1 << 16];
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "bench_questions: cannot read %s\n", path);
        exit(1);
    }
    for (size_t len; (len = fread(bytes, 1, sizeof bytes, file)) > 0;)
        loci_buf_append(&text, bytes, len);
    fclose(file);
    if (!loci_buf_text(&text) || text.len < 4096) exit(1);
    return text;
}

/* Until the text is searchable and its extents are merged, as in a corpus at rest. */
static void register_text(loci_engine *engine, const loci_buf *text) {
    loci_error err = {0};
    loci_corpus_info info;
    loci_corpus_options options = {.encoding = LOCI_ENCODING_INDEPENDENT};
    loci_document_writer *writer;
    loci_document_info document;
    bool unchanged;
    loci_store *store = loci_engine_store(engine);
    loci_ingest *ingest = loci_engine_ingest(engine);
    check(loci_engine_create_corpus(engine, "bench", &options, &info, &err), &err);
    check(loci_document_begin(store, "bench", "text", loci_slice_of(NULL, 0), &writer, &err), &err);
    check(loci_document_append(writer, loci_slice_of(text->data, text->len), &err), &err);
    check(loci_document_commit(writer, &document, &unchanged, &err), &err);
    loci_ingest_wake(ingest);
    loci_ingest_settle(ingest, "bench");
    while (!loci_ingest_settled(ingest, "bench")) {
        loci_ingest_progress progress;
        check(loci_ingest_progress_of(ingest, "bench", &progress, &err), &err);
        check(progress.failure.status, &progress.failure);
        loci_sleep_ms(20);
    }
    for (;; loci_sleep_ms(20)) {
        check(loci_corpus_get(store, "bench", &info, &err), &err);
        if (info.merged) return;
    }
}

/* Some words from a place of the text that depends on the number. */
static void draw_question(const loci_buf *text, uint32_t number, question *out) {
    const char *all = (const char *)text->data;
    size_t at = (size_t)(number * 2654435761u) % (text->len - 1024), len = 0;
    while (all[at] != ' ' && all[at] != '\n') at++;
    for (uint32_t words = 0; words < WORDS && len + 2 < sizeof out->text; at++) {
        bool blank = all[at] == ' ' || all[at] == '\n' || all[at] == '\r';
        if (blank && len > 0 && out->text[len - 1] == ' ') continue;
        if ((uint8_t)all[at] >= 128) continue;
        words += blank;
        out->text[len++] = all[at] < ' ' ? ' ' : all[at];
    }
    out->text[len] = 0;
}

/* --- figures -----------------------------------------------------------------------------------
 */

static double clock_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, uint32_t count) {
    qsort(values, count, sizeof *values, by_value);
    return values[count / 2];
}

static void measure(run *r, unsigned threads) {
    pthread_t thread[64];
    double total[QUESTIONS_MAX], first[QUESTIONS_MAX];
    atomic_store(&r->next, 0);
    double begun = clock_of(CLOCK_MONOTONIC), cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, ask_all, r) != 0) exit(1);
    for (unsigned i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    double seconds = clock_of(CLOCK_MONOTONIC) - begun;
    cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    uint64_t steps = 0, hash = 14695981039346656037u;
    for (uint32_t i = 0; i < r->count; i++) {
        const question *q = &r->questions[i];
        steps += q->steps;
        hash = (hash ^ q->hash) * 1099511628211u;
        total[i] = q->total_ms;
        first[i] = q->first_ms;
    }
    printf("{\"bench\":\"questions\",\"how\":\"%s\",\"at_once\":%u,\"questions\":%u,"
           "\"steps\":%llu,\"steps_per_s\":%.2f,\"cpu_ms_per_step\":%.2f,\"question_ms\":%.1f,"
           "\"first_ms\":%.1f,\"seconds\":%.2f,\"answers\":\"%016llx\"}\n",
           r->how, threads, r->count, (unsigned long long)steps, (double)steps / seconds,
           1e3 * cpu / (double)steps, median(total, r->count), median(first, r->count), seconds,
           (unsigned long long)hash);
    fflush(stdout);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)info;
    (void)kind;
    (void)at;
    return remove(path);
}

int main(int argc, char **argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: bench_questions MODEL TEXT BACKEND HOW QUESTIONS TOKENS N...\n");
        return 2;
    }
    char data[] = "/tmp/loci-bench-XXXXXX";
    loci_error err = {0};
    run r = {.how = argv[4],
             .count = (uint32_t)strtoul(argv[5], NULL, 10),
             .tokens = (uint32_t)strtoul(argv[6], NULL, 10)};
    unsigned most = 1;
    for (int i = 7; i < argc; i++)
        if ((unsigned)strtoul(argv[i], NULL, 10) > most)
            most = (unsigned)strtoul(argv[i], NULL, 10);
    if (r.count == 0 || r.count > QUESTIONS_MAX || most > 64 || !mkdtemp(data)) return 2;
    loci_engine_options options = {
        .data = data, .model = argv[1], .backend = argv[3], .queries_max = most};
    loci_buf text = read_text(argv[2]);
    r.questions = calloc(r.count, sizeof *r.questions);
    if (!r.questions) return 1;
    for (uint32_t i = 0; i < r.count; i++) draw_question(&text, i + 1, &r.questions[i]);
    check(loci_engine_open(&options, &r.engine, &err), &err);
    register_text(r.engine, &text);
    for (int i = 7; i < argc; i++) measure(&r, (unsigned)strtoul(argv[i], NULL, 10));
    loci_engine_close(r.engine);
    loci_buf_fini(&text);
    free(r.questions);
    nftw(data, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return 0;
}
