/* kernel_timer.c: single kernels timed by themselves, with operands as a model has them. */
#define _POSIX_C_SOURCE 200809L
#include "amber.h"
#include "common.h"
#include "kernels.h"
#include "ops.h"
#include "threads.h"

#include <math.h>
#include <string.h>
#include <time.h>

/* Operands that a model reads from memory lie in so many bytes, one copy after the other, that no
 * cache holds them until their next turn. */
#define COLD_BYTES    ((int64_t)256 << 20)
#define RUN_SECONDS   0.002 /* of a run: long against the clock's own steps */
#define COLD_ROWS     16    /* up to which a product waits for its weights */
#define MOST_ELEMENTS ((int64_t)1 << 31)

struct amber_kernel_timer {
    struct amber_kernels kernels;
    struct amber_pattern pattern;
    amber_work_fn work_fn;
    struct amber_gemm_w8a8 gemm;
    struct amber_nm nm; /* keep 0: no lists */
    struct amber_attention attention;
    float *x, *y, *work; /* work: [threads] of one pair of rows */
    uint8_t *scratch;    /* [threads, scratch_bytes] */
    int64_t scratch_bytes;
    uint8_t *cold;                 /* [copies, copy_bytes] */
    int64_t copy_bytes, scales_at; /* scales_at: of INT8 keys and of values, from their start */
    bool borrowed;                 /* cold is another timer's */
    int copies, calls, at;         /* at: the next copy */
    float *scale;
    struct amber_pool *pool; /* NULL: the calling thread alone */
};

static double seconds_of(const struct amber_kernel_timer *timer) {
    if (timer->pool) return amber_seconds();
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Of about the shape of activations: a sum of four even ones. */
static void fill_floats(float *x, int64_t n) {
    uint64_t state = 1;
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) sum += (float)next_random(&state) * 0x1p-31f;
        x[i] = sum - 2;
    }
}

/* As the rows of an input are made: pruned, quantized and listed. */
static void prepare_work(void *ctx, int ith, int nth) {
    const struct amber_kernel_timer *t = ctx;
    const struct amber_kernels *k = &t->kernels;
    const struct amber_a8 *a = &t->gemm.a;
    const int n = t->gemm.w.n_in, step = amber_max(t->pattern.tokens, 1);
    const bool sparse = t->pattern.kind != AMBER_PATTERN_DENSE;
    float *work = t->work + (int64_t)ith * 2 * n;
    uint8_t *scratch = t->scratch + ith * t->scratch_bytes;
    int begin, end;
    amber_split(a->rows, 2, ith, nth, &begin, &end);
    for (int r = begin; r < end; r += 2) {
        const int rows = amber_min(a->rows - r, 2);
        memcpy(work, t->x + (int64_t)r * n, sizeof(float) * (size_t)n * (size_t)rows);
        if (t->nm.keep && k->list_rows) {
            k->list_rows(&t->pattern, &t->nm, a, r / 2, work, NULL, n);
            continue;
        }
        for (int i = 0; sparse && i < rows; i += step)
            k->prune(&t->pattern, work + (int64_t)i * n, n, amber_min(rows, step), NULL, n,
                     scratch);
        for (int i = 0; i < rows; i++)
            k->quantize_row(a->q + (r + i) * a->stride, &a->scale[r + i], &a->sum[r + i],
                            work + (int64_t)i * n, n, a->k_pad);
        if (t->nm.keep) k->pack_nm(&t->nm, a, r / 2, r / 2 + 1);
    }
}

static void multiply_work(void *ctx, int ith, int nth) {
    const struct amber_kernel_timer *t = ctx;
    int begin, end;
    amber_split((t->gemm.w.n_out + AMBER_PANEL - 1) / AMBER_PANEL, 1, ith, nth, &begin, &end);
    if (t->nm.keep)
        t->kernels.gemm_nm(&t->gemm, &t->nm, begin, end);
    else
        t->kernels.gemm_w8a8(&t->gemm, begin, end);
}

