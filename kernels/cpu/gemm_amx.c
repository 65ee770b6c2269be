/* gemm_amx.c: the INT8 matrix product with AMX tiles (Intel SDM volume 1, chapter 18).
 *
 * A weight panel is already a stack of B tiles: 64 inputs of 16 outputs are 16 rows of 64 bytes.
 * Activations are A tiles as they lie, 16 rows with the row stride. tdpbsud multiplies signed A by
 * unsigned B. A step of 2 x 2 tiles (32 rows x 2 panels) loads four tiles for four products. */
#if defined(__x86_64__)
#include "columns.h"

#include <immintrin.h>
#include <string.h>

#ifndef KB
#define KB 512
#endif
#ifndef NP
#define NP 4
#endif
#ifndef SW
#define SW 1000000
#endif
#ifndef RB
#define RB 256
#endif
enum {
    TILE_ROWS = 16,
    BLOCK_ROWS = 32,
    FEW_ROWS = 4, /* up to here the vector kernel is as fast */
    PANELS = NP,
    K_BLOCK = KB,
    ROW_BLOCK = RB
};

/* Tiles 0..3 are sums [row half * 2 + panel], 4 and 5 activations, 6 and 7 weights. */
static void configure(int rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    int upper = rows < TILE_ROWS ? rows : TILE_ROWS, lower = rows - upper;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = TILE_ROWS;
    }
    config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)upper;
    config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)(lower ? lower : 1);
    _tile_loadconfig(&config);
}

/* Sums of a step: [half, panel, 16 rows, 16 outputs]. */
enum { STEP_SUMS = 4 * TILE_ROWS * 16 };

static inline __attribute__((always_inline)) void step(const uint8_t *w, int64_t panel_bytes,
                                                       const int8_t *x, int64_t stride, int groups,
                                                       int32_t *sums, bool first, const uint8_t *ahead, int lines,
                                                       const int halves, const int panels) {
    int32_t *s1 = sums + 256, *s2 = sums + 512, *s3 = sums + 768;
    if (first) {
        _tile_zero(0);
        if (panels > 1) _tile_zero(1);
        if (halves > 1) _tile_zero(2);
        if (halves > 1 && panels > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (panels > 1) _tile_loadd(1, s1, 64);
        if (halves > 1) _tile_loadd(2, s2, 64);
        if (halves > 1 && panels > 1) _tile_loadd(3, s3, 64);
    }
    for (int i = 0; i < groups; i++) {
        _tile_loadd(6, w, 64);
        _tile_loadd(4, x, stride);
        _tile_dpbsud(0, 4, 6);
        if (panels > 1) {
            _tile_loadd(7, w + panel_bytes, 64);
            _tile_dpbsud(1, 4, 7);
        }
        if (halves > 1) {
            _tile_loadd(5, x + TILE_ROWS * stride, stride);
            _tile_dpbsud(2, 5, 6);
            if (panels > 1) _tile_dpbsud(3, 5, 7);
        }
        for (int l = 0; l < lines; l++, ahead += 64) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        w += 1024;
        x += 64;
    }
    _tile_stored(0, sums, 64);
    if (panels > 1) _tile_stored(1, s1, 64);
    if (halves > 1) _tile_stored(2, s2, 64);
    if (halves > 1 && panels > 1) _tile_stored(3, s3, 64);
}

static void finish(const struct amber_gemm_w8a8 *g, int row, int rows, int panel, const int32_t *sums) {
    const int o = panel * AMBER_PANEL, left = g->w.n_out - o;
    const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    const __m512 scale = _mm512_loadu_ps(g->w.scale + o);
    const __m512 bias = g->w.bias ? _mm512_loadu_ps(g->w.bias + o) : _mm512_setzero_ps();
    float *y = g->y + row * g->ldy + o;
    for (int r = 0; r < rows; r++, y += g->ldy, sums += 16) {
        __m512i acc = _mm512_sub_epi32(_mm512_load_si512(sums),
                                       _mm512_set1_epi32(128 * g->a.sum[row + r]));
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc),
                                 _mm512_mul_ps(_mm512_set1_ps(g->a.scale[row + r]), scale));
        if (g->w.bias) v = _mm512_add_ps(v, bias);
        if (g->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), v);
        _mm512_mask_storeu_ps(y, mask, v);
    }
}

