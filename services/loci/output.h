/* SPDX-License-Identifier: Apache-2.0
 *
 * Output of the commands: JSON lines and text for people. Bytes that are not UTF-8 are shown
 * as U+FFFD. Colours only on a terminal, and never when NO_COLOR is set.
 */
#ifndef LOCI_SERVICES_LOCI_OUTPUT_H
#define LOCI_SERVICES_LOCI_OUTPUT_H

#include <jansson.h>

#include "base/buf.h"
#include "loci/v1/loci.pb-c.h"

/* Prints the object as one line and frees it; flushes. */
void loci_print_json(json_t *object);
json_t *loci_json_text(loci_slice text);
/* {"document","start","end","quote",LAST,"name"} with LAST = "share" or "score" */
json_t *loci_json_passage(const char *name, uint64_t start, uint64_t end, ProtobufCBinaryData quote,
                          const char *last, double value);
json_t *loci_json_usage(const Loci__V1__Usage *usage);

/* The line that shows how far a stream of documents is, on standard error: over and over on a
 * terminal, else a line every few seconds. */
typedef struct loci_progress_line {
    bool terminal, drawn;
    uint64_t shown_ns;
} loci_progress_line;
typedef struct loci_progress {
    double share;      /* of the bar */
    const char *stage; /* "": not shown */
    uint64_t documents, documents_total, tokens;
    double tokens_per_s, eta_s; /* eta_s below 0: unknown */
} loci_progress;
loci_progress_line loci_progress_begin(void);
void loci_progress_show(loci_progress_line *line, const loci_progress *progress);
void loci_progress_wipe(loci_progress_line *line); /* before anything else is printed */

bool loci_color(void); /* standard output takes colours */
/* Appends one line of at most `width` characters from the quote: whitespace runs become one
 * space, the part around `answer` is shown where it occurs (loci_text_find; in bold if color),
 * else the beginning; "..." marks what was cut. */
void loci_clip_quote(loci_slice quote, const char *answer, size_t width, bool color, loci_buf *out);
/* The passage as text: document:start-end, value, and the clipped quote below. */
void loci_print_passage(const char *name, uint64_t start, uint64_t end, ProtobufCBinaryData quote,
                        const char *value, const char *answer);

#endif
