/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory budget; see budget.h. One lock guards all numbers; it is never held while somebody
 * else's code runs.
 */
#include "base/budget.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SHORTAGE_MAX 4u

struct loci_budget {
    pthread_mutex_t lock;
    loci_budget_usage usage;
    struct {
        loci_shortage_fn fn;
        void *ctx;
    } shortage[SHORTAGE_MAX];
    unsigned shortage_count;
};

static const struct {
    const char *name, *helps;
} parts[LOCI_MEMORY_PARTS] = {
#define X(id, name, helps) {name, helps},
    LOCI_MEMORY_MAP(X)
#undef X
};

/* The limit of the memory cgroup that the process lives in (v2, then v1), as containers see it. */
static uint64_t cgroup_limit(void) {
    static const char *const paths[] = {"/sys/fs/cgroup/memory.max",
                                        "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    for (size_t i = 0; i < 2; i++) {
        unsigned long long bytes;
        FILE *file = fopen(paths[i], "r");
        if (!file) continue;
        int found = fscanf(file, "%llu", &bytes);
        fclose(file);
        if (found == 1) return bytes;
    }
    return UINT64_MAX;
}

uint64_t loci_memory_limit(void) {
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t ram = pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 8ull << 30;
    uint64_t limit = cgroup_limit();
    return limit < ram ? limit : ram;
}

const char *loci_memory_part_name(loci_memory_part part) {
    LOCI_ASSERT((unsigned)part < LOCI_MEMORY_PARTS);
    return parts[part].name;
}

loci_status loci_budget_create(uint64_t limit, loci_budget **out, loci_error *err) {
    loci_budget *budget = calloc(1, sizeof *budget);
    if (!budget) return loci_fail(err, LOCI_E_NOMEM, "no memory for the memory budget");
    pthread_mutex_init(&budget->lock, NULL);
    budget->usage.limit = limit;
    *out = budget;
    return LOCI_OK;
}

void loci_budget_destroy(loci_budget *budget) {
    if (!budget) return;
    pthread_mutex_destroy(&budget->lock);
    free(budget);
}

void loci_budget_on_shortage(loci_budget *budget, loci_shortage_fn fn, void *ctx) {
    LOCI_ASSERT(budget->shortage_count < SHORTAGE_MAX);
    budget->shortage[budget->shortage_count].fn = fn;
    budget->shortage[budget->shortage_count++].ctx = ctx;
}

static bool try_take(loci_budget *budget, loci_memory_part part, uint64_t bytes) {
    pthread_mutex_lock(&budget->lock);
    loci_budget_usage *usage = &budget->usage;
    bool fits = bytes <= usage->limit - usage->used;
    if (fits) {
        usage->used += bytes;
        usage->part[part] += bytes;
        if (usage->used > usage->used_most) usage->used_most = usage->used;
    }
    pthread_mutex_unlock(&budget->lock);
    return fits;
}

/* MiB, rounded up: what is refused should not read as 0. */
static unsigned long long mib(uint64_t bytes) {
    return (bytes >> 20) + ((bytes & 0xfffffu) != 0);
}

static loci_status refuse(loci_budget *budget, loci_memory_part part, uint64_t bytes,
                          const char *what, loci_error *err) {
    loci_budget_usage usage;
    char held[192] = "";
    size_t len = 0;
    loci_budget_usage_of(budget, &usage);
    for (unsigned p = 0; p < LOCI_MEMORY_PARTS && len < sizeof held; p++) {
        if (usage.part[p] == 0) continue;
        int added = snprintf(held + len, sizeof held - len, "%s%s %llu", len ? ", " : "",
                             parts[p].name, mib(usage.part[p]));
        if (added > 0) len += (size_t)added;
    }
    return loci_fail_reason(err, LOCI_E_LIMIT, "MEMORY_BUDGET",
                            "%s needs %llu MiB of memory, but %llu of the budget's %llu MiB are "
                            "taken (%s); what helps: %s",
                            what, mib(bytes), mib(usage.used), mib(usage.limit), held,
                            parts[part].helps);
}

loci_status loci_budget_take(loci_budget *budget, loci_memory_part part, uint64_t bytes,
                             const char *what, loci_error *err) {
    LOCI_ASSERT((unsigned)part < LOCI_MEMORY_PARTS);
    if (!budget || bytes == 0) return LOCI_OK;
    if (try_take(budget, part, bytes)) return LOCI_OK;
    for (unsigned i = 0; i < budget->shortage_count; i++) {
        budget->shortage[i].fn(budget->shortage[i].ctx);
        if (try_take(budget, part, bytes)) return LOCI_OK;
    }
    return refuse(budget, part, bytes, what, err);
}

void loci_budget_give(loci_budget *budget, loci_memory_part part, uint64_t bytes) {
    LOCI_ASSERT((unsigned)part < LOCI_MEMORY_PARTS);
    if (!budget || bytes == 0) return;
    pthread_mutex_lock(&budget->lock);
    LOCI_ASSERT(bytes <= budget->usage.part[part]);
    budget->usage.part[part] -= bytes;
    budget->usage.used -= bytes;
    pthread_mutex_unlock(&budget->lock);
}

void loci_budget_usage_of(loci_budget *budget, loci_budget_usage *out) {
    pthread_mutex_lock(&budget->lock);
    *out = budget->usage;
    pthread_mutex_unlock(&budget->lock);
}
