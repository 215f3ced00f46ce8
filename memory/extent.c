/* SPDX-License-Identifier: Apache-2.0
 *
 * Extent files; see extent.h and FORMAT.md section 4.
 *
 *   header | pair directory | segment table | pair blobs
 *
 * The file is written blob by blob, so that one pair's index is in memory at a time, or that and
 * the keys of the next where these are clustered meanwhile (attention/index.h); the header comes
 * last. Its hash, kept in the manifest, is the root of the hash tree over the file.
 */
#include "memory/extent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY /* the state on the stack; its size is fixed since 0.8 */
#include <xxhash.h>

#include "base/failpoint.h"

#define MAGIC "LOCIEXT1"
#define FIXED_BYTES 128u
#define DIRECTORY_ENTRY_BYTES 24u
#define SEGMENT_BYTES 40u
#define PATH_BYTES 4096u

static uint64_t align_up(uint64_t value) {
    return (value + LOCI_BLOCK_ALIGN - 1) / LOCI_BLOCK_ALIGN * LOCI_BLOCK_ALIGN;
}

static uint32_t header_bytes_of(uint32_t pairs) {
    return FIXED_BYTES + pairs * DIRECTORY_ENTRY_BYTES;
}

/* --- Identity --------------------------------------------------------------------------- */

void loci_extent_identify(const loci_builder *builder, uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    XXH3_state_t state;
    XXH3_128bits_reset(&state);
    uint8_t head[4] = {LOCI_LAYOUT_VERSION & 0xff, 0, 0, builder->geometry.kv_int8};
    XXH3_128bits_update(&state, head, sizeof head);
    XXH3_128bits_update(&state, builder->geometry.fingerprint, LOCI_FINGERPRINT_LEN);
    for (uint32_t i = 0; i < builder->segment_count; i++) {
        const loci_built_segment *segment = &builder->segments[i];
        uint8_t range[16];
        for (int b = 0; b < 8; b++) {
            range[b] = (uint8_t)(segment->start >> (8 * b));
            range[8 + b] = (uint8_t)(segment->end >> (8 * b));
        }
        XXH3_128bits_update(&state, segment->content, sizeof segment->content);
        XXH3_128bits_update(&state, range, sizeof range);
    }
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state));
    memcpy(id, canonical.digest, LOCI_EXTENT_ID_BYTES);
}

void loci_extent_name(const uint8_t id[LOCI_EXTENT_ID_BYTES], char name[LOCI_EXTENT_NAME_BYTES]) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < LOCI_EXTENT_ID_BYTES; i++) {
        name[2 * i] = digits[id[i] >> 4];
        name[2 * i + 1] = digits[id[i] & 15];
    }
    name[2 * LOCI_EXTENT_ID_BYTES] = 0;
}

/* --- Writing ---------------------------------------------------------------------------- */

static loci_status fail_io(loci_error *err, const char *what, const char *path) {
    return loci_fail(err, LOCI_E_IO, "%s %s: %s", what, path, strerror(errno));
}

static loci_status write_at(int fd, const char *path, const void *data, size_t len, uint64_t at,
                            loci_error *err) {
    const uint8_t *bytes = data;
    while (len > 0) {
        ssize_t written = pwrite(fd, bytes, len, (off_t)at);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return fail_io(err, "cannot write", path);
        bytes += written;
        at += (uint64_t)written;
        len -= (size_t)written;
    }
    return LOCI_OK;
}

static void encode_segments(const loci_builder *builder, loci_buf *out) {
    for (uint32_t i = 0; i < builder->segment_count; i++) {
        const loci_built_segment *segment = &builder->segments[i];
        loci_buf_append(out, segment->content, sizeof segment->content);
        loci_buf_u64(out, segment->start);
        loci_buf_u64(out, segment->end);
        loci_buf_u32(out, segment->tokens);
        loci_buf_u32(out, 0);
    }
}

