/* SPDX-License-Identifier: Apache-2.0
 *
 * Documents: their text in compressed chunks, their records, their names.
 *
 * A writer keeps at most one chunk in memory. Full chunks are written as they come, under a fresh
 * upload number that is marked as uncommitted; the commit removes the mark and writes the last
 * chunk, the record, the name and the counters in one batch. So a document of one chunk costs one
 * write, and an abandoned upload is found by its mark.
 */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>

#include "base/clock.h"
#include "base/log.h"
#include "memory/internal.h"

#define ZSTD_LEVEL 3

struct loci_document_writer {
    loci_store *store;
    loci_corpus *corpus;
    char id[LOCI_DOCUMENT_ID_MAX + 1];
    loci_buf metadata, chunk, packed;
    XXH3_state_t *hash;
    uint64_t upload, bytes;
    uint32_t chunks; /* full ones, written */
};

/* --- Records ---------------------------------------------------------------------------- */

static loci_key name_key(const loci_corpus *corpus, const char *id) {
    loci_key key = loci_key_uid(corpus->uid);
    loci_key_text(&key, id);
    return key;
}

static loci_key chunk_key(uint64_t uid, uint64_t upload, uint32_t index) {
    loci_key key = loci_key_pair(uid, upload);
    loci_key_u32(&key, index);
    return key;
}

static loci_key metadata_key(const loci_corpus *corpus, uint64_t sequence) {
    loci_key key = loci_key_pair(corpus->uid, sequence);
    loci_key_u8(&key, 'm');
    return key;
}

/* The record has a bounded size: it is built without the heap. */
void loci_document_store(const loci_corpus *corpus, const loci_document *document,
                         loci_batch *batch) {
    uint8_t bytes[LOCI_DOCUMENT_ID_MAX + 128];
    loci_buf buf = {.data = bytes, .len = 0, .capacity = sizeof bytes};
    loci_buf_u8(&buf, document->dead);
    loci_buf_bytes(&buf, document->id, strlen(document->id));
    loci_buf_u64(&buf, document->upload);
    loci_buf_u32(&buf, document->chunks);
    loci_buf_u64(&buf, document->bytes);
    loci_buf_append(&buf, document->content, sizeof document->content);
    loci_buf_u64(&buf, (uint64_t)document->created);
    loci_buf_u64(&buf, document->replaces);
    loci_buf_u64(&buf, document->tokens);
    loci_buf_u32(&buf, document->segments);
    LOCI_ASSERT(buf.data == bytes && !buf.failed);
    loci_key key = loci_key_pair(corpus->uid, document->sequence);
    loci_batch_put(batch, LOCI_CF_DOCUMENT, &key, LOCI_KIND_DOCUMENT,
                   loci_slice_of(buf.data, buf.len));
}

loci_status loci_document_load(const loci_corpus *corpus, const loci_view *view, uint64_t sequence,
                               loci_document *out, loci_error *err) {
    loci_key key = loci_key_pair(corpus->uid, sequence);
    loci_value *value = NULL;
    loci_slice payload = {0};
    LOCI_TRY(loci_rocks_pin(corpus->store->rocks, view, LOCI_CF_DOCUMENT, &key, LOCI_KIND_DOCUMENT,
                            &value, &payload, err));
    loci_reader reader = loci_reader_of(payload);
    memset(out, 0, sizeof *out);
    out->sequence = sequence;
    out->dead = loci_read_u8(&reader) != 0;
    loci_slice id = loci_read_bytes(&reader);
    out->upload = loci_read_u64(&reader);
    out->chunks = loci_read_u32(&reader);
    out->bytes = loci_read_u64(&reader);
    for (size_t i = 0; i < sizeof out->content; i++) out->content[i] = loci_read_u8(&reader);
    out->created = (int64_t)loci_read_u64(&reader);
    out->replaces = loci_read_u64(&reader);
    out->tokens = loci_read_u64(&reader);
    out->segments = loci_read_u32(&reader);
    bool good = loci_reader_done(&reader) && id.len > 0 && id.len <= LOCI_DOCUMENT_ID_MAX &&
                out->replaces < sequence &&
                out->chunks == (out->bytes + LOCI_CHUNK_BYTES - 1) / LOCI_CHUNK_BYTES;
    if (good) memcpy(out->id, id.data, id.len);
    loci_value_free(value);
    if (good) return LOCI_OK;
    return loci_fail(err, LOCI_E_CORRUPT, "the record of document %llu of corpus %s is damaged",
                     (unsigned long long)sequence, corpus->name);
}

