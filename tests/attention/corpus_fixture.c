/* SPDX-License-Identifier: Apache-2.0
 *
 * See corpus_fixture.h. Memory failures end the program: it is test code.
 */
#include "tests/attention/corpus_fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"

static void *need(void *memory) {
    LOCI_ASSERT(memory != NULL);
    return memory;
}

uint64_t fixture_random(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

float fixture_uniform(uint64_t *state) {
    return (float)(fixture_random(state) >> 40) / 16777216.0f;
}

float fixture_normal(uint64_t *state) {
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) sum += fixture_uniform(state);
    return sum - 6.0f;
}

static void alloc_keys(fixture *f) {
    size_t pairs = (size_t)f->layers * f->kv_heads;
    f->k = need(calloc(pairs, sizeof *f->k));
    f->v = need(calloc(pairs, sizeof *f->v));
    for (size_t p = 0; p < pairs; p++) {
        f->k[p] = need(malloc((size_t)f->tokens * f->dim * sizeof **f->k));
        f->v[p] = need(malloc((size_t)f->tokens * f->dim * sizeof **f->v));
    }
}

static void generate_pair(fixture *f, const fixture_shape *shape, size_t pair, uint64_t *rng) {
    uint32_t dim = f->dim, clusters = shape->clusters ? shape->clusters : 1;
    float *topic = need(malloc((size_t)clusters * dim * sizeof *topic));
    float *offset = need(malloc(dim * sizeof *offset));
    for (uint32_t i = 0; i < dim; i++) offset[i] = 2.0f * fixture_normal(rng);
    for (size_t i = 0; i < (size_t)clusters * dim; i++) topic[i] = fixture_normal(rng);
    for (uint32_t t = 0; t < f->tokens; t++) {
        /* Squared, so that some topics are frequent and many are rare. */
        float u = fixture_uniform(rng);
        uint32_t c = (uint32_t)(u * u * (float)clusters);
        for (uint32_t i = 0; i < dim; i++) {
            float key =
                offset[i] + topic[(size_t)c * dim + i] + shape->spread * fixture_normal(rng);
            f->k[pair][(size_t)t * dim + i] = loci_f32_to_bf16(key);
            f->v[pair][(size_t)t * dim + i] = loci_f32_to_bf16(fixture_normal(rng));
        }
    }
    free(topic);
    free(offset);
}

void fixture_generate(fixture *f, const fixture_shape *shape) {
    uint64_t rng = shape->seed * 2 + 1;
    *f = (fixture){.layers = shape->layers,
                   .kv_heads = shape->kv_heads,
                   .dim = shape->dim,
                   .q_heads = shape->q_heads,
                   .tokens = shape->tokens};
    f->segments = (shape->tokens + shape->segment_tokens - 1) / shape->segment_tokens;
    f->segment_begin = need(malloc((f->segments + 1) * sizeof *f->segment_begin));
    for (uint32_t s = 0; s <= f->segments; s++)
        f->segment_begin[s] = s < f->segments ? s * shape->segment_tokens : shape->tokens;
    alloc_keys(f);
    for (size_t p = 0; p < (size_t)f->layers * f->kv_heads; p++) generate_pair(f, shape, p, &rng);
}

static bool read_exact(FILE *file, void *to, size_t bytes) {
    return fread(to, 1, bytes, file) == bytes;
}

loci_status fixture_load(fixture *f, const char *path, loci_error *err) {
    char magic[8];
    uint32_t head[8];
    FILE *file = fopen(path, "rb");
    if (!file) return loci_fail(err, LOCI_E_NOTFOUND, "cannot open %s", path);
    bool ok = read_exact(file, magic, 8) && memcmp(magic, "LOCIKV1", 8) == 0 &&
              read_exact(file, head, sizeof head);
    *f = (fixture){0};
    if (!ok) goto out;
    *f = (fixture){.layers = head[0],
                   .kv_heads = head[1],
                   .dim = head[2],
                   .q_heads = head[3],
                   .tokens = head[4],
                   .segments = head[5],
                   .steps = head[6],
                   .rows = head[7]};
    f->segment_begin = need(malloc((f->segments + 1) * sizeof *f->segment_begin));
    f->step_begin = need(malloc((f->steps + 1) * sizeof *f->step_begin));
    ok = read_exact(file, f->segment_begin, (f->segments + 1) * sizeof *f->segment_begin) &&
         read_exact(file, f->step_begin, (f->steps + 1) * sizeof *f->step_begin);
    f->q = need(calloc(f->layers, sizeof *f->q));
    f->steady = need(calloc(f->layers, sizeof *f->steady));
    for (uint32_t l = 0; ok && l < f->layers; l++) {
        size_t lse = (size_t)f->rows * f->q_heads * sizeof(float);
        f->q[l] = need(malloc(lse * f->dim));
        f->steady[l] = need(malloc(lse));
        ok = read_exact(file, f->q[l], lse * f->dim) && read_exact(file, f->steady[l], lse);
    }
    alloc_keys(f);
    for (size_t p = 0; ok && p < (size_t)f->layers * f->kv_heads; p++) {
        size_t bytes = (size_t)f->tokens * f->dim * sizeof **f->k;
        ok = read_exact(file, f->k[p], bytes) && read_exact(file, f->v[p], bytes);
    }
out:
    (void)fclose(file);
    if (ok) return LOCI_OK;
    fixture_close(f);
    return loci_fail(err, LOCI_E_INVAL, "%s is not a key-value dump", path);
}

