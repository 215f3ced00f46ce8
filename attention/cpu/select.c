/* SPDX-License-Identifier: Apache-2.0
 *
 * What one row of one KV head keeps: roots, leaves, tokens. attention/README.md states the rules.
 */
#include <math.h>
#include <string.h>

#include "attention/cpu/lookup.h"

#define BUCKETS 2048u

typedef struct bucket {
    double mass;
    uint64_t weight;
} bucket;

/* What is taken: values whose bits are above `above`, and the first `ties` that equal it. */
typedef struct threshold {
    uint32_t above;
    uint64_t ties;
} threshold;

typedef struct choose_state {
    const float *value;
    const uint8_t *weight;
    size_t n;
    const lookup_cut *cut;
    double mass;
    uint64_t sum;
} choose_state;

static inline bool usable(float value) {
    return value >= 0.0f && value <= 3.0e38f;
}

/* Non-negative floats order like their bits. */
static inline uint32_t bits_of(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value + 0.0f}; /* no negative zero */
    return bits.u;
}

static inline uint64_t weight_of(const choose_state *s, size_t i) {
    return s->weight ? s->weight[i] : 1u;
}

static bool enough(const choose_state *s, double mass, uint64_t weight) {
    return (mass >= s->cut->target && weight >= s->cut->weight_min) || weight >= s->cut->weight_max;
}

/* How many of those that equal `key` are still wanted, in the order of their index. */
static uint64_t count_ties(choose_state *s, uint32_t key) {
    uint64_t ties = 0;
    for (size_t i = 0; i < s->n; i++) {
        if (!usable(s->value[i]) || bits_of(s->value[i]) != key) continue;
        if (enough(s, s->mass, s->sum)) break;
        s->mass += (double)s->value[i];
        s->sum += weight_of(s, i);
        ties++;
    }
    return ties;
}

/* Radix selection, 11, 11 and 9 bits: a histogram of mass and weight, walked from the top to the
 * bucket in which enough is reached, which is looked into with the next bits. Linear in n. */
static threshold find_threshold(choose_state *s) {
    static const unsigned shifts[3] = {20, 9, 0};
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
            to->weight += weight_of(s, i);
        }
        uint32_t at = BUCKETS;
        while (at > 0) {
            const bucket *from = &table[at - 1];
            if (enough(s, s->mass, s->sum)) return (threshold){prefix + (at << shift) - 1, 0};
            if (enough(s, s->mass + from->mass, s->sum + from->weight)) break;
            s->mass += from->mass;
            s->sum += from->weight;
            at--;
        }
        if (at == 0) return (threshold){prefix, UINT64_MAX}; /* all of them */
        prefix |= (at - 1) << shift;
        above_bits = ~0u << shift;
    }
    return (threshold){prefix, count_ties(s, prefix)};
}

void lookup_choose(const float *value, const uint8_t *weight, size_t n, const lookup_cut *cut,
                   uint8_t *taken) {
    choose_state state = {value, weight, n, cut, 0.0, 0};
    threshold t = find_threshold(&state);
    for (size_t i = 0; i < n; i++) {
        taken[i] = 0;
        if (!usable(value[i])) continue;
        uint32_t bits = bits_of(value[i]);
        if (bits > t.above) {
            taken[i] = 1;
        } else if (bits == t.above && t.ties > 0) {
            taken[i] = 1;
            t.ties--;
        }
    }
}

/* One row's choice: score [group][n], and the rest and steady logs of each head. share[i] becomes
 * the mean over heads of exp(score - log of all mass), or -1 where the score is -INFINITY; score
 * becomes exp(score - maximum), the maxima and sums stay in the struct. */
typedef struct row_choice {
    float *score, *share;
    uint8_t *taken, *weight;
    size_t n;
    uint32_t group;
    const float *rest, *steady;
    float *max;    /* [group] */
    double shares; /* sum of share */
    double steady_share;
} row_choice;

