/* gemm.cuh: INT8 products on tensor cores, and the one of a single row on the integer units.
 *
 * A block of 256 threads computes 32 * MT rows by 128 outputs, its 8 warps 2 by 4. Fragments of A and
 * B go through shared memory just as they lie in global memory (layout.h), a block of 64 channels per
 * stage; metadata goes to registers. Windows' weights are made from the weights of their period. */
#ifndef AMBER_CUDA_GEMM_CUH
#define AMBER_CUDA_GEMM_CUH

#include "simt.h"

enum { GEMM_THREADS = 256, GEMM_COLS = 128, GEMV_THREADS = 128 };

DEVICE void gemm_store(const gemm_args &g, int row, int n, int acc) {
    if (row >= g.rows || n >= g.n_out) return;
    float v = (float)acc * (g.a_scale[row] * g.w_scale[n]);
    if (g.shift) v = v + g.shift[row] * g.w_sum[n];
    if (g.bias) v = v + g.bias[n];
    float *y = g.y + row * g.ldy + n;
    *y = g.add ? *y + v : v;
}

template <int FORM, int MT> struct gemm_tile {
    static constexpr int rows = 32 * MT;
    static constexpr int a_tile = FORM == FORM_DENSE ? 2 * FRAG_BYTES : FRAG_BYTES;
    static constexpr int a_bytes = 2 * MT * a_tile;
    static constexpr int b_bytes = GEMM_COLS / FRAG_COLS * FRAG_BYTES;
    static constexpr int stage = a_bytes + b_bytes;
    static constexpr int stages = FORM == FORM_DENSE ? 3 : 4; /* at most 48 KiB */
    static constexpr int shared = stage * stages;
    static constexpr int relief = FORM == FORM_816X                      ? 2
                                  : FORM == FORM_R16 || FORM == FORM_R32 ? 1
                                                                         : 0;
    static constexpr int base = FORM == FORM_R32 ? 8 : relief ? 4 : 1;
};

template <int FORM, int MT>
DEVICE void gemm_fetch(const gemm_args &g, int block, int blocks, unsigned char *to) {
    typedef gemm_tile<FORM, MT> tile;
    const int tiles = (g.rows + FRAG_ROWS - 1) / FRAG_ROWS, first = (int)blockIdx.y * 2 * MT;
    for (int i = (int)threadIdx.x; i < tile::a_bytes / 16; i += GEMM_THREADS) {
        const int m = first + i / (tile::a_tile / 16);
        const bool exists = m < tiles;
        const size_t at = (size_t)(exists ? m : 0) * (size_t)blocks + (size_t)block;
        copy16(to + 16 * i, g.a + at * tile::a_tile + (size_t)(i % (tile::a_tile / 16) * 16),
               exists);
    }
    const int within = block % (tile::base + tile::relief);
    if (tile::relief && within >= tile::base) return;
    const int from = block / (tile::base + tile::relief) * tile::base + within;
    const int real = g.k_pad / FRAG_BLOCK, n_tiles = (g.n_out + FRAG_COLS - 1) / FRAG_COLS;
    for (int i = (int)threadIdx.x; i < tile::b_bytes / 16; i += GEMM_THREADS) {
        const int n = (int)blockIdx.x * (GEMM_COLS / FRAG_COLS) + i / 32;
        const bool exists = n < n_tiles && from < real;
        const size_t at = exists ? (size_t)n * (size_t)real + (size_t)from : 0;
        copy16(to + tile::a_bytes + 16 * i, g.b + at * FRAG_BYTES + (size_t)(i % 32 * 16), exists);
    }
}

/* The windows' weights that a lane can make of its 16 channels of base block `within`: window[which][j]
 * is slot 4 j + t. held: the lane's half of the window before, of R32. */
