/* peak_i8mm.c: USMMLA: 32 products in one instruction. */
#if defined(__aarch64__)
#include "../peaks.h"

#include <arm_neon.h>

static int64_t dot(int64_t steps) {
    uint8x16_t a = vdupq_n_u8(3);
    int8x16_t b = vdupq_n_s8(5);
    int32x4_t sum[16];
    /* Sums that the compiler must take for different, or it would compute one. */
#pragma GCC unroll 32
    for (int i = 0; i < 16; i++) {
        sum[i] = vdupq_n_s32(0);
        __asm__ volatile("" : "+w"(sum[i]));
    }
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 32
        for (int i = 0; i < 16; i++) sum[i] = vusmmlaq_s32(sum[i], a, b);
        __asm__ volatile("" : "+w"(a), "+w"(b));
    }
#pragma GCC unroll 32
    for (int i = 0; i < 16; i++) __asm__ volatile("" : : "w"(sum[i]));
    return steps * 16 * 32 * 2;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_i8mm = {"i8mm", dot, read_bytes};
#else
typedef int amber_peak_i8mm_absent;
#endif
