/* rows_body.h: the row operations and the float32 matrix product over the vectors of vec_*.h. The
 * including file defines NAME(operation). */
#include "vec_exp.h"

#include <math.h>
#include <string.h>

void NAME(rmsnorm)(float *y, const float *x, const float *weight, int n, float eps) {
    vf sum[4] = {v_set1(0), v_set1(0), v_set1(0), v_set1(0)};
    int i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        for (int j = 0; j < 4; j++) {
            vf v = v_load(x + i + j * VL);
            sum[j] = v_fma(v, v, sum[j]);
        }
    }
    for (; i < n; i += VL) {
        vf v = n - i >= VL ? v_load(x + i) : v_load_n(x + i, n - i);
        sum[0] = v_fma(v, v, sum[0]);
    }
    float total = v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
    vf scale = v_set1(1.0f / sqrtf(total / (float)n + eps));
    for (i = 0; i + VL <= n; i += VL)
        v_store(y + i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
    if (i < n) {
        vf v = v_mul(v_mul(v_load_n(x + i, n - i), scale), v_load_n(weight + i, n - i));
        v_store_n(y + i, v, n - i);
    }
}

static inline vf sum_of(const float *x, int n) {
    vf sum[4] = {v_set1(0), v_set1(0), v_set1(0), v_set1(0)};
    int i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) sum[j] = v_add(sum[j], v_load(x + i + j * VL));
    for (; i < n; i += VL)
        sum[0] = v_add(sum[0], n - i >= VL ? v_load(x + i) : v_load_n(x + i, n - i));
    return v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]));
}

void NAME(layernorm)(float *y, const float *x, const float *weight, const float *bias, int n,
                     float eps) {
    const float centre = v_sum(sum_of(x, n)) / (float)n;
    const vf mean = v_set1(centre);
    vf squares = v_set1(0);
    float rest = 0; /* of what does not fill a vector: its empty lanes would count as -mean */
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = v_sub(v_load(x + i), mean);
        squares = v_fma(v, v, squares);
    }
    for (; i < n; i++) rest += (x[i] - centre) * (x[i] - centre);
    const vf scale = v_set1(1.0f / sqrtf((v_sum(squares) + rest) / (float)n + eps));
    for (i = 0; i < n; i += VL) {
        const int left = n - i;
        const bool whole = left >= VL;
        vf v = whole ? v_load(x + i) : v_load_n(x + i, left);
        v = v_mul(v_mul(v_sub(v, mean), scale),
                  whole ? v_load(weight + i) : v_load_n(weight + i, left));
        if (bias) v = v_add(v, whole ? v_load(bias + i) : v_load_n(bias + i, left));
        if (whole)
            v_store(y + i, v);
        else
            v_store_n(y + i, v, left);
    }
}

static inline __attribute__((always_inline)) vf sigmoid_times(vf argument, vf value) {
    return v_div(value, v_add(v_set1(1.0f), v_exp(v_sub(v_set1(0), argument))));
}
static inline __attribute__((always_inline)) vf silu(vf v) {
    return sigmoid_times(v, v);
}
/* 0.5 v (1 + tanh(u)) is v sigmoid(2 u). */
static inline __attribute__((always_inline)) vf gelu(vf v) {
    vf cubic = v_fma(v_mul(v_mul(v, v), v_set1(0.044715f)), v, v);
    return sigmoid_times(v_mul(cubic, v_set1(1.5957691216f)), v);
}

/* A NaN comes through: v_min and v_max give their second argument where one is. */
static inline __attribute__((always_inline)) vf relu2(vf v) {
    v = v_max(v_set1(0), v);
    return v_mul(v, v);
}
static inline __attribute__((always_inline)) vf clamped(vf gate, vf up) {
    vf g = v_min(v_set1(7.0f), gate), u = v_min(v_set1(7.0f), v_max(v_set1(-7.0f), up));
    return v_mul(sigmoid_times(v_mul(g, v_set1(1.702f)), g), v_add(u, v_set1(1.0f)));
}

#define ACTIVATION(name)                                                                           \
    void NAME(name##_mul)(float *y, const float *gate, const float *up, int n) {                   \
        int i = 0;                                                                                 \
        for (; i + VL <= n; i += VL) {                                                             \
            vf v = name(v_load(gate + i));                                                         \
            v_store(y + i, up ? v_mul(v, v_load(up + i)) : v);                                     \
        }                                                                                          \
        if (i < n) {                                                                               \
            vf v = name(v_load_n(gate + i, n - i));                                                \
            v_store_n(y + i, up ? v_mul(v, v_load_n(up + i, n - i)) : v, n - i);                   \
        }                                                                                          \
    }
ACTIVATION(silu)
ACTIVATION(gelu)
ACTIVATION(relu2)

void NAME(swiglu_clamped)(float *y, const float *gate, const float *up, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) v_store(y + i, clamped(v_load(gate + i), v_load(up + i)));
    if (i < n) v_store_n(y + i, clamped(v_load_n(gate + i, n - i), v_load_n(up + i, n - i)), n - i);
}

void NAME(rope)(float *x, const float *cos, const float *sin, int n_rot, bool halves) {
    const int half = n_rot / 2;
    int i = 0;
    for (; i + VL <= half; i += VL) {
        vf a, b, c = v_load(cos + i), s = v_load(sin + i);
        if (halves) {
            a = v_load(x + i);
            b = v_load(x + half + i);
        } else {
            v_load_pairs(x + 2 * i, &a, &b);
        }
        vf u = v_fnma(b, s, v_mul(a, c)), v = v_fma(b, c, v_mul(a, s));
        if (halves) {
            v_store(x + i, u);
            v_store(x + half + i, v);
        } else {
            v_store_pairs(x + 2 * i, u, v);
        }
    }
    for (; i < half; i++) {
        float *a = halves ? x + i : x + 2 * i, *b = halves ? x + half + i : x + 2 * i + 1;
        float u = *a * cos[i] - *b * sin[i], v = *a * sin[i] + *b * cos[i];
        *a = u;
        *b = v;
    }
}

