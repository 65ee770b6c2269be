/* kernels.h: the operation table. One function pointer per operation, filled once when a model is
 * opened (kernels/cpu/dispatch.c), from the CPU's features. The engine calls through it and knows
 * no instruction set; the kernels know no model.
 *
 * Every operation has a scalar twin in kernels/ref that is never tuned: it is the contract in code,
 * the oracle of the tests, and the column of last resort. Integer results equal the twin's exactly;
 * float results agree within a bound that the tests derive from norms and epsilon.
 *
 * Operations that are split over threads take a half-open range of work. Ranges may be cut
 * anywhere: a result never depends on how the work was split, nor on how many rows a call has. No
 * operation allocates, prints, locks or keeps state. Pointers do not alias unless it says so. */
#ifndef AMBER_KERNELS_H
#define AMBER_KERNELS_H

#include "sparse.h"
#include "sparse_gemm.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- INT8 operands ----
 *
 * Weights W[O,K] are symmetric per output channel: W[o,k] ~ scale[o] * w, w in -127..127, and are
 * packed in panels of 16 outputs x 4 inputs, which is one 64-byte vector (VNNI lane order, an AMX
 * tile row, two AVX2 vectors):
 *
 *     q[panel = o/16][group = k/4][lane = o%16][byte = k%4]  uint8 = w + 128
 *
 * The offset makes the weights the unsigned operand of u8 x s8 dot products. The kernels take 128 *
 * sum(x) off again, so an accumulator is exactly sum(w * x) (int32, no saturation; K <= 65536).
 * Padding (o >= n_out, k >= n_in) holds 128. One layout serves every instruction set.
 *
 * Activations X[T,K] are symmetric per row (token): X[t,k] ~ scale[t] * x, x in -127..127, kept row
 * by row, zero-padded to k_pad. */

#define AMBER_PANEL    16    /* outputs of one weight panel */
#define AMBER_K_ALIGN  64    /* k_pad is a multiple of it; quantized rows start 64-byte aligned */
#define AMBER_MAX_K    65536 /* largest k_pad: |sum| stays below 2^31 */
#define AMBER_HEAD_MAX 512   /* largest head_dim of attention */

struct amber_w8 {
    const uint8_t *q;   /* [panels, k_pad/4, 16, 4] uint8, 64-byte aligned */
    const float *scale; /* [panels * 16] float32, 0 in the padding */
    const float *bias;  /* [panels * 16] float32, or NULL */
    const float *sum;   /* [panels * 16] sum of the row's weights; read where a.shift is set */
    int n_out, n_in, k_pad;
};

struct amber_a8 {
    int8_t *q;          /* [rows, stride] int8, 64-byte aligned rows */
    float *scale;       /* [rows] */
    int32_t *sum;       /* [rows] sum of x over the row */
    const float *shift; /* [rows] what was taken off every element before quantization, or NULL */
    int rows;
    int k_pad;      /* equals the weights' */
    int64_t stride; /* bytes from row to row, >= k_pad, multiple of 64 */
};

/* Bytes from one row of INT8 activations to the next that every kernel likes: an odd number of
 * cache lines, so that the same columns of neighbouring rows do not share L1 sets. */
static inline int64_t amber_a8_stride(int k_pad) {
    return (k_pad / 64 | 1) * (int64_t)64;
}

/* v = (float)acc[t,o] * (a.scale[t] * w.scale[o]), then v + a.shift[t] * w.sum[o] where there is a
 * shift, then v + bias[o] where there is one, then y[t,o] + v where add, each operation rounded to
 * float32: every column gives the same bits. acc is exact. A NaN scale makes the outputs NaN. */
struct amber_gemm_w8a8 {
    struct amber_w8 w;
    struct amber_a8 a;
    float *y;    /* [rows, ldy] float32; columns >= n_out are not written */
    int64_t ldy; /* floats from row to row */
    bool add;
};

/* The same in float32: w row-major [n_out, n_in], x [rows, ldx]. */
struct amber_gemm_f32 {
    const float *w, *bias; /* bias may be NULL */
    int n_out, n_in;
    const float *x;
    int64_t ldx;
    int rows;
    float *y;
    int64_t ldy;
    bool add;
};

/* Types of the cells of a KV cache. */
enum amber_cells {
    AMBER_CELLS_F16, /* float16 bits */
    AMBER_CELLS_F32,
    AMBER_CELLS_I8 /* int8, by the rules of quantize_row: a scale for each position and head */
};

static inline int amber_cell_bytes(enum amber_cells cells) {
    return cells == AMBER_CELLS_F32 ? 4 : cells == AMBER_CELLS_F16 ? 2 : 1;
}

/* Causal attention of `rows` consecutive tokens of one session, grouped-query heads.
 * Query row r stands at position pos0 + r and sees the cache positions
 *     max(0, pos0 + r - window + 1) .. pos0 + r      (window == 0: from 0)
 * Scores are scale * q.k, then softcap * tanh(score / softcap) where softcap > 0, softmax in
 * float32. Query head h reads cache head h / (n_head / n_head_kv). Where there are sinks, the softmax
 * of head h has one score more, sink[h], that no value belongs to.
 *
 * The cache of one layer is [n_head_kv, n_ctx, head_dim] cells; position p stands in row p % n_ctx.
 * Keys and values of INT8 cells are cell * scale[row], with scales [n_head_kv, n_ctx]. A cache that is smaller than the positions that were written
 * to it is a ring: its n_ctx is then a multiple of 64 and at least window + rows + 62, so that the
 * rows for the new tokens, which are already written, have not taken the place of visible ones.
 *
 * One unit of work is one (row block, cache head); attention_units() tells how many there are. Row
 * blocks are dealt so that equal shares of the units cost about the same. head_dim is a multiple of
 * 8 up to AMBER_HEAD_MAX. Rows of the cache behind the last visible position are never read;
 * rows before the window, from the multiple of 64 on, weigh 0 and must be finite, as their scales. */
