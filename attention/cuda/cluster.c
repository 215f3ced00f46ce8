/* SPDX-License-Identifier: Apache-2.0
 *
 * Clusters the keys of one pair on the device, with the CPU's result (attention/cluster.h). The
 * host decides what is clustered next, the device does it: K-means runs over many sets of points at
 * once (one for the roots, one for each root, one for each run that is halved), and the rounds of
 * all sets are the same, since those that change nothing do no harm.
 *
 * All device memory of a call is one block, the scratch of a stream of its own, so that calls may
 * come from any thread; both are kept for the next one (cuda.h).
 */
#include "attention/cluster.h"

#include <stdlib.h>
#include <string.h>

#include "attention/cuda/cuda.h"
#include "attention/cuda/kmeans.h"

#define ALIGN 256u

_Static_assert(LOCI_CUDA_PROBES == LOCI_PROBES, "the kernels' number of probes");

typedef struct run {
    uint32_t count, root;
} run;

typedef struct work {
    loci_stream *owner;
    cudaStream_t stream; /* of the owner */
    const loci_keys *keys;
    loci_error *err;
    uint8_t *memory; /* NULL while the size is added up */
    size_t used;
    uint32_t n, groups_max, sets_max, runs_max;
    uint32_t *iota, *ids, *sub, *at; /* [n] */
    /* Sorting: [LOCI_PROBES * n] where keys are compared with bundles, else [n]. */
    uint32_t *sort_keys, *sort_values, *sorted_keys, *sorted_values;
    void *temp;
    size_t temp_bytes;
    loci_cuda_kmeans main, bundle; /* bundle: of main's centroids */
    loci_cuda_tile *tiles;
    uint32_t tiles_max;
    /* The host's. */
    loci_cuda_tile *host_tiles;
    loci_cuda_set *host_sets;
    uint32_t *list;         /* [n + 1] */
    run *runs, *other_runs; /* [runs_max] */
    uint32_t run_count;
} work;

static loci_status check(work *w, cudaError_t result) {
    return loci_cuda_try(result, "clustering keys", w->err);
}

static loci_status no_host_memory(work *w) {
    return loci_fail(w->err, LOCI_E_NOMEM, "no memory to index %u tokens", w->n);
}

/* --- memory ---------------------------------------------------------------------------- */

static void *take(work *w, size_t bytes) {
    size_t at = w->used;
    w->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return w->memory ? w->memory + at : NULL;
}

static uint32_t *take_words(work *w, size_t count) {
    return take(w, count * sizeof(uint32_t));
}

/* But for points and ids. */
static void place_kmeans(work *w, loci_cuda_kmeans *k, uint32_t n, uint32_t groups, uint32_t sets) {
    size_t dim = w->keys->dim;
    k->points.dim = w->keys->dim;
    k->sets = take(w, sets * sizeof *k->sets);
    k->group = take_words(w, n);
    k->best = take(w, n * sizeof *k->best);
    k->order = take_words(w, n);
    k->begin = take_words(w, (size_t)groups + 1);
    k->centroid = take(w, groups * dim * sizeof(float));
    k->size = take_words(w, groups);
    k->top = take_words(w, sets);
    k->lanes = take(w, groups * dim);
    k->bias = take(w, groups * sizeof *k->bias);
    k->empty = take_words(w, 1);
}

static void place_all(work *w) {
    uint32_t n = w->n, roots = (n + LOCI_ROOT_TOKENS - 1) / LOCI_ROOT_TOKENS;
    uint32_t bundles = loci_bundles(roots), dim = w->keys->dim;
    size_t sorted = (size_t)n * (bundles > 1 ? LOCI_PROBES : 1);
    w->iota = take_words(w, n);
    w->ids = take_words(w, n);
    w->sub = take_words(w, n);
    w->at = take_words(w, n);
    w->sort_keys = take_words(w, sorted);
    w->sort_values = take_words(w, sorted);
    w->sorted_keys = take_words(w, sorted);
    w->sorted_values = take_words(w, sorted);
    w->temp = take(w, w->temp_bytes);
    w->tiles = take(w, w->tiles_max * sizeof *w->tiles);
    w->main.points.x = take(w, (size_t)n * dim * sizeof(float));
    w->main.points.code = take(w, (size_t)n * dim);
    w->main.points.length = take(w, n * sizeof(float));
    place_kmeans(w, &w->main, n, w->groups_max, w->sets_max);
    if (bundles == 1) return;
    w->bundle.points.code = take(w, (size_t)roots * dim);
    w->bundle.points.length = take(w, roots * sizeof(float));
    place_kmeans(w, &w->bundle, roots, bundles, 1);
    w->bundle.points.x = w->main.centroid;
    w->bundle.ids = w->iota;
}

