/* ops.c: the steps of the forward pass over a batch of rows, split over the threads. Row work is cut
 * by rows, linear layers by weight panels, attention by its kernel's units. How the work is cut never
 * changes a result. */
#include "ops.h"

#include <math.h>
#include <string.h>

struct embed_job {
    struct batch *b;
    const int32_t *tokens;
};

static void embed_work(void *ctx, int ith, int nth) {
    const struct embed_job *job = ctx;
    int begin, end, n = job->b->model->shape.n_embd;
    amber_split(job->b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++)
        model_embed(job->b->model, job->tokens[r], place_of(job->b, r).position,
                    job->b->x + (int64_t)r * n);
}

static bool begin_step(struct batch *b, const int32_t *tokens, float *logits,
                       amber_status *status) {
    (void)logits, (void)status;
    b->x = b->x_base;
    run_rows(b, embed_work, &(struct embed_job){b, tokens});
    op_rope_table(b);
    return true;
}

static amber_status end_step(struct batch *b) {
    (void)b;
    return AMBER_OK;
}

/* ---- linear layers ---- */

struct linear_job {
    struct batch *b;
    const struct linear *const *w;
    float *const *y;
    int n;
    bool add;
};

/* Outputs begin..end-1 of rows first..first+rows-1, which are all pruned or all dense. */
static void multiply(const struct batch *b, const struct linear *w, const struct activation *in,
                     bool pruned, int first, int rows, float *y, bool add, int begin, int end) {
    if (rows <= 0) return;
    y += (int64_t)first * w->n_out;
    if (w->f32) {
        struct amber_gemm_f32 g = {.w = pruned ? w->pruned_f32 : w->f32,
                                   .bias = pruned ? w->pruned_bias : w->bias,
                                   .n_out = w->n_out,
                                   .n_in = w->n_in,
                                   .x = in->f32 + (int64_t)first * b->n_in,
                                   .ldx = b->n_in,
                                   .rows = rows,
                                   .y = y,
                                   .ldy = w->n_out,
                                   .add = add};
        b->kernels->gemm_f32(&g, begin, amber_min(end, w->n_out));
        return;
    }
    const int panel0 = begin / AMBER_PANEL, panel1 = (end + AMBER_PANEL - 1) / AMBER_PANEL;
    struct amber_gemm_w8a8 g = {.w = pruned ? w->pruned_w8 : w->w8,
                                .a = rows_of(in, first, rows, pruned),
                                .y = y,
                                .ldy = w->n_out,
                                .add = add};
    if (pruned && in->nm.keep)
        b->kernels->gemm_nm(&g, &in->nm, panel0, panel1);
    else
        b->kernels->gemm_w8a8(&g, panel0, panel1);
}

