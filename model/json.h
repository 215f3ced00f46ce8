/* SPDX-License-Identifier: Apache-2.0
 *
 * Bounded JSON reading (jansson) with one-sentence errors; internal to model/.
 *
 * Files are read whole up to a limit; nesting is bounded by jansson (2,048), names that occur
 * twice and \u0000 are refused. Getters name the document and the key at fault.
 */
#ifndef LOCI_MODEL_JSON_H
#define LOCI_MODEL_JSON_H

#include <jansson.h>

#include "base/status.h"

/* An object inside a document; `what` names it in errors and is borrowed. */
typedef struct loci_json {
    const char *what;
    const json_t *object;
} loci_json;

/* OPTIONAL: a member that is missing or null leaves *out as it was. */
typedef enum loci_json_need { LOCI_JSON_OPTIONAL, LOCI_JSON_REQUIRED } loci_json_need;

/* The document must be an object. The caller releases *out with json_decref. LOCI_E_CORRUPT for
 * what is not JSON. */
LOCI_MUST_CHECK loci_status loci_json_parse(const char *what, const void *text, size_t len,
                                            json_t **out, loci_error *err);
/* LOCI_E_NOTFOUND when there is no such file, LOCI_E_LIMIT when it is larger than bytes_max. */
LOCI_MUST_CHECK loci_status loci_json_read(const char *path, size_t bytes_max, json_t **out,
                                           loci_error *err);

/* NULL when missing or null. */
const json_t *loci_json_member(const loci_json *in, const char *key);
/* LOCI_E_INVAL for a missing required member, another type, or a value outside [min, max]. */
LOCI_MUST_CHECK loci_status loci_json_u32(const loci_json *in, const char *key, loci_json_need need,
                                          uint32_t min, uint32_t max, uint32_t *out,
                                          loci_error *err);
LOCI_MUST_CHECK loci_status loci_json_float(const loci_json *in, const char *key,
                                            loci_json_need need, double min, double max, float *out,
                                            loci_error *err);
LOCI_MUST_CHECK loci_status loci_json_bool(const loci_json *in, const char *key,
                                           loci_json_need need, bool *out, loci_error *err);
/* *out is borrowed from the document. */
LOCI_MUST_CHECK loci_status loci_json_string(const loci_json *in, const char *key,
                                             loci_json_need need, const char **out,
                                             loci_error *err);
LOCI_MUST_CHECK loci_status loci_json_array(const loci_json *in, const char *key,
                                            loci_json_need need, const json_t **out,
                                            loci_error *err);
/* out->what is `what`, the name of the member in later errors. */
LOCI_MUST_CHECK loci_status loci_json_object(const loci_json *in, const char *key, const char *what,
                                             loci_json_need need, loci_json *out, loci_error *err);

#endif