/* --- extents --------------------------------------------------------------------------- */

static void cut_extents(fixture *f, uint32_t extent_tokens, uint32_t segments) {
    f->extent_begin = need(calloc(segments + 1, sizeof *f->extent_begin));
    f->views = need(calloc(segments + 1, sizeof *f->views));
    for (uint32_t s = 0; s < segments;) {
        loci_extent_view *view = &f->views[f->extents];
        uint32_t first = s, begin = f->segment_begin[s];
        while (s < segments && (s == first || f->segment_begin[s + 1] - begin <= extent_tokens))
            s++;
        view->segment_base = first;
        view->segments = s - first;
        view->tokens = f->segment_begin[s] - begin;
        view->id = 0xe0000000ull + f->extents;
        f->extent_begin[f->extents++] = begin;
        f->extent_begin[f->extents] = f->segment_begin[s];
    }
}

static loci_status build_extent(fixture *f, uint32_t e, const loci_pair_build_options *options,
                                loci_error *err) {
    loci_extent_view *view = &f->views[e];
    size_t pairs = (size_t)f->layers * f->kv_heads, begin = f->extent_begin[e];
    uint32_t *slots = need(malloc(view->tokens * sizeof *slots));
    uint32_t *segment_begin = need(malloc((view->segments + 1) * sizeof *segment_begin));
    uint64_t *at = need(calloc(pairs, sizeof *at)), *hash = need(calloc(pairs, sizeof *hash));
    loci_buf blob = LOCI_BUF_INIT;
    loci_status status = LOCI_OK;
    for (uint32_t s = 0; s <= view->segments; s++)
        segment_begin[s] = f->segment_begin[view->segment_base + s] - (uint32_t)begin;
    for (uint32_t s = 0; s < view->segments; s++)
        for (uint32_t t = segment_begin[s]; t < segment_begin[s + 1]; t++)
            slots[t] = s << 16 | (t - segment_begin[s]);
    for (size_t p = 0; status == LOCI_OK && p < pairs; p++) {
        at[p] = blob.len;
        status =
            loci_pair_build(f->k[p] + begin * f->dim, f->v[p] + begin * f->dim, slots, view->tokens,
                            f->dim, options, loci_backend_pool(f->backend), &blob, &hash[p], err);
    }
    view->pair_at = at;
    view->pair_hash = hash;
    view->segment_begin = segment_begin;
    f->memory_bytes[e] = blob.len;
    f->memory[e] = need(aligned_alloc(128, (blob.len + 127) / 128 * 128 + 128));
    if (blob.len) memcpy(f->memory[e], blob.data, blob.len);
    loci_buf_fini(&blob);
    free(slots);
    if (status == LOCI_OK)
        status =
            f->backend->ops->wrap(f->backend, f->memory[e], f->memory_bytes[e], &view->buffer, err);
    return status;
}

