/* test_sparse_gemm.c: lists of kept quads and the products over them. Lists are held against their
 * definition (sparse_gemm.h), products against an integer oracle of the test's own, bit for bit, and
 * a model that reads lists against the same model without. */
#include "amber.h"
#include "check.h"
#include "cpu/cpuid.h"
#include "kernels.h"
#include "session.h"
#include "tiny_gguf.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t random_state = 88172645463325252u;

static uint32_t random_bits(void) { /* xorshift64* (Marsaglia; Vigna) */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 2685821657736338717u >> 32);
}
static float uniform(void) {
    return (float)((int32_t)random_bits() * 0x1p-31);
}

static struct version {
    const char *isa;
    amber_pack_nm_fn pack;
    amber_gemm_nm_fn gemm;
} versions[4];
static int n_versions;

static void find_versions(void) {
    versions[n_versions++] = (struct version){"ref", amber_pack_nm_ref, amber_gemm_nm_ref};
#if defined(__x86_64__)
    struct amber_cpu cpu = amber_cpu_detect();
    if (cpu.avx2)
        versions[n_versions++] = (struct version){"avx2", amber_pack_nm_avx2, amber_gemm_nm_avx2};
    if (cpu.avxvnni)
        versions[n_versions++] =
            (struct version){"avxvnni", amber_pack_nm_avx2, amber_gemm_nm_avxvnni};
    if (cpu.avx512vnni)
        versions[n_versions++] =
            (struct version){"avx512vnni", amber_pack_nm_avx512vnni, amber_gemm_nm_avx512vnni};
#endif
}

/* ---- buffers that end at a closed page ---- */

static struct buffer {
    uint8_t *base;
    size_t mapped;
} buffers[32];
static int n_buffers;

static void *buffer(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + 63) / 64 * 64;
    const size_t used = (whole + page - 1) / page * page;
    struct buffer *b = &buffers[n_buffers++];
    b->mapped = used + page;
    b->base = mmap(NULL, b->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->base == MAP_FAILED) abort();
    memset(b->base, 0xa5, used);
    mprotect(b->base + used, page, PROT_NONE);
    return b->base + used - whole;
}
static void release(void) {
    while (n_buffers > 0) {
        n_buffers--;
        munmap(buffers[n_buffers].base, buffers[n_buffers].mapped);
    }
}

/* ---- cases ---- */

enum masks { PRIVATE, SHARED, MIXED, FULL };

struct problem {
    struct amber_gemm_w8a8 g;
    struct amber_nm nm;
    int8_t *w; /* [n_out, k_pad] */
    float *before;
    int panels, pairs;
};

static uint32_t random_mask(int keep) {
    uint32_t mask = 0;
    while (__builtin_popcount(mask) < keep) mask |= (uint32_t)1 << random_bits() % 16;
    return mask;
}

/* Rows with at most `keep` quads of 16 that are not zero; some that may be kept are zero. */
static void fill_rows(struct problem *p, enum masks kind) {
    const struct amber_a8 *a = &p->g.a;
    memset(a->q, 0, (size_t)(a->rows * a->stride));
    for (int pair = 0; pair < p->pairs; pair++) {
        int row = amber_nm_row(&p->nm, pair), rows = amber_nm_rows(&p->nm, pair, a->rows);
        for (int k = 0; k < a->k_pad; k += 64) {
            uint32_t mask = random_mask(p->nm.keep);
            bool share = kind == SHARED || (kind == MIXED && random_bits() % 2);
            for (int r = row; r < row + rows; r++) {
                if (!share && r > row) mask = random_mask(p->nm.keep);
                for (int q = 0; q < 16; q++) {
                    if (!(mask >> q & 1) || (kind != FULL && random_bits() % 9 == 0)) continue;
                    int8_t *x = a->q + r * a->stride + k + 4 * q;
                    for (int i = 0; i < 4; i++)
                        x[i] = (int8_t)(kind == FULL ? (r % 2 ? -127 : 127)
                                                     : (int)(random_bits() % 255) - 127);
                }
            }
        }
    }
    for (int r = 0; r < a->rows; r++) {
        a->sum[r] = 0;
        for (int k = 0; k < a->k_pad; k++) a->sum[r] += a->q[r * a->stride + k];
    }
}

