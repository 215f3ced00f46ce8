/* SPDX-License-Identifier: Apache-2.0
 *
 * Shares of the memory budget; see plan.h. The sizes follow what the named files allocate; where
 * these grow by doubling, the double is counted.
 */
#include "services/engine/plan.h"

#include <stdio.h>
#include <unistd.h>

#include "memory/ingest.h"

#define MIB (1ull << 20)
#define PROCESS_BYTES (24 * MIB) /* libraries, stacks, catalogue, what malloc keeps */
#define DATABASE_LEAST (16 * MIB)
#define DATABASE_MOST (256 * MIB)
#define DOCUMENT_LEAST (4 * MIB)
#define DOCUMENT_MOST (64 * MIB)
#define EXTENT_KV_LEAST (256 * MIB)
#define LOOKUPS_LEAST (32 * MIB) /* look-ups and snapshots, so that small corpora always answer */
#define SLOTS_DEFAULT 2u
#define MERGE_SHARE 3u
#define SEAL_SHARE 32u
#define ENCODE_ROWS 1024u  /* model/encode.c */
#define SEQUENCE_ROWS 256u /* model/sequence.c */
#define PRODUCT_ROWS 256u  /* of one thread's task in attention/cpu/gemm.c */
/* Of a backend with memory of its own (attention/cuda): */
#define DEVICE_BYTES (128 * MIB) /* the driver's and its libraries' own */
#define PACK_BYTES (64 * MIB)    /* most of a weight that is packed at once */
#define TOKEN_BYTES 64u          /* what the host knows of a token that is encoded */
#define STAGING_BYTES (64 * MIB) /* most of the memory through which K and V come back */

uint64_t loci_plan_default_limit(void) {
    return loci_memory_limit() / 2;
}

static uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* A packed weight (attention/cpu/gemm.c): 64 rows a block, columns filled up. */
static uint64_t weight_bytes(uint64_t rows, uint64_t cols, loci_dtype precision) {
    uint64_t elements = round_up(rows, 64) * round_up(cols, 32);
    return elements * (precision == LOCI_BF16 ? 2 : 4);
}

static uint64_t widest_of(const loci_model_config *c) {
    return c->intermediate > c->hidden ? c->intermediate : c->hidden;
}

/* Of a mapped model: gains, and what its products pack on each thread and stream. */
static uint64_t mapped_bytes(const loci_plan_request *r, const loci_model_config *c) {
    uint64_t q = (uint64_t)c->q_heads * c->head_dim, kv = (uint64_t)c->kv_heads * c->head_dim;
    uint64_t streams = r->queries ? r->queries + 1 : SLOTS_DEFAULT + 1;
    return c->layers * (4ull * c->hidden + q + 2 * kv) * sizeof(float) +
           (r->threads + streams) * PRODUCT_ROWS * round_up(widest_of(c), 32) * sizeof(uint16_t);
}

/* Packed weights. */
static uint64_t packed_bytes(const loci_plan_request *r, const loci_model_config *c) {
    uint64_t q = (uint64_t)c->q_heads * c->head_dim, kv = (uint64_t)c->kv_heads * c->head_dim;
    uint64_t layer = weight_bytes(q + 2 * kv, c->hidden, r->precision) +
                     weight_bytes(c->hidden, q, r->precision) +
                     weight_bytes(2ull * c->intermediate, c->hidden, r->precision) +
                     weight_bytes(c->hidden, c->intermediate, r->precision) +
                     (4ull * c->hidden + q + 2 * kv) * sizeof(float);
    if (c->qkv_bias) layer += weight_bytes(1, q + 2 * kv, LOCI_F32);
    uint64_t tables = c->tied_embeddings ? 1 : 2;
    return c->layers * layer + tables * weight_bytes(c->vocab, c->hidden, r->precision);
}

/* Of a model whose weights go to a device: a part of one at a time. The largest are the embeddings
 * or a layer's feed-forward matrices. */
static uint64_t passing_bytes(const loci_plan_request *r, const loci_model_config *c) {
    uint64_t rows = c->vocab > 2ull * c->intermediate ? c->vocab : 2ull * c->intermediate;
    uint64_t bytes = weight_bytes(rows, widest_of(c), r->precision);
    return bytes < PACK_BYTES ? bytes : PACK_BYTES;
}

