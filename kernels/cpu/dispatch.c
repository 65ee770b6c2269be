/* dispatch.c: the table's columns, best first, and the choice among them. */
#include "columns.h"
#include "cpuid.h"

#include <pthread.h>
#include <string.h>

#if defined(__x86_64__) || defined(__aarch64__)
#define ROW_OPERATIONS(isa)                                                                        \
    static void fill_rows_##isa(struct amber_kernels *k) {                                         \
        k->rmsnorm = amber_rmsnorm_##isa;                                                          \
        k->layernorm = amber_layernorm_##isa;                                                      \
        k->silu_mul = amber_silu_mul_##isa;                                                        \
        k->gelu_mul = amber_gelu_mul_##isa;                                                        \
        k->relu2_mul = amber_relu2_mul_##isa;                                                      \
        k->swiglu_clamped = amber_swiglu_clamped_##isa;                                            \
        k->rope = amber_rope_##isa;                                                                \
        k->f16_from_f32 = amber_f16_from_f32_##isa;                                                \
        k->quantize_row = amber_quantize_row_##isa;                                                \
        k->gemm_f32 = amber_gemm_f32_##isa;                                                        \
        k->attention_units = amber_attention_units_##isa;                                          \
        k->attention = amber_attention_##isa;                                                      \
        k->attention_scratch = AMBER_ATTENTION_SCRATCH;                                            \
    }
#endif

#if defined(__x86_64__)
ROW_OPERATIONS(avx2)
ROW_OPERATIONS(avx512vnni)

static bool kernels_avx2(struct amber_kernels *k) {
    if (!amber_cpu_detect().avx2) return false;
    amber_kernels_ref(k);
    k->isa = "avx2";
    fill_rows_avx2(k);
    k->prune = amber_prune_avx2;
    k->gemm_w8a8 = amber_gemm_w8a8_avx2;
    k->pack_nm = amber_pack_nm_avx2;
    k->gemm_nm = amber_gemm_nm_avx2;
    k->nm_most[0] = 12;
    k->nm_most[1] = 13;
    return true;
}

static bool kernels_avxvnni(struct amber_kernels *k) {
    if (!amber_cpu_detect().avxvnni || !kernels_avx2(k)) return false;
    k->isa = "avxvnni";
    k->gemm_w8a8 = amber_gemm_w8a8_avxvnni;
    k->gemm_nm = amber_gemm_nm_avxvnni;
    return true;
}

static bool kernels_avx512vnni(struct amber_kernels *k) {
    if (!amber_cpu_detect().avx512vnni || !kernels_avx2(k)) return false;
    k->isa = "avx512vnni";
    fill_rows_avx512vnni(k);
    k->prune = amber_prune_avx512vnni;
    k->gemm_w8a8 = amber_gemm_w8a8_avx512vnni;
    k->pack_nm = amber_pack_nm_avx512vnni;
    k->gemm_nm = amber_gemm_nm_avx512vnni;
    k->list_rows = amber_list_rows_avx512vnni;
    k->nm_most[0] = 11;
    k->nm_most[1] = 12;
    return true;
}

static bool kernels_amx(struct amber_kernels *k) {
    if (!amber_cpu_detect().amx || !kernels_avx512vnni(k)) return false;
    k->isa = "amx";
    k->gemm_w8a8 = amber_gemm_w8a8_amx;
    k->pack_nm = NULL; /* dense tiles are several times faster */
    k->gemm_nm = NULL;
    k->list_rows = NULL;
    return true;
}
#endif

#if defined(__aarch64__)
ROW_OPERATIONS(neon)

static bool kernels_neon(struct amber_kernels *k) {
    if (!amber_cpu_detect().neon) return false;
    amber_kernels_ref(k);
    k->isa = "neon";
    fill_rows_neon(k);
    k->gemm_w8a8 = amber_gemm_w8a8_neon;
    return true;
}

static bool kernels_i8mm(struct amber_kernels *k) {
    if (!amber_cpu_detect().i8mm || !kernels_neon(k)) return false;
    k->isa = "i8mm";
    k->gemm_w8a8 = amber_gemm_w8a8_i8mm;
    return true;
}
#endif

static const struct column {
    const char *name;
    bool (*fill)(struct amber_kernels *k);
} columns[] = {
#if defined(__x86_64__)
    {"amx", kernels_amx},         {"avx512vnni", kernels_avx512vnni},
    {"avxvnni", kernels_avxvnni}, {"avx2", kernels_avx2},
#endif
#if defined(__aarch64__)
    {"i8mm", kernels_i8mm},       {"neon", kernels_neon},
#endif
    {"ref", amber_kernels_ref},
};
enum { N_COLUMNS = sizeof columns / sizeof columns[0] };

bool amber_kernels_select(struct amber_kernels *k, const char *isa) {
    for (int i = 0; i < N_COLUMNS; i++) {
        if (isa && strcmp(isa, columns[i].name)) continue;
        if (columns[i].fill(k)) return true;
        if (isa) return false;
    }
    return false;
}

static char names[N_COLUMNS * 12]; /* the longest name and a blank are 11 characters */

static void list_names(void) {
    for (int i = 0; i < N_COLUMNS; i++) {
        struct amber_kernels k;
        if (!columns[i].fill(&k)) continue;
        if (names[0]) strcat(names, " ");
        strcat(names, columns[i].name);
    }
}

const char *amber_kernels_list(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, list_names);
    return names;
}
