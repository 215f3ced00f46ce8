/* SPDX-License-Identifier: Apache-2.0
 *
 * The registration thread: which corpus is worked on, when what is encoded becomes searchable,
 * retries, and progress. The work itself is in pipeline.c and rebuild.c. See ingest.h.
 *
 * One corpus is worked on at a time. Its turn ends when nothing is pending, when it fails, at the
 * next batch when documents arrived in another corpus since that had its last turn, or after
 * TURN_NS while another one waits; whatever it encoded is committed then. So a small document does
 * not wait for a long queue elsewhere, and two long queues do not interrupt each other all the
 * time.
 */
#include "memory/ingest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/pool.h"
#include "memory/merge.h"
#include "memory/pipeline.h"

#define MS 1000000ull
#define TURN_NS (5000 * MS)
#define FLUSH_BUSY_NS \
    (60000 * MS) /* a long queue: flat segments would be written only to be sealed */
#define FLUSH_CALM_NS (500 * MS) /* a short queue: searchable within a second */
#define CALM_DOCUMENTS 64u
#define SETTLE_NS (3000 * MS) /* without a change, before the tail is put in order unasked */
#define POLL_CALM_MS 1000u
#define POLL_BUSY_MS 50u

/* What is known of one corpus; guarded by ingest->lock. */
typedef struct corpus_slot {
    uint64_t uid;
    loci_ingest_progress progress; /* counters and stage; the rest is filled on demand */
    bool settle;                   /* asked for */
    uint64_t changed_ns;           /* last time when there was work, or the revision changed */
    uint64_t revision;
    uint64_t known_sequence; /* last one of the corpus when its last turn began */
    loci_backoff backoff;
    bool seen; /* in the present pass over the corpora */
} corpus_slot;

struct loci_ingest {
    loci_store *store;
    loci_encoder encoder;
    struct loci_pool *pool;
    loci_merger *merger;
    pthread_t thread;
    loci_cancel cancel;
    pthread_mutex_t lock;
    pthread_cond_t wake;    /* for the thread */
    pthread_cond_t changed; /* for those who wait for progress */
    bool stop, woken;
    corpus_slot *slots;
    size_t slot_count;
};

/* --- Slots ------------------------------------------------------------------------------ */

/* Caller holds the lock. NULL when there is no memory. */
static corpus_slot *slot_of(loci_ingest *ingest, uint64_t uid) {
    for (size_t i = 0; i < ingest->slot_count; i++)
        if (ingest->slots[i].uid == uid) return &ingest->slots[i];
    corpus_slot *grown = realloc(ingest->slots, (ingest->slot_count + 1) * sizeof *grown);
    if (!grown) return NULL;
    ingest->slots = grown;
    corpus_slot *slot = &grown[ingest->slot_count++];
    memset(slot, 0, sizeof *slot);
    slot->uid = uid;
    slot->progress.stage = "idle";
    slot->changed_ns = loci_now_ns();
    slot->seen = true;
    return slot;
}

static void set_stage(loci_ingest *ingest, uint64_t uid, const char *stage) {
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, uid);
    if (slot) {
        slot->progress.stage = stage;
        slot->changed_ns = loci_now_ns();
    }
    pthread_cond_broadcast(&ingest->changed);
    pthread_mutex_unlock(&ingest->lock);
}

static void add_counts(loci_ingest *ingest, uint64_t uid, const loci_pipeline_counts *before,
                       const loci_pipeline_counts *now, uint64_t elapsed_ns) {
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, uid);
    if (slot) {
        uint64_t encoded = now->tokens_encoded - before->tokens_encoded;
        slot->progress.tokens_encoded += encoded;
        slot->progress.tokens_indexed += now->tokens_indexed - before->tokens_indexed;
        slot->progress.segments_indexed += now->segments_indexed - before->segments_indexed;
        if (encoded > 0 && elapsed_ns > 0) {
            double rate = (double)encoded * 1e9 / (double)elapsed_ns;
            double old = slot->progress.tokens_per_s;
            slot->progress.tokens_per_s = old > 0 ? 0.7 * old + 0.3 * rate : rate;
        }
    }
    pthread_cond_broadcast(&ingest->changed);
    pthread_mutex_unlock(&ingest->lock);
}

