/* SPDX-License-Identifier: Apache-2.0
 *
 * The thread pool; see pool.h.
 */
#include "base/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

struct loci_pool {
    unsigned threads;
    pthread_t *workers;
    pthread_mutex_t run_lock; /* one loop at a time */
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    unsigned long generation;
    unsigned busy;
    bool stop;
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

static void *worker_main(void *arg) {
    worker_arg self = *(worker_arg *)arg;
    free(arg);
    loci_pool *pool = self.pool;
    unsigned long seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->stop && pool->generation == seen)
            pthread_cond_wait(&pool->start, &pool->lock);
        if (pool->stop) break;
        seen = pool->generation;
        pthread_mutex_unlock(&pool->lock);
        take_tasks(pool, self.index);
        pthread_mutex_lock(&pool->lock);
        if (--pool->busy == 0) pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

loci_status loci_pool_create(unsigned threads, loci_pool **out, loci_error *err) {
    if (threads == 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        threads = online > 0 ? (unsigned)online : 1;
    }
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
    if (count == 0) return;
    pthread_mutex_lock(&pool->run_lock);
    pool->fn = fn;
    pool->arg = arg;
    pool->count = count;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    if (count > 1 && pool->threads > 1) {
        pthread_mutex_lock(&pool->lock);
        pool->busy = pool->threads - 1;
        pool->generation++;
        pthread_cond_broadcast(&pool->start);
        pthread_mutex_unlock(&pool->lock);
        take_tasks(pool, 0);
        pthread_mutex_lock(&pool->lock);
        while (pool->busy > 0) pthread_cond_wait(&pool->done, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
    } else {
        for (size_t i = 0; i < count; i++) fn(arg, i, 0);
    }
    pthread_mutex_unlock(&pool->run_lock);
}
