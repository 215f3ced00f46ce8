/* SPDX-License-Identifier: Apache-2.0
 *
 * How the memory budget is shared out when a node starts: what the process, the model, the
 * database, registration and the questions' slots take whatever happens. The rest is for look-ups
 * and snapshots, which reserve what they need while they run (base/budget.h).
 */
#ifndef LOCI_SERVICES_ENGINE_PLAN_H
#define LOCI_SERVICES_ENGINE_PLAN_H

#include "base/budget.h"
#include "memory/store.h"
#include "model/model.h"

typedef struct loci_plan_request {
    const loci_model_config *config;
    const loci_geometry *geometry; /* the fingerprint does not matter */
    loci_dtype precision;
    bool on_device;           /* loci_backend_ops.on_device: what is there is not counted */
    uint64_t tokenizer_bytes; /* of tokenizer.json */
    bool can_map;             /* the weights can be read from their files */
    unsigned threads;         /* of the backend */
    bool pairs_overlap;       /* the backend has loci_pairs_ahead */
    uint64_t calls_bytes;     /* messages of running calls */
    uint32_t sequence_tokens; /* of a slot */
    /* The model that only answers (locid --also-model), with one slot; config NULL = none. */
    const loci_model_config *also_config;
    uint64_t also_tokenizer_bytes;
    bool also_can_map;
    uint32_t also_sequence_tokens;
    unsigned queries; /* slots; 0 = two, or one where memory is short */
    uint64_t limit;   /* the budget */
} loci_plan_request;

typedef struct loci_plan {
    uint64_t process, model, database, registration, slot; /* slot: of one question */
    unsigned slots;
    /* Are the weights of either model to be mapped, because packed ones do not fit? Slower, but
     * they take page cache only. */
    bool mapped, also_mapped;
    uint64_t also_slot; /* of the other model; its weights are part of `model` */
    uint64_t document_bytes_max;
    uint64_t extent_kv_bytes; /* of a sealed extent */
    bool seal_beside;         /* a full extent is made while the next is encoded */
    uint32_t merge_tokens;    /* of the largest extent that is merged; 0 = none is */
} loci_plan;

/* Half of the RAM that this process may use. */
uint64_t loci_plan_default_limit(void);
/* LOCI_E_INVAL, reason MEMORY_TOO_SMALL, when the limit does not suffice; the text names the
 * smallest that does. */
LOCI_MUST_CHECK loci_status loci_plan_make(const loci_plan_request *request, loci_plan *out,
                                           loci_error *err);
/* What a slot with a sequence of so many tokens takes. */
uint64_t loci_plan_slot_bytes(const loci_model_config *config, bool on_device, uint32_t tokens);
/* What loci_model_encode takes for so many tokens at once. */
uint64_t loci_plan_encode_bytes(const loci_model_config *config, bool on_device, uint32_t tokens);
/* Reserves all of it. */
LOCI_MUST_CHECK loci_status loci_plan_take(const loci_plan *plan, loci_budget *budget,
                                           loci_error *err);

#endif
