/* SPDX-License-Identifier: Apache-2.0
 *
 * Layout, checks and whole-blob readers of the pair blob; see index_layout.h and index.h.
 */
#include "attention/index_layout.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL /* for records, where a call costs more than the hash */
#include <xxhash.h>

#include "base/pool.h"

#define READ_SLOTS 256u    /* of one task */
#define KV_LEAST 0x1p-100f /* so that a 127th of it has its full precision */

_Static_assert(sizeof(loci_node) == 8 && sizeof(loci_root) == 40 && sizeof(loci_leaf) == 8,
               "nodes, roots and leaves are a format");
_Static_assert(sizeof(loci_pair_header) == 144, "the header is a format");

static size_t header_bytes(uint32_t head_dim) {
    return sizeof(loci_pair_header) +
           sizeof(float) * (2u * (size_t)head_dim + loci_sketch_book(head_dim));
}

uint64_t loci_pair_header_hash(const uint8_t *blob, uint32_t head_dim) {
    return loci_hash_bytes(blob, header_bytes(head_dim));
}

static uint64_t place(uint64_t *end, uint64_t bytes) {
    uint64_t at = loci_block_aligned(*end);
    *end = at + bytes;
    return at;
}

static uint32_t position_blocks(uint32_t tokens) {
    return (tokens + LOCI_POSITION_BLOCK - 1) / LOCI_POSITION_BLOCK;
}

void loci_pair_layout(const loci_pair_shape *shape, loci_pair_header *out) {
    uint64_t dim = shape->head_dim, tokens = shape->tokens;
    uint64_t node = loci_node_stride(shape->head_dim);
    uint64_t end = header_bytes(shape->head_dim);
    *out = (loci_pair_header){
        .magic = LOCI_PAIR_MAGIC,
        .version = shape->version,
        .head_dim = shape->head_dim,
        .tokens = shape->tokens,
        .leaves = shape->leaves,
        .roots = shape->roots,
        .kv_dtype = shape->kv,
        .order = 0,
        .block_bytes = shape->block_bytes,
    };
    out->roots_at = place(&end, shape->roots * (sizeof(loci_root) + node));
    out->blocks_at = place(&end, shape->block_bytes);
    out->leaf_nodes_at = place(&end, shape->leaves * node);
    out->value_means_at = place(&end, ((uint64_t)shape->roots + shape->leaves) * 2u * dim);
    out->records_at = place(&end, tokens * loci_record_stride(shape->head_dim));
    out->kv_hashes_at = place(&end, tokens * sizeof(uint64_t));
    out->kv_at = place(&end, tokens * loci_kv_stride(shape->head_dim, shape->kv));
    if (shape->version > LOCI_PAIR_OLDEST) {
        (void)place(&end, loci_kv_blocks(shape->tokens) * sizeof(loci_kv_block));
        (void)place(&end, tokens * sizeof(uint16_t));
    }
    if (shape->position_codes) {
        out->position_hashes_at = place(&end, position_blocks(shape->tokens) * sizeof(uint64_t));
        out->position_codes_at = place(&end, tokens * (dim / 2u));
    }
    out->blob_bytes = loci_block_aligned(end);
}

