/* ops.c: the steps of the forward pass over a batch of rows, split over the threads. Row work is cut
 * by rows, linear layers by weight panels, attention by its kernel's units. How the work is cut never
 * changes a result. */
#include "session.h"

#include <math.h>
#include <string.h>

/* A job of one row does not pay the other threads' wake-up. */
static void run_rows(struct batch *b, amber_work_fn work, void *ctx) {
    if (b->rows <= 1)
        work(ctx, 0, 1);
    else
        amber_pool_run(b->pool, work, ctx);
}

static float *q_row(const struct batch *b, float *base, int r) {
    const struct shape *s = &b->model->shape;
    return base + (int64_t)r * s->n_head * s->head_dim;
}

/* ---- entering the linear layers ---- */

static void set_input_width(struct batch *b, int n) {
    b->in.n = n;
    b->in.a8.k_pad = (int)amber_round_up(n, AMBER_K_ALIGN);
    /* Rows a multiple of 1 KiB apart would fall into the same few cache sets. */
    b->in.a8.stride = b->in.a8.k_pad + (b->in.a8.k_pad % 1024 == 0 ? AMBER_K_ALIGN : 0);
    b->in.a8.rows = b->rows;
}

static void quantize_row(struct batch *b, int r, const float *src) {
    struct amber_a8 *a = &b->in.a8;
    b->kernels->quantize_row(a->q + r * a->stride, &a->scale[r], &a->sum[r], src, b->in.n, a->k_pad);
}

struct rows_job {
    struct batch *b;
    const float *src;    /* [rows, n] */
    const float *weight; /* norm gains */
    const int32_t *tokens;
};

static void embed_work(void *ctx, int ith, int nth) {
    const struct rows_job *job = ctx;
    int begin, end, n = job->b->model->shape.n_embd;
    amber_split(job->b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++)
        model_embed(job->b->model, job->tokens[r], job->b->x + (int64_t)r * n);
}

void op_embed(struct batch *b, const int32_t *tokens) {
    struct rows_job job = {.b = b, .tokens = tokens};
    run_rows(b, embed_work, &job);
}

static void norm_work(void *ctx, int ith, int nth) {
    const struct rows_job *job = ctx;
    struct batch *b = job->b;
    int begin, end, n = b->in.n;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    float *scratch = b->norm_scratch + (int64_t)ith * n;
    for (int r = begin; r < end; r++) {
        float *y = b->in.f32 ? b->in.f32 + (int64_t)r * n : scratch;
        b->kernels->rmsnorm(y, b->x + (int64_t)r * n, job->weight, n, b->model->shape.norm_eps);
        if (!b->in.f32) quantize_row(b, r, y);
    }
}

void op_norm(struct batch *b, const float *weight) {
    set_input_width(b, b->model->shape.n_embd);
    struct rows_job job = {.b = b, .weight = weight};
    run_rows(b, norm_work, &job);
}

static void prepare_work(void *ctx, int ith, int nth) {
    const struct rows_job *job = ctx;
    struct batch *b = job->b;
    int begin, end, n = b->in.n;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        const float *src = job->src + (int64_t)r * n;
        if (b->in.f32)
            memcpy(b->in.f32 + (int64_t)r * n, src, sizeof(float) * (size_t)n);
        else
            quantize_row(b, r, src);
    }
}

void op_prepare(struct batch *b, const float *src, int n) {
    set_input_width(b, n);
    struct rows_job job = {.b = b, .src = src};
    run_rows(b, prepare_work, &job);
}

static void swiglu_work(void *ctx, int ith, int nth) {
    const struct rows_job *job = ctx;
    struct batch *b = job->b;
    int begin, end, n = b->in.n;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        float *gate = b->gate + (int64_t)r * n;
        float *y = b->in.f32 ? b->in.f32 + (int64_t)r * n : gate;
        b->kernels->silu_mul(y, gate, b->up + (int64_t)r * n, n);
        if (!b->in.f32) quantize_row(b, r, y);
    }
}

void op_swiglu(struct batch *b) {
    set_input_width(b, b->model->shape.n_ff);
    struct rows_job job = {.b = b};
    run_rows(b, swiglu_work, &job);
}

/* ---- linear layers ---- */

struct linear_job {
    struct batch *b;
    const struct linear *const *w;
    float *const *y;
    int n;
    bool add;
};

static void linear_part(const struct batch *b, const struct linear *w, float *y, bool add, int begin,
                        int end) {
    if (w->f32) {
        struct amber_gemm_f32 g = {.w = w->f32, .bias = w->bias, .n_out = w->n_out, .n_in = w->n_in,
                                   .x = b->in.f32, .ldx = b->in.n, .rows = b->rows,
                                   .y = y, .ldy = w->n_out, .add = add};
        b->kernels->gemm_f32(&g, begin, amber_min(end, w->n_out));
    } else {
        struct amber_gemm_w8a8 g = {.w = w->w8, .a = b->in.a8, .y = y, .ldy = w->n_out, .add = add};
        b->kernels->gemm_w8a8(&g, begin / AMBER_PANEL, (end + AMBER_PANEL - 1) / AMBER_PANEL);
    }
}

/* All panels of all the matrices form one line that is cut into equal parts, so that a small matrix
 * beside a large one does not leave a thread without work. */
