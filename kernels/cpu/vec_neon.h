/* vec_neon.h: the vector of float32 that rows_body.h and attention_body.h are written in: 4 lanes
 * in 32 registers. See vec_avx512.h for what each function means. */
#ifndef AMBER_VEC_NEON_H
#define AMBER_VEC_NEON_H

#include "unroll.h"

#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { VL = 4, TILE_VECTORS = 4 };

typedef float32x4_t vf;
typedef int32x4_t vi;

#define v_prefetch(p) __builtin_prefetch((p), 0, 2)
static inline vf v_load(const float *p) {
    return vld1q_f32(p);
}
static inline void v_store(float *p, vf v) {
    vst1q_f32(p, v);
}
static inline vf v_load_n(const float *p, int n) {
    float padded[4] = {0};
    memcpy(padded, p, (size_t)n * 4);
    return vld1q_f32(padded);
}
static inline void v_store_n(float *p, vf v, int n) {
    float padded[4];
    vst1q_f32(padded, v);
    memcpy(p, padded, (size_t)n * 4);
}
static inline vf v_set1(float x) {
    return vdupq_n_f32(x);
}
static inline vf v_add(vf a, vf b) {
    return vaddq_f32(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return vsubq_f32(a, b);
}
static inline vf v_mul(vf a, vf b) {
    return vmulq_f32(a, b);
}
static inline vf v_div(vf a, vf b) {
    return vdivq_f32(a, b);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
static inline vf v_fnma(vf a, vf b, vf c) {
    return vfmsq_f32(c, a, b);
}
static inline vf v_max(vf a, vf b) {
    return vmaxq_f32(a, b);
} /* NaN where either is */
static inline vf v_min(vf a, vf b) {
    return vminq_f32(a, b);
}
static inline vf v_scale(vf v, vf t) {
    return vreinterpretq_f32_s32(
        vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vreinterpretq_s32_f32(t), 23)));
}
static inline vf v_zero_where_less(vf v, vf a, vf b) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(a, b)));
}
static inline bool v_any_greater(vf a, vf b) {
    return vmaxvq_u32(vcgtq_f32(a, b)) != 0;
}
static inline float v_sum(vf v) {
    return vaddvq_f32(v);
}
static inline float v_largest(vf v) {
    return vmaxvq_f32(v);
}

static inline vf v_load_f16(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
static inline vf v_load_f16_n(const uint16_t *p, int n) {
    uint16_t padded[4] = {0};
    memcpy(padded, p, (size_t)n * 2);
    return v_load_f16(padded);
}
static inline void v_store_f16(uint16_t *p, vf v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
static inline void v_store_f16_n(uint16_t *p, vf v, int n) {
    uint16_t padded[4];
    v_store_f16(padded, v);
    memcpy(p, padded, (size_t)n * 2);
}

static inline vf v_load_i8_n(const int8_t *p, int n) {
    uint64_t bytes = 0; /* the first 4 are read */
    memcpy(&bytes, p, (size_t)n);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes)))));
}
static inline vf v_load_i8(const int8_t *p) {
    return v_load_i8_n(p, 4);
}

static inline void v_load_pairs(const float *p, vf *a, vf *b) {
    float32x4x2_t v = vld2q_f32(p);
    *a = v.val[0];
    *b = v.val[1];
}
static inline void v_store_pairs(float *p, vf a, vf b) {
    vst2q_f32(p, (float32x4x2_t){{a, b}});
}

static inline vi vi_zero(void) {
    return vdupq_n_s32(0);
}
static inline vi vi_magnitude(vf v) {
    return vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fffffff));
}
static inline vi vi_max(vi a, vi b) {
    return vmaxq_s32(a, b);
}
static inline vi vi_add(vi a, vi b) {
    return vaddq_s32(a, b);
}
static inline int32_t vi_largest(vi v) {
    return vmaxvq_s32(v);
}
static inline int32_t vi_sum(vi v) {
    return vaddvq_s32(v);
}
static inline vi vi_round(vf v) {
    return vcvtnq_s32_f32(v);
}
static inline void vi_store_i8(int8_t *p, vi v) {
    int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(v), vdup_n_s16(0)));
    uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    memcpy(p, &four, 4);
}

static inline vi vi_set1(int32_t x) {
    return vdupq_n_s32(x);
}
static inline vf v_from_vi(vi v) {
    return vcvtq_f32_s32(v);
}
static inline vi vi_even_bytes(vi v) {
    return vreinterpretq_s32_s16(vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_s32(v), 8), 8));
}
static inline vi vi_odd_bytes(vi v) {
    return vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(v), 8));
}
static inline vi vi_dot_pairs(vi acc, vi a, vi b) {
    int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(x, y)));
}
static inline __attribute__((always_inline)) void
vi_load_fours(const int8_t *p, int64_t stride, int last, const bool half, vi out[4]) {
    vi z[4];
    UNROLL
    for (int l = 0; l < 4; l++) {
        const int8_t *from = p + (l < last ? l : last) * stride;
        z[l] =
            vreinterpretq_s32_s8(half ? vcombine_s8(vld1_s8(from), vdup_n_s8(0)) : vld1q_s8(from));
    }
    int64x2_t low0 = vreinterpretq_s64_s32(vzip1q_s32(z[0], z[1]));
    int64x2_t high0 = vreinterpretq_s64_s32(vzip2q_s32(z[0], z[1]));
    int64x2_t low1 = vreinterpretq_s64_s32(vzip1q_s32(z[2], z[3]));
    int64x2_t high1 = vreinterpretq_s64_s32(vzip2q_s32(z[2], z[3]));
    out[0] = vreinterpretq_s32_s64(vzip1q_s64(low0, low1));
    out[1] = vreinterpretq_s32_s64(vzip2q_s64(low0, low1));
    out[2] = vreinterpretq_s32_s64(vzip1q_s64(high0, high1));
    out[3] = vreinterpretq_s32_s64(vzip2q_s64(high0, high1));
}

static inline __attribute__((always_inline)) void v_transpose(vf r[VL]) {
    float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]); /* a0 b0 a2 b2 .. */
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#endif
