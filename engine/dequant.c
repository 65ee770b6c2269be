/* dequant.c: tensor types of GGUF files and their exact float values.
 *
 * Facts (block layouts, code books): the GGUF specification and the numpy dequantizers of the
 * Python package `gguf`, which are also the oracle of the tests. Every value is one float32
 * multiplication, with at most one addition after it and no fused multiply-add, so the results are
 * those of the oracle bit for bit.
 *
 * Loops first unpack a block's codes into small byte arrays and then turn these into floats: both
 * steps have constant trip counts and no branches, which compilers turn into vector code. Source
 * blocks have any alignment and are read with memcpy. */
#include "dequant.h"
#include "dequant_iq.h"

#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF files are little-endian, and so must be the machine that reads them"
#endif

/* Contracting a*b+c would round once instead of twice and miss the oracle. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

static float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Branch-free, so that loops over it vectorize. The exponent bias goes from 15 to 127: + 112, and
 * + 112 again takes the exponent of infinity and NaN to 255. A subnormal m * 2^-24 is the
 * difference of (1 + m/1024) * 2^-14 and 2^-14, both normal, so a flush-to-zero mode cannot spoil
 * it. */
static inline float half_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, magnitude = (h & 0x7FFFu) << 13;
    uint32_t is_tiny = -(uint32_t)(magnitude < 0x0400u << 13);
    uint32_t is_special = -(uint32_t)(magnitude >= 0x7C00u << 13);
    uint32_t normal = magnitude + (112u << 23) + (is_special & 112u << 23);
    float difference = float_of_bits(magnitude + (113u << 23)) - 0x1p-14f;
    uint32_t tiny;
    memcpy(&tiny, &difference, 4);
    return float_of_bits((tiny & is_tiny) | (normal & ~is_tiny) | sign);
}

float f32_from_f16(uint16_t h) {
    return half_to_float(h);
}

uint16_t f16_from_f32(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x3FF)); /* quiet NaN */
    /* 65520 is half-way between the largest half, 65504, and the next step, 65536, which is even.
     */
    if (bits >= 0x477FF000) return sign | 0x7C00;
    if (bits >= 0x38800000) { /* 2^-14: a normal half */
        uint32_t even = bits >> 13 & 1;
        return (uint16_t)(sign | ((bits - (112u << 23) + 0xFFF + even) >> 13));
    }
    if (bits < 0x33000000) return sign; /* below 2^-25, half of the least subnormal */
    uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
    uint32_t shift = 126 - (bits >> 23); /* 14..24: value = mantissa * 2^-(24 + shift) */
    uint32_t half_step = 1u << (shift - 1), even = mantissa >> shift & 1;
    return (uint16_t)(sign | ((mantissa + half_step - 1 + even) >> shift));
}

static float load_half(const uint8_t *p) {
    return half_to_float(load_u16(p));
}

/* Eight bytes, byte i being 1 where bit i of `bits` is set. The product copies the byte eight times
 * and the mask leaves one bit in each copy; adding 0x7F carries any of them into bit 7. */
static inline uint64_t spread_bits(uint8_t bits) {
    uint64_t one_each = bits * UINT64_C(0x0101010101010101) & UINT64_C(0x8040201008040201);
    return (one_each + UINT64_C(0x7F7F7F7F7F7F7F7F)) >> 7 & UINT64_C(0x0101010101010101);
}

/* ---- plain types ---- */

static void f32_to_float(const void *src, float *dst, int64_t n) {
    memcpy(dst, src, (size_t)n * sizeof(float));
}

static void f16_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t i = 0; i < n; i++) dst[i] = half_to_float(load_u16(p + 2 * i));
}

static void bf16_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t i = 0; i < n; i++) dst[i] = float_of_bits((uint32_t)load_u16(p + 2 * i) << 16);
}

static void i8_to_float(const void *src, float *restrict dst, int64_t n) {
    const int8_t *p = src;
    for (int64_t i = 0; i < n; i++) dst[i] = (float)p[i];
}

