/* SPDX-License-Identifier: Apache-2.0
 *
 * The layout of one extent's index and KV for one retrieval layer and one KV head
 * (a "pair"), and the views through which backends read them.
 *
 * Offline, loci_pair_build turns K and V of up to LOCI_EXTENT_TOKENS_MAX tokens in
 * position order into one self-contained, relocatable byte string, the pair blob:
 *
 *   header | roots | root blocks | leaf nodes | value means | records | KV hashes | KV |
 *   KV blocks | slot segments | position hashes | position codes
 *
 * Every section begins at a multiple of LOCI_BLOCK_ALIGN from the blob's start. Keys
 * are clustered into leaves of about 16 (at most LOCI_LEAF_TOKENS_MAX), leaves into
 * roots of about 16 (at most LOCI_ROOT_LEAVES_MAX). Tokens stand in "slots": leaf by
 * leaf, root by root. What a look-up reads, each level finer than the one above:
 *
 *  - A node (root or leaf) carries an int8 centroid and variance, so that its attention mass is
 *    estimated as log(size) + q.c + (q*q).var / 2 (q already scaled by 1/sqrt(head_dim)), the
 *    logarithm of size * E[exp(q.k)] for normally distributed k. Mode squeezed uses both levels,
 *    mode hierarchical the roots.
 *  - A sketch is a key less its root's centroid in one bit a channel: a product quantiser (Jegou,
 *    Douze, Schmid, 2011) with one of 16 codewords for each LOCI_SKETCH_CHANNELS channels. All
 *    sketches of a root are read together and say which of its tokens are candidates.
 *  - A code has 4 bits a channel and says which candidates are attended. Each token's stands in a
 *    record of its own, so that no more are read than there are candidates.
 *
 * Integrity: hashes (XXH3). The owner of the blob keeps the hash of the header (with its means,
 * scales and codebook); the header holds the hash of the root section, each root those of its
 * block, its leaf nodes and its leaves' value means. A record and the K and V of a token are
 * covered by a check of their own, their hash plus that of the root section plus their slot, so
 * that what belongs to another slot or another blob does not pass. A reader verifies each part
 * before use: a damaged byte is either never read or named, and no more is read than is used.
 *
 * All integers are little-endian. memory/FORMAT.md states the bytes.
 */
#ifndef LOCI_ATTENTION_INDEX_H
#define LOCI_ATTENTION_INDEX_H

#include "attention/backend.h"
#include "base/cancel.h"

#define LOCI_BLOCK_ALIGN 128u
#define LOCI_EXTENT_TOKENS_MAX (1u << 22)
#define LOCI_EXTENT_SEGMENTS_MAX 65535u /* so that a slot-map word holds them */
#define LOCI_EXTENT_SEAL_TOKENS 32768u  /* most of an extent as registration first makes it */
#define LOCI_LEAF_TOKENS 16u            /* mean size aimed at */
#define LOCI_LEAF_TOKENS_MAX 32u        /* larger clusters are split */
#define LOCI_ROOT_LEAVES 16u            /* mean number of leaves of a root */
#define LOCI_ROOT_LEAVES_MAX 32u
#define LOCI_ROOT_TOKENS_MAX (LOCI_ROOT_LEAVES_MAX * LOCI_LEAF_TOKENS_MAX)
#define LOCI_PAIR_MAGIC 0x5250434cu /* "LCPR" */
#define LOCI_PAIR_VERSION 4u
#define LOCI_PAIR_OLDEST 3u     /* is read; has neither KV blocks nor slot segments */
#define LOCI_SKETCH_CHANNELS 4u /* of one codeword */
#define LOCI_SKETCH_WORDS 16u
#define LOCI_SKETCH_GROUP 32u /* tokens whose sketches are interleaved */

/* One node, root or leaf. Followed directly by int8_t centroid[head_dim] and
 * uint8_t variance[head_dim]; the stride is sizeof(loci_node) + 2 * head_dim.
 * Key channel i is about mean[i] + centroid_scale * centroid[i], its variance
 * variance_scale * variance[i]. */
typedef struct loci_node {
    float centroid_scale;
    float variance_scale;
} loci_node;

/* The root section: loci_root[roots], then the roots' nodes. */
typedef struct loci_root {
    uint32_t begin;       /* index of its first leaf */
    uint32_t count;       /* leaves */
    uint32_t tokens;      /* below it */
    uint32_t block;       /* where its block begins among the root blocks, in units of 8 bytes */
    uint64_t hash_block;  /* of its block */
    uint64_t hash_nodes;  /* of its leaves' nodes */
    uint64_t hash_values; /* of its leaves' value means */
} loci_root;

/* A root's block: loci_leaf[count], then the sketches of its tokens in groups of
 * LOCI_SKETCH_GROUP: for each run of LOCI_SKETCH_CHANNELS channels 16 bytes, the codeword of token
 * t of the group in the low (t < 16) or high nibble of byte t % 16. The last group is filled up
 * with zeros. */
typedef struct loci_leaf {
    uint32_t begin; /* its first slot */
    uint32_t count; /* tokens */
} loci_leaf;

