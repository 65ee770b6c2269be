/* ops_experts.c: mixture of experts. Each token goes to the few experts that a router chooses; the
 * rows of one expert are gathered, so that its matrices are read once for all of them. */
#include "ops.h"

#include <math.h>
#include <string.h>

static const struct experts *experts_of(const struct batch *b, int il) {
    return &b->model->layers[il].experts;
}

/* ---- routing ---- */

struct route_job {
    struct batch *b;
    const struct experts *experts;
    const struct norm *norm;
};

static void norm_work(void *ctx, int ith, int nth) {
    const struct route_job *job = ctx;
    const struct batch *b = job->b;
    int begin, end, n = b->model->shape.n_embd;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++)
        norm_row(b, job->norm, 0, b->y + (int64_t)r * n, b->x + (int64_t)r * n);
}

static double share_of(const struct shape *s, float logit, double all) {
    return s->expert_sigmoid ? 1 / (1 + exp(-(double)logit)) : exp((double)logit) / all;
}

/* A token's experts and their shares, which are softmax or sigmoid of the logits: the `used` largest,
 * lower index first among equals. A bias counts for the choice alone. */
static void choose_experts(const struct shape *s, const float *bias, const float *logits,
                           int32_t *chosen, float *share) {
    float rank[MAX_EXPERTS], most = 0;
    double all = 1, sum = 0;
    if (!s->expert_sigmoid) {
        most = logits[0], all = 0;
        for (int e = 1; e < s->n_expert; e++) most = fmaxf(most, logits[e]);
        for (int e = 0; e < s->n_expert; e++) all += exp((double)(logits[e] - most));
    }
    for (int e = 0; e < s->n_expert; e++)
        rank[e] = bias ? (float)(share_of(s, logits[e] - most, all) + (double)bias[e]) : logits[e];
    for (int i = 0; i < s->n_expert_used; i++) {
        int best = 0;
        for (int e = 1; e < s->n_expert; e++)
            if (!(rank[e] <= rank[best])) best = e;
        chosen[i] = best;
        share[i] = (float)share_of(s, logits[best] - most, all);
        sum += (double)share[i];
        rank[best] = -INFINITY;
    }
    const double norm = s->expert_norm ? 1 / fmax(sum, 1e-20) : 1;
    for (int i = 0; i < s->n_expert_used; i++)
        share[i] = (float)((double)share[i] * norm * (double)s->expert_scale);
}

static void route_work(void *ctx, int ith, int nth) {
    const struct route_job *job = ctx;
    struct batch *b = job->b;
    const struct shape *s = &b->model->shape;
    int begin, end;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    if (begin == end) return;
    struct amber_gemm_f32 g = {.w = job->experts->router,
                               .bias = job->experts->router_bias,
                               .n_out = s->n_expert,
                               .n_in = s->n_embd,
                               .x = b->y + (int64_t)begin * s->n_embd,
                               .ldx = s->n_embd,
                               .rows = end - begin,
                               .y = b->router + (int64_t)begin * s->n_expert,
                               .ldy = s->n_expert};
    b->kernels->gemm_f32(&g, 0, s->n_expert);
    for (int r = begin; r < end; r++)
        choose_experts(s, job->experts->choice_bias, b->router + (int64_t)r * s->n_expert,
                       b->chosen + (int64_t)r * s->n_expert_used,
                       b->share + (int64_t)r * s->n_expert_used);
}

void op_route(struct batch *b, int il) {
    const struct shape *s = &b->model->shape;
    struct route_job job = {b, experts_of(b, il), &b->model->layers[il].ffn_norm};
    run_rows(b, norm_work, &job);
    run_rows(b, route_work, &job);

    /* Slots in the order of their experts, tokens in order within one. */
    const int n = b->rows * s->n_expert_used;
    memset(b->expert_at, 0, sizeof *b->expert_at * ((size_t)s->n_expert + 1));
    for (int i = 0; i < n; i++) b->expert_at[b->chosen[i] + 1]++;
    for (int e = 0; e < s->n_expert; e++) b->expert_at[e + 1] += b->expert_at[e];
    for (int i = 0; i < n; i++) b->slot[b->expert_at[b->chosen[i]]++] = i;
    for (int e = s->n_expert; e > 0; e--) b->expert_at[e] = b->expert_at[e - 1];
    b->expert_at[0] = 0;
}

/* ---- gathered rows ---- */

struct hidden_job {
    struct batch *b;
    struct activation *in;
};

struct gather_job {
    struct batch *b;
    const struct activation *from;
    struct activation *to;
};

static void gather_work(void *ctx, int ith, int nth) {
    const struct gather_job *job = ctx;
    const struct batch *b = job->b;
    const struct activation *from = job->from, *to = job->to;
    const int used = b->model->shape.n_expert_used;
    const size_t n = (size_t)b->n_in;
    int begin, end;
    amber_split(b->rows * used, 1, ith, nth, &begin, &end);
    for (int i = begin; i < end; i++) {
        const int64_t r = b->slot[i] / used;
        if (from->f32) {
            memcpy(to->f32 + i * (int64_t)n, from->f32 + r * (int64_t)n, sizeof(float) * n);
            continue;
        }
        memcpy(to->a8.q + i * to->a8.stride, from->a8.q + r * from->a8.stride,
               (size_t)to->a8.k_pad);
        to->a8.scale[i] = from->a8.scale[r];
        to->a8.sum[i] = from->a8.sum[r];
        if (from->a8.shift) to->shift[i] = from->a8.shift[r];
    }
}

