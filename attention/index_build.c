/* SPDX-License-Identifier: Apache-2.0
 *
 * Builds the blob of one pair: keys -> roots -> leaves -> nodes, codes, hashes and KV.
 *
 * Keys are clustered into roots and the keys of each root into leaves. (Rounds of every key against
 * every leaf would tighten the leaves, by an eighth of their variance, but loosen the roots, of
 * which a third more must then be read.) Groups that are too large are cut in two. Bytes depend on
 * the arguments only. Rows that are kept as int8 are taken as they will be read back (index.h).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/index_layout.h"
#include "attention/kmeans.h"
#include "attention/sketch.h"
#include "base/pool.h"

#define KEY_LIMIT 1e15f /* far beyond any model's; keeps squares and sums finite in f32 */
/* Half more than a root's share: with leaves of 16 it stays below LOCI_ROOT_LEAVES_MAX leaves. */
#define ROOT_TOKENS (LOCI_LEAF_TOKENS * LOCI_ROOT_LEAVES)
#define ROOT_TOKENS_MAX (ROOT_TOKENS * 3 / 2)
#define ROOT_ROUNDS 10
#define ROOT_SAMPLE 64u /* keys a root on which the roots' centroids are trained */
#define ROUNDS_DEFAULT 6
/* Codes reach 2.7 standard deviations: cutting the rare outliers costs less than the coarser
 * steps that covering them would need. */
#define CODE_REACH 2.7

typedef struct build_root {
    uint32_t begin, count;      /* ids */
    uint32_t leaf_base, leaves; /* index of the first, and number */
    uint64_t block;             /* where its block begins */
} build_root;

typedef struct build {
    const uint16_t *k, *v;
    const uint32_t *slots;
    uint32_t tokens, dim;
    loci_pair_build_options options;
    loci_pool *pool;
    float *mean, *scale; /* [dim] */
    float *x;      /* [tokens][dim] keys less mean; in the end also less their root's centroid */
    uint32_t *ids; /* [tokens] */
    uint32_t *leaf_ends; /* [leaf_count]: ends of leaves among ids */
    build_root *roots;   /* [root_count]; room for one a token */
    /* While clustering. */
    loci_points points;
    uint8_t *code;            /* [tokens][dim] */
    float *length;            /* [tokens] */
    uint32_t *group;          /* [tokens]: root, then leaf of each of ids */
    uint32_t *scratch;        /* [2 tokens + 2] */
    loci_status *root_status; /* [root_count] of first_leaves */
    uint32_t leaf_count, root_count;
    uint8_t *blob;
    uint8_t *word; /* [tokens][parts] codewords */
} build;

typedef struct build_task {
    build *b;
    loci_pool_fn fn;
} build_task;

static void run_task(void *arg, size_t index, unsigned thread) {
    const build_task *task = arg;
    if (loci_cancel_check(task->b->options.cancel) == LOCI_OK) task->fn(task->b, index, thread);
}

/* Leaves out what is left when the build is cancelled, which check_stop must be asked after. */
static void for_each(build *b, size_t count, loci_pool_fn fn) {
    build_task task = {b, fn};
    if (b->pool) {
        loci_pool_run(b->pool, count, run_task, &task);
    } else {
        for (size_t i = 0; i < count; i++) run_task(&task, i, 0);
    }
}

static loci_status check_stop(const build *b, loci_error *err) {
    loci_status status = loci_cancel_check(b->options.cancel);
    if (status == LOCI_OK) return LOCI_OK;
    return loci_fail(err, status, "indexing %u tokens was stopped", b->tokens);
}

static loci_status check_input(const build *b, loci_error *err) {
    if (b->tokens == 0 || b->tokens > LOCI_EXTENT_TOKENS_MAX)
        return loci_fail(err, LOCI_E_INVAL, "an extent holds 1 to %u tokens, not %u",
                         LOCI_EXTENT_TOKENS_MAX, b->tokens);
    if (b->dim == 0 || b->dim > LOCI_HEAD_DIM_MAX || b->dim % 16 != 0)
        return loci_fail(err, LOCI_E_INVAL, "head_dim %u is not a multiple of 16 up to %u", b->dim,
                         LOCI_HEAD_DIM_MAX);
    size_t values = (size_t)b->tokens * b->dim;
    for (size_t i = 0; i < values; i++) {
        /* Written so that NaN fails too. */
        bool key = fabsf(loci_bf16_to_f32(b->k[i])) < KEY_LIMIT;
        bool value = fabsf(loci_bf16_to_f32(b->v[i])) < KEY_LIMIT;
        if (!key || !value)
            return loci_fail(err, LOCI_E_INVAL, "%s of token %zu, channel %zu is not finite",
                             key ? "value" : "key", i / b->dim, i % b->dim);
    }
    return LOCI_OK;
}

