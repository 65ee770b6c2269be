/* tool_cuda_bench.c: how fast the kernels and whole models run on the first GPU that can be used. One
 * JSON object per line on stdout, errors among them.
 *
 *     tool_cuda_bench [--quick] gemm [FORM ROWS OUTPUTS INPUTS]
 *     tool_cuda_bench [--quick] input | attention
 *     tool_cuda_bench [--quick] model FILE DEVICE SPARSE
 *
 * Steps are recorded as a graph of several launches over rotating buffers, so that neither the host nor
 * what a cache still holds is measured; printed are the median and the best time of one launch. */
#include "cuda.h"
#include "cuda/layout.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REPEATS = 9, COPIES = 3 };

static struct cuda *gpu;
static const struct amber_cuda_api *api;
static bool quick;

static const char *const form_names[N_FORMS] = {"dense", "2:4", "2:4+r32", "2:4+r16", "8:16x"};

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return x[n / 2];
}

/* ---- memory ---- */

static void *held[64];
static int n_held;
static uint8_t *noise; /* INT8 values as rows have them after quantizing */
enum { NOISE = 1 << 22 };

static uint32_t random_state = 3;
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

static void *take(int64_t bytes, int fill) {
    void *p = api->alloc(gpu->device, bytes, fill);
    if (p && n_held < 64) held[n_held++] = p;
    return p;
}
static void release(void) {
    for (int i = 0; i < n_held; i++) api->free(gpu->device, held[i]);
    n_held = 0;
}
/* Device memory with the same kind of bytes over and over. */
static void *take_filled(int64_t bytes, const void *from, int64_t length) {
    uint8_t *p = take(bytes, 0);
    for (int64_t at = 0; p && at < bytes; at += length)
        api->upload(gpu->device, p + at, from, bytes - at < length ? bytes - at : length);
    return p;
}
static void *take_values(int64_t bytes) {
    return take_filled(bytes, noise, quick ? 1 << 12 : NOISE);
}
static float *take_floats(int64_t n) {
    static float *values;
    enum { N = 1 << 20 };
    if (!values) {
        values = api->host_alloc(gpu->device, 4 * N);
        for (int i = 0; values && i < N; i++) values[i] = normal();
    }
    return values ? take_filled(4 * n, values, 4 * N) : NULL;
}
static void *take_metadata(int64_t bytes) {
    static uint8_t *pairs;
    static const uint8_t legal[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
    enum { N = 1 << 16 };
    if (!pairs) {
        pairs = api->host_alloc(gpu->device, N);
        for (int i = 0; pairs && i < N; i++)
            pairs[i] = (uint8_t)(legal[random_bits() % 6] | legal[random_bits() % 6] << 4);
    }
    return pairs ? take_filled(bytes, pairs, N) : NULL;
}

/* ---- time ---- */

typedef void (*step_fn)(const void *args, int copy);

struct timing {
    double median, best; /* seconds of one step; 0: it failed, see why */
    char why[200];
};

static bool wait(struct timing *t) {
    return api->finish(gpu->device, t->why, sizeof t->why);
}

static struct timing time_steps(step_fn step, const void *args, int count) {
    struct timing t = {0, 0, ""};
    const int repeats = quick ? 2 : MAX_REPEATS;
    double seconds[MAX_REPEATS];
    step(args, 0); /* kernels are loaded, and working areas made, outside the recording */
    if (!wait(&t)) return t;
    api->record(gpu->device);
    for (int i = 0; i < count; i++) step(args, i % COPIES);
    struct amber_cuda_graph *graph = api->recorded(gpu->device);
    if (!graph) {
        wait(&t);
        return t;
    }
    for (int i = -1; i < repeats; i++) { /* the first warms up */
        const double start = amber_seconds();
        api->replay(gpu->device, graph);
        if (!wait(&t)) break;
        if (i >= 0) seconds[i] = (amber_seconds() - start) / count;
    }
    api->forget(gpu->device, graph);
    if (t.why[0]) return t;
    t.median = median(seconds, repeats);
    t.best = seconds[0];
    return t;
}

static int steps_for(double operations) {
    return quick ? 2 : operations < 3e10 ? 20 : operations < 3e11 ? 6 : 3;
}

static void tell_time(const struct timing *t) {
    if (t->median > 0)
        printf("\"us\": %.5g, \"us_best\": %.5g", t->median * 1e6, t->best * 1e6);
    else
        printf("\"error\": \"%s\"", t->why[0] ? t->why : "no GPU memory");
}

/* ---- products ---- */

static void step_gemm(const void *args, int copy) {
    api->gemm(gpu->device, (const struct gemm_args *)args + copy);
}

static void bench_gemm(const char *model, int form, int rows, int n_out, int n_in) {
    struct gemm_args g[COPIES] = {{.form = form}};
    const int k_pad = (int)amber_round_up(n_in, FRAG_BLOCK);
    const int64_t e_bytes = (int64_t)frag_meta_bytes(form, rows, k_pad);
    bool room = true;
    for (int i = 0; i < COPIES && room; i++) {
        g[i].form = form;
        g[i].a = take_values((int64_t)frag_a_bytes(form, rows, k_pad));
        g[i].e = e_bytes ? take_metadata(e_bytes) : NULL;
        g[i].b = take_values((int64_t)frag_b_bytes(n_out, k_pad));
        g[i].a_scale = take_floats(rows);
        g[i].w_scale = take_floats(n_out);
        g[i].y = take(4 * (int64_t)rows * n_out, 0);
        g[i].ldy = n_out;
        g[i].rows = rows;
        g[i].n_out = n_out;
        g[i].k_pad = k_pad;
        room = g[i].a && (g[i].e || !e_bytes) && g[i].b && g[i].a_scale && g[i].w_scale && g[i].y;
    }
    const double operations = 2.0 * rows * n_out * n_in;
    struct timing t = {0, 0, ""};
    if (room) t = time_steps(step_gemm, g, steps_for(operations));
    printf(
        "{\"bench\": \"gemm\", \"model\": \"%s\", \"form\": \"%s\", \"rows\": %d, \"outputs\": %d, "
        "\"inputs\": %d, ",
        model, form_names[form], rows, n_out, n_in);
    tell_time(&t);
    if (t.median > 0) {
        const double read = (double)n_out * k_pad; /* weights alone: what a decode step waits for */
        printf(", \"tops\": %.4g, \"weight_gb_per_second\": %.4g", operations / t.median * 1e-12,
               read / t.median * 1e-9);
    }
    printf("}\n");
    release();
}

static const struct {
    const char *model;
    int n_out, n_in;
} matrices[] = {
    {"llama-3.1-8b q", 4096, 4096},     {"llama-3.1-8b k", 1024, 4096},
    {"llama-3.1-8b gate", 14336, 4096}, {"llama-3.1-8b down", 4096, 14336},
    {"llama-3.2-1b q", 2048, 2048},     {"llama-3.2-1b k", 512, 2048},
    {"llama-3.2-1b gate", 8192, 2048},  {"llama-3.2-1b down", 2048, 8192},
    {"qwen2.5-7b q", 3584, 3584},       {"qwen2.5-7b k", 512, 3584},
    {"qwen2.5-7b gate", 18944, 3584},   {"qwen2.5-7b down", 3584, 18944},
};
enum { N_MATRICES = sizeof matrices / sizeof matrices[0] };

/* Shapes that matter most come first: a run that is cut short has them. */
static void all_gemms(void) {
    static const int rows[] = {2048, 512, 1, 8192, 1024, 4096, 256, 128, 64, 32, 16};
    if (quick) {
        for (int form = 0; form < N_FORMS; form++) bench_gemm("tiny", form, 33, 24, 512);
        bench_gemm("tiny", FORM_DENSE, 1, 24, 512);
        return;
    }
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++)
        for (int i = 0; i < N_MATRICES; i++)
            for (int form = 0; form < (rows[r] < 32 ? 1 : N_FORMS); form++)
                bench_gemm(matrices[i].model, form, rows[r], matrices[i].n_out, matrices[i].n_in);
}

