/* SPDX-License-Identifier: Apache-2.0
 *
 * Registration, and questions that run at the same time over one corpus; JSON lines.
 *
 *   bench_questions [OPTIONS] MODEL TEXT[,TEXT...] BACKEND HOW[,HOW...] QUESTIONS TOKENS N...
 *
 * MODEL is a folder. Each TEXT gets a corpus of its own, encoded independently, and is asked when
 * nothing is left to be indexed or merged: a file; words:TOKENS, about so many tokens of words that
 * models of random_model.py --words know; generated:TOKENS, the same with keys and values from a
 * generator (generated.h). HOW is read-twice, hierarchical, squeezed or dense. The same QUESTIONS
 * questions (N where that is more), each some words of the text, are answered with at most TOKENS
 * tokens, sampled at temperature 1 with a fixed seed, by N threads that take one after the other.
 *
 * opened           seconds until the engine was; anonymous memory of the process by then
 * registered       encode_s, index_s: what the ingest thread spent; searchable_s, merged_s: until
 *                  all was searchable, and until no extents were left to be merged;
 *                  tokens_per_s: by searchable_s
 * questions        cold: one question just after, whose corpus no cache holds.
 *   steps_per_s    tokens decoded in all, by the wall clock from the first question to the last
 *                  answer; question_ms, first_ms: medians of a question's time
 *   decode_per_s   tokens a second of one question while it decodes (median), times N
 *   lookup_ms      of a question in look-ups (median), its prompt's included
 *   cpu_ms_per_step  processor time of the whole process; with --blocking it does not count
 *                  waiting for the device
 *   answers        a hash of all answers in order: the same for every N up to the number of
 *                  questions (for a larger N more are asked), or something is wrong; but where a
 *                  device reads layers for several questions together, which rounds otherwise
 *   hits, misses, cache_mib: of pairs in the device's memory
 */
#include <ftw.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "services/common/options.h"
#include "services/engine/engine.h"
#include "tests/bench/generated.h"

#ifdef LOCI_WITH_CUDA
#include <cuda_profiler_api.h>

#include "attention/cuda/pairs.h"
#include "services/engine/query.h"
#endif

#define QUESTIONS_MAX 1024u
#define WORDS 8u

typedef struct settings {
    const char *data, *kv;
    uint64_t budget, memory, dense_layers;
    bool blocking, profile, profile_prompt;
} settings;

typedef struct question {
    char text[160];
    uint64_t hash, steps;
    uint32_t pieces;          /* of the answer so far */
    const settings *profiled; /* or NULL */
    double total_ms, first_ms, lookup_ms, decode_per_s;
} question;

typedef struct run {
    loci_engine *engine;
    const settings *settings;
    const char *name, *how; /* of the text */
    uint64_t corpus_tokens;
    uint32_t tokens, count;
    question *questions;
    atomic_uint next;
} run;

static void check(loci_status status, const loci_error *err) {
    if (status == LOCI_OK) return;
    fprintf(stderr, "bench_questions: %s\n", err->text);
    exit(1);
}

static double clock_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t hash_text(uint64_t hash, const char *text) { /* FNV-1a */
    for (; *text; text++) hash = (hash ^ (uint8_t)*text) * 1099511628211u;
    return hash;
}

/* A profiler that waits for it sees two pieces of the answer, or all that comes before the first.
 */
static void profile(const settings *s, uint32_t piece) {
#ifdef LOCI_WITH_CUDA
    if (piece == (s->profile_prompt ? 0 : 8)) (void)cudaProfilerStart();
    if (piece == (s->profile_prompt ? 1 : 10)) (void)cudaProfilerStop();
#else
    (void)s;
    (void)piece;
#endif
}

