/* SPDX-License-Identifier: Apache-2.0
 *
 * The thread pool; see pool.h.
 *
 * A loop belongs to the caller, who runs it whole if nobody comes: workers that wake in time join
 * it, under the lock and only while it is open, and the caller then waits for those that
 * joined and for nobody else. Waking a sleeper takes tens of microseconds, longer than many
 * loops (one product of a decoding step), so workers and caller first spin for SPIN_NS.
 */
#include "base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"

/* Longer than the gaps between the loops of a forward pass, short enough to cost an idle process
 * nothing. */
#define SPIN_NS 50000u

struct loci_pool {
    unsigned threads;
    pthread_t *workers;
    pthread_mutex_t run_lock; /* one loop at a time */
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    atomic_ulong generation; /* changed under the lock, as the next two */
    atomic_uint joined;      /* workers inside the loop */
    bool open;               /* the loop of this generation can be joined */
    atomic_bool stop;
    loci_pool_fn fn;
    void *arg;
    size_t count;
    atomic_size_t next;
};

typedef struct worker_arg {
    loci_pool *pool;
    unsigned index;
} worker_arg;

static void take_tasks(loci_pool *pool, unsigned thread) {
    for (;;) {
        size_t index = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (index >= pool->count) return;
        pool->fn(pool->arg, index, thread);
    }
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* A worker waits a moment for the next loop without sleeping. */
static void spin_for_start(loci_pool *pool, unsigned long seen) {
    uint64_t until = loci_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return;
            relax();
        }
    } while (!atomic_load_explicit(&pool->stop, memory_order_acquire) && loci_now_ns() < until);
}

/* The caller waits a moment for the workers inside its loop. */
static void spin_for_end(loci_pool *pool) {
    uint64_t until = loci_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(&pool->joined, memory_order_acquire) == 0) return;
            relax();
        }
    } while (loci_now_ns() < until);
}

static void *worker_main(void *arg) {
    worker_arg self = *(worker_arg *)arg;
    free(arg);
    loci_pool *pool = self.pool;
    unsigned long seen = 0;
    for (;;) {
        spin_for_start(pool, seen);
        pthread_mutex_lock(&pool->lock);
        while (!pool->stop && pool->generation == seen)
            pthread_cond_wait(&pool->start, &pool->lock);
        bool stop = pool->stop, join = pool->open;
        seen = pool->generation;
        if (!stop && join) pool->joined++;
        pthread_mutex_unlock(&pool->lock);
        if (stop) return NULL;
        if (!join) continue;
        take_tasks(pool, self.index);
        pthread_mutex_lock(&pool->lock);
        if (--pool->joined == 0) pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->lock);
    }
}

unsigned loci_pool_quota(const char *path) {
    unsigned long long quota, period;
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    int found = fscanf(file, "%llu %llu", &quota, &period);
    fclose(file);
    if (found != 2 || quota == 0 || period == 0) return 0;
    unsigned long long cpus = (quota - 1) / period + 1;
    return cpus < CPU_SETSIZE ? (unsigned)cpus : 0;
}

/* Threads that spin for CPUs which they do not get are slower than fewer. */
static unsigned usable_cpus(void) {
    cpu_set_t set;
    long online = sysconf(_SC_NPROCESSORS_ONLN); /* where there are more than a set can hold */
    unsigned cpus = online > 0 ? (unsigned)online : 1;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = (unsigned)CPU_COUNT(&set);
    unsigned quota = loci_pool_quota("/sys/fs/cgroup/cpu.max");
    return quota != 0 && quota < cpus ? quota : cpus;
}

loci_status loci_pool_create(unsigned threads, loci_pool **out, loci_error *err) {
    if (threads == 0) threads = usable_cpus();
    loci_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return loci_fail(err, LOCI_E_NOMEM, "no memory for a thread pool");
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->start, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->threads = 1;
    pool->workers = calloc(threads, sizeof *pool->workers);
    for (unsigned i = 1; pool->workers && i < threads; i++) {
        worker_arg *arg = malloc(sizeof *arg);
        if (!arg) break;
        *arg = (worker_arg){pool, i};
        if (pthread_create(&pool->workers[i], NULL, worker_main, arg) != 0) {
            free(arg);
            break;
        }
        pool->threads++;
    }
    if (pool->threads < threads) {
        loci_pool_destroy(pool);
        return loci_fail(err, LOCI_E_NOMEM, "cannot start %u threads", threads);
    }
    *out = pool;
    return LOCI_OK;
}

void loci_pool_destroy(loci_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->start);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->run_lock);
    free(pool->workers);
    free(pool);
}

unsigned loci_pool_threads(const loci_pool *pool) {
    return pool->threads;
}

void loci_pool_run(loci_pool *pool, size_t count, loci_pool_fn fn, void *arg) {
    if (!pool) {
        for (size_t i = 0; i < count; i++) fn(arg, i, 0);
        return;
    }
    if (count == 0) return;
    pthread_mutex_lock(&pool->run_lock);
    pool->fn = fn;
    pool->arg = arg;
    pool->count = count;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    if (count > 1 && pool->threads > 1) {
        pthread_mutex_lock(&pool->lock);
        pool->open = true;
        pool->generation++;
        pthread_cond_broadcast(&pool->start);
        pthread_mutex_unlock(&pool->lock);
        take_tasks(pool, 0);
        pthread_mutex_lock(&pool->lock);
        pool->open = false;
        pthread_mutex_unlock(&pool->lock);
        spin_for_end(pool);
        pthread_mutex_lock(&pool->lock);
        while (pool->joined > 0) pthread_cond_wait(&pool->done, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
    } else {
        for (size_t i = 0; i < count; i++) fn(arg, i, 0);
    }
    pthread_mutex_unlock(&pool->run_lock);
}