/* Records the outcome of a turn; a failure is tried again with growing pauses. */
static void set_outcome(loci_ingest *ingest, loci_corpus *corpus, loci_status status,
                        const loci_error *err) {
    pthread_mutex_lock(&corpus->lock);
    corpus->stuck = status != LOCI_OK;
    pthread_mutex_unlock(&corpus->lock);
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, corpus->uid);
    if (slot && status == LOCI_OK) {
        loci_backoff_clear(&slot->backoff);
    } else if (slot && loci_backoff_add(&slot->backoff, status, err)) {
        loci_log_error("indexing of corpus %s stands still: %s", corpus->name, err->text);
    }
    if (slot) slot->progress.stage = "idle";
    pthread_cond_broadcast(&ingest->changed);
    pthread_mutex_unlock(&ingest->lock);
}

static void set_settle(loci_ingest *ingest, const loci_corpus *corpus, bool value) {
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, corpus->uid);
    bool news = value && slot && !slot->settle;
    if (slot) slot->settle = value;
    if (news) {
        ingest->woken = true;
        pthread_cond_signal(&ingest->wake);
    }
    pthread_mutex_unlock(&ingest->lock);
}

static bool stopping(loci_ingest *ingest) {
    pthread_mutex_lock(&ingest->lock);
    bool stop = ingest->stop;
    pthread_mutex_unlock(&ingest->lock);
    return stop;
}

static uint64_t pending_of(loci_corpus *corpus) {
    pthread_mutex_lock(&corpus->lock);
    uint64_t count = corpus->deleted ? 0 : corpus->pending_end - corpus->pending_first;
    pthread_mutex_unlock(&corpus->lock);
    return count;
}

/* --- A corpus's turn -------------------------------------------------------------------- */

/* Documents are pending in the corpus; fresh: and some of them came since its last turn began. */
static bool waits(loci_ingest *ingest, loci_corpus *corpus, bool fresh) {
    pthread_mutex_lock(&corpus->lock);
    uint64_t last = corpus->last_sequence;
    bool wait = !corpus->deleted && corpus->pending_first < corpus->pending_end;
    pthread_mutex_unlock(&corpus->lock);
    if (!wait || !fresh) return wait;
    pthread_mutex_lock(&ingest->lock);
    const corpus_slot *slot = slot_of(ingest, corpus->uid);
    wait = slot && slot->known_sequence < last;
    pthread_mutex_unlock(&ingest->lock);
    return wait;
}

static bool others_wait(loci_ingest *ingest, const loci_corpus *mine, bool fresh) {
    bool wait = false;
    uint64_t after = 0;
    for (loci_corpus *corpus; !wait && (corpus = loci_corpus_next(ingest->store, after));) {
        after = corpus->uid;
        wait = corpus != mine && waits(ingest, corpus, fresh);
        loci_corpus_release(corpus);
    }
    return wait;
}

static loci_status one_batch(loci_ingest *ingest, loci_corpus *corpus, loci_pipeline *pipeline,
                             bool *more, loci_error *err) {
    uint64_t begin = loci_now_ns();
    loci_pipeline_counts before = loci_pipeline_count(pipeline);
    set_stage(ingest, corpus->uid, "encoding");
    loci_status status = loci_pipeline_gather(pipeline, more, err);
    if (status == LOCI_OK && *more) status = loci_pipeline_encode(pipeline, err);
    if (status == LOCI_OK && *more) {
        if (loci_pipeline_will_seal(pipeline)) set_stage(ingest, corpus->uid, "indexing");
        status = loci_pipeline_append(pipeline, err);
    }
    loci_pipeline_counts now = loci_pipeline_count(pipeline);
    add_counts(ingest, corpus->uid, &before, &now, loci_now_ns() - begin);
    return status;
}

