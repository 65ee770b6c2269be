/* fragments.h: whole rows to fragments and the products of whole buffers, on the CPU, from the
 * functions that the CUDA kernels use. For test_cuda_fragments.c and tool_fragments.c. */
#ifndef AMBER_TEST_FRAGMENTS_H
#define AMBER_TEST_FRAGMENTS_H

#include "cuda/choose.h"
#include "cuda/mma_emulate.h"

#include <stdlib.h>

/* The INT8 input of a product: rows of k channels in a form. */
struct fragments {
    int form, rows, k, k_pad, blocks;
    uint8_t *a, *e;
    float *scale;   /* [rows] */
    uint32_t *kept; /* [rows][channels / 32] bit per channel */
    int8_t *dense;  /* [rows][k_pad] the same numbers as a plain matrix */
    size_t a_bytes, e_bytes;
};

static inline void fragments_free(struct fragments *f) {
    free(f->a);
    free(f->e);
    free(f->scale);
    free(f->kept);
    free(f->dense);
}

static inline void fragments_new(struct fragments *f, int form, int rows, int k) {
    const int k_pad = (k + FRAG_BLOCK - 1) / FRAG_BLOCK * FRAG_BLOCK;
    *f = (struct fragments){form, rows, k, k_pad, frag_blocks(form, k_pad), 0, 0, 0, 0, 0, 0, 0};
    f->a_bytes = frag_a_bytes(form, rows, k_pad);
    f->e_bytes = frag_meta_bytes(form, rows, k_pad);
    f->a = calloc(f->a_bytes + 1, 1);
    f->e = malloc(f->e_bytes + 1);
    f->scale = calloc((size_t)rows + 1, sizeof(float));
    f->kept = calloc((size_t)rows * (size_t)frag_channels(form, k_pad) / 32 + 1, 4);
    f->dense = calloc((size_t)rows * (size_t)k_pad + 1, 1);
    if (!f->a || !f->e || !f->scale || !f->kept || !f->dense) abort();
    memset(f->e, FRAG_EMPTY_META & 0xff, f->e_bytes);
}

static inline void fragments_put_meta(struct fragments *f, int row, int block, int slot,
                                      uint32_t nibble) {
    uint8_t *at = f->e + frag_meta_offset(row, block, slot / 8, f->blocks) + slot % 8 / 2;
    const int shift = slot % 2 * 4;
    *at = (uint8_t)((*at & ~(15 << shift)) | (int)nibble << shift);
}

static inline void fragments_put_window(struct fragments *f, int row, int block, int slot,
                                        unsigned bits, const uint32_t *q, int step, int byte) {
    uint32_t nibble;
    const uint32_t two = pack_window(bits, q, step, byte, &nibble);
    uint8_t *at = f->a + frag_sparse_offset(row, block, slot, f->blocks);
    at[0] = (uint8_t)two;
    at[1] = (uint8_t)(two >> 8);
    fragments_put_meta(f, row, block, slot, nibble);
}

static inline void fragments_put_32(struct fragments *f, int row, int k0, const struct choice *c,
                                    const uint32_t *q) {
    const int block = frag_block_of(f->form, k0 / FRAG_BLOCK);
    struct packed32 packed;
    pack_32(c, q, k0 / 32 % 2, &packed);
    for (int i = 0; i < 4; i++) {
        const int slot = frag_slot(k0 + 4 * i);
        memcpy(f->a + frag_sparse_offset(row, block, slot, f->blocks), &packed.word[i], 4);
        fragments_put_meta(f, row, block, slot, packed.meta[slot / 8] >> (slot % 8 * 4) & 15);
        fragments_put_meta(f, row, block, slot + 1,
                           packed.meta[slot / 8] >> (slot % 8 * 4 + 4) & 15);
    }
    for (int which = 0; which < frag_relief(f->form); which++) {
        const int at = frag_relief_block(f->form, k0 / FRAG_BLOCK, which);
        const int slot = frag_window_slot(f->form, k0);
        if (f->form == FORM_R32) {
            fragments_put_window(f, row, at, slot, c->window[0][0], q, 2, 0);
            continue;
        }
        fragments_put_window(f, row, at, slot, c->window[which][0], q, 1, which);
        fragments_put_window(f, row, at, slot + 1, c->window[which][1], q + 4, 1, which);
    }
}

/* One row z [k] with channel factors (or NULL): chosen, quantized after pruning, packed. */
static inline void fragments_put_row(struct fragments *f, int row, const float *z,
                                     const float *factors) {
    const int channels = frag_channels(f->form, f->k_pad);
    float *padded = calloc((size_t)channels, sizeof(float));
    float *weights = calloc((size_t)channels, sizeof(float));
    struct choice *choices = calloc((size_t)channels / 32, sizeof *choices);
    if (!padded || !weights || !choices) abort();
    memcpy(padded, z, sizeof(float) * (size_t)f->k);
    if (factors) memcpy(weights, factors, sizeof(float) * (size_t)f->k);

    uint32_t largest = 0, *kept = f->kept + (size_t)row * (size_t)(channels / 32);
    for (int k0 = 0; k0 < channels; k0 += 32) {
        struct choice *c = &choices[k0 / 32];
        if (f->form != FORM_DENSE) choose_32(f->form, padded + k0, factors ? weights + k0 : 0, c);
        kept[k0 / 32] = f->form == FORM_DENSE ? UINT32_MAX : choose_kept(f->form, c);
        for (int i = 0; i < 32; i++) {
            const uint32_t bits = quantize_bits(padded[k0 + i]);
            if (kept[k0 / 32] >> i & 1 && bits > largest) largest = bits;
        }
    }
    float factor;
    f->scale[row] = quantize_scale(largest, &factor);
    for (int k0 = 0; k0 < channels; k0 += 32) {
        uint32_t q[8] = {0};
        for (int i = 0; i < 32; i++) {
            const uint32_t byte = quantize_byte(padded[k0 + i], factor);
            q[i / 4] |= byte << (8 * (i % 4));
            if (k0 + i >= f->k_pad) continue;
            if (kept[k0 / 32] >> i & 1)
                f->dense[(size_t)row * (size_t)f->k_pad + (size_t)(k0 + i)] = (int8_t)byte;
            if (f->form == FORM_DENSE)
                f->a[frag_dense_offset(row, k0 + i, f->k_pad)] = (uint8_t)byte;
        }
        if (f->form != FORM_DENSE) fragments_put_32(f, row, k0, &choices[k0 / 32], q);
    }
    free(choices);
    free(weights);
    free(padded);
}

