/* SPDX-License-Identifier: Apache-2.0
 *
 * Steps of a look-up as CUDA graphs: a decoding step's some thirty launches in one layer become
 * one. A step is enqueued as it is when it comes first, recorded when it comes again, and launched
 * as a graph from then on. What it reads on the device stays where it is while the key is the same;
 * pairs are pinned, and the layer's tables and bitmaps sent, before each launch. Steps that would
 * need more than that (rows that go through the cache of rows, uploads, more memory) are not
 * recorded.
 *
 * A look-up keeps up to LOOKUP_STEPS graphs a layer, since a sequence decodes alone and in company
 * by turns.
 */
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/lookup.h"

#define TOLD_MOST 512u /* steps whose figures there is room for */

static void forget(lookup_step *step) {
    if (step->graph) (void)cudaGraphExecDestroy(step->graph);
    free(step->key);
    *step = (lookup_step){0};
}

void look_forget_steps(loci_lookup *lookup) {
    for (uint32_t i = 0; i < lookup->step_count; i++) forget(&lookup->steps[i]);
    free(lookup->steps);
    lookup->steps = NULL;
    lookup->step_count = 0;
    lookup->step = NULL;
    if (lookup->told) (void)cudaFreeHost(lookup->told);
    lookup->told = NULL;
}

loci_cuda_stats *look_told(const loci_lookup *lookup) {
    return &lookup->told[lookup->step - lookup->steps];
}

/* The record with this key, or the one of the layer that was used least recently, made a new one;
 * NULL without memory. */
static lookup_step *step_of(loci_lookup *lookup, uint32_t layer, const void *key, size_t bytes) {
    uint32_t count = (layer + 1) * LOOKUP_STEPS;
    if (count > lookup->step_count) {
        lookup_step *steps = realloc(lookup->steps, count * sizeof *steps);
        if (!steps) return NULL;
        memset(steps + lookup->step_count, 0, (count - lookup->step_count) * sizeof *steps);
        lookup->steps = steps;
        lookup->step_count = count;
    }
    lookup_step *first = &lookup->steps[layer * LOOKUP_STEPS], *oldest = first;
    for (lookup_step *step = first; step < first + LOOKUP_STEPS; step++) {
        if (step->key_bytes == bytes && memcmp(step->key, key, bytes) == 0) return step;
        if (step->used < oldest->used) oldest = step;
    }
    void *copy = realloc(oldest->key, bytes);
    if (!copy) return NULL;
    memcpy(copy, key, bytes);
    oldest->key = copy;
    oldest->key_bytes = bytes;
    oldest->state = SEEN_NEVER; /* its graph serves to make the next one from */
    return oldest;
}

/* Whether what a step used is where it was. */
static bool stands(const loci_stream *stream, const loci_lookup *lookup, const lookup_step *step) {
    return step->stream == stream && step->scratch == stream->scratch &&
           step->arena == lookup->arena.cleared;
}

static void remember(const loci_stream *stream, const loci_lookup *lookup, lookup_step *step,
                     lookup_step_state state) {
    step->state = state;
    step->stream = stream;
    step->scratch = stream->scratch;
    step->arena = lookup->arena.cleared;
}

