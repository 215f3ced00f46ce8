/* SPDX-License-Identifier: Apache-2.0
 *
 * Where things stand in a pair blob, and the checks that come before every use of them.
 *
 * The offsets of a blob follow from (head_dim, tokens, leaves, roots, bytes of root blocks,
 * position codes) alone; a header that says otherwise is refused, so that an accessor needs no
 * bounds of its own once the header is checked. The rest is checked level by level:
 * loci_pair_check_roots gives ranges that loci_pair_check_block may trust, and so on. All
 * functions are pure and thread-safe.
 */
#ifndef LOCI_ATTENTION_INDEX_LAYOUT_H
#define LOCI_ATTENTION_INDEX_LAYOUT_H

#include "attention/index.h"
#include "base/half.h"

#define LOCI_HEAD_DIM_MAX 256u /* and a multiple of 16 */

typedef struct loci_pair_shape {
    uint32_t head_dim, tokens, leaves, roots;
    uint64_t block_bytes; /* of all root blocks */
    bool position_codes;
    loci_dtype kv;    /* LOCI_BF16 or LOCI_I8 */
    uint32_t version; /* LOCI_PAIR_OLDEST to LOCI_PAIR_VERSION */
} loci_pair_shape;

/* A header of that shape: magic, version and all offsets set, hashes zero. */
void loci_pair_layout(const loci_pair_shape *shape, loci_pair_header *out);

uint64_t loci_hash_bytes(const void *data, size_t bytes);
uint64_t loci_pair_header_hash(const uint8_t *blob, uint32_t head_dim);

static inline size_t loci_node_stride(uint32_t head_dim) {
    return sizeof(loci_node) + 2u * (size_t)head_dim;
}

/* Bytes of K and V of a token. */
static inline size_t loci_kv_stride(uint32_t head_dim, loci_dtype kv) {
    return kv == LOCI_I8 ? 2 * (size_t)head_dim + 2 * sizeof(uint16_t) : 4 * (size_t)head_dim;
}

static inline size_t loci_record_stride(uint32_t head_dim) {
    return head_dim / 2u + 2 * sizeof(uint32_t);
}

static inline uint32_t loci_sketch_parts(uint32_t head_dim) {
    return head_dim / LOCI_SKETCH_CHANNELS;
}

/* Floats of the codebook. */
static inline size_t loci_sketch_book(uint32_t head_dim) {
    return (size_t)head_dim * LOCI_SKETCH_WORDS;
}

/* Bytes of the sketches of one group. */
static inline size_t loci_sketch_group(uint32_t head_dim) {
    return (size_t)loci_sketch_parts(head_dim) * (LOCI_SKETCH_GROUP / 2u);
}

static inline uint32_t loci_sketch_groups(uint32_t tokens) {
    return (tokens + LOCI_SKETCH_GROUP - 1) / LOCI_SKETCH_GROUP;
}

static inline size_t loci_block_bytes(uint32_t head_dim, uint32_t leaves, uint32_t tokens) {
    return leaves * sizeof(loci_leaf) + loci_sketch_groups(tokens) * loci_sketch_group(head_dim);
}

static inline const loci_pair_header *loci_pair_header_of(const uint8_t *blob) {
    return (const void *)blob;
}

static inline const float *loci_pair_mean(const uint8_t *blob) {
    return (const void *)(blob + sizeof(loci_pair_header));
}

static inline const float *loci_pair_code_scale(const uint8_t *blob) {
    return loci_pair_mean(blob) + loci_pair_header_of(blob)->head_dim;
}

static inline const float *loci_pair_codebook(const uint8_t *blob) {
    return loci_pair_code_scale(blob) + loci_pair_header_of(blob)->head_dim;
}

static inline const loci_root *loci_pair_root(const uint8_t *blob, uint32_t index) {
    return (const loci_root *)(const void *)(blob + loci_pair_header_of(blob)->roots_at) + index;
}

static inline const loci_node *loci_pair_root_node(const uint8_t *blob, uint32_t index) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return (const void *)(blob + header->roots_at + header->roots * sizeof(loci_root) +
                          index * loci_node_stride(header->head_dim));
}

static inline const loci_node *loci_pair_leaf_node(const uint8_t *blob, uint32_t index) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return (const void *)(blob + header->leaf_nodes_at +
                          index * loci_node_stride(header->head_dim));
}

/* The leaves of a root. */
static inline const loci_leaf *loci_root_leaves(const uint8_t *blob, const loci_root *root) {
    return (const void *)(blob + loci_pair_header_of(blob)->blocks_at + root->block * 8u);
}

static inline const uint8_t *loci_root_sketches(const uint8_t *blob, const loci_root *root) {
    return (const uint8_t *)(loci_root_leaves(blob, root) + root->count);
}

static inline const int8_t *loci_node_centroid(const loci_node *node) {
    return (const void *)(node + 1);
}

static inline const uint8_t *loci_node_variance(const loci_node *node, uint32_t head_dim) {
    return (const uint8_t *)(node + 1) + head_dim;
}

/* Code, slot-map word and check of a slot. */
static inline const uint8_t *loci_slot_record(const uint8_t *blob, uint32_t slot) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return blob + header->records_at + slot * loci_record_stride(header->head_dim);
}

static inline uint32_t loci_slot_word(const uint8_t *blob, uint32_t slot) {
    const uint8_t *record = loci_slot_record(blob, slot);
    return *(const uint32_t *)(const void *)(record + loci_pair_header_of(blob)->head_dim / 2u);
}

