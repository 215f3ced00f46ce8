/* SPDX-License-Identifier: Apache-2.0
 *
 * Weights and matrix products: against sums in double over odd shapes, on every instruction set, in
 * both precisions and all dtypes; independence of the number of rows; embedding look-up.
 */
#include "numeric.h"

typedef struct shape {
    uint32_t rows[3], parts, cols;
} shape;

static const shape shapes[] = {
    {{1}, 1, 1},
    {{64}, 1, 32},
    {{131}, 1, 48},
    {{48, 16, 16}, 3, 48},
    {{384, 128, 128}, 3, 384},
    {{300, 300}, 2, 97},
    {{257}, 1, 1024},
    {{63}, 1, 2},
};
static const uint32_t row_counts[] = {1, 2, 3, 5, 6, 7, 8, 9, 16, 31, 32, 33, 65};

static uint32_t total_rows(const shape *s) {
    uint32_t total = 0;
    for (uint32_t i = 0; i < s->parts; i++) total += s->rows[i];
    return total;
}

static float value_of(const void *data, loci_dtype dtype, size_t at) {
    if (dtype == LOCI_F32) return ((const float *)data)[at];
    uint16_t half = ((const uint16_t *)data)[at];
    return dtype == LOCI_BF16 ? loci_bf16_to_f32(half) : loci_f16_to_f32(half);
}

/* Random parts in dtype; exact f32 copies of them, stacked, in *plain. */
static void make_parts(const shape *s, loci_dtype dtype, void **parts, float **plain) {
    *plain = grab((size_t)total_rows(s) * s->cols * sizeof(float));
    size_t at = 0;
    for (uint32_t p = 0; p < s->parts; p++) {
        size_t count = (size_t)s->rows[p] * s->cols;
        parts[p] = grab(count * sizeof(float));
        for (size_t i = 0; i < count; i++) {
            if (dtype == LOCI_F32)
                ((float *)parts[p])[i] = random_float();
            else if (dtype == LOCI_BF16)
                ((uint16_t *)parts[p])[i] = loci_f32_to_bf16(random_float());
            else /* any finite half with exponent below 2^1 */
                ((uint16_t *)parts[p])[i] = (uint16_t)(random_u32() & 0xbfffu);
            (*plain)[at++] = value_of(parts[p], dtype, i);
        }
    }
}

static void expect(float *y, const float *x, const float *w, uint32_t rows, uint32_t n, uint32_t k,
                   loci_dtype precision) {
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t c = 0; c < n; c++) {
            double sum = 0.0;
            for (uint32_t i = 0; i < k; i++) {
                float a = x[(size_t)r * k + i], b = w[(size_t)c * k + i];
                if (precision == LOCI_BF16) {
                    a = round_bf16(a);
                    b = round_bf16(b);
                }
                sum += (double)a * (double)b;
            }
            y[(size_t)r * n + c] = (float)sum;
        }
}

static loci_weight *make_weight(rig *r, const shape *s, void *const *parts, loci_dtype dtype,
                                loci_dtype precision, bool mapped) {
    loci_weight *weight;
    const void *const *data = (const void *const *)parts;
    if (mapped)
        ok(r, r->ops->weight_map(r->backend, data, s->rows, s->parts, s->cols, &weight, &r->err));
    else
        ok(r, r->ops->weight_create(r->backend, data, s->rows, s->parts, s->cols, dtype, precision,
                                    &weight, &r->err));
    return weight;
}

