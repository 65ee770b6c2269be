/* columns.h: the vector columns' functions, as dispatch.c puts them into the table. Nothing here
 * may be called before cpuid.c has found the instructions. */
#ifndef AMBER_COLUMNS_H
#define AMBER_COLUMNS_H

#include "../kernels.h"

#define AMBER_ROW_OPERATIONS(isa)                                                                  \
    void amber_rmsnorm_##isa(float *y, const float *x, const float *weight, int n, float eps);     \
    void amber_layernorm_##isa(float *y, const float *x, const float *weight, const float *bias,   \
                               int n, float eps);                                                  \
    void amber_silu_mul_##isa(float *y, const float *gate, const float *up, int n);                \
    void amber_gelu_mul_##isa(float *y, const float *gate, const float *up, int n);                \
    void amber_relu2_mul_##isa(float *y, const float *gate, const float *up, int n);               \
    void amber_swiglu_clamped_##isa(float *y, const float *gate, const float *up, int n);          \
    void amber_rope_##isa(float *x, const float *cos, const float *sin, int n_rot, bool halves);   \
    void amber_f16_from_f32_##isa(uint16_t *y, const float *x, int n);                             \
    void amber_quantize_row_##isa(int8_t *q, float *scale, int32_t *sum, const float *x, int n,    \
                                  int k_pad);                                                      \
    void amber_gemm_f32_##isa(const struct amber_gemm_f32 *g, int out0, int out1);                 \
    int amber_attention_units_##isa(const struct amber_attention *a);                              \
    void amber_attention_##isa(const struct amber_attention *a, int unit0, int unit1, void *scratch)

#define AMBER_GEMM_W8A8(isa)                                                                       \
    void amber_gemm_w8a8_##isa(const struct amber_gemm_w8a8 *g, int panel0, int panel1)

/* Bytes of scratch of every vector attention: 64 keys and values in float32, queries and sums
 * (64 KB each), and small change; see attention_body.h. */
#define AMBER_ATTENTION_SCRATCH (2 * 64 * AMBER_HEAD_MAX * 4 + 2 * 65536 + 16384)

#if defined(__x86_64__)
AMBER_ROW_OPERATIONS(avx2);
AMBER_ROW_OPERATIONS(avx512vnni);
AMBER_GEMM_W8A8(avx2);
AMBER_GEMM_W8A8(avxvnni);
AMBER_GEMM_W8A8(avx512vnni);
AMBER_GEMM_W8A8(amx);
#elif defined(__aarch64__)
AMBER_ROW_OPERATIONS(neon);
AMBER_GEMM_W8A8(neon);
AMBER_GEMM_W8A8(i8mm);
#endif

#endif
