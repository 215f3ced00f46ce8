/* SPDX-License-Identifier: Apache-2.0
 *
 * See pair_blob.h. An index on the device: the blob up to the hashes of K and V, the codes in
 * position order, and behind these what a look-up would have to add up from roots and leaves. K and
 * V, their hashes, and what mode dense reads on the CPU stay out.
 */
#include "attention/cuda/pair_blob.h"

#include <stdlib.h>
#include <string.h>

#include "attention/index_layout.h"

#define STAGING_BYTES ((size_t)8 << 20)
#define CHECK_SLOTS 1024u /* of one task */
#define READ_SLOTS 128u
#define COPY_BYTES ((size_t)32 << 10)
#define ROW_ALIGN 16u

/* --- verification ---------------------------------------------------------------------- */

typedef struct check_job {
    const uint8_t *blob;
    bool kv;            /* else records */
    loci_error *errors; /* one a task */
} check_job;

static void check_slots(void *arg, size_t index, unsigned thread) {
    (void)thread;
    check_job *job = arg;
    uint32_t tokens = loci_pair_header_of(job->blob)->tokens, begin = (uint32_t)index * CHECK_SLOTS;
    uint32_t end = tokens - begin < CHECK_SLOTS ? tokens : begin + CHECK_SLOTS;
    loci_error *err = &job->errors[index];
    for (uint32_t s = begin; s < end && err->status == LOCI_OK; s++) {
        if (job->kv ? loci_slot_check_kv(job->blob, s) : loci_slot_check_record(job->blob, s))
            continue;
        (void)loci_fail(err, LOCI_E_CORRUPT, "%s of slot %u: wrong hash", job->kv ? "KV" : "record",
                        s);
    }
}

static loci_status check_all_slots(loci_pool *pool, const uint8_t *blob, bool kv, loci_error *err) {
    size_t tasks = (loci_pair_header_of(blob)->tokens + CHECK_SLOTS - 1) / CHECK_SLOTS;
    check_job job = {blob, kv, calloc(tasks, sizeof *job.errors)};
    if (!job.errors) return loci_fail(err, LOCI_E_NOMEM, "no memory to verify an extent");
    loci_pool_run(pool, tasks, check_slots, &job);
    loci_status status = LOCI_OK;
    for (size_t i = 0; i < tasks && status == LOCI_OK; i++) {
        status = job.errors[i].status;
        if (status != LOCI_OK) *err = job.errors[i];
    }
    free(job.errors);
    return status;
}

static bool means_ok(const uint8_t *blob, uint32_t first, uint32_t count, uint64_t hash) {
    size_t bytes = (size_t)count * 2 * loci_pair_header_of(blob)->head_dim;
    return loci_hash_bytes(loci_pair_value_mean(blob, first), bytes) == hash;
}

static loci_status check_means(const uint8_t *blob, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    if (!means_ok(blob, 0, header->roots, header->hash_root_values))
        return loci_fail(err, LOCI_E_CORRUPT, "value means of roots from 0: wrong hash");
    for (uint32_t i = 0; i < header->roots; i++) {
        const loci_root *root = loci_pair_root(blob, i);
        if (!means_ok(blob, header->roots + root->begin, root->count, root->hash_values))
            return loci_fail(err, LOCI_E_CORRUPT, "value means of root %u: wrong hash", i);
    }
    return LOCI_OK;
}

static loci_status check_positions(const uint8_t *blob, loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    if (header->position_codes_at == 0) return LOCI_OK;
    uint32_t blocks = (header->tokens + LOCI_POSITION_BLOCK - 1) / LOCI_POSITION_BLOCK;
    const uint64_t *hashes = (const void *)(blob + header->position_hashes_at);
    if (loci_hash_bytes(hashes, blocks * sizeof *hashes) != header->hash_position_hashes)
        return loci_fail(err, LOCI_E_CORRUPT, "position hashes: wrong hash");
    size_t row = header->head_dim / 2;
    for (uint32_t b = 0; b < blocks; b++) {
        uint32_t from = b * LOCI_POSITION_BLOCK, left = header->tokens - from;
        size_t count = left < LOCI_POSITION_BLOCK ? left : LOCI_POSITION_BLOCK;
        if (loci_hash_bytes(blob + header->position_codes_at + from * row, count * row) !=
            hashes[b])
            return loci_fail(err, LOCI_E_CORRUPT, "position codes of block %u: wrong hash", b);
    }
    return LOCI_OK;
}

