/* forward.c: the model's computation as prose. The steps are in ops.c, the arithmetic in kernels/. */
#include "session.h"

/* All memory belongs to the session: an allocation here would be a bug in the hot loop. */
#pragma GCC poison malloc calloc realloc free amber_alloc amber_free

/* The residual stream x of all rows goes through one transformer block. The last block works on rows
 * first_out.. only: of the others nobody reads more than their keys and values. */
static void layer(struct batch *b, int il, int first_out) {
    const struct layer *w = &b->model->layers[il];

    op_norm(b, w->attn_norm);
    op_linear(b, (const struct linear *[]){&w->q, &w->k, &w->v}, (float *[]){b->q, b->k, b->v}, 3);
    op_rope_and_store(b, il);
    if (il == b->model->shape.n_layer - 1) op_keep_rows(b, first_out);
    if (b->rows == 0) return;
    op_attention(b, il);
    op_prepare(b, b->attn, w->o.n_in);
    op_linear_residual(b, &w->o);

    op_norm(b, w->ffn_norm);
    op_linear(b, (const struct linear *[]){&w->gate, &w->up}, (float *[]){b->gate, b->up}, 2);
    op_swiglu(b);
    op_linear_residual(b, &w->down);
}

amber_status forward(struct batch *b, const int32_t *tokens, int rows, int pos0, int first_out,
                     float *logits) {
    b->rows = rows;
    b->pos0 = pos0;
    b->x = b->x_base;
    op_embed(b, tokens);
    op_rope_table(b);
    for (int il = 0; il < b->model->shape.n_layer; il++) {
        if (b->tick && b->tick(b->tick_user, il)) return AMBER_ERR_CANCELLED;
        layer(b, il, first_out);
    }
    if (b->rows > 0) {
        op_norm(b, b->model->output_norm);
        op_linear(b, (const struct linear *[]){&b->model->output}, (float *[]){logits}, 1);
    }
    return AMBER_OK;
}
