/* SPDX-License-Identifier: Apache-2.0
 *
 * See pairs.h. One lock for all pairs, held while a part is verified and copied: look-ups of other
 * threads that miss, too, would wait for the same bus. It is taken before the lock of rows.h.
 */
#include "attention/cuda/pairs.h"

#include <stdlib.h>

#include "attention/cuda/pair_blob.h"
#include "attention/cuda/rows.h"
#include "attention/index_layout.h"
#include "base/budget.h"

#define BUCKETS 1024u
#define IDLE_ROUNDS 4u  /* an index is idle that was not used while all could have been so often */
#define ROWS_ROUNDS 16u /* until rows are cached again, in the same measure */

struct loci_cuda_pair_entry {
    const loci_buffer *buffer;
    uint64_t at;
    uint8_t *index, *kv; /* NULL = not there */
    bool kv_below;       /* kv is memory of the host */
    size_t index_bytes, kv_bytes;
    uint32_t *frame_of; /* on the device; only of kv below, NULL where rows are not cached */
    uint32_t pins;
    bool gone;     /* its buffer is; it goes with its last pin */
    uint64_t used; /* by the clock, which counts pins */
    loci_cuda_pair pair;
    loci_cuda_pair_entry *next;
};

struct loci_cuda_pairs {
    loci_cuda *cuda;
    pthread_mutex_t lock;
    loci_cuda_pair_entry *buckets[BUCKETS];
    loci_cuda_pair_entry *gone; /* still pinned */
    size_t count;
    uint64_t clock;
    loci_cuda_pairs_stats stats;
    loci_cuda_staging staging;
    loci_cuda_rows rows;
    uint64_t rows_after; /* by the clock: when rows that gave way may be cached again */
    pthread_mutex_t told_lock;
    loci_cuda_pairs_stats told;
};

/* --- parts that go --------------------------------------------------------------------- */

static size_t table_bytes(const loci_cuda_pair_entry *entry) {
    return entry->pair.tokens * sizeof *entry->frame_of;
}

static void drop_table(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry) {
    if (!entry->frame_of) return;
    loci_cuda_rows_forget(&pairs->rows, entry->frame_of, entry->pair.tokens);
    (void)cudaFree(entry->frame_of);
    entry->frame_of = NULL;
    pairs->stats.bytes -= table_bytes(entry);
}

static void drop_index(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry) {
    if (!entry->index) return;
    drop_table(pairs, entry);
    (void)cudaFree(entry->index);
    entry->index = NULL;
    pairs->stats.bytes -= entry->index_bytes;
}

static void drop_kv(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry) {
    if (!entry->kv) return;
    if (entry->kv_below) {
        drop_table(pairs, entry);
        (void)cudaFreeHost(entry->kv);
        pairs->stats.host_bytes -= entry->kv_bytes;
    } else {
        (void)cudaFree(entry->kv);
        pairs->stats.bytes -= entry->kv_bytes;
        pairs->stats.kv_bytes -= entry->kv_bytes;
    }
    entry->kv = NULL;
    entry->kv_below = false;
}

static loci_cuda_pair_entry **link_of(loci_cuda_pairs *pairs, const loci_buffer *buffer,
                                      uint64_t at) {
    size_t bucket = (size_t)(((uintptr_t)buffer / 16 * 0x9e3779b97f4a7c15u + at) >> 7) % BUCKETS;
    loci_cuda_pair_entry **link = &pairs->buckets[bucket];
    while (*link && ((*link)->buffer != buffer || (*link)->at != at)) link = &(*link)->next;
    return link;
}

static void release(loci_cuda_pairs *pairs, loci_cuda_pair_entry **link) {
    loci_cuda_pair_entry *entry = *link;
    *link = entry->next;
    drop_index(pairs, entry);
    drop_kv(pairs, entry);
    pairs->count--;
    free(entry);
}

/* What goes may still be read by a look-up that has moved on. */
static void evict(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry, bool index) {
    (void)loci_cuda_drain(pairs->cuda);
    (index ? drop_index : drop_kv)(pairs, entry);
    pairs->stats.evictions++;
    if (!entry->index && !entry->kv) release(pairs, link_of(pairs, entry->buffer, entry->at));
}

typedef bool (*entry_test)(const loci_cuda_pair_entry *entry);

static bool has_kv_on_device(const loci_cuda_pair_entry *entry) {
    return entry->kv && !entry->kv_below;
}

static bool has_kv_below(const loci_cuda_pair_entry *entry) {
    return entry->kv && entry->kv_below;
}

static bool has_index(const loci_cuda_pair_entry *entry) {
    return entry->index != NULL;
}