static void check_shape(rig *r, const shape *s, loci_dtype dtype, loci_dtype precision,
                        bool mapped) {
    uint32_t n = total_rows(s), k = s->cols, rows_max = 65;
    void *parts[3];
    float *plain, *x = random_floats((size_t)rows_max * k),
                  *base = random_floats((size_t)rows_max * n);
    float *y = grab((size_t)rows_max * n * sizeof(float));
    float *good = grab((size_t)rows_max * n * sizeof(float));
    make_parts(s, dtype, parts, &plain);
    loci_weight *weight = make_weight(r, s, parts, dtype, precision, mapped);
    expect(good, x, plain, rows_max, n, k, precision);
    loci_ref xd = put(r, x, (size_t)rows_max * k * sizeof(float));
    for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++) {
        uint32_t rows = row_counts[i];
        loci_ref yd = put(r, base, (size_t)rows_max * n * sizeof(float));
        r->ops->gemm(r->stream, yd, xd, rows, weight, false);
        get(r, y, yd, (size_t)rows_max * n * sizeof(float));
        check_close(y, good, (size_t)rows * n, 3e-5 * sqrt(k), "product");
        /* Nothing past the rows asked for is written. */
        assert_memory_equal(y + (size_t)rows * n, base + (size_t)rows * n,
                            (size_t)(rows_max - rows) * n * sizeof(float));
        r->ops->gemm(r->stream, yd, xd, rows, weight, true);
        get(r, y, yd, (size_t)rows * n * sizeof(float));
        for (size_t j = 0; j < (size_t)rows * n; j++) y[j] /= 2.0f;
        check_close(y, good, (size_t)rows * n, 3e-5 * sqrt(k), "accumulated product");
        drop(r, yd);
    }
    drop(r, xd);
    r->ops->weight_free(r->backend, weight);
    for (uint32_t p = 0; p < s->parts; p++) free(parts[p]);
    free(plain);
    free(x);
    free(base);
    free(y);
    free(good);
}

static void test_products_equal_sums_in_double(void **state) {
    (void)state;
    static const loci_dtype dtypes[] = {LOCI_F32, LOCI_BF16, LOCI_F16};
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            check_shape(&r, &shapes[s], dtypes[s % 3], LOCI_F32, false);
            check_shape(&r, &shapes[s], dtypes[(s + 1) % 3], LOCI_BF16, false);
            if (r.ops->weight_map && shapes[s].cols % 2 == 0)
                check_shape(&r, &shapes[s], LOCI_BF16, LOCI_BF16, true);
        }
        rig_close(&r);
    }
}

/* Many rows by a mapped weight have the bytes of those by a packed one; its table is the same. */
static void test_mapped_weights_are_packed_ones(void **state) {
    (void)state;
    shape s = {{100, 300, 60}, 3, 70};
    uint32_t n = total_rows(&s), rows = 300; /* more than a group */
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        if (!r.ops->weight_map) { /* it is optional */
            rig_close(&r);
            skip();
        }
        void *parts[3];
        float *plain, *x = random_floats((size_t)rows * s.cols);
        make_parts(&s, LOCI_BF16, parts, &plain);
        loci_ref xd = put(&r, x, (size_t)rows * s.cols * sizeof(float));
        size_t bytes = (size_t)rows * n * sizeof(float), row_bytes = s.cols * sizeof(float);
        float *y[2] = {grab(bytes), grab(bytes)},
              *table[2] = {grab(2 * row_bytes), grab(2 * row_bytes)};
        const int32_t ids[2] = {99, 401};
        for (int mapped = 0; mapped < 2; mapped++) {
            loci_weight *weight = make_weight(&r, &s, parts, LOCI_BF16, LOCI_BF16, mapped != 0);
            loci_ref yd = put(&r, NULL, bytes), td = put(&r, NULL, 2 * row_bytes);
            loci_ref id = put(&r, ids, sizeof ids);
            r.ops->gemm(r.stream, yd, xd, rows, weight, false);
            r.ops->embed(r.stream, td, weight, id, 2);
            get(&r, y[mapped], yd, bytes);
            get(&r, table[mapped], td, 2 * row_bytes);
            drop(&r, yd);
            drop(&r, td);
            drop(&r, id);
            r.ops->weight_free(r.backend, weight);
        }
        assert_memory_equal(y[0], y[1], bytes);
        assert_memory_equal(table[0], table[1], 2 * row_bytes);
        assert_memory_equal(table[0] + s.cols, plain + (size_t)401 * s.cols, row_bytes);
        drop(&r, xd);
        for (int j = 0; j < 2; j++) {
            free(y[j]);
            free(table[j]);
        }
        for (int p = 0; p < 3; p++) free(parts[p]);
        free(plain);
        free(x);
        loci_weight *odd;
        assert_int_equal(
            r.ops->weight_map(r.backend, (const void *const *)parts, s.rows, 3, 71, &odd, &r.err),
            LOCI_E_UNSUPPORTED);
        rig_close(&r);
    }
}