static loci_status open_work(work *w, loci_backend *self) {
    size_t n = w->n;
    uint32_t bundled = (uint32_t)(n * LOCI_PROBES / LOCI_CUDA_TILE) + LOCI_BUNDLES_MAX + 1;
    /* Roots are cut into pieces of at least an eighth of what is cut, so of 48 keys or more, and
     * each root has one leaf more than a 16th of its keys at most; runs that are halved have more
     * keys than a leaf may. */
    w->groups_max = (uint32_t)(n / LOCI_LEAF_TOKENS + n / 48 + n / LOCI_ROOT_TOKENS + 2);
    w->sets_max = (uint32_t)(n / LOCI_LEAF_TOKENS_MAX + n / LOCI_ROOT_TOKENS + 2);
    w->runs_max = (uint32_t)(n / (LOCI_LEAF_TOKENS_MAX / 8)) + w->groups_max;
    w->tiles_max = (uint32_t)(n / LOCI_CUDA_TILE) + w->sets_max + 1;
    if (w->tiles_max < bundled) w->tiles_max = bundled;
    w->host_tiles = malloc(w->tiles_max * sizeof *w->host_tiles);
    w->host_sets = malloc(w->sets_max * sizeof *w->host_sets);
    w->list = malloc((n + 1) * sizeof *w->list);
    w->runs = malloc(w->runs_max * sizeof *w->runs);
    w->other_runs = malloc(w->runs_max * sizeof *w->other_runs);
    if (!w->host_tiles || !w->host_sets || !w->list || !w->runs || !w->other_runs)
        return no_host_memory(w);
    LOCI_TRY(check(w, loci_cuda_k_sort(NULL, NULL, &w->temp_bytes, NULL, NULL, NULL, NULL,
                                       w->n * LOCI_PROBES, 32)));
    place_all(w);
    LOCI_TRY(loci_backend_cuda.stream_open(self, &w->owner, w->err));
    w->stream = w->owner->stream;
    w->memory = loci_cuda_scratch(w->owner, w->used);
    if (!w->memory) return loci_backend_cuda.sync(w->owner, w->err);
    w->used = 0;
    place_all(w);
    return LOCI_OK;
}

static void close_work(loci_backend *self, work *w) {
    loci_backend_cuda.stream_close(self, w->owner);
    free(w->host_tiles);
    free(w->host_sets);
    free(w->list);
    free(w->runs);
    free(w->other_runs);
}

/* Host memory that is not page-locked: the source may change once this returns. */
static loci_status send(work *w, void *to, const void *from, size_t bytes) {
    return check(w, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, w->stream));
}

static loci_status fetch(work *w, void *to, const void *from, size_t bytes) {
    LOCI_TRY(check(w, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, w->stream)));
    return check(w, cudaStreamSynchronize(w->stream));
}

static loci_status clear(work *w, void *at, size_t bytes) {
    return check(w, cudaMemsetAsync(at, 0, bytes, w->stream));
}

/* --- K-means --------------------------------------------------------------------------- */

/* Stable, by keys below `most`, to sorted_keys and sorted_values. */
static loci_status sort(work *w, const uint32_t *keys, const uint32_t *values, uint32_t n,
                        uint32_t most) {
    uint32_t bits = 1;
    while (bits < 32 && most > 1u << bits) bits++;
    return check(w, loci_cuda_k_sort(w->stream, w->temp, &w->temp_bytes, keys, w->sorted_keys,
                                     values, w->sorted_values, n, bits));
}

