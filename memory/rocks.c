/* SPDX-License-Identifier: Apache-2.0
 *
 * The RocksDB wrapper; see rocks.h. Settings and why:
 * - WAL on with point-in-time recovery: after a power cut the database is some prefix of what
 *   was written, at least up to the last sync.
 * - Block checksums XXH3; Debian's build computes CRC32C in software.
 * - No compression: documents are zstd frames already, K and V do not compress.
 * - memory_bytes: five eighths cache, one quarter write buffers, the rest for what exceeds them
 *   (buffers while they are flushed, blocks that are read).
 * The library asserts (and aborts) on leaked column family handles: close in order.
 */
#include "memory/rocks.h"

#include <rocksdb/c.h>
#include <stdlib.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* the state on the stack; its size is fixed since 0.8 */
#include <xxhash.h>

#define RECORD_VERSION 1u

static const char *const family_names[LOCI_CF_COUNT] = {"default", "catalog", "document", "name",
                                                        "chunk",   "flat",    "terms"};

struct loci_rocks {
    rocksdb_t *db;
    rocksdb_options_t *options;
    rocksdb_block_based_table_options_t *table;
    rocksdb_cache_t *cache;
    rocksdb_readoptions_t *read;
    rocksdb_writeoptions_t *write, *write_sync;
    rocksdb_column_family_handle_t *families[LOCI_CF_COUNT];
};

struct loci_batch {
    loci_rocks *rocks;
    rocksdb_writebatch_t *batch;
};

struct loci_view {
    loci_rocks *rocks;
    const rocksdb_snapshot_t *snapshot;
    rocksdb_readoptions_t *read;
};

struct loci_scan {
    loci_rocks *rocks;
    loci_family family;
    rocksdb_readoptions_t *read;
    rocksdb_iterator_t *iterator;
    loci_key prefix;
    bool started;
};

/* --- Keys ------------------------------------------------------------------------------- */

void loci_key_u8(loci_key *key, uint8_t value) {
    LOCI_ASSERT(key->len + 1 <= LOCI_KEY_MAX);
    key->data[key->len++] = value;
}

void loci_key_u32(loci_key *key, uint32_t value) {
    for (int i = 3; i >= 0; i--) loci_key_u8(key, (uint8_t)(value >> (8 * i)));
}

void loci_key_u64(loci_key *key, uint64_t value) {
    for (int i = 7; i >= 0; i--) loci_key_u8(key, (uint8_t)(value >> (8 * i)));
}

void loci_key_text(loci_key *key, const char *text) {
    size_t len = strlen(text);
    LOCI_ASSERT(key->len + len <= LOCI_KEY_MAX);
    memcpy(key->data + key->len, text, len);
    key->len += len;
}

loci_key loci_key_after_prefix(const loci_key *key) {
    loci_key after = *key;
    while (after.len > 0 && after.data[after.len - 1] == 0xff) after.len--;
    if (after.len > 0) after.data[after.len - 1]++;
    return after;
}

uint64_t loci_key_read_u64(const uint8_t *data) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value = value << 8 | data[i];
    return value;
}

/* A key for messages: kind of family and the bytes in hex, shortened. */
static void describe_key(loci_family family, const uint8_t *key, size_t len, char out[128]) {
    static const char digits[] = "0123456789abcdef";
    size_t at = 0;
    const char *name = family_names[family];
    while (*name) out[at++] = *name++;
    out[at++] = '/';
    for (size_t i = 0; i < len && at + 3 < 128; i++) {
        out[at++] = digits[key[i] >> 4];
        out[at++] = digits[key[i] & 15];
    }
    out[at] = 0;
}

/* --- Envelope --------------------------------------------------------------------------- */

static uint64_t envelope_hash(const uint8_t *key, size_t key_len, const uint8_t head[8],
                              loci_slice payload) {
    XXH3_state_t state; /* aligned by its type */
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, key, key_len);
    XXH3_64bits_update(&state, head, 8);
    XXH3_64bits_update(&state, payload.data, payload.len);
    return XXH3_64bits_digest(&state);
}

static void put_u32(uint8_t *at, uint32_t value) {
    for (int i = 0; i < 4; i++) at[i] = (uint8_t)(value >> (8 * i));
}