static loci_status on_event(void *ctx, const loci_event *event, loci_error *err) {
    (void)err;
    question *q = ctx;
    if (event->kind == LOCI_EVENT_DELTA) q->hash = hash_text(q->hash, event->text);
    if (event->kind == LOCI_EVENT_DELTA && q->profiled) profile(q->profiled, ++q->pieces);
    if (event->kind == LOCI_EVENT_USAGE) {
        q->steps = event->usage->decode_steps;
        q->total_ms = event->usage->total_ms;
        q->first_ms = event->usage->first_token_ms;
        q->lookup_ms = event->usage->lookup_ms;
        q->decode_per_s = event->usage->decode_tokens_per_s;
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
                                       .budget = (uint32_t)r->settings->budget,
                                       .max_tokens = r->tokens,
                                       .temperature = 1,
                                       .seed = i + 1};
        q->hash = 14695981039346656037u;
        q->pieces = 0;
        bool profiled = r->settings->profile || r->settings->profile_prompt;
        q->profiled = profiled && i == 0 ? r->settings : NULL;
        if (q->profiled) profile(q->profiled, 0);
        check(loci_engine_answer(r->engine, &request, NULL, on_event, q, &err), &err);
    }
    return NULL;
}

/* --- the corpus --------------------------------------------------------------------------------
 */

/* Words of two syllables, sentences of ten words, paragraphs of ten sentences: five bytes a token.
 */
static loci_buf make_text(uint64_t tokens) {
    static const char syllables[] = "bacedifoguhajekilomunaperisotuva";
    loci_buf text = LOCI_BUF_INIT;
    uint64_t state = 1;
    for (uint64_t word = 0, written = 0; written < tokens; word++, written++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        char bytes[] = {syllables[state >> 60 << 1], syllables[(state >> 60 << 1) + 1],
                        syllables[(state >> 56 & 15) << 1],
                        syllables[((state >> 56 & 15) << 1) + 1]};
        loci_buf_append(&text, bytes, sizeof bytes);
        bool sentence = word % 10 == 9;
        if (sentence) loci_buf_append(&text, ".", 1);
        loci_buf_append(&text, word % 100 == 99 ? "\n" : " ", 1);
        written += sentence;
    }
    return text;
}

/* *tokens: how many are generated, 0 = none. */
static loci_buf read_text(const char *name, uint64_t *tokens) {
    loci_buf text = LOCI_BUF_INIT;
    static uint8_t bytes[1 << 16];
    const char *colon = strchr(name, ':');
    bool generated = strncmp(name, "generated:", 10) == 0;
    *tokens = 0;
    if (generated || strncmp(name, "words:", 6) == 0) {
        uint64_t count = strtoull(colon + 1, NULL, 10);
        if (generated) *tokens = count;
        text = make_text(generated ? count + count / 16 : count);
    } else {
        FILE *file = fopen(name, "rb");
        if (!file) {
            fprintf(stderr, "bench_questions: cannot read %s\n", name);
            exit(1);
        }
        for (size_t len; (len = fread(bytes, 1, sizeof bytes, file)) > 0;)
            loci_buf_append(&text, bytes, len);
        fclose(file);
    }
    if (!loci_buf_text(&text) || text.len < 4096) exit(1);
    return text;
}

static void put_text(loci_engine *engine, const loci_corpus_options *options,
                     const loci_buf *text) {
    loci_error err = {0};
    loci_corpus_info info;
    loci_document_writer *writer;
    loci_document_info document;
    bool unchanged;
    loci_store *store = loci_engine_store(engine);
    check(loci_engine_create_corpus(engine, "bench", options, &info, &err), &err);
    check(loci_document_begin(store, "bench", "text", loci_slice_of(NULL, 0), &writer, &err), &err);
    check(loci_document_append(writer, loci_slice_of(text->data, text->len), &err), &err);
    check(loci_document_commit(writer, &document, &unchanged, &err), &err);
    loci_ingest_wake(loci_engine_ingest(engine));
    loci_ingest_settle(loci_engine_ingest(engine), "bench");
}

