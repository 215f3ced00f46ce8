/* SPDX-License-Identifier: Apache-2.0
 *
 * Resource names, as the public API spells them:
 *
 *   tenants/default/corpora/NAME
 *   tenants/default/corpora/NAME/documents/ID      (ID may hold slashes)
 *
 * Used by the daemon to take requests apart and by the CLI to make them.
 */
#ifndef LOCI_SERVICES_COMMON_NAMES_H
#define LOCI_SERVICES_COMMON_NAMES_H

#include "base/buf.h"
#include "memory/store.h"

#define LOCI_PARENT "tenants/default"
/* Room for any resource name and its NUL. */
#define LOCI_RESOURCE_MAX (24 + LOCI_NAME_MAX + 11 + LOCI_DOCUMENT_ID_MAX + 1)

/* [a-z0-9][a-z0-9_-]{0,62} */
bool loci_corpus_id_valid(const char *id);
/* 1-512 bytes of UTF-8 without control characters. */
bool loci_document_id_valid(const char *id);

/* `field` names the request's field in the error. LOCI_E_INVAL with reason
 * INVALID_PARENT, INVALID_CORPUS_NAME or INVALID_DOCUMENT_NAME. */
LOCI_MUST_CHECK loci_status loci_parent_check(const char *parent, const char *field,
                                              loci_error *err);
LOCI_MUST_CHECK loci_status loci_corpus_name_parse(const char *name, const char *field,
                                                   char corpus[LOCI_NAME_MAX + 1], loci_error *err);
LOCI_MUST_CHECK loci_status loci_document_name_parse(const char *name, const char *field,
                                                     char corpus[LOCI_NAME_MAX + 1],
                                                     char document[LOCI_DOCUMENT_ID_MAX + 1],
                                                     loci_error *err);
/* The ids must be valid. */
void loci_corpus_name_format(char out[LOCI_RESOURCE_MAX], const char *corpus);
void loci_document_name_format(char out[LOCI_RESOURCE_MAX], const char *corpus,
                               const char *document);
/* The document id in a resource name, or the whole text when it is none. Borrowed. */
const char *loci_document_name_id(const char *name);

#endif
