/* SPDX-License-Identifier: Apache-2.0
 *
 * The candidates of a single row whose number is limited (candidates_max).
 *
 * What tokens are estimated at by their sketches is counted in steps of the coarsest of the head's
 * tables, from what no token of it exceeds downwards, and stands in 16 bits: the sums of sketches
 * less what their root's centre lacks. So the k-th highest token is found by counting, in one
 * array for each head, and candidates are listed as slots, without leaves. Tokens that are further
 * below than 16 bits reach, dead ones and the filling of groups are 0, which is no candidate.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define STEPS_MAX 65535.0
#define GROUP LOCI_SKETCH_GROUP
#define SAMPLED 16u /* of so many groups one shows about where the floor is */

static uint32_t sum_most(const loci_lookup *lookup) {
    return loci_sketch_parts(lookup->dim) * 255u;
}

static const loci_sketch_table *table_of(const loci_lookup *lookup, const lookup_part *part,
                                         uint32_t g) {
    return lookup->tables + (size_t)(part - lookup->parts) * lookup->vectors + g;
}

/* What a sum of 0 of a kept root means to a head of the group. */
static double base_of(const loci_lookup *lookup, const lookup_part *part, uint32_t root,
                      uint32_t g) {
    const lookup_head *head = &lookup->heads[part->kv_head];
    return (double)head->root_centre[(size_t)g * head->roots + root] +
           (double)table_of(lookup, part, g)->base;
}

/* --- keys ------------------------------------------------------------------------------ */

/* The tables of a part, and what the most of its kept roots gives to each head. */
static void make_tables(void *arg, size_t index, unsigned thread) {
    (void)thread;
    const loci_lookup *lookup = arg;
    const lookup_part *part = &lookup->parts[index];
    const lookup_head *head = &lookup->heads[part->kv_head];
    lookup_make_tables(lookup, part);
    for (uint32_t g = 0; g < lookup->group; g++) {
        const float *centre = head->root_centre + (size_t)g * head->roots;
        float most = -INFINITY;
        for (uint32_t r = part->root_base + part->first; r < part->root_base + part->end; r++) {
            float here = head->root_kept[r] ? centre[r] : -INFINITY;
            most = here > most ? here : most;
        }
        lookup->part_most[index * lookup->group + g] = most;
    }
}

/* The step of each head, and the highest sum of 0 of its kept roots. */
static void find_steps(loci_lookup *lookup) {
    for (uint32_t h = 0; h < lookup->kv_heads; h++)
        for (uint32_t g = 0; g < lookup->group; g++)
            lookup->heads[h].scale[g] = (lookup_key_scale){.step = 0.0f, .top = -(double)INFINITY};
    for (size_t p = 0; p < lookup->part_count; p++) {
        const lookup_part *part = &lookup->parts[p];
        lookup_head *head = &lookup->heads[part->kv_head];
        for (uint32_t g = 0; g < lookup->group; g++) {
            lookup_key_scale *scale = &head->scale[g];
            const loci_sketch_table *table = table_of(lookup, part, g);
            scale->step = fmaxf(scale->step, table->scale);
            scale->top = fmax(scale->top, (double)lookup->part_most[p * lookup->group + g] +
                                              (double)table->base);
        }
    }
    for (uint32_t h = 0; h < lookup->kv_heads; h++)
        for (uint32_t g = 0; g < lookup->group; g++)
            if (!(lookup->heads[h].scale[g].step > 0.0f)) lookup->heads[h].scale[g].step = 1.0f;
}

/* Where the keys of each kept root stand, and room for them. */
static bool place_keys(loci_lookup *lookup, lookup_head *head) {
    size_t keys = 0;
    head->key_at = lookup_alloc(lookup, (head->roots + 1) * sizeof *head->key_at);
    if (!head->key_at) return false;
    for (uint32_t r = 0; r < head->roots; r++) {
        head->key_at[r] = keys;
        if (head->root_kept[r]) keys += (size_t)head->root_groups[r] * GROUP;
    }
    head->key_at[head->roots] = keys;
    head->key = lookup_alloc(lookup, lookup->group * keys * sizeof *head->key);
    head->sample = lookup_alloc(lookup, (keys / SAMPLED + GROUP) * sizeof *head->sample);
    head->scale = lookup_alloc(lookup, lookup->group * sizeof *head->scale);
    return head->key && head->sample && head->scale;
}

bool lookup_prepare_keys(loci_stream *stream, loci_lookup *lookup) {
    bool ok = lookup_prepare_sketches(stream, lookup);
    if (!ok) return false;
    for (uint32_t h = 0; ok && h < lookup->kv_heads; h++)
        ok = place_keys(lookup, &lookup->heads[h]);
    size_t most = lookup->part_count * lookup->group;
    lookup->part_most = ok ? lookup_alloc(lookup, most * sizeof *lookup->part_most) : NULL;
    if (!lookup->part_most) {
        lookup_no_memory(stream, lookup);
        return false;
    }
    loci_pool_run(lookup->cpu->pool, lookup->part_count, make_tables, lookup);
    find_steps(lookup);
    return true;
}

