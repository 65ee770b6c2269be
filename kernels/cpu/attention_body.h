/* attention_body.h: causal attention over the vectors of vec_*.h. The including file defines
 * NAME(operation).
 *
 * A unit is a block of rows of one cache head. All query heads that share the cache head are taken
 * together: up to QUERIES queries (row, head), row by row. The cache is walked in blocks of KEYS
 * positions, aligned to absolute positions. A block of keys is turned to float32 [head_dim, KEYS],
 * a block of values to float32 [KEYS, padded head_dim], once for all queries; then tiles of 6
 * queries take scores (a small matrix product), one step of the online softmax (Milakov and
 * Gimelshein, arXiv 1805.02867) and the weighted sum (a second product).
 *
 * A step of decoding has few queries for each cell of the cache, and to write cells as float32 and
 * read them again would cost more than their use. Few queries take float16 and INT8 cells as they are
 * turned, in registers: the same chains, and so the same bits.
 *
 * INT8 keys are never float32. A query becomes int16 with a scale, absmax / 32767: dot products with
 * keys are then exact in int32, and twice as many fit in an instruction. INT8 values are multiplied as
 * the whole numbers that they are, by weights that have taken up their scales.
 *
 * A query's result does not depend on the rows it comes with: it meets exactly the blocks in which
 * it sees a key, in order, each score and each output element is one chain of fused multiply-adds
 * in the order of head_dim and of positions, and keys that it does not see weigh exactly 0. */
#include "vec_exp.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    KEYS = 64,
    TILE_Q = 6,
    MOST_QUERIES = 128,
    MOST_OUTPUT = 16384 /* floats of sums of a unit, 64 KB */
};
static const float SLACK = 8; /* weights stay below exp(8) */

/* The scratch. Sizes are the largest: AMBER_ATTENTION_SCRATCH adds them up. */
struct work {
    float keys[AMBER_HEAD_MAX * KEYS];   /* [head_dim, KEYS] */
    float values[KEYS * AMBER_HEAD_MAX]; /* [KEYS, padded] */
    union {
        float f32[MOST_OUTPUT];
        int16_t i16[2 * MOST_OUTPUT]; /* for INT8 keys, in the order of pair_query */
    } queries;                        /* [queries, head_dim * 4 bytes], scaled */
    float sums[MOST_OUTPUT];          /* [queries, padded] */
    float scores[TILE_Q * KEYS];
    float query_scale[MOST_QUERIES], key_scale[KEYS], value_scale[KEYS]; /* of INT8 cells */
    float reference[MOST_QUERIES];
    float total[MOST_QUERIES * VL];
};
_Static_assert(sizeof(struct work) <= AMBER_ATTENTION_SCRATCH, "attention scratch");

/* How a call is cut: rows of a unit, query heads taken together, padded head_dim. */
struct cut {
    int rows, heads, group, padded, blocks;
};

static struct cut cut_of(const struct amber_attention *a) {
    struct cut c = {.group = a->n_head / a->n_head_kv};
    c.padded = (a->head_dim + VL - 1) / VL * VL;
    int most = MOST_OUTPUT / c.padded < MOST_QUERIES ? MOST_OUTPUT / c.padded : MOST_QUERIES;
    c.heads = c.group < most ? c.group : most;
    c.rows = most / c.heads;
    c.blocks = (a->rows + c.rows - 1) / c.rows;
    return c;
}

int NAME(attention_units)(const struct amber_attention *a) {
    return cut_of(a).blocks * a->n_head_kv;
}

/* While products run, the next block's keys are fetched to L2, and while keys are transposed its
 * values: so memory is read all the time. The two products of a tile have head_dim * KEYS * 2 /
 * (TILE_VECTORS * VL) iterations. */
enum { AHEAD_STEP = TILE_VECTORS * VL }; /* bytes per iteration */

