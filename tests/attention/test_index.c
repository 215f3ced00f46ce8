/* SPDX-License-Identifier: Apache-2.0
 *
 * The pair blob: built, checked, read back; damaged bits are named or never read.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"
#include "base/clock.h"
#include "tests/attention/corpus_fixture.h"

static const loci_pair_build_options options = {.position_codes = true};

static fixture make_with(const loci_pair_build_options *build, uint32_t tokens, uint32_t dim,
                         const char *isa, unsigned threads) {
    fixture f;
    loci_error err = {0};
    fixture_shape shape = {.layers = 1,
                           .kv_heads = 1,
                           .dim = dim,
                           .q_heads = 1,
                           .tokens = tokens,
                           .segment_tokens = 37,
                           .clusters = 20,
                           .spread = 0.5f,
                           .seed = 11};
    fixture_generate(&f, &shape);
    if (fixture_build(&f, isa, threads, LOCI_EXTENT_TOKENS_MAX, 0, build, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    return f;
}

static fixture make(uint32_t tokens, uint32_t dim, const char *isa, unsigned threads) {
    return make_with(&options, tokens, dim, isa, threads);
}

static void test_build_reads_back_at_odd_sizes(void **state) {
    (void)state;
    static const uint32_t sizes[] = {1, 2, 15, 16, 17, 100, 333, 1000, 5000};
    static const uint32_t dims[] = {16, 32, 64, 128};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint32_t n = sizes[i], dim = dims[i % 4];
        fixture f = make(n, dim, NULL, 2);
        const loci_extent_view *view = &f.views[0];
        loci_error err = {0};
        assert_int_equal(
            loci_pair_open_check(f.memory[0], f.memory_bytes[0], view->pair_hash[0], &err),
            LOCI_OK);
        const loci_pair_header *header = loci_pair_header_of(f.memory[0]);
        assert_true(header->leaves <= (n + 7) / 8);
        uint16_t *k = malloc((size_t)n * dim * 2), *v = malloc((size_t)n * dim * 2);
        assert_int_equal(loci_pair_read_positions(f.memory[0], f.memory_bytes[0],
                                                  view->segment_begin, view->segments,
                                                  loci_backend_pool(f.backend), k, v, &err),
                         LOCI_OK);
        assert_memory_equal(k, f.k[0], (size_t)n * dim * 2);
        assert_memory_equal(v, f.v[0], (size_t)n * dim * 2);
        free(k);
        free(v);
        fixture_close(&f);
    }
}

/* Damage that no hash tells: two slots of the same token, one far behind the other. */
static void test_a_position_stands_once(void **state) {
    (void)state;
    enum { TOKENS = 1500, DIM = 16 };
    fixture f = make(TOKENS, DIM, NULL, 3);
    const loci_extent_view *view = &f.views[0];
    uint16_t *k = malloc(2 * TOKENS * DIM * sizeof *k), *v = k + TOKENS * DIM;
    uint8_t *blob = (uint8_t *)(uintptr_t)f.memory[0];
    loci_error err = {0};
    uint32_t from = 40, to = 1200, word = loci_slot_word(blob, from);
    assert_non_null(k);
    uint8_t *record = (uint8_t *)(uintptr_t)loci_slot_record(blob, to);
    memcpy(record + DIM / 2, &word, sizeof word);
    uint32_t check = loci_record_check(blob, to);
    memcpy(record + loci_record_stride(DIM) - sizeof check, &check, sizeof check);
    assert_int_equal(loci_pair_read_positions(blob, f.memory_bytes[0], view->segment_begin,
                                              view->segments, loci_backend_pool(f.backend), k, v,
                                              &err),
                     LOCI_E_CORRUPT);
    assert_non_null(strstr(err.text, "is another's, too"));
    free(k);
    fixture_close(&f);
}

