/* SPDX-License-Identifier: Apache-2.0
 *
 * Builds the blob of one pair: keys -> clusters -> nodes, codes, hashes and KV, in two halves: the
 * first ends with the clusters (cluster.h), the second writes the blob, so that one pair may be
 * written while the next is clustered. Bytes depend on the arguments only, not on who clusters.
 * Rows that are kept as int8 are taken as they will be read back (index.h).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attention/cluster.h"
#include "attention/index_layout.h"
#include "attention/sketch.h"
#include "base/pool.h"

#define KEY_MOST                                                                   \
    0x5863u /* the bf16 below 1e15: far beyond any model's; keeps squares and sums \
             * finite in f32 */
#define ROUNDS_DEFAULT 6
#define ROWS_CHUNK 4096u /* rows of one task */
#define LARGE_PAGE ((size_t)2 << 20)
#define CLEAR_CHUNK LARGE_PAGE
/* Codes reach 2.7 standard deviations: cutting the rare outliers costs less than the coarser
 * steps that covering them would need. */
#define CODE_REACH 2.7

typedef struct build_root {
    uint32_t begin, count;      /* ids */
    uint32_t leaf_base, leaves; /* index of the first, and number */
    uint64_t block;             /* where its block begins */
} build_root;

/* Of the channels of some rows. */
typedef struct channel_sums {
    double sum[LOCI_HEAD_DIM_MAX], squares[LOCI_HEAD_DIM_MAX];
    float top[LOCI_HEAD_DIM_MAX];
    bool odd; /* some key or value is not finite */
} channel_sums;

typedef struct loci_pair_job {
    const uint16_t *k, *v;
    const uint32_t *slots;
    uint32_t tokens, dim;
    loci_pair_build_options options;
    const loci_corpus_kernels *kernels;
    loci_pool *pool;
    float *mean, *scale; /* [dim] */
    float *x; /* [tokens][dim] keys less mean; in the end also less their root's centroid */
    loci_clusters clusters;
    const uint32_t *ids, *leaf_ends; /* of the clusters */
    build_root *roots;               /* [root_count] */
    uint32_t leaf_count, root_count;
    channel_sums *sums; /* [row_chunks], while keys are centred */
    uint8_t *blob;
    uint64_t blob_bytes;
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
    loci_pool_run(b->pool, count, run_task, &task);
}

static size_t row_chunks(const build *b) {
    return (b->tokens + ROWS_CHUNK - 1) / ROWS_CHUNK;
}

static loci_status check_stop(const build *b, loci_error *err) {
    loci_status status = loci_cancel_check(b->options.cancel);
    if (status == LOCI_OK) return LOCI_OK;
    return loci_fail(err, status, "indexing %u tokens was stopped", b->tokens);
}

/* NaN is above the limit, too. */
static bool is_finite(uint16_t value) {
    return (value & 0x7fffu) <= KEY_MOST;
}

static loci_status check_shape(const build *b, loci_error *err) {
    if (b->tokens == 0 || b->tokens > LOCI_EXTENT_TOKENS_MAX)
        return loci_fail(err, LOCI_E_INVAL, "an extent holds 1 to %u tokens, not %u",
                         LOCI_EXTENT_TOKENS_MAX, b->tokens);
    if (b->dim == 0 || b->dim > LOCI_HEAD_DIM_MAX || b->dim % 16 != 0)
        return loci_fail(err, LOCI_E_INVAL, "head_dim %u is not a multiple of 16 up to %u", b->dim,
                         LOCI_HEAD_DIM_MAX);
    return LOCI_OK;
}

static loci_status no_memory(const build *b, loci_error *err) {
    return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", b->tokens);
}

