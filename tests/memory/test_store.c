/* SPDX-License-Identifier: Apache-2.0
 *
 * The data directory and the catalogue: creating, listing, deleting corpora, reopening, damage to
 * catalogue values, the lock and the layout version.
 */
#include "support.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <rocksdb/c.h>

#include "memory/rocks.h"

static void test_create_get_list(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    loci_geometry geometry = test_geometry();
    geometry.has_sink = false;
    loci_corpus_info info, again;
    static const char *const names[] = {"m", "a", "z9_-", "b-1"};
    for (size_t i = 0; i < 4; i++)
        assert_ok(loci_corpus_create(f->store, names[i], &geometry, NULL, NULL, NULL, &info, &err));
    assert_int_equal(loci_corpus_create(f->store, "a", &geometry, NULL, NULL, NULL, &again, &err),
                     LOCI_E_EXISTS);
    assert_string_equal(again.name, "a");
    assert_int_equal(again.uid, 2);
    static const char *const bad[] = {
        "",         "A",
        "-a",       "_a",
        "a b",      "a/b",
        "\xc3\xa9", "0123456789012345678901234567890123456789012345678901234567890123"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(
            loci_corpus_create(f->store, bad[i], &geometry, NULL, NULL, NULL, &info, &err),
            LOCI_E_INVAL);
    geometry.head_dim = 17;
    assert_int_equal(loci_corpus_create(f->store, "n", &geometry, NULL, NULL, NULL, &info, &err),
                     LOCI_E_INVAL);
    geometry = test_geometry(); /* wants a sink */
    assert_int_equal(loci_corpus_create(f->store, "n", &geometry, NULL, NULL, NULL, &info, &err),
                     LOCI_E_INVAL);
    for (int reopened = 0; reopened < 2; reopened++) {
        loci_corpus_info page[3];
        size_t count;
        assert_ok(loci_corpus_list(f->store, "", 3, page, &count, &err));
        assert_int_equal(count, 3);
        assert_string_equal(page[0].name, "a");
        assert_string_equal(page[1].name, "b-1");
        assert_string_equal(page[2].name, "m");
        assert_ok(loci_corpus_list(f->store, page[2].name, 3, page, &count, &err));
        assert_int_equal(count, 1);
        assert_string_equal(page[0].name, "z9_-");
        assert_ok(loci_corpus_list(f->store, "c", 1, page, &count, &err));
        assert_string_equal(page[0].name, "m");
        assert_string_equal(page[0].geometry.fingerprint, FINGERPRINT);
        fixture_close(f);
        fixture_open(f);
    }
    assert_int_equal(loci_corpus_get(f->store, "c", &info, &err), LOCI_E_NOTFOUND);
    assert_non_null(strstr(err.text, "\"c\""));
}

static void test_delete_and_uids(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_create(f, "b");
    put_text(f, "b", "x", 1, 300000);
    loci_document_writer *writer;
    assert_ok(loci_document_begin(f->store, "b", "y", loci_slice_of(NULL, 0), &writer, &err));
    char *text = make_text(1, 600000);
    assert_ok(loci_document_append(writer, loci_slice_of(text, 600000), &err));
    free(text);
    assert_ok(loci_corpus_delete(f->store, "b", &err));
    assert_int_equal(loci_corpus_delete(f->store, "b", &err), LOCI_E_NOTFOUND);
    fixture_create(f, "b"); /* the name is free while the old one's writer still exists */
    assert_ok(loci_corpus_get(f->store, "b", &info, &err));
    assert_int_equal(info.uid, 3);
    assert_int_equal(info.documents, 0);
    loci_document_info document;
    bool unchanged;
    assert_int_equal(loci_document_commit(writer, &document, &unchanged, &err), LOCI_E_NOTFOUND);
    assert_ok(loci_corpus_delete(f->store, "b", &err));
    fixture_close(f);
    fixture_open(f);
    fixture_create(f, "c");
    assert_ok(loci_corpus_get(f->store, "c", &info, &err));
    assert_int_equal(info.uid, 4); /* never used again */
    assert_int_equal(loci_corpus_get(f->store, "b", &info, &err), LOCI_E_NOTFOUND);
}

static void test_second_opener_is_told(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_store *second;
    fixture_open(f);
    assert_int_equal(loci_store_open(f->dir, &f->options, &f->backend, &second, &err),
                     LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "DATA_DIRECTORY_IN_USE");
    assert_non_null(strstr(err.text, f->dir));
    fixture_close(f);
    fixture_open(f);
}

static void write_layout(fixture *f, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/LAYOUT", f->dir);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static void test_layout_version(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_store *store;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_close(f);
    write_layout(f, "loci store layout 4\n");
    assert_int_equal(loci_store_open(f->dir, NULL, &f->backend, &store, &err), LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "LAYOUT_TOO_NEW");
    write_layout(f, "loci store layout 1\n");
    assert_int_equal(loci_store_open(f->dir, NULL, &f->backend, &store, &err), LOCI_E_UNSUPPORTED);
    assert_string_equal(err.reason, "LAYOUT_TOO_OLD");
    write_layout(f, "loci store layout 2\n"); /* its corpora are to be reindexed (test_reindex.c) */
    fixture_open(f);
    fixture_close(f);
    static const char *const bad[] = {"", "loci store layout \n", "loci store layout 3", "x 1\n",
                                      "loci store layout 3\nmore"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_layout(f, bad[i]);
        assert_int_equal(loci_store_open(f->dir, NULL, &f->backend, &store, &err), LOCI_E_CORRUPT);
    }
    char path[128];
    snprintf(path, sizeof path, "%s/LAYOUT", f->dir);
    unlink(path);
    assert_int_equal(loci_store_open(f->dir, NULL, &f->backend, &store, &err), LOCI_E_CORRUPT);
    write_layout(f, "loci store layout 3\n");
    fixture_open(f);
}

static void test_damaged_catalogue(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    static const struct {
        char kind;
        uint32_t value_kind;
    } cases[] = {{'m', LOCI_KIND_MANIFEST}, {'m', LOCI_KIND_STATE}, {'s', LOCI_KIND_STATE}};
    fixture_open(f);
    fixture_create(f, "bad");
    fixture_create(f, "good");
    fixture_start(f);
    put_text(f, "good", "x", 1, 1500);
    put_text(f, "bad", "x", 1, 1500);
    wait_settled(f, "good");
    wait_settled(f, "bad");
    unsigned files = count_extents(f, "bad");
    char extents[128];
    snprintf(extents, sizeof extents, "%s/extents/0000000000000001", f->dir);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fixture_close(f);
        damage_catalog(f->dir, cases[i].kind, 1, cases[i].value_kind);
        fixture_open(f);
        assert_int_equal(loci_corpus_get(f->store, "bad", &info, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, "bad"));
        fixture_start(f);
        wait_settled(f, "good");
        check_snapshot(f, "good");
        loci_corpus_info page[4];
        size_t count;
        assert_ok(loci_corpus_list(f->store, "", 4, page, &count, &err));
        assert_int_equal(count, 2);
        assert_int_equal(access(extents, F_OK), 0); /* its files are left alone */
    }
    assert_true(files > 0);
    /* A damaged corpus can be deleted, and its name used again. */
    assert_ok(loci_corpus_delete(f->store, "bad", &err));
    assert_int_equal(access(extents, F_OK), -1);
    fixture_create(f, "bad");
    fixture_close(f);
    damage_catalog(f->dir, 'c', 1, LOCI_KIND_CORPUS); /* not even a name: only logged */
    fixture_open(f);
    check_snapshot(f, "good");
    assert_ok(loci_corpus_get(f->store, "bad", &info, &err));
}

