/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention against a plain softmax in double: odd shapes, windows, causal and not,
 * several spans, sinks, both KV dtypes and precisions, every instruction set; merging; determinism.
 */
#include "numeric.h"

typedef struct dense_case {
    uint32_t q_heads, kv_heads, head_dim, window;
    bool causal, sink, bf16;
    uint32_t span_count;
    loci_attend_span spans[5];
} dense_case;

static const dense_case cases[] = {
    {1, 1, 16, 0, true, false, false, 1, {{0, 1, 0, 1}}},
    {6, 2, 64, 0, true, false, false, 3, {{0, 255, 0, 255}, {255, 1, 255, 1}, {256, 70, 256, 70}}},
    {6, 2, 64, 256, true, false, false, 1, {{0, 300, 0, 300}}},
    {3, 1, 16, 13, true, false, true, 2, {{5, 40, 3, 77}, {60, 3, 90, 200}}},
    {6, 2, 64, 0, false, false, true, 1, {{0, 5, 0, 3001}}},
    {4, 4, 80, 0, false, true, true, 2, {{0, 3, 0, 130}, {3, 9, 130, 64}}},
    {8, 1, 128, 7, true, true, false, 2, {{0, 100, 0, 100}, {100, 20, 100, 90}}},
    {2, 2, 6, 0, true, false, false, 2, {{0, 9, 0, 9}, {9, 17, 9, 65}}},
    {5, 5, 48, 3, false, false, true, 1, {{2, 10, 1, 60}}},
    {64, 1, 32, 0, true, false, true, 1, {{0, 3, 0, 129}}},
    {2, 1, 256, 64, true, true, true, 2, {{0, 130, 0, 130}, {130, 0, 130, 0}}},
    /* More queries than keys: the first see nothing. And no keys at all. */
    {2, 1, 16, 0, true, false, false, 2, {{0, 8, 0, 3}, {8, 2, 3, 0}}},
    {2, 1, 16, 2, true, true, false, 1, {{0, 8, 0, 3}}},
    {2, 1, 16, 0, true, true, false, 1, {{0, 60, 0, 3}}},
    /* Groups that do not divide a task's rows, windows and sinks behind whole tiles. */
    {7, 1, 48, 0, true, false, true, 2, {{0, 9, 0, 131}, {9, 8, 131, 131}}},
    {65, 1, 16, 0, true, false, false, 1, {{0, 9, 0, 70}}},
    {3, 1, 112, 70, true, true, true, 1, {{0, 41, 0, 333}}},
    /* Many keys: few rows, many rows, a window far behind the sink, wide heads. */
    {6, 2, 64, 0, true, false, true, 2, {{0, 40, 0, 2500}, {40, 2, 2500, 1100}}},
    {4, 1, 128, 700, true, true, true, 1, {{0, 30, 0, 2100}}},
    {7, 1, 128, 0, false, false, true, 1, {{0, 1, 0, 2049}}},
    {2, 1, 256, 0, true, false, true, 2, {{0, 3, 0, 1500}, {3, 20, 1500, 70}}},
    {6, 2, 64, 0, true, false, false, 1, {{0, 30, 0, 1300}}},
};

/* A case's arrays: strides are wider than rows, with junk between. */
typedef struct arrays {
    uint32_t q_rows, kv_rows, q_stride, kv_stride, out_stride;
    float *q, *k, *v, *out, *lse;
    loci_dtype precision; /* to run it in: F32 unless set */
} arrays;

