/* SPDX-License-Identifier: Apache-2.0
 *
 * Byte-level BPE as a Hugging Face tokenizer.json states it.
 *
 * Supported: model BPE without dropout and byte_fallback; normalizer null or NFC;
 * pre_tokenizer ByteLevel, Split (Isolated) and Digits, alone or in a Sequence, their regexes run
 * by PCRE2; added and special tokens; decoder ByteLevel. What a post_processor, truncation or
 * padding would do is the caller's business. Anything else is refused by name. Any byte
 * string round-trips, but for what NFC changes: bytes that are not UTF-8 are tokenised byte by
 * byte.
 * A tokenizer is immutable after open and may be used by any number of threads.
 */
#ifndef LOCI_MODEL_TOKENIZER_H
#define LOCI_MODEL_TOKENIZER_H

#include "base/buf.h"

typedef struct loci_tokenizer loci_tokenizer;

/* ids and, for each, the end of its bytes in the input (also where that was normalized: the tokens
 * of a character that NFC replaced by several all end behind it). Reused over calls;
 * zero-initialise. */
typedef struct loci_tokens {
    uint32_t *ids;
    uint32_t *ends;
    size_t count, capacity;
} loci_tokens;

void loci_tokens_fini(loci_tokens *tokens);
LOCI_MUST_CHECK loci_status loci_tokens_push(loci_tokens *tokens, uint32_t id, uint32_t end);

LOCI_MUST_CHECK loci_status loci_tokenizer_open(const char *path, loci_tokenizer **out,
                                                loci_error *err);
void loci_tokenizer_close(loci_tokenizer *tokenizer);
/* Appends to *out. special: recognise added special tokens in the text (false for users' text:
 * then "<eos>" is five ordinary characters). Input up to 2^31 bytes. */
LOCI_MUST_CHECK loci_status loci_tokenizer_encode(const loci_tokenizer *tokenizer, loci_slice text,
                                                  bool special, loci_tokens *out, loci_error *err);
/* Appends the bytes of the tokens; special tokens are left out unless keep_special, ids without a
 * token always. */
LOCI_MUST_CHECK loci_status loci_tokenizer_decode(const loci_tokenizer *tokenizer,
                                                  const uint32_t *ids, size_t count,
                                                  bool keep_special, loci_buf *out);
/* The id of the token with exactly this text (" the", not its spelling in tokenizer.json), added
 * tokens first; UINT32_MAX when there is no such token. */
uint32_t loci_tokenizer_id(const loci_tokenizer *tokenizer, const char *token);
/* One more than the highest id. */
uint32_t loci_tokenizer_vocab_size(const loci_tokenizer *tokenizer);
bool loci_tokenizer_is_special(const loci_tokenizer *tokenizer, uint32_t id);

/* The token that, by the file's post_processor, stands before every text; UINT32_MAX: none. */
uint32_t loci_tokenizer_bos(const loci_tokenizer *tokenizer);
/* Encoding then decoding gives a text's normal form, not the text. */
bool loci_tokenizer_normalizes(const loci_tokenizer *tokenizer);

#endif