/* Flips byte i of the value of key i of the flat family, behind the wrapper's back, and copies
 * the value of the last key to the key after it. */
static void damage_envelopes(const char *path, size_t count) {
    static const char *const names[] = {"default", "catalog", "document", "name",
                                        "chunk",   "flat",    "terms"};
    rocksdb_options_t *options = rocksdb_options_create();
    const rocksdb_options_t *all[7] = {options, options, options, options,
                                       options, options, options};
    rocksdb_column_family_handle_t *handles[7];
    char *text = NULL;
    rocksdb_t *db = rocksdb_open_column_families(options, path, 7, names, all, handles, &text);
    assert_null(text);
    rocksdb_readoptions_t *read = rocksdb_readoptions_create();
    rocksdb_writeoptions_t *write = rocksdb_writeoptions_create();
    for (size_t i = 0; i <= count; i++) {
        loci_key key = {.len = 0}, to = {.len = 0};
        loci_key_u64(&key, i);
        loci_key_u64(&to, i < count ? i : i + 1);
        size_t len;
        char *value = rocksdb_get_cf(db, read, handles[5], (char *)key.data, 8, &len, &text);
        assert_null(text);
        assert_non_null(value);
        if (i < count) value[i] ^= 1;
        rocksdb_put_cf(db, write, handles[5], (char *)to.data, 8, value, len, &text);
        assert_null(text);
        rocksdb_free(value);
    }
    rocksdb_readoptions_destroy(read);
    rocksdb_writeoptions_destroy(write);
    for (int i = 0; i < 7; i++) rocksdb_column_family_handle_destroy(handles[i]);
    rocksdb_close(db);
    rocksdb_options_destroy(options);
}