/* ---- inputs ---- */

static void step_input(const void *args, int copy) {
    api->input(gpu->device, (const struct input_args *)args + copy);
}

static void bench_input(const char *pattern, int source, int rows, int n) {
    struct input_args g[COPIES];
    char why[160];
    bool room = true;
    memset(g, 0, sizeof g);
    for (int i = 0; i < COPIES && room; i++) {
        g[i].source = source;
        g[i].rows = rows;
        g[i].n = n;
        g[i].k_pad = (int)amber_round_up(n, FRAG_BLOCK);
        g[i].eps = 1e-5f;
        if (!amber_pattern_parse(pattern, strlen(pattern), &g[i].pattern, why, sizeof why)) return;
        g[i].form = frag_form_of(&g[i].pattern);
        g[i].x = take_floats((int64_t)rows * n);
        g[i].up = source == INPUT_SILU ? take_floats((int64_t)rows * n) : NULL;
        g[i].weight = take_floats(n);
        g[i].f = g[i].pattern.kind == AMBER_PATTERN_DENSE ? NULL : take_floats(n);
        g[i].a = take((int64_t)frag_a_bytes(g[i].form, rows, g[i].k_pad), 0);
        g[i].e =
            take((int64_t)frag_meta_bytes(g[i].form, rows, g[i].k_pad) + 1, FRAG_EMPTY_META & 0xff);
        g[i].scale = take(4 * (int64_t)rows, 0);
        room = g[i].x && (g[i].up || source != INPUT_SILU) && g[i].weight && g[i].a && g[i].e &&
               g[i].scale;
    }
    struct timing t = {0, 0, ""};
    if (room) t = time_steps(step_input, g, quick ? 2 : 20);
    const double bytes = (double)rows * n * 4 * (source == INPUT_SILU ? 2 : 1) +
                         (double)frag_a_bytes(g[0].form, rows, g[0].k_pad) +
                         (double)frag_meta_bytes(g[0].form, rows, g[0].k_pad);
    printf("{\"bench\": \"input\", \"pattern\": \"%s\", \"source\": \"%s\", \"rows\": %d, "
           "\"inputs\": %d, ",
           pattern,
           source == INPUT_SILU      ? "silu"
           : source == INPUT_RMSNORM ? "rmsnorm"
                                     : "copy",
           rows, n);
    tell_time(&t);
    if (t.median > 0) printf(", \"gb_per_second\": %.4g", bytes / t.median * 1e-9);
    printf("}\n");
    release();
}

