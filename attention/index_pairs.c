/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs one after another, or overlapped: those ahead, each on a thread of its own, are read,
 * clustered and finished while a blob is put away. See index.h.
 */
#include <pthread.h>

#include "attention/index.h"

/* Clustering on a device has hundreds of steps that wait for one another: a short pair leaves it
 * idle most of the time, a long one does not. Of a long one there is one being clustered, one being
 * finished and one being put; of short ones two are finished at once, since between their loops
 * the pool has nothing to do. */
#define AHEAD_SHORT LOCI_PAIRS_AHEAD_MOST
#define AHEAD_LONG 2u
#define SHORT_TOKENS LOCI_EXTENT_SEAL_TOKENS
#define FINISHING_SHORT 2u
#define FINISHING_LONG 1u

/* Rows are read in the order of the pairs. */
typedef struct pair_queue {
    const loci_pair_work *work;
    struct loci_pool *pool;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint32_t turn;     /* the pair to be read next */
    uint32_t finished; /* how many need no finishing any more */
    bool stopped;      /* a pair has failed: nothing more is read */
} pair_queue;

typedef struct begun {
    pair_queue *queue;
    uint32_t pair;
    loci_buf blob;
    uint64_t hash;
    loci_status status;
    loci_error err;
    bool beside; /* on a thread of its own */
    pthread_t thread;
} begun;

static loci_status read_rows(begun *b, loci_pair_rows *rows, loci_pair_build_options *options) {
    pair_queue *queue = b->queue;
    pthread_mutex_lock(&queue->lock);
    while (queue->turn != b->pair) pthread_cond_wait(&queue->moved, &queue->lock);
    bool stopped = queue->stopped;
    pthread_mutex_unlock(&queue->lock);
    loci_status status = LOCI_E_CANCELLED;
    if (!stopped) status = queue->work->read(queue->work->ctx, b->pair, rows, options, &b->err);
    pthread_mutex_lock(&queue->lock);
    queue->turn++;
    queue->stopped = queue->stopped || status != LOCI_OK;
    pthread_cond_broadcast(&queue->moved);
    pthread_mutex_unlock(&queue->lock);
    return status;
}

/* Few pairs are finished at once, about in their order. */
static void await_finishing(const begun *b, uint32_t tokens) {
    pair_queue *queue = b->queue;
    uint32_t most = tokens <= SHORT_TOKENS ? FINISHING_SHORT : FINISHING_LONG;
    pthread_mutex_lock(&queue->lock);
    while (b->pair >= queue->finished + most) pthread_cond_wait(&queue->moved, &queue->lock);
    pthread_mutex_unlock(&queue->lock);
}

static void end_finishing(pair_queue *queue) {
    pthread_mutex_lock(&queue->lock);
    queue->finished++;
    pthread_cond_broadcast(&queue->moved);
    pthread_mutex_unlock(&queue->lock);
}

/* All of a pair but putting it away. */
static void *make_pair(void *arg) {
    begun *b = arg;
    loci_pair_rows rows;
    loci_pair_build_options options = {0};
    loci_pair_job *job = NULL;
    b->status = read_rows(b, &rows, &options);
    if (b->status == LOCI_OK)
        b->status = loci_pair_begin(&rows, &options, b->queue->pool, &job, &b->err);
    if (b->status == LOCI_OK) {
        await_finishing(b, rows.tokens);
        b->status = loci_pair_finish(job, &b->blob, &b->hash, &b->err);
    }
    end_finishing(b->queue);
    return NULL;
}

static void start_pair(begun *b, pair_queue *queue, uint32_t pair, bool beside) {
    *b = (begun){.queue = queue, .pair = pair, .blob = LOCI_BUF_INIT};
    b->beside = beside && pthread_create(&b->thread, NULL, make_pair, b) == 0;
    if (!b->beside) make_pair(b);
}

static void await_pair(begun *b) {
    if (b->beside) pthread_join(b->thread, NULL);
}

static loci_status put_pair(begun *b, loci_error *err) {
    const loci_pair_work *work = b->queue->work;
    await_pair(b);
    loci_status status = b->status;
    if (status == LOCI_OK)
        status =
            work->put(work->ctx, b->pair, loci_slice_of(b->blob.data, b->blob.len), b->hash, err);
    else if (err)
        *err = b->err;
    loci_buf_fini(&b->blob);
    return status;
}

uint32_t loci_pairs_ahead(const loci_backend *backend, uint32_t tokens) {
    if (!backend || !backend->ops->cluster_keys) return 0;
    return tokens <= SHORT_TOKENS ? AHEAD_SHORT : AHEAD_LONG;
}

loci_status loci_pairs_build(const loci_pair_work *work, uint32_t count, uint32_t ahead,
                             struct loci_pool *pool, loci_error *err) {
    LOCI_ASSERT(ahead <= LOCI_PAIRS_AHEAD_MOST);
    pair_queue queue = {.work = work, .pool = pool};
    begun pairs[LOCI_PAIRS_AHEAD_MOST + 1];
    loci_status status = LOCI_OK;
    uint32_t started = 0, done = 0;
    pthread_mutex_init(&queue.lock, NULL);
    pthread_cond_init(&queue.moved, NULL);
    for (; done < count && status == LOCI_OK; done++) {
        for (; started < count && started <= done + ahead; started++)
            start_pair(&pairs[started % (ahead + 1)], &queue, started, ahead > 0);
        status = put_pair(&pairs[done % (ahead + 1)], err);
    }
    pthread_mutex_lock(&queue.lock);
    queue.stopped = true;
    pthread_mutex_unlock(&queue.lock);
    for (; done < started; done++) {
        await_pair(&pairs[done % (ahead + 1)]);
        loci_buf_fini(&pairs[done % (ahead + 1)].blob);
    }
    pthread_cond_destroy(&queue.moved);
    pthread_mutex_destroy(&queue.lock);
    return status;
}
