/* SPDX-License-Identifier: Apache-2.0
 *
 * A decoder language model from a Hugging Face folder, run on a backend.
 *
 * Opening reads config.json, tokenizer.json and the weights; whatever cannot be run is
 * refused by name. A model is immutable after open and may be shared by threads; each
 * forward pass runs on a loci_sequence or in a loci_encode call of its own.
 */
#ifndef LOCI_MODEL_MODEL_H
#define LOCI_MODEL_MODEL_H

#include "attention/backend.h"
#include "base/cancel.h"
#include "model/chat.h"
#include "model/tokenizer.h"

#define LOCI_LAYERS_MAX 256
#define LOCI_EOS_MAX 8

/* One layer's attention. window 0 = full. rope false = no positions (NoPE). */
typedef struct loci_layer_config {
    uint32_t window;
    bool rope;
    bool retrieval; /* its queries reach the corpus */
} loci_layer_config;

/* rope_type "llama3": frequencies below low_freq turns in positions_max are divided by factor,
 * those above high_freq kept, those between mixed. factor 0: no scaling. */
typedef struct loci_rope_scaling {
    float factor, low_freq, high_freq;
    uint32_t positions_max;
} loci_rope_scaling;

typedef struct loci_model_config {
    char architecture[64];
    uint32_t vocab, hidden, intermediate, layers, q_heads, kv_heads, head_dim;
    uint32_t positions_max;
    float rms_eps, rope_theta;
    uint32_t attention_scale_tokens; /* see loci_model_attention_scale; 0 = always 1 */
    loci_rope_scaling rope_scaling;
    bool tied_embeddings;
    bool qkv_bias;   /* the projections to queries, keys and values have a bias */
    bool head_norm;  /* each query and key head is normed before it is rotated */
    uint32_t bos_id; /* bos_token_id; UINT32_MAX where there is none */
    uint32_t eos_id; /* the first of eos[] */
    uint32_t eos[LOCI_EOS_MAX], eos_count;
    loci_layer_config layer[LOCI_LAYERS_MAX];
    uint32_t retrieval_count;
    uint32_t retrieval_layer[LOCI_LAYERS_MAX]; /* layer numbers of the retrieval layers */
} loci_model_config;

/* The place of a retrieval layer among them. */
static inline uint32_t loci_retrieval_index(const loci_model_config *config, uint32_t layer) {
    uint32_t index = 0;
    while (config->retrieval_layer[index] != layer) index++;
    return index;
}

/* The special tokens by which the built-in family reads text (shared notes: "how it sees
 * text"); UINT32_MAX where the tokenizer has none. bos: "<bos>", else the token that the tokenizer
 * puts before every text. begin, always there, stands before every text that is encoded by itself,
 * and takes the attention that wants to go nowhere: <doc> of the built-in family, else bos, else
 * bos_token_id of config.json (Qwen's tokenizers put nothing before a text, but the models saw that
 * token between any two), else the first end of text. */
typedef struct loci_special_tokens {
    uint32_t doc, question, evidence, answer, none, eos, bos, begin;
} loci_special_tokens;

typedef struct loci_model loci_model;

/* LOCI_E_UNSUPPORTED for a file or folder of another format (GGUF for one), with a sentence that
 * says what to bring instead; LOCI_E_NOTFOUND if there is no such folder. Opening begins with this.
 */
LOCI_MUST_CHECK loci_status loci_model_check_folder(const char *dir, loci_error *err);
LOCI_MUST_CHECK loci_status loci_model_open(const char *dir, loci_backend *backend,
                                            loci_dtype precision, loci_model **out,
                                            loci_error *err);
/* Opening in two steps. After the first only configuration, tokenizer, special tokens and chat are
 * there: enough to tell whether the model will do, before its weights are read. */
LOCI_MUST_CHECK loci_status loci_model_prepare(const char *dir, loci_model **out, loci_error *err);
/* Once; a model whose weights failed to load can only be closed. mapped: matrices are not packed
 * but read from the files, which are in bf16 (loci_model_can_map) and stay open: they take no
 * memory but the page cache. */
