/* tool_sparse_bench.c: the product over lists against the dense one of the same instruction set, in
 * one thread, configurations in turn, by CPU time.
 *
 *     tool_sparse_bench ISA [REPEATS [ROWS]]
 *
 * Each line: outputs x inputs, pattern, then milliseconds (minimum, median) of the product alone and
 * with what comes before it (dense: quantize; sparse: prune, quantize, lists), and dense/sparse of
 * minima and medians; at last what comes before it as a share of that of the dense product. */
#define _POSIX_C_SOURCE 200809L
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_REPEATS = 200 };

static const char *const patterns[] = {"dense",  "4:16x4t2", "8:16x4t2", "10:16x4t2", "12:16x4t2",
                                       "4:16x4", "8:16x4",   "10:16x4",  "12:16x4"};
enum { N_PATTERNS = sizeof patterns / sizeof patterns[0] };

struct config {
    struct amber_pattern p;
    struct amber_a8 a;
    struct amber_nm nm;
    float *y;
    double gemm[MAX_REPEATS], before[MAX_REPEATS], whole[MAX_REPEATS];
};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *block_of(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 4096) / 64 * 64);
    if (!p) exit(1);
    memset(p, 0, (bytes + 4096) / 64 * 64);
    return p;
}

static uint32_t random_state = 1;
static float normal(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) {
        random_state = random_state * 1664525u + 1013904223u;
        sum += (float)(random_state >> 8) * 0x1p-24f;
    }
    return sum - 6;
}

/* Everything before the product, for all rows; z is two rows, two more and scratch. Rows are copied to
 * z first, as the engine makes them there (norm, activation): what reads them finds them in cache. */
