/* SPDX-License-Identifier: Apache-2.0
 *
 * Text helpers; see text.h.
 */
#include "services/common/text.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/un.h>

static bool is_continuation(uint8_t c) {
    return (c & 0xc0) == 0x80;
}

/* The Unicode standard, table 3-7: no overlong forms, no surrogates, at most U+10FFFF. */
size_t loci_utf8_step(loci_slice text) {
    if (text.len == 0) return 0;
    const uint8_t *s = text.data;
    if (s[0] < 0x80) return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf) return text.len >= 2 && is_continuation(s[1]) ? 2 : 0;
    if (s[0] >= 0xe0 && s[0] <= 0xef) {
        if (text.len < 3 || !is_continuation(s[1]) || !is_continuation(s[2])) return 0;
        if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
        if (s[0] == 0xed && s[1] > 0x9f) return 0;
        return 3;
    }
    if (s[0] >= 0xf0 && s[0] <= 0xf4) {
        if (text.len < 4 || !is_continuation(s[1]) || !is_continuation(s[2]) ||
            !is_continuation(s[3]))
            return 0;
        if (s[0] == 0xf0 && s[1] < 0x90) return 0;
        if (s[0] == 0xf4 && s[1] > 0x8f) return 0;
        return 4;
    }
    return 0;
}

bool loci_utf8_valid(loci_slice text) {
    while (text.len > 0) {
        size_t step = loci_utf8_step(text);
        if (step == 0) return false;
        text = loci_slice_of(text.data + step, text.len - step);
    }
    return true;
}

void loci_utf8_append_clean(loci_buf *out, loci_slice text) {
    while (text.len > 0) {
        size_t step = loci_utf8_step(text);
        if (step == 0) {
            loci_buf_append(out, "\xef\xbf\xbd", 3);
            step = 1;
        } else {
            loci_buf_append(out, text.data, step);
        }
        text = loci_slice_of(text.data + step, text.len - step);
    }
}

static bool is_space(uint8_t c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static uint8_t lower(uint8_t c) {
    return c >= 'A' && c <= 'Z' ? (uint8_t)(c | 0x20) : c;
}

static bool is_alnum(uint8_t c) {
    return (c >= '0' && c <= '9') || (lower(c) >= 'a' && lower(c) <= 'z');
}

/* End of `wanted` in `text` when it stands at `at`, else 0. Neither is empty. */
static size_t match_at(loci_slice text, size_t at, loci_slice wanted) {
    size_t w = 0;
    if (at > 0 && is_alnum(text.data[at - 1]) && is_alnum(wanted.data[0])) return 0;
    while (w < wanted.len) {
        if (at >= text.len) return 0;
        bool space = is_space(wanted.data[w]);
        if (space != is_space(text.data[at])) return 0;
        if (!space && lower(wanted.data[w]) != lower(text.data[at])) return 0;
        w++;
        at++;
        if (!space) continue;
        while (w < wanted.len && is_space(wanted.data[w])) w++;
        while (at < text.len && is_space(text.data[at])) at++;
    }
    if (at < text.len && is_alnum(text.data[at]) && is_alnum(wanted.data[w - 1])) return 0;
    return at;
}

bool loci_text_find(loci_slice text, size_t from, loci_slice wanted, size_t *start, size_t *end) {
    while (wanted.len > 0 && is_space(wanted.data[wanted.len - 1])) wanted.len--;
    while (wanted.len > 0 && is_space(wanted.data[0]))
        wanted = loci_slice_of(wanted.data + 1, wanted.len - 1);
    if (wanted.len == 0) return false;
    for (size_t at = from; at < text.len; at++) {
        *end = match_at(text, at, wanted);
        if (*end == 0) continue;
        *start = at;
        return true;
    }
    return false;
}

bool loci_parse_u64(const char *text, uint64_t min, uint64_t max, uint64_t *out) {
    if (!isdigit((unsigned char)text[0])) return false;
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *end != '\0' || value < min || value > max) return false;
    *out = value;
    return true;
}

bool loci_parse_double(const char *text, double min, double max, double *out) {
    if (text[0] == '\0' || isspace((unsigned char)text[0])) return false;
    char *end = NULL;
    errno = 0;
    double value = strtod(text, &end);
    if (errno != 0 || *end != '\0' || !isfinite(value) || value < min || value > max) return false;
    *out = value;
    return true;
}

bool loci_parse_size(const char *text, uint64_t *out) {
    static const char suffixes[] = "KMGT";
    if (!isdigit((unsigned char)text[0])) return false;
    char *end = NULL;
    errno = 0;
    double value = strtod(text, &end);
    if (errno != 0) return false;
    if (*end != '\0') {
        const char *at = strchr(suffixes, toupper((unsigned char)*end));
        if (!at) return false;
        for (const char *s = suffixes; s <= at; s++) value *= 1024.0;
        end++;
        if (*end == 'i') end++;
        if (*end == 'B') end++;
        if (*end != '\0') return false;
    }
    if (value >= 9e18) return false;
    *out = (uint64_t)value;
    return true;
}

bool loci_parse_bool(const char *text, bool *out) {
    static const char *const words[] = {"true", "false", "yes", "no", "on", "off", "1", "0"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *out = i % 2 == 0;
            return true;
        }
    }
    return false;
}

const char *loci_format_size(char out[32], uint64_t bytes) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 1024.0 && unit + 1 < sizeof units / sizeof units[0]) {
        value /= 1024.0;
        unit++;
    }
    int digits = unit == 0 || value >= 100.0 ? 0 : value >= 10.0 ? 1 : 2;
    snprintf(out, 32, "%.*f %s", digits, value, units[unit]);
    return out;
}

const char *loci_format_count(char out[32], uint64_t count) {
    char digits[32];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)count);
    size_t at = 0;
    for (int i = 0; i < len; i++) {
        if (i > 0 && (len - i) % 3 == 0) out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = '\0';
    return out;
}

static loci_status bad_address(const char *address, const char *why, loci_error *err) {
    return loci_fail_reason(err, LOCI_E_INVAL, "INVALID_ADDRESS",
                            "address \"%.100s\" %s; use HOST:PORT, [V6]:PORT or unix:PATH", address,
                            why);
}

loci_status loci_address_check(const char *address, bool *local, loci_error *err) {
    if (strncmp(address, "unix:", 5) == 0) {
        *local = true;
        size_t room = sizeof((struct sockaddr_un *)NULL)->sun_path;
        if (address[5] == '\0') return bad_address(address, "has no path", err);
        if (strlen(address + 5) >= room) return bad_address(address, "has too long a path", err);
        return LOCI_OK;
    }
    const char *colon = strrchr(address, ':');
    uint64_t port = 0;
    if (!colon || !loci_parse_u64(colon + 1, 0, 65535, &port))
        return bad_address(address, "has no port from 0 to 65535", err);
    char host[256];
    size_t len = (size_t)(colon - address);
    if (len == 0 || len >= sizeof host) return bad_address(address, "has no host", err);
    memcpy(host, address, len);
    host[len] = '\0';
    bool bracketed = host[0] == '[' && host[len - 1] == ']';
    if (!bracketed && strchr(host, ':'))
        return bad_address(address, "has an IPv6 host without brackets", err);
    *local = strcmp(host, "localhost") == 0 || strcmp(host, "[::1]") == 0;
    unsigned a, b, c, d;
    char rest;
    if (sscanf(host, "%3u.%3u.%3u.%3u%c", &a, &b, &c, &d, &rest) == 4)
        *local = a == 127 && b < 256 && c < 256 && d < 256;
    return LOCI_OK;
}
