/* gemm_amx.c: the INT8 matrix product with AMX tiles (Intel SDM volume 1, chapter 18).
 *
 * A weight panel is already a stack of B tiles: 64 inputs of 16 outputs are 16 rows of 64 bytes.
 * Activations are A tiles as they lie, 16 rows with the row stride. tdpbsud multiplies signed A by
 * unsigned B. A step is 32 rows x 2 panels: per 64 inputs it loads four tiles for four products of
 * 16 cycles each.
 *
 * The multiplier waits for lines on their way to L1, not for instructions. Measured on a core with
 * 48 KB of L1 and 2 MB of L2: the four loads of a group want 64 bytes a cycle, L2 gives 53; the
 * four tilestored of a step cost 60 to 150 cycles when the operands are in L1, and 600 to 1200 in a
 * stream from L2; and with neither results to write nor weights to fetch the loop runs at 0.5 to
 * 0.6 of the peak where it reaches 0.4 to 0.5 with both, probably as lines from and to memory hold
 * the fill buffers that loads from L2 need. What follows from it:
 *   - Up to 4096 inputs the sums stay in tiles. Longer rows are cut into blocks of 512 inputs,
 *     whose two panels (16 KB) stay in L1 for a sweep; the sums wait in a buffer in between.
 *   - Results of a step become float between the tile products of the next one: the vector units
 *     idle there, and the stores come a few at a time. 32 rows of both panels at once fill whole
 *     pairs of lines.
 *   - Results that L2 could not keep are streamed: no line is read to be overwritten.
 *   - What results are added to is fetched to L2 a step ahead.
 *   - Rows of a sweep are few enough that they stay in L2 beside the weights passing by.
 *   - The weights of the next block are fetched to L2, evenly spread over the steps of this one.
 * One thread, T = 512, ratio to the register-only peak for (N, K) = (2048, 2048), (8192, 2048),
 * (2048, 8192): 0.42 to 0.50, 0.43 to 0.49, 0.41 to 0.44. Without these measures: 0.28, 0.27, 0.34.
 * Up to about 64 rows the rate at which weights come from memory is the limit. */
#if defined(__x86_64__)
#include "columns.h"

#include <immintrin.h>

enum {
    FEW_ROWS = 16, /* up to here the vector kernel is faster: both wait for the weights */
    TILE_ROWS = 16,
    STEP_ROWS = 32,
    PANELS = 2,
    SUMS = TILE_ROWS * AMBER_PANEL, /* of one tile */
    STEP_SUMS = 2 * PANELS * SUMS,
    SWEEP_ROWS = 256,
    SWEEP_BYTES = 5 << 18, /* activations that are passed over per sweep of the weights */
    WHOLE_K = 4096,        /* up to here the inputs are not cut */
    K_BLOCK = 512,
    STREAM_BYTES = 4 << 20 /* results of a call, from here on past the caches */
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

/* The sums of a step, complete, on their way to y. */
struct result {
    const int32_t *sums; /* [half, panel, 16 rows, 16 outputs] */
    int row, rows, done; /* done of the rows from row on are written */
    int panel, panels;
    bool simple; /* all outputs of both panels exist; neither shift nor bias */
    bool stream;
};

static inline __attribute__((always_inline)) void
finish_rows(const struct amber_gemm_w8a8 *g, const struct result *f, int end, const bool simple) {
    const bool add = g->add, stream = f->stream;
    const int o = f->panel * AMBER_PANEL, panels = simple ? PANELS : f->panels;
    const int64_t ldy = g->ldy;
    const int32_t *x_sum = g->a.sum + f->row;
    const float *x_scale = g->a.scale + f->row;
    float *y = g->y + (f->row + f->done) * ldy + o;
    __mmask16 exist[PANELS] = {0xffff, 0xffff};
    __m512 scale[PANELS] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int p = 0; p < panels; p++) {
        const int left = g->w.n_out - o - p * AMBER_PANEL;
        if (!simple && left < AMBER_PANEL) exist[p] = (__mmask16)((1u << left) - 1);
        scale[p] = _mm512_loadu_ps(g->w.scale + o + p * AMBER_PANEL);
    }
    for (int r = f->done; r < end; r++, y += ldy) {
        const int32_t *sums = f->sums + r / TILE_ROWS * PANELS * SUMS + r % TILE_ROWS * AMBER_PANEL;
        /* The weights are stored as w + 128: take 128 * sum(x) off. */
        const __m512i offset = _mm512_slli_epi32(_mm512_set1_epi32(x_sum[r]), 7);
        const __m512 row_scale = _mm512_set1_ps(x_scale[r]);
        for (int p = 0; p < panels; p++) {
            const int at = p * AMBER_PANEL;
            __m512i acc = _mm512_sub_epi32(_mm512_load_si512(sums + p * SUMS), offset);
            __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_mul_ps(row_scale, scale[p]));
            if (!simple && g->a.shift)
                v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_set1_ps(g->a.shift[f->row + r]),
                                                   _mm512_loadu_ps(g->w.sum + o + at)));
            if (!simple && g->w.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(g->w.bias + o + at));
            if (add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(exist[p], y + at), v);
            if (simple && stream)
                _mm512_stream_ps(y + at, v);
            else
                _mm512_mask_storeu_ps(y + at, exist[p], v);
        }
    }
}

/* Writes up to `rows` more rows of a result. */
static inline __attribute__((always_inline)) void finish(const struct amber_gemm_w8a8 *g,
                                                         struct result *f, int rows) {
    const int left = f->rows - f->done, end = f->done + (rows < left ? rows : left);
    if (left <= 0) return;
    if (f->simple)
        finish_rows(g, f, end, true);
    else
        finish_rows(g, f, end, false);
    f->done = end;
}

