/* finish_neon.h: from sums to outputs, for the INT8 matrix products of Advanced SIMD. */
#ifndef AMBER_FINISH_NEON_H
#define AMBER_FINISH_NEON_H

#include "../kernels.h"

#include <arm_neon.h>

/* Outputs o..o+3 of a row, as far as they exist (o < n_out): see struct amber_gemm_w8a8. */
static inline void finish(const struct amber_gemm_w8a8 *g, int row, int o, int32x4_t acc) {
    float *y = g->y + row * g->ldy + o;
    float32x4_t scale = vmulq_f32(vdupq_n_f32(g->a.scale[row]), vld1q_f32(g->w.scale + o));
    float32x4_t v = vmulq_f32(vcvtq_f32_s32(acc), scale);
    if (g->a.shift)
        v = vaddq_f32(v, vmulq_f32(vdupq_n_f32(g->a.shift[row]), vld1q_f32(g->w.sum + o)));
    if (g->w.bias) v = vaddq_f32(v, vld1q_f32(g->w.bias + o));
    if (g->w.n_out - o >= 4) {
        vst1q_f32(y, g->add ? vaddq_f32(vld1q_f32(y), v) : v);
    } else {
        float some[4];
        vst1q_f32(some, v);
        for (int i = 0; i < g->w.n_out - o; i++) y[i] = g->add ? y[i] + some[i] : some[i];
    }
}

#endif
