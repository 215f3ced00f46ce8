/* SPDX-License-Identifier: Apache-2.0
 *
 * What a look-up says about segments: shares of attention, late-interaction scores, candidates.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"
#include "tests/attention/lookup_scene.h"

typedef struct ranking {
    loci_lookup *lookup;
    loci_buffer *memory;
    loci_ref q, steady, out, lse, mass;
} ranking;

static ranking rank_open(scene *s, loci_select_params params) {
    const loci_backend_ops *ops = s->f.backend->ops;
    ranking r = {0};
    loci_error err;
    size_t heads = (size_t)s->rows * s->f.q_heads * sizeof(float), values = heads * s->f.dim;
    assert_int_equal(ops->lookup_create(s->f.backend, &r.lookup, &err), LOCI_OK);
    size_t bytes = 2 * values + 2 * heads + s->f.segments * sizeof(float);
    assert_int_equal(ops->alloc(s->f.backend, bytes, &r.memory, &err), LOCI_OK);
    r.q = loci_ref_at(r.memory, 0);
    r.out = loci_ref_at(r.memory, values);
    r.steady = loci_ref_at(r.memory, 2 * values);
    r.lse = loci_ref_at(r.memory, 2 * values + heads);
    r.mass = loci_ref_at(r.memory, 2 * values + 2 * heads);
    ops->upload(s->f.stream, r.q, s->q, values);
    ops->upload(s->f.stream, r.steady, s->steady, heads);
    ops->lookup_begin(s->f.stream, r.lookup, &s->f.view, 0, r.q, s->f.q_heads * s->f.dim, s->rows,
                      s->f.q_heads, 1.0f / sqrtf((float)s->f.dim), r.steady, &params);
    ops->score_nodes(s->f.stream, r.lookup);
    ops->score_codes(s->f.stream, r.lookup);
    ops->select(s->f.stream, r.lookup);
    ops->attend_sparse(s->f.stream, r.lookup, r.out, s->f.q_heads * s->f.dim, r.lse);
    return r;
}

static void rank_close(scene *s, ranking *r) {
    s->f.backend->ops->lookup_free(s->f.backend, r->lookup);
    s->f.backend->ops->free(s->f.backend, r->memory);
}

/* Exact late-interaction score of a segment from its keys; mass under total for attribute. */
static double exact_score(const scene *s, uint32_t segment, const float *total, uint32_t row_begin,
                          double *mass) {
    const fixture *f = &s->f;
    uint32_t g = f->q_heads / f->kv_heads;
    double score = 0.0;
    *mass = 0.0;
    for (uint32_t i = 0; i < s->rows * f->q_heads; i++) {
        uint32_t h = i % f->q_heads / g;
        double sum = 0.0;
        for (uint32_t t = f->segment_begin[segment]; t < f->segment_begin[segment + 1]; t++) {
            double logit = 0.0;
            for (uint32_t d = 0; d < f->dim; d++)
                logit += (double)s->q[(size_t)i * f->dim + d] *
                         (double)loci_bf16_to_f32(f->k[h][(size_t)t * f->dim + d]) / sqrt(f->dim);
            sum += exp(logit);
            if (total && i / f->q_heads >= row_begin) *mass += exp(logit - (double)total[i]);
        }
        score += log(sum) / f->q_heads;
    }
    return score;
}

static void test_attribute_shares_out_all_mass(void **state) {
    (void)state;
    for (int n = 0; n < 10; n++) {
        bool row = n >= 8; /* a single one, which selects all that there is */
        int round = row ? 0 : n % 4;
        /* dense twice: by slot segments, and by records in old pairs */
        loci_mode mode = row ? LOCI_MODE_HIERARCHICAL : (loci_mode)(round % 3);
        uint32_t first = row ? 0 : 1;
        setting c = usual;
        if (row) c.rows = 1;
        c.flat_segments = 5;
        c.seed += (uint64_t)n / 4; /* logits kept, and not: lookup_scene.c */
        scene s = open_scene(c);
        const loci_backend_ops *ops = s.f.backend->ops;
        loci_select_params params = row ? narrow(1.0f, 1u << 30) : narrow(0.9f, 0);
        if (row) params.roots_min = params.candidates_min = 1u << 30;
        params.mode = mode;
        loci_error err = {0};
        if (round == 3) assert_int_equal(fixture_age(&s.f, &err), LOCI_OK);
        ranking r = rank_open(&s, params);
        float *mass = calloc(s.f.segments, sizeof *mass);
        float total[64];
        /* The total is what attention over more than this part would have. */
        ops->download(s.f.stream, s.lse, r.lse, s.rows * s.f.q_heads * sizeof *s.lse);
        if (ops->sync(s.f.stream, &err) != LOCI_OK) fail_msg("%s", err.text);
        for (uint32_t i = 0; i < s.rows * s.f.q_heads; i++)
            total[i] = s.lse[i] + 2.0f + 0.01f * (float)i;
        ops->upload(s.f.stream, r.steady, total, s.rows * s.f.q_heads * sizeof *total);
        ops->attribute(s.f.stream, r.lookup, r.steady, first, r.mass);
        ops->download(s.f.stream, mass, r.mass, s.f.segments * sizeof *mass);
        if (ops->sync(s.f.stream, &err) != LOCI_OK) fail_msg("%s", err.text);
        double sum = 0.0, expected = 0.0, exact;
        for (uint32_t i = 0; i < s.f.segments - 5; i++) sum += (double)mass[i];
        for (uint32_t i = first * s.f.q_heads; i < s.rows * s.f.q_heads; i++)
            expected += exp((double)s.lse[i] - (double)total[i]);
        assert_true(fabs(sum - expected) < 1e-4 * expected + 1e-9);
        for (uint32_t i = row || mode == LOCI_MODE_DENSE ? 0 : s.f.segments - 5; i < s.f.segments;
             i++) {
            (void)exact_score(&s, i, total, first, &exact);
            if (fabs((double)mass[i] - exact) > 1e-4 * exact + 1e-7)
                fail_msg("mode %d, segment %u: %.7f, not %.7f", (int)mode, i, (double)mass[i],
                         exact);
        }
        free(mass);
        rank_close(&s, &r);
        close_scene(&s);
    }
}

