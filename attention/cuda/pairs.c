/* SPDX-License-Identifier: Apache-2.0
 *
 * See pairs.h. One lock for the whole cache, held while a pair is verified and copied: look-ups of
 * other threads that miss, too, would wait for the same bus.
 */
#include "attention/cuda/pairs.h"

#include <stdlib.h>
#include <string.h>

#include "attention/index_layout.h"

#define BUCKETS 1024u
#define STAGING_BYTES ((size_t)8 << 20)
#define CHECK_SLOTS 1024u /* of one task */

struct loci_cuda_pair_entry {
    const loci_buffer *buffer;
    uint64_t at;
    uint8_t *device;
    size_t bytes;
    uint32_t pins;
    bool gone;     /* its buffer is; it goes with its last pin */
    uint64_t used; /* by the cache's clock */
    loci_cuda_pair pair;
    loci_cuda_pair_entry *next;
};

struct loci_cuda_pairs {
    loci_cuda *cuda;
    pthread_mutex_t lock;
    loci_cuda_pair_entry *buckets[BUCKETS];
    uint64_t clock;
    loci_cuda_pairs_stats stats;
    uint8_t *staging[2];   /* page-locked */
    cudaEvent_t copied[2]; /* the staging is free again */
};

/* --- verification ---------------------------------------------------------------------- */

typedef struct check_job {
    const uint8_t *blob;
    loci_error *errors; /* one a task */
} check_job;

static size_t tasks_of(uint32_t tokens) {
    return (tokens + CHECK_SLOTS - 1) / CHECK_SLOTS;
}

static void check_slots(void *arg, size_t index, unsigned thread) {
    (void)thread;
    check_job *job = arg;
    uint32_t tokens = loci_pair_header_of(job->blob)->tokens, begin = (uint32_t)index * CHECK_SLOTS;
    uint32_t end = tokens - begin < CHECK_SLOTS ? tokens : begin + CHECK_SLOTS;
    loci_error *err = &job->errors[index];
    for (uint32_t s = begin; s < end && err->status == LOCI_OK; s++) {
        if (!loci_slot_check_record(job->blob, s))
            (void)loci_fail(err, LOCI_E_CORRUPT, "record of slot %u: wrong hash", s);
        else if (!loci_slot_check_kv(job->blob, s))
            (void)loci_fail(err, LOCI_E_CORRUPT, "KV of slot %u: wrong hash", s);
    }
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

static loci_status check_pair(loci_cuda *cuda, const uint8_t *blob, uint64_t bytes, uint64_t hash,
                              loci_error *err) {
    LOCI_TRY(loci_pair_open_check(blob, bytes, hash, err));
    size_t tasks = tasks_of(loci_pair_header_of(blob)->tokens);
    check_job job = {blob, calloc(tasks, sizeof *job.errors)};
    if (!job.errors) return loci_fail(err, LOCI_E_NOMEM, "no memory to verify an extent");
    loci_pool_run(cuda->pool, tasks, check_slots, &job);
    loci_status status = LOCI_OK;
    for (size_t i = 0; i < tasks && status == LOCI_OK; i++) {
        status = job.errors[i].status;
        if (status != LOCI_OK) *err = job.errors[i];
    }
    free(job.errors);
    LOCI_TRY(status);
    LOCI_TRY(check_means(blob, err));
    return check_positions(blob, err);
}

/* --- layout on the device -------------------------------------------------------------- */

/* K and V are bf16 on the device, as they are read back from an int8 pair; what follows them in the
 * blob then stands so much further on. */
static size_t widening(const uint8_t *blob) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    size_t tokens = header->tokens, wide = tokens * loci_kv_stride(header->head_dim, LOCI_BF16);
    return loci_block_aligned(header->kv_at + wide) -
           loci_block_aligned(header->kv_at + tokens * loci_pair_kv_stride(blob));
}

static size_t device_bytes(const uint8_t *blob) {
    return loci_pair_header_of(blob)->blob_bytes + widening(blob);
}