/* C[rows, vectors * VL] = A[rows, n] * B[n, vectors * VL], or C = C * factor[row] + A * B. */
static inline __attribute__((always_inline)) void
product(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int n,
        const float *factor, const char *ahead, const int rows, const int vectors) {
    vf acc[TILE_Q][TILE_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) UNROLL
    for (int v = 0; v < vectors; v++)
        acc[r][v] = factor ? v_mul(v_load(c + r * ldc + v * VL), v_set1(factor[r])) : v_set1(0);
    for (int k = 0; k < n; k++, a++, b += ldb) {
        vf bv[TILE_VECTORS];
        v_prefetch(ahead + k * AHEAD_STEP);
        UNROLL
        for (int v = 0; v < vectors; v++) bv[v] = v_load(b + v * VL);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vf av = v_set1(a[r * lda]);
            UNROLL
            for (int v = 0; v < vectors; v++) acc[r][v] = v_fma(av, bv[v], acc[r][v]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) UNROLL
    for (int v = 0; v < vectors; v++) v_store(c + r * ldc + v * VL, acc[r][v]);
}

#define PRODUCT(rows, vectors)                                                                     \
    static __attribute__((noinline)) void product_##rows##x##vectors(                              \
        float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int n,    \
        const float *factor, const char *ahead) {                                                  \
        product(c, ldc, a, lda, b, ldb, n, factor, ahead, rows, vectors);                          \
    }
#define PRODUCTS(vectors)                                                                          \
    PRODUCT(1, vectors)                                                                            \
    PRODUCT(2, vectors)                                                                            \
    PRODUCT(3, vectors) PRODUCT(4, vectors) PRODUCT(5, vectors) PRODUCT(6, vectors)
typedef void (*product_fn)(float *, int64_t, const float *, int64_t, const float *, int64_t, int,
                           const float *, const char *);
