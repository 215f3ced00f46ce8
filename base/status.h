/* SPDX-License-Identifier: Apache-2.0
 *
 * Status codes and errors shared by every module.
 *
 * A function that can fail returns loci_status and, at module borders, takes a
 * loci_error that receives one readable sentence naming the object at fault.
 * No allocation, no thread-local state. Programmer errors are asserted
 * (LOCI_ASSERT stays on in release builds); operating errors are returned.
 */
#ifndef LOCI_BASE_STATUS_H
#define LOCI_BASE_STATUS_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* name, value, gRPC status code (google.rpc.Code), text */
#define LOCI_STATUS_MAP(X)                          \
    X(OK, 0, 0, "ok")                               \
    X(E_INVAL, -1, 3, "invalid argument")           \
    X(E_NOTFOUND, -2, 5, "not found")               \
    X(E_EXISTS, -3, 6, "already exists")            \
    X(E_PRECONDITION, -4, 9, "failed precondition") \
    X(E_LIMIT, -5, 8, "resource exhausted")         \
    X(E_NOMEM, -6, 8, "out of memory")              \
    X(E_CORRUPT, -7, 15, "data loss")               \
    X(E_IO, -8, 13, "input/output error")           \
    X(E_CANCELLED, -9, 1, "cancelled")              \
    X(E_TIMEOUT, -10, 4, "deadline exceeded")       \
    X(E_UNAVAILABLE, -11, 14, "unavailable")        \
    X(E_UNSUPPORTED, -12, 12, "unsupported")        \
    X(E_INTERNAL, -13, 13, "internal error")        \
    X(E_ABORTED, -14, 10, "aborted")                \
    X(E_RPC, -15, 2, "rpc error")

typedef enum loci_status {
#define X(name, value, grpc, text) LOCI_##name = (value),
    LOCI_STATUS_MAP(X)
#undef X
} loci_status;

/* One error. `reason` is the google.rpc.ErrorInfo reason: UPPER_SNAKE_CASE, at
 * most 63 characters, stable over releases; empty means "derive from status". */
typedef struct loci_error {
    loci_status status;
    char reason[64];
    char text[400];
} loci_error;

#if defined(__GNUC__)
#define LOCI_MUST_CHECK __attribute__((warn_unused_result))
#define LOCI_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define LOCI_MUST_CHECK
#define LOCI_PRINTF(a, b)
#endif

const char *loci_status_text(loci_status status);
/* "INVALID_ARGUMENT" and so on: the google.rpc.Code name. */
const char *loci_status_code_name(loci_status status);
int loci_status_to_grpc(loci_status status);
loci_status loci_status_from_grpc(int code);

/* Fills *err (which may be NULL) and returns status, so that callers can write
 * `return loci_fail(err, LOCI_E_INVAL, "...", ...)`. */
loci_status loci_fail(loci_error *err, loci_status status, const char *format, ...)
    LOCI_PRINTF(3, 4);
/* The same with a stable machine-readable reason. */
loci_status loci_fail_reason(loci_error *err, loci_status status, const char *reason,
                             const char *format, ...) LOCI_PRINTF(4, 5);
/* Puts "prefix: " before the text already in *err; keeps status and reason. */
loci_status loci_fail_prefix(loci_error *err, loci_status status, const char *format, ...)
    LOCI_PRINTF(3, 4);

/* Aborts after printing file, line and expression. For programmer errors only. */
void loci_assert_failed(const char *file, int line, const char *expression);
#define LOCI_ASSERT(expr) ((expr) ? (void)0 : loci_assert_failed(__FILE__, __LINE__, #expr))

#define LOCI_TRY(expr)                                  \
    do {                                                \
        loci_status try_status_ = (expr);               \
        if (try_status_ != LOCI_OK) return try_status_; \
    } while (0)

/* Needs a `loci_status status` variable and a cleanup label in scope. */
#define LOCI_TRY_GOTO(expr, label)         \
    do {                                   \
        status = (expr);                   \
        if (status != LOCI_OK) goto label; \
    } while (0)

#endif
