/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences of a pass that are reached together: by one call for a group, whose failures are its
 * members' and nobody else's.
 */
#include "batch_scene.h"
#include "model/sequence.h"

/* All but the first of the scene are in its second pass: 1, 4, 7 are of one kind, 2, 5, 8 of
 * another, and 3 and 6 in the second layer only. */
static uint32_t kind_of(uint32_t i, uint32_t layer) {
    return i % 3 > 0 ? i % 3 : layer == 1 ? 3 : 10 + i;
}

static void group_scene(scene *s) {
    scene_open(s);
    for (uint32_t i = 1; i <= MEMBERS; i++) go_together(&s->w[i], kind_of(i, 0), kind_of(i, 1));
    atomic_store(&calls_together, 0);
    atomic_store(&reached_together, 0);
}

static void test_groups_are_reached_by_one_call(void **state) {
    (void)state;
    scene s;
    group_scene(&s);
    scene_run(&s);
    for (uint32_t i = 0; i <= MEMBERS; i++) ok(s.w[i].status, &s.w[i].err);
    assert_int_equal(atomic_load(&calls_together), 2 + 3);
    assert_int_equal(atomic_load(&reached_together), 6 + 8);
    scene_check(&s);
}

/* What fails in a layer, at once or later, fails for those that were together there. */
static void test_a_failure_is_its_groups_own(void **state) {
    (void)state;
    for (uint32_t later = 0; later < 2; later++)
        for (uint32_t call = 1; call <= 2; call++)
            for (uint32_t who = 1; who <= MEMBERS; who += 1) {
                scene s;
                group_scene(&s);
                *(later ? &s.w[who].stream_fails_in_call : &s.w[who].fail_in_call) = call;
                scene_run(&s);
                loci_status failure = later ? LOCI_E_UNSUPPORTED : LOCI_E_CORRUPT;
                for (uint32_t i = 0; i <= MEMBERS; i++) {
                    bool with = i > 0 && kind_of(i, call - 1) == kind_of(who, call - 1);
                    assert_int_equal(s.w[i].status, with ? failure : LOCI_OK);
                    if (!with) continue;
                    assert_int_equal(s.w[i].passed, failure);
                    assert_string_equal(s.w[i].err.text, s.w[who].err.text);
                }
                scene_check(&s);
            }
}

/* A member is cancelled between the layers: its group goes on without it. */
static void test_a_cancel_leaves_its_group(void **state) {
    (void)state;
    for (uint32_t who = 1; who <= MEMBERS; who++) {
        scene s;
        loci_cancel cancel;
        group_scene(&s);
        scene_cancel(&s, who, &cancel);
        bool pair = who % 3 == 0; /* the other one is alone then */
        assert_int_equal(atomic_load(&calls_together), pair ? 2 + 2 : 2 + 3);
        assert_int_equal(atomic_load(&reached_together), pair ? 6 + 6 : 6 + 7);
        scene_check(&s);
    }
}

/* All of a pass are one group: it has the pass's own stream, what fails there is everybody's, and
 * who is cancelled leaves the others a stream of their own. */
static void test_one_group_for_all(void **state) {
    (void)state;
    loci_cancel cancel;
    for (uint32_t what = 0; what < 6; what++) {
        scene s;
        scene_open(&s);
        for (uint32_t i = 1; i <= MEMBERS; i++) go_together(&s.w[i], 1, 1);
        atomic_store(&calls_together, 0);
        atomic_store(&reached_together, 0);
        uint32_t who = what == 3 ? MEMBERS : 1 + what; /* 3: found at the end of the pass */
        if (what < 2) s.w[who].fail_in_call = 1 + what;
        if (what == 2 || what == 3) s.w[who].stream_fails_in_call = what - 1;
        loci_status failure = what < 2 ? LOCI_E_CORRUPT : what < 4 ? LOCI_E_UNSUPPORTED : LOCI_OK;
        loci_cancel_init(&cancel, 0);
        if (what == 4) s.w[who].cancel = s.w[2].cancels = &cancel;
        scene_run(&s);
        ok(s.w[0].status, &s.w[0].err);
        for (uint32_t i = 1; i <= MEMBERS; i++) {
            assert_int_equal(s.w[i].status, what == 4 && i == who ? LOCI_E_CANCELLED : failure);
            if (failure != LOCI_OK) assert_string_equal(s.w[i].err.text, s.w[who].err.text);
        }
        if (failure == LOCI_OK) {
            assert_int_equal(atomic_load(&calls_together), 2);
            bool own = atomic_load(&stream_together) == loci_batch_stream(s.batch);
            assert_true(own == (what == 5)); /* else one is missing in the second layer */
            assert_int_equal(atomic_load(&reached_together), 2 * MEMBERS - (what == 4));
        }
        scene_check(&s);
    }
}

/* Sets change from layer to layer, more than there are groups: the last ones go alone. */
static void test_too_many_groups(void **state) {
    (void)state;
    scene s;
    scene_open(&s);
    for (uint32_t i = 1; i <= MEMBERS; i++) go_together(&s.w[i], i / 2, (i + 1) / 2);
    atomic_store(&calls_together, 0);
    scene_run(&s);
    for (uint32_t i = 0; i <= MEMBERS; i++) ok(s.w[i].status, &s.w[i].err);
    assert_int_equal(atomic_load(&calls_together), LOCI_ATTEND_GROUPS);
    scene_check(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_groups_are_reached_by_one_call),
        cmocka_unit_test(test_a_failure_is_its_groups_own),
        cmocka_unit_test(test_a_cancel_leaves_its_group),
        cmocka_unit_test(test_one_group_for_all),
        cmocka_unit_test(test_too_many_groups),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
