/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared parts of the tests of memory/; see support.h.
 */
#include "support.h"

#include <dirent.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "attention/cluster.h"
#include "attention/index_layout.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/rng.h"
#include "memory/terms.h"

#define WAIT_NS 120000000000ull /* then it hangs; sanitizers are slow */

/* --- Backend and encoder ------------------------------------------------------------------ */

static loci_status fake_wrap(loci_backend *self, const void *host, size_t bytes, loci_buffer **out,
                             loci_error *err) {
    fixture *f = self->ctx;
    void (*hook)(fixture *) = f->on_wrap;
    (void)err;
    if (hook) { /* only then: the indexing thread wraps, too */
        f->on_wrap = NULL;
        hook(f);
    }
    *out = malloc(sizeof **out);
    assert_non_null(*out);
    **out = (loci_buffer){host, bytes};
    return LOCI_OK;
}

static void fake_free(loci_backend *self, loci_buffer *buffer) {
    (void)self;
    free(buffer);
}

static loci_status fake_cluster(loci_backend *self, const struct loci_keys *keys,
                                struct loci_clusters *out, loci_error *err) {
    (void)self;
    return loci_cluster_keys(keys, NULL, NULL, out, err);
}

static const loci_backend_ops fake_ops = {.name = "fake", .wrap = fake_wrap, .free = fake_free};
const loci_backend_ops fake_clustering_ops = {
    .name = "fake", .wrap = fake_wrap, .free = fake_free, .cluster_keys = fake_cluster};

loci_geometry test_geometry(void) {
    return (loci_geometry){.fingerprint = FINGERPRINT,
                           .retrieval_layers = 2,
                           .kv_heads = 2,
                           .head_dim = 16,
                           .ranking_layer = 1,
                           .segment_tokens = SEGMENT_TOKENS,
                           .has_sink = true};
}

static uint64_t mix(uint64_t x) {
    return loci_rng_next(&x);
}

uint64_t fake_model;

/* A bf16 number of magnitude 0.5 to 2. */
uint16_t fake_value(uint32_t token, uint32_t offset, uint32_t pair, uint32_t channel, uint32_t v) {
    uint64_t hash = mix(fake_model * 0x9e3779b97f4a7c15u ^
                        (token | (uint64_t)offset << 20 | (uint64_t)pair << 40 |
                         (uint64_t)channel << 48 | (uint64_t)v << 60));
    return (uint16_t)((hash & 0x8000u) | (0x3f00u + (hash & 0xffu)));
}

static bool is_space(uint8_t c) {
    return c == ' ' || c == '\n';
}

/* Segments of at most SEGMENT_TOKENS bytes, white space before each left out. */
static loci_status fake_split(void *ctx, loci_slice text, uint64_t from, uint32_t segments_max,
                              const loci_split **out, loci_error *err) {
    fixture *f = ctx;
    loci_split *s = &f->split;
    (void)err;
    free(s->tokens);
    free(s->begin);
    free(s->start);
    free(s->end);
    s->tokens = malloc(segments_max * (SEGMENT_TOKENS + 1) * sizeof *s->tokens);
    s->begin = malloc((segments_max + 1) * sizeof *s->begin);
    s->start = malloc(segments_max * sizeof *s->start);
    s->end = malloc(segments_max * sizeof *s->end);
    s->segments = 0;
    s->begin[0] = 0;
    uint32_t tokens = 0;
    while (s->segments < segments_max) {
        while (from < text.len && is_space(text.data[from])) from++;
        if (from == text.len) break;
        s->start[s->segments] = from;
        s->tokens[tokens++] = 256;
        for (uint32_t i = 0; i < SEGMENT_TOKENS && from < text.len; i++)
            s->tokens[tokens++] = text.data[from++];
        s->end[s->segments] = from;
        s->begin[++s->segments] = tokens;
    }
    s->next = from;
    *out = s;
    return LOCI_OK;
}

