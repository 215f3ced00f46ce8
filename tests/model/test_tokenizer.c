/* SPDX-License-Identifier: Apache-2.0
 *
 * The tokenizer against what the Hugging Face tokenizers library made of 1,600 strings
 * (make_tokenizer_goldens.py), its promises for any bytes, and the files that it refuses.
 */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "model/tokenizer.h"

#define BUILT_IN "model/default/tokenizer.json"
#define GOLDENS "tests/data/model/tokenizer-goldens.bin"

static loci_tokenizer *open_ok(const char *path) {
    loci_tokenizer *tokenizer = NULL;
    loci_error err = {0};
    if (loci_tokenizer_open(path, &tokenizer, &err) != LOCI_OK) fail_msg("%s", err.text);
    return tokenizer;
}

/* Encodes and checks what holds for every text: ends rise and cover it, and, where nothing is
 * normalized, each token's bytes are those before its end, and decoding gives the text back. */
static void encode_checked(const loci_tokenizer *tokenizer, loci_slice text, bool special,
                           loci_tokens *tokens) {
    loci_error err = {0};
    loci_buf back = LOCI_BUF_INIT;
    bool exact = !loci_tokenizer_normalizes(tokenizer);
    tokens->count = 0;
    if (loci_tokenizer_encode(tokenizer, text, special, tokens, &err) != LOCI_OK)
        fail_msg("%s", err.text);
    for (size_t i = 0; i < tokens->count; i++) {
        assert_int_equal(loci_tokenizer_decode(tokenizer, &tokens->ids[i], 1, true, &back),
                         LOCI_OK);
        uint32_t before = i ? tokens->ends[i - 1] : 0;
        assert_true(tokens->ends[i] >= before + exact);
        if (exact) assert_int_equal(tokens->ends[i], back.len);
    }
    assert_int_equal(tokens->count ? tokens->ends[tokens->count - 1] : 0, text.len);
    if (exact) {
        assert_int_equal(back.len, text.len);
        if (text.len) assert_memory_equal(back.data, text.data, text.len);
    }
    loci_buf_fini(&back);
}

/* --- Goldens -------------------------------------------------------------------------- */

typedef struct id_list {
    uint32_t ids[8192];
    size_t count;
} id_list;

static uint32_t read_leb128(loci_reader *reader) {
    uint32_t value = 0;
    for (unsigned shift = 0; shift < 32; shift += 7) {
        uint8_t byte = loci_read_u8(reader);
        value |= (uint32_t)(byte & 127) << shift;
        if (byte < 128) break;
    }
    return value;
}

/* False: the list is said to equal the first one. */
static bool read_ids(loci_reader *reader, id_list *out) {
    uint32_t count = loci_read_u32(reader);
    if (count == UINT32_MAX) return false;
    assert_true(count <= 8192);
    for (out->count = 0; out->count < count; out->count++)
        out->ids[out->count] = read_leb128(reader);
    return true;
}

static void check_golden(const loci_tokenizer *tokenizer, unsigned string, unsigned list,
                         loci_slice text, const id_list *golden, loci_tokens *tokens) {
    encode_checked(tokenizer, text, list != 0, tokens);
    size_t i = 0;
    while (i < golden->count && i < tokens->count && golden->ids[i] == tokens->ids[i]) i++;
    if (i < golden->count || i < tokens->count)
        fail_msg("string %u, list %u: token %zu differs (byte %u of \"%.*s\")", string, list, i,
                 i ? tokens->ends[i - 1] : 0, (int)text.len, (const char *)text.data);
}

