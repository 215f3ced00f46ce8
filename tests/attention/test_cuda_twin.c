/* SPDX-License-Identifier: Apache-2.0
 *
 * The cuda backend beside the CPU on the same corpora and queries, drawn anew in every run
 * (LOCI_TEST_SEED repeats one): look-ups in all modes, the tail, figures of nodes, segments; and
 * what only a device has: a cache that must give up pairs, several streams.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pairs.h"
#include "tests/attention/lookup_scene.h"

static uint64_t seed;

static loci_cuda_pairs *pairs_of(const scene *s) {
    return ((loci_cuda *)s->f.backend->ctx)->pairs;
}

/* The same corpus on the CPU backend: shares keys and extents with the scene it was made from. */
typedef struct twin {
    fixture f;
    loci_extent_view *views;
    loci_buffer **flat[2];
} twin;

static void must(loci_status status, const loci_error *err) {
    if (status != LOCI_OK) fail_msg("%s (seed %llu)", err->text, (unsigned long long)seed);
}

static void copy_flat(twin *t, const fixture *from, loci_error *err) {
    size_t bytes = (size_t)from->view.flat_tokens * from->kv_heads * from->dim * sizeof(uint16_t);
    for (uint32_t i = 0; i < 2 * from->layers; i++) {
        loci_buffer *source = (i % 2 ? from->view.flat_v : from->view.flat_k)[i / 2];
        loci_buffer **to = &t->flat[i % 2][i / 2];
        must(t->f.backend->ops->alloc(t->f.backend, bytes + 1, to, err), err);
        uint8_t *data = malloc(bytes + 1);
        assert_non_null(data);
        from->backend->ops->download(from->stream, data, loci_ref_at(source, 0), bytes);
        must(from->backend->ops->sync(from->stream, err), err);
        t->f.backend->ops->upload(t->f.stream, loci_ref_at(*to, 0), data, bytes);
        free(data);
    }
}

static twin twin_open(const fixture *from) {
    twin t = {.f = *from};
    loci_error err = {0};
    must(loci_backend_open("cpu", NULL, &t.f.backend, &err), &err);
    must(t.f.backend->ops->stream_open(t.f.backend, &t.f.stream, &err), &err);
    t.views = calloc(from->extents + 1, sizeof *t.views);
    for (int i = 0; i < 2; i++) t.flat[i] = calloc(from->layers, sizeof *t.flat[i]);
    assert_true(t.views && t.flat[0] && t.flat[1]);
    for (uint32_t e = 0; e < from->extents; e++) {
        t.views[e] = from->views[e];
        must(t.f.backend->ops->wrap(t.f.backend, from->memory[e], from->memory_bytes[e],
                                    &t.views[e].buffer, &err),
             &err);
    }
    copy_flat(&t, from, &err);
    t.f.view.extents = t.views;
    t.f.view.flat_k = t.flat[0];
    t.f.view.flat_v = t.flat[1];
    return t;
}

static void twin_close(twin *t) {
    const loci_backend_ops *ops = t->f.backend->ops;
    for (uint32_t e = 0; e < t->f.extents; e++) ops->free(t->f.backend, t->views[e].buffer);
    for (uint32_t i = 0; i < 2 * t->f.layers; i++) {
        ops->free(t->f.backend, t->flat[i % 2][i / 2]);
    }
    free(t->views);
    free(t->flat[0]);
    free(t->flat[1]);
    ops->stream_close(t->f.backend, t->f.stream);
    loci_backend_close(t->f.backend);
}

static void describe(char what[160], const setting *c, const loci_select_params *p) {
    (void)snprintf(what, 160,
                   "seed %llu: mode %d, tail %d, %u tokens of %u, %u rows, %u x %u heads, %u an "
                   "extent, %u flat",
                   (unsigned long long)seed, (int)p->mode, (int)p->estimate_tail, c->tokens, c->dim,
                   c->rows, c->kv_heads, c->group, c->extent_tokens, c->flat_segments);
}

static int compare_selected(const void *a, const void *b) {
    return memcmp(a, b, sizeof(loci_selected));
}