static struct problem problem(int rows, int first, int n_out, int k_pad, int keep,
                              enum masks kind) {
    struct problem p = {.panels = (n_out + 15) / 16, .pairs = amber_nm_pairs(rows, first)};
    const int64_t stride = amber_a8_stride(k_pad), ldy = n_out + 3;
    uint8_t *q = buffer((size_t)p.panels * 16 * (size_t)k_pad);
    float *scale = buffer((size_t)p.panels * 64), *bias = buffer((size_t)p.panels * 64);
    float *w_sum = buffer((size_t)p.panels * 64), *shift = buffer((size_t)rows * 4);
    p.w = buffer((size_t)n_out * (size_t)k_pad);
    memset(q, 128, (size_t)p.panels * 16 * (size_t)k_pad);
    for (int o = 0; o < n_out; o++) {
        for (int k = 0; k < k_pad; k++) {
            int v = kind == FULL ? 127 : (int)(random_bits() % 255) - 127;
            p.w[(int64_t)o * k_pad + k] = (int8_t)v;
            q[((size_t)(o / 16) * (size_t)(k_pad / 4) + (size_t)(k / 4)) * 64 + o % 16 * 4 +
              k % 4] = (uint8_t)(v + 128);
        }
    }
    for (int o = 0; o < p.panels * 16; o++) {
        scale[o] = o < n_out ? uniform() * 0.01f : 0;
        bias[o] = o < n_out ? uniform() : 0;
        w_sum[o] = o < n_out ? uniform() : 0;
    }
    p.g = (struct amber_gemm_w8a8){
        .w = {.q = q, .scale = scale, .sum = w_sum, .n_out = n_out, .n_in = k_pad, .k_pad = k_pad},
        .a = {.q = buffer((size_t)(rows * stride)),
              .scale = buffer((size_t)rows * 4),
              .sum = buffer((size_t)rows * 4),
              .rows = rows,
              .k_pad = k_pad,
              .stride = stride},
        .y = buffer((size_t)(rows * ldy) * 4),
        .ldy = ldy,
        .add = random_bits() % 2};
    if (random_bits() % 2) p.g.w.bias = bias;
    if (random_bits() % 3 == 0) p.g.a.shift = shift;
    for (int r = 0; r < rows; r++) {
        p.g.a.scale[r] = uniform() * 0.1f;
        shift[r] = uniform();
    }
    p.before = buffer((size_t)(rows * ldy) * 4);
    for (int64_t i = 0; i < rows * ldy; i++) p.before[i] = uniform();
    p.nm = (struct amber_nm){.stride = amber_nm_stride(k_pad), .keep = keep, .first = first};
    p.nm.lists = buffer((size_t)(p.pairs * p.nm.stride));
    fill_rows(&p, kind);
    return p;
}

static void oracle(const struct problem *p, float *y) {
    const struct amber_gemm_w8a8 *g = &p->g;
    memcpy(y, p->before, (size_t)(g->a.rows * g->ldy) * 4);
    for (int t = 0; t < g->a.rows; t++) {
        for (int o = 0; o < g->w.n_out; o++) {
            int64_t acc = 0;
            for (int k = 0; k < g->a.k_pad; k++)
                acc += (int)p->w[(int64_t)o * g->a.k_pad + k] * g->a.q[t * g->a.stride + k];
            float v = (float)acc * (g->a.scale[t] * g->w.scale[o]);
            if (g->a.shift) v += g->a.shift[t] * g->w.sum[o];
            if (g->w.bias) v += g->w.bias[o];
            float *to = y + t * g->ldy + o;
            *to = g->add ? *to + v : v;
        }
    }
}

