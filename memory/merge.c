/* SPDX-License-Identifier: Apache-2.0
 *
 * The merger's thread: which corpus is merged, and when; see merge.h. What is to be merged says
 * due.c, the work itself is in rebuild.c.
 *
 * A merge is optimistic: it reads extents that cannot change, and its commit finds them where they
 * stand by then or gives up. Until then it holds no lock, and its threads run at a lower priority
 * and in a pool of their own, so that neither registration nor questions wait for it.
 */
#include "memory/merge.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/pool.h"

#define MS 1000000ull
#define RETRY_FIRST_NS (200 * MS)
#define RETRY_MOST_NS (30000 * MS)
#define POLL_MOST_MS 1000u
#define NICENESS 10
#define DISK_LEFT_BYTES (64ull << 20)

/* What is known of one corpus; guarded by merger->lock. */
typedef struct merge_slot {
    uint64_t uid, revision, sequence;
    uint64_t changed_ns; /* when one of these did, but for merges */
    loci_backoff backoff;
    loci_backoff damage; /* of what stands apart (corpus->apart), until it can be read */
    bool seen;           /* in the present pass over the corpora */
} merge_slot;

struct loci_merger {
    loci_store *store;
    unsigned threads;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop;
    uint64_t merging;   /* uid of the corpus; 0 = none */
    loci_cancel cancel; /* of that merge */
    merge_slot *slots;
    size_t slot_count;
};

/* --- Failures --------------------------------------------------------------------------- */

void loci_backoff_clear(loci_backoff *backoff) {
    memset(backoff, 0, sizeof *backoff);
}

bool loci_backoff_add(loci_backoff *backoff, loci_status status, const loci_error *err) {
    uint64_t pause = RETRY_FIRST_NS << (backoff->failures < 8 ? backoff->failures : 8);
    if (pause > RETRY_MOST_NS) pause = RETRY_MOST_NS;
    backoff->retry_ns = loci_now_ns() + pause;
    backoff->failures++;
    bool news = strcmp(backoff->failure.text, err->text) != 0;
    backoff->failure = *err;
    backoff->failure.status = status;
    return news;
}

/* --- Slots ------------------------------------------------------------------------------ */

static merge_slot *find_slot(loci_merger *merger, uint64_t uid) {
    for (size_t i = 0; i < merger->slot_count; i++)
        if (merger->slots[i].uid == uid) return &merger->slots[i];
    return NULL;
}

/* Caller holds the lock. NULL when there is no memory. */
static merge_slot *slot_of(loci_merger *merger, uint64_t uid) {
    merge_slot *slot = find_slot(merger, uid);
    if (slot) return slot;
    merge_slot *grown = realloc(merger->slots, (merger->slot_count + 1) * sizeof *grown);
    if (!grown) return NULL;
    merger->slots = grown;
    slot = &grown[merger->slot_count++];
    *slot = (merge_slot){.uid = uid};
    return slot;
}

/* Caller holds the lock. Drops slots of corpora that are gone. */
static void end_pass(loci_merger *merger) {
    size_t kept = 0;
    for (size_t i = 0; i < merger->slot_count; i++) {
        if (!merger->slots[i].seen) continue;
        merger->slots[i].seen = false;
        merger->slots[kept++] = merger->slots[i];
    }
    merger->slot_count = kept;
}

/* Whether the corpus has been as it is for long enough; *wait: not to be tried now. */
static bool look_at(loci_merger *merger, uint64_t uid, uint64_t revision, uint64_t sequence,
                    bool *wait) {
    uint64_t now = loci_now_ns();
    bool calm = false;
    *wait = true;
    pthread_mutex_lock(&merger->lock);
    merge_slot *slot = slot_of(merger, uid);
    if (slot) {
        if (slot->revision != revision || slot->sequence != sequence) slot->changed_ns = now;
        slot->revision = revision;
        slot->sequence = sequence;
        slot->seen = true;
        calm = now - slot->changed_ns >= merger->store->options.merge_calm_ms * MS;
        *wait = now < slot->backoff.retry_ns;
    }
    pthread_mutex_unlock(&merger->lock);
    return calm;
}

static bool stopping(loci_merger *merger) {
    pthread_mutex_lock(&merger->lock);
    bool stop = merger->stop;
    pthread_mutex_unlock(&merger->lock);
    return stop;
}

/* --- A corpus's turn -------------------------------------------------------------------- */

uint32_t loci_corpus_merge_tokens(const loci_corpus *corpus) {
    const loci_store_options *options = &corpus->store->options;
    if (options->fingerprint && strcmp(options->fingerprint, corpus->geometry.fingerprint) != 0)
        return 0;
    return options->merge_tokens;
}