loci_status loci_pair_check_header(const uint8_t *blob, uint64_t bytes, uint64_t header_hash,
                                   loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    if (bytes < sizeof *header || header->magic != LOCI_PAIR_MAGIC)
        return loci_fail(err, LOCI_E_CORRUPT, "header: not a pair blob");
    if (header->version < LOCI_PAIR_OLDEST || header->version > LOCI_PAIR_VERSION)
        return loci_fail(err, LOCI_E_CORRUPT,
                         "header: version %u where this build reads %u to %u; register again",
                         header->version, LOCI_PAIR_OLDEST, LOCI_PAIR_VERSION);
    uint32_t dim = header->head_dim;
    if (dim == 0 || dim > LOCI_HEAD_DIM_MAX || dim % 16 != 0 || bytes < header_bytes(dim))
        return loci_fail(err, LOCI_E_CORRUPT, "header: head_dim %u", dim);
    if (loci_pair_header_hash(blob, dim) != header_hash)
        return loci_fail(err, LOCI_E_CORRUPT, "header: wrong hash");
    if (header->tokens == 0 || header->tokens > LOCI_EXTENT_TOKENS_MAX || header->leaves == 0 ||
        header->leaves > header->tokens || header->roots == 0 || header->roots > header->leaves)
        return loci_fail(err, LOCI_E_CORRUPT, "header: %u tokens in %u leaves and %u roots",
                         header->tokens, header->leaves, header->roots);
    if (header->block_bytes > bytes)
        return loci_fail(err, LOCI_E_CORRUPT, "header: root blocks larger than their blob");
    if (header->kv_dtype != LOCI_BF16 && header->kv_dtype != LOCI_I8)
        return loci_fail(err, LOCI_E_CORRUPT, "header: K and V of unknown type %u",
                         header->kv_dtype);
    loci_pair_shape shape = {
        .head_dim = dim,
        .tokens = header->tokens,
        .leaves = header->leaves,
        .roots = header->roots,
        .block_bytes = header->block_bytes,
        .position_codes = header->position_codes_at != 0,
        .kv = (loci_dtype)header->kv_dtype,
        .version = header->version,
    };
    loci_pair_header expected;
    loci_pair_layout(&shape, &expected);
    expected.hash_roots = header->hash_roots;
    expected.hash_root_values = header->hash_root_values;
    expected.hash_position_hashes = header->hash_position_hashes;
    if (memcmp(&expected, header, sizeof expected) != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "header: offsets do not follow from its counts");
    if (header->blob_bytes > bytes)
        return loci_fail(err, LOCI_E_CORRUPT, "header: %llu bytes in a block of %llu",
                         (unsigned long long)header->blob_bytes, (unsigned long long)bytes);
    size_t floats = 2u * dim + loci_sketch_book(dim), odd = 0;
    for (size_t i = 0; i < floats; i++) odd += isfinite(loci_pair_mean(blob)[i]) ? 0 : 1;
    if (odd) return loci_fail(err, LOCI_E_CORRUPT, "header: mean, scale or codebook is not finite");
    return LOCI_OK;
}

static bool node_scales_ok(const loci_node *node) {
    return isfinite(node->centroid_scale) && isfinite(node->variance_scale) &&
           node->variance_scale >= 0.0f;
}

/* Runs of whole roots, one after another. */
static loci_status check_root_ranges(const uint8_t *blob, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    uint32_t leaves = 0, tokens = 0;
    uint64_t at = 0;
    for (uint32_t i = 0; i < header->roots; i++) {
        const loci_root *root = loci_pair_root(blob, i);
        bool ok = root->begin == leaves && root->count >= 1 &&
                  root->count <= LOCI_ROOT_LEAVES_MAX && root->count <= header->leaves - leaves &&
                  root->tokens >= root->count && root->tokens <= header->tokens - tokens &&
                  root->tokens <= LOCI_ROOT_TOKENS_MAX && root->block * 8ull == at &&
                  node_scales_ok(loci_pair_root_node(blob, i));
        if (!ok) return loci_fail(err, LOCI_E_CORRUPT, "roots: root %u is out of range", i);
        leaves += root->count;
        tokens += root->tokens;
        at += loci_block_bytes(header->head_dim, root->count, root->tokens);
    }
    if (leaves != header->leaves || tokens != header->tokens || at != header->block_bytes)
        return loci_fail(err, LOCI_E_CORRUPT, "roots: they cover %u of %u leaves", leaves,
                         header->leaves);
    return LOCI_OK;
}

loci_status loci_pair_check_roots(const uint8_t *blob, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    size_t bytes = header->roots * (sizeof(loci_root) + loci_node_stride(header->head_dim));
    if (loci_hash_bytes(blob + header->roots_at, bytes) != header->hash_roots)
        return loci_fail(err, LOCI_E_CORRUPT, "roots: wrong hash");
    return check_root_ranges(blob, err);
}