static void test_goldens(void **state) {
    (void)state;
    static id_list first, other;
    const char *path = getenv("LOCI_TOKENIZER_GOLDENS");
    loci_buf file = LOCI_BUF_INIT;
    read_file(path ? path : GOLDENS, &file);
    loci_tokenizer *built_in = open_ok(BUILT_IN);
    loci_tokenizer *llama3 = open_ok("tests/data/model/tokenizer-llama3.json");
    loci_tokenizer *qwen2 = open_ok("tests/data/model/tokenizer-qwen2.json");
    loci_tokenizer *gpt2 = open_ok("tests/data/model/tokenizer-gpt2.json");
    const loci_tokenizer *tokenizers[5] = {built_in, built_in, llama3, qwen2, gpt2};
    loci_tokens tokens = {0};
    assert_memory_equal(file.data, "LTG2", 4);
    loci_reader reader = loci_reader_of(loci_slice_of(file.data, file.len));
    loci_read_u32(&reader);
    uint32_t count = loci_read_u32(&reader);
    assert_true(count >= 1600);
    for (uint32_t string = 0; string < count; string++) {
        loci_slice text = loci_read_bytes(&reader);
        for (unsigned list = 0; list < 5; list++) {
            id_list *golden = list == 0 ? &first : &other;
            if (!read_ids(&reader, golden)) golden = &first;
            check_golden(tokenizers[list], string, list, text, golden, &tokens);
        }
    }
    assert_true(loci_reader_done(&reader));
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(gpt2);
    loci_tokenizer_close(qwen2);
    loci_tokenizer_close(llama3);
    loci_tokenizer_close(built_in);
    loci_buf_fini(&file);
}

/* --- Any bytes ------------------------------------------------------------------------ */

static void test_random_bytes_round_trip(void **state) {
    (void)state;
    loci_tokenizer *tokenizer = open_ok(BUILT_IN);
    loci_tokens tokens = {0};
    static const uint8_t likely[] = {0xe2, 0x80, 0x94, ' ', 'a', 0xf0, 0x9f, 0xed};
    uint32_t seed = 20240517;
    for (int round = 0; round < 3000; round++) {
        uint8_t text[256];
        size_t len = xorshift(&seed) % sizeof text;
        for (size_t i = 0; i < len; i++) {
            uint32_t r = xorshift(&seed);
            text[i] = r & 0x300 ? (uint8_t)r : likely[r % sizeof likely];
        }
        encode_checked(tokenizer, loci_slice_of(text, len), round % 2, &tokens);
    }
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(tokenizer);
}

/* An invalid byte is the token of that byte; the valid text around it is encoded as if alone. */
static void test_invalid_bytes_stand_alone(void **state) {
    (void)state;
    static const char *const invalid[] = {
        "\xff", "\x80", "\xc0", "\xf5", "\xed\xa0\x80", "\xe2\x82", "\xf4\x90\x80\x80", "\xc1\xbf"};
    loci_tokenizer *tokenizer = open_ok(BUILT_IN);
    loci_tokens whole = {0}, part = {0};
    for (size_t i = 0; i < sizeof invalid / sizeof invalid[0]; i++) {
        char text[64];
        size_t bad = strlen(invalid[i]);
        snprintf(text, sizeof text, "hello  %s world", invalid[i]);
        encode_checked(tokenizer, loci_slice_text(text), false, &whole);
        encode_checked(tokenizer, loci_slice_text("hello  "), false, &part);
        assert_true(whole.count > part.count + bad);
        assert_memory_equal(whole.ids, part.ids, part.count * sizeof *part.ids);
        for (size_t j = 0; j < bad; j++) assert_int_equal(whole.ends[part.count + j], 7 + j + 1);
        size_t rest = part.count + bad;
        encode_checked(tokenizer, loci_slice_text(" world"), false, &part);
        assert_int_equal(whole.count, rest + part.count);
        assert_memory_equal(whole.ids + rest, part.ids, part.count * sizeof *part.ids);
    }
    loci_tokens_fini(&whole);
    loci_tokens_fini(&part);
    loci_tokenizer_close(tokenizer);
}

/* --- Normalization -------------------------------------------------------------------- */

/* Where tokens of normalized text end in the text itself: "|" stands before each new end. */
static const struct {
    const char *text;
    bool special;
} normalized[] = {
    {"|a|e\u0301|b", false},            /* composed: 3 bytes become 2 */
    {"|\u0958|x", false},               /* 3 bytes become 6 */
    {"|1|\u1100\u1161\u11a8|.", false}, /* a syllable */
    {"|\xff|e\u0301|\xe2|\x82|1", false},
    {"|<|im_end|>|a\u0323\u0302|<|im_end|>|\u0301|1", true},
};

