/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention over the extents of a corpus, and the share of its segments.
 *
 * All live tokens are read, so they are taken as they lie: a pair's slots are K and V side by side,
 * which the kernels of dense attention read in place (tokens of a pair with dead ones are gathered
 * first). A task is a chunk of slots of one pair; it verifies the hashes of what it then reads from
 * the cache. Chunks are joined in their order, so that results do not depend on threads. The logits
 * of a few query vectors are kept, where there is memory: attribution then need not read the keys
 * again.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/kernels.h"
#include "attention/cpu/lookup.h"

#define ROWS_MAX 48u /* of a kernel's call; see TASK_ROWS in dense.c */
/* Up to here chunks are small, for threads and caches; many vectors have long ones, since each
 * chunk has a result of its own for every vector. */
#define FEW_VECTORS 16u
#define PREFETCH_SLOTS 16u             /* ahead of the hash, which waits for memory else */
#define LOGITS_MOST ((size_t)64 << 20) /* bytes of logits that are kept */
#define CHUNK_FEW 512u
#define CHUNK_MANY 4096u

typedef struct dense_chunk {
    lookup_part *part;   /* the first of its pair */
    uint32_t begin, end; /* slots */
    uint32_t live;
    uint32_t bad;           /* first slot with a wrong hash, else UINT32_MAX */
    float *max, *sum, *out; /* [vectors], [vectors], [vectors][dim] */
    float *logits;          /* [vectors][live], or NULL */
} dense_chunk;

struct corpus_job {
    loci_lookup *lookup;
    dense_chunk *chunks;
    size_t chunk_count;
    size_t *pair_chunk; /* [pairs + 1] */
    float *out, *lse;
    uint32_t out_stride;
    const float *total_lse;
    uint32_t row_begin;
    double **mass; /* [pairs][segments of the extent] */
    bool kept;     /* the chunks have their logits */
    _Atomic bool failed;
};
typedef struct corpus_job corpus_job;

static bool is_live(const lookup_part *part, uint32_t slot) {
    return !part->live || (part->live[slot / 64] >> slot % 64 & 1);
}

static uint32_t count_live(const lookup_part *part, uint32_t begin, uint32_t end) {
    uint32_t live = 0;
    if (!part->live) return end - begin;
    for (uint32_t slot = begin; slot < end; slot++) live += is_live(part, slot);
    return live;
}

/* --- attention ------------------------------------------------------------------------- */

/* K and V of the chunk's live slots, verified, one after another: in place when all are live. */
static const uint16_t *take_kv(dense_chunk *chunk, uint32_t dim, uint16_t *gathered) {
    const uint8_t *blob = chunk->part->blob;
    bool whole = chunk->live == chunk->end - chunk->begin;
    size_t at = 0;
    for (uint32_t slot = chunk->begin; slot < chunk->end; slot++) {
        if (!whole && !is_live(chunk->part, slot)) continue;
        const uint8_t *ahead = (const uint8_t *)loci_slot_kv(blob, slot + PREFETCH_SLOTS);
        for (uint32_t i = 0; slot + PREFETCH_SLOTS < chunk->end && i < 4 * dim; i += 64)
            __builtin_prefetch(ahead + i);
        if (!loci_slot_check_kv(blob, slot)) {
            chunk->bad = slot;
            return NULL;
        }
        if (!whole) memcpy(gathered + 2 * dim * at++, loci_slot_kv(blob, slot), 4 * (size_t)dim);
    }
    return whole ? loci_slot_kv(blob, chunk->begin) : gathered;
}

