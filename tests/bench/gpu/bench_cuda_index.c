/* SPDX-License-Identifier: Apache-2.0
 *
 * Index building with the cuda backend: pairs of TOKENS tokens (default 1048576), one after another
 * as registration builds them; blobs go nowhere, or, with --write, one behind the other into a file
 * in DIR that is removed. One JSON line.
 *
 *   bench_cuda_index [--pairs N] [--dim D] [--threads T] [--cpu] [--blocking] [--write DIR]
 *                    [TOKENS]
 *
 * Rows are a few pairs in turn. ms_pair: mean of all but the first. s_112: that for 28 layers of 4
 * KV heads, reckoned from N pairs (timed: true where N is 112). cluster_ms, finish_ms: one pair
 * alone: the device's part with its copies, and what the host does after. user_s, system_s: the
 * process's time for a pair. put_ms: writing one. hash: of all pairs' headers.
 * --cpu: without the device, one pair after another. --blocking: who waits for the device does not
 * spin.
 */
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "attention/cluster.h"
#include "base/half.h"
#include "base/pool.h"
#include "tests/attention/corpus_fixture.h"
#include "tests/bench/gpu/bench.h"

#define SETS (LOCI_PAIRS_AHEAD_MOST + 1)

typedef struct bench {
    uint32_t tokens, dim, pairs, threads;
    bool cpu, blocking;
    const char *write; /* NULL = nowhere */
    int fd;
    loci_backend *backend;
    uint16_t *k[SETS], *v[SETS];
    uint32_t *slots;
    uint64_t first_put, last_put, put_ns, bytes, check;
    loci_error err;
} bench;

typedef struct drawing {
    const bench *b;
    uint16_t *rows;
    const float *topics;
    uint32_t topic_count;
    float spread;
    uint64_t seed;
} drawing;

static void draw_rows(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const drawing *d = arg;
    uint64_t rng = (d->seed + index) * 0x9e3779b97f4a7c15u | 1;
    uint32_t dim = d->b->dim;
    for (size_t t = index * 4096; t < (index + 1) * 4096 && t < d->b->tokens; t++) {
        const float *topic = d->topics + fixture_random(&rng) % d->topic_count * dim;
        for (uint32_t i = 0; i < dim; i++)
            d->rows[t * dim + i] =
                loci_f32_to_bf16(topic[i] + d->spread * (2.0f * fixture_uniform(&rng) - 1.0f));
    }
}

static uint16_t *draw(const bench *b, uint64_t seed) {
    size_t values = (size_t)b->tokens * b->dim;
    uint32_t topics = b->tokens / 64 + 1;
    uint64_t rng = seed | 1;
    float *topic = need(malloc((size_t)topics * b->dim * sizeof *topic));
    for (size_t i = 0; i < (size_t)topics * b->dim; i++) topic[i] = fixture_normal(&rng);
    drawing d = {b, need(malloc(values * sizeof(uint16_t))), topic, topics, 1.0f, seed};
    loci_pool_run(loci_backend_pool(b->backend), (b->tokens + 4095) / 4096, draw_rows, &d);
    free(topic);
    return d.rows;
}

static loci_status read_pair(void *ctx, uint32_t pair, loci_pair_rows *rows,
                             loci_pair_build_options *options, loci_error *err) {
    bench *b = ctx;
    (void)err;
    *rows = (loci_pair_rows){b->k[pair % SETS], b->v[pair % SETS], b->slots, b->tokens, b->dim};
    options->backend = b->cpu ? NULL : b->backend;
    return LOCI_OK;
}

static loci_status put_pair(void *ctx, uint32_t pair, loci_slice blob, uint64_t hash,
                            loci_error *err) {
    bench *b = ctx;
    uint64_t start = loci_now_ns();
    if (b->write && pwrite(b->fd, blob.data, blob.len, (off_t)b->bytes) != (ssize_t)blob.len)
        return loci_fail(err, LOCI_E_IO, "cannot write to %s", b->write);
    b->last_put = loci_now_ns();
    b->put_ns += b->last_put - start;
    if (pair == 0) b->first_put = b->last_put;
    b->bytes += blob.len;
    b->check = b->check * 31 + hash;
    return LOCI_OK;
}

/* One pair alone, in its parts. */
static void time_parts(bench *b, double *cluster_ms, double *finish_ms, double *whole_ms) {
    loci_pair_rows rows;
    loci_pair_build_options options = {0};
    loci_pair_job *job = NULL;
    loci_buf blob = LOCI_BUF_INIT;
    uint64_t hash, start = loci_now_ns();
    must(&b->err, read_pair(b, 0, &rows, &options, &b->err));
    must(&b->err, loci_pair_begin(&rows, &options, loci_backend_pool(b->backend), &job, &b->err));
    uint64_t begun = loci_now_ns();
    must(&b->err, loci_pair_finish(job, &blob, &hash, &b->err));
    uint64_t end = loci_now_ns();
    loci_buf_fini(&blob);
    *whole_ms = (double)(end - start) / 1e6;
    *finish_ms = (double)(end - begun) / 1e6;
    *cluster_ms = 0.0;
    if (b->cpu) return;
    uint32_t n = b->tokens, *lists = need(calloc(3 * (size_t)n, sizeof *lists));
    float *x = need(malloc((size_t)n * b->dim * sizeof *x));
    for (size_t i = 0; i < (size_t)n * b->dim; i++) x[i] = loci_bf16_to_f32(b->k[0][i]);
    loci_keys keys = {x, n, b->dim, 6, NULL};
    loci_clusters clusters = {lists, lists + n, lists + 2 * (size_t)n, 0, 0};
    start = loci_now_ns();
    must(&b->err, b->backend->ops->cluster_keys(b->backend, &keys, &clusters, &b->err));
    *cluster_ms = (double)(loci_now_ns() - start) / 1e6;
    free(lists);
    free(x);
}