static void test_normalized_ends(void **state) {
    (void)state;
    loci_tokenizer *tokenizer = open_ok("tests/data/model/tokenizer-qwen2.json");
    assert_true(loci_tokenizer_normalizes(tokenizer));
    loci_tokens tokens = {0};
    for (size_t i = 0; i < sizeof normalized / sizeof normalized[0]; i++) {
        uint32_t ends[32], count = 0;
        loci_buf text = LOCI_BUF_INIT;
        for (const char *c = normalized[i].text; *c; c++) {
            bool inside = strncmp(c, "|>", 2) == 0 || (c > normalized[i].text && c[-1] == '<');
            if (*c != '|' || inside)
                loci_buf_u8(&text, (uint8_t)*c);
            else if (text.len)
                ends[count++] = (uint32_t)text.len;
        }
        ends[count++] = (uint32_t)text.len;
        encode_checked(tokenizer, loci_slice_of(text.data, text.len), normalized[i].special,
                       &tokens);
        uint32_t at = 0;
        for (size_t j = 0; j < tokens.count; j++) {
            if (tokens.ends[j] != ends[at]) at++;
            if (at == count || tokens.ends[j] != ends[at])
                fail_msg("case %zu: token %zu ends at %u", i, j, tokens.ends[j]);
        }
        assert_int_equal(at + 1, count);
        loci_buf_fini(&text);
    }
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(tokenizer);
}

/* --- Special tokens ------------------------------------------------------------------- */

static void test_special_tokens(void **state) {
    (void)state;
    loci_tokenizer *tokenizer = open_ok(BUILT_IN);
    uint32_t eos = loci_tokenizer_id(tokenizer, "<eos>");
    assert_int_equal(eos, 2);
    assert_int_equal(loci_tokenizer_id(tokenizer, "<doc>"), 3);
    assert_int_equal(loci_tokenizer_id(tokenizer, "<none>"), 9);
    assert_int_equal(loci_tokenizer_id(tokenizer, "<no such token>"), UINT32_MAX);
    assert_int_equal(loci_tokenizer_id(tokenizer, ""), UINT32_MAX);
    assert_true(loci_tokenizer_id(tokenizer, " the") < 8192);
    assert_int_equal(loci_tokenizer_vocab_size(tokenizer), 8192);
    assert_true(loci_tokenizer_is_special(tokenizer, eos));
    assert_false(loci_tokenizer_is_special(tokenizer, loci_tokenizer_id(tokenizer, " the")));
    assert_false(loci_tokenizer_is_special(tokenizer, UINT32_MAX));
    loci_tokens tokens = {0};
    encode_checked(tokenizer, loci_slice_text("a<eos>b"), true, &tokens);
    assert_int_equal(tokens.count, 3);
    assert_int_equal(tokens.ids[1], eos);
    assert_int_equal(tokens.ends[1], 6);
    loci_buf text = LOCI_BUF_INIT;
    assert_int_equal(loci_tokenizer_decode(tokenizer, tokens.ids, 3, false, &text), LOCI_OK);
    assert_string_equal(loci_buf_text(&text), "ab");
    assert_int_equal(loci_tokenizer_decode(tokenizer, &(uint32_t){UINT32_MAX}, 1, true, &text),
                     LOCI_OK);
    assert_int_equal(text.len, 2);
    loci_buf_fini(&text);
    encode_checked(tokenizer, loci_slice_text("a<eos>b<eos>"), false, &tokens);
    for (size_t i = 0; i < tokens.count; i++)
        assert_false(loci_tokenizer_is_special(tokenizer, tokens.ids[i]));
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(tokenizer);
}

