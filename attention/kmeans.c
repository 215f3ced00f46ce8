/* SPDX-License-Identifier: Apache-2.0
 *
 * Spherical K-means; see kmeans.h. Spherical because attention is an inner product: members of
 * a group should point the same way (Squeezed Attention, arXiv 2411.09688, section 3.1).
 */
#include "attention/kmeans.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/pool.h"

#define ASSIGN_CHUNK 512u /* points of one task */
#define GATHER 64u        /* rows copied together before one kernel call */

typedef struct far_point {
    float cosine; /* to its centroid */
    uint32_t at;
} far_point;

typedef struct kmeans_state {
    const loci_points *points;
    const uint32_t *ids;
    uint32_t n, k;
    uint32_t *group;
    int32_t *best_dot; /* [n] */
    float *centroid;   /* [k][dim] */
    uint32_t *size;    /* [k] */
    /* Centroids stand in lanes bundle by bundle, each from a block on. */
    uint32_t bundles;
    uint32_t *bundle_block; /* [bundles + 1] */
    uint32_t *lane_group;   /* [lanes]; k: none */
    int8_t *lanes;          /* [blocks][dim / 4][16][4] */
    int32_t *bias;          /* [blocks * 16] */
    int8_t *mean_lanes;     /* the bundles' means, behind lanes */
    int32_t *mean_bias;     /* behind bias */
    far_point *far;         /* [n], once some group is empty */
} kmeans_state;

void loci_points_quantise(const float *x, uint32_t count, uint32_t dim, uint8_t *code,
                          float *length) {
    for (uint32_t p = 0; p < count; p++) {
        const float *row = x + (size_t)p * dim;
        uint8_t *out = code + (size_t)p * dim;
        float top = 0.0f;
        for (uint32_t i = 0; i < dim; i++) top = fabsf(row[i]) > top ? fabsf(row[i]) : top;
        float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        if (!isfinite(inverse)) inverse = 0.0f;
        int32_t squares = 0;
        for (uint32_t i = 0; i < dim; i++) {
            float rounded = row[i] * inverse + 12582912.0f; /* to nearest, ties to even */
            int32_t value = (int32_t)(rounded - 12582912.0f);
            out[i] = (uint8_t)(value + 128);
            squares += value * value;
        }
        length[p] = sqrtf((float)squares);
    }
}

/* Rows of up to GATHER points one after another. */
static void gather(const kmeans_state *state, const uint32_t *ids, uint32_t count, uint8_t *rows) {
    size_t dim = state->points->dim;
    for (uint32_t r = 0; r < count; r++)
        memcpy(rows + r * dim, state->points->code + ids[r] * dim, dim);
}

/* The LOCI_PROBES bundles whose means each of the points lies nearest to. */
static void choose_bundles(const kmeans_state *state, const uint8_t *rows, uint32_t count,
                           uint16_t (*probe)[LOCI_PROBES]) {
    uint32_t dim = state->points->dim;
    int32_t best[GATHER][LOCI_PROBES], dot[GATHER * LOCI_LANES];
    for (uint32_t r = 0; r < count; r++)
        for (uint32_t p = 0; p < LOCI_PROBES; p++) best[r][p] = INT32_MIN;
    for (uint32_t first = 0; first < state->bundles; first += LOCI_LANES) {
        uint32_t last = state->bundles - first < LOCI_LANES ? state->bundles - first : LOCI_LANES;
        state->points->kernels->dot_u8(dot, rows, count, dim,
                                       state->mean_lanes + (size_t)first * dim);
        for (uint32_t r = 0; r < count; r++) {
            for (uint32_t lane = 0; lane < last; lane++) {
                int32_t value = dot[r * LOCI_LANES + lane] + state->mean_bias[first + lane];
                if (value <= best[r][LOCI_PROBES - 1]) continue;
                uint32_t p = LOCI_PROBES - 1;
                for (; p > 0 && value > best[r][p - 1]; p--) {
                    best[r][p] = best[r][p - 1];
                    probe[r][p] = probe[r][p - 1];
                }
                best[r][p] = value;
                probe[r][p] = (uint16_t)(first + lane);
            }
        }
    }
}