static loci_status slots_of_positions(const loci_builder *builder, uint32_t **out,
                                      loci_error *err) {
    uint32_t *slots = malloc(builder->tokens * sizeof *slots);
    if (!slots) return loci_fail(err, LOCI_E_NOMEM, "no memory for a slot map");
    uint32_t at = 0;
    for (uint32_t s = 0; s < builder->segment_count; s++)
        for (uint32_t i = 0; i < builder->segments[s].tokens; i++) slots[at++] = s << 16 | i;
    *out = slots;
    return LOCI_OK;
}

/* What an extent is written of, and with. */
typedef struct extent_parts {
    const loci_builder *builder;
    loci_pair_source source;
    loci_backend *backend; /* NULL: the CPU clusters */
    struct loci_pool *pool;
    const loci_cancel *cancel;
} extent_parts;

/* An extent's pairs on their way into its file. */
typedef struct pair_writer {
    const extent_parts *parts;
    int fd;
    const char *path;
    uint32_t *slots;
    loci_buf *directory;
    uint64_t *end;
} pair_writer;

static loci_status read_pair(void *ctx, uint32_t pair, loci_pair_rows *rows,
                             loci_pair_build_options *options, loci_error *err) {
    const pair_writer *writer = ctx;
    const extent_parts *parts = writer->parts;
    const loci_geometry *geometry = &parts->builder->geometry;
    loci_status status = loci_cancel_check(parts->cancel);
    if (status != LOCI_OK)
        return loci_fail(err, status, "building extent %s was stopped", writer->path);
    options->position_codes = pair / geometry->kv_heads == geometry->ranking_layer;
    options->kv_int8 = geometry->kv_int8;
    options->cancel = parts->cancel;
    options->backend = parts->backend;
    rows->slots = writer->slots;
    rows->tokens = parts->builder->tokens;
    rows->head_dim = geometry->head_dim;
    return parts->source.read(parts->source.ctx, pair, &rows->k, &rows->v, err);
}

/* Writes a blob from *end on, and its directory entry. */
static loci_status put_pair(void *ctx, uint32_t pair, loci_slice blob, uint64_t header_hash,
                            loci_error *err) {
    const pair_writer *writer = ctx;
    uint64_t at = align_up(*writer->end);
    (void)pair;
    LOCI_TRY(write_at(writer->fd, writer->path, blob.data, blob.len, at, err));
    /* On its way already: one long fsync in the end would hold up the commits of others. It tells
     * of errors. */
    (void)sync_file_range(writer->fd, (off_t)at, (off_t)blob.len, SYNC_FILE_RANGE_WRITE);
    LOCI_FAILPOINT("extent_write");
    loci_buf_u64(writer->directory, at);
    loci_buf_u64(writer->directory, blob.len);
    loci_buf_u64(writer->directory, header_hash);
    *writer->end = at + blob.len;
    return LOCI_OK;
}

/* Writes all pair blobs from *end on, appending their directory entries. */
static loci_status write_pairs(int fd, const char *path, const extent_parts *parts,
                               loci_buf *directory, uint64_t *end, loci_error *err) {
    pair_writer writer = {parts, fd, path, NULL, directory, end};
    LOCI_TRY(slots_of_positions(parts->builder, &writer.slots, err));
    loci_pair_work work = {&writer, read_pair, put_pair};
    loci_status status = loci_pairs_build(&work, parts->builder->pairs,
                                          loci_pairs_ahead(parts->backend, parts->builder->tokens),
                                          parts->pool, err);
    free(writer.slots);
    return status;
}

