/* sparse_ref.c: the choice of survivors, unit by unit, as sparse.h defines it. */
#include "../sparse.h"

#include <math.h>
#include <string.h>

/* The row or pair being pruned. */
struct pruned {
    float *z;
    int64_t ldz;
    int rows;
    const float *f;
    int n;
};

static float ordered(float score) {
    return isnan(score) ? INFINITY : score;
}

static float weighted(const struct pruned *r, int row, int k) {
    float z = r->z[row * r->ldz + k];
    return r->f ? z * r->f[k] : z;
}

/* Energy of channel k over the rows; 0 behind the end. */
static float energy(const struct pruned *r, int k) {
    if (k >= r->n) return 0;
    float s = weighted(r, 0, k), e = s * s;
    if (r->rows == 2) {
        float t = weighted(r, 1, k), u = t * t;
        e = e + u;
    }
    return e;
}

static float unit_score(const struct pruned *r, int block, int unit) {
    if (block == 1) return unit < r->n ? ordered(fabsf(weighted(r, 0, unit))) : 0;
    float left = energy(r, 4 * unit) + energy(r, 4 * unit + 1);
    float right = energy(r, 4 * unit + 2) + energy(r, 4 * unit + 3);
    return ordered(left + right);
}

static void drop(const struct pruned *r, int k) {
    if (k >= r->n) return;
    for (int row = 0; row < r->rows; row++) r->z[row * r->ldz + k] = 0;
}

/* How many of score[0..count) go before score[i]. */
static int rank_of(const float *score, int count, int i) {
    int rank = 0;
    for (int j = 0; j < count; j++) rank += score[j] > score[i] || (score[j] == score[i] && j < i);
    return rank;
}

static void prune_groups(const struct amber_pattern *p, const struct pruned *r) {
    float score[64];
    for (int first = 0; first * p->block < r->n; first += p->m) {
        for (int i = 0; i < p->m; i++) score[i] = unit_score(r, p->block, first + i);
        for (int i = 0; i < p->m; i++) {
            if (rank_of(score, p->m, i) < p->n) continue;
            for (int k = 0; k < p->block; k++) drop(r, (first + i) * p->block + k);
        }
    }
}

static void prune_relief(const struct amber_pattern *p, const struct pruned *r) {
    enum { MAX_GROUPS = 8 };
    const int groups = p->relief / 4, step = groups / 4; /* every step-th group has a member */
    for (int first = 0; first < r->n; first += p->relief) {
        float e[MAX_GROUPS][4], gain[4];
        for (int g = 0; g < groups; g++)
            for (int i = 0; i < 4; i++) e[g][i] = ordered(energy(r, first + 4 * g + i));
        for (int w = 0; w < 4; w++) {
            const float *group = e[w * step];
            float third = 0;
            for (int i = 0; i < 4; i++)
                if (rank_of(group, 4, i) == 2) third = group[i];
            gain[w] = fminf(group[0], third);
        }
        for (int g = 0; g < groups; g++) {
            bool relieved = g % step == 0 && rank_of(gain, 4, g / step) < 2;
            int start = relieved; /* the member is kept and does not compete */
            for (int i = start; i < 4; i++)
                if (rank_of(e[g] + start, 4 - start, i - start) >= 2) drop(r, first + 4 * g + i);
        }
    }
}

/* Keys order like (score, then lower index first) and are unique, so the smallest surviving key is
 * found bit by bit from the top. */
static void prune_topk(const struct amber_pattern *p, const struct pruned *r, uint64_t *keys) {
    const int64_t keep = (int64_t)r->n * p->n / p->m;
    for (int k = 0; k < r->n; k++) {
        float score = unit_score(r, 1, k);
        uint32_t bits;
        memcpy(&bits, &score, 4);
        keys[k] = (uint64_t)bits << 32 | (UINT32_MAX - (uint32_t)k);
    }
    uint64_t smallest = 0;
    for (int bit = 63; bit >= 0; bit--) {
        uint64_t candidate = smallest | (uint64_t)1 << bit;
        int64_t above = 0;
        for (int k = 0; k < r->n; k++) above += keys[k] >= candidate;
        if (above >= keep) smallest = candidate;
    }
    for (int k = 0; k < r->n; k++)
        if (keys[k] < smallest) drop(r, k);
}

size_t amber_prune_scratch(int n) {
    return (size_t)n * sizeof(uint64_t);
}

void amber_prune_ref(const struct amber_pattern *p, float *z, int64_t ldz, int rows, const float *f,
                     int n, void *scratch) {
    const struct pruned r = {z, ldz, rows, f, n};
    if (p->kind == AMBER_PATTERN_GROUP) prune_groups(p, &r);
    if (p->kind == AMBER_PATTERN_RELIEF) prune_relief(p, &r);
    if (p->kind == AMBER_PATTERN_TOPK) prune_topk(p, &r, scratch);
}