loci_status loci_document_find(const loci_corpus *corpus, const loci_view *view, const char *id,
                               uint64_t *sequence, loci_error *err) {
    loci_key key = name_key(corpus, id);
    loci_value *value = NULL;
    loci_slice payload = {0};
    loci_status status = loci_rocks_pin(corpus->store->rocks, view, LOCI_CF_NAME, &key,
                                        LOCI_KIND_NAME, &value, &payload, err);
    if (status == LOCI_E_NOTFOUND)
        return loci_fail(err, status, "corpus %s has no document \"%.300s\"", corpus->name, id);
    LOCI_TRY(status);
    loci_reader reader = loci_reader_of(payload);
    *sequence = loci_read_u64(&reader);
    bool good = loci_reader_done(&reader) && *sequence > 0;
    loci_value_free(value);
    if (good) return LOCI_OK;
    return loci_fail(err, LOCI_E_CORRUPT, "the name of document \"%.300s\" of corpus %s is damaged",
                     id, corpus->name);
}

void loci_state_store(const loci_corpus *corpus, uint64_t last_sequence, uint64_t documents,
                      uint64_t bytes, loci_batch *batch) {
    uint8_t data[24];
    loci_buf buf = {.data = data, .len = 0, .capacity = sizeof data};
    loci_buf_u64(&buf, last_sequence);
    loci_buf_u64(&buf, documents);
    loci_buf_u64(&buf, bytes);
    loci_key key = loci_key_catalog('s', corpus->uid);
    loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_STATE, loci_slice_of(data, sizeof data));
}

static void store_name(const loci_corpus *corpus, const char *id, uint64_t sequence,
                       loci_batch *batch) {
    uint8_t data[8];
    loci_buf buf = {.data = data, .len = 0, .capacity = sizeof data};
    loci_buf_u64(&buf, sequence);
    loci_key key = name_key(corpus, id);
    loci_batch_put(batch, LOCI_CF_NAME, &key, LOCI_KIND_NAME, loci_slice_of(data, sizeof data));
}

/* Caller holds corpus->lock. */
void loci_document_fill_info(const loci_corpus *corpus, const loci_document *document,
                             loci_document_info *out) {
    static const char digits[] = "0123456789abcdef";
    memset(out, 0, sizeof *out);
    memcpy(out->id, document->id, sizeof out->id);
    out->sequence = document->sequence;
    out->bytes = document->bytes;
    for (size_t i = 0; i < sizeof document->content; i++) {
        out->content_hash[2 * i] = digits[document->content[i] >> 4];
        out->content_hash[2 * i + 1] = digits[document->content[i] & 15];
    }
    out->created = document->created;
    out->searchable = document->sequence < corpus->manifest->cursor.sequence &&
                      !loci_pending_has(corpus, document->sequence);
    if (out->searchable) {
        out->tokens = document->tokens;
        out->segments = document->segments;
    }
}

/* --- Text ------------------------------------------------------------------------------- */

static loci_status read_chunk(const loci_corpus *corpus, const loci_view *view,
                              const loci_document *document, uint32_t index, uint8_t *raw,
                              size_t expected, loci_error *err) {
    loci_key key = chunk_key(corpus->uid, document->upload, index);
    loci_value *value = NULL;
    loci_slice payload = {0};
    loci_status status = loci_rocks_pin(corpus->store->rocks, view, LOCI_CF_CHUNK, &key,
                                        LOCI_KIND_CHUNK, &value, &payload, err);
    if (status == LOCI_E_NOTFOUND) status = LOCI_E_CORRUPT;
    if (status == LOCI_OK) {
        loci_reader reader = loci_reader_of(payload);
        size_t stated = loci_read_u32(&reader);
        size_t raw_bytes = 0;
        if (!reader.failed && stated == expected)
            raw_bytes =
                ZSTD_decompress(raw, expected, payload.data + reader.at, payload.len - reader.at);
        if (raw_bytes != expected)
            status =
                loci_fail(err, LOCI_E_CORRUPT, "it does not decompress to %zu bytes", expected);
        loci_value_free(value);
    }
    if (status != LOCI_OK)
        return loci_fail_prefix(err, status, "chunk %u of document \"%.100s\" of corpus %s", index,
                                document->id, corpus->name);
    return LOCI_OK;
}

