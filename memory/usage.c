/* SPDX-License-Identifier: Apache-2.0
 *
 * How much memory the store's parts take: registration at most, and extents in the page cache.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/ingest.h"
#include "memory/pipeline.h"

#define EXTENTS_LOOKED_AT                                                  \
    64u /* for the share in RAM: a few milliseconds even when all are full \
         */

static uint64_t power_of_two(uint64_t value) {
    uint64_t power = 64;
    while (power < value) power *= 2;
    return power;
}

/* Work of one pair's index (attention/index_build.c): keys as f32 and as bytes, lists of tokens,
 * centroids, then the blob and, in a buffer that grows by doubling, its copy. */
static uint64_t index_memory(uint64_t tokens, uint64_t dim) {
    uint64_t leaves = tokens / (LOCI_LEAF_TOKENS / 2) + 1;
    uint64_t node = sizeof(loci_node) + sizeof(loci_root) + 4 * dim;
    uint64_t work = tokens * (5 * dim + dim / 4 + 72) + leaves * (5 * dim + 16);
    uint64_t blob = tokens * (5 * dim + dim / 8 + 12) + leaves * (node + sizeof(loci_leaf)) +
                    72 * dim + LOCI_BLOCK_ALIGN * 16;
    return work + blob + power_of_two(blob);
}

uint64_t loci_ingest_memory(const loci_geometry *geometry, const loci_store_options *options) {
    uint64_t dim = geometry->head_dim, kv = loci_geometry_kv_bytes(geometry);
    uint64_t extent = loci_extent_tokens_max(geometry, options->extent_tokens);
    uint64_t batch = loci_pipeline_batch_tokens(geometry) + 2ull * geometry->segment_tokens;
    uint64_t rows = power_of_two(extent < 1024 ? 1024 : extent); /* of a builder */
    return power_of_two(options->document_bytes_max) + batch * (kv + 64) + 2 * rows * kv +
           extent * dim * 4 /* K and V of a pair, read back */ + index_memory(extent, dim);
}

/* Bytes of the map that are in RAM; 0 where the system does not tell. */
static uint64_t resident_bytes(const loci_extent *extent) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (extent->bytes + page - 1) / page;
    unsigned char *in_ram = malloc(pages);
    uint64_t count = 0;
    if (in_ram && mincore((void *)(uintptr_t)extent->map, (size_t)extent->bytes, in_ram) == 0)
        for (size_t i = 0; i < pages; i++) count += in_ram[i] & 1u;
    free(in_ram);
    return count * page;
}

/* References to the opened extents of a corpus; NULL when there is no memory or none is open. */
static loci_extent **opened_of(loci_corpus *corpus, size_t *count) {
    pthread_mutex_lock(&corpus->lock);
    *count = corpus->opened_count;
    loci_extent **list = *count ? malloc(*count * sizeof *list) : NULL;
    for (size_t i = 0; list && i < *count; i++) list[i] = loci_extent_ref(corpus->opened[i]);
    pthread_mutex_unlock(&corpus->lock);
    if (!list) *count = 0;
    return list;
}

void loci_store_mapped(loci_store *store, uint64_t *mapped, uint64_t *resident) {
    uint64_t after = 0, looked_at = 0;
    double found = 0;
    *mapped = 0;
    for (loci_corpus *corpus; (corpus = loci_corpus_next(store, after));) {
        after = corpus->uid;
        size_t count = 0, step;
        loci_extent **list = opened_of(corpus, &count);
        step = count / EXTENTS_LOOKED_AT + 1; /* of many extents, some stand for all */
        for (size_t i = 0; i < count; i++) {
            *mapped += list[i]->bytes;
            if (i % step == 0) {
                looked_at += list[i]->bytes;
                found += (double)resident_bytes(list[i]);
            }
            loci_extent_unref(list[i]);
        }
        free(list);
        loci_corpus_release(corpus);
    }
    double share = looked_at > 0 ? found / (double)looked_at : 0;
    *resident = (uint64_t)(share * (double)*mapped);
    if (*resident > *mapped) *resident = *mapped; /* whole pages were counted */
}
