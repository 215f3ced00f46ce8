/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory tiers of the cuda backend on a CPU (fake_cuda.h): what stands where under which
 * budget, what goes first, what is refused, that whatever is pinned has the bytes of its extent,
 * and that budgets and books hold under random use and failing allocations.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cuda/pair_blob.h"
#include "attention/cuda/pairs.h"
#include "attention/cuda/rows.h"
#include "tests/attention/corpus_fixture.h"
#include "tests/attention/fake_cuda.h"

enum { LAYERS = 3, HEADS = 2, PAIRS_MAX = 64 };

typedef struct scene {
    fixture f;
    loci_buffer buffers[8]; /* of the extents, as the cuda backend wraps them */
    loci_extent_view views[8];
    loci_cuda cuda;
    loci_cuda_pairs *pairs;
    uint32_t count;               /* of pairs: LAYERS * extents * HEADS */
    size_t index_bytes, kv_bytes; /* of all pairs of the largest layer */
    size_t index_all, kv_all;     /* of all layers */
    loci_cuda_pair_entry *pinned[PAIRS_MAX];
    loci_cuda_pair pair[PAIRS_MAX];
} scene;

static void open_scene(scene *s, uint32_t dim, bool int8) {
    loci_error err;
    fixture_shape shape = {.layers = LAYERS,
                           .kv_heads = HEADS,
                           .dim = dim,
                           .q_heads = HEADS,
                           .tokens = 700,
                           .segment_tokens = 41,
                           .clusters = 9,
                           .spread = 0.5f,
                           .seed = 5 + dim};
    loci_pair_build_options options = {.position_codes = dim != 32, .kv_int8 = int8};
    *s = (scene){0};
    fixture_generate(&s->f, &shape);
    assert_int_equal(fixture_build(&s->f, NULL, 2, 300, 0, &options, &err), LOCI_OK);
    assert_in_range(s->f.extents, 2, 8);
    s->count = LAYERS * HEADS * s->f.extents;
    assert_in_range(s->count, 1, PAIRS_MAX);
    for (uint32_t e = 0; e < s->f.extents; e++) {
        s->buffers[e] = (loci_buffer){NULL, s->f.memory_bytes[e], s->f.memory[e]};
        s->views[e] = s->f.views[e];
        s->views[e].buffer = &s->buffers[e];
    }
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        size_t index = 0, kv = 0;
        for (uint32_t p = 0; p < s->f.extents * HEADS; p++) {
            const uint8_t *blob = fixture_blob(&s->f, layer, p / HEADS, p % HEADS);
            index += loci_cuda_blob_index_bytes(blob);
            kv += loci_cuda_blob_kv_bytes(blob);
        }
        if (index > s->index_bytes) s->index_bytes = index;
        if (kv > s->kv_bytes) s->kv_bytes = kv;
        s->index_all += index;
        s->kv_all += kv;
    }
    fake = (fake_cuda){.device_room = (size_t)1 << 30};
    s->cuda.pool = loci_backend_pool(s->f.backend);
    assert_int_equal(loci_cuda_pairs_open(&s->cuda, &s->pairs, &err), LOCI_OK);
}

/* As a look-up does when it goes on to the next layer: what it has enqueued still runs. */
static void unpin(scene *s, uint32_t p) {
    if (fake.calls > 0) fake.enqueued = fake.calls;
    loci_cuda_pairs_unpin(s->pairs, s->pinned[p]);
    s->pinned[p] = NULL;
}

static void unpin_all(scene *s) {
    for (uint32_t p = 0; p < s->count; p++)
        if (s->pinned[p]) unpin(s, p);
}

static void close_scene(scene *s) {
    unpin_all(s);
    fake.enqueued = 0;
    loci_cuda_pairs_close(s->pairs);
    assert_int_equal(fake.device, 0);
    assert_int_equal(fake.host, 0);
    fixture_close(&s->f);
}

/* Pairs in the order of layers. */
static loci_status try_pin(scene *s, uint32_t p, bool below, loci_error *err) {
    uint32_t each = s->f.extents * HEADS, layer = p / each, e = p % each / HEADS;
    assert_null(s->pinned[p]);
    return loci_cuda_pairs_pin(s->pairs, &s->views[e], layer, HEADS, p % HEADS, s->f.dim, below,
                               &s->pinned[p], &s->pair[p], err);
}

static void pin(scene *s, uint32_t p) {
    loci_error err;
    if (try_pin(s, p, false, &err) != LOCI_OK) fail_msg("pair %u: %s", p, err.text);
}

