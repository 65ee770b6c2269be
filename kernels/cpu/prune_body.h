/* prune_body.h: N:M selection over the vectors of vec_*.h, equal to the scalar twin bit for bit.
 *
 * VL groups are done at a time: their m vectors of scores are transposed so that a lane holds a
 * group, the lanes are sorted side by side by Batcher's networks, and the n-th largest score is the
 * group's threshold. What reaches it survives. Only where the next score equals it would that keep
 * too many: such a group is settled unit by unit.
 *
 * The including file defines NAME(operation), and with `mask`, a predicate per lane,
 *     mask_reaches, mask_equal    lanes where a >= b, a == b
 *     mask_bits, mask_of_bits     to and from bit l = lane l
 *     mask_spread                 VL blocks of 4 to the lanes of their 4 vectors
 *     clear_others, _n            zeroes the floats (the first n) whose lane is not set
 *     v_magnitude                 |v|
 *     v_permute                   lanes v[index]
 *     v_shuffle, v_unpack_low, v_unpack_high   as the instructions, within 128 bits
 *     v_swap                      odd blocks of `size` >= 4 lanes of a against even ones of b
 *     block_order                 v_permute's index that puts sum_fours' lanes in order */
#include "../sparse.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { MAX_M = 32, BATCH = MAX_M * VL }; /* units */

/* ---- scores ---- */

/* A row, or a pair of rows that share their mask. */
struct source {
    const float *z, *second, *f; /* second, f: may be NULL */
    int n;
};

INLINE vf load(const float *p, int left, const bool ragged) {
    if (!ragged || left >= VL) return v_load(p);
    return left > 0 ? v_load_n(p, left) : v_set1(0);
}

INLINE vf weighted(const struct source *s, const float *z, int k, const bool f, const bool ragged) {
    vf v = load(z + k, s->n - k, ragged);
    return f ? v_mul(v, load(s->f + k, s->n - k, ragged)) : v;
}

/* v_min gives its second operand where the first is not a number. */
INLINE vf ordered(vf score) {
    return v_min(score, v_set1(INFINITY));
}

INLINE vf energy(const struct source *s, int k, const bool second, const bool f,
                 const bool ragged) {
    vf v = weighted(s, s->z, k, f, ragged), e = v_mul(v, v);
    if (second) {
        v = weighted(s, s->second, k, f, ragged);
        e = v_add(e, v_mul(v, v));
    }
    return e;
}

/* (v[0] + v[1]) + (v[2] + v[3]) of every four lanes. */
INLINE vf sum_fours(vf a, vf b, vf c, vf d) {
    vf ab = v_add(v_shuffle(a, b, 0x88), v_shuffle(a, b, 0xdd));
    vf cd = v_add(v_shuffle(c, d, 0x88), v_shuffle(c, d, 0xdd));
    return v_permute(v_add(v_shuffle(ab, cd, 0x88), v_shuffle(ab, cd, 0xdd)), block_order());
}

/* Scores of the units in channels k .. k_end - 1, a multiple of what a vector of scores covers. */
INLINE void score_range(float *score, const struct source *s, int k, int k_end, const int block,
                        const bool second, const bool f, const bool ragged) {
    for (; k < k_end; k += block * VL, score += VL) {
        vf v;
        if (block == 1)
            v = v_magnitude(weighted(s, s->z, k, f, ragged));
        else
            v = sum_fours(energy(s, k, second, f, ragged), energy(s, k + VL, second, f, ragged),
                          energy(s, k + 2 * VL, second, f, ragged),
                          energy(s, k + 3 * VL, second, f, ragged));
        v_store(score, ordered(v));
    }
}

