/* ops_attention.c: rotary positions, the KV cache and attention over it. */
#include "ops.h"

#include <math.h>
#include <string.h>

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
    job.a = (struct amber_attention){.q = b->q,
                                     .out = b->attn,
                                     .k = kv_layer(b, il, false),
                                     .v = kv_layer(b, il, true),
                                     .kv_f32 = b->kv_f32,
                                     .rows = b->rows,
                                     .n_head = s->n_head,
                                     .n_head_kv = s->n_head_kv,
                                     .head_dim = s->head_dim,
                                     .n_ctx = b->n_ctx,
                                     .pos0 = b->pos0,
                                     .window = s->window,
                                     .scale = s->attn_scale};
    job.units = b->kernels->attention_units(&job.a);
    int64_t seen = (int64_t)b->rows * (b->pos0 + b->rows);
    if (2 * seen * s->n_head * s->head_dim < MIN_SHARED)
        attention_work(&job, 0, 1);
    else
        amber_pool_run(b->pool, attention_work, &job);
}
