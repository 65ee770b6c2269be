/* test_sparse.c: patterns as text, the reference selection against its definition, and the vector
 * columns against the reference. test_sparse_masks.py repeats the definition in numpy. */
#include "check.h"
#include "sparse.h"
#include "cpu/cpuid.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

static uint32_t random_state = 1;

static uint32_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}
static float uniform(void) {
    return (float)(random_bits() >> 8) * 0x1p-24f;
}
static float normal(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum - 6;
}
static int popcount(uint32_t x) {
    return __builtin_popcount(x);
}

static struct amber_pattern pattern(const char *text) {
    struct amber_pattern p;
    char why[160] = "";
    if (!CHECK(amber_pattern_parse(text, strlen(text), &p, why, sizeof why)))
        fprintf(stderr, "    %s: %s\n", text, why);
    return p;
}

/* ---- text ---- */

static void test_text(void) {
    static const struct {
        const char *text;
        struct amber_pattern p;
        double kept;
    } good[] = {
        {"dense", {AMBER_PATTERN_DENSE, 0, 0, 0, 0, 0}, 1},
        {"2:4", {AMBER_PATTERN_GROUP, 2, 4, 1, 1, 0}, 0.5},
        {"3:5", {AMBER_PATTERN_GROUP, 3, 5, 1, 1, 0}, 0.6},
        {"1:1", {AMBER_PATTERN_GROUP, 1, 1, 1, 1, 0}, 1},
        {"64:64", {AMBER_PATTERN_GROUP, 64, 64, 1, 1, 0}, 1},
        {"8:16x4", {AMBER_PATTERN_GROUP, 8, 16, 4, 1, 0}, 0.5},
        {"12:16x4t2", {AMBER_PATTERN_GROUP, 12, 16, 4, 2, 0}, 0.75},
        {"64:64x4t2", {AMBER_PATTERN_GROUP, 64, 64, 4, 2, 0}, 1},
        {"8:16x", {AMBER_PATTERN_GROUP, 8, 16, 1, 1, 16}, 0.5},
        {"2:4+r16", {AMBER_PATTERN_RELIEF, 2, 4, 1, 1, 16}, 0.625},
        {"2:4+r32", {AMBER_PATTERN_RELIEF, 2, 4, 1, 1, 32}, 0.5625},
        {"top50%", {AMBER_PATTERN_TOPK, 50, 100, 1, 1, 0}, 0.5},
        {"top100%", {AMBER_PATTERN_TOPK, 100, 100, 1, 1, 0}, 1},
    };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct amber_pattern p = pattern(good[i].text);
        char text[AMBER_PATTERN_TEXT];
        CHECK(memcmp(&p, &good[i].p, sizeof p) == 0);
        CHECK(amber_pattern_kept(&p) == good[i].kept);
        amber_pattern_format(&p, text);
        CHECK(strcmp(text, good[i].text) == 0);
    }

    static const struct {
        const char *text, *expected;
    } bad[] = {
        {"9:8", "expected N:M with 1 <= N <= M <= 64, found \"9:8\""},
        {"0:4", "expected N:M with 1 <= N <= M <= 64, found \"0:4\""},
        {"8:128", "expected N:M with 1 <= N <= M <= 64, found \"8:128\""},
        {"0:0", "1 <= N <= M <= 64"},
        {"65:65", "1 <= N <= M <= 64"},
        {"2:", "1 <= N <= M <= 64"},
        {"2:99999999999999999999", "1 <= N <= M <= 64"},
        {"2:4x3", "expected x4 after N:M (blocks of 4 channels, the only size there is)"},
        {"2:4x8t2", "expected x4 after N:M"},
        {"8:16t2", "expected a block size before t2 (N:Mx4t2)"},
        {"8:16x4t3", "expected t2 after x4"},
        {"8:16x4t", "expected t2 after x4"},
        {"4:8x", "expected 8:16x"},
        {"4:8+r16", "expected 2:4+r16 or 2:4+r32"},
        {"2:4+r8", "expected 2:4+r16 or 2:4+r32"},
        {"2:4+r", "expected 2:4+r16 or 2:4+r32"},
        {"top0%", "expected topP% with 1 <= P <= 100"},
        {"top101%", "expected topP%"},
        {"top50", "expected topP%"},
        {"", "expected N:M (8:16), N:Mx4, N:Mx4t2, 8:16x, 2:4+r16, 2:4+r32, top50% or dense"},
        {"2", "expected N:M (8:16)"},
        {":4", "expected N:M (8:16)"},
        {"-2:4", "expected N:M (8:16)"},
        {"02:4", "expected N:M (8:16)"},
        {"2:4 ", "found \"2:4 \""},
        {"2:4x4t2x", "found \"2:4x4t2x\""},
        {"denser", "found \"denser\""},
        {"2:\n\x80", "found \"2:??\""},
        {"abcdefghijklmnopqrstuvwxyz", "found \"abcdefghijklmnopqrstuvwx...\""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct amber_pattern p;
        char why[160] = "";
        CHECK(!amber_pattern_parse(bad[i].text, strlen(bad[i].text), &p, why, sizeof why));
        CHECK_STR(why, bad[i].expected);
        CHECK(strlen(why) < sizeof why - 1); /* nothing was cut off */
    }

    /* Neither the text nor the explanation goes beyond its size. */
    struct amber_pattern p;
    char tail[] = {'2', ':', '4', 'x'}, why[13];
    memset(why, '#', sizeof why);
    CHECK(amber_pattern_parse(tail, 3, &p, why, sizeof why) && p.m == 4);
    CHECK(!amber_pattern_parse(tail, 4, &p, why, 12));
    CHECK(strlen(why) == 11 && why[12] == '#');
    CHECK(!amber_pattern_parse(tail, 0, &p, why, sizeof why));
}