static void attend_chunk(void *arg, size_t index, unsigned thread) {
    corpus_job *job = arg;
    loci_lookup *lookup = job->lookup;
    dense_chunk *chunk = &job->chunks[index];
    uint32_t dim = lookup->dim, slots = chunk->end - chunk->begin;
    size_t tile = (size_t)LOCI_DENSE_KEYS * dim, logits = (size_t)ROWS_MAX * LOCI_DENSE_KEYS;
    size_t floats = 2 * tile + logits + 2 * ROWS_MAX + (size_t)slots * dim;
    float *scratch =
        loci_cpu_scratch_get(&lookup->cpu->thread_scratch[thread], floats * sizeof(float));
    if (!scratch) {
        job->failed = true;
        return;
    }
    uint32_t *first = (uint32_t *)(void *)(scratch + 2 * tile + logits), *last = first + ROWS_MAX;
    const uint16_t *kv = take_kv(chunk, dim, (uint16_t *)(void *)(last + ROWS_MAX));
    if (!kv) return;
    for (uint32_t i = 0; i < ROWS_MAX; i++) {
        first[i] = 0;
        last[i] = chunk->live;
    }
    const float *q = lookup->q + (size_t)chunk->part->kv_head * lookup->vectors * dim;
    for (uint32_t v = 0; v < lookup->vectors; v += ROWS_MAX) {
        loci_dense_job dense = {
            .q = q + (size_t)v * dim,
            .rows = lookup->vectors - v < ROWS_MAX ? lookup->vectors - v : ROWS_MAX,
            .head_dim = dim,
            .k = kv,
            .v = kv + dim,
            .kv_stride = 2 * (size_t)dim,
            .kv_bf16 = true,
            .key_end = chunk->live,
            .first = first,
            .last = last,
            .k_tile = scratch,
            .v_tile = scratch + tile,
            .logits = scratch + 2 * tile,
            .keep = chunk->logits ? chunk->logits + (size_t)v * chunk->live : NULL,
            .out = chunk->out + (size_t)v * dim,
            .max = chunk->max + v,
            .sum = chunk->sum + v,
        };
        const loci_cpu_kernels *kernels = lookup->cpu->kernels;
        if (dim % kernels->dense_multiple != 0) kernels = &loci_cpu_kernels_portable;
        kernels->dense(&dense);
    }
}

/* Joins the chunks of one query vector of one KV head. */
static void join_vector(void *arg, size_t index, unsigned thread) {
    (void)thread;
    corpus_job *job = arg;
    const loci_lookup *lookup = job->lookup;
    uint32_t dim = lookup->dim, h = (uint32_t)(index / lookup->vectors);
    uint32_t v = (uint32_t)(index % lookup->vectors), row = v / lookup->group;
    uint32_t head = h * lookup->group + v % lookup->group;
    float *out = job->out + (size_t)row * job->out_stride + (size_t)head * dim;
    float max = -INFINITY, sum = 0.0f;
    memset(out, 0, dim * sizeof *out);
    for (size_t c = 0; c < job->chunk_count; c++)
        if (job->chunks[c].part->kv_head == h) max = fmaxf(max, job->chunks[c].max[v]);
    for (size_t c = 0; c < job->chunk_count && max > -INFINITY; c++) {
        const dense_chunk *chunk = &job->chunks[c];
        if (chunk->part->kv_head != h) continue;
        float weight = expf(chunk->max[v] - max);
        sum += chunk->sum[v] * weight;
        lookup->kernels->axpy(out, chunk->out + (size_t)v * dim, dim, weight);
    }
    for (uint32_t i = 0; i < dim && sum > 0.0f; i++) out[i] /= sum;
    job->lse[(size_t)row * lookup->q_heads + head] = sum > 0.0f ? max + logf(sum) : -INFINITY;
}

/* For so many tokens; NULL where they are not kept: of many vectors, or where memory is short. */
static float *alloc_logits(loci_lookup *lookup, size_t tokens) {
    size_t bytes = tokens * lookup->vectors * sizeof(float);
    if (lookup->vectors > FEW_VECTORS || bytes > LOGITS_MOST) return NULL;
    const lookup_arena before = lookup->arena;
    float *logits = lookup_alloc(lookup, bytes);
    if (logits) return logits;
    lookup->arena.refusal.status = LOCI_OK; /* it can do without */
    lookup->arena.current = before.current;
    lookup->arena.used = before.used;
    return NULL;
}