LOCI_MUST_CHECK loci_status loci_model_load(loci_model *model, const char *dir,
                                            loci_backend *backend, loci_dtype precision,
                                            bool mapped, loci_error *err);
/* Can its weights be mapped, on this backend and in this precision? */
LOCI_MUST_CHECK loci_status loci_model_can_map(const char *dir, const loci_backend *backend,
                                               loci_dtype precision, bool *out, loci_error *err);
void loci_model_close(loci_model *model);
const loci_model_config *loci_model_config_of(const loci_model *model);
/* By what the logits of a question's rows are multiplied in the retrieval layers over a corpus of n
 * tokens: max(1, ln n / ln attention_scale_tokens). Without it the many tokens that match nothing
 * take more of the attention the more there are (Scalable-Softmax, arXiv 2501.19399; Llama 4 does
 * so in its layers without positions). config.json: "loci": {"attention_scale_tokens": N}. */
float loci_model_attention_scale(const loci_model_config *config, uint64_t tokens);
const loci_tokenizer *loci_model_tokenizer(const loci_model *model);
const loci_special_tokens *loci_model_specials(const loci_model *model);
/* Is it of the built-in family: are <doc> <q> <ev> <a> <none> all there? Other models, stock
 * models, are asked by prompts of their chat family. */
bool loci_model_is_built_in(const loci_model *model);
const loci_chat *loci_model_chat(const loci_model *model);
/* Does this token end a text or an answer: one of the configuration's eos[], or the chat's stop? */
bool loci_model_ends(const loci_model *model, uint32_t id);
loci_backend *loci_model_backend(const loci_model *model);
/* 32 lower-case hexadecimal digits: hash of config, tokenizer and weights (bytes), independent of
 * file names and sharding. Precision is not part of it. */
const char *loci_model_fingerprint(const loci_model *model);

/* --- Encoding context segments -------------------------------------------------------
 * Packs segments in one batch, none attending to another (Prepacking, arXiv 2404.09529), and
 * returns K and V of the retrieval layers. tokens: all segments one after another; begin:
 * segments + 1 offsets. Positions count from 0 in each segment.
 * k, v: bf16, for pair p = retrieval_index * kv_heads + kv_head a host array of
 * [total tokens][head_dim]. The result of a segment does not depend on what it is packed with. */
typedef struct loci_encode_out {
    uint16_t *const *k;
    uint16_t *const *v;
} loci_encode_out;

LOCI_MUST_CHECK loci_status loci_model_encode(loci_model *model, const uint32_t *tokens,
                                              const uint32_t *begin, uint32_t segments,
                                              const loci_encode_out *out, const loci_cancel *cancel,
                                              loci_error *err);

/* --- Sequences: a question and its answer ----------------------------------------------
 * A sequence keeps its own KV in every layer. In retrieval layers `attend` (if set) is called after
 * the sequence's own attention was enqueued, to merge in the corpus's part. */
typedef struct loci_attend_call {
    loci_stream *stream;
    uint32_t retrieval_index; /* which retrieval layer, from 0 */
    uint32_t rows;            /* tokens of this step */
    uint32_t row_position;    /* position of the first of them in the sequence */
    bool in_company;          /* q, out and lse stand elsewhere the next time */
    uint32_t group;           /* of those reached together: its number in the pass */
    uint32_t q_heads, head_dim;
    loci_ref q; /* f32 [rows][q_heads][head_dim], stride q_stride */
    uint32_t q_stride;
    float scale;
    loci_dtype precision; /* of products (loci_select_params) */
    /* The sequence's own attention; to be replaced by the merge with the corpus's part. */
    loci_ref out; /* f32 [rows][q_heads][head_dim], stride out_stride */
    uint32_t out_stride;
    loci_ref lse; /* f32 [rows][q_heads] */
} loci_attend_call;

