/* test_cuda_kernels.c: the CUDA kernels against the scalar ones: integers exactly, float sums within
 * their rounding. Their own text runs thread by thread on the CPU (simt_emulate.h); with a library
 * named on the command line, on the GPU, and then with many more shapes.
 *
 *     test_cuda_kernels [libamber_cuda.so [first]]        first: the small shapes alone */
#include "check.h"
#include "cuda/layout.h"
#include "kernels.h"

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

extern const struct amber_cuda_api amber_cuda; /* the emulated one, linked */

static const struct amber_cuda_api *api = &amber_cuda;
static struct amber_cuda_device *device;
static struct amber_kernels ref;
static uint32_t random_state = 11;

static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}
static float normal(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += (float)(random_bits() >> 8) * 0x1p-24f;
    return sum - 6;
}
/* Memory that host and GPU both see. What stands behind it must stay as it is. */
enum { GUARD = 256, GUARD_BYTE = 0x5c, MAX_HELD = 256 };
static struct {
    uint8_t *at;
    int64_t bytes;
} held[MAX_HELD];
static int n_held;

static void *get(int64_t bytes, int fill) {
    uint8_t *p = n_held < MAX_HELD ? api->host_alloc(device, bytes + GUARD) : NULL;
    if (!p) abort();
    memset(p, fill, (size_t)bytes);
    memset(p + bytes, GUARD_BYTE, GUARD);
    held[n_held].at = p;
    held[n_held++].bytes = bytes;
    return p;
}
static void release(void) {
    int touched = 0;
    for (int i = 0; i < n_held; i++) {
        for (int j = 0; j < GUARD; j++) touched += held[i].at[held[i].bytes + j] != GUARD_BYTE;
        api->host_free(device, held[i].at);
    }
    CHECK_EQ(touched, 0);
    n_held = 0;
}
static float *normals(int n) {
    float *p = get(4 * (int64_t)n, 0);
    for (int i = 0; i < n; i++) p[i] = normal();
    return p;
}
static void finish(void) {
    char why[128] = "";
    if (!CHECK(api->finish(device, why, sizeof why))) {
        fprintf(stderr, "%s\n", why);
        exit(1); /* nothing that follows would run */
    }
}

/* ---- inputs and products ---- */

struct input_case {
    const char *pattern;
    int form; /* as which it is stored */
    int shift;
    bool var;
};

/* What the engine's CPU makes of a row (engine/ops_input.c). */
static void prune_on_cpu(const struct input_args *g, float *z, int rows) {
    static uint8_t scratch[1 << 16] __attribute__((aligned(64)));
    ref.prune = amber_prune_ref;
    ref.prune(&g->pattern, z, g->n, rows, g->f, g->n, scratch);
}

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}
static double variance(const float *z, int n) {
    double mean = 0, sum = 0;
    for (int i = 0; i < n; i++) mean += z[i];
    mean /= n;
    for (int i = 0; i < n; i++) sum += (z[i] - mean) * (z[i] - mean);
    return sum / n;
}

