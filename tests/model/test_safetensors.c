/* SPDX-License-Identifier: Apache-2.0
 *
 * The safetensors reader: files that this test writes, sound and broken in every way it checks
 * for, one clear error each; and the weights of the built-in model.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/safetensors.h"

/* A file of this header and data_len bytes 0, 1, 2...; the header is padded to eight bytes. */
static void write_tensors(const char *name, const char *header, size_t data_len) {
    loci_buf file = LOCI_BUF_INIT;
    size_t len = strlen(header), padded = (len + 7) / 8 * 8;
    loci_buf_u64(&file, padded);
    loci_buf_append_text(&file, header);
    for (size_t i = len; i < padded; i++) loci_buf_u8(&file, ' ');
    for (size_t i = 0; i < data_len; i++) loci_buf_u8(&file, (uint8_t)i);
    assert_int_equal(loci_buf_status(&file), LOCI_OK);
    write_file(name, file.data, file.len);
    loci_buf_fini(&file);
}

static loci_safetensors *open_ok(const char *folder) {
    loci_safetensors *file = NULL;
    loci_error err = {0};
    if (loci_safetensors_open(folder, &file, &err) != LOCI_OK) fail_msg("%s", err.text);
    return file;
}

static void expect_refusal(const char *what, loci_status expected, const char *says) {
    loci_safetensors *file = NULL;
    loci_error err = {0};
    loci_status status = loci_safetensors_open(dir, &file, &err);
    loci_safetensors_close(file);
    if (status != expected || !strstr(err.text, says))
        fail_msg("%s: status %d, \"%s\"", what, status, err.text);
}

#define TENSOR(name, dtype, shape, begin, end)                                                   \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": [" shape "], \"data_offsets\": [" begin \
    ", " end "]}"

static const char sound[] =
    "{\"__metadata__\": {\"format\": \"pt\"}, " TENSOR("w", "F32", "2, 3", "0", "24") ", " TENSOR(
        "h", "BF16", "4", "24",
        "32") ", " TENSOR("i", "I64", "1", "32",
                          "40") ", " TENSOR("empty", "F16", "0, 5", "40",
                                            "40") ", " TENSOR("five", "F16", "1, 1, 1, 1, 2", "40",
                                                              "44") "}";

static void test_sound_file(void **state) {
    (void)state;
    write_tensors("model.safetensors", sound, 44);
    loci_safetensors *file = open_ok(dir);
    assert_int_equal(loci_safetensors_count(file), 5);
    static const char *const sorted[] = {"empty", "five", "h", "i", "w"};
    for (size_t i = 0; i < 5; i++) assert_string_equal(loci_safetensors_name(file, i), sorted[i]);
    loci_tensor t;
    loci_error err;
    assert_int_equal(loci_safetensors_get(file, "w", 2, (uint64_t[]){2, 3}, &t, &err), LOCI_OK);
    assert_string_equal(t.name, "w");
    assert_int_equal(t.dtype, LOCI_F32);
    assert_int_equal(t.dims, 2);
    assert_int_equal(t.shape[1], 3);
    assert_int_equal(t.bytes, 24);
    assert_int_equal(((const uint8_t *)t.data)[23], 23);
    assert_int_equal(loci_safetensors_get(file, "h", 0, NULL, &t, &err), LOCI_OK);
    assert_int_equal(t.dtype, LOCI_BF16);
    assert_int_equal(((const uint8_t *)t.data)[0], 24);
    assert_int_equal(loci_safetensors_get(file, "empty", 0, NULL, &t, &err), LOCI_OK);
    assert_int_equal(t.bytes, 0);
    assert_int_equal(loci_safetensors_get(file, "w", 2, (uint64_t[]){3, 2}, &t, &err),
                     LOCI_E_INVAL);
    assert_non_null(strstr(err.text, "\"w\" has shape [2, 3]; [3, 2] was expected"));
    assert_int_equal(loci_safetensors_get(file, "w", 1, (uint64_t[]){6}, &t, &err), LOCI_E_INVAL);
    assert_int_equal(loci_safetensors_get(file, "i", 0, NULL, &t, &err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "I64"));
    assert_int_equal(loci_safetensors_get(file, "five", 0, NULL, &t, &err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "5 dimensions"));
    assert_int_equal(loci_safetensors_get(file, "gone", 0, NULL, &t, &err), LOCI_E_NOTFOUND);
    assert_non_null(strstr(err.text, "\"gone\""));
    loci_safetensors_close(file);
}

