/* SPDX-License-Identifier: Apache-2.0
 *
 * Kernels of the look-up whose results must be the same bits on every instruction set: tables and
 * sums of sketches, and what is read off them.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "attention/cpu/corpus_kernels.h"
#include "tests/attention/corpus_fixture.h"

enum {
    PARTS = 16,
    WORDS = PARTS * LOCI_SKETCH_WORDS,
    GROUPS = 5,
    SUMS = (LOCI_SKETCH_VECTORS - 1) * LOCI_ROOT_TOKENS_MAX + GROUPS * LOCI_SKETCH_GROUP
};

static loci_cpu_isa best_isa(void) {
    loci_cpu_isa best;
    loci_error err;
    assert_int_equal(loci_cpu_isa_detect(NULL, &best, &err), LOCI_OK);
    return best;
}

/* Tables stand within half a step a part of the products. A codebook whose products overflow gives
 * the portable table, too. */
static void test_sketch_tables(void **state) {
    (void)state;
    uint64_t rng = 20;
    loci_cpu_isa best = best_isa();
    for (int round = 0; round < 60; round++) {
        float q[PARTS * LOCI_SKETCH_CHANNELS], book[WORDS * LOCI_SKETCH_CHANNELS];
        uint8_t expected[WORDS], entry[WORDS];
        for (size_t i = 0; i < sizeof q / sizeof *q; i++)
            q[i] = 4.0f * fixture_uniform(&rng) - 2.0f;
        for (size_t i = 0; i < sizeof book / sizeof *book; i++)
            book[i] = ldexpf(fixture_uniform(&rng) - 0.5f, round % 3 ? 0 : 129);
        loci_sketch_table plain = {.entry = expected}, fast = {.entry = entry};
        loci_corpus_kernels_portable.sketch_table(&plain, q, book, PARTS);
        for (int isa = 0; isa <= (int)best; isa++) {
            loci_corpus_kernels_of((loci_cpu_isa)isa)->sketch_table(&fast, q, book, PARTS);
            assert_memory_equal(entry, expected, sizeof entry);
            assert_memory_equal(&fast.scale, &plain.scale, sizeof(float));
            if (round % 3) assert_memory_equal(&fast.base, &plain.base, sizeof(float));
        }
        if (round % 3 == 0) continue; /* its sums mean nothing */
        double sum = 0.0;
        uint32_t steps = 0, word = (uint32_t)round % LOCI_SKETCH_WORDS;
        for (uint32_t p = 0; p < PARTS; p++) steps += expected[p * LOCI_SKETCH_WORDS + word];
        for (uint32_t c = 0; c < PARTS * LOCI_SKETCH_CHANNELS; c++)
            sum += (double)q[c] * (double)book[c * LOCI_SKETCH_WORDS + word];
        double estimate = (double)plain.base + (double)plain.scale * steps;
        assert_true(fabs(estimate - sum) <= 0.501 * PARTS * (double)plain.scale);
        assert_true(plain.scale > 0.0f);
    }
}

static void check_sums(const loci_corpus_kernels *kernels, const uint8_t *sketches,
                       const uint8_t *const *table, uint32_t vectors, const uint16_t *expected,
                       uint64_t *rng) {
    static uint16_t sums[SUMS + LOCI_LEAF_TOKENS_MAX];
    const size_t bytes = GROUPS * LOCI_SKETCH_GROUP * sizeof *sums;
    size_t stride = GROUPS * LOCI_SKETCH_GROUP + fixture_random(rng) % 64;
    uint16_t least[LOCI_SKETCH_VECTORS], top[LOCI_SKETCH_VECTORS] = {0}, tops[LOCI_SKETCH_VECTORS];
    uint32_t at = (uint32_t)(fixture_random(rng) % ((GROUPS - 1) * LOCI_SKETCH_GROUP));
    uint32_t mask = (uint32_t)fixture_random(rng), reached = 0;
    kernels->sketch_sums(sums, stride, sketches, GROUPS, PARTS, table, vectors);
    for (uint32_t v = 0; v < vectors; v++) {
        const uint16_t *of = sums + v * stride;
        assert_memory_equal(of, expected + v * LOCI_ROOT_TOKENS_MAX, bytes);
        least[v] = of[at + fixture_random(rng) % 32];
        for (uint32_t t = 0; t < 32; t++) {
            reached |= of[at + t] >= least[v] ? 1u << t : 0u;
            if (mask >> t & 1 && of[at + t] > top[v]) top[v] = of[at + t];
        }
    }
    assert_int_equal(kernels->reaching(sums + at, stride, least, vectors), reached);
    uint32_t listed[32 + 16], n = 0;
    assert_int_equal(kernels->list_reaching(listed, 7, sums + at, stride, 1, least, vectors),
                     __builtin_popcount(reached));
    for (uint32_t i = 0; i < 32; i++)
        if (reached >> i & 1) assert_int_equal(listed[n++], 7 + i);
    kernels->masked_tops(tops, sums + at, stride, vectors, mask);
    assert_memory_equal(tops, top, vectors * sizeof *top);
    memset(top, 0, sizeof top);
    kernels->masked_tops(tops, sums + at, stride, vectors, 0);
    assert_memory_equal(tops, top, vectors * sizeof *top);
}

