/* peaks.h: how fast this machine can multiply and read at best, per instruction set: the yardsticks
 * that measured speeds are held against. Not part of the operation table: no model uses them. */
#ifndef AMBER_PEAKS_H
#define AMBER_PEAKS_H

#include <stddef.h>
#include <stdint.h>

struct amber_peak {
    const char *isa;
    /* Runs `steps` rounds of the INT8 dot product of this instruction set on registers alone,
     * enough independent sums side by side to hide its latency. Returns the operations done; a
     * multiply and its addition count as two. */
    int64_t (*dot)(int64_t steps);
    /* Reads bytes (a multiple of 4096) from end to end. The result only keeps the loads alive. */
    uint64_t (*read)(const void *p, size_t bytes);
};

extern const struct amber_peak amber_peak_ref;
#if defined(__x86_64__)
extern const struct amber_peak amber_peak_avx2, amber_peak_avxvnni, amber_peak_avx512vnni,
    amber_peak_amx;
#elif defined(__aarch64__)
extern const struct amber_peak amber_peak_neon, amber_peak_i8mm;
#endif

/* Four pages side by side: hardware prefetchers follow one stream per page, and several streams
 * keep more loads in flight. The compiler widens the sums to the vectors of the including file. */
static inline uint64_t peak_read_streams(const void *p, size_t bytes) {
    const uint64_t *x = p;
    size_t n = bytes / sizeof *x / 4;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < n; i++) {
        a ^= x[i];
        b ^= x[n + i];
        c ^= x[2 * n + i];
        d ^= x[3 * n + i];
    }
    return a ^ b ^ c ^ d;
}

#endif