/* Cuts the pairs; chunks without a live slot are left out. False when memory is short. */
static bool cut_chunks(corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads, most = 0, live = 0;
    uint32_t step = lookup->vectors <= FEW_VECTORS ? CHUNK_FEW : CHUNK_MANY;
    for (size_t p = 0; p < pairs; p++)
        most += loci_pair_header_of(lookup_first_part(lookup, p)->blob)->tokens / step + 1;
    job->chunks = lookup_alloc(lookup, most * sizeof *job->chunks);
    job->pair_chunk = lookup_alloc(lookup, (pairs + 1) * sizeof *job->pair_chunk);
    if (!job->chunks || !job->pair_chunk) return false;
    for (size_t p = 0; p < pairs; p++) {
        lookup_part *part = lookup_first_part(lookup, p);
        uint32_t tokens = loci_pair_header_of(part->blob)->tokens;
        job->pair_chunk[p] = job->chunk_count;
        for (uint32_t slot = 0; slot < tokens; slot += step) {
            dense_chunk chunk = {.part = part, .begin = slot, .bad = UINT32_MAX};
            chunk.end = tokens - slot < step ? tokens : slot + step;
            chunk.live = count_live(part, chunk.begin, chunk.end);
            if (chunk.live > 0) job->chunks[job->chunk_count++] = chunk;
            live += chunk.live;
        }
    }
    job->pair_chunk[pairs] = job->chunk_count;
    size_t vectors = lookup->vectors, result = vectors * (lookup->dim + 2);
    float *at = lookup_alloc(lookup, job->chunk_count * result * sizeof *at);
    if (!at) return false;
    float *logits = alloc_logits(lookup, live);
    job->kept = logits != NULL;
    memset(at, 0, job->chunk_count * result * sizeof *at);
    for (size_t c = 0; c < job->chunk_count; c++, at += result) {
        dense_chunk *chunk = &job->chunks[c];
        chunk->max = at;
        chunk->sum = at + vectors;
        chunk->out = at + 2 * vectors;
        for (size_t v = 0; v < vectors; v++) chunk->max[v] = -INFINITY;
        if (!logits) continue;
        chunk->logits = logits;
        logits += chunk->live * vectors;
    }
    return true;
}

/* Bytes read, and the first damage of each pair. */
static void count_bytes(const corpus_job *job) {
    size_t token = 4 * (size_t)job->lookup->dim;
    for (size_t c = 0; c < job->chunk_count; c++) {
        const dense_chunk *chunk = &job->chunks[c];
        loci_lookup_stats *stats = &chunk->part->stats;
        if (chunk->bad != UINT32_MAX) lookup_fault(chunk->part, "KV of slot", chunk->bad);
        stats->hash_bytes += chunk->live * sizeof(uint64_t);
        stats->kv_bytes += chunk->live * token;
    }
    size_t pairs = (size_t)job->lookup->corpus->extent_count * job->lookup->kv_heads;
    for (size_t p = 0; p < pairs; p++) {
        lookup_part *part = lookup_first_part(job->lookup, p);
        for (uint32_t r = 0; r < loci_pair_header_of(part->blob)->roots; r++) {
            const loci_root *root = loci_pair_root(part->blob, r);
            const loci_leaf *leaf = loci_root_leaves(part->blob, root);
            for (uint32_t l = 0; l < root->count; l++)
                if (lookup_live_bits(part->live, leaf[l].begin, leaf[l].count))
                    part->stats.kv_leaf_bytes += leaf[l].count * token;
        }
    }
}