static void test_sketch_sums(void **state) {
    (void)state;
    uint64_t rng = 21;
    loci_cpu_isa best = best_isa();
    for (int round = 0; round < 100; round++) {
        static uint16_t expected[SUMS];
        uint8_t sketches[GROUPS * PARTS * 16], entries[LOCI_SKETCH_VECTORS][WORDS];
        const uint8_t *table[LOCI_SKETCH_VECTORS];
        uint32_t vectors = 1 + (uint32_t)(fixture_random(&rng) % LOCI_SKETCH_VECTORS);
        for (size_t i = 0; i < sizeof sketches; i++) sketches[i] = (uint8_t)fixture_random(&rng);
        for (uint32_t v = 0; v < LOCI_SKETCH_VECTORS; v++) {
            table[v] = entries[v];
            for (uint32_t i = 0; i < WORDS; i++)
                entries[v][i] = round == 0 ? 255 : (uint8_t)fixture_random(&rng);
        }
        /* Token t of a group: low half of byte t, high half of byte t - 16. */
        for (uint32_t v = 0; v < vectors; v++)
            for (uint32_t t = 0; t < GROUPS * LOCI_SKETCH_GROUP; t++) {
                const uint8_t *group = sketches + (size_t)(t / 32) * PARTS * 16;
                uint32_t sum = 0;
                for (uint32_t p = 0; p < PARTS; p++) {
                    uint32_t byte = group[p * 16 + t % 16];
                    sum += entries[v][p * 16 + (t % 32 < 16 ? byte & 15u : byte >> 4)];
                }
                expected[v * LOCI_ROOT_TOKENS_MAX + t] = (uint16_t)sum;
            }
        for (int isa = 0; isa <= (int)best; isa++)
            check_sums(loci_corpus_kernels_of((loci_cpu_isa)isa), sketches, table, vectors,
                       expected, &rng);
    }
}

/* The nearest codeword of each token, of equal ones the first. */
static void test_nearest_words(void **state) {
    (void)state;
    enum { STRIDE = 112, CHANNELS = LOCI_SKETCH_CHANNELS };
    uint64_t rng = 23;
    loci_cpu_isa best = best_isa();
    for (int round = 0; round < 200; round++) {
        float x[CHANNELS * STRIDE], book[CHANNELS * LOCI_SKETCH_WORDS], norm[LOCI_SKETCH_WORDS];
        uint8_t expected[STRIDE], word[STRIDE];
        uint32_t n = LOCI_LANES * (1 + (uint32_t)(fixture_random(&rng) % (STRIDE / LOCI_LANES)));
        bool coarse = round % 2 == 0; /* scores that are equal */
        for (size_t i = 0; i < sizeof x / sizeof *x; i++)
            x[i] = coarse ? (float)(fixture_random(&rng) % 3) : fixture_uniform(&rng) - 0.5f;
        for (size_t i = 0; i < sizeof book / sizeof *book; i++)
            book[i] = coarse ? (float)(fixture_random(&rng) % 2) : fixture_uniform(&rng) - 0.5f;
        for (uint32_t w = 0; w < LOCI_SKETCH_WORDS; w++)
            norm[w] = coarse ? (float)(fixture_random(&rng) % 2) : fixture_uniform(&rng);
        for (uint32_t t = 0; t < n; t++) {
            float top = -INFINITY;
            for (uint8_t w = 0; w < LOCI_SKETCH_WORDS; w++) {
                float score = -norm[w];
                for (uint32_t c = 0; c < CHANNELS; c++)
                    score += x[c * STRIDE + t] * book[c * LOCI_SKETCH_WORDS + w];
                if (score > top) expected[t] = w;
                if (score > top) top = score;
            }
        }
        for (int isa = 0; isa <= (int)best; isa++) {
            memset(word, 255, sizeof word);
            loci_corpus_kernels_of((loci_cpu_isa)isa)
                ->nearest_words(word, x, STRIDE, n, book, norm);
            assert_memory_equal(word, expected, n);
            for (uint32_t t = n; t < STRIDE; t++) assert_int_equal(word[t], 255);
        }
    }
}

