/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs one after another, or overlapped: the rows of those ahead are read and clustered, each on a
 * thread of its own, while the blob of one is written. See index.h.
 */
#include <pthread.h>

#include "attention/index.h"

/* Clustering on a device has hundreds of steps that wait for one another: a short pair leaves it
 * idle most of the time, a long one does not. */
#define AHEAD_SHORT LOCI_PAIRS_AHEAD_MOST
#define SHORT_TOKENS LOCI_EXTENT_SEAL_TOKENS

/* Rows are read in the order of the pairs. */
typedef struct row_queue {
    const loci_pair_work *work;
    struct loci_pool *pool;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint32_t turn; /* the pair to be read next */
    bool stopped;  /* a pair has failed: nothing more is read */
} row_queue;

typedef struct begun {
    row_queue *queue;
    uint32_t pair;
    loci_pair_job *job;
    loci_status status;
    loci_error err;
    bool beside; /* on a thread of its own */
    pthread_t thread;
} begun;

static void *begin_pair(void *arg) {
    begun *b = arg;
    row_queue *queue = b->queue;
    loci_pair_rows rows;
    loci_pair_build_options options = {0};
    pthread_mutex_lock(&queue->lock);
    while (queue->turn != b->pair) pthread_cond_wait(&queue->moved, &queue->lock);
    bool stopped = queue->stopped;
    pthread_mutex_unlock(&queue->lock);
    b->status = stopped ? LOCI_E_CANCELLED
                        : queue->work->read(queue->work->ctx, b->pair, &rows, &options, &b->err);
    pthread_mutex_lock(&queue->lock);
    queue->turn++;
    queue->stopped = queue->stopped || b->status != LOCI_OK;
    pthread_cond_broadcast(&queue->moved);
    pthread_mutex_unlock(&queue->lock);
    if (b->status == LOCI_OK)
        b->status = loci_pair_begin(&rows, &options, queue->pool, &b->job, &b->err);
    return NULL;
}

static void start_pair(begun *b, row_queue *queue, uint32_t pair, bool beside) {
    *b = (begun){.queue = queue, .pair = pair};
    b->beside = beside && pthread_create(&b->thread, NULL, begin_pair, b) == 0;
    if (!b->beside) begin_pair(b);
}

static void await_pair(begun *b) {
    if (b->beside) pthread_join(b->thread, NULL);
}

static loci_status finish_pair(begun *b, loci_error *err) {
    loci_buf blob = LOCI_BUF_INIT;
    const loci_pair_work *work = b->queue->work;
    uint64_t hash;
    await_pair(b);
    if (b->status != LOCI_OK) {
        if (err) *err = b->err;
        return b->status;
    }
    loci_status status = loci_pair_finish(b->job, &blob, &hash, err);
    if (status == LOCI_OK)
        status = work->put(work->ctx, b->pair, loci_slice_of(blob.data, blob.len), hash, err);
    loci_buf_fini(&blob);
    return status;
}

uint32_t loci_pairs_ahead(const loci_backend *backend, uint32_t tokens) {
    if (!backend || !backend->ops->cluster_keys) return 0;
    return tokens <= SHORT_TOKENS ? AHEAD_SHORT : 1;
}

loci_status loci_pairs_build(const loci_pair_work *work, uint32_t count, uint32_t ahead,
                             struct loci_pool *pool, loci_error *err) {
    LOCI_ASSERT(ahead <= LOCI_PAIRS_AHEAD_MOST);
    row_queue queue = {.work = work, .pool = pool};
    begun pairs[LOCI_PAIRS_AHEAD_MOST + 1];
    loci_status status = LOCI_OK;
    uint32_t started = 0, done = 0;
    pthread_mutex_init(&queue.lock, NULL);
    pthread_cond_init(&queue.moved, NULL);
    for (; done < count && status == LOCI_OK; done++) {
        for (; started < count && started <= done + ahead; started++)
            start_pair(&pairs[started % (ahead + 1)], &queue, started, ahead > 0);
        status = finish_pair(&pairs[done % (ahead + 1)], err);
    }
    pthread_mutex_lock(&queue.lock);
    queue.stopped = true;
    pthread_mutex_unlock(&queue.lock);
    for (; done < started; done++) {
        await_pair(&pairs[done % (ahead + 1)]);
        loci_pair_job_free(pairs[done % (ahead + 1)].job);
    }
    pthread_cond_destroy(&queue.moved);
    pthread_mutex_destroy(&queue.lock);
    return status;
}
