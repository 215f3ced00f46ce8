/* SPDX-License-Identifier: Apache-2.0
 *
 * See lookup_reference.h.
 */
#include "tests/attention/lookup_reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"
#include "attention/index_layout.h"

/* A query as the estimates see it. */
typedef struct rounded {
    double scale;
    double value[LOCI_HEAD_DIM_MAX];
} rounded;

typedef struct item {
    double p, s[16];
    uint32_t weight, index;
    uint32_t extent, node; /* root or leaf in its extent, or slot */
    uint32_t root;         /* of a leaf */
    bool taken;
} item;

typedef struct list {
    item *items;
    size_t count, room;
} list;

static void push(list *l, item x) {
    if (l->count == l->room) {
        l->room = l->room ? l->room * 2 : 256;
        l->items = realloc(l->items, l->room * sizeof *l->items);
        LOCI_ASSERT(l->items != NULL);
    }
    x.index = (uint32_t)l->count;
    l->items[l->count++] = x;
}

uint32_t reference_tokens(const fixture *f) {
    uint32_t sum = 0;
    for (uint32_t e = 0; e < f->extents; e++) sum += f->views[e].tokens;
    return sum;
}

uint32_t reference_index(const fixture *f, uint32_t extent, uint32_t slot) {
    for (uint32_t e = 0; e < extent; e++) slot += f->views[e].tokens;
    return slot;
}

static bool is_live(const fixture *f, uint32_t layer, uint32_t e, uint32_t h, uint32_t slot) {
    const loci_extent_view *view = &f->views[e];
    if (!view->live) return true;
    return view->live[layer * f->kv_heads + h][slot / 64] >> (slot % 64) & 1;
}

static uint32_t count_live(const fixture *f, uint32_t layer, uint32_t e, uint32_t h, uint32_t first,
                           uint32_t count) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++) sum += is_live(f, layer, e, h, first + i);
    return sum;
}

/* In float, as stated: the rounding must be the same. */
static rounded round_query(const float *x, uint32_t dim) {
    rounded r = {0};
    float top = 0.0f;
    for (uint32_t i = 0; i < dim; i++) top = fmaxf(top, fabsf(x[i]));
    if (top == 0.0f) return r;
    r.scale = (double)(top / 127.0f);
    for (uint32_t i = 0; i < dim; i++) r.value[i] = (double)rintf(x[i] * (127.0f / top));
    return r;
}

static void scaled_query(const fixture *f, const float *q, uint32_t row, uint32_t head,
                         float *out) {
    float scale = 1.0f / sqrtf((float)f->dim);
    for (uint32_t i = 0; i < f->dim; i++)
        out[i] = q[((size_t)row * f->q_heads + head) * f->dim + i] * scale;
}

static double mean_term(const uint8_t *blob, const float *q, uint32_t dim) {
    double sum = 0.0;
    for (uint32_t i = 0; i < dim; i++) sum += (double)q[i] * (double)loci_pair_mean(blob)[i];
    return sum;
}

static double node_estimate(const uint8_t *blob, const loci_node *node, const float *q,
                            uint32_t dim, bool variance) {
    float squares[LOCI_HEAD_DIM_MAX] = {0};
    for (uint32_t i = 0; i < dim; i++) squares[i] = q[i] * q[i] * 0.5f;
    rounded q8 = round_query(q, dim), qq8 = round_query(squares, dim);
    double centroid = 0.0, spread = 0.0;
    for (uint32_t i = 0; i < dim; i++) {
        centroid += q8.value[i] * loci_node_centroid(node)[i];
        spread += qq8.value[i] * loci_node_variance(node, dim)[i];
    }
    return mean_term(blob, q, dim) + centroid * q8.scale * (double)node->centroid_scale +
           (variance ? spread * qq8.scale * (double)node->variance_scale : 0.0);
}

/* A token's sketch beside one query: base + step * sum is what it adds to its root's centre. */
typedef struct sketched {
    double base;
    float step;
    double sum;
} sketched;

