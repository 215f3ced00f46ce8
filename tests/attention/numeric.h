/* SPDX-License-Identifier: Apache-2.0
 *
 * Small tools of the tests of numeric operations: a backend for each instruction set, arrays on
 * it, seeded random numbers, comparison.
 */
#ifndef LOCI_TESTS_NUMERIC_H
#define LOCI_TESTS_NUMERIC_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "attention/backend.h"
#include "attention/cpu/cpu.h"

#define UNUSED __attribute__((unused))

/* The same tests are built once for each backend; only the CPU has instruction sets. */
#ifdef LOCI_TEST_BACKEND
static const char *const isas[] UNUSED = {LOCI_TEST_BACKEND};
#else
#define LOCI_TEST_BACKEND "cpu"
#define LOCI_TEST_CPU /* tests that look inside it */
static const char *const isas[] UNUSED = {"portable", "avx2", "avx512", "avx512_bf16"};
#endif
#define ISA_COUNT (sizeof isas / sizeof *isas)

/* One backend with one stream. */
typedef struct rig {
    loci_backend *backend;
    const loci_backend_ops *ops;
    loci_stream *stream;
    loci_error err;
} rig;

UNUSED static void ok(rig *r, loci_status status) {
    if (status != LOCI_OK) fail_msg("%s: %s", loci_status_text(status), r->err.text);
}

static uint64_t random_state UNUSED = 1;

/* LOCI_TEST_SEED draws other inputs, the same in every run with it. */
UNUSED static void seed_once(void) {
    static bool seeded;
    const char *seed = getenv("LOCI_TEST_SEED");
    if (!seeded && seed) random_state = 2 * strtoull(seed, NULL, 10) + 1;
    seeded = true;
}

UNUSED static rig rig_open(const char *isa, unsigned threads) {
    rig r = {0};
    seed_once();
    loci_backend_options options = {threads, isa};
    ok(&r, loci_backend_open(LOCI_TEST_BACKEND, &options, &r.backend, &r.err));
    r.ops = r.backend->ops;
    ok(&r, r.ops->stream_open(r.backend, &r.stream, &r.err));
    return r;
}

UNUSED static void rig_close(rig *r) {
    r->ops->stream_close(r->backend, r->stream);
    loci_backend_close(r->backend);
}

/* A new buffer holding the bytes (zeros when data is NULL). */
UNUSED static loci_ref put(rig *r, const void *data, size_t bytes) {
    loci_buffer *buffer;
    ok(r, r->ops->alloc(r->backend, bytes, &buffer, &r->err));
    if (data) r->ops->upload(r->stream, loci_ref_at(buffer, 0), data, bytes);
    return loci_ref_at(buffer, 0);
}

UNUSED static void get(rig *r, void *data, loci_ref ref, size_t bytes) {
    r->ops->download(r->stream, data, ref, bytes);
    ok(r, r->ops->sync(r->stream, &r->err));
}

UNUSED static void drop(rig *r, loci_ref ref) {
    r->ops->free(r->backend, ref.buffer);
}

UNUSED static void *grab(size_t bytes) {
    void *data = calloc(1, bytes + 1);
    assert_non_null(data);
    return data;
}

UNUSED static uint32_t random_u32(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

/* Roughly normal, variance 1. */
UNUSED static float random_float(void) {
    float sum = 0.0f;
    for (int i = 0; i < 6; i++) sum += (float)random_u32() * 0x1p-32f - 0.5f;
    return sum * 1.41421356f;
}

UNUSED static float *random_floats(size_t count) {
    float *values = grab(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = random_float();
    return values;
}

UNUSED static float round_bf16(float value) {
    return loci_bf16_to_f32(loci_f32_to_bf16(value));
}

/* Each |a - b| <= tolerance * (1 + |b|). */
UNUSED static void check_close(const float *a, const float *b, size_t count, double tolerance,
                               const char *what) {
    for (size_t i = 0; i < count; i++) {
        double x = (double)a[i], y = (double)b[i];
        if (x == y) continue; /* infinities */
        if (!(fabs(x - y) <= tolerance * (1.0 + fabs(y))))
            fail_msg("%s: value %zu is %.9g, expected %.9g (seed state %llu)", what, i, x, y,
                     (unsigned long long)random_state);
    }
}

#endif
