/* SPDX-License-Identifier: Apache-2.0
 *
 * Where should K and V of an extent live? The same real pair blobs are stored
 *   (a) as extent files, read through mmap, one leaf at a time, verified by the blob's own hashes;
 *   (b) as ingested SST values of one root's KV each (about 128 KiB), mmap reads, get_pinned;
 *   (c) as ingested SST values of one leaf's KV each (about 4 KiB), the same way.
 * RocksDB verifies its XXH3 block checksums in (b) and (c). Two access patterns: random leaves, and
 * whole roots; each hot, and cold after posix_fadvise(DONTNEED). One JSON line for each case:
 * leaves and useful bytes a second, bytes read from the device for each useful byte.
 *
 *   bench_store DIR [extents, default 8] [reads, default 20000]
 */
#include <fcntl.h>
#include <inttypes.h>
#include <rocksdb/c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "attention/index_layout.h"
#include "base/clock.h"
#include "base/pool.h"
#include "base/rng.h"

#define DIM 64u
#define TOKENS 32768u
#define PAIRS 6u
#define EXTENTS_MAX 64u

typedef enum layout { LAYOUT_MMAP, LAYOUT_MMAP_RANDOM, LAYOUT_SST_ROOT, LAYOUT_SST_LEAF } layout;

static const char *const layout_names[] = {"extent_mmap", "extent_mmap_random", "sst_root_128k",
                                           "sst_leaf_4k"};

typedef struct bench {
    const char *dir;
    unsigned extents, reads;
    loci_buf blobs[PAIRS];
    uint64_t at[PAIRS], file_bytes;
    const uint8_t *maps[EXTENTS_MAX];
    rocksdb_t *db;
    rocksdb_options_t *options;
    rocksdb_readoptions_t *read;
} bench;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void check(char *text) {
    if (!text) return;
    fprintf(stderr, "%s\n", text);
    exit(1);
}

static uint16_t bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Keys around 1,024 centres, as a trained model's are; values are noise. */
static void build_blobs(bench *b) {
    loci_pool *pool;
    loci_error err;
    if (loci_pool_create(0, &pool, &err) != LOCI_OK) die(err.text);
    uint16_t *k = malloc(TOKENS * DIM * 2), *v = malloc(TOKENS * DIM * 2);
    uint32_t *slots = malloc(TOKENS * sizeof *slots);
    if (!k || !v || !slots) die("malloc");
    for (uint32_t t = 0; t < TOKENS; t++) slots[t] = t / 256 << 16 | t % 256;
    for (uint32_t p = 0; p < PAIRS; p++) {
        uint64_t seed = p;
        for (size_t t = 0; t < TOKENS; t++) {
            uint64_t centre = loci_rng_next(&seed) % 1024;
            for (size_t c = 0; c < DIM; c++) {
                uint64_t where = centre * DIM + c, r = loci_rng_next(&seed);
                float mean = (float)(loci_rng_next(&where) % 2001) / 1000.0f - 1.0f;
                k[t * DIM + c] = bf16(mean + (float)(r % 1001) / 5000.0f);
                v[t * DIM + c] = bf16((float)(r >> 32 & 2047) / 1024.0f - 1.0f);
            }
        }
        loci_pair_build_options options = {.iterations = 3, .position_codes = p >= 4};
        uint64_t hash;
        if (loci_pair_build(k, v, slots, TOKENS, DIM, &options, pool, &b->blobs[p], &hash, &err) !=
            LOCI_OK)
            die(err.text);
        b->at[p] = b->file_bytes;
        b->file_bytes += b->blobs[p].len;
    }
    free(k);
    free(v);
    free(slots);
    loci_pool_destroy(pool);
}

/* --- Stores ----------------------------------------------------------------------------- */

static void path_of(const bench *b, const char *name, unsigned index, char out[512]) {
    snprintf(out, 512, "%s/%s-%u", b->dir, name, index);
}

static void write_extents(bench *b) {
    for (unsigned e = 0; e < b->extents; e++) {
        char path[512];
        path_of(b, "extent", e, path);
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (fd < 0) die(path);
        for (uint32_t p = 0; p < PAIRS; p++)
            if (write(fd, b->blobs[p].data, b->blobs[p].len) != (ssize_t)b->blobs[p].len) die(path);
        if (fsync(fd) != 0) die(path);
        close(fd);
    }
}