/* Encoding appends, with ends that count from the start of the new text. */
static void test_encode_appends(void **state) {
    (void)state;
    loci_tokenizer *tokenizer = open_ok(BUILT_IN);
    loci_tokens tokens = {0};
    loci_error err;
    for (int i = 0; i < 2; i++)
        assert_int_equal(
            loci_tokenizer_encode(tokenizer, loci_slice_text("x"), false, &tokens, &err), LOCI_OK);
    assert_int_equal(loci_tokenizer_encode(tokenizer, loci_slice_of(NULL, 0), true, &tokens, &err),
                     LOCI_OK);
    assert_int_equal(tokens.count, 2);
    assert_int_equal(tokens.ids[0], tokens.ids[1]);
    assert_int_equal(tokens.ends[1], 1);
    /* After an error the list is as it was: here the last piece is too long. */
    size_t len = ((size_t)1 << 24) + 8;
    uint8_t *text = malloc(len);
    assert_non_null(text);
    memset(text, 'a', len);
    text[2] = '.';
    assert_int_equal(
        loci_tokenizer_encode(tokenizer, loci_slice_of(text, len), false, &tokens, &err),
        LOCI_E_LIMIT);
    assert_non_null(strstr(err.text, "cannot cut"));
    assert_int_equal(tokens.count, 2);
    free(text);
    /* A text that is too long is refused without being read. */
    loci_slice huge = loci_slice_of((const uint8_t *)"x", ((size_t)1 << 31) + 1);
    assert_int_equal(loci_tokenizer_encode(tokenizer, huge, false, &tokens, &err), LOCI_E_LIMIT);
    assert_int_equal(tokens.count, 2);
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(tokenizer);
}

/* --- Long runs and threads ------------------------------------------------------------ */

/* A megabyte that nothing cuts must not take quadratic time (which would be minutes). */
static void test_long_runs(void **state) {
    (void)state;
    enum { LEN = 1 << 20 };
    static const char *const units[] = {"a", "ACGT", " ",   "=", "\xe7\x9a\x84",
                                        "1", "\r\n", "ab'", "<"};
    loci_tokenizer *built_in = open_ok(BUILT_IN);
    loci_tokenizer *qwen2 = open_ok("tests/data/model/tokenizer-qwen2.json");
    loci_tokens tokens = {0};
    char *text = malloc(LEN + 1);
    assert_non_null(text);
    uint64_t begin = loci_now_ns();
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        size_t unit = strlen(units[i]), len = LEN - LEN % unit;
        for (size_t j = 0; j < len; j++) text[j] = units[i][j % unit];
        text[len] = 'x';
        encode_checked(built_in, loci_slice_of((uint8_t *)text, len + 1), true, &tokens);
        encode_checked(qwen2, loci_slice_of((uint8_t *)text, len + 1), false, &tokens);
    }
    assert_true(loci_now_ns() - begin < 60 * UINT64_C(1000000000));
    free(text);
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(qwen2);
    loci_tokenizer_close(built_in);
}

typedef struct worker {
    pthread_t thread;
    const loci_tokenizer *tokenizer;
    loci_slice text;
    loci_tokens tokens;
    loci_status status;
} worker;

static void *encode_in_thread(void *arg) {
    worker *self = arg;
    for (int i = 0; i < 20 && self->status == LOCI_OK; i++) {
        self->tokens.count = 0;
        self->status =
            loci_tokenizer_encode(self->tokenizer, self->text, true, &self->tokens, NULL);
    }
    return NULL;
}

static void test_threads_share_a_tokenizer(void **state) {
    (void)state;
    loci_buf file = LOCI_BUF_INIT;
    read_file(GOLDENS, &file);
    loci_tokenizer *tokenizer = open_ok(BUILT_IN);
    loci_tokens expected = {0};
    worker workers[4];
    loci_slice text = loci_slice_of(file.data, 50000);
    encode_checked(tokenizer, text, true, &expected);
    for (size_t i = 0; i < 4; i++) {
        workers[i] = (worker){.tokenizer = tokenizer, .text = text};
        assert_int_equal(pthread_create(&workers[i].thread, NULL, encode_in_thread, &workers[i]),
                         0);
    }
    for (size_t i = 0; i < 4; i++) {
        pthread_join(workers[i].thread, NULL);
        assert_int_equal(workers[i].status, LOCI_OK);
        assert_int_equal(workers[i].tokens.count, expected.count);
        assert_memory_equal(workers[i].tokens.ids, expected.ids,
                            expected.count * sizeof *expected.ids);
        loci_tokens_fini(&workers[i].tokens);
    }
    loci_tokens_fini(&expected);
    loci_tokenizer_close(tokenizer);
    loci_buf_fini(&file);
}

/* --- Refused files -------------------------------------------------------------------- */