static void block(const struct amber_gemm_w8a8 *g, int panel, int panels, int row0, int row1, bool last_rows) {
    _Alignas(64) int32_t sums[ROW_BLOCK / BLOCK_ROWS * STEP_SUMS * (PANELS / 2)];
    const int64_t stride = g->a.stride, panel_bytes = (int64_t)g->w.k_pad * AMBER_PANEL;
    const int blocks = (row1 - row0 + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int lines = last_rows ? (8 * PANELS + blocks - 1) / blocks : 0;
    for (int k0 = 0; k0 < g->w.k_pad; k0 += K_BLOCK) {
        int width = g->w.k_pad - k0 < K_BLOCK ? g->w.k_pad - k0 : K_BLOCK;
        const uint8_t *w = g->w.q + panel * panel_bytes + (int64_t)k0 * AMBER_PANEL;
        int32_t *s = sums;
        int order = 0;
        for (int row = row0; row < row1; row += BLOCK_ROWS) {
            int rows = row1 - row < BLOCK_ROWS ? row1 - row : BLOCK_ROWS;
            const int8_t *x = g->a.q + row * stride + k0;
            if (rows < BLOCK_ROWS) configure(rows);
            for (int p = 0; p < panels; p += 2, s += STEP_SUMS, order++) {
                const uint8_t *wp = w + p * panel_bytes;
                int part = order * (width / 64) * lines * 64; /* bytes */
                const uint8_t *ahead = w + PANELS * panel_bytes + part / (width * 16) * panel_bytes + part % (width * 16);
                if (rows <= TILE_ROWS) {
                    if (panels - p == 1) {
                        step(wp, panel_bytes, x, stride, width / 64, s, k0 == 0, ahead, lines, 1, 1);
                    } else {
                        step(wp, panel_bytes, x, stride, width / 64, s, k0 == 0, ahead, lines, 1, 2);
                    }
                } else if (panels - p == 1) {
                    step(wp, panel_bytes, x, stride, width / 64, s, k0 == 0, ahead, lines, 2, 1);
                } else {
                    step(wp, panel_bytes, x, stride, width / 64, s, k0 == 0, ahead, lines, 2, 2);
                }
                if (k0 + width < g->w.k_pad) continue;
                for (int half = 0; half < 2; half++) {
                    int n = rows - half * TILE_ROWS < TILE_ROWS ? rows - half * TILE_ROWS : TILE_ROWS;
                    for (int q = 0; q < 2 && q < panels - p && n > 0; q++)
                        finish(g, row + half * TILE_ROWS, n, panel + p + q, s + (half * 2 + q) * 256);
                }
            }
            if (rows < BLOCK_ROWS) configure(BLOCK_ROWS);
        }
    }
}

void amber_gemm_w8a8_amx(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    if (g->a.rows <= FEW_ROWS) {
        amber_gemm_w8a8_avx512vnni(g, panel0, panel1);
        return;
    }
    configure(BLOCK_ROWS);
    int sweep = (int)(SW / g->a.stride) / 32 * 32; if (sweep < 32) sweep = 32;
    for (int s0 = 0; s0 < g->a.rows; s0 += sweep) {
        int s1 = g->a.rows - s0 < sweep ? g->a.rows : s0 + sweep;
        for (int panel = panel0; panel < panel1; panel += PANELS)
            for (int row = s0; row < s1; row += ROW_BLOCK)
                block(g, panel, panel1 - panel < PANELS ? panel1 - panel : PANELS, row,
                      s1 - row < ROW_BLOCK ? s1 : row + ROW_BLOCK, row + ROW_BLOCK >= s1);
    }
    _tile_release();
}

#endif
