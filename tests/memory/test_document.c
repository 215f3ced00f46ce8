/* SPDX-License-Identifier: Apache-2.0
 *
 * Documents: writing in pieces, reading ranges, idempotence, limits, listing, damage.
 */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory/rocks.h"

static void check_range(fixture *f, const char *id, const char *text, uint64_t start, uint64_t end,
                        size_t size) {
    loci_error err;
    loci_buf out = LOCI_BUF_INIT;
    loci_buf_append_text(&out, "head");
    assert_ok(loci_document_read(f->store, "a", id, start, end, &out, &err));
    uint64_t stop = end < size ? end : size;
    assert_int_equal(out.len, 4 + stop - start);
    assert_memory_equal(out.data + 4, text + start, stop - start);
    loci_buf_fini(&out);
}

static void test_ranges_across_chunks(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    static const size_t sizes[] = {1, 262143, 262144, 262145, 524288, 900001};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t size = sizes[i];
        char *text = make_text(i, size), id[16];
        snprintf(id, sizeof id, "d%zu", i);
        put_text(f, "a", id, i, size);
        for (int reopened = 0; reopened < 2; reopened++) {
            check_range(f, id, text, 0, UINT64_MAX, size);
            check_range(f, id, text, size - 1, size, size);
            check_range(f, id, text, size, size, size);
            if (size > 262144) check_range(f, id, text, 262140, 262150, size);
            if (size > 524288) check_range(f, id, text, 100, 524300, size);
            fixture_close(f);
            fixture_open(f);
        }
        loci_buf out = LOCI_BUF_INIT;
        assert_int_equal(loci_document_read(f->store, "a", id, size + 1, size + 2, &out, &err),
                         LOCI_E_INVAL);
        loci_buf_fini(&out);
        free(text);
    }
}

static void test_same_content_is_unchanged(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info first, second, third;
    bool unchanged;
    fixture_open(f);
    fixture_create(f, "a");
    char *text = make_text(1, 300000);
    loci_slice whole = loci_slice_of(text, 300000);
    assert_ok(put_document(f, "a", "x", whole, &first, &unchanged, &err));
    assert_false(unchanged);
    assert_int_equal(first.sequence, 1);
    assert_int_equal(strlen(first.content_hash), 32);
    assert_ok(put_document(f, "a", "x", whole, &second, &unchanged, &err));
    assert_true(unchanged);
    assert_int_equal(second.sequence, 1);
    assert_string_equal(second.content_hash, first.content_hash);
    text[299999] ^= 1;
    assert_ok(put_document(f, "a", "x", whole, &third, &unchanged, &err));
    assert_false(unchanged);
    assert_int_equal(third.sequence, 2);
    assert_string_not_equal(third.content_hash, first.content_hash);
    check_range(f, "x", text, 0, UINT64_MAX, 300000);
    loci_corpus_info info;
    assert_ok(loci_corpus_get(f->store, "a", &info, &err));
    assert_int_equal(info.documents, 1);
    assert_int_equal(info.bytes, 300000);
    free(text);
}

static void test_bad_input(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info info;
    bool unchanged;
    loci_document_writer *writer;
    char id[LOCI_DOCUMENT_ID_MAX + 2];
    f->options.document_bytes_max = 1000;
    fixture_open(f);
    fixture_create(f, "a");
    loci_slice text = loci_slice_text("text"), none = loci_slice_of(NULL, 0);
    memset(id, 'i', sizeof id);
    id[LOCI_DOCUMENT_ID_MAX + 1] = 0;
    static const char *const bad[] = {
        "",        "a\nb", "\x7f", "\xc0\xaf", "\xed\xa0\x80", "\xf5\x80\x80\x80", "half \xe2\x82",
        "\xc2\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(loci_document_begin(f->store, "a", bad[i], none, &writer, &err),
                         LOCI_E_INVAL);
    assert_int_equal(loci_document_begin(f->store, "a", id, none, &writer, &err), LOCI_E_INVAL);
    id[LOCI_DOCUMENT_ID_MAX] = 0;
    assert_ok(put_document(f, "a", id, text, &info, &unchanged, &err));
    assert_ok(put_document(f, "a", "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", text, &info, &unchanged,
                           &err));
    assert_int_equal(put_document(f, "b", "x", text, &info, &unchanged, &err), LOCI_E_NOTFOUND);
    assert_int_equal(put_document(f, "a", "x", none, &info, &unchanged, &err), LOCI_E_INVAL);
    char *large = make_text(1, 1001);
    assert_int_equal(put_document(f, "a", "x", loci_slice_of(large, 1001), &info, &unchanged, &err),
                     LOCI_E_LIMIT);
    assert_ok(put_document(f, "a", "x", loci_slice_of(large, 1000), &info, &unchanged, &err));
    char *metadata = make_text(2, LOCI_METADATA_MAX + 1);
    assert_int_equal(loci_document_begin(f->store, "a", "y",
                                         loci_slice_of(metadata, LOCI_METADATA_MAX + 1), &writer,
                                         &err),
                     LOCI_E_INVAL);
    assert_int_equal(loci_document_get(f->store, "a", "y", &info, NULL, &err), LOCI_E_NOTFOUND);
    free(metadata);
    free(large);
}

