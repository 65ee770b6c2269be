/* tool_kernel_bench.c: how close the kernels come to the machine, on one thread.
 *
 *     tool_kernel_bench [--quick] [column ...]
 *
 * Every figure is taken next to its yardstick: a repeat measures the register-only peak (or the
 * read bandwidth) and then the kernel, so that a change of clock hits both; printed are the best
 * and the median of the repeats and the median of the ratios. Time is the thread's CPU time, which
 * leaves out what other processes take. */
#include "f16.h"
#include "kernels.h"
#include "peaks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { MAX_REPEATS = 15 };
static int repeats = MAX_REPEATS;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Zeroed, in huge pages where the system has them. */
static void *allocate(size_t bytes) {
    const size_t page = (size_t)1 << 21;
    bytes = (bytes + page - 1) / page * page;
    void *p = aligned_alloc(page, bytes);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x) {
    qsort(x, (size_t)repeats, sizeof *x, ascending);
    return x[repeats / 2];
}

/* Runs work(context) often enough for some milliseconds and returns its rate, units per second. */
struct job {
    void (*work)(void *context);
    void *context;
    double units;
};

static double rate(const struct job *job, int times) {
    double begin = seconds();
    for (int i = 0; i < times; i++) job->work(job->context);
    return job->units * times / (seconds() - begin);
}

/* Repeats below the least time only measure the clock. */
static int times_for(const struct job *job, double least) {
    rate(job, 1); /* warm */
    int times = 1;
    for (;;) {
        double begin = seconds();
        for (int i = 0; i < times; i++) job->work(job->context);
        if (seconds() - begin >= least / 2) return times;
        times *= 2;
    }
}

static void compare(const char *what, const char *unit, double scale, struct job job,
                    struct job yardstick, double per_yardstick) {
    double kernel[MAX_REPEATS], bar[MAX_REPEATS], ratio[MAX_REPEATS];
    int n_kernel = times_for(&job, 0.004), n_bar = times_for(&yardstick, 0.004);
    for (int i = 0; i < repeats; i++) {
        bar[i] = rate(&yardstick, n_bar);
        kernel[i] = rate(&job, n_kernel);
        ratio[i] = kernel[i] * per_yardstick / bar[i];
    }
    double k = median(kernel), b = median(bar), r = median(ratio);
    printf("  %-34s %8.1f %8.1f %-7s of %8.1f  ratio %.2f (%.2f..%.2f)\n", what,
           kernel[repeats - 1] * scale, k * scale, unit, b / per_yardstick * scale, r, ratio[0],
           ratio[repeats - 1]);
    fflush(stdout);
}

/* ---- Yardsticks ---- */

static const struct amber_peak *peak_of(const char *isa) {
#if defined(__x86_64__)
    if (!strcmp(isa, "amx")) return &amber_peak_amx;
    if (!strcmp(isa, "avx512vnni")) return &amber_peak_avx512vnni;
    if (!strcmp(isa, "avxvnni")) return &amber_peak_avxvnni;
    if (!strcmp(isa, "avx2")) return &amber_peak_avx2;
#elif defined(__aarch64__)
    if (!strcmp(isa, "i8mm")) return &amber_peak_i8mm;
    if (!strcmp(isa, "neon")) return &amber_peak_neon;
#endif
    return &amber_peak_ref;
}

enum { PEAK_STEPS = 200 };

static void run_peak(void *context) {
    ((const struct amber_peak *)context)->dot(PEAK_STEPS * 20);
}

static struct job peak_job(const struct amber_peak *peak) {
    return (struct job){run_peak, (void *)(uintptr_t)peak, (double)peak->dot(1) * PEAK_STEPS * 20};
}

struct reading {
    const struct amber_peak *peak;
    const void *p;
    size_t bytes;
};

static volatile uint64_t sink;

static void run_reading(void *context) {
    struct reading *r = context;
    sink = r->peak->read(r->p, r->bytes);
}

#if defined(__x86_64__)
/* Fused multiply-adds on registers; 100 rounds. */
__attribute__((target("avx512f"))) static void fma512(void *context) {
    __m512 a[24], x = _mm512_set1_ps(1.0f), y = _mm512_set1_ps(1e-9f);
    (void)context;
#pragma GCC unroll 24
    for (int i = 0; i < 24; i++) a[i] = _mm512_setzero_ps();
    for (int s = 0; s < 1000; s++) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++)
            __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(a[i]) : "v"(x), "v"(y));
    }
}

__attribute__((target("avx2,fma"))) static void fma256(void *context) {
    __m256 a[12], x = _mm256_set1_ps(1.0f), y = _mm256_set1_ps(1e-9f);
    (void)context;
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) a[i] = _mm256_setzero_ps();
    for (int s = 0; s < 1000; s++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++)
            __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(a[i]) : "x"(x), "x"(y));
    }
}

