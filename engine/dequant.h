/* dequant.h: tensor types of GGUF files and their exact float values. */
#ifndef AMBER_DEQUANT_H
#define AMBER_DEQUANT_H

#include "common.h"

/* Type numbers as the GGUF specification assigns them. */
/* clang-format off */
enum tensor_type {
    TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7,
    TYPE_Q8_0 = 8, TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14,
    TYPE_IQ4_NL = 20, TYPE_IQ4_XS = 23, TYPE_I8 = 24, TYPE_BF16 = 30,
};
/* clang-format on */

struct type_info {
    uint32_t type;
    const char *name;      /* "Q4_K" */
    uint32_t block_values; /* values of one block: a row's length is a multiple of it */
    uint32_t block_bytes;  /* 0: the size is unknown to this version */
    /* src: n / block_values blocks, any alignment; dst [n] float32. NULL: cannot be read as floats.
     */
    void (*to_float)(const void *src, float *dst, int64_t n);
};

/* Every type number of the specification has a name here, also those that Amber cannot read
 * (to_float NULL), so that a message can name them; NULL for a number nobody assigned. */
const struct type_info *type_info(uint32_t type);

/* Bytes of a row of n values; 0 where n is not a multiple of the block or the type is unknown. */
uint64_t type_row_bytes(uint32_t type, uint64_t n);

float f32_from_f16(uint16_t h);
uint16_t f16_from_f32(float f); /* round to nearest even; overflow to infinity */

#endif
