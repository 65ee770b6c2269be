/* ops_attention.c: rotary positions, the KV cache and attention over it. */
#include "ops.h"

#include <math.h>
#include <string.h>

void rope_angles(const struct batch *b, int table, float *cosines, float *sines) {
    const struct shape *s = &b->model->shape;
    const int half = s->n_rot / 2;
    const float mscale = table == 0 ? s->rope_mscale : 1;
    for (int r = 0; r < b->rows; r++) {
        for (int i = 0; i < half; i++) {
            double angle = (b->pos0 + r) * b->rope_freq[table][i];
            cosines[(int64_t)r * half + i] = (float)cos(angle) * mscale;
            sines[(int64_t)r * half + i] = (float)sin(angle) * mscale;
        }
    }
}

void op_rope_table(struct batch *b) {
    for (int t = 0; t < 2 && b->rope_freq[t]; t++) rope_angles(b, t, b->cos[t], b->sin[t]);
}

int layer_positions(const struct batch *b, const struct shape *s, int il) {
    return layer_window(s, il) ? b->window_ctx : b->n_ctx;
}

uint8_t *kv_layer(const struct batch *b, int il, bool values) {
    int64_t positions = 0;
    for (int i = 0; i < il; i++) positions += 2 * layer_positions(b, &b->model->shape, i);
    if (values) positions += layer_positions(b, &b->model->shape, il);
    return b->kv + positions * b->kv_position_bytes;
}

static void store_head(const struct batch *b, uint8_t *cache, int64_t row, const float *src) {
    int n = b->model->shape.head_dim;
    if (b->kv_f32)
        memcpy((float *)(void *)cache + row * n, src, sizeof(float) * (size_t)n);
    else
        b->kernels->f16_from_f32((uint16_t *)(void *)cache + row * n, src, n);
}

struct attention_job {
    struct batch *b;
    int il;
    struct amber_attention a;
    int units;
};

static void norm_heads(const struct batch *b, const struct norm *norm, float *x, int n_head) {
    if (!norm->weight) return;
    const int head_dim = b->model->shape.head_dim, n = n_head * head_dim;
    for (int at = 0, head = 0; at < n; at += norm->n, head++)
        norm_row(b, norm, head * norm->step, x + at, x + at);
}

static void norm_both(const struct batch *b, const struct layer *layer, float *q, float *k) {
    norm_heads(b, &layer->q_norm, q, b->model->shape.n_head);
    norm_heads(b, &layer->k_norm, k, b->model->shape.n_head_kv);
}

float query_growth(const struct shape *s, int position) {
    return (float)(1 + s->temperature * log(1 + (double)(position / s->temperature_length)));
}

static void grow_query(const struct shape *s, int position, float *q) {
    const float factor = query_growth(s, position);
    for (int i = 0; i < s->n_head * s->head_dim; i++) q[i] *= factor;
}

static void rope_heads(const struct batch *b, int table, int r, float *x, int n_head) {
    const struct shape *s = &b->model->shape;
    const int64_t at = (int64_t)r * (s->n_rot / 2);
    for (int h = 0; h < n_head; h++)
        b->kernels->rope(x + h * s->head_dim, b->cos[table] + at, b->sin[table] + at, s->n_rot,
                         s->arch->rope_halves);
}

static void rope_work(void *ctx, int ith, int nth) {
    const struct attention_job *job = ctx;
    struct batch *b = job->b;
    const struct shape *s = &b->model->shape;
    const struct layer *layer = &b->model->layers[job->il];
    const int table = s->windowed[job->il] && b->rope_freq[1];
    const int positions = layer_positions(b, s, job->il), width = s->n_head_kv * s->head_dim;
    uint8_t *keys = kv_layer(b, job->il, false), *values = kv_layer(b, job->il, true);
    int begin, end;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        float *q = q_row(b, b->q, r), *k = b->k + (int64_t)r * width;
        const float *v = b->v + (int64_t)r * width;
        if (!s->arch->rope_first) norm_both(b, layer, q, k);
        if (layer_has_rope(s, job->il)) {
            rope_heads(b, table, r, q, s->n_head);
            rope_heads(b, table, r, k, s->n_head_kv);
        }
        if (s->arch->rope_first) norm_both(b, layer, q, k);
        if (s->temperature) grow_query(s, b->pos0 + r, q);
        for (int h = 0; h < s->n_head_kv; h++) {
            const int64_t row = (int64_t)h * positions + (b->pos0 + r) % positions;
            store_head(b, keys, row, k + h * s->head_dim);
            store_head(b, values, row, v + h * s->head_dim);
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
                                     .sink = b->model->layers[il].sinks,
                                     .kv_f32 = b->kv_f32,
                                     .rows = b->rows,
                                     .n_head = s->n_head,
                                     .n_head_kv = s->n_head_kv,
                                     .head_dim = s->head_dim,
                                     .n_ctx = layer_positions(b, s, il),
                                     .pos0 = b->pos0,
                                     .window = layer_window(s, il),
                                     .scale = s->attn_scale,
                                     .softcap = s->attn_softcap};
    job.units = b->kernels->attention_units(&job.a);
    int64_t seen = (int64_t)b->rows * (b->pos0 + b->rows);
    if (2 * seen * s->n_head * s->head_dim < MIN_SHARED)
        attention_work(&job, 0, 1);
    else
        amber_pool_run(b->pool, attention_work, &job);
}
