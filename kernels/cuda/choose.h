/* choose.h: which channels survive, for the forms that sparse tensor cores run, and how survivors
 * are quantized and packed. Inline C for host and device; the choice is that of sparse.h bit for bit
 * (kernels/ref/sparse_ref.c is the oracle), so every operation is rounded by itself: compile without
 * contraction.
 *
 * A producer's unit of work is 32 neighbouring channels of one row: two lanes' worth of a fragment
 * (layout.h), the longest relief window, and four whole words of compressed values. */
#ifndef AMBER_CUDA_CHOOSE_H
#define AMBER_CUDA_CHOOSE_H

#include "layout.h"

#include <math.h>

#define CHOOSE_WIDTH 32

/* What 32 channels keep. A channel that went into a window is not in base. */
struct choice {
    uint32_t base;        /* bit per channel */
    uint8_t window[2][2]; /* [which][16 channels]; r32: [0][0] only. Bit i: the window's member i */
};

AMBER_HD float choose_ordered(float score) {
    return score == score ? score : INFINITY;
}

/* Bits of the two largest of four; ties go to the lower index. */
AMBER_HD unsigned choose_two(float a, float b, float c, float d) {
    /* x beats y where it is not smaller: x stands before y. */
    int ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
    int wins_a = ab + ac + ad, wins_b = 1 - ab + bc + bd;
    int wins_c = 2 - ac - bc + cd, wins_d = 3 - ad - bd - cd;
    return (unsigned)(wins_a >= 2) | (unsigned)(wins_b >= 2) << 1 | (unsigned)(wins_c >= 2) << 2 |
           (unsigned)(wins_d >= 2) << 3;
}
/* Bits 1..3 of the two largest of b, c, d. */
AMBER_HD unsigned choose_two_of_three(float b, float c, float d) {
    int bc = b >= c, bd = b >= d, cd = c >= d;
    return (unsigned)(bc + bd >= 1) << 1 | (unsigned)(1 - bc + cd >= 1) << 2 |
           (unsigned)(2 - bd - cd >= 1) << 3;
}
AMBER_HD float choose_third(float a, float b, float c, float d) {
    float high_ab = a >= b ? a : b, low_ab = a >= b ? b : a;
    float high_cd = c >= d ? c : d, low_cd = c >= d ? d : c;
    /* The third largest is the larger low, or the smaller high where both of one pair lead. */
    float low = low_ab >= low_cd ? low_ab : low_cd, high = high_ab >= high_cd ? high_cd : high_ab;
    return low >= high ? high : low;
}
AMBER_HD float choose_smaller(float a, float b) {
    return a <= b ? a : b;
}

/* One window over four groups of four energies each, `step` floats from group to group. Sets the
 * window's bits and returns the four groups' nibbles without what the window took. */
AMBER_HD unsigned choose_window(const float *e, int step, unsigned *window) {
    float gain[4];
    AMBER_UNROLL
    for (int g = 0; g < 4; g++) {
        const float *x = e + g * step;
        gain[g] = choose_smaller(x[0], choose_third(x[0], x[1], x[2], x[3]));
    }
    unsigned relieved = choose_two(gain[0], gain[1], gain[2], gain[3]), kept = 0;
    AMBER_UNROLL
    for (int g = 0; g < 4; g++) {
        const float *x = e + g * step;
        unsigned three = choose_two_of_three(x[1], x[2], x[3]);
        unsigned four = choose_two(x[0], x[1], x[2], x[3]);
        kept |= (relieved >> g & 1 ? three : four) << (4 * g);
    }
    *window = relieved;
    return kept;
}

/* The eight largest of 16; ties go to the lower index. */
AMBER_HD unsigned choose_eight(const float *s) {
    int wins[16];
    unsigned kept = 0;
    AMBER_UNROLL
    for (int i = 0; i < 16; i++) wins[i] = 0;
    AMBER_UNROLL
    for (int i = 0; i < 16; i++) {
        AMBER_UNROLL
        for (int j = i + 1; j < 16; j++) {
            int first = s[i] >= s[j];
            wins[i] += first;
            wins[j] += 1 - first;
        }
        kept |= (unsigned)(wins[i] >= 8) << i;
    }
    return kept;
}

/* Any 8 of 16 fit: a group of three sends channel 0, or where it does not keep that, channel 1 into a
 * window; a group of four sends both. At most two groups have more than two, a window holds two. */
AMBER_HD unsigned choose_spill(unsigned kept, unsigned *first, unsigned *second) {
    *first = *second = 0;
    AMBER_UNROLL
    for (int g = 0; g < 4; g++) {
        unsigned four = kept >> (4 * g) & 15;
        int count = (int)((four & 1) + (four >> 1 & 1) + (four >> 2 & 1) + (four >> 3));
        if (count < 3) continue;
        if (four & 1) {
            *first |= 1u << g;
            kept &= ~(1u << (4 * g));
        }
        if (count == 4 || !(four & 1)) {
            *second |= 1u << g;
            kept &= ~(2u << (4 * g));
        }
    }
    return kept;
}

