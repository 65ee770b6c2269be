/* tool_gpu_probe.cu: what a GPU's instructions do and how fast they are, before any kernel is trusted
 * to them: register layouts of the tensor-core instructions against mma_emulate.h bit by bit, issue
 * rates without memory, read bandwidth, the cost of a launch. One JSON object per line on stdout.
 *
 *     tool_gpu_probe [--quick]
 *
 * Compiled as plain C++ the same text runs on the emulated GPU; its rates then mean nothing. */
#include "../kernels/cuda/simt.h"
#if defined(__CUDACC__)
#include "../kernels/cuda/mma_emulate.h"
#include "../kernels/cuda/runtime.cuh"
#else
#include "../kernels/cuda/runtime_emulate.h"
#endif

#include <math.h>
#include <time.h>

static runtime device;
static int multiprocessors = 1;
static bool failed;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static void finish(void) {
    char why[200];
    if (runtime_finish(&device, why, sizeof why)) return;
    printf("{\"probe\": \"error\", \"reason\": \"%s\"}\n", why);
    exit(1);
}
static void *device_memory(size_t bytes) {
    void *p = runtime_alloc(&device, bytes);
    if (p) return p;
    printf("{\"probe\": \"error\", \"reason\": \"no GPU memory for %zu bytes\"}\n", bytes);
    exit(1);
}

static uint32_t random_state = 5;
static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

/* ---- layouts ---- */

enum { MMA_S8, MMA_SP_S8, MMA_F16, MATRICES, MATRICES_T, COPY16, LANES, N_LAYOUTS };
static const char *const layout_names[] = {
    "mma.m16n8k32.s8",   "mma.sp.m16n8k64.s8", "mma.m16n8k16.f16", "ldmatrix.x4",
    "ldmatrix.x4.trans", "cp.async.16",        "shfl, dp4a, prmt"};

/* Operands of one warp: words of lane l from 4 l on. */
struct layout_case {
    uint32_t a[128], b[128], e[32], c[128];
};
struct layout_args {
    layout_case *cases;
    int kind;
};

KERNEL(32, 1) void layout_kernel(const layout_args g) {
    SHARED uint4 shared[32];
    const int lane = (int)threadIdx.x;
    layout_case *at = g.cases + blockIdx.x;
    const uint32_t *a = at->a + 4 * lane, *b = at->b + 4 * lane;
    uint32_t *c = at->c + 4 * lane;
    int sum[4] = {(int)c[0], (int)c[1], (int)c[2], (int)c[3]};
    if (g.kind == MMA_S8) mma_s8(sum, a, b);
    if (g.kind == MMA_SP_S8) mma_sp_s8(sum, a, b, at->e[lane]);
    if (g.kind == MMA_F16) {
        float f[4] = {(float)sum[0], (float)sum[1], (float)sum[2], (float)sum[3]};
        mma_f16(f, a, b);
        for (int i = 0; i < 4; i++) sum[i] = (int)f[i];
    }
    if (g.kind == MATRICES || g.kind == MATRICES_T || g.kind == COPY16) {
        const bool exists = g.kind != COPY16 || lane % 3 != 0;
        copy16(&shared[lane], a, exists);
        copy_commit();
        copy_wait<0>();
        sync_block();
        uint32_t out[4];
        const uint16_t *row = (const uint16_t *)(const void *)&shared[lane ^ 5];
        if (g.kind == MATRICES) load_matrices<false>(out, row);
        if (g.kind == MATRICES_T) load_matrices<true>(out, row);
        if (g.kind == COPY16) {
            const uint4 v = load16(&shared[lane ^ 5]);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        }
        for (int i = 0; i < 4; i++) sum[i] = (int)out[i];
    }
    if (g.kind == LANES) {
        sum[0] = shuffle_xor((int)a[0], 9);
        sum[1] = dot4(a[0], a[1], sum[1]);
        sum[2] = (int)permute(a[2], a[3], 0x2715);
        sum[3] = (int)lane_max(a[3]);
    }
    for (int i = 0; i < 4; i++) c[i] = (uint32_t)sum[i];
}

