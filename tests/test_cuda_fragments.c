/* test_cuda_fragments.c: what the CUDA kernels share with the host: the choice of survivors against
 * the CPU's, fragments, metadata, relief windows, and the emulated instructions on whole products. */
#include "check.h"
#include "fragments.h"
#include "kernels.h"
#include "ref/ref.h"

static uint32_t random_state = 7;

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

/* Rows of every kind: ordinary, tied, zero, tiny, huge, bit patterns with NaNs and infinities. */
enum { KINDS = 7 };
static float value(int kind) {
    union {
        uint32_t u;
        float f;
    } bits = {random_bits()};
    switch (kind) {
    case 0:
        return normal();
    case 1:
        return (float)((int)(random_bits() % 5) - 2);
    case 2:
        return random_bits() % 2 ? 0.0f : -0.0f;
    case 3:
        return normal() * 1e-22f;
    case 4:
        return normal() * 1e19f;
    case 5:
        return random_bits() % 2 ? 1.5f : -1.5f;
    default:
        return bits.f;
    }
}

static const char *const patterns[N_FORMS] = {"dense", "2:4", "2:4+r32", "2:4+r16", "8:16x"};

/* ---- instructions ---- */

static void test_dense_instruction(void) {
    uint32_t a[32][4], b[32][2];
    int32_t c[32][4], x[16][32] = {{0}}, y[8][32] = {{0}};
    int32_t (*pc[32])[4];
    const uint32_t *pa[32], *pb[32];
    for (int l = 0; l < 32; l++) {
        pc[l] = &c[l], pa[l] = a[l], pb[l] = b[l];
        for (int i = 0; i < 4; i++) a[l][i] = random_bits(), c[l][i] = (int32_t)random_bits() >> 8;
        for (int i = 0; i < 2; i++) b[l][i] = random_bits();
        /* PTX ISA, m16n8k32: a0..3 (g, 4t), a4..7 (g + 8, 4t), a8..11 (g, 4t + 16), ... */
        for (int i = 0; i < 16; i++)
            x[l / 4 + (i / 4 % 2 ? 8 : 0)][l % 4 * 4 + i % 4 + (i >= 8 ? 16 : 0)] =
                (int8_t)(a[l][i / 4] >> (i % 4 * 8));
        for (int i = 0; i < 8; i++)
            y[l / 4][l % 4 * 4 + i % 4 + (i >= 4 ? 16 : 0)] = (int8_t)(b[l][i / 4] >> (i % 4 * 8));
    }
    int32_t before[32][4];
    memcpy(before, c, sizeof c);
    emulate_mma_s8(pc, pa, pb);
    for (int l = 0; l < 32; l++) {
        for (int i = 0; i < 4; i++) {
            int32_t sum = before[l][i];
            for (int k = 0; k < 32; k++)
                sum += x[l / 4 + (i >= 2 ? 8 : 0)][k] * y[l % 4 * 2 + i % 2][k];
            CHECK_EQ(c[l][i], sum);
        }
    }
}

/* Every nibble in every place of the metadata: the six ordered ones select, the others are refused. */
static void test_nibbles(void) {
    for (int place = 0; place < 16 * 16; place++) {
        const int row = place / 16, slot = place % 16, l = row % 8 * 4 + slot % 8 / 2;
        const int owner = row % 8 * 4 + slot / 8 * 2 + row / 8;
        for (unsigned nibble = 0; nibble < 16; nibble++) {
            uint32_t a[32][4], b[32][4], e[32];
            int32_t c[32][4];
            int32_t (*pc[32])[4];
            const uint32_t *pa[32], *pb[32], *pe[32];
            memset(a, 0, sizeof a), memset(c, 0, sizeof c);
            for (int i = 0; i < 32; i++) {
                pc[i] = &c[i], pa[i] = a[i], pb[i] = b[i], pe[i] = &e[i], e[i] = FRAG_EMPTY_META;
                /* B's column n holds k + 1 at k where n is 0, else 1. */
                for (int j = 0; j < 4; j++)
                    for (int k = 0, at = 16 * j + 4 * (i % 4); k < 4; k++) {
                        if (k == 0) b[i][j] = 0;
                        b[i][j] |= (uint32_t)(i < 4 ? at + k + 1 : 1) << (8 * k);
                    }
            }
            a[l][slot / 8 * 2 + row / 8] = 0x0101u << (slot % 2 * 16);
            const int shift = slot % 8 * 4;
            e[owner] = (e[owner] & ~(15u << shift)) | nibble << shift;
            const unsigned first = nibble & 3, second = nibble >> 2;
            const bool legal = emulate_mma_sp_s8(pc, pa, pb, pe);
            CHECK_EQ(legal, first < second);
            if (!legal) continue;
            const int32_t expected = 4 * slot * 2 + (int)(first + second) + 2;
            CHECK_EQ(c[row % 8 * 4][row / 8 * 2], expected);
            CHECK_EQ(c[row % 8 * 4][row / 8 * 2 + 1], 2);
        }
    }
}

