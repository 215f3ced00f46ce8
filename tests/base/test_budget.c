/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory budget: nothing exceeds the limit, refusals say what they must, those who can let go
 * are asked first, and many threads leave the count right.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/budget.h"
#include "base/rng.h"

#define MIB (1ull << 20)

static loci_budget *make(uint64_t limit) {
    loci_budget *budget = NULL;
    assert_int_equal(loci_budget_create(limit, &budget, NULL), LOCI_OK);
    return budget;
}

static void says(const loci_error *err, const char *words) {
    if (!strstr(err->text, words)) fail_msg("\"%s\" does not say \"%s\"", err->text, words);
}

static void test_limit_holds(void **state) {
    (void)state;
    loci_budget *budget = make(100 * MIB);
    loci_budget_usage usage;
    loci_error err = {LOCI_OK, "", ""};
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_MODEL, 60 * MIB, "a model", &err), 0);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 40 * MIB + 1, "a look-up", &err),
                     LOCI_E_LIMIT);
    assert_string_equal(err.reason, "MEMORY_BUDGET");
    says(&err, "a look-up needs 41 MiB");
    says(&err, "60 of the budget's 100 MiB are taken (model 60)");
    says(&err, "shorter question");
    says(&err, "--memory");
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 40 * MIB, "a look-up", &err), 0);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_SNAPSHOTS, 1, "a snapshot", &err),
                     LOCI_E_LIMIT);
    says(&err, "model 60, lookups 40");
    /* A request near 2^64 does not wrap around. */
    loci_budget_give(budget, LOCI_MEMORY_LOOKUPS, 40 * MIB);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, UINT64_MAX, "a look-up", &err),
                     LOCI_E_LIMIT);
    loci_budget_usage_of(budget, &usage);
    assert_true(usage.used == 60 * MIB && usage.used_most == 100 * MIB);
    assert_true(usage.part[LOCI_MEMORY_MODEL] == 60 * MIB && usage.part[LOCI_MEMORY_LOOKUPS] == 0);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 0, "nothing", &err), LOCI_OK);
    loci_budget_give(budget, LOCI_MEMORY_MODEL, 60 * MIB);
    loci_budget_destroy(budget);
}

static void test_without_a_budget_all_fits(void **state) {
    (void)state;
    assert_int_equal(loci_budget_take(NULL, LOCI_MEMORY_MODEL, UINT64_MAX, "a model", NULL), 0);
    loci_budget_give(NULL, LOCI_MEMORY_MODEL, UINT64_MAX);
    loci_budget_destroy(NULL);
}

typedef struct cache {
    loci_budget *budget;
    uint64_t held;
    unsigned asked;
} cache;

static void let_go(void *ctx) {
    cache *self = ctx;
    self->asked++;
    loci_budget_give(self->budget, LOCI_MEMORY_SNAPSHOTS, self->held);
    self->held = 0;
}

static void test_shortage_asks_before_it_refuses(void **state) {
    (void)state;
    loci_budget *budget = make(100);
    cache first = {budget, 30, 0}, second = {budget, 30, 0};
    loci_budget_on_shortage(budget, let_go, &first);
    loci_budget_on_shortage(budget, let_go, &second);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_SNAPSHOTS, 60, "snapshots", NULL), 0);
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 40, "a look-up", NULL), 0);
    assert_int_equal(first.asked, 0);
    /* The first suffices. */
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 30, "a look-up", NULL), 0);
    assert_int_equal(first.asked, 1);
    assert_int_equal(second.asked, 0);
    /* Not even both. */
    assert_int_equal(loci_budget_take(budget, LOCI_MEMORY_LOOKUPS, 31, "a look-up", NULL),
                     LOCI_E_LIMIT);
    assert_int_equal(second.asked, 1);
    loci_budget_usage usage;
    loci_budget_usage_of(budget, &usage);
    assert_true(usage.used == 70);
    loci_budget_destroy(budget);
}

typedef struct worker {
    pthread_t thread;
    loci_budget *budget;
    uint64_t seed;
    unsigned refused;
    bool exceeded;
} worker;

static void *take_and_give(void *arg) {
    worker *self = arg;
    for (int i = 0; i < 20000; i++) {
        uint64_t bytes = 1 + loci_rng_next(&self->seed) % 400;
        loci_memory_part part = (loci_memory_part)(loci_rng_next(&self->seed) % LOCI_MEMORY_PARTS);
        if (loci_budget_take(self->budget, part, bytes, "a test", NULL) != LOCI_OK) {
            self->refused++;
            continue;
        }
        loci_budget_usage usage;
        loci_budget_usage_of(self->budget, &usage);
        uint64_t sum = 0;
        for (unsigned p = 0; p < LOCI_MEMORY_PARTS; p++) sum += usage.part[p];
        self->exceeded = self->exceeded || usage.used > usage.limit || sum != usage.used;
        loci_budget_give(self->budget, part, bytes);
    }
    return NULL;
}

static void test_threads_leave_the_count_right(void **state) {
    (void)state;
    loci_budget *budget = make(350);
    worker workers[4];
    unsigned refused = 0;
    for (unsigned i = 0; i < 4; i++) {
        workers[i] = (worker){.budget = budget, .seed = 1 + i};
        assert_int_equal(pthread_create(&workers[i].thread, NULL, take_and_give, &workers[i]), 0);
    }
    for (unsigned i = 0; i < 4; i++) {
        pthread_join(workers[i].thread, NULL);
        assert_false(workers[i].exceeded);
        refused += workers[i].refused;
    }
    loci_budget_usage usage;
    loci_budget_usage_of(budget, &usage);
    assert_true(usage.used == 0 && usage.used_most <= 350 && refused > 0);
    loci_budget_destroy(budget);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_limit_holds),
        cmocka_unit_test(test_without_a_budget_all_fits),
        cmocka_unit_test(test_shortage_asks_before_it_refuses),
        cmocka_unit_test(test_threads_leave_the_count_right),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
