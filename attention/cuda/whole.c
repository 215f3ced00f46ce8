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
#define INT8_BYTES 1500.0
#define WHOLE_OPERATIONS 4.2e5
#define WHOLE_NS 20e3
#define SELECT_NS 100e3
#define SELECT_MILLION_NS 310e3
#define SELECT_WIDTH (28.0 * 128.0)

bool loci_cuda_whole_wide(const loci_cuda *cuda, uint32_t dim) {
    return cuda->wgmma && cuda->block_bytes >= SHARED_BYTES && (dim == 64 || dim == 128);
}

bool loci_cuda_reads_whole(loci_backend *self, const loci_corpus_view *corpus,
                           uint32_t retrieval_layer, uint32_t rows, uint32_t q_heads) {
    const loci_cuda *cuda = self->ctx;
    if (!loci_cuda_whole_wide(cuda, corpus->head_dim)) return false;
    double tokens = (double)corpus->tokens, width = (double)q_heads * corpus->head_dim;
    double row = (double)loci_cuda_row_bytes(corpus), bf16 = 4.0 * corpus->head_dim;
    double bytes = tokens * corpus->kv_heads * row;
    double operations = 6.0 * rows * tokens * width;
    double read = bytes / (row < bf16 ? INT8_BYTES : WHOLE_BYTES);
    double whole = WHOLE_NS + fmax(read, operations / WHOLE_OPERATIONS);
    double each = SELECT_MILLION_NS * sqrt(tokens / 1048576.0 * width / SELECT_WIDTH);
    return whole <= rows * (SELECT_NS + each) &&
           loci_cuda_pairs_above(cuda->pairs, corpus, retrieval_layer); /* the bus is far slower */
}

uint32_t loci_cuda_wide_parts(const loci_lookup *lookup, uint32_t chunk) {
    const loci_cuda_look *look = &lookup->look;
    uint32_t parts = 0;
    for (uint32_t e = 0; e < look->extents; e++)
        parts += loci_cuda_chunks(lookup->pairs[(size_t)e * look->kv_heads].tokens, chunk);
    return parts;
}

/* As many whole waves of blocks, one to a multiprocessor, as take the least time. */
uint32_t loci_cuda_wide_chunk(const loci_lookup *lookup) {
    const loci_cuda_look *look = &lookup->look;
    uint32_t vectors = (loci_cuda_wide_narrow(look) ? 1 : 2) * LOCI_CUDA_WIDE_GROUP;
    uint64_t each = (uint64_t)look->kv_heads * loci_cuda_chunks(look->vectors, vectors);
    uint64_t slots = (uint64_t)lookup->cuda->multiprocessors, least = UINT64_MAX;
    uint64_t all = each * loci_cuda_wide_parts(lookup, LOCI_CUDA_WIDE_TILE);
    uint64_t first = (each * look->extents + slots - 1) / slots; /* a block to each pair */
    uint32_t best = LOCI_CUDA_WIDE_TILE;
    for (uint64_t wave = first; wave < first + WAVES_MOST; wave++) {
        uint64_t tiles = all / (wave * slots) + 1, blocks;
        while ((blocks = each * loci_cuda_wide_parts(
                                    lookup, (uint32_t)tiles * LOCI_CUDA_WIDE_TILE)) > wave * slots)
            tiles += tiles / 64 + 1;
        uint64_t cost = (blocks + slots - 1) / slots * (tiles + TILES_TO_BEGIN);
        if (cost >= least) continue;
        least = cost;
        best = (uint32_t)tiles * LOCI_CUDA_WIDE_TILE;
    }
    return best;
}
