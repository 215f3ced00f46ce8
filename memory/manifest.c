/* SPDX-License-Identifier: Apache-2.0
 *
 * Manifests in memory and as bytes; see manifest.h and FORMAT.md section 3.
 */
#include "memory/manifest.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* Smallest encoded sizes, to bound counts by the bytes that are there. */
#define EXTENT_BYTES_MIN 45u
#define RUN_BYTES 17u
#define FLAT_BYTES 52u

loci_manifest *loci_manifest_create(const char *fingerprint) {
    loci_manifest *manifest = calloc(1, sizeof *manifest);
    if (!manifest) return NULL;
    atomic_init(&manifest->refs, 1);
    memcpy(manifest->fingerprint, fingerprint, LOCI_FINGERPRINT_LEN);
    manifest->revision = 1;
    manifest->cursor.sequence = 1;
    manifest->next_flat = 1;
    return manifest;
}

loci_manifest *loci_manifest_ref(loci_manifest *manifest) {
    atomic_fetch_add(&manifest->refs, 1);
    return manifest;
}

void loci_manifest_extent_fini(loci_manifest_extent *extent) {
    free(extent->runs);
    extent->runs = NULL;
}

void loci_manifest_unref(loci_manifest *manifest) {
    if (!manifest || atomic_fetch_sub(&manifest->refs, 1) != 1) return;
    for (uint32_t i = 0; i < manifest->extent_count; i++)
        loci_manifest_extent_fini(&manifest->extents[i]);
    free(manifest->extents);
    free(manifest->flats);
    free(manifest);
}

loci_manifest *loci_manifest_clone(const loci_manifest *manifest) {
    loci_manifest *clone = malloc(sizeof *clone);
    if (!clone) return NULL;
    size_t rest = offsetof(loci_manifest, fingerprint); /* refs change meanwhile */
    memcpy((char *)clone + rest, (const char *)manifest + rest, sizeof *clone - rest);
    atomic_init(&clone->refs, 1);
    clone->extent_count = clone->flat_count = 0;
    clone->extents = malloc((manifest->extent_count + 1u) * sizeof *clone->extents);
    clone->flats = malloc((manifest->flat_count + 1u) * sizeof *clone->flats);
    if (!clone->extents || !clone->flats) goto fail;
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        loci_manifest_extent *to = &clone->extents[i];
        *to = manifest->extents[i];
        to->runs = malloc(to->run_count * sizeof *to->runs);
        if (!to->runs) goto fail;
        memcpy(to->runs, manifest->extents[i].runs, to->run_count * sizeof *to->runs);
        clone->extent_count++;
    }
    if (manifest->flat_count)
        memcpy(clone->flats, manifest->flats, manifest->flat_count * sizeof *clone->flats);
    clone->flat_count = manifest->flat_count;
    return clone;
fail:
    loci_manifest_unref(clone);
    return NULL;
}

void loci_manifest_sum(loci_manifest *manifest) {
    manifest->live_segments = manifest->live_tokens = 0;
    manifest->flat_tokens = manifest->file_bytes = 0;
    for (uint32_t i = 0; i < manifest->flat_count; i++) {
        manifest->flat_tokens += manifest->flats[i].tokens;
        if (loci_manifest_hides(manifest, manifest->flats[i].sequence)) continue;
        manifest->live_tokens += manifest->flats[i].tokens;
        manifest->live_segments++;
    }
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        loci_manifest_extent *extent = &manifest->extents[i];
        extent->dead_tokens = extent->dead_segments = 0;
        for (uint32_t r = 0; r < extent->run_count; r++) {
            const loci_run *run = &extent->runs[r];
            if (run->dead) {
                extent->dead_tokens += run->tokens;
                extent->dead_segments += run->segments;
            } else if (!loci_manifest_hides(manifest, run->sequence)) {
                manifest->live_tokens += run->tokens;
                manifest->live_segments += run->segments;
            }
        }
        manifest->file_bytes += extent->file_bytes;
    }
}