/* How many tokens only one of two runs selected. */
static size_t count_differences(fixture_run *a, fixture_run *b) {
    size_t i = 0, j = 0, differ = 0;
    qsort(a->selected, a->selected_count, sizeof *a->selected, compare_selected);
    qsort(b->selected, b->selected_count, sizeof *b->selected, compare_selected);
    while (i < a->selected_count || j < b->selected_count) {
        int order = i == a->selected_count   ? 1
                    : j == b->selected_count ? -1
                                             : compare_selected(&a->selected[i], &b->selected[j]);
        differ += order != 0;
        i += order <= 0;
        j += order >= 0;
    }
    return differ;
}

static void compare_values(const float *a, const float *b, size_t count, double tolerance,
                           const char *what) {
    for (size_t i = 0; i < count; i++)
        if (!(a[i] == b[i]) &&
            !(fabs((double)a[i] - (double)b[i]) <= tolerance * (1 + fabs((double)b[i]))))
            fail_msg("%s: value %zu is %.7g, the CPU's %.7g", what, i, (double)a[i], (double)b[i]);
}

/* A look-up of the scene's rows, whose weights are relative to `total`. */
static fixture_run run_of(const scene *s, loci_select_params params, const float *total,
                          float *mass) {
    fixture_run run = {.rows = s->rows, .q = s->q, .steady = s->steady, .params = params};
    run.out = s->out;
    run.lse = s->lse;
    run.total = total;
    run.mass = mass;
    return run;
}

/* One look-up on both. Shares are sums of exponentials that the two round differently, so that a
 * token whose share stands at the threshold may be taken by one alone; there, outputs differ by
 * what that token holds. A budget is a threshold where two may change places, each with a head's
 * whole attention: then only the selections are compared. */
static void compare_run(scene *s, twin *t, const setting *c, loci_select_params params) {
    size_t heads = (size_t)s->rows * s->f.q_heads, values = heads * s->f.dim;
    size_t segments = s->f.segments;
    float *out = calloc(values + 2 * heads + 2 * segments, sizeof *out);
    char what[160];
    loci_error err = {0};
    assert_non_null(out);
    describe(what, c, &params);
    fixture_run ours = run_of(s, params, out + values + heads, out + values + 2 * heads);
    ours.want_selected = true;
    ours.row_begin = c->row_begin;
    for (size_t i = 0; i < heads; i++) out[values + heads + i] = (float)s->ref_lse[i]; /* of all */
    must(fixture_look_up(&s->f, &ours, &err), &err);
    fixture_run theirs = ours;
    theirs.out = out;
    theirs.lse = out + values;
    theirs.mass = ours.mass + segments;
    must(fixture_look_up(&t->f, &theirs, &err), &err);
    size_t differ = count_differences(&ours, &theirs);
    if (differ > (params.budget ? 2 : 1) + theirs.selected_count / 2000)
        fail_msg("%s: %zu selections differ of %zu", what, differ, theirs.selected_count);
    if (theirs.stats.candidate_tokens != ours.stats.candidate_tokens)
        fail_msg("%s: %llu candidates, the CPU has %llu", what,
                 (unsigned long long)ours.stats.candidate_tokens,
                 (unsigned long long)theirs.stats.candidate_tokens);
    bool rounds = params.precision == LOCI_BF16 && s->rows > LOCI_ATTEND_EXACT_QUERIES;
    double tolerance = rounds ? 8e-2 : differ ? 2e-2 : 2e-4; /* logits go up to some tens */
    if (differ && params.budget) values = heads = 0;
    compare_values(s->out, theirs.out, values, tolerance, what);
    compare_values(s->lse, theirs.lse, heads, tolerance, what);
    for (size_t i = 0; i < segments; i++) /* totals leave out the flat tokens, whose weights may be
                                             above 1, which attribution is not made for */
        if (theirs.mass[i] > (float)heads) ours.mass[i] = theirs.mass[i];
    if (heads) compare_values(ours.mass, theirs.mass, segments, tolerance, what);
    assert_int_equal(ours.stats.dense_kv_bytes, theirs.stats.dense_kv_bytes);
    if (params.mode == LOCI_MODE_HIERARCHICAL && !params.candidates_max) {
        /* Where a leaf begins takes less room on the device. */
        assert_in_range(ours.stats.leaf_bytes, theirs.stats.leaf_bytes * 3 / 4,
                        theirs.stats.leaf_bytes);
        assert_int_equal(ours.stats.code_bytes, theirs.stats.code_bytes);
    }
    if (!differ) {
        assert_int_equal(ours.stats.kv_bytes, theirs.stats.kv_bytes);
        assert_int_equal(ours.stats.kv_leaf_bytes, theirs.stats.kv_leaf_bytes);
        assert_int_equal(ours.stats.selected_tokens, theirs.stats.selected_tokens);
    }
    free(ours.selected);
    free(theirs.selected);
    free(out);
}