/* ---- blocks of 32: one scale, and a minimum in the _1 types ---- */

/* half d, int8 q[32]: d * q */
static void q8_0_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 34, dst += 32) {
        float d = load_half(p);
        const int8_t *q = (const int8_t *)(p + 2);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)q[i];
    }
}

/* Value i of a 4-bit block of 32 is the low half of byte i, value 16 + i its high half. */
static inline void unpack_nibbles(const uint8_t *restrict q, uint8_t *restrict codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = q[i] & 15;
        codes[16 + i] = q[i] >> 4;
    }
}

/* half d, nibbles: d * (q - 8) */
static void q4_0_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 18, dst += 32) {
        float d = load_half(p);
        uint8_t codes[32];
        unpack_nibbles(p + 2, codes);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)(codes[i] - 8);
    }
}

/* half d, half m, nibbles: d * q + m */
static void q4_1_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 20, dst += 32) {
        float d = load_half(p), m = load_half(p + 2);
        uint8_t codes[32];
        unpack_nibbles(p + 4, codes);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)codes[i] + m;
    }
}

/* Nibbles with a fifth bit each from a 32-bit word. */
static inline void unpack_5bit(const uint8_t *high, const uint8_t *q, uint8_t *restrict codes) {
    uint8_t fifth[32];
    for (int i = 0; i < 4; i++) {
        uint64_t bits = spread_bits(high[i]) << 4;
        memcpy(fifth + 8 * i, &bits, 8);
    }
    unpack_nibbles(q, codes);
    for (int i = 0; i < 32; i++) codes[i] |= fifth[i];
}

/* half d, u32 fifth bits, nibbles: d * (q - 16) */
static void q5_0_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 22, dst += 32) {
        float d = load_half(p);
        uint8_t codes[32];
        unpack_5bit(p + 2, p + 6, codes);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)(codes[i] - 16);
    }
}

/* half d, half m, u32 fifth bits, nibbles: d * q + m */
static void q5_1_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 24, dst += 32) {
        float d = load_half(p), m = load_half(p + 2);
        uint8_t codes[32];
        unpack_5bit(p + 4, p + 8, codes);
        for (int i = 0; i < 32; i++) dst[i] = d * (float)codes[i] + m;
    }
}

/* ---- K-quants: 256 values, scales of 16 or 32 values quantized in their turn ---- */

/* u8 scale (low) and minimum (high) [16], 2-bit q[64], half d, half dmin. Bits 2k of the 32 bytes
 * of a half are values 32k..32k+31 of its 128. */
static void q2_k_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 84) {
        const uint8_t *scales = p, *q = p + 16;
        float d = load_half(p + 80), dmin = load_half(p + 82);
        for (int g = 0; g < 16; g++, dst += 16) {
            float scale = d * (float)(scales[g] & 15), low = dmin * (float)(scales[g] >> 4);
            const uint8_t *from = q + 32 * (g / 8) + 16 * (g & 1);
            int shift = 2 * (g / 2 & 3);
            for (int i = 0; i < 16; i++) dst[i] = scale * (float)(from[i] >> shift & 3) - low;
        }
    }
}

/* Third bits [32] (bit k: values 32k.., set means no offset), 2-bit q[64] as in Q2_K, 6-bit scales
 * [12 bytes: 16 low nibbles, then 16 pairs of high bits], half d: d * (scale - 32) * (q - 4 or q).
 */
static void q3_k_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 110) {
        const uint8_t *third = p, *q = p + 32, *packed = p + 96;
        float d = load_half(p + 108);
        for (int g = 0; g < 16; g++, dst += 16) {
            int low = packed[g & 7] >> (g < 8 ? 0 : 4) & 15;
            int high = packed[8 + (g & 3)] >> 2 * (g / 4) & 3;
            float scale = d * (float)((low | high << 4) - 32);
            const uint8_t *from = q + 32 * (g / 8) + 16 * (g & 1), *bit = third + 16 * (g & 1);
            int shift = 2 * (g / 2 & 3), bit_shift = g / 2;
            for (int i = 0; i < 16; i++) {
                int code = (from[i] >> shift & 3) + (bit[i] >> bit_shift & 1) * 4 - 4;
                dst[i] = scale * (float)code;
            }
        }
    }
}

