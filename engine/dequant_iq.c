/* dequant_iq.c: the code-book types IQ1, IQ2 and IQ3. A super-block holds 256 values; groups of 8
 * or 4 of them are rows of a code book, scaled by a few bits per 16 or 32 values, with a sign per
 * value.
 *
 * Facts: block layouts as the numpy dequantizers of the Python package `gguf` read them, which are
 * also the oracle of the tests; each value is formed by the same float32 operations. */
#include "dequant.h"
#include "dequant_iq.h"
#include "iq_grids.h"

#include <string.h>

static const float iq2_values[4] = {8, 25, 43, 0};
static const float iq3_xxs_values[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const float iq3_s_values[8] = {1, 3, 5, 7, 9, 11, 13, 15};
static const float iq1_values[4] = {-1, 0, 1, 0};
#define IQ1_DELTA 0.125f

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Seven stored signs; the eighth makes their number even. */
static uint8_t even_signs(uint32_t seven) {
    uint32_t parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return (uint8_t)(seven | (parity & 1) << 7);
}

/* dst[i] = scale * value * sign for the n entries of a code. */
static void put(float *dst, int n, int bits, uint32_t code, const float *values, float scale,
                uint32_t signs) {
    for (int i = 0; i < n; i++) {
        float v = scale * values[code >> (i * bits) & ((1u << bits) - 1)];
        dst[i] = signs >> i & 1 ? -v : v;
    }
}

void iq2_xxs_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 66) {
        float d = f32_from_f16(load_u16(block));
        for (int g = 0; g < 8; g++) {
            const uint8_t *p = block + 2 + 8 * g;
            uint32_t tail = load_u32(p + 4);
            float scale = d * (0.5f + (float)(tail >> 28)) * 0.25f;
            for (int i = 0; i < 4; i++)
                put(dst + at + 32 * g + 8 * i, 8, 2, iq2_xxs_grid[p[i]], iq2_values, scale,
                    even_signs(tail >> 7 * i & 127));
        }
    }
}

void iq2_xs_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 74) {
        float d = f32_from_f16(load_u16(block));
        const uint8_t *scales = block + 66;
        for (int i = 0; i < 32; i++) {
            uint32_t code = load_u16(block + 2 + 2 * i), half = (uint32_t)(i / 2);
            float scale = d * (0.5f + (float)(scales[half / 2] >> 4 * (half % 2) & 15)) * 0.25f;
            put(dst + at + 8 * i, 8, 2, iq2_xs_grid[code & 511], iq2_values, scale,
                even_signs(code >> 9));
        }
    }
}

void iq2_s_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 82) {
        float d = f32_from_f16(load_u16(block));
        const uint8_t *low = block + 2, *signs = block + 34, *high = block + 66,
                      *scales = block + 74;
        for (int i = 0; i < 32; i++) {
            uint32_t index = low[i] | (uint32_t)(high[i / 4] >> 2 * (i % 4) & 3) << 8;
            float scale = d * (0.5f + (float)(scales[i / 4] >> 4 * (i / 2 % 2) & 15)) * 0.25f;
            put(dst + at + 8 * i, 8, 2, iq2_s_grid[index], iq2_values, scale, signs[i]);
        }
    }
}

void iq3_xxs_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 98) {
        float d = f32_from_f16(load_u16(block));
        for (int g = 0; g < 8; g++) {
            const uint8_t *p = block + 2 + 8 * g;
            uint32_t tail = load_u32(block + 66 + 4 * g);
            float scale = d * (0.5f + (float)(tail >> 28)) * 0.5f;
            for (int i = 0; i < 8; i++)
                put(dst + at + 32 * g + 4 * i, 4, 3, iq3_xxs_grid[p[i]], iq3_xxs_values, scale,
                    even_signs(tail >> 7 * (i / 2) & 127) >> 4 * (i % 2));
        }
    }
}

void iq3_s_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 110) {
        float d = f32_from_f16(load_u16(block));
        const uint8_t *low = block + 2, *high = block + 66, *signs = block + 74,
                      *scales = block + 106;
        for (int i = 0; i < 64; i++) {
            uint32_t index = low[i] | (uint32_t)(high[i / 8] >> i % 8 & 1) << 8;
            float scale = d * (float)(1 + 2 * (scales[i / 16] >> 4 * (i / 8 % 2) & 15));
            put(dst + at + 4 * i, 4, 3, iq3_s_grid[index], iq3_s_values, scale,
                (uint32_t)signs[i / 2] >> 4 * (i % 2));
        }
    }
}

/* dst[i] = scale * (value + delta) for the 8 entries of an IQ1 code. */
static void put_iq1(float *dst, uint32_t code, float scale, float delta) {
    for (int i = 0; i < 8; i++) dst[i] = scale * (iq1_values[code >> 2 * i & 3] + delta);
}

void iq1_s_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 50) {
        float d = f32_from_f16(load_u16(block));
        for (int i = 0; i < 32; i++) {
            uint32_t tail = load_u16(block + 34 + 2 * (i / 4));
            uint32_t index = block[2 + i] | (tail >> 3 * (i % 4) & 7) << 8;
            float scale = d * (float)(2 * (tail >> 12 & 7) + 1);
            put_iq1(dst + at + 8 * i, iq1_grid[index], scale,
                    tail & 0x8000 ? -IQ1_DELTA : IQ1_DELTA);
        }
    }
}

void iq1_m_to_float(const void *src, float *dst, int64_t n) {
    const uint8_t *block = src;
    for (int64_t at = 0; at < n; at += SUPER, block += 56) {
        /* The float16 scale is dealt over the top four bits of the four scale words. */
        uint16_t words[4], half = 0;
        for (int i = 0; i < 4; i++) {
            words[i] = load_u16(block + 48 + 2 * i);
            half = (uint16_t)(half | (words[i] >> 12) << 4 * i);
        }
        float d = f32_from_f16(half);
        for (int i = 0; i < 32; i++) {
            uint32_t high = block[32 + i / 2] >> 4 * (i % 2) & 15u;
            uint32_t index = block[i] | (high & 7) << 8;
            float scale = d * (float)(2 * (words[i / 8] >> 3 * (i / 2 % 4) & 7) + 1);
            put_iq1(dst + at + 8 * i, iq1_grid[index], scale, high & 8 ? -IQ1_DELTA : IQ1_DELTA);
        }
    }
}