static loci_status flush(loci_ingest *ingest, loci_corpus *corpus, loci_pipeline *pipeline,
                         loci_error *err) {
    loci_pipeline_counts before = loci_pipeline_count(pipeline);
    if (loci_pipeline_sealing(pipeline)) set_stage(ingest, corpus->uid, "indexing");
    loci_status status = loci_pipeline_flush(pipeline, err);
    loci_pipeline_counts now = loci_pipeline_count(pipeline);
    add_counts(ingest, corpus->uid, &before, &now, 0);
    return status;
}

bool loci_flush_due(uint64_t pending, size_t complete, uint64_t elapsed_ns) {
    if (elapsed_ns >= FLUSH_BUSY_NS) return true;
    return complete > 0 && pending < CALM_DOCUMENTS && elapsed_ns >= FLUSH_CALM_NS;
}

static loci_status index_documents(loci_ingest *ingest, loci_corpus *corpus,
                                   loci_pipeline *pipeline, loci_error *err) {
    uint64_t turn = loci_now_ns(), flushed = turn;
    for (bool more = true; more && !stopping(ingest);) {
        loci_error first;
        loci_status status = one_batch(ingest, corpus, pipeline, &more, &first);
        if (status != LOCI_OK) {
            /* What was encoded before is sound: keep it, then report the first failure. */
            loci_error second;
            if (flush(ingest, corpus, pipeline, &second) != LOCI_OK)
                loci_log_warn(
                    "corpus %s: what was encoded and not committed will be encoded again: %s",
                    corpus->name, second.text);
            if (err) *err = first;
            return status;
        }
        if (!more) break;
        uint64_t pending = pending_of(corpus), now = loci_now_ns();
        if (!loci_pipeline_dirty(pipeline)) flushed = now;
        /* What comes after an extent that is being sealed cannot be committed before it. */
        if (corpus->geometry.causal ||
            (!loci_pipeline_sealing(pipeline) &&
             loci_flush_due(pending, loci_pipeline_documents(pipeline), now - flushed))) {
            LOCI_TRY(flush(ingest, corpus, pipeline, err));
            flushed = now;
        }
        if (others_wait(ingest, corpus, now - turn < TURN_NS)) break;
    }
    return flush(ingest, corpus, pipeline, err);
}

/* *base: with a reference, when something is due. */
static bool tidy_due(loci_corpus *corpus, loci_tail_demand demand, loci_rebuild_plan *plan,
                     loci_manifest **base) {
    pthread_mutex_lock(&corpus->lock);
    bool due = !corpus->deleted &&
               loci_rebuild_due(corpus->manifest, corpus->extent_tokens_max, demand, plan);
    if (due) *base = loci_manifest_ref(corpus->manifest);
    pthread_mutex_unlock(&corpus->lock);
    return due;
}

/* Rewrites and the tail. Gives up the reference to base. */
static loci_status tidy(loci_ingest *ingest, loci_corpus *corpus, loci_manifest *base,
                        const loci_rebuild_plan *plan, loci_error *err) {
    set_stage(ingest, corpus->uid, "indexing");
    loci_status status =
        loci_rebuild(corpus, base, plan, NULL, false, ingest->pool, &ingest->cancel, err);
    loci_manifest_unref(base);
    return status == LOCI_E_ABORTED ? LOCI_OK : status;
}

static loci_status index_pending(loci_ingest *ingest, loci_corpus *corpus, loci_error *err) {
    loci_pipeline *pipeline = NULL;
    LOCI_TRY(loci_pipeline_open(corpus, &ingest->encoder, ingest->pool, &ingest->cancel, &pipeline,
                                err));
    loci_status status = index_documents(ingest, corpus, pipeline, err);
    loci_pipeline_close(pipeline);
    return status;
}