/* Compares points with the centroids of one bundle. */
static void compare_bundle(kmeans_state *state, uint32_t bundle, const uint32_t *places,
                           uint32_t count) {
    uint32_t dim = state->points->dim, block = state->bundle_block[bundle];
    uint8_t rows[GATHER * LOCI_HEAD_DIM_MAX];
    uint32_t ids[GATHER], found[GATHER];
    int32_t dot[GATHER];
    if (state->bundle_block[bundle + 1] == block) return; /* where many groups coincide */
    for (uint32_t at = 0; at < count; at += GATHER) {
        uint32_t some = count - at < GATHER ? count - at : GATHER;
        for (uint32_t r = 0; r < some; r++) ids[r] = state->ids[places[at + r]];
        gather(state, ids, some, rows);
        state->points->kernels->argmax_u8(
            found, dot, rows, some, dim, state->lanes + (size_t)block * LOCI_LANES * dim,
            state->bias + (size_t)block * LOCI_LANES, state->bundle_block[bundle + 1] - block);
        for (uint32_t r = 0; r < some; r++) {
            uint32_t place = places[at + r];
            if (dot[r] <= state->best_dot[place]) continue;
            state->best_dot[place] = dot[r];
            state->group[place] = state->lane_group[block * LOCI_LANES + found[r]];
        }
    }
}

/* The places of the points [begin, begin + count) bundle by bundle; first: [bundles + 1]. */
static void sort_by_bundle(const kmeans_state *state, uint32_t begin, uint32_t count,
                           uint32_t *places, uint32_t *first) {
    uint8_t rows[GATHER * LOCI_HEAD_DIM_MAX];
    uint16_t probe[ASSIGN_CHUNK][LOCI_PROBES];
    memset(first, 0, (state->bundles + 1) * sizeof *first);
    for (uint32_t at = 0; at < count; at += GATHER) {
        uint32_t some = count - at < GATHER ? count - at : GATHER;
        gather(state, state->ids + begin + at, some, rows);
        choose_bundles(state, rows, some, probe + at);
    }
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t p = 0; p < LOCI_PROBES; p++) first[probe[i][p] + 1]++;
    for (uint32_t b = 0; b < state->bundles; b++) first[b + 1] += first[b];
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t p = 0; p < LOCI_PROBES; p++) places[first[probe[i][p]]++] = begin + i;
    for (uint32_t b = state->bundles; b > 0; b--) first[b] = first[b - 1];
    first[0] = 0;
}

static void assign_chunk(void *arg, size_t index, unsigned thread) {
    (void)thread;
    kmeans_state *state = arg;
    if (loci_cancel_check(state->points->cancel) != LOCI_OK) return;
    uint32_t begin = (uint32_t)index * ASSIGN_CHUNK;
    uint32_t count = state->n - begin < ASSIGN_CHUNK ? state->n - begin : ASSIGN_CHUNK;
    uint32_t places[ASSIGN_CHUNK * LOCI_PROBES], first[LOCI_BUNDLES_MAX + 1] = {0, count};
    if (state->bundles > 1) {
        sort_by_bundle(state, begin, count, places, first);
    } else {
        for (uint32_t i = 0; i < count; i++) places[i] = begin + i;
    }
    for (uint32_t i = 0; i < count; i++) state->best_dot[begin + i] = INT32_MIN;
    for (uint32_t b = 0; b < state->bundles; b++)
        compare_bundle(state, b, places + first[b], first[b + 1] - first[b]);
}

/* A row too short for a finite inverse becomes zero, as a row of zeros stays. */
static void make_unit(float *rows, uint32_t count, uint32_t dim) {
    for (uint32_t c = 0; c < count; c++) {
        float *row = rows + (size_t)c * dim;
        double squares = 0.0;
        for (uint32_t i = 0; i < dim; i++) squares += (double)row[i] * (double)row[i];
        float inverse = squares > 0.0 ? (float)(1.0 / sqrt(squares)) : 0.0f;
        if (!isfinite(inverse)) inverse = 0.0f;
        for (uint32_t i = 0; i < dim; i++) row[i] *= inverse;
    }
}

/* Rows as int8 with one common scale, so that dots compare. lane_row: which row stands in a lane;
 * from `count` on, or where `size` is 0: none, which is never better than one that fits. */
