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
        model_embed(job->b->model, job->tokens[r], job->b->x + (int64_t)r * n);
}

void op_embed(struct batch *b, const int32_t *tokens) {
    run_rows(b, embed_work, &(struct embed_job){b, tokens});
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

void op_softcap(struct batch *b, float *logits, float cap) {
    amber_pool_run(b->pool, softcap_work, &(struct softcap_job){b, logits, cap});
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
