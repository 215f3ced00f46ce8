/* SPDX-License-Identifier: Apache-2.0
 *
 * Row-wise kernels: norm, activation, rotary positions, conversion. Included once by each
 * kernels_*.c, after vec.h.
 */
#include "attention/cpu/cpu.h"
#include "attention/cpu/kernels.h"

static void rms_norm(float *y, const float *x, const float *gain, uint32_t cols, float eps) {
    vf sums[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    uint32_t i = 0;
    for (; i + 4 * VW <= cols; i += 4 * VW)
        for (uint32_t v = 0; v < 4; v++) {
            vf a = v_load(x + i + v * VW);
            sums[v] = v_fma(a, a, sums[v]);
        }
    float sum = v_reduce_add(v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3])));
    for (; i < cols; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)cols + eps);
    for (i = 0; i + VW <= cols; i += VW)
        v_store(y + i, v_mul(v_mul(v_load(x + i), v_set1(scale)), v_load(gain + i)));
    for (; i < cols; i++) y[i] = x[i] * scale * gain[i];
}

static void swiglu(float *y, const float *gate, const float *up, uint32_t cols) {
    uint32_t i = 0;
    vf one = v_set1(1.0f);
    for (; i + VW <= cols; i += VW) {
        vf g = v_load(gate + i);
        vf sigmoid = v_div(one, v_add(one, v_exp(v_sub(v_zero(), g))));
        v_store(y + i, v_mul(v_mul(g, sigmoid), v_load(up + i)));
    }
    for (; i < cols; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* The angle is rounded to float as the reference implementation does; its reduction by multiples
 * of pi/2 is done in double, so positions in the millions lose nothing. Written without branches
 * for the compiler to vectorise. */
static void rope_angles(float *cosine, float *sine, float position, const float *inv_freq,
                        uint32_t half) {
    for (uint32_t i = 0; i < half; i++) {
        float angle = position * inv_freq[i];
        double turns = (double)angle * 0.63661977236758134;
        double n = (turns + 6755399441055744.0) - 6755399441055744.0;
        float r = (float)((double)angle - n * 1.57079632679489662);
        int32_t quarter = (int32_t)n;
        float r2 = r * r;
        float s =
            r + r * r2 * (-1.6666666641e-1f + r2 * (8.3333293855e-3f + r2 * -1.9839334836e-4f));
        float c = 1.0f + r2 * (-0.5f + r2 * (4.1666645683e-2f +
                                             r2 * (-1.3887316255e-3f + r2 * 2.4433157118e-5f)));
        float a = (quarter & 1) ? c : s;
        float b = (quarter & 1) ? s : c;
        sine[i] = (quarter & 2) ? -a : a;
        cosine[i] = ((quarter + 1) & 2) ? -b : b;
    }
}

#define ROPE_HALF_MAX 256u

static void rope(float *x, float position, const float *inv_freq, uint32_t heads,
                 uint32_t head_dim) {
    float cosine[ROPE_HALF_MAX], sine[ROPE_HALF_MAX];
    uint32_t half = head_dim / 2;
    rope_angles(cosine, sine, position, inv_freq, half);
    for (uint32_t h = 0; h < heads; h++) {
        float *low = x + (size_t)h * head_dim, *high = low + half;
        uint32_t i = 0;
        for (; i + VW <= half; i += VW) {
            vf a = v_load(low + i), b = v_load(high + i);
            vf c = v_load(cosine + i), s = v_load(sine + i);
            v_store(low + i, v_sub(v_mul(a, c), v_mul(b, s)));
            v_store(high + i, v_add(v_mul(b, c), v_mul(a, s)));
        }
        for (; i < half; i++) {
            float a = low[i], b = high[i];
            low[i] = a * cosine[i] - b * sine[i];
            high[i] = b * cosine[i] + a * sine[i];
        }
    }
}

static void to_bf16(uint16_t *dst, const float *src, size_t count) {
    for (size_t i = 0; i < count; i++) dst[i] = loci_f32_to_bf16(src[i]);
}

static float exp_sum(const float *x, size_t count, float shift) {
    vf sum = v_zero(), by = v_set1(shift);
    size_t i = 0;
    for (; i + VW <= count; i += VW) sum = v_add(sum, v_exp(v_sub(v_load(x + i), by)));
    float total = v_reduce_add(sum);
    for (; i < count; i++) total += expf(x[i] - shift);
    return total;
}
