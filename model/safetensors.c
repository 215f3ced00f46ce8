/* SPDX-License-Identifier: Apache-2.0
 *
 * Reader of .safetensors files; see safetensors.h.
 *
 * A file is u64 little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
 * then the bytes of the tensors, which together cover the rest of the file without holes. Tensors
 * of all shards stand in one array sorted by name. Their names are borrowed from the parsed
 * headers, which live as long as the object.
 */
#include "model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/mapping.h"
#include "model/json.h"

/* A header of 16 MiB describes more than 100,000 tensors. */
enum {
    HEADER_BYTES_MAX = 16 << 20,
    INDEX_BYTES_MAX = 16 << 20,
    SHARDS_MAX = 4096,
    DIMS_MAX = 4,
    PATH_BYTES = 4096
};

typedef struct shard {
    char *path;
    const char *name; /* as the index calls it; NULL without an index */
    loci_mapping *mapping;
    const uint8_t *map; /* its data */
    size_t map_bytes;
    const uint8_t *data; /* behind the header */
    json_t *header;
    struct entry *entries; /* of the whole shard, sorted by place in the file */
    size_t count;
} shard;

typedef struct entry {
    const char *name;
    const char *dtype;
    uint32_t dims; /* of the file, may be above DIMS_MAX */
    uint32_t size; /* bytes of one element */
    uint64_t shape[DIMS_MAX];
    uint64_t begin, end; /* in the file's data */
    const shard *home;
} entry;

struct loci_safetensors {
    shard *shards;
    size_t shard_count;
    json_t *index;
    entry *entries; /* sorted by name */
    size_t count;
};

typedef struct dtype_info {
    const char *name;
    uint32_t size;
    int dtype; /* loci_dtype, or -1: known but not used by Loci */
} dtype_info;

static const dtype_info dtypes[] = {
    {"F32", 4, LOCI_F32}, {"BF16", 2, LOCI_BF16}, {"F16", 2, LOCI_F16}, {"F64", 8, -1},
    {"I64", 8, -1},       {"U64", 8, -1},         {"I32", 4, -1},       {"U32", 4, -1},
    {"I16", 2, -1},       {"U16", 2, -1},         {"I8", 1, -1},        {"U8", 1, -1},
    {"BOOL", 1, -1},      {"F8_E4M3", 1, -1},     {"F8_E5M2", 1, -1},   {"F8_E8M0", 1, -1},
};

static const dtype_info *find_dtype(const char *name) {
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtypes[i].name, name) == 0) return &dtypes[i];
    return NULL;
}

static loci_status corrupt(loci_error *err, const shard *file, const char *tensor,
                           const char *fault) {
    return loci_fail(err, LOCI_E_CORRUPT, "%s: tensor \"%.120s\" %s", file->path, tensor, fault);
}

/* Element count of the shape; false when it is not a list of sizes or overflows. */
static bool read_shape(const json_t *shape, entry *out, uint64_t *elements) {
    if (!json_is_array(shape) || json_array_size(shape) > 64) return false;
    out->dims = (uint32_t)json_array_size(shape);
    *elements = 1;
    for (uint32_t i = 0; i < out->dims; i++) {
        const json_t *size = json_array_get(shape, i);
        json_int_t value = json_integer_value(size);
        if (!json_is_integer(size) || value < 0) return false;
        if (__builtin_mul_overflow(*elements, (uint64_t)value, elements)) return false;
        if (i < DIMS_MAX) out->shape[i] = (uint64_t)value;
    }
    return true;
}

static loci_status read_entry(const shard *file, const char *name, const json_t *value,
                              uint64_t data_bytes, entry *out, loci_error *err) {
    *out = (entry){.name = name, .home = file};
    out->dtype = json_string_value(json_object_get(value, "dtype"));
    if (!out->dtype) return corrupt(err, file, name, "has no dtype");
    const dtype_info *info = find_dtype(out->dtype);
    if (!info)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: tensor \"%.120s\" has unknown dtype %.40s",
                         file->path, name, out->dtype);
    out->size = info->size;
    uint64_t elements, bytes;
    if (!read_shape(json_object_get(value, "shape"), out, &elements) ||
        __builtin_mul_overflow(elements, (uint64_t)info->size, &bytes))
        return corrupt(err, file, name, "has a shape that is no list of sizes or overflows");
    const json_t *offsets = json_object_get(value, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return corrupt(err, file, name, "has data_offsets that are no pair begin <= end");
    out->begin = (uint64_t)json_integer_value(begin);
    out->end = (uint64_t)json_integer_value(end);
    if (out->end > data_bytes) return corrupt(err, file, name, "reaches past the end of the file");
    if (out->end - out->begin != bytes)
        return corrupt(err, file, name, "has a byte length that does not fit its shape and dtype");
    return LOCI_OK;
}

