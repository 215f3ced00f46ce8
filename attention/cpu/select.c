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

/* The scores of one entry that a step looks at: [group][count]. */
static const float *scores_of(const entry_walk *w, bool tokens, size_t *count) {
    const lookup_head *head = w->head;
    *count = w->node->count;
    if (!tokens) return head->leaf_score + head->score_at[w->entry];
    *count = (head->token_at[w->entry + 1] - head->token_at[w->entry]) / w->lookup->group;
    return head->token_score + head->token_at[w->entry];
}

/* What an element must reach with one head at least to take part, cut [group]: all that fall short
 * of it together hold less than 1 - top_p, since each holds less than that by the number of tokens.
 */
static void find_cuts(entry_walk walk, bool tokens, float *cut) {
    const loci_lookup *lookup = walk.lookup;
    float slack = 1.0f - lookup->params.top_p;
    float reach = slack > 0.0f ? logf((float)walk.head->live_tokens / slack) : INFINITY;
    size_t vector = (size_t)walk.kv_head * lookup->vectors + walk.row * lookup->group, count;
    const float *rest = walk.head->rest + walk.row * lookup->group;
    for (uint32_t g = 0; g < lookup->group; g++)
        cut[g] = fmaxf(rest[g], lookup->steady[vector + g]);
    while (next_entry(&walk)) {
        const float *score = scores_of(&walk, tokens, &count);
        for (uint32_t g = 0; g < lookup->group; g++)
            cut[g] = fmaxf(cut[g], lookup->kernels->max(score + g * count, count));
    }
    for (uint32_t g = 0; g < lookup->group; g++)
        cut[g] = cut[g] == -INFINITY ? INFINITY : fmaxf(cut[g] - reach, -3.0e38f);
}

/* Which of n <= 32 elements reach a cut; stride: from one head's scores to the next one's. */
static uint32_t reaching(const loci_lookup *lookup, const float *score, size_t stride, uint32_t n,
                         const float *cut) {
    uint32_t mask = 0;
    for (uint32_t g = 0; g < lookup->group; g++)
        mask |= lookup->kernels->reaching(score + g * stride, n, cut[g]);
    return mask;
}

/* Appends the scores of the elements of `mask` to the choice. */
static void take_scores(row_choice *c, size_t at, const float *score, size_t stride,
                        uint32_t mask) {
    for (; mask; mask &= mask - 1, at++)
        for (uint32_t g = 0; g < c->group; g++)
            c->score[g * c->n + at] = score[g * stride + (uint32_t)__builtin_ctz(mask)];
}

/* Leaves in `mask` the elements that were taken; at: of its first. */
static uint32_t take_bits(const row_choice *c, size_t *at, uint32_t mask) {
    uint32_t taken = 0;
    for (; mask; mask &= mask - 1)
        if (c->taken[(*at)++]) taken |= mask & (0u - mask);
    return taken;
}

void lookup_keep_leaves_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    entry_walk start = {.lookup = lookup, .head = head, .kv_head = h, .row = row}, walk;
    float *cut = lookup->scratch[thread];
    size_t n = 0, at = 0, count;
    find_cuts(start, false, cut);
    for (walk = start; next_entry(&walk);) {
        const float *score = scores_of(&walk, false, &count);
        head->leaf_mask[walk.entry] = reaching(lookup, score, count, walk.node->count, cut);
        n += lookup_count_bits(head->leaf_mask[walk.entry]);
    }
    row_choice c = choice_of(lookup, h, row, n, thread);
    c.rest = head->rest + row * lookup->group;
    for (walk = start; next_entry(&walk);) {
        const float *score = scores_of(&walk, false, &count);
        const uint8_t *live = head->leaf_live + head->leaf_at[walk.pair->root_base + walk.root - 1];
        uint32_t mask = (uint32_t)head->leaf_mask[walk.entry];
        take_scores(&c, at, score, count, mask);
        for (; mask; mask &= mask - 1) c.weight[at++] = live[__builtin_ctz(mask)];
    }
    share_out(lookup->kernels, &c);
    uint64_t least = lookup->params.leaf_tokens_min;
    lookup_cut enough_leaves = {
        .target = (double)lookup->params.leaf_cover * c.shares,
        .weight_min = least,
        .weight_max = share_of(lookup->params.leaf_tokens_share_max, head->live_tokens, least),
    };
    lookup_choose(c.share, c.weight, n, &enough_leaves, c.taken);
    for (walk = start, at = 0; next_entry(&walk);)
        head->leaf_mask[walk.entry] = take_bits(&c, &at, (uint32_t)head->leaf_mask[walk.entry]);
    for (uint32_t g = 0; g < lookup->group; g++) {
        float rest = rest_after(&c, g);
        head->rest[row * lookup->group + g] = rest;
    }
}

/* Puts in the masks the tokens that reach a cut; returns their number. */
static size_t mark_tokens(entry_walk walk, const float *cut) {
    const lookup_head *head = walk.head;
    size_t n = 0, count;
    while (next_entry(&walk)) {
        const float *score = scores_of(&walk, true, &count);
        const loci_leaf *leaves = loci_root_leaves(walk.pair->blob, walk.node);
        uint32_t *mask = head->token_mask + head->mask_at[walk.entry];
        for (uint64_t kept = head->leaf_mask[walk.entry]; kept; kept &= kept - 1) {
            uint32_t tokens = leaves[__builtin_ctzll(kept)].count;
            *mask = reaching(walk.lookup, score, count, tokens, cut);
            n += lookup_count_bits(*mask++);
            score += tokens;
        }
    }
    return n;
}

void lookup_select_task(void *arg, size_t index, unsigned thread) {
    loci_lookup *lookup = arg;
    uint32_t h = (uint32_t)(index / lookup->rows), row = (uint32_t)(index % lookup->rows);
    lookup_head *head = &lookup->heads[h];
    entry_walk start = {.lookup = lookup, .head = head, .kv_head = h, .row = row}, walk;
    float *cut = lookup->scratch[thread];
    find_cuts(start, true, cut);
    size_t n = mark_tokens(start, cut), at = 0, count;
    row_choice c = choice_of(lookup, h, row, n, thread);
    c.rest = head->rest + row * lookup->group;
    for (walk = start; next_entry(&walk);) {
        const float *score = scores_of(&walk, true, &count);
        const loci_leaf *leaves = loci_root_leaves(walk.pair->blob, walk.node);
        const uint32_t *mask = head->token_mask + head->mask_at[walk.entry];
        for (uint64_t kept = head->leaf_mask[walk.entry]; kept; kept &= kept - 1) {
            take_scores(&c, at, score, count, *mask);
            at += lookup_count_bits(*mask++);
            score += leaves[__builtin_ctzll(kept)].count;
        }
    }
    share_out(lookup->kernels, &c);
    lookup_cut enough_tokens = {
        .target = (double)lookup->params.top_p - c.steady_share,
        .weight_max = lookup->params.budget ? lookup->params.budget : UINT64_MAX,
    };
    lookup_choose(c.share, NULL, n, &enough_tokens, c.taken);
    for (walk = start, at = 0; next_entry(&walk);) {
        size_t end = head->mask_at[walk.entry + 1];
        for (size_t i = head->mask_at[walk.entry]; i < end; i++)
            head->token_mask[i] = take_bits(&c, &at, head->token_mask[i]);
    }
}
