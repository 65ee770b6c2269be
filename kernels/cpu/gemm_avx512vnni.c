/* gemm_avx512vnni.c: the INT8 matrix product with 512-bit vpdpbusd.
 *
 * The tile is 6 rows x 4 panels: 24 accumulators hide the latency of 5 cycles at two instructions a
 * cycle, and 4 weight loads + 6 broadcasts feed 24 products, far from the two loads a cycle that
 * 512-bit code gets. The inputs are cut into blocks of 512, so that a block of 4 panels (32 KB)
 * stays in L1 while all row tiles of a row block pass over it; the row block's sums wait in between
 * in a buffer on the stack. */
#if defined(__x86_64__)
#include "columns.h"
#include "unroll.h"

#include <immintrin.h>
#include <string.h>

enum {
    ROWS = 6,
    PANELS = 4,
    FEW_ROWS = 12, /* that still wait for weights from memory */
    K_BLOCK = 512,
    ROW_BLOCK = 96,
    L2_ROWS_BYTES = 5 << 17, /* activations that are passed over per sweep of the weights */
    AHEAD = 1024             /* bytes: about 100 ns of prefetch when weights come from memory */
};

/* Weights fetched ahead while a tile runs: this block's own, further on (the block is read for the
 * first time); 64 bytes per 4 inputs of `ahead` to L1 or to L2. */
enum prefetch { STREAM, TO_L1, TO_L2 };

/* What a tile needs of the call, and its place. */
struct tile {
    const struct amber_gemm_w8a8 *g;
    const uint8_t *w;     /* the first panel at the first input of the block */
    const int8_t *x;      /* the first row at the first input of the block */
    const uint8_t *ahead; /* 64 bytes of it are prefetched per 4 inputs */
    int32_t *sums;        /* [rows, PANELS, 16], kept between blocks of inputs */
    int row, panel, gap;  /* gap: from each panel of the tile to the next */
    int groups;           /* of 4 inputs */
    bool first, last;     /* block of inputs */
};

/* The tile with constant sizes. The accumulators must be local to the function that loops: as an
 * array reference in a helper gcc 12 spills them. */
static inline __attribute__((always_inline)) void
tile_of(const struct tile *t, const int rows, const int panels, const enum prefetch prefetch) {
    const struct amber_gemm_w8a8 *g = t->g;
    const int64_t stride = g->a.stride, panel_bytes = (int64_t)g->w.k_pad * AMBER_PANEL * t->gap;
    const uint8_t *w = t->w, *ahead = t->ahead;
    const int8_t *x = t->x;
    __m512i acc[FEW_ROWS][PANELS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        /* The weights are stored as w + 128: take 128 * sum(x) off. */
        __m512i start = _mm512_set1_epi32(-128 * g->a.sum[t->row + r]);
        UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = t->first ? start : _mm512_load_si512(t->sums + (r * PANELS + p) * 16);
    }
    if (t->last) { /* the results' lines arrive while the sums grow */
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < panels; p++)
                __builtin_prefetch(
                    g->y + (t->row + r) * g->ldy + (t->panel + p * t->gap) * AMBER_PANEL, 1);
    }
    for (int i = 0; i < t->groups; i++) {
        __m512i wv[PANELS];
        UNROLL
        for (int p = 0; p < panels; p++) {
            wv[p] = _mm512_load_si512(w + p * panel_bytes);
            if (prefetch == STREAM)
                _mm_prefetch((const char *)(w + p * panel_bytes + AHEAD), _MM_HINT_T0);
        }
        if (prefetch == TO_L1) _mm_prefetch((const char *)ahead, _MM_HINT_T0);
        if (prefetch == TO_L2) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        ahead += 64;
        UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            __m512i xv = _mm512_set1_epi32(four);
            UNROLL
            for (int p = 0; p < panels; p++) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], wv[p], xv);
        }
        w += 64;
        x += 4;
    }
    /* Always by way of memory: with the results' arithmetic here compilers lose the registers. */
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int p = 0; p < panels; p++)
            _mm512_store_si512(t->sums + (r * PANELS + p) * 16, acc[r][p]);
    }
}

#define TILE(rows, panels)                                                                         \
    static __attribute__((noinline)) void tile_##rows##x##panels(const struct tile *t) {           \
        tile_of(t, rows, panels, STREAM);                                                          \
    }
/* clang-format off */
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3) TILE(rows, 4)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
TILE(7, 1) TILE(7, 2) TILE(8, 1) TILE(8, 2) TILE(9, 1) TILE(9, 2) TILE(10, 1) TILE(10, 2)
TILE(11, 1) TILE(11, 2) TILE(12, 1) TILE(12, 2)
    /* clang-format on */

    static __attribute__((noinline)) void tile_to_l1(const struct tile *t) {
    tile_of(t, ROWS, PANELS, TO_L1);
}

static __attribute__((noinline)) void tile_to_l2(const struct tile *t) {
    tile_of(t, ROWS, PANELS, TO_L2);
}

typedef void (*tile_fn)(const struct tile *t);
#define ROW_OF(rows) {tile_##rows##x1, tile_##rows##x2, tile_##rows##x3, tile_##rows##x4}
#define TWO_OF(rows) {tile_##rows##x1, tile_##rows##x2}
static const tile_fn tile_fns[FEW_ROWS][PANELS] = {ROW_OF(1), ROW_OF(2),  ROW_OF(3),  ROW_OF(4),
                                                   ROW_OF(5), ROW_OF(6),  TWO_OF(7),  TWO_OF(8),
                                                   TWO_OF(9), TWO_OF(10), TWO_OF(11), TWO_OF(12)};