/* Channels behind the last of the row score zero. */
static void score_batch(float *score, const struct source *s, int k, int k_end, int block) {
    const int step = block * VL;
    const int whole = k_end <= s->n ? k_end : k + (s->n - k) / step * step;
    float *rest = score + (whole - k) / block;
    if (block == 1) {
        if (s->f)
            score_range(score, s, k, whole, 1, false, true, false);
        else
            score_range(score, s, k, whole, 1, false, false, false);
        if (s->f)
            score_range(rest, s, whole, k_end, 1, false, true, true);
        else
            score_range(rest, s, whole, k_end, 1, false, false, true);
    } else if (s->second) {
        if (s->f)
            score_range(score, s, k, whole, 4, true, true, false);
        else
            score_range(score, s, k, whole, 4, true, false, false);
        if (s->f)
            score_range(rest, s, whole, k_end, 4, true, true, true);
        else
            score_range(rest, s, whole, k_end, 4, true, false, true);
    } else {
        if (s->f)
            score_range(score, s, k, whole, 4, false, true, false);
        else
            score_range(score, s, k, whole, 4, false, false, false);
        if (s->f)
            score_range(rest, s, whole, k_end, 4, false, true, true);
        else
            score_range(rest, s, whole, k_end, 4, false, false, true);
    }
}

/* ---- selection ---- */

/* v[i] lane b * size + j  <->  v[j] lane b * size + i. */
INLINE void transpose(vf *v, const int size) {
#pragma GCC unroll 4
    for (int i = 0; i < size; i += 4) {
        vf a = v_unpack_low(v[i], v[i + 1]), b = v_unpack_high(v[i], v[i + 1]);
        vf c = v_unpack_low(v[i + 2], v[i + 3]), d = v_unpack_high(v[i + 2], v[i + 3]);
        v[i] = v_shuffle(a, c, 0x44);
        v[i + 1] = v_shuffle(a, c, 0xee);
        v[i + 2] = v_shuffle(b, d, 0x44);
        v[i + 3] = v_shuffle(b, d, 0xee);
    }
    if (size >= 8) {
#pragma GCC unroll 2
        for (int i = 0; i < size; i += 8)
#pragma GCC unroll 4
            for (int j = i; j < i + 4; j++) v_swap(&v[j], &v[j + 4], 4);
    }
    if (size == 16) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) v_swap(&v[j], &v[j + 8], 8);
    }
}

INLINE void order(vf *a, vf *b) {
    vf larger = v_max(*a, *b);
    *b = v_min(*a, *b);
    *a = larger;
}

/* Batcher's networks, largest first. Flat loops: gcc leaves nested ones rolled and v in memory. */
INLINE void sort_4(vf *v) {
    order(&v[0], &v[1]);
    order(&v[2], &v[3]);
    order(&v[0], &v[2]);
    order(&v[1], &v[3]);
    order(&v[1], &v[2]);
}

INLINE void sort_8(vf *v) {
    sort_4(v);
    sort_4(v + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) order(&v[i], &v[i + 4]);
    order(&v[2], &v[4]);
    order(&v[3], &v[5]);
#pragma GCC unroll 3
    for (int i = 1; i < 7; i += 2) order(&v[i], &v[i + 1]);
}

INLINE void sort_16(vf *v) {
    sort_8(v);
    sort_8(v + 8);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) order(&v[i], &v[i + 8]);
#pragma GCC unroll 4
    for (int i = 4; i < 8; i++) order(&v[i], &v[i + 4]);
#pragma GCC unroll 3
    for (int i = 2; i < 14; i += 4) {
        order(&v[i], &v[i + 2]);
        order(&v[i + 1], &v[i + 3]);
    }
#pragma GCC unroll 7
    for (int i = 1; i < 15; i += 2) order(&v[i], &v[i + 1]);
}

/* The n-th largest of two sorted lists and the one after it. The n largest are max(a[i], b[n-1-i]),
 * all i; what lies beyond a list's end counts as minus infinity. Four chains of minima and maxima
 * wait less than one. */
