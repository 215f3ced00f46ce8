/* SPDX-License-Identifier: Apache-2.0
 *
 * The parts of the RPC runtime that meet hostile bytes, by themselves: arena, unpacking, UTF-8,
 * error details, reflection.
 */
#include "rpc_support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/descriptor_set.h"

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static grpc_byte_buffer *buffer_of(const uint8_t *data, size_t len) {
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)data, len);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static size_t pack_sample(uint8_t out[static 512]) {
    Loci__V1__Evidence evidence = LOCI__V1__EVIDENCE__INIT;
    Loci__V1__Evidence *items[3] = {&evidence, &evidence, &evidence};
    evidence.document = (char *)(uintptr_t) "tenants/default/corpora/c/documents/d";
    evidence.quote = (ProtobufCBinaryData){5, (uint8_t *)(uintptr_t) "quote"};
    Loci__V1__AnswerEvidence list = LOCI__V1__ANSWER_EVIDENCE__INIT;
    list.n_items = 3;
    list.items = items;
    Loci__V1__AnswerEvent event = LOCI__V1__ANSWER_EVENT__INIT;
    event.seq = 77;
    event.event_case = LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE;
    event.evidence = &list;
    assert_true(loci__v1__answer_event__get_packed_size(&event) <= 512);
    return loci__v1__answer_event__pack(&event, out);
}

/* Every limit from none to enough: an allocation fails in every place of the unpacking. */
static void test_unpacking_survives_every_limit(void **unused) {
    (void)unused;
    uint8_t bytes[512];
    size_t len = pack_sample(bytes);
    bool whole = false;
    for (size_t limit = 0; limit < 8192; limit += 16) {
        loci__arena arena;
        loci_error err;
        ProtobufCMessage *message;
        loci__arena_init(&arena, limit);
        loci_status status =
            loci__message_unpack(&loci__v1__answer_event__descriptor, buffer_of(bytes, len),
                                 &arena.allocator, &message, &err);
        assert_true(arena.allocated_bytes <= limit);
        assert_int_equal(status == LOCI_OK, !arena.exhausted);
        assert_true(!whole || status == LOCI_OK);
        whole = status == LOCI_OK;
        if (whole) {
            uint8_t again[512];
            assert_int_equal(protobuf_c_message_pack(message, again), len);
            assert_memory_equal(again, bytes, len);
        }
        loci__arena_fini(&arena);
    }
    assert_true(whole);
}

static void test_arena_reset_reuses(void **unused) {
    (void)unused;
    loci__arena arena;
    loci__arena_init(&arena, 1 * MIB);
    for (int round = 0; round < 100; round++) {
        size_t total = 0;
        for (size_t size = 1; size < 100000; size = size * 3 + 1) {
            uint8_t *at = loci__arena_alloc(&arena, size);
            assert_non_null(at);
            assert_int_equal((uintptr_t)at % 16, 0);
            memset(at, round, size);
            total += size;
        }
        assert_true(total <= arena.allocated_bytes && arena.allocated_bytes <= 1 * MIB);
        loci__arena_reset(&arena);
    }
    assert_null(loci__arena_alloc(&arena, 2 * MIB));
    assert_true(arena.exhausted);
    assert_null(loci__arena_alloc(&arena, SIZE_MAX));
    loci__arena_reset(&arena);
    assert_false(arena.exhausted);
    assert_string_equal(loci__arena_text(&arena, "abcdef", 3), "abc");
    loci__arena_fini(&arena);
}

/* Mutated messages are refused or unpacked, and text that comes through is UTF-8. */
static void test_unpacking_survives_mutation(void **unused) {
    (void)unused;
    uint64_t seed = 0x9e3779b97f4a7c15u;
    uint8_t sample[512];
    size_t sample_len = pack_sample(sample);
    int accepted = 0;
    for (int i = 0; i < 20000; i++) {
        uint8_t bytes[512];
        memcpy(bytes, sample, sample_len);
        size_t len = sample_len;
        for (uint64_t edits = 1 + next_random(&seed) % 4; edits > 0; edits--) {
            bytes[next_random(&seed) % len] = (uint8_t)next_random(&seed);
        }
        if (next_random(&seed) % 4 == 0) len = next_random(&seed) % len;
        loci__arena arena;
        loci_error err;
        ProtobufCMessage *message;
        loci__arena_init(&arena, 1 * MIB);
        loci_status status =
            loci__message_unpack(&loci__v1__answer_event__descriptor, buffer_of(bytes, len),
                                 &arena.allocator, &message, &err);
        if (status == LOCI_OK) {
            const Loci__V1__AnswerEvent *event = (const Loci__V1__AnswerEvent *)message;
            accepted++;
            if (event->event_case == LOCI__V1__ANSWER_EVENT__EVENT_EVIDENCE) {
                for (size_t j = 0; j < event->evidence->n_items; j++) {
                    const char *text = event->evidence->items[j]->document;
                    assert_true(loci__utf8_valid((const uint8_t *)text, strlen(text)));
                }
            }
        } else {
            assert_int_equal(status, LOCI_E_INVAL);
        }
        loci__arena_fini(&arena);
    }
    assert_in_range(accepted, 100, 19900);
}

