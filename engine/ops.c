/* ops.c: the steps of the forward pass over a batch of rows, split over the threads. Row work is cut
 * by rows, linear layers by weight panels, attention by its kernel's units. How the work is cut never
 * changes a result. */
#include "session.h"

#include <math.h>
#include <string.h>

/* Rows from which on products over lists are faster than dense ones. */
enum { MIN_LISTED = 24 };

/* Multiplications up to which one thread is done before the others have heard of the job: a few
 * microseconds, as the hand-over takes, and a thousand times that where other programs hold the
 * cores. */
enum { MIN_SHARED = 1 << 17 };

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

struct embed_job {
    struct batch *b;
    const int32_t *tokens;
};

static void embed_work(void *ctx, int ith, int nth) {
    const struct embed_job *job = ctx;
    int begin, end, n = job->b->model->shape.n_embd;
    amber_split(job->b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++)
        model_embed(job->b->model, job->tokens[r], job->b->x + (int64_t)r * n);
}

void op_embed(struct batch *b, const int32_t *tokens) {
    run_rows(b, embed_work, &(struct embed_job){b, tokens});
}

/* ---- the inputs of the linear layers ---- */

/* Two projections can read one pruned input where their rules and channel scores agree. */
static bool same_input(const struct linear *a, const struct linear *b) {
    if (!a || !b) return a == b;
    return a->score == b->score && rule_equal(a->rule, b->rule);
}

/* The projection whose rule prunes w's input in this batch; NULL: none does. */
static const struct linear *pruned_for(const struct batch *b, const struct linear *w) {
    return b->sparse && w->rule ? w : NULL;
}

static const struct activation *input_of(const struct batch *b, const struct linear *w) {
    const struct linear *of = pruned_for(b, w);
    int i = 0;
    while (!same_input(b->in[i].of, of)) i++;
    return &b->in[i];
}

/* The first row that a rule prunes: pairs of rows before it hold protected tokens. */
static int first_pruned(const struct batch *b) {
    const int left = b->model->sparse_first_n - b->pos0, odd = b->pos0 % 2;
    return left <= 0 ? 0 : (int)amber_round_up(left + odd, 2) - odd;
}

static void choose_lists(const struct batch *b, struct activation *in, int *n_lists) {
    in->nm.keep = 0;
    in->listed_from = first_pruned(b);
    if (!in->of || b->model->float_weights || b->rows - in->listed_from < MIN_LISTED) return;
    in->nm.keep = amber_nm_listed(b->kernels, &in->of->rule->pattern);
    if (in->nm.keep == 0) return;
    in->nm.lists = b->lists[(*n_lists)++];
    in->nm.stride = amber_nm_stride(in->a8.k_pad);
    in->nm.first = in->listed_from == 0 && b->pos0 % 2;
}

/* The rows that are in lists. */
static struct amber_a8 listed_rows(const struct activation *in) {
    struct amber_a8 a = in->a8;
    const int from = in->listed_from;
    a.q += from * a.stride;
    a.scale += from;
    a.sum += from;
    if (a.shift) a.shift += from;
    a.rows -= from;
    return a;
}

static void choose_inputs(struct batch *b, const struct linear *const w[], int n) {
    int n_lists = 0;
    b->n_in = w[0]->n_in;
    b->n_inputs = 0;
    for (int i = 0; i < n; i++) {
        const struct linear *of = pruned_for(b, w[i]);
        int j = 0;
        while (j < b->n_inputs && !same_input(b->in[j].of, of)) j++;
        if (j < b->n_inputs) continue;
        struct activation *in = &b->in[b->n_inputs++];
        in->of = of;
        in->a8.k_pad = (int)amber_round_up(b->n_in, AMBER_K_ALIGN);
        in->a8.stride = amber_a8_stride(in->a8.k_pad);
        in->a8.rows = b->rows;
        in->a8.shift = of && of->rule->shift != SHIFT_NONE ? in->shift : NULL;
        choose_lists(b, in, &n_lists);
    }
}

/* Projections that read the same input. */
enum { N_GROUPS = 4 };
static const int groups[N_GROUPS][4] = {
    {PROJ_Q, PROJ_K, PROJ_V, -1}, {PROJ_GATE, PROJ_UP, -1}, {PROJ_O, -1}, {PROJ_DOWN, -1}};

int plan_lists(const struct plan *plan, const struct amber_kernels *kernels) {
    int most = 0;
    for (int il = 0; il < plan->n_layer; il++) {
        for (int g = 0; g < N_GROUPS; g++) {
            int lists = 0;
            for (int i = 0; groups[g][i] >= 0; i++)
                lists += amber_nm_listed(kernels, &plan_rule(plan, il, groups[g][i])->pattern) > 0;
            most = amber_max(most, lists);
        }
    }
    return most;
}