#define PRODUCT_FNS(vectors)                                                                       \
    {product_1x##vectors, product_2x##vectors, product_3x##vectors,                                \
     product_4x##vectors, product_5x##vectors, product_6x##vectors}
PRODUCTS(1)
PRODUCTS(2)
#if TILE_WIDE
PRODUCTS(3)
PRODUCTS(4)
static const product_fn product_fns[TILE_VECTORS][TILE_Q] = {PRODUCT_FNS(1), PRODUCT_FNS(2),
                                                             PRODUCT_FNS(3), PRODUCT_FNS(4)};
#else
static const product_fn product_fns[TILE_VECTORS][TILE_Q] = {PRODUCT_FNS(1), PRODUCT_FNS(2)};
#endif

static void multiply(float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
                     int64_t ldb, int n, const float *factor, const char *ahead, int rows,
                     int vectors) {
    for (int v = 0; v < vectors; v += TILE_VECTORS, ahead += n * AHEAD_STEP) {
        int width = vectors - v < TILE_VECTORS ? vectors - v : TILE_VECTORS;
        product_fns[width - 1][rows - 1](c + v * VL, ldc, a, lda, b + v * VL, ldb, n, factor,
                                         ahead);
    }
}

/* VL cells of the cache from element i on, n of them where the head ends. */
static inline __attribute__((always_inline)) vf cached(const void *cache, enum amber_cells cells,
                                                       int64_t i, int n) {
    if (cells == AMBER_CELLS_F32) {
        const float *p = (const float *)cache + i;
        return n >= VL ? v_load(p) : v_load_n(p, n);
    }
    if (cells == AMBER_CELLS_I8) {
        const int8_t *p = (const int8_t *)cache + i;
        return n >= VL ? v_load_i8(p) : v_load_i8_n(p, n);
    }
    const uint16_t *p = (const uint16_t *)cache + i;
    return n >= VL ? v_load_f16(p) : v_load_f16_n(p, n);
}

/* VL keys at elements i.. of the head dimension, transposed. */
static inline __attribute__((always_inline)) void
load_keys_tile(const struct amber_attention *a, int64_t first, int n, int i, float *to,
               const enum amber_cells cells, const bool whole) {
    const int d = a->head_dim, width = d - i < VL ? d - i : VL;
    const int bytes = amber_cell_bytes(cells);
    vf r[VL];
    UNROLL
    for (int l = 0; l < VL; l++) {
        int64_t at = (first + l) * d + i;
        if (i % 32 == 0) v_prefetch((const char *)a->v + (at + KEYS * d) * bytes);
        r[l] = whole   ? cached(a->k, cells, at, VL)
               : l < n ? cached(a->k, cells, at, width)
                       : v_set1(0);
    }
    v_transpose(r);
    if (whole) {
        UNROLL
        for (int l = 0; l < VL; l++) v_store(to + l * KEYS, r[l]);
    } else {
        for (int l = 0; l < width; l++) v_store(to + l * KEYS, r[l]);
    }
}

/* Positions first..first+n-1 of a head; those that fill up the last vector become 0. */
static void load_keys(const struct amber_attention *a, int64_t first, int n, float *keys) {
    for (int j = 0; j < n; j += VL) {
        for (int i = 0; i < a->head_dim; i += VL) {
            float *to = keys + (int64_t)i * KEYS + j;
            bool whole = n - j >= VL && a->head_dim - i >= VL;
            if (whole && a->cells == AMBER_CELLS_F16)
                load_keys_tile(a, first + j, VL, i, to, AMBER_CELLS_F16, true);
            else
                load_keys_tile(a, first + j, n - j, i, to, a->cells, false);
        }
    }
}

static void load_values(const struct amber_attention *a, int64_t first, int n, int padded,
                        float *values) {
    const int d = a->head_dim, whole = a->cells == AMBER_CELLS_F32 ? 0 : d / VL * VL;
    for (int j = 0; j < n; j++) {
        int64_t at = (first + j) * d;
        float *to = values + (int64_t)j * padded;
        if (a->cells == AMBER_CELLS_I8)
            for (int i = 0; i < whole; i += VL)
                v_store(to + i, v_load_i8((const int8_t *)a->v + at + i));
        else
            for (int i = 0; i < whole; i += VL)
                v_store(to + i, v_load_f16((const uint16_t *)a->v + at + i));
        for (int i = whole; i < d; i += VL) v_store(to + i, cached(a->v, a->cells, at + i, d - i));
    }
}

/* The scales of n positions; those that fill up the block become 0. */
static void load_scales(const float *scale, int64_t first, int n, float *to) {
    memset(to, 0, KEYS * sizeof *to);
    memcpy(to, scale + first, (size_t)n * sizeof *to);
}

/* ---- INT8 keys ---- */

/* A query [n] to int16, four at a time in the order in which the keys' bytes come: 0 2 1 3, and zeros
 * up to a multiple of 16. Returns its scale; NaN for one that is not finite. */
static float pair_query(const float *x, int n, int16_t *to) {
    int32_t whole[AMBER_HEAD_MAX];
    vi largest = vi_zero();
    int i = 0;
    for (; i + VL <= n; i += VL) largest = vi_max(largest, vi_magnitude(v_load(x + i)));
    if (i < n) largest = vi_max(largest, vi_magnitude(v_load_n(x + i, n - i)));
    const int32_t bits = vi_largest(largest);
    float absmax;
    memcpy(&absmax, &bits, 4);
    const float inverse = 32767.0f / absmax;
    const bool finite = bits < 0x7f800000, zero = isinf(inverse);
    memset(to, 0, sizeof *to * (size_t)((n + 15) / 16 * 16));
    if (!finite || zero) return finite ? 0.0f : NAN;
    for (i = 0; i < n; i++) whole[i] = (int32_t)lrintf(x[i] * inverse);
    for (i = 0; i < n; i += 4) {
        to[i] = (int16_t)whole[i];
        to[i + 1] = (int16_t)whole[i + 2];
        to[i + 2] = (int16_t)whole[i + 1];
        to[i + 3] = (int16_t)whole[i + 3];
    }
    return absmax / 32767.0f;
}

/* VL keys from `cell` on against `rows` queries: 16 of their bytes, or the last 8. */
static inline __attribute__((always_inline)) void i8_step(const int8_t *cell, int d, int last,
                                                          const int16_t *queries, vi *acc,
                                                          const int rows, const bool half) {
    vi fours[4];
    vi_load_fours(cell, d, last, half, fours);
    UNROLL
    for (int g = 0; g < 4; g++) {
        const vi even = vi_even_bytes(fours[g]), odd = vi_odd_bytes(fours[g]);
        UNROLL
        for (int q = 0; q < rows; q++) {
            int32_t pairs[2];
            memcpy(pairs, queries + q * 2 * d + g * 4, sizeof pairs);
            acc[q] = vi_dot_pairs(acc[q], even, vi_set1(pairs[0]));
            acc[q] = vi_dot_pairs(acc[q], odd, vi_set1(pairs[1]));
        }
    }
}

/* Scores of positions first..first+n-1 against `rows` queries; those that fill up the last vector
 * become 0. The next block's keys are fetched meanwhile. */
static inline __attribute__((always_inline)) void
i8_scores(const struct amber_attention *a, int64_t first, int n, const int16_t *queries,
          const float *query_scale, const float *key_scale, float *scores, const int rows) {
    const int d = a->head_dim;
    for (int j = 0; j < n; j += VL) {
        const int8_t *cell = (const int8_t *)a->k + (first + j) * d;
        const int last = n - j < VL ? n - j - 1 : VL - 1;
        vi acc[TILE_Q];
        UNROLL
        for (int q = 0; q < rows; q++) acc[q] = vi_zero();
        for (int i = 0; i < VL * d; i += 64) v_prefetch(cell + KEYS * d + i);
        int i = 0;
        if (last == VL - 1)
            for (; i + 16 <= d; i += 16)
                i8_step(cell + i, d, VL - 1, queries + i, acc, rows, false);
        else
            for (; i + 16 <= d; i += 16) i8_step(cell + i, d, last, queries + i, acc, rows, false);
        if (i < d) i8_step(cell + i, d, last, queries + i, acc, rows, true);
        const vf scale = v_load(key_scale + j);
        UNROLL
        for (int q = 0; q < rows; q++)
            v_store(scores + q * KEYS + j,
                    v_mul(v_from_vi(acc[q]), v_mul(v_set1(query_scale[q]), scale)));
    }
}

#define I8_SCORES(rows)                                                                            \
    static __attribute__((noinline)) void i8_scores_##rows(                                        \
        const struct amber_attention *a, int64_t first, int n, const int16_t *queries,             \
        const float *query_scale, const float *key_scale, float *scores) {                         \
        i8_scores(a, first, n, queries, query_scale, key_scale, scores, rows);                     \
    }
