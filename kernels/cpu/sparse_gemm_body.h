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
 * pass over the weights while these are in L1; their sums wait in between in a buffer on the
 * stack. */
#include "../sparse_gemm.h"
#include "unroll.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    PER = AMBER_PANEL / VL, /* vectors of a panel */
    VECTORS = PANELS * PER, /* of a row in a tile */
    PAIR_BLOCK = 64,
    PAIR_SUMS = 2 * PANELS * AMBER_PANEL,
    PANEL_WINDOW = AMBER_NM_WINDOW * AMBER_PANEL, /* bytes */
    BLOCK_LINES = WINDOWS * PANEL_WINDOW / 64,    /* cache lines of a panel in a block */
    LISTS_BYTES = 3 << 18 /* of lists that are passed over per sweep of the weights */
};

/* What the pairs of a block have in common, for one block of inputs. */
struct pass {
    const struct amber_gemm_w8a8 *g;
    const struct amber_nm *nm;
    const uint8_t *w;     /* the first panel at the first input of the block */
    const uint8_t *ahead; /* weights to fetch meanwhile, panels as far apart as in w; or NULL */
    int32_t *sums;        /* [pairs, 2, VECTORS, VL], kept between blocks of inputs */
    int pair0, pair1, panel;
    int window, groups; /* the first window, groups of 16 quads in the block */
    bool first, last;   /* block of inputs */
};

INLINE vf scaled(const struct amber_gemm_w8a8 *g, int row, int o, vi acc) {
    vf v = v_mul(floats(acc), v_mul(v_set1(g->a.scale[row]), v_load(g->w.scale + o)));
    if (g->a.shift) v = v_add(v, v_mul(v_set1(g->a.shift[row]), v_load(g->w.sum + o)));
    return g->w.bias ? v_add(v, v_load(g->w.bias + o)) : v;
}

INLINE void finish(const struct amber_gemm_w8a8 *g, int row, int o, vi acc) {
    const int left = g->w.n_out - o;
    float *y = g->y + row * g->ldy + o;
    vf v = scaled(g, row, o, acc);
    if (left >= VL) {
        v_store(y, g->add ? v_add(v_load(y), v) : v);
    } else if (left > 0) {
        v_store_n(y, g->add ? v_add(v_load_n(y, left), v) : v, left);
    }
}

