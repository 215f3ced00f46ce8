/* SPDX-License-Identifier: Apache-2.0
 *
 * How much memory the store's parts take: registration at most, and extents in the page cache;
 * and the other figures of a status.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "memory/ingest.h"
#include "memory/internal.h"
#include "memory/pipeline.h"

#define PATIENCE_MS 10 /* for all locks of a status together */
#define RESIDENT_NS 1000000000u
#define EXTENTS_LOOKED_AT 64u
#define PAGES_LOOKED_AT 1024u /* of each: some milliseconds for all of them */

static uint64_t power_of_two(uint64_t value) {
    uint64_t power = 64;
    while (power < value) power *= 2;
    return power;
}

/* Keys as bytes, lists and centroids. */
static uint64_t clustering_memory(uint64_t tokens, uint64_t dim) {
    return tokens * (dim + 36) + (tokens / LOCI_LEAF_TOKENS + 1) * (dim + 16);
}

static uint64_t blob_memory(uint64_t tokens, uint64_t dim) {
    uint64_t leaves = tokens / (LOCI_LEAF_TOKENS / 2) + 1;
    uint64_t node = sizeof(loci_node) + sizeof(loci_root) + 4 * dim;
    return tokens * (5 * dim + dim / 8 + 15) + leaves * (node + sizeof(loci_leaf)) + 72 * dim +
           LOCI_BLOCK_ALIGN * 16;
}

/* Work of one pair's index (attention/index_build.c): keys as f32, lists of tokens, sums; beside
 * them first what clustering needs, then the blob. */
static uint64_t index_memory(uint64_t tokens, uint64_t dim) {
    uint64_t clustering = clustering_memory(tokens, dim);
    uint64_t writing = tokens * (dim / 4) + blob_memory(tokens, dim);
    return tokens * (4 * dim + 14) + (clustering > writing ? clustering : writing);
}

/* What is held of the pairs ahead while one is put (loci_pairs_ahead): all of their work, what
 * clustering needs if the CPU has to do it, and K and V, unless these are there anyway. Two long
 * pairs, or all that are ahead of a short one. */
static uint64_t overlap_memory(uint64_t tokens, uint64_t dim, bool rows) {
    uint64_t shorter = tokens < LOCI_EXTENT_SEAL_TOKENS ? tokens : LOCI_EXTENT_SEAL_TOKENS;
    uint64_t held = LOCI_PAIRS_AHEAD_MOST * shorter;
    if (held < 2 * tokens) held = 2 * tokens;
    return index_memory(held, dim) + held * (rows ? 4 * dim : 0);
}

/* One pair: its K and V, its index. The list of segments and the slot map of all. */
static uint64_t merge_memory(const loci_geometry *geometry, const loci_store_options *options,
                             uint64_t tokens) {
    uint64_t dim = geometry->head_dim;
    if (tokens == 0) return 0;
    return tokens * (4 * dim + 1 + sizeof(uint32_t)) +
           2ull * LOCI_EXTENT_SEGMENTS_MAX * sizeof(loci_built_segment) +
           index_memory(tokens, dim) +
           (options->pairs_overlap ? overlap_memory(tokens, dim, true) : 0);
}

uint64_t loci_ingest_memory(const loci_geometry *geometry, const loci_store_options *options) {
    uint64_t dim = geometry->head_dim, kv = loci_geometry_kv_bytes(geometry);
    uint64_t extent = loci_extent_tokens_max(geometry, options);
    uint64_t batch =
        loci_pipeline_batch_tokens(geometry, options) + 2ull * geometry->segment_tokens;
    uint64_t rows = power_of_two(extent < 1024 ? 1024 : extent); /* of a builder */
    return power_of_two(options->document_bytes_max) + batch * (kv + 64) +
           (options->seal_beside ? 3 : 2) * rows * kv +
           extent * (dim * 4 + 1) /* K and V of a pair, read back */ + index_memory(extent, dim) +
           (options->pairs_overlap ? overlap_memory(extent, dim, false) : 0) +
           merge_memory(geometry, options, options->merge_tokens);
}

uint32_t loci_merge_tokens_within(const loci_geometry *geometry, const loci_store_options *options,
                                  uint64_t bytes) {
    uint64_t tokens = 2ull * loci_extent_tokens_max(geometry, options), most = 0;
    for (; tokens <= LOCI_EXTENT_TOKENS_MAX; tokens *= 2)
        if (merge_memory(geometry, options, tokens) <= bytes) most = tokens;
    return (uint32_t)most;
}

