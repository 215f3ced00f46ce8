/* SPDX-License-Identifier: Apache-2.0
 *
 * Look-ups over damaged extents: what is read is named, what is not read changes nothing.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "attention/index_layout.h"
#include "tests/attention/lookup_scene.h"

static loci_status look_up(scene *s, loci_select_params params, loci_error *err) {
    LOCI_TRY(fixture_rewrap(&s->f, err));
    fixture_run r = {.rows = s->rows,
                     .q = s->q,
                     .steady = s->steady,
                     .params = params,
                     .out = s->out,
                     .lse = s->lse};
    return fixture_look_up(&s->f, &r, err);
}

/* A flipped bit is a named error, or was not read and changes nothing. tail: leaf nodes and value
 * means are read as well. */
static void damage_is_named_or_unread(bool int8, uint32_t rows, bool tail, uint32_t limit) {
    setting c = usual;
    c.dim = 16;
    c.kv_int8 = int8;
    c.rows = rows;
    scene s = open_scene(c);
    loci_select_params params = narrow(0.9f, 100);
    if (rows == 1) params = narrow(0.999f, 400); /* so that enough is read */
    params.estimate_tail = tail;
    params.candidates_max = limit;
    loci_error err;
    size_t values = (size_t)s.rows * s.f.q_heads * s.f.dim, found = 0;
    assert_int_equal(look_up(&s, params, &err), LOCI_OK);
    float *before = malloc(values * sizeof *before);
    memcpy(before, s.out, values * sizeof *before);
    const loci_pair_header header = *loci_pair_header_of(s.f.memory[0]);
    const uint64_t begins[] = {0,
                               header.roots_at,
                               header.blocks_at,
                               header.leaf_nodes_at,
                               header.value_means_at,
                               header.records_at,
                               header.kv_hashes_at,
                               header.kv_at,
                               header.position_hashes_at};
    for (size_t part = 0; part + 1 < sizeof begins / sizeof *begins; part++) {
        bool of_tail =
            begins[part] == header.leaf_nodes_at || begins[part] == header.value_means_at;
        size_t found_in_part = 0;
        for (int round = 0; round < 30; round++) {
            uint64_t at = begins[part] + fixture_random(&s.rng) % (begins[part + 1] - begins[part]);
            uint8_t bit = (uint8_t)(1u << fixture_random(&s.rng) % 8);
            s.f.memory[0][at] ^= bit;
            loci_status status = look_up(&s, params, &err);
            s.f.memory[0][at] ^= bit;
            if (status == LOCI_OK) {
                assert_memory_equal(before, s.out, values * sizeof *before);
                continue;
            }
            assert_int_equal(status, LOCI_E_CORRUPT);
            assert_non_null(strstr(err.text, "extent 00000000e0000000, layer 0, KV head 0"));
            found_in_part++;
        }
        if (found_in_part == 0 && (tail || !of_tail))
            fail_msg("part %zu: no damage was ever found", part);
        found += found_in_part;
    }
    assert_true(found > (tail ? 60 : 40));
    free(before);
    close_scene(&s);
}

static void test_damage_is_named_or_unread(void **state) {
    (void)state;
    for (int i = 0; i < 6; i++)
        damage_is_named_or_unread(i % 2, i < 2 ? usual.rows : 1, i < 2, i < 4 ? 0 : 500);
}

#ifdef LOCI_TEST_CPU

/* Mode dense verifies blocks of slots; damage is still named by slot, or by what else is damaged,
 * and that of a dead token is none. Pairs of version 3 have no blocks, and give the same. */