/* Behind the blob: what a look-up would have to add up from roots and leaves. */
typedef struct extras {
    loci_cuda_root *roots;
    uint32_t *leaf_begin; /* leaves + 1 */
    uint32_t *leaf_root;
    size_t roots_bytes, begin_bytes, root_bytes;
} extras;

static size_t rounded(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static size_t extras_bytes(const extras *x) {
    return x->roots_bytes + x->begin_bytes + x->root_bytes;
}

static bool make_extras(const uint8_t *blob, extras *out, uint8_t **memory) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    out->roots_bytes = rounded(header->roots * sizeof *out->roots);
    out->begin_bytes = rounded((header->leaves + 1) * sizeof *out->leaf_begin);
    out->root_bytes = rounded(header->leaves * sizeof *out->leaf_root);
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

static loci_cuda_pair describe(const uint8_t *blob, const uint8_t *device, const extras *x) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    uint32_t dim = header->head_dim;
    const uint8_t *behind = device + rounded(device_bytes(blob));
    uint32_t root_tokens = 0;
    for (uint32_t i = 0; i < header->roots; i++)
        if (x->roots[i].tokens > root_tokens) root_tokens = x->roots[i].tokens;
#define AT(pointer) (device + ((const uint8_t *)(pointer)-blob))
    loci_cuda_pair pair = {
        .blob = device,
        .root_nodes = AT(loci_pair_root_node(blob, 0)),
        .leaf_nodes = AT(loci_pair_leaf_node(blob, 0)),
        .records = AT(loci_slot_record(blob, 0)),
        .kv = (const void *)AT(loci_slot_kv(blob, 0)),
        .value_means = (const void *)AT(loci_pair_value_mean(blob, 0)),
        .mean = (const void *)AT(loci_pair_mean(blob)),
        .code_scale = (const void *)AT(loci_pair_code_scale(blob)),
        .codebook = (const void *)AT(loci_pair_codebook(blob)),
        .position_codes =
            header->position_codes_at ? device + header->position_codes_at + widening(blob) : NULL,
        .root_table = (const void *)behind,
        .leaf_begin = (const void *)(behind + x->roots_bytes),
        .leaf_root = (const void *)(behind + x->roots_bytes + x->begin_bytes),
        .tokens = header->tokens,
        .leaves = header->leaves,
        .roots = header->roots,
        .root_tokens = root_tokens,
        .node_stride = (uint32_t)loci_node_stride(dim),
        .record_stride = (uint32_t)loci_record_stride(dim),
    };
#undef AT
    return pair;
}

/* --- copying --------------------------------------------------------------------------- */

/* Waits until the staging is free again. */
static loci_status take_staging(loci_cuda_pairs *pairs, size_t turn, loci_error *err) {
    return loci_cuda_try(cudaEventSynchronize(pairs->copied[turn]), "cudaEvent", err);
}

static loci_status send_staging(loci_cuda_pairs *pairs, size_t turn, uint8_t *to, size_t bytes,
                                loci_error *err) {
    cudaStream_t stream = pairs->cuda->copies;
    LOCI_TRY(loci_cuda_try(
        cudaMemcpyAsync(to, pairs->staging[turn], bytes, cudaMemcpyHostToDevice, stream),
        "cudaMemcpy", err));
    return loci_cuda_try(cudaEventRecord(pairs->copied[turn], stream), "cudaEvent", err);
}

static loci_status copy_bytes(loci_cuda_pairs *pairs, uint8_t *to, const uint8_t *from,
                              size_t bytes, loci_error *err) {
    for (size_t at = 0, turn = 0; at < bytes; turn = 1 - turn) {
        size_t count = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        LOCI_TRY(take_staging(pairs, turn, err));
        memcpy(pairs->staging[turn], from + at, count);
        LOCI_TRY(send_staging(pairs, turn, to + at, count, err));
        at += count;
    }
    return loci_cuda_try(cudaStreamSynchronize(pairs->cuda->copies), "cudaMemcpy", err);
}