void NAME(f16_from_f32)(uint16_t *y, const float *x, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) v_store_f16(y + i, v_load(x + i));
    if (i < n) v_store_f16_n(y + i, v_load_n(x + i, n - i), n - i);
}

void NAME(quantize_row)(int8_t *q, float *scale, int32_t *sum, const float *x, int n, int k_pad) {
    vi largest = vi_zero();
    int i = 0;
    for (; i + VL <= n; i += VL) largest = vi_max(largest, vi_magnitude(v_load(x + i)));
    if (i < n) largest = vi_max(largest, vi_magnitude(v_load_n(x + i, n - i)));
    int32_t bits = vi_largest(largest);
    float absmax;
    memcpy(&absmax, &bits, 4);
    const float inverse = 127.0f / absmax;
    const bool finite = bits < 0x7f800000;
    *sum = 0;
    *scale = finite ? 0.0f : NAN;
    memset(q + n, 0, (size_t)(k_pad - n));
    if (!finite || isinf(inverse)) {
        memset(q, 0, (size_t)n);
        return;
    }
    *scale = absmax / 127.0f;
    vi total = vi_zero();
    const vf factor = v_set1(inverse);
    for (i = 0; i + VL <= n; i += VL) {
        vi v = vi_round(v_mul(v_load(x + i), factor));
        vi_store_i8(q + i, v);
        total = vi_add(total, v);
    }
    if (i < n) {
        int8_t last[VL];
        vi v = vi_round(v_mul(v_load_n(x + i, n - i), factor));
        vi_store_i8(last, v);
        memcpy(q + i, last, (size_t)(n - i));
        total = vi_add(total, v);
    }
    *sum = vi_sum(total);
}

/* Dot products along the inputs: lane l sums the inputs l, l + VL, ... in order, then the lanes are
 * added; so an output has the same bits in every tile. */
enum { DOT_ROWS = TILE_VECTORS == 2 ? 3 : 6, DOT_OUTS = 4, DOT_ROW_BLOCK = 48 };

static inline __attribute__((always_inline)) void
dot_tile(const struct amber_gemm_f32 *g, int row, int out, const int rows, const int outs) {
    const float *w = g->w + (int64_t)out * g->n_in, *x = g->x + row * g->ldx;
    const int64_t n = g->n_in, ldx = g->ldx;
    float sums[DOT_ROWS][DOT_OUTS];
    vf acc[DOT_ROWS][DOT_OUTS];
    UNROLL
    for (int r = 0; r < rows; r++) UNROLL
    for (int o = 0; o < outs; o++) acc[r][o] = v_set1(0);
    int64_t k = 0;
    for (; k + VL <= n; k += VL) {
        vf xv[DOT_ROWS];
        UNROLL
        for (int r = 0; r < rows; r++) xv[r] = v_load(x + r * ldx + k);
        UNROLL
        for (int o = 0; o < outs; o++) {
            vf wv = v_load(w + o * n + k);
            UNROLL
            for (int r = 0; r < rows; r++) acc[r][o] = v_fma(xv[r], wv, acc[r][o]);
        }
    }
    if (k < n) {
        int left = (int)(n - k);
        UNROLL
        for (int o = 0; o < outs; o++) {
            vf wv = v_load_n(w + o * n + k, left);
            UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][o] = v_fma(v_load_n(x + r * ldx + k, left), wv, acc[r][o]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) UNROLL
    for (int o = 0; o < outs; o++) sums[r][o] = v_sum(acc[r][o]);
    for (int r = 0; r < rows; r++) {
        float *y = g->y + (row + r) * g->ldy + out;
        for (int o = 0; o < outs; o++) {
            float v = g->bias ? sums[r][o] + g->bias[out + o] : sums[r][o];
            y[o] = g->add ? y[o] + v : v;
        }
    }
}

static __attribute__((noinline)) void dot_full(const struct amber_gemm_f32 *g, int row, int out) {
    dot_tile(g, row, out, DOT_ROWS, DOT_OUTS);
}
static __attribute__((noinline)) void dot_row(const struct amber_gemm_f32 *g, int row, int out) {
    dot_tile(g, row, out, 1, DOT_OUTS);
}
static __attribute__((noinline)) void dot_one(const struct amber_gemm_f32 *g, int row, int out) {
    dot_tile(g, row, out, 1, 1);
}

void NAME(gemm_f32)(const struct amber_gemm_f32 *g, int out0, int out1) {
    for (int row0 = 0; row0 < g->rows; row0 += DOT_ROW_BLOCK) {
        int row1 = g->rows - row0 < DOT_ROW_BLOCK ? g->rows : row0 + DOT_ROW_BLOCK;
        int out = out0;
        for (; out + DOT_OUTS <= out1; out += DOT_OUTS) {
            int row = row0;
            for (; row + DOT_ROWS <= row1; row += DOT_ROWS) dot_full(g, row, out);
            for (; row < row1; row++) dot_row(g, row, out);
        }
        for (; out < out1; out++)
            for (int row = row0; row < row1; row++) dot_one(g, row, out);
    }
}