static loci_status alloc_all(build *b, loci_error *err) {
    size_t n = b->tokens, values = n * b->dim;
    b->mean = calloc(2 * b->dim, sizeof *b->mean);
    b->scale = b->mean ? b->mean + b->dim : NULL;
    b->x = malloc(values * sizeof *b->x);
    b->code = malloc(values);
    b->length = malloc(n * sizeof *b->length);
    b->ids = malloc(n * sizeof *b->ids);
    b->group = malloc(n * sizeof *b->group);
    b->scratch = malloc((2 * n + 2) * sizeof *b->scratch);
    b->leaf_ends = malloc(n * sizeof *b->leaf_ends);
    b->roots = malloc(n * sizeof *b->roots);
    if (b->mean && b->x && b->code && b->length && b->ids && b->group && b->scratch &&
        b->leaf_ends && b->roots)
        return LOCI_OK;
    return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", b->tokens);
}

/* What only clustering needs: it is not there beside the blob. */
static void free_clustering(build *b) {
    free(b->code);
    free(b->length);
    free(b->group);
    free(b->scratch);
    b->code = NULL;
    b->length = NULL;
    b->group = b->scratch = NULL;
}

static int compare_ids(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Row `id` of K or V as it will be read from the blob. */
static void read_row(const build *b, const uint16_t *rows, size_t id, float *out) {
    const uint16_t *row = rows + id * b->dim;
    uint16_t restored[LOCI_HEAD_DIM_MAX];
    int8_t quantised[LOCI_HEAD_DIM_MAX];
    if (b->options.kv_int8) {
        uint16_t most = loci_kv_quantise(quantised, row, b->dim);
        loci_kv_restore(restored, quantised, most, b->dim);
        row = restored;
    }
    for (uint32_t i = 0; i < b->dim; i++) out[i] = loci_bf16_to_f32(row[i]);
}

/* Mean and code scale of each channel, in double and in position order. */
static void centre_keys(build *b) {
    double sum[LOCI_HEAD_DIM_MAX] = {0}, squares[LOCI_HEAD_DIM_MAX] = {0};
    float top[LOCI_HEAD_DIM_MAX] = {0};
    size_t dim = b->dim;
    for (size_t t = 0; t < b->tokens; t++) {
        float *row = b->x + t * dim;
        read_row(b, b->k, t, row);
        for (size_t i = 0; i < dim; i++) sum[i] += (double)row[i];
    }
    for (size_t i = 0; i < dim; i++) b->mean[i] = (float)(sum[i] / b->tokens);
    for (size_t t = 0; t < b->tokens; t++) {
        for (size_t i = 0; i < dim; i++) {
            float x = b->x[t * dim + i] - b->mean[i];
            b->x[t * dim + i] = x;
            squares[i] += (double)x * (double)x;
            top[i] = fabsf(x) > top[i] ? fabsf(x) : top[i];
        }
    }
    for (size_t i = 0; i < dim; i++) {
        float reach = (float)(CODE_REACH * sqrt(squares[i] / b->tokens));
        b->scale[i] = (reach < top[i] ? reach : top[i]) / 7.5f;
    }
}

/* Clusters all keys into roots. */
static loci_status make_roots(build *b, uint32_t *group, loci_error *err) {
    uint32_t n = b->tokens, k = (n + ROOT_TOKENS - 1) / ROOT_TOKENS, sample = k * ROOT_SAMPLE;
    uint32_t *begin = b->scratch + n, *ends = group; /* ends: when group is done with */
    for (uint32_t i = 0; i < n; i++) b->ids[i] = i;
    LOCI_TRY(loci_kmeans(&b->points, b->ids, n, k, ROOT_ROUNDS, sample, b->pool, group, err));
    loci_group(b->ids, group, n, k, begin, b->scratch);
    for (uint32_t c = 0; c < k; c++)
        LOCI_TRY(loci_kmeans_cut(&b->points, b->ids + begin[c], begin[c + 1] - begin[c],
                                 ROOT_TOKENS_MAX, ends, &b->root_count, err));
    for (uint32_t i = 0; i < b->root_count; i++) {
        uint32_t from = i ? ends[i - 1] : 0, count = ends[i] - from;
        uint32_t base = i ? b->roots[i - 1].leaf_base + b->roots[i - 1].leaves : 0;
        uint32_t leaves = (count + LOCI_LEAF_TOKENS - 1) / LOCI_LEAF_TOKENS;
        b->roots[i] = (build_root){from, count, base, leaves, 0};
    }
    return LOCI_OK;
}

/* Clusters the keys of one root into leaves, numbered through all roots. */
static void first_leaves(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const build_root *root = &b->roots[index];
    uint32_t *group = b->group + root->begin;
    b->root_status[index] = loci_kmeans(&b->points, b->ids + root->begin, root->count, root->leaves,
                                        b->options.iterations, 0, NULL, group, NULL);
    for (uint32_t i = 0; i < root->count; i++) group[i] += root->leaf_base;
}

/* Sorts the keys by leaf and cuts leaves that are too large. A leaf stays under the root that it
 * was made for; a root with more leaves than fit becomes several. */
static loci_status final_leaves(build *b, uint32_t leaves, loci_error *err) {
    uint32_t roots = b->root_count, made = 0;
    uint32_t *begin = malloc((leaves + 1) * sizeof *begin);
    build_root *before = malloc(roots * sizeof *before);
    loci_status status = LOCI_OK;
    if (!begin || !before) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", b->tokens);
        goto out;
    }
    memcpy(before, b->roots, roots * sizeof *before);
    loci_group(b->ids, b->group, b->tokens, leaves, begin, b->scratch);
    for (uint32_t r = 0; r < roots; r++) {
        uint32_t first = b->leaf_count;
        for (uint32_t c = before[r].leaf_base; c < before[r].leaf_base + before[r].leaves; c++)
            LOCI_TRY_GOTO(loci_kmeans_cut(&b->points, b->ids + begin[c], begin[c + 1] - begin[c],
                                          LOCI_LEAF_TOKENS_MAX, b->leaf_ends, &b->leaf_count, err),
                          out);
        uint32_t count = b->leaf_count - first;
        uint32_t pieces = (count + LOCI_ROOT_LEAVES_MAX - 1) / LOCI_ROOT_LEAVES_MAX;
        for (uint32_t p = 0; p < pieces; p++) {
            uint32_t from = first + p * count / pieces, to = first + (p + 1) * count / pieces;
            uint32_t token = from ? b->leaf_ends[from - 1] : 0;
            b->roots[made++] =
                (build_root){token, b->leaf_ends[to - 1] - token, from, to - from, 0};
        }
    }
    b->root_count = made;
out:
    free(begin);
    free(before);
    return status;
}

