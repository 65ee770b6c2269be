/* gemm_avxvnni.c: the INT8 matrix product with 256-bit vpdpbusd (VEX form). 6 rows x 1 panel are 12
 * accumulators, enough for a latency of 5 cycles at two instructions a cycle. */
#if defined(__x86_64__)
#include "columns.h"

#include <immintrin.h>

#define ROWS       6
#define START(sum) _mm256_set1_epi32(-128 * (sum)) /* the weights are stored as w + 128 */
#define GEMM       amber_gemm_w8a8_avxvnni

static inline __m256i dot(__m256i acc, __m256i w, __m256i x) {
    return _mm256_dpbusd_avx_epi32(acc, w, x);
}

#include "gemm256_body.h"

#endif