loci_status loci_cuda_blob_open(const uint8_t *blob, uint64_t bytes, uint64_t hash,
                                loci_error *err) {
    return loci_pair_open_check(blob, bytes, hash, err);
}

loci_status loci_cuda_blob_check_index(loci_pool *pool, const uint8_t *blob, loci_error *err) {
    LOCI_TRY(check_all_slots(pool, blob, false, err));
    LOCI_TRY(check_means(blob, err));
    return check_positions(blob, err);
}

loci_status loci_cuda_blob_check_kv(loci_pool *pool, const uint8_t *blob, loci_error *err) {
    return check_all_slots(pool, blob, true, err);
}

/* --- layout on the device -------------------------------------------------------------- */

static size_t rounded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

/* Of the first range of the index: up to the hashes of K and V. */
static size_t front_bytes(const uint8_t *blob) {
    return loci_pair_header_of(blob)->kv_hashes_at;
}

static size_t codes_bytes(const uint8_t *blob) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return header->position_codes_at ? (size_t)header->tokens * (header->head_dim / 2) : 0;
}

/* What a look-up would have to add up from roots and leaves. */
typedef struct extras {
    loci_cuda_root *roots;
    uint32_t *leaf_begin; /* leaves + 1 */
    uint32_t *leaf_root;
    size_t roots_bytes, begin_bytes, root_bytes;
} extras;

static size_t extras_bytes(const extras *x) {
    return x->roots_bytes + x->begin_bytes + x->root_bytes;
}

static extras size_extras(const uint8_t *blob) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    return (extras){
        .roots_bytes = rounded(header->roots * sizeof(loci_cuda_root)),
        .begin_bytes = rounded((header->leaves + 1) * sizeof(uint32_t)),
        .root_bytes = rounded(header->leaves * sizeof(uint32_t)),
    };
}

static bool make_extras(const uint8_t *blob, extras *out, uint8_t **memory) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    *out = size_extras(blob);
    *memory = calloc(1, extras_bytes(out));
    if (!*memory) return false;
    out->roots = (void *)*memory;
    out->leaf_begin = (void *)(*memory + out->roots_bytes);
    out->leaf_root = (void *)(*memory + out->roots_bytes + out->begin_bytes);
    uint32_t slot = 0;
    for (uint32_t i = 0; i < header->roots; i++) {
        const loci_root *root = loci_pair_root(blob, i);
        const loci_leaf *leaves = loci_root_leaves(blob, root);
        size_t at = (size_t)(loci_root_sketches(blob, root) - blob);
        out->roots[i] =
            (loci_cuda_root){slot, root->tokens, root->begin, root->count, (uint32_t)at};
        for (uint32_t l = 0; l < root->count; l++) {
            out->leaf_begin[root->begin + l] = leaves[l].begin;
            out->leaf_root[root->begin + l] = i;
        }
        slot += root->tokens;
    }
    out->leaf_begin[header->leaves] = slot;
    return true;
}

size_t loci_cuda_blob_index_bytes(const uint8_t *blob) {
    extras x = size_extras(blob);
    return rounded(front_bytes(blob)) + rounded(codes_bytes(blob)) + extras_bytes(&x);
}

size_t loci_cuda_blob_row_bytes(const uint8_t *blob) {
    return (loci_pair_kv_stride(blob) + ROW_ALIGN - 1) / ROW_ALIGN * ROW_ALIGN;
}

