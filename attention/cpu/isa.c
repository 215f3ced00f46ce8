/* SPDX-License-Identifier: Apache-2.0
 *
 * Which instruction set the kernels may use: what the processor has and the operating
 * system saves, capped by an option and by the environment variable LOCI_ISA.
 */
#include <stdlib.h>
#include <string.h>

#include "attention/cpu/cpu.h"

static const char *const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};

const char *loci_cpu_isa_name(loci_cpu_isa isa) {
    return names[isa];
}

/* __builtin_cpu_supports checks XCR0 too, so a feature whose registers the operating system
 * does not save reads as absent. */
static loci_cpu_isa machine_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return LOCI_ISA_PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return LOCI_ISA_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? LOCI_ISA_AVX512_BF16 : LOCI_ISA_AVX512;
#else
    return LOCI_ISA_PORTABLE;
#endif
}

static loci_status cap(loci_cpu_isa *isa, const char *name, const char *source, loci_error *err) {
    if (!name || !*name) return LOCI_OK;
    for (int i = 0; i <= LOCI_ISA_AVX512_BF16; i++) {
        if (strcmp(names[i], name) != 0) continue;
        if ((loci_cpu_isa)i < *isa) *isa = (loci_cpu_isa)i;
        return LOCI_OK;
    }
    return loci_fail(err, LOCI_E_INVAL,
                     "%s '%s' is no instruction set; known are portable, avx2, avx512, avx512_bf16",
                     source, name);
}

loci_status loci_cpu_isa_detect(const char *isa, loci_cpu_isa *out, loci_error *err) {
    *out = machine_isa();
    LOCI_TRY(cap(out, isa, "option isa", err));
    return cap(out, getenv("LOCI_ISA"), "environment variable LOCI_ISA", err);
}