static void share_out(const loci_corpus_kernels *kernels, row_choice *c) {
    size_t n = c->n;
    for (size_t i = 0; i < n; i++) c->share[i] = c->score[i] == -INFINITY ? -1.0f : 0.0f;
    c->shares = c->steady_share = 0.0;
    for (uint32_t g = 0; g < c->group; g++) {
        float *score = c->score + g * n;
        float rest = c->rest ? c->rest[g] : -INFINITY, max = kernels->max(score, n);
        max = rest > max ? rest : max;
        max = c->steady[g] > max ? c->steady[g] : max;
        c->max[g] = max;
        if (max == -INFINITY) continue;
        kernels->exp_sub(score, score, n, max);
        float steady = expf(c->steady[g] - max);
        float total = kernels->sum(score, n) + expf(rest - max) + steady;
        float factor = 1.0f / (total * (float)c->group);
        c->steady_share += (double)(steady * factor);
        kernels->axpy(c->share, score, n, factor);
    }
    for (size_t i = 0; i < n; i++) c->shares += c->share[i] > 0.0f ? (double)c->share[i] : 0.0;
}

/* The log of the mass that was not taken, joined with `rest`. */
static float rest_after(const row_choice *c, uint32_t g) {
    double sum = 0.0;
    const float *score = c->score + g * c->n;
    if (c->max[g] == -INFINITY) return -INFINITY;
    for (size_t i = 0; i < c->n; i++) sum += c->taken[i] ? 0.0 : (double)score[i];
    if (c->rest) sum += exp((double)c->rest[g] - (double)c->max[g]);
    return (float)(log(sum) + (double)c->max[g]);
}

/* Lays the scratch of a thread out for n choices. */
static row_choice choice_of(loci_lookup *lookup, uint32_t kv_head, uint32_t row, size_t n,
                            unsigned thread) {
    size_t padded = (n + 15) / 16 * 16;
    float *at = lookup->scratch[thread];
    row_choice c = {.n = n, .group = lookup->group};
    c.max = at;
    c.share = at + lookup->group;
    c.score = c.share + padded;
    c.taken = (uint8_t *)(c.score + lookup->group * n);
    c.weight = c.taken + padded;
    c.steady = lookup->steady + (size_t)kv_head * lookup->vectors + row * lookup->group;
    return c;
}

static uint64_t share_of(float share, uint64_t total, uint64_t minimum) {
    double wanted = ceil((double)share * (double)total);
    uint64_t most = wanted >= (double)total ? total : wanted > 0.0 ? (uint64_t)wanted : 0;
    return most > minimum ? most : minimum;
}

void lookup_keep_roots_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    size_t n = head->roots;
    row_choice c = choice_of(lookup, h, row, n, thread);
    memcpy(c.score, head->root_score + (size_t)row * lookup->group * n,
           lookup->group * n * sizeof *c.score);
    share_out(lookup->kernels, &c);
    lookup_cut cut = {
        .target = (double)lookup->params.root_cover * c.shares,
        .weight_min = lookup->params.roots_min,
        .weight_max = share_of(lookup->params.root_share_max, n, lookup->params.roots_min),
    };
    lookup_choose(c.share, NULL, n, &cut, c.taken);
    memcpy(head->root_kept + (size_t)row * n, c.taken, n);
    for (uint32_t g = 0; g < lookup->group; g++)
        head->rest[row * lookup->group + g] = rest_after(&c, g);
}

/* Visits the entries of one row in the order of roots. */
typedef struct entry_walk {
    const loci_lookup *lookup;
    const lookup_head *head;
    uint32_t kv_head, row, extent, root;
    const lookup_pair *pair;
    const loci_root *node;
    size_t entry;
} entry_walk;

