/* attention.cuh: causal attention over a float16 cache (kernels.h, struct amber_attention): many rows
 * on tensor cores with a running softmax, few rows by stretches of the cache that are joined after. */
#ifndef AMBER_CUDA_ATTENTION_CUH
#define AMBER_CUDA_ATTENTION_CUH

#include "simt.h"

enum { FLASH_THREADS = 128, FLASH_ROWS = 64, STRETCH = 256, JOIN_THREADS = 128 };

DEVICE float attention_score(const attention_args &g, float dot) {
    const float score = g.scale * dot;
    return g.softcap > 0 ? g.softcap * tanhf(score / g.softcap) : score;
}

/* ---- many rows ----
 *
 * Keys and values are float16; q and the weights are not, and go through the tensor cores as two
 * float16 each, what is left of the first in the second: rounding them once would move the INT8
 * roundings that follow about as much as quantization itself errs. */

template <int HD> struct flash_tile {
    static constexpr int keys = HD > 128 ? 16 : HD > 64 ? 32 : 64; /* positions of a step */
    static constexpr int stride = HD + 8; /* halves; keeps rows out of each other's banks */
    static constexpr int shared = 2 * stride * (2 * FLASH_ROWS + 2 * keys);
};

/* Halves of `count` cache rows from position `first` on, zeros behind `last` and behind head_dim. */
template <int HD>
DEVICE void flash_fetch(const attention_args &g, const uint16_t *cache, int first, int last,
                        uint16_t *to) {
    typedef flash_tile<HD> tile;
    for (int i = (int)threadIdx.x; i < tile::keys * (HD / 8); i += FLASH_THREADS) {
        const int r = i / (HD / 8), d = i % (HD / 8) * 8, p = first + r;
        const bool exists = p <= last && d < g.head_dim;
        const uint16_t *from = cache + (exists ? (int64_t)(p % g.n_ctx) * g.head_dim + d : 0);
        copy16(to + r * tile::stride + d, from, exists);
    }
}

