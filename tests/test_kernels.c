/* test_kernels.c: every operation of every column that runs here, against oracles of the test's own
 * in double or int64 and, where the contract fixes the bits, against the scalar column bit for bit.
 *
 * Bounds: u = 2^-24 is half an ulp of 1. A float sum of n products in any order is off by at most
 * n * u * sum|products| to first order (Higham, Accuracy and Stability, section 3.1); a rounded
 * operation adds u of its result. */
#include "check.h"
#include "f16.h"
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_COLUMNS 8
static struct amber_kernels columns[MAX_COLUMNS], ref;
static int n_columns;
static const double U = 0x1p-24;

/* ---- Random numbers and guarded buffers ---- */

static uint64_t state = 88172645463325252u;

static uint32_t random_bits(void) { /* xorshift64* (Marsaglia; Vigna) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 2685821657736338717u >> 32);
}

static float uniform(void) {
    return (float)((int32_t)random_bits() * 0x1p-31);
} /* -1..1 */

enum { GUARD = 256, MARK = 0xa5 };

struct buffer {
    uint8_t *base, *p;    /* p: 64-byte aligned */
    size_t bytes, mapped; /* mapped: including the closed page */
};

static struct buffer buffers[64];
static int n_buffers;

/* `bytes` of memory with marks before the first and behind the last one. Where the size allows it
 * the last byte is followed by a page that may not be touched, so that reading too far shows, too.
 */
static void *guarded(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct buffer *b = &buffers[n_buffers++];
    bool flush = bytes % 64 == 0;
    size_t used = (GUARD + (bytes + 63) / 64 * 64 + (flush ? 0 : GUARD) + page - 1) / page * page;
    b->bytes = bytes;
    b->mapped = used + page;
    b->base = mmap(NULL, b->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->base == MAP_FAILED) abort();
    memset(b->base, MARK, used);
    if (flush) mprotect(b->base + used, page, PROT_NONE);
    b->p = flush ? b->base + used - bytes : b->base + GUARD;
    return b->p;
}

static bool guards_intact(void) {
    for (int i = 0; i < n_buffers; i++) {
        const struct buffer *b = &buffers[i];
        for (int j = 0; j < GUARD; j++)
            if (b->p[j - GUARD] != MARK || (b->bytes % 64 && b->p[b->bytes + (size_t)j] != MARK))
                return false;
    }
    return true;
}

static void release(void) {
    CHECK(guards_intact());
    while (n_buffers > 0) {
        n_buffers--;
        munmap(buffers[n_buffers].base, buffers[n_buffers].mapped);
    }
}

static float *uniforms(int64_t n) {
    float *x = guarded((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}

static bool close_to(const float *x, const double *want, const double *bound, int n) {
    for (int i = 0; i < n; i++) {
        if (!(fabs(x[i] - want[i]) <= bound[i])) {
            fprintf(stderr, "    [%d] %.9g, expected %.9g, bound %.3g\n", i, x[i], want[i],
                    bound[i]);
            return false;
        }
    }
    return true;
}

/* ---- INT8 matrix product ---- */

struct int8_case {
    struct amber_gemm_w8a8 g;
    int8_t *w; /* [n_out, n_in] unpacked */
    float *before;
    int panels;
};

/* fill: 0 random over -127..127; otherwise every w is `fill` and every x is +-127 by row. */
static struct int8_case int8_case(int rows, int n_out, int n_in, int fill) {
    struct int8_case c = {.panels = (n_out + 15) / 16};
    int k_pad = (n_in + 63) / 64 * 64;
    int64_t stride = amber_a8_stride(k_pad), ldy = n_out + 3;
    uint8_t *q = guarded((size_t)c.panels * 16 * k_pad);
    float *scale = guarded((size_t)c.panels * 64), *bias = guarded((size_t)c.panels * 64);
    float *w_sum = uniforms(c.panels * 16);
    int8_t *x = guarded((size_t)(rows * stride));
    float *row_scale = guarded((size_t)rows * 4);
    int32_t *sum = guarded((size_t)rows * 4);
    c.w = guarded((size_t)n_out * n_in);
    for (int64_t i = 0; i < (int64_t)n_out * n_in; i++)
        c.w[i] = (int8_t)(fill ? fill : (int)(random_bits() % 255) - 127);
    memset(q, 128, (size_t)c.panels * 16 * k_pad);
    for (int o = 0; o < n_out; o++)
        for (int k = 0; k < n_in; k++)
            q[((size_t)(o / 16) * (k_pad / 4) + k / 4) * 64 + o % 16 * 4 + k % 4] =
                (uint8_t)(c.w[(int64_t)o * n_in + k] + 128);
    for (int o = 0; o < c.panels * 16; o++) {
        scale[o] = o < n_out ? uniform() * 0.01f : 0;
        bias[o] = o < n_out ? uniform() : 0;
    }
    memset(x, 77, (size_t)(rows * stride)); /* behind k_pad nothing may be read */
    for (int t = 0; t < rows; t++) {
        sum[t] = 0;
        row_scale[t] = uniform() * 0.1f;
        for (int k = 0; k < k_pad; k++) {
            int v = fill ? (t % 2 ? -127 : 127) : (int)(random_bits() % 255) - 127;
            x[t * stride + k] = (int8_t)(k < n_in ? v : 0);
            sum[t] += x[t * stride + k];
        }
    }
    c.before = uniforms(rows * ldy);
    c.g = (struct amber_gemm_w8a8){
        .w = {.q = q,
              .scale = scale,
              .bias = random_bits() % 2 ? bias : NULL,
              .sum = w_sum,
              .n_out = n_out,
              .n_in = n_in,
              .k_pad = k_pad},
        .a = {.q = x,
              .scale = row_scale,
              .sum = sum,
              .shift = random_bits() % 3 ? NULL : uniforms(rows),
              .rows = rows,
              .k_pad = k_pad,
              .stride = stride},
        .y = guarded((size_t)(rows * ldy) * 4),
        .ldy = ldy,
        .add = random_bits() % 2,
    };
    return c;
}

static void int8_oracle(const struct int8_case *c, float *y) {
    const struct amber_gemm_w8a8 *g = &c->g;
    memcpy(y, c->before, (size_t)(g->a.rows * g->ldy) * 4);
    for (int t = 0; t < g->a.rows; t++) {
        for (int o = 0; o < g->w.n_out; o++) {
            int64_t acc = 0;
            for (int k = 0; k < g->w.n_in; k++)
                acc += (int)c->w[(int64_t)o * g->w.n_in + k] * g->a.q[t * g->a.stride + k];
            float v = (float)acc * (g->a.scale[t] * g->w.scale[o]);
            if (g->a.shift) v += g->a.shift[t] * g->w.sum[o];
            if (g->w.bias) v += g->w.bias[o];
            float *to = y + t * g->ldy + o;
            *to = g->add ? *to + v : v;
        }
    }
}

/* y of the call equals `want` in every bit, the columns behind n_out included. */
static bool int8_run(const struct amber_kernels *k, const struct int8_case *c, int panel0, int cut,
                     int panel1, const float *want) {
    size_t bytes = (size_t)(c->g.a.rows * c->g.ldy) * 4;
    memcpy(c->g.y, c->before, bytes);
    k->gemm_w8a8(&c->g, panel0, cut);
    k->gemm_w8a8(&c->g, cut, panel1);
    return memcmp(c->g.y, want, bytes) == 0;
}

static void check_int8(int rows, int n_out, int n_in, int fill) {
    struct int8_case c = int8_case(rows, n_out, n_in, fill);
    float *want = guarded((size_t)(rows * c.g.ldy) * 4);
    int8_oracle(&c, want);
    for (int i = 0; i < n_columns; i++)
        if (!CHECK(int8_run(&columns[i], &c, 0, c.panels, c.panels, want)))
            fprintf(stderr, "    %s, rows %d, n_out %d, n_in %d\n", columns[i].isa, rows, n_out,
                    n_in);
    release();
}

static void test_gemm_w8a8(void) {
    static const int outs[] = {1, 15, 16, 17, 48, 64, 65, 200}, ins[] = {1, 63, 64, 65, 300};
    for (int rows = 1; rows <= 41; rows++)
        for (int o = 0; o < 8; o++)
            for (int k = 0; k < 5; k++)
                if (rows <= 14 || (o + k + rows) % 4 == 0)
                    check_int8(rows == 41 ? 129 : rows, outs[o], ins[k], 0);
    for (int n_out = 1; n_out <= 70; n_out++)
        for (int rows = 1; rows <= 21; rows += 5) check_int8(rows, n_out, 37 + n_out, 0);
    for (int n_in = 1; n_in <= 300; n_in += 7)
        for (int rows = 1; rows <= 19; rows += 9) check_int8(rows, 70, n_in, 0);
    for (int rows = 1; rows <= 129; rows += 32) {
        check_int8(rows, 70, 1024, 0);
        check_int8(rows, 33, 4099, 0);
    }
    /* The largest sums of the contract: 65536 * 127 * 127 = 1057030144, and with the weights as
     * stored 65536 * 255 * 127 = 2122383360, both below 2^31. */
    for (int rows = 1; rows <= 34; rows += 11) {
        check_int8(rows, 17, AMBER_MAX_K, 127);
        check_int8(rows, 17, AMBER_MAX_K, -127);
    }
}

/* Results of several megabytes in aligned rows, which may be written around the caches. */
static void test_gemm_w8a8_large(void) {
    for (int i = 0; i < 4; i++) {
        struct int8_case c = int8_case(1100, 1024, 65, 0);
        c.g.ldy = 1024;
        c.g.add = i == 3;
        float *want = guarded((size_t)(c.g.a.rows * c.g.ldy) * 4);
        int8_oracle(&c, want);
        for (int j = 0; j < n_columns; j++)
            CHECK(int8_run(&columns[j], &c, 0, i * 21, c.panels, want));
        release();
    }
}

static void test_gemm_w8a8_splits(void) {
    static const int rows[] = {1, 2, 7, 40, 100};
    for (int r = 0; r < 5; r++) {
        struct int8_case c = int8_case(rows[r], 200, 600, 0);
        float *want = guarded((size_t)(rows[r] * c.g.ldy) * 4);
        int8_oracle(&c, want);
        for (int i = 0; i < n_columns; i++) {
            for (int cut = 0; cut <= c.panels; cut++)
                CHECK(int8_run(&columns[i], &c, 0, cut, c.panels, want));
            memcpy(c.g.y, c.before, (size_t)(rows[r] * c.g.ldy) * 4);
            columns[i].gemm_w8a8(&c.g, 5, 5); /* nothing to do */
            CHECK(memcmp(c.g.y, c.before, (size_t)(rows[r] * c.g.ldy) * 4) == 0);
        }
        release();
    }
}

static void test_gemm_w8a8_nan(void) {
    struct int8_case c = int8_case(9, 40, 100, 0);
    c.g.a.scale[4] = NAN;
    for (int i = 0; i < n_columns; i++) {
        memcpy(c.g.y, c.before, (size_t)(9 * c.g.ldy) * 4);
        columns[i].gemm_w8a8(&c.g, 0, c.panels);
        for (int t = 0; t < 9; t++)
            for (int o = 0; o < 40; o++) CHECK_EQ(isnan(c.g.y[t * c.g.ldy + o]), t == 4);
    }
    release();
}

/* ---- Quantization ---- */

static void check_quantize(const float *x, int n) {
    int k_pad = (n + 63) / 64 * 64;
    int8_t *want = guarded((size_t)k_pad), *q = guarded((size_t)k_pad);
    double absmax = 0;
    bool finite = true;
    for (int i = 0; i < n; i++) {
        finite = finite && isfinite(x[i]);
        absmax = fmax(absmax, fabs(x[i]));
    }
    float inverse = 127.0f / (float)absmax;
    bool zero = !finite || isinf(inverse);
    int32_t total = 0;
    for (int i = 0; i < k_pad; i++) {
        want[i] = i < n && !zero ? (int8_t)nearbyint((double)(float)(x[i] * inverse)) : 0;
        total += want[i];
    }
    for (int i = 0; i < n_columns; i++) {
        float scale = -1;
        int32_t sum = -1;
        memset(q, 99, (size_t)k_pad);
        columns[i].quantize_row(q, &scale, &sum, x, n, k_pad);
        if (!CHECK(memcmp(q, want, (size_t)k_pad) == 0))
            fprintf(stderr, "    %s\n", columns[i].isa);
        CHECK_EQ(sum, total);
        if (finite) {
            CHECK(scale == (zero ? 0 : (float)absmax / 127.0f));
        } else {
            CHECK(isnan(scale));
        }
    }
}

static void test_quantize_row(void) {
    for (int n = 1; n <= 300; n++) {
        float *x = uniforms(n);
        check_quantize(x, n);
        for (int i = 0; i < n; i++)
            x[i] = (float)((int)(random_bits() % 509) - 254) * 0.5f; /* ties */
        x[random_bits() % (unsigned)n] = -127;
        check_quantize(x, n);
        for (int i = 0; i < n; i++) x[i] = uniform() * 1e-37f;
        check_quantize(x, n);
        release();
    }
    static const float odd[] = {NAN,      -NAN,    INFINITY, -INFINITY, 0.0f,     -0.0f,    FLT_MAX,
                                -FLT_MAX, FLT_MIN, 1e-40f,   1e-45f,    3.7e-37f, 3.8e-37f, 1.0f};
    for (int n = 1; n <= 70; n++) {
        for (int v = 0; v < 14; v++) {
            float *x = guarded((size_t)n * 4);
            for (int i = 0; i < n; i++) x[i] = v % 2 ? 0 : uniform();
            x[(n * 7 + v) % n] = odd[v];
            x[n - 1] = odd[v];
            check_quantize(x, n);
            for (int i = 0; i < n; i++) x[i] = odd[v];
            check_quantize(x, n);
            release();
        }
    }
    float *x = uniforms(4099);
    check_quantize(x, 4099);
    release();
}

/* ---- Packing ---- */

static void test_pack(void) {
    static const int ins[] = {1, 2, 63, 64, 65, 255, 256, 257, 300, 700};
    for (int s = 0; s < 10; s++) {
        for (int n_out = 1; n_out <= 37; n_out += 4) {
            int n_in = ins[s], k_pad = (n_in + 63) / 64 * 64, panels = (n_out + 15) / 16;
            float *w = uniforms((int64_t)n_out * n_in);
            if (n_out > 4) {
                memset(w + n_in, 0, (size_t)n_in * 4);
                w[2 * n_in] = INFINITY;
                w[4 * n_in - 1] = NAN;
            }
            uint8_t *q = guarded((size_t)panels * 16 * k_pad);
            float *scale = guarded((size_t)panels * 64);
            for (int p = panels - 1; p >= 0; p--)
                amber_pack_w8_panel(q, scale, w + (int64_t)p * 16 * n_in, p,
                                    n_out - p * 16 < 16 ? n_out - p * 16 : 16, n_in, k_pad);
            int8_t *row = guarded((size_t)k_pad);
            int wrong = 0;
            for (int o = 0; o < panels * 16; o++) {
                float row_scale = 0;
                int32_t sum;
                memset(row, 0, (size_t)k_pad);
                if (o < n_out)
                    ref.quantize_row(row, &row_scale, &sum, w + (int64_t)o * n_in, n_in, k_pad);
                wrong += !(scale[o] == row_scale || (isnan(scale[o]) && isnan(row_scale)));
                for (int k = 0; k < k_pad; k++)
                    wrong +=
                        q[((size_t)(o / 16) * (k_pad / 4) + k / 4) * 64 + o % 16 * 4 + k % 4] !=
                        row[k] + 128;
            }
            CHECK_EQ(wrong, 0);
            release();
        }
    }
}

/* ---- float16 ---- */

static double half_value(unsigned h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -v : v;
}

static void test_f16(void) {
    int wrong = 0;
    for (unsigned h = 0; h < 65536; h++) {
        float f = f32_from_f16_bits((uint16_t)h);
        if ((h >> 10 & 31) == 31) {
            wrong += h & 1023 ? !isnan(f) : f != (h & 0x8000 ? -INFINITY : INFINITY);
        } else {
            wrong += f != half_value(h) || !signbit(f) != !(h & 0x8000);
        }
    }
    CHECK_EQ(wrong, 0);
    /* Each float16, the midpoint to the next (a tie goes to the even one), and the floats around.
     */
    enum { N = 31744 * 4 };
    float *x = guarded(2 * N * 4);
    uint16_t *want = guarded(2 * N * 2), *y = guarded(2 * N * 2);
    for (unsigned h = 0; h < 31744; h++) {
        float v = (float)half_value(h);
        float middle = (float)((half_value(h) + (h == 31743 ? 65536 : half_value(h + 1))) / 2);
        float values[4] = {v, nextafterf(middle, 0), middle, nextafterf(middle, 1e9f)};
        unsigned bits[4] = {h, h, h + (h & 1), h + 1};
        for (int i = 0; i < 4; i++) {
            x[h * 4 + i] = values[i];
            x[N + h * 4 + i] = -values[i];
            want[h * 4 + i] = (uint16_t)bits[i];
            want[N + h * 4 + i] = (uint16_t)(bits[i] | 0x8000);
        }
    }
    for (int i = 0; i < n_columns; i++) {
        columns[i].f16_from_f32(y, x, 2 * N);
        CHECK(memcmp(y, want, 2 * N * 2) == 0);
    }
    release();
    static const float odd[] = {INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 65520.0f, 1e-45f, -1e-30f};
    static const uint16_t odd_want[] = {0x7c00, 0xfc00, 0x7c00, 0xfc00, 0x7c00, 0, 0x8000};
    for (int n = 1; n <= 40; n++) {
        float *v = guarded((size_t)n * 4);
        uint16_t *h = guarded((size_t)n * 2);
        for (int j = 0; j < n; j++) v[j] = odd[j % 7];
        for (int i = 0; i < n_columns; i++) {
            memset(h, 1, (size_t)n * 2);
            columns[i].f16_from_f32(h, v, n);
            int bad = 0;
            for (int j = 0; j < n; j++) bad += h[j] != odd_want[j % 7];
            CHECK_EQ(bad, 0);
            v[n - 1] = NAN;
            columns[i].f16_from_f32(h, v, n);
            CHECK((h[n - 1] & 0x7c00) == 0x7c00 && (h[n - 1] & 0x3ff));
            v[n - 1] = odd[(n - 1) % 7];
        }
        release();
    }
}

/* ---- Row operations ---- */

static void test_rmsnorm(void) {
    for (int n = 1; n <= 4099; n += n < 150 ? 1 : 439) {
        float *x = uniforms(n), *weight = uniforms(n), *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8), sum = 0;
        for (int i = 0; i < n; i++) sum += (double)x[i] * x[i];
        for (int i = 0; i < n; i++) {
            want[i] = x[i] / sqrt(sum / n + 1e-5) * weight[i];
            /* The sum of n squares: n u, halved by the root; eight rounded operations. */
            bound[i] = fabs(want[i]) * (n / 2.0 + 8) * U;
        }
        for (int i = 0; i < n_columns; i++) {
            columns[i].rmsnorm(y, x, weight, n, 1e-5f);
            CHECK(close_to(y, want, bound, n));
        }
        for (int i = 0; i < n_columns; i++) { /* in place */
            memcpy(y, x, (size_t)n * 4);
            columns[i].rmsnorm(y, y, weight, n, 1e-5f);
            CHECK(close_to(y, want, bound, n));
        }
        release();
    }
}

static void test_layernorm(void) {
    for (int n = 2; n <= 4099; n += n < 150 ? 1 : 439) {
        float *x = uniforms(n), *weight = uniforms(n), *bias = uniforms(n);
        float *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
        double mean = 0, size = 0, variance = 0;
        for (int i = 0; i < n; i++) x[i] += 0.5f;
        for (int i = 0; i < n; i++) mean += x[i], size += fabs(x[i]);
        mean /= n;
        for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
        const double deviation = sqrt(variance / n + 1e-5);
        for (int with_bias = 0; with_bias < 2; with_bias++) {
            for (int i = 0; i < n; i++) {
                double centred = (x[i] - mean) / deviation;
                want[i] = centred * weight[i] + (with_bias ? bias[i] : 0);
                /* The mean is off by size u, and so is every difference, also those in the
                 * variance; the sum of n squares adds n u, halved by the root. */
                bound[i] = fabs(weight[i]) * (1 + fabs(centred)) * (size + 1) / deviation * U +
                           fabs(centred * weight[i]) * (n / 2.0 + 8) * U + 2 * fabs(want[i]) * U +
                           4 * U;
            }
            for (int i = 0; i < n_columns; i++) {
                columns[i].layernorm(y, x, weight, with_bias ? bias : NULL, n, 1e-5f);
                CHECK(close_to(y, want, bound, n));
                memcpy(y, x, (size_t)n * 4);
                columns[i].layernorm(y, y, weight, with_bias ? bias : NULL, n, 1e-5f);
                CHECK(close_to(y, want, bound, n));
            }
        }
        release();
    }
}

static void test_gelu_mul(void) {
    for (int n = 1; n <= 3000; n += n < 70 ? 1 : 977) {
        float *gate = uniforms(n), *up = uniforms(n), *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
        for (int alone = 0; alone < 2; alone++) {
            for (int i = 0; i < n; i++) {
                if (!alone) gate[i] *= n % 3 == 0 ? 30 : 4;
                double v = gate[i],
                       u = sqrt(8 / 3.14159265358979323846) * (v + 0.044715 * v * v * v);
                double product = alone ? 1 : up[i];
                want[i] = v / (1 + exp(-u)) * product;
                /* As for silu, and the argument of exp() is off by five rounded operations. */
                bound[i] = fabs(want[i]) * (0x1p-22 + (4 + 6 * fabs(u)) * U) +
                           fabs(v * product) * 0x1p-125 + 0x1p-149;
            }
            for (int i = 0; i < n_columns; i++) {
                columns[i].gelu_mul(y, gate, alone ? NULL : up, n);
                CHECK(close_to(y, want, bound, n));
                memcpy(y, gate, (size_t)n * 4);
                columns[i].gelu_mul(y, y, alone ? NULL : up, n);
                CHECK(close_to(y, want, bound, n));
            }
        }
        release();
    }
}

static void test_relu2_mul(void) {
    for (int n = 1; n <= 3000; n += n < 70 ? 1 : 977) {
        float *gate = uniforms(n), *up = uniforms(n), *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
        for (int alone = 0; alone < 2; alone++) {
            for (int i = 0; i < n; i++) {
                double v = fmax(gate[i], 0);
                want[i] = v * v * (alone ? 1 : up[i]);
                bound[i] = fabs(want[i]) * 2 * U + 0x1p-149;
            }
            for (int i = 0; i < n_columns; i++) {
                columns[i].relu2_mul(y, gate, alone ? NULL : up, n);
                CHECK(close_to(y, want, bound, n));
                memcpy(y, gate, (size_t)n * 4);
                columns[i].relu2_mul(y, y, alone ? NULL : up, n);
                CHECK(close_to(y, want, bound, n));
                float odd[20] = {[3] = NAN, [5] = -INFINITY, [18] = NAN}, out[20];
                columns[i].relu2_mul(out, odd, NULL, 20);
                CHECK(isnan(out[3]) && isnan(out[18]) && out[4] == 0 && out[5] == 0);
            }
        }
        release();
    }
}

static void test_swiglu_clamped(void) {
    for (int n = 1; n <= 3000; n += n < 70 ? 1 : 977) {
        float *gate = uniforms(n), *up = uniforms(n), *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
        for (int i = 0; i < n; i++) {
            gate[i] *= n % 3 == 0 ? 120 : 9;
            up[i] *= 9;
            double g = fmin(gate[i], 7), u = fmin(fmax(up[i], -7), 7), size = fabs(u) + 1;
            want[i] = g / (1 + exp(-1.702 * g)) * (u + 1);
            /* As for silu; the argument of exp() is off by two rounded operations, and u + 1 by U of
             * its terms. */
            bound[i] = fabs(want[i]) * (0x1p-22 + (5 + 4 * fabs(g)) * U) +
                       fabs(g) / (1 + exp(-1.702 * g)) * size * U + fabs(g) * size * 0x1p-125;
        }
        for (int i = 0; i < n_columns; i++) {
            columns[i].swiglu_clamped(y, gate, up, n);
            CHECK(close_to(y, want, bound, n));
            memcpy(y, gate, (size_t)n * 4);
            columns[i].swiglu_clamped(y, y, up, n);
            CHECK(close_to(y, want, bound, n));
            float odd[20] = {[3] = NAN, [18] = NAN}, ones[20], out[20];
            for (int j = 0; j < 20; j++) ones[j] = 1;
            columns[i].swiglu_clamped(out, odd, ones, 20);
            CHECK(isnan(out[3]) && isnan(out[18]) && out[4] == 0);
            columns[i].swiglu_clamped(out, ones, odd, 20);
            CHECK(isnan(out[3]) && isnan(out[18]) && out[4] > 0);
        }
        release();
    }
}

static void test_silu_mul(void) {
    for (int n = 1; n <= 3000; n += n < 70 ? 1 : 977) {
        float *gate = uniforms(n), *up = uniforms(n), *y = guarded((size_t)n * 4);
        double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
        for (int i = 0; i < n; i++) {
            gate[i] *= n % 3 == 0 ? 120 : 8;
            double v = gate[i];
            want[i] = v / (1 + exp(-v)) * up[i];
            /* exp() is good to 2^-22; four rounded operations; below -88 the divisor stays at
             * exp(88), so that at most |v| 2^-126 is left of the result. */
            bound[i] = fabs(want[i]) * (0x1p-22 + 4 * U) + fabs(v * up[i]) * 0x1p-126 + 0x1p-149;
        }
        for (int i = 0; i < n_columns; i++) {
            columns[i].silu_mul(y, gate, up, n);
            CHECK(close_to(y, want, bound, n));
            memcpy(y, gate, (size_t)n * 4);
            columns[i].silu_mul(y, y, up, n);
            CHECK(close_to(y, want, bound, n));
            memcpy(y, up, (size_t)n * 4);
            columns[i].silu_mul(y, gate, y, n);
            CHECK(close_to(y, want, bound, n));
            for (int j = 0; j < n; j++) y[j] = 1;
            columns[i].silu_mul(y, gate, y, n);
            float *alone = guarded((size_t)n * 4);
            columns[i].silu_mul(alone, gate, NULL, n);
            CHECK(memcmp(alone, y, (size_t)n * 4) == 0);
            float nan_gate[20] = {0}, ones[20], out[20];
            for (int j = 0; j < 20; j++) ones[j] = 1;
            nan_gate[3] = nan_gate[18] = NAN;
            columns[i].silu_mul(out, nan_gate, ones, 20);
            CHECK(isnan(out[3]) && isnan(out[18]) && out[4] == 0);
        }
        release();
    }
}

static void test_rope(void) {
    for (int n_rot = 2; n_rot <= 300; n_rot += 2) {
        for (int halves = 0; halves < 2; halves++) {
            int n = n_rot + 5, half = n_rot / 2;
            float *x = uniforms(n), *y = guarded((size_t)n * 4);
            float *c = guarded((size_t)half * 4), *s = guarded((size_t)half * 4);
            double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
            for (int i = 0; i < n; i++) {
                want[i] = x[i];
                bound[i] = 0;
            }
            for (int i = 0; i < half; i++) {
                double angle = uniform() * 3;
                c[i] = (float)cos(angle);
                s[i] = (float)sin(angle);
                int a = halves ? i : 2 * i, b = halves ? i + half : 2 * i + 1;
                want[a] = (double)x[a] * c[i] - (double)x[b] * s[i];
                want[b] = (double)x[a] * s[i] + (double)x[b] * c[i];
                bound[a] = 2 * U * (fabs(x[a] * c[i]) + fabs(x[b] * s[i]));
                bound[b] = 2 * U * (fabs(x[a] * s[i]) + fabs(x[b] * c[i]));
            }
            for (int i = 0; i < n_columns; i++) {
                memcpy(y, x, (size_t)n * 4);
                columns[i].rope(y, c, s, n_rot, halves);
                CHECK(close_to(y, want, bound, n));
            }
            release();
        }
    }
}

/* ---- float32 matrix product ---- */

static void check_gemm_f32(int rows, int n_out, int n_in) {
    int64_t ldx = n_in + 2, ldy = n_out + 3, n = rows * ldy;
    float *before = uniforms(n), *y = guarded((size_t)n * 4), *whole = guarded((size_t)n * 4);
    double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
    struct amber_gemm_f32 g = {
        .w = uniforms((int64_t)n_out * n_in),
        .bias = random_bits() % 2 ? uniforms(n_out) : NULL,
        .n_out = n_out,
        .n_in = n_in,
        .x = uniforms(rows * ldx),
        .ldx = ldx,
        .rows = rows,
        .y = y,
        .ldy = ldy,
        .add = random_bits() % 2,
    };
    for (int64_t i = 0; i < n; i++) {
        want[i] = before[i];
        bound[i] = 0;
    }
    for (int t = 0; t < rows; t++) {
        for (int o = 0; o < n_out; o++) {
            double sum = 0, size = 0;
            for (int k = 0; k < n_in; k++) {
                double product = (double)g.w[(int64_t)o * n_in + k] * g.x[t * ldx + k];
                sum += product;
                size += fabs(product);
            }
            int64_t at = t * ldy + o;
            if (g.bias) sum += g.bias[o];
            if (g.bias) size += fabs(g.bias[o]);
            want[at] = sum + (g.add ? before[at] : 0);
            bound[at] = (n_in + 3) * U * (size + fabs(before[at]));
        }
    }
    for (int i = 0; i < n_columns; i++) {
        memcpy(whole, before, (size_t)n * 4);
        g.y = whole;
        columns[i].gemm_f32(&g, 0, n_out);
        CHECK(close_to(whole, want, bound, (int)n));
        g.y = y;
        for (int cut = 0; cut <= n_out;
             cut += 1 + n_out / 7) { /* the same bits however it is cut */
            memcpy(y, before, (size_t)n * 4);
            columns[i].gemm_f32(&g, 0, cut);
            columns[i].gemm_f32(&g, cut, n_out);
            CHECK(memcmp(y, whole, (size_t)n * 4) == 0);
        }
        struct amber_gemm_f32 one = g;
        memcpy(y, before, (size_t)n * 4);
        one.rows = 1;
        for (int t = 0; t < rows; t++, one.x += ldx, one.y += ldy)
            columns[i].gemm_f32(&one, 0, n_out);
        CHECK(memcmp(y, whole, (size_t)n * 4) == 0);
    }
    release();
}

static void test_gemm_f32(void) {
    for (int rows = 1; rows <= 15; rows++)
        for (int n_out = 1; n_out <= 11; n_out++) check_gemm_f32(rows, n_out, rows * 3 + n_out * 5);
    for (int n_in = 1; n_in <= 200; n_in++) check_gemm_f32(n_in % 8 + 1, 5 + n_in % 3, n_in);
    check_gemm_f32(129, 33, 260);
    check_gemm_f32(3, 9, 4099);
}

/* ---- Attention ---- */

static double cached(const struct amber_attention *a, const void *cache, int64_t i) {
    if (a->cells == AMBER_CELLS_I8)
        return ((const int8_t *)cache)[i] *
               (double)(cache == a->k ? a->k_scale : a->v_scale)[i / a->head_dim];
    return a->cells == AMBER_CELLS_F32 ? ((const float *)cache)[i]
                                       : half_value(((const uint16_t *)cache)[i]);
}

/* One row of keys or values, float32 x[n], as cells of the cache; row counts all heads'. */
static void store_row(void *cache, float *scales, enum amber_cells cells, int64_t row,
                      const float *x, int n) {
    int32_t sum;
    if (cells == AMBER_CELLS_I8) {
        ref.quantize_row((int8_t *)cache + row * n, &scales[row], &sum, x, n, n);
        return;
    }
    for (int i = 0; i < n; i++)
        if (cells == AMBER_CELLS_F32)
            ((float *)cache)[row * n + i] = x[i];
        else
            ((uint16_t *)cache)[row * n + i] = f16_bits_from_f32(x[i]);
}

static void attention_oracle(const struct amber_attention *a, double *want, double *bound) {
    const int d = a->head_dim;
    double *weight = malloc((size_t)a->n_ctx * 8);
    for (int t = 0; t < a->rows; t++) {
        for (int h = 0; h < a->n_head; h++) {
            int64_t at = ((int64_t)t * a->n_head + h) * d;
            int64_t head = (int64_t)(h / (a->n_head / a->n_head_kv)) * a->n_ctx;
            int last = a->pos0 + t, first = a->window ? last - a->window + 1 : 0;
            if (first < 0) first = 0;
            double largest = a->sink ? a->sink[h] : -1e300, total = 0, size = 0, v_largest = 0;
            double magnitude = a->sink ? fabs(a->sink[h]) : 0, q_largest = 0, key_size = 0;
            for (int i = 0; i < d; i++) q_largest = fmax(q_largest, fabs(a->q[at + i]));
            for (int p = first; p <= last; p++) {
                double dot = 0, dot_size = 0, keys = 0;
                for (int i = 0; i < d; i++) {
                    double product = a->q[at + i] * cached(a, a->k, (head + p) * d + i);
                    dot += product;
                    dot_size += fabs(product);
                    keys += fabs(cached(a, a->k, (head + p) * d + i));
                    v_largest = fmax(v_largest, fabs(cached(a, a->v, (head + p) * d + i)));
                }
                double s = dot * a->scale;
                size = fmax(size, dot_size * a->scale);
                key_size = fmax(key_size, keys);
                magnitude = fmax(magnitude, fabs(s));
                weight[p] = a->softcap > 0 ? a->softcap * tanh(s / a->softcap) : s;
                largest = fmax(largest, weight[p]);
            }
            for (int p = first; p <= last; p++) total += weight[p] = exp(weight[p] - largest);
            if (a->sink) total += exp(a->sink[h] - largest);
            /* A score is off by (d + 2) u of its terms, by 2^-20 softcap where it goes through
             * tanh (2^-22 of exp, twice, and four operations), and by 3 u of its size when the
             * largest is taken off. With INT8 keys the query may be int16: its elements are off by
             * half a step, largest / 32767 / 2, and a score by six more roundings (of the step, of
             * the sum, of four products). A weight is off by exp() of that twice (its own score and
             * the largest) and 2^-22 per exp(), one per block of the online sum; sums of n add n u
             * each to numerator and denominator, the scales of INT8 values one u. */
            int n = last - first + 1, i8 = a->cells == AMBER_CELLS_I8;
            double score_error = (d + 2) * U * size + a->softcap * 0x1p-20 + 3 * U * magnitude;
            if (i8)
                score_error += 6 * U * size + q_largest * key_size * a->scale / 65534 * (1 + 4 * U);
            double error = 4 * score_error + (n / 64 + 3) * 2 * 0x1p-22 + (2 * (n + 4) + i8) * U;
            for (int i = 0; i < d; i++) {
                double sum = 0;
                for (int p = first; p <= last; p++)
                    sum += weight[p] * cached(a, a->v, (head + p) * d + i);
                want[at + i] = sum / total;
                bound[at + i] = error * v_largest;
            }
        }
    }
    free(weight);
}

static void run_attention(const struct amber_kernels *k, struct amber_attention a, int row0,
                          int rows, float *out, void *scratch, bool in_units) {
    int64_t width = (int64_t)a.n_head * a.head_dim;
    a.q += row0 * width;
    a.out = out + row0 * width;
    a.rows = rows;
    a.pos0 += row0;
    int units = k->attention_units(&a);
    for (int u = 0; u < units; u += in_units ? 1 : units)
        k->attention(&a, u, in_units ? u + 1 : units, scratch);
}

static void check_attention(int rows, int pos0, int n_head, int n_head_kv, int d, int window,
                            float softcap, enum amber_cells type, float loudness) {
    int n_ctx = pos0 + rows + 70;
    int64_t n = (int64_t)rows * n_head * d, cells = (int64_t)n_head_kv * n_ctx * d;
    size_t cell = (size_t)amber_cell_bytes(type);
    float *scales[] = {guarded((size_t)(cells / d) * 4), guarded((size_t)(cells / d) * 4)};
    struct amber_attention a = {
        .q = uniforms(n),
        .k = guarded((size_t)cells * cell),
        .v = guarded((size_t)cells * cell),
        .k_scale = scales[0],
        .v_scale = scales[1],
        .cells = type,
        .rows = rows,
        .n_head = n_head,
        .n_head_kv = n_head_kv,
        .head_dim = d,
        .n_ctx = n_ctx,
        .pos0 = pos0,
        .window = window,
        .scale = loudness / sqrtf((float)d),
        .softcap = softcap,
    };
    for (int which = 0; which < 2; which++) {
        void *cache = (void *)(uintptr_t)(which ? a.v : a.k);
        for (int64_t row = 0; row < cells / d; row++) {
            float x[AMBER_HEAD_MAX];
            /* NaN where no row may look. */
            for (int i = 0; i < d; i++) x[i] = row % n_ctx < pos0 + rows ? uniform() : NAN;
            store_row(cache, scales[which], type, row, x, d);
        }
    }
    float *sinks = uniforms(n_head);
    for (int i = 0; i < n_head; i++) sinks[i] *= 2 * loudness;
    if ((rows + pos0 + d / 8) % 2) a.sink = sinks;
    double *want = guarded((size_t)n * 8), *bound = guarded((size_t)n * 8);
    attention_oracle(&a, want, bound);
    float *whole = guarded((size_t)n * 4), *part = guarded((size_t)n * 4);
    for (int i = 0; i < n_columns; i++) {
        const struct amber_kernels *k = &columns[i];
        void *scratch = guarded(k->attention_scratch);
        run_attention(k, a, 0, rows, whole, scratch, false);
        if (!CHECK(close_to(whole, want, bound, (int)n)))
            fprintf(stderr, "    %s rows %d pos0 %d heads %d/%d d %d window %d cap %g cells %d\n",
                    k->isa, rows, pos0, n_head, n_head_kv, d, window, softcap, type);
        run_attention(k, a, 0, rows, part, scratch, true);
        CHECK(memcmp(part, whole, (size_t)n * 4) == 0);
        for (int step = 1; step < rows; step = step * 3 + 2) { /* the same bits in chunks of rows */
            memset(part, 0, (size_t)n * 4);
            for (int r = 0; r < rows; r += step)
                run_attention(k, a, r, rows - r < step ? rows - r : step, part, scratch, false);
            if (!CHECK(memcmp(part, whole, (size_t)n * 4) == 0))
                fprintf(stderr, "    %s chunks of %d: d %d window %d\n", k->isa, step, d, window);
        }
    }
    release();
}

/* A ring against a cache that holds all positions: the same bits, whatever stands in rows of the ring
 * that no query sees. */
static void check_ring(int rows, int pos0, int d, int window, enum amber_cells type) {
    enum { HEADS = 6, KV_HEADS = 2 };
    const int positions = pos0 + rows, ring = (window + rows + 62 + 63) / 64 * 64;
    const int first = pos0 - window + 1 > 0 ? pos0 - window + 1 : 0;
    const size_t row = (size_t)(d * amber_cell_bytes(type)), n = (size_t)rows * HEADS * (size_t)d;
    struct amber_attention linear = {.q = uniforms((int64_t)n),
                                     .cells = type,
                                     .rows = rows,
                                     .n_head = HEADS,
                                     .n_head_kv = KV_HEADS,
                                     .head_dim = d,
                                     .n_ctx = positions,
                                     .pos0 = pos0,
                                     .window = window,
                                     .scale = 1 / sqrtf((float)d)};
    struct amber_attention wrapped = linear;
    wrapped.n_ctx = ring;
    for (int which = 0; which < 2; which++) {
        uint8_t *all = guarded(KV_HEADS * (size_t)positions * row);
        uint8_t *some = guarded(KV_HEADS * (size_t)ring * row);
        float *all_scales = guarded((size_t)(KV_HEADS * positions) * 4);
        float *some_scales = guarded((size_t)(KV_HEADS * ring) * 4);
        /* 22352 as float16, 3e32 as float32 */
        memset(some, 0x75, KV_HEADS * (size_t)ring * row);
        memset(some_scales, 0x75, (size_t)(KV_HEADS * ring) * 4);
        for (int64_t r = 0; r < (int64_t)KV_HEADS * positions; r++) {
            float x[AMBER_HEAD_MAX];
            for (int i = 0; i < d; i++) x[i] = uniform();
            store_row(all, all_scales, type, r, x, d);
        }
        for (int h = 0; h < KV_HEADS; h++)
            for (int p = first; p < positions; p++) {
                const size_t to = (size_t)h * (size_t)ring + (size_t)(p % ring),
                             from = (size_t)h * (size_t)positions + (size_t)p;
                memcpy(some + to * row, all + from * row, row);
                some_scales[to] = all_scales[from];
            }
        *(which ? &linear.v : &linear.k) = all;
        *(which ? &wrapped.v : &wrapped.k) = some;
        *(which ? &linear.v_scale : &linear.k_scale) = all_scales;
        *(which ? &wrapped.v_scale : &wrapped.k_scale) = some_scales;
    }
    float *want = guarded(n * 4), *out = guarded(n * 4);
    for (int i = 0; i < n_columns; i++) {
        void *scratch = guarded(columns[i].attention_scratch);
        run_attention(&columns[i], linear, 0, rows, want, scratch, false);
        run_attention(&columns[i], wrapped, 0, rows, out, scratch, false);
        if (!CHECK(memcmp(out, want, n * 4) == 0))
            fprintf(stderr, "    %s: ring of %d, rows %d from %d, d %d, window %d, cells %d\n",
                    columns[i].isa, ring, rows, pos0, d, window, type);
    }
    release();
}

static void test_attention(void) {
    static const int dims[] = {8, 16, 24, 32, 40, 64, 80, 96, 128, 256, 512};
    static const int heads[][2] = {{1, 1}, {8, 4}, {6, 1}, {9, 3}, {5, 5}, {16, 2}, {7, 1}};
    static const int windows[] = {0, 1, 7, 64, 100, 0, 2147483647};
    static const int starts[] = {0, 1, 63, 64, 100, 191};
    for (int d = 0; d < 11; d++)
        for (int r = 1; r <= 40; r += r < 8 ? 3 : 16)
            for (int v = 0; v < (dims[d] < 100 ? 7 : 2); v++) {
                int i = d + r + v;
                check_attention(r, starts[i % 6], heads[i % 7][0], heads[i % 7][1], dims[d],
                                windows[v], v % 3 == 1 ? 20.0f : 0,
                                i % 4 == 0   ? AMBER_CELLS_F32
                                : i % 2 == 0 ? AMBER_CELLS_I8
                                             : AMBER_CELLS_F16,
                                1 + v * 3);
            }
    for (int i = 0; i < 2; i++) {
        const enum amber_cells type = i ? AMBER_CELLS_I8 : AMBER_CELLS_F16;
        check_attention(150, 30, 2, 1, 64, 0, 0, type, 4);
        check_attention(150, 30, 2, 1, 16, 37, 50, type, 8);
        check_attention(200, 0, 1, 1, 8, 0, 0, type, 4);
        check_attention(2, 100, 150, 1, 16, 0, 0, type, 4); /* more heads than queries of a unit */
        check_attention(1, 1000, 4, 2, 32, 0, 0, type, 30);
        check_attention(3, 70, 4, 1, 128, 0, 0, type, 4); /* few queries, two tiles of them */
    }
    for (int pos0 = 0; pos0 < 700; pos0 += 61)
        for (int i = 0; i < 12; i++)
            check_ring(i % 3 == 0 ? 1 : 5 + 30 * (i % 3), pos0, i % 2 ? 64 : 24,
                       1 + pos0 * 37 % 200,
                       i == 5  ? AMBER_CELLS_F32
                       : i < 6 ? AMBER_CELLS_F16
                               : AMBER_CELLS_I8);
}

/* ---- Choice of a column ---- */

static void test_select(void) {
    struct amber_kernels k;
    CHECK(!amber_kernels_select(&k, "sse9"));
    CHECK(!amber_kernels_select(&k, ""));
    CHECK(!amber_kernels_select(&k, "avx"));
    char names[128];
    snprintf(names, sizeof names, "%s", amber_kernels_list());
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) {
        if (!CHECK(n_columns < MAX_COLUMNS && amber_kernels_select(&columns[n_columns], name)))
            continue;
        CHECK(strcmp(columns[n_columns].isa, name) == 0);
        n_columns++;
    }
    CHECK(amber_kernels_ref(&ref) && strcmp(columns[n_columns - 1].isa, "ref") == 0);
    CHECK(amber_kernels_select(&k, NULL) && strcmp(k.isa, columns[0].isa) == 0);
    CHECK(amber_a8_stride(64) == 64 && amber_a8_stride(2048) == 2112 &&
          amber_a8_stride(192) == 192);
}

int main(void) {
    test_select();
    printf("columns: %s\n", amber_kernels_list());
    test_gemm_w8a8();
    test_gemm_w8a8_large();
    test_gemm_w8a8_splits();
    test_gemm_w8a8_nan();
    test_quantize_row();
    test_pack();
    test_f16();
    test_rmsnorm();
    test_layernorm();
    test_silu_mul();
    test_gelu_mul();
    test_relu2_mul();
    test_swiglu_clamped();
    test_rope();
    test_gemm_f32();
    test_attention();
    return check_summary();
}