void loci_manifest_encode(const loci_manifest *manifest, loci_buf *out) {
    loci_buf_append(out, manifest->fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_u64(out, manifest->revision);
    loci_buf_u64(out, manifest->cursor.sequence);
    loci_buf_u64(out, manifest->cursor.byte);
    loci_buf_u32(out, manifest->cursor.segments);
    loci_buf_u64(out, manifest->cursor.tokens);
    loci_buf_u64(out, manifest->next_flat);
    loci_buf_u32(out, manifest->extent_count);
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        const loci_manifest_extent *extent = &manifest->extents[i];
        loci_buf_append(out, extent->id, sizeof extent->id);
        loci_buf_u64(out, extent->file_bytes);
        loci_buf_u64(out, extent->header_hash);
        loci_buf_u32(out, extent->tokens);
        loci_buf_u32(out, extent->segments);
        loci_buf_u8(out, extent->partial);
        loci_buf_u32(out, extent->run_count);
        for (uint32_t r = 0; r < extent->run_count; r++) {
            loci_buf_u64(out, extent->runs[r].sequence);
            loci_buf_u32(out, extent->runs[r].segments);
            loci_buf_u32(out, extent->runs[r].tokens);
            loci_buf_u8(out, extent->runs[r].dead);
        }
    }
    loci_buf_u32(out, manifest->flat_count);
    for (uint32_t i = 0; i < manifest->flat_count; i++) {
        const loci_manifest_flat *flat = &manifest->flats[i];
        loci_buf_u64(out, flat->number);
        loci_buf_u64(out, flat->sequence);
        loci_buf_append(out, flat->content, sizeof flat->content);
        loci_buf_u64(out, flat->start);
        loci_buf_u64(out, flat->end);
        loci_buf_u32(out, flat->tokens);
    }
}

bool loci_manifest_hash(const loci_manifest *manifest, uint8_t out[LOCI_EXTENT_ID_BYTES]) {
    loci_manifest *plain = loci_manifest_clone(manifest);
    if (!plain) return false;
    /* Without what tells of the way to it. */
    plain->revision = plain->next_flat = 0;
    plain->cursor = (loci_cursor){0};
    for (uint32_t i = 0; i < plain->extent_count; i++)
        for (uint32_t r = 0; r < plain->extents[i].run_count; r++)
            plain->extents[i].runs[r].sequence = 0;
    for (uint32_t i = 0; i < plain->flat_count; i++)
        plain->flats[i].number = plain->flats[i].sequence = 0;
    loci_buf bytes = LOCI_BUF_INIT;
    loci_manifest_encode(plain, &bytes);
    bool done = loci_buf_status(&bytes) == LOCI_OK;
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data, bytes.len));
    memcpy(out, canonical.digest, sizeof canonical.digest);
    loci_buf_fini(&bytes);
    loci_manifest_unref(plain);
    return done;
}

static void read_raw(loci_reader *reader, void *out, size_t len) {
    if (reader->failed || reader->len - reader->at < len) {
        reader->failed = true;
        memset(out, 0, len);
        return;
    }
    memcpy(out, reader->data + reader->at, len);
    reader->at += len;
}

/* A count of items of at least item_bytes each; 0 and failed when they cannot be there. */
static uint32_t read_count(loci_reader *reader, size_t item_bytes) {
    uint32_t count = loci_read_u32(reader);
    if (!reader->failed && count > (reader->len - reader->at) / item_bytes) reader->failed = true;
    return reader->failed ? 0 : count;
}

static bool decode_extent(loci_reader *reader, loci_manifest_extent *extent, bool last) {
    memset(extent, 0, sizeof *extent);
    read_raw(reader, extent->id, sizeof extent->id);
    extent->file_bytes = loci_read_u64(reader);
    extent->header_hash = loci_read_u64(reader);
    extent->tokens = loci_read_u32(reader);
    extent->segments = loci_read_u32(reader);
    uint8_t partial = loci_read_u8(reader);
    extent->partial = partial == 1;
    extent->run_count = read_count(reader, RUN_BYTES);
    if (partial > 1 || (extent->partial && !last) || extent->tokens == 0 ||
        extent->tokens > LOCI_EXTENT_TOKENS_MAX || extent->segments > extent->tokens ||
        extent->segments > LOCI_EXTENT_SEGMENTS_MAX || extent->run_count == 0 ||
        extent->run_count > extent->segments || reader->failed)
        return false;
    extent->runs = calloc(extent->run_count, sizeof *extent->runs);
    if (!extent->runs) return false;
    uint64_t segments = 0, tokens = 0;
    for (uint32_t r = 0; r < extent->run_count; r++) {
        loci_run *run = &extent->runs[r];
        run->sequence = loci_read_u64(reader);
        run->segments = loci_read_u32(reader);
        run->tokens = loci_read_u32(reader);
        run->dead = loci_read_u8(reader) != 0;
        segments += run->segments;
        tokens += run->tokens;
        if (run->segments == 0 || run->tokens < run->segments) return false;
    }
    return segments == extent->segments && tokens == extent->tokens;
}