/* Stores written before there were KV blocks. */
static void test_pairs_of_version_3_are_read(void **state) {
    (void)state;
    for (int int8 = 0; int8 < 2; int8++) {
        loci_pair_build_options build = {.position_codes = true, .kv_int8 = int8};
        fixture f = make_with(&build, 700, 32, NULL, 1);
        uint16_t *k = malloc(4 * 700 * 32 * sizeof *k), *v = k + 700 * 32;
        uint16_t *old_k = v + 700 * 32, *old_v = old_k + 700 * 32;
        loci_error err = {0};
        assert_non_null(k);
        const loci_extent_view *view = &f.views[0];
        assert_int_equal(loci_pair_read_positions(f.memory[0], f.memory_bytes[0],
                                                  view->segment_begin, view->segments,
                                                  loci_backend_pool(f.backend), k, v, &err),
                         LOCI_OK);
        size_t bytes = f.memory_bytes[0];
        assert_int_equal(fixture_age(&f, &err), LOCI_OK);
        assert_int_equal(loci_pair_header_of(f.memory[0])->version, 3);
        assert_true(f.memory_bytes[0] < bytes);
        assert_int_equal(
            loci_pair_open_check(f.memory[0], f.memory_bytes[0], view->pair_hash[0], &err),
            LOCI_OK);
        assert_int_equal(loci_pair_read_positions(f.memory[0], f.memory_bytes[0],
                                                  view->segment_begin, view->segments,
                                                  loci_backend_pool(f.backend), old_k, old_v, &err),
                         LOCI_OK);
        assert_memory_equal(k, old_k, 2 * 700 * 32 * sizeof *k);
        free(k);
        fixture_close(&f);
    }
}

/* The same bytes from 1, 2 and 3 threads and from every instruction set. */
static void test_build_is_deterministic(void **state) {
    (void)state;
    static const char *const isas[] = {"portable", "avx2", "avx512", NULL};
    fixture expected = make(3000, 64, "portable", 1);
    for (size_t i = 0; i < 4; i++) {
        loci_cpu_isa isa;
        loci_error err;
        if (loci_cpu_isa_detect(isas[i], &isa, &err) != LOCI_OK) continue;
        for (unsigned threads = 1; threads <= 3; threads++) {
            loci_pair_build_options build = options;
            fixture f = make(3000, 64, NULL, threads);
            loci_buf blob = LOCI_BUF_INIT;
            uint64_t hash = 0;
            uint32_t slots[3000];
            build.isa = isas[i];
            for (uint32_t t = 0; t < 3000; t++) slots[t] = t / 37 << 16 | t % 37;
            assert_int_equal(loci_pair_build(f.k[0], f.v[0], slots, 3000, 64, &build,
                                             loci_backend_pool(f.backend), &blob, &hash, &err),
                             LOCI_OK);
            assert_int_equal(blob.len, expected.memory_bytes[0]);
            assert_memory_equal(blob.data, expected.memory[0], blob.len);
            assert_true(hash == expected.views[0].pair_hash[0]);
            loci_buf_fini(&blob);
            fixture_close(&f);
        }
    }
    fixture_close(&expected);
}

static void check_nodes(const uint8_t *blob) {
    const loci_pair_header *header = loci_pair_header_of(blob);
    uint32_t slot = 0;
    for (uint32_t r = 0; r < header->roots; r++) {
        const loci_root *root = loci_pair_root(blob, r);
        uint32_t tokens = 0;
        assert_in_range(root->count, 1, LOCI_ROOT_LEAVES_MAX);
        for (uint32_t l = 0; l < root->count; l++) {
            const loci_leaf *leaf = &loci_root_leaves(blob, root)[l];
            assert_in_range(leaf->count, 1, LOCI_LEAF_TOKENS_MAX);
            assert_int_equal(leaf->begin, slot);
            slot += leaf->count;
            tokens += leaf->count;
        }
        assert_int_equal(tokens, root->tokens);
    }
    assert_int_equal(slot, header->tokens);
}