/* A table entry for each part and codeword; in float, as stated: the rounding must be the same. */
static sketched look_at_sketch(const uint8_t *blob, uint32_t root_index, uint32_t slot,
                               const float *q, uint32_t dim) {
    const loci_root *root = loci_pair_root(blob, root_index);
    const float *book = loci_pair_codebook(blob);
    uint32_t parts = dim / 4, at = slot - loci_root_leaves(blob, root)->begin;
    const uint8_t *group = loci_root_sketches(blob, root) + at / 32 * loci_sketch_group(dim);
    float entry[64][16] = {{0}}, low[64] = {0}, widest = 0.0f;
    sketched s = {0};
    for (uint32_t p = 0; p < parts; p++) {
        float high = -INFINITY;
        low[p] = INFINITY;
        for (uint32_t w = 0; w < 16; w++) {
            for (uint32_t c = 0; c < 4; c++)
                entry[p][w] += q[p * 4 + c] * book[(p * 4 + c) * 16 + w];
            low[p] = fminf(low[p], entry[p][w]);
            high = fmaxf(high, entry[p][w]);
        }
        widest = fmaxf(widest, high - low[p]);
        s.base += (double)low[p];
    }
    for (uint32_t p = 0; p < parts && widest > 0.0f; p++) {
        uint8_t byte = group[p * 16 + at % 16];
        uint32_t word = at % 32 < 16 ? byte & 15 : byte >> 4;
        s.sum += floor((double)((entry[p][word] - low[p]) * (255.0f / widest) + 0.5f));
    }
    s.step = widest / 255.0f;
    return s;
}

static double centre_estimate(const uint8_t *blob, uint32_t root_index, const float *q,
                              uint32_t dim) {
    return node_estimate(blob, loci_pair_root_node(blob, root_index), q, dim, false);
}

static double sketch_estimate(const uint8_t *blob, uint32_t root_index, uint32_t slot,
                              const float *q, uint32_t dim) {
    sketched s = look_at_sketch(blob, root_index, slot, q, dim);
    return centre_estimate(blob, root_index, q, dim) + s.base + (double)s.step * s.sum;
}

static double token_estimate(const uint8_t *blob, const uint8_t *code, const float *q,
                             uint32_t dim) {
    float folded[LOCI_HEAD_DIM_MAX] = {0};
    for (uint32_t i = 0; i < dim; i++) folded[i] = q[i] * loci_pair_code_scale(blob)[i];
    rounded f8 = round_query(folded, dim);
    double sum = 0.0;
    for (uint32_t i = 0; i < dim; i++) {
        int level = i % 2 ? code[i / 2] >> 4 : code[i / 2] & 15;
        sum += f8.value[i] * (level - 7.5);
    }
    return mean_term(blob, q, dim) + sum * f8.scale;
}

static double add_log(double a, double b) {
    double top = fmax(a, b);
    return top == -INFINITY ? top : top + log(exp(a - top) + exp(b - top));
}

