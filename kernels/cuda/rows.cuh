/* rows.cuh: small kernels over rows: norms of heads, rotary positions with the cache's writes, the
 * norm behind a half, soft caps. */
#ifndef AMBER_CUDA_ROWS_CUH
#define AMBER_CUDA_ROWS_CUH

#include "simt.h"

enum { ROW_THREADS = 256 };

KERNEL(ROW_THREADS, 1) void norm_kernel(const norm_args g) {
    SHARED float slots[32];
    const int64_t at = blockIdx.x * g.ld + (int64_t)blockIdx.y * g.n;
    const float *x = g.x + at, *weight = g.weight + (int64_t)blockIdx.y * g.step;
    const float *bias = g.bias ? g.bias + (int64_t)blockIdx.y * g.step : NULL;
    float *y = g.y + at, mean = 0, squares = 0;
    if (g.layer_norm) {
        for (int k = (int)threadIdx.x; k < g.n; k += ROW_THREADS) mean = mean + x[k];
        mean = block_sum(mean, slots) / (float)g.n;
    }
    for (int k = (int)threadIdx.x; k < g.n; k += ROW_THREADS) {
        const float d = x[k] - mean;
        squares = squares + d * d;
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, slots) / (float)g.n + g.eps);
    for (int k = (int)threadIdx.x; k < g.n; k += ROW_THREADS) {
        float v = (x[k] - mean) * scale * weight[k];
        if (bias) v = v + bias[k];
        y[k] = g.add ? y[k] + v : v;
    }
}

DEVICE void rope_heads(const rope_args &g, float *x, int heads, const float *cos,
                       const float *sin) {
    const int half = g.n_rot / 2;
    for (int i = (int)threadIdx.x; i < heads * half; i += ROW_THREADS) {
        float *head = x + i / half * g.head_dim;
        const int pair = i % half;
        const int a = g.halves ? pair : 2 * pair, b = g.halves ? pair + half : 2 * pair + 1;
        const float u = head[a], v = head[b], c = cos[pair], s = sin[pair];
        head[a] = u * c - v * s;
        head[b] = u * s + v * c;
    }
}

KERNEL(ROW_THREADS, 1) void rope_kernel(const rope_args g) {
    const int64_t row = blockIdx.x, width = (int64_t)g.n_head_kv * g.head_dim;
    float *k = g.k + row * width;
    float *q = g.q + row * g.n_head * g.head_dim;
    if (g.cos) {
        const float *cos = g.cos + row * (g.n_rot / 2), *sin = g.sin + row * (g.n_rot / 2);
        rope_heads(g, q, g.n_head, cos, sin);
        rope_heads(g, k, g.n_head_kv, cos, sin);
        sync_block();
    }
    if (g.growth)
        for (int i = (int)threadIdx.x; i < g.n_head * g.head_dim; i += ROW_THREADS)
            q[i] = q[i] * g.growth[row];
    if (!g.keys) return;
    const float *v = g.v + row * width;
    const int64_t at = (int64_t)((*g.pos0 + (int)row) % g.n_ctx) * g.head_dim;
    for (int i = (int)threadIdx.x; i < width; i += ROW_THREADS) {
        const int64_t to = (int64_t)(i / g.head_dim) * g.n_ctx * g.head_dim + at + i % g.head_dim;
        g.keys[to] = half_bits(k[i]);
        g.values[to] = half_bits(v[i]);
    }
}

KERNEL(ROW_THREADS, 1) void softcap_kernel(const softcap_args g) {
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i < g.n) g.x[i] = g.cap * tanhf(g.x[i] / g.cap);
}

#endif