static void encode_header(const loci_builder *builder, const loci_manifest_extent *extent,
                          uint64_t segments_at, uint64_t hash_segments, loci_buf *out) {
    const loci_geometry *geometry = &builder->geometry;
    loci_buf_append(out, MAGIC, 8);
    loci_buf_u32(out, LOCI_LAYOUT_VERSION);
    loci_buf_u32(out, header_bytes_of(builder->pairs));
    loci_buf_append(out, geometry->fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_append(out, extent->id, sizeof extent->id);
    loci_buf_u64(out, extent->file_bytes);
    loci_buf_u32(out, geometry->retrieval_layers);
    loci_buf_u32(out, geometry->kv_heads);
    loci_buf_u32(out, geometry->head_dim);
    loci_buf_u32(out, geometry->ranking_layer);
    loci_buf_u32(out, builder->tokens);
    loci_buf_u32(out, builder->segment_count);
    loci_buf_u64(out, 0);
    loci_buf_u64(out, segments_at);
    loci_buf_u64(out, hash_segments);
    loci_buf_u64(out, 0);
}

static loci_status write_file(int fd, const char *path, const extent_parts *parts,
                              loci_manifest_extent *out, loci_error *err) {
    const loci_builder *builder = parts->builder;
    loci_buf head = LOCI_BUF_INIT, directory = LOCI_BUF_INIT, table = LOCI_BUF_INIT;
    uint64_t segments_at = align_up(header_bytes_of(builder->pairs));
    loci_status status = LOCI_OK;
    encode_segments(builder, &table);
    uint64_t end = segments_at + table.len;
    LOCI_TRY_GOTO(write_pairs(fd, path, parts, &directory, &end, err), out);
    out->file_bytes = align_up(end);
    encode_header(builder, out, segments_at, table.failed ? 0 : XXH3_64bits(table.data, table.len),
                  &head);
    loci_buf_append(&head, directory.data, directory.len);
    if (head.failed || directory.failed || table.failed) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for the header of %s", path);
        goto out;
    }
    LOCI_ASSERT(head.len == header_bytes_of(builder->pairs));
    out->header_hash = XXH3_64bits(head.data, head.len);
    LOCI_TRY_GOTO(write_at(fd, path, table.data, table.len, segments_at, err), out);
    LOCI_TRY_GOTO(write_at(fd, path, head.data, head.len, 0, err), out);
    if (ftruncate(fd, (off_t)out->file_bytes) != 0) {
        status = fail_io(err, "cannot extend", path);
        goto out;
    }
    LOCI_FAILPOINT("extent_fsync");
    if (fsync(fd) != 0) status = fail_io(err, "cannot fsync", path);
    LOCI_FAILPOINT("extent_fsync");
out:
    loci_buf_fini(&head);
    loci_buf_fini(&directory);
    loci_buf_fini(&table);
    return status;
}

static loci_status sync_directory(const char *path, loci_error *err) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail_io(err, "cannot open directory", path);
    int result = fsync(fd);
    close(fd);
    return result == 0 ? LOCI_OK : fail_io(err, "cannot fsync directory", path);
}

/* Makes dir when it is missing; its entry in the parent must be on disk too. */
static loci_status make_directory(const char *dir, loci_error *err) {
    if (mkdir(dir, 0777) != 0) {
        if (errno == EEXIST) return LOCI_OK;
        return fail_io(err, "cannot make directory", dir);
    }
    char parent[PATH_BYTES];
    snprintf(parent, sizeof parent, "%s/..", dir);
    return sync_directory(parent, err);
}

