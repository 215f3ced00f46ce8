/* SPDX-License-Identifier: Apache-2.0
 *
 * See engine_support.h.
 */
#include "tests/services/engine_support.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)info;
    (void)kind;
    (void)at;
    return remove(path);
}

void make_folder(const char *name, char out[FOLDER_BYTES]) {
    snprintf(out, FOLDER_BYTES, "/tmp/loci-test-%s-XXXXXX", name);
    assert_non_null(mkdtemp(out));
}

void remove_folder(const char *folder) {
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

loci_engine *engine_of(const loci_engine_options *options) {
    loci_engine *engine = NULL;
    loci_error err = {0};
    if (loci_engine_open(options, &engine, &err) != LOCI_OK) fail_msg("%s", err.text);
    return engine;
}

loci_engine *engine_in(const char *folder, const char *name) {
    char data[300], model[300];
    snprintf(model, sizeof model, "%s/%s", folder, name);
    snprintf(data, sizeof data, "%s/%s-data", folder, name);
    return engine_of(&(loci_engine_options){.data = data, .model = model, .precision = "f32"});
}

void create_corpus(loci_engine *engine, const char *corpus, loci_encoding encoding, bool beyond,
                   loci_corpus_info *info) {
    loci_error err = {0};
    loci_corpus_options options = {.encoding = encoding, .beyond_trained_length = beyond};
    if (loci_engine_create_corpus(engine, corpus, &options, info, &err)) fail_msg("%s", err.text);
}

void put_text(loci_engine *engine, const char *corpus, const char *id, loci_slice text) {
    loci_document_writer *writer;
    loci_document_info info;
    loci_error err = {0};
    bool unchanged;
    if (loci_document_begin(loci_engine_store(engine), corpus, id, loci_slice_of(NULL, 0), &writer,
                            &err) != LOCI_OK ||
        loci_document_append(writer, text, &err) != LOCI_OK ||
        loci_document_commit(writer, &info, &unchanged, &err) != LOCI_OK)
        fail_msg("%s: %s", id, err.text);
    loci_ingest_wake(loci_engine_ingest(engine));
}

loci_slice read_handbook(const char *name) {
    static uint8_t bytes[1 << 16];
    char path[512];
    snprintf(path, sizeof path, HANDBOOK "/%s", name);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    size_t len = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    return loci_slice_of(bytes, len);
}

void settle(loci_engine *engine, const char *corpus) {
    loci_ingest *ingest = loci_engine_ingest(engine);
    loci_ingest_progress progress;
    loci_error err = {0};
    loci_ingest_settle(ingest, corpus);
    for (int i = 0; i < 30000 && !loci_ingest_settled(ingest, corpus); i++) loci_sleep_ms(10);
    assert_int_equal(loci_ingest_progress_of(ingest, corpus, &progress, &err), LOCI_OK);
    if (!loci_ingest_settled(ingest, corpus)) fail_msg("%s", progress.failure.text);
}
