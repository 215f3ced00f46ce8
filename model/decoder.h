/* SPDX-License-Identifier: Apache-2.0
 *
 * The decoder's weights and its one layer loop; internal to model/.
 *
 * A pass runs rows of tokens through the layers:
 *
 *   hidden = embedding[ids]
 *   each layer: hidden += o(attend(rope(head_norm(qkv(norm(hidden)) + qkv_bias))))
 *               hidden += down(silu(gate) * up), [gate; up] = gate_up(norm(hidden))
 *
 * A layer without rope, head_norm, qkv_bias or a window leaves it out: that is all by which
 * architectures differ. What differs between encoding segments and continuing a sequence is
 * attention alone, which a callback enqueues. Everything is enqueued on one stream; nothing here
 * waits.
 */
#ifndef LOCI_MODEL_DECODER_H
#define LOCI_MODEL_DECODER_H

#include "model/model.h"
#include "model/safetensors.h"

typedef struct loci_decoder_layer {
    loci_weight *qkv; /* rows: queries, keys, values, head after head */
    loci_weight *o, *gate_up, *down;
    loci_weight *qkv_bias; /* one column for each row of qkv, NULL when there is none: a table of
                              one entry to be embedded in every row */
    loci_ref attention_gain, mlp_gain;
    loci_ref q_gain, k_gain; /* of head_norm; buffer NULL when there is none */
} loci_decoder_layer;

struct loci_model {
    loci_model_config config;
    loci_special_tokens specials;
    loci_tokenizer *tokenizer;
    loci_chat chat;
    loci_backend *backend;
    loci_dtype precision;   /* of products */
    loci_safetensors *file; /* where mapped weights are; NULL when all are packed */
    char fingerprint[33];
    loci_weight *embedding;
    loci_weight *head; /* NULL when tied to the embedding */
    loci_decoder_layer layer[LOCI_LAYERS_MAX];
    loci_buffer *constants; /* gains and inv_freq, f32 */
    loci_ref final_gain, inv_freq;
};

/* Device memory of a pass of at most `rows` rows. From ids to positions it is as far as from there
 * to places. */
typedef struct loci_decoder_scratch {
    loci_backend *backend;
    loci_buffer *buffer;
    uint32_t rows;
    loci_ref ids, positions;     /* i32 [rows] */
    loci_ref places;             /* i32 [rows]; of sequences: rows of their cache */
    loci_ref zeros;              /* i32 [rows], as allocated: ids into qkv_bias */
    loci_ref hidden, normed;     /* f32 [rows][hidden] */
    loci_ref qkv;                /* [rows][loci_decoder_qkv_width] */
    loci_ref attended;           /* [rows][q_heads * head_dim] */
    loci_ref heads;              /* the same, where the model has head_norm */
    loci_ref gate_up, activated; /* [rows][2 * intermediate], [rows][intermediate] */
} loci_decoder_scratch;

/* Enqueues attention of one layer from scratch->qkv, already rotated, to scratch->attended. *stop
 * ends the pass here. */
typedef loci_status (*loci_decoder_attend_fn)(void *ctx, uint32_t layer, bool *stop,
                                              loci_error *err);

typedef struct loci_decoder_pass {
    const loci_model *model;
    loci_stream *stream;
    const loci_decoder_scratch *scratch;
    uint32_t rows; /* ids and positions of these rows were uploaded */
    const loci_cancel *cancel;
    loci_decoder_attend_fn attend;
    void *ctx;
} loci_decoder_pass;

LOCI_MUST_CHECK loci_status loci_decoder_scratch_open(const loci_model *model, uint32_t rows,
                                                      loci_decoder_scratch *out, loci_error *err);
void loci_decoder_scratch_close(loci_decoder_scratch *scratch); /* zeroed is allowed */
/* Checks for cancellation before each layer. The caller syncs, also after a failure. */
LOCI_MUST_CHECK loci_status loci_decoder_run(const loci_decoder_pass *pass, loci_error *err);
/* Syncs after a pass of which `status` came; LOCI_E_IO where mapped weights could not be read. */
LOCI_MUST_CHECK loci_status loci_decoder_finish(const loci_decoder_pass *pass, loci_status status,
                                                loci_error *err);
/* Logits of the rows [begin, begin + count) of a whole pass, to `logits` f32 [count][vocab]. */
void loci_decoder_logits(const loci_decoder_pass *pass, uint32_t begin, uint32_t count,
                         loci_ref logits);
/* Part of scratch->qkv: its heads from `head` on; queries first, then keys, then values. */
loci_ref loci_decoder_heads(const loci_decoder_pass *pass, uint32_t head);
/* Dense attention from the pass's queries, with everything but keys, values and spans filled in. */
loci_attend_dense loci_decoder_attention(const loci_decoder_pass *pass, uint32_t layer);
/* LOCI_E_INVAL naming the first token id outside the vocabulary. */
LOCI_MUST_CHECK loci_status loci_decoder_check_tokens(const loci_model *model,
                                                      const uint32_t *tokens, size_t count,
                                                      loci_error *err);

static inline uint32_t loci_decoder_qkv_width(const loci_model_config *config) {
    return (config->q_heads + 2 * config->kv_heads) * config->head_dim;
}

/* A field of a buffer: returns the old *at and moves it past bytes, rounded up to 64. */
static inline size_t loci_decoder_reserve(size_t *at, size_t bytes) {
    size_t begin = *at;
    *at += (bytes + 63) / 64 * 64;
    return begin;
}

#endif