/* Keys that are alike, zero, huge or few. */
static void test_degenerate_keys(void **state) {
    (void)state;
    static const float values[] = {0.0f, 2.5f, 9e14f, -9e14f, 1e-38f};
    enum { N = 1111, DIM = 16 };
    uint16_t *k = malloc(N * DIM * 2), *v = malloc(N * DIM * 2);
    uint32_t slots[N];
    loci_error err;
    uint64_t rng = 5;
    for (uint32_t t = 0; t < N; t++) slots[t] = t;
    for (size_t i = 0; i < N * DIM; i++) v[i] = loci_f32_to_bf16(fixture_normal(&rng));
    for (size_t c = 0; c < 7; c++) {
        for (size_t i = 0; i < N * DIM; i++) {
            float x = c < 5    ? values[c]
                      : c == 5 ? (i / DIM % 3 == 0 ? 1e14f : 1e-3f)
                               : fixture_normal(&rng) * (i / DIM == 7 ? 1e12f : 1.0f);
            k[i] = loci_f32_to_bf16(x);
        }
        loci_buf blob = LOCI_BUF_INIT;
        uint64_t hash;
        assert_int_equal(loci_pair_build(k, v, slots, N, DIM, &options, NULL, &blob, &hash, &err),
                         LOCI_OK);
        void *aligned = aligned_alloc(128, blob.len);
        memcpy(aligned, blob.data, blob.len);
        assert_int_equal(loci_pair_open_check(aligned, blob.len, hash, &err), LOCI_OK);
        check_nodes(aligned);
        free(aligned);
        loci_buf_fini(&blob);
    }
    free(k);
    free(v);
}

static void test_build_refuses_bad_input(void **state) {
    (void)state;
    enum { N = 10, DIM = 16 };
    uint16_t k[N * DIM] = {0}, v[N * DIM] = {0};
    uint32_t slots[N] = {0};
    loci_buf blob = LOCI_BUF_INIT;
    loci_error err;
    uint64_t hash;
    assert_int_equal(loci_pair_build(k, v, slots, 0, DIM, &options, NULL, &blob, &hash, &err),
                     LOCI_E_INVAL);
    assert_int_equal(loci_pair_build(k, v, slots, N, 20, &options, NULL, &blob, &hash, &err),
                     LOCI_E_INVAL);
    k[5 * DIM + 3] = 0x7fc0; /* NaN */
    assert_int_equal(loci_pair_build(k, v, slots, N, DIM, &options, NULL, &blob, &hash, &err),
                     LOCI_E_INVAL);
    assert_non_null(strstr(err.text, "key of token 5, channel 3"));
    k[5 * DIM + 3] = 0;
    v[7 * DIM] = 0x7f80; /* infinity */
    assert_int_equal(loci_pair_build(k, v, slots, N, DIM, &options, NULL, &blob, &hash, &err),
                     LOCI_E_INVAL);
    assert_non_null(strstr(err.text, "value of token 7"));
    assert_int_equal(blob.len, 0);
    loci_buf_fini(&blob);
}

/* Deadlines near the end of a build: it is stopped, or whole to the byte. */
static void check_late_stops(const uint16_t *k, const uint32_t *slots, uint32_t n, uint32_t dim) {
    loci_error err;
    loci_buf whole = LOCI_BUF_INIT;
    uint64_t hash, begun = loci_now_ns();
    loci_pair_build_options stopping = options;
    loci_cancel cancel;
    assert_int_equal(loci_pair_build(k, k, slots, n, dim, &options, NULL, &whole, &hash, &err),
                     LOCI_OK);
    uint64_t took = loci_now_ns() - begun;
    stopping.cancel = &cancel;
    for (uint64_t i = 0; i < 80; i++) {
        loci_buf blob = LOCI_BUF_INIT;
        loci_cancel_init(&cancel, loci_now_ns() + took * (60 + i) / 100);
        loci_status status =
            loci_pair_build(k, k, slots, n, dim, &stopping, NULL, &blob, &hash, &err);
        if (status == LOCI_OK) {
            assert_int_equal(blob.len, whole.len);
            assert_memory_equal(blob.data, whole.data, whole.len);
        } else {
            assert_int_equal(status, LOCI_E_TIMEOUT);
        }
        loci_buf_fini(&blob);
    }
    loci_buf_fini(&whole);
}