loci_status loci_pair_check_block(const uint8_t *blob, uint32_t root_index, uint32_t first_slot,
                                  loci_error *err) {
    const loci_root *root = loci_pair_root(blob, root_index);
    const loci_leaf *leaves = loci_root_leaves(blob, root);
    size_t bytes = loci_block_bytes(loci_pair_header_of(blob)->head_dim, root->count, root->tokens);
    if (loci_hash_bytes(leaves, bytes) != root->hash_block)
        return loci_fail(err, LOCI_E_CORRUPT, "block of root %u: wrong hash", root_index);
    uint32_t at = first_slot, end = first_slot + root->tokens;
    for (uint32_t i = 0; i < root->count; i++) {
        const loci_leaf *leaf = &leaves[i];
        bool ok = leaf->begin == at && leaf->count >= 1 && leaf->count <= LOCI_LEAF_TOKENS_MAX &&
                  leaf->count <= end - at;
        if (!ok)
            return loci_fail(err, LOCI_E_CORRUPT, "block of root %u: leaf %u is out of range",
                             root_index, i);
        at += leaf->count;
    }
    if (at != end)
        return loci_fail(err, LOCI_E_CORRUPT, "block of root %u does not cover its tokens",
                         root_index);
    return LOCI_OK;
}

loci_status loci_pair_check_leaf_nodes(const uint8_t *blob, uint32_t root_index, loci_error *err) {
    const loci_root *root = loci_pair_root(blob, root_index);
    size_t stride = loci_node_stride(loci_pair_header_of(blob)->head_dim);
    const loci_node *first = loci_pair_leaf_node(blob, root->begin);
    if (loci_hash_bytes(first, root->count * stride) != root->hash_nodes)
        return loci_fail(err, LOCI_E_CORRUPT, "leaf nodes of root %u: wrong hash", root_index);
    for (uint32_t i = 0; i < root->count; i++)
        if (!node_scales_ok(loci_pair_leaf_node(blob, root->begin + i)))
            return loci_fail(err, LOCI_E_CORRUPT, "leaf nodes of root %u: leaf %u is out of range",
                             root_index, i);
    return LOCI_OK;
}

/* Up to so many bytes XXH3 uses no vectors. */
#define HASH_SHORT 240u

static inline uint64_t slot_hash(const uint8_t *blob, uint32_t slot, const void *data,
                                 size_t bytes) {
    uint64_t hash = bytes <= HASH_SHORT ? XXH3_64bits(data, bytes) : loci_hash_bytes(data, bytes);
    return loci_slot_hash(blob, slot, hash);
}

uint32_t loci_record_check(const uint8_t *blob, uint32_t slot) {
    size_t bytes = loci_record_stride(loci_pair_header_of(blob)->head_dim) - sizeof(uint32_t);
    return (uint32_t)slot_hash(blob, slot, loci_slot_record(blob, slot), bytes);
}

uint64_t loci_kv_hash(const uint8_t *blob, uint32_t slot) {
    return slot_hash(blob, slot, loci_slot_kv(blob, slot), loci_pair_kv_stride(blob));
}

bool loci_slot_check_record(const uint8_t *blob, uint32_t slot) {
    const uint8_t *end =
        loci_slot_record(blob, slot) + loci_record_stride(loci_pair_header_of(blob)->head_dim);
    return loci_record_check(blob, slot) == ((const uint32_t *)(const void *)end)[-1];
}

bool loci_slot_check_kv(const uint8_t *blob, uint32_t slot) {
    return loci_kv_hash(blob, slot) == *loci_slot_kv_hash(blob, slot);
}

static uint32_t block_slots(const uint8_t *blob, uint32_t block) {
    uint32_t left = loci_pair_header_of(blob)->tokens - block * LOCI_KV_BLOCK;
    return left < LOCI_KV_BLOCK ? left : LOCI_KV_BLOCK;
}

uint64_t loci_kv_block_hash(const uint8_t *blob, uint32_t block) {
    const void *rows = loci_slot_kv(blob, block * LOCI_KV_BLOCK);
    return slot_hash(blob, block, rows, block_slots(blob, block) * loci_pair_kv_stride(blob));
}

