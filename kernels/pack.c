/* pack.c: float32 weights to INT8 panels. Plain C in a shape that compilers vectorize: it runs once
 * over every weight of a model. */
#include "kernels.h"

#include <math.h>
#include <string.h>

enum { CHUNK = 256 }; /* inputs quantized at a time: 16 rows of them stay in L1 */

/* Magnitudes order like their bits, NaN above infinity above every finite value. */
static float absmax_of(const float *x, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &x[i], 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float absmax;
    memcpy(&absmax, &largest, 4);
    return absmax;
}

/* q = round-half-even(x * inverse) + 128. Adding 1.5 * 2^23 leaves the rounded integer in the low
 * bits of the sum, which baseline SSE2 can vectorize and lrintf() cannot. */
static void quantize(uint8_t *q, const float *x, int n, float inverse) {
    for (int i = 0; i < n; i++) {
        float shifted = x[i] * inverse + 0x1.8p23f;
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (uint8_t)(bits + 128);
    }
}

void amber_pack_w8_panel(uint8_t *q, float *scale, const float *src, int panel, int n_rows,
                         int n_in, int k_pad) {
    uint8_t rows[AMBER_PANEL][CHUNK];
    float inverse[AMBER_PANEL] = {0}; /* 0 makes a row of zeros */
    q += (size_t)panel * AMBER_PANEL * k_pad;
    scale += panel * AMBER_PANEL;
    for (int r = 0; r < AMBER_PANEL; r++) {
        scale[r] = 0;
        if (r >= n_rows) continue;
        float absmax = absmax_of(src + (int64_t)r * n_in, n_in);
        float over = 127.0f / absmax;
        if (!isfinite(absmax)) {
            scale[r] = NAN;
        } else if (!isinf(over)) {
            scale[r] = absmax / 127.0f;
            inverse[r] = over;
        }
    }
    for (int k0 = 0; k0 < k_pad; k0 += CHUNK) {
        int width = k_pad - k0 < CHUNK ? k_pad - k0 : CHUNK;
        int exist = n_in - k0 < width ? n_in - k0 : width;
        if (exist < 0) exist = 0;
        memset(rows, 128, sizeof rows);
        for (int r = 0; r < n_rows; r++)
            if (inverse[r] != 0) quantize(rows[r], src + (int64_t)r * n_in + k0, exist, inverse[r]);
        for (int g = 0; g < width / 4; g++)
            for (int r = 0; r < AMBER_PANEL; r++)
                memcpy(q + ((size_t)(k0 / 4 + g) * AMBER_PANEL + r) * 4, rows[r] + g * 4, 4);
    }
}
