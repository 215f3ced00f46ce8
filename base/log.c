/* SPDX-License-Identifier: Apache-2.0
 *
 * Log lines; see log.h.
 */
#include "base/log.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static atomic_int least_level = LOCI_LOG_INFO;
static atomic_bool json_lines = false;
static const char *const level_names[] = {"debug", "info", "warn", "error"};

void loci_log_configure(loci_log_level least, bool json) {
    atomic_store(&least_level, (int)least);
    atomic_store(&json_lines, json);
}

bool loci_log_level_parse(const char *text, loci_log_level *out) {
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, level_names[i]) == 0) {
            *out = (loci_log_level)i;
            return true;
        }
    }
    return false;
}

/* Appends text with JSON escapes; returns the new length, at most size - 8. */
static size_t append_escaped(char *line, size_t len, size_t size, const char *text) {
    for (; *text && len + 8 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            line[len++] = '\\';
            line[len++] = (char)c;
        } else if (c < 0x20) {
            len += (size_t)snprintf(line + len, size - len, "\\u%04x", c);
        } else {
            line[len++] = (char)c;
        }
    }
    return len;
}

void loci_log(loci_log_level level, const char *format, ...) {
    if ((int)level < atomic_load(&least_level)) return;
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);

    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct tm utc;
    gmtime_r(&now.tv_sec, &utc);
    char stamp[32];
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);

    char line[2400];
    bool json = atomic_load(&json_lines);
    int head = snprintf(line, sizeof line,
                        json ? "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\",\"message\":\""
                             : "%s.%03ldZ %-5s ",
                        stamp, now.tv_nsec / 1000000, level_names[level]);
    size_t len = append_escaped(line, (size_t)head, sizeof line - 4, text);
    if (json) {
        line[len++] = '"';
        line[len++] = '}';
    }
    line[len++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, len);
    (void)written; /* nowhere left to report a failing log */
}