static void all_inputs(void) {
    static const char *const patterns[] = {"dense", "2:4",  "2:4+r32", "2:4+r16",
                                           "8:16x", "8:16", "8:16x4t2"};
    static const struct {
        int source, n;
    } shapes[] = {{INPUT_RMSNORM, 4096}, {INPUT_SILU, 14336}, {INPUT_COPY, 4096},
                  {INPUT_RMSNORM, 2048}, {INPUT_SILU, 8192},  {INPUT_RMSNORM, 3584},
                  {INPUT_SILU, 18944}};
    const int n_shapes = quick ? 2 : (int)(sizeof shapes / sizeof shapes[0]);
    for (int s = 0; s < n_shapes; s++)
        for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
            bench_input(patterns[i], shapes[s].source, quick ? 2 : 2048, quick ? 256 : shapes[s].n);
}

/* ---- attention ---- */

static void step_attention(const void *args, int copy) {
    api->attention(gpu->device, (const struct attention_args *)args + copy);
}

static void bench_attention(int rows, int pos0, int heads, int heads_kv, int d) {
    struct attention_args g[COPIES];
    memset(g, 0, sizeof g);
    const int n_ctx = (int)amber_round_up(pos0 + rows, 64);
    bool room = true;
    for (int i = 0; i < COPIES && room; i++) {
        const int32_t at = pos0;
        int32_t *pos = take(4, 0);
        g[i].q = take_floats((int64_t)rows * heads * d);
        g[i].out = take(4 * (int64_t)rows * heads * d, 0);
        g[i].k = take(2 * (int64_t)heads_kv * n_ctx * d, 0x2c);
        g[i].v = take(2 * (int64_t)heads_kv * n_ctx * d, 0x2c);
        room = pos && g[i].q && g[i].out && g[i].k && g[i].v;
        struct timing unused;
        if (room) {
            api->upload(gpu->device, pos, &at, 4);
            room = wait(&unused);
        }
        g[i].pos0 = pos;
        g[i].rows = rows;
        g[i].n_head = heads;
        g[i].n_head_kv = heads_kv;
        g[i].head_dim = d;
        g[i].n_ctx = n_ctx;
        g[i].scale = 1 / sqrtf((float)d);
    }
    struct timing t = {0, 0, ""};
    const double seen = rows * (pos0 + 0.5 * (rows + 1)); /* pairs of positions */
    const double operations = 4.0 * seen * heads * d;
    if (room) t = time_steps(step_attention, g, steps_for(operations));
    printf("{\"bench\": \"attention\", \"rows\": %d, \"position\": %d, \"heads\": %d, "
           "\"heads_kv\": %d, \"head_dim\": %d, ",
           rows, pos0, heads, heads_kv, d);
    tell_time(&t);
    if (t.median > 0)
        printf(", \"tops\": %.4g, \"cache_gb_per_second\": %.4g", operations / t.median * 1e-12,
               4.0 * heads_kv * (pos0 + rows) * d / t.median * 1e-9);
    printf("}\n");
    release();
}

