/* SPDX-License-Identifier: Apache-2.0
 *
 * splitmix64 (Steele, Lea and Flood, 2014): seeded numbers, the same on every machine. Not for
 * secrets.
 */
#ifndef LOCI_BASE_RNG_H
#define LOCI_BASE_RNG_H

#include <stdint.h>

#define LOCI_RNG_GAMMA 0x9e3779b97f4a7c15u

/* Its finalizer: a bijection in which every bit of z reaches every bit of the result. */
static inline uint64_t loci_rng_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The next number of the sequence that *state, any seed, stands in. */
static inline uint64_t loci_rng_next(uint64_t *state) {
    *state += LOCI_RNG_GAMMA;
    return loci_rng_mix(*state);
}

#endif