static bool next_entry(entry_walk *w) {
    while (w->extent < w->lookup->corpus->extent_count) {
        w->pair = lookup_pair_at(w->lookup, w->extent, w->kv_head);
        uint32_t roots = loci_pair_header_of(w->pair->blob)->roots;
        while (w->root < roots) {
            uint32_t local = w->root++, r = w->pair->root_base + local;
            if (!w->head->root_kept[(size_t)w->row * w->head->roots + r]) continue;
            w->node = loci_pair_root(w->pair->blob, local);
            w->entry = lookup_entry_of(w->head, r, w->row);
            return true;
        }
        w->root = 0;
        w->extent++;
    }
    return false;
}

void lookup_keep_leaves_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    entry_walk start = {.lookup = lookup, .head = head, .kv_head = h, .row = row}, walk = start;
    size_t n = 0, at = 0;
    while (next_entry(&walk)) n += walk.node->count;
    row_choice c = choice_of(lookup, h, row, n, thread);
    c.rest = head->rest + row * lookup->group;
    for (walk = start; next_entry(&walk); at += walk.node->count) {
        const float *from = head->leaf_score + head->score_at[walk.entry];
        uint32_t r = walk.pair->root_base + walk.root - 1, count = walk.node->count;
        for (uint32_t g = 0; g < lookup->group; g++)
            memcpy(c.score + g * n + at, from + g * count, count * sizeof *from);
        memcpy(c.weight + at, head->leaf_live + head->leaf_at[r], count);
    }
    share_out(lookup->kernels, &c);
    uint64_t least = lookup->params.leaf_tokens_min;
    lookup_cut cut = {
        .target = (double)lookup->params.leaf_cover * c.shares,
        .weight_min = least,
        .weight_max = share_of(lookup->params.leaf_tokens_share_max, head->live_tokens, least),
    };
    lookup_choose(c.share, c.weight, n, &cut, c.taken);
    for (walk = start, at = 0; next_entry(&walk); at += walk.node->count) {
        uint64_t mask = 0;
        for (uint32_t l = 0; l < walk.node->count; l++) mask |= (uint64_t)c.taken[at + l] << l;
        head->leaf_mask[walk.entry] = mask;
    }
    for (uint32_t g = 0; g < lookup->group; g++) {
        float rest = rest_after(&c, g);
        head->rest[row * lookup->group + g] = rest;
    }
}

void lookup_select_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    entry_walk start = {.lookup = lookup, .head = head, .kv_head = h, .row = row}, walk = start;
    size_t n = 0, at = 0;
    while (next_entry(&walk))
        n += (head->token_at[walk.entry + 1] - head->token_at[walk.entry]) / lookup->group;
    row_choice c = choice_of(lookup, h, row, n, thread);
    c.rest = head->rest + row * lookup->group;
    for (walk = start; next_entry(&walk);) {
        const float *from = head->token_score + head->token_at[walk.entry];
        size_t tokens =
            (head->token_at[walk.entry + 1] - head->token_at[walk.entry]) / lookup->group;
        for (uint32_t g = 0; g < lookup->group; g++)
            memcpy(c.score + g * n + at, from + g * tokens, tokens * sizeof *from);
        at += tokens;
    }
    share_out(lookup->kernels, &c);
    lookup_cut cut = {
        .target = (double)lookup->params.top_p - c.steady_share,
        .weight_max = lookup->params.budget ? lookup->params.budget : UINT64_MAX,
    };
    lookup_choose(c.share, NULL, n, &cut, c.taken);
    at = 0;
    for (walk = start; next_entry(&walk);) {
        uint32_t *mask = head->token_mask + head->mask_at[walk.entry];
        for (uint32_t l = 0; l < walk.node->count; l++) {
            if (!(head->leaf_mask[walk.entry] >> l & 1)) continue;
            uint32_t count = loci_root_leaves(walk.pair->blob, walk.node)[l].count;
            uint32_t bits = 0;
            for (uint32_t t = 0; t < count; t++) bits |= (uint32_t)c.taken[at + t] << t;
            *mask++ = bits;
            at += count;
        }
    }
}
