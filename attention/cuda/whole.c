/* SPDX-License-Identifier: Apache-2.0
 *
 * When all tokens are read instead of selected ones, and how that work is cut for whole_wide.cu.
 */
#include "attention/cuda/whole.h"

#include <math.h>

#include "attention/cuda/lookup.h"
#include "attention/cuda/pairs.h"

#define SHARED_BYTES ((size_t)227 << 10) /* of a block of whole_wide.cu, at most */
#define WAVES_MOST 8u
#define TILES_TO_BEGIN 4u /* what a block costs beside its tiles, in tiles */

/* Rates of an H200 (NOTES.md): bytes and operations a nanosecond of whole_wide.cu, attribution
 * included; nanoseconds of a look-up of one row: of its kernels, however little they do, and of
 * 2^20 tokens with 28 heads of 128, which grow with the root of either. */
#define WHOLE_BYTES 3500.0
#define WHOLE_OPERATIONS 4.2e5
#define WHOLE_NS 20e3
#define SELECT_NS 100e3
#define SELECT_MILLION_NS 310e3
#define SELECT_WIDTH (28.0 * 128.0)

bool loci_cuda_whole_wide(const loci_cuda *cuda, uint32_t dim) {
    return cuda->wgmma && cuda->block_bytes >= SHARED_BYTES && (dim == 64 || dim == 128);
}

bool loci_cuda_reads_whole(loci_backend *self, const loci_corpus_view *corpus, uint32_t rows,
                           uint32_t q_heads) {
    const loci_cuda *cuda = self->ctx;
    if (!loci_cuda_whole_wide(cuda, corpus->head_dim)) return false;
    loci_cuda_pairs_stats stats;
    loci_cuda_pairs_last_stats(cuda->pairs, &stats);
    if (stats.host_bytes > 0) return false; /* over the bus all of it takes far longer */
    double tokens = (double)corpus->tokens, width = (double)q_heads * corpus->head_dim;
    double bytes = tokens * corpus->kv_heads * corpus->head_dim * 4.0;
    double operations = 6.0 * rows * tokens * width;
    double whole = WHOLE_NS + fmax(bytes / WHOLE_BYTES, operations / WHOLE_OPERATIONS);
    double each = SELECT_MILLION_NS * sqrt(tokens / 1048576.0 * width / SELECT_WIDTH);
    return whole <= rows * (SELECT_NS + each);
}

/* Blocks that there is work for. */
static uint64_t blocks_of(const loci_lookup *lookup, uint32_t vector_tiles, uint32_t tiles) {
    const loci_cuda_look *look = &lookup->look;
    uint64_t blocks = 0;
    for (uint32_t e = 0; e < look->extents; e++)
        blocks += loci_cuda_chunks(lookup->pairs[(size_t)e * look->kv_heads].tokens,
                                   tiles * LOCI_CUDA_WIDE_TILE);
    return blocks * look->kv_heads * vector_tiles;
}

/* As many whole waves of blocks, one to a multiprocessor, as take the least time. */
uint32_t loci_cuda_wide_chunk(const loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    uint32_t vectors = (loci_cuda_wide_narrow(look) ? 1 : 2) * LOCI_CUDA_WIDE_GROUP;
    uint32_t vector_tiles = loci_cuda_chunks(look->vectors, vectors), best = 1;
    uint64_t all = blocks_of(lookup, vector_tiles, 1), least = UINT64_MAX;
    uint64_t slots = (uint64_t)lookup->cuda->multiprocessors;
    for (uint32_t wave = 1; wave <= WAVES_MOST; wave++) {
        uint64_t room = (uint64_t)wave * slots, tiles = all / room + 1;
        while (tiles * LOCI_CUDA_WIDE_TILE < look->tokens_max &&
               blocks_of(lookup, vector_tiles, (uint32_t)tiles) > room)
            tiles += tiles / 64 + 1;
        uint64_t blocks = blocks_of(lookup, vector_tiles, (uint32_t)tiles);
        uint64_t cost = (blocks + slots - 1) / slots * (tiles + TILES_TO_BEGIN);
        if (cost >= least) continue;
        least = cost;
        best = (uint32_t)tiles;
    }
    return best * LOCI_CUDA_WIDE_TILE;
}
