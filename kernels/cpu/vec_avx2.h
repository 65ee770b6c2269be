/* vec_avx2.h: the vector of float32 that rows_body.h and attention_body.h are written in: 8 lanes
 * in 16 registers. See vec_avx512.h for what each function means. */
#ifndef AMBER_VEC_AVX2_H
#define AMBER_VEC_AVX2_H

#include "unroll.h"

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { VL = 8, TILE_VECTORS = 2 };

typedef __m256 vf;
typedef __m256i vi;

/* To L2. A macro: gcc takes a function that only prefetches for one without effect. */
#define v_prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
static inline vf v_load(const float *p) {
    return _mm256_loadu_ps(p);
}
static inline void v_store(float *p, vf v) {
    _mm256_storeu_ps(p, v);
}
static inline __m256i v_first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf v_load_n(const float *p, int n) {
    return _mm256_maskload_ps(p, v_first(n));
}
static inline void v_store_n(float *p, vf v, int n) {
    _mm256_maskstore_ps(p, v_first(n), v);
}
static inline vf v_set1(float x) {
    return _mm256_set1_ps(x);
}
static inline vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
static inline vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static inline vf v_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
static inline vf v_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf v_fnma(vf a, vf b, vf c) {
    return _mm256_fnmadd_ps(a, b, c);
}
static inline vf v_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
static inline vf v_min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
static inline vf v_scale(vf v, vf t) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
static inline vf v_zero_where_less(vf v, vf a, vf b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), v);
}
static inline bool v_any_greater(vf a, vf b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
static inline float v_sum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float v_largest(vf v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline vf v_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline vf v_load_f16_n(const uint16_t *p, int n) {
    uint16_t padded[8] = {0};
    memcpy(padded, p, (size_t)n * 2);
    return v_load_f16(padded);
}
static inline void v_store_f16(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_store_f16_n(uint16_t *p, vf v, int n) {
    uint16_t padded[8];
    v_store_f16(padded, v);
    memcpy(p, padded, (size_t)n * 2);
}

static inline vf v_load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf v_load_i8_n(const int8_t *p, int n) {
    int8_t padded[8] = {0};
    memcpy(padded, p, (size_t)n);
    return v_load_i8(padded);
}

static inline void v_load_pairs(const float *p, vf *a, vf *b) {
    vf low = v_load(p), high = v_load(p + 8);
    __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88)); /* a0 a1 a4 a5 a2 .. */
    __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
    *a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    *b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
static inline void v_store_pairs(float *p, vf a, vf b) {
    vf low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    v_store(p, _mm256_permute2f128_ps(low, high, 0x20));
    v_store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

static inline vi vi_zero(void) {
    return _mm256_setzero_si256();
}
static inline vi vi_magnitude(vf v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
static inline vi vi_max(vi a, vi b) {
    return _mm256_max_epi32(a, b);
}
static inline vi vi_add(vi a, vi b) {
    return _mm256_add_epi32(a, b);
}
static inline int32_t vi_largest(vi v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline int32_t vi_sum(vi v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline vi vi_round(vf v) {
    return _mm256_cvtps_epi32(v);
}
static inline void vi_store_i8(int8_t *p, vi v) {
    __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(s, s));
}

static inline vi vi_set1(int32_t x) {
    return _mm256_set1_epi32(x);
}
static inline vf v_from_vi(vi v) {
    return _mm256_cvtepi32_ps(v);
}
static inline vi vi_even_bytes(vi v) {
    return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
}
static inline vi vi_odd_bytes(vi v) {
    return _mm256_srai_epi16(v, 8);
}
static inline vi vi_dot_pairs(vi acc, vi a, vi b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
static inline __attribute__((always_inline)) void
vi_load_fours(const int8_t *p, int64_t stride, int last, const bool half, vi out[4]) {
    vi z[4];
    UNROLL
    for (int a = 0; a < 4; a++) {
        __m128i r[2];
        UNROLL
        for (int l = 0; l < 2; l++) {
            const int row = 4 * l + a < last ? 4 * l + a : last;
            const __m128i *from = (const __m128i *)(p + row * stride);
            r[l] = half ? _mm_loadl_epi64(from) : _mm_loadu_si128(from);
        }
        z[a] = _mm256_inserti128_si256(_mm256_castsi128_si256(r[0]), r[1], 1);
    }
    vi low0 = _mm256_unpacklo_epi32(z[0], z[1]), high0 = _mm256_unpackhi_epi32(z[0], z[1]);
    vi low1 = _mm256_unpacklo_epi32(z[2], z[3]), high1 = _mm256_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm256_unpacklo_epi64(low0, low1);
    out[1] = _mm256_unpackhi_epi64(low0, low1);
    out[2] = _mm256_unpacklo_epi64(high0, high1);
    out[3] = _mm256_unpackhi_epi64(high0, high1);
}

static inline __attribute__((always_inline)) void v_transpose(vf r[VL]) {
    vf t[VL];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) { /* r[i+c] holds columns c and c+4 of four rows */
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLL
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x20);
        t[c + 4] = _mm256_permute2f128_ps(r[c], r[c + 4], 0x31);
    }
    UNROLL
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif
