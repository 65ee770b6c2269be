/* peak_avxvnni.c: VPDPBUSD on 256 bits: 32 products in one instruction. */
#if defined(__x86_64__)
#include "../peaks.h"

#include <immintrin.h>

static int64_t dot(int64_t steps) {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), sum[12];
    /* Sums that the compiler must take for different, or it would compute one. */
#pragma GCC unroll 32
    for (int i = 0; i < 12; i++) {
        sum[i] = _mm256_setzero_si256();
        __asm__ volatile("" : "+x"(sum[i]));
    }
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 32
        for (int i = 0; i < 12; i++) sum[i] = _mm256_dpbusd_avx_epi32(sum[i], a, b);
        __asm__ volatile("" : "+x"(a), "+x"(b));
    }
#pragma GCC unroll 32
    for (int i = 0; i < 12; i++) __asm__ volatile("" : : "x"(sum[i]));
    return steps * 12 * 32 * 2;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_avxvnni = {"avxvnni", dot, read_bytes};
#else
typedef int amber_peak_avxvnni_absent;
#endif