static void begin_recording(loci_stream *stream, loci_lookup *lookup) {
    void *told = lookup->told;
    if ((size_t)(lookup->step - lookup->steps) >= TOLD_MOST) return;
    if (!told && cudaMallocHost(&told, TOLD_MOST * sizeof *lookup->told) != cudaSuccess) {
        (void)cudaGetLastError();
        return;
    }
    lookup->told = told;
    loci_cuda_told(stream, look_told(lookup));
    pthread_mutex_lock(&lookup->cuda->recording);
    stream->unrecordable = false;
    stream->recording =
        cudaStreamBeginCapture(stream->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    if (stream->recording) return;
    (void)cudaGetLastError();
    pthread_mutex_unlock(&lookup->cuda->recording);
}

bool loci_cuda_step_begin(loci_stream *stream, loci_lookup *lookup, const loci_corpus_view *corpus,
                          uint32_t retrieval_layer, const void *key, size_t key_bytes) {
    LOCI_ASSERT(!stream->recording);
    lookup->reported = false;
    lookup->replayed = false;
    lookup_step *step = lookup->step = step_of(lookup, retrieval_layer, key, key_bytes);
    if (!step || stream->error.status != LOCI_OK) {
        lookup->step = NULL;
        return false;
    }
    step->used = ++lookup->step_clock;
    bool seen = step->state == SEEN_ONCE || step->state == RECORDED;
    if (seen && !stands(stream, lookup, step)) step->state = SEEN_NEVER;
    if (!seen || step->state == SEEN_NEVER) return false;
    look_open(stream, lookup, corpus, retrieval_layer);
    lookup->opened = lookup->ready; /* lookup_begin need not */
    if (!lookup->ready || lookup->cached) return false;
    if (!stands(stream, lookup, step)) { /* the look-up gave its memory back */
        step->state = SEEN_NEVER;
        return false;
    }
    if (step->state == SEEN_ONCE) {
        begin_recording(stream, lookup);
        return false;
    }
    if (lookup->look.pairs != step->pairs) {
        step->state = SEEN_NEVER;
        return false;
    }
    loci_cuda_told(stream, look_told(lookup));
    lookup->replayed =
        loci_cuda_ok(stream, cudaGraphLaunch(step->graph, stream->stream), "cudaGraphLaunch");
    atomic_fetch_add(&lookup->cuda->steps_replayed, 1);
    return true;
}

/* The graph of what was recorded, made from the last one where they are alike. */
static bool make_graph(lookup_step *step, cudaGraph_t recorded) {
    cudaGraphExecUpdateResultInfo info;
    if (step->graph && cudaGraphExecUpdate(step->graph, recorded, &info) == cudaSuccess)
        return true;
    (void)cudaGetLastError();
    if (step->graph) (void)cudaGraphExecDestroy(step->graph);
    step->graph = NULL;
    return cudaGraphInstantiate(&step->graph, recorded, 0) == cudaSuccess;
}

/* Ends the recording and launches it; false: nothing was enqueued. */
static bool launch_recorded(loci_stream *stream, loci_lookup *lookup, lookup_step *step) {
    cudaGraph_t recorded = NULL;
    bool well = cudaStreamEndCapture(stream->stream, &recorded) == cudaSuccess && recorded &&
                !stream->unrecordable && stream->error.status == LOCI_OK && lookup->ready &&
                lookup->reported && make_graph(step, recorded);
    stream->recording = false;
    pthread_mutex_unlock(&lookup->cuda->recording);
    if (recorded) (void)cudaGraphDestroy(recorded);
    well = well && cudaGraphLaunch(step->graph, stream->stream) == cudaSuccess;
    if (well) {
        atomic_fetch_add(&lookup->cuda->steps_recorded, 1);
        remember(stream, lookup, step, RECORDED);
        step->pairs = lookup->look.pairs;
        return true;
    }
    /* What went wrong does so again when the step is enqueued, or did for being recorded. */
    (void)cudaGetLastError();
    memset(&stream->error, 0, sizeof stream->error);
    step->state = UNRECORDABLE;
    return false;
}

bool loci_cuda_step_end(loci_stream *stream, loci_lookup *lookup, loci_lookup_stats *stats) {
    lookup_step *step = lookup->step;
    lookup->opened = false;
    if (!step) return true;
    if (stream->recording) {
        if (!launch_recorded(stream, lookup, step)) return false;
    } else if (!lookup->replayed) { /* lookup_stats has told them */
        if (step->state == SEEN_NEVER && lookup->ready && lookup->reported)
            remember(stream, lookup, step, SEEN_ONCE);
        return true;
    }
    loci_cuda_tell(stream, stats, look_told(lookup), sizeof *stats);
    return true;
}