static void test_input(const struct input_case *c, int rows, int n, int n_out, int odd,
                       int pruned_from) {
    struct input_args g = {.source = INPUT_COPY, .rows = rows, .n = n, .odd = odd, .form = c->form};
    char why[160];
    CHECK(amber_pattern_parse(c->pattern, strlen(c->pattern), &g.pattern, why, sizeof why));
    g.k_pad = (n + 63) / 64 * 64;
    g.pruned_from = pruned_from;
    g.shift = c->shift;
    g.var = c->var;
    float *x = normals(rows * n), *f = normals(n);
    for (int i = 0; i < n; i++) f[i] = 0.5f + fabsf(f[i]);
    g.x = x;
    g.f = random_bits() % 2 ? f : NULL;
    g.a = get((int64_t)frag_a_bytes(c->form, rows, g.k_pad), 0);
    g.e = get((int64_t)frag_meta_bytes(c->form, rows, g.k_pad) + 1, FRAG_EMPTY_META & 0xff);
    g.scale = get(4 * rows, 0xff);
    g.shifted = c->shift ? get(4 * rows, 0xff) : NULL;
    api->input(device, &g);

    /* Weights, and the product with it. */
    int8_t *w = calloc((size_t)n_out, (size_t)g.k_pad);
    uint8_t *b = get((int64_t)frag_b_bytes(n_out, g.k_pad), 0);
    for (int o = 0; o < n_out; o++)
        for (int k = 0; k < n; k++)
            b[frag_b_offset(o, k, g.k_pad)] =
                (uint8_t)(w[o * g.k_pad + k] = (int8_t)((int)(random_bits() % 255) - 127));
    float *w_scale = normals(n_out), *w_sum = normals(n_out), *bias = normals(n_out);
    const int ldy = n_out + 3;
    float *y = get(4 * (int64_t)rows * ldy, 0xff);
    struct gemm_args m = {.form = c->form, .a = g.a, .e = g.e, .b = b, .a_scale = g.scale};
    m.shift = g.shifted;
    m.w_scale = w_scale, m.w_sum = w_sum, m.bias = bias;
    m.y = y, m.ldy = ldy, m.rows = rows, m.n_out = n_out, m.k_pad = g.k_pad;
    api->gemm(device, &m);
    finish();
    float *before = malloc(4 * (size_t)(rows * ldy));
    memcpy(before, y, 4 * (size_t)(rows * ldy));
    m.add = true;
    m.bias = NULL;
    api->gemm(device, &m);
    finish();

    /* The same on the CPU. */
    float *z = malloc(4 * (size_t)(rows * n)), *sorted = malloc(4 * (size_t)n);
    int8_t *q = malloc((size_t)g.k_pad);
    double *var = malloc(8 * (size_t)rows);
    float *shift = calloc((size_t)rows, 4);
    memcpy(z, x, 4 * (size_t)(rows * n));
    const bool sparse = g.pattern.kind != AMBER_PATTERN_DENSE;
    for (int r = pruned_from; sparse && r < rows; r++) {
        float *row = z + r * n;
        memcpy(sorted, row, 4 * (size_t)n);
        qsort(sorted, (size_t)n, 4, compare_floats);
        double mean = 0;
        for (int k = 0; k < n; k++) mean += row[k];
        if (c->shift == INPUT_MEAN) shift[r] = (float)(mean / n);
        if (c->shift == INPUT_MEDIAN) shift[r] = sorted[(n - 1) / 2];
        if (c->shift)
            for (int k = 0; k < n; k++) row[k] -= shift[r];
        var[r] = variance(row, n);
    }
    for (int r = pruned_from; sparse && r < rows;) {
        int together = 1;
        if (g.pattern.kind == AMBER_PATTERN_GROUP && g.pattern.tokens == 2)
            together = (r + odd) % 2 || r + 1 == rows ? 1 : 2;
        prune_on_cpu(&g, z + r * n, together);
        r += together;
    }
    for (int r = 0; r < rows; r++) {
        float scale;
        int32_t sum;
        ref.quantize_row(q, &scale, &sum, z + r * n, n, g.k_pad);
        if (c->var && r >= pruned_from)
            scale *= (float)sqrt(var[r] / fmax(variance(z + r * n, n), 1e-9));
        /* Sums in another order: the last bit of a double, the last of the float it becomes. */
        CHECK(fabsf(g.scale[r] - scale) <= (c->var ? 2e-7f * scale : 0));
        if (g.shifted) CHECK(fabsf(g.shifted[r] - shift[r]) <= 1e-7f * (1 + fabsf(shift[r])));
        for (int o = 0; o < n_out; o++) {
            int32_t acc = 0;
            for (int k = 0; k < g.k_pad; k++) acc += q[k] * w[o * g.k_pad + k];
            float v = (float)acc * (g.scale[r] * w_scale[o]);
            if (g.shifted) v = v + g.shifted[r] * w_sum[o];
            const float with_bias = v + bias[o];
            CHECK(before[r * ldy + o] == with_bias);
            CHECK(y[r * ldy + o] == with_bias + v);
        }
        for (int o = n_out; o < ldy; o++) CHECK(isnan(y[r * ldy + o])); /* not touched */
    }
    free(before), free(z), free(sorted), free(q), free(var), free(shift), free(w);
    release();
}

