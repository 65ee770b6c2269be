/* prune_body.h: N:M selection over the vectors of vec_*.h, equal to the scalar twin bit for bit.
 *
 * A batch is VL groups: m vectors of scores. They are transposed so that a lane holds a group, the
 * lanes are sorted side by side by Batcher's networks, and the n-th largest score is the group's
 * threshold. What reaches it survives; only where the score after it is equal too would that keep
 * too many, and that group is settled one by one.
 *
 * The including file defines NAME(operation) and, with `mask` for a predicate per lane,
 *     mask_reaches, mask_equal    lanes where a >= b, a == b
 *     mask_bits, mask_of_bits     to and from bit l = lane l
 *     mask_spread                 VL blocks to the channels of their 4 vectors
 *     clear_others(_n)            zeroes memory where the mask (of the first n lanes) is not set
 *     v_magnitude, v_permute      |v|; lanes v[index]
 *     v_halves                    transposes blocks of `size` >= 4 lanes between two vectors
 *     v_natural                   index of the lanes that sum_fours leaves */
#include "../sparse.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { MAX_M = 32 };

/* ---- scores ---- */

INLINE vf load_left(const float *p, int left) {
    return left >= VL ? v_load(p) : left > 0 ? v_load_n(p, left) : v_set1(0);
}

/* v_min gives its second operand where the first is not a number. */
INLINE vf ordered(vf score) { return v_min(score, v_set1(INFINITY)); }

INLINE vf weighted(const float *z, const float *f, int k, int left) {
    vf s = load_left(z + k, left - k);
    return f ? v_mul(s, load_left(f + k, left - k)) : s;
}

INLINE vf energy(const float *z, const float *other, const float *f, int k, int left) {
    vf s = weighted(z, f, k, left), e = v_mul(s, s);
    if (other) {
        vf t = weighted(other, f, k, left);
        e = v_add(e, v_mul(t, t));
    }
    return e;
}

/* (a[0] + a[1]) + (a[2] + a[3]) and so on for every four lanes of the four vectors. */
INLINE vf sum_fours(vf a, vf b, vf c, vf d) {
    vf ab = v_add(v_shuffle(a, b, 0x88), v_shuffle(a, b, 0xdd));
    vf cd = v_add(v_shuffle(c, d, 0x88), v_shuffle(c, d, 0xdd));
    return v_permute(v_add(v_shuffle(ab, cd, 0x88), v_shuffle(ab, cd, 0xdd)), v_natural());
}

/* Scores of the units that start in channels [k, k_end) of [0, left). */
INLINE void score_channels(float *score, const float *z, const float *f, int k, int k_end,
                           int left) {
    for (; k < k_end; k += VL, score += VL)
        v_store(score, ordered(v_magnitude(weighted(z, f, k, left))));
}

INLINE void score_blocks(float *score, const float *z, const float *other, const float *f, int k,
                         int k_end, int left) {
    for (; k < k_end; k += 4 * VL, score += VL) {
        vf sum = sum_fours(energy(z, other, f, k, left), energy(z, other, f, k + VL, left),
                           energy(z, other, f, k + 2 * VL, left),
                           energy(z, other, f, k + 3 * VL, left));
        v_store(score, ordered(sum));
    }
}

/* Whole vectors and the last, ragged one apart, so that the loop over the former has no choices. */
static void score_batch(float *score, const float *z, const float *other, const float *f, int block,
                        int units, int left) {
    const int step = block * VL, k_end = units * block;
    const int whole = left >= k_end ? k_end : left - left % step;
    float *rest = score + whole / block;
    if (block == 1) {
        if (f) score_channels(score, z, f, 0, whole, whole);
        else score_channels(score, z, NULL, 0, whole, whole);
        score_channels(rest, z, f, whole, k_end, left);
    } else {
        if (other && f) score_blocks(score, z, other, f, 0, whole, k_end);
        else if (other) score_blocks(score, z, other, NULL, 0, whole, k_end);
        else if (f) score_blocks(score, z, NULL, f, 0, whole, k_end);
        else score_blocks(score, z, NULL, NULL, 0, whole, k_end);
        score_blocks(rest, z, other, f, whole, k_end, left);
    }
}