/* The results of a tile whose sums are complete. */
static void finish(const struct tile *t, int rows, int panels) {
    const struct amber_gemm_w8a8 *g = t->g;
    const __m512 none = _mm512_setzero_ps();
    for (int p = 0; p < panels; p++) {
        const int o = (t->panel + p * t->gap) * AMBER_PANEL, left = g->w.n_out - o;
        const __mmask16 exist = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        const __m512 scale = _mm512_loadu_ps(g->w.scale + o);
        const __m512 sum = g->a.shift ? _mm512_loadu_ps(g->w.sum + o) : none;
        const __m512 bias = g->w.bias ? _mm512_loadu_ps(g->w.bias + o) : none;
        for (int r = 0; r < rows; r++) {
            float *y = g->y + (t->row + r) * g->ldy + o;
            const float row_scale = g->a.scale[t->row + r];
            __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(t->sums + (r * PANELS + p) * 16));
            v = _mm512_mul_ps(v, _mm512_mul_ps(_mm512_set1_ps(row_scale), scale));
            if (g->a.shift)
                v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_set1_ps(g->a.shift[t->row + r]), sum));
            if (g->w.bias) v = _mm512_add_ps(v, bias);
            if (g->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(exist, y), v);
            _mm512_mask_storeu_ps(y, exist, v);
        }
    }
}

/* One tile of rows, and so a call that waits for the weights, each of which it reads once. The panels
 * of a tile, as many as there are registers for, are far apart: forward streams in different pages of
 * memory are read faster than one. */
static void few_rows(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows, most = rows <= ROWS ? PANELS : PANELS / 2;
    const int count = panel1 - panel0, part = count / most, rest = count % most;
    _Alignas(64) int32_t sums[FEW_ROWS * PANELS * 16];
    struct tile t = {.g = g, .x = g->a.q, .sums = sums, .first = true, .last = true};
    t.groups = g->w.k_pad / 4;
    t.gap = part;
    for (int i = 0; i < part + (rest > 0); i++) {
        if (i == part) t.gap = 1;
        t.panel = i < part ? panel0 + i : panel1 - rest;
        t.w = g->w.q + (int64_t)t.panel * AMBER_PANEL * g->w.k_pad;
        int panels = i < part ? most : rest;
        tile_fns[rows - 1][panels - 1](&t);
        finish(&t, rows, panels);
    }
}

/* Rows row0..row1-1 (at most ROW_BLOCK) of `panels` panels. */
static void block(const struct amber_gemm_w8a8 *g, int panel, int panels, int row0, int row1,
                  bool last_rows) {
    _Alignas(64) int32_t sums[ROW_BLOCK * PANELS * 16];
    const int k_pad = g->w.k_pad, tiles = (row1 - row0 + ROWS - 1) / ROWS;
    const int64_t panel_bytes = (int64_t)k_pad * AMBER_PANEL;
    for (int k0 = 0; k0 < k_pad; k0 += K_BLOCK) {
        int width = k_pad - k0 < K_BLOCK ? k_pad - k0 : K_BLOCK;
        struct tile t = {.g = g, .panel = panel, .gap = 1, .groups = width / 4};
        t.first = k0 == 0;
        t.last = k0 + width == k_pad;
        t.w = g->w.q + panel * panel_bytes + (int64_t)k0 * AMBER_PANEL;
        const uint8_t *next_block = t.w + (int64_t)K_BLOCK * AMBER_PANEL;
        const uint8_t *next_panels = t.w + (last_rows ? PANELS * panel_bytes : 0);
        for (int i = 0; i < tiles; i++) {
            int rows = row1 - row0 - i * ROWS < ROWS ? row1 - row0 - i * ROWS : ROWS;
            t.row = row0 + i * ROWS;
            t.x = g->a.q + t.row * g->a.stride + k0;
            t.sums = sums + i * ROWS * PANELS * 16;
            if (i > 0 && rows == ROWS && panels == PANELS) {
                if (i >= tiles - PANELS) {
                    t.ahead = next_block + (i - (tiles - PANELS)) * panel_bytes;
                    tile_to_l1(&t);
                } else {
                    t.ahead = i <= PANELS ? next_panels + (i - 1) * panel_bytes : t.w;
                    tile_to_l2(&t);
                }
            } else {
                tile_fns[rows - 1][panels - 1](&t);
            }
            if (t.last) finish(&t, rows, panels);
        }
    }
}

/* The size of equal parts of n, in whole tiles, none above `most` (but at least one tile). */
static int share(int n, int most) {
    most = most < ROWS ? ROWS : most / ROWS * ROWS;
    int parts = (n + most - 1) / most;
    return ((n + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
}

void amber_gemm_w8a8_avx512vnni(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows;
    if (rows <= FEW_ROWS) {
        few_rows(g, panel0, panel1);
        return;
    }
    const int sweep = share(rows, (int)(L2_ROWS_BYTES / g->a.stride));
    for (int sweep0 = 0; sweep0 < rows; sweep0 += sweep) {
        const int sweep1 = rows - sweep0 < sweep ? rows : sweep0 + sweep;
        const int step = share(sweep1 - sweep0, ROW_BLOCK);
        for (int panel = panel0; panel < panel1; panel += PANELS) {
            int panels = panel1 - panel < PANELS ? panel1 - panel : PANELS;
            for (int row = sweep0; row < sweep1; row += step)
                block(g, panel, panels, row, sweep1 - row < step ? sweep1 : row + step,
                      row + step >= sweep1);
        }
    }
}

#endif
