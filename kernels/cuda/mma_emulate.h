/* mma_emulate.h: the tensor-core instructions that the kernels use, from lane registers, in plain C.
 * Register maps are those of the PTX ISA ("Matrix Fragments", "Sparse matrix storage"); lane l has
 * g = l / 4 and t = l % 4. For tests and for running kernels without a GPU. */
#ifndef AMBER_CUDA_MMA_EMULATE_H
#define AMBER_CUDA_MMA_EMULATE_H

#include "../f16.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static inline int emulate_byte(uint32_t word, int i) {
    return (int8_t)(word >> (8 * i));
}

/* c += a b for one output element of every lane. x [16][k], y [8][k]. */
static inline void emulate_tile_s8(int32_t (*const c[32])[4], const int8_t *x, const int8_t *y,
                                   int k) {
    for (int l = 0; l < 32; l++) {
        for (int i = 0; i < 4; i++) {
            const int8_t *row = x + (l / 4 + i / 2 * 8) * k, *col = y + (l % 4 * 2 + i % 2) * k;
            int32_t sum = 0;
            for (int j = 0; j < k; j++) sum += row[j] * col[j];
            (*c[l])[i] = (int32_t)((uint32_t)(*c[l])[i] + (uint32_t)sum);
        }
    }
}

/* mma.sync.m16n8k32.s32.s8.s8.s32, row by column. */
static inline void emulate_mma_s8(int32_t (*const c[32])[4], const uint32_t *const a[32],
                                  const uint32_t *const b[32]) {
    int8_t x[16][32], y[8][32];
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            for (int n = 0; n < 4; n++)
                x[g + i % 2 * 8][i / 2 * 16 + 4 * t + n] = (int8_t)emulate_byte(a[l][i], n);
        for (int j = 0; j < 2; j++)
            for (int n = 0; n < 4; n++) y[g][16 * j + 4 * t + n] = (int8_t)emulate_byte(b[l][j], n);
    }
    emulate_tile_s8(c, x[0], y[0], 32);
}

/* mma.sp::ordered_metadata.sync.m16n8k64.s32.s8.s8.s32, selector 0. false: a nibble is not one of
 * the six ordered pairs, for which the instruction promises nothing; c is then unchanged. */
static inline bool emulate_mma_sp_s8(int32_t (*const c[32])[4], const uint32_t *const a[32],
                                     const uint32_t *const b[32], const uint32_t *const e[32]) {
    uint32_t meta[16][2];
    int8_t x[16][64], y[8][64];
    for (int l = 0; l < 32; l++) meta[l / 4 + l % 2 * 8][l / 2 % 2] = *e[l];
    memset(x, 0, sizeof x);
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i % 2 * 8;
            for (int pair = 0; pair < 2; pair++) { /* two kept values of four k */
                int slot = 8 * (i / 2) + 2 * t + pair;
                unsigned nibble = meta[row][slot / 8] >> (slot % 8 * 4) & 15;
                unsigned first = nibble & 3, second = nibble >> 2;
                if (first >= second) return false;
                x[row][4 * slot + (int)first] = (int8_t)emulate_byte(a[l][i], 2 * pair);
                x[row][4 * slot + (int)second] = (int8_t)emulate_byte(a[l][i], 2 * pair + 1);
            }
        }
        for (int j = 0; j < 4; j++)
            for (int n = 0; n < 4; n++) y[g][16 * j + 4 * t + n] = (int8_t)emulate_byte(b[l][j], n);
    }
    emulate_tile_s8(c, x[0], y[0], 64);
    return true;
}

/* mma.sync.m16n8k16.f32.f16.f16.f32. The hardware's order of summation is not defined; this one is
 * double precision, rounded once. */
static inline void emulate_mma_f16(float (*const c[32])[4], const uint32_t *const a[32],
                                   const uint32_t *const b[32]) {
    float x[16][16], y[8][16];
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int n = 0; n < 2; n++) {
            for (int i = 0; i < 4; i++)
                x[g + i % 2 * 8][i / 2 * 8 + 2 * t + n] =
                    f32_from_f16_bits((uint16_t)(a[l][i] >> (16 * n)));
            for (int j = 0; j < 2; j++)
                y[g][8 * j + 2 * t + n] = f32_from_f16_bits((uint16_t)(b[l][j] >> (16 * n)));
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int i = 0; i < 4; i++) {
            double sum = (*c[l])[i];
            for (int k = 0; k < 16; k++)
                sum += (double)x[l / 4 + i / 2 * 8][k] * y[l % 4 * 2 + i % 2][k];
            (*c[l])[i] = (float)sum;
        }
    }
}

/* ldmatrix.sync.m8n8.x4.b16: row r of matrix i is the 16 bytes that lane 8 i + r names. */
static inline void emulate_ldmatrix(uint32_t (*const out[32])[4], const void *const row[32],
                                    bool transposed) {
    for (int i = 0; i < 4; i++) {
        uint16_t m[8][8];
        for (int r = 0; r < 8; r++) memcpy(m[r], row[8 * i + r], 16);
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4 * 2;
            uint16_t low = transposed ? m[t][g] : m[g][t];
            uint16_t high = transposed ? m[t + 1][g] : m[g][t + 1];
            (*out[l])[i] = low | (uint32_t)high << 16;
        }
    }
}

#endif