int plan_inputs(const struct plan *plan) {
    int most = 1;
    for (int il = 0; il < plan->n_layer; il++) {
        for (int g = 0; g < N_GROUPS; g++) {
            int sparse = 0, dense = 0;
            for (int i = 0; groups[g][i] >= 0; i++) {
                if (rule_is_sparse(plan_rule(plan, il, groups[g][i])))
                    sparse++;
                else
                    dense = 1;
            }
            most = amber_max(most, sparse + dense);
        }
    }
    return most;
}

/* Lower median of z [n] by quickselect; work [n] is overwritten. */
static float median(const float *z, float *work, int n) {
    memcpy(work, z, sizeof *z * (size_t)n);
    int k = (n - 1) / 2, low = 0, high = n - 1;
    while (low < high) {
        float pivot = work[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (work[i] < pivot) i++;
            while (work[j] > pivot) j--;
            if (i > j) break;
            float t = work[i];
            work[i++] = work[j];
            work[j--] = t;
        }
        if (k <= j)
            high = j;
        else if (k >= i)
            low = i;
        else
            break;
    }
    return work[k];
}

static double mean(const float *z, int n) {
    double sum = 0;
    for (int k = 0; k < n; k++) sum += z[k];
    return sum / n;
}

static double variance(const float *z, int n) {
    double m = mean(z, n), sum = 0;
    for (int k = 0; k < n; k++) sum += (z[k] - m) * (z[k] - m);
    return sum / n;
}

static void store_row(const struct batch *b, const struct activation *in, int r, const float *row) {
    if (in->f32)
        memcpy(in->f32 + (int64_t)r * b->n_in, row, sizeof *row * (size_t)b->n_in);
    else
        b->kernels->quantize_row(in->a8.q + r * in->a8.stride, &in->a8.scale[r], &in->a8.sum[r],
                                 row, b->n_in, in->a8.k_pad);
}

/* One or two neighbouring rows under one rule: z = x - shift, prune, then what the rule gives back.
 * INT8 rows carry the VAR factor in their scale and the shift beside it, for the epilogue; float rows
 * are written out in full. z [rows, n] and work [n] are scratch. */
static void store_pruned(const struct batch *b, const struct activation *in, int r, int rows,
                         const float *x, float *z, float *work, void *prune_scratch) {
    const struct rule *rule = in->of->rule;
    int n = b->n_in;
    float shift[2] = {0, 0};
    double var[2] = {0, 0};
    memcpy(z, x, sizeof *z * (size_t)n * (size_t)rows);
    for (int i = 0; i < rows; i++) {
        float *row = z + (int64_t)i * n;
        if (rule->shift == SHIFT_MEAN) shift[i] = (float)mean(row, n);
        if (rule->shift == SHIFT_MEDIAN) shift[i] = median(row, work, n);
        if (rule->shift != SHIFT_NONE)
            for (int k = 0; k < n; k++) row[k] -= shift[i];
        if (rule->var) var[i] = variance(row, n);
    }
    b->kernels->prune(&rule->pattern, z, n, rows, in->of->score, n, prune_scratch);
    for (int i = 0; i < rows; i++) {
        float *row = z + (int64_t)i * n;
        /* The floor is the paper's: a row pruned to a constant stays finite. */
        float scale = rule->var ? (float)sqrt(var[i] / fmax(variance(row, n), 1e-9)) : 1.0f;
        if (in->f32)
            for (int k = 0; k < n; k++) row[k] = row[k] * scale + shift[i];
        store_row(b, in, r + i, row);
        if (!in->f32) {
            in->a8.scale[r + i] *= scale;
            in->shift[r + i] = shift[i];
        }
    }
}

struct input_job {
    struct batch *b;
    void (*make)(struct batch *b, const void *source, int r, float *row);
    const void *source;
};

