/* SPDX-License-Identifier: Apache-2.0
 *
 * Dense attention over the extents of a corpus, or over what a single row selected in them, and the
 * share of its segments.
 *
 * All live tokens are read, so they are taken as they lie: a pair's slots are K and V side by side,
 * which the kernels of dense attention read in place (tokens of a pair with dead ones are gathered
 * first). A task is a chunk of slots of one pair; it verifies the hashes of what it then reads from
 * the cache. Chunks are joined in their order, so that results do not depend on threads. The
 * weights of a few query vectors are kept, where there is memory: attribution then need not read
 * the keys again.
 *
 * What one row selected is a list of slots that all vectors of its KV head have in common. Its
 * tokens are verified one by one, copied together and then taken like those of mode dense.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/kernels.h"
#include "attention/cpu/lookup.h"

#define ROWS_MAX 48u /* of a kernel's call; see TASK_ROWS in dense.c */
/* Up to here chunks are small, for threads and caches; many vectors have long ones, since each
 * chunk has a result of its own for every vector. */
#define FEW_VECTORS 16u
#define PREFETCH_SLOTS 16u           /* ahead of the hash, which waits for memory else */
#define KEPT_MOST ((size_t)64 << 20) /* bytes of weights that are kept */
#define CHUNK_FEW 512u
#define CHUNK_MANY 4096u
#define CHUNK_LISTED 512u   /* at the beginning of each, nothing is under way */
#define PREFETCH_LISTED 64u /* ahead: each is in another page, which takes long to find */

