/* SPDX-License-Identifier: Apache-2.0
 *
 * What `loci register` is given: files, folders, .jsonl files, "-". Folders are walked in order of
 * names, so that the same folder always registers in the same order.
 *
 * Document ids: below a folder, the path relative to that folder; a file named itself, its path
 * as given, or its name alone when that path is absolute or leads through "..".
 */
#ifndef LOCI_SERVICES_LOCI_SOURCES_H
#define LOCI_SERVICES_LOCI_SOURCES_H

#include <stdio.h>

#include "base/status.h"

typedef enum loci_source_kind { LOCI_SOURCE_TEXT, LOCI_SOURCE_ROWS } loci_source_kind;

typedef struct loci_source {
    char *path; /* "-" = standard input; owned */
    char *id;   /* owned; unused for rows */
    loci_source_kind kind;
    uint64_t bytes; /* 0 = unknown */
} loci_source;

typedef struct loci_sources {
    loci_source *items;
    size_t count, capacity;
    uint64_t bytes;       /* of all */
    size_t skipped_empty; /* empty files met in folders */
} loci_sources;

/* Adds what `path` stands for. stdin_id, stdin_rows: how "-" is taken. Errors name the path. */
LOCI_MUST_CHECK loci_status loci_sources_add(loci_sources *sources, const char *path,
                                             const char *stdin_id, bool stdin_rows,
                                             loci_error *err);
/* LOCI_E_INVAL when two sources would get the same document id. */
LOCI_MUST_CHECK loci_status loci_sources_check(const loci_sources *sources, loci_error *err);
void loci_sources_fini(loci_sources *sources);

#endif