loci_status loci_document_text(const loci_corpus *corpus, const loci_view *view,
                               const loci_document *document, uint64_t start, uint64_t end,
                               loci_buf *out, loci_error *err) {
    LOCI_ASSERT(start <= end && end <= document->bytes);
    if (start == end) return LOCI_OK;
    uint8_t *raw = malloc(LOCI_CHUNK_BYTES);
    uint8_t *to = loci_buf_extend(out, (size_t)(end - start));
    loci_status status = LOCI_OK;
    if (!raw || !to) {
        free(raw);
        return loci_fail(err, LOCI_E_NOMEM, "no memory for the text of document \"%.100s\"",
                         document->id);
    }
    for (uint64_t at = start; status == LOCI_OK && at < end;) {
        uint32_t index = (uint32_t)(at / LOCI_CHUNK_BYTES);
        uint64_t chunk_at = (uint64_t)index * LOCI_CHUNK_BYTES;
        uint64_t left = document->bytes - chunk_at;
        size_t expected = left < LOCI_CHUNK_BYTES ? (size_t)left : LOCI_CHUNK_BYTES;
        status = read_chunk(corpus, view, document, index, raw, expected, err);
        if (status != LOCI_OK) break;
        uint64_t stop = chunk_at + expected < end ? chunk_at + expected : end;
        memcpy(to + (at - start), raw + (at - chunk_at), (size_t)(stop - at));
        at = stop;
    }
    free(raw);
    if (status != LOCI_OK) out->len -= (size_t)(end - start);
    return status;
}

/* --- Writing ---------------------------------------------------------------------------- */

/* 1 to 512 bytes of well-formed UTF-8 without control characters. */
static bool id_valid(const char *id) {
    size_t len = strlen(id), at = 0;
    if (len == 0 || len > LOCI_DOCUMENT_ID_MAX) return false;
    const uint8_t *bytes = (const uint8_t *)id;
    while (at < len) {
        uint8_t lead = bytes[at];
        size_t more = lead < 0x80 ? 0 : lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
        uint32_t point = lead < 0x80 ? lead : lead & (0x3fu >> more);
        if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || len - at <= more) return false;
        for (size_t i = 1; i <= more; i++) {
            if ((bytes[at + i] & 0xc0) != 0x80) return false;
            point = point << 6 | (bytes[at + i] & 0x3fu);
        }
        static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
        if (point < least[more] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff) ||
            point < 0x20 || (point >= 0x7f && point < 0xa0))
            return false;
        at += more + 1;
    }
    return true;
}

static void writer_free(loci_document_writer *writer) {
    loci_corpus_release(writer->corpus);
    loci_buf_fini(&writer->metadata);
    loci_buf_fini(&writer->chunk);
    loci_buf_fini(&writer->packed);
    XXH3_freeState(writer->hash);
    free(writer);
}

loci_status loci_document_begin(loci_store *store, const char *corpus, const char *id,
                                loci_slice metadata, loci_document_writer **out, loci_error *err) {
    if (!id_valid(id))
        return loci_fail(err, LOCI_E_INVAL,
                         "a document id is 1 to %d bytes of UTF-8 without control characters",
                         LOCI_DOCUMENT_ID_MAX);
    if (metadata.len > LOCI_METADATA_MAX)
        return loci_fail(err, LOCI_E_INVAL,
                         "metadata of document \"%.100s\": %zu bytes, at most %d", id, metadata.len,
                         LOCI_METADATA_MAX);
    loci_document_writer *writer = calloc(1, sizeof *writer);
    if (!writer) return loci_fail(err, LOCI_E_NOMEM, "no memory for document \"%.100s\"", id);
    writer->store = store;
    memcpy(writer->id, id, strlen(id));
    loci_buf_append(&writer->metadata, metadata.data, metadata.len);
    writer->hash = XXH3_createState();
    loci_status status = LOCI_E_NOMEM;
    if (!writer->hash || writer->metadata.failed)
        loci_fail(err, status, "no memory for document \"%.100s\"", id);
    else
        status = loci_corpus_acquire(store, corpus, &writer->corpus, err);
    if (status == LOCI_OK) { /* else the commit would tell, after all bytes have come */
        pthread_mutex_lock(&writer->corpus->lock);
        status = loci_corpus_changeable(writer->corpus, err);
        pthread_mutex_unlock(&writer->corpus->lock);
    }
    if (status != LOCI_OK) {
        writer_free(writer);
        return status;
    }
    XXH3_128bits_reset(writer->hash);
    *out = writer;
    return LOCI_OK;
}