/* One row, multiplied in the company of others, `place` rows down. */
static void row_among(rig *r, const loci_weight *weight, uint32_t rows, uint32_t place,
                      const float *row, uint32_t n, uint32_t k, float *out) {
    float *x = random_floats((size_t)rows * k), *y = grab((size_t)rows * n * sizeof(float));
    memcpy(x + (size_t)place * k, row, k * sizeof(float));
    loci_ref xd = put(r, x, (size_t)rows * k * sizeof(float));
    loci_ref yd = put(r, NULL, (size_t)rows * n * sizeof(float));
    r->ops->gemm(r->stream, yd, xd, rows, weight, false);
    get(r, y, yd, (size_t)rows * n * sizeof(float));
    memcpy(out, y + (size_t)place * n, n * sizeof(float));
    drop(r, xd);
    drop(r, yd);
    free(x);
    free(y);
}

/* In both ranges of the contract, and at any number of threads. */
static void test_a_row_does_not_depend_on_the_others(void **state) {
    (void)state;
    static const uint32_t ranges[2][7] = {{1, 2, 3, 4, 6, 7, 8}, {32, 33, 64, 77, 256, 700, 2100}};
    enum { N = 330, K = 384 };
    float *w = random_floats((size_t)N * K), *row = random_floats(K), first[N], y[N];
    const void *parts[] = {w};
    const uint32_t rows_of[] = {N};
    for (size_t i = 0; i < ISA_COUNT; i++)
        for (int precision = LOCI_F32; precision <= LOCI_BF16; precision++)
            for (int range = 0; range < 2; range++)
                for (unsigned threads = 1, made = 0; threads <= 3; threads += 2) {
                    rig r = rig_open(isas[i], threads);
                    loci_weight *weight;
                    ok(&r, r.ops->weight_create(r.backend, parts, rows_of, 1, K, LOCI_F32,
                                                (loci_dtype)precision, &weight, &r.err));
                    size_t sizes = i < 2 ? 5 : 7; /* slow kernels take the smaller ones */
                    for (size_t m = 0; m < sizes; m++) {
                        uint32_t rows = ranges[range][m];
                        row_among(&r, weight, rows, random_u32() % rows, row, N, K,
                                  made ? y : first);
                        if (made) assert_memory_equal(y, first, sizeof y);
                        made = 1;
                    }
                    r.ops->weight_free(r.backend, weight);
                    rig_close(&r);
                }
    free(w);
    free(row);
}

/* All numbers of rows up to FEW, x standing `shift` floats after the buffer's begin: the results
 * are the same. */
static void check_few(rig *r, const loci_weight *weight, const float *x, size_t shift, uint32_t n,
                      uint32_t k, const float *good) {
    const uint32_t most = LOCI_GEMM_FEW_ROWS;
    size_t x_bytes = (size_t)most * k * sizeof(float), bytes = (size_t)most * n * sizeof(float);
    float *y = grab(bytes);
    loci_ref xd = put(r, NULL, x_bytes + shift * sizeof(float)), yd = put(r, NULL, bytes);
    xd.offset = shift * sizeof(float);
    r->ops->upload(r->stream, xd, x, x_bytes);
    for (uint32_t rows = 1; rows <= most; rows++) {
        r->ops->gemm(r->stream, yd, xd, rows, weight, false);
        get(r, y, yd, bytes);
        assert_memory_equal(y, good, (size_t)rows * n * sizeof(float));
    }
    drop(r, xd);
    drop(r, yd);
    free(y);
}

/* A backend may cut wide, long and narrow weights in other ways, and go other ways where rows are
 * not aligned or few. */