static struct job fma_job(const char *isa) {
    if (!strcmp(isa, "amx") || !strcmp(isa, "avx512vnni"))
        return (struct job){fma512, NULL, 1000.0 * 24 * 32};
    return (struct job){fma256, NULL, 1000.0 * 12 * 16};
}
#else
static struct job fma_job(const char *isa) {
    return peak_job(peak_of(isa));
}
#endif

/* ---- Kernels ---- */

struct product {
    const struct amber_kernels *k;
    struct amber_gemm_w8a8 g;
    int copies; /* of the weights, one after the other, so that they come from memory */
};

static void run_product(void *context) {
    struct product *p = context;
    struct amber_gemm_w8a8 g = p->g;
    for (int i = 0; i < p->copies; i++, g.w.q += (size_t)g.w.n_out * g.w.k_pad)
        p->k->gemm_w8a8(&g, 0, g.w.n_out / AMBER_PANEL);
}

static void bench_product(const struct amber_kernels *k, int rows, int n_out, int n_in) {
    size_t weights = (size_t)n_out * n_in;
    int64_t stride = amber_a8_stride(n_in);
    struct product p = {.k = k, .copies = rows <= 8 ? (int)(((size_t)1 << 27) / weights) : 1};
    uint8_t *q = allocate(weights * p.copies);
    for (size_t i = 0; i < weights * p.copies; i++) q[i] = (uint8_t)(1 + i * 7 % 251);
    int8_t *x = allocate((size_t)(rows * stride));
    for (int64_t i = 0; i < rows * stride; i++) x[i] = (int8_t)(i * 13 % 255 - 127);
    float *scale = allocate((size_t)n_out * 4), *row_scale = allocate((size_t)rows * 4);
    int32_t *sum = allocate((size_t)rows * 4);
    float *y = allocate((size_t)rows * n_out * 4);
    p.g = (struct amber_gemm_w8a8){
        .w = {.q = q, .scale = scale, .n_out = n_out, .n_in = n_in, .k_pad = n_in},
        .a =
            {.q = x, .scale = row_scale, .sum = sum, .rows = rows, .k_pad = n_in, .stride = stride},
        .y = y,
        .ldy = n_out,
    };
    char what[64];
    const struct amber_peak *peak = peak_of(k->isa);
    double products = (double)weights * p.copies * rows;
    if (rows <= 8) {
        struct reading r = {peak, q, weights * p.copies};
        snprintf(what, sizeof what, "gemm T=%d N=%d K=%d", rows, n_out, n_in);
        compare(what, "GB/s", 1e-9, (struct job){run_product, &p, products / rows},
                (struct job){run_reading, &r, (double)r.bytes}, 1);
    } else { /* a multiply and an add are two operations of the peak */
        snprintf(what, sizeof what, "gemm T=%d N=%d K=%d", rows, n_out, n_in);
        compare(what, "GMAC/s", 1e-9, (struct job){run_product, &p, products}, peak_job(peak), 2);
    }
    free(q);
    free(x);
    free(scale);
    free(row_scale);
    free(sum);
    free(y);
}

struct attending {
    const struct amber_kernels *k;
    struct amber_attention a;
    void *scratch;
    int layers;
    size_t layer_bytes;
};

static void run_attention(void *context) {
    struct attending *w = context;
    struct amber_attention a = w->a;
    for (int l = 0; l < w->layers; l++) {
        w->k->attention(&a, 0, w->k->attention_units(&a), w->scratch);
        a.k = (const char *)a.k + w->layer_bytes;
        a.v = (const char *)a.v + w->layer_bytes;
    }
}