static bool decode_flats(loci_reader *reader, loci_manifest *manifest) {
    uint32_t count = read_count(reader, FLAT_BYTES);
    manifest->flats = calloc(count + 1u, sizeof *manifest->flats);
    if (!manifest->flats) return false;
    uint64_t previous = 0;
    for (uint32_t i = 0; i < count; i++) {
        loci_manifest_flat *flat = &manifest->flats[i];
        flat->number = loci_read_u64(reader);
        flat->sequence = loci_read_u64(reader);
        read_raw(reader, flat->content, sizeof flat->content);
        flat->start = loci_read_u64(reader);
        flat->end = loci_read_u64(reader);
        flat->tokens = loci_read_u32(reader);
        if (flat->number <= previous || flat->number >= manifest->next_flat || flat->tokens == 0 ||
            flat->tokens > LOCI_EXTENT_SEAL_TOKENS || flat->end < flat->start)
            return false;
        previous = flat->number;
        manifest->flat_count++;
    }
    return true;
}

loci_status loci_manifest_decode(loci_slice payload, const char *fingerprint, const char *name,
                                 loci_manifest **out, loci_error *err) {
    loci_manifest *manifest = loci_manifest_create(fingerprint);
    if (!manifest) return loci_fail(err, LOCI_E_NOMEM, "no memory for the manifest of %s", name);
    loci_reader reader = loci_reader_of(payload);
    char found[LOCI_FINGERPRINT_LEN];
    read_raw(&reader, found, sizeof found);
    if (!reader.failed && memcmp(found, manifest->fingerprint, sizeof found) != 0) {
        loci_manifest_unref(manifest);
        return loci_fail(err, LOCI_E_CORRUPT,
                         "the manifest of %s is of another model than the corpus", name);
    }
    manifest->revision = loci_read_u64(&reader);
    manifest->cursor.sequence = loci_read_u64(&reader);
    manifest->cursor.byte = loci_read_u64(&reader);
    manifest->cursor.segments = loci_read_u32(&reader);
    manifest->cursor.tokens = loci_read_u64(&reader);
    manifest->next_flat = loci_read_u64(&reader);
    uint32_t count = read_count(&reader, EXTENT_BYTES_MIN);
    manifest->extents = calloc(count + 1u, sizeof *manifest->extents);
    bool good = manifest->extents != NULL && manifest->revision > 0;
    for (uint32_t i = 0; good && i < count; i++) {
        manifest->extent_count++; /* counted first, so that a half-read one is freed */
        good = decode_extent(&reader, &manifest->extents[i], i + 1 == count);
    }
    good = good && decode_flats(&reader, manifest);
    if (!good || !loci_reader_done(&reader)) {
        loci_manifest_unref(manifest);
        return loci_fail(err, LOCI_E_CORRUPT, "the manifest of %s contradicts itself", name);
    }
    loci_manifest_sum(manifest);
    *out = manifest;
    return LOCI_OK;
}

bool loci_manifest_replace(loci_manifest *manifest, uint32_t first, uint32_t last,
                           loci_manifest_extent *extent) {
    LOCI_ASSERT(first <= last && last <= manifest->extent_count);
    uint32_t added = extent ? 1 : 0;
    uint32_t after = manifest->extent_count - last;
    size_t room = (size_t)manifest->extent_count + 1;
    loci_manifest_extent *grown = realloc(manifest->extents, room * sizeof *grown);
    if (!grown) return false;
    manifest->extents = grown;
    for (uint32_t i = first; i < last; i++) loci_manifest_extent_fini(&grown[i]);
    memmove(&grown[first + added], &grown[last], after * sizeof *grown);
    if (extent) {
        grown[first] = *extent;
        extent->runs = NULL;
    }
    manifest->extent_count = first + added + after;
    for (uint32_t i = 0; i + 1 < manifest->extent_count; i++) grown[i].partial = false;
    return true;
}

bool loci_manifest_add_flat(loci_manifest *manifest, const loci_manifest_flat *flat) {
    size_t room = (size_t)manifest->flat_count + 1;
    loci_manifest_flat *grown = realloc(manifest->flats, room * sizeof *grown);
    if (!grown) return false;
    manifest->flats = grown;
    grown[manifest->flat_count++] = *flat;
    return true;
}

void loci_manifest_bury(loci_manifest *manifest, uint64_t sequence) {
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        loci_manifest_extent *extent = &manifest->extents[i];
        for (uint32_t r = 0; r < extent->run_count; r++)
            if (extent->runs[r].sequence == sequence) extent->runs[r].dead = true;
    }
}

bool loci_manifest_names(const loci_manifest *manifest, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    for (uint32_t i = 0; i < manifest->extent_count; i++)
        if (memcmp(manifest->extents[i].id, id, LOCI_EXTENT_ID_BYTES) == 0) return true;
    return false;
}
