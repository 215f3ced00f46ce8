/* SPDX-License-Identifier: Apache-2.0
 *
 * What one row of one KV head keeps: roots, candidates, tokens. attention/README.md states the
 * rules.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attention/common.h"
#include "attention/cpu/lookup.h"

#define BUCKETS 2048u

typedef struct bucket {
    double mass;
    uint64_t count;
} bucket;

/* What is taken: values whose bits are above `above`, and the first `ties` that equal it. */
typedef struct threshold {
    uint32_t above;
    uint64_t ties;
} threshold;

typedef struct choose_state {
    const float *value;
    size_t n;
    double target;
    uint64_t most;
    double mass;
    uint64_t count;
} choose_state;

static inline bool usable(float value) {
    return value >= 0.0f && value <= 3.0e38f;
}

static inline uint32_t bits_of(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value + 0.0f}; /* no negative zero */
    return bits.u;
}

/* Orders as floats do, negative ones included. */
static inline uint32_t ordered(float value) {
    uint32_t bits = bits_of(value);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

static inline float unordered(uint32_t key) {
    union {
        uint32_t u;
        float f;
    } bits = {key >> 31 ? key & ~(1u << 31) : ~key};
    return bits.f;
}

static bool enough(const choose_state *s, double mass, uint64_t count) {
    return mass >= s->target || count >= s->most;
}

/* How many of those that equal `key` are still wanted, in the order of their index. */
static uint64_t count_ties(choose_state *s, uint32_t key) {
    uint64_t ties = 0;
    for (size_t i = 0; i < s->n; i++) {
        if (!usable(s->value[i]) || bits_of(s->value[i]) != key) continue;
        if (enough(s, s->mass, s->count)) break;
        s->mass += (double)s->value[i];
        s->count++;
        ties++;
    }
    return ties;
}

/* Radix selection, 11, 11 and 10 bits: a histogram of mass and number, walked from the top to the
 * bucket in which enough is reached, which is looked into with the next bits. Linear in n.
 * Non-negative floats order like their bits.
 */
static threshold find_threshold(choose_state *s) {
    static const unsigned shifts[3] = {21, 10, 0};
    uint32_t prefix = 0, above_bits = 0; /* bits already fixed */
    for (int level = 0; level < 3; level++) {
        bucket table[BUCKETS];
        unsigned shift = shifts[level];
        memset(table, 0, sizeof table);
        for (size_t i = 0; i < s->n; i++) {
            if (!usable(s->value[i])) continue;
            uint32_t bits = bits_of(s->value[i]);
            if ((bits & above_bits) != prefix) continue;
            bucket *to = &table[(bits & ~above_bits) >> shift];
            to->mass += (double)s->value[i];
            to->count++;
        }
        uint32_t at = BUCKETS;
        while (at > 0) {
            const bucket *from = &table[at - 1];
            if (enough(s, s->mass, s->count)) return (threshold){prefix + (at << shift) - 1, 0};
            if (enough(s, s->mass + from->mass, s->count + from->count)) break;
            s->mass += from->mass;
            s->count += from->count;
            at--;
        }
        if (at == 0) return (threshold){prefix, UINT64_MAX}; /* all of them */
        prefix |= (at - 1) << shift;
        above_bits = ~0u << shift;
    }
    return (threshold){prefix, count_ties(s, prefix)};
}

/* Bisects the bits of floats in their order: 32 counts, each of which vectorises, are faster than
 * histograms are. */
float lookup_kth(const loci_corpus_kernels *kernels, const float *value, size_t n, uint64_t k) {
    uint32_t low = ordered(-INFINITY), high = ordered(INFINITY); /* the highest that k reach */
    if (k > n) return -INFINITY;
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        if (kernels->count_from(value, n, unordered(middle)) >= k)
            low = middle;
        else
            high = middle - 1;
    }
    return unordered(low);
}

#define NEARLY 1.0001 /* sums of floats in any order are not further off */