/* Waits until nothing is pending; spent: seconds of encoding, of indexing. */
static void wait_searchable(loci_ingest *ingest, double spent[2]) {
    double before = clock_of(CLOCK_MONOTONIC);
    while (!loci_ingest_settled(ingest, "bench")) {
        loci_ingest_progress progress;
        loci_error err = {0};
        check(loci_ingest_progress_of(ingest, "bench", &progress, &err), &err);
        check(progress.failure.status, &progress.failure);
        loci_sleep_ms(2);
        double now = clock_of(CLOCK_MONOTONIC);
        if (strcmp(progress.stage, "encoding") == 0) spent[0] += now - before;
        if (strcmp(progress.stage, "indexing") == 0) spent[1] += now - before;
        before = now;
    }
}

static loci_corpus_info wait_merged(loci_engine *engine) {
    for (;; loci_sleep_ms(20)) {
        loci_corpus_info info;
        loci_ingest_progress progress;
        loci_error err = {0};
        loci_store *store = loci_engine_store(engine);
        check(loci_corpus_get(store, "bench", &info, &err), &err);
        check(loci_ingest_progress_of(loci_engine_ingest(engine), "bench", &progress, &err), &err);
        check(progress.merge_failure.status, &progress.merge_failure);
        if (info.merged) return info;
    }
}

/* Into a corpus of its own; a line of how long that took. */
static void register_text(run *r, const loci_buf *text, uint64_t generated) {
    loci_error err = {0};
    loci_settings_change change = {.dense_layers = (int64_t)r->settings->dense_layers - 1};
    loci_corpus_options options = {.encoding = LOCI_ENCODING_INDEPENDENT,
                                   .kv_int8 = strcmp(r->settings->kv, "int8") == 0,
                                   .settings = &change};
    double begun = clock_of(CLOCK_MONOTONIC), spent[2] = {0, 0};
    if (generated)
        check(generated_corpus(r->engine, "bench", &options, loci_slice_of(text->data, text->len),
                               (uint32_t)generated, &err),
              &err);
    else
        put_text(r->engine, &options, text);
    wait_searchable(loci_engine_ingest(r->engine), spent);
    double searchable = clock_of(CLOCK_MONOTONIC) - begun;
    loci_corpus_info info = wait_merged(r->engine);
    double merged = clock_of(CLOCK_MONOTONIC) - begun;
    r->corpus_tokens = info.tokens;
    printf("{\"bench\":\"registered\",\"text\":\"%s\",\"kv\":\"%s\",\"tokens\":%llu,"
           "\"segments\":%llu,\"extents\":%llu,\"disk_mib\":%llu,\"encode_s\":%.2f,"
           "\"index_s\":%.2f,\"searchable_s\":%.2f,\"merged_s\":%.2f,\"tokens_per_s\":%.0f}\n",
           r->name, r->settings->kv, (unsigned long long)info.tokens,
           (unsigned long long)info.segments, (unsigned long long)info.extents,
           (unsigned long long)(info.bytes_on_disk >> 20), spent[0], spent[1], searchable, merged,
           (double)info.tokens / searchable);
    fflush(stdout);
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

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, uint32_t count) {
    qsort(values, count, sizeof *values, by_value);
    return values[count / 2];
}

typedef struct device {
    uint64_t hits, misses, cache_mib, used_mib;
} device;

/* Of the cuda backend; else zeros. */
static device look_at_device(loci_engine *engine) {
    device out = {0};
#ifdef LOCI_WITH_CUDA
    if (engine->backend->ops == &loci_backend_cuda) {
        const loci_cuda *cuda = engine->backend->ctx;
        loci_cuda_pairs_stats stats;
        size_t available = 0, total = 0;
        loci_cuda_pairs_stats_of(cuda->pairs, &stats);
        (void)cudaMemGetInfo(&available, &total);
        out = (device){stats.hits, stats.misses, stats.bytes >> 20, (total - available) >> 20};
    }
#else
    (void)engine;
#endif
    return out;
}

