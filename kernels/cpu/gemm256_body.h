/* gemm256_body.h: the INT8 matrix product of the 256-bit columns. The including file defines
 *     ROWS            rows of a tile: ROWS * 2 accumulators and the operands fit 16 registers
 *     START(sum)      an accumulator before the first product, from the row's sum of x
 *     dot(acc, w, x)  acc[lane] += the dot product of 4 weights (w + 128) and 4 activations
 *     GEMM            the function's name
 * A tile is ROWS rows x 1 panel over all inputs. The panel is one forward stream, short enough to
 * come from L2 (and L1 up to 2048 inputs) for every row tile after the first; these fetch the next
 * panel meanwhile. */
#include "unroll.h"

#include <immintrin.h>
#include <string.h>

enum {
    SWEEP_BYTES = 1 << 19, /* activations passed over per sweep of the weights: half an L2 */
    AHEAD = 2048           /* bytes: about 100 ns of prefetch when weights come from memory */
};

static inline __m256i existing(int left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline void finish(const struct amber_gemm_w8a8 *g, int row, int o, __m256i acc) {
    float *y = g->y + row * g->ldy + o;
    int left = g->w.n_out - o;
    __m256 scale = _mm256_mul_ps(_mm256_set1_ps(g->a.scale[row]), _mm256_loadu_ps(g->w.scale + o));
    __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), scale);
    if (g->a.shift)
        v = _mm256_add_ps(
            v, _mm256_mul_ps(_mm256_set1_ps(g->a.shift[row]), _mm256_loadu_ps(g->w.sum + o)));
    if (g->w.bias) v = _mm256_add_ps(v, _mm256_loadu_ps(g->w.bias + o));
    if (left >= 8) {
        if (g->add) v = _mm256_add_ps(_mm256_loadu_ps(y), v);
        _mm256_storeu_ps(y, v);
    } else {
        __m256i mask = existing(left);
        if (g->add) v = _mm256_add_ps(_mm256_maskload_ps(y, mask), v);
        _mm256_maskstore_ps(y, mask, v);
    }
}

static inline __attribute__((always_inline)) void tile_of(const struct amber_gemm_w8a8 *g,
                                                          int panel, int row, int32_t *sums,
                                                          int64_t ahead, const int rows) {
    const int64_t stride = g->a.stride;
    const int groups = g->w.k_pad / 4;
    const uint8_t *w = g->w.q + (int64_t)panel * AMBER_PANEL * g->w.k_pad;
    const int8_t *x = g->a.q + row * stride;
    __m256i acc[ROWS][2];
    UNROLL
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = START(g->a.sum[row + r]);
    for (int i = 0; i < groups; i++) {
        __m256i w0 = _mm256_load_si256((const __m256i *)w);
        __m256i w1 = _mm256_load_si256((const __m256i *)(w + 32));
        _mm_prefetch((const char *)w + ahead, _MM_HINT_T1);
        UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            __m256i xv = _mm256_set1_epi32(four);
            acc[r][0] = dot(acc[r][0], w0, xv);
            acc[r][1] = dot(acc[r][1], w1, xv);
        }
        w += 64;
        x += 4;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        _mm256_store_si256((__m256i *)(sums + r * AMBER_PANEL), acc[r][0]);
        _mm256_store_si256((__m256i *)(sums + r * AMBER_PANEL + 8), acc[r][1]);
    }
}

#define TILE(rows)                                                                                 \
    static __attribute__((noinline)) void tile_##rows(const struct amber_gemm_w8a8 *g, int panel,  \
                                                      int row, int32_t *sums, int64_t ahead) {     \
        tile_of(g, panel, row, sums, ahead, rows);                                                 \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
#if ROWS > 4
TILE(5)
TILE(6)
#endif

static void (*const tile_fns[ROWS])(const struct amber_gemm_w8a8 *, int, int, int32_t *,
                                    int64_t) = {
    tile_1, tile_2, tile_3, tile_4,
#if ROWS > 4
    tile_5, tile_6,
#endif
};

/* ahead: from the weights in use to those to fetch to L2, bytes. */
static void tile(const struct amber_gemm_w8a8 *g, int panel, int row, int rows, int64_t ahead) {
    _Alignas(32) int32_t sums[ROWS * AMBER_PANEL];
    tile_fns[rows - 1](g, panel, row, sums, ahead);
    for (int h = 0; h < 2; h++) {
        int o = panel * AMBER_PANEL + 8 * h;
        if (o >= g->w.n_out) break;
        for (int r = 0; r < rows; r++)
            finish(g, row + r, o, _mm256_load_si256((__m256i *)(sums + r * AMBER_PANEL + 8 * h)));
    }
}

/* One row: 4 groups of inputs at a time, so that 8 accumulators cover the latency. */
static void one_row(const struct amber_gemm_w8a8 *g, int panel) {
    const uint8_t *w = g->w.q + (int64_t)panel * AMBER_PANEL * g->w.k_pad;
    __m256i acc[4][2];
    for (int j = 0; j < 4; j++)
        acc[j][0] = acc[j][1] = j ? _mm256_setzero_si256() : START(g->a.sum[0]);
    for (int k = 0; k < g->w.k_pad; k += 16) {
        UNROLL
        for (int j = 0; j < 4; j++, w += 64) {
            int32_t four;
            memcpy(&four, g->a.q + k + 4 * j, 4);
            __m256i xv = _mm256_set1_epi32(four);
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            acc[j][0] = dot(acc[j][0], _mm256_load_si256((const __m256i *)w), xv);
            acc[j][1] = dot(acc[j][1], _mm256_load_si256((const __m256i *)(w + 32)), xv);
        }
    }
    for (int h = 0; h < 2; h++) {
        int o = panel * AMBER_PANEL + 8 * h;
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(acc[0][h], acc[1][h]),
                                       _mm256_add_epi32(acc[2][h], acc[3][h]));
        if (o < g->w.n_out) finish(g, 0, o, sum);
    }
}

void GEMM(const struct amber_gemm_w8a8 *g, int panel0, int panel1) {
    const int rows = g->a.rows;
    int sweep = (int)(SWEEP_BYTES / g->a.stride) / ROWS * ROWS;
    if (sweep < ROWS) sweep = ROWS;
    for (int sweep0 = 0; sweep0 < rows; sweep0 += sweep) {
        int sweep1 = rows - sweep0 < sweep ? rows : sweep0 + sweep;
        /* Equal tiles: 8 rows are 4 + 4, as few sums would wait for each other in 6 + 2. */
        int tiles = (sweep1 - sweep0 + ROWS - 1) / ROWS,
            step = (sweep1 - sweep0 + tiles - 1) / tiles;
        for (int panel = panel0; panel < panel1; panel++) {
            if (rows == 1) {
                one_row(g, panel);
                continue;
            }
            for (int row = sweep0; row < sweep1; row += step)
                tile(g, panel, row, sweep1 - row < step ? sweep1 - row : step,
                     row == sweep0 ? AHEAD : (int64_t)g->w.k_pad * AMBER_PANEL);
        }
    }
}