/* Stopped at several moments: before, and by deadlines on the way. */
static void test_build_stops_when_told(void **state) {
    (void)state;
    enum { N = 20000, DIM = 16 };
    uint16_t *k = malloc(N * DIM * 2), *v = malloc(N * DIM * 2);
    uint32_t *slots = malloc(N * sizeof *slots);
    loci_error err;
    uint64_t rng = 5, hash;
    for (uint32_t t = 0; t < N; t++) slots[t] = t;
    for (size_t i = 0; i < N * DIM; i++) k[i] = v[i] = loci_f32_to_bf16(fixture_normal(&rng));
    loci_pair_build_options stopping = options;
    loci_cancel cancel;
    stopping.cancel = &cancel;
    unsigned stopped = 0;
    loci_status status = LOCI_E_TIMEOUT;
    for (uint64_t ns = 1; status != LOCI_OK; ns = ns < 1000000 ? 1000000 : ns * 2) {
        loci_buf blob = LOCI_BUF_INIT;
        loci_cancel_init(&cancel, loci_now_ns() + ns);
        status = loci_pair_build(k, v, slots, N, DIM, &stopping, NULL, &blob, &hash, &err);
        if (status != LOCI_OK) {
            assert_int_equal(status, LOCI_E_TIMEOUT);
            assert_non_null(strstr(err.text, "was stopped"));
            assert_int_equal(blob.len, 0);
            stopped++;
        }
        loci_buf_fini(&blob);
    }
    assert_true(stopped > 0);
    loci_buf blob = LOCI_BUF_INIT;
    loci_cancel_init(&cancel, 0);
    loci_cancel_request(&cancel);
    status = loci_pair_build(k, v, slots, N, DIM, &stopping, NULL, &blob, &hash, &err);
    assert_int_equal(status, LOCI_E_CANCELLED);
    check_late_stops(k, slots, N, DIM);
    free(k);
    free(v);
    free(slots);
}

/* Centroids, variances and codes stand for the keys. */
static void test_nodes_and_codes_describe_keys(void **state) {
    (void)state;
    fixture f = make(2000, 32, NULL, 1);
    const uint8_t *blob = f.memory[0];
    const loci_pair_header *header = loci_pair_header_of(blob);
    double error = 0.0, total = 0.0;
    for (uint32_t l = 0; l < header->leaves; l++) {
        const loci_leaf *leaf = fixture_leaf(blob, l, NULL);
        const loci_node *node = loci_pair_leaf_node(blob, l);
        for (uint32_t i = 0; i < 32; i++) {
            double sum = 0.0, squares = 0.0;
            for (uint32_t t = 0; t < leaf->count; t++) {
                double key = (double)loci_bf16_to_f32(
                    ((const uint16_t *)loci_slot_kv(blob, leaf->begin + t))[i]);
                uint8_t byte = loci_slot_record(blob, leaf->begin + t)[i / 2];
                double code = i % 2 ? byte >> 4 : byte & 15;
                double decoded = (double)loci_pair_mean(blob)[i] +
                                 (double)loci_pair_code_scale(blob)[i] * (code - 7.5);
                double x = key - (double)loci_pair_mean(blob)[i];
                error += (decoded - key) * (decoded - key);
                total += x * x;
                sum += x;
                squares += x * x;
            }
            double mean = sum / leaf->count, variance = squares / leaf->count - mean * mean;
            double centroid = (double)node->centroid_scale * loci_node_centroid(node)[i];
            double stored = (double)node->variance_scale * loci_node_variance(node, 32)[i];
            assert_true(fabs(centroid - mean) <= 0.51 * (double)node->centroid_scale + 1e-4);
            assert_true(fabs(stored - variance) <= 0.51 * (double)node->variance_scale + 1e-3);
        }
    }
    if (error / total > 0.02) fail_msg("codes lose %.4f of the variance", error / total);
    fixture_close(&f);
}

/* Each token's sketch is the nearest codeword of every run of channels to what its key differs from
 * its root's centroid, and codewords describe most of that. */
