/* ops_input.c: the inputs of the linear layers, made from rows one by one: normed, pruned where a rule
 * says so, and quantized. */
#include "ops.h"

#include <math.h>
#include <string.h>

bool same_input(const struct linear *a, const struct linear *b) {
    if (!a || !b) return a == b;
    return a->score == b->score && a->shift == b->shift && rule_equal(a->rule, b->rule);
}

const struct linear *pruned_for(const struct batch *b, const struct linear *w) {
    return b->sparse && w->rule ? w : NULL;
}

const struct activation *input_of(const struct batch *b, const struct linear *w) {
    const struct linear *of = pruned_for(b, w);
    int i = 0;
    while (!same_input(b->in[i].of, of)) i++;
    return &b->in[i];
}

int first_pruned(const struct batch *b) {
    const int left = b->model->sparse_first_n - b->pos0, odd = b->pos0 % 2;
    return left <= 0 ? 0 : (int)amber_round_up(left + odd, 2) - odd;
}

static void choose_lists(const struct batch *b, struct activation *in, int *n_lists) {
    if (!in->of || b->model->float_weights || b->rows - in->pruned_from < MIN_LISTED) return;
    in->nm.keep = amber_nm_listed(b->kernels, &in->of->rule->pattern);
    if (in->nm.keep == 0) return;
    in->nm.lists = b->lists[(*n_lists)++];
    in->nm.stride = amber_nm_stride(in->a8.k_pad);
    in->nm.first = in->pruned_from == 0 && b->pos0 % 2;
}

struct amber_a8 rows_of(const struct activation *in, int first, int rows, bool pruned) {
    struct amber_a8 a = in->a8;
    a.q += first * a.stride;
    a.scale += first;
    a.sum += first;
    a.shift = pruned && a.shift ? a.shift + first : NULL;
    a.rows = rows;
    return a;
}

/* An input of w's rule and width, not in lists. */
static void choose_input(const struct batch *b, const struct linear *w, struct activation *in,
                         int rows) {
    in->of = pruned_for(b, w);
    in->a8.k_pad = (int)amber_round_up(w->n_in, AMBER_K_ALIGN);
    in->a8.stride = amber_a8_stride(in->a8.k_pad);
    in->a8.rows = rows;
    in->a8.shift = in->of && rule_shift_is_dynamic(in->of->rule) ? in->shift : NULL;
    in->pruned_from = amber_min(first_pruned(b), rows);
    in->nm.keep = 0;
}