/* The same on the host. */
static void expect(layout_case *at, int kind) {
    const uint32_t *a[32], *b[32], *e[32];
    int32_t (*c[32])[4];
    float f[32][4];
    float (*pf[32])[4];
    uint32_t out[32][4];
    uint32_t (*po[32])[4];
    const void *row[32];
    for (int l = 0; l < 32; l++) {
        a[l] = at->a + 4 * l, b[l] = at->b + 4 * l, e[l] = at->e + l;
        c[l] = (int32_t (*)[4])(void *)(at->c + 4 * l);
        for (int i = 0; i < 4; i++) f[l][i] = (float)(*c[l])[i];
        pf[l] = &f[l], po[l] = &out[l];
        row[l] = at->a + 4 * (l ^ 5);
    }
    if (kind == MMA_S8) emulate_mma_s8(c, a, b);
    if (kind == MMA_SP_S8) emulate_mma_sp_s8(c, a, b, e);
    if (kind == MMA_F16) emulate_mma_f16(pf, a, b);
    if (kind == MATRICES || kind == MATRICES_T) emulate_ldmatrix(po, row, kind == MATRICES_T);
    uint32_t most = 0;
    for (int l = 0; l < 32; l++) most = most > a[l][3] ? most : a[l][3];
    for (int l = 0; l < 32; l++) {
        for (int i = 0; i < 4; i++) {
            if (kind == MMA_F16) (*c[l])[i] = (int32_t)f[l][i];
            if (kind == MATRICES || kind == MATRICES_T) (*c[l])[i] = (int32_t)out[l][i];
            if (kind == COPY16) (*c[l])[i] = (l ^ 5) % 3 != 0 ? (int32_t)a[l ^ 5][i] : 0;
        }
        if (kind != LANES) continue;
        (*c[l])[0] = (int32_t)a[l ^ 9][0];
        for (int i = 0; i < 4; i++)
            (*c[l])[1] += emulate_byte(a[l][0], i) * emulate_byte(a[l][1], i);
        const uint64_t both = (uint64_t)a[l][3] << 32 | a[l][2];
        (*c[l])[2] = (int32_t)((both >> 40 & 0xff) | (both >> 8 & 0xff) << 8 |
                               (both >> 56 & 0xff) << 16 | (both >> 16 & 0xff) << 24);
        (*c[l])[3] = (int32_t)most;
    }
}

/* float16 of a small whole number. */
static uint16_t half_of(int v) {
    return f16_bits_from_f32((float)v);
}

static uint32_t legal_metadata(void) {
    static const uint32_t pairs[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) word = word << 4 | pairs[random_bits() % 6];
    return word;
}

/* Case 0 .. 127: one byte of A set, the rest zero, B random; then all random. */
static void fill(layout_case *at, int kind, int number) {
    memset(at, 0, sizeof *at);
    for (int i = 0; i < 128; i++) {
        if (number >= 128) at->a[i] = random_bits() * 0x9e3779b9u;
        at->b[i] = random_bits() * 0x9e3779b9u;
        at->c[i] = random_bits() % 4096 - 2048;
        if (kind == MMA_F16) { /* small whole numbers: their sums are exact in any order */
            const uint16_t low = half_of((int)(random_bits() % 17) - 8);
            at->b[i] = low | (uint32_t)half_of((int)(random_bits() % 17) - 8) << 16;
            if (number >= 128) at->a[i] = at->b[i] ^ 0x80008000u;
        }
        at->e[i / 4] = legal_metadata();
    }
    if (number < 128) at->a[number] = kind == MMA_F16 ? half_of(3) : 0x7fu << (8 * (number % 4));
}