template <int FORM>
DEVICE void gemm_window(const uint32_t *b, int within, int lane, uint32_t (*window)[4],
                        uint32_t *held) {
    if (FORM == FORM_R32) {
        const uint32_t half = permute(b[0], b[2], 0x0040) & 0xffff;
        if (within % 2 == 0) {
            *held = half;
            return;
        }
        const uint32_t other = shuffle_xor(lane % 2 ? *held : half, 1);
        /* An even lane has windows of even blocks, an odd one of odd blocks; it lacks the half that
         * its neighbour has. */
        const uint32_t even = permute(*held, other, 0x5410), odd = permute(other, half, 0x5410);
        window[0][within / 2] = lane % 2 ? odd : even;
        return;
    }
    const uint32_t low = permute(b[0], b[1], 0x5140), high = permute(b[2], b[3], 0x5140);
    window[0][within] = permute(low, high, 0x5410);
    if (FORM == FORM_816X) window[1][within] = permute(low, high, 0x7632);
}

template <int FORM, int MT>
DEVICE void gemm_block(const gemm_args &g, const unsigned char *stage, const uint32_t (*b)[4],
                       int block, int blocks, int (*acc)[4][4]) {
    typedef gemm_tile<FORM, MT> tile;
    const int lane = (int)threadIdx.x % 32, warp_m = (int)threadIdx.x / 128;
    const int tiles = (g.rows + FRAG_ROWS - 1) / FRAG_ROWS;
    AMBER_UNROLL
    for (int m = 0; m < MT; m++) {
        const unsigned char *from = stage + (warp_m * MT + m) * tile::a_tile + lane * 16;
        const uint4 first = load16(from);
        if (FORM == FORM_DENSE) {
            const uint4 second = load16(from + FRAG_BYTES); /* rows g + 8 */
            const uint32_t low[4] = {first.x, second.x, first.y, second.y};
            const uint32_t high[4] = {first.z, second.z, first.w, second.w};
            AMBER_UNROLL
            for (int n = 0; n < 4; n++) {
                mma_s8(acc[m][n], low, b[n]);
                mma_s8(acc[m][n], high, b[n] + 2);
            }
        } else {
            const uint32_t a[4] = {first.x, first.y, first.z, first.w};
            const int at = (int)blockIdx.y * 2 * MT + warp_m * MT + m;
            const size_t word =
                ((size_t)at * (size_t)((blocks + 3) / 4) + (size_t)(block / 4)) * 32 + (size_t)lane;
            uint32_t e = FRAG_EMPTY_META;
            if (at < tiles)
                e = ((const uint32_t *)(const void *)g.e)[word * 4 + (size_t)(block % 4)];
            AMBER_UNROLL
            for (int n = 0; n < 4; n++) mma_sp_s8(acc[m][n], a, b[n], e);
        }
    }
}

/* The product of one expert, whose rows start at place `first`. */
DEVICE void gemm_choose(gemm_args &g, int expert, int first, int form) {
    g.a += frag_a_bytes(form, first, g.k_pad);
    if (form != FORM_DENSE) g.e += frag_meta_bytes(form, first, g.k_pad);
    g.b += (size_t)expert * frag_b_bytes(g.n_out, g.k_pad);
    g.w_scale += (int64_t)expert * g.n_out;
    if (g.bias) g.bias += (int64_t)expert * g.n_out;
    if (g.shift) {
        g.shift += first;
        g.w_sum += (int64_t)expert * g.n_out;
    }
    g.a_scale += first;
    g.y += first * g.ldy;
}

