/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared parts of the tests of modes and settings; see modes_support.h.
 */
#include "tests/services/modes_support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/services/stock_model.h"

#define SHAPE                                                                                   \
    "\"use_sliding_window\": true,\n \"sliding_window\": 24,\n \"no_rope_layers\": [\n  1,\n  " \
    "1,\n  0\n ],\n \"no_rope_layer_interval\": 3,\n \"layer_types\": [\n  "                    \
    "\"sliding_attention\",\n  \"sliding_attention\",\n  \"full_attention\"\n ],"

char modes_folder[FOLDER_BYTES];
const char *const modes_files[] = {"north-dome.md", "cryogenics.md", "library.md"};
static const stock_model model = {"untied", "chatml", 16384, SHAPE,
                                  "\"use_sliding_window\": false, \"no_rope_layers\": [1, 1, 1],"};

/* Without positions anywhere, a passage encoded apart is what it is in one sequence. */
static const stock_model placeless = {
    "untied", "chatml", 16384, SHAPE,
    "\"use_sliding_window\": false, \"no_rope_layers\": [0, 0, 0],"};

loci_engine *open_engine(void) {
    return engine_in(modes_folder, "model");
}

void add_file(loci_engine *engine, const char *corpus, const char *name, size_t most) {
    loci_slice text = read_handbook(name);
    if (text.len > most) text.len = most;
    put_text(engine, corpus, name, text);
    settle(engine, corpus);
}

int set_up_modes(void **state) {
    (void)state;
    char dir[300];
    loci_error err = {0};
    loci_corpus_info info;
    static const char *const corpora[] = {"books", "text", "note", "narrow"};
    make_folder("modes", modes_folder);
    snprintf(dir, sizeof dir, "%s/model", modes_folder);
    stock_model_make(&model, dir);
    snprintf(dir, sizeof dir, "%s/placeless", modes_folder);
    stock_model_make(&placeless, dir);
    loci_engine *engine = open_engine();
    for (size_t i = 0; i < 4; i++) {
        loci_corpus_options options = {.encoding = i == 1 ? LOCI_ENCODING_CAUSAL
                                                          : LOCI_ENCODING_INDEPENDENT,
                                       .kv_int8 = i == 3};
        assert_int_equal(loci_engine_create_corpus(engine, corpora[i], &options, &info, &err),
                         LOCI_OK);
        assert_int_equal(info.settings.dense_layers, 0); /* a quarter of three */
    }
    for (size_t i = 0; i < 3; i++) add_file(engine, "books", modes_files[i], SIZE_MAX);
    for (size_t i = 0; i < 3; i++) add_file(engine, "text", modes_files[i], SIZE_MAX);
    for (size_t i = 0; i < 3; i++) add_file(engine, "narrow", modes_files[i], SIZE_MAX);
    add_file(engine, "note", modes_files[0], 700);
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "books", &info, &err), LOCI_OK);
    assert_true(info.extents >= 1);
    assert_int_equal(loci_corpus_get(loci_engine_store(engine), "note", &info, &err), LOCI_OK);
    assert_true(info.extents == 0 && info.tokens > 300);
    loci_engine_close(engine);
    return 0;
}

int tear_down_modes(void **state) {
    (void)state;
    remove_folder(modes_folder);
    return 0;
}

void begin_query(loci_query *query, loci_engine *engine, const char *corpus) {
    loci_error err = {0};
    if (loci_query_init(query, engine, corpus, QUESTION, 0, NULL, &err)) fail_msg("%s", err.text);
    assert_true(query->view->kv_heads == KV_HEADS && query->view->head_dim == DIM &&
                query->view->retrieval_layers == LAYERS);
}

void change_settings(loci_engine *engine, const char *corpus, uint32_t dense, double temperature,
                     double scale) {
    loci_settings_change change = {dense, temperature, scale};
    loci_corpus_info info;
    loci_error err = {0};
    if (loci_corpus_set(loci_engine_store(engine), corpus, 0, &change, &info, &err))
        fail_msg("%s", err.text);
}
