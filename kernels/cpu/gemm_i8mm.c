/* gemm_i8mm.c: the INT8 matrix product with usmmla, which multiplies 8 inputs of 2 outputs by those
 * of 2 rows. Two groups of 4 inputs of a panel, zipped word by word, are its unsigned operand as they
 * are stored, w + 128. 6 rows x 1 panel are 24 sums; with the 3 operands of the rows and the weights
 * on their way that is what 32 registers hold. Per 8 inputs these take 24 products and 8 zips, where
 * sdot by lane takes 48 products and 12 flips of sign for as many rows.
 *
 * A row alone would leave half of each product unused, so decoding keeps sdot. */
#if defined(__aarch64__)
#include "columns.h"
#include "finish_neon.h"
#include "unroll.h"

enum {
    PAIRS = 3, /* of rows */
    ROWS = 2 * PAIRS,
    SWEEP_BYTES = 1 << 18, /* activations that are passed over per sweep of the weights */
    AHEAD = 1024           /* bytes of prefetch */
};

/* rows is 2 * pairs, or one less: the last row is then its own partner, whose sums nobody reads. */
static inline __attribute__((always_inline)) void
tile_of(const struct amber_gemm_w8a8 *g, int panel, int row, int rows, const int pairs) {
    const uint8_t *w = g->w.q + (int64_t)panel * AMBER_PANEL * g->w.k_pad;
    const int8_t *x[ROWS];
    int32x4_t acc[PAIRS][8]; /* output o, rows r and r + 1; output o + 1, the same */
    UNROLL
    for (int p = 0; p < pairs; p++) {
        const int first = row + 2 * p, second = 2 * p + 1 < rows ? first + 1 : first;
        x[2 * p] = g->a.q + first * g->a.stride;
        x[2 * p + 1] = g->a.q + second * g->a.stride;
        const int32x2_t start = {-128 * g->a.sum[first], -128 * g->a.sum[second]};
        UNROLL
        for (int v = 0; v < 8; v++) acc[p][v] = vcombine_s32(start, start);
    }
    for (int k = 0; k < g->w.k_pad; k += 8, w += 128) {
        int8x16_t xv[PAIRS];
        UNROLL
        for (int p = 0; p < pairs; p++)
            xv[p] = vcombine_s8(vld1_s8(x[2 * p] + k), vld1_s8(x[2 * p + 1] + k));
        __builtin_prefetch(w + AHEAD);
        __builtin_prefetch(w + AHEAD + 64);
        UNROLL
        for (int v = 0; v < 4; v++) {
            const uint32x4_t near = vreinterpretq_u32_u8(vld1q_u8(w + 16 * v)),
                             far = vreinterpretq_u32_u8(vld1q_u8(w + 64 + 16 * v));
            const uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(near, far)),
                             high = vreinterpretq_u8_u32(vzip2q_u32(near, far));
            UNROLL
            for (int p = 0; p < pairs; p++) {
                acc[p][2 * v] = vusmmlaq_s32(acc[p][2 * v], low, xv[p]);
                acc[p][2 * v + 1] = vusmmlaq_s32(acc[p][2 * v + 1], high, xv[p]);
            }
            /* No instruction, an order: compilers like to zip all the weights first, and then
             * have sums on the stack. */
            __asm__("" : "+w"(acc[pairs - 1][2 * v + 1]), "+r"(w));
        }
    }
    UNROLL
    for (int p = 0; p < pairs; p++) UNROLL
    for (int v = 0; v < 4; v++) {
        const int o = panel * AMBER_PANEL + v * 4;
        if (o >= g->w.n_out) continue;
        finish(g, row + 2 * p, o, vuzp1q_s32(acc[p][2 * v], acc[p][2 * v + 1]));
        if (2 * p + 1 < rows)
            finish(g, row + 2 * p + 1, o, vuzp2q_s32(acc[p][2 * v], acc[p][2 * v + 1]));
    }
}

#define TILE(pairs)                                                                                \
    static __attribute__((noinline)) void tile_##pairs(const struct amber_gemm_w8a8 *g, int panel, \
                                                       int row, int rows) {                        \
        tile_of(g, panel, row, rows, pairs);                                                       \
    }
TILE(1)
TILE(2)
TILE(3)
static void (*const tile_fns[PAIRS])(const struct amber_gemm_w8a8 *, int, int,
                                     int) = {tile_1, tile_2, tile_3};

void amber_gemm_w8a8_i8mm(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows;
    if (rows == 1) {
        amber_gemm_w8a8_neon(g, panel0, panel1);
        return;
    }
    int sweep = (int)(SWEEP_BYTES / g->a.stride) / ROWS * ROWS;
    if (sweep < ROWS) sweep = ROWS;
    for (int sweep0 = 0; sweep0 < rows; sweep0 += sweep) {
        const int sweep1 = rows - sweep0 < sweep ? rows : sweep0 + sweep;
        for (int panel = panel0; panel < panel1; panel++)
            for (int row = sweep0; row < sweep1; row += ROWS) {
                const int n = sweep1 - row < ROWS ? sweep1 - row : ROWS;
                tile_fns[(n - 1) / 2](g, panel, row, n);
            }
    }
}

#endif