/* The least recently used one that nobody has pinned, last used before a time; NULL if there is
 * none. */
static loci_cuda_pair_entry *oldest(loci_cuda_pairs *pairs, entry_test test, uint64_t before) {
    loci_cuda_pair_entry *found = NULL;
    for (size_t b = 0; b < BUCKETS; b++)
        for (loci_cuda_pair_entry *e = pairs->buckets[b]; e; e = e->next)
            if (e->pins == 0 && e->used < before && test(e) && (!found || e->used < found->used))
                found = e;
    return found;
}

/* --- memory ---------------------------------------------------------------------------- */

/* Page-locked memory, for which K and V last used before a time give way; NULL: no room. */
static uint8_t *take_host(loci_cuda_pairs *pairs, size_t bytes, uint64_t before) {
    void *host = NULL;
    if (bytes > pairs->stats.host_budget) return NULL;
    while (pairs->stats.host_bytes + bytes > pairs->stats.host_budget) {
        loci_cuda_pair_entry *old = oldest(pairs, has_kv_below, before);
        if (!old) return NULL;
        evict(pairs, old, false);
    }
    if (cudaHostAlloc(&host, bytes, cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) {
        (void)cudaGetLastError(); /* the system locks no more */
        return NULL;
    }
    pairs->stats.host_bytes += bytes;
    return host;
}

/* K and V from the device to the host, or away where there is no room. */
static void lower(loci_cuda_pairs *pairs, loci_cuda_pair_entry *entry) {
    uint8_t *host = take_host(pairs, entry->kv_bytes, entry->used);
    (void)loci_cuda_drain(pairs->cuda);
    if (host &&
        cudaMemcpy(host, entry->kv, entry->kv_bytes, cudaMemcpyDeviceToHost) != cudaSuccess) {
        (void)cudaGetLastError();
        (void)cudaFreeHost(host);
        pairs->stats.host_bytes -= entry->kv_bytes;
        host = NULL;
    }
    if (!host) {
        evict(pairs, entry, false);
        return;
    }
    drop_kv(pairs, entry);
    entry->kv = host;
    entry->kv_below = true;
    pairs->stats.lowered++;
}

/* Device memory within the budget as things are; NULL: no room. */
static uint8_t *take_free(loci_cuda_pairs *pairs, size_t bytes) {
    void *device = NULL;
    if (pairs->stats.bytes + bytes > pairs->stats.budget) return NULL;
    while (cudaMalloc(&device, bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        device = NULL;
        if (!loci_cuda_shrink_idle(pairs->cuda)) return NULL;
    }
    pairs->stats.bytes += bytes;
    return device;
}

/* What is free, or would be if K and V went down. */
static uint64_t room(const loci_cuda_pairs *pairs) {
    uint64_t fixed = pairs->stats.bytes;
    for (size_t b = 0; b < BUCKETS; b++)
        for (const loci_cuda_pair_entry *e = pairs->buckets[b]; e; e = e->next)
            if (e->pins == 0 && has_kv_on_device(e)) fixed -= e->kv_bytes;
    return fixed < pairs->stats.budget ? pairs->stats.budget - fixed : 0;
}

/* The same, for which K and V of others go down; none do if the budget has no room even so. The
 * device may have less than the budget: weights and sequences come after it was made. */
static uint8_t *take_lowering(loci_cuda_pairs *pairs, size_t bytes) {
    uint8_t *device = NULL;
    if (bytes > room(pairs)) return NULL;
    while (!(device = take_free(pairs, bytes))) {
        loci_cuda_pair_entry *old = oldest(pairs, has_kv_on_device, UINT64_MAX);
        if (!old) return NULL;
        lower(pairs, old);
    }
    return device;
}

static void drop_rows(loci_cuda_pairs *pairs) {
    pairs->stats.bytes -= pairs->rows.bytes;
    loci_cuda_rows_drop(&pairs->rows, pairs->cuda);
    for (size_t b = 0; b <= BUCKETS; b++)
        for (loci_cuda_pair_entry *e = b < BUCKETS ? pairs->buckets[b] : pairs->gone; e;
             e = e->next)
            if (e->frame_of) (void)cudaMemset(e->frame_of, 0, table_bytes(e));
    (void)loci_cuda_drain(pairs->cuda);
}

/* One thing gives way: K and V that can go down, an idle index, the cached rows, any other index.
 * False if there is none. */
static bool give_way(loci_cuda_pairs *pairs) {
    loci_cuda_pair_entry *old = oldest(pairs, has_kv_on_device, UINT64_MAX);
    if (old) {
        lower(pairs, old);
        return true;
    }
    old = oldest(pairs, has_index, UINT64_MAX);
    bool idle = old && pairs->clock - old->used > IDLE_ROUNDS * pairs->count;
    if (pairs->rows.memory && !idle) {
        drop_rows(pairs);
        pairs->rows_after = pairs->clock + ROWS_ROUNDS * pairs->count;
        return true;
    }
    if (old) evict(pairs, old, true);
    return old != NULL;
}

static loci_status take_device(loci_cuda_pairs *pairs, size_t bytes, const char *what,
                               uint8_t **out, loci_error *err) {
    while (!(*out = take_free(pairs, bytes)))
        if (!give_way(pairs))
            return loci_fail(err, LOCI_E_LIMIT,
                             "a layer of this corpus does not fit the GPU: %zu bytes of %s more "
                             "than the %llu of %llu MiB for extents that are in use",
                             bytes, what, (unsigned long long)(pairs->stats.bytes >> 20),
                             (unsigned long long)(pairs->stats.budget >> 20));
    return LOCI_OK;
}

/* --- loading --------------------------------------------------------------------------- */

static loci_status load_index(loci_cuda_pairs *pairs, const uint8_t *blob,
                              loci_cuda_pair_entry *entry, loci_error *err) {
    uint8_t *device = NULL;
    LOCI_TRY(loci_cuda_blob_check_index(pairs->cuda->pool, blob, err));
    entry->index_bytes = loci_cuda_blob_index_bytes(blob);
    LOCI_TRY(take_device(pairs, entry->index_bytes, "index", &device, err));
    entry->index = device;
    loci_status status = loci_cuda_blob_put_index(&pairs->staging, pairs->cuda->pool, blob, device,
                                                  &entry->pair, err);
    if (status != LOCI_OK) drop_index(pairs, entry);
    return status;
}

/* On the device, where older ones go down for it; or below; or, where there is nothing below, in
 * the place of whatever can go. */
static loci_status load_kv(loci_cuda_pairs *pairs, const uint8_t *blob, bool below,
                           loci_cuda_pair_entry *entry, loci_error *err) {
    size_t bytes = loci_cuda_blob_kv_bytes(blob);
    LOCI_TRY(loci_cuda_blob_check_kv(pairs->cuda->pool, blob, err));
    uint8_t *at = below ? NULL : take_lowering(pairs, bytes);
    bool host = !at;
    if (host) at = take_host(pairs, bytes, UINT64_MAX);
    if (!at) {
        host = false;
        LOCI_TRY(take_device(pairs, bytes, "keys and values", &at, err));
    }
    entry->kv = at;
    entry->kv_below = host;
    entry->kv_bytes = bytes;
    if (!host) pairs->stats.kv_bytes += bytes;
    loci_status status =
        loci_cuda_blob_put_kv(host ? NULL : &pairs->staging, pairs->cuda->pool, blob, at, err);
    if (status != LOCI_OK) drop_kv(pairs, entry);
    return status;
}

/* The cache of rows is set up when the first pair needs it, and takes no more than half of what is
 * left then: tables and indexes come, too. */
static void set_up_rows(loci_cuda_pairs *pairs, uint32_t dim) {
    loci_error err;
    if (pairs->rows.memory || pairs->clock < pairs->rows_after) return;
    size_t bytes = pairs->stats.budget / 100 * LOCI_CUDA_ROWS_PERCENT, half = room(pairs) / 2;
    if (bytes > half) bytes = half;
    uint8_t *device = NULL; /* the device may have less */
    while (bytes >= loci_cuda_rows_least(dim) && !(device = take_lowering(pairs, bytes)))
        bytes /= 2;
    if (device && loci_cuda_rows_use(&pairs->rows, device, bytes, dim, &err) == LOCI_OK) return;
    if (device) (void)cudaFree(device);
    if (device) pairs->stats.bytes -= bytes;
    pairs->rows_after = pairs->clock + ROWS_ROUNDS * pairs->count;
}

/* What the cache of rows needs to know of a pair below. Without, its rows are read where they are.
 */
static void cache_rows(loci_cuda_pairs *pairs, uint32_t dim, loci_cuda_pair_entry *entry) {
    if (!has_kv_below(entry)) return;
    set_up_rows(pairs, dim);
    if (entry->frame_of || !pairs->rows.memory || pairs->rows.cache.dim != dim) return;
    uint8_t *table = take_lowering(pairs, table_bytes(entry));
    if (!table) return;
    entry->frame_of = (void *)table;
    if (cudaMemset(table, 0, table_bytes(entry)) == cudaSuccess &&
        loci_cuda_drain(pairs->cuda) == cudaSuccess)
        return;
    (void)cudaGetLastError();
    drop_table(pairs, entry);
}

static loci_status load(loci_cuda_pairs *pairs, const loci_extent_view *extent, uint64_t hash,
                        bool below, loci_cuda_pair_entry *entry, loci_error *err) {
    const uint8_t *blob = extent->buffer->host + entry->at;
    if (entry->index && entry->kv) {
        pairs->stats.hits++;
        return LOCI_OK;
    }
    LOCI_TRY(loci_cuda_blob_open(blob, extent->buffer->bytes - entry->at, hash, err));
    if (!entry->index) LOCI_TRY(load_index(pairs, blob, entry, err));
    if (!entry->kv) LOCI_TRY(load_kv(pairs, blob, below, entry, err));
    pairs->stats.misses++;
    return LOCI_OK;
}

/* --- the cache ------------------------------------------------------------------------- */

loci_status loci_cuda_pairs_open(loci_cuda *cuda, loci_cuda_pairs **out, loci_error *err) {
    *out = NULL;
    loci_cuda_pairs *pairs = calloc(1, sizeof *pairs);
    if (!pairs) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cache of extents");
    pairs->cuda = cuda;
    pthread_mutex_init(&pairs->lock, NULL);
    pthread_mutex_init(&pairs->told_lock, NULL);
    size_t available = 0, total = 0;
    loci_status status = loci_cuda_try(cudaMemGetInfo(&available, &total), "cudaMemGetInfo", err);
    pairs->stats.budget = available / 100 * LOCI_CUDA_CACHE_PERCENT;
    pairs->stats.host_budget = loci_memory_limit() / 100 * LOCI_CUDA_HOST_PERCENT;
    pairs->told = pairs->stats;
    if (status == LOCI_OK) status = loci_cuda_staging_open(&pairs->staging, cuda->copies, err);
    if (status == LOCI_OK) status = loci_cuda_rows_init(&pairs->rows, cuda->copies, err);
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
    loci_cuda_rows_fini(&pairs->rows);
    loci_cuda_staging_close(&pairs->staging);
    pthread_mutex_destroy(&pairs->lock);
    pthread_mutex_destroy(&pairs->told_lock);
    free(pairs);
}

/* The entry of a pair, made where there is none; NULL without memory. */
static loci_cuda_pair_entry *entry_of(loci_cuda_pairs *pairs, const loci_buffer *buffer,
                                      uint64_t at) {
    loci_cuda_pair_entry **link = link_of(pairs, buffer, at);
    if (*link) return *link;
    *link = calloc(1, sizeof **link);
    if (!*link) return NULL;
    (*link)->buffer = buffer;
    (*link)->at = at;
    pairs->count++;
    return *link;
}

/* With the lock. */
static loci_status pin(loci_cuda_pairs *pairs, const loci_extent_view *extent, uint64_t at,
                       uint64_t hash, uint32_t head_dim, bool below, loci_cuda_pair_entry **out,
                       loci_error *err) {
    if (!extent->buffer->host)
        return loci_fail(err, LOCI_E_INTERNAL, "its buffer is not wrapped host memory");
    if (at > extent->buffer->bytes || at % 8 != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "pair lies outside its block");
    loci_cuda_pair_entry *entry = entry_of(pairs, extent->buffer, at);
    if (!entry) return loci_fail(err, LOCI_E_NOMEM, "no memory for the cache of extents");
    entry->pins++;
    entry->used = ++pairs->clock;
    loci_status status = load(pairs, extent, hash, below, entry, err);
    if (status == LOCI_OK) {
        const loci_pair_header *header = loci_pair_header_of(extent->buffer->host + at);
        if (header->head_dim != head_dim || header->tokens != extent->tokens)
            status = loci_fail(err, LOCI_E_CORRUPT, "header: of another shape than its extent");
    }
    if (status == LOCI_OK) {
        cache_rows(pairs, head_dim, entry);
        *out = entry;
        return LOCI_OK;
    }
    entry->pins--;
    if (entry->pins == 0 && !(entry->index && entry->kv)) {
        (void)loci_cuda_drain(pairs->cuda);
        release(pairs, link_of(pairs, extent->buffer, at));
    }
    return status;
}

loci_status loci_cuda_pairs_pin(loci_cuda_pairs *pairs, const loci_extent_view *extent,
                                uint32_t layer, uint32_t kv_heads, uint32_t kv_head,
                                uint32_t head_dim, bool below, loci_cuda_pair_entry **entry,
                                loci_cuda_pair *out, loci_error *err) {
    uint32_t index = layer * kv_heads + kv_head;
    *entry = NULL;
    pthread_mutex_lock(&pairs->lock);
    loci_status status = pin(pairs, extent, extent->pair_at[index], extent->pair_hash[index],
                             head_dim, below, entry, err);
    if (status == LOCI_OK) {
        *out = (*entry)->pair;
        out->kv = (*entry)->kv;
        out->frame_of = (*entry)->frame_of;
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
        loci_cuda_pair_entry **link = &pairs->gone;
        while (*link != entry) link = &(*link)->next;
        (void)loci_cuda_drain(pairs->cuda);
        release(pairs, link);
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
                loci_cuda_pair_entry *entry = *at;
                *at = entry->next;
                entry->gone = true;
                entry->next = pairs->gone;
                pairs->gone = entry;
                continue;
            }
            if (!waited) (void)loci_cuda_drain(pairs->cuda);
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
    while (before - pairs->stats.bytes < bytes && give_way(pairs)) any = true;
    pthread_mutex_unlock(&pairs->lock);
    return any;
}

uint64_t loci_cuda_row_bytes(const loci_corpus_view *corpus) {
    const loci_extent_view *first = corpus->extents;
    if (corpus->extent_count > 0 && first->buffer->host && first->pair_at[0] % 8 == 0 &&
        first->pair_at[0] + sizeof(loci_pair_header) <= first->buffer->bytes)
        return loci_cuda_blob_row_bytes(first->buffer->host + first->pair_at[0]);
    return loci_kv_stride(corpus->head_dim, LOCI_BF16);
}

void loci_cuda_pairs_lower(loci_cuda_pairs *pairs) {
    loci_cuda_pair_entry *old;
    pthread_mutex_lock(&pairs->lock);
    while ((old = oldest(pairs, has_kv_on_device, UINT64_MAX)) != NULL) lower(pairs, old);
    pthread_mutex_unlock(&pairs->lock);
}

loci_cuda_rows *loci_cuda_pairs_rows(loci_cuda_pairs *pairs) {
    return &pairs->rows;
}

/* With the lock. */
static void tell_stats(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out) {
    loci_cuda_row_state rows;
    loci_cuda_rows_figures(&pairs->rows, &rows);
    pairs->stats.frames = pairs->rows.cache.count;
    pairs->stats.row_hits = rows.hits;
    pairs->stats.row_misses = rows.misses;
    pairs->stats.row_evictions = rows.evicted;
    *out = pairs->stats;
    pthread_mutex_lock(&pairs->told_lock);
    pairs->told = pairs->stats;
    pthread_mutex_unlock(&pairs->told_lock);
}

void loci_cuda_pairs_stats_of(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out) {
    pthread_mutex_lock(&pairs->lock);
    tell_stats(pairs, out);
    pthread_mutex_unlock(&pairs->lock);
}

/* An index is about a byte a channel. */
bool loci_cuda_pairs_above(loci_cuda_pairs *pairs, const loci_corpus_view *corpus, uint32_t layer) {
    uint64_t row = loci_cuda_row_bytes(corpus) + corpus->head_dim, heads = corpus->kv_heads;
    uint64_t bytes = corpus->tokens * corpus->retrieval_layers * heads * row;
    pthread_mutex_lock(&pairs->lock);
    bool above = bytes <= pairs->stats.budget;
    for (uint32_t e = 0; e < corpus->extent_count && above && pairs->stats.host_bytes > 0; e++)
        for (uint32_t h = 0; h < heads && above; h++) {
            const loci_extent_view *extent = &corpus->extents[e];
            const loci_cuda_pair_entry *entry =
                *link_of(pairs, extent->buffer, extent->pair_at[layer * heads + h]);
            above = !entry || !has_kv_below(entry);
        }
    pthread_mutex_unlock(&pairs->lock);
    return above;
}

void loci_cuda_pairs_last_stats(loci_cuda_pairs *pairs, loci_cuda_pairs_stats *out) {
    if (pthread_mutex_trylock(&pairs->lock) == 0) {
        tell_stats(pairs, out);
        pthread_mutex_unlock(&pairs->lock);
        return;
    }
    pthread_mutex_lock(&pairs->told_lock);
    *out = pairs->told;
    pthread_mutex_unlock(&pairs->told_lock);
}

void loci_cuda_pairs_limit(loci_cuda_pairs *pairs, uint64_t bytes, uint64_t host_bytes) {
    pthread_mutex_lock(&pairs->lock);
    pairs->stats.budget = bytes;
    pairs->stats.host_budget = host_bytes;
    pairs->rows_after = 0;
    pthread_mutex_unlock(&pairs->lock);
}
