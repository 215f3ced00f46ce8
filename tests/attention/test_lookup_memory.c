/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of look-ups: every byte is asked for first and told when it goes, a refusal fails the
 * look-up with its own words and nothing else, and what is far more than needed is given back.
 */
#include "tests/attention/lookup_scene.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

typedef struct account {
    int64_t held, most, limit;
    unsigned refused;
} account;

static loci_status count(void *ctx, int64_t bytes, loci_error *err) {
    account *self = ctx;
    if (bytes > 0 && self->held + bytes > self->limit) {
        self->refused++;
        return loci_fail_reason(err, LOCI_E_LIMIT, "TEST_LIMIT", "the test has had enough");
    }
    self->held += bytes;
    if (self->held > self->most) self->most = self->held;
    return LOCI_OK;
}

/* All stages for the first `rows` rows of layer 0. */
static void attend(scene *s, loci_lookup *lookup, loci_buffer *q, loci_buffer *out, uint32_t rows,
                   const loci_select_params *params, loci_ref lse) {
    const loci_backend_ops *ops = s->f.backend->ops;
    uint32_t heads = s->f.q_heads, width = heads * s->f.dim;
    ops->upload(s->f.stream, loci_ref_at(q, 0), s->q, (size_t)rows * width * sizeof(float));
    ops->lookup_begin(s->f.stream, lookup, &s->f.view, 0, loci_ref_at(q, 0), width, rows, heads,
                      0.2f, loci_ref_at(NULL, 0), params);
    ops->score_nodes(s->f.stream, lookup);
    ops->score_codes(s->f.stream, lookup);
    ops->select(s->f.stream, lookup);
    ops->attend_sparse(s->f.stream, lookup, loci_ref_at(out, 0), width, lse);
}

/* One look-up in mode hierarchical. */
static loci_status look_up(scene *s, loci_lookup *lookup, loci_buffer *q, loci_buffer *out,
                           uint32_t rows, loci_error *err) {
    const loci_backend_ops *ops = s->f.backend->ops;
    uint32_t width = s->f.q_heads * s->f.dim;
    loci_select_params params = narrow(0.9f, 100);
    loci_ref lse = loci_ref_at(out, (size_t)s->rows * width * sizeof(float));
    attend(s, lookup, q, out, rows, &params, lse);
    ops->download(s->f.stream, s->out, loci_ref_at(out, 0), (size_t)rows * width * sizeof(float));
    return ops->sync(s->f.stream, err);
}

static void test_memory_of_look_ups(void **state) {
    (void)state;
    setting c = usual;
    c.tokens = 6000;
    c.rows = 480;
    scene s = open_scene(c);
    loci_backend *backend = s.f.backend;
    loci_error err = {0};
    account counted = {.limit = INT64_MAX / 2};
    loci_lookup *lookup = NULL;
    loci_buffer *q = NULL, *out = NULL;
    size_t values = (size_t)c.rows * s.f.q_heads * c.dim;
    backend->ops->lookup_account(backend, count, &counted);
    assert_int_equal(backend->ops->alloc(backend, values * sizeof(float), &q, &err), 0);
    assert_int_equal(backend->ops->alloc(backend, 2 * values * sizeof(float), &out, &err), 0);
    assert_int_equal(backend->ops->lookup_create(backend, &lookup, &err), 0);
    float *expected = malloc(values * sizeof *expected);
    assert_non_null(expected);

    assert_int_equal(look_up(&s, lookup, q, out, c.rows, &err), LOCI_OK);
    memcpy(expected, s.out, values * sizeof *expected);
    int64_t large = counted.held;
    assert_true(large > 16 << 20 && counted.most == large);
    assert_int_equal(look_up(&s, lookup, q, out, c.rows, &err), LOCI_OK);
    assert_true(counted.held == large); /* used again */
    /* Small ones, as in decoding: after a while the rest is given back. */
    for (int i = 0; i < 200; i++) assert_int_equal(look_up(&s, lookup, q, out, 1, &err), LOCI_OK);
    assert_true(counted.held < large / 2);

    /* Too little: refused in the words of whoever refused, again and again. */
    counted.limit = large / 4;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(look_up(&s, lookup, q, out, c.rows, &err), LOCI_E_LIMIT);
        assert_string_equal(err.text, "the test has had enough");
        assert_string_equal(err.reason, "TEST_LIMIT");
        assert_true(counted.held <= counted.limit && counted.refused > 0);
    }
    assert_int_equal(look_up(&s, lookup, q, out, 1, &err), LOCI_OK);
    counted.limit = large + large / 2; /* chunks may be of other sizes than the first time */
    assert_int_equal(look_up(&s, lookup, q, out, c.rows, &err), LOCI_OK);
    assert_memory_equal(expected, s.out, values * sizeof *expected);

    backend->ops->lookup_free(backend, lookup);
    assert_true(counted.held == 0);
    backend->ops->free(backend, q);
    backend->ops->free(backend, out);
    free(expected);
    close_scene(&s);
}