static void open_extents(bench *b, int advice) {
    for (unsigned e = 0; e < b->extents; e++) {
        char path[512];
        path_of(b, "extent", e, path);
        int fd = open(path, O_RDONLY);
        if (fd < 0) die(path);
        void *map = mmap(NULL, b->file_bytes, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        if (map == MAP_FAILED) die("mmap");
        madvise(map, b->file_bytes, advice);
        b->maps[e] = map;
    }
}

static void close_extents(bench *b) {
    for (unsigned e = 0; e < b->extents; e++) munmap((void *)(uintptr_t)b->maps[e], b->file_bytes);
}

static void make_key(uint8_t key[12], uint32_t extent, uint32_t pair, uint32_t node) {
    uint32_t parts[3] = {extent, pair, node};
    for (size_t i = 0; i < 12; i++) key[i] = (uint8_t)(parts[i / 4] >> (24 - 8 * (i % 4)));
}

static rocksdb_options_t *sst_options(rocksdb_block_based_table_options_t **table) {
    rocksdb_options_t *options = rocksdb_options_create();
    *table = rocksdb_block_based_options_create();
    rocksdb_block_based_options_set_checksum(*table, 4); /* kXXH3 */
    rocksdb_options_set_block_based_table_factory(options, *table);
    rocksdb_options_set_create_if_missing(options, 1);
    rocksdb_options_set_compression(options, rocksdb_no_compression);
    rocksdb_options_set_allow_mmap_reads(options, 1);
    rocksdb_options_set_disable_auto_compactions(options, 1);
    return options;
}

/* A leaf by its number. */
static const loci_leaf *leaf_of(const uint8_t *blob, uint32_t index) {
    uint32_t low = 0, high = loci_pair_header_of(blob)->roots;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (loci_pair_root(blob, middle)->begin <= index)
            low = middle;
        else
            high = middle;
    }
    const loci_root *root = loci_pair_root(blob, low);
    return loci_root_leaves(blob, root) + (index - root->begin);
}

/* KV bytes of a root or a leaf of a blob. */
static const uint8_t *node_kv(const uint8_t *blob, bool root, uint32_t index, size_t *bytes) {
    const loci_root *node = loci_pair_root(blob, root ? index : 0);
    const loci_leaf *leaf = root ? loci_root_leaves(blob, node) : leaf_of(blob, index);
    uint32_t tokens = root ? node->tokens : leaf->count;
    *bytes = (size_t)tokens * 4 * DIM;
    return loci_slot_kv(blob, leaf->begin);
}

static void write_ssts(bench *b, bool root) {
    const char *name = root ? "root" : "leaf";
    char *text = NULL, path[512], db_path[512];
    path_of(b, name, 0, db_path);
    rocksdb_block_based_table_options_t *table;
    rocksdb_options_t *options = sst_options(&table);
    rocksdb_t *db = rocksdb_open(options, db_path, &text);
    check(text);
    rocksdb_envoptions_t *env = rocksdb_envoptions_create();
    rocksdb_ingestexternalfileoptions_t *ingest = rocksdb_ingestexternalfileoptions_create();
    rocksdb_ingestexternalfileoptions_set_move_files(ingest, 1);
    for (unsigned e = 0; e < b->extents; e++) {
        path_of(b, "sst", e, path);
        rocksdb_sstfilewriter_t *writer = rocksdb_sstfilewriter_create(env, options);
        rocksdb_sstfilewriter_open(writer, path, &text);
        check(text);
        for (uint32_t p = 0; p < PAIRS; p++) {
            const uint8_t *blob = b->blobs[p].data;
            const loci_pair_header *header = loci_pair_header_of(blob);
            for (uint32_t n = 0; n < (root ? header->roots : header->leaves); n++) {
                uint8_t key[12];
                size_t bytes;
                const uint8_t *kv = node_kv(blob, root, n, &bytes);
                make_key(key, e, p, n);
                rocksdb_sstfilewriter_put(writer, (char *)key, sizeof key, (const char *)kv, bytes,
                                          &text);
                check(text);
            }
        }
        rocksdb_sstfilewriter_finish(writer, &text);
        check(text);
        rocksdb_sstfilewriter_destroy(writer);
        const char *files[1] = {path};
        rocksdb_ingest_external_file(db, files, 1, ingest, &text);
        check(text);
    }
    rocksdb_ingestexternalfileoptions_destroy(ingest);
    rocksdb_envoptions_destroy(env);
    rocksdb_close(db);
    rocksdb_options_destroy(options);
    rocksdb_block_based_options_destroy(table);
}

