/* sparse_gemm_body.h: the product over lists. The including file has vec_*.h and defines
 *     NAME(operation)
 *     PANELS          panels of a tile; 2 rows of their sums fit the registers
 *     WINDOWS         windows of a block: PANELS panels of it stay in L1
 *     START(sum)      an accumulator before the first product, from the row's sum of x
 *     weights, weights_at(p)   a vector of weights, in the form that dot() wants
 *     dot(acc, w, x)  acc[lane] += the dot product of 4 weights (w + 128) and 4 activations
 *     broadcast(x), sums_load(p), sums_store(p, v), floats(v)
 *
 * A tile is one pair of rows x PANELS panels over one block of inputs. All pairs of a block of rows
 * pass over the weights while these are in L1; their sums wait in between in a buffer on the stack. */
#include "../sparse_gemm.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    PER = AMBER_PANEL / VL,     /* vectors of a panel */
    VECTORS = PANELS * PER,     /* of a row in a tile */
    PAIR_BLOCK = 48,
    PAIR_SUMS = 2 * PANELS * AMBER_PANEL,
    PANEL_WINDOW = AMBER_NM_WINDOW * AMBER_PANEL, /* bytes */
    LISTS_BYTES = 3 << 18       /* lists that are passed over per sweep of the weights */
};

/* Weights fetched ahead while a tile runs, a line per entry. */
enum prefetch { NONE, TO_L1, TO_L2 };

struct tile {
    const struct amber_gemm_w8a8 *g;
    const uint8_t *w;      /* the first panel at the first input of the block */
    const uint8_t *lists;  /* the pair's, at the block */
    const uint8_t *common; /* the pair's counts, at the block */
    const uint8_t *ahead;
    int32_t *sums;         /* [2, VECTORS, VL], kept between blocks */
    int keep, groups;      /* groups of 16 quads in the block */
    int row, rows, panel;
    bool first, last;      /* block of inputs */
};

INLINE void finish(const struct amber_gemm_w8a8 *g, int row, int o, vi acc) {
    const int left = g->w.n_out - o;
    if (left <= 0) return;
    float *y = g->y + row * g->ldy + o;
    vf v = v_mul(floats(acc), v_mul(v_set1(g->a.scale[row]), v_load(g->w.scale + o)));
    if (g->a.shift) v = v_add(v, v_mul(v_set1(g->a.shift[row]), v_load(g->w.sum + o)));
    if (g->w.bias) v = v_add(v, v_load(g->w.bias + o));
    if (left >= VL) {
        v_store(y, g->add ? v_add(v_load(y), v) : v);
    } else {
        v_store_n(y, g->add ? v_add(v_load_n(y, left), v) : v, left);
    }
}

/* The tile with a constant size. The accumulators must be local to the function that loops: as an
 * array reference in a helper gcc 12 spills them. */
INLINE void tile_of(const struct tile *t, const int panels, const enum prefetch prefetch) {
    const struct amber_gemm_w8a8 *g = t->g;
    const int64_t panel_bytes = (int64_t)g->w.k_pad * AMBER_PANEL;
    const int vectors = panels * PER;
    const uint8_t *ahead = t->ahead, *w = t->w, *chunk = t->lists;
    vi a[VECTORS], b[VECTORS];
    if (t->first) {
        vi sa = START(g->a.sum[t->row]);
        vi sb = START(t->rows == 2 ? g->a.sum[t->row + 1] : 0);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            a[v] = sa;
            b[v] = sb;
        }
    } else {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            a[v] = sums_load(t->sums + v * VL);
            b[v] = sums_load(t->sums + (VECTORS + v) * VL);
        }
    }
    if (t->last) { /* the results' lines arrive while the sums grow */
        for (int p = 0; p < panels; p++) {
            float *y = g->y + t->row * g->ldy + (t->panel + p) * AMBER_PANEL;
            __builtin_prefetch(y, 1);
            if (t->rows == 2) __builtin_prefetch(y + g->ldy, 1);
        }
    }
    for (int done = 0; done < t->groups; done += 4) {
        const int groups = WINDOWS == 1 || t->groups - done < 4 ? t->groups - done : 4;
        const int64_t entries = groups * t->keep, common = t->common[done / 4];
        const int32_t *xa = (const int32_t *)(const void *)chunk, *xb = xa + entries;
        const uint16_t *oa = (const uint16_t *)(const void *)(xb + entries), *ob = oa + entries;
        int64_t i = 0;
        for (; i < common; i++) {
            const uint8_t *p = w + oa[i];
            const vi x = broadcast(xa[i]), z = broadcast(xb[i]);
            if (prefetch == TO_L1) _mm_prefetch((const char *)ahead, _MM_HINT_T0);
            if (prefetch == TO_L2) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            ahead += 64;
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                weights u = weights_at(p + v / PER * panel_bytes + v % PER * 4 * VL);
                a[v] = dot(a[v], u, x);
                b[v] = dot(b[v], u, z);
            }
        }
        for (; i < entries; i++) {
            const uint8_t *p = w + oa[i], *q = w + ob[i];
            const vi x = broadcast(xa[i]), z = broadcast(xb[i]);
            if (prefetch == TO_L1) _mm_prefetch((const char *)ahead, _MM_HINT_T0);
            if (prefetch == TO_L2) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            ahead += 64;
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                const int64_t at = v / PER * panel_bytes + v % PER * 4 * VL;
                a[v] = dot(a[v], weights_at(p + at), x);
                b[v] = dot(b[v], weights_at(q + at), z);
            }
        }
        chunk += entries * AMBER_NM_ENTRY;
        w += PANEL_WINDOW;
    }
    if (!t->last) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sums_store(t->sums + v * VL, a[v]);
            sums_store(t->sums + (VECTORS + v) * VL, b[v]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        finish(g, t->row, t->panel * AMBER_PANEL + v * VL, a[v]);
        if (t->rows == 2) finish(g, t->row + 1, t->panel * AMBER_PANEL + v * VL, b[v]);
    }
}