static void add_tiles(work *w, uint32_t *count, loci_cuda_tile all) {
    uint32_t end = all.first + all.count;
    for (uint32_t first = all.first; first < end && all.lanes > 0; first += LOCI_CUDA_TILE) {
        LOCI_ASSERT(*count < w->tiles_max);
        uint32_t some = end - first < LOCI_CUDA_TILE ? end - first : LOCI_CUDA_TILE;
        w->host_tiles[(*count)++] = (loci_cuda_tile){first, some, all.lane, all.lanes};
    }
}

/* Compares each place with the lanes of the bundles whose means look nearest. */
static loci_status compare_bundles(work *w, const loci_cuda_kmeans *k) {
    const loci_cuda_kmeans *b = &w->bundle;
    uint32_t lane[LOCI_BUNDLES_MAX + 1], entry[LOCI_BUNDLES_MAX + 1], count = 0;
    uint32_t entries = k->n * LOCI_PROBES, *begin = w->at; /* of the entries of each bundle */
    LOCI_TRY(fetch(w, lane, b->begin, (b->groups + 1) * sizeof *lane));
    LOCI_TRY(check(w, loci_cuda_k_probes(w->stream, b, k, w->sort_keys, w->sort_values)));
    LOCI_TRY(sort(w, w->sort_keys, w->sort_values, entries, b->groups));
    LOCI_TRY(check(w, loci_cuda_k_begins(w->stream, begin, w->sorted_keys, entries, b->groups)));
    LOCI_TRY(fetch(w, entry, begin, (b->groups + 1) * sizeof *entry));
    for (uint32_t i = 0; i < b->groups; i++)
        add_tiles(
            w, &count,
            (loci_cuda_tile){entry[i], entry[i + 1] - entry[i], lane[i], lane[i + 1] - lane[i]});
    LOCI_TRY(send(w, w->tiles, w->host_tiles, count * sizeof *w->tiles));
    return check(w, loci_cuda_k_nearest(w->stream, k, w->tiles, count, w->sorted_values));
}

/* Groups that are empty get the points that lie farthest from their centroids. */
static loci_status fill_empty(work *w, const loci_cuda_kmeans *k) {
    uint32_t empty;
    LOCI_TRY(clear(w, k->empty, sizeof empty));
    LOCI_TRY(check(w, loci_cuda_k_count_empty(w->stream, k)));
    LOCI_TRY(fetch(w, &empty, k->empty, sizeof empty));
    if (empty == 0) return LOCI_OK;
    uint32_t *places = w->sorted_values;
    LOCI_TRY(check(w, loci_cuda_k_far_keys(w->stream, k, w->sort_keys)));
    LOCI_TRY(sort(w, w->sort_keys, w->iota, k->n, UINT32_MAX));
    if (k->set_count > 1) { /* then by set */
        LOCI_TRY(check(w, cudaMemcpyAsync(w->sort_values, places, k->n * sizeof *places,
                                          cudaMemcpyDeviceToDevice, w->stream)));
        LOCI_TRY(check(w, loci_cuda_k_set_keys(w->stream, k, w->sort_values, w->sort_keys)));
        LOCI_TRY(sort(w, w->sort_keys, w->sort_values, k->n, k->set_count));
    }
    return check(w, loci_cuda_k_fill(w->stream, k, places));
}

/* Groups from what is nearest; then order and begins of the groups, and their sums. */
static loci_status update(work *w, const loci_cuda_kmeans *k) {
    LOCI_TRY(clear(w, k->size, k->groups * sizeof *k->size));
    LOCI_TRY(check(w, loci_cuda_k_settle(w->stream, k)));
    LOCI_TRY(fill_empty(w, k));
    LOCI_TRY(sort(w, k->group, w->iota, k->n, k->groups));
    LOCI_TRY(check(w, cudaMemcpyAsync(k->order, w->sorted_values, k->n * sizeof *k->order,
                                      cudaMemcpyDeviceToDevice, w->stream)));
    LOCI_TRY(check(w, loci_cuda_k_begins(w->stream, k->begin, w->sorted_keys, k->n, k->groups)));
    return check(w, loci_cuda_k_sums(w->stream, k));
}

