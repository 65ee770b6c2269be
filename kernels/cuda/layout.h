/* layout.h: where every element of an INT8 operand lies for the tensor cores. Plain inline C for host
 * and device: the kernels, the upload and the tests all index through these functions.
 *
 * Operands are stored fragment-major: what one lane of a warp feeds to mma.m16n8k32 (dense) or
 * mma.sp.m16n8k64 (2:4) is one 16-byte load, and a warp reads 512 bytes in a row.
 *
 * Blocks and slots. K is cut into blocks of 64 channels; the instruction sees a block as 16 slots of
 * four k. Which four channels sit in which slot is ours to choose as long as A and B agree. Lane t of
 * a quad gets the slots 4 j + t (j = 0..3) of B, so channels 16 t + 4 j .. + 3 go into slot 4 j + t:
 * a lane then holds 16 neighbouring channels, which are 16 neighbouring bytes of a weight row.
 *
 *     weights    B [N/8][K/64][lane = 4 (n%8) + k%64/16][16 bytes]
 *     dense      A [T/16][K/64][row%16 / 8][lane = 4 (row%8) + k%64/16][16 bytes]
 *     2:4        A [T/16][blocks][lane][4 words], E [T/16][blocks/4][lane][4 words]
 *
 * A 2:4 slot keeps two of its four values; their places are the nibble first | second << 2 with
 * first < second (ordered metadata). Sources of the register maps: PTX ISA, "Matrix Fragments for
 * mma.m16n8k32" and "for sparse mma.m16n8k64".
 *
 * Relief (sparse.h). The windows' columns are blocks of their own behind every `base` blocks of
 * channels; the weights that they meet are not stored twice, a lane makes them from what it holds:
 *
 *     2:4+r16   4 blocks, 1 of windows: window (block b, lane t) = byte 0 of the lane's four words;
 *               slot 4 b + t
 *     8:16x     the same, and a second block of windows from byte 1
 *     2:4+r32   8 blocks, 1 of windows: window (block b, lanes 2 m and 2 m + 1) = byte 0 of words 0
 *               and 2 of both lanes; slot 4 (b / 2) + 2 m + b % 2
 *
 * Hopper's wgmma takes A from registers by the same lane rule, so A and E serve it as they are. */
#ifndef AMBER_CUDA_LAYOUT_H
#define AMBER_CUDA_LAYOUT_H

#include "device.h"

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define AMBER_HD           static __host__ __device__ __forceinline__
#define AMBER_UNROLL       _Pragma("unroll")
#define AMBER_UNROLL_BY(n) AMBER_PRAGMA(unroll n)
#define AMBER_PRAGMA(text) _Pragma(#text)
#else
#define AMBER_HD static inline __attribute__((always_inline))
#define AMBER_UNROLL
#define AMBER_UNROLL_BY(n)
#endif

#define FRAG_BLOCK 64 /* channels of a block */
#define FRAG_ROWS  16 /* rows of an A fragment */
#define FRAG_COLS  8  /* outputs of a B fragment */
#define FRAG_BYTES 512
/* Metadata that names places 0 and 1 everywhere: legal, for rows that hold nothing. */
#define FRAG_EMPTY_META 0x44444444u

/* The form whose choice makes a pattern's mask; FORM_DENSE: none does, or there is no mask. */
AMBER_HD int frag_form_of(const struct amber_pattern *p) {
    if (p->kind == AMBER_PATTERN_RELIEF) return p->relief == 32 ? FORM_R32 : FORM_R16;
    if (p->kind != AMBER_PATTERN_GROUP || p->block != 1) return FORM_DENSE;
    if (p->relief) return FORM_816X;
    return p->n == 2 && p->m == 4 ? FORM_24 : FORM_DENSE;
}

/* Blocks of channels in a period, and blocks of windows behind them. */
AMBER_HD int frag_base(int form) {
    return form == FORM_R32 ? 8 : 4;
}
AMBER_HD int frag_relief(int form) {
    return form == FORM_816X ? 2 : form == FORM_R16 || form == FORM_R32 ? 1 : 0;
}

/* Blocks along K that the product goes through: k_pad / 64, windows and the padding of a last
 * period included. */