static void open_db(bench *b, bool root) {
    char *text = NULL, path[512];
    rocksdb_block_based_table_options_t *table;
    path_of(b, root ? "root" : "leaf", 0, path);
    b->options = sst_options(&table);
    b->db = rocksdb_open(b->options, path, &text);
    check(text);
    rocksdb_block_based_options_destroy(table);
    b->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(b->read, 1);
}

static void close_db(bench *b) {
    rocksdb_readoptions_destroy(b->read);
    rocksdb_close(b->db);
    rocksdb_options_destroy(b->options);
}

/* --- Measuring -------------------------------------------------------------------------- */

static uint64_t device_bytes(void) {
    FILE *file = fopen("/proc/self/io", "r");
    char line[128];
    uint64_t bytes = 0;
    while (file && fgets(line, sizeof line, file)) sscanf(line, "read_bytes: %" SCNu64, &bytes);
    if (file) fclose(file);
    return bytes;
}

/* Drops the store's files from the page cache. The host below a virtual machine may keep them. */
static void make_cold(const bench *b) {
    char command[1024];
    snprintf(command, sizeof command,
             "find '%s' -type f -exec dd of={} oflag=nocache conv=notrunc,fdatasync count=0 "
             "status=none \\;",
             b->dir);
    if (system(command) != 0) fprintf(stderr, "cannot drop the page cache\n");
}

static uint64_t sum_of(const uint8_t *data, size_t bytes) {
    uint64_t sum = 0, word;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        memcpy(&word, data + i, sizeof word);
        sum += word;
    }
    return sum;
}

static uint64_t read_mmap(const bench *b, uint32_t extent, uint32_t pair, uint32_t leaf_index,
                          size_t *bytes) {
    const uint8_t *blob = b->maps[extent] + b->at[pair];
    const loci_leaf *leaf = leaf_of(blob, leaf_index);
    for (uint32_t i = 0; i < leaf->count; i++)
        if (!loci_slot_check_kv(blob, leaf->begin + i)) die("KV");
    const uint8_t *kv = node_kv(blob, false, leaf_index, bytes);
    return sum_of(kv, *bytes);
}

/* One pinned value; of a root's value only the wanted part is summed. */
static uint64_t read_db(const bench *b, uint32_t extent, uint32_t pair, uint32_t node, size_t from,
                        size_t bytes) {
    uint8_t key[12];
    char *text = NULL;
    make_key(key, extent, pair, node);
    rocksdb_pinnableslice_t *value =
        rocksdb_get_pinned(b->db, b->read, (char *)key, sizeof key, &text);
    check(text);
    size_t len;
    const char *data = rocksdb_pinnableslice_value(value, &len);
    if (!data || from + bytes > len) die("value");
    uint64_t sum = sum_of((const uint8_t *)data + from, bytes);
    rocksdb_pinnableslice_destroy(value);
    return sum;
}

static uint64_t read_leaves(const bench *b, layout how, uint32_t extent, uint32_t pair,
                            uint32_t root_index, uint32_t first, uint32_t count, size_t *useful) {
    const uint8_t *blob = b->blobs[pair].data; /* in memory: which leaf belongs to which root */
    const loci_root *root = loci_pair_root(blob, root_index);
    uint64_t sum = 0;
    size_t from, bytes;
    const uint8_t *root_kv = node_kv(blob, true, root_index, &bytes);
    if (how == LAYOUT_SST_ROOT) {
        const uint8_t *kv = node_kv(blob, false, root->begin + first, &from);
        if (count == 1) bytes = from;
        from = count == 1 ? (size_t)(kv - root_kv) : 0;
        *useful += bytes;
        return read_db(b, extent, pair, root_index, from, bytes);
    }
    for (uint32_t i = first; i < first + count; i++) {
        if (how == LAYOUT_SST_LEAF) {
            node_kv(blob, false, root->begin + i, &bytes);
            sum += read_db(b, extent, pair, root->begin + i, 0, bytes);
        } else {
            sum += read_mmap(b, extent, pair, root->begin + i, &bytes);
        }
        *useful += bytes;
    }
    return sum;
}