I8_SCORES(1)
I8_SCORES(2)
I8_SCORES(3)
I8_SCORES(4)
I8_SCORES(5)
I8_SCORES(6)
static void (*const i8_scores_fns[TILE_Q])(const struct amber_attention *, int64_t, int,
                                           const int16_t *, const float *, const float *,
                                           float *) = {i8_scores_1, i8_scores_2, i8_scores_3,
                                                       i8_scores_4, i8_scores_5, i8_scores_6};

/* ---- few queries ---- */

enum { FEW = 2 * TILE_Q };

/* Reads each cell of the cache once per tile of queries. */
static bool takes_cells(const struct amber_attention *a, int n_queries) {
    return n_queries <= FEW && a->cells != AMBER_CELLS_F32 && a->head_dim % VL == 0;
}

/* Scores of positions first..first+n-1 against `rows` queries; those that fill up the last vector
 * become 0. The next block's keys are fetched meanwhile. */
static inline __attribute__((always_inline)) void cell_scores(const struct amber_attention *a,
                                                              int64_t first, int n,
                                                              const float *queries, float *scores,
                                                              const int rows) {
    const int d = a->head_dim;
    for (int j = 0; j < n; j += VL) {
        vf acc[TILE_Q];
        UNROLL
        for (int q = 0; q < rows; q++) acc[q] = v_set1(0);
        for (int i = 0; i < d; i += VL) {
            const uint16_t *cell = (const uint16_t *)a->k + (first + j) * d + i;
            vf r[VL];
            UNROLL
            for (int l = 0; l < VL; l++) {
                if (i % 32 == 0) v_prefetch(cell + (KEYS + l) * d);
                r[l] = j + l < n ? v_load_f16(cell + l * d) : v_set1(0);
            }
            v_transpose(r);
            UNROLL
            for (int l = 0; l < VL; l++) UNROLL
            for (int q = 0; q < rows; q++)
                acc[q] = v_fma(v_set1(queries[q * d + i + l]), r[l], acc[q]);
        }
        UNROLL
        for (int q = 0; q < rows; q++) v_store(scores + q * KEYS + j, acc[q]);
    }
}

