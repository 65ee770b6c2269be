/* gemm_neon.c: the INT8 matrix product with sdot by lane. A panel's group is four vectors of 4
 * outputs x 4 inputs; the byte w + 128 becomes w by flipping its top bit, which is one instruction
 * per vector of weights and spares the correction. 4 rows x 1 panel are 16 sums. */
#if defined(__aarch64__)
#include "columns.h"
#include "finish_neon.h"
#include "unroll.h"

enum {
    ROWS = 4,
    SWEEP_BYTES = 1 << 18, /* activations that are passed over per sweep of the weights */
    AHEAD = 1024           /* bytes of prefetch */
};

static inline __attribute__((always_inline)) void tile_of(const struct amber_gemm_w8a8 *g,
                                                          int panel, int row, const int rows) {
    const uint8_t *w = g->w.q + (int64_t)panel * AMBER_PANEL * g->w.k_pad;
    const int8_t *x = g->a.q + row * g->a.stride;
    const int64_t stride = g->a.stride;
    const uint8x16_t flip = vdupq_n_u8(128);
    int32x4_t acc[ROWS][4];
    UNROLL
    for (int r = 0; r < rows; r++) UNROLL
    for (int v = 0; v < 4; v++) acc[r][v] = vdupq_n_s32(0);
#define GROUP(group)                                                                               \
    for (int v = 0; v < 4; v++, w += 16) {                                                         \
        int8x16_t wv = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), flip));                           \
        for (int r = 0; r < rows; r++) acc[r][v] = vdotq_laneq_s32(acc[r][v], wv, xv[r], group);   \
    }
    for (int k = 0; k < g->w.k_pad; k += 16, x += 16) {
        int8x16_t xv[ROWS];
        for (int r = 0; r < rows; r++) xv[r] = vld1q_s8(x + r * stride);
        __builtin_prefetch(w + AHEAD);
        __builtin_prefetch(w + AHEAD + 64);
        __builtin_prefetch(w + AHEAD + 128);
        __builtin_prefetch(w + AHEAD + 192);
        GROUP(0)
        GROUP(1)
        GROUP(2)
        GROUP(3)
    }
#undef GROUP
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 4; v++)
            if (panel * AMBER_PANEL + v * 4 < g->w.n_out)
                finish(g, row + r, panel * AMBER_PANEL + v * 4, acc[r][v]);
}

#define TILE(rows)                                                                                 \
    static __attribute__((noinline)) void tile_##rows(const struct amber_gemm_w8a8 *g, int panel,  \
                                                      int row) {                                   \
        tile_of(g, panel, row, rows);                                                              \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
static void (*const tile_fns[ROWS])(const struct amber_gemm_w8a8 *, int, int) = {tile_1, tile_2,
                                                                                 tile_3, tile_4};

void amber_gemm_w8a8_neon(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows;
    int sweep = (int)(SWEEP_BYTES / g->a.stride) / ROWS * ROWS;
    if (sweep < ROWS) sweep = ROWS;
    for (int sweep0 = 0; sweep0 < rows; sweep0 += sweep) {
        const int sweep1 = rows - sweep0 < sweep ? rows : sweep0 + sweep;
        for (int panel = panel0; panel < panel1; panel++)
            for (int row = sweep0; row < sweep1; row += ROWS)
                tile_fns[(sweep1 - row < ROWS ? sweep1 - row : ROWS) - 1](g, panel, row);
    }
}

#endif
