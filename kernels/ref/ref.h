/* ref.h: the scalar column's functions, for its table and for columns that inherit single ones. */
#ifndef AMBER_REF_H
#define AMBER_REF_H

#include "../f16.h"
#include "../kernels.h"

void amber_rmsnorm_ref(float *y, const float *x, const float *weight, int n, float eps);
void amber_layernorm_ref(float *y, const float *x, const float *weight, const float *bias, int n,
                         float eps);
void amber_silu_mul_ref(float *y, const float *gate, const float *up, int n);
void amber_gelu_mul_ref(float *y, const float *gate, const float *up, int n);
void amber_relu2_mul_ref(float *y, const float *gate, const float *up, int n);
void amber_swiglu_clamped_ref(float *y, const float *gate, const float *up, int n);
void amber_rope_ref(float *x, const float *cos, const float *sin, int n_rot, bool halves);
void amber_f16_from_f32_ref(uint16_t *y, const float *x, int n);
void amber_quantize_row_ref(int8_t *q, float *scale, int32_t *sum, const float *x, int n,
                            int k_pad);
void amber_gemm_w8a8_ref(const struct amber_gemm_w8a8 *g, int panel0, int panel1);
void amber_gemm_f32_ref(const struct amber_gemm_f32 *g, int out0, int out1);
int amber_attention_units_ref(const struct amber_attention *a);
void amber_attention_ref(const struct amber_attention *a, int unit0, int unit1, void *scratch);

#endif
