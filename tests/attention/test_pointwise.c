/* SPDX-License-Identifier: Apache-2.0
 *
 * Norm, activation, rotary positions, conversion: against double, on every instruction set.
 */
#include "attention/cpu/kernels.h"
#include "numeric.h"

static const uint32_t widths[] = {1, 2, 15, 16, 17, 48, 63, 64, 100, 384};

static void test_rms_norm(void **state) {
    (void)state;
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        for (size_t n = 0; n < sizeof widths / sizeof *widths; n++) {
            uint32_t cols = widths[n], rows = 90;
            size_t count = (size_t)rows * cols, bytes = count * sizeof(float);
            float *x = random_floats(count), *gain = random_floats(cols), *good = grab(bytes);
            for (uint32_t row = 0; row < rows; row++) {
                double sum = 0.0;
                const float *from = x + (size_t)row * cols;
                for (uint32_t c = 0; c < cols; c++) sum += (double)from[c] * (double)from[c];
                for (uint32_t c = 0; c < cols; c++)
                    good[(size_t)row * cols + c] =
                        (float)((double)from[c] / sqrt(sum / cols + 1e-3) * (double)gain[c]);
            }
            loci_ref xd = put(&r, x, bytes), gd = put(&r, gain, cols * sizeof(float));
            r.ops->rms_norm(r.stream, xd, xd, gd, rows, cols, 1e-3f); /* in place is allowed */
            get(&r, x, xd, bytes);
            check_close(x, good, count, 2e-6, isas[i]);
            drop(&r, xd);
            drop(&r, gd);
            free(x);
            free(gain);
            free(good);
        }
        rig_close(&r);
    }
}

static void test_swiglu(void **state) {
    (void)state;
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        for (size_t n = 0; n < sizeof widths / sizeof *widths; n++) {
            uint32_t cols = widths[n], rows = 50;
            size_t count = (size_t)rows * cols;
            float *x = random_floats(2 * count), *y = grab(count * sizeof(float));
            float *good = grab(count * sizeof(float));
            for (size_t j = 0; j < 2 * count; j++) x[j] *= 20.0f;
            x[0] = 200.0f;
            if (cols > 1) x[1] = -200.0f;
            for (uint32_t row = 0; row < rows; row++)
                for (uint32_t c = 0; c < cols; c++) {
                    double g = (double)x[(size_t)row * 2 * cols + c];
                    good[(size_t)row * cols + c] =
                        (float)(g / (1.0 + exp(-g)) * (double)x[((size_t)row * 2 + 1) * cols + c]);
                }
            loci_ref xd = put(&r, x, 2 * count * sizeof(float));
            loci_ref yd = put(&r, NULL, count * sizeof(float));
            r.ops->swiglu(r.stream, yd, xd, rows, cols);
            get(&r, y, yd, count * sizeof(float));
            check_close(y, good, count, 2e-6, isas[i]);
            drop(&r, xd);
            drop(&r, yd);
            free(x);
            free(y);
            free(good);
        }
        rig_close(&r);
    }
}

/* Positions far beyond any context too: the angle is rounded to float, the rest is exact. */
static void test_rope(void **state) {
    (void)state;
    static const uint32_t dims[] = {2, 6, 16, 64, 80, 512};
    const int32_t positions[] = {0, 1, 255, 4095, 131071, 5000000};
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        for (size_t n = 0; n < sizeof dims / sizeof *dims; n++) {
            uint32_t dim = dims[n], half = dim / 2, heads = 3, stride = heads * dim + 5, rows = 6;
            size_t count = (size_t)rows * stride, bytes = count * sizeof(float);
            float *x = random_floats(count), *good = grab(bytes), inv[256];
            memcpy(good, x, bytes);
            for (uint32_t d = 0; d < half; d++)
                inv[d] = powf(10000.0f, -2.0f * (float)d / (float)dim);
            for (uint32_t row = 0; row < rows; row++)
                for (uint32_t h = 0; h < heads; h++)
                    for (uint32_t d = 0; d < half; d++) {
                        float *low = good + (size_t)row * stride + (size_t)h * dim + d;
                        double angle = (double)((float)positions[row] * inv[d]);
                        double a = (double)low[0], b = (double)low[half];
                        low[0] = (float)(a * cos(angle) - b * sin(angle));
                        low[half] = (float)(b * cos(angle) + a * sin(angle));
                    }
            loci_ref xd = put(&r, x, bytes), pd = put(&r, positions, sizeof positions);
            loci_ref fd = put(&r, inv, sizeof inv);
            r.ops->rope(r.stream, xd, stride, pd, fd, rows, heads, dim);
            get(&r, x, xd, bytes);
            check_close(x, good, count, 1e-6, isas[i]);
            drop(&r, xd);
            drop(&r, pd);
            drop(&r, fd);
            free(x);
            free(good);
        }
        rig_close(&r);
    }
}