static void test_utf8(void **unused) {
    (void)unused;
    static const char *const good[] = {"", "a", "é", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80",
                                      "\xc0\x80",
                                      "\xc3",
                                      "\xe0\x80\x80",
                                      "\xed\xa0\x80",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "\xf0\x80\x80\x80",
                                      "\xe2\x82"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        assert_true(loci__utf8_valid((const uint8_t *)good[i], strlen(good[i])));
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_false(loci__utf8_valid((const uint8_t *)bad[i], strlen(bad[i])));
        char text[32];
        snprintf(text, sizeof text, "x%sé", bad[i]);
        loci__utf8_sanitise(text);
        assert_true(loci__utf8_valid((const uint8_t *)text, strlen(text)));
        assert_true(text[0] == 'x' && strstr(text, "é"));
    }
}

/* The largest details fit into the metadata of a client with default limits, and come back. */
static void test_error_details_round_trip(void **unused) {
    (void)unused;
    char key[65], value[257];
    memset(key, 'k', 64);
    memset(value, 'v', 256);
    key[64] = value[256] = 0;
    loci__error_pair pairs[LOCI__ERROR_PAIRS_MAX];
    for (size_t i = 0; i < LOCI__ERROR_PAIRS_MAX; i++) pairs[i] = (loci__error_pair){key, value};
    loci_error err = {LOCI_E_LIMIT, "", ""};
    memset(err.reason, 'R', sizeof err.reason - 1);
    memset(err.text, 't', sizeof err.text - 1);
    grpc_slice details =
        loci__error_details_pack(LOCI_E_LIMIT, &err, pairs, LOCI__ERROR_PAIRS_MAX, 1500);
    size_t len = GRPC_SLICE_LENGTH(details);
    assert_true(len * 4 / 3 + 3 * sizeof err.text < 8192 - 1000); /* base64, percent-encoding */
    loci_slice bytes = loci_slice_of(GRPC_SLICE_START_PTR(details), len);
    loci_error back = {LOCI_E_LIMIT, "", ""};
    loci__error_details_read(bytes, &back);
    assert_string_equal(back.reason, err.reason);
    assert_string_equal(back.text, err.text);
    for (size_t cut = 0; cut < len; cut += 7) { /* truncated details do no harm */
        loci_error some = {LOCI_E_LIMIT, "", ""};
        loci__error_details_read(loci_slice_of(bytes.data, cut), &some);
    }
    grpc_slice_unref(details);
}

static void test_reflection_survives_mutation(void **unused) {
    (void)unused;
    uint64_t seed = 0x2545f4914f6cdd1du;
    loci_slice set = loci_descriptor_set();
    uint8_t *copy = malloc(set.len);
    assert_non_null(copy);
    for (int i = 0; i < 300; i++) {
        memcpy(copy, set.data, set.len);
        for (int j = 0; j < 20; j++) {
            copy[next_random(&seed) % set.len] = (uint8_t)next_random(&seed);
        }
        size_t count = 0;
        loci__reflection reflection = {.service_count = &count};
        loci_error err;
        if (loci__reflection_init(&reflection, loci_slice_of(copy, set.len), &err) == LOCI_OK) {
            assert_in_range(reflection.file_count, 1, LOCI__FILES_MAX);
        }
    }
    free(copy);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unpacking_survives_every_limit),
        cmocka_unit_test(test_arena_reset_reuses),
        cmocka_unit_test(test_unpacking_survives_mutation),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_error_details_round_trip),
        cmocka_unit_test(test_reflection_survives_mutation),
    };
    return cmocka_run_group_tests(tests, rpc_set_up, rpc_tear_down);
}