/* *base: with a reference, when something is due. */
static bool is_due(loci_merger *merger, loci_corpus *corpus, loci_rebuild_plan *plan,
                   loci_manifest **base) {
    bool wait;
    pthread_mutex_lock(&corpus->lock);
    bool calm =
        look_at(merger, corpus->uid, corpus->manifest->revision, corpus->last_sequence, &wait);
    /* What the ingest thread is about to change would change the plan; but it may never come to
     * that. */
    calm = calm && (corpus->stuck || (corpus->pending_first == corpus->pending_end &&
                                      !loci_rebuild_due(corpus->manifest, corpus->extent_tokens_max,
                                                        LOCI_TAIL_KEEP, plan)));
    bool due = !wait && !corpus->deleted && !corpus->successor &&
               loci_merge_due(corpus->manifest, corpus->extent_tokens_max,
                              loci_corpus_merge_tokens(corpus), calm, &corpus->apart, plan);
    if (due) *base = loci_manifest_ref(corpus->manifest);
    pthread_mutex_unlock(&corpus->lock);
    return due;
}

/* A merge that fills the disk would stop registration, too. */
static loci_status check_disk(const loci_corpus *corpus, const loci_manifest *base,
                              const loci_rebuild_plan *plan, loci_error *err) {
    struct statvfs disk;
    uint64_t need = DISK_LEFT_BYTES;
    for (uint32_t i = plan->first; i < plan->last; i++) need += base->extents[i].file_bytes;
    if (statvfs(corpus->store->dir, &disk) != 0) return LOCI_OK; /* writing will tell */
    uint64_t left = (uint64_t)disk.f_bavail * disk.f_frsize;
    if (left >= need) return LOCI_OK;
    /* What is left changes all the time: it would be another failure, and logged, each time. */
    return loci_fail(err, LOCI_E_LIMIT,
                     "merging extents of corpus %s needs %llu MiB of disk, and fewer are left",
                     corpus->name, (unsigned long long)(need >> 20));
}

/* False when there is to be none: the process or the corpus ends. */
static bool begin(loci_merger *merger, loci_corpus *corpus) {
    pthread_mutex_lock(&merger->lock);
    bool go = !merger->stop;
    if (go) {
        loci_cancel_init(&merger->cancel, 0);
        merger->merging = corpus->uid;
    }
    pthread_mutex_unlock(&merger->lock);
    if (!go) return false;
    pthread_mutex_lock(&corpus->lock);
    corpus->merging = &merger->cancel;
    if (corpus->deleted) loci_cancel_request(&merger->cancel);
    pthread_mutex_unlock(&corpus->lock);
    return true;
}

static void end(loci_merger *merger, loci_corpus *corpus, uint64_t made, size_t apart,
                loci_status status, const loci_error *err) {
    pthread_mutex_lock(&corpus->lock);
    corpus->merging = NULL;
    if (corpus->deleted) status = LOCI_E_CANCELLED; /* whatever came of that */
    bool around = corpus->apart.count > apart;      /* the next one goes */
    pthread_mutex_unlock(&corpus->lock);
    pthread_mutex_lock(&merger->lock);
    merger->merging = 0;
    merge_slot *slot = slot_of(merger, corpus->uid);
    if (slot && status == LOCI_OK) {
        loci_backoff_clear(&slot->backoff);
        if (slot->revision + 1 == made) slot->revision = made; /* no change to wait after */
    } else if (slot && status != LOCI_E_ABORTED && status != LOCI_E_CANCELLED &&
               loci_backoff_add(around ? &slot->damage : &slot->backoff, status, err)) {
        loci_log_error("extents of corpus %s are not merged: %s", corpus->name, err->text);
    }
    pthread_mutex_unlock(&merger->lock);
}

/* --- What stands apart ------------------------------------------------------------------ */

static loci_status read_whole(loci_merger *merger, loci_corpus *corpus,
                              const loci_manifest_extent *entry, loci_error *err) {
    loci_extent *extent = NULL;
    size_t values = (size_t)entry->tokens * corpus->geometry.head_dim;
    uint16_t *k = malloc(values * sizeof *k), *v = malloc(values * sizeof *v);
    loci_status status = LOCI_OK;
    if (!k || !v) status = loci_fail(err, LOCI_E_NOMEM, "no memory to read an extent");
    if (status == LOCI_OK) status = loci_corpus_extent(corpus, entry, &extent, err);
    for (uint32_t p = 0; status == LOCI_OK && p < extent->pairs; p++) {
        status = stopping(merger) ? loci_fail(err, LOCI_E_CANCELLED, "the process ends")
                                  : loci_extent_read_pair(extent, p, NULL, k, v, err);
    }
    loci_extent_unref(extent);
    free(k);
    free(v);
    return status;
}

/* Looks again, after a pause, at the extents that could not be read. Nobody but the merger changes
 * the list. */