#define TILE(panels)                                                                               \
    static __attribute__((noinline)) void tile_##panels(const struct tile *t) {                    \
        tile_of(t, panels, NONE);                                                                  \
    }
TILE(1)
#if PANELS > 1
TILE(2)
#endif
#if PANELS > 2
TILE(3)
#endif
#if PANELS > 3
TILE(4)
TILE(5)
TILE(6)
TILE(7)
TILE(8)
#endif

static __attribute__((noinline)) void tile_to_l1(const struct tile *t) {
    tile_of(t, PANELS, TO_L1);
}
static __attribute__((noinline)) void tile_to_l2(const struct tile *t) {
    tile_of(t, PANELS, TO_L2);
}

static void (*const tile_fns[PANELS])(const struct tile *t) = {
    tile_1,
#if PANELS > 1
    tile_2,
#endif
#if PANELS > 2
    tile_3,
#endif
#if PANELS > 3
    tile_4, tile_5, tile_6, tile_7, tile_8,
#endif
};

/* Pairs pair0..pair1-1 (at most PAIR_BLOCK) of `panels` panels. */
static void block(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel, int panels,
                  int pair0, int pair1, int panels_ahead) {
    _Alignas(64) int32_t sums[PAIR_BLOCK * PAIR_SUMS];
    enum { WIDTH = WINDOWS * AMBER_NM_WINDOW };
    const int k_pad = g->w.k_pad, tiles = pair1 - pair0;
    const int64_t panel_bytes = (int64_t)k_pad * AMBER_PANEL;
    const int64_t counts = amber_nm_counts(nm->keep, k_pad);
    const uint8_t *records = nm->lists + pair0 * nm->stride;
    for (int k = 0; k < k_pad; k += WIDTH) {
        const int width = k_pad - k < WIDTH ? k_pad - k : WIDTH;
        struct tile t = {.g = g, .panel = panel, .keep = nm->keep};
        t.groups = width / AMBER_NM_GROUP;
        t.first = k == 0;
        t.last = k + width == k_pad;
        t.w = g->w.q + panel * panel_bytes + (int64_t)k * AMBER_PANEL;
        /* A tile fetches as many lines as it has entries, all of one panel. */
        const int lines = 4 * AMBER_NM_GROUP / 16 * WINDOWS, entries = t.groups * nm->keep;
        const int per_panel = (lines + entries - 1) / entries, fetching = per_panel * PANELS;
        const uint8_t *next = t.last ? NULL : t.w + (int64_t)WIDTH * AMBER_PANEL;
        const uint8_t *later = panels_ahead ? t.w + panels_ahead * panel_bytes : NULL;
        for (int i = 0; i < tiles; i++) {
            const int pair = pair0 + i;
            t.row = amber_nm_row(nm, pair);
            t.rows = amber_nm_rows(nm, pair, g->a.rows);
            t.lists = records + i * nm->stride +
                      amber_nm_entries(nm->keep, k) * AMBER_NM_ENTRY;
            t.common = records + i * nm->stride + counts + k / AMBER_NM_WINDOW;
            t.sums = sums + i * PAIR_SUMS;
            const int to_l1 = i - (tiles - fetching), which = to_l1 >= 0 ? to_l1 : i;
            const uint8_t *base = to_l1 >= 0 ? next : i < fetching ? later : NULL;
            if (base && panels == PANELS) {
                int line = which % per_panel * entries;
                line = line + entries > lines ? lines - entries : line;
                t.ahead = base + which / per_panel * panel_bytes + (line < 0 ? 0 : line) * 64;
                (to_l1 >= 0 ? tile_to_l1 : tile_to_l2)(&t);
            } else {
                tile_fns[panels - 1](&t);
            }
        }
    }
}

/* The size of equal parts of n, none above `most`. */
static int share(int64_t n, int64_t most) {
    most = most < 1 ? 1 : most;
    const int64_t parts = (n + most - 1) / most;
    return (int)((n + parts - 1) / parts);
}

void NAME(gemm_nm)(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel0,
                   int panel1) {
    const int pairs = amber_nm_pairs(g->a.rows, nm->first);
    if (panel0 >= panel1 || pairs == 0) return;
    const int sweep = share(pairs, LISTS_BYTES / nm->stride);
    for (int sweep0 = 0; sweep0 < pairs; sweep0 += sweep) {
        const int sweep1 = pairs - sweep0 < sweep ? pairs : sweep0 + sweep;
        const int step = share(sweep1 - sweep0, PAIR_BLOCK);
        for (int panel = panel0; panel < panel1; panel += PANELS) {
            const int panels = panel1 - panel < PANELS ? panel1 - panel : PANELS;
            const int ahead = panel1 - panel >= 2 * PANELS ? PANELS : 0;
            for (int pair = sweep0; pair < sweep1; pair += step) {
                const int end = sweep1 - pair < step ? sweep1 : pair + step;
                block(g, nm, panel, panels, pair, end, end == sweep1 ? ahead : 0);
            }
        }
    }
}
