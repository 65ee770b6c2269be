/* input.cuh: the inputs of INT8 products, one kernel per input: a row is made (normed, activated or
 * copied), shifted, pruned, quantized by what survived, and stored as fragments with their metadata.
 * What the CPU does row by row in engine/ops_input.c; the choice is the same bit for bit.
 *
 * A block makes one row, or two that share a mask. Rows stand in shared memory, or where they are too
 * long for it in a scratch area, with one float of padding per 32: threads take 32 neighbouring
 * channels each, and their accesses should not meet in one bank. */
#ifndef AMBER_CUDA_INPUT_CUH
#define AMBER_CUDA_INPUT_CUH

#include "simt.h"

enum { INPUT_THREADS = 256, INPUT_SHARED_MOST = 90 << 10 };

AMBER_HD int input_at(int k) {
    return k + k / 32;
}
AMBER_HD int input_channels(int form, int k_pad) {
    return form == FORM_DENSE ? k_pad : (frag_channels(form, k_pad) + 31) / 32 * 32;
}
/* Bytes of a block's working area: rows, and beside them the choices of a 2:4 form, or where there
 * are `scores` one per channel. */
AMBER_HD size_t input_bytes(int form, int k_pad, int tokens, bool scores) {
    const size_t channels = (size_t)input_channels(form, k_pad);
    const size_t row = 4 * (channels + channels / 32);
    const size_t beside = form != FORM_DENSE ? channels / 32 * sizeof(choice) : scores ? row : 0;
    return (row * (size_t)tokens + beside + 15) / 16 * 16;
}

struct input_rows {
    float *z; /* row i from z + i * row on */
    int row;
    float *score;   /* [channels], masked patterns */
    choice *chosen; /* [channels / 32], 2:4 forms */
    int rows, channels;
};

union input_slots {
    double d[32];
    float f[32];
    uint32_t u[32];
    int i[32];
};

DEVICE float input_activate(int source, float gate) {
    if (source == INPUT_SILU) return gate / (1.0f + expf(-gate));
    if (source == INPUT_GELU_ERF) return 0.5f * gate * (1.0f + erff(gate * 0.70710678f));
    if (source == INPUT_RELU2) return gate < 0 ? 0 : gate * gate;
    const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(inner));
}
DEVICE float input_clamped(float gate, float up) {
    gate = gate > 7 ? 7 : gate;
    up = up > 7 ? 7 : up < -7 ? -7 : up;
    return gate / (1.0f + expf(-1.702f * gate)) * (up + 1.0f);
}

/* z = the row that the source gives, zeros behind its end. */
DEVICE void input_make(const input_args &g, int row, float *z, int channels, input_slots *slots) {
    const float *x = g.x + (int64_t)row * g.n, *up = g.up ? g.up + (int64_t)row * g.n : NULL;
    float sum = 0, squares = 0;
    for (int k = (int)threadIdx.x; k < channels; k += INPUT_THREADS) {
        float v = k < g.n ? x[k] : 0;
        if (k < g.n && g.source == INPUT_CLAMPED) {
            v = input_clamped(v, up[k]);
        } else if (k < g.n && g.source >= INPUT_SILU) {
            v = input_activate(g.source, v);
            if (up) v = v * up[k];
        }
        z[input_at(k)] = v;
        sum = sum + v;
        squares = squares + v * v;
    }
    if (g.source != INPUT_RMSNORM && g.source != INPUT_LAYERNORM) return;
    float mean = 0;
    if (g.source == INPUT_LAYERNORM) {
        mean = block_sum(sum, slots->f) / (float)g.n;
        squares = 0;
        for (int k = (int)threadIdx.x; k < g.n; k += INPUT_THREADS) {
            const float d = z[input_at(k)] - mean;
            squares = squares + d * d;
        }
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, slots->f) / (float)g.n + g.eps);
    for (int k = (int)threadIdx.x; k < g.n; k += INPUT_THREADS) {
        float *at = &z[input_at(k)];
        *at = (*at - mean) * scale * g.weight[k];
        if (g.bias) *at = *at + g.bias[k];
    }
}