typedef struct loci_pair_header {
    uint32_t magic, version;
    uint32_t head_dim, tokens, leaves, roots;
    uint32_t kv_dtype; /* loci_dtype: BF16 or I8 */
    uint32_t order;    /* 0 = cluster order; 1 = position order (landmark blocks) */
    uint64_t blob_bytes;
    uint64_t roots_at, blocks_at, leaf_nodes_at, value_means_at, records_at, kv_hashes_at, kv_at;
    uint64_t position_hashes_at, position_codes_at; /* 0 = no position codes */
    uint64_t block_bytes;                           /* of all root blocks */
    uint64_t hash_roots;                            /* of the root section */
    uint64_t hash_root_values;                      /* of the roots' value means */
    uint64_t hash_position_hashes;                  /* of the position hashes */
    /* followed by float mean[head_dim], float code_scale[head_dim] and the codebook, float
     * [head_dim / LOCI_SKETCH_CHANNELS][LOCI_SKETCH_CHANNELS][LOCI_SKETCH_WORDS] */
} loci_pair_header;

/* Value means: bf16 [roots + leaves][head_dim], first the roots', then the leaves'.
 *
 * Records: slot s holds, at records_at + s * (head_dim / 2 + 8), its code, its slot-map word and
 * its check. A code has 4 bits a channel, two channels a byte (even channel in the low nibble),
 * head_dim / 2 bytes. key[i] is about mean[i] + code_scale[i] * (code - 7.5).
 * A slot-map word is a uint32_t: segment index in the extent << 16 | position of the
 * token in its segment. The check is a uint32_t, the low half of (hash of code and word) +
 * hash_roots + s. */
#define LOCI_SLOT_SEGMENT(slot) ((slot) >> 16)
#define LOCI_SLOT_OFFSET(slot) ((slot)&0xffffu)

/* KV: slot s holds, at kv_at + s * stride, its K row and then its V row, each of head_dim values.
 * bf16: stride 4 * head_dim. int8: behind the rows two bf16, the greatest |value| of each; a value
 * is about its int8 times a 127th of that; stride 2 * head_dim + 4. KV hashes: uint64_t for each
 * slot, (hash of those stride bytes) + hash_roots + s.
 *
 * Quantised, a row depends on nothing but itself, and rounding what is read back from it (as bf16)
 * gives the same int8 values again. The index of an int8 pair is made of the keys and values that
 * are read back. So its bytes are the same whether it is built of the original rows or of those of
 * other int8 pairs, however often. */

/* What mode dense reads in place of single tokens' hashes and records, for each LOCI_KV_BLOCK
 * slots: the hash of their K and V, all rows, and that of their slot segments, each + hash_roots +
 * the block's number. Slot segments: uint16_t for each slot, the segment of its slot-map word.
 * Where they stand follows from the header: behind KV, the one behind the other. */
#define LOCI_KV_BLOCK 256u
typedef struct loci_kv_block {
    uint64_t hash_kv, hash_segments;
} loci_kv_block;

/* Position codes: the codes once more, position after position, head_dim / 2 bytes each.
 * Position hashes: uint64_t for each block of LOCI_POSITION_BLOCK positions, of its codes. */
#define LOCI_POSITION_BLOCK 256u

/* One live extent as a backend sees it. `pairs` are offsets of pair blobs in `buffer`,
 * indexed [retrieval_layer * kv_heads + kv_head]; pair_hash holds the expected hash of each
 * pair's header with its mean, scales and codebook. live, or NULL when every segment is live: for
 * each pair a bitmap over slots. All memory is owned by whoever made the view and outlives it. */
typedef struct loci_extent_view {
    loci_buffer *buffer;
    const uint64_t *pair_at;
    const uint64_t *pair_hash;
    const uint64_t *const *live;
    const uint32_t *segment_begin; /* position of each segment's first token in the extent;
                                      segments + 1 entries */
    const uint8_t *segment_dead;   /* one byte a segment; NULL = none dead */
    uint32_t tokens, segments;
    uint32_t segment_base; /* number of the first segment among the view's segments */
    uint64_t id;           /* for messages and caches */
} loci_extent_view;

/* A corpus revision as a backend sees it.
 * flat_k, flat_v: the live tokens of the open extent in position order, for each retrieval
 * layer a buffer of bf16 [flat_tokens][kv_heads][head_dim]; scanned exactly.
 * sink_k, sink_v: K and V of the shared prefix token, f32 [retrieval_layers][kv_heads][head_dim];
 * it stands for live_segments identical rows. has_sink is false for models without one. */
typedef struct loci_corpus_view {
    uint32_t retrieval_layers, kv_heads, head_dim;
    uint32_t extent_count;
    const loci_extent_view *extents;
    loci_buffer *const *flat_k, *const *flat_v;
    const uint32_t *flat_segment_begin; /* flat_segments + 1 entries */
    uint32_t flat_tokens, flat_segments;
    uint32_t flat_segment_base; /* equals the number of segments in extents */
    loci_ref sink_k, sink_v;
    bool has_sink;
    uint64_t live_segments; /* multiplicity of the sink */
    uint64_t tokens;        /* live tokens, sinks not counted */
    uint64_t revision;
} loci_corpus_view;

