/* SPDX-License-Identifier: Apache-2.0
 *
 * Pairs one after another, or overlapped: the rows of one are read and clustered on a thread of
 * their own while the blob of the one before is written. See index.h.
 */
#include <pthread.h>

#include "attention/index.h"

typedef struct begun {
    const loci_pair_work *work;
    struct loci_pool *pool;
    uint32_t pair;
    loci_pair_job *job;
    loci_status status;
    loci_error err;
} begun;

static void *begin_pair(void *arg) {
    begun *b = arg;
    loci_pair_rows rows;
    loci_pair_build_options options = {0};
    b->job = NULL;
    b->status = b->work->read(b->work->ctx, b->pair, &rows, &options, &b->err);
    if (b->status == LOCI_OK)
        b->status = loci_pair_begin(&rows, &options, b->pool, &b->job, &b->err);
    return NULL;
}

static loci_status finish_pair(begun *b, loci_error *err) {
    loci_buf blob = LOCI_BUF_INIT;
    uint64_t hash;
    if (b->status != LOCI_OK) {
        if (err) *err = b->err;
        return b->status;
    }
    loci_status status = loci_pair_finish(b->job, &blob, &hash, err);
    if (status == LOCI_OK)
        status = b->work->put(b->work->ctx, b->pair, loci_slice_of(blob.data, blob.len), hash, err);
    loci_buf_fini(&blob);
    return status;
}

bool loci_pairs_overlap(const loci_backend *backend) {
    return backend && backend->ops->cluster_keys;
}

loci_status loci_pairs_build(const loci_pair_work *work, uint32_t count, bool overlap,
                             struct loci_pool *pool, loci_error *err) {
    begun now = {work, pool, 0, NULL, LOCI_OK, {0}};
    if (count > 0) begin_pair(&now);
    for (uint32_t pair = 0; pair < count; pair++) {
        begun next = {work, pool, pair + 1, NULL, LOCI_OK, {0}};
        pthread_t thread;
        bool more = pair + 1 < count, beside = more && overlap && now.status == LOCI_OK;
        beside = beside && pthread_create(&thread, NULL, begin_pair, &next) == 0;
        loci_status status = finish_pair(&now, err);
        if (beside)
            pthread_join(thread, NULL);
        else if (more && status == LOCI_OK)
            begin_pair(&next);
        if (status != LOCI_OK) {
            loci_pair_job_free(next.job);
            return status;
        }
        now = next;
    }
    return LOCI_OK;
}