static void attention_work(void *ctx, int ith, int nth) {
    const struct amber_kernel_timer *t = ctx;
    const int units = t->kernels.attention_units(&t->attention);
    for (int unit = ith; unit < units; unit += nth)
        t->kernels.attention(&t->attention, unit, unit + 1, t->scratch + ith * t->scratch_bytes);
}

static void call_once(struct amber_kernel_timer *t) {
    const uint8_t *cold = t->cold + t->at * t->copy_bytes;
    t->at = (t->at + 1) % t->copies;
    t->gemm.w.q = cold;
    t->attention.k = cold;
    t->attention.v = cold + t->copy_bytes / 2;
    t->attention.k_scale = (const float *)(const void *)(cold + t->scales_at);
    t->attention.v_scale = (const float *)(const void *)(cold + t->copy_bytes / 2 + t->scales_at);
    if (t->pool)
        amber_pool_run(t->pool, t->work_fn, t);
    else
        t->work_fn(t, 0, 1);
}

static bool cold_copies(struct amber_kernel_timer *t, int64_t bytes, bool many,
                        const struct amber_kernel_timer *lender) {
    t->copy_bytes = amber_round_up(bytes, 128);
    t->copies = many ? (int)((COLD_BYTES + t->copy_bytes - 1) / t->copy_bytes) : 1;
    t->borrowed = lender && lender->copy_bytes == t->copy_bytes && lender->copies >= t->copies;
    t->cold = t->borrowed ? lender->cold : amber_alloc((size_t)(t->copies * t->copy_bytes));
    return t->cold != NULL;
}

/* The first copy, filled already, stands for all. */
static void fill_copies(struct amber_kernel_timer *t) {
    for (int i = 1; i < t->copies; i++)
        memcpy(t->cold + i * t->copy_bytes, t->cold, (size_t)t->copy_bytes);
}

static bool new_product(struct amber_kernel_timer *t, const amber_kernel_case *c, int threads) {
    const int k_pad = (int)amber_round_up(c->n_in, AMBER_K_ALIGN), rows = c->rows;
    const int64_t outputs = amber_round_up(c->n_out, AMBER_PANEL), stride = amber_a8_stride(k_pad);
    struct amber_a8 *a = &t->gemm.a;
    *a = (struct amber_a8){.rows = rows, .k_pad = k_pad, .stride = stride};
    t->x = amber_alloc(sizeof(float) * (size_t)rows * (size_t)c->n_in);
    t->y = amber_alloc(sizeof(float) * (size_t)rows * (size_t)outputs);
    t->work = amber_alloc(sizeof(float) * 2 * (size_t)c->n_in * (size_t)threads);
    t->scratch_bytes = amber_round_up((int64_t)amber_prune_scratch(c->n_in), 64);
    t->scratch = amber_alloc((size_t)(t->scratch_bytes * threads));
    t->scale = amber_alloc(sizeof(float) * (size_t)outputs);
    a->q = amber_alloc((size_t)(rows * stride));
    a->scale = amber_alloc(sizeof(float) * (size_t)rows);
    a->sum = amber_alloc(sizeof(int32_t) * (size_t)rows);
    if (rows >= MIN_LISTED) t->nm.keep = amber_nm_listed(&t->kernels, &t->pattern);
    t->nm.stride = amber_nm_stride(k_pad);
    if (t->nm.keep) t->nm.lists = amber_alloc((size_t)(amber_nm_pairs(rows, 0) * t->nm.stride));
    const bool cold = (c->cold || rows <= COLD_ROWS) && t->work_fn != prepare_work;
    if (!cold_copies(t, outputs * k_pad, cold, c->weights) || !t->x || !t->y || !t->work ||
        !t->scratch || !t->scale || !a->q || !a->scale || !a->sum || (t->nm.keep && !t->nm.lists))
        return false;
    fill_floats(t->x, (int64_t)rows * c->n_in);
    uint64_t state = 2;
    for (int64_t i = 0; !t->borrowed && i < t->copy_bytes; i += 4) {
        const uint32_t four = next_random(&state) * 2 + 1;
        memcpy(t->cold + i, &four, 4);
    }
    if (!t->borrowed) fill_copies(t);
    for (int64_t o = 0; o < outputs; o++) t->scale[o] = 0.01f;
    t->gemm.w =
        (struct amber_w8){.scale = t->scale, .n_out = c->n_out, .n_in = c->n_in, .k_pad = k_pad};
    t->gemm.y = t->y;
    t->gemm.ldy = outputs;
    prepare_work(t, 0, 1);
    return true;
}