/* A tensor that does not lie on a multiple of its element size is never handed out. */
static void test_misaligned_tensor(void **state) {
    (void)state;
    write_tensors("model.safetensors",
                  "{" TENSOR("b", "U8", "2", "0", "2") ", " TENSOR("w", "F32", "1", "2", "6") "}",
                  6);
    loci_safetensors *file = open_ok(dir);
    loci_tensor t;
    loci_error err;
    assert_int_equal(loci_safetensors_get(file, "w", 0, NULL, &t, &err), LOCI_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "aligned"));
    loci_safetensors_close(file);
}

static const struct {
    const char *header;
    size_t data_len;
    loci_status status;
    const char *says;
} broken[] = {
    {"", 0, LOCI_E_CORRUPT, "not valid JSON"},
    {"[]", 0, LOCI_E_CORRUPT, "not a JSON object"},
    {"{\"w\": }", 0, LOCI_E_CORRUPT, "not valid JSON"},
    {"{} {}", 0, LOCI_E_CORRUPT, "not valid JSON"},
    {"{\"w\": 1}", 0, LOCI_E_CORRUPT, "\"w\" has no dtype"},
    {"{" TENSOR("w", "F99", "1", "0", "4") "}", 4, LOCI_E_UNSUPPORTED, "unknown dtype F99"},
    {"{" TENSOR("w", "F32", "-1", "0", "4") "}", 4, LOCI_E_CORRUPT, "shape"},
    {"{" TENSOR("w", "F32", "1.5", "0", "4") "}", 4, LOCI_E_CORRUPT, "shape"},
    {"{\"w\": {\"dtype\": \"F32\", \"data_offsets\": [0, 4]}}", 4, LOCI_E_CORRUPT, "shape"},
    {"{" TENSOR("w", "F32", "4294967296, 4294967296", "0", "0") "}", 0, LOCI_E_CORRUPT,
     "overflows"},
    {"{" TENSOR("w", "F32", "4611686018427387904", "0", "0") "}", 0, LOCI_E_CORRUPT, "overflows"},
    {"{" TENSOR("w", "F32", "99999999999999999999", "0", "0") "}", 0, LOCI_E_CORRUPT,
     "not valid JSON"},
    {"{\"w\": {\"dtype\": \"F32\", \"shape\": [1]}}", 4, LOCI_E_CORRUPT, "data_offsets"},
    {"{\"w\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0]}}", 4, LOCI_E_CORRUPT,
     "data_offsets"},
    {"{" TENSOR("w", "F32", "1", "4", "0") "}", 4, LOCI_E_CORRUPT, "data_offsets"},
    {"{" TENSOR("w", "F32", "1", "-4", "0") "}", 4, LOCI_E_CORRUPT, "data_offsets"},
    {"{" TENSOR("w", "F32", "2", "0", "8") "}", 4, LOCI_E_CORRUPT, "past the end"},
    {"{" TENSOR("w", "F32", "2", "0", "4") "}", 4, LOCI_E_CORRUPT, "does not fit its shape"},
    {"{" TENSOR("w", "F16", "2", "0", "8") "}", 8, LOCI_E_CORRUPT, "does not fit its shape"},
    {"{" TENSOR("v", "F32", "2", "0", "8") ", " TENSOR("w", "F32", "2", "4", "12") "}", 12,
     LOCI_E_CORRUPT, "\"w\" overlaps"},
    {"{" TENSOR("v", "F32", "1", "0", "4") ", " TENSOR("w", "F32", "1", "8", "12") "}", 12,
     LOCI_E_CORRUPT, "\"w\" follows unused bytes"},
    {"{" TENSOR("w", "F32", "1", "0", "4") "}", 7, LOCI_E_CORRUPT, "3 bytes after its last"},
    {"{" TENSOR("w", "F32", "1", "0", "4") ", " TENSOR("w", "F32", "1", "4", "8") "}", 8,
     LOCI_E_CORRUPT, "duplicate"},
    {"{" TENSOR("w\\u0000", "F32", "1", "0", "4") "}", 4, LOCI_E_CORRUPT, "not valid JSON"},
    {"{" TENSOR("w\xff", "F32", "1", "0", "4") "}", 4, LOCI_E_CORRUPT, "not valid JSON"},
};

