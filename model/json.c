/* SPDX-License-Identifier: Apache-2.0
 *
 * Bounded JSON reading; see json.h.
 */
#include "model/json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

loci_status loci_json_parse(const char *what, const void *text, size_t len, json_t **out,
                            loci_error *err) {
    json_error_t fault;
    json_t *root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &fault);
    if (!root)
        return loci_fail(err, LOCI_E_CORRUPT, "%s is not valid JSON: %s (line %d, column %d)", what,
                         fault.text, fault.line, fault.column);
    if (!json_is_object(root)) {
        json_decref(root);
        return loci_fail(err, LOCI_E_CORRUPT, "%s is not a JSON object", what);
    }
    *out = root;
    return LOCI_OK;
}

static loci_status read_whole(int fd, const char *path, uint8_t *data, size_t len,
                              loci_error *err) {
    for (size_t at = 0; at < len;) {
        ssize_t got = read(fd, data + at, len - at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return loci_fail(err, LOCI_E_IO, "%s cannot be read: %s", path, strerror(errno));
        if (got == 0) return loci_fail(err, LOCI_E_IO, "%s shrank while it was read", path);
        at += (size_t)got;
    }
    return LOCI_OK;
}

loci_status loci_json_read(const char *path, size_t bytes_max, json_t **out, loci_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return loci_fail(err, errno == ENOENT ? LOCI_E_NOTFOUND : LOCI_E_IO,
                         "%s cannot be opened: %s", path, strerror(errno));
    uint8_t *data = NULL;
    loci_status status;
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = loci_fail(err, LOCI_E_IO, "%s is not a regular file", path);
        goto out;
    }
    if ((uint64_t)info.st_size > bytes_max) {
        status = loci_fail(err, LOCI_E_LIMIT, "%s has %lld bytes; at most %zu are read", path,
                           (long long)info.st_size, bytes_max);
        goto out;
    }
    size_t len = (size_t)info.st_size;
    data = malloc(len + 1);
    if (!data) {
        status = loci_fail(err, LOCI_E_NOMEM, "no memory for %s", path);
        goto out;
    }
    LOCI_TRY_GOTO(read_whole(fd, path, data, len, err), out);
    status = loci_json_parse(path, data, len, out, err);
out:
    free(data);
    close(fd);
    return status;
}

const json_t *loci_json_member(const loci_json *in, const char *key) {
    const json_t *value = json_object_get(in->object, key);
    return json_is_null(value) ? NULL : value;
}

/* LOCI_OK with *out NULL: an optional member that is not there. */
static loci_status find(const loci_json *in, const char *key, loci_json_need need,
                        const json_t **out, loci_error *err) {
    *out = loci_json_member(in, key);
    if (!*out && need == LOCI_JSON_REQUIRED)
        return loci_fail(err, LOCI_E_INVAL, "%s lacks \"%s\"", in->what, key);
    return LOCI_OK;
}

static loci_status wrong_type(const loci_json *in, const char *key, const char *expected,
                              loci_error *err) {
    return loci_fail(err, LOCI_E_INVAL, "%s: \"%s\" is not %s", in->what, key, expected);
}

loci_status loci_json_u32(const loci_json *in, const char *key, loci_json_need need, uint32_t min,
                          uint32_t max, uint32_t *out, loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_integer(value)) return wrong_type(in, key, "an integer", err);
    json_int_t number = json_integer_value(value);
    if (number < (json_int_t)min || number > (json_int_t)max)
        return loci_fail(err, LOCI_E_INVAL, "%s: \"%s\" is %lld, outside %u to %u", in->what, key,
                         (long long)number, min, max);
    *out = (uint32_t)number;
    return LOCI_OK;
}

loci_status loci_json_float(const loci_json *in, const char *key, loci_json_need need, double min,
                            double max, float *out, loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_number(value)) return wrong_type(in, key, "a number", err);
    double number = json_number_value(value);
    if (!(number >= min && number <= max))
        return loci_fail(err, LOCI_E_INVAL, "%s: \"%s\" is %g, outside %g to %g", in->what, key,
                         number, min, max);
    *out = (float)number;
    return LOCI_OK;
}

loci_status loci_json_bool(const loci_json *in, const char *key, loci_json_need need, bool *out,
                           loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_boolean(value)) return wrong_type(in, key, "true or false", err);
    *out = json_is_true(value);
    return LOCI_OK;
}

loci_status loci_json_string(const loci_json *in, const char *key, loci_json_need need,
                             const char **out, loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_string(value)) return wrong_type(in, key, "a string", err);
    *out = json_string_value(value);
    return LOCI_OK;
}

loci_status loci_json_array(const loci_json *in, const char *key, loci_json_need need,
                            const json_t **out, loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_array(value)) return wrong_type(in, key, "an array", err);
    *out = value;
    return LOCI_OK;
}

loci_status loci_json_object(const loci_json *in, const char *key, const char *what,
                             loci_json_need need, loci_json *out, loci_error *err) {
    const json_t *value;
    LOCI_TRY(find(in, key, need, &value, err));
    if (!value) return LOCI_OK;
    if (!json_is_object(value)) return wrong_type(in, key, "an object", err);
    *out = (loci_json){what, value};
    return LOCI_OK;
}