static double median_of(const run *r, size_t field) {
    double values[QUESTIONS_MAX];
    for (uint32_t i = 0; i < r->count; i++)
        memcpy(&values[i], (const char *)&r->questions[i] + field, sizeof values[i]);
    return median(values, r->count);
}

static void measure(run *r, unsigned threads, bool cold) {
    pthread_t thread[64];
    atomic_store(&r->next, 0);
    device before = look_at_device(r->engine);
    double begun = clock_of(CLOCK_MONOTONIC), cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID);
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, ask_all, r) != 0) exit(1);
    for (unsigned i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    double seconds = clock_of(CLOCK_MONOTONIC) - begun;
    cpu = clock_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    device after = look_at_device(r->engine);
    uint64_t steps = 0, hash = 14695981039346656037u;
    for (uint32_t i = 0; i < r->count; i++) {
        steps += r->questions[i].steps;
        hash = (hash ^ r->questions[i].hash) * 1099511628211u;
    }
    printf("{\"bench\":\"questions\",\"text\":\"%s\",\"kv\":\"%s\",\"context\":%llu,"
           "\"how\":\"%s\",\"budget\":%llu,\"cold\":%s,\"at_once\":%u,\"questions\":%u,"
           "\"steps\":%llu,\"steps_per_s\":%.2f,\"decode_per_s\":%.2f,\"first_ms\":%.1f,"
           "\"question_ms\":%.1f,\"lookup_ms\":%.1f,\"cpu_ms_per_step\":%.2f,\"seconds\":%.2f,"
           "\"answers\":\"%016llx\",\"hits\":%llu,\"misses\":%llu,\"cache_mib\":%llu,"
           "\"device_mib\":%llu}\n",
           r->name, r->settings->kv, (unsigned long long)r->corpus_tokens, r->how,
           (unsigned long long)r->settings->budget, cold ? "true" : "false", threads, r->count,
           (unsigned long long)steps, (double)steps / seconds,
           threads * median_of(r, offsetof(question, decode_per_s)),
           median_of(r, offsetof(question, first_ms)), median_of(r, offsetof(question, total_ms)),
           median_of(r, offsetof(question, lookup_ms)), 1e3 * cpu / (double)(steps ? steps : 1),
           seconds, (unsigned long long)hash, (unsigned long long)(after.hits - before.hits),
           (unsigned long long)(after.misses - before.misses), (unsigned long long)after.cache_mib,
           (unsigned long long)after.used_mib);
    fflush(stdout);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)info;
    (void)kind;
    (void)at;
    return remove(path);
}

/* Splits a list at its commas, in place; the next item, NULL at the end. */
static char *next_item(char **list) {
    char *item = *list, *comma = item ? strchr(item, ',') : NULL;
    if (comma) *comma = 0;
    *list = comma ? comma + 1 : NULL;
    return item;
}

/* One text: its corpus, all ways to ask, all numbers of threads. */
static void run_text(run *r, const char *hows, const char **numbers, size_t count,
                     uint32_t questions) {
    loci_error err = {0};
    uint64_t generated;
    loci_buf text = read_text(r->name, &generated);
    bool cold = true;
    for (uint32_t i = 0; i < QUESTIONS_MAX; i++) draw_question(&text, i + 1, &r->questions[i]);
    register_text(r, &text, generated);
    char *list = strdup(hows), *rest = list;
    if (!list) exit(1);
    while ((r->how = next_item(&rest)) != NULL) {
        r->count = 1;
        if (cold) measure(r, 1, true);
        cold = false;
        for (size_t i = 0; i < count; i++) {
            unsigned threads = (unsigned)strtoul(numbers[i], NULL, 10);
            r->count = questions > threads ? questions : threads;
            measure(r, threads, false);
        }
    }
    free(list);
    loci_buf_fini(&text);
    check(loci_corpus_delete(loci_engine_store(r->engine), "bench", &err), &err);
}

