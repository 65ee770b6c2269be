/* gemm_avx2.c: the INT8 matrix product with AVX2. vpmaddubsw adds two products with saturation to
 * 16 bits, which the weights as stored (0..255) would reach. With |w| as the unsigned operand and
 * the sign of w moved into x the pair stays within 2 * 127 * 127 = 32258: exact. */
#if defined(__x86_64__)
#include "columns.h"

#include <immintrin.h>

#define ROWS       4
#define START(sum) _mm256_setzero_si256()
#define GEMM       amber_gemm_w8a8_avx2

static inline __m256i dot(__m256i acc, __m256i w, __m256i x) {
    __m256i signs = _mm256_xor_si256(w, _mm256_set1_epi8(-128)); /* w + 128 back to w */
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signs), _mm256_sign_epi8(x, signs));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "gemm256_body.h"

#endif