/* Pins one and lets it go; where its K and V stand. */
static bool touch(scene *s, uint32_t p) {
    pin(s, p);
    bool below = s->pair[p].frame_of != NULL;
    unpin(s, p);
    return below;
}

static const uint8_t *blob_of(const scene *s, uint32_t p) {
    uint32_t each = s->f.extents * HEADS;
    return fixture_blob(&s->f, p / each, p % each / HEADS, p % HEADS);
}

static void check_rows(const scene *s, uint32_t p, uint32_t slot, const uint8_t *rows) {
    size_t bytes = loci_pair_kv_stride(blob_of(s, p));
    if (memcmp(rows, loci_slot_kv(blob_of(s, p), slot), bytes) != 0)
        fail_msg("pair %u, slot %u", p, slot);
}

static void check_pair(const scene *s, uint32_t p) {
    const uint8_t *blob = blob_of(s, p);
    const loci_pair_header *header = loci_pair_header_of(blob);
    const loci_cuda_pair *pair = &s->pair[p];
    assert_int_equal(pair->tokens, header->tokens);
    assert_memory_equal(pair->blob, blob, header->kv_hashes_at);
    assert_memory_equal(pair->records, loci_slot_record(blob, 0),
                        pair->tokens * loci_record_stride(s->f.dim));
    assert_int_equal(pair->position_codes != NULL, header->position_codes_at != 0);
    if (pair->position_codes)
        assert_memory_equal(pair->position_codes, blob + header->position_codes_at,
                            pair->tokens * s->f.dim / 2);
    assert_int_equal(pair->leaf_begin[pair->leaves], pair->tokens);
    for (uint32_t slot = 0; slot < pair->tokens; slot++)
        check_rows(s, p, slot, pair->kv + (size_t)slot * pair->row_bytes);
    assert_int_equal(pair->int8, header->kv_dtype == LOCI_I8);
    assert_int_equal(pair->row_bytes, pair->int8 ? 2 * s->f.dim + 16 : 4 * s->f.dim);
    assert_int_equal((uintptr_t)pair->kv % 16, 0);
}

/* Budgets hold, and books say what the device and the host have. */
static loci_cuda_pairs_stats check_books(const scene *s) {
    loci_cuda_pairs_stats stats;
    loci_cuda_pairs_stats_of(s->pairs, &stats);
    assert_true(stats.bytes <= stats.budget && stats.host_bytes <= stats.host_budget);
    assert_int_equal(stats.bytes, fake.device_bytes);
    assert_int_equal(stats.host_bytes + 2 * ((size_t)8 << 20), fake.host_bytes);
    assert_true(stats.kv_bytes <= stats.bytes);
    return stats;
}

static void test_everything_on_the_device(void **state) {
    (void)state;
    static const uint32_t dims[] = {16, 32, 48, 128};
    for (uint32_t i = 0; i < 8; i++) {
        scene s;
        open_scene(&s, dims[i % 4], i >= 4);
        for (uint32_t p = 0; p < s.count; p++) {
            pin(&s, p);
            check_pair(&s, p);
            assert_null(s.pair[p].frame_of);
        }
        loci_cuda_pairs_stats stats = check_books(&s);
        assert_int_equal(stats.misses, s.count);
        assert_int_equal(stats.kv_bytes, s.kv_all);
        assert_int_equal(stats.bytes, s.index_all + s.kv_all);
        assert_int_equal(stats.host_bytes, 0);
        unpin_all(&s);
        for (uint32_t p = 0; p < s.count; p++) (void)touch(&s, p);
        stats = check_books(&s);
        assert_int_equal(stats.hits, s.count);
        assert_int_equal(stats.evictions + stats.lowered, 0);
        close_scene(&s);
    }
}

/* Layer after layer with room for all indexes and part of K and V: what came first went down, all
 * have their bytes, and when the cache of rows has its place nothing moves any more. */
