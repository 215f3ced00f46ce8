/* SPDX-License-Identifier: Apache-2.0
 *
 * Notes: what a model found out about a corpus and could find out again. They stand beside the
 * catalogue value (FORMAT.md, kinds LCnq and LCnt) and are written without fsync. One that is
 * damaged or of another model is as if it were not there.
 */
#include <string.h>

#include "base/log.h"
#include "memory/internal.h"

static const struct {
    char key;
    uint32_t kind;
} notes[] = {
    [LOCI_NOTE_QUERIES] = {'q', LOCI_KIND('n', 'q')},
    [LOCI_NOTE_THRESHOLDS] = {'t', LOCI_KIND('n', 't')},
};

/* With a reference. The corpus, or the one that is made to take its place. */
static loci_status acquire(loci_store *store, const loci_corpus_info *info, loci_corpus **out,
                           loci_error *err) {
    loci_corpus *corpus = NULL;
    LOCI_TRY(loci_corpus_acquire(store, info->name, &corpus, err));
    if (corpus->uid == info->uid) {
        *out = corpus;
        return LOCI_OK;
    }
    loci_corpus_release(corpus);
    LOCI_TRY(loci_corpus_successor(store, info->name, &corpus, err));
    if (corpus && corpus->uid == info->uid) {
        *out = corpus;
        return LOCI_OK;
    }
    loci_corpus_release(corpus);
    return loci_fail(err, LOCI_E_NOTFOUND, "corpus %s was deleted", info->name);
}

loci_status loci_corpus_note_put(loci_store *store, const loci_corpus_info *info, loci_note note,
                                 loci_slice data, loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_buf payload = LOCI_BUF_INIT;
    LOCI_TRY(acquire(store, info, &corpus, err)); /* its data stays until the release */
    loci_buf_append(&payload, corpus->geometry.fingerprint, LOCI_FINGERPRINT_LEN);
    loci_buf_append(&payload, data.data, data.len);
    loci_batch *batch = loci_batch_create(store->rocks);
    loci_key key = loci_key_catalog(notes[note].key, corpus->uid);
    loci_status status = loci_buf_status(&payload);
    if (status == LOCI_OK) {
        loci_batch_put(batch, LOCI_CF_CATALOG, &key, notes[note].kind,
                       loci_slice_of(payload.data, payload.len));
        status = loci_batch_write(batch, false, err);
    } else {
        loci_fail(err, status, "no memory for a note on corpus %s", info->name);
    }
    loci_batch_destroy(batch);
    loci_buf_fini(&payload);
    loci_corpus_release(corpus);
    return status;
}

loci_status loci_corpus_note_get(loci_store *store, const loci_corpus_info *info, loci_note note,
                                 loci_buf *out, loci_error *err) {
    loci_corpus *corpus = NULL;
    loci_value *value = NULL;
    loci_slice payload = {0};
    LOCI_TRY(acquire(store, info, &corpus, err));
    loci_key key = loci_key_catalog(notes[note].key, corpus->uid);
    loci_error damage = {0};
    loci_status status = loci_rocks_pin(store->rocks, NULL, LOCI_CF_CATALOG, &key, notes[note].kind,
                                        &value, &payload, &damage);
    if (status == LOCI_E_CORRUPT)
        loci_log_warn("a note on corpus %s is not used: %s", info->name, damage.text);
    bool good = status == LOCI_OK && payload.len >= LOCI_FINGERPRINT_LEN &&
                memcmp(payload.data, corpus->geometry.fingerprint, LOCI_FINGERPRINT_LEN) == 0;
    loci_buf_clear(out);
    if (good) {
        loci_buf_append(out, payload.data + LOCI_FINGERPRINT_LEN,
                        payload.len - LOCI_FINGERPRINT_LEN);
        status = loci_buf_status(out);
    }
    loci_value_free(value);
    loci_corpus_release(corpus);
    if (good && status == LOCI_OK) return LOCI_OK;
    return loci_fail(err, LOCI_E_NOTFOUND, "there is no such note on corpus %s", info->name);
}