static void shape_like(struct activation *to, const struct activation *from, int rows) {
    to->of = from->of;
    to->a8.k_pad = from->a8.k_pad;
    to->a8.stride = from->a8.stride;
    to->a8.shift = from->a8.shift ? to->shift : NULL;
    to->a8.rows = rows;
}

/* ---- lists ----
 *
 * Rows of one expert are paired among themselves, expert e's from pair expert_at[e] / 2 + e on. */

static int64_t first_pair(const struct batch *b, int e) {
    return b->expert_at[e] / 2 + e;
}

static int expert_count(const struct batch *b, int e) {
    return b->expert_at[e + 1] - b->expert_at[e];
}

/* The rows of expert e as an operand. */
static struct amber_a8 expert_rows(const struct batch *b, const struct activation *in, int e) {
    return rows_of(in, b->expert_at[e], expert_count(b, e), true);
}

static struct amber_nm expert_lists_at(const struct batch *b, const struct activation *in, int e) {
    struct amber_nm nm = in->nm;
    nm.lists += first_pair(b, e) * nm.stride;
    return nm;
}

static bool is_listed(const struct batch *b, const struct activation *in, int e) {
    return in->nm.keep && expert_count(b, e) >= MIN_LISTED;
}

static void list_work(void *ctx, int ith, int nth) {
    const struct hidden_job *job = ctx;
    const struct batch *b = job->b;
    const int n = b->rows * b->model->shape.n_expert_used;
    const int low = (int)((int64_t)n * ith / nth), high = (int)((int64_t)n * (ith + 1) / nth);
    for (int e = 0; e < b->model->shape.n_expert; e++) {
        if (!is_listed(b, job->in, e)) continue;
        /* Pair i of an expert belongs to the thread that has its first row. */
        const int at = b->expert_at[e], pairs = amber_nm_pairs(expert_count(b, e), 0);
        const int p0 = amber_max(low - at + 1, 0) / 2, p1 = amber_max(high - at + 1, 0) / 2;
        const struct amber_a8 a = expert_rows(b, job->in, e);
        const struct amber_nm nm = expert_lists_at(b, job->in, e);
        if (p0 < amber_min(p1, pairs)) b->kernels->pack_nm(&nm, &a, p0, amber_min(p1, pairs));
    }
}

/* Lists the rows of gathered[i] where that makes products faster. */
static void list_gathered(struct batch *b, int i) {
    struct activation *in = &b->gathered[i];
    in->nm = (struct amber_nm){.lists = b->expert_lists[i],
                               .stride = amber_nm_stride(in->a8.k_pad),
                               .keep = b->expert_lists[i] ? expert_keep(b, in) : 0};
    if (in->nm.keep) run_rows(b, list_work, &(struct hidden_job){b, in});
}

/* ---- products ---- */

/* The products of all experts with their rows. Panels of every matrix form one line, each as long as
 * the expert has rows, that is cut into equal parts. */
struct expert_job {
    struct batch *b;
    const struct linear *w[2]; /* [n_expert] each */
    float *y[2];               /* [rows * used, n_out] */
    const struct activation *in[2];
    int n;
};

static void expert_part(const struct expert_job *job, int i, int e, int panel0, int panel1) {
    const struct batch *b = job->b;
    const struct linear *w = &job->w[i][e];
    const struct activation *in = job->in[i];
    const int64_t first = b->expert_at[e];
    const int rows = expert_count(b, e);
    float *y = job->y[i] + first * w->n_out;
    if (w->f32) {
        struct amber_gemm_f32 g = {.w = w->f32,
                                   .bias = w->bias,
                                   .n_out = w->n_out,
                                   .n_in = w->n_in,
                                   .x = in->f32 + first * w->n_in,
                                   .ldx = w->n_in,
                                   .rows = rows,
                                   .y = y,
                                   .ldy = w->n_out};
        b->kernels->gemm_f32(&g, panel0 * AMBER_PANEL, amber_min(panel1 * AMBER_PANEL, w->n_out));
    } else {
        struct amber_gemm_w8a8 g = {.w = in->of ? w->pruned_w8 : w->w8,
                                    .a = expert_rows(b, in, e),
                                    .y = y,
                                    .ldy = w->n_out};
        if (is_listed(b, in, e)) {
            const struct amber_nm nm = expert_lists_at(b, in, e);
            b->kernels->gemm_nm(&g, &nm, panel0, panel1);
            return;
        }
        b->kernels->gemm_w8a8(&g, panel0, panel1);
    }
}

static int panels_of(const struct linear *w) {
    return (int)(amber_round_up(w->n_out, AMBER_PANEL) / AMBER_PANEL);
}