loci_status loci_extent_write(const char *dir, const loci_builder *builder, loci_pair_source source,
                              loci_backend *backend, struct loci_pool *pool,
                              const loci_cancel *cancel, loci_manifest_extent *out,
                              loci_error *err) {
    static atomic_uint files; /* the same extent may be written by two threads at a time */
    extent_parts parts = {builder, source, backend, pool, cancel};
    LOCI_ASSERT(builder->tokens > 0);
    memset(out, 0, sizeof *out);
    loci_extent_identify(builder, out->id);
    out->tokens = builder->tokens;
    out->segments = builder->segment_count;
    char name[LOCI_EXTENT_NAME_BYTES], path[PATH_BYTES], temporary[PATH_BYTES];
    loci_extent_name(out->id, name);
    int len = snprintf(temporary, sizeof temporary, "%s/%s.%u.tmp", dir, name,
                       atomic_fetch_add(&files, 1));
    if (len < 0 || (size_t)len >= sizeof temporary)
        return loci_fail(err, LOCI_E_INVAL, "the path of extent %s is too long", name);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    LOCI_TRY(make_directory(dir, err));
    int fd = open(temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail_io(err, "cannot create", temporary);
    loci_status status = write_file(fd, temporary, &parts, out, err);
    if (close(fd) != 0 && status == LOCI_OK) status = fail_io(err, "cannot close", temporary);
    if (status == LOCI_OK) {
        LOCI_FAILPOINT("extent_rename");
        if (rename(temporary, path) != 0) status = fail_io(err, "cannot rename", temporary);
        LOCI_FAILPOINT("extent_rename");
    }
    if (status != LOCI_OK) {
        unlink(temporary);
        return status;
    }
    return sync_directory(dir, err);
}

/* --- Opening ---------------------------------------------------------------------------- */

static loci_status map_file(const char *path, loci_extent *extent, uint64_t expected,
                            loci_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        if (errno != ENOENT) return fail_io(err, "cannot open extent", path);
        return loci_fail(err, LOCI_E_CORRUPT, "extent %s is missing", path);
    }
    struct stat info;
    loci_status status = LOCI_OK;
    if (fstat(fd, &info) != 0) {
        status = fail_io(err, "cannot stat extent", path);
    } else if (info.st_size <= 0 || (uint64_t)info.st_size != expected) {
        status = loci_fail(err, LOCI_E_CORRUPT, "extent %s has %lld bytes, its manifest says %llu",
                           path, (long long)info.st_size, (unsigned long long)expected);
    } else {
        status = loci_mapping_open(fd, expected, path, &extent->mapping, err);
        if (status == LOCI_OK) {
            extent->map = loci_mapping_data(extent->mapping);
            extent->bytes = expected;
        }
    }
    close(fd);
    return status;
}

/* Everything in the fixed part but the sections' places, which check_directory does. */
static loci_status check_header(loci_extent *extent, const char *path,
                                const loci_geometry *geometry, const loci_manifest_extent *expected,
                                uint64_t *segments_at, uint64_t *hash_segments, loci_error *err) {
    uint32_t header_bytes = header_bytes_of(extent->pairs);
    if (extent->bytes < header_bytes || memcmp(extent->map, MAGIC, 8) != 0)
        return loci_fail(err, LOCI_E_CORRUPT, "extent %s is not an extent file", path);
    loci_reader reader = loci_reader_of(loci_slice_of(extent->map, header_bytes));
    reader.at = 8;
    uint32_t version = loci_read_u32(&reader);
    if (version > LOCI_LAYOUT_VERSION)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "LAYOUT_TOO_NEW",
                                "extent %s has layout %u, known is %u", path, version,
                                LOCI_LAYOUT_VERSION);
    if (version < LOCI_LAYOUT_VERSION)
        return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "LAYOUT_TOO_OLD",
                                "extent %s has layout %u, this program reads %u", path, version,
                                LOCI_LAYOUT_VERSION);
    if (XXH3_64bits(extent->map, header_bytes) != expected->header_hash)
        return loci_fail(err, LOCI_E_CORRUPT, "the header of extent %s fails its checksum", path);
    uint32_t stated_bytes = loci_read_u32(&reader);
    const uint8_t *fingerprint = reader.data + reader.at;
    const uint8_t *id = fingerprint + LOCI_FINGERPRINT_LEN;
    reader.at += LOCI_FINGERPRINT_LEN + LOCI_EXTENT_ID_BYTES;
    uint64_t file_bytes = loci_read_u64(&reader);
    if (memcmp(fingerprint, geometry->fingerprint, LOCI_FINGERPRINT_LEN) != 0)
        return loci_fail_reason(err, LOCI_E_PRECONDITION, "MODEL_MISMATCH",
                                "extent %s was made by model %.*s, its corpus is of %s", path,
                                (int)LOCI_FINGERPRINT_LEN, (const char *)fingerprint,
                                geometry->fingerprint);
    bool good = stated_bytes == header_bytes && file_bytes == extent->bytes &&
                memcmp(id, expected->id, sizeof expected->id) == 0;
    good = loci_read_u32(&reader) == geometry->retrieval_layers && good;
    good = loci_read_u32(&reader) == geometry->kv_heads && good;
    good = loci_read_u32(&reader) == geometry->head_dim && good;
    good = loci_read_u32(&reader) == geometry->ranking_layer && good;
    good = loci_read_u32(&reader) == expected->tokens && good;
    good = loci_read_u32(&reader) == expected->segments && good;
    loci_read_u64(&reader);
    *segments_at = loci_read_u64(&reader);
    *hash_segments = loci_read_u64(&reader);
    if (!good)
        return loci_fail(err, LOCI_E_CORRUPT, "the header of extent %s contradicts its manifest",
                         path);
    return LOCI_OK;
}