static loci_status cluster(build *b, loci_error *err) {
    LOCI_TRY(make_roots(b, b->group, err));
    b->root_status = calloc(b->root_count, sizeof *b->root_status);
    if (!b->root_status)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", b->tokens);
    for_each(b, b->root_count, first_leaves);
    LOCI_TRY(check_stop(b, err));
    for (uint32_t i = 0; i < b->root_count; i++)
        if (b->root_status[i] != LOCI_OK)
            return loci_fail(err, b->root_status[i], "no memory to index %u tokens", b->tokens);
    const build_root *last = &b->roots[b->root_count - 1];
    LOCI_TRY(final_leaves(b, last->leaf_base + last->leaves, err));
    for (uint32_t l = 0; l < b->leaf_count; l++) {
        uint32_t from = l ? b->leaf_ends[l - 1] : 0;
        qsort(b->ids + from, b->leaf_ends[l] - from, sizeof *b->ids, compare_ids);
    }
    return LOCI_OK;
}

/* Centroid and variance of keys, and the mean of their values. */
static void write_node(const build *b, const uint32_t *ids, uint32_t count, loci_node *node,
                       uint16_t *value_mean) {
    uint32_t dim = b->dim;
    float centroid[LOCI_HEAD_DIM_MAX] = {0}, variance[LOCI_HEAD_DIM_MAX] = {0};
    float value[LOCI_HEAD_DIM_MAX] = {0}, row[LOCI_HEAD_DIM_MAX];
    for (uint32_t t = 0; t < count; t++) {
        read_row(b, b->v, ids[t], row);
        for (uint32_t i = 0; i < dim; i++) {
            centroid[i] += b->x[(size_t)ids[t] * dim + i];
            value[i] += row[i];
        }
    }
    float share = 1.0f / (float)count, centroid_top = 0.0f, variance_top = 0.0f;
    for (uint32_t i = 0; i < dim; i++) {
        centroid[i] *= share;
        value_mean[i] = loci_f32_to_bf16(value[i] * share);
    }
    for (uint32_t t = 0; t < count; t++) {
        for (uint32_t i = 0; i < dim; i++) {
            float off = b->x[(size_t)ids[t] * dim + i] - centroid[i];
            variance[i] += off * off;
        }
    }
    for (uint32_t i = 0; i < dim; i++) {
        variance[i] *= share;
        centroid_top = fabsf(centroid[i]) > centroid_top ? fabsf(centroid[i]) : centroid_top;
        variance_top = variance[i] > variance_top ? variance[i] : variance_top;
    }
    node->centroid_scale = centroid_top / 127.0f;
    node->variance_scale = variance_top / 255.0f;
    int8_t *c = (int8_t *)(node + 1);
    uint8_t *s = (uint8_t *)(node + 1) + dim;
    for (uint32_t i = 0; i < dim; i++) {
        c[i] = (int8_t)(centroid_top > 0.0f ? rintf(centroid[i] / centroid_top * 127.0f) : 0.0f);
        s[i] = (uint8_t)(variance_top > 0.0f ? rintf(variance[i] / variance_top * 255.0f) : 0.0f);
    }
}

