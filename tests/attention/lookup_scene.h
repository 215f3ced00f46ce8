/* SPDX-License-Identifier: Apache-2.0
 *
 * A generated corpus with queries, and one look-up over it: what test_lookup and test_ranking
 * start from. Failures end the test at hand.
 */
#ifndef LOCI_TESTS_ATTENTION_LOOKUP_SCENE_H
#define LOCI_TESTS_ATTENTION_LOOKUP_SCENE_H

#include "tests/attention/lookup_reference.h"

#define SEGMENT_TOKENS 41u

typedef struct scene {
    fixture f;
    uint32_t rows;
    float *q, *steady, *out, *lse;
    double *ref_out, *ref_lse;
    uint8_t *chosen, *dead;
    uint64_t rng;
} scene;

typedef struct setting {
    uint32_t tokens, dim, kv_heads, group, rows, extent_tokens, flat_segments;
    uint32_t row_begin; /* of attribution */
    float spread, sharpness;
    uint64_t seed;
    const char *isa;
    unsigned threads;
    bool kv_int8;
    bool kv_rounded; /* K and V are what int8 rows hold, in whatever form */
} setting;

extern const setting usual;

/* LOCI_TEST_SEED, or another one each time; printed. */
uint64_t fresh_seed(void);
/* Another shape, odd ones among them. */
setting random_setting(uint64_t *rng);
scene open_scene(setting c);
void close_scene(scene *s);
/* Parameters that really leave things out. */
loci_select_params narrow(float top_p, uint32_t budget);
/* Runs all stages on layer 0; results in s->out and s->lse. */
fixture_run run(scene *s, loci_select_params params, bool selected);
/* Kills all segments but one in `one_in`, and the first dozen. */
void kill_some(scene *s, uint32_t one_in);

#endif