static void look_again(loci_merger *merger, loci_corpus *corpus) {
    loci_error err = {0};
    loci_status status = LOCI_OK;
    pthread_mutex_lock(&merger->lock);
    merge_slot *slot = find_slot(merger, corpus->uid);
    uint64_t begun = loci_now_ns();
    bool due = slot && corpus->apart.count > 0 && begun >= slot->damage.retry_ns;
    pthread_mutex_unlock(&merger->lock);
    if (!due) return;
    loci_manifest *manifest = loci_corpus_manifest(corpus);
    for (uint32_t i = 0; status == LOCI_OK && i < manifest->extent_count; i++)
        if (loci_id_listed(&corpus->apart, manifest->extents[i].id))
            status = read_whole(merger, corpus, &manifest->extents[i], &err);
    loci_manifest_unref(manifest);
    if (status == LOCI_OK) { /* or they are gone */
        pthread_mutex_lock(&corpus->lock);
        corpus->apart.count = 0;
        pthread_mutex_unlock(&corpus->lock);
    }
    pthread_mutex_lock(&merger->lock);
    slot = find_slot(merger, corpus->uid);
    if (slot && status == LOCI_OK) loci_backoff_clear(&slot->damage);
    if (slot && status != LOCI_OK && status != LOCI_E_CANCELLED) {
        (void)loci_backoff_add(&slot->damage, status, &err);
        /* Reading a large extent takes a twentieth of the time at most. */
        slot->damage.retry_ns += 20 * (loci_now_ns() - begun);
    }
    pthread_mutex_unlock(&merger->lock);
}

/* True when it was tried. */
static bool take_turn(loci_merger *merger, loci_corpus *corpus) {
    loci_rebuild_plan plan;
    loci_manifest *base = NULL;
    loci_pool *pool = NULL; /* NULL when there is no memory: it takes longer */
    loci_error err = {0};
    look_again(merger, corpus);
    if (!is_due(merger, corpus, &plan, &base)) return false;
    if (!begin(merger, corpus)) {
        loci_manifest_unref(base);
        return false;
    }
    if (merger->threads > 1 && loci_pool_create(merger->threads, &pool, &err) != LOCI_OK)
        pool = NULL;
    size_t apart = corpus->apart.count;
    loci_status status = check_disk(corpus, base, &plan, &err);
    if (status == LOCI_OK)
        status = loci_rebuild(corpus, base, &plan, NULL, false, pool, &merger->cancel, &err);
    loci_pool_destroy(pool);
    loci_manifest_unref(base);
    base = loci_corpus_manifest(corpus);
    uint64_t made = base->revision;
    loci_manifest_unref(base);
    end(merger, corpus, made, apart, status, &err);
    return true;
}

/* --- The thread ------------------------------------------------------------------------- */

static void pause_between(loci_merger *merger) {
    unsigned ms = merger->store->options.merge_calm_ms / 2 + 5;
    if (ms > POLL_MOST_MS) ms = POLL_MOST_MS;
    struct timespec until = loci_moment_in(CLOCK_MONOTONIC, ms);
    if (!merger->stop) pthread_cond_timedwait(&merger->wake, &merger->lock, &until);
}

static void *thread_main(void *arg) {
    loci_merger *merger = arg;
    setpriority(PRIO_PROCESS, 0, NICENESS); /* of this thread and those that it starts */
    while (!stopping(merger)) {
        bool worked = false;
        uint64_t after = 0;
        for (loci_corpus *corpus;
             !stopping(merger) && (corpus = loci_corpus_next(merger->store, after));) {
            after = corpus->uid;
            worked = take_turn(merger, corpus) || worked;
            loci_corpus_release(corpus);
        }
        pthread_mutex_lock(&merger->lock);
        if (!merger->stop) end_pass(merger);
        if (!worked) pause_between(merger);
        pthread_mutex_unlock(&merger->lock);
    }
    return NULL;
}

loci_status loci_merger_start(loci_store *store, unsigned threads, loci_merger **out,
                              loci_error *err) {
    loci_merger *merger = calloc(1, sizeof *merger);
    if (!merger) return loci_fail(err, LOCI_E_NOMEM, "no memory for the merger");
    merger->store = store;
    merger->threads = threads;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&merger->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&merger->lock, NULL);
    loci_cancel_init(&merger->cancel, 0);
    int error = pthread_create(&merger->thread, NULL, thread_main, merger);
    if (error == 0) {
        *out = merger;
        return LOCI_OK;
    }
    pthread_cond_destroy(&merger->wake);
    pthread_mutex_destroy(&merger->lock);
    free(merger);
    return loci_fail(err, LOCI_E_NOMEM, "cannot start the merger: %s", strerror(error));
}

void loci_merger_stop(loci_merger *merger) {
    if (!merger) return;
    pthread_mutex_lock(&merger->lock);
    merger->stop = true;
    loci_cancel_request(&merger->cancel);
    pthread_cond_signal(&merger->wake);
    pthread_mutex_unlock(&merger->lock);
    pthread_join(merger->thread, NULL);
    pthread_cond_destroy(&merger->wake);
    pthread_mutex_destroy(&merger->lock);
    free(merger->slots);
    free(merger);
}

void loci_merger_state(loci_merger *merger, uint64_t uid, bool *merging, loci_error *failure) {
    pthread_mutex_lock(&merger->lock);
    const merge_slot *slot = find_slot(merger, uid);
    *merging = merger->merging == uid;
    memset(failure, 0, sizeof *failure);
    if (slot) *failure = slot->backoff.failures ? slot->backoff.failure : slot->damage.failure;
    pthread_mutex_unlock(&merger->lock);
}