static void test_what_does_not_fit_goes_down(void **state) {
    (void)state;
    for (int part = 0; part < 4; part++) {
        scene s;
        open_scene(&s, part % 2 ? 32 : 16, part > 1);
        size_t all = s.index_all + s.kv_all;
        loci_cuda_pairs_limit(s.pairs, part % 2 ? all - s.kv_bytes : all * 9 / 10, all);
        uint32_t each = s.f.extents * HEADS;
        loci_cuda_pairs_stats before = {0};
        for (int round = 0; round < 4; round++) {
            for (uint32_t layer = 0; layer < LAYERS; layer++) {
                for (uint32_t p = layer * each; p < (layer + 1) * each; p++) pin(&s, p);
                for (uint32_t p = layer * each; p < (layer + 1) * each; p++) check_pair(&s, p);
                unpin_all(&s);
            }
            loci_cuda_pairs_stats stats = check_books(&s);
            assert_int_equal(stats.misses, s.count);
            assert_int_equal(stats.evictions, 0);
            assert_true(stats.lowered > 0 && stats.host_bytes > 0);
            if (round == 3) assert_true(stats.frames > 0 && stats.lowered == before.lowered);
            before = stats;
        }
        assert_true(touch(&s, 0));
        assert_false(touch(&s, s.count - 1));
        close_scene(&s);
    }
}

/* K and V of the least recently used pair go first; on the host, too. */
static void test_the_oldest_goes_first(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 32, false);
    loci_cuda_pairs_stats stats;
    uint32_t all = s.count;
    size_t kv1 = loci_cuda_blob_kv_bytes(blob_of(&s, 1));
    for (uint32_t p = 0; p < all; p++) (void)touch(&s, p);
    (void)touch(&s, 0); /* now 1 is the oldest */
    stats = check_books(&s);
    loci_cuda_pairs_limit(s.pairs, stats.bytes, kv1);
    assert_true(loci_cuda_pairs_shrink(s.pairs, 1));
    stats = check_books(&s);
    assert_int_equal(stats.lowered, 1);
    assert_int_equal(stats.host_bytes, kv1);
    assert_int_equal(stats.kv_bytes, s.kv_all - kv1);
    /* 2 is next, and takes the host's room from 1, which is older. */
    assert_true(loci_cuda_pairs_shrink(s.pairs, 1));
    stats = check_books(&s);
    assert_int_equal(stats.lowered, loci_cuda_blob_kv_bytes(blob_of(&s, 2)) <= kv1 ? 2 : 1);
    assert_int_equal(stats.evictions, 1);
    uint64_t misses = stats.misses;
    (void)touch(&s, 0);
    assert_int_equal(check_books(&s).misses, misses);
    (void)touch(&s, 1); /* is read again */
    assert_int_equal(check_books(&s).misses, misses + 1);
    pin(&s, 1);
    check_pair(&s, 1);
    close_scene(&s);
    /* On the host a younger one does not give way to an older: that one goes away. */
    open_scene(&s, 32, false);
    for (uint32_t p = 0; p < all; p++) (void)touch(&s, p);
    stats = check_books(&s);
    loci_cuda_pairs_limit(s.pairs, stats.bytes, loci_cuda_blob_kv_bytes(blob_of(&s, 0)));
    assert_true(loci_cuda_pairs_shrink(s.pairs, 1));
    (void)touch(&s, 0);
    uint64_t evictions = check_books(&s).evictions;
    assert_true(loci_cuda_pairs_shrink(s.pairs, 1));
    stats = check_books(&s);
    assert_int_equal(stats.evictions, evictions + 1);
    (void)touch(&s, 0);
    assert_int_equal(check_books(&s).misses, stats.misses);
    close_scene(&s);
}

/* One layer that fits only without its K and V, which are pinned while its last index comes. */
static void test_keys_and_values_leave_room_to_indexes(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 32, false);
    loci_error err;
    uint32_t each = s.f.extents * HEADS, p = 0;
    loci_cuda_pairs_limit(s.pairs, s.index_bytes + s.kv_bytes / 4, SIZE_MAX / 2);
    while (p < each && try_pin(&s, p, false, &err) == LOCI_OK) p++;
    if (p < each) {
        assert_int_equal(err.status, LOCI_E_LIMIT);
        assert_non_null(strstr(err.text, "does not fit the GPU"));
        unpin_all(&s);
        loci_cuda_pairs_lower(s.pairs);
    }
    unpin_all(&s);
    for (p = 0; p < each; p++) {
        if (try_pin(&s, p, true, &err) != LOCI_OK) fail_msg("%s", err.text);
        check_pair(&s, p);
    }
    (void)check_books(&s);
    unpin_all(&s);
    /* Not even its indexes: refused, and then goes on with more room. */
    loci_cuda_pairs_limit(s.pairs, s.index_bytes - 1, SIZE_MAX / 2);
    loci_status status = LOCI_OK;
    for (p = each; p < 2 * each && status == LOCI_OK; p++) status = try_pin(&s, p, true, &err);
    assert_int_equal(status, LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "bytes of index more than"));
    unpin_all(&s);
    loci_cuda_pairs_limit(s.pairs, 2 * s.index_bytes, SIZE_MAX / 2);
    for (p = each; p < 2 * each; p++) {
        assert_int_equal(try_pin(&s, p, true, &err), LOCI_OK);
        check_pair(&s, p);
    }
    close_scene(&s);
}