/* ---- lists ---- */

/* What one row's list says in a window puts the row together again, with `entries` different quads
 * in all, ascending in each of its two parts. */
static bool list_holds(const int32_t *x, const uint16_t *first, const uint16_t *second, int common,
                       int entries, const int8_t *row, int width) {
    int8_t built[AMBER_NM_WINDOW] = {0};
    uint64_t seen = 0;
    for (int i = 0; i < entries; i++) {
        int o = i < common ? first[i] : second[i];
        if (o % 64 || o / 64 * 4 >= width || seen >> o / 64 & 1) return false;
        if (i > 0 && i != common && o <= (i < common ? first[i - 1] : second[i - 1])) return false;
        seen |= (uint64_t)1 << o / 64;
        memcpy(built + o / 16, &x[i], 4);
    }
    return memcmp(built, row, (size_t)width) == 0;
}

static bool lists_hold(const struct problem *p, enum masks kind) {
    static const int8_t zeros[AMBER_NM_WINDOW];
    const struct amber_a8 *a = &p->g.a;
    for (int pair = 0; pair < p->pairs; pair++) {
        const uint8_t *record = p->nm.lists + pair * p->nm.stride;
        const struct amber_nm_window *w = (const void *)record;
        int row = amber_nm_row(&p->nm, pair), rows = amber_nm_rows(&p->nm, pair, a->rows);
        for (int k = 0, i = 0; k < a->k_pad; k += AMBER_NM_WINDOW, i++, w++) {
            int width = a->k_pad - k < AMBER_NM_WINDOW ? a->k_pad - k : AMBER_NM_WINDOW;
            int entries = width / 64 * p->nm.keep, common = record[amber_nm_counts(a->k_pad) + i];
            const int8_t *x = a->q + row * a->stride + k;
            if (common > entries || ((kind == SHARED || rows == 1) && common < entries))
                return false;
            if (!list_holds(w->xa, w->oa, w->oa, common, entries, x, width)) return false;
            if (!list_holds(w->xb, w->oa, w->ob, common, entries, rows == 2 ? x + a->stride : zeros,
                            width))
                return false;
        }
    }
    return true;
}

/* Each version's product reads the lists of the next version: they mean the same. */
static void check(int rows, int first, int n_out, int k_pad, int keep, enum masks kind) {
    struct problem p = problem(rows, first, n_out, k_pad, keep, kind);
    const size_t bytes = (size_t)(rows * p.g.ldy) * 4;
    float *want = buffer(bytes);
    oracle(&p, want);
    for (int i = 0; i < n_versions; i++) {
        const struct version *packer = &versions[(i + 1) % n_versions];
        const int cut = (int)(random_bits() % (uint32_t)(p.pairs + 1));
        const int panel = (int)(random_bits() % (uint32_t)(p.panels + 1));
        memset(p.nm.lists, 0xa5, (size_t)(p.pairs * p.nm.stride));
        packer->pack(&p.nm, &p.g.a, cut, p.pairs);
        packer->pack(&p.nm, &p.g.a, 0, cut);
        if (!CHECK(lists_hold(&p, kind)))
            fprintf(stderr, "    %s, rows %d, first %d, k %d, keep %d\n", packer->isa, rows, first,
                    k_pad, keep);
        struct amber_gemm_w8a8 g = p.g;
        g.a.q = NULL;
        memcpy(g.y, p.before, bytes);
        versions[i].gemm(&g, &p.nm, panel, p.panels);
        versions[i].gemm(&g, &p.nm, 0, panel);
        if (!CHECK(memcmp(g.y, want, bytes) == 0))
            fprintf(stderr, "    %s, rows %d, first %d, n_out %d, k %d, keep %d, masks %d\n",
                    versions[i].isa, rows, first, n_out, k_pad, keep, kind);
    }
    release();
}