/* K and V of an int8 pair, as bf16. */
static loci_status copy_widened(loci_cuda_pairs *pairs, uint8_t *to, const uint8_t *blob,
                                loci_error *err) {
    uint32_t tokens = loci_pair_header_of(blob)->tokens, dim = loci_pair_header_of(blob)->head_dim;
    size_t row = loci_kv_stride(dim, LOCI_BF16), turn = 0;
    for (uint32_t slot = 0; slot < tokens; turn = 1 - turn) {
        uint32_t most = (uint32_t)(STAGING_BYTES / row), left = tokens - slot;
        uint32_t count = left < most ? left : most;
        LOCI_TRY(take_staging(pairs, turn, err));
        for (uint32_t i = 0; i < count; i++) {
            uint16_t *k = (void *)(pairs->staging[turn] + i * row);
            loci_slot_read(blob, slot + i, k, k + dim);
        }
        LOCI_TRY(send_staging(pairs, turn, to + slot * row, count * row, err));
        slot += count;
    }
    return loci_cuda_try(cudaStreamSynchronize(pairs->cuda->copies), "cudaMemcpy", err);
}

static loci_status copy_blob(loci_cuda_pairs *pairs, uint8_t *to, const uint8_t *blob,
                             loci_error *err) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    if (header->kv_dtype != LOCI_I8) return copy_bytes(pairs, to, blob, header->blob_bytes, err);
    size_t end = loci_block_aligned(header->kv_at + header->tokens * loci_pair_kv_stride(blob));
    LOCI_TRY(copy_bytes(pairs, to, blob, header->kv_at, err));
    LOCI_TRY(copy_widened(pairs, to + header->kv_at, blob, err));
    return copy_bytes(pairs, to + end + widening(blob), blob + end, header->blob_bytes - end, err);
}

static void release(loci_cuda_pairs *pairs, loci_cuda_pair_entry **link) {
    loci_cuda_pair_entry *entry = *link;
    *link = entry->next;
    pairs->stats.bytes -= entry->bytes;
    (void)cudaFree(entry->device);
    free(entry);
}

/* The least recently used pair that nobody has pinned goes; false if there is none. */
static bool evict_one(loci_cuda_pairs *pairs) {
    loci_cuda_pair_entry **oldest = NULL;
    for (size_t b = 0; b < BUCKETS; b++)
        for (loci_cuda_pair_entry **at = &pairs->buckets[b]; *at; at = &(*at)->next)
            if ((*at)->pins == 0 && (!oldest || (*at)->used < (*oldest)->used)) oldest = at;
    if (!oldest) return false;
    /* A look-up that has moved on may still be running on it. */
    (void)cudaDeviceSynchronize();
    release(pairs, oldest);
    pairs->stats.evictions++;
    return true;
}

static loci_status take_memory(loci_cuda_pairs *pairs, size_t bytes, uint8_t **out,
                               loci_error *err) {
    void *device = NULL;
    cudaError_t result = cudaErrorMemoryAllocation;
    for (;;) {
        if (pairs->stats.bytes + bytes <= pairs->stats.budget) result = cudaMalloc(&device, bytes);
        if (result != cudaErrorMemoryAllocation) break;
        (void)cudaGetLastError();
        if (!evict_one(pairs))
            return loci_fail(err, LOCI_E_LIMIT,
                             "a layer of this corpus does not fit the GPU: %zu bytes more than the "
                             "%llu of %llu MiB for extents that are in use",
                             bytes, (unsigned long long)(pairs->stats.bytes >> 20),
                             (unsigned long long)(pairs->stats.budget >> 20));
    }
    *out = device;
    return loci_cuda_try(result, "cudaMalloc", err);
}