static loci_status fake_encode(void *ctx, const uint32_t *tokens, const uint32_t *begin,
                               uint32_t segments, uint16_t *const *k, uint16_t *const *v,
                               const loci_cancel *cancel, loci_error *err) {
    fixture *f = ctx;
    loci_geometry geometry = f->encoder.geometry;
    f->encodes++;
    if (f->fail_encodes > 0) {
        f->fail_encodes--;
        return loci_fail(err, LOCI_E_INTERNAL, "the fake encoder was told to fail");
    }
    if (f->encode_ms) loci_sleep_ms(f->encode_ms);
    loci_status status = loci_cancel_check(cancel);
    if (status != LOCI_OK) return loci_fail(err, status, "stopped");
    for (uint32_t p = 0; p < geometry.retrieval_layers * geometry.kv_heads; p++)
        for (uint32_t s = 0; s < segments; s++)
            for (uint32_t t = begin[s]; t < begin[s + 1]; t++)
                for (uint32_t c = 0; c < geometry.head_dim; c++) {
                    size_t at = (size_t)t * geometry.head_dim + c;
                    k[p][at] = fake_value(tokens[t], t - begin[s], p, c, 0);
                    v[p][at] = fake_value(tokens[t], t - begin[s], p, c, 1);
                }
    return LOCI_OK;
}

/* --- Fixture ---------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *info, int flag, struct FTW *walk) {
    (void)info;
    (void)flag;
    (void)walk;
    return remove(path);
}

void remove_tree(const char *dir) {
    nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

void fixture_init(fixture *f, const char *dir) {
    memset(f, 0, sizeof *f);
    loci_log_configure(LOCI_LOG_ERROR, false);
    if (dir) {
        snprintf(f->dir, sizeof f->dir, "%s", dir);
    } else {
        snprintf(f->dir, sizeof f->dir, "/tmp/loci-memory-XXXXXX");
        assert_non_null(mkdtemp(f->dir));
    }
    f->backend = (loci_backend){&fake_ops, f};
    f->encoder = (loci_encoder){.ctx = f, .geometry = test_geometry(), fake_split, fake_encode};
    loci_store_options_default(&f->options);
    f->options.memory_bytes = 32u << 20;
    f->options.extent_tokens = EXTENT_TOKENS;
    f->options.merge_tokens = 0; /* test_merge.c merges */
    f->options.merge_calm_ms = 20;
    f->options.seal_beside = true; /* services/ registers without */
}

void make_crash_directory(const char *name, char out[64]) {
    struct statvfs memory;
    bool room = statvfs("/dev/shm", &memory) == 0 && access("/dev/shm", W_OK) == 0 &&
                memory.f_bavail >= (512u << 20) / memory.f_frsize;
    snprintf(out, 64, "%s/loci-%s-XXXXXX", room ? "/dev/shm" : "/tmp", name);
    assert_non_null(mkdtemp(out));
}

int fixture_setup(void **state) {
    fixture *f = malloc(sizeof *f);
    fixture_init(f, NULL);
    *state = f;
    return 0;
}

void fixture_open(fixture *f) {
    loci_error err;
    assert_ok(loci_store_open(f->dir, &f->options, &f->backend, &f->store, &err));
}

void fixture_start(fixture *f) {
    loci_error err;
    assert_ok(loci_ingest_start(f->store, &f->encoder, NULL, &f->ingest, &err));
}

void fixture_close(fixture *f) {
    loci_ingest_stop(f->ingest);
    f->ingest = NULL;
    loci_store_close(f->store);
    f->store = NULL;
    free(f->split.tokens);
    free(f->split.begin);
    free(f->split.start);
    free(f->split.end);
    memset(&f->split, 0, sizeof f->split);
}

int fixture_teardown(void **state) {
    fixture *f = *state;
    fixture_close(f);
    remove_tree(f->dir);
    free(f);
    return 0;
}