/* The 12 bytes of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits. Bytes 0-3 and 4-7 hold the first
 * four of each in their low bits and the high bits of the last four on top; 8-11 hold the rest. */
static inline void unpack_k_scales(const uint8_t *packed, uint8_t *scales, uint8_t *minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = packed[i] & 63;
        minima[i] = packed[4 + i] & 63;
        scales[4 + i] = (uint8_t)((packed[8 + i] & 15) | (packed[i] >> 6) << 4);
        minima[4 + i] = (uint8_t)(packed[8 + i] >> 4 | (packed[4 + i] >> 6) << 4);
    }
}

/* half d, half dmin, 12 scale bytes, nibbles [128]: low halves of 32 bytes, then high halves. */
static void q4_k_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 144) {
        float d = load_half(p), dmin = load_half(p + 2);
        uint8_t scales[8], minima[8];
        unpack_k_scales(p + 4, scales, minima);
        for (int g = 0; g < 8; g += 2, dst += 64) {
            const uint8_t *q = p + 16 + 16 * g;
            float scale0 = d * (float)scales[g], low0 = dmin * (float)minima[g];
            float scale1 = d * (float)scales[g + 1], low1 = dmin * (float)minima[g + 1];
            for (int i = 0; i < 32; i++) dst[i] = scale0 * (float)(q[i] & 15) - low0;
            for (int i = 0; i < 32; i++) dst[32 + i] = scale1 * (float)(q[i] >> 4) - low1;
        }
    }
}

/* As Q4_K with fifth bits [32] before the nibbles: bit k belongs to values 32k..32k+31. */
static void q5_k_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 176) {
        float d = load_half(p), dmin = load_half(p + 2);
        const uint8_t *fifth = p + 16;
        uint8_t scales[8], minima[8];
        unpack_k_scales(p + 4, scales, minima);
        for (int g = 0; g < 8; g++, dst += 32) {
            const uint8_t *q = p + 48 + 32 * (g / 2);
            float scale = d * (float)scales[g], low = dmin * (float)minima[g];
            int shift = 4 * (g & 1);
            for (int i = 0; i < 32; i++) {
                int code = (q[i] >> shift & 15) | (fifth[i] >> g & 1) << 4;
                dst[i] = scale * (float)code - low;
            }
        }
    }
}

/* Low nibbles [128], high bit pairs [64], int8 scales [16], half d: d * scale * (q - 32). Of each
 * 128 values the first 64 are the low halves of 64 bytes, the others the high halves; bits 2k of
 * the 32 high bytes belong to values 32k..32k+31. */
static void q6_k_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 210) {
        const int8_t *scales = (const int8_t *)(p + 192);
        float d = load_half(p + 208);
        for (int g = 0; g < 16; g++, dst += 16) {
            float scale = d * (float)scales[g];
            const uint8_t *low = p + 64 * (g / 8) + 16 * (g & 3);
            const uint8_t *high = p + 128 + 32 * (g / 8) + 16 * (g & 1);
            int low_shift = 4 * (g / 4 & 1), high_shift = 2 * (g / 2 & 3);
            for (int i = 0; i < 16; i++) {
                int code = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
                dst[i] = scale * (float)(code - 32);
            }
        }
    }
}

/* ---- code books ---- */

/* The 16 levels of the IQ4 types. */
static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};
/* FP4 E2M1 times two (OCP Microscaling Formats specification 1.0, section 5.3.3). */
static const int8_t fp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2 * half nibbles, low halves first, through a book of levels. */
static inline void nibbles_by_book(const int8_t *levels, float d, const uint8_t *q, int half,
                                   float *restrict dst) {
    float book[16];
    for (int i = 0; i < 16; i++) book[i] = d * (float)levels[i];
    for (int i = 0; i < half; i++) dst[i] = book[q[i] & 15];
    for (int i = 0; i < half; i++) dst[half + i] = book[q[i] >> 4];
}