/* Without a tier below it is as with pairs alone: the oldest goes, whole. */
static void test_nothing_below(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 16, false);
    uint32_t each = s.f.extents * HEADS;
    loci_cuda_pairs_limit(s.pairs, s.index_bytes + s.kv_bytes, 0);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        for (uint32_t p = layer * each; p < (layer + 1) * each; p++) pin(&s, p);
        for (uint32_t p = layer * each; p < (layer + 1) * each; p++) check_pair(&s, p);
        unpin_all(&s);
    }
    loci_cuda_pairs_stats stats = check_books(&s);
    assert_true(stats.evictions > 0 && stats.lowered == 0 && stats.host_bytes == 0);
    close_scene(&s);
}

/* --- rows ------------------------------------------------------------------------------ */

/* A step over some slots of a pinned pair: bytes, and figures as they must be. */
static void step(scene *s, uint32_t p, const uint32_t *slots, uint32_t count, uint64_t *hits) {
    loci_cuda_rows *rows = loci_cuda_pairs_rows(s->pairs);
    loci_cuda_row_cache cache;
    assert_int_equal(loci_cuda_rows_enter(rows, NULL, &cache), cudaSuccess);
    if (cache.dim != s->f.dim) cache = (loci_cuda_row_cache){0};
    for (uint32_t i = 0; i < count; i++) {
        bool there = cache.frames && s->pair[p].frame_of && s->pair[p].frame_of[slots[i]];
        *hits += there;
        check_rows(s, p, slots[i], fake_read_rows(&cache, &s->pair[p], slots[i], s->f.dim));
    }
    assert_int_equal(loci_cuda_rows_leave(rows, NULL, cache.frames != NULL), cudaSuccess);
}

static void take_slots(uint32_t *slots, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) slots[i] = first + i;
}

static void test_rows_read_again_are_there(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 32, false);
    uint32_t slots[64], each = s.f.extents * HEADS;
    uint64_t hits = 0;
    loci_cuda_pairs_limit(s.pairs, s.index_all + s.kv_bytes / 2, SIZE_MAX / 2);
    for (uint32_t p = 0; p < each; p++) (void)touch(&s, p);
    loci_cuda_pairs_lower(s.pairs);
    pin(&s, 0);
    assert_non_null(s.pair[0].frame_of);
    uint32_t frames = (uint32_t)check_books(&s).frames;
    assert_true(frames >= 64);
    take_slots(slots, 0, 8);
    step(&s, 0, slots, 8, &hits);
    assert_int_equal(hits, 0);
    step(&s, 0, slots, 8, &hits);
    assert_int_equal(hits, 8);
    /* Others come until all frames were given out; those in use stay, the idle ones go. */
    for (uint32_t at = 8; at + 8 <= s.pair[0].tokens; at += 8) {
        take_slots(slots, at, 8);
        step(&s, 0, slots, 8, &hits);
        take_slots(slots, 0, 4);
        uint64_t before = hits;
        step(&s, 0, slots, 4, &hits);
        assert_int_equal(hits - before, 4);
    }
    loci_cuda_pairs_stats stats = check_books(&s);
    assert_int_equal(stats.row_hits, hits);
    if (frames < s.pair[0].tokens / 2) {
        assert_true(stats.row_evictions > 0);
        take_slots(slots, 4, 4);
        uint64_t before = hits;
        step(&s, 0, slots, 4, &hits);
        assert_int_equal(hits, before);
    }
    close_scene(&s);
}

/* When nothing else can, and as large as there is room when it comes back. */
static void test_cached_rows_give_way(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 32, false);
    uint64_t frames = 0;
    for (size_t times = 1; times <= 64; times *= 64) {
        for (uint32_t e = 0; e < s.f.extents; e++)
            loci_cuda_pairs_forget(s.pairs, s.views[e].buffer);
        assert_int_equal(loci_cuda_pairs_shrink(s.pairs, 1), times > 1);
        assert_int_equal(check_books(&s).bytes, 0);
        loci_cuda_pairs_limit(s.pairs, times * (s.index_all + s.kv_all), SIZE_MAX / 2);
        for (uint32_t p = 0; p < s.count; p++) (void)touch(&s, p);
        loci_cuda_pairs_lower(s.pairs);
        for (uint32_t p = 0; p < s.count; p++) assert_true(touch(&s, p));
        loci_cuda_pairs_stats stats = check_books(&s);
        assert_true(stats.frames > 16 * frames);
        frames = stats.frames;
    }
    close_scene(&s);
}