static void test_convert(void **state) {
    (void)state;
    enum { ROWS = 70, COLS = 37, FROM = 40, TO = 39 };
    const float special[] = {INFINITY,  -INFINITY, NAN,    0x1.01p0f,
                             0x1.03p0f, 3.4e38f,   1e-40f, -0.0f};
    float *x = random_floats(ROWS * FROM);
    memcpy(x, special, sizeof special);
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        uint16_t *halves = grab(ROWS * TO * sizeof *halves);
        float *floats = grab(ROWS * TO * sizeof *floats);
        loci_ref xd = put(&r, x, ROWS * FROM * sizeof(float));
        loci_ref hd = put(&r, halves, ROWS * TO * sizeof *halves);
        loci_ref fd = put(&r, floats, ROWS * TO * sizeof *floats);
        r.ops->convert(r.stream, hd, TO, LOCI_BF16, xd, FROM, ROWS, COLS);
        r.ops->convert(r.stream, fd, TO, LOCI_F32, xd, FROM, ROWS, COLS);
        get(&r, halves, hd, ROWS * TO * sizeof *halves);
        get(&r, floats, fd, ROWS * TO * sizeof *floats);
        for (size_t row = 0; row < ROWS; row++)
            for (size_t c = 0; c < TO; c++) {
                float from = c < COLS ? x[row * FROM + c] : 0.0f;
                assert_int_equal(halves[row * TO + c], loci_f32_to_bf16(from));
                assert_memory_equal(&floats[row * TO + c], &from, sizeof from);
            }
        assert_int_equal(halves[3], 0x3f80); /* ties go to even */
        assert_int_equal(halves[4], 0x3f82);
        assert_int_equal(halves[5], 0x7f80);
        r.ops->convert(r.stream, hd, TO, LOCI_F16, xd, FROM, ROWS, COLS);
        assert_int_equal(r.ops->sync(r.stream, &r.err), LOCI_E_UNSUPPORTED);
        drop(&r, xd);
        drop(&r, hd);
        drop(&r, fd);
        free(halves);
        free(floats);
        rig_close(&r);
    }
    free(x);
}

/* Rows go where they are told, and nothing else changes. */
static void test_scatter(void **state) {
    (void)state;
    enum { ROWS = 41, COLS = 300, FROM = 307, TO = 333, PLACES = 100 };
    float *x = random_floats(ROWS * FROM), *old = random_floats(PLACES * TO);
    float *y = grab(PLACES * TO * sizeof *y), *want = grab(PLACES * TO * sizeof *want);
    int32_t at[ROWS];
    memcpy(want, old, PLACES * TO * sizeof *want);
    for (size_t row = 0; row < ROWS; row++) {
        at[row] = (int32_t)((row * 37 + 11) % PLACES);
        memcpy(want + (size_t)at[row] * TO, x + row * FROM, COLS * sizeof *want);
    }
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 2);
        loci_ref xd = put(&r, x, ROWS * FROM * sizeof *x);
        loci_ref yd = put(&r, old, PLACES * TO * sizeof *old), td = put(&r, at, sizeof at);
        r.ops->scatter(r.stream, yd, TO, td, xd, FROM, ROWS, COLS);
        get(&r, y, yd, PLACES * TO * sizeof *y);
        assert_memory_equal(y, want, PLACES * TO * sizeof *y);
        drop(&r, xd);
        drop(&r, yd);
        drop(&r, td);
        rig_close(&r);
    }
    free(x);
    free(y);
    free(old);
    free(want);
}

/* The vectors' exp, seen through exp_sum, to 1e-6 over its whole range. */
#ifdef LOCI_TEST_CPU
static void test_exp(void **state) {
    (void)state;
    for (size_t i = 0; i < ISA_COUNT; i++) {
        rig r = rig_open(isas[i], 1);
        const loci_cpu_kernels *kernels = ((loci_cpu *)r.backend->ctx)->kernels;
        for (double x = -95.0; x < 1.0; x += 0.0137) {
            float lanes[16];
            for (int lane = 0; lane < 16; lane++) lanes[lane] = (float)x;
            double got = (double)kernels->exp_sum(lanes, 16, 0.0f) / 16.0;
            double want = exp((double)(float)x);
            if (x < -87.2)
                assert_true(got >= 0.0 && got < 2e-38);
            else
                assert_true(fabs(got - want) <= 1e-6 * want);
        }
        rig_close(&r);
    }
}

#endif

/* All halves, by their definition. */
static void test_f16(void **state) {
    (void)state;
    for (uint32_t bits = 0; bits < 0x10000u; bits++) {
        int exponent = (int)(bits >> 10 & 31u), fraction = (int)(bits & 1023u);
        double want = exponent ? ldexp(1024.0 + fraction, exponent - 25) : ldexp(fraction, -24);
        float got = loci_f16_to_f32((uint16_t)bits);
        if (exponent == 31 && fraction) {
            assert_true(isnan(got));
            continue;
        }
        if (exponent == 31) want = INFINITY;
        assert_true((double)got == (bits & 0x8000u ? -want : want));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm), cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_rope),     cmocka_unit_test(test_scatter),
        cmocka_unit_test(test_convert),  cmocka_unit_test(test_f16),
#ifdef LOCI_TEST_CPU
        cmocka_unit_test(test_exp),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