/* sums = sums * factor[row] + scores * the values of positions first..first+n-1. */
static inline __attribute__((always_inline)) void
cell_sums(const struct amber_attention *a, int64_t first, int n, const float *scores,
          const float *factor, float *sums, const int rows, const enum amber_cells cells,
          const int vectors) {
    const int d = a->head_dim, bytes = amber_cell_bytes(cells);
    for (int i = 0; i < d; i += vectors * VL) {
        vf acc[TILE_Q][TILE_VECTORS];
        UNROLL
        for (int q = 0; q < rows; q++) UNROLL
        for (int v = 0; v < vectors; v++)
            acc[q][v] = v_mul(v_load(sums + q * d + i + v * VL), v_set1(factor[q]));
        for (int j = 0; j < n; j++) {
            const int64_t at = (first + j) * d + i;
            vf value[TILE_VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                if (v * VL * bytes % 64 == 0)
                    v_prefetch((const char *)a->v + (at + KEYS * d + v * VL) * bytes);
                value[v] = cached(a->v, cells, at + v * VL, VL);
            }
            UNROLL
            for (int q = 0; q < rows; q++) UNROLL
            for (int v = 0; v < vectors; v++)
                acc[q][v] = v_fma(v_set1(scores[q * KEYS + j]), value[v], acc[q][v]);
        }
        UNROLL
        for (int q = 0; q < rows; q++) UNROLL
        for (int v = 0; v < vectors; v++) v_store(sums + q * d + i + v * VL, acc[q][v]);
    }
}

#define CELLS(rows)                                                                                \
    static __attribute__((noinline)) void cell_scores_##rows(                                      \
        const struct amber_attention *a, int64_t first, int n, const float *queries,               \
        float *scores) {                                                                           \
        cell_scores(a, first, n, queries, scores, rows);                                           \
    }                                                                                              \
    CELL_SUMS(rows, F16)                                                                           \
    CELL_SUMS(rows, I8)