/* One block of inputs for up to 32 rows and 2 panels. */
struct step {
    const uint8_t *w;
    const int8_t *x;
    int64_t panel_bytes, stride;
    int32_t *sums; /* as in struct result */
    int groups;    /* of 64 inputs */
    bool first;
    const uint8_t *ahead; /* weights that are needed next: */
    int lines;            /* 64-byte lines to fetch per group */
};

/* Writes all that is left of the previous result before it stores its sums, perhaps to the same
 * place. */
static inline __attribute__((always_inline)) void step(const struct amber_gemm_w8a8 *g,
                                                       const struct step *s, struct result *f,
                                                       const int halves, const int panels) {
    const uint8_t *w = s->w, *ahead = s->ahead;
    const int8_t *x = s->x;
    const int64_t panel_bytes = s->panel_bytes, stride = s->stride;
    const int slice = (f->rows - f->done + s->groups - 1) / s->groups;
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
        finish(g, f, slice);
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

/* Rows row0..row1-1 (at most SWEEP_ROWS) of one or two panels. *f is what the call before left to
 * be written, and then what this one leaves. */
static void block(const struct amber_gemm_w8a8 *g, int panel, int panels, int row0, int row1,
                  bool stream, int32_t *sums, struct result *f) {
    const int k_pad = g->w.k_pad, steps = (row1 - row0 + STEP_ROWS - 1) / STEP_ROWS;
    const int k_block = k_pad > WHOLE_K && steps > 1 ? K_BLOCK : k_pad;
    const bool simple = panels == PANELS && (panel + PANELS) * AMBER_PANEL <= g->w.n_out &&
                        !g->a.shift && !g->w.bias;
    struct step s = {.panel_bytes = (int64_t)k_pad * AMBER_PANEL, .stride = g->a.stride};
    const uint8_t *w = g->w.q + panel * s.panel_bytes;
    for (int k0 = 0; k0 < k_pad; k0 += k_block) {
        const int width = k_pad - k0 < k_block ? k_pad - k0 : k_block;
        const bool last = k0 + width == k_pad;
        const int64_t panel_part = (int64_t)width * AMBER_PANEL;
        const uint8_t *next =
            last ? w + PANELS * s.panel_bytes : w + (int64_t)(k0 + width) * AMBER_PANEL;
        s.first = k0 == 0;
        s.groups = width / 64;
        s.w = w + (int64_t)k0 * AMBER_PANEL;
        s.lines = (TILE_ROWS * PANELS + steps - 1) / steps;
        for (int i = 0; i < steps; i++) {
            const int row = row0 + i * STEP_ROWS;
            const int rows = row1 - row < STEP_ROWS ? row1 - row : STEP_ROWS;
            const int64_t share = (int64_t)i * s.groups * s.lines * 64;
            s.ahead = next + share / panel_part * s.panel_bytes + share % panel_part;
            s.x = g->a.q + row * s.stride + k0;
            s.sums = width == k_pad ? sums : sums + i * STEP_SUMS;
            if (last && g->add) { /* what is added to comes to L2 while the sums grow */
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < panels; p++)
                        _mm_prefetch(
                            (const char *)(g->y + (row + r) * g->ldy + (panel + p) * AMBER_PANEL),
                            _MM_HINT_T1);
            }
            if (rows < STEP_ROWS) configure(rows);
            switch ((rows > TILE_ROWS) * 2 + panels) {
            case 1:
                step(g, &s, f, 1, 1);
                break;
            case 2:
                step(g, &s, f, 1, 2);
                break;
            case 3:
                step(g, &s, f, 2, 1);
                break;
            default:
                step(g, &s, f, 2, 2);
            }
            if (rows < STEP_ROWS) configure(STEP_ROWS);
            if (last) *f = (struct result){s.sums, row, rows, 0, panel, panels, simple, stream};
        }
    }
}

void amber_gemm_w8a8_amx(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    _Alignas(64) int32_t sums[SWEEP_ROWS / STEP_ROWS * STEP_SUMS];
    struct result f = {.sums = sums};
    const int rows = g->a.rows;
    if (rows <= FEW_ROWS) {
        amber_gemm_w8a8_avx512vnni(g, panel0, panel1);
        return;
    }
    const bool stream = !g->add && ((uintptr_t)g->y | (uintptr_t)g->ldy * sizeof *g->y) % 64 == 0 &&
                        (int64_t)rows * (panel1 - panel0) * AMBER_PANEL * 4 >= STREAM_BYTES;
    int most = (int)(SWEEP_BYTES / g->a.stride) / STEP_ROWS * STEP_ROWS;
    most = most < STEP_ROWS ? STEP_ROWS : most > SWEEP_ROWS ? SWEEP_ROWS : most;
    const int sweeps = (rows + most - 1) / most; /* of about equal height */
    const int sweep = ((rows + sweeps - 1) / sweeps + STEP_ROWS - 1) / STEP_ROWS * STEP_ROWS;
    configure(STEP_ROWS);
    for (int row0 = 0; row0 < rows; row0 += sweep) {
        const int row1 = rows - row0 < sweep ? rows : row0 + sweep;
        for (int panel = panel0; panel < panel1; panel += PANELS)
            block(g, panel, panel1 - panel < PANELS ? 1 : PANELS, row0, row1, stream, sums, &f);
    }
    finish(g, &f, STEP_ROWS);
    _tile_release();
    if (stream) _mm_sfence(); /* streamed stores are not ordered with what tells others of them */
}

#endif
