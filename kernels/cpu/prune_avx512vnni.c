/* prune_avx512vnni.c: N:M selection in 512-bit vectors, and rows pruned, quantized and listed at once:
 * what is pruned is never written, and no row is read more often than selection needs. */
#if defined(__x86_64__)
#include "../kernels.h"
#include "lists_avx512.h"
#include "vec_avx512.h"

#include <stdbool.h>

#define NAME(operation) amber_##operation##_avx512vnni

typedef __mmask16 mask;

static inline mask mask_reaches(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
static inline mask mask_equal(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
static inline uint32_t mask_bits(mask a) {
    return a;
}
static inline mask mask_of_bits(uint32_t bits) {
    return (mask)bits;
}
/* Every bit four times: the gaps open by halves. */
static inline void mask_spread(mask lanes[4], mask blocks) {
    uint64_t x = blocks;
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    x = (x | x << 6) & 0x0303030303030303;
    x = (x | x << 3) & 0x1111111111111111;
    x *= 15;
    for (int q = 0; q < 4; q++) lanes[q] = (mask)(x >> 16 * q);
}
static inline void clear_others(float *p, mask keep) {
    _mm512_mask_storeu_ps(p, (mask)~keep, _mm512_setzero_ps());
}
static inline void clear_others_n(float *p, mask keep, int n) {
    _mm512_mask_storeu_ps(p, (mask)(~keep & v_first(n)), _mm512_setzero_ps());
}

static inline vf v_magnitude(vf v) {
    return _mm512_abs_ps(v);
}
static inline vf v_permute(vf v, vi index) {
    return _mm512_permutexvar_ps(index, v);
}
#define v_shuffle(a, b, order) _mm512_shuffle_ps(a, b, order)
static inline vf v_unpack_low(vf a, vf b) {
    return _mm512_unpacklo_ps(a, b);
}
static inline vf v_unpack_high(vf a, vf b) {
    return _mm512_unpackhi_ps(a, b);
}
static inline __attribute__((always_inline)) void v_swap(vf *a, vf *b, const int size) {
    vf x = *a, y = *b;
    if (size == 4) {
        *a = _mm512_mask_shuffle_f32x4(x, 0xf0f0, y, y, 0xa0);
        *b = _mm512_mask_shuffle_f32x4(y, 0x0f0f, x, x, 0xf5);
    } else {
        *a = _mm512_shuffle_f32x4(x, y, 0x44);
        *b = _mm512_shuffle_f32x4(x, y, 0xee);
    }
}
static inline vi block_order(void) {
    return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
/* Lane i of the own m lanes. */
static inline vi group_lane(const int m, int i) {
    vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(_mm512_and_si512(lane, _mm512_set1_epi32(-m)), _mm512_set1_epi32(i));
}

#include "prune_body.h"

/* ---- straight to lists ---- */

enum { GROUP = AMBER_NM_GROUP, GROUPS = AMBER_NM_WINDOW / GROUP, MAX_GROUPS = AMBER_MAX_K / GROUP };

/* What a row or pair keeps: of each group of 64 channels the units, and the channels. */
struct kept {
    mask units[MAX_GROUPS + 2 * MAX_M];
    mask channels[MAX_GROUPS][4];
};

static void choose(const struct amber_pattern *p, const struct source *s, struct kept *kept) {
    _Alignas(64) float score[BATCH];
    void (*select)(const float *score, mask *keep, int n, int vectors) = p->m == 2   ? select_2
                                                                         : p->m == 4 ? select_4
                                                                         : p->m == 8 ? select_8
                                                                                     : select_16;
    const int together = p->m * VL, groups = (s->n + GROUP - 1) / GROUP;
    mask *units_at = kept->units;
    for (int k = 0; k < s->n; k += BATCH * 4, units_at += BATCH / VL) {
        int units = BATCH, present = (s->n - k + 3) / 4;
        if (present < BATCH) units = (present + together - 1) / together * together;
        score_batch(score, s, k, k + units * 4, 4);
        for (int u = (present + p->m - 1) / p->m * p->m; u < units; u++)
            score[u] = -(float)(u & (p->m - 1));
        select(score, units_at, p->n, units / VL);
    }
    for (int g = 0; g < groups; g++) { /* every bit four times */
        __mmask64 four = _mm512_movepi8_mask(_mm512_movm_epi32(kept->units[g]));
        __builtin_memcpy(kept->channels[g], &four, sizeof four);
    }
}

/* As quantize_row: the scale, and the factor by which q is rounded; 0 where all of q is 0. */
static float row_scale(const float *x, int n, const struct kept *kept, float *scale) {
    vi largest[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};
    int k = 0;
    for (int g = 0; k + GROUP <= n; k += GROUP, g++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vf v = _mm512_maskz_loadu_ps(kept->channels[g][i], x + k + i * VL);
            largest[i] = vi_max(largest[i], vi_magnitude(v));
        }
    for (int i = 0; k < n; k += VL, i++) {
        const mask there = kept->channels[k / GROUP][i] & (n - k < VL ? v_first(n - k) : 0xffff);
        largest[0] = vi_max(largest[0], vi_magnitude(_mm512_maskz_loadu_ps(there, x + k)));
    }
    const int32_t bits =
        vi_largest(vi_max(vi_max(largest[0], largest[1]), vi_max(largest[2], largest[3])));
    float absmax;
    __builtin_memcpy(&absmax, &bits, 4);
    const float inverse = 127.0f / absmax;
    const bool finite = bits < 0x7f800000;
    *scale = !finite ? NAN : isinf(inverse) ? 0.0f : absmax / 127.0f;
    return finite && !isinf(inverse) ? inverse : 0.0f;
}

/* A row that is being listed. */
struct listing {
    const float *x;
    const mask *units;
    vf factor;
    mask live; /* no lane where all of q is 0 */
    vi sum;
};

/* A group's 16 quads of INT8; what those hold that are not kept does not matter. */
INLINE __m512i quantized(struct listing *l, int k, int left, const bool ragged) {
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        q[i] = vi_round(v_mul(load(l->x + k + i * VL, left - i * VL, ragged), l->factor));
    /* Packing within 128 bits puts quad 4 i + j at 4 j + i. */
    const __m512i v = _mm512_maskz_permutexvar_epi32(
        l->live, block_order(),
        _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3])));
    l->sum = _mm512_mask_dpbusd_epi32(l->sum, l->units[k / GROUP], _mm512_set1_epi8(1), v);
    return v;
}