template <int FORM, int MT> KERNEL(GEMM_THREADS, 1) void gemm_kernel(const gemm_args given) {
    typedef gemm_tile<FORM, MT> tile;
    DYNAMIC_SHARED(shared);
    gemm_args g = given;
    if (g.begin) {
        g.rows = g.count[blockIdx.z];
        if ((int)blockIdx.y * tile::rows >= g.rows) return;
        gemm_choose(g, (int)blockIdx.z, g.begin[blockIdx.z], FORM);
    }
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int warp_m = warp / 4, warp_n = warp % 4;
    const int blocks = frag_blocks(FORM, g.k_pad);
    int acc[MT][4][4];
    AMBER_UNROLL
    for (int i = 0; i < MT * 16; i++) acc[i / 16][i / 4 % 4][i % 4] = 0;

    for (int block = 0; block < tile::stages - 1; block++) {
        if (block < blocks) gemm_fetch<FORM, MT>(g, block, blocks, shared + block * tile::stage);
        copy_commit();
    }
    uint32_t window[4][tile::relief ? tile::relief : 1][4], held[4];
    (void)held;
    for (int first = 0; first < blocks; first += tile::base + tile::relief) {
        AMBER_UNROLL
        for (int within = 0; within < tile::base + tile::relief; within++) {
            const int block = first + within, ahead = block + tile::stages - 1;
            copy_wait<tile::stages - 2>();
            sync_block(); /* the stage is there, and the one before is read */
            if (ahead < blocks)
                gemm_fetch<FORM, MT>(g, ahead, blocks, shared + ahead % tile::stages * tile::stage);
            copy_commit();
            const unsigned char *stage = shared + block % tile::stages * tile::stage;
            uint32_t b[4][4];
            AMBER_UNROLL
            for (int n = 0; n < 4; n++) {
                if (within < tile::base) {
                    const uint4 v =
                        load16(stage + tile::a_bytes + (warp_n * 4 + n) * FRAG_BYTES + lane * 16);
                    b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
                    if (tile::relief) gemm_window<FORM>(b[n], within, lane, window[n], &held[n]);
                } else {
                    AMBER_UNROLL
                    for (int j = 0; j < 4; j++) b[n][j] = window[n][within - tile::base][j];
                }
            }
            gemm_block<FORM, MT>(g, stage, b, block, blocks, acc);
        }
    }
    AMBER_UNROLL
    for (int m = 0; m < MT; m++) {
        AMBER_UNROLL
        for (int n = 0; n < 4; n++) {
            AMBER_UNROLL
            for (int i = 0; i < 4; i++)
                gemm_store(
                    g, (int)blockIdx.y * tile::rows + (warp_m * MT + m) * 16 + lane / 4 + i / 2 * 8,
                    (int)blockIdx.x * GEMM_COLS + (warp_n * 4 + n) * 8 + lane % 4 * 2 + i % 2,
                    acc[m][n][i]);
        }
    }
}

/* One row, or places of one row each, dense: every weight byte is read once. A block has 8 outputs of a
 * row, its warps share K. */
KERNEL(GEMV_THREADS, 1) void gemv_kernel(const gemm_args given) {
    SHARED int part[GEMV_THREADS / 32][FRAG_COLS];
    gemm_args g = given;
    if (g.expert_of) {
        const int place = (int)blockIdx.y;
        gemm_choose(g, g.expert_of[place], 0, FORM_DENSE);
        g.a += frag_dense_offset(place, 0, g.k_pad);
        g.a_scale += place;
        if (g.shift) g.shift += place;
        g.y += place * g.ldy;
    }
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int real = g.k_pad / FRAG_BLOCK;
    const unsigned char *b = g.b + (size_t)blockIdx.x * (size_t)real * FRAG_BYTES + lane * 16;
    const unsigned char *x = g.a + lane % 4 * 16;
    int acc = 0;
    AMBER_UNROLL_BY(4)
    for (int block = warp; block < real; block += GEMV_THREADS / 32) {
        const uint4 w = load16(b + (size_t)block * FRAG_BYTES);
        const uint4 v = load16(x + (size_t)block * 2 * FRAG_BYTES);
        acc = dot4(w.x, v.x, acc);
        acc = dot4(w.y, v.y, acc);
        acc = dot4(w.z, v.z, acc);
        acc = dot4(w.w, v.w, acc);
    }
    acc += shuffle_xor(acc, 1);
    acc += shuffle_xor(acc, 2);
    if (lane % 4 == 0) part[warp][lane / 4] = acc;
    sync_block();
    if (threadIdx.x >= FRAG_COLS) return;
    int sum = 0;
    for (int i = 0; i < GEMV_THREADS / 32; i++) sum += part[i][threadIdx.x];
    gemm_store(g, 0, (int)blockIdx.x * FRAG_COLS + (int)threadIdx.x, sum);
}

#endif