/* Verifies and copies. */
static loci_status load(loci_cuda_pairs *pairs, const uint8_t *blob, uint64_t bytes, uint64_t hash,
                        loci_cuda_pair_entry *entry, loci_error *err) {
    LOCI_TRY(check_pair(pairs->cuda, blob, bytes, hash, err));
    extras x;
    uint8_t *memory = NULL;
    if (!make_extras(blob, &x, &memory))
        return loci_fail(err, LOCI_E_NOMEM, "no memory to copy an extent");
    size_t whole = device_bytes(blob);
    entry->bytes = rounded(whole) + extras_bytes(&x);
    loci_status status = take_memory(pairs, entry->bytes, &entry->device, err);
    if (status == LOCI_OK) status = copy_blob(pairs, entry->device, blob, err);
    if (status == LOCI_OK)
        status = copy_bytes(pairs, entry->device + rounded(whole), memory, extras_bytes(&x), err);
    if (status == LOCI_OK) entry->pair = describe(blob, entry->device, &x);
    if (status != LOCI_OK && entry->device) (void)cudaFree(entry->device);
    free(memory);
    return status;
}

/* --- the cache ------------------------------------------------------------------------- */

loci_status loci_cuda_pairs_open(loci_cuda *cuda, loci_cuda_pairs **out, loci_error *err) {
    *out = NULL;
    loci_cuda_pairs *pairs = calloc(1, sizeof *pairs);
    if (!pairs) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cache of extents");
    pairs->cuda = cuda;
    pthread_mutex_init(&pairs->lock, NULL);
    size_t available = 0, total = 0;
    loci_status status = loci_cuda_try(cudaMemGetInfo(&available, &total), "cudaMemGetInfo", err);
    pairs->stats.budget = available / 100 * LOCI_CUDA_CACHE_PERCENT;
    for (int i = 0; i < 2 && status == LOCI_OK; i++) {
        void *staging = NULL;
        status = loci_cuda_try(cudaMallocHost(&staging, STAGING_BYTES), "cudaMallocHost", err);
        pairs->staging[i] = staging;
        if (status == LOCI_OK)
            status =
                loci_cuda_try(cudaEventCreateWithFlags(&pairs->copied[i], cudaEventDisableTiming),
                              "cudaEvent", err);
    }
    if (status != LOCI_OK) {
        loci_cuda_pairs_close(pairs);
        return status;
    }
    *out = pairs;
    return LOCI_OK;
}

void loci_cuda_pairs_close(loci_cuda_pairs *pairs) {
    if (!pairs) return;
    for (size_t b = 0; b < BUCKETS; b++)
        while (pairs->buckets[b]) release(pairs, &pairs->buckets[b]);
    for (int i = 0; i < 2; i++) {
        if (pairs->staging[i]) (void)cudaFreeHost(pairs->staging[i]);
        if (pairs->copied[i]) (void)cudaEventDestroy(pairs->copied[i]);
    }
    pthread_mutex_destroy(&pairs->lock);
    free(pairs);
}

static size_t bucket_of(const loci_buffer *buffer, uint64_t at) {
    return (size_t)(((uintptr_t)buffer / 16 * 0x9e3779b97f4a7c15u + at) >> 7) % BUCKETS;
}

static loci_status find_or_load(loci_cuda_pairs *pairs, const loci_extent_view *extent, uint64_t at,
                                uint64_t hash, loci_cuda_pair_entry **out, loci_error *err) {
    loci_cuda_pair_entry **bucket = &pairs->buckets[bucket_of(extent->buffer, at)];
    for (loci_cuda_pair_entry *e = *bucket; e; e = e->next) {
        if (e->buffer != extent->buffer || e->at != at) continue;
        pairs->stats.hits++;
        *out = e;
        return LOCI_OK;
    }
    loci_cuda_pair_entry *entry = calloc(1, sizeof *entry);
    if (!entry) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cache of extents");
    entry->buffer = extent->buffer;
    entry->at = at;
    loci_status status =
        load(pairs, extent->buffer->host + at, extent->buffer->bytes - at, hash, entry, err);
    if (status != LOCI_OK) {
        free(entry);
        return status;
    }
    pairs->stats.misses++;
    pairs->stats.bytes += entry->bytes;
    entry->next = *bucket;
    *bucket = entry;
    *out = entry;
    return LOCI_OK;
}

