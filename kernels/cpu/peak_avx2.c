/* peak_avx2.c: VPMADDUBSW, VPMADDWD, VPADDD: 32 products in three instructions. */
#if defined(__x86_64__)
#include "../peaks.h"

#include <immintrin.h>

static int64_t dot(int64_t steps) {
    __m256i a = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i b[6], sum[6];
#pragma GCC unroll 32
    for (int i = 0; i < 6; i++) {
        b[i] = _mm256_set1_epi8((char)i);
        sum[i] = _mm256_setzero_si256();
    }
    for (int64_t s = 0; s < steps; s++) {
        /* Operands that the compiler takes for new each round: nothing can be moved out. */
        __asm__ volatile(""
                         : "+x"(b[0]), "+x"(b[1]), "+x"(b[2]), "+x"(b[3]), "+x"(b[4]), "+x"(b[5]));
#pragma GCC unroll 32
        for (int i = 0; i < 6; i++) {
            __m256i pairs = _mm256_maddubs_epi16(a, b[i]);
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones));
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < 6; i++) __asm__ volatile("" : : "x"(sum[i]));
    return steps * 6 * 32 * 2;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_avx2 = {"avx2", dot, read_bytes};
#else
typedef int amber_peak_avx2_absent;
#endif
