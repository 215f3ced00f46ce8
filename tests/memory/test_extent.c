/* SPDX-License-Identifier: Apache-2.0
 *
 * Extent files: what is written is read; truncation and flipped bits are named; identity.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "memory/extent.h"
#include "memory/internal.h"

#define PAIRS 4u

typedef struct extent_fixture {
    fixture base;
    loci_builder *builder;
    loci_manifest_extent entry;
    char dir[128], path[256];
} extent_fixture;

/* Segments of 1, 2, .. tokens of documents 1, 2, .. */
static loci_builder *make_builder(uint32_t segments, const char *fingerprint) {
    loci_error err;
    loci_builder *builder;
    loci_geometry geometry = test_geometry();
    memcpy(geometry.fingerprint, fingerprint, LOCI_FINGERPRINT_LEN);
    assert_ok(loci_builder_create(&geometry, &builder, &err));
    for (uint32_t s = 0; s < segments; s++) {
        loci_built_segment segment = {s / 3 + 1, s * 100, s * 100 + s + 1, {(uint8_t)s}, s + 1};
        uint32_t row;
        assert_ok(loci_builder_add(builder, &segment, &row, &err));
        for (uint32_t p = 0; p < PAIRS; p++)
            for (uint32_t t = 0; t <= s; t++)
                for (uint32_t c = 0; c < 16; c++) {
                    builder->k[p][(row + t) * 16 + c] = fake_value(s, t, p, c, 0);
                    builder->v[p][(row + t) * 16 + c] = fake_value(s, t, p, c, 1);
                }
    }
    return builder;
}

static int setup(void **state) {
    extent_fixture *f = calloc(1, sizeof *f);
    loci_error err;
    fixture_init(&f->base, NULL);
    snprintf(f->dir, sizeof f->dir, "%s/extents", f->base.dir);
    f->builder = make_builder(20, FINGERPRINT);
    assert_ok(loci_extent_write(f->dir, f->builder, loci_builder_source(f->builder), NULL, NULL,
                                NULL, &f->entry, &err));
    char name[LOCI_EXTENT_NAME_BYTES];
    loci_extent_name(f->entry.id, name);
    snprintf(f->path, sizeof f->path, "%s/%s", f->dir, name);
    *state = f;
    return 0;
}

static int teardown(void **state) {
    extent_fixture *f = *state;
    loci_builder_destroy(f->builder);
    remove_tree(f->base.dir);
    free(f);
    return 0;
}

static loci_status open_extent(extent_fixture *f, loci_extent **out, loci_error *err) {
    loci_geometry geometry = test_geometry();
    return loci_extent_open(f->dir, &geometry, &f->entry, &f->base.backend, out, err);
}

static void test_round_trip(void **state) {
    extent_fixture *f = *state;
    loci_error err;
    loci_extent *extent;
    assert_ok(open_extent(f, &extent, &err));
    assert_int_equal(extent->tokens, 210);
    assert_int_equal(extent->segments, 20);
    for (uint32_t s = 0; s < 20; s++) {
        loci_extent_segment segment = loci_extent_segment_at(extent, s);
        assert_int_equal(segment.start, s * 100);
        assert_int_equal(segment.end, s * 100 + s + 1);
        assert_int_equal(segment.tokens, s + 1);
        assert_int_equal(segment.content[0], s);
        assert_int_equal(extent->segment_begin[s], s * (s + 1) / 2);
    }
    uint16_t k[210 * 16], v[210 * 16];
    uint8_t dead[20] = {0};
    loci_extent_dead *mask, *again, *other;
    dead[19] = dead[4] = 1;
    assert_ok(loci_extent_mask(extent, dead, &mask, &err));
    for (uint32_t p = 0; p < PAIRS; p++) {
        assert_int_equal(extent->pair_at[p] % LOCI_BLOCK_ALIGN, 0);
        assert_ok(loci_extent_read_pair(extent, p, NULL, k, v, &err));
        assert_memory_equal(k, f->builder->k[p], sizeof k);
        assert_memory_equal(v, f->builder->v[p], sizeof v);
        int bits = 0;
        for (int w = 0; w < 4; w++) bits += __builtin_popcountll(mask->live[p][w]);
        assert_int_equal(bits, 210 - 20 - 5);
    }
    /* Made once, and kept by those who have it when others ask for another one. */
    assert_ok(loci_extent_mask(extent, dead, &again, &err));
    assert_ptr_equal(mask, again);
    dead[0] = 1;
    assert_ok(loci_extent_mask(extent, dead, &other, &err));
    assert_ptr_not_equal(mask, other);
    loci_extent_unref(extent);
    assert_int_equal(mask->segments[0], 0);
    assert_int_equal(other->segments[0], 1);
    loci_extent_dead_unref(mask);
    loci_extent_dead_unref(again);
    loci_extent_dead_unref(other);
}