DEVICE double input_mean(const float *z, int n, input_slots *slots) {
    double sum = 0;
    for (int k = (int)threadIdx.x; k < n; k += INPUT_THREADS) sum += (double)z[input_at(k)];
    return block_sum(sum, slots->d) / n;
}
DEVICE double input_variance(const float *z, int n, input_slots *slots) {
    const double mean = input_mean(z, n, slots);
    double sum = 0;
    for (int k = (int)threadIdx.x; k < n; k += INPUT_THREADS) {
        const double d = (double)z[input_at(k)] - mean;
        sum += d * d;
    }
    return block_sum(sum, slots->d) / n;
}

AMBER_HD uint32_t input_bits(float v) {
    union {
        float f;
        uint32_t u;
    } bits = {v};
    return bits.u;
}

/* The lower median, found bit by bit: the largest key that at most (n - 1) / 2 others lie below. */
DEVICE float input_median(const float *z, int n, input_slots *slots) {
    uint32_t key = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const uint32_t candidate = key | 1u << bit;
        int below = 0;
        for (int k = (int)threadIdx.x; k < n; k += INPUT_THREADS)
            below += order_bits(z[input_at(k)]) < candidate;
        if (block_sum(below, slots->i) <= (n - 1) / 2) key = candidate;
    }
    return order_value(key);
}

/* ---- masked patterns (sparse.h) ---- */

DEVICE float input_energy(const input_args &g, const input_rows &w, int k) {
    float sum = 0;
    for (int i = 0; i < w.rows; i++) {
        const float z = w.z[i * w.row + input_at(k)], s = g.f && k < g.n ? z * g.f[k] : z;
        sum = i == 0 ? s * s : sum + s * s;
    }
    return sum;
}

DEVICE void input_prune_groups(const input_args &g, const input_rows &w) {
    const int block = g.pattern.block, m = g.pattern.m;
    const int units = (g.n + block - 1) / block;
    for (int u = (int)threadIdx.x; u < units; u += INPUT_THREADS) {
        float score;
        if (block == 1) {
            const float z = w.z[input_at(u)];
            score = fabsf(g.f ? z * g.f[u] : z);
        } else {
            const float left = input_energy(g, w, 4 * u) + input_energy(g, w, 4 * u + 1);
            const float right = input_energy(g, w, 4 * u + 2) + input_energy(g, w, 4 * u + 3);
            score = left + right;
        }
        w.score[u] = choose_ordered(score);
    }
    sync_block();
    for (int u = (int)threadIdx.x; u < units; u += INPUT_THREADS) {
        const int first = u / m * m;
        const float mine = w.score[u];
        int rank = 0;
        for (int j = first; j < first + m; j++) {
            const float score = j < units ? w.score[j] : 0.0f;
            rank += score > mine || (score == mine && j < u);
        }
        if (rank < g.pattern.n) continue;
        for (int k = u * block; k < (u + 1) * block; k++)
            for (int i = 0; i < w.rows; i++) w.z[i * w.row + input_at(k)] = 0;
    }
}

DEVICE void input_prune_topk(const input_args &g, const input_rows &w, input_slots *slots) {
    const int keep = (int)((int64_t)g.n * g.pattern.n / g.pattern.m);
    float *z = w.z;
    uint64_t smallest = 0;
    for (int pass = 0; pass < 2; pass++) { /* the second drops */
        for (int bit = pass ? 0 : 63; bit >= 0; bit--) {
            const uint64_t candidate = smallest | (uint64_t)1 << bit;
            int above = 0;
            for (int k = (int)threadIdx.x; k < g.n; k += INPUT_THREADS) {
                const float v = g.f ? z[input_at(k)] * g.f[k] : z[input_at(k)];
                const uint64_t key = (uint64_t)input_bits(choose_ordered(fabsf(v))) << 32 |
                                     (0xffffffffu - (uint32_t)k);
                if (pass && key < smallest) z[input_at(k)] = 0;
                above += key >= candidate;
            }
            if (!pass && block_sum(above, slots->i) >= keep) smallest = candidate;
        }
    }
}

/* ---- forms of 2:4 ---- */

/* Chooses among the channels k0 .. k0 + 31 and zeroes the rest. */
template <int FORM> DEVICE choice input_choose(const input_args &g, float *z, int k0) {
    float v[CHOOSE_WIDTH], f[CHOOSE_WIDTH];
    float *at = z + input_at(k0);
    AMBER_UNROLL
    for (int i = 0; i < CHOOSE_WIDTH; i++) {
        v[i] = at[i];
        f[i] = g.f && k0 + i < g.n ? g.f[k0 + i] : 1.0f;
    }
    choice c;
    choose_32(FORM, v, f, &c);
    const uint32_t kept = choose_kept(FORM, &c);
    AMBER_UNROLL
    for (int i = 0; i < CHOOSE_WIDTH; i++)
        if (!(kept >> i & 1)) at[i] = 0;
    return c;
}