void fixture_create(fixture *f, const char *corpus) {
    loci_error err;
    loci_corpus_info info;
    loci_geometry geometry = test_geometry();
    geometry.kv_int8 = f->kv_int8;
    float sink[2 * 2 * 16];
    for (size_t i = 0; i < sizeof sink / sizeof *sink; i++) sink[i] = (float)i;
    assert_ok(loci_corpus_create(f->store, corpus, &geometry, NULL, sink, sink, &info, &err));
}

/* --- Documents -------------------------------------------------------------------------- */

char *make_text(uint64_t seed, size_t size) {
    char *text = malloc(size + 1);
    assert_non_null(text);
    for (size_t i = 0; i < size; i++) {
        uint64_t r = mix(seed * 1000003u + i);
        text[i] = r % 7 == 0 ? ' ' : (char)('a' + r % 26);
    }
    if (size > 0) text[0] = 'A';
    text[size] = 0;
    return text;
}

loci_status put_document(fixture *f, const char *corpus, const char *id, loci_slice text,
                         loci_document_info *out, bool *unchanged, loci_error *err) {
    loci_document_writer *writer = NULL;
    LOCI_TRY(loci_document_begin(f->store, corpus, id, loci_slice_text("meta"), &writer, err));
    for (size_t at = 0; at < text.len;) {
        size_t part = text.len - at < 100000 ? text.len - at : 100000;
        loci_status status = loci_document_append(writer, loci_slice_of(text.data + at, part), err);
        if (status != LOCI_OK) {
            loci_document_abort(writer);
            return status;
        }
        at += part;
    }
    return loci_document_commit(writer, out, unchanged, err);
}

void put_text(fixture *f, const char *corpus, const char *id, uint64_t seed, size_t size) {
    loci_error err;
    loci_document_info info;
    bool unchanged;
    char *text = make_text(seed, size);
    assert_ok(put_document(f, corpus, id, loci_slice_of(text, size), &info, &unchanged, &err));
    free(text);
}

void wait_searchable(fixture *f, const char *corpus) {
    loci_error err;
    loci_ingest_progress progress;
    uint64_t end = loci_now_ns() + WAIT_NS;
    loci_ingest_wake(f->ingest);
    assert_ok(loci_ingest_progress_of(f->ingest, corpus, &progress, &err));
    while (progress.searchable_sequence < progress.stored_sequence) {
        assert_true(loci_now_ns() < end);
        assert_ok(loci_ingest_wait(f->ingest, corpus, 1000, &progress, &err));
    }
}

void wait_settled(fixture *f, const char *corpus) {
    uint64_t end = loci_now_ns() + WAIT_NS;
    loci_ingest_settle(f->ingest, corpus);
    while (!loci_ingest_settled(f->ingest, corpus)) {
        assert_true(loci_now_ns() < end);
        loci_sleep_ms(5);
    }
}

void wait_merged(fixture *f, const char *corpus) {
    uint64_t end = loci_now_ns() + WAIT_NS;
    while (!info_of(f, corpus).merged) {
        assert_true(loci_now_ns() < end);
        loci_sleep_ms(2);
    }
}

/* --- Snapshots -------------------------------------------------------------------------- */

/* Both halves of a pair in position order. */
static void read_extent_pair(const loci_extent_view *extent, uint32_t pair, uint16_t *k,
                             uint16_t *v) {
    loci_error err;
    uint64_t at = extent->pair_at[pair];
    assert_ok(loci_pair_read_positions(extent->buffer->data + at, extent->buffer->bytes - at,
                                       extent->segment_begin, extent->segments, NULL, k, v, &err));
}

