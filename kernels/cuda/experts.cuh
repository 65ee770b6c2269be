/* experts.cuh: mixtures of experts. Rows go to the experts that a router chooses and stand together
 * there, each expert's from a multiple of `align` on, so that a product reads its matrix once; a place
 * is where a row stands for one of its experts. Nothing comes back to the host on the way. */
#ifndef AMBER_CUDA_EXPERTS_CUH
#define AMBER_CUDA_EXPERTS_CUH

#include "simt.h"

enum { ROUTE_THREADS = 128, SORT_THREADS = 256, EXPERT_THREADS = 256, EXPERTS_MOST = 1024 };

DEVICE double route_share(const route_args &g, float logit, double all) {
    return g.sigmoid ? 1 / (1 + exp(-(double)logit)) : exp((double)logit) / all;
}

/* Block: a row. */
KERNEL(ROUTE_THREADS, 1) void route_kernel(const route_args g) {
    SHARED float logits[EXPERTS_MOST], rank[EXPERTS_MOST];
    SHARED uint32_t slots[32];
    SHARED double sums[32];
    const int thread = (int)threadIdx.x, lane = thread % 32;
    const int64_t row = blockIdx.x;
    const float *x = g.x + row * g.n;
    for (int e = thread / 32; e < g.n_expert; e += ROUTE_THREADS / 32) {
        const float *w = g.router + (int64_t)e * g.n;
        float sum = 0;
        for (int k = lane; k < g.n; k += 32) sum = sum + x[k] * w[k];
        sum = lane_sum(sum);
        if (lane == 0) logits[e] = g.bias ? sum + g.bias[e] : sum;
    }
    sync_block();
    float most = 0;
    double all = 1;
    if (!g.sigmoid) {
        uint32_t key = 0;
        for (int e = thread; e < g.n_expert; e += ROUTE_THREADS) {
            const uint32_t own = order_bits(logits[e]);
            key = own > key ? own : key;
        }
        most = order_value(block_max(key, slots));
        double own = 0;
        for (int e = thread; e < g.n_expert; e += ROUTE_THREADS)
            own += exp((double)(logits[e] - most));
        all = block_sum(own, sums);
    }
    for (int e = thread; e < g.n_expert; e += ROUTE_THREADS)
        rank[e] = g.choice_bias
                      ? (float)(route_share(g, logits[e] - most, all) + (double)g.choice_bias[e])
                      : logits[e];
    sync_block();
    for (int i = 0; i < g.used; i++) {
        /* The largest, and of equal ones the lowest expert. */
        uint32_t best = 0, lowest = 0;
        for (int e = thread; e < g.n_expert; e += ROUTE_THREADS) {
            const uint32_t own = order_bits(rank[e]);
            best = own > best ? own : best;
        }
        best = block_max(best, slots);
        for (int e = thread; e < g.n_expert && lowest == 0; e += ROUTE_THREADS)
            if (order_bits(rank[e]) == best) lowest = (uint32_t)(EXPERTS_MOST - e);
        const int chosen = EXPERTS_MOST - (int)block_max(lowest, slots);
        if (thread == 0) {
            rank[chosen] = -INFINITY;
            g.chosen[row * g.used + i] = chosen;
            g.share[row * g.used + i] = (float)route_share(g, logits[chosen] - most, all);
        }
        sync_block();
    }
    if (thread > 0) return;
    float *share = g.share + row * g.used;
    double sum = 0;
    for (int i = 0; i < g.used; i++) sum += (double)share[i];
    const double norm = g.norm ? 1 / (sum > 1e-20 ? sum : 1e-20) : 1;
    for (int i = 0; i < g.used; i++) share[i] = (float)((double)share[i] * norm * (double)g.scale);
}

/* Block: an expert. Where its rows begin and how many they are; the places of its rows in their
 * order; and the row and expert of every place, row -1 where nobody stands. */