static loci_status check_segments(loci_extent *extent, const char *path, uint64_t at, uint64_t hash,
                                  loci_error *err) {
    uint64_t len = (uint64_t)extent->segments * SEGMENT_BYTES;
    if (at % LOCI_BLOCK_ALIGN != 0 || at > extent->bytes || len > extent->bytes - at ||
        XXH3_64bits(extent->map + at, (size_t)len) != hash)
        return loci_fail(err, LOCI_E_CORRUPT, "the segment table of extent %s fails its checksum",
                         path);
    extent->table = extent->map + at;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < extent->segments; i++) {
        extent->segment_begin[i] = (uint32_t)tokens;
        loci_extent_segment segment = loci_extent_segment_at(extent, i);
        tokens += segment.tokens;
        if (segment.tokens == 0 || segment.end < segment.start || tokens > extent->tokens)
            return loci_fail(err, LOCI_E_CORRUPT, "segment %u of extent %s is out of range", i,
                             path);
    }
    extent->segment_begin[extent->segments] = (uint32_t)tokens;
    if (tokens != extent->tokens)
        return loci_fail(err, LOCI_E_CORRUPT, "the segments of extent %s have %llu of %u tokens",
                         path, (unsigned long long)tokens, extent->tokens);
    return LOCI_OK;
}

static loci_status check_pairs(loci_extent *extent, const char *path, loci_error *err) {
    loci_reader reader = loci_reader_of(loci_slice_of(extent->map, header_bytes_of(extent->pairs)));
    reader.at = FIXED_BYTES;
    for (uint32_t p = 0; p < extent->pairs; p++) {
        uint64_t at = extent->pair_at[p] = loci_read_u64(&reader);
        uint64_t len = extent->pair_bytes[p] = loci_read_u64(&reader);
        extent->pair_hash[p] = loci_read_u64(&reader);
        if (at % LOCI_BLOCK_ALIGN != 0 || at > extent->bytes || len > extent->bytes - at ||
            len < sizeof(loci_pair_header))
            return loci_fail(err, LOCI_E_CORRUPT, "pair %u of extent %s is out of range", p, path);
        loci_status status = loci_pair_open_check(extent->map + at, len, extent->pair_hash[p], err);
        if (status != LOCI_OK)
            return loci_fail_prefix(err, status, "pair %u of extent %s", p, path);
        const loci_pair_header *header = (const void *)(extent->map + at);
        if (header->tokens != extent->tokens || header->head_dim != extent->head_dim ||
            (header->kv_dtype == LOCI_I8) != extent->kv_int8)
            return loci_fail(err, LOCI_E_CORRUPT, "pair %u of extent %s has another shape", p,
                             path);
    }
    return LOCI_OK;
}