/* The same segments make the same bytes; anything in the identity makes another name. */
static void test_identity(void **state) {
    extent_fixture *f = *state;
    loci_error err;
    loci_manifest_extent again;
    assert_ok(loci_extent_write(f->dir, f->builder, loci_builder_source(f->builder), NULL, NULL,
                                NULL, &again, &err));
    assert_memory_equal(again.id, f->entry.id, sizeof again.id);
    assert_int_equal(again.header_hash, f->entry.header_hash);
    assert_int_equal(again.file_bytes, f->entry.file_bytes);
    uint8_t id[LOCI_EXTENT_ID_BYTES];
    f->builder->segments[3].end++;
    loci_extent_identify(f->builder, id);
    assert_memory_not_equal(id, f->entry.id, sizeof id);
    f->builder->segments[3].end--;
    f->builder->segments[3].content[15] ^= 1;
    loci_extent_identify(f->builder, id);
    assert_memory_not_equal(id, f->entry.id, sizeof id);
    f->builder->segments[3].content[15] ^= 1;
    f->builder->segments[3].sequence += 9; /* not part of it: extents know no sequences */
    loci_extent_identify(f->builder, id);
    assert_memory_equal(id, f->entry.id, sizeof id);
    loci_builder *other = make_builder(20, OTHER_FINGERPRINT);
    loci_extent_identify(other, id);
    assert_memory_not_equal(id, f->entry.id, sizeof id);
    loci_builder_destroy(other);
}

static void test_truncation(void **state) {
    extent_fixture *f = *state;
    loci_error err;
    loci_extent *extent;
    uint64_t cuts[] = {f->entry.file_bytes - 1, f->entry.file_bytes / 2, 128, 1, 0};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        assert_int_equal(truncate(f->path, (off_t)cuts[i]), 0);
        assert_int_equal(open_extent(f, &extent, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, f->path));
    }
    assert_int_equal(truncate(f->path, (off_t)f->entry.file_bytes), 0); /* zeros now */
    assert_int_equal(open_extent(f, &extent, &err), LOCI_E_CORRUPT);
    assert_int_equal(unlink(f->path), 0);
    assert_int_equal(open_extent(f, &extent, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "missing"));
}

/* Every byte: damage to header, directory and segment table is found at open, damage to what open
 * does not read is found by reading, or lies in the gaps between sections. */
static void test_every_byte(void **state) {
    extent_fixture *f = *state;
    loci_error err;
    uint16_t k[210 * 16], v[210 * 16];
    uint32_t table_end = 128 + 24 * PAIRS + 127;
    table_end = table_end / 128 * 128 + 20 * 40;
    unsigned unseen = 0;
    for (uint64_t at = 0; at < f->entry.file_bytes; at += at < table_end ? 1 : 7) {
        flip_byte(f->path, (long)at);
        loci_extent *extent = NULL;
        loci_status status = open_extent(f, &extent, &err);
        bool gap = at >= 128 + 24 * PAIRS && at < table_end - 20 * 40;
        if (at < table_end && !gap) assert_int_not_equal(status, LOCI_OK);
        for (uint32_t p = 0; status == LOCI_OK && p < PAIRS; p++)
            status = loci_extent_read_pair(extent, p, NULL, k, v, &err);
        if (status == LOCI_OK) {
            /* Unseen: gaps, value means and position codes, which other readers verify. K and V
             * must be right in any case. */
            for (uint32_t p = 0; p < PAIRS; p++) {
                assert_ok(loci_extent_read_pair(extent, p, NULL, k, v, &err));
                assert_memory_equal(k, f->builder->k[p], sizeof k);
                assert_memory_equal(v, f->builder->v[p], sizeof v);
            }
            unseen++;
        } else {
            assert_true(status == LOCI_E_CORRUPT || status == LOCI_E_UNSUPPORTED);
            assert_non_null(strstr(err.text, strrchr(f->path, '/') + 1));
        }
        loci_extent_unref(extent);
        flip_byte(f->path, (long)at);
    }
    assert_true(unseen < f->entry.file_bytes / 7 / 3);
}