static arrays make_arrays(const dense_case *c) {
    arrays a = {0};
    for (uint32_t i = 0; i < c->span_count; i++) {
        const loci_attend_span *s = &c->spans[i];
        if (s->q_begin + s->q_count > a.q_rows) a.q_rows = s->q_begin + s->q_count;
        if (s->kv_begin + s->kv_count > a.kv_rows) a.kv_rows = s->kv_begin + s->kv_count;
    }
    a.q_stride = (c->q_heads + 1) * c->head_dim;
    a.kv_stride = (c->kv_heads + 2) * c->head_dim;
    a.out_stride = c->q_heads * c->head_dim + 3;
    a.q = random_floats((size_t)a.q_rows * a.q_stride);
    a.k = random_floats((size_t)a.kv_rows * a.kv_stride);
    a.v = random_floats((size_t)a.kv_rows * a.kv_stride);
    a.out = random_floats((size_t)a.q_rows * a.out_stride);
    a.lse = random_floats((size_t)a.q_rows * c->q_heads);
    for (size_t i = 0; i < (size_t)a.kv_rows * a.kv_stride; i++) {
        a.k[i] *= 2.0f;
        if (c->bf16) {
            a.k[i] = round_bf16(a.k[i]);
            a.v[i] = round_bf16(a.v[i]);
        }
    }
    return a;
}

static void free_arrays(arrays *a) {
    free(a->q);
    free(a->k);
    free(a->v);
    free(a->out);
    free(a->lse);
}

#define BIAS 1.75f

static float scale_of(const dense_case *c) {
    return 1.2f / sqrtf((float)c->head_dim);
}

static bool sees(const dense_case *c, const loci_attend_span *s, uint32_t query, uint32_t key) {
    int64_t p = (int64_t)s->kv_count - s->q_count + query;
    if (c->sink && key == 0) return true;
    if (c->causal && key > p) return false;
    return c->window == 0 || p - key < c->window;
}

/* What a call should give, and how far from it each value may lie. */
typedef struct expected {
    float *out, *lse, *out_limit, *lse_limit;
} expected;

static void free_expected(expected *e) {
    free(e->out);
    free(e->lse);
    free(e->out_limit);
    free(e->lse_limit);
}

/* Factors of a product that are rounded, each by less than this share of it: to bf16, or (K and V
 * of bf16 on tensor cores) in two parts of bf16, or not at all. */
static double rounding_of(const dense_case *c, loci_dtype precision) {
    if (precision == LOCI_BF16) return 0x1p-8;
    return c->bf16 && strcmp(LOCI_TEST_BACKEND, "cuda") == 0 ? 0x1p-16 : 0.0;
}

#define SURE 2.5

/* Limits of one query head with weights p over its keys. A logit is a sum of products, both of
 * whose factors err by at most `unit`, independently: it errs by no more than SURE sqrt(2) unit
 * times the root of the sum of their squares but once in 1,000 (Hoeffding), and really hardly
 * ever, since most errors are far below `unit`. An output then errs by the covariance, under p, of
 * values and logits' errors (at most the product of their deviations), and by the rounding of
 * weights and values. */
static void set_limits(const dense_case *c, const arrays *a, const loci_attend_span *s,
                       const float *q, uint32_t kv_head, const double *p, const float *out,
                       double unit, float lse, float *out_limit, float *lse_limit) {
    double logits = 0.0, weights = 0.0, spread[256] = {0}, size[256] = {0};
    for (uint32_t j = 0; j < s->kv_count; j++) {
        size_t at = (size_t)(s->kv_begin + j) * a->kv_stride + (size_t)kv_head * c->head_dim;
        for (uint32_t d = 0; d < c->head_dim; d++) {
            double term = (double)(scale_of(c) * q[d] * a->k[at + d]), v = (double)a->v[at + d];
            logits += p[j] * term * term;
            spread[d] += p[j] * (v - (double)out[d]) * (v - (double)out[d]);
            size[d] += p[j] * p[j] * v * v;
        }
        weights += p[j] * p[j];
    }
    unit *= SURE;
    for (uint32_t d = 0; d < c->head_dim; d++)
        out_limit[d] = (float)(1e-5 * (1.0 + fabs((double)out[d])) +
                               unit * sqrt(2.0) * (sqrt(logits * spread[d]) + sqrt(size[d])));
    *lse_limit =
        (float)(1e-5 * (1.0 + fabs((double)lse)) + unit * (sqrt(2.0 * logits) + sqrt(weights)));
}