static bool new_attention(struct amber_kernel_timer *t, const amber_kernel_case *c, int threads) {
    const int64_t n = (int64_t)c->rows * c->n_head * c->head_dim;
    const int positions = c->depth + c->rows;
    t->x = amber_alloc(sizeof(float) * (size_t)n);
    t->y = amber_alloc(sizeof(float) * (size_t)n);
    t->scratch_bytes = amber_round_up((int64_t)t->kernels.attention_scratch, 64);
    t->scratch = amber_alloc((size_t)(t->scratch_bytes * threads));
    const bool i8 = c->kv_type == AMBER_KV_INT8;
    const int64_t cells = (int64_t)c->n_head_kv * positions * c->head_dim;
    const int64_t scales = i8 ? (int64_t)c->n_head_kv * positions * (int64_t)sizeof(float) : 0;
    const int64_t bytes = 2 * (cells * (i8 ? 1 : 2) + scales);
    if (!cold_copies(t, bytes, c->rows <= COLD_ROWS, NULL) || !t->x || !t->y || !t->scratch)
        return false;
    fill_floats(t->x, n);
    t->scales_at = cells;
    if (i8) {
        uint64_t state = 2;
        memset(t->cold, 0, (size_t)t->copy_bytes); /* scales of nothing: all scores alike */
        for (int64_t i = 0; i < cells; i++)
            t->cold[i] = t->cold[t->copy_bytes / 2 + i] = (uint8_t)next_random(&state);
    } else {
        for (int64_t i = 0; i < t->copy_bytes / 2; i++)
            t->kernels.f16_from_f32((uint16_t *)(void *)t->cold + i, t->x + i % n, 1);
    }
    fill_copies(t);
    t->attention = (struct amber_attention){.q = t->x,
                                            .out = t->y,
                                            .cells = i8 ? AMBER_CELLS_I8 : AMBER_CELLS_F16,
                                            .rows = c->rows,
                                            .n_head = c->n_head,
                                            .n_head_kv = c->n_head_kv,
                                            .head_dim = c->head_dim,
                                            .n_ctx = positions,
                                            .pos0 = c->depth,
                                            .scale = 1 / sqrtf((float)c->head_dim)};
    return true;
}

static amber_status check_case(const amber_kernel_case *c, bool attention, amber_error *err) {
    if (c->rows < 1)
        return amber_fail(err, AMBER_ERR_ARGUMENT, "kernel timer: expected rows >= 1, found %d",
                          c->rows);
    if (!attention) {
        if (c->n_out < 1 || c->n_in < 1 || c->n_in > AMBER_MAX_K ||
            (int64_t)c->n_out * c->n_in > MOST_ELEMENTS ||
            (int64_t)c->rows * amber_max(c->n_in, c->n_out) > MOST_ELEMENTS)
            return amber_fail(
                err, AMBER_ERR_ARGUMENT,
                "kernel timer: expected a shape of outputs x inputs >= 1 and inputs <= "
                "%d, found %d x %d",
                AMBER_MAX_K, c->n_out, c->n_in);
        return AMBER_OK;
    }
    if (c->kv_type != AMBER_KV_F16 && c->kv_type != AMBER_KV_INT8)
        return amber_fail(err, AMBER_ERR_ARGUMENT,
                          "kernel timer: expected kv_type f16 (0) or int8 (1), found %d",
                          c->kv_type);
    if (c->depth < 0 || c->n_head_kv < 1 || c->n_head < 1 || c->n_head % c->n_head_kv ||
        c->head_dim < 8 || c->head_dim % 8 || c->head_dim > AMBER_HEAD_MAX ||
        ((int64_t)c->depth + c->rows) * c->n_head * c->head_dim > MOST_ELEMENTS)
        return amber_fail(
            err, AMBER_ERR_ARGUMENT,
            "kernel timer: expected heads in whole groups per cache head and head_dim "
            "in eights up to %d, found %d/%d of %d",
            AMBER_HEAD_MAX, c->n_head, c->n_head_kv, c->head_dim);
    return AMBER_OK;
}

