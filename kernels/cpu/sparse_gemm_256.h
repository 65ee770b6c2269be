/* sparse_gemm_256.h: what the two 256-bit columns of sparse_gemm_body.h share. vi and vf come from
 * vec_avx2.h. */
static inline vi broadcast(int32_t x) {
    return _mm256_set1_epi32(x);
}
static inline vi sums_load(const int32_t *p) {
    return _mm256_load_si256((const __m256i *)(const void *)p);
}
static inline void sums_store(int32_t *p, vi v) {
    _mm256_store_si256((__m256i *)(void *)p, v);
}
static inline vf floats(vi v) {
    return _mm256_cvtepi32_ps(v);
}