static void test_wrong_expectations(void **state) {
    extent_fixture *f = *state;
    loci_error err;
    loci_extent *extent;
    f->entry.header_hash++;
    assert_int_equal(open_extent(f, &extent, &err), LOCI_E_CORRUPT);
    f->entry.header_hash--;
    f->entry.tokens--;
    assert_int_equal(open_extent(f, &extent, &err), LOCI_E_CORRUPT);
    f->entry.tokens++;
    loci_geometry geometry = test_geometry();
    memcpy(geometry.fingerprint, OTHER_FINGERPRINT, LOCI_FINGERPRINT_LEN);
    assert_int_equal(
        loci_extent_open(f->dir, &geometry, &f->entry, &f->base.backend, &extent, &err),
        LOCI_E_PRECONDITION);
    assert_string_equal(err.reason, "MODEL_MISMATCH");
    geometry = test_geometry();
    geometry.ranking_layer = 0;
    assert_int_equal(
        loci_extent_open(f->dir, &geometry, &f->entry, &f->base.backend, &extent, &err),
        LOCI_E_CORRUPT);
    assert_ok(open_extent(f, &extent, &err));
    loci_extent_unref(extent);
}

/* Manifests: every flipped bit and every truncation is refused or harmless, never a crash. */
static void test_manifest_bytes(void **state) {
    (void)state;
    loci_error err;
    loci_manifest *manifest = loci_manifest_create(FINGERPRINT), *copy;
    loci_run *runs = calloc(2, sizeof *runs);
    runs[0] = (loci_run){3, 2, 40, true};
    runs[1] = (loci_run){4, 1, 10, false};
    loci_manifest_extent extent = {.file_bytes = 4096,
                                   .header_hash = 5,
                                   .tokens = 50,
                                   .segments = 3,
                                   .partial = true,
                                   .runs = runs,
                                   .run_count = 2};
    assert_true(loci_manifest_replace(manifest, 0, 0, &extent));
    manifest->next_flat = 9;
    assert_true(loci_manifest_add_flat(
        manifest, &(loci_manifest_flat){.number = 8, .sequence = 4, .end = 9, .tokens = 7}));
    loci_buf bytes = LOCI_BUF_INIT, again = LOCI_BUF_INIT;
    loci_manifest_encode(manifest, &bytes);
    loci_slice whole = loci_slice_of(bytes.data, bytes.len);
    assert_ok(loci_manifest_decode(whole, FINGERPRINT, "a", &copy, &err));
    assert_int_equal(copy->live_tokens, 17);
    assert_int_equal(copy->live_segments, 2);
    assert_int_equal(copy->extents[0].dead_tokens, 40);
    loci_manifest_encode(copy, &again);
    assert_int_equal(again.len, bytes.len);
    assert_memory_equal(again.data, bytes.data, bytes.len);
    loci_manifest_unref(copy);
    for (size_t len = 0; len < bytes.len; len++) {
        uint8_t *exact = malloc(len + 1);
        memcpy(exact, bytes.data, len);
        assert_int_equal(
            loci_manifest_decode(loci_slice_of(exact, len), FINGERPRINT, "a", &copy, &err),
            LOCI_E_CORRUPT);
        free(exact);
    }
    for (size_t bit = 0; bit < bytes.len * 8; bit++) {
        bytes.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (loci_manifest_decode(whole, FINGERPRINT, "a", &copy, &err) == LOCI_OK)
            loci_manifest_unref(copy);
        bytes.data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    loci_buf_fini(&bytes);
    loci_buf_fini(&again);
    loci_manifest_unref(manifest);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_round_trip), TEST(test_identity),           TEST(test_truncation),
        TEST(test_every_byte), TEST(test_wrong_expectations), cmocka_unit_test(test_manifest_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