static void test_broken_headers(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        write_tensors("model.safetensors", broken[i].header, broken[i].data_len);
        expect_refusal(broken[i].header, broken[i].status, broken[i].says);
    }
}

/* Cut anywhere, a file is refused: no prefix of a sound file is sound. */
static void test_truncated_files(void **state) {
    (void)state;
    char path[PATH_BYTES];
    path_of(path, "model.safetensors");
    write_tensors("model.safetensors", sound, 44);
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    for (off_t len = info.st_size - 1; len >= 0; len--) {
        assert_int_equal(truncate(path, len), 0);
        loci_safetensors *file = NULL;
        loci_error err = {0};
        assert_int_equal(loci_safetensors_open(dir, &file, &err), LOCI_E_CORRUPT);
        assert_non_null(strstr(err.text, "model.safetensors"));
    }
}

static void test_hostile_header_lengths(void **state) {
    (void)state;
    static const uint64_t lengths[] = {9, UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        loci_buf file = LOCI_BUF_INIT;
        loci_buf_u64(&file, lengths[i]);
        loci_buf_append_text(&file, "{}      ");
        write_file("model.safetensors", file.data, file.len);
        loci_buf_fini(&file);
        expect_refusal("header length", LOCI_E_CORRUPT, "truncated");
    }
    /* Larger than any real header, in a (sparse) file that could hold it. */
    uint8_t start[8] = {0, 0, 0, 2};
    char path[PATH_BYTES];
    write_file("model.safetensors", start, sizeof start);
    path_of(path, "model.safetensors");
    assert_int_equal(truncate(path, (off_t)1 << 26), 0);
    expect_refusal("header of 32 MiB", LOCI_E_LIMIT, "header has 33554432 bytes");
}

/* Nesting is bounded: a header of brackets only must not overflow the stack. */
static void test_deep_nesting(void **state) {
    (void)state;
    enum { DEPTH = 1 << 20 };
    char *header = malloc(DEPTH + 6);
    assert_non_null(header);
    memcpy(header, "{\"w\":", 5);
    memset(header + 5, '[', DEPTH);
    header[DEPTH + 5] = 0;
    write_tensors("model.safetensors", header, 0);
    free(header);
    expect_refusal("deep nesting", LOCI_E_CORRUPT, "not valid JSON");
}

static void write_index(const char *text) {
    write_text("model.safetensors.index.json", text);
}