static void test_products(void) {
    for (int keep = 1; keep <= 16; keep++)
        for (int kind = PRIVATE; kind <= FULL; kind++)
            for (int k = 64; k <= 1024; k += keep == 8 ? 64 : 192)
                check(1 + (int)(random_bits() % 9), (int)(random_bits() % 2),
                      1 + (int)(random_bits() % 200), k, keep, kind);
    for (int n_out = 1; n_out <= 290; n_out += n_out < 40 ? 1 : 13)
        check(5, 1, n_out, 320, 8, MIXED);
    for (int rows = 1; rows <= 20; rows++)
        for (int first = 0; first < 2; first++) check(rows, first, 130, 192, 7, MIXED);
    check(97, 0, 257, 512, 8, PRIVATE); /* several blocks of pairs */
    check(98, 1, 130, 4160, 8, SHARED);
    check(301, 1, 33, 2048, 12, MIXED);
}

/* ---- straight to lists ---- */

/* Rows of several sizes; some zero, tiny, not finite, full of ties. */
static void fill_floats(float *x, int rows, int n) {
    for (int r = 0; r < rows; r++) {
        float *row = x + (int64_t)r * n;
        const int kind = (int)(random_bits() % 8);
        for (int k = 0; k < n; k++) {
            row[k] = uniform() * (random_bits() % 50 ? 1.0f : 30.0f);
            if (kind == 1) row[k] = 0;
            if (kind == 2) row[k] = random_bits() % 2 ? 1.0f : -1.0f;
            if (kind == 3) row[k] *= 1e-38f;
        }
        if (kind == 4) row[random_bits() % (uint32_t)n] = INFINITY;
        if (kind == 5) row[random_bits() % (uint32_t)n] = NAN;
        if (kind == 6) row[n - 1] = 1000;
    }
}

/* list_rows against prune, quantize_row and the dense product of what these make. */
static void check_list_rows(const struct amber_kernels *k, const char *text, int rows, int first,
                            int n, bool weighted) {
    enum { OUTPUTS = 20 };
    struct amber_pattern pattern;
    char why[160];
    CHECK(amber_pattern_parse(text, strlen(text), &pattern, why, sizeof why));
    const int k_pad = (n + 63) / 64 * 64;
    const size_t stride = (size_t)amber_a8_stride(k_pad), y_bytes = sizeof(float) * OUTPUTS;
    float *x = buffer(sizeof *x * (size_t)rows * (size_t)n), *f = NULL;
    float *z = buffer(sizeof *z * 2 * (size_t)n);
    void *scratch = buffer(amber_prune_scratch(n));
    uint8_t *w = buffer(32 * (size_t)k_pad);
    float *scale = buffer(sizeof *scale * 32), *y[2];
    for (int i = 0; i < 2; i++) y[i] = buffer(y_bytes * (size_t)rows);
    struct amber_a8 a[2];
    for (int i = 0; i < 2; i++)
        a[i] = (struct amber_a8){.q = buffer((size_t)rows * stride),
                                 .scale = buffer(sizeof(float) * (size_t)rows),
                                 .sum = buffer(sizeof(int32_t) * (size_t)rows),
                                 .rows = rows,
                                 .k_pad = k_pad,
                                 .stride = (int64_t)stride};
    fill_floats(x, rows, n);
    if (weighted) {
        f = buffer(sizeof *f * (size_t)n);
        for (int i = 0; i < n; i++) f[i] = 1 + fabsf(uniform());
    }
    for (int i = 0; i < 32 * k_pad; i++) w[i] = (uint8_t)(1 + random_bits() % 255);
    for (int i = 0; i < 32; i++) scale[i] = 0.01f;
    const int pairs = amber_nm_pairs(rows, first);
    struct amber_nm nm = {.stride = amber_nm_stride(k_pad), .keep = amber_nm_keep(&pattern)};
    nm.first = first;
    nm.lists = buffer((size_t)(pairs * nm.stride));
    for (int pair = 0; pair < pairs; pair++) {
        const int r0 = amber_nm_row(&nm, pair), count = amber_nm_rows(&nm, pair, rows);
        k->list_rows(&pattern, &nm, &a[0], pair, x + (int64_t)r0 * n, f, n);
        memcpy(z, x + (int64_t)r0 * n, sizeof *z * (size_t)n * (size_t)count);
        for (int i = 0; i < count; i += pattern.tokens)
            amber_prune_ref(&pattern, z + (int64_t)i * n, n,
                            pattern.tokens < count ? pattern.tokens : count, f, n, scratch);
        for (int i = 0; i < count; i++)
            k->quantize_row(a[1].q + (r0 + i) * a[1].stride, &a[1].scale[r0 + i], &a[1].sum[r0 + i],
                            z + (int64_t)i * n, n, k_pad);
    }
    struct amber_gemm_w8a8 g = {
        .w = {.q = w, .scale = scale, .n_out = OUTPUTS, .n_in = n, .k_pad = k_pad},
        .a = a[0],
        .y = y[0],
        .ldy = OUTPUTS};
    k->gemm_nm(&g, &nm, 0, 2);
    g.a = a[1];
    g.y = y[1];
    k->gemm_w8a8(&g, 0, 2);
    const bool same = memcmp(a[0].scale, a[1].scale, sizeof(float) * (size_t)rows) == 0 &&
                      memcmp(a[0].sum, a[1].sum, sizeof(int32_t) * (size_t)rows) == 0;
    if (!CHECK(same) || !CHECK(memcmp(y[0], y[1], y_bytes * (size_t)rows) == 0))
        fprintf(stderr, "    list_rows %s: %s, %d rows of %d, first %d, factors %d\n", k->isa, text,
                rows, n, first, weighted);
    release();
}

