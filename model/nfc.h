/* SPDX-License-Identifier: Apache-2.0
 *
 * Unicode normalization form C (Unicode Standard Annex 15) with the way back to the bytes that a
 * normalized text came from; internal to model/.
 *
 * A loci_nfc belongs to one thread and is reused over texts; zero-initialise.
 */
#ifndef LOCI_MODEL_NFC_H
#define LOCI_MODEL_NFC_H

#include "base/buf.h"

/* [begin, end) of the normalized text stands for other bytes, which end at `origin`. */
typedef struct loci_nfc_change {
    uint32_t begin, end, origin;
} loci_nfc_change;

typedef struct loci_nfc {
    loci_buf text; /* the normalized text; of no meaning when nothing changed */
    loci_nfc_change *changes;
    size_t count, capacity;
    int32_t *points; /* of the cluster at hand */
    uint64_t *order;
    size_t points_capacity, order_capacity;
} loci_nfc;

void loci_nfc_fini(loci_nfc *nfc);
/* Bytes that are not UTF-8 are kept, and nothing is composed across them. Time is n log n whatever
 * the text. *changed false: the text is its own normal form. */
LOCI_MUST_CHECK loci_status loci_nfc_run(loci_nfc *nfc, loci_slice text, bool *changed,
                                         loci_error *err);
/* Turns ends in the normalized text, in rising order, to ends in the original one. A token that
 * ends inside a change ends where the change does. */
void loci_nfc_origins(const loci_nfc *nfc, uint32_t *ends, size_t count);

/* Length of the UTF-8 character at data, or 0: no overlong forms, no surrogates, up to U+10FFFF. */
size_t loci_utf8_length(const uint8_t *data, size_t len);

#endif