static void all_attentions(void) {
    if (quick) {
        bench_attention(20, 0, 2, 1, 64);
        bench_attention(1, 300, 2, 1, 64);
        return;
    }
    static const int rows[] = {2048, 512, 8192};
    for (int i = 0; i < 3; i++) bench_attention(rows[i], 0, 32, 8, 128);
    for (int i = 0; i < 3; i++) bench_attention(rows[i], 0, 32, 8, 64);
    bench_attention(2048, 0, 16, 8, 256);
    for (int pos = 1023; pos < 40000; pos = 4 * pos + 3) bench_attention(1, pos, 32, 8, 128);
}

/* ---- whole models ---- */

static int failed(const char *what, const amber_error *err) {
    printf("{\"bench\": \"model\", \"what\": \"%s\", \"error\": \"%s\"}\n", what, err->msg);
    return 1;
}

/* Prefill of prompts of several lengths from an empty session, then decoding after a short one. */
static int bench_model(const char *path, const char *device, const char *sparse) {
    static const int lengths[] = {512, 2048, 8192};
    const int decoded = quick ? 4 : 64;
    amber_error err = {.msg = ""};
    amber_engine_options options;
    amber_engine_options_defaults(&options);
    options.device = device;
    options.sparse = sparse;
    amber_engine *engine = NULL;
    if (amber_engine_open(path, &options, &engine, &err) != AMBER_OK) return failed("open", &err);
    amber_engine_info info = {.size = sizeof info};
    amber_engine_get_info(engine, &info);
    amber_session_options wanted;
    amber_session_options_defaults(&wanted);
    wanted.n_ctx = quick ? 64 : lengths[2] + decoded;
    wanted.n_batch = quick ? 32 : 2048;
    if (wanted.n_ctx > info.n_ctx_train) wanted.n_ctx = info.n_ctx_train;
    amber_session *session = NULL;
    int32_t *tokens = calloc((size_t)wanted.n_ctx, sizeof *tokens);
    if (!tokens || amber_session_new(engine, &wanted, &session, &err) != AMBER_OK) {
        amber_engine_close(engine);
        free(tokens);
        return failed("session", &err);
    }
    for (int i = 0; i < wanted.n_ctx; i++)
        tokens[i] = (int32_t)(random_bits() % (uint32_t)info.n_vocab);
    int code = 0;
    for (int i = 0; i < 3 && !code; i++) {
        const int n = quick ? 8 * (i + 1) : lengths[i], repeats = quick ? 1 : 5;
        double seconds[5];
        if (n + decoded > wanted.n_ctx) break;
        for (int r = -1; r < repeats && !code; r++) {
            amber_session_rewind(session, 0, &err);
            const double start = amber_seconds();
            if (amber_session_sync(session, tokens, n, &err) != AMBER_OK)
                code = failed("prefill", &err);
            if (r >= 0) seconds[r] = amber_seconds() - start;
        }
        if (code) break;
        printf(
            "{\"bench\": \"model\", \"device\": \"%s\", \"sparse\": \"%s\", \"what\": \"prefill\", "
            "\"tokens\": %d, \"tokens_per_second\": %.5g}\n",
            info.device, sparse, n, n / median(seconds, repeats));
        fflush(stdout);
    }
    double seconds[3];
    const int repeats = quick ? 1 : 3;
    for (int r = -1; r < repeats && !code; r++) {
        amber_session_rewind(session, 0, &err);
        if (amber_session_sync(session, tokens, 8, &err) != AMBER_OK) code = failed("sync", &err);
        const double start = amber_seconds();
        for (int i = 0; i < decoded && !code; i++)
            if (amber_session_append(session, tokens[8 + i], &err) != AMBER_OK)
                code = failed("decode", &err);
        if (r >= 0) seconds[r] = amber_seconds() - start;
    }
    if (!code) {
        const double rate = decoded / median(seconds, repeats);
        printf(
            "{\"bench\": \"model\", \"device\": \"%s\", \"sparse\": \"%s\", \"what\": \"decode\", "
            "\"tokens\": %d, \"tokens_per_second\": %.5g, \"weight_gb_per_second\": %.4g}\n",
            info.device, sparse, decoded, rate, rate * (double)info.token_bytes * 1e-9);
    }
    amber_session_free(session);
    amber_engine_close(engine);
    free(tokens);
    return code;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    int at = 1;
    if (at < argc && !strcmp(argv[at], "--quick")) quick = true, at++;
    const char *what = at < argc ? argv[at++] : "";
    const int left = argc - at;
    if (!strcmp(what, "model") && left == 3)
        return bench_model(argv[at], argv[at + 1], argv[at + 2]);
    amber_error err = {.msg = ""};
    if (cuda_open("cuda", &gpu, &err) != AMBER_OK) {
        printf("{\"bench\": \"error\", \"error\": \"%s\"}\n", err.msg);
        return 1;
    }
    api = gpu->api;
    noise = api->host_alloc(gpu->device, NOISE);
    for (int i = 0; noise && i < NOISE; i++) noise[i] = (uint8_t)(int8_t)lrintf(normal() * 30);
    int code = 0;
    if (!strcmp(what, "gemm") && left == 0) {
        all_gemms();
    } else if (!strcmp(what, "gemm") && left == 4) {
        int form = 0;
        while (form < N_FORMS - 1 && strcmp(form_names[form], argv[at])) form++;
        bench_gemm("given", form, atoi(argv[at + 1]), atoi(argv[at + 2]), atoi(argv[at + 3]));
    } else if (!strcmp(what, "input") && left == 0) {
        all_inputs();
    } else if (!strcmp(what, "attention") && left == 0) {
        all_attentions();
    } else {
        fprintf(stderr,
                "usage: tool_cuda_bench [--quick] gemm [FORM ROWS OUTPUTS INPUTS] | input | "
                "attention | model FILE DEVICE SPARSE\n");
        code = 2;
    }
    cuda_close(gpu);
    return code;
}