static void test_list_rows(void) {
    static const char *const patterns[] = {"8:16x4t2", "8:16x4", "1:16x4t2", "11:16x4", "2:4x4t2",
                                           "1:4x4",    "1:2x4",  "1:2x4t2",  "3:8x4t2", "5:8x4"};
    static const int sizes[] = {1, 4, 60, 64, 68, 100, 192, 256, 257, 1000, 2048, 2052, 4160};
    for (int i = 0; i < n_versions; i++) {
        struct amber_kernels k;
        if (!amber_kernels_select(&k, versions[i].isa) || !k.list_rows) continue;
        for (size_t p = 0; p < sizeof patterns / sizeof patterns[0]; p++)
            for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
                for (int t = 0; t < 4; t++)
                    check_list_rows(&k, patterns[p], 1 + (int)(random_bits() % 12), t % 2, sizes[s],
                                    t / 2);
    }
}

static void test_keep(void) {
    static const struct {
        const char *text;
        int keep;
    } cases[] = {{"8:16x4", 8}, {"12:16x4t2", 12}, {"2:4x4", 8},   {"3:8x4t2", 6},
                 {"1:1x4", 16}, {"1:2x4t2", 8},    {"8:16", 0},    {"8:32x4", 0},
                 {"2:3x4", 0},  {"dense", 0},      {"2:4+r16", 0}, {"top50%", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct amber_pattern p;
        char why[160];
        CHECK(amber_pattern_parse(cases[i].text, strlen(cases[i].text), &p, why, sizeof why));
        CHECK_EQ(amber_nm_keep(&p), cases[i].keep);
    }
}

/* ---- models ---- */

enum { PROMPT = 61 };

/* Logits of every position, with batches that start at even and odd positions. */
static void logits_of(amber_engine *engine, int n_batch, int first, float *out) {
    amber_session_options o;
    amber_session_options_defaults(&o);
    o.n_ctx = 128;
    o.n_batch = n_batch;
    amber_session *s = NULL;
    int32_t prompt[PROMPT];
    for (int i = 0; i < PROMPT; i++) prompt[i] = (i * i + 7 * i + 3) % TINY_VOCAB;
    if (!CHECK(amber_session_new(engine, &o, &s, NULL) == AMBER_OK)) return;
    CHECK_EQ(amber_session_sync(s, prompt, first, NULL), AMBER_OK);
    CHECK_EQ(amber_session_sync(s, prompt, PROMPT, NULL), AMBER_OK);
    memcpy(out, amber_session_logits(s), sizeof(float) * TINY_VOCAB);
    CHECK_EQ(amber_session_score(s, prompt, PROMPT, 0, out + TINY_VOCAB, NULL), AMBER_OK);
    amber_session_free(s);
}

static void check_model(const char *path, const char *isa, const char *sparse, int first_n,
                        int threads) {
    enum { ALL = (PROMPT + 1) * TINY_VOCAB };
    static float with[ALL], without[ALL];
    amber_engine_options o;
    amber_engine_options_defaults(&o);
    o.isa = isa;
    o.sparse = sparse;
    o.sparse_first_n = first_n;
    o.threads = threads;
    amber_engine *engine = NULL;
    amber_error err = {0};
    if (!CHECK(amber_engine_open(path, &o, &engine, &err) == AMBER_OK)) {
        fprintf(stderr, "    %s\n", err.msg);
        return;
    }
    amber_memory memory = {.size = sizeof memory};
    amber_session_stats stats = {.size = sizeof stats};
    amber_session *s = NULL;
    amber_session_options so;
    amber_session_options_defaults(&so);
    so.n_ctx = 100;
    so.n_batch = 50;
    CHECK_EQ(amber_memory_estimate(path, &o, &so, &memory, NULL), AMBER_OK);
    if (CHECK(amber_session_new(engine, &so, &s, NULL) == AMBER_OK)) {
        amber_session_get_stats(s, &stats);
        CHECK_EQ(stats.scratch_bytes, memory.scratch_bytes);
        amber_session_free(s);
    }
    const amber_gemm_nm_fn gemm = engine->kernels.gemm_nm;
    CHECK(gemm != NULL);
    for (int first = 1; first <= 30; first += 7) {
        for (int n_batch = 32; n_batch <= 64; n_batch += 16) {
            engine->kernels.gemm_nm = gemm;
            logits_of(engine, n_batch, first, with);
            engine->kernels.gemm_nm = NULL; /* masks stay, zeros are multiplied */
            logits_of(engine, n_batch, first, without);
            if (!CHECK(memcmp(with, without, sizeof with) == 0))
                fprintf(stderr, "    %s, %s, first_n %d, cut at %d, batch %d\n", isa, sparse,
                        first_n, first, n_batch);
        }
    }
    amber_engine_close(engine);
}

static void test_models(void) {
    static const char *const plans[] = {
        "8:16x4t2@all", "8:16x4@all", "4:16x4t2/amber@q,gate,down; 10:16x4@up,o",
        "8:16x4/norm/var/dpts@all; 8:16@k", "2:4x4t2@all#1; 15:16x4t2@down"};
    char path[64];
    snprintf(path, sizeof path, "/tmp/amber-lists-%d.gguf", (int)getpid());
    if (!CHECK(tiny_write(path, 5) == 0)) return;
    for (int i = 0; i < n_versions; i++) {
        struct amber_kernels k;
        if (!amber_kernels_select(&k, versions[i].isa) || !k.gemm_nm) continue;
        for (int p = 0; p < 5; p++)
            check_model(path, versions[i].isa, plans[p], p % 2 ? 3 : 0, 1 + p % 2);
        check_model(path, versions[i].isa, plans[0], 21, 2);
    }
    remove(path);
}

int main(void) {
    find_versions();
    test_keep();
    test_products();
    test_list_rows();
    test_models();
    return check_summary();
}