static void test_few_rows_by_weights_of_all_forms(void **state) {
    (void)state;
    static const uint32_t forms[][2] = {
        {25003, 40}, {24576, 33}, {40, 20008}, {17, 4104}, {4099, 264}};
    const uint32_t most = LOCI_GEMM_FEW_ROWS;
    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++) {
        uint32_t n = forms[f][0], k = forms[f][1];
        size_t count = (size_t)most * n;
        float *w = random_floats((size_t)n * k), *x = random_floats((size_t)most * k);
        float *good = grab(count * sizeof(float)), *y = grab(count * sizeof(float));
        const void *parts[] = {w};
        for (int precision = LOCI_F32; precision <= LOCI_BF16; precision++) {
            expect(good, x, w, most, n, k, (loci_dtype)precision);
            for (size_t i = 0; i < ISA_COUNT; i++) {
                rig r = rig_open(isas[i], 2);
                loci_weight *weight;
                ok(&r, r.ops->weight_create(r.backend, parts, &n, 1, k, LOCI_F32,
                                            (loci_dtype)precision, &weight, &r.err));
                loci_ref xd = put(&r, x, (size_t)most * k * sizeof(float));
                loci_ref yd = put(&r, NULL, count * sizeof(float));
                r.ops->gemm(r.stream, yd, xd, most, weight, false);
                get(&r, y, yd, count * sizeof(float));
                check_close(y, good, count, 3e-5 * sqrt(k), "product");
                for (size_t shift = 0; shift < 3; shift++) check_few(&r, weight, x, shift, n, k, y);
                drop(&r, xd);
                drop(&r, yd);
                r.ops->weight_free(r.backend, weight);
                rig_close(&r);
            }
        }
        free(w);
        free(x);
        free(good);
        free(y);
    }
}

static void test_embedding_rows(void **state) {
    (void)state;
    enum { N = 131, K = 49, ROWS = 6 };
    float *w = random_floats((size_t)N * K), y[ROWS * K];
    const void *parts[] = {w};
    const uint32_t rows_of[] = {N};
    const int32_t ids[ROWS] = {0, 130, 64, 63, 5, 5}, bad[] = {131};
    for (int precision = LOCI_F32; precision <= LOCI_BF16; precision++) {
        rig r = rig_open(NULL, 1);
        loci_weight *weight;
        ok(&r, r.ops->weight_create(r.backend, parts, rows_of, 1, K, LOCI_F32,
                                    (loci_dtype)precision, &weight, &r.err));
        loci_ref id = put(&r, ids, sizeof ids), yd = put(&r, NULL, sizeof y);
        r.ops->embed(r.stream, yd, weight, id, ROWS);
        get(&r, y, yd, sizeof y);
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < K; k++) {
                float expected = w[(size_t)ids[i] * K + (size_t)k];
                if (precision == LOCI_BF16) expected = round_bf16(expected);
                assert_true(y[i * K + k] == expected);
            }
        r.ops->upload(r.stream, id, bad, sizeof bad);
        r.ops->embed(r.stream, yd, weight, id, 1);
        assert_int_equal(r.ops->sync(r.stream, &r.err), LOCI_E_INVAL);
        assert_non_null(strstr(r.err.text, "131"));
        ok(&r, r.ops->sync(r.stream, &r.err)); /* reported once */
        drop(&r, id);
        drop(&r, yd);
        r.ops->weight_free(r.backend, weight);
        rig_close(&r);
    }
    free(w);
}

static void test_refusals(void **state) {
    (void)state;
    rig r = rig_open(NULL, 1);
    float w[4] = {0};
    const void *parts[] = {w};
    const uint32_t none[] = {0}, two[] = {2};
    loci_weight *weight;
    assert_int_equal(
        r.ops->weight_create(r.backend, parts, none, 1, 2, LOCI_F32, LOCI_F32, &weight, &r.err),
        LOCI_E_INVAL);
    assert_int_equal(
        r.ops->weight_create(r.backend, parts, two, 1, 2, LOCI_I32, LOCI_F32, &weight, &r.err),
        LOCI_E_UNSUPPORTED);
    assert_int_equal(
        r.ops->weight_create(r.backend, parts, two, 1, 2, LOCI_F32, LOCI_F16, &weight, &r.err),
        LOCI_E_UNSUPPORTED);
    rig_close(&r);
    loci_backend *backend;
    loci_backend_options options = {1, "mmx"};
    assert_int_equal(loci_backend_open("cpu", &options, &backend, &r.err), LOCI_E_INVAL);
    assert_int_equal(loci_backend_open("abacus", NULL, &backend, &r.err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(r.err.text, "cpu"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products_equal_sums_in_double),
        cmocka_unit_test(test_mapped_weights_are_packed_ones),
        cmocka_unit_test(test_a_row_does_not_depend_on_the_others),
        cmocka_unit_test(test_few_rows_by_weights_of_all_forms),
        cmocka_unit_test(test_embedding_rows),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
