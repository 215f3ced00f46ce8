/* SPDX-License-Identifier: Apache-2.0
 *
 * Which of several readings is believed, and whether any is: by hand-made figures.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "services/engine/belief.h"

/* A passage that surely holds the answer, one that surely does not, and one in between. */
static const loci_reading sure = {.rank = 300, .words = 0.4, .logprob = -0.2, .none_logprob = -8};
static const loci_reading none = {.rank = 300, .words = 0.4, .logprob = -9, .none_logprob = -1e-4};
static const loci_reading half = {.rank = 300, .words = 0.4, .logprob = -1, .none_logprob = -0.7};

static loci_reading with_rank(loci_reading reading, double rank) {
    reading.rank = rank;
    return reading;
}

static void test_likelier_answers_and_better_ranks_are_chosen(void **state) {
    (void)state;
    loci_reading readings[3] = {none, sure, half};
    assert_int_equal(loci_readings_best(readings, 3), 1);
    assert_int_equal(loci_readings_best(readings, 1), 0);
    readings[2] = sure; /* equal: the first */
    assert_int_equal(loci_readings_best(readings, 3), 1);
    /* A lead of 20 outweighs 0.8 nats, one of 2 does not. */
    readings[0] = with_rank(half, 320);
    assert_int_equal(loci_readings_best(readings, 3), 0);
    readings[0] = with_rank(half, 302);
    assert_int_equal(loci_readings_best(readings, 3), 1);
}

/* Ranks ten apart weigh e to one. */
static void test_passages_are_weighed_by_rank(void **state) {
    (void)state;
    loci_reading readings[5];
    const loci_reading kinds[5] = {half, none, none, sure, half};
    double weights = 0, some = 0;
    for (int i = 0; i < 5; i++) {
        readings[i] = with_rank(kinds[i], 340 - 10 * i);
        weights += exp(-i);
        some += exp(-i) * (1 - exp(kinds[i].none_logprob));
    }
    some /= weights;
    double belief = loci_readings_belief(readings, 5);
    for (int i = 0; i < 5; i++) readings[i].none_logprob = log(0.5);
    double even = loci_readings_belief(readings, 5); /* a logit of 0, all else the same */
    assert_true(fabs(belief - even - log(some / (1 - some))) < 1e-9);
}

static void test_the_lead_is_over_three_passages(void **state) {
    (void)state;
    loci_reading readings[5]; /* alike: their weights do not matter */
    for (int i = 0; i < 5; i++) readings[i] = with_rank(half, 340 - 10 * i);
    double belief = loci_readings_belief(readings, 5);
    assert_true(fabs(loci_readings_belief(readings, 4) - belief) < 1e-9);
    readings[4].rank = 200;
    assert_true(fabs(loci_readings_belief(readings, 5) - belief) < 1e-9);
    readings[3].rank -= 30;
    double third = loci_readings_belief(readings, 5) - belief;
    assert_true(third > 0);
    readings[3].rank += 30;
    readings[0].rank += 10;
    assert_true(fabs(loci_readings_belief(readings, 5) - belief - third) < 1e-9);
}

static void test_each_kind_of_evidence_counts(void **state) {
    (void)state;
    loci_reading readings[4] = {with_rank(half, 310), half, half, half};
    double belief = loci_readings_belief(readings, 4);
    readings[0].none_logprob = -2;
    assert_true(loci_readings_belief(readings, 4) > belief + 0.5);
    readings[0] = with_rank(half, 310);
    readings[0].words = 0.6;
    assert_true(loci_readings_belief(readings, 4) > belief + 0.5);
    readings[0].words = 0.1;
    assert_true(loci_readings_belief(readings, 4) < belief - 0.5);
}

static void test_words_that_are_not_known_are_usual_ones(void **state) {
    (void)state;
    loci_reading readings[2] = {half, half};
    readings[0].words = readings[1].words = 0.3;
    double usual = loci_readings_belief(readings, 2);
    readings[0].words = readings[1].words = -1;
    assert_true(fabs(loci_readings_belief(readings, 2) - usual) < 1e-9);
}

static void test_a_passage_far_behind_does_not_speak(void **state) {
    (void)state;
    loci_reading readings[2] = {with_rank(none, 400), with_rank(sure, 300)};
    assert_true(loci_readings_belief(readings, 2) < 0);
    readings[0].none_logprob = sure.none_logprob;
    readings[1].none_logprob = none.none_logprob;
    assert_true(loci_readings_belief(readings, 2) > 0);
}

static void test_certainty_is_bounded(void **state) {
    (void)state;
    loci_reading readings[2] = {sure, none};
    for (int i = 0; i < 2; i++) readings[i].none_logprob = -INFINITY;
    double belief = loci_readings_belief(readings, 2);
    assert_true(isfinite(belief) && belief > 0);
    for (int i = 0; i < 2; i++) readings[i].none_logprob = 0;
    belief = loci_readings_belief(readings, 1);
    assert_true(isfinite(belief) && belief < 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_likelier_answers_and_better_ranks_are_chosen),
        cmocka_unit_test(test_passages_are_weighed_by_rank),
        cmocka_unit_test(test_the_lead_is_over_three_passages),
        cmocka_unit_test(test_each_kind_of_evidence_counts),
        cmocka_unit_test(test_words_that_are_not_known_are_usual_ones),
        cmocka_unit_test(test_a_passage_far_behind_does_not_speak),
        cmocka_unit_test(test_certainty_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