static void test_envelope_damage(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_rocks *rocks;
    loci_buf out = LOCI_BUF_INIT;
    char path[128];
    size_t count = LOCI_ENVELOPE_BYTES + 7;
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_batch *batch = loci_batch_create(rocks);
    for (size_t i = 0; i <= count; i++) {
        loci_key key = {.len = 0};
        loci_key_u64(&key, i);
        loci_batch_put(batch, LOCI_CF_FLAT, &key, LOCI_KIND_FLAT, loci_slice_text("payload"));
    }
    assert_ok(loci_batch_write(batch, false, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
    damage_envelopes(path, count);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    for (size_t i = 0; i <= count + 1; i++) {
        loci_key key = {.len = 0};
        loci_key_u64(&key, i);
        assert_int_equal(
            loci_rocks_get(rocks, NULL, LOCI_CF_FLAT, &key, LOCI_KIND_FLAT, &out, &err),
            i == count ? LOCI_OK : LOCI_E_CORRUPT);
        if (i != count) assert_non_null(strstr(err.text, "flat/"));
    }
    loci_buf_fini(&out);
    loci_rocks_close(rocks);
}

/* Kinds and families are told apart; empty payloads are fine. */
static void test_envelope(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_rocks *rocks;
    loci_buf out = LOCI_BUF_INIT;
    char path[128];
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key key = {.len = 0}, other = {.len = 0};
    loci_key_u64(&key, 7);
    loci_key_u64(&other, 8);
    loci_batch *batch = loci_batch_create(rocks);
    loci_batch_put(batch, LOCI_CF_FLAT, &key, LOCI_KIND_FLAT, loci_slice_text("payload"));
    loci_batch_put(batch, LOCI_CF_FLAT, &other, LOCI_KIND_FLAT, loci_slice_of(NULL, 0));
    assert_ok(loci_batch_write(batch, false, &err));
    loci_batch_destroy(batch);
    assert_ok(loci_rocks_get(rocks, NULL, LOCI_CF_FLAT, &key, LOCI_KIND_FLAT, &out, &err));
    assert_int_equal(out.len, 7);
    assert_ok(loci_rocks_get(rocks, NULL, LOCI_CF_FLAT, &other, LOCI_KIND_FLAT, &out, &err));
    assert_int_equal(out.len, 7);
    assert_int_equal(loci_rocks_get(rocks, NULL, LOCI_CF_FLAT, &key, LOCI_KIND_CHUNK, &out, &err),
                     LOCI_E_CORRUPT);
    assert_int_equal(loci_rocks_get(rocks, NULL, LOCI_CF_CHUNK, &key, LOCI_KIND_FLAT, &out, &err),
                     LOCI_E_NOTFOUND);
    loci_buf_fini(&out);
    loci_rocks_close(rocks);
}

static loci_settings_change change_of(const loci_corpus_settings *settings) {
    return (loci_settings_change){settings->dense_layers, (double)settings->attn_temperature,
                                  (double)settings->attn_scale};
}

/* Settings stay over a restart; values that cannot be are refused by name and change nothing. */
static void test_settings(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    loci_geometry geometry = test_geometry();
    geometry.has_sink = false;
    geometry.causal = true;
    geometry.tokens_max = 1234;
    geometry.kv_int8 = true;
    loci_corpus_info info;
    loci_snapshot *snapshot;
    loci_corpus_settings settings = {.dense_layers = 1, .attn_temperature = 0.9f, .attn_scale = 1};
    assert_ok(loci_corpus_create(f->store, "usual", &geometry, NULL, NULL, NULL, &info, &err));
    assert_true(info.settings.dense_layers == 0 && info.settings.attn_temperature == 1 &&
                info.settings.attn_scale == 1);
    assert_ok(loci_corpus_create(f->store, "own", &geometry, &settings, NULL, NULL, &info, &err));
    uint64_t revision = info.revision;
    assert_ok(loci_snapshot_acquire(f->store, "own", &snapshot, &err));
    assert_memory_equal(&loci_snapshot_info(snapshot)->settings, &settings, sizeof settings);
    loci_corpus_settings other = {geometry.retrieval_layers, 0.5f, 0.8f};
    loci_settings_change change = change_of(&other);
    assert_ok(loci_corpus_set(f->store, "own", 0, &change, &info, &err));
    assert_int_equal(info.revision, revision);
    assert_memory_equal(&loci_snapshot_info(snapshot)->settings, &settings, sizeof settings);
    loci_snapshot_release(snapshot);
    assert_ok(loci_snapshot_acquire(f->store, "own", &snapshot, &err));
    assert_memory_equal(&loci_snapshot_info(snapshot)->settings, &other, sizeof other);
    loci_snapshot_release(snapshot);
    const struct {
        loci_corpus_settings settings;
        const char *says;
    } bad[] = {
        {{geometry.retrieval_layers + 1, 1, 1}, "dense_layers is"},
        {{0, 0.01f, 1}, "attn_temperature is 0.01; it must lie in [0.05, 20]"},
        {{0, NAN, 1}, "attn_temperature is nan"},
        {{0, INFINITY, 1}, "attn_temperature is inf"},
        {{0, 1, -1}, "attn_scale is -1; it must lie in [0.05, 2]"},
        {{0, 1, 2.1f}, "attn_scale is 2.1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        loci_settings_change wrong = change_of(&bad[i].settings);
        assert_int_equal(loci_corpus_set(f->store, "own", 0, &wrong, &info, &err), LOCI_E_INVAL);
        assert_string_equal(err.reason, "INVALID_SETTINGS");
        if (!strstr(err.text, bad[i].says)) fail_msg("%s", err.text);
        assert_int_equal(loci_corpus_create(f->store, "new", &geometry, &bad[i].settings, NULL,
                                            NULL, &info, &err),
                         LOCI_E_INVAL);
    }
    assert_int_equal(loci_corpus_set(f->store, "none", 0, &change, &info, &err), LOCI_E_NOTFOUND);
    assert_int_equal(loci_corpus_set(f->store, "own", info.uid + 1, &change, &info, &err),
                     LOCI_E_ABORTED);
    fixture_close(f);
    fixture_open(f);
    assert_ok(loci_corpus_get(f->store, "own", &info, &err));
    assert_memory_equal(&info.settings, &other, sizeof other);
    assert_true(info.geometry.causal && info.geometry.tokens_max == 1234 && info.geometry.kv_int8);
    fixture_close(f);
}

typedef struct setter {
    fixture *f;
    uint64_t uid;
    int which;     /* of the three settings */
    uint32_t lost; /* times that another's call undid this one's */
    bool failed;
} setter;

#define SETS 60

static void *set_one(void *ctx) {
    setter *self = ctx;
    for (int i = 1; i <= SETS; i++) {
        loci_error err;
        loci_corpus_info info;
        loci_settings_change change = {.dense_layers = -1};
        if (self->which == 0) change.dense_layers = i % 3;
        if (self->which == 1) change.attn_temperature = 1 + i / 64.0;
        if (self->which == 2) change.attn_scale = 1 + i / 64.0;
        if (loci_corpus_set(self->f->store, "a", self->uid, &change, &info, &err) != LOCI_OK ||
            loci_corpus_get(self->f->store, "a", &info, &err) != LOCI_OK) {
            self->failed = true;
            break;
        }
        const loci_corpus_settings *now = &info.settings;
        if ((self->which == 0 && now->dense_layers != (uint32_t)(i % 3)) ||
            (self->which == 1 && (double)now->attn_temperature != change.attn_temperature) ||
            (self->which == 2 && (double)now->attn_scale != change.attn_scale))
            self->lost++;
    }
    return NULL;
}

/* Each of three threads sets its own setting again and again, and always finds it as it set it. */
static void test_settings_at_the_same_time(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    pthread_t threads[3];
    setter setters[3];
    fixture_open(f);
    fixture_create(f, "a");
    for (int i = 0; i < 3; i++) {
        setters[i] = (setter){.f = f, .uid = info_of(f, "a").uid, .which = i};
        assert_int_equal(pthread_create(&threads[i], NULL, set_one, &setters[i]), 0);
    }
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 3; i++) assert_true(setters[i].lost == 0 && !setters[i].failed);
    for (int reopened = 0; reopened < 2; reopened++) {
        assert_ok(loci_corpus_get(f->store, "a", &info, &err));
        assert_int_equal(info.settings.dense_layers, SETS % 3);
        assert_true(info.settings.attn_temperature == 1 + SETS / 64.0f &&
                    info.settings.attn_scale == 1 + SETS / 64.0f);
        fixture_close(f);
        fixture_open(f);
    }
}

/* Notes are found again until they are damaged or their corpus is deleted. */
static void test_notes(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    loci_geometry geometry = test_geometry();
    geometry.has_sink = false;
    loci_corpus_info info;
    loci_buf note = LOCI_BUF_INIT;
    assert_ok(loci_corpus_create(f->store, "a", &geometry, NULL, NULL, NULL, &info, &err));
    assert_int_equal(loci_corpus_note_get(f->store, &info, LOCI_NOTE_QUERIES, &note, &err),
                     LOCI_E_NOTFOUND);
    assert_ok(loci_corpus_note_put(f->store, &info, LOCI_NOTE_QUERIES, loci_slice_text("q"), &err));
    assert_ok(
        loci_corpus_note_put(f->store, &info, LOCI_NOTE_THRESHOLDS, loci_slice_text("tt"), &err));
    fixture_close(f);
    fixture_open(f);
    assert_ok(loci_corpus_note_get(f->store, &info, LOCI_NOTE_QUERIES, &note, &err));
    assert_true(note.len == 1 && note.data[0] == 'q');
    assert_ok(loci_corpus_note_get(f->store, &info, LOCI_NOTE_THRESHOLDS, &note, &err));
    assert_true(note.len == 2 && note.data[0] == 't');
    loci_corpus_info other = info;
    other.uid++;
    assert_int_equal(loci_corpus_note_get(f->store, &other, LOCI_NOTE_QUERIES, &note, &err),
                     LOCI_E_NOTFOUND);
    assert_ok(loci_corpus_delete(f->store, "a", &err));
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "q"), 0);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CATALOG, "t"), 0);
    loci_buf_fini(&note);
}