static void expect_query(const dense_case *c, const arrays *a, const loci_attend_span *s,
                         uint32_t query, uint32_t head, const expected *e) {
    uint32_t dim = c->head_dim, kv_head = head / (c->q_heads / c->kv_heads);
    size_t row = s->q_begin + query, at = row * a->out_stride + (size_t)head * dim;
    const float *q = a->q + row * a->q_stride + (size_t)head * dim;
    float *out = e->out + at, *lse = e->lse + row * c->q_heads + head;
    double *logit = grab((s->kv_count + 1) * sizeof *logit), max = -INFINITY, sum = 0.0;
    double acc[256] = {0};
    for (uint32_t j = 0; j < s->kv_count; j++) {
        const float *k = a->k + (size_t)(s->kv_begin + j) * a->kv_stride + (size_t)kv_head * dim;
        logit[j] = -INFINITY;
        if (!sees(c, s, query, j)) continue;
        logit[j] = c->sink && j == 0 ? (double)BIAS : 0.0;
        for (uint32_t d = 0; d < dim; d++)
            logit[j] += (double)scale_of(c) * (double)q[d] * (double)k[d];
        if (logit[j] > max) max = logit[j];
    }
    for (uint32_t j = 0; j < s->kv_count; j++) {
        const float *v = a->v + (size_t)(s->kv_begin + j) * a->kv_stride + (size_t)kv_head * dim;
        logit[j] = logit[j] > -INFINITY ? exp(logit[j] - max) : 0.0; /* a weight from here on */
        sum += logit[j];
        for (uint32_t d = 0; d < dim; d++) acc[d] += logit[j] * (double)v[d];
    }
    for (uint32_t d = 0; d < dim; d++) out[d] = sum > 0.0 ? (float)(acc[d] / sum) : 0.0f;
    *lse = sum > 0.0 ? (float)(max + log(sum)) : -INFINITY;
    for (uint32_t j = 0; j < s->kv_count && sum > 0.0; j++) logit[j] /= sum;
    set_limits(c, a, s, q, kv_head, logit, out, rounding_of(c, a->precision), *lse,
               e->out_limit + at, e->lse_limit + row * c->q_heads + head);
    free(logit);
}

/* Of arrays before they are run: what no span covers stays as it is. */
static expected expect_all(const dense_case *c, const arrays *a) {
    size_t out_count = (size_t)a->q_rows * a->out_stride,
           lse_count = (size_t)a->q_rows * c->q_heads;
    expected e = {grab(out_count * sizeof(float)), grab(lse_count * sizeof(float)),
                  grab(out_count * sizeof(float)), grab(lse_count * sizeof(float))};
    memcpy(e.out, a->out, out_count * sizeof(float));
    memcpy(e.lse, a->lse, lse_count * sizeof(float));
    for (uint32_t i = 0; i < c->span_count; i++)
        for (uint32_t q = 0; q < c->spans[i].q_count; q++)
            for (uint32_t h = 0; h < c->q_heads; h++) expect_query(c, a, &c->spans[i], q, h, &e);
    return e;
}

/* Each value within its limit; *worst becomes the greatest share of one that was taken. */
static void check_within(const float *is, const float *want, const float *limit, size_t count,
                         const char *what, double *worst) {
    for (size_t i = 0; i < count; i++) {
        if (is[i] == want[i]) continue; /* infinities */
        double off = fabs((double)is[i] - (double)want[i]);
        if (!(off <= (double)limit[i]))
            fail_msg(
                "%s: value %zu is %.9g, expected %.9g, %.3g apart, limit %.3g (seed state %llu)",
                what, i, (double)is[i], (double)want[i], off, (double)limit[i],
                (unsigned long long)random_state);
        if (off > *worst * (double)limit[i]) *worst = off / (double)limit[i];
    }
}

static loci_ref put_kv(rig *r, const dense_case *c, const float *values, size_t count) {
    if (!c->bf16) return put(r, values, count * sizeof(float));
    uint16_t *halves = grab(count * sizeof *halves);
    for (size_t i = 0; i < count; i++) halves[i] = loci_f32_to_bf16(values[i]);
    loci_ref ref = put(r, halves, count * sizeof *halves);
    free(halves);
    return ref;
}