/* A sound tokenizer.json in which `from` is replaced by `to`. */
static void write_edited(const char *path, const loci_buf *sound, const char *from,
                         const char *to) {
    const char *text = (const char *)sound->data;
    const char *at = from[0] ? strstr(text, from) : text;
    if (!at) fail_msg("the sound file has no %s", from);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fprintf(file, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    assert_int_equal(fclose(file), 0);
}

#define NORMALIZER "\"normalizer\": null"
#define STEPS "\"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": \""
#define ADDED "\"added_tokens\": []"

static const struct {
    const char *from, *to;
    loci_status status;
    const char *says;
} refused[] = {
    {"", "x", LOCI_E_CORRUPT, "not valid JSON"},
    {"{\"version\"", "[{\"version\"", LOCI_E_CORRUPT, "not valid JSON"},
    {NORMALIZER, "\"normalizer\": {\"type\": \"NFKC\"}", LOCI_E_UNSUPPORTED, "normalizer NFKC"},
    {NORMALIZER, "\"normalizer\": {}", LOCI_E_UNSUPPORTED, "normalizer of no type"},
    {NORMALIZER, "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []}",
     LOCI_E_UNSUPPORTED, "normalizer Sequence"},
    {NORMALIZER ", \"pre_tokenizer\": {\"type\": \"Sequence\"",
     NORMALIZER ", \"pre_tokenizer\": {\"type\": \"Metaspace\"", LOCI_E_UNSUPPORTED,
     "has Metaspace: it is a SentencePiece tokenizer"},
    {"\"decoder\": {\"type\": \"ByteLevel\"", "\"decoder\": {\"type\": \"Metaspace\"",
     LOCI_E_UNSUPPORTED, "has Metaspace: it is a SentencePiece"},
    {"\"decoder\": {\"type\": \"ByteLevel\"", "\"decoder\": {\"type\": \"WordPiece\"",
     LOCI_E_UNSUPPORTED, "decoder WordPiece"},
    {"\"decoder\"", "\"decoders\"", LOCI_E_INVAL, "lacks \"decoder\""},
    {"\"type\": \"BPE\"", "\"type\": \"Unigram\"", LOCI_E_UNSUPPORTED,
     "has Unigram: it is a SentencePiece"},
    {"\"type\": \"BPE\"", "\"type\": \"WordPiece\"", LOCI_E_UNSUPPORTED, "type WordPiece"},
    {"\"type\": \"BPE\"", "\"type\": 3", LOCI_E_INVAL, "\"type\" is not a string"},
    {"\"dropout\": null", "\"dropout\": 0.5", LOCI_E_UNSUPPORTED, "dropout"},
    {"\"byte_fallback\": false", "\"byte_fallback\": true", LOCI_E_UNSUPPORTED,
     "has byte_fallback: it is a SentencePiece tokenizer, as of Llama 2"},
    {"\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"_\"", LOCI_E_UNSUPPORTED,
     "end_of_word_suffix"},
    {"\"vocab\"", "\"vocabulary\"", LOCI_E_INVAL, "lacks \"vocab\""},
    {"\"merges\"", "\"merge\"", LOCI_E_INVAL, "lacks \"merges\""},
    {"\"merges\": [", "\"merges\": [\"a b c\", ", LOCI_E_INVAL, "merge 0 is not a pair"},
    {"\"merges\": [", "\"merges\": [[\"a\", \"\xc3\"]", LOCI_E_CORRUPT, "not valid JSON"},
    {"\"merges\": [", "\"merges\": [[\"a\", \"nope\"], ", LOCI_E_INVAL,
     "merge 0 (\"a\", \"nope\")"},
    {"\"!\": 0", "\"!\": 1", LOCI_E_INVAL, "have one id"},
    {"\"!\": 0", "\"!\": 4194304", LOCI_E_INVAL, "not an integer below"},
    {"\"!\": 0", "\"!\": -1", LOCI_E_INVAL, "not an integer below"},
    {"\"!\": 0", "\"!!?\": 0", LOCI_E_UNSUPPORTED, "no token for byte 0x21"},
    {"\"!\": 0", "\"!\": 0, \"!\": 0", LOCI_E_CORRUPT, "duplicate"},
    {"\"type\": \"Sequence\"", "\"type\": \"Whitespace\"", LOCI_E_UNSUPPORTED, "Whitespace"},
    {"\"Isolated\"", "\"Removed\"", LOCI_E_UNSUPPORTED, "behavior Removed"},
    {"\"add_prefix_space\": false", "\"add_prefix_space\": true", LOCI_E_UNSUPPORTED,
     "add_prefix_space"},
    {STEPS, STEPS "(", LOCI_E_INVAL, "regex of a pre-tokenizer is wrong"},
    {STEPS, STEPS "a*|", LOCI_E_UNSUPPORTED, "can match nothing"},
    {STEPS, STEPS "\\\\w|", LOCI_E_UNSUPPORTED, "\\w|"},
    {STEPS, STEPS "^a|", LOCI_E_UNSUPPORTED, "^a|"},
    {STEPS, STEPS "[a&&b]|", LOCI_E_UNSUPPORTED, "&&b]|"},
    {STEPS, STEPS "a{2}+|", LOCI_E_UNSUPPORTED, "{2}+|"},
    {STEPS, STEPS "(?R)|", LOCI_E_UNSUPPORTED, "(?R)|"},
    {STEPS, STEPS "\\\\p{^L}|", LOCI_E_UNSUPPORTED, "\\p{^L}|"},
    {"\"pretokenizers\": [",
     "\"pretokenizers\": [{\"type\": \"ByteLevel\", \"add_prefix_space\": "
     "false}, ",
     LOCI_E_UNSUPPORTED, "follows ByteLevel"},
    {ADDED ", " NORMALIZER,
     "\"added_tokens\": [{\"id\": 5000, \"content\": \"e\u0301\"}], "
     "\"normalizer\": {\"type\": \"NFC\"}",
     LOCI_E_UNSUPPORTED, "changes when it is normalized"},
    {ADDED, "\"added_tokens\": [1]", LOCI_E_INVAL, "not an object"},
    {ADDED, "\"added_tokens\": [{\"id\": 5, \"content\": \"<s>\"}]", LOCI_E_INVAL,
     "has id 5, which is another"},
    {ADDED, "\"added_tokens\": [{\"id\": 5000, \"content\": \"\"}]", LOCI_E_INVAL, "empty"},
    {ADDED, "\"added_tokens\": [{\"id\": 5000, \"content\": \"<s>\", \"lstrip\": true}]",
     LOCI_E_UNSUPPORTED, "lstrip"},
    {ADDED,
     "\"added_tokens\": [{\"id\": 5000, \"content\": \"<s>\"}, {\"id\": 5001, \"content\": "
     "\"<s>\"}]",
     LOCI_E_INVAL, "occurs twice"},
    {ADDED,
     "\"added_tokens\": [{\"id\": 5000, \"content\": \"<s>\"}, {\"id\": 5000, \"content\": "
     "\"<t>\"}]",
     LOCI_E_INVAL, "have one id"},
};

static void test_refused_files(void **state) {
    (void)state;
    char path[PATH_BYTES];
    path_of(path, "tokenizer.json");
    loci_buf sound = LOCI_BUF_INIT;
    read_file("tests/data/model/tokenizer-llama3.json", &sound);
    write_edited(path, &sound, "", "");
    loci_tokenizer_close(open_ok(path));
    write_edited(path, &sound, "\"unk_token\": null", "\"unk_token\": \"!\"");
    loci_tokenizer_close(open_ok(path));
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        loci_tokenizer *tokenizer = NULL;
        loci_error err = {0};
        write_edited(path, &sound, refused[i].from, refused[i].to);
        loci_status status = loci_tokenizer_open(path, &tokenizer, &err);
        loci_tokenizer_close(tokenizer);
        if (status != refused[i].status || !strstr(err.text, refused[i].says))
            fail_msg("%s: status %d, \"%s\"", refused[i].to, status, err.text);
    }
    loci_error err;
    loci_tokenizer *tokenizer = NULL;
    unlink(path);
    assert_int_equal(loci_tokenizer_open(path, &tokenizer, &err), LOCI_E_NOTFOUND);
    assert_int_equal(loci_tokenizer_open("/tmp", &tokenizer, &err), LOCI_E_IO);
    loci_buf_fini(&sound);
}

