/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of memory/ share: a scratch directory, a backend that only wraps memory, and a
 * deterministic encoder whose tokens are bytes and whose K and V are hashes.
 */
#ifndef LOCI_TESTS_MEMORY_SUPPORT_H
#define LOCI_TESTS_MEMORY_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>

#include <cmocka.h>

#include "memory/ingest.h"
#include "memory/rocks.h"
#include "memory/store.h"

#define FINGERPRINT "0123456789abcdef0123456789abcdef"
#define OTHER_FINGERPRINT "ffffffffffffffff0123456789abcdef"
#define SEGMENT_TOKENS 32u
#define EXTENT_TOKENS 1024u

struct loci_buffer {
    const uint8_t *data;
    size_t bytes;
};

/* Prints the error of a failed call before the test fails. */
#define assert_ok(expr)                                                   \
    do {                                                                  \
        loci_status status_ = (expr);                                     \
        if (status_ != LOCI_OK) print_error("%s: %s\n", #expr, err.text); \
        assert_int_equal(status_, LOCI_OK);                               \
    } while (0)

typedef struct fixture {
    char dir[64];
    loci_backend backend;
    loci_store *store;
    loci_ingest *ingest;
    loci_encoder encoder;
    loci_store_options options;
    bool kv_int8; /* of corpora that fixture_create makes */
    /* Settings of the encoder. */
    atomic_uint fail_encodes; /* so many encodes fail first */
    atomic_uint encode_ms;    /* each takes so long */
    atomic_uint encodes;      /* that were begun */
    /* Called once, at the next time when the backend is given memory. */
    void (*on_wrap)(struct fixture *f);
    loci_split split;
} fixture;

int fixture_setup(void **state);    /* a new directory; nothing is open */
int fixture_teardown(void **state); /* closes what is open, removes the directory */
/* For tests that have no cmocka state. */
void fixture_init(fixture *f, const char *dir); /* dir NULL: a new one */
void fixture_open(fixture *f);
void fixture_start(fixture *f); /* the ingest thread */
void fixture_close(fixture *f); /* thread, store */
void fixture_create(fixture *f, const char *corpus);
/* "/tmp/loci-NAME-XXXXXX", or in memory where there is room: for tests of sudden death, which open
 * a store a hundred times. What a killed process has written stays either way. */
void make_crash_directory(const char *name, char out[64]);
void remove_tree(const char *dir);

/* For fixture.backend: one that clusters keys as a GPU does, so that pairs overlap. */
extern const loci_backend_ops fake_clustering_ops;

loci_geometry test_geometry(void);
/* size bytes of words, determined by seed. The caller frees. */
char *make_text(uint64_t seed, size_t size);
loci_status put_document(fixture *f, const char *corpus, const char *id, loci_slice text,
                         loci_document_info *out, bool *unchanged, loci_error *err);
/* put_document of make_text; asserts success. */
void put_text(fixture *f, const char *corpus, const char *id, uint64_t seed, size_t size);
void wait_searchable(fixture *f, const char *corpus); /* and wakes the thread; asserts success */
void wait_settled(fixture *f, const char *corpus);
void wait_merged(fixture *f, const char *corpus); /* nothing is to be merged */
/* Another number is another model: all values change. */
extern uint64_t fake_model;
/* The expected K (v = 0) or V (v = 1) value of a token. */
uint16_t fake_value(uint32_t token, uint32_t offset, uint32_t pair, uint32_t channel, uint32_t v);
/* Every live segment of a snapshot against the text and the encoder: K and V of all pairs through
 * the view, document bytes, counts, the postings of all words. Returns a hash of (document id,
 * start, end, place: extent id or flat) of the live segments in order. */
uint64_t check_snapshot(fixture *f, const char *corpus);
/* Keys of a column family that begin with prefix ("" = all); the store must be closed. Opening it
 * takes time: several are counted together. */
typedef struct key_group {
    loci_family family;
    const char *prefix;
} key_group;
size_t count_keys(const char *dir, loci_family family, const char *prefix);
void count_each(const char *dir, const key_group *groups, size_t count, size_t *out);
/* Replaces the value of a corpus in the catalogue by nonsense; the store must be closed. */
void damage_catalog(const char *dir, char kind, uint64_t uid, uint32_t value_kind);
void flip_byte(const char *path, long at);
/* The path of the first (in order of names) extent file of the corpus; false when there is none. */
bool find_extent(fixture *f, const char *corpus, char path[512]);
unsigned count_extents(fixture *f, const char *corpus); /* files */
/* Superseded files go a moment after the commit: waits up to 5 s for so many. */
void wait_extents(fixture *f, const char *corpus, uint64_t expected);

loci_corpus_info info_of(fixture *f, const char *corpus);
/* Asserts success. */
void delete_document(fixture *f, const char *corpus, const char *id);

#endif