/* z [32]: the row's values; f [32]: channel factors, or NULL. */
AMBER_HD void choose_32(int form, const float *z, const float *f, struct choice *out) {
    float s[CHOOSE_WIDTH];
    AMBER_UNROLL
    for (int k = 0; k < CHOOSE_WIDTH; k++) {
        float v = f ? z[k] * f[k] : z[k];
        s[k] = choose_ordered(form == FORM_R16 || form == FORM_R32 ? v * v : fabsf(v));
    }
    out->window[0][0] = out->window[0][1] = out->window[1][0] = out->window[1][1] = 0;
    out->base = 0;
    if (form == FORM_24) {
        AMBER_UNROLL
        for (int g = 0; g < 8; g++)
            out->base |= choose_two(s[4 * g], s[4 * g + 1], s[4 * g + 2], s[4 * g + 3]) << (4 * g);
    } else if (form == FORM_R16) {
        unsigned window;
        AMBER_UNROLL
        for (int half = 0; half < 2; half++) {
            out->base |= choose_window(s + 16 * half, 4, &window) << (16 * half);
            out->window[0][half] = (uint8_t)window;
        }
    } else if (form == FORM_R32) {
        unsigned window, kept = choose_window(s, 8, &window);
        AMBER_UNROLL
        for (int g = 0; g < 4; g++) {
            const float *x = s + 8 * g + 4;
            out->base |= ((kept >> (4 * g) & 15) | choose_two(x[0], x[1], x[2], x[3]) << 4)
                         << (8 * g);
        }
        out->window[0][0] = (uint8_t)window;
    } else {
        unsigned first, second;
        AMBER_UNROLL
        for (int half = 0; half < 2; half++) {
            out->base |= choose_spill(choose_eight(s + 16 * half), &first, &second) << (16 * half);
            out->window[0][half] = (uint8_t)first;
            out->window[1][half] = (uint8_t)second;
        }
    }
}

/* All bits of a choice, windows spread back to their channels. */
AMBER_HD uint32_t choose_kept(int form, const struct choice *c) {
    uint32_t kept = c->base;
    int step = form == FORM_R32 ? 8 : 4;
    AMBER_UNROLL
    for (int g = 0; g < 4; g++) {
        kept |= (uint32_t)(c->window[0][0] >> g & 1) << (step * g);
        if (form == FORM_R32) continue;
        kept |= (uint32_t)(c->window[0][1] >> g & 1) << (16 + step * g);
        kept |= (uint32_t)(c->window[1][0] >> g & 1) << (step * g + 1);
        kept |= (uint32_t)(c->window[1][1] >> g & 1) << (16 + step * g + 1);
    }
    return kept;
}

/* ---- quantizing ---- */

AMBER_HD uint32_t quantize_bits(float x) {
    union {
        float f;
        uint32_t u;
    } v = {x};
    return v.u & 0x7fffffffu;
}

/* From the largest magnitude's bits: the row's scale, and the factor of its values (0: all become 0).
 * The rules are those of quantize_row in kernels.h. */
AMBER_HD float quantize_scale(uint32_t largest, float *factor) {
    union {
        uint32_t u;
        float f;
    } v = {largest};
    float inverse = 127.0f / v.f;
    *factor = 0;
    if (largest >= 0x7f800000u) return NAN;
    if (inverse > 3.4028234664e38f) return 0;
    *factor = inverse;
    return v.f / 127.0f;
}

/* round-half-even(x * factor) as a byte; |x * factor| <= 127 for finite rows. Adding 1.5 * 2^23
 * rounds to an integer in the low bits. A factor of 0 gives 0 whatever x is. */
AMBER_HD uint32_t quantize_byte(float x, float factor) {
    union {
        float f;
        uint32_t u;
    } v = {x * factor + 12582912.0f};
    return factor != 0 ? v.u & 0xff : 0;
}

/* ---- packing ---- */

/* Two bytes and a nibble of a slot that keeps at most two of four. Free places are filled up with the
 * lowest others, as zeros. bits: what is kept; q: the four bytes, lowest first. */
AMBER_HD uint32_t pack_slot(unsigned bits, uint32_t q, uint32_t *nibble) {
    unsigned filled = bits;
    unsigned many = (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3 & 1);
    unsigned lowest = ~bits & (bits + 1); /* lowest place that is free */
    if (many < 2) filled |= lowest;
    lowest = ~filled & (filled + 1);
    if (many < 1) filled |= lowest;
    unsigned first = filled & 1 ? 0 : filled & 2 ? 1 : 2;
    unsigned second = filled & 8 ? 3 : filled & 4 ? 2 : 1;
    uint32_t low = bits >> first & 1 ? q >> (8 * first) & 0xff : 0;
    uint32_t high = bits >> second & 1 ? q >> (8 * second) & 0xff : 0;
    *nibble = first | second << 2;
    return low | high << 8;
}

/* 32 channels of a row at channel k0 (a multiple of 32), compressed: word[i] are slots
 * frag_slot(k0 + 4 i) and the next, meta[h] the nibbles of slots 8 h .. 8 h + 7 that belong to these
 * channels (their byte positions hold nothing else). q [8]: the quantized values, four to a word. */
struct packed32 {
    uint32_t word[4]; /* slots (4 i + 2 m, 4 i + 2 m + 1), m = k0 / 32 % 2 */
    uint32_t meta[2];
};

AMBER_HD void pack_32(const struct choice *c, const uint32_t *q, int m, struct packed32 *out) {
    out->meta[0] = out->meta[1] = 0;
    AMBER_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t low, high;
        uint32_t first = pack_slot(c->base >> (4 * i) & 15, q[i], &low);
        uint32_t second = pack_slot(c->base >> (16 + 4 * i) & 15, q[4 + i], &high);
        out->word[i] = first | second << 16;
        out->meta[i / 2] |= (low | high << 4) << (16 * (i % 2) + 8 * m);
    }
}

/* A window's slot: byte `byte` of every step-th word of q. */
AMBER_HD uint32_t pack_window(unsigned bits, const uint32_t *q, int step, int byte,
                              uint32_t *nibble) {
    uint32_t members = 0;
    AMBER_UNROLL
    for (int i = 0; i < 4; i++) members |= (q[i * step] >> (8 * byte) & 0xff) << (8 * i);
    return pack_slot(bits, members, nibble);
}

#endif