static void test_sketches_are_the_nearest_codewords(void **state) {
    (void)state;
    enum { DIM = 32, PARTS = DIM / LOCI_SKETCH_CHANNELS };
    fixture f = make(2003, DIM, NULL, 1);
    const uint8_t *blob = f.memory[0];
    double error = 0.0, total = 0.0;
    for (uint32_t r = 0; r < loci_pair_header_of(blob)->roots; r++) {
        const loci_root *root = loci_pair_root(blob, r);
        const loci_node *node = loci_pair_root_node(blob, r);
        const uint8_t *sketches = loci_root_sketches(blob, root);
        uint32_t first = loci_root_leaves(blob, root)->begin;
        for (uint32_t i = 0; i < root->tokens * PARTS; i++) {
            uint32_t t = i / PARTS, p = i % PARTS, in_group = t % 32;
            const float *book = loci_pair_codebook(blob) + (size_t)p * 4 * 16;
            uint8_t byte = sketches[t / 32 * loci_sketch_group(DIM) + p * 16 + in_group % 16];
            uint32_t word = in_group < 16 ? byte & 15 : byte >> 4;
            double distance[16] = {0}, best = INFINITY;
            for (uint32_t c = 0; c < 4; c++) {
                uint32_t channel = p * 4 + c;
                double x = (double)loci_bf16_to_f32(
                               ((const uint16_t *)loci_slot_kv(blob, first + t))[channel]) -
                           (double)loci_pair_mean(blob)[channel] -
                           (double)node->centroid_scale * loci_node_centroid(node)[channel];
                total += x * x;
                for (uint32_t w = 0; w < 16; w++) {
                    double off = x - (double)book[c * 16 + w];
                    distance[w] += off * off;
                }
            }
            for (uint32_t w = 0; w < 16; w++) best = fmin(best, distance[w]);
            if (distance[word] > best + 1e-4)
                fail_msg("root %u, token %u, part %u: word %u is not the nearest", r, t, p, word);
            error += distance[word];
        }
    }
    if (error / total > 0.5) fail_msg("sketches lose %.3f of the variance", error / total);
    fixture_close(&f);
}

/* Every section: flip bits; the readers name the part or do not read it. */
static void test_every_section_detects_flipped_bits(void **state) {
    (void)state;
    fixture f = make(700, 16, NULL, 1);
    uint8_t *blob = f.memory[0];
    const loci_extent_view *view = &f.views[0];
    const loci_pair_header header = *loci_pair_header_of(blob);
    uint16_t *k = malloc(700 * 16 * 2), *v = malloc(700 * 16 * 2);
    loci_error err;
    uint64_t rng = 99;
    struct {
        uint64_t at, bytes;
        bool opens; /* open_check does not read it */
        bool reads; /* nor does read_positions */
    } parts[] = {
        {0, sizeof header + 4 * (2 * 16 + loci_sketch_book(16)), false, false},
        {header.roots_at, header.roots * (sizeof(loci_root) + loci_node_stride(16)), false, false},
        {header.blocks_at, header.block_bytes, false, false},
        {header.leaf_nodes_at, header.leaves * loci_node_stride(16), false, false},
        {header.value_means_at, (header.roots + header.leaves) * 32, true, true},
        {header.records_at, 700 * loci_record_stride(16), true, false},
        {header.kv_hashes_at, 700 * 8, true, false},
        {header.kv_at, 700 * 64, true, false},
        {(uint64_t)((const uint8_t *)loci_pair_kv_block(blob, 0) - blob), 3 * 16, true, true},
        {(uint64_t)((const uint8_t *)loci_slot_segments(blob) - blob), 700 * 2, true, true},
        {header.position_hashes_at, 3 * 8, true, true},
        {header.position_codes_at, 700 * 8, true, true},
    };
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
        for (int round = 0; round < 40; round++) {
            uint64_t byte = parts[p].at + fixture_random(&rng) % parts[p].bytes;
            uint8_t bit = (uint8_t)(1u << fixture_random(&rng) % 8);
            blob[byte] ^= bit;
            loci_status open =
                loci_pair_open_check(blob, f.memory_bytes[0], view->pair_hash[0], &err);
            if (open != (parts[p].opens ? LOCI_OK : LOCI_E_CORRUPT))
                fail_msg("part %zu, byte %llu: open_check says %d", p, (unsigned long long)byte,
                         open);
            loci_status read = open != LOCI_OK
                                   ? LOCI_E_CORRUPT
                                   : loci_pair_read_positions(
                                         blob, f.memory_bytes[0], view->segment_begin,
                                         view->segments, loci_backend_pool(f.backend), k, v, &err);
            if (read != (parts[p].reads ? LOCI_OK : LOCI_E_CORRUPT))
                fail_msg("part %zu, byte %llu: read_positions says %d", p, (unsigned long long)byte,
                         read);
            blob[byte] ^= bit;
        }
    }
    assert_int_equal(loci_pair_open_check(blob, f.memory_bytes[0] - 1, view->pair_hash[0], &err),
                     LOCI_E_CORRUPT);
    assert_int_equal(loci_pair_open_check(blob, 16, view->pair_hash[0], &err), LOCI_E_CORRUPT);
    free(k);
    free(v);
    fixture_close(&f);
}