static void linear_work(void *ctx, int ith, int nth) {
    const struct linear_job *job = ctx;
    int total = 0, begin, end;
    for (int i = 0; i < job->n; i++) total += (int)amber_round_up(job->w[i]->n_out, AMBER_PANEL);
    amber_split(total, AMBER_PANEL, ith, nth, &begin, &end);
    for (int i = 0, base = 0; i < job->n; i++) {
        int width = (int)amber_round_up(job->w[i]->n_out, AMBER_PANEL);
        int from = amber_max(begin - base, 0), to = amber_min(end - base, width);
        if (from < to) linear_part(job->b, job->w[i], job->y[i], job->add, from, to);
        base += width;
    }
}

void op_linear(struct batch *b, const struct linear *const w[], float *const y[], int n) {
    struct linear_job job = {b, w, y, n, false};
    amber_pool_run(b->pool, linear_work, &job);
}

void op_linear_residual(struct batch *b, const struct linear *w) {
    struct linear_job job = {b, (const struct linear *[]){w}, (float *[]){b->x}, 1, true};
    amber_pool_run(b->pool, linear_work, &job);
}

/* ---- attention ---- */

void op_rope_table(struct batch *b) {
    const struct shape *s = &b->model->shape;
    int half = s->n_rot / 2;
    for (int r = 0; r < b->rows; r++) {
        for (int i = 0; i < half; i++) {
            double angle = (b->pos0 + r) * s->rope_freq[i];
            b->cos[(int64_t)r * half + i] = (float)cos(angle) * s->rope_mscale;
            b->sin[(int64_t)r * half + i] = (float)sin(angle) * s->rope_mscale;
        }
    }
}

static uint8_t *kv_layer(const struct batch *b, int il, bool values) {
    return b->kv + (2 * (int64_t)il + values) * b->kv_layer_bytes;
}

static void store_head(const struct batch *b, uint8_t *cache, int head, int pos, const float *src) {
    int n = b->model->shape.head_dim;
    int64_t at = ((int64_t)head * b->n_ctx + pos) * n;
    if (b->kv_f32)
        memcpy((float *)(void *)cache + at, src, sizeof(float) * (size_t)n);
    else
        b->kernels->f16_from_f32((uint16_t *)(void *)cache + at, src, n);
}

struct attention_job {
    struct batch *b;
    int il;
    struct amber_attention a;
    int units;
};

static void rope_work(void *ctx, int ith, int nth) {
    const struct attention_job *job = ctx;
    struct batch *b = job->b;
    const struct shape *s = &b->model->shape;
    const struct amber_kernels *kernels = b->kernels;
    bool halves = s->arch->rope_halves;
    uint8_t *keys = kv_layer(b, job->il, false), *values = kv_layer(b, job->il, true);
    int begin, end, kv_width = s->n_head_kv * s->head_dim;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        const float *cosines = b->cos + (int64_t)r * (s->n_rot / 2);
        const float *sines = b->sin + (int64_t)r * (s->n_rot / 2);
        float *q = q_row(b, b->q, r);
        for (int h = 0; h < s->n_head; h++)
            kernels->rope(q + h * s->head_dim, cosines, sines, s->n_rot, halves);
        for (int h = 0; h < s->n_head_kv; h++) {
            float *k = b->k + (int64_t)r * kv_width + h * s->head_dim;
            kernels->rope(k, cosines, sines, s->n_rot, halves);
            store_head(b, keys, h, b->pos0 + r, k);
            store_head(b, values, h, b->pos0 + r, b->v + (int64_t)r * kv_width + h * s->head_dim);
        }
    }
}

void op_rope_and_store(struct batch *b, int il) {
    struct attention_job job = {.b = b, .il = il};
    run_rows(b, rope_work, &job);
}

static void attention_work(void *ctx, int ith, int nth) {
    const struct attention_job *job = ctx;
    const struct amber_kernels *kernels = job->b->kernels;
    /* Later row blocks see more positions and cost more: dealing single units out in turn balances
     * the threads better than one stretch each. */
    for (int unit = ith; unit < job->units; unit += nth)
        kernels->attention(&job->a, unit, unit + 1,
                           job->b->attn_scratch + (size_t)ith * kernels->attention_scratch);
}

void op_attention(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    struct attention_job job = {.b = b, .il = il};
    job.a = (struct amber_attention){.q = b->q, .out = b->attn, .k = kv_layer(b, il, false),
                                     .v = kv_layer(b, il, true), .kv_f32 = b->kv_f32, .rows = b->rows,
                                     .n_head = s->n_head, .n_head_kv = s->n_head_kv,
                                     .head_dim = s->head_dim, .n_ctx = b->n_ctx, .pos0 = b->pos0,
                                     .window = s->window, .scale = s->attn_scale};
    job.units = b->kernels->attention_units(&job.a);
    amber_pool_run(b->pool, attention_work, &job);
}

void op_keep_rows(struct batch *b, int first) {
    if (first == 0) return;
    int rows = b->rows - first;
    const struct shape *s = &b->model->shape;
    memmove(b->q, q_row(b, b->q, first),
            sizeof(float) * (size_t)rows * (size_t)s->n_head * (size_t)s->head_dim);
    b->x += (int64_t)first * s->n_embd;
    b->pos0 += first;
    b->rows = rows;
}
