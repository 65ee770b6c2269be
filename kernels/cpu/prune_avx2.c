/* prune_avx2.c: N:M selection in 256-bit vectors. */
#if defined(__x86_64__)
#include "vec_avx2.h"

#include <stdbool.h>

#define NAME(operation) amber_##operation##_avx2

typedef __m256 mask;

static inline mask mask_reaches(vf a, vf b) {
    return _mm256_cmp_ps(a, b, _CMP_GE_OQ);
}
static inline mask mask_equal(vf a, vf b) {
    return _mm256_cmp_ps(a, b, _CMP_EQ_OQ);
}
static inline uint32_t mask_bits(mask a) {
    return (uint32_t)_mm256_movemask_ps(a);
}
static inline mask mask_of_bits(uint32_t bits) {
    __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i own = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, bit));
}
static inline void clear_others(float *p, mask keep) {
    v_store(p, _mm256_and_ps(v_load(p), keep));
}
static inline void clear_others_n(float *p, mask keep, int n) {
    v_store_n(p, _mm256_and_ps(v_load_n(p, n), keep), n);
}

static inline vf v_magnitude(vf v) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}
static inline vf v_permute(vf v, vi index) {
    return _mm256_permutevar8x32_ps(v, index);
}
#define v_shuffle(a, b, order) _mm256_shuffle_ps(a, b, order)
static inline vf v_unpack_low(vf a, vf b) {
    return _mm256_unpacklo_ps(a, b);
}
static inline vf v_unpack_high(vf a, vf b) {
    return _mm256_unpackhi_ps(a, b);
}
static inline __attribute__((always_inline)) void v_swap(vf *a, vf *b, const int size) {
    (void)size; /* 4 */
    vf x = *a, y = *b;
    *a = _mm256_permute2f128_ps(x, y, 0x20);
    *b = _mm256_permute2f128_ps(x, y, 0x31);
}
static inline vi block_order(void) {
    return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
}
/* Lane i of the own m lanes. */
static inline vi group_lane(const int m, int i) {
    vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_or_si256(_mm256_and_si256(lane, _mm256_set1_epi32(-m)), _mm256_set1_epi32(i));
}
static inline void mask_spread(mask lanes[4], mask blocks) {
    vi index = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int q = 0; q < 4; q++)
        lanes[q] = v_permute(blocks, _mm256_add_epi32(index, _mm256_set1_epi32(2 * q)));
}

#include "prune_body.h"
#endif
