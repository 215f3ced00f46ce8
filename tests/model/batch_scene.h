/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences with threads and callbacks of their own, and a batch whose queue is as a test wants it:
 * shared by test_batch and test_groups. Failures end the test at hand.
 */
#ifndef LOCI_TESTS_MODEL_BATCH_SCENE_H
#define LOCI_TESTS_MODEL_BATCH_SCENE_H

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/rng.h"
#include "model/batch.h"

#ifndef LOCI_TEST_BACKEND
#define LOCI_TEST_BACKEND "cpu"
#define LOCI_TEST_CPU
#endif

#define TINY "tests/data/model/tiny-3heads"
#define TOKENS 512u
#define MEMBERS 8u
#define PATIENT_MS 20000u

extern loci_backend *backend;
extern loci_model *model;
extern uint32_t vocab;

void ok(loci_status status, const loci_error *err);
void open_model(const char *isa, loci_dtype precision);
void close_model(void);

typedef struct worker {
    loci_sequence *sequence;
    loci_batch *batch;
    uint64_t seed;
    pthread_t thread;
    /* Of the callback: */
    _Atomic uint32_t calls;
    uint32_t fail_in_call;         /* from 1; 0 = never */
    uint32_t stream_fails_in_call; /* the same, of what it has enqueued */
    bool refuse;                   /* at the pass's end */
    uint32_t attended;             /* passes that ended */
    loci_status passed;            /* what became of the last one */
    loci_cancel *cancels, *cancel; /* set in call 1; of this worker's appends */
    uint32_t hold_until_waiting;   /* in call 1, so many chunks in queues */
    _Atomic bool *hold_until;      /* in call 1 */
    uint32_t hold_ms;              /* in every call */
    uint32_t kind[2];              /* by retrieval layer: the same ones are reached together */
    /* One append: */
    uint32_t count, logits_rows, first_token;
    loci_status status;
    loci_error err;
    _Atomic bool done;
    loci_buf out; /* logits of all appends, and their statuses */
} worker;

/* batch NULL: a sequence without one. */
void worker_open(worker *w, loci_batch *batch, uint64_t seed);
void worker_close(worker *w);
/* Until so many chunks wait in queues, or the flag is set. */
bool wait_for(const worker *w, uint32_t waiting, const _Atomic bool *flag);
/* The callback: adds to the sequence's own attention what depends on its queries and its seed
 * alone.
 */
loci_status reach(void *ctx, const loci_attend_call *call, loci_error *err);
loci_status pass_ended(void *ctx, loci_status status, loci_error *err);

/* Callbacks for several: those of the same kind in the first retrieval layer, of the same later
 * kind in the second are reached together. */
void go_together(worker *w, uint32_t kind, uint32_t later);
uint32_t choose_kind(void *const *ctx, const loci_attend_call *calls, uint32_t count);
extern _Atomic uint32_t calls_together, reached_together;
extern loci_stream *_Atomic stream_together; /* of the last such call */

/* Appends the next tokens, and keeps their logits. */
void append(worker *w, uint32_t count, uint32_t logits_rows);
/* For threads: w->count tokens. */
void *append_once(void *arg);
void start(worker *w, void *(*run)(void *));
void join(worker *w);
void same_out(const worker *a, const worker *b);

/* The first holds the batch with one row; the others queue up behind it in order and make the next
 * pass, led by the second. */
typedef struct scene {
    loci_batch *batch;
    worker w[MEMBERS + 1];
} scene;

void scene_open(scene *s);
void scene_run(scene *s);
/* Runs it; a neighbour in the pass cancels `who` in its first call: it has no second one, and all
 * others end well. `cancel` is made here, and used until scene_check. */
void scene_cancel(scene *s, uint32_t who, loci_cancel *cancel);
/* Those that ended well are as if they had been alone; and so is everybody's next step. Closes it.
 */
void scene_check(scene *s);

#endif