INLINE int list_window(struct listing *a, struct listing *b, struct amber_nm_window *to, int k,
                       int left, const int groups, const bool ragged) {
    __m512i va[4], vb[4];
    struct listed m;
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) {
        const int at = g * GROUP;
        va[g] = quantized(a, k + at, left - at, ragged);
        vb[g] = quantized(b, k + at, left - at, ragged);
        m.a[g] = a->units[k / GROUP + g];
        m.b[g] = b->units[k / GROUP + g];
    }
    return write_window(to, va, vb, &m, groups);
}

void amber_list_rows_avx512vnni(const struct amber_pattern *p, const struct amber_nm *nm,
                                const struct amber_a8 *a, int pair, const float *x, const float *f,
                                int n) {
    const int first = amber_nm_row(nm, pair), rows = amber_nm_rows(nm, pair, a->rows);
    const bool together = p->tokens == 2 && rows == 2;
    struct kept kept[2];
    struct listing l[2];
    choose(p, &(struct source){x, together ? x + n : NULL, f, n}, &kept[0]);
    if (rows == 2 && !together) choose(p, &(struct source){x + n, NULL, f, n}, &kept[1]);
    for (int r = 0; r < rows; r++) {
        const struct kept *own = &kept[together ? 0 : r];
        const float factor = row_scale(x + (int64_t)r * n, n, own, &a->scale[first + r]);
        l[r] = (struct listing){.x = x + (int64_t)r * n,
                                .units = own->units,
                                .factor = v_set1(factor),
                                .live = factor > 0 ? 0xffff : 0,
                                .sum = vi_zero()};
    }
    if (rows == 1) { /* beside it a row of zeros */
        l[1] = l[0];
        l[1].live = 0;
    }
    uint8_t *record = nm->lists + pair * nm->stride, *counts = record + amber_nm_counts(a->k_pad);
    struct amber_nm_window *window = (struct amber_nm_window *)(void *)record;
    int k = 0;
    for (; k + AMBER_NM_WINDOW <= n; k += AMBER_NM_WINDOW)
        *counts++ = (uint8_t)list_window(&l[0], &l[1], window++, k, AMBER_NM_WINDOW, GROUPS, false);
    if (k < a->k_pad)
        *counts =
            (uint8_t)list_window(&l[0], &l[1], window, k, n - k, (a->k_pad - k) / GROUP, true);
    for (int r = 0; r < rows; r++) a->sum[first + r] = vi_sum(l[r].sum);
}
#endif