static void test_modes_equal_the_cpu(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 1;
    for (int round = 0; round < 12; round++) {
        setting c = random_setting(&rng);
        scene s = open_scene(c);
        if (round % 3 == 2) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        compare_run(&s, &t, &c, (loci_select_params){.mode = LOCI_MODE_DENSE});
        compare_run(
            &s, &t, &c,
            (loci_select_params){.mode = LOCI_MODE_SQUEEZED, .squeezed_threshold = {2e-4f, 2e-4f}});
        for (int tail = 0; tail < 2; tail++) {
            /* What may be left is less than a 16th: a head that sees one token alone gives it its
             * whole share, and which of several such are left would be a matter of rounding. */
            loci_select_params params = narrow(round % 2 ? 0.97f : 0.945f, round % 4 == 3 ? 30 : 0);
            params.estimate_tail = tail == 1;
            compare_run(&s, &t, &c, params);
        }
        twin_close(&t);
        close_scene(&s);
    }
}

/* A single row, whose logits are kept for attribution, and, where there is no room for those of all
 * tokens, not. */
static void test_single_rows_equal_the_cpu(void **state) {
    (void)state;
    static const uint32_t groups[] = {7, 1, 16, 18, 3, 8};
    uint64_t rng = seed * 2 + 13;
    for (uint32_t round = 0; round < 12; round++) {
        setting c = random_setting(&rng);
        c.group = groups[round % 6];
        c.rows = 1;
        c.tokens += round % 4 ? 700 : 0;
        scene s = open_scene(c);
        if (round % 3 == 2) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        compare_run(&s, &t, &c, narrow(round % 2 ? 0.97f : 0.945f, round % 4 == 3 ? 30 : 0));
        if (round % 4 == 1) ((loci_cuda *)s.f.backend->ctx)->room_bytes = 0;
        compare_run(&s, &t, &c, (loci_select_params){.mode = LOCI_MODE_DENSE});
        twin_close(&t);
        close_scene(&s);
    }
}

/* All tokens, for as many vectors as fill tiles of warpgroups, and some that do not; exactly, and
 * rounded. */
static void test_whole_equals_the_cpu(void **state) {
    (void)state;
    static const uint32_t groups[] = {7, 1, 16, 8, 3, 5}, rows[] = {8, 9, 40, 2, 64, 21};
    uint64_t rng = seed * 2 + 21;
    for (uint32_t round = 0; round < 12; round++) {
        setting c = random_setting(&rng);
        c.dim = round % 2 ? 64 : 128;
        c.group = groups[fixture_random(&rng) % 6];
        c.rows = rows[round % 6];
        c.extent_tokens = round % 4 ? c.extent_tokens : 100; /* many, of which the last is short */
        c.row_begin = round % 3 ? (uint32_t)(fixture_random(&rng) % (c.rows + 1)) : 0;
        scene s = open_scene(c);
        if (round % 4 == 3) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        loci_select_params params = {.mode = LOCI_MODE_DENSE};
        compare_run(&s, &t, &c, params);
        params.precision = LOCI_BF16;
        compare_run(&s, &t, &c, params);
        twin_close(&t);
        close_scene(&s);
    }
}

/* By the times in attention/cuda/NOTES.md: a row reads some thousand tokens, but not a million, a
 * question's rows read these, too, and nobody does where some would come over the bus, or what does
 * not fit. */