static void dense_damage_is_named(bool int8, bool old) {
    setting c = usual;
    c.kv_int8 = int8;
    c.rows = 2;
    scene s = open_scene(c);
    loci_select_params dense = {.mode = LOCI_MODE_DENSE};
    loci_error err;
    size_t bytes = (size_t)s.rows * s.f.q_heads * s.f.dim * sizeof(float);
    assert_int_equal(look_up(&s, dense, &err), LOCI_OK);
    float *before = malloc(bytes);
    assert_non_null(before);
    memcpy(before, s.out, bytes);
    if (old) assert_int_equal(fixture_age(&s.f, &err), LOCI_OK);
    assert_int_equal(look_up(&s, dense, &err), LOCI_OK);
    assert_memory_equal(before, s.out, bytes);
    uint8_t *blob = s.f.memory[0];
    uint32_t slot = 517, segment = LOCI_SLOT_SEGMENT(loci_slot_word(blob, slot));
    uint8_t *kv = (uint8_t *)(uintptr_t)loci_slot_kv(blob, slot);
    for (size_t i = 0; i < loci_pair_kv_stride(blob); i += 7) {
        kv[i] ^= 4;
        assert_int_equal(look_up(&s, dense, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, "layer 0, KV head 0"));
        assert_non_null(strstr(err.text, "KV of slot 517"));
        kv[i] ^= 4;
    }
    if (!old) {
        uint8_t *hash = (uint8_t *)(uintptr_t)loci_pair_kv_block(blob, 2);
        hash[3] ^= 1;
        assert_int_equal(look_up(&s, dense, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, "hash of the KV block of slot 512"));
        hash[3] ^= 1;
    }
    s.dead[segment] = 1;
    assert_int_equal(fixture_kill(&s.f, s.dead, &err), LOCI_OK);
    assert_int_equal(look_up(&s, dense, &err), LOCI_OK);
    assert_true(memcmp(before, s.out, bytes) != 0);
    memcpy(before, s.out, bytes);
    kv[0] ^= 4;
    assert_int_equal(look_up(&s, dense, &err), LOCI_OK);
    assert_memory_equal(before, s.out, bytes);
    free(before);
    close_scene(&s);
}

static void test_dense_damage_is_named(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) dense_damage_is_named(i / 2, i % 2);
}

#endif

/* Records and K and V belong to their slot: those of another one, hash and all, are refused. */
static void test_slots_cannot_be_exchanged(void **state) {
    (void)state;
    scene s = open_scene(usual);
    loci_select_params dense = {.mode = LOCI_MODE_DENSE}, all = narrow(0.99f, 0);
    uint8_t *blob = s.f.memory[0];
    uint32_t slot = fixture_leaf(blob, 5, NULL)->begin;
    size_t kv_bytes = 4 * s.f.dim, record_bytes = loci_record_stride(s.f.dim);
    uint8_t *kv = (uint8_t *)(uintptr_t)loci_slot_kv(blob, slot), saved[4 * LOCI_HEAD_DIM_MAX];
    uint8_t *record = (uint8_t *)(uintptr_t)loci_slot_record(blob, slot);
    uint64_t *hash = (uint64_t *)(uintptr_t)loci_slot_kv_hash(blob, slot), saved_hash = *hash;
    loci_error err;
    memcpy(saved, kv, kv_bytes);
    memcpy(kv, kv + kv_bytes, kv_bytes);
    *hash = hash[1];
    assert_int_equal(look_up(&s, dense, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "KV of slot"));
    memcpy(kv, saved, kv_bytes);
    *hash = saved_hash;
    assert_int_equal(look_up(&s, dense, &err), LOCI_OK);
    all.roots_min = all.candidates_min = 1u << 30;
    for (size_t i = 0; i < (size_t)s.rows * s.f.q_heads * s.f.dim; i++) s.q[i] *= 1e-3f;
    memcpy(record, record + record_bytes, record_bytes);
    assert_int_equal(look_up(&s, all, &err), LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "record of slot"));
    close_scene(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_damage_is_named_or_unread),
#ifdef LOCI_TEST_CPU
        cmocka_unit_test(test_dense_damage_is_named),
#endif
        cmocka_unit_test(test_slots_cannot_be_exchanged),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