/* Puts the gathered bytes into the batch as the next chunk. */
static loci_status pack_chunk(loci_document_writer *writer, loci_batch *batch, loci_error *err) {
    loci_buf_clear(&writer->packed);
    loci_buf_u32(&writer->packed, (uint32_t)writer->chunk.len);
    size_t room = ZSTD_compressBound(writer->chunk.len);
    uint8_t *to = loci_buf_extend(&writer->packed, room);
    if (!to) return loci_fail(err, LOCI_E_NOMEM, "no memory for document \"%.100s\"", writer->id);
    size_t packed = ZSTD_compress(to, room, writer->chunk.data, writer->chunk.len, ZSTD_LEVEL);
    if (ZSTD_isError(packed))
        return loci_fail(err, LOCI_E_INTERNAL, "compressing document \"%.100s\": %s", writer->id,
                         ZSTD_getErrorName(packed));
    loci_key key = chunk_key(writer->corpus->uid, writer->upload, writer->chunks);
    loci_batch_put(batch, LOCI_CF_CHUNK, &key, LOCI_KIND_CHUNK,
                   loci_slice_of(writer->packed.data, 4 + packed));
    return LOCI_OK;
}

static loci_status need_upload_number(loci_document_writer *writer, loci_error *err) {
    if (writer->upload != 0) return LOCI_OK;
    return loci_upload_number(writer->store, &writer->upload, err);
}

static loci_status write_full_chunk(loci_document_writer *writer, loci_error *err) {
    LOCI_TRY(need_upload_number(writer, err));
    loci_batch *batch = loci_batch_create(writer->store->rocks);
    if (writer->chunks == 0) {
        loci_key key = loci_key_catalog2('u', writer->corpus->uid, writer->upload);
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, LOCI_KIND_UPLOAD, loci_slice_of(NULL, 0));
    }
    loci_status status = pack_chunk(writer, batch, err);
    LOCI_FAILPOINT("doc_chunk");
    if (status == LOCI_OK) status = loci_batch_write(batch, false, err);
    LOCI_FAILPOINT("doc_chunk");
    loci_batch_destroy(batch);
    if (status != LOCI_OK) return status;
    writer->chunks++;
    loci_buf_clear(&writer->chunk);
    return LOCI_OK;
}

loci_status loci_document_append(loci_document_writer *writer, loci_slice data, loci_error *err) {
    uint64_t most = writer->store->options.document_bytes_max;
    if (data.len > most || writer->bytes > most - data.len)
        return loci_fail(err, LOCI_E_LIMIT, "document \"%.100s\" is larger than %llu bytes",
                         writer->id, (unsigned long long)most);
    XXH3_128bits_update(writer->hash, data.data, data.len);
    writer->bytes += data.len;
    while (data.len > 0) {
        /* A full chunk is written only when more follows: the last one goes with the commit. */
        if (writer->chunk.len == LOCI_CHUNK_BYTES) LOCI_TRY(write_full_chunk(writer, err));
        size_t room = LOCI_CHUNK_BYTES - writer->chunk.len;
        size_t part = data.len < room ? data.len : room;
        loci_buf_append(&writer->chunk, data.data, part);
        if (writer->chunk.failed)
            return loci_fail(err, LOCI_E_NOMEM, "no memory for document \"%.100s\"", writer->id);
        data = loci_slice_of(data.data + part, data.len - part);
    }
    return LOCI_OK;
}

void loci_document_abort(loci_document_writer *writer) {
    if (!writer) return;
    if (writer->chunks > 0) {
        loci_error err;
        loci_batch *batch = loci_batch_create(writer->store->rocks);
        for (uint32_t i = 0; i < writer->chunks; i++) {
            loci_key key = chunk_key(writer->corpus->uid, writer->upload, i);
            loci_batch_delete(batch, LOCI_CF_CHUNK, &key);
        }
        loci_key key = loci_key_catalog2('u', writer->corpus->uid, writer->upload);
        loci_batch_delete(batch, LOCI_CF_CATALOG, &key);
        if (loci_batch_write(batch, false, &err) != LOCI_OK)
            loci_log_warn("an abandoned upload goes at the next start: %s", err.text);
        loci_batch_destroy(batch);
    }
    writer_free(writer);
}

/* Caller holds corpus->lock. *old: the newest document of that id, sequence 0 = none. */
static loci_status find_old(const loci_corpus *corpus, const char *id, loci_document *old,
                            loci_error *err) {
    memset(old, 0, sizeof *old);
    uint64_t sequence;
    loci_status status = loci_document_find(corpus, NULL, id, &sequence, err);
    if (status == LOCI_E_NOTFOUND) return LOCI_OK;
    LOCI_TRY(status);
    return loci_document_load(corpus, NULL, sequence, old, err);
}

