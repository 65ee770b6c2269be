/* table_ref.c: the scalar column. */
#include "ref.h"

bool amber_kernels_ref(struct amber_kernels *k) {
    *k = (struct amber_kernels){
        .isa = "ref",
        .rmsnorm = amber_rmsnorm_ref,
        .layernorm = amber_layernorm_ref,
        .silu_mul = amber_silu_mul_ref,
        .gelu_mul = amber_gelu_mul_ref,
        .relu2_mul = amber_relu2_mul_ref,
        .swiglu_clamped = amber_swiglu_clamped_ref,
        .rope = amber_rope_ref,
        .f16_from_f32 = amber_f16_from_f32_ref,
        .prune = amber_prune_ref,
        .quantize_row = amber_quantize_row_ref,
        .gemm_w8a8 = amber_gemm_w8a8_ref,
        .gemm_f32 = amber_gemm_f32_ref,
        .attention_units = amber_attention_units_ref,
        .attention = amber_attention_ref,
        .attention_scratch = AMBER_HEAD_MAX * sizeof(double),
    };
    return true;
}
