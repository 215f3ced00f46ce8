/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory budget of a process: who holds how much of it.
 *
 * Large consumers reserve what they are about to allocate, by part, and give it back when they have
 * freed it. The sum of all reservations never exceeds the limit: what does not fit is refused with
 * LOCI_E_LIMIT, reason MEMORY_BUDGET, and a sentence that says how much was wanted, who holds the
 * rest, and what helps. Before a refusal those who keep memory only to be faster are asked to let
 * it go (loci_budget_on_shortage).
 *
 * The budget counts; it allocates nothing. Small things (names, lists, messages) are covered by the
 * part "process", which is reserved once.
 *
 * Threading: every function but create, on_shortage and destroy may be called from any thread.
 */
#ifndef LOCI_BASE_BUDGET_H
#define LOCI_BASE_BUDGET_H

#include "base/status.h"

/* name, as users see it; what helps when this part is refused */
#define LOCI_MEMORY_MAP(X)                                                      \
    X(PROCESS, "process", "a larger --memory")                                  \
    X(MODEL, "model", "a smaller model or a larger --memory")                   \
    X(DATABASE, "database", "a larger --memory")                                \
    X(REGISTRATION, "registration", "a larger --memory")                        \
    X(QUESTIONS, "questions", "fewer --queries or a larger --memory")           \
    X(LOOKUPS, "lookups",                                                       \
      "a shorter question, fewer questions at the same time (locid --queries) " \
      "or a larger locid --memory")                                             \
    X(SNAPSHOTS, "snapshots", "fewer corpora in use at the same time or a larger locid --memory")

typedef enum loci_memory_part {
#define X(id, name, helps) LOCI_MEMORY_##id,
    LOCI_MEMORY_MAP(X)
#undef X
        LOCI_MEMORY_PARTS
} loci_memory_part;

/* Memory that the process may use: the machine's, or that of its memory cgroup (a container's). */
uint64_t loci_memory_limit(void);

const char *loci_memory_part_name(loci_memory_part part);

typedef struct loci_budget loci_budget;

/* Frees what can be made anew and gives it back. Runs on the thread whose request did not fit. */
typedef void (*loci_shortage_fn)(void *ctx);

LOCI_MUST_CHECK loci_status loci_budget_create(uint64_t limit, loci_budget **out, loci_error *err);
void loci_budget_destroy(loci_budget *budget); /* NULL allowed */
/* At most four, before other threads use the budget. */
void loci_budget_on_shortage(loci_budget *budget, loci_shortage_fn fn, void *ctx);

/* budget NULL: nothing is counted and everything fits. what: "a look-up", for the sentence. */
LOCI_MUST_CHECK loci_status loci_budget_take(loci_budget *budget, loci_memory_part part,
                                             uint64_t bytes, const char *what, loci_error *err);
/* At most what was taken for the part. */
void loci_budget_give(loci_budget *budget, loci_memory_part part, uint64_t bytes);

typedef struct loci_budget_usage {
    uint64_t limit, used, used_most; /* used_most: since the start */
    uint64_t part[LOCI_MEMORY_PARTS];
} loci_budget_usage;
void loci_budget_usage_of(loci_budget *budget, loci_budget_usage *out);

#endif
