/* sparse.h: which channels of an activation row survive. One description serves every pattern of
 * the N:M family; kernels/ref/sparse_ref.c is the contract in code.
 *
 * Groups. A row z [n] is cut into groups of `m` units along the channels; a unit is `block`
 * adjacent channels (1: the papers' element masks, arXiv 2508.02128 and 2509.22166; 4: one VNNI
 * lane). Of every group exactly the `n` units with the largest score survive; ties go to the lower
 * index. A ragged last group is as if the row were padded with zeros.
 *
 * Scores are float32, each operation rounded, so that every instruction set chooses alike. With
 * s[k] = z[k] * f[k] (f NULL: z[k]) the score of
 *     a channel     is |s[k]|;
 *     a block of 4  is (e[0] + e[1]) + (e[2] + e[3]), e[k] = s[k]^2, and with tokens == 2
 *                   e[k] = s0[k]^2 + s1[k]^2 over the two rows of a pair, which share one mask.
 * A score that is not a number counts as infinite: among the largest, so that what went wrong stays
 * in the row and shows in the result. Zeros of both signs are equal; so are squares that underflow
 * to zero, and those that overflow. Survivors keep their bits, the rest becomes +0.
 * Scaling all scores by a power of two, or by any positive factor while rounding makes no new ties,
 * changes no mask.
 *
 * Relief windows: 2:4 on hardware that holds 2 of 4, with K lengthened by duplicated weight
 * columns. Every `relief` channels (16 or 32) share one more group of four, the window, whose
 * members are channels 0, 4, 8, 12 of each 16, or 0, 8, 16, 24 of each 32. It holds two of its four
 * members, and so two crowded groups keep a third channel. With e[k] = s[k]^2, the gain of a group
 * that has a member is the smaller of the member's e and the group's third largest e. The two
 * groups with the largest gains (ties: the lower) keep their member and the two largest of the
 * other three; all other groups keep their two largest. This keeps the most energy that fits: 10 of
 * 16, 18 of 32. */
#ifndef AMBER_SPARSE_H
#define AMBER_SPARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum amber_pattern_kind {
    AMBER_PATTERN_DENSE = 0,
    AMBER_PATTERN_GROUP, /* n of m units of `block` channels, mask shared by `tokens` rows */
    AMBER_PATTERN_TOPK,  /* floor(channels * n / m) largest of the whole row: reference only */
    AMBER_PATTERN_RELIEF /* 2:4 with one relief window per `relief` channels */
};

struct amber_pattern {
    int32_t kind;
    int32_t n, m;   /* GROUP: 1 <= n <= m <= 64; RELIEF: 2, 4; TOPK: n percent, m is 100 */
    int32_t block;  /* GROUP: 1 or 4 */
    int32_t tokens; /* GROUP: 1, or 2 with block == 4 */
    int32_t relief; /* RELIEF: 16 or 32. GROUP: 0, or 16 for "8:16x": the mask is that of 8:16, two
                       windows per 16 (channels 0, 4, 8, 12 and 1, 5, 9, 13) hold it */
};

/* Longest text of a pattern with its NUL. */
#define AMBER_PATTERN_TEXT 24

/* Reads "8:16", "3:4", "8:16x4", "8:16x4t2", "2:4+r16", "2:4+r32", "8:16x", "top50%" (unstructured)
 * or "dense" (all fields 0); every field of *out is set. Returns false and an explanation in why
 * (at most why_size bytes with the NUL: "expected ..., found ...") otherwise. text need not end in
 * NUL. */
bool amber_pattern_parse(const char *text, size_t length, struct amber_pattern *out, char *why,
                         size_t why_size);
/* The text that parses to *p again. */
void amber_pattern_format(const struct amber_pattern *p, char out[AMBER_PATTERN_TEXT]);
/* Share of channels that a full group keeps: 0.5 for 8:16, 0.625 for 2:4+r16. */
double amber_pattern_kept(const struct amber_pattern *p);

/* Zeroes in place what does not survive.
 * z: rows [rows, ldz] float32, rows is 1 or p->tokens; a lone row of a two-token pattern is masked
 * by itself. f [n] float32, finite and > 0, or NULL. n: channels. scratch: amber_prune_scratch(n)
 * bytes, 64-byte aligned. Results do not depend on the instruction set. */
typedef void (*amber_prune_fn)(const struct amber_pattern *p, float *z, int64_t ldz, int rows,
                               const float *f, int n, void *scratch);
size_t amber_prune_scratch(int n);

void amber_prune_ref(const struct amber_pattern *p, float *z, int64_t ldz, int rows, const float *f,
                     int n, void *scratch);
/* Groups of 2, 4, 8, 16 and 32 units; everything else is left to ref. */
#if defined(__x86_64__)
void amber_prune_avx2(const struct amber_pattern *p, float *z, int64_t ldz, int rows,
                      const float *f, int n, void *scratch);
void amber_prune_avx512vnni(const struct amber_pattern *p, float *z, int64_t ldz, int rows,
                            const float *f, int n, void *scratch);
#endif

#endif