AMBER_HD int frag_blocks(int form, int k_pad) {
    int blocks = k_pad / FRAG_BLOCK, base = frag_base(form), relief = frag_relief(form);
    return relief ? (blocks + base - 1) / base * (base + relief) : blocks;
}
/* Channels including the padding of a last period: what a producer has to write. */
AMBER_HD int frag_channels(int form, int k_pad) {
    int period = frag_base(form) * FRAG_BLOCK;
    return frag_relief(form) ? (k_pad + period - 1) / period * period : k_pad;
}
/* The block that holds channel block `channel_block`. */
AMBER_HD int frag_block_of(int form, int channel_block) {
    int relief = frag_relief(form), base = frag_base(form);
    return relief ? channel_block / base * (base + relief) + channel_block % base : channel_block;
}
/* The block of windows number `which` of the period of channel block `channel_block`. */
AMBER_HD int frag_relief_block(int form, int channel_block, int which) {
    int relief = frag_relief(form), base = frag_base(form);
    return channel_block / base * (base + relief) + base + which;
}

/* Slot of the four channels that channel k (a multiple of 4) begins. */
AMBER_HD int frag_slot(int k) {
    return k % 16 / 4 * 4 + k % FRAG_BLOCK / 16;
}
/* Slot of the window that begins at channel k, in its block of windows. */
AMBER_HD int frag_window_slot(int form, int k) {
    int block = k / FRAG_BLOCK % frag_base(form), lane = k % FRAG_BLOCK / 16;
    return form == FORM_R32 ? 4 * (block / 2) + 2 * (lane / 2) + block % 2 : 4 * block + lane;
}

/* ---- byte offsets ---- */

AMBER_HD size_t frag_b_offset(int n, int k, int k_pad) {
    size_t block =
        (size_t)(n / FRAG_COLS) * (size_t)(k_pad / FRAG_BLOCK) + (size_t)(k / FRAG_BLOCK);
    return block * FRAG_BYTES + (size_t)((n % FRAG_COLS * 4 + k % FRAG_BLOCK / 16) * 16 + k % 16);
}
AMBER_HD size_t frag_dense_offset(int row, int k, int k_pad) {
    size_t block =
        (size_t)(row / FRAG_ROWS) * (size_t)(k_pad / FRAG_BLOCK) + (size_t)(k / FRAG_BLOCK);
    return block * (2 * FRAG_BYTES) + (size_t)(row % FRAG_ROWS / 8 * FRAG_BYTES) +
           (size_t)((row % 8 * 4 + k % FRAG_BLOCK / 16) * 16 + k % 16);
}
/* Two kept bytes of a slot. Slots 2 i and 2 i + 1 are neighbours. */
AMBER_HD size_t frag_sparse_offset(int row, int block, int slot, int blocks) {
    size_t at = (size_t)(row / FRAG_ROWS) * (size_t)blocks + (size_t)block;
    int lane = row % 8 * 4 + slot % 8 / 2, word = slot / 8 * 2 + row % FRAG_ROWS / 8;
    return at * FRAG_BYTES + (size_t)(lane * 16 + word * 4 + slot % 2 * 2);
}
/* The metadata word of slots 8 half .. 8 half + 7; slot s is nibble s % 8 of it. */
AMBER_HD size_t frag_meta_offset(int row, int block, int half, int blocks) {
    size_t at = (size_t)(row / FRAG_ROWS) * (size_t)((blocks + 3) / 4) + (size_t)(block / 4);
    int lane = row % 8 * 4 + half * 2 + row % FRAG_ROWS / 8;
    return at * FRAG_BYTES + (size_t)(lane * 16 + block % 4 * 4);
}

/* Bytes of whole buffers; rows and n_out are rounded up here. */
AMBER_HD size_t frag_b_bytes(int n_out, int k_pad) {
    return (size_t)((n_out + FRAG_COLS - 1) / FRAG_COLS * FRAG_COLS) * (size_t)k_pad;
}
AMBER_HD size_t frag_a_bytes(int form, int rows, int k_pad) {
    size_t tiles = (size_t)((rows + FRAG_ROWS - 1) / FRAG_ROWS);
    size_t per_block = form == FORM_DENSE ? 2 * FRAG_BYTES : FRAG_BYTES;
    return tiles * (size_t)frag_blocks(form, k_pad) * per_block;
}
AMBER_HD size_t frag_meta_bytes(int form, int rows, int k_pad) {
    size_t tiles = (size_t)((rows + FRAG_ROWS - 1) / FRAG_ROWS);
    return form == FORM_DENSE ? 0
                              : tiles * (size_t)((frag_blocks(form, k_pad) + 3) / 4) * FRAG_BYTES;
}

#endif
