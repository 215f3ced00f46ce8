/* SPDX-License-Identifier: Apache-2.0
 *
 * Text and mappings of the status codes; formatting of errors.
 */
#include "base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *loci_status_text(loci_status status) {
    switch (status) {
#define X(name, value, grpc, text) \
    case LOCI_##name: return text;
        LOCI_STATUS_MAP(X)
#undef X
    }
    return "unknown status";
}

int loci_status_to_grpc(loci_status status) {
    switch (status) {
#define X(name, value, grpc, text) \
    case LOCI_##name: return grpc;
        LOCI_STATUS_MAP(X)
#undef X
    }
    return 2;
}

static const char *const code_names[] = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

const char *loci_status_code_name(loci_status status) {
    int code = loci_status_to_grpc(status);
    return code >= 0 && code <= 16 ? code_names[code] : "UNKNOWN";
}

loci_status loci_status_from_grpc(int code) {
    switch (code) {
    case 0: return LOCI_OK;
    case 1: return LOCI_E_CANCELLED;
    case 3: return LOCI_E_INVAL;
    case 4: return LOCI_E_TIMEOUT;
    case 5: return LOCI_E_NOTFOUND;
    case 6: return LOCI_E_EXISTS;
    case 8: return LOCI_E_LIMIT;
    case 9: return LOCI_E_PRECONDITION;
    case 10: return LOCI_E_ABORTED;
    case 12: return LOCI_E_UNSUPPORTED;
    case 13: return LOCI_E_INTERNAL;
    case 14: return LOCI_E_UNAVAILABLE;
    case 15: return LOCI_E_CORRUPT;
    default: return LOCI_E_RPC;
    }
}

static void set_error(loci_error *err, loci_status status, const char *reason, const char *format,
                      va_list args) {
    if (!err) return;
    err->status = status;
    snprintf(err->reason, sizeof err->reason, "%s", reason);
    vsnprintf(err->text, sizeof err->text, format, args);
}

loci_status loci_fail(loci_error *err, loci_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    set_error(err, status, "", format, args);
    va_end(args);
    return status;
}

loci_status loci_fail_reason(loci_error *err, loci_status status, const char *reason,
                             const char *format, ...) {
    va_list args;
    va_start(args, format);
    set_error(err, status, reason, format, args);
    va_end(args);
    return status;
}

loci_status loci_fail_prefix(loci_error *err, loci_status status, const char *format, ...) {
    if (!err) return status;
    char old[sizeof err->text];
    memcpy(old, err->text, sizeof old);
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    size_t used = strlen(err->text);
    snprintf(err->text + used, sizeof err->text - used, ": %s", old);
    err->status = status;
    return status;
}

void loci_assert_failed(const char *file, int line, const char *expression) {
    fprintf(stderr, "loci: %s:%d: assertion failed: %s\n", file, line, expression);
    abort();
}