static int by_share(const void *a, const void *b) {
    const item *x = a, *y = b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

static int by_index(const void *a, const void *b) {
    const item *x = a, *y = b;
    return x->index < y->index ? -1 : x->index > y->index;
}

static void choose(list *l, double target, double most) {
    double mass = 0.0, count = 0.0;
    if (l->count == 0) return;
    qsort(l->items, l->count, sizeof *l->items, by_share);
    for (size_t i = 0; i < l->count; i++) {
        if (mass >= target || count >= most) break;
        l->items[i].taken = true;
        mass += l->items[i].p;
        count++;
    }
    qsort(l->items, l->count, sizeof *l->items, by_index);
}

/* Sets p; returns its sum. */
static double set_shares(list *l, uint32_t g, const float *steady) {
    double sum = 0.0;
    for (uint32_t j = 0; j < g; j++) {
        double z = (double)steady[j];
        for (size_t i = 0; i < l->count; i++) z = add_log(z, l->items[i].s[j]);
        for (size_t i = 0; i < l->count; i++) l->items[i].p += exp(l->items[i].s[j] - z) / g;
    }
    for (size_t i = 0; i < l->count; i++) sum += l->items[i].p;
    return sum;
}

static int descending(const void *a, const void *b) {
    const double *x = a, *y = b;
    return *x > *y ? -1 : *x < *y;
}

/* The k-th highest s of one head; -INFINITY if there are fewer. */
static double kth(const list *l, uint32_t j, double k) {
    double *values = malloc((l->count + 1) * sizeof *values), found = -INFINITY;
    LOCI_ASSERT(values != NULL);
    for (size_t i = 0; i < l->count; i++) values[i] = l->items[i].s[j];
    qsort(values, l->count, sizeof *values, descending);
    if (k <= (double)l->count) found = values[(size_t)k - 1];
    free(values);
    return found;
}

/* Takes what reaches the floor of one head at least. */
static void take_reaching(list *l, uint32_t g, const double *floor) {
    for (size_t i = 0; i < l->count; i++)
        for (uint32_t j = 0; j < g; j++)
            if (l->items[i].s[j] >= floor[j]) l->items[i].taken = true;
}

static double count_of(float rate, double spread, double least) {
    return fmax(1, fmax(least, ceil((double)rate * spread)));
}

typedef struct scene {
    const fixture *f;
    uint32_t layer, h, g;
    float q[16][LOCI_HEAD_DIM_MAX];
} scene;

/* Also the live tokens, and the sum of the square roots of each extent's. */
static void list_roots(const scene *s, list *roots, double *live, double *spread) {
    *live = *spread = 0.0;
    for (uint32_t e = 0; e < s->f->extents; e++) {
        const uint8_t *blob = fixture_blob(s->f, s->layer, e, s->h);
        uint32_t slot = 0;
        double before = *live;
        for (uint32_t r = 0; r < loci_pair_header_of(blob)->roots; r++) {
            const loci_root *root = loci_pair_root(blob, r);
            const loci_node *node = loci_pair_root_node(blob, r);
            uint32_t n = count_live(s->f, s->layer, e, s->h, slot, root->tokens);
            item x = {.extent = e, .node = r};
            for (uint32_t j = 0; j < s->g; j++)
                x.s[j] = log((double)n) + node_estimate(blob, node, s->q[j], s->f->dim, true);
            if (n) push(roots, x);
            slot += root->tokens;
            *live += n;
        }
        *spread += sqrt(*live - before);
    }
}

static void list_leaves(const scene *s, const list *roots, list *leaves) {
    for (size_t i = 0; i < roots->count; i++) {
        if (!roots->items[i].taken) continue;
        uint32_t e = roots->items[i].extent;
        const uint8_t *blob = fixture_blob(s->f, s->layer, e, s->h);
        const loci_root *root = loci_pair_root(blob, roots->items[i].node);
        for (uint32_t l = 0; l < root->count; l++) {
            const loci_leaf *leaf = &loci_root_leaves(blob, root)[l];
            uint32_t n = count_live(s->f, s->layer, e, s->h, leaf->begin, leaf->count);
            item x = {.extent = e, .node = root->begin + l, .root = roots->items[i].node};
            for (uint32_t j = 0; j < s->g; j++) {
                x.s[j] = -INFINITY;
                for (uint32_t t = leaf->begin; t < leaf->begin + leaf->count; t++)
                    if (is_live(s->f, s->layer, e, s->h, t))
                        x.s[j] = fmax(x.s[j], sketch_estimate(blob, roots->items[i].node, t,
                                                              s->q[j], s->f->dim));
            }
            if (n) push(leaves, x);
        }
    }
}

/* The live tokens of taken leaves that reach a floor by their sketches, with s by their codes. */
static void list_tokens(const scene *s, const list *leaves, const double *floor, list *tokens) {
    for (size_t i = 0; i < leaves->count; i++) {
        if (!leaves->items[i].taken) continue;
        uint32_t e = leaves->items[i].extent;
        const uint8_t *blob = fixture_blob(s->f, s->layer, e, s->h);
        const loci_leaf *leaf = fixture_leaf(blob, leaves->items[i].node, NULL);
        for (uint32_t slot = leaf->begin; slot < leaf->begin + leaf->count; slot++) {
            bool candidate = false;
            item x = {.extent = e, .node = slot};
            if (!is_live(s->f, s->layer, e, s->h, slot)) continue;
            for (uint32_t j = 0; j < s->g; j++) {
                candidate |= sketch_estimate(blob, leaves->items[i].root, slot, s->q[j],
                                             s->f->dim) >= floor[j];
                x.s[j] = token_estimate(blob, loci_slot_record(blob, slot), s->q[j], s->f->dim);
            }
            if (candidate) push(tokens, x);
        }
    }
}

/* Of a single row with a limit to its candidates: the live tokens of kept roots with, for each
 * head, their estimate by sketch in whole steps; s[j] as it is counted, -INFINITY beyond 16 bits.
 * step and top: of each head, as README.md says. */
static void list_counted(const scene *s, const list *roots, list *tokens, double *step,
                         double *top) {
    for (uint32_t j = 0; j < s->g; j++) {
        step[j] = 0.0;
        top[j] = -INFINITY;
        for (uint32_t e = 0; e < s->f->extents; e++) {
            const uint8_t *blob = fixture_blob(s->f, s->layer, e, s->h);
            sketched any = look_at_sketch(blob, 0, 0, s->q[j], s->f->dim);
            step[j] = fmax(step[j], (double)any.step);
            for (size_t i = 0; i < roots->count; i++)
                if (roots->items[i].taken && roots->items[i].extent == e)
                    top[j] = fmax(top[j], any.base + centre_estimate(blob, roots->items[i].node,
                                                                     s->q[j], s->f->dim));
        }
    }
    for (size_t i = 0; i < roots->count; i++) {
        if (!roots->items[i].taken) continue;
        uint32_t e = roots->items[i].extent, r = roots->items[i].node;
        const uint8_t *blob = fixture_blob(s->f, s->layer, e, s->h);
        const loci_leaf *first = loci_root_leaves(blob, loci_pair_root(blob, r));
        for (uint32_t t = 0; t < loci_pair_root(blob, r)->tokens; t++) {
            item x = {.extent = e, .node = first->begin + t, .root = r};
            if (!is_live(s->f, s->layer, e, s->h, x.node)) continue;
            for (uint32_t j = 0; j < s->g; j++) {
                sketched k = look_at_sketch(blob, r, x.node, s->q[j], s->f->dim);
                double lacks = top[j] - centre_estimate(blob, r, s->q[j], s->f->dim) - k.base;
                double times = floor((double)k.step / step[j] * 65536.0);
                double steps = floor(k.sum * times / 65536.0) - floor(lacks / step[j] + 0.5);
                x.s[j] = steps > s->f->dim / 4 * 255.0 - 65535.0 ? steps : -INFINITY;
            }
            push(tokens, x);
        }
    }
}

/* Its candidates, with s by their codes. */
static void list_limited(const scene *s, const list *roots, const float *steady,
                         const loci_select_params *p, double live, list *tokens) {
    list counted = {0};
    double step[16], top[16], floors[16];
    list_counted(s, roots, &counted, step, top);
    for (uint32_t j = 0; j < s->g; j++) {
        double most = fmax(top[j] + kth(&counted, j, 1) * step[j], (double)steady[j]);
        double reach = most - log(live / (1.0 - (double)p->top_p));
        floors[j] = fmax(kth(&counted, j, p->candidates_max), (reach - top[j]) / step[j]);
    }
    for (size_t i = 0; i < counted.count; i++) {
        item x = counted.items[i];
        const uint8_t *blob = fixture_blob(s->f, s->layer, x.extent, s->h);
        bool candidate = false;
        for (uint32_t j = 0; j < s->g; j++) {
            candidate |= x.s[j] > -INFINITY && x.s[j] >= floors[j];
            x.s[j] = token_estimate(blob, loci_slot_record(blob, x.node), s->q[j], s->f->dim);
        }
        if (candidate) push(tokens, x);
    }
    free(counted.items);
}

static void select_row(const scene *s, const float *steady, const loci_select_params *p,
                       bool single, uint8_t *chosen) {
    list roots = {0}, leaves = {0}, tokens = {0};
    double floor[16], live, spread;
    list_roots(s, &roots, &live, &spread);
    for (uint32_t j = 0; j < s->g; j++)
        floor[j] = fmax(kth(&roots, j, count_of(p->roots, spread, p->roots_min)),
                        (double)steady[j] + log((1.0 - (double)p->top_p) / 10.0));
    take_reaching(&roots, s->g, floor);
    if (p->candidates_max && single) {
        list_limited(s, &roots, steady, p, live, &tokens);
    } else {
        list_leaves(s, &roots, &leaves);
        for (uint32_t j = 0; j < s->g; j++) {
            double top = fmax(kth(&leaves, j, 1), (double)steady[j]);
            floor[j] = fmax(kth(&leaves, j, count_of(p->candidates, sqrt(live), p->candidates_min)),
                            top - log(live / (1.0 - (double)p->top_p)));
        }
        take_reaching(&leaves, s->g, floor);
        list_tokens(s, &leaves, floor, &tokens);
    }
    double sum = set_shares(&tokens, s->g, steady);
    choose(&tokens, sum - (1.0 - (double)p->top_p),
           p->budget ? (double)p->budget : (double)INFINITY);
    for (size_t i = 0; i < tokens.count; i++)
        if (tokens.items[i].taken)
            chosen[reference_index(s->f, tokens.items[i].extent, tokens.items[i].node)] = 1;
    free(roots.items);
    free(leaves.items);
    free(tokens.items);
}

/* Mean over rows and heads of S_i for one level of one KV head, over all live nodes. */
static void squeeze(const fixture *f, uint32_t layer, uint32_t h, uint32_t rows, const float *q,
                    int level, list *nodes) {
    uint32_t g = f->q_heads / f->kv_heads;
    for (uint32_t e = 0; e < f->extents; e++) {
        const uint8_t *blob = fixture_blob(f, layer, e, h);
        const loci_pair_header *header = loci_pair_header_of(blob);
        uint32_t slot = 0;
        for (uint32_t i = 0; i < (level ? header->leaves : header->roots); i++) {
            uint32_t held =
                level ? fixture_leaf(blob, i, NULL)->count : loci_pair_root(blob, i)->tokens;
            uint32_t n = count_live(f, layer, e, h, slot, held);
            slot += held;
            push(nodes, (item){.weight = n, .extent = e, .node = i});
        }
    }
    for (uint32_t v = 0; v < rows * g; v++) {
        float x[LOCI_HEAD_DIM_MAX];
        double z = -INFINITY;
        scaled_query(f, q, v / g, h * g + v % g, x);
        for (size_t i = 0; i < nodes->count; i++) {
            item *it = &nodes->items[i];
            const uint8_t *blob = fixture_blob(f, layer, it->extent, h);
            const loci_node *node =
                level ? loci_pair_leaf_node(blob, it->node) : loci_pair_root_node(blob, it->node);
            it->s[0] = node_estimate(blob, node, x, f->dim, false);
            if (it->weight) z = add_log(z, it->s[0] + log((double)it->weight));
        }
        for (size_t i = 0; i < nodes->count; i++)
            if (nodes->items[i].weight)
                nodes->items[i].p += exp(nodes->items[i].s[0] - z) / (rows * g);
    }
}

static void select_squeezed(const fixture *f, uint32_t layer, uint32_t h, uint32_t rows,
                            const float *q, const loci_select_params *p, uint8_t *chosen) {
    list roots = {0}, leaves = {0};
    uint32_t tokens = reference_tokens(f);
    squeeze(f, layer, h, rows, q, 0, &roots);
    squeeze(f, layer, h, rows, q, 1, &leaves);
    for (size_t r = 0; r < roots.count; r++) {
        const item *root = &roots.items[r];
        const uint8_t *blob = fixture_blob(f, layer, root->extent, h);
        const loci_root *node = loci_pair_root(blob, root->node);
        if (!(root->p > (double)p->squeezed_threshold[0])) continue;
        for (size_t l = 0; l < leaves.count; l++) {
            const item *leaf = &leaves.items[l];
            bool under = leaf->extent == root->extent && leaf->node >= node->begin &&
                         leaf->node < node->begin + node->count;
            if (!under || !(leaf->p > (double)p->squeezed_threshold[1])) continue;
            const loci_leaf *x = fixture_leaf(blob, leaf->node, NULL);
            for (uint32_t t = x->begin; t < x->begin + x->count; t++)
                for (uint32_t row = 0; row < rows && is_live(f, layer, leaf->extent, h, t); row++)
                    chosen[(size_t)row * tokens + reference_index(f, leaf->extent, t)] = 1;
        }
    }
    free(roots.items);
    free(leaves.items);
}

void reference_select(const fixture *f, uint32_t layer, uint32_t rows, const float *q,
                      const float *steady, const loci_select_params *params, uint8_t *chosen) {
    uint32_t tokens = reference_tokens(f), g = f->q_heads / f->kv_heads;
    memset(chosen, 0, (size_t)f->kv_heads * rows * tokens);
    for (uint32_t h = 0; h < f->kv_heads; h++) {
        uint8_t *out = chosen + (size_t)h * rows * tokens;
        if (params->mode == LOCI_MODE_SQUEEZED) {
            select_squeezed(f, layer, h, rows, q, params, out);
            continue;
        }
        for (uint32_t row = 0; row < rows; row++) {
            scene s = {.f = f, .layer = layer, .h = h, .g = g};
            for (uint32_t j = 0; j < g; j++) scaled_query(f, q, row, h * g + j, s.q[j]);
            select_row(&s, steady + (size_t)row * f->q_heads + h * g, params, rows == 1,
                       out + (size_t)row * tokens);
        }
    }
}

/* As the backend takes it: on the GPU int8 rows are rounded to bf16. */
static void read_slot(const uint8_t *blob, uint32_t slot, float *k, float *v) {
    uint32_t dim = loci_pair_header_of(blob)->head_dim;
    uint16_t wide_k[LOCI_HEAD_DIM_MAX], wide_v[LOCI_HEAD_DIM_MAX];
    loci_slot_read(blob, slot, wide_k, wide_v);
    for (uint32_t d = 0; d < dim; d++) {
        k[d] = loci_bf16_to_f32(wide_k[d]);
        v[d] = loci_bf16_to_f32(wide_v[d]);
    }
#ifdef LOCI_TEST_CPU
    const int8_t *row = loci_slot_kv(blob, slot);
    float k_scale, v_scale;
    if (loci_pair_header_of(blob)->kv_dtype != LOCI_I8) return;
    loci_kv_scales(row, dim, &k_scale, &v_scale);
    for (uint32_t d = 0; d < dim; d++) {
        k[d] = (float)row[d] * k_scale;
        v[d] = (float)row[dim + d] * v_scale;
    }
#endif
}

void reference_attend(const fixture *f, uint32_t layer, uint32_t rows, const float *q,
                      const uint8_t *chosen, double *out, double *lse) {
    uint32_t tokens = reference_tokens(f), g = f->q_heads / f->kv_heads;
    double *logit = malloc(tokens * sizeof *logit);
    LOCI_ASSERT(logit != NULL);
    for (uint32_t i = 0; i < rows * f->q_heads; i++) {
        uint32_t row = i / f->q_heads, head = i % f->q_heads, h = head / g;
        float x[LOCI_HEAD_DIM_MAX];
        double top = -INFINITY, sum = 0.0, *o = out + (size_t)i * f->dim;
        scaled_query(f, q, row, head, x);
        memset(o, 0, f->dim * sizeof *o);
        for (int pass = 0; pass < 2; pass++) {
            for (uint32_t e = 0; e < f->extents; e++) {
                const uint8_t *blob = fixture_blob(f, layer, e, h);
                for (uint32_t t = 0; t < f->views[e].tokens; t++) {
                    uint32_t at = reference_index(f, e, t);
                    size_t place = ((size_t)h * rows + row) * tokens + at;
                    if (chosen ? !chosen[place] : !is_live(f, layer, e, h, t)) continue;
                    float k[LOCI_HEAD_DIM_MAX], v[LOCI_HEAD_DIM_MAX];
                    read_slot(blob, t, k, v);
                    if (pass == 0) {
                        logit[at] = 0.0;
                        for (uint32_t d = 0; d < f->dim; d++)
                            logit[at] += (double)x[d] * (double)k[d];
                        top = fmax(top, logit[at]);
                        continue;
                    }
                    double w = exp(logit[at] - top);
                    sum += w;
                    for (uint32_t d = 0; d < f->dim; d++) o[d] += w * (double)v[d];
                }
            }
        }
        for (uint32_t d = 0; d < f->dim && sum > 0.0; d++) o[d] /= sum;
        lse[i] = sum > 0.0 ? top + log(sum) : -INFINITY;
    }
    free(logit);
}