static double seconds(struct timeval t) {
    return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

static bool parse(bench *b, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        uint32_t *to = &b->tokens;
        if (strcmp(argv[i], "--cpu") == 0) {
            b->cpu = true;
            continue;
        }
        if (strcmp(argv[i], "--blocking") == 0) {
            b->blocking = true;
            continue;
        }
        if (strcmp(argv[i], "--write") == 0 && i + 1 < argc) {
            b->write = argv[++i];
            continue;
        }
        static const char *const names[] = {"--pairs", "--dim", "--threads"};
        uint32_t *numbers[] = {&b->pairs, &b->dim, &b->threads};
        for (size_t n = 0; n < 3 && to == &b->tokens; n++)
            if (strcmp(argv[i], names[n]) == 0) to = numbers[n];
        if (to != &b->tokens) i++;
        if (i >= argc) return false;
        *to = (uint32_t)strtoul(argv[i], NULL, 10);
    }
    return b->tokens > 0 && b->pairs > 1 && b->dim > 0;
}

int main(int argc, char **argv) {
    bench b = {.tokens = 1u << 20, .dim = 128, .pairs = 8};
    if (!parse(&b, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_cuda_index [--pairs N] [--dim D] [--threads T] [--cpu] "
                              "[--write DIR] [TOKENS]\n");
        return 2;
    }
    loci_backend_options options = {.threads = b.threads};
    if (b.blocking) (void)cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync);
    b.backend = open_or_skip(&options);
    for (uint32_t s = 0; s < SETS; s++) {
        b.k[s] = draw(&b, 2 * s + 1);
        b.v[s] = draw(&b, 2 * s + 2);
    }
    b.slots = need(malloc(b.tokens * sizeof *b.slots));
    for (uint32_t t = 0; t < b.tokens; t++) b.slots[t] = t / 255 << 16 | t % 255;
    b.fd = b.write ? open(b.write, O_TMPFILE | O_RDWR, 0600) : -1;
    if (b.write && b.fd < 0) {
        (void)fprintf(stderr, "bench_cuda_index: cannot make a file in %s\n", b.write);
        return 1;
    }
    double cluster_ms, finish_ms, whole_ms;
    time_parts(&b, &cluster_ms, &finish_ms, &whole_ms); /* the first call pays for more */
    time_parts(&b, &cluster_ms, &finish_ms, &whole_ms);
    loci_pair_work work = {&b, read_pair, put_pair};
    uint32_t ahead = b.cpu ? 0 : loci_pairs_ahead(b.backend, b.tokens);
    struct rusage before, after;
    (void)getrusage(RUSAGE_SELF, &before);
    must(&b.err, loci_pairs_build(&work, b.pairs, ahead, loci_backend_pool(b.backend), &b.err));
    (void)getrusage(RUSAGE_SELF, &after);
    double user = seconds(after.ru_utime) - seconds(before.ru_utime);
    double system = seconds(after.ru_stime) - seconds(before.ru_stime);
    double ms = (double)(b.last_put - b.first_put) / 1e6 / (b.pairs - 1);
    printf("{\"bench\":\"cuda_index\",\"clusters\":\"%s\",\"tokens\":%u,\"dim\":%u,\"pairs\":%u,"
           "\"threads\":%u,\"ms_pair\":%.1f,\"pairs_s\":%.2f,\"s_112\":%.1f,\"timed\":%s,"
           "\"alone_ms\":%.1f,\"cluster_ms\":%.1f,\"finish_ms\":%.1f,\"user_s\":%.2f,"
           "\"system_s\":%.2f,\"put_ms\":%.1f,\"mib\":%llu,"
           "\"hash\":\"%016llx\"}\n",
           b.cpu ? "cpu" : "cuda", b.tokens, b.dim, b.pairs,
           loci_pool_threads(loci_backend_pool(b.backend)), ms, 1e3 / ms, ms * 112 / 1e3,
           b.pairs == 112 ? "true" : "false", whole_ms, cluster_ms, finish_ms, user / b.pairs,
           system / b.pairs, (double)b.put_ns / 1e6 / b.pairs,
           (unsigned long long)(b.bytes / b.pairs >> 20), (unsigned long long)b.check);
    return 0; /* the process ends with all it holds */
}