/* Weights, and tokenizers: about four times their files while these are read. */
static uint64_t model_bytes(const loci_plan_request *r, bool mapped) {
    uint64_t bytes = 4 * (r->tokenizer_bytes + r->also_tokenizer_bytes);
    if (r->on_device) {
        uint64_t also = r->also_config ? passing_bytes(r, r->also_config) : 0;
        uint64_t own = passing_bytes(r, r->config);
        return bytes + (own > also ? own : also);
    }
    bytes += mapped && r->can_map ? mapped_bytes(r, r->config) : packed_bytes(r, r->config);
    if (!r->also_config) return bytes;
    return bytes + (mapped && r->also_can_map ? mapped_bytes(r, r->also_config)
                                              : packed_bytes(r, r->also_config));
}

/* A row of activations (model/decoder.c). */
static uint64_t row_bytes(const loci_model_config *c) {
    uint64_t q = (uint64_t)c->q_heads * c->head_dim, kv = (uint64_t)c->kv_heads * c->head_dim;
    return sizeof(float) * (3 + 2ull * c->hidden + (q + 2 * kv) + q + 3ull * c->intermediate);
}

/* A sequence (model/sequence.c), its row of what a batch shares (model/batch.h) and the parts of
 * its attention (corpus_attend.c). */
uint64_t loci_plan_slot_bytes(const loci_model_config *c, bool on_device, uint32_t tokens) {
    if (on_device) return 4ull * c->vocab * sizeof(float) + MIB;
    uint64_t width = (uint64_t)c->kv_heads * c->head_dim;
    uint64_t cache = 2ull * c->layers * tokens * width * sizeof(float);
    uint64_t part = (uint64_t)tokens * c->q_heads * (c->head_dim + 4ull) * sizeof(float);
    return cache + part + SEQUENCE_ROWS * row_bytes(c) + 5ull * c->vocab * sizeof(float) + MIB;
}

/* Rows, and their K and V on their way out (model/encode.c). */
uint64_t loci_plan_encode_bytes(const loci_model_config *c, bool on_device, uint32_t tokens) {
    uint64_t kv = 4ull * c->retrieval_count * c->kv_heads * c->head_dim;
    if (!on_device) return tokens * (row_bytes(c) + kv);
    return tokens * TOKEN_BYTES + (tokens * kv < STAGING_BYTES ? tokens * kv : STAGING_BYTES);
}

static uint64_t registration_bytes(const loci_plan_request *r, const loci_plan *plan) {
    loci_store_options options;
    loci_store_options_default(&options);
    options.document_bytes_max = plan->document_bytes_max;
    options.extent_kv_bytes = plan->extent_kv_bytes;
    options.merge_tokens = plan->merge_tokens;
    options.pairs_overlap = r->pairs_overlap;
    options.seal_beside = plan->seal_beside;
    unsigned batches = r->on_device ? 2 : 1;
    return loci_ingest_memory(r->geometry, &options) +
           batches * loci_plan_encode_bytes(r->config, r->on_device, ENCODE_ROWS) + 4 * MIB;
}

static uint64_t process_bytes(const loci_plan_request *r) {
    if (r->on_device) return PROCESS_BYTES + DEVICE_BYTES + r->calls_bytes + r->threads * (MIB / 2);
    uint64_t widest = widest_of(r->config);
    if (r->also_config && widest_of(r->also_config) > widest) widest = widest_of(r->also_config);
    return PROCESS_BYTES + r->calls_bytes +
           r->threads * (PRODUCT_ROWS * widest * sizeof(float) + MIB / 2);
}

static unsigned long long mib(uint64_t bytes) {
    return round_up(bytes, MIB) / MIB;
}

/* Extents of models with large K and V are as long as those of others where there is memory: fewer
 * ones are clustered, and merged, in less time. A device clusters one while it encodes the next,
 * where there is more. */
