/* elementwise_ref.c: the scalar twins of the row operations. Sums and functions in double. */
#include "ref.h"

#include <math.h>

void amber_rmsnorm_ref(float *y, const float *x, const float *weight, int n, float eps) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * x[i];
    double scale = 1 / sqrt(sum / n + eps);
    for (int i = 0; i < n; i++) y[i] = (float)(x[i] * scale * weight[i]);
}

void amber_silu_mul_ref(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) {
        double v = gate[i];
        y[i] = (float)(v / (1 + exp(-v)) * (up ? up[i] : 1));
    }
}

void amber_gelu_mul_ref(float *y, const float *gate, const float *up, int n) {
    const double root =
        sqrt(8 / 3.14159265358979323846); /* (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) */
    for (int i = 0; i < n; i++) {
        double v = gate[i];
        y[i] = (float)(v / (1 + exp(-root * (v + 0.044715 * v * v * v))) * (up ? up[i] : 1));
    }
}

void amber_relu2_mul_ref(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) {
        double v = gate[i] < 0 ? 0 : gate[i];
        y[i] = (float)(v * v * (up ? up[i] : 1));
    }
}

void amber_swiglu_clamped_ref(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) {
        double g = gate[i] > 7 ? 7 : gate[i], u = up[i] > 7 ? 7 : up[i] < -7 ? -7 : up[i];
        y[i] = (float)(g / (1 + exp(-1.702 * g)) * (u + 1));
    }
}

void amber_layernorm_ref(float *y, const float *x, const float *weight, const float *bias, int n,
                         float eps) {
    double mean = 0, variance = 0;
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(variance / n + eps);
    for (int i = 0; i < n; i++)
        y[i] = (float)((x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0));
}

void amber_rope_ref(float *x, const float *cos, const float *sin, int n_rot, bool halves) {
    int half = n_rot / 2;
    for (int i = 0; i < half; i++) {
        float *a = halves ? x + i : x + 2 * i;
        float *b = halves ? x + half + i : x + 2 * i + 1;
        double u = *a, v = *b;
        *a = (float)(u * cos[i] - v * sin[i]);
        *b = (float)(u * sin[i] + v * cos[i]);
    }
}

void amber_f16_from_f32_ref(uint16_t *y, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] = f16_bits_from_f32(x[i]);
}

void amber_quantize_row_ref(int8_t *q, float *scale, int32_t *sum, const float *x, int n,
                            int k_pad) {
    uint32_t largest = 0; /* magnitudes order like their bits, NaN above infinity above the rest */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        bits &= 0x7fffffff;
        if (bits > largest) largest = bits;
    }
    float absmax;
    memcpy(&absmax, &largest, 4);
    float inverse = 127.0f / absmax;
    bool finite = largest < 0x7f800000, zero = !finite || isinf(inverse);
    *scale = !finite ? NAN : zero ? 0.0f : absmax / 127.0f;
    *sum = 0;
    for (int i = 0; i < k_pad; i++) {
        q[i] = i < n && !zero ? (int8_t)lrintf(x[i] * inverse) : 0;
        *sum += q[i];
    }
}