static void expert_work(void *ctx, int ith, int nth) {
    const struct expert_job *job = ctx;
    const struct batch *b = job->b;
    const struct shape *s = &b->model->shape;
    int64_t total = 0, base = 0;
    for (int i = 0; i < job->n; i++)
        total += (int64_t)panels_of(job->w[i]) * b->rows * s->n_expert_used;
    const int64_t low = total * ith / nth, high = total * (ith + 1) / nth;
    for (int e = 0; e < s->n_expert; e++) {
        const int64_t rows = b->expert_at[e + 1] - b->expert_at[e];
        if (rows == 0) continue;
        for (int i = 0; i < job->n; i++) {
            const int64_t panels = panels_of(&job->w[i][e]);
            int64_t p0 = (low - base + rows - 1) / rows, p1 = (high - base + rows - 1) / rows;
            p0 = low <= base ? 0 : p0;
            p1 = p1 < panels ? p1 : panels;
            if (high > base && p0 < p1) expert_part(job, i, e, (int)p0, (int)p1);
            base += panels * rows;
        }
    }
}

static void run_experts(struct expert_job *job) {
    int64_t work = 0;
    const struct shape *s = &job->b->model->shape;
    for (int i = 0; i < job->n; i++) work += (int64_t)job->w[i]->n_out * job->w[i]->n_in;
    if (work * job->b->rows * s->n_expert_used < MIN_SHARED)
        expert_work(job, 0, 1);
    else
        amber_pool_run(job->b->pool, expert_work, job);
}

/* ---- between the products, and after them ---- */

static void hidden_work(void *ctx, int ith, int nth) {
    const struct hidden_job *job = ctx;
    struct batch *b = job->b;
    const int used = b->model->shape.n_expert_used;
    int begin, end;
    amber_split(b->rows * used, 1, ith, nth, &begin, &end);
    for (int i = begin; i < end; i++) make_expert_row(b, job->in, i, b->slot[i] / used, ith);
}

static void combine_work(void *ctx, int ith, int nth) {
    struct batch *b = ctx;
    const int used = b->model->shape.n_expert_used, n = b->model->shape.n_embd;
    int begin, end;
    amber_split(n, AMBER_PANEL, ith, nth, &begin, &end);
    for (int e = 0; e < b->model->shape.n_expert; e++) {
        for (int i = b->expert_at[e]; i < b->expert_at[e + 1]; i++) {
            const float share = b->share[b->slot[i]], *out = b->expert_out + (int64_t)i * n;
            float *x = b->x + (int64_t)(b->slot[i] / used) * n;
            for (int k = begin; k < end; k++) x[k] += share * out[k];
        }
    }
}

void op_experts(struct batch *b, int il) {
    const struct experts *x = experts_of(b, il);
    const int rows = b->rows * b->model->shape.n_expert_used;
    prepare_unlisted(b, b->y, (const struct linear *const[]){x->gate, x->up}, 2);
    struct expert_job job = {.b = b, .w = {x->gate, x->up}, .y = {b->gate, b->up}, .n = 2};
    for (int i = 0; i < b->n_inputs; i++) {
        shape_like(&b->gathered[i], &b->in[i], rows);
        run_rows(b, gather_work, &(struct gather_job){b, &b->in[i], &b->gathered[i]});
        list_gathered(b, i);
    }
    for (int i = 0; i < 2; i++) job.in[i] = &b->gathered[input_of(b, job.w[i]) - b->in];
    run_experts(&job);

    choose_expert_input(b, x->down, &b->gathered[0], rows);
    run_rows(b, hidden_work, &(struct hidden_job){b, &b->gathered[0]});
    list_gathered(b, 0);
    job = (struct expert_job){
        .b = b, .w = {x->down}, .y = {b->expert_out}, .in = {&b->gathered[0]}, .n = 1};
    run_experts(&job);
    run_rows(b, combine_work, b);
}

static void gated_work(void *ctx, int ith, int nth) {
    const struct route_job *job = ctx;
    struct batch *b = job->b;
    const int n = b->model->shape.n_embd;
    int begin, end;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++) {
        const float *in = b->y + (int64_t)r * n, *out = b->expert_out + (int64_t)r * n;
        float *x = b->x + (int64_t)r * n;
        double dot = 0;
        for (int k = 0; k < n; k++) dot += (double)in[k] * (double)job->experts->shared_router[k];
        const float share = (float)(1 / (1 + exp(-dot)));
        for (int k = 0; k < n; k++) x[k] += share * out[k];
    }
}

void op_shared_expert(struct batch *b, int il) {
    const struct layer *w = &b->model->layers[il];
    const struct linear *gate_up[] = {&w->gate, &w->up}, *down[] = {&w->down};
    op_prepare(b, b->y, gate_up, 2);
    op_linear(b, gate_up, (float *[]){b->gate, b->up}, 2);
    op_activate(b, &w->down);
    if (!w->experts.shared_router) {
        op_linear_residual(b, &w->down, &w->post_ffn_norm);
        return;
    }
    op_linear(b, down, &b->expert_out, 1);
    run_rows(b, gated_work, &(struct route_job){b, &w->experts, NULL});
}