static void test_all_is_read_where_that_is_faster(void **state) {
    (void)state;
    setting c = usual;
    c.dim = 64;
    scene s = open_scene(c);
    loci_backend *backend = s.f.backend;
    const loci_cuda *cuda = backend->ctx;
    const loci_backend_ops *ops = backend->ops;
    loci_corpus_view view = {.retrieval_layers = 1, .kv_heads = 4, .head_dim = 128, .tokens = 4096};
    assert_int_equal(ops->reads_whole(backend, &view, 0, 1, 28), cuda->wgmma);
    view.tokens = 1 << 20;
    assert_false(ops->reads_whole(backend, &view, 0, 1, 28));
    assert_int_equal(ops->reads_whole(backend, &view, 0, 75, 28), cuda->wgmma);
    view.head_dim = 96;
    assert_false(ops->reads_whole(backend, &view, 0, 75, 28));
    view.head_dim = 128;
    view.retrieval_layers = 10000; /* more than fits */
    assert_false(ops->reads_whole(backend, &view, 0, 75, 28));
    view = s.f.view;
    assert_int_equal(ops->reads_whole(backend, &view, 0, 75, s.f.q_heads), cuda->wgmma);
    (void)run(&s, narrow(0.9f, 0), false); /* of layer 0 */
    loci_cuda_pairs_lower(pairs_of(&s));
    assert_false(ops->reads_whole(backend, &view, 0, 75, s.f.q_heads));
    assert_int_equal(ops->reads_whole(backend, &view, 1, 75, s.f.q_heads), cuda->wgmma);
    close_scene(&s);
}

/* A row reads everything with the same result in whatever company of up to 64 vectors, and has the
 * same masses in any: alone from kept logits, else from keys that are read again. */
static void test_company_changes_no_bit_of_a_row(void **state) {
    (void)state;
    static const uint32_t groups[] = {7, 7, 8, 8, 3, 16};
    uint64_t rng = seed * 2 + 31;
    for (uint32_t round = 0; round < 6; round++) {
        setting c = random_setting(&rng);
        c.dim = round % 2 ? 64 : 128;
        c.group = groups[round];
        c.rows = 8;
        c.tokens += 1500;
        scene s = open_scene(c);
        size_t heads = s.f.q_heads, width = heads * s.f.dim, segments = s.f.segments;
        float *together = malloc((c.rows * (width + heads + segments) + segments) * sizeof(float));
        assert_non_null(together);
        float *total = together + c.rows * width, *mass = total + c.rows * heads;
        for (size_t i = 0; i < c.rows * heads; i++) total[i] = (float)s.ref_lse[i];
        loci_error err = {0};
        loci_select_params params = {.mode = LOCI_MODE_DENSE, .precision = LOCI_BF16, .each = true};
        fixture_run run = run_of(&s, params, total, mass);
        must(fixture_look_up(&s.f, &run, &err), &err);
        memcpy(together, s.out, c.rows * width * sizeof *together);
        run.rows = 1;
        run.mass = mass + c.rows * segments;
        for (uint32_t row = 0; row < c.rows; row++) {
            must(fixture_look_up(&s.f, &run, &err), &err);
            if (c.rows * c.group <= 64)
                assert_memory_equal(s.out, together + row * width, width * sizeof *together);
            assert_memory_equal(run.mass, mass + row * segments, segments * sizeof *mass);
            run.q += width;
            run.steady += heads;
            run.total += heads;
        }
        free(together);
        close_scene(&s);
    }
}

/* The CPU's, of one row: of the others all weights are 0. */
static void attribute_row(const twin *t, fixture_run *run, uint32_t row, float *total,
                          float *mass) {
    size_t heads = t->f.q_heads;
    loci_error err = {0};
    for (size_t i = 0; i < run->rows * heads; i++)
        total[i] = i / heads == row ? run->total[i] : INFINITY;
    fixture_run one = *run;
    one.params.each = false;
    one.total = total;
    one.mass = mass;
    must(fixture_look_up(&t->f, &one, &err), &err);
    run->stats = one.stats;
}