static void test_score_segments_matches_keys(void **state) {
    (void)state;
    setting c = usual;
    c.flat_segments = 4;
    c.sharpness = 0.5f;
    scene s = open_scene(c);
    const loci_backend_ops *ops = s.f.backend->ops;
    ranking r = rank_open(&s, narrow(0.9f, 0));
    uint32_t segments[64];
    float scores[64];
    loci_error err = {0};
    double mass, worst = 0.0;
    assert_true(s.f.segments <= 64);
    for (uint32_t i = 0; i < s.f.segments; i++) segments[i] = s.f.segments - 1 - i;
    ops->score_segments(s.f.stream, &s.f.view, 0, r.q, s.f.q_heads * s.f.dim, s.rows, s.f.q_heads,
                        1.0f / sqrtf((float)s.f.dim), segments, s.f.segments, r.mass);
    ops->download(s.f.stream, scores, r.mass, s.f.segments * sizeof *scores);
    if (ops->sync(s.f.stream, &err) != LOCI_OK) fail_msg("%s", err.text);
    for (uint32_t i = 0; i < s.f.segments; i++) {
        double off = fabs((double)scores[i] - exact_score(&s, segments[i], NULL, 0, &mass));
        if (i < 4 && off > 1e-3) fail_msg("flat segment %u is off by %.5f", segments[i], off);
        worst = fmax(worst, off / s.rows);
    }
    if (worst > 0.15) fail_msg("a row's score is off by %.3f", worst); /* 4-bit codes */
    rank_close(&s, &r);
    close_scene(&s);
}

static void test_score_segments_names_damage(void **state) {
    (void)state;
    scene s = open_scene(usual);
    const loci_backend_ops *ops = s.f.backend->ops;
    ranking r = rank_open(&s, narrow(0.9f, 0));
    const loci_pair_header *header = loci_pair_header_of(s.f.memory[0]);
    const uint64_t at[] = {header->position_codes_at + 3, header->position_hashes_at + 1};
    uint32_t segment = 0;
    loci_error err = {0};
    for (int i = 0; i < 2; i++) {
        s.f.memory[0][at[i]] ^= 4;
        assert_int_equal(fixture_rewrap(&s.f, &err), LOCI_OK);
        ops->score_segments(s.f.stream, &s.f.view, 0, r.q, s.f.q_heads * s.f.dim, s.rows,
                            s.f.q_heads, 0.2f, &segment, 1, r.mass);
        assert_int_equal(ops->sync(s.f.stream, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, "position"));
        s.f.memory[0][at[i]] ^= 4;
    }
    rank_close(&s, &r);
    close_scene(&s);
}

/* The best segments by exact score are among the candidates. */
static void test_candidates_hold_the_best_segments(void **state) {
    (void)state;
    uint32_t hits = 0, tries = 0;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        setting c = usual;
        c.seed = seed;
        c.tokens = SEGMENT_TOKENS * 120;
        c.extent_tokens = SEGMENT_TOKENS * 40;
        c.flat_segments = (uint32_t)(seed % 3) * 5;
        scene s = open_scene(c);
        loci_select_params params = narrow(0.9f, 0);
        params.mode = seed % 4 == 3 ? LOCI_MODE_DENSE : LOCI_MODE_HIERARCHICAL;
        ranking r = rank_open(&s, params);
        enum { LIMIT = 24 };
        uint32_t segments[LIMIT], count = 0, best = 0;
        loci_error err = {0};
        double mass, top = -INFINITY;
        s.f.backend->ops->lookup_candidates(s.f.stream, r.lookup, LIMIT, segments, &count);
        if (s.f.backend->ops->sync(s.f.stream, &err) != LOCI_OK) fail_msg("%s", err.text);
        assert_in_range(count, 1, LIMIT);
        for (uint32_t i = 0; i < s.f.segments; i++) {
            double score = exact_score(&s, i, NULL, 0, &mass);
            if (score > top) best = i;
            top = fmax(top, score);
        }
        for (uint32_t i = 0; i < count; i++) {
            assert_true(segments[i] < s.f.segments);
            for (uint32_t j = 0; j < i; j++) assert_true(segments[j] != segments[i]);
            hits += segments[i] == best;
        }
        tries++;
        rank_close(&s, &r);
        close_scene(&s);
    }
    if (hits + 1 < tries) fail_msg("the best segment was a candidate %u of %u times", hits, tries);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attribute_shares_out_all_mass),
        cmocka_unit_test(test_score_segments_matches_keys),
        cmocka_unit_test(test_score_segments_names_damage),
        cmocka_unit_test(test_candidates_hold_the_best_segments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
