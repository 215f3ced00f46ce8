/* SPDX-License-Identifier: Apache-2.0
 *
 * Accuracy, bytes and time of sparse attention against dense, on a key-value dump (see
 * tests/attention/corpus_fixture.h) or on generated keys; one JSON line for each layer and kind of
 * step ("question": several rows; "decode": one row).
 *
 * recall: the share of the true attention mass outside the steady zone that the selected tokens
 * hold, over rows and heads that give the steady zone less than half; mean, and the mean of the
 * worst KV head. mass: share of all mass read, steady zone included. error: relative L2 error of
 * the output (the steady zone's values counted as zero).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "tests/attention/corpus_fixture.h"

typedef struct options {
    const char *kv, *isa;
    unsigned threads, repeat;
    uint32_t tokens, extent_tokens, rounds, limit_steps;
    loci_select_params params;
} options;

typedef struct tally {
    double recall, mass, error, recall_min, mass_min;
    double head_recall[64], head_mass[64];
    uint32_t head_count[64], head_all[64];
    uint32_t count, all, below_half;
    double *errors;
    loci_lookup_stats stats;
    uint64_t ns[4], steps, rows;
} tally;

static int usage(void) {
    (void)fprintf(stderr,
                  "usage: bench_attention [--kv FILE | --tokens N] [--isa NAME] [--threads N]\n"
                  "  [--extent-tokens N] [--rounds N] [--repeat N] [--steps N] [--mode NAME]\n"
                  "  [--top-p X] [--budget N] [--roots X] [--roots-min N]\n"
                  "  [--candidates X] [--candidates-min N] [--candidates-max N] [--tail 1]\n"
                  "  [--then ...: more runs over the same corpus, from the settings so far]\n");
    return 2;
}

static bool parse_one(options *o, const char *name, const char *value) {
    char *end = NULL;
    double number = strtod(value, &end);
    uint32_t whole = number >= 0 && number <= 4e9 ? (uint32_t)number : 0;
    loci_select_params *p = &o->params;
    if (strcmp(name, "--kv") == 0) return (o->kv = value) != NULL;
    if (strcmp(name, "--isa") == 0) return (o->isa = value) != NULL;
    if (strcmp(name, "--mode") == 0) {
        p->mode = value[0] == 'd'   ? LOCI_MODE_DENSE
                  : value[0] == 's' ? LOCI_MODE_SQUEEZED
                                    : LOCI_MODE_HIERARCHICAL;
        return true;
    }
    if (end == value || *end != '\0') return false;
    if (strcmp(name, "--threads") == 0)
        o->threads = whole;
    else if (strcmp(name, "--repeat") == 0)
        o->repeat = whole;
    else if (strcmp(name, "--tokens") == 0)
        o->tokens = whole;
    else if (strcmp(name, "--extent-tokens") == 0)
        o->extent_tokens = whole;
    else if (strcmp(name, "--rounds") == 0)
        o->rounds = whole;
    else if (strcmp(name, "--steps") == 0)
        o->limit_steps = whole;
    else if (strcmp(name, "--top-p") == 0)
        p->top_p = (float)number;
    else if (strcmp(name, "--budget") == 0)
        p->budget = whole;
    else if (strcmp(name, "--roots") == 0)
        p->roots = (float)number;
    else if (strcmp(name, "--roots-min") == 0)
        p->roots_min = whole;
    else if (strcmp(name, "--candidates") == 0)
        p->candidates = (float)number;
    else if (strcmp(name, "--candidates-min") == 0)
        p->candidates_min = whole;
    else if (strcmp(name, "--candidates-max") == 0)
        p->candidates_max = whole;
    else if (strcmp(name, "--tail") == 0)
        p->estimate_tail = whole != 0;
    else
        return false;
    return true;
}

/* Arguments up to the next --then, which separates runs over the same corpus. */
static bool parse_run(options *o, int argc, char **argv, int *at) {
    for (; *at < argc; *at += 2) {
        if (strcmp(argv[*at], "--then") == 0) {
            (*at)++;
            return true;
        }
        if (*at + 1 >= argc || !parse_one(o, argv[*at], argv[*at + 1])) return false;
    }
    return true;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Steps for generated keys: 16 questions of 12 rows, each followed by two single rows. A row looks
 * for one planted key in the middle of noise. */
static void plant_queries(fixture *f) {
    uint64_t rng = 77;
    f->steps = 48;
    f->rows = 16 * 14;
    f->step_begin = calloc(f->steps + 1, sizeof *f->step_begin);
    f->q = calloc(f->layers, sizeof *f->q);
    f->steady = calloc(f->layers, sizeof *f->steady);
    LOCI_ASSERT(f->step_begin && f->q && f->steady);
    for (uint32_t s = 0; s < f->steps; s++)
        f->step_begin[s + 1] = f->step_begin[s] + (s % 3 == 0 ? 12 : 1);
    for (uint32_t l = 0; l < f->layers; l++) {
        f->q[l] = malloc((size_t)f->rows * f->q_heads * f->dim * sizeof(float));
        f->steady[l] = malloc((size_t)f->rows * f->q_heads * sizeof(float));
        LOCI_ASSERT(f->q[l] && f->steady[l]);
        for (size_t i = 0; i < (size_t)f->rows * f->q_heads; i++) {
            size_t pair = l * f->kv_heads + i % f->q_heads / (f->q_heads / f->kv_heads);
            size_t needle = fixture_random(&rng) % f->tokens;
            for (uint32_t d = 0; d < f->dim; d++) {
                float key = loci_bf16_to_f32(f->k[pair][needle * f->dim + d]);
                f->q[l][i * f->dim + d] = 1.2f * key + 0.5f * fixture_normal(&rng);
            }
            f->steady[l][i] = 4.0f;
        }
    }
}

static void tally_row(tally *t, const fixture *f, const fixture_run *sparse,
                      const fixture_run *dense, size_t row, uint32_t h) {
    size_t at = row * f->q_heads + h;
    uint32_t kv = h / (f->q_heads / f->kv_heads);
    double steady = (double)sparse->steady[at], full = (double)dense->lse[at];
    double part = (double)sparse->lse[at], top = fmax(steady, full);
    double all = exp(steady - top) + exp(full - top), read = exp(steady - top) + exp(part - top);
    double difference = 0.0, norm = 0.0;
    for (uint32_t d = 0; d < f->dim; d++) {
        double a = (double)sparse->out[at * f->dim + d] * exp(part - top) / read;
        double b = (double)dense->out[at * f->dim + d] * exp(full - top) / all;
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    double mass = read / all, recall = exp(part - full);
    t->errors[t->all++] = norm > 0.0 ? sqrt(difference / norm) : 0.0;
    t->mass += mass;
    t->mass_min = fmin(t->mass_min, mass);
    t->head_mass[kv] += mass;
    t->head_all[kv]++;
    if (exp(steady - top) / all >= 0.5) return;
    t->recall += recall;
    t->below_half += recall < 0.5;
    t->recall_min = fmin(t->recall_min, recall);
    t->head_recall[kv] += recall;
    t->head_count[kv]++;
    t->count++;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void print_tally(tally *t, const fixture *f, const options *o, uint32_t layer,
                        const char *kind) {
    double worst = 1.0, worst_mass = 1.0, mean_error = 0.0;
    for (uint32_t h = 0; h < f->kv_heads; h++) {
        if (t->head_count[h]) worst = fmin(worst, t->head_recall[h] / t->head_count[h]);
        worst_mass = fmin(worst_mass, t->head_mass[h] / t->head_all[h]);
    }
    qsort(t->errors, t->all, sizeof *t->errors, compare_doubles);
    for (uint32_t i = 0; i < t->all; i++) mean_error += t->errors[i] / t->all;
    double dense = (double)t->stats.dense_kv_bytes, steps = (double)t->steps;
    double bytes = (double)(t->stats.root_bytes + t->stats.leaf_bytes + t->stats.code_bytes +
                            t->stats.hash_bytes + t->stats.kv_bytes + t->stats.tail_bytes);
    printf("{\"bench\":\"attention\",\"backend\":\"%s\",\"layer\":%u,\"kind\":\"%s\","
           "\"tokens\":%u,\"steps\":%.0f,\"rows\":%.1f,\"recall\":%.4f,\"recall_worst_head\":%.4f,"
           "\"recall_min\":%.4f,\"below_half\":%.4f,\"rows_counted\":%u,\"mass\":%.4f,\"mass_worst_"
           "head\":%.4f,"
           "\"mass_min\":%.4f,\"error\":%.4f,\"error_p95\":%.4f,",
           f->backend->ops->describe(f->backend), layer, kind, f->tokens, steps,
           (double)t->rows / steps, t->count ? t->recall / t->count : 1.0, worst, t->recall_min,
           t->count ? (double)t->below_half / t->count : 0.0, t->count, t->mass / t->all,
           worst_mass, t->mass_min, mean_error, t->errors[t->all * 95 / 100]);
    printf("\"root_share\":%.5f,\"leaf_share\":%.5f,\"code_share\":%.5f,\"hash_share\":%.5f,"
           "\"kv_share\":%.5f,\"kv_leaf_share\":%.5f,\"tail_share\":%.5f,\"share\":%.5f,"
           "\"selected_row_head\":%.0f,\"nodes_us\":%.0f,\"codes_us\":%.0f,\"select_us\":%.0f,"
           "\"attend_us\":%.0f,\"total_us\":%.0f}\n",
           (double)t->stats.root_bytes / dense, (double)t->stats.leaf_bytes / dense,
           (double)t->stats.code_bytes / dense, (double)t->stats.hash_bytes / dense,
           (double)t->stats.kv_bytes / dense, (double)t->stats.kv_leaf_bytes / dense,
           (double)t->stats.tail_bytes / dense, bytes / dense,
           (double)t->stats.selected_tokens / (double)t->rows / f->kv_heads,
           (double)t->ns[0] / steps / 1e3, (double)t->ns[1] / steps / 1e3,
           (double)t->ns[2] / steps / 1e3, (double)t->ns[3] / steps / 1e3,
           (double)(t->ns[0] + t->ns[1] + t->ns[2] + t->ns[3]) / steps / 1e3);
    (void)o;
}

static void add_stats(loci_lookup_stats *sum, const loci_lookup_stats *s) {
    sum->root_bytes += s->root_bytes;
    sum->leaf_bytes += s->leaf_bytes;
    sum->code_bytes += s->code_bytes;
    sum->hash_bytes += s->hash_bytes;
    sum->kv_bytes += s->kv_bytes;
    sum->kv_leaf_bytes += s->kv_leaf_bytes;
    sum->tail_bytes += s->tail_bytes;
    sum->dense_kv_bytes += s->dense_kv_bytes;
    sum->selected_tokens += s->selected_tokens;
}

static loci_status bench_layer(const fixture *f, const options *o, uint32_t layer, bool decode,
                               loci_error *err) {
    tally t = {.recall_min = 1.0, .mass_min = 1.0};
    size_t values = (size_t)f->rows * f->q_heads * f->dim;
    float *memory = malloc((2 * values + 2 * (size_t)f->rows * f->q_heads) * sizeof *memory);
    t.errors = malloc((size_t)f->rows * f->q_heads * sizeof *t.errors);
    LOCI_ASSERT(memory && t.errors);
    loci_status status = LOCI_OK;
    for (uint32_t s = 0; s < f->steps && s < o->limit_steps; s++) {
        uint32_t rows = f->step_begin[s + 1] - f->step_begin[s];
        if ((rows == 1) != decode) continue;
        size_t first = (size_t)f->step_begin[s] * f->q_heads;
        fixture_run sparse = {.layer = layer,
                              .rows = rows,
                              .q = f->q[layer] + first * f->dim,
                              .steady = f->steady[layer] + first,
                              .params = o->params,
                              .out = memory,
                              .lse = memory + 2 * values};
        fixture_run dense = sparse;
        dense.params.mode = LOCI_MODE_DENSE;
        dense.out = memory + values;
        dense.lse = sparse.lse + (size_t)f->rows * f->q_heads;
        LOCI_TRY_GOTO(fixture_look_up(f, &dense, err), out);
        for (unsigned i = 0; i <= o->repeat; i++)
            LOCI_TRY_GOTO(fixture_look_up(f, &sparse, err), out);
        for (int i = 0; i < 4; i++) t.ns[i] += sparse.ns[i];
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < f->q_heads; h++) tally_row(&t, f, &sparse, &dense, r, h);
        add_stats(&t.stats, &sparse.stats);
        t.steps++;
        t.rows += rows;
    }
    if (t.steps) print_tally(&t, f, o, layer, decode ? "decode" : "question");
out:
    free(memory);
    free(t.errors);
    return status;
}

int main(int argc, char **argv) {
    options o = {
        .tokens = 65536, .extent_tokens = LOCI_EXTENT_SEAL_TOKENS, .limit_steps = 1u << 30};
    fixture f = {0};
    loci_error err = {0};
    loci_select_defaults(&o.params);
    int at = 1;
    if (!parse_run(&o, argc, argv, &at)) return usage();
    loci_status status;
    if (o.kv) {
        LOCI_TRY_GOTO(fixture_load(&f, o.kv, &err), out);
    } else {
        fixture_shape shape = {.layers = 1,
                               .kv_heads = 2,
                               .dim = 64,
                               .q_heads = 6,
                               .tokens = o.tokens,
                               .segment_tokens = 250,
                               .clusters = 2000,
                               .spread = 0.7f,
                               .seed = 5};
        fixture_generate(&f, &shape);
        plant_queries(&f);
    }
    loci_pair_build_options build = {.iterations = o.rounds, .position_codes = true, .isa = o.isa};
    uint64_t start = now_ns();
    LOCI_TRY_GOTO(fixture_build(&f, o.isa, o.threads, o.extent_tokens, 0, &build, &err), out);
    double seconds = (double)(now_ns() - start) / 1e9;
    printf("{\"bench\":\"index_build\",\"backend\":\"%s\",\"tokens\":%u,\"pairs\":%u,"
           "\"seconds\":%.3f,\"seconds_per_full_pair\":%.4f}\n",
           f.backend->ops->describe(f.backend), f.tokens, f.layers * f.kv_heads, seconds,
           seconds * LOCI_EXTENT_SEAL_TOKENS / f.tokens / (f.layers * f.kv_heads));
    for (;;) {
        for (uint32_t l = 0; l < f.layers; l++) {
            LOCI_TRY_GOTO(bench_layer(&f, &o, l, false, &err), out);
            LOCI_TRY_GOTO(bench_layer(&f, &o, l, true, &err), out);
        }
        if (at >= argc) break;
        if (!parse_run(&o, argc, argv, &at)) {
            fixture_close(&f);
            return usage();
        }
    }
out:
    fixture_close(&f);
    if (status == LOCI_OK) return 0;
    (void)fprintf(stderr, "bench_attention: %s\n", err.text);
    return 1;
}
