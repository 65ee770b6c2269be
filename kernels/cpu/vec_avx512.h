/* vec_avx512.h: the vector of float32 that rows_body.h and attention_body.h are written in: 16
 * lanes in 32 registers. Every function is static inline: a file gets its own copy, with its own
 * flags. */
#ifndef AMBER_VEC_AVX512_H
#define AMBER_VEC_AVX512_H

#include "unroll.h"

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

enum { VL = 16, TILE_VECTORS = 4 }; /* lanes; vectors of a tile's row: 6 x 4 + operands fit */

typedef __m512 vf;
typedef __m512i vi;

/* To L2. A macro: gcc takes a function that only prefetches for one without effect. */
#define v_prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
static inline vf v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline void v_store(float *p, vf v) {
    _mm512_storeu_ps(p, v);
}
static inline __mmask16 v_first(int n) {
    return (__mmask16)((1u << n) - 1);
}
static inline vf v_load_n(const float *p, int n) {
    return _mm512_maskz_loadu_ps(v_first(n), p);
}
static inline void v_store_n(float *p, vf v, int n) {
    _mm512_mask_storeu_ps(p, v_first(n), v);
}
static inline vf v_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
static inline vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static inline vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
} /* a * b + c */
static inline vf v_fnma(vf a, vf b, vf c) {
    return _mm512_fnmadd_ps(a, b, c);
} /* c - a * b */
static inline vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
} /* b where either is NaN */
static inline vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
} /* b where either is NaN */
/* v * 2^n; t is n + 1.5 * 2^23, so that its low bits are n. v * 2^n is normal. */
static inline vf v_scale(vf v, vf t) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
/* v, or 0 where a < b. */
static inline vf v_zero_where_less(vf v, vf a, vf b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), v);
}
static inline bool v_any_greater(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
static inline float v_sum(vf v) {
    return _mm512_reduce_add_ps(v);
}
static inline float v_largest(vf v) {
    return _mm512_reduce_max_ps(v);
}

static inline vf v_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf v_load_f16_n(const uint16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(v_first(n), p));
}
static inline void v_store_f16(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_store_f16_n(uint16_t *p, vf v, int n) {
    _mm256_mask_storeu_epi16(p, v_first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

static inline vf v_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vf v_load_i8_n(const int8_t *p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(v_first(n), p)));
}

/* 2 * VL floats a0 b0 a1 b1 ... as two vectors, and back. */
static inline void v_load_pairs(const float *p, vf *a, vf *b) {
    __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    vf low = v_load(p), high = v_load(p + 16);
    *a = _mm512_permutex2var_ps(low, even, high);
    *b = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}
static inline void v_store_pairs(float *p, vf a, vf b) {
    __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v_store(p, _mm512_permutex2var_ps(a, low, b));
    v_store(p + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b));
}

static inline vi vi_zero(void) {
    return _mm512_setzero_si512();
}
static inline vi vi_magnitude(vf v) { /* the bits without the sign, ordered like the magnitude */
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
static inline vi vi_max(vi a, vi b) {
    return _mm512_max_epi32(a, b);
}
static inline vi vi_add(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
static inline int32_t vi_largest(vi v) {
    return _mm512_reduce_max_epi32(v);
}
static inline int32_t vi_sum(vi v) {
    return _mm512_reduce_add_epi32(v);
}
static inline vi vi_round(vf v) {
    return _mm512_cvtps_epi32(v);
}
static inline void vi_store_i8(int8_t *p, vi v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v));
}

static inline vi vi_set1(int32_t x) {
    return _mm512_set1_epi32(x);
}
static inline vf v_from_vi(vi v) {
    return _mm512_cvtepi32_ps(v);
}
/* Four bytes as two pairs of int16: the first and the third, the second and the fourth. */
static inline vi vi_even_bytes(vi v) {
    return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
}
static inline vi vi_odd_bytes(vi v) {
    return _mm512_srai_epi16(v, 8);
}
/* acc + a0 * b0 + a1 * b1, pairs of int16. */
static inline vi vi_dot_pairs(vi acc, vi a, vi b) {
    return _mm512_dpwssd_epi32(acc, a, b);
}
/* Bytes of VL rows: lane l of out[g] is bytes 4g .. 4g+3 of row l, which begins at p + l * stride.
 * Rows behind `last` are copies of it; half: rows have 8 bytes, and out[2], out[3] are 0. */
static inline __attribute__((always_inline)) void
vi_load_fours(const int8_t *p, int64_t stride, int last, const bool half, vi out[4]) {
    vi z[4];
    UNROLL
    for (int a = 0; a < 4; a++) {
        __m128i r[4];
        UNROLL
        for (int l = 0; l < 4; l++) {
            const int row = 4 * l + a < last ? 4 * l + a : last;
            const __m128i *from = (const __m128i *)(p + row * stride);
            r[l] = half ? _mm_loadl_epi64(from) : _mm_loadu_si128(from);
        }
        z[a] = _mm512_castsi128_si512(r[0]);
        z[a] = _mm512_inserti32x4(z[a], r[1], 1);
        z[a] = _mm512_inserti32x4(z[a], r[2], 2);
        z[a] = _mm512_inserti32x4(z[a], r[3], 3);
    }
    vi low0 = _mm512_unpacklo_epi32(z[0], z[1]), high0 = _mm512_unpackhi_epi32(z[0], z[1]);
    vi low1 = _mm512_unpacklo_epi32(z[2], z[3]), high1 = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(low0, low1);
    out[1] = _mm512_unpackhi_epi64(low0, low1);
    out[2] = _mm512_unpacklo_epi64(high0, high1);
    out[3] = _mm512_unpackhi_epi64(high0, high1);
}

/* r[i] lane j  <->  r[j] lane i. */
static inline __attribute__((always_inline)) void v_transpose(vf r[VL]) {
    vf t[VL];
    UNROLL
    for (int i = 0; i < 16; i += 2) { /* within 128-bit lanes: pairs of rows */
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) { /* fours of rows: r[i+c] holds columns c, c+4, c+8, c+12 */
        __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    UNROLL
    for (int c = 0; c < 4; c++) { /* a 4 x 4 transpose of 128-bit lanes per column class */
        vf a = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88);
        vf b = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xdd);
        vf d = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
        vf e = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xdd);
        t[c] = _mm512_shuffle_f32x4(a, d, 0x88);
        t[c + 8] = _mm512_shuffle_f32x4(a, d, 0xdd);
        t[c + 4] = _mm512_shuffle_f32x4(b, e, 0x88);
        t[c + 12] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
    UNROLL
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

#endif
