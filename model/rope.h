/* SPDX-License-Identifier: Apache-2.0
 *
 * Rotary positions: what config.json says of them, and the frequencies; internal to model/.
 */
#ifndef LOCI_MODEL_ROPE_H
#define LOCI_MODEL_ROPE_H

#include "model/json.h"
#include "model/model.h"

/* Fills rope_theta and rope_scaling. Kinds other than "default" and "llama3" are refused by name.
 */
LOCI_MUST_CHECK loci_status loci_rope_read(const loci_json *in, loci_model_config *out,
                                           loci_error *err);
/* out: head_dim / 2 values. */
void loci_rope_frequencies(const loci_model_config *config, float *out);

#endif
