/* dequant_iq.h: the code-book types, for dequant.c's table, and what both files read blocks with. */
#ifndef AMBER_DEQUANT_IQ_H
#define AMBER_DEQUANT_IQ_H

#include <stdint.h>
#include <string.h>

#define SUPER 256 /* values of a super-block */

static inline uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* src: n / 256 super-blocks, any alignment; dst [n] float32. */
void iq2_xxs_to_float(const void *src, float *dst, int64_t n);
void iq2_xs_to_float(const void *src, float *dst, int64_t n);
void iq2_s_to_float(const void *src, float *dst, int64_t n);
void iq3_xxs_to_float(const void *src, float *dst, int64_t n);
void iq3_s_to_float(const void *src, float *dst, int64_t n);
void iq1_s_to_float(const void *src, float *dst, int64_t n);
void iq1_m_to_float(const void *src, float *dst, int64_t n);

#endif
