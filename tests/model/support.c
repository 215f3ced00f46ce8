/* SPDX-License-Identifier: Apache-2.0
 *
 * See support.h.
 */
#include "support.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

char dir[] = "/tmp/loci-model-XXXXXX";

int make_dir(void **state) {
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

int clear_dir(void **state) {
    (void)state;
    char path[PATH_BYTES];
    DIR *folder = opendir(dir);
    if (!folder) return -1;
    int failed = 0;
    for (struct dirent *entry; (entry = readdir(folder));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (remove(path_of(path, entry->d_name)) != 0) failed = -1;
    }
    closedir(folder);
    return failed;
}

int remove_dir(void **state) {
    clear_dir(state);
    return rmdir(dir);
}

const char *path_of(char out[static PATH_BYTES], const char *name) {
    snprintf(out, PATH_BYTES, "%s/%s", dir, name);
    return out;
}

void write_file(const char *name, const void *data, size_t len) {
    char path[PATH_BYTES];
    FILE *file = fopen(path_of(path, name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, len, file), len);
    assert_int_equal(fclose(file), 0);
}

void write_text(const char *name, const char *text) {
    write_file(name, text, strlen(text));
}

void read_file(const char *path, loci_buf *out) {
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s cannot be opened", path);
    uint8_t chunk[4096];
    for (size_t got; (got = fread(chunk, 1, sizeof chunk, file)) > 0;)
        loci_buf_append(out, chunk, got);
    fclose(file);
    assert_non_null(loci_buf_text(out));
}

uint32_t xorshift(uint32_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}
