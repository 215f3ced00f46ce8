/* SPDX-License-Identifier: Apache-2.0
 *
 * Structured log lines on standard error: one line an event, text or JSON.
 * Thread-safe; a line is written with one write(2).
 */
#ifndef LOCI_BASE_LOG_H
#define LOCI_BASE_LOG_H

#include "base/status.h"

typedef enum loci_log_level {
    LOCI_LOG_DEBUG,
    LOCI_LOG_INFO,
    LOCI_LOG_WARN,
    LOCI_LOG_ERROR
} loci_log_level;

void loci_log_configure(loci_log_level least, bool json);
/* Accepts "debug", "info", "warn", "error"; false when it is none of them. */
bool loci_log_level_parse(const char *text, loci_log_level *out);
void loci_log(loci_log_level level, const char *format, ...) LOCI_PRINTF(2, 3);

#define loci_log_debug(...) loci_log(LOCI_LOG_DEBUG, __VA_ARGS__)
#define loci_log_info(...) loci_log(LOCI_LOG_INFO, __VA_ARGS__)
#define loci_log_warn(...) loci_log(LOCI_LOG_WARN, __VA_ARGS__)
#define loci_log_error(...) loci_log(LOCI_LOG_ERROR, __VA_ARGS__)

#endif
