/* SPDX-License-Identifier: Apache-2.0
 *
 * A corpus in memory for tests and benchmarks of the corpus operations: keys and values in
 * position order, from a generator or a file, and the extents and view built from them.
 *
 * A key-value dump (--kv of bench_attention) is: the 8 bytes "LOCIKV1" and a zero; uint32_t
 * layers, kv_heads, head_dim, q_heads, tokens, segments, steps, rows; uint32_t
 * segment_begin[segments + 1]; uint32_t step_begin[steps + 1] (rows of each step); for each layer
 * f32 q[rows][q_heads][head_dim] (not scaled) and f32 steady_lse[rows][q_heads]; for each
 * layer and KV head bf16 K[tokens][head_dim] and V[tokens][head_dim].
 */
#ifndef LOCI_TESTS_ATTENTION_CORPUS_FIXTURE_H
#define LOCI_TESTS_ATTENTION_CORPUS_FIXTURE_H

#include "attention/index_layout.h"

#ifndef LOCI_TEST_BACKEND
#define LOCI_TEST_BACKEND "cpu"
#define LOCI_TEST_CPU /* tests that look inside it */
#endif

typedef struct fixture {
    loci_backend *backend;
    loci_stream *stream;
    uint32_t layers, kv_heads, dim, q_heads;
    uint32_t tokens, segments; /* of extents and flat part together */
    uint32_t *segment_begin;   /* [segments + 1] global positions */
    uint16_t **k, **v;         /* [layers * kv_heads]: [tokens][dim] */
    uint32_t steps, rows;      /* of a dump */
    uint32_t *step_begin;
    float **q, **steady; /* [layers] */

    uint32_t extents;
    uint32_t *extent_begin; /* [extents + 1] global positions */
    uint8_t **memory;       /* [extents] */
    size_t *memory_bytes;
    loci_extent_view *views;
    uint8_t *dead; /* [segments of extents] */
    loci_corpus_view view;
} fixture;

/* xorshift64*, for inputs. */
uint64_t fixture_random(uint64_t *state);
float fixture_uniform(uint64_t *state); /* [0, 1) */
float fixture_normal(uint64_t *state);

typedef struct fixture_shape {
    uint32_t layers, kv_heads, dim, q_heads, tokens, segment_tokens;
    uint32_t clusters; /* topics that keys gather around */
    float spread;      /* of keys around their topic; 0 = all alike */
    uint64_t seed;
} fixture_shape;

/* Keys: a common offset, low-rank topics, noise. Fills all up to `steps`. */
void fixture_generate(fixture *f, const fixture_shape *shape);
loci_status fixture_load(fixture *f, const char *path, loci_error *err);
/* Opens the backend and builds extents of at most extent_tokens, whole segments each; the last
 * flat_segments stay flat. */
loci_status fixture_build_on(fixture *f, const char *backend, const char *isa, unsigned threads,
                             uint32_t extent_tokens, uint32_t flat_segments,
                             const loci_pair_build_options *options, loci_error *err);
/* On the backend under test. */
static inline loci_status fixture_build(fixture *f, const char *isa, unsigned threads,
                                        uint32_t extent_tokens, uint32_t flat_segments,
                                        const loci_pair_build_options *options, loci_error *err) {
    return fixture_build_on(f, LOCI_TEST_BACKEND, isa, threads, extent_tokens, flat_segments,
                            options, err);
}
/* Marks segments (of extents) dead and makes the bitmaps. dead: one byte a segment. */
loci_status fixture_kill(fixture *f, const uint8_t *dead, loci_error *err);
/* Makes pairs of version 3 of all pairs: without KV blocks and slot segments. */
loci_status fixture_age(fixture *f, loci_error *err);
/* Lets the backend forget what it copied of the extents. */
loci_status fixture_rewrap(fixture *f, loci_error *err);
void fixture_close(fixture *f);
/* Leaf `index` of a blob, and its root. */
const loci_leaf *fixture_leaf(const uint8_t *blob, uint32_t index, uint32_t *root);
/* The global position of a slot. */
uint32_t fixture_position(const fixture *f, uint32_t layer, uint32_t extent, uint32_t kv_head,
                          uint32_t slot);
const uint8_t *fixture_blob(const fixture *f, uint32_t layer, uint32_t extent, uint32_t kv_head);

typedef struct fixture_run {
    uint32_t layer, rows;
    const float *q, *steady; /* [rows][q_heads][dim], [rows][q_heads] */
    loci_select_params params;
    float *out, *lse;        /* results, same shapes */
    loci_selected *selected; /* malloc'd by the run; NULL if want_selected is false */
    size_t selected_count;
    bool want_selected;
    const float *total; /* [rows][q_heads] for attribution, or NULL */
    float *mass;        /* then: masses of the segments, of rows from row_begin on; with params.each
                           [rows][segments] */
    uint32_t row_begin;
    uint32_t unasked; /* with params.each: rows whose mass is not asked for, as bits */
    loci_lookup_stats stats;
    uint64_t ns[4]; /* nodes with begin, codes, select, attend */
} fixture_run;

/* All stages of one look-up; the status is that of sync(). */
loci_status fixture_look_up(const fixture *f, fixture_run *run, loci_error *err);

#endif