/* The token that a post-processor puts first, alone or in a Sequence, if it knows it. */
static void test_beginning_token(void **state) {
    (void)state;
    static const struct {
        const char *processor;
        uint32_t bos;
    } cases[] = {
        {"null", UINT32_MAX},
        {"{\"type\": \"ByteLevel\"}", UINT32_MAX},
        {"{\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"!\"}}]}",
         0},
        {"{\"type\": \"TemplateProcessing\", \"single\": [{\"Sequence\": {\"id\": \"A\"}}]}",
         UINT32_MAX},
        {"{\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": "
         "\"<none>\"}}]}",
         UINT32_MAX},
        {"{\"type\": \"Sequence\", \"processors\": [{\"type\": \"ByteLevel\"}, {\"type\": "
         "\"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"#\"}}]}]}",
         2},
        {"{\"type\": \"Sequence\", \"processors\": 5}", UINT32_MAX},
        {"[\"Sequence\"]", UINT32_MAX},
    };
    char path[PATH_BYTES];
    path_of(path, "tokenizer.json");
    loci_buf sound = LOCI_BUF_INIT;
    read_file("tests/data/model/tokenizer-llama3.json", &sound);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char to[512];
        snprintf(to, sizeof to, "\"post_processor\": %s", cases[i].processor);
        write_edited(path, &sound, "\"post_processor\": null", to);
        loci_tokenizer *tokenizer = open_ok(path);
        assert_int_equal(loci_tokenizer_bos(tokenizer), cases[i].bos);
        loci_tokenizer_close(tokenizer);
    }
    unlink(path);
    loci_buf_fini(&sound);
}