static void open_engine(run *r, const char *model, const char *backend, const char *data,
                        unsigned queries) {
    loci_error err = {0};
    loci_engine_options options = {.data = data,
                                   .model = model,
                                   .backend = backend,
                                   .memory_bytes = r->settings->memory,
                                   .queries_max = queries};
    double begun = clock_of(CLOCK_MONOTONIC);
#ifdef LOCI_WITH_CUDA
    if (r->settings->blocking) (void)cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync);
#endif
    check(loci_engine_open(&options, &r->engine, &err), &err);
    loci_engine_status status;
    loci_engine_status_of(r->engine, &status);
    printf("{\"bench\":\"opened\",\"backend\":\"%s\",\"seconds\":%.2f,\"anonymous_mib\":%llu,"
           "\"device_mib\":%llu}\n",
           loci_engine_backend_name(r->engine), clock_of(CLOCK_MONOTONIC) - begun,
           (unsigned long long)(status.memory_used_bytes >> 20),
           (unsigned long long)look_at_device(r->engine).used_mib);
    fflush(stdout);
}

static int usage(const loci_option *options, size_t count) {
    fprintf(stderr, "usage: bench_questions [OPTIONS] MODEL TEXT[,TEXT...] BACKEND HOW[,HOW...] "
                    "QUESTIONS TOKENS N...\n");
    loci_options_help(stderr, options, count);
    return 2;
}

int main(int argc, char **argv) {
    settings s = {.data = "/tmp", .kv = "bf16"};
    const loci_option options[] = {
        {"data", 0, LOCI_OPTION_STRING, &s.data, 0, 0, "DIR", "where the store is made (/tmp)"},
        {"kv", 0, LOCI_OPTION_STRING, &s.kv, 0, 0, "TYPE", "bf16 or int8"},
        {"budget", 0, LOCI_OPTION_U64, &s.budget, 0, 1e9, "TOKENS", "of a look-up"},
        {"memory", 0, LOCI_OPTION_U64, &s.memory, 0, 1e15, "BYTES", "budget of the engine"},
        {"dense-layers", 0, LOCI_OPTION_U64, &s.dense_layers, 0, 1e3, "N",
         "of the corpus, plus one; 0: the default"},
        {"blocking", 0, LOCI_OPTION_FLAG, &s.blocking, 0, 0, NULL, "wait without a processor"},
        {"profile", 0, LOCI_OPTION_FLAG, &s.profile, 0, 0, NULL,
         "cudaProfilerStart and Stop around two pieces of each first answer"},
        {"profile-prompt", 0, LOCI_OPTION_FLAG, &s.profile_prompt, 0, 0, NULL,
         "the same around all that comes before its first piece"},
    };
    const size_t option_count = sizeof options / sizeof *options;
    const char *args[64];
    size_t count = 0;
    loci_error err = {0};
    if (argc > 64) return 2;
    check(loci_options_parse(options, option_count, argc, argv, args, &count, &err), &err);
    if (count < 7) return usage(options, option_count);
    char data[256];
    run r = {.settings = &s, .tokens = (uint32_t)strtoul(args[5], NULL, 10)};
    uint32_t questions = (uint32_t)strtoul(args[4], NULL, 10);
    unsigned most = 1;
    for (size_t i = 6; i < count; i++)
        if ((unsigned)strtoul(args[i], NULL, 10) > most)
            most = (unsigned)strtoul(args[i], NULL, 10);
    snprintf(data, sizeof data, "%s/loci-bench-XXXXXX", s.data);
    if (questions == 0 || questions > QUESTIONS_MAX || most > 64 || !mkdtemp(data)) return 2;
    r.questions = calloc(QUESTIONS_MAX, sizeof *r.questions);
    char *list = strdup(args[1]), *rest = list;
    if (!r.questions || !list) return 1;
    open_engine(&r, args[0], args[2], data, most);
    while ((r.name = next_item(&rest)) != NULL)
        run_text(&r, args[3], args + 6, count - 6, questions);
    loci_engine_close(r.engine);
    free(list);
    free(r.questions);
    nftw(data, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return 0;
}