/* Weights w [n_out][k_pad] as B fragments; to be freed. */
static inline uint8_t *fragments_of_weights(const int8_t *w, int n_out, int k_pad) {
    uint8_t *b = calloc(frag_b_bytes(n_out, k_pad) + 1, 1);
    if (!b) abort();
    for (int n = 0; n < n_out; n++)
        for (int k = 0; k < k_pad; k++)
            b[frag_b_offset(n, k, k_pad)] = (uint8_t)w[(size_t)n * (size_t)k_pad + (size_t)k];
    return b;
}

/* What the lanes hold of B for a block: read, or for a block of windows made from the period's. */
static inline void fragments_b(const struct fragments *f, const uint8_t *b, int tile, int block,
                               uint32_t out[32][4]) {
    const int base = frag_base(f->form), relief = frag_relief(f->form);
    const int real = f->k_pad / FRAG_BLOCK, period = base + relief;
    const int first = relief ? block / period * base : 0;
    const int within = relief ? block % period : block;
    memset(out, 0, 32 * 16);
    for (int l = 0; l < 32; l++) {
        if (!relief || within < base) {
            const int from = first + within;
            if (from < real)
                memcpy(out[l], b + ((size_t)tile * (size_t)real + (size_t)from) * 512 + l * 16, 16);
            continue;
        }
        for (int j = 0; j < 4; j++) { /* slot 4 j + t, by the definition in layout.h */
            const int t = l % 4;
            for (int i = 0; i < 4; i++) {
                int k; /* of the period */
                if (f->form == FORM_R32)
                    k = (2 * j + t % 2) * 64 + t / 2 * 32 + 8 * i;
                else
                    k = j * 64 + t * 16 + 4 * i + (within - base);
                const int n = tile * FRAG_COLS + l / 4, channel = first * FRAG_BLOCK + k;
                if (channel < f->k_pad)
                    out[l][j] |= (uint32_t)b[frag_b_offset(n, channel, f->k_pad)] << (8 * i);
            }
        }
    }
}

/* acc [rows][n_out] as the tensor cores would compute it; false: illegal metadata. */
static inline bool fragments_multiply(const struct fragments *f, const uint8_t *b, int n_out,
                                      int32_t *acc) {
    for (int tile_m = 0; tile_m * FRAG_ROWS < f->rows; tile_m++) {
        for (int tile_n = 0; tile_n * FRAG_COLS < n_out; tile_n++) {
            int32_t c[32][4];
            int32_t (*pc[32])[4];
            uint32_t va[32][8], vb[32][4], ve[32];
            const uint32_t *pa[32], *pa2[32], *pb[32], *pb2[32], *pe[32];
            memset(c, 0, sizeof c);
            for (int l = 0; l < 32; l++) {
                pc[l] = &c[l], pa[l] = va[l], pa2[l] = va[l] + 4, pe[l] = &ve[l];
                pb[l] = vb[l], pb2[l] = vb[l] + 2;
            }
            for (int block = 0; block < f->blocks; block++) {
                fragments_b(f, b, tile_n, block, vb);
                const size_t at = (size_t)tile_m * (size_t)f->blocks + (size_t)block;
                if (f->form == FORM_DENSE) {
                    for (int l = 0; l < 32; l++) { /* regs: row halves x two k16 of each k32 */
                        for (int h = 0; h < 2; h++) {
                            uint32_t four[4];
                            memcpy(four, f->a + at * 1024 + (size_t)(h * 512 + l * 16), 16);
                            va[l][h] = four[0], va[l][2 + h] = four[1];
                            va[l][4 + h] = four[2], va[l][6 + h] = four[3];
                        }
                    }
                    emulate_mma_s8(pc, pa, pb);
                    emulate_mma_s8(pc, pa2, pb2);
                    continue;
                }
                const size_t words = (size_t)((f->blocks + 3) / 4);
                for (int l = 0; l < 32; l++) {
                    memcpy(va[l], f->a + at * 512 + (size_t)(l * 16), 16);
                    memcpy(&ve[l],
                           f->e + ((size_t)tile_m * words + (size_t)(block / 4)) * 512 +
                               (size_t)(l * 16 + block % 4 * 4),
                           4);
                }
                if (!emulate_mma_sp_s8(pc, pa, pb, pe)) return false;
            }
            for (int l = 0; l < 32; l++) {
                for (int i = 0; i < 4; i++) {
                    const int row = tile_m * 16 + l / 4 + i / 2 * 8,
                              n = tile_n * 8 + l % 4 * 2 + i % 2;
                    if (row < f->rows && n < n_out)
                        acc[(size_t)row * (size_t)n_out + (size_t)n] = c[l][i];
                }
            }
        }
    }
    return true;
}

#endif