/* ---- the definition ---- */

/* Prunes one row of at most 4096 channels by the reference and returns how many stay nonzero. */
static int prune(const char *text, float *z, const float *f, int n) {
    static _Alignas(64) char scratch[8 * 4096];
    struct amber_pattern p = pattern(text);
    CHECK(amber_prune_scratch(n) <= sizeof scratch);
    amber_prune_ref(&p, z, n, 1, f, n, scratch);
    int kept = 0;
    for (int i = 0; i < n; i++) kept += z[i] != 0;
    return kept;
}

static void test_ties(void) {
    float z[64], same[64];
    for (int i = 0; i < 64; i++) same[i] = i % 3 ? 5 : -5;
    memcpy(z, same, sizeof z);
    CHECK_EQ(prune("2:4", z, NULL, 64), 32);
    for (int i = 0; i < 64; i++) CHECK(z[i] == (i % 4 < 2 ? same[i] : 0));
    memcpy(z, same, sizeof z);
    CHECK_EQ(prune("5:16x4", z, NULL, 64), 20);
    for (int i = 0; i < 64; i++) CHECK(z[i] == (i < 20 ? same[i] : 0));
    memcpy(z, same, sizeof z);
    CHECK_EQ(prune("top30%", z, NULL, 64), 19);
    for (int i = 0; i < 64; i++) CHECK(z[i] == (i < 19 ? same[i] : 0));
    memcpy(z, same, sizeof z);
    CHECK_EQ(prune("2:4+r16", z, NULL, 64), 40);
    for (int i = 0; i < 64; i++) /* groups 0 and 1 of four are relieved */
        CHECK(z[i] == (i % 4 < (i % 16 < 8 ? 3 : 2) ? same[i] : 0));
    memcpy(z, same, sizeof z);
    CHECK_EQ(prune("2:4+r32", z, NULL, 64), 36);
    for (int i = 0; i < 64; i++) /* groups 0 and 2 of eight */
        CHECK(z[i] == (i % 4 < (i % 32 < 4 || i % 32 / 4 == 2 ? 3 : 2) ? same[i] : 0));

    /* A tie below the largest, and zeros of both signs as equals. */
    float few[8] = {1, 3, 1, 1, -0.0f, 0.0f, 0.0f, 0.0f};
    CHECK_EQ(prune("2:8", few, NULL, 8), 2);
    CHECK(few[0] == 1 && few[1] == 3);
    float zeros[4] = {0.0f, -0.0f, -0.0f, 2};
    prune("2:4", zeros, NULL, 4);
    CHECK(zeros[3] == 2 && !signbit(zeros[0]) && !signbit(zeros[1]) && !signbit(zeros[2]));
    float signs[4] = {-0.0f, 0.0f, -0.0f,
                      -0.0f}; /* kept zeros keep their bits, dropped become +0 */
    prune("1:4", signs, NULL, 4);
    CHECK(signbit(signs[0]) && !signbit(signs[1]) && !signbit(signs[2]) && !signbit(signs[3]));
}

