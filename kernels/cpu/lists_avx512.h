/* lists_avx512.h: writing the windows of sparse_gemm.h in 512-bit vectors. */
#ifndef AMBER_LISTS_AVX512_H
#define AMBER_LISTS_AVX512_H

#include "../sparse_gemm.h"

#include <immintrin.h>

/* A window's groups of 16 quads: which of them are listed for each row, and for both. */
struct listed {
    uint32_t a[4], b[4];
};

/* Writes the chosen lanes of v and moves on. Up to 16 lanes of rubbish follow, which the next store
 * overwrites: the arrays of a window are written in the order they lie in. */
static inline int32_t *put(int32_t *to, uint32_t mask, __m512i v) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)mask, v));
    return to + __builtin_popcount(mask);
}
static inline uint16_t *put_offsets(uint16_t *to, uint32_t mask, int group) {
    const __m512i lanes = _mm512_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704,
                                            768, 832, 896, 960);
    __m512i v = _mm512_add_epi32(lanes, _mm512_set1_epi32(group * 1024));
    __m512i kept = _mm512_maskz_compress_epi32((__mmask16)mask, v);
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi32_epi16(kept));
    return to + __builtin_popcount(mask);
}

/* The window of two rows' quads. Returns how many entries are common. */
static inline __attribute__((always_inline)) int write_window(struct amber_nm_window *to,
                                                              const __m512i *va, const __m512i *vb,
                                                              const struct listed *m,
                                                              const int groups) {
    int32_t *xa = to->xa, *xb = to->xb;
    uint16_t *oa = to->oa, *ob = to->ob;
    uint32_t different = 0;
    for (int g = 0; g < groups; g++) different |= m->a[g] ^ m->b[g];
    if (!different) {
        for (int g = 0; g < groups; g++) xa = put(xa, m->a[g], va[g]);
        for (int g = 0; g < groups; g++) xb = put(xb, m->a[g], vb[g]);
        for (int g = 0; g < groups; g++) oa = put_offsets(oa, m->a[g], g);
        return (int)(oa - to->oa);
    }
    for (int g = 0; g < groups; g++) xa = put(xa, m->a[g] & m->b[g], va[g]);
    for (int g = 0; g < groups; g++) xa = put(xa, m->a[g] & ~m->b[g], va[g]);
    for (int g = 0; g < groups; g++) xb = put(xb, m->a[g] & m->b[g], vb[g]);
    for (int g = 0; g < groups; g++) xb = put(xb, m->b[g] & ~m->a[g], vb[g]);
    for (int g = 0; g < groups; g++) oa = put_offsets(oa, m->a[g] & m->b[g], g);
    const int common = (int)(oa - to->oa);
    for (int g = 0; g < groups; g++) oa = put_offsets(oa, m->a[g] & ~m->b[g], g);
    ob += common;
    for (int g = 0; g < groups; g++) ob = put_offsets(ob, m->b[g] & ~m->a[g], g);
    return common;
}

#endif
