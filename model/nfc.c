/* SPDX-License-Identifier: Apache-2.0
 *
 * Normalization form C; see nfc.h.
 *
 * Text is cut in clusters: a character and the marks and vowels behind it that may compose with
 * it. Nothing composes across clusters, most of which are one character that is its own normal
 * form. The tables and the composing of pairs are utf8proc's; ordering is done here, since that
 * library's takes quadratic time on long runs of marks.
 */
#include "model/nfc.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* Below this no character composes with the one before it or has a normal form other than itself.
 */
enum { FIRST_MARK = 0x300 };

/* The reference implementation (tokenizers) normalizes by the tables of Unicode 9: marks and pairs
 * of later versions are to it characters that neither move nor compose. */
static const struct {
    int32_t first, last;
} newer[] = {{0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},
             {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},
             {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x10d24, 0x10d27},
             {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85},
             {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
             {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
             {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99},
             {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42},
             {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae},
             {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}};

static bool is_newer(int32_t c) {
    size_t low = 0, high = sizeof newer / sizeof newer[0];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (newer[middle].last < c)
            low = middle + 1;
        else
            high = middle;
    }
    return low < sizeof newer / sizeof newer[0] && newer[low].first <= c;
}

static unsigned combining_class(int32_t c) {
    unsigned class = (uint8_t)utf8proc_get_property(c)->combining_class;
    return class && is_newer(c) ? 0 : class;
}

void loci_nfc_fini(loci_nfc *nfc) {
    loci_buf_fini(&nfc->text);
    free(nfc->changes);
    free(nfc->points);
    free(nfc->order);
    *nfc = (loci_nfc){0};
}

size_t loci_utf8_length(const uint8_t *data, size_t len) {
    uint8_t c = data[0];
    if (c < 0x80) return 1;
    size_t want = c >= 0xc2 && c < 0xe0   ? 2
                  : c >= 0xe0 && c < 0xf0 ? 3
                  : c >= 0xf0 && c < 0xf5 ? 4
                                          : 0;
    if (want == 0 || want > len) return 0;
    for (size_t i = 1; i < want; i++)
        if ((data[i] & 0xc0) != 0x80) return 0;
    if ((c == 0xe0 && data[1] < 0xa0) || (c == 0xed && data[1] > 0x9f) ||
        (c == 0xf0 && data[1] < 0x90) || (c == 0xf4 && data[1] > 0x8f))
        return 0;
    return want;
}

static int32_t decode(const uint8_t *data, size_t len) {
    int32_t c = len == 1 ? data[0] : data[0] & (0x7f >> len);
    for (size_t i = 1; i < len; i++) c = c << 6 | (data[i] & 0x3f);
    return c;
}

/* May c compose with what stands before it? All that do are marks, or vowels and finals of Hangul.
 */
static bool continues(int32_t c) {
    if (c < FIRST_MARK) return false;
    if (c >= 0x1160 && c <= 0x11ff) return true;
    utf8proc_category_t category = utf8proc_category(c);
    bool mark = category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC ||
                category == UTF8PROC_CATEGORY_ME;
    return mark && !is_newer(c);
}

/* A character alone that may not be its own normal form (syllables of Hangul are). */
static bool decomposes(int32_t c) {
    return c >= FIRST_MARK && utf8proc_get_property(c)->decomp_seqindex != UINT16_MAX &&
           !is_newer(c);
}

static bool reserve(void **array, size_t *capacity, size_t needed, size_t size) {
    if (needed <= *capacity) return true;
    size_t wanted = needed + needed / 2 + 64;
    void *grown = realloc(*array, wanted * size);
    if (!grown) return false;
    *array = grown;
    *capacity = wanted;
    return true;
}

/* Decomposes the cluster into nfc->points; their number, or -1 when memory is short. */
static ptrdiff_t decompose(loci_nfc *nfc, const uint8_t *text, size_t len) {
    const utf8proc_option_t canonical = (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    size_t count = 0;
    for (size_t at = 0, step; at < len; at += step) {
        step = loci_utf8_length(text + at, len - at);
        void *points = nfc->points;
        /* A character decomposes in at most four. */
        if (!reserve(&points, &nfc->points_capacity, count + 8, sizeof *nfc->points)) return -1;
        nfc->points = points;
        int32_t c = decode(text + at, step);
        if (is_newer(c)) {
            nfc->points[count++] = c;
            continue;
        }
        int boundary = 0;
        utf8proc_ssize_t got =
            utf8proc_decompose_char(c, nfc->points + count, 8, canonical, &boundary);
        LOCI_ASSERT(got > 0 && got <= 8);
        count += (size_t)got;
    }
    return (ptrdiff_t)count;
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Canonical ordering of points[0..count): stably by combining class (8 bits above 35 of place and
 * 21 of the character itself). */
static bool order(loci_nfc *nfc, int32_t *points, size_t count) {
    void *keys = nfc->order;
    if (!reserve(&keys, &nfc->order_capacity, count, sizeof *nfc->order)) return false;
    nfc->order = keys;
    bool sorted = true;
    for (size_t i = 0; i < count; i++) {
        uint64_t class = combining_class(points[i]);
        nfc->order[i] = class << 56 | (uint64_t)i << 21 | (uint32_t)points[i];
        sorted = sorted && (i == 0 || nfc->order[i] > nfc->order[i - 1]);
    }
    if (sorted) return true;
    qsort(nfc->order, count, sizeof *nfc->order, by_value);
    for (size_t i = 0; i < count; i++) points[i] = (int32_t)(nfc->order[i] & 0x1fffff);
    return true;
}

/* The normal form of a cluster in nfc->points; the number of characters, or -1. */
static ptrdiff_t normalize(loci_nfc *nfc, const uint8_t *text, size_t len) {
    ptrdiff_t count = decompose(nfc, text, len);
    for (ptrdiff_t begin = 0, end; begin < count; begin = end) {
        /* Characters of class 0 stay where they are. */
        end = begin + 1;
        if (combining_class(nfc->points[begin]) == 0) continue;
        while (end < count && combining_class(nfc->points[end]) != 0) end++;
        if (!order(nfc, nfc->points + begin, (size_t)(end - begin))) return -1;
    }
    if (count <= 0) return count;
    return utf8proc_normalize_utf32(nfc->points, count,
                                    (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
}

/* The stretch of text under way: [copied, at) is not yet in nfc->text. */
typedef struct progress {
    loci_slice text;
    size_t copied;
    loci_nfc *nfc;
} progress;

static void copy_until(progress *p, size_t at) {
    loci_buf_append(&p->nfc->text, p->text.data + p->copied, at - p->copied);
    p->copied = at;
}

static bool put_cluster(progress *p, size_t begin, size_t end) {
    loci_nfc *nfc = p->nfc;
    ptrdiff_t count = normalize(nfc, p->text.data + begin, end - begin);
    if (count < 0) return false;
    void *changes = nfc->changes;
    if (!reserve(&changes, &nfc->capacity, nfc->count + 1, sizeof *nfc->changes)) return false;
    nfc->changes = changes;
    copy_until(p, begin);
    size_t from = nfc->text.len;
    for (ptrdiff_t i = 0; i < count; i++) {
        uint8_t bytes[4];
        loci_buf_append(&nfc->text, bytes, (size_t)utf8proc_encode_char(nfc->points[i], bytes));
    }
    size_t len = nfc->text.len - from;
    if (nfc->text.failed) return false;
    if (len == end - begin && memcmp(nfc->text.data + from, p->text.data + begin, len) == 0) {
        nfc->text.len = from; /* to be copied with what follows */
        return true;
    }
    p->copied = end;
    nfc->changes[nfc->count++] =
        (loci_nfc_change){(uint32_t)from, (uint32_t)nfc->text.len, (uint32_t)end};
    return true;
}

static loci_status no_memory(loci_error *err) {
    return loci_fail(err, LOCI_E_NOMEM, "no memory to normalize a text");
}

static loci_status too_long(loci_slice text, loci_error *err) {
    return loci_fail(err, LOCI_E_LIMIT, "a text of %zu bytes is too long to normalize", text.len);
}

loci_status loci_nfc_run(loci_nfc *nfc, loci_slice text, bool *changed, loci_error *err) {
    progress p = {text, 0, nfc};
    size_t begin = 0; /* of the cluster that is being read */
    bool suspect = false;
    loci_buf_clear(&nfc->text);
    nfc->count = 0;
    for (size_t at = 0;;) {
        size_t len = at < text.len ? loci_utf8_length(text.data + at, text.len - at) : 0;
        int32_t c = len ? decode(text.data + at, len) : 0;
        if (len == 0 || !continues(c)) {
            if (suspect && !put_cluster(&p, begin, at)) return no_memory(err);
            suspect = len > 0 && decomposes(c);
            begin = at;
        } else {
            suspect = true;
        }
        if (at == text.len) break;
        at += len ? len : 1;
        if (len == 0) begin = at;
        if (nfc->text.len > UINT32_MAX) return too_long(text, err);
    }
    *changed = nfc->count > 0;
    if (*changed) copy_until(&p, text.len);
    if (loci_buf_status(&nfc->text) != LOCI_OK) return no_memory(err);
    return nfc->text.len > UINT32_MAX ? too_long(text, err) : LOCI_OK;
}

void loci_nfc_origins(const loci_nfc *nfc, uint32_t *ends, size_t count) {
    size_t next = 0; /* the first change that ends at or behind the end at hand */
    for (size_t i = 0; i < count; i++) {
        while (next < nfc->count && nfc->changes[next].end < ends[i]) next++;
        if (next < nfc->count && ends[i] > nfc->changes[next].begin)
            ends[i] = nfc->changes[next].origin;
        else if (next > 0)
            ends[i] = ends[i] - nfc->changes[next - 1].end + nfc->changes[next - 1].origin;
    }
}
