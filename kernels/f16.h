/* f16.h: IEEE 754 binary16 bits to and from float32 in integer arithmetic, round half to even. NaNs
 * stay NaN; values beyond the float16 range become infinities, as in F16C. */
#ifndef AMBER_F16_H
#define AMBER_F16_H

#include <stdint.h>
#include <string.h>

static inline float f32_from_f16_bits(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023,
             bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else { /* subnormal: fraction * 2^-24, exact in float32 */
        float v = (float)fraction * 0x1p-24f;
        memcpy(&bits, &v, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t f16_bits_from_f32(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) /* quiet NaN, upper payload kept */
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (magnitude < 0x38800000) { /* below 2^-14: a multiple of 2^-24, rounded by the adder */
        float v;
        memcpy(&v, &magnitude, 4);
        v += 0.5f; /* one ulp of 0.5..1 is 2^-24 */
        memcpy(&bits, &v, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

#endif