static inline const uint64_t *loci_slot_kv_hash(const uint8_t *blob, uint32_t slot) {
    return (const uint64_t *)(const void *)(blob + loci_pair_header_of(blob)->kv_hashes_at) + slot;
}

/* What must stand there, by the hash of its K and V alone: another slot's or another pair's are not
 * taken for it. */
static inline uint64_t loci_slot_hash(const uint8_t *blob, uint32_t slot, uint64_t data_hash) {
    return data_hash + loci_pair_header_of(blob)->hash_roots + slot;
}

static inline size_t loci_pair_kv_stride(const uint8_t *blob) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return loci_kv_stride(header->head_dim, (loci_dtype)header->kv_dtype);
}

/* K row of a slot, uint16_t or int8_t; its V row follows. */
static inline const void *loci_slot_kv(const uint8_t *blob, uint32_t slot) {
    return blob + loci_pair_header_of(blob)->kv_at + slot * loci_pair_kv_stride(blob);
}

#define LOCI_KV_STEP (1.0f / 127.0f)
/* By what the int8 values of a slot's K and V row are multiplied; row: loci_slot_kv. */
static inline float loci_kv_scale(uint16_t most) {
    return loci_bf16_to_f32(most) * LOCI_KV_STEP;
}

static inline void loci_kv_scales(const void *row, uint32_t head_dim, float *k, float *v) {
    const uint16_t *most = (const void *)((const uint8_t *)row + 2 * (size_t)head_dim);
    *k = loci_kv_scale(most[0]);
    *v = loci_kv_scale(most[1]);
}

/* A row of bf16 as int8, rounded to nearest even; returns its greatest |value| as bf16. Rows of
 * values below 2^-100 become zero. */
uint16_t loci_kv_quantise(int8_t *out, const uint16_t *row, uint32_t head_dim);
/* The row back, rounded to bf16: quantised, it is the same again. */
void loci_kv_restore(uint16_t *out, const int8_t *row, uint16_t most, uint32_t head_dim);
/* K and V of a slot as bf16, int8 ones restored; not verified. */
void loci_slot_read(const uint8_t *blob, uint32_t slot, uint16_t *k, uint16_t *v);

static inline uint64_t loci_block_aligned(uint64_t at) {
    return (at + LOCI_BLOCK_ALIGN - 1) / LOCI_BLOCK_ALIGN * LOCI_BLOCK_ALIGN;
}

static inline bool loci_pair_has_kv_blocks(const uint8_t *blob) {
    return loci_pair_header_of(blob)->version > LOCI_PAIR_OLDEST;
}

static inline uint32_t loci_kv_blocks(uint32_t tokens) {
    return (tokens + LOCI_KV_BLOCK - 1) / LOCI_KV_BLOCK;
}

/* Both only where there are KV blocks. */
static inline const loci_kv_block *loci_pair_kv_block(const uint8_t *blob, uint32_t block) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    uint64_t end = header->kv_at + header->tokens * loci_pair_kv_stride(blob);
    return (const loci_kv_block *)(const void *)(blob + loci_block_aligned(end)) + block;
}

static inline const uint16_t *loci_slot_segments(const uint8_t *blob) {
    uint32_t blocks = loci_kv_blocks(loci_pair_header_of(blob)->tokens);
    const uint8_t *end = (const uint8_t *)loci_pair_kv_block(blob, blocks);
    return (const void *)(blob + loci_block_aligned((uint64_t)(end - blob)));
}

/* index < roots: a root's value mean; else of leaf index - roots. */
static inline const uint16_t *loci_pair_value_mean(const uint8_t *blob, uint32_t index) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return (const void *)(blob + header->value_means_at + (size_t)index * 2u * header->head_dim);
}

/* Magic, version, hash, shape and offsets; the blob must lie in `bytes` and be aligned to 8. */
LOCI_MUST_CHECK loci_status loci_pair_check_header(const uint8_t *blob, uint64_t bytes,
                                                   uint64_t header_hash, loci_error *err);
/* The roots' hash, and that they cover leaves and tokens in order. After check_header. */
LOCI_MUST_CHECK loci_status loci_pair_check_roots(const uint8_t *blob, loci_error *err);
/* The hash of the block of one root, and that its leaves cover its tokens in order from slot
 * first_slot (the sum of the tokens of the roots before it). After check_roots. */
LOCI_MUST_CHECK loci_status loci_pair_check_block(const uint8_t *blob, uint32_t root,
                                                  uint32_t first_slot, loci_error *err);
/* The hash of the nodes of a root's leaves. After check_roots. */
LOCI_MUST_CHECK loci_status loci_pair_check_leaf_nodes(const uint8_t *blob, uint32_t root,
                                                       loci_error *err);
/* What must stand as the check of a slot's record and as the hash of its K and V; slot < tokens.
 * After check_header. */
uint32_t loci_record_check(const uint8_t *blob, uint32_t slot);
uint64_t loci_kv_hash(const uint8_t *blob, uint32_t slot);
/* False = damaged. */
bool loci_slot_check_record(const uint8_t *blob, uint32_t slot);
bool loci_slot_check_kv(const uint8_t *blob, uint32_t slot);
/* What must stand as the hashes of a KV block. After check_header. */
uint64_t loci_kv_block_hash(const uint8_t *blob, uint32_t block);
uint64_t loci_kv_block_segments_hash(const uint8_t *blob, uint32_t block);

#endif
