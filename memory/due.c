/* SPDX-License-Identifier: Apache-2.0
 *
 * Which parts of a corpus are to be made anew: pure functions of its manifest.
 *
 * Merging is the logarithmic method (Bentley, Saxe, 1980), as in log-structured stores: n sealed
 * extents become as many as n has ones in binary, each a power of two of them, up to a largest
 * size. Whatever was merged on the way there, the end is the same, since what is to be merged is
 * always taken from the first extent on.
 */
#include <string.h>

#include "memory/ingest.h"
#include "memory/internal.h"

/* While documents come, extents of so many tokens are made of small ones, none larger: a long
 * registration leaves few of them behind, and writes each token once for that. */
#define AT_ONCE_TOKENS (1u << 20)

/* A partial extent from when extents were larger counts as sealed: it is not read whole. */
static uint32_t partial_place(const loci_manifest *manifest, uint32_t extent_tokens_max) {
    uint32_t count = manifest->extent_count;
    const loci_manifest_extent *last = count > 0 ? &manifest->extents[count - 1] : NULL;
    return last && last->partial && last->tokens <= extent_tokens_max ? count - 1 : count;
}

uint32_t loci_tail_tokens(const loci_manifest *manifest, uint32_t extent_tokens_max) {
    uint32_t place = partial_place(manifest, extent_tokens_max);
    uint32_t tokens = (uint32_t)manifest->flat_tokens;
    if (place < manifest->extent_count)
        tokens += loci_extent_live_tokens(&manifest->extents[place]);
    return tokens;
}

loci_rebuild_plan loci_tail_plan(const loci_manifest *manifest, uint32_t extent_tokens_max) {
    return (loci_rebuild_plan){.first = partial_place(manifest, extent_tokens_max),
                               .last = manifest->extent_count,
                               .tail = true};
}

static bool quarter_dead(const loci_manifest_extent *extent) {
    return 4ull * extent->dead_tokens >= extent->tokens;
}

/* Whether an extent that the ingest thread may read whole fits in beside `sum` tokens. */
static bool joins(const loci_manifest_extent *extent, uint64_t sum, uint32_t most) {
    return extent->tokens <= most && sum + loci_extent_live_tokens(extent) <= most;
}

/* A rewritten extent takes its neighbours in as long as they fit, those behind it first, and
 * becomes part of the tail when nothing is left behind it: so deletions leave neither small extents
 * nor a tail of the wrong form, whether there was time to rewrite between them or not. */
static void plan_rewrite(const loci_manifest *manifest, uint32_t place, uint32_t most,
                         loci_rebuild_plan *out) {
    const loci_manifest_extent *extents = manifest->extents;
    uint64_t sum = loci_extent_live_tokens(&extents[place]);
    *out = (loci_rebuild_plan){.first = place, .last = place + 1, .rewrite = true};
    if (sum == 0) return;
    while (out->last < manifest->extent_count && joins(&extents[out->last], sum, most))
        sum += loci_extent_live_tokens(&extents[out->last++]);
    while (out->first > 0 && joins(&extents[out->first - 1], sum, most))
        sum += loci_extent_live_tokens(&extents[--out->first]);
    out->tail = out->last == manifest->extent_count && sum + manifest->flat_tokens <= most;
}

bool loci_rebuild_due(const loci_manifest *manifest, uint32_t extent_tokens_max,
                      loci_tail_demand demand, loci_rebuild_plan *out) {
    for (uint32_t i = 0; i < manifest->extent_count; i++) {
        const loci_manifest_extent *extent = &manifest->extents[i];
        if (!quarter_dead(extent)) continue;
        /* A merged one is the merger's, unless there is nothing to be read. */
        if (extent->tokens > extent_tokens_max && loci_extent_live_tokens(extent) > 0) continue;
        plan_rewrite(manifest, i, extent_tokens_max, out);
        return true;
    }
    if (demand == LOCI_TAIL_KEEP || manifest->flat_count == 0) return false;
    uint32_t place = partial_place(manifest, extent_tokens_max);
    bool due = manifest->flat_tokens >= loci_tail_seal_tokens(extent_tokens_max);
    if (place < manifest->extent_count)
        due = due || demand == LOCI_TAIL_ANY ||
              4 * manifest->flat_tokens >= loci_extent_live_tokens(&manifest->extents[place]);
    if (!due) return false;
    *out = loci_tail_plan(manifest, extent_tokens_max);
    return true;
}

/* --- Merging ---------------------------------------------------------------------------- */