typedef struct loci_pair_build_options {
    uint32_t iterations; /* K-means rounds of the leaves of a root; 0 = default (6) */
    bool position_codes; /* store the codes once more in position order (ranking layer) */
    bool kv_int8;        /* K and V are kept as int8 */
    const char *isa;     /* NULL = best; names as in loci_backend_options. Same bytes from all */
    const loci_cancel *cancel; /* NULL = none; LOCI_E_CANCELLED soon after it is requested */
    loci_backend *backend;     /* clusters the keys if it can (cluster_keys); NULL = the CPU does.
                                * Same bytes from all; the CPU does, too, where memory is short */
} loci_pair_build_options;

/* K and V of a pair, bf16 [tokens][head_dim] in position order; slots: for each position its
 * slot-map word (segment << 16 | offset). Borrowed. */
typedef struct loci_pair_rows {
    const uint16_t *k, *v;
    const uint32_t *slots;
    uint32_t tokens, head_dim;
} loci_pair_rows;

typedef struct loci_pair_job loci_pair_job;

/* The first half of building a blob: all up to the clusters. Returns LOCI_E_INVAL for zero or too
 * many tokens or non-finite values (named). The rows stay until the job is gone. pool may be NULL
 * (serial). Different jobs may run on different threads. */
LOCI_MUST_CHECK loci_status loci_pair_begin(const loci_pair_rows *rows,
                                            const loci_pair_build_options *options,
                                            struct loci_pool *pool, loci_pair_job **out,
                                            loci_error *err);
/* The second: appends the blob to *out, the hash of its header to *header_hash. The bytes depend
 * only on rows and options, not on threads. Frees the job in any case. */
LOCI_MUST_CHECK loci_status loci_pair_finish(loci_pair_job *job, loci_buf *out,
                                             uint64_t *header_hash, loci_error *err);
void loci_pair_job_free(loci_pair_job *job); /* NULL allowed */
/* Both. */
LOCI_MUST_CHECK loci_status loci_pair_build(const uint16_t *k, const uint16_t *v,
                                            const uint32_t *slots_of_position, uint32_t tokens,
                                            uint32_t head_dim,
                                            const loci_pair_build_options *options,
                                            struct loci_pool *pool, loci_buf *out,
                                            uint64_t *header_hash, loci_error *err);

/* Pairs as they are read and put away, by number. */
typedef struct loci_pair_work {
    void *ctx;
    /* Rows stay until the pair was put. Calls come in the order of the pairs. */
    loci_status (*read)(void *ctx, uint32_t pair, loci_pair_rows *rows,
                        loci_pair_build_options *options, loci_error *err);
    /* blob: borrowed. */
    loci_status (*put)(void *ctx, uint32_t pair, loci_slice blob, uint64_t header_hash,
                       loci_error *err);
} loci_pair_work;

/* How many pairs of so many tokens are worth the memory to be made ahead of the one that is put, as
 * the backend clusters keys while the host does the rest; 0: it does not. NULL allowed. */
#define LOCI_PAIRS_AHEAD_MOST 4u
uint32_t loci_pairs_ahead(const loci_backend *backend, uint32_t tokens);
/* Builds `count` pairs, or ends with the first failure. ahead: so many pairs are read, one after
 * another, and made, on other threads, while one is put, so that rows, keys and blobs of ahead + 1
 * are held. */
LOCI_MUST_CHECK loci_status loci_pairs_build(const loci_pair_work *work, uint32_t count,
                                             uint32_t ahead, struct loci_pool *pool,
                                             loci_error *err);

/* Checks everything about a blob that can be checked without reading codes and KV:
 * magic, version, sizes, offsets inside `bytes`, header hash, root hash, that roots and
 * leaves cover their ranges exactly. LOCI_E_CORRUPT names what is wrong. */
LOCI_MUST_CHECK loci_status loci_pair_open_check(const uint8_t *blob, uint64_t bytes,
                                                 uint64_t header_hash, loci_error *err);

/* Reads K and V back in position order (bf16 [tokens][head_dim], int8 ones rounded to that),
 * verifying every record and row.
 * segment_begin: position of the first token of each of `segments`. pool may be NULL. */
LOCI_MUST_CHECK loci_status loci_pair_read_positions(const uint8_t *blob, uint64_t bytes,
                                                     const uint32_t *segment_begin,
                                                     uint32_t segments, struct loci_pool *pool,
                                                     uint16_t *k, uint16_t *v, loci_error *err);

/* Sets in bitmap, (tokens + 63) / 64 words, the bit of every slot whose segment is live:
 * segment_dead holds one byte for each of `segments`. Verifies all records. */
LOCI_MUST_CHECK loci_status loci_pair_live(const uint8_t *blob, uint64_t bytes,
                                           const uint8_t *segment_dead, uint32_t segments,
                                           uint64_t *bitmap, loci_error *err);

#endif
