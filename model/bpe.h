/* SPDX-License-Identifier: Apache-2.0
 *
 * Byte-pair encoding of one piece of text: vocabulary and merges; internal to model/.
 *
 * Immutable after loci_bpe_open (and loci_bpe_hide), shared by threads; a loci_bpe_scratch belongs
 * to one thread.
 */
#ifndef LOCI_MODEL_BPE_H
#define LOCI_MODEL_BPE_H

#include "model/json.h"
#include "model/tokenizer.h"

/* Bounds of what is accepted; a piece of the longest size takes about 460 MB to encode. */
enum { LOCI_VOCAB_MAX = 1 << 22, LOCI_PIECE_BYTES_MAX = 1 << 24 };

typedef struct loci_bpe loci_bpe;

/* Zero-initialise; reused over pieces. */
typedef struct loci_bpe_scratch {
    struct loci_bpe_symbol *symbols;
    uint64_t *heap;
    size_t symbol_capacity, heap_capacity;
} loci_bpe_scratch;

/* Reads the "model" of a tokenizer.json. */
LOCI_MUST_CHECK loci_status loci_bpe_open(const loci_json *model, loci_bpe **out, loci_error *err);
void loci_bpe_close(loci_bpe *bpe);
void loci_bpe_scratch_fini(loci_bpe_scratch *scratch);

/* One more than the highest id. */
uint32_t loci_bpe_limit(const loci_bpe *bpe);
/* False when no token has this id. The bytes stay valid until close. */
bool loci_bpe_token(const loci_bpe *bpe, uint32_t id, loci_slice *bytes);
/* The id of the token with exactly these bytes; UINT32_MAX when there is none. */
uint32_t loci_bpe_find(const loci_bpe *bpe, loci_slice bytes);
uint32_t loci_bpe_byte(const loci_bpe *bpe, uint8_t byte);
/* The token is never chosen for a whole piece because it spells it: for special tokens. */
void loci_bpe_hide(loci_bpe *bpe, uint32_t id);
/* Appends the tokens of one piece that begins at byte `base` of the text. */
LOCI_MUST_CHECK loci_status loci_bpe_encode(const loci_bpe *bpe, loci_bpe_scratch *scratch,
                                            loci_slice piece, uint32_t base, loci_tokens *out,
                                            loci_error *err);

#endif