/* Memory that is walked in any order: in large pages where the system gives them. */
static void *alloc_large(size_t bytes) {
    void *memory = NULL;
    if (bytes < 4 * LARGE_PAGE) return malloc(bytes);
    if (posix_memalign(&memory, LARGE_PAGE, bytes) != 0) return NULL;
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static loci_status alloc_all(build *b, loci_error *err) {
    size_t n = b->tokens;
    b->mean = calloc(2 * b->dim, sizeof *b->mean);
    b->scale = b->mean ? b->mean + b->dim : NULL;
    b->x = alloc_large(n * b->dim * sizeof *b->x);
    b->sums = malloc(row_chunks(b) * sizeof *b->sums);
    b->clusters.ids = malloc(n * sizeof *b->clusters.ids);
    b->clusters.leaf_ends = malloc(n * sizeof *b->clusters.leaf_ends);
    b->clusters.root_leaves = malloc(n * sizeof *b->clusters.root_leaves);
    if (b->mean && b->x && b->sums && b->clusters.ids && b->clusters.leaf_ends &&
        b->clusters.root_leaves)
        return LOCI_OK;
    return no_memory(b, err);
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

static size_t chunk_end(const build *b, size_t index) {
    return (index + 1) * ROWS_CHUNK < b->tokens ? (index + 1) * ROWS_CHUNK : b->tokens;
}

/* Sums of some rows' keys, in their order; and whether they and the values are finite. */
static void sum_keys(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    channel_sums *sums = &b->sums[index];
    size_t begin = index * ROWS_CHUNK, end = chunk_end(b, index);
    int16_t top = 0; /* of numbers without their sign, which are in the order of their bits */
    for (size_t i = begin * b->dim; i < end * b->dim; i++) {
        int16_t k = (int16_t)(b->k[i] & 0x7fffu), v = (int16_t)(b->v[i] & 0x7fffu);
        int16_t more = k > v ? k : v;
        top = more > top ? more : top;
    }
    memset(sums, 0, sizeof *sums);
    sums->odd = !is_finite((uint16_t)top);
    for (size_t t = begin; t < end && !sums->odd; t++) {
        float row[LOCI_HEAD_DIM_MAX];
        read_row(b, b->k, t, row);
        for (uint32_t i = 0; i < b->dim; i++) sums->sum[i] += (double)row[i];
    }
}

/* Keys less their mean. */
static void centre_rows(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    channel_sums *sums = &b->sums[index];
    for (size_t t = index * ROWS_CHUNK; t < chunk_end(b, index); t++) {
        float row[LOCI_HEAD_DIM_MAX], *x = b->x + t * b->dim;
        read_row(b, b->k, t, row);
        for (uint32_t i = 0; i < b->dim; i++) {
            float value = row[i] - b->mean[i];
            x[i] = value;
            sums->squares[i] += (double)value * (double)value;
            sums->top[i] = fabsf(value) > sums->top[i] ? fabsf(value) : sums->top[i];
        }
    }
}

static loci_status check_finite(const build *b, loci_error *err) {
    bool odd = false;
    for (size_t c = 0; c < row_chunks(b); c++) odd = odd || b->sums[c].odd;
    for (size_t i = 0; odd; i++) {
        bool key = is_finite(b->k[i]);
        if (!key || !is_finite(b->v[i]))
            return loci_fail(err, LOCI_E_INVAL, "%s of token %zu, channel %zu is not finite",
                             key ? "value" : "key", i / b->dim, i % b->dim);
    }
    return LOCI_OK;
}

/* Keys less their mean, and the code scale of each channel: sums are of double, first those of each
 * ROWS_CHUNK rows in order, then of these in order. */
static loci_status centre_keys(build *b, loci_error *err) {
    for_each(b, row_chunks(b), sum_keys);
    LOCI_TRY(check_stop(b, err));
    LOCI_TRY(check_finite(b, err));
    for (uint32_t i = 0; i < b->dim; i++) {
        double sum = 0.0;
        for (size_t c = 0; c < row_chunks(b); c++) sum += b->sums[c].sum[i];
        b->mean[i] = (float)(sum / b->tokens);
    }
    for_each(b, row_chunks(b), centre_rows);
    LOCI_TRY(check_stop(b, err));
    for (uint32_t i = 0; i < b->dim; i++) {
        double squares = 0.0;
        float top = 0.0f;
        for (size_t c = 0; c < row_chunks(b); c++) {
            squares += b->sums[c].squares[i];
            top = b->sums[c].top[i] > top ? b->sums[c].top[i] : top;
        }
        float reach = (float)(CODE_REACH * sqrt(squares / b->tokens));
        b->scale[i] = (reach < top ? reach : top) / 7.5f;
    }
    free(b->sums);
    b->sums = NULL;
    return LOCI_OK;
}

/* By the backend if it has a way, and memory for it; else on the CPU, with the same result. */
static loci_status cluster(build *b, loci_error *err) {
    loci_backend *backend = b->options.backend;
    loci_keys keys = {b->x, b->tokens, b->dim, b->options.iterations, b->options.cancel};
    loci_status status = LOCI_E_NOMEM;
    if (backend && backend->ops->cluster_keys)
        status = backend->ops->cluster_keys(backend, &keys, &b->clusters, err);
    if (status != LOCI_E_NOMEM) return status;
    return loci_cluster_keys(&keys, b->options.isa, b->pool, &b->clusters, err);
}

/* Roots of no more leaves than fit. */
static loci_status make_roots(build *b, loci_error *err) {
    const loci_clusters *c = &b->clusters;
    uint32_t most = LOCI_ROOT_LEAVES_MAX, count = 0;
    for (uint32_t r = 0; r < c->roots; r++) count += (c->root_leaves[r] + most - 1) / most;
    b->ids = c->ids;
    b->leaf_ends = c->leaf_ends;
    b->leaf_count = c->leaves;
    b->roots = malloc(count * sizeof *b->roots);
    if (!b->roots) return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", b->tokens);
    for (uint32_t r = 0, first = 0; r < c->roots; first += c->root_leaves[r++]) {
        uint32_t leaves = c->root_leaves[r], pieces = (leaves + most - 1) / most;
        for (uint32_t p = 0; p < pieces; p++) {
            uint32_t from = first + p * leaves / pieces, to = first + (p + 1) * leaves / pieces;
            uint32_t token = from ? b->leaf_ends[from - 1] : 0;
            b->roots[b->root_count++] =
                (build_root){token, b->leaf_ends[to - 1] - token, from, to - from, 0};
        }
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
    const float *x = b->x + (size_t)id * b->dim, *scale = b->scale;
    int32_t value[LOCI_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < b->dim; i++) {
        float level = x[i] / (scale[i] > 0.0f ? scale[i] : INFINITY) + 8.0f;
        level = level < 0.0f ? 0.0f : level;
        value[i] = (int32_t)(level > 15.0f ? 15.0f : level);
    }
    for (uint32_t i = 0; i < b->dim; i += 2) code[i / 2] = (uint8_t)(value[i] | value[i + 1] << 4);
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

/* The rows of a leaf's tokens stand anywhere: they are on their way while the leaf before is
 * written. */
static void prefetch_leaf(const build *b, uint32_t leaf) {
    for (uint32_t t = b->leaf_ends[leaf - 1]; t < b->leaf_ends[leaf]; t++) {
        size_t at = (size_t)b->ids[t] * b->dim;
        for (uint32_t i = 0; i < b->dim; i += 16) __builtin_prefetch(b->x + at + i);
        for (uint32_t i = 0; i < b->dim; i += 32) {
            __builtin_prefetch(b->k + at + i);
            __builtin_prefetch(b->v + at + i);
        }
    }
}

/* What the keys of a root differ from its centroid as stored: that is all that is asked for after
 * their codes are written. */
static void leave_residual(build *b, const build_root *root, const loci_node *node) {
    float centroid[LOCI_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < b->dim; i++)
        centroid[i] = node->centroid_scale * (float)loci_node_centroid(node)[i];
    for (uint32_t t = root->begin; t < root->begin + root->count; t++) {
        float *x = b->x + (size_t)b->ids[t] * b->dim;
        for (uint32_t i = 0; i < b->dim; i++) x[i] -= centroid[i];
    }
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
        if (leaf + 1 < b->leaf_count) prefetch_leaf(b, leaf + 1);
        write_leaf(b, leaf, first, b->ids + first, b->leaf_ends[leaf] - first, &leaves[l]);
    }
    size_t stride = loci_node_stride(b->dim);
    loci_root *root = (loci_root *)(void *)(b->blob + header->roots_at) + index;
    loci_node *node =
        (void *)(b->blob + header->roots_at + header->roots * sizeof *root + index * stride);
    uint16_t *mean = (void *)(b->blob + header->value_means_at + index * 2 * b->dim);
    write_node(b, b->ids + from->begin, from->count, node, mean);
    leave_residual(b, from, node);
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

/* All sections; the position codes first, since writing roots overwrites the keys. */
static loci_status write_sections(build *b, loci_pair_header *header, loci_error *err) {
    size_t blocks = (b->tokens + LOCI_POSITION_BLOCK - 1) / LOCI_POSITION_BLOCK;
    float *means = (void *)(b->blob + sizeof *header);
    memcpy(means, b->mean, 2 * b->dim * sizeof *b->mean);
    if (b->options.position_codes) {
        for_each(b, blocks, write_positions);
        header->hash_position_hashes =
            loci_hash_bytes(b->blob + header->position_hashes_at, blocks * sizeof(uint64_t));
    }
    for_each(b, b->root_count, write_root);
    LOCI_TRY(check_stop(b, err));
    loci_sketch_train(b->x, b->tokens, b->dim, b->kernels, b->pool, means + 2 * b->dim, b->word);
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

/* What stands between the sections is written, too. */
static void clear_blob(void *arg, size_t index, unsigned thread) {
    (void)thread;
    build *b = arg;
    size_t begin = index * CLEAR_CHUNK, left = b->blob_bytes - begin;
    memset(b->blob + begin, 0, left < CLEAR_CHUNK ? left : CLEAR_CHUNK);
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
    b->blob_bytes = header.blob_bytes;
    b->blob = alloc_large(header.blob_bytes);
    b->word = malloc((size_t)b->tokens * loci_sketch_parts(b->dim));
    if (!b->blob || !b->word) return no_memory(b, err);
    for_each(b, (b->blob_bytes + CLEAR_CHUNK - 1) / CLEAR_CHUNK, clear_blob);
    LOCI_TRY(check_stop(b, err));
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
    if (loci_buf_status(out) != LOCI_OK) return no_memory(b, err);
    return LOCI_OK;
}

void loci_pair_job_free(loci_pair_job *job) {
    if (!job) return;
    free(job->mean);
    free(job->x);
    free(job->sums);
    free(job->clusters.ids);
    free(job->clusters.leaf_ends);
    free(job->clusters.root_leaves);
    free(job->roots);
    free(job->blob);
    free(job->word);
    free(job);
}

static loci_status begin(build *b, loci_error *err) {
    loci_cpu_isa isa;
    LOCI_TRY(check_shape(b, err));
    LOCI_TRY(loci_cpu_isa_detect(b->options.isa, &isa, err));
    b->kernels = loci_corpus_kernels_of(isa);
    LOCI_TRY(alloc_all(b, err));
    LOCI_TRY(centre_keys(b, err));
    LOCI_TRY(cluster(b, err));
    return make_roots(b, err);
}

loci_status loci_pair_begin(const loci_pair_rows *rows, const loci_pair_build_options *options,
                            loci_pool *pool, loci_pair_job **out, loci_error *err) {
    build *b = calloc(1, sizeof *b);
    if (!b) return loci_fail(err, LOCI_E_NOMEM, "no memory to index %u tokens", rows->tokens);
    *b = (build){.k = rows->k,
                 .v = rows->v,
                 .slots = rows->slots,
                 .tokens = rows->tokens,
                 .dim = rows->head_dim,
                 .options = *options,
                 .pool = pool};
    if (b->options.iterations == 0) b->options.iterations = ROUNDS_DEFAULT;
    loci_status status = begin(b, err);
    if (status != LOCI_OK) loci_pair_job_free(b);
    *out = status == LOCI_OK ? b : NULL;
    return status;
}

loci_status loci_pair_finish(loci_pair_job *job, loci_buf *out, uint64_t *header_hash,
                             loci_error *err) {
    loci_status status = write_blob(job, out, header_hash, err);
    loci_pair_job_free(job);
    return status;
}

loci_status loci_pair_build(const uint16_t *k, const uint16_t *v, const uint32_t *slots_of_position,
                            uint32_t tokens, uint32_t head_dim,
                            const loci_pair_build_options *options, loci_pool *pool, loci_buf *out,
                            uint64_t *header_hash, loci_error *err) {
    loci_pair_rows rows = {k, v, slots_of_position, tokens, head_dim};
    loci_pair_job *job = NULL;
    LOCI_TRY(loci_pair_begin(&rows, options, pool, &job, err));
    return loci_pair_finish(job, out, header_hash, err);
}
