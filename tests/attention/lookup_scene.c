/* SPDX-License-Identifier: Apache-2.0
 *
 * See lookup_scene.h.
 */
#include "tests/attention/lookup_scene.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention/cpu/cpu.h"

const setting usual = {.tokens = 2400,
                       .dim = 32,
                       .kv_heads = 2,
                       .group = 3,
                       .rows = 4,
                       .extent_tokens = 1000,
                       .spread = 0.6f,
                       .sharpness = 1.0f,
                       .seed = 21};

static float bf16(uint16_t x) {
    return loci_bf16_to_f32(x);
}

uint64_t fresh_seed(void) {
    const char *text = getenv("LOCI_TEST_SEED");
    uint64_t seed = (text ? strtoull(text, NULL, 10) : (uint64_t)time(NULL)) % 1000000;
    printf("LOCI_TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

setting random_setting(uint64_t *rng) {
    static const uint32_t dims[] = {16, 32, 48, 64, 128, 256}, groups[] = {1, 2, 3, 7, 16, 5};
    setting c = usual;
    c.dim = dims[fixture_random(rng) % 6];
    c.group = groups[fixture_random(rng) % 6];
    c.kv_heads = 1 + (uint32_t)(fixture_random(rng) % 3);
    c.rows = 1 + (uint32_t)(fixture_random(rng) % 9);
    c.tokens = 42 + (uint32_t)(fixture_random(rng) % 2500);
    c.extent_tokens = 100 + (uint32_t)(fixture_random(rng) % 1500);
    c.flat_segments = (uint32_t)(fixture_random(rng) % 2);
    c.spread = 0.4f + fixture_uniform(rng);
    c.sharpness = 0.3f + fixture_uniform(rng);
    c.seed = fixture_random(rng) % 100000;
    return c;
}

/* What int8 rows hold, as bf16. */
static void round_rows(uint16_t *rows, uint32_t tokens, uint32_t dim) {
    for (uint32_t t = 0; t < tokens; t++) {
        int8_t bytes[LOCI_HEAD_DIM_MAX];
        uint16_t most = loci_kv_quantise(bytes, rows + (size_t)t * dim, dim);
        loci_kv_restore(rows + (size_t)t * dim, bytes, most, dim);
    }
}

scene open_scene(setting c) {
    scene s = {.rows = c.rows, .rng = c.seed * 2 + 1};
    loci_error err = {0};
    fixture_shape shape = {.layers = 2,
                           .kv_heads = c.kv_heads,
                           .dim = c.dim,
                           .q_heads = c.kv_heads * c.group,
                           .tokens = c.tokens,
                           .segment_tokens = SEGMENT_TOKENS,
                           .clusters = 40,
                           .spread = c.spread,
                           .seed = c.seed};
    loci_pair_build_options options = {.position_codes = true, .kv_int8 = c.kv_int8};
    fixture_generate(&s.f, &shape);
    for (uint32_t i = 0; i < s.f.layers * c.kv_heads && c.kv_rounded; i++) {
        round_rows(s.f.k[i], c.tokens, c.dim);
        round_rows(s.f.v[i], c.tokens, c.dim);
    }
    if (fixture_build(&s.f, c.isa, c.threads, c.extent_tokens, c.flat_segments, &options, &err))
        fail_msg("%s", err.text);
    /* Its pairs have several parts, as those of large extents do; every other look-up is too large
     * to keep sums. */
    if (strcmp(s.f.backend->ops->name, "cpu") == 0) {
        loci_cpu *cpu = s.f.backend->ctx;
        cpu->part_roots = 1 + (uint32_t)(c.seed % 4);
        if (c.seed % 2) cpu->kept_bytes = 0;
    }
    size_t heads = (size_t)c.rows * s.f.q_heads, values = heads * c.dim;
    s.q = calloc(values, sizeof *s.q);
    s.out = calloc(values, sizeof *s.out);
    s.ref_out = calloc(values, sizeof *s.ref_out);
    s.steady = calloc(heads, sizeof *s.steady);
    s.lse = calloc(heads, sizeof *s.lse);
    s.ref_lse = calloc(heads, sizeof *s.ref_lse);
    s.dead = calloc(s.f.segments, 1);
    s.chosen = calloc((size_t)c.kv_heads * c.rows * c.tokens, 1);
    assert_true(s.q && s.out && s.ref_out && s.steady && s.lse && s.ref_lse && s.dead && s.chosen);
    for (size_t i = 0; i < heads; i++) {
        /* Queries look like some key less the common offset, so that a few topics stand out. */
        uint32_t pair = (uint32_t)(i % s.f.q_heads) / c.group;
        size_t t = fixture_random(&s.rng) % c.tokens;
        for (uint32_t d = 0; d < c.dim; d++)
            s.q[i * c.dim + d] =
                c.sharpness * (bf16(s.f.k[pair][t * c.dim + d]) + 0.5f * fixture_normal(&s.rng));
    }
    /* The steady zone holds from a twentieth to nine tenths of the mass, or nothing. */
    reference_attend(&s.f, 0, s.rows, s.q, NULL, s.ref_out, s.ref_lse);
    for (size_t i = 0; i < heads; i++) {
        float shift = 5.0f * fixture_uniform(&s.rng) - 3.0f;
        s.steady[i] = i % 5 == 4 || isinf(s.ref_lse[i]) ? -INFINITY : (float)s.ref_lse[i] + shift;
    }
    return s;
}

void close_scene(scene *s) {
    fixture_close(&s->f);
    free(s->q);
    free(s->out);
    free(s->ref_out);
    free(s->steady);
    free(s->lse);
    free(s->ref_lse);
    free(s->dead);
    free(s->chosen);
}

loci_select_params narrow(float top_p, uint32_t budget) {
    return (loci_select_params){.mode = LOCI_MODE_HIERARCHICAL,
                                .top_p = top_p,
                                .budget = budget,
                                .roots = 0.1f,
                                .roots_min = 2,
                                .candidates = 1.5f,
                                .candidates_min = 20};
}

fixture_run run(scene *s, loci_select_params params, bool selected) {
    loci_error err = {0};
    fixture_run r = {.layer = 0,
                     .rows = s->rows,
                     .q = s->q,
                     .steady = s->steady,
                     .params = params,
                     .out = s->out,
                     .lse = s->lse,
                     .want_selected = selected};
    if (fixture_look_up(&s->f, &r, &err) != LOCI_OK) fail_msg("%s", err.text);
    return r;
}

void kill_some(scene *s, uint32_t one_in) {
    loci_error err = {0};
    for (uint32_t i = 0; i < s->f.segments; i++) s->dead[i] = i % one_in != 0 || i < 12;
    if (fixture_kill(&s->f, s->dead, &err) != LOCI_OK) fail_msg("%s", err.text);
}