static void seal_envelope(uint8_t head[LOCI_ENVELOPE_BYTES], const loci_key *key, uint32_t kind,
                          loci_slice payload) {
    put_u32(head, kind);
    put_u32(head + 4, RECORD_VERSION);
    uint64_t hash = envelope_hash(key->data, key->len, head, payload);
    put_u32(head + 8, (uint32_t)hash);
    put_u32(head + 12, (uint32_t)(hash >> 32));
}

static loci_status open_envelope(loci_family family, loci_slice key, loci_slice value,
                                 uint32_t kind, loci_slice *payload, loci_error *err) {
    char name[128];
    loci_reader reader = loci_reader_of(value);
    uint32_t found = loci_read_u32(&reader);
    uint32_t version = loci_read_u32(&reader);
    uint64_t hash = loci_read_u64(&reader);
    describe_key(family, key.data, key.len, name);
    if (reader.failed || found != kind)
        return loci_fail(err, LOCI_E_CORRUPT, "stored value %s is not of the expected kind", name);
    *payload = loci_slice_of(value.data + reader.at, value.len - reader.at);
    if (envelope_hash(key.data, key.len, value.data, *payload) != hash)
        return loci_fail(err, LOCI_E_CORRUPT, "stored value %s fails its checksum", name);
    if (version != RECORD_VERSION)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "stored value %s has version %u, known is %u",
                         name, version, RECORD_VERSION);
    return LOCI_OK;
}

/* --- Open and close --------------------------------------------------------------------- */

/* Takes ownership of *text, which RocksDB allocated. */
static loci_status translate(char *text, loci_error *err, const char *what) {
    loci_status status = LOCI_E_IO;
    if (strncmp(text, "Corruption", 10) == 0) status = LOCI_E_CORRUPT;
    loci_fail(err, status, "RocksDB: %s: %s", what, text);
    rocksdb_free(text);
    return status;
}

static void set_options(loci_rocks *rocks, uint64_t memory_bytes) {
    uint64_t buffers = memory_bytes / 4;
    rocks->cache = rocksdb_cache_create_lru((size_t)(memory_bytes / 8 * 5));
    rocks->table = rocksdb_block_based_options_create();
    rocksdb_block_based_options_set_block_cache(rocks->table, rocks->cache);
    rocksdb_block_based_options_set_checksum(rocks->table, 4); /* kXXH3 */
    rocksdb_block_based_options_set_cache_index_and_filter_blocks(rocks->table, 1);

    rocksdb_options_t *options = rocks->options = rocksdb_options_create();
    rocksdb_options_set_create_if_missing(options, 1);
    rocksdb_options_set_create_missing_column_families(options, 1);
    rocksdb_options_set_block_based_table_factory(options, rocks->table);
    rocksdb_options_set_compression(options, rocksdb_no_compression);
    rocksdb_options_set_paranoid_checks(options, 1);
    rocksdb_options_set_wal_recovery_mode(options, rocksdb_point_in_time_recovery);
    rocksdb_options_set_db_write_buffer_size(options, (size_t)buffers);
    rocksdb_options_set_write_buffer_size(options, (size_t)(buffers / 2));
    rocksdb_options_set_max_total_wal_size(options, buffers * 2);
    rocksdb_options_set_max_open_files(options, 256);
    rocksdb_options_set_max_background_jobs(options, 2);
    rocksdb_options_set_info_log_level(options, 2); /* warnings */
    rocksdb_options_set_max_log_file_size(options, 4u << 20);
    rocksdb_options_set_keep_log_file_num(options, 2);
    rocksdb_options_set_stats_dump_period_sec(options, 0);

    rocks->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(rocks->read, 1);
    rocks->write = rocksdb_writeoptions_create();
    rocks->write_sync = rocksdb_writeoptions_create();
    rocksdb_writeoptions_set_sync(rocks->write_sync, 1);
}

