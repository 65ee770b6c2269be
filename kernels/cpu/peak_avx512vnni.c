/* peak_avx512vnni.c: VPDPBUSD on 512 bits: 64 products in one instruction. */
#if defined(__x86_64__)
#include "../peaks.h"

#include <immintrin.h>

static int64_t dot(int64_t steps) {
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5), sum[20];
    /* Sums that the compiler must take for different, or it would compute one. */
#pragma GCC unroll 32
    for (int i = 0; i < 20; i++) {
        sum[i] = _mm512_setzero_si512();
        __asm__ volatile("" : "+v"(sum[i]));
    }
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 32
        for (int i = 0; i < 20; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
        __asm__ volatile("" : "+v"(a), "+v"(b));
    }
#pragma GCC unroll 32
    for (int i = 0; i < 20; i++) __asm__ volatile("" : : "v"(sum[i]));
    return steps * 20 * 64 * 2;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_avx512vnni = {"avx512vnni", dot, read_bytes};
#else
typedef int amber_peak_avx512vnni_absent;
#endif