static void compare_each(scene *s, twin *t, const setting *c, uint32_t unasked) {
    size_t heads = (size_t)s->rows * s->f.q_heads, values = heads * s->f.dim;
    size_t segments = s->f.segments;
    loci_select_params params = {.mode = LOCI_MODE_DENSE, .each = true};
    float *out = calloc(values + 3 * heads + (s->rows + 1) * segments, sizeof *out);
    float *total = out + values + heads, *some = total + heads, *mass = some + heads;
    float *theirs = mass + s->rows * segments;
    char what[160];
    loci_error err = {0};
    assert_non_null(out);
    describe(what, c, &params);
    for (size_t i = 0; i < heads; i++) total[i] = (float)s->ref_lse[i];
    fixture_run run = run_of(s, params, total, mass);
    run.unasked = unasked;
    must(fixture_look_up(&s->f, &run, &err), &err);
    uint64_t selected = run.stats.selected_tokens, read = run.stats.kv_bytes;
    run.out = out;
    run.lse = out + values;
    for (uint32_t row = 0; row < s->rows; row++) {
        float *ours = mass + row * segments;
        attribute_row(t, &run, row, some, theirs);
        bool asked = !(unasked >> row & 1);
        for (size_t i = 0; i < segments; i++) /* as in compare_run */
            if (!asked)
                assert_true(ours[i] == 0.0f);
            else if (theirs[i] > (float)s->f.q_heads)
                ours[i] = theirs[i];
        if (asked) compare_values(ours, theirs, segments, 2e-4, what);
    }
    compare_values(s->out, run.out, values, 2e-4, what);
    compare_values(s->lse, run.lse, heads, 2e-4, what);
    assert_int_equal(selected, run.stats.selected_tokens);
    assert_int_equal(read, run.stats.kv_bytes);
    free(out);
}

/* Rows of several questions in one look-up, each with its own mass: from keys that are read again
 * for all at once or row by row, from kept logits, and where some are not asked for. */
static void test_masses_of_each_row_equal_the_cpu(void **state) {
    (void)state;
    static const uint32_t groups[] = {7, 1, 8, 3, 16, 5};
    uint64_t rng = seed * 2 + 21;
    for (uint32_t round = 0; round < 24; round++) {
        setting c = random_setting(&rng);
        c.group = groups[round % 6];
        c.rows = 1 + round % 8;
        c.flat_segments = round % 3;
        c.tokens += round % 2 ? 1500 : 0;
        if (round >= 20) c.extent_tokens = 41; /* as many extents as there are segments */
        scene s = open_scene(c);
        if (round % 4 == 1) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        compare_each(&s, &t, &c, 0);
        compare_each(&s, &t, &c, (uint32_t)fixture_random(&rng));
        ((loci_cuda *)s.f.backend->ctx)->room_bytes = 0;
        compare_each(&s, &t, &c, round % 3 ? 0 : (uint32_t)fixture_random(&rng));
        twin_close(&t);
        close_scene(&s);
    }
}

/* The default settings on a corpus of several extents, where all stages have work, and for a single
 * row on one whose lists several blocks share, with few candidates and with nearly all tokens. */
static void test_default_reach_equals_the_cpu(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 77;
    for (uint32_t rows = 1; rows <= 8; rows += 7) {
        setting c = usual;
        c.dim = rows == 1 ? 128 : 64;
        c.group = rows == 1 ? 7 : 3;
        c.rows = rows;
        c.tokens = rows == 1 ? 44000 : 12000;
        c.extent_tokens = 5000;
        c.seed = fixture_random(&rng) % 100000;
        scene s = open_scene(c);
        twin t = twin_open(&s.f);
        loci_select_params params;
        loci_select_defaults(&params);
        params.candidates_min = 300;
        params.roots_min = 16;
        compare_run(&s, &t, &c, params);
        params.top_p = 0.945f;
        params.roots = 20.0f;
        params.candidates = 250.0f; /* times the root of the tokens */
        if (rows == 1) compare_run(&s, &t, &c, params);
        twin_close(&t);
        close_scene(&s);
    }
}

/* A single row's candidates, limited so that the limit counts (where there are no more than 16
 * heads to a KV head), and once more with room for no result before it is counted. */