static void measure(bench *b, layout how, bool cold, bool whole_roots) {
    if (cold) make_cold(b);
    if (how == LAYOUT_MMAP || how == LAYOUT_MMAP_RANDOM)
        open_extents(b, how == LAYOUT_MMAP_RANDOM ? MADV_RANDOM : MADV_NORMAL);
    else
        open_db(b, how == LAYOUT_SST_ROOT);
    uint64_t sum = 0, leaves = 0, begin = 0, device = 0;
    size_t useful = 0;
    unsigned reads = whole_roots ? b->reads / 32 : b->reads;
    for (int pass = cold ? 1 : 0; pass < 2; pass++) { /* the first pass warms */
        uint64_t seed = 42;
        useful = 0;
        leaves = 0;
        begin = loci_now_ns();
        device = device_bytes();
        for (unsigned i = 0; i < reads; i++) {
            uint32_t extent = (uint32_t)(loci_rng_next(&seed) % b->extents);
            uint32_t pair = (uint32_t)(loci_rng_next(&seed) % PAIRS);
            const uint8_t *blob = b->blobs[pair].data;
            uint32_t root = (uint32_t)(loci_rng_next(&seed) % loci_pair_header_of(blob)->roots);
            uint32_t inside = loci_pair_root(blob, root)->count;
            uint32_t first = whole_roots ? 0 : (uint32_t)(loci_rng_next(&seed) % inside);
            uint32_t count = whole_roots ? inside : 1;
            sum += read_leaves(b, how, extent, pair, root, first, count, &useful);
            leaves += count;
        }
    }
    double seconds = (double)(loci_now_ns() - begin) / 1e9;
    device = device_bytes() - device;
    printf("{\"bench\":\"store\",\"layout\":\"%s\",\"pattern\":\"%s\",\"cache\":\"%s\","
           "\"store_mib\":%" PRIu64 ",\"leaves\":%" PRIu64 ",\"leaves_per_s\":%.0f,"
           "\"useful_mb_per_s\":%.0f,\"device_bytes_per_useful_byte\":%.2f,\"sum\":%" PRIu64 "}\n",
           layout_names[how], whole_roots ? "root" : "leaf", cold ? "cold" : "hot",
           b->extents * b->file_bytes >> 20, leaves, (double)leaves / seconds,
           (double)useful / 1e6 / seconds, (double)device / (double)useful, sum & 0xffff);
    fflush(stdout);
    if (how == LAYOUT_MMAP || how == LAYOUT_MMAP_RANDOM)
        close_extents(b);
    else
        close_db(b);
}

int main(int argc, char **argv) {
    bench b = {.dir = argc > 1 ? argv[1] : NULL, .extents = 8, .reads = 20000};
    if (argc > 2) b.extents = (unsigned)strtoul(argv[2], NULL, 10);
    if (argc > 3) b.reads = (unsigned)strtoul(argv[3], NULL, 10);
    if (!b.dir || b.extents == 0 || b.extents > EXTENTS_MAX) {
        fprintf(stderr, "usage: bench_store DIR [extents 1-%u] [reads]\n", EXTENTS_MAX);
        return 2;
    }
    mkdir(b.dir, 0777);
    build_blobs(&b);
    write_extents(&b);
    write_ssts(&b, true);
    write_ssts(&b, false);
    for (int roots = 0; roots < 2; roots++)
        for (int cold = 0; cold < 2; cold++)
            for (int how = LAYOUT_MMAP; how <= LAYOUT_SST_LEAF; how++)
                measure(&b, (layout)how, cold != 0, roots != 0);
    for (uint32_t p = 0; p < PAIRS; p++) loci_buf_fini(&b.blobs[p]);
    return 0;
}