/* Catalogue entries of before there were settings have none behind the sinks, or a causal
 * corpus's bound only. */
static void test_records_without_settings_open(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_corpus_info info;
    loci_rocks *rocks;
    char path[128];
    for (int causal = 0; causal < 2; causal++) {
        fixture_open(f);
        loci_geometry geometry = test_geometry();
        geometry.has_sink = false;
        geometry.causal = causal;
        geometry.tokens_max = causal ? 77 : 0;
        const char *name = causal ? "text" : "apart";
        loci_corpus_settings settings = {1, 0.5f, 0.5f};
        assert_ok(
            loci_corpus_create(f->store, name, &geometry, &settings, NULL, NULL, &info, &err));
        fixture_close(f);
        snprintf(path, sizeof path, "%s/db", f->dir);
        assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
        loci_buf record = LOCI_BUF_INIT;
        loci_key key = {.len = 0};
        loci_key_u8(&key, 'c');
        loci_key_u64(&key, info.uid);
        assert_ok(
            loci_rocks_get(rocks, NULL, LOCI_CF_CATALOG, &key, LOCI_KIND_CORPUS, &record, &err));
        record.len -= 22;
        if (causal) {
            loci_buf_u8(&record, 1);
            loci_buf_u64(&record, 77);
        }
        loci_batch *batch = loci_batch_create(rocks);
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_CORPUS,
                       loci_slice_of(record.data, record.len));
        assert_ok(loci_batch_write(batch, true, &err));
        loci_batch_destroy(batch);
        loci_buf_fini(&record);
        loci_rocks_close(rocks);
        fixture_open(f);
        assert_ok(loci_corpus_get(f->store, name, &info, &err));
        assert_int_equal(info.geometry.causal, causal);
        assert_int_equal(info.geometry.tokens_max, geometry.tokens_max);
        assert_true(info.settings.dense_layers == 0 && info.settings.attn_temperature == 1 &&
                    info.settings.attn_scale == 1);
        fixture_close(f);
    }
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_create_get_list),
        TEST(test_delete_and_uids),
        TEST(test_second_opener_is_told),
        TEST(test_layout_version),
        TEST(test_damaged_catalogue),
        TEST(test_envelope),
        TEST(test_envelope_damage),
        TEST(test_settings),
        TEST(test_settings_at_the_same_time),
        TEST(test_notes),
        TEST(test_records_without_settings_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