KERNEL(SORT_THREADS, 1) void sort_kernel(const sort_args g) {
    SHARED int counts[EXPERTS_MOST], mine[SORT_THREADS];
    const int thread = (int)threadIdx.x, expert = (int)blockIdx.x, n = g.rows * g.used;
    const int begin = (int)((int64_t)n * thread / SORT_THREADS);
    const int end = (int)((int64_t)n * (thread + 1) / SORT_THREADS);
    for (int e = thread; e <= expert; e += SORT_THREADS) counts[e] = 0;
    sync_block();
    int own = 0;
    for (int i = begin; i < end; i++) {
        if (g.chosen[i] <= expert) add_shared(&counts[g.chosen[i]], 1);
        own += g.chosen[i] == expert;
    }
    mine[thread] = own;
    sync_block();
    int at = 0;
    for (int e = 0; e < expert; e++) at += (counts[e] + g.align - 1) / g.align * g.align;
    int place = at;
    for (int t = 0; t < thread; t++) place += mine[t];
    for (int i = begin; i < end; i++) {
        if (g.chosen[i] != expert) continue;
        g.place[i] = place;
        g.row_of[place] = i / g.used;
        g.expert_of[place] = expert;
        place++;
    }
    const int count = counts[expert], behind = at + (count + g.align - 1) / g.align * g.align;
    const int last = expert == (int)gridDim.x - 1 ? g.places : behind;
    for (int p = at + count + thread; p < last; p += SORT_THREADS) g.row_of[p] = -1;
    if (thread == 0) {
        g.begin[expert] = at;
        g.count[expert] = count;
    }
}

/* Block: a place. Copies the row that stands there, fragment by fragment. */
KERNEL(EXPERT_THREADS, 1) void gather_kernel(const gather_args g) {
    const int place = (int)blockIdx.x, row = g.row_of[place], thread = (int)threadIdx.x;
    if (row < 0) return;
    if (thread == 0) {
        g.to_scale[place] = g.scale[row];
        if (g.shifted) g.to_shifted[place] = g.shifted[row];
    }
    if (g.form == FORM_DENSE) {
        for (int k = 16 * thread; k < g.k_pad; k += 16 * EXPERT_THREADS)
            *(uint4 *)(void *)(g.to_a + frag_dense_offset(place, k, g.k_pad)) =
                load16(g.a + frag_dense_offset(row, k, g.k_pad));
        return;
    }
    const int blocks = frag_blocks(g.form, g.k_pad);
    for (int i = thread; i < 8 * blocks; i += EXPERT_THREADS)
        *(uint32_t *)(void *)(g.to_a + frag_sparse_offset(place, i / 8, i % 8 * 2, blocks)) =
            *(const uint32_t *)(const void *)(g.a +
                                              frag_sparse_offset(row, i / 8, i % 8 * 2, blocks));
    for (int i = thread; i < 2 * blocks; i += EXPERT_THREADS)
        *(uint32_t *)(void *)(g.to_e + frag_meta_offset(place, i / 2, i % 2, blocks)) =
            *(const uint32_t *)(const void *)(g.e + frag_meta_offset(row, i / 2, i % 2, blocks));
}

/* Block: a row. x += the shares of its experts' outputs, in the order of the experts. */
KERNEL(EXPERT_THREADS, 1) void combine_kernel(const combine_args g) {
    SHARED int order[EXPERT_THREADS];
    const int thread = (int)threadIdx.x;
    const int64_t slot = (int64_t)blockIdx.x * g.used;
    float *x = g.x + (int64_t)blockIdx.x * g.n;
    /* Places stand in the order of the experts. */
    if (thread < g.used) {
        int before = 0;
        for (int i = 0; i < g.used; i++) before += g.place[slot + i] < g.place[slot + thread];
        order[before] = thread;
    }
    sync_block();
    for (int k = thread; k < g.n; k += EXPERT_THREADS) {
        float v = x[k];
        for (int i = 0; i < g.used; i++) {
            const int64_t at = slot + order[i];
            v = v + g.share[at] * g.out[(int64_t)g.place[at] * g.n + k];
        }
        x[k] = v;
    }
}

/* Block: a row. x += sigmoid(router . in) out. */
KERNEL(EXPERT_THREADS, 1) void gated_kernel(const gated_args g) {
    SHARED double slots[32];
    const int64_t at = (int64_t)blockIdx.x * g.n;
    double dot = 0;
    for (int k = (int)threadIdx.x; k < g.n; k += EXPERT_THREADS)
        dot += (double)g.in[at + k] * (double)g.router[k];
    const float share = (float)(1 / (1 + exp(-block_sum(dot, slots))));
    for (int k = (int)threadIdx.x; k < g.n; k += EXPERT_THREADS)
        g.x[at + k] = g.x[at + k] + share * g.out[at + k];
}

#endif