/* How sums of one root become keys: times / 2^16 (2^16: as they are), then more or less. */
typedef struct key_terms {
    uint32_t times;
    uint16_t more, less;
} key_terms;

static key_terms terms_of(const loci_lookup *lookup, const lookup_part *part, uint32_t root,
                          uint32_t g) {
    const lookup_key_scale *scale = &lookup->heads[part->kv_head].scale[g];
    double lacks = (scale->top - base_of(lookup, part, root, g)) / (double)scale->step;
    double offset = STEPS_MAX - sum_most(lookup) - floor(lacks + 0.5);
    double times = floor((double)table_of(lookup, part, g)->scale / (double)scale->step * 65536.0);
    key_terms out = {.times = (uint32_t)times};
    if (!(offset > -STEPS_MAX))
        out.less = UINT16_MAX;
    else if (offset < 0.0)
        out.less = (uint16_t)-offset;
    else
        out.more = (uint16_t)offset;
    return out;
}

/* Keys of tokens that are dead or none become 0. */
static void clear_dead(const loci_lookup *lookup, const lookup_part *part, uint32_t root,
                       uint32_t tokens, uint16_t *key) {
    const lookup_head *head = &lookup->heads[part->kv_head];
    size_t all = head->key_at[head->roots];
    uint32_t groups = head->root_groups[root];
    for (uint32_t i = part->live ? 0 : groups - 1; i < groups; i++) {
        uint32_t count = tokens - i * GROUP < GROUP ? tokens - i * GROUP : GROUP;
        uint32_t live = lookup_live_bits(part->live, head->root_first[root] + i * GROUP, count);
        for (uint32_t dead = ~live; dead; dead &= dead - 1)
            for (uint32_t g = 0; g < lookup->group; g++)
                key[g * all + i * GROUP + (uint32_t)__builtin_ctz(dead)] = 0;
    }
}

static void make_keys(const loci_lookup *lookup, const lookup_part *part, const loci_root *root,
                      uint32_t number) {
    const lookup_head *head = &lookup->heads[part->kv_head];
    uint32_t groups = head->root_groups[number], parts = loci_sketch_parts(lookup->dim);
    size_t all = head->key_at[head->roots];
    const uint8_t *entries[LOCI_SKETCH_VECTORS];
    uint16_t *key = head->key + head->key_at[number];
    for (uint32_t g = 0, count; g < lookup->group; g += count) {
        count = lookup->group - g < LOCI_SKETCH_VECTORS ? lookup->group - g : LOCI_SKETCH_VECTORS;
        for (uint32_t v = 0; v < count; v++) entries[v] = table_of(lookup, part, g + v)->entry;
        lookup->kernels->sketch_sums(key + g * all, all, loci_root_sketches(part->blob, root),
                                     groups, parts, entries, count);
        for (uint32_t v = 0; v < count; v++) {
            key_terms t = terms_of(lookup, part, number, g + v);
            lookup->kernels->shift_keys(key + (g + v) * all, (size_t)groups * GROUP, t.times,
                                        t.more, t.less);
        }
    }
    clear_dead(lookup, part, number, root->tokens, key);
}

void lookup_key_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_part *part = &lookup->parts[index];
    const lookup_head *head = &lookup->heads[part->kv_head];
    for (uint32_t i = lookup_next_kept(lookup, part, part->first), next; i < part->end; i = next) {
        uint32_t r = part->root_base + i;
        next = lookup_next_kept(lookup, part, i + 1);
        if (loci_pair_check_block(part->blob, i, head->root_first[r], &part->error) != LOCI_OK)
            return;
        const loci_root *root = loci_pair_root(part->blob, i);
        part->stats.leaf_bytes += loci_block_bytes(lookup->dim, root->count, root->tokens);
        make_keys(lookup, part, root, r);
    }
}

/* --- floors ---------------------------------------------------------------------------- */

/* Keys between which the k-th highest lies: `from` reach low, at least k unless it is 1, and fewer
 * than k, `above`, reach high. */
typedef struct key_range {
    uint32_t low, high;
    uint64_t from, above;
} key_range;

/* Counts who reach `key` within the range, which becomes what is above or below it. */
static void cut_range(const loci_corpus_kernels *kernels, const uint16_t *key, size_t n, uint64_t k,
                      uint32_t at, key_range *range) {
    uint64_t count = kernels->count_keys(key, n, (uint16_t)at);
    if (count >= k) {
        range->low = at;
        range->from = count;
    } else {
        range->high = at;
        range->above = count;
    }
}

/* The highest key that at least k of n reach, at least 1: by turns where it would lie if those of
 * the range were even, and in the middle. */
static uint32_t find_key(const loci_corpus_kernels *kernels, const uint16_t *key, size_t n,
                         uint64_t k, key_range range) {
    for (bool even = true; range.high - range.low > 1; even = !even) {
        uint32_t wide = range.high - range.low, by = wide / 2;
        if (even && range.from > k) {
            by = (uint32_t)((double)wide * (double)(range.from - k) /
                            (double)(range.from - range.above));
            by = by > 0 ? by < wide ? by : wide - 1 : 1;
        }
        cut_range(kernels, key, n, k, range.low + by, &range);
    }
    return range.low;
}