#define CELL_SUMS(rows, type)                                                                      \
    static __attribute__((noinline)) void cell_sums_##rows##_##type(                               \
        const struct amber_attention *a, int64_t first, int n, const float *scores,                \
        const float *factor, float *sums) {                                                        \
        if (a->head_dim % (TILE_VECTORS * VL) == 0)                                                \
            cell_sums(a, first, n, scores, factor, sums, rows, AMBER_CELLS_##type, TILE_VECTORS);  \
        else                                                                                       \
            cell_sums(a, first, n, scores, factor, sums, rows, AMBER_CELLS_##type, 1);             \
    }
CELLS(1)
CELLS(2)
CELLS(3)
CELLS(4)
CELLS(5)
CELLS(6)
static void (*const cell_scores_fns[TILE_Q])(const struct amber_attention *, int64_t, int,
                                             const float *, float *) = {
    cell_scores_1, cell_scores_2, cell_scores_3, cell_scores_4, cell_scores_5, cell_scores_6};
#define CELL_SUMS_FNS(type)                                                                        \
    {cell_sums_1_##type, cell_sums_2_##type, cell_sums_3_##type,                                   \
     cell_sums_4_##type, cell_sums_5_##type, cell_sums_6_##type}
static void (*const cell_sums_fns[2][TILE_Q])(const struct amber_attention *, int64_t, int,
                                              const float *, const float *,
                                              float *) = {CELL_SUMS_FNS(F16), CELL_SUMS_FNS(I8)};

static inline float expf_of(float x) { /* one lane: the same bits as elsewhere */
    float lanes[VL];
    v_store(lanes, v_exp(v_set1(x)));
    return lanes[0];
}

/* softcap * tanh(s / softcap) = softcap * (1 - 2 / (exp(2 s / softcap) + 1)). */
static inline vf capped(vf s, float softcap) {
    vf e = v_exp(v_mul(s, v_set1(2 / softcap)));
    vf one = v_set1(1.0f), two = v_set1(2.0f);
    return v_mul(v_set1(softcap), v_sub(one, v_div(two, v_add(e, one))));
}

/* Turns a query's scores [n] (n a multiple of VL), of which low..high-1 count, into weights
 * exp(score - reference) and adds them to the total, lane by lane; then they take up the scales of
 * their values, where these have any (else NULL). The reference is a score that
 * was the largest once: it moves only when one is larger by more than SLACK, which keeps the
 * weights far from overflow and mostly spares the search for the largest. Returns by how much what
 * has been summed under the old reference must shrink. */
static inline float weigh(float *s, int n, int low, int high, float softcap,
                          const float *value_scale, float *reference, float *total) {
    if (softcap > 0)
        for (int j = 0; j < n; j += VL) v_store(s + j, capped(v_load(s + j), softcap));
    for (int j = 0; j < low; j++) s[j] = -INFINITY;
    for (int j = high; j < n; j++) s[j] = -INFINITY;
    vf largest = v_load(s), sum = v_load(total);
    for (int j = VL; j < n; j += VL) largest = v_max(largest, v_load(s + j));
    float shrink = 1.0f;
    if (v_any_greater(largest, v_set1(*reference + SLACK))) {
        float before = *reference;
        *reference = v_largest(largest);
        shrink = expf_of(before - *reference);
        sum = v_mul(sum, v_set1(shrink));
    }
    vf shift = v_set1(*reference);
    for (int j = 0; j < n; j += VL) {
        vf e = v_exp(v_sub(v_load(s + j), shift));
        sum = v_add(sum, e);
        v_store(s + j, value_scale ? v_mul(e, v_load(value_scale + j)) : e);
    }
    v_store(total, sum);
    return shrink;
}

/* Rows row0..row0+rows-1, query heads head0..head0+heads-1, all of cache head kv_head. */
static void attend(const struct amber_attention *a, const struct cut *c, int kv_head, int head0,
                   int heads, int row0, int rows, struct work *w) {
    const int d = a->head_dim, n_queries = rows * heads, first_pos = a->pos0 + row0;
    const bool i8 = a->cells == AMBER_CELLS_I8;
    for (int q = 0; q < n_queries; q++) {
        int64_t at = ((int64_t)(row0 + q / heads) * a->n_head + head0 + q % heads) * d;
        float scaled[AMBER_HEAD_MAX], *to = i8 ? scaled : w->queries.f32 + q * d;
        for (int i = 0; i < d; i++) to[i] = a->q[at + i] * a->scale;
        if (i8) w->query_scale[q] = pair_query(scaled, d, w->queries.i16 + q * 2 * d);
        w->reference[q] = -FLT_MAX;
    }
    memset(w->total, 0, (size_t)n_queries * VL * sizeof(float));
    for (int q = 0; q < n_queries && a->sink; q++) { /* a first score, which weighs 1 */
        w->reference[q] = a->sink[head0 + q % heads];
        w->total[q * VL] = 1;
    }
    memset(w->sums, 0, (size_t)n_queries * c->padded * sizeof(float));
    const int last = first_pos + rows - 1;
    const int window = a->window <= last ? a->window : 0; /* one that reaches back to 0 is none */
    const bool cells = takes_cells(a, n_queries);
    int from = window > 0 && first_pos >= window ? first_pos - window + 1 : 0;
    for (int p0 = from / KEYS * KEYS; p0 <= last; p0 += KEYS) {
        /* The rows that see a key of p0..p0+KEYS-1. */
        int begin = p0 > first_pos ? p0 - first_pos : 0, end = rows;
        if (window > 0 && p0 + KEYS - 1 + window - first_pos < rows)
            end = p0 + KEYS - 1 + window - first_pos;
        int n = last - p0 + 1 < KEYS ? last - p0 + 1 : KEYS;
        int64_t cache_row = (int64_t)kv_head * a->n_ctx + p0 % a->n_ctx;
        const char *next = (const char *)a->k + (cache_row + KEYS) * d * amber_cell_bytes(a->cells);
        if (i8) {
            load_scales(a->k_scale, cache_row, n, w->key_scale);
            load_scales(a->v_scale, cache_row, n, w->value_scale);
        }
        if (!cells && !i8) load_keys(a, cache_row, n, w->keys);
        if (!cells) load_values(a, cache_row, n, c->padded, w->values);
        for (int q = begin * heads; q < end * heads; q += TILE_Q) {
            int tile = end * heads - q < TILE_Q ? end * heads - q : TILE_Q;
            int seen = first_pos + (q + tile - 1) / heads - p0 + 1; /* by the tile's last row */
            if (seen > KEYS) seen = KEYS;
            const int vectors = (seen + VL - 1) / VL;
            float *sums = w->sums + (int64_t)q * c->padded;
            if (i8)
                i8_scores_fns[tile - 1](a, cache_row, seen, w->queries.i16 + q * 2 * d,
                                        w->query_scale + q, w->key_scale, w->scores);
            else if (cells)
                cell_scores_fns[tile - 1](a, cache_row, seen, w->queries.f32 + q * d, w->scores);
            else
                multiply(w->scores, KEYS, w->queries.f32 + q * d, d, w->keys, KEYS, d, NULL, next,
                         tile, vectors);
            float shrink[TILE_Q];
            for (int r = 0; r < tile; r++) {
                int pos = first_pos + (q + r) / heads;
                int low = window > 0 ? pos - window + 1 - p0 : 0;
                shrink[r] = weigh(w->scores + r * KEYS, vectors * VL, low, pos - p0 + 1, a->softcap,
                                  i8 ? w->value_scale : NULL, &w->reference[q + r],
                                  w->total + (q + r) * VL);
            }
            if (cells)
                cell_sums_fns[i8][tile - 1](a, cache_row, seen, w->scores, shrink, sums);
            else
                multiply(sums, c->padded, w->scores, KEYS, w->values, c->padded, seen, shrink,
                         next + d * KEYS, tile, c->padded / VL);
        }
    }
    for (int q = 0; q < n_queries; q++) {
        float *out = a->out + ((int64_t)(row0 + q / heads) * a->n_head + head0 + q % heads) * d;
        float inverse = 1.0f / v_sum(v_load(w->total + q * VL));
        for (int i = 0; i < d; i++) out[i] = w->sums[(int64_t)q * c->padded + i] * inverse;
    }
}

void NAME(attention)(const struct amber_attention *a, int unit0, int unit1, void *scratch) {
    const struct cut c = cut_of(a);
    for (int unit = unit0; unit < unit1; unit++) {
        /* Cheap first and costly last blocks take turns, so that shares of the units are even. */
        int kv_head = unit / c.blocks, i = unit % c.blocks;
        int row0 = (i % 2 ? c.blocks - 1 - i / 2 : i / 2) * c.rows;
        int rows = a->rows - row0 < c.rows ? a->rows - row0 : c.rows;
        for (int h = 0; h < c.group; h += c.heads)
            attend(a, &c, kv_head, kv_head * c.group + h,
                   c.group - h < c.heads ? c.group - h : c.heads, row0, rows, scratch);
    }
}