static void bench_attention(const struct amber_kernels *k, int rows, int pos0, int n_head,
                            int n_head_kv, int head_dim) {
    struct attending w = {.k = k, .layers = rows == 1 ? 16 : 1};
    int n_ctx = pos0 + rows;
    size_t cells = (size_t)n_head_kv * n_ctx * head_dim;
    w.layer_bytes = cells * 2;
    uint16_t *keys = allocate(cells * 2 * w.layers), *values = allocate(cells * 2 * w.layers);
    for (size_t i = 0; i < cells * w.layers; i++)
        keys[i] = values[i] = f16_bits_from_f32((float)(i * 37 % 201) * 0.01f - 1);
    size_t n = (size_t)rows * n_head * head_dim;
    float *q = allocate(n * 4), *out = allocate(n * 4);
    for (size_t i = 0; i < n; i++) q[i] = (float)(i * 91 % 199) * 0.01f - 1;
    w.scratch = allocate(k->attention_scratch);
    w.a = (struct amber_attention){.q = q,
                                   .out = out,
                                   .k = keys,
                                   .v = values,
                                   .rows = rows,
                                   .n_head = n_head,
                                   .n_head_kv = n_head_kv,
                                   .head_dim = head_dim,
                                   .n_ctx = n_ctx,
                                   .pos0 = pos0,
                                   .scale = 0.125f};
    char what[64];
    snprintf(what, sizeof what, "attention T=%d pos=%d %d/%d d=%d", rows, pos0, n_head, n_head_kv,
             head_dim);
    if (rows == 1) {
        struct reading r = {peak_of(k->isa), keys, cells * 2 * w.layers / 4096 * 4096};
        compare(what, "GB/s", 1e-9, (struct job){run_attention, &w, (double)cells * 4 * w.layers},
                (struct job){run_reading, &r, (double)r.bytes}, 1);
    } else {
        double pairs = (double)rows * pos0 + (double)rows * (rows + 1) / 2;
        compare(what, "GFLOPS", 1e-9,
                (struct job){run_attention, &w, pairs * n_head * head_dim * 4}, fma_job(k->isa), 1);
    }
    free(keys);
    free(values);
    free(q);
    free(out);
    free(w.scratch);
}

struct row {
    const struct amber_kernels *k;
    float *x, *w, *y;
    int8_t *q;
    int n;
};

static void run_quantize(void *context) {
    struct row *r = context;
    float scale;
    int32_t sum;
    r->k->quantize_row(r->q, &scale, &sum, r->x, r->n, r->n);
}
static void run_rmsnorm(void *context) {
    struct row *r = context;
    r->k->rmsnorm(r->y, r->x, r->w, r->n, 1e-5f);
}
static void run_silu(void *context) {
    struct row *r = context;
    r->k->silu_mul(r->y, r->x, r->w, r->n);
}
static void run_pack(void *context) {
    struct row *r = context;
    float scale[AMBER_PANEL];
    amber_pack_w8_panel((uint8_t *)r->q, scale, r->x, 0, AMBER_PANEL, r->n / AMBER_PANEL,
                        r->n / AMBER_PANEL);
}

static void bench_rows(const struct amber_kernels *k) {
    static const struct {
        const char *name;
        void (*work)(void *context);
        int n;
    } rows[] = {{"quantize_row n=2048", run_quantize, 2048},
                {"rmsnorm n=2048", run_rmsnorm, 2048},
                {"silu_mul n=8192", run_silu, 8192},
                {"pack 16 x 2048 (portable)", run_pack, 32768}};
    struct row r = {
        k, allocate(32768 * 4), allocate(32768 * 4), allocate(32768 * 4), allocate(32768), 0};
    for (int i = 0; i < 32768; i++) r.x[i] = r.w[i] = (float)(i * 91 % 199) * 0.01f - 1;
    for (int i = 0; i < 4; i++) {
        double rates[MAX_REPEATS];
        r.n = rows[i].n;
        struct job job = {rows[i].work, &r, r.n};
        int times = times_for(&job, 0.002);
        for (int j = 0; j < repeats; j++) rates[j] = rate(&job, times);
        double m = median(rates);
        printf("  %-34s %8.2f %8.2f G elements/s\n", rows[i].name, rates[repeats - 1] * 1e-9,
               m * 1e-9);
    }
    free(r.x);
    free(r.w);
    free(r.y);
    free(r.q);
}

static void bench_column(const char *isa) {
    struct amber_kernels k;
    if (!amber_kernels_select(&k, isa)) {
        fprintf(stderr, "%s: not here; columns: %s\n", isa, amber_kernels_list());
        exit(1);
    }
    printf("%s\n  %-34s %8s %8s %-7s    %8s\n", isa, "", "best", "median", "", "peak");
    static const int shapes[][2] = {{2048, 2048}, {8192, 2048}, {2048, 8192}};
    static const int rows[] = {1, 2, 4, 8, 12, 16, 64, 512};
    for (int t = 0; t < 8; t++)
        for (int s = 0; s < 3; s++) bench_product(&k, rows[t], shapes[s][0], shapes[s][1]);
    bench_attention(&k, 512, 0, 32, 8, 64);
    bench_attention(&k, 512, 2048, 32, 8, 64);
    bench_attention(&k, 1, 4096, 32, 8, 64);
    bench_rows(&k);
}

int main(int argc, char **argv) {
    int first = 1;
    if (first < argc && !strcmp(argv[first], "--quick")) {
        repeats = 3;
        first++;
    }
    for (int i = first; i < argc; i++) bench_column(argv[i]);
    if (first == argc) {
        char names[128];
        snprintf(names, sizeof names, "%s", amber_kernels_list());
        for (char *name = strtok(names, " "); name; name = strtok(NULL, " "))
            if (strcmp(name, "ref")) bench_column(name);
    }
    return 0;
}
