/* SPDX-License-Identifier: Apache-2.0
 *
 * Resource names; see names.h.
 */
#include "services/common/names.h"

#include <stdio.h>
#include <string.h>

#include "services/common/text.h"

static const char corpora_prefix[] = LOCI_PARENT "/corpora/";
static const char documents_infix[] = "/documents/";

static bool is_lower_alnum(char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

static bool corpus_id_valid(const char *id, size_t len) {
    if (len == 0 || len > LOCI_NAME_MAX || !is_lower_alnum(id[0])) return false;
    for (size_t i = 1; i < len; i++) {
        if (!is_lower_alnum(id[i]) && id[i] != '_' && id[i] != '-') return false;
    }
    return true;
}

bool loci_corpus_id_valid(const char *id) {
    return corpus_id_valid(id, strlen(id));
}

bool loci_document_id_valid(const char *id) {
    size_t len = strlen(id);
    if (len == 0 || len > LOCI_DOCUMENT_ID_MAX) return false;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)id[i];
        if (c < 0x20 || c == 0x7f) return false;
    }
    return loci_utf8_valid(loci_slice_text(id));
}

loci_status loci_parent_check(const char *parent, const char *field, loci_error *err) {
    if (strcmp(parent, LOCI_PARENT) == 0) return LOCI_OK;
    return loci_fail_reason(
        err, LOCI_E_INVAL, "INVALID_PARENT",
        "field %s: \"%.80s\" is not a known parent; it must be \"" LOCI_PARENT "\"", field, parent);
}

static loci_status bad_corpus(const char *name, const char *field, loci_error *err) {
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_CORPUS_NAME",
                            "field %s: \"%.100s\" is not a corpus name; it must be " LOCI_PARENT
                            "/corpora/NAME with NAME = [a-z0-9][a-z0-9_-]{0,62}",
                            field, name);
}

loci_status loci_corpus_name_parse(const char *name, const char *field,
                                   char corpus[LOCI_NAME_MAX + 1], loci_error *err) {
    size_t prefix = sizeof corpora_prefix - 1;
    if (strncmp(name, corpora_prefix, prefix) != 0) return bad_corpus(name, field, err);
    const char *id = name + prefix;
    if (!loci_corpus_id_valid(id)) return bad_corpus(name, field, err);
    snprintf(corpus, LOCI_NAME_MAX + 1, "%s", id);
    return LOCI_OK;
}

loci_status loci_document_name_parse(const char *name, const char *field,
                                     char corpus[LOCI_NAME_MAX + 1],
                                     char document[LOCI_DOCUMENT_ID_MAX + 1], loci_error *err) {
    size_t prefix = sizeof corpora_prefix - 1;
    if (strncmp(name, corpora_prefix, prefix) == 0) {
        const char *id = name + prefix;
        const char *slash = strchr(id, '/');
        if (slash && corpus_id_valid(id, (size_t)(slash - id)) &&
            strncmp(slash, documents_infix, sizeof documents_infix - 1) == 0 &&
            loci_document_id_valid(slash + sizeof documents_infix - 1)) {
            snprintf(corpus, LOCI_NAME_MAX + 1, "%.*s", (int)(slash - id), id);
            snprintf(document, LOCI_DOCUMENT_ID_MAX + 1, "%s", slash + sizeof documents_infix - 1);
            return LOCI_OK;
        }
    }
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_DOCUMENT_NAME",
                            "field %s: \"%.100s\" is not a document name; it must be " LOCI_PARENT
                            "/corpora/NAME/documents/ID with ID of 1-512 bytes of UTF-8 without "
                            "control characters",
                            field, name);
}

void loci_corpus_name_format(char out[LOCI_RESOURCE_MAX], const char *corpus) {
    snprintf(out, LOCI_RESOURCE_MAX, "%s%s", corpora_prefix, corpus);
}

void loci_document_name_format(char out[LOCI_RESOURCE_MAX], const char *corpus,
                               const char *document) {
    snprintf(out, LOCI_RESOURCE_MAX, "%s%s%s%s", corpora_prefix, corpus, documents_infix, document);
}

const char *loci_document_name_id(const char *name) {
    size_t prefix = sizeof corpora_prefix - 1;
    if (strncmp(name, corpora_prefix, prefix) != 0) return name;
    const char *infix = strstr(name + prefix, documents_infix);
    return infix ? infix + sizeof documents_infix - 1 : name;
}