static loci_status open_mapped(loci_extent *extent, const char *path, const loci_geometry *geometry,
                               const loci_manifest_extent *expected, loci_error *err) {
    uint64_t segments_at = 0, hash_segments = 0;
    LOCI_TRY(map_file(path, extent, expected->file_bytes, err));
    LOCI_TRY(check_header(extent, path, geometry, expected, &segments_at, &hash_segments, err));
    extent->pair_at = calloc(extent->pairs, sizeof *extent->pair_at);
    extent->pair_bytes = calloc(extent->pairs, sizeof *extent->pair_bytes);
    extent->pair_hash = calloc(extent->pairs, sizeof *extent->pair_hash);
    extent->segment_begin = calloc(extent->segments + 1u, sizeof *extent->segment_begin);
    if (!extent->pair_at || !extent->pair_bytes || !extent->pair_hash || !extent->segment_begin)
        return loci_fail(err, LOCI_E_NOMEM, "no memory to open extent %s", path);
    LOCI_TRY(check_segments(extent, path, segments_at, hash_segments, err));
    LOCI_TRY(check_pairs(extent, path, err));
    return extent->backend->ops->wrap(extent->backend, extent->map, (size_t)extent->bytes,
                                      &extent->buffer, err);
}

loci_status loci_extent_check(const loci_extent *extent, loci_error *err) {
    return loci_mapping_check(extent->mapping, err);
}

/* What could not be read explains whatever was found wrong in it. */
static loci_status what_was_read(const loci_extent *extent, loci_status status, loci_error *err) {
    if (extent->mapping) LOCI_TRY(loci_extent_check(extent, err));
    return status;
}

loci_status loci_extent_open(const char *dir, const loci_geometry *geometry,
                             const loci_manifest_extent *expected, loci_backend *backend,
                             loci_extent **out, loci_error *err) {
    loci_extent *extent = calloc(1, sizeof *extent);
    if (!extent) return loci_fail(err, LOCI_E_NOMEM, "no memory to open an extent");
    atomic_init(&extent->refs, 1);
    memcpy(extent->id, expected->id, sizeof extent->id);
    loci_extent_name(extent->id, extent->name);
    extent->backend = backend;
    extent->header_hash = expected->header_hash;
    extent->tokens = expected->tokens;
    extent->segments = expected->segments;
    extent->pairs = geometry->retrieval_layers * geometry->kv_heads;
    extent->head_dim = geometry->head_dim;
    extent->kv_int8 = geometry->kv_int8;
    char path[PATH_BYTES];
    int len = snprintf(path, sizeof path, "%s/%s", dir, extent->name);
    loci_status status = LOCI_E_INVAL;
    if (len > 0 && (size_t)len < sizeof path)
        status = what_was_read(extent, open_mapped(extent, path, geometry, expected, err), err);
    else
        loci_fail(err, status, "the path of extent %s is too long", extent->name);
    if (status != LOCI_OK) {
        loci_extent_unref(extent);
        return status;
    }
    *out = extent;
    return LOCI_OK;
}

bool loci_extent_outdated(const char *dir, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    char name[LOCI_EXTENT_NAME_BYTES], path[PATH_BYTES];
    uint8_t head[12];
    loci_extent_name(id, name);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    bool whole = pread(fd, head, sizeof head, 0) == (ssize_t)sizeof head;
    close(fd);
    if (!whole || memcmp(head, MAGIC, 8) != 0) return false;
    loci_reader reader = loci_reader_of(loci_slice_of(head + 8, 4));
    return loci_read_u32(&reader) < LOCI_LAYOUT_VERSION;
}

loci_extent *loci_extent_ref(loci_extent *extent) {
    atomic_fetch_add(&extent->refs, 1);
    return extent;
}

