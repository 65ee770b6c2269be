/* forward.c: the model's computation as prose. Steps are a device's: ops*.c on the CPU, cuda_ops.c on
 * a GPU; arithmetic is in kernels/. */
#include "session.h"

/* All memory belongs to the session: an allocation here would be a bug in the hot loop. */
#pragma GCC poison malloc calloc realloc free amber_alloc amber_free

static void gate_and_up(struct batch *b, const struct layer *w, const struct norm *norm) {
    const struct linear *gate_up[] = {&w->gate, &w->up};
    b->op->norm(b, norm, gate_up, 2);
    b->op->linear(b, gate_up, (float *[]){b->gate, b->up}, 2);
}

/* The residual stream x of all rows goes through one transformer block. The last block works on
 * rows first_out.. only: of the others nobody reads more than their keys and values. */
static void layer(struct batch *b, int il, int first_out) {
    const struct layer *w = &b->model->layers[il];
    const struct linear *qkv[] = {&w->q, &w->k, &w->v}, *o[] = {&w->o};

    b->op->norm(b, &w->attn_norm, qkv, 3);
    b->op->linear(b, qkv, (float *[]){b->q, b->k, b->v}, 3);
    b->op->rope_and_store(b, il);
    if (il == b->model->shape.n_layer - 1) b->op->keep_rows(b, first_out);
    if (b->rows == 0) return;
    b->op->attention(b, il);
    if (w->parallel) gate_and_up(b, w, &w->ffn_norm);
    b->op->prepare(b, b->attn, o, 1);
    b->op->linear_residual(b, &w->o, &w->post_attn_norm);

    if (w->experts.router) {
        b->op->route(b, il);
        b->op->experts(b, il);
        if (w->up.n_out) b->op->shared_expert(b, il);
        return;
    }
    if (!w->parallel) gate_and_up(b, w, &w->ffn_norm);
    b->op->activate(b, &w->down);
    b->op->linear_residual(b, &w->down, &w->post_ffn_norm);
}

amber_status forward(struct batch *b, const int32_t *tokens, int rows, int pos0, int first_out,
                     float *logits) {
    b->rows = rows;
    b->pos0 = pos0;
    amber_status status = AMBER_OK;
    if (!b->op->begin(b, tokens, logits, &status)) return status;
    /* A pair of positions (2i, 2i + 1) may share a pruning mask: the last layer keeps it together.
     */
    int pair = first_out < rows ? (pos0 + first_out) % 2 : 0;
    if (pair > first_out) pair = 0;
    for (int il = 0; il < b->model->shape.n_layer; il++) {
        if (b->tick && b->tick(b->tick_user, il)) return AMBER_ERR_CANCELLED;
        b->layer = il;
        layer(b, il, first_out - pair);
    }
    b->op->keep_rows(b, pair);
    if (b->rows > 0) b->op->head(b, logits);
    return b->op->end(b);
}