INLINE void nth_of_two(const vf *a, const vf *b, const int half, int n, vf *nth, vf *next) {
    const int from = n > half ? n - half : 0, to = n < half ? n : half;
    vf t[4], u[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = v_set1(INFINITY);
        u[c] = v_set1(-INFINITY);
    }
    int i = from;
    for (; i + 4 <= to; i += 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            t[c] = v_min(t[c], v_max(a[i + c], b[n - 1 - i - c]));
            u[c] = v_max(u[c], v_min(a[i + c], b[n - 1 - i - c]));
        }
    }
    for (; i < to; i++) {
        t[0] = v_min(t[0], v_max(a[i], b[n - 1 - i]));
        u[0] = v_max(u[0], v_min(a[i], b[n - 1 - i]));
    }
    if (from > 0) t[1] = v_min(t[1], v_min(a[from - 1], b[from - 1]));
    if (to < half) u[1] = v_max(u[1], v_max(a[to], b[to]));
    *nth = v_min(v_min(t[0], t[1]), v_min(t[2], t[3]));
    *next = v_max(v_max(u[0], u[1]), v_max(u[2], u[3]));
}

/* Where more than n units of the group in a lane reach its threshold, the last of those that equal
 * it go. */
static void settle(const float *score, mask *keep, const float *nth, uint32_t lanes, int n, int m) {
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const int unit = m < VL ? lane % m * VL + lane / m * m : lane * m;
        int room = n;
        uint32_t dropped = 0;
        for (int i = 0; i < m; i++) room -= score[unit + i] > nth[lane];
        for (int i = 0; i < m; i++)
            if (score[unit + i] == nth[lane] && room-- <= 0) dropped |= (uint32_t)1 << i;
        uint64_t bits = (uint64_t)dropped << unit % VL;
        for (mask *k = keep + unit / VL; bits; bits >>= VL, k++)
            *k = mask_of_bits(mask_bits(*k) & ~(uint32_t)bits);
    }
}

/* VL groups: scores [m, VL] in the row's order to masks [m]. */
INLINE void select_groups(const float *score, mask *keep, int n, const int m) {
    const int side = m < VL ? m : VL, tiles = m / side, half = m > 8 ? m / 2 : m;
    _Alignas(64) float threshold[VL];
    vf v[MAX_M], sorted[MAX_M], nth, next;
#pragma GCC unroll 4
    for (int t = 0; t < tiles; t++) {
#pragma GCC unroll 16
        for (int i = 0; i < side; i++) v[t * side + i] = v_load(score + (i * tiles + t) * VL);
        transpose(v + t * side, side);
    }
    if (m == 4) sort_4(v);
    if (m == 8) sort_8(v);
    if (m == 16) {
        sort_8(v);
        sort_8(v + 8);
    }
    if (m == 32) {
        sort_16(v);
        sort_16(v + 16);
    }
#pragma GCC unroll 32
    for (int i = 0; i < m; i++) sorted[i] = v[i]; /* n indexes it: v itself stays in registers */
    if (m > 8) {
        nth_of_two(sorted, sorted + half, half, n, &nth, &next);
    } else {
        nth = sorted[n - 1];
        next = sorted[n];
    }
    v_store(threshold, nth);
    __asm__("" : "+m"(threshold)); /* or gcc takes lanes from nth by two shuffles each */
#pragma GCC unroll 32
    for (int i = 0; i < m; i++) {
        vf own = m < VL ? v_permute(nth, group_lane(m, i)) : v_set1(threshold[i / tiles]);
        keep[i] = mask_reaches(v_load(score + i * VL), own);
    }
    uint32_t ties = mask_bits(mask_equal(nth, next));
    if (ties) settle(score, keep, threshold, ties, n, m);
}

