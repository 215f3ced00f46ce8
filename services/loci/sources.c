/* SPDX-License-Identifier: Apache-2.0
 *
 * Files to register; see sources.h.
 */
#include "services/loci/sources.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "services/common/names.h"

#define DEPTH_MAX 64u

static bool has_suffix(const char *name, const char *suffix) {
    size_t len = strlen(name), tail = strlen(suffix);
    return len > tail && strcasecmp(name + len - tail, suffix) == 0;
}

static bool is_text_name(const char *name) {
    return has_suffix(name, ".txt") || has_suffix(name, ".md") || has_suffix(name, ".markdown");
}

static loci_status push(loci_sources *sources, const char *path, const char *id,
                        loci_source_kind kind, uint64_t bytes, loci_error *err) {
    if (kind == LOCI_SOURCE_TEXT && !loci_document_id_valid(id))
        return loci_fail(err, LOCI_E_INVAL,
                         "%.200s cannot be a document id: 1-512 bytes of UTF-8 without control "
                         "characters are allowed",
                         path);
    if (sources->count == sources->capacity) {
        size_t capacity = sources->capacity ? 2 * sources->capacity : 64;
        loci_source *items = realloc(sources->items, capacity * sizeof *items);
        if (!items) return loci_fail(err, LOCI_E_NOMEM, "no memory for the list of files");
        sources->items = items;
        sources->capacity = capacity;
    }
    loci_source item = {strdup(path), strdup(id), kind, bytes};
    if (!item.path || !item.id) {
        free(item.path);
        free(item.id);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the list of files");
    }
    sources->items[sources->count++] = item;
    sources->bytes += bytes;
    return LOCI_OK;
}

static int visible(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static int by_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

static char *join(const char *dir, const char *name) {
    char *path = NULL;
    const char *slash = dir[0] == '\0' || dir[strlen(dir) - 1] == '/' ? "" : "/";
    return asprintf(&path, "%s%s%s", dir, slash, name) < 0 ? NULL : path;
}

static loci_status walk(loci_sources *sources, const char *dir, const char *prefix, unsigned depth,
                        loci_error *err);

/* One entry of a folder. Links to files are followed, links to folders are not (no loops). */
static loci_status take_entry(loci_sources *sources, const char *dir, const char *prefix,
                              const char *name, unsigned depth, loci_error *err) {
    char *path = join(dir, name), *id = join(prefix, name);
    loci_status status = LOCI_OK;
    struct stat info;
    if (!path || !id) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for a path");
    } else if (lstat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        status = walk(sources, path, id, depth + 1, err);
    } else if (is_text_name(name) && stat(path, &info) == 0 && S_ISREG(info.st_mode)) {
        if (info.st_size == 0)
            sources->skipped_empty++;
        else
            status = push(sources, path, id, LOCI_SOURCE_TEXT, (uint64_t)info.st_size, err);
    }
    free(path);
    free(id);
    return status;
}

static loci_status walk(loci_sources *sources, const char *dir, const char *prefix, unsigned depth,
                        loci_error *err) {
    if (depth > DEPTH_MAX)
        return loci_fail(err, LOCI_E_LIMIT, "%.200s lies more than %u folders deep", dir,
                         DEPTH_MAX);
    struct dirent **entries = NULL;
    int count = scandir(dir, &entries, visible, by_name);
    if (count < 0)
        return loci_fail(err, LOCI_E_IO, "folder %.200s cannot be read: %s", dir, strerror(errno));
    loci_status status = LOCI_OK;
    for (int i = 0; i < count; i++) {
        if (status == LOCI_OK)
            status = take_entry(sources, dir, prefix, entries[i]->d_name, depth, err);
        free(entries[i]);
    }
    free(entries);
    return status;
}

/* The id of a file that was named itself. */
static const char *own_id(const char *path) {
    while (strncmp(path, "./", 2) == 0) path += 2;
    const char *slash = strrchr(path, '/');
    bool plain = path[0] != '/' && strncmp(path, "../", 3) != 0 && !strstr(path, "/../");
    return plain || !slash ? path : slash + 1;
}

loci_status loci_sources_add(loci_sources *sources, const char *path, const char *stdin_id,
                             bool stdin_rows, loci_error *err) {
    if (strcmp(path, "-") == 0)
        return push(sources, "-", stdin_id, stdin_rows ? LOCI_SOURCE_ROWS : LOCI_SOURCE_TEXT, 0,
                    err);
    struct stat info;
    if (stat(path, &info) != 0)
        return loci_fail(err, LOCI_E_IO, "%.200s cannot be read: %s", path, strerror(errno));
    if (S_ISDIR(info.st_mode)) {
        size_t before = sources->count + sources->skipped_empty;
        LOCI_TRY(walk(sources, path, "", 0, err));
        if (sources->count + sources->skipped_empty > before) return LOCI_OK;
        return loci_fail(err, LOCI_E_INVAL,
                         "folder %.200s holds no text or Markdown files (*.txt, *.md, *.markdown)",
                         path);
    }
    bool rows = has_suffix(path, ".jsonl");
    if (info.st_size == 0 && S_ISREG(info.st_mode))
        return loci_fail(err, LOCI_E_INVAL, "%.200s is empty", path);
    return push(sources, path, own_id(path), rows ? LOCI_SOURCE_ROWS : LOCI_SOURCE_TEXT,
                (uint64_t)info.st_size, err);
}

static int by_id(const void *a, const void *b) {
    const loci_source *const *x = a, *const *y = b;
    return strcmp((*x)->id, (*y)->id);
}

loci_status loci_sources_check(const loci_sources *sources, loci_error *err) {
    const loci_source **order = calloc(sources->count + 1, sizeof *order);
    if (!order) return loci_fail(err, LOCI_E_NOMEM, "no memory for the list of files");
    size_t count = 0;
    for (size_t i = 0; i < sources->count; i++) {
        if (sources->items[i].kind == LOCI_SOURCE_TEXT) order[count++] = &sources->items[i];
    }
    qsort(order, count, sizeof *order, by_id);
    loci_status status = LOCI_OK;
    for (size_t i = 1; i < count && status == LOCI_OK; i++) {
        if (strcmp(order[i - 1]->id, order[i]->id) == 0)
            status =
                loci_fail(err, LOCI_E_INVAL, "%.120s and %.120s would both be the document %.100s",
                          order[i - 1]->path, order[i]->path, order[i]->id);
    }
    free(order);
    return status;
}

void loci_sources_fini(loci_sources *sources) {
    for (size_t i = 0; i < sources->count; i++) {
        free(sources->items[i].path);
        free(sources->items[i].id);
    }
    free(sources->items);
}