uint64_t loci_kv_block_segments_hash(const uint8_t *blob, uint32_t block) {
    const uint16_t *segments = loci_slot_segments(blob) + (size_t)block * LOCI_KV_BLOCK;
    return slot_hash(blob, block, segments, block_slots(blob, block) * sizeof *segments);
}

loci_status loci_pair_open_check(const uint8_t *blob, uint64_t bytes, uint64_t header_hash,
                                 loci_error *err) {
    LOCI_TRY(loci_pair_check_header(blob, bytes, header_hash, err));
    LOCI_TRY(loci_pair_check_roots(blob, err));
    uint32_t slot = 0;
    for (uint32_t i = 0; i < loci_pair_header_of(blob)->roots; i++) {
        LOCI_TRY(loci_pair_check_block(blob, i, slot, err));
        LOCI_TRY(loci_pair_check_leaf_nodes(blob, i, err));
        slot += loci_pair_root(blob, i)->tokens;
    }
    return LOCI_OK;
}

uint16_t loci_kv_quantise(int8_t *out, const uint16_t *row, uint32_t head_dim) {
    uint16_t most = 0;
    for (uint32_t i = 0; i < head_dim; i++) {
        uint16_t size = row[i] & 0x7fffu; /* finite ones are in the order of their bits */
        most = size > most ? size : most;
    }
    float top = loci_bf16_to_f32(most);
    if (!(top >= KV_LEAST)) {
        memset(out, 0, head_dim);
        return 0;
    }
    float inverse = 127.0f / top;
    for (uint32_t i = 0; i < head_dim; i++) {
        float shifted = loci_bf16_to_f32(row[i]) * inverse + 12582912.0f; /* rounds to nearest */
        out[i] = (int8_t)(shifted - 12582912.0f);
    }
    return most;
}

void loci_kv_restore(uint16_t *out, const int8_t *row, uint16_t most, uint32_t head_dim) {
    float scale = loci_kv_scale(most);
    for (uint32_t i = 0; i < head_dim; i++) out[i] = loci_f32_to_bf16((float)row[i] * scale);
}

void loci_slot_read(const uint8_t *blob, uint32_t slot, uint16_t *k, uint16_t *v) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    size_t dim = header->head_dim;
    const int8_t *row = loci_slot_kv(blob, slot);
    if (header->kv_dtype == LOCI_I8) {
        const uint16_t *most = (const void *)(row + 2 * dim);
        loci_kv_restore(k, row, most[0], header->head_dim);
        loci_kv_restore(v, row + dim, most[1], header->head_dim);
    } else {
        memcpy(k, row, dim * sizeof *k);
        memcpy(v, row + dim * sizeof *k, dim * sizeof *v);
    }
}

/* For readers that are given no header hash: the header vouches for itself, everything below
 * it is checked against it. */
static loci_status check_own_header(const uint8_t *blob, uint64_t bytes, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    if (bytes < sizeof *header || header->head_dim > LOCI_HEAD_DIM_MAX ||
        bytes < header_bytes(header->head_dim))
        return loci_fail(err, LOCI_E_CORRUPT, "header: not a pair blob");
    return loci_pair_open_check(blob, bytes, loci_pair_header_hash(blob, header->head_dim), err);
}

/* Many threads read slots; each position is written once. */
typedef struct read_job {
    const uint8_t *blob;
    const uint32_t *segment_begin;
    uint32_t segments;
    uint16_t *k, *v;
    atomic_uint_least64_t *claimed; /* a bit for each position */
    atomic_uint bad;                /* the first slot that failed; UINT32_MAX = none */
} read_job;

