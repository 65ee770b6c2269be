/* peak_ref.c: the peaks of plain C. */
#include "../peaks.h"

static int64_t dot(int64_t steps) {
    enum { N = 4096 };
    int8_t a[N] = {0}, b[N] = {0};
    int32_t sum = 0;
    for (int64_t s = 0; s < steps; s++) {
        __asm__ volatile("" : : "r"(a), "r"(b) : "memory"); /* as if the arrays were new */
        for (int i = 0; i < N; i++) sum += a[i] * b[i];
    }
    __asm__ volatile("" : : "r"(sum));
    return 2 * N * steps;
}

static uint64_t read_bytes(const void *p, size_t bytes) {
    return peak_read_streams(p, bytes);
}

const struct amber_peak amber_peak_ref = {"ref", dot, read_bytes};