/* Any use, in any order, with other budgets in between and allocations that fail. */
static void use_at_random(scene *s, uint64_t *rng, int turns, bool failing) {
    uint64_t hits = 0;
    size_t all = s->index_all + s->kv_all;
    for (int turn = 0; turn < turns; turn++) {
        uint32_t p = (uint32_t)(fixture_random(rng) % s->count), slots[32];
        loci_error err;
        switch (fixture_random(rng) % 16) {
        case 0:
            loci_cuda_pairs_limit(s->pairs, fixture_random(rng) % (all + all / 2),
                                  fixture_random(rng) % all);
            continue;
        case 1: (void)loci_cuda_pairs_shrink(s->pairs, fixture_random(rng) % all); continue;
        case 2: loci_cuda_pairs_lower(s->pairs); continue;
        case 3: loci_cuda_pairs_forget(s->pairs, s->views[p % s->f.extents].buffer); continue;
        case 4: unpin_all(s); continue;
        default: break;
        }
        if (failing) fake.fail_at = fake.calls + 1 + fixture_random(rng) % 6;
        if (!s->pinned[p] && try_pin(s, p, turn % 3 == 0, &err) != LOCI_OK) {
            assert_int_equal(err.status, LOCI_E_LIMIT);
            unpin_all(s);
            continue;
        }
        fake.fail_at = 0;
        if (turn % 8 == 0) check_pair(s, p);
        for (int i = 0; i < 32; i++)
            slots[i] =
                (uint32_t)(fixture_random(rng) % s->pair[p].tokens / (1 + (uint32_t)turn % 5));
        step(s, p, slots, 32, &hits);
        if (fixture_random(rng) % 3 == 0) unpin(s, p);
    }
    fake.fail_at = 0;
    assert_true(hits > 0);
}

static void test_any_use(void **state) {
    (void)state;
    uint64_t rng = 17, lowered = 0, evictions = 0, row_evictions = 0;
    for (int round = 0; round < 6; round++) {
        scene s;
        open_scene(&s, round % 2 ? 16 : 48, round >= 4);
        use_at_random(&s, &rng, 1500, round % 3 == 2);
        /* Budgets were lowered below what is pinned; with what is left over gone, they hold. */
        unpin_all(&s);
        loci_cuda_pairs_limit(s.pairs, SIZE_MAX / 2, SIZE_MAX / 2);
        loci_cuda_pairs_stats stats = check_books(&s);
        lowered += stats.lowered;
        evictions += stats.evictions;
        row_evictions += stats.row_evictions;
        while (loci_cuda_pairs_shrink(s.pairs, SIZE_MAX / 2)) continue;
        stats = check_books(&s);
        assert_int_equal(stats.bytes, 0);
        close_scene(&s);
    }
    assert_true(lowered > 0 && evictions > 0 && row_evictions > 0);
}

/* Weights came after the budget was made: what the device really has is shared all the same. */
static void test_a_device_with_less_than_its_budget(void **state) {
    (void)state;
    scene s;
    open_scene(&s, 64, false);
    fake.device_room = s.index_all + s.kv_all / 2;
    for (int round = 0; round < 3; round++)
        for (uint32_t p = 0; p < s.count; p++) {
            pin(&s, p);
            check_pair(&s, p);
            unpin(&s, p);
        }
    loci_cuda_pairs_stats stats = check_books(&s);
    assert_true(stats.bytes < stats.budget / 2);
    assert_true(stats.lowered > 0 && stats.host_bytes > 0);
    assert_true(stats.frames > 0); /* rows are cached, if in fewer frames than the budget has */
    close_scene(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_everything_on_the_device),
        cmocka_unit_test(test_what_does_not_fit_goes_down),
        cmocka_unit_test(test_the_oldest_goes_first),
        cmocka_unit_test(test_keys_and_values_leave_room_to_indexes),
        cmocka_unit_test(test_nothing_below),
        cmocka_unit_test(test_rows_read_again_are_there),
        cmocka_unit_test(test_cached_rows_give_way),
        cmocka_unit_test(test_a_device_with_less_than_its_budget),
        cmocka_unit_test(test_any_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