static void select_2(const float *score, mask *keep, int n, int vectors) {
    (void)n; /* 1 */
    for (int i = 0; i < vectors; i++) {
        vf v = v_load(score + i * VL), other = v_shuffle(v, v, 0xb1);
        uint32_t second_ties = mask_bits(mask_equal(v, other)) & 0xaaaa;
        keep[i] = mask_reaches(v, other);
        if (second_ties) keep[i] = mask_of_bits(mask_bits(keep[i]) & ~second_ties);
    }
}
static void select_4(const float *score, mask *keep, int n, int vectors) {
    for (int i = 0; i < vectors; i += 4) select_groups(score + i * VL, keep + i, n, 4);
}
static void select_8(const float *score, mask *keep, int n, int vectors) {
    for (int i = 0; i < vectors; i += 8) select_groups(score + i * VL, keep + i, n, 8);
}
static void select_16(const float *score, mask *keep, int n, int vectors) {
    for (int i = 0; i < vectors; i += 16) select_groups(score + i * VL, keep + i, n, 16);
}
static void select_32(const float *score, mask *keep, int n, int vectors) {
    for (int i = 0; i < vectors; i += 32) select_groups(score + i * VL, keep + i, n, 32);
}

/* ---- the row ---- */

INLINE void clear(float *z, int left, mask keep, const bool ragged) {
    if (!ragged || left >= VL)
        clear_others(z, keep);
    else if (left > 0)
        clear_others_n(z, keep, left);
}

/* Rows z and, unless NULL, second, from the channel of the first mask on; `left` channels exist. */
INLINE void apply_range(float *z, float *second, int left, const mask *keep, int vectors,
                        const int block, const bool ragged) {
    for (int i = 0; i < vectors; i++) {
        mask lanes[4] = {keep[i]};
        if (block == 4) mask_spread(lanes, keep[i]);
#pragma GCC unroll 4
        for (int q = 0; q < block; q++) {
            const int at = (block * i + q) * VL;
            clear(z + at, left - at, lanes[q], ragged);
            if (second) clear(second + at, left - at, lanes[q], ragged);
        }
    }
}

static void apply(float *z, float *second, int left, const mask *keep, int vectors, int block) {
    const int step = block * VL, whole = left / step < vectors ? left / step : vectors;
    const int at = whole * step;
    if (block == 1) {
        apply_range(z, NULL, left, keep, whole, 1, false);
        apply_range(z + at, NULL, left - at, keep + whole, vectors - whole, 1, true);
        return;
    }
    if (second)
        apply_range(z, second, left, keep, whole, 4, false);
    else
        apply_range(z, NULL, left, keep, whole, 4, false);
    apply_range(z + at, second ? second + at : NULL, left - at, keep + whole, vectors - whole, 4,
                true);
}

void NAME(prune)(const struct amber_pattern *p, float *z, int64_t ldz, int rows, const float *f,
                 int n, void *scratch) {
    void (*select)(const float *score, mask *keep, int n, int vectors) = NULL;
    if (p->kind == AMBER_PATTERN_GROUP) {
        if (p->n == p->m) return;
        if (p->m == 2) select = select_2;
        if (p->m == 4) select = select_4;
        if (p->m == 8) select = select_8;
        if (p->m == 16) select = select_16;
        if (p->m == 32) select = select_32;
    }
    if (!select) {
        amber_prune_ref(p, z, ldz, rows, f, n, scratch);
        return;
    }
    _Alignas(64) float score[BATCH];
    mask keep[MAX_M];
    float *second = rows == 2 ? z + ldz : NULL;
    const struct source source = {z, second, f, n};
    const int block = p->block, together = p->m * VL;
    for (int k = 0; k < n; k += BATCH * block) {
        int units = BATCH, present = (n - k + block - 1) / block;
        if (present < BATCH) units = (present + together - 1) / together * together;
        score_batch(score, &source, k, k + units * block, block);
        /* Groups wholly behind the row: scores without ties. */
        for (int u = (present + p->m - 1) / p->m * p->m; u < units; u++)
            score[u] = -(float)(u & (p->m - 1));
        select(score, keep, p->n, units / VL);
        apply(z + k, second ? second + k : NULL, n - k, keep, units / VL, block);
    }
}