/* ---- the choice ---- */

static void test_choice_is_the_engines(void) {
    struct amber_kernels ref;
    CHECK(amber_kernels_ref(&ref));
    _Alignas(64) static uint8_t scratch[4096];
    for (int form = FORM_24; form < N_FORMS; form++) {
        struct amber_pattern p;
        char why[160];
        CHECK(amber_pattern_parse(patterns[form], strlen(patterns[form]), &p, why, sizeof why));
        for (int round = 0; round < 4000; round++) {
            float z[32], pruned[32], f[32];
            const bool factors = round % 2;
            for (int i = 0; i < 32; i++) {
                z[i] = value(round % KINDS);
                f[i] = 0.25f + (float)(random_bits() % 8) / 4;
            }
            memcpy(pruned, z, sizeof z);
            amber_prune_ref(&p, pruned, 32, 1, factors ? f : NULL, 32, scratch);
            struct choice c;
            choose_32(form, z, factors ? f : NULL, &c);
            const uint32_t kept = choose_kept(form, &c);
            for (int i = 0; i < 32; i++) {
                const float expected = kept >> i & 1 ? z[i] : 0.0f;
                CHECK(memcmp(&expected, &pruned[i], 4) == 0);
            }
            /* Nothing has more than fits: two of each four, two of each window, no channel twice. */
            for (int g = 0; g < 8; g++) CHECK(__builtin_popcount(c.base >> (4 * g) & 15) <= 2);
            for (int i = 0; i < 4; i++) CHECK(__builtin_popcount(c.window[i / 2][i % 2]) <= 2);
            int windows = 0;
            for (int i = 0; i < 4; i++) windows += __builtin_popcount(c.window[i / 2][i % 2]);
            CHECK_EQ(__builtin_popcount(kept), __builtin_popcount(c.base) + windows);
        }
    }
}

static void test_every_8_of_16_fits(void) {
    int masks = 0;
    for (unsigned mask = 0; mask < 65536; mask++) {
        if (__builtin_popcount(mask) != 8) continue;
        masks++;
        unsigned first, second, base = choose_spill(mask, &first, &second), spread = base;
        for (int g = 0; g < 4; g++) {
            spread |= (first >> g & 1) << (4 * g) | (second >> g & 1) << (4 * g + 1);
            CHECK(__builtin_popcount(base >> (4 * g) & 15) <= 2);
        }
        CHECK_EQ(spread, mask);
        CHECK(__builtin_popcount(first) <= 2 && __builtin_popcount(second) <= 2);
        CHECK_EQ(__builtin_popcount(base) + __builtin_popcount(first) + __builtin_popcount(second),
                 8);
    }
    CHECK_EQ(masks, 12870);
}

/* The closed form keeps as much as the best of all choices that fit. */
static void test_relief_is_optimal(void) {
    for (int round = 0; round < 500; round++) {
        float z[32];
        double best = 0, ours = 0;
        for (int i = 0; i < 32; i++) z[i] = i < 16 ? value(round % 2) : 0;
        for (int window = 0; window < 16; window++) { /* members that the window keeps */
            if (__builtin_popcount((unsigned)window) > 2) continue;
            double energy = 0;
            for (int g = 0; g < 4; g++) {
                double e[4], most = 0;
                for (int i = 0; i < 4; i++) e[i] = z[4 * g + i] * z[4 * g + i];
                const int start = window >> g & 1;
                if (start) energy += e[0];
                for (int i = start; i < 4; i++)
                    for (int j = i + 1; j < 4; j++)
                        if (e[i] + e[j] > most) most = e[i] + e[j];
                energy += most;
            }
            if (energy > best) best = energy;
        }
        struct choice c;
        choose_32(FORM_R16, z, NULL, &c);
        const uint32_t kept = choose_kept(FORM_R16, &c);
        for (int i = 0; i < 16; i++) ours += kept >> i & 1 ? z[i] * z[i] : 0;
        CHECK(ours >= best * (1 - 1e-6) && ours <= best * (1 + 1e-6));
    }
}

/* ---- rows ---- */

