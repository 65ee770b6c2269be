/* attention_ref.c: causal attention as its definition reads, in double, in two passes over the
 * keys: the largest score, then the weighted sum. A unit is one row of one cache head. */
#include "ref.h"

#include <math.h>

int amber_attention_units_ref(const struct amber_attention *a) {
    return a->rows * a->n_head_kv;
}

/* Element i of a row of keys, or of values. */
static double element(const struct amber_attention *a, bool values, int64_t row, int i) {
    const void *cache = values ? a->v : a->k;
    const int64_t at = row * a->head_dim + i;
    if (a->cells == AMBER_CELLS_I8)
        return ((const int8_t *)cache)[at] * (double)(values ? a->v_scale : a->k_scale)[row];
    return a->cells == AMBER_CELLS_F32 ? ((const float *)cache)[at]
                                       : f32_from_f16_bits(((const uint16_t *)cache)[at]);
}

static double score(const struct amber_attention *a, const float *q, int64_t row) {
    double dot = 0;
    for (int i = 0; i < a->head_dim; i++) dot += q[i] * element(a, false, row, i);
    dot *= a->scale;
    return a->softcap > 0 ? a->softcap * tanh(dot / a->softcap) : dot;
}

void amber_attention_ref(const struct amber_attention *a, int unit0, int unit1, void *scratch) {
    double *sum = scratch; /* [head_dim] */
    int group = a->n_head / a->n_head_kv;
    for (int unit = unit0; unit < unit1; unit++) {
        int row = unit / a->n_head_kv, kv_head = unit % a->n_head_kv;
        int last = a->pos0 + row;
        int first = a->window > 0 && last >= a->window ? last - a->window + 1 : 0;
        int64_t base = (int64_t)kv_head * a->n_ctx; /* the head's first cache row */
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
            int64_t offset = ((int64_t)row * a->n_head + head) * a->head_dim;
            double largest = a->sink ? a->sink[head] : -INFINITY, total = 0;
            for (int p = first; p <= last; p++)
                largest = fmax(largest, score(a, a->q + offset, base + p % a->n_ctx));
            for (int i = 0; i < a->head_dim; i++) sum[i] = 0;
            if (a->sink) total = exp(a->sink[head] - largest);
            for (int p = first; p <= last; p++) {
                double weight = exp(score(a, a->q + offset, base + p % a->n_ctx) - largest);
                total += weight;
                for (int i = 0; i < a->head_dim; i++)
                    sum[i] += weight * element(a, true, base + p % a->n_ctx, i);
            }
            for (int i = 0; i < a->head_dim; i++) a->out[offset + i] = (float)(sum[i] / total);
        }
    }
}
