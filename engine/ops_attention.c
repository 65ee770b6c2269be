/* ops_attention.c: rotary positions, the KV cache and attention over it. */
#include "ops.h"

#include <math.h>
#include <string.h>

void rope_angles(const struct batch *b, int table, float *cosines, float *sines) {
    const struct shape *s = &b->model->shape;
    const int half = s->n_rot / 2;
    const float mscale = table == 0 ? s->rope_mscale : 1;
    for (int r = 0; r < b->rows; r++) {
        const struct place at = place_of(b, r);
        for (int i = 0; i < half; i++) {
            double angle = at.position * at.cache->rope_freq[table][i];
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

float *kv_scales(const struct batch *b, int il, bool values) {
    const struct shape *s = &b->model->shape;
    if (b->cells != AMBER_CELLS_I8) return NULL;
    const int64_t cells = (int64_t)s->n_head_kv * layer_positions(b, s, il) * s->head_dim;
    return (float *)(void *)(kv_layer(b, il, values) + cells);
}

/* Keys or values of all cache heads of a position; b is whose cache it is. */
static void store_heads(const struct batch *b, int il, bool values, int position,
                        const float *src) {
    const struct shape *s = &b->model->shape;
    const int n = s->head_dim, positions = layer_positions(b, s, il);
    uint8_t *cache = kv_layer(b, il, values);
    float *scales = kv_scales(b, il, values);
    for (int h = 0; h < s->n_head_kv; h++, src += n) {
        const int64_t row = (int64_t)h * positions + position % positions;
        int32_t sum;
        if (b->cells == AMBER_CELLS_F32)
            memcpy((float *)(void *)cache + row * n, src, sizeof(float) * (size_t)n);
        else if (b->cells == AMBER_CELLS_F16)
            b->kernels->f16_from_f32((uint16_t *)(void *)cache + row * n, src, n);
        else
            b->kernels->quantize_row((int8_t *)cache + row * n, &scales[row], &sum, src, n, n);
    }
}

struct attention_job {
    struct batch *b;
    int il;
    int rows, units; /* rows of one cache that go together, and their units of work */
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

static void clamp_row(float *x, int n, float most) {
    for (int i = 0; i < n; i++) x[i] = fminf(fmaxf(x[i], -most), most);
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
    const int width = s->n_head_kv * s->head_dim;
    int begin, end;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        const struct place at = place_of(b, r);
        float *q = q_row(b, b->q, r), *k = b->k + (int64_t)r * width;
        float *v = b->v + (int64_t)r * width;
        if (s->clamp > 0) {
            clamp_row(q, s->n_head * s->head_dim, s->clamp);
            clamp_row(k, width, s->clamp);
            clamp_row(v, width, s->clamp);
        }
        if (!s->arch->rope_first) norm_both(b, layer, q, k);
        if (layer_has_rope(s, job->il)) {
            rope_heads(b, table, r, q, s->n_head);
            rope_heads(b, table, r, k, s->n_head_kv);
        }
        if (s->arch->rope_first) norm_both(b, layer, q, k);
        if (s->temperature) grow_query(s, at.position, q);
        store_heads(at.cache, job->il, false, at.position, k);
        store_heads(at.cache, job->il, true, at.position, v);
    }
}

void op_rope_and_store(struct batch *b, int il) {
    struct attention_job job = {.b = b, .il = il};
    run_rows(b, rope_work, &job);
}

/* Attention of rows first..first+rows-1, which follow each other in one cache. */
static struct amber_attention attention_of(const struct batch *b, int il, int first, int rows) {
    const struct shape *s = &b->model->shape;
    const struct place at = place_of(b, first);
    return (struct amber_attention){.q = q_row(b, b->q, first),
                                    .out = q_row(b, b->attn, first),
                                    .k = kv_layer(at.cache, il, false),
                                    .v = kv_layer(at.cache, il, true),
                                    .k_scale = kv_scales(at.cache, il, false),
                                    .v_scale = kv_scales(at.cache, il, true),
                                    .sink = b->model->layers[il].sinks,
                                    .cells = at.cache->cells,
                                    .rows = rows,
                                    .n_head = s->n_head,
                                    .n_head_kv = s->n_head_kv,
                                    .head_dim = s->head_dim,
                                    .n_ctx = layer_positions(at.cache, s, il),
                                    .pos0 = at.position,
                                    .window = layer_window(s, il),
                                    .scale = s->attn_scale,
                                    .softcap = s->attn_softcap};
}

static void attention_work(void *ctx, int ith, int nth) {
    const struct attention_job *job = ctx;
    const struct batch *b = job->b;
    const int units = b->rows / job->rows * job->units;
    /* Later row blocks see more positions and cost more: dealing single units out in turn balances
     * the threads better than one stretch each. */
    for (int unit = ith; unit < units; unit += nth) {
        const int first = unit / job->units * job->rows, i = unit % job->units;
        const struct amber_attention a = attention_of(b, job->il, first, job->rows);
        b->kernels->attention(&a, i, i + 1,
                              b->attn_scratch + (size_t)ith * b->kernels->attention_scratch);
    }
}

void op_attention(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    struct attention_job job = {.b = b, .il = il, .rows = b->places ? 1 : b->rows};
    const struct amber_attention a = attention_of(b, il, 0, job.rows);
    job.units = b->kernels->attention_units(&a);
    int64_t seen = 0;
    for (int r = 0; r < b->rows; r++) seen += place_of(b, r).position + 1;
    if (2 * seen * s->n_head * s->head_dim < MIN_SHARED)
        attention_work(&job, 0, 1);
    else
        amber_pool_run(b->pool, attention_work, &job);
}
