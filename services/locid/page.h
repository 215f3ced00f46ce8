/* SPDX-License-Identifier: Apache-2.0
 *
 * Page sizes and page tokens of the List methods (AIP-158).
 *
 * A token is base64url of: version byte, XXH3-64 of (method, parent, cursor), cursor. The
 * cursor is the last name of the page before. A token made for other arguments, or changed,
 * does not check out. Tokens hold nothing secret and do not expire.
 */
#ifndef LOCI_SERVICES_LOCID_PAGE_H
#define LOCI_SERVICES_LOCID_PAGE_H

#include "services/rpc/rpc.h"

#define LOCI_PAGE_DEFAULT 100
#define LOCI_PAGE_MAX 1000
#define LOCI_CURSOR_MAX 512

/* 0 = default; too large = the largest; negative = LOCI_E_INVAL, reason INVALID_PAGE_SIZE. */
LOCI_MUST_CHECK loci_status loci_page_size(int32_t asked, size_t *out, loci_error *err);
/* Appends the token (not terminated). */
void loci_page_token_make(const char *method, const char *parent, const char *cursor,
                          loci_buf *out);
/* An empty token gives the empty cursor. LOCI_E_INVAL, reason INVALID_PAGE_TOKEN. */
LOCI_MUST_CHECK loci_status loci_page_token_open(const char *method, const char *parent,
                                                 const char *token,
                                                 char cursor[LOCI_CURSOR_MAX + 1], loci_error *err);
/* Sends the reply of a List method: *token, its next_page_token, is made for the page behind
 * `last`, the name of the last item, or left as it is when that is NULL: no page follows. */
LOCI_MUST_CHECK loci_status loci_page_send(loci_rpc_call *call, const ProtobufCMessage *reply,
                                           char **token, const char *method, const char *parent,
                                           const char *last, loci_error *err);

#endif