static void test_special_values(void) {
    float a[4] = {INFINITY, NAN, -INFINITY, FLT_MAX}; /* the first of equals: infinity, NaN */
    prune("2:4", a, NULL, 4);
    CHECK(isinf(a[0]) && isnan(a[1]) && a[2] == 0 && a[3] == 0);
    float b[4] = {FLT_MAX, 1, -NAN, 2};
    prune("1:4", b, NULL, 4);
    CHECK(isnan(b[2]) && b[0] == 0 && b[3] == 0);
    float c[4] = {0x1p-149f, 0x1p-148f, -0x1p-147f, 0}; /* subnormals have their order */
    prune("1:4", c, NULL, 4);
    CHECK(c[2] == -0x1p-147f && c[0] == 0 && c[1] == 0);
    /* |z| f overflows: infinite, a tie. */
    float d[2] = {0x1p100f, 0x1p120f}, f[2] = {0x1p100f, 0x1p100f};
    prune("1:2", d, f, 2);
    CHECK(d[0] == 0x1p100f && d[1] == 0);
    /* Squares that vanish tie, those that do not win. */
    float e[12] = {0x1p-80f, 0, 0, 0, 0x1p-76f, 0, 0, 0, 0x1p-74f, 0, 0, 0};
    float g[12];
    memcpy(g, e, sizeof g);
    prune("1:2x4", e, NULL, 8);
    CHECK(e[0] == 0x1p-80f && e[4] == 0);
    prune("1:3x4", g, NULL, 12);
    CHECK(g[0] == 0 && g[4] == 0 && g[8] == 0x1p-74f);
}

static void test_exact_counts(void) {
    /* No zeros among the values, so what is left counts the survivors, whole groups and ragged. */
    for (int m = 1; m <= 64; m++) {
        for (int n = 1; n <= m; n += 1 + m / 7) {
            float z[200], x[200];
            char text[16];
            snprintf(text, sizeof text, "%d:%d", n, m);
            for (int i = 0; i < 200; i++) x[i] = z[i] = (float)(1 + random_bits() % 5);
            prune(text, z, NULL, 200);
            for (int g = 0; g < 200; g += m) {
                int kept = 0, exist = 200 - g < m ? 200 - g : m;
                float smallest = INFINITY, dropped = 0;
                for (int i = g; i < g + exist; i++) {
                    CHECK(z[i] == 0 || z[i] == x[i]);
                    kept += z[i] != 0;
                    if (z[i] != 0)
                        smallest = fminf(smallest, x[i]);
                    else
                        dropped = fmaxf(dropped, x[i]);
                }
                CHECK_EQ(kept, n < exist ? n : exist);
                CHECK(dropped <= smallest);
            }
        }
    }
}