/* --- Figures for status ------------------------------------------------------------------ */

/* Caller holds store->lock, as below. */
static void look_at_corpus(loci_corpus *corpus, const struct timespec *until) {
    if (pthread_mutex_timedlock(&corpus->lock, until) != 0) return;
    corpus->seen_tokens = corpus->manifest ? corpus->manifest->live_tokens : 0;
    corpus->seen_pending =
        corpus->damage.status == LOCI_OK ? corpus->pending_end - corpus->pending_first : 0;
    corpus->seen_extents = corpus->opened_count;
    corpus->seen_mapped = 0;
    for (size_t i = 0; i < corpus->opened_count; i++)
        corpus->seen_mapped += corpus->opened[i]->bytes;
    pthread_mutex_unlock(&corpus->lock);
    if (corpus->successor)
        look_at_corpus(corpus->successor, until); /* of it, only what is mapped counts */
}

/* Pages of some part of the map, and how many of them are in RAM: none where the system does not
 * tell. `turn` moves the part. */
static void count_pages(const loci_extent *extent, size_t turn, uint64_t *looked_at,
                        uint64_t *found) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (extent->bytes + page - 1) / page;
    size_t part = pages < PAGES_LOOKED_AT ? pages : PAGES_LOOKED_AT;
    size_t first = turn * PAGES_LOOKED_AT % (pages - part + 1);
    unsigned char in_ram[PAGES_LOOKED_AT];
    if (mincore((void *)(uintptr_t)(extent->map + first * page), part * page, in_ram) != 0) return;
    *looked_at += part;
    for (size_t i = 0; i < part; i++) *found += in_ram[i] & 1u;
}

/* Of all open extents some stand for all. They stay open since their corpus is locked. */
static void look_at_pages(loci_store *store, const struct timespec *until) {
    size_t count = 0, at = 0, next = 0;
    uint64_t looked_at = 0, found = 0;
    for (size_t i = 0; i < store->corpus_count; i++) count += store->corpora[i]->seen_extents;
    size_t step = (count + EXTENTS_LOOKED_AT - 1) / EXTENTS_LOOKED_AT;
    for (size_t i = 0; i < store->corpus_count; i++) {
        loci_corpus *corpus = store->corpora[i];
        size_t end = at + corpus->seen_extents;
        if (next < end && pthread_mutex_timedlock(&corpus->lock, until) == 0) {
            for (; next < end && next - at < corpus->opened_count; next += step)
                count_pages(corpus->opened[next - at], next, &looked_at, &found);
            pthread_mutex_unlock(&corpus->lock);
        }
        while (next < end) next += step;
        at = end;
    }
    if (looked_at == 0) return;
    store->resident_share = (double)found / (double)looked_at;
    store->resident_ns = loci_now_ns();
}

static loci_store_figures add_up(const loci_store *store) {
    loci_store_figures sum = {.corpora = store->corpus_count};
    for (size_t i = 0; i < store->corpus_count; i++) {
        sum.tokens += store->corpora[i]->seen_tokens;
        sum.pending_documents += store->corpora[i]->seen_pending;
        sum.mapped_bytes += store->corpora[i]->seen_mapped;
        const char *model = store->options.fingerprint;
        if (model && strcmp(store->corpora[i]->geometry.fingerprint, model) != 0)
            sum.other_models++;
        const loci_corpus *successor = store->corpora[i]->successor;
        if (!successor) continue;
        sum.reindexing++;
        sum.mapped_bytes += successor->seen_mapped;
    }
    sum.resident_bytes = (uint64_t)(store->resident_share * (double)sum.mapped_bytes);
    return sum;
}

void loci_store_figures_of(loci_store *store, loci_store_figures *out) {
    struct timespec until = loci_moment_in(CLOCK_REALTIME, PATIENCE_MS);
    bool locked = pthread_mutex_timedlock(&store->lock, &until) == 0;
    if (locked) {
        for (size_t i = 0; i < store->corpus_count; i++) look_at_corpus(store->corpora[i], &until);
        if (store->resident_ns == 0 || loci_now_ns() - store->resident_ns >= RESIDENT_NS)
            look_at_pages(store, &until);
    }
    pthread_mutex_lock(&store->figures_lock);
    if (locked) store->figures = add_up(store);
    *out = store->figures;
    pthread_mutex_unlock(&store->figures_lock);
    if (locked) pthread_mutex_unlock(&store->lock);
}