/* Failures that are none: the corpus went, or the process is stopping. */
static loci_status forgive(loci_ingest *ingest, loci_corpus *corpus, loci_status status) {
    pthread_mutex_lock(&corpus->lock);
    bool deleted = corpus->deleted;
    pthread_mutex_unlock(&corpus->lock);
    return deleted || stopping(ingest) ? LOCI_OK : status;
}

/* What a corpus's turn begins with. */
typedef struct turn_state {
    loci_tail_demand demand;
    bool pause;     /* before the next attempt */
    bool failed;    /* the last attempt */
    bool successor; /* to take another corpus's place when it is at rest */
} turn_state;

static turn_state begin_turn(loci_ingest *ingest, loci_corpus *corpus) {
    uint64_t now = loci_now_ns();
    pthread_mutex_lock(&corpus->lock);
    uint64_t revision = corpus->manifest->revision, last = corpus->last_sequence;
    bool successor = corpus->stage == LOCI_CORPUS_INDEXING;
    pthread_mutex_unlock(&corpus->lock);
    turn_state state = {.demand = LOCI_TAIL_KEEP, .pause = true, .successor = successor};
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, corpus->uid);
    if (slot) {
        slot->seen = true;
        if (slot->revision != revision) slot->changed_ns = now;
        slot->revision = revision;
        slot->known_sequence = last;
        state.pause = now < slot->backoff.retry_ns;
        state.failed = slot->backoff.failures > 0;
        if (slot->settle || successor)
            state.demand = LOCI_TAIL_ANY;
        else if (now - slot->changed_ns >= SETTLE_NS)
            state.demand = LOCI_TAIL_LARGE;
    }
    pthread_mutex_unlock(&ingest->lock);
    return state;
}

/* True when it was done. */
static bool take_place(loci_ingest *ingest, loci_corpus *corpus, bool pause) {
    loci_error err = {0};
    if (pause) return false;
    loci_status status = loci_reindex_finish(corpus, &err);
    set_outcome(ingest, corpus, forgive(ingest, corpus, status), &err);
    return status == LOCI_OK;
}

/* True when something was done. */
static bool take_turn(loci_ingest *ingest, loci_corpus *corpus) {
    loci_error err = {0};
    turn_state state = begin_turn(ingest, corpus);
    bool pending = pending_of(corpus) > 0;
    loci_rebuild_plan plan;
    loci_manifest *base = NULL;
    if (!pending && !tidy_due(corpus, state.demand, &plan, &base)) {
        if (state.successor) return take_place(ingest, corpus, state.pause);
        /* At rest: whatever failed or was asked for is no more. */
        if (state.demand == LOCI_TAIL_ANY) set_settle(ingest, corpus, false);
        if (state.failed) set_outcome(ingest, corpus, LOCI_OK, &err);
        return false;
    }
    if (state.pause) {
        loci_manifest_unref(base);
        return false;
    }
    loci_status status =
        pending ? index_pending(ingest, corpus, &err) : tidy(ingest, corpus, base, &plan, &err);
    /* Carried out once: who still waits asks again (loci_ingest_settled). */
    if (!pending && status == LOCI_OK && state.demand == LOCI_TAIL_ANY)
        set_settle(ingest, corpus, false);
    set_outcome(ingest, corpus, forgive(ingest, corpus, status), &err);
    return status == LOCI_OK;
}

/* --- The thread ------------------------------------------------------------------------- */

/* Caller holds the lock. Drops slots of corpora that are gone; true when some corpus is asked to
 * settle or is to be retried, so that the pause should be short. */
static bool end_pass(loci_ingest *ingest) {
    bool busy = false;
    size_t kept = 0;
    for (size_t i = 0; i < ingest->slot_count; i++) {
        corpus_slot *slot = &ingest->slots[i];
        if (!slot->seen) continue;
        slot->seen = false;
        busy = busy || slot->settle || slot->backoff.failures > 0;
        ingest->slots[kept++] = *slot;
    }
    ingest->slot_count = kept;
    return busy;
}

