/* gemm_amx.c: the INT8 matrix product with AMX tiles (Intel SDM volume 1, chapter 18).
 *
 * A weight panel is already a stack of B tiles: 64 inputs of 16 outputs are 16 rows of 64 bytes.
 * Activations are A tiles as they lie, 16 rows with the row stride. tdpbsud multiplies signed A by
 * unsigned B. A step of 32 rows x 2 panels loads four tiles for four products of 16 cycles: from L1
 * that keeps the multiplier busy, from L2 it would not. So the inputs are cut into blocks of 512,
 * whose two panels (16 KB) and 32 rows (16 KB) stay in L1; the sums of a row block wait in between
 * in a buffer on the stack. */
#if defined(__x86_64__)
#include "columns.h"

#include <immintrin.h>

enum {
    FEW_ROWS = 16, /* up to here the vector kernel is faster: both wait for the weights */
    TILE_ROWS = 16,
    STEP_ROWS = 32,
    PANELS = 2,
    K_BLOCK = 512,
    ROW_BLOCK = 256,
    SUMS = TILE_ROWS * AMBER_PANEL, /* of one tile */
    SWEEP_BYTES = 1 << 20           /* activations that are passed over per sweep of the weights */
};

/* Tiles 0..3 are sums [half * 2 + panel], 4 and 5 the halves of the rows, 6 and 7 the weights. */
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
    if (lower) config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)lower;
    /* gcc 12 takes only the first eight bytes for read and would drop the other stores. */
    __asm__ volatile("" : : "m"(config) : "memory");
    _tile_loadconfig(&config);
}

/* One block of inputs for up to 32 rows and 2 panels. */
struct step {
    const uint8_t *w;
    const int8_t *x;
    int64_t panel_bytes, stride;
    int32_t *sums; /* [half, panel, 16 rows, 16 outputs] */
    int groups;    /* of 64 inputs */
    bool first;
    const uint8_t *ahead; /* weights that the next panels will need, fetched to L2: */
    int lines;            /* 64-byte lines per group */
};

static inline __attribute__((always_inline)) void step(const struct step *s, const int halves,
                                                       const int panels) {
    const uint8_t *w = s->w, *ahead = s->ahead;
    const int8_t *x = s->x;
    const int64_t panel_bytes = s->panel_bytes, stride = s->stride;
    if (s->first) {
        _tile_zero(0);
        if (panels > 1) _tile_zero(1);
        if (halves > 1) _tile_zero(2);
        if (halves > 1 && panels > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, s->sums, 64);
        if (panels > 1) _tile_loadd(1, s->sums + SUMS, 64);
        if (halves > 1) _tile_loadd(2, s->sums + 2 * SUMS, 64);
        if (halves > 1 && panels > 1) _tile_loadd(3, s->sums + 3 * SUMS, 64);
    }
    for (int i = 0; i < s->groups; i++) {
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
        for (int l = 0; l < s->lines; l++, ahead += 64)
            _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        w += 64 * AMBER_PANEL;
        x += 64;
    }
    _tile_stored(0, s->sums, 64);
    if (panels > 1) _tile_stored(1, s->sums + SUMS, 64);
    if (halves > 1) _tile_stored(2, s->sums + 2 * SUMS, 64);
    if (halves > 1 && panels > 1) _tile_stored(3, s->sums + 3 * SUMS, 64);
}

static void finish(const struct amber_gemm_w8a8 *g, int row, int rows, int panel,
                   const int32_t *sums) {
    const int o = panel * AMBER_PANEL, left = g->w.n_out - o;
    const __mmask16 exist = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    const __m512 scale = _mm512_loadu_ps(g->w.scale + o), none = _mm512_setzero_ps();
    const __m512 bias = g->w.bias ? _mm512_loadu_ps(g->w.bias + o) : none;
    const __m512 w_sum = g->a.shift ? _mm512_loadu_ps(g->w.sum + o) : none;
    float *y = g->y + row * g->ldy + o;
    for (int r = 0; r < rows; r++, y += g->ldy, sums += AMBER_PANEL) {
        /* The weights are stored as w + 128: take 128 * sum(x) off. */
        __m512i acc =
            _mm512_sub_epi32(_mm512_load_si512(sums), _mm512_set1_epi32(128 * g->a.sum[row + r]));
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc),
                                 _mm512_mul_ps(_mm512_set1_ps(g->a.scale[row + r]), scale));
        if (g->a.shift)
            v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_set1_ps(g->a.shift[row + r]), w_sum));
        if (g->w.bias) v = _mm512_add_ps(v, bias);
        if (g->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(exist, y), v);
        _mm512_mask_storeu_ps(y, exist, v);
    }
}

