/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools of threads that run calls, one for each lane. A pool starts threads as calls need them, up
 * to its bound, then queues up to its bound, then refuses. The pool of long calls has no queue, so
 * there a call always has a thread of its own.
 */
#include <stdio.h>
#include <stdlib.h>

#include "services/rpc/rpc_internal.h"

loci_status loci__pool_init(loci__pool *pool, const char *name, unsigned threads_max,
                            unsigned queue_max, loci_error *err) {
    *pool = (loci__pool){.threads_max = threads_max, .queue_max = queue_max};
    snprintf(pool->name, sizeof pool->name, "%s", name);
    pool->threads = calloc(threads_max, sizeof *pool->threads);
    if (!pool->threads)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for %u threads", threads_max);
    pthread_mutex_init(&pool->mu, NULL);
    pthread_cond_init(&pool->wake, NULL);
    return LOCI_OK;
}

static void *run_thread(void *arg) {
    loci__pool *pool = arg;
    pthread_mutex_lock(&pool->mu);
    for (;;) {
        while (!pool->head && !pool->stopping) pthread_cond_wait(&pool->wake, &pool->mu);
        if (!pool->head) break;
        loci_rpc_call *call = pool->head;
        pool->head = call->next;
        if (!pool->head) pool->tail = NULL;
        call->next = NULL;
        pool->queued--;
        pool->idle--;
        pthread_mutex_unlock(&pool->mu);
        loci__call_run(call);
        pthread_mutex_lock(&pool->mu);
        pool->idle++;
    }
    pthread_mutex_unlock(&pool->mu);
    return NULL;
}

/* Under pool->mu. */
static void add_thread(loci__pool *pool) {
    pthread_t *thread = &pool->threads[pool->thread_count];
    if (pthread_create(thread, NULL, run_thread, pool) != 0) return;
    pthread_setname_np(*thread, pool->name);
    pool->thread_count++;
    pool->idle++;
}

bool loci__pool_submit(loci__pool *pool, loci_rpc_call *call) {
    bool taken = false;
    pthread_mutex_lock(&pool->mu);
    if (pool->queued >= pool->idle && pool->thread_count < pool->threads_max) add_thread(pool);
    if (pool->thread_count > 0 && pool->queued < pool->idle + pool->queue_max) {
        call->next = NULL;
        if (pool->tail)
            pool->tail->next = call;
        else
            pool->head = call;
        pool->tail = call;
        pool->queued++;
        taken = true;
        pthread_cond_signal(&pool->wake);
    }
    pthread_mutex_unlock(&pool->mu);
    return taken;
}

void loci__pool_load(loci__pool *pool, loci_rpc_load *load) {
    pthread_mutex_lock(&pool->mu);
    load->active += pool->thread_count - pool->idle;
    load->queued += pool->queued;
    pthread_mutex_unlock(&pool->mu);
}

void loci__pool_stop(loci__pool *pool) {
    if (!pool->threads) return;
    pthread_mutex_lock(&pool->mu);
    LOCI_ASSERT(!pool->head);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mu);
    for (unsigned i = 0; i < pool->thread_count; i++) pthread_join(pool->threads[i], NULL);
}

void loci__pool_fini(loci__pool *pool) {
    if (!pool->threads) return;
    free(pool->threads);
    pool->threads = NULL;
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mu);
}