loci_status loci_rocks_open(const char *path, uint64_t memory_bytes, loci_rocks **out,
                            loci_error *err) {
    loci_rocks *rocks = calloc(1, sizeof *rocks);
    if (!rocks) return loci_fail(err, LOCI_E_NOMEM, "no memory for the database");
    set_options(rocks, memory_bytes);
    const rocksdb_options_t *family_options[LOCI_CF_COUNT];
    for (int i = 0; i < LOCI_CF_COUNT; i++) family_options[i] = rocks->options;
    char *text = NULL;
    rocks->db = rocksdb_open_column_families(rocks->options, path, LOCI_CF_COUNT, family_names,
                                             family_options, rocks->families, &text);
    if (text) {
        rocks->db = NULL;
        loci_status status = translate(text, err, "opening the database");
        loci_rocks_close(rocks);
        return status;
    }
    *out = rocks;
    return LOCI_OK;
}

void loci_rocks_close(loci_rocks *rocks) {
    if (!rocks) return;
    if (rocks->db) {
        for (int i = 0; i < LOCI_CF_COUNT; i++)
            rocksdb_column_family_handle_destroy(rocks->families[i]);
        rocksdb_close(rocks->db);
    }
    rocksdb_writeoptions_destroy(rocks->write_sync);
    rocksdb_writeoptions_destroy(rocks->write);
    rocksdb_readoptions_destroy(rocks->read);
    rocksdb_options_destroy(rocks->options);
    rocksdb_block_based_options_destroy(rocks->table);
    rocksdb_cache_destroy(rocks->cache);
    free(rocks);
}

loci_status loci_rocks_sync(loci_rocks *rocks, loci_error *err) {
    char *text = NULL;
    rocksdb_flush_wal(rocks->db, 1, &text);
    return text ? translate(text, err, "syncing the write-ahead log") : LOCI_OK;
}

/* --- Reads ------------------------------------------------------------------------------ */

loci_view *loci_view_open(loci_rocks *rocks) {
    loci_view *view = malloc(sizeof *view);
    LOCI_ASSERT(view); /* RocksDB itself aborts when it has no memory for a handle */
    view->rocks = rocks;
    view->snapshot = rocksdb_create_snapshot(rocks->db);
    view->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(view->read, 1);
    rocksdb_readoptions_set_snapshot(view->read, view->snapshot);
    return view;
}

void loci_view_close(loci_view *view) {
    if (!view) return;
    rocksdb_readoptions_destroy(view->read);
    rocksdb_release_snapshot(view->rocks->db, view->snapshot);
    free(view);
}

loci_status loci_rocks_pin(loci_rocks *rocks, const loci_view *view, loci_family family,
                           const loci_key *key, uint32_t kind, loci_value **out,
                           loci_slice *payload, loci_error *err) {
    char *text = NULL;
    rocksdb_pinnableslice_t *pinned =
        rocksdb_get_pinned_cf(rocks->db, view ? view->read : rocks->read, rocks->families[family],
                              (const char *)key->data, key->len, &text);
    char name[128];
    describe_key(family, key->data, key->len, name);
    if (text) return translate(text, err, name);
    if (!pinned) return loci_fail(err, LOCI_E_NOTFOUND, "there is no stored value %s", name);
    size_t len;
    const char *data = rocksdb_pinnableslice_value(pinned, &len);
    loci_status status = open_envelope(family, loci_slice_of(key->data, key->len),
                                       loci_slice_of(data, len), kind, payload, err);
    if (status != LOCI_OK) {
        rocksdb_pinnableslice_destroy(pinned);
        return status;
    }
    *out = (loci_value *)pinned;
    return LOCI_OK;
}

void loci_value_free(loci_value *value) {
    if (value) rocksdb_pinnableslice_destroy((rocksdb_pinnableslice_t *)value);
}

loci_status loci_rocks_get(loci_rocks *rocks, const loci_view *view, loci_family family,
                           const loci_key *key, uint32_t kind, loci_buf *out, loci_error *err) {
    loci_value *value = NULL;
    loci_slice payload = {0};
    LOCI_TRY(loci_rocks_pin(rocks, view, family, key, kind, &value, &payload, err));
    loci_buf_append(out, payload.data, payload.len);
    loci_value_free(value);
    if (out->failed) return loci_fail(err, LOCI_E_NOMEM, "no memory for a stored value");
    return LOCI_OK;
}