static void write_code(const build *b, uint32_t id, uint8_t *code) {
    const float *x = b->x + (size_t)id * b->dim;
    for (uint32_t i = 0; i < b->dim; i += 2) {
        uint32_t pair = 0;
        for (uint32_t j = 0; j < 2; j++) {
            float scale = b->scale[i + j];
            float level = scale > 0.0f ? floorf(x[i + j] / scale + 8.0f) : 8.0f;
            uint32_t value = level < 0.0f ? 0u : level > 15.0f ? 15u : (uint32_t)level;
            pair |= value << (4 * j);
        }
        code[i / 2] = (uint8_t)pair;
    }
}

static void write_kv(const build *b, uint32_t id, uint8_t *to) {
    size_t dim = b->dim;
    const uint16_t *k = b->k + id * dim, *v = b->v + id * dim;
    if (b->options.kv_int8) {
        int8_t *row = (int8_t *)to;
        uint16_t *most = (void *)(to + 2 * dim);
        most[0] = loci_kv_quantise(row, k, b->dim);
        most[1] = loci_kv_quantise(row + dim, v, b->dim);
    } else {
        memcpy(to, k, dim * sizeof *k);
        memcpy(to + dim * sizeof *k, v, dim * sizeof *v);
    }
}

/* Node, records and KV of one leaf; ids are its tokens. Their hashes come last. */
static void write_leaf(const build *b, uint32_t leaf_index, uint32_t first_slot,
                       const uint32_t *ids, uint32_t count, loci_leaf *leaf) {
    const loci_pair_header *header = loci_pair_header_of(b->blob);
    loci_node *node =
        (void *)(b->blob + header->leaf_nodes_at + leaf_index * loci_node_stride(b->dim));
    uint16_t *mean = (void *)(b->blob + header->value_means_at +
                              ((size_t)header->roots + leaf_index) * 2 * b->dim);
    write_node(b, ids, count, node, mean);
    leaf->begin = first_slot;
    leaf->count = count;
    size_t stride = loci_pair_kv_stride(b->blob);
    uint16_t *segments = (uint16_t *)(uintptr_t)loci_slot_segments(b->blob);
    for (uint32_t t = 0; t < count; t++) {
        uint8_t *record =
            b->blob + header->records_at + (size_t)(first_slot + t) * loci_record_stride(b->dim);
        write_code(b, ids[t], record);
        memcpy(record + b->dim / 2, &b->slots[ids[t]], sizeof b->slots[ids[t]]);
        segments[first_slot + t] = (uint16_t)LOCI_SLOT_SEGMENT(b->slots[ids[t]]);
        write_kv(b, ids[t], b->blob + header->kv_at + (first_slot + t) * stride);
    }
}

static loci_leaf *block_of(const build *b, const build_root *root) {
    return (void *)(b->blob + loci_pair_header_of(b->blob)->blocks_at + root->block);
}