static void *thread_main(void *arg) {
    loci_ingest *ingest = arg;
    while (!stopping(ingest)) {
        bool worked = false;
        uint64_t after = 0;
        for (loci_corpus *corpus;
             !stopping(ingest) && (corpus = loci_corpus_next(ingest->store, after));) {
            after = corpus->uid;
            worked = take_turn(ingest, corpus) || worked;
            loci_corpus_release(corpus);
        }
        pthread_mutex_lock(&ingest->lock);
        bool busy = !ingest->stop && end_pass(ingest);
        if (!worked && !ingest->woken && !ingest->stop) {
            struct timespec deadline =
                loci_moment_in(CLOCK_MONOTONIC, busy ? POLL_BUSY_MS : POLL_CALM_MS);
            pthread_cond_timedwait(&ingest->wake, &ingest->lock, &deadline);
        }
        ingest->woken = false;
        pthread_mutex_unlock(&ingest->lock);
    }
    return NULL;
}

static void ingest_free(loci_ingest *ingest) {
    pthread_cond_destroy(&ingest->wake);
    pthread_cond_destroy(&ingest->changed);
    pthread_mutex_destroy(&ingest->lock);
    free(ingest->slots);
    free(ingest);
}

loci_status loci_ingest_start(loci_store *store, const loci_encoder *encoder,
                              struct loci_pool *pool, loci_ingest **out, loci_error *err) {
    loci_ingest *ingest = calloc(1, sizeof *ingest);
    if (!ingest) return loci_fail(err, LOCI_E_NOMEM, "no memory for the registration thread");
    ingest->store = store;
    ingest->encoder = *encoder;
    ingest->pool = pool;
    loci_cancel_init(&ingest->cancel, 0);
    pthread_mutex_init(&ingest->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&ingest->wake, &monotonic);
    pthread_cond_init(&ingest->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    loci_status status =
        loci_merger_start(store, pool ? loci_pool_threads(pool) : 1, &ingest->merger, err);
    int error = 0;
    if (status == LOCI_OK) error = pthread_create(&ingest->thread, NULL, thread_main, ingest);
    if (status == LOCI_OK && error == 0) {
        *out = ingest;
        return LOCI_OK;
    }
    if (error != 0)
        status = loci_fail(err, LOCI_E_NOMEM, "cannot start the registration thread: %s",
                           strerror(error));
    loci_merger_stop(ingest->merger);
    ingest_free(ingest);
    return status;
}

void loci_ingest_stop(loci_ingest *ingest) {
    if (!ingest) return;
    pthread_mutex_lock(&ingest->lock);
    ingest->stop = true;
    loci_cancel_request(&ingest->cancel);
    pthread_cond_broadcast(&ingest->wake);
    pthread_mutex_unlock(&ingest->lock);
    loci_merger_stop(ingest->merger);
    pthread_join(ingest->thread, NULL);
    ingest_free(ingest);
}

void loci_ingest_wake(loci_ingest *ingest) {
    pthread_mutex_lock(&ingest->lock);
    ingest->woken = true;
    pthread_cond_signal(&ingest->wake);
    pthread_cond_broadcast(&ingest->changed);
    pthread_mutex_unlock(&ingest->lock);
}

/* --- Progress --------------------------------------------------------------------------- */

static void fill_progress(loci_ingest *ingest, loci_corpus *corpus, loci_ingest_progress *out) {
    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&ingest->lock);
    corpus_slot *slot = slot_of(ingest, corpus->uid);
    out->stage = "idle";
    if (slot) {
        *out = slot->progress;
        out->failure = slot->backoff.failure;
    }
    pthread_mutex_unlock(&ingest->lock);
    bool merging;
    loci_merger_state(ingest->merger, corpus->uid, &merging, &out->merge_failure);
    if (merging && strcmp(out->stage, "idle") == 0) out->stage = "merging";
    pthread_mutex_lock(&corpus->lock);
    out->stored_sequence = out->searchable_sequence = corpus->last_sequence;
    if (corpus->pending_first < corpus->pending_end)
        out->searchable_sequence = corpus->pending[corpus->pending_first] - 1;
    out->revision = corpus->manifest->revision;
    pthread_mutex_unlock(&corpus->lock);
}