struct amber_attention {
    const float *q; /* [rows, n_head * head_dim] float32, not scaled */
    float *out;     /* [rows, n_head * head_dim] float32 */
    const void *k, *v;
    const float *k_scale, *v_scale; /* of INT8 cells alone */
    const float *sink;              /* [n_head], or NULL */
    enum amber_cells cells;
    int rows, n_head, n_head_kv, head_dim, n_ctx, pos0, window;
    float scale, softcap;
};

struct amber_kernels {
    const char *isa; /* the column's name */

    /* y[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps); y may be x. */
    void (*rmsnorm)(float *y, const float *x, const float *weight, int n, float eps);
    /* y[i] = (x[i] - mean(x)) / sqrt(variance(x) + eps) * weight[i] + bias[i]; bias may be NULL; y
     * may be x. */
    void (*layernorm)(float *y, const float *x, const float *weight, const float *bias, int n,
                      float eps);
    /* y[i] = f(gate[i]) * up[i], or f(gate[i]) where up is NULL; y may be gate or up.
     * silu(v) = v / (1 + exp(-v)); gelu(v) = v / 2 (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))). */
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);
    void (*gelu_mul)(float *y, const float *gate, const float *up, int n);
    /* The same with f(v) = max(v, 0)^2. */
    void (*relu2_mul)(float *y, const float *gate, const float *up, int n);
    /* y[i] = g / (1 + exp(-1.702 g)) * (u + 1), g = min(gate[i], 7), u = up[i] within -7..7; y may be
     * gate or up. (gpt-oss model card, arXiv 2508.10925) */
    void (*swiglu_clamped)(float *y, const float *gate, const float *up, int n);
    /* Rotates one head in place. cos, sin: [n_rot/2]. Pairs are (2i, 2i+1), or with `halves`
     * (i, i + n_rot/2). Elements from n_rot on stay. */
    void (*rope)(float *x, const float *cos, const float *sin, int n_rot, bool halves);
    void (*f16_from_f32)(uint16_t *y, const float *x, int n);

    /* One row to INT8: scale = absmax/127, q = round-half-even(x / scale) computed as
     * x * (127/absmax) in float32, padding zeroed, sum = sum(q). A row of zeros gets scale 0, and
     * so does one so small that 127/absmax overflows. A row that holds a NaN or an infinity gets
     * scale NaN, q = 0 and sum = 0, so that all it is multiplied into becomes NaN as in float
     * arithmetic. x [n]; q [k_pad], k_pad >= n. */
    void (*quantize_row)(int8_t *q, float *scale, int32_t *sum, const float *x, int n, int k_pad);
    /* Zeroes what a sparsity pattern does not keep; see sparse.h. */
    amber_prune_fn prune;

    /* Panels panel0..panel1-1 of all rows. rows == 1 is the decode GEMV, streaming each weight byte
     * once. */
    void (*gemm_w8a8)(const struct amber_gemm_w8a8 *g, int panel0, int panel1);
    /* The product that skips what a block pattern pruned, see sparse_gemm.h. Both are NULL where the
     * column has none that is faster than its dense product. */
    amber_pack_nm_fn pack_nm;
    amber_gemm_nm_fn gemm_nm;
    amber_list_rows_fn list_rows; /* NULL: the three steps one after the other */
    int nm_most[2]; /* the largest `keep` at which it is faster: private masks, masks of pairs */
    /* Outputs out0..out1-1 of all rows. Each output's sum has one order, whatever the tile. */
    void (*gemm_f32)(const struct amber_gemm_f32 *g, int out0, int out1);

    int (*attention_units)(const struct amber_attention *a);
    /* Units unit0..unit1-1; scratch: attention_scratch bytes, 64-byte aligned, private to the
     * thread. */
    void (*attention)(const struct amber_attention *a, int unit0, int unit1, void *scratch);
    size_t attention_scratch;
};

/* Quads of 16 that lists name for a pattern; 0 where the kernels are no faster with lists. */
static inline int amber_nm_listed(const struct amber_kernels *k, const struct amber_pattern *p) {
    int keep = k->gemm_nm ? amber_nm_keep(p) : 0;
    return keep <= k->nm_most[p->tokens == 2] ? keep : 0;
}

/* The same for rows that were taken out of their pairs: every mask is then private. */
static inline int amber_nm_listed_alone(const struct amber_kernels *k,
                                        const struct amber_pattern *p) {
    int keep = k->gemm_nm ? amber_nm_keep(p) : 0;
    return keep <= k->nm_most[0] ? keep : 0;
}

/* Quantizes (by the rules of quantize_row) and packs weight panel `panel`: rows o = 16 * panel ..
 * of the float matrix, of which n_rows <= 16 exist. src [n_rows, n_in] float32; q, scale: the whole
 * matrix's. Portable C: it runs once per model. */
void amber_pack_w8_panel(uint8_t *q, float *scale, const float *src, int panel, int n_rows,
                         int n_in, int k_pad);

/* The columns. A column starts as a copy of the next plainer one, so an operation that has no own
 * version there is inherited. Each fills the table and returns true, or returns false where this
 * build or this CPU lacks it. */
bool amber_kernels_ref(struct amber_kernels *k);

/* Fills the table with the named column, or with the best one where isa is NULL. false: no such
 * column here. */
bool amber_kernels_select(struct amber_kernels *k, const char *isa);
/* Names of the columns that run here, best first: "avx512vnni avxvnni avx2 ref". */
const char *amber_kernels_list(void);

#endif