static void test_shards(void **state) {
    (void)state;
    write_tensors("a.safetensors",
                  "{" TENSOR("x", "F32", "1", "0", "4") ", " TENSOR("z", "F32", "1", "4", "8") "}",
                  8);
    write_tensors("b.safetensors", "{" TENSOR("y", "F32", "2", "0", "8") "}", 8);
    write_index("{\"metadata\": {\"total_size\": 16}, \"weight_map\": {\"z\": \"a.safetensors\", "
                "\"y\": \"b.safetensors\", \"x\": \"a.safetensors\"}}");
    loci_safetensors *file = open_ok(dir);
    assert_int_equal(loci_safetensors_count(file), 3);
    assert_string_equal(loci_safetensors_name(file, 0), "x");
    loci_tensor t;
    loci_error err;
    assert_int_equal(loci_safetensors_get(file, "z", 1, (uint64_t[]){1}, &t, &err), LOCI_OK);
    assert_int_equal(((const uint8_t *)t.data)[0], 4);
    assert_int_equal(loci_safetensors_get(file, "y", 1, (uint64_t[]){2}, &t, &err), LOCI_OK);
    loci_safetensors_close(file);

    write_index("{\"weight_map\": {\"y\": \"a.safetensors\"}}");
    expect_refusal("tensor not in shard", LOCI_E_CORRUPT, "tensor \"y\" is not in");
    write_index("{\"weight_map\": {\"y\": \"c.safetensors\"}}");
    expect_refusal("missing shard", LOCI_E_NOTFOUND, "c.safetensors cannot be opened");
    static const char *const names[] = {"../a.safetensors", "/etc/passwd", "x/a.safetensors", "..",
                                        ""};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char index[128];
        snprintf(index, sizeof index, "{\"weight_map\": {\"y\": \"%s\"}}", names[i]);
        write_index(index);
        expect_refusal(names[i], LOCI_E_CORRUPT, "not a plain file name");
    }
    write_index("{\"weight_map\": {\"y\": 5}}");
    expect_refusal("number for a file", LOCI_E_CORRUPT, "not a plain file name");
    write_index("{\"weight_map\": []}");
    expect_refusal("list of weights", LOCI_E_INVAL, "\"weight_map\" is not an object");
    write_index("{}");
    expect_refusal("no weight_map", LOCI_E_INVAL, "lacks \"weight_map\"");
    write_index("{\"weight_map\": {\"y\": \"b.safetensors\", \"y\": \"b.safetensors\"}}");
    expect_refusal("tensor twice", LOCI_E_CORRUPT, "duplicate");
    write_index("nothing");
    expect_refusal("no JSON", LOCI_E_CORRUPT, "not valid JSON");
}

static void test_no_weights(void **state) {
    (void)state;
    expect_refusal("empty folder", LOCI_E_NOTFOUND, "has neither model.safetensors nor");
    char path[PATH_BYTES];
    path_of(path, "model.safetensors");
    assert_int_equal(mkdir(path, 0700), 0);
    expect_refusal("folder for a file", LOCI_E_IO, "not a regular file");
}

static void test_built_in_weights(void **state) {
    (void)state;
    loci_safetensors *file = open_ok("model/default");
    loci_tensor t;
    loci_error err;
    assert_int_equal(loci_safetensors_get(file, "model.embed_tokens.weight", 2,
                                          (uint64_t[]){8192, 384}, &t, &err),
                     LOCI_OK);
    assert_int_equal(t.dtype, LOCI_BF16);
    assert_int_equal(t.bytes, 8192 * 384 * 2);
    for (size_t i = 0; i < loci_safetensors_count(file); i++) {
        const char *name = loci_safetensors_name(file, i);
        if (i) assert_true(strcmp(loci_safetensors_name(file, i - 1), name) < 0);
        assert_int_equal(loci_safetensors_get(file, name, 0, NULL, &t, &err), LOCI_OK);
    }
    loci_safetensors_close(file);
}

int main(void) {
#define TEST(f) cmocka_unit_test_teardown(f, clear_dir)
    const struct CMUnitTest tests[] = {
        TEST(test_sound_file),
        TEST(test_misaligned_tensor),
        TEST(test_broken_headers),
        TEST(test_truncated_files),
        TEST(test_hostile_header_lengths),
        TEST(test_deep_nesting),
        TEST(test_shards),
        TEST(test_no_weights),
        TEST(test_built_in_weights),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