/* Aborted uploads leave nothing; one that the process forgot goes at the next open. */
static void test_abandoned_uploads(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_writer *writer;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "kept", 1, 600000);
    char *text = make_text(2, 600000);
    loci_slice whole = loci_slice_of(text, 600000), none = loci_slice_of(NULL, 0);
    assert_ok(loci_document_begin(f->store, "a", "x", none, &writer, &err));
    assert_ok(loci_document_append(writer, whole, &err));
    loci_document_abort(writer);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CHUNK, ""), 3);
    fixture_open(f);
    loci_document_abort(NULL);
    put_text(f, "a", "kept", 3, 600000);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CHUNK, ""),
                     6); /* the old one is still searchable */
    free(text);
}

static void test_listing_pages(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    fixture_create(f, "b");
    for (uint64_t i = 0; i < 7; i++) {
        char id[16];
        snprintf(id, sizeof id, "d%llu", (unsigned long long)(i * 5 % 7));
        put_text(f, "a", id, i, 100);
        put_text(f, "b", id, i, 100);
    }
    put_text(f, "a", "d3x", 9, 100);
    loci_document_info page[3];
    char after[LOCI_DOCUMENT_ID_MAX + 1] = "";
    size_t count, total = 0;
    do {
        assert_ok(loci_document_list(f->store, "a", after, 3, page, &count, &err));
        for (size_t i = 0; i < count; i++) {
            assert_true(strcmp(page[i].id, after) > 0);
            memcpy(after, page[i].id, sizeof after);
        }
        total += count;
    } while (count == 3);
    assert_int_equal(total, 8);
    assert_string_equal(after, "d6");
    assert_int_equal(loci_document_list(f->store, "c", "", 3, page, &count, &err), LOCI_E_NOTFOUND);
}

static void test_metadata_and_deletion(void **state) {
    fixture *f = *state;
    loci_error err;
    loci_document_info info;
    loci_buf metadata = LOCI_BUF_INIT;
    uint64_t revision;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "x", 1, 100);
    assert_ok(loci_document_get(f->store, "a", "x", &info, &metadata, &err));
    assert_int_equal(metadata.len, 4);
    assert_memory_equal(metadata.data, "meta", 4);
    assert_int_equal(info.bytes, 100);
    assert_false(info.searchable);
    assert_ok(loci_document_delete(f->store, "a", "x", &revision, &err));
    assert_int_equal(loci_document_delete(f->store, "a", "x", &revision, &err), LOCI_E_NOTFOUND);
    assert_int_equal(loci_document_get(f->store, "a", "x", &info, NULL, &err), LOCI_E_NOTFOUND);
    loci_buf_fini(&metadata);
    fixture_close(f);
    assert_int_equal(count_keys(f->dir, LOCI_CF_CHUNK, ""), 0);
    assert_int_equal(count_keys(f->dir, LOCI_CF_DOCUMENT, ""), 0);
    assert_int_equal(count_keys(f->dir, LOCI_CF_NAME, ""), 0);
}

/* Damage to one stored value is named, and the neighbour reads. */
static void test_damaged_chunk(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    put_text(f, "a", "x", 1, 600000);
    put_text(f, "a", "y", 2, 100);
    fixture_close(f);
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", f->dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    /* A value of the right kind and checksum, but not this document's chunk. */
    loci_key key = {.len = 0};
    loci_key_u64(&key, 1);
    loci_key_u64(&key, 1);
    loci_key_u32(&key, 1);
    loci_batch *batch = loci_batch_create(rocks);
    loci_batch_put(batch, LOCI_CF_CHUNK, &key, LOCI_KIND_CHUNK, loci_slice_text("not a frame"));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
    fixture_open(f);
    loci_buf out = LOCI_BUF_INIT;
    assert_ok(loci_document_read(f->store, "a", "x", 0, 1000, &out, &err));
    assert_int_equal(loci_document_read(f->store, "a", "x", 0, 600000, &out, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "chunk 1 of document \"x\" of corpus a"));
    assert_int_equal(out.len, 1000);
    assert_ok(loci_document_read(f->store, "a", "y", 0, 100, &out, &err));
    loci_buf_fini(&out);
}

typedef struct writer_thread {
    fixture *f;
    uint64_t number;
    bool failed;
} writer_thread;

static void *write_many(void *arg) {
    writer_thread *self = arg;
    for (uint64_t i = 0; i < 20; i++) {
        loci_error err;
        loci_document_info info;
        bool unchanged;
        char id[32];
        snprintf(id, sizeof id, "t%llu-%llu", (unsigned long long)self->number,
                 (unsigned long long)i);
        loci_status status =
            put_document(self->f, "a", id, loci_slice_text(id), &info, &unchanged, &err);
        if (status == LOCI_OK) status = loci_store_sync(self->f->store, &err);
        if (status != LOCI_OK) self->failed = true;
    }
    return NULL;
}

static void test_writers_at_once(void **state) {
    fixture *f = *state;
    loci_error err;
    fixture_open(f);
    fixture_create(f, "a");
    pthread_t threads[4];
    writer_thread args[4];
    for (uint64_t i = 0; i < 4; i++) {
        args[i] = (writer_thread){f, i, false};
        assert_int_equal(pthread_create(&threads[i], NULL, write_many, &args[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_false(args[i].failed);
    }
    loci_corpus_info info;
    assert_ok(loci_corpus_get(f->store, "a", &info, &err));
    assert_int_equal(info.documents, 80);
    assert_int_equal(info.pending_documents, 80);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, fixture_setup, fixture_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_ranges_across_chunks),
        TEST(test_same_content_is_unchanged),
        TEST(test_bad_input),
        TEST(test_abandoned_uploads),
        TEST(test_listing_pages),
        TEST(test_metadata_and_deletion),
        TEST(test_damaged_chunk),
        TEST(test_writers_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