static void test_limited_candidates_equal_the_cpu(void **state) {
    (void)state;
    static const uint32_t groups[] = {7, 1, 16, 3, 18};
    uint64_t rng = seed * 2 + 9;
    for (uint32_t round = 0; round < 10; round++) {
        setting c = random_setting(&rng);
        c.group = groups[round % 5];
        c.rows = 1;
        c.tokens += 3000;
        scene s = open_scene(c);
        if (round % 3 == 2) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        loci_select_params params = narrow(round % 2 ? 0.97f : 1.0f, round % 2 ? 0 : 90);
        params.roots = 0.5f;
        params.candidates_min = 30;
        if (round >= 5) ((loci_cuda *)s.f.backend->ctx)->room_bytes = 0;
        uint64_t all = run(&s, params, false).stats.candidate_tokens;
        uint64_t heads = c.kv_heads * c.group;
        params.candidates_max = 1 + (uint32_t)(all / (2 * heads));
        compare_run(&s, &t, &c, params);
        uint64_t limited = run(&s, params, false).stats.candidate_tokens;
        bool counts = c.group <= 16 && all > 24 * heads;
        if (counts ? limited >= all : c.group > 16 && limited != all)
            fail_msg("seed %llu, round %u: %llu candidates, %llu without a limit",
                     (unsigned long long)seed, round, (unsigned long long)limited,
                     (unsigned long long)all);
        twin_close(&t);
        close_scene(&s);
    }
}

typedef struct level {
    float scores[4096], root_scores[4096];
    uint32_t tokens[4096];
    size_t count;
} level;

static void read_levels(const fixture *f, const scene *s, level out[2]) {
    const loci_backend_ops *ops = f->backend->ops;
    loci_lookup *lookup;
    loci_buffer *memory;
    loci_error err = {0};
    size_t bytes = (size_t)s->rows * f->q_heads * f->dim * sizeof(float);
    loci_select_params params = {.mode = LOCI_MODE_SQUEEZED};
    must(ops->lookup_create(f->backend, &lookup, &err), &err);
    must(ops->alloc(f->backend, bytes, &memory, &err), &err);
    ops->upload(f->stream, loci_ref_at(memory, 0), s->q, bytes);
    ops->lookup_begin(f->stream, lookup, &f->view, 1, loci_ref_at(memory, 0), f->q_heads * f->dim,
                      s->rows, f->q_heads, 0.2f, loci_ref_at(NULL, 0), &params);
    ops->score_nodes(f->stream, lookup);
    for (unsigned l = 0; l < 2; l++)
        ops->lookup_squeezed(f->stream, lookup, l, out[l].scores, out[l].tokens, out[l].root_scores,
                             4096, &out[l].count);
    must(ops->sync(f->stream, &err), &err);
    ops->lookup_free(f->backend, lookup);
    ops->free(f->backend, memory);
}

static void test_squeezed_scores_equal_the_cpu(void **state) {
    (void)state;
    setting c = usual;
    c.seed = seed % 100000;
    scene s = open_scene(c);
    kill_some(&s, 2);
    twin t = twin_open(&s.f);
    level *ours = calloc(2, sizeof *ours), *theirs = calloc(2, sizeof *theirs);
    assert_true(ours && theirs);
    read_levels(&s.f, &s, ours);
    read_levels(&t.f, &s, theirs);
    for (int l = 0; l < 2; l++) {
        assert_int_equal(ours[l].count, theirs[l].count);
        assert_in_range(ours[l].count, 1, 4096);
        assert_memory_equal(ours[l].tokens, theirs[l].tokens, ours[l].count * sizeof(uint32_t));
        for (size_t i = 0; i < ours[l].count; i++) {
            double a = (double)ours[l].scores[i], b = (double)theirs[l].scores[i];
            double x = (double)ours[l].root_scores[i], y = (double)theirs[l].root_scores[i];
            if (fabs(a - b) > 1e-4 * b + 1e-9 || fabs(x - y) > 1e-4 * y + 1e-9)
                fail_msg("level %d, node %zu: %g and %g, the CPU's %g and %g", l, i, a, x, b, y);
        }
    }
    free(ours);
    free(theirs);
    twin_close(&t);
    close_scene(&s);
}