template <int HD> KERNEL(FLASH_THREADS, 1) void flash_kernel(const attention_args g) {
    typedef flash_tile<HD> tile;
    constexpr int KT = tile::keys / 8;
    DYNAMIC_SHARED(shared);
    uint16_t *sq = (uint16_t *)(void *)shared;
    uint16_t *sk = sq + 2 * FLASH_ROWS * tile::stride, *sv = sk + tile::keys * tile::stride;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int head = (int)blockIdx.y, row0 = (int)blockIdx.x * FLASH_ROWS, pos0 = *g.pos0;
    const int64_t cache = (int64_t)(head / (g.n_head / g.n_head_kv)) * g.n_ctx * g.head_dim;

    for (int i = (int)threadIdx.x; i < FLASH_ROWS * HD; i += FLASH_THREADS) {
        const int r = i / HD, d = i % HD;
        const bool exists = row0 + r < g.rows && d < g.head_dim;
        const int64_t at = ((int64_t)(row0 + r) * g.n_head + head) * g.head_dim + d;
        const float q = exists ? g.q[at] : 0.0f;
        const uint16_t high = half_bits(q);
        sq[r * tile::stride + d] = high;
        sq[(FLASH_ROWS + r) * tile::stride + d] = half_bits(q - float_of_half(high));
    }
    float o[HD / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    if (g.sink) { /* a score that is seen first, by one of the lanes of a row */
        most[0] = most[1] = g.sink[head];
        sum[0] = sum[1] = lane % 4 == 0 ? 1 : 0;
    }
    AMBER_UNROLL
    for (int i = 0; i < HD / 2; i++) o[i / 4][i % 4] = 0;

    const int last_row = row0 + FLASH_ROWS < g.rows ? row0 + FLASH_ROWS - 1 : g.rows - 1;
    const int last = pos0 + last_row;
    int first = g.window ? pos0 + row0 - g.window + 1 : 0;
    first = first < 0 ? 0 : first / tile::keys * tile::keys;
    for (; first <= last; first += tile::keys) {
        sync_block(); /* the step before has been read */
        flash_fetch<HD>(g, g.k + cache, first, last, sk);
        flash_fetch<HD>(g, g.v + cache, first, last, sv);
        copy_commit();
        copy_wait<0>();
        sync_block();

        float s[KT][4];
        AMBER_UNROLL
        for (int i = 0; i < KT * 4; i++) s[i / 4][i % 4] = 0;
        AMBER_UNROLL
        for (int d = 0; d < HD; d += 16) {
            uint32_t a[4], low[4];
            const uint16_t *from = sq + (warp * 16 + lane % 16) * tile::stride + d + lane / 16 * 8;
            load_matrices<false>(low, from + FLASH_ROWS * tile::stride);
            load_matrices<false>(a, from);
            AMBER_UNROLL
            for (int n = 0; n < KT; n += 2) {
                uint32_t b[4]; /* two tiles of eight keys, two halves of the 16 channels each */
                load_matrices<false>(b, sk + (n * 8 + lane / 16 * 8 + lane % 8) * tile::stride + d +
                                            lane / 8 % 2 * 8);
                mma_f16(s[n], low, b);
                mma_f16(s[n + 1], low, b + 2);
                mma_f16(s[n], a, b);
                mma_f16(s[n + 1], a, b + 2);
            }
        }
        AMBER_UNROLL
        for (int h = 0; h < 2; h++) { /* rows g and g + 8 of the warp's 16 */
            const int pos = pos0 + row0 + warp * 16 + lane / 4 + 8 * h;
            float top = most[h];
            AMBER_UNROLL
            for (int i = 0; i < KT * 2; i++) {
                const int p = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
                const bool seen = p <= pos && (!g.window || p > pos - g.window) && p <= last;
                float *at = &s[i / 2][2 * h + i % 2];
                *at = seen ? attention_score(g, *at) : -INFINITY;
                top = fmaxf(top, *at);
            }
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            /* A row that has seen nothing yet keeps zeros. */
            const float base = top == -INFINITY ? 0.0f : top, fade = expf(most[h] - base);
            float added = 0;
            AMBER_UNROLL
            for (int i = 0; i < KT * 2; i++) {
                float *at = &s[i / 2][2 * h + i % 2];
                *at = expf(*at - base);
                added = added + *at;
            }
            most[h] = top;
            sum[h] = sum[h] * fade + added;
            AMBER_UNROLL
            for (int i = 0; i < HD / 8; i++) {
                o[i][2 * h] *= fade;
                o[i][2 * h + 1] *= fade;
            }
        }
        AMBER_UNROLL
        for (int k = 0; k < KT; k += 2) {
            uint32_t a[4], low[4];
            AMBER_UNROLL
            for (int i = 0; i < 4; i++) {
                const float *from = s[k + i / 2] + i % 2 * 2;
                const uint16_t p0 = half_bits(from[0]), p1 = half_bits(from[1]);
                a[i] = p0 | (uint32_t)p1 << 16;
                low[i] = half_bits(from[0] - float_of_half(p0)) |
                         (uint32_t)half_bits(from[1] - float_of_half(p1)) << 16;
            }
            AMBER_UNROLL
            for (int d = 0; d < HD / 8; d += 2) {
                uint32_t b[4];
                load_matrices<true>(b, sv + (k * 8 + lane % 16) * tile::stride + d * 8 +
                                           lane / 16 * 8);
                mma_f16(o[d], low, b);
                mma_f16(o[d + 1], low, b + 2);
                mma_f16(o[d], a, b);
                mma_f16(o[d + 1], a, b + 2);
            }
        }
    }
    AMBER_UNROLL
    for (int h = 0; h < 2; h++) {
        sum[h] += shuffle_xor(sum[h], 1);
        sum[h] += shuffle_xor(sum[h], 2);
        const int row = row0 + warp * 16 + lane / 4 + 8 * h;
        float *out = g.out + ((int64_t)row * g.n_head + head) * g.head_dim;
        AMBER_UNROLL
        for (int i = 0; i < HD / 8; i++) {
            AMBER_UNROLL
            for (int j = 0; j < 2; j++) {
                const int d = 8 * i + lane % 4 * 2 + j;
                if (row < g.rows && d < g.head_dim) out[d] = o[i][2 * h + j] / sum[h];
            }
        }
    }
}

/* ---- few rows ---- */

/* Block (head, row, stretch): STRETCH visible positions of one row. Writes their weighted values, the
 * largest score and the sum of weights. */
KERNEL(STRETCH, 1) void stretch_kernel(const attention_args g) {
    DYNAMIC_SHARED(shared);
    SHARED uint32_t slot[32];
    SHARED float slot_sum[32];
    float *q = (float *)(void *)shared, *weight = q + g.head_dim, *sums = weight + STRETCH;
    const int thread = (int)threadIdx.x, head = (int)blockIdx.x,
              row = g.first_row + (int)blockIdx.y;
    const int pos = *g.pos0 + row, n = g.head_dim;
    const int oldest = g.window && pos >= g.window ? pos - g.window + 1 : 0;
    const int first = oldest + (int)blockIdx.z * STRETCH;
    if (first > pos) return;
    const int count = pos - first + 1 < STRETCH ? pos - first + 1 : STRETCH;
    const int64_t cache = (int64_t)(head / (g.n_head / g.n_head_kv)) * g.n_ctx * n;

    for (int d = thread; d < n; d += STRETCH) q[d] = g.q[((int64_t)row * g.n_head + head) * n + d];
    sync_block();
    float score = -INFINITY;
    if (thread < count) {
        const uint16_t *k = g.k + cache + (int64_t)((first + thread) % g.n_ctx) * n;
        float dot = 0;
        for (int d = 0; d < n; d += 8) {
            const uint4 v = load16(k + d);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
            AMBER_UNROLL
            for (int i = 0; i < 8; i++)
                dot += q[d + i] * float_of_half((uint16_t)(words[i / 2] >> (16 * (i % 2))));
        }
        score = attention_score(g, dot);
    }
    const float most = order_value(block_max(order_bits(score), slot));
    weight[thread] = expf(score - most);
    const float sum = block_sum(weight[thread], slot_sum);

    /* Pairs of channels beside each other, groups of positions below. */
    const int pairs = n / 2, groups = STRETCH / pairs, group = thread / pairs;
    float low = 0, high = 0;
    if (group < groups) {
        for (int p = group; p < count; p += groups) {
            const uint16_t *v = g.v + cache + (int64_t)((first + p) % g.n_ctx) * n;
            const uint32_t two = *(const uint32_t *)(const void *)(v + thread % pairs * 2);
            low += weight[p] * float_of_half((uint16_t)two);
            high += weight[p] * float_of_half((uint16_t)(two >> 16));
        }
        sums[2 * thread] = low;
        sums[2 * thread + 1] = high;
    }
    sync_block();
    float *out =
        g.partial + (((int64_t)blockIdx.y * g.n_head + head) * g.stretches + blockIdx.z) * (n + 2);
    for (int d = thread; d < n; d += STRETCH) {
        float v = 0;
        for (int i = 0; i < groups; i++) v += sums[i * n + d];
        out[d] = v;
    }
    if (thread == 0) {
        out[n] = most;
        out[n + 1] = sum;
    }
}

/* Block (head, row): joins the stretches. */
KERNEL(JOIN_THREADS, 1) void join_kernel(const attention_args g) {
    const int head = (int)blockIdx.x, row = g.first_row + (int)blockIdx.y, n = g.head_dim;
    const int pos = *g.pos0 + row;
    const int seen = g.window && pos >= g.window ? g.window : pos + 1;
    const int count = (seen + STRETCH - 1) / STRETCH;
    const float *in = g.partial + ((int64_t)blockIdx.y * g.n_head + head) * g.stretches * (n + 2);
    float most = g.sink ? fmaxf(in[n], g.sink[head]) : in[n];
    for (int i = 1; i < count; i++) most = fmaxf(most, in[i * (n + 2) + n]);
    for (int d = (int)threadIdx.x; d < n; d += JOIN_THREADS) {
        float v = 0, sum = g.sink ? expf(g.sink[head] - most) : 0;
        for (int i = 0; i < count; i++) {
            const float *part = in + i * (n + 2), share = expf(part[n] - most);
            v += share * part[d];
            sum += share * part[n + 1];
        }
        g.out[((int64_t)row * g.n_head + head) * n + d] = v / sum;
    }
}

#endif
