/* sparse_gemm_avx512vnni.c: the product over lists with 512-bit vpdpbusd, 2 rows x 8 panels: 16
 * accumulators, and 8 weight loads + 3 others for 16 products. A window of 8 panels is 32 KB. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx512.h"

#define NAME(operation) amber_##operation##_avx512vnni
#define PANELS          8
#define WINDOWS         1
#define START(sum)      _mm512_set1_epi32(-128 * (sum)) /* the weights are stored as w + 128 */

typedef __m512i weights;
static inline weights weights_at(const uint8_t *p) {
    return _mm512_load_si512(p);
}
static inline vi dot(vi acc, weights w, vi x) {
    return _mm512_dpbusd_epi32(acc, w, x);
}
static inline vi broadcast(int32_t x) {
    return _mm512_set1_epi32(x);
}
static inline vi sums_load(const int32_t *p) {
    return _mm512_load_si512(p);
}
static inline void sums_store(int32_t *p, vi v) {
    _mm512_store_si512(p, v);
}
static inline vf floats(vi v) {
    return _mm512_cvtepi32_ps(v);
}

#include "sparse_gemm_body.h"

/* ---- lists ---- */

/* A window's four groups of quads. */
struct masks {
    uint32_t a[4], b[4], common[4];
};

/* mask with its lowest free bits set until there are `keep`. */
INLINE uint32_t fill(uint32_t mask, int keep) {
    while (__builtin_popcount(mask) < keep) mask |= mask + 1;
    return mask;
}

/* The same with the free bits of `from`, of which there are enough. */
INLINE uint32_t fill_from(uint32_t mask, uint32_t from, int keep) {
    for (from &= ~mask; __builtin_popcount(mask) < keep; from &= from - 1) mask |= from & -from;
    return mask;
}

/* Writes the chosen lanes of v and moves on. Up to 16 lanes of rubbish follow, which the next store
 * overwrites: the arrays of a window are written in the order they lie in. */
INLINE int32_t *put(int32_t *to, uint32_t mask, __m512i v) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)mask, v));
    return to + __builtin_popcount(mask);
}
INLINE uint16_t *put_offsets(uint16_t *to, uint32_t mask, __m512i v) {
    __m512i kept = _mm512_maskz_compress_epi32((__mmask16)mask, v);
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi32_epi16(kept));
    return to + __builtin_popcount(mask);
}

/* Returns how many entries are common. */
INLINE int pack_window(struct amber_nm_window *to, const int8_t *a, const int8_t *b,
                       const int groups, int keep) {
    const __m512i lanes = _mm512_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704,
                                            768, 832, 896, 960);
    const int64_t entries = groups * keep;
    int32_t *xa = to->xa, *xb = to->xb;
    uint16_t *oa = to->oa, *ob = to->ob;
    __m512i va[4] = {0}, vb[4] = {0};
    struct masks m = {0};
    int common = 0;
    for (int g = 0; g < groups; g++) {
        va[g] = _mm512_load_si512(a + g * AMBER_NM_GROUP);
        vb[g] = b ? _mm512_load_si512(b + g * AMBER_NM_GROUP) : _mm512_setzero_si512();
        uint32_t ma = _mm512_test_epi32_mask(va[g], va[g]);
        uint32_t mb = _mm512_test_epi32_mask(vb[g], vb[g]), both = ma | mb;
        if (__builtin_popcount(both) <= keep) {
            m.a[g] = m.b[g] = fill(both, keep);
        } else {
            m.a[g] = fill_from(ma, mb, keep);
            m.b[g] = fill_from(mb, ma, keep);
        }
        m.common[g] = m.a[g] & m.b[g];
        common += __builtin_popcount(m.common[g]);
    }
    if (common == entries) {
        for (int g = 0; g < groups; g++) xa = put(xa, m.common[g], va[g]);
        for (int g = 0; g < groups; g++) xb = put(xb, m.common[g], vb[g]);
        for (int g = 0; g < groups; g++)
            oa = put_offsets(oa, m.common[g], _mm512_add_epi32(lanes, _mm512_set1_epi32(g * 1024)));
        return common;
    }
    for (int g = 0; g < groups; g++) xa = put(xa, m.common[g], va[g]);
    for (int g = 0; g < groups; g++) xa = put(xa, m.a[g] & ~m.common[g], va[g]);
    for (int g = 0; g < groups; g++) xb = put(xb, m.common[g], vb[g]);
    for (int g = 0; g < groups; g++) xb = put(xb, m.b[g] & ~m.common[g], vb[g]);
    for (int g = 0; g < groups; g++)
        oa = put_offsets(oa, m.common[g], _mm512_add_epi32(lanes, _mm512_set1_epi32(g * 1024)));
    for (int g = 0; g < groups; g++)
        oa = put_offsets(oa, m.a[g] & ~m.common[g],
                         _mm512_add_epi32(lanes, _mm512_set1_epi32(g * 1024)));
    ob += common;
    for (int g = 0; g < groups; g++)
        ob = put_offsets(ob, m.b[g] & ~m.common[g],
                         _mm512_add_epi32(lanes, _mm512_set1_epi32(g * 1024)));
    return common;
}

void amber_pack_nm_avx512vnni(const struct amber_nm *nm, const struct amber_a8 *a, int pair0,
                              int pair1) {
    for (int pair = pair0; pair < pair1; pair++) {
        const int8_t *x = a->q + amber_nm_row(nm, pair) * a->stride;
        const int8_t *z = amber_nm_rows(nm, pair, a->rows) == 2 ? x + a->stride : NULL;
        uint8_t *record = nm->lists + pair * nm->stride;
        uint8_t *counts = record + amber_nm_counts(a->k_pad);
        struct amber_nm_window *window = (struct amber_nm_window *)(void *)record;
        int k = 0;
        for (; k + AMBER_NM_WINDOW <= a->k_pad; k += AMBER_NM_WINDOW)
            *counts++ = (uint8_t)pack_window(window++, x + k, z ? z + k : NULL, 4, nm->keep);
        if (k < a->k_pad)
            *counts = (uint8_t)pack_window(window, x + k, z ? z + k : NULL,
                                           (a->k_pad - k) / AMBER_NM_GROUP, nm->keep);
    }
}

#endif