loci_scan *loci_scan_open(loci_rocks *rocks, const loci_view *view, loci_family family,
                          const loci_key *prefix, const loci_key *from) {
    loci_scan *scan = calloc(1, sizeof *scan);
    LOCI_ASSERT(scan);
    scan->rocks = rocks;
    scan->family = family;
    scan->prefix = *prefix;
    scan->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(scan->read, 1);
    rocksdb_readoptions_set_fill_cache(scan->read, 0);
    if (view) rocksdb_readoptions_set_snapshot(scan->read, view->snapshot);
    scan->iterator = rocksdb_create_iterator_cf(rocks->db, scan->read, rocks->families[family]);
    const loci_key *start = from ? from : prefix;
    rocksdb_iter_seek(scan->iterator, (const char *)start->data, start->len);
    return scan;
}

bool loci_scan_next(loci_scan *scan, loci_slice *key) {
    if (scan->started && rocksdb_iter_valid(scan->iterator)) rocksdb_iter_next(scan->iterator);
    scan->started = true;
    if (!rocksdb_iter_valid(scan->iterator)) return false;
    size_t len;
    const char *data = rocksdb_iter_key(scan->iterator, &len);
    if (len < scan->prefix.len || memcmp(data, scan->prefix.data, scan->prefix.len) != 0)
        return false;
    *key = loci_slice_of(data, len);
    return true;
}

loci_status loci_scan_payload(loci_scan *scan, uint32_t kind, loci_slice *payload,
                              loci_error *err) {
    size_t key_len, len;
    const char *key = rocksdb_iter_key(scan->iterator, &key_len);
    const char *data = rocksdb_iter_value(scan->iterator, &len);
    return open_envelope(scan->family, loci_slice_of(key, key_len), loci_slice_of(data, len), kind,
                         payload, err);
}

loci_status loci_scan_close(loci_scan *scan, loci_error *err) {
    if (!scan) return LOCI_OK;
    char *text = NULL;
    rocksdb_iter_get_error(scan->iterator, &text);
    loci_status status = LOCI_OK;
    if (text) status = translate(text, err, family_names[scan->family]);
    rocksdb_iter_destroy(scan->iterator);
    rocksdb_readoptions_destroy(scan->read);
    free(scan);
    return status;
}

/* --- Writes ----------------------------------------------------------------------------- */

loci_batch *loci_batch_create(loci_rocks *rocks) {
    loci_batch *batch = calloc(1, sizeof *batch);
    LOCI_ASSERT(batch);
    batch->rocks = rocks;
    batch->batch = rocksdb_writebatch_create();
    return batch;
}

void loci_batch_destroy(loci_batch *batch) {
    if (!batch) return;
    rocksdb_writebatch_destroy(batch->batch);
    free(batch);
}

void loci_batch_put(loci_batch *batch, loci_family family, const loci_key *key, uint32_t kind,
                    loci_slice payload) {
    uint8_t head[LOCI_ENVELOPE_BYTES];
    seal_envelope(head, key, kind, payload);
    const char *keys[1] = {(const char *)key->data};
    size_t key_lens[1] = {key->len};
    const char *values[2] = {(const char *)head, (const char *)payload.data};
    size_t lens[2] = {sizeof head, payload.len};
    rocksdb_writebatch_putv_cf(batch->batch, batch->rocks->families[family], 1, keys, key_lens,
                               payload.len ? 2 : 1, values, lens);
}

void loci_batch_delete(loci_batch *batch, loci_family family, const loci_key *key) {
    rocksdb_writebatch_delete_cf(batch->batch, batch->rocks->families[family],
                                 (const char *)key->data, key->len);
}

void loci_batch_delete_prefix(loci_batch *batch, loci_family family, const loci_key *prefix) {
    loci_key end = loci_key_after_prefix(prefix);
    LOCI_ASSERT(end.len > 0);
    rocksdb_writebatch_delete_range_cf(batch->batch, batch->rocks->families[family],
                                       (const char *)prefix->data, prefix->len,
                                       (const char *)end.data, end.len);
}

loci_status loci_batch_write(loci_batch *batch, bool sync, loci_error *err) {
    char *text = NULL;
    rocksdb_write(batch->rocks->db, sync ? batch->rocks->write_sync : batch->rocks->write,
                  batch->batch, &text);
    return text ? translate(text, err, "writing") : LOCI_OK;
}