/* Keys are scaled, shifted within their bounds and counted. */
static void test_keys(void **state) {
    (void)state;
    uint64_t rng = 22;
    loci_cpu_isa best = best_isa();
    for (int round = 0; round < 300; round++) {
        enum { N = 160 };
        uint16_t key[N], expected[N], out[N];
        size_t n = 32 * (fixture_random(&rng) % (N / 32 + 1)), reach = 0;
        uint32_t times = round % 3 ? 65536 : (uint32_t)(fixture_random(&rng) % 65537);
        uint16_t more = round % 2 ? (uint16_t)fixture_random(&rng) : 0;
        uint16_t less = round % 2 ? 0 : (uint16_t)fixture_random(&rng);
        for (size_t i = 0; i < n; i++) {
            key[i] = (uint16_t)fixture_random(&rng);
            double x = floor(key[i] * (double)times / 65536.0) + more - less;
            expected[i] = (uint16_t)fmin(fmax(x, 0.0), 65535.0);
        }
        uint16_t least = n && round % 4 ? expected[fixture_random(&rng) % n] : (uint16_t)round;
        for (size_t i = 0; i < n; i++) reach += expected[i] >= least;
        for (int isa = 0; isa <= (int)best; isa++) {
            const loci_corpus_kernels *kernels = loci_corpus_kernels_of((loci_cpu_isa)isa);
            memcpy(out, key, n * sizeof *key);
            kernels->shift_keys(out, n, times, more, less);
            assert_memory_equal(out, expected, n * sizeof *out);
            assert_int_equal(kernels->count_keys(out, n, least), reach);
        }
    }
}

/* Scores of listed codes against sums channel by channel, at every shape, to the same bits. */
static void test_list_scores(void **state) {
    (void)state;
    enum { N = 70, SLOTS = 90, STRIDE = LOCI_HEAD_DIM_MAX / 2 + 8, ROOM = 32 };
    uint64_t rng = 23;
    loci_cpu_isa best = best_isa();
    for (int round = 0; round < 200; round++) {
        static uint8_t records[SLOTS * STRIDE + ROOM];
        static int8_t values[LOCI_LANES * LOCI_HEAD_DIM_MAX];
        static float expected[LOCI_LANES * N], out[LOCI_LANES * N];
        uint32_t slots[N], dim = 16 * (1 + (uint32_t)(fixture_random(&rng) % 16));
        uint32_t n = (uint32_t)(fixture_random(&rng) % (N + 1));
        loci_code_queries q = {.count = 1 + (uint32_t)(fixture_random(&rng) % LOCI_LANES),
                               .padded = (dim / 2 + 31) / 32 * 32,
                               .values = values};
        size_t stride = dim / 2 + 8;
        for (size_t i = 0; i < sizeof records; i++)
            records[i] = round == 0 ? 255 : (uint8_t)fixture_random(&rng);
        for (uint32_t i = 0; i < n; i++) slots[i] = (uint32_t)(fixture_random(&rng) % SLOTS);
        memset(values, 0, sizeof values);
        memset(expected, 0, sizeof expected);
        for (uint32_t v = 0; v < q.count; v++) {
            int8_t *even = values + (size_t)v * 2 * q.padded;
            q.base[v] = fixture_normal(&rng);
            q.scale[v] = fixture_uniform(&rng);
            for (uint32_t c = 0; c < dim; c++) {
                int8_t x = round == 0 ? 127 : (int8_t)(fixture_random(&rng) % 255 - 127);
                even[c % 2 * q.padded + c / 2] = x;
                q.sum[v] += x;
            }
            for (uint32_t i = 0; i < n; i++) {
                int32_t dot = 0;
                for (uint32_t c = 0; c < dim; c++) {
                    uint8_t two = records[slots[i] * stride + c / 2];
                    dot += (c % 2 ? two >> 4 : two & 15) * even[c % 2 * q.padded + c / 2];
                }
                float scaled = q.scale[v] * ((float)dot - 7.5f * (float)q.sum[v]);
                expected[v * N + i] = q.base[v] + scaled;
            }
        }
        for (int isa = 0; isa <= (int)best; isa++) {
            memset(out, 0, sizeof out); /* what lies between the lists is left alone */
            loci_corpus_kernels_of((loci_cpu_isa)isa)
                ->list_scores(out, N, records, stride, slots, n, &q);
            assert_memory_equal(out, expected, sizeof out);
        }
    }
}

/* The hash that stored rows have, from whatever address and of any length. */
static void test_hash(void **state) {
    (void)state;
    static const size_t lengths[] = {0, 3, 64, 128, 240, 241, 256, 257, 512, 1024, 1028};
    static uint8_t data[1028 + 8];
    uint64_t rng = 22;
    loci_cpu_isa best = best_isa();
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(256.0f * fixture_uniform(&rng));
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t at = 0; at < 8; at++)
            for (int isa = 0; isa <= (int)best; isa++)
                assert_int_equal(
                    loci_corpus_kernels_of((loci_cpu_isa)isa)->hash(data + at, lengths[i]),
                    loci_hash_bytes(data + at, lengths[i]));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys),          cmocka_unit_test(test_list_scores),
        cmocka_unit_test(test_sketch_tables), cmocka_unit_test(test_sketch_sums),
        cmocka_unit_test(test_nearest_words), cmocka_unit_test(test_hash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