amber_status amber_kernel_timer_new(const amber_kernel_case *wanted, amber_kernel_timer **out,
                                    amber_error *err) {
    static const struct {
        const char *name;
        amber_work_fn work_fn;
    } kernels[] = {
        {"gemm", multiply_work}, {"prepare", prepare_work}, {"attention", attention_work}};
    *out = NULL;
    amber_kernel_timer *t = amber_alloc(sizeof *t);
    if (!t) return amber_fail(err, AMBER_ERR_MEMORY, "kernel timer: out of memory");
    memset(t, 0, sizeof *t);
    amber_status status = AMBER_OK;
    amber_kernel_case own = *wanted, *c = &own;
    const char *pattern = c->pattern ? c->pattern : "dense";
    char why[160];
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++)
        if (c->kernel && strcmp(c->kernel, kernels[i].name) == 0) t->work_fn = kernels[i].work_fn;
    const bool attention = t->work_fn == attention_work;
    if (t->work_fn == prepare_work) c->n_out = AMBER_PANEL; /* no product follows */
    c->threads = amber_max(c->threads, 1);
    if (!t->work_fn)
        status = amber_fail(err, AMBER_ERR_ARGUMENT,
                            "kernel timer: expected gemm, prepare or attention, found \"%.40s\"",
                            c->kernel ? c->kernel : "");
    else if (!amber_kernels_select(&t->kernels, c->isa))
        status = amber_fail(err, AMBER_ERR_DEVICE,
                            "kernel timer: expected one of \"%s\", found \"%.40s\"",
                            amber_kernels_list(), c->isa);
    else if (!amber_pattern_parse(pattern, strlen(pattern), &t->pattern, why, sizeof why))
        status = amber_fail(err, AMBER_ERR_ARGUMENT, "kernel timer: pattern: %s", why);
    else
        status = check_case(c, attention, err);
    if (status == AMBER_OK && c->threads > 1) status = amber_pool_new(c->threads, &t->pool, err);
    if (status == AMBER_OK && !(attention ? new_attention : new_product)(t, c, c->threads))
        status = amber_fail(err, AMBER_ERR_MEMORY, "kernel timer: out of memory");
    if (status != AMBER_OK) {
        amber_kernel_timer_free(t);
        return status;
    }
    *out = t;
    return AMBER_OK;
}

void amber_kernel_timer_free(amber_kernel_timer *t) {
    if (!t) return;
    void *const parts[] = {t->gemm.a.q,
                           t->gemm.a.scale,
                           t->gemm.a.sum,
                           t->nm.lists,
                           t->x,
                           t->y,
                           t->work,
                           t->scratch,
                           t->borrowed ? NULL : t->cold,
                           t->scale};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) amber_free(parts[i]);
    if (t->pool) amber_pool_free(t->pool);
    amber_free(t);
}

double amber_kernel_timer_run(amber_kernel_timer *t) {
    t->calls = amber_max(t->calls, 1);
    for (;;) {
        const double start = seconds_of(t);
        for (int i = 0; i < t->calls; i++) call_once(t);
        const double seconds = seconds_of(t) - start;
        if (seconds >= RUN_SECONDS) return seconds / t->calls;
        t->calls *= 2;
    }
}