/* half d, nibbles [16]: d * level */
static void iq4_nl_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 18, dst += 32) {
        nibbles_by_book(iq4_levels, load_half(p), p + 2, 16, dst);
    }
}

/* half d, u16 high bit pairs of 8 scales, low nibbles of 8 scales [4], nibbles [128]:
 * d * (scale - 32) * level */
static void iq4_xs_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 136) {
        float d = load_half(p);
        int high = load_u16(p + 2);
        for (int g = 0; g < 8; g++, dst += 32) {
            int scale = (p[4 + g / 2] >> 4 * (g & 1) & 15) | (high >> 2 * g & 3) << 4;
            nibbles_by_book(iq4_levels, d * (float)(scale - 32), p + 8 + 16 * g, 16, dst);
        }
    }
}

/* u8 exponent, nibbles [16]: 2^(e - 128) * doubled FP4 */
static void mxfp4_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 32; b++, p += 17, dst += 32) {
        /* 2^-128 and 2^-127 are subnormal: no exponent field holds them. */
        uint32_t bits = p[0] < 2 ? (uint32_t)0x00200000 << p[0] : (uint32_t)(p[0] - 1) << 23;
        nibbles_by_book(fp4_levels, float_of_bits(bits), p + 1, 16, dst);
    }
}

/* Unsigned E4M3 (bias 7) [4], nibbles [32]: each scale serves 16 values, low halves of 8 bytes
 * first. 0x7F would be NaN and reads as 0. Halved, because the FP4 levels are doubled. */
static void nvfp4_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / 64; b++, p += 36) {
        for (int g = 0; g < 4; g++, dst += 16) {
            uint32_t exponent = p[g] >> 3 & 15, mantissa = p[g] & 7;
            float normal = float_of_bits((exponent + 119) << 23 | mantissa << 20);
            float d = exponent ? normal : (float)mantissa * 0x1p-10f;
            if (p[g] == 0x7F) d = 0;
            nibbles_by_book(fp4_levels, d, p + 4 + 8 * g, 8, dst);
        }
    }
}

/* ---- ternary types: d * -1, 0 or 1 ---- */

/* A byte holds five base-3 digits as a fraction of 256: multiplied by 3^k (modulo 256) the next
 * digit is the integer part of three times it. */
static inline void ternary_digits(const uint8_t *q, int count, int digits, float d,
                                  float *restrict dst) {
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    for (int k = 0; k < digits; k++) {
        for (int i = 0; i < count; i++) {
            uint8_t fraction = (uint8_t)(q[i] * powers[k]);
            dst[k * count + i] = d * (float)((fraction * 3 >> 8) - 1);
        }
    }
}

/* Five digits a byte [48], in runs of 32 and 16 bytes, four digits a byte [4], half d. */
static void tq1_0_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 54, dst += SUPER) {
        float d = load_half(p + 52);
        ternary_digits(p, 32, 5, d, dst);
        ternary_digits(p + 32, 16, 5, d, dst + 160);
        ternary_digits(p + 48, 4, 4, d, dst + 240);
    }
}

/* 2-bit q[64] as in Q2_K, half d. */
static void tq2_0_to_float(const void *src, float *restrict dst, int64_t n) {
    const uint8_t *p = src;
    for (int64_t b = 0; b < n / SUPER; b++, p += 66) {
        float d = load_half(p + 64);
        for (int g = 0; g < 8; g++, dst += 32) {
            const uint8_t *q = p + 32 * (g / 4);
            int shift = 2 * (g & 3);
            for (int i = 0; i < 32; i++) dst[i] = d * (float)((q[i] >> shift & 3) - 1);
        }
    }
}

/* ---- the table ---- */

