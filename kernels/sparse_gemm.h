/* sparse_gemm.h: INT8 matrix products that skip what a block pattern has pruned.
 *
 * A quad is 4 adjacent channels: one vpdpbusd lane, one group of a weight panel (kernels.h). Of
 * every group of 16 quads (64 channels) a row has at most `keep` that are not all zero, and the
 * lists name exactly `keep`, filled up with zero quads: constant counts keep the inner loops free of
 * surprises. A kept quad costs one broadcast of its activations; the weights it meets are plain
 * loads, so the load ports do the selecting.
 *
 * Rows go in pairs. Inside a window of 256 channels the quads that both rows keep come first: their
 * weights are loaded once for both. Then come the others, one of each row at a time. Rows that share
 * their mask (N:16x4t2) have no others; a lone row's partner is all zeros and shares its mask.
 *
 *     pair    window 0, window 1, ..., 64 bytes of slack, uint8 common[windows]
 *     window  xa[64] int32, xb[64] int32, oa[64] uint16, ob[64] uint16
 *
 * of which the first keep * (groups in the window: 4, fewer at the end of the row) entries count; the
 * places are fixed so that one register addresses all four arrays. xa[i] is a quad of the pair's
 * first row (4 int8 in memory order), oa[i] its place in the window: 64 * quad, which is also the
 * offset in bytes of the weights it meets from where the window starts in a panel. xb, ob: the second
 * row's. For i < common both offsets are equal and only oa is set. */
#ifndef AMBER_SPARSE_GEMM_H
#define AMBER_SPARSE_GEMM_H

#include "sparse.h"

struct amber_a8;
struct amber_gemm_w8a8;

#define AMBER_NM_GROUP  64  /* channels of a group */
#define AMBER_NM_WINDOW 256 /* channels of a window */
#define AMBER_NM_SLACK  64  /* bytes: vector stores may run over the last window */

struct amber_nm_window {
    int32_t xa[64], xb[64];
    uint16_t oa[64], ob[64];
};

struct amber_nm {
    uint8_t *lists; /* [pairs, stride], 64-byte aligned */
    int64_t stride; /* bytes: amber_nm_stride(k_pad) */
    int keep;       /* quads listed of every 16: 1..16 */
    int first;      /* 1: the first row stands alone, and pair 0 holds nothing else */
};

/* The `keep` that fits a pattern, 0 where lists cannot hold it. */
static inline int amber_nm_keep(const struct amber_pattern *p) {
    if (p->kind != AMBER_PATTERN_GROUP || p->block != 4 || 16 % p->m != 0) return 0;
    return p->n * (16 / p->m);
}

static inline int amber_nm_windows(int k_pad) {
    return (k_pad + AMBER_NM_WINDOW - 1) / AMBER_NM_WINDOW;
}
/* Where a pair's common counts start. */
static inline int64_t amber_nm_counts(int k_pad) {
    return amber_nm_windows(k_pad) * (int64_t)sizeof(struct amber_nm_window) + AMBER_NM_SLACK;
}
/* An odd number of cache lines, so that the pairs' windows spread over the L1 sets. */
static inline int64_t amber_nm_stride(int k_pad) {
    int64_t bytes = amber_nm_counts(k_pad) + amber_nm_windows(k_pad);
    return ((bytes + 63) / 64 | 1) * 64;
}
static inline int amber_nm_pairs(int rows, int first) {
    return (rows + first + 1) / 2;
}
/* The first row of a pair, and how many (1 or 2) it has. */
static inline int amber_nm_row(const struct amber_nm *nm, int pair) {
    return pair == 0 ? 0 : 2 * pair - nm->first;
}
static inline int amber_nm_rows(const struct amber_nm *nm, int pair, int rows) {
    int left = rows - amber_nm_row(nm, pair), most = pair == 0 && nm->first ? 1 : 2;
    return left < most ? left : most;
}

struct amber_pattern;
/* One pair of rows pruned, quantized and listed at once, as prune, quantize_row and pack_nm would one
 * after the other; a->scale and a->sum are written, a->q is not. x [rows of the pair, n] float32 stays
 * as it is; f [n] or NULL as prune's. A quad is listed where the pattern keeps it, whatever its values
 * round to. Needs amber_nm_keep(p) == nm->keep < 16. */
typedef void (*amber_list_rows_fn)(const struct amber_pattern *p, const struct amber_nm *nm,
                                   const struct amber_a8 *a, int pair, const float *x,
                                   const float *f, int n);
/* Lists the quads of pairs pair0..pair1-1 of the rows a.q. */
typedef void (*amber_pack_nm_fn)(const struct amber_nm *nm, const struct amber_a8 *a, int pair0,
                                 int pair1);
/* The product of kernels.h, bit for bit, with the rows taken from the lists; g->a.q is not read. */
typedef void (*amber_gemm_nm_fn)(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm,
                                 int panel0, int panel1);

void amber_pack_nm_ref(const struct amber_nm *nm, const struct amber_a8 *a, int pair0, int pair1);
void amber_gemm_nm_ref(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel0,
                       int panel1);
#if defined(__x86_64__)
void amber_pack_nm_avx2(const struct amber_nm *nm, const struct amber_a8 *a, int pair0, int pair1);
void amber_pack_nm_avx512vnni(const struct amber_nm *nm, const struct amber_a8 *a, int pair0,
                              int pair1);
void amber_list_rows_avx512vnni(const struct amber_pattern *p, const struct amber_nm *nm,
                                const struct amber_a8 *a, int pair, const float *x, const float *f,
                                int n);
void amber_gemm_nm_avx2(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel0,
                        int panel1);
void amber_gemm_nm_avxvnni(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm, int panel0,
                           int panel1);
void amber_gemm_nm_avx512vnni(const struct amber_gemm_w8a8 *g, const struct amber_nm *nm,
                              int panel0, int panel1);
#endif

#endif