static void choose_inputs(struct batch *b, const struct linear *const w[], int n, bool lists) {
    int n_lists = 0;
    b->n_in = w[0]->n_in;
    b->n_inputs = 0;
    for (int i = 0; i < n; i++) {
        const struct linear *of = pruned_for(b, w[i]);
        int j = 0;
        while (j < b->n_inputs && !same_input(b->in[j].of, of)) j++;
        if (j < b->n_inputs) continue;
        struct activation *in = &b->in[b->n_inputs++];
        choose_input(b, w[i], in, b->rows);
        if (lists) choose_lists(b, in, &n_lists);
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

static const float *pruning_score(const struct batch *b, const struct activation *in) {
    return in->of->rule->criterion == CRITERION_CLACT ? b->column_norm : in->of->score;
}

/* Of an input in lists: the rows that are, and the pair that row r begins. */
static struct amber_a8 listed_rows(const struct batch *b, const struct activation *in) {
    return rows_of(in, in->pruned_from, b->rows - in->pruned_from, true);
}
static int listed_pair(const struct activation *in, int r) {
    return (r - in->pruned_from + in->nm.first) / 2;
}

/* Rows that are only pruned need no step between. */
static bool lists_at_once(const struct batch *b, const struct activation *in) {
    const struct rule *rule = in->of->rule;
    return b->kernels->list_rows && !rule->var && !rule->rank && !rule_shift_is_dynamic(rule) &&
           !in->of->shift;
}

/* One or two neighbouring rows under one rule: z = x - shift, prune, then what the rule gives back.
 * INT8 rows carry the VAR factor in their scale and a shift of their own beside it, for the epilogue;
 * float rows are written out in full. The file's shifts come back with the biases. z [rows, n] and
 * work [n] are scratch. */
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
        if (rule_shift_is_dynamic(rule))
            for (int k = 0; k < n; k++) row[k] -= shift[i];
        if (in->of->shift)
            for (int k = 0; k < n; k++) row[k] -= in->of->shift[k];
        if (rule->rank) memcpy(in->rest + (int64_t)(r + i) * n, row, sizeof *row * (size_t)n);
        if (rule->var) var[i] = variance(row, n);
    }
    b->kernels->prune(&rule->pattern, z, n, rows, pruning_score(b, in), n, prune_scratch);
    for (int i = 0; i < rows; i++) {
        float *row = z + (int64_t)i * n;
        if (rule->rank) {
            float *rest = in->rest + (int64_t)(r + i) * n;
            for (int k = 0; k < n; k++) rest[k] -= row[k];
        }
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
    void (*make)(const struct batch *b, const void *source, int r, float *row);
    const void *source;
};

/* A thread's scratch: two rows as they are made, two as they are pruned, one more, and prune's. */
struct row_scratch {
    float *x, *z, *work;
    void *prune;
};

static struct row_scratch row_scratch(const struct batch *b, int ith) {
    const int64_t n = b->n_in;
    float *x = (float *)(void *)(b->row_scratch + ith * b->row_scratch_bytes);
    return (struct row_scratch){.x = x,
                                .z = x + 2 * n,
                                .work = x + 4 * n,
                                .prune =
                                    (char *)x + amber_round_up(5 * n * (int64_t)sizeof *x, 64)};
}

static void store_dense(const struct batch *b, const struct activation *in, int r,
                        const float *row) {
    store_row(b, in, r, row);
    if (in->a8.shift) in->shift[r] = 0;
}

static void input_work(void *ctx, int ith, int nth) {
    const struct input_job *job = ctx;
    struct batch *b = job->b;
    const int n = b->n_in, odd = b->pos0 % 2;
    const struct row_scratch scratch = row_scratch(b, ith);
    float *x = scratch.x;
    int begin, end;
    amber_split(b->rows + odd, 2, ith, nth, &begin, &end);
    for (int first = begin; first < end; first += 2) {
        int r0 = amber_max(first - odd, 0), r1 = amber_min(first - odd + 2, b->rows),
            rows = r1 - r0;
        for (int r = r0; r < r1; r++) job->make(b, job->source, r, x + (int64_t)(r - r0) * n);
        if (b->tap) memcpy(b->tap_rows + (int64_t)r0 * n, x, sizeof *x * (size_t)n * (size_t)rows);
        bool protected = r0 < first_pruned(b);
        for (int i = 0; i < b->n_inputs; i++) {
            const struct activation *in = &b->in[i];
            if (in->nm.keep && !protected && lists_at_once(b, in)) {
                const struct amber_a8 listed = listed_rows(b, in);
                b->kernels->list_rows(&in->of->rule->pattern, &in->nm, &listed, listed_pair(in, r0),
                                      x, pruning_score(b, in), n);
                continue;
            }
            if (in->of && !protected && in->of->rule->pattern.tokens == 2) {
                store_pruned(b, in, r0, rows, x, scratch.z, scratch.work, scratch.prune);
            } else {
                for (int r = r0; r < r1; r++) {
                    const float *row = x + (int64_t)(r - r0) * n;
                    if (in->of && !protected)
                        store_pruned(b, in, r, 1, row, scratch.z, scratch.work, scratch.prune);
                    else
                        store_dense(b, in, r, row);
                }
            }
            if (in->nm.keep && !protected) {
                const struct amber_a8 listed = listed_rows(b, in);
                const int pair = listed_pair(in, r0);
                b->kernels->pack_nm(&in->nm, &listed, pair, pair + 1);
            }
        }
    }
}

static void make_norm(const struct batch *b, const void *source, int r, float *row) {
    norm_row(b, source, 0, row, b->x + (int64_t)r * b->n_in);
}

static void make_copy(const struct batch *b, const void *source, int r, float *row) {
    memcpy(row, (const float *)source + (int64_t)r * b->n_in, sizeof *row * (size_t)b->n_in);
}

/* y = GELU(gate) * up with the exact GELU (arXiv 1606.08415); up NULL: ones. */
static void gelu_erf_mul(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) {
        const float g = 0.5f * gate[i] * (1 + erff(gate[i] * 0.70710678f));
        y[i] = up ? g * up[i] : g;
    }
}

static void make_activation(const struct batch *b, const void *source, int r, float *row) {
    (void)source;
    const struct arch *arch = b->model->shape.arch;
    const struct amber_kernels *kernels = b->kernels;
    const int64_t at = (int64_t)r * b->n_in;
    const float *up = b->up + at;
    void (*const functions[])(float *, const float *, const float *, int) = {
        [ACT_SILU] = kernels->silu_mul,          [ACT_GELU] = kernels->gelu_mul,
        [ACT_GELU_ERF] = gelu_erf_mul,           [ACT_RELU2] = kernels->relu2_mul,
        [ACT_CLAMPED] = kernels->swiglu_clamped,
    };
    if (arch->no_gate)
        functions[arch->act](row, up, NULL, b->n_in);
    else
        functions[arch->act](row, b->gate + at, up, b->n_in);
}

