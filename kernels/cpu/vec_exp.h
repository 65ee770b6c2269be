/* vec_exp.h: exp() over the vectors of vec_*.h. */
#ifndef AMBER_VEC_EXP_H
#define AMBER_VEC_EXP_H

/* exp(x) for x <= 88 (above, exp(88)); relative error below 2^-22; 0 below -87.33, where the result
 * would be subnormal; NaN stays NaN. exp(x) = 2^n exp(r), |r| <= ln(2)/2, with ln(2) in two parts
 * (Cody and Waite) and a minimax polynomial of degree 6 (own fit, relative error 4.4e-9). */
static inline vf v_exp(vf x) {
    const vf low = v_set1(-87.33f);
    vf c = v_min(v_set1(88.0f), v_max(low, x));
    vf t = v_fma(c, v_set1(1.44269504f), v_set1(0x1.8p23f)); /* rounds to an integer */
    vf n = v_sub(t, v_set1(0x1.8p23f));
    vf r = v_fnma(n, v_set1(0x1.62e4p-1f), c);
    r = v_fnma(n, v_set1(0x1.7f7d1cp-20f), r);
    vf p = v_fma(v_set1(0x1.6a2318p-10f), r, v_set1(0x1.123a8ep-7f));
    p = v_fma(p, r, v_set1(0x1.5558f6p-5f));
    p = v_fma(p, r, v_set1(0x1.555490p-3f));
    p = v_fma(p, r, v_set1(0x1.fffffcp-2f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return v_zero_where_less(v_scale(p, t), x, low);
}

#endif
