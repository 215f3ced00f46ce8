/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening, locking, syncing and closing a data directory; see store.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/internal.h"
#include "memory/snapshot.h"

const char *const loci_failpoints[] = {
    "doc_chunk",      "doc_commit",     "store_sync",  "encode",          "extent_write",
    "extent_fsync",   "extent_rename",  "flat_commit", "manifest_commit", "delete_commit",
    "rewrite_commit", "merge_commit",   "unlink",      "terms_write",     "reindex_copy",
    "reindex_begin",  "reindex_switch", NULL,
};

void loci_store_options_default(loci_store_options *options) {
    *options = (loci_store_options){.document_bytes_max = 64u << 20,
                                    .memory_bytes = 256u << 20,
                                    .extent_tokens = LOCI_EXTENT_SEAL_TOKENS,
                                    .extent_kv_bytes = 256u << 20,
                                    .merge_tokens = LOCI_EXTENT_TOKENS_MAX,
                                    .merge_calm_ms = 3000};
}

static loci_status fail_path(loci_error *err, const char *what, const char *path) {
    return loci_fail(err, LOCI_E_IO, "cannot %s %s: %s", what, path, strerror(errno));
}

static void store_path(const loci_store *store, const char *name, char out[LOCI_PATH_BYTES]) {
    snprintf(out, LOCI_PATH_BYTES, "%s/%s", store->dir, name);
}

static loci_status make_directory(const char *path, loci_error *err) {
    if (mkdir(path, 0777) == 0 || errno == EEXIST) return LOCI_OK;
    return fail_path(err, "make directory", path);
}

static loci_status take_lock(loci_store *store, loci_error *err) {
    char path[LOCI_PATH_BYTES];
    store_path(store, "LOCK", path);
    store->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (store->lock_fd < 0) return fail_path(err, "open", path);
    if (flock(store->lock_fd, LOCK_EX | LOCK_NB) == 0) return LOCI_OK;
    if (errno != EWOULDBLOCK) return fail_path(err, "lock", path);
    return loci_fail_reason(err, LOCI_E_PRECONDITION, "DATA_DIRECTORY_IN_USE",
                            "data directory %s is in use by another process", store->dir);
}

static loci_status write_layout(const loci_store *store, const char *path, loci_error *err) {
    char temporary[LOCI_PATH_BYTES], text[64];
    store_path(store, "LAYOUT.tmp", temporary);
    int len = snprintf(text, sizeof text, "loci store layout %u\n", LOCI_LAYOUT_VERSION);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail_path(err, "create", temporary);
    bool good = write(fd, text, (size_t)len) == len && fsync(fd) == 0;
    good = close(fd) == 0 && good;
    if (!good || rename(temporary, path) != 0) return fail_path(err, "write", path);
    int dir = open(store->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    good = dir >= 0 && fsync(dir) == 0;
    if (dir >= 0) close(dir);
    return good ? LOCI_OK : fail_path(err, "fsync", store->dir);
}

static loci_status check_layout(const loci_store *store, loci_error *err) {
    char path[LOCI_PATH_BYTES], db[LOCI_PATH_BYTES];
    store_path(store, "LAYOUT", path);
    store_path(store, "db", db);
    FILE *file = fopen(path, "re");
    if (!file) {
        if (errno != ENOENT) return fail_path(err, "open", path);
        if (access(db, F_OK) == 0)
            return loci_fail(err, LOCI_E_CORRUPT, "%s is missing though there is a database", path);
        return write_layout(store, path, err);
    }
    char text[64] = "";
    size_t len = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[len] = 0;
    static const char head[] = "loci store layout ";
    char *end = text;
    unsigned long version = 0;
    if (strncmp(text, head, sizeof head - 1) == 0)
        version = strtoul(text + sizeof head - 1, &end, 10);
    if (version == 0 || strcmp(end, "\n") != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "%s does not say a layout version", path);
    if (version < LOCI_LAYOUT_VERSION && version >= LOCI_LAYOUT_OLDEST)
        return write_layout(store, path, err); /* extents tell for themselves */
    if (version < LOCI_LAYOUT_OLDEST)
        return loci_fail_reason(
            err, LOCI_E_UNSUPPORTED, "LAYOUT_TOO_OLD",
            "data directory %s has layout %lu, this program writes %u: register "
            "its documents again in a new directory",
            store->dir, version, LOCI_LAYOUT_VERSION);
    if (version > LOCI_LAYOUT_VERSION)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "LAYOUT_TOO_NEW",
                                "data directory %s has layout %lu, this program knows %u",
                                store->dir, version, LOCI_LAYOUT_VERSION);
    return LOCI_OK;
}