/* Scores far enough apart for their order to survive rounding: (1..m) in random order. */
static void test_scaling(void) {
    static const char *const texts[] = {"2:4",    "8:16",    "16:32",   "12:16x4",
                                        "top30%", "2:4+r16", "2:4+r32", "3:7"};
    for (size_t t = 0; t < sizeof texts / sizeof texts[0]; t++) {
        float x[256], f[256], plain[256], scaled[256], other_f[256];
        for (int i = 0; i < 256; i++) {
            x[i] = (float)(1 + i);
            f[i] = 1;
        }
        for (int i = 255; i > 0; i--) {
            int j = (int)(random_bits() % (unsigned)(i + 1));
            float swap = x[i];
            x[i] = x[j];
            x[j] = swap;
        }
        memcpy(plain, x, sizeof x);
        prune(texts[t], plain, NULL, 256);
        static const float factors[] = {0x1p-20f, 0x1p20f, 3.7f, 1e-6f, 1e6f};
        for (int c = 0; c < 5; c++) {
            for (int i = 0; i < 256; i++) {
                scaled[i] = x[i] * factors[c];
                other_f[i] = f[i] * factors[c];
            }
            prune(texts[t], scaled, NULL, 256); /* per row */
            for (int i = 0; i < 256; i++) CHECK((scaled[i] != 0) == (plain[i] != 0));
            memcpy(scaled, x, sizeof x);
            prune(texts[t], scaled, other_f, 256); /* per matrix */
            CHECK(memcmp(scaled, plain, sizeof plain) == 0);
        }
        memcpy(scaled, x, sizeof x);
        prune(texts[t], scaled, f, 256); /* f of ones is no f */
        CHECK(memcmp(scaled, plain, sizeof plain) == 0);
        /* A power of two changes nothing whatever the values are. */
        for (int i = 0; i < 256; i++) {
            plain[i] = normal();
            scaled[i] = plain[i] * 0x1p-13f;
        }
        prune(texts[t], plain, NULL, 256);
        prune(texts[t], scaled, NULL, 256);
        for (int i = 0; i < 256; i++) CHECK(scaled[i] == plain[i] * 0x1p-13f);
    }
}

/* ---- relief windows ---- */

/* Whether a mask of 16 channels fits 2:4 with `windows` windows, whose members are channels w, 4 +
 * w, 8 + w, 12 + w; every window holds two at most. Tries every way to fill them. */
static bool fits(uint32_t mask, int windows) {
    if (windows == 0) {
        for (int g = 0; g < 4; g++)
            if (popcount(mask >> 4 * g & 15) > 2) return false;
        return true;
    }
    for (uint32_t groups = 0; groups < 16; groups++) {
        if (popcount(groups) > 2) continue;
        uint32_t held = 0;
        for (int g = 0; g < 4; g++)
            if (groups >> g & 1) held |= 1u << (4 * g + windows - 1);
        if ((mask & held) == held && fits(mask & ~held, windows - 1)) return true;
    }
    return false;
}

static void test_windows(void) {
    int masks = 0, plain = 0, one = 0, two = 0;
    for (uint32_t mask = 0; mask < 65536; mask++) {
        if (popcount(mask) != 8) continue;
        masks++;
        plain += fits(mask, 0);
        one += fits(mask, 1);
        two += fits(mask, 2);
    }
    CHECK_EQ(masks, 12870);
    CHECK_EQ(plain, 6 * 6 * 6 * 6); /* two in each of four groups */
    CHECK_EQ(one, 7992);
    CHECK_EQ(two, 12870);
}

static uint32_t mask_of(const float *z, int n) {
    uint32_t mask = 0;
    for (int i = 0; i < n; i++) mask |= (uint32_t)(z[i] != 0) << i;
    return mask;
}

/* Values whose squares, and sums of 32 of them, are exact. */
static void small_values(float *z, int n, int kind) {
    for (int i = 0; i < n; i++) {
        int v = kind == 0 ? 1 + (int)(random_bits() % 4) : 1 + (int)(random_bits() % 1000);
        if (kind == 2 && i % 4 == 0) v *= 4; /* heavy relief members */
        z[i] = (float)(random_bits() & 1 ? v : -v);
    }
}

static void test_relief_16(void) {
    static uint16_t candidates[8008]; /* masks of 10 that fit one window */
    int count = 0;
    for (uint32_t mask = 0; mask < 65536; mask++)
        if (popcount(mask) == 10 && fits(mask, 1)) candidates[count++] = (uint16_t)mask;
    CHECK(count > 1000);
    for (int trial = 0; trial < 300; trial++) {
        float z[16], x[16];
        small_values(x, 16, trial % 3);
        memcpy(z, x, sizeof z);
        CHECK_EQ(prune("2:4+r16", z, NULL, 16), 10);
        CHECK(fits(mask_of(z, 16), 1));
        double kept = 0, best = 0;
        for (int i = 0; i < 16; i++) kept += (double)z[i] * z[i];
        for (int c = 0; c < count; c++) {
            double sum = 0;
            for (int i = 0; i < 16; i++)
                if (candidates[c] >> i & 1) sum += (double)x[i] * x[i];
            if (sum > best) best = sum;
        }
        CHECK(kept == best);
    }
}