/* All of one root but its sketches. */
static void write_root(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const build_root *from = &b->roots[index];
    const loci_pair_header *header = loci_pair_header_of(b->blob);
    loci_leaf *leaves = block_of(b, from);
    for (uint32_t l = 0; l < from->leaves; l++) {
        uint32_t leaf = from->leaf_base + l, first = leaf ? b->leaf_ends[leaf - 1] : 0;
        write_leaf(b, leaf, first, b->ids + first, b->leaf_ends[leaf] - first, &leaves[l]);
    }
    size_t stride = loci_node_stride(b->dim);
    loci_root *root = (loci_root *)(void *)(b->blob + header->roots_at) + index;
    loci_node *node =
        (void *)(b->blob + header->roots_at + header->roots * sizeof *root + index * stride);
    uint16_t *mean = (void *)(b->blob + header->value_means_at + index * 2 * b->dim);
    write_node(b, b->ids + from->begin, from->count, node, mean);
    *root = (loci_root){
        .begin = from->leaf_base,
        .count = from->leaves,
        .tokens = from->count,
        .block = (uint32_t)(from->block / 8),
        .hash_nodes =
            loci_hash_bytes(loci_pair_leaf_node(b->blob, from->leaf_base), from->leaves * stride),
        .hash_values =
            loci_hash_bytes(loci_pair_value_mean(b->blob, header->roots + from->leaf_base),
                            (size_t)from->leaves * 2 * b->dim),
    };
}

/* What the keys of one root differ from its centroid as stored. */
static void leave_residual(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const build_root *from = &b->roots[index];
    const loci_node *node = loci_pair_root_node(b->blob, (uint32_t)index);
    for (uint32_t t = from->begin; t < from->begin + from->count; t++)
        for (uint32_t i = 0; i < b->dim; i++)
            b->x[(size_t)b->ids[t] * b->dim + i] -=
                node->centroid_scale * (float)loci_node_centroid(node)[i];
}

static void write_sketches(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const build_root *from = &b->roots[index];
    loci_root *root =
        (loci_root *)(void *)(b->blob + loci_pair_header_of(b->blob)->roots_at) + index;
    loci_leaf *leaves = block_of(b, from);
    loci_sketch_pack((uint8_t *)(leaves + from->leaves), b->word, b->ids + from->begin, from->count,
                     b->dim);
    root->hash_block = loci_hash_bytes(leaves, loci_block_bytes(b->dim, from->leaves, from->count));
}

/* The checks of the records and of K and V of one root's slots; they need the hash of the roots. */
static void write_checks(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const loci_pair_header *header = loci_pair_header_of(b->blob);
    const build_root *from = &b->roots[index];
    uint64_t *hashes = (uint64_t *)(void *)(b->blob + header->kv_hashes_at);
    for (uint32_t slot = from->begin; slot < from->begin + from->count; slot++) {
        uint32_t check = loci_record_check(b->blob, slot);
        uint8_t *end = b->blob + header->records_at + (slot + 1ull) * loci_record_stride(b->dim);
        memcpy(end - sizeof check, &check, sizeof check);
        hashes[slot] = loci_kv_hash(b->blob, slot);
    }
}

static void write_kv_block(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const build *b = arg;
    loci_kv_block *blocks = (loci_kv_block *)(uintptr_t)loci_pair_kv_block(b->blob, 0);
    blocks[index].hash_kv = loci_kv_block_hash(b->blob, (uint32_t)index);
    blocks[index].hash_segments = loci_kv_block_segments_hash(b->blob, (uint32_t)index);
}

static void write_positions(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    const loci_pair_header *header = loci_pair_header_of(b->blob);
    uint32_t begin = (uint32_t)index * LOCI_POSITION_BLOCK;
    uint32_t count =
        b->tokens - begin < LOCI_POSITION_BLOCK ? b->tokens - begin : LOCI_POSITION_BLOCK;
    uint8_t *codes = b->blob + header->position_codes_at + (size_t)begin * (b->dim / 2);
    for (uint32_t t = 0; t < count; t++) write_code(b, begin + t, codes + (size_t)t * (b->dim / 2));
    uint64_t *hashes = (void *)(b->blob + header->position_hashes_at);
    hashes[index] = loci_hash_bytes(codes, (size_t)count * (b->dim / 2));
}

static uint64_t place_blocks(build *b) {
    uint64_t end = 0;
    for (uint32_t i = 0; i < b->root_count; i++) {
        b->roots[i].block = end;
        end += loci_block_bytes(b->dim, b->roots[i].leaves, b->roots[i].count);
    }
    return end;
}

