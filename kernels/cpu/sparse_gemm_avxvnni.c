/* sparse_gemm_avxvnni.c: the product over lists with 256-bit vpdpbusd (VEX form), 2 rows x 3 panels:
 * 12 accumulators, and two windows of 3 panels are 24 KB. */
#if defined(__x86_64__)
#include "columns.h"
#include "vec_avx2.h"

#define NAME(operation) amber_##operation##_avxvnni
#define PANELS          3
#define WINDOWS         2
#define START(sum)      _mm256_set1_epi32(-128 * (sum)) /* the weights are stored as w + 128 */

typedef __m256i weights;
static inline weights weights_at(const uint8_t *p) {
    return _mm256_load_si256((const __m256i *)(const void *)p);
}
static inline vi dot(vi acc, weights w, vi x) {
    return _mm256_dpbusd_avx_epi32(acc, w, x);
}

#include "sparse_gemm_256.h"
#include "sparse_gemm_body.h"

#endif
