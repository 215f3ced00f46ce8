/* SPDX-License-Identifier: Apache-2.0
 *
 * config.json of a Hugging Face folder; internal to model/.
 */
#ifndef LOCI_MODEL_CONFIG_H
#define LOCI_MODEL_CONFIG_H

#include "model/model.h"

/* Reads and checks DIR/config.json. What cannot be run is refused by name: LOCI_E_UNSUPPORTED for
 * an architecture or option that is not built, LOCI_E_INVAL for a value that makes no sense,
 * LOCI_E_NOTFOUND for a missing file. */
LOCI_MUST_CHECK loci_status loci_model_config_load(const char *dir, loci_model_config *out,
                                                   loci_error *err);

#endif