void loci_extent_unref(loci_extent *extent) {
    if (!extent || atomic_fetch_sub(&extent->refs, 1) != 1) return;
    if (extent->buffer) extent->backend->ops->free(extent->backend, extent->buffer);
    loci_mapping_close(extent->mapping);
    free(extent->pair_at);
    free(extent->pair_bytes);
    free(extent->pair_hash);
    free(extent->segment_begin);
    loci_extent_dead_unref(extent->dead);
    free(extent);
}

/* --- Reading ---------------------------------------------------------------------------- */

loci_extent_segment loci_extent_segment_at(const loci_extent *extent, uint32_t segment) {
    LOCI_ASSERT(segment < extent->segments);
    const uint8_t *entry = extent->table + (size_t)segment * SEGMENT_BYTES;
    loci_reader reader = loci_reader_of(loci_slice_of(entry, SEGMENT_BYTES));
    reader.at = LOCI_CONTENT_HASH_BYTES;
    loci_extent_segment out = {.content = entry};
    out.start = loci_read_u64(&reader);
    out.end = loci_read_u64(&reader);
    out.tokens = loci_read_u32(&reader);
    return out;
}

loci_status loci_extent_read_pair(const loci_extent *extent, uint32_t pair, struct loci_pool *pool,
                                  uint16_t *k, uint16_t *v, loci_error *err) {
    loci_status status =
        loci_pair_read_positions(extent->map + extent->pair_at[pair], extent->pair_bytes[pair],
                                 extent->segment_begin, extent->segments, pool, k, v, err);
    LOCI_TRY(loci_extent_check(extent, err));
    if (status != LOCI_OK)
        return loci_fail_prefix(err, status, "pair %u of extent %s", pair, extent->name);
    return LOCI_OK;
}

void loci_extent_dead_unref(loci_extent_dead *dead) {
    if (!dead || atomic_fetch_sub(&dead->refs, 1) != 1) return;
    free(dead->live);
    free(dead);
}

static loci_status fill_bitmaps(const loci_extent *extent, loci_extent_dead *dead,
                                loci_error *err) {
    size_t words = (extent->tokens + 63u) / 64u;
    uint64_t *bitmap = (uint64_t *)(void *)(dead->live + extent->pairs);
    for (uint32_t p = 0; p < extent->pairs; p++, bitmap += words) {
        dead->live[p] = bitmap;
        loci_status status = loci_pair_live(extent->map + extent->pair_at[p], extent->pair_bytes[p],
                                            dead->segments, extent->segments, bitmap, err);
        LOCI_TRY(loci_extent_check(extent, err));
        if (status != LOCI_OK)
            return loci_fail_prefix(err, status, "pair %u of extent %s", p, extent->name);
    }
    return LOCI_OK;
}

void loci_extent_let_go(loci_extent *extent) {
    loci_extent_dead_unref(extent->dead);
    extent->dead = NULL;
}

loci_status loci_extent_mask(loci_extent *extent, const uint8_t *segment_dead,
                             loci_extent_dead **out, loci_error *err) {
    loci_extent_dead *dead = extent->dead;
    if (!dead || memcmp(dead->segments, segment_dead, extent->segments) != 0) {
        loci_extent_let_go(extent);
        size_t words = (extent->tokens + 63u) / 64u;
        dead = malloc(sizeof *dead + extent->segments);
        if (dead) {
            atomic_init(&dead->refs, 1);
            memcpy(dead->segments, segment_dead, extent->segments);
            dead->live = malloc(extent->pairs * (sizeof(uint64_t *) + words * sizeof(uint64_t)));
        }
        loci_status status = LOCI_E_NOMEM;
        if (dead && dead->live)
            status = fill_bitmaps(extent, dead, err);
        else
            loci_fail(err, status, "no memory for the live bitmaps of %s", extent->name);
        if (status != LOCI_OK) {
            loci_extent_dead_unref(dead);
            return status;
        }
        extent->dead = dead;
    }
    atomic_fetch_add(&dead->refs, 1);
    *out = dead;
    return LOCI_OK;
}