/* The most energy of a group of four: any two, and with relief the first as well. */
static double best_of_group(const float *x, bool relief) {
    double best = 0;
    for (uint32_t mask = 0; mask < 16; mask++) {
        if (popcount(relief ? mask & ~1u : mask) > 2) continue;
        double sum = 0;
        for (int i = 0; i < 4; i++)
            if (mask >> i & 1) sum += (double)x[i] * x[i];
        if (sum > best) best = sum;
    }
    return best;
}

static void test_relief_32(void) {
    for (int trial = 0; trial < 300; trial++) {
        float z[32], x[32];
        small_values(x, 32, trial % 3);
        memcpy(z, x, sizeof z);
        CHECK_EQ(prune("2:4+r32", z, NULL, 32), 18);
        double kept = 0, best = 0;
        for (int i = 0; i < 32; i++) kept += (double)z[i] * z[i];
        for (uint32_t members = 0; members < 16; members++) { /* channels 0, 8, 16, 24 */
            if (popcount(members) > 2) continue;
            double sum = 0;
            for (int g = 0; g < 8; g++)
                sum += best_of_group(x + 4 * g, g % 2 == 0 && members >> g / 2 & 1);
            if (sum > best) best = sum;
        }
        CHECK(kept == best);
        int crowded = 0;
        for (int g = 0; g < 8; g++) {
            int in_group = popcount(mask_of(z + 4 * g, 4));
            CHECK(in_group == 2 || (in_group == 3 && g % 2 == 0 && z[4 * g] != 0));
            crowded += in_group == 3;
        }
        CHECK_EQ(crowded, 2);
    }
}

/* ---- the columns ---- */

static void fill(float *z, int n, int kind) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        switch (kind) {
        case 0:
            z[i] = normal();
            break;
        case 1: /* bfloat16 */
            z[i] = normal();
            memcpy(&bits, &z[i], 4);
            bits &= 0xffff0000;
            memcpy(&z[i], &bits, 4);
            break;
        case 2: /* small integers, many zeros of both signs */
            z[i] = (float)(random_bits() % 5) * (random_bits() & 1 ? 0.5f : -0.5f);
            break;
        case 3: /* any bits: NaNs of all kinds, infinities, subnormals */
            bits = random_bits();
            memcpy(&z[i], &bits, 4);
            break;
        case 4: /* special values only */
            bits = random_bits() % 8;
            z[i] = (const float[]){
                INFINITY, -INFINITY, NAN, -NAN, 0.0f, -0.0f, FLT_MAX, -0x1p-149f}[bits];
            break;
        case 5: /* about where squares vanish */
            z[i] = normal() * 0x1p-74f;
            break;
        default:
            z[i] = 3;
        }
    }
}
enum { MIRRORED = 7, KINDS };

/* Neighbouring blocks that equal each other with the rows and the first two channels swapped: exact
 * ties in the order of operations that the contract names, and only there (not with fused
 * multiply-adds, not with other partners in a sum). */
static void mirror(float *z, int64_t ldz, int rows, int n) {
    int first = (int)(random_bits() & 1);
    for (int k = 4 * first; k + 8 <= n; k += 8) {
        for (int row = 0; row < rows; row++) {
            const float *from = z + (rows - 1 - row) * ldz + k;
            float *to = z + row * ldz + k + 4;
            to[0] = from[1];
            to[1] = from[0];
            to[2] = from[2];
            to[3] = from[3];
        }
    }
}

/* rows rows of n at distance ldz, in blocks of their exact size, so that an address checker sees
 * any step beyond; gaps between the rows hold a guard. */