/* Runs the case; a->out and a->lse become the result. */
static void run_case(rig *r, const dense_case *c, arrays *a, bool with_lse) {
    size_t kv_count = (size_t)a->kv_rows * a->kv_stride;
    size_t out_bytes = (size_t)a->q_rows * a->out_stride * sizeof(float);
    size_t lse_bytes = (size_t)a->q_rows * c->q_heads * sizeof(float);
    loci_attend_dense args = {
        .q = put(r, a->q, (size_t)a->q_rows * a->q_stride * sizeof(float)),
        .k = put_kv(r, c, a->k, kv_count),
        .v = put_kv(r, c, a->v, kv_count),
        .out = put(r, a->out, out_bytes),
        .q_stride = a->q_stride,
        .kv_stride = a->kv_stride,
        .out_stride = a->out_stride,
        .q_heads = c->q_heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .kv_dtype = c->bf16 ? LOCI_BF16 : LOCI_F32,
        .precision = a->precision,
        .scale = scale_of(c),
        .causal = c->causal,
        .window = c->window,
        .first_key_is_sink = c->sink,
        .first_key_bias = BIAS, /* without a sink it must be ignored */
        .spans = c->spans,
        .span_count = c->span_count,
    };
    loci_ref lse = put(r, a->lse, lse_bytes);
    if (with_lse) args.lse = lse;
    r->ops->attend_dense(r->stream, &args);
    get(r, a->out, args.out, out_bytes);
    get(r, a->lse, lse, lse_bytes);
    drop(r, args.q);
    drop(r, args.k);
    drop(r, args.v);
    drop(r, args.out);
    drop(r, lse);
}

static void test_cases_equal_a_softmax_in_double(void **state) {
    (void)state;
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        double worst[2] = {0};
        for (size_t n = 0; n < 2 * sizeof cases / sizeof *cases; n++) {
            const dense_case *c = &cases[n / 2];
            arrays a = make_arrays(c);
            a.precision = n % 2 ? LOCI_BF16 : LOCI_F32;
            char what[64];
            snprintf(what, sizeof what, "case %zu on %s, precision %d", n / 2, isas[i],
                     (int)a.precision);
            expected e = expect_all(c, &a);
            run_case(&r, c, &a, true);
            check_within(a.out, e.out, e.out_limit, (size_t)a.q_rows * a.out_stride, what,
                         &worst[n % 2]);
            check_within(a.lse, e.lse, e.lse_limit, (size_t)a.q_rows * c->q_heads, what,
                         &worst[n % 2]);
            free_expected(&e);
            free_arrays(&a);
        }
        print_message("%s: %.2f of what rounding may cost in f32, %.2f in bf16\n", isas[i],
                      worst[0], worst[1]);
        rig_close(&r);
    }
}

/* The same bytes with one thread and three, with and without lse, and for a span alone. */
static void test_bytes_do_not_depend_on_threads_or_company(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * ISA_COUNT; i++) {
        rig one = rig_open(isas[i / 2], 1), three = rig_open(isas[i / 2], 3);
        const dense_case *c = &cases[1];
        random_state = 77;
        arrays a = make_arrays(c);
        random_state = 77;
        arrays b = make_arrays(c);
        random_state = 77;
        arrays alone = make_arrays(c);
        a.precision = b.precision = alone.precision = i % 2 ? LOCI_BF16 : LOCI_F32;
        dense_case last = *c;
        last.span_count = 1;
        last.spans[0] = c->spans[2];
        run_case(&one, c, &a, true);
        run_case(&three, c, &b, false);
        run_case(&three, &last, &alone, true);
        assert_memory_equal(a.out, b.out, (size_t)a.q_rows * a.out_stride * sizeof(float));
        size_t at = c->spans[2].q_begin;
        assert_memory_equal(a.out + at * a.out_stride, alone.out + at * a.out_stride,
                            (size_t)c->spans[2].q_count * a.out_stride * sizeof(float));
        assert_memory_equal(a.lse + at * c->q_heads, alone.lse + at * c->q_heads,
                            (size_t)c->spans[2].q_count * c->q_heads * sizeof(float));
        free_arrays(&a);
        free_arrays(&b);
        free_arrays(&alone);
        rig_close(&one);
        rig_close(&three);
    }
}