/* Flat keys interleave the KV heads. */
static loci_status make_flat(fixture *f, uint32_t first, loci_error *err) {
    size_t begin = f->segment_begin[first], tokens = f->tokens - begin;
    size_t bytes = (tokens ? tokens : 1) * f->kv_heads * f->dim * sizeof(uint16_t);
    loci_buffer **k = need(calloc(f->layers, sizeof(loci_buffer *)));
    loci_buffer **v = need(calloc(f->layers, sizeof(loci_buffer *)));
    uint16_t *rows = need(malloc(bytes));
    uint32_t *segment_begin = need(malloc((f->segments - first + 1) * sizeof *segment_begin));
    for (uint32_t s = first; s <= f->segments; s++)
        segment_begin[s - first] = f->segment_begin[s] - (uint32_t)begin;
    for (uint32_t i = 0; i < 2 * f->layers; i++) {
        uint32_t l = i / 2;
        loci_buffer **to = i % 2 ? &v[l] : &k[l];
        for (size_t t = 0; t < tokens; t++)
            for (uint32_t h = 0; h < f->kv_heads; h++)
                memcpy(rows + (t * f->kv_heads + h) * f->dim,
                       (i % 2 ? f->v : f->k)[l * f->kv_heads + h] + (begin + t) * f->dim,
                       f->dim * sizeof *rows);
        LOCI_TRY(f->backend->ops->alloc(f->backend, bytes, to, err));
        if (tokens) f->backend->ops->upload(f->stream, loci_ref_at(*to, 0), rows, bytes);
    }
    free(rows);
    f->view.flat_k = k;
    f->view.flat_v = v;
    f->view.flat_segment_begin = segment_begin;
    f->view.flat_tokens = (uint32_t)tokens;
    f->view.flat_segments = f->segments - first;
    f->view.flat_segment_base = first;
    return LOCI_OK;
}

loci_status fixture_build_on(fixture *f, const char *backend, const char *isa, unsigned threads,
                             uint32_t extent_tokens, uint32_t flat_segments,
                             const loci_pair_build_options *options, loci_error *err) {
    loci_backend_options backend_options = {.threads = threads, .isa = isa};
    LOCI_TRY(loci_backend_open(backend, &backend_options, &f->backend, err));
    LOCI_TRY(f->backend->ops->stream_open(f->backend, &f->stream, err));
    uint32_t segments = f->segments - flat_segments;
    cut_extents(f, extent_tokens, segments);
    f->memory = need(calloc(f->extents + 1, sizeof *f->memory));
    f->memory_bytes = need(calloc(f->extents + 1, sizeof *f->memory_bytes));
    for (uint32_t e = 0; e < f->extents; e++) LOCI_TRY(build_extent(f, e, options, err));
    f->view = (loci_corpus_view){
        .retrieval_layers = f->layers,
        .kv_heads = f->kv_heads,
        .head_dim = f->dim,
        .extent_count = f->extents,
        .extents = f->views,
        .live_segments = f->segments,
        .tokens = f->tokens,
        .revision = 1,
    };
    return make_flat(f, segments, err);
}

static void free_live(loci_extent_view *view, size_t pairs) {
    for (size_t p = 0; view->live && p < pairs; p++) free((void *)view->live[p]);
    free((void *)view->live);
    view->live = NULL;
}

loci_status fixture_kill(fixture *f, const uint8_t *dead, loci_error *err) {
    size_t pairs = (size_t)f->layers * f->kv_heads;
    free(f->dead);
    f->dead = need(malloc(f->segments));
    memcpy(f->dead, dead, f->segments);
    for (uint32_t e = 0; e < f->extents; e++) {
        loci_extent_view *view = &f->views[e];
        free_live(view, pairs);
        const uint64_t **live = need(calloc(pairs, sizeof *live));
        view->live = live;
        view->segment_dead = f->dead + view->segment_base;
        for (size_t p = 0; p < pairs; p++) {
            uint64_t *bits = need(calloc(view->tokens / 64 + 2, sizeof *bits));
            live[p] = bits;
            LOCI_TRY(loci_pair_live(f->memory[e] + view->pair_at[p],
                                    f->memory_bytes[e] - view->pair_at[p], view->segment_dead,
                                    view->segments, bits, err));
        }
    }
    return LOCI_OK;
}

/* Appends the pair of version 3 that one of the present version would have been. */
static uint64_t append_old(loci_buf *out, const uint8_t *blob) {
    const loci_pair_header *now = loci_pair_header_of(blob);
    loci_pair_shape shape = {
        .head_dim = now->head_dim,
        .tokens = now->tokens,
        .leaves = now->leaves,
        .roots = now->roots,
        .block_bytes = now->block_bytes,
        .position_codes = now->position_codes_at != 0,
        .kv = (loci_dtype)now->kv_dtype,
        .version = LOCI_PAIR_OLDEST,
    };
    loci_pair_header header;
    loci_pair_layout(&shape, &header);
    header.hash_roots = now->hash_roots;
    header.hash_root_values = now->hash_root_values;
    header.hash_position_hashes = now->hash_position_hashes;
    uint8_t *old = need(calloc(1, header.blob_bytes));
    memcpy(old, blob, now->kv_at + now->tokens * loci_pair_kv_stride(blob));
    memcpy(old, &header, sizeof header);
    if (now->position_codes_at) {
        memcpy(old + header.position_hashes_at, blob + now->position_hashes_at,
               now->blob_bytes - now->position_hashes_at);
    }
    uint64_t hash = loci_pair_header_hash(old, now->head_dim);
    loci_buf_append(out, old, header.blob_bytes);
    free(old);
    return hash;
}

