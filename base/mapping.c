/* SPDX-License-Identifier: Apache-2.0
 *
 * See mapping.h. The handler walks a list of mappings that only grows: entries are taken again,
 * never freed, so that it needs no lock.
 */
#include "base/mapping.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct loci_mapping {
    atomic_uintptr_t begin; /* 0: nothing is mapped */
    atomic_uintptr_t end;
    atomic_bool failed;
    struct loci_mapping *next; /* in the list of all; set once */
    struct loci_mapping *idle; /* in the list of those to be taken again */
    char *name;
};

static _Atomic(loci_mapping *) all;
static loci_mapping *idle;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what changes of all this */
static struct sigaction before;
static uintptr_t page_bytes;

static void on_bus_error(int number, siginfo_t *info, void *context) {
    (void)context;
    int kept = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (loci_mapping *m = atomic_load(&all); m; m = m->next) {
        uintptr_t begin = atomic_load(&m->begin), end = atomic_load(&m->end);
        if (begin == 0 || at < begin || at >= end || begin != atomic_load(&m->begin)) continue;
        atomic_store(&m->failed, true);
        void *page = mmap((void *)(at / page_bytes * page_bytes), page_bytes, PROT_READ,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (page == MAP_FAILED) break;
        errno = kept;
        return; /* the read is done again and finds zeros */
    }
    (void)sigaction(number, &before, NULL); /* the access is done again and raises it there */
}

/* Whoever took the signal since the last mapping is asked for what is not ours. */
static void install(void) {
    struct sigaction action, present;
    int bad = sigaction(SIGBUS, NULL, &present);
    if ((present.sa_flags & SA_SIGINFO) && present.sa_sigaction == on_bus_error) return;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    (void)sigemptyset(&action.sa_mask);
    before = present;
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    bad |= sigaction(SIGBUS, &action, NULL);
    LOCI_ASSERT(!bad); /* fails only for a signal that there is not */
}

static loci_mapping *take(void) {
    (void)pthread_mutex_lock(&lock);
    install();
    loci_mapping *mapping = idle;
    if (mapping) {
        idle = mapping->idle;
    } else if ((mapping = calloc(1, sizeof *mapping)) != NULL) {
        mapping->next = atomic_load(&all);
        atomic_store(&all, mapping);
    }
    (void)pthread_mutex_unlock(&lock);
    return mapping;
}

static void give_back(loci_mapping *mapping) {
    free(mapping->name);
    mapping->name = NULL;
    (void)pthread_mutex_lock(&lock);
    mapping->idle = idle;
    idle = mapping;
    (void)pthread_mutex_unlock(&lock);
}

loci_status loci_mapping_open(int fd, uint64_t bytes, const char *name, loci_mapping **out,
                              loci_error *err) {
    LOCI_ASSERT(bytes > 0 && bytes <= SIZE_MAX);
    loci_mapping *mapping = take();
    if (!mapping) return loci_fail(err, LOCI_E_NOMEM, "no memory to map %s", name);
    mapping->name = strdup(name);
    void *map =
        mapping->name ? mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (map == MAP_FAILED) {
        int why = mapping->name ? errno : ENOMEM;
        give_back(mapping);
        return loci_fail(err, why == ENOMEM ? LOCI_E_NOMEM : LOCI_E_IO, "cannot map %s: %s", name,
                         strerror(why));
    }
    atomic_store(&mapping->failed, false);
    atomic_store(&mapping->end, (uintptr_t)map + (uintptr_t)bytes);
    atomic_store(&mapping->begin, (uintptr_t)map);
    *out = mapping;
    return LOCI_OK;
}

void loci_mapping_close(loci_mapping *mapping) {
    if (!mapping) return;
    uintptr_t begin = atomic_load(&mapping->begin), end = atomic_load(&mapping->end);
    atomic_store(&mapping->begin, 0); /* before the place can be mapped by another */
    (void)munmap((void *)begin, end - begin);
    give_back(mapping);
}

const uint8_t *loci_mapping_data(const loci_mapping *mapping) {
    return (const uint8_t *)atomic_load(&mapping->begin);
}

loci_status loci_mapping_check(const loci_mapping *mapping, loci_error *err) {
    if (!atomic_load(&mapping->failed)) return LOCI_OK;
    return loci_fail(
        err, LOCI_E_IO,
        "%s could not be read: the disk fails or the file was cut short; mend it, then "
        "start again",
        mapping->name);
}