static void compare(amber_prune_fn column, const struct amber_pattern *p, int n, int rows, int gap,
                    int kind, bool has_f) {
    const int64_t ldz = n + gap;
    const size_t size = (size_t)((rows - 1) * ldz + n) * sizeof(float);
    float *ours = malloc(size), *theirs = malloc(size), *f = malloc((size_t)n * sizeof *f);
    void *scratch = aligned_alloc(64, (amber_prune_scratch(n) + 63) / 64 * 64);
    if (!CHECK(ours && theirs && f && scratch)) exit(1);
    memset(theirs, 0x77, size);
    for (int row = 0; row < rows; row++) fill(theirs + row * ldz, n, kind == MIRRORED ? 0 : kind);
    if (kind == MIRRORED) mirror(theirs, ldz, rows, n);
    for (int i = 0; i < n; i++)
        f[i] = kind == MIRRORED ? 1.1f : kind == 2 ? (float)(1 + random_bits() % 2) : 1 + uniform();
    memcpy(ours, theirs, size);
    column(p, ours, ldz, rows, has_f ? f : NULL, n, scratch);
    amber_prune_ref(p, theirs, ldz, rows, has_f ? f : NULL, n, scratch);
    if (!CHECK(memcmp(ours, theirs, size) == 0)) {
        char text[AMBER_PATTERN_TEXT];
        amber_pattern_format(p, text);
        for (int64_t i = 0; i < (int64_t)(size / sizeof(float)); i++) {
            if (memcmp(&ours[i], &theirs[i], 4) == 0) continue;
            fprintf(stderr, "    %s n %d rows %d kind %d f %d: first at %lld\n", text, n, rows,
                    kind, has_f, (long long)i);
            break;
        }
    }
    free(scratch);
    free(f);
    free(theirs);
    free(ours);
}

static void compare_all(amber_prune_fn column) {
    static const int lengths[] = {1,   2,   3,   4,   5,    7,    8,    15,   16,   17,  31,
                                  33,  60,  64,  65,  127,  128,  200,  255,  256,  257, 511,
                                  512, 513, 896, 960, 1000, 1024, 1025, 2048, 2300, 4100};
    static const int groups[] = {1, 2, 3, 4, 8, 12, 16, 32, 64};
    struct amber_pattern p;
    for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++) {
        const int m = groups[g];
        for (int n = 1; n <= m; n += m <= 16 ? 1 : 5) {
            for (int shape = 0; shape < 3; shape++) {
                p = (struct amber_pattern){AMBER_PATTERN_GROUP, n, m, shape ? 4 : 1,
                                           shape == 2 ? 2 : 1,  0};
                for (int kind = 0; kind < KINDS; kind++) {
                    /* All lengths where the column is its own, a sample elsewhere. */
                    for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
                        if (random_bits() % (m == 16 && n == 8 ? 1 : 8) != 0) continue;
                        int rows = shape == 2 ? 1 + (int)(random_bits() % 4 != 0) : 1;
                        compare(column, &p, lengths[l], rows, (int)(random_bits() % 3), kind,
                                random_bits() & 1);
                    }
                }
            }
        }
    }
    static const char *const others[] = {"dense", "top50%", "2:4+r16", "2:4+r32", "8:16x"};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        p = pattern(others[i]);
        for (int kind = 0; kind < KINDS; kind++) compare(column, &p, 200, 1, 0, kind, kind & 1);
    }
    /* 8:16x masks as 8:16 does. */
    float a[500], b[500];
    fill(a, 500, 0);
    memcpy(b, a, sizeof a);
    p = pattern("8:16x");
    column(&p, a, 500, 1, NULL, 500, NULL);
    p = pattern("8:16");
    column(&p, b, 500, 1, NULL, 500, NULL);
    CHECK(memcmp(a, b, sizeof a) == 0);
    /* No channels: nothing happens. */
    p = pattern("8:16x4t2");
    column(&p, a, 500, 2, NULL, 0, NULL);
    CHECK(memcmp(a, b, sizeof a) == 0);
}

int main(void) {
    test_text();
    test_ties();
    test_special_values();
    test_exact_counts();
    test_scaling();
    test_windows();
    test_relief_16();
    test_relief_32();
    compare_all(amber_prune_ref);
#if defined(__x86_64__)
    struct amber_cpu cpu = amber_cpu_detect();
    if (cpu.avx2) compare_all(amber_prune_avx2);
    if (cpu.avx512vnni) compare_all(amber_prune_avx512vnni);
#endif
    return check_summary();
}