loci_status fixture_age(fixture *f, loci_error *err) {
    for (uint32_t e = 0; e < f->extents; e++) {
        loci_buf out = LOCI_BUF_INIT;
        uint64_t *at = (uint64_t *)(uintptr_t)f->views[e].pair_at;
        uint64_t *hash = (uint64_t *)(uintptr_t)f->views[e].pair_hash;
        for (size_t p = 0; p < (size_t)f->layers * f->kv_heads; p++) {
            const uint8_t *blob = f->memory[e] + at[p];
            at[p] = out.len;
            hash[p] = append_old(&out, blob);
        }
        if (loci_buf_status(&out) != LOCI_OK) return loci_fail(err, LOCI_E_NOMEM, "no memory");
        LOCI_ASSERT(out.len <= f->memory_bytes[e]);
        memcpy(f->memory[e], out.data, out.len);
        f->memory_bytes[e] = out.len;
        loci_buf_fini(&out);
    }
    return fixture_rewrap(f, err);
}

loci_status fixture_rewrap(fixture *f, loci_error *err) {
    for (uint32_t e = 0; e < f->extents; e++) {
        f->backend->ops->free(f->backend, f->views[e].buffer);
        f->views[e].buffer = NULL;
        LOCI_TRY(f->backend->ops->wrap(f->backend, f->memory[e], f->memory_bytes[e],
                                       &f->views[e].buffer, err));
    }
    return LOCI_OK;
}

void fixture_close(fixture *f) {
    size_t pairs = (size_t)f->layers * f->kv_heads;
    const loci_backend_ops *ops = f->backend ? f->backend->ops : NULL;
    for (uint32_t e = 0; e < f->extents; e++) {
        free_live(&f->views[e], pairs);
        free((void *)f->views[e].pair_at);
        free((void *)f->views[e].pair_hash);
        free((void *)f->views[e].segment_begin);
        if (ops) ops->free(f->backend, f->views[e].buffer);
        if (f->memory) free(f->memory[e]);
    }
    for (uint32_t l = 0; ops && f->view.flat_k && l < f->layers; l++) {
        ops->free(f->backend, f->view.flat_k[l]);
        ops->free(f->backend, f->view.flat_v[l]);
    }
    free((void *)f->view.flat_k);
    free((void *)f->view.flat_v);
    free((void *)f->view.flat_segment_begin);
    for (uint32_t l = 0; f->q && l < f->layers; l++) {
        free(f->q[l]);
        free(f->steady[l]);
    }
    for (size_t p = 0; f->k && p < pairs; p++) {
        free(f->k[p]);
        free(f->v[p]);
    }
    free(f->q);
    free(f->steady);
    free(f->k);
    free(f->v);
    free(f->dead);
    free(f->memory);
    free(f->memory_bytes);
    free(f->views);
    free(f->extent_begin);
    free(f->segment_begin);
    free(f->step_begin);
    if (ops && f->stream) ops->stream_close(f->backend, f->stream);
    loci_backend_close(f->backend);
    *f = (fixture){0};
}

const uint8_t *fixture_blob(const fixture *f, uint32_t layer, uint32_t extent, uint32_t kv_head) {
    return f->memory[extent] + f->views[extent].pair_at[layer * f->kv_heads + kv_head];
}

const loci_leaf *fixture_leaf(const uint8_t *blob, uint32_t index, uint32_t *root) {
    uint32_t r = 0;
    while (loci_pair_root(blob, r)->begin + loci_pair_root(blob, r)->count <= index) r++;
    if (root) *root = r;
    const loci_root *at = loci_pair_root(blob, r);
    return loci_root_leaves(blob, at) + (index - at->begin);
}

uint32_t fixture_position(const fixture *f, uint32_t layer, uint32_t extent, uint32_t kv_head,
                          uint32_t slot) {
    const uint8_t *blob = fixture_blob(f, layer, extent, kv_head);
    const loci_root *root = loci_pair_root(blob, 0);
    for (uint32_t first = 0; first + root->tokens <= slot; root++) first += root->tokens;
    const loci_leaf *leaf = loci_root_leaves(blob, root);
    while (leaf->begin + leaf->count <= slot) leaf++;
    uint32_t word = loci_slot_word(blob, slot);
    return f->segment_begin[f->views[extent].segment_base + LOCI_SLOT_SEGMENT(word)] +
           LOCI_SLOT_OFFSET(word);
}