static loci_status start(work *w, const loci_cuda_kmeans *k, const loci_cuda_set *sets) {
    LOCI_ASSERT(k->groups <= w->groups_max && k->set_count <= w->sets_max);
    LOCI_TRY(clear(w, k->group, k->n * sizeof *k->group));
    LOCI_TRY(send(w, k->sets, sets, k->set_count * sizeof *sets));
    return check(w, loci_cuda_k_seeds(w->stream, k));
}

/* Centroids as lanes. */
static loci_status pack(work *w, const loci_cuda_kmeans *k, bool unit) {
    LOCI_TRY(clear(w, k->top, k->set_count * sizeof *k->top));
    LOCI_TRY(check(w, loci_cuda_k_tops(w->stream, k, unit)));
    return check(w, loci_cuda_k_lanes(w->stream, k));
}

static loci_status check_stop(work *w) {
    loci_status status = loci_cancel_check(w->keys->cancel);
    if (status == LOCI_OK) return LOCI_OK;
    return loci_fail(w->err, status, "indexing %u tokens was stopped", w->n);
}

/* Rounds in which the places of each set are compared with all of its centroids. */
static loci_status plain_rounds(work *w, const loci_cuda_kmeans *k, const loci_cuda_set *sets,
                                uint32_t rounds) {
    uint32_t count = 0;
    for (uint32_t s = 0; s < k->set_count; s++)
        add_tiles(w, &count,
                  (loci_cuda_tile){sets[s].begin, sets[s].count, sets[s].group, sets[s].groups});
    LOCI_TRY(send(w, w->tiles, w->host_tiles, count * sizeof *w->tiles));
    for (uint32_t round = 0; round < rounds; round++) {
        LOCI_TRY(check_stop(w));
        LOCI_TRY(pack(w, k, true));
        LOCI_TRY(clear(w, k->best, k->n * sizeof *k->best));
        LOCI_TRY(check(w, loci_cuda_k_nearest(w->stream, k, w->tiles, count, NULL)));
        LOCI_TRY(update(w, k));
    }
    return LOCI_OK;
}

/* Puts main's centroids, already of length 1, into bundles, whose means become bundle's lanes. */
static loci_status make_bundles(work *w) {
    loci_cuda_kmeans *b = &w->bundle;
    b->n = w->main.groups;
    b->groups = loci_bundles(b->n);
    b->set_count = 1;
    loci_cuda_set all = {0, b->n, 0, b->groups};
    LOCI_TRY(check(w, loci_cuda_k_directions(w->stream, &b->points, b->n)));
    LOCI_TRY(start(w, b, &all));
    LOCI_TRY(plain_rounds(w, b, &all, LOCI_BUNDLE_ROUNDS));
    LOCI_TRY(check(w, loci_cuda_k_bundle_means(w->stream, b, &w->main)));
    loci_cuda_kmeans means = *b;
    means.size = NULL;
    return pack(w, &means, false);
}

static loci_status bundled_round(work *w, loci_cuda_kmeans *k) {
    LOCI_TRY(check_stop(w));
    LOCI_TRY(clear(w, k->top, sizeof *k->top));
    LOCI_TRY(check(w, loci_cuda_k_tops(w->stream, k, true)));
    LOCI_TRY(make_bundles(w));
    k->lane_group = w->bundle.order;
    loci_status status = check(w, loci_cuda_k_lanes(w->stream, k));
    if (status == LOCI_OK) status = clear(w, k->best, k->n * sizeof *k->best);
    if (status == LOCI_OK) status = compare_bundles(w, k);
    if (status == LOCI_OK) status = update(w, k);
    k->lane_group = NULL;
    return status;
}

static loci_status run_rounds(work *w, loci_cuda_kmeans *k, const loci_cuda_set *sets,
                              uint32_t rounds) {
    LOCI_TRY(send(w, k->sets, sets, k->set_count * sizeof *sets));
    if (k->set_count > 1 || loci_bundles(k->groups) == 1) return plain_rounds(w, k, sets, rounds);
    for (uint32_t round = 0; round < rounds; round++) LOCI_TRY(bundled_round(w, k));
    return LOCI_OK;
}

