/* sparse_gemm_avx2.c: the product over lists with AVX2, 2 rows x 2 panels; gemm_avx2.c says how
 * vpmaddubsw is kept exact. The magnitudes of weights that both rows meet are made once. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx2.h"

#define NAME(operation) amber_##operation##_avx2
#define PANELS          2
#define WINDOWS         3
#define START(sum)      _mm256_set1_epi32(0 * (sum))

typedef struct {
    __m256i magnitude, w;
} weights;
static inline weights weights_at(const uint8_t *p) {
    __m256i w = _mm256_load_si256((const __m256i *)(const void *)p);
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128)); /* w + 128 back to w */
    return (weights){_mm256_abs_epi8(w), w};
}
static inline vi dot(vi acc, weights w, vi x) {
    __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "sparse_gemm_256.h"
#include "sparse_gemm_body.h"

/* ---- lists ---- */

static inline __m256i load(const int8_t *x) {
    return _mm256_load_si256((const __m256i *)(const void *)x);
}

/* Which of the 16 quads at x are not all zero. */
static inline uint32_t quads_of(const int8_t *x) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low = _mm256_cmpeq_epi32(load(x), zero), high = _mm256_cmpeq_epi32(load(x + 32), zero);
    uint32_t zeros = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(low)) |
                     (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(high)) << 8;
    return zeros ^ 0xffff;
}

/* mask with the lowest free bits of `from` set until there are `keep`. */
static inline uint32_t fill(uint32_t mask, uint32_t from, int keep) {
    for (from &= ~mask; __builtin_popcount(mask) < keep; from &= from - 1) mask |= from & -from;
    return mask;
}

/* Adds the quads of a mask to one row's list of `count`; x is the window's. */
static inline int put(int32_t *to, uint16_t *offsets, int count, uint64_t mask, const int8_t *x) {
    for (; mask; mask &= mask - 1, count++) {
        int quad = __builtin_ctzll(mask);
        memcpy(&to[count], x + 4 * quad, 4);
        offsets[count] = (uint16_t)(64 * quad);
    }
    return count;
}

static int pack_window(struct amber_nm_window *to, const int8_t *a, const int8_t *b, int groups,
                       int keep) {
    uint64_t ma = 0, mb = 0;
    for (int g = 0; g < groups; g++) {
        uint32_t qa = quads_of(a + g * AMBER_NM_GROUP), qb = quads_of(b + g * AMBER_NM_GROUP);
        if (__builtin_popcount(qa | qb) <= keep) {
            qa = qb = fill(qa | qb, 0xffff, keep);
        } else {
            uint32_t filled = fill(qa, qb, keep);
            qb = fill(qb, qa, keep);
            qa = filled;
        }
        ma |= (uint64_t)qa << 16 * g;
        mb |= (uint64_t)qb << 16 * g;
    }
    int common = put(to->xa, to->oa, 0, ma & mb, a);
    put(to->xb, to->ob, 0, ma & mb, b);
    put(to->xa, to->oa, common, ma & ~mb, a);
    put(to->xb, to->ob, common, mb & ~ma, b);
    return common;
}

void amber_pack_nm_avx2(const struct amber_nm *nm, const struct amber_a8 *a, int pair0, int pair1) {
    static const _Alignas(32) int8_t zeros[AMBER_NM_WINDOW];
    for (int pair = pair0; pair < pair1; pair++) {
        const int8_t *x = a->q + amber_nm_row(nm, pair) * a->stride;
        const bool two = amber_nm_rows(nm, pair, a->rows) == 2;
        uint8_t *record = nm->lists + pair * nm->stride;
        uint8_t *counts = record + amber_nm_counts(a->k_pad);
        struct amber_nm_window *to = (struct amber_nm_window *)(void *)record;
        for (int k = 0; k < a->k_pad; k += AMBER_NM_WINDOW, to++) {
            const int left = (a->k_pad - k) / AMBER_NM_GROUP;
            *counts++ = (uint8_t)pack_window(to, x + k, two ? x + a->stride + k : zeros,
                                             left < 4 ? left : 4, nm->keep);
        }
    }
}

#endif
