/* ops.h: what the files of the steps (ops*.c) share among themselves. */
#ifndef AMBER_OPS_H
#define AMBER_OPS_H

#include "session.h"

/* Multiplications up to which one thread is done before the others have heard of the job: a few
 * microseconds, as the hand-over takes, and a thousand times that where other programs hold the
 * cores. */
enum { MIN_SHARED = 1 << 17 };

/* Rows from which on products over lists are faster than dense ones. */
enum { MIN_LISTED = 24 };

/* A job of one row does not pay the other threads' wake-up. */
static inline void run_rows(struct batch *b, amber_work_fn work, void *ctx) {
    if (b->rows <= 1)
        work(ctx, 0, 1);
    else
        amber_pool_run(b->pool, work, ctx);
}

static inline float *q_row(const struct batch *b, float *base, int r) {
    const struct shape *s = &b->model->shape;
    return base + (int64_t)r * s->n_head * s->head_dim;
}

/* y = norm(x) over norm->n elements, with the weights from `at` on; y may be x. */
static inline void norm_row(const struct batch *b, const struct norm *norm, int at, float *y,
                            const float *x) {
    const float *weight = norm->weight + at, *bias = norm->bias ? norm->bias + at : NULL;
    if (b->model->shape.arch->layer_norm)
        b->kernels->layernorm(y, x, weight, bias, norm->n, b->model->shape.norm_eps);
    else
        b->kernels->rmsnorm(y, x, weight, norm->n, b->model->shape.norm_eps);
}

/* The CPU's steps, see struct ops. */
void op_rope_table(struct batch *b);
void op_norm(struct batch *b, const struct norm *norm, const struct linear *const w[], int n);
void op_prepare(struct batch *b, const float *src, const struct linear *const w[], int n);
void op_activate(struct batch *b, const struct linear *w);
void op_linear(struct batch *b, const struct linear *const w[], float *const y[], int n);
void op_linear_residual(struct batch *b, const struct linear *w, const struct norm *post);
void op_rope_and_store(struct batch *b, int il);
void op_attention(struct batch *b, int il);
void op_route(struct batch *b, int il);
void op_experts(struct batch *b, int il);
void op_shared_expert(struct batch *b, int il);
void op_keep_rows(struct batch *b, int first);
void op_head(struct batch *b, float *logits);

/* Two projections can read one pruned input where their rules and channel scores agree. */
bool same_input(const struct linear *a, const struct linear *b);
/* The projection whose rule prunes w's input in this batch; NULL: none does. */
const struct linear *pruned_for(const struct batch *b, const struct linear *w);
/* The first row that a rule prunes: pairs of rows before it hold protected tokens. */
int first_pruned(const struct batch *b);
/* Cosines and sines of the batch's positions, [rows, n_rot / 2]; table as in batch.rope_freq. */
void rope_angles(const struct batch *b, int table, float *cosines, float *sines);
/* What the queries of a position are multiplied by, in models whose queries grow. */
float query_growth(const struct shape *s, int position);
/* K or V of a layer in the cache. */
uint8_t *kv_layer(const struct batch *b, int il, bool values);
/* Their scales [n_head_kv, positions], behind the cells; NULL where cells are not INT8. */
float *kv_scales(const struct batch *b, int il, bool values);

/* The input that choose_inputs made for w in this batch. */
const struct activation *input_of(const struct batch *b, const struct linear *w);
/* As op_prepare, but never in lists: for rows that are gathered before they are multiplied. */
void prepare_unlisted(struct batch *b, const float *src, const struct linear *const w[], int n);
/* The input of the experts' down projections: rows of gate and up in the experts' order, each pruned
 * alone. make_expert_row fills row i, of the batch's row r. */
void choose_expert_input(struct batch *b, const struct linear *w, struct activation *in, int rows);
void make_expert_row(const struct batch *b, const struct activation *in, int i, int r, int ith);
/* Rows of an input that are all pruned or all dense. */
struct amber_a8 rows_of(const struct activation *in, int first, int rows, bool pruned);
/* Quads of 16 that lists of the experts' rows would name; 0: lists do not serve. */
int expert_keep(const struct batch *b, const struct activation *in);

#endif