/* A window's slot of the given members: two bytes and a nibble. */
DEVICE uint32_t input_window(unsigned bits, const float *z, int k0, int step, float factor,
                             uint32_t *nibble) {
    uint32_t q = 0;
    AMBER_UNROLL
    for (int i = 0; i < 4; i++) q |= quantize_byte(z[input_at(k0 + step * i)], factor) << (8 * i);
    return pack_slot(bits, q, nibble);
}

/* Pairs of windows, whose slots are neighbours: of 16 + 16 channels, or (r32) of the same half of two
 * neighbouring blocks. */
template <int FORM>
DEVICE void input_store_windows(const input_args &g, int row, const input_rows &w, float factor) {
    const int blocks = frag_blocks(FORM, g.k_pad),
              pairs = w.channels / (FORM == FORM_R32 ? 64 : 32);
    const int number = FORM == FORM_816X ? 2 : 1;
    for (int i = (int)threadIdx.x; i < pairs * number; i += INPUT_THREADS) {
        const int pair = i / number, which = i % number;
        uint32_t low, high, first, second;
        int k0;
        if (FORM == FORM_R32) {
            k0 = pair / 2 * 128 + pair % 2 * 32;
            first = input_window(w.chosen[k0 / 32].window[0][0], w.z, k0, 8, factor, &low);
            second =
                input_window(w.chosen[k0 / 32 + 2].window[0][0], w.z, k0 + 64, 8, factor, &high);
        } else {
            const choice *c = &w.chosen[pair];
            k0 = 32 * pair;
            first = input_window(c->window[which][0], w.z, k0 + which, 4, factor, &low);
            second = input_window(c->window[which][1], w.z, k0 + 16 + which, 4, factor, &high);
        }
        const int block = frag_relief_block(FORM, k0 / FRAG_BLOCK, which);
        const int slot = frag_window_slot(FORM, k0);
        *(uint32_t *)(void *)(g.a + frag_sparse_offset(row, block, slot, blocks)) =
            first | second << 16;
        g.e[frag_meta_offset(row, block, slot / 8, blocks) + (size_t)(slot % 8 / 2)] =
            (unsigned char)(low | high << 4);
    }
}

template <int FORM>
DEVICE void input_store_sparse(const input_args &g, int row, const input_rows &w, float factor) {
    const int blocks = frag_blocks(FORM, g.k_pad);
    for (int k0 = (int)threadIdx.x * 32; k0 < w.channels; k0 += INPUT_THREADS * 32) {
        const float *at = w.z + input_at(k0);
        uint32_t q[8];
        AMBER_UNROLL
        for (int i = 0; i < 8; i++) {
            q[i] = 0;
            AMBER_UNROLL
            for (int j = 0; j < 4; j++) q[i] |= quantize_byte(at[4 * i + j], factor) << (8 * j);
        }
        const int block = frag_block_of(FORM, k0 / FRAG_BLOCK), m = k0 / 32 % 2;
        packed32 packed;
        pack_32(&w.chosen[k0 / 32], q, m, &packed);
        AMBER_UNROLL
        for (int i = 0; i < 4; i++) {
            const int slot = frag_slot(k0 + 4 * i);
            *(uint32_t *)(void *)(g.a + frag_sparse_offset(row, block, slot, blocks)) =
                packed.word[i];
            g.e[frag_meta_offset(row, block, slot / 8, blocks) + (size_t)(slot % 8 / 2)] =
                (unsigned char)(packed.meta[slot / 8] >> (slot % 8 * 4));
        }
    }
    if (FORM != FORM_24) input_store_windows<FORM>(g, row, w, factor);
}

DEVICE void input_store_dense(const input_args &g, int row, const float *z, float factor) {
    for (int k0 = (int)threadIdx.x * 16; k0 < g.k_pad; k0 += INPUT_THREADS * 16) {
        uint32_t q[4];
        AMBER_UNROLL
        for (int i = 0; i < 4; i++) {
            q[i] = 0;
            AMBER_UNROLL
            for (int j = 0; j < 4; j++)
                q[i] |= quantize_byte(z[input_at(k0 + 4 * i + j)], factor) << (8 * j);
        }
        const uint4 v = {q[0], q[1], q[2], q[3]};
        *(uint4 *)(void *)(g.a + frag_dense_offset(row, k0, g.k_pad)) = v;
    }
}