/* Returns LOCI_OK after enqueueing its work; may sync the stream. */
typedef loci_status (*loci_attend_fn)(void *ctx, const loci_attend_call *call, loci_error *err);
/* (optional, both or none) Sequences of one pass whose owners' work is largely the same may be
 * reached by one call. choose: which of `count` of them, in one retrieval layer, are reached
 * together with the first: bits; 1: the first is reached alone. On the thread of the pass, before
 * any of them is reached in this layer; each has a thread that waits meanwhile. reach: does for all
 * of them what loci_attend_fn does for each, on the thread of the first. All calls have one stream,
 * that of the group: the same group has the same from layer to layer, other groups of the pass have
 * others. What fails, then or when it runs, ends the appends of the group and no other. */
#define LOCI_ATTEND_GROUPS 4u /* of a pass; further ones are reached alone */
typedef struct loci_attend_together {
    uint32_t (*choose)(void *const *ctx, const loci_attend_call *calls, uint32_t count);
    loci_status (*reach)(void *const *ctx, const loci_attend_call *calls, uint32_t count,
                         loci_error *err);
} loci_attend_together;
/* At the end of each chunk's pass, on the thread of the append, when all of the calls' work has
 * run: what became of the pass is `status`, with *err for a failure. What it returns is what
 * becomes of the chunk. */
typedef loci_status (*loci_attended_fn)(void *ctx, loci_status status, loci_error *err);

typedef struct loci_sequence loci_sequence;
LOCI_MUST_CHECK loci_status loci_sequence_open(loci_model *model, uint32_t tokens_max,
                                               loci_sequence **out, loci_error *err);
void loci_sequence_close(loci_sequence *sequence);
/* attended: NULL is allowed. Until loci_sequence_set_together it is reached alone. */
void loci_sequence_set_attend(loci_sequence *sequence, loci_attend_fn attend,
                              loci_attended_fn attended, void *ctx);
/* With those of its batch that have the same `together`, which outlives the sequence. */
void loci_sequence_set_together(loci_sequence *sequence, const loci_attend_together *together);
/* Multiplies the logits of later rows in the retrieval layers, the sequence's own and (through
 * loci_attend_call) the corpus's; 1 until then and again after reset. */
void loci_sequence_scale_attention(loci_sequence *sequence, float factor);
/* Forgets all tokens; keeps memory. The next one has position 0. */
void loci_sequence_reset(loci_sequence *sequence);
/* The position of the next token, which must be behind all others. It may lie beyond those that the
 * model was trained on: whether that is wanted is the caller's to say. */
void loci_sequence_jump(loci_sequence *sequence, uint32_t position);
uint32_t loci_sequence_length(const loci_sequence *sequence);
/* How many tokens more there is room for. */
uint32_t loci_sequence_room(const loci_sequence *sequence);
/* Runs the tokens. logits_rows: how many of the last rows get logits (0 = none: then with
 * stop_after_retrieval = r >= 0 the pass ends after the attend call of retrieval layer r).
 * LOCI_E_LIMIT when tokens_max would be exceeded. */
LOCI_MUST_CHECK loci_status loci_sequence_append(loci_sequence *sequence, const uint32_t *tokens,
                                                 uint32_t count, uint32_t logits_rows,
                                                 int stop_after_retrieval,
                                                 const loci_cancel *cancel, loci_error *err);
/* K and V of all tokens in the retrieval layers, in the form of loci_encode_out; also after a pass
 * that stopped after the last of these layers. */
LOCI_MUST_CHECK loci_status loci_sequence_read_kv(loci_sequence *sequence,
                                                  const loci_encode_out *out, loci_error *err);
/* Host copy of the logits of the last append: f32 [logits_rows][vocab]; valid until the next call.
 */
const float *loci_sequence_logits(loci_sequence *sequence);
/* Samples from the last row of logits; also its log-probability. */
LOCI_MUST_CHECK loci_status loci_sequence_sample(loci_sequence *sequence,
                                                 const loci_sample_params *params,
                                                 const uint32_t *banned, uint32_t banned_count,
                                                 const uint32_t *recent, uint32_t recent_count,
                                                 uint32_t *id, float *logprob, loci_error *err);
loci_stream *loci_sequence_stream(loci_sequence *sequence);

#endif
