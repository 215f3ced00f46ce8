/* SPDX-License-Identifier: Apache-2.0
 *
 * Encoding in a causal corpus: its next tokens run as a sequence that looks at all tokens before
 * them, as a question does in mode dense, at the positions that they have in the whole text. The
 * past is read from the store, so the prefill can stop and go on at any segment.
 *
 * Every layer must find its past there: each must be a retrieval layer without a window. (With
 * sliding-window layers the last window's keys and values of these would have to be kept too.)
 */
#include "services/engine/query.h"

loci_status loci_causal_check(const loci_model *model, loci_error *err) {
    const loci_model_config *config = loci_model_config_of(model);
    for (uint32_t i = 0; i < config->layers; i++)
        if (!config->layer[i].retrieval || config->layer[i].window > 0)
            return loci_fail_reason(err, LOCI_E_UNSUPPORTED, "ENCODING",
                                    "a corpus of this %s cannot be causal, since layer %u %s; "
                                    "its encoding can be independent",
                                    config->architecture, i,
                                    config->layer[i].window > 0 ? "sees a sliding window only"
                                                                : "is no retrieval layer");
    return LOCI_OK;
}

static loci_status run(loci_query *query, const uint32_t *tokens, uint32_t count,
                       const loci_encode_out *out, loci_error *err) {
    loci_engine *engine = query->engine;
    loci_slot *slot = query->slot;
    loci_recorder recorder = {0};
    uint32_t start = loci_snapshot_end(query->snapshot);
    uint32_t keep = count < LOCI_RECORDED ? count : LOCI_RECORDED;
    loci_status status;
    LOCI_TRY(loci_sequence_open(engine->model, count, &slot->sequence, err));
    LOCI_TRY(engine->backend->ops->lookup_create(engine->backend, &slot->lookup, err));
    LOCI_TRY_GOTO(loci_recorder_open(query, &recorder, err), out);
    recorder.attends = true;
    loci_sequence_jump(slot->sequence, start);
    LOCI_TRY_GOTO(loci_recorder_pass(&recorder, tokens, count, keep, err), out);
    LOCI_TRY_GOTO(loci_sequence_read_kv(slot->sequence, out, err), out);
    loci_recorder_keep(&recorder, start, (uint64_t)start + count);
out:
    loci_recorder_close(&recorder);
    return status;
}

loci_status loci_encode_after(void *ctx, const loci_snapshot *past, const uint32_t *tokens,
                              uint32_t count, uint16_t *const *k, uint16_t *const *v,
                              const loci_cancel *cancel, loci_error *err) {
    loci_engine *engine = ctx;
    loci_slot slot = {0};
    loci_query query = {.engine = engine,
                        .slot = &slot,
                        .snapshot = (loci_snapshot *)(uintptr_t)past, /* only read */
                        .view = loci_snapshot_view(past),
                        .causal = true,
                        .cancel = cancel};
    loci_corpus_settings_default(&query.settings); /* as the model would read it */
    loci_encode_out out = {k, v};
    const loci_model_config *config = loci_model_config_of(engine->model);
    uint64_t bytes = loci_plan_slot_bytes(config, engine->backend->ops->on_device, count) +
                     loci_recorder_bytes(config, true);
    loci_select_defaults(&query.params);
    query.params.mode = LOCI_MODE_DENSE;
    LOCI_TRY(loci_budget_take(engine->budget, LOCI_MEMORY_LOOKUPS, bytes,
                              "registration in a causal corpus", err));
    loci_status status = run(&query, tokens, count, &out, err);
    loci_slot_close(engine, &slot);
    loci_budget_give(engine->budget, LOCI_MEMORY_LOOKUPS, bytes);
    return status;
}