/* One row in mode dense, and the share of the segments. */
static loci_status look_everywhere(scene *s, loci_lookup *lookup, loci_buffer *q, loci_buffer *out,
                                   float *mass, loci_error *err) {
    const loci_backend_ops *ops = s->f.backend->ops;
    uint32_t heads = s->f.q_heads, width = heads * s->f.dim;
    uint32_t segments = s->f.view.flat_segment_base + s->f.view.flat_segments;
    loci_select_params params = {.mode = LOCI_MODE_DENSE};
    loci_ref lse = loci_ref_at(out, width * sizeof(float));
    loci_ref to = loci_ref_at(out, (width + heads) * sizeof(float));
    memset(mass, 0, segments * sizeof *mass);
    ops->upload(s->f.stream, to, mass, segments * sizeof *mass);
    attend(s, lookup, q, out, 1, &params, lse);
    ops->attribute(s->f.stream, lookup, lse, 0, to);
    ops->download(s->f.stream, s->out, loci_ref_at(out, 0), width * sizeof(float));
    ops->download(s->f.stream, mass, to, segments * sizeof *mass);
    return ops->sync(s->f.stream, err);
}

/* Logits that are kept for attribution are a comfort: without memory for them it is the same. */
static void test_dense_mode_does_without_logits(void **state) {
    (void)state;
    setting c = usual;
    c.tokens = 60000;
    c.rows = 1;
    c.flat_segments = 0;
    scene s = open_scene(c);
    loci_backend *backend = s.f.backend;
    loci_error err = {0};
    account counted = {.limit = INT64_MAX / 2};
    loci_buffer *q = NULL, *out = NULL;
    uint32_t width = s.f.q_heads * c.dim, segments = s.f.view.flat_segment_base;
    int64_t logits = (int64_t)c.tokens * s.f.q_heads * (int64_t)sizeof(float);
    float *mass = malloc(2 * segments * sizeof *mass), *expected = malloc(width * sizeof *expected);
    assert_true(mass && expected);
    backend->ops->lookup_account(backend, count, &counted);
    assert_int_equal(backend->ops->alloc(backend, width * sizeof(float), &q, &err), 0);
    assert_int_equal(
        backend->ops->alloc(backend, (width + s.f.q_heads + segments) * sizeof(float), &out, &err),
        0);
    for (uint32_t again = 0; again < 2; again++) {
        loci_lookup *lookup = NULL;
        assert_int_equal(backend->ops->lookup_create(backend, &lookup, &err), 0);
        assert_int_equal(look_everywhere(&s, lookup, q, out, mass + (size_t)again * segments, &err),
                         LOCI_OK);
        backend->ops->lookup_free(backend, lookup);
        assert_true((again == 1) == (counted.refused > 0));
        if (again) break;
        memcpy(expected, s.out, width * sizeof *expected);
        assert_true(counted.most > logits);
        counted.limit = logits;
    }
    assert_memory_equal(expected, s.out, width * sizeof *expected);
    double sum = 0;
    for (uint32_t i = 0; i < segments; i++) {
        sum += (double)mass[i];
        assert_float_equal(mass[i], mass[segments + i], 1e-4f * mass[i] + 1e-6f);
    }
    assert_float_equal(sum, s.f.q_heads, 1e-2);
    backend->ops->free(backend, q);
    backend->ops->free(backend, out);
    free(mass);
    free(expected);
    close_scene(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_memory_of_look_ups),
                                       cmocka_unit_test(test_dense_mode_does_without_logits)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