static void rank_segments(const fixture *f, const scene *s, float scale, bool sink, float *scores,
                          uint32_t *candidates, uint32_t *count) {
    const loci_backend_ops *ops = f->backend->ops;
    size_t heads = (size_t)s->rows * f->q_heads * sizeof(float), values = heads * f->dim;
    size_t sinks = (size_t)f->layers * f->kv_heads * f->dim * sizeof(float);
    loci_corpus_view view = f->view;
    loci_lookup *lookup;
    loci_buffer *memory, *sink_k;
    loci_error err = {0};
    uint32_t *segments = calloc(f->segments, sizeof *segments);
    assert_non_null(segments);
    for (uint32_t i = 0; i < f->segments; i++) segments[i] = f->segments - 1 - i;
    loci_select_params params = narrow(0.9f, 0);
    must(ops->lookup_create(f->backend, &lookup, &err), &err);
    must(ops->alloc(f->backend, 2 * (values + heads) + f->segments * sizeof(float), &memory, &err),
         &err);
    must(ops->wrap(f->backend, s->q, sinks < values ? sinks : values, &sink_k, &err), &err);
    view.has_sink = sink && sinks <= values;
    view.sink_k = view.sink_v = loci_ref_at(sink_k, 0);
    loci_ref q = loci_ref_at(memory, 0), steady = loci_ref_at(memory, values);
    loci_ref out = loci_ref_at(memory, 2 * (values + heads));
    ops->upload(f->stream, q, s->q, values);
    ops->upload(f->stream, steady, s->steady, heads);
    ops->score_segments(f->stream, &view, 0, q, f->q_heads * f->dim, s->rows, f->q_heads, scale,
                        segments, f->segments, out);
    ops->download(f->stream, scores, out, f->segments * sizeof(float));
    ops->lookup_begin(f->stream, lookup, &view, 0, q, f->q_heads * f->dim, s->rows, f->q_heads,
                      scale, steady, &params);
    ops->score_nodes(f->stream, lookup);
    ops->score_codes(f->stream, lookup);
    ops->lookup_candidates(f->stream, lookup, 16, candidates, count);
    must(ops->sync(f->stream, &err), &err);
    ops->lookup_free(f->backend, lookup);
    ops->free(f->backend, memory);
    ops->free(f->backend, sink_k);
    free(segments);
}

static void test_segments_equal_the_cpu(void **state) {
    (void)state;
    uint64_t rng = seed * 2 + 5;
    for (int round = 0; round < 6; round++) {
        setting c = random_setting(&rng);
        c.tokens += 1000;
        c.extent_tokens += 400;
        scene s = open_scene(c);
        if (round % 2) kill_some(&s, 2);
        twin t = twin_open(&s.f);
        float *ours = calloc(s.f.segments, sizeof *ours);
        float *theirs = calloc(s.f.segments, sizeof *theirs);
        /* With the larger one some candidates have less than 2^-40 of the best's mass. */
        float scale = round % 2 ? 0.4f : 0.2f;
        uint32_t candidates[2][16], counts[2] = {0, 0}, common = 0;
        assert_true(ours && theirs);
        rank_segments(&s.f, &s, scale, round > 2, ours, candidates[0], &counts[0]);
        rank_segments(&t.f, &s, scale, round > 2, theirs, candidates[1], &counts[1]);
        compare_values(ours, theirs, s.f.segments, 1e-4, "segments");
        assert_int_equal(counts[0], counts[1]);
        for (uint32_t i = 0; i < counts[0]; i++)
            for (uint32_t j = 0; j < counts[1]; j++) common += candidates[0][i] == candidates[1][j];
        if (common + 1 < counts[0])
            fail_msg("seed %llu: %u of %u candidates are the CPU's", (unsigned long long)seed,
                     common, counts[0]);
        free(ours);
        free(theirs);
        twin_close(&t);
        close_scene(&s);
    }
}

/* --- the cache ------------------------------------------------------------------------- */

/* With room for one layer and nothing below the other goes, and comes back the same; with less room
 * a look-up is refused, and the backend goes on. */