/* Every number of rows up to two tiles and a bit, and some larger ones. */
static void test_ragged(const struct input_case *c) {
    static const int more[] = {160, 192, 193, 255, 256, 257, 511, 512};
    for (int rows = 1; rows <= 131; rows++) test_input(c, rows, 448, 136, rows % 2, 0);
    for (size_t i = 0; i < sizeof more / sizeof more[0]; i++)
        test_input(c, more[i], 1000, 264, 0, 0);
}

static void test_inputs(bool many) {
    static const struct input_case cases[] = {
        {"dense", FORM_DENSE, 0, false},
        {"2:4", FORM_24, 0, false},
        {"2:4", FORM_DENSE, 0, false},
        {"2:4+r32", FORM_R32, 0, false},
        {"2:4+r32", FORM_DENSE, INPUT_MEAN, false},
        {"2:4+r16", FORM_R16, INPUT_MEAN, true},
        {"2:4+r16", FORM_DENSE, 0, true},
        {"8:16x", FORM_816X, INPUT_MEDIAN, true},
        {"8:16x", FORM_DENSE, 0, false},
        {"8:16", FORM_DENSE, INPUT_MEDIAN, true},
        {"3:5", FORM_DENSE, 0, false},
        {"12:16x4", FORM_DENSE, INPUT_MEAN, true},
        {"8:16x4t2", FORM_DENSE, 0, true},
        {"top50%", FORM_DENSE, 0, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_input(&cases[i], 1, 40, 5, 0, 0);
        test_input(&cases[i], 3, 200, 21, 1, 0);
        test_input(&cases[i], 35, 330, 130, 0, 0);
        if (cases[i].form == FORM_DENSE) test_input(&cases[i], 5, 96, 9, 0, 2);
        if (many) test_ragged(&cases[i]);
    }
    test_input(&cases[1], 131, 64, 8, 0, 0); /* tiles of every height */
    test_input(&cases[0], 130, 64, 8, 0, 0);
    test_input(&cases[0], 1, 24000, 8, 0, 0); /* rows longer than shared memory */
    test_input(&cases[5], 2, 24000, 8, 0, 0);
}

static void test_sources(void) {
    enum { ROWS = 3, N = 200, K = 256 };
    float *x = normals(ROWS * N), *up = normals(ROWS * N), *weight = normals(N), *bias = normals(N);
    x[0] = 9, up[1] = 8, up[2] = -8; /* beyond the clamps */
    for (int source = INPUT_COPY; source <= INPUT_CLAMPED; source++) {
        for (int with = source == INPUT_CLAMPED; with < 2; with++) {
            struct input_args g = {.source = source, .x = x, .rows = ROWS, .n = N, .k_pad = K};
            g.eps = 1e-5f;
            g.weight = weight;
            g.bias = source == INPUT_LAYERNORM && with ? bias : NULL;
            g.up = with ? up : NULL;
            g.a = get((int64_t)frag_a_bytes(FORM_DENSE, ROWS, K), 0);
            g.scale = get(4 * ROWS, 0xff);
            api->input(device, &g);
            finish();
            for (int r = 0; r < ROWS; r++) {
                float row[N], most = 0;
                const float *from = x + r * N;
                memcpy(row, from, sizeof row);
                if (source == INPUT_RMSNORM) ref.rmsnorm(row, from, weight, N, g.eps);
                if (source == INPUT_LAYERNORM) ref.layernorm(row, from, weight, g.bias, N, g.eps);
                if (source == INPUT_SILU) ref.silu_mul(row, from, with ? up + r * N : NULL, N);
                if (source == INPUT_GELU) ref.gelu_mul(row, from, with ? up + r * N : NULL, N);
                for (int k = 0; k < N && source == INPUT_GELU_ERF; k++)
                    row[k] = 0.5f * from[k] * (1 + erff(from[k] / sqrtf(2))) *
                             (with ? up[r * N + k] : 1);
                if (source == INPUT_RELU2) ref.relu2_mul(row, from, with ? up + r * N : NULL, N);
                if (source == INPUT_CLAMPED) ref.swiglu_clamped(row, from, up + r * N, N);
                for (int k = 0; k < N; k++) most = fmaxf(most, fabsf(row[k]));
                CHECK(fabsf(g.scale[r] - most / 127) <= 1e-5f * most / 127);
                for (int k = 0; k < N; k++) {
                    const int q = (int8_t)g.a[frag_dense_offset(r, k, K)];
                    /* Half a step of rounding, and a little more where rows differ in a last bit. */
                    CHECK(fabsf((float)q * g.scale[r] - row[k]) <= 0.502f * g.scale[r]);
                }
            }
        }
    }
    release();
}

/* ---- rows ---- */

static void test_norms(void) {
    enum { ROWS = 3, PARTS = 4, N = 48 };
    float *weight = normals(PARTS * N), *bias = normals(PARTS * N);
    for (int i = 0; i < 8; i++) {
        const bool layer = i & 1, add = i & 2, shared = i & 4;
        float *x = normals(ROWS * PARTS * N), *y = normals(ROWS * PARTS * N);
        float before[ROWS * PARTS * N], expected[N];
        memcpy(before, y, sizeof before);
        struct norm_args g = {.x = x, .y = y, .weight = weight, .bias = layer ? bias : NULL};
        g.ld = PARTS * N, g.rows = ROWS, g.parts = PARTS, g.n = N, g.step = shared ? 0 : N;
        g.eps = 1e-6f, g.layer_norm = layer, g.add = add;
        api->norm(device, &g);
        finish();
        for (int p = 0; p < ROWS * PARTS; p++) {
            const float *w = weight + p % PARTS * g.step, *c = bias + p % PARTS * g.step;
            if (layer)
                ref.layernorm(expected, x + p * N, w, c, N, g.eps);
            else
                ref.rmsnorm(expected, x + p * N, w, N, g.eps);
            for (int k = 0; k < N; k++) {
                const float e = expected[k] + (add ? before[p * N + k] : 0);
                CHECK(fabsf(y[p * N + k] - e) <= 1e-5f * (1 + fabsf(e)));
            }
        }
    }
    float *x = normals(300);
    float before[300];
    memcpy(before, x, sizeof before);
    api->softcap(device, &(struct softcap_args){x, 299, 2.0f});
    finish();
    for (int i = 0; i < 299; i++) CHECK(fabsf(x[i] - 2 * tanhf(before[i] / 2)) <= 1e-6f);
    CHECK(x[299] == before[299]);
    release();
}

/* Two products and a sum of numbers up to 5, each rounded. */
static bool close_to(float a, float b) {
    return fabsf(a - b) <= 50 * 0x1p-23f;
}

static void test_rope(void) {
    enum { ROWS = 5, HEADS = 3, KV = 2, D = 24, ROT = 16, CTX = 64 };
    for (int halves = 0; halves < 2; halves++) {
        float *q = normals(ROWS * HEADS * D), *k = normals(ROWS * KV * D);
        float *v = normals(ROWS * KV * D), *cos = normals(ROWS * ROT / 2);
        float *sin = normals(ROWS * ROT / 2);
        float q0[ROWS * HEADS * D], k0[ROWS * KV * D];
        memcpy(q0, q, sizeof q0), memcpy(k0, k, sizeof k0);
        int32_t *pos = get(4, 0);
        *pos = 62; /* goes round the ring */
        struct rope_args g = {.q = q, .k = k, .v = v, .cos = cos, .sin = sin, .pos0 = pos};
        g.keys = get(2 * KV * CTX * D, 0xff), g.values = get(2 * KV * CTX * D, 0xff);
        g.rows = ROWS, g.n_head = HEADS, g.n_head_kv = KV, g.head_dim = D, g.n_rot = ROT;
        g.n_ctx = CTX, g.halves = halves;
        api->rope(device, &g);
        finish();
        for (int r = 0; r < ROWS; r++) {
            for (int h = 0; h < HEADS; h++)
                ref.rope(q0 + (r * HEADS + h) * D, cos + r * ROT / 2, sin + r * ROT / 2, ROT,
                         halves);
            for (int h = 0; h < KV; h++) {
                float *head = k0 + (r * KV + h) * D;
                ref.rope(head, cos + r * ROT / 2, sin + r * ROT / 2, ROT, halves);
                uint16_t bits[D];
                const int at = (h * CTX + (62 + r) % CTX) * D;
                for (int i = 0; i < D; i++) CHECK(close_to(k[(r * KV + h) * D + i], head[i]));
                ref.f16_from_f32(bits, k + (r * KV + h) * D, D);
                CHECK(memcmp(bits, g.keys + at, sizeof bits) == 0);
                ref.f16_from_f32(bits, v + (r * KV + h) * D, D);
                CHECK(memcmp(bits, g.values + at, sizeof bits) == 0);
            }
        }
        for (int i = 0; i < ROWS * HEADS * D; i++) CHECK(close_to(q[i], q0[i]));
        for (int i = 0; i < KV * CTX * D; i++) { /* nothing else was written */
            const int p = i / D % CTX;
            if (p >= 3 && p < 62) CHECK_EQ(g.keys[i], 0xffff);
        }
    }
    release();
}

/* Without a cache only q and k change; growth multiplies q alone. */
static void test_rope_alone(void) {
    enum { ROWS = 3, HEADS = 2, D = 16 };
    float *q = normals(ROWS * HEADS * D), *k = normals(ROWS * D), *growth = normals(ROWS);
    float q0[ROWS * HEADS * D], k0[ROWS * D];
    memcpy(q0, q, sizeof q0), memcpy(k0, k, sizeof k0);
    struct rope_args g = {.q = q, .k = k, .growth = growth, .rows = ROWS, .n_head = HEADS};
    g.n_head_kv = 1, g.head_dim = D, g.n_ctx = 64;
    api->rope(device, &g);
    finish();
    for (int i = 0; i < ROWS * HEADS * D; i++) CHECK(q[i] == q0[i] * growth[i / (HEADS * D)]);
    CHECK(memcmp(k, k0, sizeof k0) == 0);
    release();
}

/* ---- mixtures of experts ---- */

static void test_route(bool sigmoid, bool biases, bool norm) {
    enum { ROWS = 5, N = 70, EXPERTS = 140, USED = 6 };
    float *x = normals(ROWS * N), *router = normals(EXPERTS * N),
          *share = get(4 * ROWS * USED, 0xff);
    for (int i = 0; i < EXPERTS * N; i++) router[i] *= 0.2f;
    int32_t *chosen = get(4 * ROWS * USED, 0xff);
    memcpy(router + 3 * N, router + 90 * N, 4 * N); /* equal ones: the lower is taken first */
    struct route_args g = {.x = x, .router = router, .chosen = chosen, .share = share};
    g.rows = ROWS, g.n = N, g.n_expert = EXPERTS, g.used = USED;
    g.scale = 1.5f, g.norm = norm, g.sigmoid = sigmoid;
    g.bias = biases ? normals(EXPERTS) : NULL;
    g.choice_bias = biases ? normals(EXPERTS) : NULL;
    api->route(device, &g);
    finish();
    for (int r = 0; r < ROWS; r++) {
        double logit[EXPERTS], rank[EXPERTS], all = 0, sum = 0, expected[USED];
        for (int e = 0; e < EXPERTS; e++) {
            logit[e] = g.bias ? g.bias[e] : 0;
            for (int k = 0; k < N; k++) logit[e] += (double)x[r * N + k] * router[e * N + k];
            all += exp(logit[e]);
        }
        for (int e = 0; e < EXPERTS; e++) {
            rank[e] = sigmoid ? 1 / (1 + exp(-logit[e])) : exp(logit[e]) / all;
            logit[e] = rank[e];
            if (biases) rank[e] += g.choice_bias[e];
        }
        for (int i = 0; i < USED; i++) {
            int best = 0;
            for (int e = 1; e < EXPERTS; e++)
                if (rank[e] > rank[best]) best = e;
            CHECK_EQ(chosen[r * USED + i], best);
            rank[best] = -1e9;
            sum += expected[i] = logit[best];
        }
        for (int i = 0; i < USED; i++) {
            const double e = expected[i] * 1.5 / (norm ? sum : 1);
            CHECK(fabs(share[r * USED + i] - e) <= 1e-5 * e);
        }
    }
    release();
}

/* Rows at their experts give what each expert's own product gives of them. */
static void test_experts(const char *pattern, int rows, int n, int n_out, int shift) {
    enum { EXPERTS = 5, USED = 2 };
    const int k_pad = (n + 63) / 64 * 64, align = rows == 1 ? 1 : 16;
    const int places = rows == 1 ? USED : (rows * USED + EXPERTS * 15 + 15) / 16 * 16;
    char why[160];
    struct input_args in = {.source = INPUT_COPY, .rows = rows, .n = n, .k_pad = k_pad};
    CHECK(amber_pattern_parse(pattern, strlen(pattern), &in.pattern, why, sizeof why));
    in.form = rows == 1 ? FORM_DENSE : frag_form_of(&in.pattern);
    in.shift = shift;
    in.x = normals(rows * n);
    const int64_t a_bytes = (int64_t)frag_a_bytes(in.form, places, k_pad);
    const int64_t e_bytes = (int64_t)frag_meta_bytes(in.form, places, k_pad) + 1;
    in.a = get(a_bytes, 0), in.e = get(e_bytes, FRAG_EMPTY_META & 0xff);
    in.scale = get(4 * rows, 0xff), in.shifted = shift ? get(4 * rows, 0xff) : NULL;
    api->input(device, &in);

    const int64_t b_bytes = (int64_t)frag_b_bytes(n_out, k_pad);
    uint8_t *b = get(EXPERTS * b_bytes, 0);
    for (int64_t i = 0; i < EXPERTS * b_bytes; i++) b[i] = (uint8_t)random_bits();
    float *w_scale = normals(EXPERTS * n_out), *w_sum = normals(EXPERTS * n_out);
    float *bias = normals(EXPERTS * n_out), *share = normals(rows * USED);
    int32_t *chosen = get(4 * rows * USED, 0);
    for (int r = 0; r < rows; r++) { /* expert 3 gets nobody, expert 1 most */
        chosen[2 * r] = 1;
        chosen[2 * r + 1] = r % 3 == 0 ? 0 : r % 3 == 1 ? 2 : 4;
        if (r % 4 == 0) chosen[2 * r] = chosen[2 * r + 1], chosen[2 * r + 1] = 1;
    }
    int32_t *place = get(4 * rows * USED, 0xff), *row_of = get(4 * places, 0x7f);
    int32_t *expert_of = get(4 * places, 0x7f), *begin = get(4 * EXPERTS, 0x7f);
    int32_t *count = get(4 * EXPERTS, 0x7f);
    api->sort(device, &(struct sort_args){chosen, place, row_of, expert_of, begin, count, rows,
                                          USED, EXPERTS, align, places});
    struct gather_args to = {.row_of = row_of, .a = in.a, .e = in.e, .scale = in.scale};
    to.shifted = in.shifted, to.form = in.form, to.k_pad = k_pad, to.places = places;
    to.to_a = get(a_bytes, 0), to.to_e = get(e_bytes, FRAG_EMPTY_META & 0xff);
    to.to_scale = get(4 * places, 0xff), to.to_shifted = get(4 * places, 0xff);
    api->gather(device, &to);
    struct gemm_args g = {.form = in.form, .a = to.to_a, .e = to.to_e, .b = b};
    g.a_scale = to.to_scale, g.w_scale = w_scale, g.w_sum = w_sum, g.bias = bias;
    g.shift = shift ? to.to_shifted : NULL;
    g.y = get(4 * (int64_t)places * n_out, 0xff), g.ldy = n_out, g.n_out = n_out, g.k_pad = k_pad;
    g.n_expert = EXPERTS;
    if (rows == 1)
        g.rows = USED, g.expert_of = expert_of;
    else
        g.rows = rows, g.usual_rows = rows * USED / EXPERTS, g.begin = begin, g.count = count;
    api->gemm(device, &g);
    float *x = normals(rows * n_out), *before = malloc(4 * (size_t)(rows * n_out));
    memcpy(before, x, 4 * (size_t)(rows * n_out));
    api->combine(device, &(struct combine_args){g.y, share, place, x, rows, n_out, USED});
    finish();

    int32_t next[EXPERTS] = {0}, at = 0;
    for (int e = 0; e < EXPERTS; e++) {
        int many = 0;
        for (int i = 0; i < rows * USED; i++) many += chosen[i] == e;
        CHECK_EQ(begin[e], at);
        CHECK_EQ(count[e], many);
        next[e] = at;
        for (int p = at + many; p < at + (many + align - 1) / align * align; p++)
            CHECK_EQ(row_of[p], -1);
        at += (many + align - 1) / align * align;
    }
    for (int p = at; p < places; p++) CHECK_EQ(row_of[p], -1);
    struct gemm_args one = {.form = in.form, .a = in.a, .e = in.e, .a_scale = in.scale};
    one.shift = in.shifted, one.rows = rows, one.n_out = n_out, one.k_pad = k_pad;
    float *y[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        one.b = b + e * b_bytes, one.w_scale = w_scale + e * n_out, one.w_sum = w_sum + e * n_out;
        one.bias = bias + e * n_out;
        one.y = y[e] = get(4 * (int64_t)rows * n_out, 0xff), one.ldy = n_out;
        api->gemm(device, &one);
    }
    finish();
    for (int i = 0; i < rows * USED; i++) {
        const int e = chosen[i], r = i / USED;
        CHECK_EQ(place[i], next[e]);
        CHECK_EQ(row_of[next[e]], r);
        CHECK_EQ(expert_of[next[e]], e);
        CHECK(!memcmp(g.y + (int64_t)next[e]++ * n_out, y[e] + r * n_out, 4 * (size_t)n_out));
    }
    for (int r = 0; r < rows; r++) {
        const int first = chosen[2 * r] < chosen[2 * r + 1] ? 2 * r : 2 * r + 1;
        const int second = 4 * r + 1 - first;
        for (int k = 0; k < n_out; k++) {
            float v = before[r * n_out + k];
            v = v + share[first] * y[chosen[first]][r * n_out + k];
            v = v + share[second] * y[chosen[second]][r * n_out + k];
            CHECK(x[r * n_out + k] == v);
        }
    }
    free(before);
    release();
}

static void test_gated(void) {
    enum { ROWS = 3, N = 300 };
    float *in = normals(ROWS * N), *out = normals(ROWS * N), *router = normals(N);
    float *x = normals(ROWS * N), before[ROWS * N];
    for (int i = 0; i < N; i++) router[i] *= 0.1f;
    memcpy(before, x, sizeof before);
    api->gated(device, &(struct gated_args){in, out, router, x, ROWS, N});
    finish();
    for (int r = 0; r < ROWS; r++) {
        double dot = 0;
        for (int k = 0; k < N; k++) dot += (double)in[r * N + k] * router[k];
        for (int k = r * N; k < (r + 1) * N; k++)
            CHECK(fabs(x[k] - before[k] - out[k] / (1 + exp(-dot))) <= 1e-6);
    }
    release();
}

static void test_mixtures(bool many) {
    for (int i = 0; i < 8; i++) test_route(i & 1, i & 2, i & 4);
    test_experts("dense", 1, 100, 21, 0);
    test_experts("8:16", 1, 100, 21, INPUT_MEAN);
    test_experts("dense", 40, 100, 21, 0);
    test_experts("2:4", 40, 100, 130, INPUT_MEAN);
    test_experts("2:4+r16", 70, 300, 9, 0);
    test_experts("2:4+r32", 33, 600, 9, 0);
    test_experts("8:16x", 33, 300, 9, INPUT_MEDIAN);
    for (int rows = 2; rows < 70 && many; rows++) test_experts("2:4+r16", rows, 448, 136, 0);
    test_gated();
}

/* ---- attention ---- */

static void test_attention(int rows, int heads, int kv, int d, int n_ctx, int pos0, int window,
                           float softcap, bool sinks) {
    float *q = normals(rows * heads * d), *out = get(4 * (int64_t)rows * heads * d, 0xff);
    uint16_t *k = get(2 * (int64_t)kv * n_ctx * d, 0x7e),
             *v = get(2 * (int64_t)kv * n_ctx * d, 0x7e);
    const int last = pos0 + rows - 1, first = last >= n_ctx ? last - n_ctx + 1 : 0;
    for (int h = 0; h < kv; h++) { /* what was never written is NaN */
        for (int p = first; p <= last; p++) {
            float row[512];
            const int at = (h * n_ctx + p % n_ctx) * d;
            for (int i = 0; i < d; i++) row[i] = normal();
            ref.f16_from_f32(k + at, row, d);
            for (int i = 0; i < d; i++) row[i] = normal();
            ref.f16_from_f32(v + at, row, d);
        }
    }
    int32_t *pos = get(4, 0);
    *pos = pos0;
    struct attention_args g = {.q = q, .out = out, .k = k, .v = v, .pos0 = pos, .rows = rows};
    g.n_head = heads, g.n_head_kv = kv, g.head_dim = d, g.n_ctx = n_ctx, g.window = window;
    g.scale = 1 / sqrtf((float)d), g.softcap = softcap;
    g.sink = sinks ? normals(heads) : NULL;
    api->attention(device, &g);
    finish();

    float *expected = get(4 * (int64_t)rows * heads * d, 0);
    struct amber_attention a = {.q = q, .out = expected, .k = k, .v = v, .rows = rows};
    a.n_head = heads, a.n_head_kv = kv, a.head_dim = d, a.n_ctx = n_ctx, a.pos0 = pos0;
    a.window = window, a.scale = g.scale, a.softcap = softcap, a.sink = g.sink;
    void *scratch = aligned_alloc(64, (ref.attention_scratch + 127) / 64 * 64);
    ref.attention(&a, 0, ref.attention_units(&a), scratch);
    free(scratch);
    /* Two float16 hold 21 bits of q and of the weights; what is below 2^-24 is lost. */
    double worst = 0;
    for (int i = 0; i < rows * heads * d; i++) worst = fmax(worst, fabs(out[i] - expected[i]));
    CHECK(worst < 1e-5);
    for (int i = 0; i < rows * heads * d; i++) CHECK(!isnan(out[i]));
    release();
}

static void test_attentions(bool many) {
    test_attention(1, 4, 2, 32, 600, 520, 0, 0, false);   /* stretches, the last one short */
    test_attention(1, 2, 2, 40, 128, 0, 0, 0, false);     /* one position */
    test_attention(3, 4, 1, 80, 320, 700, 100, 5, false); /* a ring, a window, a cap */
    test_attention(6, 2, 1, 512, 64, 3, 0, 0, false);     /* wide heads */
    test_attention(20, 4, 2, 32, 256, 0, 0, 0, false);
    test_attention(70, 2, 2, 64, 256, 37, 0, 3, false); /* two blocks of rows */
    test_attention(20, 2, 1, 80, 192, 250, 50, 0, false);
    test_attention(9, 2, 2, 256, 128, 40, 0, 0, false);
    test_attention(1, 4, 2, 32, 600, 300, 0, 0, true);
    test_attention(20, 4, 2, 64, 128, 30, 16, 0, true);
    for (int rows = 1; rows <= 130 && many; rows++)
        test_attention(rows, 4, 2, rows % 3 ? 128 : 64, 640, 7 * rows % 300, rows % 2 * 90, 0,
                       rows % 5 == 0);
    if (many) test_attention(512, 8, 2, 128, 2048, 1500, 0, 0, false);
}

/* ---- graphs ---- */

static void test_graph(void) {
    float *x = api->alloc(device, 16, 0), *host = api->host_alloc(device, 16);
    api->record(device);
    api->upload(device, x, host, 16);
    api->softcap(device, &(struct softcap_args){x, 4, 1.0f});
    api->download(device, host, x, 16);
    struct amber_cuda_graph *g = api->recorded(device);
    CHECK(g != NULL);
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 4; j++) host[j] = (float)(i + j);
        api->replay(device, g);
        finish();
        /* tanhf of another library may differ in the last bits. */
        for (int j = 0; j < 4; j++) CHECK(fabsf(host[j] - tanhf((float)(i + j))) <= 2e-7f);
    }
    api->forget(device, g);
    api->host_free(device, host);
}

int main(int argc, char **argv) {
    char why[512] = "";
    const bool many = argc == 2;
    CHECK(amber_kernels_ref(&ref));
    if (argc > 1) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        api = library ? dlsym(library, AMBER_CUDA_SYMBOL) : NULL;
        if (!api) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
    }
    CHECK_EQ(api->version, AMBER_CUDA_VERSION);
    CHECK(api->count(why, sizeof why) >= 1);
    device = api->open(0, why, sizeof why);
    if (!device) {
        fprintf(stderr, "%s\n", why);
        return 1;
    }
    test_inputs(many);
    test_sources();
    test_norms();
    test_rope();
    test_rope_alone();
    test_mixtures(many);
    test_attentions(many);
    test_graph();
    api->close(device);
    return check_summary();
}