/* --- look-ups -------------------------------------------------------------------------- */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void enqueue(const fixture *f, loci_lookup *lookup, fixture_run *run, loci_ref q,
                    loci_ref steady, loci_ref out, loci_ref lse) {
    const loci_backend_ops *ops = f->backend->ops;
    uint64_t t[5];
    t[0] = now_ns();
    ops->lookup_begin(f->stream, lookup, &f->view, run->layer, q, f->q_heads * f->dim, run->rows,
                      f->q_heads, 1.0f / sqrtf((float)f->dim), steady, &run->params);
    ops->score_nodes(f->stream, lookup);
    t[1] = now_ns();
    ops->score_codes(f->stream, lookup);
    t[2] = now_ns();
    ops->select(f->stream, lookup);
    t[3] = now_ns();
    ops->attend_sparse(f->stream, lookup, out, f->q_heads * f->dim, lse);
    t[4] = now_ns();
    for (int i = 0; i < 4; i++) run->ns[i] = t[i + 1] - t[i];
}

/* The masses of all segments; steady has done its work and takes the totals. */
static void attribute(const fixture *f, loci_lookup *lookup, const fixture_run *run, loci_ref total,
                      loci_ref mass) {
    const loci_backend_ops *ops = f->backend->ops;
    uint32_t masses = run->params.each ? run->rows : 1;
    size_t one = f->segments * sizeof *run->mass, bytes = masses * one;
    loci_ref each[LOCI_GEMM_FEW_ROWS] = {0};
    memset(run->mass, 0, bytes);
    ops->upload(f->stream, total, run->total, (size_t)run->rows * f->q_heads * sizeof *run->total);
    ops->upload(f->stream, mass, run->mass, bytes);
    for (uint32_t i = 0; run->params.each && i < masses; i++)
        if (!(run->unasked >> i & 1)) each[i] = loci_ref_at(mass.buffer, mass.offset + i * one);
    if (run->params.each)
        ops->attribute_each(f->stream, lookup, total, each);
    else
        ops->attribute(f->stream, lookup, total, run->row_begin, mass);
    ops->download(f->stream, run->mass, mass, bytes);
}

loci_status fixture_look_up(const fixture *f, fixture_run *run, loci_error *err) {
    const loci_backend_ops *ops = f->backend->ops;
    size_t lse_bytes = (size_t)run->rows * f->q_heads * sizeof(float), q_bytes = lse_bytes * f->dim;
    loci_buffer *buffer = NULL;
    loci_lookup *lookup = NULL;
    loci_status status;
    LOCI_TRY(ops->lookup_create(f->backend, &lookup, err));
    uint32_t masses = !run->mass ? 0 : run->params.each ? run->rows : 1;
    size_t mass_bytes = masses * f->segments * sizeof *run->mass;
    LOCI_TRY_GOTO(ops->alloc(f->backend, 2 * (q_bytes + lse_bytes) + mass_bytes, &buffer, err),
                  out);
    loci_ref q = loci_ref_at(buffer, 0), out_ref = loci_ref_at(buffer, q_bytes);
    loci_ref steady = loci_ref_at(buffer, 2 * q_bytes);
    loci_ref lse = loci_ref_at(buffer, 2 * q_bytes + lse_bytes);
    ops->upload(f->stream, q, run->q, q_bytes);
    ops->upload(f->stream, steady, run->steady, lse_bytes);
    memset(run->out, 0xff, q_bytes); /* NaN, for every value is written */
    memset(run->lse, 0xff, lse_bytes);
    ops->upload(f->stream, out_ref, run->out, q_bytes);
    ops->upload(f->stream, lse, run->lse, lse_bytes);
    enqueue(f, lookup, run, q, steady, out_ref, lse);
    ops->download(f->stream, run->out, out_ref, q_bytes);
    ops->download(f->stream, run->lse, lse, lse_bytes);
    if (run->mass)
        attribute(f, lookup, run, steady, loci_ref_at(buffer, 2 * (q_bytes + lse_bytes)));
    ops->lookup_stats(f->stream, lookup, &run->stats);
    run->selected_count = 0;
    run->selected = NULL;
    if (run->want_selected) {
        ops->lookup_selected(f->stream, lookup, NULL, 0, &run->selected_count);
        run->selected = need(malloc((run->selected_count + 1) * sizeof *run->selected));
        ops->lookup_selected(f->stream, lookup, run->selected, run->selected_count,
                             &run->selected_count);
    }
    status = ops->sync(f->stream, err);
out:
    ops->lookup_free(f->backend, lookup);
    ops->free(f->backend, buffer);
    return status;
}