/* Caller holds corpus->lock; the last chunk is in the batch. */
static loci_status commit_locked(loci_document_writer *writer, loci_batch *batch,
                                 loci_document *document, const loci_document *old,
                                 loci_error *err) {
    loci_corpus *corpus = writer->corpus;
    uint64_t documents = corpus->documents + (old->sequence == 0);
    uint64_t bytes = corpus->bytes - old->bytes + document->bytes;
    document->sequence = corpus->last_sequence + 1;
    document->replaces = old->sequence;
    loci_document_store(corpus, document, batch);
    store_name(corpus, document->id, document->sequence, batch);
    loci_state_store(corpus, document->sequence, documents, bytes, batch);
    if (writer->metadata.len > 0) {
        loci_key key = metadata_key(corpus, document->sequence);
        loci_batch_put(batch, LOCI_CF_DOCUMENT, &key, LOCI_KIND_METADATA,
                       loci_slice_of(writer->metadata.data, writer->metadata.len));
    }
    if (writer->chunks > 0) {
        loci_key key = loci_key_catalog2('u', corpus->uid, writer->upload);
        loci_batch_delete(batch, LOCI_CF_CATALOG, &key);
    }
    if (!loci_pending_push(corpus, document->sequence))
        return loci_fail(err, LOCI_E_NOMEM, "no memory for document \"%.100s\"", writer->id);
    LOCI_FAILPOINT("doc_commit");
    loci_status status = loci_batch_write(batch, false, err);
    LOCI_FAILPOINT("doc_commit");
    if (status != LOCI_OK) {
        loci_pending_erase(corpus, document->sequence);
        return status;
    }
    corpus->last_sequence = document->sequence;
    corpus->documents = documents;
    corpus->bytes = bytes;
    if (old->sequence) loci_pending_erase(corpus, old->sequence);
    return LOCI_OK;
}

loci_status loci_document_commit(loci_document_writer *writer, loci_document_info *out,
                                 bool *unchanged, loci_error *err) {
    loci_corpus *corpus = writer->corpus;
    loci_document document = {0}, old;
    loci_status status = LOCI_E_INVAL;
    loci_batch *batch = loci_batch_create(writer->store->rocks);
    bool same = false;
    if (writer->bytes == 0) {
        loci_fail(err, status, "document \"%.100s\" is empty", writer->id);
        goto out;
    }
    LOCI_TRY_GOTO(need_upload_number(writer, err), out);
    LOCI_TRY_GOTO(pack_chunk(writer, batch, err), out);
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(writer->hash));
    memcpy(document.content, canonical.digest, sizeof document.content);
    memcpy(document.id, writer->id, sizeof document.id);
    document.upload = writer->upload;
    document.chunks = writer->chunks + 1;
    document.bytes = writer->bytes;
    document.created = loci_wall_seconds();

    pthread_mutex_lock(&corpus->lock);
    status = loci_corpus_changeable(corpus, err);
    if (status == LOCI_OK) status = find_old(corpus, writer->id, &old, err);
    if (status == LOCI_OK) {
        same = old.sequence != 0 && old.bytes == document.bytes &&
               memcmp(old.content, document.content, sizeof old.content) == 0;
        if (!same && old.sequence != 0 && corpus->geometry.causal)
            status = loci_append_only(corpus, writer->id, "replaced", err);
        else if (!same)
            status = commit_locked(writer, batch, &document, &old, err);
        if (status == LOCI_OK) loci_document_fill_info(corpus, same ? &old : &document, out);
    }
    pthread_mutex_unlock(&corpus->lock);
out:
    loci_batch_destroy(batch);
    *unchanged = same;
    if (status != LOCI_OK || same)
        loci_document_abort(writer);
    else
        writer_free(writer);
    return status;
}

loci_status loci_document_clean(loci_corpus *corpus, loci_error *err) {
    loci_rocks *rocks = corpus->store->rocks;
    loci_key prefix = loci_key_catalog('u', corpus->uid);
    loci_scan *marks = loci_scan_open(rocks, NULL, LOCI_CF_CATALOG, &prefix, NULL);
    loci_batch *batch = loci_batch_create(rocks);
    loci_slice found;
    while (loci_scan_next(marks, &found)) {
        if (found.len != 17) continue;
        uint64_t upload = loci_key_read_u64(found.data + 9);
        loci_key chunks = loci_key_pair(corpus->uid, upload);
        loci_batch_delete_prefix(batch, LOCI_CF_CHUNK, &chunks);
        loci_key mark = loci_key_catalog2('u', corpus->uid, upload);
        loci_batch_delete(batch, LOCI_CF_CATALOG, &mark);
    }
    loci_status status = loci_scan_close(marks, err);
    if (status == LOCI_OK) status = loci_batch_write(batch, false, err);
    loci_batch_destroy(batch);
    return status;
}