/* Rows row0..row1-1 (at most ROW_BLOCK) of one or two panels. */
static void block(const struct amber_gemm_w8a8 *g, int panel, int panels, int row0, int row1) {
    _Alignas(64) int32_t sums[ROW_BLOCK / STEP_ROWS * 4 * SUMS];
    const int k_pad = g->w.k_pad, steps = (row1 - row0 + STEP_ROWS - 1) / STEP_ROWS;
    struct step s = {.panel_bytes = (int64_t)k_pad * AMBER_PANEL, .stride = g->a.stride};
    for (int k0 = 0; k0 < k_pad; k0 += K_BLOCK) {
        const int width = k_pad - k0 < K_BLOCK ? k_pad - k0 : K_BLOCK;
        const bool last = k0 + width == k_pad;
        s.first = k0 == 0;
        s.groups = width / 64;
        s.w = g->w.q + panel * s.panel_bytes + (int64_t)k0 * AMBER_PANEL;
        s.lines = (TILE_ROWS * PANELS + steps - 1) / steps;
        for (int i = 0; i < steps; i++) {
            const int row = row0 + i * STEP_ROWS;
            const int rows = row1 - row < STEP_ROWS ? row1 - row : STEP_ROWS;
            /* This step's share of the same block of the next panels. */
            int64_t share = (int64_t)i * s.groups * s.lines * 64, panel_part = width * AMBER_PANEL;
            s.ahead = s.w + (PANELS + share / panel_part) * s.panel_bytes + share % panel_part;
            s.x = g->a.q + row * s.stride + k0;
            s.sums = sums + i * 4 * SUMS;
            if (last) { /* the results' lines arrive while the sums grow */
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < panels; p++)
                        __builtin_prefetch(g->y + (row + r) * g->ldy + (panel + p) * AMBER_PANEL,
                                           1);
            }
            if (rows < STEP_ROWS) configure(rows);
            switch ((rows > TILE_ROWS) * 2 + panels) {
            case 1:
                step(&s, 1, 1);
                break;
            case 2:
                step(&s, 1, 2);
                break;
            case 3:
                step(&s, 2, 1);
                break;
            default:
                step(&s, 2, 2);
            }
            if (rows < STEP_ROWS) configure(STEP_ROWS);
            for (int t = 0; last && t < 4; t++) {
                int half_row = t / 2 * TILE_ROWS, p = t % 2;
                int n = rows - half_row < TILE_ROWS ? rows - half_row : TILE_ROWS;
                if (n > 0 && p < panels) finish(g, row + half_row, n, panel + p, s.sums + t * SUMS);
            }
        }
    }
}

void amber_gemm_w8a8_amx(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows;
    if (rows <= FEW_ROWS) {
        amber_gemm_w8a8_avx512vnni(g, panel0, panel1);
        return;
    }
    int sweep = (int)(SWEEP_BYTES / g->a.stride) / STEP_ROWS * STEP_ROWS;
    if (sweep < STEP_ROWS) sweep = STEP_ROWS;
    configure(STEP_ROWS);
    for (int row0 = 0; row0 < rows; row0 += sweep) {
        const int row1 = rows - row0 < sweep ? rows : row0 + sweep;
        for (int panel = panel0; panel < panel1; panel += PANELS)
            for (int row = row0; row < row1; row += ROW_BLOCK)
                block(g, panel, panel1 - panel < PANELS ? 1 : PANELS, row,
                      row1 - row < ROW_BLOCK ? row1 : row + ROW_BLOCK);
    }
    _tile_release();
}

#endif