size_t loci_cuda_blob_kv_bytes(const uint8_t *blob) {
    return loci_pair_header_of(blob)->tokens * loci_cuda_blob_row_bytes(blob);
}

static loci_cuda_pair describe(const uint8_t *blob, const uint8_t *device, const extras *x) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    uint32_t dim = header->head_dim, root_tokens = 0;
    const uint8_t *codes = device + rounded(front_bytes(blob));
    const uint8_t *behind = codes + rounded(codes_bytes(blob));
    for (uint32_t i = 0; i < header->roots; i++)
        if (x->roots[i].tokens > root_tokens) root_tokens = x->roots[i].tokens;
#define AT(pointer) (device + ((const uint8_t *)(pointer)-blob))
    loci_cuda_pair pair = {
        .blob = device,
        .root_nodes = AT(loci_pair_root_node(blob, 0)),
        .leaf_nodes = AT(loci_pair_leaf_node(blob, 0)),
        .records = AT(loci_slot_record(blob, 0)),
        .value_means = (const void *)AT(loci_pair_value_mean(blob, 0)),
        .mean = (const void *)AT(loci_pair_mean(blob)),
        .code_scale = (const void *)AT(loci_pair_code_scale(blob)),
        .codebook = (const void *)AT(loci_pair_codebook(blob)),
        .position_codes = header->position_codes_at ? codes : NULL,
        .root_table = (const void *)behind,
        .leaf_begin = (const void *)(behind + x->roots_bytes),
        .leaf_root = (const void *)(behind + x->roots_bytes + x->begin_bytes),
        .tokens = header->tokens,
        .leaves = header->leaves,
        .roots = header->roots,
        .root_tokens = root_tokens,
        .row_bytes = (uint32_t)loci_cuda_blob_row_bytes(blob),
        .int8 = header->kv_dtype == LOCI_I8,
        .node_stride = (uint32_t)loci_node_stride(dim),
        .record_stride = (uint32_t)loci_record_stride(dim),
    };
#undef AT
    return pair;
}

/* --- copying --------------------------------------------------------------------------- */

loci_status loci_cuda_staging_open(loci_cuda_staging *staging, cudaStream_t stream,
                                   loci_error *err) {
    staging->stream = stream;
    for (int i = 0; i < 2; i++) {
        void *memory = NULL;
        LOCI_TRY(loci_cuda_try(cudaMallocHost(&memory, STAGING_BYTES), "cudaMallocHost", err));
        staging->memory[i] = memory;
        LOCI_TRY(
            loci_cuda_try(cudaEventCreateWithFlags(&staging->copied[i], cudaEventDisableTiming),
                          "cudaEvent", err));
    }
    return LOCI_OK;
}

void loci_cuda_staging_close(loci_cuda_staging *staging) {
    for (int i = 0; i < 2; i++) {
        if (staging->memory[i]) (void)cudaFreeHost(staging->memory[i]);
        if (staging->copied[i]) (void)cudaEventDestroy(staging->copied[i]);
    }
}

/* Waits until the memory is free again. */
static loci_status take_staging(loci_cuda_staging *staging, size_t turn, loci_error *err) {
    return loci_cuda_try(cudaEventSynchronize(staging->copied[turn]), "cudaEvent", err);
}

static loci_status send_staging(loci_cuda_staging *staging, size_t turn, uint8_t *to, size_t bytes,
                                loci_error *err) {
    LOCI_TRY(loci_cuda_try(
        cudaMemcpyAsync(to, staging->memory[turn], bytes, cudaMemcpyHostToDevice, staging->stream),
        "cudaMemcpy", err));
    return loci_cuda_try(cudaEventRecord(staging->copied[turn], staging->stream), "cudaEvent", err);
}

typedef struct copy_job {
    uint8_t *to;
    const uint8_t *from;
    size_t bytes;
} copy_job;

static void copy_some(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const copy_job *job = arg;
    size_t at = index * COPY_BYTES, left = job->bytes - at;
    memcpy(job->to + at, job->from + at, left < COPY_BYTES ? left : COPY_BYTES);
}