loci_status loci_ingest_progress_of(loci_ingest *ingest, const char *name,
                                    loci_ingest_progress *out, loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(ingest->store, name, &corpus, err));
    fill_progress(ingest, corpus, out);
    loci_corpus_release(corpus);
    return LOCI_OK;
}

loci_status loci_ingest_reindex_progress(loci_ingest *ingest, const char *name,
                                         loci_ingest_progress *out, loci_error *err) {
    loci_corpus *successor = NULL;
    LOCI_TRY(loci_corpus_successor(ingest->store, name, &successor, err));
    memset(out, 0, sizeof *out);
    out->stage = "idle";
    if (successor) fill_progress(ingest, successor, out);
    loci_corpus_release(successor);
    return LOCI_OK;
}

static bool same_progress(const loci_ingest_progress *a, const loci_ingest_progress *b) {
    return a->stored_sequence == b->stored_sequence &&
           a->searchable_sequence == b->searchable_sequence &&
           a->tokens_encoded == b->tokens_encoded && a->tokens_indexed == b->tokens_indexed &&
           a->revision == b->revision && a->stage == b->stage &&
           a->failure.status == b->failure.status &&
           strcmp(a->failure.text, b->failure.text) == 0 &&
           a->merge_failure.status == b->merge_failure.status;
}

loci_status loci_ingest_wait(loci_ingest *ingest, const char *corpus, unsigned timeout_ms,
                             loci_ingest_progress *in_out, loci_error *err) {
    uint64_t end = loci_now_ns() + timeout_ms * MS;
    for (;;) {
        loci_ingest_progress now;
        LOCI_TRY(loci_ingest_progress_of(ingest, corpus, &now, err));
        uint64_t at = loci_now_ns();
        if (!same_progress(&now, in_out) || at >= end) {
            *in_out = now;
            return LOCI_OK;
        }
        /* Deletions do not signal: look again after a moment in any case. */
        uint64_t left_ms = (end - at + MS - 1) / MS;
        struct timespec deadline =
            loci_moment_in(CLOCK_MONOTONIC, left_ms < 100 ? (unsigned)left_ms : 100);
        pthread_mutex_lock(&ingest->lock);
        pthread_cond_timedwait(&ingest->changed, &ingest->lock, &deadline);
        pthread_mutex_unlock(&ingest->lock);
    }
}

/* Nothing pending and nothing to put in order. */
static bool settled(loci_corpus *corpus) {
    loci_rebuild_plan plan;
    pthread_mutex_lock(&corpus->lock);
    bool done =
        corpus->pending_first == corpus->pending_end &&
        !loci_rebuild_due(corpus->manifest, corpus->extent_tokens_max, LOCI_TAIL_ANY, &plan);
    pthread_mutex_unlock(&corpus->lock);
    return done;
}

void loci_ingest_settle(loci_ingest *ingest, const char *name) {
    loci_corpus *corpus = NULL;
    if (loci_corpus_acquire(ingest->store, name, &corpus, NULL) != LOCI_OK) return;
    set_settle(ingest, corpus, true);
    loci_corpus_release(corpus);
}

bool loci_ingest_settled(loci_ingest *ingest, const char *name) {
    loci_corpus *corpus = NULL;
    if (loci_corpus_acquire(ingest->store, name, &corpus, NULL) != LOCI_OK) return true;
    bool done = settled(corpus);
    set_settle(ingest, corpus, !done);
    loci_corpus_release(corpus);
    return done;
}
