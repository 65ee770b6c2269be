/* gemm_ref.c: the scalar twins of the matrix products. */
#include "ref.h"

void amber_gemm_w8a8_ref(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const struct amber_w8 *w = &g->w;
    const struct amber_a8 *a = &g->a;
    int out1 = panel1 * AMBER_PANEL < w->n_out ? panel1 * AMBER_PANEL : w->n_out;
    for (int t = 0; t < a->rows; t++) {
        const int8_t *x = a->q + t * a->stride;
        float *y = g->y + t * g->ldy;
        for (int o = panel0 * AMBER_PANEL; o < out1; o++) {
            const uint8_t *panel = w->q + (size_t)(o / AMBER_PANEL) * AMBER_PANEL * w->k_pad;
            const uint8_t *lane = panel + o % AMBER_PANEL * 4;
            int32_t acc = 0; /* sum of w * x; the packed byte is w + 128 */
            for (int k = 0; k < w->k_pad; k++)
                acc += (lane[k / 4 * AMBER_PANEL * 4 + k % 4] - 128) * x[k];
            float v = (float)acc * (a->scale[t] * w->scale[o]);
            if (a->shift) v = v + a->shift[t] * w->sum[o];
            if (w->bias) v = v + w->bias[o];
            y[o] = g->add ? y[o] + v : v;
        }
    }
}

void amber_gemm_f32_ref(const struct amber_gemm_f32 *g, int out0, int out1) {
    for (int t = 0; t < g->rows; t++) {
        for (int o = out0; o < out1; o++) {
            double sum = 0;
            for (int k = 0; k < g->n_in; k++)
                sum += (double)g->w[(int64_t)o * g->n_in + k] * g->x[t * g->ldx + k];
            if (g->bias) sum += g->bias[o];
            float *y = g->y + t * g->ldy + o;
            *y = (float)(g->add ? *y + sum : sum);
        }
    }
}