static void test_the_cache_gives_up_what_is_not_in_use(void **state) {
    (void)state;
    scene s = open_scene(usual);
    loci_cuda_pairs_stats stats;
    loci_error err = {0};
    loci_select_params params = narrow(0.9f, 0);
    size_t values = (size_t)s.rows * s.f.q_heads * s.f.dim;
    float *before = malloc(values * sizeof *before);
    assert_non_null(before);
    (void)run(&s, params, false);
    memcpy(before, s.out, values * sizeof *before);
    loci_cuda_pairs_stats_of(pairs_of(&s), &stats);
    assert_int_equal(stats.misses, s.f.extents * s.f.kv_heads);
    assert_int_equal(stats.evictions, 0);
    loci_cuda_pairs_limit(pairs_of(&s), stats.bytes + stats.bytes / 4, 0);
    fixture_run other = {.layer = 1,
                         .rows = s.rows,
                         .q = s.q,
                         .steady = s.steady,
                         .params = params,
                         .out = s.out,
                         .lse = s.lse};
    must(fixture_look_up(&s.f, &other, &err), &err);
    loci_cuda_pairs_stats_of(pairs_of(&s), &stats);
    assert_true(stats.evictions > 0 && stats.bytes <= stats.budget);
    (void)run(&s, params, false);
    assert_memory_equal(before, s.out, values * sizeof *before);
    loci_cuda_pairs_limit(pairs_of(&s), stats.budget / 2, 0);
    assert_int_equal(fixture_look_up(&s.f, &other, &err), LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "does not fit the GPU"));
    loci_cuda_pairs_limit(pairs_of(&s), stats.budget, 0);
    (void)run(&s, params, false);
    assert_memory_equal(before, s.out, values * sizeof *before);
    free(before);
    close_scene(&s);
}

typedef struct worker {
    fixture f;
    const scene *s;
    float *out, *lse;
    loci_status status;
    loci_error err;
} worker;

static void *look_up_often(void *arg) {
    worker *w = arg;
    fixture_run r = {.rows = w->s->rows,
                     .q = w->s->q,
                     .steady = w->s->steady,
                     .params = narrow(0.9f, 0),
                     .out = w->out,
                     .lse = w->lse};
    for (int i = 0; i < 8 && w->status == LOCI_OK; i++)
        w->status = fixture_look_up(&w->f, &r, &w->err);
    return NULL;
}

/* Two threads, two streams, one backend: the bytes of one alone. */
static void test_streams_do_not_disturb_each_other(void **state) {
    (void)state;
    scene s = open_scene(usual);
    size_t heads = (size_t)s.rows * s.f.q_heads, values = heads * s.f.dim;
    worker workers[2] = {0};
    pthread_t threads[2];
    (void)run(&s, narrow(0.9f, 0), false);
    for (int i = 0; i < 2; i++) {
        workers[i] = (worker){.f = s.f, .s = &s};
        workers[i].out = calloc(values + heads, sizeof(float));
        assert_non_null(workers[i].out);
        workers[i].lse = workers[i].out + values;
        must(s.f.backend->ops->stream_open(s.f.backend, &workers[i].f.stream, &workers[i].err),
             &workers[i].err);
        assert_int_equal(pthread_create(&threads[i], NULL, look_up_often, &workers[i]), 0);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        must(workers[i].status, &workers[i].err);
        assert_memory_equal(workers[i].out, s.out, values * sizeof(float));
        s.f.backend->ops->stream_close(s.f.backend, workers[i].f.stream);
        free(workers[i].out);
    }
    close_scene(&s);
}

int main(void) {
    seed = fresh_seed();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_modes_equal_the_cpu),
        cmocka_unit_test(test_single_rows_equal_the_cpu),
        cmocka_unit_test(test_whole_equals_the_cpu),
        cmocka_unit_test(test_all_is_read_where_that_is_faster),
        cmocka_unit_test(test_company_changes_no_bit_of_a_row),
        cmocka_unit_test(test_masses_of_each_row_equal_the_cpu),
        cmocka_unit_test(test_default_reach_equals_the_cpu),
        cmocka_unit_test(test_limited_candidates_equal_the_cpu),
        cmocka_unit_test(test_squeezed_scores_equal_the_cpu),
        cmocka_unit_test(test_segments_equal_the_cpu),
        cmocka_unit_test(test_the_cache_gives_up_what_is_not_in_use),
        cmocka_unit_test(test_streams_do_not_disturb_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