/* --- roots and leaves ------------------------------------------------------------------ */

/* The ids in the order of main's groups; begins of these to list. */
static loci_status take_order(work *w) {
    const loci_cuda_kmeans *k = &w->main;
    LOCI_TRY(check(w, loci_cuda_k_gather(w->stream, w->sub, w->ids, k->order, k->n)));
    uint32_t *before = w->ids;
    w->ids = w->sub;
    w->sub = before;
    return fetch(w, w->list, k->begin, ((size_t)k->groups + 1) * sizeof *w->list);
}

static void add_run(work *w, uint32_t *count, run *runs, uint32_t keys, uint32_t root) {
    if (keys == 0) return; /* of keys that coincide */
    LOCI_ASSERT(*count < w->runs_max);
    runs[(*count)++] = (run){keys, root};
}

/* Parts the keys of the runs that are longer than cap; begins of the halves to list. */
static loci_status part_runs(work *w, uint32_t cap) {
    loci_cuda_kmeans *k = &w->main;
    uint32_t at = 0;
    k->n = k->set_count = 0;
    for (uint32_t r = 0; r < w->run_count; at += w->runs[r++].count) {
        if (w->runs[r].count <= cap) continue;
        LOCI_ASSERT(k->set_count < w->sets_max);
        w->host_sets[k->set_count] = (loci_cuda_set){k->n, w->runs[r].count, 2 * k->set_count, 2};
        for (uint32_t i = 0; i < w->runs[r].count; i++) w->list[k->n++] = at + i;
        k->set_count++;
    }
    if (k->n == 0) return LOCI_OK;
    k->groups = 2 * k->set_count;
    k->ids = w->sub;
    LOCI_TRY(send(w, w->at, w->list, k->n * sizeof *w->at));
    LOCI_TRY(check(w, loci_cuda_k_gather(w->stream, w->sub, w->ids, w->at, k->n)));
    LOCI_TRY(start(w, k, w->host_sets));
    LOCI_TRY(run_rounds(w, k, w->host_sets, LOCI_HALVE_ROUNDS));
    LOCI_TRY(check(w, loci_cuda_k_gather(w->stream, w->sort_values, w->sub, k->order, k->n)));
    LOCI_TRY(check(w, loci_cuda_k_scatter(w->stream, w->ids, w->at, w->sort_values, k->n)));
    return fetch(w, w->list, k->begin, ((size_t)k->groups + 1) * sizeof *w->list);
}

/* Halves runs until none has more keys than cap: all that are too long at once, which gives the
 * same runs as one after another. */
static loci_status cut_runs(work *w, uint32_t cap) {
    for (;;) {
        LOCI_TRY(part_runs(w, cap));
        if (w->main.n == 0) return LOCI_OK;
        uint32_t count = 0, cut = 0;
        for (uint32_t r = 0; r < w->run_count; r++) {
            run whole = w->runs[r];
            uint32_t first = whole.count;
            if (whole.count > cap) {
                first = loci_half(w->list[2 * cut + 1] - w->list[2 * cut], whole.count);
                cut++;
            }
            add_run(w, &count, w->other_runs, first, whole.root);
            add_run(w, &count, w->other_runs, whole.count - first, whole.root);
        }
        run *before = w->runs;
        w->runs = w->other_runs;
        w->other_runs = before;
        w->run_count = count;
    }
}