/* Seals the tree of hashes again after a change to nodes, as a hostile writer would. */
static uint64_t reseal(uint8_t *blob) {
    loci_pair_header *header = (void *)blob;
    size_t stride = loci_node_stride(header->head_dim);
    for (uint32_t r = 0; r < header->roots; r++) {
        loci_root *root = (loci_root *)(void *)(blob + header->roots_at) + r;
        if (root->begin > header->leaves || root->count > header->leaves - root->begin ||
            root->tokens > header->tokens)
            continue;
        root->hash_nodes =
            loci_hash_bytes(loci_pair_leaf_node(blob, root->begin), root->count * stride);
        root->hash_block =
            loci_hash_bytes(loci_root_leaves(blob, root),
                            loci_block_bytes(header->head_dim, root->count, root->tokens));
    }
    header->hash_roots =
        loci_hash_bytes(blob + header->roots_at, header->roots * (sizeof(loci_root) + stride));
    return loci_pair_header_hash(blob, header->head_dim);
}

/* Counts and offsets out of range are refused even under matching hashes. */
static void test_hostile_ranges_are_refused(void **state) {
    (void)state;
    fixture f = make(700, 16, NULL, 1);
    uint8_t *blob = f.memory[0];
    size_t bytes = f.memory_bytes[0];
    uint8_t *copy = malloc(bytes);
    memcpy(copy, blob, bytes);
    const loci_pair_header header = *loci_pair_header_of(blob);
    loci_error err;
    for (int part = 0; part < 17; part++) {
        loci_root *root = (loci_root *)(uintptr_t)loci_pair_root(blob, header.roots - 1);
        loci_leaf *leaf = (loci_leaf *)(uintptr_t)fixture_leaf(blob, header.leaves - 1, NULL);
        loci_node *node = (loci_node *)(uintptr_t)loci_pair_leaf_node(blob, header.leaves - 1);
        loci_pair_header *head = (void *)blob;
        switch (part) {
        case 0: root->begin++; break;
        case 1: root->count++; break;
        case 2: root->tokens = UINT32_MAX; break;
        case 3: root->count = 0; break;
        case 4: leaf->begin = 700; break;
        case 5: leaf->count = 33; break;
        case 6: leaf->count = 0; break;
        case 7: node->centroid_scale = NAN; break;
        case 8: root->block++; break;
        case 9: ((float *)(void *)(head + 1))[40] = INFINITY; break; /* of the codebook */
        case 10: head->kv_at += 128; break;
        case 11: head->tokens = 32768; break;
        case 12: head->head_dim = 128; break;
        case 13: head->kv_dtype = LOCI_F32; break;
        case 14: head->kv_dtype = LOCI_I8; break;
        case 15: head->version = LOCI_PAIR_OLDEST; break;
        default: head->roots = 0; break;
        }
        uint64_t hash = part < 10 ? reseal(blob) : loci_pair_header_hash(blob, 16);
        if (loci_pair_open_check(blob, bytes, hash, &err) != LOCI_E_CORRUPT)
            fail_msg("change %d was accepted", part);
        memcpy(blob, copy, bytes);
    }
    free(copy);
    fixture_close(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_build_reads_back_at_odd_sizes),
        cmocka_unit_test(test_pairs_of_version_3_are_read),
        cmocka_unit_test(test_a_position_stands_once),
        cmocka_unit_test(test_build_is_deterministic),
        cmocka_unit_test(test_degenerate_keys),
        cmocka_unit_test(test_build_refuses_bad_input),
        cmocka_unit_test(test_build_stops_when_told),
        cmocka_unit_test(test_nodes_and_codes_describe_keys),
        cmocka_unit_test(test_sketches_are_the_nearest_codewords),
        cmocka_unit_test(test_every_section_detects_flipped_bits),
        cmocka_unit_test(test_hostile_ranges_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