static void pack_lanes(const float *rows, uint32_t count, const uint32_t *size, uint32_t dim,
                       const uint32_t *lane_row, uint32_t lanes, int8_t *out, int32_t *bias) {
    float top = 0.0f;
    for (size_t i = 0; i < (size_t)count * dim; i++)
        top = fabsf(rows[i]) > top ? fabsf(rows[i]) : top;
    float scale = top > 0.0f ? 127.0f / top : 0.0f;
    memset(out, 0, (size_t)lanes * dim);
    for (uint32_t l = 0; l < lanes; l++) {
        uint32_t row = lane_row ? lane_row[l] : l;
        bias[l] = INT32_MIN / 2;
        if (row >= count || (size && size[row] == 0)) continue;
        int8_t *lane = out + (size_t)(l / LOCI_LANES) * LOCI_LANES * dim + l % LOCI_LANES * 4;
        int32_t sum = 0;
        for (uint32_t i = 0; i < dim; i++) {
            float rounded = rows[(size_t)row * dim + i] * scale + 12582912.0f;
            int32_t value = (int32_t)(rounded - 12582912.0f);
            lane[(size_t)(i / 4) * 4 * LOCI_LANES + i % 4] = (int8_t)value;
            sum += value;
        }
        bias[l] = -128 * sum;
    }
}

/* Puts groups whose unit centroids are alike into bundles, each from a block of lanes on. */
static loci_status make_bundles(kmeans_state *state, loci_pool *pool) {
    uint32_t dim = state->points->dim, k = state->k, bundles = state->bundles;
    uint8_t *code = malloc((size_t)k * dim);
    float *length = malloc(k * sizeof *length), *mean = calloc((size_t)bundles * dim, sizeof *mean);
    uint32_t *ids = malloc(3 * (size_t)k * sizeof *ids), begin[LOCI_BUNDLES_MAX + 1];
    loci_status status = LOCI_E_NOMEM;
    if (!code || !length || !mean || !ids) goto out;
    uint32_t *bundle = ids + k, *scratch = bundle + k;
    loci_points points = *state->points;
    loci_points_quantise(state->centroid, k, dim, code, length);
    points.x = state->centroid;
    points.code = code;
    points.length = length;
    for (uint32_t c = 0; c < k; c++) ids[c] = c;
    LOCI_TRY_GOTO(loci_kmeans(&points, ids, k, bundles, LOCI_BUNDLE_ROUNDS, 0, pool, bundle, NULL),
                  out);
    loci_group(ids, bundle, k, bundles, begin, scratch);
    uint32_t block = 0;
    for (uint32_t b = 0; b < bundles; b++) {
        uint32_t count = begin[b + 1] - begin[b];
        state->bundle_block[b] = block;
        for (uint32_t l = 0; l < loci_lane_blocks(count) * LOCI_LANES; l++)
            state->lane_group[block * LOCI_LANES + l] = l < count ? ids[begin[b] + l] : k;
        for (uint32_t l = 0; l < count; l++)
            for (uint32_t i = 0; i < dim; i++)
                mean[(size_t)b * dim + i] +=
                    state->centroid[(size_t)ids[begin[b] + l] * dim + i] / (float)count;
        block += loci_lane_blocks(count);
    }
    state->bundle_block[bundles] = block;
    pack_lanes(mean, bundles, NULL, dim, NULL, loci_lane_blocks(bundles) * LOCI_LANES,
               state->mean_lanes, state->mean_bias);
    status = LOCI_OK;
out:
    free(code);
    free(length);
    free(mean);
    free(ids);
    return status;
}

static loci_status pack_centroids(kmeans_state *state, loci_pool *pool) {
    make_unit(state->centroid, state->k, state->points->dim);
    if (state->bundles > 1) LOCI_TRY(make_bundles(state, pool));
    pack_lanes(state->centroid, state->k, state->size, state->points->dim, state->lane_group,
               state->bundle_block[state->bundles] * LOCI_LANES, state->lanes, state->bias);
    return LOCI_OK;
}

static void assign_all(kmeans_state *state, loci_pool *pool) {
    loci_pool_run(pool, (state->n + ASSIGN_CHUNK - 1) / ASSIGN_CHUNK, assign_chunk, state);
}

static bool farther(const far_point *a, const far_point *b) {
    return a->cosine != b->cosine ? a->cosine < b->cosine : a->at < b->at;
}

/* Lets the point at `place` sink in a heap of n, the farthest on top. */
static void sink(far_point *heap, uint32_t n, uint32_t place) {
    far_point point = heap[place];
    for (uint32_t child; (child = 2 * place + 1) < n; place = child) {
        if (child + 1 < n && farther(&heap[child + 1], &heap[child])) child++;
        if (!farther(&heap[child], &point)) break;
        heap[place] = heap[child];
    }
    heap[place] = point;
}