static void probe_layout(int kind, int count) {
    const size_t bytes = sizeof(layout_case) * (size_t)count;
    layout_case *host = (layout_case *)runtime_host_alloc(&device, bytes);
    layout_case *expected = (layout_case *)malloc(bytes), *on_gpu;
    on_gpu = (layout_case *)device_memory(bytes);
    for (int i = 0; i < count; i++) {
        fill(&host[i], kind, i);
        expected[i] = host[i];
        expect(&expected[i], kind);
    }
    runtime_copy(&device, on_gpu, host, bytes, true);
    const layout_args g = {on_gpu, kind};
    runtime_launch(&device, layout_kernel, dim3((unsigned)count), 32, 0, g);
    runtime_copy(&device, host, on_gpu, bytes, false);
    finish();
    int wrong = 0;
    for (int i = 0; i < count; i++)
        wrong += memcmp(host[i].c, expected[i].c, sizeof host[i].c) != 0;
    printf("{\"probe\": \"layout\", \"what\": \"%s\", \"cases\": %d, \"wrong\": %d}\n",
           layout_names[kind], count, wrong);
    failed |= wrong > 0;
    runtime_free(&device, on_gpu);
    runtime_host_free(&device, host);
    free(expected);
}

/* ---- rates ---- */

struct rate_args {
    uint32_t *out;
    int iterations;
};
enum { RATE_THREADS = 256, RATE_CHAINS = 8 };

template <int KIND> KERNEL(RATE_THREADS, 2) void rate_kernel(const rate_args g) {
    uint32_t a[4], b[4];
    int sum[RATE_CHAINS][4];
    float f[RATE_CHAINS][4];
    for (int i = 0; i < 4; i++) a[i] = b[i] = threadIdx.x * 0x01010101u + (uint32_t)i;
    AMBER_UNROLL
    for (int i = 0; i < RATE_CHAINS * 4; i++) sum[i / 4][i % 4] = 0, f[i / 4][i % 4] = 0;
    for (int n = 0; n < g.iterations; n++) {
        AMBER_UNROLL
        for (int i = 0; i < RATE_CHAINS; i++) {
            if (KIND == MMA_S8) mma_s8(sum[i], a, b);
            if (KIND == MMA_SP_S8) mma_sp_s8(sum[i], a, b, 0x44444444u);
            if (KIND == MMA_F16) mma_f16(f[i], a, b);
            if (KIND == LANES) sum[i][0] = dot4(a[i % 4], b[i % 3], sum[i][0]);
        }
    }
    uint32_t all = 0;
    AMBER_UNROLL
    for (int i = 0; i < RATE_CHAINS * 4; i++)
        all += (uint32_t)sum[i / 4][i % 4] + (uint32_t)f[i / 4][i % 4];
    if (all == 0x12345678u) g.out[0] = all; /* keeps the sums alive */
}

template <int KIND> static void probe_rate(const char *what, double operations, int iterations) {
    const rate_args g = {(uint32_t *)device_memory(4), iterations};
    const unsigned blocks = (unsigned)multiprocessors * 2;
    double best = 1e9;
    for (int i = 0; i < 4; i++) {
        const double start = seconds();
        runtime_launch(&device, rate_kernel<KIND>, dim3(blocks), RATE_THREADS, 0, g);
        finish();
        if (i > 0) best = fmin(best, seconds() - start);
    }
    const double done = operations * RATE_CHAINS * iterations * blocks * (RATE_THREADS / 32);
    printf("{\"probe\": \"rate\", \"what\": \"%s\", \"tops\": %.4g, \"seconds\": %.3g}\n", what,
           done / best * 1e-12, best);
    runtime_free(&device, g.out);
}

/* ---- memory and launches ---- */

struct read_args {
    const unsigned char *from;
    uint32_t *out;
    int64_t bytes;
};
enum { READ_THREADS = 256 };