static void grow_extents(const loci_plan_request *request, uint64_t over, loci_plan *plan) {
    uint64_t least = registration_bytes(request, plan), present = least;
    loci_plan more = *plan;
    for (;;) {
        more.extent_kv_bytes *= 2;
        uint64_t bytes = registration_bytes(request, &more);
        if (bytes == present || bytes - least > over / 8) break;
        *plan = more;
        present = bytes;
    }
    more = *plan;
    more.seal_beside = request->pairs_overlap;
    if (registration_bytes(request, &more) - present <= over / SEAL_SHARE) *plan = more;
}

loci_status loci_plan_make(const loci_plan_request *request, loci_plan *out, loci_error *err) {
    loci_plan plan = {
        .process = process_bytes(request),
        .model = model_bytes(request, false),
        .database = DATABASE_LEAST,
        .slot = loci_plan_slot_bytes(request->config, request->on_device, request->sequence_tokens),
        .slots = request->queries ? request->queries : 1,
        .document_bytes_max = DOCUMENT_LEAST,
        .extent_kv_bytes = EXTENT_KV_LEAST};
    plan.registration = registration_bytes(request, &plan);
    if (request->also_config)
        plan.also_slot = loci_plan_slot_bytes(request->also_config, request->on_device,
                                              request->also_sequence_tokens);
    uint64_t least = plan.process + plan.model + plan.database + plan.registration +
                     plan.slots * plan.slot + plan.also_slot + LOOKUPS_LEAST;
    if (request->limit < least && (request->can_map || request->also_can_map)) {
        plan.mapped = request->can_map;
        plan.also_mapped = request->also_can_map;
        least -= plan.model;
        plan.model = model_bytes(request, true);
        least += plan.model;
    }
    if (request->limit < least)
        return loci_fail_reason(
            err, LOCI_E_INVAL, "MEMORY_TOO_SMALL",
            "a memory budget of %llu MiB is too small; the smallest that works here is %lluM "
            "(model %llu MiB, registration %llu, %u question%s %llu, database %llu, process %llu)",
            (unsigned long long)(request->limit / MIB), mib(least), mib(plan.model),
            mib(plan.registration), plan.slots, plan.slots == 1 ? "" : "s",
            mib(plan.slots * plan.slot + plan.also_slot), mib(plan.database), mib(plan.process));
    /* At most 21 of 32 parts of what is over make the fixed shares larger, a third is for merging
     * extents, the rest for look-ups. */
    uint64_t over = request->limit - least, grown = DATABASE_LEAST + over / 8;
    plan.database = grown < DATABASE_MOST ? grown : DATABASE_MOST;
    if (request->queries == 0 && plan.slot <= over / 4) plan.slots = SLOTS_DEFAULT;
    while (plan.document_bytes_max < DOCUMENT_MOST) {
        loci_plan twice = plan;
        twice.document_bytes_max *= 2;
        if (registration_bytes(request, &twice) - plan.registration > over / 8) break;
        plan.document_bytes_max *= 2;
    }
    grow_extents(request, over, &plan);
    loci_store_options options;
    loci_store_options_default(&options);
    options.pairs_overlap = request->pairs_overlap;
    options.extent_kv_bytes = plan.extent_kv_bytes;
    plan.merge_tokens = loci_merge_tokens_within(request->geometry, &options, over / MERGE_SHARE);
    plan.registration = registration_bytes(request, &plan);
    *out = plan;
    return LOCI_OK;
}

loci_status loci_plan_take(const loci_plan *plan, loci_budget *budget, loci_error *err) {
    const struct {
        loci_memory_part part;
        uint64_t bytes;
        const char *what;
    } shares[] = {
        {LOCI_MEMORY_PROCESS, plan->process, "the process"},
        {LOCI_MEMORY_MODEL, plan->model, "the model"},
        {LOCI_MEMORY_DATABASE, plan->database, "the database"},
        {LOCI_MEMORY_REGISTRATION, plan->registration, "registration"},
        {LOCI_MEMORY_QUESTIONS, plan->slots * plan->slot + plan->also_slot, "the questions' slots"},
    };
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++)
        LOCI_TRY(loci_budget_take(budget, shares[i].part, shares[i].bytes, shares[i].what, err));
    return LOCI_OK;
}