/* ---- the kernel ---- */

/* FORM chooses among 32 channels; FORM_DENSE prunes by the pattern in any other way, or not at all.
 * STORED: FORM, or FORM_DENSE for rows with zeros. */
template <int FORM, int STORED> KERNEL(INPUT_THREADS, 1) void input_kernel(const input_args g) {
    DYNAMIC_SHARED(shared);
    SHARED input_slots slots;
    const bool pairs =
        FORM == FORM_DENSE && g.pattern.kind == AMBER_PATTERN_GROUP && g.pattern.tokens == 2;
    input_rows w;
    int row = (int)blockIdx.x;
    w.rows = 1;
    const int of = g.row_of ? g.row_of[row] : row; /* the same for all threads */
    if (of < 0) return;
    if (pairs) {
        const int end = 2 * row - g.odd + 2 < g.rows ? 2 * row - g.odd + 2 : g.rows;
        row = 2 * row - g.odd > 0 ? 2 * row - g.odd : 0;
        w.rows = end - row;
    }
    const size_t bytes =
        input_bytes(FORM, g.k_pad, pairs ? 2 : 1, g.pattern.kind != AMBER_PATTERN_DENSE);
    w.channels = input_channels(FORM, g.k_pad);
    float *area = (float *)(void *)(g.scratch ? g.scratch + blockIdx.x * bytes : shared);
    w.z = area;
    w.row = w.channels + w.channels / 32;
    area += pairs ? 2 * w.row : w.row;
    w.score = area;
    w.chosen = (choice *)(void *)area;

    SHARED float shift[2];
    SHARED double var[2];
    const bool pruned =
        (g.row_of ? of : row) >= g.pruned_from && g.pattern.kind != AMBER_PATTERN_DENSE;
    for (int i = 0; i < w.rows; i++) {
        float *z = w.z + i * w.row, off = 0;
        input_make(g, row + i, z, w.channels, &slots);
        sync_block();
        if (pruned && g.shift == INPUT_MEAN) off = (float)input_mean(z, g.n, &slots);
        if (pruned && g.shift == INPUT_MEDIAN) off = input_median(z, g.n, &slots);
        if (off != 0)
            for (int k = (int)threadIdx.x; k < g.n; k += INPUT_THREADS) z[input_at(k)] -= off;
        sync_block();
        const double before = pruned && g.var ? input_variance(z, g.n, &slots) : 0;
        if (threadIdx.x == 0) {
            shift[i] = off;
            var[i] = before;
        }
    }
    if (FORM != FORM_DENSE && pruned) {
        for (int k0 = (int)threadIdx.x * 32; k0 < w.channels; k0 += INPUT_THREADS * 32) {
            const choice c = input_choose<FORM>(g, w.z, k0);
            if (STORED != FORM_DENSE) w.chosen[k0 / 32] = c;
        }
    }
    if (FORM == FORM_DENSE && pruned) {
        if (g.pattern.kind == AMBER_PATTERN_GROUP) input_prune_groups(g, w);
        if (g.pattern.kind == AMBER_PATTERN_TOPK) input_prune_topk(g, w, &slots);
    }
    sync_block();
    for (int i = 0; i < w.rows; i++) {
        const float *z = w.z + i * w.row;
        uint32_t largest = 0;
        for (int k = (int)threadIdx.x; k < g.n; k += INPUT_THREADS) {
            const uint32_t bits = quantize_bits(z[input_at(k)]);
            largest = largest > bits ? largest : bits;
        }
        float factor, scale = quantize_scale(block_max(largest, slots.u), &factor);
        if (pruned && g.var) {
            const double left = input_variance(z, g.n, &slots);
            scale *= (float)sqrt(var[i] / (left > 1e-9 ? left : 1e-9));
        }
        if (threadIdx.x == 0) {
            g.scale[row + i] = scale;
            if (g.shifted) g.shifted[row + i] = shift[i];
        }
        if (STORED == FORM_DENSE)
            input_store_dense(g, row + i, z, factor);
        else
            input_store_sparse<FORM>(g, row + i, w, factor);
    }
}

#endif