static loci_status copy_bytes(loci_cuda_staging *staging, loci_pool *pool, uint8_t *to,
                              const uint8_t *from, size_t bytes, loci_error *err) {
    for (size_t at = 0, turn = 0; at < bytes; turn = 1 - turn) {
        size_t count = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        LOCI_TRY(take_staging(staging, turn, err));
        copy_job job = {staging->memory[turn], from + at, count};
        loci_pool_run(pool, (count + COPY_BYTES - 1) / COPY_BYTES, copy_some, &job);
        LOCI_TRY(send_staging(staging, turn, to + at, count, err));
        at += count;
    }
    return loci_cuda_try(cudaStreamSynchronize(staging->stream), "cudaMemcpy", err);
}

typedef struct read_job {
    const uint8_t *blob;
    uint32_t slot, count;
    uint8_t *to;
} read_job;

static void read_some(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const read_job *job = arg;
    size_t row = loci_cuda_blob_row_bytes(job->blob), stride = loci_pair_kv_stride(job->blob);
    uint32_t at = (uint32_t)index * READ_SLOTS, left = job->count - at;
    uint32_t count = left < READ_SLOTS ? left : READ_SLOTS;
    uint8_t *to = job->to + at * row;
    const uint8_t *from = loci_slot_kv(job->blob, job->slot + at);
    if (stride == row) memcpy(to, from, count * row);
    for (uint32_t i = 0; i < count && stride != row; i++) {
        memcpy(to + i * row, from + i * stride, stride);
        memset(to + i * row + stride, 0, row - stride);
    }
}

/* K and V of `count` slots. */
static void read_rows(loci_pool *pool, const uint8_t *blob, uint32_t slot, uint32_t count,
                      uint8_t *to) {
    read_job job = {blob, slot, count, to};
    loci_pool_run(pool, (count + READ_SLOTS - 1) / READ_SLOTS, read_some, &job);
}

loci_status loci_cuda_blob_put_kv(loci_cuda_staging *staging, loci_pool *pool, const uint8_t *blob,
                                  uint8_t *to, loci_error *err) {
    uint32_t tokens = loci_pair_header_of(blob)->tokens;
    if (!staging) {
        read_rows(pool, blob, 0, tokens, to);
        return LOCI_OK;
    }
    size_t row = loci_cuda_blob_row_bytes(blob), turn = 0;
    uint32_t most = (uint32_t)(STAGING_BYTES / row);
    for (uint32_t slot = 0; slot < tokens; turn = 1 - turn) {
        uint32_t count = tokens - slot < most ? tokens - slot : most;
        LOCI_TRY(take_staging(staging, turn, err));
        read_rows(pool, blob, slot, count, staging->memory[turn]);
        LOCI_TRY(send_staging(staging, turn, to + slot * row, count * row, err));
        slot += count;
    }
    return loci_cuda_try(cudaStreamSynchronize(staging->stream), "cudaMemcpy", err);
}

loci_status loci_cuda_blob_put_index(loci_cuda_staging *staging, loci_pool *pool,
                                     const uint8_t *blob, uint8_t *device, loci_cuda_pair *out,
                                     loci_error *err) {
    extras x;
    uint8_t *memory = NULL;
    if (!make_extras(blob, &x, &memory))
        return loci_fail(err, LOCI_E_NOMEM, "no memory to copy an extent");
    size_t front = rounded(front_bytes(blob)), codes = codes_bytes(blob);
    loci_status status = copy_bytes(staging, pool, device, blob, front_bytes(blob), err);
    if (status == LOCI_OK)
        status = copy_bytes(staging, pool, device + front,
                            blob + loci_pair_header_of(blob)->position_codes_at, codes, err);
    if (status == LOCI_OK)
        status = copy_bytes(staging, pool, device + front + rounded(codes), memory,
                            extras_bytes(&x), err);
    if (status == LOCI_OK) *out = describe(blob, device, &x);
    free(memory);
    return status;
}