static void prepare(const struct amber_kernels *k, struct config *c, const float *x, int n,
                    float *z) {
    const struct amber_a8 *a = &c->a;
    const bool sparse = c->p.kind != AMBER_PATTERN_DENSE;
    for (int r = 0; r < a->rows; r += 2) {
        const int rows = a->rows - r < 2 ? 1 : 2;
        const size_t bytes = sizeof *z * (size_t)n * (size_t)rows;
        float *row = z;
        memcpy(row, x + (int64_t)r * n, bytes);
        if (sparse && k->list_rows) {
            k->list_rows(&c->p, &c->nm, a, r / 2, row, NULL, n);
            continue;
        }
        if (sparse) {
            row = memcpy(z + 2 * (int64_t)n, row, bytes);
            for (int i = 0; i < rows; i += c->p.tokens)
                k->prune(&c->p, row + (int64_t)i * n, n, c->p.tokens < rows ? c->p.tokens : rows,
                         NULL, n, z + 4 * (int64_t)n);
        }
        for (int i = 0; i < rows; i++)
            k->quantize_row(a->q + (r + i) * a->stride, &a->scale[r + i], &a->sum[r + i],
                            row + (int64_t)i * n, n, a->k_pad);
        if (sparse) k->pack_nm(&c->nm, a, r / 2, r / 2 + 1);
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double smallest(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, by_value);
    return 1e3 * v[0];
}
static double median(const double *v, int n) {
    return 1e3 * v[n / 2];
}

static void compare(const struct amber_kernels *k, int n_out, int n_in, int rows, int repeats) {
    static struct config configs[N_PATTERNS];
    float *x = block_of(sizeof *x * (size_t)rows * (size_t)n_in);
    float *z = block_of(sizeof *z * 6 * (size_t)n_in + amber_prune_scratch(n_in));
    for (int64_t i = 0; i < (int64_t)rows * n_in; i++) x[i] = normal();
    const int panels = n_out / AMBER_PANEL;
    uint8_t *w = block_of((size_t)n_out * (size_t)n_in);
    for (int64_t i = 0; i < (int64_t)n_out * n_in; i++) w[i] = (uint8_t)(128 + 20 * normal());
    float *scale = block_of(sizeof *scale * (size_t)n_out);
    for (int o = 0; o < n_out; o++) scale[o] = 0.01f;
    for (int i = 0; i < N_PATTERNS; i++) {
        struct config *c = &configs[i];
        char why[160];
        amber_pattern_parse(patterns[i], strlen(patterns[i]), &c->p, why, sizeof why);
        c->a.rows = rows;
        c->a.k_pad = n_in;
        c->a.stride = amber_a8_stride(n_in);
        c->a.q = block_of((size_t)(rows * c->a.stride));
        c->a.scale = block_of(sizeof(float) * (size_t)rows);
        c->a.sum = block_of(sizeof(int32_t) * (size_t)rows);
        c->y = block_of(sizeof(float) * (size_t)rows * (size_t)n_out);
        c->nm.keep = amber_nm_keep(&c->p);
        c->nm.stride = amber_nm_stride(n_in);
        c->nm.lists = block_of((size_t)((rows + 1) / 2 * c->nm.stride));
    }
    for (int t = 0; t < repeats; t++) {
        for (int i = 0; i < N_PATTERNS; i++) {
            struct config *c = &configs[i];
            struct amber_gemm_w8a8 g = {
                .w = {.q = w, .scale = scale, .n_out = n_out, .n_in = n_in, .k_pad = n_in},
                .y = c->y,
                .ldy = n_out};
            double start = seconds();
            prepare(k, c, x, n_in, z);
            double ready = seconds();
            g.a = c->a;
            if (c->nm.keep)
                k->gemm_nm(&g, &c->nm, 0, panels);
            else
                k->gemm_w8a8(&g, 0, panels);
            double end = seconds();
            c->before[t] = ready - start;
            c->gemm[t] = end - ready;
            c->whole[t] = end - start;
        }
    }
    double gemm = 0, whole = 0, gemm_m = 0, whole_m = 0, before = 0;
    for (int i = 0; i < N_PATTERNS; i++) {
        struct config *c = &configs[i];
        double g = smallest(c->gemm, repeats), gm = median(c->gemm, repeats);
        double b = smallest(c->before, repeats), all = smallest(c->whole, repeats);
        double allm = median(c->whole, repeats);
        if (i == 0) {
            gemm = g;
            gemm_m = gm;
            before = b;
            whole = all;
            whole_m = allm;
        }
        printf("%5d x %5d %-9s gemm %7.3f %7.3f  before %6.3f  whole %7.3f %7.3f  gemm %.2fx %.2fx"
               "  whole %.2fx %.2fx  before %.2f\n",
               n_out, n_in, patterns[i], g, gm, b, all, allm, gemm / g, gemm_m / gm, whole / all,
               whole_m / allm, b / before);
        if (c->nm.keep) { /* the same bits as the dense product of the same rows */
            struct amber_gemm_w8a8 d = {
                .w = {.q = w, .scale = scale, .n_out = n_out, .n_in = n_in, .k_pad = n_in},
                .a = c->a,
                .y = configs[0].y,
                .ldy = n_out};
            struct amber_kernels plain = *k;
            plain.list_rows = NULL; /* which writes no rows */
            prepare(&plain, c, x, n_in, z);
            k->gemm_w8a8(&d, 0, panels);
            if (memcmp(d.y, c->y, sizeof(float) * (size_t)rows * (size_t)n_out)) {
                printf("    differs from the dense product\n");
                exit(1);
            }
        }
        free(c->a.q);
        free(c->a.scale);
        free(c->a.sum);
        free(c->nm.lists);
        if (i) free(c->y);
    }
    free(configs[0].y);
    free(x);
    free(z);
    free(w);
    free(scale);
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct amber_kernels k;
    if (argc < 2 || !amber_kernels_select(&k, argv[1]) || !k.gemm_nm) {
        fprintf(stderr,
                "usage: tool_sparse_bench ISA [REPEATS [ROWS]]; the ISA must have gemm_nm\n");
        return 2;
    }
    int repeats = argc > 2 ? atoi(argv[2]) : 20, rows = argc > 3 ? atoi(argv[3]) : 512;
    if (repeats < 1 || repeats > MAX_REPEATS || rows < 1) return 2;
    static const int sizes[][2] = {{2048, 2048}, {8192, 2048}, {2048, 8192}};
    for (int i = 0; i < 3; i++) compare(&k, sizes[i][0], sizes[i][1], rows, repeats);
    return 0;
}