/* Spans of one key, which may be the quicker way of a call that has no others, have the bytes that
 * they have beside longer ones; they are that key's values. */
static void test_single_keys_in_any_company(void **state) {
    (void)state;
    static const uint32_t dims[] = {16, 80, 128, 144, 256, 320};
    for (size_t i = 0; i < ISA_COUNT * (sizeof dims / sizeof *dims); i++) {
        rig r = rig_open(isas[i % ISA_COUNT], 2);
        dense_case all = {6, 2,    dims[i / ISA_COUNT], 0, i % 2 == 0, i % 3 == 0, i % 5 == 0,
                          4, {{0}}};
        const loci_attend_span spans[] = {{0, 1, 2, 1}, {1, 1, 0, 1}, {2, 1, 3, 0}, {3, 1, 4, 300}};
        memcpy(all.spans, spans, sizeof spans);
        dense_case single = all;
        single.span_count = 3;
        random_state = 80;
        arrays a = make_arrays(&all);
        random_state = 80;
        arrays b = make_arrays(&all);
        run_case(&r, &all, &a, true);
        run_case(&r, &single, &b, true);
        assert_memory_equal(a.out, b.out, (size_t)3 * a.out_stride * sizeof(float));
        assert_memory_equal(a.lse, b.lse, (size_t)3 * all.q_heads * sizeof(float));
        assert_memory_not_equal(a.out, b.out, (size_t)4 * a.out_stride * sizeof(float));
        for (uint32_t d = 0; d < all.head_dim; d++) {
            float value = a.v[(size_t)2 * a.kv_stride + d];
            assert_true(b.out[d] == (all.bf16 ? round_bf16(value) : value));
        }
        free_arrays(&a);
        free_arrays(&b);
        rig_close(&r);
    }
}

/* The last queries of a span have the same bytes when they come alone: a prefill may be cut. */
static void test_bytes_do_not_depend_on_earlier_queries(void **state) {
    (void)state;
    for (size_t i = 0; i < 2 * ISA_COUNT; i++) {
        rig r = rig_open(isas[i / 2], 2);
        dense_case all = {6, 2, 64, 0, true, false, true, 1, {{0, 300, 0, 300}}};
        dense_case last = all;
        last.spans[0] = (loci_attend_span){277, 23, 0, 300};
        random_state = 78;
        arrays a = make_arrays(&all);
        random_state = 78;
        arrays b = make_arrays(&all);
        a.precision = b.precision = i % 2 ? LOCI_BF16 : LOCI_F32;
        run_case(&r, &all, &a, true);
        run_case(&r, &last, &b, true);
        assert_memory_equal(a.out + (size_t)277 * a.out_stride, b.out + (size_t)277 * a.out_stride,
                            23 * a.out_stride * sizeof(float));
        free_arrays(&a);
        free_arrays(&b);
        rig_close(&r);
    }
}

/* Products in bf16 are taken where they can be and pay, and nowhere else. */
static void test_few_queries_are_exact(void **state) {
    (void)state;
    rig r = rig_open("avx512_bf16", 1);
    const char *describe = r.ops->describe(r.backend);
    bool has_bf16 = strstr(describe, "avx512_bf16") || strncmp(describe, "cuda", 4) == 0;
    for (uint32_t queries = 8; queries <= 9; queries++) {
        dense_case c = {2, 1, 64, 0, true, false, true, 1, {{0, queries, 0, 200}}};
        random_state = 79;
        arrays exact = make_arrays(&c);
        random_state = 79;
        arrays rounded = make_arrays(&c);
        run_case(&r, &c, &exact, true);
        rounded.precision = LOCI_BF16;
        run_case(&r, &c, &rounded, true);
        size_t bytes = (size_t)exact.q_rows * exact.out_stride * sizeof(float);
        bool same = memcmp(exact.out, rounded.out, bytes) == 0;
        assert_int_equal(same, queries <= LOCI_ATTEND_EXACT_QUERIES || !has_bf16);
        free_arrays(&exact);
        free_arrays(&rounded);
    }
    rig_close(&r);
}