static uint64_t power_of_two_up_to(uint64_t value) { /* 0 for 0 */
    if (value == 0) return 0;
    uint64_t power = 1;
    while (power <= value / 2) power *= 2;
    return power;
}

/* The size of an extent in sealed ones. */
static uint64_t units_of(const loci_manifest_extent *extent, uint32_t extent_tokens_max) {
    return ((uint64_t)loci_extent_live_tokens(extent) + extent_tokens_max - 1) / extent_tokens_max;
}

/* What stands together from some extent on. */
typedef struct merge_chunk {
    uint32_t first, last;
    uint64_t units, live, segments;
} merge_chunk;

/* At least one extent, then those that keep the sum within `target` units, and all of them within
 * what one extent holds; tokens_max counts dead tokens of the one that is read as well. One that is
 * larger, since there was more memory once, stays alone. */
static merge_chunk take_chunk(const loci_manifest *manifest, uint32_t first, uint32_t end,
                              uint32_t extent_tokens_max, uint64_t target, uint64_t tokens_max) {
    merge_chunk chunk = {.first = first, .last = first};
    if (manifest->extents[first].tokens > tokens_max) end = first + 1;
    for (; chunk.last < end; chunk.last++) {
        const loci_manifest_extent *extent = &manifest->extents[chunk.last];
        uint64_t units = units_of(extent, extent_tokens_max);
        uint64_t segments = extent->segments - extent->dead_segments;
        bool fits = chunk.units + units <= target && chunk.live + extent->tokens <= tokens_max &&
                    chunk.segments + segments <= LOCI_EXTENT_SEGMENTS_MAX;
        if (!fits && chunk.last > first) break;
        chunk.units += units;
        chunk.live += loci_extent_live_tokens(extent);
        chunk.segments += segments;
    }
    return chunk;
}

/* What is searched for the largest merge. */
typedef struct merge_search {
    const loci_manifest *manifest;
    uint32_t extent_tokens_max, tokens_max;
    uint64_t most; /* units of a merge */
    bool calm;
    uint64_t best; /* live tokens of *out; 0 = none yet */
    loci_rebuild_plan *out;
} merge_search;

/* Looks at extents [first, end). */
static void search_run(merge_search *s, uint32_t first, uint32_t end) {
    uint64_t left = 0;
    for (uint32_t i = first; i < end; i++)
        left += units_of(&s->manifest->extents[i], s->extent_tokens_max);
    while (first < end) {
        uint64_t target = power_of_two_up_to(left < s->most ? left : s->most);
        merge_chunk chunk =
            take_chunk(s->manifest, first, end, s->extent_tokens_max, target, s->tokens_max);
        const loci_manifest_extent *one = &s->manifest->extents[first];
        bool due = chunk.last - first > 1 || (one->tokens > s->extent_tokens_max &&
                                              one->tokens <= s->tokens_max && quarter_dead(one));
        /* One of the size that is made at once is so whatever is registered later. */
        if (due && chunk.live > s->best && (s->calm || target == s->most)) {
            s->best = chunk.live;
            *s->out = (loci_rebuild_plan){.first = first, .last = chunk.last, .merge = true};
        }
        left -= chunk.units;
        first = chunk.last;
    }
}

bool loci_id_listed(const loci_id_list *list, const uint8_t id[LOCI_EXTENT_ID_BYTES]) {
    for (size_t i = 0; i < list->count; i++)
        if (memcmp(id, list->ids[i], LOCI_EXTENT_ID_BYTES) == 0) return true;
    return false;
}

bool loci_merge_due(const loci_manifest *manifest, uint32_t extent_tokens_max,
                    uint32_t merge_tokens, bool calm, const loci_id_list *apart,
                    loci_rebuild_plan *out) {
    uint32_t tokens_max =
        merge_tokens < LOCI_EXTENT_TOKENS_MAX ? merge_tokens : LOCI_EXTENT_TOKENS_MAX;
    uint64_t most = power_of_two_up_to(tokens_max / extent_tokens_max);
    uint64_t at_once = power_of_two_up_to(AT_ONCE_TOKENS / extent_tokens_max);
    if (!calm && most > at_once) most = at_once;
    if (most == 0) return false;
    merge_search search = {manifest, extent_tokens_max, tokens_max, most, calm, 0, out};
    uint32_t end = partial_place(manifest, extent_tokens_max), first = 0;
    for (uint32_t i = 0; i < end; i++) {
        if (!apart || !loci_id_listed(apart, manifest->extents[i].id)) continue;
        search_run(&search, first, i);
        first = i + 1;
    }
    search_run(&search, first, end);
    return search.best > 0;
}