static int by_place(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}

/* The tensors must cover the data from its first byte to its last, each byte once. */
static loci_status check_cover(const shard *file, uint64_t data_bytes, loci_error *err) {
    uint64_t at = 0;
    for (size_t i = 0; i < file->count; i++) {
        const entry *tensor = &file->entries[i];
        if (tensor->begin < at) return corrupt(err, file, tensor->name, "overlaps another tensor");
        if (tensor->begin > at) return corrupt(err, file, tensor->name, "follows unused bytes");
        at = tensor->end;
    }
    if (at != data_bytes)
        return loci_fail(err, LOCI_E_CORRUPT, "%s has %llu bytes after its last tensor", file->path,
                         (unsigned long long)(data_bytes - at));
    return LOCI_OK;
}

static loci_status parse_shard(shard *file, loci_error *err) {
    uint64_t header_bytes = 0;
    if (file->map_bytes >= 8) {
        loci_reader reader = loci_reader_of(loci_slice_of(file->map, 8));
        header_bytes = loci_read_u64(&reader);
    }
    if (file->map_bytes < 8 || header_bytes > file->map_bytes - 8)
        return loci_fail(err, LOCI_E_CORRUPT,
                         "%s is truncated: %zu bytes cannot hold its header of %llu bytes",
                         file->path, file->map_bytes, (unsigned long long)header_bytes);
    if (header_bytes > HEADER_BYTES_MAX)
        return loci_fail(err, LOCI_E_LIMIT, "%s: the header has %llu bytes; at most %d are read",
                         file->path, (unsigned long long)header_bytes, (int)HEADER_BYTES_MAX);
    char what[PATH_BYTES + 16];
    snprintf(what, sizeof what, "the header of %s", file->path);
    LOCI_TRY(loci_json_parse(what, file->map + 8, (size_t)header_bytes, &file->header, err));
    uint64_t data_bytes = file->map_bytes - 8 - header_bytes;
    file->data = file->map + 8 + header_bytes;
    file->entries = calloc(json_object_size(file->header) + 1, sizeof *file->entries);
    if (!file->entries) return loci_fail(err, LOCI_E_NOMEM, "no memory for %s", file->path);
    const char *name;
    json_t *value;
    json_object_foreach(file->header, name, value) {
        if (strcmp(name, "__metadata__") == 0) continue;
        LOCI_TRY(read_entry(file, name, value, data_bytes, &file->entries[file->count], err));
        file->count++;
    }
    qsort(file->entries, file->count, sizeof *file->entries, by_place);
    LOCI_TRY(check_cover(file, data_bytes, err));
    qsort(file->entries, file->count, sizeof *file->entries, by_name);
    return LOCI_OK;
}

static loci_status map_shard(shard *file, loci_error *err) {
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return loci_fail(err, errno == ENOENT ? LOCI_E_NOTFOUND : LOCI_E_IO,
                         "%s cannot be opened: %s", file->path, strerror(errno));
    struct stat info;
    loci_status status = LOCI_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = loci_fail(err, LOCI_E_IO, "%s is not a regular file", file->path);
    } else if (info.st_size > 0) {
        status = loci_mapping_open(fd, (uint64_t)info.st_size, file->path, &file->mapping, err);
        if (status == LOCI_OK) {
            file->map = loci_mapping_data(file->mapping);
            file->map_bytes = (size_t)info.st_size;
        }
    }
    close(fd);
    return status;
}