static void test_quantization_is_the_engines(void) {
    struct amber_kernels ref;
    CHECK(amber_kernels_ref(&ref));
    for (int kind = 0; kind < KINDS; kind++) {
        for (int k = 1; k < 200; k += 33) {
            float z[200], scale;
            int8_t q[256];
            int32_t sum;
            for (int i = 0; i < k; i++) z[i] = value(kind);
            struct fragments f;
            fragments_new(&f, FORM_DENSE, 1, k);
            fragments_put_row(&f, 0, z, NULL);
            ref.quantize_row(q, &scale, &sum, z, k, f.k_pad);
            CHECK(memcmp(q, f.dense, (size_t)f.k_pad) == 0);
            CHECK(scale == f.scale[0] || (scale != scale && f.scale[0] != f.scale[0]));
            for (int i = 0; i < f.k_pad; i++) CHECK(f.dense[i] != -128);
            fragments_free(&f);
        }
    }
}

static void test_whole_products(void) {
    static const int shapes[][3] = {{1, 40, 5},    {16, 64, 8},  {17, 200, 16},
                                    {32, 256, 16}, {5, 640, 11}, {33, 96, 24}};
    for (int form = 0; form < N_FORMS; form++) {
        for (int s = 0; s < 6; s++) {
            const int rows = shapes[s][0], k = shapes[s][1], n_out = shapes[s][2];
            struct fragments f;
            fragments_new(&f, form, rows, k);
            float *z = calloc((size_t)k, sizeof(float)),
                  *factors = calloc((size_t)k, sizeof(float));
            int8_t *w = calloc((size_t)n_out, (size_t)f.k_pad);
            int32_t *acc = calloc((size_t)n_out, (size_t)rows * 4);
            for (int row = 0; row < rows; row++) {
                for (int i = 0; i < k; i++)
                    z[i] = value(row % 3), factors[i] = 1 + (float)(random_bits() % 100) / 50;
                fragments_put_row(&f, row, z, factors);
            }
            for (int i = 0; i < n_out * f.k_pad; i++)
                w[i] = i % f.k_pad < k ? (int8_t)((int)(random_bits() % 255) - 127) : 0;
            uint8_t *b = fragments_of_weights(w, n_out, f.k_pad);
            CHECK(fragments_multiply(&f, b, n_out, acc));
            for (int row = 0; row < rows; row++) {
                for (int n = 0; n < n_out; n++) {
                    int32_t sum = 0;
                    for (int i = 0; i < k; i++)
                        sum += f.dense[row * f.k_pad + i] * w[n * f.k_pad + i];
                    CHECK_EQ(acc[row * n_out + n], sum);
                }
            }
            free(b), free(acc), free(w), free(factors), free(z);
            fragments_free(&f);
        }
    }
}

/* No two elements share a byte, every byte of a whole tile belongs to one. */
static void test_offsets(void) {
    enum { ROWS = 32, K = 512 };
    static uint8_t seen[ROWS * K];
    memset(seen, 0, sizeof seen);
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < K; k++) seen[frag_dense_offset(r, k, K)]++;
    for (int i = 0; i < ROWS * K; i++) CHECK_EQ(seen[i], 1);
    memset(seen, 0, sizeof seen);
    for (int n = 0; n < ROWS; n++)
        for (int k = 0; k < K; k++) seen[frag_b_offset(n, k, K)]++;
    for (int i = 0; i < ROWS * K; i++) CHECK_EQ(seen[i], 1);
    memset(seen, 0, sizeof seen);
    for (int r = 0; r < ROWS; r++)
        for (int block = 0; block < 8; block++)
            for (int slot = 0; slot < 16; slot++) {
                seen[frag_sparse_offset(r, block, slot, 8)]++;
                seen[frag_sparse_offset(r, block, slot, 8) + 1]++;
            }
    for (int i = 0; i < ROWS * K / 2; i++) CHECK_EQ(seen[i], 1);
    memset(seen, 0, sizeof seen);
    for (int r = 0; r < ROWS; r++)
        for (int block = 0; block < 8; block++)
            for (int half = 0; half < 2; half++) seen[frag_meta_offset(r, block, half, 8) / 4]++;
    for (int i = 0; i < ROWS * 8 * 2; i++) CHECK_EQ(seen[i], 1);
    /* The largest accumulator: 127 * 127 * K / 2 in 2:4, 127 * 127 * K dense, below 2^31. */
    CHECK((int64_t)AMBER_MAX_K * 127 * 127 < INT32_MAX);
}

int main(void) {
    test_dense_instruction();
    test_nibbles();
    test_choice_is_the_engines();
    test_every_8_of_16_fits();
    test_relief_is_optimal();
    test_quantization_is_the_engines();
    test_whole_products();
    test_offsets();
    return check_summary();
}
