/* kernel_timer.c: single kernels timed by themselves, with operands as a model has them. */
#define _POSIX_C_SOURCE 200809L
#include "amber.h"
#include "common.h"
#include "kernels.h"
#include "ops.h"

#include <math.h>
#include <string.h>
#include <time.h>

/* Operands that a model reads from memory lie in so many bytes, one copy after the other, that no
 * cache holds them until their next turn. */
#define COLD_BYTES    ((int64_t)64 << 20)
#define RUN_SECONDS   0.002 /* of a run: long against the clock's own steps */
#define COLD_ROWS     16    /* up to which a product waits for its weights */
#define MOST_ELEMENTS ((int64_t)1 << 31)

struct amber_kernel_timer {
    struct amber_kernels kernels;
    struct amber_pattern pattern;
    void (*call)(struct amber_kernel_timer *t, int copy);
    struct amber_gemm_w8a8 gemm;
    struct amber_nm nm; /* keep 0: no lists */
    struct amber_attention attention;
    float *x, *y, *work; /* work: of one pair of rows */
    void *scratch;
    uint8_t *cold; /* [copies, copy_bytes] */
    int64_t copy_bytes;
    int copies, calls;
    float *scale;
};

static double thread_seconds(void) {
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
static void prepare(struct amber_kernel_timer *t, int copy) {
    const struct amber_kernels *k = &t->kernels;
    const struct amber_a8 *a = &t->gemm.a;
    const int n = t->gemm.w.n_in;
    const bool sparse = t->pattern.kind != AMBER_PATTERN_DENSE;
    (void)copy;
    for (int r = 0; r < a->rows; r += 2) {
        const int rows = amber_min(a->rows - r, 2);
        memcpy(t->work, t->x + (int64_t)r * n, sizeof(float) * (size_t)n * (size_t)rows);
        if (t->nm.keep && k->list_rows) {
            k->list_rows(&t->pattern, &t->nm, a, r / 2, t->work, NULL, n);
            continue;
        }
        for (int i = 0; sparse && i < rows; i += amber_max(t->pattern.tokens, 1))
            k->prune(&t->pattern, t->work + (int64_t)i * n, n,
                     amber_min(rows, amber_max(t->pattern.tokens, 1)), NULL, n, t->scratch);
        for (int i = 0; i < rows; i++)
            k->quantize_row(a->q + (r + i) * a->stride, &a->scale[r + i], &a->sum[r + i],
                            t->work + (int64_t)i * n, n, a->k_pad);
        if (t->nm.keep) k->pack_nm(&t->nm, a, r / 2, r / 2 + 1);
    }
}

static void multiply(struct amber_kernel_timer *t, int copy) {
    const int panels = (t->gemm.w.n_out + AMBER_PANEL - 1) / AMBER_PANEL;
    t->gemm.w.q = t->cold + copy * t->copy_bytes;
    if (t->nm.keep)
        t->kernels.gemm_nm(&t->gemm, &t->nm, 0, panels);
    else
        t->kernels.gemm_w8a8(&t->gemm, 0, panels);
}

static void attend(struct amber_kernel_timer *t, int copy) {
    t->attention.k = t->cold + copy * t->copy_bytes;
    t->attention.v = t->cold + copy * t->copy_bytes + t->copy_bytes / 2;
    t->kernels.attention(&t->attention, 0, t->kernels.attention_units(&t->attention), t->scratch);
}

static bool cold_copies(struct amber_kernel_timer *t, int64_t bytes, bool many) {
    t->copy_bytes = amber_round_up(bytes, 128);
    t->copies = many ? (int)((COLD_BYTES + t->copy_bytes - 1) / t->copy_bytes) : 1;
    t->cold = amber_alloc((size_t)(t->copies * t->copy_bytes));
    return t->cold != NULL;
}

static bool new_product(struct amber_kernel_timer *t, const amber_kernel_case *c) {
    const int k_pad = (int)amber_round_up(c->n_in, AMBER_K_ALIGN), rows = c->rows;
    const int64_t outputs = amber_round_up(c->n_out, AMBER_PANEL), stride = amber_a8_stride(k_pad);
    struct amber_a8 *a = &t->gemm.a;
    *a = (struct amber_a8){.rows = rows, .k_pad = k_pad, .stride = stride};
    t->x = amber_alloc(sizeof(float) * (size_t)rows * (size_t)c->n_in);
    t->y = amber_alloc(sizeof(float) * (size_t)rows * (size_t)outputs);
    t->work = amber_alloc(sizeof(float) * 2 * (size_t)c->n_in);
    t->scratch = amber_alloc(amber_prune_scratch(c->n_in));
    t->scale = amber_alloc(sizeof(float) * (size_t)outputs);
    a->q = amber_alloc((size_t)(rows * stride));
    a->scale = amber_alloc(sizeof(float) * (size_t)rows);
    a->sum = amber_alloc(sizeof(int32_t) * (size_t)rows);
    if (rows >= MIN_LISTED) t->nm.keep = amber_nm_listed(&t->kernels, &t->pattern);
    t->nm.stride = amber_nm_stride(k_pad);
    if (t->nm.keep) t->nm.lists = amber_alloc((size_t)(amber_nm_pairs(rows, 0) * t->nm.stride));
    if (!cold_copies(t, outputs * k_pad, rows <= COLD_ROWS) || !t->x || !t->y || !t->work ||
        !t->scratch || !t->scale || !a->q || !a->scale || !a->sum || (t->nm.keep && !t->nm.lists))
        return false;
    fill_floats(t->x, (int64_t)rows * c->n_in);
    uint64_t state = 2;
    for (int64_t i = 0; i < t->copies * t->copy_bytes; i += 4) {
        const uint32_t four = next_random(&state) * 2 + 1;
        memcpy(t->cold + i, &four, 4);
    }
    for (int64_t o = 0; o < outputs; o++) t->scale[o] = 0.01f;
    t->gemm.w =
        (struct amber_w8){.scale = t->scale, .n_out = c->n_out, .n_in = c->n_in, .k_pad = k_pad};
    t->gemm.y = t->y;
    t->gemm.ldy = outputs;
    prepare(t, 0);
    return true;
}

static bool new_attention(struct amber_kernel_timer *t, const amber_kernel_case *c) {
    const int64_t n = (int64_t)c->rows * c->n_head * c->head_dim;
    const int positions = c->depth + c->rows;
    t->x = amber_alloc(sizeof(float) * (size_t)n);
    t->y = amber_alloc(sizeof(float) * (size_t)n);
    t->scratch = amber_alloc(t->kernels.attention_scratch);
    const int64_t bytes = (int64_t)4 * c->n_head_kv * positions * c->head_dim;
    if (!cold_copies(t, bytes, c->rows <= COLD_ROWS) || !t->x || !t->y || !t->scratch) return false;
    fill_floats(t->x, n);
    for (int64_t i = 0, n_cells = t->copies * t->copy_bytes / 2; i < n_cells; i++)
        t->kernels.f16_from_f32((uint16_t *)(void *)t->cold + i, t->x + i % n, 1);
    t->attention = (struct amber_attention){.q = t->x,
                                            .out = t->y,
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
        void (*call)(struct amber_kernel_timer *t, int copy);
    } calls[] = {{"gemm", multiply}, {"prepare", prepare}, {"attention", attend}};
    *out = NULL;
    amber_kernel_timer *t = amber_alloc(sizeof *t);
    if (!t) return amber_fail(err, AMBER_ERR_MEMORY, "kernel timer: out of memory");
    memset(t, 0, sizeof *t);
    amber_status status = AMBER_OK;
    amber_kernel_case own = *wanted, *c = &own;
    const char *pattern = c->pattern ? c->pattern : "dense";
    char why[160];
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++)
        if (c->kernel && strcmp(c->kernel, calls[i].name) == 0) t->call = calls[i].call;
    if (t->call == prepare) c->n_out = AMBER_PANEL; /* no product follows */
    if (!t->call)
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
        status = check_case(c, t->call == attend, err);
    if (status == AMBER_OK && !(t->call == attend ? new_attention(t, c) : new_product(t, c)))
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
    void *const parts[] = {t->gemm.a.q, t->gemm.a.scale, t->gemm.a.sum, t->nm.lists, t->x,
                           t->y,        t->work,         t->scratch,    t->cold,     t->scale};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) amber_free(parts[i]);
    amber_free(t);
}

double amber_kernel_timer_run(amber_kernel_timer *t) {
    t->calls = amber_max(t->calls, 1);
    for (;;) {
        const double start = thread_seconds();
        for (int i = 0; i < t->calls; i++) t->call(t, i % t->copies);
        const double seconds = thread_seconds() - start;
        if (seconds >= RUN_SECONDS && t->calls >= t->copies) return seconds / t->calls;
        t->calls *= 2;
    }
}
