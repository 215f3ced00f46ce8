/* SPDX-License-Identifier: Apache-2.0
 *
 * Sampling: greedy and its ties, bans, penalty, top-p, temperature, reproducible draws and their
 * distribution, errors.
 */
#include "base/rng.h"
#include "numeric.h"

enum { VOCAB = 37 };

typedef struct sampler {
    rig r;
    loci_ref ids, logprob, logits;
    float row[VOCAB];
    loci_sample_params params;
    uint32_t banned[VOCAB], banned_count, recent[4], recent_count;
    int32_t id;
    float log_p;
} sampler;

static sampler open_sampler(void) {
    sampler s = {.params = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    s.r = rig_open(NULL, 1);
    s.ids = put(&s.r, NULL, 64);
    s.logprob = put(&s.r, NULL, 64);
    s.logits = put(&s.r, NULL, 2 * sizeof s.row);
    for (int i = 0; i < VOCAB; i++) s.row[i] = random_float();
    return s;
}

static void close_sampler(sampler *s) {
    drop(&s->r, s->ids);
    drop(&s->r, s->logprob);
    drop(&s->r, s->logits);
    rig_close(&s->r);
}

static loci_status try_sample(sampler *s) {
    rig *r = &s->r;
    r->ops->upload(r->stream, s->logits, s->row, sizeof s->row);
    r->ops->sample(r->stream, s->ids, s->logprob, s->logits, 1, VOCAB, &s->params, s->banned,
                   s->banned_count, s->recent, s->recent_count);
    r->ops->download(r->stream, &s->id, s->ids, sizeof s->id);
    r->ops->download(r->stream, &s->log_p, s->logprob, sizeof s->log_p);
    return r->ops->sync(r->stream, &r->err);
}

static int32_t sample(sampler *s) {
    ok(&s->r, try_sample(s));
    double sum = 0.0;
    for (int i = 0; i < VOCAB; i++) sum += exp((double)s->row[i]);
    assert_in_range(s->id, 0, VOCAB - 1);
    assert_true(fabs((double)s->row[s->id] - log(sum) - (double)s->log_p) < 1e-5);
    return s->id;
}

static void test_greedy(void **state) {
    (void)state;
    sampler s = open_sampler();
    s.row[30] = s.row[9] = s.row[20] = 8.0f;
    assert_int_equal(sample(&s), 9); /* ties go to the lowest id */
    s.banned[0] = 9;
    s.banned[1] = 400; /* outside the vocabulary: nothing to ban */
    s.banned_count = 2;
    assert_int_equal(sample(&s), 20);
    s.recent[0] = s.recent[1] = 20; /* listed twice, it counts once: 8 / 1.5 */
    s.recent_count = 2;
    s.params.repetition_penalty = 1.5f;
    assert_int_equal(sample(&s), 30);
    s.row[30] = 5.2f;
    assert_int_equal(sample(&s), 20);
    for (int i = 0; i < VOCAB; i++) s.row[i] = -1.0f;
    s.row[20] = -0.7f; /* negative logits are multiplied: -1.05 */
    assert_int_equal(sample(&s), 0);
    close_sampler(&s);
}

static void test_errors(void **state) {
    (void)state;
    sampler s = open_sampler();
    s.row[17] = NAN;
    assert_int_equal(try_sample(&s), LOCI_E_INTERNAL);
    assert_non_null(strstr(s.r.err.text, "17"));
    assert_non_null(strstr(s.r.err.text, "not a number"));
    s.row[17] = INFINITY;
    assert_int_equal(try_sample(&s), LOCI_E_INTERNAL);
    s.row[17] = -INFINITY; /* allowed: just never chosen */
    sample(&s);
    for (uint32_t i = 0; i < VOCAB; i++) s.banned[i] = i;
    s.banned_count = VOCAB;
    assert_int_equal(try_sample(&s), LOCI_E_INVAL);
    s.params.temperature = 1.0f;
    assert_int_equal(try_sample(&s), LOCI_E_INVAL);
    close_sampler(&s);
}

#define DRAWS 20000

/* Frequencies over many steps against the distribution that the parameters define. */
static void check_distribution(sampler *s, const double *want) {
    unsigned count[VOCAB] = {0};
    for (s->params.step = 0; s->params.step < DRAWS; s->params.step++) count[sample(s)]++;
    for (int i = 0; i < VOCAB; i++) {
        double sigma = sqrt(want[i] * (1.0 - want[i]) / DRAWS);
        double seen = (double)count[i] / DRAWS;
        if (want[i] == 0.0) assert_int_equal(count[i], 0);
        if (fabs(seen - want[i]) > 5.0 * sigma + 1e-9)
            fail_msg("token %d was drawn with frequency %g, expected %g", i, seen, want[i]);
    }
}

static void test_draws_follow_the_distribution(void **state) {
    (void)state;
    sampler s = open_sampler();
    double want[VOCAB], sum = 0.0;
    s.params.temperature = 0.7f;
    s.params.seed = 99;
    s.banned[0] = 3;
    s.banned_count = 1;
    for (int i = 0; i < VOCAB; i++) {
        want[i] = i == 3 ? 0.0 : exp((double)s.row[i] / 0.7);
        sum += want[i];
    }
    for (int i = 0; i < VOCAB; i++) want[i] /= sum;
    check_distribution(&s, want);
    close_sampler(&s);
}

static void test_top_p_keeps_the_fewest_that_reach_it(void **state) {
    (void)state;
    sampler s = open_sampler();
    double want[VOCAB] = {0};
    for (int i = 0; i < VOCAB; i++) s.row[i] = -30.0f;
    s.row[4] = logf(0.5f);
    s.row[8] = logf(0.3f);
    s.row[6] = logf(0.15f);
    s.row[2] = logf(0.05f);
    s.params.temperature = 1.0f;
    s.params.top_p = 0.75f;
    want[4] = 0.5 / 0.8;
    want[8] = 0.3 / 0.8;
    check_distribution(&s, want);
    s.params.top_p = 1e-6f; /* at least one token always stays */
    for (s.params.step = 0; s.params.step < 50; s.params.step++) assert_int_equal(sample(&s), 4);
    close_sampler(&s);
}

static int heavier(const void *a, const void *b) {
    const double *x = a, *y = b; /* weight, id */
    if (x[0] != y[0]) return x[0] > y[0] ? -1 : 1;
    return x[1] < y[1] ? -1 : 1;
}

/* The token that sorting gives for a row, or -1 where rounding decides. */
static int32_t sorted_draw(const float *row, uint32_t vocab, const loci_sample_params *params,
                           uint32_t index) {
    double(*order)[2] = malloc(vocab * sizeof *order), total = 0.0, kept = 0.0, sum = 0.0;
    float most = -INFINITY;
    assert_non_null(order);
    for (uint32_t i = 0; i < vocab; i++) most = fmaxf(most, row[i]);
    for (uint32_t i = 0; i < vocab; i++) {
        order[i][0] = exp((double)((row[i] - most) / params->temperature));
        order[i][1] = i;
        total += order[i][0];
    }
    qsort(order, vocab, sizeof order[0], heavier);
    uint32_t chosen = 0;
    double most_mass = (double)params->top_p * total, near = 1e-6 * total;
    bool unsure = false;
    while (chosen < vocab && (chosen == 0 || kept < most_mass)) {
        unsure = unsure || (params->top_p < 1.0f && fabs(kept - most_mass) < near);
        kept += order[chosen++][0];
    }
    uint64_t draw = loci_rng_mix(params->seed + LOCI_RNG_GAMMA);
    draw = loci_rng_mix(draw + LOCI_RNG_GAMMA * (params->step + 1));
    draw = loci_rng_mix(draw + LOCI_RNG_GAMMA * (index + 1));
    double target = (double)(draw >> 11) * 0x1.0p-53 * kept;
    int32_t token = -1;
    for (uint32_t i = 0; i < chosen && token < 0 && !unsure; i++) {
        sum += order[i][0];
        unsure = fabs(sum - target) < near;
        if (sum > target) token = (int32_t)order[i][1];
    }
    free(order);
    return unsure ? -1 : token;
}

/* Ties, few values and many, all of top-p. */
static void test_draws_equal_sorting(void **state) {
    (void)state;
    sampler s = open_sampler();
    int compared = 0;
    for (uint64_t round = 0; round < 3000; round++) {
        uint64_t rng = round;
        for (int i = 0; i < VOCAB; i++) {
            float x = (float)(loci_rng_next(&rng) >> 40) * 0x1p-24f;
            s.row[i] = round % 3 ? 9.0f * x : floorf(4.0f * x);
        }
        s.params.temperature = round % 2 ? 0.5f : 3.0f;
        s.params.top_p = round % 5 ? (float)(loci_rng_next(&rng) >> 40) * 0x1p-24f : 1.0f;
        s.params.seed = round;
        s.params.step = round % 7;
        int32_t want = sorted_draw(s.row, VOCAB, &s.params, 0), got = sample(&s);
        if (want < 0) continue;
        assert_int_equal(got, want);
        compared++;
    }
    assert_true(compared > 2900);
    close_sampler(&s);
}

/* Many tokens, in several rows; of few values, so that thousands are equal, or of many. */
static void test_large_vocabularies(void **state) {
    (void)state;
    rig r = rig_open(NULL, 0);
    uint64_t rng = (uint64_t)random_u32() << 32 | random_u32();
    int compared = 0, rows_all = 0;
    for (unsigned round = 0; round < 24; round++) {
        uint32_t vocab = 4095 + (uint32_t)(loci_rng_next(&rng) % 30000), rows = 1 + round % 3;
        size_t bytes = (size_t)rows * vocab * sizeof(float);
        float *logits = malloc(bytes), logprob[3];
        int32_t ids[3];
        assert_non_null(logits);
        for (size_t i = 0; i < (size_t)rows * vocab; i++) {
            float x = (float)(loci_rng_next(&rng) >> 40) * 0x1p-24f;
            logits[i] = round % 2 ? 12.0f * x : floorf(3.0f * x);
        }
        loci_sample_params params = {.temperature = round % 4 < 2 ? 1.0f : 0.0f,
                                     .top_p = round % 3 ? 0.7f : 1.0f,
                                     .repetition_penalty = 1.0f,
                                     .seed = round,
                                     .step = round};
        loci_ref at = put(&r, logits, bytes), id = put(&r, NULL, 64), log_p = put(&r, NULL, 64);
        r.ops->sample(r.stream, id, log_p, at, rows, vocab, &params, NULL, 0, NULL, 0);
        r.ops->download(r.stream, ids, id, rows * sizeof *ids);
        r.ops->download(r.stream, logprob, log_p, rows * sizeof *logprob);
        ok(&r, r.ops->sync(r.stream, &r.err));
        for (uint32_t row = 0; row < rows; row++) {
            const float *x = logits + (size_t)row * vocab;
            uint32_t best = 0;
            double sum = 0.0;
            for (uint32_t i = 1; i < vocab; i++) best = x[i] > x[best] ? i : best;
            for (uint32_t i = 0; i < vocab; i++) sum += exp((double)x[i]);
            int32_t want =
                params.temperature > 0.0f ? sorted_draw(x, vocab, &params, row) : (int32_t)best;
            rows_all++;
            assert_in_range(ids[row], 0, vocab - 1);
            assert_true(fabs((double)x[ids[row]] - log(sum) - (double)logprob[row]) < 1e-4);
            if (want < 0) continue;
            assert_int_equal(ids[row], want);
            compared++;
        }
        drop(&r, at);
        drop(&r, id);
        drop(&r, log_p);
        free(logits);
    }
    assert_true(compared > rows_all * 3 / 4);
    rig_close(&r);
}

static void test_a_draw_is_named_by_seed_and_step(void **state) {
    (void)state;
    sampler s = open_sampler(), other = open_sampler();
    memcpy(other.row, s.row, sizeof s.row);
    int32_t first[64];
    unsigned same_step = 0, same_seed = 0;
    s.params.temperature = other.params.temperature = 1.0f;
    for (uint64_t i = 0; i < 64; i++) {
        s.params.step = i;
        first[i] = sample(&s);
    }
    for (uint64_t i = 64; i-- > 0;) { /* another order, another stream */
        other.params.step = i;
        assert_int_equal(sample(&other), first[i]);
        other.params.seed = 1;
        same_step += sample(&other) == first[i];
        other.params.seed = 0;
        same_seed += i > 0 && first[i] == first[i - 1];
    }
    assert_true(same_step < 25 && same_seed < 25);
    close_sampler(&s);
    close_sampler(&other);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_draws_follow_the_distribution),
        cmocka_unit_test(test_top_p_keeps_the_fewest_that_reach_it),
        cmocka_unit_test(test_draws_equal_sorting),
        cmocka_unit_test(test_large_vocabularies),
        cmocka_unit_test(test_a_draw_is_named_by_seed_and_step),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