/* int8: rows are what is left of the encoder's. */
static void check_rows(const uint16_t *k, const uint16_t *v, size_t stride, const uint8_t *text,
                       uint32_t tokens, uint32_t pair, bool int8) {
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t i = 0; i < 2; i++) {
            uint16_t row[16];
            int8_t quantised[16];
            for (uint32_t c = 0; c < 16; c++) /* offsets count the shared prefix */
                row[c] = fake_value(text[t], t + 1, pair, c, i);
            if (int8) loci_kv_restore(row, quantised, loci_kv_quantise(quantised, row, 16), 16);
            assert_memory_equal((i ? v : k) + t * stride, row, sizeof row);
        }
}

/* Slots of dead segments must be masked, all others not. */
static void check_live(const loci_extent_view *extent, uint32_t pairs) {
    uint32_t live_tokens = 0;
    for (uint32_t s = 0; s < extent->segments; s++)
        if (!extent->segment_dead || !extent->segment_dead[s])
            live_tokens += extent->segment_begin[s + 1] - extent->segment_begin[s];
    if (!extent->live) {
        assert_int_equal(live_tokens, extent->tokens);
        return;
    }
    for (uint32_t p = 0; p < pairs; p++) {
        uint32_t bits = 0;
        for (uint32_t w = 0; w < (extent->tokens + 63) / 64; w++)
            bits += (uint32_t)__builtin_popcountll(extent->live[p][w]);
        assert_int_equal(bits, live_tokens);
    }
}

static const uint8_t *segment_text(loci_snapshot *snapshot, uint32_t segment, loci_buf *text,
                                   loci_segment_info *info) {
    loci_error err;
    loci_buf_clear(text);
    assert_ok(loci_snapshot_segment(snapshot, segment, info, &err));
    assert_ok(loci_snapshot_read(snapshot, segment, info->start, info->end, text, &err));
    assert_int_equal(text->len, info->end - info->start);
    assert_int_equal(text->len, info->tokens);
    return text->data;
}

static uint64_t hash_segment(uint64_t hash, const loci_segment_info *info, uint64_t place) {
    for (const char *c = info->document; *c; c++) hash = mix(hash ^ (uint8_t)*c);
    return mix(mix(mix(hash ^ info->start) ^ info->end) ^ place);
}

/* --- Words ------------------------------------------------------------------------------ */

typedef struct posting_list {
    loci_term *items; /* one for each time that a term stands somewhere */
    size_t count;
    const uint64_t *terms;
    const loci_snapshot *snapshot;
} posting_list;

static int by_term(const void *a, const void *b) {
    const loci_term *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return x->segment < y->segment ? -1 : x->segment > y->segment;
}

static void take_posting(void *ctx, uint32_t term, uint32_t segment, uint32_t tokens,
                         uint32_t times) {
    posting_list *list = ctx;
    loci_error err;
    loci_segment_info info;
    assert_ok(loci_snapshot_segment(list->snapshot, segment, &info, &err));
    assert_int_equal(tokens, info.tokens);
    list->items = realloc(list->items, (list->count + times) * sizeof *list->items);
    assert_non_null(list->items);
    for (uint32_t i = 0; i < times; i++)
        list->items[list->count++] = (loci_term){list->terms[term], segment};
}

/* The postings of all words, and of one that is not there, against the text. */
static void check_words(loci_snapshot *snapshot) {
    loci_error err;
    loci_term_list expected = {0};
    loci_buf text = LOCI_BUF_INIT;
    loci_segment_info info;
    for (uint32_t s = 0; s < loci_snapshot_segments(snapshot); s++) {
        if (!loci_snapshot_segment_live(snapshot, s)) continue;
        const uint8_t *bytes = segment_text(snapshot, s, &text, &info);
        assert_ok(loci_terms_of(loci_slice_of(bytes, text.len), s, false, &expected, &err));
    }
    if (expected.count > 0) qsort(expected.items, expected.count, sizeof *expected.items, by_term);
    uint64_t *terms = malloc((expected.count + 1) * sizeof *terms), bytes = 0;
    assert_non_null(terms);
    uint32_t count = 0;
    for (size_t i = 0; i < expected.count; i++)
        if (i == 0 || expected.items[i].hash != expected.items[i - 1].hash)
            terms[count++] = expected.items[i].hash;
    terms[count++] = 12345;
    posting_list found = {.terms = terms, .snapshot = snapshot};
    assert_ok(
        loci_snapshot_postings(snapshot, terms, count, NULL, take_posting, &found, &bytes, &err));
    assert_int_equal(found.count, expected.count);
    if (found.count > 0) qsort(found.items, found.count, sizeof *found.items, by_term);
    for (size_t i = 0; i < found.count; i++) {
        assert_int_equal(found.items[i].hash, expected.items[i].hash);
        assert_int_equal(found.items[i].segment, expected.items[i].segment);
    }
    free(found.items);
    free(terms);
    loci_term_list_fini(&expected);
    loci_buf_fini(&text);
}