/* Whether `most` of them are taken because their number alone ends the choice: then marks them. */
static bool choose_by_number(const loci_corpus_kernels *kernels, const float *value, size_t n,
                             double target, uint64_t most, uint8_t *taken) {
    if (most == 0 || most >= n) return false;
    float key = lookup_kth(kernels, value, n, most);
    if (!usable(key)) return false;
    float part[LOCI_LANES] = {0}, mass = 0.0f;
    size_t whole = n / LOCI_LANES * LOCI_LANES;
    for (size_t i = 0; i < whole; i += LOCI_LANES)
        for (size_t l = 0; l < LOCI_LANES; l++) part[l] += value[i + l] > key ? value[i + l] : 0.0f;
    for (size_t i = whole; i < n; i++) part[i - whole] += value[i] > key ? value[i] : 0.0f;
    for (size_t l = 0; l < LOCI_LANES; l++) mass += part[l];
    uint64_t ties = most - kernels->count_from(value, n, nextafterf(key, INFINITY));
    double all = (double)mass + (double)ties * (double)key;
    if (!(all * NEARLY < target)) return false; /* where it is close, sums in order decide */
    for (size_t i = 0; i < n; i++) taken[i] = value[i] > key;
    for (size_t i = 0; ties > 0; i++) {
        if (value[i] != key) continue;
        taken[i] = 1;
        ties--;
    }
    return true;
}

void lookup_choose(const loci_corpus_kernels *kernels, const float *value, size_t n, double target,
                   uint64_t most, uint8_t *taken) {
    if (choose_by_number(kernels, value, n, target, most, taken)) return;
    choose_state state = {.value = value, .n = n, .target = target, .most = most};
    threshold t = find_threshold(&state);
    for (size_t i = 0; i < n; i++)
        taken[i] = (uint8_t)(usable(value[i]) & (bits_of(value[i]) > t.above));
    for (size_t i = 0; i < n && t.ties > 0; i++) {
        if (!usable(value[i]) || bits_of(value[i]) != t.above) continue;
        taken[i] = 1;
        t.ties--;
    }
}

void lookup_keep_roots_task(void *arg, size_t index, unsigned thread) {
    (void)thread;
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    size_t n = head->roots;
    uint8_t *kept = head->root_kept + (size_t)row * n;
    uint64_t k = loci_select_count(lookup->params.roots, head->spread, head->live_tokens,
                                   lookup->params.roots_min);
    float slack = loci_select_root_slack(lookup->params.top_p);
    const float *steady = lookup->steady + (size_t)h * lookup->vectors + row * lookup->group;
    memset(kept, 0, n);
    for (uint32_t g = 0; g < lookup->group; g++) {
        const float *score = head->root_score + ((size_t)row * lookup->group + g) * n;
        float least = fmaxf(lookup_kth(lookup->kernels, score, n, k), steady[g] + slack);
        least = fmaxf(least, -FLT_MAX); /* those without live tokens: not */
        for (size_t i = 0; i < n; i++) kept[i] |= score[i] >= least;
    }
}

/* What one row keeps of one KV head. */
typedef struct row_entries {
    const lookup_kept *at, *end;
} row_entries;

static row_entries entries_of(const lookup_head *head, uint32_t row) {
    return (row_entries){head->row_kept + head->row_begin[row],
                         head->row_kept + head->row_begin[row + 1]};
}

/* All scores of leaves of one row and head, one after another; returns their number. */
static size_t gather_leaves(const lookup_head *head, row_entries row, uint32_t g, float *out) {
    size_t n = 0;
    for (; row.at < row.end; row.at++) {
        uint32_t count = head->root_leaves[row.at->root];
        const float *score = head->leaf_score + head->score_at[row.at->entry] + g * count;
        memcpy(out + n, score, count * sizeof *out);
        n += count;
    }
    return n;
}

/* The k-th highest leaf, so that at least k tokens reach it; or further up, where all below hold
 * less than 1 - top_p together, since each holds less than that by the number of tokens. */
void lookup_find_floors_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    row_entries entries = entries_of(head, row);
    float slack = 1.0f - lookup->params.top_p, *all = lookup->scratch[thread];
    float reach = slack > 0.0f ? logf((float)head->live_tokens / slack) : INFINITY;
    uint64_t k = loci_select_count(lookup->params.candidates, sqrt((double)head->live_tokens),
                                   head->live_tokens, lookup->params.candidates_min);
    float *floor = head->floor + (size_t)row * lookup->group;
    const float *steady = lookup->steady + (size_t)h * lookup->vectors + row * lookup->group;
    for (uint32_t g = 0; g < lookup->group; g++) {
        size_t n = gather_leaves(head, entries, g, all);
        float top = fmaxf(lookup->kernels->max(all, n), steady[g]);
        floor[g] = fmaxf(fmaxf(lookup_kth(lookup->kernels, all, n, k), top - reach), -FLT_MAX);
    }
    for (; entries.at < entries.end; entries.at++) {
        uint32_t count = head->root_leaves[entries.at->root];
        const float *score = head->leaf_score + head->score_at[entries.at->entry];
        uint8_t reaches[LOCI_ROOT_LEAVES_MAX] = {0};
        uint64_t mask = 0;
        for (uint32_t g = 0; g < lookup->group; g++, score += count)
            for (uint32_t l = 0; l < count; l++) reaches[l] |= score[l] >= floor[g];
        for (uint32_t l = 0; l < count; l++) mask |= (uint64_t)reaches[l] << l;
        head->leaf_mask[entries.at->entry] = mask;
    }
}