/* Lists lie too far apart for hardware to foresee the next, and every address waits for them. */
INLINE void fetch_list(const struct amber_nm_window *next, int64_t entries) {
    for (int64_t i = 0; i < entries; i += 16) {
        _mm_prefetch((const char *)(next->xa + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(next->xb + i), _MM_HINT_T0);
    }
    for (int64_t i = 0; i < entries; i += 32) {
        _mm_prefetch((const char *)(next->oa + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(next->ob + i), _MM_HINT_T0);
    }
}

/* All pairs of the block with a constant number of panels. The accumulators must be local to the
 * function that loops: as an array reference in a helper gcc 12 spills them. */
INLINE void pass_of(const struct pass *t, const int panels) {
    const struct amber_gemm_w8a8 *g = t->g;
    const int64_t panel_bytes = (int64_t)g->w.k_pad * AMBER_PANEL;
    const int64_t counts = amber_nm_counts(g->w.k_pad), keep = t->nm->keep;
    const int vectors = panels * PER, first_output = t->panel * AMBER_PANEL;
    const uint8_t *w[PANELS];
    const uint8_t *record = t->nm->lists + t->pair0 * t->nm->stride;
    int32_t *sums = t->sums;
    const int fetches = (BLOCK_LINES * panels + t->pair1 - t->pair0 - 1) / (t->pair1 - t->pair0);
    const uint8_t *ahead = t->ahead, *ahead_end = ahead + BLOCK_LINES * 64;
    /* Panels are addressed as base + offset. The compiler must not see that the bases are equally
     * spaced: it would add up addresses in the loop, and where two threads share a core the number of
     * instructions limits the speed. */
    UNROLL
    for (int p = 0; p < panels; p++) {
        w[p] = t->w + p * panel_bytes;
        __asm__("" : "+r"(w[p]));
    }
    for (int pair = t->pair0; pair < t->pair1; pair++) {
        const struct amber_nm_window *from =
            (const struct amber_nm_window *)(const void *)record + t->window;
        vi a[VECTORS], b[VECTORS];
        if (ahead) {
            for (int i = 0; i < fetches; i++, ahead += 64) {
                if (ahead == ahead_end) { /* on to the next panel */
                    ahead += panel_bytes - BLOCK_LINES * 64;
                    ahead_end += panel_bytes;
                }
                _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            }
        }
        if (t->last) { /* the results' lines arrive while the sums grow */
            float *y = g->y + amber_nm_row(t->nm, pair) * g->ldy + first_output;
            const int64_t second = amber_nm_rows(t->nm, pair, g->a.rows) == 2 ? g->ldy : 0;
            for (int p = 0; p < panels; p++) {
                __builtin_prefetch(y + p * AMBER_PANEL, 1);
                __builtin_prefetch(y + second + p * AMBER_PANEL, 1);
            }
        }
        if (t->first) {
            const int row = amber_nm_row(t->nm, pair);
            const bool two = amber_nm_rows(t->nm, pair, g->a.rows) == 2;
            const vi sa = START(g->a.sum[row]), sb = START(two ? g->a.sum[row + 1] : 0);
            UNROLL
            for (int v = 0; v < vectors; v++) {
                a[v] = sa;
                b[v] = sb;
            }
        } else {
            UNROLL
            for (int v = 0; v < vectors; v++) {
                a[v] = sums_load(sums + v * VL);
                b[v] = sums_load(sums + (VECTORS + v) * VL);
            }
        }
        for (int done = 0, window = 0; done < t->groups; done += 4, window++, from++) {
            const int groups = WINDOWS == 1 || t->groups - done < 4 ? t->groups - done : 4;
            const int64_t entries = groups * keep, common = record[counts + t->window + window];
            int64_t i = 0;
            fetch_list((const void *)((const uint8_t *)from + t->nm->stride), entries);
            for (; i < common; i++) {
                const int64_t o = from->oa[i] + window * PANEL_WINDOW;
                const vi x = broadcast(from->xa[i]), z = broadcast(from->xb[i]);
                UNROLL
                for (int v = 0; v < vectors; v++) {
                    weights u = weights_at(w[v / PER] + o + v % PER * 4 * VL);
                    a[v] = dot(a[v], u, x);
                    b[v] = dot(b[v], u, z);
                }
            }
            for (; i < entries; i++) {
                const int64_t o = from->oa[i] + window * PANEL_WINDOW;
                const int64_t q = from->ob[i] + window * PANEL_WINDOW;
                const vi x = broadcast(from->xa[i]), z = broadcast(from->xb[i]);
                UNROLL
                for (int v = 0; v < vectors; v++) {
                    a[v] = dot(a[v], weights_at(w[v / PER] + o + v % PER * 4 * VL), x);
                    b[v] = dot(b[v], weights_at(w[v / PER] + q + v % PER * 4 * VL), z);
                }
            }
            if (WINDOWS == 1) break;
        }
        if (t->last) {
            const int row = amber_nm_row(t->nm, pair);
            const bool two = amber_nm_rows(t->nm, pair, g->a.rows) == 2;
            UNROLL
            for (int v = 0; v < vectors; v++) {
                finish(g, row, first_output + v * VL, a[v]);
                if (two) finish(g, row + 1, first_output + v * VL, b[v]);
            }
        } else {
            UNROLL
            for (int v = 0; v < vectors; v++) {
                sums_store(sums + v * VL, a[v]);
                sums_store(sums + (VECTORS + v) * VL, b[v]);
            }
        }
        record += t->nm->stride;
        sums += PAIR_SUMS;
    }
}

#define PASS(panels)                                                                               \
    static __attribute__((noinline)) void pass_##panels(const struct pass *t) {                    \
        pass_of(t, panels);                                                                        \
    }
PASS(1)
#if PANELS > 1
PASS(2)
#endif
#if PANELS > 2
PASS(3)
#endif
#if PANELS > 3
PASS(4)
PASS(5)
PASS(6)
PASS(7)
PASS(8)
#endif

static void (*const pass_fns[PANELS])(const struct pass *t) = {
    pass_1,
#if PANELS > 1
    pass_2,
#endif
#if PANELS > 2
    pass_3,
#endif
#if PANELS > 3
    pass_4, pass_5, pass_6, pass_7, pass_8,
#endif
};

/* Pairs pair0..pair1-1 (at most PAIR_BLOCK) of `panels` panels. Where they are the first to read
 * these weights, the next block of inputs is fetched meanwhile; where they are the last, the first
 * block of the next panels is (next: those exist). */
static void block(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel, int panels,
                  int pair0, int pair1, bool first_pairs, bool next) {
    _Alignas(64) int32_t sums[PAIR_BLOCK * PAIR_SUMS];
    enum { WIDTH = WINDOWS * AMBER_NM_WINDOW };
    const int k_pad = g->w.k_pad;
    const uint8_t *w = g->w.q + (int64_t)panel * k_pad * AMBER_PANEL;
    struct pass t = {
        .g = g, .nm = nm, .sums = sums, .pair0 = pair0, .pair1 = pair1, .panel = panel};
    for (int k = 0; k < k_pad; k += WIDTH) {
        const int width = k_pad - k < WIDTH ? k_pad - k : WIDTH;
        t.groups = width / AMBER_NM_GROUP;
        t.window = k / AMBER_NM_WINDOW;
        t.first = k == 0;
        t.last = k + width == k_pad;
        t.w = w + (int64_t)k * AMBER_PANEL;
        t.ahead = NULL;
        if (!t.last && first_pairs) t.ahead = t.w + (int64_t)WIDTH * AMBER_PANEL;
        if (t.last && next) t.ahead = w + (int64_t)panels * k_pad * AMBER_PANEL;
        pass_fns[panels - 1](&t);
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
    /* Of a window the first `keep` of 16 places of each array are read. */
    const int64_t used = (int64_t)sizeof(struct amber_nm_window) / 16 * nm->keep;
    const int sweep = share(pairs, LISTS_BYTES / (used * amber_nm_windows(g->w.k_pad)));
    for (int sweep0 = 0; sweep0 < pairs; sweep0 += sweep) {
        const int sweep1 = pairs - sweep0 < sweep ? pairs : sweep0 + sweep;
        const int step = share(sweep1 - sweep0, PAIR_BLOCK);
        for (int panel = panel0; panel < panel1; panel += PANELS) {
            const int panels = panel1 - panel < PANELS ? panel1 - panel : PANELS;
            for (int pair = sweep0; pair < sweep1; pair += step) {
                const int end = sweep1 - pair < step ? sweep1 : pair + step;
                block(g, nm, panel, panels, pair, end, pair == sweep0,
                      end == sweep1 && panel + 2 * PANELS <= panel1);
            }
        }
    }
}
