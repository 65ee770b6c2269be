/* sparse_gemm_ref.c: the scalar twins of list building and of the product over lists. */
#include "../sparse_gemm.h"
#include "ref.h"

#include <string.h>

/* Which of the 16 quads at x are not all zero. */
static uint32_t quads_of(const int8_t *x) {
    uint32_t mask = 0;
    for (int q = 0; q < 16; q++) {
        int32_t four;
        memcpy(&four, x + 4 * q, 4);
        mask |= (uint32_t)(four != 0) << q;
    }
    return mask;
}

/* The lowest free quads of `from` go to mask until it has `keep`. */
static uint32_t fill(uint32_t mask, uint32_t from, int keep) {
    for (int q = 0; q < 16 && __builtin_popcount(mask) < keep; q++) mask |= from & (uint32_t)1 << q;
    return mask;
}

static void choose(const int8_t *a, const int8_t *b, int keep, uint32_t masks[2]) {
    uint32_t ma = quads_of(a), mb = quads_of(b), both = ma | mb;
    if (__builtin_popcount(both) <= keep) {
        masks[0] = masks[1] = fill(both, 0xffff, keep);
    } else {
        masks[0] = fill(ma, mb, keep);
        masks[1] = fill(mb, ma, keep);
    }
}

static int pack_window(struct amber_nm_window *to, const int8_t *a, const int8_t *b, int groups,
                       int keep) {
    uint32_t masks[4][2];
    int common = 0;
    for (int g = 0; g < groups; g++) {
        choose(a + g * AMBER_NM_GROUP, b + g * AMBER_NM_GROUP, keep, masks[g]);
        for (int q = 0; q < 16; q++) {
            if (!(masks[g][0] & masks[g][1] & (uint32_t)1 << q)) continue;
            int quad = 16 * g + q;
            memcpy(&to->xa[common], a + 4 * quad, 4);
            memcpy(&to->xb[common], b + 4 * quad, 4);
            to->oa[common] = to->ob[common] = (uint16_t)(64 * quad);
            common++;
        }
    }
    int next_a = common, next_b = common;
    for (int g = 0; g < groups; g++) {
        for (int q = 0; q < 16; q++) {
            int quad = 16 * g + q;
            bool in_a = masks[g][0] >> q & 1, in_b = masks[g][1] >> q & 1;
            if (in_a && !in_b) {
                memcpy(&to->xa[next_a], a + 4 * quad, 4);
                to->oa[next_a++] = (uint16_t)(64 * quad);
            }
            if (in_b && !in_a) {
                memcpy(&to->xb[next_b], b + 4 * quad, 4);
                to->ob[next_b++] = (uint16_t)(64 * quad);
            }
        }
    }
    return common;
}

void amber_pack_nm_ref(const struct amber_nm *nm, const struct amber_a8 *a, int pair0, int pair1) {
    static const int8_t zeros[AMBER_NM_WINDOW];
    for (int pair = pair0; pair < pair1; pair++) {
        const int8_t *x = a->q + amber_nm_row(nm, pair) * a->stride;
        bool two = amber_nm_rows(nm, pair, a->rows) == 2;
        uint8_t *record = nm->lists + pair * nm->stride;
        uint8_t *counts = record + amber_nm_counts(a->k_pad);
        struct amber_nm_window *window = (struct amber_nm_window *)(void *)record;
        for (int k = 0, w = 0; k < a->k_pad; k += AMBER_NM_WINDOW, w++) {
            int left = (a->k_pad - k) / AMBER_NM_GROUP, groups = left < 4 ? left : 4;
            counts[w] = (uint8_t)pack_window(window + w, x + k, two ? x + a->stride + k : zeros,
                                             groups, nm->keep);
        }
    }
}

/* Sum of w * x over a window for one output; lane is where its bytes start in the panel. */
static int32_t window_dot(const uint8_t *lane, const int32_t *x, const uint16_t *o, int entries) {
    int32_t acc = 0;
    for (int i = 0; i < entries; i++) {
        int8_t four[4];
        memcpy(four, &x[i], 4);
        for (int j = 0; j < 4; j++) acc += (lane[o[i] + j] - 128) * four[j];
    }
    return acc;
}

static int32_t row_dot(const struct amber_nm *nm, int k_pad, int pair, int second,
                       const uint8_t *lane) {
    const uint8_t *record = nm->lists + pair * nm->stride;
    const uint8_t *counts = record + amber_nm_counts(k_pad);
    const struct amber_nm_window *from = (const struct amber_nm_window *)(const void *)record;
    int32_t acc = 0;
    for (int k = 0, w = 0; k < k_pad; k += AMBER_NM_WINDOW, w++) {
        int left = (k_pad - k) / AMBER_NM_GROUP, groups = left < 4 ? left : 4;
        int entries = groups * nm->keep, common = counts[w];
        const int32_t *x = second ? from->xb : from->xa;
        acc += window_dot(lane, x, from->oa, common);
        acc +=
            window_dot(lane, x + common, (second ? from->ob : from->oa) + common, entries - common);
        from++;
        lane += AMBER_NM_WINDOW * AMBER_PANEL;
    }
    return acc;
}

void amber_gemm_nm_ref(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel0,
                       int panel1) {
    const struct amber_w8 *w = &g->w;
    const struct amber_a8 *a = &g->a;
    int out1 = panel1 * AMBER_PANEL < w->n_out ? panel1 * AMBER_PANEL : w->n_out;
    for (int pair = 0; pair < amber_nm_pairs(a->rows, nm->first); pair++) {
        for (int i = 0; i < amber_nm_rows(nm, pair, a->rows); i++) {
            int t = amber_nm_row(nm, pair) + i;
            float *y = g->y + t * g->ldy;
            for (int o = panel0 * AMBER_PANEL; o < out1; o++) {
                const uint8_t *panel = w->q + (size_t)(o / AMBER_PANEL) * AMBER_PANEL * w->k_pad;
                int32_t acc = row_dot(nm, w->k_pad, pair, i, panel + o % AMBER_PANEL * 4);
                float v = (float)acc * (a->scale[t] * w->scale[o]);
                if (a->shift) v = v + a->shift[t] * w->sum[o];
                if (w->bias) v = v + w->bias[o];
                y[o] = g->add ? y[o] + v : v;
            }
        }
    }
}