static loci_status open_shard(shard *file, const char *dir, const char *name, loci_error *err) {
    char path[PATH_BYTES];
    int len = snprintf(path, sizeof path, "%s/%s", dir, name);
    if (len < 0 || (size_t)len >= sizeof path)
        return loci_fail(err, LOCI_E_INVAL, "the name of weight file %.200s is too long", name);
    file->path = strdup(path);
    if (!file->path) return loci_fail(err, LOCI_E_NOMEM, "no memory for %s", path);
    LOCI_TRY(map_shard(file, err));
    return parse_shard(file, err);
}

/* A shard is a plain file of the folder, whatever the index says. */
static bool plain_file_name(const char *name) {
    return name && name[0] && strlen(name) < 256 && !strchr(name, '/') && !strstr(name, "..");
}

static const entry *find_entry(const entry *entries, size_t count, const char *name) {
    if (count == 0) return NULL;
    return bsearch(&(entry){.name = name}, entries, count, sizeof *entries, by_name);
}

static loci_status shard_of(loci_safetensors *file, const char *dir, const char *name,
                            const shard **out, loci_error *err) {
    for (size_t i = 0; i < file->shard_count; i++) {
        *out = &file->shards[i];
        if (strcmp(file->shards[i].name, name) == 0) return LOCI_OK;
    }
    if (file->shard_count == SHARDS_MAX)
        return loci_fail(err, LOCI_E_LIMIT, "%s: the weights are in more than %d files", dir,
                         (int)SHARDS_MAX);
    shard *added = &file->shards[file->shard_count++];
    *added = (shard){.name = name};
    *out = added;
    return open_shard(added, dir, name, err);
}

/* Every tensor that the index names must be in the shard it names; others stay invisible. */
static loci_status open_index(loci_safetensors *file, const char *dir, const char *path,
                              loci_error *err) {
    loci_json root = {path, file->index}, weights = {path, NULL};
    LOCI_TRY(loci_json_object(&root, "weight_map", path, LOCI_JSON_REQUIRED, &weights, err));
    size_t count = json_object_size(weights.object);
    file->shards = calloc(SHARDS_MAX, sizeof *file->shards);
    file->entries = calloc(count + 1, sizeof *file->entries);
    if (!file->shards || !file->entries)
        return loci_fail(err, LOCI_E_NOMEM, "no memory for %s", path);
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)weights.object, name, value) {
        const char *shard_name = json_string_value(value);
        if (!plain_file_name(shard_name))
            return loci_fail(err, LOCI_E_CORRUPT,
                             "%s: the file of tensor \"%.120s\" is not a plain file name", path,
                             name);
        const shard *home;
        LOCI_TRY(shard_of(file, dir, shard_name, &home, err));
        const entry *found = find_entry(home->entries, home->count, name);
        if (!found)
            return loci_fail(err, LOCI_E_CORRUPT, "%s: tensor \"%.120s\" is not in %s", path, name,
                             home->path);
        file->entries[file->count++] = *found;
    }
    qsort(file->entries, file->count, sizeof *file->entries, by_name);
    return LOCI_OK;
}

static loci_status open_single(loci_safetensors *file, const char *dir, loci_error *err) {
    file->shards = calloc(1, sizeof *file->shards);
    if (!file->shards) return loci_fail(err, LOCI_E_NOMEM, "no memory for the weights of %s", dir);
    file->shard_count = 1;
    LOCI_TRY(open_shard(&file->shards[0], dir, "model.safetensors", err));
    file->entries = file->shards[0].entries;
    file->count = file->shards[0].count;
    file->shards[0].entries = NULL;
    return LOCI_OK;
}

static loci_status open_folder(loci_safetensors *file, const char *dir, loci_error *err) {
    char path[PATH_BYTES];
    int len = snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    if (len < 0 || (size_t)len >= sizeof path)
        return loci_fail(err, LOCI_E_INVAL, "the name of the model folder is too long");
    char single[PATH_BYTES];
    snprintf(single, sizeof single, "%s/model.safetensors", dir);
    if (access(single, F_OK) == 0) return open_single(file, dir, err);
    loci_status status = loci_json_read(path, INDEX_BYTES_MAX, &file->index, err);
    if (status == LOCI_E_NOTFOUND)
        return loci_fail(err, LOCI_E_NOTFOUND,
                         "%s has neither model.safetensors nor model.safetensors.index.json", dir);
    LOCI_TRY(status);
    return open_index(file, dir, path, err);
}