/* *at: the position that the slot names. */
static loci_status check_slot(const read_job *job, uint32_t slot, uint64_t *at, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(job->blob);
    if (!loci_slot_check_record(job->blob, slot))
        return loci_fail(err, LOCI_E_CORRUPT, "record of slot %u: wrong hash", slot);
    uint32_t word = loci_slot_word(job->blob, slot), segment = LOCI_SLOT_SEGMENT(word);
    *at = segment < job->segments ? (uint64_t)job->segment_begin[segment] + LOCI_SLOT_OFFSET(word)
                                  : UINT64_MAX;
    if (*at >= header->tokens)
        return loci_fail(err, LOCI_E_CORRUPT, "slot %u: position %llu of %u", slot,
                         (unsigned long long)*at, header->tokens);
    if (!loci_slot_check_kv(job->blob, slot))
        return loci_fail(err, LOCI_E_CORRUPT, "KV of slot %u: wrong hash", slot);
    return LOCI_OK;
}

static bool read_slot(read_job *job, uint32_t slot) {
    uint32_t dim = loci_pair_header_of(job->blob)->head_dim;
    uint64_t at;
    if (check_slot(job, slot, &at, NULL) != LOCI_OK) return false;
    uint64_t bit = 1ull << (at % 64);
    if (atomic_fetch_or(&job->claimed[at / 64], bit) & bit) return false;
    loci_slot_read(job->blob, slot, job->k + at * dim, job->v + at * dim);
    return true;
}

static void read_slots(void *arg, size_t index, unsigned thread) {
    (void)thread;
    read_job *job = arg;
    uint32_t tokens = loci_pair_header_of(job->blob)->tokens, slot = (uint32_t)index * READ_SLOTS;
    uint32_t end = tokens - slot < READ_SLOTS ? tokens : slot + READ_SLOTS;
    while (slot < end && read_slot(job, slot)) slot++;
    if (slot == end) return;
    unsigned first = atomic_load(&job->bad);
    while (slot < first && !atomic_compare_exchange_weak(&job->bad, &first, slot)) continue;
}

loci_status loci_pair_read_positions(const uint8_t *blob, uint64_t bytes,
                                     const uint32_t *segment_begin, uint32_t segments,
                                     loci_pool *pool, uint16_t *k, uint16_t *v, loci_error *err) {
    LOCI_TRY(check_own_header(blob, bytes, err));
    uint32_t tokens = loci_pair_header_of(blob)->tokens;
    read_job job = {.blob = blob, .segment_begin = segment_begin, .segments = segments};
    job.k = k;
    job.v = v;
    job.claimed = calloc((tokens + 63u) / 64u, sizeof *job.claimed);
    if (!job.claimed) return loci_fail(err, LOCI_E_NOMEM, "no memory to read a pair");
    atomic_init(&job.bad, UINT32_MAX);
    loci_pool_run(pool, (tokens + READ_SLOTS - 1) / READ_SLOTS, read_slots, &job);
    free(job.claimed);
    uint32_t bad = atomic_load(&job.bad);
    if (bad == UINT32_MAX) return LOCI_OK;
    uint64_t at;
    LOCI_TRY(check_slot(&job, bad, &at, err));
    return loci_fail(err, LOCI_E_CORRUPT, "slot %u: position %llu is another's, too", bad,
                     (unsigned long long)at);
}

loci_status loci_pair_live(const uint8_t *blob, uint64_t bytes, const uint8_t *segment_dead,
                           uint32_t segments, uint64_t *bitmap, loci_error *err) {
    LOCI_TRY(check_own_header(blob, bytes, err));
    const loci_pair_header *header = loci_pair_header_of(blob);
    memset(bitmap, 0, (header->tokens + 63u) / 64u * sizeof *bitmap);
    for (uint32_t slot = 0; slot < header->tokens; slot++) {
        if (!loci_slot_check_record(blob, slot))
            return loci_fail(err, LOCI_E_CORRUPT, "record of slot %u: wrong hash", slot);
        uint32_t segment = LOCI_SLOT_SEGMENT(loci_slot_word(blob, slot));
        if (segment >= segments)
            return loci_fail(err, LOCI_E_CORRUPT, "slot %u: segment %u of %u", slot, segment,
                             segments);
        if (!segment_dead[segment]) bitmap[slot / 64] |= 1ull << (slot % 64);
    }
    return LOCI_OK;
}