/* Shows the rows just made to who wants to see them: `first` is the first layer that reads them. A
 * shared expert reads what the experts do. */
static void show_input(const struct batch *b, const struct linear *first) {
    const struct layer *l = &b->model->layers[b->layer];
    const bool mixture = l->experts.router;
    int projection = -1;
    if (first == &l->q) projection = PROJ_Q;
    if (first == &l->o) projection = PROJ_O;
    if (mixture ? first == l->experts.gate : first == &l->gate || first == &l->up)
        projection = PROJ_GATE;
    if (first == &l->down && !mixture) projection = PROJ_DOWN;
    if (projection >= 0)
        b->tap(b->tap_user, b->layer, projection, b->pos0, b->rows, b->n_in, b->tap_rows);
}

/* Norms of the channels over the rows of the batch, one part of the channels per thread. */
static void column_norm_work(void *ctx, int ith, int nth) {
    const struct input_job *job = ctx;
    struct batch *b = job->b;
    const int n = b->n_in;
    int begin, end;
    amber_split(n, 1, ith, nth, &begin, &end);
    for (int k = begin; k < end; k++) {
        double sum = 0;
        for (int r = 0; r < b->rows; r++) {
            double v = b->tap_rows[(int64_t)r * n + k];
            sum += v * v;
        }
        b->column_norm[k] = (float)sqrt(sum);
    }
}

static void make_work(void *ctx, int ith, int nth) {
    const struct input_job *job = ctx;
    struct batch *b = job->b;
    int begin, end;
    amber_split(b->rows, 1, ith, nth, &begin, &end);
    for (int r = begin; r < end; r++)
        job->make(b, job->source, r, b->tap_rows + (int64_t)r * b->n_in);
}

/* CLACT (arXiv 2509.22166) ranks |x| by the norm of the channel over all tokens of the call. The norm
 * of the row, by which it divides, changes no mask. */
static void measure_columns(struct batch *b, const struct input_job *job) {
    run_rows(b, make_work, (void *)job);
    amber_pool_run(b->pool, column_norm_work, (void *)job);
}

static void make_inputs(struct batch *b, const struct linear *const w[], int n, bool lists,
                        const struct input_job *job) {
    choose_inputs(b, w, n, lists);
    if (b->sparse && b->model->plan.clact) measure_columns(b, job);
    run_rows(b, input_work, (void *)job);
    if (b->tap && b->prefill) show_input(b, w[0]);
}

void op_norm(struct batch *b, const struct norm *norm, const struct linear *const w[], int n) {
    const struct linear *present[MAX_INPUTS] = {NULL};
    int count = 0;
    for (int i = 0; i < n; i++)
        if (w[i]->n_out) present[count++] = w[i];
    if (norm->weight)
        make_inputs(b, present, count, true, &(struct input_job){b, make_norm, norm});
    else
        make_inputs(b, present, count, true, &(struct input_job){b, make_copy, b->x});
}

void op_prepare(struct batch *b, const float *src, const struct linear *const w[], int n) {
    make_inputs(b, w, n, true, &(struct input_job){b, make_copy, src});
}

void prepare_unlisted(struct batch *b, const float *src, const struct linear *const w[], int n) {
    make_inputs(b, w, n, false, &(struct input_job){b, make_copy, src});
}

void op_activate(struct batch *b, const struct linear *w) {
    make_inputs(b, &w, 1, true, &(struct input_job){b, make_activation, NULL});
}

void choose_expert_input(struct batch *b, const struct linear *w, struct activation *in, int rows) {
    b->n_in = w->n_in;
    choose_input(b, w, in, rows);
}

int expert_keep(const struct batch *b, const struct activation *in) {
    if (!in->of || b->model->float_weights || first_pruned(b) > 0) return 0;
    return amber_nm_listed_alone(b->kernels, &in->of->rule->pattern);
}

void make_expert_row(const struct batch *b, const struct activation *in, int i, int r, int ith) {
    const struct row_scratch scratch = row_scratch(b, ith);
    make_activation(b, NULL, i, scratch.x);
    if (in->of && r >= first_pruned(b))
        store_pruned(b, in, i, 1, scratch.x, scratch.z, scratch.work, scratch.prune);
    else
        store_dense(b, in, i, scratch.x);
}