static loci_status open_in(loci_store *store, const char *dir, loci_error *err) {
    char path[LOCI_PATH_BYTES];
    store->dir = strdup(dir);
    if (!store->dir) return loci_fail(err, LOCI_E_NOMEM, "no memory for the store");
    if (strlen(dir) > LOCI_PATH_BYTES / 2)
        return loci_fail(err, LOCI_E_INVAL, "the path of the data directory is too long");
    LOCI_TRY(make_directory(dir, err));
    LOCI_TRY(take_lock(store, err));
    LOCI_TRY(check_layout(store, err));
    store_path(store, "extents", path);
    LOCI_TRY(make_directory(path, err));
    store_path(store, "db", path);
    LOCI_TRY(loci_rocks_open(path, store->options.memory_bytes, &store->rocks, err));
    return loci_corpora_load(store, err);
}

loci_status loci_store_open(const char *dir, const loci_store_options *options,
                            loci_backend *backend, loci_store **out, loci_error *err) {
    loci_store *store = calloc(1, sizeof *store);
    if (!store) return loci_fail(err, LOCI_E_NOMEM, "no memory for the store");
    loci_store_options_default(&store->options);
    if (options) store->options = *options;
    store->backend = backend;
    store->lock_fd = -1;
    pthread_mutex_init(&store->lock, NULL);
    pthread_mutex_init(&store->sync_lock, NULL);
    pthread_mutex_init(&store->figures_lock, NULL);
    pthread_cond_init(&store->sync_done, NULL);
    loci_status status = open_in(store, dir, err);
    if (status != LOCI_OK) {
        loci_store_close(store);
        return status;
    }
    if (store->options.budget)
        loci_budget_on_shortage(store->options.budget, loci_snapshots_let_go, store);
    *out = store;
    return LOCI_OK;
}

void loci_store_close(loci_store *store) {
    if (!store) return;
    for (size_t i = 0; i < store->corpus_count; i++) {
        loci_corpus *corpus = store->corpora[i];
        loci_snapshot *current = corpus->current;
        loci_corpus *successor = corpus->successor;
        corpus->current = NULL;
        corpus->successor = NULL;
        loci_snapshot_release(current);
        loci_corpus_release(successor);
        LOCI_ASSERT(atomic_load(&corpus->refs) == 1); /* a snapshot or writer is still held */
        loci_corpus_release(corpus);
    }
    free(store->corpora);
    loci_rocks_close(store->rocks);
    if (store->lock_fd >= 0) close(store->lock_fd);
    pthread_cond_destroy(&store->sync_done);
    pthread_mutex_destroy(&store->sync_lock);
    pthread_mutex_destroy(&store->figures_lock);
    pthread_mutex_destroy(&store->lock);
    free(store->dir);
    free(store);
}

loci_status loci_store_sync(loci_store *store, loci_error *err) {
    loci_status status = LOCI_OK;
    LOCI_FAILPOINT("store_sync");
    pthread_mutex_lock(&store->sync_lock);
    uint64_t mine = ++store->sync_wanted;
    while (status == LOCI_OK && store->sync_reached < mine) {
        if (store->sync_running) {
            pthread_cond_wait(&store->sync_done, &store->sync_lock);
            continue;
        }
        uint64_t target = store->sync_wanted;
        store->sync_running = true;
        pthread_mutex_unlock(&store->sync_lock);
        status = loci_rocks_sync(store->rocks, err);
        pthread_mutex_lock(&store->sync_lock);
        store->sync_running = false;
        if (status == LOCI_OK) store->sync_reached = target;
        pthread_cond_broadcast(&store->sync_done);
    }
    pthread_mutex_unlock(&store->sync_lock);
    LOCI_FAILPOINT("store_sync");
    return status;
}