static void input_work(void *ctx, int ith, int nth) {
    const struct input_job *job = ctx;
    struct batch *b = job->b;
    const int n = b->n_in, odd = b->pos0 % 2;
    float *x = (float *)(void *)(b->row_scratch + ith * b->row_scratch_bytes);
    float *z = x + 2 * (int64_t)n, *work = z + 2 * (int64_t)n;
    void *prune_scratch = (char *)x + amber_round_up(5 * (int64_t)n * (int64_t)sizeof *x, 64);

    int begin, end;
    amber_split(b->rows + odd, 2, ith, nth, &begin, &end);
    for (int first = begin; first < end; first += 2) {
        int r0 = amber_max(first - odd, 0), r1 = amber_min(first - odd + 2, b->rows),
            rows = r1 - r0;
        for (int r = r0; r < r1; r++) job->make(b, job->source, r, x + (int64_t)(r - r0) * n);
        bool protected = r0 < first_pruned(b);
        for (int i = 0; i < b->n_inputs; i++) {
            const struct activation *in = &b->in[i];
            if (in->of && !protected && in->of->rule->pattern.tokens == 2) {
                store_pruned(b, in, r0, rows, x, z, work, prune_scratch);
            } else {
                for (int r = r0; r < r1; r++) {
                    const float *row = x + (int64_t)(r - r0) * n;
                    if (in->of && !protected) {
                        store_pruned(b, in, r, 1, row, z, work, prune_scratch);
                    } else {
                        store_row(b, in, r, row);
                        if (in->a8.shift) in->shift[r] = 0;
                    }
                }
            }
            if (in->nm.keep && !protected) {
                const struct amber_a8 listed = listed_rows(in);
                const int pair = (r0 - in->listed_from + in->nm.first) / 2;
                b->kernels->pack_nm(&in->nm, &listed, pair, pair + 1);
            }
        }
    }
}

static void make_norm(struct batch *b, const void *source, int r, float *row) {
    b->kernels->rmsnorm(row, b->x + (int64_t)r * b->n_in, source, b->n_in,
                        b->model->shape.norm_eps);
}

static void make_copy(struct batch *b, const void *source, int r, float *row) {
    memcpy(row, (const float *)source + (int64_t)r * b->n_in, sizeof *row * (size_t)b->n_in);
}

static void make_swiglu(struct batch *b, const void *source, int r, float *row) {
    (void)source;
    int64_t at = (int64_t)r * b->n_in;
    b->kernels->silu_mul(row, b->gate + at, b->up + at, b->n_in);
}

void op_norm(struct batch *b, const float *weight, const struct linear *const w[], int n) {
    choose_inputs(b, w, n);
    run_rows(b, input_work, &(struct input_job){b, make_norm, weight});
}

void op_prepare(struct batch *b, const float *src, const struct linear *w) {
    choose_inputs(b, &w, 1);
    run_rows(b, input_work, &(struct input_job){b, make_copy, src});
}

void op_swiglu(struct batch *b, const struct linear *w) {
    choose_inputs(b, &w, 1);
    run_rows(b, input_work, &(struct input_job){b, make_swiglu, NULL});
}

/* ---- linear layers ---- */

struct linear_job {
    struct batch *b;
    const struct linear *const *w;
    float *const *y;
    int n;
    bool add;
};

static void linear_part(const struct batch *b, const struct linear *w, float *y, bool add,
                        int begin, int end) {
    const struct activation *in = input_of(b, w);
    if (w->f32) {
        struct amber_gemm_f32 g = {.w = w->f32,
                                   .bias = w->bias,
                                   .n_out = w->n_out,
                                   .n_in = w->n_in,
                                   .x = in->f32,
                                   .ldx = b->n_in,
                                   .rows = b->rows,
                                   .y = y,
                                   .ldy = w->n_out,
                                   .add = add};
        b->kernels->gemm_f32(&g, begin, amber_min(end, w->n_out));
    } else {
        struct amber_gemm_w8a8 g = {.w = w->w8, .a = in->a8, .y = y, .ldy = w->n_out, .add = add};
        const int panel0 = begin / AMBER_PANEL, panel1 = (end + AMBER_PANEL - 1) / AMBER_PANEL;
        if (in->nm.keep) g.a.rows = in->listed_from;
        if (g.a.rows > 0) b->kernels->gemm_w8a8(&g, panel0, panel1);
        if (in->nm.keep) {
            g.a = listed_rows(in);
            g.y = y + in->listed_from * g.ldy;
            b->kernels->gemm_nm(&g, &in->nm, panel0, panel1);
        }
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

static void run_linear(struct linear_job *job) {
    int64_t work = 0;
    for (int i = 0; i < job->n; i++) work += (int64_t)job->w[i]->n_out * job->w[i]->n_in;
    if (work * job->b->rows < MIN_SHARED)
        linear_work(job, 0, 1);
    else
        amber_pool_run(job->b->pool, linear_work, job);
}

void op_linear(struct batch *b, const struct linear *const w[], float *const y[], int n) {
    run_linear(&(struct linear_job){b, w, y, n, false});
}

void op_linear_residual(struct batch *b, const struct linear *w) {
    run_linear(&(struct linear_job){b, (const struct linear *[]){w}, (float *[]){b->x}, 1, true});
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