/* The points of groups of two or more, as a heap; returns their number. */
static uint32_t heap_far(kmeans_state *state) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < state->n; i++) {
        if (state->size[state->group[i]] < 2) continue;
        float length = state->points->length[state->ids[i]];
        float cosine = length > 0.0f ? (float)state->best_dot[i] / length : 0.0f;
        state->far[count++] = (far_point){cosine, i};
    }
    for (uint32_t i = count / 2; i > 0; i--) sink(state->far, count, i - 1);
    return count;
}

/* Each empty group gets the point that lies farthest (by angle) from its centroid, of those that
 * are not alone in their group. */
static loci_status fill_empty(kmeans_state *state) {
    uint32_t c = 0;
    while (c < state->k && state->size[c] > 0) c++;
    if (c == state->k) return LOCI_OK;
    if (!state->far) state->far = malloc(state->n * sizeof *state->far);
    if (!state->far) return LOCI_E_NOMEM;
    for (uint32_t left = heap_far(state); c < state->k && left > 0;) {
        uint32_t point = state->far[0].at;
        state->far[0] = state->far[--left];
        if (left > 0) sink(state->far, left, 0);
        if (state->size[state->group[point]] < 2) continue;
        state->size[state->group[point]]--;
        state->group[point] = c;
        state->size[c] = 1;
        while (c < state->k && state->size[c] > 0) c++;
    }
    return LOCI_OK;
}

static loci_status update_centroids(kmeans_state *state) {
    uint32_t dim = state->points->dim;
    memset(state->size, 0, state->k * sizeof *state->size);
    for (uint32_t i = 0; i < state->n; i++) state->size[state->group[i]]++;
    LOCI_TRY(fill_empty(state));
    memset(state->centroid, 0, (size_t)state->k * dim * sizeof *state->centroid);
    for (uint32_t i = 0; i < state->n; i++) {
        float *sum = state->centroid + (size_t)state->group[i] * dim;
        const float *row = state->points->x + (size_t)state->ids[i] * dim;
        for (uint32_t j = 0; j < dim; j++) sum[j] += row[j];
    }
    return LOCI_OK;
}

static void seed_centroids(kmeans_state *state) {
    uint32_t dim = state->points->dim;
    for (uint32_t c = 0; c < state->k; c++) {
        uint64_t at = ((uint64_t)c * 2 + 1) * state->n / (2 * (uint64_t)state->k);
        memcpy(state->centroid + (size_t)c * dim, state->points->x + (size_t)state->ids[at] * dim,
               dim * sizeof(float));
        state->size[c] = 1;
    }
}

static loci_status state_alloc(kmeans_state *state, loci_error *err) {
    uint32_t dim = state->points->dim, k = state->k;
    state->bundles = loci_bundles(k);
    uint32_t blocks = loci_lane_blocks(k) + state->bundles, lanes = blocks * LOCI_LANES;
    uint32_t means = loci_lane_blocks(state->bundles) * LOCI_LANES;
    state->best_dot = malloc(state->n * sizeof *state->best_dot);
    state->centroid = malloc((size_t)k * dim * sizeof *state->centroid);
    state->size = malloc(k * sizeof *state->size);
    state->bundle_block = calloc(state->bundles + 1, sizeof *state->bundle_block);
    state->lane_group = malloc(lanes * sizeof *state->lane_group);
    state->lanes = malloc(((size_t)lanes + means) * dim);
    state->bias = malloc(((size_t)lanes + means) * sizeof *state->bias);
    if (!state->best_dot || !state->centroid || !state->size || !state->bundle_block ||
        !state->lane_group || !state->lanes || !state->bias)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to cluster %u keys", state->n);
    state->mean_lanes = state->lanes + (size_t)lanes * dim;
    state->mean_bias = state->bias + lanes;
    state->bundle_block[1] = loci_lane_blocks(k); /* of the only one */
    for (uint32_t l = 0; l < lanes; l++) state->lane_group[l] = l < k ? l : k;
    return LOCI_OK;
}

/* Rounds over state->ids until nothing changes; `before`: room for as many groups. */
static loci_status run_rounds(kmeans_state *state, uint32_t rounds, uint32_t *before,
                              loci_pool *pool) {
    for (uint32_t round = 0; round < rounds; round++) {
        LOCI_TRY(pack_centroids(state, pool));
        memcpy(before, state->group, state->n * sizeof *before);
        assign_all(state, pool);
        LOCI_TRY(loci_cancel_check(state->points->cancel));
        LOCI_TRY(update_centroids(state));
        if (round > 0 && memcmp(before, state->group, state->n * sizeof *before) == 0) break;
    }
    return LOCI_OK;
}