static loci_status make_roots(work *w) {
    loci_cuda_kmeans *k = &w->main;
    uint32_t n = w->n, groups = (n + LOCI_ROOT_TOKENS - 1) / LOCI_ROOT_TOKENS;
    uint32_t sample = groups * LOCI_ROOT_SAMPLE;
    if (sample > n) sample = n;
    loci_cuda_set all = {0, sample, 0, groups};
    k->ids = w->sub;
    k->n = sample;
    k->groups = groups;
    k->set_count = 1;
    LOCI_TRY(check(w, loci_cuda_k_take_even(w->stream, w->sub, w->ids, n, sample)));
    LOCI_TRY(clear(w, k->group, n * sizeof *k->group));
    LOCI_TRY(start(w, k, &all));
    LOCI_TRY(run_rounds(w, k, &all, LOCI_ROOT_ROUNDS));
    if (sample < n) {
        all.count = k->n = n;
        k->ids = w->ids;
        LOCI_TRY(run_rounds(w, k, &all, LOCI_WHOLE_ROUNDS));
    }
    LOCI_TRY(take_order(w));
    w->run_count = 0;
    for (uint32_t g = 0; g < groups; g++)
        add_run(w, &w->run_count, w->runs, w->list[g + 1] - w->list[g], 0);
    return cut_runs(w, LOCI_ROOT_TOKENS_CUT);
}

static loci_status make_leaves(work *w) {
    loci_cuda_kmeans *k = &w->main;
    uint32_t roots = w->run_count, at = 0;
    k->ids = w->ids;
    k->n = w->n;
    k->groups = 0;
    k->set_count = roots;
    loci_cuda_set *sets = w->host_sets;
    LOCI_ASSERT(roots <= w->sets_max);
    for (uint32_t r = 0; r < roots; at += w->runs[r++].count) {
        uint32_t leaves = loci_root_leaf_count(w->runs[r].count);
        sets[r] = (loci_cuda_set){at, w->runs[r].count, k->groups, leaves};
        k->groups += leaves;
    }
    LOCI_TRY(start(w, k, sets));
    LOCI_TRY(run_rounds(w, k, sets, w->keys->rounds));
    LOCI_TRY(take_order(w));
    w->run_count = 0;
    for (uint32_t r = 0; r < roots; r++)
        for (uint32_t g = sets[r].group; g < sets[r].group + sets[r].groups; g++)
            add_run(w, &w->run_count, w->runs, w->list[g + 1] - w->list[g], r);
    return cut_runs(w, LOCI_LEAF_TOKENS_MAX);
}

/* Ids ascending in each leaf: sorted by leaf from an ascending list. */
static loci_status put_out(work *w, loci_clusters *out) {
    uint32_t end = 0;
    for (uint32_t l = 0; l < w->run_count; l++) {
        if (l == 0 || w->runs[l].root != w->runs[l - 1].root) out->root_leaves[out->roots++] = 0;
        out->root_leaves[out->roots - 1]++;
        out->leaf_ends[l] = end += w->runs[l].count;
    }
    out->leaves = w->run_count;
    LOCI_ASSERT(end == w->n);
    LOCI_TRY(send(w, w->at, out->leaf_ends, out->leaves * sizeof *w->at));
    LOCI_TRY(
        check(w, loci_cuda_k_owners(w->stream, w->sort_keys, w->ids, w->at, out->leaves, w->n)));
    LOCI_TRY(sort(w, w->sort_keys, w->iota, w->n, out->leaves));
    return fetch(w, out->ids, w->sorted_values, w->n * sizeof *out->ids);
}

static loci_status run_all(work *w, loci_clusters *out) {
    LOCI_TRY(
        send(w, w->main.points.x, w->keys->x, (size_t)w->n * w->keys->dim * sizeof *w->keys->x));
    LOCI_TRY(check(w, loci_cuda_k_directions(w->stream, &w->main.points, w->n)));
    LOCI_TRY(check(w, loci_cuda_k_count_up(w->stream, w->iota, w->n)));
    LOCI_TRY(check(w, loci_cuda_k_count_up(w->stream, w->ids, w->n)));
    LOCI_TRY(make_roots(w));
    LOCI_TRY(make_leaves(w));
    return put_out(w, out);
}

loci_status loci_cuda_cluster_keys(loci_backend *self, const struct loci_keys *keys,
                                   struct loci_clusters *out, loci_error *err) {
    work w = {.keys = keys, .err = err, .n = keys->tokens};
    out->leaves = out->roots = 0;
    loci_status status = open_work(&w, self);
    if (status == LOCI_OK) status = run_all(&w, out);
    close_work(self, &w);
    return status;
}