/* Numbers 4, 5, 31-33 and 36-38 were withdrawn; Q8_1 exists only inside computations, and its
 * stored size is not agreed upon. Their sizes stay unknown (0). */
static const struct type_info types[] = {
    {TYPE_F32, "F32", 1, 4, f32_to_float},
    {TYPE_F16, "F16", 1, 2, f16_to_float},
    {TYPE_Q4_0, "Q4_0", 32, 18, q4_0_to_float},
    {TYPE_Q4_1, "Q4_1", 32, 20, q4_1_to_float},
    {4, "Q4_2", 0, 0, NULL},
    {5, "Q4_3", 0, 0, NULL},
    {TYPE_Q5_0, "Q5_0", 32, 22, q5_0_to_float},
    {TYPE_Q5_1, "Q5_1", 32, 24, q5_1_to_float},
    {TYPE_Q8_0, "Q8_0", 32, 34, q8_0_to_float},
    {9, "Q8_1", 0, 0, NULL},
    {TYPE_Q2_K, "Q2_K", SUPER, 84, q2_k_to_float},
    {TYPE_Q3_K, "Q3_K", SUPER, 110, q3_k_to_float},
    {TYPE_Q4_K, "Q4_K", SUPER, 144, q4_k_to_float},
    {TYPE_Q5_K, "Q5_K", SUPER, 176, q5_k_to_float},
    {TYPE_Q6_K, "Q6_K", SUPER, 210, q6_k_to_float},
    {15, "Q8_K", SUPER, 292, NULL},
    {16, "IQ2_XXS", SUPER, 66, iq2_xxs_to_float},
    {17, "IQ2_XS", SUPER, 74, iq2_xs_to_float},
    {18, "IQ3_XXS", SUPER, 98, iq3_xxs_to_float},
    {19, "IQ1_S", SUPER, 50, iq1_s_to_float},
    {TYPE_IQ4_NL, "IQ4_NL", 32, 18, iq4_nl_to_float},
    {21, "IQ3_S", SUPER, 110, iq3_s_to_float},
    {22, "IQ2_S", SUPER, 82, iq2_s_to_float},
    {TYPE_IQ4_XS, "IQ4_XS", SUPER, 136, iq4_xs_to_float},
    {TYPE_I8, "I8", 1, 1, i8_to_float},
    {25, "I16", 1, 2, NULL},
    {26, "I32", 1, 4, NULL},
    {27, "I64", 1, 8, NULL},
    {28, "F64", 1, 8, NULL},
    {29, "IQ1_M", SUPER, 56, iq1_m_to_float},
    {TYPE_BF16, "BF16", 1, 2, bf16_to_float},
    {31, "Q4_0_4_4", 0, 0, NULL},
    {32, "Q4_0_4_8", 0, 0, NULL},
    {33, "Q4_0_8_8", 0, 0, NULL},
    {34, "TQ1_0", SUPER, 54, tq1_0_to_float},
    {35, "TQ2_0", SUPER, 66, tq2_0_to_float},
    {36, "IQ4_NL_4_4", 0, 0, NULL},
    {37, "IQ4_NL_4_8", 0, 0, NULL},
    {38, "IQ4_NL_8_8", 0, 0, NULL},
    {39, "MXFP4", 32, 17, mxfp4_to_float},
    {40, "NVFP4", 64, 36, nvfp4_to_float},
    {41, "Q1_0", 128, 18, NULL},
};

const struct type_info *type_info(uint32_t type) {
    /* The numbers have no gaps, so a type's number is its place. */
    return type < sizeof types / sizeof types[0] ? &types[type] : NULL;
}

uint64_t type_row_bytes(uint32_t type, uint64_t n) {
    const struct type_info *info = type_info(type);
    if (!info || !info->block_bytes || n % info->block_values) return 0;
    uint64_t blocks = n / info->block_values;
    return blocks <= UINT64_MAX / info->block_bytes ? blocks * info->block_bytes : 0;
}