loci_status loci_kmeans(const loci_points *points, const uint32_t *ids, uint32_t n, uint32_t k,
                        uint32_t rounds, uint32_t sample, loci_pool *pool, uint32_t *group,
                        loci_error *err) {
    LOCI_ASSERT(k > 0 && k <= n && points->dim <= LOCI_HEAD_DIM_MAX);
    memset(group, 0, n * sizeof *group);
    if (k == 1) return LOCI_OK;
    if (sample == 0 || sample > n) sample = n;
    if (sample < k) sample = k;
    kmeans_state state = {.points = points, .ids = ids, .n = n, .k = k, .group = group};
    uint32_t *before = malloc(n * sizeof *before), *sampled = malloc(sample * sizeof *sampled);
    loci_status status = state_alloc(&state, err);
    if (status == LOCI_OK && (!before || !sampled))
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to cluster %u keys", n);
    if (status != LOCI_OK) goto out;
    for (uint32_t i = 0; i < sample; i++) sampled[i] = ids[(uint64_t)i * n / sample];
    state.ids = sampled;
    state.n = sample;
    seed_centroids(&state);
    status = run_rounds(&state, rounds, before, pool);
    if (status == LOCI_OK && sample < n) {
        state.ids = ids;
        state.n = n;
        free(state.far);
        state.far = NULL;
        status = run_rounds(&state, LOCI_WHOLE_ROUNDS, before, pool);
    }
    if (status == LOCI_E_NOMEM)
        loci_fail(err, status, "no memory to cluster %u keys", n);
    else if (status != LOCI_OK)
        loci_fail(err, status, "clustering %u keys was stopped", n);
out:
    free(before);
    free(sampled);
    free(state.best_dot);
    free(state.centroid);
    free(state.size);
    free(state.bundle_block);
    free(state.lane_group);
    free(state.lanes);
    free(state.bias);
    free(state.far);
    return status;
}

void loci_group(uint32_t *ids, const uint32_t *group, uint32_t n, uint32_t k, uint32_t *begin,
                uint32_t *scratch) {
    memset(begin, 0, (k + 1) * sizeof *begin);
    for (uint32_t i = 0; i < n; i++) begin[group[i] + 1]++;
    for (uint32_t c = 0; c < k; c++) begin[c + 1] += begin[c];
    memcpy(scratch, ids, n * sizeof *ids);
    for (uint32_t i = 0; i < n; i++) ids[begin[group[i]]++] = scratch[i];
    for (uint32_t c = k; c > 0; c--) begin[c] = begin[c - 1];
    begin[0] = 0;
}

/* Halves ids: by two means, or in the middle of their order where that is too uneven (keys that
 * coincide). Returns the length of the first half. */
static loci_status halve(const loci_points *points, uint32_t *ids, uint32_t n, uint32_t *group,
                         uint32_t *scratch, uint32_t *half, loci_error *err) {
    LOCI_TRY(loci_kmeans(points, ids, n, 2, LOCI_HALVE_ROUNDS, 0, NULL, group, err));
    uint32_t begin[3];
    loci_group(ids, group, n, 2, begin, scratch);
    *half = loci_half(begin[1], n);
    return LOCI_OK;
}

loci_status loci_kmeans_cut(const loci_points *points, uint32_t *ids, uint32_t n, uint32_t cap,
                            uint32_t *ends, uint32_t *count, loci_error *err) {
    if (n == 0) return LOCI_OK;
    uint32_t base = *count ? ends[*count - 1] : 0;
    if (n <= cap) {
        ends[(*count)++] = base + n;
        return LOCI_OK;
    }
    /* A stack of the ends of runs still to be cut; the first is cut first. Each cut leaves at
     * least an eighth, so the stack holds at most log(n) / log(8 / 7) + 1 < 96 entries. */
    uint32_t stack[96], depth = 1, begin = 0;
    stack[0] = n;
    uint32_t *group = malloc(2 * (size_t)n * sizeof *group);
    if (!group) return loci_fail(err, LOCI_E_NOMEM, "no memory to cut %u keys", n);
    loci_status status = LOCI_OK;
    while (depth > 0) {
        uint32_t length = stack[depth - 1] - begin;
        if (length <= cap) {
            begin = stack[--depth];
            ends[(*count)++] = base + begin;
            continue;
        }
        uint32_t half = 0;
        LOCI_TRY_GOTO(halve(points, ids + begin, length, group, group + n, &half, err), out);
        LOCI_ASSERT(depth < 96);
        stack[depth++] = begin + half;
    }
out:
    free(group);
    return status;
}