static void attend_whole(loci_stream *stream, corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    loci_pool *pool = lookup->cpu->pool;
    if (!cut_chunks(job)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    loci_pool_run(pool, job->chunk_count, attend_chunk, job);
    if (job->failed) {
        lookup_no_memory(stream, lookup);
        return;
    }
    count_bytes(job);
    if (!lookup_report(stream, lookup)) return;
    loci_pool_run(pool, (size_t)lookup->kv_heads * lookup->vectors, join_vector, job);
    lookup->attended = true;
}

void loci_cpu_attend_corpus(loci_stream *stream, loci_lookup *lookup, loci_ref out,
                            uint32_t out_stride, loci_ref lse) {
    lookup->dense = NULL;
    if (lookup->mode != LOCI_MODE_DENSE || !lookup->ready || !lookup->tokens_selected) {
        loci_cpu_attend_sparse(stream, lookup, out, out_stride, lse);
        return;
    }
    size_t last = (size_t)(lookup->rows - 1) * out_stride + (size_t)lookup->q_heads * lookup->dim;
    corpus_job *job = lookup_alloc(lookup, sizeof *job);
    if (!job) {
        lookup_no_memory(stream, lookup);
        return;
    }
    memset(job, 0, sizeof *job);
    job->lookup = lookup;
    job->out = loci_cpu_ptr(out, last * sizeof(float));
    job->out_stride = out_stride;
    job->lse = loci_cpu_ptr(lse, (size_t)lookup->rows * lookup->q_heads * sizeof(float));
    attend_whole(stream, job);
    if (lookup->attended && job->kept) lookup->dense = job;
}

/* --- attribution ----------------------------------------------------------------------- */

/* weights [live]: of the chunk's tokens, summed over rows from row_begin on and query heads. */
static void weigh(const corpus_job *job, const dense_chunk *chunk, float *weights, float *some) {
    const loci_lookup *lookup = job->lookup;
    memset(weights, 0, chunk->live * sizeof *weights);
    for (uint32_t v = job->row_begin * lookup->group; v < lookup->vectors; v++) {
        uint32_t head = chunk->part->kv_head * lookup->group + v % lookup->group;
        float total = job->total_lse[(size_t)(v / lookup->group) * lookup->q_heads + head];
        const float *logits = chunk->logits + (size_t)v * chunk->live;
        lookup->kernels->exp_sub(some, logits, chunk->live, total);
        for (uint32_t i = 0; i < chunk->live; i++) weights[i] += some[i];
    }
}

/* One pair; its records name the segments. */
static void attribute_pair(void *arg, size_t index, unsigned thread) {
    (void)thread;
    corpus_job *job = arg;
    const lookup_part *part = lookup_first_part(job->lookup, index);
    float weights[CHUNK_FEW], some[CHUNK_FEW];
    for (size_t c = job->pair_chunk[index]; c < job->pair_chunk[index + 1]; c++) {
        dense_chunk *chunk = &job->chunks[c];
        const float *at = weights;
        weigh(job, chunk, weights, some);
        for (uint32_t slot = chunk->begin; slot < chunk->end; slot++) {
            if (!is_live(part, slot)) continue;
            if (!loci_slot_check_record(part->blob, slot)) {
                chunk->bad = slot;
                return;
            }
            uint32_t segment = LOCI_SLOT_SEGMENT(loci_slot_word(part->blob, slot));
            if (segment < part->extent->segments) job->mass[index][segment] += (double)*at;
            at++;
        }
    }
}

static bool place_mass(corpus_job *job, size_t pairs) {
    loci_lookup *lookup = job->lookup;
    job->mass = lookup_alloc(lookup, pairs * sizeof *job->mass);
    for (size_t p = 0; job->mass && p < pairs; p++) {
        size_t bytes = lookup_first_part(lookup, p)->extent->segments * sizeof(double);
        job->mass[p] = lookup_alloc(lookup, bytes);
        if (!job->mass[p]) return false;
        memset(job->mass[p], 0, bytes);
    }
    return job->mass != NULL;
}

static void attribute_whole(loci_stream *stream, corpus_job *job, float *mass) {
    loci_lookup *lookup = job->lookup;
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads;
    if (!place_mass(job, pairs)) {
        lookup_no_memory(stream, lookup);
        return;
    }
    loci_pool_run(lookup->cpu->pool, pairs, attribute_pair, job);
    for (size_t c = 0; c < job->chunk_count; c++)
        if (job->chunks[c].bad != UINT32_MAX)
            lookup_fault(job->chunks[c].part, "record of slot", job->chunks[c].bad);
    if (!lookup_report(stream, lookup)) return;
    for (size_t p = 0; p < pairs; p++) {
        const loci_extent_view *extent = lookup_first_part(lookup, p)->extent;
        for (uint32_t s = 0; s < extent->segments; s++)
            mass[extent->segment_base + s] += (float)job->mass[p][s];
    }
}

void loci_cpu_attribute_corpus(loci_stream *stream, loci_lookup *lookup, loci_ref total_lse,
                               uint32_t row_begin, loci_ref mass) {
    corpus_job *job = lookup->dense;
    if (!job || !lookup->ready || !lookup->attended) {
        loci_cpu_attribute(stream, lookup, total_lse, row_begin, mass);
        return;
    }
    const loci_corpus_view *corpus = lookup->corpus;
    size_t segments = (size_t)corpus->flat_segment_base + corpus->flat_segments;
    job->total_lse =
        loci_cpu_ptr(total_lse, (size_t)lookup->rows * lookup->q_heads * sizeof(float));
    job->row_begin = row_begin;
    attribute_whole(stream, job, loci_cpu_ptr(mass, segments * sizeof(float)));
    if (!lookup->ready) return;
    /* The flat part, as for every mode. */
    loci_corpus_view flat = *corpus;
    flat.extent_count = 0;
    lookup->corpus = &flat;
    loci_cpu_attribute(stream, lookup, total_lse, row_begin, mass);
    lookup->corpus = corpus;
}