/* Attention over two halves of the keys, merged, is attention over all. */
static void test_merge_of_halves_equals_the_whole(void **state) {
    (void)state;
    rig r = rig_open(NULL, 2);
    dense_case whole = {6, 2, 64, 0, false, false, true, 1, {{0, 50, 0, 501}}}, half = whole;
    random_state = 5;
    arrays a = make_arrays(&whole);
    arrays first = a, second = a;
    size_t out_bytes = (size_t)a.q_rows * a.out_stride * sizeof(float);
    size_t lse_bytes = (size_t)a.q_rows * whole.q_heads * sizeof(float);
    first.out = grab(out_bytes);
    first.lse = grab(lse_bytes);
    second.out = grab(out_bytes);
    second.lse = grab(lse_bytes);
    run_case(&r, &whole, &a, true);
    half.spans[0].kv_count = 200;
    run_case(&r, &half, &first, true);
    half.spans[0] = (loci_attend_span){0, 50, 200, 301};
    run_case(&r, &half, &second, true);
    /* Row 0 has nothing in either part, row 1 only in the second, row 2 only in the first. */
    for (uint32_t h = 0; h < 6; h++) {
        first.lse[h] = second.lse[h] = first.lse[6 + h] = second.lse[12 + h] = -INFINITY;
        first.out[h * 64] = 0.0f;
    }
    loci_ref out_a = put(&r, first.out, out_bytes), lse_a = put(&r, first.lse, lse_bytes);
    loci_ref out_b = put(&r, second.out, out_bytes), lse_b = put(&r, second.lse, lse_bytes);
    r.ops->merge(r.stream, out_a, a.out_stride, lse_a, out_b, a.out_stride, lse_b, 50, 6, 64);
    float *out = grab(out_bytes), *lse = grab(lse_bytes);
    get(&r, out, out_a, out_bytes);
    get(&r, lse, lse_a, lse_bytes);
    assert_true(lse[0] == -INFINITY && out[0] == 0.0f);
    for (uint32_t i = 3; i < 50; i++)
        check_close(out + (size_t)i * a.out_stride, a.out + (size_t)i * a.out_stride, 6 * 64, 1e-5,
                    "merged");
    check_close(lse + 18, a.lse + 18, 47 * 6, 1e-5, "merged lse");
    check_close(out + a.out_stride, second.out + a.out_stride, 6 * 64, 1e-6, "only the second");
    check_close(out + 2 * a.out_stride, first.out + 2 * a.out_stride, 6 * 64, 0, "only the first");
    drop(&r, out_a);
    drop(&r, out_b);
    drop(&r, lse_a);
    drop(&r, lse_b);
    free(out);
    free(lse);
    free(first.out);
    free(first.lse);
    free(second.out);
    free(second.lse);
    free_arrays(&a);
    rig_close(&r);
}

static void test_refuses_what_it_cannot_run(void **state) {
    (void)state;
    rig r = rig_open(NULL, 1);
    loci_ref memory = put(&r, NULL, 4096);
    loci_attend_dense args = {.q = memory,
                              .k = memory,
                              .v = memory,
                              .out = memory,
                              .q_heads = 3,
                              .kv_heads = 2,
                              .head_dim = 16};
    r.ops->attend_dense(r.stream, &args);
    assert_int_equal(r.ops->sync(r.stream, &r.err), LOCI_E_UNSUPPORTED);
    drop(&r, memory);
    rig_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cases_equal_a_softmax_in_double),
        cmocka_unit_test(test_bytes_do_not_depend_on_threads_or_company),
        cmocka_unit_test(test_single_keys_in_any_company),
        cmocka_unit_test(test_bytes_do_not_depend_on_earlier_queries),
        cmocka_unit_test(test_few_queries_are_exact),
        cmocka_unit_test(test_merge_of_halves_equals_the_whole),
        cmocka_unit_test(test_refuses_what_it_cannot_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
