/* prune_avx512vnni.c: N:M selection in 512-bit vectors. */
#if defined(__x86_64__)
#include "vec_avx512.h"

#include <stdbool.h>

#define NAME(operation) amber_##operation##_avx512vnni

typedef __mmask16 mask;

static inline mask mask_reaches(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
static inline mask mask_equal(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
static inline uint32_t mask_bits(mask a) {
    return a;
}
static inline mask mask_of_bits(uint32_t bits) {
    return (mask)bits;
}
/* Every bit four times: the gaps open by halves. */
static inline void mask_spread(mask lanes[4], mask blocks) {
    uint64_t x = blocks;
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    x = (x | x << 6) & 0x0303030303030303;
    x = (x | x << 3) & 0x1111111111111111;
    x *= 15;
    for (int q = 0; q < 4; q++) lanes[q] = (mask)(x >> 16 * q);
}
static inline void clear_others(float *p, mask keep) {
    _mm512_mask_storeu_ps(p, (mask)~keep, _mm512_setzero_ps());
}
static inline void clear_others_n(float *p, mask keep, int n) {
    _mm512_mask_storeu_ps(p, (mask)(~keep & v_first(n)), _mm512_setzero_ps());
}

static inline vf v_magnitude(vf v) {
    return _mm512_abs_ps(v);
}
static inline vf v_permute(vf v, vi index) {
    return _mm512_permutexvar_ps(index, v);
}
#define v_shuffle(a, b, order) _mm512_shuffle_ps(a, b, order)
static inline vf v_unpack_low(vf a, vf b) {
    return _mm512_unpacklo_ps(a, b);
}
static inline vf v_unpack_high(vf a, vf b) {
    return _mm512_unpackhi_ps(a, b);
}
static inline __attribute__((always_inline)) void v_swap(vf *a, vf *b, const int size) {
    vf x = *a, y = *b;
    if (size == 4) {
        *a = _mm512_mask_shuffle_f32x4(x, 0xf0f0, y, y, 0xa0);
        *b = _mm512_mask_shuffle_f32x4(y, 0x0f0f, x, x, 0xf5);
    } else {
        *a = _mm512_shuffle_f32x4(x, y, 0x44);
        *b = _mm512_shuffle_f32x4(x, y, 0xee);
    }
}
static inline vi block_order(void) {
    return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
/* Lane i of the own m lanes. */
static inline vi group_lane(const int m, int i) {
    vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(_mm512_and_si512(lane, _mm512_set1_epi32(-m)), _mm512_set1_epi32(i));
}

#include "prune_body.h"
#endif