uint64_t check_snapshot(fixture *f, const char *corpus) {
    loci_error err;
    loci_snapshot *snapshot;
    assert_ok(loci_snapshot_acquire(f->store, corpus, &snapshot, &err));
    const loci_corpus_view *view = loci_snapshot_view(snapshot);
    uint64_t hash = 0, live_segments = 0, live_tokens = 0;
    uint32_t segment = 0;
    loci_buf text = LOCI_BUF_INIT;
    loci_segment_info info;
    size_t capacity = 1;
    for (uint32_t e = 0; e < view->extent_count; e++)
        if (view->extents[e].tokens * 16 > capacity) capacity = view->extents[e].tokens * 16;
    uint16_t *k = malloc(capacity * 2), *v = malloc(capacity * 2);
    for (uint32_t e = 0; e < view->extent_count; e++) {
        const loci_extent_view *extent = &view->extents[e];
        assert_int_equal(extent->segment_base, segment);
        check_live(extent, 4);
        for (uint32_t p = 0; p < 4; p++) {
            read_extent_pair(extent, p, k, v);
            for (uint32_t s = 0; s < extent->segments; s++) {
                if (!loci_snapshot_segment_live(snapshot, segment + s)) continue;
                const uint8_t *bytes = segment_text(snapshot, segment + s, &text, &info);
                size_t row = (size_t)extent->segment_begin[s] * 16;
                check_rows(k + row, v + row, 16, bytes, info.tokens, p, f->kv_int8);
                if (p > 0) continue;
                hash = hash_segment(hash, &info, extent->id);
                live_segments++;
                live_tokens += info.tokens;
            }
        }
        segment += extent->segments;
    }
    assert_int_equal(view->flat_segment_base, segment);
    for (uint32_t s = 0; s < view->flat_segments; s++) {
        const uint8_t *bytes = segment_text(snapshot, segment + s, &text, &info);
        assert_int_equal(view->flat_segment_begin[s + 1] - view->flat_segment_begin[s],
                         info.tokens);
        for (uint32_t p = 0; p < 4; p++) {
            size_t row = ((size_t)view->flat_segment_begin[s] * 2 + p % 2) * 16;
            const uint16_t *flat_k = (const void *)view->flat_k[p / 2]->data;
            const uint16_t *flat_v = (const void *)view->flat_v[p / 2]->data;
            check_rows(flat_k + row, flat_v + row, 32, bytes, info.tokens, p, false);
        }
        hash = hash_segment(hash, &info, 0);
        live_segments++;
        live_tokens += info.tokens;
    }
    assert_int_equal(loci_snapshot_segments(snapshot), segment + view->flat_segments);
    assert_int_equal(view->live_segments, live_segments);
    assert_int_equal(view->tokens, live_tokens);
    assert_int_equal(loci_snapshot_info(snapshot)->tokens, live_tokens);
    assert_true(view->has_sink && view->sink_v.offset == 2 * 2 * 16 * sizeof(float));
    check_words(snapshot);
    assert_ok(loci_snapshot_check(snapshot, &err));
    free(k);
    free(v);
    loci_buf_fini(&text);
    loci_snapshot_release(snapshot);
    return hash;
}

/* --- Files ------------------------------------------------------------------------------ */

void count_each(const char *dir, const key_group *groups, size_t count, size_t *out) {
    loci_error err;
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    for (size_t i = 0; i < count; i++) {
        loci_key begin = {.len = 0};
        loci_key_text(&begin, groups[i].prefix);
        loci_scan *scan = loci_scan_open(rocks, NULL, groups[i].family, &begin, NULL);
        loci_slice key;
        out[i] = 0;
        while (loci_scan_next(scan, &key)) out[i]++;
        assert_ok(loci_scan_close(scan, &err));
    }
    loci_rocks_close(rocks);
}

size_t count_keys(const char *dir, loci_family family, const char *prefix) {
    const key_group group = {family, prefix};
    size_t count;
    count_each(dir, &group, 1, &count);
    return count;
}

void damage_catalog(const char *dir, char kind, uint64_t uid, uint32_t value_kind) {
    loci_error err;
    loci_rocks *rocks;
    char path[128];
    snprintf(path, sizeof path, "%s/db", dir);
    assert_ok(loci_rocks_open(path, 16u << 20, &rocks, &err));
    loci_key key = {.len = 0};
    loci_key_u8(&key, (uint8_t)kind);
    loci_key_u64(&key, uid);
    loci_batch *batch = loci_batch_create(rocks);
    loci_batch_put(batch, LOCI_CF_CATALOG, &key, value_kind, loci_slice_text("nonsense"));
    assert_ok(loci_batch_write(batch, true, &err));
    loci_batch_destroy(batch);
    loci_rocks_close(rocks);
}

void flip_byte(const char *path, long at) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, at, SEEK_SET), 0);
    int byte = fgetc(file);
    assert_true(byte != EOF);
    assert_int_equal(fseek(file, at, SEEK_SET), 0);
    fputc(byte ^ 0x10, file);
    assert_int_equal(fclose(file), 0);
}

static unsigned list_extents(fixture *f, const char *corpus, char path[512]) {
    loci_error err;
    loci_corpus_info info;
    assert_ok(loci_corpus_get(f->store, corpus, &info, &err));
    char dir[256];
    snprintf(dir, sizeof dir, "%s/extents/%016llx", f->dir, (unsigned long long)info.uid);
    DIR *listing = opendir(dir);
    unsigned count = 0;
    path[0] = 0;
    for (struct dirent *entry; listing && (entry = readdir(listing));) {
        if (entry->d_name[0] == '.') continue;
        char found[512];
        snprintf(found, sizeof found, "%s/%.200s", dir, entry->d_name);
        if (count++ == 0 || strcmp(found, path) < 0) snprintf(path, 512, "%s", found);
    }
    if (listing) closedir(listing);
    return count;
}

bool find_extent(fixture *f, const char *corpus, char path[512]) {
    return list_extents(f, corpus, path) > 0;
}

unsigned count_extents(fixture *f, const char *corpus) {
    char path[512];
    return list_extents(f, corpus, path);
}

void wait_extents(fixture *f, const char *corpus, uint64_t expected) {
    for (int i = 0; i < 500 && count_extents(f, corpus) != expected; i++) loci_sleep_ms(10);
    assert_int_equal(count_extents(f, corpus), expected);
}

loci_corpus_info info_of(fixture *f, const char *corpus) {
    loci_error err;
    loci_corpus_info info;
    assert_ok(loci_corpus_get(f->store, corpus, &info, &err));
    return info;
}

void delete_document(fixture *f, const char *corpus, const char *id) {
    loci_error err;
    uint64_t revision = 0, before = info_of(f, corpus).revision;
    assert_ok(loci_document_delete(f->store, corpus, id, &revision, &err));
    assert_true(revision > before);
}
