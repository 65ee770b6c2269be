/* dequant_iq.h: the code-book types, for dequant.c's table. */
#ifndef AMBER_DEQUANT_IQ_H
#define AMBER_DEQUANT_IQ_H

#include <stdint.h>

/* src: n / 256 super-blocks, any alignment; dst [n] float32. */
void iq2_xxs_to_float(const void *src, float *dst, int64_t n);
void iq2_xs_to_float(const void *src, float *dst, int64_t n);
void iq2_s_to_float(const void *src, float *dst, int64_t n);
void iq3_xxs_to_float(const void *src, float *dst, int64_t n);
void iq3_s_to_float(const void *src, float *dst, int64_t n);
void iq1_s_to_float(const void *src, float *dst, int64_t n);
void iq1_m_to_float(const void *src, float *dst, int64_t n);

#endif