typedef struct dense_chunk {
    lookup_part *part;     /* the first of its pair */
    uint32_t begin, end;   /* slots */
    const uint32_t *slots; /* [live] the selected ones, or NULL: all that live */
    uint32_t live;
    uint32_t bad;           /* first slot with a wrong hash, else UINT32_MAX */
    const char *bad_part;   /* of it */
    float *max, *sum, *out; /* [vectors], [vectors], [vectors][dim] */
    float *weights;         /* [vectors][live] as the kernel keeps them, or NULL */
    float *weight_max;      /* [vectors][tiles] */
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
    double **mass;    /* [pairs][segments of the extent] */
    float *flat_mass; /* [flat segments] */
    bool listed;      /* the chunks have lists of slots */
    bool kept;        /* the chunks have their weights */
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

static bool fault(dense_chunk *chunk, const char *what, uint32_t slot) {
    chunk->bad_part = what;
    chunk->bad = slot;
    return false;
}

/* Inlined, as below: gcc drops calls of what does nothing but prefetch. */
static inline __attribute__((always_inline)) void prefetch_kv(const uint8_t *blob, uint32_t slot) {
    const uint8_t *row = loci_slot_kv(blob, slot);
    size_t stride = loci_pair_kv_stride(blob);
    for (size_t i = 0; i < stride; i += 64) __builtin_prefetch(row + i);
}

/* K and V of the live slots from first on, one by one. */
static bool check_slots(dense_chunk *chunk, uint32_t first, uint32_t end) {
    const uint8_t *blob = chunk->part->blob;
    for (uint32_t slot = first; slot < end; slot++) {
        if (slot + PREFETCH_SLOTS < end) prefetch_kv(blob, slot + PREFETCH_SLOTS);
        if (is_live(chunk->part, slot) && !loci_slot_check_kv(blob, slot))
            return fault(chunk, "KV of slot", slot);
    }
    return true;
}

/* The same by the hash of their block. Where that is wrong, some slot is damaged, and it is an
 * error unless it is a dead one; else it is that hash. */
static bool check_block(dense_chunk *chunk, uint32_t block, uint32_t first, uint32_t end) {
    const uint8_t *blob = chunk->part->blob;
    if (loci_kv_block_hash(blob, block) == loci_pair_kv_block(blob, block)->hash_kv) return true;
    if (!check_slots(chunk, first, end)) return false;
    for (uint32_t slot = first; slot < end; slot++)
        if (!is_live(chunk->part, slot) && !loci_slot_check_kv(blob, slot)) return true;
    return fault(chunk, "hash of the KV block of slot", first);
}

/* K, V and hash of a listed slot on their way to the cache. */
static inline __attribute__((always_inline)) void prefetch_listed(const dense_chunk *chunk,
                                                                  uint32_t i) {
    if (i >= chunk->live) return;
    const uint8_t *blob = chunk->part->blob;
    __builtin_prefetch(loci_slot_kv_hash(blob, chunk->slots[i]));
    prefetch_kv(blob, chunk->slots[i]);
}

/* K and V of the listed slots, verified and copied together. */
static const uint8_t *take_listed(const loci_corpus_kernels *kernels, dense_chunk *chunk,
                                  uint8_t *gathered) {
    const uint8_t *blob = chunk->part->blob;
    size_t stride = loci_pair_kv_stride(blob);
    for (uint32_t i = 0; i < PREFETCH_LISTED; i++) prefetch_listed(chunk, i);
    for (uint32_t i = 0; i < chunk->live; i++) {
        uint32_t slot = chunk->slots[i];
        prefetch_listed(chunk, i + PREFETCH_LISTED);
        const void *row = loci_slot_kv(blob, slot);
        uint64_t hash = loci_slot_hash(blob, slot, kernels->hash(row, stride));
        if (hash != *loci_slot_kv_hash(blob, slot)) {
            (void)fault(chunk, "KV of slot", slot);
            return NULL;
        }
        memcpy(gathered + i * stride, row, stride);
    }
    return gathered;
}

/* K and V of the chunk's slots, verified, one after another: in place when all are live. */
static const uint8_t *take_kv(const loci_corpus_kernels *kernels, dense_chunk *chunk,
                              uint8_t *gathered) {
    const uint8_t *blob = chunk->part->blob;
    if (chunk->slots) return take_listed(kernels, chunk, gathered);
    bool blocks = loci_pair_has_kv_blocks(blob);
    for (uint32_t first = chunk->begin; first < chunk->end; first += LOCI_KV_BLOCK) {
        uint32_t left = chunk->end - first;
        uint32_t end = left < LOCI_KV_BLOCK ? chunk->end : first + LOCI_KV_BLOCK;
        if (!(blocks ? check_block(chunk, first / LOCI_KV_BLOCK, first, end)
                     : check_slots(chunk, first, end)))
            return NULL;
    }
    if (chunk->live == chunk->end - chunk->begin) return loci_slot_kv(blob, chunk->begin);
    size_t stride = loci_pair_kv_stride(blob);
    uint8_t *to = gathered;
    for (uint32_t slot = chunk->begin; slot < chunk->end; slot++) {
        if (!is_live(chunk->part, slot)) continue;
        memcpy(to, loci_slot_kv(blob, slot), stride);
        to += stride;
    }
    return gathered;
}

static void attend_chunk(void *arg, size_t index, unsigned thread) {
    corpus_job *job = arg;
    loci_lookup *lookup = job->lookup;
    dense_chunk *chunk = &job->chunks[index];
    uint32_t dim = lookup->dim, slots = chunk->slots ? chunk->live : chunk->end - chunk->begin;
    size_t tile = (size_t)LOCI_DENSE_KEYS * dim, logits = (size_t)ROWS_MAX * LOCI_DENSE_KEYS;
    loci_dtype type = (loci_dtype)loci_pair_header_of(chunk->part->blob)->kv_dtype;
    size_t stride = loci_kv_stride(dim, type), row = type == LOCI_I8 ? dim : 2 * (size_t)dim;
    size_t bytes = (2 * tile + logits + 2 * ROWS_MAX) * sizeof(float) + slots * stride;
    float *scratch = loci_cpu_scratch_get(&lookup->cpu->thread_scratch[thread], bytes);
    if (!scratch) {
        job->failed = true;
        return;
    }
    uint32_t *first = (uint32_t *)(void *)(scratch + 2 * tile + logits), *last = first + ROWS_MAX;
    const uint8_t *kv = take_kv(lookup->kernels, chunk, (uint8_t *)(last + ROWS_MAX));
    if (!kv) return;
    for (uint32_t i = 0; i < ROWS_MAX; i++) {
        first[i] = 0;
        last[i] = chunk->live;
    }
    const float *q = lookup->q + (size_t)chunk->part->kv_head * lookup->vectors * dim;
    size_t next = index + loci_pool_threads(lookup->cpu->pool), ahead_bytes = 0;
    const uint8_t *ahead = NULL;
    if (!chunk->slots && next < job->chunk_count) {
        const dense_chunk *then = &job->chunks[next];
        ahead = loci_slot_kv(then->part->blob, then->begin);
        ahead_bytes = (then->end - then->begin) * stride;
    }
    for (uint32_t v = 0; v < lookup->vectors; v += ROWS_MAX) {
        loci_dense_job dense = {
            .q = q + (size_t)v * dim,
            .rows = lookup->vectors - v < ROWS_MAX ? lookup->vectors - v : ROWS_MAX,
            .head_dim = dim,
            .k = kv,
            .v = kv + row,
            .kv_stride = type == LOCI_I8 ? stride : stride / sizeof(uint16_t),
            .kv_dtype = type,
            .key_end = chunk->live,
            .first = first,
            .last = last,
            .k_tile = scratch,
            .v_tile = scratch + tile,
            .logits = scratch + 2 * tile,
            .keep = chunk->weights, /* of so few vectors that there is one turn */
            .keep_max = chunk->weight_max,
            .ahead = v + ROWS_MAX >= lookup->vectors ? ahead : NULL, /* once */
            .ahead_bytes = ahead_bytes,
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

static uint32_t tiles_of(const dense_chunk *chunk) {
    return (chunk->live + LOCI_DENSE_KEYS - 1) / LOCI_DENSE_KEYS;
}

/* Room for the weights of all chunks; none where they are not kept: of many vectors, or where
 * memory is short. Those of a limited row, which has no masks to find its tokens by again, are kept
 * in any case: false where there is no memory for them. */
static bool place_weights(corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    size_t floats = 0, vectors = lookup->vectors;
    for (size_t c = 0; c < job->chunk_count; c++)
        floats += vectors * (job->chunks[c].live + tiles_of(&job->chunks[c]));
    bool needed = lookup_limited(lookup);
    if (!needed && (vectors > FEW_VECTORS || floats * sizeof(float) > KEPT_MOST)) return true;
    const lookup_arena before = lookup->arena;
    float *at = lookup_alloc(lookup, floats * sizeof *at);
    if (!at && needed) return false;
    if (!at) { /* it can do without */
        lookup->arena.refusal.status = LOCI_OK;
        lookup->arena.current = before.current;
        lookup->arena.used = before.used;
        return true;
    }
    job->kept = true;
    for (size_t c = 0; c < job->chunk_count; c++) {
        dense_chunk *chunk = &job->chunks[c];
        chunk->weights = at;
        chunk->weight_max = at + vectors * chunk->live;
        at = chunk->weight_max + vectors * tiles_of(chunk);
    }
    return true;
}

/* Room for as many chunks of the pairs. */
static bool place_chunks(corpus_job *job, size_t pairs, size_t most) {
    loci_lookup *lookup = job->lookup;
    job->chunks = lookup_alloc(lookup, most * sizeof *job->chunks);
    job->pair_chunk = lookup_alloc(lookup, (pairs + 1) * sizeof *job->pair_chunk);
    return job->chunks && job->pair_chunk;
}

/* Cuts the pairs; chunks without a live slot are left out. False when memory is short. */
static bool cut_chunks(corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads, most = 0;
    uint32_t step = lookup->vectors <= FEW_VECTORS ? CHUNK_FEW : CHUNK_MANY;
    for (size_t p = 0; p < pairs; p++)
        most += loci_pair_header_of(lookup_first_part(lookup, p)->blob)->tokens / step + 1;
    if (!place_chunks(job, pairs, most)) return false;
    for (size_t p = 0; p < pairs; p++) {
        lookup_part *part = lookup_first_part(lookup, p);
        uint32_t tokens = loci_pair_header_of(part->blob)->tokens;
        job->pair_chunk[p] = job->chunk_count;
        for (uint32_t slot = 0; slot < tokens; slot += step) {
            dense_chunk chunk = {.part = part, .begin = slot, .bad = UINT32_MAX};
            chunk.end = tokens - slot < step ? tokens : slot + step;
            chunk.live = count_live(part, chunk.begin, chunk.end);
            if (chunk.live > 0) job->chunks[job->chunk_count++] = chunk;
        }
    }
    job->pair_chunk[pairs] = job->chunk_count;
    return true;
}

/* How many the row selected in a pair whose parts have lists. */
static uint32_t count_listed(const loci_lookup *lookup, size_t pair) {
    size_t n = 0;
    for (size_t p = lookup->pair_begin[pair]; p < lookup->pair_begin[pair + 1]; p++) {
        lookup_part *part = &lookup->parts[p];
        size_t count = part->list_end - part->list_begin;
        part->stats.kv_leaf_bytes += count * loci_pair_kv_stride(part->blob);
        n += count;
    }
    return (uint32_t)n;
}

/* The same by its masks, from its entry *at on. */
static uint32_t count_selected(lookup_part *part, const lookup_head *head, size_t *at) {
    uint32_t n = 0, leaf_tokens = 0;
    uint32_t end = part->root_base + loci_pair_header_of(part->blob)->roots;
    for (; *at < head->row_begin[1] && head->row_kept[*at].root < end; (*at)++) {
        const lookup_kept *kept = &head->row_kept[*at];
        const loci_leaf *leaves = lookup_leaves(head, kept->root);
        const uint32_t *mask = head->token_mask + head->mask_at[kept->entry];
        for (uint64_t left = head->leaf_mask[kept->entry]; left; left &= left - 1, mask++) {
            n += lookup_count_bits(*mask);
            leaf_tokens += *mask ? leaves[__builtin_ctzll(left)].count : 0;
        }
    }
    part->stats.kv_leaf_bytes += leaf_tokens * loci_pair_kv_stride(part->blob);
    return n;
}

/* Cuts what a single row selected. False when memory is short. */
static bool cut_selected(corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    size_t pairs = (size_t)lookup->corpus->extent_count * lookup->kv_heads, most = pairs;
    size_t *at = lookup_alloc(lookup, 2 * lookup->kv_heads * sizeof *at);
    if (!at) return false;
    size_t *listed = at + lookup->kv_heads; /* of the KV head's list */
    memset(at, 0, 2 * lookup->kv_heads * sizeof *at);
    for (uint32_t h = 0; h < lookup->kv_heads; h++) {
        const lookup_head *head = &lookup->heads[h];
        most += head->listed / CHUNK_LISTED;
    }
    if (!place_chunks(job, pairs, most)) return false;
    for (size_t p = 0; p < pairs; p++) { /* of a KV head, they follow each other as its roots do */
        lookup_part *part = lookup_first_part(lookup, p);
        uint32_t h = part->kv_head, n = lookup_limited(lookup)
                                            ? count_listed(lookup, p)
                                            : count_selected(part, &lookup->heads[h], &at[h]);
        job->pair_chunk[p] = job->chunk_count;
        for (uint32_t i = 0; i < n; i += CHUNK_LISTED)
            job->chunks[job->chunk_count++] =
                (dense_chunk){.part = part,
                              .slots = lookup->heads[h].slots + listed[h] + i,
                              .live = n - i < CHUNK_LISTED ? n - i : CHUNK_LISTED,
                              .bad = UINT32_MAX};
        listed[h] += n;
    }
    job->pair_chunk[pairs] = job->chunk_count;
    return true;
}

/* Where the chunks' results go. */
static bool place_results(corpus_job *job) {
    loci_lookup *lookup = job->lookup;
    size_t vectors = lookup->vectors, result = vectors * (lookup->dim + 2);
    float *at = lookup_alloc(lookup, job->chunk_count * result * sizeof *at);
    if (!at) return false;
    memset(at, 0, job->chunk_count * result * sizeof *at);
    for (size_t c = 0; c < job->chunk_count; c++, at += result) {
        dense_chunk *chunk = &job->chunks[c];
        chunk->max = at;
        chunk->sum = at + vectors;
        chunk->out = at + 2 * vectors;
        for (size_t v = 0; v < vectors; v++) chunk->max[v] = -INFINITY;
    }
    return place_weights(job);
}

/* Hashes that were read to verify the chunk. */
static uint32_t hashes_of(const dense_chunk *chunk) {
    return !chunk->slots && loci_pair_has_kv_blocks(chunk->part->blob)
               ? loci_kv_blocks(chunk->end - chunk->begin)
               : chunk->live;
}

/* Bytes read, and the first damage of each pair. */
static void count_bytes(const corpus_job *job) {
    for (size_t c = 0; c < job->chunk_count; c++) {
        const dense_chunk *chunk = &job->chunks[c];
        loci_lookup_stats *stats = &chunk->part->stats;
        if (chunk->bad != UINT32_MAX) lookup_fault(chunk->part, chunk->bad_part, chunk->bad);
        stats->hash_bytes += hashes_of(chunk) * sizeof(uint64_t);
        stats->kv_bytes += chunk->live * loci_pair_kv_stride(chunk->part->blob);
    }
    size_t pairs = (size_t)job->lookup->corpus->extent_count * job->lookup->kv_heads;
    for (size_t p = 0; p < pairs && !job->listed; p++) {
        lookup_part *part = lookup_first_part(job->lookup, p);
        size_t token = loci_pair_kv_stride(part->blob);
        if (!part->live) part->stats.kv_leaf_bytes += part->stats.kv_bytes;
        for (uint32_t r = 0; part->live && r < loci_pair_header_of(part->blob)->roots; r++) {
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
    if (!(job->listed ? cut_selected(job) : cut_chunks(job)) || !place_results(job)) {
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
    bool dense = lookup->mode == LOCI_MODE_DENSE;
    bool listed = lookup_listed(lookup) && !lookup->params.estimate_tail;
    if (!(dense || listed) || !lookup->ready || !lookup->tokens_selected) {
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
    job->listed = listed;
    job->out = loci_cpu_ptr(out, last * sizeof(float));
    job->out_stride = out_stride;
    job->lse = loci_cpu_ptr(lse, (size_t)lookup->rows * lookup->q_heads * sizeof(float));
    attend_whole(stream, job);
    if (lookup->attended && job->kept) lookup->dense = job;
}

/* --- attribution ----------------------------------------------------------------------- */

/* The log-sum-exp of all that a vector attends to. */
static float total_of(const corpus_job *job, uint32_t kv_head, uint32_t vector) {
    uint32_t group = job->lookup->group, head = kv_head * group + vector % group;
    return job->total_lse[(size_t)(vector / group) * job->lookup->q_heads + head];
}

/* weights [live]: of the chunk's tokens, summed over rows from row_begin on and query heads. */
static void weigh(const corpus_job *job, const dense_chunk *chunk, float *weights) {
    const loci_lookup *lookup = job->lookup;
    uint32_t tiles = tiles_of(chunk);
    memset(weights, 0, chunk->live * sizeof *weights);
    for (uint32_t v = job->row_begin * lookup->group; v < lookup->vectors; v++) {
        float total = total_of(job, chunk->part->kv_head, v);
        for (uint32_t t = 0; t < tiles; t++) {
            uint32_t at = t * LOCI_DENSE_KEYS, left = chunk->live - at;
            float factor = expf(chunk->weight_max[v * tiles + t] - total);
            lookup->kernels->axpy(weights + at, chunk->weights + (size_t)v * chunk->live + at,
                                  left < LOCI_DENSE_KEYS ? left : LOCI_DENSE_KEYS, factor);
        }
    }
}

/* The segment of each live slot of the chunk, from the list of them or, into `room`, its records.
 * NULL when one is damaged. */
static const uint16_t *find_segments(dense_chunk *chunk, uint16_t *room) {
    const uint8_t *blob = chunk->part->blob;
    for (uint32_t i = 0; chunk->slots && i < chunk->live; i++)
        __builtin_prefetch(loci_slot_record(blob, chunk->slots[i]) +
                           loci_pair_header_of(blob)->head_dim / 2);
    for (uint32_t i = 0; chunk->slots && i < chunk->live; i++) /* verified by score_codes */
        room[i] = (uint16_t)LOCI_SLOT_SEGMENT(loci_slot_word(blob, chunk->slots[i]));
    if (chunk->slots) return room;
    const uint16_t *listed = loci_pair_has_kv_blocks(blob) ? loci_slot_segments(blob) : NULL;
    for (uint32_t slot = chunk->begin; listed && slot < chunk->end; slot += LOCI_KV_BLOCK) {
        uint32_t block = slot / LOCI_KV_BLOCK;
        if (loci_kv_block_segments_hash(blob, block) ==
            loci_pair_kv_block(blob, block)->hash_segments)
            continue;
        listed = NULL; /* the records say the same */
    }
    if (listed && chunk->live == chunk->end - chunk->begin) return listed + chunk->begin;
    uint16_t *to = room;
    for (uint32_t slot = chunk->begin; slot < chunk->end; slot++) {
        if (!is_live(chunk->part, slot)) continue;
        if (!listed && !loci_slot_check_record(blob, slot)) {
            (void)fault(chunk, "record of slot", slot);
            return NULL;
        }
        *to++ = listed ? listed[slot] : (uint16_t)LOCI_SLOT_SEGMENT(loci_slot_word(blob, slot));
    }
    return room;
}

/* One pair. */
static void attribute_pair(void *arg, size_t index, unsigned thread) {
    (void)thread;
    corpus_job *job = arg;
    const lookup_part *part = lookup_first_part(job->lookup, index);
    double *mass = job->mass[index];
    float weights[CHUNK_FEW];
    uint16_t room[CHUNK_FEW];
    for (size_t c = job->pair_chunk[index]; c < job->pair_chunk[index + 1]; c++) {
        dense_chunk *chunk = &job->chunks[c];
        const uint16_t *segments = find_segments(chunk, room);
        if (!segments) return;
        weigh(job, chunk, weights);
        for (uint32_t i = 0; i < chunk->live; i++)
            if (segments[i] < part->extent->segments) mass[segments[i]] += (double)weights[i];
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
            lookup_fault(job->chunks[c].part, job->chunks[c].bad_part, job->chunks[c].bad);
    if (!lookup_report(stream, lookup)) return;
    for (size_t p = 0; p < pairs; p++) {
        const loci_extent_view *extent = lookup_first_part(lookup, p)->extent;
        for (uint32_t s = 0; s < extent->segments; s++)
            mass[extent->segment_base + s] += (float)job->mass[p][s];
    }
}

/* One flat segment; of few vectors, whose lanes a block would leave mostly empty. */
static void attribute_flat(void *arg, size_t index, unsigned thread) {
    corpus_job *job = arg;
    const loci_lookup *lookup = job->lookup;
    const loci_corpus_view *corpus = lookup->corpus;
    uint32_t begin = corpus->flat_segment_begin[index], end = corpus->flat_segment_begin[index + 1];
    uint32_t dim = lookup->dim, vectors = lookup->vectors, stride = lookup->kv_heads * dim;
    size_t tile = (size_t)LOCI_DENSE_KEYS * dim, logits = (size_t)vectors * LOCI_DENSE_KEYS;
    size_t floats = 2 * tile + logits + vectors * (dim + 4u);
    float *scratch =
        loci_cpu_scratch_get(&lookup->cpu->thread_scratch[thread], floats * sizeof *scratch);
    if (!scratch) {
        job->failed = true;
        return;
    }
    float *out = scratch + 2 * tile + logits, *max = out + (size_t)vectors * dim;
    float *sum = max + vectors;
    uint32_t *first = (uint32_t *)(void *)(sum + vectors), *last = first + vectors;
    const loci_cpu_kernels *kernels = lookup->cpu->kernels;
    if (dim % kernels->dense_multiple != 0) kernels = &loci_cpu_kernels_portable;
    const uint16_t *keys = (const void *)corpus->flat_k[lookup->layer]->data;
    double mass = 0.0;
    for (uint32_t t = begin, n; t < end; t += n) {
        n = end - t < LOCI_DENSE_KEYS ? end - t : LOCI_DENSE_KEYS;
        for (uint32_t h = 0; h < lookup->kv_heads; h++) {
            const uint16_t *k = keys + (size_t)t * stride + (size_t)h * dim;
            memset(out, 0, (size_t)vectors * dim * sizeof *out);
            for (uint32_t v = 0; v < vectors; v++) {
                max[v] = -INFINITY;
                sum[v] = 0.0f;
                first[v] = 0;
                last[v] = n;
            }
            loci_dense_job dense = {
                .q = lookup->q + (size_t)h * vectors * dim,
                .rows = vectors,
                .head_dim = dim,
                .k = k,
                .v = k, /* what it would attend to is not wanted */
                .kv_stride = stride,
                .kv_dtype = LOCI_BF16,
                .key_end = n,
                .first = first,
                .last = last,
                .k_tile = scratch,
                .v_tile = scratch + tile,
                .logits = scratch + 2 * tile,
                .out = out,
                .max = max,
                .sum = sum,
            };
            kernels->dense(&dense);
            for (uint32_t v = job->row_begin * lookup->group; v < vectors; v++)
                mass += (double)(sum[v] * expf(max[v] - total_of(job, h, v)));
        }
    }
    job->flat_mass[index] += (float)mass;
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
    job->flat_mass =
        (float *)loci_cpu_ptr(mass, segments * sizeof(float)) + corpus->flat_segment_base;
    loci_pool_run(lookup->cpu->pool, corpus->flat_segments, attribute_flat, job);
    if (job->failed) lookup_no_memory(stream, lookup);
}