/* Added tokens: the longest wins, those marked normalized come second, and one that is not
 * special is kept by decoding. */
static void test_added_tokens(void **state) {
    (void)state;
    char path[PATH_BYTES];
    path_of(path, "tokenizer.json");
    loci_buf sound = LOCI_BUF_INIT;
    read_file("tests/data/model/tokenizer-llama3.json", &sound);
    write_edited(path, &sound, ADDED,
                 "\"added_tokens\": ["
                 "{\"id\": 5000, \"content\": \"<s>\", \"normalized\": false, \"special\": true},"
                 "{\"id\": 5001, \"content\": \"<s>>\", \"normalized\": false, \"special\": false},"
                 "{\"id\": 4000, \"content\": \"a<s\", \"special\": false}]");
    loci_tokenizer *tokenizer = open_ok(path);
    unlink(path);
    assert_int_equal(loci_tokenizer_vocab_size(tokenizer), 5002);
    assert_int_equal(loci_tokenizer_id(tokenizer, "a<s"), 4000);
    loci_tokens tokens = {0};
    encode_checked(tokenizer, loci_slice_text("<s><s>>a<s>a<s"), true, &tokens);
    static const uint32_t expected[] = {5000, 5001, 0, 5000, 4000};
    assert_int_equal(tokens.count, 5);
    for (size_t i = 0; i < 5; i++)
        if (i != 2) assert_int_equal(tokens.ids[i], expected[i]);
    loci_buf text = LOCI_BUF_INIT;
    assert_int_equal(loci_tokenizer_decode(tokenizer, tokens.ids, 5, false, &text), LOCI_OK);
    assert_string_equal(loci_buf_text(&text), "<s>>aa<s");
    encode_checked(tokenizer, loci_slice_text("<s><s>>a<s"), false, &tokens);
    for (size_t i = 0; i < tokens.count; i++) assert_true(tokens.ids[i] < 4000);
    loci_buf_fini(&text);
    loci_tokens_fini(&tokens);
    loci_tokenizer_close(tokenizer);
    loci_buf_fini(&sound);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),
        cmocka_unit_test(test_random_bytes_round_trip),
        cmocka_unit_test(test_invalid_bytes_stand_alone),
        cmocka_unit_test(test_normalized_ends),
        cmocka_unit_test(test_special_tokens),
        cmocka_unit_test(test_encode_appends),
        cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_threads_share_a_tokenizer),
        cmocka_unit_test(test_refused_files),
        cmocka_unit_test(test_beginning_token),
        cmocka_unit_test(test_added_tokens),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