uint16_t lookup_kth_key(const loci_corpus_kernels *kernels, const uint16_t *key, size_t n,
                        uint64_t k, uint16_t *sample) {
    key_range all = {.low = 1, .high = (uint32_t)STEPS_MAX + 1, .from = n}, range = all;
    size_t sampled = 0;
    for (size_t i = 0; i + GROUP <= n; i += SAMPLED * GROUP, sampled += GROUP)
        memcpy(sample + sampled, key + i, GROUP * sizeof *sample);
    if (n >= 8 * SAMPLED * GROUP) {
        double expected = (double)k * (double)sampled / (double)n;
        double spread = 3.0 * sqrt(expected) + 1.0;
        uint64_t more = (uint64_t)(expected + spread);
        uint64_t fewer = expected > spread ? (uint64_t)(expected - spread) : 0;
        all.from = sampled;
        uint32_t below = find_key(kernels, sample, sampled, more, all);
        cut_range(kernels, key, n, k, below, &range);
        uint32_t above = fewer ? find_key(kernels, sample, sampled, fewer, all) + 1 : 0;
        if (above > range.low && above < range.high) cut_range(kernels, key, n, k, above, &range);
    }
    return (uint16_t)find_key(kernels, key, n, k, range);
}

/* The least key of an estimate of at least `limit`. */
static uint16_t key_from(const loci_lookup *lookup, const lookup_key_scale *scale, double limit) {
    double steps = STEPS_MAX - sum_most(lookup) + (limit - scale->top) / (double)scale->step;
    return steps > STEPS_MAX ? UINT16_MAX : steps > 1.0 ? (uint16_t)ceil(steps) : 1;
}

/* One KV head. */
void lookup_key_floors_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_head *head = &lookup->heads[index];
    size_t n = head->key_at[head->roots];
    double slack = 1.0 - (double)lookup->params.top_p;
    head->listed = 0;
    for (uint32_t g = 0; g < lookup->group; g++) {
        lookup_key_scale *scale = &head->scale[g];
        const uint16_t *key = head->key + g * n;
        scale->floor =
            lookup_kth_key(lookup->kernels, key, n, lookup->params.candidates_max, head->sample);
        if (slack > 0.0) {
            key_range all = {.low = 1, .high = (uint32_t)STEPS_MAX + 1, .from = n};
            uint32_t most = find_key(lookup->kernels, key, n, 1, all);
            double top = scale->top + (most - (STEPS_MAX - sum_most(lookup))) * (double)scale->step;
            top = fmax(top, (double)lookup->steady[index * lookup->group + g]);
            uint16_t reach = key_from(lookup, scale, top - log((double)head->live_tokens / slack));
            scale->floor = reach > scale->floor ? reach : scale->floor;
        }
        head->listed += lookup->kernels->count_keys(key, n, scale->floor);
    }
    if (head->listed > n) head->listed = n; /* who reaches several floors is listed once */
}

/* --- lists ----------------------------------------------------------------------------- */

bool lookup_prepare_list(loci_stream *stream, loci_lookup *lookup) {
    bool ok = lookup->ready;
    for (uint32_t h = 0; ok && h < lookup->kv_heads; h++) {
        lookup_head *head = &lookup->heads[h];
        head->slots = lookup_alloc(lookup, (head->listed + 16) * sizeof *head->slots);
        head->token_score =
            lookup_alloc(lookup, lookup->group * head->listed * sizeof *head->token_score);
        if (head->slots && head->token_score) continue;
        lookup_no_memory(stream, lookup);
        ok = false;
    }
    return ok;
}

/* One KV head. */
void lookup_list_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    lookup_head *head = &lookup->heads[index];
    uint16_t floors[LOCI_LANES];
    size_t n = 0;
    for (uint32_t g = 0; g < lookup->group; g++) floors[g] = head->scale[g].floor;
    for (size_t p = 0; p < lookup->part_count; p++) {
        lookup_part *part = &lookup->parts[p];
        if (part->kv_head != index) continue;
        part->list_begin = n;
        for (uint32_t r = part->root_base + part->first; r < part->root_base + part->end; r++)
            if (head->root_kept[r])
                n += lookup->kernels->list_reaching(
                    head->slots + n, head->root_first[r], head->key + head->key_at[r],
                    head->key_at[head->roots], head->root_groups[r], floors, lookup->group);
        part->list_end = n;
    }
    head->listed = n;
}

void lookup_keep_listed(loci_lookup *lookup, uint32_t kv_head, const uint8_t *taken) {
    lookup_head *head = &lookup->heads[kv_head];
    size_t kept = 0;
    for (size_t p = 0; p < lookup->part_count; p++) {
        lookup_part *part = &lookup->parts[p];
        if (part->kv_head != kv_head) continue;
        size_t end = part->list_end, at = part->list_begin;
        part->list_begin = kept;
        for (; at < end; at++) {
            head->slots[kept] = head->slots[at];
            kept += taken[at];
        }
        part->list_end = kept;
    }
}
