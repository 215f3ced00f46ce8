/* SPDX-License-Identifier: Apache-2.0
 *
 * The two 16-bit floating-point formats: bf16 (the upper half of an f32) and IEEE 754 half
 * precision, as their bits.
 */
#ifndef LOCI_BASE_HALF_H
#define LOCI_BASE_HALF_H

#include <stdint.h>

/* Exact. */
static inline float loci_bf16_to_f32(uint16_t value) {
    union {
        uint32_t u;
        float f;
    } bits = {(uint32_t)value << 16};
    return bits.f;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t loci_f32_to_bf16(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value};
    if ((bits.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits.u >> 16) | 0x40u);
    return (uint16_t)((bits.u + 0x7fffu + ((bits.u >> 16) & 1u)) >> 16);
}

/* IEEE 754 half precision; exact. */
static inline float loci_f16_to_f32(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16, rest = value & 0x7fffu;
    union {
        uint32_t u;
        float f;
    } bits;
    if (rest < 0x400u) { /* zero and subnormal: rest * 2^-24 */
        bits.f = (float)rest * 0x1.0p-24f;
        bits.u |= sign;
    } else {
        bits.u = sign | ((rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u));
    }
    return bits.f;
}

#endif