static void linear_part(const struct batch *b, const struct linear *w, float *y, bool add,
                        int begin, int end) {
    const struct activation *in = input_of(b, w);
    const int dense = in->of ? in->pruned_from : b->rows;
    multiply(b, w, in, false, 0, dense, y, add, begin, end);
    multiply(b, w, in, true, dense, b->rows - dense, y, add, begin, end);
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

/* What pruning took from the rows of one layer, through its factors: y += left (right x). */
struct factor_job {
    struct batch *b;
    const struct linear *w;
    struct amber_gemm_f32 g;
};

static void factor_work(void *ctx, int ith, int nth) {
    const struct factor_job *job = ctx;
    int begin, end;
    amber_split(job->g.n_out, 4, ith, nth, &begin, &end);
    if (begin < end) job->b->kernels->gemm_f32(&job->g, begin, end);
}

static void add_pruned(struct batch *b, const struct linear *w, float *y) {
    const struct activation *in = input_of(b, w);
    if (!in->of || !w->left || in->pruned_from >= b->rows) return;
    const int from = in->pruned_from, rows = b->rows - from, rank = w->rule->rank;
    struct factor_job job = {b,
                             w,
                             {.w = w->right,
                              .n_out = rank,
                              .n_in = w->n_in,
                              .x = in->rest + (int64_t)from * b->n_in,
                              .ldx = b->n_in,
                              .rows = rows,
                              .y = b->low_rank,
                              .ldy = rank}};
    amber_pool_run(b->pool, factor_work, &job);
    job.g = (struct amber_gemm_f32){.w = w->left,
                                    .n_out = w->n_out,
                                    .n_in = rank,
                                    .x = b->low_rank,
                                    .ldx = rank,
                                    .rows = rows,
                                    .y = y + (int64_t)from * w->n_out,
                                    .ldy = w->n_out,
                                    .add = true};
    amber_pool_run(b->pool, factor_work, &job);
}

static void run_linear(struct linear_job *job) {
    int64_t work = 0;
    for (int i = 0; i < job->n; i++) work += (int64_t)job->w[i]->n_out * job->w[i]->n_in;
    if (work * job->b->rows < MIN_SHARED)
        linear_work(job, 0, 1);
    else
        amber_pool_run(job->b->pool, linear_work, job);
    for (int i = 0; i < job->n; i++) add_pruned(job->b, job->w[i], job->y[i]);
}

void op_linear(struct batch *b, const struct linear *const w[], float *const y[], int n) {
    run_linear(&(struct linear_job){b, w, y, n, false});
}

struct add_job {
    struct batch *b;
    const struct norm *norm;
};

static void add_work(void *ctx, int ith, int nth) {
    const struct add_job *job = ctx;
    const struct batch *b = job->b;
    int begin, end, n = b->model->shape.n_embd;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        float *x = b->x + (int64_t)r * n, *y = b->y + (int64_t)r * n;
        norm_row(b, job->norm, 0, y, y);
        for (int i = 0; i < n; i++) x[i] += y[i];
    }
}

void op_linear_residual(struct batch *b, const struct linear *w, const struct norm *post) {
    const bool add = !post->weight;
    run_linear(&(struct linear_job){b, (const struct linear *[]){w}, (float *[]){add ? b->x : b->y},
                                    1, add});
    if (!add) run_rows(b, add_work, &(struct add_job){b, post});
}

struct softcap_job {
    struct batch *b;
    float *logits, cap;
};

static void softcap_work(void *ctx, int ith, int nth) {
    const struct softcap_job *job = ctx;
    int64_t n = (int64_t)job->b->rows * job->b->model->shape.n_vocab;
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; i++)
        job->logits[i] = job->cap * tanhf(job->logits[i] / job->cap);
}

void op_head(struct batch *b, float *logits) {
    const struct linear *head[] = {&b->model->output};
    const float cap = b->model->shape.final_softcap;
    op_norm(b, &b->model->output_norm, head, 1);
    op_linear(b, head, &logits, 1);
    if (cap > 0) amber_pool_run(b->pool, softcap_work, &(struct softcap_job){b, logits, cap});
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

static bool read_cells(struct batch *b, void *host, const uint8_t *cells, size_t bytes) {
    (void)b;
    memcpy(host, cells, bytes);
    return true;
}

static bool write_cells(struct batch *b, uint8_t *cells, const void *host, size_t bytes) {
    (void)b;
    memcpy(cells, host, bytes);
    return true;
}

const struct ops cpu_ops = {.begin = begin_step,
                            .end = end_step,
                            .norm = op_norm,
                            .prepare = op_prepare,
                            .activate = op_activate,
                            .linear = op_linear,
                            .linear_residual = op_linear_residual,
                            .rope_and_store = op_rope_and_store,
                            .attention = op_attention,
                            .route = op_route,
                            .experts = op_experts,
                            .shared_expert = op_shared_expert,
                            .keep_rows = op_keep_rows,
                            .head = op_head,
                            .read_cells = read_cells,
                            .write_cells = write_cells};
