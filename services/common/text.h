/* SPDX-License-Identifier: Apache-2.0
 *
 * Text helpers of the programs: UTF-8, numbers with bounds, sizes with suffixes, addresses.
 */
#ifndef LOCI_SERVICES_COMMON_TEXT_H
#define LOCI_SERVICES_COMMON_TEXT_H

#include "base/buf.h"

#define LOCI_DEFAULT_ADDRESS "127.0.0.1:7411"

/* Length of the well-formed UTF-8 sequence at the start of text (1-4), 0 when there is none. */
size_t loci_utf8_step(loci_slice text);
bool loci_utf8_valid(loci_slice text);
/* Appends text with every malformed byte replaced by U+FFFD. */
void loci_utf8_append_clean(loci_buf *out, loci_slice text);

/* The first place at or after `from` where `wanted` stands in `text`: without regard to ASCII case,
 * runs of white space alike, not inside a run of ASCII letters and digits that goes on beyond it.
 * White space around `wanted` is ignored; nothing is found of nothing. */
bool loci_text_find(loci_slice text, size_t from, loci_slice wanted, size_t *start, size_t *end);

/* Whole-text decimal numbers; false when malformed or outside [min, max]. */
bool loci_parse_u64(const char *text, uint64_t min, uint64_t max, uint64_t *out);
bool loci_parse_double(const char *text, double min, double max, double *out);
/* "268435456", "256M", "4G", "1.5G": K, M, G and T are powers of 1,024. */
bool loci_parse_size(const char *text, uint64_t *out);
/* "true", "yes", "on", "1" and their opposites. */
bool loci_parse_bool(const char *text, bool *out);
/* "1.5 GiB": for people, three digits. */
const char *loci_format_size(char out[32], uint64_t bytes);
/* "1,234,567" */
const char *loci_format_count(char out[32], uint64_t count);

/* Checks the form of "HOST:PORT", "[V6]:PORT" or "unix:PATH"; *local tells whether only this
 * machine can reach it. LOCI_E_INVAL, reason INVALID_ADDRESS. */
LOCI_MUST_CHECK loci_status loci_address_check(const char *address, bool *local, loci_error *err);

#endif