loci_status loci_cuda_pairs_pin(loci_cuda_pairs *pairs, const loci_extent_view *extent,
                                uint32_t layer, uint32_t kv_heads, uint32_t kv_head,
                                uint32_t head_dim, loci_cuda_pair_entry **entry,
                                loci_cuda_pair *out, loci_error *err) {
    uint32_t index = layer * kv_heads + kv_head;
    uint64_t at = extent->pair_at[index];
    loci_status status;
    *entry = NULL;
    pthread_mutex_lock(&pairs->lock);
    if (!extent->buffer->host)
        status = loci_fail(err, LOCI_E_INTERNAL, "its buffer is not wrapped host memory");
    else if (at > extent->buffer->bytes || at % 8 != 0)
        status = loci_fail(err, LOCI_E_CORRUPT, "pair lies outside its block");
    else
        status = find_or_load(pairs, extent, at, extent->pair_hash[index], entry, err);
    if (status == LOCI_OK) {
        const loci_pair_header *header = loci_pair_header_of(extent->buffer->host + at);
        if (header->head_dim != head_dim || header->tokens != extent->tokens)
            status = loci_fail(err, LOCI_E_CORRUPT, "header: of another shape than its extent");
    }
    if (status == LOCI_OK) {
        (*entry)->pins++;
        (*entry)->used = ++pairs->clock;
        *out = (*entry)->pair;
    } else {
        *entry = NULL;
    }
    pthread_mutex_unlock(&pairs->lock);
    if (status != LOCI_OK)
        return loci_fail_prefix(err, status, "extent %016llx, layer %u, KV head %u",
                                (unsigned long long)extent->id, layer, kv_head);
    return LOCI_OK;
}

void loci_cuda_pairs_unpin(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry) {
    pthread_mutex_lock(&pairs->lock);
    LOCI_ASSERT(entry->pins > 0);
    entry->pins--;
    if (entry->gone && entry->pins == 0) {
        (void)cudaDeviceSynchronize();
        release(pairs, &entry);
    }
    pthread_mutex_unlock(&pairs->lock);
}

void loci_cuda_pairs_forget(loci_cuda_pairs *pairs, const loci_buffer *buffer) {
    bool waited = false;
    pthread_mutex_lock(&pairs->lock);
    for (size_t b = 0; b < BUCKETS; b++)
        for (loci_cuda_pair_entry **at = &pairs->buckets[b]; *at;) {
            if ((*at)->buffer != buffer) {
                at = &(*at)->next;
                continue;
            }
            if ((*at)->pins > 0) {
                (*at)->gone = true;
                *at = (*at)->next;
                continue;
            }
            if (!waited) (void)cudaDeviceSynchronize();
            waited = true;
            release(pairs, at);
        }
    pthread_mutex_unlock(&pairs->lock);
}

bool loci_cuda_pairs_shrink(loci_cuda_pairs *pairs, size_t bytes) {
    if (!pairs) return false;
    pthread_mutex_lock(&pairs->lock);
    uint64_t before = pairs->stats.bytes;
    bool any = false;
    while (before - pairs->stats.bytes < bytes && evict_one(pairs)) any = true;
    pthread_mutex_unlock(&pairs->lock);
    return any;
}

void loci_cuda_pairs_stats_of(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out) {
    pthread_mutex_lock(&pairs->lock);
    *out = pairs->stats;
    pthread_mutex_unlock(&pairs->lock);
}

void loci_cuda_pairs_limit(loci_cuda_pairs *pairs, uint64_t bytes) {
    pthread_mutex_lock(&pairs->lock);
    pairs->stats.budget = bytes;
    pthread_mutex_unlock(&pairs->lock);
}