KERNEL(READ_THREADS, 1) void read_kernel(const read_args g) {
    uint32_t all = 0;
    const int64_t step = (int64_t)gridDim.x * READ_THREADS * 16;
    AMBER_UNROLL_BY(8)
    for (int64_t at = ((int64_t)blockIdx.x * READ_THREADS + threadIdx.x) * 16; at < g.bytes;
         at += step) {
        const uint4 v = load16(g.from + at);
        all ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (all == 0x12345678u) g.out[0] = all;
}

static void probe_read(int64_t bytes) {
    unsigned char *from = (unsigned char *)device_memory((size_t)bytes);
    const read_args g = {from, (uint32_t *)device_memory(4), bytes};
    runtime_fill(&device, from, 3, (size_t)bytes);
    double best = 1e9;
    for (int i = 0; i < 6; i++) {
        finish();
        const double start = seconds();
        runtime_launch(&device, read_kernel, dim3((unsigned)multiprocessors * 8), READ_THREADS, 0,
                       g);
        finish();
        best = fmin(best, seconds() - start);
    }
    printf("{\"probe\": \"read\", \"bytes\": %lld, \"gb_per_second\": %.4g}\n", (long long)bytes,
           (double)bytes / best * 1e-9);
    runtime_free(&device, from);
    runtime_free(&device, g.out);
}

/* Kernels that do nothing, launched one by one and as a recorded graph. */
static void probe_launch(int count) {
    const rate_args g = {(uint32_t *)device_memory(4), 0};
    double single = 1e9, recorded = 1e9;
    for (int i = 0; i < 4; i++) {
        const double start = seconds();
        for (int n = 0; n < count; n++)
            runtime_launch(&device, rate_kernel<LANES>, dim3(1), RATE_THREADS, 0, g);
        finish();
        single = fmin(single, seconds() - start);
    }
    runtime_record(&device);
    for (int n = 0; n < count; n++)
        runtime_launch(&device, rate_kernel<LANES>, dim3(1), RATE_THREADS, 0, g);
    amber_cuda_graph *graph = runtime_recorded(&device);
    finish();
    for (int i = 0; i < 4 && graph; i++) {
        const double start = seconds();
        runtime_replay(&device, graph);
        finish();
        recorded = fmin(recorded, seconds() - start);
    }
    printf("{\"probe\": \"launch\", \"us_single\": %.3g, \"us_in_graph\": %.3g}\n",
           single / count * 1e6, recorded / count * 1e6);
    if (graph) runtime_forget(graph);
    runtime_free(&device, g.out);
}

int main(int argc, char **argv) {
    const bool quick = argc > 1 && !strcmp(argv[1], "--quick");
    char why[200] = "";
    struct amber_cuda_info info;
    memset(&info, 0, sizeof info);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (runtime_count(why, sizeof why) == 0 || !runtime_describe(0, &info, why, sizeof why) ||
        !runtime_open(&device, 0, why, sizeof why)) {
        printf("{\"probe\": \"error\", \"reason\": \"%s\"}\n", why);
        return 1;
    }
#if defined(__CUDACC__)
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
#endif
    printf("{\"probe\": \"device\", \"name\": \"%s\", \"capability\": \"%d.%d\", "
           "\"multiprocessors\": %d, \"bytes\": %lld}\n",
           info.name, info.major, info.minor, multiprocessors, (long long)info.total_bytes);
    for (int kind = 0; kind < N_LAYOUTS; kind++) probe_layout(kind, quick ? 200 : 4096);
    const int iterations = quick ? 2 : 20000;
    probe_rate<MMA_S8>("IMMA.16832", 2.0 * 16 * 8 * 32, iterations);
    probe_rate<MMA_SP_S8>("IMMA.SP.16864, of the dense product", 2.0 * 16 * 8 * 64, iterations);
    probe_rate<MMA_F16>("HMMA.16816.F32", 2.0 * 16 * 8 * 16, iterations);
    probe_rate<LANES>("IDP.4A", 2.0 * 4 * 32, iterations);
    probe_read(quick ? 1 << 16 : (int64_t)1 << 30);
    probe_launch(quick ? 3 : 500);
    runtime_close(&device);
    return failed;
}