/* One row's choice among n candidates: score [group][n]; share[i] becomes the mean over heads of
 * exp(score - log of all mass), -1 where the score is -INFINITY. */
typedef struct row_choice {
    const float *score;
    float *share, *weight; /* [n] */
    uint8_t *taken;
    size_t n;
    const float *steady;
} row_choice;

/* Returns the sum of the shares. */
static double share_out(const loci_lookup *lookup, row_choice *c) {
    const loci_corpus_kernels *kernels = lookup->kernels;
    double sum = 0.0;
    for (size_t i = 0; i < c->n; i++) c->share[i] = c->score[i] == -INFINITY ? -1.0f : 0.0f;
    for (uint32_t g = 0; g < lookup->group; g++) {
        const float *score = c->score + g * c->n;
        float max = fmaxf(kernels->max(score, c->n), c->steady[g]);
        if (max == -INFINITY) continue;
        kernels->exp_sub(c->weight, score, c->n, max);
        float total = kernels->sum(c->weight, c->n) + expf(c->steady[g] - max);
        kernels->axpy(c->share, c->weight, c->n, 1.0f / (total * (float)lookup->group));
    }
    for (size_t i = 0; i < c->n; i++) sum += c->share[i] > 0.0f ? (double)c->share[i] : 0.0;
    return sum;
}

/* Lays the scratch of a thread out for the candidates of a row and, where they do not stand
 * together, fills in their scores. */
static row_choice gather_candidates(const loci_lookup *lookup, const lookup_head *head,
                                    row_entries entries, float *scratch) {
    row_choice c = {.n = lookup_limited(lookup) ? head->listed : 0};
    for (row_entries e = entries; e.at < e.end; e.at++)
        c.n += lookup_candidates(lookup, head, e.at->entry);
    c.share = scratch;
    c.weight = c.share + (c.n + 15) / 16 * 16;
    c.taken = (uint8_t *)(c.weight + (c.n + 15) / 16 * 16);
    c.score = head->token_score;
    if (lookup_listed(lookup)) return c;
    float *score = c.weight + (c.n + 15) / 16 * 16;
    c.taken = (uint8_t *)(score + lookup->group * c.n);
    c.score = score;
    for (size_t at = 0; entries.at < entries.end; entries.at++) {
        size_t n = lookup_candidates(lookup, head, entries.at->entry);
        for (uint32_t g = 0; g < lookup->group; g++)
            memcpy(score + g * c.n + at, lookup_scores(lookup, head, entries.at->entry, g),
                   n * sizeof *score);
        at += n;
    }
    return c;
}

void lookup_select_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    row_entries entries = {0};
    if (!lookup_limited(lookup)) entries = entries_of(head, row);
    row_choice c = gather_candidates(lookup, head, entries, lookup->scratch[thread]);
    c.steady = lookup->steady + (size_t)h * lookup->vectors + row * lookup->group;
    double target = share_out(lookup, &c) - (1.0 - (double)lookup->params.top_p);
    uint64_t most = lookup->params.budget ? lookup->params.budget : UINT64_MAX;
    lookup_choose(lookup->kernels, c.share, c.n, target, most, c.taken);
    const uint8_t *taken = c.taken;
    if (lookup_limited(lookup)) {
        lookup_keep_listed(lookup, h, taken);
        return;
    }
    for (size_t i = 0, n = 0; lookup_listed(lookup) && i < c.n; i++) {
        head->slots[n] = head->slots[i];
        n += taken[i];
    }
    for (; entries.at < entries.end; entries.at++) {
        size_t end = head->mask_at[entries.at->entry + 1];
        for (size_t i = head->mask_at[entries.at->entry]; i < end; i++) {
            uint32_t mask = 0; /* without branches: they would be missed half of the time */
            for (uint32_t left = head->candidates[i]; left; left &= left - 1)
                mask |= left & (0u - left) & (0u - *taken++);
            head->token_mask[i] = mask;
        }
    }
}