/* All sections; the sketches last, since they overwrite the keys. */
static loci_status write_sections(build *b, loci_pair_header *header, loci_error *err) {
    size_t blocks = (b->tokens + LOCI_POSITION_BLOCK - 1) / LOCI_POSITION_BLOCK;
    float *means = (void *)(b->blob + sizeof *header);
    memcpy(means, b->mean, 2 * b->dim * sizeof *b->mean);
    for_each(b, b->root_count, write_root);
    LOCI_TRY(check_stop(b, err));
    if (b->options.position_codes) {
        for_each(b, blocks, write_positions);
        header->hash_position_hashes =
            loci_hash_bytes(b->blob + header->position_hashes_at, blocks * sizeof(uint64_t));
    }
    for_each(b, b->root_count, leave_residual);
    LOCI_TRY(check_stop(b, err));
    loci_sketch_train(b->x, b->tokens, b->dim, b->pool, means + 2 * b->dim, b->word);
    for_each(b, b->root_count, write_sketches);
    header->hash_roots = loci_hash_bytes(
        b->blob + header->roots_at, header->roots * (sizeof(loci_root) + loci_node_stride(b->dim)));
    header->hash_root_values =
        loci_hash_bytes(b->blob + header->value_means_at, (size_t)header->roots * 2 * b->dim);
    memcpy(b->blob, header, sizeof *header);
    for_each(b, b->root_count, write_checks);
    for_each(b, loci_kv_blocks(b->tokens), write_kv_block);
    return check_stop(b, err); /* what was left out is nobody's to read */
}

static loci_status write_blob(build *b, loci_buf *out, uint64_t *header_hash, loci_error *err) {
    loci_pair_shape shape = {
        .head_dim = b->dim,
        .tokens = b->tokens,
        .leaves = b->leaf_count,
        .roots = b->root_count,
        .block_bytes = place_blocks(b),
        .position_codes = b->options.position_codes,
        .kv = b->options.kv_int8 ? LOCI_I8 : LOCI_BF16,
        .version = LOCI_PAIR_VERSION,
    };
    loci_pair_header header;
    loci_pair_layout(&shape, &header);
    /* Built apart: the place in *out need not be aligned. */
    b->blob = calloc(1, header.blob_bytes);
    b->word = malloc((size_t)b->tokens * loci_sketch_parts(b->dim));
    if (!b->blob || !b->word)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the index of %u tokens", b->tokens);
    memcpy(b->blob, &header, sizeof header);
    LOCI_TRY(write_sections(b, &header, err));
    *header_hash = loci_pair_header_hash(b->blob, b->dim);
    if (out->len == 0) { /* given away rather than copied */
        loci_buf_fini(out);
        *out = (loci_buf){b->blob, header.blob_bytes, header.blob_bytes, false};
        b->blob = NULL;
        return LOCI_OK;
    }
    loci_buf_append(out, b->blob, header.blob_bytes);
    if (loci_buf_status(out) != LOCI_OK)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the index of %u tokens", b->tokens);
    return LOCI_OK;
}

loci_status loci_pair_build(const uint16_t *k, const uint16_t *v, const uint32_t *slots_of_position,
                            uint32_t tokens, uint32_t head_dim,
                            const loci_pair_build_options *options, loci_pool *pool, loci_buf *out,
                            uint64_t *header_hash, loci_error *err) {
    build b = {.k = k,
               .v = v,
               .slots = slots_of_position,
               .tokens = tokens,
               .dim = head_dim,
               .options = *options,
               .pool = pool};
    if (b.options.iterations == 0) b.options.iterations = ROUNDS_DEFAULT;
    loci_cpu_isa isa;
    loci_status status;
    LOCI_TRY(check_input(&b, err));
    LOCI_TRY(loci_cpu_isa_detect(options->isa, &isa, err));
    LOCI_TRY_GOTO(alloc_all(&b, err), out);
    centre_keys(&b);
    loci_points_quantise(b.x, tokens, head_dim, b.code, b.length);
    b.points = (loci_points){
        b.x, b.code, b.length, head_dim, loci_corpus_kernels_of(isa), options->cancel};
    LOCI_TRY_GOTO(cluster(&b, err), out);
    free_clustering(&b);
    status = write_blob(&b, out, header_hash, err);
out:
    free(b.mean);
    free(b.x);
    free_clustering(&b);
    free(b.ids);
    free(b.leaf_ends);
    free(b.roots);
    free(b.root_status);
    free(b.blob);
    free(b.word);
    return status;
}
