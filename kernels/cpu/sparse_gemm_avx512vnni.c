/* sparse_gemm_avx512vnni.c: the product over lists with 512-bit vpdpbusd, 2 rows x 8 panels: 16
 * accumulators, and 8 weight loads + 3 others for 16 products. A window of 8 panels is 32 KB. */
#if defined(__x86_64__)
#include "columns.h"
#include "lists_avx512.h"
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

/* Returns how many entries are common. */
INLINE int pack_window(struct amber_nm_window *to, const int8_t *a, const int8_t *b,
                       const int groups, int keep) {
    __m512i va[4] = {0}, vb[4] = {0};
    struct listed m = {0};
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
    }
    return write_window(to, va, vb, &m, groups);
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