loci_status loci_safetensors_open(const char *dir, loci_safetensors **out, loci_error *err) {
    loci_safetensors *file = calloc(1, sizeof *file);
    if (!file) return loci_fail(err, LOCI_E_NOMEM, "no memory for the weights of %s", dir);
    loci_status status = open_folder(file, dir, err);
    loci_error unread;
    if (loci_safetensors_check(file, &unread) != LOCI_OK) {
        status = unread.status; /* explains whatever was found wrong */
        *err = unread;
    }
    if (status != LOCI_OK) {
        loci_safetensors_close(file);
        return status;
    }
    *out = file;
    return LOCI_OK;
}

loci_status loci_safetensors_check(const loci_safetensors *file, loci_error *err) {
    for (size_t i = 0; i < file->shard_count; i++)
        if (file->shards[i].mapping) LOCI_TRY(loci_mapping_check(file->shards[i].mapping, err));
    return LOCI_OK;
}

void loci_safetensors_close(loci_safetensors *file) {
    if (!file) return;
    for (size_t i = 0; i < file->shard_count; i++) {
        shard *part = &file->shards[i];
        loci_mapping_close(part->mapping);
        json_decref(part->header);
        free(part->entries);
        free(part->path);
    }
    json_decref(file->index);
    free(file->shards);
    free(file->entries);
    free(file);
}

static void shape_text(char *out, size_t size, uint32_t dims, const uint64_t *shape) {
    size_t at = 0;
    out[0] = 0;
    for (uint32_t i = 0; i < dims && i < DIMS_MAX && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, i ? ", %llu" : "%llu",
                               (unsigned long long)shape[i]);
}

static loci_status wrong_shape(const entry *found, uint32_t dims, const uint64_t *shape,
                               loci_error *err) {
    char has[96], wants[96];
    shape_text(has, sizeof has, found->dims, found->shape);
    shape_text(wants, sizeof wants, dims, shape);
    return loci_fail(err, LOCI_E_INVAL,
                     "%.120s: tensor \"%.80s\" has shape [%s]; [%s] was expected",
                     found->home->path, found->name, has, wants);
}

loci_status loci_safetensors_get(const loci_safetensors *file, const char *name, uint32_t dims,
                                 const uint64_t *shape, loci_tensor *out, loci_error *err) {
    LOCI_ASSERT(dims <= DIMS_MAX);
    const entry *found = find_entry(file->entries, file->count, name);
    if (!found)
        return loci_fail(err, LOCI_E_NOTFOUND, "the weights have no tensor \"%.120s\"", name);
    const dtype_info *info = find_dtype(found->dtype);
    if (info->dtype < 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: tensor \"%.120s\" has dtype %s; F32, BF16 and F16 are supported",
                         found->home->path, name, found->dtype);
    if (found->dims > DIMS_MAX)
        return loci_fail(err, LOCI_E_UNSUPPORTED, "%s: tensor \"%.120s\" has %u dimensions",
                         found->home->path, name, found->dims);
    if (dims > 0 && (found->dims != dims || memcmp(found->shape, shape, dims * sizeof *shape) != 0))
        return wrong_shape(found, dims, shape, err);
    const uint8_t *data = found->home->data + found->begin;
    if ((uintptr_t)data % found->size != 0)
        return loci_fail(err, LOCI_E_UNSUPPORTED,
                         "%s: tensor \"%.120s\" is not aligned to %u bytes", found->home->path,
                         name, found->size);
    *out = (loci_tensor){.name = found->name,
                         .dtype = (loci_dtype)info->dtype,
                         .dims = found->dims,
                         .data = data,
                         .bytes = found->end - found->begin};
    memcpy(out->shape, found->shape, sizeof out->shape);
    return LOCI_OK;
}

size_t loci_safetensors_count(const loci_safetensors *file) {
    return file->count;
}

const char *loci_safetensors_name(const loci_safetensors *file, size_t index) {
    LOCI_ASSERT(index < file->count);
    return file->entries[index].name;
}
